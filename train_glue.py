"""
Fine-tunes RoBERTa or BERT on a GLUE task with SaLoRA, or with one of the methods it is compared with.

    python train_glue.py                         # offline demo, about a minute on two CPU cores
    python train_glue.py --task cola             # roberta-base and CoLA, downloaded once
    python train_glue.py --task cola --model DIR --data DIR --seeds 0 1 2
    python train_glue.py --task my_folder        # train.tsv, dev.tsv: sentence (or sentence1, sentence2), label (or score)
    python train_glue.py table1 --tasks cola rte # experiments of the paper: also ablation, efficiency, ranks, sweep, components
    torchrun --nproc-per-node 2 train_glue.py .. # every step's rows shared out among processes, one GPU each

A run leaves in --out: result.json, log.jsonl, predictions.tsv, adapter/ (loads in PEFT) and checkpoint/ (for --resume).
"""

import argparse
import json
import math
import os
import resource
import shutil
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

import baselines
import salora as sl
from data import InputError
from data.batching import batch_order, collate, load_tokenizer, tokenize
from data.download import model_folder
from data.glue import HERE, TASKS, load_task, score
from model import LINEARS, load_encoder, read_config, read_json

RANK, PROCESSES = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # as torchrun sets them
TUNING_SEED = 100  # of the runs of --lr-grid
METHODS = ("salora", *baselines.METHODS)
LEARNING_RATES = dict(ft=(3e-5, 5e-4), prefix=(1e-4, 1e-3), prompt=(1e-3, 1e-2))  # and for the demo; all others (3e-4, 3e-3)
EXPERIMENTS = ("table1", "ablation", "efficiency", "ranks", "sweep", "components")
NOT_OF_A_RUN = ("out", "resume", "overwrite", "seeds", "lr_grid")  # flags that are no settings of a single run
RECIPES = {  # what the two recipes set, unless a flag says otherwise
    "default": dict(beta=0.01, orth_reduction="mean", selection=None, straight_through=True, fold_gates=False, gate_lr=None, rewarm=True),
    "paper": dict(beta=0.1, orth_reduction="sum", selection="paper", straight_through=False, fold_gates=True, gate_lr=0.01, rewarm=False),
}


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: sys.exit(fail(message))

    def group(title):
        add = parser.add_argument_group(title).add_argument
        return lambda *names, help, **kw: add(*names, **kw, help=f"{help} (default: %(default)s)" if "default" in kw else help)

    arg = group("what to train, on what")
    arg("--task", default="demo", help=f"one of {', '.join(TASKS)}, or a folder with train.tsv and dev.tsv")
    arg("--model", help="folder in Hugging Face layout, or a hub name (default: roberta-base; for demo the built-in one)")
    arg("--data", help="folder in GLUE's layout, DIR/CoLA/train.tsv .. (default: data/, where a missing task is downloaded)")
    arg("--limit-train", type=int, metavar="N", help="use only the first N training rows (default: all)")
    arg("--limit-dev", type=int, metavar="N", help="use only the first N dev rows (default: all)")
    arg("--hold-out", type=float, metavar="N", help="score on N random training rows, always the same, that are taken out of training, "
        "instead of the dev set, to choose settings by; below 1: on this share of them, at most 3000 (default: off)")
    arg("--max-length", type=int, help="longer inputs are cut to this many tokens (default: 128, or what the model has positions for)")

    arg = group("method")
    arg("--method", choices=METHODS, default="salora", help="SaLoRA, or what it is compared with (baselines.py); ft: full fine-tuning, head: nothing but the classifier")
    arg("--r", type=int, default=8, help="rank at the start")
    arg("--alpha", type=float, help="the update is scaled by alpha/r (default: r, a scale of 1)")
    arg("--targets", nargs="+", default=list("qkvoud"), choices=list(LINEARS), help="adapted matrices of each layer: W^Q W^K W^V W^O W^U W^D")
    arg("--layers", type=int, nargs="+", help="numbers of the layers that low-rank methods adapt, from 0 (default: all)")
    arg("--budget", type=float, default=0.5, help="share b of the adapter parameters to keep (adalora: of the triplets)")
    arg("--beta", type=float, help="weight of the orthogonal regulariser (default: 0.01; adalora 0.1)")
    arg("--window", type=float, nargs=2, default=[0.2, 0.5], metavar=("START", "END"), help="fractions of the run between which gates are "
        "learned (adalora: between which the budget falls)")
    arg("--bottleneck", type=int, help="width of adapter-h and adapter-p (default: 32 and 64, with which they are as large as LoRA of rank 8)")
    arg("--virtual-tokens", type=int, default=20, help="length of the prefix or the prompt")
    arg("--recipe", choices=list(RECIPES), default="default", help="paper: the letter of the paper, "
        "--beta 0.1 --orth-reduction sum --selection paper --no-straight-through --fold-gates --gate-lr 0.01 --no-rewarm")
    arg("--orth-reduction", choices=["mean", "sum"], help="of the regulariser over the matrices (default: mean)")
    arg("--selection", choices=["budget", "paper"], help="keep what fits the budget, or what has a gate above 0 "
        "(default: budget; with --price: paper)")
    arg("--straight-through", action=argparse.BooleanOptionalAction, help="in the window, train the weights with gates of 1 and log theta with "
        "the gradient of the drawn gates; no: train the weights with the drawn gates (default: yes)")
    arg("--fold-gates", action=argparse.BooleanOptionalAction, help="multiply kept gates into B instead of setting them to 1 (default: no)")
    arg("--gate-lr", type=float, help="learning rate of log theta and lambda (default: 0.2; in a window of less than 160 steps more, 32 / steps, up to 1)")
    arg("--price", type=float, metavar="LAMBDA", help="eq. 10: a constant price of an open gate instead of a budget (default: off)")

    arg = group("optimisation")
    arg("--epochs", type=float, help="passes over the training rows (default: by task, 3 to 20)")
    arg("--max-steps", type=int, help="end after this many steps whatever --epochs says (default: no limit)")
    arg("--batch-size", type=int, default=32, help="rows of a forward pass, in each process")
    arg("--accumulate", type=int, default=1, help="forward passes a step")
    arg("--lr", type=float, help="of the weights (default: 3e-4; ft 3e-5, prefix 1e-4, prompt 1e-3; more for demo)")
    arg("--lr-grid", type=float, nargs="+", metavar="LR", help="choose --lr: a run for each, scored on rows held out of training (--hold-out, "
        "by default a fifth, at most 3000) with a seed of its own; then the run, or the --seeds, on all rows at the best")
    arg("--warmup", type=float, default=0.06, help="share of the steps in which the learning rates rise, before they fall linearly to 0")
    arg("--rewarm", action=argparse.BooleanOptionalAction, help="salora: after the window, when the adapter has been cut down, the learning rate "
        "starts at --lr again (default: yes)")
    arg("--weight-decay", type=float, default=0.01, help="of the weights; gates and lambda have none")
    arg("--seed", type=int, default=0, help="of head and adapter weights, order of rows, dropout and gates")
    arg("--seeds", type=int, nargs="+", help="several runs, --out/seed0 .., and their mean and standard deviation")

    arg = group("machine")
    arg("--device", default="auto", help="auto, cpu, cuda or cuda:i")
    arg("--dtype", choices=["float32", "bfloat16"], default="float32", help="of the frozen weights; what is trained is float32")
    arg("--threads", type=int, help="CPU threads (default: torch's choice; for demo 1, its tensors are too small to share)")
    arg("--compile", action="store_true", default=False, help="compile the model with torch.compile")
    arg("--checkpoint-activations", action="store_true", default=False, help="recompute activations in the backward pass: less memory, more time")

    arg = group("output")
    arg("--out", help="folder of the run (default: runs/TASK-METHOD, with a number behind it if that is taken)")
    arg("--resume", action="store_true", default=False, help="go on from --out/checkpoint, written after each epoch")
    arg("--overwrite", action="store_true", default=False, help="replace a finished run in --out")
    arg("--log-every", type=int, default=10, help="steps from one line of log.jsonl to the next")
    args = parser.parse_args(argv)

    if args.method == "adalora" and args.beta is None:
        args.beta = 0.1
    for name, value in RECIPES[args.recipe].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    demo = args.task == "demo"
    if args.model is None:
        args.model = str(HERE / "demo" / "model") if demo else "roberta-base"
    if args.lr is None:
        args.lr = LEARNING_RATES.get(args.method, (3e-4, 3e-3))[demo]
    if args.bottleneck is None:
        args.bottleneck = 64 if args.method == "adapter-p" else 32
    if args.alpha is None:
        args.alpha = float(args.r)
    if args.threads is None and demo:
        args.threads = 1
    check(args)
    return args


