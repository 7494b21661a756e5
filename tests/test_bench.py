"""bench.py runs, and its paper estimate of memory is what autograd keeps. Times are not tested."""

import argparse
import json
import subprocess
import sys
from functools import partial
from importlib.util import find_spec

import pytest
import torch

from model import Decoder, DecoderConfig, Encoder, EncoderConfig
from paper import bench
from salora import SaLoRA
from training.runs import run_command


def encoder(layers, d, i):
    return Encoder(EncoderConfig(
        "roberta", vocab_size=50, hidden_size=d, num_hidden_layers=layers, num_attention_heads=4,
        intermediate_size=i, max_position_embeddings=34, type_vocab_size=1,
        attention_probs_dropout_prob=0.0), 2)


def decoder(layers, d, i):
    return Decoder(DecoderConfig(vocab_size=50, hidden_size=d, num_hidden_layers=layers,
                                 num_attention_heads=4, num_key_value_heads=2, intermediate_size=i))


def kept_by_layer(build, d, i, dtype=torch.float32):
    """Bytes that autograd keeps of a forward pass for each layer and token, parameters left out."""
    def kept(layers, b=8, t=32):
        model, storages = build(layers, d, i).to(dtype), {}
        SaLoRA(model, model.target_paths("qkvoud"), steps=10, r=1)
        own = {p.untyped_storage().data_ptr() for p in model.parameters()}

        def pack(x):
            storages[x.untyped_storage().data_ptr()] = x.untyped_storage()
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            hidden = model.train().hidden(torch.randint(2, 50, (b, t)))
        assert hidden.requires_grad
        return sum(s.nbytes() for address, s in storages.items() if address not in own) / (b * t)

    return (kept(4) - kept(2)) / 2


def test_memory_formulas_are_what_a_layer_keeps():
    """And a little more: z = A x, the norms' statistics, A and B rounded."""
    layer = kept_by_layer(encoder, 128, 512)
    formula = bench.kept_by_encoder_layer(d=128, i=512, size=4, mask=4)  # a CPU's mask is of floats
    assert formula < layer < 1.02 * formula
    for dtype in (torch.float32, torch.bfloat16):
        layer = kept_by_layer(decoder, 128, 344, dtype)
        formula = bench.kept_by_llama_layer(d=128, i=344, size=dtype.itemsize)
        assert formula < layer < 1.02 * formula


@pytest.mark.slow
def test_tables_as_json_and_as_text():
    def run(*flags):
        flags = "--threads", "1", *flags  # a second thread would wait for whatever else is running
        return subprocess.run([sys.executable, bench.__file__, *flags], capture_output=True,
                              text=True, check=True).stdout

    out = json.loads(run("step", "memory", "--json", "--repeats", "1"))
    assert [row["step"] for row in out["step"]] == list(bench.KINDS.values())
    assert out["step"][0]["ratio"] == 1
    assert all(row["ms"] > 0 and row["operators"] > 100 for row in out["step"])
    fits = {tuple(row[key] for key in ("model", "batch", "dtype", "recompute")):
            (row["24 GB card"], row["80 GB card"]) for row in out["memory"]}
    assert fits["RoBERTa-large", "32 x 128", "float32", "no"] == ("fits", "fits")
    assert fits["LLaMA-7B", "4 x 512", "bfloat16", "yes"] == ("fits", "fits")
    assert fits["LLaMA-7B", "4 x 512", "bfloat16", "no"] == ("no", "fits")
    assert fits["LLaMA-7B", "16 x 512", "bfloat16", "no"] == ("no", "fits")
    assert run("memory").count("| LLaMA-7B |") == 8


@pytest.mark.slow
def test_gpu_tables(monkeypatch):
    """On small sizes and, but for CUDA's counters, on the CPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        bench.main(["gpu"])
    for name in ("memory_allocated", "max_memory_allocated", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda: 2**20)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    small = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64)
    monkeypatch.setattr(bench, "ROBERTA", {"small": small})
    estimate = partial(bench.paper_memory, bench.LLAMA_7B)  # of the small one it would round to 0
    monkeypatch.setattr(bench, "paper_memory", lambda c, *rest: estimate(*rest))
    monkeypatch.setattr(bench, "LLAMA_7B", DecoderConfig(vocab_size=60, **small))
    monkeypatch.setattr(bench, "BATCHES", (2,))
    monkeypatch.setattr(bench, "SIDE", 64)
    args = argparse.Namespace(device="cpu", repeats=1)
    table = bench.bench_gpu(args)
    assert [row["step"] for row in table][:5] == [*bench.GPU_KINDS.values()]
    assert {row["step"]: row["ratio to LoRA"] for row in table}["LoRA"] == 1
    assert all(row["ms"] > 0 and row["peak MB"] == 0 for row in table)  # the same count twice
    assert len(table) == 5 + bool(find_spec("peft") and find_spec("transformers"))
    product, *decoding, alone, more, wide = bench.bench_gpu_llama(args)
    assert len(decoding) == 2 and all(row["tokens/s"] > 0 for row in decoding)
    assert alone["on paper GiB"] < wide["on paper GiB"] < more["on paper GiB"]


@pytest.mark.slow
def test_a_wrong_folder_is_one_line(tmp_path):
    done = subprocess.run([sys.executable, bench.__file__, "step", "--model", str(tmp_path)],
                          capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert f"{tmp_path}/config.json" in done.stderr


@pytest.mark.parametrize("flags, words", [
    (["--threads", "0"], "--threads is 0"), (["--repeats", "0"], "--repeats is 0"),
    (["--device", "meta"], "--device is 'meta'")])
def test_bad_flags_are_one_line(flags, words, capsys):
    with pytest.raises(SystemExit) as end:
        run_command(bench.main, ["memory", *flags])
    text = capsys.readouterr().err
    assert end.value.code == 2 and words in text and text.count("\n") == 1


def test_peers_without_data_are_one_line(capsys):
    with pytest.raises(SystemExit) as end:
        bench.main(["loop", "--peers", "python", "--task", "cola"])
    text = capsys.readouterr().err
    assert end.value.code == 2 and "give --task cola and --data" in text and text.count("\n") == 1
