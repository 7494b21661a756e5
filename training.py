"""
What train_glue.py and train_instruct.py share: flags and their checks, the training loop, checkpoints, the folders of runs, several seeds.
"""

import argparse
import contextlib
import io
import json
import math
import os
import resource
import shutil
import signal
import statistics
import sys
import threading
import time
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

import adapter
import baselines
import salora as sl
from data import InputError, locked
from data.batching import batch_order
from model import read_json

RANK, PROCESSES = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # as torchrun sets them
TUNING_SEED = 100  # of the runs of --lr-grid
CHECKPOINTS = ("checkpoint", "checkpoint.previous")  # in a run's folder: the last, and the one before, should the last be damaged
LARGEST = 2**31  # no number that a flag takes comes near it
NOT_OF_A_RUN = ("out", "resume", "overwrite", "seeds", "lr_grid")  # flags that are no settings of a single run
MAY_CHANGE = ("threads", "log_every", "save_every")  # flags that --resume may change
RESOLVED_LATER = ("epochs", "max_length", "selection", "gate_lr", "lr", "r", "dtype")  # flags for which None means: what the run takes
RECIPES = {  # what the two recipes set, unless a flag says otherwise
    "default": dict(beta=0.0, orth_reduction="mean", window=(0.4, 0.5), gate_lr=None, turn=True, selection=None, fold_gates=False,
                    rewarm=True),
    "paper": sl.PAPER | dict(rewarm=False),
}


# ---------------------------------------------------------------------------------------------------------------------
# flags


def new_parser(**kw):
    """An ArgumentParser whose errors are one line, as all others are."""
    parser = argparse.ArgumentParser(**kw)
    parser.error = lambda message: sys.exit(fail(message))
    return parser


def flag_group(parser, title):
    """parser.add_argument of a group, which adds the default to the help sentence."""
    add = parser.add_argument_group(title).add_argument
    return lambda *names, help, **kw: add(*names, **kw, help=f"{help} (default: %(default)s)" if "default" in kw else help)


def method_flags(parser, methods, letters):
    arg = flag_group(parser, "method")
    arg("--method", choices=methods, default="salora", help="SaLoRA, or what it is compared with: see baselines.py")
    arg("--adapter", metavar="DIR",
        help="go on from this LoRA adapter, of this project or of PEFT, with its own --r, --alpha, --targets and --layers; "
        "with --epochs 0 only score it (default: start anew)")
    arg("--r", type=int, help="rank at the start (default: 8)")
    arg("--alpha", type=float, help=f"the update is scaled by alpha/r (default: r, a scale of 1; adalora {baselines.AdaLoRA.SCALE} r)")
    more = ", and W^G if named" if "g" in letters else ""
    arg("--targets", nargs="+", choices=list(letters),
        help=f"adapted matrices of each layer: W^Q W^K W^V W^O W^U W^D{more} (default: q k v o u d)")
    arg("--layers", type=int, nargs="+", help="numbers of the layers that low-rank methods adapt, from 0 (default: all)")
    arg("--budget", type=float, default=0.5, help="share b of the adapter parameters to keep (adalora: of the triplets)")
    arg("--beta", type=float, help="weight of the orthogonal regulariser (default: 0; adalora 0.1)")
    arg("--window", type=float, nargs=2, metavar=("START", "END"),
        help="fractions of the run between which gates are learned (adalora: between which the budget falls; lora-svd "
        "cuts at END; default: 0.4 0.5, adalora 0.2 0.5)")
    arg("--recipe", choices=list(RECIPES), default="default", help="paper: the letter of the paper, "
        "--beta 0.1 --orth-reduction sum --window 0.2 0.5 --gate-lr 0.01 --no-turn --selection paper --fold-gates --no-rewarm")
    arg("--orth-reduction", choices=["mean", "sum"], help="of the regulariser over the matrices (default: mean)")
    arg("--selection", choices=["budget", "paper"], help="keep what fits the budget, or what has a gate above 0 "
        "(default: budget; with --price: paper)")
    arg("--turn", action=argparse.BooleanOptionalAction,
        help="when the window opens, turn A and B into the singular directions of BA and start the gates from the "
        "singular values (default: yes)")
    arg("--fold-gates", action=argparse.BooleanOptionalAction,
        help="multiply kept gates into B instead of setting them to 1 (default: no)")
    arg("--gate-lr", type=float,
        help="learning rate of log theta and lambda (default: 12 / steps of the window, up to 1)")
    arg("--price", type=float, metavar="LAMBDA",
        help="eq. 10: a constant price of an open gate instead of a budget (default: off)")


def machine_flags(parser, dtype=None):
    """`dtype`: the words of its default; None: there is no such flag."""
    arg = flag_group(parser, "machine")
    arg("--device", default="auto", help="auto, cpu, cuda or cuda:i")
    if dtype:
        arg("--dtype", choices=["float32", "bfloat16"],
            help=f"of the frozen weights; what is trained is float32 (default: {dtype})")
    arg("--threads", type=int, help="CPU threads (default: torch's choice; to train the demo 1, its tensors are too small to share)")
    return arg