def check(args):
    """Everything that can be known to be wrong before a file is opened."""
    def need(ok, flag, found, expected):
        if not ok:
            raise InputError(f"{flag} is {found}, expected {expected}")

    need(args.task in TASKS or Path(args.task).is_dir(), "--task", repr(args.task),
         f"one of {', '.join(TASKS)}, or a folder with train.tsv and dev.tsv")
    need(args.task in TASKS or args.data is None, "--data", repr(args.data), "nothing when --task is itself the folder with the data")
    need(0 < args.budget <= 1, "--budget", args.budget, "a share in (0, 1]")
    start, end = args.window
    need(0 <= start < end <= 1, "--window", f"{start} {end}", "two fractions of the run, 0 <= START < END <= 1")
    for name, least in dict(r=1, batch_size=1, accumulate=1, max_length=8, log_every=1, limit_train=1, limit_dev=1,
                            bottleneck=1, virtual_tokens=1, max_steps=1, threads=1, seed=0).items():
        value = getattr(args, name)
        need(value is None or value >= least, "--" + name.replace("_", "-"), value, f"at least {least}")
    for name in ("lr", "gate_lr", "alpha", "epochs", "hold_out"):
        value = getattr(args, name)
        need(value is None or 0 < value < math.inf, "--" + name.replace("_", "-"), value, "a positive number")
    for name in ("beta", "weight_decay", "price"):
        value = getattr(args, name)
        need(value is None or 0 <= value < math.inf, "--" + name.replace("_", "-"), value, "a number of at least 0")
    need(args.lr_grid is None or all(0 < lr < math.inf for lr in args.lr_grid), "--lr-grid", args.lr_grid, "positive numbers")
    need(args.layers is None or min(args.layers) >= 0 and len(set(args.layers)) == len(args.layers), "--layers", args.layers, "different numbers from 0")
    need(0 <= args.warmup < 1, "--warmup", args.warmup, "a share in [0, 1)")
    need(args.seeds is None or len(set(args.seeds)) == len(args.seeds), "--seeds", args.seeds, "different numbers")
    need(len(set(args.targets)) == len(args.targets), "--targets", " ".join(args.targets), "each letter once")
    need(args.method != "ft" or args.dtype == "float32", "--dtype", args.dtype, "float32 with --method ft, which trains every weight")
    need(not args.resume or args.out, "--resume", "given without --out", "the --out of the run to go on with")
    args.device = ("cuda" if torch.cuda.is_available() else "cpu") if args.device == "auto" else args.device
    try:
        device = torch.device(args.device)
    except RuntimeError:
        device = None
    need(device is not None and device.type in ("cpu", "cuda"), "--device", repr(args.device), "auto, cpu, cuda or cuda:i")
    need(device.type == "cpu" or (device.index or 0) < torch.cuda.device_count(), "--device", args.device,
         f"a GPU that is there ({torch.cuda.device_count()} found); use --device cpu")
    need(PROCESSES == 1 or args.device in ("cpu", "cuda"), "--device", args.device, "cpu or cuda under torchrun: each process takes a GPU of its own")


