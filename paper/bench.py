"""
Measures what SaLoRA costs. Compare only rows of one table: they are measured by turns, in one run
on one machine.

    python paper/bench.py                              # step, on the demo: half a minute
    python paper/bench.py step loop --task cola --model DIR --data DIR --json > speed.json

step       ms per training step on the same batches: LoRA, SaLoRA in its window, SaLoRA pruned
loop       examples per second of train_glue.py over an epoch, and peak memory; with --peers PYTHON,
           from an environment for it, also of other people's code (peers.py) on CoLA
start      seconds from the command to the end of the second step of train_glue.py
size       ms per step on random models by rank, targets, length and width
memory     estimates for RoBERTa-large, SmolLM2-135M and LLaMA-7B; nothing is run
gpu        on a CUDA GPU, RoBERTa-base and -large with random weights: ms and peak memory of a step
           by method and batch size (Table 4); also of transformers with PEFT, if installed
gpu-llama  on a CUDA GPU, LLaMA-7B with random weights: memory, training, decoding
"""

import gc
import json
import math
import os
import platform
import subprocess
import sys
import tempfile
import time
from contextlib import redirect_stdout
from functools import partial
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from statistics import median

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # for the modules beside this folder

import baselines
from data.batching import batch_order, collate, load_tokenizer, tokenize
from data.glue import HERE, load_task
from model import Decoder, DecoderConfig, Encoder, EncoderConfig, load_encoder, read_config
from salora import GAMMA, ZETA, SaLoRA
from training.flags import at_least, new_parser, use_machine
from training.loop import token_losses
from training.runs import markdown, run_command

# -------------------------------------------------------------------------------------------------
# step and size: in this process


class Operators(TorchDispatchMode):
    """Counts the operators that compute something: about the number of kernels on a GPU."""
    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not func.is_view:
            self.count += 1
        return func(*args, **kwargs or {})


def classify(model, inputs, labels):
    return F.cross_entropy(model(*inputs), labels)


def make_step(model, kind, r=8, targets="qkvoud", loss_of=classify):
    """step(inputs, labels), a training step of full fine-tuning, LoRA, AdaLoRA, SaLoRA in its
    window, or SaLoRA pruned to b = 0.5. The window lasts from the second step to the end, which no
    measurement reaches."""
    torch.manual_seed(0)
    device, paths, steps = next(model.parameters()).device, model.target_paths(targets), 10**9
    if kind in baselines.METHODS:
        method = baselines.install(model, kind, paths, steps, r, window=(0, 1))
    else:
        method = SaLoRA(model, paths, steps, r, budget=0.5, window=(0, 1), turn=kind == "salora")
    for module in getattr(model, "head", ()):
        module.requires_grad_(True)
    params = [p for p in model.parameters() if p.requires_grad]
    if isinstance(method, SaLoRA):
        params = method.param_groups(1e-3)
    optimizer = torch.optim.AdamW(params, 1e-3, fused=True)

    def step(inputs, labels):
        if method:
            method.begin_step()
        loss = loss_of(model, inputs, labels)
        if method and kind != "lora":
            loss = loss + method.penalty()
        loss.backward()
        optimizer.step()
        if method:
            method.end_step(optimizer)
        optimizer.zero_grad()

    if kind == "pruned":
        with torch.no_grad():  # uneven ranks, as learned gates leave them; about half are open
            generator = torch.Generator(device).manual_seed(0)
            method.log_theta.normal_(math.log(-GAMMA / ZETA), generator=generator)
        method.prune(optimizer)
    model.train()
    return step


def time_steps(steps, batches, repeats, block):
    """[median ms, median of the ratios to the first system, its standard error] of each system. The
    systems take turns, `block` steps each; a ratio is that of neighboring turns."""
    wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    seconds = np.zeros((repeats, len(steps)))
    for i in range(-1, repeats):  # round -1 warms up
        for j, step in enumerate(steps):
            wait()
            start = time.perf_counter()
            for k in range(block):
                step(*batches[(i * block + k) % len(batches)])
            wait()
            seconds[i, j] = time.perf_counter() - start
    ratios = seconds / seconds[:, :1]
    error = 1.25 * ratios.std(0) / repeats ** 0.5  # of the median
    return zip(1000 / block * np.median(seconds, 0), np.median(ratios, 0), error)


