"""What of a model is trained, and how what was learned is kept (section 3.1: LoRA and the prompt).

Other variants of the geometry have other modules of their own; `FamConfig.added_modules` names them.

Knows PEFT and folders; nothing of steps and data.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from transformerfam.config import FamConfig
from transformerfam.conversion import initialise_prompt, is_transformerfam
from transformerfam.embedded import quiet
from transformerfam.errors import UserError
from transformerfam.extras import require
from transformerfam.models import (
    ADAPTER_FAM_CONFIG,
    adapter_folder,
    adapter_geometry,
    is_trained,
    load,
    put_adapter,
)
from transformerfam.training.recipe import Recipe
from transformerfam.training.settings import TrainSettings

# PEFT's name for "no matrices": the adapter then holds nothing but `modules_to_save`.
_NO_MATRICES = "dummy-target-modules"


def load_for_training(recipe: Recipe) -> tuple[Any, Any]:
    """The recipe's model with what it trains unfrozen, and its tokenizer.

    Raises:
        UserError, ModelError, UnsupportedModelError: if there is no such model, or it cannot be used.
    """
    model, tokenizer = load(recipe.model.base, recipe.fam, dtype=recipe.model.dtype)
    if not is_trained(model):
        initialise_prompt(model, recipe.model.prompt, recipe.run.seed)
    adapter = adapter_folder(recipe.model.adapter, recipe.model.base)
    if adapter:
        _check_way(adapter, recipe.fam)
    return adapt(model, recipe.train, recipe.run.seed, adapter=adapter), tokenizer


def adapt(model: Any, settings: TrainSettings, seed: int, *, adapter: str = "") -> Any:
    """`model` with its trained parameters unfrozen and in float32: a PEFT model, or itself if `full`.

    Args:
        model: a TransformerFAM.
        settings: what is trained.
        seed: of LoRA's random half.
        adapter: folder of an adapter of this model to go on from.

    Raises:
        UserError: if there is no matrix of a name in `targets`, or the adapter does not fit.
    """
    if not is_transformerfam(model):
        raise UserError("Only a TransformerFAM can be trained; convert the model first.")
    torch.manual_seed(seed)
    if settings.what == "full":
        if adapter:
            raise UserError("train.what='full' cannot go on from an adapter; merge it first.")
        model.requires_grad_(True)
    else:
        model = _with_adapter(model, settings, adapter)
        _check_way_of_fam(model)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return model


def _with_adapter(model: Any, settings: TrainSettings, adapter: str) -> Any:
    peft = require("peft", "train")
    if adapter:
        return _go_on_from(adapter, model, settings)
    targets: Any = settings.targets[0] if len(settings.targets) == 1 else list(settings.targets)
    if settings.what == "prompt":
        targets = _NO_MATRICES
    elif targets != "all-linear":
        targets = [targets] if isinstance(targets, str) else targets
    _check_ties(model, settings.targets)
    config = peft.LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=targets,
        modules_to_save=list(model.fam_config.added_modules) or None,
        task_type="CAUSAL_LM",
    )
    try:
        return peft.get_peft_model(model, config)
    except ValueError as error:
        raise UserError(
            f"LoRA finds no matrices called {', '.join(settings.targets)} in this model; see "
            "train.targets."
        ) from error


def _check_way_of_fam(adapted: Any) -> None:
    """Refuse an adapter of FAM alone that would change what only tokens go through."""
    if base_of(adapted).fam_config.adapted == "all":
        return
    names = [name for name, _ in adapted.named_parameters() if "lora_" in name]
    if outside := [name for name in names if ".layers." not in name]:
        matrix = outside[0].partition(".lora_")[0].rpartition(".")[2]
        raise UserError(
            f'FAM does not go through {matrix}, which fam.adapted="fam" would change for tokens; leave '
            "it out of train.targets."
        )


def _go_on_from(adapter: str, model: Any, settings: TrainSettings) -> Any:
    """`model` with an adapter of it, which is trained on."""
    adapted = put_adapter(model, adapter, trainable=True)
    if settings.what == "prompt":
        added = model.fam_config.added_modules
        for name, parameter in adapted.named_parameters():
            of_ours = any(module in name for module in added)
            parameter.requires_grad_(parameter.requires_grad and of_ours)
    return adapted


def _check_way(adapter: str, wanted: FamConfig) -> None:
    """Refuse to let tokens through an adapter that was trained for FAM alone, or the other way round."""
    trained_with = adapter_geometry(adapter, otherwise=wanted)
    if trained_with.adapted != wanted.adapted:
        raise UserError(
            f'The adapter {adapter} was trained with fam.adapted="{trained_with.adapted}", and the '
            f'recipe has "{wanted.adapted}"; give it the same.'
        )


def _check_ties(model: Any, targets: Sequence[str]) -> None:
    """Refuse to change a matrix that is used in two places: merged, it would change in both."""
    if not getattr(model.config, "tie_word_embeddings", False):
        return
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    names = {name.rpartition(".")[2] for name, module in model.named_modules() if module in ends}
    if names & {target.rpartition(".")[2] for target in targets}:
        raise UserError(
            "This model reads and speaks with the same embeddings, which LoRA would change in one of "
            "both places; leave embed_tokens and lm_head out of train.targets."
        )


def base_of(model: Any) -> Any:
    """The TransformerFAM inside of what `adapt` returned."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def trained_parameters(model: Any) -> dict[str, Tensor]:
    """Name -> parameter of everything that is trained."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


# ---- keeping what was learned


def save(
    model: Any,
    tokenizer: Any,
    folder: Path,
    card: str,
    *,
    config: FamConfig,
    state: Mapping[str, Tensor] | None = None,
) -> None:
    """Write the adapter (or, if all was trained, the model) to `folder`, with tokenizer and card.

    Args:
        model: what `adapt` returned.
        tokenizer: put beside the weights; None: there is none.
        folder: made if it is not there. Files of the same names are replaced, others stay.
        card: text of README.md.
        config: the geometry that it is to be used with.
        state: the weights, where the model itself holds parts of them only (FSDP).
    """
    # Left to itself PEFT would look on the hub for how large the vocabulary was.
    more = {"save_embedding_layers": False} if hasattr(model, "get_base_model") else {}
    with whole_files(folder) as beside, quiet():
        model.save_pretrained(beside, state_dict=None if state is None else dict(state), **more)
        if tokenizer is not None:
            tokenizer.save_pretrained(beside)
        if hasattr(model, "get_base_model"):
            text = json.dumps(config.to_dict(), indent=2)
            (beside / ADAPTER_FAM_CONFIG).write_text(text + "\n")
        # Names of files in it need not be text.
        (beside / "README.md").write_text(card, encoding="utf-8", errors="backslashreplace")


@contextmanager
def whole_files(folder: Path) -> Iterator[Path]:
    """A folder to write beside `folder`, whose files are moved into it if the block succeeds."""
    folder.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(prefix=".saving-", dir=folder))
    try:
        yield beside
        for file in sorted(beside.iterdir()):
            target = folder / file.name
            if file.is_dir() and target.is_dir():  # a folder takes no other's place
                shutil.rmtree(target)
            file.replace(target)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
