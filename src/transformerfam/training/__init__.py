"""Teaching a converted model to use its feedback memory (section 3.1, B.2)."""
