"""
The methods SaLoRA is compared with: against PEFT's code, the published numbers of parameters, and
what their papers promise.
"""

from pathlib import Path

import pytest
import torch
import torch.nn as nn
from safetensors.torch import load_file

import adapter
import baselines
import salora as sl
from data.glue import HERE
from model import Encoder, EncoderConfig, load_encoder

PEFT = load_file(Path(__file__).parent / "fixtures" / "peft.safetensors")  # see make_fixtures.py
LETTERS = "qkvoud"


def encoder(size):
    """RoBERTa without weights, in its published sizes."""
    d, layers = dict(base=(768, 12), large=(1024, 24))[size]
    with torch.device("meta"):
        return Encoder(EncoderConfig("roberta", 50265, d, layers, d // 64, 4 * d, 514,
                                     type_vocab_size=1), 2)


def demo(method, dtype=torch.float32, **kw):
    torch.manual_seed(0)
    model = load_encoder(HERE / "demo" / "model", 2, dtype).eval()
    return model, baselines.install(model, method, model.target_paths(LETTERS), 100, **kw)


def batch(padding=0):
    """ids (3, 9 + padding) and their mask, or None without padding."""
    ids = torch.randint(5, 90, (3, 9), generator=torch.Generator().manual_seed(0))
    if not padding:
        return ids, None
    padded = torch.cat([ids, torch.ones(3, padding, dtype=torch.long)], 1)
    return padded, torch.tensor([[1] * 9 + [0] * padding] * 3)


# ---- numbers of parameters


def test_a_lora_of_given_ranks_is_one_whose_first_triplets_alone_are_there():
    paths = demo("head")[0].target_paths(LETTERS)
    table = dict.fromkeys(paths, 3) | {paths[0]: 0, paths[1]: 1}
    model, low = demo("lora", r=4, alpha=8.0, ranks=table)
    whole, _ = demo("lora", r=4, alpha=8.0)
    assert sl.ranks(model) == table and low.density() == 1
    assert low.kept_params() == sum(rank * sum(model.get_submodule(path).base.weight.shape)
                                    for path, rank in table.items())
    for path, layer in sl.adapters(whole).items():
        g = torch.Generator().manual_seed(0)
        layer.lora_B.data = torch.randn(layer.lora_B.shape, generator=g)
        given, rank = model.get_submodule(path), table[path]
        given.lora_B.data = layer.lora_B.data[:, :rank].clone()
        layer.lora_B.data[:, rank:] = 0
    torch.testing.assert_close(model(*batch(2)), whole(*batch(2)))  # so the scale is one, 8 / 4


@pytest.mark.parametrize("method,base,large", [
    ("lora", 1_327_104, 3_538_944),
    ("lora-svd", 1_327_104, 3_538_944),
    ("adalora", 1_327_104 + 72 * 8, 3_538_944 + 144 * 8),  # and a singular value for each triplet
    ("adapter-h", 24 * (2 * 768 * 32 + 32 + 768), 48 * (2 * 1024 * 32 + 32 + 1024)),
    ("adapter-p", 12 * (2 * 768 * 32 + 32 + 768), 24 * (2 * 1024 * 32 + 32 + 1024)),
    ("prompt", 20 * 768, 20 * 1024),
    ("head", 0, 0),
])
def test_parameters_are_the_published_arithmetic(method, base, large):
    for size, expected in dict(base=base, large=large).items():
        model = encoder(size)
        baselines.install(model, method, model.target_paths(LETTERS), 100)
        assert sum(p.numel() for p in model.parameters() if p.requires_grad) == expected


def test_full_fine_tuning_trains_the_whole_model():
    model = encoder("base")
    baselines.install(model, "ft", [], 100)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trained == sum(p.numel() for p in model.parameters()) == 124_055_040 + 592_130


def test_a_prefix_is_two_vectors_a_layer_and_token_once_its_network_is_dropped():
    model, _ = demo("prefix")
    c = model.config
    before = model(*batch(2))
    model.prefix.finish()
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trained == c.num_hidden_layers * 2 * 20 * c.hidden_size
    torch.testing.assert_close(model(*batch(2)), before)


def test_a_step_moves_a_prefix_gently_although_a_whole_network_steps():
    torch.manual_seed(0)
    prefix = baselines.Prefix(2, 20, 64, "cpu")
    optimizer = torch.optim.AdamW(prefix.parameters(), lr=1e-3)
    before = prefix()
    before.sum().backward()
    optimizer.step()
    # 0.13 if the network's output were not divided
    assert 1e-4 < (prefix() - before).abs().max() < 0.02


# ---- where they start, what they compute


@pytest.mark.parametrize("method",
                         ["lora", "lora-svd", "adalora", "adapter-h", "adapter-p", "head", "ft"])
