"""AdamW and Adafactor against slow definitions of their own; the learning rate by step."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from transformerfam.training.optimizers import ConstantAdafactor, make_optimizer, rate_at
from transformerfam.training.settings import OptimizerSettings

SHAPES = [(3, 5), (4,), (2, 3, 4)]


def gradients(steps: int) -> list[list[Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in SHAPES]
        for _ in range(steps)
    ]


def parameters() -> list[Tensor]:
    generator = torch.Generator().manual_seed(2)
    return [
        torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()
        for shape in SHAPES
    ]


def follow(optimizer: Any, weights: list[Tensor], grads: list[list[Tensor]]) -> None:
    for step in grads:
        for weight, grad in zip(weights, step, strict=True):
            weight.grad = grad.clone()
        optimizer.step()


def second_moment(rows: Tensor, columns: Tensor) -> Tensor:
    """The squares that means of rows and of columns stand for, element by element."""
    result = torch.empty(rows.shape + columns.shape[-1:], dtype=rows.dtype)
    for at in torch.cartesian_prod(*(torch.arange(n) for n in result.shape)).tolist():
        *outer, i, j = at
        row, column = rows[tuple(outer)], columns[tuple(outer)]
        result[tuple(at)] = row[i] * column[j] / row.mean()
    return result


def adafactor(
    start: Tensor, grads: list[Tensor], settings: OptimizerSettings, ramp: float = 0.8
) -> Tensor:
    """Adafactor without scaling by the parameter, as slow formulas."""
    weight, mean = start.detach().clone(), torch.zeros_like(start)
    rows: Any = 0.0
    columns: Any = 0.0
    squares: Any = 0.0
    for t, grad in enumerate(grads, start=1):
        keep = min(settings.beta2, 1 - t**-ramp)
        square = grad**2 + 1e-30
        if grad.ndim > 1:
            rows = keep * rows + (1 - keep) * square.mean(-1)
            columns = keep * columns + (1 - keep) * square.mean(-2)
            update = grad / second_moment(rows, columns).sqrt()
        else:
            squares = keep * squares + (1 - keep) * square
            update = grad / squares.sqrt()
        update = update / max(1.0, float(update.square().mean().sqrt()))
        update = settings.learning_rate * update
        mean = settings.beta1 * mean + (1 - settings.beta1) * update
        weight = weight - settings.weight_decay * settings.learning_rate * weight
        weight = weight - (mean if settings.beta1 else update)
    return weight


@pytest.mark.parametrize(
    "settings",
    [
        OptimizerSettings(name="adafactor", learning_rate=0.1),
        # The ramp ends after the third step.
        OptimizerSettings(name="adafactor", learning_rate=0.1, beta2=0.6, weight_decay=0.1),
        OptimizerSettings(name="adafactor", learning_rate=0.1, beta1=0.0, beta2=0.5),
        OptimizerSettings(name="adafactor", learning_rate=0.1, beta2=0.0),
    ],
    ids=["long ramp", "short ramp, decay", "no mean", "no memory"],
)
def test_adafactor_does_what_its_formulas_say(settings: OptimizerSettings) -> None:
    steps = gradients(8)
    weights = parameters()
    follow(make_optimizer(weights, settings), weights, steps)
    for i, (weight, start) in enumerate(zip(weights, parameters(), strict=True)):
        expected = adafactor(start, [step[i] for step in steps], settings)
        torch.testing.assert_close(weight.detach(), expected, atol=1e-10, rtol=1e-8)


def test_adafactors_memory_is_constant_after_its_ramp() -> None:
    weight = torch.zeros(2, 2, dtype=torch.float64, requires_grad=True)
    optimizer = ConstantAdafactor([weight], lr=0.1, beta1=0.9, beta2=0.99)
    for step in range(1, 700):
        weight.grad = torch.ones_like(weight)
        optimizer.step()
        kept = 1 - step ** optimizer.param_groups[0]["decay_rate"]
        assert kept == pytest.approx(min(0.99, 1 - step**-0.8), abs=1e-12)


def test_adamw_does_what_its_formulas_say() -> None:
    settings = OptimizerSettings(learning_rate=0.1, beta1=0.8, beta2=0.9, weight_decay=0.2)
    steps = gradients(5)
    weights = parameters()
    follow(make_optimizer(weights, settings), weights, steps)
    for i, weight in enumerate(weights):
        expected = parameters()[i].detach()
        mean, square = torch.zeros_like(expected), torch.zeros_like(expected)
        for t, grads in enumerate(steps, start=1):
            expected = expected * (1 - 0.1 * 0.2)
            mean = 0.8 * mean + 0.2 * grads[i]
            square = 0.9 * square + 0.1 * grads[i] ** 2
            step = (mean / (1 - 0.8**t)) / ((square / (1 - 0.9**t)).sqrt() + 1e-8)
            expected = expected - 0.1 * step
        torch.testing.assert_close(weight.detach(), expected, atol=1e-10, rtol=1e-8)


@pytest.mark.parametrize("name", ["adamw", "adafactor"])
def test_an_optimizer_goes_on_from_its_state(name: Any) -> None:
    settings = OptimizerSettings(name=name, learning_rate=0.1, beta2=0.6)
    steps = gradients(6)
    whole = parameters()
    follow(make_optimizer(whole, settings), whole, steps)

    parts = parameters()
    first = make_optimizer(parts, settings)
    follow(first, parts, steps[:3])
    second = make_optimizer(parts, settings)
    second.load_state_dict(first.state_dict())
    follow(second, parts, steps[3:])
    assert all(torch.equal(a, b) for a, b in zip(whole, parts, strict=True))


@pytest.mark.parametrize("name", ["adamw", "adafactor"])
def test_the_rate_of_the_group_is_the_rate_of_the_step(name: Any) -> None:
    weights = parameters()
    before = [w.detach().clone() for w in weights]
    optimizer = make_optimizer(weights, OptimizerSettings(name=name))
    optimizer.param_groups[0]["lr"] = 0.0
    follow(optimizer, weights, gradients(1))
    assert all(torch.equal(w, b) for w, b in zip(weights, before, strict=True))


def test_a_parameter_without_gradient_stays() -> None:
    weights = parameters()
    optimizer = make_optimizer(weights, OptimizerSettings(name="adafactor"))
    weights[0].grad = torch.ones_like(weights[0])
    optimizer.step()
    assert torch.equal(weights[1], parameters()[1])
    assert not torch.equal(weights[0], parameters()[0])


# ---- the rate


def rates(steps: int, **changes: Any) -> list[float]:
    settings = OptimizerSettings(learning_rate=2.0, **changes)
    return [rate_at(step, settings, steps) for step in range(steps)]


def test_the_rate_rises_and_then_stays_or_falls() -> None:
    assert rates(6, warmup_steps=4) == [0.5, 1.0, 1.5, 2.0, 2.0, 2.0]
    assert rates(4, warmup_steps=0) == [2.0] * 4
    assert rates(6, warmup_steps=2, schedule="linear") == [1.0, 2.0, 2.0, 1.5, 1.0, 0.5]
    timed = OptimizerSettings(learning_rate=2.0, warmup_steps=0, schedule="linear")
    assert [rate_at(1, timed, 100, gone) for gone in (0.0, 0.25, 1.0)] == [1.98, 1.5, 0.0]
    expected = [1.0, 2.0, *(1 + math.cos(math.pi * k / 4) for k in range(4))]
    assert rates(6, warmup_steps=2, schedule="cosine") == pytest.approx(expected)


@given(
    steps=st.integers(1, 200),
    warmup=st.integers(0, 300),
    schedule=st.sampled_from(["constant", "linear", "cosine"]),
)
def test_no_step_is_without_a_rate(steps: int, warmup: int, schedule: str) -> None:
    found = rates(steps, warmup_steps=warmup, schedule=schedule)
    assert all(0 < rate <= 2 for rate in found)
    top = min(warmup, steps)
    assert found[:top] == sorted(found[:top])
    assert found[top:] == sorted(found[top:], reverse=True)
    settings: Any = OptimizerSettings(learning_rate=2.0, warmup_steps=warmup, schedule=schedule)  # type: ignore[arg-type]
    after = rate_at(max(steps, warmup), settings, steps)
    assert after == (2.0 if schedule == "constant" or warmup >= steps else 0.0)
