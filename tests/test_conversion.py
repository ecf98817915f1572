"""Conversion keeps what the model is; what cannot be converted is refused by name and left alone."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from families import FAMILIES, VOCABULARY, converted, some_tokens, tiny
from tokenizers import Tokenizer, models
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from variants import VARIANTS

from transformerfam import (
    FamConfig,
    Memory,
    UnsupportedModelError,
    conversion,
    convert,
    reconfigure,
)
from transformerfam.conversion import is_transformerfam, restore

B = 6
CONFIG = FamConfig.paper(block_size=B, memory_segments=1, fam_length=3, sink_tokens=1)
LENGTH = 3 * B + 2
IDS = some_tokens(2, LENGTH)


@torch.no_grad()
def logits(model: PreTrainedModel, ids: Tensor = IDS, **options: Any) -> Tensor:
    return model(ids, **options).logits


# ---- what conversion changes


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning")
def test_so_many_tokens_are_read_as_the_original_model_reads_them(name: str) -> None:
    config = VARIANTS[name]
    plain = LENGTH if config.plain_length is None else config.plain_length
    read, original = logits(convert(tiny(), config)), logits(tiny())
    torch.testing.assert_close(read[:, :plain], original[:, :plain], atol=1e-5, rtol=0)
    if plain and plain < LENGTH:  # and no further
        assert not torch.allclose(read[:, plain:], original[:, plain:], atol=1e-5)


def test_the_prompt_is_the_only_new_parameter() -> None:
    model, plain = tiny(), tiny()
    for parameter in model.model.layers[0].parameters():
        parameter.requires_grad_(False)
    assert convert(model.train(), CONFIG) is model
    assert model.training and is_transformerfam(model)
    before = dict(plain.named_parameters())
    after = dict(model.named_parameters())
    assert after.keys() - before.keys() == {"model.fam_prompt.weight"}
    assert all(torch.equal(after[name], weight) for name, weight in before.items())
    assert not any(p.requires_grad for p in model.model.layers[0].parameters())
    assert after["model.fam_prompt.weight"].requires_grad

    without = convert(tiny(), CONFIG.replace(fam_length=0))
    assert dict(without.named_parameters()).keys() == before.keys()


def test_the_default_is_that_of_the_configuration() -> None:
    assert convert(tiny()).fam_config == FamConfig()


def test_the_model_is_still_of_its_family() -> None:
    model = convert(tiny("Qwen3"), CONFIG)
    assert isinstance(model, transformers.Qwen3ForCausalLM)
    assert isinstance(model.config, transformers.Qwen3Config)
    assert model.config.model_type == "qwen3"
    assert type(model.model).__name__ == "Qwen3Model"


@pytest.mark.parametrize(
    ("family", "scale"),
    [("Llama", 1.0), ("Gemma 2", 32**0.5), ("Gemma 3 (text)", 32**0.5), ("Granite", 3.0)],
)
def test_the_prompt_starts_as_what_the_first_layer_reads_for_real_tokens(
    family: str, scale: float
) -> None:
    model = convert(tiny(family), CONFIG, prompt="vocabulary")
    prompt = model.model.fam_prompt.weight.detach()
    embeddings = model.get_input_embeddings().weight.detach() * scale
    distances = torch.cdist(prompt, embeddings)
    near = 1e-2 * float(prompt.norm(dim=1).min())
    assert float(distances.min(1).values.max()) < near
    # By default every row is the token that texts start with, and a tenth of one of those tokens.
    start = convert(tiny(family), CONFIG).model.fam_prompt.weight.detach()
    first = embeddings[model.config.bos_token_id]
    assert float((start - first - 0.1 * prompt).norm(dim=1).max()) < near


def test_a_model_without_a_first_token_starts_from_its_vocabulary() -> None:
    model = tiny()
    model.config.bos_token_id = model.generation_config.bos_token_id = None
    ours = convert(model, CONFIG).model.fam_prompt.weight
    assert torch.equal(ours, convert(tiny(), CONFIG, prompt="vocabulary").model.fam_prompt.weight)


def test_a_start_that_there_is_not_is_refused_before_anything_changes() -> None:
    model = tiny()
    wrong: Any = "bos"
    for change in (convert, reconfigure):
        with pytest.raises(ValueError, match="prompt must be one of start, vocabulary, not 'bos'"):
            change(model, CONFIG, prompt=wrong)
        assert not is_transformerfam(model)
    converted = convert(model, CONFIG)
    with pytest.raises(ValueError, match="prompt must be one of"):
        reconfigure(converted, CONFIG.replace(fam_length=5), prompt=wrong)
    assert model.fam_config == CONFIG


def test_a_seed_chooses_the_prompt() -> None:
    prompts = [convert(tiny(), CONFIG, seed=seed).model.fam_prompt.weight for seed in (0, 0, 1)]
    assert torch.equal(prompts[0], prompts[1])
    assert not torch.equal(prompts[0], prompts[2])


def test_models_that_share_a_configuration_stay_plain() -> None:
    first = tiny()
    second = type(first)(first.config).double().eval()
    before = logits(second)
    convert(first, CONFIG)
    assert torch.equal(logits(second), before)
    assert not hasattr(second.config, "fam")
    copy.deepcopy(second).generate(IDS, max_new_tokens=2, do_sample=False)


@pytest.mark.parametrize("family", ["Llama", "Phi-3", "GPT-NeoX"])
def test_it_can_be_undone(family: str) -> None:
    model, plain = convert(tiny(family), CONFIG), tiny(family)
    restored = restore(model)
    assert type(restored) is type(plain) and type(restored.config) is type(plain.config)
    assert restored.state_dict().keys() == plain.state_dict().keys()
    torch.testing.assert_close(logits(restored), logits(plain))
    assert not is_transformerfam(restored)
    assert torch.equal(logits(convert(restored, CONFIG)), logits(convert(plain, CONFIG)))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
@pytest.mark.parametrize("family", ["Llama", "Gemma 2", "Mixtral"])
def test_a_copy_is_independent(family: str, duplicate: Callable[[Any], Any]) -> None:
    model = convert(tiny(family, torch.float32), CONFIG)
    before, twin = logits(model), duplicate(model)
    assert type(twin) is type(model) and twin.fam_config == model.fam_config
    assert torch.equal(logits(twin), before)
    reconfigure(twin, CONFIG.replace(memory_segments=0))
    with torch.no_grad():
        twin.get_decoder().fam_prompt.weight.add_(1)
    assert model.fam_config == CONFIG
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_converts_in_half_precision(family: str, dtype: torch.dtype) -> None:
    model = convert(tiny(family, dtype), CONFIG)
    assert model.get_decoder().fam_prompt.weight.dtype == dtype
    assert bool(torch.isfinite(logits(model)).all())


# ---- another geometry


def test_reconfiguring_keeps_a_prompt_of_the_same_length() -> None:
    model = convert(tiny(), CONFIG)
    with torch.no_grad():
        model.model.fam_prompt.weight.add_(1)
    trained, before = model.model.fam_prompt.weight.detach().clone(), logits(model)
    for config in (CONFIG.replace(block_size=4), CONFIG.replace(fam_length=0), CONFIG):
        assert reconfigure(model, config) is model
        assert model.fam_config == config
        logits(model)
    assert torch.equal(model.model.fam_prompt.weight, trained)
    assert torch.equal(logits(model), before)
    reconfigure(model, CONFIG.replace(fam_length=2))
    assert model.model.fam_prompt.weight.shape == (2, 32)
    logits(model)


def test_reconfiguring_equals_converting_anew() -> None:
    other = CONFIG.replace(block_size=4, attention="swa", window=3)
    model = reconfigure(convert(tiny(), CONFIG), other)
    assert torch.equal(logits(model), logits(convert(tiny(), other)))
    assert torch.equal(logits(reconfigure(tiny(), other)), logits(model))


@pytest.mark.parametrize(
    "name", ["paper", "prefix", "full", "compressive, delta", "feedback segments", "cap per slot"]
)
def test_a_model_of_the_tests_is_what_converting_gives(name: str) -> None:
    ours, expected = converted(VARIANTS[name]), convert(tiny(), VARIANTS[name])
    assert ours.config.to_dict() == expected.config.to_dict()
    ours_by_name, expected_by_name = (dict(m.named_parameters()) for m in (ours, expected))
    assert ours_by_name.keys() == expected_by_name.keys()
    assert all(torch.equal(p, expected_by_name[n]) for n, p in ours_by_name.items())
    assert torch.equal(logits(ours), logits(expected))


def test_a_memory_of_the_geometry_before_is_refused() -> None:
    model = convert(tiny(), CONFIG)
    memory = Memory.for_model(model, 2)
    logits(model, past_key_values=memory)
    reconfigure(model, CONFIG.replace(memory_segments=2))
    with pytest.raises(ValueError, match="memory_segments"):
        logits(model, past_key_values=memory)


# ---- saved and loaded


def saved(family: str, folder: Path, **changes: Any) -> PreTrainedModel:
    model = convert(
        tiny(family, torch.float32), CONFIG.replace(feedback_norm=(1.0, 2.0, 3.0), **changes)
    )
    with torch.no_grad():
        if model.fam_config.has_feedback:
            model.get_decoder().fam_prompt.weight.add_(0.5)
    model.save_pretrained(folder)
    return model


ROUND_TRIPS = [
    "Llama",
    "Gemma 3 (text)",
    "GPT-NeoX",
    "Phi-3",
    "Mixtral",
    "Qwen3-MoE",
    "gpt-oss",
    "Granite",
]


@pytest.mark.parametrize("family", ROUND_TRIPS)
def test_transformers_loads_what_was_saved(family: str, tmp_path: Path) -> None:
    model = saved(family, tmp_path)
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    assert type(loaded) is type(model) and loaded.fam_config == model.fam_config
    again = type(model).from_pretrained(tmp_path)
    for found in (loaded, again):
        weights = found.state_dict()
        assert all(torch.equal(weights[name], w) for name, w in model.state_dict().items())
        # Products of matrices round by where in memory these lie.
        torch.testing.assert_close(logits(found), logits(model), rtol=0, atol=1e-5)


def test_a_second_round_trip_changes_nothing(tmp_path: Path) -> None:
    model = saved("Llama", tmp_path / "a")
    AutoModelForCausalLM.from_pretrained(tmp_path / "a").save_pretrained(tmp_path / "b")
    configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in "ab"]
    assert configs[0] == configs[1]
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "b")), logits(model))


def test_what_config_json_says(tmp_path: Path) -> None:
    model = saved("Gemma 3 (text)", tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["model_type"] == "transformerfam"
    assert written["base_model_type"] == "gemma3_text"
    assert FamConfig.from_dict(written["fam"]) == model.fam_config
    assert written["sliding_window"] == 20
    config = AutoConfig.from_pretrained(tmp_path)
    assert type(config) is type(model.config)
    assert FamConfig.from_dict(config.fam) == model.fam_config


@pytest.mark.parametrize("family", ROUND_TRIPS)
def test_the_plain_class_loads_it_and_leaves_the_prompt_over(family: str, tmp_path: Path) -> None:
    model = saved(family, tmp_path)
    plain_class = type(tiny(family))
    plain, info = plain_class.from_pretrained(tmp_path, output_loading_info=True)
    prompt = f"{model.base_model_prefix}.fam_prompt.weight"
    assert {name: set(found) for name, found in info.items() if found} == {
        "unexpected_keys": {prompt}
    }
    torch.testing.assert_close(logits(plain), logits(tiny(family, torch.float32)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_it_is_loaded_in_another_type(dtype: torch.dtype, tmp_path: Path) -> None:
    model = saved("Llama", tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    assert loaded.model.fam_prompt.weight.dtype == dtype
    error = (logits(loaded).double() - logits(model).double()).norm() / logits(model).norm()
    assert float(error) < (0.03 if dtype == torch.bfloat16 else 1e-5)


def test_an_attention_asked_for_when_loading_does_no_harm(tmp_path: Path) -> None:
    model = saved("Llama", tmp_path)
    for attention in ("sdpa", "eager"):
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation=attention)
        assert torch.equal(logits(loaded), logits(model))
    loaded.set_attn_implementation("eager")
    with pytest.raises(ValueError, match=r"its own attention, not 'eager'.*FamConfig\(backend"):
        logits(loaded)


def test_it_is_made_from_its_configuration_alone(tmp_path: Path) -> None:
    saved("Llama", tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_config(config).eval()
    assert bool(torch.isfinite(logits(model)).all())
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(config)
    assert empty.model.fam_prompt.weight.is_meta
    model = empty.to_empty(device="cpu")
    model.load_state_dict(tiny(dtype=torch.float32).state_dict(), strict=False)
    assert model.model.fam_prompt.weight.shape == (3, 32)


def test_a_tokenizer_in_the_same_folder_is_found(tmp_path: Path) -> None:
    saved("Llama", tmp_path)
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w3"))
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w2").save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer("w7")["input_ids"] == [7]
    assert tokenizer.eos_token_id == 2


def test_a_configuration_of_a_later_version_is_refused(tmp_path: Path) -> None:
    saved("Llama", tmp_path)
    path = tmp_path / "config.json"
    written = json.loads(path.read_text())
    path.write_text(json.dumps({**written, "fam": {**written["fam"], "kind": "new"}}))
    with pytest.raises(
        ValueError, match="kind, which this version of transformerfam does not know"
    ):
        logits(AutoModelForCausalLM.from_pretrained(tmp_path))
    path.write_text(json.dumps({**written, "base_model_type": "gpt9"}))
    with pytest.raises(ValueError, match="family 'gpt9'"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


# ---- one call


@pytest.mark.parametrize("family", FAMILIES)
def test_hidden_states_are_those_of_the_tokens(family: str) -> None:
    model, plain = convert(tiny(family, torch.float32), CONFIG), tiny(family, torch.float32)
    with torch.no_grad():
        ours = model(IDS, output_hidden_states=True).hidden_states
        theirs = plain(IDS[:, :B], output_hidden_states=True).hidden_states
    assert len(ours) == len(theirs) == plain.config.num_hidden_layers + 1
    for mine, its in zip(ours, theirs, strict=True):
        assert mine.shape == (2, LENGTH, 32)
        # In block 0 nothing is seen but the block.
        torch.testing.assert_close(mine[:, :B], its, rtol=0, atol=2e-3)


@pytest.mark.parametrize("family", ["Mixtral", "Qwen3-MoE", "gpt-oss"])
def test_experts_are_balanced_over_tokens_alone(family: str) -> None:
    """Routing of FAM rows is none of the tokens' router logits, and not in their auxiliary loss."""
    model, plain = convert(tiny(family, torch.float32), CONFIG), tiny(family, torch.float32)
    mask = torch.ones_like(IDS)
    mask[1, :4] = 0
    for ids, options in ((IDS[:, :B], {}), (IDS, {}), (IDS, {"attention_mask": mask})):
        with torch.no_grad():
            ours = model(ids, labels=ids, output_router_logits=True, **options)
            theirs = plain(ids, labels=ids, output_router_logits=True, **options)
        assert [r.shape for r in ours.router_logits] == [r.shape for r in theirs.router_logits]
        first = slice(0, 0 if options else B)  # block 0 of row 0 is as in the plain model
        for mine, its in zip(ours.router_logits, theirs.router_logits, strict=True):
            torch.testing.assert_close(mine[first], its[first], rtol=0, atol=1e-3)
    torch.testing.assert_close(
        model(IDS[:, :B], labels=IDS[:, :B], output_router_logits=True).aux_loss,
        plain(IDS[:, :B], labels=IDS[:, :B], output_router_logits=True).aux_loss,
    )


