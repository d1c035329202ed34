"""Whether finetuning runs went as they should: a validity control of every claim that rests on one."""

from collections.abc import Mapping, Sequence

from helpers.findings import Control
from helpers.training import diverged, worst_rise


def smooth(runs: Mapping[str, Sequence[Sequence[float]]]) -> Control:
    """The control that every run trained as its like did (`training.diverged`), from the losses of each arm's runs.

    Models that were not trained have no losses and are left out.
    """
    trained = {name: [losses for losses in arm if len(losses)] for name, arm in runs.items()}
    trained = {name: arm for name, arm in trained.items() if arm}
    out = diverged(trained)
    return Control(
        f"training was smooth{': ' + ', '.join(out) + ' was not' if out else ''} (largest rise of a loss, nats)",
        max((worst_rise(losses) for arm in trained.values() for losses in arm), default=0.0),
        not out,
        "validity",
    )


def smooth_each(runs: Mapping[str, Sequence[Sequence[float]]]) -> dict[str, Control]:
    """The same control for each arm by itself."""
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
