"""
SaLoRA beside full fine-tuning and LoRA on five GLUE tasks. Every run is one train_glue.py command; its result.json becomes a line of
results/recipe.jsonl, and what has a line there is not run again, so a stopped experiment goes on where it was.

    python experiments.py tune   --model DIR --data DIR    # learning rates: another seed, scored on rows held out of train
    python experiments.py report --model DIR --data DIR    # at the best of them: five seeds, scored on the dev set
    python experiments.py table                            # results/recipe.md from the lines
"""

import argparse
import json
import shlex
import statistics
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).parent
LINES, TABLE = HERE / "results" / "recipe.jsonl", HERE / "results" / "recipe.md"
TASKS = {  # what is trained on; how many rows of it are held out when a learning rate is chosen
    "cola": ("--epochs 4", 1500),
    "sst2": ("--epochs 2 --limit-train 10000", 3000),
    "mrpc": ("--epochs 3", 700),
    "stsb": ("--epochs 3", 1000),
    "rte": ("--epochs 4", 500),
}
SYSTEMS = {  # flags; the learning rates to choose from, or the system whose choice is taken over
    "FT": ("--method ft", ["5e-5", "1e-4", "2e-4"]),
    "LoRA r = 8": ("--method lora --dtype bfloat16", ["1e-3", "2e-3", "4e-3"]),
    "LoRA r = 4": ("--method lora --r 4 --dtype bfloat16", "LoRA r = 8"),
    "SaLoRA b = 0.5": ("--method salora --dtype bfloat16", ["1e-3", "2e-3", "4e-3"]),
    "SaLoRA b = 0.25": ("--method salora --budget 0.25 --dtype bfloat16", "SaLoRA b = 0.5"),
    "SaLoRA b = 0.125": ("--method salora --budget 0.125 --dtype bfloat16", "SaLoRA b = 0.5"),
    "SaLoRA as printed": ("--method salora --recipe paper --dtype bfloat16", ["1e-3", "2e-3", "4e-3"]),
}
TUNING_SEED, SEEDS = 100, range(5)


def read_lines():
    """{command: result} of the runs that are done."""
    return {r["command"]: r for r in map(json.loads, LINES.read_text().splitlines())} if LINES.exists() else {}


def tuning(system):
    """{task: {learning rate: command}} of the system's tuning runs."""
    flags, rates = SYSTEMS[system]
    return {task: {lr: f"--task {task} {what} --hold-out {hold_out} {flags} --lr {lr} --seed {TUNING_SEED}" for lr in rates}
            for task, (what, hold_out) in TASKS.items()}


def best_rate(system, task, done):
    """The learning rate with the best score on the held-out rows; None while runs are missing."""
    if isinstance(SYSTEMS[system][1], str):
        return best_rate(SYSTEMS[system][1], task, done)
    commands = tuning(system)[task]
    if all(c in done for c in commands.values()):
        return max(commands, key=lambda lr: done[commands[lr]]["score"])


def report(system, task, done):
    """[command] of the system's five runs on a task; empty while its learning rate is not known."""
    lr = best_rate(system, task, done)
    return [f"--task {task} {TASKS[task][0]} {SYSTEMS[system][0]} --lr {lr} --seed {seed}" for seed in SEEDS] if lr else []


def run(command, args):
    """Runs train_glue.py and appends its result.json, with the command, to the lines. True if it went well."""
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run([sys.executable, HERE / "train_glue.py", *shlex.split(command), "--model", args.model, "--data", args.data,
                               "--threads", str(args.threads), "--out", folder], capture_output=True, text=True)
        if done.returncode:
            print(f"train_glue.py {command}\n{done.stdout[-500:]}{done.stderr[-2000:]}", file=sys.stderr)
            return False
        result = json.loads((Path(folder) / "result.json").read_text())
    for name in ("model", "data"):  # folders of one machine
        result["settings"].pop(name)
    result = dict(command=command, **result | dict(model=Path(args.model).name))
    with LINES.open("a") as f:
        f.write(json.dumps(result) + "\n")
    print(f"{result['score']:.4f} in {result['seconds']:.0f} s: {command}", flush=True)
    return True