def test_embeddings_are_as_good_as_ids_and_positions_are_ignored() -> None:
    model = convert(tiny(), CONFIG)
    expected, embeds = logits(model), model.get_input_embeddings()(IDS)
    with torch.no_grad():
        assert torch.equal(model(inputs_embeds=embeds).logits, expected)
    for positions in (torch.zeros_like(IDS), torch.arange(LENGTH)[None] + 10**6):
        assert torch.equal(logits(model, position_ids=positions), expected)


def test_texts_that_are_packed_into_a_row_are_refused_and_padding_is_not() -> None:
    model = convert(tiny(), CONFIG)
    packed = torch.cat([torch.arange(LENGTH // 2), torch.arange(LENGTH - LENGTH // 2)])[None]
    with pytest.raises(ValueError, match=r"begin anew within a row.*give each text a row"):
        model(IDS, position_ids=packed.expand(2, -1))
    mask = torch.ones(2, LENGTH)
    mask[1, :4] = 0
    padded = (mask.long().cumsum(1) - 1).masked_fill(mask == 0, 1)
    model(IDS, attention_mask=mask, position_ids=padded)


def test_a_prompt_is_not_taken_for_a_prefix_of_as_many_rows() -> None:
    layers = len(converted(CONFIG).model.layers)
    prompt = CONFIG.replace(fam_length=layers)
    prefix = CONFIG.replace(fam_length=1, fam_start="prefix")
    model = reconfigure(converted(prompt), prefix, seed=3)
    expected = reconfigure(converted(CONFIG.without_feedback()), prefix, seed=3)
    assert torch.equal(model.model.fam_prompt.weight, expected.model.fam_prompt.weight)


def test_a_mask_counts_by_its_last_columns() -> None:
    model = convert(tiny(), CONFIG)
    expected, mask = logits(model), torch.ones(2, LENGTH)
    for longer in (mask, mask.bool(), torch.cat([torch.zeros(2, 5), mask], 1)):
        assert torch.equal(logits(model, attention_mask=longer), expected)
    for shape in ((2, LENGTH - 1), (1, LENGTH), (2, 1, LENGTH, LENGTH), (LENGTH,)):
        with pytest.raises(ValueError, match="attention_mask must have 2 dimensions"):
            logits(model, attention_mask=torch.ones(shape))


def test_nothing_to_read_is_refused() -> None:
    model = convert(tiny(), CONFIG)
    for inputs in ({}, {"input_ids": IDS[:, :0]}):
        with pytest.raises(ValueError, match="Nothing to read"):
            model(**inputs)


def test_outputs_as_a_tuple_and_without_a_memory() -> None:
    model = convert(tiny(), CONFIG)
    out = model(IDS)
    assert isinstance(out.past_key_values, Memory)
    assert torch.equal(model(IDS, return_dict=False)[0], out.logits)
    assert model(IDS, use_cache=False).past_key_values is None
    last = logits(model, logits_to_keep=2)
    assert torch.equal(last, out.logits[:, -2:])


# ---- what is refused

# Every family takes from here what it knows.
_SMALL: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "word_embed_proj_dim"), 32),
    **dict.fromkeys(("intermediate_size", "d_ff", "ffn_dim"), 48),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "num_layers", "num_key_value_heads"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "num_heads", "num_experts"), 4),
    **dict.fromkeys(("head_dim", "d_kv", "linear_key_head_dim", "linear_value_head_dim"), 8),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 16),
    **dict.fromkeys(("linear_num_value_heads", "linear_num_key_heads", "num_experts_per_tok"), 2),
    "vocab_size": VOCABULARY,
}
_IMAGES = {**_SMALL, "image_size": 28, "patch_size": 14}

