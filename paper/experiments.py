"""
The experiments of the paper, one command each. It prints a table and writes to --out: table.md,
runs.csv, runs.jsonl (all results) and, with matplotlib, pictures.

    python train_glue.py table1      methods by tasks (Table 1)
    python train_glue.py ablation    the whole method, a constant price per gate instead of a
                                     budget, no turn into singular directions (Table 3)
    python train_glue.py efficiency  peak memory and time of a step, by batch size (Table 4)
    python train_glue.py ranks       the ranks that SaLoRA keeps (Figure 7); LoRA on one kind of
                                     matrix or one group of layers alone (Figure 1)
    python train_glue.py shuffle     LoRA with the ranks that SaLoRA found, with these shuffled
                                     over the matrices, and with equal ones: paired differences
                                     (not in the paper)
    python train_glue.py sweep       score over the rank or the budget, beside LoRA and, over the
                                     budget, LoRA-SVD (Figures 4 and 5)
    python train_glue.py components  density, lambda and orthogonality over the steps (Figure 6)

Other flags, such as --model, --data, --epochs, --dtype or --lr-grid, go to every run (python
train_glue.py --help). Entries of --tasks and --methods may have flags of their own, which win, and
those of --methods a name: --tasks "cola --epochs 4" mrpc --methods salora "small=lora --r 4". A
cell of a table is one train_glue.py command with --seeds, in a process of its own; finished runs
are not repeated.
"""

import argparse
import contextlib
import csv
import io
import itertools
import json
import math
import re
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

from data import InputError
from data.batching import load_tokenizer, tokenize
from data.download import model_folder
from data.glue import load_task
from data.metrics import spearmanr
from model import LINEARS, Encoder, read_config
from training.flags import flag_group, need, new_parser
from training.runs import finished, make_folder, markdown, mean_std, write_json, write_text

SCRIPT = Path(__file__).parents[1] / "train_glue.py"
TASKS = ["cola", "sst2", "mrpc", "stsb", "qqp", "mnli", "qnli", "rte"]
LABELS = {"ft": "FT", "adapter-h": "Adapter-H", "adapter-p": "Adapter-P", "prefix": "Prefix",
          "prompt": "Prompt", "lora": "LoRA", "adalora": "AdaLoRA", "lora-svd": "LoRA-SVD",
          "salora": "SaLoRA", "head": "Head"}
METHODS = [method for method in LABELS if method != "head"]
FIELDS = ("task", "method", "seed", "metric", "score", "lr", "trainable_params", "kept_params",
          "density", "kept_density", "steps", "seconds", "peak_memory_mb")


def parse_args(name, argv):
    parser = new_parser(__doc__, prog=f"train_glue.py {name}", allow_abbrev=False)
    arg = flag_group(parser, "flags")
    arg("--tasks", nargs="+", default=TASKS if name == "table1" else ["cola"],
        help="tasks of train_glue.py")
    if name in ("table1", "efficiency"):
        methods = METHODS if name == "table1" else ["ft", "lora", "adalora", "salora"]
        arg("--methods", nargs="+", default=methods, help="rows of the table")
    seeds = [0] if name in ("efficiency", "components") else [0, 1, 2, 3, 4]
    arg("--seeds", type=int, nargs="+", default=seeds, help="of the runs of a cell")
    if name == "ablation":
        arg("--price", type=float, default=0.0005, help="per open gate, in place of a budget")
    if name == "efficiency":
        arg("--batch-sizes", type=int, nargs="+", default=[8, 16, 32, 64], help="the columns")
    if name == "sweep":
        arg("--over", choices=["r", "budget"], required=True, help="what is varied")
        arg("--values", type=float, nargs="+",
            help="its values (default: 1 2 4 8 16, or 0.125 0.25 0.5 0.75 1)")
    arg("--jobs", type=int, default=1, help="runs at a time")
    arg("--out", default=f"runs/{name}", help="folder of the runs and the results")
    args, common = parser.parse_known_args(argv)
    need(args.jobs >= 1, "--jobs", args.jobs, "at least 1")
    entries = args.tasks + getattr(args, "methods", [])
    if not all(entry.rpartition("=")[2].split() for entry in entries):
        raise InputError("--tasks or --methods has an empty entry")
    return args, common


# -------------------------------------------------------------------------------------------------
# cells: a task, a method, and its runs


def names(entries):
    return [entry.split()[0] for entry in entries]


