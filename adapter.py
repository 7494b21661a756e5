"""
Adapter folders in the format of Hugging Face's PEFT: saved, loaded, merged into a model folder, and
shown.

    python adapter.py merge --model DIR --adapter DIR --out DIR    # a plain model folder
    python adapter.py show ADAPTER                                 # its ranks, parameters, budget
"""

import argparse
import io
import json
import math
import os
import re
import shutil
import sys
import tempfile
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn

from data import InputError
from model import HEADS, full_name, open_tensors, output_names, read_json, weight_files
from salora import SaLoRALinear, adapters, find, linears_of, rank_map, ranks, replace, updated


def within(name, modules):
    """Is a parameter of that name inside one of the modules?"""
    return any(f".{m}." in f".{name}" for m in modules or ())


def save(model: nn.Module, folder: str | Path, modules_to_save=(), budget: float | None = None,
         labels=None, **config):
    """Writes the adapters of a model as PEFT loads them, with gate and scale folded into B. PEFT
    has no rank 0, so those matrices are left out. Two of them get a triplet of zeros instead: the
    smallest, if nothing else is left, and one whose path ends in the path of another ("b.q" beside
    "q", where naming q would adapt both). salora.json has for show() what PEFT's files do not:
    `budget`, all ranks, and the first one, and for merge_folder() `labels`.

        modules_to_save    names of modules to save whole, such as a head: "classifier"
        labels             names of that head's outputs, in order
        config             more entries, such as base_model_name_or_path or task_type

    ValueError: a module to save is not there, or has an adapter in it."""
    layers, tensors, table = adapters(model), {}, {}
    for path in layers:
        if within(f"{path}.weight", modules_to_save):
            raise ValueError(f"modules_to_save covers {path}, which has an adapter: merge it "
                             "first, or do not target it")
    live = [path for path, m in layers.items() if m.rank]
    zeros = [path for path in layers if path not in live
             and any(path.endswith("." + end) for end in live)]
    if layers and not live:
        zeros = [min(layers, key=lambda path: layers[path].base.weight.numel())]
    # the longest path first: PEFT takes the first pattern that fits the end of a path
    for path in sorted(live + zeros, key=len, reverse=True):
        (a, b), (d, k) = layers[path].matrices(), layers[path].base.weight.shape
        if path in zeros:
            a, b = torch.zeros(1, k), torch.zeros(d, 1)
        tensors[f"{path}.lora_A.weight"] = a
        tensors[f"{path}.lora_B.weight"] = layers[path].scale * b
        table[path] = a.shape[0]
    for m in modules_to_save:
        inside = {name: p for name, p in model.named_parameters() if within(name, [m])}
        if not inside:
            raise ValueError(f"modules_to_save names {m!r}, and the model has no parameters in a "
                             "module of that name")
        tensors |= inside
    tensors = {f"base_model.model.{name}": t.detach().float().cpu().contiguous()
               for name, t in tensors.items()}
    r = max(table.values(), default=1)
    pattern = table if set(table.values()) != {r} else {}
    settings = dict(
        peft_type="LORA", r=r, lora_alpha=r, rank_pattern=pattern, alpha_pattern=pattern,
        target_modules=[path for path in layers if path in table],
        modules_to_save=list(modules_to_save) or None, bias="none", lora_dropout=0.0,
        fan_in_fan_out=False, inference_mode=True, **config)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    r = max((m.r for m in layers.values()), default=0)
    known = dict(r=r, budget=budget, ranks=ranks(model))
    if labels:
        known["labels"] = list(labels)
    save_file(tensors, folder / "adapter_model.safetensors.new", metadata={"format": "pt"})
    for name, value in (("adapter_config.json", settings), ("salora.json", known)):
        (folder / f"{name}.new").write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    # save_file lets nobody else read its file
    shutil.copymode(folder / "salora.json.new", folder / "adapter_model.safetensors.new")
    for name in ("salora.json", "adapter_model.safetensors", "adapter_config.json"):
        os.replace(folder / f"{name}.new", folder / name)  # there is never half a file


