"""Where models come from: a folder, a name on the Hugging Face hub, a .gguf file, a small default.

Gives a TransformerFAM and its tokenizer. Knows nothing of text, streams or training. Nothing heavy
is imported before a model is asked for.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformerfam import hub
from transformerfam.config import FamConfig
from transformerfam.embedded import (
    EMBEDDED,
    SHIPPED,
    ModelError,
    embedded_folder,
    first_sentence,
    quiet,
    read_gguf,
    shipped_adapter,
)

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = [
    "ADAPTER_FAM_CONFIG",
    "EMBEDDED",
    "SHIPPED",
    "ModelError",
    "is_trained",
    "load",
    "put_adapter",
    "reading_config",
    "skeleton",
]

# Beside the weights of an adapter: the geometry that it was trained with.
ADAPTER_FAM_CONFIG = "fam_config.json"


def reading_config() -> FamConfig:
    """What reads best before any training: windows with sinks, and no feedback memory.

    An untrained feedback memory does harm, since tokens attend to rows that mean nothing yet.
    """
    return FamConfig(fam_length=0)


def is_trained(model: Any, config: FamConfig | None = None) -> bool:
    """Whether what a model from `load` learned for its memory came with it, and not from conversion.

    That is the FAM prompt (or prefix, or the prompt of an RMT), and the gates of a compressive memory.

    Args:
        model: what `load` returned.
        config: another geometry that it is to be used with; by default its own. A prompt of another
            length is made anew and has learned nothing.
    """
    if not getattr(model, "fam_trained", False):
        return False
    own = model.fam_config
    return config is None or _all_came(config, _fitting(own.added_modules, own, config))


def _fitting(modules: Sequence[str], stored: FamConfig, new: FamConfig) -> list[str]:
    """Those modules of a stored model for its memory that fit another geometry."""
    shapes = [(config.fam_length, config.fam_start) for config in (stored, new)]
    return [name for name in modules if name != "fam_prompt" or shapes[0] == shapes[1]]


def _all_came(config: FamConfig, came: Sequence[str]) -> bool:
    return bool(config.added_modules) and set(config.added_modules) <= set(came)


def load(
    name_or_path: str = EMBEDDED,
    config: FamConfig | None = None,
    *,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    adapter: str | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A TransformerFAM, ready to read, and its tokenizer.

    Args:
        name_or_path: `EMBEDDED`, a folder (a model of transformers, a saved TransformerFAM, or a
            PEFT adapter, which names its model), a .gguf file, or a name on the Hugging Face hub.
        config: geometry. By default that of the adapter or of the saved TransformerFAM, and
            `reading_config()` for a model that has none. A stored prompt of another length is not
            used: the model gets a fresh one.
        dtype: of the weights, such as "bfloat16"; by default as they are stored.
        device: where the weights go; by default the CPU.
        adapter: folder or hub name of a PEFT adapter, which is merged into the weights unless it
            is FAM's alone, or `SHIPPED`: the one that comes with this package for the default model.
            Whose way it changes (`FamConfig.adapted`) is taken from it, whatever `config` says.

    Raises:
        ModelError: a ValueError of one sentence, if there is no such model or it cannot be read.
        UnsupportedModelError: a ValueError too, if the model cannot become a TransformerFAM.
    """
    from transformerfam.auto import register
    from transformerfam.conversion import is_transformerfam

    register()
    name_or_path, adapter = _expanded(name_or_path), adapter and _expanded(adapter)
    if adapter is None and (Path(name_or_path) / "adapter_config.json").is_file():
        name_or_path, adapter = _adapted_model(name_or_path), name_or_path
    elif adapter is not None:
        adapter = adapter_folder(adapter, name_or_path)
    model, tokenizer = _load_stored(name_or_path, _dtype(dtype))
    # What adapters write down: the name that was given, not a folder in some cache.
    model.config._name_or_path = model.name_or_path = name_or_path
    stored = model.fam_config if is_transformerfam(model) else FamConfig(fam_length=0)
    came = stored.added_modules
    if adapter is not None:
        adapter = _adapter_folder(adapter)
        trained_with = adapter_geometry(adapter, config)
        model = _shaped(model, trained_with)
        came = (*_fitting(came, stored, trained_with), *_saved_modules(adapter))
        stored = trained_with
        model = _with_adapter(model, adapter)
        # Whose way it changes belongs to an adapter, not to how a model is read with it.
        config = config and config.replace(adapted=trained_with.adapted)
    model = _shaped(model, config or (stored if is_transformerfam(model) else reading_config()))
    model.fam_trained = _all_came(model.fam_config, _fitting(came, stored, model.fam_config))
    return model.to(device).eval(), tokenizer


