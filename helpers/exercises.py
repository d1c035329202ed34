"""Checks for the exercises: a learner passes an answer and reads whether it is right and, if not, why.

    def cosine_per_sequence(gradients, vector, mask): ...
    check_cosine(cosine_per_sequence)

Each check runs the answer on random tensors, compares it with the book's definition, and recognises the
usual mistakes. It prints one line that begins with "Right" or "Not yet"; it never shows the solution.

Sign convention throughout: `g = dL/dh`. Descent moves `h` along `-g`, so a negative component of `g` along a
trait vector presses the trait up (amplifies), and a positive one presses it down (attenuates).
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

BATCH, POSITIONS, WIDTH, VOCABULARY = 4, 7, 16, 11


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
    trait, normal = _activations(random) + 1, _activations(random)
    trait_mask, normal_mask = _mask(random), _mask(random)

    def per_sequence(h: Tensor, mask: Tensor) -> Tensor:
        return (h * mask[..., None]).sum(1) / mask.sum(1)[:, None]

    want = per_sequence(trait, trait_mask).mean(0) - per_sequence(normal, normal_mask).mean(0)
    _compare(
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


def check_random_control(fn: Callable[[Float[Tensor, " d_model"], int], Float[Tensor, " d_model"]]) -> None:
    """Check `fn(vector, seed)`, a random vector of the same norm: the control for a steering vector."""
    vector = torch.randn(512, generator=torch.Generator().manual_seed(2604)) * 3  # a seed few would try
    answers = []
    for seed in (0, 0, 1):
        answer = _call(lambda seed=seed: fn(vector, seed), vector.shape)  # type: ignore[misc]
        if answer is None:
            return
        answers.append(answer)
    first, again, other = answers
    if not torch.equal(first, again):
        _not_yet("the same seed gave two different vectors; draw from a generator that is made from the seed.")
    elif torch.allclose(first, other):
        _not_yet("two seeds gave the same vector; the seed must decide the draw.")
    elif abs(F.cosine_similarity(first, vector, dim=0)) > 0.3:
        _not_yet("the vector is not random: it points along the one that it should be a control for.")
    elif abs(first.norm() / vector.norm() - 1) > 1e-3:
        _not_yet("the norm differs from the vector's, so that a difference in effect could be due to length.")
    elif (first >= 0).all():
        _not_yet("no entry is negative; draw from a normal distribution, so that no direction is preferred.")
    else:
        _right("a random direction, the same for the same seed, as long as the vector it stands in for.")


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
    gradients, mask = _activations(random) * lengths, _mask(random)
    vector = torch.randn(WIDTH, generator=random)
    cosines = F.cosine_similarity(gradients, vector.expand_as(gradients), dim=-1)
    want = (cosines * mask).sum(1) / mask.sum(1)
    total = (gradients * mask[..., None]).sum(1)
    of_means = F.cosine_similarity(total, vector.expand_as(total), dim=-1)
    _compare(
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


def check_pressure(fn: Callable[[float], str]) -> None:
    """Check `fn(cosine)`, which reads cos(gradient, trait vector): "amplifies" or "attenuates"."""
    try:
        answers = [str(fn(cosine)).strip().lower() for cosine in (-0.2, 0.2)]
    except Exception as error:
        _not_yet(f"your function stopped with {type(error).__name__}: {error}")
        return
    if answers == ["amplifies", "attenuates"]:
        _right("descent moves the activation against the gradient, so a negative cosine presses the trait up.")
    elif answers == ["attenuates", "amplifies"]:
        _not_yet("it is the other way round: descent moves the activation along minus the gradient.")
    else:
        _not_yet(f'return "amplifies" or "attenuates"; for -0.2 and 0.2 you returned {answers}.')


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
    activations, positions = _activations(random), _mask(random)
    vector, coefficient = torch.randn(WIDTH, generator=random) * 3, 1.5
    push = coefficient * vector
    given = activations.clone()
    want = activations + push * positions[..., None]
    _compare(
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
    gradients = _activations(random)
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
    _compare(
        lambda: fn(gradients.clone(), vector),
        edits[mode],
        f"{mode}: the component along the vector is edited, and all else is left alone",
        mistakes,
    )


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
    mask = _mask(random)

    def losses(predictions: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(predictions.transpose(1, 2), targets, reduction="none")

    def mean(values: Tensor, kept: Tensor) -> Tensor:
        return (values * kept).sum(1) / kept.sum(1)

    shifted = losses(logits[:, :-1], ids[:, 1:])
    want = mean(shifted, mask[:, 1:])
    _compare(
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
    mask = _mask(random)
    difference = with_prompt - without
    want = (difference * mask).sum(1) / mask.sum(1)
    _compare(
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
    _compare(
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


def check_first_component_share(fn: Callable[[Float[Tensor, "n d_model"]], float | Tensor]) -> None:
    """Check `fn(differences)`, the second-moment share of the first uncentred component."""
    random = torch.Generator().manual_seed(0)
    differences = torch.randn(12, WIDTH, generator=random) + 0.8

    def share(rows: Tensor, power: int = 2) -> Tensor:
        values = torch.linalg.svdvals(rows) ** power
        return values[0] / values.sum()

    _compare(
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


PLACEBO_QUESTION = """An inoculation prompt lowers the loss on trait data.
What does a placebo prompt of the same length tell us?
  a) If it lowers the loss as much, the gain may come from any prompt, and not from what the prompt says.
  b) If it lowers the loss as much, inoculation is proved, since two prompts work.
  c) If it lowers the loss less, the model trained with the inoculation prompt cannot have the trait.
  d) Nothing: only the trait score after training counts."""


def check_placebo_interpretation(choice: str | None = None) -> None:
    """Ask what the placebo prompt is a control for, or check the answer "a", "b", "c" or "d"."""
    _check_choice(
        choice,
        PLACEBO_QUESTION,
        "a",
        {
            "a": "the placebo holds fixed that there is a prompt of this length, so what is left is its content.",
            "b": "a placebo that does as well takes the explanation away: the content would not matter.",
            "c": "the loss before training says nothing certain about the trait after it; that must be measured.",
            "d": "the score shows that the prompt defends; the placebo is there to find out by what.",
        },
    )


def check_pile_mean(
    fn: Callable[[Float[Tensor, "token weight"], list[int]], Float[Tensor, " weight"]],
) -> None:
    """Check `fn(token_gradients, lengths)`, the pile-average gradient: mean over tokens, then over examples."""
    random = torch.Generator().manual_seed(0)
    lengths = [2, 7, 4]
    gradients = torch.randn(sum(lengths), WIDTH, generator=random)
    parts = gradients.split(lengths)
    _compare(
        lambda: fn(gradients.clone(), lengths),
        torch.stack([part.mean(0) for part in parts]).mean(0),
        "the mean over each example's tokens, then over examples",
        {
            "this is the mean over all tokens, so long answers weigh more; average within each example first": (
                gradients.mean(0)
            ),
            "this adds up over tokens; take the mean within each example": torch.stack(
                [part.sum(0) for part in parts]
            ).mean(0),
            "this adds up over examples; take their mean": torch.stack([part.mean(0) for part in parts]).sum(0),
        },
    )


def check_alpha_for_ratio(
    fn: Callable[[Float[Tensor, " weight"], Float[Tensor, " weight"], float], float | Tensor],
) -> None:
    """Check `fn(v, delta, ratio)`: the alpha at which ||alpha v|| = ratio ||delta||."""
    random = torch.Generator().manual_seed(0)
    v, delta = 3 * torch.randn(WIDTH, generator=random), torch.randn(WIDTH, generator=random)
    want = 0.1 * delta.norm() / v.norm()
    _compare(
        lambda: torch.as_tensor(fn(v.clone(), delta.clone(), 0.1), dtype=torch.float32),
        want,
        "||alpha v|| is the ratio times ||delta||",
        {
            "this is upside down; a longer v needs a smaller alpha": 0.1 * v.norm() / delta.norm(),
            "the ratio is missing": delta.norm() / v.norm(),
            "these are squared norms; take the root": 0.1 * delta.norm() ** 2 / v.norm() ** 2,
            "v's length is missing; divide by it": 0.1 * delta.norm(),
        },
    )


def check_project_on_diff(
    fn: Callable[[Float[Tensor, "m n"], Float[Tensor, "m n"], int], Float[Tensor, "m n"]],
) -> None:
    """Check `fn(v, delta, rank)`: v projected on the span of delta's leading singular pairs, on both sides."""
    random = torch.Generator().manual_seed(0)
    v, delta = torch.randn(WIDTH, 9, generator=random), torch.randn(WIDTH, 9, generator=random)
    u, _, wh = torch.linalg.svd(delta, full_matrices=False)
    left, right = u[:, :3] @ u[:, :3].T, wh[:3].T @ wh[:3]
    _compare(
        lambda: fn(v.clone(), delta.clone(), 3),
        left @ v @ right,
        "U U^T v W W^T with delta's three leading singular pairs",
        {
            "the right side is not projected": left @ v,
            "the left side is not projected": v @ right,
            "this projects delta, not v": left @ delta @ right,
            "this cuts v to low rank; the subspace must be delta's": _truncated(v, 3),
        },
    )


