"""salora.py on small models: equations 5 and 9 to 12, the window, pruning, merging, saving."""

import contextlib
import copy
import json
import math
import textwrap
import warnings
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.utils.checkpoint import checkpoint

import salora as sl
from adapter import load, save
from model import Encoder, EncoderConfig
from paper import bench
from salora import SaLoRA, SaLoRALinear, adapters, merge, rank_map, ranks


def mlp(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(10, 24), nn.Tanh(), nn.Linear(24, 16), nn.Tanh(),
                         nn.Linear(16, 3))


def wrapped(seed=0, r=4, steps=100, window=(0.2, 0.5), **kw):
    model = mlp(seed)
    return model, SaLoRA(model, ["0", "2"], steps, r=r, window=window, **kw)


@contextlib.contextmanager
def quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def begin(salora, step=30):
    """A step in the middle of the window."""
    salora.step = step
    salora.begin_step()


def scatter(salora, seed=1):
    """Puts every learned number somewhere generic."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in salora.layers:
            layer.lora_A.copy_(torch.randn(layer.lora_A.shape, generator=g))
            layer.lora_B.copy_(torch.randn(layer.lora_B.shape, generator=g))
        salora.log_theta.copy_(2 * torch.randn(salora.log_theta.shape, generator=g))
        salora.lam.fill_(0.7)


def encoder():
    torch.manual_seed(0)
    return Encoder(EncoderConfig("roberta", vocab_size=40, hidden_size=32, num_hidden_layers=2,
                                 num_attention_heads=4, intermediate_size=64,
                                 max_position_embeddings=20, type_vocab_size=1,
                                 initializer_range=0.2), num_labels=2)


# ---- the usage example in the first screen of salora.py


USAGE = textwrap.dedent("    salora = SaLoRA("
                        + sl.__doc__.split("    salora = SaLoRA(")[1]).strip()


def test_usage_example_runs_as_printed():
    assert len(USAGE.splitlines()) <= 10
    torch.manual_seed(0)
    model = nn.ModuleDict(dict(up=nn.Linear(16, 32), down=nn.Linear(32, 16)))
    model.forward = lambda x: model.down(torch.relu(model.up(x)))
    x, y = torch.randn(64, 16), torch.randint(16, (64,))
    before = F.cross_entropy(model(x), y).item()
    names = dict(vars(sl), model=model, batches=[(x, y)] * 60, steps=60, F=F)
    exec(USAGE.replace("merge(model)", "found = ranks(model); merge(model)"), names)
    assert F.cross_entropy(model(x), y).item() < before and type(model.up) is nn.Linear
    assert sum(names["found"].values()) == 8  # half of 2 x 8


# ---- layer, eq. 3 and 5


def test_first_step_is_the_pretrained_model():
    model, plain = mlp(), mlp()
    x = torch.randn(5, 10)
    SaLoRA(model, ["0", "2"], 10, r=4)
    assert torch.equal(model(x), plain(x))


def test_a_starts_gaussian_with_rows_of_unit_norm_and_b_at_zero():
    model = nn.ModuleDict(dict(big=nn.Linear(1000, 600)))
    layer = SaLoRA(model, ["big"], 10, r=500).layers[0]
    assert layer.lora_A.std().item() == pytest.approx(1 / math.sqrt(1000), rel=0.01)
    assert layer.lora_A.norm(dim=1).mean().item() == pytest.approx(1, rel=0.01)
    assert not layer.lora_B.any()


def noise(salora):
    """What the gates of this step are drawn from."""
    generator = torch.Generator().manual_seed(salora.seed * salora.steps + salora.step)
    return torch.rand(salora.log_theta.shape, generator=generator)


@pytest.mark.parametrize("alpha,scale", [(None, 1.0), (16, 4.0)])
def test_layer_computes_equation_5(alpha, scale):
    model, salora = wrapped(alpha=alpha)
    scatter(salora)
    begin(salora)
    layer, x = salora.layers[0], torch.randn(7, 10)
    gates = sl.sample_gates(salora.log_theta, noise(salora))[0]
    expected = (x @ layer.base.weight.T + layer.base.bias
                + scale * x @ layer.lora_A.T @ torch.diag(gates) @ layer.lora_B.T)
    assert torch.allclose(layer(x), expected, atol=1e-5)


def test_a_and_b_learn_with_the_drawn_gates_and_log_theta_learns_through_the_draw():
    model, salora = wrapped(alpha=16)
    scatter(salora)
    begin(salora)
    layer, x, y = salora.layers[0], torch.randn(7, 10), torch.randn(7, 24)
    a, b, log_theta = (t.detach().clone().requires_grad_()
                       for t in (layer.lora_A, layer.lora_B, salora.log_theta[0]))
    h = layer.base(x) + 4 * x @ a.T @ torch.diag(sl.sample_gates(log_theta, noise(salora)[0])) @ b.T
    ((layer(x) - y) ** 2).sum().backward()
    ((h - y) ** 2).sum().backward()
    for found, expected in ((salora.log_theta.grad[0], log_theta.grad), (layer.lora_A.grad, a.grad),
                            (layer.lora_B.grad, b.grad)):
        assert expected.abs().max() > 0.01 and torch.allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_a_parent_that_reads_the_weight_gets_what_the_layer_computes():
    model, salora = wrapped(alpha=16)
    scatter(salora)
    begin(salora)  # with drawn gates
    layer, x = salora.layers[0], torch.randn(7, 10)
    assert torch.allclose(F.linear(x, layer.weight, layer.bias), layer(x), atol=1e-5)


def test_dropout_is_of_the_inputs_of_a_and_in_training_only():
    model, salora = wrapped(lora_dropout=0.4)
    scatter(salora)
    layer, x = salora.layers[0], torch.ones(4000, 10)
    model.eval()
    expected = layer(x)
    model.train()
    change = layer(x) - layer.base(x)
    assert not torch.allclose(change[0], change[1])
    # the mean stays: 4000 draws leave a standard error of 1/60 of the spread
    assert torch.allclose(change.mean(0), (expected - layer.base(x))[0],
                          atol=5 * change.std(0).max().item() / 60)


class Wrapper(nn.Module):
    def __init__(self):
        super().__init__()
        self.module = mlp()  # a name of the user's own

    def forward(self, x):
        return self.module(x)


def test_the_names_of_wrappers_are_left_out():
    model = Wrapper()
    compiled = torch.compile(model, backend="eager")
    SaLoRA(compiled, ["0", "2"], 10, r=2)
    for wrapped_model in (model, compiled, nn.DataParallel(model), nn.DataParallel(compiled),
                          torch.compile(nn.DataParallel(model), backend="eager")):
        assert ranks(wrapped_model) == {"module.0": 2, "module.2": 2}
    model.module = torch.compile(model.module, backend="eager")
    assert ranks(model) == {"module.0": 2, "module.2": 2}
    merge(nn.DataParallel(model))
    assert not adapters(model) and len(adapters(model, nn.Linear)) == 3


def test_a_wrappers_name_is_left_out_at_the_start_of_a_path_too_and_only_as_a_whole():
    model = nn.ModuleDict(dict(_fsdp_wrapped_module=mlp(), _orig_module=mlp()))
    SaLoRA(model, ["0"], 10, r=2)
    assert list(ranks(model)) == ["0", "_orig_module.0"]


def test_adapters_go_into_what_a_wrapper_wraps():
    model, x = nn.Sequential(checkpoint_wrapper(mlp())), torch.randn(6, 10)
    before = model(x)
    SaLoRA(model, ["0.0", "0.2"], 10, r=2, window=None)
    assert ranks(model) == {"0.0": 2, "0.2": 2}
    for layer in adapters(model).values():
        nn.init.normal_(layer.lora_B)
    adapted = model(x)
    adapted.sum().backward()
    assert all(layer.lora_B.grad.any() for layer in adapters(model).values())
    assert not torch.allclose(adapted, before, atol=0.1)
    assert torch.allclose(merge(model)(x), adapted, atol=1e-5) and not adapters(model)


# ---- the turn into singular directions


def test_turned_triplets_are_the_singular_directions_of_the_same_update():
    model, salora = wrapped()
    scatter(salora)
    optimizer = torch.optim.AdamW(salora.param_groups(1e-3))
    updates = [(m.lora_B @ m.lora_A).detach() for m in salora.layers]
    sigma = sl.turn(salora.layers, optimizer)
    for m, update, s in zip(salora.layers, updates, sigma):
        assert torch.allclose(m.lora_B @ m.lora_A, update, atol=1e-5)
        assert torch.allclose(s, torch.linalg.svdvals(update)[:4], rtol=1e-4)
        assert torch.allclose(m.lora_A @ m.lora_A.T, torch.eye(4), atol=1e-5)
        assert torch.allclose(m.lora_B.T @ m.lora_B, torch.diag(s**2), rtol=1e-4, atol=1e-4)


def test_when_the_window_opens_theta_starts_from_the_singular_values_and_the_function_stays():
    model, salora = wrapped(steps=20, budget=0.25)
    x = torch.randn(6, 10)
    optimizer = train(model, salora, 3)
    before = model.eval()(x)
    assert not salora.log_theta.any() and optimizer.state[salora.layers[0].lora_A]
    salora.begin_step()
    salora.end_step(optimizer)  # of step 3: the window is steps 4 to 9
    start = torch.stack([torch.linalg.svdvals(m.lora_B @ m.lora_A)[:4] / len(m.lora_B)**0.5
                         for m in salora.layers])
    assert len({len(m.lora_B) for m in salora.layers}) > 1
    assert torch.allclose(salora.log_theta.exp(), start / start.quantile(0.75), rtol=1e-2)
    assert not any(p in optimizer.state for m in salora.layers for p in (m.lora_A, m.lora_B))
    salora.set_gates(None)
    assert torch.allclose(model(x), before, atol=1e-5)


def test_gates_start_within_bounds_where_singular_values_are_zero():
    for columns, end, bound in ((3, torch.min, 1e-3), (1, torch.max, 1e3)):
        model, salora = wrapped(steps=20)
        optimizer = train(model, salora, 3)
        with torch.no_grad():
            for m in salora.layers:
                m.lora_B[:, columns:] = 0
        salora.begin_step()
        salora.end_step(optimizer)
        assert end(salora.log_theta).item() == pytest.approx(math.log(bound))


def test_the_letter_is_not_turned_and_starts_with_the_density_of_the_paper():
    model, salora = wrapped(**sl.PAPER, steps=20)
    train(model, salora, 4)
    assert not salora.log_theta.any() and salora.density().item() == pytest.approx(11 / 12)
    assert (salora.first, salora.last, salora.gate_lr, salora.selection) == (4, 10, 0.01, "paper")
    assert (salora.beta, salora.orth_reduction, salora.fold_gates) == (0.1, "sum", True)


def test_where_nothing_is_learned_yet_the_turn_changes_nothing_that_matters():
    model, salora = wrapped(window=(0, 0.5))
    x = torch.randn(6, 10)
    optimizer = torch.optim.AdamW(salora.param_groups(0.0))
    salora.begin_step()
    model(x).sum().backward()
    optimizer.step()
    salora.end_step(optimizer)
    assert not salora.log_theta.any() and torch.allclose(model.eval()(x), mlp()(x))
    assert salora.in_window
    optimizer.zero_grad()
    salora.set_gates(None)
    model(x).sum().backward()
    assert all(m.lora_B.grad.abs().sum() > 0 for m in salora.layers)


def test_a_state_without_adapters_loads_if_that_is_asked_for():
    model, salora = wrapped()
    model.load_state_dict({"4.bias": torch.ones(3)}, strict=False)
    assert model[4].bias.eq(1).all() and salora.layers[0].rank == 4


def test_scale_stays_when_the_rank_falls():
    model, salora = wrapped(alpha=8, budget=0.25)
    scatter(salora)
    salora.prune()
    assert all(layer.scale == 2.0 for layer in salora.layers) and salora.layers[0].rank < 4


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_adapter_and_gates_are_float32_whatever_the_default_is(dtype):
    torch.set_default_dtype(dtype)
    try:
        model, salora = wrapped(steps=20)
        train(model, salora, 20)
        params = [p for layer in salora.layers for p in layer.parameters(recurse=False)]
        assert {p.dtype for p in [*params, salora.log_theta, salora.lam]} == {torch.float32}
    finally:
        torch.set_default_dtype(torch.float32)


def test_gates_go_to_the_device_of_a_replica():
    """As DataParallel makes them: its copies of a layer have parameters of their own."""
    layer = SaLoRALinear(nn.Linear(4, 4), 2, 1.0)
    layer.gates = torch.ones(2)
    layer.lora_B = nn.Parameter(layer.lora_B.to("meta"))
    assert layer.matrices()[1].is_meta


class Packed(nn.Linear):
    """As bitsandbytes' Linear4bit: the weight has the shape of its storage."""

    def __init__(self):
        super().__init__(10, 8)
        self.weight = nn.Parameter(torch.randn(40, 1), requires_grad=False)

    def forward(self, x):
        return F.linear(x, self.weight.view(4, 10).repeat(2, 1), self.bias)


