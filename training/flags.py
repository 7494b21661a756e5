"""
Flags that train_glue.py and train_instruct.py share: their defaults, checks and error messages.
"""

import argparse
import sys

import torch
from safetensors import SafetensorError

import adapter
import baselines
import salora as sl
from data import InputError, need
from training.device import LOCAL_RANK, find_device, own_device

LARGEST = 2**31  # above any sensible number
# not a setting of a single run
NOT_OF_A_RUN = ("out", "resume", "overwrite", "seeds", "lr_grid", "command", "idle")
MAY_CHANGE = ("threads", "log_every", "save_every")  # with --resume
RESOLVED_LATER = ("epochs", "max_length", "selection", "gate_lr", "lr", "r", "dtype")  # None: unset
CUT = ("salora", "lora-svd", "adalora")  # the methods whose ranks fall
LOW_RANK = ("salora", "lora", "lora-svd", "adalora")
METHODS_OF = {  # the methods that a flag applies to
    **dict.fromkeys(("r", "alpha", "targets", "layers"), LOW_RANK), "budget": CUT,
    **dict.fromkeys(("gate_lr", "orth_reduction", "turn", "selection", "fold_gates"), ("salora",)),
    "recipe": ("salora", "lora-svd"), "beta": ("salora", "adalora"),
    "bottleneck": ("adapter-h", "adapter-p"), "virtual_tokens": ("prefix", "prompt")}
WINDOWS = {"adalora": [0.2, 0.5], "lora-svd": [0.4, 0.5]}  # others: RECIPES
RECIPES = {  # what a recipe sets unless a flag says otherwise
    "default": dict(beta=0.0, orth_reduction="mean", window=(0.5, 0.6), gate_lr=None, turn=True,
                    selection=None, fold_gates=False, rewarm=True),
    "paper": sl.PAPER | dict(rewarm=False),
}


