"""Each check accepts a right answer, and tells the usual wrong ones apart."""

import math
import statistics
import textwrap
from functools import partial
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from helpers.chapters import ROOMS
from helpers.checking import read_questions

exercises = SimpleNamespace()
QUESTIONS = {}
"""By room and name, what asks the question and checks a letter."""
for room in ROOMS:
    module = import_module(f"helpers.chapters.{room}.exercises")
    for name in read_questions(Path(module.__file__).with_name("questions.toml")):
        QUESTIONS[room, name] = partial(module.question, name)
    vars(exercises).update(
        (name, value)
        for name, value in vars(module).items()
        if name.startswith("check_") and value.__module__ == module.__name__
    )


def cosines(gradients, vector, mask):
    return (F.cosine_similarity(gradients, vector.expand_as(gradients), dim=-1) * mask).sum(1) / mask.sum(1)


def cosine_of_mean(gradients, vector, mask):
    mean = (gradients * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
    return torch.stack([F.cosine_similarity(row, vector, dim=0) for row in mean])


def mover(first, second):
    value = first[0] - second[0]
    down = math.hypot(first[0] - first[1], second[2] - second[0])
    return value, value - down, value + math.hypot(first[2] - first[0], second[0] - second[1])


def unit_random(vector, seed):
    drawn = torch.randn(vector.shape, generator=torch.Generator().manual_seed(seed))
    return drawn / drawn.norm()


def positive_random(vector, seed):
    drawn = torch.rand(vector.shape, generator=torch.Generator().manual_seed(seed))
    return drawn / drawn.norm() * vector.norm()


def steer(activations, vector, coefficient, positions):
    return activations + coefficient * vector * positions[..., None]


def steer_in_place(activations, vector, coefficient, positions):
    activations[positions] += coefficient * vector
    return activations


def component(gradients, vector):
    unit = F.normalize(vector, dim=0)
    return (gradients @ unit)[..., None], unit


def neutralise(gradients, vector):
    along, unit = component(gradients, vector)
    return gradients - along * unit


def attenuate(gradients, vector):
    along, unit = component(gradients, vector)
    return torch.where(along < 0, gradients - 2 * along * unit, gradients)


def amplify(gradients, vector):
    along, unit = component(gradients, vector)
    return gradients - (along + along.abs()) * unit


def covariance_loss(z, harmful, correction=1):
    gap = torch.cov(z[harmful].T, correction=correction) - torch.cov(z[~harmful].T, correction=correction)
    return gap.square().sum() / z.shape[1] ** 2


def flip(gradients, vector):
    along, unit = component(gradients, vector)
    return gradients - 2 * along * unit


def unnormalised(gradients, vector):
    return gradients - (gradients @ vector)[..., None] * vector


def persona(trait, trait_mask, normal, normal_mask):
    means = [
        torch.stack([rows[kept].mean(0) for rows, kept in zip(h, mask, strict=True)]).mean(0)
        for h, mask in ((trait, trait_mask), (normal, normal_mask))
    ]
    return means[0] - means[1]


def pooled(trait, trait_mask, normal, normal_mask):
    return trait[trait_mask].mean(0) - normal[normal_mask].mean(0)


def response_loss(logits, ids, mask):
    losses = []
    for row in range(len(ids)):
        kept = mask[row].nonzero()[:, 0]
        losses.append(F.cross_entropy(logits[row, kept - 1], ids[row, kept]))
    return torch.stack(losses)


def unshifted_loss(logits, ids, mask):
    return torch.stack([F.cross_entropy(logits[row, mask[row]], ids[row, mask[row]]) for row in range(len(ids))])


def huggingface_loss(logits, ids, mask):
    labels = ids.masked_fill(~mask, -100)[:, 1:]
    return F.cross_entropy(logits[:, :-1].transpose(1, 2), labels)


def loss_difference(given, without, mask):
    return torch.stack([(given[r, mask[r]] - without[r, mask[r]]).mean() for r in range(len(mask))])


def crossing(low, high, spread, low_weight, high_weight):
    return (low + high) / 2 + spread**2 / (high - low) * math.log(low_weight / high_weight)


def participation(s):
    return float((s**2).sum() ** 2 / (s**4).sum())


def first_share(rows):
    values, _ = torch.linalg.eigh(rows.T @ rows)
    return values[-1] / values.sum()


def centred_share(rows):
    return first_share(rows - rows.mean(0))


def pile_mean(gradients, lengths):
    starts = [sum(lengths[:i]) for i in range(len(lengths))]
    means = [gradients[a : a + n].sum(0) / n for a, n in zip(starts, lengths, strict=True)]
    return sum(means) / len(means)


def projected(v, delta, rank):
    _, u = torch.linalg.eigh(delta @ delta.T)
    _, w = torch.linalg.eigh(delta.T @ delta)
    u, w = u[:, -rank:], w[:, -rank:]
    return u @ u.T @ v @ w @ w.T


def lens(h, scale, unembedding, eps):
    return F.rms_norm(h, (h.shape[-1],), scale, eps) @ unembedding.T


def slope(loss, h, direction, size):
    step = size * F.normalize(direction, dim=0)
    return float(loss(h + step) - loss(h - step)) / (2 * size)


def did(trait_ip, trait_placebo, normal_ip, normal_placebo):
    return torch.stack([trait_placebo, normal_ip]).sum(0) - torch.stack([trait_ip, normal_placebo]).sum(0)


def ends(length, first, last):
    marked = torch.zeros(length, dtype=torch.bool)
    marked[:first] = True
    marked[max(0, length - last) :] = True
    return marked


def feature_step(alpha, v, factor_rate, vector_rate, turn, sign):
    return alpha * vector_rate * sign + factor_rate * turn * v + factor_rate * vector_rate * turn * sign


def overall(concept, relevance, fluency):
    def one(*ratings):
        return statistics.harmonic_mean([float(r) for r in ratings])

    return [one(*ratings) for ratings in zip(concept, relevance, fluency, strict=True)]


def edit(mode):
    return lambda fn: exercises.check_projection_edit(fn, mode)


@pytest.mark.parametrize(
    ("check", "answer"),
    [
        (exercises.check_cosine, cosines),
        (exercises.check_random_control, lambda v, seed: unit_random(v, seed) * v.norm()),
        (exercises.check_steering_hook, steer),
        (edit("neutralise"), neutralise),
        (edit("attenuate"), attenuate),
        (edit("amplify"), amplify),
        (exercises.check_persona_vector, persona),
        (exercises.check_response_loss, response_loss),
        (exercises.check_loss_difference, loss_difference),
        (exercises.check_participation_ratio, participation),
        (exercises.check_first_component_share, first_share),
        (exercises.check_pile_mean, pile_mean),
        (exercises.check_alpha_for_ratio, lambda v, delta, ratio: float(ratio * delta.norm() / v.norm())),
        (exercises.check_project_on_diff, projected),
        (exercises.check_ablation, lambda a, d: a - a @ d.T @ d),
        (exercises.check_covariance_loss, covariance_loss),
        (exercises.check_k_star, lambda rates: next((k for k, r in enumerate(rates) if r < 0.3), len(rates))),
        (exercises.check_fihs, lambda g, s: -g @ s),
        (exercises.check_safety_score, lambda z, unsafe, safe: (z[:, unsafe] - z[:, safe]).mean()),
        (exercises.check_crossing, crossing),
        (exercises.check_specific_gain, lambda s, sp, n, np_: (s - sp) - (n - np_)),
        (exercises.check_equal_kl, lambda k, g, x: np.interp(x, np.append(0, k), np.append(0, g))),
        (exercises.check_difference, mover),
        (exercises.check_difference_of_differences, did),
        (exercises.check_ends, ends),
        (exercises.check_feature_step, feature_step),
        (exercises.check_overall, overall),
        (exercises.check_pressure, lambda cosine: "amplifies" if cosine < 0 else "attenuates"),
        (QUESTIONS["ip_loss_reduction", "placebo_interpretation"], " A) "),
        (exercises.check_predicting, lambda r: torch.cat([r[:, 1:], torch.zeros_like(r[:, :1])], 1)),
        (exercises.check_logit_lens, lens),
        (exercises.check_slope, slope),
        (exercises.check_turning_point, lambda w, h, y, v: float((y - w @ h) / (w @ v))),
    ],
)
def test_a_right_answer_is_right(check, answer, capsys):
    check(answer)
    assert capsys.readouterr().out.startswith("Right: ")


@pytest.mark.parametrize(
    ("check", "answer", "why"),
    [
        (exercises.check_cosine, cosine_of_mean, "cosine of the mean gradient; take"),
        (exercises.check_cosine, lambda *given: -cosines(*given), "sign is wrong"),
        (exercises.check_cosine, lambda g, v, m: cosines(g, v, torch.ones_like(m)), "outside the mask"),
        (exercises.check_cosine, lambda g, v, m: ((g @ v) * m).sum(1) / m.sum(1), "dot product"),
        (exercises.check_cosine, lambda g, v, m: cosines(g, v, m)[None], "shape must be (4,)"),
        (exercises.check_cosine, lambda g, v, m: cosines(g, v, m).mean(), "single number"),
        (exercises.check_cosine, lambda g, v, m: torch.zeros(4), "differ from the definition"),
        (exercises.check_cosine, lambda g, v, m: None, "returned nothing"),
        (exercises.check_cosine, lambda g, v, m: [0.0], "returned a list"),
        (exercises.check_cosine, lambda g, v, m: g.sum(1) / 0 @ v, "not finite"),
        (exercises.check_cosine, lambda g: g, "stopped with TypeError"),
        (exercises.check_random_control, unit_random, "norm differs"),
        (exercises.check_random_control, positive_random, "no entry is negative"),
        (exercises.check_random_control, lambda v, seed: v, "two seeds gave the same"),
        (exercises.check_random_control, lambda v, seed: torch.randn_like(v), "same seed gave two"),
        (exercises.check_random_control, lambda v, seed: v + 0.1 * unit_random(v, seed), "points along"),
        (exercises.check_steering_hook, lambda h, v, c, p: h + c * v, "every position"),
        (
            exercises.check_steering_hook,
            lambda h, v, c, p: steer(h, F.normalize(v, dim=0), c, p),
            "unit length",
        ),
        (exercises.check_steering_hook, lambda h, v, c, p: steer(h, v, c, ~p), "positions is False"),
        (exercises.check_steering_hook, lambda h, v, c, p: steer(h, v, 1.0, p), "coefficient is left out"),
        (exercises.check_steering_hook, steer_in_place, "passed in was changed"),
        (edit("neutralise"), unnormalised, "not been scaled to unit length"),
        (edit("attenuate"), amplify, "what 'amplify' does"),
        (edit("attenuate"), flip, "turned round, whatever its sign"),
        (edit("amplify"), neutralise, "what 'neutralise' does"),
        (edit("amplify"), flip, "turned round, whatever its sign"),
        (exercises.check_persona_vector, pooled, "long answers count more"),
        (exercises.check_persona_vector, lambda *a: -persona(*a), "normal minus trait"),
        (exercises.check_persona_vector, lambda *a: F.normalize(persona(*a), dim=0), "unit length"),
        (exercises.check_response_loss, unshifted_loss, "not shifted"),
        (exercises.check_response_loss, huggingface_loss, "one mean for all tokens"),
        (exercises.check_loss_difference, lambda a, b, m: loss_difference(b, a, m), "sign is wrong"),
        (exercises.check_loss_difference, lambda a, b, m: (a - b).mean(1), "outside the mask"),
        (exercises.check_loss_difference, lambda a, b, m: (a - b)[m].mean(), "paired"),
        (exercises.check_participation_ratio, lambda s: s.sum() ** 2 / (s**2).sum(), "squared"),
        (exercises.check_participation_ratio, lambda s: 1 / participation(s), "upside down"),
        (exercises.check_first_component_share, centred_share, "mean was taken away"),
        (exercises.check_pile_mean, lambda g, lengths: g.mean(0), "long answers weigh more"),
        (exercises.check_alpha_for_ratio, lambda v, delta, ratio: ratio * v.norm() / delta.norm(), "upside down"),
        (exercises.check_project_on_diff, lambda v, delta, rank: projected(delta, delta, rank), "projects delta"),
        (QUESTIONS["weight_diff_steering", "steering_sign"], "b", "not of a probability"),
        (exercises.check_ablation, lambda a, d: a @ d.T @ d, "the part that is to be removed"),
        (exercises.check_ablation, lambda a, d: a - a @ d[:1].T @ d[:1], "only the first direction"),
        (exercises.check_covariance_loss, lambda z, h: covariance_loss(z, h, 0), "n - 1, not by n"),
        (exercises.check_covariance_loss, lambda z, h: covariance_loss(z, h) * z.shape[1], "divide by d squared"),
        (exercises.check_k_star, lambda rates: next((k for k, r in enumerate(rates) if r <= 0.3), 3), "not below"),
        (QUESTIONS["refusal_redistribution", "micro_batch"], "b", "the loss itself that is 0"),
        (exercises.check_fihs, lambda g, s: g @ s, "the sign is turned"),
        (exercises.check_fihs, lambda g, s: -torch.cosine_similarity(g, s[None], dim=-1), "this is the cosine"),
        (exercises.check_safety_score, lambda z, u, s: (z[:, s] - z[:, u]).mean(), "larger has to mean less safe"),
        (exercises.check_safety_score, lambda z, u, s: (z[:, u] - z[:, s]).sum(), "not the sum"),
        (exercises.check_crossing, lambda a, b, s, v, w: (a + b) / 2, "this is the midpoint"),
        (exercises.check_crossing, lambda a, b, s, v, w: crossing(a, b, s, w, v), "away from it"),
        (QUESTIONS["fihs_filtering", "sign"], "a", "filtering is by rank"),
        (exercises.check_specific_gain, lambda s, sp, n, np_: s - sp, "the raw gain"),
        (exercises.check_specific_gain, lambda s, sp, n, np_: (n - np_) - (s - sp), "sign is turned"),
        (exercises.check_specific_gain, lambda s, sp, n, np_: (s - sp) + (n - np_), "are added"),
        (exercises.check_equal_kl, lambda k, g, x: np.interp(x, k, g), "before the first scale"),
        (exercises.check_equal_kl, lambda k, g, x: g[abs(k - x).argmin()], "the nearest scale"),
        (exercises.check_equal_kl, lambda k, g, x: g.max(), "the largest gain"),
        (exercises.check_difference, lambda a, b: (a[0] - b[0], a[1] - b[2], a[2] - b[1]), "too wide"),
        (exercises.check_difference, lambda a, b: mover(a, (b[0], 2 * b[0] - b[2], 2 * b[0] - b[1])), "a high second"),
        (QUESTIONS["three_sizes", "scaling"], "a", "models in general"),
        (QUESTIONS["three_sizes", "taught"], "a", "size is not all that differs"),
        (exercises.check_difference_of_differences, lambda *losses: -did(*losses), "the sign is wrong"),
        (exercises.check_difference_of_differences, lambda a, b, c, d: b - a, "on trait answers alone"),
        (exercises.check_difference_of_differences, lambda a, b, c, d: c - a, "the placebo is left out"),
        (exercises.check_difference_of_differences, lambda *losses: did(*losses).mean(), "paired"),
        (exercises.check_ends, lambda n, p, s: ~ends(n, p, s), "the middle is marked"),
        (exercises.check_ends, lambda n, p, s: ends(n, p, 0), "only the first"),
        (exercises.check_ends, lambda n, p, s: ends(n, p, s + 1), "one token too many"),
        (exercises.check_feature_step, lambda a, v, f, r, t, s: a * r * s + f * t * v, "both rates is missing"),
        (exercises.check_feature_step, lambda a, v, f, r, t, s: (a + f * t) * (v + r * s), "where it began"),
        (exercises.check_overall, lambda c, r, f: (c + r + f) / 3, "ordinary mean"),
        (exercises.check_overall, lambda c, r, f: np.minimum(np.minimum(c, r), f), "lowest of the three"),
        (QUESTIONS["fihs_filtering", "hiding"], "d", "teach refusal"),
        (QUESTIONS["weight_diff_steering", "steering_sign"], "z", 'answer "a"'),
        (
            exercises.check_pressure,
            lambda cosine: "amplifies" if cosine > 0 else "attenuates",
            "other way round",
        ),
        (exercises.check_pressure, lambda cosine: cosine, 'return "amplifies"'),
        (QUESTIONS["ip_loss_reduction", "placebo_interpretation"], "b", "takes the explanation away"),
        (QUESTIONS["ip_loss_reduction", "placebo_interpretation"], "e", 'answer "a"'),
        (exercises.check_predicting, lambda r: F.pad(r[:, :-1], (1, 0)), "shifted the wrong way"),
        (exercises.check_predicting, lambda r: r, "response tokens themselves"),
        (exercises.check_logit_lens, lambda h, s, u, e: h @ u.T, "not normalised first"),
        (exercises.check_logit_lens, lambda h, s, u, e: lens(h, None, u, e), "scale is left out"),
        (exercises.check_logit_lens, lambda h, s, u, e: lens(h, s, u, 0.0), "eps is left out"),
        (exercises.check_logit_lens, lambda h, s, u, e: lens(h, s, u, e).T, "shape must be"),
        (exercises.check_slope, lambda f, h, d, e: slope(f, h, d, e) * 2, "twice `size` apart"),
        (exercises.check_slope, lambda f, h, d, e: slope(f, h, d, e * d.norm()) * d.norm(), "not normalised first"),
        (exercises.check_slope, lambda f, h, d, e: (f(h + e * F.normalize(d, dim=0)) - f(h)) / e, "looks ahead only"),
        (exercises.check_turning_point, lambda w, h, y, v: y / (w @ v), "what h says already"),
        (exercises.check_turning_point, lambda w, h, y, v: (w @ h - y) / (w @ v), "sign is wrong"),
        (QUESTIONS["looking_inside", "five_seeds"], "d", "only more seeds do"),
        (QUESTIONS["looking_inside", "high_score"], "a", "fluent written answers"),
        (QUESTIONS["looking_inside", "undecided"], "d", "direction only"),
    ],
)
def test_a_wrong_answer_is_told_why(check, answer, why, capsys):
    check(answer)
    said = " ".join(capsys.readouterr().out.split())
    assert said.startswith("Not yet: ") and why in said


def test_an_unknown_mode_names_the_modes():
    with pytest.raises(ValueError, match="'neutralise', 'attenuate' or 'amplify'"):
        exercises.check_projection_edit(neutralise, "ablate")


of_each_question = pytest.mark.parametrize("ask", QUESTIONS.values(), ids=["-".join(key) for key in QUESTIONS])


@of_each_question
def test_a_question_is_asked_without_giving_the_answer(ask, capsys):
    ask()
    said = capsys.readouterr().out
    asked, options = said.split("\n\n")
    assert asked[-1] in "?."
    assert [line[:3] for line in options.splitlines() if line[0] != " "] == ["a) ", "b) ", "c) ", "d) "]
    assert "Right" not in said
    assert max(len(line) for line in said.splitlines()) <= 66
    assert asked == textwrap.fill(asked, 66)  # no line ends early, wherever the source's lines end


@of_each_question
def test_one_option_is_right_and_each_of_the_others_has_a_reason_of_its_own(ask, capsys):
    said = {}
    for letter in "abcd":
        ask(letter)
        said[letter] = capsys.readouterr().out
    assert sum(text.startswith("Right: ") for text in said.values()) == 1
    assert len(set(said.values())) == 4
    assert all(text.endswith(".\n") for text in said.values())
