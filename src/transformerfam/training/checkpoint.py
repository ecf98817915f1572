"""Checkpoints from which a run goes on exactly: weights, optimizer, carried memories, data position.

A checkpoint is a folder `step-00000100` that is there whole or not at all. Everything random is a
function of seed and step, so no random state is kept. Tensors are in safetensors files, the rest in
JSON; no pickle.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from transformerfam.errors import UserError
from transformerfam.files import sync_folder
from transformerfam.layer_memory import LayerMemory
from transformerfam.memory import Memory
from transformerfam.training.recipe import Recipe
from transformerfam.training.settings import SourceSettings
from transformerfam.training.steps import Carried
from transformerfam.training.values import plain_values

# A run that goes on may be longer or slower, but it trains the same thing on the same data.
_FIXED_SECTIONS = ("model", "fam", "train", "data", "feedback", "replay")
_FIXED_SETTINGS = (("run", "seed"), ("optimizer", "name"))
_SOURCE = plain_values(SourceSettings())

_NAME = re.compile(r"step-(\d+)")
_GATHER = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
_SPREAD = StateDictOptions(full_state_dict=True, strict=False)
_SEPARATOR = "|"  # between a parameter's name and that of a value the optimizer keeps for it


@dataclass(frozen=True)
class Progress:
    """Where a run stands.

    Attributes:
        step: steps done.
        rows: state of the reader of each row of the batch, of all processes.
        tokens: tokens read so far by all processes.
        seconds: time spent so far.
        curriculum: its state.
    """

    step: int
    rows: list[dict[str, Any]]
    tokens: int
    seconds: float
    curriculum: dict[str, Any]


class Checkpoints:
    """The checkpoints in a folder.

    Args:
        folder: made when the first one is written.
        keep: the newest so many are kept.
        accelerator: all processes call every method; the first one writes what they share.
    """

    def __init__(self, folder: Path, keep: int, accelerator: Any) -> None:
        self.folder = folder
        self.keep = keep
        self.accelerator = accelerator

    def latest(self) -> Path | None:
        """The newest whole checkpoint."""
        found = _checkpoints_in(self.folder)
        return found[-1] if found else None

    # ---- writing

    def save(
        self,
        progress: Progress,
        recipe: Mapping[str, Any],
        model: Any,
        optimizer: Any,
        carried: Carried,
    ) -> Path:
        """Write a checkpoint; the oldest go."""
        target = self.folder / f"step-{progress.step:08d}"
        with self._beside(target) as beside:
            # Both gather from all processes; what they return is for the first alone.
            weights: dict[str, Any] = get_model_state_dict(model, options=_GATHER)
            # Asked for the state of an optimizer that has none yet, torch would make a step.
            optimizer_state: Mapping[str, Any] = {}
            if optimizer.state:
                optimizer_state = get_optimizer_state_dict(model, optimizer, options=_GATHER)
            memories = _tensors_of(carried.memories)
            if memories:
                rank = self.accelerator.process_index
                _write(beside / f"memories-{rank:05d}.safetensors", memories)
            if self.accelerator.is_main_process:
                _write(beside / "trained.safetensors", weights)
                tensors, values = _flat(optimizer_state)
                _write(beside / "optimizer.safetensors", tensors)
                _write(beside / "fams.safetensors", _numbered(carried.fams or ()))
                state = {
                    "step": progress.step,
                    "rows": progress.rows,
                    "tokens": progress.tokens,
                    "seconds": progress.seconds,
                    "curriculum": progress.curriculum,
                    "optimizer": values,
                    "recipe": recipe,
                }
                (beside / "state.json").write_text(json.dumps(state))
            if memories:
                places = [{"position": m.position, "offset": m.offset} for m in carried.memories]
                name = f"memories-{self.accelerator.process_index:05d}.json"
                (beside / name).write_text(json.dumps(places))
            self.accelerator.wait_for_everyone()
            if self.accelerator.is_main_process:
                sync_folder(beside)
                shutil.rmtree(target, ignore_errors=True)
                beside.rename(target)
                sync_folder(self.folder)
                for old in _checkpoints_in(self.folder)[: -self.keep]:
                    # By another name first: what is there is there whole.
                    shutil.rmtree(old.rename(self.folder / f".{old.name}.old"))
            self.accelerator.wait_for_everyone()
        return target

    @contextmanager
    def _beside(self, target: Path) -> Iterator[Path]:
        """A folder to write beside `target`, for all processes; gone if the block fails."""
        beside = self.folder / f".{target.name}.writing"
        is_first = self.accelerator.is_main_process
        if is_first:
            for broken_off in self.folder.glob(".step-*"):
                shutil.rmtree(broken_off)
            beside.mkdir(parents=True)
        self.accelerator.wait_for_everyone()
        try:
            yield beside
        except BaseException:
            if is_first:  # a disk that is full would stay so
                shutil.rmtree(beside, ignore_errors=True)
            raise

    # ---- reading

    def load(self, path: Path, model: Any, optimizer: Any, base: Any) -> tuple[Progress, Carried]:
        """Put a checkpoint's weights and optimizer state in place; returns the rest.

        Raises:
            UserError: if the checkpoint is damaged, or of another number of processes in a way that
                matters.
        """
        try:
            return self._load(path, model, optimizer, base)
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            reason = str(error).partition("\n")[0].rstrip(".")
            raise UserError(
                f"The checkpoint {path} is damaged ({reason}); remove it{self._before(path)}."
            ) from error

    def _before(self, path: Path) -> str:
        """How to go on without a checkpoint."""
        older = [found for found in _checkpoints_in(self.folder) if found.name < path.name]
        return f" to go on from {older[-1].name}" if older else " and begin anew"

    def _load(self, path: Path, model: Any, optimizer: Any, base: Any) -> tuple[Progress, Carried]:
        state = json.loads((path / "state.json").read_text())
        weights: dict[str, Any] = dict(load_file(path / "trained.safetensors"))
        set_model_state_dict(model, weights, options=_SPREAD)
        kept = _nested(load_file(path / "optimizer.safetensors"), state["optimizer"])
        if kept["param_groups"]:
            set_optimizer_state_dict(model, optimizer, kept, options=_GATHER)
        fams = load_file(path / "fams.safetensors")
        device = self.accelerator.device
        carried = Carried(
            memories=self._memories(path, base),
            fams=tuple(fams[name].to(device) for name in sorted(fams)) or None,
        )
        step, rows, tokens, seconds = (state[n] for n in ("step", "rows", "tokens", "seconds"))
        progress = Progress(step, rows, tokens, seconds, state.get("curriculum", {}))
        return progress, carried

    def _memories(self, path: Path, base: Any) -> list[Memory]:
        files = sorted(path.glob("memories-*.safetensors"))
        if not files:
            return []
        if len(files) != self.accelerator.num_processes:
            raise UserError(
                f"{path} holds the memories of {len(files)} processes and this run has "
                f"{self.accelerator.num_processes}; go on with {len(files)} processes."
            )
        file = files[self.accelerator.process_index]
        places = json.loads(file.with_suffix(".json").read_text())
        tensors = {n: t.to(self.accelerator.device) for n, t in load_file(file).items()}
        return [_memory_of(tensors, i, place, base) for i, place in enumerate(places)]


def recipe_of(path: Path) -> dict[str, Any]:
    """The recipe that a checkpoint was made with."""
    try:
        recipe: dict[str, Any] = json.loads((path / "state.json").read_text())["recipe"]
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(
            f"The checkpoint {path} is damaged; remove it to go on from the one before."
        ) from None
    return recipe


def changed_setting(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> str | None:
    """A setting that must stay as the run was begun and has not; None: all have."""
    # A setting that is not set is not there, and one that is newer than a checkpoint was not set.
    theirs = {**{section: {} for section in ours}, **theirs}
    fixed = [(s, key) for s in _FIXED_SECTIONS for key in {**ours[s], **theirs[s]}]
    defaults = Recipe().to_dict()
    fixed += _FIXED_SETTINGS
    if ours["data"]["layout"] == "documents":
        fixed.append(("run", "precision"))  # carried memories are of that type
    for section, key in fixed:
        default = defaults[section].get(key)
        before, now = (whose[section].get(key, default) for whose in (theirs, ours))
        if (section, key) == ("data", "sources"):
            before, now = ([{**_SOURCE, **source} for source in all_] for all_ in (before, now))
        if before != now:
            return f"{section}.{key}"
    # Adafactor without β1 has no moments to go on with.
    if ours["optimizer"].get("name") == "adafactor":
        betas = [
            w["optimizer"].get("beta1", defaults["optimizer"]["beta1"]) for w in (theirs, ours)
        ]
        if bool(betas[0]) != bool(betas[1]):
            return "optimizer.beta1"
    return None


def _checkpoints_in(folder: Path) -> list[Path]:
    """Oldest first."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if _NAME.fullmatch(path.name))


