"""model.py gives transformers' numbers, reads the folders people have, and names what is wrong with
the others."""

import json
import math
import os
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from data import InputError
from model import (
    LINEARS,
    DecoderConfig,
    Encoder,
    attention,
    dropout,
    load_decoder,
    load_encoder,
    read_config,
)

FIXTURES = Path(__file__).parent / "fixtures"


@pytest.fixture(params=["roberta", "bert"])
def folder(request, tmp_path):
    """A copy of a tiny model that transformers saved."""
    return Path(shutil.copytree(FIXTURES / request.param, tmp_path / request.param))


def expected(folder):
    e = load_file(FIXTURES / folder.name / "expected.safetensors")
    return [e["input_ids"], e["attention_mask"], e.get("token_type_ids")], e["hidden"], e["logits"]


def edit_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text()) | changes
    config = {k: v for k, v in config.items() if v is not ...}
    (folder / "config.json").write_text(json.dumps(config))


def edit_weights(folder, change):
    tensors = load_file(folder / "model.safetensors")
    tensors = change(tensors) or tensors
    save_file(tensors, folder / "model.safetensors")


# ---- parity


def test_hidden_states_and_logits_are_those_of_transformers(folder):
    inputs, hidden, logits = expected(folder)
    model = load_encoder(folder, num_labels=3).eval()
    with torch.no_grad():
        assert (model.hidden(*inputs) - hidden).abs().max() < 1e-5
        assert (model(*inputs) - logits).abs().max() < 1e-5
        assert logits.std() > 0.05  # and that is not because everything is zero


def test_padding_changes_nothing_and_needs_no_mask_where_there_is_none(folder):
    (ids, mask, types), hidden, logits = expected(folder)
    model = load_encoder(folder, num_labels=3).eval()
    with torch.no_grad():
        for i, n in enumerate(mask.sum(1).tolist()):
            row = ids[i:i + 1, :n], None, None if types is None else types[i:i + 1, :n]
            assert torch.allclose(model(*row), logits[i:i + 1], atol=1e-5)
            assert torch.allclose(model.hidden(*row), hidden[i:i + 1, :n], atol=1e-5)


@pytest.mark.skipif("MODELS" not in os.environ, reason="MODELS names no folder with real models")
def test_real_minilm_has_the_hidden_states_of_transformers():
    e = load_file(FIXTURES / "minilm.safetensors")
    model = load_encoder(Path(os.environ["MODELS"]) / "minilm", num_labels=2).eval()
    with torch.no_grad():
        hidden = model.hidden(e["input_ids"], e["attention_mask"], e["token_type_ids"])
    assert (hidden - e["hidden"]).abs().max() < 1e-5


def test_logits_need_only_the_first_row_of_the_last_layer(folder):
    inputs, hidden, _ = expected(folder)
    model = load_encoder(folder, num_labels=3).eval()
    assert torch.allclose(model.hidden(*inputs, first_only=True), hidden[:, :1], atol=1e-5)


@pytest.mark.parametrize("b,t", [(1, 1), (1, 38), (5, 2)])
def test_any_batch_and_length(folder, b, t):
    model = load_encoder(folder, num_labels=3)
    assert model(torch.randint(2, 60, (b, t))).shape == (b, 3)


