"""
Saves, loads, merges and shows adapter folders in the format of Hugging Face's PEFT.

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
import warnings
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn

from data import InputError, need, sync
from model import HEADS, TIED, full_name, open_tensors, output_names, read_json, weight_files
from salora import (
    SaLoRALinear,
    adapters,
    find,
    plain,
    rank_map,
    reachable,
    replace,
    unwrap,
    updated,
)


def within(name: str, modules: list) -> bool:
    """Is a parameter of that name inside one of the modules? PEFT puts no adapter there."""
    return any(f".{m}." in f".{name}" for m in modules or ())


def replaced(name: str, modules: list) -> bool:
    """Is a parameter of that name replaced whole? PEFT replaces every module whose path ends in
    one of modules_to_save: "norm" matches "input_layernorm" too."""
    return any(f"{m}." in name for m in modules or ())


def natural(n, least: int = 0) -> bool:
    return type(n) is int and n >= least


def save(model: nn.Module, folder: str | Path, modules_to_save: list | tuple = (),
         budget: float | None = None, labels: list | None = None, **config):
    """Writes the adapters of a model in PEFT's format, with gate and scale folded into B. PEFT has
    no rank 0, so matrices of rank 0 are left out. Some get a triplet of zeros instead: the smallest
    one if all have rank 0, and any whose path ends in the path of a kept one ("b.q" beside "q",
    where naming q would adapt both). salora.json has what PEFT's files lack: `budget`, all ranks,
    the initial rank, and `labels`. Names are those of the model itself, inside torch.compile,
    DataParallel or DistributedDataParallel.

        modules_to_save    names of modules to save whole, such as a head: "classifier"
        labels             names of that head's outputs, in order
        config             more entries, such as base_model_name_or_path or task_type

    ValueError: nothing is adapted, a module to save is missing or has an adapter in it, or a
    trained parameter would not be saved."""
    model, layers = unwrap(model), adapters(model)
    state = {plain(name): t for name, t in model.state_dict(keep_vars=True).items()}
    whole = [modules_to_save] if isinstance(modules_to_save, str) else list(modules_to_save)
    if not layers:
        raise ValueError("the model has no adapters to save")
    for path in layers:
        if replaced(f"{path}.weight", whole):
            raise ValueError(f"modules_to_save covers {path}, which has an adapter: merge it "
                             "first, or do not target it")
    for m in whole:
        if not any(replaced(name, [m]) for name in state):
            raise ValueError(f"modules_to_save names {m!r}, but no parameter is in such a module")
    saved = {name: t for name, t in state.items() if replaced(name, whole)}
    own = (p for m in layers.values() for p in m.parameters(recurse=False))
    held = set(map(id, [*saved.values(), *own]))
    left = [name for name, t in state.items() if t.requires_grad and id(t) not in held]
    if left:
        raise ValueError(f"{left[0]} is trained ({len(left)} such in all), but is in no adapter: "
                         f"give modules_to_save=[{left[0].rpartition('.')[0]!r}, ..] or freeze it")
    if budget is not None and budget < 1 and all(m.rank == m.r for m in layers.values()):
        uncut = any(m.uncut for m in layers.values())
        why = "the window has not ended" if uncut else "every triplet was kept"
        warnings.warn(f"budget is {budget:g}, but nothing has been cut from the adapters, so no "
                      f"budget is recorded: {why}", stacklevel=2)
        budget = None
    live = [path for path, m in layers.items() if m.rank]
    zeros = [path for path in layers if path not in live
             and any(path.endswith("." + end) for end in live)]
    if not live:
        zeros = [min(layers, key=lambda path: layers[path].base.weight.numel())]
    tensors, table = {}, {}
    # longest path first: PEFT takes the first pattern that matches the end of a path
    for path in sorted(live + zeros, key=len, reverse=True):
        (a, b), (d, k) = layers[path].matrices(), layers[path].base.weight.shape
        if path in zeros:
            a, b = torch.zeros(1, k), torch.zeros(d, 1)
        tensors[f"{path}.lora_A.weight"] = a
        tensors[f"{path}.lora_B.weight"] = layers[path].scale * b
        table[path] = a.shape[0]
    tensors = {f"base_model.model.{name}": t.float() if t.is_floating_point() else t
               for name, t in (tensors | saved).items()}
    tensors = {name: t.detach().cpu().contiguous().clone()  # no two may share memory
               for name, t in tensors.items()}
    r = max(table.values())
    pattern = table if set(table.values()) != {r} else {}
    settings = dict(
        peft_type="LORA", r=r, lora_alpha=r, rank_pattern=pattern, alpha_pattern=pattern,
        target_modules=[path for path in layers if path in table],
        modules_to_save=whole or None, bias="none",
        lora_dropout=max(m.dropout for m in layers.values()),
        fan_in_fan_out=False, inference_mode=True, **config)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    known = dict(r=max(m.r for m in layers.values()), budget=budget,
                 ranks={path: m.rank for path, m in layers.items()})
    if labels:
        known["labels"] = list(labels)
    save_file(tensors, folder / "adapter_model.safetensors.new", metadata={"format": "pt"})
    for name, value in (("adapter_config.json", settings), ("salora.json", known)):
        (folder / f"{name}.new").write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    # save_file makes its file private
    shutil.copymode(folder / "salora.json.new", folder / "adapter_model.safetensors.new")
    for name in ("salora.json", "adapter_model.safetensors", "adapter_config.json"):
        sync(folder / f"{name}.new")
        os.replace(folder / f"{name}.new", folder / name)  # there is never half a file


IMPLEMENTED = dict(  # allowed values in adapter_config.json
    peft_type=["LORA"], bias=["none"], fan_in_fan_out=[False],
    # other initializations change the base weights
    init_lora_weights=[True, False, "gaussian", "orthogonal", "eva"])
READ = {"r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "target_modules",
        "modules_to_save", "exclude_modules", "layers_to_transform", "layers_pattern",
        "lora_dropout"}
OF_NO_EFFECT = {"base_model_name_or_path", "task_type", "inference_mode", "auto_mapping",
                "revision", "peft_version", "megatron_core", "qalora_group_size",
                "runtime_config", "eva_config"}


def read_adapter(folder: str | Path) -> tuple:
    """(settings, {name in the model: tensor}) of a folder in PEFT's LoRA format. ValueError: it is
    damaged, or has a setting that is not implemented."""
    file = Path(folder) / "adapter_config.json"
    inner = Path(folder) / "adapter"  # of a run
    hint = f"; give the adapter in it, {inner}" if inner.is_dir() else ""
    settings = dict(peft_type=None, lora_dropout=0.0) | read_json(file, hint)
    for key, value in settings.items():
        good = IMPLEMENTED.get(key, [value])
        need(value in good, f"{file}: {key}", repr(value), f"{good[0]!r}; no other is implemented")
        known = key in READ | OF_NO_EFFECT | IMPLEMENTED.keys()
        if not known and value not in (None, False, [], {}):
            raise ValueError(f"{file}: {key} is {value!r}, which is not implemented")

    def positive(n):
        return type(n) in (int, float) and 0 < n < 1e30  # larger ones overflow in float32

    def share(p):
        return type(p) in (int, float) and 0 <= p < 1

    def name(text):
        return isinstance(text, str)

    def rank(n):
        return natural(n, 1) and n < 2**31

    for key, kind, good, expected in (
            ("r", int, rank, "a positive number"),
            ("rank_pattern", dict, rank, "positive numbers"),
            ("lora_alpha", (int, float), positive, "a positive number"),
            ("alpha_pattern", dict, positive, "positive numbers"),
            ("lora_dropout", (int, float), share, "a share below 1"),
            ("target_modules", (list, str), name, "names"),
            ("modules_to_save", list, name, "names"),
            ("exclude_modules", (list, str), name, "names"),
            ("layers_to_transform", (list, int), natural, "numbers of layers"),
            ("layers_pattern", (list, str), name, "names")):
        value = settings.get(key)
        if value is None and key not in ("r", "lora_alpha", "lora_dropout", "target_modules"):
            continue
        parts = list(value.values()) if isinstance(value, dict) else value
        parts = parts if isinstance(parts, list) else [parts]
        ok = isinstance(value, kind) and all(map(good, parts))
        need(ok, f"{file}: {key}", repr(value)[:80], expected)
    file = Path(folder) / "adapter_model.safetensors"
    if not file.is_file() and file.with_suffix(".bin").is_file():
        raise ValueError(f"{file}: not found; adapter_model.bin is a pickle, which is not read: "
                         "save it with PEFT again")
    with open_tensors(file) as f:
        tensors = {key.removeprefix("base_model.model."): f.get_tensor(key) for key in f.keys()}
    return settings, tensors


def stored_ranks(tensors: dict) -> dict:
    """{module path: rank} of an adapter's tensors."""
    return {key.removesuffix(".lora_A.weight"): len(t) for key, t in tensors.items()
            if key.endswith(".lora_A.weight")}


