"""
Known ranks: are they found? A teacher is a frozen network plus low-rank updates of ranks that are known; the student,
the same network with an adapter, learns to give the teacher's outputs.

    python train_glue.py recover                               # two small networks: offline, no files
    python train_glue.py recover --teachers pretrained         # the demo's model and sentences
    python train_glue.py recover --teachers pretrained --model DIR --data DIR    # a RoBERTa or BERT folder, DIR/CoLA/train.tsv
    python train_glue.py recover --noise 1 --spread 3 --budgets 0.5 0.25 0.125

small       a residual network, the ranks of whose updates fill the budget and differ from matrix to matrix
scaled      the same, with inputs of unequal scale and true ranks that need twice the budget. The largest singular values lie
            where the input is small and little depends on them: what a triplet does to the loss tells, not its size
pretrained  a language model's matrices, with updates of random ranks that fill the budget; hidden states are matched

A row of the table is a method. relative error: the mean square error on new inputs over that of the frozen network. rank error:
the sum of |found - true| over the matrices. All methods have the same schedule: the learning rate warms up, falls linearly, and
starts once more where the window ends. What is finished is not run again.
"""

import argparse
import contextlib
import copy
import io
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
from training.flags import at_least, flag_group, need, new_parser
from training.loop import lr_factor
from training.runs import markdown, write_text

TEACHERS = ("small", "scaled", "pretrained")
METHODS = ("LoRA", "LoRA of the size", "AdaLoRA", "LoRA-SVD", "SaLoRA", "SaLoRA paper")
STEPS = dict(small=600, scaled=600, pretrained=500)
LEARNING_RATES = dict(small=1e-2, scaled=1e-2, pretrained=3e-3)