def test_a_packed_weight_has_the_shape_of_its_layer():
    model = nn.Sequential(Packed(), nn.Linear(8, 3))
    salora = SaLoRA(model, ["0"], 20, r=4)
    assert salora.size.tolist() == [18]
    assert salora.density().item() == pytest.approx(11 / 12)
    train(model, salora, 20)
    assert salora.layers[0].rank == 2


def test_base_may_be_bfloat16_while_the_adapter_is_float32():
    model = mlp().bfloat16()
    salora = SaLoRA(model, ["0", "2"], 10, r=4)
    out = model(torch.randn(3, 10, dtype=torch.bfloat16))
    assert out.dtype == torch.bfloat16
    (out.float().sum() + salora.penalty()).backward()
    assert {p.dtype for p in (*(layer.lora_A for layer in salora.layers), salora.log_theta,
                              salora.lam)} == {torch.float32}
    assert salora.layers[0].lora_B.grad.dtype == torch.float32


def test_only_adapters_are_trainable_and_full_paths_and_tails_both_name_them():
    model = encoder()
    SaLoRA(model, ["attention.self.query", "roberta.encoder.layer.1.output.dense"], 10, r=2)
    assert list(adapters(model)) == ["roberta.encoder.layer.0.attention.self.query",
                                     "roberta.encoder.layer.1.attention.self.query",
                                     "roberta.encoder.layer.1.output.dense"]
    assert all("lora_" in name for name, p in model.named_parameters() if p.requires_grad)


@pytest.mark.parametrize("kw,words", [
    (dict(targets=["nope"]), "'nope' matches no nn.Linear"),
    (dict(r=11), "expected 1 to 10: 0 is (24, 10)"),
    (dict(r=0), "r is 0"),
    (dict(r=2.5), "r is 2.5, expected 1 to 10"),
    (dict(budget=0), "budget is 0"),
    (dict(budget=math.nan), "budget is nan"),
    (dict(window=(0.5, 0.2)), "window is (0.5, 0.2)"),
    (dict(window=(0.5, 1.2)), "window is"),
    (dict(selection="best"), "'best'"),
    (dict(orth_reduction="max"), "'max'"),
    (dict(targets=[]), "targets is empty"),
    (dict(steps=0, window=None), "steps is 0"),
    (dict(steps=1), "steps is 1, expected 2 or more"),
    (dict(steps=10.5), "steps is 10.5, expected 2 or more"),
    (dict(steps=math.inf), "steps is inf"),
    (dict(gate_lr=0), "gate_lr is 0"),
    (dict(window=(0.3, 0.3)), "window is (0.3, 0.3)"),
    (dict(lora_dropout=1.0), "lora_dropout is 1.0"),
    (dict(budget=1.1), "budget is 1.1"),
    (dict(beta=-0.1), "beta is -0.1"),
    (dict(beta=math.inf), "beta is inf"),
    (dict(alpha=0), "alpha is 0"),
    (dict(alpha=math.inf), "alpha is inf"),
    (dict(window=(-0.1, 0.5)), "window is"),
    (dict(lora_dropout=-0.1), "lora_dropout is -0.1"),
    (dict(price=-0.1), "price is -0.1"),
    (dict(price=math.inf), "price is inf"),
])
def test_bad_settings_are_refused_and_the_model_left_alone(kw, words):
    model = mlp()
    with pytest.raises(ValueError, match=words.replace("(", r"\(").replace(")", r"\)")):
        SaLoRA(model, **(dict(targets=["0", "2"], steps=10, r=4) | kw))
    assert not adapters(model) and all(p.requires_grad for p in model.parameters())


def test_going_on_needs_adapters_to_go_on_with():
    with pytest.raises(ValueError, match="targets=None needs adapters in the model"):
        SaLoRA(mlp(), None, 10, window=None)


def test_all_linear_is_all_but_the_head():
    model = encoder()
    SaLoRA(model, "all-linear", 10, r=2)
    assert len(adapters(model)) == 12 and not any("classifier" in path for path in adapters(model))
    model = mlp()
    SaLoRA(model, "all-linear", 10, r=2)
    assert list(adapters(model)) == ["0", "2"]  # no name tells the head: the last one


class Conv1D(nn.Module):
    """Named as transformers' layer of GPT-2."""


@pytest.mark.parametrize("model,target,words", [
    (nn.ModuleDict(dict(a=nn.MultiheadAttention(8, 2))), "out_proj",
     "a.out_proj is inside a MultiheadAttention"),
    (nn.ModuleDict(dict(a=nn.TransformerEncoderLayer(8, 2))), "linear1",
     "a.linear1 is inside a TransformerEncoderLayer"),
    (nn.ModuleDict(dict(a=Conv1D(), b=nn.Linear(8, 8))), "a",
     "GPT-2's Conv1D is not implemented"),
    (nn.ModuleDict(dict.fromkeys("ab", nn.Linear(8, 8))), "a", "a is in the model under two names"),
])
def test_layers_whose_adapter_would_do_nothing_are_refused_by_name(model, target, words):
    with pytest.raises(ValueError, match=words):
        SaLoRA(model, [target], 10, r=2)
    assert not adapters(model) and all(p.requires_grad for p in model.parameters())


# ---- orthogonality, eq. 9


def test_orthogonality_is_equation_9_matrix_by_matrix():
    model = mlp()
    salora = SaLoRA(model, ["0", "2", "4"], 10, r=3)  # three shapes, so three batched products
    scatter(salora)
    orth_a, orth_b = salora.orthogonality()
    eye = torch.eye(3, dtype=torch.float64)
    a = sum((((m.lora_A.double() @ m.lora_A.double().T) - eye) ** 2).sum() for m in salora.layers)
    b = sum((((m.lora_B.double().T @ m.lora_B.double()) - eye) ** 2).sum() for m in salora.layers)
    assert orth_a.item() == pytest.approx(a.item() / 3, rel=1e-5)
    assert orth_b.item() == pytest.approx(b.item() / 3, rel=1e-5)