def run_flags(parser, epochs, lr, batch_size, dtype, out):
    """Optimisation, machine and output; `epochs`, `lr`, `dtype` and `out` are the words of their defaults."""
    arg = flag_group(parser, "optimisation")
    arg("--epochs", type=float, help=f"passes over the training rows (default: {epochs})")
    arg("--max-steps", type=int, help="end after this many steps whatever --epochs says (default: no limit)")
    arg("--batch-size", type=int, default=batch_size, help="rows of a forward pass, in each process")
    arg("--accumulate", type=int, default=1, help="forward passes a step")
    arg("--lr", type=float, help=f"of the weights (default: {lr})")
    arg("--warmup", type=float, default=0.06,
        help="share of the steps in which the learning rates rise, before they fall linearly to 0")
    arg("--rewarm", action=argparse.BooleanOptionalAction,
        help="at the end of the window, when the adapter has been cut down, the learning rate "
        "starts at --lr again (default: yes for salora and lora-svd)")
    arg("--weight-decay", type=float, default=0.01, help="of the weights; gates and lambda have none")
    arg("--seed", type=int, default=0, help="of head and adapter weights, order of rows, dropout and gates")
    arg("--seeds", type=int, nargs="+",
        help="several runs, --out/seed0 .., and their mean and standard deviation (default: one run, with --seed)")

    arg = machine_flags(parser, dtype)
    arg("--compile", action="store_true", default=False, help="compile the model with torch.compile")
    arg("--checkpoint-activations", action="store_true", default=False,
        help="recompute activations in the backward pass: less memory, more time")

    arg = flag_group(parser, "output")
    arg("--out", help=f"folder of the run (default: {out}, with a number behind it if that is taken)")
    arg("--resume", action="store_true", default=False, help="go on from --out/checkpoint")
    arg("--overwrite", action="store_true", default=False, help="replace a finished run in --out")
    arg("--log-every", type=int, default=10, help="steps from one line of log.jsonl to the next")
    arg("--save-every", type=int, metavar="N",
        help="write a checkpoint every N steps too (default: after each epoch, and on Ctrl-C or SIGTERM)")


def settle(args):
    """Fills in what the recipe decides, then check()."""
    if args.method == "adalora":
        args.beta = 0.1 if args.beta is None else args.beta
        args.window = args.window or [0.2, 0.5]
    if args.method not in ("salora", "lora-svd") and args.rewarm is None:
        args.rewarm = False
    for name, value in RECIPES[args.recipe].items():
        if getattr(args, name) is None:
            setattr(args, name, list(value) if name == "window" else value)
    if args.adapter is None:
        args.r, args.targets = 8 if args.r is None else args.r, args.targets or list("qkvoud")
        if args.alpha is None:
            args.alpha = float(args.r * (baselines.AdaLoRA.SCALE if args.method == "adalora" else 1))
    check(args)


def check(args):
    """Refuses what can be known to be wrong before a file is opened."""
    need(args.adapter is None or args.method in ("lora", "salora"), "--adapter", "given",
         f"no adapter with --method {args.method}; lora and salora can go on from one")
    for name in ("r", "alpha", "targets", "layers"):
        need(args.adapter is None or getattr(args, name) is None, flag(name), "given", "none with --adapter, which has its own")

    need(0 < args.budget <= 1, "--budget", args.budget, "a share in (0, 1]")
    start, end = args.window
    need(0 <= start < end <= 1, "--window", f"{start} {end}", "two fractions of the run, 0 <= START < END <= 1")
    at_least(args, 1, "r", "batch_size", "accumulate", "log_every", "save_every", "max_steps", "threads", "limit_train", "limit_dev")
    at_least(args, 8, "max_length")
    at_least(args, 0, "seed", "beta", "weight_decay", "price")
    for name in ("lr", "gate_lr", "alpha", "epochs", "hold_out"):
        value = getattr(args, name)
        only_scored = name == "epochs" and value == 0 and (args.adapter or args.method == "head")
        hint = ", or 0 with --adapter or --method head, to score what is there" if name == "epochs" else ""
        need(value is None or 0 < value < LARGEST or only_scored, flag(name), value, f"a positive number, below {LARGEST}{hint}")
    need(0 <= args.warmup < 1, "--warmup", args.warmup, "a share in [0, 1)")
    seeds = args.seeds or []
    need(all(0 <= seed < LARGEST for seed in seeds) and len(set(seeds)) == len(seeds), "--seeds", seeds,
         f"different numbers from 0, below {LARGEST}")
    need(args.layers is None or min(args.layers) >= 0 and len(set(args.layers)) == len(args.layers), "--layers", args.layers,
         "different numbers from 0")
    need(len(set(args.targets or [])) == len(args.targets or []), "--targets", " ".join(args.targets or []), "each letter once")
    need(not args.resume or args.out, "--resume", "given without --out", "the --out of the run to go on with")
    find_device(args)
    need(PROCESSES == 1 or args.device in ("cpu", "cuda"), "--device", args.device,
         "cpu or cuda under torchrun: each process takes a GPU of its own")


