"""
SaLoRA, structure-aware low-rank adaptation: LoRA that learns the rank of every matrix.
Hu et al., Mathematics 2023, 11(20), 4317, https://doi.org/10.3390/math11204317

A frozen weight W (d x k) gets a low-rank update B diag(g) A, with A (r x k) and B (d x r). Each of
its r triplets (a row of A, a gate, a column of B) has a random gate g in [0, 1], which can be
exactly 0 and still has a gradient:

    h = W x + (alpha/r) B diag(g) A x                                                    (3, 5)
    g = min(1, max(0, s)),  u ~ U(0, 1)                                                     (7)
        s = sigmoid((log u - log(1-u) + log theta) / tau) (zeta - gamma) + gamma
    P(g > 0) = sigmoid(log theta - tau log(-gamma/zeta)),  summed: E|G|_0                   (8)
    R_orth = |B'B - I|^2 + |AA' - I|^2: the triplets of a matrix learn different things     (9)
    loss + lambda sum_i E|G_i|_0 + beta R_orth: lambda is a constant price per open gate   (10)
    C = sum_i E|G_i|_0 (d_i + k_i) / sum_i (#A_i + #B_i): share of parameters to stay      (11)
    max_lambda min_{A,B,theta} loss + beta R_orth + lambda (C - b)^2: C is driven to b     (12)

A' is A transposed, #A its number of elements; tau = 1, gamma = -0.1, zeta = 1.1. Equation 12 is
the default; pass `price` for equation 10. Gates are drawn and learned in a window of the run. At
its end the triplets that lost are cut out of A, B and the optimizer's state. Outside the window
the layer is plain LoRA.

One step is ours. Any invertible matrix fits between B and A without changing BA, so the triplets
of a LoRA mean nothing by themselves. When the window opens, A and B are turned into the singular
directions of BA, which makes them orthogonal exactly, and theta starts as the singular values over
their median. `SaLoRA(.., **PAPER)` is the letter of the paper, without this.

    salora = SaLoRA(model, targets=["up", "down"], steps=steps, r=8, budget=0.5)
    optimizer = torch.optim.AdamW(salora.param_groups(lr=1e-3))
    for x, y in batches:
        salora.begin_step()
        loss = F.cross_entropy(model(x), y) + salora.penalty()
        loss.backward()
        optimizer.step()
        salora.end_step(optimizer)
        optimizer.zero_grad()
    merge(model)  # or adapter.save(model, "adapter", budget=salora.budget), which PEFT can load
"""

import math
import warnings

import torch
import torch.nn as nn
import torch.nn.functional as F

# -------------------------------------------------------------------------------------------------
# the hard-concrete gate (Louizos et al. 2018): a sigmoid stretched to (gamma, zeta), then clipped

TAU, GAMMA, ZETA = 1.0, -0.1, 1.1


