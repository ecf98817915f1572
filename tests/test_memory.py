"""A memory is whole, of fixed size, independent of its copies, and refused where it does not fit."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from families import converted, some_tokens, tiny
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel
from variants import VARIANTS

from transformerfam import FamConfig, Memory, stream

B = 6
PAPER = VARIANTS["paper"]
SINKS = VARIANTS["sinks"]
WINDOWED = [n for n, c in VARIANTS.items() if not c.keeps_everything and c.backend != "flex"]


@torch.no_grad()
def read(
    model: PreTrainedModel, ids: Tensor, memory: Memory | None = None
) -> tuple[Tensor, Memory]:
    out = model(ids, past_key_values=memory)
    return out.logits, out.past_key_values


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=1e-9)


def contents(memory: Memory) -> dict[str, Tensor]:
    """Everything that a memory holds; what lies past the end of the block being read is nothing."""
    held = {}
    for name, tensor in memory.tensors():
        held[name] = tensor = tensor.detach().clone()
        if name.endswith((".keys", ".values")):
            for row, position in enumerate(memory.position):
                free = memory.config.block_size - position % memory.config.block_size
                tensor[row, :, tensor.shape[2] - free :] = 0
    return held


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return converted(SINKS)


# ---- size and position


@pytest.mark.parametrize("name", WINDOWED)
def test_its_bytes_follow_from_the_geometry_alone(name: str) -> None:
    config = VARIANTS[name]
    model = converted(config, num_hidden_layers=2)
    heads, features, width, layers, rows, bytes_each = 2, 8, 32, 2, 3, 8
    assert config.slots is not None
    keys_and_values = 2 * heads * config.slots * features
    anchors = heads * len(config.anchor_positions) * features
    extra = {
        "fam_input": config.fam_length * width,
        "output_keys": heads * B * features,
        "output_values": heads * B * features,
        "compressed": heads * features * (features + 1),
        "pending": heads * features * (features + 1),
    }
    numbers = keys_and_values + anchors + config.fam_length * width
    numbers += sum(extra[name] for name in config.extra_state)
    expected = rows * layers * bytes_each * numbers

    memory = Memory.for_model(model, rows)
    assert memory.nbytes == 0
    for tokens in (1, B - 1, 3 * B + 2, 1, 7 * B, 1):
        _, memory = read(model, some_tokens(rows, tokens), memory)
        assert memory.nbytes == expected


@pytest.mark.parametrize("attention", ["bswa", "full"])
def test_keys_in_half_precision_do_not_wear_off(attention: str) -> None:
    """The frame moves on with every block; what is kept must not be rounded again every time."""
    values = {"block_size": 2, "memory_segments": 1, "fam_length": 0, "attention": attention}
    config = FamConfig.from_dict({**values, "sink_tokens": 0})
    ids, found = some_tokens(1, 200), []
    for dtype in (torch.bfloat16, torch.float32):
        model, memory = converted(config, dtype=dtype, num_hidden_layers=1), None
        for piece in ids.split(2, dim=1):
            _, memory = read(model, piece, memory)
        assert memory is not None
        found.append(dict(memory.tensors())["0.keys"][:, :, :2].float())
    assert float((found[0] - found[1]).norm() / found[1].norm()) < 0.015


def test_position_counts_the_tokens_of_each_row_without_padding(model: PreTrainedModel) -> None:
    memory = Memory.for_model(model, 3)
    assert (memory.position, memory.rows, len(memory)) == ((0, 0, 0), 3, 3)
    mask = torch.ones(3, 2 * B, dtype=torch.long)
    mask[1, : B + 1] = 0  # on the left
    mask[2, 1:] = 0  # on the right
    with torch.no_grad():
        model(some_tokens(3, 2 * B), attention_mask=mask, past_key_values=memory)
        assert memory.position == (2 * B, B - 1, 1)
        model(some_tokens(3, 1), past_key_values=memory)
    assert memory.position == (2 * B + 1, B, 2)


def test_a_row_without_new_tokens_stays_where_it_is(model: PreTrainedModel) -> None:
    _, memory = read(model, some_tokens(2, B + 2))
    before = contents(memory.select_rows([1]))
    mask = torch.tensor([[1] * (2 * B), [0] * (2 * B)])
    with torch.no_grad():
        model(some_tokens(2, 2 * B), attention_mask=mask, past_key_values=memory)
    assert memory.position == (3 * B + 2, B + 2)
    after = contents(memory.select_rows([1]))
    for name in before:
        close(after[name], before[name])


# ---- copies


def test_a_fork_goes_its_own_way(model: PreTrainedModel) -> None:
    _, memory = read(model, some_tokens(2, B + 2))
    fork, before = memory.fork(), contents(memory)
    for tokens in (1, 1, 2 * B):
        read(model, some_tokens(2, tokens, seed=tokens), fork)
    assert same(contents(memory), before)
    assert memory.position == (B + 2, B + 2)

    untouched, before = memory.fork(), contents(memory)
    for tokens in (1, 1, 2 * B):
        read(model, some_tokens(2, tokens, seed=tokens), memory)
    assert same(contents(untouched), before)
    assert same(contents(fork), contents(memory))


@pytest.mark.parametrize("tokens", [1, 2 * B])
@pytest.mark.parametrize("original_first", [True, False])
def test_a_detached_memory_and_its_original_do_not_write_into_each_other(
    model: PreTrainedModel, tokens: int, original_first: bool
) -> None:
    start, one, other = some_tokens(1, B + 1), some_tokens(1, tokens, 1), some_tokens(1, tokens, 2)
    last = some_tokens(1, 1, 3)
    _, memory = read(model, start)
    _, memory = read(model, some_tokens(1, 1, 4), memory)
    start = torch.cat([start, some_tokens(1, 1, 4)], 1)
    detached = memory.detach()
    reads = [(memory, one), (detached, other)]
    for which, ids in reads if original_first else reversed(reads):
        read(model, ids, which)
    for which, ids in reads:
        logits, _ = read(model, last, which)
        expected, _ = read(model, torch.cat([start, ids, last], 1))
        close(logits, expected[:, -1:])


def test_detaching_cuts_gradients_and_keeps_values(model: PreTrainedModel) -> None:
    memory = model(some_tokens(1, 2 * B + 1)).past_key_values
    assert any(tensor.requires_grad for _, tensor in memory.tensors())
    detached = memory.detach()
    assert not any(tensor.requires_grad for _, tensor in detached.tensors())
    assert same(contents(detached), contents(memory))
    assert detached.position == memory.position


def test_rows_can_be_selected_repeated_and_put_in_another_order(model: PreTrainedModel) -> None:
    ids = some_tokens(3, 2 * B + 1)
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    with torch.no_grad():
        memory = model(ids, attention_mask=mask).past_key_values
    rows = [ids[r][mask[r].bool()] for r in range(3)]
    order = [2, 0, 1, 1]
    chosen = memory.select_rows(order)
    assert chosen.position == tuple(len(rows[r]) for r in order)
    more = some_tokens(4, B + 2, seed=1)
    logits, _ = read(model, more, chosen)
    for index, row in enumerate(order):
        alone, _ = read(model, torch.cat([rows[row], more[index]])[None])
        close(logits[index], alone[0, -more.shape[1] :])
    assert memory.position == tuple(map(len, rows))


def test_what_transformers_asks_of_a_cache_changes_rows_in_place(model: PreTrainedModel) -> None:
    _, memory = read(model, some_tokens(3, B + 1))
    memory.next_logits = torch.randn(3, 5)
    for change, order in (
        (lambda m: m.reorder_cache(torch.tensor([2, 2, 0])), [2, 2, 0]),
        (lambda m: m.batch_select_indices(torch.tensor([1])), [1]),
        (lambda m: m.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]),
    ):
        expected, changed = memory.select_rows(order), memory.fork()
        change(changed)
        assert same(contents(changed), contents(expected))
        assert changed.position == expected.position
        assert changed.rows == changed.batch_size == changed.max_batch_size == len(order)


def test_copies_by_python_itself(model: PreTrainedModel) -> None:
    _, memory = read(model, some_tokens(2, B + 1))
    _, memory = read(model, some_tokens(2, 1), memory)
    copies = (copy.copy(memory), copy.deepcopy(memory), pickle.loads(pickle.dumps(memory)))
    for twin in (*copies, memory.to("cpu")):
        assert same(contents(twin), contents(memory))
        assert (twin.position, twin.config) == (memory.position, memory.config)
        before = contents(memory)
        read(model, some_tokens(2, 1, seed=5), twin)
        assert same(contents(memory), before)


def test_another_device(model: PreTrainedModel) -> None:
    _, memory = read(model, some_tokens(1, B + 1))
    there = memory.to("meta")
    assert {tensor.device.type for _, tensor in there.tensors()} == {"meta"}
    assert there.nbytes == memory.nbytes
    with pytest.raises(ValueError, match="device"), torch.no_grad():
        model(some_tokens(1, 1), past_key_values=there)


# ---- a call that fails


@contextmanager
def failing(module: nn.Module, error: BaseException, calls: int) -> Iterator[None]:
    """`module` raises `error` when it is called for the `calls`-th time."""
    left = calls

    def strike(*_: object) -> None:
        nonlocal left
        left -= 1
        if not left:
            raise error

    hook = module.register_forward_pre_hook(strike)
    try:
        yield
        assert left <= 0, "the module was not called so often"
    finally:
        hook.remove()


@pytest.mark.parametrize("error", [RuntimeError("out of memory"), KeyboardInterrupt()])
@pytest.mark.parametrize("name", ["sinks", "bswa", "full", "longformer", "swa with sinks"])
@pytest.mark.parametrize("before", [0, 2, 2 * B])
def test_a_failed_call_leaves_the_memory_as_it_was(
    name: str, before: int, error: BaseException
) -> None:
    model = converted(VARIANTS[name])
    ids = some_tokens(2, before + 3 * B)
    memory = Memory.for_model(model, 2)
    for position in range(before):
        read(model, ids[:, position : position + 1], memory)
    memory.next_logits = torch.ones(2, 3)
    held, fams = contents(memory), VARIANTS[name].has_feedback
    last = model.model.layers[-1].mlp
    for tokens, module, calls in (
        (1, last, 1),
        (B, last, 1),
        (2 * B + 1, last, 2 if fams else 1),
        (1, model.lm_head, 1),
        (2 * B, model.lm_head, 1),
    ):
        with pytest.raises(type(error)), failing(module, error, calls):
            # Not the tokens that come later: these leave a trace if anything was kept.
            read(model, some_tokens(2, tokens, seed=tokens), memory)
        assert memory.position == (before, before)
        assert same(contents(memory), held)
    expected, _ = read(model, ids)
    logits, _ = read(model, ids[:, before:], memory)
    close(logits, expected[:, before:])


def test_labels_that_do_not_fit_leave_the_memory_as_it_was(model: PreTrainedModel) -> None:
    _, memory = read(model, some_tokens(1, 3))
    held = contents(memory)
    with pytest.raises(ValueError), torch.no_grad():
        model(some_tokens(1, 8), labels=some_tokens(1, 5), past_key_values=memory)
    assert memory.position == (3,)
    assert same(contents(memory), held)


# ---- the next prediction


def test_a_kept_prediction_follows_its_row_and_ends_with_the_next_token(
    model: PreTrainedModel,
) -> None:
    _, memory = read(model, some_tokens(2, 3))
    assert memory.next_logits is None
    memory.next_logits = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    for twin in (memory.fork(), memory.detach(), memory.to("cpu")):
        assert twin.next_logits is not None
        assert torch.equal(twin.next_logits, memory.next_logits)
    chosen = memory.select_rows([1]).next_logits
    assert chosen is not None and chosen.tolist() == [[3.0, 4.0]]
    assert memory.nbytes == sum(t.nbytes for _, t in memory.tensors())
    read(model, some_tokens(2, 1), memory)
    assert memory.next_logits is None


# ---- inference mode


@pytest.mark.parametrize("family", ["Llama", "StableLM", "GPT-NeoX", "OLMo 2", "Starcoder 2"])
@pytest.mark.parametrize("tokens", [3, B + 2, 2 * B])
def test_a_memory_made_in_inference_mode_can_be_trained_on(family: str, tokens: int) -> None:
    model = converted(SINKS, family, torch.float32)
    ids = some_tokens(1, tokens + 2 * B)
    with torch.inference_mode():
        memory = model(ids[:, :tokens]).past_key_values
    expected, _ = read(model, ids)
    for piece in (ids[:, tokens : tokens + 2], ids[:, tokens + 2 :]):
        out = model(piece, past_key_values=memory)
        out.logits.sum().backward()
        memory = memory.detach()
        end = memory.position[0]
        torch.testing.assert_close(
            out.logits.detach(), expected[:, end - piece.shape[1] : end], rtol=0, atol=1e-4
        )


def test_modes_can_take_turns(model: PreTrainedModel) -> None:
    ids = some_tokens(1, 4 * B)
    expected, _ = read(model, ids)
    memory, start = Memory.for_model(model), 0
    for turn, tokens in enumerate((3, 1, 1, 1, 1, 2, 5, 1, 1, B)):
        mode = (torch.inference_mode, torch.no_grad, torch.enable_grad)[turn % 3]
        with mode():
            logits = model(ids[:, start : start + tokens], past_key_values=memory).logits
        close(logits.detach(), expected[:, start : start + tokens])
        start += tokens


# ---- what is refused


def test_a_memory_of_another_geometry_is_refused_by_the_name_of_the_field() -> None:
    model = converted(PAPER)
    for field, value in (("block_size", 7), ("sink_tokens", 1), ("feedback_norm", "rms")):
        memory = Memory(PAPER.replace(**{field: value}), 1, 3)
        with pytest.raises(ValueError, match=field):
            model(some_tokens(1, 2), past_key_values=memory)
        assert memory.position == (0,)


def test_backend_and_stopped_gradients_are_no_part_of_the_geometry() -> None:
    model = converted(PAPER)
    memory = Memory(PAPER.replace(backend="eager", stop_gradient=True), 1, 3)
    read(model, some_tokens(1, B + 1), memory)
    assert memory.position == (B + 1,)


@pytest.mark.parametrize(
    ("rows", "layers", "message"),
    [
        (2, 3, "2 streams and the input has 1 row"),
        (1, 2, "layers"),
        (1, 5, "layers"),
        (1, 1, "layers"),
    ],
)
def test_another_number_of_rows_or_layers_is_refused(
    model: PreTrainedModel, rows: int, layers: int, message: str
) -> None:
    memory = Memory(SINKS, rows, layers)
    with pytest.raises(ValueError, match=message):
        model(some_tokens(1, 2), past_key_values=memory)


@pytest.mark.parametrize(
    "maker",
    [{"dtype": torch.float32}, {"hidden_size": 16}, {"head_dim": 4}, {"num_key_value_heads": 4}],
)
def test_a_memory_of_another_shape_or_type_is_refused(
    model: PreTrainedModel, maker: dict[str, object]
) -> None:
    _, memory = read(converted(SINKS, **maker), some_tokens(1, 3))  # type: ignore[arg-type]
    before = contents(memory)
    for tokens in (1, 2 * B):
        with pytest.raises(ValueError, match="memory was made by a model of another"):
            read(model, some_tokens(1, tokens), memory)
    assert same(contents(memory), before)


def test_other_caches_are_refused(model: PreTrainedModel) -> None:
    for cache in (DynamicCache(), [(torch.zeros(1), torch.zeros(1))], "memory"):
        with pytest.raises(ValueError, match=r"reads with a transformerfam\.Memory, not a"):
            model(some_tokens(1, 2), past_key_values=cache)


def test_a_plain_model_cannot_use_a_memory() -> None:
    with pytest.raises(RuntimeError, match="this model was not converted"):
        tiny()(some_tokens(1, 2), past_key_values=Memory(PAPER, 1, 3))
    with pytest.raises(ValueError, match="not a TransformerFAM; convert it first"):
        Memory.for_model(tiny())


def test_a_memory_needs_rows_and_layers_and_cannot_unread(model: PreTrainedModel) -> None:
    for rows, layers in ((0, 3), (1, 0)):
        with pytest.raises(ValueError, match="at least one row and one layer"):
            Memory(FamConfig.paper(), rows, layers)
    _, memory = read(model, some_tokens(1, 3))
    memory.crop(0)
    with pytest.raises(ValueError, match=r"cannot unread tokens; keep a memory.fork\(\)"):
        memory.crop(1)


def test_of_a_row_that_begins_anew_nothing_is_foretold(model: PreTrainedModel) -> None:
    memory = Memory.for_model(model)
    list(stream.read(model, [3, 4, 5], memory))
    again = memory.restart([True])
    (chunk,) = stream.read(model, [5, 6, 7], again)
    assert chunk.scored == 2  # the first token is given
    assert memory.position == (3,)
    with pytest.raises(ValueError, match="a mark for each of 1 rows, not 2"):
        memory.restart([True, False])


@torch.no_grad()
def test_a_memory_that_was_passed_can_begin_anew_before_it_has_read(
    model: PreTrainedModel,
) -> None:
    ids = some_tokens(2, 2 * B + 1)
    _, other = read(model, some_tokens(1, 2 * B))
    passed = Memory.for_model(model, 2)
    passed.begin_with([fam for fam in other.fams if fam is not None])
    anew, alone = passed.restart([True, True]), passed.restart([True, False])
    assert anew.passed == (False, False) and anew.passed_fams is None
    assert torch.equal(read(model, ids, anew)[0], read(model, ids)[0])
    said, both = read(model, ids, alone)[0], read(model, ids, passed.restart([False, False]))[0]
    close(said[:1], read(model, ids[:1])[0])
    close(said[1:], both[1:])


@torch.no_grad()
def test_beside_a_row_that_was_passed_something_another_begins_with_the_prefix() -> None:
    model = converted(VARIANTS["prefix"])
    ids = some_tokens(2, 2 * B + 1)
    _, other = read(model, some_tokens(1, 2 * B))
    passed = Memory.for_model(model, 2)
    passed.begin_with([fam for fam in other.fams if fam is not None])
    both = read(model, ids, passed.fork())[0]
    said = read(model, ids, passed.restart([True, False]))[0]
    close(said[:1], read(model, ids[:1])[0])
    close(said[1:], both[1:])


def test_rows_are_taken_by_number_not_by_marks(model: PreTrainedModel) -> None:
    memory = Memory.for_model(model, 2)
    for marks in ([False, True], torch.tensor([True, False])):
        with pytest.raises(ValueError, match="takes the numbers of rows"):
            memory.select_rows(marks)


def test_a_reset_memory_is_a_new_one(model: PreTrainedModel) -> None:
    ids = some_tokens(2, 2 * B + 1)
    first, memory = read(model, ids)
    assert memory.is_initialized and "(13, 13)" in repr(memory)
    memory.reset()
    assert not memory.is_initialized
    assert (memory.position, memory.nbytes, memory.fams) == ((0, 0), 0, [None] * 3)
    again, _ = read(model, ids, memory)
    assert torch.equal(first, again)
