"""Prompt-only steering vectors: h + alpha v on a prompt's first and last tokens, alpha and v trained together.

PrOSV (arXiv 2605.05983 and its code). At the output of block l, on the first p and the last s tokens of the prompt
(template tokens included),

    h' = h + alpha v,    alpha in R and v in R^n both trained,

and nothing on any other token: the answer is steered through the keys and values of those few. FSSV, the full-sequence
steering vector, adds the same on every token. Because alpha is trained, no factor has to be searched for afterwards.

The start is alpha_0 = beta sqrt(n) and v_0 uniform in +-lambda / sqrt(n). Adam moves every entry by about its learning
rate whatever the gradient's size, so a step changes alpha v by eta_v alpha s + eta_alpha s' v + eta_v eta_alpha s s'
(s, s': signs): the features move by the same amount at any width n if eta_v eta_alpha does not depend on n.

Vectors for many concepts are trained in one run: rows of a batch belong to different runs and each gets its own shift,
so the gradient of a sum of losses is, run by run, the gradient of each loss alone. Blocks up to l know nothing of the
vectors: each sequence goes through them once, and training through the others only.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from helpers.chat import Ends, Example, Where, collate
from helpers.forward import WORTH_SHARING, common_beginning, keeps_beginning, only_blocks, read, resume_beginning
from helpers.interventions import Steer, add_at, resid_post
from helpers.losses import sequence_sums
from helpers.models import Model
from helpers.progress import progress

Objective = Literal["lang", "simpo"]
"""`lang`: cross-entropy of the answer that shows the concept. `simpo`: prefer it to a neutral one."""


@dataclass(frozen=True)
class Pair:
    """One prompt with an answer that shows the concept and one that does not."""

    shown: Example
    neutral: Example


@dataclass(frozen=True)
class Run:
    """One vector to train: on what, and from where. The defaults are those published for PrOSV with `lang`."""

    name: str
    pairs: tuple[Pair, ...]
    beta: float = 4.0
    """alpha_0 in units of sqrt(n)."""
    spread: float = 8.0
    """lambda: v_0 is uniform within this many 1 / sqrt(n)."""
    factor_rate: float = 10.0
    """eta_alpha; 0 keeps the factor as it starts."""
    vector_rate: float = 4e-2
    """eta_v."""
    seed: int = 0

    def start(self, width: int) -> tuple[Float[Tensor, ""], Float[Tensor, " d_model"]]:
        """alpha_0 and v_0, which other runs beside this one do not change."""
        noise = torch.rand(width, generator=torch.Generator().manual_seed(self.seed))
        return torch.tensor(self.beta * width**0.5), (2 * noise - 1) * self.spread / width**0.5

    def draws(self, steps: int, batch_size: int) -> list[list[int]]:
        """Which pairs each step is on: epochs in random order, which other runs do not change either."""
        rng, size = random.Random(f"{self.seed} {self.name}"), min(batch_size, len(self.pairs))
        order: list[int] = []
        while len(order) < steps * size:
            order += rng.sample(range(len(self.pairs)), len(self.pairs))
        return [order[k * size : (k + 1) * size] for k in range(steps)]


@dataclass(frozen=True)
class Trained:
    """A trained vector, ready to be applied, and how it got there."""

    steer: Steer
    losses: tuple[float, ...]
    """The objective at each step."""


class States:
    """What the unsteered model's block `layer` gives for each example: read once, kept for every step, run and arm.

    Raises `ValueError` for a layer that does not exist.
    """

    def __init__(self, model: Model, layer: int) -> None:
        resid_post(model, layer)  # says so if there is no such block
        self.model, self.layer = model, layer
        self._kept: dict[Example, Float[Tensor, "_ d_model"]] = {}

    @torch.no_grad()
    def read(self, examples: Iterable[Example]) -> None:
        """Read those that have not been read yet."""
        model, new = self.model, [e for e in dict.fromkeys(examples) if e not in self._kept]
        with only_blocks(model, 0, self.layer), model.autocast():
            for batch in model.batches(new, 32):
                batch = batch.to(model.device)
                for row, states in zip(batch.rows, read(model, batch), strict=True):
                    self._kept[new[row]] = states[: len(new[row])].clone()

    def losses(
        self,
        examples: Sequence[Example],
        shifts: Float[Tensor, "vector d_model"],
        of: Sequence[int],
        where: Where = "all",
    ) -> Float[Tensor, " example"]:
        """Cross-entropy summed over each response, in nats, with `shifts[of[i]]` added to example i where `where` says.

        As with `SteerRows`, by the blocks above: inside `forward.only_blocks`, for examples that have been read. What
        examples begin with (a system message) is read once for all that are steered alike there.
        """
        model = self.model
        batch = collate(examples, model.tokenizer.pad_token_id).to(model.device)
        steered = batch.positions(where)  # [example, pos]
        states = torch.nn.utils.rnn.pad_sequence([self._kept[e] for e in examples], batch_first=True)
        states = add_at(states, shifts[list(of), None].to(states), steered)
        begin = min(common_beginning(examples), min(e.prompt_length for e in examples) - 1)
        treated = [(v, *row) for v, row in zip(of, steered[:, :begin].tolist(), strict=True)]
        kinds = {kind: number for number, kind in enumerate(dict.fromkeys(treated))}
        if len(kinds) == len(examples) or begin < WORTH_SHARING or not keeps_beginning(model, batch.ids.shape[1]):
            return sequence_sums(model, batch, states=states)
        with model.autocast():
            begun = resume_beginning(model, states[[treated.index(kind) for kind in kinds], :begin])
        return sequence_sums(model, batch, states=states[:, begin:], after=begun, kinds=[kinds[k] for k in treated])


def train_vectors(
    model: Model,
    runs: Sequence[Run],
    *,
    layer: int,
    where: Where = Ends(2, 2),  # noqa: B008 - it is frozen
    objective: Objective = "lang",
    steps: int = 72,
    batch_size: int = 12,
    rows: int = 24,
    states: States | None = None,
    label: str = "steering vectors",
) -> list[Trained]:
    """Train alpha and v of every run at once: Adam, linear decay, v's gradient clipped to norm 1, alpha's not.

    The model stays frozen. `rows` sequences are read at a time, whatever the batch, which bounds memory; `states` are
    those that an earlier call has read at this layer. Results are those of training one run after another, but for
    rounding.

    Raises `ValueError` for a run without pairs, a layer that does not exist, or a loss that is not finite.
    """
    for run in runs:
        if not run.pairs:
            raise ValueError(f"There are no training pairs for {run.name!r}: a vector cannot be trained for it.")
    starts = [run.start(model.width) for run in runs]
    factors = [a.to(model.device).requires_grad_() for a, _ in starts]
    vectors = [v.to(model.device).requires_grad_() for _, v in starts]
    optimizer, schedule = joint_optimizer(runs, factors, vectors, steps)
    draws = [run.draws(steps, batch_size) for run in runs]
    states = states or States(model, layer)
    met = {(r, i) for r, of_run in enumerate(draws) for drawn in of_run for i in drawn}
    sides = ("shown", "neutral") if objective == "simpo" else ("shown",)
    losses: list[list[float]] = [[] for _ in runs]

    with contextlib.ExitStack() as stack:
        stack.enter_context(model.weights_in(model.dtype, only_frozen_linear=True))
        states.read(getattr(runs[r].pairs[i], side) for r, i in sorted(met) for side in sides)
        stack.enter_context(only_blocks(model, layer + 1, model.layers - 1))
        bar = stack.enter_context(progress(steps, label))
        reference = _reference(states, runs, sorted(met), rows // 2) if objective == "simpo" else None
        for step in range(steps):
            drawn = [(r, i) for r, of_run in enumerate(draws) for i in of_run[step]]
            found = [0.0] * len(runs)
            for part in _parts(runs, drawn, rows if objective == "lang" else rows // 2):
                terms = _terms(states, runs, part, draws, step, features(factors, vectors), where, reference)
                total = terms.sum()
                if not bool(torch.isfinite(total)):
                    raise ValueError(f"The loss is not finite at step {step + 1}; lower beta or the learning rates.")
                total.backward()
                for (r, _), term in zip(part, terms.tolist(), strict=True):
                    found[r] += term
            for v in vectors:
                torch.nn.utils.clip_grad_norm_([v], 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            schedule.step()
            for trace, loss in zip(losses, found, strict=True):
                trace.append(loss)
            bar.update()
    return [
        Trained(Steer(layer, v.detach().cpu(), float(a.detach()), where), tuple(trace))
        for a, v, trace in zip(factors, vectors, losses, strict=True)
    ]


def features(
    factors: Sequence[Float[Tensor, ""]], vectors: Sequence[Float[Tensor, " d_model"]]
) -> Float[Tensor, "run d_model"]:
    """z = alpha v of every run: what is added to the stream."""
    return torch.stack([alpha * v for alpha, v in zip(factors, vectors, strict=True)])


def joint_optimizer(
    runs: Sequence[Run], factors: Sequence[Tensor], vectors: Sequence[Tensor], steps: int
) -> tuple[torch.optim.Adam, torch.optim.lr_scheduler.LambdaLR]:
    """Adam with each run's eta_alpha for its factor and its eta_v for its vector; both fall linearly to 0."""
    rates = []
    for run, alpha, v in zip(runs, factors, vectors, strict=True):
        rates.append({"params": [alpha], "lr": run.factor_rate})
        rates.append({"params": [v], "lr": run.vector_rate})
    optimizer = torch.optim.Adam(rates)
    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: 1 - k / steps)