def name_of(method):
    """The name of an entry of --methods: "small=lora --r 4" is small, "lora --r 4" is LoRA r 4."""
    label, _, method = method.rpartition("=")
    name, *flags = method.split()
    return label or " ".join([LABELS.get(name, name), *(flag.removeprefix("--") for flag in flags)])


class Cell:
    """A task and a method, each with flags of its own, and the folder of their runs."""

    def __init__(self, task, method, common, args):
        self.task, *task_flags = task.split()
        name, *method_flags = method.rpartition("=")[2].split()
        self.label, self.seeds = name_of(method), args.seeds
        self.flags = [*common, "--task", self.task, *task_flags, "--method", name, *method_flags]
        self.folder = Path(args.out) / Path(self.task).name / re.sub("[ /]", "_", self.label)
        # refuses wrong flags before anything is loaded
        self.settings = args.parse([*self.flags, "--seeds", *map(str, self.seeds)])
        if self.settings.lr_grid:  # lr is chosen; the final runs hold out none
            self.settings.lr = self.settings.hold_out = None

    def results(self):
        """[result or None] of its seeds."""
        return [finished(self.settings, self.folder / f"seed{seed}") for seed in self.seeds]

    def missing(self):
        """How many runs are left to do, those of --lr-grid included."""
        left = self.results().count(None)
        tuned = [(self.folder / f"lr{lr:g}" / "result.json").exists()
                 for lr in self.settings.lr_grid or []]
        return left and left + tuned.count(False)  # a rate may have diverged, without a result

    def command(self, *more):
        return [sys.executable, str(SCRIPT), *self.flags, *more]

    def run(self):
        """Runs what is missing, in a process of its own. True on success."""
        start, seeds = time.time(), map(str, self.seeds)
        command = self.command("--seeds", *seeds, "--out", str(self.folder), "--resume")
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            print(f"{self.task}, {self.label}: failed\n{done.stdout[-500:]}{done.stderr[-2000:]}",
                  file=sys.stderr)
            return False
        scores = [r["score"] for r in self.results()]
        print(f"{self.task}, {self.label}: {spread(scores)} in {clock(time.time() - start)}",
              flush=True)
        return True


def run_cells(tasks, methods, common, args):
    return run_all([Cell(task, method, common, args) for task in tasks for method in methods], args)


def run_all(cells, args):
    """{(task, name of the method): [result ..]}, after running what is missing."""
    for i, cell in enumerate(cells):
        if cell.folder in [other.folder for other in cells[:i]]:
            raise InputError(f"{cell.task} with {cell.label} is given twice: name methods that "
                             "differ, as in small=lora ..")
    missing = {cell: cell.missing() for cell in cells}
    todo = {cell: runs for cell, runs in missing.items() if runs}
    if todo:
        make_folder(Path(args.out))
        runs, seconds = sum(todo.values()), estimate(todo) / args.jobs
        print(f"{runs} runs to do, about {clock(seconds)} on this machine", flush=True)
    with ThreadPoolExecutor(args.jobs) as pool:
        failed = list(pool.map(Cell.run, todo)).count(False)
    if failed:
        raise InputError(f"{failed} cells failed; the same command tries them again")
    return {(cell.task, cell.label): cell.results() for cell in cells}


def estimate(todo):
    """Seconds for the runs of {cell: how many}, one after another, from the speed of ten steps of
    the first. A token costs a third as much in evaluation as in training."""
    lengths, total = {}, 0.0
    for cell, runs in todo.items():
        s = cell.settings
        key = s.task, s.data, s.limit_train, s.limit_dev, s.model
        if key not in lengths:
            folder = model_folder(s.model)
            with contextlib.redirect_stdout(io.StringIO()):  # the run itself will print it
                task, train, dev = load_task(s.task, s.data, s.limit_train, s.limit_dev)
            tokenizer, vocab_size = load_tokenizer(folder), read_config(folder).vocab_size
            counts = [sum(len(ids) for ids, _ in tokenize(
                tokenizer, rows.texts, s.max_length or 128, vocab_size)) for rows in (train, *dev)]
            lengths[key] = task.epochs, len(train.texts), counts[0], sum(counts[1:])
        epochs, rows, train, dev = lengths[key]
        limit = (s.max_steps or rows) * s.batch_size * s.accumulate / rows
        epochs = min(epochs if s.epochs is None else s.epochs, limit)
        total += runs * (epochs * train + max(epochs, 1) * dev / 3)
    first = next((cell for cell in todo if cell.settings.epochs != 0), None)
    if first is None:  # nothing is trained
        return 0.0
    with tempfile.TemporaryDirectory() as folder:
        command = first.command("--max-steps", "10", "--window", "0", "1", "--limit-dev", "8",
                                "--out", folder)
        if first.settings.lr_grid:
            command += ["--lr-grid", str(min(first.settings.lr_grid))]  # a large one may diverge
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:  # the run would fail too
            error = done.stderr.strip().removeprefix("error: ")
            raise InputError(f"{first.task}, {first.label}: {error}")
        last = json.loads((Path(folder) / "log.jsonl").read_text().splitlines()[-1])
    return total / last["tokens_per_second"]


