"""
The nine GLUE tasks, the demo, and TSV folders of your own: from a name to rows of text with their
labels.

GLUE's TSV files have no quoting (a " is an ordinary character), one row per line, and a header,
except CoLA. Labels are read as they are, without white space around them.
"""

import math
import re
from dataclasses import dataclass
from pathlib import Path

from data import InputError, draw_rows, metrics, read_text
from data.download import download_task

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Task:
    folder: str
    text: tuple  # columns of the one or two sentences: names, or numbers where there is no header
    label: object  # column of the label
    labels: tuple  # in the order of the outputs; None: a number is predicted, one output
    metric: str  # the headline
    names: tuple = None  # of the labels, where the files have numbers; None: labels are names
    epochs: int = 10
    header: bool = True
    dev: tuple = ("dev.tsv",)
    skip_broken: bool = False  # the file as published has rows with missing columns

    @property
    def num_labels(self):
        return len(self.labels) if self.labels else 1

    @property
    def label_names(self):
        """The names of the outputs; None: a number is predicted."""
        return self.names or self.labels


@dataclass
class Rows:
    texts: list  # tuples of one or two sentences
    labels: list  # class numbers, or floats


BINARY, ENTAILMENT = ("0", "1"), ("entailment", "not_entailment")
TASKS = {
    "cola": Task("CoLA", (3,), 1, BINARY, "matthews_correlation", ("unacceptable", "acceptable"),
                 header=False),
    "sst2": Task("SST-2", ("sentence",), "label", BINARY, "accuracy", ("negative", "positive"),
                 epochs=5),
    "mrpc": Task("MRPC", ("#1 String", "#2 String"), "Quality", BINARY, "accuracy",
                 ("not_equivalent", "equivalent")),
    "stsb": Task("STS-B", ("sentence1", "sentence2"), "score", None, "pearson"),
    "qqp": Task("QQP", ("question1", "question2"), "is_duplicate", BINARY, "accuracy",
                ("not_duplicate", "duplicate"), epochs=3, skip_broken=True),
    "mnli": Task("MNLI", ("sentence1", "sentence2"), "gold_label",
                 ("entailment", "neutral", "contradiction"), "accuracy", epochs=3,
                 dev=("dev_matched.tsv", "dev_mismatched.tsv")),
    "qnli": Task("QNLI", ("question", "sentence"), "label", ENTAILMENT, "accuracy", epochs=3),
    "rte": Task("RTE", ("sentence1", "sentence2"), "label", ENTAILMENT, "accuracy", epochs=20),
    "wnli": Task("WNLI", ("sentence1", "sentence2"), "label", BINARY, "accuracy",
                 ("not_entailment", "entailment")),
    "demo": Task("demo", (3,), 1, BINARY, "matthews_correlation", epochs=6, header=False),
}


LAYOUT = ("; expected GLUE's files in --data, such as CoLA/train.tsv and CoLA/dev.tsv, or "
          "train.tsv and dev.tsv in the folder that --task names")


def read_table(file, header, hint=LAYOUT):
    """Column names (numbers without a header) and the rows as (line number, cells). hint: added to
    the error if the file is not found."""
    text = read_text(file, hint)
    # splitlines would also split at U+2028
    lines = [(number, line.removesuffix("\r").split("\t"))
             for number, line in enumerate(text.split("\n"), 1) if line.strip(" \r")]
    if len(lines) <= header:
        raise InputError(f"{file}: has no rows")
    first = lines[0][1]
    names = [name.strip() for name in first] if header else list(range(len(first)))
    return names, lines[header:]


def read_rows(file, task, limit=None):
    """Rows of a file of the task; InputError names file, line and what was expected."""
    names, table = read_table(file, task.header)
    for column in (*task.text, task.label):
        if column not in names:
            found = f"{len(names)} columns"
            if task.header:
                found = f"columns {', '.join(map(repr, names))}"
            raise InputError(f"{file}: no column {column!r}, found {found}; columns are separated "
                             "by tabs")
    at = [names.index(column) for column in task.text]
    label_at = names.index(task.label)
    rows, broken = Rows([], []), []
    for line, cells in table:
        if len(rows.labels) == limit:
            break
        if len(cells) != len(names):
            if task.skip_broken:
                broken.append(line)
                continue
            raise InputError(f"{file}: line {line} has {len(cells)} columns, expected "
                             f"{len(names)}, separated by tabs")
        label = cells[label_at].strip()
        if task.labels is None:
            try:
                value = float(label)
            except ValueError:
                value = math.nan
            if not math.isfinite(value):
                raise InputError(f"{file}: line {line}: {task.label} is {label!r}, expected a "
                                 "number")
        elif label not in task.labels:
            raise InputError(f"{file}: line {line}: label is {label!r}, expected one of "
                             f"{', '.join(task.labels)}")
        else:
            value = task.labels.index(label)
        rows.texts.append(tuple(cells[i] for i in at))
        rows.labels.append(value)
    if broken:
        if not rows.labels:
            raise InputError(f"{file}: all of its {len(broken)} rows are broken, the first in line "
                             f"{broken[0]}; expected {len(names)} columns, separated by tabs")
        print(f"{file}: skipped {len(broken)} broken rows, the first in line {broken[0]}")
    return rows


