"""
SaLoRA, structure-aware low-rank adaptation: LoRA that learns the rank of every matrix.
Hu et al., Structure-Aware Low-Rank Adaptation for Parameter-Efficient Fine-Tuning, Mathematics 2023, 11(20), 4317.

A frozen weight W (d x k) gets a low-rank update B diag(g) A with A (r x k), B (d x r). Each of its r rank-one pieces, a
triplet (row of A, gate, column of B), has a random gate g in [0, 1] that can be exactly 0 and still has a gradient:

    h = W x + (alpha/r) B diag(g) A x                                                                        (eq. 3, 5)
    g = min(1, max(0, s)),  s = sigmoid((log u - log(1-u) + log theta) / tau) (zeta - gamma) + gamma,  u ~ U(0,1)    (7)
    P(g > 0) = sigmoid(log theta - tau log(-gamma / zeta))                                                           (8)
    R_orth = |B'B - I|^2 + |AA' - I|^2, so that the triplets of a matrix learn different things                      (9)
    loss + lambda sum_i E|G_i|_0 + beta R_orth: lambda is a constant, the price of an open gate                     (10)
    C = sum_i E|G_i|_0 (d_i + k_i) / sum_i (#A_i + #B_i): share of adapter parameters expected to stay              (11)
    max_lambda min_(A,B,theta) loss + beta R_orth + lambda (C - b)^2: lambda steers C to the budget b               (12)

A' is A transposed; #A is the number of elements of A; |G_i|_0 is the number of open gates of matrix i, and its expectation
E|G_i|_0 the sum of (8) over them; tau = 1, gamma = -0.1, zeta = 1.1. (12) is the default, (10) the alternative. The paper sums
R_orth over all A and B; the default here is its mean.

In a window of the run the gates are drawn and learned; at its end the triplets that lost are cut out of the tensors. Before
and after it the layer is plain LoRA (R_orth is in the loss throughout). What is not in the paper: drawn gates are about 0.5
when the window opens, so they would halve the update, and add noise, just when most is learned. By default A and B are
therefore trained with gates of 1, and the draw gives log theta its gradient and nothing else (straight_through).

Adapters have PEFT's format. From the shell, with models in Hugging Face's layout:

    python salora.py merge --model DIR --adapter DIR --out DIR    # a plain model folder, with an adapter in its weights
    python salora.py show ADAPTER                                 # ranks, parameters and budget of one

The lines with `salora` are all that a training loop has to know:

    salora = SaLoRA(model, targets=["up", "down"], r=8, budget=0.5)
    optimizer = torch.optim.AdamW(salora.param_groups(lr=1e-3, gate_lr=0.2))
    for step in range(steps):
        salora.begin_step(step / steps, optimizer)
        loss = F.cross_entropy(model(x), y) + salora.penalty()
        loss.backward()
        optimizer.step()
        salora.end_step()
        optimizer.zero_grad()
    save(model, "adapter", budget=salora.budget)
"""

import argparse
import io
import json
import math
import os
import re
import shutil
import sys
import tempfile
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

__all__ = ["SaLoRA", "average_gradients", "ranks", "rank_map", "merge", "save", "load", "merge_folder", "show"]

# ---------------------------------------------------------------------------------------------------------------------
# the hard-concrete gate (Louizos et al. 2018): a sigmoid stretched to (gamma, zeta) and clipped to [0, 1]

TAU, GAMMA, ZETA = 1.0, -0.1, 1.1


def sample_gates(log_theta, u):
    """Random gates in [0, 1] from uniform noise u, element by element, differentiable in log_theta."""
    s = torch.sigmoid((torch.logit(u) + log_theta) / TAU) * (ZETA - GAMMA) + GAMMA  # eq. 7
    return s.clamp(0, 1)


def open_probability(log_theta):
    """P(g > 0) for each element of log_theta; its sum is the expected number of open gates, E|G|_0."""
    return torch.sigmoid(log_theta - TAU * math.log(-GAMMA / ZETA))  # eq. 8


def deterministic_gates(log_theta):
    """The gates without noise, in [0, 1]: for selection="paper", fold_gates, and evaluation without straight_through."""
    return (torch.sigmoid(log_theta) * (ZETA - GAMMA) + GAMMA).clamp(0, 1)


# ---------------------------------------------------------------------------------------------------------------------
# the layer


