"""Put TransformerFAM on a pretrained model of transformers, without new layer weights.

Three classes of a model get a subclass each (`modeling`), made when needed from whatever family comes,
so there is no code per family.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from transformerfam.auto import FamFamilyConfig, register_family
from transformerfam.config import FamConfig
from transformerfam.memory import all_or_nothing
from transformerfam.modeling import FamForCausalLM, install, uninstall
from transformerfam.modules import adapted_modules, add_gates, add_prompt, decoder_of, layers_of
from transformerfam.probe import UnsupportedModelError, run_probe

PromptStart = Literal["start", "vocabulary"]
_PART_OF_OTHERS = 0.1
_KNOWN_LAYERS = {"full_attention", "sliding_attention", "sparse", "dense"}


def convert(
    model: PreTrainedModel,
    config: FamConfig | None = None,
    *,
    prompt: PromptStart = "start",
    seed: int = 0,
) -> PreTrainedModel:
    """Turn a causal language model of transformers into its TransformerFAM, in place.

    Args:
        model: any decoder with rotary positions whose attention transformers lets us replace.
        config: geometry; `FamConfig()` by default, which begins nearly without harm.
        prompt: what the FAM prompt starts from, see `initialise_prompt`.
        seed: chooses vocabulary tokens for it.

    Returns:
        `model`, now with `model.fam_config`. Its only new parameter is the `fam_prompt` of its
        decoder, (N, d), in the scale that the first layer reads (B.1), or (layers · N, d) if streams
        begin with a prefix for each layer; with a compressive memory, its `memory_gates`, (layers, H).

    Raises:
        UnsupportedModelError: if the model cannot be converted; it is left as it was.
        ValueError: if there is no such `prompt`.
    """
    config = FamConfig() if config is None else config
    _check_prompt(prompt)
    _check_convertible(model)
    expected, plain_class = _rehearse(model), type(model)
    plain_config = _take_own_config(model)
    try:
        model.config.__class__ = family_config(type(model.config))
        model.config.fam = config.to_dict()
        model.__class__ = family_model(type(model))
        install(model)
        _check_rehearsal(model, expected)
    except BaseException as error:
        uninstall(model, plain_class)
        _point_at(model, plain_config)
        if isinstance(error, UnsupportedModelError) or not isinstance(error, Exception):
            raise
        raise UnsupportedModelError(
            f"A {plain_config.model_type} model does not run as a TransformerFAM "
            f"({type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no reason'})."
        ) from error
    initialise_prompt(model, prompt, seed)
    return model


def restore(model: PreTrainedModel, attention: str = "sdpa") -> PreTrainedModel:
    """The inverse of `convert`, in place: the plain model with transformers' own attention.

    An adapter of FAM alone is switched off: no way of FAM is left for it.
    """
    if not is_transformerfam(model):
        return model
    if model.fam_config.adapted == "fam":
        for module in adapted_modules(decoder_of(model)):
            module.enable_adapters(False)
    plain_class = type(model).__bases__[1]
    uninstall(model, plain_class)
    config = _take_own_config(model)
    model.config.__class__ = type(config).__bases__[1]
    del model.config.fam
    model.config._attn_implementation = attention
    return model


# ---- a rehearsal: a few tokens before and after


_REHEARSAL = FamConfig.paper(block_size=3, memory_segments=3, fam_length=0)


@torch.no_grad()
def _rehearse(model: PreTrainedModel, pieces: tuple[int, ...] = ()) -> Tensor:
    """(T, vocabulary): what the model says about eight tokens, read in `pieces`, without dropout."""
    training = model.training
    model.eval()
    try:
        embedding = model.get_input_embeddings().weight
        tokens = (torch.arange(1, 9)[None] * 5 % embedding.shape[0]).to(embedding.device)
        if not pieces:
            return model(tokens, use_cache=False).logits[0]
        memory, said = None, []
        for piece in tokens.split(list(pieces), dim=1):
            output = model(piece, past_key_values=memory, use_cache=True)
            memory = output.past_key_values
            said.append(output.logits[0])
        return torch.cat(said)
    finally:
        model.train(training)


def _check_rehearsal(model: PreTrainedModel, expected: Tensor) -> None:
    """Refuse a model whose results change.

    With feedback off and a window that holds all, the conversion must change nothing; with feedback
    on, reading in pieces must be the same as reading at once.
    """
    chosen = model.config.fam
    try:
        model.config.fam = _REHEARSAL.to_dict()
        same = _alike(_rehearse(model, (4, 4)), expected)
        model.config.fam = _REHEARSAL.replace(fam_length=1, memory_segments=0).to_dict()
        add_prompt(model)
        same = same and _same_in_pieces(model)
    finally:
        model.config.fam = chosen
        decoder_of(model)._modules.pop("fam_prompt", None)
        add_prompt(model)
    if not same:
        raise UnsupportedModelError(
            f"A {model.config.model_type} model gives other results when its attention is ours; "
            "its layers do something with attention that is not understood."
        )


def _same_in_pieces(model: PreTrainedModel) -> bool:
    """Whether reading in pieces is the same as reading at once.

    A random prompt may be one that a model blows up, and roundings with it: what is not the same in
    half precision is looked at again in float32, and all tensors are then put back as they were.
    """
    if _alike(_rehearse(model, (4, 1, 3)), _rehearse(model)):
        return True
    dtype = model.get_input_embeddings().weight.dtype
    if dtype not in (torch.float16, torch.bfloat16) or getattr(model, "is_quantized", False):
        return False
    kept = [(tensor, tensor.data) for tensor in (*model.parameters(), *model.buffers())]
    try:
        for tensor, data in kept:
            tensor.data = data.float() if data.is_floating_point() else data
        return _alike(_rehearse(model, (4, 1, 3)), _rehearse(model))
    finally:
        for tensor, data in kept:
            tensor.data = data


def _alike(a: Tensor, b: Tensor) -> bool:
    # Half precision rounds to three digits in every layer; a wrong pattern is off by much more.
    tolerance = 1e-3 if b.dtype in (torch.float32, torch.float64) else 0.1
    return bool((a - b).float().norm() < tolerance * b.float().norm())


def _take_own_config(model: PreTrainedModel) -> PreTrainedConfig:
    """Give `model` a configuration that no other model shares; returns the one it had."""
    shared = model.config
    _point_at(model, copy.deepcopy(shared))
    return shared


def _point_at(model: PreTrainedModel, config: PreTrainedConfig) -> None:
    old = model.config
    for module in model.modules():
        if getattr(module, "config", None) is old:
            module.config = config


def reconfigure(
    model: PreTrainedModel,
    config: FamConfig,
    *,
    prompt: PromptStart = "start",
    seed: int = 0,
) -> PreTrainedModel:
    """Change the geometry of a TransformerFAM in place. Gates and a prompt that fits are kept.

    Memories made before do not fit a model of another geometry.
    """
    if not is_transformerfam(model):
        return convert(model, config, prompt=prompt, seed=seed)
    _check_prompt(prompt)
    decoder, before = decoder_of(model), model.fam_config
    model.config.fam = config.to_dict()
    kept, rows = decoder._modules.get("fam_prompt"), config.prompt_rows(len(layers_of(decoder)))
    # A prompt may have as many rows as a prefix.
    fits = not before.has_feedback or before.fam_start == config.fam_start
    if config.has_feedback and (kept is None or kept.weight.shape[0] != rows or not fits):
        add_prompt(model)
        initialise_prompt(model, prompt, seed)
        model.fam_trained = False  # see `models.is_trained`
    add_gates(model)
    return model


def twin(model: PreTrainedModel, config: FamConfig) -> PreTrainedModel:
    """A TransformerFAM under another geometry beside the one it has: the weights are shared."""
    shared = {id(t): t for t in [*model.parameters(), *model.buffers()]}
    return reconfigure(copy.deepcopy(model, shared), config)


def is_transformerfam(model: object) -> bool:
    """Whether `model` was converted."""
    return isinstance(model, FamForCausalLM)


def _check_prompt(prompt: str) -> None:
    if prompt not in (known := get_args(PromptStart)):
        raise ValueError(f"prompt must be one of {', '.join(known)}, not {prompt!r}.")


@torch.no_grad()
def initialise_prompt(model: PreTrainedModel, prompt: PromptStart = "start", seed: int = 0) -> None:
    """Set the rows of the FAM prompt to what the first layer reads for tokens of the vocabulary.

    Going through the model brings in whatever scale its family gives to embeddings. A prefix gets for
    each layer what that layer would read, if none below it looked at other tokens.

    Args:
        model: a TransformerFAM.
        prompt: `vocabulary`: N tokens drawn by `seed`. `start`: the token that texts start with,
            with a tenth of such a token added so that rows differ. A pretrained model has learned
            to look at its first token without harm, and then looks at FAM without much harm.
            The same as `vocabulary` for a model whose configuration names no such token.
        seed: of the draw.
    """
    decoder = decoder_of(model)
    length = decoder.fam_config.fam_length
    if not length:
        return
    vocabulary = decoder.get_input_embeddings().weight.shape[0]
    tokens = torch.randint(vocabulary, (length,), generator=torch.Generator().manual_seed(seed))
    start = _start_token(model) if prompt == "start" else None
    if start is not None:
        tokens = torch.cat([tokens, torch.tensor([start])])
    probe = run_probe(decoder, tokens, torch.zeros(len(tokens), dtype=torch.long))
    layers = len(probe.inputs) if decoder.fam_config.fam_start == "prefix" else 1
    rows = torch.cat([probe.inputs[layer] for layer in range(layers)])  # (layers, tokens, d)
    if start is not None:
        rows = rows[:, -1:] + _PART_OF_OTHERS * rows[:, :-1]
    decoder.fam_prompt.weight.copy_(rows.flatten(0, 1))


def _start_token(model: PreTrainedModel) -> int | None:
    """The token that the model's texts start with, if its configuration says so."""
    for config in (model.config, getattr(model, "generation_config", None)):
        token = getattr(config, "bos_token_id", None)
        if isinstance(token, int) and 0 <= token < model.get_input_embeddings().weight.shape[0]:
            return token
    return None


