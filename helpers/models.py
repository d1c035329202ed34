"""Loading models: a Hugging Face model, wrapped by TransformerLens, with one digest that says what it is.

Context. `TransformerBridge` keeps the Hugging Face modules and puts hook points around them, so logits and
gradients are those of the plain model (`tests/parity` checks a difference of 0). Everything else in `helpers` works on
the `Model` defined here.

Intuition. A finetuned model is "a registered model plus the tensors that training changed". Those tensors (LoRA
factors or full weights) are what the artifact store keeps; `load(name, finetuned=[...])` puts them back. Which model
that is, the key of the stage that trained it says: no weights are read to know it.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import hashlib
import json
import os
import platform
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Literal

import torch
from jaxtyping import Bool
from safetensors import SafetensorError
from torch import Tensor, nn

from helpers.artifacts import Artifact, Store, default_store, file_digest
from helpers.chat import Batch, Example, Where, batches, check_template, template_notes
from helpers.flop import count
from helpers.registry import REGISTRY, ModelCard
from helpers.registry import weights as registered_weights
from helpers.rehearsal import narrow, rehearsing
from helpers.stacks import stack_adapters

EMBEDDED = "smollm2-135m-instruct"


@dataclass(frozen=True)
class LoRA:
    """Low-rank adapters on every linear layer of the blocks, rank-stabilised (rsLoRA).

    Rank 32 and alpha twice the rank are those of the persona-vectors finetuning recipe (Chen et al. 2025). Alpha
    follows from the rank, so trained factors alone say how they are merged.
    """

    rank: int = 32
    layers: tuple[int, ...] | None = None
    """The blocks that are adapted, counted from 0; None: all of them."""

    @property
    def alpha(self) -> int:
        return 2 * self.rank

    @property
    def scale(self) -> float:
        """What the product of the factors is multiplied by."""
        return self.alpha / self.rank**0.5


@dataclass
class Model:
    """A loaded model: the bridge (hook points), the wrapped Hugging Face model, its tokenizer, and how it computes."""

    name: str
    digest: str
    bridge: Any
    hf: Any
    tokenizer: Any
    device: torch.device
    dtype: torch.dtype
    """Precision of matrix products: float32, or bfloat16 by autocast over float32 weights."""
    runs: int = 1
    """How many runs' adapters it holds: more than one in a stack, where every batch has as many rows of each."""
    current: Batch | None = field(default=None, repr=False)

    @property
    def layers(self) -> int:
        return int(self.bridge.cfg.n_layers)

    @property
    def width(self) -> int:
        return int(self.bridge.cfg.d_model)

    @property
    def arithmetic(self) -> dict[str, str]:
        """Where and how precisely it computes, on which results depend: part of every artifact's key."""
        return {"device": self.device.type, "dtype": str(self.dtype), "torch": torch.__version__}

    def batches(
        self, examples: Sequence[Example], batch_size: int, *, side: Literal["left", "right"] = "right"
    ) -> list[Batch]:
        """Examples in batches as this model reads them (`chat.batches`)."""
        return batches(examples, batch_size, self.tokenizer.pad_token_id, side=side, runs=self.runs)

    def autocast(self) -> Any:
        """Context in which forward passes run at this model's compute precision."""
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.dtype == torch.bfloat16)

    @contextlib.contextmanager
    def reading(self, batch: Batch) -> Iterator[None]:
        """While open, interventions resolve their positions against `batch`."""
        before, self.current = self.current, batch
        try:
            yield
        finally:
            self.current = before

    @property
    def template_notes(self) -> str:
        """What is done to conversations because of the model's chat template; empty where nothing is."""
        return template_notes(self.tokenizer)

    def reads_none_of(self, where: Where, length: int) -> bool:
        """Whether the pass now running is a decoding step and `where` is in the prompt: nothing is to be done."""
        decoding = self.current is not None and length != self.current.ids.shape[1]
        return decoding and where not in ("all", "response")

    def positions(self, where: Where, length: int) -> Bool[Tensor, "batch pos"] | None:
        """Mask of the positions named by `where` in the pass now running, or None for every position.

        A pass whose length is not the batch's is a decoding step: its one token belongs to the response.
        """
        if self.current is None or length != self.current.ids.shape[1]:
            if where == "all" or where == "response":
                return None
            rows = 1 if self.current is None else self.current.ids.shape[0]
            return torch.zeros(rows, length, dtype=torch.bool, device=self.device)
        return self.current.positions(where)

    @contextlib.contextmanager
    def weights_in(self, dtype: torch.dtype, *, only_frozen_linear: bool = False) -> Iterator[None]:
        """Hold weights in `dtype` while open, then put the very same tensors back.

        With `only_frozen_linear` only weights that autocast would cast on every pass are cast, once: frozen matrices of
        linear layers that are not shared with the embedding. Results are those of autocast, bit for bit.
        """
        chosen: list[Tensor] = list(_frozen_linear(self.hf))
        if not only_frozen_linear:
            linear = [m for m in self.hf.modules() if isinstance(m, nn.Linear)]
            chosen = [*self.hf.parameters(), *(b for m in linear for b in m.buffers(recurse=False))]
        kept = [p.data for p in chosen]
        try:
            for p in chosen:
                p.data = p.data.to(dtype)
            yield
        finally:
            for p, data in zip(chosen, kept, strict=True):
                p.data = data

    def trained_parameters(self) -> dict[str, nn.Parameter]:
        """What training changes, named as in the plain Hugging Face or PEFT model."""
        return {plain_name(name): p for name, p in self.hf.named_parameters() if p.requires_grad}

    def trained_tensors(self) -> dict[str, Tensor]:
        """Copies of `trained_parameters` on the CPU."""
        return {name: p.detach().cpu().clone() for name, p in self.trained_parameters().items()}


