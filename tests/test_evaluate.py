"""evaluate.py: scores against hand-made counts, protocols and panels against plain code, whole runs of main."""

import itertools
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image
from torchvision.transforms.v2.functional import pil_to_tensor
from trees import Operations, camvid, folder, refused

import data as D
import evaluate as E
from data import InputError, Item, normalize, open_dataset, palette, read
from model import DeepLabV3Plus, save_checkpoint
from refine import confidence, dpa_threshold, pseudo_labels, refine

ROOT = Path(__file__).parent.parent
CLASSES = ("sky", "road", "car")
CPU = torch.device("cpu")


def picture(height, width, seed=0):
    rng = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (1, 3, height, width), dtype=torch.uint8, generator=rng)


class ByColor(torch.nn.Module):
    """Logits are linear in a pixel's own colors, so that windows and scales must not matter."""

    def __init__(self, classes=3):
        super().__init__()
        self.classes, self.sizes = classes, []

    def forward(self, x):
        self.sizes.append(tuple(x.shape[-2:]))
        return torch.stack([x[:, i % 3] * (1 + 0.3 * i) - 0.2 * i for i in range(self.classes)], 1)


def one_sided(x):
    """Logits that say where a pixel is in the image: not the same for its mirror image."""
    left = torch.linspace(2, -2, x.shape[-1]).expand(1, *x.shape[-2:])
    return torch.stack([left, -left], 1)


@pytest.fixture
def data(tmp_path):
    """A little CamVid of noisy blocks, whose masks are other blocks of more classes than the tree's own."""
    root, rng = camvid(tmp_path / "camvid", train=5, val=3), np.random.default_rng(0)
    for path in [*root.glob("train/*"), *root.glob("val/*")]:
        pixels = rng.integers(0, 240, (4, 4, 3)).repeat(12, 0).repeat(16, 1) + rng.integers(0, 16, (48, 64, 3))
        Image.fromarray(pixels.astype(np.uint8)).save(path)
        mask = rng.choice([0, 1, 2, 3, 11], (6, 8)).astype(np.uint8).repeat(8, 0).repeat(8, 1)
        Image.fromarray(mask).save(root / f"{path.parent.name}annot" / path.name)
    return open_dataset("camvid", root, 2)


# ----------------------------------------------------------------------------------------------------------------------
# scores


def plain_near(label, distance, image_border):
    near = torch.zeros(label.shape, dtype=torch.bool)
    for y, x in np.ndindex(*label.shape):
        window = label[max(y - distance, 0) : y + distance + 1, max(x - distance, 0) : x + distance + 1]
        beyond = window.numel() < (2 * distance + 1) ** 2  # the image's border
        near[y, x] = (window != label[y, x]).any() or (image_border and beyond)
    return near


def plain_scores(data, items, predicted, window):
    """The scores of evaluate, from the definitions; predicted: image (1,3,H,W) -> class indices (H,W)."""
    annotated, counts = 0, torch.zeros(2, 2, 11)  # of regions and their bands (Cheng et al., 2021): in both, in either
    for item in items:
        image, mask = (pil_to_tensor(part)[(slice(None), *window)] for part in read(item, data))
        distance = max(1, round(0.02 * math.hypot(*mask.shape[-2:])))
        regions = [predicted(image[None]).masked_fill(mask[0] == 255, 255), mask[0]]
        bands = [one.where(plain_near(one, distance, True), 255) for one in regions]
        for count, (one, other) in zip(counts, (regions, bands)):
            for c in range(11):
                count[0, c] += ((one == c) & (other == c)).sum()
                count[1, c] += ((one == c) | (other == c)).sum()
        annotated += (mask != 255).sum()
    scores = {"pixel_accuracy": 100 * (counts[0, 0].sum() / annotated).item()}
    for prefix, (both, either) in zip(("", "boundary_"), counts):
        iou = [100 * (b / e).item() if e else None for b, e in zip(both, either)]
        mean = np.mean([value for value in iou if value is not None])
        scores |= {f"{prefix}iou": dict(zip(data.classes, iou)), f"{prefix}miou": mean}
    return scores


