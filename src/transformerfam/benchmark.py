"""How fast and how large: FAM, windows and full attention over the same tokens, in one run.

All readers take turns chunk by chunk, so that whatever else the machine does hits them alike; what is
worth reporting are the ratios. Knows no text and prints nothing.
"""

from __future__ import annotations

import copy
import ctypes
import gc
import re
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from transformerfam.config import FamConfig
from transformerfam.conversion import reconfigure, restore
from transformerfam.memory import Memory


@dataclass
class Reader:
    """One way to read, and what it cost so far.

    Attributes:
        prefill_seconds: length -> seconds for all tokens up to it.
        decode_seconds: length -> median seconds for one more token at it.
        state_bytes: length -> bytes that must be kept to go on from it.
        call_seconds: what each call took, in order.
        peak_bytes: length -> most bytes in use above the weights while reading up to it: the state
            and what a call needs besides; None where the system does not say.
    """

    name: str
    model: Any
    state: Any = None
    prefill_seconds: dict[int, float] = field(default_factory=dict)
    decode_seconds: dict[int, float] = field(default_factory=dict)
    state_bytes: dict[int, int] = field(default_factory=dict)
    peak_bytes: dict[int, int | None] = field(default_factory=dict)
    call_seconds: list[float] = field(default_factory=list)
    peak: int | None = 0

    def against(self, other: Reader) -> float:
        """Median over the calls that both made: how many times as long as `other` it took.

        A call that was disturbed by something else on the machine does not count for more.
        """
        return statistics.median(self.ratios(other))

    def ratios(self, other: Reader) -> list[float]:
        """How many times as long as `other` each of the calls took that both made."""
        pairs = zip(self.call_seconds, other.call_seconds, strict=False)
        return [mine / theirs for mine, theirs in pairs]

    @torch.no_grad()
    def read(self, ids: Tensor) -> None:
        """More tokens, (1, T)."""
        held, gauge = self._bytes(), gauge_of_bytes(ids.device)
        seconds = time.perf_counter()
        self.state = self._step(ids, self.state)
        wait_for(ids)
        self.call_seconds.append(time.perf_counter() - seconds)
        # What was held before, and what came on top: the state's growth is in the latter.
        self.peak = None if gauge is None or self.peak is None else max(self.peak, held + gauge())

    @torch.no_grad()
    def measure(self, length: int, ids: Tensor) -> None:
        """Note what it took to come to `length`, and decode `ids` (1, n) from there on a copy."""
        self.prefill_seconds[length] = sum(self.call_seconds)
        self.state_bytes[length] = self._bytes()
        self.peak_bytes[length] = self.peak
        state = self.state.fork() if isinstance(self.state, Memory) else copy.deepcopy(self.state)
        times = []
        # What is said sees FAM, also where what is read does not.
        with state.asked() if isinstance(state, Memory) else nullcontext():
            for token in ids.split(1, dim=1):
                start = time.perf_counter()
                state = self._step(token, state)
                wait_for(ids)
                times.append(time.perf_counter() - start)
        self.decode_seconds[length] = statistics.median(times)

    def _step(self, ids: Tensor, state: Any) -> Any:
        return self.model(
            ids, past_key_values=state, use_cache=True, logits_to_keep=1
        ).past_key_values

    def _bytes(self) -> int:
        if isinstance(self.state, Memory):
            return self.state.nbytes
        layers = [] if self.state is None else self.state.layers
        return sum(x.numel() * x.element_size() for c in layers for x in (c.keys, c.values))


def readers(model: Any, config: FamConfig) -> list[Reader]:
    """The memory as configured, the same windows without it, and the untouched model.

    Weights are shared. A geometry that is windows alone comes without the first.
    """
    windows = config.without_feedback()
    remembering = {config.memory_name: config} if config != windows else {}
    compared = {**remembering, config.attention.upper(): windows}
    return [
        *(Reader(name, reconfigure(twin(model), own)) for name, own in compared.items()),
        Reader("full attention", restore(twin(model))),
    ]


def run(
    model: Any,
    config: FamConfig,
    lengths: Sequence[int],
    *,
    chunk: int = 2048,
    decode_tokens: int = 16,
    seed: int = 0,
    skip_full_beyond: int | None = None,
) -> Iterator[tuple[int, list[Reader]]]:
    """Read random tokens up to the largest of `lengths`; yield (length, readers) at each of them."""
    compared = readers(model, config)
    generator = torch.Generator().manual_seed(seed)
    device = model.get_input_embeddings().weight.device
    vocabulary = model.get_input_embeddings().weight.shape[0]

    def tokens(count: int) -> Tensor:
        return torch.randint(vocabulary, (1, count), generator=generator).to(device)

    # The first call of anything is slow; it is not what a long read costs.
    warm = tokens(64)
    for reader in compared:
        Reader(reader.name, reader.model).read(warm)
    position = 0
    for length in sorted(lengths):
        while position < length:
            ids = tokens(min(chunk, length - position))
            for reader in compared:
                reader.read(ids)
            position += ids.shape[1]
        more = tokens(decode_tokens)
        for reader in compared:
            reader.measure(length, more)
        yield length, compared
        if skip_full_beyond is not None and length >= skip_full_beyond:
            compared = [reader for reader in compared if reader.name != "full attention"]


# ---- parts


def twin(model: Any) -> Any:
    """Another object of the model with the same weights."""
    return copy.deepcopy(model, {id(t): t for t in [*model.parameters(), *model.buffers()]})


def wait_for(like: Tensor) -> None:
    """Until everything that was asked of the device of `like` is done."""
    if like.is_cuda:
        torch.cuda.synchronize(like.device)


def gauge_of_bytes(device: torch.device) -> Callable[[], int] | None:
    """A gauge of bytes in use on a device, set to 0 now; None where the system has none."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        base = torch.cuda.memory_allocated(device)
        return lambda: torch.cuda.max_memory_allocated(device) - base
    with suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # what is free goes back, or it would hide growth
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
        base = _status("VmRSS")
        return lambda: max(0, _status("VmHWM") - base)
    return None


def _status(name: str) -> int:
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024
