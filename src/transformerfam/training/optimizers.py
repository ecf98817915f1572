"""AdamW, Adafactor as the paper has it, and the learning rate by step.

Knows parameters and settings; nothing of models and data.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from transformers.optimization import Adafactor

from transformerfam.training.settings import OptimizerSettings

# With β1 and a constant rate, and no scaling by the size of a parameter: Adafactor's own ramp of β2.
_RAMP = -0.8


class ConstantAdafactor(Adafactor):
    """Adafactor with β1, a rate from outside, and β2 constant after its ramp (section 3.1).

    Second moments of matrices are kept as means of rows and columns. In step t the moments of
    earlier steps weigh min(β2, 1 - t^-0.8): a constant β2 from the first step on would start from
    moments of 0 and take far too large steps. An update's root mean square is cut to 1 before the
    rate, as Adafactor does.

    Args:
        parameters: what to train.
        lr: learning rate.
        beta1: memory of the mean of updates.
        beta2: largest memory of squared gradients.
        weight_decay: decoupled, times the rate.
    """

    def __init__(
        self,
        parameters: Iterable[Tensor],
        *,
        lr: float,
        beta1: float,
        beta2: float,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(
            parameters,
            lr=lr,
            beta1=beta1 or None,  # 0: no mean is kept at all
            weight_decay=weight_decay,
            decay_rate=_RAMP,
            scale_parameter=False,
            relative_step=False,
        )
        for group in self.param_groups:
            group["beta2"] = beta2

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step. The memory goes by the parameter of a group that has made most steps."""
        for group in self.param_groups:
            steps = 1 + max(
                (self.state.get(p, {}).get("step", 0) for p in group["params"]), default=0
            )
            group["decay_rate"] = _exponent(steps, group["beta2"])
        return super().step(closure)


def _exponent(step: int, beta2: float) -> float:
    """The d for which 1 - step^d, what transformers computes, is min(beta2, 1 - step^-0.8)."""
    if step == 1:
        return _RAMP  # 1 - 1^d is 0 for every d
    return max(_RAMP, math.log(1 - beta2) / math.log(step))


def make_optimizer(
    parameters: Iterable[Tensor], settings: OptimizerSettings
) -> torch.optim.Optimizer:
    """The optimizer that the settings name. Its rate is to be set before each step, see `rate_at`."""
    if settings.name == "adafactor":
        return ConstantAdafactor(
            parameters,
            lr=settings.learning_rate,
            beta1=settings.beta1,
            beta2=settings.beta2,
            weight_decay=settings.weight_decay,
        )
    return torch.optim.AdamW(
        parameters,
        lr=settings.learning_rate,
        betas=(settings.beta1, settings.beta2),
        weight_decay=settings.weight_decay,
    )


def rate_at(step: int, settings: OptimizerSettings, steps: int, gone: float = 0.0) -> float:
    """The learning rate of a step.

    Args:
        step: steps done before, from 0.
        settings: highest rate, warm-up and schedule.
        steps: steps of the whole run, which the schedule falls over.
        gone: share of the run's time that was taken, if that may end it before the last step.

    Returns:
        In warm-up (step + 1) / warmup_steps of the highest rate, so that no step is lost. Then all of
        it, or falling, so that the step after the last, or one when the time is up, would have 0.
    """
    warmup = settings.warmup_steps
    if step < warmup:
        return settings.learning_rate * (step + 1) / warmup
    done = min(1.0, max((step - warmup) / max(1, steps - warmup), gone))
    factor = {
        "constant": 1.0,
        "linear": 1.0 - done,
        "cosine": (1.0 + math.cos(math.pi * done)) / 2,
    }[settings.schedule]
    return settings.learning_rate * factor