@pytest.mark.parametrize("reduction,factor", [("mean", 1 / 2), ("sum", 2)])
def test_regulariser_is_the_mean_over_2k_matrices_or_the_sum(reduction, factor):
    model, salora = wrapped(beta=0.3, orth_reduction=reduction)
    scatter(salora)
    orth_a, orth_b = salora.orthogonality()  # each a mean over K = 2
    # outside the window: nothing else
    assert salora.penalty().item() == pytest.approx(
        0.3 * (orth_a + orth_b).item() * factor, rel=1e-6)


# ---- density and the two forms of the loss, eq. 10 to 12


def test_density_is_the_ratio_of_sums():
    model, salora = wrapped()
    assert salora.density().item() == pytest.approx(11 / 12, abs=1e-6)
    scatter(salora)
    p = sl.open_probability(salora.log_theta)
    expected = (p[0].sum() * (10 + 24) + p[1].sum() * (24 + 16)) / (4 * (10 + 24) + 4 * (24 + 16))
    assert salora.density().item() == pytest.approx(expected.item(), rel=1e-6)


def test_density_is_what_open_gates_weigh_on_average():
    model, salora = wrapped()
    scatter(salora)
    u = torch.rand(20_000, *salora.log_theta.shape, generator=torch.Generator().manual_seed(0))
    open_gates = (sl.sample_gates(salora.log_theta, u) > 0).sum(2)
    weight = (open_gates * salora.size).sum(1) / salora.initial_params  # (draws,)
    error = float(weight.std()) / math.sqrt(20_000)
    assert float(weight.mean()) == pytest.approx(salora.density().item(), abs=5 * error)


@pytest.mark.parametrize("price", [0.03, 0.0])
def test_penalty_form_is_equation_10(price):
    model, salora = wrapped(beta=0.2, orth_reduction="sum", price=price)
    scatter(salora)
    orth = 2 * sum(salora.orthogonality())
    assert salora.penalty().item() == pytest.approx(0.2 * orth.item(), rel=1e-6)
    begin(salora)
    expected = price * sl.open_probability(salora.log_theta).sum() + 0.2 * orth
    assert salora.penalty().item() == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize("budget", [0.4, 0.9])  # the density lies above the one and below the other
def test_lagrangian_is_equation_12_with_its_gradients(budget):
    model, salora = wrapped(beta=0.2, budget=budget)
    scatter(salora)
    begin(salora)
    c = salora.density().item()
    assert 0.4 < c < 0.9
    orth = sum(salora.orthogonality()) / 2
    assert salora.penalty().item() == pytest.approx(
        0.2 * orth.item() + 0.7 * (c - budget) ** 2, rel=1e-5)
    salora.penalty().backward()
    assert float(salora.lam.grad) == pytest.approx((c - budget) ** 2, rel=1e-5)  # d / d lambda >= 0
    p = sl.open_probability(salora.log_theta.detach())
    by_hand = 0.7 * 2 * (c - budget) * p * (1 - p) * salora.size[:, None] / salora.initial_params
    assert torch.allclose(salora.log_theta.grad, by_hand, rtol=1e-4, atol=1e-8)


# ---- the min-max optimiser


def train(model, salora, steps, lr=1e-2, make=torch.optim.AdamW, trace=lambda *_: None,
          optimizer=None, **kw):
    """Goes on for so many steps."""
    torch.manual_seed(1)
    x, y = torch.randn(64, 10), torch.randint(3, (64,))
    optimizer = optimizer or make(salora.param_groups(lr, weight_decay=0.1), **kw)
    model.train()
    for step in range(steps):
        salora.begin_step()
        loss = F.cross_entropy(model(x), y)
        (loss + salora.penalty()).backward()
        optimizer.step()
        salora.end_step(optimizer)
        optimizer.zero_grad()
        trace(step, optimizer)
    return optimizer


def test_groups_are_weights_gates_and_a_maximised_lambda_without_decay():
    model, salora = wrapped(gate_lr=0.02)
    weights, gates, lam = salora.param_groups(lr=1e-3, weight_decay=0.1)
    assert len(weights["params"]) == 4 and weights["lr"] == 1e-3 and weights["weight_decay"] == 0.1
    assert gates["params"] == [salora.log_theta] and gates["lr"] == 0.02
    assert gates["weight_decay"] == 0
    assert lam["params"] == [salora.lam] and lam["lr"] == 0.02 and lam["weight_decay"] == 0
    assert lam["maximize"]


def test_the_gates_rate_lets_theta_travel_in_a_window_of_any_length():
    for steps, expected in ((20, 8 / 12), (1000, 8 / 300), (100_000, 8 / 30_000)):
        salora = wrapped(steps=steps)[1]
        assert salora.gate_lr == pytest.approx(expected)
        assert salora.lam_lr == pytest.approx(3 * expected)


def test_without_a_window_there_are_only_weights_to_train():
    model, salora = wrapped(window=None, steps=1)
    assert len(salora.param_groups(lr=1e-3)) == 1


def test_lambda_starts_at_zero_and_never_falls_and_gates_rest_outside_the_window():
    model, salora = wrapped(window=(0.25, 0.75), budget=0.5, steps=80)
    assert salora.lam.item() == 0
    lams, thetas = [], []

    def trace(step, _):
        lams.append(salora.lam.item())
        thetas.append(salora.log_theta.detach().clone())

    train(model, salora, 80, trace=trace)
    assert all(b >= a for a, b in zip(lams, lams[1:]))
    assert lams[19] == 0 and lams[20] > 0 and lams[59] == lams[79]
    assert not thetas[18].any() and thetas[19].any()  # steps 20 .. 59 are the window
    assert not torch.equal(thetas[58], thetas[59]) and torch.equal(thetas[59], thetas[79])


def test_projection_keeps_lambda_at_or_above_zero():
    model, salora = wrapped()
    begin(salora)
    with torch.no_grad():
        salora.lam.fill_(-0.3)
    salora.end_step(None)
    assert salora.lam.item() == 0


def test_gradients_that_model_zero_grad_does_not_know_are_none_after_a_step():
    model, salora = wrapped()
    begin(salora)
    (model(torch.randn(5, 10)).sum() + salora.penalty()).backward()
    salora.end_step(None)
    assert salora.log_theta.grad is None and salora.lam.grad is None


@pytest.mark.slow
@pytest.mark.parametrize("budget", [0.5, 0.75])
def test_the_multiplier_drives_density_to_the_budget(budget):
    model, salora = wrapped(window=(0, 1), budget=budget, steps=600, gate_lr=0.1)
    train(model, salora, 600)
    assert salora.final_density == pytest.approx(budget, abs=0.05)
    assert salora.kept_params() <= budget * salora.initial_params


@pytest.mark.slow
def test_a_price_closes_more_gates_the_higher_it_is():
    ends = []
    for price in (0.0, 0.05, 2.0):
        model, salora = wrapped(window=(0, 1), price=price, steps=200)
        train(model, salora, 200)
        ends.append(salora.final_density)
    assert ends[0] > ends[1] + 0.1 > ends[2] + 0.2
    assert salora.lam.item() == 0 and salora.selection == "paper"


# ---- the window


def test_outside_the_window_the_step_is_plain_lora():
    """Against LoRA written out here, for six steps before the window opens."""
    model, salora = wrapped(window=(0.9, 0.95), alpha=6)
    plain = mlp()
    weights = [p.detach().clone().requires_grad_() for layer in salora.layers
               for p in (layer.lora_A, layer.lora_B)]
    train(model, salora, 6)
    torch.manual_seed(1)
    x, y = torch.randn(64, 10), torch.randint(3, (64,))
    optimizer = torch.optim.AdamW(weights, lr=1e-2, weight_decay=0.1)
    for _ in range(6):
        a0, b0, a2, b2 = weights
        h = torch.tanh(F.linear(x, plain[0].weight + 1.5 * b0 @ a0, plain[0].bias))
        h = torch.tanh(F.linear(h, plain[2].weight + 1.5 * b2 @ a2, plain[2].bias))
        optimizer.zero_grad()
        F.cross_entropy(plain[4](h), y).backward()
        optimizer.step()
    trained = [p for layer in salora.layers for p in (layer.lora_A, layer.lora_B)]
    assert all(torch.allclose(p, q, atol=1e-4) for p, q in zip(trained, weights))
    assert weights[1].abs().max() > 0.01


def test_without_a_window_it_is_lora_for_good():
    model, salora = wrapped(window=None, steps=5)
    train(model, salora, 5)
    assert salora.density().item() == 1.0 and salora.penalty().item() == 0.0
    assert not salora.log_theta.any() and set(ranks(model).values()) == {4}


def test_a_step_has_one_draw_and_the_next_step_another():
    model, salora = wrapped()
    begin(salora)
    first = [m.gates for m in salora.layers]
    salora.begin_step()  # a second forward pass of the same step
    assert all(torch.equal(m.gates, g) for m, g in zip(salora.layers, first))
    salora.step += 1
    salora.begin_step()
    assert not any(torch.equal(m.gates, g) for m, g in zip(salora.layers, first))


