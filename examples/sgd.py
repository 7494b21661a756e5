"""SGD: choose gate_lr yourself.

The default gate_lr is for Adam, which moves log theta by about gate_lr in each step. SGD moves it
by gate_lr times a small gradient, so it may need more. If it does, SaLoRA warns at the end of the
window. The optimizer has to support the option `maximize`, as most of torch's do."""

import torch
import torch.nn.functional as F

from salora import SaLoRA, ranks

torch.manual_seed(0)
x = torch.randn(256, 32)
y = x @ torch.randn(32, 4) / 32**0.5
model = torch.nn.Sequential(
    torch.nn.Linear(32, 64),
    torch.nn.Tanh(),
    torch.nn.Linear(64, 4),
)
steps = 300
salora = SaLoRA(model, targets=["0", "2"], steps=steps, r=4, budget=0.5, gate_lr=5.0)
optimizer = torch.optim.SGD(salora.param_groups(lr=0.1, weight_decay=0.0), momentum=0.9)

for step in range(steps):
    salora.begin_step()
    loss = F.mse_loss(model(x), y) + salora.penalty()
    loss.backward()
    optimizer.step()
    salora.end_step(optimizer)
    optimizer.zero_grad()
    if step % 20 == 0 or step == steps - 1:
        print(f"step {step}: loss {loss.item():.4f}, density {salora.density().item():.2f}")

print(ranks(model))
