import torch
import torch.nn.functional as F
from salora import SaLoRA, ranks

x, y = torch.randn(256, 32), torch.randn(256, 4)
model = torch.nn.Sequential(torch.nn.Linear(32, 64), torch.nn.Tanh(), torch.nn.Linear(64, 4))
salora = SaLoRA(model, targets=["0", "2"], r=4, budget=0.5)
optimizer = torch.optim.SGD(salora.param_groups(lr=0.1, gate_lr=20.0, weight_decay=0.0), momentum=0.9)  # the gradients of gates are small
for step in range(300):
    salora.begin_step(step / 300, optimizer)
    loss = F.mse_loss(model(x), y)
    (loss + salora.penalty()).backward()
    optimizer.step(), salora.end_step(), optimizer.zero_grad()
    print("loss", loss.item())
print(ranks(model))
