"""
SaLoRA, structure-aware low-rank adaptation: LoRA that learns the rank of every matrix.
Hu et al., Structure-Aware Low-Rank Adaptation for Parameter-Efficient Fine-Tuning, Mathematics 2023, 11(20), 4317.

A frozen weight W (d x k) gets a low-rank update B diag(g) A with A (r x k), B (d x r). Each of its r rank-one pieces, a
triplet (row of A, gate, column of B), has a random gate g in [0, 1] that can be exactly 0 and still has a gradient:

    h = W x + (alpha/r) B diag(g) A x                                                                        (eq. 3, 5)
    g = min(1, max(0, s)),  s = sigmoid((log u - log(1-u) + log theta) / tau) (zeta - gamma) + gamma,  u ~ U(0,1)    (7)
    P(g > 0) = sigmoid(log theta - tau log(-gamma / zeta))                                                           (8)
    R_orth = |B'B - I|^2 + |AA' - I|^2, so that the triplets of a matrix learn different things                      (9)
    loss + lambda sum_i E|G_i|_0 + beta R_orth: the penalty form, lambda a constant                                 (10)
    C = sum_i E|G_i|_0 (d_i + k_i) / sum_i (#A_i + #B_i): share of adapter parameters expected to stay              (11)
    max_lambda min_(A,B,theta) loss + beta R_orth + lambda (C - b)^2: the default, it steers C to the budget b      (12)

In a window of the run the gates are drawn and learned; at its end the triplets that lost are cut out of the tensors.
Before and after it the layer is plain LoRA. Five lines of a training loop know of it:

    salora = SaLoRA(model, targets=["up", "down"], r=8, budget=0.5)
    optimizer = torch.optim.AdamW(salora.param_groups(lr=1e-3, gate_lr=0.05))
    for step in range(steps):
        salora.begin_step(step / steps, optimizer)
        loss = F.cross_entropy(model(x), y) + salora.penalty()
        loss.backward()
        optimizer.step()
        salora.project()
        optimizer.zero_grad()
    save(model, "adapter")
"""

import json
import math
import os
import shutil
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

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
    """The gates without noise, in [0, 1]: what a model is evaluated with, and what decides which triplets stay."""
    return (torch.sigmoid(log_theta) * (ZETA - GAMMA) + GAMMA).clamp(0, 1)


# ---------------------------------------------------------------------------------------------------------------------
# the layer


class SaLoRALinear(nn.Module):
    """h = W x + (alpha/r) B diag(g) A x around an nn.Linear, which is frozen. A is Gaussian and B zero, so the first step sees the
    pretrained model. A and B are float32 whatever W is. While a window is open, SaLoRA.begin_step sets `gate`; like dropout, it is
    random in train() and deterministic in eval()."""

    def __init__(self, base, r, scale):
        super().__init__()
        d, k, device = base.out_features, base.in_features, base.weight.device
        self.base = base.requires_grad_(False)
        self.lora_A = nn.Parameter(torch.randn(r, k, device=device) / math.sqrt(k))  # (r, k), rows of about unit norm
        self.lora_B = nn.Parameter(torch.zeros(d, r, device=device))  # (d, r)
        self.scale = scale  # alpha / r with the first r: it stays when the rank falls
        self.gate = self.log_theta = None  # (r,) each inside the window, None outside: all gates are 1

    @property
    def rank(self):
        return self.lora_A.shape[0]

    def forward(self, x):
        h = self.base(x)  # (.., d)
        if self.rank == 0:
            return h
        z = F.linear(x.to(self.lora_A.dtype), self.lora_A)  # (.., r)
        if self.gate is not None:
            z = z * (self.gate if self.training else deterministic_gates(self.log_theta))
        return h + (F.linear(z, self.lora_B) * self.scale).to(h.dtype)  # eq. 3, 5

    @torch.no_grad()
    def folded(self):
        """A (r, k) and (alpha/r) B diag(g) (d, r): the update as two plain matrices, without noise."""
        g = 1.0 if self.gate is None else deterministic_gates(self.log_theta)
        return self.lora_A.detach(), self.lora_B * (self.scale * g)

    @torch.no_grad()
    def prune(self, keep, fold=None, optimizer=None):
        """Cuts A and B down to the triplets that `keep` (r,) names; fold (r,) multiplies B's columns first. New, smaller Parameters take
        the places of the old ones, in `optimizer` too, where the moments of the kept triplets are preserved."""
        self.gate = self.log_theta = None
        if fold is not None:
            self.lora_B.mul_(fold)
        kept = keep.nonzero().squeeze(1)
        for name, dim in (("lora_A", 0), ("lora_B", 1)):
            old = getattr(self, name)
            new = nn.Parameter(old.index_select(dim, kept))
            setattr(self, name, new)
            if optimizer is not None:
                for group in optimizer.param_groups:
                    group["params"] = [new if p is old else p for p in group["params"]]
                state = optimizer.state.pop(old, {})
                cut = {key: v.index_select(dim, kept) if torch.is_tensor(v) and v.shape == old.shape else v for key, v in state.items()}
                if cut:
                    optimizer.state[new] = cut


