"""
RoBERTa and BERT for sequence classification, LLaMA for text, and a reader of Hugging Face folders.

Submodules carry Hugging Face's names (attention.self.query, intermediate.dense ..), so the keys of
a checkpoint and the module paths in an adapter need no translation.
"""

import contextlib
import math
from dataclasses import MISSING, dataclass, fields
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch.utils.checkpoint import checkpoint

from data import InputError, need, read_json

# the paper's W^Q W^K W^V W^O W^U W^D inside a layer; g is LLaMA's gate projection
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
LETTERS = {name: letter.upper() for names in (LINEARS, DECODER_LINEARS)
           for letter, name in names.items()}

# -------------------------------------------------------------------------------------------------
# RoBERTa and BERT


@dataclass
class EncoderConfig:
    """The fields of config.json that matter here, with Hugging Face's defaults."""
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
    def narrowest(self) -> int:
        """Width of the narrowest linear layer."""
        return min(self.hidden_size, self.intermediate_size)

    @property
    def max_length(self) -> int:
        """Longest input in tokens. RoBERTa's positions start at padding_idx + 1."""
        unused = self.pad_token_id + 1 if self.model_type == "roberta" else 0
        return self.max_position_embeddings - unused


def dropout(x: torch.Tensor, p: float, training: bool) -> torch.Tensor:
    """F.dropout. On a CPU, where random numbers cost more than a matrix product, each element gets
    16 random bits, so p is exact to 1/65536."""
    if not training or p == 0:
        return x
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        return F.dropout(x, p)
    bits = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-2**63, None)
    bits = bits.view(torch.int16)[:x.numel()].view(x.shape)
    return x * ((bits >= round(p * 2**16) - 2**15) / (1 - p)).to(x.dtype)


def attention(q, k, v, mask, p: float, training: bool) -> torch.Tensor:
    """softmax(q k' / sqrt(d)) v for q, k, v (b, heads, t, d), with dropout on the softmax. mask
    (b, 1, 1, t) is True where a token may be read. With dropout on a CPU it is written out, which
    is faster there than PyTorch's own; a GPU has fused kernels, even with such a mask."""
    if not training or p == 0 or q.device.type != "cpu" or torch.compiler.is_compiling():
        return F.scaled_dot_product_attention(q, k, v, mask, dropout_p=p if training else 0.0)
    scores = q / math.sqrt(q.shape[-1]) @ k.mT  # (b, heads, t, t)
    if mask is not None:
        # not -inf: a row that is all masked would be nan
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    return dropout(scores.softmax(-1), p, training) @ v


def init_weights(model):
    """Random matrices, zero biases; weights of norms stay 1."""
    for name, p in model.named_parameters():
        if p.dim() > 1:
            nn.init.normal_(p, std=model.config.initializer_range)
        elif name.endswith("bias"):
            nn.init.zeros_(p)


class EncoderLayer(nn.Module):
    """One post-norm transformer layer: x (b, t, d) -> (b, t, d)."""

    def __init__(self, c):
        super().__init__()
        d, inner = c.hidden_size, c.intermediate_size
        self.heads, self.p_hidden = c.num_attention_heads, c.hidden_dropout_prob
        self.p_attention = c.attention_probs_dropout_prob

        def output(k):  # adapter: for baselines.py
            return nn.ModuleDict(dict(dense=nn.Linear(k, d), adapter=nn.Identity(),
                                      LayerNorm=nn.LayerNorm(d, eps=c.layer_norm_eps)))

        qkv = dict(query=nn.Linear(d, d), key=nn.Linear(d, d), value=nn.Linear(d, d))
        self.attention = nn.ModuleDict(dict(self=nn.ModuleDict(qkv), output=output(d)))
        self.intermediate = nn.ModuleDict(dict(dense=nn.Linear(d, inner)))
        self.output = output(inner)

    def forward(self, x, mask=None, first_only=False, prefix=None):
        b, attn = len(x), self.attention
        rows = x[:, :1] if first_only else x  # (b, 1 or t, d): where output is needed

        def split(y):
            return y.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (b, heads, t, d / heads)

        q, k, v = attn.self.query(rows), attn.self.key(x), attn.self.value(x)
        if prefix is not None:  # (2, n, d): n keys and values that belong to no token
            k, v = (torch.cat([extra.expand(b, -1, -1), y], 1)
                    for extra, y in zip(prefix, (k, v)))  # (b, n + t, d)
        y = attention(split(q), split(k), split(v), mask, self.p_attention, self.training)
        y = attn.output.dense(y.transpose(1, 2).flatten(2))
        y = dropout(y, self.p_hidden, self.training)
        x = attn.output.LayerNorm(rows + attn.output.adapter(y))
        y = self.output.dense(F.gelu(self.intermediate.dense(x)))
        y = dropout(y, self.p_hidden, self.training)
        return self.output.LayerNorm(x + self.output.adapter(y))


