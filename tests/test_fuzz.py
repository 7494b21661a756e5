"""
Whatever stands in a file: either it is read, or our own error names it. With hypothesis
(requirements-oracles.txt), 200 inputs a reader; FUZZ=10000 for more.
"""

import json
import os
import shutil
import tempfile
from pathlib import Path

import pytest

import adapter
from data import InputError
from data.glue import load_task
from data.instruct import load_instructions
from model import DecoderConfig, load_encoder, read_config

hypothesis = pytest.importorskip(
    "hypothesis", reason="hypothesis is not installed: pip install -r requirements-oracles.txt")
given, st = hypothesis.given, hypothesis.strategies
often = hypothesis.settings(max_examples=int(os.environ.get("FUZZ", 200)), deadline=None,
                            derandomize=True, suppress_health_check=list(hypothesis.HealthCheck))
FIXTURES = Path(__file__).parent / "fixtures"
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-10, 10**12) | st.floats() | st.text(max_size=8),
    lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=8), x, max_size=3))
CELLS = st.sampled_from(["sentence", "label", "score", "a", "1", "0.5", "", "\r", "\ufeff"])
TABLES = st.lists(st.lists(CELLS, max_size=4).map("\t".join), max_size=6).map("\n".join)
ROWS = st.lists(
    st.dictionaries(st.sampled_from(["instruction", "input", "output"]), VALUES), max_size=3)


def one_of_ours(read, *kinds):
    try:
        read()
    except kinds as e:
        assert str(e) and "\n" not in str(e)


@often
@given(st.binary(max_size=300) | TABLES.map(str.encode))
def test_oracle_any_table(content):
    with tempfile.TemporaryDirectory() as folder:
        for name in ("train.tsv", "dev.tsv"):
            Path(folder, name).write_bytes(content)
        one_of_ours(lambda: load_task(folder), InputError)


@pytest.mark.slow
@often
@given(st.binary(max_size=200) | (VALUES | ROWS).map(lambda x: json.dumps(x).encode()))
def test_oracle_any_instructions(content):
    with tempfile.NamedTemporaryFile(suffix=".json") as f:
        Path(f.name).write_bytes(content)
        one_of_ours(lambda: load_instructions(f.name), InputError)


@pytest.mark.slow
@often
@given(st.sampled_from(["bert", "llama3"]), st.data())
def test_oracle_any_config(kind, data):
    good = json.loads((FIXTURES / kind / "config.json").read_text())
    changes = data.draw(st.dictionaries(st.sampled_from(sorted(good)), VALUES, min_size=1,
                                        max_size=3))
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(good | changes))
        more = [DecoderConfig] if kind == "llama3" else []
        one_of_ours(lambda: read_config(folder, *more), InputError)


@pytest.mark.slow
@often
@given(st.integers(0, 5000), st.binary(min_size=1, max_size=8))
def test_oracle_any_damaged_weights(at, damage):
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(FIXTURES / "bert", folder, dirs_exist_ok=True)
        file = Path(folder, "model.safetensors")
        content = bytearray(file.read_bytes())
        content[at:at + len(damage)] = damage
        file.write_bytes(content)
        one_of_ours(lambda: load_encoder(folder, 3), InputError)


@pytest.mark.slow
@often
@given(st.data())
def test_oracle_any_adapter(data):
    good = json.loads((FIXTURES / "peft-bert" / "adapter_config.json").read_text())
    changes = data.draw(st.dictionaries(st.sampled_from(sorted(good)), VALUES, max_size=3))
    at, damage = data.draw(st.integers(0, 3000)), data.draw(st.binary(max_size=6))
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(FIXTURES / "peft-bert", folder, dirs_exist_ok=True)
        Path(folder, "adapter_config.json").write_text(json.dumps(good | changes))
        content = bytearray(Path(folder, "adapter_model.safetensors").read_bytes())
        content[at:at + len(damage)] = damage
        Path(folder, "adapter_model.safetensors").write_bytes(content)
        model = load_encoder(FIXTURES / "bert", 3)
        one_of_ours(lambda: adapter.load(model, folder), ValueError, OSError)
