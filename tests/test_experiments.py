"""experiments.py on the demo: tuning, report and table, and what is done is not done again."""

import json

import pytest

import experiments
from data.glue import HERE


@pytest.fixture
def small(tmp_path, monkeypatch):
    monkeypatch.setattr(experiments, "LINES", tmp_path / "lines.jsonl")
    monkeypatch.setattr(experiments, "TABLE", tmp_path / "table.md")
    monkeypatch.setattr(experiments, "TASKS", {"demo": ("--max-steps 3 --limit-train 64 --limit-dev 50", 100)})
    monkeypatch.setattr(experiments, "SYSTEMS", {"LoRA r = 8": ("--method lora", ["1e-3", "3e-3"]), "SaLoRA b = 0.5": ("--method salora", "LoRA r = 8")})
    monkeypatch.setattr(experiments, "SEEDS", range(2))
    return tmp_path


def go(stage):
    experiments.main([stage, "--model", str(HERE / "demo" / "model"), "--data", str(HERE)])


def test_tune_then_report_then_table_and_nothing_twice(small, capsys):
    go("report")
    assert "0 of 0 runs to do" in capsys.readouterr().out  # no learning rate is known yet
    go("tune")
    lines = [json.loads(line) for line in (small / "lines.jsonl").read_text().splitlines()]
    assert [r["settings"]["lr"] for r in lines] in ([1e-3, 3e-3], [3e-3, 1e-3]) and {r["settings"]["hold_out"] for r in lines} == {100}
    best = max(lines, key=lambda r: (r["score"], -r["settings"]["lr"]))["settings"]["lr"]
    go("report")
    runs = [json.loads(line) for line in (small / "lines.jsonl").read_text().splitlines()][2:]
    assert {(r["method"], r["seed"], r["settings"]["lr"], r["settings"]["hold_out"]) for r in runs} == {(m, s, best, None) for m in ("lora", "salora") for s in (0, 1)}
    assert all(r["model"] == "model" and str(HERE) not in json.dumps(r) for r in lines + runs)
    capsys.readouterr()
    go("report")
    assert "0 of 4 runs to do" in capsys.readouterr().out
    experiments.main(["table"])
    scores = [100 * r["score"] for r in runs if r["method"] == "salora"]
    row = next(line for line in (small / "table.md").read_text().splitlines() if line.startswith("| SaLoRA b = 0.5 | ") and "±" in line)
    assert f"{sum(scores) / 2:.2f} ± " in row and "73,728" not in row


def test_a_failed_run_is_told_and_leaves_no_line(small, monkeypatch, capsys):
    monkeypatch.setattr(experiments, "SYSTEMS", {"LoRA r = 8": ("--method lora --r 9999", ["1e-3"])})
    with pytest.raises(SystemExit, match="1 runs failed"):
        go("tune")
    assert "--r 9999" in capsys.readouterr().err and not (small / "lines.jsonl").exists()
