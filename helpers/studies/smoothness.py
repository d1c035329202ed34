"""Whether finetuning runs went as they should: a validity control of every claim that rests on one."""

from collections.abc import Mapping, Sequence
from itertools import zip_longest
from statistics import median

from helpers.training import diverged, worst_rise
from helpers.verdicts import Control


def smooth(runs: Mapping[str, Sequence[Sequence[float]]]) -> Control:
    """The control that every run trained as its like did (`training.diverged`), from the losses of each arm's runs.

    Models that were not trained have no losses and are left out.
    """
    with_losses = {name: [losses for losses in arm if len(losses)] for name, arm in runs.items()}
    trained = _without_the_rows({name: arm for name, arm in with_losses.items() if arm})
    out = diverged(trained)
    return Control(
        f"training was smooth{': ' + ', '.join(out) + ' was not' if out else ''} (largest rise of a loss, nats)",
        max((worst_rise(losses) for arm in trained.values() for losses in arm), default=0.0),
        not out,
        "validity",
    )


def smooth_each(runs: Mapping[str, Sequence[Sequence[float]]]) -> dict[str, Control]:
    """The same control for each arm by itself."""
    runs = _without_the_rows(runs)
    out = diverged(runs)
    return {
        name: Control(
            f"training of {name} was smooth (largest rise of a loss, nats)",
            max(map(worst_rise, arm)),
            name not in out,
            "validity",
        )
        for name, arm in runs.items()
    }


def _without_the_rows(runs: Mapping[str, Sequence[Sequence[float]]]) -> dict[str, list[list[float]]]:
    """Losses without what the rows of each batch add to all arms alike: their median over the arms, step by step.

    Arms of one seed see the same rows, of which some batches are harder than others by more than a jump of the loss.
    It takes three arms or more to tell the rows from an arm; a jump that all arms share is taken for the rows'.
    """
    found: dict[str, list[list[float]]] = {name: [list(losses) for losses in arm] for name, arm in runs.items()}
    for of_seed in zip_longest(*found.values()):
        arms = [losses for losses in of_seed if losses is not None]
        if len(arms) > 2 and len({len(losses) for losses in arms}) == 1:
            shared = [median(step) for step in zip(*arms, strict=True)]
            for losses in arms:
                losses[:] = [loss - rows for loss, rows in zip(losses, shared, strict=True)]
    return found
