"""What a converted model does differently: its decoder reads with a `Memory`, and so does `generate`.

Each class here is mixed in before the family's own class of the same part. The decoder's layers are in
`layer`; what they compute is in `blocks` and `feedback`.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import ModelOutput

from transformerfam.auxiliary import FeedbackLosses
from transformerfam.call import Call, Observer, ReadBefore
from transformerfam.config import ADDED_MODULES, FamConfig
from transformerfam.layer import ATTENTION_NAME, FamLayer, Picklable, mixed
from transformerfam.memory import Memory, all_or_nothing
from transformerfam.modules import (
    adapted_modules,
    add_gates,
    add_prompt,
    decoder_of,
    layers_of,
    trained_for_fam,
)
from transformerfam.plan import CallPlan, check_asked, check_one_text, valid_columns
from transformerfam.probe import find_rotaries
from transformerfam.recurrent import SegmentCall, Segments
from transformerfam.rotary import Rotary

# ---- the decoder


class FamDecoder(Picklable):
    """A decoder that reads with a `Memory`. Mixed in before the family's own decoder class."""

    config: Any
    training: bool
    gradient_checkpointing: bool

    @property
    def fam_config(self) -> FamConfig:
        """The geometry, as kept in the model's configuration."""
        return FamConfig.from_dict(self.config.fam)

    def rotaries(self) -> tuple[Rotary, ...]:
        """Each layer's rotary positions, found when first needed: weights must be loaded."""
        found = self.__dict__.get("_fam_rotaries")
        if found is None:
            found = find_rotaries(self, len(layers_of(self)))
            self.__dict__["_fam_rotaries"] = found
        return found

    def plain_forward(self, **kwargs: Any) -> Any:
        """The family's own forward."""
        return super().forward(use_cache=False, return_dict=True, **kwargs)  # type: ignore[misc]

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Memory | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        return_dict: bool | None = None,
        fam_losses: FeedbackLosses | None = None,
        fam_observer: Observer | None = None,
        fam_asked: Tensor | None = None,
        fam_given: ReadBefore | None = None,
        **kwargs: Any,
    ) -> ModelOutput | tuple[Any, ...]:
        """Read new tokens, layer-major over all blocks of the call (section 9, docs/method.md).

        Args:
            input_ids, inputs_embeds: (R, T) or (R, T, d), new tokens of R streams.
            attention_mask: (R, T) or longer, of which the last T columns count: 0 for padding, which
                does not enter the stream.
            position_ids: refused if they begin anew within a row (packed texts), else ignored.
            past_key_values: the streams' memory, advanced in place once the call has succeeded.
            use_cache: whether to make a memory if none is given.
            fam_losses: takes the auxiliary losses of the call.
            fam_observer: told of what the call computes, see `call.Observer`.
            fam_asked: (R, T) bool, which of the new tokens see FAM where `fam_seen` is "asked"; by
                default all or none, as `past_key_values.asking` says.
            fam_given: the new tokens' keys and values; the inputs stand for nothing, see `replay`.
        """
        inputs = input_ids if inputs_embeds is None else inputs_embeds
        if inputs is None or inputs.shape[1] == 0:
            raise ValueError(
                "Nothing to read: give input_ids or inputs_embeds of at least one token."
            )
        self._check_call(past_key_values, inputs, fam_losses, fam_observer)
        check_one_text(position_ids, attention_mask)
        config, memory = self.fam_config, past_key_values
        if use_cache is None:
            use_cache = bool(getattr(self.config, "use_cache", True))
        if memory is None and use_cache and not (self.training and self.gradient_checkpointing):
            memory = Memory(config, inputs.shape[0], len(layers_of(self)))
        if config.through_stack:
            output = self._by_segments(config, memory, inputs, attention_mask, **kwargs)
            return output if return_dict is not False else output.to_tuple()
        looks = fam_losses, fam_observer
        call = self._call(config, memory, inputs, attention_mask, *looks, fam_asked, fam_given)
        output = self.plain_forward(
            input_ids=input_ids if inputs_embeds is None else None,
            inputs_embeds=inputs_embeds,
            # Queries and keys are to arrive unrotated: everything stands at position 0.
            position_ids=torch.zeros(1, inputs.shape[1], dtype=torch.long, device=inputs.device),
            fam_call=call,
            **kwargs,
        )
        call.finish(memory if call.keep else None)
        if self.training and fam_given is None:
            output["last_hidden_state"] = output["last_hidden_state"] + self._nothing(call)
        output["past_key_values"] = memory
        return output if return_dict is not False else output.to_tuple()

    def _nothing(self, call: Call) -> Tensor | int:
        # No block 0 in a call, no use of the prompt, and no FAM, none of its adapter: but wrappers that
        # train in parallel wait for a gradient of every parameter of every process.
        waited_for = (call.start, call.gates, *trained_for_fam(self))
        return 0 * sum(t.sum() for t in waited_for if t is not None)

    def _call(
        self,
        config: FamConfig,
        memory: Memory | None,
        inputs: Tensor,
        attention_mask: Tensor | None,
        losses: FeedbackLosses | None,
        observer: Observer | None,
        asked: Tensor | None,
        given: ReadBefore | None,
    ) -> Call:
        rows, columns = inputs.shape[:2]
        if given is not None:
            columns = given.columns
        check_asked(asked, rows, columns)
        state = Memory(config, rows, len(layers_of(self))) if memory is None else memory
        plan = CallPlan(
            config=config,
            starts=state.position,
            columns=columns,
            valid=valid_columns(attention_mask, rows, columns),
            past_length=state.past_length,
            passed=(True,) * rows if config.fam_start == "prefix" else state.passed,
            shows_fam=config.fam_seen == "always" or state.asking or asked is not None,
        )
        start, prefix = None, None
        if config.has_feedback:
            start = self._prompt(inputs.device)
            if config.fam_start == "prefix":
                prefix = start.view(len(layers_of(self)), 1, config.fam_length, -1).unbind()
        first_fams, beginning = state.beginning(prefix)
        gates = None
        if config.compressive_memory != "none":
            gates = self._added("memory_gates", len(layers_of(self)), inputs.device)
        return Call(
            config,
            plan,
            list(state.layers_memory),
            self.rotaries(),
            start,
            keep=memory is not None and (given is None or given.keep),
            first_fams=first_fams if any(beginning) else None,
            beginning=beginning,
            offset=state.offset,
            gates=gates,
            losses=losses,
            observer=observer,
            asked=asked if config.fam_seen == "asked" else None,
            given=given,
        )

    def _added(self, name: str, rows: int, device: torch.device) -> Tensor:
        """All rows of a module that was added; looked up at each call: PEFT puts another there."""
        weight: Tensor = getattr(self, name)(torch.arange(rows, device=device))
        return weight

    def _prompt(self, device: torch.device) -> Tensor:
        """(N, d), or of a prefix (layers · N, d), in the type of the embeddings."""
        rows = self.fam_config.prompt_rows(len(layers_of(self)))
        prompt = self._added("fam_prompt", rows, device)
        # While it is trained it may be kept wider than the weights that read it.
        return prompt.to(self.get_input_embeddings().weight.dtype)  # type: ignore[attr-defined]

    def _by_segments(
        self,
        config: FamConfig,
        memory: Memory | None,
        inputs: Tensor,
        attention_mask: Tensor | None,
        **kwargs: Any,
    ) -> ModelOutput:
        """`forward` where memory runs through the whole stack: block after block."""
        rows, columns = inputs.shape[:2]
        if valid_columns(attention_mask, rows, columns) is not None:
            raise ValueError(
                f"Rows cannot be padded under recurrence={config.recurrence!r}; give rows of the same "
                "length."
            )
        for name in ("output_hidden_states", "output_router_logits"):
            if kwargs.get(name) or getattr(self.config, name, False):
                raise ValueError(
                    f"{name} is not there under recurrence={config.recurrence!r}, where rows of memory "
                    "stand among the tokens; leave it out."
                )
        if not inputs.is_floating_point():
            inputs = self.get_input_embeddings()(inputs)  # type: ignore[attr-defined]
        state = Memory(config, rows, len(layers_of(self))) if memory is None else memory
        prompt = self._prompt(inputs.device)
        segments = Segments(config, state, prompt, self.rotaries())
        kind: Any = None

        def stack(hidden: Tensor, call: SegmentCall) -> Tensor:
            nonlocal kind
            at_zero = torch.zeros(1, hidden.shape[1], dtype=torch.long, device=hidden.device)
            output = self.plain_forward(
                inputs_embeds=hidden, position_ids=at_zero, fam_call=call, **kwargs
            )
            kind = type(output)
            last: Tensor = output["last_hidden_state"]
            return last

        hidden = segments.read(inputs, stack)
        if self.training:
            hidden = hidden + 0 * prompt.sum()  # as in `forward`
        if memory is not None:
            segments.commit(memory)
        output: ModelOutput = kind(last_hidden_state=hidden, past_key_values=memory)
        return output

    def _check_call(self, memory: object, inputs: Tensor, *looks: object) -> None:
        """`looks`: what looks at FAM, or None."""
        if self.config._attn_implementation != ATTENTION_NAME:
            raise ValueError(
                f"A TransformerFAM needs its own attention, not {self.config._attn_implementation!r}; "
                "choose how it is computed with FamConfig(backend=...)."
            )
        if self.fam_config.through_stack and any(look is not None for look in looks):
            raise ValueError(
                "fam_losses and fam_observer look at the FAM of each layer, and under "
                f"recurrence={self.fam_config.recurrence!r} there is none; leave them out."
            )
        if memory is None:
            return
        if not isinstance(memory, Memory):
            raise ValueError(
                f"A TransformerFAM reads with a transformerfam.Memory, not a {type(memory).__name__}; "
                "pass Memory.for_model(model), or no cache at all."
            )
        if memory.rows != inputs.shape[0]:
            raise ValueError(
                f"The memory holds {memory.rows} streams and the input has {inputs.shape[0]} rows; "
                "use memory.select_rows to match them."
            )
        layers = len(layers_of(self))
        if len(memory) != layers:
            raise ValueError(
                f"The memory is for {len(memory)} layers and the model has {layers}; make it with "
                "Memory.for_model(model)."
            )
        differences = self.fam_config.memory_differences(memory.config)
        if differences:
            raise ValueError(f"The memory was made with another {', '.join(differences)}.")