# -------------------------------------------------------------------------------------------------
# what comes out


def clock(seconds):
    if seconds > 5400:
        return f"{seconds / 3600:.1f} h"
    return f"{seconds / 60:.0f} min" if seconds > 90 else f"{seconds:.0f} s"


def spread(scores):
    """Mean ± standard deviation, times 100."""
    mean, std = mean_std(100 * score for score in scores)
    return f"{mean:.2f} ± {std:.2f}" if len(scores) > 1 else f"{mean:.2f}"


def mean_ranks(results):
    """Rows q k v o u d, columns layers: means over the results."""
    rows = []
    for tail in LINEARS.values():
        by_result = [[n for path, n in r["ranks"].items() if path.split(".", 4)[4] == tail]
                     for r in results]
        rows.append([statistics.mean(layer) for layer in zip(*by_result)])
    return rows


def span(values, form="{:,}"):
    low, high = form.format(min(values)), form.format(max(values))
    return low if low == high else f"{low} to {high}"


def score_table(results):
    """Methods by tasks: mean ± standard deviation times 100, the best of a task in bold."""
    tasks, labels = tasks_and_labels(results)
    mean = {key: statistics.mean(r["score"] for r in runs) for key, runs in results.items()}
    rows = []
    for label in labels:
        cells = [spread([r["score"] for r in results[task, label]]) for task in tasks]
        if len(labels) > 1:
            best = [max(mean[task, other] for other in labels) for task in tasks]
            cells = [f"**{cell}**" if mean[task, label] == b else cell
                     for cell, task, b in zip(cells, tasks, best)]
        runs = [r for task in tasks for r in results[task, label]]
        density = [r["density"] for r in runs if r["density"] is not None]
        overall = statistics.mean(mean[task, label] for task in tasks)
        rows.append([label, *cells, f"{100 * overall:.2f}",
                     span([r["trainable_params"] for r in runs]),
                     span([r["kept_params"] for r in runs]),
                     span(density, "{:.3f}") if density else ""])
    return markdown(["method", *tasks, "mean", "trained", "kept", "density"], rows)


def tasks_and_labels(results):
    return [list(dict.fromkeys(key[i] for key in results)) for i in range(2)]


def paired_table(results, pairs):
    """Scores of one method minus those of another with the same seed, times 100: the mean, its
    standard error, and in how many pairs the first is ahead. pairs: [(one, other) ..]."""
    tasks, labels = tasks_and_labels(results)
    rows = []
    for one, other in pairs:
        if one == other or not {one, other} <= {*labels}:
            continue
        cells, means, errors, wins = [], [], [], []
        for task in tasks:
            gaps = [100 * (a["score"] - b["score"])
                    for a, b in zip(results[task, one], results[task, other])]
            mean, std = mean_std(gaps)
            means, errors = [*means, mean], [*errors, std / len(gaps)**0.5]
            wins += [gap > 0 for gap in gaps]
            cells.append(f"{mean:+.2f} ± {errors[-1]:.2f}")
        cells.append(f"{statistics.mean(means):+.2f} ± {math.hypot(*errors) / len(errors):.2f}")
        rows.append([f"{one} - {other}", *cells, f"{sum(wins)} of {len(wins)}"])
    if not rows or len(results[tasks[0], labels[0]]) == 1:
        return ""
    return ("\nPaired differences, x 100: mean of the seeds ± its standard error\n\n"
            + markdown(["", *tasks, "mean", "ahead in"], rows))