def new_parser(description, **kw):
    """An ArgumentParser that keeps the line breaks of its description and prints errors in one
    line."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter, **kw)
    parser.error = lambda message: sys.exit(fail(message))
    parser.register("type", None, not_empty)  # as in --out "$UNSET"
    return parser


def not_empty(text):
    if not text:
        raise argparse.ArgumentTypeError("empty, expected a value: give one, or leave the flag out")
    return text


def flag_group(parser, title):
    """The add_argument of a new group; it appends the default to the help."""
    add = parser.add_argument_group(title).add_argument

    def arg(*names, help, **kw):
        add(*names, **kw, help=f"{help} (default: %(default)s)" if "default" in kw else help)

    return arg


def main_flags(arg, methods, epochs, batch_size, lr, out):
    """What most runs need. `epochs`, `lr`, `out`: the defaults in words."""
    arg("--method", choices=methods, default="salora", metavar="METHOD",
        help=f"salora, or a method to compare it with: {', '.join(methods[1:])}; see baselines.py")
    arg("--r", type=int, help="initial rank (default: 8)")
    arg("--budget", type=float, default=0.5,
        help="share b of the adapter parameters to keep (adalora: of the triplets)")
    arg("--epochs", type=float, help=f"passes over the training rows (default: {epochs})")
    arg("--batch-size", type=int, default=batch_size, help="rows per forward pass and process")
    arg("--lr", type=float, help=f"learning rate of the weights (default: {lr})")
    arg("--out", help=f"folder of the run (default: {out}, numbered if that exists)")


def method_flags(parser, letters):
    arg = flag_group(parser, "method")
    arg("--adapter", metavar="DIR",
        help="start from this LoRA adapter, saved by this project or by PEFT, which sets --r, "
        "--alpha, --targets and --layers; --epochs 0 only scores it (default: a new one)")
    arg("--alpha", type=float, help="the update is scaled by alpha/r (default: r, a scale of 1; "
        f"adalora {baselines.AdaLoRA.SCALE} r)")
    arg("--ranks", metavar="FILE",
        help="for lora: a rank for each matrix (0: not adapted), from a run's result.json, an "
        "adapter's folder, or JSON of {module path: rank}. The scale stays alpha / r: give the "
        "--r of the run that found the ranks (default: --r for every matrix)")
    more = ", and W^G if named" if "g" in letters else ""
    arg("--lora-dropout", type=float, default=0.0, metavar="P",
        help="share of the inputs of each adapter that are zeroed in training")
    arg("--targets", nargs="+", choices=list(letters),
        help=f"matrices to adapt: W^Q W^K W^V W^O W^U W^D{more} (default: q k v o u d)")
    arg("--layers", type=int, nargs="+", help="layers to adapt, from 0 (default: all)")
    arg("--beta", type=float,
        help="weight of the orthogonal regularizer (default: 0; adalora 0.1)")
    arg("--window", type=float, nargs=2, metavar=("START", "END"),
        help="fractions of the run between which gates are learned (default: 0.5 0.6); adalora's "
        "budget falls there (0.2 0.5), and lora-svd cuts at END (0.4 0.5)")
    arg("--recipe", choices=list(RECIPES), default="default",
        help="paper: as published, --beta 0.1 --orth-reduction sum --window 0.2 0.5 "
        "--gate-lr 0.01 --no-turn --selection paper --fold-gates --no-rewarm")
    arg("--orth-reduction", choices=["mean", "sum"],
        help="mean or sum of the regularizer over the matrices (default: mean)")
    arg("--selection", choices=["budget", "paper"], help="budget: keep what fits the budget; "
        "paper: keep gates above 0 (default: budget; with --price: paper)")
    arg("--turn", action=argparse.BooleanOptionalAction,
        help="when the window opens, turn A and B into the singular directions of BA and start "
        "the gates from the singular values (default: yes)")
    arg("--fold-gates", action=argparse.BooleanOptionalAction,
        help="multiply kept gates into B instead of setting them to 1 (default: no)")
    arg("--gate-lr", type=float, help="learning rate of log theta and lambda (default: "
        "8 / steps of the window; lambda three times that)")
    arg("--price", type=float, metavar="LAMBDA",
        help="eq. 10: a constant price per open gate instead of a budget (default: off)")


def machine_flags(parser, dtype=None):
    """`dtype`: the default of --dtype, in words; None: no --dtype."""
    arg = flag_group(parser, "machine")
    arg("--device", default="auto", help="auto, cpu, cuda or cuda:i")
    arg("--no-tf32", dest="tf32", action="store_false", help="on a GPU, multiply float32 matrices "
        "in full precision; the default, TensorFloat-32, is several times as fast and keeps 10 "
        "bits of each factor's mantissa")
    if dtype:
        arg("--dtype", choices=["float32", "bfloat16"],
            help=f"of the frozen weights; trained ones are float32 (default: {dtype})")
    arg("--threads", type=int, help="CPU threads (default: torch's choice; 1 to train the demo, "
        "whose tensors are small)")
    return arg


def run_flags(parser, dtype):
    """Optimization, machine and output; `dtype`: the default in words."""
    arg = flag_group(parser, "optimization")
    arg("--max-steps", type=int, help="stop after this many steps (default: no limit)")
    arg("--accumulate", type=int, default=1, help="forward passes per step")
    arg("--warmup", type=float, default=0.06, help="share of the steps in which the learning "
        "rate rises, before it falls linearly to 0")
    arg("--rewarm", action=argparse.BooleanOptionalAction,
        help="restart the learning rate at --lr after the window, when the adapter has been cut "
        "(default: yes for salora and lora-svd)")
    arg("--weight-decay", type=float, default=0.01, help="of the weights; gates have none")
    arg("--seed", type=int, default=0,
        help="of head and adapter weights, order of rows, dropout and gates")
    arg("--seeds", type=int, nargs="+", help="a run for each, in --out/seed0 .., with their mean "
        "and standard deviation (default: one run, with --seed)")

    arg = machine_flags(parser, dtype)
    arg("--compile", action="store_true", default=False, help="use torch.compile")
    arg("--checkpoint-activations", action="store_true", default=False,
        help="recompute activations in the backward pass: less memory, more time")

    arg = flag_group(parser, "output")
    arg("--resume", action="store_true", default=False, help="continue the run in --out")
    arg("--overwrite", action="store_true", default=False, help="replace the run in "
        "--out, or in its default folder")
    arg("--log-every", type=int, default=10, help="steps between the lines of log.jsonl")
    arg("--save-every", type=int, metavar="N", help="also write a checkpoint every N steps "
        "(default: only after each epoch, and on Ctrl-C or SIGTERM)")


def idle(args, parser):
    """The given flags that have no effect with the method, for announce()."""
    return [flag(name) for name, methods in METHODS_OF.items() if args.method not in methods
            and getattr(args, name, None) != parser.get_default(name)]


def settle(args):
    """Fills in what the recipe decides, then checks."""
    adalora = args.method == "adalora"
    fill_in(args, window=WINDOWS.get(args.method), beta=0.1 if adalora else None,
            rewarm=None if args.method in ("salora", "lora-svd") else False)
    fill_in(args, **RECIPES[args.recipe])
    args.window = list(args.window)  # as JSON would load it
    if args.adapter is None:
        fill_in(args, r=8, targets=list("qkvoud") if args.ranks is None else None)
        fill_in(args, alpha=float(args.r * (baselines.AdaLoRA.SCALE if adalora else 1)))
    check(args)
    if args.ranks is not None:  # not the file, which may change before --resume
        args.ranks = read_ranks(args.ranks, args.r)


def read_ranks(file, r):
    """adapter.read_ranks. InputError: as there, or a rank is above r."""
    try:
        ranks = adapter.read_ranks(file)
    except (ValueError, SafetensorError) as e:
        raise InputError(f"--ranks {file}: {str(e).removeprefix(f'{file}: ')}") from None
    path = max(ranks, key=ranks.get)
    need(ranks[path] <= r, f"--ranks {file}: the rank of {path}", ranks[path],
         f"0 to {r}: give the --r of the run that found it")
    return ranks


def fill_in(args, **values):
    """Sets what is still None."""
    for name, value in values.items():
        if getattr(args, name) is None:
            setattr(args, name, value)


def check(args):
    """Refuses flags that are wrong for any model and data."""
    need(args.adapter is None or args.method in ("lora", "salora"), "--adapter", "given",
         f"no adapter with --method {args.method}; lora and salora can start from one")
    for name in ("r", "alpha", "targets", "layers"):
        need(args.adapter is None or getattr(args, name) is None, flag(name), "given",
             "none with --adapter, which has its own")
    for name in ("adapter", "targets", "layers"):
        need(args.ranks is None or getattr(args, name) is None, flag(name), "given",
             "none with --ranks, which says what to adapt")
    need(args.ranks is None or args.method == "lora", "--ranks", "given",
         f"none with --method {args.method}: it is for --method lora")

    need(0 <= args.lora_dropout < 1, "--lora-dropout", args.lora_dropout, "a share in [0, 1)")
    need(args.price is None or args.method == "salora" and args.selection != "budget", "--price",
         args.price, "none: it replaces the budget of --method salora")
    need(not args.lora_dropout or args.method in LOW_RANK, "--lora-dropout", args.lora_dropout,
         f"none with --method {args.method}, which has no low-rank adapters")
    need(0 < args.budget <= 1, "--budget", args.budget, "a share in (0, 1]")
    start, end = args.window
    need(0 <= start < end <= 1, "--window", f"{start} {end}",
         "two fractions of the run, 0 <= START < END <= 1")
    at_least(args, 1, "r", "batch_size", "accumulate", "log_every", "save_every", "max_steps",
             "threads", "limit_train", "limit_dev")
    at_least(args, 8, "max_length")
    at_least(args, 0, "seed", "beta", "weight_decay", "price")
    for name in ("lr", "gate_lr", "alpha", "epochs", "hold_out"):
        value, hint = getattr(args, name), ""
        ok = value is None or 0 < value < LARGEST
        if name == "epochs":
            ok = ok or value == 0 and (args.adapter or args.method == "head")
            hint = ", or 0 with --adapter or --method head, to score what is there"
        need(ok, flag(name), value, f"a positive number, below {LARGEST}{hint}")
    need(0 <= args.warmup < 1, "--warmup", args.warmup, "a share in [0, 1)")
    different(args, "seeds", "layers")
    targets = args.targets or []
    need(len(set(targets)) == len(targets), "--targets", " ".join(targets), "each letter once")
    need(not args.seeds or args.seed == 0, "--seed", args.seed, "none with --seeds")
    need(not (args.resume and args.overwrite), "--overwrite", "given", "none with --resume")
    need(not args.resume or args.out, "--resume", "given without --out",
         "the --out of the run to continue")
    find_device(args)


def use_machine(args):
    """The device of a command that does not train; applies --threads."""
    at_least(args, 1, "threads")
    if args.threads:
        torch.set_num_threads(args.threads)
    find_device(args)
    return own_device(args)


def at_least(args, least, *names):
    for name in names:
        value = getattr(args, name)
        ok = value is None or least <= value < LARGEST
        need(ok, flag(name), value, f"at least {least}, below {LARGEST}")


def different(args, *names):
    for name in names:
        numbers = getattr(args, name) or []
        need(all(0 <= n < LARGEST for n in numbers) and len(set(numbers)) == len(numbers),
             flag(name), numbers, f"different numbers from 0, below {LARGEST}")


def flag(name):
    return "--" + name.replace("_", "-")


def in_words(value):
    """A setting as text; of --ranks only the numbers."""
    if isinstance(value, dict):
        value = list(value.values())
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def check_sizes(args, config):
    """Refuses ranks and layers that the model does not have."""
    if (args.r or 0) > config.narrowest and args.method in LOW_RANK:
        raise InputError(f"--r is {args.r}, but the narrowest matrix of {args.model} allows a rank "
                         f"of 1 to {config.narrowest}")
    most = config.num_hidden_layers - 1
    if max(args.layers or [0]) > most:
        raise InputError(f"--layers has {max(args.layers)}, but {args.model} has layers 0 to "
                         f"{most}")


def fail(message):
    if LOCAL_RANK == 0:  # once per machine
        print(f"error: {message}", file=sys.stderr)
    return 2
