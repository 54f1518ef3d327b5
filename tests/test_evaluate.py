"""evaluate.py: scores against hand-made counts, protocols and panels against plain code, whole runs of main."""

import itertools
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.v2.functional import pil_to_tensor
from trees import camvid, folder

import evaluate as E
from data import InputError, normalize, open_dataset, palette, read
from model import DeepLabV3Plus, save_checkpoint
from refine import confidence, dpa_threshold, pseudo_labels, refine

ROOT = Path(__file__).parent.parent
CLASSES = ("sky", "road", "car")
CPU = torch.device("cpu")


def picture(height, width, seed=0):
    rng = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (1, 3, height, width), dtype=torch.uint8, generator=rng)


# ----------------------------------------------------------------------------------------------------------------------
# scores


def plain_confusion(prediction, label, num_classes):
    counts = torch.zeros(num_classes, num_classes, dtype=torch.long)
    for truth, predicted in zip(label.flatten().tolist(), prediction.flatten().tolist()):
        if truth != 255:
            counts[truth, predicted] += 1
    return counts


@pytest.mark.parametrize("kind", [torch.uint8, torch.long])
def test_confusion_counts_pairs_and_leaves_255_out(kind):
    label = torch.tensor([[0, 0, 1], [255, 2, 1]], dtype=kind)
    prediction = torch.tensor([[0, 1, 1], [2, 2, 0]])
    assert E.confusion_matrix(prediction, label, 3).tolist() == [[1, 1, 0], [1, 1, 0], [0, 0, 1]]
    rng = torch.Generator().manual_seed(0)
    label, prediction = torch.randint(0, 20, (2, 2, 9, 7), generator=rng).to(kind)
    label[0, 3:5] = 255
    assert torch.equal(E.confusion_matrix(prediction, label, 20), plain_confusion(prediction, label, 20))


def test_iou_matches_a_hand_made_confusion_matrix():
    iou, miou = E.intersection_over_union(torch.tensor([[6, 2, 0], [1, 3, 0], [0, 4, 4]]), CLASSES)
    assert iou == pytest.approx({"sky": 100 * 6 / 9, "road": 100 * 3 / 10, "car": 100 * 4 / 8})
    assert miou == pytest.approx((100 * 6 / 9 + 30 + 50) / 3)


def test_a_class_in_neither_ground_truth_nor_prediction_counts_nowhere():
    iou, miou = E.intersection_over_union(torch.tensor([[3, 1, 0], [0, 4, 0], [0, 0, 0]]), CLASSES)
    assert iou["car"] is None and miou == pytest.approx(100 * (3 / 4 + 4 / 5) / 2)
    wrongly_predicted, _ = E.intersection_over_union(torch.tensor([[3, 1, 1], [0, 4, 0], [0, 0, 0]]), CLASSES)
    assert wrongly_predicted["car"] == 0
    assert E.intersection_over_union(torch.zeros(3, 3), CLASSES) == (dict.fromkeys(CLASSES), None)


def test_the_table_shows_each_class_and_the_means():
    scores = {"miou": 61.5, "boundary_miou": None, "pixel_accuracy": 87.654, "iou": {"sky": 61.5, "sign symbol": None}}
    lines = E.table(scores | {"boundary_iou": {"sky": 12.25, "sign symbol": None}}).splitlines()
    assert [line.split() for line in lines] == [
        ["IoU", "boundary"], ["sky", "61.50", "12.25"], ["sign", "symbol", "absent", "absent"],
        ["mIoU", "61.50", "absent"], ["pixel", "accuracy", "87.65"],
    ]  # fmt: skip
    assert len({len(line) for line in lines[:-1]}) == 1  # columns


class ByColor(torch.nn.Module):
    """Logits are linear in a pixel's own colors, so that windows and scales must not matter."""

    def __init__(self, classes=3):
        super().__init__()
        self.classes, self.sizes = classes, []

    def forward(self, x):
        self.sizes.append(tuple(x.shape[-2:]))
        return torch.stack([x[:, i % 3] * (1 + 0.3 * i) - 0.2 * i for i in range(self.classes)], 1)


