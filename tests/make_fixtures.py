"""
Made the files in tests/fixtures with other people's code: transformers 5.23.0 (torch 2.13.0), PEFT
0.21.2, scikit-learn 1.9.1, SciPy 1.17.1, sacrebleu 2.6.0.

    pip install transformers==5.23.0 peft==0.21.2 scikit-learn==1.9.1 scipy==1.17.1 sacrebleu==2.6.0
    python tests/make_fixtures.py [MINILM_FOLDER SMOLLM2_FOLDER]

roberta/, bert/    a tiny random model saved by transformers; expected.safetensors: inputs, last
                   hidden states, logits
llama*/            tiny random LLaMAs saved by transformers: with biases, in shards; with grouped
                   queries, a tied head, Llama 3's rotary scaling; with one key and value head,
                   linear scaling. expected.safetensors: inputs, logits, and what greedy generation
                   makes of five prompts
minilm.safetensors the same for the real all-MiniLM-L6-v2 (with MINILM_FOLDER), float32: its last
                   hidden states, a padded batch
smollm2.*          the real SmolLM2-135M-Instruct, float32: every 499th logit of two rows; greedy
                   continuations of 20 prompts
peft.safetensors   PEFT's LoRA layer: weights, input, output; PEFT's AdaLoRA on two layers, 30 steps
                   of given gradients: the singular values after every step, which triplets stay,
                   the regularizer, an output
peft-*/            LoRA adapters that PEFT wrote for bert/ and llama3/: patterns of ranks and
                   alphas, a head; targets by a regular expression, rslora.
                   expected.safetensors: inputs, logits
bleu.json          sentences with sacrebleu's score
metrics.json       labels and predictions with scikit-learn's and SciPy's scores
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

FIXTURES = Path(__file__).parent / "fixtures"


def batch(vocab_size, pad_id, lengths, generator):
    """Right-padded ids (b, t), mask, token types: the second half of each row is the second
    sentence."""
    t = max(lengths)
    ids = torch.full((len(lengths), t), pad_id)
    mask, types = torch.zeros(2, len(lengths), t, dtype=torch.long)
    for i, n in enumerate(lengths):
        ids[i, :n] = torch.randint(5, vocab_size, (n,), generator=generator)
        mask[i, :n] = 1
        types[i, n // 2:n] = 1
    return ids, mask, types


def tiny(kind):
    import transformers as tr
    torch.manual_seed(0)
    sizes = dict(vocab_size=60, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
                 intermediate_size=64, initializer_range=0.3, max_position_embeddings=40,
                 num_labels=3)
    if kind == "roberta":
        config = tr.RobertaConfig(type_vocab_size=1, pad_token_id=1, layer_norm_eps=1e-5, **sizes)
        model = tr.RobertaForSequenceClassification(config)
    else:
        config = tr.BertConfig(type_vocab_size=2, pad_token_id=0, **sizes)
        model = tr.BertForSequenceClassification(config)
    # biases and norms off their trivial start, or a swapped one would not show
    for name, p in model.named_parameters():
        if p.dim() == 1:
            torch.nn.init.normal_(p, mean=float("LayerNorm.weight" in name), std=0.2)
    model.eval().save_pretrained(FIXTURES / kind)
    generator = torch.Generator().manual_seed(1)
    ids, mask, types = batch(60, model.config.pad_token_id, [11, 4, 7], generator)
    inputs = dict(input_ids=ids, attention_mask=mask)
    if kind == "bert":
        inputs["token_type_ids"] = types
    with torch.no_grad():
        hidden = model.base_model(**inputs).last_hidden_state
        logits = model(**inputs).logits
    save_file(dict(inputs, hidden=hidden, logits=logits), FIXTURES / kind / "expected.safetensors")


def greedy(model, prompt, count):
    out = model.generate(torch.tensor([prompt]), max_new_tokens=count, do_sample=False,
                         pad_token_id=0)
    return out[0, len(prompt):].tolist()


def llama(name, **kw):
    import transformers as tr
    torch.manual_seed(0)
    sizes = dict(vocab_size=60, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
                 intermediate_size=48, initializer_range=0.3, max_position_embeddings=64,
                 bos_token_id=1, eos_token_id=2)
    model = tr.LlamaForCausalLM(tr.LlamaConfig(**sizes | kw)).eval()
    for p in model.parameters():
        if p.dim() == 1:
            torch.nn.init.normal_(p, mean=1.0, std=0.2)
    model.save_pretrained(FIXTURES / name, max_shard_size="20KB" if name == "llama" else "5GB")
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 60, (2, 13), generator=generator)
    file = dict(input_ids=ids, logits=model(ids).logits.detach())
    for i, n in enumerate((3, 9, 1, 5, 5)):
        prompt = torch.randint(3, 60, (n,), generator=generator)
        answer = greedy(model, prompt.tolist(), 20)
        file |= {f"prompt.{i}": prompt, f"greedy.{i}": torch.tensor(answer)}
    save_file(file, FIXTURES / name / "expected.safetensors")


PROMPTS = [  # of 1 to some 40 tokens
    "Hello", "The capital of France is", "def fibonacci(n):",
    "Once upon a time, in a village by the sea, there lived", "Water boils at", "1 + 1 =",
    "The opposite of hot is", "Dear Sir or Madam,", "The three primary colours are",
    "import numpy as", "She opened the door and", "To make bread you need flour,",
    "The sun rises in the",
    "In 1969, for the first time, people walked on the moon. Before that day nobody knew whether "
    "its dust would carry a lander, and", "Q: What do bees make?\nA:", "A haiku about rain:\n",
    "The quick brown fox", "{\"name\": \"", "Yesterday it snowed, so the children",
    "<|im_start|>user\nName a fruit.<|im_end|>\n<|im_start|>assistant\n"]


def smollm2(folder):
    import transformers as tr
    from tokenizers import Tokenizer
    model = tr.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = Tokenizer.from_file(f"{folder}/tokenizer.json")
    ids = torch.randint(5, 49000, (2, 24), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        logits = model(ids).logits[:, :, ::499].contiguous()
    save_file(dict(input_ids=ids, logits=logits), FIXTURES / "smollm2.safetensors")
    cases = [dict(prompt=p, greedy=greedy(model, tokenizer.encode(p).ids, 24)) for p in PROMPTS]
    (FIXTURES / "smollm2.json").write_text(json.dumps(cases, indent=0))


def minilm(folder):
    import transformers as tr
    model = tr.BertModel.from_pretrained(folder, dtype=torch.float32).eval()
    ids, mask, types = batch(30000, 0, [12, 5], torch.Generator().manual_seed(2))
    with torch.no_grad():
        hidden = model(input_ids=ids, attention_mask=mask, token_type_ids=types).last_hidden_state
    save_file(dict(input_ids=ids, attention_mask=mask, token_type_ids=types, hidden=hidden),
              FIXTURES / "minilm.safetensors")


def peft():
    from peft import AdaLoraConfig, LoraConfig, get_peft_model
    from torch import nn
    torch.manual_seed(0)
    file, x = {}, torch.randn(4, 8)
    model = get_peft_model(nn.Sequential(nn.Linear(8, 5), nn.Linear(5, 7)),
                           LoraConfig(r=4, lora_alpha=6, target_modules=["0"]))
    layer = model.base_model.model[0]
    nn.init.normal_(layer.lora_B.default.weight)
    file |= {"lora.x": x, "lora.W": layer.base_layer.weight, "lora.b": layer.base_layer.bias,
             "lora.A": layer.lora_A.default.weight, "lora.B": layer.lora_B.default.weight,
             "lora.y": layer(x)}

    config = AdaLoraConfig(init_r=4, target_r=1, lora_alpha=6, tinit=6, tfinal=15, deltaT=1,
                           total_step=30, orth_reg_weight=0.1, target_modules=["0", "1"])
    model = get_peft_model(nn.Sequential(nn.Linear(8, 5), nn.Linear(5, 7)), config)
    layers = list(model.base_model.model)
    params = [p["default"] for layer in layers
              for p in (layer.lora_A, layer.lora_B, layer.lora_E)]
    for i, p in enumerate(params):
        nn.init.normal_(p)
        file[f"adalora.start.{i}"] = p.detach().clone()
    # as in AdaLoraModel.forward
    norms = [torch.norm(m @ m.T - torch.eye(4)) for layer in layers
             for m in (layer.lora_A["default"], layer.lora_B["default"].T)]
    first = layers[0].base_layer
    file |= {"adalora.x": x, "adalora.W": first.weight, "adalora.b": first.bias,
             "adalora.y": layers[0](x.clone()), "adalora.penalty": 0.1 * sum(norms) / len(norms)}
    optimizer = torch.optim.SGD(params, lr=0.1)
    for step in range(16):
        for i, p in enumerate(params):
            p.grad = torch.randn_like(p)
            file[f"adalora.grad.{step}.{i}"] = p.grad
        optimizer.step()
        model.base_model.update_and_allocate(step)
        values = torch.stack([layer.lora_E["default"].flatten() for layer in layers])
        file[f"adalora.E.{step}"] = values.detach().clone()
    save_file({name: t.detach().clone(memory_format=torch.contiguous_format)
               for name, t in file.items()}, FIXTURES / "peft.safetensors")


def peft_adapter(name, auto, inputs, **kw):
    import transformers as tr
    from peft import LoraConfig, get_peft_model
    torch.manual_seed(0)
    folder = FIXTURES / f"peft-{name}"
    base = getattr(tr, auto).from_pretrained(FIXTURES / name)
    model = get_peft_model(base, LoraConfig(**kw)).eval()
    for p in model.parameters():
        if p.requires_grad:
            torch.nn.init.normal_(p, std=0.2)
    model.save_pretrained(folder)
    (folder / "README.md").unlink()
    config = json.loads((folder / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = None
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")
    with torch.no_grad():
        save_file(dict(inputs, logits=model(**inputs).logits), folder / "expected.safetensors")


def metrics():
    from scipy import stats
    from sklearn import metrics as sk
    rng, cases = np.random.default_rng(0), []
    for n, classes in ((50, 2), (1043, 2), (9, 2), (300, 3), (77, 5)):
        label = rng.integers(classes, size=n)
        prediction = np.where(rng.random(n) < 0.6, label, rng.integers(classes, size=n))
        case = dict(label=label.tolist(), prediction=prediction.tolist(),
                    accuracy=sk.accuracy_score(label, prediction),
                    matthews_correlation=sk.matthews_corrcoef(label, prediction))
        cases.append(case | (dict(f1=sk.f1_score(label, prediction)) if classes == 2 else {}))
    for label, prediction in (([1] * 5, [1] * 5), ([0, 1, 0, 1], [1] * 4),
                              ([0] * 4, [0, 1, 0, 1]), ([0, 0, 0], [0, 0, 0])):
        cases.append(dict(label=label, prediction=prediction,
                          accuracy=sk.accuracy_score(label, prediction),
                          matthews_correlation=sk.matthews_corrcoef(label, prediction),
                          f1=sk.f1_score(label, prediction, zero_division=0)))
    for n, decimals in ((1500, 15), (200, 1), (40, 0), (2, 15)):  # few decimals: many ties
        label = np.round(rng.uniform(0, 5, n), decimals)
        prediction = np.round(label + rng.normal(0, 1, n), decimals)
        cases.append(dict(label=label.tolist(), prediction=prediction.tolist(),
                          pearson=stats.pearsonr(label, prediction)[0],
                          spearmanr=stats.spearmanr(label, prediction)[0]))
    (FIXTURES / "metrics.json").write_text(json.dumps(cases))


def bleu():
    import sacrebleu
    rng, cases = np.random.default_rng(5), []
    words = ("the a food was is n't 's good, bad. 1,000 3-4 (really) \"great\" &amp; $5 U.S. "
             "wow!").split()
    for n, references in ((40, 1), (40, 4), (3, 2), (1, 1)):
        source = [rng.choice(words, rng.integers(1, 14)) for _ in range(n)]

        def other(s, share):
            words_of = np.where(rng.random(len(s)) < share, rng.choice(words, len(s)), s)
            return " ".join(words_of[:rng.integers(1, 15)])

        def changed(share, source=source):
            return [other(s, share) for s in source]

        case = dict(outputs=changed(0.1), references=[changed(0.2) for _ in range(references)])
        cases.append(case | dict(bleu=sacrebleu.corpus_bleu(*case.values(), force=True).score))
    for outputs, reference in (
            (["a b"], ["a b c d"]), (["x"], ["a b c d e"]),
            (["a b c d", "e f g h"], ["a x c y", "e q g h"]),
            (["a <skipped> b &lt; c, d"], ["a b < c, d"])):
        score = sacrebleu.corpus_bleu(outputs, [reference]).score
        cases.append(dict(outputs=outputs, references=[reference], bleu=score))
    (FIXTURES / "bleu.json").write_text(json.dumps(cases, indent=0))


if __name__ == "__main__":
    tiny("roberta")
    tiny("bert")
    rope = dict(rope_type="llama3", rope_theta=500.0, factor=4.0, low_freq_factor=1.0,
                high_freq_factor=4.0, original_max_position_embeddings=16)
    llama("llama", attention_bias=True, mlp_bias=True)
    llama("llama3", num_key_value_heads=2, head_dim=12, tie_word_embeddings=True,
          rope_parameters=rope)
    llama("llama-linear", num_key_value_heads=1,
          rope_parameters=dict(rope_type="linear", rope_theta=1000.0, factor=2.0))
    peft()
    ids, mask, types = batch(60, 0, [11, 4, 7], torch.Generator().manual_seed(1))
    inputs = dict(input_ids=ids, attention_mask=mask, token_type_ids=types)
    peft_adapter(
        "bert", "AutoModelForSequenceClassification", inputs, task_type="SEQ_CLS", r=4,
        lora_alpha=6, target_modules=["query", "attention.output.dense", "intermediate.dense"],
        rank_pattern={"layer.1.attention.self.query": 2, "intermediate.dense": 3},
        alpha_pattern={r"layer\.\d\.attention\.output\.dense": 16}, modules_to_save=["classifier"])
    peft_adapter(
        "llama3", "AutoModelForCausalLM", dict(input_ids=ids[:1]), task_type="CAUSAL_LM", r=4,
        lora_alpha=6, use_rslora=True, lora_dropout=0.1,
        target_modules=r".*\.(self_attn|mlp)\.(q|down|gate)_proj",
        rank_pattern={r"layers\.1\..*_proj": 6})
    metrics()
    bleu()
    if len(sys.argv) > 1:
        minilm(sys.argv[1])
        smollm2(sys.argv[2])
