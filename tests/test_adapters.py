"""Adapters come from PEFT, go on in training, and leave as plain model folders. What PEFT itself
says of ours: test_oracles.py."""

import json
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import adapter
import salora as sl
import train_glue
import train_instruct
from data import InputError
from model import load_decoder, load_encoder, read_config

FIXTURES = Path(__file__).parent / "fixtures"


def model_of(name, folder=None, labels=3):
    """The tiny model of a fixture, in eval mode, its inputs, and the logits that PEFT's adapter for
    it gives."""
    e = load_file(FIXTURES / f"peft-{name}" / "expected.safetensors")
    if name == "bert":
        inputs = [e["input_ids"], e["attention_mask"], e["token_type_ids"]]
        return load_encoder(folder or FIXTURES / name, labels).eval(), inputs, e["logits"]
    return load_decoder(folder or FIXTURES / name).eval(), [e["input_ids"]], e["logits"]


def scattered(model, letters="qkvoud", budget=0.4, seed=0):
    """The model with an adapter of r = 8 that was cut down to uneven ranks, 0 among them."""
    torch.manual_seed(seed)
    method = sl.SaLoRA(model, model.target_paths(letters), 10, r=8, budget=budget)
    with torch.no_grad():
        method.log_theta.normal_()
        method.log_theta[3] = -9
        for layer in method.layers:
            layer.lora_B.normal_(std=0.3)
    method.prune()
    return model


def edit(file, **changes):
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


# ---- from PEFT


@pytest.mark.parametrize("name", ["bert", "llama3"])
def test_an_adapter_that_peft_wrote_gives_pefts_logits(name):
    model, inputs, logits = model_of(name)
    with torch.no_grad():
        assert (model(*inputs) - logits).abs().max() > 0.1  # it does something
        loaded = adapter.load(model, FIXTURES / f"peft-{name}").eval()
        assert (loaded(*inputs) - logits).abs().max() < 1e-5
    wanted = {"bert": {2, 3, 4}, "llama3": {4, 6}}[name]
    assert set(sl.ranks(model).values()) == wanted


@pytest.mark.parametrize("pattern", [
    "(a+)+$",
    "(a|a)*b",
    ".*.*.*.*.*x",
    "(m|m)(o|o)(d|d)(e|e)(l|l)",
    r"(\w+\.)\1",
    "(.*)*",
    "(?:a?){20}a{20}",
    "(a",
    "a" * 2000])
def test_patterns_of_strangers_are_refused_or_quick(pattern):
    start = time.time()
    with pytest.raises(ValueError, match="intricate|regular expression"):
        adapter.as_regex(pattern, end=True).fullmatch("model.layers.0.self_attn." + "a" * 60)
    assert time.time() - start < 1


@pytest.mark.parametrize("pattern,fitting", [
    ("q_proj", True),
    ("proj", False),
    ("self_attn.q_proj", True),
    ("model.layers.1.self_attn.q_proj", True),
    (r"layers\.\d\..*_proj", True),
    ("layers.0.self_attn.q_proj", False),
    (r"^model.layers.1.self_attn.q_proj", True),
    ("(q|v)_proj", True),
    (r"layers\.[02]\..*", False),
    (r"(?!.*mlp).*q_proj", True)])
def test_patterns_are_read_as_peft_reads_them(pattern, fitting):
    regex = adapter.as_regex(pattern, end=True)
    assert (regex.fullmatch("model.layers.1.self_attn.q_proj") is not None) == fitting


def peft_folder(folder, paths, **settings):
    """An adapter of rank 2 for bert/ with tensors for these modules, as PEFT writes it, and
    {path: the update of its weight}."""
    g, tensors, updates = torch.Generator().manual_seed(0), {}, {}
    sizes = {path: m.weight.shape for path, m in
             sl.adapters(load_encoder(FIXTURES / "bert", 3), torch.nn.Linear).items()}
    for path in paths:
        d, k = sizes[path]
        a, b = torch.randn(2, k, generator=g), torch.randn(d, 2, generator=g)
        tensors |= {f"base_model.model.{path}.lora_A.weight": a,
                    f"base_model.model.{path}.lora_B.weight": b}
        updates[path] = b @ a
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    settings = dict(peft_type="LORA", r=2, lora_alpha=2, bias="none") | settings
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return updates


LAYER = "bert.encoder.layer."
QUERIES = [f"{LAYER}{i}.attention.self.query" for i in (0, 1)]
DENSE = [f"{LAYER}{i}.{end}.dense" for i in (0, 1)
         for end in ("attention.output", "intermediate", "output")]


@pytest.mark.parametrize("settings,paths,said", [  # what PEFT 0.21.2 adapts for these settings
    (dict(target_modules=["query", "q_proj"]), QUERIES, "'q_proj' in target_modules"),
    (dict(target_modules=["query"], rank_pattern={"q_proj": 3}), QUERIES,
     "'q_proj' in rank_pattern"),
    (dict(target_modules=["query"], alpha_pattern={"q_proj": 3}), QUERIES,
     "'q_proj' in alpha_pattern"),
    (dict(target_modules=["query"], modules_to_save=["norm", "score"]), QUERIES,
     "'norm' in modules_to_save"),
    (dict(target_modules=["query"], layers_to_transform=1), QUERIES[1:], ""),
    (dict(target_modules=["query"], layers_to_transform=[0], layers_pattern="layer"), QUERIES[:1],
     ""),
    (dict(target_modules=["query", "key"], layers_to_transform=[1], layers_pattern=["x", "layer"],
          exclude_modules=["key"]), QUERIES[1:], "'key' in target_modules"),
    (dict(target_modules=[QUERIES[0]], layers_to_transform=[1]), QUERIES[:1], ""),
    (dict(target_modules=["query", "dense"], exclude_modules=r".*(output|pooler)\.dense"),
     [QUERIES[0], DENSE[1], QUERIES[1], DENSE[4]], ""),
    (dict(target_modules=r".*\.1\..*query"), QUERIES[1:], "")])