def read_own(folder: str | Path, tensors: dict | None = None) -> dict:
    """salora.json of an adapter's folder, with what PEFT's files lack: `r`, `budget`, `ranks`,
    `labels`. {} if there is none, or if its ranks are not those of the tensors (a printed line
    says so). InputError: it is damaged."""
    file = Path(folder) / "salora.json"
    own = read_json(file) if file.is_file() else {}
    labels, table = own.get("labels"), own.get("ranks")
    for key, good, expected in (
            ("labels", isinstance(labels, list) and labels
             and all(isinstance(name, str) for name in labels), "a list of names"),
            ("ranks", isinstance(table, dict) and all(map(natural, table.values())), "ranks"),
            ("r", natural(own.get("r")), "a rank"),
            ("budget", type(own.get("budget")) in (int, float), "a number")):
        found = own.get(key)
        need(found is None or good, f"{file}: {key}", repr(found)[:80], expected)
    found = stored_ranks(tensors or {})
    if table and any(table.get(path) not in (0, rank) for path, rank in found.items()):
        print(f"{file}: is ignored: its ranks are not those of the adapter")
        return {}
    return own


def read_ranks(file: str | Path) -> dict:
    """{module path: rank} from the folder of an adapter or its adapter_config.json, the folder of a
    run or its result.json, or a JSON file that is such a table. ValueError: it is damaged, or has
    no ranks."""
    file = Path(file)
    if file.name == "adapter_config.json":
        file = file.parent
    if (file / "result.json").is_file():
        file = file / "result.json"
    if file.is_dir():
        _, tensors = read_adapter(file)
        table = read_own(file, tensors).get("ranks") or stored_ranks(tensors)
    else:
        table = read_json(file)
        table = table.get("ranks", table)
    good = isinstance(table, dict) and all(map(natural, table.values()))
    if not good or not any(table.values()):
        raise InputError(f"{file}: its ranks are {repr(table)[:80]}, expected {{module path: rank}}"
                         ", whole numbers from 0 that are not all 0")
    return table


