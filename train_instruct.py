"""
Tunes a LLaMA on instructions with SaLoRA or LoRA, and lets it answer.

    python train_instruct.py                                   # offline demo, about a minute
    python train_instruct.py --model DIR --data alpaca.json --out runs/NAME
    python train_instruct.py generate --model DIR --adapter runs/NAME/adapter --instruction ".."
    python train_instruct.py style --model DIR --adapter DIR --data DIR/yelp --direction neg2pos
    python train_instruct.py score --outputs FILE --references FILE.. --classifier RUN --lm FILE

DIR is a folder in Hugging Face layout (config.json, model.safetensors or its shards,
tokenizer.json), --data a JSON list or JSONL of objects with instruction, input and output. A run
leaves in --out: report.html (the run as one page), result.json, log.jsonl, gates.jsonl,
predictions.tsv, adapter/ (loads in PEFT) and checkpoint/.
"""

import argparse
import json
import math
import re
import shlex
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

import adapter
import salora as sl
import train_glue
from data import InputError, metrics
from data.batching import batch_order, load_tokenizer, tokenize
from data.download import model_folder
from data.instruct import TEMPLATES, encode, encode_prompt, fill, load_instructions, split
from data.style import PROMPTS, read_beside, read_lines, read_task, task_files, tidy
from model import DECODER_LINEARS, DecoderConfig, load_decoder, load_encoder, read_config, stop_ids
from training.flags import (
    PROCESSES,
    RANK,
    at_least,
    check_sizes,
    find_device,
    flag_group,
    machine_flags,
    method_flags,
    need,
    new_parser,
    run_flags,
    settle,
    use_machine,
)
from training.loop import (
    announce,
    budget_of,
    common_result,
    count_trainable,
    fit,
    install,
    load_adapter,
    own_device,
    report_ranks,
    schedule,
    settings_of,
)
from training.runs import (
    command_line,
    free_folder,
    make_folder,
    markdown,
    own_folder,
    read_result,
    run_all,
    run_command,
    write_text,
)

DEMO = Path(__file__).parent / "data" / "demo"
MODEL = "folder in Hugging Face layout, or a hub name (default: the demo's)"


def parse_args(argv=None):
    parser = new_parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arg = flag_group(parser, "what to train, on what")
    arg("--model", help=MODEL)
    arg("--data", help="JSON or JSONL file of instructions (default: the demo's)")
    arg("--template", choices=list(TEMPLATES), default="alpaca",
        help="how an instruction becomes a prompt: Alpaca's, or a turn of a chat")
    arg("--train-on-prompt", action="store_true", default=False,
        help="train on the tokens of the prompt too, not only on those of the response")
    arg("--limit-train", type=int, metavar="N", help="use the first N training rows (default: all)")
    arg("--limit-dev", type=int, metavar="N", help="use the first N held-out rows (default: all)")
    arg("--hold-out", type=float, metavar="N", default=0.05,
        help="random rows, always the same, that are scored and not trained on; below 1: this "
        "share of them")
    arg("--max-length", type=int, default=512,
        help="prompt and response are cut to this many tokens")
    arg("--generate", type=int, metavar="N", help="held-out rows that are answered before and "
        "after training (default: 8; for demo 100)")
    method_flags(parser, ("salora", "lora"), DECODER_LINEARS)
    run_flags(parser, epochs="3", lr="3e-4; for demo 5e-3", batch_size=16,
              dtype="bfloat16; for demo float32", out="runs/DATA-METHOD")
    args = parser.parse_args(argv)

    demo = args.model is None and args.data is None
    missing = "--data" if args.model else "--model"
    need(demo or (args.model and args.data), missing, "not given",
         "both --model and --data (or neither, for the demo)")
    if demo:
        args.model, args.data = str(DEMO / "llama"), str(DEMO / "instruct.jsonl")
        args.threads = 1 if args.threads is None else args.threads
    if args.lr is None:
        args.lr = 5e-3 if demo else 3e-4
    args.dtype = args.dtype or ("float32" if demo else "bfloat16")
    if args.epochs is None:
        args.epochs = 3
    if args.generate is None:
        args.generate = 100 if demo else 8
    settle(args)
    at_least(args, 0, "generate")
    return args