def test_settings_that_peft_reads_are_read(settings, paths, said, tmp_path, capsys):
    updates = peft_folder(tmp_path / "a", paths, **settings)
    plain, merged = load_encoder(FIXTURES / "bert", 3), tmp_path / "m"
    tuned = adapter.load(load_encoder(FIXTURES / "bert", 3), tmp_path / "a")
    in_order = [path for path in sl.adapters(plain, torch.nn.Linear) if path in paths]
    assert list(sl.ranks(tuned)) == in_order
    printed = capsys.readouterr().out
    assert said in printed and printed.count("\n") == bool(said)
    adapter.merge_folder(FIXTURES / "bert", tmp_path / "a", merged)
    merged, tuned = load_encoder(merged, 3), sl.merge(tuned)
    for path, update in updates.items():
        wanted = plain.get_submodule(path).weight + update
        for model in (tuned, merged):
            assert torch.allclose(model.get_submodule(path).weight, wanted, atol=1e-5)


@pytest.mark.parametrize("settings,words", [
    (dict(target_modules=["query"], layers_to_transform=[0, "1"]), "layers_to_transform is"),
    (dict(target_modules=["query"], exclude_modules=3), "exclude_modules is 3"),
    (dict(target_modules=["q_proj"]), "'q_proj' matches no nn.Linear"),
    (dict(target_modules=["query"], layers_to_transform=[0]), "layer.1.*expected nothing, found"),
    (dict(target_modules=["query", "key"]), r"self.key.*expected \[2, 32\], found nothing"),
    (dict(target_modules=["query"], modules_to_save=["LayerNorm"]), "LayerNorm.*found nothing"),
    (dict(target_modules=["query"], trainable_token_indices=[1]), "trainable_token_indices is"),
    (dict(target_modules=["query"], ensure_weight_tying=True), "ensure_weight_tying is True")])
def test_an_adapter_is_refused_by_the_name_of_what_does_not_fit(settings, words, tmp_path):
    peft_folder(tmp_path / "a", QUERIES, **settings)
    for use in (lambda: adapter.load(load_encoder(FIXTURES / "bert", 3), tmp_path / "a"),
                lambda: adapter.merge_folder(FIXTURES / "bert", tmp_path / "a", tmp_path / "m")):
        with pytest.raises(ValueError, match=words):
            use()
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_pickled_adapter_is_not_read(tmp_path):
    peft_folder(tmp_path / "a", QUERIES, target_modules=["query"])
    file = tmp_path / "a" / "adapter_model.safetensors"
    file.rename(file.with_suffix(".bin"))
    with pytest.raises(ValueError, match="adapter_model.bin is a pickle, which is not read"):
        adapter.load(load_encoder(FIXTURES / "bert", 3), tmp_path / "a")


def test_a_saved_name_stands_for_every_module_that_ends_in_it_as_in_peft(tmp_path):
    model = scattered(load_decoder(FIXTURES / "llama3"), "qk")
    for name, p in model.named_parameters():
        if "norm" in name:
            torch.nn.init.normal_(p)
    adapter.save(model, tmp_path / "a", ["norm"])
    tensors = load_file(tmp_path / "a" / "adapter_model.safetensors")
    assert sum(name.endswith("norm.weight") for name in tensors) == 5  # two a layer, one at the end
    base = Path(shutil.copytree(FIXTURES / "llama3", tmp_path / "base"))
    assert merged_equals(model, load_decoder, tmp_path) and base.is_dir()
    again = adapter.load(load_decoder(base), tmp_path / "a")
    assert all(torch.equal(p, again.get_parameter(name)) for name, p in model.named_parameters()
               if "norm" in name)


# ---- what is saved


def small():
    torch.manual_seed(3)
    block = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.BatchNorm1d(8))
    return torch.nn.Sequential(torch.nn.Linear(8, 8), block, torch.nn.Linear(8, 3))


@pytest.mark.parametrize("wrap", [
    torch.nn.DataParallel,
    lambda model: torch.compile(model, backend="eager"),
    lambda model: torch.compile(torch.nn.DataParallel(model), backend="eager")])
def test_wrappers_leave_no_trace_in_the_files(wrap, tmp_path):
    model, x = small(), torch.randn(5, 8)
    sl.SaLoRA(model, ["0", "1.0"], 1, r=2, window=None)
    for layer in sl.adapters(model).values():
        torch.nn.init.normal_(layer.lora_B)
    model[1][1].running_mean.normal_()
    adapter.save(wrap(model), tmp_path / "a", ["1.1"])
    assert json.loads((tmp_path / "a" / "salora.json").read_text())["ranks"] == {"0": 2, "1.0": 2}
    wanted = model.eval()(x)
    assert torch.equal(adapter.load(small(), tmp_path / "a").eval()(x), wanted)
    assert torch.equal(adapter.load(wrap(small()), tmp_path / "a").eval()(x), wanted)