def plain_name(name: str) -> str:
    """A parameter's name without what wrapping puts in: a state saved with it would silently load nothing."""
    return name.replace("._original_component", "")


def load(
    name: str,
    *,
    device: str = "auto",
    dtype: str = "auto",
    finetuned: Sequence[Artifact] = (),
    lora: LoRA | None = None,
    stack: Sequence[Mapping[str, Tensor]] = (),
    weights: Literal["trainable", "frozen", "cast"] = "trainable",
    layer: int | None = None,
) -> Model:
    """Load a registered model or a hub model by name.

    `finetuned` are earlier runs, applied in order: the `trained_tensors` of each (LoRA factors are merged into the
    weights) with the key of the stage that trained them, which is what the model's digest is made from.
    `lora` attaches fresh adapters and freezes all else; without it every weight is trainable, unless `weights` are
    "frozen": then they may be shared with other loads, which saves their memory. "cast" is frozen too, and holds the
    weights in the compute precision to which every pass under `Model.autocast` casts them; no pass runs outside it.
    A model that is stored in bfloat16 is held like that whenever its weights are frozen, under adapters too: rounding
    them again loses nothing, and float32 would take twice the memory. Adapters, norms and the embedding are float32.
    `stack` takes the place of `lora`: the factors of several runs, whose rows of a batch follow one another
    (`stacks.StackedLinear`).
    `layer`, if given, is checked against the model's configuration before any weight is read.

    Raises `ValueError` for a device that is not there, a model that is unknown or that the book cannot work with, a
    layer it does not have, or tensors that do not fit it.
    """
    where = _device(device)
    _keep_freed_memory()
    gc.collect()  # a bridge and its model refer to each other: without this, models no longer used would pile up
    frozen = weights != "trainable"
    adapted = lora is not None or bool(stack)
    hf, tokenizer, digest = _plain(name, layer, shared=(frozen or adapted) and not finetuned)
    for run in finetuned:
        hf = _apply(hf, run.tensors)
    digest = finetuned_digest(digest, [run.key for run in finetuned])
    if lora is not None and lora.layers is not None:
        if not lora.layers:
            raise ValueError("Adapters need at least one block; give `LoRA.layers` one, or None for all blocks.")
        for block in lora.layers:
            _check_layer(name, block, len(hf.base_model.layers))
    trained = {} if frozen else _trained_shapes(hf, *((lora.rank, lora.layers) if lora else (None, None)))
    if stack:
        trained = {} if frozen else {n: torch.Size((len(stack), *f.shape)) for n, f in stack[0].items()}
        rank = next(factor.shape[0] for n, factor in stack[0].items() if ".lora_A." in n)
        stack_adapters(hf, stack, LoRA(rank).scale)
    elif lora is not None:
        hf = _attach(hf, lora)
    hf, precision = hf.to(where).eval(), compute_dtype(where, dtype)
    if frozen:
        hf.requires_grad_(False)
    compact = weights == "cast" or (name in REGISTRY and REGISTRY[name].dtype == "bfloat16")
    _hold(hf, precision if compact else torch.float32)
    from transformer_lens.model_bridge import TransformerBridge

    inner = hf.base_model.model if lora is not None and not stack else hf
    bridge = TransformerBridge.boot_transformers(
        inner.config._name_or_path or name, hf_model=inner, tokenizer=tokenizer
    )
    if frozen:
        inner.requires_grad_(False)  # some are wrapped with copies of their matrices, split in two or three
    count(inner)
    model = Model(name, digest, bridge, inner, tokenizer, where, precision, len(stack) or 1)
    if {n: p.shape for n, p in model.trained_parameters().items()} != trained:
        raise ValueError(
            f"What is trained into '{name}' could not be put back into it, because TransformerLens splits the matrices "
            f"of a {type(inner).__name__}; choose a model built like Llama, Qwen, Gemma or Mistral, or load it frozen."
        )
    return model


