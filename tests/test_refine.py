"""refine.py against plain loops, closed forms and the paper's own numbers."""

import doctest
import itertools
import math
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch._subclasses import FakeTensorMode
from trees import Operations

import refine as refine_module
from refine import confidence, dpa_alpha, dpa_threshold, neighbor_agreement, offsets, pseudo_labels, refine


def random_prob(batch=2, classes=4, height=6, width=5, seed=0):
    logits = torch.randn(batch, classes, height, width, generator=torch.Generator().manual_seed(seed))
    return (2 * logits).softmax(1)


def refine_pixel_by_pixel(prob, grid, neighbors, select, prior=None):
    """Eqs. 7-10 and 14-16 as the paper says them, one pixel and class at a time."""
    (height, width), out = prob.shape[-2:], prob.clone()
    for b, c, y, x in np.ndindex(*prob.shape):
        left = [(dy, dx, beta) for dy, dx, beta in grid if 0 <= y + dy < height and 0 <= x + dx < width]
        p = prob[b, c, y, x].item()
        for _ in range(min(neighbors, len(left))):
            unions = []
            for dy, dx, beta in left:
                q = prob[b, c, y + dy, x + dx].item()
                joint = p * q if prior is None else max(p * q, p * prior[c].item())
                unions.append(p + beta * (q - joint))
            best = unions.index(max(unions) if select == "max" else min(unions))
            p = unions[best]
            del left[best]
        out[b, c, y, x] = p
    return out


def test_refined_margin_matches_the_worked_example_of_section_3_2_1():
    prob = torch.tensor([[0.5, 0.7], [0.5, 0.3]]).view(1, 2, 1, 2)  # the pixel, and its only neighbor
    refined = refine(prob, distance_weight=False)
    assert torch.allclose(refined[0, :, 0, 0], torch.tensor([0.85, 0.65]))
    assert torch.allclose(confidence(refined)[0, 0, 0], torch.tensor(0.20))


def test_the_worked_example_of_the_docstring_is_what_the_functions_compute():
    torch.set_printoptions(precision=3)
    result = doctest.testmod(refine_module)
    torch.set_printoptions(profile="default")
    assert result.failed == 0 and result.attempted == 6


def test_beta_is_equation_10_counted_in_steps_of_the_grid_and_alpha_equation_6():
    beta = {(dy, dx): weight for dy, dx, weight in offsets(3)}
    assert (beta[0, 1], beta[1, 1]) == pytest.approx((0.6065, 0.3679), abs=1e-4)
    dilated = {(dy, dx): weight for dy, dx, weight in offsets(3, dilation=4)}
    assert dilated == {(4 * dy, 4 * dx): weight for (dy, dx), weight in beta.items()}
    assert {weight for *_, weight in offsets(7, distance_weight=False)} == {1.0}
    assert [len(offsets(n)) for n in (3, 5, 7, "cross")] == [8, 24, 48, 4]
    assert [dpa_alpha(step, 100) for step in (0, 50, 100)] == pytest.approx([0.4, 0.2, 0])
    assert dpa_alpha(25, 100, alpha0=0.2) == pytest.approx(0.15)


@pytest.mark.parametrize("neighborhood", [3, 7, "cross"])
@pytest.mark.parametrize("neighbors", [1, 5])
@pytest.mark.parametrize("select", ["max", "min"])
def test_refinement_equals_a_plain_loop_over_pixels(neighborhood, neighbors, select):
    prob = random_prob()
    for prior, (weight, dilation) in itertools.product(
        (None, torch.tensor([0.0, 0.3, 0.9, 1.0])), ((True, 1), (False, 2), (True, 9))
    ):
        fast = refine(prob, neighborhood, neighbors, select, prior, weight, dilation)
        slow = refine_pixel_by_pixel(prob, offsets(neighborhood, dilation, weight), neighbors, select, prior)
        torch.testing.assert_close(fast, slow)


@pytest.mark.parametrize("neighbors", [1, 2])
def test_random_selection_takes_one_position_inside_the_image_for_all_classes(neighbors):
    prob = random_prob(height=3, width=4)
    refined, again, other = (
        refine(prob, neighbors=neighbors, select="random", generator=torch.Generator().manual_seed(seed))
        for seed in (1, 1, 2)
    )
    assert torch.equal(refined, again) and not torch.equal(refined, other)
    for b, y, x in itertools.product(range(2), range(3), range(4)):
        inside = [(dy, dx, beta) for dy, dx, beta in offsets(3) if 0 <= y + dy < 3 and 0 <= x + dx < 4]
        distances = []
        for path in itertools.permutations(inside, neighbors):
            p = prob[b, :, y, x]
            for dy, dx, beta in path:
                p = p + beta * prob[b, :, y + dy, x + dx] * (1 - p)
            distances.append((p - refined[b, :, y, x]).abs().max())
        assert min(distances) < 1e-6, (b, y, x)


