"""Checks for the exercises of the chapter on PPS gradient reversal.

Sign convention throughout: `g = dL/dh`. Descent moves `h` along `-g`, so a negative component of `g` along a
trait vector presses the trait up (amplifies), and a positive one presses it down (attenuates).
"""

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from helpers.chat import collate
from helpers.checking import (
    BATCH,
    POSITIONS,
    WIDTH,
    call,
    compare,
    questions,
    random_activations,
    random_response_mask,
    say_not_yet,
    say_right,
)
from helpers.forward import read
from helpers.gradients import Capture, loss_along
from helpers.interventions import applied
from helpers.studies.traits import TraitStudy
from helpers.studies.turning import GRID

question = questions(__file__)


def check_persona_vector(
    fn: Callable[
        [
            Float[Tensor, "batch pos d_model"],
            Bool[Tensor, "batch pos"],
            Float[Tensor, "batch pos d_model"],
            Bool[Tensor, "batch pos"],
        ],
        Float[Tensor, " d_model"],
    ],
) -> None:
    """Check `fn(trait, trait_mask, normal, normal_mask)`: the persona vector, from activations.

    The vector is the mean over sequences of the mean over response tokens (mask True), trait minus normal.
    It is not scaled.
    """
    random = torch.Generator().manual_seed(0)
    trait, normal = random_activations(random) + 1, random_activations(random)
    trait_mask, normal_mask = random_response_mask(random), random_response_mask(random)

    def per_sequence(h: Tensor, mask: Tensor) -> Tensor:
        return (h * mask[..., None]).sum(1) / mask.sum(1)[:, None]

    want = per_sequence(trait, trait_mask).mean(0) - per_sequence(normal, normal_mask).mean(0)
    compare(
        lambda: fn(trait, trait_mask, normal, normal_mask),
        want,
        "the mean over sequences of the mean over response tokens, trait minus normal",
        {
            "this is normal minus trait; the vector must point towards the trait": -want,
            "the vector has been scaled to unit length; keep the length of the difference": want / want.norm(),
            "prompt tokens are counted too; average over the response mask only": trait.mean((0, 1))
            - normal.mean((0, 1)),
            "long answers count more than short ones; average within each sequence before you average over "
            "sequences": trait[trait_mask].mean(0) - normal[normal_mask].mean(0),
        },
    )


def check_cosine(
    fn: Callable[
        [Float[Tensor, "batch pos d_model"], Float[Tensor, " d_model"], Bool[Tensor, "batch pos"]],
        Float[Tensor, " batch"],
    ],
) -> None:
    """Check `fn(gradients, vector, mask)`: for each sequence the mean over tokens of cos(gradient, vector).

    Only tokens where the mask is True count.
    """
    random = torch.Generator().manual_seed(0)
    lengths = torch.rand(BATCH, POSITIONS, 1, generator=random) * 5 + 0.1
    gradients, mask = random_activations(random) * lengths, random_response_mask(random)
    vector = torch.randn(WIDTH, generator=random)
    cosines = F.cosine_similarity(gradients, vector.expand_as(gradients), dim=-1)
    want = (cosines * mask).sum(1) / mask.sum(1)
    total = (gradients * mask[..., None]).sum(1)
    of_means = F.cosine_similarity(total, vector.expand_as(total), dim=-1)
    compare(
        lambda: fn(gradients, vector, mask),
        want,
        "the mean over tokens of the cosine, for each sequence",
        {
            "the sign is wrong; take the gradient itself, not the step that descent makes": -want,
            "this is the cosine of the mean gradient; take each token's cosine, then the mean": of_means,
            "the sign is wrong, and this is the cosine of the mean gradient; take each token's cosine, then "
            "the mean": -of_means,
            "tokens outside the mask are counted too": cosines.mean(1),
            "masked tokens are counted as zero; divide by the number of tokens in the mask": (cosines * mask).mean(1),
            "this is the dot product with the unit vector; divide by the length of each gradient too": (
                (gradients @ vector / vector.norm() * mask).sum(1) / mask.sum(1)
            ),
            "this is the dot product; divide by the lengths of gradient and vector": (
                (gradients @ vector * mask).sum(1) / mask.sum(1)
            ),
        },
    )


