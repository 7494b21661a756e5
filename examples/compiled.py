import torch
import torch.nn.functional as F
from salora import SaLoRA, ranks

x, y = torch.randn(256, 32), torch.randint(5, (256,))
model = torch.nn.Sequential(torch.nn.Linear(32, 64), torch.nn.ReLU(), torch.nn.Linear(64, 5))
salora = SaLoRA(model, targets=["0", "2"], r=4, budget=0.5)
compiled, optimizer = torch.compile(model), torch.optim.AdamW(salora.param_groups(lr=1e-2, gate_lr=0.5))
for step in range(200):
    salora.begin_step(step / 200, optimizer)  # three graphs in all: before, in and after the window
    loss = F.cross_entropy(compiled(x), y)
    (loss + salora.penalty()).backward()
    optimizer.step(), salora.end_step(), optimizer.zero_grad()
    print("loss", loss.item())
print(ranks(model))