def test_random_selection_is_uniform_over_the_neighbors_that_exist():
    prob = torch.zeros(4000, 1, 2, 2)
    prob[..., 0, 1], prob[..., 1, 0], prob[..., 1, 1] = 0.2, 0.5, 0.8
    assert torch.equal(refine(prob, select="random", dilation=2), prob)  # there is none
    refined = refine(prob, select="random", distance_weight=False, generator=torch.Generator().manual_seed(0))
    shares = [(refined[:, 0, 0, 0] - value).abs().lt(1e-6).float().mean().item() for value in (0.2, 0.5, 0.8)]
    assert sum(shares) == pytest.approx(1) and all(share == pytest.approx(1 / 3, abs=0.03) for share in shares)


def test_confidences_match_their_equations():
    prob = random_prob(2, 6)
    top = prob.topk(2, dim=1).values
    torch.testing.assert_close(confidence(prob, "margin"), top[:, 0] - top[:, 1])
    torch.testing.assert_close(confidence(prob, "max"), top[:, 0])
    torch.testing.assert_close(confidence(prob, "entropy"), (prob * prob.log()).sum(1))
    certain = torch.eye(3)[0].view(1, 3, 1, 1)
    assert [confidence(certain, kind).item() for kind in ("margin", "max", "entropy")] == [1, 1, 0]


def test_neighbor_agreement_equals_a_plain_count():
    labels = torch.randint(0, 3, (2, 6, 7), generator=torch.Generator().manual_seed(0))
    labels[0, :2], labels[1, 3, 3] = 255, 255
    for neighborhood in (3, "cross"):
        same, pairs = torch.zeros(4), torch.zeros(4)
        for (b, y, x), (dy, dx, _) in itertools.product(np.ndindex(2, 6, 7), offsets(neighborhood)):
            if labels[b, y, x] != 255 and 0 <= y + dy < 6 and 0 <= x + dx < 7:
                pairs[labels[b, y, x]] += 1
                same[labels[b, y, x]] += labels[b, y, x] == labels[b, y + dy, x + dx]
        expected = torch.where(pairs > 0, same / pairs, 0)  # class 3 never occurs
        torch.testing.assert_close(neighbor_agreement(labels.to(torch.uint8), 4, neighborhood), expected)


@pytest.mark.parametrize("draw", [
    lambda n: torch.where(torch.rand(n) < 0.9, 1 - 1e-4 * torch.rand(n), torch.rand(n)),
    lambda n: 1e-30 * torch.rand(n), torch.randn,
], ids=["nine tenths within 1e-4 of 1", "tiny", "around zero"])  # fmt: skip
def test_threshold_is_the_exact_quantile_for_any_distribution(draw):
    torch.manual_seed(0)
    conf, valid = draw(3 * 40 * 50).view(3, 40, 50), torch.rand(3, 40, 50) < 0.8
    for alpha in (0, 0.001, 0.4, 0.999, 1):
        expected = torch.quantile(conf[valid].double(), alpha, interpolation="lower")
        assert dpa_threshold(conf, alpha, valid).double() == expected
    assert dpa_threshold(conf, 0.4).double() == torch.quantile(conf.double(), 0.4, interpolation="lower")


def test_threshold_is_exact_among_more_pixels_than_float32_can_count():
    n = 2**24 + 4096
    ordered = torch.arange(n, dtype=torch.double).div(n).float()
    conf = ordered.view(2, -1).T.contiguous()  # in another order
    for alpha in (0.4, 0.9999999):
        assert dpa_threshold(conf, alpha) == ordered[int(alpha * (n - 1))]


def _threshold_of_one_process(rank, path, confs, valids, queue):
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=len(confs))
    queue.put((rank, dpa_threshold(confs[rank], 0.3).item(), dpa_threshold(confs[rank], 0.3, valids[rank]).item()))
    dist.destroy_process_group()


def test_threshold_of_two_processes_is_that_of_the_whole_batch(tmp_path):
    rng = torch.Generator().manual_seed(0)
    confs = [torch.rand(3, 9, 9, generator=rng), torch.rand(3, 9, 9, generator=rng) ** 8]  # of other distributions
    valids = [torch.rand(3, 9, 9, generator=rng) < share for share in (0.7, 0.2)]
    queue = mp.get_context("spawn").SimpleQueue()
    mp.spawn(_threshold_of_one_process, (tmp_path / "store", confs, valids, queue), nprocs=2)
    conf, valid = (torch.cat([part.flatten() for part in parts]) for parts in (confs, valids))
    expected = (dpa_threshold(conf, 0.3).item(), dpa_threshold(conf, 0.3, valid).item())
    assert {queue.get(), queue.get()} == {(0, *expected), (1, *expected)}


