"""Planted coverage and false alarms get the verdicts that they deserve."""

from helpers.chapters.looking_inside.measurements import intervals
from helpers.statistics import share

DRAWS = 4000


def planted(covered=3800, reproduced=60, direction=20):
    cases = {"mean of 8": share(100, DRAWS), "3 seeds": share(3900, DRAWS), "5 seeds": share(covered, DRAWS)}
    shares = {"reproduced": reproduced, "direction only": direction}
    shares |= {"contradicted": 2000, "undecided": 2000 - reproduced - direction}
    return intervals(cases, {name: share(n, DRAWS) for name, n in shares.items()}, DRAWS)


def test_good_intervals_are_reproduced_by_the_worst_case_over_seeds(verdict_of):
    coverage, alarms = planted()
    assert coverage.estimate.value == 3800 / DRAWS and verdict_of(coverage) == "reproduced"
    assert alarms.estimate.value == 80 / DRAWS and verdict_of(alarms) == "reproduced"


def test_intervals_that_are_too_narrow_and_many_false_alarms_are_not(verdict_of):
    assert verdict_of(planted(covered=3400)[0]) == "contradicted"
    assert verdict_of(planted(covered=3650)[0]) == "direction only"
    assert verdict_of(planted(direction=500)[1]) == "contradicted"
