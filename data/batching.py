"""Text to tensors: tokenized once, batched by length so that next to nothing is padding."""

from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer

from data import InputError

LARGEST = 64 << 20  # bytes of a tokenizer.json; those of known models have 1 to 35 MB


def load_tokenizer(folder):
    """The Tokenizer of folder/tokenizer.json, without the padding that the file may ask for."""
    file = Path(folder) / "tokenizer.json"
    if not file.is_file():
        raise InputError(f"{file}: not found; save the model's fast tokenizer there (vocab.txt or "
                         "vocab.json and merges.txt are not read)")
    if file.stat().st_size > LARGEST:
        raise InputError(f"{file}: has {file.stat().st_size >> 20} MiB, and no tokenizer needs "
                         f"more than {LARGEST >> 20}")
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as e:  # the binding raises a bare Exception
        raise InputError(f"{file}: not a readable tokenizer ({e})") from None
    tokenizer.no_padding()
    return tokenizer


def tokenize(tokenizer, texts, max_length, vocab_size):
    """[(ids, type ids)] of one or two sentences each, special tokens included. Of two sentences
    the longer is truncated first."""
    tokenizer.enable_truncation(max_length)
    encodings = tokenizer.encode_batch([t if len(t) == 2 else t[0] for t in texts])
    check_ids([e.ids for e in encodings], vocab_size)
    for text, encoding in zip(texts, encodings):
        if not encoding.ids:
            raise InputError(f"tokenizer.json makes no token of {' and '.join(map(repr, text))}, "
                             "not even one that stands for a beginning: give it a post_processor")
    return [(e.ids, e.type_ids) for e in encodings]


def check_ids(rows, vocab_size):
    """rows: lists of token ids, which the model has to know."""
    highest = max((max(ids) for ids in rows if ids), default=0)
    if highest >= vocab_size:
        raise InputError(f"tokenizer.json gives token id {highest}, but the model's vocab_size is "
                         f"{vocab_size}: they do not belong together")


def batch_order(lengths, batch_size, rng=None):
    """Lists of row numbers, rows of similar length together. Without rng, in order of length. With
    rng (a numpy Generator), in a new random order: rows of one length are shuffled, every row moves
    by up to two batches in the order of length, and the batches are shuffled. That pads 1 to 3 % of
    a GLUE task's tokens; random rows would pad 50 to 200 %. The longest batch comes first: memory
    that suffices for the first step suffices for all."""
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
    return [x if x is None else x.to(device, non_blocking=True) for x in tensors]
