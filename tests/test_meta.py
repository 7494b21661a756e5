"""
What can be shown of a GPU without one. Whole runs are on torch's meta device, which has shapes and
no numbers: there a step that reads a value back, for which a host would wait for its GPU, is an
error, and so is a tensor left on the CPU. torch.compile's graphs are counted.
"""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import salora as sl
import train_glue
import train_instruct
from data.glue import HERE
from training import device, loop

DEMO = HERE / "demo"
METHODS = [(train_glue, method) for method in train_glue.METHODS]
METHODS += [(train_instruct, "salora"), (train_instruct, "lora")]


class Trained(Exception):
    """The run has come to its first evaluation, which reads outputs back."""


class OneDevice(TorchDispatchMode):
    """Some operators take a CPU tensor beside one on meta. On a GPU it would be an error, or a copy
    to wait for."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        devices = {x.device.type for x in tree_leaves((args, kwargs))
                   if torch.is_tensor(x) and x.dim()}
        if len(devices) > 1 and func.overloadpacket != torch.ops.aten.copy_:
            raise RuntimeError(f"{func} of tensors on {' and '.join(sorted(devices))}")
        return func(*args, **kwargs or {})


@pytest.fixture(scope="module")
def one_layer(tmp_path_factory):
    """The demo's models, cut to their first layer: {name: folder}."""
    folders = {}
    for name in ("model", "llama"):
        folder = folders[name] = tmp_path_factory.mktemp("one_layer") / name
        shutil.copytree(DEMO / name, folder)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | dict(num_hidden_layers=1)))
        tensors = load_file(folder / "model.safetensors")
        save_file({key: t for key, t in tensors.items()
                   if not any(f"{stack}.{i}." in key for stack in ("layer", "layers")
                              for i in range(1, config["num_hidden_layers"]))},
                  folder / "model.safetensors")
    return folders


def evaluate(*args):
    raise Trained


@pytest.fixture
def meta(monkeypatch):
    """Runs are on meta, and go past what may read back: the log, the check of a first step, the
    choice at the cut (half of the triplets stay), evaluation, where the run ends."""
    def prune(layer, keep, optimizer, cut=sl.SaLoRALinear.prune):
        with monkeypatch.context() as m:
            index = torch.arange(len(keep) // 2, device="meta")
            m.setattr(torch.Tensor, "nonzero", lambda keep: index.unsqueeze(1))
            cut(layer, keep, optimizer)

    def end(salora, optimizer, prune=sl.SaLoRA.prune):
        with monkeypatch.context() as m:
            m.setattr(torch.Tensor, "item", lambda density: salora.budget)
            m.setattr(sl, "largest", lambda scores, *rest: scores > 0)
            prune(salora, optimizer)

    def check(salora, optimizer, check=sl.check_step):
        if not salora.in_window:  # there it reads the sign of lambda, twice a run
            check(salora, optimizer)

    def begin(salora, check=sl.check_begin):
        with monkeypatch.context() as m:
            m.setattr(torch, "equal", lambda *tensors: True)  # at step 0 it looks for a step
            check(salora)

    def fit(*args, fit=loop.fit):
        with OneDevice():
            return fit(*args)

    monkeypatch.setattr(sl.SaLoRALinear, "prune", prune)
    monkeypatch.setattr(sl.SaLoRA, "prune", end)
    monkeypatch.setattr(sl, "check_step", check)
    monkeypatch.setattr(sl, "check_begin", begin)
    monkeypatch.setattr(loop.runs, "source_of", lambda *args: 0)
    monkeypatch.setattr(loop.Log, "write", lambda *args: None)
    monkeypatch.setattr(loop.Log, "write_gates", lambda *args: None)
    monkeypatch.setattr(loop, "fit", fit)
    for script in (train_glue, train_instruct):
        monkeypatch.setattr(script, "own_device", lambda args: torch.device("meta"))
        monkeypatch.setattr(script, "evaluate", evaluate)
    adamw = torch.optim.AdamW  # meta has no fused one
    monkeypatch.setattr(torch.optim, "AdamW", lambda *args, fused, **kw: adamw(*args, **kw))


def train(script, one_layer, out, *flags):
    """Three steps of two forward passes: before the window, in it with the cut at its end, after
    it."""
    source = ["--model", str(one_layer["model"])]
    if script is train_instruct:
        source = ["--model", str(one_layer["llama"]), "--data", str(DEMO / "instruct.jsonl"),
                  "--generate", "0"]
    args = script.parse_args([
        *source, "--accumulate", "2", "--batch-size", "4", "--max-steps", "3", "--targets", "q",
        "d", "--window", "0.3", "0.6", "--limit-train", "24", "--limit-dev", "8", *flags])
    args.command = ""
    with pytest.raises(Trained):
        script.train(args, 0, out)


@pytest.mark.parametrize("dtype, more", [
    pytest.param("float32", [], id="float32", marks=pytest.mark.slow),
    pytest.param("bfloat16", ["--checkpoint-activations"], id="bfloat16")])
@pytest.mark.parametrize("script, method", METHODS)
def test_steps_stay_on_the_device(meta, one_layer, tmp_path, script, method, dtype, more):
    if method == "ft" and dtype == "bfloat16":
        pytest.skip("there is no autocast on meta")
    train(script, one_layer, tmp_path, "--method", method, "--dtype", dtype, *more)


@pytest.mark.slow
@pytest.mark.parametrize("method, expected", [("lora", 1), ("salora", 3)])
@pytest.mark.parametrize("script", [train_glue, train_instruct])
def test_compiled_graphs_are_whole_and_few(monkeypatch, one_layer, tmp_path, script, method,
                                           expected):
    """One before the window, one in it, one after the cut; none for a length or a rank."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **kw: compiled(
        function, backend=backend, fullgraph=True, **kw))
    monkeypatch.setattr(script, "evaluate", evaluate)
    torch._dynamo.reset()
    train(script, one_layer, tmp_path, "--method", method, "--compile", "--threads", "1")
    assert len(graphs) == expected


@pytest.mark.parametrize("flags, processes, number, precision", [
    ([], 1, 0, "high"), (["--device", "cuda"], 1, 0, "high"),
    (["--device", "cuda:1"], 1, 1, "high"),
    (["--no-tf32"], 1, 0, "highest"), ([], 2, 1, "high")])
def test_a_gpu_that_is_there_is_used(monkeypatch, capsys, flags, processes, number, precision):
    """What is asked of torch.cuda, which is not there itself."""
    taken = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch._C, "_cuda_setDevice", taken.append, raising=False)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)
    monkeypatch.setattr(device, "PROCESSES", processes)
    monkeypatch.setattr(device, "LOCAL_RANK", number)
    args = train_glue.parse_args(flags)
    before = torch.get_float32_matmul_precision()
    try:
        assert device.own_device(args) == torch.device("cuda", number) and taken == [number]
        assert torch.get_float32_matmul_precision() == precision
    finally:
        torch.set_float32_matmul_precision(before)
    assert args.tf32 == (precision == "high")
    loop.announce(args, dict(tf32=args.tf32), "")
    assert args.tf32 == ("TensorFloat-32" in capsys.readouterr().out)


def test_a_cpu_computes_in_full():
    args = train_glue.parse_args(["--device", "cpu"])
    assert not args.tf32 and device.own_device(args) == torch.device("cpu")
    assert torch.get_float32_matmul_precision() == "highest"
