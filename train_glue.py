"""
Fine-tunes RoBERTa or BERT on a GLUE task with SaLoRA, or with a method it is compared with.

    python train_glue.py                         # offline demo, about a minute on two CPU cores
    python train_glue.py --task cola             # roberta-base and CoLA, downloaded once
    python train_glue.py --task cola --model DIR --data DIR --seeds 0 1 2
    python train_glue.py --task my_folder        # your own train.tsv and dev.tsv
    python train_glue.py predict --run runs/cola-salora --text FILE    # labels other texts
    python train_glue.py table1 --tasks cola rte # an experiment of paper/
    torchrun --nproc-per-node 2 train_glue.py .. # splits every step's rows; one GPU per process

Your own files need the columns sentence (or sentence1, sentence2) and label (or score). The
experiments are table1, ablation, efficiency, ranks, shuffle, sweep, components and recover. A run
writes to --out: report.html (the run as one page), result.json, log.jsonl, gates.jsonl,
predictions.tsv, adapter/ (loads in PEFT) and checkpoint.safetensors (for --resume).
"""

import math
from pathlib import Path

import torch
import torch.nn.functional as F

import adapter
import baselines
from data import InputError, need
from data.batching import collate, load_tokenizer, send, tokenize
from data.download import model_folder
from data.glue import HERE, TASKS, load_task, read_texts, score
from model import LINEARS, load_encoder, output_names, read_config
from training import flags, loop, runs
from training.device import RANK, own_device
from training.inference import evaluate, open_classifier, read_run, subcommand

METHODS = ("salora", *baselines.METHODS)
LEARNING_RATES = dict(ft=3e-5, prefix=1e-3, prompt=1e-3)  # others: 3e-4
DEMO_LEARNING_RATES = dict(ft=5e-4, prompt=1e-2)  # others: 3e-3
TASK = f"one of {', '.join(TASKS)}, or a folder with train.tsv and dev.tsv"
EXPERIMENTS = ("table1", "ablation", "efficiency", "ranks", "shuffle", "sweep", "components")


def parse_args(argv=None):
    parser = flags.new_parser(__doc__, usage="train_glue.py [flags]")
    arg = flags.flag_group(parser, "what most runs need")
    arg("--task", default="demo", help=TASK)
    arg("--model", help="folder in Hugging Face layout, or a hub name (default: roberta-base; for "
        "demo the built-in one)")
    arg("--data", help="folder in GLUE's layout, DIR/CoLA/train.tsv .. (default: data/, where "
        "missing tasks are downloaded)")
    flags.main_flags(arg, METHODS, epochs="by task, 3 to 20", batch_size=32, out="runs/TASK-METHOD",
                     lr="3e-4; ft 3e-5, prefix and prompt 1e-3; more for demo")

    arg = flags.flag_group(parser, "rows and tokens")
    arg("--limit-train", type=int, metavar="N", help="use the first N training rows (default: all)")
    arg("--limit-dev", type=int, metavar="N", help="use the first N dev rows (default: all)")
    arg("--hold-out", type=float, metavar="N",
        help="for choosing settings: hold out the same N random training rows every time and score "
        "on them; below 1: this share of them, at most 3000 (default: off)")
    arg("--max-length", type=int, help="cut longer inputs to this many tokens (default: 128, "
        "or the model's limit if that is lower)")

    flags.method_flags(parser, LINEARS)
    arg = flags.flag_group(parser, "some baselines")
    arg("--bottleneck", type=int, help="width of adapter-h and adapter-p (default: 32 and 64, "
        "as many parameters as LoRA of rank 8)")
    arg("--virtual-tokens", type=int, default=20, help="length of the prefix or the prompt")

    flags.run_flags(parser, dtype="float32")
    arg = flags.flag_group(parser, "choice of the learning rate")
    arg("--lr-grid", type=float, nargs="+", metavar="LR",
        help="run each rate once, with a separate seed, and score it on held-out training rows "
        "(--hold-out, by default a fifth, at most 3000); then do the run, or those of --seeds, on "
        "all rows at the best rate (default: off, use --lr)")
    args = parser.parse_args(argv)
    args.idle = flags.idle(args, parser)

    if args.task == "demo":
        flags.fill_in(args, model=str(HERE / "demo" / "model"), threads=1,
                      lr=DEMO_LEARNING_RATES.get(args.method, 3e-3))
    flags.fill_in(args, model="roberta-base", lr=LEARNING_RATES.get(args.method, 3e-4),
                  dtype="float32", bottleneck=64 if args.method == "adapter-p" else 32)
    flags.settle(args)
    flags.at_least(args, 1, "bottleneck", "virtual_tokens")
    if args.task not in TASKS:
        need(Path(args.task).is_dir(), "--task", repr(args.task), TASK)
        need(args.data is None, "--data", repr(args.data),
             "nothing, as --task is already the folder with the data")
    grid = args.lr_grid or []
    need(all(0 < lr < math.inf for lr in grid) and len(set(grid)) == len(grid), "--lr-grid", grid,
         "different positive numbers")
    return args


