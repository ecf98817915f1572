"""TransformerFAM: pretrained language models that read without end (arXiv 2404.09173)."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformerfam.config import FamConfig as FamConfig
    from transformerfam.conversion import convert as convert
    from transformerfam.conversion import reconfigure as reconfigure
    from transformerfam.embedded import ModelError as ModelError
    from transformerfam.errors import UserError as UserError
    from transformerfam.extras import MissingExtraError as MissingExtraError
    from transformerfam.memory import Memory as Memory
    from transformerfam.memory_file import MemoryFileError as MemoryFileError
    from transformerfam.models import load as load
    from transformerfam.probe import UnsupportedModelError as UnsupportedModelError
    from transformerfam.stream import Chunk as Chunk
    from transformerfam.stream import read as read

__version__ = "0.1.0"

_WHERE = {
    "Chunk": "stream",
    "FamConfig": "config",
    "Memory": "memory",
    "MemoryFileError": "memory_file",
    "MissingExtraError": "extras",
    "ModelError": "embedded",
    "UnsupportedModelError": "probe",
    "UserError": "errors",
    "convert": "conversion",
    "load": "models",
    "read": "stream",
    "reconfigure": "conversion",
}

__all__ = sorted(_WHERE)  # one sorted list, and the only one


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_WHERE[name]}"), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]


# `AutoModelForCausalLM.from_pretrained` must know us as soon as we are imported. The command line
# registers when it loads a model, so that `fam --help` need not wait seconds for torch.
if Path(sys.argv[0]).name not in ("fam", "fam.exe"):
    from transformerfam.auto import register

    register()