# the class, what its configuration needs besides, and what its refusal says
REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "GPT2LMHeadModel": ("GPT2Config", {}, "GPT2LMHeadModel is no causal language model"),
    "T5ForConditionalGeneration": ("T5Config", {}, "t5 model has an encoder"),
    "BertForMaskedLM": ("BertConfig", {}, "BertForMaskedLM is no causal language model"),
    "OPTForCausalLM": ("OPTConfig", {}, "opt model has no rotary positions"),
    "BloomForCausalLM": ("BloomConfig", {}, "bloom"),
    "MambaForCausalLM": ("MambaConfig", {}, "mamba model has layers of linear_attention"),
    "Qwen3NextForCausalLM": (
        "Qwen3NextConfig",
        {"layer_types": ["linear_attention", "full_attention"]},
        "qwen3_next model has layers of linear_attention",
    ),
    "Gemma3ForConditionalGeneration": (
        "Gemma3Config",
        {"text_config": _SMALL, "vision_config": _IMAGES, "mm_tokens_per_image": 4},
        "reads more than text",
    ),
    "NanoChatForCausalLM": ("NanoChatConfig", {}, "layer 0 of this nanochat model are not rotary"),
    "DiffLlamaForCausalLM": ("DiffLlamaConfig", {}, "diffllama"),
    "DogeForCausalLM": ("DogeConfig", {}, "doge"),
    "BeamForCausalLM": ("BeamConfig", {}, "beam"),
}