IMPLEMENTED = dict(  # what adapter_config.json may say
    peft_type=["LORA"], bias=["none"], fan_in_fan_out=[False],
    # other ways to start change the base weights
    init_lora_weights=[True, False, "gaussian", "orthogonal", "eva"])
READ = {"r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "target_modules",
        "modules_to_save"}
OF_NO_EFFECT = {"base_model_name_or_path", "task_type", "inference_mode", "auto_mapping",
                "revision", "peft_version", "lora_dropout", "megatron_core", "qalora_group_size",
                "runtime_config", "eva_config"}


def read_adapter(folder: str | Path) -> tuple:
    """(settings, {name in the model: tensor}) of a folder in PEFT's LoRA format. ValueError: it is
    damaged, or has a setting that is not implemented."""
    file = Path(folder) / "adapter_config.json"
    settings = read_json(file)
    for key, value in {"peft_type": None, **settings}.items():
        if key in IMPLEMENTED and value not in IMPLEMENTED[key]:
            raise ValueError(f"{file}: {key} is {value!r}, only {IMPLEMENTED[key][0]!r} is "
                             "implemented")
        known = key in READ | OF_NO_EFFECT | IMPLEMENTED.keys()
        if not known and value not in (None, False, [], {}):
            raise ValueError(f"{file}: {key} is {value!r}, which is not implemented")

    def rank(n):
        return type(n) is int and n > 0

    def alpha(n):
        return type(n) in (int, float) and 0 < n < math.inf

    def name(text):
        return isinstance(text, str)

    for key, kind, good, expected in (
            ("r", int, rank, "positive numbers"),
            ("rank_pattern", dict, rank, "positive numbers"),
            ("lora_alpha", (int, float), alpha, "positive numbers"),
            ("alpha_pattern", dict, alpha, "positive numbers"),
            ("target_modules", (list, str), name, "names"),
            ("modules_to_save", list, name, "names")):
        value = settings.get(key)
        if value is None and key in ("rank_pattern", "alpha_pattern", "modules_to_save"):
            continue
        parts = list(value.values()) if isinstance(value, dict) else value
        parts = parts if isinstance(parts, list) else [parts]
        if not isinstance(value, kind) or not all(map(good, parts)):
            raise ValueError(f"{file}: {key} is {repr(value)[:80]}, expected {expected}")
    with open_tensors(Path(folder) / "adapter_model.safetensors") as f:
        tensors = {key.removeprefix("base_model.model."): f.get_tensor(key) for key in f.keys()}
    return settings, tensors


def read_labels(folder: str | Path) -> list | None:
    """The names of the outputs of the head in an adapter's folder, from salora.json, if it has
    them. InputError: they are no names."""
    file = Path(folder) / "salora.json"
    labels = read_json(file).get("labels") if file.is_file() else None
    if labels is not None and not (isinstance(labels, list) and labels
                                   and all(isinstance(name, str) for name in labels)):
        raise InputError(f"{file}: labels is {repr(labels)[:80]}, expected a list of names")
    return labels


def as_regex(pattern: str, end: bool = False) -> re.Pattern:
    """A pattern of adapter_config.json, compiled. It has to fit a whole module path; with `end`,
    the end of one. ValueError: it is no regular expression, or one that could take forever, as a
    stranger might send it: with backreferences, a repeated group, many groups or repetitions."""
    bare = re.sub(r"\\\D|\[[^\]]*\]", "x", pattern)  # each escape or class of characters is one x
    backreference, repeated_group = "\\" in bare, re.search(r"\)[*+?{]", bare)
    many = len(re.findall(r"(?<!\()[*+?{]", bare)) > 3 or bare.count("(") > 3
    if len(pattern) > 1000 or backreference or repeated_group or many:
        raise ValueError(f"the pattern {pattern[:60]!r} is too intricate: name the modules instead")
    try:
        return re.compile(rf"(.*\.)?({pattern})" if end else pattern)
    except re.error as e:
        raise ValueError(f"the pattern {pattern[:60]!r} is no regular expression ({e})") from None


