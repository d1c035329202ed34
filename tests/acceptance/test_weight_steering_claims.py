"""On the embedded model, at the quick preset's settings, each topic's direction turns that topic up and down.

The anchor, the piles and the steered answers are as in the chapter, made anew.
"""

import pytest

from helpers.chapters.weight_diff_steering.method import alpha_for, difference, finetuning_diff, random_like
from helpers.chapters.weight_diff_steering.params import WeightSteeringParams
from helpers.chapters.weight_diff_steering.study import TOPICS, WeightStudy

pytestmark = pytest.mark.acceptance


@pytest.fixture(scope="module")
def chapter():
    return WeightStudy(WeightSteeringParams(preset="quick"))


@pytest.fixture(scope="module")
def anchor(chapter):
    return chapter.anchor("topics")


@pytest.fixture(scope="module")
def directions(chapter, anchor):
    piles, written_for = chapter.topic_piles(chapter.answers(anchor, "build"))
    assert not written_for
    gradients = {name: chapter.pile(anchor, pile) for name, pile in piles.items()}
    return {topic: difference(gradients[topic], gradients["neither"]) for topic in TOPICS}


@pytest.fixture(scope="module")
def mentions(chapter, anchor):
    """The share of answers to the judging half that mention a topic, steered by a signed ratio."""
    delta = finetuning_diff(anchor, chapter.base)

    def share(topic, vector=None, ratio=0.0):
        alpha = alpha_for(vector, delta, ratio) if vector else 0.0
        return chapter.labels(chapter.answers(anchor, "judge", vector, alpha))[topic].mean()

    return share


@pytest.mark.parametrize("topic", TOPICS)
def test_a_step_against_the_direction_raises_its_topic_and_a_step_along_it_lowers_it(
    chapter, directions, mentions, topic
):
    ratio = chapter.params.ratio
    rest = mentions(topic)
    assert mentions(topic, directions[topic], -ratio) > rest > mentions(topic, directions[topic], ratio)


def test_a_random_direction_of_equal_norm_does_neither(chapter, directions, mentions):
    random = random_like(directions["bridge"], 0)
    effect = abs(mentions("bridge", random, -chapter.params.ratio) - mentions("bridge", random, chapter.params.ratio))
    assert effect < 0.15