@pytest.mark.parametrize("options", [
    {}, {"kind": "max"}, {"kind": "entropy"}, {"refinement": False}, {"floor": 0.01}, {"floor": 0.5},
    {"kind": "max", "threshold": 0.95, "floor": 0.99}, {"threshold": 0.9, "refinement": False},
])  # fmt: skip
def test_the_threshold_comes_from_raw_probabilities_or_is_given_and_the_decision_from_refined_ones(options):
    prob, kind = random_prob(2, 4, 50, 50), options.get("kind", "margin")
    pseudo = pseudo_labels(prob, 0.4, neighborhood=5, **options)
    quantile = dpa_threshold(confidence(prob, kind), 0.4).item()
    refined = refine(prob, 5) if options.get("refinement", True) else prob
    keep = confidence(refined, kind) > pseudo.threshold
    floored = max(quantile, options.get("floor", quantile))  # a fixed threshold has no floor
    assert pseudo.threshold.item() == pytest.approx(options.get("threshold", floored))
    assert torch.equal(pseudo.confidence, confidence(refined, kind)) and torch.equal(pseudo.keep, keep)
    assert torch.equal(pseudo.label, torch.where(keep, refined.argmax(1), 255)) and 0 < keep.float().mean() < 1
    assert (keep.float().mean().item() == pytest.approx(0.6, abs=1e-3)) == (options == {"refinement": False})


def test_pseudo_labels_take_seventy_operations_on_a_gpu_however_many_classes():
    counts = []
    for classes in (2, 21, 150):
        with FakeTensorMode(), Operations() as operations:  # knows shapes and devices, computes nothing
            prob = torch.empty(2, classes, 33, 31, device="cuda")
            valid = torch.empty(2, 33, 31, dtype=torch.bool, device="cuda")
            operations.count = 0
            assert pseudo_labels(prob, 0.4, valid=valid).label.device.type == "cuda"
        counts.append(operations.count)
    assert counts[0] == counts[1] == counts[2] <= 70


@pytest.mark.parametrize("options", [
    {}, {"neighbors": 2}, {"select": "min"}, {"prior": torch.tensor([0.2, 0.5, 0.9])},
])  # fmt: skip
def test_padding_reaches_neither_neighbors_nor_label_nor_quantile(options):
    prob, valid = random_prob(1, 3, 6, 6), torch.ones(1, 6, 6, dtype=torch.bool)
    valid[..., 4:] = False
    padded, image = pseudo_labels(prob, 0.4, valid=valid, **options), pseudo_labels(prob[..., :4], 0.4, **options)
    assert padded.threshold == image.threshold and not padded.keep[..., 4:].any()
    assert torch.equal(padded.label[..., :4], image.label) and (padded.label[..., 4:] == 255).all()
    assert torch.equal(padded.confidence[..., :4], image.confidence)
    flat = torch.full((1, 2, 6, 6), 0.5).masked_fill(~valid[:, None], 0)
    random = refine(flat, select="random", distance_weight=False)[..., :4]
    assert torch.allclose(random, torch.full_like(random, 0.75))
    nowhere = pseudo_labels(prob, 0.4, valid=valid & False, **options)
    assert nowhere.threshold == dpa_threshold(torch.zeros(0), 0.4) == math.inf and (nowhere.label == 255).all()


@pytest.mark.parametrize("call, says", [
    (lambda p: confidence(p, "gap"), "expected 'margin', 'max' or 'entropy'"),
    (lambda p: refine(p, 4), "expected 3, 5, 7 or 'cross'"),
    (lambda p: refine(p, select="best"), "by 'best'; expected 1 or more, by 'max', 'min' or 'random'"),
    (lambda p: pseudo_labels(p[:, :1], 0.4), "with two classes or more; for a sigmoid use torch.cat([1 - p, p], 1)"),
    (lambda p: refine(p[0]), "expected (batch, classes, height, width)"),
    (lambda p: refine(p, prior=torch.ones(3)), "expected one number per class"),
    (lambda p: dpa_threshold(p, 1.5), "expected a share from 0 to 1"),
    (lambda p: neighbor_agreement(torch.tensor([[[0, 7]]]), 4), "outside 0..3 and 255"),
])  # fmt: skip
def test_wrong_options_get_one_sentence(call, says):
    with pytest.raises(ValueError, match=re.escape(says)):
        call(random_prob())


def test_refine_py_needs_only_pytorch():
    source = (Path(__file__).parent.parent / "refine.py").read_text()
    assert {*re.findall(r"^\s*(?:import|from) (\w+)", source, re.M)} <= {"torch", *sys.stdlib_module_names}


@pytest.mark.parametrize("options", [
    {}, {"neighbors": 2, "select": "min"}, {"prior": torch.tensor([0.9, 0.2, 0.5, 0.7]), "kind": "entropy"},
])  # fmt: skip
def test_what_a_gpu_computes_is_what_a_cpu_does(monkeypatch, options):
    prob = random_prob(2, 4, 17, 23)
    ours = pseudo_labels(prob, 0.3, **options)
    monkeypatch.setattr(torch.Tensor, "is_cuda", True, raising=False)
    assert all(map(torch.equal, pseudo_labels(prob, 0.3, **options), ours))
