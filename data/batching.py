"""Text to tensors: tokenized once, batched by length so that there is little padding."""

import json
from pathlib import Path

import numpy as np
import torch
from tokenizers import AddedToken, Tokenizer, processors

from data import InputError, read_json

LARGEST = 64 << 20  # bytes of a tokenizer.json; those of known models have 1 to 35 MB
NEVER = 1 << 40  # a length in tokens that no text has

# the tokenizers of transformers that take only the vocabulary from tokenizer.json, and their
# special tokens
CLASSES = {
    "BertTokenizer": dict(unk_token="[UNK]", sep_token="[SEP]", pad_token="[PAD]",
                          cls_token="[CLS]", mask_token="[MASK]"),
    "RobertaTokenizer": dict(bos_token="<s>", eos_token="</s>", sep_token="</s>", cls_token="<s>",
                             unk_token="<unk>", pad_token="<pad>", mask_token="<mask>"),
    "LlamaTokenizer": dict(unk_token="<unk>", bos_token="<s>", eos_token="</s>"),
    "GPT2Tokenizer": dict(unk_token="<|endoftext|>", bos_token="<|endoftext|>",
                          eos_token="<|endoftext|>"),
}
OF_MODEL = {"bert": "BertTokenizer", "roberta": "RobertaTokenizer"}  # if no file names one
WHOLE = ("", "PreTrainedTokenizer", "TokenizersBackend")  # these use all of tokenizer.json

PLAIN = json.loads(processors.TemplateProcessing(  # the same as none
    single="$A", pair="$A $B:1", special_tokens=[]).__getstate__())


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """The tokenizer of a model folder as transformers builds it from tokenizer.json and
    tokenizer_config.json; a printed line says where it differs from tokenizer.json. It does not pad
    or cut, whatever the files say. InputError: a file is missing or damaged."""
    folder = Path(folder)
    file = folder / "tokenizer.json"
    if not file.is_file():
        raise InputError(f"{file}: not found; save the model's fast tokenizer there (vocab.txt or "
                         "vocab.json and merges.txt are not read)")
    if file.stat().st_size > LARGEST:
        raise InputError(f"{file}: has {file.stat().st_size >> 20} MiB, and no tokenizer needs "
                         f"more than {LARGEST >> 20}")
    parts, config = read_json(file), tokenizer_config(folder)
    try:
        kind = tokenizer_class(parts, config, file)
        config = CLASSES.get(kind, {}) | config
        rebuild(parts, kind, config, file)
        side = config.get("truncation_side") or (parts.get("truncation") or {}).get("direction")
        parts["truncation"] = parts["padding"] = parts["model"]["dropout"] = None
        tokenizer = Tokenizer.from_str(json.dumps(parts))
        add_tokens(tokenizer, config, folder)
        if kind in OF_MODEL.values():
            cls, sep = text_of(config["cls_token"]), text_of(config["sep_token"])
            one, two = f"{cls} $A {sep}", f"$B:1 {sep}:1"  # :1 is the token type
            if kind == "RobertaTokenizer":
                two = f"{sep} $B {sep}"
            elif typeless(config):
                two = f"$B {sep}"
            tokenizer.post_processor = processors.TemplateProcessing(
                single=one, pair=f"{one} {two}",
                special_tokens=[(token, tokenizer.token_to_id(token)) for token in (cls, sep)])
        tokenizer.encode_special_tokens = bool(config.get("split_special_tokens"))
        if str(side).lower() == "left":
            tokenizer.enable_truncation(NEVER, direction="left")  # tokenize() sets the length
    except InputError:
        raise
    except Exception as e:  # the binding raises a bare Exception
        raise InputError(f"{file}: not a readable tokenizer ({e!r})") from None
    return tokenizer


def tokenizer_config(folder):
    """tokenizer_config.json, with what older folders have in separate files."""
    def read(name):
        return read_json(folder / name) if (folder / name).is_file() else {}

    config, of_model = read("tokenizer_config.json"), read("config.json")
    if "added_tokens_decoder" not in config:
        config |= read("special_tokens_map.json")
        config["added_tokens"] = read("added_tokens.json")
    config.setdefault("tokenizer_class", of_model.get("tokenizer_class"))
    config["model_type"] = of_model.get("model_type")
    return config