def match(settings, tensors, linears, saved):
    """{module path: (r, scale)} of the layers that an adapter changes, out of linears {module
    path: (d, k)}. saved {name: shape}: the parameters that it replaces whole. ValueError names a
    tensor that is missing, unexpected or misshapen, or a setting that fits nothing."""
    targets = settings["target_modules"]
    whole = settings.get("modules_to_save")  # no adapter in there, even if a target says so
    free = {path: size for path, size in linears.items() if not within(f"{path}.weight", whole)}
    if isinstance(targets, str):
        regex = as_regex(targets)
        chosen = {path: size for path, size in free.items() if regex.fullmatch(path)}
        if not chosen:
            raise ValueError(f"target_modules {targets!r} matches no nn.Linear of the model")
    else:
        chosen = find(free, [target for target in targets if not within(f"{target}.weight", whole)])

    def values(name):
        """{module path: value}: the first pattern that fits counts."""
        found = {}
        for pattern, value in (settings.get(name) or {}).items():
            regex = as_regex(pattern, end=True)
            hits = [path for path in chosen if regex.fullmatch(path)]
            if not hits:
                raise ValueError(f"{name} names {pattern!r}, which is no target module")
            found = dict.fromkeys(hits, value) | found
        return found

    ranks_of, alphas_of = values("rank_pattern"), values("alpha_pattern")
    wanted, layers = dict(saved), {}
    for path, (d, k) in chosen.items():
        r, alpha = ranks_of.get(path, settings["r"]), alphas_of.get(path, settings["lora_alpha"])
        wanted[f"{path}.lora_A.weight"], wanted[f"{path}.lora_B.weight"] = (r, k), (d, r)
        layers[path] = r, alpha / (math.sqrt(r) if settings.get("use_rslora") else r)
    found = {key: t.shape for key, t in tensors.items()}
    for key in wanted | found:
        expected, got = (list(t[key]) if key in t else "nothing" for t in (wanted, found))
        if expected != got:
            raise ValueError(f"adapter_model.safetensors: {key}: expected {expected}, found {got}")
    return layers


def load(model: nn.Module, folder: str | Path) -> nn.Module:
    """Puts an adapter in PEFT's LoRA format into `model`, in place, and returns the model. A, B
    and the saved modules are trainable, the rest is frozen. ValueError names a tensor that is
    missing, unexpected or misshapen, or a setting that is not implemented; the model is then as
    it was."""
    settings, tensors = read_adapter(folder)
    linears, params = linears_of(model), dict(model.named_parameters())
    sizes = {path: (m.out_features, m.in_features) for path, m in linears.items()}
    whole = settings.get("modules_to_save")
    saved = {name: p.shape for name, p in params.items() if within(name, whole)}
    tied = [id(p) for _, p in model.named_parameters(remove_duplicate=False)]
    try:
        for name in saved:
            if tied.count(id(params[name])) > 1:
                raise ValueError(f"modules_to_save has {name}, which is tied to another module: "
                                 "not implemented")
        layers = match(settings, tensors, sizes, saved)
    except ValueError as e:
        raise ValueError(f"{folder}: {e}") from None
    model.requires_grad_(False)
    with torch.no_grad():
        for path, (r, scale) in layers.items():
            layer = SaLoRALinear(linears[path], r, scale)
            layer.lora_A.copy_(tensors[f"{path}.lora_A.weight"])
            layer.lora_B.copy_(tensors[f"{path}.lora_B.weight"])
            replace(model, path, layer)
        for name in saved:
            params[name].requires_grad_(True).copy_(tensors[name])
    return model


# -------------------------------------------------------------------------------------------------
# merging into a model folder, and the command line

# the head of a classifier, which may have another number of labels than that of the model folder
CLASSIFIER = {"classifier.weight", "classifier.bias", "classifier.out_proj.weight",
              "classifier.out_proj.bias", "score.weight"}