def parse_args(argv):
    parser = new_parser(prog="train_glue.py recover", description=__doc__,
                                 formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    arg = flag_group(parser, "teacher")
    arg("--teachers", nargs="+", choices=TEACHERS, default=["small", "scaled"], help="what is to be found")
    arg("--strength", type=float, default=1.0, help="factor of the updates' singular values")
    arg("--spread", type=float, default=1.0, help="largest over smallest singular value of an update (pretrained: 3 if not given)")
    arg("--noise", type=float, nargs="+", default=[0.0],
        help="of the targets in training, over what the updates change in them; a table for each")
    arg("--model", metavar="DIR", help="pretrained: a folder or hub name (default: the demo's)")
    arg("--data", metavar="DIR", help="pretrained: folder in GLUE's layout whose CoLA sentences are read (default: the demo's)")
    arg = flag_group(parser, "student")
    arg("--methods", nargs="+", choices=METHODS, default=list(METHODS), help="rows of the table")
    arg("--r", type=int, default=8, help="rank at the start")
    arg("--budgets", type=float, nargs="+", default=[0.5], help="shares of parameters to keep; a table for each (scaled: half of it)")
    arg("--window", type=float, nargs=2, default=[0.4, 0.5], metavar=("START", "END"), help="fractions of the run")
    arg("--steps", type=int, help=f"of a run (default: {STEPS['small']}, pretrained {STEPS['pretrained']})")
    arg("--lr", type=float, help=f"learning rate (default: {LEARNING_RATES['small']:g}, pretrained {LEARNING_RATES['pretrained']:g})")
    arg("--seeds", type=int, nargs="+", default=[0], help="of teacher, student and inputs")
    arg("--jobs", type=int, default=2, help="runs at a time, a thread each")
    arg("--out", default="runs/recover", help="folder of the runs and what comes out of them")
    args = parser.parse_args(argv)
    at_least(args, 1, "r", "steps", "jobs")
    for budget in args.budgets:
        need(0 < budget <= 1, "--budgets", budget, "shares in (0, 1]")
    start, end = args.window
    need(0 <= start < end < 1, "--window", f"{start} {end}", "two fractions of the run, 0 <= START < END < 1")
    for name in ("strength", "spread", "lr"):
        value = getattr(args, name)
        need(value is None or 0 < value < math.inf, f"--{name}", value, "a positive number")
    need(args.spread >= 1, "--spread", args.spread, "at least 1")
    need(all(0 <= noise < math.inf for noise in args.noise), "--noise", args.noise, "numbers from 0")
    return args


# ---------------------------------------------------------------------------------------------------------------------
# teachers: a frozen network, the same with updates of known ranks, and inputs


class Network(nn.Module):
    """x + gelu(W (scale x)) / 2 and a layer norm, once for each scale; x (n, d)."""

    def __init__(self, d, scales):
        super().__init__()
        self.scales, self.up = scales, nn.ModuleList(nn.Linear(d, d, bias=False) for _ in scales)
        for m in self.up:
            nn.init.orthogonal_(m.weight)

    def forward(self, x):
        for m, scale in zip(self.up, self.scales):
            x = F.layer_norm(x + 0.5 * F.gelu(m(scale * x)), x.shape[-1:])
        return x


@torch.no_grad()
def add_updates(model, ranks, sigmas, spread, g):
    """Adds to each weight {path: rank} a random update of that rank, with singular values from sigma / sqrt(spread) to
    sigma sqrt(spread); sigmas {path: sigma}."""
    for path, rank in ranks.items():
        weight = model.get_submodule(path).weight  # (d, k)
        u, v = (torch.linalg.qr(torch.randn(n, rank, generator=g))[0] for n in weight.shape)
        exponents = torch.rand(rank, generator=g) - 0.5
        weight += (u * (sigmas[path] * spread**exponents)) @ v.T


class Small:
    """The residual network; with `scaled`, inputs of unequal scale."""

    RANKS = (0, 8, 1, 6, 0, 8, 3, 0, 7, 2, 8, 5)
    SCALES, SIGMAS = (0.1, 3, 0.1, 3, 1, 0.1, 3, 1, 0.1, 3, 1, 1), {0.1: 1.5, 1: 0.7, 3: 0.4}

    def __init__(self, args, budget, seed, scaled=False, d=64, rows=64):
        torch.manual_seed(123 + seed)
        self.rows, self.d = rows, d
        self.base = Network(d, self.SCALES if scaled else (1,) * len(self.RANKS))
        if scaled:
            ranks = [round(8 * budget)] * len(self.RANKS)  # twice of what there will be room for: the budget of a student is halved
        else:
            ranks = [min(args.r, round(2 * budget * rank)) for rank in self.RANKS]
        self.ranks = {f"up.{i}": rank for i, rank in enumerate(ranks)}
        sigmas = {path: args.strength * (self.SIGMAS[s] if scaled else 1) for path, s in zip(self.ranks, self.base.scales)}
        self.teacher = copy.deepcopy(self.base)
        add_updates(self.teacher, self.ranks, sigmas, args.spread, torch.Generator().manual_seed(seed))

    def batch(self):
        return torch.randn(self.rows, self.d)

    def held_out(self):
        return [torch.randn(8192, self.d)]

    def outputs(self, model, x):
        """What teacher and student are to agree on: (n, d)."""
        return model(x)


class Pretrained:
    """A pretrained encoder, whose last hidden states are matched on sentences, without dropout."""

    def __init__(self, args, budget, seed):
        folder = model_folder(args.model) if args.model else HERE / "demo" / "model"
        task, train, dev = load_task("cola" if args.data else "demo", args.data)
        with contextlib.redirect_stdout(io.StringIO()):  # it says that the head is new, and there is none here
            self.base = load_encoder(folder, 2, torch.float32).eval()
        c, rng = self.base.config, np.random.default_rng(seed)
        tokenizer = load_tokenizer(folder)
        self.tokens = tokenize(tokenizer, train.texts, min(32, c.max_length), c.vocab_size)
        self.dev = tokenize(tokenizer, dev[0].texts, min(32, c.max_length), c.vocab_size)
        paths = self.base.target_paths("qkvoud")
        size = np.array([sum(self.base.get_submodule(path).weight.shape) for path in paths])
        tries = (rng.integers(0, args.r + 1, len(paths)) for _ in range(100_000))
        ranks = next(ranks for ranks in tries if abs(ranks @ size / (args.r * size.sum()) - budget) < 0.005)
        self.ranks = dict(zip(paths, ranks.tolist()))
        self.teacher = copy.deepcopy(self.base)
        add_updates(self.teacher, self.ranks, dict.fromkeys(paths, args.strength), args.spread, torch.Generator().manual_seed(seed))
        self.todo, self.rng = [], rng

    def batch(self, rows=16):
        if not self.todo:
            self.todo = batch_order([len(ids) for ids, _ in self.tokens], rows, self.rng)
        return collate([self.tokens[i] for i in self.todo.pop()], self.base.config.pad_token_id, "cpu")

    def held_out(self):
        order = batch_order([len(ids) for ids, _ in self.dev], 128)
        return [collate([self.dev[i] for i in batch], self.base.config.pad_token_id, "cpu") for batch in order]

    def outputs(self, model, x):
        """Hidden states of the tokens that are no padding: (n, d)."""
        ids, mask, _ = x
        hidden = model.hidden(*x)
        return hidden.flatten(0, 1) if mask is None else hidden[mask.bool()]


def make_teacher(name, args, budget, seed):
    return Pretrained(args, budget, seed) if name == "pretrained" else Small(args, budget, seed, name == "scaled")


# ---------------------------------------------------------------------------------------------------------------------
# one run


def install(problem, method, args, budget, seed):
    """(student, the object that takes part in its steps, groups of an optimizer) of a row of the table."""
    torch.manual_seed(seed)
    model, paths = copy.deepcopy(problem.base), list(problem.ranks)
    if method in ("SaLoRA", "SaLoRA paper"):
        recipe = sl.PAPER if method == "SaLoRA paper" else {}
        low = sl.SaLoRA(model, paths, args.steps, args.r, budget=budget, seed=seed, **(dict(window=args.window) | recipe))
        return model, low, low.param_groups(args.lr, weight_decay=0.0)
    r = max(1, round(budget * args.r)) if method == "LoRA of the size" else args.r
    name = {"AdaLoRA": "adalora", "LoRA-SVD": "lora-svd"}.get(method, "lora")
    low = baselines.install(model, name, paths, args.steps, r=r, budget=budget, window=(0.2, 0.5) if name == "adalora" else args.window)
    return model, low, [dict(params=[p for p in model.parameters() if p.requires_grad], lr=args.lr, weight_decay=0.0)]


def run(teacher, method, args, budget, noise, seed):
    """Trains a student of the teacher: what is in result.json."""
    torch.set_num_threads(1)
    args = argparse.Namespace(**vars(args) | dict(steps=args.steps or STEPS[teacher], lr=args.lr or LEARNING_RATES[teacher]))
    start, problem = time.time(), make_teacher(teacher, args, budget, seed)
    model, low, groups = install(problem, method, args, budget / 2 if teacher == "scaled" else budget, seed)
    optimizer, peaks = torch.optim.AdamW(groups, fused=True), [group["lr"] for group in groups]
    plan = SimpleNamespace(steps=args.steps, warmup=0.04 * args.steps, restart=sl.window_steps(args.window, args.steps)[1])
    with torch.no_grad():
        x = problem.batch()
        scale = noise * (problem.outputs(problem.teacher, x) - problem.outputs(problem.base, x)).square().mean().sqrt()

    for step in range(args.steps):
        for group, peak in zip(optimizer.param_groups, peaks):
            group["lr"] = peak * lr_factor(plan, step)
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
        teacher=teacher, method=method, budget=budget, noise=noise, seed=seed, relative_error=error / frozen,
        rank_error=sum(abs(found[path] - rank) for path, rank in problem.ranks.items()), true_ranks=problem.ranks, ranks=found,
        kept_params=sum(p.numel() for m in low.layers for p in m.parameters(recurse=False)), density=low.final_density,
        seconds=round(time.time() - start, 1),
        settings={name: getattr(args, name) for name in ("strength", "spread", "model", "data", "r", "window", "steps", "lr")})


