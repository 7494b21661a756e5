"""
Runs that are killed, stopped, starved and run into each other lose nothing. KILLS=200 kills more
often than the 20 times of the default.
"""

import json
import math
import multiprocessing
import os
import random
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import salora as sl
import train_glue
from data import InputError
from training import runs

PLAIN = ["--threads", "1", "--limit-train", "224", "--limit-dev", "60", "--epochs", "3",
         "--log-every", "2", "--window", "0.2", "0.5"]
SHORT = [*PLAIN, "--save-every", "2"]
SCRIPT = [sys.executable, Path(train_glue.__file__)]


def in_a_process(flags, limit=None):
    """A running train_glue.py: a copy of this process, which has read torch already."""
    def work():
        os.setsid()
        sys.stdout = sys.stderr = open(os.devnull, "w")
        if limit:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        train_glue.command(list(map(str, flags)))

    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    return process


def wait_until(condition):
    end = time.time() + 60
    while not condition():
        assert time.time() < end, "it did not come to that"
        time.sleep(0.01)


def end_of(process):
    process.join(120)
    return process.exitcode


def traces(out):
    """What a run leaves, without its timings."""
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    names = "predictions.tsv", "adapter/adapter_model.safetensors"
    tensors = load_file(out / runs.CHECKPOINT)
    return ([{k: v for k, v in line.items() if k != "tokens_per_second"} for line in lines],
            {name: t.numpy().tobytes() for name, t in tensors.items()},
            *((out / name).read_bytes() for name in names))