def find_device(args):
    """The torch.device that --device means, which is written back for "auto"."""
    args.device = ("cuda" if torch.cuda.is_available() else "cpu") if args.device == "auto" else args.device
    try:
        device = torch.device(args.device)
    except RuntimeError:
        device = None
    need(device is not None and device.type in ("cpu", "cuda"), "--device", repr(args.device), "auto, cpu, cuda or cuda:i")
    need(device.type == "cpu" or (device.index or 0) < torch.cuda.device_count(), "--device", args.device,
         f"a GPU that is there ({torch.cuda.device_count()} found); use --device cpu")
    return device


def use_machine(args):
    """find_device(), after --threads has been put to use."""
    at_least(args, 1, "threads")
    if args.threads:
        torch.set_num_threads(args.threads)
    return find_device(args)


def need(ok, name, found, expected):
    if not ok:
        raise InputError(f"{name} is {found}, expected {expected}")


def at_least(args, least, *names):
    for name in names:
        value = getattr(args, name)
        need(value is None or least <= value < LARGEST, flag(name), value, f"at least {least}, below {LARGEST}")


def flag(name):
    return "--" + name.replace("_", "-")


def check_sizes(args, config):
    """Refuses ranks and layers that the model does not have, before its weights are read."""
    if (args.r or 0) > config.narrowest and args.method in ("salora", "lora", "lora-svd", "adalora"):
        raise InputError(f"--r is {args.r}, but the narrowest matrix of {args.model} allows a rank of 1 to {config.narrowest}")
    if max(args.layers or [0]) >= config.num_hidden_layers:
        raise InputError(f"--layers has {max(args.layers)}, but {args.model} has layers 0 to {config.num_hidden_layers - 1}")


def fail(message):
    if int(os.environ.get("LOCAL_RANK", 0)) == 0:  # once a machine, not once a process
        print(f"error: {message}", file=sys.stderr)
    return 2


def write_text(file, text):
    """Whole or not at all."""
    beside = file.with_name(file.name + ".new")
    beside.write_text(text, encoding="utf-8")
    os.replace(beside, file)


def markdown(head, rows):
    """A table."""
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in (head, ["---"] * len(head), *rows)) + "\n"


# ---------------------------------------------------------------------------------------------------------------------
# checkpoints


def save_checkpoint(folder, optimizer, lowrank, progress):
    """Everything a run needs to go on, as safetensors and JSON: nothing in it is code. Written beside and renamed; the last one stays as
    checkpoint.previous."""
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    tensors = {f"param.{i}": p.detach() for i, p in enumerate(trained)}
    for i, p in enumerate(trained):
        tensors |= {f"state.{i}.{name}": value for name, value in optimizer.state.get(p, {}).items()}
    state = lowrank.state_dict() if lowrank else {}
    tensors |= {f"method.{name}": value for name, value in state.items() if torch.is_tensor(value)}
    progress["method"] = {name: value for name, value in state.items() if not torch.is_tensor(value)}
    beside, previous = folder.with_name("checkpoint.new"), folder.with_name("checkpoint.previous")
    shutil.rmtree(beside, ignore_errors=True)
    try:
        beside.mkdir()
        save_file({name: value.contiguous() for name, value in tensors.items()}, beside / "state.safetensors")
        (beside / "progress.json").write_text(json.dumps(progress))
        shutil.copymode(beside / "progress.json", beside / "state.safetensors")  # save_file lets nobody else read it
    except (OSError, SafetensorError):
        shutil.rmtree(beside, ignore_errors=True)
        raise
    if folder.exists():
        shutil.rmtree(previous, ignore_errors=True)
        os.replace(folder, previous)
    os.replace(beside, folder)


def find_checkpoint(out):
    """(progress, tensors) of the last checkpoint in a run's folder that is whole, or None."""
    for folder in (out / name for name in CHECKPOINTS):
        if not folder.is_dir():
            continue
        try:
            progress, tensors = read_json(folder / "progress.json"), load_file(folder / "state.safetensors")
            if progress.keys() >= {"step", "history", "seconds", "settings", "method", "open_line"}:
                return progress, tensors
            reason = "entries of progress.json are missing"
        except (InputError, OSError, SafetensorError) as e:
            reason = e
        print(f"{folder}: not a whole checkpoint ({reason})")
    return None