def check_steering_hook(
    fn: Callable[
        [Float[Tensor, "batch pos d_model"], Float[Tensor, " d_model"], float, Bool[Tensor, "batch pos"]],
        Float[Tensor, "batch pos d_model"],
    ],
) -> None:
    """Check `fn(activations, vector, coefficient, positions)`: adds coefficient * vector there only.

    The vector is added as it is, not scaled to unit length, and the activations passed in stay as they are.
    """
    random = torch.Generator().manual_seed(0)
    activations, positions = random_activations(random), random_response_mask(random)
    vector, coefficient = torch.randn(WIDTH, generator=random) * 3, 1.5
    push = coefficient * vector
    given = activations.clone()
    want = activations + push * positions[..., None]
    compare(
        lambda: fn(given, vector, coefficient, positions),
        want,
        "coefficient times vector, at the given positions only",
        {
            "the vector is added at every position; add it only where positions is True": activations + push,
            "the vector is added where positions is False": activations + push * ~positions[..., None],
            "the vector was scaled to unit length; add it as it is": (
                activations + push / vector.norm() * positions[..., None]
            ),
            "the coefficient is left out": activations + vector * positions[..., None],
            "the vector is subtracted": activations - push * positions[..., None],
            "the other positions are set to zero; they must stay as they are": want * positions[..., None],
            "the activations are replaced by the vector; add it to them": torch.where(
                positions[..., None], push, activations
            ),
            "nothing has changed; return the steered activations": activations,
        },
        unchanged=(given, activations),
    )


def check_random_control(fn: Callable[[Float[Tensor, " d_model"], int], Float[Tensor, " d_model"]]) -> None:
    """Check `fn(vector, seed)`, a random vector of the same norm: the control for a steering vector."""
    vector = torch.randn(512, generator=torch.Generator().manual_seed(2604)) * 3  # a seed few would try
    answers = []
    for seed in (0, 0, 1):
        answer = call(lambda seed=seed: fn(vector, seed), vector.shape)  # type: ignore[misc]
        if answer is None:
            return
        answers.append(answer)
    first, again, other = answers
    if not torch.equal(first, again):
        say_not_yet("the same seed gave two different vectors; draw from a generator that is made from the seed.")
    elif torch.allclose(first, other):
        say_not_yet("two seeds gave the same vector; the seed must decide the draw.")
    elif abs(F.cosine_similarity(first, vector, dim=0)) > 0.3:
        say_not_yet("the vector is not random: it points along the one that it should be a control for.")
    elif abs(first.norm() / vector.norm() - 1) > 1e-3:
        say_not_yet("the norm differs from the vector's, so that a difference in effect could be due to length.")
    elif (first >= 0).all():
        say_not_yet("no entry is negative; draw from a normal distribution, so that no direction is preferred.")
    else:
        say_right("a random direction, the same for the same seed, as long as the vector it stands in for.")


def check_first_component_share(fn: Callable[[Float[Tensor, "n d_model"]], float | Tensor]) -> None:
    """Check `fn(differences)`, the second-moment share of the first uncentred component."""
    random = torch.Generator().manual_seed(0)
    differences = torch.randn(12, WIDTH, generator=random) + 0.8

    def share(rows: Tensor, power: int = 2) -> Tensor:
        values = torch.linalg.svdvals(rows) ** power
        return values[0] / values.sum()

    compare(
        lambda: torch.as_tensor(fn(differences), dtype=torch.float32),
        share(differences),
        "the first singular value squared over the sum of all squared, with the mean left in",
        {
            "the mean was taken away; the common shift of all sequences is what is looked for": share(
                differences - differences.mean(0)
            ),
            "the singular values are not squared": share(differences, power=1),
            "this is what the other components carry; return the share of the first": 1 - share(differences),
        },
    )


