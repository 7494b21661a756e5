"""
The experiment with known ranks: the small teacher is found, the tables say what was run, nothing is
run twice.
"""

import json

import pytest
import torch
import torch.nn.functional as F

import train_glue
from paper import recover


def args(*flags):
    return recover.parse_args(["--steps", "300", *flags])


@pytest.mark.slow
def test_known_ranks_are_found_and_a_lora_of_the_size_is_far_behind():
    found = recover.run("small", "SaLoRA", args(), 0.5, 0.0, seed=0)
    lora = recover.run("small", "LoRA of the size", args(), 0.5, 0.0, seed=0)
    assert sum(found["true_ranks"].values()) == 48 and found["rank_error"] <= 2
    assert found["relative_error"] < lora["relative_error"] / 10
    assert found["kept_params"] == lora["kept_params"] == 48 * 128


@pytest.mark.slow
def test_a_lora_with_the_true_ranks_is_ahead_of_one_with_the_same_shuffled():
    true, mixed = (recover.run("small", f"LoRA true {how}", args(), 0.5, 0.0, seed=0)
                   for how in ("ranks", "shuffled"))
    assert true["ranks"] == true["true_ranks"] != mixed["ranks"]
    assert true["kept_params"] == mixed["kept_params"] == 48 * 128
    assert true["relative_error"] < mixed["relative_error"] / 3
    found = recover.run("small", "LoRA found ranks", args("--steps", "20"), 0.5, 0.0, seed=0)
    salora = recover.run("small", "SaLoRA", args("--steps", "20"), 0.5, 0.0, seed=0)
    assert found["ranks"] == salora["ranks"]


@pytest.mark.parametrize("teacher", recover.TEACHERS)
def test_a_teacher_is_its_base_plus_updates_of_the_ranks_it_names(teacher):
    problem = recover.make_teacher(teacher, args("--spread", "3"), 0.5, seed=1)
    for path, rank in problem.ranks.items():
        after, before = (m.get_submodule(path).weight for m in (problem.teacher, problem.base))
        sigma = torch.linalg.svdvals((after - before).detach())
        assert (sigma > 1e-4).sum() == rank
        if rank > 1:
            assert sigma[0] / sigma[rank - 1] <= 3.001
    x = problem.batch()
    assert F.mse_loss(problem.outputs(problem.base, x), problem.outputs(problem.teacher, x)) > 0.01


@pytest.mark.slow
def test_table_and_runs_and_nothing_is_run_again(tmp_path, capsys):
    flags = ["recover", "--teachers", "small", "pretrained", "--methods", "LoRA", "SaLoRA",
             "--steps", "10", "--seeds", "0", "1", "--jobs", "1", "--out", str(tmp_path)]
    train_glue.main(flags)
    text = capsys.readouterr().out
    runs = [json.loads(line) for line in (tmp_path / "runs.jsonl").read_text().splitlines()]
    assert [(r["teacher"], r["method"], r["seed"]) for r in runs] == [
        (t, m, s) for t in ("small", "pretrained") for m in ("LoRA", "SaLoRA") for s in (0, 1)]
    errors = [r["relative_error"] for r in runs[:2]]
    cell = f"{sum(errors) / 2:.4f} ({errors[0]:.4f} {errors[1]:.4f})"
    assert f"| LoRA | {cell} | 48 (48 48) | 12,288 |" in text
    table = text.split("\n\n", 1)[1].split(f"{tmp_path}/: ")[0].strip()
    assert table in (tmp_path / "table.md").read_text()
    train_glue.main(flags)
    assert "relative error 0" not in capsys.readouterr().out.split("small, budget")[0]


@pytest.mark.parametrize("flags,words", [
    (["--teachers", "large"], "invalid choice: 'large'"),
    (["--budgets", "0.05"], "--budgets is 0.05, expected shares in (0.0625, 1]"),
    (["--budgets", "0", "--teachers", "pretrained"], "expected shares in (0, 1]"),
    (["--r", "65"], "--r is 65, expected at most 64"),
    (["--window", "0.5", "1"], "--window is 0.5 1.0"),
    (["--noise", "-1"], "--noise is [-1.0]"),
    (["--spread", "0.5"], "--spread is 0.5"),
    (["--steps", "1"], "--steps is 1, expected at least 2"),
    (["--lr", "nan"], "--lr is nan"),
    (["--seeds", "0", "0"], "--seeds is [0, 0], expected different numbers from 0"),
])
def test_bad_flags_end_in_one_line(flags, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as e:
        train_glue.command(["recover", *flags])
    captured = capsys.readouterr()
    assert e.value.code == 2 and words in captured.err and captured.err.count("\n") == 1
    assert not list(tmp_path.iterdir())
