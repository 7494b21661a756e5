"""
examples/, executed as printed beside a lone copy of salora.py: what somebody does who copies it.
Those that save an adapter have the files beside it that README names.
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


@pytest.mark.slow
@pytest.mark.parametrize("name", [
    pytest.param(name, id=f"oracle-{name}" if name in NEEDS else name) for name in ALL])
def test_example_runs(name, tmp_path):
    for package in NEEDS.get(name, []):
        if not importlib.util.find_spec(package):
            pytest.skip(f"{package} is not installed: pip install -r requirements-oracles.txt")
    text = (ROOT / "examples" / name).read_text()
    assert all(len(line) <= 100 for line in text.splitlines())
    saves = "\nimport adapter\n" in text
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    env["OMP_NUM_THREADS"] = "1"
    more = ["adapter.py", "model.py", "data/__init__.py"] if saves else []
    for file in ["salora.py", *more]:
        (tmp_path / file).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / file, tmp_path / file)
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
    left = {path.name for path in tmp_path.iterdir()} - {
        name, "salora.py", "adapter.py", "model.py", "data", "__pycache__"}
    assert left == ({"adapter"} if saves else set())


@pytest.mark.slow
def test_oracle_trainer_goes_on_from_its_own_checkpoints_before_and_after_the_cut(tmp_path):
    pytest.importorskip("transformers")
    env = os.environ | dict(PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1")

    def run():
        done = subprocess.run([sys.executable, ROOT / "examples" / "hf_trainer.py", "folder"],
                              cwd=tmp_path, capture_output=True, text=True, env=env, timeout=300)
        assert done.returncode == 0, done.stderr
        return done.stdout

    whole = run()
    for last in (200, 160):  # goes on from 160, then from 80; the window is steps 100 to 119
        shutil.rmtree(tmp_path / "folder" / f"checkpoint-{last}")
        shutil.rmtree(tmp_path / "folder" / "checkpoint-200", ignore_errors=True)
        assert run() == whole


@pytest.mark.slow
def test_processes_that_do_not_average_their_gradients_are_told(tmp_path):
    text = (ROOT / "examples" / "distributed.py").read_text()
    assert "    average_gradients(optimizer)" in text
    (tmp_path / "alone.py").write_text(text.replace("    average_gradients(optimizer)", "    #"))
    env = os.environ | dict(PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1")
    done = subprocess.run([sys.executable, *TORCHRUN, "alone.py"], cwd=tmp_path, env=env,
                          capture_output=True, text=True, timeout=300)
    assert done.returncode and "call average_gradients(optimizer)" in done.stderr