@pytest.mark.parametrize("stop", [3, 8, 15])  # before, in and after the window of steps 4 to 9
@pytest.mark.parametrize("order", ["model salora optimizer", "optimizer salora model"])
def test_torch_save_and_load_go_on_as_if_nothing_had_happened(stop, order, tmp_path):
    model, salora = wrapped(steps=20)
    optimizer = train(model, salora, stop)
    torch.save(dict(model=model.state_dict(), salora=salora.state_dict(),
                    optimizer=optimizer.state_dict()), tmp_path / "checkpoint")
    x = torch.randn(6, 10)
    before = model.eval()(x)
    train(model, salora, 20 - stop, optimizer=optimizer)

    states = torch.load(tmp_path / "checkpoint", weights_only=True)
    model2 = mlp(seed=3)
    salora2 = SaLoRA(model2, ["0", "2"], 20, r=4, window=(0.2, 0.5), seed=7)
    optimizer2 = torch.optim.AdamW(salora2.param_groups(1e-2, weight_decay=0.1))
    fresh = dict(model=model2, salora=salora2, optimizer=optimizer2)
    for name in order.split():
        fresh[name].load_state_dict(states[name])
    assert torch.equal(model2.eval()(x), before)
    train(model2, salora2, 20 - stop, optimizer=optimizer2)
    assert ranks(model2) == ranks(model) and salora2.pruned and sum(ranks(model).values()) == 4
    for name, value in model.state_dict().items():
        assert torch.equal(model2.state_dict()[name], value), name


def test_a_state_does_not_change_while_training_goes_on():
    model, salora = wrapped()
    state = copy.deepcopy(salora.state_dict()), salora.state_dict()
    scatter(salora)
    assert not any(s["log_theta"].any() or s["lam"] for s in state)


def test_gates_depend_on_their_own_seed_alone():
    draws = []
    for global_seed, seed in ((0, 5), (1, 5), (0, 6)):
        salora = SaLoRA(mlp(), ["0", "2"], 100, r=4, window=(0.2, 0.5), seed=seed)
        torch.manual_seed(global_seed)
        begin(salora)
        draws.append(salora.layers[0].gates)
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])


def test_the_noise_of_a_seed_is_not_that_of_the_next_one_a_step_later():
    draws = []
    for seed, step in ((5, 31), (6, 30)):
        salora = SaLoRA(mlp(), ["0", "2"], 100, r=4, window=(0.2, 0.5), seed=seed)
        begin(salora, step)
        draws.append(salora.layers[0].gates)
    assert not torch.equal(*draws)


def test_evaluation_in_the_window_uses_the_current_deterministic_gates():
    model, salora = wrapped()
    scatter(salora)
    begin(salora)
    with torch.no_grad():
        salora.log_theta.sub_(0.5)  # an optimiser step after the draw
    salora.end_step(None)
    layer, x = salora.layers[1].eval(), torch.randn(4, 24)
    g = sl.deterministic_gates(salora.log_theta[1])
    expected = layer.base(x) + (x @ layer.lora_A.T * g) @ layer.lora_B.T
    assert torch.allclose(layer(x), expected, atol=1e-5)  # with autograd on, too


def test_between_two_steps_of_the_window_a_model_can_be_copied():
    model, salora = wrapped(window=(0, 1))
    train(model, salora, 3)
    x = torch.randn(4, 10)
    assert torch.equal(copy.deepcopy(model).eval()(x), model.eval()(x)) and salora.in_window


def test_a_window_to_the_end_closes_with_the_last_step():
    model, salora = wrapped(window=(0.5, 1), steps=20)
    train(model, salora, 19)
    assert not salora.pruned
    train(*wrapped(window=(0.5, 1), steps=20), 20)
    model, salora = wrapped(window=(0.5, 1), steps=20)
    train(model, salora, 20)
    assert salora.pruned and salora.kept_params() <= 0.5 * salora.initial_params


@pytest.mark.parametrize("window,steps,expected", [
    ((0.4, 0.5), 1000, (400, 500)),
    ((0.4, 0.5), 3, (2, 3)),
    ((0.4, 0.5), 2, (1, 2)),
    ((0, 1), 5, (1, 5)),
    ((0.99, 1), 3, (2, 3)),
    ((0.2, 0.21), 10, (2, 3)),
    ((0.07, 0.14), 100, (7, 14)),  # 0.07 * 100 is 7.000..001
])
def test_a_window_is_whole_steps_at_least_one_and_never_the_first(window, steps, expected):
    assert sl.window_steps(window, steps) == expected


# ---- what a loop can get wrong is told at once

OPTIMIZERS = [
    torch.optim.AdamW, lambda g: torch.optim.AdamW(g, fused=True), torch.optim.SGD]


@pytest.mark.parametrize("kw", [{}, dict(price=0.1), dict(window=None)])
def test_a_run_as_it_should_be_is_told_nothing(kw):
    with quiet():
        train(*wrapped(steps=20, **kw), 20)


def test_a_run_that_goes_on_past_its_steps_is_told():
    model, salora = wrapped(steps=4)
    with pytest.raises(RuntimeError, match="step 5 of 4: give SaLoRA"):
        train(model, salora, 5)


@pytest.mark.parametrize("make", OPTIMIZERS)
def test_a_loop_without_end_step_is_told_at_its_second_step(make):
    model, salora = wrapped()
    optimizer = make(salora.param_groups(1e-2))
    salora.begin_step()
    (model(torch.randn(5, 10)).sum() + salora.penalty()).backward()
    optimizer.step()
    optimizer.zero_grad()
    with pytest.raises(RuntimeError, match="call salora.end_step"):
        salora.begin_step()


@pytest.mark.parametrize("set_to_none", [False, True])
def test_with_a_fused_optimizer_too_wherever_gradients_are_zeroed(set_to_none):
    model, salora = wrapped()
    optimizer = torch.optim.AdamW(salora.param_groups(1e-2), fused=True)
    salora.begin_step()
    optimizer.zero_grad(set_to_none)
    model(torch.randn(5, 10)).sum().backward()
    optimizer.step()
    with pytest.raises(RuntimeError, match="call salora.end_step"):
        salora.begin_step()


@pytest.mark.parametrize("fused", [False, True])
def test_a_batch_may_be_given_up_before_the_optimizer_steps(fused):
    model, salora = wrapped()
    optimizer = torch.optim.AdamW(salora.param_groups(1e-2), fused=fused)
    for step in range(2):
        salora.begin_step()
        (model(torch.randn(5, 10)).sum() + salora.penalty()).backward()
        if step:
            optimizer.step()
            salora.end_step(optimizer)
        optimizer.zero_grad()
    assert salora.step == 1


@pytest.mark.parametrize("make", OPTIMIZERS)
def test_an_end_step_before_the_optimizers_step_is_told(make):
    model, salora = wrapped()
    optimizer = make(salora.param_groups(1e-2))
    salora.begin_step()
    (model(torch.randn(5, 10)).sum() + salora.penalty()).backward()
    with pytest.warns(UserWarning, match="the optimizer has not stepped: end_step"):
        salora.end_step(optimizer)


@pytest.mark.parametrize("make", OPTIMIZERS)
def test_a_first_step_at_a_rate_of_zero_or_that_a_scaler_skips_is_fine(make):
    for lr, factor in ((0.0, 1.0), (1e-2, math.inf)):
        model, salora = wrapped()
        optimizer = make(salora.param_groups(lr))
        salora.begin_step()
        (factor * model(torch.randn(5, 10)).square().sum() + salora.penalty()).backward()
        if factor == 1:
            optimizer.step()
        with quiet():
            salora.end_step(optimizer)
        assert salora.step == 1


@pytest.mark.parametrize("fused", [False, True])
def test_two_forward_passes_before_the_first_backward_pass_are_fine(fused):
    model, salora = wrapped()
    optimizer = torch.optim.AdamW(salora.param_groups(1e-2), fused=fused)
    salora.begin_step()
    loss = model(torch.randn(5, 10)).sum() + salora.penalty()
    salora.begin_step()
    (loss + model(torch.randn(5, 10)).sum()).backward()
    optimizer.step()
    salora.end_step(optimizer)
    assert salora.step == 1


def test_a_loop_may_add_to_the_penalty_in_place():
    model, salora = wrapped()
    optimizer = torch.optim.AdamW(salora.param_groups(1e-2))
    salora.begin_step()
    loss = salora.penalty()
    loss += model(torch.randn(5, 10)).sum()
    loss.backward()
    optimizer.step()
    salora.end_step(optimizer)
    assert salora.step == 1


def test_an_end_step_without_begin_step_is_told():
    model, salora = wrapped()
    with pytest.raises(RuntimeError, match="without a begin_step"):
        salora.end_step(None)


def test_an_optimizer_without_the_groups_is_told():
    for groups, words in (
            (lambda salora, model: [p for p in model.parameters() if p.requires_grad],
             "does not hold all"),
            (lambda salora, model: [dict(params=g["params"]) for g in salora.param_groups(1e-3)],
             "would minimize lambda"),
            (lambda salora, model: salora.param_groups(1e-3)[1:], "does not hold all")):
        model, salora = wrapped()
        with pytest.raises(RuntimeError, match=words):
            train(model, salora, 1,
                  make=lambda _: torch.optim.AdamW(groups(salora, model)))  # noqa: B023


@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_a_task_loss_that_does_not_reach_the_adapters_is_told(beta):
    model, salora = wrapped(beta=beta)
    model[4].requires_grad_(True)
    optimizer = torch.optim.AdamW(salora.param_groups(1e-3))
    salora.begin_step()
    with torch.no_grad():
        hidden = model[:4](torch.randn(5, 10))
    (model[4](hidden).sum() + salora.penalty()).backward()
    optimizer.step()
    with pytest.raises(RuntimeError, match="the task loss does not reach the adapters"):
        salora.end_step(optimizer)


def test_of_two_optimizers_neither_will_do_and_none_is_no_optimizer():
    for give in (0, 1, 2):
        model, salora = wrapped()
        groups = salora.param_groups(1e-3)
        two = [torch.optim.AdamW(groups[:1]), torch.optim.AdamW(groups[1:]), None]
        salora.begin_step()
        (model(torch.randn(5, 10)).sum() + salora.penalty()).backward()
        for optimizer in two[:2]:
            optimizer.step()
        with pytest.raises(RuntimeError, match="does not hold all of SaLoRA's parameters"):
            salora.end_step(two[give])


