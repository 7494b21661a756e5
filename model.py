"""
RoBERTa and BERT for sequence classification, written out, reading Hugging Face folders.

Submodules carry Hugging Face's names (attention.self.query, intermediate.dense ..): a checkpoint's keys are this
file's keys, and so are the module paths in a saved adapter. Nothing has to be translated in either direction.
"""

import json
from dataclasses import dataclass, fields
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch.utils.checkpoint import checkpoint

from data import InputError

# The letters of the paper, W^Q W^K W^V W^O W^U W^D, and where they are inside a layer.
LINEARS = {
    "q": "attention.self.query",
    "k": "attention.self.key",
    "v": "attention.self.value",
    "o": "attention.output.dense",
    "u": "intermediate.dense",
    "d": "output.dense",
}


@dataclass
class EncoderConfig:
    """The fields of a Hugging Face config.json that matter here; where one has a default, it is Hugging Face's."""
    model_type: str  # roberta or bert
    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    max_position_embeddings: int
    type_vocab_size: int = 2
    pad_token_id: int = None  # roberta 1, bert 0
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    classifier_dropout: float = None  # None: as hidden_dropout_prob
    layer_norm_eps: float = 1e-12
    initializer_range: float = 0.02

    def __post_init__(self):
        if self.pad_token_id is None:
            self.pad_token_id = 1 if self.model_type == "roberta" else 0
        if self.classifier_dropout is None:
            self.classifier_dropout = self.hidden_dropout_prob

    @property
    def max_length(self):
        """Longest input in tokens: RoBERTa's positions start at padding_idx + 1, the rows below are never read."""
        return self.max_position_embeddings - (self.pad_token_id + 1 if self.model_type == "roberta" else 0)


def dropout(x, p, training):
    """F.dropout. On a CPU that spends more time on its random numbers than a matrix product of the size takes; there x is kept
    or not by 16 random bits an element, so that p is exact to 1/65536."""
    if not training or p == 0:
        return x
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        return F.dropout(x, p)
    bits = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-2**63, None).view(torch.int16)[:x.numel()].view(x.shape)
    return x * ((bits >= round(p * 2**16) - 2**15) / (1 - p)).to(x.dtype)