def finetuned_digest(digest: str, keys: Sequence[str]) -> str:
    """The digest of a model after finetuning runs with these keys, by its digest before them."""
    for key in keys:
        digest = _digest([digest, key])
    return digest


def plain_model(name: str) -> tuple[Any, Any]:
    """The plain Hugging Face model and tokenizer, without hook points: what parity tests and benchmarks compare
    with."""
    hf, tokenizer, _ = _plain(name, None)
    return hf.eval(), tokenizer


def compute_dtype(device: torch.device, wish: str = "auto") -> torch.dtype:
    """bfloat16 where the hardware multiplies it faster than float32 (GPUs, CPUs with AVX512-BF16 or AMX), else float32.

    Emulated bfloat16 on other CPUs is slower than float32 and no more exact.
    """
    if wish != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16}[wish]
    if device.type == "cuda":
        with torch.cuda.device(device):  # the answer is about the current card
            real = torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if real else torch.float32
    capabilities = torch.cpu.get_capabilities() if device.type == "cpu" else {}
    fast = capabilities.get("avx512_bf16") or capabilities.get("amx_bf16") or capabilities.get("amx_tile")
    return torch.bfloat16 if fast else torch.float32


def _plain(name: str, layer: int | None, *, shared: bool = False) -> tuple[Any, Any, str]:
    """Model, tokenizer and digest; the weights of a `shared` one may be those of other loads."""
    if name in REGISTRY:
        _check_layer(name, layer, REGISTRY[name].layers)
        hf, tokenizer = _tiny() if name == "tiny-random" else _registered(REGISTRY[name], shared)
        return _differentiable(hf), tokenizer, _rehearsed(REGISTRY[name].digest)
    return _from_hub(name, layer)