class SaLoRALinear(nn.Module):
    """h = W x + (alpha/r) B diag(g) A x around an nn.Linear.

    A is Gaussian and B zero, so the first step sees the pretrained model. A and B are float32 whatever W is; the product is
    computed in W's dtype. Outside the window all gates are 1. Inside it they have the value 1 and the gradient of the step's
    draw; or, without SaLoRA's straight_through, they are the draw in train() and, as with dropout, without noise in eval()."""

    def __init__(self, base, r, scale):
        super().__init__()
        d, k, device = base.out_features, base.in_features, base.weight.device
        self.base = base
        self.lora_A = nn.Parameter(torch.randn(r, k, device=device) / math.sqrt(k))  # (r, k), rows of about unit norm
        self.lora_B = nn.Parameter(torch.zeros(r, d, device=device).mT)  # (d, r), column by column in memory: a faster backward
        self.r, self.scale = r, scale  # at the start: the scale alpha / r stays when the rank falls
        self.drawn = None  # inside a step of the window: A and B diag(g), as SaLoRA.draw computes them for all layers at once
        self.gates = None  # inside the window, without straight_through: (r,), without noise

    # its parameters, and what is left of them when triplets go (AdaLoRA has a third); B stays column by column in memory
    cuts = dict(lora_A=lambda t, keep: t[keep], lora_B=lambda t, keep: t.mT[keep].mT)

    @property
    def rank(self):
        return self.lora_A.shape[0]

    def forward(self, x):
        h = self.base(x)  # (.., d)
        if self.rank == 0:
            return h
        a, b = self.drawn if self.training and self.drawn else self.matrices()
        z = F.linear(x, a.to(x.dtype))  # (.., r)
        h2, z2 = h.reshape(-1, h.shape[-1]), z.reshape(-1, z.shape[-1])  # (n, d), (n, r): addmm multiplies, scales and adds in one go
        return torch.addmm(h2, z2, b.mT.to(z.dtype), alpha=self.scale).view_as(h)  # eq. 3, 5

    def matrices(self):
        """A (r, k) and B diag(g) (d, r), without noise."""
        return self.lora_A, self.lora_B if self.gates is None else self.lora_B * self.gates

    @torch.no_grad()
    def prune(self, keep, fold=None, optimizer=None):
        """Cuts A and B down to the triplets that `keep` (r,) names; fold (r,) multiplies B's columns first. New, smaller
        Parameters take the places of the old ones, in `optimizer` too, where the moments of the kept triplets stay."""
        self.drawn = self.gates = None
        if fold is not None:
            self.lora_B.mul_(fold)
        for name, cut in self.cuts.items():
            old = getattr(self, name)
            state = optimizer.state.get(old, {}) if optimizer else {}
            moments = {key: t for key, t in state.items() if torch.is_tensor(t) and t.dim()}  # the rest are numbers, such as AdamW's step
            if any(t.shape != old.shape for t in moments.values()):
                raise ValueError(f"{type(optimizer).__name__} keeps state in another shape than the weights, "
                                 "which cannot be pruned: use AdamW or SGD")
            new = nn.Parameter(cut(old, keep))
            setattr(self, name, new)
            if optimizer:
                for group in optimizer.param_groups:
                    group["params"] = [new if p is old else p for p in group["params"]]
                optimizer.state.pop(old, None)
            if state:
                optimizer.state[new] = state | {key: cut(t, keep) for key, t in moments.items()}


def linears_of(model):
    return {path: m for path, m in model.named_modules() if isinstance(m, nn.Linear)}


def find(linears, targets):
    """Of {module path: anything}, in its order, those whose path equals a target or ends in "." + it. ValueError: one matches nothing."""
    found = set()
    for target in targets:
        hits = [path for path in linears if path == target or path.endswith("." + target)]
        if not hits:
            names = ", ".join(sorted({path.split(".")[-1] for path in linears})) or "(there are none)"
            raise ValueError(f"target {target!r} matches no nn.Linear of the model; their names end in: {names}")
        found.update(hits)
    return {path: m for path, m in linears.items() if path in found}


def replace(model, path, module):
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)


def adapters(model):
    """{module path: SaLoRALinear} in the model's order."""
    return {path: m for path, m in model.named_modules() if isinstance(m, SaLoRALinear)}


def adapt(model, targets, r, alpha=None, kind=SaLoRALinear):
    """Freezes `model` and puts a layer of that kind around every target; returns these layers. ValueError: a target that matches
    nothing, an r that does not fit, a model that has adapters already."""
    if adapters(model):
        raise ValueError("the model has adapters already: merge them first, or go on with them (targets=None)")
    linears = find(linears_of(model), [targets] if isinstance(targets, str) else targets)
    if not linears:
        raise ValueError("targets is empty")
    for path, m in linears.items():
        most = min(m.in_features, m.out_features)
        if not 1 <= r <= most:
            raise ValueError(f"r is {r}, but {path} is {m.out_features} x {m.in_features}: expected 1 to {most}")
    model.requires_grad_(False)
    for path, m in linears.items():
        replace(model, path, kind(m, r, (r if alpha is None else alpha) / r))
    return list(adapters(model).values())


# ---------------------------------------------------------------------------------------------------------------------
# the method