def simpo_loss(
    shown: Float[Tensor, " pair"],
    neutral: Float[Tensor, " pair"],
    reference_gap: Float[Tensor, " pair"],
    lengths: tuple[Float[Tensor, " pair"], Float[Tensor, " pair"]],
) -> Float[Tensor, " pair"]:
    """-log sigmoid(max(r, 1) / |y_w| log pi(y_w) - 1 / |y_l| log pi(y_l)), the "scaled" SimPO of RePS.

    `shown` and `neutral` are summed log-probabilities of y_w and y_l, `lengths` their tokens, and `reference_gap` is
    r = log pi_ref(y_l) - log pi_ref(y_w) of the unsteered model: the less likely the concept's answer was, the more its
    likelihood counts.
    """
    margin = reference_gap.clamp(min=1) * shown / lengths[0] - neutral / lengths[1]
    return -torch.nn.functional.logsigmoid(margin)


def _parts(runs: Sequence[Run], drawn: list[tuple[int, int]], size: int) -> list[list[tuple[int, int]]]:
    """The pairs of a step, shortest first, a few at a time."""
    order = sorted(drawn, key=lambda at: len(runs[at[0]].pairs[at[1]].shown))
    return [order[k : k + max(size, 1)] for k in range(0, len(order), max(size, 1))]


