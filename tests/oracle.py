"""The slow, plain definition of TransformerFAM (arXiv 2404.09173, algorithm 2 and appendix B).

Everything else is tested against this file, which is meant to be held against the paper: python
loops over blocks, layers and queries, one row, block after block. It shares with the package
only `FamConfig` (a record of settings, none of its derived geometry) and with transformers only a
Llama model's own modules. It knows no cache, no mask tensor, no batch: every token's keys and
values of every layer are kept for ever and unrotated, and a query reads an explicit list of keys.

A position *in the stream* (`t`, `s`) counts tokens from 0 and decides what is seen. A *rotary
position* is `start` plus that, and decides only how query and key are rotated. Block τ holds the
positions in the stream τB .. τB+B-1.

Where the paper is silent or divided, this file decides:

- In block 0 the block queries see no FAM, at any layer. Appendix B.1 and B.2.1 can be read
  otherwise (FAM keys at positions -N .. -1), but the FAM input of layer l > 0 in block 0 has read
  all of block 0 in layer l-1, so the tokens of block 0 would see their own future.
- The FAM queries of block 0 do see their own FAM input as keys, at the positions that an F_{-1}
  would have. They are the same in every layer of block 0.
- The first update means block 0, in every layer: `first_residual` holds for all of them. With
  `prompt`, layer l adds its own FAM input, which is the prompt only in layer 0.
- The bias on the scores of FAM is for tokens that look at FAM, not for FAM that looks at itself.
- A stream that begins with the FAM of another has no first update: its block 0 sees that FAM, at
  positions -N .. -1, and updates it with the residual copy.
- A prefix is an F_{-1} as if another stream had left it. With `fam_query="static"` the queries of all
  blocks come from the layer's FAM input of block 0 (the prompt as it rose, or the prefix), at the
  positions that the queries of that block have anyway, and no update adds a residual, the first
  neither.
- FAM queries never see sinks, globals, memory segments or older FAMs, and see the whole block even
  if the window of the tokens is shorter than a block.
- `feedback_norm` is applied once to each F that is made, before the layer above (in block 0), the
  next block and the caller see it. The prompt itself is left as it is. The root mean square that
  is compared with a cap and the one divided by are the same, sqrt(mean(F²) + 1e-6).
- A sink or global in the query's own block is no past: `stop_gradient` cuts only what lies in an
  earlier block than the query, by whatever path it is seen.
- Global tokens stand at their true positions, however far behind the query.
- With `fam_position="zero"` FAM keys and queries stand at rotary position 0 whatever `start` is.
- Feedback memory segments (`memory_source="output"`): a token of an earlier block is seen as the key
  and value of the layer's output for it, at its own position; as a sink, as those of its input.
- A compressive memory (Infini-attention) sums up every finished block, also those that the window
  still shows, from keys that are not rotated; a block reads it as it was before that block. In block
  0 the gate is shut. `stop_gradient` takes it as a constant.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaRMSNorm, LlamaRotaryEmbedding

from transformerfam.config import FamConfig

EPS = 1e-6


@dataclass(frozen=True)
class OracleResult:
    """What one stream gives.

    Attributes:
        logits: (T, vocab), the prediction after each token.
        fams: fams[τ][layer], (N, d): F of layer l after block τ, for the finished blocks.
    """

    logits: Tensor
    fams: list[list[Tensor]]


@dataclass(frozen=True)
class Key:
    """What a query can read: a key, (kv_heads, head_dim) and not rotated, its value, its place."""

    key: Tensor
    value: Tensor
    position: float
    bias: float = 0.0  # added to every score of this key


def oracle(
    model: Any,
    config: FamConfig,
    input_ids: Tensor,
    prompt: Tensor | None = None,
    start: int = 0,
    passed: list[Tensor] | None = None,
    fam_model: Any = None,
    asked: Collection[int] = (),
) -> OracleResult:
    """Read one stream from its beginning.

    Args:
        model: a transformers `LlamaForCausalLM`, plain, of any dtype. See `make_exact`. With a
            compressive memory its decoder has `memory_gates`, whose weight is β, (layers, heads).
        config: the TransformerFAM to compute; `backend` is of no account.
        input_ids: (T,), T at least 1 and not necessarily whole blocks.
        prompt: (N, d), in the scale of the token embeddings; None exactly if `fam_length` is 0. With
            `fam_start="prefix"` (layers · N, d): F_{-1} of the bottom layer first.
        start: rotary position of the first token, a multiple of the block size.
        passed: (N, d) of each layer, F_{-1} that another stream left (random state passing).
        fam_model: a model like `model` whose layers FAM goes through; None: `model` itself.
        asked: positions in the stream of the tokens that see FAM under `fam_seen="asked"`.

    Returns:
        The logits and every F, differentiable in the weights and the prompt.

    Raises:
        ValueError: if the arguments do not fit each other.
    """
    B, N = config.block_size, config.fam_length
    _check(model, config, input_ids, prompt, start)
    decoder = model.model
    fam_layers = (fam_model or model).model.layers
    tokens: list[list[Key]] = [[] for _ in decoder.layers]  # tokens[layer][s], s in the stream
    fams: dict[int, list[Tensor]] = {}  # fams[τ][layer]
    if passed is not None:
        fams[-1] = passed
    elif config.fam_start == "prefix" and prompt is not None:
        fams[-1] = list(prompt.split(N))
    inputs = list(fams.get(-1, []))  # inputs[layer]: the FAM input of block 0
    outputs: list[list[Key]] = [[] for _ in decoder.layers]  # as tokens, of what the layer made
    sums = [CompressiveMemory(config, layer.self_attn.head_dim) for layer in decoder.layers]
    last_outputs = []

    for block, first in enumerate(range(0, len(input_ids), B)):
        hidden = decoder.embed_tokens(input_ids[first : first + B])  # (B or fewer, d)
        block_is_finished = len(hidden) == B
        made: list[Tensor] = []  # F of each layer after this block

        for depth, layer in enumerate(decoder.layers):
            queries, keys, values = project(layer, hidden)
            for i in range(len(hidden)):
                tokens[depth].append(Key(keys[i], values[i], start + first + i))

            attention = []
            for i, t in enumerate(range(first, first + len(hidden))):
                seen = list(tokens_seen(config, tokens[depth], outputs[depth], t))
                for past in range(block - config.previous_fams, block):
                    if past in fams and (config.fam_seen == "always" or t in asked):
                        through = model, config, fam_layers[depth]
                        keys_of = fam_keys(*through, fams[past][depth], past, start)
                        seen += [replace(key, bias=config.fam_bias) for key in keys_of]
                attended = attend(model, layer, queries[i], start + t, seen)
                if config.compressive_memory != "none" and block > 0:
                    gate = (
                        decoder.memory_gates.weight[depth]
                        .sigmoid()
                        .repeat_interleave(layer.self_attn.head_dim)
                    )
                    attended = gate * sums[depth].read(queries[i]) + (1 - gate) * attended
                attention.append(attended)
            output = feed_forward(layer, layer.self_attn.o_proj(torch.stack(attention)) + hidden)

            _, output_keys, output_values = project(layer, output)
            for i in range(len(hidden)):
                outputs[depth].append(Key(output_keys[i], output_values[i], start + first + i))
            if block_is_finished and config.compressive_memory != "none":
                sums[depth].write(keys, values)

            if N > 0 and block_is_finished:
                is_first = block - 1 not in fams
                if not is_first:
                    before = fams[block - 1][depth]
                elif depth > 0:
                    before = made[depth - 1]
                else:
                    assert prompt is not None
                    before = prompt
                if is_first:
                    inputs.append(before)
                own_block = tokens[depth][first : first + B]
                asks = inputs[depth] if config.fam_query == "static" else before
                copied: Tensor | None = before
                if config.fam_query == "static" or (is_first and config.first_residual == "zero"):
                    copied = None
                through = model, config, fam_layers[depth]
                made.append(update_fam(*through, before, asks, copied, own_block, block, start))
            hidden = output

        if N > 0 and block_is_finished:
            fams[block] = made
        last_outputs.append(hidden)

    logits = model.lm_head(decoder.norm(torch.cat(last_outputs)))
    return OracleResult(logits, [fams[block] for block in sorted(fams) if block >= 0])


# ---- the feedback memory


def update_fam(
    model: Any,
    config: FamConfig,
    layer: Any,
    before: Tensor,
    asks: Tensor,
    copied: Tensor | None,
    own_block: list[Key],
    block: int,
    start: int,
) -> Tensor:
    """F_τ (N, d) of one layer from F_{τ-1}, or the FAM input of block 0, and the keys of block τ.

    `asks` is what the queries come from, and `copied` the residual, if there is one.
    """
    queries, _, _ = project(layer, asks)
    seen = fam_keys(model, config, layer, before, block - 1, start) + own_block
    stands_as = block if config.fam_query_position == "block_end" else block - 1
    places = fam_positions(config, stands_as, start)
    attention = torch.stack(
        [attend(model, layer, queries[i], places[i], seen) for i in range(config.fam_length)]
    )
    attended = layer.self_attn.o_proj(attention)
    if copied is not None:
        attended = attended + copied
    return bounded(config, feed_forward(layer, attended))


def fam_keys(
    model: Any, config: FamConfig, layer: Any, fam: Tensor, block: int, start: int
) -> list[Key]:
    """Kf and Vf of F_τ, where τ is `block`; -1 for the FAM input of block 0."""
    _, keys, values = project(layer, fam)
    places = fam_positions(config, block, start)
    return [Key(keys[i], values[i], places[i]) for i in range(config.fam_length)]


def fam_positions(config: FamConfig, block: int, start: int) -> list[float]:
    """Rotary positions of the N rows of F_τ, where τ is `block` (B.2.1)."""
    N = config.fam_length
    next_block = start + (block + 1) * config.block_size
    if config.fam_position == "last":
        return [next_block - N + i for i in range(N)]
    if config.fam_position == "float":
        return [next_block - 1 + (i + 1) / (N + 1) for i in range(N)]
    return [0.0] * N


def bounded(config: FamConfig, fam: Tensor) -> Tensor:
    """`feedback_norm` applied to F, (N, d), row by row."""
    norm = config.feedback_norm
    if norm == "none":
        return fam
    rows = []
    for i, row in enumerate(fam):
        rms = (row.pow(2).mean() + EPS).sqrt()
        if norm == "rms":
            rows.append(row / rms * config.feedback_rms)
        else:
            cap = norm[i] if isinstance(norm, tuple) else float(norm)
            rows.append(row * (cap / rms) if rms > cap else row)
    return torch.stack(rows)


# ---- which tokens a token sees


def tokens_seen(config: FamConfig, tokens: list[Key], outputs: list[Key], t: int) -> Iterator[Key]:
    """The tokens, of those up to now, that the query at `t` sees, at the places it sees them."""
    B = config.block_size
    for s, token in enumerate(tokens):
        if window_shows(config, t, s):
            if config.memory_source == "output" and s // B < t // B:
                token = outputs[s]
            position = token.position
        elif s < config.sink_tokens and s <= t:
            position = tokens[t // B * B].position - kept_past(config) - config.sink_tokens + s
        else:
            continue
        if config.stop_gradient and s // B < t // B:
            yield Key(token.key.detach(), token.value.detach(), position)
        else:
            yield Key(token.key, token.value, position)


def window_shows(config: FamConfig, t: int, s: int) -> bool:
    """Whether the attention pattern, without sinks, lets the query at `t` see the token at `s`."""
    if s > t:
        return False
    if config.attention == "full":
        return True
    block, of_key = t // config.block_size, s // config.block_size
    in_kept_blocks = of_key >= block - config.memory_segments
    if config.attention == "bigbird":
        return in_kept_blocks or of_key == 0 or of_key in drawn_blocks(config, block)
    if config.attention == "sparse":
        return in_kept_blocks or s % config.block_size >= config.block_size - config.summary_tokens
    in_window = s > t - window_of(config)
    if config.attention == "bswa":
        return in_kept_blocks
    if config.attention == "xl":
        return in_kept_blocks and in_window
    if config.attention == "longformer":
        return in_window or t in config.global_positions or s in config.global_positions
    return in_window


def drawn_blocks(config: FamConfig, block: int) -> set[int]:
    """R(τ) of BigBird: r of the blocks between the first and the window, by Floyd's algorithm."""
    r, candidates = config.random_blocks, block - config.memory_segments - 1
    if candidates <= r:
        return set(range(1, candidates + 1))
    drawn: set[int] = set()
    for i, last in enumerate(range(candidates - r + 1, candidates + 1)):
        draw = 1 + scattered(block * r + i) % last
        drawn.add(last if draw in drawn else draw)
    return drawn