def test_a_module_compiled_inside_leaves_no_trace_in_the_files(tmp_path):
    model, x = small(), torch.randn(5, 8)
    model[1] = torch.compile(model[1], backend="eager")
    sl.SaLoRA(model, ["1.0"], 1, r=2, window=None)
    for layer in sl.adapters(model).values():
        torch.nn.init.normal_(layer.lora_B)
    adapter.save(model, tmp_path / "a")
    assert torch.equal(adapter.load(small(), tmp_path / "a").eval()(x), model.eval()(x))


def test_nothing_that_is_trained_is_left_behind(tmp_path):
    model = small()
    with pytest.raises(ValueError, match="the model has no adapters to save"):
        adapter.save(model, tmp_path / "a")
    sl.SaLoRA(model, ["0"], 10, r=2)
    model[2].requires_grad_(True)
    with pytest.raises(ValueError, match=r"2.weight is trained \(2 such .*modules_to_save=\['2'"):
        adapter.save(model, tmp_path / "a")
    assert not (tmp_path / "a").exists()
    adapter.save(model, tmp_path / "a", ["2"])
    with pytest.raises(ValueError, match=r"has adapters already: merge\(\) them first"):
        adapter.load(model, tmp_path / "a")


def test_a_budget_is_not_recorded_before_anything_was_cut(tmp_path):
    model = small()
    method = sl.SaLoRA(model, ["0", "1.0"], 10, r=4)
    with pytest.warns(UserWarning, match="0.5, but nothing has been cut .* window has not ended"):
        adapter.save(model, tmp_path / "a", budget=method.budget)
    assert json.loads((tmp_path / "a" / "salora.json").read_text())["budget"] is None
    assert "no budget recorded" in adapter.show(tmp_path / "a")
    sl.merge(adapter.load(small(), tmp_path / "a"))
    method.prune()
    adapter.save(model, tmp_path / "b", budget=method.budget)
    again = adapter.load(small(), tmp_path / "b")
    adapter.save(again, tmp_path / "c", budget=method.budget)  # it is known to have been cut
    assert "budget 0.5; rank 4 at the start" in adapter.show(tmp_path / "c")


def test_a_selection_that_keeps_everything_is_told_as_such(tmp_path):
    model = small()
    method = sl.SaLoRA(model, ["0", "1.0"], 10, r=4, selection="paper")
    with pytest.warns(UserWarning, match="the gates came to a density of 0.92"):
        method.prune()
    with pytest.warns(UserWarning, match="every triplet was kept"):
        adapter.save(model, tmp_path / "a", budget=method.budget)


def test_the_rank_map_of_an_adapter_that_was_gone_on_with_is_as_before(tmp_path):
    model = scattered(load_encoder(FIXTURES / "bert", 3), "dukq")
    table = sl.ranks(model)
    assert 0 in table.values() and max(table.values()) < 8
    adapter.save(model, tmp_path / "a")
    again = adapter.load(load_encoder(FIXTURES / "bert", 3), tmp_path / "a")
    assert list(sl.ranks(again).items()) == list(table.items())
    sl.SaLoRA(again, None, 3, window=None)
    adapter.save(again, tmp_path / "b", "classifier")
    shown = [adapter.show(tmp_path / name).split("\n", 2) for name in "ab"]
    assert shown[0][2] == shown[1][2] and "99 in classifier" in shown[1][1]


def test_ranks_of_another_adapter_are_left_out_and_that_is_said(tmp_path, capsys):
    adapter.save(scattered(load_encoder(FIXTURES / "bert", 3), "qk"), tmp_path / "a")
    peft_folder(tmp_path / "b", QUERIES, target_modules=["query"])
    shutil.copy(tmp_path / "a" / "salora.json", tmp_path / "b")
    alone, _, _ = adapter.show(tmp_path / "b").partition("at the start")
    assert "rank 2 to 2" in alone and "salora.json: is ignored" in capsys.readouterr().out
    model = adapter.load(load_encoder(FIXTURES / "bert", 3), tmp_path / "b")
    assert sl.ranks(model) == dict.fromkeys(QUERIES, 2)
    assert "salora.json: is ignored" in capsys.readouterr().out


def test_an_adapted_model_can_be_stored_and_flattened_before_and_after_the_cut(tmp_path):
    model = small()
    method = sl.SaLoRA(model, ["0", "1.0"], 10, r=4)
    for _ in range(2):
        save_file(model.state_dict(), tmp_path / "x.safetensors")
        torch.nn.utils.parameters_to_vector(model.parameters())
        method.prune()


def test_a_module_under_two_names_and_one_weight_in_two_modules(tmp_path):
    def shared(one_module):
        model = small()
        model.add_module("twin", model[0] if one_module else torch.nn.Linear(8, 8))
        model.twin.weight = model[0].weight
        return model

    model = shared(one_module=False)
    sl.SaLoRA(model, ["twin"], 1, r=2, window=None)
    torch.nn.init.normal_(model.twin.lora_B)
    adapter.save(model, tmp_path / "a")
    x, again = torch.randn(5, 8), adapter.load(shared(one_module=False), tmp_path / "a")
    wanted = model.twin(x)
    assert torch.equal(again.twin(x), wanted) and again[0].weight is again.twin.base.weight
    assert torch.allclose(sl.merge(again).twin(x), wanted, atol=1e-6)
    assert torch.equal(again[0].weight, small()[0].weight)  # its twin's update is not in there
    edit(tmp_path / "a" / "adapter_config.json", target_modules=["0"],
         exclude_modules=["1.0"])
    tensors = load_file(tmp_path / "a" / "adapter_model.safetensors")
    save_file({key.replace("twin", "0"): t for key, t in tensors.items()},
              tmp_path / "a" / "adapter_model.safetensors")
    with pytest.raises(ValueError, match="0 is in the model under two names"):
        adapter.load(shared(one_module=True), tmp_path / "a")


