"""
The device of a run. Everything that differs on a GPU is in this file, with three exceptions:
data/batching.py's send() pins memory, model.py has its own dropout and attention for CPUs, and
random generators are made on the device they draw on.
"""

import os
import resource
import sys

import torch
import torch.distributed as dist

from data import need

RANK = int(os.environ.get("RANK", 0))  # these three are set by torchrun
LOCAL_RANK = int(os.environ.get("LOCAL_RANK", 0))  # on this machine
PROCESSES = int(os.environ.get("WORLD_SIZE", 1))


def find_device(args):
    """Checks --device, replaces "auto" by what it stands for, and turns TF32 off on a CPU."""
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(args.device)
    except RuntimeError:
        device = None
    need(device is not None and device.type in ("cpu", "cuda"), "--device", repr(args.device),
         "auto, cpu, cuda or cuda:i")
    count = torch.cuda.device_count()
    need(device.type == "cpu" or (device.index or 0) < count, "--device", args.device,
         f"an available GPU ({count} found); use --device cpu")
    need(PROCESSES == 1 or args.device in ("cpu", "cuda"), "--device", args.device,
         "cpu or cuda under torchrun: each process takes a GPU of its own")
    args.tf32 = args.tf32 and device.type == "cuda"


def own_device(args):
    """The torch.device of this process, after find_device(). Makes a GPU the current one, resets
    its peak memory count, and applies --no-tf32."""
    device = torch.device(args.device)
    if device.type == "cuda":
        device = torch.device("cuda", LOCAL_RANK if PROCESSES > 1 else device.index or 0)
        torch.cuda.set_device(device)  # needs the index
        torch.cuda.reset_peak_memory_stats(device)
        torch.set_float32_matmul_precision("high" if args.tf32 else "highest")
    return device


def join_processes(args):
    """Under torchrun: connects this process to the others."""
    if PROCESSES > 1:
        dist.init_process_group("nccl" if args.device == "cuda" else "gloo")


def peak_memory_mb(device):
    """Peak since the run began, in MiB: of the GPU, or of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