def find_linears(model, targets):
    """{module path: nn.Linear} for the paths that equal one of `targets` or end in "." + it."""
    linears = {path: m for path, m in model.named_modules() if isinstance(m, nn.Linear)}
    found = {}
    for target in targets:
        hits = [path for path in linears if path == target or path.endswith("." + target)]
        if not hits:
            names = sorted({path.split(".")[-1] for path in linears})
            raise ValueError(f"target {target!r} matches no nn.Linear of the model; their names end in: {', '.join(names) or '(there are none)'}")
        found.update((path, linears[path]) for path in hits)
    return {path: m for path, m in linears.items() if path in found}  # in the model's order


def replace(model, path, module):
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)


def adapters(model):
    """{module path: SaLoRALinear} in the model's order."""
    return {path: m for path, m in model.named_modules() if isinstance(m, SaLoRALinear)}


# ---------------------------------------------------------------------------------------------------------------------
# the method


class SaLoRA:
    """Puts a SaLoRALinear around every target in `model` (in place, everything else is frozen) and steers their gates.
    Move the model to its device first; unfreeze what else should learn, such as a new head, afterwards.

        targets         names of nn.Linear modules: full paths, or their last parts ("query", "attention.output.dense")
        r, alpha        the rank at the start; the update is scaled by alpha/r (alpha = r unless given)
        budget          b, the share of adapter parameters to keep, in (0, 1]
        beta            weight of R_orth: of its mean over the 2K matrices A and B, or of its sum (orth_reduction="sum", the letter
                        of eq. 9, which makes B orthonormal within a few hundred steps whatever the task says)
        window          the part of the run, as fractions, in which gates are learned; None: never, which is plain LoRA
        selection       at the end of the window keep "budget": the triplets of largest log theta that fit into b, never more;
                        "paper": those with a deterministic gate above 0, however many they are
        fold_gates      multiply a kept gate's value into B; the default sets it to 1
        penalty         a constant lambda: eq. 10 instead of eq. 12, no budget is steered to
        seed            of the gates' own random generator: equal seeds draw equal gates whatever else is random

    ValueError: a target that matches nothing, or a setting out of its range."""

    def __init__(self, model, targets, r=8, alpha=None, budget=0.5, beta=0.1, window=(0.2, 0.5), orth_reduction="mean",
                 selection="budget", fold_gates=False, penalty=None, seed=0):
        if not 0 < budget <= 1:
            raise ValueError(f"budget is {budget}, expected a share in (0, 1]")
        if window is not None and not 0 <= window[0] < window[1] <= 1:
            raise ValueError(f"window is {window}, expected two fractions of the run, 0 <= start < end <= 1")
        if orth_reduction not in ("mean", "sum") or selection not in ("budget", "paper"):
            raise ValueError(f"orth_reduction {orth_reduction!r} is mean or sum, selection {selection!r} is budget or paper")
        linears = find_linears(model, targets)
        for path, m in linears.items():
            if not 1 <= r <= min(m.in_features, m.out_features):
                raise ValueError(f"r is {r}, but {path} is {m.out_features} x {m.in_features}: expected 1 to {min(m.in_features, m.out_features)}")
        model.requires_grad_(False)
        for path, m in linears.items():
            replace(model, path, SaLoRALinear(m, r, (r if alpha is None else alpha) / r))
        self.model, self.layers = model, list(adapters(model).values())
        self.budget, self.beta, self.window, self.orth_reduction = budget, beta, window, orth_reduction
        self.selection, self.fold_gates, self.price = selection, fold_gates, penalty
        self.open = self.pruned = False  # is the window open; has it closed
        self.progress = self.noise = None  # the last draw and when it was made
        self.final_density = None  # C at the end of the window

        # All gates in one tensor: one draw and one update for the whole model, however many layers it has.
        device = self.layers[0].lora_A.device
        self.log_theta = nn.Parameter(torch.zeros(len(self.layers), r, device=device))  # (K, r)
        self.lam = nn.Parameter(torch.zeros((), device=device))  # lambda, the Lagrange multiplier
        self.size = torch.tensor([m.lora_A.shape[1] + m.lora_B.shape[0] for m in self.layers], device=device)  # (K,) d + k
        self.initial_params = r * int(self.size.sum())
        self.generator = torch.Generator(device).manual_seed(seed)

    def param_groups(self, lr, gate_lr=0.01, weight_decay=0.01):
        """Three groups for any torch optimiser that knows `maximize`: all that is trainable in the model; log theta; lambda, which
        climbs where the others descend."""
        weights = [p for p in self.model.parameters() if p.requires_grad]
        return [dict(params=weights, lr=lr, weight_decay=weight_decay),
                dict(params=[self.log_theta], lr=gate_lr, weight_decay=0.0),
                dict(params=[self.lam], lr=gate_lr, weight_decay=0.0, maximize=True)]

    def begin_step(self, progress, optimizer):
        """First line of a step; progress = step / steps. Inside the window it draws the step's gates, one draw for the whole batch;
        at its end it prunes, also in `optimizer`. Where a step has several backward passes (gradient accumulation), call it before
        each: the same progress means the same draw. A window that ends at 1 needs a last call with progress 1 after the loop."""
        if self.window is None or self.pruned:
            return
        start, end = self.window
        self.open = start <= progress < end
        if progress >= end:
            self.prune(optimizer)
        if self.open:
            if progress != self.progress:
                self.progress = progress
                self.noise = torch.rand(self.log_theta.shape, generator=self.generator, device=self.log_theta.device)
            gates = sample_gates(self.log_theta, self.noise)  # (K, r)
            for layer, gate, log_theta in zip(self.layers, gates.unbind(), self.log_theta.unbind()):
                layer.gate, layer.log_theta = gate, log_theta

    def penalty(self):
        """What is added to the task's loss: the regulariser, and inside the window the price of the gates."""
        total = self.lam.new_zeros(())
        if self.beta:
            orth_a, orth_b, count = self.orthogonality()
            total = total + self.beta * (orth_a + orth_b) / (2 * count if self.orth_reduction == "mean" else 1)
        if self.open and self.price is not None:
            total = total + self.price * open_probability(self.log_theta).sum()  # eq. 10
        elif self.open:
            total = total + self.lam * (self.density() - self.budget) ** 2  # eq. 12
        return total

    def project(self):
        """Last line of a step: lambda >= 0."""
        with torch.no_grad():
            self.lam.clamp_(min=0)

    def density(self):
        """C, the share of adapter parameters expected to stay: a differentiable scalar. Without gates, the share that is there."""
        if self.pruned or self.window is None:
            return self.lam.new_tensor(self.kept_params() / self.initial_params)
        return (open_probability(self.log_theta).sum(1) * self.size).sum() / self.initial_params  # eq. 11

    def orthogonality(self):
        """Sum of |AA' - I|^2 and of |B'B - I|^2 over the matrices that have a rank left (two scalars), and how many those are."""
        live = [m for m in self.layers if m.rank]
        orth_a, orth_b = (squared_gram_error(group, self.lam.device) for group in ([m.lora_A for m in live], [m.lora_B.mT for m in live]))
        return orth_a, orth_b, max(len(live), 1)

    def kept_params(self):
        """Number of adapter parameters now in the model."""
        return sum(m.lora_A.numel() + m.lora_B.numel() for m in self.layers)

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
        """Ends the window: selects, and cuts the other triplets out of A, B and the optimiser's state."""
        self.final_density = self.density().item()  # C as the gates left it, before the selection
        fold = deterministic_gates(self.log_theta) if self.fold_gates else [None] * len(self.layers)
        for layer, keep, g in zip(self.layers, self.select(), fold):
            layer.prune(keep, g, optimizer)
        for param in (self.log_theta, self.lam):  # without a gradient an optimiser leaves them alone
            param.grad = None
            if optimizer is not None:
                optimizer.state.pop(param, None)
        self.open, self.pruned = False, True