def fail(message):
    if int(os.environ.get("LOCAL_RANK", 0)) == 0:  # once a machine, not once a process
        print(f"error: {message}", file=sys.stderr)
    return 2


def write_text(file, text):
    """Whole or not at all."""
    beside = file.with_name(file.name + ".new")
    beside.write_text(text, encoding="utf-8")
    os.replace(beside, file)


# ---------------------------------------------------------------------------------------------------------------------
# one run


def evaluate(model, rows, pad_id, device, batch_size=128):
    """Logits (n, num_labels) in the order of `rows`, float32 numpy; each process computes its share of the batches."""
    training = model.training
    logits = torch.zeros(len(rows), model.num_labels, device=device)
    model.eval()
    with torch.inference_mode():
        for batch in batch_order([len(ids) for ids, _ in rows], batch_size)[RANK::PROCESSES]:
            logits[batch] = model(*collate([rows[i] for i in batch], pad_id, device)).float()
    if PROCESSES > 1:
        dist.all_reduce(logits)
    model.train(training)
    return logits.cpu().numpy()


def save_checkpoint(folder, optimizer, lowrank, progress):
    """Everything a run needs to go on, as safetensors and JSON: nothing in it is code."""
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    tensors = {f"param.{i}": p.detach() for i, p in enumerate(trained)}
    for i, p in enumerate(trained):
        tensors |= {f"state.{i}.{name}": value for name, value in optimizer.state.get(p, {}).items()}
    state = lowrank.state_dict() if lowrank else {}
    tensors |= {f"method.{name}": value for name, value in state.items() if torch.is_tensor(value)}
    progress["method"] = {name: value for name, value in state.items() if not torch.is_tensor(value)}
    beside = folder.with_name("checkpoint.new")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir()
    save_file({name: value.contiguous() for name, value in tensors.items()}, beside / "state.safetensors")
    (beside / "progress.json").write_text(json.dumps(progress))
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(beside, folder)


