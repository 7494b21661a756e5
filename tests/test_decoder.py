"""LLaMA in model.py gives transformers' numbers and texts, reads the folders people have, and names
what is wrong with the others."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from data import InputError
from model import DECODER_LINEARS, Decoder, DecoderConfig, load_decoder, sample, stop_ids

FIXTURES = Path(__file__).parent / "fixtures"
KINDS = ["llama", "llama3", "llama-linear"]  # see make_fixtures.py


@pytest.fixture(params=KINDS)
def folder(request, tmp_path):
    """A copy of a tiny model that transformers saved."""
    return Path(shutil.copytree(FIXTURES / request.param, tmp_path / request.param))


def edit_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text()) | changes
    config = {k: v for k, v in config.items() if v is not ...}
    (folder / "config.json").write_text(json.dumps(config))


def texts(model, prompts, count=20, **kw):
    out = [[] for _ in prompts]
    for tokens in model.generate(prompts, count, **kw):
        for text, token in zip(out, tokens):
            if token is not None:
                text.append(token)
    return out


def cases(folder):
    e = load_file(folder / "expected.safetensors")
    return ([e[f"prompt.{i}"].tolist() for i in range(5)],
            [e[f"greedy.{i}"].tolist() for i in range(5)])


# ---- parity


def test_logits_are_those_of_transformers(folder):
    e = load_file(folder / "expected.safetensors")
    with torch.no_grad():
        logits = load_decoder(folder)(e["input_ids"])
    assert (logits - e["logits"]).abs().max() < 1e-4 and e["logits"].std() > 0.05


def test_greedy_texts_are_those_of_transformers_one_by_one_and_in_a_padded_batch(folder):
    model, (prompts, greedy) = load_decoder(folder), cases(folder)
    assert len({len(p) for p in prompts}) > 2 and len({tuple(g) for g in greedy}) > 2
    stop = stop_ids(folder)
    assert [texts(model, [p], stop_ids=stop)[0] for p in prompts] == greedy
    assert texts(model, prompts, stop_ids=stop) == greedy


def test_config_in_the_older_spelling_of_the_rotary_settings(folder):
    e = load_file(folder / "expected.safetensors")
    rope = json.loads((folder / "config.json").read_text())["rope_parameters"]
    scaling = {k: v for k, v in rope.items() if k != "rope_theta"}
    kind = scaling.pop("rope_type")
    older = dict(scaling, type=kind) if kind != "default" else None
    edit_config(folder, rope_parameters=..., rope_theta=rope["rope_theta"], rope_scaling=older)
    with torch.no_grad():
        assert (load_decoder(folder)(e["input_ids"]) - e["logits"]).abs().max() < 1e-4


def test_right_padding_needs_no_mask(folder):
    ids, model = load_file(folder / "expected.safetensors")["input_ids"], load_decoder(folder)
    with torch.no_grad():
        torch.testing.assert_close(model(ids[:, :7]), model(ids)[:, :7])


def test_checkpointed_activations_give_the_same_gradients():
    ids = load_file(FIXTURES / "llama3" / "expected.safetensors")["input_ids"]
    grads = []
    for flag in (False, True):
        model = load_decoder(FIXTURES / "llama3").train()
        model.checkpoint_activations = flag
        model(ids).square().sum().backward()
        grads.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads))


# ---- generation


def test_generation_stops_at_the_end_of_text_and_at_the_limit(folder):
    model, (prompts, greedy) = load_decoder(folder), cases(folder)
    stop = greedy[0][3]
    cut = texts(model, prompts, stop_ids={stop})
    for text, whole in zip(cut, greedy):
        whole = whole[:whole.index(stop) + 1] if stop in whole else whole
        assert text[:len(whole)] == whole and (stop not in whole or text == whole)
    assert len(cut[0]) <= 4 and texts(model, prompts, count=0) == [[]] * 5
    assert all(len(t) == 3 for t in texts(model, prompts, count=3))


def test_sampling_depends_on_its_seed_alone_and_greedy_is_its_limit():
    model, (prompts, _) = load_decoder(FIXTURES / "llama3"), cases(FIXTURES / "llama3")
    torch.manual_seed(0)
    one = texts(model, prompts, temperature=1.0, seed=3)
    torch.manual_seed(1)
    assert texts(model, prompts, temperature=1.0, seed=3) == one
    assert texts(model, prompts, temperature=1.0, seed=4) != one
    for nearly in (dict(temperature=1e-6), dict(temperature=1.0, top_p=1e-6),
                   dict(temperature=1.0, top_p=1e-300)):
        assert texts(model, prompts, **nearly) == texts(model, prompts)


def test_top_p_draws_from_the_smallest_set_that_reaches_it_in_proportion():
    p = torch.tensor([0.1, 0.5, 0.1, 0.3])
    drawn = sample(p.log().expand(20_000, 4), 1.0, 0.75, torch.Generator().manual_seed(0))
    share = drawn.bincount(minlength=4) / 20_000
    assert share[0] == share[2] == 0 and share[1] == pytest.approx(0.625, abs=0.02)
    hot = sample(p.log().expand(20_000, 4), 2.0, 1.0, torch.Generator().manual_seed(0))
    hot = hot.bincount(minlength=4) / 20_000
    torch.testing.assert_close(hot, p.sqrt() / p.sqrt().sum(), atol=0.02, rtol=0)


# ---- folders


def test_llama_7b_has_the_published_number_of_parameters_and_its_keys():
    with torch.device("meta"):
        model = Decoder(DecoderConfig(32000, 4096, 32, 32, 11008))
    assert sum(p.numel() for p in model.parameters()) == 6_738_415_616
    keys = set(model.state_dict())
    assert len(keys) == 291
    assert {"model.embed_tokens.weight", "model.layers.31.self_attn.q_proj.weight",
            "model.layers.0.mlp.gate_proj.weight", "model.norm.weight", "lm_head.weight",
            "model.layers.7.post_attention_layernorm.weight"} <= keys
    adapted = sum(model.get_submodule(path).weight.numel() for path in model.target_paths("qkvoud"))
    assert adapted == 32 * (4 * 4096 * 4096 + 2 * 4096 * 11008)


def test_target_paths_name_the_matrices_of_each_layer(folder):
    model = load_decoder(folder)
    paths = model.target_paths(list(DECODER_LINEARS), [1])
    assert paths[0] == "model.layers.1.self_attn.q_proj" and len(paths) == 7
    assert len(model.target_paths("qd")) == 4
    assert all(isinstance(model.get_submodule(path), torch.nn.Linear) for path in paths)


def test_a_tied_head_is_the_embedding_and_may_be_in_the_file_too(folder):
    model = load_decoder(folder)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == (folder.name == "llama3")
    if folder.name == "llama3":
        tensors = load_file(folder / "model.safetensors")
        head = tensors["model.embed_tokens.weight"] + 0
        save_file(tensors | {"lm_head.weight": head}, folder / "model.safetensors")
        assert load_decoder(folder).lm_head.weight is not None


def test_bfloat16_weights_are_those_of_the_file_rounded(folder):
    half, whole = load_decoder(folder, torch.bfloat16), load_decoder(folder)
    for a, b in zip(half.parameters(), whole.parameters()):
        assert a.dtype == torch.bfloat16 and torch.equal(a, b.bfloat16())


def test_end_of_text_ids_come_from_the_folder(folder):
    assert stop_ids(folder) == {2}
    (folder / "generation_config.json").write_text('{"eos_token_id": [2, 5]}')
    assert stop_ids(folder) == {2, 5}
    (folder / "generation_config.json").unlink()
    edit_config(folder, eos_token_id=None)
    with pytest.raises(InputError, match="eos_token_id is None"):
        stop_ids(folder)
    (folder / "config.json").unlink()
    with pytest.raises(InputError, match="config.json: not found"):
        stop_ids(folder)


@pytest.mark.parametrize("changes,words", [
    (dict(model_type="mistral"), "model_type is 'mistral', expected llama"),
    (dict(hidden_act="gelu"), "hidden_act is 'gelu', expected 'silu'"),
    (dict(vocab_size=...), "vocab_size is missing"),
    (dict(hidden_size="32"), "hidden_size is '32'"),
    (dict(num_key_value_heads=3), "sizes do not fit"),
    (dict(tie_word_embeddings=1), "tie_word_embeddings is 1, expected a bool"),
    (dict(rope_parameters=dict(rope_type="yarn")), "rope_type is 'yarn'"),
    (dict(rope_parameters=dict(rope_type="llama3", factor=2.0)),
     "low_freq_factor in rope_scaling is None"),
    (dict(rope_parameters=[1]), "rope_scaling is [1]"),
    (dict(intermediate_size=49), "config.json asks for"),
    (dict(num_hidden_layers=3), "the checkpoint lacks model.layers.2"),
    (dict(num_hidden_layers=1), "the checkpoint has unexpected model.layers.1")])
def test_folder_that_does_not_fit(folder, changes, words):
    edit_config(folder, **changes)
    with pytest.raises(InputError) as e:
        load_decoder(folder)
    assert words in str(e.value) and str(folder) in str(e.value)


# ---- the real SmolLM2-135M-Instruct


real = pytest.mark.skipif("MODELS" not in os.environ, reason="MODELS names no folder of models")
LOAD = """
import resource, sys, torch
from model import load_decoder
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
model = load_decoder(sys.argv[1], getattr(torch, sys.argv[2]))
size = sum(p.numel() * p.element_size() for p in model.parameters())
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 / size)
"""


@real
def test_real_logits_and_texts_are_those_of_transformers():
    folder = Path(os.environ["MODELS"]) / "smollm2"
    model, e = load_decoder(folder), load_file(FIXTURES / "smollm2.safetensors")
    with torch.no_grad():
        assert (model(e["input_ids"])[:, :, ::499] - e["logits"]).abs().max() < 1e-4
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    expected = json.loads((FIXTURES / "smollm2.json").read_text())
    prompts = [tokenizer.encode(case["prompt"]).ids for case in expected]
    found = texts(model, prompts, 24, stop_ids=stop_ids(folder))
    assert found == [case["greedy"] for case in expected]
    for prompt, case in zip(prompts[::5], expected[::5]):
        assert texts(model, [prompt], 24, stop_ids=stop_ids(folder)) == [case["greedy"]]


@real
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_real_weights_are_loaded_in_little_more_than_their_size(dtype):
    folder = Path(os.environ["MODELS"]) / "smollm2"
    done = subprocess.run([sys.executable, "-c", LOAD, str(folder), dtype], capture_output=True,
                          text=True, check=True, cwd=Path(__file__).parent.parent)
    assert float(done.stdout) <= 1.2