def sample_gates(log_theta: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    """Random gates in [0, 1] from uniform noise u, elementwise; differentiable in log_theta."""
    s = torch.sigmoid((torch.logit(u) + log_theta) / TAU) * (ZETA - GAMMA) + GAMMA  # eq. 7
    return s.clamp(0, 1)


def open_probability(log_theta: torch.Tensor) -> torch.Tensor:
    """P(g > 0), elementwise. Its sum is E|G|_0, the expected number of open gates."""
    return torch.sigmoid(log_theta - TAU * math.log(-GAMMA / ZETA))  # eq. 8


def deterministic_gates(log_theta: torch.Tensor) -> torch.Tensor:
    """The gates without noise, elementwise in [0, 1]: what evaluation in the window uses."""
    return (torch.sigmoid(log_theta) * (ZETA - GAMMA) + GAMMA).clamp(0, 1)


# -------------------------------------------------------------------------------------------------
# the layer


class SaLoRALinear(nn.Module):
    """h = W x + scale * B diag(g) A x around a frozen nn.Linear. B starts at zero, so the first
    step sees the pretrained layer. A and B are float32 and are cast to the dtype of x."""

    triplet_dim = dict(lora_A=0, lora_B=1)  # along which dimension a parameter lists its triplets

    def __init__(self, base: nn.Linear, r: int, scale: float):
        super().__init__()
        d, k, device = base.out_features, base.in_features, base.weight.device
        self.base = base
        self.lora_A = nn.Parameter(torch.randn(r, k, device=device) / math.sqrt(k))  # |row| ~ 1
        self.lora_B = nn.Parameter(torch.zeros(d, r, device=device))
        self.r = r  # at the start
        self.scale = scale  # alpha / r, unchanged when the rank falls
        self.gates = None  # (r,), set by SaLoRA in the window; None: all 1
        self.spent = False  # whether these gates have had their backward pass

    @property
    def rank(self) -> int:
        return self.lora_A.shape[0]

    def matrices(self):
        """A (r, k) and B diag(g) (d, r)."""
        if self.spent:
            raise RuntimeError("a forward pass in the window needs its own salora.begin_step(); "
                               "gradient checkpointing needs use_reentrant=False")
        return self.lora_A, self.lora_B if self.gates is None else self.lora_B * self.gates

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # (.., k)
        h = self.base(x)  # (.., d)
        if self.rank == 0:
            return h
        a, b = self.matrices()
        z = F.linear(x, a.to(x.dtype)).flatten(0, -2)  # (n, r)
        h2 = torch.addmm(h.flatten(0, -2), z, b.mT.to(z.dtype), alpha=self.scale)  # eq. 3, 5
        return h2.view_as(h)

    @torch.no_grad()
    def prune(self, keep: torch.Tensor, optimizer=None):
        """Keeps the triplets where `keep` (r,) is True. New, smaller Parameters take the places of
        the old ones, in the optimizer too, where the moments of the kept triplets stay."""
        self.gates, index = None, keep.nonzero().squeeze(1)
        for name, dim in self.triplet_dim.items():
            old = getattr(self, name)
            new = nn.Parameter(old.index_select(dim, index))
            setattr(self, name, new)
            if optimizer is None:
                continue
            for group in optimizer.param_groups:
                group["params"] = [new if p is old else p for p in group["params"]]
            for key, value in optimizer.state.pop(old, {}).items():
                if torch.is_tensor(value) and value.dim():  # a moment; the rest is AdamW's step
                    if value.shape != old.shape:
                        raise ValueError(f"the state of {type(optimizer).__name__} has another "
                                         "shape than the weights and cannot be cut: use AdamW")
                    value = value.index_select(dim, index)
                optimizer.state[new][key] = value


def adapters(model: nn.Module) -> dict:
    """{module path: SaLoRALinear} in the model's order."""
    return {path: m for path, m in model.named_modules() if isinstance(m, SaLoRALinear)}


def linears_of(model: nn.Module) -> dict:
    """{module path: nn.Linear} in the model's order."""
    return {path: m for path, m in model.named_modules() if isinstance(m, nn.Linear)}


HEADS = {"lm_head", "classifier", "score", "qa_outputs", "head"}


def find(linears: dict, targets, note: str = "") -> dict:
    """The entries of {path: ..} whose path equals one of the targets or ends in "." + it.
    "all-linear": all but the head, what is inside a module of HEADS, else the last one."""
    if targets == "all-linear":
        head = {path for path in linears if HEADS & set(path.split("."))} or set(list(linears)[-1:])
        return {path: m for path, m in linears.items() if path not in head}
    found = set()
    for target in [targets] if isinstance(targets, str) else targets:
        hits = [path for path in linears if path == target or path.endswith("." + target)]
        if not hits:
            names = ", ".join(sorted({path.split(".")[-1] for path in linears})) or "(none)"
            raise ValueError(f"target {target!r} matches no nn.Linear of the model; their names "
                             f"end in: {names}{note}")
        found.update(hits)
    return {path: m for path, m in linears.items() if path in found}


def replace(model: nn.Module, path: str, module: nn.Module):
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)


