"""
The numbers in README.md and results/ are those of the raw runs beside them.
"""

import csv
import json
import re
import statistics
from pathlib import Path

import pytest

from paper import experiments, recover

ROOT = Path(recover.__file__).parents[1]
RESULTS = ROOT / "results"
ERROR, RANKS = "relative_error", "rank_error"
README = [  # the first rows of README's table: teacher, share that is kept, what is shown
    ("small", 0.5, ERROR), ("small", 0.5, RANKS), ("scaled", 0.25, ERROR),
    ("pretrained", 0.5, ERROR), ("pretrained", 0.5, RANKS), ("pretrained", 0.25, ERROR),
    ("pretrained", 0.125, ERROR)]
README_TASKS = [  # the others: methods of results/tasks, columns of the table but AdaLoRA
    ("LoRA", "LoRA r 4", "LoRA-SVD", "SaLoRA"),
    ("LoRA", "LoRA r 1", "LoRA-SVD budget 0.125", "SaLoRA budget 0.125")]


def known_ranks(file):
    """{(teacher, budget, noise): {method: [result ..]}} of a file of recover's runs."""
    results = {}
    for line in file.read_text().splitlines():
        run = json.loads(line)
        key = run["teacher"], run["budget"], run["noise"]
        results.setdefault(key, {}).setdefault(run["method"], []).append(run)
    return results


def rows_of(text):
    """Cells of the rows of all tables of a file, without the marks of the best."""
    return [[cell.strip(" *") for cell in line.strip("| ").split("|")]
            for line in text.splitlines() if line.startswith("|")]


def test_readme_has_the_numbers_of_recover():
    results = known_ranks(RESULTS / "recover" / "runs.jsonl")
    section = (ROOT / "README.md").read_text().split("\n## Results\n")[1].split("\n## ")[0]
    head, _, *rows = rows_of(section)
    known = {"LoRA cut by singular values": "LoRA-SVD", "LoRA of the same size": "LoRA of the size"}
    methods = [known.get(name, name) for name in head[1:]]
    for (_, *cells), (teacher, kept, what) in zip(rows[:-2], README, strict=True):
        share = kept * (2 if teacher == "scaled" else 1)  # the flag; its student keeps half of it
        for method, cell in zip(methods, cells, strict=True):
            mean = statistics.mean(run[what] for run in results[teacher, share, 0][method])
            digits = len(cell.partition(".")[2])
            assert abs(float(cell) - mean) <= 0.5001 * 10**-digits, (teacher, method, what)
    means = {row[0]: float(row[9]) for row in rows_of((RESULTS / "tasks" / "table.md").read_text())
             if len(row) > 11 and row[0] not in ("method", "---")}
    for (_, *cells), names in zip(rows[-2:], README_TASKS, strict=True):
        assert [float(cell) for cell in cells if cell] == [round(means[name], 1) for name in names]


@pytest.mark.parametrize("table,runs", [("recover/table.md", "recover/runs.jsonl"),
                                        ("recover/minilm.md", "recover/minilm.jsonl"),
                                        ("shuffle/table.md", "shuffle/recover.jsonl")])
def test_tables_of_known_ranks_are_those_of_the_runs(table, runs):
    text = (RESULTS / table).read_text()
    shown = text[text.index("    python train_glue.py recover"):].splitlines()
    made = recover.tables(known_ranks(RESULTS / runs)).splitlines()
    assert sum(line.startswith("|") for line in made) > 4
    assert [line for line in made if line not in shown] == []
    assert [line for line in shown if line.startswith("|") and line not in made] == []


@pytest.mark.parametrize("file", sorted(RESULTS.glob("*/runs.csv")), ids=lambda f: f.parent.name)
def test_scores_are_those_of_the_runs(file):
    results = {}
    with file.open() as lines:
        for run in csv.DictReader(lines):
            key = run["task"], run["method"]
            results.setdefault(key, []).append(float(run["score"]))
    tasks, checked = [], 0
    for name, *cells in rows_of((file.parent / "table.md").read_text()):
        if name == "method":
            tasks = cells
        for task, cell in zip(tasks, cells):
            if (task, name) in results:
                assert cell == experiments.spread(results[task, name]), (task, name)
                checked += 1
    assert checked or file.parent.name == "components"  # which shows no scores