# -------------------------------------------------------------------------------------------------
# loss and answers


def collate(examples, device, on_prompt=False):
    """input_ids and targets (b, t), padded on the right; a target is the next token, or -100."""
    t = max(map(len, examples))
    ids = torch.tensor([e.prompt + e.response + [0] * (t - len(e)) for e in examples])
    targets = torch.full_like(ids, -100)
    for i, e in enumerate(examples):
        start = 0 if on_prompt else len(e.prompt) - 1
        targets[i, start:len(e) - 1] = ids[i, start + 1:len(e)]
    return ids.to(device, non_blocking=True), targets.to(device, non_blocking=True)


def token_losses(model, x, targets, chunk=1024):
    """Cross-entropy in float32 of the positions of x (b, t, d) that have a target: (n,). The
    vocabulary is large: only `chunk` positions have their logits in memory at a time, in the
    backward pass too, which computes them again."""
    asked = targets != -100
    x, targets = x[asked], targets[asked]  # (n, d), (n,)

    def losses(x, targets):
        return F.cross_entropy(model.lm_head(x).float(), targets, reduction="none")

    parts = zip(x.split(chunk), targets.split(chunk))
    if not torch.is_grad_enabled():
        return torch.cat([losses(*part) for part in parts])
    return torch.cat([checkpoint(losses, *part, use_reentrant=False) for part in parts])


@torch.no_grad()
def evaluate(model, examples, device, batch_size=32):
    """Summed loss and number of response tokens of each example: (n, 2) on the CPU; each process
    computes its share."""
    training_mode = model.training
    model.eval()
    sums = torch.zeros(len(examples), 2, device=device)
    for batch in batch_order([len(e) for e in examples], batch_size)[RANK::PROCESSES]:
        ids, targets = collate([examples[i] for i in batch], device)
        count = (targets != -100).sum(1)
        losses = token_losses(model, model.hidden(ids), targets).split(count.tolist())
        sums[batch] = torch.stack([torch.stack([part.sum() for part in losses]), count.float()], 1)
    if PROCESSES > 1:
        dist.all_reduce(sums)
    model.train(training_mode)
    return sums.cpu()


def answer(model, tokenizer, prompts, stop, max_new_tokens, batch_size=16, **sampling):
    """The texts that the model answers to prompts (lists of token ids)."""
    training_mode, texts = model.training, []
    model.eval()
    for i in range(0, len(prompts), batch_size):
        rows = [[] for _ in prompts[i:i + batch_size]]
        for tokens in model.generate(prompts[i:i + batch_size], max_new_tokens, stop, **sampling):
            for row, token in zip(rows, tokens):
                if token is not None and token not in stop:
                    row.append(token)
        texts += [tokenizer.decode(row).strip() for row in rows]
    model.train(training_mode)
    return texts


# -------------------------------------------------------------------------------------------------
# one run