def run_once(job):
    """run(*job), unless its result lies in the folder already."""
    *what, folder = job
    file = folder / "result.json"
    if not file.exists():
        result = run(*what)
        folder.mkdir(parents=True, exist_ok=True)
        write_text(file, json.dumps(result, indent=1) + "\n")
        print(f"{folder}: relative error {result['relative_error']:.4f}, rank error {result['rank_error']}, {result['seconds']:.0f} s", flush=True)
    return json.loads(file.read_text())


# ---------------------------------------------------------------------------------------------------------------------
# what comes out


def mean_each(values, form):
    """The mean, and each value where there are several."""
    text = form.format(statistics.mean(values))
    return text if len(values) == 1 else f"{text} ({' '.join(form.format(value) for value in values)})"


def tables(results):
    """A table for each {(teacher, budget, noise): {method: [result ..]}}."""
    text = []
    for (teacher, budget, noise), rows in results.items():
        first = next(iter(rows.values()))[0]
        text.append(f"{teacher}, budget {budget:g}, noise {noise:g}: {sum(first['true_ranks'].values())} of "
                    f"{first['settings']['r'] * len(first['true_ranks'])} ranks to find\n\n" + markdown(
            ["method", "relative error", "rank error", "parameters kept"],
            [[method, mean_each([r["relative_error"] for r in runs], "{:.4f}"), mean_each([r["rank_error"] for r in runs], "{:.0f}"),
              f"{max(r['kept_params'] for r in runs):,}"] for method, runs in rows.items()]))
    return "\n".join(text)


