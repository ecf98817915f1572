"""Where a run reads its model from and writes to: looked at before anything is loaded.

Knows folders; nothing of models and steps.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from transformerfam.errors import UserError
from transformerfam.training.journal import FILE as JOURNAL
from transformerfam.training.recipe import Recipe

CHECKPOINTS = "checkpoints"
_ADAPTER = "adapter_config.json"


def with_full_paths(recipe: Recipe) -> Recipe:
    """The recipe with `~` in its folders put in full, which a shell does not do behind a `=`."""
    model = replace(
        recipe.model, base=_expanded(recipe.model.base), adapter=_expanded(recipe.model.adapter)
    )
    return recipe.replace(model=model, run=replace(recipe.run, output=_expanded(recipe.run.output)))


def check(recipe: Recipe) -> None:
    """Refuse folders that cannot be read from or must not be written to.

    Raises:
        UserError: one sentence that names the setting.
    """
    _check_model(recipe)
    if recipe.run.output:
        _check_output(recipe)


def holds_a_run(folder: Path) -> bool:
    """Whether a run has come so far as to write a line of its journal, or a checkpoint."""
    file = folder / JOURNAL
    begun = file.is_file() and file.stat().st_size > 0
    return begun or any((folder / CHECKPOINTS).glob("step-*"))


# ---- parts


def _expanded(path: str) -> str:
    return os.path.expanduser(path) if path.startswith("~") else path


def _check_model(recipe: Recipe) -> None:
    base, adapter = recipe.model.base, recipe.model.adapter
    if recipe.train.what != "full" and (Path(base) / _ADAPTER).is_file():
        # What is learned would be an adapter of its model, and that of the first would be lost.
        raise UserError(
            f"model.base={base} is an adapter; give it as model.adapter and its model as model.base, "
            "or make one model of both with fam merge."
        )
    if adapter and not (Path(adapter) / _ADAPTER).is_file() and Path(adapter).exists():
        raise UserError(f"model.adapter={adapter} holds no adapter: it has no {_ADAPTER}.")


def _check_output(recipe: Recipe) -> None:
    output = Path(recipe.run.output)
    for key, name in (("model.base", recipe.model.base), ("model.adapter", recipe.model.adapter)):
        if name and Path(name).exists() and output.resolve() == Path(name).resolve():
            raise UserError(
                f"run.output and {key} are both {name}, which would be overwritten; name another "
                "folder with --output."
            )
    if output.exists() and not output.is_dir():
        raise UserError(f"run.output={output} is a file; name a folder with --output.")
    if output.is_dir() and any(output.iterdir()) and not _is_of_a_run(output):
        raise UserError(
            f"The folder {output} is not empty and holds no run; name another with --output."
        )
    above = next(folder for folder in (output, *output.absolute().parents) if folder.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise UserError(f"{output} cannot be made: {above} cannot be written.")


def _is_of_a_run(folder: Path) -> bool:
    """Whether a run was begun here, if only so far as to make its journal."""
    return (folder / JOURNAL).is_file() or (folder / CHECKPOINTS).is_dir()
