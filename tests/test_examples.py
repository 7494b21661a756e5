"""examples/, executed as printed beside a lone copy of salora.py: what somebody does who copies it."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import salora as sl

EXAMPLES = Path(sl.__file__).parent / "examples"


@pytest.mark.parametrize("name", sorted(path.name for path in EXAMPLES.glob("*.py")))
def test_example_runs_beside_a_lone_copy_of_the_file(name, tmp_path):
    if name.startswith("transformers") and not importlib.util.find_spec("transformers"):
        pytest.skip("transformers is not installed: pip install -r requirements-oracles.txt")
    assert len([line for line in (EXAMPLES / name).read_text().splitlines() if line]) <= 15
    shutil.copy(sl.__file__, tmp_path), shutil.copy(EXAMPLES / name, tmp_path)
    start = [sys.executable] if name != "distributed.py" else [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | dict(OMP_NUM_THREADS="1")
    for _ in range(6):
        done = subprocess.run([*start, name], cwd=tmp_path, capture_output=True, text=True, env=env, timeout=300)
        if "terminate called without an active exception" not in done.stderr:
            break  # or a thread of torch's gloo outlived the interpreter, which happens on a busy machine: once more
    assert done.returncode == 0, done.stderr
    losses = [float(number) for number in re.findall(r"\d+\.\d+", done.stdout)]  # two processes may write into each other's line
    assert len(losses) >= 200 and losses[-1] < 0.9 * losses[0]
