"""
Zero-shot style transfer, Table 2 of the paper: the prompts, the files of Yelp and GYAFC, and
training data for a classifier of styles.

    python -m data.style DIR/yelp OUT        # makes OUT/train.tsv and dev.tsv
    python train_glue.py --task OUT --model bert-base-uncased --method lora

Yelp (Li et al. 2018): a folder with test.neg and test.pos (one sentence per line, lower-cased,
tokenized), ref0.neg2pos, ref0.pos2neg and so on (references, line by line), and for the classifier
train*.neg, train*.pos, dev.neg, dev.pos.

GYAFC (Rao and Tetreault 2018): the unpacked folder of one of its domains, such as
Entertainment_Music: test/informal with test/formal.ref0 .. ref3, and test/formal with
test/informal.ref0 .. ref3.
"""

import random
import re
import sys
from pathlib import Path

from data import InputError, read_text

PROMPTS = {  # direction: the instruction; the sentence is its input
    "neg2pos": "Rewrite the following sentence so that its sentiment becomes positive. Change as "
               "few words as possible and keep the topic.",
    "pos2neg": "Rewrite the following sentence so that its sentiment becomes negative. Change as "
               "few words as possible and keep the topic.",
    "informal2formal": "Rewrite the following sentence in a formal style. Keep its meaning.",
    "formal2informal": "Rewrite the following sentence in an informal style. Keep its meaning.",
}
GYAFC = ("GYAFC is licensed: ask its authors for it (github.com/raosudha89/GYAFC-corpus, which "
         "needs Yahoo's L6 corpus), unpack it, and give one of its domains, such as "
         "DIR/GYAFC_Corpus/Entertainment_Music")


def read_lines(file, hint=""):
    """The lines of a text file; if a line has tabs, its last column."""
    lines = read_text(file, hint=hint).removesuffix("\n").split("\n")
    if not any(line.strip() for line in lines):
        raise InputError(f"{file}: is empty, expected one sentence per line")
    return [line.removesuffix("\r").split("\t")[-1].strip() for line in lines]


def read_beside(file, lines, owner):
    """read_lines(file), which has to match `lines`, those of the file `owner`, line by line."""
    own = read_lines(file)
    if len(own) != len(lines):
        raise InputError(f"{file}: has {len(own)} lines, but {owner} has {len(lines)}: they must "
                         "match line by line")
    return own


def task_files(folder, direction):
    """The file of source sentences, and the files of references: numbered, or the single one."""
    folder = Path(folder)
    source, target = direction.split("2")
    if "formal" in direction:
        file, names = folder / "test" / source, [f"test/{target}.ref*"]
    else:
        file, names = folder / f"test.{source}", [f"ref[0-9].{direction}", f"ref.{direction}"]
    references = sorted(folder.glob(names[0])) or sorted(folder.glob(names[-1]))
    if not references:
        print(f"{folder}: no references ({' or '.join(names)}), so there is no BLEU against them")
    return file, references


def read_task(folder, direction):
    """Source sentences, and the lines of each file of references."""
    file, references = task_files(folder, direction)
    hint = GYAFC if "formal" in direction else "see data/style.py for the expected files"
    sources = read_lines(file, f"; {hint}")
    return sources, [read_beside(reference, sources, file) for reference in references]


def tidy(answer, direction):
    """The sentence in a model's answer: its first line, without quotation marks. For Yelp, in the
    form of that data: lower-cased, with spaces around punctuation and before 's, n't and so on."""
    lines = (line.strip() for line in answer.split("\n"))
    text = next(filter(None, lines), "").strip("\"'“”` ")
    if "formal" in direction:
        return text
    text = re.sub(r"([.,!?;:()\"$%&/-])", r" \1 ", text.lower().replace("’", "'"))
    text = re.sub(r"(n't|'(?:s|m|re|ve|ll|d))\b", r" \1", text)
    return " ".join(text.split())


def classifier_data(folder, out):
    """Writes train.tsv and dev.tsv, with the columns sentence and label (neg, pos), from Yelp's
    folder."""
    for name in ("train.tsv", "dev.tsv"):
        if (Path(out) / name).exists():
            raise InputError(f"{out}/{name}: already exists; give another folder")
    tables = {}
    for split in ("train", "dev"):
        rows = []
        for style in ("neg", "pos"):
            files = sorted(Path(folder).glob(f"{split}*.{style}"))
            if not files:
                raise InputError(f"{folder}/{split}*.{style}: not found; expected sentences of "
                                 "that style, one a line")
            rows += [f"{line}\t{style}\n" for file in files for line in read_lines(file) if line]
        random.Random(0).shuffle(rows)  # so that --limit-train gets both
        tables[split] = "sentence\tlabel\n" + "".join(rows)
    Path(out).mkdir(parents=True, exist_ok=True)
    for split, text in tables.items():
        (Path(out) / f"{split}.tsv").write_text(text, encoding="utf-8")
        sentences = text.count("\n") - 1
        print(f"{out}/{split}.tsv: {sentences} sentences")


if __name__ == "__main__":
    try:
        if len(sys.argv) != 3:
            raise InputError(f"{len(sys.argv) - 1} arguments, expected 2: python -m data.style "
                             "DIR/yelp OUT")
        classifier_data(*sys.argv[1:])
    except (InputError, OSError) as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(2)
