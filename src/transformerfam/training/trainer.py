"""The loop: batches, steps, optimizer, checkpoints, journal and probes, on any number of processes.

`train(recipe)` does everything that a recipe says. A `Trainer` trains a model and reads a source that
were made elsewhere.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformerfam import report
from transformerfam.data.rows import Source
from transformerfam.errors import UserError
from transformerfam.extras import require
from transformerfam.training import adaptation, places
from transformerfam.training.batches import Batch
from transformerfam.training.card import model_card
from transformerfam.training.checkpoint import Checkpoints, Progress, changed_setting, recipe_of
from transformerfam.training.clock import Clock
from transformerfam.training.curriculum import Curriculum
from transformerfam.training.inputs import left_out, open_probes, open_source, row_readers
from transformerfam.training.journal import Journal
from transformerfam.training.optimizers import make_optimizer, rate_at
from transformerfam.training.probes import Probe
from transformerfam.training.recipe import Recipe
from transformerfam.training.replaying import stepper_for
from transformerfam.training.steps import bias_at


class TrainingStopped(UserError):
    """The loss or the gradients are of no use any more."""


@dataclass
class Trained:
    """What came of a run.

    Attributes:
        model: the trained model, in evaluation mode.
        folder: where adapter, journal and checkpoints are; None: nothing was written.
        losses: weighted mean loss of each step that this call made; None where no token counted.
        results: what the probes measured at the end.
        steps: steps done in all.
        interrupted: whether it was asked to stop before the last step.
    """

    model: Any
    folder: Path | None
    losses: list[float | None] = field(default_factory=list)
    results: dict[str, dict[str, float]] = field(default_factory=dict)
    steps: int = 0
    interrupted: bool = False


def train(
    recipe: Recipe,
    *,
    resume: bool = False,
    quiet: bool = False,
    stop: Callable[[], bool] = lambda: False,
) -> Trained:
    """Do what a recipe says: load, adapt, train, save.

    Args:
        recipe: everything else.
        resume: go on from the newest checkpoint in `run.output`.
        quiet: show no progress.
        stop: asked after each step; True ends the run with a checkpoint.

    Raises:
        UserError: for a recipe, data or folder that cannot be used, each with what to do.
        TrainingStopped: if loss or gradients are not finite, or explode.
    """
    recipe = places.with_full_paths(recipe)
    places.check(recipe)
    accelerator = make_accelerator(recipe)
    # The first process may write to the folder as soon as it can: all look before.
    accelerator.wait_for_everyone()
    model, tokenizer = adaptation.load_for_training(recipe)
    note = report.Progress(quiet=quiet).note
    trainer = Trainer(
        recipe,
        model,
        open_source(recipe, tokenizer, note=note if accelerator.is_main_process else None),
        tokenizer=tokenizer,
        probes=open_probes(recipe, tokenizer),
        accelerator=accelerator,
        quiet=quiet,
    )
    return trainer.run(resume=resume, stop=stop)


def make_accelerator(recipe: Recipe) -> Any:
    """An Accelerator in the recipe's precision; processes come from `accelerate launch`."""
    accelerate = require("accelerate", "train")
    precision = {"fp32": "no", "bf16": "bf16"}[recipe.run.precision]
    state = accelerate.state.AcceleratorState
    if state._shared_state and state().mixed_precision != precision:
        state._reset_state()  # of a run before this one in the same process
    # Gradients are added up here, whatever a launcher's environment says of it.
    once = accelerate.utils.GradientAccumulationPlugin(num_steps=1)
    accelerator = accelerate.Accelerator(
        mixed_precision=precision, gradient_accumulation_plugin=once
    )
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if accelerator.num_processes != started:
        # They would all write to the same folder.
        raise UserError(
            f"{started} processes were started, but they do not work together, since there is no GPU; "
            "without one set ACCELERATE_USE_CPU=true."
        )
    return accelerator


