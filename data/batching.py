"""Text to tensors: tokenised once, batched by length so that next to nothing is padding."""

from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer

from data import InputError


def load_tokenizer(folder):
    """The Tokenizer of folder/tokenizer.json, without the padding that the file may ask for."""
    file = Path(folder) / "tokenizer.json"
    if not file.is_file():
        raise InputError(f"{file}: not found; save the model's fast tokenizer there (vocab.txt or vocab.json and merges.txt are not read)")
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as e:  # the binding raises a bare Exception
        raise InputError(f"{file}: not a readable tokenizer ({e})") from None
    tokenizer.no_padding()
    return tokenizer


def tokenize(tokenizer, texts, max_length, vocab_size):
    """[(ids, type ids)] of one or two sentences each, special tokens included, the longer sentence truncated first."""
    tokenizer.enable_truncation(max_length)
    encodings = tokenizer.encode_batch([t if len(t) == 2 else t[0] for t in texts])
    highest = max((max(e.ids) for e in encodings if e.ids), default=0)
    if highest >= vocab_size:
        raise InputError(f"tokenizer.json gives token id {highest}, but the model's vocab_size is {vocab_size}: they do not belong together")
    return [(e.ids, e.type_ids) for e in encodings]


def batch_order(lengths, batch_size, rng=None):
    """Lists of row numbers, rows of like length together. With rng (a numpy Generator), in a new random order: lengths are jittered by
    up to 10 % before sorting, so that batches mix, and then the batches are shuffled. Without, in order of length."""
    lengths = np.asarray(lengths, dtype=np.float64)
    if rng is not None:
        lengths = lengths * rng.uniform(0.9, 1.1, len(lengths))
    order = lengths.argsort(kind="stable")
    batches = [order[i:i + batch_size].tolist() for i in range(0, len(order), batch_size)]
    if rng is not None:
        rng.shuffle(batches)
    return batches


def collate(rows, pad_id, device):
    """input_ids, attention_mask (None if nothing is padded), token_type_ids: (b, t) each."""
    t = max(len(ids) for ids, _ in rows)
    input_ids = torch.tensor([ids + [pad_id] * (t - len(ids)) for ids, _ in rows])
    token_type_ids = torch.tensor([types + [0] * (t - len(types)) for _, types in rows])
    padded = any(len(ids) < t for ids, _ in rows)
    attention_mask = torch.tensor([[1] * len(ids) + [0] * (t - len(ids)) for ids, _ in rows]) if padded else None
    return [x if x is None else x.to(device, non_blocking=True) for x in (input_ids, attention_mask, token_type_ids)]
