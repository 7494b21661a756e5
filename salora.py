"""
SaLoRA, structure-aware low-rank adaptation: LoRA that learns the rank of every matrix.
Hu et al., Mathematics 2023, 11(20), 4317, https://doi.org/10.3390/math11204317

A frozen weight W (d x k) gets a low-rank update B diag(g) A, with A (r x k) and B (d x r). It is
a sum of r triplets: a row of A, a column of B, and a gate g between them. A gate is a random number
in [0, 1]. It can be exactly 0, and still has a gradient with respect to its parameter theta:

    h = W x + (alpha/r) B diag(g) A x                                                    (3, 5)
    g = min(1, max(0, s)),  u ~ U(0, 1)                                                     (7)
        s = sigmoid((log u - log(1-u) + log theta) / tau) (zeta - gamma) + gamma
    P(g > 0) = sigmoid(log theta - tau log(-gamma/zeta)),  summed: E|G|_0                   (8)
    R_orth = |B'B - I|^2 + |AA' - I|^2: keeps triplets from learning the same thing        (9)
    loss + lambda sum_i E|G_i|_0 + beta R_orth: lambda is a constant price per open gate   (10)
    C = sum_i E|G_i|_0 (d_i + k_i) / sum_i (#A_i + #B_i): expected share that is kept      (11)
    max_lambda min_{A,B,theta} loss + beta R_orth + lambda (C - b)^2: C is driven to b     (12)

A' is A transposed, #A its number of elements, b the budget; tau = 1, gamma = -0.1, zeta = 1.1.
Equation 12 is the default; pass `price` for equation 10. Gates are drawn, and theta and lambda
learn, in a window of the run only. When it ends, the triplets of smallest theta are cut out until
the budget is met. Before and after, the layer is plain LoRA, and B = 0 at the start.

One thing is not in the paper. BA = (BM)(M^-1 A) for any invertible M, so a single triplet of a LoRA
has no meaning. When the window opens, A and B are turned into the singular directions of BA, and
theta starts as singular value / sqrt(d), scaled so that a share b of all is at least 1. This makes
rows and columns orthogonal, so beta is 0 by default. `SaLoRA(.., **PAPER)` is as published.
The last part of this file is not the method: it finds modules by name, and reports mistakes.

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
import re
import warnings

import torch
import torch.nn as nn
import torch.nn.functional as F

# ---- the hard-concrete gate (Louizos et al. 2018): a sigmoid, stretched, then clipped -----------
TAU, GAMMA, ZETA = 1.0, -0.1, 1.1

def sample_gates(log_theta: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    """Random gates in [0, 1] from uniform noise u, elementwise; differentiable in log_theta."""
    s = torch.sigmoid((torch.logit(u) + log_theta) / TAU) * (ZETA - GAMMA) + GAMMA  # eq. 7
    return s.clamp(0, 1)

def open_probability(log_theta: torch.Tensor) -> torch.Tensor:
    """P(g > 0), elementwise. Its sum is E|G|_0, the expected number of open gates."""
    return torch.sigmoid(log_theta - TAU * math.log(-GAMMA / ZETA))  # eq. 8

def deterministic_gates(log_theta: torch.Tensor) -> torch.Tensor:
    """The gates without noise, in [0, 1]: for evaluation in the window, and for PAPER's cut."""
    return (torch.sigmoid(log_theta) * (ZETA - GAMMA) + GAMMA).clamp(0, 1)

