"""
The folders of runs: checkpoints, resuming, several seeds, choosing the learning rate.
"""

import argparse
import contextlib
import io
import json
import math
import os
import shlex
import shutil
import signal
import statistics
import sys
import warnings
import zlib
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from data import InputError, locked, need, sync
from model import read_json
from training import flags
from training.device import PROCESSES, RANK, join_processes
from training.flags import fail, flag, in_words

TUNING_SEED = 100  # of the runs of --lr-grid
CHECKPOINT = "checkpoint.safetensors"


@contextlib.contextmanager
def replacing(file):
    """A path to write to, which then replaces the file: a kill or a power cut leaves the old file
    or the new one, never a part."""
    beside = file.with_name(file.name + ".new")
    try:
        yield beside
        sync(beside)
        os.replace(beside, file)
    except (OSError, SafetensorError):
        beside.unlink(missing_ok=True)
        raise


def write_text(file, text):
    with replacing(file) as beside:
        beside.write_text(text, encoding="utf-8", errors="backslashreplace")


def write_json(file, value):
    write_text(file, json.dumps(value, indent=1) + "\n")


def markdown(head, rows):
    """A Markdown table."""
    rows = (head, ["---"] * len(head), *rows)
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in rows) + "\n"


def save_checkpoint(file, optimizer, lowrank, progress):
    """Writes all that a run needs to resume into one safetensors file, which cannot hold code:
    tensors, and `progress` as JSON in its header."""
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    tensors = {f"param.{i}": p.detach() for i, p in enumerate(trained)}
    for i, p in enumerate(trained):
        state = optimizer.state.get(p, {})
        tensors |= {f"state.{i}.{name}": value for name, value in state.items()}
    progress["method"] = {}
    for name, value in (lowrank.state_dict() if lowrank else {}).items():
        if torch.is_tensor(value):
            tensors[f"method.{name}"] = value
        else:
            progress["method"][name] = value
    tensors = {name: value.contiguous() for name, value in tensors.items()}
    with replacing(file) as beside:
        save_file(tensors, beside, dict(progress=json.dumps(progress)))
        shutil.copymode(file.with_name("log.jsonl"), beside)  # save_file makes it private
    sync(file.parent)


def source_of(plan, model):
    """A checksum by which --resume notices other rows or another base model: of the length of each
    row and the first weights, the embedding."""
    weights = next(model.parameters()).detach().cpu().view(torch.uint8).numpy()
    return zlib.crc32(repr((plan.steps, plan.lengths)).encode(), zlib.crc32(weights))


def load_checkpoint(file, optimizer, lowrank, settings, matrices, source):
    """The inverse of save_checkpoint; returns progress. matrices, {path: [rank, scale]} of the
    adapters at the start, and source_of() show whether files have changed since."""
    try:
        with safe_open(file, "pt") as f:
            progress = json.loads((f.metadata() or {})["progress"])
            tensors = {name: f.get_tensor(name) for name in f.keys()}
    except (OSError, SafetensorError, ValueError, KeyError) as e:
        raise InputError(f"--resume: {file} is damaged ({e}): --overwrite without --resume starts "
                         "over") from None
    before, given = progress["settings"], settings["adapter"]
    if given and before.get("adapter") == given and progress.get("matrices", matrices) != matrices:
        raise InputError(f"--resume: --adapter {given} has other matrices, ranks or scales than "
                         f"when {file} was written: restore it")
    changed = [name for name, value in settings.items()
               if before.get(name) != value and name not in flags.MAY_CHANGE]
    changed.sort(key="gate_lr".__eq__)  # last: its default depends on the steps
    if changed in ([], ["gate_lr"]):  # with other flags the rows may differ
        need(progress.get("source", source) == source, "--resume: what --task, --data and --model "
             "name", "changed", f"what it was when {file} was written; or start over with "
             "--overwrite")
    if changed:
        name = changed[0]
        raise InputError(f"--resume: {flag(name)} is {in_words(settings[name])}, but {file} was "
                         f"written with {in_words(before.get(name))}: give the run's own flags")
    if lowrank:
        state = {name.removeprefix("method."): value for name, value in tensors.items()
                 if name.startswith("method.")}
        try:
            lowrank.load_state_dict(progress["method"] | state)
        except KeyError as e:
            raise InputError(f"--resume: {file} has no {e}, so another version wrote it: start "
                             "over") from None
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    for name, value in tensors.items():
        kind, *rest = name.split(".")
        if kind in ("param", "state"):
            p = trained[int(rest[0])]
            value = value.to(p.device, copy=True)  # another alignment may change the last bits
            if kind == "param":
                p.data = value
            else:
                optimizer.state[p][rest[1]] = value
    return progress


