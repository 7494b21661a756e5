"""
The flags of train_glue.py and train_instruct.py, their defaults and checks; errors of one line.
"""

import argparse
import os
import sys

import torch

import baselines
import salora as sl
from data import InputError

RANK, PROCESSES = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # as torchrun sets them
LARGEST = 2**31  # no number that a flag takes comes near it
NOT_OF_A_RUN = ("out", "resume", "overwrite", "seeds", "lr_grid")  # flags that are no settings of a single run
MAY_CHANGE = ("threads", "log_every", "save_every")  # flags that --resume may change
RESOLVED_LATER = ("epochs", "max_length", "selection", "gate_lr", "lr", "r", "dtype")  # flags for which None means: what the run takes
RECIPES = {  # what the two recipes set, unless a flag says otherwise
    "default": dict(beta=0.0, orth_reduction="mean", window=(0.4, 0.5), gate_lr=None, turn=True, selection=None, fold_gates=False,
                    rewarm=True),
    "paper": sl.PAPER | dict(rewarm=False),
}


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