def skeleton(name: str) -> Any:
    """A model without its weights (on the device `meta`), from what its configuration says.

    Raises:
        ModelError: if there is no such model.
    """
    import torch
    from transformers import AutoModelForCausalLM

    from transformerfam.auto import register

    register()
    if name.endswith(".gguf"):
        return _load_stored(name, "auto")[0]
    if name == EMBEDDED:
        name = str(embedded_folder())
    elif not Path(name).is_dir():
        name = hub.fetched_before(name, "config.json") or name
    with quiet(), torch.device("meta"):
        return AutoModelForCausalLM.from_config(_stored_config(name))


def _expanded(name: str) -> str:
    """A name with the `~` of a folder in full."""
    return str(Path(name).expanduser()) if name.startswith("~") else name


def _shaped(model: Any, config: FamConfig) -> Any:
    """`model` with this geometry, whether it was a TransformerFAM before or not."""
    from transformerfam.conversion import convert, is_transformerfam, reconfigure

    if not is_transformerfam(model):
        return convert(model, config)
    return model if config == model.fam_config else reconfigure(model, config)


# ---- models as they are stored


def _load_stored(name: str, dtype: Any) -> tuple[Any, PreTrainedTokenizerBase]:
    """A model and its tokenizer; a TransformerFAM only if it was saved as one."""
    if name == EMBEDDED:
        return _from_pretrained(str(embedded_folder()), dtype)
    path = Path(name)
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ModelError(f"There is no file {name}.")
        model, tokenizer = read_gguf(path)
        return model if dtype == "auto" else model.to(dtype), tokenizer
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelError(f"The folder {name} holds no model: it has no config.json.")
        return _from_pretrained(str(path), dtype)
    if path.exists() or path.is_absolute() or name.startswith((".", "~")):
        raise ModelError(f"{name} is neither a folder with a model nor a .gguf file.")
    fetched = hub.fetched_before(name, "config.json")
    return _from_pretrained(fetched or name, dtype, download=fetched is None)


def _from_pretrained(
    name: str, dtype: Any, *, download: bool = False
) -> tuple[Any, PreTrainedTokenizerBase]:
    """A model of transformers and its tokenizer, from a folder or from the hub."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    # The bars of a download are worth seeing, on a terminal; those of loading a file are not.
    with nullcontext() if download and sys.stderr.isatty() else quiet():
        _stored_config(name)
        try:
            tokenizer = AutoTokenizer.from_pretrained(name)
        except Exception as error:  # missing and damaged tokenizers raise many kinds of errors
            raise ModelError(
                f"{name} has no tokenizer that can be used ({first_sentence(error)})."
            ) from error
        try:
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                name, dtype=dtype, output_loading_info=True
            )
        except Exception as error:  # so do weights
            raise ModelError(
                f"The weights of {name} cannot be loaded ({first_sentence(error)})."
            ) from error
    model, report = loaded
    if missing := sorted(report["missing_keys"]):
        # transformers would go on with random numbers in their place.
        raise ModelError(f"{name} lacks {len(missing)} of its weights, among them {missing[0]}.")
    return model, tokenizer


def _stored_config(name: str) -> Any:
    """The configuration of a causal language model, from a folder or from the hub."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(name)
    except Exception as error:  # one sentence for whatever a strange config.json brings about
        raise ModelError(
            f"transformers does not understand the config.json of {name} ({first_sentence(error)})."
        ) from error
    _check_causal(name, config)
    return config


def _check_causal(name: str, config: Any) -> None:
    from transformers import AutoModelForCausalLM

    if type(config) not in AutoModelForCausalLM._model_mapping:
        raise ModelError(
            f"{name} is a {config.model_type} model, which transformers does not know as a causal "
            "language model."
        )


def _dtype(dtype: torch.dtype | str | None) -> torch.dtype | str:
    import torch

    if dtype is None:
        return "auto"
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ModelError(f"Weights cannot be of type {dtype}; use float32, bfloat16 or float16.")
    return found


