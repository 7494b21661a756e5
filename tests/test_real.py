"""
Real weights, real data: a few hundred steps of MiniLM on CoLA. MODELS and GLUE name the folders;
.ci/run sets both.
"""

import csv
import json
import os
from pathlib import Path

import pytest

import train_glue
from data import metrics
from data.glue import load_task

pytestmark = pytest.mark.skipif("MODELS" not in os.environ or "GLUE" not in os.environ,
                                reason="MODELS and GLUE name no folders of real models and data")


@pytest.fixture(scope="module", params=["salora", "lora"])
def run(request, tmp_path_factory):
    out = tmp_path_factory.mktemp("real") / request.param
    train_glue.main(["--task", "cola", "--model", f"{os.environ['MODELS']}/minilm",
                     "--data", os.environ["GLUE"], "--method", request.param, "--max-steps", "300",
                     "--lr", "1e-3", "--log-every", "5", "--out", str(out)])
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return out, json.loads((out / "result.json").read_text()), lines


def test_score_is_reported_on_all_1043_dev_rows(run):
    out, result, _ = run
    with open(out / "predictions.tsv", newline="") as f:
        rows = list(csv.DictReader(f, delimiter="\t"))
    gold = [line.split("\t")[1]
            for line in (Path(os.environ["GLUE"]) / "CoLA" / "dev.tsv").read_text().splitlines()]
    assert len(rows) == 1043 and [row["label"] for row in rows] == gold
    assert result["dev_rows"] == [1043]
    score = metrics.matthews_correlation([int(row["label"]) for row in rows],
                                         [int(row["prediction"]) for row in rows])
    assert result["metric"] == "matthews_correlation"
    assert score == pytest.approx(result["score"], abs=1e-12)


def test_the_task_is_being_learned(run):
    losses = [line["task_loss"] for line in run[2]]
    assert sum(losses[-10:]) < sum(losses[1:11]) and run[1]["steps"] == 300


def test_parameters_are_the_published_arithmetic(run):
    d, inner, layers, r = 384, 1536, 6, 8
    assert run[1]["trainable_params"] == r * layers * (4 * 2 * d + 2 * (d + inner)) == 331_776
    assert run[1]["head_params"] == d * d + d + 2 * d + 2


def test_budget_density_lambda_and_orthogonality(run):
    out, result, lines = run
    if result["method"] == "lora":
        assert result["kept_params"] == 331_776 and {line["lambda"] for line in lines} == {0}
        return
    # the budget: no other triplet would fit, and never above
    assert 0 <= 331_776 // 2 - result["kept_params"] < 2 * 384
    assert lines[0]["density"] == pytest.approx(11 / 12, abs=1e-6) and result["density"] < 0.6
    lams = [line["lambda"] for line in lines]
    assert lams == sorted(lams) and lams[0] == 0 and lams[-1] > 0
    opened = next(line for line in lines if line["step"] >= 150)
    assert opened["orth_a"] < 0.2 * lines[0]["orth_a"]  # A's rows have just become orthonormal
    assert lines[-1]["orth_b"] < 0.9 * lines[0]["orth_b"]
    assert len(set(result["ranks"].values())) > 3


@pytest.mark.parametrize("name,train,dev", [
    ("cola", 8551, [1043]),
    ("sst2", 67349, [872]),
    ("mrpc", 3668, [408]),
    ("stsb", 5749, [1500]),
    ("rte", 2490, [277]),
    ("wnli", 635, [71]),
    ("qnli", 9999, [5463]),
    ("qqp", 20000, [3497]),
    ("mnli", 8999, [1000, 1000]),
])
def test_every_row_of_every_task_is_read(name, train, dev, tmp_path):
    """The whole files of GLUE, or of QNLI, QQP and MNLI the parts that there are."""
    for folder in Path(os.environ["GLUE"]).iterdir():
        (tmp_path / folder.name.split("_")[0]).mkdir()
        for file in folder.iterdir():
            (tmp_path / folder.name.split("_")[0] / file.name).symlink_to(file)
    mismatched = tmp_path / "MNLI" / "tokenized_dev_mismatched.tsv"
    mismatched.rename(tmp_path / "MNLI" / "dev_mismatched.tsv")
    task, rows, dev_sets = load_task(name, tmp_path)
    assert len(rows.texts) == len(rows.labels) == train and [len(d.texts) for d in dev_sets] == dev
    for part in (rows, *dev_sets):
        assert all(text.strip() for texts in part.texts for text in texts)
        if task.labels:
            assert set(part.labels) == set(range(len(task.labels)))
        else:
            assert min(part.labels) >= 0 and max(part.labels) <= 5