def train(args, seed, out):
    """One run: trains, writes its files into `out`, returns result.json (in the first process)."""
    # ---- data, and what the model's sizes allow
    rows, held = split(load_instructions(args.data), args.hold_out)
    rows, held = rows[:args.limit_train], held[:args.limit_dev]
    folder = model_folder(args.model)
    config, tokenizer = read_config(folder, DecoderConfig), load_tokenizer(folder)
    stop = stop_ids(folder)
    if args.max_length > config.max_length:
        raise InputError(f"--max-length is {args.max_length}, but {args.model} has positions for "
                         f"{config.max_length} tokens")
    check_sizes(args, config)
    end_of_turn = tokenizer.token_to_id("<|im_end|>")
    end_id = end_of_turn if end_of_turn in stop else min(stop)
    examples, dev = (encode(tokenizer, part, args.template, end_id, args.max_length,
                            config.vocab_size) for part in (rows, held))
    lengths = [len(e) for e in examples]
    # tokens that are trained on
    asked = [len(e) - 1 if args.train_on_prompt else len(e.response) for e in examples]
    plan = schedule(args, lengths, asked, args.epochs)

    # ---- model and method
    torch.manual_seed(seed)
    device = own_device(args)
    model = load_decoder(folder, getattr(torch, args.dtype), device)
    model.checkpoint_activations = args.checkpoint_activations
    lowrank = install(args, model, plan.steps, seed)
    trainable_params = count_trainable(model)
    settings = settings_of(args, seed, plan, lowrank)
    announce(settings, f"{args.method} on {args.data}: {len(examples)} training rows, "
                       f"{sum(asked):,} tokens of them trained on; {plan.steps} steps of "
                       f"{plan.rows_per_step}; {trainable_params:,} parameters to train")
    prompts = [encode_prompt(tokenizer, fill(args.template, row["instruction"], row["input"]))
               for row in held[:args.generate]]
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

    with own_folder(args, out):
        _, scores, history, seconds = fit(
            args, plan, settings, out, model, lowrank, loss_of, evaluate_dev)

        # ---- results; result.json comes last and marks the run as finished
        if RANK:
            return None
        answers = answer(model, tokenizer, prompts, stop, 128)
        lines = ["index\tlabel\tprediction"]
        for i, (row, text) in enumerate(zip(held, answers)):
            lines.append(f"{i}\t{escape(row['output'])}\t{escape(text)}")
        write_text(out / "predictions.tsv", "\n".join(lines) + "\n")
        adapter.save(model, out / "adapter", budget=budget_of(args),
                     base_model_name_or_path=str(args.model), task_type="CAUSAL_LM")
        shown = [dict(instruction=row["instruction"], input=row["input"], reference=row["output"],
                      before=b, after=a) for row, b, a in zip(held, before, answers)]
        if shown:
            scores["exact_match"] = sum(e["after"] == e["reference"] for e in shown) / len(shown)
        # first what training has taught
        best = sorted(shown, key=lambda e: (e["before"] == e["reference"],
                                            e["after"] != e["reference"]))
        result = dict(
            task=Path(args.data).stem, model=args.model, method=args.method, seed=seed,
            metric="loss", score=scores["loss"], metrics=scores,
            best_score=min(h["loss"] for h in history), dev_rows=[len(dev)], answered=len(shown),
            examples=best[:3], answers=shown[:30])
        result |= common_result(
            args, plan, settings, model, lowrank, trainable_params, 0, history, seconds)
        write_text(out / "result.json", json.dumps(result, indent=1) + "\n")
    return result


def escape(text):
    """Puts text on one line of a TSV file."""
    return text.translate(str.maketrans({"\\": r"\\", "\t": r"\t", "\n": r"\n", "\r": r"\r"}))


def report(args, result, out):
    """Prints the end of a run, and writes its page."""
    for example in result["examples"]:
        before, after, reference = (
            escape(example[name])[:150] for name in ("before", "after", "reference"))
        print(f"\n{example['instruction']} {example['input']}")
        print(f"  before:    {before}\n  after:     {after}\n  reference: {reference}")
    scores = result["metrics"]
    print(f"\nloss {result['score']:.4f} (perplexity {scores['perplexity']:.2f}) on "
          f"{result['dev_rows'][0]} held-out rows after {result['steps']} steps, "
          f"{result['seconds']:.0f} s")
    if "exact_match" in scores:
        right = round(scores["exact_match"] * result["answered"])
        few = any(e["after"] != e["reference"] for e in result["examples"])
        print(f"{right} of {result['answered']} held-out instructions answered exactly"
              + "; fewer than three to show, so not all examples above are right" * few)
    report_ranks(args, result, DECODER_LINEARS, at=2)
    print(f"\n{out}/: result.json, log.jsonl, predictions.tsv, adapter/ (loads in PEFT)")
    from paper.report import write_page
    write_page([out], out / "report.html")


# -------------------------------------------------------------------------------------------------
# answering an instruction


def subcommand(name, description):
    parser = new_parser(prog=f"train_instruct.py {name}", description=description)
    return parser, flag_group(parser, "flags")