def as_regex(pattern: str, end: bool = False) -> re.Pattern:
    """Compiles a pattern of adapter_config.json, which has to match a whole module path or, with
    `end`, the end of one. ValueError: it is not a regular expression, or it is one that could take
    forever: with backreferences, a repeated group, many groups or repetitions."""
    bare = re.sub(r"\\\D|\[[^\]]*\]", "x", pattern)  # each escape or class of characters is one x
    backreference, repeated_group = "\\" in bare, re.search(r"\)[*+?{]", bare)
    many = len(re.findall(r"(?<!\()[*+?{]", bare)) > 3 or bare.count("(") > 3
    if len(pattern) > 1000 or backreference or repeated_group or many:
        raise ValueError(f"the pattern {pattern[:60]!r} is too intricate: name the modules instead")
    try:
        return re.compile(rf"(.*\.)?({pattern})" if end else pattern)
    except re.error as e:
        raise ValueError(f"the pattern {pattern[:60]!r} is no regular expression ({e})") from None


def chosen(settings: dict, linears: dict) -> dict:
    """The entries of {module path: ..} that an adapter's settings target, by PEFT's rules."""
    targets, layers = settings["target_modules"], settings.get("layers_to_transform")
    layers = [layers] if isinstance(layers, int) else layers

    def named(path, names):
        if isinstance(names, str):
            return as_regex(names).fullmatch(path) is not None
        return any(f".{path}".endswith(f".{name}") for name in names)

    def in_layers(path):
        patterns = settings.get("layers_pattern") or []
        patterns = [patterns] if isinstance(patterns, str) else patterns
        hits = [re.match(rf"(?:^|.*?\.){as_regex(pattern).pattern}\.(\d+)\.", path)
                for pattern in patterns] or [re.match(r".*?\.[^.]*\.(\d+)\.", path)]
        return any(hits) and int(next(filter(None, hits))[1]) in layers

    free = {path: size for path, size in linears.items()
            if not within(f"{path}.weight", settings.get("modules_to_save"))
            and not named(path, settings.get("exclude_modules") or [])}
    if isinstance(targets, str) and targets.lower() == "all-linear":
        return find(free | {"lm_head": None}, "all-linear")  # lm_head: a head to leave out
    found = {path: size for path, size in free.items() if named(path, targets)}
    if layers and not isinstance(targets, str):
        found = {path: size for path, size in found.items() if path in targets or in_layers(path)}
    return found


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Are the values the same, even if one dtype is narrower?"""
    return a.shape == b.shape and (torch.equal(a.to(b.dtype), b) or torch.equal(b.to(a.dtype), a))


def match(folder, settings, tensors, linears, saved, weight):
    """{module path: (r, scale)} of the layers that an adapter changes, out of linears {module
    path: (d, k)}. saved {name: shape}: the parameters that it replaces whole. weight(name): the
    model's own tensor, or None. A name in the settings that matches nothing has no effect, as in
    PEFT, and a printed line says so. ValueError names a tensor that is missing, unexpected or
    misshapen. One that only repeats the model's own is allowed."""
    targets, whole = settings["target_modules"], settings.get("modules_to_save") or []
    targeted = chosen(settings, linears)
    if not targeted and targets:
        names = [targets] if isinstance(targets, str) else targets
        some = ", ".join(repr(name)[:80] for name in names[:3]) + ", .." * (len(names) > 3)
        raise ValueError(f"target_modules: {some} matches no nn.Linear: is the adapter for another "
                         "model?")

    def values(name):
        """{module path: value}: the first pattern that matches counts."""
        found = {}
        for pattern, value in (settings.get(name) or {}).items():
            regex = as_regex(pattern, end=True)
            hits = [path for path in targeted if regex.fullmatch(path)]
            if not hits:
                unused.append(f"{pattern!r} in {name}")
            found = dict.fromkeys(hits, value) | found
        return found

    unused = [f"{target!r} in target_modules" for target in targets if not isinstance(targets, str)
              and not chosen(settings | dict(target_modules=[target]), linears)
              and not within(f"{target}.weight", whole)]
    # PEFT adds classifier and score itself
    unused += [f"{m!r} in modules_to_save" for m in whole if m not in ("classifier", "score")
               and not any(replaced(name, [m]) for name in saved)]
    ranks_of, alphas_of = values("rank_pattern"), values("alpha_pattern")
    wanted, layers = dict(saved), {}
    for path, (d, k) in targeted.items():
        r, alpha = ranks_of.get(path, settings["r"]), alphas_of.get(path, settings["lora_alpha"])
        wanted[f"{path}.lora_A.weight"], wanted[f"{path}.lora_B.weight"] = (r, k), (d, r)
        layers[path] = r, alpha / (math.sqrt(r) if settings.get("use_rslora") else r)
    found = {key: t.shape for key, t in tensors.items()}
    for key in wanted | found:
        expected, got = (list(t[key]) if key in t else "nothing" for t in (wanted, found))
        own = None if key in wanted else weight(key.replace(".base_layer.", "."))
        if own is not None:  # PEFT also saves an adapted lm_head
            if same(tensors[key], own.cpu()):
                continue
            expected = "the model's own values, or nothing"
        if expected != got:
            raise ValueError(f"adapter_model.safetensors: {key}: expected {expected}, found {got}")
    if unused:
        print(f"{folder}: {', '.join(unused)}: without effect, as nothing has that name")
    return layers