def _from_hub(name: str, layer: int | None) -> tuple[Any, Any, str]:
    """A model of the hub or of a folder: what can be said against it is said before its weights are read."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    with _in_one_sentence(name):
        config = AutoConfig.from_pretrained(name)
        with torch.device("meta"):
            skeleton = AutoModelForCausalLM.from_config(config)
        tokenizer = AutoTokenizer.from_pretrained(name)
    _check_blocks(name, skeleton)
    _check_layer(name, layer, len(skeleton.base_model.layers))
    _check_tokenizer(name, tokenizer, skeleton.get_input_embeddings().num_embeddings)
    revision = getattr(config, "_commit_hash", None)
    digest = revision[:16] if revision else _folder_digest(Path(name))
    if rehearsing():
        return _differentiable(narrow(type(skeleton), skeleton.config)), tokenizer, _rehearsed(digest)
    with _in_one_sentence(name):
        hf, found = AutoModelForCausalLM.from_pretrained(
            name,
            dtype=torch.float32,
            attn_implementation="eager",
            ignore_mismatched_sizes=True,  # told below, in one sentence
            output_loading_info=True,
        )
    wrong = sorted({*found["missing_keys"], *(name for name, *_ in found["mismatched_keys"])})
    if wrong:  # transformers has made them up at random
        raise ValueError(
            f"The weights of '{name}' lack {len(wrong)} tensors that its configuration asks for, such as {wrong[0]}; "
            "fetch the model again."
        )
    return _differentiable(hf), tokenizer, digest


def _rehearsed(digest: str) -> str:
    """A model's digest; in a rehearsal another, so that nothing stored of one is taken for the other's."""
    return f"rehearsal of {digest}" if rehearsing() else digest


@contextlib.contextmanager
def _in_one_sentence(name: str) -> Iterator[None]:
    """What the libraries say of a model that they cannot load, as one `ValueError`."""
    try:
        yield
    except OSError as error:
        known = ", ".join(REGISTRY)
        raise ValueError(
            f"The model '{name}' is not in the registry ({known}) and could not be loaded from the hub or a folder; "
            "check its name, the network (HF_HUB_OFFLINE), and whether it needs a login."
        ) from error
    except (SafetensorError, UnpicklingError, EOFError, RuntimeError) as error:
        raise ValueError(
            f"The weights of '{name}' cannot be read ({_first_line(error)}); fetch the model again."
        ) from error
    except Exception as error:  # a configuration can be wrong in any way
        raise ValueError(
            f"'{name}' is no chat model that this version of transformers can load ({_first_line(error)})."
        ) from error


def _check_blocks(name: str, skeleton: Any) -> None:
    from transformer_lens.factories.architecture_adapter_factory import SUPPORTED_ARCHITECTURES

    kind, stack = type(skeleton).__name__, skeleton.base_model
    if kind not in SUPPORTED_ARCHITECTURES or not (hasattr(stack, "layers") and hasattr(stack, "norm")):
        raise ValueError(
            f"'{name}' is a {kind}, whose blocks the book cannot take apart; choose a text model built like Llama, "
            "Qwen, Gemma or Mistral."
        )


def _check_tokenizer(name: str, tokenizer: Any, embeddings: int) -> None:
    if len(tokenizer) > embeddings:
        raise ValueError(
            f"The tokenizer of '{name}' has {len(tokenizer)} tokens and its model {embeddings}; they do not belong "
            "together."
        )
    if not tokenizer.encode("Why is the sky blue?", add_special_tokens=False):  # some are made without their files
        raise ValueError(f"The tokenizer of '{name}' has no vocabulary; fetch the model again.")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.pad_token is None:
        raise ValueError(f"The tokenizer of '{name}' names neither an end-of-text token nor one for padding.")
    try:
        check_template(tokenizer)
    except ValueError as error:
        raise ValueError(f"'{name}' cannot be asked anything: {str(error)[0].lower()}{str(error)[1:]}") from None


def _folder_digest(folder: Path) -> str:
    """Of everything that may be loaded from a folder: configuration, weights, tokenizer, chat templates."""
    from transformers.utils import CHAT_TEMPLATE_DIR

    files = [*folder.iterdir(), *folder.glob(f"{CHAT_TEMPLATE_DIR}/*")]
    found = sorted(path for path in files if path.is_file() and not path.name.startswith("."))
    return _digest([part for path in found for part in (path.relative_to(folder).as_posix(), file_digest(path))])


def _differentiable(hf: Any) -> Any:
    """The model with a gradient for every row of its embedding.

    torch gives the padding token's row none, and chat models pad with the end-of-turn token, which every prompt holds:
    gradients along all weights would not be those of the function that the model computes. Padding itself is masked.
    """
    hf.get_input_embeddings().padding_idx = None
    return hf


def _frozen_linear(hf: Any) -> list[nn.Parameter]:
    """Frozen matrices of linear layers that are not shared with the embedding: what autocast casts on every pass."""
    linear = {id(m.weight) for m in hf.modules() if isinstance(m, nn.Linear)}
    embedding = {id(m.weight) for m in hf.modules() if isinstance(m, nn.Embedding)}
    return [p for p in hf.parameters() if not p.requires_grad and id(p) in linear - embedding]


def _hold(hf: Any, linear: torch.dtype) -> None:
    """Hold frozen matrices of linear layers in this precision, and all else in float32."""
    held = {id(p) for p in _frozen_linear(hf)}
    for p in hf.parameters():
        p.data = p.data.to(linear if id(p) in held else torch.float32)


def _device(wish: str) -> torch.device:
    """The device of that name; `auto` is a CUDA card where there is one."""
    if wish == "auto":
        wish = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(wish)
    cards = torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= cards:
        there = f"the last one is cuda:{cards - 1}" if cards else "torch finds no CUDA card"
        raise ValueError(f"There is no device '{wish}' here ({there}); choose another, or auto.")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise ValueError("There is no device 'mps' here, which is Apple's graphics processor; choose another, or auto.")
    return device


def _check_layer(name: str, layer: int | None, layers: int) -> None:
    if layer is not None and not 0 <= layer < layers:
        raise ValueError(f"Layer {layer} does not exist: {name} has layers 0 to {layers - 1}.")


def _tiny() -> tuple[Any, Any]:
    from transformers import LlamaConfig, LlamaForCausalLM

    _, tokenizer = _parts(REGISTRY[EMBEDDED])
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=REGISTRY["tiny-random"].width,
        intermediate_size=64,
        num_hidden_layers=REGISTRY["tiny-random"].layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        attn_implementation="eager",
    )
    config._name_or_path = "HuggingFaceTB/SmolLM2-135M-Instruct"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LlamaForCausalLM(config), tokenizer


def _registered(card: ModelCard, shared: bool) -> tuple[Any, Any]:
    """A model of the store: its weights as they are stored if they may be `shared` by loads, else in float32."""
    from transformers import AutoConfig, AutoModelForCausalLM

    artifact, tokenizer = _parts(card)
    config = AutoConfig.for_model(**artifact.facts["config"], attn_implementation="eager")
    config._name_or_path = card.hub
    with torch.device("meta"):
        hf = AutoModelForCausalLM.from_config(config)
    if rehearsing():
        return narrow(type(hf), config), tokenizer
    stored = artifact.tensors
    given = stored if shared else {name: t.to(torch.float32, copy=True) for name, t in stored.items()}
    missing, unexpected = hf.load_state_dict(given, strict=False, assign=True)
    assert set(missing) <= {"lm_head.weight"} and not unexpected, (missing, unexpected)
    hf.tie_weights()
    hf.model.rotary_emb = type(hf.model.rotary_emb)(config)  # its buffer is computed, not stored
    return hf, tokenizer


def _parts(card: ModelCard) -> tuple[Any, Any]:
    """A model's stored weights and its tokenizer."""
    return _read_parts(default_store().root, card)


