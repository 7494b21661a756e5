import os
import sys
from pathlib import Path

# On the CPU also where there is a GPU: tests compare bytes, and start two processes at a time.
# CUDA_VISIBLE_DEVICES=0 python -m pytest tries a GPU.
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")

import torch  # noqa: E402

# the modules are files beside this folder, nothing is installed
sys.path.insert(0, str(Path(__file__).parent.parent))
torch.set_num_threads(1)  # the models are tiny: a second thread only waits