# ---- the layer ----------------------------------------------------------------------------------
class SaLoRALinear(nn.Module):
    """h = W x + scale * B diag(g) A x around a frozen nn.Linear. B starts at zero, so at first the
    update is zero. A and B are float32; each product casts them to the dtype of x."""
    triplet_dim = dict(lora_A=0, lora_B=1)  # the dimension that counts a parameter's triplets
    rank = property(lambda self: self.lora_A.shape[0])
    bias = property(lambda self: self.base.bias)  # beside `weight`, for a parent that asks

    def __init__(self, base: nn.Linear, r: int, scale: float, dropout: float = 0.0):
        super().__init__()
        d, k = base.out_features, base.in_features
        float32 = dict(dtype=torch.float32, device=base.weight.device)
        self.base = base
        self.lora_A = nn.Parameter(torch.randn(r, k, **float32) / math.sqrt(k))  # |row| ~ 1
        self.lora_B = nn.Parameter(torch.zeros(d, r, **float32))
        self.r, self.scale, self.dropout = r, scale, dropout  # r and scale: as at the start
        self.gates, self.spent = None, False  # (r,), None: 1; a backward pass has used them
        self.uncut = False  # SaLoRA's window has not ended
        self.train(base.training)

    def matrices(self):
        """A (r, k) and B diag(g) (d, r)."""
        if self.spent and torch.is_grad_enabled():
            # id >= 0: inside a backward pass, where checkpointing recomputes the forward pass
            need(torch._C._current_graph_task_id() >= 0,
                 "a forward pass in the window needs its own salora.begin_step()")
        if self.gates is None:
            return self.lora_A, self.lora_B
        return self.lora_A, self.lora_B * self.gates.to(self.lora_B.device)  # for DataParallel

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """h (.., d) from x (.., k)."""
        h = self.base(x)
        if self.rank == 0:
            return h
        a, b = self.matrices()
        x = F.dropout(x, self.dropout, self.training) if self.dropout else x
        z = F.linear(x, a.to(x.dtype)).reshape(-1, self.rank)  # (rows, r)
        h2 = h.reshape(-1, h.shape[-1])  # (rows, d)
        return torch.addmm(h2, z, b.mT.to(z.dtype), alpha=self.scale).view_as(h)  # eq. 3, 5

    @property
    def weight(self) -> torch.Tensor:
        """W + scale * B diag(g) A (d, k), for merge() and for a parent that asks, as T5 does."""
        return updated(self.base.weight, self.scale, *self.matrices())

    @torch.no_grad()
    def prune(self, keep: torch.Tensor, optimizer: torch.optim.Optimizer = None):
        """Keeps the triplets where `keep` (r,) is True: in place, and in the optimizer's state."""
        self.gates, self.uncut, index = None, False, keep.nonzero().squeeze(1)
        for name, dim in self.triplet_dim.items():
            p = getattr(self, name)
            small, state = p.index_select(dim, index), optimizer.state[p] if optimizer else {}
            for key, value in state.items():
                if torch.is_tensor(value) and value.dim():  # a moment; AdamW's step is a scalar
                    state[key] = value.index_select(dim, index)
            # autograd keeps p's old shape while an old loss is alive, unless p's dtype changes
            p.grad, p.data = None, p.new_empty(0, dtype=torch.half)
            p.data = small

    def _load_from_state_dict(self, state, prefix, *args):
        """A state saved after the cut loads into a model from before it, which is cut first."""
        rank = len(state.get(f"{prefix}lora_A", self.lora_A))
        if rank < self.rank:
            self.prune(torch.arange(self.rank, device=self.lora_A.device) < rank)
        super()._load_from_state_dict(state, prefix, *args)

# ---- the method ---------------------------------------------------------------------------------
PAPER = dict(beta=0.1, orth_reduction="sum", window=(0.2, 0.5), gate_lr=0.01, turn=False,
             selection="paper", fold_gates=True)  # as published: SaLoRA(.., **PAPER)

@torch.no_grad()
def turn(layers: list, optimizer: torch.optim.Optimizer) -> torch.Tensor:
    """With BA = U S V', its singular value decomposition, A becomes V' and B becomes U S. Returns S
    (K, r). The optimizer's moments belong to the old directions and are dropped. No d x k matrix is
    decomposed. In float64, since the last bits of LAPACK's results may vary from call to call; on
    the CPU for MPS, which has neither."""
    sigma = []
    for m in layers:
        a, b = (p.cpu() if p.is_mps else p for p in (m.lora_A, m.lora_B))
        qa, ra = torch.linalg.qr(a.mT.double())  # A' = Qa Ra
        qb, rb = torch.linalg.qr(b.double())  # B = Qb Rb
        try:  # BA = Qb (Rb Ra') Qa' = (Qb U) S (V' Qa'); Rb Ra' is r x r
            u, s, vh = torch.linalg.svd(rb @ ra.mT)
        except torch.linalg.LinAlgError:
            raise RuntimeError("training diverged: lower the learning rate") from None
        m.lora_A.copy_(vh @ qa.mT)
        m.lora_B.copy_(qb @ (u * s))
        sigma.append(s.to(m.lora_A))
        for p in (m.lora_A, m.lora_B):
            optimizer.state.pop(p, None)
    return torch.stack(sigma)

