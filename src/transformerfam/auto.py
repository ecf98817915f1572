"""Saving and loading through transformers' own Auto classes.

On disk a TransformerFAM says `"model_type": "transformerfam"` and names its family beside, so that
`AutoModelForCausalLM` finds us. In memory it stays of its family's type, which is what PEFT and others
go by.
"""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

MODEL_TYPE = "transformerfam"


class FamFamilyConfig:
    """Mixed in before a family's configuration class: the TransformerFAM of that family."""

    model_type: str

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """A pickle names the family's class, from which ours is made again."""
        from transformerfam.conversion import blank_config

        return blank_config, (type(self).__bases__[1],), self.__dict__

    def to_diff_dict(self) -> dict[str, Any]:
        """What is written to config.json."""
        values = super().to_diff_dict()  # type: ignore[misc]
        return {**values, "model_type": MODEL_TYPE, "base_model_type": self.model_type}


class TransformerFamConfig(PreTrainedConfig):
    """Reads the config.json of a TransformerFAM and gives the configuration of its family."""

    model_type = MODEL_TYPE

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """The family's configuration with `fam` in it."""
        from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

        from transformerfam.conversion import family_config, family_model

        values = dict(config_dict)
        family = values.pop("base_model_type", None)
        if family not in CONFIG_MAPPING:
            raise ValueError(
                f"This TransformerFAM is of the family {family!r}, which this version of transformers "
                "does not know."
            )
        config_class = CONFIG_MAPPING[family]
        family_model(MODEL_FOR_CAUSAL_LM_MAPPING[config_class])
        return family_config(config_class).from_dict({**values, "model_type": family}, **kwargs)


def register() -> None:
    """Make `AutoConfig` and `AutoModelForCausalLM` load what `save_pretrained` wrote."""
    AutoConfig.register(MODEL_TYPE, TransformerFamConfig, exist_ok=True)


def register_family(config_class: Any, model_class: Any) -> None:
    """Tell `AutoModelForCausalLM` of a family's TransformerFAM."""
    AutoModelForCausalLM.register(config_class, model_class, exist_ok=True)
