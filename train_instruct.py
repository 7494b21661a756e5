"""
Tunes a LLaMA on instructions with SaLoRA or LoRA, and generates answers.

    python train_instruct.py                                   # offline demo, about a minute
    python train_instruct.py --model DIR --data alpaca.json --out runs/NAME
    python train_instruct.py generate --model DIR --adapter runs/NAME/adapter --instruction ".."
    python train_instruct.py style --model DIR --adapter DIR --data DIR/yelp --direction neg2pos
    python train_instruct.py score --outputs FILE --references FILE.. --classifier RUN --lm FILE

DIR is a folder in Hugging Face layout (config.json, model.safetensors or its shards,
tokenizer.json), --data a JSON list or JSONL of objects with instruction, input and output. A run
writes to --out: report.html (the run as one page), result.json, log.jsonl, gates.jsonl,
predictions.tsv, adapter/ (loads in PEFT) and checkpoint.safetensors (for --resume).
"""

import math
import re
from pathlib import Path

import torch
import torch.distributed as dist

import adapter
from data import InputError, need
from data.batching import batch_order, load_tokenizer, send
from data.download import model_folder
from data.instruct import DEMO, TEMPLATES, encode, fill, load_instructions, split
from model import DECODER_LINEARS, DecoderConfig, load_decoder, read_config, stop_ids
from training import flags, loop, runs
from training.device import PROCESSES, RANK, own_device
from training.inference import (
    MODEL,
    answer,
    encode_prompts,
    model_flags,
    open_model,
    subcommand,
)
from training.loop import token_losses


def parse_args(argv=None):
    parser = flags.new_parser(__doc__, usage="train_instruct.py [flags]")
    arg = flags.flag_group(parser, "what most runs need")
    arg("--model", help=MODEL)
    arg("--data", help="JSON or JSONL file of instructions (default: the demo's)")
    arg("--template", choices=list(TEMPLATES), default="alpaca",
        help="the prompt around an instruction: Alpaca's, or a turn of a chat")
    flags.main_flags(arg, ("salora", "lora", "lora-svd"), epochs="3", batch_size=16,
                     lr="3e-4; for demo 5e-3", out="runs/DATA-METHOD")

    arg = flags.flag_group(parser, "rows and tokens")
    arg("--train-on-prompt", action="store_true", default=False,
        help="train on the tokens of the prompt too, not just the response")
    arg("--limit-train", type=int, metavar="N", help="use the first N training rows (default: all)")
    arg("--limit-dev", type=int, metavar="N", help="use the first N held-out rows (default: all)")
    arg("--hold-out", type=float, metavar="N", default=0.05,
        help="hold out the same N random rows every time, to score on; below 1: this share of "
        "the rows")
    arg("--max-length", type=int, default=512,
        help="cut prompt and response to this many tokens")
    arg("--generate", type=int, metavar="N", help="answer N held-out rows before and after "
        "training (default: 8; for demo 100)")
    flags.method_flags(parser, DECODER_LINEARS)
    flags.run_flags(parser, dtype="bfloat16; for demo float32")
    args = parser.parse_args(argv)
    args.idle = flags.idle(args, parser)

    demo = args.model is None and args.data is None
    missing = "--data" if args.model else "--model"
    need(demo or (args.model and args.data), missing, "not given",
         "both --model and --data (or neither, for the demo)")
    if demo:
        flags.fill_in(args, model=str(DEMO / "llama"), data=str(DEMO / "instruct.jsonl"), threads=1,
                      lr=5e-3, dtype="float32", generate=100)
    flags.fill_in(args, lr=3e-4, dtype="bfloat16", generate=8, epochs=3)
    flags.settle(args)
    flags.at_least(args, 0, "generate")
    return args


# -------------------------------------------------------------------------------------------------
# loss


def collate(examples, device, on_prompt=False):
    """input_ids and targets (b, t), padded on the right; a target is the next token, or -100 for
    none. Targets stay on the CPU, so token_losses can count them without waiting for a GPU."""
    t = max(map(len, examples))
    ids = torch.tensor([e.prompt + e.response + [0] * (t - len(e)) for e in examples])
    targets = torch.full_like(ids, -100)
    for i, e in enumerate(examples):
        start = 0 if on_prompt else len(e.prompt) - 1
        targets[i, start:len(e) - 1] = ids[i, start + 1:len(e)]
    return send(ids, device), targets