def largest(scores: torch.Tensor, size: torch.Tensor, budget: float) -> torch.Tensor:
    """(K, r) bool: the triplets of largest score (K, r) that fit into `budget` of all parameters.
    size (K,): the parameters of one triplet of each layer."""
    keep = torch.zeros(scores.numel(), dtype=torch.bool)
    sizes = size.repeat_interleave(scores.shape[1])
    room = int(budget * sizes.sum().item() + 1e-6)  # 0.29 * 100 is 28.999..
    order = scores.flatten().argsort(descending=True, stable=True)
    for i, n in zip(order.tolist(), sizes[order].tolist()):
        if n <= room:  # where one does not fit, a smaller one after it may
            keep[i], room = True, room - n
    return keep.view_as(scores).to(scores.device)

def window_steps(window: tuple, steps: int) -> tuple:
    """(first step of the window, first step after it). The window has at least one step, and never
    starts at step 0, where B is zero and gates have no gradient."""
    first = max(1, min(math.ceil(window[0] * steps - 1e-9), steps - 1))
    return first, max(first + 1, math.ceil(window[1] * steps - 1e-9))

class SaLoRA:
    """Puts a SaLoRALinear around every target of `model`, freezes the rest, and trains the gates.
    Move the model to its device and dtype first. Unfreeze a new head afterwards, but before
    param_groups(). At the cut A and B shrink in place; a copy of them, such as a moving average,
    does not. ValueError: a setting is out of range.

    targets: names of nn.Linear modules, or their ends, as "query" or "output.dense"; "all-linear":
        all but the head; None: the adapters that the model has already
    steps: optimizer steps of the whole run
    r, alpha: the rank at the start; the update is scaled by alpha / r (alpha = r by default)
    budget: b, the share of adapter parameters to keep, in (0, 1]
    beta, orth_reduction: weight of R_orth; its "mean" or its "sum" over all A and B, 2K matrices
    window: (start, end) of the part of the run in which gates learn, 0 to 1; None: plain LoRA
    gate_lr: learning rate of log theta and of lambda. By default 8/n and 24/n, with n the steps of
        the window, at least 12: with AdamW they move as far in a short window as in a long one
    seed, lora_dropout: of the gates' own random numbers; the share of A's inputs zeroed in training
    turn: turn A and B when the window opens, and start theta from the singular values; else at 1
    selection: "budget" keeps the triplets of largest log theta that fit into b; "paper" keeps
        those whose gate without noise is above 0, however many they are
    fold_gates: at the cut, False sets kept gates to 1, True multiplies their value into B
    price: a constant lambda (eq. 10) instead of a budget; the default selection is then "paper"
    """

    def __init__(self, model: nn.Module, targets: list | str | None, steps: int, r: int = 8,
                 alpha: float = None, budget: float = 0.5, beta: float = 0.0,
                 window: tuple = (0.5, 0.6), seed: int = 0, *, gate_lr: float = None,
                 lora_dropout: float = 0.0, turn: bool = True, orth_reduction: str = "mean",
                 selection: str = None, fold_gates: bool = False, price: float = None):
        check_settings(steps, budget, beta, window, alpha, gate_lr, lora_dropout, orth_reduction,
                       selection, price)
        if targets is not None:
            adapt(model, targets, r, alpha)
        self.layers = [m for m in adapters(model).values() if m.rank]  # K of them
        found = sorted({m.rank for m in self.layers})
        need(len(found) == 1 or found and window is None, "targets=None needs adapters in the "
             f"model, all of one rank if gates are to be learned; their ranks are {found}: use "
             "window=None, or targets=[..]", ValueError)
        for m in self.layers:
            shape = len(m.lora_B), m.lora_A.shape[1]  # d, k
            need(not window or m.rank <= min(shape), f"an adapter has rank {m.rank}, too much for "
                 f"its {shape} matrix, so it cannot have gates: use window=None", ValueError)
            m.train()  # a model without dropout may be trained in eval()
            m.dropout, m.uncut = lora_dropout, bool(window)
        self.model, self.gated, self.steps, self.seed = model, bool(window), int(steps), int(seed)
        self.first, self.last = window_steps(window, self.steps) if window else (0, 0)
        self.budget, self.beta, self.price = budget, beta, price
        travel = 1 / max(self.last - self.first, 12)
        self.gate_lr, self.lam_lr = gate_lr or 8 * travel, gate_lr or 24 * travel
        self.turn, self.orth_reduction, self.fold_gates = turn, orth_reduction, fold_gates
        self.selection = selection or ("budget" if price is None else "paper")
        self.step = self.start = 0  # start: the step at which this process began
        self.final_density = None  # C just before the cut; None before
        first, shape = self.layers[0].lora_A, (len(self.layers), found[-1])  # (K, r)
        self.log_theta = nn.Parameter(first.new_zeros(shape))
        self.lam = nn.Parameter(first.new_zeros(()))  # lambda
        sizes = [m.lora_A.shape[1] + len(m.lora_B) for m in self.layers]  # of a triplet, d + k
        self.size = torch.tensor(sizes, device=first.device)  # (K,)
        self.initial_params = self.kept_params()
        self.generator = torch.Generator("cpu" if first.is_meta else first.device)
        self.reset()

    def param_groups(self, lr: float, weight_decay: float = 0.01) -> list:
        """For a torch optimizer: the trainable weights and, with a window, log theta and lambda,
        which is maximized. A schedule of the learning rate is for the first group alone."""
        weights = [p for p in self.model.parameters() if p.requires_grad]
        groups = [dict(params=weights, lr=lr, weight_decay=weight_decay),  # eq. 12: min,
                  dict(params=[self.log_theta], lr=self.gate_lr, weight_decay=0.0),  # min,
                  dict(params=[self.lam], lr=self.lam_lr, weight_decay=0.0, maximize=True)]  # max
        return groups if self.gated else groups[:1]

    pruned = property(lambda self: self.final_density is not None)

    @property
    def in_window(self) -> bool:
        """Whether gates learn in the current step."""
        return self.gated and self.first <= self.step < self.last and not self.pruned

    def begin_step(self):
        """Before every forward pass of training. Draws the gates, the same for all of one step."""
        check_begin(self)
        if not self.in_window:
            return
        generator = self.generator.manual_seed((self.seed * self.steps + self.step) % 2**63)
        u = torch.empty_like(self.log_theta).uniform_(generator=generator)
        gates = sample_gates(self.log_theta, u)  # (K, r)
        leaf = gates.detach().requires_grad_()  # what the layers use
        def learn(grad):  # in the backward pass; reentrant checkpointing calls it several times
            self.learned = True
            gates.backward(grad, retain_graph=True)  # adds to the gradient of log theta
            for layer in self.layers:
                layer.spent = True
        leaf.register_hook(learn)
        self.set_gates(leaf)

    def set_gates(self, gates: torch.Tensor):
        """Gives every layer its row of gates (K, r), or None for 1."""
        for layer, g in zip(self.layers, [None] * len(self.layers) if gates is None else gates):
            layer.gates, layer.spent = g, False

    def reset(self):
        """Between two steps: nothing has begun, and the gates are those of evaluation."""
        self.begun, self.learned = None, False  # see check_begin(); learn() was called
        self.zero = self.lam.new_zeros((), requires_grad=True)  # its .grad: penalty() was used
        self.set_gates(deterministic_gates(self.log_theta) if self.in_window else None)

    def penalty(self) -> torch.Tensor:
        """A scalar to add to the task loss, once a step."""
        total = self.zero.clone()  # a clone, since a loop may add to it in place
        if self.beta:
            live = sum(m.rank > 0 for m in self.layers)  # orthogonality() is two means over these
            orth = sum(self.orthogonality()) * (0.5 if self.orth_reduction == "mean" else live)
            total = total + self.beta * orth
        if self.in_window and self.price is not None:
            total = total + self.price * open_probability(self.log_theta).sum()  # eq. 10
        elif self.in_window:
            total = total + self.lam * (self.density() - self.budget) ** 2  # eq. 12
        return total

    @torch.no_grad()
    def end_step(self, optimizer: torch.optim.Optimizer):
        """After every optimizer.step(), before zero_grad(). Keeps lambda >= 0; turns A and B when
        the window opens, and cuts them when it closes."""
        need(self.begun is not None, "end_step() without a begin_step() before the forward pass")
        if self.step in (self.start, self.first, self.last - 1):
            check_step(self, optimizer)
        self.step += 1
        self.log_theta.grad = self.lam.grad = None  # model.zero_grad() does not know them
        self.lam.clamp_(min=0)  # its gradient (C - b)^2 is never negative, so it does not fall
        if self.in_window and self.step == self.first and self.turn:
            sigma = turn(self.layers, optimizer)  # (K, r)
            # AdamW moves all elements of B alike: longer columns just have larger singular values
            theta = sigma / sigma.new_tensor([[len(m.lora_B)] for m in self.layers]).sqrt()
            theta = theta / theta.quantile(1 - self.budget)  # b of them start at 1 or above
            self.log_theta.copy_(theta.nan_to_num(1.0).clamp(1e-3, 1e3).log())  # nan: 0/0
        if self.last and self.step >= self.last and not self.pruned:
            self.prune(optimizer)
        self.reset()

    def density(self) -> torch.Tensor:
        """C, the expected share of adapter parameters that is kept; after the cut, the true one."""
        if self.pruned or not self.gated:
            return self.lam.new_tensor(self.kept_params() / self.initial_params)
        expected = open_probability(self.log_theta).sum(1)  # (K,)
        return (expected * self.size).sum() / self.initial_params  # eq. 11

    def orthogonality(self) -> tuple:
        """|AA' - I|^2 and |B'B - I|^2, each the mean over the matrices with a rank left."""
        def mean(matrices):  # (r, n) each
            errors = [(m @ m.mT - torch.eye(len(m), device=m.device)).square().sum()  # eq. 9
                      for m in matrices if len(m)]
            return torch.stack(errors).mean() if errors else torch.zeros(())
        return mean([m.lora_A for m in self.layers]), mean([m.lora_B.mT for m in self.layers])

    def kept_params(self) -> int:
        """Number of adapter parameters now in the model."""
        return sum(p.numel() for m in self.layers for p in m.parameters(recurse=False))

    def select(self, optimizer: torch.optim.Optimizer = None) -> torch.Tensor:
        """(K, r) bool: the triplets that stay. LoRA-SVD's, in baselines.py, uses the optimizer."""
        if self.selection == "paper":
            return deterministic_gates(self.log_theta) > 0
        return largest(self.log_theta, self.size, self.budget)

    @torch.no_grad()
    def prune(self, optimizer: torch.optim.Optimizer = None):
        """The cut: leaves in A, B and the optimizer's state what select() keeps."""
        self.final_density = self.density().item()
        check_density(self)
        gates = deterministic_gates(self.log_theta)
        for layer, keep, g in zip(self.layers, self.select(optimizer), gates):
            if self.fold_gates:
                layer.lora_B.mul_(g)
            layer.prune(keep, optimizer)
        for p in (self.log_theta, self.lam) if optimizer else ():  # they learn no more
            optimizer.state.pop(p, None)

    def state_dict(self) -> dict:
        """What a checkpoint needs beside the states of model and optimizer: tensors and numbers."""
        return dict(log_theta=self.log_theta.detach().clone(), lam=self.lam.detach().clone(),
                    seed=self.seed, step=self.step, final_density=self.final_density)

    @torch.no_grad()
    def load_state_dict(self, state: dict):
        """Goes on from a state_dict(). The model's own state has the ranks."""
        self.log_theta.copy_(state["log_theta"])
        self.lam.copy_(state["lam"])
        self.seed, self.final_density = state["seed"], state["final_density"]
        self.step = self.start = state["step"]
        for m in self.layers:
            m.uncut = self.gated and not self.pruned
        self.reset()