def model_flags(parser, arg):
    arg("--model", help=MODEL)
    arg("--adapter", help="folder of an adapter that a run saved (default: none)")
    arg("--merge", action="store_true", default=False,
        help="add the adapter to the weights first: the same text, faster")
    arg("--template", choices=list(TEMPLATES),
        help="as in training (default: that of the adapter's run, else alpaca)")
    arg("--max-new-tokens", type=int, default=256, help="limit of an answer")
    arg("--temperature", type=float, default=0.0,
        help="0 takes the most likely token; above, tokens are drawn")
    arg("--top-p", type=float, default=1.0,
        help="draw from the smallest set of tokens whose probabilities reach this")
    arg("--seed", type=int, default=0, help="of the draw")
    machine_flags(parser, dtype="float32")


def open_model(args):
    """The model of model_flags, its tokenizer and the ids that end a text. Fills in defaults."""
    at_least(args, 1, "max_new_tokens")
    at_least(args, 0, "temperature", "seed")
    need(0 < args.top_p <= 1, "--top-p", args.top_p, "a share in (0, 1]")
    need(args.temperature == 0 or args.temperature >= 0.001, "--temperature", args.temperature,
         "0, or at least 0.001")
    device = use_machine(args)
    args.model, args.dtype = args.model or str(DEMO / "llama"), args.dtype or "float32"
    args.template = args.template or template_of(args.adapter)
    folder = model_folder(args.model)
    tokenizer, stop = load_tokenizer(folder), stop_ids(folder)
    model = load_decoder(folder, getattr(torch, args.dtype), device).eval()
    if args.adapter:
        load_adapter(model, args.adapter)
        if args.merge:
            sl.merge(model)
    return model, tokenizer, stop


def check_room(args, model, prompts):
    longest = max(map(len, prompts))
    room = max(model.config.max_length - longest, 0)
    if args.max_new_tokens > room:
        raise InputError(f"--max-new-tokens is {args.max_new_tokens}; with the prompt of {longest} "
                         f"tokens the model has positions for {room} more")


def generate(argv):
    parser, arg = subcommand("generate", "Answers an instruction, token by token.")
    arg("--instruction", required=True, help="what to do")
    arg("--input", default="", help="what to do it with")
    model_flags(parser, arg)
    args = parser.parse_args(argv)
    for name in ("instruction", "input"):
        text = getattr(args, name)
        need(not re.search("[\ud800-\udfff]", text), f"--{name}", ascii(text), "text in UTF-8")
    model, tokenizer, stop = open_model(args)
    prompt = encode_prompt(tokenizer, fill(args.template, args.instruction, args.input))
    check_room(args, model, [prompt])
    ids, printed = [], ""
    tokens = model.generate([prompt], args.max_new_tokens, stop, args.temperature, args.top_p,
                            args.seed)
    for (token,) in tokens:
        if token not in stop:
            ids.append(token)
        text = tokenizer.decode(ids)
        if not text.endswith("\ufffd"):  # half a character
            print(text[len(printed):], end="", flush=True)
            printed = text
    print()


def template_of(folder):
    """The template of the run that an adapter's folder lies in."""
    result = read_result(Path(folder) / "..") if folder else None
    return result["settings"].get("template", "alpaca") if result else "alpaca"


# -------------------------------------------------------------------------------------------------
# style transfer and its scores


