"""Experiments on a few steps of the demo: what is run, what is not run again, what comes out."""

import csv
import json
import subprocess

import pytest

import train_glue
from data.glue import HERE
from model import load_encoder
from paper import experiments
from training import runs as training_runs

FEW = ["--tasks", "demo", "--max-steps", "4", "--limit-train", "64", "--limit-dev", "50",
       "--threads", "1"]


@pytest.fixture
def here(monkeypatch):
    """The runs in this process instead of one each, which takes seconds to start; a list of their
    commands."""
    commands = []

    def run(command, **kw):
        commands.append(command[2:])
        train_glue.command(command[2:])
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(experiments.subprocess, "run", run)
    return commands


def go(name, out, *flags):
    train_glue.command([name, *FEW, "--out", str(out), *map(str, flags)])
    with open(out / "runs.csv") as f:
        return list(csv.DictReader(f))


def test_table1_has_all_methods_of_the_paper_and_lora_cut_by_singular_values():
    args, _ = experiments.parse_args("table1", [])
    assert [experiments.name_of(method) for method in args.methods] == [
        "FT", "Adapter-H", "Adapter-P", "Prefix", "Prompt", "LoRA", "AdaLoRA", "LoRA-SVD", "SaLoRA"]
    assert set(args.methods) == set(train_glue.METHODS) - {"head"}


@pytest.mark.slow
def test_a_rate_that_diverges_does_not_end_the_experiment_and_is_not_tried_again(tmp_path, here):
    flags = ["--methods", "head", "--seeds", "0", "--lr-grid", "1e30", "1e-3", "--max-steps", "4"]
    rows = go("table1", tmp_path, *flags)
    assert [float(row["lr"]) for row in rows] == [1e-3] and len(here) == 2  # one: how long it takes
    assert go("table1", tmp_path, *flags) == rows and len(here) == 2


@pytest.mark.slow
def test_table1_tunes_runs_and_does_nothing_twice(tmp_path, capsys):
    flags = ["--methods", "salora", "small=lora --r 4", "--seeds", "0", "1",
             "--lr-grid", "1e-3", "3e-3", "--jobs", "2"]
    rows = go("table1", tmp_path, *flags)
    text = capsys.readouterr().out
    assert "8 runs to do, about " in text and "demo, small: " in text
    assert "| method | demo | mean | trained | kept | density |" in text
    assert [(r["method"], r["seed"]) for r in rows] == [
        ("SaLoRA", "0"), ("SaLoRA", "1"), ("small", "0"), ("small", "1")]
    raw = [json.loads(line) for line in (tmp_path / "runs.jsonl").read_text().splitlines()]
    tuning = [r for r in raw if r["seed"] == training_runs.TUNING_SEED]
    assert len(raw) == 8 and len(tuning) == 4 and {r["dev_rows"][0] for r in tuning} == {50}
    assert {r["settings"]["hold_out"] for r in tuning} == {0.2}
    for method in ("salora", "lora"):
        trials = [r for r in tuning if r["method"] == method]
        best = max(trials, key=lambda r: r["score"])["settings"]["lr"]
        runs = [r for r in raw if r["method"] == method and r not in tuning]
        assert {r["settings"]["lr"] for r in runs} == {best}
    scores = {m: [100 * float(r["score"]) for r in rows if r["method"] == m]
              for m in ("SaLoRA", "small")}
    means = {m: sum(x) / 2 for m, x in scores.items()}
    best = max(means, key=means.get)
    std = abs(scores[best][0] - scores[best][1]) / 2 ** 0.5
    assert f"| {best} | **{means[best]:.2f} ± {std:.2f}** | {means[best]:.2f} |" in text
    assert "| 73,728 | " in text and "| 36,864 | 36,864 |" in text
    go("table1", tmp_path, *flags)
    assert "runs to do" not in capsys.readouterr().out
    with pytest.raises(SystemExit):
        go("table1", tmp_path, *flags, "--weight-decay", "0.5")  # these are other runs
    assert "--weight-decay 0.01, not 0.5" in capsys.readouterr().err


@pytest.mark.slow
def test_ablation_has_a_price_and_no_turn(tmp_path, here):
    rows = go("ablation", tmp_path, "--seeds", "0", "--price", "0.1", "--window", "0", "1")
    assert [r["method"] for r in rows] == ["SaLoRA", "SaLoRA price 0.1", "SaLoRA no-turn"]
    raw = map(json.loads, (tmp_path / "runs.jsonl").read_text().splitlines())
    by_kind = {(r["settings"]["price"], r["settings"]["turn"]): r for r in raw}
    assert set(by_kind) == {(None, True), (None, False), (0.1, True)}
    assert by_kind.pop((0.1, True))["density"] < 0.88  # 0.9167 at the start
    assert all(r["kept_density"] <= 0.5 for r in by_kind.values())