def average_gradients(optimizer: torch.optim.Optimizer):
    """With several processes, between backward() and optimizer.step(): every gradient becomes its
    mean over them, log theta's too, which DistributedDataParallel does not know. With the same seed
    everywhere, all processes keep the same triplets. Each step must use the same adapters in all of
    them. Does nothing in a single process."""
    if processes() == 1:
        return
    optimizer.averaged = True  # for check_step()
    grads = [p.grad for g in optimizer.param_groups for p in g["params"] if p.grad is not None]
    flat = torch.cat([grad.flatten() for grad in grads]) / processes()
    torch.distributed.all_reduce(flat)
    for grad, mean in zip(grads, flat.split([grad.numel() for grad in grads])):
        grad.copy_(mean.view_as(grad))

# ---- what comes out -----------------------------------------------------------------------------
def ranks(model: nn.Module) -> dict:
    """{path: rank}, rank 0 included."""
    return {path: m.rank for path, m in adapters(model).items()}

def rank_map(table: dict, r: int) -> str:
    """The ranks {path: rank} out of r as text: a row for each kind of module, a column for each
    layer, which is the first number in a path."""
    rows, head = {}, {}  # {(stack, kind): {layer: cell}}, {layer: cell}
    for path, rank in table.items():
        stack, layer, kind = re.fullmatch(r"(.*?)(\b\d+\b|$)\.?(.*)", path).groups()
        bar = " ▁▂▃▄▅▆▇█"[math.ceil(8 * min(rank / r, 1))]
        rows.setdefault((stack, kind), {})[layer] = f"{rank:>3}{bar}"
        head[layer] = f"{layer:>4}"
    one = len({stack for (stack, _), cells in rows.items() if any(cells)}) == 1
    names = ["", *(kind if kind and one else (stack + kind).strip(".") for stack, kind in rows)]
    lines = (f"{name:<{max(map(len, names))}}" + "".join(cells.get(layer, "    ") for layer in head)
             for name, cells in zip(names, [head, *rows.values()]))
    return "\n".join(line.rstrip() for line in lines)

