"""What commands that use a model do alike: load it, take up a memory, save one, stop on Ctrl-C."""

from __future__ import annotations

import argparse
import json
import os
import signal
import threading
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar, cast

from transformerfam.commands._options import changed, geometry_changes
from transformerfam.config import FamConfig
from transformerfam.embedded import SHIPPED
from transformerfam.errors import UserError, reason_of
from transformerfam.files import check_writable
from transformerfam.report import Progress

if TYPE_CHECKING:
    from transformerfam.memory import Memory

T = TypeVar("T")
INTERRUPTED = 130
# Whoever asks for a memory that is not FAM has no use for one that was trained.
_OTHER_MEMORIES = ("memory_source", "compressive_memory", "recurrence")


@dataclass
class Session:
    """A model, its tokenizer and the memory to go on with."""

    name: str
    model: Any
    tokenizer: Any
    memory: Memory
    trained: bool

    @property
    def config(self) -> FamConfig:
        """The geometry in use."""
        config: FamConfig = self.model.fam_config
        return config


def open_session(args: argparse.Namespace, progress: Progress) -> Session:
    """Load what --model, --adapter, --load and the geometry options name.

    The geometry is the loaded memory's, else the model's own, with what was asked for changed.
    """
    load = getattr(args, "load", None)
    saved = saved_config(load) if load else None
    from transformerfam import models

    name = args.model or models.EMBEDDED
    progress.passing(f"loading {name} ...")
    from transformers.utils import logging

    from transformerfam.conversion import reconfigure
    from transformerfam.memory import Memory

    logging.set_verbosity_error()
    check_device(args.device)
    adapter = adapter_of(args, saved)
    model, tokenizer = models.load(name, dtype=args.dtype, device=args.device, adapter=adapter)
    config = changed(saved or model.fam_config, geometry_changes(args))
    trained = models.is_trained(model, config)
    if config != model.fam_config:
        model = reconfigure(model, config)
    memory = Memory.load(load, model) if load else Memory.for_model(model)
    progress.clear()
    if remark := untrained_remark(config, trained):
        progress.note(remark)
    return Session(shown_name(model, name), model, tokenizer, memory, trained)


def adapter_of(args: argparse.Namespace, saved: FamConfig | None = None) -> str | None:
    """What --adapter and --no-adapter say; else the default model's own, which others do not have.

    Args:
        saved: the geometry of the memory to go on with, which says whether that adapter made it.
    """
    if args.adapter or args.model or getattr(args, "no_adapter", True):
        return cast("str | None", args.adapter)
    if any(getattr(args, name, None) is not None for name in _OTHER_MEMORIES):
        return None
    return SHIPPED if saved is None or saved.adapted == "fam" else None


def untrained_remark(config: FamConfig, trained: bool) -> str:
    """A sentence about a memory that has learned nothing yet; empty where there is none."""
    if trained or not config.added_modules:
        return ""
    if config.has_feedback:
        return (
            "The feedback memory of this model is untrained; it reads worse with it than without "
            "one (--fam-length 0)."
        )
    return (
        "The compressive memory of this model is untrained: its gates are nearly shut, and little "
        "is read from it."
    )


def check_device(name: str | None) -> None:
    """Refuse a device that is not there.

    Raises:
        UserError: why.
    """
    import torch

    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0].rstrip(".")
        raise UserError(f"The device {name} cannot be used: {reason}.") from None


def shown_name(model: Any, name: str) -> str:
    """What to call a model in a report: the last part of a path, the whole of any other name."""
    return Path(name).name if os.path.exists(name) else name


# ---- memories in files


def saved_config(path: str) -> FamConfig | None:
    """The geometry of a saved memory; None leaves it to `Memory.load` to say what is wrong.

    Raises:
        UserError: if there is no such file, before a model is loaded for nothing.
    """
    from transformerfam.memory_file import memory_header

    if not os.path.exists(path):
        raise UserError(f"There is no memory file {path}.")
    if os.path.isdir(path):
        raise UserError(f"{path} is a folder; name the file of a memory.")
    try:
        return FamConfig.from_dict(json.loads((memory_header(path) or {})["config"]))
    except (KeyError, TypeError, ValueError):
        return None


def check_can_save(path: str | None) -> None:
    """Refuse a place that a memory cannot be saved to, before the work is done.

    Raises:
        UserError: for a folder, a place that cannot be written, or a file that is no memory.
    """
    if path is None:
        return
    from transformerfam.memory_file import memory_header

    if os.path.isdir(path):
        raise UserError(f"{path} is a folder; name a file for the memory.")
    if os.path.exists(path) and memory_header(path) is None:
        raise UserError(
            f"{path} exists and is not a saved memory, so it is not overwritten; name another file."
        )
    check_place(path, "The memory cannot be saved to")


def check_place(path: str, cannot: str = "There can be no file") -> None:
    """Refuse a place that cannot be written to, before the work is done.

    Raises:
        UserError: a sentence that begins with `cannot`.
    """
    if os.path.isdir(path):
        raise UserError(f"{path} is a folder; name a file.")
    try:
        check_writable(path)
    except FileNotFoundError:
        folder = Path(os.path.realpath(path)).parent
        raise UserError(f"{cannot} {path}: there is no folder {folder}.") from None
    except OSError as error:
        raise UserError(f"{cannot} {path}: {reason_of(error)}.") from None


# ---- Ctrl-C


class StopOnInterrupt:
    """While this is open, the first Ctrl-C asks to stop and the second stops at once.

    A model call that is cut in two could leave a memory that has read half of it, so the first
    Ctrl-C only sets `requested`. Where nothing but more input is awaited, `until` ends at once.

    Args:
        notice: said on standard error at the first Ctrl-C; empty: nothing is.
    """

    def __init__(self, notice: str = "") -> None:
        self.requested = False
        self._notice = notice
        self._waiting = False
        self._previous: Any = None

    def __enter__(self) -> StopOnInterrupt:
        # Python delivers signals to the main thread only, and only there can they be caught.
        if threading.current_thread() is threading.main_thread():
            self._previous = signal.signal(signal.SIGINT, self._handle)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._previous is not None:
            signal.signal(signal.SIGINT, self._previous)

    def until(self, source: Iterable[T]) -> Iterator[T]:
        """`source` up to its end or the first Ctrl-C, which need not wait for the next item."""
        items = iter(source)
        while not self.requested:
            try:
                try:
                    self._waiting = True
                    item = next(items)
                finally:
                    self._waiting = False
            except (StopIteration, KeyboardInterrupt):
                return
            yield item

    def _handle(self, *_: object) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        if self._waiting:
            raise KeyboardInterrupt
        if self._notice:
            # Inside a signal handler print may not be used.
            with suppress(OSError):  # nobody reads it any more: no reason to stop at once
                os.write(2, f"\n{self._notice}\n".encode())