KINDS = {"lora": "LoRA", "salora": "SaLoRA, in the window", "pruned": "SaLoRA, pruned to b = 0.5"}


def bench_step(args):
    task, rows, _ = load_task(args.task, args.data)
    config = read_config(args.model)
    tokens = tokenize(load_tokenizer(args.model), rows.texts, 128, config.vocab_size)
    order = batch_order([len(ids) for ids, _ in tokens], 32, np.random.default_rng(0))
    labels = torch.tensor(rows.labels)
    batches = [
        (collate([tokens[i] for i in batch], config.pad_token_id, args.device),
         labels[batch].to(args.device)) for batch in order[1:101]]  # without the longest
    steps = [make_step(load_encoder(args.model, task.num_labels).to(args.device), kind)
             for kind in KINDS]
    times = time_steps(steps, batches, args.repeats * 10, 5)
    table = []
    for kind, step, (ms, ratio, error) in zip(KINDS, steps, times):
        with Operators() as seen:
            step(*batches[0])
        table.append({"step": KINDS[kind], "ms": round(ms, 2), "ratio": round(ratio, 3),
                      "± standard error": round(error, 3), "operators": seen.count})
    return table


def bench_size(args):
    base = dict(r=8, targets="qkvoud", length=16, width=384)
    changes = [{}, dict(r=2), dict(r=32), dict(targets="qv"), dict(targets="qkvo"),
               dict(length=64), dict(length=128), dict(width=192), dict(width=768)]
    table = []
    for change in changes:
        row = base | change
        r, targets, length, width = row.values()
        config = EncoderConfig(
            "roberta", vocab_size=1000, hidden_size=width, num_hidden_layers=6,
            num_attention_heads=width // 32, intermediate_size=4 * width,
            max_position_embeddings=length + 2, type_vocab_size=1)
        ids = torch.randint(2, 1000, (32, length), device=args.device)
        labels = torch.zeros(32, dtype=torch.long, device=args.device)
        steps = [make_step(Encoder(config, 2).to(args.device), kind, r, targets) for kind in KINDS]
        times = time_steps(steps, [((ids, None, None), labels)], args.repeats * 3, 3)
        for kind, (ms, ratio, _) in zip(KINDS, times):
            row[f"{kind} ms"] = round(float(ms), 1)
            if kind != "lora":
                row[f"{kind} ratio"] = round(float(ratio), 3)
        table.append(row)
    return table


# -------------------------------------------------------------------------------------------------
# loop and start: train_glue.py, as a user runs it


def run_script(args, *flags):
    """{examples per second, peak MB, start} of train_glue.py. start: seconds to the log's end."""
    command = [sys.executable, ROOT / "train_glue.py", "--task", args.task, "--model", args.model]
    command += ["--epochs", 1, "--lr", 1e-3, "--limit-dev", 32, "--threads", args.threads, *flags]
    if args.data:
        command += ["--data", args.data]
    with tempfile.TemporaryDirectory() as folder:
        out, start = Path(folder) / "run", time.time()
        command += ["--out", out]
        subprocess.run([str(word) for word in command], check=True, stdout=subprocess.DEVNULL)
        result = json.loads((out / "result.json").read_text())
        logged = (out / "log.jsonl").stat().st_mtime
    return dict(examples=result["examples_per_second"], mb=result["peak_memory_mb"],
                start=logged - start)


def take_turns(systems, repeats):
    """{name: {column: median}} of functions that return {column: number}, called in turns."""
    found = {name: [] for name in systems}
    for _ in range(repeats):
        for name, system in systems.items():
            found[name].append(system())
    return {name: {key: median(row[key] for row in rows) for key in rows[0]}
            for name, rows in found.items()}


def bench_loop(args):
    def peer(system):
        command = [args.peers, ROOT / "paper" / "peers.py", system, "--model", args.model, "--data",
                   args.data, "--threads", str(args.threads)]
        out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        return json.loads(out.splitlines()[-1])

    systems = {}
    if args.peers:
        peers = {"floor": "forward and input gradient alone", "trainer": "Trainer + PEFT LoRA",
                 "grouped": "the same, grouped by length", "adalora": "Trainer + PEFT AdaLoRA"}
        systems |= {title: partial(peer, name) for name, title in peers.items()}
    for method in ("lora", "salora"):
        title = f"train_glue.py --method {method}"
        systems[title] = partial(run_script, args, "--method", method)
    return [{"system": name, "examples/s": round(row["examples"], 1), "peak MB": round(row["mb"])}
            for name, row in take_turns(systems, args.repeats).items()]


