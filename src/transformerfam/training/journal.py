"""What a run writes down while it goes: metrics.jsonl, TensorBoard, and a line of progress.

Knows numbers and files; nothing of models. The time of a step is given, not measured.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TextIO

from transformerfam import report
from transformerfam.errors import UserError
from transformerfam.extras import MissingExtraError, require
from transformerfam.files import hold, whole_file

FILE = "metrics.jsonl"
TENSORBOARD = "tensorboard"
# How much one more step counts in the mean time of a step, from which the time left is told.
_NEWEST = 0.1


class Journal:
    """The journal of one run, in its folder.

    `metrics.jsonl` holds an object a line: `step` (steps done, from 1), `loss` (nats), `rate`,
    `grad_norm`, `tokens`, `seconds` and `tokens_per_second` of that step; and `step`, `probe` for
    what a probe measured. What is not a number or not finite is null.

    Args:
        folder: made if it is not there; None: no files, progress only.
        steps: of the whole run.
        start_step: steps that were done before. Lines after it are taken out, so that the file reads
            like that of a run that was never interrupted; 0 begins a new file.
        quiet: show no progress.
        tensorboard: write files for TensorBoard too, if it is installed.
        stream: where progress goes; standard error by default.

    Raises:
        UserError: if another run writes to the folder.
    """

    def __init__(
        self,
        folder: str | Path | None,
        *,
        steps: int,
        start_step: int = 0,
        quiet: bool = False,
        tensorboard: bool = True,
        stream: TextIO | None = None,
    ) -> None:
        self.progress = report.Progress(quiet=quiet, stream=stream)
        self._steps = steps
        self._mean_seconds: float | None = None
        self._file: TextIO | None = None
        self._board: Any = None
        self._release: Callable[[], None] = lambda: None
        if folder is not None:
            folder = Path(folder)
            folder.mkdir(parents=True, exist_ok=True)
            self._release = _held(folder)
            keep_until(folder / FILE, start_step)
            self._file = (folder / FILE).open("a", encoding="utf-8")
            if tensorboard:
                self._board = _board(folder / TENSORBOARD, start_step)

    @classmethod
    def silent(cls) -> Journal:
        """One that keeps and shows nothing, for all processes but the first."""
        return cls(None, steps=0, quiet=True)

    def step(
        self,
        step: int,
        *,
        loss: float | None,
        rate: float,
        grad_norm: float | None,
        tokens: int,
        seconds: float,
        most_left: float | None = None,
        **more: float | None,
    ) -> None:
        """Write down a step.

        Args:
            step: its number, from 1.
            loss: mean loss of a token, in nats; None: no token counted.
            rate: learning rate.
            grad_norm: before it was cut.
            tokens: read in this step, by all processes.
            seconds: that it took.
            most_left: seconds after which the run ends, whatever its steps; None: it does not.
            **more: other numbers to keep; those that are None are left out.
        """
        speed = tokens / seconds if seconds > 0 else None
        numbers: dict[str, float | None] = {
            "loss": loss,
            "rate": rate,
            "grad_norm": grad_norm,
            "tokens": tokens,
            "seconds": round(seconds, 4),
            "tokens_per_second": None if speed is None else round(speed, 1),
            **{name: value for name, value in more.items() if value is not None},
        }
        self._write({"step": step, **numbers})
        self._draw("train", numbers, step)
        self._smooth(seconds)
        self.progress.update(
            self._line(step, loss, speed, grad_norm, most_left), now=step == self._steps
        )

    def probe(self, step: int, results: Mapping[str, Mapping[str, float]]) -> None:
        """Write down what probes measured after `step` steps: name of the probe -> numbers."""
        if not results:
            return
        self._write({"step": step, "probe": results})
        for name, numbers in results.items():
            self._draw(name, numbers, step)
            shown = ", ".join(f"{key} {value:.3g}" for key, value in numbers.items())
            self.progress.note(f"step {report.count(step)}   {name}: {shown}")

    def close(self) -> None:
        """Close the files and take the progress line off the terminal."""
        self.progress.clear()
        self._release()
        self._release = lambda: None
        if self._file is not None:
            self._file.close()
        if self._board is not None:
            self._board.close()

    # ---- parts

    def _write(self, values: Mapping[str, Any]) -> None:
        if self._file is not None:
            # NaN is no JSON.
            self._file.write(json.dumps(_finite(values), allow_nan=False) + "\n")
            self._file.flush()

    def _draw(self, group: str, numbers: Mapping[str, float | None], step: int) -> None:
        if self._board is not None:
            for name, value in numbers.items():
                if value is not None:
                    self._board.add_scalar(f"{group}/{name}", value, step)

    def _smooth(self, seconds: float) -> None:
        mean = self._mean_seconds
        self._mean_seconds = seconds if mean is None else mean + _NEWEST * (seconds - mean)

    def _line(
        self,
        step: int,
        loss: float | None,
        speed: float | None,
        grad_norm: float | None,
        most_left: float | None,
    ) -> str:
        assert self._mean_seconds is not None
        left = self._mean_seconds * (self._steps - step)
        left = left if most_left is None else max(0.0, min(left, most_left))
        facts = [
            f"step {report.count(step)}/{report.count(self._steps)}",
            f"loss {report.loss(loss)}",
            None if speed is None else f"{round(speed):,} tokens/s",
            f"{report.duration(left)} left" if step < self._steps else None,
            None if grad_norm is None else f"grad {grad_norm:.2g}",
        ]
        return "   ".join(fact for fact in facts if fact)


def _held(folder: Path) -> Callable[[], None]:
    """Keeps other runs out of a folder until it is called."""
    try:
        return hold(folder)
    except BlockingIOError:
        raise UserError(
            f"Another run writes to {folder}; wait for it, or name another folder with --output."
        ) from None


def keep_until(file: Path, step: int) -> None:
    """Take the lines after `step` out of a journal's file, and a line that was cut short."""
    if not file.exists():
        return
    kept = []
    with file.open(encoding="utf-8", errors="replace") as lines:
        for line in lines if step > 0 else ():
            try:
                if line.endswith("\n") and json.loads(line)["step"] <= step:
                    kept.append(line)
            except (ValueError, KeyError, TypeError):
                continue
    with whole_file(file) as beside:
        beside.write_text("".join(kept), encoding="utf-8")


def _finite(value: Any) -> Any:
    """`value` with None for numbers that JSON does not have."""
    if isinstance(value, Mapping):
        return {str(k): _finite(v) for k, v in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _board(folder: Path, start_step: int) -> Any:
    """A writer for TensorBoard, or None where that is not installed."""
    try:
        require("tensorboard", "train")
    except MissingExtraError:
        return None
    from torch.utils.tensorboard import SummaryWriter

    # What an interrupted run wrote after its checkpoint is not shown.
    purge = start_step + 1 if start_step else None
    return SummaryWriter(str(folder), purge_step=purge)