def _write(path: Path, tensors: Mapping[str, Tensor]) -> None:
    # safetensors refuses tensors that share storage or have gaps.
    save_file({name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}, path)


# ---- the optimizer's state: tensors in one file, everything else in JSON


def _flat(state: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    tensors: dict[str, Tensor] = {}
    values: dict[str, Any] = {"state": {}, "param_groups": state.get("param_groups", [])}
    for parameter, kept in state.get("state", {}).items():
        for name, value in kept.items():
            if isinstance(value, Tensor):
                tensors[f"{parameter}{_SEPARATOR}{name}"] = value
            else:
                values["state"].setdefault(parameter, {})[name] = value
    return tensors, values


def _nested(tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> dict[str, Any]:
    state: dict[str, dict[str, Any]] = {p: dict(kept) for p, kept in values["state"].items()}
    for key, tensor in tensors.items():
        parameter, _, name = key.rpartition(_SEPARATOR)
        state.setdefault(parameter, {})[name] = tensor
    groups = [
        {k: tuple(v) if k == "betas" else v for k, v in group.items()}
        for group in values["param_groups"]
    ]
    return {"state": state, "param_groups": groups}


# ---- memories


def _numbered(tensors: Sequence[Tensor]) -> dict[str, Tensor]:
    return {f"{i:05d}": t for i, t in enumerate(tensors)}


def _tensors_of(memories: Sequence[Memory]) -> dict[str, Tensor]:
    return {f"{i}.{name}": t for i, memory in enumerate(memories) for name, t in memory.tensors()}


def _memory_of(
    tensors: Mapping[str, Tensor], index: int, place: Mapping[str, Any], base: Any
) -> Memory:
    memory = Memory.for_model(base, len(place["position"]))
    memory.offset = place["offset"]
    names = LayerMemory.names(memory.config)
    layers = [
        LayerMemory.from_tensors({name: tensors[f"{index}.{layer}.{name}"] for name in names})
        for layer in range(len(memory))
    ]
    memory.advance(layers, place["position"])
    return memory
