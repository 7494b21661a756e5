"""Instruction data: from {instruction, input, output} rows to tokens of prompts and responses."""

import json
import re
from dataclasses import dataclass
from pathlib import Path

from data import InputError, draw_rows, need, read_text
from data.batching import check_ids

DEMO = Path(__file__).parent / "demo"
TEMPLATES = {  # prompt with an input, prompt without one, what ends a response before end-of-text
    "alpaca": (
        "Below is an instruction that describes a task, paired with an input that provides further "
        "context. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n",
        "Below is an instruction that describes a task. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\n{instruction}\n\n### Response:\n",
        ""),
    "chatml": (
        "<|im_start|>user\n{instruction}\n\n{input}<|im_end|>\n<|im_start|>assistant\n",
        "<|im_start|>user\n{instruction}<|im_end|>\n<|im_start|>assistant\n",
        "<|im_end|>"),
}


@dataclass
class Example:
    prompt: list  # token ids
    response: list  # token ids; it ends with end_id unless it was cut
    row: dict = None  # its source

    def __len__(self):
        return len(self.prompt) + len(self.response)


def fill(template, instruction, input=""):
    """The prompt as text."""
    with_input, without_input, _ = TEMPLATES[template]
    values = dict(instruction=instruction, input=input)
    prompt = with_input if input else without_input
    return re.sub(r"\{(instruction|input)\}", lambda match: values[match[1]], prompt)


def load_instructions(file):
    """Rows of a JSON list or of JSONL, as Alpaca has them: dicts with instruction, input (may be
    missing or null) and output. Rows whose instruction or output is empty, such as 28 rows of
    Alpaca's own file, are left out, and a printed line says so. InputError names the row."""
    text = read_text(file, hint="; expected a JSON list or JSONL of objects with instruction, "
                                "input and output")
    try:
        if text.lstrip().startswith("["):
            rows = [(f"row {i}", row) for i, row in enumerate(json.loads(text))]
        else:
            rows = [(f"line {i}", json.loads(line)) for i, line in enumerate(text.split("\n"), 1)
                    if line.strip()]
    except (ValueError, RecursionError) as e:
        raise InputError(f"{file}: is neither a JSON list nor JSONL ({e})") from None
    if not rows:
        raise InputError(f"{file}: has no rows")
    kept, empty = [], []
    for where, row in rows:
        values = {"input": "", **row} if isinstance(row, dict) else {}
        texts = {}
        for name in ("instruction", "input", "output"):
            value = values.get(name)
            texts[name] = "" if value is None and name in values else value
            # JSON may hold half of a surrogate pair, which tokenizers refuse
            if not isinstance(texts[name], str) or re.search("[\ud800-\udfff]", texts[name]):
                raise InputError(f"{file}: {where}: {name} is {ascii(value)[:80]}, expected text; "
                                 f"rows are objects with instruction, input and output")
            texts[name] = texts[name].strip()
        missing = [name for name in ("instruction", "output") if not texts[name]]
        if missing:
            empty.append(f"{where}: {missing[0]} is {values[missing[0]]!r}")
        else:
            kept.append(texts)
    if not kept:
        raise InputError(f"{file}: {empty[0]}, and no other row has both an instruction and an "
                         "output")
    if empty:
        print(f"{file}: {len(empty)} of {len(rows)} rows are left out, as they have no instruction "
              f"or no output; the first is {empty[0]}")
    return kept


def split(rows, hold_out):
    """Training rows and held-out rows, in the order of the file. `hold_out` random ones, or below 1
    this share of them, are held out, the same every time."""
    n = int(hold_out) if hold_out >= 1 else max(1, round(hold_out * len(rows)))
    need(n < len(rows), "--hold-out", hold_out, f"fewer than the {len(rows)} rows")
    return tuple([rows[i] for i in part] for part in draw_rows(len(rows), n))


def encode_prompt(tokenizer, text, vocab_size):
    """Token ids with what the tokenizer puts before a text (LLaMA's <s>), without what it puts
    after it. InputError: the model does not know one of them."""
    encoding = tokenizer.encode(text)
    ids, special = list(encoding.ids), list(encoding.special_tokens_mask)
    end = tokenizer.encode(text, add_special_tokens=False).ids
    while special and special[-1] and ids[-1:] != end[-1:]:
        ids.pop()
        special.pop()
    check_ids([ids], vocab_size)
    return ids


def encode(tokenizer, rows, template, end_id, max_length, vocab_size):
    """[Example] of the rows. Prompt and response are tokenized separately, so no token spans both.
    Responses are cut so that rows have at most max_length tokens. A row whose prompt leaves no room
    for a response is left out, and a printed line says so."""
    ending = TEMPLATES[template][2]
    examples = []
    for row in rows:
        text = fill(template, row["instruction"], row["input"])
        prompt = encode_prompt(tokenizer, text, vocab_size)
        response = tokenizer.encode(row["output"] + ending, add_special_tokens=False).ids
        if response[-1:] != [end_id]:
            response.append(end_id)
        if len(prompt) < max_length:
            examples.append(Example(prompt, response[:max_length - len(prompt)], row))
    check_ids([e.response for e in examples], vocab_size)
    if len(examples) < len(rows):
        print(f"{len(rows) - len(examples)} of {len(rows)} rows are left out: their prompts fill "
              f"all of --max-length {max_length}")
    if not examples:
        raise InputError(f"--max-length is {max_length}, and no prompt leaves room for a response "
                         f"in {len(rows)} rows: give more")
    return examples