# ---- the causal language model


class FamForCausalLM:
    """What a converted model adds to its family's class."""

    config: Any
    _is_stateful = True  # transformers then refuses assisted generation and prompt lookup by name

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]  # the family's
        install(self)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """A pickle names the family's class, from which ours is made again."""
        from transformerfam.conversion import blank_model

        return blank_model, (type(self).__bases__[1],), self.__dict__

    @property
    def fam_config(self) -> FamConfig:
        """The geometry, as kept in the model's configuration."""
        return FamConfig.from_dict(self.config.fam)

    def _set_gradient_checkpointing(
        self,
        enable: bool = True,
        gradient_checkpointing_func: Callable[..., Any] = checkpoint,
        **kwargs: Any,
    ) -> None:
        """Without re-entrance: FAM of one layer reaches the next on the side (`Call.rising`)."""
        options = getattr(gradient_checkpointing_func, "keywords", {})
        if enable and options.get("use_reentrant"):
            raise ValueError(
                "A TransformerFAM cannot be checkpointed with use_reentrant=True; leave it out."
            )
        super()._set_gradient_checkpointing(  # type: ignore[misc]
            enable, gradient_checkpointing_func, **kwargs
        )

    def save_pretrained(self, save_directory: Any, **kwargs: Any) -> None:
        """As in transformers, with the weights in the layout that they have in memory.

        The layouts of older checkpoints are found by `model_type`, which on disk is ours: a plain
        class would not find them.

        Raises:
            ValueError: if an adapter is on it that was not merged.
        """
        if adapted_modules(decoder_of(self).layers):
            raise ValueError(
                "An adapter is on this model beside its weights: merge it first, or, if it is FAM's "
                "alone (adapted='fam') and cannot be merged, keep the adapter's folder."
            )
        kwargs.setdefault("save_original_format", False)
        super().save_pretrained(save_directory, **kwargs)  # type: ignore[misc]

    @all_or_nothing
    def generate(self, *args: Any, past_key_values: Any = None, **kwargs: Any) -> Any:
        """As in transformers; what is given and said counts as asked (`FamConfig.fam_seen`).

        A memory that is given is advanced, unless several continuations are made of each row: these go
        on from copies. `return_dict_in_generate=True` hands out those of `num_return_sequences` as
        `past_key_values`; of a search with `num_beams`, which ends with other beams than it returns,
        there are none. If anything fails or is interrupted on the way, the memory is where it was.
        """
        if past_key_values is not None:
            kwargs["past_key_values"] = past_key_values
        given = past_key_values if isinstance(past_key_values, Memory) else None
        asking = given is not None and given.asking
        with nullcontext() if given is None else given.asked():
            output = super().generate(*args, **kwargs)  # type: ignore[misc]
        made = getattr(output, "past_key_values", None)
        if hasattr(output, "beam_indices"):
            output.past_key_values = None
        if isinstance(made, Memory):  # maybe a copy, or one that was made here
            made.asking = asking
        return output

    # Past the family's own: some drop a cache by the length of a text that we do not keep.
    prepare_inputs_for_generation = GenerationMixin.prepare_inputs_for_generation

    def _prepare_cache_for_generation(
        self,
        generation_config: Any,
        model_kwargs: dict[str, Any],
        generation_mode: Any,
        batch_size: int,
        max_cache_length: int,
    ) -> None:
        """`generate` reads with a `Memory`: the one it is given, or a new one."""
        kind = generation_config.cache_implementation
        if kind is not None:
            raise ValueError(
                f"A TransformerFAM generates with its own memory, which has a fixed size already; "
                f"remove cache_implementation={kind!r}."
            )
        memory = model_kwargs.get("past_key_values")
        copies = max(generation_config.num_beams, generation_config.num_return_sequences)
        rows = batch_size * copies
        if memory is None:
            if generation_config.use_cache is not False:
                model_kwargs["past_key_values"] = Memory.for_model(self, rows)
                model_kwargs["past_key_values"].asking = True
            elif self.fam_config.fam_seen == "asked":
                raise ValueError(
                    "Where FAM is seen only by what is asked, generating needs a memory that knows what "
                    "is; leave use_cache out."
                )
        elif generation_config.use_cache is False:
            raise ValueError("Generating with a memory needs use_cache=True; leave use_cache out.")
        elif isinstance(memory, Memory):
            memory._is_user_defined = True
            if memory.rows != rows and memory.rows * copies == rows:
                # Several continuations of one stream: each on its own copy.
                index = torch.arange(memory.rows).repeat_interleave(copies)
                model_kwargs["past_key_values"] = memory.select_rows(index)


# ---- putting the classes on a model


def install(model: PreTrainedModel) -> None:
    """Give `model`, whose configuration has `fam`, its classes, its prompt and its gates."""
    decoder = decoder_of(model)
    layers: list[Any] = layers_of(decoder)
    for index, layer in enumerate(layers):
        layer.__class__ = mixed(FamLayer, type(layer))
        layer.fam_index = index
    decoder.__class__ = mixed(FamDecoder, type(decoder))
    model.config._attn_implementation = ATTENTION_NAME
    add_prompt(model)
    add_gates(model)


def uninstall(model: PreTrainedModel, model_class: type) -> None:
    """Undo `install` and the change of the model's own class."""
    decoder = decoder_of(model)
    for part in (*layers_of(decoder), decoder):
        if isinstance(part, Picklable):
            part.__class__ = type(part).__bases__[1]
    for name in ADDED_MODULES:
        decoder._modules.pop(name, None)
    decoder.__dict__.pop("_fam_rotaries", None)
    model.__class__ = model_class