class Trainer:
    """A run over one model and one source.

    Args:
        recipe: settings; `model` and the sources in it are not looked at.
        model: what `adaptation.adapt` returned, of a model in the recipe's geometry.
        source: what is read.
        tokenizer: saved beside the adapter, if there is one.
        probes: measured every `probes.every` steps and at the end.
        accelerator: made from the recipe if it is not given.
        quiet: show no progress.
    """

    def __init__(
        self,
        recipe: Recipe,
        model: Any,
        source: Source,
        *,
        tokenizer: Any = None,
        probes: Sequence[Probe] = (),
        accelerator: Any = None,
        quiet: bool = False,
    ) -> None:
        self.recipe = recipe
        self.tokenizer = tokenizer
        self.probes = probes
        self.quiet = quiet
        self.accelerator = accelerator or make_accelerator(recipe)
        self.folder = Path(recipe.run.output) if recipe.run.output else None
        self.base = adaptation.base_of(model)
        self.source = source
        self.readers = self._own(row_readers(recipe, source, tokenizer))
        self._told_of_left_out = False
        self._micro = self.recipe.data.micro_batch_size or len(self.readers)
        if recipe.run.activation_checkpointing:
            _checkpoint_activations(self.base)
        parameters = list(adaptation.trained_parameters(model).values())
        optimizer = make_optimizer(parameters, recipe.optimizer)
        self._optimizer_settings = {
            name: value for name, value in optimizer.param_groups[0].items() if name != "params"
        }
        self.model, self.optimizer = self.accelerator.prepare(model, optimizer)
        self.stepper = stepper_for(self.accelerator, self.model, self.base, recipe, source)
        self.curriculum = Curriculum(recipe, source)
        self.checkpoints = Checkpoints(
            (self.folder or Path()) / places.CHECKPOINTS,
            recipe.run.keep_checkpoints,
            self.accelerator,
        )
        self.start = Progress(0, [], 0, 0.0, {})

    # ---- the loop

    def run(self, *, resume: bool = False, stop: Callable[[], bool] = lambda: False) -> Trained:
        """Train from the start, or from the newest checkpoint, to the last step or for `run.minutes`.

        Raises:
            UserError: if there is something to go on from and `resume` is not set, or the reverse.
            TrainingStopped: if loss or gradients are not finite, or explode.
        """
        self._take_up(resume)
        # Nobody writes before all have looked what is there.
        self.accelerator.wait_for_everyone()
        trained = Trained(self._whole_model(), self.folder, steps=self.start.step)
        run, tokens = self.recipe.run, self.start.tokens
        clock = Clock(self.start.seconds, run.minutes)
        kept = self._journal()
        try:
            for step in range(self.start.step, 0 if self._is_over(clock) else run.steps):
                loss, read, is_last = self._step(step, kept, clock)
                trained.losses.append(loss)
                self._tell_what_is_left_out(kept)
                trained.steps = step + 1
                tokens += read
                if is_last:
                    break  # its checkpoint is written when all is measured
                every = self.recipe.probes.every
                if every and (step + 1) % every == 0:
                    kept.probe(step + 1, self.measure())
                # After the probe: a run that goes on from a checkpoint does not measure again.
                trained.interrupted = self._any_process(stop())
                due = run.checkpoint_every and (step + 1) % run.checkpoint_every == 0
                if self.folder is not None and (due or trained.interrupted):
                    self._checkpoint(self._progress(step + 1, tokens, clock.seconds))
                if trained.interrupted:
                    trained.model.eval()
                    return trained
            try:
                trained.results = self.measure()
            finally:  # whatever becomes of measuring, what was learned is written
                self._finish(trained, tokens, clock.seconds)
            if self.start.step < trained.steps:
                kept.probe(trained.steps, trained.results)
        finally:
            kept.close()
        return trained

    def _step(self, step: int, kept: Journal, clock: Clock) -> tuple[float | None, int, bool]:
        """One step of the optimizer: (loss, tokens read by all processes, whether it is the last)."""
        began = time.monotonic()
        self.model.train()
        batches = self._batches()
        gone = self._sum(clock.gone) / self.accelerator.num_processes  # the same for all of them
        rate = rate_at(step, self.recipe.optimizer, self.recipe.run.steps, gone)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.stepper.longest = self.curriculum.longest
        loss = self.stepper.run(step, batches)
        norm = None
        if loss is not None:
            norm = self._clipped_norm()
            self._check(step, loss, norm)
            self.optimizer.step()
        self.optimizer.zero_grad()
        tokens = round(self._sum(self.stepper.tokens))
        is_last = step + 1 == self.recipe.run.steps or self._is_over(clock)
        if (step + 1) % self.recipe.run.log_every == 0 or is_last:
            kept.step(
                step + 1,
                loss=loss,
                rate=rate,
                grad_norm=norm,
                tokens=tokens,
                seconds=time.monotonic() - began,
                most_left=clock.left,
                fam_bias=bias_at(step, self.recipe) if self._bias_rises else None,
                longest=self.curriculum.longest if self.recipe.data.begin_length else None,
            )
        if self.curriculum.tell(*self.stepper.right):
            kept.progress.note(
                f"step {step + 1:,}   texts of up to {self.curriculum.longest:,} tokens"
            )
        return loss, tokens, is_last

    def _is_over(self, clock: Clock) -> bool:
        # Clocks differ, and all processes end with the same step.
        return clock.left is not None and self._any_process(clock.left <= 0)

    @property
    def _bias_rises(self) -> bool:
        return self.recipe.fam.has_feedback and self.recipe.feedback.bias_steps > 0

    def _batches(self) -> list[Batch]:
        pieces = [reader.next() for reader in self.readers]
        size = self._micro
        return [Batch.of(pieces[i : i + size]) for i in range(0, len(pieces), size)]

    def _tell_what_is_left_out(self, kept: Journal) -> None:
        """Once, when the first examples turn out to be of no use."""
        count, reasons = left_out(self.source, self.readers)
        if count and not self._told_of_left_out:
            self._told_of_left_out = True
            kept.progress.note(f"examples are left out: {'; '.join(reasons)}")

    def _clipped_norm(self) -> float:
        limit = self.recipe.optimizer.max_grad_norm or math.inf
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        norm = self.accelerator.clip_grad_norm_(parameters, limit)
        return float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)

    def _check(self, step: int, loss: float, norm: float) -> None:
        if math.isfinite(loss + norm) and norm <= self.recipe.run.explode_at:
            return
        last = self.checkpoints.latest() if self.folder is not None else None
        lower = "Lower optimizer.learning_rate"
        raise TrainingStopped(
            f"Training stopped at step {step + 1}: the loss is {loss:.4g} and the norm of the gradient "
            f"{norm:.4g}. {lower}{f' and go on from {last} with --resume' if last else ''}, or begin "
            "again with fam.feedback_norm='rms'."
        )

    # ---- measuring

    def measure(self) -> dict[str, dict[str, float]]:
        """What every probe says now: name of the probe -> names and numbers."""
        model = self._whole_model()
        model.eval()
        return {probe.name: probe(model) for probe in self.probes}

    def _whole_model(self) -> Any:
        """The model without the wrapper of DDP; under FSDP it stays in parts, and works as a whole."""
        return self.accelerator.unwrap_model(self.model)

    # ---- files

    def _journal(self) -> Journal:
        if not self.accelerator.is_main_process:
            return Journal.silent()
        return Journal(
            self.folder,
            steps=self.recipe.run.steps,
            start_step=self.start.step,
            quiet=self.quiet,
            tensorboard=self.recipe.run.tensorboard,
        )

    def _take_up(self, resume: bool) -> None:
        """Go on from the newest checkpoint, if there is one and it is wanted."""
        latest = self.checkpoints.latest() if self.folder is not None else None
        if latest is None:
            if self.folder is not None and places.holds_a_run(self.folder):
                raise UserError(
                    f"{self.folder} holds a run without a checkpoint to go on from; remove the folder, "
                    "or take another with --output, and leave --resume out."
                )
            if resume:
                raise UserError(f"There is no checkpoint in {self.folder}; leave --resume out.")
            return
        if not resume:
            raise UserError(
                f"{self.folder} holds a run that can be gone on with: add --resume, or choose another "
                "folder with --output."
            )
        if (key := changed_setting(self.recipe.to_dict(), recipe_of(latest))) is not None:
            raise UserError(
                f"The run in {self.folder} was begun with another {key}; a run can only go on as it "
                "was begun. Choose another folder with --output."
            )
        self.start, self.stepper.carried = self.checkpoints.load(
            latest, self.model, self.optimizer.optimizer, self.base
        )
        self.stepper.set_bias(max(0, self.start.step - 1))
        self.curriculum.set_state(self.start.curriculum)
        # What may be changed on the way; the rate is set in every step.
        for group in self.optimizer.param_groups:
            group.update(self._optimizer_settings)
        for reader, state in zip(self.readers, self._own(self.start.rows), strict=True):
            reader.set_state(state)

    def _progress(self, step: int, tokens: int, seconds: float) -> Progress:
        return Progress(step, self._rows(), tokens, seconds, self.curriculum.state())

    def _checkpoint(self, progress: Progress) -> None:
        parts = self.model, self.optimizer.optimizer, self.stepper.carried
        self.checkpoints.save(progress, self.recipe.to_dict(), *parts)

    def _finish(self, trained: Trained, tokens: int, seconds: float) -> None:
        """Save what was learned, with its card."""
        if self.folder is None:
            return
        left = round(self._sum(left_out(self.source, self.readers)[0]))
        state = None
        if self.accelerator.num_processes > 1:
            state = self.accelerator.get_state_dict(self.model)
        if self.accelerator.is_main_process:
            facts = {
                "seconds": seconds,
                "tokens": tokens,
                "steps": trained.steps,
                "processes": self.accelerator.num_processes,
                "left_out": left,
                "longest": self.curriculum.longest,
            }
            card = model_card(self.recipe, trained.results, facts)
            config = self.base.fam_config
            adaptation.save(
                trained.model, self.tokenizer, self.folder, card, config=config, state=state
            )
        self.accelerator.wait_for_everyone()
        # Behind what is smaller, and wanted more.
        if self.start.step < trained.steps and self.recipe.run.checkpoint_every:
            self._checkpoint(self._progress(trained.steps, tokens, seconds))

    # ---- several processes

    def _own(self, rows: Sequence[Any]) -> list[Any]:
        """This process's share of what there is for each row of the batch."""
        processes, me = self.accelerator.num_processes, self.accelerator.process_index
        if len(rows) % processes:
            raise UserError(
                f"data.batch_size={len(rows)} cannot be shared by {processes} processes; choose a "
                "multiple."
            )
        share = len(rows) // processes
        return list(rows[me * share : (me + 1) * share])

    def _rows(self) -> list[dict[str, Any]]:
        """State of the readers of all processes, in the order of the rows."""
        own = [reader.state() for reader in self.readers]
        if self.accelerator.num_processes == 1:
            return own
        from accelerate.utils import gather_object

        gathered: list[dict[str, Any]] = gather_object(own)
        return gathered

    def _sum(self, value: float) -> float:
        return self.stepper._sum_over_processes(value)

    def _any_process(self, flag: bool) -> bool:
        return self._sum(float(flag)) > 0


def _checkpoint_activations(base: Any) -> None:
    """Activation checkpointing under the newest of its names."""
    enable = getattr(base, "activation_checkpointing_enable", None)
    (enable or base.gradient_checkpointing_enable)()
