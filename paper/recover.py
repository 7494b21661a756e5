"""
Known ranks: are they found? A teacher is a frozen network plus low-rank updates of known ranks; the
student, the same network with an adapter, learns to give the teacher's outputs.

    python train_glue.py recover                               # two small networks, no files
    python train_glue.py recover --teachers pretrained         # the demo's model and sentences
    python train_glue.py recover --teachers pretrained --model DIR --data DIR    # RoBERTa and CoLA
    python train_glue.py recover --noise 1 --spread 3 --budgets 0.5 0.25 0.125

small       a residual network; the ranks of its updates fill the budget and differ by matrix
scaled      the same, with inputs of unequal scale and true ranks that need twice the budget. The
            largest singular values are where the input is small and matters little, so triplets
            have to be chosen by what they do to the loss, not by size
pretrained  a RoBERTa or BERT with updates of random ranks that fill the budget; the student matches
            hidden states

A row of the table is a method. relative error: mean square error on new inputs over that of the
frozen network. rank error: sum of |found - true| over the matrices. All methods have one schedule:
the learning rate warms up, falls linearly, and starts again at the end of the window. Finished runs
are not repeated.

More rows ask whether ranks matter: a LoRA that starts with the true ranks or those that SaLoRA
found, or with either shuffled over the matrices of one shape:

    python train_glue.py recover --methods "LoRA found ranks" "LoRA found shuffled"
"""

import argparse
import contextlib
import copy
import io
import itertools
import json
import math
import multiprocessing
import shlex
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

import baselines
import salora as sl
from data.batching import batch_order, collate, load_tokenizer, tokenize
from data.download import model_folder
from data.glue import HERE, load_task
from model import load_encoder
from paper.experiments import figure, shuffled, span
from training.flags import WINDOWS, at_least, different, flag_group, need, new_parser
from training.loop import lr_factor
from training.runs import markdown, write_json, write_text

TEACHERS = ("small", "scaled", "pretrained")
METHODS = ("LoRA", "LoRA of the size", "AdaLoRA", "LoRA-SVD", "SaLoRA", "SaLoRA paper")
SIZES = {"LoRA of the size": 1, "LoRA of twice the size": 2}  # times what the budget leaves
GIVEN = ("LoRA true ranks", "LoRA true shuffled", "LoRA found ranks", "LoRA found shuffled")
STEPS = dict(small=600, scaled=600, pretrained=500)
LEARNING_RATES = dict(small=1e-2, scaled=1e-2, pretrained=6e-3)
COLORS = {"true": "#000000", "AdaLoRA": "#56b4e9", "LoRA-SVD": "#e69f00", "SaLoRA": "#d55e00"}