@torch.no_grad()
def order_head(args, model, names):
    """Puts the outputs of an already trained head, from the model folder or the adapter, into the
    order of the task's labels, `names`. InputError: only some of the head's names are the task's,
    and one of these is in another place."""
    found, where = model.labels, args.model
    if args.adapter and any(p.requires_grad for p in model.classifier.parameters()):  # its own head
        found = (adapter.read_own(args.adapter).get("labels") or found
                 or output_names({}, model.num_labels))
        where = f"--adapter {args.adapter}"
    if found is None or names is None:
        return
    for same in (str, str.casefold):
        known, wanted = ([same(name.strip()) for name in x] for x in (found, names))
        if known == wanted:
            return
        if sorted(known) == sorted(wanted) and len(set(known)) == len(known):
            order = [known.index(name) for name in wanted]
            last = model.classifier
            if model.config.model_type == "roberta":
                last = last.out_proj
            last.weight.copy_(last.weight[order])  # (num_labels, d)
            last.bias.copy_(last.bias[order])
            print(f"{where}: its head gives {', '.join(found)}; put into the order of the task, "
                  f"{', '.join(names)}")
            return
    if any(name in wanted and wanted.index(name) != i for i, name in enumerate(known)):
        raise InputError(f"{where}: its head gives {', '.join(found)}, expected the labels of the "
                         f"task, {', '.join(names)}, or unrelated names: correct id2label in "
                         "config.json")
    print(f"{where}: its head gives {', '.join(found)}; used, in this order, as "
          f"{', '.join(names)}")


def train(args, seed, out):
    """One run: trains, writes its files into `out`, returns result.json (None if RANK > 0)."""
    # ---- data, checked against the model's sizes
    task, train_rows, dev_sets = load_task(
        args.task, args.data, args.limit_train, args.limit_dev, args.hold_out)
    folder = model_folder(args.model)
    config, tokenizer = read_config(folder), load_tokenizer(folder)
    flags.check_sizes(args, config)
    prompt = args.virtual_tokens if args.method == "prompt" else 0
    room = config.max_length - prompt
    max_length = min(128, room) if args.max_length is None else args.max_length
    if not 8 <= max_length <= room:
        taken = f", {prompt} of them for the prompt (--virtual-tokens)" if prompt else ""
        raise InputError(f"--max-length is {max_length}, but {args.model} has positions for "
                         f"{config.max_length} tokens{taken}")
    tokens, *dev_tokens = (tokenize(tokenizer, rows.texts, max_length, config.vocab_size)
                           for rows in (train_rows, *dev_sets))
    lengths, pad_id = [len(ids) for ids, _ in tokens], config.pad_token_id
    epochs = task.epochs if args.epochs is None else args.epochs
    plan = loop.schedule(args, lengths, [1] * len(tokens), epochs)

    # ---- model and method
    torch.manual_seed(seed)
    device = own_device(args)
    # full fine-tuning in bfloat16 is autocast: the trained weights stay float32
    mixed = args.method == "ft" and args.dtype == "bfloat16"
    dtype = torch.float32 if mixed else getattr(torch, args.dtype)
    model = load_encoder(folder, task.num_labels, dtype).to(device)
    if mixed:
        model.hidden = torch.autocast(device.type, torch.bfloat16)(model.hidden)
    model.checkpoint_activations = args.checkpoint_activations
    for module in model.head:
        module.float()
    lowrank = loop.install(args, model, plan.steps, seed)
    order_head(args, model, task.label_names)
    for module in model.head:
        module.requires_grad_(True)
    head_params = sum(p.numel() for module in model.head for p in module.parameters())
    trainable_params = loop.count_trainable(model, head_params)
    settings = loop.settings_of(args, seed, plan, lowrank) | dict(max_length=max_length)
    loop.announce(args, settings, f"{args.method} on {args.task}: {len(tokens)} training rows, "
                  f"{plan.steps} steps of {plan.rows_per_step}; {trainable_params:,} parameters to "
                  f"train and {head_params:,} in the head")

    # ---- training
    forward = torch.compile(model, dynamic=True) if args.compile else model
    labels = torch.tensor(train_rows.labels)

    def loss_of(rows):
        part = [tokens[j] for j in rows]
        inputs = collate(part, pad_id, device, always_mask=args.compile)  # one graph, not two
        logits = forward(*inputs)  # (b, num_labels)
        label = send(labels[rows], device)  # (b,)
        if task.labels:
            return F.cross_entropy(logits, label, reduction="sum")
        return F.mse_loss(logits[:, 0], label, reduction="sum")

    def evaluate_dev():
        logits = [evaluate(model, rows, pad_id, device) for rows in dev_tokens]
        scores = score(task, dev_sets[0].labels, logits[0])
        if len(dev_sets) > 1:  # MNLI
            mismatched = score(task, dev_sets[1].labels, logits[1])
            scores |= {f"{k}_mismatched": v for k, v in mismatched.items()}
        return logits, scores

    with runs.own_folder(args, out):
        logits, scores, history, seconds = loop.fit(
            args, plan, settings, out, model, lowrank, loss_of, evaluate_dev)

        # ---- results; result.json comes last and marks the run as finished
        if RANK:
            return None
        names = ("predictions.tsv", "predictions_mismatched.tsv")
        for name, rows, values in zip(names, dev_sets, logits):
            columns = ["index", "label", "prediction"]
            lines = ["\t".join(columns + [f"logit_{i}" for i in range(values.shape[1])])]
            for i, (label, row) in enumerate(zip(rows.labels, values)):
                prediction = row[0]
                if task.labels:
                    label, prediction = task.labels[label], task.labels[row.argmax()]
                lines.append("\t".join(map(str, [i, label, prediction, *row])))
            runs.write_text(out / name, "\n".join(lines) + "\n")
        if lowrank:
            head = ["classifier"] if config.model_type == "roberta" else ["classifier", "pooler"]
            adapter.save(model, out / "adapter", head, plan.budget, task.label_names,
                         base_model_name_or_path=str(args.model), task_type="SEQ_CLS")
        if args.method == "prefix":
            model.prefix.finish()
        result = dict(
            task=args.task, model=args.model, method=args.method, seed=seed, metric=task.metric,
            score=scores[task.metric], metrics=scores,
            best_score=max(h[task.metric] for h in history), columns=task.text,
            labels=task.label_names, dev_rows=[len(rows.labels) for rows in dev_sets])
        result |= loop.common_result(
            args, plan, settings, model, lowrank, trainable_params, head_params, history, seconds)
        runs.write_json(out / "result.json", result)
    return result


