"""
RoBERTa and BERT for sequence classification and LLaMA for text, written out, reading Hugging Face folders.

Submodules carry Hugging Face's names (attention.self.query, intermediate.dense ..): a checkpoint's keys are this
file's keys, and so are the module paths in a saved adapter. Nothing has to be translated in either direction.
"""

import json
import math
from dataclasses import MISSING, dataclass, fields
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch.utils.checkpoint import checkpoint

from data import InputError

# The letters of the paper, W^Q W^K W^V W^O W^U W^D, and where they are inside a layer; g is LLaMA's gate projection.
LINEARS = {
    "q": "attention.self.query",
    "k": "attention.self.key",
    "v": "attention.self.value",
    "o": "attention.output.dense",
    "u": "intermediate.dense",
    "d": "output.dense",
}
DECODER_LINEARS = {
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.o_proj",
    "u": "mlp.up_proj",
    "d": "mlp.down_proj",
    "g": "mlp.gate_proj",
}

# ---------------------------------------------------------------------------------------------------------------------
# RoBERTa and BERT


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
    def narrowest(self):
        return min(self.hidden_size, self.intermediate_size)

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


def attention(q, k, v, mask, p, training):
    """softmax(q k' / sqrt(d)) v for q, k, v (b, heads, t, d), with dropout on the softmax. mask (b, 1, 1, t) is True on what may be
    read. With dropout on a CPU it is written out, which is faster there than PyTorch's own, in bfloat16 above all."""
    if not training or p == 0 or q.device.type != "cpu" or torch.compiler.is_compiling():
        return F.scaled_dot_product_attention(q, k, v, mask, dropout_p=p if training else 0.0)
    scores = q / math.sqrt(q.shape[-1]) @ k.mT  # (b, heads, t, t)
    if mask is not None:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)  # not -inf: a row may have nothing to read
    return dropout(scores.softmax(-1), p, training) @ v


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
        y = attention(split(q), split(k), split(v), mask, self.p_attention, self.training)
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
# LLaMA


@dataclass
class DecoderConfig:
    """The fields of a LLaMA's config.json that matter here; where one has a default, it is Hugging Face's."""
    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    model_type: str = "llama"
    num_key_value_heads: int = None  # None: as many as num_attention_heads
    head_dim: int = None  # None: hidden_size / num_attention_heads
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: dict = None  # None: none; else rope_type llama3 or linear with its numbers
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    initializer_range: float = 0.02

    def __post_init__(self):
        self.num_key_value_heads = self.num_key_value_heads or self.num_attention_heads
        self.head_dim = self.head_dim or self.hidden_size // self.num_attention_heads

    @property
    def narrowest(self):
        return min(self.hidden_size, self.intermediate_size, self.num_key_value_heads * self.head_dim)

    @property
    def max_length(self):
        return self.max_position_embeddings


class RMSNorm(nn.Module):
    def __init__(self, d, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(d)), eps

    def forward(self, x):
        y = x.float()
        return self.weight * (y * torch.rsqrt(y.square().mean(-1, keepdim=True) + self.eps)).to(x.dtype)


def rotary(c, positions):
    """cos and sin (.., t, head_dim) of the rotary embedding, in Hugging Face's layout: dimension i turns with i + head_dim / 2."""
    freq = c.rope_theta ** -(torch.arange(0, c.head_dim, 2, device=positions.device).float() / c.head_dim)  # (head_dim / 2,)
    scaling = c.rope_scaling or {}
    if scaling.get("rope_type") == "linear":
        freq = freq / scaling["factor"]
    elif scaling.get("rope_type") == "llama3":  # long waves are stretched, short ones are not, those between in part
        turns = scaling["original_max_position_embeddings"] * freq / (2 * math.pi)  # in the context that it was first trained on
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        keep = ((turns - low) / (high - low)).clamp(0, 1)
        freq = keep * freq + (1 - keep) * freq / scaling["factor"]
    angle = positions.unsqueeze(-1).float() * freq  # (.., t, head_dim / 2)
    angle = torch.cat([angle, angle], -1)
    return angle.cos(), angle.sin()


def rotate(x, cos, sin):
    """x (b, heads, t, head_dim) turned by its positions."""
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat([-b, a], -1) * sin