# ---- classes made for a family


def _make_config(config_class: Any) -> Any:
    """The configuration class of `config_class`'s TransformerFAM: the same and `fam`."""
    name = f"Fam{config_class.__name__}"
    fields = {"__module__": __name__, "__annotations__": {"fam": "dict | None"}, "fam": None}
    return type(name, (FamFamilyConfig, config_class), fields)


def _make_model(model_class: Any) -> Any:
    """The model class of `model_class`'s TransformerFAM, known to transformers' Auto classes."""
    config_class = family_config(model_class.config_class)
    name = f"Fam{model_class.__name__}"
    fields = {
        "__module__": model_class.__module__,
        "config_class": config_class,
        "forward": all_or_nothing(model_class.forward),
    }
    made = type(name, (FamForCausalLM, model_class), fields)
    register_family(config_class, made)
    return made


family_config: Callable[[Any], Any] = cache(_make_config)
family_model: Callable[[Any], Any] = cache(_make_model)


def blank_config(config_class: type[PreTrainedConfig]) -> PreTrainedConfig:
    """An empty configuration, for unpickling."""
    made = family_config(config_class)
    blank: PreTrainedConfig = made.__new__(made)
    return blank


def blank_model(model_class: type[PreTrainedModel]) -> PreTrainedModel:
    """An empty model, for unpickling."""
    made = family_model(model_class)
    blank: PreTrainedModel = made.__new__(made)
    return blank