def load(model: nn.Module, folder: str | Path) -> nn.Module:
    """Puts an adapter in PEFT's LoRA format into `model`, in place, and returns the model. A, B
    and the saved modules are trainable, the rest is frozen. A saved module that was tied to another
    no longer is, as in PEFT. ValueError: the model has adapters already, a tensor is missing,
    unexpected or misshapen, or a setting is not implemented; the model is then unchanged."""
    if adapters(model):
        raise ValueError(f"{folder}: the model has adapters already: merge() them first")
    settings, tensors = read_adapter(folder)
    own, whole = read_own(folder, tensors), settings.get("modules_to_save")
    outer, model = model, unwrap(model)
    modules = adapters(model, nn.Module)
    linears = {plain(path): m for path, m in model.named_modules() if isinstance(m, nn.Linear)}
    state = {plain(name): t for name, t in model.state_dict(keep_vars=True).items()}
    sizes = {path: (m.out_features, m.in_features) for path, m in linears.items()}
    saved = {name: t.shape for name, t in state.items() if replaced(name, whole)}
    try:
        layers = match(folder, settings, tensors, sizes, saved, state.get)
        reachable(modules, [*layers, *(name.rpartition(".")[0] for name in saved)])
    except ValueError as e:
        raise ValueError(f"{folder}: {e}") from None

    # matrices of rank 0, for the next save() and its rank map
    layers |= {path: (0, 1.0) for path, rank in (own.get("ranks") or {}).items()
               if rank == 0 and path in linears and path not in layers
               and not within(f"{path}.weight", whole)}
    model.requires_grad_(False)
    for path, (r, scale) in layers.items():
        layer = SaLoRALinear(linears[path], r, scale, settings["lora_dropout"])
        layer.requires_grad_(r > 0).base.requires_grad_(False)
        layer.r = max(r, own.get("r") or 0)
        if r:
            layer.lora_A.data.copy_(tensors[f"{path}.lora_A.weight"])
            layer.lora_B.data.copy_(tensors[f"{path}.lora_B.weight"])
        replace(modules, path, layer)
    for name in saved:
        path, _, leaf = name.rpartition(".")
        value = tensors[name].to(state[name].device, state[name].dtype)
        if not isinstance(state[name], nn.Parameter):
            state[name].copy_(value)  # a buffer
            continue
        twins = [other for other, t in state.items() if t is state[name] and other != name]
        if twins:
            print(f"{folder}: has its own {name}, which is no longer tied to {twins[0]}")
        setattr(modules[path], leaf, nn.Parameter(value))
    return outer