def read_texts(file, columns):
    """Texts without labels: their numbers, from 0 for the first line of data, and tuples of one or
    two sentences. columns: those of a task's text. The file is a table whose header has them, or
    sentence, or sentence1 and sentence2; a table without a header, laid out like the task's; or,
    for single sentences, plain lines of text."""
    names, table = read_table(file, False, "; expected a file of texts, one a line")
    head = [cell.strip() for cell in table[0][1]]
    usual = ("sentence",) if len(columns) == 1 else ("sentence1", "sentence2")
    found = next((x for x in (columns, usual) if set(x) <= set(head)), None)
    if found:
        at, table = [head.index(name) for name in found], table[1:]
    elif len(columns) == 1 and len(head) == 1:
        at = [0]
    elif set(columns) <= set(names) and len(head) == 4:  # CoLA's train.tsv and dev.tsv
        at = columns
    else:
        raise InputError(f"{file}: its first line has the columns {', '.join(map(repr, head))}, "
                         f"expected {' and '.join(usual)} among them, separated by tabs")
    if not table:
        raise InputError(f"{file}: has no rows")
    for line, cells in table:
        if len(cells) != len(head):
            raise InputError(f"{file}: line {line} has {len(cells)} columns, expected {len(head)}, "
                             "separated by tabs")
    first = 2 if found else 1
    return ([line - first for line, _ in table],
            [tuple(cells[i] for i in at) for _, cells in table])


def own_task(folder):
    """The Task of a user's TSV folder, from the header and the labels of its train.tsv."""
    file = Path(folder) / "train.tsv"
    names, table = read_table(file, header=True)
    text = ("sentence",) if "sentence" in names else ("sentence1", "sentence2")
    label = "label" if "label" in names else "score"
    for column in (*text, label):
        if column not in names:
            raise InputError(f"{file}: columns are {', '.join(map(repr, names))}, expected "
                             "sentence (or sentence1 and sentence2) and label (or score), "
                             "separated by tabs")
    for other, used in (("score", label), ("sentence1", text[0])):
        if other in names and used != other:
            print(f"{file}: has columns {used} and {other}; {used} is used")
    if label == "score":
        return Task(str(folder), text, label, None, "pearson")
    at = names.index(label)
    labels = {cells[at].strip() for _, cells in table if len(cells) > at}
    if "" in labels:
        line = next(line for line, cells in table if len(cells) > at and not cells[at].strip())
        raise InputError(f"{file}: line {line} has no label: give it one, or remove the row")
    if not 2 <= len(labels) <= 1000:
        raise InputError(f"{file}: column label has {len(labels)} distinct values, expected 2 to "
                         "1000 classes (for numbers name the column score)")

    def order(label):  # numbers by size, then words
        number = re.fullmatch(r"[+-]?\d+(\.\d+)?", label)
        return not number, float(label) if number else 0, label

    return Task(str(folder), text, label, tuple(sorted(labels, key=order)), "accuracy")


def load_task(name, data=None, limit_train=None, limit_dev=None, hold_out=None):
    """Task, train Rows and a list of dev Rows.

    name: one of TASKS, or a user's folder
    data: a folder in GLUE's layout; None: this one, and a missing GLUE task is downloaded into it
    hold_out: this many random rows of the training file, or below 1 this share of them (at most
        3000), replace the dev rows, so that settings can be chosen without looking at those. They
        are the same every time"""
    if name in TASKS:
        task = TASKS[name]
        folder = Path(data or HERE) / task.folder
        if data is None and name != "demo" and not folder.is_dir():
            download_task(task.folder, HERE)
    else:
        folder, task = Path(name), own_task(name)
    if not hold_out:
        train = read_rows(folder / "train.tsv", task, limit_train)
        return task, train, [read_rows(folder / file, task, limit_dev) for file in task.dev]
    rows = read_rows(folder / "train.tsv", task)
    hold_out = int(hold_out) if hold_out >= 1 else min(math.ceil(hold_out * len(rows.labels)), 3000)
    if hold_out >= len(rows.labels):
        raise InputError(f"--hold-out is {hold_out}, but {folder / 'train.tsv'} has "
                         f"{len(rows.labels)} rows: hold out fewer")
    rest, held = draw_rows(len(rows.labels), hold_out)
    parts = rest[:limit_train], held[:limit_dev]
    train, dev = (Rows([rows.texts[i] for i in part], [rows.labels[i] for i in part])
                  for part in parts)
    return task, train, [dev]


def score(task, labels, logits):
    """{metric: value} of numpy logits (n, num_labels)."""
    if task.labels is None:
        names, prediction = ["pearson", "spearmanr"], logits[:, 0]
    else:
        names, prediction = ["accuracy", "matthews_correlation"], logits.argmax(1)
        names += ["f1"] * (len(task.labels) == 2)
    return {name: getattr(metrics, name)(labels, prediction) for name in names}