def report(args, result, out):
    """Prints the results of a run, and writes its page."""
    rows = "held-out" if args.hold_out else "dev"
    print(f"\n{result['metric']} {result['score']:.4f} on {result['dev_rows'][0]} {rows} rows "
          f"after {result['steps']} steps, {result['seconds']:.0f} s")
    loop.report_ranks(args, result)
    loads = ", adapter/ (loads in PEFT)" if result["ranks"] else ""
    print(f"\n{out}/: result.json, log.jsonl, predictions.tsv{loads}")
    from paper.report import write_page
    write_page([out], out / "report.html")


def predict(argv):
    """Labels the texts of a file, as a table."""
    parser, arg = subcommand("predict", "Labels texts with the adapter of a run. Each text gets a "
                             "line: its number, from 0, the label, the label's probability, and "
                             "a logit for each label.", "train_glue.py")
    arg("--run", required=True, help="folder of a finished run with an adapter")
    arg("--text", required=True, metavar="FILE", help="tab-separated, with columns sentence (or "
        "sentence1 and sentence2) like GLUE's test.tsv; or plain text, one sentence a line")
    arg("--out", metavar="FILE", help="file to write (default: standard output)")
    arg("--model", help="the model of the run, if it has moved (default: the run's own --model)")
    flags.machine_flags(parser)
    args = parser.parse_args(argv)
    out = args.out and Path(args.out)
    need(not out or not out.exists(), "--out", f"{out}, which already exists", "a new file")
    need(not out or out.parent.is_dir(), "--out", out, "a file in an existing folder")
    result = read_run("--run", args.run)
    need("columns" in result, f"--run {args.run}: its result.json", "missing columns",
         "a run of this version of train_glue.py")
    names, (numbers, texts) = result.get("labels"), read_texts(args.text, result["columns"])
    logits = open_classifier("--run", args.run, result, flags.use_machine(args), args.model)(texts)
    columns = ["index", "prediction"] + ["probability"] * bool(names)
    lines = ["\t".join(columns + [f"logit_{i}" for i in range(logits.shape[1])])]
    for number, row in zip(numbers, logits):
        cells = [row[0]]
        if names:
            p = torch.from_numpy(row).double().softmax(0)  # (num_labels,)
            cells = [names[row.argmax()], f"{p.max():.6f}"]
        lines.append("\t".join(map(str, [number, *cells, *row])))
    if out:
        runs.write_text(out, "\n".join(lines) + "\n")
        print(f"{out}: {len(texts)} predictions")
    else:
        print("\n".join(lines))


def main(argv):
    if argv and argv[0] == "predict":
        return predict(argv[1:])
    if argv and argv[0] == "recover":
        from paper import recover
        return recover.main(argv[1:])
    if argv and argv[0] in EXPERIMENTS:
        from paper import experiments
        return experiments.main(argv[0], argv[1:], parse_args)
    args = parse_args(argv)
    args.command = runs.command_line("train_glue.py", argv)
    name = args.task if args.task in TASKS else Path(args.task).resolve().name
    runs.run_all(args, name, train, report)
    if args.task == "demo" and args.seeds is None and RANK == 0:
        more = "--method salora (learns the rank of every matrix)"
        if args.method == "salora":
            more = f"--method lora (the same without gates), --budget {args.budget / 2:g}"
        print(f"\nnext: {more}, --seeds 0 1 2, or the real thing: python train_glue.py --task cola")
    from paper.report import last_page
    last_page(args, args.out)


def command(argv=None):
    runs.run_command(main, argv)


if __name__ == "__main__":
    command()