def test_dropout_is_as_configured(folder):
    inputs, _, logits = expected(folder)
    model = load_encoder(folder, 3).train()
    assert not torch.allclose(model(*inputs), model(*inputs))
    edit_config(folder, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    assert torch.allclose(load_encoder(folder, 3).train()(*inputs), logits, atol=1e-5)
    edit_config(folder, classifier_dropout=0.5)
    model = load_encoder(folder, 3).train()
    assert not torch.allclose(model(*inputs), logits, atol=1e-3)
    assert torch.allclose(model.hidden(*inputs), model.hidden(*inputs))
    edit_config(folder, classifier_dropout=None, attention_probs_dropout_prob=0.5)
    model = load_encoder(folder, 3).train()
    assert not torch.allclose(model.hidden(*inputs), model.hidden(*inputs))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("p", [0.1, 0.37, 0.9])
def test_dropout_zeroes_a_share_p_scales_the_rest_and_passes_the_same_gradient(p, dtype):
    torch.manual_seed(0)
    # not a multiple of the four elements of a random word
    x = torch.ones(301, 997, dtype=dtype, requires_grad=True)
    y = dropout(x, p, training=True)
    kept = y != 0
    n = x.numel()
    assert y.dtype == dtype and abs(kept.double().mean() - (1 - p)) < 5 * math.sqrt(p * (1 - p) / n)
    assert torch.equal(y[kept], torch.full_like(y[kept], 1 / (1 - p)))
    a, b = kept.flatten()[:-1].double() - (1 - p), kept.flatten()[1:].double() - (1 - p)
    assert abs((a * b).mean()) < 5 * p * (1 - p) / math.sqrt(n)  # neighbours are independent
    y.sum().backward()
    assert torch.equal(x.grad, y)
    assert dropout(x, p, training=False) is x and dropout(x, 0.0, training=True) is x


@pytest.mark.parametrize("masked", [False, True])
def test_attention_with_dropout_is_pytorchs_attention_when_nothing_is_dropped(masked):
    g = torch.Generator().manual_seed(0)
    # a prefix makes keys outnumber queries
    q, k, v = (torch.randn(2, 3, n, 8, generator=g, requires_grad=True) for n in (5, 7, 7))
    mask = torch.tensor([[1, 1, 1, 1, 0, 0, 0], [1] * 7]).bool()[:, None, None] if masked else None
    ours = attention(q, k, v, mask, 1e-9, training=True)
    theirs = F.scaled_dot_product_attention(q, k, v, mask)
    torch.testing.assert_close(ours, theirs)
    grads = [torch.autograd.grad(y.square().sum(), (q, k, v)) for y in (ours, theirs)]
    torch.testing.assert_close(*grads)


def test_attention_of_a_row_of_padding_harms_no_other():
    g = torch.Generator().manual_seed(0)
    q = torch.randn(2, 3, 5, 8, generator=g, requires_grad=True)
    mask = torch.tensor([[False] * 5, [True] * 5])[:, None, None]
    y = attention(q, q, q, mask, 1e-9, training=True)
    torch.testing.assert_close(y[1], F.scaled_dot_product_attention(q, q, q)[1])
    y.sum().backward()
    assert y.isfinite().all() and q.grad.isfinite().all()


def test_attention_drops_a_share_p_of_the_softmax():
    torch.manual_seed(0)
    q = k = torch.zeros(64, 4, 50, 8)
    v = torch.eye(50).expand(64, 4, 50, 50)  # shows the softmax itself, 1/50 everywhere
    y = attention(q, k, v, None, 0.25, training=True) * 50
    torch.testing.assert_close(y[y != 0], torch.full_like(y[y != 0], 4 / 3))
    assert abs((y == 0).double().mean() - 0.25) < 0.003
    assert torch.equal(attention(q, k, y, None, 0.25, training=False),
                       F.scaled_dot_product_attention(q, k, y))


def test_checkpointed_activations_give_the_same_gradients(folder):
    inputs, _, _ = expected(folder)
    grads = []
    for flag in (False, True):
        model = load_encoder(folder, 3).train()
        model.checkpoint_activations = flag
        torch.manual_seed(0)
        F.cross_entropy(model(*inputs), torch.tensor([0, 1, 2])).backward()
        grads.append([p.grad for p in model.parameters() if p.grad is not None])
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*grads))


def test_target_paths_name_the_six_matrices_of_each_layer(folder):
    model = load_encoder(folder, 3)
    paths = model.target_paths("qkvoud")
    assert len(paths) == len(set(paths)) == 12
    shapes = [tuple(model.get_submodule(p).weight.shape) for p in paths[:6]]
    assert shapes == [(32, 32)] * 4 + [(64, 32), (32, 64)] and list(LINEARS) == list("qkvoud")