class SaLoRA:
    """Puts a SaLoRALinear around every target in `model` (in place, everything else is frozen) and steers their gates.
    Bring the model to its device and dtype first; unfreeze what else should learn, such as a new head, afterwards.

        targets           names of nn.Linear modules: full paths, or their last parts ("query", "attention.output.dense"). None: go
                          on with the adapters that load() has put in, with their r and scale; gates need one r for all of them
        r, alpha          the rank at the start; the update is scaled by alpha/r (alpha = r unless given)
        budget            b, the share of adapter parameters to keep, in (0, 1]
        beta              weight of R_orth: of its mean over the 2K matrices A and B, or of its sum (orth_reduction="sum",
                          the letter of eq. 9, which makes B orthonormal in a few hundred steps whatever the task says)
        window            the part of the run, as fractions, in which gates are learned; None: never (with beta=0, plain LoRA)
        price             a constant lambda: eq. 10 instead of eq. 12, no budget is steered to
        selection         what stays at the end of the window. "budget": the triplets of largest log theta that fit into b,
                          never more; "paper": those with a deterministic gate above 0, however many. Default: "budget",
                          with a price "paper"
        straight_through  in the window, A and B learn with gates of 1 and log theta with the gradient of the drawn ones;
                          False: both see the drawn gates, the letter of eq. 3
        fold_gates        multiply a kept gate's value into B; the default sets it to 1
        seed              of the gates' own random generator: equal seeds draw equal gates whatever else is random

    ValueError: a target that matches nothing, a setting out of its range, a model that has adapters already, or has none to go
    on with."""

    def __init__(self, model, targets, r=8, alpha=None, budget=0.5, beta=0.01, window=(0.2, 0.5), orth_reduction="mean",
                 price=None, selection=None, straight_through=True, fold_gates=False, seed=0):
        selection = selection or ("budget" if price is None else "paper")
        if not 0 < budget <= 1:
            raise ValueError(f"budget is {budget}, expected a share in (0, 1]")
        if window is not None and not 0 <= window[0] < window[1] <= 1:
            raise ValueError(f"window is {window}, expected two fractions of the run, 0 <= start < end <= 1")
        for name, value in dict(beta=beta, price=price).items():
            if value is not None and not 0 <= value < math.inf:
                raise ValueError(f"{name} is {value}, expected a number from 0")
        if alpha is not None and not 0 < alpha < math.inf:
            raise ValueError(f"alpha is {alpha}, expected a positive number")
        if orth_reduction not in ("mean", "sum") or selection not in ("budget", "paper"):
            raise ValueError(f"orth_reduction {orth_reduction!r} is mean or sum, selection {selection!r} is budget or paper")
        layers = list(adapters(model).values()) if targets is None else adapt(model, targets, r, alpha)
        if not layers:
            raise ValueError("targets is None, and the model has no adapters to go on with")
        found = {m.rank for m in layers}
        if window is not None and len(found) > 1:
            raise ValueError(f"the adapters have ranks {min(found)} to {max(found)}, and gates need one for all: go on with window=None")
        self.widths = {}  # width n: the layers with k = n, whose A has it, and those with d = n, whose B' has it
        for m in layers:
            self.widths.setdefault(m.lora_B.shape[0], ([], []))[1].append(m)
            self.widths.setdefault(m.lora_A.shape[1], ([], []))[0].append(m)
        # in the order of draw(): layers with one d stand together, so that the gates of their B' are one slice of log_theta
        self.model, self.layers = model, [m for _, of_b in self.widths.values() for m in of_b]
        self.budget, self.beta, self.window, self.orth_reduction = budget, beta, window, orth_reduction
        self.price, self.selection, self.straight_through, self.fold_gates = price, selection, straight_through, fold_gates
        self.open = self.pruned = False
        self.progress = self.noise = None  # inside a step of the window: where it is, and what its gates are drawn from
        self.stacks = []  # inside a step of the window: all A and B' in a few tensors (count, r, n)
        self.final_density = None  # C at the end of the window

        # All gates in one tensor: one draw and one update for the whole model, however many layers it has.
        device = self.layers[0].lora_A.device
        self.log_theta = nn.Parameter(torch.zeros(len(self.layers), max(found), device=device))  # (K, r), a row for each of self.layers
        self.lam = nn.Parameter(torch.zeros((), device=device))  # lambda, the Lagrange multiplier
        self.size = torch.tensor([m.lora_A.shape[1] + m.lora_B.shape[0] for m in self.layers], device=device)  # (K,) d + k
        self.initial_params = self.kept_params()
        self.generator = torch.Generator("cpu" if device.type == "meta" else device).manual_seed(seed)

    def param_groups(self, lr, gate_lr=0.2, weight_decay=0.01):
        """Three groups for any torch optimiser that knows `maximize`: all that is trainable in the model; log theta; lambda, which
        climbs where the others descend. gate_lr must let log theta travel several units within the window: 0.2 suits windows of
        160 steps and more, min(1, 32 / steps in the window) shorter ones."""
        weights = [p for p in self.model.parameters() if p.requires_grad]
        return [dict(params=weights, lr=lr, weight_decay=weight_decay),
                dict(params=[self.log_theta], lr=gate_lr, weight_decay=0.0),
                dict(params=[self.lam], lr=gate_lr, weight_decay=0.0, maximize=True)]

    def begin_step(self, progress, optimizer):
        """First line of a step; progress = step / steps. Inside the window it draws the step's gates, one draw for the whole
        batch; at its end it prunes, also in `optimizer`, which must hold the groups. A window that ends at 1 needs a last call
        with progress 1 after the loop, or nothing is pruned. With gradient accumulation call it before each forward pass (the
        same progress means the same draw until end_step()), and add penalty() to one of the losses only."""
        if self.window is None or self.pruned:
            return
        start, end = self.window
        self.open = start <= progress < end
        if progress >= end:
            self.prune(optimizer)
        if self.open:
            if self.noise is None or progress != self.progress:
                self.progress = progress
                self.noise = torch.rand(self.log_theta.shape, generator=self.generator, device=self.log_theta.device)
            self.draw()

    def draw(self):
        """The step's gates, and with them A and B diag(g) of every layer. All A and B' of one width are stacked: gates and
        regulariser then cost a fixed number of operators, however many layers there are."""
        gates = sample_gates(self.log_theta, self.noise)  # (K, r)
        if self.straight_through:
            gates = 1 + (gates - gates.detach())  # the value of plain LoRA, the gradient of the draw
        self.stacks, drawn_a, drawn_b = [], {}, {}
        counts = [len(of_b) for _, of_b in self.widths.values()]
        for (of_a, of_b), g in zip(self.widths.values(), gates.split(counts)):  # g (count, r)
            stack = torch.stack([m.lora_A for m in of_a] + [m.lora_B.mT for m in of_b])  # (count, r, n)
            a, b = stack.split([len(of_a), len(of_b)])
            drawn_a |= zip(of_a, a)
            drawn_b |= zip(of_b, (b * g.unsqueeze(2)).mT)  # eq. 5: B diag(g)
            self.stacks.append(stack)
        for layer in self.layers:
            layer.drawn = drawn_a[layer], drawn_b[layer]

    def penalty(self):
        """What is added to the task's loss: the regulariser, and inside the window the price of the gates."""
        total, live = self.lam.new_zeros(()), [m for m in self.layers if m.rank]
        if self.beta and live:
            orth = gram_error(self.stacks or stack_by_shape([m.lora_A for m in live] + [m.lora_B.mT for m in live]))
            total = total + self.beta * orth / (2 * len(live) if self.orth_reduction == "mean" else 1)
        if self.open and self.price is not None:
            total = total + self.price * open_probability(self.log_theta).sum()  # eq. 10
        elif self.open:
            total = total + self.lam * (self.density() - self.budget) ** 2  # eq. 12
        return total

    @torch.no_grad()
    def end_step(self):
        """Last line of a step, after the optimiser's: forgets the draw, and projects lambda to >= 0, as the paper has it; its
        gradient (C - b)^2 is never negative, so it does not fall by itself."""
        self.lam.clamp_(min=0)
        self.noise, self.stacks = None, []
        for layer in self.layers:
            layer.drawn = None
        if self.open and not self.straight_through:
            for layer, g in zip(self.layers, deterministic_gates(self.log_theta)):
                layer.gates = g

    def density(self):
        """C, the share of adapter parameters expected to stay: a differentiable scalar. Without gates, the share that is there."""
        if self.pruned or self.window is None:
            return self.lam.new_tensor(self.kept_params() / self.initial_params)
        return (open_probability(self.log_theta).sum(1) * self.size).sum() / self.initial_params  # eq. 11

    def orthogonality(self):
        """|AA' - I|^2 and |B'B - I|^2 (two scalars), each the mean over the matrices that have a rank left."""
        return orthogonality(self.layers)

    def kept_params(self):
        """Number of adapter parameters now in the model."""
        return sum(p.numel() for m in self.layers for p in m.parameters(recurse=False))

    def state_dict(self):
        """What a checkpoint needs besides the model's parameters and the optimiser's state: a flat dict of tensors and plain values."""
        return dict(log_theta=self.log_theta.detach().clone(), lam=self.lam.detach().clone(), generator=self.generator.get_state(),
                    pruned=self.pruned, final_density=self.final_density)

    @torch.no_grad()
    def load_state_dict(self, state):
        """Takes over what state_dict() gave. The model's parameters, in the shapes they were saved in, are the caller's business."""
        self.log_theta.copy_(state["log_theta"])
        self.lam.copy_(state["lam"])
        self.generator.set_state(state["generator"])
        self.pruned, self.final_density = state["pruned"], state["final_density"]

    @torch.no_grad()
    def select(self):
        """(K, r) bool: which triplets stay."""
        if self.selection == "paper":
            return deterministic_gates(self.log_theta) > 0
        keep = torch.zeros(self.log_theta.numel(), dtype=torch.bool)
        room = int(self.budget * self.initial_params + 1e-6)  # the margin is for products such as 0.29 * 100 = 28.999..
        order = self.log_theta.flatten().argsort(descending=True, stable=True)
        sizes = self.size.repeat_interleave(self.log_theta.shape[1])[order]
        for i, size in zip(order.tolist(), sizes.tolist()):
            if size <= room:  # a triplet too large for what is left makes way for a smaller one
                keep[i], room = True, room - size
        return keep.view_as(self.log_theta).to(self.log_theta.device)

    @torch.no_grad()
    def prune(self, optimizer=None):
        """Ends the window: selects, and cuts the other triplets out of A, B and the optimiser's state. ValueError if there was
        no step in it, so that all gates are still equal."""
        if not self.log_theta.any():
            raise ValueError(f"window {self.window} held no step, so no gate has been learned: widen it or train longer")
        self.final_density = self.density().item()  # C as the gates left it, before the selection
        fold = deterministic_gates(self.log_theta) if self.fold_gates else [None] * len(self.layers)
        for layer, keep, g in zip(self.layers, self.select(), fold):
            layer.prune(keep, g, optimizer)
        for param in (self.log_theta, self.lam):  # without a gradient an optimiser leaves them alone
            param.grad = None
            if optimizer is not None:
                optimizer.state.pop(param, None)
        self.open, self.pruned = False, True