def small(name: str) -> PreTrainedModel:
    config_class = getattr(transformers, REFUSED[name][0])
    known = {key: value for key, value in _SMALL.items() if hasattr(config_class(), key)}
    torch.manual_seed(0)
    config = config_class(**{**known, **REFUSED[name][1]})
    return getattr(transformers, name)(config).eval()


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_converted_is_refused_by_name_and_left_alone(name: str) -> None:
    if not hasattr(transformers, name):
        pytest.skip("this version of transformers does not have it")
    model, message = small(name), REFUSED[name][2]
    ids = IDS % model.config.get_text_config().vocab_size
    options = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}

    def looks() -> list[object]:
        classes: list[object] = [type(module) for module in model.modules()]
        return [*classes, type(model.config), model.config.to_dict(), list(model.state_dict())]

    before, expected = looks(), logits(model, ids, **options)
    with pytest.raises(UnsupportedModelError, match=message) as caught:
        convert(model, CONFIG)
    assert str(caught.value).endswith(".") and "\n" not in str(caught.value)
    assert looks() == before
    assert torch.equal(logits(model, ids, **options), expected)


def test_a_converted_model_and_what_is_no_model_are_refused() -> None:
    model = convert(tiny(), CONFIG)
    before = logits(model)
    with pytest.raises(UnsupportedModelError, match=r"already; use reconfigure\(model, config\)"):
        convert(model, CONFIG)
    assert torch.equal(logits(model), before)
    for thing in (None, torch.nn.Linear(2, 2), "gpt2"):
        with pytest.raises(UnsupportedModelError, match="needs a model of transformers"):
            convert(thing)