@torch.no_grad()
def merge(model: nn.Module) -> nn.Module:
    """Adds every update to its weight and puts the plain nn.Linear back. Returns the model.
    ValueError: a wrapped layer is more than a plain nn.Linear; nothing is merged then."""
    layers, modules = adapters(model), adapters(model, nn.Module)
    check_merge(layers)
    for path, layer in layers.items():  # a new Parameter each, since the old one may be tied
        layer.base.weight = nn.Parameter(layer.weight, layer.base.weight.requires_grad)
        replace(modules, path, layer.base)
    return model

# ---- where the layers go: modules by name, in the model and inside torch's wrappers of it -------
def unwrap(model: nn.Module) -> nn.Module:
    """The model inside torch.compile, DataParallel and DistributedDataParallel."""
    inner = getattr(model, "_orig_mod", model)
    parallel = isinstance(inner, (nn.DataParallel, nn.parallel.DistributedDataParallel))
    return unwrap(inner.module) if parallel else inner

def plain(name: str) -> str:
    """A name without what torch.compile and torch's other wrappers of a module put into it."""
    inner = r"(^|\.)(_orig_mod|_checkpoint_wrapped_module|_fsdp_wrapped_module)(?=\.|$)"
    return re.sub(inner, "", name).lstrip(".")