class EncoderLayer(nn.Module):
    """One post-norm transformer layer: x (b, t, d) -> (b, t, d)."""

    def __init__(self, c):
        super().__init__()
        d, inner, norm = c.hidden_size, c.intermediate_size, lambda: nn.LayerNorm(c.hidden_size, eps=c.layer_norm_eps)
        self.heads, self.p_attention, self.p_hidden = c.num_attention_heads, c.attention_probs_dropout_prob, c.hidden_dropout_prob
        self.attention = nn.ModuleDict(dict(
            self=nn.ModuleDict(dict(query=nn.Linear(d, d), key=nn.Linear(d, d), value=nn.Linear(d, d))),
            output=nn.ModuleDict(dict(dense=nn.Linear(d, d), adapter=nn.Identity(), LayerNorm=norm())),
        ))
        self.intermediate = nn.ModuleDict(dict(dense=nn.Linear(d, inner)))
        self.output = nn.ModuleDict(dict(dense=nn.Linear(inner, d), adapter=nn.Identity(), LayerNorm=norm()))  # adapters: baselines.py

    def forward(self, x, mask=None, first_only=False, prefix=None):
        b, t, d = x.shape
        attn = self.attention
        rows = x[:, :1] if first_only else x  # (b, 1 or t, d): the rows whose output somebody will read

        def split(y):
            return y.view(b, -1, self.heads, d // self.heads).transpose(1, 2)  # (b, heads, t, d / heads)

        q, k, v = attn.self.query(rows), attn.self.key(x), attn.self.value(x)
        if prefix is not None:  # (2, n, d): n keys and values that belong to no token
            k, v = (torch.cat([extra.expand(b, -1, -1), y], 1) for extra, y in zip(prefix, (k, v)))  # (b, n + t, d)
        y = F.scaled_dot_product_attention(split(q), split(k), split(v), mask, dropout_p=self.p_attention if self.training else 0.0)
        y = attn.output.dense(y.transpose(1, 2).flatten(2))
        x = attn.output.LayerNorm(rows + attn.output.adapter(dropout(y, self.p_hidden, self.training)))
        y = self.output.dense(F.gelu(self.intermediate.dense(x)))
        return self.output.LayerNorm(x + self.output.adapter(dropout(y, self.p_hidden, self.training)))


class Encoder(nn.Module):
    """RoBERTa or BERT with a classification head (one output: regression). Attributes are spelt as in a checkpoint."""

    def __init__(self, config, num_labels):
        super().__init__()
        c, d = config, config.hidden_size
        self.config, self.num_labels, self.checkpoint_activations = config, num_labels, False
        self.prefix = self.prompt = None  # of baselines.py: n keys and values for each layer; n input vectors
        body = nn.ModuleDict(dict(
            embeddings=nn.ModuleDict(dict(
                word_embeddings=nn.Embedding(c.vocab_size, d),
                position_embeddings=nn.Embedding(c.max_position_embeddings, d),
                token_type_embeddings=nn.Embedding(c.type_vocab_size, d),
                LayerNorm=nn.LayerNorm(d, eps=c.layer_norm_eps),
            )),
            encoder=nn.ModuleDict(dict(layer=nn.ModuleList(EncoderLayer(c) for _ in range(c.num_hidden_layers)))),
        ))
        if c.model_type == "roberta":
            self.roberta = body
            self.classifier = nn.ModuleDict(dict(dense=nn.Linear(d, d), out_proj=nn.Linear(d, num_labels)))
        else:
            body["pooler"] = nn.ModuleDict(dict(dense=nn.Linear(d, d)))
            self.bert = body
            self.classifier = nn.Linear(d, num_labels)
        self.apply(self._init_weights)

    def _init_weights(self, module):
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=self.config.initializer_range)
        if isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)

    @property
    def body(self):
        return self.roberta if self.config.model_type == "roberta" else self.bert

    @property
    def head(self):
        """The modules that are trained whole, whatever the method: RoBERTa's classifier; BERT's pooler and classifier."""
        return [self.classifier] if self.config.model_type == "roberta" else [self.body.pooler, self.classifier]

    def target_paths(self, letters, layers=None):
        """Module paths of the linear layers that `letters` (of q k v o u d) name, in all layers or those with these numbers."""
        layers = range(self.config.num_hidden_layers) if layers is None else layers
        return [f"{self.config.model_type}.encoder.layer.{i}.{LINEARS[letter]}" for i in layers for letter in letters]

    def hidden(self, input_ids, attention_mask=None, token_type_ids=None, first_only=False):
        """Last hidden states (b, t, d) of input_ids (b, t); attention_mask (b, t) is 1 on tokens, 0 on padding, and None where
        nothing is padded. first_only: (b, 1, d), the first token alone, which spares the last layer the other rows."""
        c, e = self.config, self.body.embeddings
        if token_type_ids is None or c.type_vocab_size == 1:
            token_type_ids = torch.zeros_like(input_ids)
        n = 0 if self.prompt is None else len(self.prompt)
        if n:  # n copies of the first token make room for the prompt behind it: positions, types and mask are those of real tokens
            input_ids, token_type_ids, attention_mask = (y if y is None else torch.cat([y[:, :1].expand(-1, n), y], 1)
                                                         for y in (input_ids, token_type_ids, attention_mask))  # (b, n + t)
        if c.model_type == "roberta":  # positions count the tokens that are not padding, from padding_idx + 1
            real = (input_ids != c.pad_token_id).long()
            positions = real.cumsum(1) * real + c.pad_token_id  # (b, t)
        else:
            positions = torch.arange(input_ids.shape[1], device=input_ids.device)  # (t,)
        x = e.word_embeddings(input_ids)  # (b, t, d)
        if n:
            x = torch.cat([x[:, :1], self.prompt.to(x.dtype).expand(len(x), -1, -1), x[:, n + 1:]], 1)
        x = x + e.token_type_embeddings(token_type_ids) + e.position_embeddings(positions)
        x = dropout(e.LayerNorm(x), c.hidden_dropout_prob, self.training)
        mask = None if attention_mask is None else attention_mask[:, None, None, :].bool()  # (b, 1, 1, t)
        layers = self.body.encoder.layer
        prefix = [None] * len(layers) if self.prefix is None else self.prefix().to(x.dtype)  # (layers, 2, n, d)
        if self.prefix is not None and mask is not None:
            mask = F.pad(mask, (prefix.shape[2], 0), value=True)
        for i, layer in enumerate(layers):
            args = (x, mask, first_only and i == len(layers) - 1, prefix[i])
            x = checkpoint(layer, *args, use_reentrant=False) if self.checkpoint_activations and self.training else layer(*args)
        return x

    def forward(self, input_ids, attention_mask=None, token_type_ids=None):
        """Logits (b, num_labels)."""
        x = self.hidden(input_ids, attention_mask, token_type_ids, first_only=True)[:, 0]  # (b, d)
        x = x.to(next(self.head[0].parameters()).dtype)  # a float32 head may sit on a bfloat16 body

        def drop(y):
            return dropout(y, self.config.classifier_dropout, self.training)

        if self.config.model_type == "roberta":
            return self.classifier.out_proj(drop(torch.tanh(self.classifier.dense(drop(x)))))
        return self.classifier(drop(torch.tanh(self.body.pooler.dense(x))))


# ---------------------------------------------------------------------------------------------------------------------
# reading a Hugging Face folder


