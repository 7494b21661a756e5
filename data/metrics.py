"""
GLUE's scores in float64, equal to scikit-learn's and SciPy's to rounding, and BLEU, equal to
sacrebleu's.

Where a score is 0/0 they warn and return 0 or nan. Here it is 0, "no relation found": Matthews
correlation when only one class is predicted or present, F1 without a true positive, a correlation
with a constant.
"""

import math
import re
from collections import Counter

import numpy as np


def accuracy(label, prediction):
    return float(np.mean(np.asarray(label) == np.asarray(prediction)))


def f1(label, prediction):
    """F1 of class 1, for two classes."""
    label, prediction = np.asarray(label) == 1, np.asarray(prediction) == 1
    denominator = label.sum() + prediction.sum()
    return float(2 * (label & prediction).sum() / denominator) if denominator else 0.0


def matthews_correlation(label, prediction):
    """Any number of classes (Gorodkin's R_K, which for two classes is Matthews' phi)."""
    classes, both = np.unique(np.concatenate([label, prediction]), return_inverse=True)
    label, prediction = both[:len(label)], both[len(label):]
    n = len(label)
    true, guessed = (np.bincount(x, minlength=len(classes)) for x in (label, prediction))
    # Python integers: products of counts can exceed int64, or float64's 53 bits
    covariance = int((label == prediction).sum()) * n - int(true @ guessed)
    variance = (n * n - int(true @ true)) * (n * n - int(guessed @ guessed))
    return covariance / variance ** 0.5 if variance else 0.0


def pearson(label, prediction):
    x, y = np.asarray(label, dtype=np.float64), np.asarray(prediction, dtype=np.float64)
    x, y = x - x.mean(), y - y.mean()
    x_norm, y_norm = np.linalg.norm(x), np.linalg.norm(y)
    return float(np.clip((x / x_norm) @ (y / y_norm), -1, 1)) if x_norm and y_norm else 0.0


def average_ranks(values):
    """Ranks from 1; equal values share the mean of their ranks."""
    _, inverse, counts = np.unique(np.asarray(values), return_inverse=True, return_counts=True)
    return (counts.cumsum() - (counts - 1) / 2)[inverse]


def spearmanr(label, prediction):
    return pearson(average_ranks(label), average_ranks(prediction))


def tokenize_13a(line):
    """Words as in WMT's mteval-v13a: punctuation is split off, but not . and , in numbers."""
    line = line.replace("<skipped>", "")  # a mark of that script
    for entity, character in (("&quot;", '"'), ("&amp;", "&"), ("&lt;", "<"), ("&gt;", ">")):
        line = line.replace(entity, character)
    line = f" {line} "
    line = re.sub(r"([!-&(-+:-@\[-`{-~/])", r" \1 ", line)
    line = re.sub(r"([^0-9])([.,])", r"\1 \2 ", line)
    line = re.sub(r"([.,])([^0-9])", r" \1 \2", line)
    line = re.sub(r"([0-9])(-)", r"\1 \2 ", line)
    return line.split()


def ngrams(words):
    return Counter(tuple(words[i:i + n]) for n in range(1, 5) for i in range(len(words) - n + 1))


def bleu(outputs, references):
    """BLEU, 0 to 100 (Papineni et al. 2002), of a list of sentences against lists of references,
    each as long. Like sacrebleu's default: 13a tokens, case kept, the brevity penalty from the
    reference of closest length, and a precision of 0 replaced by 1 / (2^k total) at the k-th such
    order."""
    correct, total = [0] * 4, [0] * 4
    length = reference_length = 0
    for output, *others in zip(outputs, *references, strict=True):
        words, *others = map(tokenize_13a, (output, *others))
        length += len(words)
        reference_length += min(map(len, others), key=lambda n: (abs(n - len(words)), n))
        known = Counter()
        for other in others:
            known |= ngrams(other)
        for ngram, count in ngrams(words).items():
            total[len(ngram) - 1] += count
            correct[len(ngram) - 1] += min(count, known[ngram])
    if not any(correct) or not all(total):
        return 0.0
    zeros, log_precision = 0, 0.0
    for c, n in zip(correct, total):
        if c == 0:
            zeros += 1
            c = 1 / 2 ** zeros
        log_precision += math.log(c / n) / 4
    return 100 * math.exp(log_precision + min(0, 1 - reference_length / length))
