"""Linear attention from scratch at toy size: a state of fixed size without a FAM, to be held against it.

The layers are those of the gated delta rule (Gated DeltaNet, arXiv 2412.06464), as transformers has
them in Qwen3.5. Each head keeps a matrix S, (Dk, Dv), and for each token, with a decay α and a rate β
of their own,

    S_t = α_t (I - β_t k_t k_tᵀ) S_{t-1} + β_t k_t v_tᵀ        o_t = S_tᵀ q_t

Knows nothing of TransformerFAM: it is trained by a plain loop on the same texts, with the same
optimizer and rate as the variants of an experiment.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from transformerfam.embedded import quiet
from transformerfam.reproduction import toy
from transformerfam.reproduction.experiment import Shape
from transformerfam.reproduction.runs import Run
from transformerfam.training.optimizers import make_optimizer, rate_at
from transformerfam.training.settings import OptimizerSettings

_HEADS = 4
_SHORTEST, _LONGEST = 1e-3, 1e-1  # time steps at the start, as the authors' code draws them
_CHUNK_TOKENS = 1 << 14  # of all rows together


def linear_model(shape: Shape, seed: int) -> Any:
    """A causal language model whose layers are all linear attention, with random weights.

    Width, layers, heads and feed-forward are those of the toy Llama; 7 % more parameters at width 64.

    transformers starts every time step at softplus(1), with which a head forgets all within a few
    tokens and learns nothing here; they start as in the authors' code, log-uniform.
    """
    from transformers import Qwen3_5ForCausalLM, Qwen3_5TextConfig

    torch.manual_seed(seed)
    head = shape.width // _HEADS
    config = Qwen3_5TextConfig(
        hidden_size=shape.width,
        intermediate_size=4 * shape.width,
        num_hidden_layers=shape.layers,
        layer_types=["linear_attention"] * shape.layers,
        linear_num_key_heads=_HEADS,
        linear_num_value_heads=_HEADS,
        linear_key_head_dim=head,
        linear_value_head_dim=head,
        num_attention_heads=_HEADS,
        num_key_value_heads=_HEADS,
        head_dim=head,
        vocab_size=toy.VOCABULARY,
        max_position_embeddings=shape.block,
    )
    model = Qwen3_5ForCausalLM(config)
    with torch.no_grad():
        for layer in model.model.layers:
            bias = layer.linear_attn.dt_bias
            low, high = math.log(_SHORTEST), math.log(_LONGEST)
            step = torch.empty_like(bias).uniform_(low, high).exp()
            bias.copy_(step + torch.log(-torch.expm1(-step)))  # softplus of it is the step
    return model


def trained(run: Run) -> tuple[Any, list[float]]:
    """A linear model that has learned as a run says, and the loss of each step."""
    settings = OptimizerSettings(**{"beta2": 0.999, **run["optimizer"]})
    source, shape, steps = toy.sources_of(run), Shape(**run["shape"]), run["steps"]
    model = linear_model(shape, run["seed"]).train()
    optimizer = make_optimizer(model.parameters(), settings)
    losses, rows = [], shape.rows
    with quiet():  # that there are faster kernels elsewhere
        for step in range(steps):
            for group in optimizer.param_groups:
                group["lr"] = rate_at(step, settings, steps)
            texts = [source.draw(step * rows + row) for row in range(rows)]
            ids = torch.tensor([text.ids for text in texts])
            loss = _loss(model, ids, shape.digits)
            loss.backward()
            if settings.max_grad_norm:
                torch.nn.utils.clip_grad_norm_(model.parameters(), settings.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(loss.detach()))
    return model.eval(), losses


def _loss(model: Any, ids: Tensor, digits: int) -> Tensor:
    """Mean loss in nats of the digits that texts (R, T) end with."""
    logits = model(input_ids=ids, use_cache=False, logits_to_keep=digits + 1).logits[:, :-1]
    return cross_entropy(logits.flatten(0, 1), ids[:, -digits:].flatten())


def asked(model: Any, run: Run) -> Mapping[str, Mapping[str, float]]:
    """What was asked -> blocks -> share of digits said right."""
    return toy.asked(model, run, linear_logits)


@torch.no_grad()
def linear_logits(model: Any, ids: Tensor, start: int) -> Tensor:
    """(R, T - start, vocabulary): predictions after the tokens from `start` on, read in chunks."""
    state = None
    for chunk in ids[:, :start].split(max(1, _CHUNK_TOKENS // len(ids)), dim=1):
        if chunk.shape[1]:
            state = _read(model, chunk, state).past_key_values
    rest: Tensor = _read(model, ids[:, start:], state).logits
    return rest


@torch.no_grad()
def linear_state_bytes(model: Any) -> int:
    """Bytes of one stream's state: S of each head, and the last inputs of the short convolution."""
    state = _read(model, torch.zeros(1, 1, dtype=torch.long), None).past_key_values
    kept = [t for x in state.layers for t in (x.recurrent_states[0], x.conv_states[0])]
    return sum(t.nbytes for t in kept)


def _read(model: Any, ids: Tensor, state: Any) -> Any:
    """The model's output for new tokens (R, T) on a state; None: a new one."""
    with quiet():
        return model(
            input_ids=ids,
            past_key_values=state,
            use_cache=True,
            # No layer looks at masks or positions, and without attention transformers makes none.
            attention_mask={"full_attention": None, "linear_attention": None},
            position_ids=torch.zeros(1, ids.shape[1], dtype=torch.long),
        )