def load_checkpoint(folder, optimizer, lowrank, device, settings):
    """The inverse; returns the progress. Pruned tensors come in the shapes they were saved in."""
    progress = json.loads((folder / "progress.json").read_text())
    for name, value in settings.items():
        found = progress["settings"].get(name)
        if found != value and name not in ("log_every", "threads"):
            raise InputError(f"--resume: --{name.replace('_', '-')} is {value}, but {folder} was written with {found}: "
                             "give the run's own flags")
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    tensors = load_file(folder / "state.safetensors")
    for name, value in tensors.items():
        kind, *rest = name.split(".")
        if kind in ("param", "state"):
            p, value = trained[int(rest[0])], value.to(device)
            if value.dim() == 2 and p.stride(0) == 1:  # lora_B and its moments lie column by column
                value = value.mT.contiguous().mT
            if kind == "param":
                p.data = value
            else:
                optimizer.state[p][rest[1]] = value
    if lowrank:
        state = {name.removeprefix("method."): value for name, value in tensors.items() if name.startswith("method.")}
        lowrank.load_state_dict(progress["method"] | state)
    return progress


def train(args, seed, out):
    """One run: trains with one seed, writes its files into `out`, returns what is in result.json (in the first process)."""
    settings = {k: v for k, v in vars(args).items() if k not in NOT_OF_A_RUN} | dict(seed=seed)

    # ---- data, and what the model's sizes allow
    task, train_rows, dev_sets = load_task(args.task, args.data, args.limit_train, args.limit_dev, args.hold_out)
    folder = model_folder(args.model)
    config, tokenizer = read_config(folder), load_tokenizer(folder)
    narrowest = min(config.hidden_size, config.intermediate_size)
    if args.r > narrowest and args.method in ("salora", "lora", "adalora"):
        raise InputError(f"--r is {args.r}, but the narrowest matrix of {args.model} allows a rank of 1 to {narrowest}")
    room = config.max_length - (args.virtual_tokens if args.method == "prompt" else 0)
    max_length = min(128, room) if args.max_length is None else args.max_length
    if not 8 <= max_length <= room:
        raise InputError(f"--max-length is {max_length}, but {args.model} has positions for {config.max_length} tokens"
                         + f", {args.virtual_tokens} of them for the prompt (--virtual-tokens)" * (args.method == "prompt"))
    if max(args.layers or [0]) >= config.num_hidden_layers:
        raise InputError(f"--layers has {max(args.layers)}, but {args.model} has layers 0 to {config.num_hidden_layers - 1}")
    tokens = tokenize(tokenizer, train_rows.texts, max_length, config.vocab_size)
    dev_tokens = [tokenize(tokenizer, rows.texts, max_length, config.vocab_size) for rows in dev_sets]
    lengths, pad_id = [len(ids) for ids, _ in tokens], config.pad_token_id

    # ---- how long it takes; the gates' learning rate, with which log theta can travel several units within a short window
    epochs = task.epochs if args.epochs is None else args.epochs
    rows_per_step = args.batch_size * args.accumulate * PROCESSES
    epoch_steps = math.ceil(len(tokens) / rows_per_step)
    steps = min(math.ceil(epochs * epoch_steps), args.max_steps or math.inf)
    window_steps = [step for step in range(steps) if args.window[0] <= step / steps < args.window[1]]
    if args.method in ("salora", "adalora") and not any(window_steps):
        raise InputError(f"--window {args.window[0]} {args.window[1]} holds none of the {steps} steps after the first, in which B is 0 and no gate "
                         "has a gradient: widen it or train longer")
    gate_lr = min(max(0.2, 32 / max(len(window_steps), 1)), 1.0) if args.gate_lr is None else args.gate_lr
    settings |= dict(epochs=epochs, gate_lr=gate_lr, max_length=max_length, processes=PROCESSES)

    # ---- model, method, optimiser
    torch.manual_seed(seed)
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if PROCESSES > 1 and args.device == "cuda" else torch.device(args.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.cuda.reset_peak_memory_stats(device)
    model = load_encoder(folder, task.num_labels, getattr(torch, args.dtype)).to(device)
    model.checkpoint_activations = args.checkpoint_activations
    gated, paths = args.method == "salora", model.target_paths(args.targets, args.layers)
    if gated:
        lowrank = sl.SaLoRA(model, paths, r=args.r, alpha=args.alpha, budget=args.budget, beta=args.beta, window=args.window,
                            orth_reduction=args.orth_reduction, price=args.price, selection=args.selection,
                            straight_through=args.straight_through, fold_gates=args.fold_gates, seed=seed)
        settings["selection"] = lowrank.selection
    else:
        lowrank = baselines.install(model, args.method, paths, steps, args.r, args.alpha, args.budget, args.beta, args.window,
                                    args.bottleneck, args.virtual_tokens)  # takes part in every step; None if the method has nothing to do there
    if args.method != "ft":
        for module in model.head:
            module.float().requires_grad_(True)
    head_params = sum(p.numel() for module in model.head for p in module.parameters())

    def count():
        return sum(p.numel() for p in model.parameters() if p.requires_grad) - head_params

    trainable_params = count()
    if gated:
        groups = lowrank.param_groups(args.lr, gate_lr, args.weight_decay)
    else:
        groups = [dict(params=[p for p in model.parameters() if p.requires_grad], lr=args.lr, weight_decay=args.weight_decay)]
    optimizer = torch.optim.AdamW(groups, fused=True)  # one call for all parameters
    for group in optimizer.param_groups:
        group["peak_lr"] = group["lr"]
    print("settings: " + " ".join(f"{k}={' '.join(map(str, v)) if isinstance(v, list) else v}" for k, v in settings.items()))
    print(f"{args.method} on {args.task}: {len(tokens)} training rows, {steps} steps of {rows_per_step}; "
          f"{trainable_params:,} parameters to train and {head_params:,} in the head")

    # ---- the folder: go on where a run was stopped, or start anew
    step, history, seconds, log_file = 0, [], 0.0, out / "log.jsonl"
    if args.resume and (out / "checkpoint").is_dir():
        progress = load_checkpoint(out / "checkpoint", optimizer, lowrank, device, settings)
        step, history, seconds = progress["step"], progress["history"], progress["seconds"]
        if RANK == 0:
            lines = log_file.read_text().splitlines(keepends=True)
            write_text(log_file, "".join(line for line in lines if json.loads(line)["step"] < step))
        print(f"resumed at step {step} of {steps}")
    else:
        if args.resume:
            print(f"{out}: no checkpoint to resume from, starting at step 0")
        elif (out / "checkpoint").is_dir():
            print(f"{out}: holds a run that did not finish and is replaced (--resume would have gone on with it)")
        if RANK == 0:
            clear_folder(out)
            log_file.write_text("")

    def evaluate_dev():
        logits = [evaluate(model, rows, pad_id, device) for rows in dev_tokens]
        scores = score(task, dev_sets[0].labels, logits[0])
        if len(dev_sets) > 1:  # MNLI
            scores |= {f"{k}_mismatched": v for k, v in score(task, dev_sets[1].labels, logits[1]).items()}
        return logits, scores

    # ---- the loop
    forward = torch.compile(model, dynamic=True) if args.compile else model
    warmup = math.ceil(args.warmup * steps)
    restart = window_steps[-1] + 1 if gated and args.rewarm else steps
    labels = torch.tensor(train_rows.labels)
    batches, logits, scores = None, None, None
    sums, log_tokens, log_steps, log_start = torch.zeros(2, device=device), 0, 0, time.time()  # sums: loss, task loss since the last line
    model.train()
    while step < steps:
        if batches is None or step % epoch_steps == 0:  # the order of an epoch depends on the seed and its number alone
            batches = batch_order(lengths, rows_per_step, np.random.default_rng([seed, step // epoch_steps]))
        batch = batches[step % epoch_steps]
        factor = min((step + 1) / max(warmup, 1), (steps - step) / max(steps - warmup, 1))
        if step >= restart:
            factor = (steps - step) / (steps - restart)
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * factor

        torch.manual_seed((seed * steps + step) * PROCESSES + RANK)  # of dropout: a resumed run needs no generator's state
        share = batch[RANK::PROCESSES] or batch[:1]  # a last batch may be too small for all: one row then, which does not count
        for i in range(0, len(share), args.batch_size):
            if lowrank:
                lowrank.begin_step(step / steps, optimizer)  # draws the step's gates; at the end of the window it prunes
            part = share[i:i + args.batch_size]
            inputs = collate([tokens[j] for j in part], pad_id, device, always_mask=args.compile)  # one graph instead of two
            logit = forward(*inputs)  # (b, num_labels)
            label = labels[part].to(device, non_blocking=True)  # (b,)
            loss = F.cross_entropy(logit, label, reduction="sum") if task.labels else F.mse_loss(logit[:, 0], label, reduction="sum")
            loss = loss * ((RANK < len(batch)) / len(batch))
            sums += loss.detach()
            loss = loss * PROCESSES  # average_gradients takes a mean over the processes
            if lowrank and i + args.batch_size >= len(share):
                penalty = lowrank.penalty()  # beta R_orth + lambda (C - b)^2, once a step
                sums[0] += penalty.detach() / PROCESSES
                loss = loss + penalty
            loss.backward()
        sl.average_gradients(optimizer)
        optimizer.step()
        if lowrank:
            lowrank.end_step()  # lambda >= 0
        optimizer.zero_grad()

        # ---- a line in log.jsonl now and then
        log_steps, log_tokens = log_steps + 1, log_tokens + sum(lengths[j] for j in batch)
        epoch_end = (step + 1) % epoch_steps == 0 or step + 1 == steps
        if step % args.log_every == 0 or epoch_end:
            if PROCESSES > 1:
                dist.all_reduce(sums)
            loss, task_loss = (sums / log_steps).tolist()
            now = time.time()  # after the line above, which waits for the device
            seconds, speed = seconds + now - log_start, log_tokens / (now - log_start)
            entry = {"step": step, "epoch": round((step + 1) / epoch_steps, 4), "loss": loss, "task_loss": task_loss,
                     "lr": optimizer.param_groups[0]["lr"], "density": None, "lambda": None, "orth_a": None, "orth_b": None,
                     "tokens_per_second": round(speed, 1)}
            if lowrank:
                with torch.no_grad():
                    orth_a, orth_b = lowrank.orthogonality()
                    entry |= {"density": lowrank.density().item(), "lambda": None if args.method == "adalora" else lowrank.lam.item(),
                              "orth_a": orth_a.item(), "orth_b": orth_b.item()}
            if RANK == 0:
                with log_file.open("a") as f:
                    f.write(json.dumps(entry) + "\n")
            gates = f" density {entry['density']:.3f} lambda {entry['lambda']:.3f}" if gated else ""
            left = int(seconds / (step + 1) * (steps - step - 1))
            line = f"step {step + 1}/{steps} loss {task_loss:.4f}{gates} {speed:.0f} tokens/s, {left // 60}:{left % 60:02d} left"
            if sys.stdout.isatty():
                print(f"\r{line:<100}", end="", flush=True)
            elif step * 20 // steps != (step - log_steps) * 20 // steps:  # a file gets 20 lines
                print(line, flush=True)
            sums.zero_()
            log_tokens, log_steps, log_start = 0, 0, time.time()
        step += 1

        # ---- scores after each epoch, and a checkpoint
        if epoch_end:
            if lowrank and step == steps:
                lowrank.begin_step(1.0, optimizer)  # a window that lasts to the end closes here
            logits, scores = evaluate_dev()
            history.append(dict(step=step, epoch=round(step / epoch_steps, 4), **scores))
            line = f"epoch {step / epoch_steps:.4g}: " + ", ".join(f"{k} {v:.4f}" for k, v in scores.items())
            print(f"\r{line:<100}" if sys.stdout.isatty() else line, flush=True)
            if RANK == 0:
                save_checkpoint(out / "checkpoint", optimizer, lowrank,
                                dict(step=step, history=history, seconds=seconds, settings=settings))
            log_start = time.time()

    # ---- results; result.json comes last: with it the run counts as finished
    if logits is None:  # stopped between the last step and here
        logits, scores = evaluate_dev()
    if RANK:
        return None
    for name, rows, values in zip(("predictions.tsv", "predictions_mismatched.tsv"), dev_sets, logits):
        lines = ["\t".join(["index", "label", "prediction", *(f"logit_{i}" for i in range(values.shape[1]))])]
        for i, (label, row) in enumerate(zip(rows.labels, values)):
            prediction = row.argmax() if task.labels else row[0]
            lines.append("\t".join(map(str, [i, label, prediction, *row])))
        write_text(out / name, "\n".join(lines) + "\n")
    if lowrank:
        head = ["classifier"] if config.model_type == "roberta" else ["classifier", "pooler"]
        sl.save(model, out / "adapter", head, base_model_name_or_path=str(args.model), task_type="SEQ_CLS")
    if args.method == "prefix":
        model.prefix.finish()
    kept_params = count()
    result = dict(
        task=args.task, model=args.model, method=args.method, seed=seed, metric=task.metric, score=scores[task.metric], metrics=scores,
        best_score=max(h[task.metric] for h in history), trainable_params=trainable_params, kept_params=kept_params,
        head_params=head_params, budget=args.budget if args.method in ("salora", "adalora") else None, density=lowrank.final_density if lowrank else None,
        kept_density=kept_params / max(trainable_params, 1), ranks=sl.ranks(model), steps=steps, seconds=round(seconds, 2),
        examples_per_second=round(len(tokens) * steps / epoch_steps / seconds, 1), peak_memory_mb=round(peak_memory_mb(device), 1),
        labels=task.labels, dev_rows=[len(rows.labels) for rows in dev_sets], history=history, settings=settings)
    write_text(out / "result.json", json.dumps(result, indent=1) + "\n")
    return result


def peak_memory_mb(device):
    """Of the GPU, or of the whole process, since the run began."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def report(args, result, out):
    """The end of a run, for a person."""
    print(f"\n{result['metric']} {result['score']:.4f} on {result['dev_rows'][0]} {'held-out' if args.hold_out else 'dev'} rows "
          f"after {result['steps']} steps, {result['seconds']:.0f} s")
    if args.method == "salora":
        goal = f"budget {args.budget:.4g}" if args.price is None else f"price {args.price:.4g}"
        print(f"{goal}: the gates came to a density of {result['density']:.3f}; kept {result['kept_params']:,} of {result['trainable_params']:,} "
              f"adapter parameters ({100 * result['kept_density']:.2f} %)")
    if result["ranks"]:
        letters = {name: letter for letter, name in LINEARS.items()}
        table = {}
        for path, rank in result["ranks"].items():  # roberta.encoder.layer.0.attention.self.query
            layer, name = path.split(".", 4)[3:]
            table[f"{layer}.W^{letters[name].upper()}"] = rank
        print(f"\nrank of each matrix, from {args.r} at the start: layers left to right\n\n{sl.rank_map(table, args.r)}")
    print(f"\n{out}/: result.json, log.jsonl, predictions.tsv" + ", adapter/ (loads in PEFT)" * bool(result["ranks"]))


def clear_folder(out):
    """Makes the folder of a run, without the files of an earlier run."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        for name in ("result.json", "log.jsonl", "predictions.tsv", "predictions_mismatched.tsv"):
            (out / name).unlink(missing_ok=True)
        for name in ("adapter", "checkpoint"):
            shutil.rmtree(out / name, ignore_errors=True)
    except OSError as e:
        raise InputError(f"--out {out}: cannot be written ({e.strerror})") from None


def free_folder(stem):
    """stem, or stem-2, stem-3 .. if it is taken."""
    number = 1
    while (folder := Path(stem if number == 1 else f"{stem}-{number}")).exists():
        number += 1
    return folder


def finished(args, out):
    """The result of a finished run of the same flags in `out`, or None."""
    file = out / "result.json"
    if not file.exists():
        return None
    result = read_json(file)
    for name, value in vars(args).items():
        found = result["settings"].get(name, value)
        if value is not None and found != value and name not in (*NOT_OF_A_RUN, "seed", "threads", "log_every"):
            raise InputError(f"--out {out} holds a finished run with --{name.replace('_', '-')} {found}, not {value}: give another folder")
    return result


def run(args, seed, out):
    """train(), unless --resume finds it done; returns its result (in the first process)."""
    result = finished(args, out) if args.resume else None
    if result:
        print(f"{out}: finished already")
    elif (out / "result.json").exists() and not args.overwrite:
        raise InputError(f"--out {out} holds a finished run: give another folder, or --overwrite")
    else:
        result = train(args, seed, out)
        if RANK == 0:
            report(args, result, out)
    return result


def choose_lr(args, root):
    """The learning rate of --lr-grid with the best score on rows held out of training, in a run of its own seed."""
    scores = {}
    for lr in args.lr_grid:
        trial = argparse.Namespace(**vars(args) | dict(lr=lr, hold_out=args.hold_out or 0.2))
        result = run(trial, TUNING_SEED, root / f"lr{lr:g}")
        scores[lr] = result["score"] if result else 0.0
    if PROCESSES > 1:  # the first process knows the scores
        dist.broadcast_object_list(box := [scores])
        scores = box[0]
    best = max(scores, key=scores.get)
    print(f"\nlearning rate {best:g}, on held-out rows: " + ", ".join(f"{lr:g}: {score:.4f}" for lr, score in scores.items()))
    return best


def main(argv=None):
    args = parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    if PROCESSES > 1:
        dist.init_process_group("nccl" if args.device == "cuda" else "gloo")
    name = args.task if args.task in TASKS else Path(args.task).resolve().name
    root = Path(args.out) if args.out else free_folder(f"runs/{name}-{args.method}")
    if args.lr_grid:
        args.lr = choose_lr(args, root)
        args.hold_out = None
    runs = [(args.seed, root)] if args.seeds is None else [(seed, root / f"seed{seed}") for seed in args.seeds]
    results = [run(args, seed, out) for seed, out in runs]
    if RANK:
        return
    if args.seeds is not None:
        scores = [r["score"] for r in results]
        summary = dict(metric=results[0]["metric"], seeds=args.seeds, scores=scores, mean=statistics.mean(scores),
                       std=statistics.stdev(scores) if len(scores) > 1 else 0.0)
        write_text(root / "summary.json", json.dumps(summary, indent=1) + "\n")
        print(f"\n{summary['metric']} over seeds {' '.join(map(str, args.seeds))}: {summary['mean']:.4f} ± {summary['std']:.4f} "
              f"({' '.join(f'{s:.4f}' for s in scores)}); {root}/summary.json")
    elif args.task == "demo":
        print("\nnext: --method lora (the same without gates), --budget 0.25, --seeds 0 1 2, or the real thing: python train_glue.py --task cola")


def command(argv=None):
    if RANK:
        sys.stdout = open(os.devnull, "w")  # the first process speaks for all
    argv = sys.argv[1:] if argv is None else argv
    try:
        if argv and argv[0] in EXPERIMENTS:
            import experiments  # which imports this file
            experiments.main(argv[0], argv[1:])
        else:
            main(argv)
    except InputError as e:
        sys.exit(fail(e))
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    command()