@contextlib.contextmanager
def own_folder(args, out):
    """Makes the folder of a run and keeps other processes out of it until the run ends."""
    if RANK:
        yield
        return
    new = not out.exists()
    make_folder(out)
    with contextlib.ExitStack() as held:
        try:
            held.enter_context(locked(out, wait=False))
        except BlockingIOError:
            raise InputError(f"--out {out}: another run is writing into it; give another folder, "
                             "or wait") from None
        refuse_taken(args, out)  # another process may have finished in the meantime
        try:
            yield
        except InputError as e:
            saved = (out / CHECKPOINT).exists() or isinstance(e, Diverged)
            if new and not saved:  # bad input leaves nothing behind
                shutil.rmtree(out, ignore_errors=True)
            raise


def make_folder(out):
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise InputError(f"--out {out}: cannot be written ({e.strerror})") from None


def clear_folder(out):
    """Removes the files of an earlier run; last log.jsonl, which shows that there was one."""
    names = ("result.json", "report.html", "gates.jsonl", "predictions.tsv",
             "predictions_mismatched.tsv", CHECKPOINT, "log.jsonl")
    folders = ("adapter", "checkpoint")  # checkpoint: of earlier versions
    if not any((out / name).exists() for name in ("result.json", CHECKPOINT, "log.jsonl")):
        for name in (*folders, *names):
            if (out / name).exists():
                raise InputError(f"--out {out}: its {name} is not of a run; give another folder")
    try:
        for name in folders:
            shutil.rmtree(out / name, ignore_errors=True)
        for name in names:
            (out / name).unlink(missing_ok=True)
    except OSError as e:
        raise InputError(f"--out {out}: cannot be written ({e.strerror})") from None


def out_folder(args, name):
    """--out, else runs/name; if that exists, runs/name-2, name-3 .. (not with --overwrite)."""
    if args.out:
        return Path(args.out)
    out, number = Path(f"runs/{name}"), 2
    while out.exists() and not getattr(args, "overwrite", False):
        out, number = Path(f"runs/{name}-{number}"), number + 1
    return out


def refuse_taken(args, out):
    """InputError: a run, finished or not, would be replaced without a flag that says so."""
    if (out / "result.json").exists() and not args.overwrite:
        raise InputError(f"--out {out} holds a finished run: give another folder, or --overwrite")
    if (out / "checkpoint").is_dir() and not args.overwrite:
        raise InputError(f"--out {out}: another version wrote its checkpoint/, which cannot be "
                         "resumed: give another folder, or --overwrite to start anew")
    if (out / CHECKPOINT).exists() and not (args.overwrite or args.resume):
        raise InputError(f"--out {out} holds a run that did not finish: --resume goes on with it, "
                         "--overwrite replaces it")


def read_result(out):
    """result.json of a run's folder, or None if there is none."""
    file = Path(out) / "result.json"
    if not file.exists():
        return None
    result = read_json(file)
    score = result.get("score")
    if not isinstance(result.get("settings"), dict) or not isinstance(score, float):
        raise InputError(f"{file}: has no settings or no score, so no run wrote it")
    return result


def finished(args, out):
    """The result of a finished run of the same flags in `out`, or None."""
    result = read_result(out)
    if result is None:
        return None
    given = [word.partition("=")[0] for word in shlex.split(result.get("command") or "")]
    for name, value in vars(args).items():
        found = result["settings"].get(name, value)
        if value is None and name in flags.RESOLVED_LATER and flag(name) not in given:
            continue
        if found != value and name not in (*flags.NOT_OF_A_RUN, *flags.MAY_CHANGE, "seed"):
            raise InputError(f"--out {out} holds a finished run with {flag(name)} "
                             f"{in_words(found)}, not "
                             f"{'the default' if value is None else in_words(value)}: give another "
                             "folder")
    return result


def run(args, seed, out, train, report):
    """Calls train(args, seed, out) and report(args, result, out), unless --resume finds the run
    finished. Returns the result (None if RANK > 0)."""
    if args.adapter and out.resolve() in Path(args.adapter).resolve().parents:
        raise InputError(f"--out {out}: --adapter lies in it and would be overwritten; give "
                         "another folder")
    result = finished(args, out) if args.resume else None
    if result:
        need(result.get("seed") == seed, f"--out {out} holds a finished run; its --seed",
             result.get("seed"), f"{seed}: give another folder")
        print(f"{out}: finished already")
        return result
    result = train(args, seed, out)
    if RANK == 0:
        report(args, result, out)
    return result


class Diverged(InputError):
    """A smaller learning rate may help."""


