"""
Everything between a file and a tensor: GLUE and other tasks (glue.py), instructions (instruct.py),
style transfer (style.py), downloads (download.py), batches (batching.py), scores (metrics.py).
"""

import contextlib
import fcntl
import json
import os
from pathlib import Path

import numpy as np


class InputError(ValueError):
    """Bad input from outside: a file, a folder, a flag. One line says what was found, what was
    expected and what to do."""


def need(ok, name, found, expected):
    if not ok:
        raise InputError(f"{name} is {found}, expected {expected}")


@contextlib.contextmanager
def locked(folder, wait=True):
    """Locks a folder against other processes that call this. BlockingIOError: it is locked, and
    `wait` is False."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(handle)


def sync(path):
    """Waits until a file, or a folder's list of its files, is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def read_text(file, hint=""):
    """A text file, without a byte order mark and with its own line ends. hint: added to the error
    if it is not found."""
    try:
        text = Path(file).read_bytes().decode().removeprefix("\ufeff")
    except FileNotFoundError:
        raise InputError(f"{file}: not found{hint}") from None
    except UnicodeDecodeError as e:
        raise InputError(f"{file}: byte {e.start} is not UTF-8; save the file as UTF-8") from None
    except OSError as e:
        raise InputError(f"{file}: cannot be read ({e.strerror})") from None
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise InputError(f"{file}: line {line} holds a NUL byte: it is damaged, or not text")
    return text


def read_json(file: str | Path, hint: str = "") -> dict:
    """The object in a JSON file. InputError: there is none; `hint` is added if the file is not
    found."""
    text = read_text(file, hint)
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as e:
        raise InputError(f"{file}: cannot be read as JSON ({e})") from None
    if not isinstance(value, dict):
        raise InputError(f"{file}: holds a {type(value).__name__}, expected a JSON object")
    return value


def draw_rows(n, count):
    """Splits the numbers 0 to n - 1 into those to keep and `count` random ones to hold out, the
    same every time; each part in order."""
    order = np.random.default_rng(0).permutation(n)
    return sorted(order[count:].tolist()), sorted(order[:count].tolist())
