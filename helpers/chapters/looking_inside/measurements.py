"""What the book's instruments are judged by (chapter 0)."""

from collections.abc import Mapping

from helpers.statistics import Estimate, share
from helpers.verdicts import Measurement, Verdict


def intervals(
    covered: Mapping[str, Estimate], without_effect: Mapping[Verdict, Estimate], draws: int
) -> tuple[Measurement, Measurement]:
    """Coverage of the interval over seeds and questions where it is worst, and false alarms of the rule for verdicts.

    Args:
        covered: coverage by kind of interval; those over seeds have "seeds" in their names.
        without_effect: share of each verdict over draws without an effect.
        draws: how many draws.
    """
    worst = min((e for name, e in covered.items() if "seeds" in name), key=lambda e: e.value)
    alarms = sum(without_effect[name].value for name in ("reproduced", "direction only"))
    return (
        Measurement("primer.coverage", worst),
        Measurement("primer.false-alarms", share(round(draws * alarms), draws)),
    )