def adapt(model, targets, r, alpha=None, kind=SaLoRALinear) -> list:
    """Freezes the model, puts a `kind` layer around every target, returns these layers."""
    if adapters(model):
        raise ValueError("the model has adapters already: merge() them, or go on with targets=None")
    conv = any(type(m).__name__ == "Conv1D" for m in model.modules())
    note = "; Conv1D, which GPT-2 is made of, is not implemented" if conv else ""
    linears = find(linears_of(model), targets, note)
    if not linears:
        raise ValueError("targets is empty")
    everywhere = [m for _, m in model.named_modules(remove_duplicate=False)]
    for path, m in linears.items():
        parent = model.get_submodule(path.rpartition(".")[0])
        if isinstance(parent, (nn.MultiheadAttention, nn.TransformerEncoderLayer)):
            raise ValueError(f"{path} is inside a {type(parent).__name__}, which reads its weight "
                             "and goes past an adapter: do not target it")
        if sum(m is other for other in everywhere) > 1:
            raise ValueError(f"{path} is in the model under two names: do not target it")
        most = min(m.in_features, m.out_features)
        if not 1 <= r <= most:
            raise ValueError(f"r is {r}, but {path} is {m.out_features} x {m.in_features}: "
                             f"expected 1 to {most}")
    model.requires_grad_(False)
    for path, m in linears.items():
        replace(model, path, kind(m, r, (r if alpha is None else alpha) / r))
    return list(adapters(model).values())


# -------------------------------------------------------------------------------------------------
# singular directions, the choice of triplets, the regularizer


@torch.no_grad()
def turn(layers: list, optimizer) -> torch.Tensor:
    """A and B become the factors of BA's singular value decomposition, the rows of A orthonormal,
    the columns of B as long as the singular values. BA stays; the optimizer's moments, which belong
    to other directions, are dropped. Returns the singular values (K, r). Layers of one shape are
    turned together, and no d x k matrix is decomposed; in float64, since LAPACK's last bits differ
    from call to call."""
    sigma, shapes = {}, {}
    for m in layers:
        shapes.setdefault((m.lora_A.shape, m.lora_B.shape), []).append(m)
        for p in (m.lora_A, m.lora_B):
            optimizer.state.pop(p, None)
    for same in shapes.values():
        qa, ra = torch.linalg.qr(torch.stack([m.lora_A.mT for m in same]).double())  # A' = Qa Ra
        qb, rb = torch.linalg.qr(torch.stack([m.lora_B for m in same]).double())  # B = Qb Rb
        u, s, vh = torch.linalg.svd(rb @ ra.mT)  # BA = Qb (Rb Ra') Qa' = (Qb U) S (V' Qa'); r x r
        for m, a, b, values in zip(same, vh @ qa.mT, qb @ (u * s.unsqueeze(1)), s):
            m.lora_A.copy_(a)
            m.lora_B.copy_(b)
            sigma[m] = values
    return torch.stack([sigma[m] for m in layers]).float()


def largest(scores: torch.Tensor, size: torch.Tensor, budget: float) -> torch.Tensor:
    """(K, r) bool: the triplets of largest score (K, r) that fit into `budget` of all parameters.
    size (K,): the parameters of one triplet of each layer."""
    keep = torch.zeros(scores.numel(), dtype=torch.bool)
    sizes = size.repeat_interleave(scores.shape[1])
    room = int(budget * sizes.sum().item() + 1e-6)  # 0.29 * 100 is 28.999..
    order = scores.flatten().argsort(descending=True, stable=True)
    for i, n in zip(order.tolist(), sizes[order].tolist()):
        if n <= room:  # a triplet too large for what is left makes way for a smaller one
            keep[i], room = True, room - n
    return keep.view_as(scores).to(scores.device)


def gram_error(m: torch.Tensor) -> torch.Tensor:
    """|MM' - I|^2 of M (r, n)."""
    return (m @ m.mT - torch.eye(m.shape[0], device=m.device)).square().sum()


# -------------------------------------------------------------------------------------------------
# the method

PAPER = dict(  # the letter of the paper: SaLoRA(.., **PAPER)
    beta=0.1, orth_reduction="sum", window=(0.2, 0.5), gate_lr=0.01, turn=False,
    selection="paper", fold_gates=True)