@pytest.mark.parametrize("confusion, iou", [
    ([[6, 2, 0], [1, 3, 0], [0, 4, 4]], (100 * 6 / 9, 30, 50)),
    ([[3, 1, 0], [0, 4, 0], [0, 0, 0]], (75, 80, None)),  # in neither ground truth nor prediction
    ([[3, 1, 1], [0, 4, 0], [0, 0, 0]], (60, 80, 0)),
    ([[0, 0, 0], [0, 0, 0], [0, 0, 0]], (None, None, None)),
])  # fmt: skip
def test_iou_is_intersection_over_union_and_absent_classes_count_nowhere(confusion, iou):
    found, mean = E.intersection_over_union(torch.tensor(confusion), CLASSES)
    known = [value for value in iou if value is not None]
    assert found == pytest.approx(dict(zip(CLASSES, iou)))
    assert mean == (pytest.approx(np.mean(known)) if known else None)


@pytest.mark.parametrize("image_border", [True, False])
@pytest.mark.parametrize("distance", [1, 3, 4, 20])
def test_contours_match_plain_loops(distance, image_border):
    label = torch.zeros(3, 13, 47, dtype=torch.uint8)
    label[0, 3:9, 4:12], label[1, :, 9:], label[1, 6, 12], label[2] = 5, 255, 7, 255
    near = E.near_contour(label, distance, image_border)
    assert torch.equal(near, torch.stack([plain_near(one, distance, image_border) for one in label]))


@pytest.mark.parametrize("crop, window", [(0, np.s_[:, :]), (40, np.s_[4:44, 12:52]), (50, np.s_[:, 7:57])])
def test_scores_are_those_of_plain_loops_over_the_pixels_all_or_of_the_center(data, crop, window):
    network = ByColor(11)
    result = E.evaluate(network, data, data.val, CPU, E.Protocol("center-crop" if crop else "original", crop))
    assert set(network.sizes) == {(min(48, crop or 48), crop or 64)}
    expected = plain_scores(data, data.val, lambda image: network(normalize(image)).argmax(1)[0], window)
    assert result.keys() == expected.keys() and len(result["iou"]) == 11
    for name, value in expected.items():
        assert result[name] == pytest.approx(value), name


def test_masks_without_a_label_are_refused(data):
    Image.fromarray(np.full((48, 64), 255, np.uint8)).save(data.val[0].mask)
    says = "no pixel of the images to score has a label; expected class indices"
    refused(says, E.evaluate, ByColor(11), data, data.val[:1], CPU)


def test_counting_an_image_is_few_kernels_and_never_waits_for_the_gpu():
    prediction = torch.zeros(1, 375, 500, dtype=torch.long)
    with Operations() as operations:
        for count in (E.confusion_matrix, E.boundary_confusion):
            count(prediction, prediction.byte(), 21)
    assert operations.launched <= 50, operations.names
    assert not [name for name in operations.names if name.startswith(("bincount", "nonzero", "_local_scalar"))]


@pytest.mark.parametrize("scores", [
    lambda data: E.evaluate(ByColor(11), data, data.val, CPU),
    lambda data: E.evaluate_labels(ByColor(11), data, data.unlabeled, CPU, E.Protocol(), run_arguments(), None),
])  # fmt: skip
def test_processes_score_their_own_images_and_add_their_counts(data, monkeypatch, scores):
    whole, shares = scores(data), []
    monkeypatch.setattr(E, "all_reduce", lambda counts: shares.append(counts) or sum(shares))
    for rank in range(2):
        monkeypatch.setattr(D, "rank_and_world", lambda: (rank, 2))
        found = scores(data)
    assert found == whole and len(shares) == 2  # the second process has the counts of both


def test_the_table_shows_each_class_and_the_means_and_says_when_only_one_class_occurs():
    scores = {"miou": 61.5, "boundary_miou": None, "pixel_accuracy": 87.654, "iou": {"sky": 61.5, "sign symbol": None}}
    scores["boundary_iou"] = {"sky": 12.25, "sign symbol": None}
    *lines, note = E.table(scores).splitlines()
    assert [line.split() for line in lines] == [
        ["IoU", "boundary"], ["sky", "61.50", "12.25"], ["sign", "symbol", "absent", "absent"],
        ["mIoU", "61.50", "absent"], ["pixel", "accuracy", "87.65"],
    ]  # fmt: skip
    assert len({len(line) for line in lines[:-1]}) == 1  # columns
    assert note == "only sky occurs, so this mIoU is the IoU of one class"
    scores["iou"]["sign symbol"] = 0.0
    assert "occurs" not in E.table(scores)