class Encoder(nn.Module):
    """RoBERTa or BERT with a classification head (one output: regression)."""

    def __init__(self, config: EncoderConfig, num_labels: int):
        super().__init__()
        c, d = config, config.hidden_size
        self.config, self.num_labels, self.checkpoint_activations = config, num_labels, False
        self.prefix = self.prompt = None  # of baselines.py: keys and values; input vectors
        self.labels = None  # config.json's names of the outputs; None: a new head
        body = nn.ModuleDict(dict(
            embeddings=nn.ModuleDict(dict(
                word_embeddings=nn.Embedding(c.vocab_size, d),
                position_embeddings=nn.Embedding(c.max_position_embeddings, d),
                token_type_embeddings=nn.Embedding(c.type_vocab_size, d),
                LayerNorm=nn.LayerNorm(d, eps=c.layer_norm_eps),
            )),
            encoder=nn.ModuleDict(dict(layer=nn.ModuleList(
                EncoderLayer(c) for _ in range(c.num_hidden_layers)))),
        ))
        self.add_module(c.model_type, body)  # self.roberta or self.bert
        if c.model_type == "roberta":
            self.classifier = nn.ModuleDict(dict(dense=nn.Linear(d, d),
                                                 out_proj=nn.Linear(d, num_labels)))
        else:
            body["pooler"] = nn.ModuleDict(dict(dense=nn.Linear(d, d)))
            self.classifier = nn.Linear(d, num_labels)
        init_weights(self)

    @property
    def body(self) -> nn.Module:
        return getattr(self, self.config.model_type)

    @property
    def head(self) -> list:
        """What every method trains in full: RoBERTa's classifier; BERT's pooler and classifier."""
        if self.config.model_type == "roberta":
            return [self.classifier]
        return [self.body.pooler, self.classifier]

    def target_paths(self, letters: str, layers: list | None = None) -> list:
        """Module paths of the linear layers named by `letters` (of q k v o u d), in the layers
        with these numbers, by default all."""
        layers = range(self.config.num_hidden_layers) if layers is None else layers
        stack = f"{self.config.model_type}.encoder.layer"
        return [f"{stack}.{i}.{LINEARS[letter]}" for i in layers for letter in letters]

    def hidden(self, input_ids: torch.Tensor, attention_mask=None, token_type_ids=None,
               first_only: bool = False) -> torch.Tensor:
        """Last hidden states (b, t, d) of input_ids (b, t). attention_mask (b, t): 1 on tokens, 0
        on padding; None: nothing is padded. first_only: only the first token, (b, 1, d), so that
        the last layer skips the others."""
        c, e = self.config, self.body.embeddings
        if token_type_ids is None or c.type_vocab_size == 1:
            token_type_ids = torch.zeros_like(input_ids)
        n = 0 if self.prompt is None else len(self.prompt)
        if n:  # n copies of the first token make room for the prompt behind it
            input_ids, token_type_ids, attention_mask = (
                y if y is None else torch.cat([y[:, :1].expand(-1, n), y], 1)
                for y in (input_ids, token_type_ids, attention_mask))  # (b, n + t)
        if c.model_type == "roberta":  # positions count the real tokens, from padding_idx + 1
            real = (input_ids != c.pad_token_id).long()
            positions = real.cumsum(1) * real + c.pad_token_id  # (b, t)
        else:
            positions = torch.arange(input_ids.shape[1], device=input_ids.device)  # (t,)
        x = e.word_embeddings(input_ids)  # (b, t, d)
        if n:
            prompt = self.prompt.to(x.dtype).expand(len(x), -1, -1)  # (b, n, d)
            x = torch.cat([x[:, :1], prompt, x[:, n + 1:]], 1)
        x = x + e.token_type_embeddings(token_type_ids) + e.position_embeddings(positions)
        x = dropout(e.LayerNorm(x), c.hidden_dropout_prob, self.training)
        mask = attention_mask
        if mask is not None:
            mask = mask[:, None, None, :].bool()  # (b, 1, 1, t)
        layers = self.body.encoder.layer
        prefix = [None] * len(layers)
        if self.prefix is not None:
            prefix = self.prefix().to(x.dtype)  # (layers, 2, n, d)
            if mask is not None:
                mask = F.pad(mask, (prefix.shape[2], 0), value=True)  # (b, 1, 1, n + t)
        for i, layer in enumerate(layers):
            x = run(self, layer, x, mask, first_only and i == len(layers) - 1, prefix[i])
        return x

    def forward(self, input_ids: torch.Tensor, attention_mask=None, token_type_ids=None):
        """Logits (b, num_labels)."""
        x = self.hidden(input_ids, attention_mask, token_type_ids, first_only=True)[:, 0]  # (b, d)
        x = x.to(next(self.head[0].parameters()).dtype)  # a float32 head may sit on a bfloat16 body

        def drop(y):
            return dropout(y, self.config.classifier_dropout, self.training)

        if self.config.model_type == "roberta":
            return self.classifier.out_proj(drop(torch.tanh(self.classifier.dense(drop(x)))))
        return self.classifier(drop(torch.tanh(self.body.pooler.dense(x))))