def load_checkpoint(out, progress, tensors, optimizer, lowrank, device, settings):
    """The inverse of save_checkpoint, for what find_checkpoint gave. Pruned tensors come in the shapes they were saved in."""
    for name, value in settings.items():
        found = progress["settings"].get(name)
        if found != value and name not in MAY_CHANGE:
            raise InputError(f"--resume: {flag(name)} is {value}, but the checkpoint in {out} was written with {found}: "
                             "give the run's own flags")
    if lowrank:  # before the parameters: it brings A and B into the shapes they were saved in
        state = {name.removeprefix("method."): value for name, value in tensors.items() if name.startswith("method.")}
        try:
            lowrank.load_state_dict(progress["method"] | state)
        except KeyError as e:
            raise InputError(f"--resume: the checkpoint in {out} has no {e}, as another version wrote it: start anew") from None
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    for name, value in tensors.items():
        kind, *rest = name.split(".")
        if kind in ("param", "state"):
            p, value = trained[int(rest[0])], value.to(device, copy=True)  # a file aligns its tensors otherwise: other last bits
            if kind == "param":
                p.data = value
            else:
                optimizer.state[p][rest[1]] = value


class Stopped(Exception):
    """A signal ended the run, whose state is saved. args: the line to print, the number of the signal."""


