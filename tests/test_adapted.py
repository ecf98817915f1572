"""An adapter of FAM alone (`adapted="fam"`): tokens are read by the model's own weights."""

from __future__ import annotations

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from command_line import Run, refused
from families import some_tokens, tiny
from oracle import make_exact, oracle
from test_adaptation import base_folder, logits, short, trained_on
from test_training import checkpointed
from torch import Tensor

import transformerfam
from transformerfam import FamConfig, Memory, benchmark, convert
from transformerfam.conversion import twin
from transformerfam.errors import UserError
from transformerfam.training.adaptation import adapt
from transformerfam.training.settings import TrainSettings

B = 6
CONFIG = FamConfig(block_size=B, memory_segments=1, fam_length=3, sink_tokens=2, adapted="fam")
IDS = some_tokens(2, 4 * B + 3)


def with_adapter(config: FamConfig = CONFIG) -> Any:
    """A PEFT model of the tiny model, whose adapter does something."""
    torch.manual_seed(0)
    lora = peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    model: Any = peft.get_peft_model(convert(make_exact(tiny()), config), lora)
    model.base_model.model.model.fam_prompt.requires_grad_(True)
    return model.eval()


def merged() -> Any:
    """The plain model with the same adapter in its weights."""
    model = with_adapter(CONFIG.replace(adapted="all")).merge_and_unload()
    plain = make_exact(tiny())
    plain.load_state_dict(
        {k: v for k, v in model.state_dict().items() if "fam_prompt" not in k}, strict=True
    )
    return plain


def test_it_cannot_be_merged_into_weights_that_tokens_use() -> None:
    model = with_adapter()
    with torch.no_grad():
        before = model(input_ids=IDS[:1]).logits
    with pytest.raises(ValueError, match=r"FAM's alone .* cannot be merged"):
        model.merge_and_unload()
    with torch.no_grad():
        assert torch.equal(model(input_ids=IDS[:1]).logits, before)


def test_fam_goes_through_the_adapted_layers_and_tokens_through_the_models_own() -> None:
    model = with_adapter()
    prompt = model.base_model.model.model.fam_prompt.weight
    expected = oracle(make_exact(tiny()), CONFIG, IDS[0], prompt, fam_model=merged())
    memory = Memory.for_model(model.base_model.model)
    ours = model(input_ids=IDS[:1], past_key_values=memory).logits[0]
    torch.testing.assert_close(ours, expected.logits, rtol=0, atol=1e-9)
    for fam, wanted in zip(memory.fams, expected.fams[-1], strict=True):
        assert fam is not None
        torch.testing.assert_close(fam[0], wanted, rtol=0, atol=1e-9)
    everywhere = with_adapter(CONFIG.replace(adapted="all"))(input_ids=IDS[:1]).logits[0]
    assert not torch.allclose(ours, everywhere, atol=1e-2)


@torch.no_grad()
def test_threads_share_a_model_and_its_adapter_of_fam() -> None:
    model = with_adapter().base_model.model
    texts = [some_tokens(1, 4 * B + n, seed=n) for n in range(4)]

    def read(ids: Tensor) -> list[Tensor]:
        memory = Memory.for_model(model)
        with torch.no_grad():
            for block in ids.split(B, dim=1):
                model(input_ids=block, past_key_values=memory)
        return [fam for fam in memory.fams if fam is not None]

    expected = [read(ids) for ids in texts]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(read, texts * 8))
    for fams, wanted in zip(together, expected * 8, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(fams, wanted, strict=True))
    assert torch.equal(read(texts[0])[0], expected[0][0])


def test_a_model_with_an_adapter_of_fam_can_be_copied_and_pickled() -> None:
    model = with_adapter().base_model.model
    with torch.no_grad():
        expected = model(input_ids=IDS).logits
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(other(input_ids=IDS).logits, expected)