def last_step(out):
    with safe_open(out / runs.CHECKPOINT, "pt") as f:
        return json.loads(f.metadata()["progress"])["step"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Two seeds without a disturbance: 21 steps each, the window from step 5 to 10, a checkpoint
    every second step. And how long they took."""
    out, start = tmp_path_factory.mktemp("whole") / "r", time.time()
    assert end_of(in_a_process([*SHORT, "--seeds", 0, 1, "--out", out])) == 0
    return out, time.time() - start


@pytest.mark.slow
def test_killed_at_random_moments_a_run_ends_in_the_same_bytes(whole, tmp_path):
    reference, seconds = whole
    rng, kills, ends = random.Random(os.environ.get("KILL_SEED", 0)), 0, 0
    while kills < int(os.environ.get("KILLS", 20)) or ends < 2:
        out, longest = tmp_path / f"r{ends}", 0.5 * seconds
        while not (out / "summary.json").exists():
            process = in_a_process([*SHORT, "--seeds", 0, 1, "--out", out, "--resume"])
            process.join(rng.uniform(0, longest))
            if process.is_alive():
                process.kill()
                kills += 1
                longest *= 1.1  # it ends, too, where the machine has become slower
            assert end_of(process) in (0, -signal.SIGKILL)
        for seed in ("seed0", "seed1"):
            assert traces(out / seed) == traces(reference / seed)
        ends += 1


@pytest.mark.parametrize("stop", [2, 8, 14])  # before, in and after the window, steps 5 to 10
@pytest.mark.slow
def test_the_optimizer_goes_on_with_its_moments(stop, tmp_path, monkeypatch):
    flags = [*PLAIN, "--epochs", "1", "--limit-train", "672", "--save-every", "2"]
    save, states = runs.save_checkpoint, {}

    def saved(folder, optimizer, lowrank, progress):
        save(folder, optimizer, lowrank, progress)
        params = [p for group in optimizer.param_groups for p in group["params"]]
        states[folder.parent.name, progress["step"]] = [
            {name: t.clone() for name, t in optimizer.state[p].items()} for p in params]
        if folder.parent.name == "cut" and progress["step"] == stop and not resuming:
            raise SystemExit

    monkeypatch.setattr(runs, "save_checkpoint", saved)
    resuming = []
    train_glue.main([*flags, "--out", str(tmp_path / "whole")])
    with pytest.raises(SystemExit):
        train_glue.main([*flags, "--out", str(tmp_path / "cut")])
    resuming.append(True)
    train_glue.main([*flags, "--out", str(tmp_path / "cut"), "--resume"])
    after = states["whole", stop + 2]
    assert len(after) == len(states["cut", stop + 2])
    for one, other in zip(after, states["cut", stop + 2]):
        assert one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)
    weights = [state for state in after if state]
    assert weights and all(state["step"] > 0 for state in weights)
    assert any(state["exp_avg"].any() and state["exp_avg_sq"].any() for state in weights)
    assert traces(tmp_path / "cut") == traces(tmp_path / "whole")


@pytest.mark.slow
def test_a_kill_while_a_checkpoint_is_renamed_leaves_one(tmp_path, whole, capsys, monkeypatch):
    """Before each of the calls that write it."""
    for place in range(4):
        out, calls = tmp_path / str(place), []

        def count(function, calls=calls, place=place):
            def counted(*args, **kw):
                if len(calls) >= 8 + place:  # in the third checkpoint
                    raise SystemExit
                calls.append(function)
                return function(*args, **kw)
            return counted

        with monkeypatch.context() as m:
            for module, name in ((runs, "save_file"), (os, "fsync"), (os, "replace")):
                m.setattr(module, name, count(getattr(module, name)))
            with pytest.raises(SystemExit):
                train_glue.main([*SHORT, "--out", str(out)])
        train_glue.main([*SHORT, "--out", str(out), "--resume"])
        assert "resumed at step" in capsys.readouterr().out
        assert traces(out) == traces(whole[0] / "seed0")


@pytest.mark.slow
@pytest.mark.parametrize("other", ["--r 4", "--r 2 --targets q v", "alpha"])
def test_resume_refuses_an_adapter_that_has_changed(other, tmp_path):
    def run(name, *flags):
        train_glue.main([*SHORT, "--limit-dev", "8", "--max-steps", "2", "--method", "lora",
                         "--out", str(tmp_path / name), *flags])

    run("start", "--r", "2")
    run("r", "--adapter", str(tmp_path / "start" / "adapter"))
    (tmp_path / "r" / "result.json").unlink()
    if other == "alpha":
        file = tmp_path / "start" / "adapter" / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | dict(lora_alpha=6)))
    else:
        run("start", *other.split(), "--overwrite")
    before = (tmp_path / "r" / runs.CHECKPOINT).read_bytes()
    with pytest.raises(InputError, match="--resume: --adapter .* has other matrices, ranks or sca"):
        run("r", "--adapter", str(tmp_path / "start" / "adapter"), "--resume")
    assert before == (tmp_path / "r" / runs.CHECKPOINT).read_bytes()


def test_a_power_cut_leaves_no_empty_file(tmp_path, monkeypatch):
    """What is renamed is on the disk before: the files of the adapter and of the run."""
    synced, moved = set(), set()
    fsync, replace = os.fsync, os.replace

    def noted(handle):
        synced.add(os.fstat(handle).st_ino)
        fsync(handle)

    def checked(new, old):
        assert os.stat(new).st_ino in synced, old
        moved.add(Path(old).name)
        replace(new, old)

    monkeypatch.setattr(os, "fsync", noted)
    monkeypatch.setattr(os, "replace", checked)
    train_glue.main([*PLAIN, "--max-steps", "2", "--limit-dev", "8", "--out", str(tmp_path / "r")])
    assert moved >= {"result.json", "predictions.tsv", runs.CHECKPOINT, "adapter_config.json",
                     "adapter_model.safetensors", "report.html"}


@pytest.mark.slow
def test_a_damaged_checkpoint_is_named_and_stays(tmp_path, capsys):
    out = tmp_path / "r"
    flags = [*SHORT, "--limit-dev", "20", "--max-steps", "3", "--out", str(out)]
    train_glue.main(flags)
    (out / "result.json").unlink()
    file = out / runs.CHECKPOINT
    whole, log = file.read_bytes(), (out / "log.jsonl").read_bytes()
    for data in (whole[:-100], whole[:100], b"", (2).to_bytes(8, "little") + b"{}"):
        file.write_bytes(data)
        capsys.readouterr()
        with pytest.raises(SystemExit, match="2"):
            train_glue.command([*flags, "--resume"])
        assert re.fullmatch(f"error: --resume: {file} is damaged .*--overwrite.*\n",
                            capsys.readouterr().err)
        assert (file.read_bytes(), (out / "log.jsonl").read_bytes()) == (data, log)
    train_glue.main([*flags, "--overwrite"])
    assert last_step(out) == 3


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_the_step_and_says_how_to_go_on(number, whole, tmp_path):
    out = tmp_path / "r"
    flags = [*PLAIN, "--out", out]  # nothing but the signal makes it save within an epoch
    process = subprocess.Popen([*SCRIPT, *flags], stdout=subprocess.DEVNULL,
                               stderr=subprocess.PIPE, text=True)
    wait_until(lambda: (out / "log.jsonl").exists()
               and len((out / "log.jsonl").read_text().splitlines()) > 1)
    process.send_signal(number)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert f"with --resume --out {out} goes on from the last checkpoint" in error
    lines = [line for line in error.splitlines() if not line.startswith("warning: ")]
    assert len(lines) == 1 and lines[0].startswith("error: ")
    step = last_step(out)
    assert f"stopped at step {step} of 21" in error
    assert end_of(in_a_process([*flags, "--resume"])) == 0
    plain = tmp_path / "plain"
    assert end_of(in_a_process([*flags[:-1], plain])) == 0
    assert traces(out) == traces(plain)


@pytest.mark.slow
def test_a_signal_while_the_last_epoch_is_scored_stops_before_the_next_seed(
        whole, tmp_path, monkeypatch, capsys):
    evaluate, calls = train_glue.evaluate, []

    def slow(*args):
        calls.append(0)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return evaluate(*args)

    monkeypatch.setattr(train_glue, "evaluate", slow)
    flags = [*SHORT, "--seeds", "0", "1", "--out", str(tmp_path / "r")]
    with pytest.raises(SystemExit) as e:
        train_glue.command(flags)
    assert e.value.code == 128 + signal.SIGTERM
    assert f"--resume --out {tmp_path / 'r'} goes on" in capsys.readouterr().err
    assert not (tmp_path / "r" / "seed1").exists()
    train_glue.main([*flags, "--resume"])
    assert traces(tmp_path / "r" / "seed0") == traces(whole[0] / "seed0")
    assert (tmp_path / "r" / "summary.json").exists()


@pytest.mark.slow
def test_a_full_disk_is_one_line_and_the_last_checkpoint_stays(whole, tmp_path):
    out = tmp_path / "r"
    process = in_a_process([*SHORT, "--out", out])
    wait_until((out / runs.CHECKPOINT).exists)
    process.terminate()
    assert end_of(process) == 128 + signal.SIGTERM
    before = (out / runs.CHECKPOINT).read_bytes()
    limit = 100_000, 100_000  # bytes of a file
    done = subprocess.run([*SCRIPT, *SHORT, "--out", out, "--resume"],
                          stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
                          preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limit))
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "large" in done.stderr
    assert "--resume goes on" in done.stderr
    assert before == (out / runs.CHECKPOINT).read_bytes()
    assert not list(out.glob("*.new"))
    assert end_of(in_a_process([*SHORT, "--out", out, "--resume"])) == 0
    assert traces(out) == traces(whole[0] / "seed0")


@pytest.mark.parametrize("error", [
    torch.OutOfMemoryError("CUDA out of memory"),
    RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
    MemoryError(),
])
def test_out_of_memory_says_which_flags_help(error, monkeypatch, capsys, tmp_path):
    def fails(*args):
        raise error

    monkeypatch.setattr(train_glue, "load_encoder", fails)
    with pytest.raises(SystemExit) as e:
        train_glue.command([*SHORT, "--out", str(tmp_path / "r")])
    text = capsys.readouterr().err
    assert e.value.code == 2 and text.count("\n") == 1
    assert all(flag in text for flag in ("--batch-size", "--accumulate", "--checkpoint-activations",
                                         "--dtype bfloat16", "--max-length"))


def test_a_bug_keeps_its_traceback(monkeypatch, tmp_path):
    monkeypatch.setattr(train_glue, "load_encoder", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train_glue.command([*SHORT, "--out", str(tmp_path / "r")])


@pytest.mark.slow
@pytest.mark.parametrize("what", ["loss", "density"])
def test_a_number_that_is_not_finite_ends_the_run_and_spares_the_checkpoint(
        what, tmp_path, capsys, monkeypatch):
    cross_entropy, density, calls = train_glue.F.cross_entropy, sl.SaLoRA.density, []

    def broken_loss(*args, **kw):
        calls.append(0)
        return cross_entropy(*args, **kw) * (math.nan if len(calls) == 10 else 1)

    if what == "loss":
        monkeypatch.setattr(train_glue.F, "cross_entropy", broken_loss)
    else:
        monkeypatch.setattr(sl.SaLoRA, "density", lambda self: (
            density(self) * (math.inf if self.begun is not None and self.step == 9 else 1)))
    with pytest.raises(SystemExit) as e:
        train_glue.command([*SHORT, "--out", str(tmp_path / "r")])
    text = capsys.readouterr().err
    assert e.value.code == 2 and text.count("\n") == 1 and "training diverged" in text
    assert "at step 9" in text and "learning rate of" in text
    assert last_step(tmp_path / "r") == 8
    assert all(t.isfinite().all() for t in load_file(tmp_path / "r" / runs.CHECKPOINT).values())


@pytest.mark.slow
def test_a_second_run_into_the_same_folder_is_refused(tmp_path, capsys):
    out = tmp_path / "r"
    first = in_a_process([*SHORT, "--epochs", 30, "--out", out])
    wait_until((out / runs.CHECKPOINT).exists)
    os.kill(first.pid, signal.SIGSTOP)
    before = {file: file.read_bytes() for file in out.rglob("*") if file.is_file()}
    for more in ([], ["--resume"], ["--overwrite"]):
        with pytest.raises(SystemExit) as e:
            train_glue.command([*SHORT, "--epochs", "30", "--out", str(out), *more])
        assert e.value.code == 2
        assert f"--out {out}: another run is writing into it" in capsys.readouterr().err
    assert before == {file: file.read_bytes() for file in out.rglob("*") if file.is_file()}
    first.kill()
    end_of(first)
    train_glue.main([*SHORT, "--out", str(out), "--overwrite"])  # the lock went with its process


def test_a_folder_that_cannot_be_written_is_named(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit) as e:
        train_glue.command([*SHORT, "--out", str(tmp_path / "file" / "r")])
    assert e.value.code == 2
    assert f"error: --out {tmp_path}/file/r: cannot be written" in capsys.readouterr().err
