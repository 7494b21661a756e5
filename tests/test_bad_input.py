"""
What is wrong with files that people have, from the outside: exit status 2, one line on stderr that
names the file or flag, nothing written.
"""

import json
import shutil
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import adapter
import salora as sl
import train_glue
import train_instruct
from model import load_encoder

DEMO = Path(train_glue.__file__).parent / "data" / "demo"
GOOD = "sentence\tlabel\n" + "".join(f"The old boy {'sleeps' if i % 2 else 'sleep'}.\t{i % 2}\n"
                                     for i in range(40))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with data, a model, an adapter of it, a LLaMA in shards with a tokenizer, and
    instructions: all sound."""
    here = tmp_path_factory.mktemp("sound")
    (here / "data").mkdir()
    for name in ("train.tsv", "dev.tsv"):
        (here / "data" / name).write_text(GOOD)
    shutil.copytree(DEMO / "model", here / "model")
    model = load_encoder(here / "model", 2)
    sl.SaLoRA(model, model.target_paths("qv"), 1, r=2, window=None)
    adapter.save(model, here / "adapter", ["classifier"], task_type="SEQ_CLS")
    shutil.copytree(DEMO / "llama", here / "llama")
    weights = load_file(here / "llama" / "model.safetensors")
    (here / "llama" / "model.safetensors").unlink()
    shards = {key: f"model-0000{i % 3 + 1}-of-00003.safetensors"
              for i, key in enumerate(sorted(weights))}
    for shard in set(shards.values()):
        save_file({key: weights[key] for key in weights if shards[key] == shard},
                  here / "llama" / shard)
    (here / "llama" / "model.safetensors.index.json").write_text(
        json.dumps(dict(weight_map=shards)))
    (here / "rows.json").write_text(
        json.dumps([dict(instruction=f"Say {i}.", output=f"{i}") for i in range(20)]))
    return here


@pytest.fixture
def here(made, tmp_path, monkeypatch):
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


GLUE = ["--task", "data", "--model", "model", "--threads", "1", "--max-steps", "10", "--out", "r"]
ADAPTER = [*GLUE, "--adapter", "adapter", "--epochs", "0"]
INSTRUCT = ["--model", "llama", "--data", "rows.json", "--threads", "1", "--max-length", "60",
            "--max-steps", "10", "--out", "r"]


def write(name, content):
    def change(here):
        file = here / name
        if content is None:
            file.unlink(missing_ok=True)
        else:
            file.write_bytes(content if isinstance(content, bytes) else content.encode())
    return change


def config(name, **changes):
    def change(here):
        values = json.loads((here / name).read_text()) | changes
        (here / name).write_text(
            json.dumps({key: value for key, value in values.items() if value is not ...}))
    return change


def cut(name, size):
    return lambda here: (here / name).write_bytes((here / name).read_bytes()[:size])


def folder_instead(name):
    def change(here):
        (here / name).unlink()
        (here / name).mkdir()
    return change


def tensors(name, edit):
    def change(here):
        found = load_file(here / name)
        edit(found)
        save_file(found, here / name)
    return change


def header(name, size=None, edit=None):
    """A safetensors file whose header lies."""
    def change(here):
        data = (here / name).read_bytes()
        n, = struct.unpack("<Q", data[:8])
        text = json.dumps(edit(json.loads(data[8:8 + n]))).encode() if edit else data[8:8 + n]
        length = struct.pack("<Q", len(text) if size is None else size)
        (here / name).write_bytes(length + text + data[8 + n:])
    return change


def offsets(table):
    key = next(k for k in table if k != "__metadata__")
    return table | {key: table[key] | dict(data_offsets=[0, 10**12])}


W, C, T = "model/model.safetensors", "model/config.json", "model/tokenizer.json"
A, AC = "adapter/adapter_model.safetensors", "adapter/adapter_config.json"
L, SHARD = (f"llama/model-0000{i}-of-00003.safetensors" for i in (1, 3))
LC, INDEX = "llama/config.json", "llama/model.safetensors.index.json"
CASES = [  # what is changed, the command, what its line says
    # ---- tables
    (write("data/train.tsv", None), GLUE, "data/train.tsv: not found"),
    (write("data/dev.tsv", None), GLUE, "data/dev.tsv: not found"),
    (write("data/train.tsv", ""), GLUE, "data/train.tsv: has no rows"),
    (write("data/dev.tsv", "sentence\tlabel\n"), GLUE, "data/dev.tsv: has no rows"),
    (write("data/train.tsv", "text\tlabel\na\t1\n"), GLUE, "data/train.tsv: columns are"),
    (write("data/train.tsv", "sentence\tclass\na\t1\n"), GLUE, "data/train.tsv: columns are"),
    (write("data/train.tsv", "sentence,label\na,1\n"), GLUE, "data/train.tsv: columns are"),
    (write("data/train.tsv", "sentence\tlabel\na\t1\nb\t1\n"), GLUE,
     "data/train.tsv: column label has 1 distinct values"),
    (write("data/train.tsv", "sentence\tlabel\na\t1\n"), GLUE, "1 distinct values"),
    (write("data/train.tsv", GOOD + "a\n"), GLUE, "data/train.tsv: line 42 has 1 columns"),
    (write("data/train.tsv", GOOD + "a\t1\tb\n"), GLUE, "data/train.tsv: line 42 has 3 columns"),
    (write("data/dev.tsv", GOOD + "a\t7\n"), GLUE, "data/dev.tsv: line 42: label is '7'"),
    (write("data/train.tsv", GOOD + "a\t \n"), GLUE, "data/train.tsv: line 42 has no label"),
    (write("data/train.tsv", b"sentence\tlabel\n\xff\xfe\t1\n"), GLUE,
     "data/train.tsv: byte 15 is not UTF-8"),
    (write("data/train.tsv", GOOD.encode("utf-16")), GLUE, "data/train.tsv: byte 0 is not UTF-8"),
    (write("data/train.tsv", GOOD + "a\0b\t1\n"), GLUE, "data/train.tsv: line 42 holds a NUL byte"),
    (write("data/train.tsv", "sentence\tscore\na\tgood\n"), GLUE,
     "data/train.tsv: line 2: score is 'good'"),
    (write("data/train.tsv", "sentence\tscore\na\tinf\n"), GLUE, "score is 'inf'"),
    (folder_instead("data/train.tsv"), GLUE, "data/train.tsv: cannot be read"),
    (lambda here: shutil.rmtree(here / "data"), GLUE, "--task is 'data'"),
    (write("data/dev.tsv", "sentence1\tsentence2\tlabel\na\tb\t1\n"), GLUE,
     "data/dev.tsv: no column 'sentence'"),
    # ---- model folders
    (lambda here: shutil.rmtree(here / "model"), GLUE, "--model model: no such folder"),
    (write(C, None), GLUE, "model/config.json: not found"),
    (write(C, ""), GLUE, "model/config.json: cannot be read as JSON"),
    (write(C, "[]"), GLUE, "model/config.json: holds a list"),
    (write(C, b"\xff{}"), GLUE, "model/config.json: byte 0 is not UTF-8"),
    (write(C, "{" * 100_000), GLUE, "model/config.json: cannot be read as JSON"),
    (config(C, model_type="gpt2"), GLUE, "model/config.json: model_type is 'gpt2'"),
    (config(C, hidden_size=...), GLUE, "hidden_size is missing"),
    (config(C, hidden_size="128"), GLUE, "hidden_size is '128'"),
    (config(C, hidden_size=-1), GLUE, "hidden_size is -1"),
    (config(C, hidden_size=10**9), GLUE, "model/config.json: hidden_size is 1000000000"),
    (config(C, num_hidden_layers=10**9), GLUE, "num_hidden_layers is 1000000000"),
    (config(C, num_attention_heads=0), GLUE, "sizes do not fit together"),
    (config(C, num_attention_heads=3), GLUE, "sizes do not fit together"),
    (config(C, vocab_size=True), GLUE, "vocab_size is True"),
    (config(C, hidden_dropout_prob=1.0), GLUE, "hidden_dropout_prob is 1.0"),
    (config(C, pad_token_id=10**6), GLUE, "pad_token_id 1000000"),
    (config(C, num_hidden_layers=3), GLUE, "model: the checkpoint has unexpected"),
    (config(C, num_hidden_layers=5), GLUE, "model: the checkpoint lacks"),
    (config(C, vocab_size=30), GLUE, "vocab_size is 30"),
    (folder_instead(C), GLUE, "model/config.json: cannot be read"),
    (write(W, None), GLUE, "found neither model.safetensors nor"),
    (write(W, ""), GLUE, "model/model.safetensors: not a readable safetensors file"),
    (cut(W, 5), GLUE, "not a readable safetensors file"),
    (cut(W, 100_000), GLUE, "not a readable safetensors file"),
    (header(W, size=10**15), GLUE, "not a readable safetensors file"),
    (header(W, edit=offsets), GLUE, "not a readable safetensors file"),
    (header(W, edit=lambda table: []), GLUE, "not a readable safetensors file"),
    (folder_instead(W), GLUE, "found neither model.safetensors nor"),
    (tensors(W, lambda t: t.popitem()), GLUE, "the checkpoint lacks"),
    (tensors(W, lambda t: t.update(extra=torch.zeros(2))), GLUE, "has unexpected extra"),
    (lambda here: (here / W).rename(here / "model" / "pytorch_model.bin"), GLUE,
     "pytorch_model.bin is a pickle"),
    (write(T, None), GLUE, "model/tokenizer.json: not found"),
    (write(T, "{}"), GLUE, "model/tokenizer.json: not a readable tokenizer"),
    (write(T, "[" * 200_000), GLUE, "model/tokenizer.json: cannot be read as JSON"),
    (lambda here: (here / T).write_bytes(b" " * (65 << 20)), GLUE,
     "model/tokenizer.json: has 65 MiB"),
    (folder_instead(T), GLUE, "model/tokenizer.json: not found"),
    (lambda here: shutil.copytree(here / "llama", here / "model", dirs_exist_ok=True), GLUE,
     "model_type is 'llama'"),
    # ---- adapters
    (lambda here: shutil.rmtree(here / "adapter"), ADAPTER, "--adapter adapter: "),
    (write(AC, None), ADAPTER, "adapter_config.json"),
    (write(AC, "{"), ADAPTER, "adapter_config.json: cannot be read as JSON"),
    (write(AC, "3"), ADAPTER, "holds a int"),
    (config(AC, peft_type="LOHA"), ADAPTER, "peft_type is 'LOHA'"),
    (config(AC, r=-2), ADAPTER, "r is -2"),
    (config(AC, r=3), ADAPTER, "expected [3, 128], found [2, 128]"),
    (config(AC, r=...), ADAPTER, "r is None"),
    (config(AC, lora_alpha="big"), ADAPTER, "lora_alpha is 'big'"),
    (config(AC, lora_alpha=float("nan")), ADAPTER, "lora_alpha is nan"),
    (config(AC, target_modules=["nothing"]), ADAPTER, "'nothing' matches no nn.Linear"),
    (config(AC, target_modules=[3]), ADAPTER, "target_modules is [3]"),
    (config(AC, target_modules="(.*)*x"), ADAPTER, "too intricate"),
    (config(AC, rank_pattern={"(a+)+": 2}), ADAPTER, "too intricate"),
    (config(AC, rank_pattern=[1]), ADAPTER, "rank_pattern is [1]"),
    (config(AC, modules_to_save="classifier"), ADAPTER, "modules_to_save is"),
    (write(A, None), ADAPTER, "adapter_model.safetensors"),
    (write(A, "x"), ADAPTER, "adapter_model.safetensors: not a readable safetensors file"),
    (header(A, edit=offsets), ADAPTER, "not a readable"),
    (tensors(A, lambda t: t.popitem()), ADAPTER, "found nothing"),
    (tensors(A, lambda t: t.update(x=torch.zeros(1))), ADAPTER, "x: expected nothing"),
    (lambda here: (here / A).rename(here / "adapter" / "adapter_model.bin"), ADAPTER,
     "adapter_model.safetensors"),
    (config("adapter/salora.json", labels=[1, 2]), ADAPTER, "salora.json: labels is [1, 2]"),
    (config("adapter/salora.json", labels=["1", "zero"]), ADAPTER,
     "--adapter adapter: its head gives 1, zero, expected the labels of the task, 0, 1"),
    (write("adapter/salora.json", "["), ADAPTER, "salora.json: cannot be read as JSON"),
    # ---- LLaMA in shards, and instructions
    (write(SHARD, None), INSTRUCT, "shard listed in"),
    (write(INDEX, None), INSTRUCT, "found neither"),
    (write(INDEX, "{}"), INSTRUCT, "index.json: has no weight_map"),
    (config(INDEX, weight_map=[1]), INSTRUCT, "has no weight_map"),
    (config(INDEX, weight_map={"a": "../../evil.safetensors"}), INSTRUCT,
     "index.json: names files outside its folder"),
    (config(INDEX, weight_map={"a": 3}), INSTRUCT, "index.json"),
    (cut(L, 50), INSTRUCT, "00001-of-00003.safetensors: not a readable"),
    (config(LC, num_key_value_heads=3), INSTRUCT, "sizes do not fit"),
    (config(LC, rope_parameters=dict(rope_type="yarn")), INSTRUCT, "rope_type is 'yarn'"),
    (config(LC, eos_token_id="</s>"), INSTRUCT, "eos_token_id is"),
    (config(LC, eos_token_id=[2, -5]), INSTRUCT, "eos_token_id is [2, -5]"),
    (write(LC, "null"), INSTRUCT, "holds a NoneType"),
    (config(LC, vocab_size=9), INSTRUCT, "tokenizer.json gives token id"),
    (write("llama/generation_config.json", "[]"), INSTRUCT, "generation_config.json: holds a list"),
    (write("rows.json", None), INSTRUCT, "rows.json: not found"),
    (write("rows.json", ""), INSTRUCT, "rows.json: has no rows"),
    (write("rows.json", "[{}]"), INSTRUCT, "rows.json: row 0: instruction is None"),
    (write("rows.json", '[{"instruction": "a"'), INSTRUCT, "rows.json: is neither"),
    (write("rows.json", b'[{"instruction": "\xff", "output": "a"}]'), INSTRUCT,
     "rows.json: byte 18 is not UTF-8"),
    (write("rows.json", '[{"instruction": "a", "output": 3}]'), INSTRUCT, "row 0: output is 3"),
    (write("rows.json", '[{"instruction": "a", "output": "b"}]'), INSTRUCT, "--hold-out is"),
    (write("rows.json", "[" * 100_000), INSTRUCT, "rows.json: is neither"),
    (write("rows.json", '[{"instruction": "a", "output": "\\ud83d"}]'), INSTRUCT,
     "rows.json: row 0: output is '\\ud83d', expected text"),
    (write("rows.json", '[{"instruction": "a", "output": ""}]'), INSTRUCT,
     "rows.json: row 0: output is '', and no other row"),
    (write("rows.json", json.dumps([dict(instruction="a " * 99, output="b")] * 20)), INSTRUCT,
     "--max-length is 60, and no prompt leaves room for a response in 19 rows"),
]


@pytest.mark.parametrize("number", range(len(CASES)))
def test_bad_input_is_one_line_and_leaves_nothing(number, here, capsys):
    change, flags, words = CASES[number]
    change(here)
    before = {file: file.stat().st_mtime_ns for file in here.rglob("*")}
    script = train_instruct if flags is INSTRUCT else train_glue
    with pytest.raises(SystemExit) as e:
        script.command(flags)
    error = capsys.readouterr().err
    assert e.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1
    assert words in error and len(error) < 600
    assert before == {file: file.stat().st_mtime_ns for file in here.rglob("*")}


def test_a_model_that_is_not_finite_is_told_at_the_first_step(here, capsys):
    tensors(W, lambda t: [value.fill_(torch.nan) for value in t.values()])(here)
    with pytest.raises(SystemExit) as e:
        train_glue.command(GLUE)
    error = capsys.readouterr().err
    assert e.value.code == 2 and error.count("\n") == 1
    assert "the loss is nan before any training: --model, --adapter" in error
    assert not (here / "r").exists()


@pytest.mark.slow
def test_what_was_spoilt_was_sound_and_a_text_may_be_absurdly_long(here):
    (here / "data" / "train.tsv").write_text(GOOD + f"{'a ' * 1_000_000}\t1\n")
    train_glue.main(ADAPTER)
    train_instruct.main([*INSTRUCT[:-1], "r2"])