@pytest.mark.parametrize("move", [
    nn.Module.bfloat16, nn.Module.half, nn.Module.double, lambda model: model.to("meta")])
def test_a_model_that_is_cast_or_moved_afterwards_is_told(move):
    model, salora = wrapped()
    with pytest.raises(RuntimeError, match="another dtype or device after SaLoRA"):
        x = torch.randn(5, 10).to(move(model)[0].base.weight)
        optimizer = torch.optim.AdamW(salora.param_groups(1e-3))
        salora.begin_step()
        model(x).float().sum().backward()
        optimizer.step()
        salora.end_step(optimizer)


def forgets_penalty(model, salora, optimizer, x):
    salora.begin_step()
    return model(x).square().mean()


def forwards_first(model, salora, optimizer, x):
    loss = model(x).square().mean()
    salora.begin_step()
    return loss + salora.penalty()


def as_it_should(model, salora, optimizer, x):
    salora.begin_step()
    return model(x).square().mean() + salora.penalty()


class Deaf(torch.optim.AdamW):
    """Has `maximize` in its groups, as every optimizer has that is given one, and ignores it."""

    def step(self):
        self.param_groups[2]["maximize"] = False
        super().step()
        self.param_groups[2]["maximize"] = True


@pytest.mark.parametrize("step,forward,make,words", [
    (4, forgets_penalty, torch.optim.AdamW, "the task loss lacks .* salora.penalty"),
    (4, forwards_first, torch.optim.AdamW, "does not reach the gates: call salora.begin_step"),
    (4, as_it_should, Deaf, "would minimize lambda"),
    (4, as_it_should, torch.optim.AdamW, None),
    (9, forwards_first, torch.optim.AdamW, "does not reach the gates: call salora.begin_step"),
])
def test_gates_that_learn_nothing_are_told_at_both_ends_of_the_window(step, forward, make, words):
    model, salora = wrapped(steps=20)  # the window is steps 4 to 9
    optimizer = train(model, salora, step, make=make)
    told = pytest.raises(RuntimeError, match=words) if words else contextlib.nullcontext()
    with told:
        forward(model, salora, optimizer, torch.randn(5, 10)).backward()
        optimizer.step()
        salora.end_step(optimizer)


def test_a_price_needs_the_penalty_too():
    model, salora = wrapped(steps=20, price=0.1)
    assert salora.selection == "paper"
    optimizer = train(model, salora, 4)
    with pytest.raises(RuntimeError, match="the task loss lacks"):
        forgets_penalty(model, salora, optimizer, torch.randn(5, 10)).backward()
        optimizer.step()
        salora.end_step(optimizer)


def test_a_head_that_is_unfrozen_too_late_is_told():
    model, salora = wrapped()
    optimizer = torch.optim.AdamW(salora.param_groups(1e-2))
    model[4].requires_grad_(True)
    with pytest.warns(UserWarning, match="4.weight has a gradient, but the optimizer does not"):
        train(model, salora, 1, optimizer=optimizer)


def test_what_a_first_batch_does_not_reach_is_no_mistake():
    model = mlp()
    model(torch.randn(5, 10)).sum().backward()  # the weights have a gradient of before
    salora = SaLoRA(model, ["0", "2"], 100, r=4)
    optimizer = torch.optim.AdamW(salora.param_groups(1e-2))
    model[4].requires_grad_(True).zero_grad()
    salora.begin_step()
    (model[:2](torch.randn(5, 10)).sum() + salora.penalty()).backward()
    optimizer.step()
    with quiet():
        salora.end_step(optimizer)


def test_an_end_step_before_the_optimizers_step_is_told_where_a_layer_was_not_reached():
    model, salora = wrapped()
    optimizer = torch.optim.AdamW(salora.param_groups(1e-2))
    salora.begin_step()
    (model[:2](torch.randn(5, 10)).sum() + salora.penalty()).backward()
    with pytest.warns(UserWarning, match="the optimizer has not stepped: end_step"):
        salora.end_step(optimizer)


def test_after_a_resume_the_optimizer_is_checked_again():
    model, salora = wrapped(steps=20)
    train(model, salora, 12)
    model2, salora2 = wrapped(steps=20)
    salora2.load_state_dict(salora.state_dict())
    model2.load_state_dict(model.state_dict(), assign=True)  # other Parameters
    with pytest.raises(RuntimeError, match="does not hold all"):
        train(model2, salora2, 1, optimizer=torch.optim.AdamW(wrapped()[1].param_groups(1e-3)))


def test_a_resume_that_forgets_the_state_of_salora_is_told():
    model, salora = wrapped(steps=20)
    optimizer = train(model, salora, 1)
    model2, salora2 = wrapped(steps=20)
    model2.load_state_dict(model.state_dict())
    optimizer2 = torch.optim.AdamW(salora2.param_groups(1e-2))
    optimizer2.load_state_dict(optimizer.state_dict())
    with pytest.raises(RuntimeError, match=r"call salora\.load_state_dict\(\) too"):
        train(model2, salora2, 1, optimizer=optimizer2)


@pytest.mark.parametrize("stop", [3, 6, 12])
def test_a_resume_that_forgets_the_state_of_the_model_is_told(stop):
    model, salora = wrapped(steps=20)
    train(model, salora, stop)
    model2, salora2 = wrapped(steps=20)
    salora2.load_state_dict(salora.state_dict())
    with pytest.raises(RuntimeError, match=r"call model\.load_state_dict\(\) too"):
        train(model2, salora2, 1)


def test_a_model_from_after_the_cut_is_told_before_the_window():
    model, salora = wrapped(steps=20)
    train(model, salora, 12)
    model2, salora2 = wrapped(steps=20)
    model2.load_state_dict(model.state_dict())
    with pytest.raises(RuntimeError, match="state is from after the cut"):
        train(model2, salora2, 1)


def test_a_window_that_a_resumed_run_has_behind_it_still_cuts():
    model, salora = wrapped(steps=20, window=(0.5, 0.9))
    train(model, salora, 8)
    model2, salora2 = wrapped(steps=20, window=(0.1, 0.3))
    salora2.load_state_dict(salora.state_dict())
    model2.load_state_dict(model.state_dict())
    train(model2, salora2, 1)
    assert salora2.pruned and salora2.kept_params() <= 0.5 * salora2.initial_params


def test_a_resumed_run_that_was_cut_has_no_second_window():
    model, salora = wrapped(steps=20)
    train(model, salora, 12)
    with torch.no_grad():
        salora.layers[0].lora_B.zero_()  # one layer may have learned nothing
    model2, salora2 = wrapped(steps=20, window=(0.65, 0.9))  # steps 13 to 17
    salora2.load_state_dict(salora.state_dict())
    model2.load_state_dict(model.state_dict())
    train(model2, salora2, 2)
    assert not salora2.in_window and ranks(model2) == ranks(model)


@pytest.mark.filterwarnings("ignore:the gates came to")
def test_a_run_of_which_nothing_was_kept_goes_on_after_a_resume():
    model, salora = wrapped(steps=20, selection="paper")
    optimizer = train(model, salora, 9)
    with torch.no_grad():
        salora.log_theta.fill_(-9)
    train(model, salora, 1, optimizer=optimizer)  # ends the window
    model2, salora2 = wrapped(steps=20, selection="paper")
    salora2.load_state_dict(salora.state_dict())
    model2.load_state_dict(model.state_dict())
    train(model2, salora2, 2)
    assert set(ranks(model2).values()) == {0}


@pytest.mark.filterwarnings("ignore:the gates came to")
def test_training_that_diverged_is_told_when_the_window_opens():
    model, salora = wrapped(steps=20)
    optimizer = train(model, salora, 3)
    with torch.no_grad():
        salora.layers[1].lora_B[0, 0] = math.nan
    with pytest.raises(RuntimeError, match="training diverged"):
        salora.begin_step()
        (model(torch.randn(5, 10)).sum() + salora.penalty()).backward()
        optimizer.step()
        salora.end_step(optimizer)


@pytest.mark.filterwarnings("ignore:the gates came to")
def test_gates_that_diverged_are_told_before_anything_is_cut():
    model, salora = wrapped(steps=20)
    train(model, salora, 6)
    with torch.no_grad():
        salora.log_theta.fill_(math.nan)
    with pytest.raises(RuntimeError, match="training diverged"):
        salora.prune()
    assert all(layer.rank == 4 for layer in salora.layers)


@pytest.mark.parametrize("stop, warned", [(2, True), (6, True), (12, False)])
def test_merging_what_was_never_cut_is_told(stop, warned):
    model, salora = wrapped(steps=20)
    train(model, salora, stop)
    model.load_state_dict(model.state_dict())  # which changes nothing
    told = pytest.warns(UserWarning, match="nothing was cut") if warned else quiet()
    with told:
        merge(model)


def test_lora_and_a_run_that_was_gone_on_with_after_the_cut_are_merged_without_a_word():
    model, salora = wrapped(window=None)
    train(model, salora, 2)
    salora.load_state_dict(salora.state_dict())
    with quiet():
        merge(model)
    model, salora = wrapped(steps=20, budget=1.0)
    train(model, salora, 12)
    model2, salora2 = wrapped(steps=20, budget=1.0)
    model2.load_state_dict(model.state_dict())
    salora2.load_state_dict(salora.state_dict())
    with quiet():
        merge(model2)


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


@pytest.mark.parametrize("make", [
    lambda: Doubled(10, 10), lambda: nn.utils.parametrizations.weight_norm(nn.Linear(10, 10))])