def test_roberta_base_has_the_published_number_of_parameters(tmp_path):
    edit = dict(model_type="roberta", vocab_size=50265, hidden_size=768, num_hidden_layers=12,
                num_attention_heads=12, intermediate_size=3072, max_position_embeddings=514,
                type_vocab_size=1, pad_token_id=1)
    (tmp_path / "config.json").write_text(json.dumps(edit))
    with torch.device("meta"):
        model = Encoder(read_config(tmp_path), num_labels=2)
    # RobertaForSequenceClassification, two labels
    assert sum(p.numel() for p in model.parameters()) == 124_647_170
    assert model.config.max_length == 512


# ---- what a folder may look like


def test_sharded_checkpoint(folder):
    inputs, _, logits = expected(folder)
    tensors = load_file(folder / "model.safetensors")
    names, weight_map = sorted(tensors), {}
    for i, part in enumerate((names[:7], names[7:])):
        file = f"model-0000{i + 1}-of-00002.safetensors"
        save_file({n: tensors[n] for n in part}, folder / file)
        weight_map |= dict.fromkeys(part, file)
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps(dict(weight_map=weight_map)))
    assert torch.allclose(load_encoder(folder, 3).eval()(*inputs), logits, atol=1e-5)
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(InputError, match="00002-of-00002.safetensors: shard listed in .* found"):
        load_encoder(folder, 3)


def test_old_names_and_harmless_extras(folder):
    inputs, _, logits = expected(folder)
    kind = folder.name

    def change(tensors):
        new = {k.replace("LayerNorm.weight", "LayerNorm.gamma")
               .replace("LayerNorm.bias", "LayerNorm.beta"): v for k, v in tensors.items()}
        new[f"{kind}.embeddings.position_ids"] = torch.arange(40)[None]
        new["lm_head.bias"], new["cls.predictions.bias"] = torch.zeros(60), torch.zeros(60)
        if kind == "roberta":
            new["roberta.pooler.dense.weight"] = torch.zeros(32, 32)
        return new

    edit_weights(folder, change)
    assert torch.allclose(load_encoder(folder, 3).eval()(*inputs), logits, atol=1e-5)


def test_bare_model_without_prefix_and_head(folder, capsys):
    inputs, hidden, _ = expected(folder)
    kind = folder.name
    edit_weights(folder, lambda t: {k.removeprefix(kind + "."): v for k, v in t.items()
                                    if not k.startswith("classifier")})
    model = load_encoder(folder, 2).eval()
    assert torch.allclose(model.hidden(*inputs), hidden, atol=1e-5)
    assert "new head, not in the checkpoint: classifier." in capsys.readouterr().out
    head = model.classifier.out_proj if kind == "roberta" else model.classifier
    weight = head.weight
    assert weight.std().item() == pytest.approx(0.3, rel=0.5)  # initializer_range


def test_head_for_another_number_of_labels_starts_anew_and_says_so(folder, capsys):
    assert load_encoder(folder, 5)(torch.randint(2, 60, (2, 4))).shape == (2, 5)
    assert "new head" in capsys.readouterr().out
    load_encoder(folder, 3)
    assert capsys.readouterr().out == ""


def test_half_precision_checkpoint_is_read_as_float32(folder):
    inputs, _, logits = expected(folder)
    edit_weights(folder, lambda t: {k: v.half() for k, v in t.items()})
    model = load_encoder(folder, 3).eval()
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert torch.allclose(model(*inputs), logits, atol=0.05)


def test_bfloat16_base_with_a_float32_head(folder):
    inputs, _, logits = expected(folder)
    model = load_encoder(folder, 3, torch.bfloat16).eval()
    for module in model.head:
        module.float()
    assert model(*inputs).dtype == torch.float32
    assert torch.allclose(model(*inputs), logits, atol=0.2)


