"""
GLUE's scores in float64, equal to scikit-learn's and SciPy's to rounding.

Where a score is 0/0 they warn and return 0 or nan. Here it is 0, "no relation found": Matthews correlation when only one class is
predicted or present, F1 without a true positive, a correlation with a constant.
"""

import numpy as np


def accuracy(label, prediction):
    return float(np.mean(np.asarray(label) == np.asarray(prediction)))


def f1(label, prediction):
    """Of class 1, in a two-class task."""
    label, prediction = np.asarray(label) == 1, np.asarray(prediction) == 1
    denominator = label.sum() + prediction.sum()
    return float(2 * (label & prediction).sum() / denominator) if denominator else 0.0


def matthews_correlation(label, prediction):
    """Any number of classes (Gorodkin's R_K, which for two classes is Matthews' phi)."""
    classes, both = np.unique(np.concatenate([label, prediction]), return_inverse=True)
    label, prediction = both[:len(label)], both[len(label):]
    n = len(label)
    true, guessed = np.bincount(label, minlength=len(classes)), np.bincount(prediction, minlength=len(classes))
    # Python integers: products of counts outgrow neither int64 nor float64's 53 bits
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
