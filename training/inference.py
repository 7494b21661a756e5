"""
Inference: logits of rows, answers to prompts, and the flags of commands that generate text.
"""

import contextlib
import io
import sys
import textwrap
from pathlib import Path

import torch
import torch.distributed as dist

import salora as sl
from data import InputError, need
from data.batching import batch_order, collate, load_tokenizer, tokenize
from data.download import model_folder
from data.instruct import DEMO, TEMPLATES, encode_prompt
from model import DecoderConfig, load_decoder, load_encoder, read_config, read_json, stop_ids
from training import flags
from training.device import PROCESSES, RANK
from training.loop import load_adapter
from training.runs import read_result

MODEL = "folder in Hugging Face layout, or a hub name (default: the demo's)"


def evaluate(model, rows, pad_id, device, batch_size=128):
    """Logits (n, num_labels) of `rows`, float32 numpy; each process computes its share."""
    logits = torch.zeros(len(rows), model.num_labels, device=device)
    model.eval()
    with torch.inference_mode():
        for batch in batch_order([len(ids) for ids, _ in rows], batch_size)[RANK::PROCESSES]:
            logits[batch] = model(*collate([rows[i] for i in batch], pad_id, device)).float()
    if PROCESSES > 1:
        dist.all_reduce(logits)
    return logits.cpu().numpy()


def read_run(flag, folder):
    """result.json of the finished run in `folder`, the value of `flag`."""
    result = read_result(folder)
    if result is None:
        seeds = f", such as {folder}/seed0" if (Path(folder) / "seed0").is_dir() else ""
        raise InputError(f"{flag} {folder}: has no result.json, expected the folder of a finished "
                         f"run of train_glue.py{seeds}")
    return result


def open_classifier(flag, folder, result, device, model=None):
    """A function from texts (tuples of one or two sentences) to logits (n, num_labels), with the
    adapter of a train_glue.py run. result: read_run(flag, folder); model: where the run's model
    is, if it has moved."""
    settings, labels = result["settings"], result.get("labels")
    if not (Path(folder) / "adapter").is_dir():
        raise InputError(f"{flag} {folder}: has no adapter/ (method {settings['method']}); "
                         f"expected a run of {', '.join(flags.LOW_RANK)}")
    lacks = sorted({"model", "dtype", "max_length"} - settings.keys())
    need(not lacks, f"{flag} {folder}: its result.json", f"missing {', '.join(lacks)}",
         "a run of this version of train_glue.py")
    source = model_folder(model or settings["model"])
    tokenizer = load_tokenizer(source)
    with contextlib.redirect_stdout(io.StringIO()):  # no "new head": the adapter has it
        dtype = getattr(torch, settings["dtype"])
        encoder = load_encoder(source, len(labels or [0]), dtype).to(device)
    for module in encoder.head:
        module.float()
    load_adapter(encoder, Path(folder) / "adapter")
    c = encoder.config

    def logits(texts):
        tokens = tokenize(tokenizer, texts, settings["max_length"], c.vocab_size)
        return evaluate(encoder, tokens, c.pad_token_id, device)

    return logits


def answer(model, tokenizer, prompts, stop, max_new_tokens, batch_size=16, **sampling):
    """The model's answers, as text, to prompts (lists of token ids)."""
    model.eval()
    texts = []
    for i in range(0, len(prompts), batch_size):
        rows = [[] for _ in prompts[i:i + batch_size]]
        for tokens in model.generate(prompts[i:i + batch_size], max_new_tokens, stop, **sampling):
            for row, token in zip(rows, tokens):
                if token is not None and token not in stop:
                    row.append(token)
        texts += [tokenizer.decode(row).strip() for row in rows]
    return texts


def subcommand(name, description, script="train_instruct.py"):
    parser = flags.new_parser(textwrap.fill(description, 78), prog=f"{script} {name}")
    return parser, flags.flag_group(parser, "flags")


def model_flags(parser, arg):
    arg("--model", help=MODEL)
    arg("--adapter", help="folder of an adapter that a run saved (default: none)")
    arg("--merge", action="store_true", default=False,
        help="add the adapter to the weights first: faster, the same up to rounding")
    arg("--template", choices=list(TEMPLATES),
        help="as in training (default: that of the adapter's run, else alpaca)")
    arg("--max-new-tokens", type=int, default=256, help="limit of the answer")
    arg("--temperature", type=float, default=0.0,
        help="0 takes the most likely token; above 0, tokens are sampled")
    arg("--top-p", type=float, default=1.0,
        help="sample from the smallest set of tokens whose probabilities reach this")
    arg("--seed", type=int, default=0, help="of the sampling")
    flags.machine_flags(parser, dtype="that of the adapter's run, else of the model")


def open_model(args):
    """The model of model_flags, its tokenizer and the ids that end a text. Fills in defaults."""
    flags.at_least(args, 1, "max_new_tokens")
    flags.at_least(args, 0, "temperature", "seed")
    need(0 < args.top_p <= 1, "--top-p", args.top_p, "a share in (0, 1]")
    need(args.temperature == 0 or args.temperature >= 0.001, "--temperature", args.temperature,
         "0, or at least 0.001")
    need(args.temperature or args.top_p == 1, "--top-p", args.top_p, "none without --temperature")
    need(args.adapter or not args.merge, "--merge", "given", "none without --adapter")
    device = flags.use_machine(args)
    run = read_result(Path(args.adapter) / "..") if args.adapter else None
    settings = run["settings"] if run else {}
    flags.fill_in(args, model=str(DEMO / "llama"), template=settings.get("template", "alpaca"))
    folder = model_folder(args.model)
    flags.fill_in(args, dtype=settings.get("dtype") or dtype_of(folder))
    read_config(folder, DecoderConfig)  # a model of another kind is refused as such
    tokenizer, stop = load_tokenizer(folder), stop_ids(folder)
    model = load_decoder(folder, getattr(torch, args.dtype), device).eval()
    if args.adapter:
        load_adapter(model, args.adapter)
        if args.merge:
            sl.merge(model)
    return model, tokenizer, stop


def dtype_of(folder):
    """The dtype to compute in with a model folder: bfloat16 if its weights are, else float32."""
    config = read_json(folder / "config.json")
    stored = config.get("dtype") or config.get("torch_dtype")  # dtype: transformers 5
    return "bfloat16" if stored == "bfloat16" else "float32"


def encode_prompts(args, model, tokenizer, texts):
    """Prompts as lists of token ids; prints the dtype. InputError: the model does not know an id,
    or has no room for the answer."""
    prompts = [encode_prompt(tokenizer, text, model.config.vocab_size) for text in texts]
    longest = max(map(len, prompts))
    room = max(model.config.max_length - longest, 0)
    if args.max_new_tokens > room:
        raise InputError(f"--max-new-tokens is {args.max_new_tokens}; with the prompt of {longest} "
                         f"tokens the model has positions for {room} more")
    print(f"computed in {args.dtype} (--dtype)", file=sys.stderr)
    return prompts