def tokenizer_class(parts, config, file):
    """The class in transformers, or "" if all of tokenizer.json is used."""
    kind = config["tokenizer_class"] or OF_MODEL.get(config["model_type"], "")
    kind = kind.removesuffix("Fast")
    stored = parts["model"].get("type") or ("BPE" if "merges" in parts["model"] else "WordPiece")
    byte_level = "ByteLevel" in json.dumps([parts.get("pre_tokenizer"), parts.get("decoder")])
    if kind in WHOLE or kind == "LlamaTokenizer" and byte_level:
        return ""
    if kind in CLASSES and stored == ("WordPiece" if kind == "BertTokenizer" else "BPE"):
        return kind
    print(f"{file}: its {stored} is used as it is, without what a {kind} would change")
    return ""


def rebuild(parts, kind, config, file):
    """Changes the parts of a tokenizer.json into those of its class."""
    new, space = {}, config.get("add_prefix_space")
    if kind == "BertTokenizer":
        new = dict(normalizer=dict(
            type="BertNormalizer", clean_text=True, lowercase=config.get("do_lower_case", True),
            handle_chinese_chars=config.get("tokenize_chinese_chars", True),
            strip_accents=config.get("strip_accents")), pre_tokenizer=dict(type="BertPreTokenizer"))
        parts["model"]["unk_token"] = text_of(config["unk_token"])
    elif kind == "LlamaTokenizer":
        scheme = "never" if space is False else "always" if config.get("legacy") else "first"
        new = dict(normalizer=None, pre_tokenizer=dict(
            type="Metaspace", replacement="▁", prepend_scheme=scheme, split=False))
        parts["model"] |= dict(fuse_unk=True, byte_fallback=True, unk_token=None)
    elif kind:
        new = dict(normalizer=None, pre_tokenizer=dict(
            type="ByteLevel", add_prefix_space=bool(space), trim_offsets=True, use_regex=True))
        parts["model"] |= dict(fuse_unk=False, byte_fallback=False, unk_token=None)
    for name, value in new.items():
        if parts.get(name) != value:
            print(f"{file}: its {name} {json.dumps(parts.get(name))[:160]} becomes "
                  f"{json.dumps(value, ensure_ascii=False)}, from tokenizer_config.json or the "
                  f"defaults of a {kind}")
    parts |= new
    if kind:
        return
    if config["model_type"] in OF_MODEL and not parts.get("post_processor"):
        print(f"{file}: has no post-processor, so texts get no first and last token")
    post = json.dumps(parts.get("post_processor") or PLAIN)
    if typeless(config) and '"type_id": 1' in post:
        parts["post_processor"] = json.loads(post.replace('"type_id": 1', '"type_id": 0'))
        if config["model_type"] == "bert":
            print(f"{file}: the second of two sentences has token type 0, as model_input_names in "
                  "tokenizer_config.json has no token_type_ids")


def typeless(config):
    """Does the model get no token types, even for two sentences?"""
    whole = (config["tokenizer_class"] or "-").removesuffix("Fast") in WHOLE
    default = [] if whole else ["token_type_ids"]
    return "token_type_ids" not in (config.get("model_input_names") or default)


def text_of(token):
    return token["content"] if isinstance(token, dict) else token