@pytest.mark.slow
def test_efficiency_has_memory_and_time_by_batch_size(tmp_path, here):
    rows = go("efficiency", tmp_path, "--methods", "lora", "--batch-sizes", "4", "8")
    table = (tmp_path / "table.md").read_text()
    assert [r["steps"] for r in rows] == ["4", "4"] and "demo: peak memory (MB)" in table
    assert "| method | batch 4 | batch 8 |" in table
    peaks = [f"{float(row['peak_memory_mb']):.0f}" for row in rows]
    assert f"| LoRA | {peaks[0]} | {peaks[1]} |" in table
    rows = go("efficiency", tmp_path / "named", "--methods", "small=lora --r 4",
              "--batch-sizes", "4", "8")
    assert [r["method"] for r in rows] == ["small batch-size 4", "small batch-size 8"]


@pytest.mark.slow
def test_what_is_only_scored_needs_no_estimate(tmp_path, here):
    rows = go("table1", tmp_path, "--methods", "head --epochs 0", "--seeds", "0")
    assert [(r["method"], r["steps"]) for r in rows] == [("Head epochs 0", "0")]


@pytest.mark.slow
def test_ranks_adapts_every_kind_and_every_group_of_layers_alone(tmp_path, here):
    rows = go("ranks", tmp_path, "--seeds", "0", "1")
    size = {r["method"]: int(r["trainable_params"]) for r in rows}
    assert size["LoRA"] == sum(size[f"LoRA targets {x}"] for x in "qkvoud")
    assert size["LoRA"] == size["LoRA layers 0 1"] + size["LoRA layers 2 3"]
    results = [json.loads((tmp_path / "demo" / "SaLoRA" / f"seed{i}" / "result.json").read_text())
               for i in (0, 1)]
    mean = sum(r["ranks"]["roberta.encoder.layer.3.intermediate.dense"] for r in results) / 2
    table = (tmp_path / "table.md").read_text().splitlines()
    row = [line for line in table if line.startswith("| W^U |")][0]
    assert row.split("|")[5].strip() == f"{mean:.1f}"


@pytest.mark.slow
@pytest.mark.parametrize("over,values,pairs", [
    ("r", (2, 4), {"SaLoRA r 2", "LoRA r 2", "SaLoRA r 4", "LoRA r 4"}),
    ("budget", (0.25, 0.5), {"SaLoRA budget 0.25", "LoRA r 2", "LoRA-SVD budget 0.25",
                             "SaLoRA budget 0.5", "LoRA r 4", "LoRA-SVD budget 0.5"}),
])
def test_sweep_has_lora_beside_it(tmp_path, here, over, values, pairs):
    rows = go("sweep", tmp_path, "--over", over, "--values", *values, "--seeds", "0")
    assert {r["method"] for r in rows} == pairs


def test_shuffled_ranks_stay_among_matrices_of_one_shape():
    model = load_encoder(HERE / "demo" / "model", 2)
    paths = model.target_paths("qkvoud")
    table = {path: i for i, path in enumerate(paths)}
    dealt = experiments.shuffled(table, model, 0)
    shape = {path: model.get_submodule(path).weight.shape for path in paths}
    assert [shape[paths[rank]] for rank in dealt.values()] == list(shape.values())
    assert sorted(dealt.values()) == list(table.values()) and list(dealt) == paths
    assert dealt != table and dealt != experiments.shuffled(table, model, 1)
    assert dealt == experiments.shuffled(table, model, 0)


@pytest.mark.slow
def test_shuffle_gives_lora_found_shuffled_and_equal_ranks_seed_by_seed(tmp_path, here, capsys):
    out = tmp_path / "a folder"
    flags = ["--tasks", "demo --warmup 0.5", "--seeds", "0", "3"]
    rows = go("shuffle", out, *flags)
    text = capsys.readouterr().out
    assert "2 runs of SaLoRA in all" in text and "6 runs to do, about " in text
    assert [(r["method"], r["seed"]) for r in rows] == [
        (m, s) for m in ("SaLoRA", "LoRA found", "LoRA shuffled", "LoRA equal") for s in "03"]
    runs = {(r["method"], r["seed"]): r for r in rows}
    for seed in "03":
        salora, found, mixed, equal = (
            json.loads((out / "demo" / name / f"seed{seed}" / "result.json").read_text())
            for name in ("SaLoRA", f"found_{seed}", f"shuffled_{seed}", f"equal_{seed}"))
        assert found["ranks"] == salora["ranks"] != mixed["ranks"]
        assert found["kept_params"] == mixed["kept_params"] == salora["kept_params"]
        assert set(equal["ranks"].values()) == {4} and equal["settings"]["warmup"] == 0.5
    apart = [100 * (float(runs["LoRA found", s]["score"])
                    - float(runs["LoRA shuffled", s]["score"])) for s in "03"]
    cell = f"{sum(apart) / 2:+.2f} ± {abs(apart[0] - apart[1]) / 2:.2f}"
    assert f"| LoRA found - LoRA shuffled | {cell} | {cell} | " in (out / "table.md").read_text()
    count = len(here)
    go("shuffle", out, *flags)
    assert len(here) == count


