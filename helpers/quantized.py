"""Reading models whose weights are quantized in one GGUF file, and what is kept of any model in the artifact store.

This is a module of its own, without other helpers, because their code is part of the stored weights' key: what changes
elsewhere does not write gigabytes anew.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


def dequantize(path: Path, sha256: str, dtype: str, remedy: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Weights by plain name; configuration, tokenizer and chat template as facts: all of them the file's own.

    A head that the file has apart from the embedding is kept as it is, even if both were tied before quantization.

    Args:
        path: the GGUF file.
        sha256: of that file.
        dtype: what the weights are rounded to, "float32" or "bfloat16".
        remedy: how to get the file, as an order that ends a sentence.

    Raises:
        ValueError: if the file is missing, or another one.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    if not path.is_file():
        raise ValueError(f"{path.name} is missing; {remedy}.")
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != sha256:
        raise ValueError(f"{path.name} is not the expected file (SHA-256 {found[:16]}...); {remedy}.")
    logging.disable_progress_bar()
    hf = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    logging.enable_progress_bar()
    return kept(hf, tokenizer, dtype)


def download(
    name: str, revision: str, dtype: str, remedy: str, folder: Path | None = None
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The same of a model as its makers publish it on the Hugging Face hub, at one revision.

    Args:
        name: on the hub.
        revision: the whole commit.
        dtype: as in `dequantize`.
        remedy: as in `dequantize`.
        folder: where the downloaded files go; without one nothing is downloaded.

    Raises:
        ValueError: if the model cannot be had.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if folder is None:
        raise ValueError(f"{name} is missing; {remedy}.")
    place = {"revision": revision, "cache_dir": folder}
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, **place)
        hf = AutoModelForCausalLM.from_pretrained(name, dtype=getattr(torch, dtype), **place)
    except OSError as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__).rstrip(".")
        raise ValueError(
            f"{name} could not be fetched from the Hugging Face hub ({reason}); check the network, and that "
            "HF_HUB_OFFLINE is not set."
        ) from None
    return kept(hf, tokenizer, dtype)


def kept(hf: Any, tokenizer: Any, dtype: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Weights in this precision and facts, from which a model and its tokenizer can be made again."""
    for p in hf.parameters():  # one by one, so that they are there twice one by one
        p.data = p.data.to(getattr(torch, dtype)).contiguous()
    head = hf.get_output_embeddings().weight is hf.get_input_embeddings().weight
    tensors = {k: v for k, v in hf.state_dict().items() if not (head and k == "lm_head.weight")}
    dropped = {"quantization_config", "_name_or_path", "transformers_version", "dtype"}
    facts = {
        "config": {k: v for k, v in hf.config.to_dict().items() if k not in dropped},
        "tokenizer": json.loads(tokenizer.backend_tokenizer.to_str()),
        "chat_template": tokenizer.chat_template,
        "special_tokens": {k: str(v) for k, v in tokenizer.special_tokens_map.items()},
    }
    return tensors, facts