def parse_args(argv):
    parser = new_parser(__doc__, prog="train_glue.py recover", allow_abbrev=False)
    arg = flag_group(parser, "teacher")
    arg("--teachers", nargs="+", choices=TEACHERS, default=["small", "scaled"],
        help="whose ranks are to be found")
    arg("--strength", type=float, default=1.0, help="factor of the updates' singular values")
    arg("--spread", type=float,
        help="largest over smallest singular value of an update (default: 1, pretrained 3)")
    arg("--noise", type=float, nargs="+", default=[0.0], help="of the targets in training, "
        "relative to what the updates change in them; a table for each")
    arg("--model", metavar="DIR", help="pretrained: folder or hub name (default: the demo's)")
    arg("--data", metavar="DIR",
        help="pretrained: folder in GLUE's layout, to read CoLA (default: the demo's)")
    arg = flag_group(parser, "student")
    arg("--methods", nargs="+", choices=sorted({*METHODS, *SIZES, *GIVEN}),
        default=list(METHODS), help="the rows")
    arg("--r", type=int, default=8, help="rank at the start")
    arg("--budgets", type=float, nargs="+", default=[0.5],
        help="shares of parameters to keep; a table for each (scaled: half of it)")
    arg("--window", type=float, nargs=2, metavar=("START", "END"), help="fractions of the run, for "
        "all methods (default: each its own; LoRA's rate restarts at 0.5)")
    values = "{small:g}, pretrained {pretrained:g}"
    arg("--steps", type=int, help=f"of a run (default: {values.format(**STEPS)})")
    arg("--lr", type=float, help=f"learning rate (default: {values.format(**LEARNING_RATES)})")
    arg("--seeds", type=int, nargs="+", default=[0], help="of teacher, student and inputs")
    arg("--jobs", type=int, default=2, help="runs at a time, one thread each")
    arg("--out", default="runs/recover", help="folder of the runs and the results")
    args = parser.parse_args(argv)
    at_least(args, 1, "r", "jobs")
    at_least(args, 2, "steps")
    different(args, "seeds")
    small = set(args.teachers) & {"small", "scaled"}
    need(args.r <= Small.D or not small, "--r", args.r, f"at most {Small.D}, the width of the "
         "small teachers")
    least = 1 / 16 if small else 0.0  # up to here, all true ranks of `scaled` are 0
    for budget in args.budgets:
        need(least < budget <= 1, "--budgets", budget, f"shares in ({least:g}, 1]")
    start, end = args.window or (0, 0.5)
    need(0 <= start < end < 1, "--window", f"{start} {end}",
         "two fractions of the run, 0 <= START < END < 1")
    for name in ("strength", "spread", "lr"):
        value = getattr(args, name)
        need(value is None or 0 < value < math.inf, f"--{name}", value, "a positive number")
    need(args.spread is None or args.spread >= 1, "--spread", args.spread, "at least 1")
    need(all(0 <= noise < math.inf for noise in args.noise), "--noise", args.noise,
         "numbers from 0")
    return args


# -------------------------------------------------------------------------------------------------
# teachers: a frozen network, the same with updates of known ranks, and inputs


class Network(nn.Module):
    """x + gelu(W (scale x)) / 2 and a layer norm, once for each scale; x (n, d)."""

    def __init__(self, d, scales):
        super().__init__()
        self.scales = scales
        self.up = nn.ModuleList(nn.Linear(d, d, bias=False) for _ in scales)
        for m in self.up:
            nn.init.orthogonal_(m.weight)

    def forward(self, x):
        for m, scale in zip(self.up, self.scales):
            x = F.layer_norm(x + 0.5 * F.gelu(m(scale * x)), x.shape[-1:])
        return x


@torch.no_grad()
def add_updates(model, ranks, sigmas, spread, g):
    """Adds a random update of each rank {path: rank} to its weight, with singular values from
    sigma / sqrt(spread) to sigma sqrt(spread); sigmas {path: sigma}."""
    for path, rank in ranks.items():
        weight = model.get_submodule(path).weight  # (d, k)
        u, v = (torch.linalg.qr(torch.randn(n, rank, generator=g))[0] for n in weight.shape)
        exponents = torch.rand(rank, generator=g) - 0.5
        weight += (u * (sigmas[path] * spread**exponents)) @ v.T


class Small:
    """The residual network; with `scaled`, inputs of unequal scale."""

    RANKS = (0, 8, 1, 6, 0, 8, 3, 0, 7, 2, 8, 5)
    D = 64  # width
    SCALES, SIGMAS = (0.1, 3, 0.1, 3, 1, 0.1, 3, 1, 0.1, 3, 1, 1), {0.1: 1.5, 1: 0.7, 3: 0.4}

    def __init__(self, args, budget, seed, scaled=False):
        torch.manual_seed(123 + seed)
        self.base = Network(self.D, self.SCALES if scaled else (1,) * len(self.RANKS))
        if scaled:
            ranks = [round(8 * budget)] * len(self.RANKS)  # twice a student's halved budget
        else:
            ranks = [min(args.r, round(2 * budget * rank)) for rank in self.RANKS]
        self.ranks = {f"up.{i}": rank for i, rank in enumerate(ranks)}
        sigmas = {path: args.strength * (self.SIGMAS[s] if scaled else 1)
                  for path, s in zip(self.ranks, self.base.scales)}
        self.teacher, g = copy.deepcopy(self.base), torch.Generator().manual_seed(seed)
        add_updates(self.teacher, self.ranks, sigmas, args.spread, g)

    def batch(self):
        return torch.randn(64, self.D)

    def held_out(self):
        return [torch.randn(8192, self.D)]

    def outputs(self, model, x):
        """What teacher and student should agree on: (n, d)."""
        return model(x)


