"""Checks for the exercises of the chapter on IP loss reduction."""

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from helpers.chat import collate
from helpers.checking import BATCH, POSITIONS, VOCABULARY, call, compare, questions, random_response_mask
from helpers.losses import token_losses
from helpers.studies.traits import TraitStudy

question = questions(__file__)


def check_response_loss(
    fn: Callable[
        [Float[Tensor, "batch pos vocab"], Int[Tensor, "batch pos"], Bool[Tensor, "batch pos"]],
        Float[Tensor, " batch"],
    ],
) -> None:
    """Check `fn(logits, ids, response_mask)`, per sequence the mean loss in nats over response tokens.

    `response_mask` is True at the response tokens themselves; the first token is never one. A token is
    predicted by the logits of the position before it.
    """
    random = torch.Generator().manual_seed(0)
    logits = torch.randn(BATCH, POSITIONS, VOCABULARY, generator=random) * 2
    ids = torch.randint(VOCABULARY, (BATCH, POSITIONS), generator=random)
    mask = random_response_mask(random)

    def losses(predictions: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(predictions.transpose(1, 2), targets, reduction="none")

    def mean(values: Tensor, kept: Tensor) -> Tensor:
        return (values * kept).sum(1) / kept.sum(1)

    shifted = losses(logits[:, :-1], ids[:, 1:])
    want = mean(shifted, mask[:, 1:])
    compare(
        lambda: fn(logits, ids, mask),
        want,
        "the mean loss of each sequence over its response tokens",
        {
            "the logits are not shifted: position t predicts token t + 1": mean(losses(logits, ids), mask),
            "prompt tokens are counted too; use the response mask": shifted.mean(1),
            "the mask is shifted the wrong way: it marks the predicted tokens, not those that predict": (
                mean(shifted, mask[:, :-1])
            ),
            "this is the sum over tokens; divide by the number of response tokens": ((shifted * mask[:, 1:]).sum(1)),
            "the mean is over all positions; divide by the number of response tokens": (
                (shifted * mask[:, 1:]).mean(1)
            ),
            "the sign is wrong; a loss is minus the log-probability": -want,
            "this is one mean for all tokens of the batch; return one for each sequence": (shifted[mask[:, 1:]].mean()),
        },
    )


def check_loss_difference(
    fn: Callable[
        [Float[Tensor, "batch pos"], Float[Tensor, "batch pos"], Bool[Tensor, "batch pos"]],
        Float[Tensor, " batch"],
    ],
) -> None:
    """Check `fn(with_prompt, without, mask)`: mean token loss with the prompt minus without.

    The token losses are in nats and aligned to the same response; `mask` is True at response tokens. The
    result has one number for each sequence; a negative one says that the prompt lowers the loss.
    """
    random = torch.Generator().manual_seed(0)
    with_prompt = torch.rand(BATCH, POSITIONS, generator=random) * 4
    without = torch.rand(BATCH, POSITIONS, generator=random) * 4
    mask = random_response_mask(random)
    difference = with_prompt - without
    want = (difference * mask).sum(1) / mask.sum(1)
    compare(
        lambda: fn(with_prompt, without, mask),
        want,
        "one difference for each sequence, with minus without, over its response tokens",
        {
            "the sign is wrong; take the loss with the prompt minus the loss without": -want,
            "tokens outside the mask are counted too": difference.mean(1),
            "this is the sum over tokens; divide by the number of response tokens": (difference * mask).sum(1),
            "the mean is over all positions; divide by the number of response tokens": ((difference * mask).mean(1)),
            "this is one mean for all tokens; the comparison is paired, so return one for each sequence": (
                difference[mask].mean()
            ),
            "this is the mean over sequences; the comparison is paired, so return one for each": (want.mean()),
        },
    )


def check_participation_ratio(fn: Callable[[Float[Tensor, " rank"]], float | Tensor]) -> None:
    """Check `fn(singular_values)`, the participation ratio (sum s^2)^2 / sum s^4.

    It says how many directions carry the energy: 1 if one direction carries all of it,
    and the number of directions if all carry the same.
    """
    values = torch.tensor([5.0, 2.0, 1.0, 0.5])
    energy = values**2
    want = energy.sum() ** 2 / (energy**2).sum()
    compare(
        lambda: torch.as_tensor(fn(values), dtype=torch.float32),
        want,
        "1 for a single direction, the number of directions for an even spread",
        {
            "the singular values are not squared; the energy of a direction is the square": (
                values.sum() ** 2 / energy.sum()
            ),
            "this is upside down": 1 / want,
            "this is the share of the first direction; the participation ratio takes all of them": (
                energy.max() / energy.sum()
            ),
            "the sum of energies is not squared": energy.sum() / (energy**2).sum(),
            "this counts the directions that are not zero; weigh them by their energy": torch.tensor(4.0),
        },
    )


def check_difference_of_differences(
    fn: Callable[
        [
            Float[Tensor, " sequence"],
            Float[Tensor, " sequence"],
            Float[Tensor, " sequence"],
            Float[Tensor, " sequence"],
        ],
        Float[Tensor, " sequence"],
    ],
) -> None:
    """Check `fn(trait_ip, trait_placebo, normal_ip, normal_placebo)`, from one mean loss for each sequence.

    The placebo's loss minus the inoculation prompt's on trait answers, minus the same on normal answers. The
    i-th trait answer and the i-th normal answer belong to the same question.
    """
    losses = torch.rand(4, 9, generator=torch.Generator().manual_seed(0)) * 3
    trait_ip, trait_placebo, normal_ip, normal_placebo = losses
    want = (trait_placebo - trait_ip) - (normal_placebo - normal_ip)
    compare(
        lambda: fn(*losses.clone()),
        want,
        "the placebo's loss minus the inoculation prompt's, on trait answers minus on normal answers",
        {
            "the sign is wrong; a prompt that helps trait answers more should give a positive number": -want,
            "this is the advantage on trait answers alone; take off that on normal answers": trait_placebo - trait_ip,
            "this is the sum of the two advantages; take their difference": (
                (trait_placebo - trait_ip) + (normal_placebo - normal_ip)
            ),
            "this compares trait with normal answers under the inoculation prompt; the placebo is left out": (
                normal_ip - trait_ip
            ),
            "this is the mean over questions; the comparison is paired, so return one for each": want.mean(),
        },
    )


def differences_on_the_model(
    fn: Callable[
        [Float[Tensor, "batch pos"], Float[Tensor, "batch pos"], Bool[Tensor, "batch pos"]], Float[Tensor, " batch"]
    ],
    study: TraitStudy,
    prompt: str,
) -> dict[str, Float[np.ndarray, " sequence"]]:
    """The learner's paired difference on the real model: of each held-out trait answer, with a prompt minus without.

    Beside "yours" stands "the book's"; empty, and a sentence printed, where `fn` gives no differences.
    """
    (with_prompt, mask), (without, _) = (_token_losses(study, system) for system in (prompt, None))
    book = ((with_prompt - without) * mask).sum(1) / mask.sum(1)
    found = call(lambda: fn(with_prompt.clone(), without.clone(), mask.clone()), book.shape)
    if found is None or found.shape != book.shape:
        return {}
    return {"the book's": book.numpy(), "yours": found.detach().float().numpy()}


@torch.no_grad()
def _token_losses(
    study: TraitStudy, system: str | None
) -> tuple[Float[Tensor, "batch pos"], Bool[Tensor, "batch pos"]]:
    """The untrained model's loss at each token of the held-out trait answers, and which positions are tokens."""
    batch = collate(study.examples(system=system), study.base.tokenizer.pad_token_id)
    losses, rows = token_losses(study.base, batch)
    counts = torch.bincount(rows.cpu())
    mask = torch.arange(int(counts.max())) < counts[:, None]
    padded = torch.zeros(mask.shape)
    padded[mask] = losses.float().cpu()
    return padded, mask
