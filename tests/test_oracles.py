"""
Against other people's code as it is installed: pip install -r requirements-oracles.txt. Without it
these are skipped. Tiny models always; the real MiniLM and SmolLM2 too where MODELS names their
folder.
"""

import json
import os
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from test_adapters import FIXTURES, scattered

import adapter
import salora as sl
from data import metrics
from model import load_decoder, load_encoder

tr = pytest.importorskip(
    "transformers", reason="transformers is not installed: pip install -r requirements-oracles.txt")
peft = pytest.importorskip(
    "peft", reason="peft is not installed: pip install -r requirements-oracles.txt")
FOLDERS = {name: FIXTURES / name for name in ("roberta", "bert", "llama", "llama3")}
if "MODELS" in os.environ:
    FOLDERS |= {name: Path(os.environ["MODELS"]) / name for name in ("minilm", "smollm2")}


@pytest.fixture(params=["roberta", "bert", "llama", "llama3", "minilm", "smollm2"])
def folder(request):
    if request.param not in FOLDERS:
        pytest.skip("MODELS names no folder of real models")
    return FOLDERS[request.param]


def ours(folder):
    """The model in model.py with 3 labels, or a LLaMA; the names of its head; a task type."""
    kind = json.loads((folder / "config.json").read_text())["model_type"]
    torch.manual_seed(1)  # of a new head
    if kind == "llama":
        return load_decoder(folder, torch.float32), [], "CAUSAL_LM"
    head = {"roberta": ["classifier"], "bert": ["classifier", "pooler"]}[kind]
    return load_encoder(folder, 3), head, "SEQ_CLS"


def theirs(folder, task):
    """transformers' model, without a word."""
    if task == "CAUSAL_LM":
        auto, more = tr.AutoModelForCausalLM, {}
    else:
        auto, more = tr.AutoModelForSequenceClassification, dict(num_labels=3)
    return auto.from_pretrained(folder, dtype=torch.float32, **more).eval()


def logits_of(model, config):
    ids = torch.randint(5, config.vocab_size, (2, 12), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        out = model(ids)
    return out if torch.is_tensor(out) else out.logits


def difference(a, b):
    """The largest, in units of the largest logit if that is above 1."""
    return ((a - b).abs().max() / a.abs().max().clamp(min=1)).item()


@pytest.mark.parametrize("how", ["uneven", "whole", "everything pruned"])
def test_oracle_peft_loads_our_adapter_without_a_warning(folder, how, tmp_path):
    model, head, task = ours(folder)
    if how == "uneven":
        scattered(model)
    else:
        method = sl.SaLoRA(model, model.target_paths("qkvoud"), 10, r=4, selection="paper",
                           window=(0, 0.5) if how == "everything pruned" else None)
        with torch.no_grad():
            for layer in method.layers:
                layer.lora_B.normal_(std=0.3)
            method.log_theta.fill_(-9)
        if how == "everything pruned":
            method.prune()
    adapter.save(model.eval(), tmp_path, head, task_type=task)
    base = theirs(folder, task)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # PEFT asks transformers in an old way
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*",
                                category=FutureWarning)
        tuned = peft.PeftModel.from_pretrained(base, tmp_path).eval()
    assert difference(logits_of(model, model.config), logits_of(tuned, model.config)) < 1e-5
    count = sum(p.numel() for name, p in tuned.named_parameters() if ".lora_" in name)
    kept = sum(p.numel() for layer in sl.adapters(model).values()
               for p in (layer.lora_A, layer.lora_B))
    smallest = min(sum(layer.base.weight.shape) for layer in sl.adapters(model).values())
    assert count == (smallest if how == "everything pruned" else kept)
    assert (kept == 0) == (how == "everything pruned")