class Pretrained:
    """A pretrained encoder, whose last hidden states are matched, without dropout."""

    def __init__(self, args, budget, seed):
        folder = model_folder(args.model) if args.model else HERE / "demo" / "model"
        task, train, dev = load_task("cola" if args.data else "demo", args.data)
        with contextlib.redirect_stdout(io.StringIO()):  # not "the head is new": it is not used
            self.base = load_encoder(folder, 2, torch.float32).eval()
        c, rng = self.base.config, np.random.default_rng(seed)
        tokenizer = load_tokenizer(folder)
        length = min(32, c.max_length)
        self.tokens, self.dev = (tokenize(tokenizer, rows.texts, length, c.vocab_size)
                                 for rows in (train, dev[0]))
        paths = self.base.target_paths("qkvoud")
        size = np.array([sum(self.base.get_submodule(path).weight.shape) for path in paths])
        low, high = int(max(0, 2 * budget - 1) * args.r), math.ceil(min(1, 2 * budget) * args.r)
        tries = (rng.integers(low, high + 1, len(paths)) for _ in range(100_000))
        shares = ((ranks, ranks @ size / (args.r * size.sum())) for ranks in tries)
        ranks = next((ranks for ranks, share in shares if abs(share - budget) < 0.005), None)
        need(ranks is not None, f"--budgets {budget:g} with --r", args.r, "a larger rank: no draw "
             "of ranks comes near this share")
        self.ranks = dict(zip(paths, ranks.tolist()))
        self.teacher, g = copy.deepcopy(self.base), torch.Generator().manual_seed(seed)
        sigmas = dict.fromkeys(paths, args.strength)
        add_updates(self.teacher, self.ranks, sigmas, args.spread, g)
        self.todo, self.rng = [], rng

    def batch(self, rows=16):
        if not self.todo:
            self.todo = batch_order([len(ids) for ids, _ in self.tokens], rows, self.rng)
        return self.collate([self.tokens[i] for i in self.todo.pop()])

    def collate(self, rows):
        return collate(rows, self.base.config.pad_token_id, "cpu")

    def held_out(self):
        order = batch_order([len(ids) for ids, _ in self.dev], 128)
        return [self.collate([self.dev[i] for i in batch]) for batch in order]

    def outputs(self, model, x):
        """Hidden states of the tokens, without padding: (n, d)."""
        ids, mask, _ = x
        hidden = model.hidden(*x)
        return hidden.flatten(0, 1) if mask is None else hidden[mask.bool()]


def make_teacher(name, args, budget, seed):
    if name == "pretrained":
        return Pretrained(args, budget, seed)
    return Small(args, budget, seed, scaled=name == "scaled")


# -------------------------------------------------------------------------------------------------
# one run


