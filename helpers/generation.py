"""Batched decoding with interventions on."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence

import torch

from helpers.chat import Answer, Example, end_of_turn
from helpers.forward import common_beginning, keeps_beginning, read_beginning
from helpers.interventions import Intervention, alike, applied
from helpers.models import Model
from helpers.progress import progress


@torch.inference_mode()
def generate(
    model: Model,
    prompts: Sequence[Example],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
    interventions: Iterable[Intervention] = (),
    batch_size: int = 64,
    label: str = "generating",
) -> list[Answer]:
    """One answer per prompt, in the order given; greedy at temperature 0.

    An answer has ended where the model said its template's end of turn, or a token that its own settings stop at; one
    that `max_new_tokens` cut has not.

    Weights are held in the model's compute precision while decoding, where reading them is most of the cost. What all
    prompts begin with (a system message) is read once for all that are treated alike, unless an intervention has to
    know its positions.
    """
    answers = [Answer("")] * len(prompts)
    interventions = tuple(interventions)
    kinds = alike(interventions, len(prompts))
    together = (
        kinds is not None
        and model.runs == 1
        and keeps_beginning(model, max(map(len, prompts), default=0) + max_new_tokens)
    )
    shared = common_beginning(prompts) if together else 0
    rest = [Example(e.ids[shared:], e.prompt_length - shared) for e in prompts]
    sampling = (
        {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
        if temperature
        else {"do_sample": False}
    )
    own = model.hf.generation_config.eos_token_id
    stops = sorted({end_of_turn(model.tokenizer), *([own] if isinstance(own, int) else own or ())})
    torch.manual_seed(seed)
    # The prompt's last position is a strided view of the stream, for which torch copies the whole output matrix once a
    # sequence: gigabytes, and a quarter of the time.
    packed = model.hf.get_output_embeddings().register_forward_pre_hook(lambda _, given: (given[0].contiguous(),))
    with packed, applied(model, *interventions), model.weights_in(model.dtype), contextlib.ExitStack() as shown:
        todo = model.batches(rest, batch_size, side="left")
        begun = None
        if kinds is not None and shared:
            rows = [kinds.index(kind) for kind in range(max(kinds) + 1)]
            begun = read_beginning(model, prompts[0].ids[:shared], rows)
        bar = shown.enter_context(progress(len(prompts), label, "answer"))
        for batch in todo:
            batch = batch.to(model.device)
            ids, mask = batch.ids, batch.attention.long()
            cache = {}
            if kinds is not None and begun is not None:  # [begin, padding, rest]; the mask counts positions
                first = torch.tensor(prompts[0].ids[:shared], device=model.device).expand(len(ids), -1)
                ids, mask = torch.cat([first, ids], 1), torch.nn.functional.pad(mask, (shared, 0), value=1)
                cache = {"past_key_values": begun.copied([kinds[row] for row in batch.rows])}
            with model.reading(batch):
                out = model.hf.generate(
                    input_ids=ids,
                    attention_mask=mask,
                    max_new_tokens=max_new_tokens,
                    eos_token_id=stops,
                    pad_token_id=model.tokenizer.pad_token_id,
                    **cache,
                    **sampling,
                )
            new = out[:, ids.shape[1] :]
            texts = model.tokenizer.batch_decode(new, skip_special_tokens=True)
            ended = torch.isin(new, torch.tensor(stops, device=new.device)).any(1).tolist()
            for row, text, by_itself in zip(batch.rows, texts, ended, strict=True):
                answers[row] = Answer(text.strip(), by_itself)
            bar.update(len(texts))
    return answers