def check_projection_edit(
    fn: Callable[[Float[Tensor, "batch pos d_model"], Float[Tensor, " d_model"]], Tensor], mode: str
) -> None:
    """Check `fn(gradients, vector)`, an edit of the gradient's component along a vector of any length.

    With `c = g . v_hat`: "neutralise" makes the component 0, "attenuate" +|c|, "amplify" -|c|. The rest
    of the gradient stays as it is. Raises ValueError for another mode.
    """
    if mode not in ("neutralise", "attenuate", "amplify"):
        raise ValueError(f"There is no mode {mode!r}; choose 'neutralise', 'attenuate' or 'amplify'.")
    random = torch.Generator().manual_seed(0)
    gradients = random_activations(random)
    vector = torch.randn(WIDTH, generator=random) * 3
    unit = vector / vector.norm()
    along = (gradients @ unit)[..., None]  # (batch, pos, 1)
    rest = gradients - along * unit
    edits = {"neutralise": rest, "attenuate": rest + along.abs() * unit, "amplify": rest - along.abs() * unit}
    mistakes = {f"this is what {other!r} does": edit for other, edit in edits.items() if other != mode}
    raw = (gradients @ vector)[..., None]
    sign = {"neutralise": 0.0, "attenuate": 1.0, "amplify": -1.0}[mode]
    mistakes |= {
        "the vector has not been scaled to unit length": gradients - raw * vector + sign * raw.abs() * vector,
        "the component is turned round, whatever its sign; its new sign must not depend on the old one": (
            gradients - 2 * along * unit
        ),
        "the rest of the gradient is lost; change only the component along the vector": (
            sign * along.abs() * unit if sign else along * unit
        ),
        "the new component is added without taking the old one away": gradients + sign * along.abs() * unit,
        "nothing has changed; return the edited gradient": gradients,
    }
    compare(
        lambda: fn(gradients.clone(), vector),
        edits[mode],
        f"{mode}: the component along the vector is edited, and all else is left alone",
        mistakes,
    )


def check_pressure(fn: Callable[[float], str]) -> None:
    """Check `fn(cosine)`, which reads cos(gradient, trait vector): "amplifies" or "attenuates"."""
    try:
        answers = [str(fn(cosine)).strip().lower() for cosine in (-0.2, 0.2)]
    except Exception as error:
        say_not_yet(f"your function stopped with {type(error).__name__}: {error}")
        return
    if answers == ["amplifies", "attenuates"]:
        say_right("descent moves the activation against the gradient, so a negative cosine presses the trait up.")
    elif answers == ["attenuates", "amplifies"]:
        say_not_yet("it is the other way round: descent moves the activation along minus the gradient.")
    else:
        say_not_yet(f'return "amplifies" or "attenuates"; for -0.2 and 0.2 you returned {answers}.')


ANSWERS = 16
"""Held-out answers on which a learner's vector is tried: enough to see a curve, and soon done."""


def pressure_along(
    fn: Callable[
        [
            Float[Tensor, "batch pos d_model"],
            Bool[Tensor, "batch pos"],
            Float[Tensor, "batch pos d_model"],
            Bool[Tensor, "batch pos"],
        ],
        Float[Tensor, " d_model"],
    ],
    study: TraitStudy,
) -> dict[str, Float[np.ndarray, "coefficient example"]]:
    """The learner's persona vector on the real model: the slope of the loss along it, at each of `turning.GRID`.

    `fn` gets the activations of the extraction split at the chapter's block. Beside "yours" stands "the book's";
    empty, and a sentence printed, where `fn` gives no vector.
    """
    layer, book = study.params.layer, study.vector().at(study.params.layer)
    trait, normal = (_activations(study, level) for level in ("strong", "normal"))
    found = call(lambda: fn(*trait, *normal), book.shape)
    if found is None or found.shape != book.shape:
        return {}
    examples = study.examples()[:ANSWERS]
    return {
        name: loss_along(study.base, examples, layer, vector.to(book), GRID)[1].numpy()
        for name, vector in (("the book's", book), ("yours", found.detach()))
    }


@torch.no_grad()
def _activations(study: TraitStudy, level: str) -> tuple[Float[Tensor, "batch pos d_model"], Bool[Tensor, "batch pos"]]:
    """At the chapter's block, while the extraction split's answers of a level are read; and where the answers are."""
    model, rows, kept = study.base, study.rows["extract"], dict[int, Tensor]()
    texts = [row.question for row in rows], [row.answer(level) for row in rows]
    batch = collate(study.encoded(*texts), model.tokenizer.pad_token_id).to(model.device)
    with applied(model, Capture([study.params.layer], kept)), model.reading(batch), model.autocast():
        read(model, batch)
    return kept[study.params.layer].float().cpu(), batch.response.cpu()