# ---- merging into a folder


@pytest.mark.parametrize("name", ["bert", "llama3"])
def test_merged_folder_is_the_model_with_the_adapter(name, tmp_path):
    before = {file.name: file.read_bytes() for file in (FIXTURES / name).iterdir()}
    adapter.merge_folder(FIXTURES / name, FIXTURES / f"peft-{name}", tmp_path / "m")
    model, inputs, logits = model_of(name, tmp_path / "m")
    with torch.no_grad():
        assert (model(*inputs) - logits).abs().max() < 1e-4 and not sl.adapters(model)
    assert before == {file.name: file.read_bytes() for file in (FIXTURES / name).iterdir()}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m"]
    with pytest.raises(ValueError, match="already exists"):
        adapter.merge_folder(FIXTURES / name, FIXTURES / f"peft-{name}", tmp_path / "m")


def test_shards_stay_shards_and_the_dtype_stays(tmp_path):
    base = tmp_path / "base"
    shutil.copytree(FIXTURES / "llama", base)
    (base / "tokenizer.json").write_text("{}"), (base / "pytorch_model.bin").write_text("a pickle")
    for file in base.glob("model-*"):
        save_file({key: t.bfloat16() for key, t in load_file(file).items()}, file)
    index = json.loads((base / "model.safetensors.index.json").read_text())
    adapter.save(scattered(load_decoder(base)), tmp_path / "a")
    adapter.merge_folder(base, tmp_path / "a", tmp_path / "m")
    assert json.loads((tmp_path / "m" / "model.safetensors.index.json").read_text()) == index
    left = {"pytorch_model.bin", "expected.safetensors"}
    names = {p.name for p in base.iterdir()} - left
    assert {p.name for p in (tmp_path / "m").iterdir()} == names
    tuned, changed = scattered(load_decoder(base)), 0
    for path, layer in sl.adapters(tuned).items():
        key = f"{path}.weight"
        file = index["weight_map"][key]
        old, new = load_file(base / file)[key], load_file(tmp_path / "m" / file)[key]
        update = layer.scale * layer.lora_B @ layer.lora_A
        assert new.dtype == torch.bfloat16
        assert torch.equal(new, (old.float() + update).bfloat16())  # rounded once
        changed += not torch.equal(old, new)
    assert changed == sum(rank > 0 for rank in sl.ranks(tuned).values()) < 12


def test_bare_model_gets_the_head_and_its_names(tmp_path):
    """all-MiniLM and the like: keys without bert., no head; here with 4 labels."""
    base = tmp_path / "base"
    shutil.copytree(FIXTURES / "bert", base)
    weights = {key.removeprefix("bert."): t
               for key, t in load_file(base / "model.safetensors").items()
               if not key.startswith("classifier")}
    save_file(weights, base / "model.safetensors")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | dict(architectures=["BertModel"])))
    model = scattered(load_encoder(base, 4)).eval()
    adapter.save(model, tmp_path / "a", ["classifier", "pooler"], task_type="SEQ_CLS")
    adapter.merge_folder(base, tmp_path / "a", tmp_path / "m")
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    assert config["architectures"] == ["BertForSequenceClassification"]
    assert config["id2label"] == {str(i): f"LABEL_{i}" for i in range(4)}
    assert len(config["label2id"]) == 4
    names = {f"bert.{key}" for key in weights} | {"classifier.weight", "classifier.bias"}
    assert set(load_file(tmp_path / "m" / "model.safetensors")) == names
    ids = torch.randint(5, 60, (2, 9))
    with torch.no_grad():
        assert (load_encoder(tmp_path / "m", 4).eval()(ids) - model(ids)).abs().max() < 1e-5


def renamed(name, base, spell, more=()):
    """The folder `base`: a fixture's, all of it in model.safetensors, its keys spelled by spell."""
    shutil.copytree(FIXTURES / name, base)
    weights = {spell(key): t for file in base.glob("model*.safetensors")
               for key, t in load_file(file).items()}
    save_file(weights | dict(more), base / "model.safetensors", metadata={"format": "pt"})
    return base


def merged_equals(model, load, tmp_path):
    """Does merging tmp_path/a into tmp_path/base give this model's outputs?"""
    adapter.merge_folder(tmp_path / "base", tmp_path / "a", tmp_path / "m")
    ids = torch.randint(5, 60, (2, 9))
    with torch.no_grad():
        return (load(tmp_path / "m").eval()(ids) - model.eval()(ids)).abs().max() < 1e-5


