import sys
from pathlib import Path

import torch

# the modules are files beside this folder, nothing is installed
sys.path.insert(0, str(Path(__file__).parent.parent))
torch.set_num_threads(1)  # the models are tiny: a second thread only waits
