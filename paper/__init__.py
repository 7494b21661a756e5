"""The paper's tables and figures, known ranks, speed and memory."""
