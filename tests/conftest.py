import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))  # the modules are files beside this folder, nothing is installed
torch.set_num_threads(1)  # the models are tiny: a second thread only waits