@pytest.fixture
def data(tmp_path):
    """A little CamVid, whose training images are noise and whose masks hold more classes than the tree's own."""
    root, rng = camvid(tmp_path / "camvid", train=5, val=3), np.random.default_rng(0)
    for path in [*root.glob("train/*"), *root.glob("val/*")]:
        Image.fromarray(rng.integers(0, 256, (48, 64, 3), dtype=np.uint8)).save(path)
        mask = rng.choice([0, 1, 2, 3, 11], (6, 8)).astype(np.uint8).repeat(8, 0).repeat(8, 1)
        Image.fromarray(mask).save(root / f"{path.parent.name}annot" / path.name)
    return open_dataset("camvid", root, 2)


def plain_scores(data, items, predicted, window=np.s_[:, :]):
    """The scores of evaluate, from the definitions; predicted: image (1,3,H,W) -> class indices (H,W)."""
    confusion, boundary = torch.zeros(11, 11), {c: [] for c in range(11)}
    for item in items:
        image, mask = (pil_to_tensor(part) for part in read(item, data))
        label = mask[0][window]
        prediction = predicted(image[(None, slice(None), *window)])
        confusion += plain_confusion(prediction, label, 11)
        for c in range(11):
            boundary[c].append(plain_bands(prediction, label, c))
    right, union = confusion.diag(), confusion.sum(0) + confusion.sum(1) - confusion.diag()
    iou = {name: 100 * (right[c] / union[c]).item() if union[c] else None for c, name in enumerate(data.classes)}
    sums = [[sum(values) for values in zip(*boundary[c])] for c in range(11)]
    bands = [100 * both / either if either else None for both, either in sums]
    return {
        "iou": iou,
        "miou": np.mean([value for value in iou.values() if value is not None]),
        "pixel_accuracy": 100 * (right.sum() / confusion.sum()).item(),
        "boundary_iou": dict(zip(data.classes, bands)),
    }


def test_scores_are_those_of_plain_loops_over_the_pixels(data):
    network = ByColor(11)
    result = E.evaluate(network, data, data.val, CPU)
    expected = plain_scores(data, data.val, lambda image: network(normalize(image)).argmax(1)[0])
    known = [value for value in expected["boundary_iou"].values() if value is not None]
    assert result.pop("boundary_miou") == pytest.approx(np.mean(known))
    assert result.keys() == expected.keys() and len(result["iou"]) == 11
    for name, value in expected.items():
        assert result[name] == pytest.approx(value), name


def test_the_center_crop_scores_only_the_center(data):
    network, window = ByColor(11), np.s_[4:44, 12:52]
    result = E.evaluate(network, data, data.val, CPU, E.Protocol("center-crop", 40))
    assert set(network.sizes) == {(40, 40)}
    expected = plain_scores(data, data.val, lambda image: network(normalize(image)).argmax(1)[0], window)
    assert result["iou"] == pytest.approx(expected["iou"])
    assert result["boundary_iou"] == pytest.approx(expected["boundary_iou"])
    large = E.evaluate(network, data, data.val, CPU, E.Protocol("center-crop", 50))
    assert network.sizes[-1] == (48, 50) and large["pixel_accuracy"] != result["pixel_accuracy"]


def test_masks_without_a_label_are_refused(data):
    Image.fromarray(np.full((48, 64), 255, np.uint8)).save(data.val[0].mask)
    with pytest.raises(InputError, match="no pixel of the images to score has a label; expected class indices"):
        E.evaluate(ByColor(11), data, data.val[:1], CPU)


# ----------------------------------------------------------------------------------------------------------------------
# boundaries


def plain_near(label, distance, image_border):
    (height, width), values = label.shape, label.tolist()

    def differs(y, x, j, i):
        return values[j][i] != values[y][x] if 0 <= j < height and 0 <= i < width else image_border

    def near(y, x):
        reach = range(-distance, distance + 1)
        return any(differs(y, x, y + dy, x + dx) for dy in reach for dx in reach)

    return torch.tensor([[near(y, x) for x in range(width)] for y in range(height)])


@pytest.mark.parametrize("kind", [torch.uint8, torch.long])
@pytest.mark.parametrize("image_border", [True, False])
@pytest.mark.parametrize("distance", [1, 3])
def test_contours_match_plain_loops(distance, image_border, kind):
    label = torch.zeros(2, 13, 17, dtype=kind)
    label[0, 3:9, 4:12], label[1, :, 9:], label[1, 6, 12] = 5, 255, 7
    near = E.near_contour(label, distance, image_border)
    assert torch.equal(near, torch.stack([plain_near(one, distance, image_border) for one in label]))


