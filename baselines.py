"""
What SaLoRA is compared with. install(model, method, ..) puts one of these into an Encoder whose other weights are frozen:

    ft         full fine-tuning, every weight (head: none but the classifier, the floor of every comparison)
    adapter-h  Houlsby et al. 2019, arXiv 1902.00751: a bottleneck after the attention and one after the feed-forward of each layer, before
               the residual sum. They train the layer norms too; here, as in the tables of LoRA's paper, those are frozen
    adapter-p  Pfeiffer et al. 2021, arXiv 2005.00247: a bottleneck after the feed-forward only. Theirs has another layer norm and residual
               sum around it, and ReLU; here it is Houlsby's, in the same place
    prefix     Li and Liang 2021, arXiv 2101.00190: n keys and values in every layer, the output of a small network that is dropped at the
               end. Without their dropout on the prefix, and with the network's output divided by the root of its width
    prompt     Lester et al. 2021, arXiv 2104.08691: n input vectors that start as random words. They stand behind the first token, not
               before it, so that the token that the classifier reads stays the first
    lora       Hu et al. 2022, arXiv 2106.09685: SaLoRA without gates and regulariser
    lora-svd   LoRA, cut in the middle of the run to the largest singular values of all its updates, the simplest way to find ranks: below
    adalora    Zhang et al. 2023, arXiv 2303.10512: below
"""

import torch
import torch.nn as nn
import torch.nn.functional as F

import salora as sl

METHODS = ("lora", "lora-svd", "adalora", "ft", "head", "adapter-h", "adapter-p", "prefix", "prompt")


class Adapter(nn.Module):
    """x + up(gelu(down(x))) over the last dimension d; weights of standard deviation 0.001 make it start near the identity."""

    def __init__(self, d, bottleneck, device):
        super().__init__()
        self.down, self.up = nn.Linear(d, bottleneck, device=device), nn.Linear(bottleneck, d, device=device)
        for layer in (self.down, self.up):
            nn.init.normal_(layer.weight, std=0.001)
            nn.init.zeros_(layer.bias)

    def forward(self, x):
        def linear(y, layer):
            return F.linear(y, layer.weight.to(x.dtype), layer.bias.to(x.dtype))
        return x + linear(F.gelu(linear(x, self.down)), self.up)


class Prefix(nn.Module):
    """n keys and values for each of the layers (layers, 2, n, d), reparametrised: a table of n vectors goes through a network of two
    layers while it is trained, and finish() replaces both by their output."""

    def __init__(self, layers, n, d, device, inner=512):
        super().__init__()
        self.shape = layers, 2, n, d
        self.table = nn.Parameter(torch.randn(n, d, device=device))
        self.network = nn.Sequential(nn.Linear(d, inner, device=device), nn.Tanh(), nn.Linear(inner, layers * 2 * d, device=device))

    def forward(self):
        if self.network is None:
            return self.table
        layers, two, n, d = self.shape
        # Adam moves every weight by about the learning rate, so the prefix by a sum of 512 such moves. Divided, both prefix and head can
        # learn at one rate; undivided, on STS-B, it ended far below the head alone.
        y = self.network(self.table) / self.network[2].in_features**0.5
        return y.view(n, layers, two, d).permute(1, 2, 0, 3)  # (layers, 2, n, d)

    @torch.no_grad()
    def finish(self):
        self.table, self.network = nn.Parameter(self().contiguous()), None


