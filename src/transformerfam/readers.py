"""Who is asked: the model under a geometry, as it is or with other windows and the same weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformerfam.config import ADDED_MODULES, FamConfig
from transformerfam.conversion import twin
from transformerfam.errors import UserError
from transformerfam.variants import VARIANTS, Variant

_SINKS = 4


@dataclass(frozen=True)
class Reader:
    """A model under one geometry.

    Attributes:
        name: what it is called in results.
        model: a TransformerFAM.
        limit: it is not asked about longer streams; None: about all.
    """

    name: str
    model: Any
    limit: int | None = None

    @property
    def config(self) -> FamConfig:
        """Its geometry."""
        config: FamConfig = self.model.fam_config
        return config

    def same_as(self, other: Reader, tokens: int) -> bool:
        """Whether both read so many tokens alike: the same weights, and no memory needed yet."""
        plain = (each.config.plain_length for each in (self, other))
        if any(n is not None and tokens > n for n in plain):
            return False
        return _weights_as_objects(self.model) == _weights_as_objects(other.model)


def _weights_as_objects(model: Any) -> dict[str, int]:
    """Parameter -> the tensor it is; not of modules that only a memory uses."""
    return {
        name: id(tensor)
        for name, tensor in model.named_parameters()
        if not any(module in name for module in ADDED_MODULES)
    }


READERS = ("model", "bswa", "sinks", "full")


def readers_of(model: Any, names: Sequence[str], *, full_limit: int | None) -> list[Reader]:
    """Readers of the same weights by name.

    Args:
        model: a TransformerFAM.
        names: `model`: as it is. `bswa`: its windows, no feedback, no sinks. `sinks`: its windows
            with sinks, no feedback (StreamingLLM). `full`: full attention, no feedback. And the
            patterns of `variants.VARIANTS`, such as `Longformer`, in its blocks and without sinks:
            what has no memory that would have to be trained.
        full_limit: longest stream that readers who keep every token are asked about; None: what the
            model was trained for.

    Raises:
        UserError: for another name, or one that does not go with the model's blocks.
    """
    trained_for = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    found = {}
    for name in map(str.strip, names):
        if name == "model":
            found[name] = Reader(name, model)
            continue
        name, config = _windows_of(model.fam_config, name)
        limit = (full_limit or trained_for) if config.keeps_everything else None
        found[name] = Reader(name, twin(model, config), limit)
    return list(found.values())


def _windows_of(config: FamConfig, name: str) -> tuple[str, FamConfig]:
    """A reader without feedback, as it is called, and its geometry in the blocks of `config`."""
    windows = config.without_feedback()
    if name == "full":
        return name, windows.changed(attention="full")
    if windows.keeps_everything:
        windows = windows.changed(attention="bswa")
    if name == "bswa":
        return name, windows.replace(sink_tokens=0)
    if name == "sinks":
        sinks = windows.sink_tokens or min(_SINKS, windows.block_size)
        return name, windows.replace(sink_tokens=sinks)
    patterns = _patterns()
    if (variant := patterns.get(name.lower())) is None:
        known = [*READERS, *(v.name for v in patterns.values())]
        raise UserError(f"There is no reader {name}; there are {', '.join(known)}.")
    try:
        return variant.name, windows.changed(
            **{"attention": "bswa", "sink_tokens": 0, **variant.fam}
        )
    except ValueError as error:
        raise UserError(f"{variant.name} does not go with this model: {error}") from None


def _patterns() -> dict[str, Variant]:
    """Variants by what they are called as readers: windows alone that differ in reading."""
    return {
        v.name.lower(): v
        for v in VARIANTS
        # The windows of the model itself are `bswa` and `sinks`.
        if not v.config(FamConfig.paper()).memory_name and "stop_gradient" not in v.fam
        if v.name not in ("BSWA", "StreamingLLM")
    }
