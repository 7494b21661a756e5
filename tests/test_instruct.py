"""
Instruction tuning, from a JSON file to answers. Most runs are a few steps of the demo; one is the
demo as a user sees it.
"""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from tokenizers import Tokenizer

import adapter
import salora as sl
import train_glue
import train_instruct
from data import InputError
from data.instruct import Example, encode, fill, load_instructions, split
from data.make_demo import make_instructions
from data.style import tidy
from model import load_decoder, stop_ids
from train_instruct import DEMO, collate, evaluate
from training.loop import token_losses
from training.runs import CHECKPOINT

ROOT = Path(train_instruct.__file__).parent
SHORT = ["--limit-train", "96", "--limit-dev", "20", "--epochs", "2", "--log-every", "1",
         "--generate", "2", "--window", "0.2", "0.5"]


def run(out, *flags):
    train_instruct.main([*SHORT, "--out", str(out), *map(str, flags)])
    return json.loads((out / "result.json").read_text())


def log(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def short(tmp_path_factory):
    out = tmp_path_factory.mktemp("short") / "run"
    return out, run(out)


@pytest.fixture(scope="module")
def demo():
    return load_decoder(DEMO / "llama"), Tokenizer.from_file(str(DEMO / "llama" / "tokenizer.json"))


# ---- the demo as a user sees it


@pytest.mark.slow
def test_demo_learns_to_follow_instructions(tmp_path):
    text = subprocess.run([sys.executable, ROOT / "train_instruct.py", "--out", tmp_path / "r"],
                          capture_output=True, text=True, check=True, cwd=tmp_path).stdout
    result = json.loads((tmp_path / "r" / "result.json").read_text())
    right = result["metrics"]["exact_match"]
    assert right >= 0.6 and result["answered"] == 100 and result["kept_density"] <= 0.5
    assert len(result["examples"]) == 3
    assert all(e["before"] != e["reference"] == e["after"] for e in result["examples"])
    assert f"\n{round(100 * right)} of 100 held-out instructions answered exactly\n" in text
    for words in ("before: ", "after: ", "reference: ", "budget 0.5", "W^U", "perplexity",
                  "adapter/"):
        assert words in text, words
    tuned_by = ["--adapter", tmp_path / "r" / "adapter"]
    ask = [sys.executable, ROOT / "train_instruct.py", "generate", "--instruction",
           result["examples"][0]["instruction"], "--input", result["examples"][0]["input"]]
    tuned, merged, plain = (
        subprocess.run([*ask, *more], capture_output=True, text=True, check=True).stdout
        for more in (tuned_by, [*tuned_by, "--merge"], []))
    assert tuned == merged == result["examples"][0]["after"] + "\n" != plain


@pytest.mark.parametrize("right,shown", [
    ({0, 2, 3, 5}, [2, 3, 5]), ({0, 3, 5}, [3, 5, 1]), (set(), [1, 2, 3])])
def test_examples_are_what_training_has_taught_or_else_wrong_answers(
        right, shown, tmp_path, monkeypatch, capsys):
    held = split(load_instructions(DEMO / "instruct.jsonl"), 0.05)[1][:6]
    outcomes = iter([{0}, right])  # row 0 is right before training, too

    def answer(model, tokenizer, prompts, *args):
        good = next(outcomes)
        return [row["output"] if i in good else f"wrong {i}" for i, row in enumerate(held)]

    monkeypatch.setattr(train_instruct, "answer", answer)
    result = run(tmp_path / "r", "--method", "lora", "--max-steps", 1, "--generate", 6)
    assert [e["input"] for e in result["examples"]] == [held[i]["input"] for i in shown]
    assert [e["after"] == e["reference"] for e in result["examples"]] == [i in right for i in shown]
    assert all(e["before"] != e["reference"] for e in result["examples"])
    assert result["metrics"]["exact_match"] == len(right) / 6
    text = capsys.readouterr().out
    assert f"\n{len(right)} of 6 held-out instructions answered exactly" in text
    assert ("fewer than three to show" in text) == (not set(shown) <= right)


def test_exact_answers_are_counted_only_where_there_are_some(tmp_path, capsys):
    rows = [dict(instruction=f"Tell me about {i}.", output=f"Well, {i} ..") for i in range(40)]
    (tmp_path / "free.json").write_text(json.dumps(rows))
    result = run(tmp_path / "r", "--model", DEMO / "llama", "--data", tmp_path / "free.json",
                 "--dtype", "float32", "--max-steps", 1, "--method", "lora")
    assert result["metrics"]["exact_match"] == 0
    assert "answered exactly" not in capsys.readouterr().out


def test_demo_instructions_are_what_the_script_makes():
    assert (DEMO / "instruct.jsonl").read_text() == make_instructions()


# ---- files of a run


@pytest.mark.slow
def test_lora_takes_the_ranks_of_another_run(short, tmp_path):
    out, found = short
    lora = run(tmp_path / "r", "--method", "lora", "--ranks", out, "--max-steps", "2")
    assert lora["ranks"] == found["ranks"] and len(set(lora["ranks"].values())) > 1
    assert lora["trainable_params"] == lora["kept_params"] == found["kept_params"]


def test_an_adapter_of_the_head_is_gone_on_from(tmp_path, capsys):
    model = load_decoder(DEMO / "llama")
    sl.SaLoRA(model, ["lm_head", "layers.0.self_attn.q_proj"], 1, r=2, window=None)
    adapter.save(model, tmp_path / "a")
    result = run(tmp_path / "r", "--method", "lora", "--adapter", tmp_path / "a",
                 "--max-steps", 1)
    assert result["ranks"] == {"model.layers.0.self_attn.q_proj": 2, "lm_head": 2}
    shown = capsys.readouterr().out
    assert re.search(r"^W\^Q +2", shown, re.M) and re.search(r"^lm_head +2", shown, re.M)


def test_result_and_log_have_the_fields_of_the_other_script(short):
    out, result = short
    assert {"task", "model", "method", "seed", "metric", "score", "metrics", "best_score",
            "trainable_params", "kept_params", "head_params", "budget", "density", "kept_density",
            "ranks", "steps", "seconds", "examples_per_second", "peak_memory_mb",
            "settings"} <= set(result)
    d, kv, inner = 128, 64, 384
    assert result["trainable_params"] == 8 * 4 * (2 * 2 * d + 2 * (d + kv) + 2 * (d + inner))
    assert result["head_params"] == 0
    assert result["kept_params"] <= result["trainable_params"] // 2 and result["steps"] == 12
    assert result["metric"] == "loss"
    assert result["score"] == result["metrics"]["loss"] == result["history"][-1]["loss"]
    assert result["best_score"] <= result["score"]
    lines = log(out)
    assert [line["step"] for line in lines] == list(range(12))
    assert all({"step", "epoch", "loss", "task_loss", "lr", "density", "lambda", "orth_a", "orth_b",
                "tokens_per_second"} == set(line) for line in lines)
    rows = [line.split("\t") for line in (out / "predictions.tsv").read_text().splitlines()]
    assert rows[0] == ["index", "label", "prediction"]
    assert [row[0] for row in rows[1:]] == ["0", "1"]


def test_score_is_the_mean_loss_of_the_held_out_response_tokens(short):
    out, result = short
    model = adapter.load(load_decoder(DEMO / "llama"), out / "adapter").eval()
    tokenizer = Tokenizer.from_file(str(DEMO / "llama" / "tokenizer.json"))
    total = count = 0
    for row in split(load_instructions(DEMO / "instruct.jsonl"), 0.05)[1][:20]:
        prompt = tokenizer.encode(fill("alpaca", row["instruction"], row["input"])).ids
        response = tokenizer.encode(row["output"], add_special_tokens=False).ids + [2]
        ids = torch.tensor([prompt + response])
        with torch.no_grad():
            losses = F.cross_entropy(model(ids)[0, :-1], ids[0, 1:], reduction="none")
        losses = losses[len(prompt) - 1:]
        total, count = total + losses.sum().item(), count + len(losses)
    assert result["score"] == pytest.approx(total / count, rel=1e-4)


@pytest.mark.slow
def test_resumed_run_ends_in_the_same_bytes(tmp_path, monkeypatch):
    run(tmp_path / "whole", "--epochs", 3)
    calls = []

    def die(*args):
        calls.append(0)
        if len(calls) > 1:
            raise KeyboardInterrupt
        return evaluate(*args)

    monkeypatch.setattr(train_instruct, "evaluate", die)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", "--epochs", 3)
    monkeypatch.setattr(train_instruct, "evaluate", evaluate)
    run(tmp_path / "cut", "--epochs", 3, "--resume")
    tensors = (load_file(tmp_path / run / CHECKPOINT) for run in ("cut", "whole"))
    torch.testing.assert_close(*tensors, rtol=0, atol=0)
    for name in ("predictions.tsv", "adapter/adapter_model.safetensors"):
        cut, whole = ((tmp_path / run / name).read_bytes() for run in ("cut", "whole"))
        assert cut == whole, name


@pytest.mark.slow
def test_accumulated_small_batches_equal_one_large_batch(tmp_path, short):
    run(tmp_path / "r", "--batch-size", 4, "--accumulate", 4)
    for a, b in zip(log(short[0]), log(tmp_path / "r")):
        for name in ("task_loss", "density"):
            assert a[name] == pytest.approx(b[name], abs=1e-3)


@pytest.mark.slow
def test_lora_chatml_prompt_loss_and_bfloat16_run_too(tmp_path):
    result = run(tmp_path / "r", "--method", "lora", "--template", "chatml", "--train-on-prompt",
                 "--dtype", "bfloat16", "--checkpoint-activations", "--targets", "q", "g",
                 "--generate", 0)
    assert result["examples"] == []
    assert (tmp_path / "r" / "predictions.tsv").read_text() == "index\tlabel\tprediction\n"
    assert result["kept_params"] == result["trainable_params"] == 8 * 4 * (2 * 128 + 128 + 384)
    assert result["budget"] is None
    tensors = load_file(tmp_path / "r" / "adapter" / "adapter_model.safetensors")
    name = "base_model.model.model.layers.0.mlp.gate_proj.lora_A.weight"
    assert tensors[name].dtype == torch.float32


# ---- tokens and losses


def test_template_is_alpacas_to_the_letter():
    text = fill("alpaca", "Add.", "1 and 2")
    assert text == (
        "Below is an instruction that describes a task, paired with an input that provides further "
        "context. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nAdd.\n\n### Input:\n1 and 2\n\n### Response:\n")
    assert fill("alpaca", "Go.").endswith(
        "appropriately completes the request.\n\n### Instruction:\nGo.\n\n### Response:\n")
    braces = fill("alpaca", "Say {input}.", "{instruction}")  # in the data they are text
    assert "Instruction:\nSay {input}.\n\n### Input:\n{instruction}\n" in braces
    assert fill("chatml", "Add.", "1") == (
        "<|im_start|>user\nAdd.\n\n1<|im_end|>\n<|im_start|>assistant\n")


def test_no_token_of_a_response_is_lost_and_it_ends_unless_it_was_cut(demo, capsys):
    _, tokenizer = demo
    rows = [dict(instruction="Deny it.", input="A man sleeps.", output="A man does not sleep."),
            dict(instruction="word " * 100, input="", output="x")]
    whole, = encode(tokenizer, rows[:1], "alpaca", 2, 512, 1024)
    assert whole.prompt == tokenizer.encode(fill("alpaca", "Deny it.", "A man sleeps.")).ids
    assert whole.prompt[0] == 1
    response = tokenizer.encode("A man does not sleep.", add_special_tokens=False).ids
    assert whole.response == response + [2]
    n = len(whole)
    cut, = encode(tokenizer, rows, "alpaca", 2, n - 2, 1024)
    assert cut.prompt == whole.prompt and cut.response == whole.response[:-2]
    assert "1 of 2 rows are left out" in capsys.readouterr().out


def test_targets_are_the_response_and_nothing_else():
    examples = [Example([1, 5, 6], [7, 8, 2]), Example([1, 9], [4])]
    ids, targets = collate(examples, "cpu")
    assert ids.tolist() == [[1, 5, 6, 7, 8, 2], [1, 9, 4, 0, 0, 0]]
    assert targets.tolist() == [[-100, -100, 7, 8, 2, -100], [-100, 4, -100, -100, -100, -100]]
    assert collate(examples, "cpu", on_prompt=True)[1].tolist() == [
        [5, 6, 7, 8, 2, -100], [9, 4, -100, -100, -100, -100]]


@pytest.mark.parametrize("chunk", [3, 1024])
def test_loss_in_chunks_is_the_loss_with_its_gradient(demo, chunk):
    model, _ = demo
    x = torch.randn(2, 6, 128, generator=torch.Generator().manual_seed(0))
    targets = torch.tensor([[-100, 3, 4, 5, 6, 7], [-100, -100, 9, 10, 11, -100]])
    grads = []
    for compute in (lambda y: token_losses(model, y, targets, chunk).sum(),
                    lambda y: F.cross_entropy(model.lm_head(y).flatten(0, 1), targets.flatten(),
                                              reduction="sum")):
        y = x.clone().requires_grad_()
        loss = compute(y)
        grads.append((loss.detach(), torch.autograd.grad(loss, y)[0]))
    torch.testing.assert_close(grads[0], grads[1])


def test_json_and_jsonl_with_or_without_an_input(tmp_path):
    rows = [dict(instruction="a", input="b", output="c\u2028d"),
            dict(instruction=" e ", output="f")]
    texts = dict(json=json.dumps(rows, ensure_ascii=False, indent=1),
                 jsonl="".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows))
    for name, text in texts.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
        assert load_instructions(tmp_path / name) == [
            dict(instruction="a", input="b", output="c\u2028d"),
            dict(instruction="e", input="", output="f")]