def install(problem, method, args, budget, seed, ranks=None):
    """Returns a student, its SaLoRA or AdaLoRA, what the optimizer trains, and the step at which
    the learning rate starts again. ranks: for a LoRA with given ones."""
    torch.manual_seed(seed)
    model, paths = copy.deepcopy(problem.base), list(problem.ranks)
    if method in ("SaLoRA", "SaLoRA paper"):
        recipe = sl.PAPER if method == "SaLoRA paper" else {}
        recipe = recipe | dict(window=args.window) if args.window else recipe
        low = sl.SaLoRA(model, paths, args.steps, args.r, budget=budget, seed=seed, **recipe)
        return model, low, low.param_groups(args.lr, weight_decay=0.0), low.last
    share = min(1, SIZES[method] * budget) if method in SIZES else 1
    r = max(1, round(share * args.r))
    name = {"AdaLoRA": "adalora", "LoRA-SVD": "lora-svd"}.get(method, "lora")
    window = args.window or WINDOWS.get(name, (0.4, 0.5))
    low = baselines.install(model, name, paths, args.steps, r=r, budget=budget, window=window,
                             ranks=ranks)
    weights = [p for p in model.parameters() if p.requires_grad]
    return model, low, weights, sl.window_steps(window, args.steps)[1]


def run(teacher, method, args, budget, noise, seed):
    """Trains a student of the teacher; returns what is in result.json."""
    torch.set_num_threads(1)
    args = argparse.Namespace(**vars(args) | settings_of(teacher, args))
    start, problem = time.time(), make_teacher(teacher, args, budget, seed)
    room, ranks = room_of(teacher, budget), None
    if method in GIVEN:
        ranks = problem.ranks
        if "found" in method:
            ranks = run(teacher, "SaLoRA", args, budget, noise, seed)["ranks"]
        if "shuffled" in method:
            ranks = shuffled(ranks, problem.base, seed)
    model, low, params, restart = install(problem, method, args, room, seed, ranks)
    optimizer = torch.optim.AdamW(params, args.lr, weight_decay=0.0, fused=True)
    plan = SimpleNamespace(steps=args.steps, warmup=0.04 * args.steps, restart=restart)
    with torch.no_grad():
        x = problem.batch()
        change = problem.outputs(problem.teacher, x) - problem.outputs(problem.base, x)
        scale = noise * change.square().mean().sqrt()

    for step in range(args.steps):
        optimizer.param_groups[0]["lr"] = args.lr * lr_factor(plan, step)
        low.begin_step()
        x = problem.batch()
        with torch.no_grad():
            y = problem.outputs(problem.teacher, x)  # (n, d)
            y += scale * torch.randn_like(y)
        loss = 10 * F.mse_loss(problem.outputs(model, x), y) + low.penalty()
        loss.backward()
        optimizer.step()
        low.end_step(optimizer)
        optimizer.zero_grad()

    found, error, frozen = sl.ranks(model), 0.0, 0.0
    model.eval()
    with torch.no_grad():
        for x in problem.held_out():
            y = problem.outputs(problem.teacher, x)
            error += (problem.outputs(model, x) - y).square().sum().item()
            frozen += (problem.outputs(problem.base, x) - y).square().sum().item()
    return dict(
        teacher=teacher, method=method, budget=budget, noise=noise, seed=seed,
        relative_error=error / frozen,
        rank_error=sum(abs(found[path] - rank) for path, rank in problem.ranks.items()),
        true_ranks=problem.ranks, ranks=found,
        kept_params=low.kept_params(), density=low.final_density,
        seconds=round(time.time() - start, 1), settings=settings_of(teacher, args))


def room_of(teacher, budget):
    """The share of parameters that a student may keep."""
    return budget / 2 if teacher == "scaled" else budget


def settings_of(teacher, args):
    """What a run depends on besides its row and table."""
    spread = args.spread or (3.0 if teacher == "pretrained" else 1.0)
    return dict(steps=args.steps or STEPS[teacher], lr=args.lr or LEARNING_RATES[teacher],
                spread=spread, strength=args.strength, r=args.r, window=args.window,
                model=args.model, data=args.data)


def run_once(job):
    """run(*job), unless its result is in the folder."""
    *what, folder = job
    file = folder / "result.json"
    if not file.exists():
        result = run(*what)
        folder.mkdir(parents=True, exist_ok=True)
        write_json(file, result)
        print(f"{folder}: relative error {result['relative_error']:.4f}, rank error "
              f"{result['rank_error']}, {result['seconds']:.0f} s", flush=True)
    return json.loads(file.read_text())


