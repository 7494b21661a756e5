"""Everything between a file and a tensor: tasks and readers (glue.py), downloads (download.py), batches (batching.py), scores (metrics.py)."""


class InputError(ValueError):
    """Bad input from outside: a file, a folder, a flag. Its one line says what was found, what was expected and what to do."""
