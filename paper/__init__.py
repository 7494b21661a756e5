"""The paper's tables and figures, style transfer, known ranks, speed and memory."""