# ---- adapters


def _adapter_folder(adapter: str) -> str:
    """The folder of an adapter, fetched from the hub if it is there."""
    if Path(adapter).is_dir():
        return adapter
    return hub.adapter_folder(adapter)


def _json_values(file: Path) -> dict[str, Any]:
    try:
        values = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise ModelError(f"{file} is no JSON file that can be read.") from error
    if not isinstance(values, dict):
        raise ModelError(f"{file} holds no table of values.")
    return values


def _adapted_model(adapter: str) -> str:
    """The model that an adapter was trained on."""
    base = _json_values(Path(adapter) / "adapter_config.json").get("base_model_name_or_path")
    if not base:
        raise ModelError(
            f"The adapter {adapter} does not say which model it belongs to; name both."
        )
    return str(base)


def adapter_geometry(adapter: str, otherwise: FamConfig | None) -> FamConfig:
    """The geometry that an adapter was trained with; `otherwise` if it does not say.

    Raises:
        ModelError: if it says nothing, or nothing that can be understood.
    """
    file = Path(_adapter_folder(adapter)) / ADAPTER_FAM_CONFIG
    if not file.is_file():
        if otherwise is not None:
            return otherwise
        raise ModelError(
            f"The adapter {adapter} has no {ADAPTER_FAM_CONFIG}; give the configuration that it "
            "was trained with."
        )
    try:
        return FamConfig.from_dict(_json_values(file))
    except ValueError as error:
        raise ModelError(f"{file} is no geometry: {error}") from error


def _saved_modules(adapter: str) -> list[str]:
    """The modules that an adapter was trained with: a prompt, gates."""
    return list(_json_values(Path(adapter) / "adapter_config.json").get("modules_to_save") or [])


def adapter_folder(adapter: str, base: str) -> str:
    """The folder or hub name of an adapter of the model `base`, which may be called `SHIPPED`.

    Raises:
        ModelError: if that is asked for of another model than the default one.
    """
    if adapter != SHIPPED:
        return adapter
    if base != EMBEDDED:
        raise ModelError(f"The adapter {SHIPPED} belongs to the default model; leave {base} out.")
    return shipped_adapter()


def _with_adapter(model: Any, adapter: str) -> Any:
    """`model` with an adapter in its weights, or, if it is FAM's alone, beside them."""
    from transformerfam.modules import decoder_of

    put = put_adapter(model, adapter)
    if model.fam_config.adapted == "all":
        return put.merge_and_unload()
    decoder = decoder_of(model)
    for name in model.fam_config.added_modules:  # no need of the untrained one beside it any more
        setattr(decoder, name, getattr(decoder, name).modules_to_save[put.active_adapter])
    return put.get_base_model()


def put_adapter(model: Any, adapter: str, *, trainable: bool = False) -> Any:
    """A PEFT model of `model` and the adapter in a folder.

    An adapter of windows alone, without a FAM prompt or gates, fits a model that has them: those of
    the model then stay, and are trained if the adapter is.

    Raises:
        ModelError: if the adapter has other weights than this model has places for.
    """
    import peft

    try:
        with quiet():
            config = peft.PeftConfig.from_pretrained(adapter)
            stored = peft.utils.load_peft_weights(adapter, device="cpu")
            saved = list(config.modules_to_save or [])
            new = [name for name in model.fam_config.added_modules if name not in saved]
            if new:
                config.modules_to_save = [*saved, *new]
            config.inference_mode = not trainable
            # PEFT puts the name of this model; it may have been trained under another.
            config.base_model_name_or_path = None
            put = peft.get_peft_model(model, config)
            # Left to itself PEFT would look on the hub for how large the vocabulary was.
            places = peft.get_peft_model_state_dict(put, save_embedding_layers=False)
            stored |= {name: own for name, own in places.items() if any(n in name for n in new)}
            # PEFT tells of weights that find no place, and not of places that find no weights.
            if stray := sorted(stored.keys() ^ places.keys()):
                raise ValueError(f"{stray[0]} is in one of both alone")
            peft.set_peft_model_state_dict(put, stored)
    except Exception as error:  # missing files, other shapes, other layers
        raise ModelError(
            f"The adapter {adapter} cannot be put on this model ({first_sentence(error)})."
        ) from error
    return put