def squared_gram_error(matrices, device):
    """Sum of |MM' - I|^2 over a list of M (r_i, n_i), a scalar: one batched product for each shape."""
    shapes = {}
    for m in matrices:
        shapes.setdefault(m.shape, []).append(m)
    total = torch.zeros((), device=device)
    for group in shapes.values():
        m = torch.stack(group)  # (count, r, n)
        total = total + (m @ m.mT - torch.eye(m.shape[1], device=device)).square().sum()  # eq. 9
    return total


# ---------------------------------------------------------------------------------------------------------------------
# what comes out: ranks, a merged model, an adapter folder in the format of Hugging Face's PEFT


def ranks(model):
    """{module path: rank}, rank 0 included."""
    return {path: m.rank for path, m in adapters(model).items()}


def rank_map(table, r):
    """The ranks {module path: rank} out of r as text: a row for each kind of module, a column for each layer (the first number in a path)."""
    rows, columns = {}, []
    for path, rank in table.items():
        parts = path.split(".")
        at = next((i for i, part in enumerate(parts) if part.isdigit()), None)
        column, row = (parts[at], ".".join(parts[at + 1:])) if at is not None else ("", path)
        rows.setdefault(row or path, {})[column] = rank
        columns += [column] * (column not in columns)
    width = max(map(len, rows), default=0)
    lines = [" " * width + "".join(f"{c:>4}" for c in columns)]
    for row, cells in rows.items():
        text = "".join(f"{cells[c]:>3}" + " ▁▂▃▄▅▆▇█"[math.ceil(8 * min(cells[c] / r, 1))] if c in cells else "    " for c in columns)
        lines.append(f"{row:<{width}}{text}")
    return "\n".join(line.rstrip() for line in lines)