# -------------------------------------------------------------------------------------------------
# LLaMA


@dataclass
class DecoderConfig:
    """The fields of a LLaMA's config.json that matter here, with Hugging Face's defaults."""
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
    rope_scaling: dict = None  # or rope_type llama3 or linear with its numbers
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    attention_dropout: float = 0.0
    initializer_range: float = 0.02

    def __post_init__(self):
        self.num_key_value_heads = self.num_key_value_heads or self.num_attention_heads
        self.head_dim = self.head_dim or self.hidden_size // self.num_attention_heads

    @property
    def narrowest(self) -> int:
        """Width of the narrowest linear layer."""
        return min(self.hidden_size, self.intermediate_size,
                   self.num_key_value_heads * self.head_dim)

    @property
    def max_length(self) -> int:
        """Longest input in tokens."""
        return self.max_position_embeddings


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) times a learned weight, for x (.., d)."""

    def __init__(self, d, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(d)), eps

    def forward(self, x):
        y = x.float()
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * y.to(x.dtype)


def rotary(c: DecoderConfig, positions: torch.Tensor) -> tuple:
    """cos and sin (.., t, head_dim) of the rotary embedding at positions (.., t). Dimension i is
    paired with i + head_dim / 2, Hugging Face's layout."""
    i = torch.arange(0, c.head_dim, 2, device=positions.device).float()
    freq = c.rope_theta ** -(i / c.head_dim)  # (head_dim / 2,)
    scaling = c.rope_scaling or {}
    if scaling.get("rope_type") == "linear":
        freq = freq / scaling["factor"]
    elif scaling.get("rope_type") == "llama3":  # stretches long waves, medium ones in part
        # full turns within the original context
        turns = scaling["original_max_position_embeddings"] * freq / (2 * math.pi)
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        keep = ((turns - low) / (high - low)).clamp(0, 1)
        freq = keep * freq + (1 - keep) * freq / scaling["factor"]
    angle = positions.unsqueeze(-1).float() * freq  # (.., t, head_dim / 2)
    angle = torch.cat([angle, angle], -1)
    return angle.cos(), angle.sin()


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """x (b, heads, t, head_dim) turned by its positions."""
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat([-b, a], -1) * sin