def _terms(
    states: States,
    runs: Sequence[Run],
    part: list[tuple[int, int]],
    draws: list[list[list[int]]],
    step: int,
    shifts: Float[Tensor, "run d_model"],
    where: Where,
    reference: dict[tuple[int, int], float] | None,
) -> Float[Tensor, " pair"]:
    """What each pair adds to its run's loss: a mean over the run's tokens (lang) or pairs (simpo) of this step."""
    pairs, rows = [runs[r].pairs[i] for r, i in part], [r for r, _ in part]
    shown_ones = [p.shown for p in pairs]
    if reference is None:
        sums = states.losses(shown_ones, shifts, rows, where)
        tokens = [sum(_length(runs[r].pairs[i].shown) for i in draws[r][step]) for r in rows]
        return sums / torch.tensor(tokens, device=sums.device)
    sums = -states.losses(shown_ones + [p.neutral for p in pairs], shifts, rows * 2, where)
    shown, neutral = sums.chunk(2)
    gap = torch.tensor([reference[at] for at in part]).to(sums)
    lengths = tuple(torch.tensor([_length(getattr(p, n)) for p in pairs]).to(sums) for n in ("shown", "neutral"))
    among = torch.tensor([len(draws[r][step]) for r in rows], device=sums.device)
    return simpo_loss(shown, neutral, gap, (lengths[0], lengths[1])) / among


def _length(example: Example) -> int:
    return len(example) - example.prompt_length


@torch.no_grad()
def _reference(
    states: States, runs: Sequence[Run], met: Sequence[tuple[int, int]], size: int
) -> dict[tuple[int, int], float]:
    """log pi_ref(neutral) - log pi_ref(shown) of every pair that a run will meet, by the unsteered model."""
    found: dict[tuple[int, int], float] = {}
    for part in _parts(runs, list(met), size):
        pairs = [runs[r].pairs[i] for r, i in part]
        both = [p.shown for p in pairs] + [p.neutral for p in pairs]
        shown, neutral = states.losses(both, torch.zeros(1, states.model.width), [0] * len(both)).chunk(2)
        found |= dict(zip(part, (shown - neutral).tolist(), strict=True))  # losses are minus log-probabilities
    return found


# Keeping a vector


def save_vector(steer: Steer, path: Path | str) -> None:
    """One safetensors file; raises `ValueError` for positions that are not all tokens or a prompt's ends."""
    from safetensors.torch import save_file

    if not (steer.where == "all" or isinstance(steer.where, Ends)):
        raise ValueError("Only vectors for all tokens or for the ends of prompts can be saved.")
    ends = "all" if steer.where == "all" else f"{steer.where.first} {steer.where.last}"
    facts = {"layer": str(steer.layer), "factor": repr(steer.coefficient), "where": ends}
    save_file({"vector": steer.vector.contiguous()}, str(path), metadata=facts)


def load_vector(path: Path | str) -> Steer:
    """A saved vector as an intervention: `with applied(model, load_vector(path)): ...` steers."""
    from safetensors import safe_open

    with safe_open(str(path), framework="pt") as file:
        facts = file.metadata()
        where: Where = "all" if facts["where"] == "all" else Ends(*map(int, facts["where"].split()))
        return Steer(int(facts["layer"]), file.get_tensor("vector"), float(facts["factor"]), where)