def test_layers_that_cannot_be_merged_are_refused_before_any_is(make):
    model = nn.Sequential(nn.Linear(10, 10), make(), nn.Linear(10, 3))
    salora = SaLoRA(model, ["0", "1"], 20, r=4, window=None)
    train(model, salora, 3)  # training works, and so does saving the adapter
    with pytest.raises(ValueError, match="^1 is a .* use adapter.save"):
        merge(model)
    assert list(adapters(model)) == ["0", "1"]


def test_inputs_of_any_shape():
    model, salora = wrapped()
    scatter(salora)
    layer, x = salora.layers[0], torch.randn(2, 3, 10)
    assert torch.allclose(layer(x)[1, 2], layer(x[1, 2]), atol=1e-6)
    assert layer(x[:0]).shape == (0, 3, 24)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_activations_change_nothing(reentrant):
    ends = []
    for run in (lambda f, x: f(x), partial(checkpoint, use_reentrant=reentrant)):
        model, salora = wrapped(steps=12)
        optimizer = torch.optim.AdamW(salora.param_groups(1e-2))
        x, y = torch.randn(64, 10, generator=torch.Generator().manual_seed(0)), torch.arange(64) % 3
        for _ in range(12):
            salora.begin_step()
            hidden = run(model[:2], x.requires_grad_())
            loss = F.cross_entropy(run(model[2:], hidden), y) + salora.penalty()
            loss.backward()
            optimizer.step()
            salora.end_step(optimizer)
            optimizer.zero_grad()
        ends.append([salora.log_theta, *(m.lora_B for m in salora.layers)])
    assert salora.pruned and all(torch.equal(a, b) for a, b in zip(*ends))


def test_a_second_forward_pass_needs_a_begin_step_of_its_own():
    model, salora = wrapped()
    scatter(salora)
    begin(salora)
    x = torch.randn(5, 10)
    (model(x).sum() + model(x).sum()).backward()  # two passes before one backward are fine
    with pytest.raises(RuntimeError, match="needs its own salora.begin_step"):
        model(x)
    salora.begin_step()
    model(x).sum().backward()
    assert salora.log_theta.grad.any()


def test_passes_without_gradients_need_no_begin_step():
    model, salora = wrapped()
    begin(salora)
    (model(torch.randn(5, 10)).sum() + salora.penalty()).backward()
    with torch.no_grad():  # the accuracy of the batch, say
        model(torch.randn(5, 10))


def test_an_adapter_in_a_model_in_eval_mode_drops_nothing(tmp_path):
    model, salora = wrapped(lora_dropout=0.5)
    scatter(salora)
    save(model, tmp_path)
    other = mlp().eval()
    load(other, tmp_path)
    x = torch.randn(5, 10)
    assert torch.allclose(other(x), model.eval()(x), atol=1e-5)
    assert not any(m.training for m in other.modules())
    with quiet():  # it has no window that could have ended
        merge(other)


def test_a_model_that_was_in_eval_mode_before_may_stay_there():
    model = mlp().eval()
    salora = SaLoRA(model, ["0", "2"], 20, r=4)
    optimizer = torch.optim.AdamW(salora.param_groups(1e-2))
    for _ in range(20):
        salora.begin_step()
        (model(torch.randn(5, 10)).square().mean() + salora.penalty()).backward()
        optimizer.step()
        salora.end_step(optimizer)
        optimizer.zero_grad()
    assert salora.pruned and not model.training


def test_a_step_in_eval_mode_is_told():
    model, salora = wrapped()
    model[2].eval()
    with pytest.raises(RuntimeError, match="call model.train()"):
        begin(salora)


def test_gates_that_could_not_move_are_told_with_both_numbers():
    model, salora = wrapped(steps=10, gate_lr=1e-4)
    with pytest.warns(UserWarning, match=r"a density of 0\.\d+, and the budget is 0\.5"):
        train(model, salora, 10)
    assert salora.kept_params() <= 0.5 * salora.initial_params


# ---- pruning


@pytest.mark.parametrize("budget", [0.05, 0.25, 0.5, 0.731, 1.0])
def test_budget_selection_fills_the_budget_and_never_exceeds_it(budget):
    model, salora = wrapped(budget=budget)
    scatter(salora)
    keep = salora.select()
    kept = int((keep.sum(1) * salora.size).sum())
    room = budget * salora.initial_params
    # less than the smallest triplet is left over
    assert kept <= room and (room - kept < 34 or budget == 1.0)
    if budget == 1.0:
        assert keep.all()


def test_budget_selection_goes_by_log_theta():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    salora = SaLoRA(model, ["0", "1"], 10, r=3, budget=0.5)
    with torch.no_grad():
        salora.log_theta.copy_(torch.tensor([[5.0, -1, 2], [1, 3, -4]]))
    assert salora.select().tolist() == [[True, False, True], [False, True, False]]


def test_paper_selection_keeps_what_has_a_gate_above_zero():
    model, salora = wrapped(selection="paper", budget=0.01)
    with torch.no_grad():
        # closes at log(-gamma / zeta) = -2.398
        salora.log_theta.copy_(torch.tensor([[0.0, -2.3, -2.5, 9], [-9, -9, -9, -9]]))
    assert salora.select().tolist() == [[True, True, False, True], [False] * 4]


def test_an_exact_share_is_met_exactly():
    model = nn.Sequential(*(nn.Linear(1, 1) for _ in range(50)))
    salora = SaLoRA(model, [str(i) for i in range(50)], 10, r=1, budget=0.58)
    assert 0.58 * 100 < 58  # the rounding error that must not cost a triplet
    assert int(salora.select().sum()) == 29


@pytest.mark.parametrize("make,kw", [
    (torch.optim.AdamW, {}),
    (torch.optim.SGD, dict(momentum=0.9)),
])
def test_pruning_shrinks_tensors_and_moments_and_keeps_those_of_the_kept(make, kw):
    model, salora = wrapped(window=(0, 1), budget=0.5, gate_lr=0.3)
    optimizer = train(model, salora, 10, make=make, **kw)
    keep, layers = salora.select(), salora.layers
    before = [(m.lora_A.detach().clone(), m.lora_B.detach().clone(),
               copy.deepcopy(optimizer.state[m.lora_A]), copy.deepcopy(optimizer.state[m.lora_B]))
              for m in layers]
    salora.prune(optimizer)
    assert 0 < keep.sum() < keep.numel()
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for layer, kept, (a, b, state_a, state_b) in zip(layers, keep, before):
        assert torch.equal(layer.lora_A, a[kept]) and torch.equal(layer.lora_B, b[:, kept])
        assert layer.rank == int(kept.sum()) and layer.lora_A.is_contiguous()
        assert layer.lora_A.untyped_storage().nbytes() == 4 * layer.lora_A.numel()
        for p, old, dim in ((layer.lora_A, state_a, 0), (layer.lora_B, state_b, 1)):
            assert id(p) in held
            assert optimizer.state[p].keys() == old.keys() and len(old) > 0
            for name, value in optimizer.state[p].items():
                was = old[name]
                if torch.is_tensor(value) and value.dim() == 2:
                    assert value.shape == p.shape
                    assert torch.equal(value, was.index_select(dim, kept.nonzero().squeeze(1)))
                else:
                    assert value == was
    assert salora.log_theta not in optimizer.state and salora.lam not in optimizer.state
    assert sum(p.numel() for p in optimizer.state if p.dim() == 2) == salora.kept_params()


def test_pruning_forgets_the_old_tensors_of_an_optimiser_without_moments():
    class Plain(torch.optim.SGD):
        def step(self):
            for group in self.param_groups:
                for p in group["params"]:
                    self.state[p]["step"] = 1  # a number, as some optimisers have it
            super().step()

    model, salora = wrapped(window=(0, 1))
    optimizer = train(model, salora, 5, make=Plain)
    salora.prune(optimizer)
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert {id(p) for p in optimizer.state} <= held
    optimizer.state_dict()


def test_a_list_of_the_parameters_is_still_theirs_after_the_cut():
    model, salora = wrapped(window=(0.1, 0.5), steps=20)
    listed = [p for p in model.parameters() if p.requires_grad]
    train(model, salora, 20)
    assert salora.pruned and sum(p.numel() for p in listed) == salora.kept_params()
    model(torch.randn(5, 10)).sum().backward()
    assert nn.utils.clip_grad_norm_(listed, 0.5) > 0
    assert len(nn.utils.parameters_to_vector(listed)) == salora.kept_params()


def test_the_graph_of_an_old_loss_may_be_alive_at_the_cut():
    model, salora = wrapped(window=(0.1, 0.5), steps=20)
    optimizer, kept = torch.optim.AdamW(salora.param_groups(1e-2)), []
    for _ in range(20):
        salora.begin_step()
        loss = model(torch.randn(5, 10)).square().mean() + salora.penalty()
        loss.backward()
        optimizer.step()
        salora.end_step(optimizer)
        optimizer.zero_grad()
        kept.append(loss)
    assert salora.pruned and math.isfinite(sum(kept).item())


def test_gradients_may_be_set_to_zero_at_the_cut():
    class Zeros(torch.optim.AdamW):
        def zero_grad(self):
            super().zero_grad(set_to_none=False)

    model, salora = wrapped(steps=20)
    train(model, salora, 20, make=Zeros)
    assert salora.pruned


def test_training_goes_on_after_pruning():
    model, salora = wrapped(window=(0.1, 0.5), steps=40)
    optimizer, density = train(model, salora, 20), salora.final_density
    after = [p for m in salora.layers for p in (m.lora_A, m.lora_B)]
    before = [p.detach().clone() for p in after]
    train(model, salora, 20, optimizer=optimizer)
    assert all(not torch.equal(a, b) for a, b in zip(before, after) if a.numel())
    assert salora.pruned and salora.final_density == density  # there is one cut