def window_steps(window, steps: int) -> tuple:
    """(first step of the window, first step after it). It starts at step 1 at the earliest, for in
    step 0 B is zero and no gate has a gradient, and holds a step at least."""
    first = max(1, min(math.ceil(window[0] * steps - 1e-9), steps - 1))
    return first, max(first + 1, math.ceil(window[1] * steps - 1e-9))


class SaLoRA:
    """Puts a SaLoRALinear around every target of `model`, freezes the rest, and trains the gates.
    Move the model to its device and dtype first; unfreeze a new head afterwards.

    targets: names of nn.Linear modules, full paths or endings ("query", "output.dense"); a list
        or one string. None: go on with the adapters that are in the model
    steps: optimizer steps of the whole run
    r, alpha: the initial rank; the update is scaled by alpha / r (alpha = r by default)
    budget: b, the share of adapter parameters to keep, in (0, 1]
    beta: weight of R_orth: of its mean over the 2K matrices A and B, or of its sum, the letter
        (orth_reduction="sum")
    window: the part of the run, as fractions, in which gates are learned; None: plain LoRA
    seed: of the gates' own random generator
    gate_lr: learning rate of log theta and lambda. By default they can travel far enough in the
        window, however short it is: 12 and 24 / its steps, 1 and 2 at most (for AdamW)
    turn: at the window's start, turn A and B into the singular directions of BA and start theta as
        the singular values over their median. False: theta starts at 1
    selection: "budget" keeps the triplets of largest log theta that fit into b, never more;
        "paper" keeps those whose gate without noise is above 0, however many they are
    fold_gates: False sets kept gates to 1, True multiplies their value into B
    price: a constant lambda (eq. 10) instead of a budget; the selection is then "paper"

    The cut at the end of the window replaces the Parameters lora_A and lora_B by smaller ones, in
    the model and in the optimizer: keep no list of them across it.
    ValueError: a target that matches nothing, a setting out of range."""

    def __init__(self, model: nn.Module, targets, steps: int, r: int = 8, alpha: float = None,
                 budget: float = 0.5, beta: float = 0.0, window: tuple = (0.5, 0.6), seed: int = 0,
                 *, gate_lr: float = None, turn: bool = True, orth_reduction: str = "mean",
                 selection: str = None, fold_gates: bool = False, price: float = None):
        start, end = window or (0.0, 1.0)
        for name, value, ok, expected in (
                ("steps", steps, steps >= 1, "at least 1"),
                ("budget", budget, 0 < budget <= 1, "a share in (0, 1]"),
                ("window", window, 0 <= start < end <= 1, "two fractions, 0 <= start < end <= 1"),
                ("beta", beta, 0 <= beta < math.inf, "a number from 0"),
                ("price", price, price is None or 0 <= price < math.inf, "a number from 0"),
                ("alpha", alpha, alpha is None or 0 < alpha < math.inf, "a positive number"),
                ("gate_lr", gate_lr, gate_lr is None or 0 < gate_lr, "a positive number"),
                ("orth_reduction", orth_reduction, orth_reduction in ("mean", "sum"), "mean, sum"),
                ("selection", selection, selection in (None, "budget", "paper"), "budget, paper")):
            if not ok:
                raise ValueError(f"{name} is {value!r}, expected {expected}")
        self.first, self.last = window_steps(window, steps) if window else (0, 0)
        if self.last > steps:
            raise ValueError("gates need a run of two steps or more: in the first one B is zero")
        if targets is not None:
            adapt(model, targets, r, alpha)
        self.layers = list(adapters(model).values())
        ranks = {m.rank for m in self.layers}
        if not ranks:
            raise ValueError("targets is None, and the model has no adapters to go on with")
        if window and len(ranks) > 1:
            raise ValueError(f"the adapters have ranks {min(ranks)} to {max(ranks)}, and gates "
                             "need one for all: go on with window=None")

        self.model, self.steps, self.gated = model, steps, window is not None
        self.budget, self.beta, self.price = budget, beta, price
        travel = 1 / max(self.last - self.first, 12)
        self.gate_lr, self.lam_lr = gate_lr or 12 * travel, gate_lr or 24 * travel
        self.turn, self.orth_reduction, self.fold_gates = turn, orth_reduction, fold_gates
        self.selection = selection or ("budget" if price is None else "paper")
        self.step, self.final_density = 0, None  # C at the end of the window
        self.begun, self.penalized, self.noise, self.version = False, False, None, None  # this step

        device = self.layers[0].lora_A.device
        self.log_theta = nn.Parameter(torch.zeros(len(self.layers), max(ranks), device=device))
        self.lam = nn.Parameter(torch.zeros((), device=device))  # lambda
        sizes = [m.lora_A.shape[1] + m.lora_B.shape[0] for m in self.layers]
        self.size = torch.tensor(sizes, device=device)  # (K,) d + k
        self.initial_params = self.kept_params()
        self.generator = torch.Generator("cpu" if device.type == "meta" else device)
        self.generator.manual_seed(seed)

    def param_groups(self, lr: float, weight_decay: float = 0.01) -> list:
        """For a torch optimizer: the trainable weights; log theta; lambda, which climbs where the
        others descend. Without a window there are only weights."""
        weights = [p for p in self.model.parameters() if p.requires_grad]
        groups = [dict(params=weights, lr=lr, weight_decay=weight_decay)]
        if self.gated:
            groups += [dict(params=[self.log_theta], lr=self.gate_lr, weight_decay=0.0),
                       dict(params=[self.lam], lr=self.lam_lr, weight_decay=0.0, maximize=True)]
        return groups

    @property
    def pruned(self) -> bool:
        return self.final_density is not None

    @property
    def in_window(self) -> bool:
        return self.gated and self.first <= self.step < self.last and not self.pruned

    def begin_step(self):
        """Before every forward pass. In the window it draws the gates, once a step, so that
        accumulated batches share them."""
        if self.step >= self.steps:
            raise RuntimeError(f"step {self.step + 1} of {self.steps}: give SaLoRA(steps=..) the "
                               "number of optimizer steps of the whole run")
        b = self.layers[0].lora_B
        stepped = b._version != self.version or self.penalized and b.grad is None and self.step == 0
        if self.begun and stepped:  # a fused optimizer shows in zeroed gradients alone
            raise RuntimeError("the optimizer has stepped since the last begin_step(): call "
                               "salora.end_step(optimizer) after every optimizer.step()")
        self.begun, self.version = True, b._version
        if not self.in_window:
            return
        if not all(layer.training for layer in self.layers):
            raise RuntimeError("an adapted layer is in eval(), where its gates cannot learn: call "
                               "model.train() before the step")
        if self.noise is None:
            self.noise = torch.rand(self.log_theta.shape, generator=self.generator,
                                    device=self.log_theta.device)
        gates = sample_gates(self.log_theta, self.noise)  # (K, r)
        gates.register_hook(self.spend)
        self.set_gates(gates)

    def set_gates(self, gates):
        """gates (K, r), or None for 1."""
        for i, layer in enumerate(self.layers):
            layer.gates, layer.spent = None if gates is None else gates[i], False

    def spend(self, grad):
        """The graph behind these gates is gone once a backward pass has gone through it."""
        for layer in self.layers:
            layer.spent = True

    def penalty(self) -> torch.Tensor:
        """What is added to the task loss, once a step: a scalar."""
        self.penalized = True
        total, live = self.lam.new_zeros(()), [m for m in self.layers if m.rank]
        if self.beta and live:
            orth = sum(gram_error(m.lora_A) + gram_error(m.lora_B.mT) for m in live)  # eq. 9
            count = 2 * len(live) if self.orth_reduction == "mean" else 1
            total = total + self.beta * orth / count
        if self.in_window and self.price is not None:
            total = total + self.price * open_probability(self.log_theta).sum()  # eq. 10
        elif self.in_window:
            total = total + self.lam * (self.density() - self.budget) ** 2  # eq. 12
        return total

    @torch.no_grad()
    def end_step(self, optimizer):
        """After optimizer.step() and before zero_grad(). Keeps lambda >= 0; turns A and B when the
        window opens, and cuts them when it closes."""
        if not self.begun:
            raise RuntimeError("end_step() without a begin_step() before the forward pass")
        if self.step in (0, self.first, self.last - 1):
            self.check(optimizer)
        self.begun, self.penalized, self.noise, self.step = False, False, None, self.step + 1
        self.log_theta.grad = self.lam.grad = None  # a loop may zero the model's gradients alone
        self.lam.clamp_(min=0)  # its gradient (C - b)^2 is never negative, so it does not fall
        if self.gated and self.step == self.first and self.turn and not self.pruned:
            sigma = turn(self.layers, optimizer)  # (K, r)
            theta = (sigma / sigma.median()).nan_to_num(1.0)  # 0 / 0: nothing has been learned yet
            self.log_theta.copy_(theta.clamp(1e-3, 1e3).log())
        if self.step == self.last and not self.pruned:
            self.prune(optimizer)
        self.set_gates(deterministic_gates(self.log_theta) if self.in_window else None)

    def check(self, optimizer):
        """RuntimeError where training could go on without an error, but not as it should."""
        held = {id(p): group for group in optimizer.param_groups for p in group["params"]}
        params = [p for m in self.layers for p in m.parameters(recurse=False) if p.numel()]
        params += [self.log_theta, self.lam] if self.gated and not self.pruned else []
        if not all(id(p) in held for p in params):
            raise RuntimeError("the optimizer does not hold all of SaLoRA's parameters: make it of "
                               "salora.param_groups(lr)")
        if self.gated and not self.pruned and not held[id(self.lam)].get("maximize"):
            raise RuntimeError("the optimizer would minimize lambda: it needs the groups of "
                               "salora.param_groups(lr) and an option `maximize`, as AdamW has")
        # at step 0 R_orth alone gives B a gradient of zeros, since B is zero
        grads = [m.lora_B.grad for m in self.layers if m.rank]
        if grads and not any(g is not None and (self.beta == 0 or g.any()) for g in grads):
            raise RuntimeError("the task loss does not reach the adapters, no lora_B has a "
                               "gradient: gradient checkpointing needs use_reentrant=False, and "
                               "zero_grad() comes after end_step()")

    def density(self) -> torch.Tensor:
        """C, the share of adapter parameters expected to stay; without gates, the share that is
        there: a scalar."""
        if self.pruned or not self.gated:
            return self.lam.new_tensor(self.kept_params() / self.initial_params)
        expected = open_probability(self.log_theta).sum(1)  # (K,)
        return (expected * self.size).sum() / self.initial_params  # eq. 11

    def orthogonality(self) -> tuple:
        """|AA' - I|^2 and |B'B - I|^2, each the mean over the matrices with a rank left."""
        live = [m for m in self.layers if m.rank]
        a = sum(gram_error(m.lora_A) for m in live)
        b = sum(gram_error(m.lora_B.mT) for m in live)
        return tuple(torch.as_tensor(x / max(len(live), 1)) for x in (a, b))

    def kept_params(self) -> int:
        """Number of adapter parameters now in the model."""
        return sum(p.numel() for m in self.layers for p in m.parameters(recurse=False))

    def select(self, optimizer=None) -> torch.Tensor:
        """(K, r) bool: the triplets that stay."""
        if self.selection == "paper":
            return deterministic_gates(self.log_theta) > 0
        return largest(self.log_theta, self.size, self.budget)

    @torch.no_grad()
    def prune(self, optimizer=None):
        """Ends the window: cuts the triplets that lost out of A, B and the optimizer's state."""
        self.final_density = self.density().item()
        missed = self.gated and abs(self.final_density - self.budget) > 0.1
        if missed and self.selection == "budget":
            warnings.warn(f"the gates came to a density of {self.final_density:.2f}, and the "
                          f"budget is {self.budget:g}: the cut decides more than they do, so "
                          "widen the window", stacklevel=5)
        gates = deterministic_gates(self.log_theta)
        for layer, keep, g in zip(self.layers, self.select(optimizer), gates):
            if self.fold_gates:
                layer.lora_B.mul_(g)
            layer.prune(keep, optimizer)
        if optimizer is not None:
            for p in (self.log_theta, self.lam):  # with no gradient from here on
                optimizer.state.pop(p, None)

    def state_dict(self) -> dict:
        """What a checkpoint needs beside the states of model and optimizer: tensors and numbers."""
        return dict(log_theta=self.log_theta.detach().clone(), lam=self.lam.detach().clone(),
                    generator=self.generator.get_state(), step=self.step,
                    final_density=self.final_density, ranks=[m.rank for m in self.layers])

    @torch.no_grad()
    def load_state_dict(self, state: dict):
        """Goes on from a state_dict(). Call it before the model's load_state_dict, which then finds
        A and B in the shapes that were saved."""
        self.log_theta.copy_(state["log_theta"])
        self.lam.copy_(state["lam"])
        self.generator.set_state(state["generator"].cpu())
        self.step, self.final_density = state["step"], state["final_density"]
        self.begun, self.penalized, self.noise = False, False, None
        for layer, rank in zip(self.layers, state["ranks"]):
            layer.lora_A.data = layer.lora_A.data[:rank].clone()
            layer.lora_B.data = layer.lora_B.data[:, :rank].clone()
        self.set_gates(deterministic_gates(self.log_theta) if self.in_window else None)


