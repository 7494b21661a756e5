import torch
import torch.nn.functional as F
from salora import SaLoRA

x, y = torch.randn(4, 64, 32), torch.randint(5, (4, 64))  # four small batches make a step
model = torch.nn.Sequential(torch.nn.Linear(32, 64), torch.nn.ReLU(), torch.nn.Linear(64, 5))
salora = SaLoRA(model, targets=["0", "2"], r=4, budget=0.5)
optimizer = torch.optim.AdamW(salora.param_groups(lr=1e-2, gate_lr=0.5))
for step in range(200):
    for i in range(4):
        salora.begin_step(step / 200, optimizer)  # the same draw for all four
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = F.cross_entropy(model(x[i]), y[i])
        (loss / 4 + (salora.penalty() if i == 3 else 0)).backward()
    optimizer.step(), salora.end_step(), optimizer.zero_grad(), print("loss", loss.item())