def gradients(model: Any) -> dict[str, Tensor]:
    loss = model(input_ids=IDS).logits.logsumexp(-1).sum()
    loss.backward()
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def test_the_adapter_gets_its_gradient_from_fam_also_where_layers_are_computed_again() -> None:
    plain, again = with_adapter().train(), with_adapter().train()
    checkpointed(again.base_model.model)
    found = gradients(plain)
    assert sum("lora_" in name for name in found) > 0
    for name, gradient in gradients(again).items():
        torch.testing.assert_close(gradient, found[name], rtol=0, atol=1e-9)


def test_in_training_all_of_the_adapter_takes_part_also_before_there_is_a_fam() -> None:
    model = with_adapter().train()
    model(input_ids=IDS[:, :B]).logits.logsumexp(-1).sum().backward()
    of_adapter = [p for n, p in model.named_parameters() if "lora_" in n]
    # What trains in parallel waits for every gradient.
    assert of_adapter and all(p.grad is not None and not p.grad.any() for p in of_adapter)


def test_without_fam_the_model_is_the_original_one() -> None:
    model = with_adapter()
    with torch.no_grad():
        original = convert(make_exact(tiny()), CONFIG.without_feedback())(input_ids=IDS).logits
        windows = twin(model.base_model.model, CONFIG.without_feedback())(input_ids=IDS).logits
        torch.testing.assert_close(windows, original, rtol=0, atol=0)
        first = model(input_ids=IDS[:, :B]).logits
        torch.testing.assert_close(first, original[:, :B], rtol=0, atol=1e-12)
        with model.disable_adapter():
            off = model(input_ids=IDS).logits
        fresh: Any = convert(make_exact(tiny()), CONFIG)
        fresh.model.fam_prompt.weight.copy_(model.base_model.model.model.fam_prompt.weight)
        torch.testing.assert_close(off, fresh(input_ids=IDS).logits, rtol=0, atol=1e-12)
        _, windows, full = benchmark.readers(model.base_model.model, CONFIG)
        plain = make_exact(tiny())(input_ids=IDS).logits
        torch.testing.assert_close(full.model(input_ids=IDS).logits, plain, rtol=0, atol=1e-12)
        torch.testing.assert_close(windows.model(input_ids=IDS).logits, original, rtol=0, atol=0)


def test_it_is_loaded_beside_the_weights_and_cannot_be_put_into_them(
    fam: Run, tmp_path: Path
) -> None:
    base = base_folder(tmp_path)
    made = short(tmp_path, base, fam={"adapted": "fam"})
    trained = trained_on(made).model
    again, _ = transformerfam.load(made.run.output)
    torch.testing.assert_close(logits(again), logits(trained), rtol=1e-4, atol=1e-4)
    # Whose way it changes is the adapter's to say.
    other, _ = transformerfam.load(made.run.output, again.fam_config.replace(adapted="all"))
    assert other.fam_config.adapted == "fam"
    with pytest.raises(ValueError, match="keep the adapter's folder"):
        again.save_pretrained(tmp_path / "whole")
    refused(fam("merge", made.run.output, str(tmp_path / "whole")), "keep the adapter")
    assert not (tmp_path / "whole").exists()


def test_there_must_be_a_way_of_fam_to_adapt(tmp_path: Path) -> None:
    for sections in (
        {"fam": {"adapted": "fam", "fam_length": 0}},
        {"fam": {"adapted": "fam"}, "train": {"what": "full"}},
    ):
        with pytest.raises(UserError, match=r"fam\.adapted=all"):
            short(tmp_path, "smollm2", **sections)
    with pytest.raises(ValueError, match="leave adapted out"):
        CONFIG.replace(fam_length=0, memory_source="output")


def test_matrices_outside_of_the_layers_are_refused() -> None:
    model = convert(tiny(tie_word_embeddings=False), CONFIG)
    with pytest.raises(UserError, match="lm_head"):
        adapt(model, TrainSettings(targets=("q_proj", "lm_head")), seed=0)