def average_gradients(optimizer):
    """Between backward() and optimizer.step(), with several processes: every gradient becomes its
    mean over them, in one message. DistributedDataParallel does not know log theta. With one seed
    everywhere all processes draw, and keep, the same gates. Does nothing in a single process."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return
    grads = [p.grad for g in optimizer.param_groups for p in g["params"] if p.grad is not None]
    flat = torch.cat([grad.flatten() for grad in grads]) / torch.distributed.get_world_size()
    torch.distributed.all_reduce(flat)
    for grad, mean in zip(grads, flat.split([grad.numel() for grad in grads])):
        grad.copy_(mean.view_as(grad))


# -------------------------------------------------------------------------------------------------
# what comes out


def ranks(model: nn.Module) -> dict:
    """{module path: rank}, rank 0 included."""
    return {path: m.rank for path, m in adapters(model).items()}


def rank_map(table: dict, r: int) -> str:
    """The ranks {module path: rank} out of r as text: a row for each kind of module, a column for
    each layer (the first number in a path)."""
    rows, columns, blocks = {}, [], " ▁▂▃▄▅▆▇█"
    for path, rank in table.items():
        parts = path.split(".")
        at = next((i for i, part in enumerate(parts) if part.isdigit()), len(parts))
        stack, module = ".".join(parts[:at]), ".".join(parts[at + 1:])
        column = "".join(parts[at:at + 1])
        columns += [column] if column not in columns else []
        cells = rows.setdefault((stack, module) if module else (path, ""), {})
        cells[column] = f"{rank:>3}{blocks[math.ceil(8 * min(rank / r, 1))]}"
    alone = len({stack for stack, module in rows if module}) == 1  # no need to name it
    names = {key: key[1] if alone and key[1] else ".".join(filter(None, key)) for key in rows}
    width = max(map(len, names.values()), default=0)
    lines = [" " * width + "".join(f"{column:>4}" for column in columns)]
    for key, cells in rows.items():
        lines.append(f"{names[key]:<{width}}" + "".join(cells.get(c, "    ") for c in columns))
    return "\n".join(line.rstrip() for line in lines)


def updated(weight, scale, a, b):
    """weight + scale B A, summed in float32, in the dtype of weight."""
    return (weight.float() + scale * b.float() @ a.float()).to(weight.dtype)


@torch.no_grad()
def merge(model: nn.Module) -> nn.Module:
    """Adds every update to its weight and puts the plain nn.Linear back. Returns the model."""
    for path, layer in adapters(model).items():
        weight = layer.base.weight  # a new tensor takes its place: the old one may be tied
        merged = updated(weight, layer.scale, *layer.matrices())
        layer.base.weight = nn.Parameter(merged, weight.requires_grad)
        replace(model, path, layer.base)
    return model