def bench_start(args):
    flags = ["--max-steps", 2, "--window", 0, 1]
    systems = {m: partial(run_script, args, "--method", m, *flags) for m in ("lora", "salora")}
    return [{"method": name, "seconds to the second step": round(row["start"], 2)}
            for name, row in take_turns(systems, args.repeats).items()]


# -------------------------------------------------------------------------------------------------
# memory: estimates


def kept_by_encoder_layer(d, i, size, mask=1):
    """Bytes per token that a layer keeps for the backward pass, if numbers have `size` bytes and
    dropout masks `mask`: x, q, k, v, attention, inputs of both norms, output of the first; input
    and output of GELU."""
    return (8 * d + 2 * i) * size + 2 * d * mask


def kept_by_llama_layer(d, i, size):
    """Inputs of both norms in float32; their outputs, q, k and v (of all heads), attention; gate,
    SiLU, up and their product."""
    return 2 * d * 4 + (6 * d + 4 * i) * size


ROBERTA = {
    "RoBERTa-base": dict(hidden_size=768, num_hidden_layers=12, num_attention_heads=12,
                         intermediate_size=3072),
    "RoBERTa-large": dict(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16,
                          intermediate_size=4096)}
ROBERTA_REST = dict(vocab_size=50265, max_position_embeddings=514, type_vocab_size=1)
LLAMA_7B = DecoderConfig(vocab_size=32000, hidden_size=4096, num_hidden_layers=32,
                         num_attention_heads=32, intermediate_size=11008)
SMOLLM2 = DecoderConfig(vocab_size=49152, hidden_size=576, num_hidden_layers=30,
                        num_attention_heads=9, num_key_value_heads=3, intermediate_size=1536,
                        tie_word_embeddings=True)


def weights_of(c):
    """Number of parameters of the model of a config."""
    with torch.device("meta"):
        model = Decoder(c) if isinstance(c, DecoderConfig) else Encoder(c, 2)
    return sum(p.numel() for p in model.parameters())


def paper_memory(c, weights, batch, length, size, recompute):
    """Bytes of a step with LoRA or SaLoRA, r = 8 on the six matrices, where attention does not
    store length x length:
        frozen       weights x size of the dtype
        adapter      16 per parameter: float32 weight, gradient and AdamW's two moments; 2 more in
                     the window, for B diag(g)
        activations  tokens x layers x what a layer keeps; recomputed: x of each layer, and all of
                     one (--checkpoint-activations)
        logits       LLaMA only, of one chunk of 1024 tokens: in the dtype; in float32 themselves,
                     their log-softmax and its gradient"""
    d, i, layers, tokens = c.hidden_size, c.intermediate_size, c.num_hidden_layers, batch * length
    llama = isinstance(c, DecoderConfig)
    kv = c.num_key_value_heads * c.head_dim if llama else d
    adapter = 8 * layers * (2 * (d + d) + 2 * (d + kv) + 2 * (d + i))
    kept = (kept_by_llama_layer if llama else kept_by_encoder_layer)(d, i, size)
    return dict(
        frozen=weights * size, adapter=18 * adapter,
        activations=tokens * (layers * d * size + kept if recompute else layers * kept),
        logits=min(tokens, 1024) * c.vocab_size * (size + 12) if llama else 0)


def bench_memory(args):
    gib, table = 2**30, []
    large = EncoderConfig("roberta", **ROBERTA["RoBERTa-large"], **ROBERTA_REST)
    sizes = [("RoBERTa-large", large, 32, 128), ("SmolLM2-135M", SMOLLM2, 16, 256),
             ("LLaMA-7B", LLAMA_7B, 4, 512), ("LLaMA-7B", LLAMA_7B, 16, 512)]
    weights = {name: weights_of(c) for name, c, *_ in sizes}
    options = product((("float32", 4), ("bfloat16", 2)), (False, True))
    for (name, c, batch, length), ((dtype, size), recompute) in product(sizes, options):
        parts = paper_memory(c, weights[name], batch, length, size, recompute)
        total = sum(parts.values()) / gib
        row = {"model": name, "batch": f"{batch} x {length}", "dtype": dtype,
               "recompute": "yes" if recompute else "no"}
        row |= {f"{key} GiB": round(value / gib, 2) for key, value in parts.items()}
        row |= {"total GiB": round(total, 1)}
        row |= {f"{card} GB card": "fits" if total < 0.9 * card else "no" for card in (24, 80)}
        table.append(row)
    return table