def test_bert_laid_out_as_roberta_computes_the_same(tmp_path):
    """Token type 0 folded into the positions, those shifted by padding_idx + 1."""
    (ids, mask, _), _, _ = expected(Path("bert"))
    bert = load_encoder(FIXTURES / "bert", 3).eval()
    folder = Path(shutil.copytree(FIXTURES / "bert", tmp_path / "as_roberta"))
    edit_config(folder, model_type="roberta", type_vocab_size=1, pad_token_id=0,
                max_position_embeddings=41)

    def change(tensors):
        new = {"roberta." + k.removeprefix("bert."): v for k, v in tensors.items()
               if k.startswith("bert.")}
        e = "roberta.embeddings."
        types = new[e + "token_type_embeddings.weight"]
        positions = new[e + "position_embeddings.weight"] + types[0]
        new[e + "position_embeddings.weight"] = torch.cat([positions[:1], positions])
        new[e + "token_type_embeddings.weight"] = torch.zeros(1, 32)
        return new

    edit_weights(folder, change)
    roberta = load_encoder(folder, 3).eval()
    keep = mask.bool()
    assert roberta.config.max_length == 40
    assert torch.allclose(roberta.hidden(ids, mask)[keep], bert.hidden(ids, mask)[keep], atol=1e-5)


# ---- what is refused, by name


@pytest.mark.parametrize("changes,words", [
    (dict(model_type="gpt2"), "model_type is 'gpt2', expected roberta or bert"),
    (dict(hidden_act="relu"), "hidden_act is 'relu'"),
    (dict(position_embedding_type="relative_key"), "position_embedding_type"),
    (dict(hidden_size=...), "hidden_size is missing"),
    (dict(vocab_size="60"), "vocab_size is '60'"),
    (dict(num_attention_heads=5), "sizes do not fit together"),
    (dict(hidden_size=64), r"has shape \[.*32.*config.json asks for"),
    (dict(num_hidden_layers=3), "lacks .*encoder.layer.2"),
    (dict(num_hidden_layers=1), "has unexpected .*encoder.layer.1")])
def test_config_that_does_not_fit(folder, changes, words):
    edit_config(folder, **changes)
    with pytest.raises(InputError, match=words):
        load_encoder(folder, 3)


def key_in(tensors, end):
    return next(key for key in tensors if key.endswith(end))


@pytest.mark.parametrize("change,words", [
    (lambda t: t.pop(key_in(t, "query.weight")) is None, "lacks .*query.weight"),
    (lambda t: t.update({"something.else": torch.zeros(1)}), "has unexpected something.else"),
    (lambda t: t.update({key_in(t, "layer.1.output.dense.weight"): torch.zeros(2, 2)}),
     r"output.dense.weight has shape \[2, 2\]")])
def test_weights_that_do_not_fit(folder, change, words):
    edit_weights(folder, change)
    with pytest.raises(InputError, match=words):
        load_encoder(folder, 3)


@pytest.mark.parametrize("name,content,words", [
    ("config.json", None, "config.json: not found"),
    ("config.json", b"{", "config.json: cannot be read as JSON"),
    ("config.json", b"[]", "holds a list"),
    ("model.safetensors", None, "found neither model.safetensors nor"),
    ("model.safetensors", b"\x10\0\0\0\0\0\0\0{not json", "not a readable safetensors file"),
    ("model.safetensors", b"", "not a readable safetensors file")])
def test_files_that_are_missing_or_broken(folder, name, content, words):
    (folder / name).unlink() if content is None else (folder / name).write_bytes(content)
    with pytest.raises(InputError, match=words):
        load_encoder(folder, 3)