@torch.no_grad()
def evaluate(model, examples, device, batch_size=32):
    """Summed loss and number of response tokens of each example, (n, 2) on the CPU. Each process
    computes its share."""
    model.eval()
    sums = torch.zeros(len(examples), 2, device=device)
    for batch in batch_order([len(e) for e in examples], batch_size)[RANK::PROCESSES]:
        ids, targets = collate([examples[i] for i in batch], device)
        count = (targets != -100).sum(1)  # (b,)
        losses = token_losses(model, model.hidden(ids), targets).split(count.tolist())
        losses = torch.stack([part.sum() for part in losses])  # (b,)
        sums[batch] = torch.stack([losses, count.to(losses)], 1)
    if PROCESSES > 1:
        dist.all_reduce(sums)
    return sums.cpu()


# -------------------------------------------------------------------------------------------------
# one run


def train(args, seed, out):
    """One run: trains, writes its files into `out`, returns result.json (None if RANK > 0)."""
    # ---- data, checked against the model's sizes
    rows, held = split(load_instructions(args.data), args.hold_out)
    rows, held = rows[:args.limit_train], held[:args.limit_dev]
    folder = model_folder(args.model)
    config, tokenizer = read_config(folder, DecoderConfig), load_tokenizer(folder)
    stop = stop_ids(folder)
    if args.max_length > config.max_length:
        raise InputError(f"--max-length is {args.max_length}, but {args.model} has positions for "
                         f"{config.max_length} tokens")
    flags.check_sizes(args, config)
    end_of_turn = tokenizer.token_to_id("<|im_end|>")
    end_id = end_of_turn if end_of_turn in stop else min(stop)
    examples, dev = (encode(tokenizer, part, args.template, end_id, args.max_length,
                            config.vocab_size) for part in (rows, held))
    lengths = [len(e) for e in examples]
    # the loss of a step is a mean over target tokens
    counts = [len(e) - 1 if args.train_on_prompt else len(e.response) for e in examples]
    plan = loop.schedule(args, lengths, counts, args.epochs)

    # ---- model and method
    torch.manual_seed(seed)
    device = own_device(args)
    model = load_decoder(folder, getattr(torch, args.dtype), device)
    model.checkpoint_activations = args.checkpoint_activations
    lowrank = loop.install(args, model, plan.steps, seed)
    trainable_params = loop.count_trainable(model)
    settings = loop.settings_of(args, seed, plan, lowrank)
    loop.announce(args, settings, f"{args.method} on {args.data}: {len(examples)} training rows "
                  f"with {sum(counts):,} target tokens; {plan.steps} steps of "
                  f"{plan.rows_per_step}; {trainable_params:,} parameters to train")
    held = [e.row for e in dev[:args.generate]]
    prompts = [e.prompt for e in dev[:args.generate]]
    before = answer(model, tokenizer, prompts, stop, 40) if RANK == 0 else []

    # ---- training
    hidden = torch.compile(model.hidden, dynamic=True) if args.compile else model.hidden

    def loss_of(rows):
        ids, targets = collate([examples[j] for j in rows], device, args.train_on_prompt)
        return token_losses(model, hidden(ids), targets).sum()

    def evaluate_dev():
        sums = evaluate(model, dev, device)
        loss = (sums[:, 0].sum() / sums[:, 1].sum()).item()
        return [sums.numpy()], dict(loss=loss, perplexity=math.exp(min(loss, 700)))

    with runs.own_folder(args, out):
        _, scores, history, seconds = loop.fit(
            args, plan, settings, out, model, lowrank, loss_of, evaluate_dev)

        # ---- results; result.json comes last and marks the run as finished
        if RANK:
            return None
        answers = answer(model, tokenizer, prompts, stop, 128)
        lines = ["index\tlabel\tprediction"]
        for i, (row, text) in enumerate(zip(held, answers)):
            lines.append(f"{i}\t{escape(row['output'])}\t{escape(text)}")
        runs.write_text(out / "predictions.tsv", "\n".join(lines) + "\n")
        adapter.save(model, out / "adapter", budget=plan.budget,
                     base_model_name_or_path=str(args.model), task_type="CAUSAL_LM")
        shown = [dict(instruction=row["instruction"], input=row["input"], reference=row["output"],
                      before=b, after=a) for row, b, a in zip(held, before, answers)]
        if shown:
            scores["exact_match"] = sum(e["after"] == e["reference"] for e in shown) / len(shown)
        # first those wrong before and right after
        best = sorted(shown, key=lambda e: (e["before"] == e["reference"],
                                            e["after"] != e["reference"]))
        result = dict(
            task=Path(args.data).stem, model=args.model, method=args.method, seed=seed,
            metric="loss", score=scores["loss"], metrics=scores,
            best_score=min(h["loss"] for h in history), dev_rows=[len(dev)], answered=len(shown),
            examples=best[:3], answers=shown[:30])
        result |= loop.common_result(
            args, plan, settings, model, lowrank, trainable_params, 0, history, seconds)
        runs.write_json(out / "result.json", result)
    return result


