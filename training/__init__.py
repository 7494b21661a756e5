"""What both scripts share: flags, the loop of a run, the folders of runs, a model's outputs."""
