"""What train_glue.py and train_instruct.py share: flags.py, the loop (loop.py), the folders of runs (runs.py)."""