def plain_bands(prediction, label, c):
    """Cheng et al., 2021, from their definition: (intersection, union) of the masks without their erosions."""
    distance = max(1, round(0.02 * math.hypot(*label.shape)))
    prediction = prediction.masked_fill(label == 255, 255)
    bands = [(one == c) & plain_near((one == c).int(), distance, True) for one in (prediction, label)]
    return (bands[0] & bands[1]).sum().item(), (bands[0] | bands[1]).sum().item()


@pytest.mark.parametrize("kind", [torch.uint8, torch.long])
def test_boundary_iou_matches_its_definition(kind):
    rng = torch.Generator().manual_seed(1)
    label = torch.randint(0, 3, (1, 5, 6), generator=rng).repeat_interleave(12, 1).repeat_interleave(12, 2)
    prediction = label.roll(3, 2)
    label[:, 20:23] = 255
    iou, mean = E.intersection_over_union(E.boundary_confusion(prediction, label.to(kind), 3), CLASSES)
    bands = [plain_bands(prediction[0], label[0], c) for c in range(3)]
    expected = [100 * both / either for both, either in bands]
    assert list(iou.values()) == pytest.approx(expected) and mean == pytest.approx(sum(expected) / 3)
    assert 0 < mean < 100
    assert E.intersection_over_union(E.boundary_confusion(label, label.to(kind), 3), CLASSES)[1] == 100


def test_a_shifted_contour_costs_more_at_the_boundary_than_inside():
    label = torch.zeros(1, 100, 100, dtype=torch.long)
    label[:, 20:80, 20:80] = 1
    shifted = label.roll(2, 2)
    whole = E.intersection_over_union(E.confusion_matrix(shifted, label, 2), ("a", "b"))[1]
    boundary = E.intersection_over_union(E.boundary_confusion(shifted, label, 2), ("a", "b"))[1]
    assert boundary < whole - 10


# ----------------------------------------------------------------------------------------------------------------------
# protocols


