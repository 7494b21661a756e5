"""torch.compile: train the compiled model, and give SaLoRA the one inside it.

There are three graphs: before the window, in it, and for the smaller tensors after it."""

import torch
import torch.nn.functional as F

from salora import SaLoRA, ranks

torch.manual_seed(0)
x = torch.randn(256, 32)
y = (x[:, :4].sum(1) > 0).long()
model = torch.nn.Sequential(  # in your case: a pretrained one
    torch.nn.Linear(32, 64),
    torch.nn.ReLU(),
    torch.nn.Linear(64, 64),
    torch.nn.ReLU(),
    torch.nn.Linear(64, 2),
)
steps = 200
salora = SaLoRA(model, targets=["0", "2"], steps=steps, r=4, budget=0.5)
compiled = torch.compile(model)
optimizer = torch.optim.AdamW(salora.param_groups(lr=1e-2))

for step in range(steps):
    salora.begin_step()
    loss = F.cross_entropy(compiled(x), y) + salora.penalty()
    loss.backward()
    optimizer.step()
    salora.end_step(optimizer)
    optimizer.zero_grad()
    if step % 20 == 0 or step == steps - 1:
        print(f"step {step}: loss {loss.item():.4f}")

print(ranks(model))