def mean_std(values):
    values = list(values)
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def choose_lr(args, root, train, report):
    """The learning rate of --lr-grid with the best score on rows held out of training."""
    scores = {}
    for lr in args.lr_grid:
        trial = argparse.Namespace(**vars(args) | dict(lr=lr, hold_out=args.hold_out or 0.2))
        try:
            result = run(trial, TUNING_SEED, root / f"lr{lr:g}", train, report)
            scores[lr] = result["score"] if result else 0.0
        except Diverged as e:
            print(f"learning rate {lr:g}: {e}")
            scores[lr] = -math.inf
    if max(scores.values()) == -math.inf:
        raise Diverged("--lr-grid: training diverged with every rate: give smaller ones")
    if PROCESSES > 1:  # the first process knows the scores
        dist.broadcast_object_list(box := [scores])
        scores = box[0]
    best = max(scores, key=scores.get)
    table = ", ".join(f"{lr:g}: {score:.4f}" for lr, score in scores.items())
    print(f"\nlearning rate {best:g}, on held-out rows: {table}")
    return best


def run_all(args, name, train, report):
    """Tries the rates of --lr-grid, then does the run or those of --seeds, on data named `name`."""
    root = args.out = out_folder(args, f"{name}-{args.method}")
    if args.threads:
        torch.set_num_threads(args.threads)
    join_processes(args)
    seeds = args.seeds
    runs = [(args.seed, root)] if seeds is None else [(s, root / f"seed{s}") for s in seeds]
    grid, summary = getattr(args, "lr_grid", None) or [], root / "summary.json"
    other = summary if seeds is None else root / "result.json"
    need(not other.exists(), f"--out {root}: its content", f"a {other.name}",
         "none: a run and several --seeds need different folders")
    if summary.exists() and not args.resume:
        need(args.overwrite, f"--out {root}: its content", "a summary.json of earlier --seeds",
             "--resume to go on with them, --overwrite to replace them, or another folder")
        if RANK == 0:
            summary.unlink(missing_ok=True)  # so that it is not left if a run fails
    if not args.resume:  # check all folders before the first run takes hours
        for out in [root / f"lr{lr:g}" for lr in grid] + [out for _, out in runs]:
            if out.exists():
                with own_folder(args, out):
                    pass
    if grid:
        args.lr = choose_lr(args, root, train, report)
        args.hold_out = None
    results = [run(args, seed, out, train, report) for seed, out in runs]
    if seeds is not None and RANK == 0:
        scores = [r["score"] for r in results]
        mean, std = mean_std(scores)
        metric = results[0]["metric"]
        write_json(summary, dict(metric=metric, seeds=seeds, scores=scores, mean=mean, std=std))
        print(f"\n{metric} over seeds {' '.join(map(str, seeds))}: {mean:.4f} ± {std:.4f} "
              f"({' '.join(f'{score:.4f}' for score in scores)}); {summary}")


class Stopped(Exception):
    """A signal ended the run, which is saved. args: the line to print, the signal's number."""


def command_line(script, argv):
    """The command of a run, for its result.json."""
    start = "python" if PROCESSES == 1 else f"torchrun --nproc-per-node {PROCESSES}"
    return f"{start} {script} {shlex.join(argv)}".strip()


def run_command(main, argv):
    """main(argv) as a command: bad input is one line on stderr and exit status 2."""
    if RANK:
        sys.stdout = open(os.devnull, "w")  # the first process speaks for all
        warnings.simplefilter("ignore")
    warnings.formatwarning = lambda message, *rest: f"warning: {message}\n"
    if sys.stdout is None:  # closed
        sys.stdout = open(os.devnull, "w")
    if isinstance(sys.stdout, io.TextIOWrapper):  # not in a notebook
        sys.stdout.reconfigure(errors="replace")  # for a terminal that prints only ASCII
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
    except BrokenPipeError:  # the reader has quit, as with | head
        sys.stdout = open(os.devnull, "w")  # for the rest of its buffer
        sys.exit(128 + signal.SIGPIPE)
    except (OSError, SafetensorError) as e:
        where = f"{e.filename}: {e.strerror}" if isinstance(e, OSError) and e.filename else e
        sys.exit(fail(f"{where}; files saved earlier are intact, and if there is a checkpoint, "
                      "--resume goes on from it"))
    except (MemoryError, RuntimeError) as e:  # on a CPU torch raises a plain RuntimeError
        memory = isinstance(e, (MemoryError, torch.OutOfMemoryError))
        if not memory and "allocate memory" not in str(e):
            raise
        sys.exit(fail("out of memory. What helps: a smaller --batch-size with --accumulate, "
                      "--checkpoint-activations, --dtype bfloat16, a smaller --max-length"))
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