def stack_by_shape(matrices):
    """[(count, r, n) ..]: the matrices (r_i, n_i) in one tensor for each shape."""
    shapes = {}
    for m in matrices:
        shapes.setdefault(m.shape, []).append(m)
    return [torch.stack(group) for group in shapes.values()]


def gram_error(stacks):
    """The sum of |MM' - I|^2 over all M (r, n) in a list of stacked ones (count, r, n): a scalar, one batched product a stack."""
    return sum(GramError.apply(m) for m in stacks)


def orthogonality(layers):
    """|AA' - I|^2 and |B'B - I|^2 (two scalars), each the mean over the layers that have a rank left."""
    live = [m for m in layers if m.rank]
    if not live:
        return torch.zeros(2)
    return tuple(gram_error(stack_by_shape(m)) / len(live) for m in ([m.lora_A for m in live], [m.lora_B.mT for m in live]))


class GramError(torch.autograd.Function):
    """The sum of |MM' - I|^2 over M (count, r, n). Written out, its gradient is one product; autograd would take two."""

    @staticmethod
    def forward(ctx, m):
        error = m @ m.mT - torch.eye(m.shape[1], device=m.device)  # (count, r, r), symmetric
        ctx.save_for_backward(error, m)
        return error.square().sum()  # eq. 9

    @staticmethod
    def backward(ctx, grad):
        error, m = ctx.saved_tensors
        return (4 * grad * error) @ m  # (count, r, n): d|E|^2 = 2 <E, dM M' + M dM'> = 4 <E M, dM>