def test_held_out_rows_are_the_same_for_every_seed_and_never_trained_on():
    rows = load_instructions(DEMO / "instruct.jsonl")
    (train, held), again = split(rows, 0.05), split(rows, 0.05)
    assert (train, held) == again and len(held) == 150 and len(train) == 2850
    assert not {json.dumps(r) for r in train} & {json.dumps(r) for r in held}
    assert len(split(rows, 7)[1]) == 7


# ---- bad input


def test_rows_without_an_output_are_left_out_and_null_is_empty(tmp_path, capsys):
    rows = [dict(instruction="a", input=None, output="b"), dict(instruction="c", output=" "),
            dict(instruction=None, input="", output="d"), dict(instruction="e", output="f")]
    (tmp_path / "data.json").write_text(json.dumps(rows))
    assert [row["output"] for row in load_instructions(tmp_path / "data.json")] == ["b", "f"]
    said = capsys.readouterr().out
    assert "data.json: 2 of 4 rows are left out" in said and "row 1: output is ' '" in said


@pytest.mark.parametrize("content,words", [
    ("", "has no rows"),
    ("[]", "has no rows"),
    ("[{]", "neither a JSON list nor JSONL"),
    ('{"instruction": "a"}', "line 1: output is None"),
    ('[{"instruction": "a", "output": 3}]', "row 0: output is 3"),
    ('["a"]', "row 0: instruction is None"),
    ('{"instruction": " ", "output": "a"}', "line 1: instruction is ' ', and no other row"),
    ('{"instruction": "a", "output": null}', "line 1: output is None, and no other row"),
    ('[{"instruction": "a", "output": "b\\ud83d"}]', r"row 0: output is 'b\ud83d', expected text"),
    ('[{"instruction": "a", "input": "\\udc00", "output": "b"}]', r"row 0: input is '\udc00'"),
    (b"\xff\xfe", "byte 0 is not UTF-8"),
    (None, "not found"),
])
def test_data_that_does_not_fit(tmp_path, content, words):
    file = tmp_path / "data.json"
    if content is not None:
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError, match=re.escape(words)) as e:
        load_instructions(file)
    assert str(file) in str(e.value) and "\n" not in str(e.value)