# ----------------------------------------------------------------------------------------------------------------------
# protocols


@pytest.mark.parametrize("height, width, crop, count", [
    (20, 25, 32, 1), (32, 32, 32, 1), (20, 70, 32, 3), (50, 70, 32, 2 * 3), (53, 54, 32, 2 * 3), (3, 2, 1, 3 * 2),
])  # fmt: skip
def test_sliding_windows_are_crop_sized_two_thirds_apart_and_leave_no_seam(height, width, crop, count):
    network, image = ByColor(), picture(height, width)
    slid = E.predict(network, image, E.Protocol("sliding", crop))
    assert network.sizes == [(min(height, crop), min(width, crop))] * count
    torch.testing.assert_close(slid, network(normalize(image)).softmax(1))


def test_overlapping_windows_average_probabilities():
    logits = (torch.tensor([0.0, window]).view(1, 2, 1, 1).expand(1, 2, 6, 6) for window in (1, 2))
    prob = E.predict(lambda x: next(logits), picture(6, 9), E.Protocol("sliding", 6))  # windows at columns 0 and 3
    one, two = torch.tensor([1.0, 2.0]).sigmoid()
    expected = torch.stack([one] * 3 + [(one + two) / 2] * 3 + [two] * 3).expand(6, 9)
    torch.testing.assert_close(prob[0, 1], expected)


def test_flips_and_scales_are_averaged_and_turned_back():
    prob = E.predict(one_sided, picture(8, 12), E.Protocol(tta=True))
    torch.testing.assert_close(prob, torch.full((1, 2, 8, 12), 0.5))
    ramp = torch.arange(60, dtype=torch.uint8).mul(4).view(1, 1, 1, 60).expand(1, 3, 40, 60).clone()
    ramp[:, 1] = 255 - ramp[:, 1]
    network = ByColor()
    averaged, plain = E.predict(network, ramp, E.Protocol(tta=True)), E.predict(ByColor(), ramp)
    assert sorted(network.sizes) == [(30, 45)] * 2 + [(40, 60)] * 2 + [(50, 75)] * 2
    assert (averaged - plain).abs()[..., 3:-3].max() < 0.06  # a smooth image: scales differ only by interpolation


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
        torch.testing.assert_close(found[b, :, y, x], ((prob[b, :, y, x] + filtered) / 2).float(), atol=1e-5, rtol=1e-4)
    assert not torch.allclose(found, prob, atol=0.05)


@pytest.mark.parametrize("protocol", [E.Protocol(), E.Protocol("sliding", 10, True), E.Protocol(bilateral=True)])
def test_a_prediction_is_first_averaged_over_mirrored_views_then_filtered_then_refined(protocol):
    def network(x):
        return ByColor(2)(x) + one_sided(x)

    image, options = picture(12, 15), {"neighborhood": 5, "neighbors": 2}
    prob = E.predict(network, image, protocol)
    torch.testing.assert_close(E.predict(network, image, protocol._replace(refine=options)), refine(prob, **options))
    if protocol.bilateral:
        plain, mirrored = E.predict(network, image), E.predict(network, image.flip(-1)).flip(-1)
        torch.testing.assert_close(prob, E.bilateral((plain + mirrored) / 2, image))


# ----------------------------------------------------------------------------------------------------------------------
# pseudo-labels


def run_arguments(**changes):
    """What evaluate.py reads of a run's arguments."""
    method = {"neighborhood": 3, "neighbors": 1, "select": "max", "distance_weight": True, "dilation": 1}
    method |= {"confidence": "margin", "threshold": None, "refinement": True, "alpha0": 0.4}
    return method | {"splits": None, "eval_mode": "original", "crop": 32} | changes


