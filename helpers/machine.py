"""What this machine has, checked before anything is computed: models, devices, folders that can be written.

`helpers.params` checks a value by itself; what is here depends on where it is run. No model is read and torch is
imported for a GPU only, so the checks take no time.
"""

import os
from difflib import get_close_matches
from pathlib import Path

from helpers.files import check_writable
from helpers.params import ParameterError, Params, shortened
from helpers.registry import REGISTRY, ModelCard, is_here

PATIENCE = 10
"""Seconds that the Hugging Face hub may take to answer."""


def check_machine(params: Params) -> None:
    """Check that this machine has what a chapter's parameters name.

    Raises:
        ParameterError: for a model, a device or a results folder that is not to be had.
    """
    for name in ("model", "sentiment_model"):
        if name in type(params).model_fields:
            _check_model(name, getattr(params, name))
    _check_device(params.device)
    try:
        check_writable(params.folder)
    except OSError as error:
        where = shortened(params.results or str(params.folder))
        raise ParameterError(f"Parameter 'results' is {where}, but {error}: name another folder.") from None


def _check_device(device: str) -> None:
    if device in ("auto", "cpu"):
        return
    import torch

    if device == "mps":
        if not torch.backends.mps.is_available():
            raise ParameterError(
                "Parameter 'device' is 'mps', but this machine has no Apple GPU: take 'auto' or 'cpu'."
            )
        return
    count = torch.cuda.device_count()
    if int(device.partition(":")[2] or 0) >= count:
        has = f"has {count} CUDA GPU(s), counted from 0" if count else "has no CUDA GPU that torch can use"
        raise ParameterError(f"Parameter 'device' is {device!r}, but this machine {has}: take 'auto' or 'cpu'.")


def _check_fetched(parameter: str, card: ModelCard) -> None:
    if not card.fetched:
        return
    from helpers.artifacts import default_store  # imports torch

    if not is_here(card, default_store()):
        raise ParameterError(f"Parameter {parameter!r} is {card.name!r}, which is not here yet: {card.remedy}.")


def _check_model(parameter: str, name: str) -> None:
    """A registered model, a folder with a model, or one of the hub that is in the cache or can be reached."""
    if name in REGISTRY:
        _check_fetched(parameter, REGISTRY[name])
        return
    start = f"Parameter {parameter!r} is {shortened(name)}, but"
    known = ", ".join(REGISTRY)
    if os.path.isdir(name):
        if not os.path.isfile(os.path.join(name, "config.json")):
            raise ParameterError(f"{start} that folder holds no config.json, so it is no model's.")
        return
    if name.startswith((".", "/", "~")) or name.count("/") > 1 or "\\" in name:
        raise ParameterError(f"{start} there is no such folder, seen from {Path.cwd()}: give it whole.")
    near = get_close_matches(name.lower(), REGISTRY, n=1, cutoff=0.7)
    if near:
        raise ParameterError(f"{start} there is no such model: did you mean {near[0]!r}?")
    from huggingface_hub import get_hf_file_metadata, hf_hub_url, is_offline_mode, try_to_load_from_cache
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HFValidationError,
        HTTPError,
        RepositoryNotFoundError,
    )

    registered = f"the registered models are {known}"
    try:
        if isinstance(try_to_load_from_cache(name, "config.json"), str):
            return
        if is_offline_mode():
            raise ParameterError(
                f"{start} it is not in the local cache, and HF_HUB_OFFLINE forbids to download it: unset that, or take "
                f"another ({registered})."
            )
        get_hf_file_metadata(hf_hub_url(name, "config.json"), timeout=PATIENCE)
    except HFValidationError:
        raise ParameterError(f"{start} the hub has no such names ({registered}): write OWNER/NAME.") from None
    except GatedRepoError:
        raise ParameterError(
            f"{start} it is gated: accept its terms on its hub page, then run `hf auth login`."
        ) from None
    except RepositoryNotFoundError:
        raise ParameterError(f"{start} the hub has no such model, or hides it from you ({registered}).") from None
    except EntryNotFoundError:
        raise ParameterError(f"{start} what the hub has by that name holds no config.json: choose a model.") from None
    except (HTTPError, OSError):
        raise ParameterError(
            f"{start} it is not in the local cache and the hub does not answer: connect, or take another "
            f"({registered})."
        ) from None