def escape(text):
    """Puts text on one line of a TSV file."""
    return text.translate(str.maketrans({"\\": r"\\", "\t": r"\t", "\n": r"\n", "\r": r"\r"}))


def report(args, result, out):
    """Prints the results of a run, and writes its page."""
    for example in result["examples"]:
        before, after, reference = (
            escape(example[name])[:150] for name in ("before", "after", "reference"))
        print(f"\n{example['instruction']} {example['input']}")
        print(f"  before:    {before}\n  after:     {after}\n  reference: {reference}")
    scores = result["metrics"]
    print(f"\nloss {result['score']:.4f} (perplexity {scores['perplexity']:.2f}) on "
          f"{result['dev_rows'][0]} held-out rows after {result['steps']} steps, "
          f"{result['seconds']:.0f} s")
    # a free answer is hardly ever exactly the reference
    demo = args.data == str(DEMO / "instruct.jsonl")
    if result["answered"] and (scores["exact_match"] or demo):
        right = round(scores["exact_match"] * result["answered"])
        few = any(e["after"] != e["reference"] for e in result["examples"])
        print(f"{right} of {result['answered']} held-out instructions answered exactly"
              + "; fewer than three to show, so not all examples above are right" * few)
    loop.report_ranks(args, result)
    print(f"\n{out}/: result.json, log.jsonl, predictions.tsv, adapter/ (loads in PEFT)")
    from paper.report import write_page
    write_page([out], out / "report.html")


# -------------------------------------------------------------------------------------------------
# answering an instruction


def generate(argv):
    parser, arg = subcommand("generate", "Prints the answer to an instruction as it is generated.")
    arg("--instruction", type=str, required=True, help="what to do")
    arg("--input", type=str, default="", help="what to do it with")
    model_flags(parser, arg)
    args = parser.parse_args(argv)
    for name in ("instruction", "input"):
        text = getattr(args, name)
        need(not re.search("[\ud800-\udfff]", text), f"--{name}", ascii(text), "text in UTF-8")
    model, tokenizer, stop = open_model(args)
    text = fill(args.template, args.instruction, args.input)
    prompts = encode_prompts(args, model, tokenizer, [text])
    ids, printed = [], ""
    tokens = model.generate(prompts, args.max_new_tokens, stop, args.temperature, args.top_p,
                            args.seed)
    for (token,) in tokens:
        if token not in stop:
            ids.append(token)
        text = tokenizer.decode(ids)
        if not text.endswith("\ufffd"):  # an incomplete character
            print(text[len(printed):], end="", flush=True)
            printed = text
    print()


def main(argv):
    if argv and argv[0] == "generate":
        return generate(argv[1:])
    if argv and argv[0] in ("style", "score"):
        from paper import style
        return getattr(style, argv[0])(argv[1:])
    args = parse_args(argv)
    args.command = runs.command_line("train_instruct.py", argv)
    runs.run_all(args, Path(args.data).stem, train, report)
    from paper.report import last_page
    last_page(args, args.out)


def command(argv=None):
    runs.run_command(main, argv)


if __name__ == "__main__":
    command()