def test_gamma_and_beta_of_older_files_are_known(tmp_path):
    def older(key):
        key = re.sub("LayerNorm.weight", "LayerNorm.gamma", key)
        return key.replace("LayerNorm.bias", "LayerNorm.beta")

    model = scattered(load_encoder(renamed("bert", tmp_path / "base", older), 3))
    torch.nn.init.normal_(model.bert.encoder.layer[1].output.LayerNorm.weight)
    adapter.save(model, tmp_path / "a", ["LayerNorm"])
    assert merged_equals(model, lambda folder: load_encoder(folder, 3), tmp_path)
    keys = set(load_file(tmp_path / "m" / "model.safetensors"))
    assert keys == set(load_file(FIXTURES / "bert" / "model.safetensors"))


def test_a_bare_llama_with_its_head_and_an_index_beside_a_single_file(tmp_path, capsys):
    base = renamed("llama", tmp_path / "base", lambda key: key.removeprefix("model."))
    assert "lm_head.weight" in load_file(base / "model.safetensors")
    for file in base.glob("model-*"):  # the index is a left-over: the single file counts
        save_file({"x": torch.zeros(1)}, file)
    model = scattered(load_decoder(base), "qkvoudg")
    assert "model.safetensors is read, not the shards" in capsys.readouterr().out
    adapter.save(model, tmp_path / "a")
    assert merged_equals(model, load_decoder, tmp_path)
    assert [file.name for file in (tmp_path / "m").glob("model*")] == ["model.safetensors"]
    merged = load_file(tmp_path / "m" / "model.safetensors")
    assert {key.split(".")[0] for key in merged} == {"model", "lm_head"}


@pytest.mark.parametrize("name,more", [
    ("bert", ["cls.predictions.transform.dense.weight", "cls.predictions.decoder.weight"]),
    ("roberta", ["lm_head.dense.weight", "roberta.pooler.dense.weight"])])
def test_targets_do_not_reach_into_heads_of_other_tasks(name, more, tmp_path):
    head = {key: torch.randn(32, 32) for key in more}
    base = renamed(name, tmp_path / "base", str, head)
    model = load_encoder(base, 3)
    sl.SaLoRA(model, [f"encoder.layer.{i}.{part}" for i in range(2) for part in (
        "attention.self.query", "attention.output.dense", "intermediate.dense", "output.dense")],
        1, r=2, window=None)
    for layer in sl.adapters(model).values():
        torch.nn.init.normal_(layer.lora_B)
    adapter.save(model, tmp_path / "a", ["classifier"])
    edit(tmp_path / "a" / "adapter_config.json", target_modules=["query", "dense"])
    assert merged_equals(model, lambda folder: load_encoder(folder, 3), tmp_path)
    merged = load_file(tmp_path / "m" / "model.safetensors")
    assert all(torch.equal(merged[key], t) for key, t in head.items())


def test_labels_follow_the_head_and_files_of_an_adapter_stay_behind(tmp_path):
    base = renamed("bert", tmp_path / "base", str)
    adapter.save(scattered(load_encoder(base, 4)), base, ["classifier"])  # no task_type
    adapter.merge_folder(base, base, tmp_path / "m")
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    before = json.loads((base / "config.json").read_text())
    assert len(config["id2label"]) == len(config["label2id"]) == 4
    assert config["architectures"] == before["architectures"]
    assert not {"adapter_config.json", "salora.json"} & {p.name for p in (tmp_path / "m").iterdir()}


@pytest.mark.parametrize("stored", ["the embedding alone", "twice", "the head alone", "a head"])
@pytest.mark.parametrize("changed", ["adapted head", "saved head", "saved embedding"])
def test_a_tied_head_that_an_adapter_changes_becomes_a_tensor_of_its_own(
        stored, changed, tmp_path, capsys):
    embedding = load_file(FIXTURES / "llama3" / "model.safetensors")["model.embed_tokens.weight"]
    head = torch.randn(60, 32) / 10 if stored == "a head" else embedding.clone()
    base = renamed(
        "llama3", tmp_path / "base",
        lambda key: "lm_head.weight" if stored == "the head alone" and "embed" in key else key,
        {} if "alone" in stored else {"lm_head.weight": head})
    model, saved = load_decoder(base), []
    sl.SaLoRA(model, ["lm_head" if changed == "adapted head" else "q_proj"], 1, r=2, window=None)
    for layer in sl.adapters(model).values():
        torch.nn.init.normal_(layer.lora_B)
    if changed != "adapted head":
        saved = ["lm_head" if changed == "saved head" else "embed_tokens"]
        parent = model if changed == "saved head" else model.model
        new = torch.nn.Parameter(torch.randn(60, 32) / 10)
        parent.get_submodule(saved[0]).weight = new
    adapter.save(model, tmp_path / "a", saved)
    capsys.readouterr()
    assert merged_equals(model, load_decoder, tmp_path)
    assert "head and embedding are two tensors there" in capsys.readouterr().out
    assert not json.loads((tmp_path / "m" / "config.json").read_text())["tie_word_embeddings"]
    ids, fresh = torch.randint(5, 60, (2, 9)), adapter.load(load_decoder(base), tmp_path / "a")
    with torch.no_grad():
        assert torch.allclose(fresh.eval()(ids), model.eval()(ids), atol=1e-5)
    said = capsys.readouterr().out
    assert ("no longer tied" in said) == (bool(saved) and stored != "a head")


