"""
Style transfer on Yelp or GYAFC, zero-shot, and its scores (Table 2).

    python train_instruct.py style --model DIR --adapter DIR --data DIR/yelp --direction neg2pos
    python train_instruct.py score --outputs FILE.. --data DIR/yelp --classifier RUN --lm FILE

Prompts and input files: data/style.py.
"""

import json
import re
import shlex
from pathlib import Path

from data import InputError, metrics
from data.instruct import fill
from data.style import PROMPTS, read_beside, read_lines, read_task, task_files, tidy
from training.flags import at_least, machine_flags, need, use_machine
from training.inference import (
    answer,
    encode_prompts,
    model_flags,
    open_classifier,
    open_model,
    read_run,
    subcommand,
)
from training.runs import make_folder, markdown, out_folder, write_json, write_text

SCORES = ("ACC", "BLEU", "self-BLEU", "PPL")


def style(argv):
    parser, arg = subcommand("style", "Rewrites the test sentences of Yelp or GYAFC in the other "
                             "style, zero-shot (prompts: data/style.py), and scores them.")
    arg("--data", required=True, help="folder of Yelp's files, or of one of GYAFC's domains")
    arg("--direction", required=True, choices=list(PROMPTS), help="from one style to the other")
    arg("--limit", type=int, metavar="N", help="only the first N sentences (default: all)")
    arg("--out", help="folder for the outputs and scores (default: runs/style-DIRECTION, numbered "
        "if that exists)")
    arg("--batch-size", type=int, default=16, help="sentences at a time")
    score_flags(arg)
    model_flags(parser, arg)
    parser.set_defaults(max_new_tokens=64)
    args = parser.parse_args(argv)
    at_least(args, 1, "limit", "batch_size")
    sources, references = read_task(args.data, args.direction)
    sources, references = sources[:args.limit], [lines[:args.limit] for lines in references]
    target = args.direction.split("2")[1]
    scorers = open_scorers(args, [target])
    out = out_folder(args, f"style-{args.direction}")
    for name in ("scores.json", "answers.jsonl", f"outputs.{args.direction}"):
        if (out / name).exists():
            raise InputError(f"--out {out} has a {name} already: give another folder")
    model, tokenizer, stop = open_model(args)
    prompts = encode_prompts(args, model, tokenizer, [
        fill(args.template, PROMPTS[args.direction], sentence) for sentence in sources])
    make_folder(out)
    answers = answer(model, tokenizer, prompts, stop, args.max_new_tokens, args.batch_size,
                     temperature=args.temperature, top_p=args.top_p, seed=args.seed)
    outputs = [tidy(text, args.direction) for text in answers]
    write_text(out / f"outputs.{args.direction}", "\n".join(outputs) + "\n")
    lines = [json.dumps(dict(source=a, answer=b, output=c)) + "\n"
             for a, b, c in zip(sources, answers, outputs)]
    write_text(out / "answers.jsonl", "".join(lines))
    scores = scores_of(outputs, sources, references, target, scorers)
    result = dict(direction=args.direction, sentences=len(outputs), **scores, settings=vars(args))
    write_json(out / "scores.json", result)
    shown = ", ".join(f"{name} {scores[name]:.2f}" for name in SCORES if name in scores)
    print(f"{len(outputs)} sentences: {shown}")
    print(f"{out}/: outputs.{args.direction}, answers.jsonl, scores.json")


