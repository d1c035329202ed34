"""An intervention does what its equation says, where it says, and is gone afterwards."""

import pytest
import torch

from helpers.chat import collate
from helpers.interventions import (
    Ablate,
    AblateAffine,
    AblateRows,
    EditGradient,
    Steer,
    add_at,
    alike,
    applied,
    edit_component,
    project_out,
)
from helpers.losses import token_losses
from helpers.models import load

PAD = 2
WIDTH = 32


def direction(seed=0, size=1.0):
    vector = torch.randn(WIDTH, generator=torch.Generator().manual_seed(seed))
    return size * vector / vector.norm()


@pytest.fixture(scope="module")
def batch(examples):
    return collate(examples[:3], PAD)


def run(model, batch, *interventions):
    with torch.no_grad(), applied(model, *interventions), model.reading(batch):
        return model.hf.base_model(input_ids=batch.ids, attention_mask=batch.attention.long(), use_cache=False)[0]


def seen(model, batch, watch, point, *interventions):
    watching = watch(point)
    run(model, batch, *interventions, watching)
    return watching.seen[0]


# Steering


def test_a_shift_is_added_at_the_marked_positions_alone_and_each_row_may_have_its_own():
    h, shift = torch.arange(24.0).view(2, 3, 4), torch.tensor([1.0, -1.0, 2.0, 0.5])
    mask = torch.tensor([[True, False, True], [False, False, True]])
    expected = h.clone()
    for row, place in mask.nonzero().tolist():
        expected[row, place] += shift
    assert torch.equal(add_at(h, shift, mask), expected)
    assert torch.equal(add_at(h, shift, None), h + shift)
    each = torch.stack([shift, -shift])[:, None]  # (batch, 1, d_model)
    assert torch.equal(add_at(h, each, None) - h, each.expand(2, 3, 4))


def test_what_is_added_and_projected_keeps_the_precision_of_the_stream():
    h = torch.ones(1, 2, WIDTH, dtype=torch.bfloat16)
    assert add_at(h, direction(), None).dtype == torch.bfloat16
    assert project_out(h, direction()[:, None].bfloat16()).dtype == torch.bfloat16


def test_projecting_out_leaves_nothing_along_the_basis_and_the_rest_as_it_was():
    basis = torch.linalg.qr(torch.randn(WIDTH, 3, generator=torch.Generator().manual_seed(1)))[0]
    a = torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(2))
    left = project_out(a, basis)
    torch.testing.assert_close(left @ basis, torch.zeros(4, 3), atol=1e-6, rtol=0)
    torch.testing.assert_close(left, a - sum((a @ d)[:, None] * d for d in basis.T), atol=1e-5, rtol=0)
    torch.testing.assert_close(project_out(left, basis), left, atol=1e-6, rtol=0)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("where", ["all", "prompt", "response", (0, 1), (-1,), (2, -3)])
def test_steering_shifts_exactly_the_named_positions(tiny, examples, watch, where, side):
    batch = collate(examples[:3], PAD, side=side)
    point, v = "blocks.0.hook_resid_post", direction()
    plain = seen(tiny, batch, watch, point)
    steered = seen(tiny, batch, watch, point, Steer(0, v, 3.0, where))
    mask = batch.positions(where)
    torch.testing.assert_close(steered[mask], plain[mask] + 3 * v)
    assert torch.equal(steered[~mask], plain[~mask])
    assert mask.any() and not mask.all()


def test_the_vector_is_added_as_it_is_and_acts_on_what_follows(tiny, batch, watch):
    v = direction(size=7.0)
    one, two = (seen(tiny, batch, watch, "blocks.0.hook_resid_post", Steer(0, v, c)) for c in (1.0, 2.0))
    torch.testing.assert_close(
        (two - one)[batch.attention].norm(dim=-1), torch.full((int(batch.attention.sum()),), 7.0)
    )
    assert not torch.allclose(run(tiny, batch, Steer(0, v, 1.0)), run(tiny, batch), atol=1e-3)
    before = seen(tiny, batch, watch, "blocks.1.hook_resid_pre")
    assert torch.equal(seen(tiny, batch, watch, "blocks.1.hook_resid_pre", Steer(1, v, 1.0)), before)