def token_loss(model, ids, targets):
    """targets (b, t) are on the CPU, as in train_instruct.py."""
    return token_losses(model, model.hidden(ids), targets).mean()


# -------------------------------------------------------------------------------------------------
# gpu and gpu-llama: on a CUDA GPU, in this process, with random weights

BATCHES, SIDE = (8, 16, 32, 64), 8192
GPU_KINDS = {"lora": "LoRA", "ft": "FT", "adalora": "AdaLoRA"} | KINDS  # ratios are to the first


def peft_step(shape):
    """step(inputs, labels) of transformers' RoBERTa with PEFT's LoRA."""
    from peft import LoraConfig, get_peft_model
    from transformers import RobertaConfig, RobertaForSequenceClassification
    config = RobertaConfig(**shape, **ROBERTA_REST, num_labels=2, pad_token_id=1)
    targets = ["query", "key", "value", "attention.output.dense", "intermediate.dense",
               "output.dense"]
    model = get_peft_model(RobertaForSequenceClassification(config), LoraConfig(
        r=8, lora_alpha=8, lora_dropout=0.0, task_type="SEQ_CLS", target_modules=targets))
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], 1e-3, fused=True)
    model.train()

    def step(inputs, labels):
        F.cross_entropy(model(input_ids=inputs[0]).logits, labels).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def bench_gpu(args):
    """Batches of 128 tokens a row without padding, float32 through TensorFloat-32."""
    table, kinds = [], dict(GPU_KINDS)
    if find_spec("transformers") and find_spec("peft"):
        kinds["peft"] = "LoRA, transformers + PEFT"
    else:
        print("transformers and peft are not installed: their rows are left out")
    for (name, shape), batch in product(ROBERTA.items(), BATCHES):
        config = EncoderConfig("roberta", **shape, **ROBERTA_REST)
        ids = torch.randint(2, ROBERTA_REST["vocab_size"], (batch, 128), device=args.device)
        data = [((ids, None, None), torch.zeros(batch, dtype=torch.long, device=args.device))]
        steps, peaks = {}, {}
        for kind, label in kinds.items():
            gc.collect()
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            with torch.device(args.device):
                own = kind != "peft"
                steps[label] = make_step(Encoder(config, 2), kind) if own else peft_step(shape)
            for _ in range(3):  # the third is in the window, with gates that were learned once
                steps[label](*data[0])
            peaks[label] = torch.cuda.max_memory_allocated() - before
        times = time_steps(list(steps.values()), data, args.repeats * 2, 3)
        for label, (ms, ratio, error) in zip(steps, times):
            table.append({"model": name, "batch": batch, "step": label, "ms": round(ms, 1),
                          "ratio to LoRA": round(ratio, 3), "± standard error": round(error, 3),
                          "peak MB": round(peaks[label] / 2**20)})
            print(*table[-1].values(), flush=True)
    return table


