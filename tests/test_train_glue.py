"""
The command line, from flags to files. Most runs here are a few steps of the demo; one is the demo
as a user sees it.
"""

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import train_glue
from adapter import load, merge_folder
from data import InputError, metrics
from data.glue import HERE, load_task
from model import load_encoder
from salora import ranks
from training.flags import NOT_OF_A_RUN, new_parser
from training.loop import announce, lr_factor, schedule
from training.runs import CHECKPOINT

ROOT = Path(train_glue.__file__).parent
SHORT = ["--limit-train", "200", "--limit-dev", "90", "--epochs", "2", "--log-every", "1",
         "--threads", "1", "--window", "0.2", "0.5"]  # of 14 steps the window is steps 3 to 6


def slow(*values):
    """A case of a table that is left out with the slow tests."""
    return pytest.param(*values, marks=pytest.mark.slow)


def run(out, *flags):
    train_glue.main([*SHORT, "--out", str(out), *map(str, flags)])
    return json.loads((out / "result.json").read_text())


def log(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def predictions(out):
    lines = (out / "predictions.tsv").read_text().splitlines()
    return lines[0].split("\t"), [line.split("\t") for line in lines[1:]]


@pytest.fixture(scope="module")
def short(tmp_path_factory):
    out = tmp_path_factory.mktemp("short") / "run"
    return out, run(out)


# ---- the demo as a user sees it


@pytest.mark.slow
def test_demo_is_learned_through_the_adapter(tmp_path):
    text = subprocess.run([sys.executable, ROOT / "train_glue.py", "--out", tmp_path / "salora"],
                          capture_output=True, text=True, check=True, cwd=tmp_path).stdout
    salora = json.loads((tmp_path / "salora" / "result.json").read_text())
    train_glue.main(["--method", "head", "--out", str(tmp_path / "head"), "--epochs", "3"])
    head = json.loads((tmp_path / "head" / "result.json").read_text())
    assert salora["score"] > max(0.75, head["score"] + 0.15)  # a majority vote scores 0
    assert 0.49 < salora["kept_density"] <= 0.5 and salora["density"] == pytest.approx(0.5, abs=0.1)
    assert max(salora["ranks"].values()) - min(salora["ranks"].values()) >= 3  # visibly uneven
    for words in ("on 1000 dev rows", "budget 0.5", "adapter parameters (", "W^Q", "W^D",
                  "adapter/", "next: "):
        assert words in text, words


# ---- files of a run


def test_result_has_every_field(short):
    out, result = short
    assert {"task", "model", "method", "seed", "metric", "score", "metrics", "best_score",
            "trainable_params", "kept_params", "head_params", "budget", "density", "kept_density",
            "ranks", "steps", "seconds", "examples_per_second", "peak_memory_mb",
            "settings"} <= set(result)
    assert (result["task"], result["method"], result["seed"]) == ("demo", "salora", 0)
    assert (result["metric"], result["steps"]) == ("matthews_correlation", 14)
    d, inner, layers = 128, 512, 4
    assert result["trainable_params"] == 8 * layers * (4 * 2 * d + 2 * (d + inner))
    assert result["head_params"] == d * d + d + 2 * d + 2
    table = result["ranks"]
    wide = {path for path in table if path.endswith("intermediate.dense")
            or path.endswith("output.dense") and "attention" not in path}
    assert len(table) == 24
    assert result["kept_params"] == sum(r * (d + inner if path in wide else 2 * d)
                                        for path, r in table.items())
    assert result["kept_density"] == result["kept_params"] / result["trainable_params"] <= 0.5
    assert result["best_score"] >= result["score"] == result["metrics"]["matthews_correlation"]
    assert set(vars(train_glue.parse_args([]))) - set(NOT_OF_A_RUN) <= set(result["settings"])


def test_log_has_every_field_and_the_method_shows_in_it(short):
    lines = log(short[0])
    assert [line["step"] for line in lines] == list(range(14))
    assert all({"step", "epoch", "loss", "task_loss", "lr", "density", "lambda", "orth_a", "orth_b",
                "tokens_per_second"} == set(line) for line in lines)
    assert lines[0]["density"] == pytest.approx(11 / 12, abs=1e-6)
    assert lines[-1]["density"] == pytest.approx(short[1]["kept_density"], abs=1e-6)
    lams = [line["lambda"] for line in lines]
    assert lams[0] == 0 and lams[-1] > 0 and lams == sorted(lams)
    assert lines[0]["orth_b"] == pytest.approx(8, abs=0.1)  # B starts at zero: |0 - I|^2 = r
    assert lines[1]["orth_a"] > 0.1 and lines[2]["orth_a"] < 1e-6  # the window opens: the turn
    paid = [line["step"] for line in lines if line["loss"] != line["task_loss"]]
    assert paid == [4, 5, 6]  # in the window, once lambda is above 0
    assert lines[-1]["epoch"] == 2


def test_held_out_rows_are_scored_instead_of_dev(tmp_path, capsys):
    result = run(tmp_path / "r", "--hold-out", "50", "--max-steps", "2")
    rows = {row[1] for row in predictions(tmp_path / "r")[1]}
    assert result["dev_rows"] == [50] and len(predictions(tmp_path / "r")[1]) == 50
    assert rows == {"0", "1"}
    assert "on 50 held-out rows" in capsys.readouterr().out and result["settings"]["hold_out"] == 50


@pytest.mark.slow
def test_learning_rate_falls_linearly_and_starts_again_after_the_window(tmp_path, short):
    fall = [3e-3 * (14 - step) / 13 for step in range(14)]  # after one step of warm-up
    fall[0] = 3e-3
    again = [3e-3 * (14 - step) / 7 for step in range(7, 14)]
    assert [line["lr"] for line in log(short[0])] == pytest.approx(fall[:7] + again)
    for name, flags in dict(lora=["--method", "lora"], once=["--no-rewarm"]).items():
        run(tmp_path / name, *flags)
        assert [line["lr"] for line in log(tmp_path / name)] == pytest.approx(fall)


def test_predictions_are_the_dev_rows_in_file_order_and_give_the_score(short):
    out, result = short
    header, rows = predictions(out)
    assert header == ["index", "label", "prediction", "logit_0", "logit_1"]
    assert [int(r[0]) for r in rows] == list(range(90))
    assert [int(r[1]) for r in rows] == load_task("demo", limit_dev=90)[2][0].labels
    assert all(int(r[2]) == (float(r[4]) > float(r[3])) for r in rows)
    score = metrics.matthews_correlation([int(r[1]) for r in rows], [int(r[2]) for r in rows])
    assert score == pytest.approx(result["score"], abs=1e-12)


def test_adapter_folder_gives_the_predictions_of_the_run(short):
    out, result = short
    model = load(load_encoder(HERE / "demo" / "model", 2), out / "adapter").eval()
    args = train_glue.parse_args([])
    tokenizer = train_glue.load_tokenizer(args.model)
    rows = train_glue.tokenize(tokenizer, load_task("demo", limit_dev=90)[2][0].texts, 64, 10_000)
    logits = train_glue.evaluate(model, rows, 1, "cpu")
    assert np.allclose(logits, [[float(x) for x in r[3:]] for r in predictions(out)[1]], atol=1e-4)
    assert ranks(model) == result["ranks"]


# ---- the names of labels, from files of data and model folders to those that are written

LABELS = ["fair", "good", "poor"]  # in the order of outputs: sorted


@pytest.fixture(scope="module")
def named(tmp_path_factory):
    """A task of one's own with names for labels; a model folder with a head for them, and the same
    with its outputs in another order, named by config.json as roberta-large-mnli's are."""
    here = tmp_path_factory.mktemp("named")
    (here / "data").mkdir()
    for name, n in (("train.tsv", 40), ("dev.tsv", 30)):
        rows = [f"Mary saw {'dogs ' * (i % 7)}.\t{LABELS[i % 3]} \n" for i in range(n)]
        (here / "data" / name).write_text("sentence\tlabel\n" + "".join(rows))
    torch.manual_seed(0)
    model = load_encoder(HERE / "demo" / "model", 3)
    torch.nn.init.normal_(model.classifier.out_proj.weight)
    weights = model.state_dict()
    for name, order in dict(straight=[0, 1, 2], other=[2, 0, 1]).items():
        shutil.copytree(HERE / "demo" / "model", here / name)
        rows = {key: t[order] if "out_proj" in key else t for key, t in weights.items()}
        save_file(rows, here / name / "model.safetensors", metadata={"format": "pt"})
        name_outputs(here / name, [LABELS[i].upper() for i in order])
    return here


def name_outputs(folder, names):
    config = json.loads((folder / "config.json").read_text())
    config["id2label"] = {str(i): name for i, name in enumerate(names)}
    (folder / "config.json").write_text(json.dumps(config))


HEAD = ["--method", "head", "--epochs", "0"]  # scores what is there


def test_a_trained_head_is_read_by_the_names_of_its_outputs(named, tmp_path, capsys):
    for name in ("straight", "other"):
        result = run(tmp_path / name, "--task", named / "data", "--model", named / name, *HEAD)
        assert result["labels"] == LABELS and result["columns"] == ["sentence"]
        said = "its head gives POOR, FAIR, GOOD; put into the order of the task, fair, good, poor"
        assert (said in capsys.readouterr().out) == (name == "other")
    assert predictions(tmp_path / "straight") == predictions(tmp_path / "other")
    rows = predictions(tmp_path / "other")[1]
    assert [row[1] for row in rows] == [LABELS[i % 3] for i in range(30)]
    assert all(row[2] == LABELS[np.argmax([float(x) for x in row[3:]])] for row in rows)


@pytest.mark.parametrize("names,words", [
    (["LABEL_0", "LABEL_1", "LABEL_2"], "its head gives LABEL_0, LABEL_1, LABEL_2; used, in this"),
    (["a", "b", "poor"], "its head gives a, b, poor; used, in this order, as fair, good, poor"),
    (["good", "bad", "poor"], None),
])
def test_outputs_of_other_names_are_taken_as_they_are_unless_some_are_in_the_wrong_place(
        names, words, named, tmp_path, capsys):
    folder = shutil.copytree(named / "straight", tmp_path / "model")
    name_outputs(folder, names)
    flags = ["--task", named / "data", "--model", folder, *HEAD]
    if words:
        run(tmp_path / "r", *flags)
        assert words in capsys.readouterr().out
        run(tmp_path / "straight", "--task", named / "data", "--model", named / "straight", *HEAD)
        assert predictions(tmp_path / "r") == predictions(tmp_path / "straight")
    else:
        with pytest.raises(InputError, match="its head gives good, bad, poor, expected the labels"):
            run(tmp_path / "r", *flags)
        assert not (tmp_path / "r").exists()


@pytest.mark.slow
def test_gates_go_on_from_an_adapter_with_matrices_of_rank_0(tmp_path):
    run(tmp_path / "a", "--r", 1, "--max-steps", 4, "--window", 0.25, 0.5)
    flags = ["--adapter", tmp_path / "a" / "adapter", "--max-steps", 4, "--window", 0.25, 0.5]
    result = run(tmp_path / "b", *flags)  # makes its page, which wants gates of all matrices
    before = json.loads((tmp_path / "a" / "result.json").read_text())["ranks"]
    gates = json.loads((tmp_path / "b" / "gates.jsonl").read_text().splitlines()[0])["open"]
    for (path, rank), row in zip(result["ranks"].items(), gates, strict=True):
        assert rank <= before[path] and any(row) == before[path]
    assert (tmp_path / "b" / "report.html").exists() and 0 in before.values()


def test_names_go_with_an_adapter_into_the_merged_model_and_the_next_run(named, tmp_path, capsys):
    flags = ["--task", named / "data", "--model", named / "other"]
    run(tmp_path / "r", *flags, "--method", "lora", "--max-steps", 2)
    merge_folder(named / "other", tmp_path / "r" / "adapter", tmp_path / "m")
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    assert config["id2label"] == dict(zip("012", LABELS))
    assert config["label2id"] == dict(zip(LABELS, range(3)))
    again = run(tmp_path / "again", *flags, "--adapter", tmp_path / "r" / "adapter", "--epochs", 0)
    assert again["score"] == json.loads((tmp_path / "r" / "result.json").read_text())["score"]
    assert "its head" not in capsys.readouterr().out.split("settings: ")[-1]
    # for a task with the labels in another order
    data = shutil.copytree(named / "data", tmp_path / "data")
    for file in data.iterdir():
        file.write_text(file.read_text().replace("fair", "satisfying"))
    known = json.loads((tmp_path / "r" / "adapter" / "salora.json").read_text())
    assert known["labels"] == LABELS
    known["labels"][0] = "satisfying"
    (tmp_path / "r" / "adapter" / "salora.json").write_text(json.dumps(known))
    moved = run(tmp_path / "moved", "--task", data, *flags[2:], "--adapter",
                tmp_path / "r" / "adapter", "--epochs", 0)
    assert moved["labels"] == ["good", "poor", "satisfying"] and moved["score"] == again["score"]
    assert "adapter: its head gives satisfying, good, poor; put into" in capsys.readouterr().out


# ---- predictions for other texts


def predict(capsys, *flags):
    """What the command prints: names of the columns, and rows of cells."""
    capsys.readouterr()
    train_glue.command(["predict", *map(str, flags)])
    captured = capsys.readouterr()
    header, *rows = [line.split("\t") for line in captured.out.splitlines()]
    return header, rows


@pytest.fixture(scope="module")
def runs_of(tmp_path_factory, short):
    """{method: folder of a run}, made when it is first asked for."""
    made = {"salora": short[0]}

    def get(method):
        if method not in made:
            made[method] = tmp_path_factory.mktemp("runs") / method
            run(made[method], "--method", method)
        return made[method]
    return get


@pytest.mark.parametrize("method", ["salora", *map(slow, ("adalora", "lora", "lora-svd"))])
def test_predictions_for_texts_are_those_of_the_run(method, runs_of, tmp_path, capsys):
    out = runs_of(method)
    texts = [text for text, in load_task("demo", limit_dev=90)[2][0].texts]
    (tmp_path / "lines.txt").write_text("\ufeff" + "\n".join(texts) + "\n", encoding="utf-8")
    (tmp_path / "test.tsv").write_text(  # as GLUE's
        "index\tsentence\r\n" + "".join(f"{i}\t{text}\r\n" for i, text in enumerate(texts)))
    header, rows = predict(capsys, "--run", out, "--text", tmp_path / "lines.txt")
    assert header == ["index", "prediction", "probability", "logit_0", "logit_1"]
    wanted = predictions(out)[1]
    assert [row[:2] for row in rows] == [[row[0], row[2]] for row in wanted]
    logits = np.array([[float(x) for x in row[3:]] for row in rows])
    assert np.allclose(logits, [[float(x) for x in row[3:]] for row in wanted], atol=1e-4)
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    assert np.allclose([float(row[2]) for row in rows], p.max(1), atol=1e-5)
    assert predict(capsys, "--run", out, "--text", tmp_path / "test.tsv")[1] == rows
    again = predict(capsys, "--run", out, "--text", HERE / "demo" / "dev.tsv")[1]  # no header
    assert [row[:2] for row in again[:90]] == [row[:2] for row in rows] and len(again) == 1000
    predict(capsys, "--run", out, "--text", tmp_path / "test.tsv", "--out", tmp_path / "p.tsv")
    lines = (tmp_path / "p.tsv").read_text().splitlines()
    assert [line.split("\t") for line in lines] == [header, *rows]


def test_predictions_are_names_of_labels_for_one_or_two_sentences_or_numbers(
        named, tmp_path, capsys):
    run(tmp_path / "one", "--task", named / "data", "--model", named / "other", "--method", "lora",
        "--max-steps", 2)
    (tmp_path / "text.tsv").write_text("id\tsentence\n\na\tMary slept.\nb\t\n")
    _, rows = predict(capsys, "--run", tmp_path / "one", "--text", tmp_path / "text.tsv")
    assert [row[0] for row in rows] == ["1", "2"]  # the blank line had the number 0
    assert all(row[1] == LABELS[np.argmax([float(x) for x in row[3:]])] for row in rows)
    (tmp_path / "pairs").mkdir()
    for name in ("train.tsv", "dev.tsv"):
        (tmp_path / "pairs" / name).write_text(
            "sentence1\tsentence2\tscore\n" + "".join(f"A {i}.\tB.\t{i}\n" for i in range(20)))
    run(tmp_path / "two", "--task", tmp_path / "pairs", "--model", HERE / "demo" / "model",
        "--method", "lora", "--max-steps", 2)
    header, rows = predict(capsys, "--run", tmp_path / "two", "--text",
                           tmp_path / "pairs" / "dev.tsv")
    assert header == ["index", "prediction", "logit_0"] and all(r[1] == r[2] for r in rows)
    wanted = predictions(tmp_path / "two")[1]
    assert [float(r[1]) for r in rows] == pytest.approx([float(r[2]) for r in wanted], abs=1e-4)


@pytest.mark.parametrize("change,flags,words", [
    (None, ["--run", "nowhere"], "--run nowhere: has no result.json"),
    (None, ["--text", "nowhere"], "nowhere: not found; expected a file of texts"),
    ("two\tcells\n", [], "text: its first line has the columns 'two', 'cells', expected sentence"),
    ("one\ntwo\tcells\n", [], "text: line 2 has 2 columns, expected 1"),
    ("sentence1\tsentence2\na\tb\n", [], "expected sentence among them"),
    ("sentence\n", [], "text: has no rows"),
    ("", [], "text: has no rows"),
    (None, ["--out", "text"], "--out is text, which already exists"),
    (None, ["--out", "no/folder"], "--out is no/folder, expected a file in an existing folder"),
    (None, ["--model", "./gone"], "--model ./gone: no such folder"),
    (dict(model="./gone"), [], "--model ./gone: no such folder"),
    (dict(method="ft"), [], "run: has no adapter/ (method ft); expected a run of salora, lora"),
    (dict(columns=...), [], "missing columns, expected a run of this version of train_glue.py"),
])
def test_what_cannot_be_predicted_is_said_in_one_line(
        change, flags, words, short, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(short[0], "run")
    Path("text").write_text(change if isinstance(change, str) else "Mary slept.\n")
    if isinstance(change, dict):
        result = json.loads(Path("run/result.json").read_text())
        result["settings"] |= change
        if change.get("columns") is ...:
            del result["columns"], result["settings"]["columns"]
        if change.get("method"):
            shutil.rmtree("run/adapter")
        Path("run/result.json").write_text(json.dumps(result))
    before = sorted(tmp_path.rglob("*"))
    given = {"--run": "run", "--text": "text"} | dict(zip(flags[::2], flags[1::2]))
    with pytest.raises(SystemExit) as e:
        train_glue.command(["predict", *(x for pair in given.items() for x in pair)])
    captured = capsys.readouterr()
    assert e.value.code == 2 and words in captured.err and captured.err.count("\n") == 1
    assert not captured.out and sorted(tmp_path.rglob("*")) == before


# ---- methods, tasks, flags


def test_lora_keeps_everything_and_has_no_gates(tmp_path):
    result = run(tmp_path / "r", "--method", "lora", "--max-steps", "5")
    assert set(result["ranks"].values()) == {8}
    assert result["kept_params"] == result["trainable_params"] and result["kept_density"] == 1
    lines = log(tmp_path / "r")
    assert {line["lambda"] for line in lines} == {0} and {line["density"] for line in lines} == {1}
    assert all(line["loss"] == line["task_loss"] for line in lines)
    assert (tmp_path / "r" / "adapter").is_dir()


LAYER = "roberta.encoder.layer"


@pytest.mark.slow
def test_lora_of_given_ranks_has_them_from_the_start_and_goes_on_with_them(
        short, tmp_path, monkeypatch, capsys):
    found = short[1]["ranks"]
    flags = ["--method", "lora", "--ranks", short[0] / "result.json"]
    whole = run(tmp_path / "whole", *flags)
    assert whole["ranks"] == found == ranks(
        load(load_encoder(HERE / "demo" / "model", 2), tmp_path / "whole" / "adapter"))
    assert whole["trainable_params"] == whole["kept_params"] == short[1]["kept_params"]
    assert {line["density"] for line in log(tmp_path / "whole")} == {1}
    assert "rank of each matrix, as given by --ranks" in capsys.readouterr().out
    assert "Rank of each matrix, as given" in (tmp_path / "whole" / "report.html").read_text()

    evaluate = train_glue.evaluate
    monkeypatch.setattr(train_glue, "evaluate", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(tmp_path / "cut", *flags, "--save-every", 5)
    monkeypatch.setattr(train_glue, "evaluate", evaluate)
    (tmp_path / "other.json").write_text(json.dumps({path: 8 for path in found}))
    with pytest.raises(InputError, match="--resume: --ranks is 8 8 8 .* was written with"):
        run(tmp_path / "cut", *flags[:3], tmp_path / "other.json", "--resume")
    run(tmp_path / "cut", *flags, "--resume")
    for name in ("predictions.tsv", "adapter/adapter_model.safetensors"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_given_ranks_come_from_a_run_an_adapter_or_a_table(short, tmp_path):
    def parsed(file, *flags):
        return train_glue.parse_args(["--method", "lora", "--ranks", str(file), *flags]).ranks

    found = short[1]["ranks"]
    for name in ("", "result.json", "adapter", "adapter/adapter_config.json",
                 "adapter/salora.json"):
        assert parsed(short[0] / name) == found, name
    shutil.copytree(short[0] / "adapter", tmp_path / "pefts")
    (tmp_path / "pefts" / "salora.json").unlink()  # PEFT knows no rank 0
    assert parsed(tmp_path / "pefts") == {path: rank for path, rank in found.items() if rank}
    (tmp_path / "table.json").write_text(json.dumps({f"{LAYER}.0.output.dense": 12}))
    assert parsed(tmp_path / "table.json", "--r", "12") == {f"{LAYER}.0.output.dense": 12}


@pytest.mark.parametrize("table,flags,words", [
    ({"a": 1}, ["--method", "salora"], "--ranks is given, expected none with --method salora"),
    ({"a": 1}, ["--targets", "q"], "--targets is given, expected none with --ranks"),
    ({"a": 1}, ["--adapter", "x"], "--adapter is given, expected none with --ranks"),
    ({"a": 1}, ["--ranks", ""], "argument --ranks: empty"),
    ({"a": 1}, ["--ranks", "nowhere"], "nowhere: not found"),
    ({"a": 1}, [], "--ranks is for a matrix a too, expected the matrices of"),
    ({f"{LAYER}.0.output.dense": 9}, [], "dense is 9, expected 0 to 8: give the --r of"),
    ({f"{LAYER}.0.output.dense": 1.5}, [], "t.json: its ranks are {'"),
    ({f"{LAYER}.0.output.dense": 0}, [], "whole numbers from 0 that are not all 0"),
    ({"ranks": {}, "method": "ft"}, [], "its ranks are {}, expected {module path: rank}"),
    ([1], [], "t.json: holds a list"),
])
def test_ranks_that_are_none_are_refused_in_one_line(table, flags, words, tmp_path, capsys):
    file = tmp_path / "t.json"
    file.write_text(json.dumps(table))
    with pytest.raises(SystemExit) as e:
        train_glue.command([*SHORT, "--method", "lora", "--ranks", str(file), "--out",
                            str(tmp_path / "r"), *flags])
    error = capsys.readouterr().err
    assert e.value.code == 2 and words in error and error.count("\n") == 1
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize("method", ["salora", *map(slow, ("lora", "lora-svd", "adalora"))])
def test_dropout_on_the_adapters_path_is_there_in_training_alone(method, tmp_path):
    flags = ["--method", method, "--max-steps", 6, "--lora-dropout"]
    for p in (0, 0.4):
        run(tmp_path / str(p), *flags, p)
        config = json.loads((tmp_path / str(p) / "adapter" / "adapter_config.json").read_text())
        assert config["lora_dropout"] == p
    losses = [[line["task_loss"] for line in log(tmp_path / p)] for p in ("0", "0.4")]
    assert losses[0] != losses[1]
    rows = ["--task", "demo", "--epochs", 0, "--method", "lora", "--adapter"]
    run(tmp_path / "again", *rows, tmp_path / "0.4" / "adapter", "--lora-dropout", 0.4)
    logits = [np.array([[float(x) for x in row[3:]] for row in predictions(tmp_path / name)[1]])
              for name in ("0.4", "again")]
    assert np.allclose(*logits, atol=1e-4)


@pytest.mark.slow
def test_full_fine_tuning_trains_every_weight(tmp_path):
    result = run(tmp_path / "r", "--method", "ft")
    model = load_encoder(HERE / "demo" / "model", 2)
    assert result["trainable_params"] + result["head_params"] == sum(
        p.numel() for p in model.parameters())
    assert result["ranks"] == {} and not (tmp_path / "r" / "adapter").exists()
    assert result["density"] is None


@pytest.mark.parametrize("method,trained,kept", [
    ("adapter-h", 8 * (2 * 128 * 16 + 16 + 128), None),
    slow("adapter-p", 4 * (2 * 128 * 16 + 16 + 128), None),
    ("prefix", 5 * 128 + 512 * (128 + 1 + 4 * 2 * 128) + 4 * 2 * 128, 5 * 4 * 2 * 128),
    slow("prompt", 5 * 128, None),
])
def test_other_baselines_report_their_parameters_and_train_them(tmp_path, method, trained, kept):
    result = run(tmp_path / "r", "--method", method, "--bottleneck", 16, "--virtual-tokens", 5,
                 "--max-steps", 3)
    assert result["trainable_params"] == trained and result["kept_params"] == (kept or trained)
    assert result["ranks"] == {}
    assert result["head_params"] == 128 * 128 + 128 + 2 * 128 + 2
    assert not (tmp_path / "r" / "adapter").exists()
    state = load_file(tmp_path / "r" / CHECKPOINT)
    assert all(state[f"state.0.{name}"].abs().sum() > 0 for name in ("exp_avg", "exp_avg_sq"))


@pytest.mark.slow
def test_lora_svd_is_lora_until_the_window_ends_and_then_fits_its_budget(tmp_path):
    result = run(tmp_path / "r", "--method", "lora-svd", "--budget", "0.25")
    assert 0 <= 73_728 // 4 - result["kept_params"] < 2 * 128 and result["budget"] == 0.25
    assert len(set(result["ranks"].values())) > 1 and sum(result["ranks"].values()) < 24 * 8
    lines, lora = log(tmp_path / "r"), run(tmp_path / "lora", "--method", "lora")
    kept = pytest.approx(result["kept_density"])
    assert [line["density"] for line in lines] == [1] * 6 + [kept] * 8
    losses = [[line["loss"] for line in log(tmp_path / name)] for name in ("r", "lora")]
    assert losses[0][:7] == losses[1][:7] and losses[0][7:] != losses[1][7:]
    assert lora["settings"]["rewarm"] is False and result["settings"]["rewarm"] is True
    plain = load(load_encoder(HERE / "demo" / "model", 2), tmp_path / "r" / "adapter")
    assert ranks(plain) == result["ranks"]


@pytest.mark.slow
def test_adalora_ends_at_its_budget_of_triplets_and_leaves_an_adapter(tmp_path):
    result = run(tmp_path / "r", "--method", "adalora", "--budget", 0.25)
    assert sum(result["ranks"].values()) == 24 * 8 // 4 and result["density"] == 0.25
    assert result["budget"] == 0.25 and result["settings"]["beta"] == 0.1
    assert result["trainable_params"] == 73_728 + 24 * 8 > result["kept_params"] > 24 * 8 // 4 * 257
    lines = log(tmp_path / "r")
    density = [line["density"] for line in lines]
    assert density[:3] == [1, 1, 1] and density == sorted(density, reverse=True)
    assert density[-1] == 0.25 and {line["lambda"] for line in lines} == {None}
    assert all(line["loss"] > line["task_loss"] for line in lines)
    plain = load_encoder(HERE / "demo" / "model", 2)
    assert ranks(load(plain, tmp_path / "r" / "adapter")) == result["ranks"]


@pytest.mark.slow
def test_adalora_with_nothing_kept_is_the_pretrained_model_with_a_new_head(tmp_path):
    result = run(tmp_path / "r", "--method", "adalora", "--budget", 0.001)
    assert set(result["ranks"].values()) == {0} and result["kept_params"] == 0
    assert log(tmp_path / "r")[-1]["orth_a"] == 0


@pytest.mark.slow
def test_learning_rate_is_chosen_on_held_out_rows_and_reported_on_dev(tmp_path, capsys):
    train_glue.main([*SHORT, "--method", "lora", "--lr-grid", "1e-5", "3e-3", "--hold-out", "70",
                     "--seeds", "0", "1", "--out", str(tmp_path)])
    trials = {lr: json.loads((tmp_path / f"lr{lr}" / "result.json").read_text())
              for lr in ("1e-05", "0.003")}
    assert {(r["seed"], *r["dev_rows"]) for r in trials.values()} == {(100, 70)}
    best = max(trials, key=lambda lr: trials[lr]["score"])
    results = [json.loads((tmp_path / f"seed{seed}" / "result.json").read_text())
               for seed in (0, 1)]
    assert {(r["settings"]["lr"], r["settings"]["hold_out"], *r["dev_rows"]) for r in results} == {
        (float(best), None, 90)}
    low, high = (trials[lr]["score"] for lr in ("1e-05", "0.003"))
    said = f"learning rate {best}, on held-out rows: 1e-05: {low:.4f}, 0.003: {high:.4f}"
    assert said in capsys.readouterr().out


def test_paper_recipe_is_the_letter_and_flags_override_it(tmp_path):
    def parsed(*flags):
        args = vars(train_glue.parse_args(flags))
        names = "beta orth_reduction window gate_lr turn selection fold_gates rewarm"
        return [args[name] for name in names.split()]

    paper = parsed("--recipe", "paper")
    assert paper == [0.1, "sum", [0.2, 0.5], 0.01, False, "paper", True, False]
    mixed = parsed("--recipe", "paper", "--no-fold-gates", "--selection", "budget", "--turn",
                   "--window", "0", "1", "--rewarm")
    assert mixed == [0.1, "sum", [0, 1], 0.01, True, "budget", False, True]
    plain = [0.0, "mean", [0.5, 0.6], None, True, None, False, True]
    assert parsed() == plain
    assert parsed("--method", "lora-svd") == [*plain[:2], [0.4, 0.5], *plain[3:]]
    assert parsed("--method", "lora") == [*plain[:-1], False]
    adalora = parsed("--method", "adalora")
    assert (adalora[0], adalora[2], adalora[-1]) == (0.1, [0.2, 0.5], False)
    result = run(tmp_path / "r", "--recipe", "paper", "--max-steps", "5")
    assert result["settings"]["gate_lr"] == 0.01
    assert log(tmp_path / "r")[0]["loss"] > log(tmp_path / "r")[0]["task_loss"] + 0.1 * 8 * 24 * 0.9


@pytest.mark.slow
def test_a_constant_price_selects_by_the_gates_and_steers_to_no_budget(tmp_path):
    result = run(tmp_path / "r", "--price", "0.001")
    assert result["settings"]["selection"] == "paper"
    assert {line["lambda"] for line in log(tmp_path / "r")} == {0}
    assert run(tmp_path / "d", "--max-steps", "5")["settings"]["selection"] == "budget"


@pytest.mark.slow
def test_gate_learning_rate_follows_the_length_of_the_window(tmp_path):
    for steps, rate in ((10, 8 / 12), (25, 8 / 24), (40, 8 / 39)):  # the window: all but the first
        result = run(tmp_path / str(steps), "--window", "0", "1", "--epochs", "6",
                     "--max-steps", steps)
        assert result["steps"] == steps and result["settings"]["gate_lr"] == pytest.approx(rate)


@pytest.mark.parametrize("window", [(0, 0.01), (0.5, 0.51), (0.99, 1)])
def test_a_window_holds_a_step_at_least(window, tmp_path):
    result = run(tmp_path / "r", "--max-steps", "3", "--window", *window)
    assert result["kept_density"] <= 0.5 and len(log(tmp_path / "r")) == 3


@pytest.mark.slow
def test_regression_task(tmp_path):
    folder = tmp_path / "numbers"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for name, n in (("train.tsv", 64), ("dev.tsv", 20)):
        rows = [f"Mary saw {'dogs ' * k}.\tJohn slept.\t{k}.5\n" for k in rng.integers(1, 6, n)]
        (folder / name).write_text("sentence1\tsentence2\tscore\n" + "".join(rows))
    result = run(tmp_path / "r", "--task", folder, "--model", HERE / "demo" / "model",
                 "--epochs", "20", "--lr", "3e-3")
    header, rows = predictions(tmp_path / "r")
    assert header == ["index", "label", "prediction", "logit_0"] and all(r[2] == r[3] for r in rows)
    assert result["metric"] == "pearson" and result["score"] > 0.5
    assert set(result["metrics"]) == {"pearson", "spearmanr"}


def test_targets_and_rank_choose_what_is_adapted(tmp_path):
    result = run(tmp_path / "r", "--targets", "v", "d", "--r", "3", "--budget", "1",
                 "--max-steps", "5")
    assert result["steps"] == 5 and len(result["ranks"]) == 8
    assert set(result["ranks"].values()) == {3}
    assert all(path.endswith((".attention.self.value", ".output.dense"))
               for path in result["ranks"])


# ---- faster, smaller, on several processes: the same numbers


@pytest.fixture(scope="module")
def still(tmp_path_factory):
    """The demo's model without dropout, whose noise depends on the shapes and on the process."""
    folder = tmp_path_factory.mktemp("still") / "model"
    shutil.copytree(HERE / "demo" / "model", folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps({k: 0.0 if "dropout" in k else v for k, v in config.items()}))
    return folder


@pytest.fixture(scope="module")
def one(still, tmp_path_factory):
    """193 rows: six steps of 32 and one of 1, twice; before, in and after the window."""
    out = tmp_path_factory.mktemp("one") / "run"
    run(out, "--model", still, "--limit-train", "193")
    return out


def updates(tensors):
    """{name: (rank, BA)}, for the signs of singular vectors are free; other tensors as they are."""
    b = {key: tensors[key.replace("lora_A", "lora_B")] for key in tensors if "lora_A" in key}
    return {key: (len(t), b[key] @ t if key in b else t)
            for key, t in tensors.items() if "lora_B" not in key}


def same_run(a, b, rel, abs):
    """Logs, predictions and adapters of two runs agree."""
    assert len(log(a)) == len(log(b))
    for x, y in zip(log(a), log(b)):
        for key in ("loss", "task_loss", "density", "lambda", "orth_a", "orth_b"):
            assert x[key] == pytest.approx(y[key], rel=rel, abs=abs), (x["step"], key)
    logits = [np.array([[float(x) for x in row[3:]] for row in predictions(out)[1]])
              for out in (a, b)]
    assert np.abs(logits[0] - logits[1]).max() < 10 * abs
    files = [out / "adapter" / "adapter_model.safetensors" for out in (a, b)]
    one, other = (updates(load_file(file)) for file in files)
    assert one.keys() == other.keys()
    for key, (rank, value) in one.items():
        assert rank == other[key][0], key
        assert torch.allclose(value, other[key][1], rtol=0, atol=10 * abs), key


@pytest.mark.slow
def test_accumulated_small_batches_equal_one_large_batch(tmp_path, still, one):
    """4 x 8 rows are 1 x 32 rows: the gates are drawn once a step."""
    run(tmp_path / "four", "--model", still, "--limit-train", "193", "--batch-size", "8",
        "--accumulate", "4")
    same_run(one, tmp_path / "four", rel=1e-4, abs=1e-4)


@pytest.mark.slow
def test_two_processes_equal_one_on_the_same_global_batch(tmp_path, still, one):
    """2 x 16 rows are 1 x 32 rows, also where the last step has a row for one process only."""
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone",
                           "--nproc-per-node", "2", ROOT / "train_glue.py", *SHORT,
                           "--model", still, "--limit-train", "193", "--batch-size", "16",
                           "--out", tmp_path / "two"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    # one process speaks
    assert done.stdout.count("settings: ") == 1 and "processes=2" in done.stdout
    same_run(one, tmp_path / "two", rel=1e-4, abs=1e-4)


@pytest.mark.slow
def test_several_processes_report_an_error_once(tmp_path):
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone",
                           "--nproc-per-node", "2", ROOT / "train_glue.py",
                           "--device", "cuda:1", "--out", tmp_path / "r"],
                          capture_output=True, text=True)
    assert done.returncode and done.stderr.count("error: --device is") == 1
    assert not (tmp_path / "r").exists()


@pytest.mark.slow
def test_recomputed_activations_change_no_number(tmp_path, short):
    """Dropout and gates are drawn once, though the layers are computed twice."""
    run(tmp_path / "r", "--checkpoint-activations")
    same_run(tmp_path / "r", short[0], rel=1e-6, abs=1e-6)


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"),
                    reason="torch.compile needs a C++ compiler, g++ is not there")
def test_compiled_model_has_the_same_numbers_and_keys(tmp_path, still):
    config = json.loads((still / "config.json").read_text())
    # compile one layer, not four
    state = {k: v for k, v in load_file(still / "model.safetensors").items()
             if not re.search(r"layer\.[1-9]", k)}
    shutil.copytree(still, tmp_path / "model")
    save_file(state, tmp_path / "model" / "model.safetensors")
    (tmp_path / "model" / "config.json").write_text(json.dumps(config | dict(num_hidden_layers=1)))
    flags = ["--model", tmp_path / "model", "--max-steps", "9"]
    run(tmp_path / "eager", *flags)
    run(tmp_path / "compiled", *flags, "--compile")
    same_run(tmp_path / "eager", tmp_path / "compiled", rel=1e-4, abs=1e-4)


@pytest.mark.slow
def test_bfloat16_base_leaves_adapter_and_gates_in_float32(tmp_path, still, one):
    run(tmp_path / "r", "--dtype", "bfloat16", "--model", still, "--limit-train", "193")
    state = load_file(tmp_path / "r" / CHECKPOINT)
    assert {t.dtype for name, t in state.items() if name.startswith("param.")} == {torch.float32}
    for a, b in zip(log(one)[:3], log(tmp_path / "r")):  # later ones drift apart: it has 3 digits
        assert a["task_loss"] == pytest.approx(b["task_loss"], abs=0.03)
        assert a["density"] == pytest.approx(b["density"], abs=0.03)


@pytest.mark.slow
def test_full_fine_tuning_in_bfloat16_trains_float32_weights(tmp_path, still):
    flags = ["--method", "ft", "--model", still, "--limit-train", "193", "--lr", "1e-4"]
    run(tmp_path / "whole", *flags)
    run(tmp_path / "rounded", *flags, "--dtype", "bfloat16")
    state = load_file(tmp_path / "rounded" / CHECKPOINT)
    assert {t.dtype for name, t in state.items() if name.startswith("param.")} == {torch.float32}
    whole, rounded = log(tmp_path / "whole"), log(tmp_path / "rounded")
    assert [a["task_loss"] for a in whole] == pytest.approx(
        [a["task_loss"] for a in rounded], abs=0.02)
    assert [a["task_loss"] for a in whole] != [a["task_loss"] for a in rounded]


@pytest.mark.parametrize("flags,again", [
    ("", True), ("--no-rewarm", False), ("--method lora", False), ("--method lora --rewarm", True),
    ("--method lora-svd", True), ("--method adalora", False), ("--method ft", False)])
def test_learning_rate_warms_up_falls_and_starts_again_when_the_window_closes(flags, again):
    args = train_glue.parse_args([*flags.split(), "--warmup", "0.2", "--window", "0.2", "0.5"])
    then = [1, 0.8, 0.6, 0.4, 0.2] if again else [5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8]
    plan = schedule(args, [5] * 320, [1] * 320, epochs=1)  # ten steps
    assert [lr_factor(plan, step) for step in range(10)] == pytest.approx(
        [0.5, 1, 1, 7 / 8, 6 / 8, *then])


# ---- seeds, repeating, resuming, overwriting


@pytest.mark.slow
def test_same_seed_same_bytes_other_seed_other_numbers(tmp_path, short):
    run(tmp_path / "again")
    run(tmp_path / "other", "--seed", "1")
    for name in ("predictions.tsv", "adapter/adapter_model.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (short[0] / name).read_bytes()
    assert predictions(tmp_path / "other") != predictions(short[0])


@pytest.mark.slow
def test_seeds_have_a_folder_each_and_a_summary(tmp_path, capsys):
    train_glue.main([*SHORT, "--out", str(tmp_path / "s"), "--seeds", "0", "3"])
    summary = json.loads((tmp_path / "s" / "summary.json").read_text())
    scores = [json.loads((tmp_path / "s" / f"seed{i}" / "result.json").read_text())["score"]
              for i in (0, 3)]
    assert summary["scores"] == scores and summary["seeds"] == [0, 3]
    assert summary["mean"] == pytest.approx(np.mean(scores))
    assert summary["std"] == pytest.approx(np.std(scores, ddof=1))
    assert "±" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("method", ["salora", "lora", "lora-svd", "adalora", "prefix", "ft"])
@pytest.mark.parametrize("stop", [1, 2])
def test_resumed_run_ends_in_the_same_bytes(tmp_path, method, stop, monkeypatch):
    """Stopped after epoch 1 of 3 (in the window) or 2 (after it)."""
    flags = ["--epochs", "3", "--method", method]
    run(tmp_path / "whole", *flags)
    evaluate, calls = train_glue.evaluate, []

    def die(*args):
        calls.append(0)
        if len(calls) > stop:
            raise KeyboardInterrupt
        return evaluate(*args)

    monkeypatch.setattr(train_glue, "evaluate", die)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", *flags)
    monkeypatch.setattr(train_glue, "evaluate", evaluate)
    assert not (tmp_path / "cut" / "result.json").exists()
    result = run(tmp_path / "cut", *flags, "--resume")
    tensors = (load_file(tmp_path / run / CHECKPOINT) for run in ("cut", "whole"))
    torch.testing.assert_close(*tensors, rtol=0, atol=0)
    names = ["predictions.tsv"]
    if method not in ("ft", "prefix"):
        names.append("adapter/adapter_model.safetensors")
    for name in names:
        cut, whole = ((tmp_path / run / name).read_bytes() for run in ("cut", "whole"))
        assert cut == whole, name
    strip = [[{k: v for k, v in line.items() if k != "tokens_per_second"}
              for line in log(tmp_path / run)] for run in ("whole", "cut")]
    assert strip[0] == strip[1] and len(result["history"]) == 3


def test_resume_refuses_other_flags_and_knows_a_finished_run(tmp_path, short, capsys):
    run(tmp_path / "r", "--max-steps", "3")
    (tmp_path / "r" / "result.json").unlink()
    with pytest.raises(InputError, match="--resume: --budget is 0.25, but .* was written with 0.5"):
        run(tmp_path / "r", "--max-steps", "3", "--budget", "0.25", "--resume")
    for flags in (["--batch-size", "16"], ["--epochs", "1"], ["--limit-train", "96"],
                  ["--accumulate", "2"], ["--max-steps", "4"]):  # these make other rows or steps
        with pytest.raises(InputError, match=f"--resume: {flags[0]} is {flags[1]}"):
            run(tmp_path / "r", "--max-steps", "3", *flags, "--resume")
    run(short[0], "--resume")
    assert "finished already" in capsys.readouterr().out
    with pytest.raises(
            InputError,
            match="holds a finished run with --budget 0.5, not 0.25: give another folder"):
        run(short[0], "--resume", "--budget", "0.25")
    run(tmp_path / "one", "--max-steps", "3", "--max-length", "9")
    with pytest.raises(InputError, match="a finished run with --max-length 9, not the default"):
        run(tmp_path / "one", "--max-steps", "3", "--resume")


def test_resume_refuses_other_data_and_another_model(tmp_path):
    data, model = tmp_path / "own", tmp_path / "model"
    data.mkdir()
    shutil.copytree(HERE / "demo" / "model", model)
    rows = [f"{word} the cat\t{i % 2}\n" for i, word in enumerate("abcdefgh")]
    for name in ("train.tsv", "dev.tsv"):
        (data / name).write_text("".join(["sentence\tlabel\n", *rows]))
    flags = ["--task", data, "--model", model, "--method", "head", "--max-steps", 2]
    train_glue.main(list(map(str, [*flags, "--out", tmp_path / "r"])))
    (tmp_path / "r" / "result.json").unlink()
    resumed = list(map(str, [*flags, "--out", tmp_path / "r", "--resume"]))
    words = "--resume: what --task, --data and --model name is changed"
    (data / "train.tsv").write_text("".join(["sentence\tlabel\n", *rows[:-1]]))
    with pytest.raises(InputError, match=words):
        train_glue.main(resumed)
    (data / "train.tsv").write_text("".join(["sentence\tlabel\n", *rows]))
    tensors = load_file(model / "model.safetensors")
    next(t for name, t in tensors.items() if "word_embeddings" in name)[5] += 1
    save_file(tensors, model / "model.safetensors")
    with pytest.raises(InputError, match=words):
        train_glue.main(resumed)


def test_a_rate_of_the_grid_that_diverges_is_not_chosen(tmp_path, capsys):
    flags = ["--method", "head", "--max-steps", "4", "--lr-grid"]
    run(tmp_path / "r", *flags, "1e30", "1e-3")
    out = capsys.readouterr().out
    assert "learning rate 1e+30: training diverged" in out and "learning rate 0.001, on" in out
    with pytest.raises(InputError, match="with every rate"):
        run(tmp_path / "s", *flags, "1e30", "1e31")


def test_a_single_run_and_runs_of_several_seeds_have_a_folder_each(tmp_path):
    flags = ["--method", "head", "--max-steps", "1"]
    run(tmp_path / "one", *flags)
    with pytest.raises(InputError, match="a result.json, expected none"):
        run(tmp_path / "one", *flags, "--seeds", "0", "1")
    (tmp_path / "many").mkdir()
    summary = tmp_path / "many" / "summary.json"
    summary.write_text("{}")
    with pytest.raises(InputError, match="a summary.json, expected none"):
        run(tmp_path / "many", *flags)
    with pytest.raises(InputError, match="--overwrite to replace them"):
        run(tmp_path / "many", *flags, "--seeds", "5")
    assert summary.read_text() == "{}"
    train_glue.main([*SHORT, "--out", str(summary.parent), *flags, "--seeds", "5", "--overwrite"])
    assert json.loads(summary.read_text())["seeds"] == [5]


def test_only_files_of_a_run_are_cleared(tmp_path):
    (tmp_path / "predictions_of_mine.tsv").write_text("mine")
    run(tmp_path, "--method", "head", "--max-steps", "1")
    assert (tmp_path / "predictions_of_mine.tsv").read_text() == "mine"


def test_finished_run_is_not_overwritten_unasked(tmp_path, short):
    before = (short[0] / "result.json").read_bytes()
    with pytest.raises(InputError,
                       match="holds a finished run: give another folder, or --overwrite"):
        run(short[0], "--max-steps", "2")
    assert (short[0] / "result.json").read_bytes() == before


@pytest.mark.parametrize("name,flags,words", [
    (CHECKPOINT, [], "did not finish: --resume goes on with it, --overwrite replaces it"),
    ("checkpoint/thesis.pt", [], "another version wrote its checkpoint/"),
    ("checkpoint/thesis.pt", ["--resume"], "another version wrote its checkpoint/")])
def test_unfinished_run_is_not_replaced_unasked(tmp_path, name, flags, words):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("years of work")
    with pytest.raises(InputError, match=words):
        run(tmp_path, "--max-steps", "4", *flags)
    assert (tmp_path / name).read_text() == "years of work"
    assert not (tmp_path / "log.jsonl").exists()


def test_a_damaged_log_is_named(tmp_path):
    run(tmp_path, "--max-steps", "4")
    (tmp_path / "result.json").unlink()
    with pytest.raises(InputError, match="did not finish"):
        run(tmp_path, "--max-steps", "4")
    good = (tmp_path / "log.jsonl").read_text()
    (tmp_path / "log.jsonl").write_text("\0\n" + good)
    with pytest.raises(InputError, match="log.jsonl: line 1 is damaged"):
        run(tmp_path, "--max-steps", "4", "--resume")
    (tmp_path / "log.jsonl").write_text(good)
    run(tmp_path, "--max-steps", "4", "--resume")
    assert (tmp_path / "log.jsonl").read_text() == good


@pytest.mark.parametrize("flags", [["--seeds", "0", "1"], ["--lr-grid", "1e-3", "2e-3"]])
def test_all_folders_are_looked_at_before_the_first_run(flags, tmp_path):
    for name in ("seed1", "lr0.002"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "result.json").write_text("{}")
    with pytest.raises(InputError, match="holds a finished run"):
        run(tmp_path, "--max-steps", "4", *flags)
    assert not (tmp_path / "seed0").exists() and not (tmp_path / "lr0.001").exists()


def test_a_run_that_came_apart_in_its_last_step_does_not_count(tmp_path):
    with pytest.raises(InputError,
                       match="not all finite numbers after 1 steps: try a smaller --lr"):
        run(tmp_path, "--method", "ft", "--max-steps", "1", "--lr", "1e9", "--weight-decay", "1e9")
    assert not (tmp_path / "result.json").exists()


def test_files_can_be_read_by_whom_the_folder_lets_in(short):
    modes = {file.name: file.stat().st_mode for file in short[0].rglob("*") if file.is_file()}
    assert {"adapter_model.safetensors", CHECKPOINT} <= modes.keys()
    assert len(set(modes.values())) == 1


@pytest.mark.slow
def test_default_folders_do_not_collide(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        train_glue.main([*SHORT, "--max-steps", "4"])
    assert sorted(p.name for p in (tmp_path / "runs").iterdir()) == ["demo-salora", "demo-salora-2"]


@pytest.mark.slow
def test_overwrite_replaces_the_default_folder_and_the_hint_is_something_else(
        tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for steps in ("4", "3"):
        train_glue.main([*SHORT, "--max-steps", steps, "--method", "lora", "--overwrite"])
    assert [p.name for p in (tmp_path / "runs").iterdir()] == ["demo-lora"]
    assert json.loads((tmp_path / "runs/demo-lora/result.json").read_text())["steps"] == 3
    assert "\nnext: --method salora" in capsys.readouterr().out


# ---- bad input: one line, exit status 2, nothing written


@pytest.mark.parametrize("flags,words", [
    (["--task", "colla"], "--task is 'colla', expected one of cola, sst2"),
    (["--method", "loha"], "invalid choice: 'loha' (choose from"),
    (["--layers", "0", "4"], "--layers has 4, but"),
    (["--layers", "-1"], "--layers is [-1]"),
    (["--bottleneck", "0"], "--bottleneck is 0"),
    (["--method", "prompt", "--virtual-tokens", "200", "--max-length", "60"], "positions for"),
    (["--lr-grid", "1e-3", "0"], "--lr-grid is [0.001, 0.0]"),
    (["--targets", "q", "x"], "argument --targets: invalid choice: 'x'"),
    (["--budget", "0"], "--budget is 0.0, expected a share in (0, 1]"),
    (["--budget", "1.5"], "--budget is 1.5"),
    (["--budget", "nan"], "--budget is nan"),
    (["--window", "0.5", "0.2"], "--window is 0.5 0.2"),
    (["--window", "-1", "0.5"], "--window is -1.0 0.5"),
    (["--r", "0"], "--r is 0, expected at least 1"),
    (["--r", "129"], "--r is 129, but the narrowest matrix of"),
    (["--lr", "-1"], "--lr is -1.0"),
    (["--lora-dropout", "1"], "--lora-dropout is 1.0, expected a share in [0, 1)"),
    (["--lora-dropout", "0.1", "--method", "ft"], "expected none with --method ft"),
    (["--price", "0.1", "--method", "lora-svd"], "--price is 0.1, expected none"),
    (["--price", "0.1", "--selection", "budget"], "--price is 0.1, expected none"),
    (["--lr", "0"], "--lr is 0.0"),
    (["--alpha", "0"], "--alpha is 0.0"),
    (["--task", ".", "--data", "."], "--data is '.', expected nothing"),
    (["--epochs", "inf"], "--epochs is inf"),
    (["--batch-size", "0"], "--batch-size is 0"),
    (["--seeds", "1", "1"], "--seeds is [1, 1]"),
    (["--seeds", "-1", "2"], "--seeds is [-1, 2]"),
    (["--seed", "99999999999"], "--seed is 99999999999"),
    (["--seed", "1", "--seeds", "1", "2"], "--seed is 1, expected none with --seeds"),
    (["--out", "r", "--resume", "--overwrite"], "--overwrite is given, expected none with"),
    (["--threads", "99999999999"], "--threads is"),
    (["--epochs", "1e308"], "--epochs is 1e+308"),
    (["--lr-grid", "1e-3", "1e-3"], "--lr-grid is [0.001, 0.001]"),
    (["table1", "--seeds", "-1"], "--seeds is [-1]"),
    (["--device", "tpu"], "--device is 'tpu'"),
    (["--device", "cuda:99"], "--device is cuda:99"),
    (["--max-length", "999"], "--max-length is 999, but"),
    (["--window", "0", "1", "--max-steps", "1"], "one step is too few for --method salora"),
    (["--method", "lora-svd", "--max-steps", "1"], "too few for --method lora-svd"),
    (["--straight-through"], "unrecognized"),
    (["--resume"], "--resume is given without --out"),
    (["--model", "./nowhere"], "--model ./nowhere: no such folder"),
    (["--task", "cola", "--data", "."], "CoLA/train.tsv: not found"),
    (["--nonsense"], "unrecognized arguments: --nonsense"),
])
def test_bad_flags_end_in_one_line_and_status_2(flags, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as e:
        train_glue.command(flags)
    captured = capsys.readouterr()
    assert e.value.code == 2 and words in captured.err and captured.err.count("\n") == 1
    assert captured.err.startswith("error: ")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_bad_input_from_the_shell_has_no_traceback(tmp_path):
    done = subprocess.run([sys.executable, ROOT / "train_glue.py", "--budget", "2",
                           "--out", tmp_path / "r"], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == "error: --budget is 2.0, expected a share in (0, 1]\n"
    assert not (tmp_path / "r").exists()


@pytest.mark.slow
@pytest.mark.parametrize("shell, code", [("{} >&-", 0), ("({}; echo $? >&2) | true", 141)])
def test_an_output_that_is_closed_or_that_nobody_reads(shell, code, tmp_path):
    command = shlex.join(map(str, [
        sys.executable, ROOT / "train_glue.py", *SHORT, "--method", "head", "--max-steps", 2,
        "--out", tmp_path / "r"]))
    done = subprocess.run(shell.format(command), shell=True, capture_output=True, text=True)
    assert done.stderr == ("141\n" if code else "")


@pytest.mark.parametrize("flags,idle", [
    (["--method", "lora", "--budget", "0.25", "--turn", "--r", "4"], "--budget, --turn"),
    (["--method", "ft", "--r", "4"], "--r"), (["--method", "prefix", "--bottleneck", "8"],
                                              "--bottleneck"),
    (["--method", "lora-svd", "--budget", "0.25", "--gate-lr", "0.1"], "--gate-lr")])
def test_a_flag_without_effect_is_told(flags, idle, capsys):
    announce(train_glue.parse_args(flags), dict(tf32=False), "")
    assert f"without effect with --method {flags[1]}: {idle}\n" in capsys.readouterr().out


def test_every_flag_of_the_design_is_there_and_every_flag_has_a_help_sentence(monkeypatch):
    parsers = []
    monkeypatch.setattr(train_glue.flags, "new_parser",
                        lambda *a, **kw: parsers.append(new_parser(*a, **kw)) or parsers[-1])
    train_glue.parse_args([])
    flags = {option: action for action in parsers[0]._actions for option in action.option_strings}
    assert all(len(action.help.split()) >= 2 for action in flags.values())
    for flag in ("task model data method r alpha budget beta orth-reduction gate-lr window "
                 "lora-dropout selection fold-gates recipe targets epochs max-steps batch-size "
                 "accumulate lr warmup rewarm turn price weight-decay max-length seed seeds "
                 "device dtype threads compile checkpoint-activations out resume overwrite "
                 "limit-train limit-dev").split():
        assert f"--{flag}" in flags