def average_gradients(optimizer):
    """With several processes on one batch, between backward() and the optimiser's step: every gradient becomes its mean over
    the processes, in one message. Also under DistributedDataParallel, which does not know log theta. Build SaLoRA with one seed
    everywhere, and all processes draw and keep the same gates. Does nothing in a single process."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return
    grads = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    flat = torch.cat([grad.flatten() for grad in grads]) / torch.distributed.get_world_size()
    torch.distributed.all_reduce(flat)
    for grad, mean in zip(grads, flat.split([grad.numel() for grad in grads])):
        grad.copy_(mean.view_as(grad))


# ---------------------------------------------------------------------------------------------------------------------
# what comes out: ranks, a merged model, an adapter folder in the format of Hugging Face's PEFT


def ranks(model):
    """{module path: rank}, rank 0 included."""
    return {path: m.rank for path, m in adapters(model).items()}


def rank_map(table, r):
    """The ranks {module path: rank} out of r as text: a row for each kind of module, a column for each layer (the first
    number in a path)."""
    rows, columns = {}, []
    for path, rank in table.items():
        parts = path.split(".")
        at = next((i for i, part in enumerate(parts) if part.isdigit()), len(parts))
        stack, column, module = ".".join(parts[:at]), "".join(parts[at:at + 1]), ".".join(parts[at + 1:])
        if column not in columns:
            columns.append(column)
        rows.setdefault((stack, module) if module else (path, ""), {})[column] = rank
    alone = len({stack for stack, module in rows if module}) == 1  # no need to name it
    names = {key: key[1] if alone and key[1] else ".".join(filter(None, key)) for key in rows}
    width = max(map(len, names.values()), default=0)
    lines = [" " * width + "".join(f"{column:>4}" for column in columns)]
    for key, cells in rows.items():
        bars = {column: " ▁▂▃▄▅▆▇█"[math.ceil(8 * min(rank / r, 1))] for column, rank in cells.items()}
        text = "".join(f"{cells[column]:>3}{bars[column]}" if column in cells else "    " for column in columns)
        lines.append(f"{names[key]:<{width}}{text}")
    return "\n".join(line.rstrip() for line in lines)


def updated(weight, scale, a, b):
    """weight + scale B A, summed in float32, in the dtype of weight."""
    return (weight.float() + scale * b.float() @ a.float()).to(weight.dtype)


@torch.no_grad()
def merge(model):
    """Adds every update to its weight, in float32, and puts the plain nn.Linear back in place. Returns the model."""
    for path, layer in adapters(model).items():
        a, b = layer.matrices()
        weight = layer.base.weight  # a new tensor takes its place: the old one may be tied to another module
        layer.base.weight = nn.Parameter(updated(weight, layer.scale, a, b), weight.requires_grad)
        replace(model, path, layer.base)
    return model


def within(name, modules):
    """Is a parameter of that name inside one of the modules?"""
    return any(f".{m}." in f".{name}" for m in modules or ())


def save(model, folder, modules_to_save=(), budget=None, **config):
    """Writes adapter_config.json and adapter_model.safetensors, which PEFT loads: gate and scale are folded into B. Matrices of
    rank 0, which PEFT does not know, are left out. Two of them get one triplet of zeros instead: the smallest, where nothing else
    is left; and one whose path ends in the path of another ("b.q" beside "q": naming q would adapt both). Beside them
    salora.json, for show(): `budget`, all ranks, and the first one.

        modules_to_save    names of modules whose parameters go along whole (a head: "classifier")
        config             further entries, such as base_model_name_or_path or task_type

    ValueError: a module to save that is not there, or has an adapter in it."""
    from safetensors.torch import save_file
    layers, tensors, table = adapters(model), {}, {}
    for path in layers:
        if within(f"{path}.weight", modules_to_save):
            raise ValueError(f"modules_to_save covers {path}, which has an adapter: merge it first, or do not target it")
    live = [path for path, m in layers.items() if m.rank]
    zeros = [path for path in layers if path not in live and any(path.endswith("." + end) for end in live)]  # PEFT would adapt it too
    if layers and not live:
        zeros = [min(layers, key=lambda path: layers[path].base.weight.numel())]
    for path in sorted(live + zeros, key=len, reverse=True):  # PEFT takes the first pattern that fits the end of a path
        (a, b), (d, k) = layers[path].matrices(), layers[path].base.weight.shape
        if path in zeros:
            a, b = torch.zeros(1, k), torch.zeros(d, 1)
        tensors[f"{path}.lora_A.weight"], tensors[f"{path}.lora_B.weight"] = a, layers[path].scale * b
        table[path] = a.shape[0]
    for m in modules_to_save:
        inside = {name: p for name, p in model.named_parameters() if within(name, [m])}
        if not inside:
            raise ValueError(f"modules_to_save names {m!r}, and the model has no parameters in a module of that name")
        tensors |= inside
    tensors = {f"base_model.model.{name}": t.detach().float().cpu().contiguous() for name, t in tensors.items()}
    r = max(table.values(), default=1)
    pattern = table if set(table.values()) != {r} else {}
    settings = dict(
        peft_type="LORA", r=r, lora_alpha=r, rank_pattern=pattern, alpha_pattern=pattern,
        target_modules=[path for path in layers if path in table],
        modules_to_save=list(modules_to_save) or None, bias="none", lora_dropout=0.0, fan_in_fan_out=False, inference_mode=True,
        **config)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    known = dict(r=max((m.r for m in layers.values()), default=0), budget=budget, ranks=ranks(model))
    save_file(tensors, folder / "adapter_model.safetensors.new", metadata={"format": "pt"})
    # two files: PEFT warns of settings that it does not know, not of files
    for name, value in (("adapter_config.json", settings), ("salora.json", known)):
        (folder / f"{name}.new").write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    shutil.copymode(folder / "salora.json.new", folder / "adapter_model.safetensors.new")  # save_file lets nobody else read it
    for name in ("salora.json", "adapter_model.safetensors", "adapter_config.json"):  # written beside, then renamed: never half a file
        os.replace(folder / f"{name}.new", folder / name)


IMPLEMENTED = dict(  # what an adapter_config.json may say
    peft_type=["LORA"], bias=["none"], fan_in_fan_out=[False],
    init_lora_weights=[True, False, "gaussian", "orthogonal", "eva"])  # the other ways to start change the base weights
READ = {"r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "target_modules", "modules_to_save"}
OF_NO_EFFECT = {"base_model_name_or_path", "task_type", "inference_mode", "auto_mapping", "revision", "peft_version", "lora_dropout",
                "megatron_core", "qalora_group_size", "runtime_config", "eva_config"}


def read_json(file):
    """The object in a JSON file. ValueError: there is none in it."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as e:
        raise ValueError(f"{file}: cannot be read as JSON ({e})") from None
    if not isinstance(value, dict):
        raise ValueError(f"{file}: holds a {type(value).__name__}, expected an object")
    return value


