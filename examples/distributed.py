import torch  # torchrun --nproc-per-node 2 distributed.py
from salora import SaLoRA, average_gradients

torch.distributed.init_process_group("gloo")
torch.manual_seed(0)  # the same model everywhere; then each process has a part of the data
model, rank = torch.nn.Sequential(torch.nn.Linear(32, 64), torch.nn.ReLU(), torch.nn.Linear(64, 5)), torch.distributed.get_rank()
x, y = torch.randn(2, 128, 32)[rank], torch.randint(5, (2, 128))[rank]
salora = SaLoRA(model, targets=["0", "2"], r=4, budget=0.5)
parallel = torch.nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)  # it will not know the tensors that are cut
optimizer = torch.optim.AdamW(salora.param_groups(lr=1e-2, gate_lr=0.5))
for step in range(200):
    salora.begin_step(step / 200, optimizer)
    loss = torch.nn.functional.cross_entropy(parallel(x), y)
    (loss + salora.penalty()).backward(), average_gradients(optimizer)
    optimizer.step(), salora.end_step(), optimizer.zero_grad(), print("loss", loss.item())
torch.distributed.destroy_process_group()  # or its threads may outlive the interpreter, which then aborts
