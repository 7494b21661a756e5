"""
The methods SaLoRA is compared with. install(model, method, ..) puts one into an Encoder and freezes
the other weights:

    ft         full fine-tuning, every weight
    head       only the classifier, the least a method has to beat
    adapter-h  Houlsby et al. 2019, arXiv 1902.00751: a bottleneck after the attention and after the
               feed-forward of each layer, before the residual sum. The layer norms stay frozen, as
               in the LoRA paper; Houlsby et al. train them
    adapter-p  Pfeiffer et al. 2021, arXiv 2005.00247: a bottleneck after the feed-forward only.
               Ours is Houlsby's; theirs has ReLU and its own layer norm and residual sum
    prefix     Li and Liang 2021, arXiv 2101.00190: n keys and values in every layer, from a small
               network that is dropped at the end. Unlike theirs, ours has no dropout on the
               prefix and divides the network's output by the square root of its width
    prompt     Lester et al. 2021, arXiv 2104.08691: n input vectors that start as random words.
               They follow the first token, which the classifier reads
    lora       Hu et al. 2022, arXiv 2106.09685: SaLoRA without gates and regularizer; `ranks`
               gives each matrix its own rank
    lora-svd   LoRA cut to the largest singular values of all its updates: below
    adalora    Zhang et al. 2023, arXiv 2303.10512: below
"""

import torch
import torch.nn as nn
import torch.nn.functional as F

import salora as sl

METHODS = (
    "lora", "lora-svd", "adalora", "ft", "head", "adapter-h", "adapter-p", "prefix", "prompt")


class Adapter(nn.Module):
    """x + up(gelu(down(x))), (.., d). The small initial weights make it start near the identity."""

    def __init__(self, d, bottleneck, device):
        super().__init__()
        self.down = nn.Linear(d, bottleneck, device=device)
        self.up = nn.Linear(bottleneck, d, device=device)
        for layer in (self.down, self.up):
            nn.init.normal_(layer.weight, std=0.001)
            nn.init.zeros_(layer.bias)

    def forward(self, x):
        def linear(y, layer):
            return F.linear(y, layer.weight.to(x.dtype), layer.bias.to(x.dtype))
        return x + linear(F.gelu(linear(x, self.down)), self.up)


class Prefix(nn.Module):
    """n keys and values for each layer, (layers, 2, n, d). A table of n vectors goes through a
    network of two layers in training; finish() replaces both by their output."""

    def __init__(self, layers, n, d, device, inner=512):
        super().__init__()
        self.shape = layers, 2, n, d
        self.table = nn.Parameter(torch.randn(n, d, device=device))
        self.network = nn.Sequential(nn.Linear(d, inner, device=device), nn.Tanh(),
                                     nn.Linear(inner, layers * 2 * d, device=device))

    def forward(self):
        if self.network is None:
            return self.table
        layers, two, n, d = self.shape
        # Adam moves every weight by about the learning rate, so the prefix moves by a sum of 512
        # such steps. The division lets prefix and head share a learning rate; without it, STS-B
        # ended far below the head alone.
        y = self.network(self.table) / self.network[2].in_features**0.5
        return y.view(n, layers, two, d).permute(1, 2, 0, 3)  # (layers, 2, n, d)

    @torch.no_grad()
    def finish(self):
        self.table, self.network = nn.Parameter(self().contiguous()), None