def open_tensors(file):
    """The tensors of a file, not yet read. ValueError: it is no safetensors file."""
    from safetensors import SafetensorError, safe_open
    try:
        return safe_open(file, framework="pt")
    except SafetensorError as e:
        raise ValueError(f"{file}: not a readable safetensors file ({e})") from None


def read_adapter(folder):
    """(settings, {name: tensor}) of a folder in PEFT's LoRA format; names as in the model. ValueError: what is not
    implemented."""
    file = Path(folder) / "adapter_config.json"
    settings = read_json(file)
    for key, value in {"peft_type": None, **settings}.items():
        if key in IMPLEMENTED and value not in IMPLEMENTED[key]:
            raise ValueError(f"{file}: {key} is {value!r}, only {IMPLEMENTED[key][0]!r} is implemented")
        if key not in READ | OF_NO_EFFECT | IMPLEMENTED.keys() and value not in (None, False, [], {}):
            raise ValueError(f"{file}: {key} is {value!r}, which is not implemented")

    def rank(n):
        return type(n) is int and n > 0

    def alpha(n):
        return type(n) in (int, float) and 0 < n < math.inf

    def name(text):
        return isinstance(text, str)

    for key, kind, good, expected in (
            ("r", int, rank, "positive numbers"), ("rank_pattern", dict, rank, "positive numbers"),
            ("lora_alpha", (int, float), alpha, "positive numbers"), ("alpha_pattern", dict, alpha, "positive numbers"),
            ("target_modules", (list, str), name, "names"), ("modules_to_save", list, name, "names")):
        value = settings.get(key)
        if value is None and key in ("rank_pattern", "alpha_pattern", "modules_to_save"):
            continue
        parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else [value]
        if not isinstance(value, kind) or not all(map(good, parts)):
            raise ValueError(f"{file}: {key} is {repr(value)[:80]}, expected {expected}")
    with open_tensors(Path(folder) / "adapter_model.safetensors") as f:
        return settings, {key.removeprefix("base_model.model."): f.get_tensor(key) for key in f.keys()}


def as_regex(pattern, end=False):
    """A pattern of an adapter_config.json, compiled: it has to fit a whole module path, or its end. ValueError: it is no regular
    expression, or one that could take forever, as a stranger might send it: with backreferences, a repeated group, many groups
    or repetitions."""
    bare = re.sub(r"\\\D|\[[^\]]*\]", "x", pattern)  # each escape or class of characters is one x
    backreference, repeated_group = "\\" in bare, re.search(r"\)[*+?{]", bare)
    repetitions = len(re.findall(r"(?<!\()[*+?{]", bare))
    if len(pattern) > 1000 or backreference or repeated_group or repetitions > 3 or bare.count("(") > 3:
        raise ValueError(f"the pattern {pattern[:60]!r} is too intricate: name the modules instead")
    try:
        return re.compile(rf"(.*\.)?({pattern})" if end else pattern)
    except re.error as e:
        raise ValueError(f"the pattern {pattern[:60]!r} is no regular expression ({e})") from None