def with_labels(config, names):
    """A config.json with these names of the outputs."""
    return config | dict(id2label={str(i): name for i, name in enumerate(names)},
                         label2id={name: i for i, name in enumerate(names)})


def merge_folder(model: str | Path, adapter: str | Path, out: str | Path):
    """Writes the folder `out`: a model folder in Hugging Face's layout (config.json,
    model.safetensors or its shards with their index, tokenizer) with an adapter in its weights.
    Each sum is taken in float32 and stored in the dtype of the weight. Modules that the adapter
    saved whole (a head) come along, and config.json then has their labels: those in salora.json,
    else the model's own if there are as many. ValueError:
    `out` is there already, or adapter and model do not fit together; nothing is left behind."""
    model, out = Path(model), Path(out)
    if out.exists():
        raise ValueError(f"{out}: is there already, give another folder")
    settings, tensors = read_adapter(adapter)
    config, (files, index) = read_json(model / "config.json"), weight_files(model)
    if config.get("quantization_config"):
        raise ValueError(f"{model}: its weights are quantized; merge into the ones before")
    shapes = {}
    for file in files:
        with open_tensors(file) as f:
            shapes |= {full_name(key): f.get_slice(key).get_shape() for key in f.keys()}

    whole = settings.get("modules_to_save")
    saved = {name: t for name, t in tensors.items() if within(name, whole)}
    changed = [*saved, *(name.replace(".lora_A.", ".") for name in tensors if ".lora_A." in name)]
    parts = [name.partition(".") for name in changed if name not in shapes]
    body = next((first for first, _, rest in parts if rest in shapes), "")  # if the keys lack it
    shapes = {full_name(key, body): shape for key, shape in shapes.items()}
    linears = {}
    for name, shape in shapes.items():
        path, _, kind = name.rpartition(".")
        # heads and poolers that the adapter says nothing about are not in the model it is for
        optional = name.startswith(HEADS) or ".pooler." in name
        there = not optional or f"{path}.lora_A.weight" in tensors
        if kind == "weight" and len(shape) == 2 and there:
            linears[path] = shape
    wanted = {name: t.shape if name in CLASSIFIER else shapes.get(name, t.shape)
              for name, t in saved.items()}
    try:
        if config.get("tie_word_embeddings") and any(
                name.endswith(("embed_tokens.weight", "lm_head.weight")) for name in changed):
            raise ValueError("it changes an embedding that is tied to the head: not implemented")
        layers = match(settings, tensors, linears, wanted)
        outputs, labels = [len(tensors[name]) for name in saved if name in CLASSIFIER], None
        if outputs:
            labels = read_labels(adapter) or output_names(config, outputs[0])
            if len(labels) != outputs[0]:
                raise ValueError(f"salora.json: has {len(labels)} labels, but the head has "
                                 f"{outputs[0]} outputs")
    except ValueError as e:
        raise ValueError(f"{adapter}: {str(e).removeprefix(f'{adapter}/')}") from None

    out.parent.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    beside.chmod(0o755)
    try:
        weight_map, dtype = {}, torch.float32  # dtype: of the last weight, for what the model lacks
        for file in files:
            merged = {}
            with open_tensors(file) as f:
                for key in f.keys():
                    weight, name = f.get_tensor(key), full_name(key, body)
                    path = name.removesuffix(".weight")
                    if weight.is_floating_point():
                        dtype = weight.dtype
                    elif path in layers:
                        raise ValueError(f"{file}: {key} is {weight.dtype}, quantized; merge into "
                                         "the weights before")
                    if path in layers:
                        a, b = (tensors[f"{path}.lora_{x}.weight"] for x in "AB")
                        weight = updated(weight, layers[path][1], a, b)
                    merged[name] = saved.pop(name).to(weight.dtype) if name in saved else weight
            if file == files[-1]:
                merged |= {name: t.to(dtype) for name, t in saved.items()}
            save_file(merged, beside / file.name, metadata={"format": "pt"})
            weight_map |= dict.fromkeys(merged, file.name)
        if labels:
            config = with_labels(config, labels)
        if labels and settings.get("task_type") == "SEQ_CLS":
            config["architectures"] = [
                re.sub(r"(Model|For\w+)?$", "ForSequenceClassification", name, count=1)
                for name in config.get("architectures") or []]
        written = {"config.json": config}
        if index:
            written["model.safetensors.index.json"] = index | dict(weight_map=weight_map)
        for name, value in written.items():
            (beside / name).write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
        for file in files:
            shutil.copymode(beside / "config.json", beside / file.name)
        own = {*written, "model.safetensors.index.json", "adapter_config.json", "salora.json"}
        for file in model.iterdir():  # the tokenizer, and what else is text
            if file.suffix in (".json", ".txt", ".model", ".jinja") and file.name not in own:
                shutil.copy(file, beside)
        os.replace(beside, out)
    finally:  # of an attempt that failed
        shutil.rmtree(beside, ignore_errors=True)


