"""The paper's tables and figures, made again at a size that fits the machine."""