def picture(file, results):
    """True and found ranks side by side, a panel for each teacher: a bar for each matrix, a row for each method that finds ranks."""
    from paper.experiments import figure
    with figure(file, len(results), width=4.4, height=3) as axes:
        for ax, ((teacher, budget, noise), rows) in zip(axes, results.items()):
            finders = {m: runs[0] for m, runs in rows.items() if m in ("AdaLoRA", "LoRA-SVD", "SaLoRA")}
            true = list(next(iter(rows.values()))[0]["true_ranks"].values())
            width = 0.9 / (len(finders) + 1)
            for i, (label, ranks) in enumerate([("true", true), *((m, list(r["ranks"].values())) for m, r in finders.items())]):
                x = [at - 0.45 + (i + 0.5) * width for at in range(len(true))]
                ax.bar(x, ranks, width, label=label, color=("#000000", "#56b4e9", "#e69f00", "#d55e00")[i if i == 0 else 4 - len(finders) + i - 1])
            ax.set(title=f"{teacher}, b = {budget:g}", xlabel="matrix", ylabel="rank", xticks=range(0, len(true), max(1, len(true) // 12)))
            ax.grid(False)
            ax.legend(frameon=False, ncols=4, loc="upper center", bbox_to_anchor=(0.5, -0.2), fontsize=7, handlelength=1)


def main(argv):
    args = parse_args(argv)
    out, jobs = Path(args.out), []
    cells = [(t, m, b, n, s) for t in args.teachers for b in args.budgets for n in args.noise for m in args.methods for s in args.seeds]
    for teacher, method, budget, noise, seed in cells:
        folder = out / f"{teacher}-b{budget:g}-noise{noise:g}" / method.replace(" ", "_") / f"seed{seed}"
        jobs.append((teacher, method, args, budget, noise, seed, folder))
    with ProcessPoolExecutor(args.jobs, multiprocessing.get_context("spawn")) as pool:
        done = list(pool.map(run_once, jobs))
    results = {}
    for (teacher, method, budget, noise, _), result in zip(cells, done):
        results.setdefault((teacher, budget, noise), {}).setdefault(method, []).append(result)
    text = tables(results)
    print("\n" + text)
    write_text(out / "table.md", f"    python train_glue.py recover {shlex.join(argv)}\n\n{text}")
    write_text(out / "runs.jsonl", "".join(json.dumps(result) + "\n" for result in done))
    try:
        picture(out / "ranks.png", results)
        print(f"{out}/: table.md, runs.jsonl, ranks.png")
    except ImportError:
        print(f"{out}/: table.md, runs.jsonl; no picture, for which matplotlib is needed")
