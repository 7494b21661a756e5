"""Several processes with DistributedDataParallel.

    torchrun --nproc-per-node 2 distributed.py

All processes have to draw and keep the same gates: give SaLoRA the same seed everywhere."""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

from salora import SaLoRA, average_gradients, ranks

dist.init_process_group("gloo")
rank = dist.get_rank()
torch.manual_seed(0)  # the same model everywhere; then each process has a part of the data
x = torch.randn(dist.get_world_size(), 128, 32)
y = (x[:, :, :4].sum(2) > 0).long()
x, y = x[rank], y[rank]
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
# otherwise it would wait for gradients of tensors that the cut has replaced
parallel = DistributedDataParallel(model, find_unused_parameters=True)

for step in range(steps):
    salora.begin_step()
    loss = F.cross_entropy(parallel(x), y) + salora.penalty()
    loss.backward()
    average_gradients(optimizer)  # of log theta, and of the tensors after the cut
    optimizer.step()
    salora.end_step(optimizer)
    optimizer.zero_grad()
    if rank == 0 and (step % 20 == 0 or step == steps - 1):
        print(f"step {step}: loss {loss.item():.4f}")

if rank == 0:
    print(ranks(model))
dist.destroy_process_group()  # or its threads may outlive the interpreter, which then aborts