@pytest.mark.parametrize("side", [1, 20, 32, 33, 53, 54, 96, 100, 769])
@pytest.mark.parametrize("crop", [1, 32, 64])
def test_windows_cover_a_side_with_steps_of_two_thirds_and_end_at_its_border(side, crop):
    starts = E.windows(side, crop)
    assert starts[0] == 0 and starts[-1] == max(side - crop, 0) and starts == sorted(set(starts))
    assert all(0 < after - before <= max(1, 2 * crop // 3) for before, after in zip(starts, starts[1:]))


@pytest.mark.parametrize("height, width", [(50, 70), (20, 70), (20, 25), (32, 32)])
def test_sliding_windows_are_crop_sized_and_leave_no_seam(height, width):
    network, image = ByColor(), picture(height, width)
    whole = E.predict(network, image)
    network.sizes = []
    slid = E.predict(network, image, E.Protocol("sliding", 32))
    torch.testing.assert_close(slid, whole)
    assert set(network.sizes) == {(min(height, 32), min(width, 32))}
    torch.testing.assert_close(slid.sum(1), torch.ones(1, height, width))


def test_overlapping_windows_average_probabilities():
    class Counter(torch.nn.Module):
        """Logit of class 1 is the number of the window."""

        calls = 0

        def forward(self, x):
            self.calls += 1
            return torch.stack([torch.zeros_like(x[:, 0]), torch.full_like(x[:, 0], float(self.calls))], 1)

    prob = E.predict(Counter(), picture(6, 9), E.Protocol("sliding", 6))  # windows at columns 0 and 3
    one, two = torch.tensor([1.0, 2.0]).sigmoid()
    expected = torch.stack([one] * 3 + [(one + two) / 2] * 3 + [two] * 3).expand(6, 9)
    torch.testing.assert_close(prob[0, 1], expected)


def test_flips_and_scales_are_averaged_and_turned_back():
    ramp = torch.arange(60, dtype=torch.uint8).mul(4).view(1, 1, 1, 60).expand(1, 3, 40, 60).clone()
    ramp[:, 1] = 255 - ramp[:, 1]
    network = ByColor()
    averaged, plain = E.predict(network, ramp, E.Protocol(tta=True)), E.predict(ByColor(), ramp)
    assert sorted(set(network.sizes)) == [(30, 45), (40, 60), (50, 75)] and len(network.sizes) == 6
    assert (averaged - plain).abs()[..., 3:-3].max() < 0.06  # a smooth image: scales differ only by interpolation
    torch.testing.assert_close(averaged.sum(1), torch.ones(1, 40, 60))


def test_a_network_that_prefers_one_side_is_balanced_by_flips():
    class Left(torch.nn.Module):
        def forward(self, x):
            left = torch.linspace(2, -2, x.shape[-1]).expand(x.shape[0], *x.shape[-2:])
            return torch.stack([left, -left], 1)

    for protocol in (E.Protocol(tta=True), E.Protocol(bilateral=True), E.Protocol(tta=True, bilateral=True)):
        prob = E.predict(Left(), picture(8, 12), protocol)
        torch.testing.assert_close(prob, torch.full((1, 2, 8, 12), 0.5))


def test_the_bilateral_filter_equals_a_plain_loop():
    rng = torch.Generator().manual_seed(0)
    prob = torch.randn(2, 3, 19, 31, generator=rng).mul(2).softmax(1)
    images = torch.randint(96, 128, (2, 3, 19, 31), dtype=torch.uint8, generator=rng)
    found = E.bilateral(prob, images)
    for b, y, x in itertools.product(range(2), range(19), range(31)):
        mean = {}  # the 3x3 means of the colors, of the pixels that the grid reaches
        for j, i in itertools.product(range(y % 8, 19, 8), range(x % 8, 31, 8)):
            around = images[b, :, max(j - 1, 0) : j + 2, max(i - 1, 0) : i + 2].double().flatten(1) / 255
            if abs(j - y) <= 24 and abs(i - x) <= 24:
                mean[j, i] = around.mean(1)
        weight = {at: math.exp(-(mean[at] - mean[y, x]).square().sum().item() / (2 * 0.05**2)) for at in mean}
        filtered = sum(weight[at] * prob[b, :, at[0], at[1]] for at in mean) / sum(weight.values())
        expected = (prob[b, :, y, x] + filtered) / 2
        torch.testing.assert_close(found[b, :, y, x], expected.float(), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(found.sum(1), torch.ones(2, 19, 31))
    assert not torch.allclose(found, prob, atol=0.05)


def test_the_bilateral_filter_comes_after_the_mean_over_both_views_and_before_refinement():
    image, network = picture(40, 60), ByColor()
    prob, mirrored = E.predict(network, image), E.predict(network, image.flip(-1)).flip(-1)
    expected = E.bilateral((prob + mirrored) / 2, image)
    torch.testing.assert_close(E.predict(network, image, E.Protocol(bilateral=True)), expected)
    refined = E.predict(network, image, E.Protocol(bilateral=True, refine=E.refinement_options(run_arguments())))
    torch.testing.assert_close(refined, refine(expected))


def test_refinement_at_inference_is_that_of_training():
    image, options = picture(12, 15), {"neighborhood": 5, "neighbors": 2}
    for protocol in (E.Protocol(), E.Protocol("sliding", 10, tta=True)):
        prob = E.predict(ByColor(), image, protocol)
        refined = E.predict(ByColor(), image, protocol._replace(refine=options))
        torch.testing.assert_close(refined, refine(prob, **options))


# ----------------------------------------------------------------------------------------------------------------------
# pseudo-labels


def run_arguments(**changes):
    """What evaluate.py reads of a run's arguments."""
    method = {"neighborhood": 3, "neighbors": 1, "select": "max", "distance_weight": True, "dilation": 1}
    method |= {"confidence": "margin", "threshold": None, "refinement": True, "alpha0": 0.4}
    return method | {"splits": None, "eval_mode": "original", "crop": 32} | changes


def plain_label_counts(prob, pseudo, truth, valid, raw_conf):
    """The counts of label_counts, pixel by pixel; raw_conf: (B,H,W)."""
    counts = [0] * 8
    for b, y, x in np.ndindex(*truth.shape):
        if valid[b, y, x]:
            known = truth[b, y, x] != 255
            kept_raw, kept = raw_conf[b, y, x] > pseudo.threshold, pseudo.label[b, y, x] != 255
            right_raw, right = prob[b, :, y, x].argmax() == truth[b, y, x], pseudo.label[b, y, x] == truth[b, y, x]
            row = [1, known, kept_raw, kept_raw and known, kept_raw and right_raw, kept, kept and known, kept and right]
            counts = [count + bool(one) for count, one in zip(counts, row)]
    return counts


@pytest.mark.parametrize(
    "changes", [{}, {"confidence": "entropy"}, {"confidence": "max", "threshold": 0.5}, {"neighbors": 2}]
)
def test_label_counts_are_those_of_a_plain_loop(changes):
    rng = torch.Generator().manual_seed(0)
    prob, kind = torch.randn(2, 4, 9, 11, generator=rng).mul(2).softmax(1), changes.get("confidence", "margin")
    truth = torch.randint(0, 4, (2, 9, 11), generator=rng, dtype=torch.uint8)
    valid = torch.rand(2, 9, 11, generator=rng) < 0.8
    truth[0, :4], truth[~valid] = 255, 255  # as views have it: padding has no ground truth
    options = E.label_options(run_arguments(**changes), prior=None)
    pseudo = pseudo_labels(prob, 0.3, valid=valid, **options)
    counts = E.label_counts(prob, pseudo, truth, valid, options)
    assert counts.tolist() == plain_label_counts(prob, pseudo, truth, valid, confidence(prob, kind))
    total, known, kept_raw, judged_raw, right_raw, kept, judged, right = counts.tolist()
    assert E.label_figures(counts) == pytest.approx({
        "kept": kept / total, "correct": right / judged, "tp_change": (right - right_raw) / known,
        "kept_raw": kept_raw / total, "correct_raw": right_raw / judged_raw,
        "fp_change": ((judged - right) - (judged_raw - right_raw)) / known,
    })  # fmt: skip


def test_without_ground_truth_only_the_shares_of_labels_are_known():
    assert E.label_figures(torch.tensor([8, 0, 2, 0, 0, 4, 0, 0])) == {"kept": 0.5, "kept_raw": 0.25}
    assert E.label_figures(torch.zeros(8)) == {"kept": 0, "kept_raw": 0}
    nothing_kept = E.label_figures(torch.tensor([8, 8, 0, 0, 0, 0, 0, 0]))
    assert nothing_kept["correct"] == nothing_kept["correct_raw"] == 0


@pytest.mark.parametrize("changes", [{}, {"threshold": 0.3}, {"confidence": "entropy", "refinement": False}])
def test_the_labels_of_whole_images_have_the_threshold_of_their_own_pixels(data, changes):
    network, args = ByColor(11), run_arguments(**changes)
    counts = torch.zeros(8, dtype=torch.long)
    for item in data.unlabeled:
        image, truth = (pil_to_tensor(part)[None] for part in read(item, data))
        prob = network(normalize(image)).softmax(1)
        conf = confidence(prob, args["confidence"])
        threshold = dpa_threshold(conf, 0.4) if args["threshold"] is None else args["threshold"]
        assert E.image_threshold(prob, args) == threshold
        options = E.label_options(args) | {"threshold": threshold}
        pseudo = pseudo_labels(prob, None, **options)
        valid = torch.ones_like(conf, dtype=torch.bool)
        counts += torch.tensor(plain_label_counts(prob, pseudo, truth[0], valid, conf))
    figures = E.evaluate_labels(network, data, data.unlabeled, CPU, E.Protocol(), args, None)
    assert figures == E.label_figures(counts) and 0 < figures["kept_raw"] < 1
    assert ("threshold" in changes) or figures["kept_raw"] == pytest.approx(0.6, abs=0.01)


def test_the_options_of_a_run_are_those_of_refine_and_pseudo_labels():
    prob, prior = torch.rand(1, 3, 6, 6).softmax(1), torch.full((3,), 0.8)
    args = run_arguments(neighborhood="cross", neighbors=2, dilation=2, confidence="max", threshold=0.4)
    expected = {"neighborhood": "cross", "neighbors": 2, "select": "max", "distance_weight": True, "dilation": 2}
    expected["prior"] = prior
    assert E.refinement_options(args, prior) == expected
    assert E.label_options(args, prior) == expected | {"kind": "max", "threshold": 0.4, "refinement": True}
    pseudo_labels(prob, 0.4, **E.label_options(args, prior))


# ----------------------------------------------------------------------------------------------------------------------
# panels


def test_heat_grows_from_black_over_red_and_yellow_to_white():
    colors = [[0, 0, 0], [255, 0, 0], [255, 255, 0], [255] * 3]
    sure = torch.tensor([[0.0, 1 / 3, 2 / 3, 1.0]])
    assert E.heat(sure, "margin", 5)[:, 0].T.tolist() == colors
    entropy = torch.tensor([[-1.2, -2 / 3, -1 / 3, 0.0]]) * math.log(5)  # refined, it goes beyond -log C
    assert (E.heat(entropy, "entropy", 5)[:, 0].T.int() - torch.tensor(colors)).abs().max() <= 1


def test_an_overlay_shows_the_label_s_colors_and_dims_the_rest():
    image = picture(4, 6)[0]
    label = torch.tensor([[1, 1, 2, 2, 255, 255]], dtype=torch.uint8).expand(4, 6)
    tile = E.overlay(image, label)
    assert (tile[..., 4:].int() - (image[..., 4:] // 2).int()).abs().max() <= 1  # the library rounds blends down
    for c, columns in ((1, slice(0, 2)), (2, slice(2, 4))):
        mixed = 0.35 * (image[..., columns] // 2) + 0.65 * torch.from_numpy(palette()[c].astype(float))[:, None, None]
        assert (tile[..., columns] - mixed).abs().max() <= 1
    assert torch.equal(E.overlay(image, torch.full((4, 6), 255)), image // 2)
    assert torch.equal(E.overlay(image, torch.full((4, 6), 255), dim=1), image)


@pytest.mark.parametrize("changes", [{}, {"confidence": "entropy", "threshold": -1.5}])
def test_a_panel_has_seven_tiles_per_row(data, changes):
    network, items, args = ByColor(11), data.unlabeled[:2], run_arguments(**changes)
    sheet = E.panel(network, data, items, CPU, args, width=48)
    assert sheet.dtype == torch.uint8 and sheet.shape == (3, 2 + 2 * 50, 2 + 7 * 50)
    for row, item in enumerate(items):
        image, truth = (pil_to_tensor(part) for part in read(item, data))
        prob = network(normalize(image[None])).softmax(1)
        options = E.label_options(args) | {"threshold": E.image_threshold(prob, args)}
        raw, refined = (pseudo_labels(prob, None, **options | {"refinement": on}) for on in (False, True))
        tiles = [image, E.overlay(image, truth[0]), E.overlay(image, prob.argmax(1)[0])]
        tiles += [E.heat(one.confidence[0], args["confidence"], 11) for one in (raw, refined)]
        tiles += [E.overlay(image, one.label[0]) for one in (raw, refined)]
        for column, tile in enumerate(tiles):
            shown = sheet[:, 2 + 50 * row : 50 + 50 * row, 2 + 50 * column : 50 + 50 * column]
            assert torch.equal(shown, E.VF.resize(tile, [48, 48])), (row, column)


def test_panels_show_unlabeled_images_of_known_ground_truth_or_else_validation_images(data):
    chosen = E.panel_items(data, 2)
    assert [item.id for item in chosen] == [data.unlabeled[i * len(data.unlabeled) // 2].id for i in range(2)]
    masked = data._replace(unlabeled=[item._replace(mask=None) for item in data.unlabeled])
    assert E.panel_items(masked) == data.val and not E.panel_items(masked._replace(val=[]))


# ----------------------------------------------------------------------------------------------------------------------
# whole runs


def write_checkpoint(path, dataset, root, classes, labeled, **changes):
    """A checkpoint of an untrained network, as train.py writes them, and the two networks."""
    torch.manual_seed(0)
    args = run_arguments(backbone="resnet10", output_stride=16, dataset=dataset, root=str(root)) | changes
    names = ("student", "teacher")
    networks = {name: DeepLabV3Plus("resnet10", len(classes)).eval() for name in names}
    run = {"args": args, "classes": list(classes), "prior": None, "labeled": labeled, "step": 7}
    save_checkpoint(run | {name: networks[name].state_dict() for name in names}, path)
    return networks


@pytest.fixture
def saved(tmp_path):
    """(checkpoint on a little CamVid, its root, its networks)."""
    root, path = camvid(tmp_path / "camvid", train=4, val=3, test=1), tmp_path / "last.pth"
    classes = open_dataset("camvid", root, 2).classes
    return path, root, write_checkpoint(path, "camvid", root, classes, ["train1", "train3"])


def scored(checkpoint, *options):
    """The numbers that evaluate.py writes."""
    file = Path(checkpoint).parent / "new" / "scores.json"
    E.main(E.parse_args([str(checkpoint), "--device", "cpu", "--json", str(file), *map(str, options)]))
    return json.loads(file.read_text())


def test_every_protocol_runs_through_the_command_line(saved, monkeypatch, capsys):
    checkpoint, root, networks = saved
    used, predict = [], E.predict

    def watched(network, image, protocol):
        used.append((network.classifier.bias.tolist(), protocol))
        return predict(network, image, protocol)

    monkeypatch.setattr(E, "predict", watched)
    plain, refined = E.Protocol("original", 32), E.refinement_options(run_arguments())
    for command, part, count, protocol in (
        ([], "val", 3, plain),
        (["--eval-mode", "sliding", "--crop", "40"], "val", 3, plain._replace(eval_mode="sliding", crop=40)),
        (["--eval-mode", "center-crop"], "val", 3, plain._replace(eval_mode="center-crop")),
        (["--tta"], "val", 3, plain._replace(tta=True)),
        (["--refine"], "val", 3, plain._replace(refine=refined)),
        (["--bilateral"], "val", 3, plain._replace(bilateral=True)),
        (["--refine", "--bilateral"], "val", 3, plain._replace(refine=refined, bilateral=True)),
        (["--student", "--split", "train"], "train", 4, plain),
        (["--split", "test"], "test", 1, plain),
    ):
        used.clear()
        result, which = scored(checkpoint, *command), "student" if "--student" in command else "teacher"
        bias = networks[which].classifier.bias.tolist()
        assert used == [(bias, protocol)] * count and (result["split"], result["images"]) == (part, count)
        assert result["network"] == which and result["refine"] == ("--refine" in command)
        assert (result["eval_mode"], result["crop"], result["tta"]) == protocol[:3] and result["step"] == 7
        assert 0 <= result["miou"] <= 100 and len(result["iou"]) == len(result["boundary_iou"]) == 11
        said = capsys.readouterr().out
        assert f"step 7: {count} {part} images of camvid, {protocol.eval_mode}" in said
        assert f"pixel accuracy {result['pixel_accuracy']:.2f}" in said


def test_only_the_images_to_score_have_to_be_there(saved):
    checkpoint, root, _ = saved
    expected = scored(checkpoint)["iou"]
    (root / "train" / "train0.png").unlink()
    (root / "trainannot" / "train2.png").unlink()
    elsewhere = root.rename(root.with_name("moved"))
    assert scored(checkpoint, "--root", elsewhere)["iou"] == expected
    assert scored(checkpoint, "--root", elsewhere, "--split", "train")["images"] == 2  # those that have a mask
    with pytest.raises(InputError, match="camvid under .* has no val images"):
        scored(checkpoint)


def test_the_training_images_of_a_run_that_labels_all_are_scored(saved):
    checkpoint, root, _ = saved
    classes = open_dataset("camvid", root, 2).classes
    write_checkpoint(checkpoint, "camvid", root, classes, [f"train{i}" for i in range(4)])
    assert scored(checkpoint, "--split", "train")["images"] == 4
    with pytest.raises(InputError, match="has no unlabeled images"):
        scored(checkpoint, "--pseudo-labels")


def test_pseudo_labels_are_counted_on_the_unlabeled_images(saved, capsys):
    checkpoint, root, networks = saved
    report = scored(checkpoint, "--pseudo-labels")
    data = open_dataset("camvid", root, ["train1", "train3"])
    figures = E.evaluate_labels(networks["teacher"], data, data.unlabeled, CPU, E.Protocol(), run_arguments(), None)
    assert {name: report[name] for name in figures} == pytest.approx(figures, abs=1e-3)
    assert report["images"] == 2 and report["split"] == "unlabeled"
    assert report["kept_raw"] == pytest.approx(0.6, abs=0.01)
    assert f"kept_raw {100 * report['kept_raw']:11.2f} %" in capsys.readouterr().out


@pytest.mark.parametrize("options", [(), ("--split", "test"), ("--pseudo-labels",)])
def test_panels_show_unlabeled_images_whatever_is_scored(saved, monkeypatch, options):
    checkpoint, root, _ = saved
    shown, panel = [], E.panel

    def watched(network, data, items, *rest):
        shown.extend(item.id for item in items)
        return panel(network, data, items, *rest)

    monkeypatch.setattr(E, "panel", watched)
    scored(checkpoint, "--panels", root.parent / "panels", *options)
    sheet = Image.open(root.parent / "panels" / "step-000007.png")
    assert shown == ["train0", "train2"] and sheet.size == (2 + 7 * 162, 2 + 2 * 162)


def test_a_folder_of_other_classes_is_refused(tmp_path):
    root = folder(tmp_path / "mine")
    names = [f"class {i}" for i in range(3)]
    write_checkpoint(tmp_path / "last.pth", "folder", root, names, ["photo 0"])
    assert set(scored(tmp_path / "last.pth")["iou"]) == set(names)
    (root / "classes.txt").write_text("class 0\nclass 1\nweed\n")
    with pytest.raises(InputError, match=r"has the classes .*weed.*; expected those of the run, .*class 2"):
        scored(tmp_path / "last.pth")


@pytest.mark.slow
@pytest.mark.parametrize("options", [["--eval-mode", "sliding"], ["--pseudo-labels"]])
def test_two_processes_score_what_one_does(saved, options):
    one, file = scored(saved[0], *options), saved[0].parent / "two.json"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "evaluate.py"]
    command += [str(saved[0]), "--device", "cpu", "--json", str(file), *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    two = json.loads(file.read_text())
    for name in ("iou", "boundary_iou") if "iou" in one else ("kept", "correct_raw", "tp_change"):
        assert two[name] == pytest.approx(one[name], abs=0.2), name


def test_bad_numbers_on_the_command_line_say_what_is_expected(capsys):
    for options, says in (
        (["--crop", "0"], "0 is out of range; expected at least 1"),
        (["--split", "all"], "invalid choice: 'all'"),
        (["--pseudo-labels", "--refine"], "expected no --refine, no --split"),
        (["--pseudo-labels", "--split", "val"], "expected no --refine, no --split"),
    ):
        with pytest.raises(SystemExit):
            E.parse_args(["last.pth", *options])
        assert says in capsys.readouterr().err
    share, positive = E.number(float, 0, 1), E.number(float, 0, above=True)
    assert share("1") == 1 and positive("1e-9") == 1e-9 and share.__name__ == "float"
    limits = "at least 0 and at most 1"
    for parse, text, says in ((share, "1.5", limits), (share, "nan", limits), (positive, "0", "more than 0")):
        with pytest.raises(E.argparse.ArgumentTypeError, match=f"{text} is out of range; expected .*{says}"):
            parse(text)


def raises(error):
    def main():
        raise error

    return main


@pytest.mark.parametrize(
    "main, code, said",
    [
        (lambda: None, 0, ""),
        (raises(InputError("found; expected; do")), 1, "train.py: found; expected; do\n"),
        (raises(InputError("Caught InputError in worker\nTraceback\ndata.InputError: do")), 1, "train.py: do\n"),
        (raises(OSError(28, "No space left on device")), 1, "train.py: [Errno 28] No space left on device\n"),
        (raises(SystemExit(143)), 143, ""),
        (raises(KeyboardInterrupt()), 130, ""),
    ],
    ids=["done", "input", "worker", "system", "signal", "Ctrl-C"],
)
def test_what_the_user_can_mend_ends_with_its_sentence_and_without_a_traceback(monkeypatch, capsys, main, code, said):
    monkeypatch.setattr(sys, "argv", ["somewhere/train.py"])
    with pytest.raises(SystemExit) as stop:
        E.run_script(main)
    assert (stop.value.code or 0) == code and capsys.readouterr().err == said


def test_what_only_a_bug_can_break_ends_with_a_traceback(capsys):
    with pytest.raises(SystemExit) as stop:
        E.run_script(raises(KeyError("bug")))
    assert stop.value.code == 1 and "Traceback" in capsys.readouterr().err