def adapters(model: nn.Module, kind: type = SaLoRALinear) -> dict:
    """{path: module of this kind} in the model's order."""
    named = unwrap(model).named_modules(remove_duplicate=False)
    return {plain(path): m for path, m in named if isinstance(m, kind)}

def replace(modules: dict, path: str, module: nn.Module):
    """Puts a module into the place of the one at this path. modules: adapters(.., nn.Module)."""
    parent, _, name = path.rpartition(".")
    setattr(modules[parent], name, module)

def find(linears: dict, targets: list | str) -> dict:
    """The entries of {path: nn.Linear} whose path is one of the targets, or ends in "." + target.
    "all-linear": all but the head. The head has one of these names, or else is the last."""
    if targets == "all-linear":
        names = {"lm_head", "classifier", "score", "qa_outputs", "head"}
        heads = {path for path in linears if names & set(path.split("."))} or list(linears)[-1:]
        return {path: m for path, m in linears.items() if path not in heads}
    found, ends = set(), ", ".join(sorted({path.split(".")[-1] for path in linears}))
    for target in [targets] if isinstance(targets, str) else targets:
        hits = {path for path in linears if f".{path}".endswith(f".{target}")}
        need(hits, f"target {target!r} matches no nn.Linear of the model (GPT-2's Conv1D is not "
             f"implemented); their names end in: {ends or '(none)'}", ValueError)
        found |= hits
    return {path: m for path, m in linears.items() if path in found}

def adapt(model: nn.Module, targets: list | str, r: int, alpha: float = None,
          kind: type = SaLoRALinear) -> list:
    """Freezes the model, puts a `kind` layer around every target, returns these layers."""
    need(not adapters(model), "the model has adapters already: merge() them, or go on with "
         "targets=None", ValueError)
    modules, linears = adapters(model, nn.Module), find(adapters(model, nn.Linear), targets)
    need(linears, "targets is empty, or the model has no nn.Linear but its head", ValueError)
    reachable(modules, linears)
    for path, m in linears.items():
        shape = m.out_features, m.in_features  # a quantized weight may have another
        need(r % 1 == 0 and 1 <= r <= min(shape), f"r is {r}, expected 1 to {min(shape)}: {path} "
             f"is {shape}", ValueError)
    model.requires_grad_(False)
    for path, m in linears.items():
        replace(modules, path, kind(m, int(r), (r if alpha is None else alpha) / r))
    return list(adapters(model).values())