@pytest.mark.parametrize(
    "changes", [{}, {"confidence": "entropy"}, {"confidence": "max", "threshold": 0.5}, {"neighbors": 2}]
)
def test_label_counts_are_those_of_a_plain_loop(changes):
    rng = torch.Generator().manual_seed(0)
    prob = torch.randn(2, 4, 9, 11, generator=rng).mul(2).softmax(1)
    truth = torch.randint(0, 4, (2, 9, 11), generator=rng, dtype=torch.uint8)
    valid = torch.rand(2, 9, 11, generator=rng) < 0.8
    truth[0, :4], truth[~valid] = 255, 255  # as views have it: padding has no ground truth
    options = E.label_options(run_arguments(**changes), prior=None)
    pseudo, raw = pseudo_labels(prob, 0.3, valid=valid, **options), confidence(prob, options["kind"])
    expected = np.zeros(8, int)
    for at in map(tuple, valid.nonzero().tolist()):
        known, kept_raw, kept = truth[at] != 255, raw[at] > pseudo.threshold, pseudo.label[at] != 255
        right_raw, right = prob.argmax(1)[at] == truth[at], pseudo.label[at] == truth[at]
        expected += [1, known, kept_raw, kept_raw & known, kept_raw & right_raw, kept, kept & known, kept & right]
    assert E.label_counts(prob, pseudo, truth, valid, options).tolist() == expected.tolist()


def test_figures_are_shares_of_the_pixels_of_the_labels_and_of_the_annotated_pixels():
    figures = {"kept": 0.6, "correct": 35 / 50, "kept_raw": 0.4, "correct_raw": 24 / 30}
    figures |= {"tp_change": (35 - 24) / 80, "fp_change": (15 - 6) / 80}
    assert E.label_figures(torch.tensor([100, 80, 40, 30, 24, 60, 50, 35])) == pytest.approx(figures)
    assert E.label_figures(torch.tensor([8, 0, 2, 0, 0, 4, 0, 0])) == {"kept": 0.5, "kept_raw": 0.25}
    assert E.label_figures(torch.zeros(8)) == {"kept": 0, "kept_raw": 0}


@pytest.mark.parametrize("changes", [{}, {"threshold": 0.3}, {"confidence": "entropy", "refinement": False}])
def test_the_labels_of_whole_images_have_the_threshold_of_their_own_pixels(data, changes):
    network, args = ByColor(11), run_arguments(**changes)
    counts, options = torch.zeros(8, dtype=torch.long), E.label_options(args)
    for image, truth in (map(pil_to_tensor, read(item, data)) for item in data.unlabeled):
        prob = network(normalize(image[None])).softmax(1)
        conf = confidence(prob, args["confidence"])
        threshold = dpa_threshold(conf, 0.4) if args["threshold"] is None else args["threshold"]
        pseudo = pseudo_labels(prob, None, **options | {"threshold": threshold})
        counts += E.label_counts(prob, pseudo, truth, torch.ones_like(conf, dtype=bool), options)
    figures = E.evaluate_labels(network, data, data.unlabeled, CPU, E.Protocol(), args, None)
    assert figures == E.label_figures(counts) and 0 < figures["kept_raw"] < 1
    assert ("threshold" in changes) or figures["kept_raw"] == pytest.approx(0.6, abs=0.01)


def test_the_threshold_of_an_image_has_the_run_s_floor_and_asks_no_other_process(monkeypatch):
    monkeypatch.setattr(dist, "is_initialized", lambda: True)  # though none would answer
    prob = ByColor()(normalize(picture(9, 9))).softmax(1)
    quantile = torch.quantile(confidence(prob), 0.4, interpolation="lower")
    for floor in (0.0, 0.99):
        assert E.image_threshold(prob, run_arguments(floor=floor)) == max(quantile, torch.tensor(floor))
    assert E.image_threshold(prob, run_arguments(threshold=0.3, floor=0.99)) == 0.3 and quantile < 0.9


# ----------------------------------------------------------------------------------------------------------------------
# panels


@pytest.mark.parametrize("kind, sure", [
    ("margin", [0.0, 1 / 3, 2 / 3, 1.0]),
    ("entropy", [-1.2 * math.log(5), -2 / 3 * math.log(5), -1 / 3 * math.log(5), 0.0]),  # refined: beyond -log C
])  # fmt: skip
def test_heat_grows_from_black_over_red_and_yellow_to_white(kind, sure):
    colors = torch.tensor([[0, 0, 0], [255, 0, 0], [255, 255, 0], [255] * 3])
    assert (E.heat(torch.tensor([sure]), kind, 5)[:, 0].T.int() - colors).abs().max() <= 1