def install(model, method, paths, steps, r=8, alpha=None, budget=0.5, beta=0.1, window=(0.2, 0.5), bottleneck=32, virtual_tokens=20):
    """Freezes what `method` does not train (the head too: unfreeze it afterwards) and puts in what it does, in place. `paths`: the
    nn.Linear modules that low-rank methods adapt; `steps`: of the run; budget and window are lora-svd's and adalora's, beta
    adalora's, bottleneck the adapters', virtual_tokens the prefix's and the prompt's. Returns the SaLoRA or AdaLoRA of a low-rank method, else None."""
    if method == "lora":
        return sl.SaLoRA(model, paths, max(steps, 1), r, alpha, window=None)
    if method == "lora-svd":
        return LoRASVD(model, paths, steps, r, alpha, budget, window)
    if method == "adalora":
        return AdaLoRA(model, paths, steps, r=r, alpha=alpha, budget=budget, beta=beta, window=window)
    model.requires_grad_(method == "ft")
    c, words = model.config, model.body.embeddings.word_embeddings.weight
    if method in ("adapter-h", "adapter-p"):
        for layer in model.body.encoder.layer:
            for place in [layer.output, layer.attention.output] if method == "adapter-h" else [layer.output]:
                place["adapter"] = Adapter(c.hidden_size, bottleneck, words.device)
    elif method == "prefix":
        model.prefix = Prefix(c.num_hidden_layers, virtual_tokens, c.hidden_size, words.device)
    elif method == "prompt":
        model.prompt = nn.Parameter(words[torch.randint(len(words), (virtual_tokens,))].float())  # (n, d)


# ---------------------------------------------------------------------------------------------------------------------
# LoRA, cut by singular values


class LoRASVD(sl.SaLoRA):
    """LoRA until the window ends. Then each update is turned into its singular directions, and of all triplets
    those of the largest singular values stay that fit into the budget. It needs no gates: what SaLoRA has to
    beat."""

    def __init__(self, model, targets, steps, r=8, alpha=None, budget=0.5, window=(0.4, 0.5)):
        super().__init__(model, targets, steps, r, alpha, budget, window=window, turn=False)
        self.gated = False

    def select(self, optimizer):
        return sl.largest(sl.turn(self.layers, optimizer), self.size, self.budget)

    def prune(self, optimizer=None):
        super().prune(optimizer)
        self.final_density = self.kept_params() / self.initial_params


# ---------------------------------------------------------------------------------------------------------------------
# AdaLoRA


def stack_by_shape(matrices):
    """Matrices (r, n) of one shape in one tensor (count, r, n): fewer, larger products."""
    shapes = {}
    for m in matrices:
        shapes.setdefault(m.shape, []).append(m)
    return [torch.stack(same) for same in shapes.values()]


class AdaLoRALinear(sl.SaLoRALinear):
    """h = W x + (alpha/r) P diag(lambda) Q x, the form of a singular value decomposition: Q is lora_A (r, k), P lora_B (d, r), and lora_E
    (r,) the singular values, which start at 0."""

    triplet_dim = sl.SaLoRALinear.triplet_dim | dict(lora_E=0)

    def __init__(self, base, r, scale):
        super().__init__(base, r, scale)
        nn.init.normal_(self.lora_A, std=0.02)
        nn.init.normal_(self.lora_B, std=0.02)
        self.lora_E = nn.Parameter(torch.zeros(r, device=self.lora_A.device))

    def matrices(self):
        return self.lora_A, self.lora_B * self.lora_E