@torch.no_grad()
def merge(model):
    """Adds every update to its weight, in float32, and puts the plain nn.Linear back in place. Returns the model."""
    for path, layer in adapters(model).items():
        a, b = layer.folded()
        layer.base.weight.copy_(layer.base.weight.float() + b @ a)
        replace(model, path, layer.base)
    return model


def save(model, folder, modules_to_save=(), **config):
    """Writes adapter_config.json and adapter_model.safetensors, which PEFT loads: gate and scale are folded into B; modules of rank 0,
    which PEFT does not know, are left out. modules_to_save: attributes whose parameters go along whole (a head: "classifier").
    config: further entries, such as base_model_name_or_path or task_type. The folder appears complete or not at all."""
    from safetensors.torch import save_file
    live = {path: m for path, m in adapters(model).items() if m.rank}
    r = max((m.rank for m in live.values()), default=1)
    tensors = {}
    for path, layer in live.items():
        a, b = layer.folded()
        tensors[f"base_model.model.{path}.lora_A.weight"] = a.float().cpu().contiguous()
        tensors[f"base_model.model.{path}.lora_B.weight"] = b.float().cpu().contiguous()
    for name, param in model.named_parameters():
        if any(name.startswith(m + ".") or f".{m}." in name for m in modules_to_save):
            tensors[f"base_model.model.{name}"] = param.detach().float().cpu().contiguous()
    uneven = {path: m.rank for path, m in live.items() if m.rank != r}
    settings = dict(peft_type="LORA", r=r, lora_alpha=r, rank_pattern=uneven, alpha_pattern=uneven, target_modules=list(live), bias="none",
                    lora_dropout=0.0, fan_in_fan_out=False, modules_to_save=list(modules_to_save) or None, inference_mode=True, **config)
    folder = Path(folder)
    beside = folder.with_name(folder.name + ".new")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    (beside / "adapter_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    save_file(tensors, beside / "adapter_model.safetensors", metadata={"format": "pt"})
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(beside, folder)


def load(model, folder):
    """Puts the adapter of a folder into `model` (in place; A, B and the saved modules are trainable, the rest is frozen) and returns the
    model. Strict: ValueError names a key that is missing, unexpected or misshapen, and a setting that is not implemented."""
    from safetensors.torch import load_file
    folder = Path(folder)
    settings = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    tensors = load_file(folder / "adapter_model.safetensors")
    plain = dict(peft_type="LORA", bias="none", fan_in_fan_out=False, use_dora=False, use_rslora=False)
    for key, only in plain.items():
        if settings.get(key, only) != only:
            raise ValueError(f"{folder}/adapter_config.json: {key} is {settings[key]!r}, only {only!r} is implemented")

    def pattern(name, path):  # as PEFT writes it: the end of a module path -> value
        return next((v for end, v in (settings.get(name) or {}).items() if path == end or path.endswith("." + end)), None)

    targets = settings.get("target_modules")
    if not isinstance(targets, list):
        raise ValueError(f"{folder}/adapter_config.json: target_modules is {targets!r}, expected a list of module paths")
    linears = find_linears(model, targets) if targets else {}
    for name in ("rank_pattern", "alpha_pattern"):
        for end in settings.get(name) or {}:
            if not any(path == end or path.endswith("." + end) for path in linears):
                raise ValueError(f"{folder}/adapter_config.json: {name} names {end!r}, which is no target module")
    params = dict(model.named_parameters())
    wanted = {}
    for path, m in linears.items():
        r = pattern("rank_pattern", path) or settings["r"]
        wanted[f"{path}.lora_A.weight"], wanted[f"{path}.lora_B.weight"] = (r, m.in_features), (m.out_features, r)
    for name, param in params.items():
        if any(name.startswith(m + ".") or f".{m}." in name for m in settings.get("modules_to_save") or ()):
            wanted[name] = tuple(param.shape)
    found = {key.removeprefix("base_model.model."): value for key, value in tensors.items()}
    for key in wanted | found:
        if key not in found or key not in wanted or tuple(found[key].shape) != wanted[key]:
            shapes = [list(s) if s is not None else "nothing" for s in (wanted.get(key), found[key].shape if key in found else None)]
            raise ValueError(f"{folder}/adapter_model.safetensors: {key}: expected {shapes[0]}, found {shapes[1]}")
    model.requires_grad_(False)
    with torch.no_grad():
        for path, m in linears.items():
            r = found[f"{path}.lora_A.weight"].shape[0]
            layer = SaLoRALinear(m, r, (pattern("alpha_pattern", path) or settings["lora_alpha"]) / r)
            layer.lora_A.copy_(found.pop(f"{path}.lora_A.weight"))
            layer.lora_B.copy_(found.pop(f"{path}.lora_B.weight"))
            replace(model, path, layer)
        for name, value in found.items():
            params[name].requires_grad_(True).copy_(value)
    return model