def test_a_coefficient_of_zero_changes_nothing_and_two_interventions_add_up(tiny, batch):
    v, w = direction(0), direction(1)
    assert torch.equal(run(tiny, batch, Steer(1, v, 0.0)), run(tiny, batch))
    together = run(tiny, batch, Steer(0, v, 2.0), Steer(0, w, -3.0))
    torch.testing.assert_close(together, run(tiny, batch, Steer(0, 2 * v - 3 * w, 1.0)))


def test_steering_a_layer_that_does_not_exist_or_with_a_vector_of_another_width_is_an_error(tiny, hook_count):
    before = hook_count(tiny)
    with pytest.raises(ValueError, match="Layer 2 does not exist: tiny-random has layers 0 to 1"):
        run(tiny, None, Steer(0, direction(), 1.0), Steer(2, direction(), 1.0))
    with pytest.raises(ValueError, match=r"shape \(31,\); tiny-random needs \(32,\)"):
        run(tiny, None, Steer(0, direction()[:-1], 1.0))
    assert hook_count(tiny) == before


# Nothing stays


def every_kind():
    return [
        Steer(0, direction(), 1.0),
        Ablate(direction()[None]),
        EditGradient(1, direction(), "neutralise"),
    ]


def test_no_hook_is_left_when_the_block_ends(tiny, batch, hook_count):
    before, states = hook_count(tiny), run(tiny, batch)
    with applied(tiny, *every_kind()):
        assert hook_count(tiny) > before
        assert not torch.equal(run(tiny, batch), states)
    assert hook_count(tiny) == before
    assert torch.equal(run(tiny, batch), states)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_no_hook_is_left_after_an_exception(tiny, batch, hook_count, error):
    before, states = hook_count(tiny), run(tiny, batch)
    with pytest.raises(error), applied(tiny, *every_kind()):
        run(tiny, batch)
        raise error
    assert hook_count(tiny) == before
    assert torch.equal(run(tiny, batch), states)


def test_no_hook_is_left_after_an_exception_inside_the_forward_pass(tiny, batch, hook_count):
    class Fail:
        def hooks(self, model):
            def fail(activation, hook):
                raise RuntimeError("in the pass")

            return [("blocks.1.hook_resid_post", fail)]

    before = hook_count(tiny)
    with pytest.raises(RuntimeError, match="in the pass"):
        run(tiny, batch, *every_kind(), Fail())
    assert hook_count(tiny) == before


def test_an_inner_block_leaves_the_outer_one_on(tiny, batch):
    outer, both = Steer(0, direction(0), 2.0), Steer(0, 2 * direction(0) + 3 * direction(1), 1.0)
    with applied(tiny, outer):
        torch.testing.assert_close(run(tiny, batch, Steer(0, direction(1), 3.0)), run_alone(both, batch))
        torch.testing.assert_close(run(tiny, batch), run_alone(outer, batch))


def run_alone(intervention, batch):
    return run(load("tiny-random", dtype="float32"), batch, intervention)


# Ablation

SITES = ("hook_resid_pre", "hook_attn_out", "hook_mlp_out")


@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize(
    "directions",
    [
        direction(0)[None],
        torch.stack([direction(0, 5.0), direction(0, 5.0) + direction(1)]),  # neither orthogonal nor of unit length
        torch.stack([direction(0), -2 * direction(0)]),  # one direction, named twice
    ],
    ids=["one", "skew", "dependent"],
)
def test_nothing_along_an_ablated_direction_is_read_or_written(tiny, batch, watch, directions, layer, site):
    point = f"blocks.{layer}.{site}"
    before, after = seen(tiny, batch, watch, point), seen(tiny, batch, watch, point, Ablate(directions))
    assert (before @ directions.T).abs().max() > 1e-3
    assert (after @ directions.T).abs().max() < 1e-6


def test_ablation_leaves_what_is_orthogonal_alone(tiny, batch, watch):
    point, skew = "blocks.0.hook_resid_pre", torch.stack([direction(0), direction(0) + 0.2 * direction(1)])
    before, after = seen(tiny, batch, watch, point), seen(tiny, batch, watch, point, Ablate(skew))
    others = torch.linalg.svd(skew)[2][2:]  # the orthogonal complement
    torch.testing.assert_close(after @ others.T, before @ others.T)