def table(done):
    """The tables of the lines, as Markdown."""
    tasks = list(TASKS)
    head = ["# SaLoRA beside full fine-tuning and LoRA", "",
            "    python experiments.py tune --model MINILM_FOLDER --data GLUE_FOLDER", "    python experiments.py report --model MINILM_FOLDER --data GLUE_FOLDER", "",
            "Mean ± standard deviation over seeds, dev set, last epoch. CoLA: Matthews correlation, SST-2, MRPC, RTE: accuracy, STS-B: Pearson; all times 100. "
            "Number of runs in brackets where it is not five. Difference: to LoRA r = 8, seed by seed, mean over the tasks ± standard error over the seeds.", "",
            "| system | " + " | ".join(tasks) + " | mean | difference | parameters |", "|---" * (len(tasks) + 4) + "|"]
    runs = {(s, t): [done[c] for c in report(s, t, done) if c in done] for s in SYSTEMS for t in tasks}
    rows, scores = [], {key: [100 * r["score"] for r in found] for key, found in runs.items()}
    for system in SYSTEMS:
        cells, kept = [], {r["kept_params"] for t in tasks for r in runs[system, t]}
        for t in tasks:
            x = scores[system, t]
            cells.append(f"{statistics.mean(x):.2f} ± {statistics.stdev(x):.2f}" + f" ({len(x)})" * (len(x) != len(SEEDS)) if len(x) > 1 else "")
        mean = difference = ""
        if all(len(scores[s, t]) == len(SEEDS) for s in (system, "LoRA r = 8") for t in tasks):
            mean = f"{statistics.mean(statistics.mean(scores[system, t]) for t in tasks):.2f}"
            paired = [statistics.mean(scores[system, t][i] - scores["LoRA r = 8", t][i] for t in tasks) for i in range(len(SEEDS))]
            difference = f"{statistics.mean(paired):+.2f} ± {statistics.stdev(paired) / len(paired) ** 0.5:.2f}"
        size = f"{min(kept):,}" + f" to {max(kept):,}" * (len(kept) > 1) if kept else ""
        if any(cells):
            rows.append(f"| {system} | " + " | ".join(cells) + f" | {mean} | {difference} | {size} |")
    text = (head + rows if rows else head[:-2] + ["No run of these yet."]) + ["", "Flags of the systems, and the learning rate that was best on held-out rows (another seed; held-out score times 100 of every rate tried):", "",
             "| system | flags | " + " | ".join(tasks) + " |", "|---" * (len(tasks) + 2) + "|"]
    for system, (flags, rates) in SYSTEMS.items():
        cells = [f"as {rates}"] * len(tasks) if isinstance(rates, str) else [
            ", ".join(f"{lr}: {100 * done[c]['score']:.1f}" for lr, c in tuning(system)[t].items() if c in done) for t in tasks]
        text.append(f"| {system} | `{flags}` | " + " | ".join(cells) + " |")
    return "\n".join(text) + "\n"


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=["tune", "report", "table"])
    parser.add_argument("--model", help="folder of all-MiniLM-L6-v2, or another encoder")
    parser.add_argument("--data", help="folder in GLUE's layout")
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, default=list(SYSTEMS), metavar="NAME", help=f"some of: {'; '.join(SYSTEMS)}")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time (default: 2)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of each (default: 1)")
    args = parser.parse_args(argv)
    if args.stage != "table" and not (args.model and args.data):
        parser.error(f"{args.stage} needs --model and --data")
    done = read_lines()
    if args.stage == "tune":
        commands = [c for t in TASKS for s in args.systems if not isinstance(SYSTEMS[s][1], str) for c in tuning(s)[t].values()]
    elif args.stage == "report":
        reports = filter(None, (report(s, t, done) for t in TASKS for s in args.systems))
        commands = [c for group in zip(*reports) for c in group]  # seed by seed
    else:
        TABLE.write_text(table(done))
        return print(f"{TABLE}: {len(done)} runs")
    todo = [c for c in commands if c not in done]
    print(f"{len(todo)} of {len(commands)} runs to do", flush=True)
    with ThreadPoolExecutor(args.jobs) as pool:
        ok = list(pool.map(lambda c: run(c, args), todo))
    if not all(ok):
        sys.exit(f"{ok.count(False)} runs failed; the others are in {LINES}")


if __name__ == "__main__":
    main()
