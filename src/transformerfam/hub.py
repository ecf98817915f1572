"""Models and adapters on the Hugging Face hub, or what was fetched of them before."""

from __future__ import annotations

from pathlib import Path

from transformerfam.embedded import ModelError, first_sentence

_TIMEOUT_SECONDS = 10
_REFUSALS = (401, 403, 404)
# What a run leaves beside the adapter that it trained.
_NOT_OF_AN_ADAPTER = ["checkpoints/*", "tensorboard/*"]


def fetched_before(name: str, file: str) -> str | None:
    """None if the hub has `name`; the folder of what was fetched before if it is out of reach.

    Asking here first, and going by the folder, saves the half minute in which every file would be
    tried six times.
    """
    from huggingface_hub import model_info, try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        model_info(name, timeout=_TIMEOUT_SECONDS)
    except HFValidationError as error:
        raise ModelError(
            f"There is no folder {name}, and it cannot be a name on the hub."
        ) from error
    except Exception as error:  # no network: whatever the HTTP library of the day raises
        if _is_refused(error):
            raise ModelError(
                f"There is no folder {name}, and no model of that name on the hub that you may read."
            ) from error
        if isinstance(fetched := try_to_load_from_cache(name, file), str):
            return str(Path(fetched).parent)
        raise ModelError(
            f"There is no folder {name}, and the hub, where it may be a name, cannot be reached."
        ) from error
    return None


def _is_refused(error: Exception) -> bool:
    """Whether the hub says no, and is not merely busy or broken."""
    from huggingface_hub.errors import HfHubHTTPError

    status = getattr(getattr(error, "response", None), "status_code", 404)
    return isinstance(error, HfHubHTTPError) and status in _REFUSALS


def adapter_folder(name: str) -> str:
    """The folder of an adapter of the hub, fetched if need be.

    Raises:
        ModelError: if it cannot be had.
    """
    from huggingface_hub import snapshot_download

    if fetched := fetched_before(name, "adapter_config.json"):
        return fetched
    try:
        return snapshot_download(name, ignore_patterns=_NOT_OF_AN_ADAPTER)
    except Exception as error:  # gated, or the network is gone by now
        raise ModelError(
            f"The adapter {name} cannot be fetched from the hub ({first_sentence(error)})."
        ) from error
