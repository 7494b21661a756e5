"""A network for images: a DataLoader, a score, a new head, and a plain model at the end."""

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, TensorDataset

from salora import SaLoRA, merge, rank_map, ranks

torch.manual_seed(0)
images = torch.randn(1024, 1, 16, 16)
labels = (images[..., :8].mean((1, 2, 3)) > images[..., 8:].mean((1, 2, 3))).long()  # left, right
train = DataLoader(TensorDataset(images[:768], labels[:768]), batch_size=64, shuffle=True)

model = torch.nn.Sequential(  # in your case: a pretrained one
    torch.nn.Flatten(),
    torch.nn.Linear(256, 128),
    torch.nn.ReLU(),
    torch.nn.Linear(128, 128),
    torch.nn.ReLU(),
    torch.nn.Linear(128, 2),
)
epochs = 15
salora = SaLoRA(model, targets=["1", "3"], steps=epochs * len(train), r=8, budget=0.5)
model[5].requires_grad_(True)  # a new head, before param_groups()
optimizer = torch.optim.AdamW(salora.param_groups(lr=1e-2))

for epoch in range(epochs):
    model.train()
    for x, y in train:
        salora.begin_step()
        loss = F.cross_entropy(model(x), y) + salora.penalty()
        loss.backward()
        optimizer.step()
        salora.end_step(optimizer)
        optimizer.zero_grad()
    model.eval()
    with torch.no_grad():
        right = (model(images[768:]).argmax(1) == labels[768:]).float().mean().item()
    print(f"epoch {epoch + 1}: loss {loss.item():.4f}, accuracy {right:.2f}")

print(rank_map(ranks(model), r=8))
merge(model)  # plain nn.Linear modules again
