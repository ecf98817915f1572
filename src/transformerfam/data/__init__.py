"""What is read in training: rows of files, made-up PassKey texts, and how a batch's rows read them.

Knows token ids and files; no model and no torch.
"""