def add_tokens(tokenizer, config, folder):
    """Adds the tokens that are only in tokenizer_config.json and the older files."""
    def added(token):
        flags = {k: v for k, v in token.items() if k != "__type"} if isinstance(token, dict) else {}
        return AddedToken(**dict(content=text_of(token), special=True) | flags)

    by_id = {int(i): token for i, token in config.get("added_tokens_decoder", {}).items()}
    tokens = [added(token) for _, token in sorted(by_id.items())]
    known = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    more = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
    named = [token for name, token in config.items() if name.endswith("_token")]
    named += more.values() if isinstance(more, dict) else more
    special = [token for token in named if token and isinstance(token, (str, dict))]
    older = {text: i for text, i in config.get("added_tokens", {}).items() if text not in known}
    for text, _ in sorted(older.items(), key=lambda item: item[1]):
        is_special = text in map(text_of, special)
        tokens.append(AddedToken(text, special=is_special, normalized=not is_special))
    known |= {token.content for token in tokens}
    tokens += [added(token) for token in special if text_of(token) not in known]
    tokenizer.add_tokens(tokens)
    for text, i in [*((text_of(token), i) for i, token in by_id.items()), *older.items()]:
        if tokenizer.token_to_id(text) != i:
            raise InputError(f"{folder}: its added token {text!r} should have the id {i}, and is "
                             f"{tokenizer.token_to_id(text)}: save the tokenizer again")


def tokenize(tokenizer, texts, max_length, vocab_size):
    """[(ids, type ids)] of one or two sentences each, with special tokens. Of two sentences the
    longer is truncated first."""
    side = tokenizer.truncation["direction"] if tokenizer.truncation else "right"
    tokenizer.enable_truncation(max_length, direction=side)
    encodings = tokenizer.encode_batch([t if len(t) == 2 else t[0] for t in texts])
    check_ids([e.ids for e in encodings], vocab_size)
    for text, encoding in zip(texts, encodings):
        if not encoding.ids:
            raise InputError(f"tokenizer.json makes no token of {' and '.join(map(repr, text))}: "
                             "give it a post_processor")
    return [(e.ids, e.type_ids) for e in encodings]


def check_ids(rows, vocab_size):
    """InputError: rows, lists of token ids, have one that the model lacks."""
    highest = max((max(ids) for ids in rows if ids), default=0)
    if highest >= vocab_size:
        raise InputError(f"tokenizer.json gives token id {highest}, but the model's vocab_size is "
                         f"{vocab_size}: they do not belong together")


def batch_order(lengths, batch_size, rng=None):
    """Lists of row numbers, rows of similar length together. Without rng, in order of length. With
    rng (a numpy Generator), in a new random order: rows of one length are shuffled, every row moves
    by up to two batches in the order of length, and the batches are shuffled. That pads 1 to 3 % of
    a GLUE task's tokens; random rows would pad 50 to 200 %. The longest batch comes first: if it
    fits into memory, all do."""
    order = np.argsort(lengths, kind="stable")
    if rng is not None:
        order = np.lexsort((rng.random(len(lengths)), lengths))
        moved = np.arange(len(order)) + rng.uniform(0, 2 * batch_size, len(order))
        order = order[np.argsort(moved)]
    batches = [order[i:i + batch_size].tolist() for i in range(0, len(order), batch_size)]
    if rng is not None:
        rng.shuffle(batches)
        longest = max(range(len(batches)), key=lambda i: max(lengths[j] for j in batches[i]))
        batches.insert(0, batches.pop(longest))
    return batches


def send(x, device):
    """x on the device. The host waits for a copy to a GPU unless the memory is pinned."""
    if torch.device(device).type == "cuda":
        x = x.pin_memory()
    return x.to(device, non_blocking=True)


def collate(rows, pad_id, device, always_mask=False):
    """input_ids, attention_mask, token_type_ids: (b, t) each. The mask is None if nothing is
    padded, unless always_mask."""
    t = max(len(ids) for ids, _ in rows)
    input_ids = torch.tensor([ids + [pad_id] * (t - len(ids)) for ids, _ in rows])
    token_type_ids = torch.tensor([types + [0] * (t - len(types)) for _, types in rows])
    attention_mask = None
    if always_mask or any(len(ids) < t for ids, _ in rows):
        attention_mask = torch.tensor([[1] * len(ids) + [0] * (t - len(ids)) for ids, _ in rows])
    tensors = input_ids, attention_mask, token_type_ids
    return [x if x is None else send(x, device) for x in tensors]