class DecoderLayer(nn.Module):
    """One pre-norm transformer layer: x (b, t, d) -> (b, t, d)."""

    def __init__(self, c):
        super().__init__()
        d, h, inner, bias = c.hidden_size, c.head_dim, c.intermediate_size, c.attention_bias
        self.head_dim, self.p_attention = h, c.attention_dropout
        self.self_attn = nn.ModuleDict(dict(
            q_proj=nn.Linear(d, c.num_attention_heads * h, bias=bias),
            k_proj=nn.Linear(d, c.num_key_value_heads * h, bias=bias),
            v_proj=nn.Linear(d, c.num_key_value_heads * h, bias=bias),
            o_proj=nn.Linear(c.num_attention_heads * h, d, bias=bias)))
        self.mlp = nn.ModuleDict(dict(
            gate_proj=nn.Linear(d, inner, bias=c.mlp_bias),
            up_proj=nn.Linear(d, inner, bias=c.mlp_bias),
            down_proj=nn.Linear(inner, d, bias=c.mlp_bias)))
        self.input_layernorm = RMSNorm(d, c.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(d, c.rms_norm_eps)

    def forward(self, x, cos, sin, mask=None, cache=None, start=0):
        """mask None: causal. cache (2, b, kv heads, longest, head_dim) holds the keys and values
        of the first `start` positions and gets those of the t new ones."""
        b, t, _ = x.shape
        y, attn = self.input_layernorm(x), self.self_attn

        def split(z):
            return z.view(b, t, -1, self.head_dim).transpose(1, 2)  # (b, heads, t, head_dim)

        q, k, v = split(attn.q_proj(y)), split(attn.k_proj(y)), split(attn.v_proj(y))
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if cache is not None:
            cache[0, :, :, start:start + t], cache[1, :, :, start:start + t] = k, v
            k, v = cache[:, :, :, :start + t]
        if k.shape[1] < q.shape[1]:  # grouped-query attention: query heads share keys and values
            k, v = (z.repeat_interleave(q.shape[1] // z.shape[1], 1) for z in (k, v))
        # is_causal, as FlashAttention takes no mask; one token after a cache sees all. Training
        # never compares t, which would make torch.compile break its graph
        causal = mask is None and (cache is None or t > 1)
        y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal,
                                           dropout_p=self.p_attention if self.training else 0.0)
        x = x + attn.o_proj(y.transpose(1, 2).flatten(2))
        y, mlp = self.post_attention_layernorm(x), self.mlp
        return x + mlp.down_proj(F.silu(mlp.gate_proj(y)) * mlp.up_proj(y))


class Decoder(nn.Module):
    """LLaMA."""

    def __init__(self, config: DecoderConfig):
        super().__init__()
        c = config
        self.config, self.checkpoint_activations = c, False
        self.model = nn.ModuleDict(dict(
            embed_tokens=nn.Embedding(c.vocab_size, c.hidden_size),
            layers=nn.ModuleList(DecoderLayer(c) for _ in range(c.num_hidden_layers)),
            norm=RMSNorm(c.hidden_size, c.rms_norm_eps)))
        self.lm_head = nn.Linear(c.hidden_size, c.vocab_size, bias=False)
        init_weights(self)
        if c.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def target_paths(self, letters: str, layers: list | None = None) -> list:
        """Module paths of the linear layers named by `letters` (of q k v o u d g), in the layers
        with these numbers, by default all."""
        layers = range(self.config.num_hidden_layers) if layers is None else layers
        return [f"model.layers.{i}.{DECODER_LINEARS[letter]}" for i in layers for letter in letters]

    def hidden(self, input_ids: torch.Tensor, positions=None, mask=None, cache=None,
               start: int = 0) -> torch.Tensor:
        """Last hidden states (b, t, d) of input_ids (b, t). positions: (b, t) or (t,), by default
        from `start`. mask (b, 1, t, start + t): True where a token may look; None: causal, which
        suits rows padded on the right."""
        if positions is None:
            positions = torch.arange(start, start + input_ids.shape[1], device=input_ids.device)
        x = self.model.embed_tokens(input_ids)
        cos, sin = (z.to(x.dtype) for z in rotary(self.config, positions))
        if positions.dim() == 2:
            cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)  # (b, 1, t, head_dim)
        for i, layer in enumerate(self.model.layers):
            x = run(self, layer, x, cos, sin, mask, None if cache is None else cache[i], start)
        return self.model.norm(x)

    def forward(self, input_ids: torch.Tensor, **kw) -> torch.Tensor:
        """Logits (b, t, vocab_size)."""
        return self.lm_head(self.hidden(input_ids, **kw))

    @torch.inference_mode()
    def generate(self, prompts: list, max_new_tokens: int, stop_ids: set = (),
                 temperature: float = 0.0, top_p: float = 1.0, seed: int = 0):
        """Yields a list with the next token of each of `prompts` (lists of token ids), None where
        a row has ended, until each row has one of `stop_ids` or `max_new_tokens` tokens.
        temperature 0: the most likely token; above 0: sampled from the smallest set of tokens
        whose probabilities reach top_p."""
        device, longest = self.lm_head.weight.device, max(map(len, prompts))
        c, pad = self.config, [longest - len(prompt) for prompt in prompts]
        padded = [[0] * n + list(prompt) for n, prompt in zip(pad, prompts)]
        ids = torch.tensor(padded, device=device)  # (b, longest)
        real = torch.arange(longest + max_new_tokens, device=device)
        real = real >= torch.tensor(pad, device=device).unsqueeze(1)  # (b, all positions)
        positions = (real.cumsum(1) - 1).clamp(min=0)
        # a token looks at real tokens up to itself; padding, which is never read, at itself
        itself = torch.eye(longest, dtype=torch.bool, device=device)
        mask = real[:, None, :longest] & torch.ones_like(itself).tril() | itself  # (b, t, t)
        cache = self.lm_head.weight.new_zeros(c.num_hidden_layers, 2, len(prompts),
                                              c.num_key_value_heads, real.shape[1], c.head_dim)
        generator = torch.Generator(device).manual_seed(seed)
        running, start = [True] * len(prompts), 0
        mask = mask.unsqueeze(1) if any(pad) else None  # (b, 1, t, t)
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


def sample(logits: torch.Tensor, temperature: float, top_p: float, generator) -> torch.Tensor:
    """Token ids (b,) of logits (b, vocab_size), as Decoder.generate describes."""
    if temperature == 0:
        return logits.argmax(-1)
    p, order = (logits / temperature).softmax(-1).sort(-1, descending=True)
    before = p.cumsum(-1) - p  # of likelier tokens; from top_p on they are dropped
    p = p.masked_fill((before >= top_p) & (before > 0), 0)
    return order.gather(1, torch.multinomial(p, 1, generator=generator)).squeeze(1)


def run(model, layer, *args):
    """layer(*args), recomputed in the backward pass if checkpoint_activations is set."""
    if model.checkpoint_activations and model.training:
        return checkpoint(layer, *args, use_reentrant=False)
    return layer(*args)


# -------------------------------------------------------------------------------------------------
# reading a Hugging Face folder; adapter.py reads with the same functions


def weight_files(folder: str | Path) -> tuple:
    """(paths of the safetensors files of a model folder, the object in their index or None). A
    single file wins over an index, as in transformers. InputError: none are there."""
    folder = Path(folder)
    single, listed = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        if listed.is_file():
            print(f"{folder}: {single.name} is read, not the shards in {listed.name}")
        return [single], None
    if not listed.is_file():
        others = ("bin", "pt", "pth", "ckpt", "h5", "msgpack", "gguf", "safetensors")
        found = [file.name for ending in others for file in folder.glob(f"*.{ending}")]
        hint = f" ({found[0]} is not read: save as safetensors)" if found else ""
        if ".bin" in hint:
            hint = hint.replace("is not", "is a pickle, which is not")
        raise InputError(f"{folder}: found neither {single.name} nor {listed.name}{hint}")
    index = read_json(listed)
    shards = index.get("weight_map")
    if not isinstance(shards, dict) or not shards:
        raise InputError(f"{listed}: has no weight_map")
    names = sorted(set(map(str, shards.values())))
    for name in names:
        if Path(name).name != name:
            raise InputError(f"{listed}: names files outside its folder, such as {name}")
        if not (folder / name).is_file():
            raise InputError(f"{folder / name}: shard listed in {listed} not found; download the "
                             "folder again")
    return [folder / name for name in names], index


STORED = {torch.float32: "F32", torch.bfloat16: "BF16"}  # what safetensors calls them


@contextlib.contextmanager
def open_tensors(file: str | Path, dtype: torch.dtype | None = None):
    """A safetensors file to read from. If all of it is in `dtype` it is mapped into memory, so
    tensors take no second copy; else it is read tensor by tensor. InputError: the file is damaged,
    or not there."""
    try:
        with open(file, "rb"), safe_open(file, framework="pt") as f:  # open() for its errors
            stored = {f.get_slice(key).get_dtype() for key in f.keys()}
        mapped = stored == {STORED.get(dtype)}
        with safe_open(file, framework="pt", backend="mmap" if mapped else "pread") as f:
            yield f
    except FileNotFoundError:
        raise InputError(f"{file}: not found") from None
    except PermissionError:
        raise InputError(f"{file}: may not be read; change its permissions") from None
    except (SafetensorError, OSError) as e:
        raise InputError(f"{file}: not a readable safetensors file ({e}); download it "
                         "again") from None


# modules outside the body, which a model for another task may lack
HEADS = ("classifier.", "cls.", "lm_head.", "qa_outputs.", "score.")


def full_name(key: str, body: str = "") -> str:
    """A checkpoint's key as a name in the full model. Older files have gamma and beta in
    LayerNorm, and the keys of a bare body lack its name, `body`."""
    key = key.replace("LayerNorm.gamma", "LayerNorm.weight")
    key = key.replace("LayerNorm.beta", "LayerNorm.bias")
    bare = body and not key.startswith((f"{body}.", *HEADS))
    return f"{body}.{key}" if bare else key


def read_config(folder: str | Path, kind: type = EncoderConfig):
    """The EncoderConfig or DecoderConfig, `kind`, of folder/config.json. InputError: it is
    damaged, or needs something that is not implemented."""
    file = Path(folder) / "config.json"
    raw = read_json(file, "; a model folder holds config.json, model.safetensors, tokenizer.json")
    decoder = kind is DecoderConfig
    types, found = ("llama",) if decoder else ("roberta", "bert"), raw.get("model_type")
    need(found in types, f"{file}: model_type", repr(found), " or ".join(types))
    only = dict(hidden_act="gelu", position_embedding_type="absolute", is_decoder=False)
    if decoder:
        only = dict(hidden_act="silu", partial_rotary_factor=1.0, is_causal=True)
    for key, value in only.items():
        found = raw.get(key, value)
        need(found == value, f"{file}: {key}", repr(found), f"{value!r}; no other is implemented")
    if raw.get("quantization_config"):
        raise InputError(f"{file}: quantization_config: quantized weights are not read; take the "
                         "model before quantization")
    if decoder:
        raw |= read_rope(raw, file)
    known = {}
    for f in fields(kind):
        value = raw.get(f.name)
        if value is None:
            need(f.default is not MISSING, f"{file}: {f.name}", "missing", "a value")
            continue
        if f.type in (int, float):
            # a larger model would take forever to build
            limit = 1000 if f.name.startswith("num_") else 10**8
            limit = 0.99 if "dropout" in f.name else 1e12 if f.name == "rope_theta" else limit
            ok = type(value) in (int, f.type) and 0 <= value <= limit
            need(ok, f"{file}: {f.name}", repr(value), f"a number from 0 to {limit:g}")
        else:
            ok = isinstance(value, f.type)
            need(ok, f"{file}: {f.name}", repr(value), f"a {f.type.__name__}")
        known[f.name] = value
    c = kind(**known)
    heads = c.num_attention_heads
    fits = min(c.hidden_size, heads, c.num_hidden_layers, c.vocab_size, c.max_length) >= 1
    if fits and decoder:
        kv = c.num_key_value_heads
        fits = kv >= 1 and heads % kv == 0 and c.head_dim % 2 == 0
    elif fits:
        fits = c.hidden_size % heads == 0 and c.pad_token_id < c.vocab_size
    if not fits:
        sizes = ", ".join(f"{key} {value}" for key, value in vars(c).items() if type(value) is int)
        raise InputError(f"{file}: sizes do not fit together ({sizes})")
    return c


def read_rope(raw, file):
    """rope_theta and rope_scaling of a LLaMA's config; newer files keep both in rope_parameters."""
    rope = raw.get("rope_scaling") or raw.get("rope_parameters") or {}  # in transformers' order
    if raw.get("rope_parameters") not in (None, {}, rope):
        print(f"{file}: rope_scaling is used, not rope_parameters")
    need(isinstance(rope, dict), f"{file}: rope_scaling", repr(rope), "an object")
    kind = rope.get("rope_type", rope.get("type", "default"))
    llama3 = ("low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    needed = dict(default=(), linear=("factor",), llama3=("factor", *llama3)).get(kind)
    need(needed is not None, f"{file}: rope_type", repr(kind), "default, linear or llama3")
    share = rope.get("partial_rotary_factor", 1)
    need(share in (None, 1), f"{file}: partial_rotary_factor", repr(share),
         "1; no other is implemented")
    original = "original_max_position_embeddings"  # one outside of rope wins
    rope |= {original: raw.get(original, rope.get(original, raw.get("max_position_embeddings")))}
    for name in needed:
        value = rope.get(name)
        need(isinstance(value, (int, float)) and value > 0, f"{file}: {name} in rope_scaling",
             repr(value), "a positive number")
    theta = rope.get("rope_theta", raw.get("rope_theta"))
    return dict(rope_theta=theta, rope_scaling=rope | dict(rope_type=kind) if needed else None)


def load_weights(model, folder, spelling, new=(), dtype=torch.float32, device="cpu",
                 tied=()) -> list:
    """Fills a model on the meta device from a folder. spelling(a key of the file): that of the
    model, or None if it is not needed. Keys in `new` may be missing or have another shape, and one
    of the two in `tied` may be missing: these are returned, still on meta. InputError names any
    other key that is missing, unexpected, there twice or misshapen."""
    wanted, state, unexpected = model.state_dict(), {}, []
    for file in weight_files(folder)[0]:
        with open_tensors(file, dtype) as f:
            for raw_key in f.keys():
                key = spelling(raw_key)
                if key not in wanted:
                    unexpected += [raw_key] if key else []
                    continue
                tensor, shape = f.get_tensor(raw_key), wanted[key].shape
                if key in state:
                    raise InputError(f"{folder}: has {key} twice, once as {raw_key}")
                if not tensor.is_floating_point():
                    raise InputError(f"{folder}: {raw_key} is {tensor.dtype}, quantized; take the "
                                     "model before quantization")
                if tensor.shape == shape:
                    state[key] = tensor.to(device, dtype)
                elif key not in new:
                    raise InputError(f"{folder}: {raw_key} has shape {list(tensor.shape)}, "
                                     f"config.json asks for {list(shape)}")
    missing = [key for key in wanted if key not in state and key not in new]
    if sum(key in state for key in tied) == 1:
        missing = [key for key in missing if key not in tied]
    if missing or unexpected:
        kind, keys = ("lacks", missing) if missing else ("has unexpected", unexpected)
        some = ", ".join(keys[:3]) + (" .." if len(keys) > 3 else "")
        raise InputError(f"{folder}: the checkpoint {kind} {some} ({len(keys)} in all); is it a "
                         f"{model.config.model_type} model?")
    model.load_state_dict(state, assign=True, strict=False)
    return [key for key in wanted if key not in state]


def output_names(config: dict, outputs: int) -> list:
    """The names that a config.json gives to the outputs of a head, or Hugging Face's LABEL_0 .."""
    names = config.get("id2label")
    numbers = [str(i) for i in range(outputs)]
    if isinstance(names, dict) and names.keys() == set(numbers):
        return [str(names[i]) for i in numbers]
    return [f"LABEL_{i}" for i in numbers]


def load_encoder(folder: str | Path, num_labels: int,
                 dtype: torch.dtype = torch.float32) -> Encoder:
    """The pretrained Encoder of a Hugging Face folder with `num_labels` outputs, on the CPU. If the
    checkpoint has no head, or one of another size, the head is new, and a printed line says so.
    InputError: as in load_weights."""
    config = read_config(folder)
    with torch.device("meta"):  # shapes only: weights are read below
        model = Encoder(config, num_labels)
    unused = ("lm_head.", "cls.", "qa_outputs.", "roberta.pooler.")  # of other tasks

    def spelling(key):
        key = full_name(key, config.model_type)
        buffer = key.endswith(("position_ids", "token_type_ids"))
        return None if key.startswith(unused) or buffer else key

    head = {key for key in model.state_dict() if key.startswith("classifier.") or ".pooler." in key}
    new = load_weights(model, folder, spelling, head, dtype)
    if new:
        print(f"new head, not in the checkpoint: {', '.join(new)}")
    values = {key: torch.zeros(model.get_parameter(key).shape, dtype=dtype) for key in new}
    for key, value in values.items():
        if key.endswith("weight"):
            value.normal_(std=config.initializer_range)
    model.load_state_dict(values, assign=True, strict=False)
    if not any(key.startswith("classifier.") for key in new):
        model.labels = output_names(read_json(Path(folder) / "config.json"), num_labels)
    return model


def stop_ids(folder: str | Path) -> set:
    """The token ids that end a text, from generation_config.json, else config.json. InputError:
    there are none."""
    own, general = Path(folder) / "generation_config.json", Path(folder) / "config.json"
    for file in (own, general) if own.is_file() else (general,):
        ids = read_json(file).get("eos_token_id")
        ids = [ids] if isinstance(ids, int) else ids
        if isinstance(ids, list) and ids and all(isinstance(i, int) and i >= 0 for i in ids):
            return set(ids)
    raise InputError(f"{general}: eos_token_id is {ids!r}, expected the id, or a list of ids, that "
                     "end a text")


TIED = ("model.embed_tokens.weight", "lm_head.weight")  # a file may have either, or both


def load_decoder(folder: str | Path, dtype: torch.dtype = torch.float32,
                 device: str | torch.device = "cpu") -> Decoder:
    """The pretrained Decoder of a Hugging Face folder. InputError: as in load_weights."""
    config = read_config(folder, DecoderConfig)
    with torch.device("meta"):
        model = Decoder(config)

    def spelling(key):
        return None if key.endswith("rotary_emb.inv_freq") else full_name(key, "model")

    tied = TIED if config.tie_word_embeddings else ()
    absent = load_weights(model, folder, spelling, (), dtype, device, tied)
    embedding, head = model.model.embed_tokens, model.lm_head
    if TIED[0] in absent:
        embedding.weight = head.weight
    elif tied and (absent or torch.equal(head.weight, embedding.weight)):
        head.weight = embedding.weight
    elif tied:
        config.tie_word_embeddings = False
        print(f"{folder}: the lm_head.weight there is not the embedding, so the two are not tied, "
              "though tie_word_embeddings in config.json is true")
    return model