def updated(weight: torch.Tensor, scale: float, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """weight + scale B A (d, k), summed in float32, in the dtype of weight."""
    return (weight.float() + scale * b.float() @ a.float()).to(weight.dtype)

# ---- mistakes in other people's loops: nothing below changes what is computed -------------------
def need(ok: bool, words: str, error: type = RuntimeError):
    """Raises the error if not ok. Without these, training would often go on in silence."""
    if not ok:
        raise error(words)

def processes() -> int:
    """How many train together."""
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_world_size() if distributed else 1

def reachable(modules: dict, paths: dict):
    """ValueError: a forward pass would skip an adapter at one of the paths, or use it twice."""
    for path in paths:
        parent = modules[path.rpartition(".")[0]]
        need(not isinstance(parent, (nn.MultiheadAttention, nn.TransformerEncoderLayer)),
             f"{path} is inside a {type(parent).__name__}, which reads its weight and goes past an "
             "adapter: do not target it", ValueError)
        need(list(modules.values()).count(modules[path]) == 1,
             f"{path} is in the model under two names: do not target it", ValueError)

def check_settings(steps, budget, beta, window, alpha, gate_lr, dropout, orth, selection, price):
    """ValueError: a setting of SaLoRA is out of range."""
    start, end = (0.0, 1.0) if window is None else window
    for name, value, ok, expected in (
            ("steps", steps, steps > (window is not None) and steps % 1 == 0,
             "2 or more, 1 without a window, and a whole number"),
            ("budget", budget, 0 < budget <= 1, "a share in (0, 1]"),
            ("beta", beta, 0 <= beta < math.inf, "a number from 0"),
            ("window", window, 0 <= start < end <= 1, "two fractions, 0 <= start < end <= 1"),
            ("alpha", alpha, alpha is None or 0 < alpha < math.inf, "a positive number"),
            ("gate_lr", gate_lr, gate_lr is None or 0 < gate_lr, "a positive number"),
            ("lora_dropout", dropout, 0 <= dropout < 1, "a share in [0, 1)"),
            ("orth_reduction", orth, orth in ("mean", "sum"), "mean, sum"),
            ("selection", selection, selection in (None, "budget", "paper"), "budget, paper"),
            ("price", price, price is None or 0 <= price < math.inf, "a number from 0")):
        need(ok, f"{name} is {value!r}, expected {expected}", ValueError)

def moment(salora: SaLoRA) -> tuple:
    """What a step of the optimizer changes: torch's count of changes in place of every lora_B. It
    leaves out those by a fused optimizer, so at step 0 there are the numbers of one lora_B too."""
    b = salora.layers[0].lora_B.detach().clone() if salora.step == 0 else None
    return sum(m.lora_B._version for m in salora.layers), b

def stepped(salora: SaLoRA) -> bool:
    """Has the optimizer stepped since begin_step()?"""
    (count, b), (old_count, old_b) = moment(salora), salora.begun
    return count != old_count or b is not None and not torch.equal(b, old_b)

def check_begin(salora: SaLoRA):
    """At begin_step(): there are steps left, the last one has ended, gates can learn."""
    need(salora.step < salora.steps, f"step {salora.step + 1} of {salora.steps}: give "
         "SaLoRA(steps=..) the number of optimizer steps of the whole run")
    need(salora.begun is None or not stepped(salora), "the optimizer has stepped since the last "
         "begin_step(): call salora.end_step(optimizer) after each optimizer.step()")
    salora.begun = moment(salora)
    resumed = salora.step == salora.start > 0 and any(m.rank for m in salora.layers)
    need(not resumed or any(m.lora_B.any() for m in salora.layers), "SaLoRA continues from a "
         "checkpoint, but the adapters are new: call model.load_state_dict() too")
    need(not salora.in_window or all(m.training for m in salora.layers), "an adapted layer is in "
         "eval(), where its gates cannot learn: call model.train() before the step")

def check_step(salora: SaLoRA, optimizer: torch.optim.Optimizer):
    """At end_step() of a run's first step, also after a resume, and of the window's first and last
    step: mistakes with which training would go on, but not as it should."""
    held = {id(p): g for g in getattr(optimizer, "param_groups", []) for p in g["params"]}
    params = [p for m in salora.layers for p in m.parameters(recurse=False)]
    gates = [salora.log_theta, salora.lam] if salora.gated and not salora.pruned else []
    need(all(p.dtype == torch.float32 and p.device == salora.lam.device for p in params),
         "the model got another dtype or device after SaLoRA(..): move it before")
    need(all(id(p) in held for p in params + gates), "the optimizer does not hold all of "
         "SaLoRA's parameters: make it of salora.param_groups(lr)")
    taken = optimizer.state.get(params[0], {}).get("step", 1)
    on_gpu = not getattr(taken, "is_cpu", True)  # it is not read, for a step must not wait
    need(salora.step or on_gpu or taken <= 1, "the optimizer continues from a checkpoint, but "
         "SaLoRA is new: call salora.load_state_dict() too")
    # R_orth gives B a gradient too, but at step 0, where B is zero, that is zero
    grads = [m.lora_B.grad for m in salora.layers if m.rank]
    reached = any(g is not None and (salora.beta == 0 or g.any()) for g in grads)
    if salora.step == 0:
        done = not reached or any(p in optimizer.state for p in params) or stepped(salora)
        # a GradScaler skips a step of gradients that are not finite
        if not done and all(g.isfinite().all() for g in grads if g is not None):
            warnings.warn("the optimizer has not stepped: end_step() comes after optimizer.step(), "
                          "once for several accumulated batches", stacklevel=4)
        late = [name for name, p in salora.model.named_parameters()
                if p.requires_grad and p.grad is not None and id(p) not in held]
        if late:
            warnings.warn(f"{late[0]} has a gradient, but the optimizer does not hold it: unfreeze "
                          "it before salora.param_groups()", stacklevel=4)
    if gates:
        need(all(m.rank == len(salora.log_theta[0]) for m in salora.layers), "the model's state "
             "is from after the cut: call salora.load_state_dict() too")
        need(held[id(salora.lam)].get("maximize") and not (salora.in_window and salora.lam < 0),
             "the optimizer would minimize lambda: it needs the groups of salora.param_groups(lr) "
             "and an option `maximize`, as AdamW has")
    if salora.in_window:
        need(processes() == 1 or hasattr(optimizer, "averaged"), "each process would learn "
             "gates of its own: call average_gradients(optimizer) before optimizer.step()")
        need(salora.zero.grad is not None, "the task loss lacks `+ salora.penalty()`")
        need(salora.learned or not reached, "the task loss does not reach the gates: call "
             "salora.begin_step() before the forward pass, and loss.backward() after it")
    need(all(v.shape == p.shape for p in params for v in optimizer.state.get(p, {}).values()
             if torch.is_tensor(v) and v.dim()), f"{type(optimizer).__name__} keeps a state of "
         "another shape than its weights: it cannot be cut: use AdamW")
    need(reached or not grads, "the task loss does not reach the adapters, no lora_B has a "
         "gradient: gradient checkpointing needs use_reentrant=False; zero_grad() comes after "
         "end_step()")

def check_density(salora: SaLoRA):
    """When the window ends: the gates have come near the budget."""
    need(math.isfinite(salora.final_density), "training diverged: lower the learning rate")
    met = abs(salora.final_density - salora.budget) <= 0.1
    if salora.gated and salora.price is None and not met:
        warnings.warn(f"the gates came to a density of {salora.final_density:.2f}, and the "
                      f"budget is {salora.budget:g}: widen the window, raise gate_lr, or keep "
                      "the gates' groups out of the learning rate's schedule", stacklevel=6)

def check_merge(layers: dict):
    """ValueError: a layer {path: layer} is more than an nn.Linear."""
    for path, layer in layers.items():
        need(type(layer.base).forward is nn.Linear.forward and "weight" in layer.base._parameters,
             f"{path} is a {type(layer.base).__name__} with a forward or a weight of its own, "
             "which cannot be merged: use adapter.save()", ValueError)
    if any(layer.uncut for layer in layers.values()):
        warnings.warn("the window has not ended, nothing was cut: SaLoRA(steps=..) must be the "
                      "number of optimizer steps of the run", stacklevel=4)