class DecoderLayer(nn.Module):
    """One pre-norm transformer layer: x (b, t, d) -> (b, t, d)."""

    def __init__(self, c):
        super().__init__()
        d, h = c.hidden_size, c.head_dim
        self.head_dim = h
        self.self_attn = nn.ModuleDict(dict(
            q_proj=nn.Linear(d, c.num_attention_heads * h, bias=c.attention_bias),
            k_proj=nn.Linear(d, c.num_key_value_heads * h, bias=c.attention_bias),
            v_proj=nn.Linear(d, c.num_key_value_heads * h, bias=c.attention_bias),
            o_proj=nn.Linear(c.num_attention_heads * h, d, bias=c.attention_bias)))
        self.mlp = nn.ModuleDict(dict(
            gate_proj=nn.Linear(d, c.intermediate_size, bias=c.mlp_bias), up_proj=nn.Linear(d, c.intermediate_size, bias=c.mlp_bias),
            down_proj=nn.Linear(c.intermediate_size, d, bias=c.mlp_bias)))
        self.input_layernorm = RMSNorm(d, c.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(d, c.rms_norm_eps)

    def forward(self, x, cos, sin, mask=None, cache=None, start=0):
        """mask None: causal. cache (2, b, kv heads, longest, head_dim) holds the keys and values of the first `start` positions and
        gets those of the t new ones."""
        b, t, _ = x.shape
        y, attn = self.input_layernorm(x), self.self_attn

        def split(z):
            return z.view(b, t, -1, self.head_dim).transpose(1, 2)  # (b, heads, t, head_dim)

        q, k, v = rotate(split(attn.q_proj(y)), cos, sin), rotate(split(attn.k_proj(y)), cos, sin), split(attn.v_proj(y))
        if cache is not None:
            cache[0, :, :, start:start + t], cache[1, :, :, start:start + t] = k, v
            k, v = cache[:, :, :, :start + t]
        if k.shape[1] < q.shape[1]:  # grouped-query attention: several query heads share a key and value head
            k, v = (z.repeat_interleave(q.shape[1] // z.shape[1], 1) for z in (k, v))
        y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None and t > 1)
        x = x + attn.o_proj(y.transpose(1, 2).flatten(2))
        y, mlp = self.post_attention_layernorm(x), self.mlp
        return x + mlp.down_proj(F.silu(mlp.gate_proj(y)) * mlp.up_proj(y))


class Decoder(nn.Module):
    """LLaMA. Attributes are spelt as in a checkpoint."""

    def __init__(self, config):
        super().__init__()
        c = config
        self.config, self.checkpoint_activations = c, False
        self.model = nn.ModuleDict(dict(
            embed_tokens=nn.Embedding(c.vocab_size, c.hidden_size),
            layers=nn.ModuleList(DecoderLayer(c) for _ in range(c.num_hidden_layers)),
            norm=RMSNorm(c.hidden_size, c.rms_norm_eps)))
        self.lm_head = nn.Linear(c.hidden_size, c.vocab_size, bias=False)
        for name, p in self.named_parameters():
            if p.dim() > 1:
                nn.init.normal_(p, std=c.initializer_range)
            elif name.endswith("bias"):
                nn.init.zeros_(p)
        if c.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def target_paths(self, letters, layers=None):
        """Module paths of the linear layers that `letters` (of q k v o u d g) name, in all layers or those with these numbers."""
        layers = range(self.config.num_hidden_layers) if layers is None else layers
        return [f"model.layers.{i}.{DECODER_LINEARS[letter]}" for i in layers for letter in letters]

    def hidden(self, input_ids, positions=None, mask=None, cache=None, start=0):
        """Last hidden states (b, t, d) of input_ids (b, t). Without mask each token sees itself and those before it: rows padded on the
        right need none. positions (b, t) or (t,), by default 0 .. t - 1; mask (b, 1, t, start + t), True where a token may look."""
        if positions is None:
            positions = torch.arange(start, start + input_ids.shape[1], device=input_ids.device)
        x = self.model.embed_tokens(input_ids)
        cos, sin = (z.to(x.dtype) for z in rotary(self.config, positions))
        if positions.dim() == 2:
            cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)  # (b, 1, t, head_dim)
        for i, layer in enumerate(self.model.layers):
            args = (x, cos, sin, mask, None if cache is None else cache[i], start)
            x = checkpoint(layer, *args, use_reentrant=False) if self.checkpoint_activations and self.training else layer(*args)
        return self.model.norm(x)

    def forward(self, input_ids, **kw):
        """Logits (b, t, vocab_size)."""
        return self.lm_head(self.hidden(input_ids, **kw))

    @torch.inference_mode()
    def generate(self, prompts, max_new_tokens, stop_ids=(), temperature=0.0, top_p=1.0, seed=0):
        """Yields a list with the next token of each of `prompts` (lists of token ids), until each has had one of `stop_ids` or
        `max_new_tokens` of them: None stands where a row has ended. temperature 0 takes the likeliest token; above, one is drawn
        from the smallest set of tokens whose probabilities reach top_p."""
        device, longest = self.lm_head.weight.device, max(map(len, prompts))
        c, pad = self.config, [longest - len(prompt) for prompt in prompts]
        ids = torch.tensor([[0] * n + list(prompt) for n, prompt in zip(pad, prompts)], device=device)  # (b, longest), padded on the left
        real = torch.arange(longest + max_new_tokens, device=device) >= torch.tensor(pad, device=device).unsqueeze(1)  # (b, all positions)
        positions = (real.cumsum(1) - 1).clamp(min=0)
        # a token looks at real tokens up to itself; padding, which nobody looks at, at itself
        itself = torch.eye(longest, dtype=torch.bool, device=device)
        mask = real[:, None, :longest] & torch.ones_like(itself).tril() | itself  # (b, longest, longest)
        cache = self.lm_head.weight.new_zeros(
            c.num_hidden_layers, 2, len(prompts), c.num_key_value_heads, longest + max_new_tokens, c.head_dim)
        generator, running, start = torch.Generator(device).manual_seed(seed), [True] * len(prompts), 0
        mask = mask.unsqueeze(1) if any(pad) else None
        for _ in range(max_new_tokens):
            end = start + ids.shape[1]
            x = self.hidden(ids, positions[:, start:end], mask, cache, start)[:, -1]
            chosen = sample(self.lm_head(x).float(), temperature, top_p, generator)  # (b,)
            tokens = [token if alive else None for token, alive in zip(chosen.tolist(), running)]
            yield tokens
            running = [alive and token not in stop_ids for token, alive in zip(tokens, running)]
            if not any(running):
                return
            ids, start = chosen.unsqueeze(1), end
            mask = real[:, None, None, :end + 1] if any(pad) else None


def sample(logits, temperature, top_p, generator):
    """Token ids (b,) of logits (b, vocab_size)."""
    if temperature == 0:
        return logits.argmax(-1)
    p, order = (logits / temperature).softmax(-1).sort(-1, descending=True)
    p = p.masked_fill(p.cumsum(-1) - p >= top_p, 0)  # a token stays if those before it do not reach top_p yet
    return order.gather(1, torch.multinomial(p, 1, generator=generator)).squeeze(1)


# ---------------------------------------------------------------------------------------------------------------------
# reading a Hugging Face folder


def read_json(file):
    """The object in a JSON file, or an InputError that names the file."""
    try:
        value = json.loads(Path(file).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{file}: not found; a model folder holds config.json, model.safetensors and tokenizer.json") from None
    except (OSError, ValueError, RecursionError) as e:
        raise InputError(f"{file}: cannot be read as JSON ({e})") from None
    if not isinstance(value, dict):
        raise InputError(f"{file}: holds a {type(value).__name__}, expected a JSON object")
    return value


def upper_limit(name):
    """Of a number of that name in a config.json: beyond, a model would take forever to build."""
    if "dropout" in name:
        return 0.99
    return 1000 if name.startswith("num_") else 10**8


def read_config(folder, kind=EncoderConfig):
    """The EncoderConfig or DecoderConfig of folder/config.json; anything this file does not implement is refused by name."""
    file = Path(folder) / "config.json"
    raw = read_json(file)
    decoder = kind is DecoderConfig
    types = ("llama",) if decoder else ("roberta", "bert")
    if raw.get("model_type") not in types:
        raise InputError(f"{file}: model_type is {raw.get('model_type')!r}, expected {' or '.join(types)}")
    only = dict(hidden_act="silu") if decoder else dict(hidden_act="gelu", position_embedding_type="absolute", is_decoder=False)
    for key, value in only.items():
        if raw.get(key, value) != value:
            raise InputError(f"{file}: {key} is {raw[key]!r}, only {value!r} is implemented")
    if decoder:
        raw |= read_rope(raw, file)
    known = {}
    for f in fields(kind):
        value = raw.get(f.name)
        if value is None:
            if f.default is MISSING:
                raise InputError(f"{file}: {f.name} is missing")
            continue
        if f.type in (int, float):
            if type(value) not in (int, f.type) or not 0 <= value <= upper_limit(f.name):
                raise InputError(f"{file}: {f.name} is {value!r}, expected a number from 0 to {upper_limit(f.name):g}")
        elif not isinstance(value, f.type):
            raise InputError(f"{file}: {f.name} is {value!r}, expected a {f.type.__name__}")
        known[f.name] = value
    c = kind(**known)
    heads = c.num_attention_heads
    fits = min(c.hidden_size, heads, c.num_hidden_layers, c.vocab_size, c.max_length) >= 1
    if fits and decoder:
        fits = c.num_key_value_heads >= 1 and heads % c.num_key_value_heads == 0 and c.head_dim % 2 == 0
    elif fits:
        fits = c.hidden_size % heads == 0 and c.pad_token_id < c.vocab_size
    if not fits:
        names = ("hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim", "num_hidden_layers", "max_position_embeddings",
                 "vocab_size", "pad_token_id")
        sizes = ", ".join(f"{name} {getattr(c, name)}" for name in names if hasattr(c, name))
        raise InputError(f"{file}: sizes do not fit together ({sizes})")
    return c


def read_rope(raw, file):
    """rope_theta and rope_scaling of a LLaMA's config, which newer files keep in one rope_parameters."""
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise InputError(f"{file}: rope_scaling is {rope!r}, expected an object")
    kind = rope.get("rope_type", rope.get("type", "default"))
    needed = dict(default=(), linear=("factor",),
                  llama3=("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")).get(kind)
    if needed is None:
        raise InputError(f"{file}: rope_type is {kind!r}, only default, linear and llama3 are implemented")
    for name in needed:
        if not isinstance(rope.get(name), (int, float)) or rope[name] <= 0:
            raise InputError(f"{file}: {name} of the rope scaling is {rope.get(name)!r}, expected a positive number")
    theta = rope.get("rope_theta", raw.get("rope_theta"))
    return dict(rope_theta=theta, rope_scaling=rope | dict(rope_type=kind) if needed else None)


STORED = {torch.float32: "F32", torch.bfloat16: "BF16"}  # how safetensors calls them


def read_weights(folder, dtype):
    """Yields (key, tensor) from folder/model.safetensors, or from the shards that model.safetensors.index.json lists. Files that are in
    `dtype` are mapped into memory, so that their tensors take no second copy; others are read tensor by tensor."""
    folder = Path(folder)
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        files = [single]
    elif index.is_file():
        shards = read_json(index).get("weight_map")
        if not isinstance(shards, dict) or not shards:
            raise InputError(f"{index}: has no weight_map")
        files = [folder / name for name in sorted(set(map(str, shards.values())))]
        if any(file.parent != folder for file in files):
            raise InputError(f"{index}: names files outside its folder")
    else:
        pickle = (folder / "pytorch_model.bin").is_file()
        hint = " (pytorch_model.bin is a pickle, which is not read: save the model as safetensors)" if pickle else ""
        raise InputError(f"{folder}: found neither model.safetensors nor model.safetensors.index.json{hint}")
    for file in files:
        if not file.is_file():
            raise InputError(f"{file}: shard listed in {index} not found; download the folder again")
        try:
            with safe_open(file, framework="pt") as f:
                stored = {f.get_slice(key).get_dtype() for key in f.keys()}
            with safe_open(file, framework="pt", backend="mmap" if stored == {STORED[dtype]} else "pread") as f:
                for key in f.keys():
                    yield key, f.get_tensor(key)
        except (SafetensorError, OSError) as e:
            raise InputError(f"{file}: not a readable safetensors file ({e}); download it again") from None


def load_weights(model, folder, spelling, new=(), dtype=torch.float32, device="cpu"):
    """Puts the tensors of a folder into a model on the meta device, one after the other, in `dtype` and on `device`. spelling: from
    a key of the file to one of the model, or None for what is not needed. Keys in `new` may be missing or of another shape: they
    are returned, with the model's parameters still on meta. Any other key that is missing, unexpected or misshapen is an
    InputError that names it."""
    wanted, state, unexpected = model.state_dict(), {}, []
    for raw_key, tensor in read_weights(folder, dtype):
        key = spelling(raw_key)
        if key in wanted and tensor.shape == wanted[key].shape:
            state[key] = tensor.to(device, dtype)
        elif key in wanted and key not in new:
            raise InputError(f"{folder}: {raw_key} has shape {list(tensor.shape)}, config.json asks for {list(wanted[key].shape)}")
        elif key is not None and key not in wanted:
            unexpected.append(raw_key)
    missing = [key for key in wanted if key not in state and key not in new]
    if missing or unexpected:
        kind, keys = ("lacks", missing) if missing else ("has unexpected", unexpected)
        raise InputError(f"{folder}: the checkpoint {kind} {', '.join(keys[:3])}{' ..' if len(keys) > 3 else ''} "
                         f"({len(keys)} in all); is it a {model.config.model_type} model?")
    model.load_state_dict(state, assign=True, strict=False)
    return [key for key in wanted if key not in state]


def load_encoder(folder, num_labels, dtype=torch.float32):
    """The pretrained Encoder of a Hugging Face folder with `num_labels` outputs, in `dtype`, on the CPU. A head that the checkpoint
    lacks, or has for another number of labels, starts anew, and a printed line says so. InputError: see load_weights."""
    config = read_config(folder)
    with torch.device("meta"):  # shapes only: no time spent on random weights that are overwritten at once
        model = Encoder(config, num_labels)

    def spelling(key):
        if key.endswith("position_ids") or key.startswith(("lm_head.", "cls.")):  # harmless extras of language-model checkpoints
            return None
        key = key.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")
        if key.startswith(("embeddings.", "encoder.", "pooler.")):  # saved from the bare model
            key = f"{config.model_type}.{key}"
        return None if key.startswith("roberta.pooler.") else key

    head = {key for key in model.state_dict() if key.startswith("classifier.") or ".pooler." in key}
    new = load_weights(model, folder, spelling, head, dtype)
    if new:
        print(f"new head, not in the checkpoint: {', '.join(new)}")
    for key in new:
        value = torch.zeros(model.get_parameter(key).shape, dtype=dtype)
        if key.endswith("weight"):
            value.normal_(std=config.initializer_range)
        path, _, name = key.rpartition(".")
        setattr(model.get_submodule(path), name, nn.Parameter(value))
    return model


def stop_ids(folder):
    """The token ids that end a text, from the folder's generation_config.json, else its config.json: a set."""
    own, general = Path(folder) / "generation_config.json", Path(folder) / "config.json"
    for file in (own, general) if own.is_file() else (general,):
        ids = read_json(file).get("eos_token_id")
        if isinstance(ids, int):
            return {ids}
        if isinstance(ids, list) and ids and all(isinstance(i, int) for i in ids):
            return set(ids)
    raise InputError(f"{general}: eos_token_id is {ids!r}, expected the id, or a list of ids, that end a text")


def load_decoder(folder, dtype=torch.float32, device="cpu"):
    """The pretrained Decoder of a Hugging Face folder, in `dtype` on `device`. InputError: see load_weights."""
    config = read_config(folder, DecoderConfig)
    with torch.device("meta"):
        model = Decoder(config)
    tied = config.tie_word_embeddings

    def spelling(key):
        if key.endswith("rotary_emb.inv_freq") or tied and key == "lm_head.weight":
            return None
        return key if key.startswith(("model.", "lm_head.")) else f"model.{key}"  # saved from the bare model

    load_weights(model, folder, spelling, {"lm_head.weight"} if tied else (), dtype, device)
    if tied:
        model.lm_head.weight = model.model.embed_tokens.weight
    return model