def test_kept_gates_are_set_to_one_or_folded_in():
    for fold in (False, True):
        model, salora = wrapped(fold_gates=fold)
        scatter(salora)
        g, keep = sl.deterministic_gates(salora.log_theta), salora.select()
        b = [m.lora_B.detach().clone() for m in salora.layers]
        salora.prune()
        for i, layer in enumerate(salora.layers):
            assert torch.allclose(layer.lora_B, (b[i] * (g[i] if fold else 1))[:, keep[i]])


def test_folding_in_with_the_papers_selection_leaves_the_evaluated_model_as_it_was():
    model, salora = wrapped(fold_gates=True, selection="paper")
    scatter(salora)
    begin(salora)
    salora.end_step(None)
    x = torch.randn(6, 10)
    model.eval()
    before = model(x)
    salora.prune()
    assert 0 < sum(ranks(model).values()) < 8 and torch.allclose(model(x), before, atol=1e-5)


def test_rank_zero_is_the_pretrained_layer_again():
    model, salora = wrapped(selection="paper", beta=0.3, orth_reduction="sum")
    scatter(salora)
    with torch.no_grad():
        salora.log_theta[0] = -9.0
    salora.prune()
    x = torch.randn(6, 10)
    assert ranks(model)["0"] == 0 and torch.equal(model[0](x), model[0].base(x))
    m, eye = salora.layers[1], torch.eye(salora.layers[1].rank)
    orth = sum((p - eye).square().sum() for p in (m.lora_A @ m.lora_A.T, m.lora_B.T @ m.lora_B))
    assert salora.penalty().item() == pytest.approx(0.3 * orth.item())
    (model(x).sum() + salora.penalty()).backward()  # the others still learn
    assert salora.orthogonality()[1] > 0 and salora.layers[1].lora_A.grad is not None


def test_everything_pruned_is_the_pretrained_model():
    model, salora = wrapped(selection="paper", beta=0.1)
    scatter(salora)
    with torch.no_grad():
        salora.log_theta.fill_(-9)
    salora.prune()
    x = torch.randn(2, 10)
    assert torch.equal(model(x), mlp()(x)) and salora.penalty().item() == 0
    assert salora.density().item() == 0


def test_density_before_and_after_the_selection_are_both_known():
    model, salora = wrapped(budget=0.5)
    scatter(salora)
    expected = salora.density().item()
    salora.prune()
    assert salora.final_density == pytest.approx(expected)
    assert salora.density().item() == pytest.approx(salora.kept_params() / salora.initial_params)


# ---- ranks, merging, saving, loading


def trained(**kw):
    model, salora = wrapped(budget=0.4, **kw)
    scatter(salora)
    salora.prune()
    return model


def test_rank_map_tells_modules_of_two_stacks_apart():
    lines = rank_map({"encoder.0.q": 8, "encoder.1.q": 4, "decoder.0.q": 2, "pool": 1},
                     8).splitlines()
    assert [line.split() for line in lines] == [["0", "1"], ["encoder.q", "8█", "4▄"],
                                                ["decoder.q", "2▂"], ["pool", "1▁"]]


def test_rank_map_has_a_row_a_module_and_a_column_a_layer():
    text = rank_map({"enc.0.q": 8, "enc.0.v": 0, "enc.1.q": 3}, 8)
    assert [line.split() for line in text.splitlines()] == [
        ["0", "1"], ["q", "8█", "3▃"], ["v", "0"]]


def test_rank_map_of_a_sequential_is_one_row():
    lines = rank_map({"0": 8, "2": 4, "4": 0}, 8).splitlines()
    assert [line.split() for line in lines] == [["0", "2", "4"], ["8█", "4▄", "0"]]


def test_rank_map_of_names_with_numbers_in_them_and_ranks_off_the_scale():
    text = rank_map({"conv1.0.q": 20, "conv1.1.q": 1, "conv1.0.v": 16, "pool": 2}, 16)
    assert text.splitlines() == [
        "       0   1", "q    20█  1▁", "v    16█", "pool          2▁"]


@pytest.mark.parametrize("dtype,tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 0.05)])
def test_merged_model_is_plain_and_computes_the_same(dtype, tolerance):
    model = trained(alpha=2)
    for layer in adapters(model).values():
        layer.base.to(dtype)
    model[4].to(dtype)
    x = torch.randn(6, 10, dtype=dtype)
    before = model(x)
    merge(model)
    assert not adapters(model) and type(model[0]) is nn.Linear and model[0].weight.dtype == dtype
    assert not any(p.requires_grad for p in model.parameters())
    assert torch.allclose(model(x), before, rtol=tolerance, atol=tolerance)


def test_saved_adapter_is_in_pefts_format_and_loads_back(tmp_path):
    model = trained(alpha=8)
    x = torch.randn(6, 10)
    save(model, tmp_path / "adapter", modules_to_save=["4"], task_type="SEQ_CLS")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    table = ranks(model)
    assert config["peft_type"] == "LORA"
    assert config["target_modules"] == [p for p, r in table.items() if r]
    for path, r in table.items():
        assert config["rank_pattern"].get(path, config["r"]) == r
        assert config["alpha_pattern"].get(path, config["lora_alpha"]) == r
        assert tensors[f"base_model.model.{path}.lora_A.weight"].shape[0] == r
        assert tensors[f"base_model.model.{path}.lora_B.weight"].shape[1] == r
    assert {t.dtype for t in tensors.values()} == {torch.float32}
    assert "base_model.model.4.weight" in tensors
    again = load(mlp(), tmp_path / "adapter")
    assert torch.allclose(again(x), model(x), atol=1e-5) and ranks(again) == table


def test_matrices_of_rank_zero_are_left_out_of_the_file(tmp_path):
    model, salora = wrapped(selection="paper")
    scatter(salora)
    with torch.no_grad():
        salora.log_theta[0] = -9.0
    salora.prune()
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "notes.txt").write_text("mine")
    save(model, tmp_path / "a")
    save(model, tmp_path / "a")
    assert {p.name for p in (tmp_path / "a").iterdir()} == {
        "adapter_config.json", "adapter_model.safetensors", "salora.json", "notes.txt"}
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert config["target_modules"] == ["2"]
    assert torch.allclose(load(mlp(), tmp_path / "a")(torch.ones(1, 10)),
                          model(torch.ones(1, 10)), atol=1e-6)


@pytest.mark.parametrize("change,words", [
    (lambda c, t: t.pop("base_model.model.2.lora_B.weight"),
     "2.lora_B.weight: expected .*found nothing"),
    (lambda c, t: t.update({"base_model.model.9.lora_A.weight": torch.zeros(1)}),
     "9.lora_A.weight: expected nothing"),
    (lambda c, t: t.update({"base_model.model.0.lora_A.weight": torch.zeros(2, 9)}),
     "0.lora_A.weight: expected"),
    (lambda c, t: c.update(use_dora=True), "use_dora is True"),
    (lambda c, t: c.update(lora_bias=True), "lora_bias is True, which is not implemented"),
    (lambda c, t: c.update(bias="all"), "bias is 'all'"),
    (lambda c, t: c.update(init_lora_weights="pissa"), "init_lora_weights is 'pissa'"),
    (lambda c, t: c.update(fan_in_fan_out=True), "fan_in_fan_out is True"),
    (lambda c, t: c.update(peft_type="LOHA"), "LOHA"),
    (lambda c, t: c.update(rank_pattern={"7": 3}), "0.lora_A.weight: expected"),
    (lambda c, t: c.update(target_modules=7), "target_modules is 7"),
    (lambda c, t: c.update(target_modules="5"), "'5' matches no nn.Linear"),
    (lambda c, t: c.update(target_modules="(0+)+"), "too intricate"),
    (lambda c, t: c.update(target_modules="(0"), "no regular expression"),
    (lambda c, t: c.update(r=0), "r is 0"),
    (lambda c, t: c.update(lora_alpha="8"), "lora_alpha is '8'"),
    (lambda c, t: c.update(lora_alpha=10**400), "lora_alpha is 1000"),
    (lambda c, t: c.update(layers_to_transform=["0"]), "layers_to_transform is"),
    (lambda c, t: c.update(a_new_trick=3), "a_new_trick is 3"),
    (lambda c, t: c.update(rank_pattern={"[02]": -1}), "rank_pattern is"),
    (lambda c, t: c.clear(), "peft_type is None"),
    (lambda c, t: c.update(target_modules=["7", "8"]), "'7', '8' matches no nn.Linear"),
])
def test_loading_is_strict_and_names_what_is_wrong(tmp_path, change, words):
    save(trained(), tmp_path / "a")
    file = tmp_path / "a" / "adapter_config.json"
    config = json.loads(file.read_text())
    tensors = load_file(tmp_path / "a" / "adapter_model.safetensors")
    change(config, tensors)
    file.write_text(json.dumps(config))
    save_file(tensors, tmp_path / "a" / "adapter_model.safetensors")
    model = mlp()
    with pytest.raises(ValueError, match=words):
        load(model, tmp_path / "a")
    assert not adapters(model)