def test_a_direction_named_twice_is_ablated_as_if_named_once(tiny, batch):
    once, twice = direction(0)[None], torch.stack([direction(0), -2 * direction(0)])
    torch.testing.assert_close(run(tiny, batch, Ablate(twice)), run(tiny, batch, Ablate(once)))


def test_rows_are_ablated_each_by_its_own_directions_as_if_alone(tiny, batch):
    bases = (torch.zeros(0, tiny.width), direction(0)[None], torch.stack([direction(0), direction(0) + direction(1)]))
    of = tuple(range(3)) * len(batch.rows)
    together = run(tiny, batch, AblateRows(bases, of))
    for row, place in enumerate(batch.rows):
        alone = [Ablate(bases[of[place]])] if len(bases[of[place]]) else []
        torch.testing.assert_close(together[row], run(tiny, batch, *alone)[row])
    assert {of[place] for place in batch.rows} == {0, 1, 2}


def centre(seed=0):
    return torch.randn(2, 3, 32, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("layer", [0, 1])
def test_affine_ablation_moves_a_component_to_its_sites_centre_and_leaves_the_rest_alone(
    tiny, batch, watch, layer, site
):
    point, directions, c = f"blocks.{layer}.{site}", torch.stack([direction(0), direction(0) + direction(1)]), centre()
    after = seen(tiny, batch, watch, point, AblateAffine(directions, c))
    expected = (c[layer, SITES.index(site)] @ directions.T).expand(*after.shape[:-1], -1)
    torch.testing.assert_close(after @ directions.T, expected, atol=1e-5, rtol=0)
    if (layer, site) == (0, "hook_resid_pre"):
        before, others = seen(tiny, batch, watch, point), torch.linalg.svd(directions)[2][2:]
        torch.testing.assert_close(after @ others.T, before @ others.T, atol=1e-5, rtol=0)


def test_affine_ablation_without_a_centre_is_ablation_and_a_scale_goes_a_part_of_the_way(tiny, batch, watch):
    d, point = torch.nn.functional.normalize(direction(0), dim=0)[None], "blocks.0.hook_resid_pre"
    torch.testing.assert_close(run(tiny, batch, AblateAffine(d)), run(tiny, batch, Ablate(d)))
    torch.testing.assert_close(run(tiny, batch, AblateAffine(d, scale=0.0)), run(tiny, batch))
    before = seen(tiny, batch, watch, point) @ d.T
    for scale in (0.25, 1.5):
        after = seen(tiny, batch, watch, point, AblateAffine(d, scale=scale)) @ d.T
        torch.testing.assert_close(after, (1 - scale) * before, atol=1e-6, rtol=1e-4)


def test_rows_are_moved_each_to_its_own_centre_by_its_own_scale_as_if_alone(tiny, batch):
    bases = (direction(0)[None], torch.stack([direction(0), direction(1)]), direction(2)[None])
    centres, scales, of = (centre(1), None, centre(2)), (1.0, 0.5, 1.5), tuple(range(3)) * len(batch.rows)
    together = run(tiny, batch, AblateRows(bases, of, centres, scales))
    for row, place in enumerate(batch.rows):
        alone = AblateAffine(bases[of[place]], centres[of[place]], scales[of[place]])
        torch.testing.assert_close(together[row], run(tiny, batch, alone)[row], atol=1e-5, rtol=1e-4)
    with pytest.raises(ValueError, match="give each one centre and one scale, or give none"):
        run(tiny, batch, AblateRows(bases, of, scales=(1.0,)))


def test_a_centre_of_another_model_is_an_error(tiny, batch):
    with pytest.raises(ValueError, match=r"A centre has shape \(1, 3, 32\); tiny-random needs \(2, 3, 32\)"):
        run(tiny, batch, AblateAffine(direction()[None], centre()[:1]))


def test_rows_are_alike_if_the_same_is_done_to_them_wherever_they_are_read(tiny):
    bases = (direction(0)[None], direction(1)[None])
    assert alike([Ablate(bases[0])], 3) == [0, 0, 0]
    assert alike([AblateAffine(bases[0], centre())], 3) == [0, 0, 0]
    assert alike([Ablate(bases[0]), AblateRows(bases, (1, 0, 1))], 3) == [0, 1, 0]
    assert alike([Steer(0, direction(0), 1.0)], 3) == [0, 0, 0]
    assert alike([Steer(0, direction(0), 1.0, "response")], 3) is None
    with pytest.raises(ValueError, match=r"shape \(1, 31\); tiny-random needs \(k, 32\)"):
        run(tiny, None, AblateRows((direction()[None, :-1],), (0,)))


def test_only_the_named_layers_are_ablated(tiny, batch, watch):
    d = direction(0)
    ablate = Ablate(d[None], layers=(1,))
    assert torch.equal(
        seen(tiny, batch, watch, "blocks.0.hook_resid_post", ablate),
        seen(tiny, batch, watch, "blocks.0.hook_resid_post"),
    )
    assert (seen(tiny, batch, watch, "blocks.1.hook_resid_pre", ablate) @ d).abs().max() < 1e-6


def test_ablation_of_a_layer_or_width_that_does_not_exist_is_an_error(tiny):
    with pytest.raises(ValueError, match="Layer 5 does not exist"):
        run(tiny, None, Ablate(direction()[None], layers=(0, 5)))
    with pytest.raises(ValueError, match=r"shape \(1, 31\); tiny-random needs \(k, 32\)"):
        run(tiny, None, Ablate(direction()[None, :-1]))


# Editing gradients


@pytest.mark.parametrize(("mode", "target"), [("neutralise", 0.0), ("attenuate", 1.0), ("amplify", -1.0)])
def test_an_edited_gradient_has_the_wanted_component_and_is_otherwise_the_same(mode, target):
    gradient = torch.randn(4, 5, WIDTH, generator=torch.Generator().manual_seed(1))
    v = direction(2, size=3.0)
    unit = v / 3.0
    edited = edit_component(gradient, v, mode)
    along = gradient @ unit
    assert (along < 0).any() and (along > 0).any()
    torch.testing.assert_close(edited @ unit, target * along.abs(), atol=1e-6, rtol=0)
    rest = torch.eye(WIDTH) - torch.outer(unit, unit)
    torch.testing.assert_close(edited @ rest, gradient @ rest, atol=1e-6, rtol=1e-5)


def gradients_of(model, batch, *interventions):
    """Loss and weight gradients."""
    with applied(model, *interventions):
        loss = token_losses(model, batch)[0].mean()  # whole rows, with a hook or without
        names, parameters = zip(*model.hf.named_parameters(), strict=True)
        return loss.item(), dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))


