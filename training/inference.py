"""
A trained model at work: logits of rows, answers to prompts, and the flags of commands that answer.
"""

from pathlib import Path

import torch
import torch.distributed as dist

import salora as sl
from data import InputError
from data.batching import batch_order, collate, load_tokenizer
from data.download import model_folder
from data.instruct import DEMO, TEMPLATES
from model import load_decoder, stop_ids
from training.flags import (
    PROCESSES,
    RANK,
    at_least,
    flag_group,
    machine_flags,
    need,
    new_parser,
    use_machine,
)
from training.loop import load_adapter
from training.runs import read_result

MODEL = "folder in Hugging Face layout, or a hub name (default: the demo's)"


def evaluate(model, rows, pad_id, device, batch_size=128):
    """Logits (n, num_labels) of `rows`, float32 numpy; each process computes its share."""
    training_mode = model.training
    logits = torch.zeros(len(rows), model.num_labels, device=device)
    model.eval()
    with torch.inference_mode():
        for batch in batch_order([len(ids) for ids, _ in rows], batch_size)[RANK::PROCESSES]:
            logits[batch] = model(*collate([rows[i] for i in batch], pad_id, device)).float()
    if PROCESSES > 1:
        dist.all_reduce(logits)
    model.train(training_mode)
    return logits.cpu().numpy()


def answer(model, tokenizer, prompts, stop, max_new_tokens, batch_size=16, **sampling):
    """The texts that the model answers to prompts (lists of token ids)."""
    training_mode, texts = model.training, []
    model.eval()
    for i in range(0, len(prompts), batch_size):
        rows = [[] for _ in prompts[i:i + batch_size]]
        for tokens in model.generate(prompts[i:i + batch_size], max_new_tokens, stop, **sampling):
            for row, token in zip(rows, tokens):
                if token is not None and token not in stop:
                    row.append(token)
        texts += [tokenizer.decode(row).strip() for row in rows]
    model.train(training_mode)
    return texts


def subcommand(name, description):
    parser = new_parser(prog=f"train_instruct.py {name}", description=description)
    return parser, flag_group(parser, "flags")


def model_flags(parser, arg):
    arg("--model", help=MODEL)
    arg("--adapter", help="folder of an adapter that a run saved (default: none)")
    arg("--merge", action="store_true", default=False,
        help="add the adapter to the weights first: the same text, faster")
    arg("--template", choices=list(TEMPLATES),
        help="as in training (default: that of the adapter's run, else alpaca)")
    arg("--max-new-tokens", type=int, default=256, help="limit of an answer")
    arg("--temperature", type=float, default=0.0,
        help="0 takes the most likely token; above, tokens are drawn")
    arg("--top-p", type=float, default=1.0,
        help="draw from the smallest set of tokens whose probabilities reach this")
    arg("--seed", type=int, default=0, help="of the draw")
    machine_flags(parser, dtype="float32")


def open_model(args):
    """The model of model_flags, its tokenizer and the ids that end a text. Fills in defaults."""
    at_least(args, 1, "max_new_tokens")
    at_least(args, 0, "temperature", "seed")
    need(0 < args.top_p <= 1, "--top-p", args.top_p, "a share in (0, 1]")
    need(args.temperature == 0 or args.temperature >= 0.001, "--temperature", args.temperature,
         "0, or at least 0.001")
    device = use_machine(args)
    args.model, args.dtype = args.model or str(DEMO / "llama"), args.dtype or "float32"
    args.template = args.template or template_of(args.adapter)
    folder = model_folder(args.model)
    tokenizer, stop = load_tokenizer(folder), stop_ids(folder)
    model = load_decoder(folder, getattr(torch, args.dtype), device).eval()
    if args.adapter:
        load_adapter(model, args.adapter)
        if args.merge:
            sl.merge(model)
    return model, tokenizer, stop


def check_room(args, model, prompts):
    longest = max(map(len, prompts))
    room = max(model.config.max_length - longest, 0)
    if args.max_new_tokens > room:
        raise InputError(f"--max-new-tokens is {args.max_new_tokens}; with the prompt of {longest} "
                         f"tokens the model has positions for {room} more")


def template_of(folder):
    """The template of the run that an adapter's folder lies in."""
    result = read_result(Path(folder) / "..") if folder else None
    return result["settings"].get("template", "alpaca") if result else "alpaca"