def read_json(file):
    """The object in a JSON file, or an InputError that names the file."""
    try:
        value = json.loads(Path(file).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{file}: not found; a model folder holds config.json, model.safetensors and tokenizer.json") from None
    except (OSError, ValueError) as e:
        raise InputError(f"{file}: cannot be read as JSON ({e})") from None
    if not isinstance(value, dict):
        raise InputError(f"{file}: holds a {type(value).__name__}, expected a JSON object")
    return value


def read_config(folder):
    """EncoderConfig from folder/config.json; anything this file does not implement is refused by name."""
    file = Path(folder) / "config.json"
    raw = read_json(file)
    if raw.get("model_type") not in ("roberta", "bert"):
        raise InputError(f"{file}: model_type is {raw.get('model_type')!r}, expected roberta or bert")
    for key, only in (("hidden_act", "gelu"), ("position_embedding_type", "absolute"), ("is_decoder", False)):
        if raw.get(key, only) != only:
            raise InputError(f"{file}: {key} is {raw[key]!r}, only {only!r} is implemented")
    known = {}
    for f in fields(EncoderConfig):
        value = raw.get(f.name)
        if value is None:
            if f.default is not None and not isinstance(f.default, (int, float)):
                raise InputError(f"{file}: {f.name} is missing")
            continue
        number = (int, float) if f.type is float else f.type
        if not isinstance(value, number) or isinstance(value, bool) or (f.type is not str and value < 0):
            raise InputError(f"{file}: {f.name} is {value!r}, expected a non-negative {f.type.__name__}")
        known[f.name] = value
    c = EncoderConfig(**known)
    if min(c.hidden_size, c.num_attention_heads, c.num_hidden_layers, c.vocab_size, c.max_length) < 1 or c.hidden_size % c.num_attention_heads:
        raise InputError(f"{file}: sizes do not fit together (hidden_size {c.hidden_size}, num_attention_heads {c.num_attention_heads}, "
                         f"num_hidden_layers {c.num_hidden_layers}, max_position_embeddings {c.max_position_embeddings})")
    return c


def read_weights(folder):
    """Yields (key, tensor) from folder/model.safetensors, or from the shards that model.safetensors.index.json lists."""
    folder = Path(folder)
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        files = [single]
    elif index.is_file():
        shards = read_json(index).get("weight_map")
        if not isinstance(shards, dict) or not shards:
            raise InputError(f"{index}: has no weight_map")
        files = [folder / name for name in sorted(set(map(str, shards.values())))]
    else:
        pickled = " (pytorch_model.bin is a pickle, which is not read: save the model as safetensors)" * (folder / "pytorch_model.bin").is_file()
        raise InputError(f"{folder}: found neither model.safetensors nor model.safetensors.index.json{pickled}")
    for file in files:
        if not file.is_file():
            raise InputError(f"{file}: shard listed in {index} not found; download the folder again")
        try:
            with safe_open(file, framework="pt") as f:
                for key in f.keys():
                    yield key, f.get_tensor(key)
        except (SafetensorError, OSError) as e:
            raise InputError(f"{file}: not a readable safetensors file ({e}); download it again") from None


def spelling(key, model_type):
    """A checkpoint's key as this file spells it; None for the harmless extras of language-model checkpoints."""
    if key.endswith("position_ids") or key.startswith(("lm_head.", "cls.")):
        return None
    key = key.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")
    if key.startswith(("embeddings.", "encoder.", "pooler.")):  # saved from the bare model
        key = f"{model_type}.{key}"
    return None if key.startswith("roberta.pooler.") else key


def load_encoder(folder, num_labels, dtype=torch.float32):
    """The pretrained Encoder of a Hugging Face folder with `num_labels` outputs, in `dtype`, on the CPU.
    A head that the checkpoint lacks, or has for another number of labels, starts anew, which is said in a printed line; any
    other key that is missing, unexpected or misshapen is an InputError that names it."""
    config = read_config(folder)
    with torch.device("meta"):  # shapes only: no time spent on random weights that are overwritten at once
        model = Encoder(config, num_labels)
    wanted = model.state_dict()
    head = {key for key in wanted if key.startswith("classifier.") or ".pooler." in key}
    state, unexpected = {}, []
    for raw_key, tensor in read_weights(folder):
        key = spelling(raw_key, config.model_type)
        if key in wanted and tensor.shape == wanted[key].shape:
            state[key] = tensor.to(dtype)
        elif key in wanted and key not in head:
            raise InputError(f"{folder}: {raw_key} has shape {list(tensor.shape)}, config.json asks for {list(wanted[key].shape)}")
        elif key is not None and key not in wanted:
            unexpected.append(raw_key)
    missing = [key for key in wanted if key not in state and key not in head]
    if missing or unexpected:
        kind, keys = ("lacks", missing) if missing else ("has unexpected", unexpected)
        raise InputError(f"{folder}: the checkpoint {kind} {', '.join(keys[:3])}{' ..' * (len(keys) > 3)} "
                         f"({len(keys)} in all); is it a {config.model_type} model?")
    new = [key for key in wanted if key not in state]
    if new:
        print(f"new head, not in the checkpoint: {', '.join(new)}")
    for key in new:
        state[key] = torch.zeros(wanted[key].shape, dtype=dtype)
        if key.endswith("weight"):
            state[key].normal_(std=config.initializer_range)
    model.load_state_dict(state, assign=True)
    return model