# -------------------------------------------------------------------------------------------------
# merging into a model folder, and the command line

# a classifier's head, which may have another number of labels than the model folder
CLASSIFIER = {"classifier.weight", "classifier.bias", "classifier.out_proj.weight",
              "classifier.out_proj.bias", "score.weight"}


def merge_folder(model: str | Path, adapter: str | Path, out: str | Path):
    """Writes the folder `out`: a model folder in Hugging Face's layout with an adapter merged into
    its weights. Sums are computed in float32 and stored in the dtype of the weight. Modules that
    the adapter saved whole (a head) are copied, and config.json gets their labels: those in
    salora.json, else the model's own if the number fits. If the adapter changes a head or embedding
    that were tied, they no longer are. ValueError: `out` already exists, or adapter and model do
    not fit together; nothing is then written."""
    model, out = Path(model), Path(out)
    if out.exists():
        raise ValueError(f"{out}: already exists; give another folder")
    settings, tensors = read_adapter(adapter)
    config, (files, index) = read_json(
        model / "config.json", "; expected a model folder, not a hub name"), weight_files(model)
    if config.get("quantization_config"):
        raise ValueError(f"{model}: its weights are quantized; take the model before quantization")
    places = {}  # {name: (file, key there, shape)}
    for file in files:
        with open_tensors(file) as f:
            for key in f.keys():
                name = full_name(key)
                if name in places:
                    raise ValueError(f"{model}: has {name} twice, once as {key}")
                places[name] = file, key, f.get_slice(key).get_shape()

    whole = settings.get("modules_to_save")
    own = re.compile(r"\.(lora_[AB]|base_layer|modules_to_save)\.")  # PEFT's own names
    saved = {name: t for name, t in tensors.items()
             if replaced(name, whole) and not own.search(name)}
    if settings.get("task_type") == "SEQ_CLS" and whole and not CLASSIFIER & {*saved}:
        raise ValueError(f"{adapter}: adapter_model.safetensors: the head that modules_to_save "
                         f"names is missing ({', '.join(whole)})")
    changed = [*saved, *(name.replace(".lora_A.", ".") for name in tensors if ".lora_A." in name)]
    parts = [name.partition(".") for name in changed if name not in places]
    body = next((first for first, _, rest in parts if rest in places), "")  # if keys lack its name
    places = {full_name(name, body): place for name, place in places.items()}
    tied = config.get("tie_word_embeddings") and [name for name in changed if name.endswith(
        ("embed_tokens.weight", "lm_head.weight"))]
    for one, other in (TIED, TIED[::-1]):
        if tied and one in places and other not in places:
            places[other] = places[one]

    def optional(name):
        """Is it in a head or pooler that the adapter does not change? Its model may lack that."""
        path = name.rpartition(".")[0]
        return ((name.startswith(HEADS) or ".pooler." in name) and name not in saved
                and f"{path}.lora_A.weight" not in tensors)

    def weight_of(name):
        if config.get("tie_word_embeddings") and name in TIED and name not in places:
            name = TIED[1 - TIED.index(name)]
        if name not in places:
            return None
        file, key, _ = places[name]
        with open_tensors(file) as f:
            return f.get_tensor(key)

    linears, wanted = {}, {}
    for name, (_, _, shape) in places.items():
        path, _, kind = name.rpartition(".")
        embedding = path.endswith(("embeddings", "embed_tokens"))
        if kind == "weight" and len(shape) == 2 and not embedding and not optional(name):
            linears[path] = shape
        if replaced(name, whole) and not optional(name):
            wanted[name] = shape
    wanted |= {name: t.shape for name, t in saved.items()
               if name in CLASSIFIER or name not in places}
    try:
        if tied and not set(tied) <= set(TIED):
            raise ValueError(f"it changes {tied[0]}, which is tied to another: not implemented")
        layers = match(adapter, settings, tensors, linears, wanted, weight_of)
        outputs, labels = [len(tensors[name]) for name in saved if name in CLASSIFIER], None
        if outputs:
            labels = read_own(adapter).get("labels") or output_names(config, outputs[0])
            if len(labels) != outputs[0]:
                raise ValueError(f"salora.json: has {len(labels)} labels, but the head has "
                                 f"{outputs[0]} outputs")
    except ValueError as e:
        raise ValueError(f"{adapter}: {str(e).removeprefix(f'{adapter}/')}") from None

    out.parent.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    beside.chmod(0o755)
    try:
        weight_map, dtype = {}, torch.float32  # dtype: the last, for what the model lacks
        for file in files:
            merged = {}
            with open_tensors(file) as f:
                for name, (place, key, _) in places.items():
                    if place != file:
                        continue
                    weight, path = f.get_tensor(key), name.removesuffix(".weight")
                    if weight.is_floating_point():
                        dtype = weight.dtype
                    elif path in layers:
                        raise ValueError(f"{file}: {key} is {weight.dtype}, quantized; take the "
                                         "model before quantization")
                    if path in layers:
                        a, b = (tensors[f"{path}.lora_{x}.weight"] for x in "AB")
                        weight = updated(weight, layers[path][1], a, b)
                    merged[name] = saved.pop(name).to(weight.dtype) if name in saved else weight
            if file == files[-1]:
                merged |= {name: t.to(dtype) for name, t in saved.items()}
            save_file(merged, beside / file.name, metadata={"format": "pt"})
            weight_map |= dict.fromkeys(merged, file.name)
        if tied:
            config["tie_word_embeddings"] = False
        if labels:
            config["id2label"] = {str(i): name for i, name in enumerate(labels)}
            config["label2id"] = {name: i for i, name in enumerate(labels)}
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
        done = {*written, "adapter_config.json", "salora.json"}
        for file in model.iterdir():  # the tokenizer and other text files
            text = file.suffix in (".json", ".txt", ".model", ".jinja")
            if text and file.name not in done and not file.name.endswith(".index.json"):
                shutil.copy(file, beside)
        os.replace(beside, out)
        if tied:
            print(f"{out}: head and embedding are two tensors there, and tie_word_embeddings is "
                  f"false, as {adapter} changes {' and '.join(tied)}")
    finally:  # if it failed
        shutil.rmtree(beside, ignore_errors=True)


