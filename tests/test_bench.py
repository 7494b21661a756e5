"""bench.py runs, and its paper estimate of memory is what autograd keeps. Times are not tested."""

import json
import subprocess
import sys

import pytest
import torch

import bench
from model import Encoder, EncoderConfig
from salora import SaLoRA


def kept_bytes(layers, b, t, d):
    """What autograd keeps of a forward pass, parameters left out."""
    config = EncoderConfig("roberta", vocab_size=50, hidden_size=d, num_hidden_layers=layers, num_attention_heads=4, intermediate_size=4 * d,
                           max_position_embeddings=t + 2, type_vocab_size=1, attention_probs_dropout_prob=0.0)
    model, storages = Encoder(config, 2), {}
    SaLoRA(model, model.target_paths("qkvoud"), r=1)
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def pack(x):
        storages[x.untyped_storage().data_ptr()] = x.untyped_storage()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        hidden = model.train().hidden(torch.randint(2, 50, (b, t)))
    assert hidden.requires_grad
    return sum(s.nbytes() for address, s in storages.items() if address not in own)


def test_memory_formula_is_what_an_encoder_layer_keeps():
    layer = (kept_bytes(4, 8, 32, 128) - kept_bytes(2, 8, 32, 128)) / 2
    formula = 8 * 32 * bench.kept_by_encoder_layer(d=128, i=512, size=4, mask=4)  # on a CPU a mask is of floats
    assert layer == pytest.approx(formula, rel=0.02) and layer > formula  # z, the norms' statistics


def test_tables_as_json_and_as_text():
    def run(*flags):
        return subprocess.run([sys.executable, bench.__file__, *flags], capture_output=True, text=True, check=True).stdout

    out = json.loads(run("step", "memory", "--json", "--repeats", "1"))
    assert [row["step"] for row in out["step"]] == list(bench.KINDS.values()) and out["step"][0]["ratio"] == 1
    assert all(row["ms"] > 0 and row["operators"] > 100 for row in out["step"])
    fits = {(row["model"], row["dtype"], row["recompute"]): row["24 GB card"] for row in out["memory"]}
    assert fits["RoBERTa-large", "float32", "no"] == "fits" and fits["LLaMA-7B", "bfloat16", "yes"] == "fits" and fits["LLaMA-7B", "float32", "yes"] == "no"
    assert run("memory").count("| LLaMA-7B |") == 4