def test_loaded_scale_is_alpha_over_rank_and_only_the_adapter_learns(tmp_path):
    model, salora = wrapped()
    scatter(salora)
    save(model, tmp_path / "a", modules_to_save=["4"])
    file = tmp_path / "a" / "adapter_config.json"
    config = json.loads(file.read_text()) | dict(lora_alpha=12, alpha_pattern={"2": 2})
    file.write_text(json.dumps(config))
    again = load(mlp(), tmp_path / "a")
    assert [m.scale for m in adapters(again).values()] == [3.0, 0.5]
    assert {name for name, p in again.named_parameters() if p.requires_grad} == {
        "0.lora_A", "0.lora_B", "2.lora_A", "2.lora_B", "4.weight", "4.bias"}


def test_a_path_that_is_the_end_of_another_keeps_its_own_rank(tmp_path):
    def model():
        torch.manual_seed(0)
        block = dict(up=nn.Linear(6, 6), xup=nn.Linear(6, 6))
        return nn.ModuleDict(dict(up=nn.Linear(6, 6), block=nn.ModuleDict(block)))

    tuned = model()
    salora = SaLoRA(tuned, "up", 10, r=4, budget=0.75)
    assert list(ranks(tuned)) == ["up", "block.up"]  # not xup
    with torch.no_grad():
        salora.log_theta.copy_(torch.tensor([[1.0, 2, -1, -2], [1, 2, 3, 4]]))
    salora.prune()
    save(tuned, tmp_path / "a")
    assert ranks(load(model(), tmp_path / "a")) == {"up": 2, "block.up": 4}
    pruned = model()
    salora = SaLoRA(pruned, "up", 10, r=4, budget=0.5)
    with torch.no_grad():
        salora.log_theta.copy_(torch.tensor([[4.0, 3, 2, 1], [-1, -2, -3, -4]]))
        salora.layers[0].lora_B.normal_()
    salora.prune()
    assert ranks(pruned) == {"up": 4, "block.up": 0}
    save(pruned, tmp_path / "b")
    again = load(model(), tmp_path / "b")  # up is the end of block.up: PEFT would adapt that too
    assert ranks(again) == {"up": 4, "block.up": 1} and not again.block.up.lora_B.any()
    assert torch.equal(again.up.lora_B, pruned.up.lora_B)
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert list(config["rank_pattern"]) == ["block.up", "up"]  # PEFT takes the first that fits


def test_a_module_to_save_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ValueError, match="'classifer'"):
        save(trained(), tmp_path / "a", modules_to_save=["classifer"])
    with pytest.raises(ValueError, match="modules_to_save covers 2, which has an adapter"):
        save(trained(), tmp_path / "a", modules_to_save=["2"])


@pytest.mark.parametrize("after", [torch.float32, torch.bfloat16])
def test_merging_adds_in_float32_before_it_rounds(after):
    model = nn.Sequential(nn.Linear(64, 64, bias=False)).bfloat16()
    salora = SaLoRA(model, ["0"], 10, r=8)
    scatter(salora)
    layer = salora.layers[0]
    layer.lora_A.data, layer.lora_B.data = layer.lora_A.to(after), layer.lora_B.to(after)
    a, b = layer.lora_A.detach().float(), layer.lora_B.detach().float()
    exact = layer.base.weight.float() + b @ a
    assert torch.equal(merge(model)[0].weight, exact.bfloat16())


def test_whole_numbers_of_any_type_will_do_for_steps_and_seed():
    x = torch.ones(2, 10)
    for steps, seed in ((20.0, np.int64(3)), (np.int64(20), 2**62), (20, -1)):
        model = mlp()
        salora = SaLoRA(model, ["0", "2"], steps, r=4, window=(0.2, 0.5), seed=seed)
        train(model, salora, 20)
        assert salora.pruned and model(x).isfinite().all()
        assert type(salora.state_dict()["seed"]) is int  # torch.load reads no other by default


def test_a_rank_larger_than_its_matrix_has_no_gates():
    model = nn.Sequential(nn.Linear(16, 1)).requires_grad_(False)
    model[0] = SaLoRALinear(model[0], 8, 1.0)
    with pytest.raises(ValueError, match=r"rank 8, too much for its \(1, 16\)"):
        SaLoRA(model, None, 10)
    SaLoRA(model, None, 10, window=None)


def test_a_model_is_adapted_once():
    model, _ = wrapped()
    with pytest.raises(ValueError, match="has adapters already"):
        SaLoRA(model, ["4"], 10, r=2)


def test_an_unfrozen_head_is_among_the_weights():
    model, salora = wrapped()
    model[4].requires_grad_(True)
    assert any(p is model[4].weight for p in salora.param_groups(lr=1e-3)[0]["params"])


def test_a_triplet_too_large_for_what_is_left_makes_way_for_a_smaller_one():
    model = nn.Sequential(nn.Linear(4, 12), nn.Linear(4, 4))  # triplets of 16 and of 8
    salora = SaLoRA(model, ["0", "1"], 10, r=2, budget=0.5)  # room for 24 of 48
    with torch.no_grad():
        salora.log_theta.copy_(torch.tensor([[4.0, 3], [2, 1]]))
    assert salora.select().tolist() == [[True, False], [True, False]]


def test_an_optimiser_with_moments_of_another_shape_is_refused_at_the_first_step():
    class Factored(torch.optim.Adafactor):  # which takes `maximize`
        pass

    model, salora = wrapped(steps=4)
    with pytest.raises(RuntimeError, match="Factored keeps a state of another shape"):
        train(model, salora, 1, make=lambda groups: Factored(groups))


# ---- on a transformer


def test_average_gradients_does_nothing_in_a_single_process():
    model, salora = wrapped()
    optimizer = torch.optim.AdamW(salora.param_groups(1e-3))
    model(torch.ones(2, 10)).sum().backward()
    grad = salora.layers[0].lora_B.grad.clone()
    sl.average_gradients(optimizer)
    assert torch.equal(salora.layers[0].lora_B.grad, grad) and salora.log_theta.grad is None


def test_average_gradients_is_a_mean_over_processes(monkeypatch):
    monkeypatch.setattr(sl, "processes", lambda: 2)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda sums: sums.mul_(2))  # of equals
    model, salora = wrapped()
    optimizer = torch.optim.AdamW(salora.param_groups(1e-3))
    model(torch.ones(2, 10)).sum().backward()
    before = [layer.lora_B.grad.clone() for layer in salora.layers]
    sl.average_gradients(optimizer)
    assert all(torch.allclose(m.lora_B.grad, g) for m, g in zip(salora.layers, before))


def test_processes_that_do_not_average_are_told_in_the_window(monkeypatch):
    class Averages(torch.optim.AdamW):
        def step(self):
            sl.average_gradients(self)
            super().step()

    monkeypatch.setattr(sl, "processes", lambda: 2)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda sums: sums.mul_(2))
    with pytest.raises(RuntimeError, match="call average_gradients"):
        train(*wrapped(steps=20), 5)
    train(*wrapped(steps=20), 5, make=Averages)


def test_works_on_an_encoder_end_to_end():
    model = encoder()
    plain = copy.deepcopy(model).eval()
    salora = SaLoRA(model, model.target_paths("qkvoud"), 100, r=4, window=(0.2, 0.6))
    ids, y = torch.randint(2, 40, (16, 9)), torch.arange(16) % 2
    assert torch.allclose(model.eval()(ids), plain(ids), atol=1e-6)
    optimizer = torch.optim.AdamW(salora.param_groups(lr=1e-2))
    model.train()
    losses = []
    for _ in range(100):
        salora.begin_step()
        loss = F.cross_entropy(model(ids), y)
        (loss + salora.penalty()).backward()
        optimizer.step()
        salora.end_step(optimizer)
        optimizer.zero_grad()
        losses.append(loss.item())
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5]), losses[::9]
    assert salora.kept_params() <= 0.5 * salora.initial_params
    assert len(set(ranks(model).values())) > 1
    assert isinstance(model.roberta.encoder.layer[0].output.dense, SaLoRALinear)


def test_readme_shows_the_same_usage_example():
    readme = (Path(sl.__file__).parent / "README.md").read_text(encoding="utf-8")
    assert readme.split("```python\n")[1].split("```")[0].strip() == USAGE


# ---- what a step costs, in operators: on a GPU each is a kernel to launch


class Operators(bench.Operators):
    """Keeps, beside the count, the names of what would make a host wait for its GPU."""

    def __init__(self):
        super().__init__()
        self.waits = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in (torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero,
                                   torch.ops.aten.equal):
            self.waits.append(str(func))
        return super().__torch_dispatch__(func, types, args, kwargs)


def operators(layers, **kw):
    model = Encoder(EncoderConfig(
        "roberta", vocab_size=40, hidden_size=32, num_hidden_layers=layers, num_attention_heads=4,
        intermediate_size=64, max_position_embeddings=20, type_vocab_size=1), num_labels=2)
    salora = SaLoRA(model, model.target_paths("qkvoud"), 10, r=4, **kw)
    optimizer = torch.optim.AdamW(salora.param_groups(1e-3), fused=True)
    ids, y = torch.randint(2, 40, (4, 9)), torch.tensor([0, 1, 1, 0])
    # the last one is counted: the optimizer's state is there, and the window is open
    for _ in range(3):
        with Operators() as seen:
            salora.begin_step()
            (F.cross_entropy(model(ids), y) + salora.penalty()).backward()
            optimizer.step()
            salora.end_step(optimizer)
            optimizer.zero_grad()
    return seen


def test_gates_cost_a_few_operators_a_layer_and_no_wait():
    lora = [operators(layers, window=None) for layers in (2, 4)]
    salora = [operators(layers, window=(0.1, 0.9)) for layers in (2, 4)]
    assert not lora[1].waits and not salora[1].waits
    extra = [b.count - a.count for a, b in zip(lora, salora)]
    assert extra[1] - extra[0] <= 12 * 12 and extra[0] <= 200