CONFIGS = {
    "plain": dict(target_modules=["query", "value", "q_proj", "v_proj"]),
    "patterns": dict(target_modules=["query", "output.dense", "q_proj", "down_proj"],
                     rank_pattern={r"layers?\.1\..*": 2, "query": 3, "q_proj": 3},
                     alpha_pattern={r"(query|q_proj)": 12, r"^.*layers?\.0\..*dense": 7}),
    "rslora and a regular expression": dict(
        target_modules=r".*\.(query|key|intermediate\.dense|q_proj|k_proj|up_proj)",
        use_rslora=True, lora_alpha=5),
    "all linear, a dropout": dict(target_modules="all-linear", lora_dropout=0.3),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_oracle_we_load_pefts_adapter(folder, name, tmp_path):
    model, head, task = ours(folder)
    config = dict(CONFIGS[name])
    if isinstance(config["target_modules"], list):
        found = [path for path, m in model.named_modules() if isinstance(m, torch.nn.Linear)
                 and not path.startswith("classifier")]
        for key in ("target_modules", "rank_pattern", "alpha_pattern"):  # of this kind of model
            for pattern in list(config.get(key, [])):
                if not any(map(adapter.as_regex(pattern, end=True).fullmatch, found)):
                    if key == "target_modules":
                        config[key] = [t for t in config[key] if t != pattern]
                    else:
                        config[key] = {k: v for k, v in config[key].items() if k != pattern}
    torch.manual_seed(0)
    config = peft.LoraConfig(**dict(r=4, lora_alpha=6, task_type=task) | config)
    tuned = peft.get_peft_model(theirs(folder, task), config).eval()
    for p in tuned.parameters():
        if p.requires_grad:
            torch.nn.init.normal_(p, std=0.05)
    tuned.save_pretrained(tmp_path / "a")
    adapter.merge_folder(folder, tmp_path / "a", tmp_path / "m")
    adapter.load(model, tmp_path / "a")
    assert difference(logits_of(model.eval(), model.config), logits_of(tuned, model.config)) < 1e-5
    merged = theirs(tmp_path / "m", task)
    exact = json.loads((folder / "config.json").read_text()).get("torch_dtype") != "bfloat16"
    assert difference(logits_of(merged, model.config), logits_of(tuned, model.config)) < (
        1e-4 if exact else 0.05)


@pytest.mark.parametrize("name,config", [
    ("bert", dict(target_modules=["query", "q_proj"])),
    ("bert", dict(target_modules=["query"], rank_pattern={"q_proj": 2}, alpha_pattern={"k": 2})),
    ("bert", dict(target_modules=["query", "dense"], layers_to_transform=[1])),
    ("bert", dict(target_modules=["query", "dense"], exclude_modules=["output.dense"])),
    ("bert", dict(target_modules=["query"], modules_to_save=["Norm", "word_embeddings"])),
    ("llama3", dict(target_modules=["q_proj"], modules_to_save=["norm"])),
    ("llama3", dict(target_modules=["q_proj"], modules_to_save=["lm_head"])),
    ("llama3", dict(target_modules=["q_proj"], modules_to_save=["embed_tokens"])),
    ("llama3", dict(target_modules=["q_proj", "lm_head"])),
    ("llama", dict(target_modules=["q_proj", "lm_head"]))])
def test_oracle_what_peft_saves_and_reloads_is_loaded_and_merged(name, config, tmp_path):
    folder = FIXTURES / name
    model, _, task = ours(folder)
    torch.manual_seed(0)
    config = peft.LoraConfig(**dict(r=4, task_type=task) | config)
    tuned = peft.get_peft_model(theirs(folder, task), config).eval()
    for p in tuned.parameters():
        if p.requires_grad:
            torch.nn.init.normal_(p, std=0.1)
    tuned.save_pretrained(tmp_path / "a")
    again = peft.PeftModel.from_pretrained(theirs(folder, task), tmp_path / "a").eval()
    wanted = logits_of(again, model.config)
    adapter.load(model, tmp_path / "a")
    assert difference(logits_of(model.eval(), model.config), wanted) < 1e-5
    adapter.merge_folder(folder, tmp_path / "a", tmp_path / "m")
    for merged in (theirs(tmp_path / "m", task), ours(tmp_path / "m")[0].eval()):
        assert difference(logits_of(merged, model.config), wanted) < 1e-4


@pytest.mark.parametrize("config,words", [
    (lambda: peft.LoraConfig(target_modules=["query"], use_dora=True), "use_dora is True"),
    (lambda: peft.LoraConfig(target_modules=["query"], bias="all"), "bias is 'all'"),
    (lambda: peft.LoHaConfig(target_modules=["query"]), "peft_type is 'LOHA'"),
    (lambda: peft.LoraConfig(target_modules=["word_embeddings"]), "matches no nn.Linear"),
    (lambda: peft.LoraConfig(target_modules=["query"], trainable_token_indices=[0]),
     "trainable_token_indices is"),
    (lambda: peft.IA3Config(target_modules=["query"], feedforward_modules=[]),
     "peft_type is 'IA3'"),
    (lambda: peft.LoraConfig(target_modules=["query"], init_lora_weights="pissa"),
     "init_lora_weights is 'pissa'"),
    (lambda: peft.LoraConfig(target_modules=["query"], lora_bias=True), "lora_bias is True"),
])
def test_oracle_what_is_not_implemented_is_refused_by_name(config, words, tmp_path):
    base = theirs(FIXTURES / "bert", "SEQ_CLS")
    peft.get_peft_model(base, config()).save_pretrained(tmp_path)
    model, _, _ = ours(FIXTURES / "bert")
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    with pytest.raises(ValueError, match=words):
        adapter.load(model, tmp_path)
    assert not sl.adapters(model)
    assert before == {name: p.requires_grad for name, p in model.named_parameters()}


def test_oracle_merged_folder_of_our_adapter_is_transformers_own(folder, tmp_path):
    model, head, task = ours(folder)
    scattered(model)
    adapter.save(model.eval(), tmp_path / "a", head, task_type=task)
    adapter.merge_folder(folder, tmp_path / "a", tmp_path / "m")
    auto = tr.AutoModelForCausalLM if task == "CAUSAL_LM" else tr.AutoModelForSequenceClassification
    # the labels are those of its config
    merged = auto.from_pretrained(tmp_path / "m", dtype=torch.float32).eval()
    exact = json.loads((folder / "config.json").read_text()).get("torch_dtype") != "bfloat16"
    assert difference(logits_of(model, model.config), logits_of(merged, model.config)) < (
        1e-4 if exact else 0.05)
    expected = {file.name for file in folder.glob("*.safetensors")} - {"expected.safetensors"}
    assert len(expected) == len(list((tmp_path / "m").glob("*.safetensors")))


# ---- scores


def test_oracle_scores_are_those_of_scikit_learn_scipy_and_sacrebleu():
    from sacrebleu import corpus_bleu
    from scipy import stats
    from sklearn import metrics as sk
    rng = np.random.default_rng(7)
    label, prediction = rng.integers(2, size=500), rng.integers(2, size=500)
    assert metrics.matthews_correlation(label, prediction) == pytest.approx(
        sk.matthews_corrcoef(label, prediction), abs=1e-12)
    assert metrics.f1(label, prediction) == pytest.approx(sk.f1_score(label, prediction), abs=1e-12)
    x = rng.normal(size=300).round(1)
    y = x + rng.normal(size=300)
    assert metrics.pearson(x, y) == pytest.approx(stats.pearsonr(x, y)[0], abs=1e-12)
    assert metrics.spearmanr(x, y) == pytest.approx(stats.spearmanr(x, y)[0], abs=1e-12)
    words = "the food , was great . n't 's 10 bad".split()
    outputs, *references = ([" ".join(rng.choice(words, rng.integers(4, 12))) for _ in range(60)]
                            for _ in range(4))
    assert metrics.bleu(outputs, references) == pytest.approx(
        corpus_bleu(outputs, references).score, abs=1e-9)


def test_oracle_layers_that_are_asked_for_a_weight_train():
    """T5's feed-forward looks at wo.weight.dtype and casts its input to that."""
    torch.manual_seed(0)
    model = tr.T5ForConditionalGeneration(tr.T5Config(
        vocab_size=50, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2,
        feed_forward_proj="gated-gelu", decoder_start_token_id=0))
    salora = sl.SaLoRA(model, ["wo"], steps=40, r=4)
    optimizer = torch.optim.AdamW(salora.param_groups(lr=3e-2))
    ids, losses = torch.arange(5, 23).view(2, 9), []
    for _ in range(40):
        salora.begin_step()
        loss = model(input_ids=ids, labels=ids).loss
        (loss + salora.penalty()).backward()
        optimizer.step()
        salora.end_step(optimizer)
        optimizer.zero_grad()
        losses.append(loss.item())
    assert salora.pruned and losses[-1] < losses[0] - 0.1


@pytest.mark.parametrize("reentrant", [False, True])
def test_oracle_checkpointing_of_transformers_changes_no_number(reentrant):
    ends = []
    for recompute in (False, True):
        torch.manual_seed(0)
        model = tr.LlamaForCausalLM(tr.LlamaConfig(
            vocab_size=60, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
            intermediate_size=64))
        if recompute:
            model.gradient_checkpointing_enable(dict(use_reentrant=reentrant))
            model.enable_input_require_grads()  # or reentrant layers see no gradient
        salora = sl.SaLoRA(model.train(), ["q_proj", "v_proj"], steps=12, r=4)
        optimizer = torch.optim.AdamW(salora.param_groups(lr=1e-2))
        ids = torch.arange(5, 23).view(2, 9)
        for _ in range(12):
            salora.begin_step()
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss + salora.penalty()
            loss.backward()
            optimizer.step()
            salora.end_step(optimizer)
            optimizer.zero_grad()
        ends.append([salora.log_theta, *(m.lora_B for m in salora.layers)])
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(*ends))