def match(settings, tensors, linears, saved):
    """{module path: (r, scale)} of the layers that an adapter changes. linears {module path: (d, k)}: those there are; saved
    {name: shape}: the parameters that are replaced whole. ValueError names a tensor that is missing, unexpected or misshapen, or
    a setting that fits nothing."""
    targets = settings["target_modules"]
    whole = settings.get("modules_to_save")  # no adapter in there, even if a target says so
    free = {path: size for path, size in linears.items() if not within(f"{path}.weight", whole)}
    if isinstance(targets, str):
        regex = as_regex(targets)
        chosen = {path: size for path, size in free.items() if regex.fullmatch(path)}
        if not chosen:
            raise ValueError(f"target_modules {targets!r} matches no nn.Linear of the model")
    else:
        chosen = find(free, [target for target in targets if not within(f"{target}.weight", whole)])

    def values(name):
        """{module path: value}: the first pattern that fits counts."""
        found = {}
        for pattern, value in (settings.get(name) or {}).items():
            regex = as_regex(pattern, end=True)
            hits = [path for path in chosen if regex.fullmatch(path)]
            if not hits:
                raise ValueError(f"{name} names {pattern!r}, which is no target module")
            found = dict.fromkeys(hits, value) | found
        return found

    ranks_of, alphas_of, wanted, layers = values("rank_pattern"), values("alpha_pattern"), dict(saved), {}
    for path, (d, k) in chosen.items():
        r, alpha = ranks_of.get(path, settings["r"]), alphas_of.get(path, settings["lora_alpha"])
        wanted[f"{path}.lora_A.weight"], wanted[f"{path}.lora_B.weight"] = (r, k), (d, r)
        layers[path] = r, alpha / (math.sqrt(r) if settings.get("use_rslora") else r)
    for key in wanted | tensors:
        if key not in tensors or key not in wanted or tuple(tensors[key].shape) != tuple(wanted[key]):
            got = list(tensors[key].shape) if key in tensors else "nothing"
            expected = list(wanted[key]) if key in wanted else "nothing"
            raise ValueError(f"adapter_model.safetensors: {key}: expected {expected}, found {got}")
    return layers


def load(model, folder):
    """Puts the adapter of a folder in PEFT's LoRA format into `model` (in place; A, B and the saved modules are trainable, the
    rest is frozen) and returns the model. Strict: ValueError names a key that is missing, unexpected or misshapen, or a setting
    that is not implemented; the model is then as it was."""
    settings, tensors = read_adapter(folder)
    linears, params = linears_of(model), dict(model.named_parameters())
    saved = {name: p.shape for name, p in params.items() if within(name, settings.get("modules_to_save"))}
    tied = [id(p) for _, p in model.named_parameters(remove_duplicate=False)]
    try:
        for name in saved:
            if tied.count(id(params[name])) > 1:
                raise ValueError(f"modules_to_save has {name}, which is tied to another module: not implemented")
        layers = match(settings, tensors, {path: (m.out_features, m.in_features) for path, m in linears.items()}, saved)
    except ValueError as e:
        raise ValueError(f"{folder}: {e}") from None
    model.requires_grad_(False)
    with torch.no_grad():
        for path, (r, scale) in layers.items():
            layer = SaLoRALinear(linears[path], r, scale)
            layer.lora_A.copy_(tensors[f"{path}.lora_A.weight"])
            layer.lora_B.copy_(tensors[f"{path}.lora_B.weight"])
            replace(model, path, layer)
        for name in saved:
            params[name].requires_grad_(True).copy_(tensors[name])
    return model


# ---------------------------------------------------------------------------------------------------------------------
# from the shell: a model folder with the adapter in its weights; what an adapter holds


def read_index(model):
    """(files of the weights, the object in their index or None) of a model folder."""
    file = model / "model.safetensors.index.json"
    if not file.is_file():
        return ["model.safetensors"], None
    index = read_json(file)
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or any(Path(str(shard)).name != shard for shard in weight_map.values()):
        raise ValueError(f"{file}: weight_map does not list files of this folder")
    return sorted(set(weight_map.values())), index


def with_labels(config, outputs):
    """A config.json that says that the model is a classifier with so many outputs."""
    labels = config.get("id2label")
    if not isinstance(labels, dict) or len(labels) != outputs:
        labels = {str(i): f"LABEL_{i}" for i in range(outputs)}
    kinds = [re.sub(r"(Model|For\w+)$", "", name) + "ForSequenceClassification" for name in config.get("architectures") or []]
    return config | dict(id2label=labels, label2id={label: int(i) for i, label in labels.items()}, architectures=kinds)


