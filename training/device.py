"""
The device of a run. What is different on a GPU stands here, to be checked by eye, but for three
things: data/batching.py's send() pins memory, model.py writes dropout and attention out for CPUs,
and random generators are made on the device of what they draw.
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
    """Checks --device; "auto" is replaced by its name, and --no-tf32 is implied on a CPU."""
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
         f"a GPU that is there ({count} found); use --device cpu")
    need(PROCESSES == 1 or args.device in ("cpu", "cuda"), "--device", args.device,
         "cpu or cuda under torchrun: each process takes a GPU of its own")
    args.tf32 = args.tf32 and device.type == "cuda"


def own_device(args):
    """The torch.device of this process, after find_device(). A GPU is made the current one, with
    its peak memory count reset and the products of --no-tf32."""
    device = torch.device(args.device)
    if device.type == "cuda":
        device = torch.device("cuda", LOCAL_RANK if PROCESSES > 1 else device.index or 0)
        torch.cuda.set_device(device)  # which wants the number
        torch.cuda.reset_peak_memory_stats(device)
        torch.set_float32_matmul_precision("high" if args.tf32 else "highest")
    return device


def join_processes(args):
    """Under torchrun: opens the connection of this process to the others."""
    if PROCESSES > 1:
        dist.init_process_group("nccl" if args.device == "cuda" else "gloo")


def peak_memory_mb(device):
    """Of the GPU, or of the whole process, since the run began."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