def show(adapter: str | Path) -> str:
    """What an adapter folder holds, as text: parameters, budget and the rank of each matrix.
    ValueError: as in read_adapter."""
    settings, tensors = read_adapter(adapter)
    known, found = read_own(adapter, tensors), stored_ranks(tensors)
    table = known.get("ranks") or found
    r = max([known.get("r") or 1, *table.values()])
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
            ("--out", "folder to write, which must not exist yet")):
        command.add_argument(flag, required=True, metavar="DIR", help=text)
    command = commands.add_parser("show", help="print an adapter's ranks, parameters and budget")
    command.add_argument("adapter", metavar="ADAPTER", help="folder of the adapter")

    def error(message):
        print(f"error: {message}", file=sys.stderr)
        sys.exit(2)

    for each in (parser, *commands.choices.values()):
        each.error = error  # one line, as for other errors
    if isinstance(sys.stdout, io.TextIOWrapper):  # not in a notebook
        sys.stdout.reconfigure(errors="replace")  # for a terminal that prints only ASCII
    args = parser.parse_args(argv)
    try:
        if args.command == "show":
            print(show(args.adapter))
        else:
            merge_folder(args.model, args.adapter, args.out)
            print(f"{args.out}/: {args.model} with {args.adapter} in its weights")
    except KeyboardInterrupt:
        print("error: stopped", file=sys.stderr)
        sys.exit(130)
    except (OSError, ValueError, SafetensorError) as e:
        error(f"{e.filename}: {e.strerror}" if isinstance(e, OSError) and e.filename else e)


if __name__ == "__main__":
    main()