def test_what_only_repeats_the_tied_embedding_is_no_change(tmp_path):
    """PEFT's save_embedding_layers=True."""
    a = Path(shutil.copytree(FIXTURES / "peft-llama3", tmp_path / "a"))
    file = a / "adapter_model.safetensors"
    embedding = load_file(FIXTURES / "llama3" / "model.safetensors")["model.embed_tokens.weight"]
    more = {"base_model.model.model.embed_tokens.weight": embedding,
            "base_model.model.lm_head.weight": embedding.half().float()}
    save_file(load_file(file) | more, file)
    with pytest.raises(ValueError, match="lm_head.weight: expected the model's own values"):
        adapter.load(load_decoder(FIXTURES / "llama3"), a)
    more["base_model.model.lm_head.weight"] = embedding.half()  # the same, in a narrower dtype
    save_file(load_file(file) | more, file)
    adapter.load(load_decoder(FIXTURES / "llama3"), a)
    adapter.merge_folder(FIXTURES / "llama3", a, tmp_path / "m")
    merged = load_file(tmp_path / "m" / "model.safetensors")
    assert torch.equal(merged["model.embed_tokens.weight"], embedding)
    assert "lm_head.weight" not in merged


@pytest.mark.parametrize("weight_map", [
    {"a": "../evil.safetensors"},
    {"a": "/tmp/evil.safetensors"},
    {"a": 3},
    None,
    ["a"]])
def test_an_index_that_points_outside_its_folder_is_refused(weight_map, tmp_path):
    base = Path(shutil.copytree(FIXTURES / "llama3", tmp_path / "base"))
    (base / "model.safetensors").rename(tmp_path / "evil.safetensors")
    before = (tmp_path / "evil.safetensors").read_bytes()
    (base / "model.safetensors.index.json").write_text(json.dumps(dict(weight_map=weight_map)))
    with pytest.raises(ValueError, match="index.json"):
        adapter.merge_folder(base, FIXTURES / "peft-llama3", tmp_path / "m")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base", "evil.safetensors"]
    assert (tmp_path / "evil.safetensors").read_bytes() == before


def test_a_merge_that_fails_half_way_leaves_nothing(tmp_path, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(adapter.shutil, "copy", full)
    with pytest.raises(OSError):
        adapter.merge_folder(FIXTURES / "llama3", FIXTURES / "peft-llama3", tmp_path / "m")
    assert not list(tmp_path.iterdir())


def test_merging_deletes_nothing_that_it_did_not_make(tmp_path):
    base = Path(shutil.copytree(FIXTURES / "llama3", tmp_path / "m.new"))
    adapter.merge_folder(base, FIXTURES / "peft-llama3", tmp_path / "m")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m", "m.new"]
    before = (FIXTURES / "llama3" / "model.safetensors").read_bytes()
    assert (base / "model.safetensors").read_bytes() == before


def test_merging_a_tied_head_leaves_the_embedding_alone():
    model = load_decoder(FIXTURES / "llama3").eval()
    embedding = model.model.embed_tokens.weight.clone()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    sl.SaLoRA(model, ["lm_head"], 1, r=4, window=None)
    torch.nn.init.normal_(model.lm_head.lora_B)
    ids = torch.randint(3, 60, (1, 9))
    with torch.no_grad():
        before = model(ids)
        assert (sl.merge(model)(ids) - before).abs().max() < 1e-4
    assert torch.equal(model.model.embed_tokens.weight, embedding)


def test_quantized_weights_and_other_shapes_are_refused(tmp_path):
    base = Path(shutil.copytree(FIXTURES / "bert", tmp_path / "base"))
    weights = load_file(base / "model.safetensors")
    key = next(k for k in weights if k.endswith("layer.0.attention.self.query.weight"))
    save_file(weights | {key: weights[key].to(torch.int8)}, base / "model.safetensors")
    with pytest.raises(ValueError, match="query.weight is torch.int8, quantized"):
        adapter.merge_folder(base, FIXTURES / "peft-bert", tmp_path / "m")
    save_file(weights | {"zz.position_ids": torch.arange(3)}, base / "model.safetensors")
    a = Path(shutil.copytree(FIXTURES / "peft-bert", tmp_path / "a"))
    adapter.merge_folder(base, a, tmp_path / "m")  # what stands last is of no kind for a head
    merged = load_file(tmp_path / "m" / "model.safetensors")
    assert merged["classifier.weight"].dtype == torch.float32
    edit(a / "adapter_config.json", modules_to_save=["classifier", "pooler"])
    tensors = load_file(a / "adapter_model.safetensors")
    tensors["base_model.model.bert.pooler.dense.weight"] = torch.zeros(3, 3)
    save_file(tensors, a / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=r"dense.weight: expected \[32, 32\], found \[3, 3\]"):
        adapter.merge_folder(base, a, tmp_path / "m2")
    edit(base / "config.json", quantization_config=dict(bits=4))
    with pytest.raises(ValueError, match="its weights are quantized"):
        adapter.merge_folder(base, FIXTURES / "peft-bert", tmp_path / "m2")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "base", "m"]