def bench_gpu_llama(args):
    """Training steps of SaLoRA in its window, bfloat16. TFLOP/s counts 4 operations per token and
    frozen weight, without attention and what --checkpoint-activations computes again."""
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(args.device):
        model = Decoder(LLAMA_7B)
        a, b = torch.randn(2, SIDE, SIDE)
    torch.set_default_dtype(torch.float32)
    [(ms, _, _)] = time_steps([lambda a, b: a @ b], [(a, b)], 5, 20)
    peak = 2 * SIDE**3 / ms / 1e9
    table = [{"what": f"product of matrices of {SIDE} x {SIDE}", "ms": round(ms, 2),
              "TFLOP/s": round(peak)}]
    del a, b
    model.eval()
    for batch in (1, 16):
        prompts = [[1] * 32 for _ in range(batch)]
        for tokens in (8, 128):  # the first warms up
            torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in model.generate(prompts, tokens):
                pass
            seconds = time.perf_counter() - start
        table.append({"what": f"decoding, {batch} rows of 32 tokens, 128 new ones",
                      "ms": round(1000 * seconds / 128, 1),
                      "tokens/s": round(batch * 128 / seconds)})
    frozen = sum(p.numel() for p in model.parameters()) - model.model.embed_tokens.weight.numel()
    step = make_step(model, "salora", loss_of=token_loss)
    for batch, recompute in ((4, True), (4, False), (16, True)):
        model.checkpoint_activations = recompute
        ids, targets = torch.randint(LLAMA_7B.vocab_size, (2, batch, 512))
        data = ids.to(args.device), targets
        step(*data)
        torch.cuda.reset_peak_memory_stats()
        [(ms, _, _)] = time_steps([step], [data], args.repeats, 3)
        measured = torch.cuda.max_memory_allocated() / 2**30
        parts = paper_memory(LLAMA_7B, weights_of(LLAMA_7B), batch, 512, 2, recompute)
        paper = sum(parts.values()) / 2**30
        tflops = 4 * frozen * batch * 512 / ms / 1e9
        table.append({
            "what": f"training, {batch} x 512{', --checkpoint-activations' * recompute}",
            "ms": round(ms, 1), "tokens/s": round(batch * 512e3 / ms), "TFLOP/s": round(tflops),
            "of the product's": round(tflops / peak, 2), "measured GiB": round(measured, 1),
            "on paper GiB": round(paper, 1), "ratio": round(measured / paper, 2)})
    columns = dict.fromkeys(key for row in table for key in row)
    return [{key: row.get(key, "") for key in columns} for row in table]


# -------------------------------------------------------------------------------------------------

BENCHES = dict(
    step=bench_step, loop=bench_loop, start=bench_start, size=bench_size, memory=bench_memory,
    gpu=bench_gpu) | {"gpu-llama": bench_gpu_llama}


def main(argv):
    parser = new_parser(__doc__)
    arg = parser.add_argument
    arg("what", nargs="*", metavar="TABLE", help=f"{', '.join(BENCHES)} (default: step)")
    arg("--task", default="demo", help="as in train_glue.py (default: demo)")
    arg("--model", default=str(HERE / "demo" / "model"),
        help="folder in Hugging Face layout (default: the demo's)")
    arg("--data", help="folder in GLUE's layout")
    arg("--peers", metavar="PYTHON",
        help="python that has transformers and peft (loop; needs --task cola and --data)")
    arg("--device", default="cpu", help="for step and size: cpu or cuda (default: cpu)")
    arg("--threads", type=int, default=min(2, os.cpu_count()),
        help="CPU threads (default: %(default)s)")
    arg("--repeats", type=int, default=3,
        help="turns of each system; step takes ten times as many (default: 3)")
    arg("--json", action="store_true", help="print JSON instead of tables")
    args = parser.parse_args(argv)
    if unknown := set(args.what) - set(BENCHES):
        parser.error(f"{', '.join(unknown)}: no such table, expected any of {', '.join(BENCHES)}")
    if args.peers and not (args.task == "cola" and args.data):
        parser.error("--peers: the peers run cola, give --task cola and --data")
    if any(name.startswith("gpu") for name in args.what):
        if not torch.cuda.is_available():
            parser.error("gpu: torch finds no CUDA GPU, which this needs")
        args.device = "cuda"
    at_least(args, 1, "repeats")
    args.tf32 = True  # as in a run
    use_machine(args)
    tables = {}
    for name in args.what or ["step"]:
        with redirect_stdout(sys.stderr):  # loading prints, too
            table = tables[name] = BENCHES[name](args)
        if not args.json:
            print(f"\n{name}\n\n{markdown(list(table[0]), [row.values() for row in table])}")
    if args.json:
        machine = dict(
            torch=torch.__version__, cpu=platform.processor() or platform.machine(),
            threads=args.threads,
            device=torch.cuda.get_device_name() if args.device.startswith("cuda") else "cpu")
        print(json.dumps(dict(machine=machine, command=argv, **tables), indent=1))


if __name__ == "__main__":
    run_command(main, None)