@pytest.mark.parametrize("flags,words", [
    (["--model", "x"], "--data is not given"),
    (["--data", "x"], "--model is not given"),
    (["--model", "./nowhere", "--data", DEMO / "instruct.jsonl"],
     "--model ./nowhere: no such folder"),
    (["--method", "ft"], "invalid choice: 'ft'"),
    (["--targets", "x"], "invalid choice: 'x'"),
    (["--hold-out", "5000"], "--hold-out is 5000.0, expected fewer than the 3000 rows"),
    (["--max-length", "1000"], "--max-length is 1000, but"),
    (["--max-length", "20", "--limit-train", "9"],
     "no prompt leaves room for a response in 9 rows: give more"),
    (["--r", "65"], "--r is 65, but the narrowest"),
    (["--generate", "-1"], "--generate is -1"),
    (["--model", DEMO / "model", "--data", DEMO / "instruct.jsonl"],
     "model_type is 'roberta', expected llama"),
    (["generate"], "--instruction"),
    (["generate", "--instruction", "a", "--adapter", "./nowhere"], "--adapter ./nowhere: "),
    (["generate", "--instruction", "a", "--top-p", "0"], "--top-p is 0.0"),
    (["generate", "--instruction", "a", "--max-new-tokens", "9999"],
     "--max-new-tokens is 9999; with the prompt of"),
    (["generate", "--instruction", "a", "--device", "tpu"], "--device is 'tpu'"),
])
def test_bad_flags_end_in_one_line_and_status_2(flags, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as e:
        train_instruct.command(list(map(str, flags)))
    captured = capsys.readouterr()
    assert e.value.code == 2 and words in captured.err and captured.err.count("\n") == 1
    assert captured.err.startswith("error: ")
    assert not list(tmp_path.iterdir())


# ---- generation


def test_streamed_text_is_the_answer(demo, tmp_path, capsys):
    plain, tokenizer = demo
    model = load_decoder(DEMO / "llama")
    torch.manual_seed(4)
    sl.SaLoRA(model, model.target_paths("qkvoud"), 1, r=8, window=None)
    for layer in sl.adapters(model).values():
        torch.nn.init.normal_(layer.lora_B, std=0.1)  # not trained: nowhere two tokens nearly tie
    adapter.save(model, tmp_path / "a")
    prompts = [tokenizer.encode(fill("alpaca", "Deny it.", "A man sleeps.")).ids]
    stop = stop_ids(DEMO / "llama")
    before, after = (train_instruct.answer(m, tokenizer, prompts, stop, 40) for m in (plain, model))
    assert before != after
    for flags in ([], ["--merge"]):
        train_instruct.command(["generate", "--adapter", str(tmp_path / "a"), *flags,
                                "--instruction", "Deny it.", "--input", "A man sleeps.",
                                "--max-new-tokens", "40"])
        assert capsys.readouterr().out.strip() == after[0]


def test_answers_do_not_depend_on_the_batch(demo):
    model, tokenizer = demo
    prompts = [tokenizer.encode(text).ids for text in (
        "The old boy sleeps. (past)", "Many", "A dog sees the king. (negation) A")]
    together = train_instruct.answer(model, tokenizer, prompts, stop_ids(DEMO / "llama"), 20)
    assert together == [
        train_instruct.answer(model, tokenizer, [p], stop_ids(DEMO / "llama"), 20)[0]
        for p in prompts]
    assert together[0].endswith("The old boy slept.")
    assert together[2].startswith("dog does not see the king.")


@pytest.mark.parametrize("command", [
    ["generate", "--instruction", "Hi"],
    ["style", "--data", "yelp", "--direction", "neg2pos"]])
def test_token_ids_beyond_the_vocabulary_are_one_line(command, yelp, monkeypatch, capsys):
    monkeypatch.chdir(yelp.parent)
    shutil.copytree(DEMO / "llama", "llama")
    tokenizer = Tokenizer.from_file("llama/tokenizer.json")
    tokenizer.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    tokenizer.save("llama/tokenizer.json")
    with pytest.raises(SystemExit) as e:
        train_instruct.command([*command, "--model", "llama", "--template", "chatml"])
    error = capsys.readouterr().err
    assert e.value.code == 2 and error.count("\n") == 1
    assert "tokenizer.json gives token id" in error and not Path("runs").exists()


@pytest.mark.parametrize("flags,words", [
    (["--adapter", ""], "argument --adapter: empty, expected a value"),
    (["--merge"], "--merge is given, expected none without --adapter"),
    (["--top-p", "0.9"], "--top-p is 0.9, expected none without --temperature"),
    (["--model", str(DEMO / "model")], "model_type is 'roberta', expected llama"),
    (["--adapter", "."], "not found; give the adapter in it, adapter"),
])
def test_what_cannot_answer_is_said_in_one_line(flags, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "adapter").mkdir()
    with pytest.raises(SystemExit) as e:
        train_instruct.command(["generate", "--instruction", "Hi", *flags])
    error = capsys.readouterr().err
    assert e.value.code == 2 and words in error and error.count("\n") == 1


def test_answers_are_computed_in_the_dtype_of_the_run_or_else_of_the_model(tmp_path, capsys):
    model = load_decoder(DEMO / "llama")
    sl.SaLoRA(model, model.target_paths("q"), 1, r=2, window=None)
    adapter.save(model, tmp_path / "r" / "adapter")
    shutil.copytree(DEMO / "llama", tmp_path / "m")
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    (tmp_path / "m" / "config.json").write_text(json.dumps(config | dict(dtype="bfloat16")))

    def said(*flags):
        train_instruct.main(["generate", "--instruction", "Hi", "--max-new-tokens", "1", *flags])
        return capsys.readouterr().err.split()[2]

    run_flags = ["--adapter", str(tmp_path / "r" / "adapter")]
    assert said() == "float32" and said("--model", str(tmp_path / "m")) == "bfloat16"
    for dtype in ("bfloat16", "float32"):
        (tmp_path / "r" / "result.json").write_text(
            json.dumps(dict(score=0.5, settings=dict(dtype=dtype))))
        assert said(*run_flags, "--model", str(tmp_path / "m")) == dtype
    assert said(*run_flags, "--dtype", "bfloat16") == "bfloat16"


# ---- style transfer and its scores


@pytest.fixture
def yelp(tmp_path):
    folder = tmp_path / "yelp"
    folder.mkdir()
    sentences = {
        "test.neg": ["A man does not sleep .", "The boys do not fall .", "Anna hid a box ."],
        "ref0.neg2pos": ["a man sleeps .", "the boys fall .", "anna hides a box ."],
        "ref1.neg2pos": ["a man is sleeping .", "the boys are falling .", "anna hides it ."]}
    for name, lines in sentences.items():
        (folder / name).write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    """A run of train_glue.py that tells sentences with `not` (neg) from those without (pos)."""
    folder = tmp_path_factory.mktemp("classifier")
    rows = [json.loads(line) for line in (DEMO / "instruct.jsonl").read_text().splitlines()]
    denied = [r for r in rows if " not " in r["output"]]
    pairs = [(r["output"], "neg") for r in denied] + [(r["input"], "pos") for r in denied]
    for name, part in dict(train=pairs[::2], dev=pairs[1::8]).items():
        (folder / f"{name}.tsv").write_text(
            "sentence\tlabel\n" + "".join(f"{text}\t{label}\n" for text, label in part))
    train_glue.main(["--task", str(folder), "--model", str(DEMO / "model"), "--method", "lora",
                     "--lr", "3e-3", "--epochs", "2", "--threads", "1",
                     "--out", str(folder / "run")])
    assert json.loads((folder / "run" / "result.json").read_text())["score"] > 0.95
    return folder / "run"


def test_style_writes_outputs_answers_and_scores(tmp_path, yelp, capsys):
    out = tmp_path / "r"
    train_instruct.command(["style", "--data", str(yelp), "--direction", "neg2pos", "--limit", "2",
                            "--max-new-tokens", "12", "--out", str(out)])
    outputs = (out / "outputs.neg2pos").read_text().splitlines()
    answers = [json.loads(line) for line in (out / "answers.jsonl").read_text().splitlines()]
    scores = json.loads((out / "scores.json").read_text())
    assert len(outputs) == scores["sentences"] == 2
    assert [a["source"] for a in answers] == ["A man does not sleep .", "The boys do not fall ."]
    assert outputs == [tidy(a["answer"], "neg2pos") for a in answers]
    capsys.readouterr()
    for name in ("test.neg", "ref0.neg2pos", "ref1.neg2pos"):
        (tmp_path / name).write_text("\n".join((yelp / name).read_text().splitlines()[:2]) + "\n")
    train_instruct.command(["score", "--outputs", str(out / "outputs.neg2pos"),
                            "--sources", str(tmp_path / "test.neg"), "--references",
                            *(str(tmp_path / f"ref{i}.neg2pos") for i in (0, 1))])
    again = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert again == {name: scores[name] for name in ("BLEU", "self-BLEU")}
    with pytest.raises(SystemExit):
        train_instruct.command(["style", "--data", str(yelp), "--direction", "neg2pos",
                                "--out", str(out)])


@pytest.mark.slow
def test_accuracy_is_the_share_that_the_classifier_takes_for_the_target(
        tmp_path, classifier, capsys):
    (tmp_path / "o.neg2pos").write_text(
        "A man sleeps.\nA man does not sleep.\nThe boys fall.\nMary smiles.\n")
    for flags, expected in (([], 75), (["--target", "neg"], 25)):
        train_instruct.command(["score", "--outputs", str(tmp_path / "o.neg2pos"),
                                "--classifier", str(classifier), "--threads", "1", *flags])
        assert json.loads(capsys.readouterr().out.splitlines()[-1]) == {"ACC": expected}


@pytest.mark.slow
def test_several_outputs_make_a_table_and_none_is_scored_against_itself(
        tmp_path, yelp, classifier, capsys):
    files = [str(yelp / name) for name in ("test.neg", "ref0.neg2pos", "ref1.neg2pos")]
    (tmp_path / "o.neg2pos").write_text("a man sleeps .\nthe boys fall .\nanna hid a box .\n")
    outputs = [str(tmp_path / "o.neg2pos"), files[1]]
    train_instruct.command(["score", "--outputs", *outputs, "--data", str(yelp), "--classifier",
                            str(classifier), "--threads", "1", "--out", str(tmp_path / "r")])
    *table, last = capsys.readouterr().out.splitlines()
    scores = json.loads(last)
    assert scores == json.loads((tmp_path / "r" / "scores.json").read_text())
    assert list(scores) == outputs
    command, text = (tmp_path / "r" / "table.md").read_text().split("\n\n")
    assert command.startswith("    python train_instruct.py score --outputs")
    assert text == "\n".join(line for line in table if line.startswith("|")) + "\n"
    second = scores[outputs[1]]
    row = f"| {outputs[1]} | 3 | {second['ACC']:.2f} | {second['BLEU']:.2f} |"
    assert row in "\n".join(table)
    # the reference ref0 is left out for ref0 itself
    for file, references in ((outputs[0], files[1:]), (outputs[1], files[2:])):
        train_instruct.command(["score", "--outputs", file, "--sources", files[0], "--references",
                                *references, "--classifier", str(classifier), "--threads", "1"])
        alone = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert alone | dict(sentences=3) == scores[file]
    assert scores[outputs[1]]["BLEU"] < 100


def test_perplexity_is_kenlms_per_token(tmp_path, capsys):
    pytest.importorskip("kenlm", reason="kenlm is not installed")
    arpa = ("\\data\\\nngram 1=4\nngram 2=2\n\n"
            "\\1-grams:\n-1.0\t<unk>\t0\n-99\t<s>\t-0.125\n-0.5\t</s>\t0\n-0.25\ta\t0\n\n"
            "\\2-grams:\n-0.0625\ta a\n-0.75\t<s> a\n\n\\end\\\n")
    (tmp_path / "lm.arpa").write_text(arpa)
    (tmp_path / "o").write_text("a a\nb\n")
    train_instruct.command(["score", "--outputs", str(tmp_path / "o"),
                            "--lm", str(tmp_path / "lm.arpa")])
    # <s> a a </s>; <s> backs off to the unknown b, then </s>
    log10 = (-0.75 - 0.0625 - 0.5) + (-0.125 - 1.0 - 0.5)
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["PPL"] == pytest.approx(
        10 ** (-log10 / 5), rel=1e-5)
    # only ASCII white space ends a word: a single one, unknown
    (tmp_path / "o").write_text("a\u00a0a\n", encoding="utf-8")
    train_instruct.command(["score", "--outputs", str(tmp_path / "o"),
                            "--lm", str(tmp_path / "lm.arpa")])
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["PPL"] == pytest.approx(
        10 ** ((0.125 + 1.0 + 0.5) / 2), rel=1e-5)  # 6.49
    (tmp_path / "lm.arpa").write_text(arpa[:90])
    with pytest.raises(SystemExit):
        train_instruct.command(["score", "--outputs", str(tmp_path / "o"),
                                "--lm", str(tmp_path / "lm.arpa")])
    assert capsys.readouterr().err.splitlines()[-1].startswith(
        f"error: --lm {tmp_path}/lm.arpa: kenlm cannot read it (")


@pytest.mark.parametrize("flags,words", [
    (["--outputs", "o"], "o: not found"),
    (["--outputs", "two", "--data", "."], "two: does not end in a direction"),
    (["--outputs", "two", "--data", ".", "--sources", "one"], "--data is given"),
    (["--outputs", "two", "--sources", "one"], "one: has 1 lines, but two has 2"),
    (["--outputs", "empty"], "empty: is empty"),
    (["--outputs", "two", "--classifier", "run"], "--target is not given"),
    (["--outputs", "two", "--target", "x", "--classifier", "run"],
     "its labels are ['neg', 'pos'], expected 'x'"),
    (["--outputs", "two", "--target", "pos", "--classifier", "run"], "has no adapter/ (method ft)"),
    (["--outputs", "two", "--lm", "nowhere.arpa"], "--lm"),
    (["--outputs", "two"], "nothing to score by"),
    (["--outputs", "two", "--classifier", ""], "argument --classifier: empty, expected a value"),
    (["--outputs", "two", "--sources", "two", "--out", "style"], "scores.json of a run of style"),
    (["--outputs", "two", "--target", "pos", "--classifier", "."], "has no result.json"),
])
def test_what_cannot_be_scored_is_said_in_one_line(flags, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name, text in dict(one="a\n", two="a\nb\n", empty="\n").items():
        (tmp_path / name).write_text(text)
    (tmp_path / "style").mkdir()
    (tmp_path / "style" / "answers.jsonl").write_text("")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "result.json").write_text(
        json.dumps(dict(score=0.5, labels=["neg", "pos"], settings=dict(method="ft"))))
    with pytest.raises(SystemExit) as e:
        train_instruct.command(["score", *flags])
    captured = capsys.readouterr()
    assert e.value.code == 2 and words in captured.err and captured.err.count("\n") == 1
