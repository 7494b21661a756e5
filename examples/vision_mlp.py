import torch
import torch.nn.functional as F
from salora import SaLoRA, ranks

images, labels = torch.randn(512, 1, 16, 16), torch.randint(10, (512,))
model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(256, 128), torch.nn.ReLU(), torch.nn.Linear(128, 10))
salora = SaLoRA(model, targets=["1", "3"], r=8, budget=0.5)
optimizer = torch.optim.AdamW(salora.param_groups(lr=1e-2, gate_lr=0.5))
for step in range(200):
    salora.begin_step(step / 200, optimizer)
    loss = F.cross_entropy(model(images), labels)
    (loss + salora.penalty()).backward()
    optimizer.step(), salora.end_step(), optimizer.zero_grad()
    print("loss", loss.item())
print(ranks(model))