@pytest.mark.slow
def test_merge_and_show_from_the_shell(tmp_path, capsys):
    command = [sys.executable, adapter.__file__, "merge", "--model", FIXTURES / "llama3",
               "--adapter", FIXTURES / "peft-llama3", "--out", tmp_path / "m"]
    subprocess.run(command, check=True, capture_output=True)
    assert (tmp_path / "m" / "model.safetensors").is_file()
    assert read_config(tmp_path / "m", train_instruct.DecoderConfig)
    model = scattered(load_encoder(FIXTURES / "bert", 3))
    adapter.save(model, tmp_path / "a", ["classifier"], budget=0.4, base_model_name_or_path="tiny")
    text = adapter.show(tmp_path / "a")
    table = sl.ranks(model)
    kept = sum(p.numel() for m in sl.adapters(model).values() for p in (m.lora_A, m.lora_B))
    assert f"{kept:,} parameters in {sum(r > 0 for r in table.values())} matrices" in text
    assert "99 in classifier" in text and "adapter of tiny" in text
    zero = sum(r == 0 for r in table.values())
    assert f"budget 0.4; rank 8 at the start; {zero} of 12 matrices" in text
    assert sl.rank_map(table, 8) in text
    adapter.main(["show", str(FIXTURES / "peft-llama3")])
    foreign = capsys.readouterr().out
    assert "budget" not in foreign and "rank 4 to 6" in foreign and "mlp.down_proj" in foreign


@pytest.mark.parametrize("change,words", [
    (lambda base, a: (base / "model.safetensors").unlink(), "model.safetensors"),
    (lambda base, a: (base / "config.json").write_text("{"), "config.json"),
    (lambda base, a: (base / "model.safetensors").write_bytes(b"\xff" * 50), "model.safetensors"),
    (lambda base, a: (a / "adapter_config.json").write_text("[]"), "holds a list"),
    (lambda base, a: (a / "adapter_config.json").unlink(), "adapter_config.json"),
    (lambda base, a: (a / "adapter_model.safetensors").write_bytes(b""),
     "adapter_model.safetensors"),
    (lambda base, a: save_file({
        name: t for name, t in load_file(a / "adapter_model.safetensors").items()
        if "classifier" not in name}, a / "adapter_model.safetensors"), "the head that"),
    (lambda base, a: shutil.copytree(FIXTURES / "llama3", base, dirs_exist_ok=True),
     "matches no nn.Linear: is the adapter for another model?"),
    (lambda base, a: (base / "config.json").unlink(), "expected a model folder, not a hub name")])
def test_what_cannot_be_merged_is_one_line_and_leaves_nothing(change, words, tmp_path, capsys):
    base = Path(shutil.copytree(FIXTURES / "bert", tmp_path / "base"))
    a = Path(shutil.copytree(FIXTURES / "peft-bert", tmp_path / "a"))
    change(base, a)
    with pytest.raises(SystemExit) as e:
        adapter.main(["merge", "--model", str(base), "--adapter", str(a), "--out",
                      str(tmp_path / "m")])
    error = capsys.readouterr().err
    assert e.value.code == 2 and error.count("\n") == 1
    assert error.startswith("error: ") and words in error
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "base"]


# ---- training goes on from an adapter


@pytest.mark.slow
def test_glue_goes_on_from_an_adapter_scores_it_and_merges_it(tmp_path, capsys):
    def run(name, *flags):
        train_glue.main(["--threads", "1", "--limit-train", "160", "--limit-dev", "50",
                         "--log-every", "1", "--out", str(tmp_path / name), *map(str, flags)])
        return json.loads((tmp_path / name / "result.json").read_text())

    def predictions(name):
        rows = (tmp_path / name / "predictions.tsv").read_text().splitlines()[1:]
        return [list(map(float, row.split("\t")[3:])) for row in rows]

    def same_predictions(a, b, atol):
        """The logits, and the decisions where they are not a matter of rounding."""
        x, y = (torch.tensor(predictions(name)) for name in (a, b))
        sure = (y[:, 0] - y[:, 1]).abs() > 2 * atol
        assert torch.allclose(x, y, rtol=0, atol=atol) and y.std() > 10 * atol
        assert torch.equal(x.argmax(1)[sure], y.argmax(1)[sure]) and sure.float().mean() > 0.5

    start = run("start", "--method", "lora", "--r", 4, "--epochs", 1)
    given = ["--adapter", tmp_path / "start" / "adapter"]
    scored = run("scored", *given, "--epochs", 0)
    assert scored["steps"] == 0 and scored["trainable_params"] == start["kept_params"]
    same_predictions("scored", "start", atol=1e-4)
    on = run("on", *given, "--epochs", 2, "--seed", 1)
    first = json.loads((tmp_path / "on" / "log.jsonl").read_text().splitlines()[0])
    last = json.loads((tmp_path / "start" / "log.jsonl").read_text().splitlines()[-1])
    assert on["settings"]["r"] == 4 and on["kept_params"] <= on["trainable_params"] // 2
    assert first["orth_b"] == pytest.approx(last["orth_b"], rel=0.05)
    again = run("lora", "--adapter", tmp_path / "on" / "adapter", "--method", "lora", "--epochs", 1)
    assert again["kept_params"] == on["kept_params"]
    demo = train_glue.HERE / "demo" / "model"
    adapter.merge_folder(demo, tmp_path / "on" / "adapter", tmp_path / "merged")
    run("plain", "--model", tmp_path / "merged", "--method", "head", "--epochs", 0)
    same_predictions("plain", "on", atol=5e-3)  # the demo is stored in float16
    assert "budget 0.5; rank 4 at the start" in adapter.show(tmp_path / "on" / "adapter")
    run("on", *given, "--epochs", 2, "--seed", 1, "--resume")
    assert "finished already" in capsys.readouterr().out
    for more, words in ((["--seed", 2], "its --seed is 1, expected 2"),
                        (["--seed", 1, "--price", 0.1], "--price None, not 0.1"),
                        (["--seed", 1, "--beta", 0.01], "--beta 0.0, not 0.01")):
        with pytest.raises(InputError, match=words):
            run("on", *given, "--epochs", 2, *more, "--resume")
    half = run("half", *given, "--method", "lora", "--epochs", 0, "--dtype", "bfloat16")
    assert half["steps"] == 0
    heads = []
    for name in ("start", "half"):
        tensors = load_file(tmp_path / name / "adapter" / "adapter_model.safetensors")
        heads.append({key: t for key, t in tensors.items() if "classifier" in key})
    # the head is float32 whatever the dtype
    assert all(torch.equal(t, heads[1][key]) for key, t in heads[0].items())