def install(model, method, paths, steps, r=8, alpha=None, budget=0.5, beta=0.1, window=(0.2, 0.5),
            bottleneck=32, virtual_tokens=20, lora_dropout=0.0, ranks=None):
    """Puts `method` into the model, in place, and freezes what it does not train (the head too:
    unfreeze it afterwards). paths: the nn.Linear modules that low-rank methods adapt; steps: of
    the run. ranks: for lora, {path: rank from 0 to r} instead of paths; the scale is alpha / r for
    all, as after SaLoRA's cut. Returns the SaLoRA or AdaLoRA of a low-rank method, else None."""
    if method == "lora" and ranks:
        sl.adapt(model, list(ranks), r, alpha)
        for path, layer in sl.adapters(model).items():
            layer.prune(torch.arange(r, device=layer.lora_A.device) < ranks[path])
        paths = None  # keeps these adapters
    if method == "lora":
        return sl.SaLoRA(
            model, paths, max(steps, 1), r, alpha, window=None, lora_dropout=lora_dropout)
    if method == "lora-svd":
        return LoRASVD(model, paths, steps, r, alpha, budget, window, lora_dropout)
    if method == "adalora":
        return AdaLoRA(model, paths, steps, r, alpha, budget, beta, window, lora_dropout)
    model.requires_grad_(method == "ft")
    c, words = model.config, model.body.embeddings.word_embeddings.weight
    if method in ("adapter-h", "adapter-p"):
        for layer in model.body.encoder.layer:
            places = [layer.output, layer.attention.output]
            for place in places if method == "adapter-h" else places[:1]:
                place["adapter"] = Adapter(c.hidden_size, bottleneck, words.device)
    elif method == "prefix":
        model.prefix = Prefix(c.num_hidden_layers, virtual_tokens, c.hidden_size, words.device)
    elif method == "prompt":
        start = words[torch.randint(len(words), (virtual_tokens,))]  # (n, d)
        model.prompt = nn.Parameter(start.float())


# -------------------------------------------------------------------------------------------------
# LoRA, cut by singular values


class LoRASVD(sl.SaLoRA):
    """LoRA until the window ends. Then each update is turned into its singular directions, and the
    triplets with the largest singular values that fit the budget are kept. There are no gates:
    SaLoRA has to beat this."""

    def __init__(self, model, targets, steps, r=8, alpha=None, budget=0.5, window=(0.4, 0.5),
                 lora_dropout=0.0):
        super().__init__(model, targets, steps, r, alpha, budget, window=window, turn=False,
                         lora_dropout=lora_dropout)
        self.gated = False

    def select(self, optimizer):
        return sl.largest(sl.turn(self.layers, optimizer), self.size, self.budget)

    def prune(self, optimizer=None):
        super().prune(optimizer)
        self.final_density = self.kept_params() / self.initial_params


# -------------------------------------------------------------------------------------------------
# AdaLoRA


class AdaLoRALinear(sl.SaLoRALinear):
    """h = W x + (alpha/r) P diag(lambda) Q x, shaped like a singular value decomposition: Q is
    lora_A (r, k), P is lora_B (d, r), and lora_E (r,) the singular values, which start at 0."""

    triplet_dim = sl.SaLoRALinear.triplet_dim | dict(lora_E=0)

    def __init__(self, base, r, scale):
        super().__init__(base, r, scale)
        nn.init.normal_(self.lora_A, std=0.02)
        nn.init.normal_(self.lora_B, std=0.02)
        self.lora_E = nn.Parameter(torch.zeros(r, device=self.lora_A.device))

    def matrices(self):
        return self.lora_A, self.lora_B * self.lora_E