class AdaLoRA:
    """Adaptive budget allocation (Zhang et al. 2023), used in a training loop as SaLoRA is. From the start of the window to its end
    the number of triplets with a singular value other than 0 falls, as a cubic, from all to `budget` of all; a smoothed importance
    decides again and again which. At the end of the window the tensors are cut down. beta: of the mean over the 2K matrices of
    |PP' - I|, which their paper squares and their code does not. ValueError: as SaLoRA.

    Ours differs in two points: window and interval are shares of the run, where theirs are numbers of steps for each task; and triplets
    that lost are cut out of the tensors, where their code goes on with zeros."""

    BETA1 = BETA2 = 0.85  # of the two moving averages
    SCALE = 16  # alpha/r if no alpha is given, as in their scripts for GLUE: Adam moves one singular value as slowly as one element of B

    def __init__(self, model, targets, steps, r=8, alpha=None, budget=0.5, beta=0.1, window=(0.2, 0.5)):
        self.layers = sl.adapt(model, targets, r, self.SCALE * r if alpha is None else alpha, AdaLoRALinear)
        self.steps, self.beta = steps, beta
        self.start, self.end = sl.window_steps(window, steps)
        self.interval = max(1, (self.end - self.start) // 100)  # steps from one choice of triplets to the next
        self.total = self.live = len(self.layers) * r  # triplets in all; those that the last choice left
        self.target = int(budget * self.total + 1e-6)  # the margin is for products such as 0.29 * 100 = 28.999..
        self.step, self.pruned, self.final_density = 0, False, None
        self.params = [p for m in self.layers for p in (m.lora_A, m.lora_B, m.lora_E)]
        self.sensitivity = [torch.zeros_like(p) for p in self.params]
        self.uncertainty = [torch.zeros_like(p) for p in self.params]

    def begin_step(self):
        """As SaLoRA's: there is nothing to draw."""

    def penalty(self):
        """beta times the mean over the matrices of |MM' - I|: a scalar."""
        live = [m for m in self.layers if m.rank]
        if not live:
            return torch.zeros(())
        stacks = stack_by_shape([m.lora_A for m in live] + [m.lora_B.mT for m in live])  # (count, r, n) each
        norms = [(m @ m.mT - torch.eye(m.shape[1], device=m.device)).flatten(1).norm(dim=1) for m in stacks]
        return self.beta * torch.cat(norms).mean()

    @torch.no_grad()
    def end_step(self, optimizer):
        """After the optimiser's step, while the gradients are still there. At the end of the window it prunes, also in
        `optimizer`."""
        if not self.pruned:
            self.measure()
        self.step += 1
        if self.step == self.end:
            for m, keep in zip(self.layers, self.choose(self.target)):
                m.prune(keep, optimizer)
            self.pruned, self.final_density = True, self.live / self.total
            self.params, self.sensitivity, self.uncertainty = [], [], []

    def measure(self):
        """Takes this step's gradients into the importance of the triplets, and now and then masks those that matter least."""
        importance = torch._foreach_mul(self.params, [p.grad for p in self.params])
        torch._foreach_abs_(importance)  # eq. 8 of their paper
        torch._foreach_lerp_(self.sensitivity, importance, 1 - self.BETA1)  # eq. 9
        torch._foreach_sub_(importance, self.sensitivity)
        torch._foreach_abs_(importance)
        torch._foreach_lerp_(self.uncertainty, importance, 1 - self.BETA2)  # eq. 10
        if self.step > self.start and self.step % self.interval == 0:
            left = 1 - (self.step - self.start) / (self.end - self.start)
            keep = self.choose(int((self.total - self.target) * left**3 + self.target))  # eq. 12
            torch._foreach_mul_([m.lora_E for m in self.layers], list(keep))

    def choose(self, count):
        """(K, r) bool: the `count` triplets that matter most."""
        self.live = count
        keep = torch.zeros(self.total, dtype=torch.bool, device=self.layers[0].lora_E.device)
        keep[self.scores().flatten().argsort(descending=True, stable=True)[:count]] = True
        return keep.view(len(self.layers), -1)

    def scores(self):
        """Importance of the triplets (K, r): their singular value's, and the means over their two vectors."""
        a, b, e = (torch._foreach_mul(self.sensitivity[i::3], self.uncertainty[i::3]) for i in range(3))  # eq. 11
        return torch.stack([a.mean(1) + b.mean(0) + e for a, b, e in zip(a, b, e)])  # eq. 7

    def state_dict(self):
        """What a checkpoint needs besides the parameters and the optimiser's state: a flat dict of tensors and plain values."""
        tensors = {f"{name}.{i}": t for name in ("sensitivity", "uncertainty") for i, t in enumerate(getattr(self, name))}
        return tensors | dict(step=self.step, live=self.live, pruned=self.pruned, final_density=self.final_density)

    def load_state_dict(self, state):
        self.step, self.live, self.pruned, self.final_density = (state[name] for name in ("step", "live", "pruned", "final_density"))
        if self.pruned:
            self.params, self.sensitivity, self.uncertainty = [], [], []
        for i in range(len(self.params)):
            self.sensitivity[i].copy_(state[f"sensitivity.{i}"])
            self.uncertainty[i].copy_(state[f"uncertainty.{i}"])

    def density(self):
        """The share of triplets with a singular value other than 0."""
        return torch.tensor(self.live / self.total)

    orthogonality = sl.SaLoRA.orthogonality  # squared