def test_a_model_without_weights_is_refused_and_left_alone() -> None:
    with torch.device("meta"):
        model = type(tiny())(tiny().config)
    with pytest.raises(UnsupportedModelError):
        convert(model, CONFIG)
    assert not is_transformerfam(model)
    assert type(model.model.layers[0]).__mro__[0].__name__ == "LlamaDecoderLayer"
    assert "fam_prompt" not in dict(model.model.named_children())


def test_an_interrupted_conversion_leaves_the_model_as_it_was(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from transformerfam import conversion

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    model = tiny()
    before, classes = logits(model), [type(module) for module in model.modules()]
    monkeypatch.setattr(conversion, "install", interrupt)
    with pytest.raises(KeyboardInterrupt):
        convert(model, CONFIG)
    monkeypatch.undo()
    assert classes == [type(module) for module in model.modules()]
    assert torch.equal(logits(model), before)
    convert(model, CONFIG)


def test_what_half_precision_rounds_away_is_looked_at_in_float32_and_nothing_is_changed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Some prompts are blown up by a model; a conversion is not refused for that."""
    plain = tiny(dtype=torch.bfloat16)
    for name, buffer in plain.named_buffers():  # as from_pretrained leaves them
        if "inv_freq" in name:
            buffer.data = buffer.float() * 1.0001
    asked: list[torch.dtype] = []

    def strict(a: torch.Tensor, b: torch.Tensor) -> bool:
        asked.append(b.dtype)
        # Of three comparisons the second is that of pieces, in half precision.
        return len(asked) != 2 and conversion_alike(a, b)

    conversion_alike = conversion._alike
    before = {n: t.clone() for n, t in [*plain.named_parameters(), *plain.named_buffers()]}
    monkeypatch.setattr(conversion, "_alike", strict)
    model = convert(plain, FamConfig(block_size=4, fam_length=2))
    assert asked == [torch.bfloat16, torch.bfloat16, torch.float32]
    after = dict([*model.named_parameters(), *model.named_buffers()])
    assert {t.dtype for t in before.values()} == {torch.bfloat16, torch.float32}
    for name, tensor in before.items():
        assert after[name].dtype == tensor.dtype and torch.equal(after[name], tensor), name
