"""The paper's tables and figures (experiments.py), known ranks (recover.py), speed and memory (bench.py, peers.py)."""