@contextlib.contextmanager
def noticed_signals():
    """A list to which the number of a SIGINT or SIGTERM is added, so that a step can be finished first; a second one interrupts at
    once. Only the main thread hears signals."""
    seen = []
    if threading.current_thread() is not threading.main_thread():
        yield seen
        return

    def note(number, frame):
        if seen:
            raise KeyboardInterrupt
        seen.append(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield seen
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def own_folder(args, out):
    """Makes the folder of a run and keeps other processes out of it until the run is through, or the process ends."""
    if RANK:
        yield
        return
    make_folder(out)
    with contextlib.ExitStack() as held:
        try:
            held.enter_context(locked(out, wait=False))
        except BlockingIOError:
            raise InputError(f"--out {out}: another run is writing into it; give another folder, or wait") from None
        refuse_taken(args, out)  # by another process while this one was loading
        yield


# ---------------------------------------------------------------------------------------------------------------------
# one run


def schedule(args, lengths, weights, epochs):
    """The plan of a run. lengths: the tokens of each training row; weights: what it counts in the mean loss of a step. In the plan
    besides: epochs, rows_per_step, epoch_steps, steps; gated: are there gates; warmup and restart, in steps: see lr_factor."""
    rows_per_step = args.batch_size * args.accumulate * PROCESSES
    epoch_steps = math.ceil(len(lengths) / rows_per_step)
    steps = min(math.ceil(epochs * epoch_steps), args.max_steps or math.inf)
    if args.method in ("salora", "lora-svd", "adalora") and steps == 1:
        raise InputError(f"one step is too short a run for --method {args.method}: in the first, B is zero and gates have no gradient")
    end = sl.window_steps(args.window, steps)[1]
    return SimpleNamespace(
        lengths=lengths, weights=weights, epochs=epochs, rows_per_step=rows_per_step, epoch_steps=epoch_steps, steps=steps,
        gated=args.method == "salora", warmup=math.ceil(args.warmup * steps), restart=end if args.rewarm else steps)


def lr_factor(plan, step):
    """The share of its peak that a learning rate has: it rises linearly over the warm-up and falls linearly to 0; when the adapter
    has been cut down (restart) it falls from the peak once more."""
    if step >= plan.restart:
        return (plan.steps - step) / (plan.steps - plan.restart)
    return min((step + 1) / max(plan.warmup, 1), (plan.steps - step) / max(plan.steps - plan.warmup, 1))


def own_device(args):
    """The torch.device of this process, with a fresh count of its peak memory."""
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if PROCESSES > 1 and args.device == "cuda" else torch.device(args.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.cuda.reset_peak_memory_stats(device)
    return device


def start_from(args, model, steps):
    """Puts the adapter of --adapter into the model, unless the run cannot go on with it."""
    load_adapter(model, args.adapter)
    name, ranks = f"--adapter {args.adapter}", set(sl.ranks(model).values())
    need(ranks, f"{name}: its target_modules", "empty", "at least one matrix to go on with")
    need(len(ranks) == 1 or args.method == "lora" or not steps, f"{name}: its rank", f"{min(ranks)} to {max(ranks)}",
         "one for all where gates are to be learned; --method lora goes on from it")
    head = [m for part in getattr(model, "head", ()) for m in part.modules()]
    need(not any(isinstance(m, sl.SaLoRALinear) for m in head), f"{name}: its target_modules", "one that reaches into the head",
         "names in the body: the head is trained whole")
    adapted = {id(p) for m in [*head, *sl.adapters(model).values()] for p in m.parameters()}
    others = [path for path, p in model.named_parameters() if p.requires_grad and id(p) not in adapted]
    need(not others, f"{name}: its modules_to_save", f"with {', '.join(others)}", "nothing but the head")


def install(args, model, steps, seed):
    """Puts the method into the model. Returns the SaLoRA or AdaLoRA object that takes part in every step, None if the method has none."""
    if args.adapter:
        start_from(args, model, steps)
    paths = None if args.adapter else model.target_paths(args.targets, args.layers)
    if args.method == "salora":
        return sl.SaLoRA(model, paths, max(steps, 1), r=args.r, alpha=args.alpha, budget=args.budget, beta=args.beta,
                         window=args.window if steps else None, seed=seed, gate_lr=args.gate_lr, turn=args.turn,
                         orth_reduction=args.orth_reduction, selection=args.selection, fold_gates=args.fold_gates, price=args.price)
    return baselines.install(model, args.method, paths, steps, args.r, args.alpha, args.budget, args.beta, args.window,
                             getattr(args, "bottleneck", None), getattr(args, "virtual_tokens", None))


def settings_of(args, seed, plan, lowrank):
    """Every flag of a run as it was resolved, for result.json and the check of --resume."""
    settings = {name: value for name, value in vars(args).items() if name not in NOT_OF_A_RUN}
    settings |= dict(seed=seed, epochs=plan.epochs, processes=PROCESSES)
    if args.method == "salora":
        settings |= dict(selection=lowrank.selection, gate_lr=lowrank.gate_lr)
    if args.adapter:
        settings["r"] = max(m.r for m in lowrank.layers)
    return settings


def announce(settings, line):
    """The resolved settings, and what is about to happen."""
    print("settings: " + " ".join(f"{k}={' '.join(map(str, v)) if isinstance(v, list) else v}" for k, v in settings.items()))
    print(line)


class Log:
    """log.jsonl, and the same on the screen: now and then a line, with means over the steps since the last one."""

    def __init__(self, out, plan, device):
        self.file, self.plan = out / "log.jsonl", plan
        self.sums = torch.zeros(2, device=device)  # loss, task loss since the last line
        self.tokens = self.steps = 0  # since then
        self.seconds = 0.0  # of the whole run
        self.restart_clock()

    def restart_clock(self):
        """After what is not training: an evaluation, a checkpoint."""
        self.start = time.time()

    def state(self):
        """What a checkpoint needs to go on between two lines."""
        return [*self.sums.tolist(), self.tokens, self.steps]

    def resume(self, step, seconds, state):
        """Goes on where a run was stopped, without the lines that were written after that."""
        self.seconds = seconds
        self.sums, self.tokens, self.steps = torch.tensor(state[:2], device=self.sums.device), *state[2:]
        if RANK == 0:
            lines, kept = self.file.read_text().splitlines(keepends=True) if self.file.exists() else [], []
            for number, line in enumerate(lines, 1):
                try:
                    if line.endswith("\n") and json.loads(line)["step"] < step:
                        kept.append(line)
                except (ValueError, KeyError, TypeError):
                    raise InputError(f"{self.file}: line {number} is damaged: take it out to go on") from None
            write_text(self.file, "".join(kept))

    def write(self, step, lr, lowrank):
        plan = self.plan
        if PROCESSES > 1:
            dist.all_reduce(self.sums)
        loss, task_loss = (self.sums / self.steps).tolist()
        now = time.time()  # after the line above, which waits for the device
        self.seconds, speed = self.seconds + now - self.start, self.tokens / (now - self.start)
        entry = {"step": step, "epoch": round((step + 1) / plan.epoch_steps, 4), "loss": loss, "task_loss": task_loss, "lr": lr,
                 "density": None, "lambda": None, "orth_a": None, "orth_b": None, "tokens_per_second": round(speed, 1)}
        if lowrank:
            with torch.no_grad():
                orth_a, orth_b = lowrank.orthogonality()
                entry |= {"density": lowrank.density().item(), "orth_a": orth_a.item(), "orth_b": orth_b.item()}
                if isinstance(lowrank, sl.SaLoRA):
                    entry["lambda"] = lowrank.lam.item()
        for name in ("loss", "density", "lambda", "orth_a", "orth_b"):
            if not math.isfinite(entry[name] or 0):
                raise InputError(f"the run came apart: {name} is {entry[name]} at step {step}, or in one of the {self.steps - 1} before "
                                 f"it, with a learning rate of {lr:.3g}. Try a smaller --lr; checkpoints in {self.file.parent} are from "
                                 "before that")
        if RANK == 0:
            with self.file.open("a") as f:
                f.write(json.dumps(entry) + "\n")

        line = f"step {step + 1}/{plan.steps} loss {task_loss:.4f}"
        if plan.gated:
            line += f" density {entry['density']:.3f} lambda {entry['lambda']:.3f}"
        left = int(self.seconds / (step + 1) * (plan.steps - step - 1))
        line += f" {speed:.0f} tokens/s, {left // 60}:{left % 60:02d} left"
        if sys.stdout.isatty():
            print(f"\r{line:<100}", end="", flush=True)
        elif step * 20 // plan.steps != (step - self.steps) * 20 // plan.steps:  # a file gets 20 lines
            print(line, flush=True)
        self.sums.zero_()
        self.tokens = self.steps = 0
        self.restart_clock()


def fit(args, plan, settings, out, model, lowrank, loss_of, evaluate):
    """The training loop, which writes log.jsonl and checkpoint/ into `out`. loss_of(rows): the summed loss of some rows, given by
    their numbers; evaluate(): a pair, a list of arrays of outputs on the dev rows and {metric: value}. Returns evaluate()'s pair for
    the trained model, the scores after each epoch, and the seconds it took."""
    device, seed, steps, epoch_steps = next(model.parameters()).device, settings["seed"], plan.steps, plan.epoch_steps
    if plan.gated:
        groups = lowrank.param_groups(args.lr, args.weight_decay)
    else:
        groups = [dict(params=[p for p in model.parameters() if p.requires_grad], lr=args.lr, weight_decay=args.weight_decay)]
    optimizer = torch.optim.AdamW(groups, fused=True)  # one call for all parameters
    peaks = [group["lr"] for group in groups]

    # ---- go on where a run was stopped, or start anew
    log, step, history = Log(out, plan, device), 0, []
    saved = find_checkpoint(out) if args.resume else None
    if saved:
        progress, tensors = saved
        load_checkpoint(out, progress, tensors, optimizer, lowrank, device, settings)
        step, history = progress["step"], progress["history"]
        log.resume(step, progress["seconds"], progress["open_line"])
        print(f"resumed at step {step} of {steps}")
    else:
        if args.resume:
            print(f"{out}: no checkpoint to resume from, starting at step 0")
        if RANK == 0:
            clear_folder(out)
            log.file.write_text("")

    def checkpoint():
        if RANK == 0:
            save_checkpoint(out / "checkpoint", optimizer, lowrank, dict(
                step=step, history=history, seconds=log.seconds, settings=settings, open_line=log.state()))
        log.restart_clock()

    # ---- the loop
    log.restart_clock()
    batches, outputs, scores = None, None, None
    model.train()
    with noticed_signals() as stop:
        while step < steps:
            if batches is None or step % epoch_steps == 0:  # the order of an epoch depends on the seed and its number alone
                batches = batch_order(plan.lengths, plan.rows_per_step, np.random.default_rng([seed, step // epoch_steps]))
            batch = batches[step % epoch_steps]
            for group, peak in zip(optimizer.param_groups, peaks):
                group["lr"] = peak * lr_factor(plan, step)

            torch.manual_seed((seed * steps + step) * PROCESSES + RANK)  # of dropout: a resumed run needs no generator's state
            total = sum(plan.weights[j] for j in batch)
            share = batch[RANK::PROCESSES] or batch[:1]  # a last batch may be too small for all: one row then, which does not count
            for i in range(0, len(share), args.batch_size):
                if lowrank:
                    lowrank.begin_step()  # draws the step's gates
                part = share[i:i + args.batch_size]
                loss = loss_of(part) * ((RANK < len(batch)) / total)
                log.sums += loss.detach()
                loss = loss * PROCESSES  # average_gradients takes a mean over the processes
                if lowrank and i + args.batch_size >= len(share):
                    penalty = lowrank.penalty()  # beta R_orth + lambda (C - b)^2, once a step
                    log.sums[0] += penalty.detach() / PROCESSES
                    loss = loss + penalty
                loss.backward()
            sl.average_gradients(optimizer)
            optimizer.step()
            if lowrank:
                lowrank.end_step(optimizer)  # lambda >= 0; turns A and B where the window opens, cuts them where it closes
            optimizer.zero_grad()

            log.steps, log.tokens = log.steps + 1, log.tokens + sum(plan.lengths[j] for j in batch)
            epoch_end, save = (step + 1) % epoch_steps == 0 or step + 1 == steps, args.save_every and (step + 1) % args.save_every == 0
            if step % args.log_every == 0 or epoch_end or save:
                log.write(step, optimizer.param_groups[0]["lr"], lowrank)
            step += 1

            # ---- scores after each epoch, and a checkpoint
            if epoch_end:
                outputs, scores = finite(evaluate(), step)
                history.append(dict(step=step, epoch=round(step / epoch_steps, 4), **scores))
                line = f"epoch {step / epoch_steps:.4g}: " + ", ".join(f"{k} {v:.4f}" for k, v in scores.items())
                print(f"\r{line:<100}" if sys.stdout.isatty() else line, flush=True)
                checkpoint()
            elif save:
                checkpoint()
            if stop and step < steps:
                if PROCESSES == 1:
                    log.seconds += time.time() - log.start
                    checkpoint()
                where = "there" if PROCESSES == 1 else "the last checkpoint"
                raise Stopped(f"stopped at step {step} of {steps}; the same command with --resume --out {args.out} goes on from {where}",
                              stop[0])

        if outputs is None:  # stopped between the last step and here, or no step at all
            outputs, scores = finite(evaluate(), step)
            history = history or [dict(step=0, epoch=0.0, **scores)]
        if stop:  # while the last epoch was scored
            raise Stopped(f"stopped after step {step} of {steps}; the same command with --resume --out {args.out} goes on", stop[0])
    return outputs, scores, history, log.seconds


def finite(evaluated, step):
    """What evaluate() gave, unless the model came apart since the last line of the log."""
    if not all(np.isfinite(values).all() for values in evaluated[0]):
        raise InputError("the model's outputs on the dev rows are not all finite numbers "
                         + (f"after {step} steps: try a smaller --lr" if step else "before any training: --model or --adapter is damaged"))
    return evaluated


def count_trainable(model, head_params=0):
    return sum(p.numel() for p in model.parameters() if p.requires_grad) - head_params


def common_result(args, plan, settings, model, lowrank, trainable_params, head_params, history, seconds):
    """What every result.json holds besides task and scores. trainable_params: at the start."""
    kept_params = count_trainable(model, head_params)
    return dict(
        trainable_params=trainable_params, kept_params=kept_params, head_params=head_params,
        budget=budget_of(args), density=lowrank.final_density if lowrank else None,
        kept_density=kept_params / max(trainable_params, 1), ranks=sl.ranks(model), steps=plan.steps, seconds=round(seconds, 2),
        examples_per_second=round(len(plan.lengths) * plan.steps / plan.epoch_steps / seconds, 1) if seconds else None,
        peak_memory_mb=round(peak_memory_mb(next(model.parameters()).device), 1), history=history, settings=settings)


def budget_of(args):
    """The share of parameters that a run steers to, or None."""
    return args.budget if args.method in ("salora", "lora-svd", "adalora") and args.price is None else None


def load_adapter(model, folder):
    """adapter.load, with what is wrong with the folder as an InputError."""
    try:
        return adapter.load(model, folder)
    except (OSError, ValueError, SafetensorError) as e:
        raise InputError(f"--adapter {folder}: {str(e).removeprefix(f'{folder}: ')}") from None


def report_ranks(args, result, linears, at):
    """The budget and the rank map, for a person. linears: {letter: name of the module}; at: where in a path the layer's number is."""
    if args.method in ("salora", "lora-svd") and result["steps"]:
        goal = f"budget {args.budget:.4g}" if args.price is None else f"price {args.price:.4g}"
        gates = f"the gates came to a density of {result['density']:.3f}; " if args.method == "salora" else ""
        print(f"{goal}: {gates}kept {result['kept_params']:,} of {result['trainable_params']:,} adapter parameters "
              f"({100 * result['kept_density']:.2f} %)")
    if result["ranks"]:
        letters = {name: letter for letter, name in linears.items()}
        table = {}
        for path, rank in result["ranks"].items():
            layer, name = path.split(".", at + 1)[at:]
            table[f"{layer}.W^{letters[name].upper()}"] = rank
        r = result["settings"]["r"]
        print(f"\nrank of each matrix, from {r} at the start: layers left to right\n\n{sl.rank_map(table, r)}")


def peak_memory_mb(device):
    """Of the GPU, or of the whole process, since the run began."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


# ---------------------------------------------------------------------------------------------------------------------
# folders of runs


def make_folder(out):
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise InputError(f"--out {out}: cannot be written ({e.strerror})") from None


def clear_folder(out):
    """Removes the files of an earlier run."""
    if (out / "adapter").exists() and not any((out / name).exists() for name in ("result.json", "log.jsonl", "checkpoint")):
        raise InputError(f"--out {out}: has an adapter/ which is not of a run; give another folder")
    try:
        for name in ("result.json", "log.jsonl", "predictions.tsv", "predictions_mismatched.tsv"):
            (out / name).unlink(missing_ok=True)
        for name in ("adapter", "checkpoint", "checkpoint.previous", "checkpoint.new"):
            shutil.rmtree(out / name, ignore_errors=True)
    except OSError as e:
        raise InputError(f"--out {out}: cannot be written ({e.strerror})") from None


def free_folder(stem):
    """stem, or stem-2, stem-3 .. if it is taken."""
    number = 1
    while (folder := Path(stem if number == 1 else f"{stem}-{number}")).exists():
        number += 1
    return folder


def refuse_taken(args, out):
    """Unless flags say otherwise, no run is replaced: neither one that is finished nor one that could go on."""
    if (out / "result.json").exists() and not args.overwrite:
        raise InputError(f"--out {out} holds a finished run: give another folder, or --overwrite")
    if any((out / name).exists() for name in CHECKPOINTS) and not (args.overwrite or args.resume):
        raise InputError(f"--out {out} holds a run that did not finish: --resume goes on with it, --overwrite replaces it")


def read_result(out):
    """result.json of a run's folder, or None if there is none."""
    file = Path(out) / "result.json"
    if not file.exists():
        return None
    result = read_json(file)
    if not isinstance(result.get("settings"), dict) or not isinstance(result.get("score"), float):
        raise InputError(f"{file}: has no settings or no score, so it is not of a run")
    return result


def finished(args, out):
    """The result of a finished run of the same flags in `out`, or None."""
    result = read_result(out)
    if result is None:
        return None
    for name, value in vars(args).items():
        found = result["settings"].get(name, value)
        if found != value and (value is not None or name not in RESOLVED_LATER) and name not in (*NOT_OF_A_RUN, *MAY_CHANGE, "seed"):
            raise InputError(f"--out {out} holds a finished run with {flag(name)} {found}, not {value}: give another folder")
    return result


def run(args, seed, out, train, report):
    """train(args, seed, out), unless --resume finds it done, and report(args, result, out); returns the result (in the first process)."""
    if args.adapter and out.resolve() in Path(args.adapter).resolve().parents:
        raise InputError(f"--out {out}: --adapter lies in it and would be overwritten; give another folder")
    result = finished(args, out) if args.resume else None
    if result:
        need(result.get("seed") == seed, f"--out {out} holds a finished run; its --seed", result.get("seed"),
             f"{seed}: give another folder")
        print(f"{out}: finished already")
    else:
        result = train(args, seed, out)
        if RANK == 0:
            report(args, result, out)
    return result


def choose_lr(args, root, train, report):
    """The learning rate of --lr-grid with the best score on rows held out of training, in a run of its own seed."""
    scores = {}
    for lr in args.lr_grid:
        trial = argparse.Namespace(**vars(args) | dict(lr=lr, hold_out=args.hold_out or 0.2))
        result = run(trial, TUNING_SEED, root / f"lr{lr:g}", train, report)
        scores[lr] = result["score"] if result else 0.0
    if PROCESSES > 1:  # the first process knows the scores
        dist.broadcast_object_list(box := [scores])
        scores = box[0]
    best = max(scores, key=scores.get)
    print(f"\nlearning rate {best:g}, on held-out rows: " + ", ".join(f"{lr:g}: {score:.4f}" for lr, score in scores.items()))
    return best


def run_all(args, root, train, report):
    """The run, or the runs of --seeds, after the choice of --lr-grid; their results (in the first process)."""
    args.out = root  # also where the flag was not given
    if args.threads:
        torch.set_num_threads(args.threads)
    if PROCESSES > 1:
        dist.init_process_group("nccl" if args.device == "cuda" else "gloo")
    runs = [(args.seed, root)] if args.seeds is None else [(seed, root / f"seed{seed}") for seed in args.seeds]
    grid = getattr(args, "lr_grid", None) or []
    if not args.resume:  # all of them, before the first takes its hours
        for out in [root / f"lr{lr:g}" for lr in grid] + [out for _, out in runs]:
            if out.exists():
                with own_folder(args, out):
                    pass
    if grid:
        args.lr = choose_lr(args, root, train, report)
        args.hold_out = None
    results = [run(args, seed, out, train, report) for seed, out in runs]
    if args.seeds is not None and RANK == 0:
        scores = [r["score"] for r in results]
        summary = dict(metric=results[0]["metric"], seeds=args.seeds, scores=scores, mean=statistics.mean(scores),
                       std=statistics.stdev(scores) if len(scores) > 1 else 0.0)
        write_text(root / "summary.json", json.dumps(summary, indent=1) + "\n")
        print(f"\n{summary['metric']} over seeds {' '.join(map(str, args.seeds))}: {summary['mean']:.4f} ± {summary['std']:.4f} "
              f"({' '.join(f'{s:.4f}' for s in scores)}); {root}/summary.json")
    return results


def command(main, argv):
    """main(argv) as a shell sees it: bad input is one line on stderr and exit status 2."""
    if RANK:
        sys.stdout = open(os.devnull, "w")  # the first process speaks for all
        warnings.simplefilter("ignore")
    warnings.formatwarning = lambda message, *rest: f"warning: {message}\n"
    if isinstance(sys.stdout, io.TextIOWrapper):  # what a notebook has is none
        sys.stdout.reconfigure(errors="replace")  # for a terminal that knows nothing but ASCII
    try:
        main(sys.argv[1:] if argv is None else argv)
    except InputError as e:
        sys.exit(fail(e))
    except Stopped as e:
        fail(e.args[0])
        sys.exit(128 + e.args[1])
    except KeyboardInterrupt:
        fail("stopped")
        sys.exit(128 + signal.SIGINT)
    except (OSError, SafetensorError) as e:
        where = f"{e.filename}: {e.strerror}" if isinstance(e, OSError) and e.filename else e
        sys.exit(fail(f"{where}; what was saved before is still there, and where a checkpoint was, --resume goes on from it"))
    except (MemoryError, RuntimeError) as e:  # torch.OutOfMemoryError is one; a CPU's is told by its words alone
        if not isinstance(e, (MemoryError, torch.OutOfMemoryError)) and "allocate memory" not in str(e):
            raise
        sys.exit(fail("out of memory. What helps: a smaller --batch-size with --accumulate, --checkpoint-activations, --dtype bfloat16, "
                      "a smaller --max-length"))
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