def runs_of(folder):
    """{(task, label): [run ..]}, in the order of seeds. Shuffle's are of eight tasks, half kept."""
    if folder.name == "shuffle":
        runs = map(json.loads, (folder / "tasks.jsonl").read_text().splitlines())
        runs = [run | dict(method=run["ranks_from"]) for run in runs if run["budget"] == 0.5]
    else:
        runs = csv.DictReader((folder / "runs.csv").read_text().splitlines())
    results = {}
    for run in sorted(runs, key=lambda run: int(run["seed"])):
        key = run["task"], run["method"]
        results.setdefault(key, []).append(dict(score=float(run["score"])))
    return results


@pytest.mark.parametrize("name, count", [("ablation", 2), ("shuffle", 3), ("sweep", 5),
                                         ("table1", 9), ("tasks", 13)])
def test_paired_differences_are_those_of_the_runs(name, count):
    results, head, checked = runs_of(RESULTS / name), [None], 0
    for row in rows_of((RESULTS / name / "table.md").read_text()):
        if row[-1] == "ahead in":
            head = [task for task in row[:-2] if task != "method"]
        one, _, other = row[0].partition(" - ")
        if {(head[0], one), (head[0], other)} <= {*results} and len(row) == len(head) + 3:
            chosen = {(task, m): results[task, m] for task in head for m in (one, other)}
            assert rows_of(experiments.paired_table(chosen, [(one, other)]))[-1] == row
            checked += 1
    assert checked == count


def test_readme_has_the_paired_differences_of_the_tasks():
    shown = re.findall(r"\(([+-]) ([\d.]+ ± [\d.]+)", (ROOT / "README.md").read_text())
    means = {row[0]: row[-2] for row in rows_of((RESULTS / "tasks" / "table.md").read_text())
             if " - " in row[0]}
    names = "SaLoRA - LoRA", "SaLoRA budget 0.125 - LoRA r 1"
    assert ["".join(pair) for pair in shown] == [means[name] for name in names]


def test_losses_of_the_language_model_are_those_of_the_runs():
    page, shown = RESULTS / "language" / "table.md", {}
    runs = [json.loads(line) for line in page.with_name("runs.jsonl").read_text().splitlines()]
    for name, *cells in rows_of(page.read_text()):  # one table by rates, one by sizes
        losses = [run["loss"] for run in runs
                  if run["data"] == "choose" and f"{run['lr']:g}" == name]
        if name.endswith("M"):
            size = float(name[:-1])
            losses = [run["loss"] for run in runs if run["data"] == "yelp"
                      and abs(run["kept_params"] / 1e6 - size) < 0.006]
        if losses:
            cells = re.findall(r"\d\.\d{4}", " ".join(cells))
            assert sorted(cells) == sorted(f"{loss:.4f}" for loss in losses), name
            shown[name] = len(cells)
    assert len(shown) == 10 and sum(shown.values()) == 32


def test_speed_shows_its_raw_numbers():
    raw = json.loads((RESULTS / "speed.json").read_text())
    shown = [[cell for cell in row if cell] for row in rows_of((RESULTS / "speed.md").read_text())]
    assert {"step", "loop", "start", "size", "memory", "gpu-llama"} <= set(raw)
    for row in raw.pop("gpu")["rows"]:  # shown as a table of times and one of memory
        key = [row["model"], str(row["batch"])]
        times, memory = (cells for cells in shown if cells[:2] == key)
        assert str(row["ms"]) in [cell.split(" ")[0] for cell in times], row
        assert str(row["peak MB"]) in memory, row
    for name, rows in raw.items():
        for row in rows:
            assert [str(value) for value in row.values() if value != ""] in shown, (name, row)


def test_pictures_and_tables_are_linked():
    for page in [ROOT / "README.md", *ROOT.glob("docs/*.md"), *RESULTS.glob("**/*.md")]:
        for link in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / link).exists(), (page, link)