def as_csv(results):
    """A line per run."""
    file = io.StringIO()
    writer = csv.DictWriter(file, FIELDS, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    for (_, label), runs in results.items():
        writer.writerows(r | dict(method=label, lr=r["settings"]["lr"]) for r in runs)
    return file.getvalue()


@contextlib.contextmanager
def figure(file, columns, width=3.2, height=2.6, **kw):
    """A row of axes, saved as a picture at the end."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    colors = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000",
              "#999999"]
    style = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False,
             "axes.grid": True, "grid.color": "#e5e5e5", "axes.axisbelow": True,
             "axes.prop_cycle": matplotlib.cycler(color=colors)}
    with plt.rc_context(style):
        fig, axes = plt.subplots(1, columns, figsize=(width * columns, height), squeeze=False,
                                 layout="constrained", **kw)
        yield axes[0]
        fig.savefig(file, dpi=200)
        plt.close(fig)


def dots(file, results):
    """A panel per task, a line per method: mean and standard deviation of the score."""
    tasks, labels = tasks_and_labels(results)
    with figure(file, len(tasks), height=0.8 + 0.25 * len(labels), sharey=True) as axes:
        for ax, task in zip(axes, tasks):
            for y, label in enumerate(labels):
                mean, std = mean_std(100 * r["score"] for r in results[task, label])
                ax.errorbar(mean, y, xerr=std, fmt="o", capsize=3)
            metric = results[task, labels[0]][0]["metric"].replace("_", " ")
            ax.set(title=task, xlabel=f"{metric} x 100", yticks=range(len(labels)),
                   yticklabels=labels, ylim=(len(labels) - 0.5, -0.5))


def curves(file, panels, xlabel, bands=None):
    """A panel per {title: {line: [(x, mean, standard deviation) ..]}}; bands {title: (x, x)} are
    shaded between the two x."""
    with figure(file, len(panels)) as axes:
        for ax, (title, lines) in zip(axes, panels.items()):
            for label, points in lines.items():
                x, y, error = zip(*points)
                ax.errorbar(x, y, yerr=error, fmt="o-" if len(x) < 20 else "-",
                            capsize=3 if any(error) else 0, markersize=4, label=label)
            ax.set(xlabel=xlabel, title=title)
            if bands:
                ax.axvspan(*bands[title], color="#f0f0f0", zorder=0)
            else:  # ranks or budgets, each about twice the one before
                ax.set_xscale("log", base=2)
                ax.set_xticks(x, [f"{value:g}" for value in x])
                ax.minorticks_off()
            if len(lines) > 1:
                ax.legend(frameon=False)


def heat(file, maps, r):
    """A map of the ranks per task: kinds of matrices by layers."""
    with figure(file, len(maps)) as axes:
        for ax, (task, rows) in zip(axes, maps.items()):
            ax.grid(False)
            ax.imshow(rows, cmap="Blues", vmin=0, vmax=r, aspect="auto")
            for y, row in enumerate(rows):
                for x, rank in enumerate(row):
                    color = "white" if rank > 0.6 * r else "black"
                    ax.text(x, y, f"{rank:.0f}", ha="center", va="center", color=color, fontsize=7)
            kinds = [f"$W^{letter.upper()}$" for letter in LINEARS]
            ax.set(title=f"{task}: rank, of {r}", xlabel="layer", yticks=range(len(kinds)),
                   yticklabels=kinds)


# -------------------------------------------------------------------------------------------------
# the experiments: each returns its results, a table, and {file: (function, arguments)} of plots


def table1(args, common):
    results = run_cells(args.tasks, args.methods, common, args)
    labels = tasks_and_labels(results)[1]
    pairs = [(label, other) for label in labels
             for other in ("LoRA", label.replace("SaLoRA", "LoRA-SVD"))]
    text = score_table(results) + paired_table(results, pairs)
    return results, text, {"scores.png": (dots, results)}


def ablation(args, common):
    methods = ["salora", f"salora --price {args.price:g}", "salora --no-turn"]
    results = run_cells(args.tasks, methods, common, args)
    pairs = [(name_of(method), "SaLoRA") for method in methods]
    text = score_table(results) + paired_table(results, pairs)
    return results, text, {"scores.png": (dots, results)}


def efficiency(args, common):
    common = ["--max-steps", "20", *common]  # --max-steps of the command comes later and wins

    def sized(method, b):
        """The entry with that batch size in its flags and its name."""
        return f"{name_of(method)} batch-size {b}={method.rpartition('=')[2]} --batch-size {b}"

    methods = [sized(m, b) for m in args.methods for b in args.batch_sizes]
    results = run_cells(args.tasks, methods, common, args)
    values = {"peak memory (MB)": lambda r: r["peak_memory_mb"],
              "time of a step (ms)": lambda r: 1000 * r["seconds"] / max(r["steps"], 1)}
    panels = {}
    for task in names(args.tasks):
        for what, value in values.items():
            lines = {}
            for m in args.methods:
                runs = {b: results[task, name_of(sized(m, b))] for b in args.batch_sizes}
                lines[name_of(m)] = [(b, *mean_std(map(value, runs[b]))) for b in args.batch_sizes]
            panels[f"{task}: {what}"] = lines
    tables = []
    for title, lines in panels.items():
        rows = [[label, *(f"{mean:.0f}" for _, mean, _ in points)]
                for label, points in lines.items()]
        head = ["method", *(f"batch {b}" for b in args.batch_sizes)]
        tables.append(f"{title}\n\n{markdown(head, rows)}")
    return results, "\n".join(tables), {"efficiency.png": (curves, panels, "batch size")}


def ranks(args, common):
    base = args.parse([*common, "--task", names(args.tasks)[0]])
    need(base.targets == list(LINEARS) and base.layers is None, "--targets or --layers", "given",
         "none: ranks itself goes through the kinds of matrices and thirds of the layers")
    count = read_config(model_folder(base.model)).num_hidden_layers
    layers = [str(i) for i in range(count)]
    third = -(-count // 3)
    by_kind = [f"lora --targets {letter}" for letter in LINEARS]
    by_layer = [f"lora --layers {' '.join(layers[i:i + third])}" for i in range(0, count, third)]
    results = run_cells(args.tasks, ["salora", "lora", *by_kind, *by_layer], common, args)
    maps = {task: mean_ranks(results[task, "SaLoRA"]) for task in names(args.tasks)}
    text = score_table(results)
    for task, means in maps.items():
        rows = [[f"W^{letter.upper()}", *(f"{rank:.1f}" for rank in row)]
                for letter, row in zip(LINEARS, means)]
        text += (f"\n{task}: mean rank over the seeds, {base.r} at the start\n\n"
                 + markdown(["", *layers], rows))
    alone = {key: runs for key, runs in results.items() if key[1] != "SaLoRA"}
    return results, text, {"ranks.png": (heat, maps, base.r), "alone.png": (dots, alone)}


def shuffled(ranks, model, seed):
    """{path: rank}, shuffled among the matrices of one shape, which keeps the size."""
    rng, groups, table = np.random.default_rng(seed), {}, dict(ranks)
    for path in ranks:
        groups.setdefault(model.get_submodule(path).weight.shape, []).append(path)
    for paths in groups.values():
        table |= zip(paths, rng.permutation([ranks[path] for path in paths]).tolist())
    return table


def shuffle(args, common):
    """A LoRA has the seed of the SaLoRA whose ranks it gets: the same head, order of rows and
    start of A."""
    found, equal = [Cell(task, "salora", common, args) for task in args.tasks], {}
    for cell in found:
        r, budget = cell.settings.r, cell.settings.budget
        need(r, "--adapter", "given", "none: shuffle sets the ranks itself")
        equal[cell] = int(budget * r + 1e-6)  # 0.29 * 100 is 28.999..
        need(equal[cell], "--budget", f"{budget:g}", f"at least 1 / {r}, or a larger --r: a LoRA "
             "of equal ranks would have none")
    count = len(found) * len(args.seeds)
    print(f"{count} runs of SaLoRA in all, and 3 of LoRA for each of them", flush=True)
    results, cells = run_all(found, args), []
    for task, cell in zip(args.tasks, found):
        with torch.device("meta"):
            model = Encoder(read_config(model_folder(cell.settings.model)), 2)
        for seed, result in zip(args.seeds, cell.results()):
            ranks = result["ranks"]
            for name, table in dict(found=ranks, shuffled=shuffled(ranks, model, seed),
                                    equal=dict.fromkeys(ranks, equal[cell])).items():
                file = cell.folder.parent / "ranks" / f"{name}-seed{seed}.json"
                file.parent.mkdir(exist_ok=True)
                write_json(file, table)
                one = argparse.Namespace(**vars(args) | dict(seeds=[seed]))
                flags = [*common, "--ranks", str(file)]  # a path may have spaces
                cells.append(Cell(task, f"{name} {seed}=lora", flags, one))
    for (task, label), runs in run_all(cells, args).items():
        results.setdefault((task, f"LoRA {label.split()[0]}"), []).extend(runs)
    tasks = names(args.tasks)
    results = {key: results[key] for key in sorted(results, key=lambda key: tasks.index(key[0]))}
    text = score_table(results) + paired_table(
        results, itertools.combinations(["LoRA found", "LoRA shuffled", "LoRA equal"], 2))
    tables = {task: [list(r["ranks"].values()) for r in results[task, "SaLoRA"]] for task in tasks}
    if len(args.seeds) > 1:
        text += "\nRank correlation of the found ranks, mean of the pairs of seeds:"
        for task, lists in tables.items():
            pairs = itertools.starmap(spearmanr, itertools.combinations(lists, 2))
            text += f" {task} {statistics.mean(pairs):.2f}"
        text += "\n"
    return results, text, {"scores.png": (dots, results)}


def sweep(args, common):
    r = args.parse(common).r
    need(r, "--adapter", "given", "none: sweep sets the ranks itself")
    if args.over == "r":
        values, xlabel = args.values or [1, 2, 4, 8, 16], "rank at the start"
        lines = {m: [(v, f"{m} --r {v:g}") for v in values] for m in ("salora", "lora")}
    else:  # LoRA with the rank that gives it as many parameters as the budget leaves
        values, xlabel = args.values or [0.125, 0.25, 0.5, 0.75, 1.0], "budget"
        lines = {"salora": [(b, f"salora --budget {b:g}") for b in values],
                 "lora": [(b, f"lora --r {max(1, round(b * r))}") for b in values],
                 "lora-svd": [(b, f"lora-svd --budget {b:g}") for b in values]}
    # a dict, as two budgets may give LoRA the same rank
    methods = dict.fromkeys(method for line in lines.values() for _, method in line)
    results = run_cells(args.tasks, methods, common, args)
    panels = {}
    for task in names(args.tasks):
        scores = {method: mean_std(100 * run["score"] for run in results[task, name_of(method)])
                  for method in methods}
        panels[f"{task}: score x 100"] = {
            LABELS[m]: [(x, *scores[method]) for x, method in line] for m, line in lines.items()}
    ours, *others = ([name_of(method) for _, method in line] for line in lines.values())
    text = score_table(results) + paired_table(
        results, [pair for other in others for pair in zip(ours, other)])
    return results, text, {"sweep.png": (curves, panels, xlabel)}


def components(args, common):
    results = run_cells(args.tasks, ["salora"], common, args)
    panels, bands, rows = {}, {}, []
    for task in names(args.tasks):
        run = results[task, "SaLoRA"][0]
        file = Path(args.out) / Path(task).name / "SaLoRA" / f"seed{run['seed']}" / "log.jsonl"
        log = [json.loads(line) for line in file.read_text().splitlines()]
        for what in ("density", "lambda", "orth_a", "orth_b"):
            y, title = [entry[what] for entry in log], f"{task}: {what}"
            panels[title] = {"SaLoRA": [(entry["step"], entry[what], 0.0) for entry in log]}
            bands[title] = [share * run["steps"] for share in run["settings"]["window"]]
            rows.append([task, what, *(f"{v:.4f}" for v in (y[0], min(y), max(y), y[-1]))])
        if run["budget"] is not None:  # there is none with --price
            budget = [(entry["step"], run["budget"], 0.0) for entry in log]
            panels[f"{task}: density"]["budget"] = budget
    table = markdown(["task", "", "first", "smallest", "largest", "last"], rows)
    return results, table, {"components.png": (curves, panels, "step", bands)}


def main(name, argv, parse):
    """parse(flags): train_glue.py's parse_args."""
    args, common = parse_args(name, argv)
    args.parse = parse
    for flag in ("--seed", "--resume", "--overwrite", "--task", "--method"):
        if flag in [word.partition("=")[0] for word in common]:
            raise InputError(f"{flag} is for a single run; {name} takes --tasks and --seeds, "
                             "resumes by itself and replaces nothing; see its --help")
    results, text, pictures = globals()[name](args, common)
    out = Path(args.out)
    print("\n" + text)
    write_text(out / "table.md", f"    python train_glue.py {name} {shlex.join(argv)}\n\n{text}")
    write_text(out / "runs.csv", as_csv(results))
    files = sorted(out.glob("*/*/*/result.json"))  # with those of --lr-grid
    raw = [json.dumps(json.loads(file.read_text())) for file in files]
    write_text(out / "runs.jsonl", "\n".join(raw) + "\n")
    try:
        for file, (draw, *what) in pictures.items():
            draw(out / file, *what)
        drawn = f", {', '.join(pictures)}"
    except ImportError:
        drawn = "; no pictures, which need matplotlib"
    print(f"{out}/: table.md, runs.csv, runs.jsonl{drawn}")
