"""Equations 7 and 8: each gate formula against a second, independent way to get the number."""

import math

import numpy as np
import pytest
import torch

from salora import GAMMA, TAU, ZETA, deterministic_gates, open_probability, sample_gates

LOG_THETAS = [-4.0, -1.0, 0.0, 0.7, 3.0]


def draws(log_theta, n=400_000):
    u = torch.rand(n, generator=torch.Generator().manual_seed(0))
    return sample_gates(torch.full((n,), log_theta), u).double()


def test_constants_of_the_paper():
    assert (TAU, GAMMA, ZETA) == (1.0, -0.1, 1.1)


def test_sample_is_equation_7_as_printed():
    u = torch.tensor([0.01, 0.2, 0.5, 0.8, 0.99])
    got = sample_gates(torch.tensor([-2.0, 1.0, 0.3, 0.0, 2.0]), u)
    for g, ui, lt in zip(got.tolist(), u.tolist(), [-2.0, 1.0, 0.3, 0.0, 2.0]):
        s = 1 / (1 + math.exp(-(math.log(ui) - math.log(1 - ui) + lt) / TAU))
        s = s * (ZETA - GAMMA) + GAMMA
        assert g == pytest.approx(min(1, max(0, s)), abs=1e-6)


@pytest.mark.parametrize("log_theta", LOG_THETAS)
def test_open_probability_is_the_frequency_of_open_gates(log_theta):
    p = open_probability(torch.tensor(log_theta)).item()
    expected = 1 / (1 + math.exp(-(log_theta - TAU * math.log(-GAMMA / ZETA))))
    assert p == pytest.approx(expected, abs=1e-6)
    frequency = (draws(log_theta) > 0).double().mean().item()
    assert frequency == pytest.approx(p, abs=5 * math.sqrt(p * (1 - p) / 400_000) + 1e-6)


@pytest.mark.parametrize("log_theta", LOG_THETAS)
def test_mean_gate_is_the_integral_over_u(log_theta):
    u = (np.arange(1_000_000) + 0.5) / 1_000_000
    s = 1 / (1 + np.exp(-(np.log(u) - np.log1p(-u) + log_theta) / TAU)) * (ZETA - GAMMA) + GAMMA
    assert draws(log_theta).mean().item() == pytest.approx(np.clip(s, 0, 1).mean(), abs=3e-3)


def test_both_ends_are_reached_exactly_and_have_a_closed_form():
    g = draws(0.0)
    # s >= 1 where sigmoid(logit u) = u >= (1 - gamma) / (zeta - gamma),
    # s <= 0 where u <= -gamma / (zeta - gamma)
    top = 1 - (1 - GAMMA) / (ZETA - GAMMA)
    assert (g == 1).double().mean().item() == pytest.approx(top, abs=2e-3)
    assert (g == 0).double().mean().item() == pytest.approx(-GAMMA / (ZETA - GAMMA), abs=2e-3)


def test_starts_at_the_density_of_the_paper():
    p = open_probability(torch.zeros(())).item()
    assert p == pytest.approx(11 / 12, abs=1e-6)  # sigmoid(log 11) = 0.9167


def test_deterministic_gate_is_the_gate_at_the_median_noise_and_opens_at_even_odds():
    log_theta = torch.linspace(-5, 5, 101)
    gates, median = deterministic_gates(log_theta), torch.full((101,), 0.5)
    assert torch.allclose(gates, sample_gates(log_theta, median), atol=1e-6)
    assert torch.equal(gates > 0, open_probability(log_theta) > 0.5)  # equivalent at tau = 1


def test_gradient_is_the_slope_between_the_ends_and_zero_at_them():
    u = torch.tensor([0.001, 0.3, 0.5, 0.7, 0.999], dtype=torch.float64)
    log_theta = torch.tensor([0.0, -0.5, 0.0, 0.5, 0.0], dtype=torch.float64, requires_grad=True)
    sample_gates(log_theta, u).sum().backward()
    e = 1e-6
    at = log_theta.detach()
    slope = (sample_gates(at + e, u) - sample_gates(at - e, u)) / (2 * e)
    assert torch.allclose(log_theta.grad, slope, atol=1e-8)
    assert log_theta.grad[0] == 0 and log_theta.grad[-1] == 0 and (log_theta.grad[1:-1] > 0.1).all()


def test_noise_of_exactly_zero_gives_a_closed_gate_and_a_finite_gradient():
    log_theta = torch.zeros(1, requires_grad=True)
    g = sample_gates(log_theta, torch.zeros(1))  # torch.rand can return 0, never 1
    g.backward()
    assert g.item() == 0 and log_theta.grad.item() == 0