@pytest.mark.parametrize("name", ["adapter/mine.txt", "predictions.tsv"])
def test_a_folder_with_somebodys_files_is_no_place_for_a_run(name, tmp_path, capsys):
    (tmp_path / "r" / "adapter").mkdir(parents=True)
    (tmp_path / "r" / name).write_text("mine")
    with pytest.raises(SystemExit):
        train_glue.command(["--max-steps", "10", "--out", str(tmp_path / "r")])
    assert "is not of a run; give another folder" in capsys.readouterr().err
    assert (tmp_path / "r" / name).read_text() == "mine"


@pytest.mark.parametrize("flags,words", [
    (["--adapter", "a", "--r", "4"], "--r is given, expected none with --adapter"),
    (["--adapter", "a", "--targets", "q"], "--targets is given"),
    (["--adapter", "a", "--method", "ft"],
     "--adapter is given, expected no adapter with --method ft"),
    (["--epochs", "0"], "--epochs is 0.0"),
    (["--adapter", "r/adapter", "--out", "r"], "--out r: --adapter lies in it"),
    (["--adapter", "nowhere"], "--adapter nowhere: "),
    (["--adapter", FIXTURES / "peft-llama3"], "matches no nn.Linear")])
def test_adapters_to_start_from_that_cannot_be_are_one_line(flags, words, tmp_path, monkeypatch,
                                                            capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as e:
        train_glue.command(list(map(str, flags)))
    captured = capsys.readouterr()
    assert e.value.code == 2 and words in captured.err and captured.err.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("targets,saved,words", [
    (["query", "classifier.dense"], (), "its target_modules is one that reaches into the head"),
    (["query"], ["LayerNorm"], "its modules_to_save is for roberta.embeddings.LayerNorm.weight")])
def test_an_adapter_that_could_not_be_saved_again_is_refused(targets, saved, words, tmp_path,
                                                             capsys):
    model = load_encoder(train_glue.HERE / "demo" / "model", 2)
    sl.SaLoRA(model, targets, 1, r=2, window=None)
    adapter.save(model, tmp_path / "a", saved)
    with pytest.raises(SystemExit) as e:
        train_glue.command(["--adapter", str(tmp_path / "a"), "--method", "lora", "--max-steps",
                            "10", "--out", str(tmp_path / "r")])
    assert e.value.code == 2 and words in capsys.readouterr().err and not (tmp_path / "r").exists()


def test_gates_need_one_rank(tmp_path, capsys):
    model = load_encoder(train_glue.HERE / "demo" / "model", 2)
    adapter.save(scattered(model), tmp_path / "a", ["classifier"])
    with pytest.raises(SystemExit):
        train_glue.command(["--adapter", str(tmp_path / "a"), "--max-steps", "10",
                            "--out", str(tmp_path / "r")])
    assert "--method lora goes on from it" in capsys.readouterr().err
    assert not (tmp_path / "r").exists()
    with pytest.raises(ValueError, match="all of one rank if gates are to be learned"):
        model = load_encoder(train_glue.HERE / "demo" / "model", 2)
        sl.SaLoRA(adapter.load(model, tmp_path / "a"), None, 10)
    with pytest.raises(ValueError, match="needs adapters in the model"):
        sl.SaLoRA(load_encoder(train_glue.HERE / "demo" / "model", 2), None, 10)


@pytest.mark.slow
def test_instructions_go_on_from_an_adapter_and_score_it(tmp_path):
    def run(name, *flags):
        train_instruct.main(["--threads", "1", "--limit-train", "64", "--limit-dev", "20",
                             "--generate", "0", "--out", str(tmp_path / name), *map(str, flags)])
        return json.loads((tmp_path / name / "result.json").read_text())

    start = run("start", "--epochs", 2)
    scored = run("scored", "--adapter", tmp_path / "start" / "adapter", "--epochs", 0, "--generate",
                 2)
    assert scored["score"] == pytest.approx(start["score"], rel=1e-4)
    llama = train_instruct.DEMO / "llama"
    a, b = (sl.adapters(adapter.load(load_decoder(llama), tmp_path / name / "adapter"))
            for name in ("start", "scored"))
    assert a.keys() == b.keys()
    for path in a:
        assert torch.allclose(*(x[path].lora_B @ x[path].lora_A for x in (a, b)), atol=1e-6)
    assert all(e["after"].startswith(e["before"]) for e in scored["examples"])  # it was not trained
    on = run("on", "--adapter", tmp_path / "start" / "adapter", "--method", "lora", "--epochs", 1)
    assert on["score"] < start["score"] and on["kept_params"] == start["kept_params"]