def test_a_pickle_is_not_read(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(InputError, match="pytorch_model.bin is a pickle, which is not read"):
        load_encoder(folder, 3)


# ---- LLaMA's folders; the right values are those of transformers 5.23.0


IDS = torch.arange(3, 21).view(2, 9)
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@pytest.fixture
def tied(tmp_path):
    """A LLaMA whose config.json ties head and embedding; its file has one tensor for both."""
    return Path(shutil.copytree(FIXTURES / "llama3", tmp_path / "llama3"))


def test_a_head_of_its_own_is_read_though_the_config_says_tied(tied, capsys):
    head = torch.randn(60, 32)
    edit_weights(tied, lambda t: t | {HEAD: head})
    model = load_decoder(tied).eval()
    with torch.no_grad():
        assert torch.equal(model(IDS), F.linear(model.hidden(IDS), head))
    assert not model.config.tie_word_embeddings
    assert "lm_head.weight there is not the embedding" in capsys.readouterr().out


@pytest.mark.parametrize("change", [
    lambda t: t | {HEAD: t[EMBEDDING].clone()},
    lambda t: {HEAD if key == EMBEDDING else key: x for key, x in t.items()}])
def test_a_tied_head_may_be_stored_twice_or_alone(tied, change, capsys):
    with torch.no_grad():
        before = load_decoder(tied)(IDS)
        edit_weights(tied, change)
        model = load_decoder(tied)
        assert torch.equal(model(IDS), before) and capsys.readouterr().out == ""
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_a_tied_model_without_its_tensor_is_refused(tied):
    edit_weights(tied, lambda t: {key: x for key, x in t.items() if key != EMBEDDING})
    with pytest.raises(InputError, match="lacks model.embed_tokens.weight, lm_head.weight"):
        load_decoder(tied)


@pytest.mark.parametrize("changes,theta,scaling", [
    (dict(rope_parameters=..., rope_theta=77.0), 77.0, None),
    (dict(rope_parameters=..., rope_theta=1e9), 1e9, None),
    (dict(rope_parameters=...), 10000.0, None),
    (dict(rope_scaling=dict(type="linear", factor=2.0), rope_theta=700.0,
          rope_parameters=dict(rope_type="default", rope_theta=90.0)), 700.0, ("linear", 64)),
    (dict(rope_parameters=dict(rope_type="llama3", rope_theta=500.0, factor=4.0,
                               low_freq_factor=1.0, high_freq_factor=4.0)), 500.0, ("llama3", 64)),
    (dict(original_max_position_embeddings=32), 500.0, ("llama3", 32))])
def test_rotary_settings_are_found_where_transformers_finds_them(tied, changes, theta, scaling):
    edit_config(tied, **changes)
    c = read_config(tied, DecoderConfig)
    found = c.rope_scaling and (c.rope_scaling["rope_type"],
                                c.rope_scaling["original_max_position_embeddings"])
    assert c.rope_theta == theta and found == scaling


def test_attention_dropout_is_as_configured(tied):
    edit_config(tied, attention_dropout=0.5)
    model = load_decoder(tied)
    assert torch.equal(model.eval()(IDS), model(IDS))
    assert not torch.allclose(model.train()(IDS), model(IDS), atol=1e-3)


@pytest.mark.parametrize("changes,words", [
    (dict(rope_parameters=dict(rope_type="yarn", factor=2.0)), "rope_type is 'yarn'"),
    (dict(partial_rotary_factor=0.5), "partial_rotary_factor is 0.5"),
    (dict(rope_parameters=dict(rope_theta=9.0, partial_rotary_factor=0.5)), "rotary_factor is 0.5"),
    (dict(is_causal=False), "is_causal is False"),
    (dict(hidden_act="gelu"), "hidden_act is 'gelu'"),
    (dict(attention_bias=True), "lacks .*proj.bias"),
    (dict(quantization_config=dict(bits=4)), "quantized weights are not read"),
    (dict(head_dim=8), "has shape")])
def test_llama_configs_that_are_not_computed_are_refused(tied, changes, words):
    edit_config(tied, **changes)
    with pytest.raises(InputError, match=words):
        load_decoder(tied)


@pytest.mark.parametrize("more,words", [
    ({"norm.weight": torch.ones(32)}, "has model.norm.weight twice"),
    ({"model.layers.0.mlp.up_proj.weight": torch.ones(48, 32, dtype=torch.int8)},
     "up_proj.weight is torch.int8, quantized")])
def test_weights_that_could_be_read_in_two_ways_are_refused(tied, more, words):
    edit_weights(tied, lambda t: t | more)
    with pytest.raises(InputError, match=words):
        load_decoder(tied)


@pytest.mark.parametrize("name", [
    "pytorch_model-00001-of-00002.bin", "tf_model.h5", "adapter_model.safetensors"])
def test_weights_in_another_format_are_named(folder, name):
    (folder / "model.safetensors").rename(folder / name)
    (folder / "expected.safetensors").unlink()
    with pytest.raises(InputError, match=f"{name} is "):
        load_encoder(folder, 3)