def score(argv):
    parser, arg = subcommand("score", "Scores sentences that were transferred to another style. "
                             "With several files of outputs: a table.")
    arg("--outputs", required=True, nargs="+", metavar="FILE",
        help="files of transferred sentences, one a line")
    arg("--data", help="folder of Yelp's files, or of one of GYAFC's domains: sources and "
        "references come from it, by the direction that an --outputs ends in, such as .neg2pos; a "
        "file is not scored against itself")
    arg("--sources", metavar="FILE",
        help="the original sentences, line by line (default: none, no self-BLEU)")
    arg("--references", nargs="+", default=[], metavar="FILE", help="human transfers, line by "
        "line; if a line has tabs, its last column (default: none, no BLEU)")
    arg("--target", help="label of the style to reach (default: what follows the 2 in the "
        "direction)")
    arg("--out", help="folder for table.md and scores.json (default: none, only printed)")
    score_flags(arg)
    machine_flags(parser)
    args = parser.parse_args(argv)
    need(not (args.data and (args.sources or args.references)), "--data", "given",
         "either --data, or --sources and --references")
    if args.out and (Path(args.out) / "answers.jsonl").exists():
        raise InputError(f"--out {args.out} holds the scores.json of a run of style: give another "
                         "folder")
    use_machine(args)
    entries = []
    for file in args.outputs:
        outputs, sources, references = read_lines(file), args.sources, args.references
        found = re.search(r"\.((\w+)2(\w+))$", file)
        target = args.target or (found and found[3])
        if args.classifier and not target:
            raise InputError(f"--target is not given, and {file} does not end in a direction such "
                             "as .neg2pos")
        if args.data:
            if not found or found[1] not in PROMPTS:
                endings = ", ".join("." + direction for direction in PROMPTS)
                raise InputError(f"--outputs {file}: does not end in a direction ({endings}), "
                                 "which --data needs")
            sources, references = task_files(args.data, found[1])
        references = [read_beside(r, outputs, file) for r in references
                      if Path(r).resolve() != Path(file).resolve()]
        sources = read_beside(sources, outputs, file) if sources else None
        entries.append((file, outputs, sources, references, target))
    scorers = open_scorers(args, [target for *_, target in entries])
    if not (scorers or args.data or args.sources or args.references):
        raise InputError("nothing to score by: give --data, --sources, --references, --classifier "
                         "or --lm")
    scores = {file: dict(sentences=len(outputs), **scores_of(outputs, *rest, scorers))
              for file, outputs, *rest in entries}
    names = [name for name in SCORES if any(name in row for row in scores.values())]
    rows = [[file, row["sentences"], *(f"{row[name]:.2f}" if name in row else "" for name in names)]
            for file, row in scores.items()]
    table = markdown(["outputs", "sentences", *names], rows)
    if args.out:
        out, line = Path(args.out), f"    python train_instruct.py score {shlex.join(argv)}"
        make_folder(out)
        write_text(out / "table.md", f"{line}\n\n{table}")
        write_json(out / "scores.json", scores)
    print(table)
    if len(scores) == 1:
        scores = {name: value for name, value in scores[file].items() if name != "sentences"}
    print(json.dumps(scores))


def score_flags(arg):
    arg("--classifier", help="for ACC: folder of a train_glue.py run, with an adapter, on "
        "sentences labeled with their style (python -m data.style) (default: none, no ACC)")
    arg("--lm", metavar="FILE", help="for PPL: an n-gram model in ARPA or KenLM's binary form; "
        "needs the kenlm module (default: none, no PPL)")


def open_scorers(args, targets):
    """{name of a score: function of outputs and the style to reach, one of `targets`}."""
    scorers = {}
    if args.classifier:
        run = args.classifier
        result = read_run("--classifier", run)
        labels = result.get("labels")
        for target in targets:
            if not labels or target not in labels:
                raise InputError(f"--classifier {run}: its labels are {labels}, expected "
                                 f"{target!r} among them")
        logits = open_classifier("--classifier", run, result, use_machine(args))

        def accuracy(outputs, target):
            chosen = logits([(text,) for text in outputs]).argmax(1)  # (n,)
            return 100 * float((chosen == labels.index(target)).mean())

        scorers["ACC"] = accuracy
    if args.lm:
        try:
            import kenlm
        except ImportError:
            raise InputError("--lm needs the kenlm module: pip install kenlm (it is built with "
                             "cmake)") from None
        if not Path(args.lm).is_file():
            raise InputError(f"--lm {args.lm}: no such file; lmplz -o 5 < sentences > FILE.arpa "
                             "makes one")
        try:
            config = kenlm.Config()
            config.show_progress = False
            config.arpa_complain = kenlm.ARPALoadComplain.NONE  # of text files in general
            lm = kenlm.Model(str(args.lm), config)
        except OSError as e:
            reason = str(e).split(") ")[-1]
            raise InputError(f"--lm {args.lm}: kenlm cannot read it ({reason})") from None

        def perplexity(outputs, target):
            # log10 of each word, as kenlm splits a sentence, and of its end
            words = [word for text in outputs for word, *_ in lm.full_scores(text)]
            return 10 ** (-sum(words) / len(words))

        scorers["PPL"] = perplexity
    return scorers


def scores_of(outputs, sources, references, target, scorers):
    """ACC: percent that the classifier labels as the target style; BLEU against the references and
    self-BLEU against the sources, on 13a tokens; PPL."""
    scores = {name: scorer(outputs, target) for name, scorer in scorers.items()}
    if references:
        scores["BLEU"] = metrics.bleu(outputs, references)
    if sources:
        scores["self-BLEU"] = metrics.bleu(outputs, [sources])
    return scores
