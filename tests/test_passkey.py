"""The feedback memory learns: a toy model carries a key over blocks that no window spans.

A decoder of three layers, 128 wide, from scratch. A marker, four digits, random filler over 2 to 6
blocks of 32, then a query marker; memory segments 0, so FAM is the only way from the key to the
answer. The digits' accuracy at chance is 0.1.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from transformerfam import FamConfig, convert

B, DIGITS = 32, 4
MARKER, QUERY, FILLER = 10, 11, 12  # ids below are the digits
VOCABULARY = 64


def passkeys(rows: int, blocks: int, generator: torch.Generator) -> Tensor:
    """(rows, blocks * B): marker and key first, then filler, at the end the query and the key."""
    text = torch.randint(FILLER, VOCABULARY, (rows, blocks * B), generator=generator)
    keys = torch.randint(10, (rows, DIGITS), generator=generator)
    text[:, 0], text[:, 1 : 1 + DIGITS] = MARKER, keys
    text[:, -1 - DIGITS], text[:, -DIGITS:] = QUERY, keys
    return text


def toy(config: FamConfig) -> PreTrainedModel:
    torch.manual_seed(0)
    shape = LlamaConfig(
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=3,
        num_attention_heads=4,
        vocab_size=VOCABULARY,
        max_position_embeddings=B,
    )
    return convert(LlamaForCausalLM(shape), config)


def answers(model: PreTrainedModel, text: Tensor) -> Tensor:
    """(rows, DIGITS, vocabulary): what is said where each digit of the key is due."""
    return model(text, use_cache=False, logits_to_keep=DIGITS + 1).logits[:, :-1]


def train(model: PreTrainedModel, steps: int) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    generator = torch.Generator().manual_seed(1)
    model.train()
    for _ in range(steps):
        blocks = int(torch.randint(2, 7, (), generator=generator))
        text = passkeys(32, blocks, generator)
        said = answers(model, text).flatten(0, 1)
        loss = torch.nn.functional.cross_entropy(said, text[:, -DIGITS:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    model.eval()


@torch.no_grad()
def accuracy(model: PreTrainedModel, blocks: int, rows: int = 64) -> float:
    text = passkeys(rows, blocks, torch.Generator().manual_seed(2))
    return float((answers(model, text).argmax(-1) == text[:, -DIGITS:]).float().mean())


@pytest.mark.slow
def test_feedback_carries_a_key_over_blocks_and_windows_do_not() -> None:
    with_fam = toy(FamConfig(block_size=B, memory_segments=0, fam_length=8))
    train(with_fam, 300)
    found = {blocks: accuracy(with_fam, blocks) for blocks in (2, 4, 6, 12, 24)}
    print("FAM:", found)
    assert found[4] >= 0.95, found

    without = toy(FamConfig(block_size=B, memory_segments=0, fam_length=0))
    train(without, 100)
    blind = accuracy(without, 4)
    print("windows alone:", blind)
    assert blind < 0.2
