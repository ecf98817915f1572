"""Put TransformerFAM on a pretrained model of transformers, without new layer weights.

Three classes of a model get a subclass each: the decoder layer (lets FAM rows re-enter it), the decoder
(takes and returns a `Memory`) and the causal language model (`generate`, saving, loading). The
subclasses are made when needed from whatever family comes, so there is no code per family.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import ModelOutput

from transformerfam.config import FamConfig
from transformerfam.feedback import ATTENTION_NAME, AttentionPass, Call, fam_attention
from transformerfam.memory import Memory
from transformerfam.plan import CallPlan
from transformerfam.probe import UnsupportedModelError, find_rotaries, run_probe
from transformerfam.rotary import Rotary

AttentionInterface.register(ATTENTION_NAME, fam_attention)
# Masks are made by the plan of each call; without this entry transformers drops padding masks.
AttentionMaskInterface.register(ATTENTION_NAME, lambda *args, **kwargs: None)

_KNOWN_LAYERS = {"full_attention", "sliding_attention", "sparse", "dense"}


# ---- the public verbs


def convert(model: PreTrainedModel, config: FamConfig | None = None, *, seed: int = 0) -> PreTrainedModel:
    """Turn a causal language model of transformers into its TransformerFAM, in place.

    Args:
        model: any decoder with rotary positions whose attention transformers lets us replace.
        config: geometry; the paper's by default.
        seed: chooses the vocabulary tokens whose embeddings the FAM prompt starts from.

    Returns:
        `model`, now with `model.fam_config`. Its only new parameter is the `fam_prompt` of its
        decoder, (N, d), in the scale that the first layer reads (B.1).

    Raises:
        UnsupportedModelError: if the model cannot be converted; it is left as it was.
    """
    config = FamConfig() if config is None else config
    _check_convertible(model)
    before = (type(model), type(model.config), model.config._attn_implementation)
    model.config.__class__ = family_config(type(model.config))
    model.config.fam = config.to_dict()
    model.__class__ = family_model(type(model))
    _install(model)
    try:
        decoder = _decoder(model)
        _ = decoder.rotaries
    except UnsupportedModelError:
        _uninstall(model, *before)
        raise
    initialise_prompt(model, seed)
    return model


def reconfigure(model: PreTrainedModel, config: FamConfig, *, seed: int = 0) -> PreTrainedModel:
    """Change the geometry of a TransformerFAM in place. A prompt of the same length is kept.

    Memories made before do not fit a model of another geometry.
    """
    if not is_transformerfam(model):
        return convert(model, config, seed=seed)
    decoder = _decoder(model)
    model.config.fam = config.to_dict()
    prompt = decoder._modules.get("fam_prompt")
    if config.has_feedback and (prompt is None or prompt.weight.shape[0] != config.fam_length):
        _add_prompt(model)
        initialise_prompt(model, seed)
    return model


def is_transformerfam(model: object) -> bool:
    """Whether `model` was converted."""
    return isinstance(model, FamForCausalLM)


@torch.no_grad()
def initialise_prompt(model: PreTrainedModel, seed: int = 0) -> None:
    """Set the FAM prompt to what the first layer reads for N vocabulary tokens drawn by `seed`.

    Going through the model brings in whatever scale its family gives to embeddings.
    """
    decoder = _decoder(model)
    length = decoder.fam_config.fam_length
    if not length:
        return
    vocabulary = decoder.get_input_embeddings().weight.shape[0]
    tokens = torch.randint(vocabulary, (length,), generator=torch.Generator().manual_seed(seed))
    probe = run_probe(decoder, tokens, torch.zeros(length, dtype=torch.long))
    decoder.fam_prompt.weight.copy_(probe.inputs[0][0])


# ---- the decoder layer


class FamLayer:
    """A decoder layer that FAM rows can re-enter. Mixed in before the family's own layer class."""

    fam_index: int

    def forward(self, hidden_states: Tensor, *args: Any, fam_call: Any = None, **kwargs: Any) -> Any:
        """The family's layer, with a pass of `fam_call` in place of the attention mask."""
        if fam_call is None:
            raise RuntimeError("A layer of a TransformerFAM was called outside of its decoder.")
        plain = super().forward  # type: ignore[misc]  # of the family's layer
        kwargs.update(past_key_values=None, use_cache=False)

        def reenter(rows: Tensor, attention: AttentionPass) -> Tensor:
            # Past the checkpointing wrapper and past forward hooks: part of the same forward.
            own = {name: _for_rows(name, value, rows) for name, value in kwargs.items()}
            own["attention_mask"] = attention
            out = plain(rows, *args, **own)
            return out[0] if isinstance(out, tuple) else out

        own = {**kwargs, "attention_mask": fam_call.enter(self.fam_index, hidden_states, reenter)}
        return plain(hidden_states, *args, **own)