# ---- what can be converted


def _check_convertible(model: object) -> None:
    if not isinstance(model, PreTrainedModel):
        raise UnsupportedModelError(
            f"convert needs a model of transformers, not a {type(model).__name__}."
        )
    name = model.config.model_type
    if is_transformerfam(model):
        raise UnsupportedModelError(
            "This model is a TransformerFAM already; use reconfigure(model, config)."
        )
    if model.config.is_encoder_decoder:
        raise UnsupportedModelError(
            f"A {name} model has an encoder; TransformerFAM needs a decoder alone."
        )
    if model.config.get_text_config() is not model.config:
        raise UnsupportedModelError(
            f"This {name} model reads more than text; convert its language model alone."
        )
    if not type(model).__name__.endswith("ForCausalLM"):
        raise UnsupportedModelError(
            f"A {type(model).__name__} is no causal language model of transformers."
        )
    layers = layers_of(decoder_of(model))
    if not layers or not all(isinstance(layer, GradientCheckpointingLayer) for layer in layers):
        raise UnsupportedModelError(
            f"The decoder layers of a {name} model are not built as transformers 5 builds them."
        )
    if model.get_input_embeddings().weight.is_meta:
        raise UnsupportedModelError("This model has no weights yet; load them before converting.")
    strange = set(getattr(model.config, "layer_types", None) or ()) - _KNOWN_LAYERS
    if strange:
        raise UnsupportedModelError(
            f"This {name} model has layers of {', '.join(sorted(strange))}, not plain attention "
            "over tokens."
        )
    if getattr(model.config, "use_bidirectional_attention", None):
        raise UnsupportedModelError(
            f"This {name} model attends to the future as well; it cannot read a stream."
        )
