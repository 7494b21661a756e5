"""Four small batches make a step, under bfloat16 autocast.

Call begin_step() before each forward pass; it draws once a step. Add the penalty once a step.
Gradient checkpointing works with use_reentrant=False."""

import torch
import torch.nn.functional as F

from salora import SaLoRA, ranks

torch.manual_seed(0)
x = torch.randn(4, 64, 32)
y = (x[:, :, :4].sum(2) > 0).long()
model = torch.nn.Sequential(  # in your case: a pretrained one
    torch.nn.Linear(32, 64),
    torch.nn.ReLU(),
    torch.nn.Linear(64, 64),
    torch.nn.ReLU(),
    torch.nn.Linear(64, 2),
)
steps = 200
salora = SaLoRA(model, targets=["0", "2"], steps=steps, r=4, budget=0.5)
optimizer = torch.optim.AdamW(salora.param_groups(lr=1e-2))

for step in range(steps):
    total = 0.0
    for i in range(4):
        salora.begin_step()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = F.cross_entropy(model(x[i]), y[i]) / 4
        if i == 3:
            loss = loss + salora.penalty()
        loss.backward()
        total += loss.item()
    optimizer.step()
    salora.end_step(optimizer)
    optimizer.zero_grad()
    if step % 20 == 0 or step == steps - 1:
        print(f"step {step}: loss {total:.4f}")

print(ranks(model))