def _for_rows(name: str, value: Any, rows: Tensor) -> Any:
    """A layer's keyword for FAM rows in place of tokens: all stand at position 0, see rotary.py."""
    if name not in ("position_embeddings", "position_ids"):
        return value
    if isinstance(value, Tensor):
        return value[:1, :1].expand(rows.shape[0], rows.shape[1], *value.shape[2:])
    if isinstance(value, (tuple, list)):
        return type(value)(_for_rows(name, v, rows) for v in value)
    return value


# ---- the decoder


class FamDecoder:
    """A decoder that reads with a `Memory`. Mixed in before the family's own decoder class."""

    config: Any
    training: bool
    gradient_checkpointing: bool

    @property
    def fam_config(self) -> FamConfig:
        """The geometry, as kept in the model's configuration."""
        return FamConfig.from_dict(self.config.fam)

    @property
    def rotaries(self) -> tuple[Rotary, ...]:
        """Each layer's rotary positions, found when first needed: weights must be loaded."""
        found = self.__dict__.get("_fam_rotaries")
        if found is None:
            found = find_rotaries(self, len(_layers(self)))  # type: ignore[arg-type]
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
        **kwargs: Any,
    ) -> ModelOutput | tuple[Any, ...]:
        """Read new tokens, layer-major over all blocks of the call (section 3, docs/method.md).

        Args:
            input_ids, inputs_embeds: (R, T) or (R, T, d), new tokens of R streams.
            attention_mask: (R, T) or longer, of which the last T columns count: 0 for padding, which
                does not enter the stream.
            position_ids: ignored; where a token stands follows from the memory.
            past_key_values: the streams' memory, advanced in place once the call has succeeded.
            use_cache: whether to make a memory if none is given.
        """
        inputs = input_ids if inputs_embeds is None else inputs_embeds
        if inputs is None or inputs.shape[1] == 0:
            raise ValueError("Nothing to read: give input_ids or inputs_embeds of at least one token.")
        self._check_call(past_key_values, inputs)
        config, memory = self.fam_config, past_key_values
        if use_cache is None:
            use_cache = bool(getattr(self.config, "use_cache", True))
        if memory is None and use_cache and not (self.training and self.gradient_checkpointing):
            memory = Memory(config, inputs.shape[0], len(_layers(self)))
        call = self._call(config, memory, inputs, attention_mask)
        output = self.plain_forward(
            input_ids=input_ids if inputs_embeds is None else None,
            inputs_embeds=inputs_embeds,
            # Queries and keys are to arrive unrotated: everything stands at position 0.
            position_ids=torch.zeros(1, inputs.shape[1], dtype=torch.long, device=inputs.device),
            fam_call=call,
            **kwargs,
        )
        if memory is not None:
            call.commit(memory)
        output["past_key_values"] = memory
        return output if return_dict is not False else output.to_tuple()

    def _call(
        self, config: FamConfig, memory: Memory | None, inputs: Tensor, attention_mask: Tensor | None
    ) -> Call:
        rows, columns = inputs.shape[:2]
        state = Memory(config, rows, len(_layers(self))) if memory is None else memory
        plan = CallPlan(
            config=config,
            starts=state.position,
            columns=columns,
            valid=_valid_columns(attention_mask, rows, columns),
            past_length=state.past_length,
        )
        prompt = None
        if config.has_feedback:
            # Looked up at each call: PEFT puts another module in its place.
            slots = torch.arange(config.fam_length, device=inputs.device)
            prompt = self.fam_prompt(slots)  # type: ignore[attr-defined]
        before = list(state.layers_memory)
        return Call(config, plan, before, self.rotaries, prompt, keep=memory is not None)

    def _check_call(self, memory: object, inputs: Tensor) -> None:
        if self.config._attn_implementation != ATTENTION_NAME:
            raise ValueError(
                f"A TransformerFAM needs its own attention, not {self.config._attn_implementation!r}; "
                "choose how it is computed with FamConfig(backend=...)."
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
        differences = self.fam_config.memory_differences(memory.config)
        if differences:
            raise ValueError(f"The memory was made with another {', '.join(differences)}.")


def _valid_columns(attention_mask: Tensor | None, rows: int, columns: int) -> Tensor | None:
    """(R, T) bool on the CPU, or None if no token is padding."""
    if attention_mask is None:
        return None
    if attention_mask.dim() != 2 or attention_mask.shape[0] != rows or attention_mask.shape[1] < columns:
        raise ValueError(
            f"attention_mask must have 2 dimensions, (rows, tokens), and cover the {columns} new tokens "
            f"of {rows} rows; got {tuple(attention_mask.shape)}."
        )
    valid = attention_mask[:, -columns:].bool().cpu()
    return None if bool(valid.all()) else valid


# ---- the causal language model


class FamForCausalLM:
    """What a converted model adds to its family's class."""

    config: Any
    _is_stateful = True  # transformers then refuses assisted generation and prompt lookup by name

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        _install(self)  # type: ignore[arg-type]

    @property
    def fam_config(self) -> FamConfig:
        """The geometry, as kept in the model's configuration."""
        return FamConfig.from_dict(self.config.fam)

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """Activation checkpointing, without re-entrance: FAM of one layer feeds the next on the side."""
        options = {"use_reentrant": False, **(gradient_checkpointing_kwargs or {})}
        if options["use_reentrant"]:
            raise ValueError("A TransformerFAM cannot be checkpointed with use_reentrant=True; leave it out.")
        super().gradient_checkpointing_enable(options, **kwargs)  # type: ignore[misc]

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
                model_kwargs["past_key_values"] = Memory.for_model(self, rows)  # type: ignore[arg-type]
        elif isinstance(memory, Memory):
            memory._is_user_defined = True  # type: ignore[attr-defined]
            if memory.rows != rows and memory.rows * copies == rows:
                # Several continuations of one stream: each on its own copy.
                index = torch.arange(memory.rows).repeat_interleave(copies)
                model_kwargs["past_key_values"] = memory.select_rows(index)


# ---- classes made for a family


@cache
def family_config(config_class: type[PreTrainedConfig]) -> type[PreTrainedConfig]:
    """The configuration class of `config_class`'s TransformerFAM: the same and `fam`."""
    from transformerfam.auto import FamFamilyConfig

    name = f"Fam{config_class.__name__}"
    fields = {"__module__": __name__, "__annotations__": {"fam": "dict | None"}, "fam": None}
    return type(name, (FamFamilyConfig, config_class), fields)


@cache
def family_model(model_class: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """The model class of `model_class`'s TransformerFAM, known to transformers' Auto classes."""
    from transformerfam.auto import register_family

    config_class = family_config(model_class.config_class)
    name = f"Fam{model_class.__name__}"
    made = type(name, (FamForCausalLM, model_class), {"__module__": model_class.__module__, "config_class": config_class})
    register_family(config_class, made)
    return made


@cache
def _mixed(mixin: type, base: type) -> type:
    """`base` with `mixin` before it, under its own name: FSDP, device maps and the recording of
    hidden states go by class names."""
    return type(base.__name__, (mixin, base), {"__module__": base.__module__, "__qualname__": base.__qualname__})


def _install(model: PreTrainedModel) -> None:
    decoder = _decoder(model)
    layers = _layers(decoder)
    for index, layer in enumerate(layers):
        layer.__class__ = _mixed(FamLayer, type(layer))
        layer.fam_index = index
    decoder.__class__ = _mixed(FamDecoder, type(decoder))
    model.config._attn_implementation = ATTENTION_NAME
    _add_prompt(model)


def _uninstall(model: PreTrainedModel, model_class: type, config_class: type, attention: str) -> None:
    decoder = _decoder(model)
    for layer in _layers(decoder):
        layer.__class__ = type(layer).__mro__[2]
    decoder.__class__ = type(decoder).__mro__[2]
    decoder._modules.pop("fam_prompt", None)
    model.__class__, model.config.__class__ = model_class, config_class
    del model.config.fam
    model.config._attn_implementation = attention


def _add_prompt(model: PreTrainedModel) -> None:
    decoder = _decoder(model)
    length = decoder.fam_config.fam_length
    if not length:
        return
    weight = decoder.get_input_embeddings().weight
    dtype = weight.dtype if weight.is_floating_point() else torch.get_default_dtype()
    prompt = nn.Embedding(length, model.config.hidden_size, device=weight.device, dtype=dtype)
    if not prompt.weight.is_meta:
        nn.init.normal_(prompt.weight, std=getattr(model.config, "initializer_range", 0.02))
    decoder.fam_prompt = prompt


# ---- finding our way in a model


def _decoder(model: PreTrainedModel) -> Any:
    return model.get_decoder()


def _layers(decoder: Any) -> list[nn.Module]:
    layers = getattr(decoder, "layers", None)
    return [] if layers is None else list(layers)


def _check_convertible(model: object) -> None:
    if not isinstance(model, PreTrainedModel):
        raise UnsupportedModelError(f"convert needs a model of transformers, not a {type(model).__name__}.")
    name = model.config.model_type
    if is_transformerfam(model):
        raise UnsupportedModelError("This model is a TransformerFAM already; use reconfigure(model, config).")
    if model.config.is_encoder_decoder:
        raise UnsupportedModelError(f"A {name} model has an encoder; TransformerFAM needs a decoder alone.")
    if model.config.get_text_config() is not model.config:
        raise UnsupportedModelError(f"This {name} model reads more than text; convert its language model alone.")
    if not type(model).__name__.endswith("ForCausalLM"):
        raise UnsupportedModelError(f"A {type(model).__name__} is no causal language model of transformers.")
    layers = _layers(_decoder(model))
    if not layers or not all(isinstance(layer, GradientCheckpointingLayer) for layer in layers):
        raise UnsupportedModelError(f"The decoder layers of a {name} model are not built as transformers 5 builds them.")
    strange = set(getattr(model.config, "layer_types", None) or ()) - _KNOWN_LAYERS
    if strange:
        raise UnsupportedModelError(
            f"This {name} model has layers of {', '.join(sorted(strange))}, not plain attention over tokens."
        )
    if getattr(model.config, "use_bidirectional_attention", None):
        raise UnsupportedModelError(f"This {name} model attends to the future as well; it cannot read a stream.")