def style(argv):
    parser, arg = subcommand("style", "Rewrites the test sentences of Yelp or GYAFC in the other "
                             "style, zero-shot (prompts: data/style.py), and scores them.")
    arg("--data", required=True, help="folder of Yelp's files, or of one of GYAFC's domains")
    arg("--direction", required=True, choices=list(PROMPTS), help="from one style to the other")
    arg("--limit", type=int, metavar="N", help="only the first N sentences (default: all)")
    arg("--out", help="folder for the outputs and scores (default: runs/style-DIRECTION, numbered "
        "if that exists)")
    arg("--batch-size", type=int, default=16, help="sentences at a time")
    score_flags(arg)
    model_flags(parser, arg)
    parser.set_defaults(max_new_tokens=64)
    args = parser.parse_args(argv)
    at_least(args, 1, "limit", "batch_size")
    sources, references = read_task(args.data, args.direction)
    sources, references = sources[:args.limit], [lines[:args.limit] for lines in references]
    target = args.direction.split("2")[1]
    scorers = open_scorers(args, [target])
    out = Path(args.out) if args.out else free_folder(f"runs/style-{args.direction}")
    if (out / "scores.json").exists():
        raise InputError(f"--out {out} holds a finished run: give another folder")
    model, tokenizer, stop = open_model(args)
    prompts = [encode_prompt(tokenizer, fill(args.template, PROMPTS[args.direction], sentence))
               for sentence in sources]
    check_room(args, model, prompts)
    make_folder(out)
    answers = answer(model, tokenizer, prompts, stop, args.max_new_tokens, args.batch_size,
                     temperature=args.temperature, top_p=args.top_p, seed=args.seed)
    outputs = [tidy(text, args.direction) for text in answers]
    write_text(out / f"outputs.{args.direction}", "\n".join(outputs) + "\n")
    lines = [json.dumps(dict(source=a, answer=b, output=c)) + "\n"
             for a, b, c in zip(sources, answers, outputs)]
    write_text(out / "answers.jsonl", "".join(lines))
    scores = scores_of(outputs, sources, references, target, scorers)
    result = dict(direction=args.direction, sentences=len(outputs), **scores, settings=vars(args))
    write_text(out / "scores.json", json.dumps(result, indent=1) + "\n")
    shown = ", ".join(f"{name} {scores[name]:.2f}" for name in SCORES if name in scores)
    print(f"{len(outputs)} sentences: {shown}")
    print(f"{out}/: outputs.{args.direction}, answers.jsonl, scores.json")


def score(argv):
    parser, arg = subcommand("score", "Scores sentences that were transferred to another style. "
                             "With several files of outputs: a table.")
    arg("--outputs", required=True, nargs="+", metavar="FILE",
        help="files of transferred sentences, one a line")
    arg("--data", help="folder of Yelp's files, or of one of GYAFC's domains: sources and "
        "references are its own, by the direction at the end of an --outputs, as in .neg2pos; a "
        "file is not scored against itself")
    arg("--sources", metavar="FILE",
        help="sentences they were made from, line by line (default: none, no self-BLEU)")
    arg("--references", nargs="+", default=[], metavar="FILE", help="human transfers, line by "
        "line; of a line with tabs the last column counts (default: none, no BLEU)")
    arg("--target", help="label of the style to reach (default: what follows the 2 in the "
        "direction)")
    arg("--out", help="folder for table.md and scores.json (default: none, only printed)")
    score_flags(arg)
    machine_flags(parser)
    args = parser.parse_args(argv)
    need(not (args.data and (args.sources or args.references)), "--data", "given",
         "either --data, or --sources and --references")
    use_machine(args)
    entries = []
    for file in args.outputs:
        outputs, sources, references = read_lines(file), args.sources, args.references
        found = re.search(r"\.((\w+)2(\w+))$", file)
        target = args.target or (found and found[3])
        if args.classifier and not target:
            raise InputError(f"--target is not given, and {file} does not end in a direction such "
                             "as .neg2pos")
        if args.data:
            if not found or found[1] not in PROMPTS:
                endings = ", ".join("." + direction for direction in PROMPTS)
                raise InputError(f"--outputs {file}: does not end in a direction ({endings}), "
                                 "which --data needs")
            sources, references = task_files(args.data, found[1])
        references = [read_beside(r, outputs, file) for r in references
                      if Path(r).resolve() != Path(file).resolve()]
        sources = read_beside(sources, outputs, file) if sources else None
        entries.append((file, outputs, sources, references, target))
    scorers = open_scorers(args, [target for *_, target in entries])
    if not (scorers or args.data or args.sources or args.references):
        raise InputError("nothing to score by: give --data, --sources, --references, --classifier "
                         "or --lm")
    scores = {file: dict(sentences=len(outputs), **scores_of(outputs, *rest, scorers))
              for file, outputs, *rest in entries}
    names = [name for name in SCORES if any(name in row for row in scores.values())]
    rows = [[file, row["sentences"], *(f"{row[name]:.2f}" if name in row else "" for name in names)]
            for file, row in scores.items()]
    table = markdown(["outputs", "sentences", *names], rows)
    if args.out:
        out, line = Path(args.out), f"    python train_instruct.py score {shlex.join(argv)}"
        make_folder(out)
        write_text(out / "table.md", f"{line}\n\n{table}")
        write_text(out / "scores.json", json.dumps(scores, indent=1) + "\n")
    print(table)
    if len(scores) == 1:
        scores = {name: value for name, value in scores[file].items() if name != "sentences"}
    print(json.dumps(scores))