def test_editing_changes_the_gradient_below_the_layer_and_not_the_forward_pass(tiny, batch):
    loss, plain = gradients_of(tiny, batch)
    # the loss of a random model has a gradient in any direction, at the positions that carry it
    edited_loss, edited = gradients_of(tiny, batch, EditGradient(0, direction(), "amplify"))
    assert edited_loss == loss
    below = {name for name in plain if not torch.equal(plain[name], edited[name])}
    assert below and all("layers.0." in name or "embed" in name for name in below)
    assert len([name for name in below if "layers.0." in name]) == len([n for n in plain if "layers.0." in n])


@pytest.mark.parametrize(("mode", "sign"), [("neutralise", 0), ("attenuate", 1), ("amplify", -1)])
def test_the_gradient_that_arrives_below_has_the_edited_sign_at_every_token(tiny, batch, mode, sign):
    v, found = direction(), []

    class Listen:
        def hooks(self, model):
            return [("blocks.0.hook_resid_post", lambda h, hook: h.register_hook(found.append) and None)]

    gradients_of(tiny, batch, Listen())
    gradients_of(tiny, batch, EditGradient(0, v, mode), Listen())
    plain, edited = (g[batch.predicting] for g in found)
    assert (plain @ v).abs().mean() > 1e-6
    torch.testing.assert_close(edited @ v, sign * (plain @ v).abs(), atol=2e-8, rtol=1e-4)


def test_an_unknown_mode_of_editing_is_an_error_before_anything_runs(tiny, untyped):
    with pytest.raises(ValueError, match="Unknown mode 'erase': use neutralise, attenuate or amplify"):
        run(tiny, None, EditGradient(0, direction(), "erase"))
    with pytest.raises(ValueError, match="Layer 2 does not exist"):
        run(tiny, None, EditGradient(2, direction(), "amplify"))
