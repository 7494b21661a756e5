"""
examples/, executed as printed beside a lone copy of salora.py: what somebody does who copies it.
Those that save an adapter need the whole project.
"""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import salora as sl

ROOT = Path(sl.__file__).parent
NEEDS = {  # other people's packages
    "accelerate_loop.py": ["accelerate"],
    "hf_trainer.py": ["transformers", "accelerate"],
    "transformers_bert.py": ["transformers"],
    "transformers_llama.py": ["transformers"],
}
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
ALL = sorted(path.name for path in (ROOT / "examples").glob("*.py"))


def case(name):
    return pytest.param(name, id=f"oracle-{name}" if name in NEEDS else name,
                        marks=[] if name == "vision_mlp.py" else pytest.mark.slow)


@pytest.mark.parametrize("name", [case(name) for name in ALL])
def test_example_runs(name, tmp_path):
    for package in NEEDS.get(name, []):
        if not importlib.util.find_spec(package):
            pytest.skip(f"{package} is not installed: pip install -r requirements-oracles.txt")
    text = (ROOT / "examples" / name).read_text()
    assert all(len(line) <= 100 for line in text.splitlines())
    saves = "\nimport adapter\n" in text
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    env["OMP_NUM_THREADS"] = "1"
    if saves:
        env["PYTHONPATH"] = str(ROOT)
    else:
        shutil.copy(ROOT / "salora.py", tmp_path)
    shutil.copy(ROOT / "examples" / name, tmp_path)
    start = [sys.executable] + (TORCHRUN if name == "distributed.py" else [])
    for _ in range(6):
        done = subprocess.run([*start, name], cwd=tmp_path, capture_output=True, text=True, env=env,
                              timeout=300)
        if "terminate called without an active exception" not in done.stderr:
            break
        # a thread of torch's gloo outlived the interpreter, as happens on a busy machine: once more
    assert done.returncode == 0, done.stderr
    losses = [float(number) for number in re.findall(r"^(?:step|epoch) \d+: loss ([\d.]+)",
                                                     done.stdout, re.MULTILINE)]
    assert len(losses) >= 10 and losses[-1] < losses[0] / 2
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists() == saves
    assert ("\nadapter/" in done.stdout) == saves and len(done.stdout.splitlines()) < 40
    left = {path.name for path in tmp_path.iterdir()} - {name, "salora.py", "__pycache__"}
    assert left == ({"adapter"} if saves else set())