# -------------------------------------------------------------------------------------------------
# what comes out


def mean_each(values, form):
    """The mean, and each value if there are several."""
    mean, each = form.format(statistics.mean(values)), " ".join(map(form.format, values))
    return mean if len(values) == 1 else f"{mean} ({each})"


def tables(results):
    """A table for each {(teacher, budget, noise): {method: [result ..]}}."""
    text = []
    for (teacher, budget, noise), rows in results.items():
        seeds = next(iter(rows.values()))
        true = span([sum(run["true_ranks"].values()) for run in seeds])
        most = seeds[0]["settings"]["r"] * len(seeds[0]["true_ranks"])
        text.append(f"{teacher}, budget {room_of(teacher, budget):g}, noise {noise:g}: {true} of "
                    f"{most} ranks to find\n")
        text.append(markdown(
            ["method", "relative error", "rank error", "parameters kept", "C before the cut"],
            [[method, mean_each([r["relative_error"] for r in runs], "{:.4f}"),
              mean_each([r["rank_error"] for r in runs], "{:.0f}"),
              f"{max(r['kept_params'] for r in runs):,}",
              mean_each([r["density"] for r in runs], "{:.2f}") if "SaLoRA" in method else ""]
             for method, runs in rows.items()]))
    return "\n".join(text)


def picture(file, results):
    """True and found ranks side by side: a panel per table, a group of bars per matrix, the true
    rank and what each method found."""
    with figure(file, len(results), width=4.4, height=3) as axes:
        for ax, ((teacher, budget, _), rows) in zip(axes, results.items()):
            bars = {"true": list(next(iter(rows.values()))[0]["true_ranks"].values())}
            for method in COLORS:
                if method in rows:
                    bars[method] = list(rows[method][0]["ranks"].values())
            count, width = len(bars["true"]), 0.9 / len(bars)
            for i, label in enumerate(bars):
                x = [at - 0.45 + (i + 0.5) * width for at in range(count)]
                ax.bar(x, bars[label], width, label=label, color=COLORS[label])
            ax.set(title=f"{teacher}, b = {room_of(teacher, budget):g}", xlabel="matrix",
                   ylabel="rank", xticks=range(0, count, max(1, count // 12)))
            ax.grid(False)
            ax.legend(frameon=False, ncols=4, loc="upper center", bbox_to_anchor=(0.5, -0.2),
                      fontsize=7, handlelength=1)


def main(argv):
    args = parse_args(argv)
    out, jobs = Path(args.out), []
    cells = list(itertools.product(
        args.teachers, args.budgets, args.noise, args.methods, args.seeds))
    for teacher, budget, noise, method, seed in cells:
        table = f"{teacher}-b{budget:g}-noise{noise:g}"
        folder = out / table / method.replace(" ", "_") / f"seed{seed}"
        jobs.append((teacher, method, args, budget, noise, seed, folder))
        if (folder / "result.json").exists():
            found = json.loads((folder / "result.json").read_text())["settings"]
            need(found == settings_of(teacher, args), f"--out {out}: it", f"for runs with {found}",
                 "the same flags: give another folder")
    with ProcessPoolExecutor(args.jobs, multiprocessing.get_context("spawn")) as pool:
        done = list(pool.map(run_once, jobs))
    results = {}
    for (teacher, budget, noise, method, _), result in zip(cells, done):
        results.setdefault((teacher, budget, noise), {}).setdefault(method, []).append(result)
    text = tables(results)
    print("\n" + text)
    write_text(out / "table.md", f"    python train_glue.py recover {shlex.join(argv)}\n\n{text}")
    write_text(out / "runs.jsonl", "".join(json.dumps(result) + "\n" for result in done))
    try:
        picture(out / "ranks.png", results)
        print(f"{out}/: table.md, runs.jsonl, ranks.png")
    except ImportError:
        print(f"{out}/: table.md, runs.jsonl; no picture, which needs matplotlib")
