"""A loop with Hugging Face's Accelerate, with gradient accumulation.

It also runs as it is in several processes, with `accelerate launch`.

    PYTHONPATH=. python examples/accelerate_loop.py    # adapter.py needs the whole project
"""

import math

import torch
import torch.nn.functional as F
from accelerate import Accelerator, DistributedDataParallelKwargs
from torch.utils.data import DataLoader, TensorDataset

import adapter
from salora import SaLoRA, average_gradients, ranks

accumulate = 2
accelerator = Accelerator(
    gradient_accumulation_steps=accumulate,
    # DistributedDataParallel does not know the tensors that the cut makes
    kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
)
torch.manual_seed(0)  # the same model everywhere
x = torch.randn(512, 32)
y = (x[:, :4].sum(1) > 0).long()
loader = accelerator.prepare(DataLoader(TensorDataset(x, y), batch_size=32, shuffle=True))
model = torch.nn.Sequential(  # in your case: a pretrained one
    torch.nn.Linear(32, 64),
    torch.nn.ReLU(),
    torch.nn.Linear(64, 64),
    torch.nn.ReLU(),
    torch.nn.Linear(64, 2),
)
model.to(accelerator.device)  # before SaLoRA, which puts its gates there

epochs = 24
steps = epochs * math.ceil(len(loader) / accumulate)  # len(loader): batches of this process
salora = SaLoRA(model, targets=["0", "2"], steps=steps, r=4, budget=0.5)
optimizer = torch.optim.AdamW(salora.param_groups(lr=1e-2))
model, optimizer = accelerator.prepare(model, optimizer)

for epoch in range(epochs):
    for inputs, labels in loader:
        with accelerator.accumulate(model):
            salora.begin_step()
            loss = F.cross_entropy(model(inputs), labels)
            # backward() divides by the number of accumulated batches, so the penalty counts once
            accelerator.backward(loss + salora.penalty())
            if accelerator.sync_gradients:  # the last of the accumulated batches
                average_gradients(optimizer)
                optimizer.step()
                salora.end_step(optimizer)
                optimizer.zero_grad()
    accelerator.print(f"epoch {epoch + 1}: loss {loss.item():.4f}")

trained = accelerator.unwrap_model(model)
accelerator.print(ranks(trained))
if accelerator.is_main_process:
    adapter.save(trained, "adapter", budget=salora.budget)
    print("adapter/: written for PEFT")
accelerator.end_training()