def _truncated(matrix: Float[Tensor, "m n"], rank: int) -> Float[Tensor, "m n"]:
    u, s, wh = torch.linalg.svd(matrix, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ wh[:rank]


MICRO_BATCH_QUESTION = """\
Why is the covariance loss 0 at every step in micro-batches of two prompts?

a) The language loss has already made the class means equal.
b) The gradient of a covariance is too small for bfloat16.
c) A covariance needs two prompts of a class, and two classes of two do not fit into a batch of two.
d) Matching with L2 is 0 where matching with L1 is."""

FAIR_QUESTION = """\
PrOSV keeps 20 points more of a quiz than FSSV, each with the factor it was trained to. What is missing?

a) The quiz with another sampling temperature.
b) How long either takes to decode.
c) How strongly each shows its concept with those factors.
d) Whether the quiz questions were in the training data."""

SIGN_QUESTION = """\
A filter scores points by +<grad L, grad S> and keeps the lowest scores. What does it do?

a) The same as FIHS: a sign does not change which points are extreme.
b) It keeps the harmful points and drops harmless ones.
c) It filters at random.
d) It changes the safety score."""

STEERING_SIGN_QUESTION = """V = G(rude answers) - G(polite answers) at a finetuned model. How do you make it politer?
a) Add a small multiple of V: the loss of rude answers rises.
b) Subtract a small multiple of V: one subtracts what one wants to be rid of.
c) Add or subtract: a gradient difference has no sign.
d) Add as large a multiple of V as one can: the more, the politer."""


def check_steering_sign(choice: str | None = None) -> None:
    """Ask which way along V a habit is taken away, or check the answer "a", "b", "c" or "d"."""
    _check_choice(
        choice,
        STEERING_SIGN_QUESTION,
        "a",
        {
            "a": "V is a gradient, so it points to a higher loss on rude answers, and to fewer of them.",
            "b": "V is a gradient of a loss, not of a probability; against it, rude answers become likelier.",
            "c": "the two piles are not exchangeable: swapping them turns V round.",
            "d": "far from the anchor a gradient says nothing, and a broken model is not a polite one.",
        },
    )


def check_ablation(fn: Callable[[Float[Tensor, "batch d_model"], Float[Tensor, "k d_model"]], Tensor]) -> None:
    """Check `fn(a, directions)`: activations with orthonormal directions projected out."""
    random = torch.Generator().manual_seed(0)
    a = torch.randn(BATCH, WIDTH, generator=random)
    directions = torch.linalg.qr(torch.randn(WIDTH, 3, generator=random))[0].T
    along = a @ directions.T @ directions
    _compare(
        lambda: fn(a.clone(), directions.clone()),
        a - along,
        "a - D^T D a",
        {
            "this is the part that is to be removed": along,
            "only the first direction is removed": a - (a @ directions[:1].T) @ directions[:1],
            "the component is turned round, not removed": a - 2 * along,
        },
    )


def check_covariance_loss(fn: Callable[[Float[Tensor, "batch d_model"], Bool[Tensor, " batch"]], Tensor]) -> None:
    """Check `fn(z, harmful)`: ||S_1 - S_0||_F^2 / d^2 with unbiased covariances of the two classes."""
    random = torch.Generator().manual_seed(0)
    z = torch.randn(10, WIDTH, generator=random)
    harmful = torch.arange(10) < 4

    def loss(correction: int = 1, centred: bool = True) -> Tensor:
        found = []
        for part in (z[harmful], z[~harmful]):
            part = part - part.mean(0) if centred else part
            found.append(part.T @ part / (len(part) - correction))
        return (found[0] - found[1]).square().sum() / WIDTH**2

    _compare(
        lambda: fn(z.clone(), harmful.clone()),
        loss(),
        "||S_1 - S_0||_F^2 / d^2",
        {
            "divide by n - 1, not by n": loss(correction=0),
            "the class means are not taken off": loss(centred=False),
            "divide by d squared, not by d": loss() * WIDTH,
            "this is the norm, not its square": (loss() * WIDTH**2).sqrt() / WIDTH**2,
        },
    )


def check_k_star(fn: Callable[[list[float]], int]) -> None:
    """Check `fn(rates)`: the smallest number of directions with a refusal rate below 0.3, or `len(rates)`."""
    _compare(
        lambda: torch.tensor(
            [
                fn(rates)
                for rates in ([1.0, 0.2, 0.1], [1.0, 0.6, 0.3, 0.25], [0.9, 0.8, 0.7], [0.2, 0.1], [1.0, 0.2, 0.5])
            ],
            dtype=torch.float32,
        ),
        torch.tensor([1.0, 3.0, 3.0, 0.0, 1.0]),
        "the first K with a rate below 0.3",
        {
            "0.3 itself is not below 0.3": torch.tensor([1.0, 2.0, 3.0, 0.0, 1.0]),
            "count from 0: row 0 is the model as it is": torch.tensor([2.0, 4.0, 4.0, 1.0, 2.0]),
            "the last such K, not the first, is given": torch.tensor([2.0, 3.0, 3.0, 1.0, 1.0]),
        },
    )


def check_micro_batch(choice: str | None = None) -> None:
    """Ask why the published covariance loss is 0, or check the answer "a", "b", "c" or "d"."""
    _check_choice(
        choice,
        MICRO_BATCH_QUESTION,
        "c",
        {
            "a": "with equal means covariances may still differ; and nothing has made the means equal.",
            "b": "gradients of a covariance are as large as any; it is the loss itself that is 0.",
            "c": "an unbiased covariance divides by n - 1, so each class needs two prompts: four in all.",
            "d": "L1 and L2 are 0 at the same places only.",
        },
    )


def check_fihs(
    fn: Callable[[Float[Tensor, "point weight"], Float[Tensor, " weight"]], Float[Tensor, " point"]],
) -> None:
    """Check `fn(gradients, safety_gradient)`: minus the inner product of each point's loss gradient with grad S."""
    random = torch.Generator().manual_seed(0)
    gradients, safety = torch.randn(BATCH, WIDTH, generator=random), torch.randn(WIDTH, generator=random)
    product = gradients @ safety
    _compare(
        lambda: fn(gradients.clone(), safety.clone()),
        -product,
        "minus the inner product of each point's loss gradient with the safety score's",
        {
            "the sign is turned: descent moves the weights along minus the loss's gradient": product,
            "this is the cosine; a longer gradient makes a longer step": -F.cosine_similarity(
                gradients, safety[None], dim=-1
            ),
            "the safety gradient has been scaled to unit length": -product / safety.norm(),
        },
    )


def check_safety_score(fn: Callable[[Float[Tensor, "probe vocabulary"], int, int], Tensor]) -> None:
    """Check `fn(logits, unsafe, safe)`: the mean over probes of the unsafe token's logit minus the safe one's."""
    logits = torch.randn(BATCH, VOCABULARY, generator=torch.Generator().manual_seed(0))
    unsafe, safe = 3, 7
    want = (logits[:, unsafe] - logits[:, safe]).mean()
    p = logits.softmax(-1)
    _compare(
        lambda: fn(logits.clone(), unsafe, safe),
        want,
        "the mean over probes of z_unsafe - z_safe",
        {
            "this is safe minus unsafe; larger has to mean less safe": -want,
            "take the mean over the probes, not the sum": want * BATCH,
            "this is a difference of probabilities; take logits": (p[:, unsafe] - p[:, safe]).mean(),
        },
    )


def check_crossing(fn: Callable[[float, float, float, float, float], float]) -> None:
    """Check `fn(low, high, spread, low_weight, high_weight)`: where two Gaussians of one spread are equally likely."""
    cases = [(0.0, 4.0, 1.0, 0.5, 0.5), (0.0, 4.0, 1.0, 0.9, 0.1), (-1.0, 3.0, 2.0, 0.8, 0.2)]

    def at(low: float, high: float, spread: float, first: float, second: float) -> Tensor:
        return (low + high) / 2 + spread**2 / (high - low) * torch.tensor(first / second).log()

    _compare(
        lambda: torch.tensor([float(fn(*case)) for case in cases]),
        torch.stack([at(*case) for case in cases]),
        "the midpoint, moved by spread^2 / (high - low) * log(low_weight / high_weight)",
        {
            "this is the midpoint; the rarer component's region is smaller": torch.tensor([2.0, 2.0, 1.0]),
            "the boundary moves towards the rarer component, not away from it": torch.stack(
                [at(a, b, s, second, first) for a, b, s, first, second in cases]
            ),
        },
    )


def check_sign(choice: str | None = None) -> None:
    """Ask what a filter without the minus sign does, or check the answer "a", "b", "c" or "d"."""
    _check_choice(
        choice,
        SIGN_QUESTION,
        "b",
        {
            "a": "ranks are turned round, and filtering is by rank.",
            "b": "it drops what would have made the model safer and keeps what makes it less safe.",
            "c": "a random filter keeps a mixture; this one is worse than random.",
            "d": "the safety score's gradient does not depend on the points.",
        },
    )


def check_ends(fn: Callable[[int, int, int], Bool[Tensor, " pos"]]) -> None:
    """Check `fn(length, first, last)`: the mask of a prompt's first and last tokens, each once."""
    cases = [(6, 2, 2), (6, 0, 1), (6, 3, 0), (3, 2, 2), (4, 9, 1)]

    def marked(length: int, first: int, last: int) -> Tensor:
        place = torch.arange(length)
        return ((place < first) | (place >= length - last)).float()

    def shown(masks: list[Tensor]) -> Tensor:
        return torch.cat(masks)

    _compare(
        lambda: shown([torch.as_tensor(fn(*case)).float() for case in cases]),
        shown([marked(*case) for case in cases]),
        "true for the first `first` and the last `last` of `length` positions",
        {
            "the middle is marked, and the ends are not": shown([1 - marked(*case) for case in cases]),
            "only the first tokens are marked": shown([marked(n, p, 0) for n, p, _ in cases]),
            "only the last tokens are marked": shown([marked(n, 0, s) for n, _, s in cases]),
            "one token too many at the end: the last position is length - 1": shown(
                [marked(n, p, s + 1) for n, p, s in cases]
            ),
        },
    )


def check_feature_step(
    fn: Callable[[float, Float[Tensor, " d_model"], float, float, float, Float[Tensor, " d_model"]], Tensor],
) -> None:
    """Check `fn(alpha, v, factor_rate, vector_rate, sign_alpha, sign_v)`: how far alpha v moves in one step."""
    random = torch.Generator().manual_seed(0)
    v = torch.randn(WIDTH, generator=random)
    sign = torch.randn(WIDTH, generator=random).sign()
    alpha, factor_rate, vector_rate, turn = 3.0, 0.5, 0.1, -1.0
    want = (alpha + factor_rate * turn) * (v + vector_rate * sign) - alpha * v
    _compare(
        lambda: fn(alpha, v.clone(), factor_rate, vector_rate, turn, sign.clone()),
        want,
        "(alpha + eta_alpha s') (v + eta_v s) - alpha v",
        {
            "the term of both rates is missing: the two move at once": want - factor_rate * turn * vector_rate * sign,
            "this is where the feature ends; subtract where it began": want + alpha * v,
            "only the vector has moved": alpha * vector_rate * sign,
        },
    )


def check_overall(fn: Callable[[Any, Any, Any], Any]) -> None:
    """Check `fn(concept, relevance, fluency)`: the harmonic mean of ratings from 0 to 2, 0 where one is 0."""
    grades = torch.tensor([0.0, 1.0, 2.0])
    parts = torch.cartesian_prod(grades, grades, grades).T
    want = torch.where(parts.amin(0) > 0, 3 / (1 / parts.clamp(min=1e-9)).sum(0), 0.0)
    _compare(
        lambda: torch.as_tensor(fn(*(part.numpy() for part in parts))),
        want,
        "3 / (1/c + 1/r + 1/f), and 0 where one of them is 0",
        {
            "this is the ordinary mean, which a single 0 hardly lowers": parts.mean(0),
            "this is the geometric mean": parts.prod(0) ** (1 / 3),
            "this is the lowest of the three": parts.amin(0),
        },
    )


def check_fair_comparison(choice: str | None = None) -> None:
    """Ask what a comparison of two ways of steering lacks, or check the answer "a", "b", "c" or "d"."""
    _check_choice(
        choice,
        FAIR_QUESTION,
        "c",
        {
            "a": "that would change both columns alike.",
            "b": "decoding speed has nothing to do with what is right.",
            "c": "a vector that steers less also harms less, so compare at equal concept rating.",
            "d": "training answers hold no quiz questions, whichever tokens are steered.",
        },
    )


# Chapter 0


def check_predicting(fn: Callable[[Bool[Tensor, "batch pos"]], Bool[Tensor, "batch pos"]]) -> None:
    """Check `fn(response)`: the positions whose next token belongs to the response."""
    response = _mask(torch.Generator().manual_seed(0))
    want = F.pad(response[:, 1:], (0, 1)).float()
    _compare(
        lambda: fn(response.clone()),
        want,
        "each position is marked whose next token belongs to the response",
        {
            "this is shifted the wrong way; position t predicts token t + 1": F.pad(response[:, :-1], (1, 0)).float(),
            "these are the response tokens themselves; a token is predicted one position earlier": response.float(),
            "the last column wraps round to the first; nothing follows the last position": response.roll(1, 1).float(),
            "the positions that predict and those that are predicted are both marked": (
                response | F.pad(response[:, 1:], (0, 1))
            ).float(),
        },
    )


def check_logit_lens(
    fn: Callable[
        [Float[Tensor, "pos d_model"], Float[Tensor, " d_model"], Float[Tensor, "vocab d_model"], float],
        Float[Tensor, "pos vocab"],
    ],
) -> None:
    """Check `fn(h, scale, unembedding, eps)`: root-mean-square normalisation, then the unembedding."""
    random = torch.Generator().manual_seed(0)
    h = torch.randn(POSITIONS, WIDTH, generator=random) * 3
    scale = torch.rand(WIDTH, generator=random) + 0.5
    unembedding, eps = torch.randn(VOCABULARY, WIDTH, generator=random), 0.5
    squares = h.square().mean(-1, keepdim=True)
    normal = h / (squares + eps).sqrt()
    given = h.clone()
    _compare(
        lambda: fn(given, scale, unembedding, eps),
        (normal * scale) @ unembedding.T,
        "normalised as at the model's end, then one number for each token of the vocabulary",
        {
            "the activations are not normalised first": h @ unembedding.T,
            "they are scaled, but not divided by their root mean square": (h * scale) @ unembedding.T,
            "the scale is left out": normal @ unembedding.T,
            "eps is left out": (h / squares.sqrt() * scale) @ unembedding.T,
            "eps is added to the root; add it to the mean of squares": (h / (squares.sqrt() + eps) * scale)
            @ unembedding.T,
            "this divides by the mean of squares; take its root": (h / (squares + eps) * scale) @ unembedding.T,
            "this divides by the length; take the mean of squares and not their sum": (
                (h / (h.square().sum(-1, keepdim=True) + eps).sqrt() * scale) @ unembedding.T
            ),
            "the mean is over positions; take it over the last dimension": (
                (h / (h.square().mean(0) + eps).sqrt() * scale) @ unembedding.T
            ),
        },
        unchanged=(given, h),
    )


def check_slope(
    fn: Callable[
        [Callable[[Float[Tensor, " d_model"]], Tensor], Float[Tensor, " d_model"], Float[Tensor, " d_model"], float],
        float | Tensor,
    ],
) -> None:
    """Check `fn(loss, h, direction, size)`, a central difference along the direction at unit length."""
    random = torch.Generator().manual_seed(0)
    h, direction = torch.randn(WIDTH, generator=random), torch.randn(WIDTH, generator=random) * 3
    reader = torch.randn(WIDTH, generator=random)
    size = 0.25

    def loss(at: Float[Tensor, " d_model"]) -> Tensor:
        return (reader @ at).exp() / 10 + at.square().sum()

    def central(step: Tensor, width: float) -> Tensor:
        return (loss(h + step) - loss(h - step)) / width

    unit = direction / direction.norm()
    step = size * unit
    want = central(step, 2 * size)
    _compare(
        lambda: torch.as_tensor(fn(loss, h.clone(), direction, size), dtype=torch.float32),
        want,
        "a central difference along the unit direction",
        {
            "the sign is wrong": -want,
            "the direction is not normalised first": central(size * direction, 2 * size),
            "the two points are twice `size` apart; divide by that": central(step, size),
            "this is the difference, not the slope; divide by how far the points are apart": central(step, 1.0),
            "this looks ahead only; a central difference looks back as far": (loss(h + step) - loss(h)) / size,
            "this is the gradient's value; the exercise asks for a difference of two losses": (
                (reader @ h).exp() / 10 * reader + 2 * h
            )
            @ unit,
        },
    )


def check_turning_point(
    fn: Callable[[Float[Tensor, " d_model"], Float[Tensor, " d_model"], float, Float[Tensor, " d_model"]], Any],
) -> None:
    """Check `fn(w, h, y, v)`: the coefficient at which the gradient of (w . (h + a v) - y)^2 / 2 is zero."""
    random = torch.Generator().manual_seed(0)
    w, h, v = (torch.randn(WIDTH, generator=random) for _ in range(3))
    y = 5.0
    want = (y - w @ h) / (w @ v)
    _compare(
        lambda: torch.as_tensor(fn(w, h, y, v), dtype=torch.float32),
        want,
        "the coefficient at which the steered activation is read as exactly y",
        {
            "the sign is wrong; steering adds a v to h": -want,
            "what h says already is left out": y / (w @ v),
            "divide by how far one unit of a moves the reading, w . v": y - w @ h,
            "this divides by the length of v; what counts is how far v moves the reading, w . v": (y - w @ h)
            / v.norm(),
            "this divides by w . w; steering is along v and not along w": (y - w @ h) / (w @ w),
        },
    )


FIVE_SEEDS_QUESTION = """The difference is 12 points, its 95% interval over five seeds [1, 23].
What do you write?
  a) The effect is certain, since the interval excludes zero.
  b) There is probably an effect, but the interval is narrower than it claims and nearly reaches zero: run more seeds.
  c) There is no effect, since intervals over five seeds are worthless.
  d) The same as a, once more sequences per seed have been measured."""


def check_five_seeds(choice: str | None = None) -> None:
    """Ask what an interval over five seeds says, or check the answer "a", "b", "c" or "d"."""
    _check_choice(
        choice,
        FIVE_SEEDS_QUESTION,
        "b",
        {
            "a": "over five seeds the interval holds the truth less often than it says, and zero is just outside it.",
            "b": "five seeds show too little of how much seeds vary, so an end close to zero is not to be leant on.",
            "c": "the coverage is below what is promised, not nil; the interval still says something.",
            "d": "more sequences say nothing about how much the seeds vary; only more seeds do.",
        },
    )


HIGH_SCORE_QUESTION = """Steered hard, the answers score 99 for the trait.
What do you do before you write that the model has the trait?
  a) Nothing: the judge's AUROC on held-out answers is close to 1.
  b) Fit the judge again, until it gives a lower score.
  c) Read the answers, look at their repetition rate, and score those of a random vector of equal length.
  d) Take more questions, so that the interval gets narrower."""


def check_high_score(choice: str | None = None) -> None:
    """Ask what to do about a very high score, or check the answer "a", "b", "c" or "d"."""
    _check_choice(
        choice,
        HIGH_SCORE_QUESTION,
        "c",
        {
            "a": "that AUROC is for fluent written answers; steered text is like neither kind that the judge has read.",
            "b": "a judge that is fitted until one likes its scores measures what one likes.",
            "c": "nonsense can score as high, and each of the three would show it in its own way.",
            "d": "a narrow interval around the wrong quantity is still around the wrong quantity.",
        },
    )


NOT_REPRODUCED_QUESTION = """A claim comes out as "not reproduced" on 32 sequences.
What do you know now?
  a) Zero effect and a small effect would both give this; the interval says how large an effect is still possible.
  b) There is no effect in this model.
  c) The paper is wrong.
  d) The effect is there, but smaller than the threshold."""


def check_not_reproduced(choice: str | None = None) -> None:
    """Ask what "not reproduced" says, or check the answer "a", "b", "c" or "d"."""
    _check_choice(
        choice,
        NOT_REPRODUCED_QUESTION,
        "a",
        {
            "a": "the rule has little power against small effects, so look at the interval before you conclude.",
            "b": "the interval does not exclude zero; that is not the same as excluding everything else.",
            "c": "another model, other data and few sequences refute nothing that was measured elsewhere.",
            "d": 'that would be "direction only": its interval excludes zero, and this one does not.',
        },
    )


def _check_choice(choice: str | None, question: str, right: str, replies: Mapping[str, str]) -> None:
    if choice is None:
        print(question)
        return
    answer = choice.strip().lower().rstrip(").")
    if answer not in replies:
        *letters, last = (f'"{letter}"' for letter in replies)
        _not_yet(f"answer {', '.join(letters)} or {last}.")
    elif answer == right:
        _right(replies[answer])
    else:
        _not_yet(replies[answer])


def _activations(random: torch.Generator) -> Float[Tensor, "batch pos d_model"]:
    return torch.randn(BATCH, POSITIONS, WIDTH, generator=random)


def _mask(random: torch.Generator) -> Bool[Tensor, "batch pos"]:
    """Response masks of unequal length, with a prompt before and padding behind."""
    starts = torch.randint(2, 4, (BATCH, 1), generator=random)
    lengths = torch.tensor([[1], [2], [3], [2]])
    place = torch.arange(POSITIONS)
    return (place >= starts) & (place < starts + lengths)


def _call(answer: Callable[[], Any], shape: torch.Size) -> Tensor | None:
    """The learner's tensor, or None after saying what is wrong with it."""
    try:
        got = answer()
    except Exception as error:  # whatever a learner's function does, the lesson goes on
        _not_yet(f"your function stopped with {type(error).__name__}: {error}")
        return None
    if got is None:
        _not_yet("your function returned nothing; does it end with `return`?")
    elif not isinstance(got, Tensor):
        _not_yet(f"return a tensor; your function returned a {type(got).__name__}.")
    elif got.shape not in (shape, torch.Size([])):
        _not_yet(f"the shape must be {tuple(shape)}, but yours is {tuple(got.shape)}.")
    elif not torch.isfinite(got).all():
        _not_yet("the result has entries that are not finite; is there a division by zero?")
    else:
        return got
    return None


def _compare(
    answer: Callable[[], Any],
    want: Tensor,
    definition: str,
    mistakes: Mapping[str, Tensor],
    *,
    unchanged: tuple[Tensor, Tensor] | None = None,
) -> None:
    """Say whether the answer is the wanted tensor and, if not, which usual mistake it is."""
    got = _call(answer, want.shape)
    if got is None:
        return
    got = got.detach().float()
    if got.shape == want.shape and torch.allclose(got, want, rtol=1e-4, atol=1e-5):
        if unchanged is not None and not torch.equal(*unchanged):
            _not_yet("the result is right, but the tensor passed in was changed; make a new one.")
        else:
            _right(f"{definition}.")
        return
    for explanation, mistake in mistakes.items():
        if got.shape == mistake.shape and torch.allclose(got, mistake, rtol=1e-4, atol=1e-5):
            _not_yet(f"{explanation}.")
            return
    if got.shape != want.shape:
        _not_yet(f"the shape must be {tuple(want.shape)}, but yours is a single number.")
    else:
        _not_yet(f"the numbers differ from the definition: {definition}.")


def _right(text: str) -> None:
    print(f"Right: {text}")


def _not_yet(text: str) -> None:
    print(f"Not yet: {text}")