class AdaLoRA:
    """Adaptive budget allocation (Zhang et al. 2023), used in a training loop like SaLoRA. In the
    window the number of triplets with a nonzero singular value falls, as a cubic, from all to the
    share `budget`; every few steps a smoothed importance decides which ones stay. At the end the
    tensors are cut. beta: weight of the mean over the 2K matrices of |PP' - I|, which their paper
    squares and their code does not. ValueError: as in SaLoRA.

    Two things differ: window and interval are shares of the run, not numbers of steps per task,
    and lost triplets are cut out, while their code keeps them as zeros."""

    BETA = 0.85  # of both moving averages
    SCALE = 16  # default alpha/r, as in their GLUE scripts; Adam moves singular values slowly
    PLAIN = ("step", "live", "pruned", "final_density")  # in a checkpoint, besides tensors

    def __init__(self, model, targets, steps, r=8, alpha=None, budget=0.5, beta=0.1,
                 window=(0.2, 0.5), lora_dropout=0.0):
        alpha = self.SCALE * r if alpha is None else alpha
        self.layers = sl.adapt(model, targets, r, alpha, AdaLoRALinear)
        for layer in self.layers:
            layer.dropout = lora_dropout
        self.steps, self.beta = steps, beta
        self.start, self.end = sl.window_steps(window, steps)
        self.interval = max(1, (self.end - self.start) // 100)  # steps between choices of triplets
        self.total = self.live = len(self.layers) * r  # triplets in all; left by the last choice
        self.target = int(budget * self.total + 1e-6)  # 0.29 * 100 is 28.999..
        self.step, self.pruned, self.final_density = 0, False, None
        self.params = [p for m in self.layers for p in (m.lora_A, m.lora_B, m.lora_E)]
        self.sensitivity = [torch.zeros_like(p) for p in self.params]
        self.uncertainty = [torch.zeros_like(p) for p in self.params]

    def begin_step(self):
        """As in SaLoRA, but there is nothing to draw."""

    def penalty(self):
        """beta times the mean over the matrices of |MM' - I|: a scalar."""
        live = [m for m in self.layers if m.rank]
        if not live:
            return torch.zeros(())
        shapes = {}  # matrices of one shape together: fewer, larger products
        for m in [m.lora_A for m in live] + [m.lora_B.mT for m in live]:
            shapes.setdefault(m.shape, []).append(m)
        stacks = map(torch.stack, shapes.values())  # (count, r, n) each
        norms = [(m @ m.mT - torch.eye(m.shape[1], device=m.device)).flatten(1).norm(dim=1)
                 for m in stacks]
        return self.beta * torch.cat(norms).mean()

    @torch.no_grad()
    def end_step(self, optimizer):
        """After optimizer.step(), before zero_grad(). Cuts at the end of the window."""
        if not self.pruned:
            self.measure()
        self.step += 1
        if self.step == self.end:
            for m, keep in zip(self.layers, self.choose(self.target)):
                m.prune(keep, optimizer)
            self.pruned, self.final_density = True, self.live / self.total
            self.params, self.sensitivity, self.uncertainty = [], [], []

    def measure(self):
        """Updates the importance from this step's gradients; masks the least every few steps."""
        if any(p.grad is None for p in self.params):
            raise RuntimeError("an adapter has no gradient: the task loss does not reach it, or "
                               "zero_grad() came before end_step()")
        importance = torch._foreach_mul(self.params, [p.grad for p in self.params])
        torch._foreach_abs_(importance)  # eq. 8 of their paper
        torch._foreach_lerp_(self.sensitivity, importance, 1 - self.BETA)  # eq. 9
        torch._foreach_sub_(importance, self.sensitivity)
        torch._foreach_abs_(importance)
        torch._foreach_lerp_(self.uncertainty, importance, 1 - self.BETA)  # eq. 10
        if self.step > self.start and self.step % self.interval == 0:
            left = 1 - (self.step - self.start) / (self.end - self.start)
            keep = self.choose(int((self.total - self.target) * left**3 + self.target))  # eq. 12
            torch._foreach_mul_([m.lora_E for m in self.layers], list(keep))

    def choose(self, count):
        """(K, r) bool: the `count` triplets of largest importance."""
        self.live = count
        keep = torch.zeros(self.total, dtype=torch.bool, device=self.layers[0].lora_E.device)
        keep[self.scores().flatten().argsort(descending=True, stable=True)[:count]] = True
        return keep.view(len(self.layers), -1)

    def scores(self):
        """Importance of the triplets (K, r): the singular value's plus the mean of each vector."""
        importance = torch._foreach_mul(self.sensitivity, self.uncertainty)  # eq. 11
        a, b, e = (importance[i::3] for i in range(3))
        return torch.stack([a.mean(1) + b.mean(0) + e for a, b, e in zip(a, b, e)])  # eq. 7

    def state_dict(self):
        """What a checkpoint needs besides the parameters and the optimizer's state."""
        tensors = {f"{name}.{i}": t for name in ("sensitivity", "uncertainty")
                   for i, t in enumerate(getattr(self, name))}
        return tensors | {name: getattr(self, name) for name in self.PLAIN}

    def load_state_dict(self, state):
        for name in self.PLAIN:
            setattr(self, name, state[name])
        if self.pruned:
            self.params, self.sensitivity, self.uncertainty = [], [], []
        for i in range(len(self.params)):
            self.sensitivity[i].copy_(state[f"sensitivity.{i}"])
            self.uncertainty[i].copy_(state[f"uncertainty.{i}"])

    def density(self):
        """The share of triplets whose singular value is not 0."""
        return torch.tensor(self.live / self.total)

    kept_params = sl.SaLoRA.kept_params
    orthogonality = sl.SaLoRA.orthogonality  # squared