def scattered(x: int) -> int:
    """h(x): three rounds of adding a key and taking the fifth power, modulo 2³¹ - 1."""
    for key in (1_202_590_843, 715_225_739, 1_884_310_127):
        x = pow(x + key, 5, 2**31 - 1)
    return x


def window_of(config: FamConfig) -> int:
    """w, in tokens, the query among them."""
    if config.window is not None:
        return config.window
    return config.memory_segments * config.block_size


def kept_past(config: FamConfig) -> int:
    """P, in tokens and whole blocks: how far before its block a query sees without sinks."""
    if config.attention == "swa":
        return math.ceil((window_of(config) - 1) / config.block_size) * config.block_size
    return config.memory_segments * config.block_size  # bswa, xl; the others have no sinks


# ---- a compressive memory (Infini-attention, arXiv 2404.07143)


class CompressiveMemory:
    """M (D, Dv) and z (D,) of each key-value head of one layer; nothing before the first write."""

    def __init__(self, config: FamConfig, head_dim: int) -> None:
        self.config = config
        self.head_dim = head_dim
        self.M: list[Tensor] = []
        self.z: list[Tensor] = []

    def read(self, query: Tensor) -> Tensor:
        """A_mem (equation 3) of one query, (heads, head_dim): (heads * head_dim,)."""
        group = len(query) // len(self.M)
        found = []
        for head, q in enumerate(query):
            M, z = self.M[head // group], self.z[head // group]
            if self.config.stop_gradient:
                M, z = M.detach(), z.detach()
            found.append((sigma(q) @ M) / (sigma(q) @ z))
        return torch.cat(found)

    def write(self, keys: Tensor, values: Tensor) -> None:
        """Add a block, (B, kv_heads, head_dim) each (equations 4 and 5)."""
        heads = range(keys.shape[1])
        old_M, old_z = list(self.M), list(self.z)
        if not self.M:
            self.M = [keys.new_zeros(self.head_dim, self.head_dim) for _ in heads]
            self.z = [keys.new_zeros(self.head_dim) for _ in heads]
        for head in heads:
            for key, value in zip(keys[:, head], values[:, head], strict=True):
                if self.config.compressive_memory == "delta" and old_M:
                    known = (sigma(key) @ old_M[head]) / (sigma(key) @ old_z[head])
                    value = value - known
                self.M[head] = self.M[head] + torch.outer(sigma(key), value)
                self.z[head] = self.z[head] + sigma(key)


def sigma(x: Tensor) -> Tensor:
    """ELU(x) + 1, number by number."""
    return torch.stack([v + 1 if v > 0 else v.exp() for v in x])


# ---- the decoder layer's parts


def project(layer: Any, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """QKV(PreLN(hidden)), unrotated: (rows, heads, head_dim), twice (rows, kv_heads, head_dim)."""
    normed = layer.input_layernorm(hidden)
    attention = layer.self_attn

    def heads(projected: Tensor) -> Tensor:
        return projected.reshape(len(hidden), -1, attention.head_dim)

    return (
        heads(attention.q_proj(normed)),
        heads(attention.k_proj(normed)),
        heads(attention.v_proj(normed)),
    )


def feed_forward(layer: Any, attended: Tensor) -> Tensor:
    """FF(PreLN(A)) + A."""
    fed: Tensor = layer.mlp(layer.post_attention_layernorm(attended))
    return fed + attended


def attend(model: Any, layer: Any, query: Tensor, position: float, seen: list[Key]) -> Tensor:
    """Attention of one query, (heads, head_dim), over the keys seen: (heads * head_dim,)."""
    places = [key.position for key in seen]
    q = rotate(model, query[None], [position])[0]  # (heads, head_dim), float64
    k = rotate(model, torch.stack([key.key for key in seen]), places)  # (keys, kv_heads, head_dim)
    v = torch.stack([key.value for key in seen]).double()
    group = q.shape[0] // k.shape[1]  # so many query heads, one after another, share a key head
    k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    scores = torch.einsum("hd,khd->hk", q, k) * layer.self_attn.scaling
    scores = scores + torch.tensor([key.bias for key in seen], dtype=scores.dtype)
    return torch.einsum("hk,khd->hd", scores.softmax(-1), v).flatten().to(query.dtype)


def rotate(model: Any, x: Tensor, positions: list[float]) -> Tensor:
    """Rotary embedding of (rows, heads, head_dim) at one position per row, in float64.

    Half-split layout: dimension j of the first half turns with dimension j of the second.
    """
    rotary = model.model.rotary_emb
    places = torch.tensor(positions, dtype=torch.float64, device=x.device)
    angle = places[:, None, None] * rotary.inv_freq.double()  # (rows, 1, head_dim / 2)
    cos = angle.cos() * rotary.attention_scaling
    sin = angle.sin() * rotary.attention_scaling
    a, b = x.double().chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


# ---- float64 throughout


class ExactRMSNorm(LlamaRMSNorm):
    """LlamaRMSNorm in the dtype of its input, where transformers' goes through float32."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(..., d) to (..., d)."""
        mean_square = hidden_states.pow(2).mean(-1, keepdim=True)
        return self.weight * hidden_states * torch.rsqrt(mean_square + self.variance_epsilon)


class ExactRotary(LlamaRotaryEmbedding):
    """Cosines and sines in float64, where transformers' are float32; the oracle needs none."""

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Positions (..., T) to cosines and sines (..., T, head_dim)."""
        angle = position_ids[..., None].double() * self.inv_freq.double()
        angle = torch.cat((angle, angle), dim=-1)
        return angle.cos() * self.attention_scaling, angle.sin() * self.attention_scaling


def make_exact(model: Any) -> Any:
    """The model in float64 in place, norms and rotary too: for tolerances below about 1e-6.

    transformers' eager attention takes its softmax in float32 all the same; sdpa does not.
    """
    for module in model.modules():
        if type(module) is LlamaRMSNorm:
            module.__class__ = ExactRMSNorm
        elif type(module) is LlamaRotaryEmbedding:
            module.__class__ = ExactRotary
    return model.double()


def _check(
    model: Any, config: FamConfig, input_ids: Tensor, prompt: Tensor | None, start: int
) -> None:
    if input_ids.dim() != 1 or len(input_ids) == 0:
        raise ValueError("The oracle reads one row: input_ids must be (T,) with T at least 1.")
    if start % config.block_size:
        raise ValueError("start must be a multiple of block_size.")
    if (prompt is None) != (config.fam_length == 0):
        raise ValueError("A prompt is needed exactly if fam_length is above 0.")
    starts = model.config.num_hidden_layers if config.fam_start == "prefix" else 1
    wanted = (config.fam_length * starts, model.config.hidden_size)
    if prompt is not None and tuple(prompt.shape) != wanted:
        raise ValueError(f"The prompt must be {wanted}, not {tuple(prompt.shape)}.")