def merge_folder(model, adapter, out):
    """Writes the folder `out`: a model folder in Hugging Face's layout (config.json, model.safetensors or its shards with their
    index, tokenizer) with an adapter in its weights. Each sum is taken in float32 and stored in the dtype of the weight. The
    modules that the adapter saved whole (a head) come along, and config.json then says how many labels there are. ValueError:
    `out` is there already, or adapter and model do not fit together; nothing is left behind."""
    from safetensors.torch import save_file
    model, out = Path(model), Path(out)
    if out.exists():
        raise ValueError(f"{out}: is there already, give another folder")
    settings, tensors = read_adapter(adapter)
    config, (files, index) = read_json(model / "config.json"), read_index(model)
    if config.get("quantization_config"):
        raise ValueError(f"{model}: its weights are quantised; merge into the ones before")
    shapes = {}
    for file in files:
        with open_tensors(model / file) as f:
            shapes |= {key: tuple(f.get_slice(key).get_shape()) for key in f.keys()}

    # a checkpoint of the bare model lacks the first part of all names
    saved = {name: t for name, t in tensors.items() if within(name, settings.get("modules_to_save"))}
    touched = [*saved, *(name.replace(".lora_A.", ".") for name in tensors if ".lora_A." in name)]
    prefix = next((name.split(".")[0] + "." for name in touched if name not in shapes and name.partition(".")[2] in shapes), "")

    def spelled(key):
        return key if key.startswith(prefix) else prefix + key

    shapes = {spelled(key): shape for key, shape in shapes.items()}
    linears = {name.removesuffix(".weight"): shape for name, shape in shapes.items() if name.endswith(".weight") and len(shape) == 2}
    # a head may have another number of labels than the model's
    heads = ("classifier.weight", "classifier.bias", "out_proj.weight", "out_proj.bias", "score.weight")
    wanted = {name: t.shape if name.endswith(heads) else shapes.get(name, t.shape) for name, t in saved.items()}
    try:
        if config.get("tie_word_embeddings") and any(name.endswith(("embed_tokens.weight", "lm_head.weight")) for name in saved):
            raise ValueError("modules_to_save has an embedding that is tied to the head: not implemented")
        layers = match(settings, tensors, linears, wanted)
    except ValueError as e:
        raise ValueError(f"{adapter}: {e}") from None

    out.parent.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    beside.chmod(0o755)
    try:
        weight_map, dtype = {}, torch.float32  # dtype: of the last weight, for modules that the model lacks
        for file in files:
            merged = {}
            with open_tensors(model / file) as f:
                for key in f.keys():
                    weight, name = f.get_tensor(key), spelled(key)
                    path = name.removesuffix(".weight")
                    if weight.is_floating_point():
                        dtype = weight.dtype
                    elif path in layers:
                        raise ValueError(f"{model / file}: {key} is {weight.dtype}, quantised; merge into the weights before")
                    if path in layers:
                        weight = updated(weight, layers[path][1], tensors[f"{path}.lora_A.weight"], tensors[f"{path}.lora_B.weight"])
                    merged[name] = saved.pop(name).to(weight.dtype) if name in saved else weight
            if file == files[-1]:
                merged |= {name: t.to(dtype) for name, t in saved.items()}
            save_file(merged, beside / file, metadata={"format": "pt"})
            weight_map |= dict.fromkeys(merged, file)
        head = [t for name, t in tensors.items() if name.endswith(("classifier.weight", "classifier.out_proj.weight", "score.weight"))]
        if settings.get("task_type") == "SEQ_CLS" and head:
            config = with_labels(config, len(head[0]))
        written = {"config.json": config}
        if index:
            written["model.safetensors.index.json"] = index | dict(weight_map=weight_map)
        for name, value in written.items():
            (beside / name).write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
        for file in files:
            shutil.copymode(beside / "config.json", beside / file)
        for file in model.iterdir():  # the tokenizer, and what else is text
            if file.suffix in (".json", ".txt", ".model", ".jinja") and file.name not in written:
                shutil.copy(file, beside)
        os.replace(beside, out)
    finally:  # of an attempt that failed
        shutil.rmtree(beside, ignore_errors=True)


def show(adapter):
    """What an adapter folder in PEFT's LoRA format holds, as text: parameters, budget and the rank of each matrix."""
    settings, tensors = read_adapter(adapter)
    own = Path(adapter) / "salora.json"
    known = read_json(own) if own.is_file() else {}
    found = {name.removesuffix(".lora_A.weight"): t.shape[0] for name, t in tensors.items() if name.endswith(".lora_A.weight")}
    table = known.get("ranks") or found
    r = max(known.get("r") or 1, *table.values(), 1)
    adapter_params = sum(t.numel() for name, t in tensors.items() if ".lora_" in name)
    others = sum(t.numel() for t in tensors.values()) - adapter_params
    low, high = min(found.values(), default=0), max(found.values(), default=0)
    lines = [f"{adapter}: adapter of {settings.get('base_model_name_or_path') or 'an unnamed model'}",
             f"{adapter_params:,} parameters in {len(found)} matrices of rank {low} to {high}"]
    if others:
        lines[1] += f", {others:,} in {', '.join(settings.get('modules_to_save') or [])}"
    if known:
        budget = "no budget recorded" if known.get("budget") is None else f"budget {known['budget']:g}"
        zero = sum(rank == 0 for rank in table.values())
        lines.append(f"{budget}; rank {r} at the start; {zero} of {len(table)} matrices were left at rank 0")
    return "\n".join([*lines, "", rank_map(table, r)])


def main(argv=None):
    parser = argparse.ArgumentParser(description="Merges a LoRA adapter, of this project or of PEFT, into a model folder, or shows it.")
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("merge", help="write a plain Hugging Face folder with the adapter in its weights")
    command.add_argument("--model", required=True, metavar="DIR", help="folder with config.json and model.safetensors, or its shards")
    command.add_argument("--adapter", required=True, metavar="DIR", help="folder with adapter_config.json and adapter_model.safetensors")
    command.add_argument("--out", required=True, metavar="DIR", help="folder to write, which must not be there yet")
    command = commands.add_parser("show", help="print the ranks, parameters and budget of an adapter")
    command.add_argument("adapter", metavar="ADAPTER", help="folder of the adapter")

    def error(message):
        print(f"error: {message}", file=sys.stderr)
        sys.exit(2)

    for each in (parser, *commands.choices.values()):
        each.error = error  # one line, as all others
    if isinstance(sys.stdout, io.TextIOWrapper):  # what a notebook has is none
        sys.stdout.reconfigure(errors="replace")  # for a terminal that knows nothing but ASCII
    args = parser.parse_args(argv)
    from safetensors import SafetensorError
    try:
        if args.command == "show":
            print(show(args.adapter))
        else:
            merge_folder(args.model, args.adapter, args.out)
            print(f"{args.out}/: {args.model} with {args.adapter} in its weights")
    except (OSError, ValueError, SafetensorError) as e:
        error(f"{e.filename}: {e.strerror}" if isinstance(e, OSError) and e.filename else e)


if __name__ == "__main__":
    main()