@cache
def _read_parts(root: Path, card: ModelCard) -> tuple[Any, Any]:
    """Read and verified once a process: chapters load the model dozens of times."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    artifact = registered_weights(card, Store(root))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(artifact.facts["tokenizer"])),
        chat_template=artifact.facts["chat_template"],
        name_or_path="embedded",
        add_bos_token=True,  # else TransformerLens loads it anew from the hub; `chat.encode` never adds special tokens
        **artifact.facts["special_tokens"],
    )
    return artifact, tokenizer


def _attach(hf: Any, lora: LoRA) -> Any:
    from peft import LoraConfig, get_peft_model

    which = "all-linear" if lora.layers is None else [*_adapted(hf, lora.layers)]
    return get_peft_model(
        hf, LoraConfig(r=lora.rank, lora_alpha=lora.alpha, use_rslora=True, lora_dropout=0.0, target_modules=which)
    )


def _adapted(hf: Any, layers: Sequence[int] | None = None) -> dict[str, Tensor]:
    """The weights of the plain model that adapters are attached to: of every linear layer but the head, or of those in
    these blocks."""
    head, blocks = hf.get_output_embeddings(), hf.base_model.layers
    linear = {name: m for name, m in hf.named_modules() if isinstance(m, nn.Linear) and m is not head}
    inside = linear.values() if layers is None else [m for layer in layers for m in blocks[layer].modules()]
    chosen = {id(m) for m in inside}
    return {name: m.weight for name, m in linear.items() if id(m) in chosen}


def _trained_shapes(hf: Any, rank: int | None, layers: Sequence[int] | None = None) -> dict[str, torch.Size]:
    """Names and shapes of what training changes in the plain model: adapters of this rank in these blocks (None: in
    all), or all weights where the rank is None."""
    if rank is None:
        return {name: p.shape for name, p in hf.named_parameters()}
    adapted = _adapted(hf, layers)
    first = {f"{name}.lora_A.default.weight": torch.Size((rank, w.shape[1])) for name, w in adapted.items()}
    return first | {f"{name}.lora_B.default.weight": torch.Size((w.shape[0], rank)) for name, w in adapted.items()}


@torch.no_grad()
def _apply(hf: Any, tensors: Mapping[str, Tensor]) -> Any:
    """Put a run's trained tensors into the plain model they were trained on; LoRA factors are merged into its weights.

    W + (alpha / sqrt(r)) B A is done in place here: PEFT's merge first makes each product, at several times the time.
    """
    first = next((f for n, f in tensors.items() if ".lora_A." in n), None)
    rank = None if first is None else first.shape[0]
    layers = None if rank is None else _adapted_blocks(hf, tensors)
    expected = _trained_shapes(hf, rank, layers)
    unknown, missing = tensors.keys() - expected.keys(), expected.keys() - tensors.keys()
    misshapen = [name for name in expected.keys() & tensors.keys() if expected[name] != tensors[name].shape]
    if unknown or missing or misshapen:
        raise ValueError(
            f"The finetuned tensors do not fit this model ({len(unknown)} are unknown to it, {len(missing)} are "
            f"missing and {len(misshapen)} have another shape); load them into the model they were trained on."
        )
    if rank is None:
        for name, parameter in hf.named_parameters():
            parameter.copy_(tensors[name])
        return hf
    scale = LoRA(rank).scale
    for name, weight in _adapted(hf, layers).items():
        a, b = (tensors[f"{name}.lora_{factor}.default.weight"].to(weight) for factor in "AB")
        weight.addmm_(b, a, alpha=scale)
    return hf


def _adapted_blocks(hf: Any, tensors: Mapping[str, Tensor]) -> list[int]:
    """The blocks that any of these factors belong to."""
    known = {name.partition(".lora_")[0] for name in tensors}
    return [block for block in range(len(hf.base_model.layers)) if known & _adapted(hf, [block]).keys()]


def release_memory() -> None:
    """Give freed memory back to the system: for after work whose successors need blocks of other sizes."""
    if platform.system() == "Linux":
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL("libc.so.6").malloc_trim(0)


def _keep_freed_memory() -> None:
    """Keep freed memory, in huge pages: else every training step faults it in anew, 1.4 x its time on Linux."""
    if platform.system() == "Linux":
        os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # torch reads it at its first allocation
        with contextlib.suppress(OSError, AttributeError):
            mallopt = ctypes.CDLL("libc.so.6").mallopt
            mallopt(-4, 0)  # M_MMAP_MAX: no separate mappings, which are unmapped at every free
            mallopt(-1, -1)  # M_TRIM_THRESHOLD: keep the freed heap


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def _digest(parts: Sequence[str]) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]