def test_the_first_step_sees_the_pretrained_model(method):
    plain, _ = demo("head")
    model, _ = demo(method)
    for a, b in zip(plain.hidden(*batch(3)).split(9, 1), model.hidden(*batch(3)).split(9, 1)):
        atol = 1e-3 if method.startswith("adapter") else 1e-6
        torch.testing.assert_close(b, a, atol=atol, rtol=0)


@pytest.mark.parametrize("method",
                         ["adapter-h", "adapter-p", "prefix", "prompt", "lora", "adalora"])
def test_everything_put_in_gets_a_gradient_and_nothing_else(method):
    model, lowrank = demo(method)
    if method == "adalora":
        for m in lowrank.layers:
            nn.init.normal_(m.lora_E)
    if method == "lora":
        for m in lowrank.layers:
            nn.init.normal_(m.lora_B)
    model(*batch(2)).square().sum().backward()
    for name, p in model.named_parameters():
        assert (p.grad is not None and p.grad.abs().sum() > 0) == p.requires_grad, name


@pytest.mark.parametrize("method", ["prefix", "prompt", "adapter-h"])
def test_padding_changes_nothing(method):
    model, _ = demo(method)
    torch.testing.assert_close(model(*batch(6)), model(*batch()), atol=1e-5, rtol=0)


@pytest.mark.parametrize("method", ["prefix", "prompt", "adapter-p", "adalora"])
def test_base_may_be_bfloat16_while_what_is_trained_is_float32(method):
    model, _ = demo(method, torch.bfloat16)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    whole, _ = demo(method)
    torch.testing.assert_close(model(*batch(2)).float(), whole(*batch(2)), atol=0.1, rtol=0.1)


def test_houlsbys_adapters_follow_both_halves_of_a_layer_and_pfeiffers_the_second():
    x = torch.randn(2, 5, 128, generator=torch.Generator().manual_seed(1))
    for method in ("adapter-h", "adapter-p"):
        model, _ = demo(method)
        layer = model.body.encoder.layer[0]
        for m in layer.modules():
            if isinstance(m, baselines.Adapter):
                nn.init.normal_(m.up.weight, std=0.3)
        a = layer.attention
        q, k, v = (a.self[name](x).view(2, 5, layer.heads, -1).transpose(1, 2)
                   for name in ("query", "key", "value"))
        heads = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1) @ v
        y = a.output.dense(heads.transpose(1, 2).flatten(2))
        if method == "adapter-h":
            y = y + a.output.adapter.up(nn.functional.gelu(a.output.adapter.down(y)))
        y = a.output.LayerNorm(x + y)
        z = layer.output.dense(nn.functional.gelu(layer.intermediate.dense(y)))
        z = z + layer.output.adapter.up(nn.functional.gelu(layer.output.adapter.down(z)))
        torch.testing.assert_close(layer(x), layer.output.LayerNorm(y + z))


def test_a_prompt_of_word_vectors_is_the_same_as_the_words_behind_the_first_token():
    model, _ = demo("prompt", virtual_tokens=3)
    words = model.body.embeddings.word_embeddings.weight
    model.prompt.data = words[[7, 8, 9]].clone()
    ids, mask = batch(2)
    prompted = model(ids, mask)
    model.prompt = None
    spelt = torch.cat([ids[:, :1], torch.tensor([[7, 8, 9]] * 3), ids[:, 1:]], 1)
    spelt_mask = torch.cat([torch.ones(3, 3, dtype=torch.long), mask], 1)
    torch.testing.assert_close(prompted, model(spelt, spelt_mask))


def test_a_prefix_of_a_tokens_own_keys_and_values_weighs_it_twice():
    model, _ = demo("prefix", virtual_tokens=5)
    layer = model.body.encoder.layer[0]
    x = torch.randn(1, 5, 128, generator=torch.Generator().manual_seed(1))
    # (2, 5, d): every token once more
    own = torch.stack([layer.attention.self.key(x)[0], layer.attention.self.value(x)[0]])
    torch.testing.assert_close(layer(x, prefix=own), layer(x))