def show(adapter: str | Path) -> str:
    """What an adapter folder in PEFT's LoRA format holds, as text: parameters, budget and the rank
    of each matrix. ValueError: as in read_adapter."""
    settings, tensors = read_adapter(adapter)
    own = Path(adapter) / "salora.json"
    known = read_json(own) if own.is_file() else {}
    found = {name.removesuffix(".lora_A.weight"): len(t) for name, t in tensors.items()
             if name.endswith(".lora_A.weight")}
    table = known.get("ranks") or found
    r = max(known.get("r") or 1, *table.values(), 1)
    adapter_params = sum(t.numel() for name, t in tensors.items() if ".lora_" in name)
    others = sum(t.numel() for t in tensors.values()) - adapter_params
    low, high = min(found.values(), default=0), max(found.values(), default=0)
    base = settings.get("base_model_name_or_path") or "an unnamed model"
    lines = [f"{adapter}: adapter of {base}",
             f"{adapter_params:,} parameters in {len(found)} matrices of rank {low} to {high}"]
    if others:
        lines[1] += f", {others:,} in {', '.join(settings.get('modules_to_save') or [])}"
    if known:
        budget = known.get("budget")
        budget = "no budget recorded" if budget is None else f"budget {budget:g}"
        zero = sum(rank == 0 for rank in table.values())
        lines.append(f"{budget}; rank {r} at the start; {zero} of {len(table)} matrices were left "
                     "at rank 0")
    return "\n".join([*lines, "", rank_map(table, r)])


def main(argv=None):
    parser = argparse.ArgumentParser(
        description="Merges a LoRA adapter, of this project or of PEFT, into a model folder, or "
                    "shows it.")
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser(
        "merge", help="write a plain Hugging Face folder with the adapter in its weights")
    for flag, text in (
            ("--model", "folder with config.json and model.safetensors, or its shards"),
            ("--adapter", "folder with adapter_config.json and adapter_model.safetensors"),
            ("--out", "folder to write, which must not be there yet")):
        command.add_argument(flag, required=True, metavar="DIR", help=text)
    command = commands.add_parser("show", help="print an adapter's ranks, parameters and budget")
    command.add_argument("adapter", metavar="ADAPTER", help="folder of the adapter")

    def error(message):
        print(f"error: {message}", file=sys.stderr)
        sys.exit(2)

    for each in (parser, *commands.choices.values()):
        each.error = error  # one line, as all others
    if isinstance(sys.stdout, io.TextIOWrapper):  # what a notebook has is none
        sys.stdout.reconfigure(errors="replace")  # for a terminal that knows nothing but ASCII
    args = parser.parse_args(argv)
    try:
        if args.command == "show":
            print(show(args.adapter))
        else:
            merge_folder(args.model, args.adapter, args.out)
            print(f"{args.out}/: {args.model} with {args.adapter} in its weights")
    except (OSError, ValueError, SafetensorError) as e:
        error(f"{e.filename}: {e.strerror}" if isinstance(e, OSError) and e.filename else e)


if __name__ == "__main__":
    main()