def test_an_overlay_shows_the_label_s_colors_and_dims_the_rest():
    image, colors = picture(4, 6)[0], torch.from_numpy(palette().astype(float))
    label = torch.tensor([[1, 1, 2, 2, 255, 255]], dtype=torch.uint8).expand(4, 6)
    mixed = 0.35 * (image // 2) + 0.65 * colors[label.long().clamp(max=2)].permute(2, 0, 1)
    expected = mixed.where(label != 255, image // 2)
    assert (E.overlay(image, label) - expected).abs().max() <= 1  # the library rounds blends down
    assert torch.equal(E.overlay(image, torch.full((4, 6), 255), dim=1), image)


@pytest.mark.parametrize("changes, longest, size", [
    ({}, 1024, (48, 64)), ({"confidence": "entropy", "threshold": -1.5}, 32, (24, 32)),
])  # fmt: skip
def test_a_panel_has_eight_titled_tiles_per_row_the_last_what_refinement_changes(data, changes, longest, size):
    network, items, args = ByColor(11), data.unlabeled[:2], run_arguments(**changes)
    sheet = E.panel(network, data, items, CPU, args, width=48, longest=longest)
    assert sheet.dtype == torch.uint8 and sheet.shape == (3, 16 + 2 + 2 * 50, 2 + 8 * 50)
    assert all(sheet[:, :16, 2 + 50 * column : 50 + 50 * column].min() < 100 for column in range(8))  # titles
    assert set(network.sizes) == {size}
    for row, item in enumerate(items):
        image, truth = (pil_to_tensor(part) for part in read(item, data))
        image, truth = E.VF.resize(image, size), E.VF.resize(truth, size, E.VF.InterpolationMode.NEAREST)
        prob = network(normalize(image[None])).softmax(1)
        options = E.label_options(args) | {"threshold": E.image_threshold(prob, args)}
        raw, refined = (pseudo_labels(prob, None, **options | {"refinement": on}) for on in (False, True))
        tiles = [image, E.overlay(image, truth[0]), E.overlay(image, prob.argmax(1)[0])]
        tiles += [E.heat(one.confidence[0], args["confidence"], 11) for one in (raw, refined)]
        tiles += [E.overlay(image, one.label[0]) for one in (raw, refined)]
        tiles.append(image // 2)
        for y, x in (raw.label != refined.label)[0].nonzero().tolist():
            lost, new = refined.label[0, y, x] == 255, raw.label[0, y, x] == 255
            tiles[-1][:, y, x] = torch.tensor((0, 220, 0) if new else (255, 0, 0) if lost else (0, 90, 255))
        for column, tile in enumerate(tiles):
            shown = sheet[:, 18 + 50 * row : 66 + 50 * row, 2 + 50 * column : 50 + 50 * column]
            difference = (shown.int() - E.VF.resize(tile, [48, 48]).int()).abs().max()
            assert difference <= (column == 7), (row, column)  # the library rounds blends down


def test_panels_show_unlabeled_images_of_known_ground_truth_or_else_validation_images(data):
    chosen = E.panel_items(data, 2)
    assert [item.id for item in chosen] == [data.unlabeled[i * len(data.unlabeled) // 2].id for i in range(2)]
    masked = data._replace(unlabeled=[item._replace(mask=None) for item in data.unlabeled])
    assert E.panel_items(masked) == data.val and not E.panel_items(masked._replace(val=[]))


# ----------------------------------------------------------------------------------------------------------------------
# whole runs


def write_checkpoint(path, dataset, root, labeled, **changes):
    """A checkpoint of an untrained network, as train.py writes them; returns the two networks."""
    torch.manual_seed(0)
    data = open_dataset(dataset, root, labeled)
    classes, val = list(data.classes), [item.id for item in data.val]
    args = run_arguments(backbone="resnet10", output_stride=16, dataset=dataset, root=str(root)) | changes
    networks = {name: DeepLabV3Plus("resnet10", len(classes)).eval() for name in ("student", "teacher")}
    for network in networks.values():
        network.classifier.bias.data[0] += 1  # the first class is predicted, which is in the masks
    run = {"args": args, "classes": classes, "prior": None, "labeled": labeled, "val": val, "step": 7}
    save_checkpoint(run | {name: network.state_dict() for name, network in networks.items()}, path)
    return networks


@pytest.fixture
def saved(tmp_path):
    """(checkpoint on a little CamVid, its root, its networks)."""
    root, path = camvid(tmp_path / "camvid", train=4, val=3, test=1), tmp_path / "last.pth"
    return path, root, write_checkpoint(path, "camvid", root, ["train1", "train3"], context="paper")


def scored(checkpoint, *options):
    """The numbers that evaluate.py writes."""
    file = Path(checkpoint).parent / "new" / "scores.json"
    words = [checkpoint, "--device", "cpu", "--workers", 0, "--json", file, *options]
    E.main(E.parse_args([*map(str, words)]))
    return json.loads(file.read_text())


@pytest.mark.parametrize("command, part, count, changes", [
    ("", "val", 3, {}),
    ("--eval-mode sliding --crop 40 --split test", "test", 1, {"eval_mode": "sliding", "crop": 40}),
    ("--eval-mode center-crop --tta --student --split train", "train", 4, {"eval_mode": "center-crop", "tta": True}),
    ("--refine --bilateral", "val", 3, {"refine": E.refinement_options(run_arguments()), "bilateral": True}),
    ("--pseudo-labels --bilateral", "unlabeled", 2, {"bilateral": True}),
    ("--pseudo-labels --eval-mode center-crop", "unlabeled", 2, {}),
])  # fmt: skip
def test_every_protocol_runs_through_the_command_line(saved, monkeypatch, capsys, command, part, count, changes):
    checkpoint, root, networks = saved
    used, predict, protocol = [], E.predict, E.Protocol("original", 32)._replace(**changes)

    def watched(network, image, protocol):
        used.append((network.classifier.bias.tolist(), protocol))
        return predict(network, image, protocol)

    monkeypatch.setattr(E, "predict", watched)
    which, shown = "student" if "--student" in command else "teacher", E.Protocol(bilateral=protocol.bilateral)
    result = scored(checkpoint, "--panels", root.parent / "panels", *command.split())
    bias = networks[which].classifier.bias.tolist()
    assert used == [(bias, protocol)] * count + [(bias, shown)] * 2
    assert Image.open(root.parent / "panels" / "step-000007.png").size == (2 + 8 * 162, 16 + 2 + 2 * 162)
    about = protocol._asdict() | {"refine": "--refine" in command, "split": part, "images": count}
    about["student"] = which == "student"
    assert result.items() >= (about | {"step": 7}).items()
    said = capsys.readouterr().out
    assert ("2 of these 4 images were labeled" in said) == (part == "train") and "not the validation" not in said
    assert f"step 7: {count} {part} images of camvid, {protocol.eval_mode}" in said
    if part == "unlabeled":
        assert f"kept_raw {100 * result['kept_raw']:11.2f} %" in said and abs(result["kept_raw"] - 0.6) < 0.01
    else:
        assert E.table(result) in said and len(result["iou"]) == len(result["boundary_iou"]) == 11


def test_only_the_images_to_score_have_to_be_there(saved):
    checkpoint, root, _ = saved
    expected = scored(checkpoint, "--workers", 1)["iou"]
    (root / "train" / "train0.png").unlink()
    (root / "trainannot" / "train2.png").unlink()
    elsewhere = root.rename(root.with_name("moved"))
    assert scored(checkpoint, "--root", elsewhere)["iou"] == expected
    assert scored(checkpoint, "--root", elsewhere, "--split", "train")["images"] == 2  # those that have a mask
    refused("camvid under .* has no val images", scored, checkpoint)


def test_unlabeled_images_need_no_masks_and_a_folder_of_other_classes_is_refused(tmp_path):
    root, checkpoint = folder(tmp_path / "mine"), tmp_path / "last.pth"
    write_checkpoint(checkpoint, "folder", root, [f"photo {i}" for i in range(4)])
    result = scored(checkpoint, "--pseudo-labels")
    assert result["images"] == 2 and result["kept"] > 0.1 and "correct" not in result
    for unlabeled in root.glob("images/photo [45].*"):
        unlabeled.unlink()
    assert {*scored(checkpoint, "--split", "train")["iou"]} == {"class 0", "class 1", "class 2"}  # all labeled
    refused("has no unlabeled images", scored, checkpoint, "--pseudo-labels")
    (root / "classes.txt").write_text("class 0\nclass 1\nweed\n")
    refused(r"has the classes .*weed.*; expected those of the run, .*class 2", scored, checkpoint)


def test_scores_of_other_images_than_the_run_s_come_with_a_warning(capsys):
    checkpoint = {"labeled": ["c", "d"], "val": ["b", "a"]}
    trained = "warning: 2 of these 3 images were labeled in training; scores on them are too high\n"
    other = "warning: these are not the validation images of the run; do not compare the scores\n"
    for part, ids, says in (
        ("val", "ab", ""), ("val", "cda", trained + other), ("test", "x", ""), ("train", "cdx", trained),
    ):  # fmt: skip
        E.warn_of_ids(checkpoint, part, [Item(id, None, None) for id in ids])
        assert capsys.readouterr().out == says


def test_damaged_lines_of_a_log_are_dropped(tmp_path):
    file = tmp_path / "metrics.jsonl"
    assert E.read_records(file) == []
    file.write_bytes(b'{"step": 1}\n\xff{"step": 2}\n\n[1]\n7\n{"event": "start"}\n{"step": 3}\n{"step": 4, "lo')
    assert E.read_records(file) == [{"step": 1}, {"step": 3}]


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


@pytest.mark.parametrize("options, says", [
    ("--crop 0", "0 is out of range; expected at least 1"),
    ("--split all", "invalid choice: 'all'"),
    ("--pseudo-labels --refine", "cannot be combined with --refine or --split"),
    ("--pseudo-labels --split val", "cannot be combined with --refine or --split"),
])  # fmt: skip
def test_a_command_line_that_makes_no_sense_says_what_is_expected(capsys, options, says):
    with pytest.raises(SystemExit):
        E.parse_args(["last.pth", *options.split()])
    assert says in capsys.readouterr().err
    share, positive = E.number(float, 0, 1), E.number(float, 0, above=True)
    assert share("1") == 1 and share("0") == 0 and positive("1e-9") == 1e-9
    for parse, text, limit in ((share, "1.5", "most 1"), (share, "nan", "most 1"), (positive, "0", "more than 0")):
        with pytest.raises(E.argparse.ArgumentTypeError, match=f"{text} is out of range; expected .*{limit}"):
            parse(text)


@pytest.mark.parametrize("error, said", [
    (InputError("Caught InputError in worker\nTraceback\ndata.InputError: do"), r"do"),
    (OSError(28, "No space left on device"), r"\[Errno 28\] No space left on device"),
    (OSError(), r"OSError\(\)"),
    (torch.OutOfMemoryError("CUDA out of memory"), r"the GPU's memory is full; lower --crop .*"),
    (dist.DistBackendError("NCCL\ngone"), r"another process ended; its own message may say why \(gone\)"),
    (RuntimeError("[gloo/transport/tcp/pair.cc:5] Closed"), r"another process ended; .* \(\[gloo/.* Closed\)"),
    (RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed."), r"a loader worker has ended \(.*Killed.*"),
    (ConnectionResetError(104, "Connection reset"), r"a loader worker has ended \(.*; lower --workers, or .*"),
    (KeyError("bug"), r"Traceback(.*\n)+KeyError: 'bug'\n"),  # only what a bug can break ends with one
])  # fmt: skip
def test_what_the_user_can_fix_ends_with_its_sentence_and_without_a_traceback(monkeypatch, capsys, error, said):
    monkeypatch.setattr(sys, "argv", ["somewhere/train.py"])
    with pytest.raises(SystemExit, match="^1$"):
        E.run_script(Mock(side_effect=error))
    assert re.fullmatch(rf"train\.py: {said}\n", capsys.readouterr().err)
    for main, code in ((lambda: None, 0), (lambda: sys.exit(143), 143), (Mock(side_effect=KeyboardInterrupt), 130)):
        with pytest.raises(SystemExit, match=f"^{code}$"):
            E.run_script(main)