# ---- LoRA, cut by singular values


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("budget", [0.5, 0.25, 0.125])
def test_lora_svd_keeps_the_largest_singular_values_that_fit(budget):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8))
    method = baselines.LoRASVD(model, ["0", "1", "2"], 5, r=8, budget=budget, window=(0.2, 0.4))
    with torch.no_grad():
        for m, size in zip(method.layers, (3, 1, 0.1)):
            m.lora_B.copy_(size * torch.randn(8, 8))
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=0.0)
    sigma = torch.stack(  # (3, 8)
        [torch.linalg.svdvals(m.lora_B @ m.lora_A) for m in method.layers])
    for _ in range(2):  # 0.4 of 5 steps
        assert [m.rank for m in method.layers] == [8, 8, 8] and method.density().item() == 1
        method.begin_step()
        model(torch.randn(4, 8)).sum().backward()
        optimizer.step()
        method.end_step(optimizer)
    least = sigma.flatten().sort(descending=True)[0][int(24 * budget) - 1]
    assert [m.rank for m in method.layers] == (sigma >= least).sum(1).tolist()
    for m, s in zip(method.layers, sigma):
        found = torch.linalg.svdvals(m.lora_B @ m.lora_A)
        assert torch.allclose(found[:m.rank], s[:m.rank], rtol=1e-4)
    assert method.kept_params() == budget * method.initial_params == 384 * budget
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for m in method.layers for p in (m.lora_A, m.lora_B)}


# ---- LoRA and AdaLoRA against PEFT's


def test_lora_layer_is_pefts():
    base = nn.Linear(8, 5)
    base.load_state_dict(dict(weight=PEFT["lora.W"], bias=PEFT["lora.b"]))
    model = nn.Sequential(base)
    sl.SaLoRA(model, ["0"], 10, r=4, alpha=6, window=None)
    model[0].lora_A.data, model[0].lora_B.data = PEFT["lora.A"], PEFT["lora.B"]
    torch.testing.assert_close(model(PEFT["lora.x"]), PEFT["lora.y"])


@pytest.fixture
def adalora():
    """Our AdaLoRA of two layers where PEFT's started: r = 4, target rank 1, the window steps 6 to
    15 of 30."""
    model = nn.Sequential(nn.Linear(8, 5), nn.Linear(5, 7))
    method = baselines.AdaLoRA(model, ["0", "1"], 30, r=4, alpha=6, budget=0.25, window=(0.2, 0.5))
    with torch.no_grad():
        for i, p in enumerate(method.params):
            p.copy_(PEFT[f"adalora.start.{i}"].view_as(p))
    return model, method


def test_adalora_layer_and_regulariser_are_pefts(adalora):
    model, method = adalora
    model[0].base.load_state_dict(dict(weight=PEFT["adalora.W"], bias=PEFT["adalora.b"]))
    # PEFT divides by r + 1e-5
    torch.testing.assert_close(model[0](PEFT["adalora.x"]), PEFT["adalora.y"], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(method.penalty(), PEFT["adalora.penalty"])


def test_adalora_chooses_pefts_triplets_on_the_same_gradients_step_by_step(adalora):
    model, method = adalora
    params = list(method.params)
    optimizer = torch.optim.SGD(params, lr=0.1)
    live = []
    for step in range(15):
        method.begin_step()
        for i, p in enumerate(params):
            p.grad = PEFT[f"adalora.grad.{step}.{i}"].view_as(p).clone()
        optimizer.step()
        values = [m.lora_A.clone() for m in method.layers]
        method.end_step(optimizer)
        if step < 14:
            found = torch.stack([m.lora_E for m in method.layers])
            torch.testing.assert_close(found, PEFT[f"adalora.E.{step}"])
        live.append(method.live)
    assert live[:7] == [8] * 7 and live == sorted(live, reverse=True) and live[-1] == 2
    keep = PEFT["adalora.E.15"] != 0
    assert keep.sum() == 2 and [m.rank for m in method.layers] == keep.sum(1).tolist()
    assert method.final_density == 0.25
    for m, a, k in zip(method.layers, values, keep):
        torch.testing.assert_close(m.lora_A.data, a[k])
    assert {p.shape for group in optimizer.param_groups for p in group["params"]} == {
        p.shape for m in method.layers for p in m.parameters(recurse=False)}


def test_adaloras_singular_values_are_folded_into_the_saved_adapter(tmp_path, adalora):
    model, method = adalora
    x = PEFT["adalora.x"]
    adapter.save(model, tmp_path)
    plain = nn.Sequential(nn.Linear(8, 5), nn.Linear(5, 7))
    for layer, m in zip(plain, method.layers):
        layer.load_state_dict(m.base.state_dict())
    torch.testing.assert_close(adapter.load(plain, tmp_path)(x), model(x))
    torch.testing.assert_close(sl.merge(model)(x), plain(x))


def test_adalora_says_where_a_gradient_is_missing():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    method = baselines.AdaLoRA(model, ["0", "1"], 30, r=4)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    method.begin_step()
    (model[0](torch.randn(2, 8)).sum() + method.penalty()).backward()  # "1" takes no part in it
    optimizer.step()
    with pytest.raises(RuntimeError, match="an adapter has no gradient: the task loss"):
        method.end_step(optimizer)