@pytest.mark.slow
def test_components_are_those_of_the_log(tmp_path, here):
    go("components", tmp_path, "--log-every", "1")
    file = tmp_path / "demo" / "SaLoRA" / "seed0" / "log.jsonl"
    log = [json.loads(line) for line in file.read_text().splitlines()]
    density = [line["density"] for line in log]
    cells = [f"{x:.4f}" for x in (density[0], min(density), max(density), density[-1])]
    assert cells[0] == "0.9167" and min(density) < 0.9
    assert f"| demo | density | {' | '.join(cells)} |" in (tmp_path / "table.md").read_text()


@pytest.mark.slow
def test_pictures_are_drawn_where_matplotlib_is(tmp_path, here, capsys):
    go("components", tmp_path, "--price", 0.001)  # so without a budget to draw
    try:
        import matplotlib  # noqa: F401
        assert (tmp_path / "components.png").stat().st_size > 10_000
    except ImportError:
        assert "no pictures, which need matplotlib" in capsys.readouterr().out
        assert not list(tmp_path.glob("*.png"))


@pytest.mark.slow
def test_a_first_cell_that_cannot_run_stops_the_experiment_in_one_line(tmp_path, capsys):
    with pytest.raises(SystemExit) as e:
        go("table1", tmp_path, "--methods", "lora --r 999", "--seeds", "0")
    text = capsys.readouterr().err
    assert e.value.code == 2 and text.count("\n") == 1
    assert text.startswith("error: demo, LoRA r 999: --r is 999, but the narrowest")


@pytest.mark.slow
def test_a_failed_cell_is_told_and_the_others_are_done(tmp_path, capsys):
    with pytest.raises(SystemExit) as e:
        go("table1", tmp_path, "--methods", "head", "lora --r 999", "--seeds", "0")
    text = capsys.readouterr()
    assert e.value.code == 2 and "--r is 999" in text.err and "1 cells failed" in text.err
    assert (tmp_path / "demo" / "Head" / "seed0" / "result.json").exists()


@pytest.mark.parametrize("name,flags,words", [
    ("table1", ["--methods", "loha"], "invalid choice: 'loha' (choose from"),
    ("table1", ["--tasks", "colla"], "--task is 'colla', expected one of cola"),
    ("ranks", ["--budget", "2"], "--budget is 2.0"),
    ("ranks", ["--targets", "q", "v"], "--targets or --layers is given, expected none"),
    ("table1", ["--seed", "1"], "--seed is for a single run"),
    ("table1", ["--seed=1"], "--seed is for a single run"),
    ("table1", ["--task", "cola"], "--task is for a single run; table1 takes --tasks"),
    ("sweep", [], "--over"),
    ("sweep", ["--over", "alpha"], "invalid choice: 'alpha'"),
    ("ablation", ["--nonsense"], "unrecognized arguments: --nonsense"),
    ("shuffle", ["--budget", "0.1"], "--budget is 0.1, expected at least 1 / 8"),
    ("shuffle", ["--adapter", "some"], "--adapter is given, expected none"),
    ("sweep", ["--over", "budget", "--adapter", "some"], "--adapter is given, expected none"),
    ("components", ["--jobs", "0"], "--jobs is 0"),
    ("ranks", ["--targets", "x"], "invalid choice: 'x'"),
    ("efficiency", ["--window", "0.5", "0.2"], "--window is 0.5 0.2"),
    ("table1", ["--methods", "lora", ""], "argument --methods: empty, expected a value"),
    ("table1", ["--methods", "a=lora", "a=lora --r 4"],
     "demo with a is given twice: name methods that differ"),
    ("table1", ["--methods", "small="], "has an empty entry"),
    ("table1", ["--methods", "lora", "--out", "/dev/null"], "--out /dev/null: cannot be"),
    ("table1", ["--methods", "lora '"], "unrecognized arguments: '"),
])
def test_bad_flags_end_in_one_line_before_anything_is_run(
        name, flags, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as e:
        train_glue.command([name, "--tasks", "demo", *flags])
    captured = capsys.readouterr()
    assert e.value.code == 2 and words in captured.err and captured.err.count("\n") == 1
    assert not list(tmp_path.iterdir())