def score_flags(arg):
    arg("--classifier", help="for ACC: folder of a train_glue.py run, with an adapter, on "
        "sentences labeled with their style (python -m data.style) (default: none, no ACC)")
    arg("--lm", metavar="FILE", help="for PPL: an n-gram model in ARPA or KenLM's binary form; "
        "needs the kenlm module (default: none, no PPL)")


def open_scorers(args, targets):
    """{name of a score: function of outputs and the style to reach, one of `targets`}."""
    scorers = {}
    if args.classifier:
        run = Path(args.classifier)
        result = read_result(run)
        if result is None:
            raise InputError(f"--classifier {run}: has no result.json, expected the folder of a "
                             "finished run of train_glue.py")
        settings, labels = result["settings"], result.get("labels")
        for target in targets:
            if not labels or target not in labels:
                raise InputError(f"--classifier {run}: its labels are {labels}, expected "
                                 f"{target!r} among them")
        if not (run / "adapter").is_dir():
            raise InputError(f"--classifier {run}: has no adapter/ (method {settings['method']}); "
                             "train it with --method lora or salora")
        device, folder = find_device(args), model_folder(settings["model"])
        tokenizer = load_tokenizer(folder)
        model = load_encoder(folder, len(labels), torch.float32).to(device)
        load_adapter(model, run / "adapter")

        def accuracy(outputs, target):
            tokens = tokenize(tokenizer, [(text,) for text in outputs], settings["max_length"],
                              model.config.vocab_size)
            logits = train_glue.evaluate(model, tokens, model.config.pad_token_id, device)
            return 100 * float((logits.argmax(1) == labels.index(target)).mean())

        scorers["ACC"] = accuracy
    if args.lm:
        try:
            import kenlm
        except ImportError:
            raise InputError("--lm needs the kenlm module: pip install kenlm (it is built with "
                             "cmake)") from None
        if not Path(args.lm).is_file():
            raise InputError(f"--lm {args.lm}: no such file; lmplz -o 5 < sentences > FILE.arpa "
                             "makes one")
        try:
            lm = kenlm.Model(str(args.lm))
        except OSError as e:
            reason = str(e).split(") ")[-1]
            raise InputError(f"--lm {args.lm}: kenlm cannot read it ({reason})") from None

        def perplexity(outputs, target):
            tokens = sum(len(text.split()) + 1 for text in outputs)  # 1: the end of a sentence
            return 10 ** (-sum(lm.score(text) for text in outputs) / tokens)  # score: a log10

        scorers["PPL"] = perplexity
    return scorers


SCORES = ("ACC", "BLEU", "self-BLEU", "PPL")


def scores_of(outputs, sources, references, target, scorers):
    """ACC: percent that the classifier takes for the target style; BLEU against the references and
    self-BLEU against the sources, of 13a tokens; PPL."""
    scores = {name: scorer(outputs, target) for name, scorer in scorers.items()}
    if references:
        scores["BLEU"] = metrics.bleu(outputs, references)
    if sources:
        scores["self-BLEU"] = metrics.bleu(outputs, [sources])
    return scores


def main(argv):
    if argv and argv[0] in ("generate", "style", "score"):
        return globals()[argv[0]](argv[1:])
    args = parse_args(argv)
    args.command = command_line("train_instruct.py", argv)
    root = Path(args.out) if args.out else free_folder(f"runs/{Path(args.data).stem}-{args.method}")
    run_all(args, root, train, report)
    from paper.report import last_page
    last_page(args, root)


def command(argv=None):
    run_command(main, argv)


if __name__ == "__main__":
    command()
