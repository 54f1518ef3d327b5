"""evaluate.py: scores against hand-made counts, and checkpoints that must not be trusted."""

import json
import math
import sys
import types

import numpy as np
import pytest
import torch
from PIL import Image

import evaluate as E
from data import InputError, open_dataset, read
from refine import confidence, refine

CLASSES = ("sky", "road", "car")


def test_confusion_counts_pairs_and_leaves_255_out():
    label = torch.tensor([[0, 0, 1], [255, 2, 1]])
    prediction = torch.tensor([[0, 1, 1], [2, 2, 0]])
    assert E.confusion_matrix(prediction, label, 3).tolist() == [[1, 1, 0], [1, 1, 0], [0, 0, 1]]
    assert E.confusion_matrix(prediction, label.to(torch.uint8), 3).tolist() == [[1, 1, 0], [1, 1, 0], [0, 0, 1]]


def test_scores_match_a_hand_made_confusion_matrix():
    result = E.scores(torch.tensor([[6, 2, 0], [1, 3, 0], [0, 4, 4]]), torch.eye(4), CLASSES)
    assert result["iou"] == pytest.approx({"sky": 100 * 6 / 9, "road": 100 * 3 / 10, "car": 100 * 4 / 8})
    assert result["miou"] == pytest.approx((100 * 6 / 9 + 30 + 50) / 3)
    assert result["pixel_accuracy"] == pytest.approx(100 * 13 / 20)


def test_a_class_in_neither_truth_nor_prediction_counts_nowhere():
    result = E.scores(torch.tensor([[3, 1, 0], [0, 4, 0], [0, 0, 0]]), torch.eye(4), CLASSES)
    assert result["iou"]["car"] is None and result["miou"] == pytest.approx(100 * (3 / 4 + 4 / 5) / 2)
    assert "car" in E.table(result) and "absent" in E.table(result)
    wrongly_predicted = E.scores(torch.tensor([[3, 1, 1], [0, 4, 0], [0, 0, 0]]), torch.eye(4), CLASSES)
    assert wrongly_predicted["iou"]["car"] == 0


class Oracle(torch.nn.Module):
    """Predicts class 0 everywhere."""

    def forward(self, x):
        return torch.cat([torch.ones_like(x[:, :1]), torch.zeros(len(x), 6, *x.shape[2:])], 1)


def test_background_alone_scores_its_share_on_shapes():
    data = open_dataset("shapes", "", 3)
    result = E.evaluate(Oracle(), data, data.val[:20], torch.device("cpu"))
    assert result["iou"]["background"] == pytest.approx(result["pixel_accuracy"])
    assert result["miou"] == pytest.approx(result["iou"]["background"] / 7)


def test_heat_grows_from_black_to_white():
    assert E.heat(torch.tensor([[0.0, 1 / 3, 2 / 3, 1.0]]))[:, 0].T.tolist() == [
        [0, 0, 0],
        [255, 0, 0],
        [255, 255, 0],
        [255] * 3,
    ]


def test_an_overlay_shows_the_label_s_colors_and_dims_the_rest():
    image = torch.full((3, 2, 2), 90, dtype=torch.uint8)
    tile = E.overlay(image, torch.tensor([[1, 1], [255, 255]], dtype=torch.uint8))
    assert tile[:, 1, 0].tolist() == [30] * 3 and tile[0, 0, 0] > 100 and tile[1, 0, 0] < 30
    assert torch.equal(E.overlay(image, torch.full((2, 2), 255)), image // 3)


class Evil:
    def __reduce__(self):
        return print, ("this must not run",)


def test_a_bad_checkpoint_gets_one_sentence_and_runs_no_code(tmp_path, capsys):
    with pytest.raises(InputError, match="is not there; expected the last.pth"):
        E.load_checkpoint(tmp_path / "none.pth")
    parts = ("step", "classes", "labeled", "unlabeled", "val", "palette", "preprocessing", "student", "teacher")
    old = dict.fromkeys(parts, 0) | {"args": {"dataset": "shapes"}}
    other = old | {"args": dict.fromkeys(E.RUN_ARGUMENTS), "preprocessing": {"mean": [0.5] * 3, "std": [1.0] * 3}}
    for name, content in (
        ("evil.pth", {"step": Evil()}), ("list.pth", [1]), ("other.pth", {"step": 1}), ("old.pth", old), ("gray.pth", other),
    ):  # fmt: skip
        torch.save(content, tmp_path / name)
    (tmp_path / "cut.pth").write_bytes((tmp_path / "other.pth").read_bytes()[:100])
    for name, says in (
        ("evil", "could not be read"),
        ("cut", "could not be read"),
        ("list", "lacks args"),
        ("other", "lacks args"),
        ("gray", r"expects \{'mean': \[0.5, 0.5, 0.5\].*; this version gives"),
        ("old", "lacks alpha0, backbone, .* expected one that this version of train.py saved"),
    ):
        with pytest.raises(InputError, match=says):
            E.load_checkpoint(tmp_path / f"{name}.pth")
    assert "must not run" not in capsys.readouterr().out


def test_weights_of_another_class_count_get_one_sentence():
    from model import DeepLabV3Plus

    weights = DeepLabV3Plus("resnet10", 7).state_dict()
    checkpoint = {"args": {"backbone": "resnet10", "output_stride": 16}, "classes": ["a"] * 5, "teacher": weights}
    with pytest.raises(InputError, match="do not fit a resnet10 with 5 classes.*7.*5"):
        E.load_model(checkpoint, "last.pth")


# ----------------------------------------------------------------------------------------------------------------------
# protocols


class Local(torch.nn.Module):
    """A pixel's logits are three times its own normalized colors, so windows and scales must not matter."""

    def forward(self, x):
        self.sizes = [*getattr(self, "sizes", []), tuple(x.shape[-2:])]
        return 3 * x


def picture(height, width, seed=0):
    return torch.randint(
        0, 256, (1, 3, height, width), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)
    )


@pytest.mark.parametrize("side", [1, 20, 32, 33, 53, 54, 96, 100, 769])
@pytest.mark.parametrize("crop", [1, 32, 64])
def test_windows_cover_a_side_with_steps_of_two_thirds_and_end_at_its_border(side, crop):
    starts = E.windows(side, crop)
    assert starts[0] == 0 and starts[-1] == max(side - crop, 0) and starts == sorted(set(starts))
    assert all(0 < after - before <= max(1, 2 * crop // 3) for before, after in zip(starts, starts[1:]))


@pytest.mark.parametrize("height, width", [(50, 70), (20, 70), (20, 25), (32, 32)])
def test_sliding_windows_are_crop_sized_and_leave_no_seam(height, width):
    model, image = Local(), picture(height, width)
    whole = E.predict(model, image, E.Protocol())
    model.sizes = []
    slid = E.predict(model, image, E.Protocol("sliding", 32))
    torch.testing.assert_close(slid, whole)
    assert set(model.sizes) == {(min(height, 32), min(width, 32))}
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
    model = Local()
    averaged, plain = E.predict(model, ramp, E.Protocol(tta=True)), E.predict(Local(), ramp, E.Protocol())
    assert sorted(set(model.sizes)) == [(30, 45), (40, 60), (50, 75)] and len(model.sizes) == 6
    assert (averaged - plain).abs()[..., 3:-3].max() < 0.06  # a smooth image: scales differ by interpolation alone
    torch.testing.assert_close(averaged.sum(1), torch.ones(1, 40, 60))


def test_refinement_at_inference_is_that_of_training():
    image, options = picture(12, 15), {"neighborhood": 5, "neighbors": 2}
    prob = E.predict(Local(), image, E.Protocol())
    torch.testing.assert_close(E.predict(Local(), image, E.Protocol(refine=options)), refine(prob, **options))


def test_the_center_crop_scores_the_center_alone():
    data = open_dataset("shapes", "", 3)
    items = data.val[:3]
    result = E.evaluate(Oracle(), data, items, torch.device("cpu"), E.Protocol("center-crop", 40))
    masks = torch.stack([torch.from_numpy(np.array(read(item, data)[1])) for item in items])[:, 28:68, 28:68]
    assert result["pixel_accuracy"] == pytest.approx(100 * ((masks == 0).sum() / (masks != 255).sum()).item())


# ----------------------------------------------------------------------------------------------------------------------
# boundaries


def plain_near(label, distance, image_border):
    height, width = label.shape
    near = torch.zeros(height, width, dtype=torch.bool)
    for y in range(height):
        for x in range(width):
            for j in range(y - distance, y + distance + 1):
                for i in range(x - distance, x + distance + 1):
                    inside = 0 <= j < height and 0 <= i < width
                    near[y, x] |= label[j, i] != label[y, x] if inside else image_border
    return near


@pytest.mark.parametrize("image_border", [True, False])
@pytest.mark.parametrize("distance", [1, 3])
def test_contours_match_plain_loops(distance, image_border):
    label = torch.zeros(2, 13, 17, dtype=torch.uint8)
    label[0, 3:9, 4:12], label[1, :, 9:], label[1, 6, 12] = 5, 255, 7
    near = E.near_contour(label, distance, image_border)
    assert torch.equal(near, torch.stack([plain_near(one, distance, image_border) for one in label]))


def plain_boundary_iou(prediction, label, c):
    """Cheng et al., 2021, from their definition: masks without their erosions, compared."""
    distance = max(1, round(0.02 * math.hypot(*label.shape)))
    prediction = prediction.masked_fill(label == 255, 255)
    bands = [(one == c) & plain_near((one == c).int(), distance, True) for one in (prediction, label)]
    union = (bands[0] | bands[1]).sum()
    return (100 * (bands[0] & bands[1]).sum() / union).item() if union else None


def test_boundary_iou_matches_its_definition():
    rng = torch.Generator().manual_seed(1)
    label = torch.randint(0, 3, (1, 5, 6), generator=rng).repeat_interleave(12, 1).repeat_interleave(12, 2)
    prediction = label.roll(3, 2)
    label[:, 20:23] = 255
    counts = E.boundary_confusion(prediction, label, 3)
    iou, mean = E.intersection_over_union(counts.double(), CLASSES)
    expected = [plain_boundary_iou(prediction[0], label[0], c) for c in range(3)]
    assert list(iou.values()) == pytest.approx(expected) and mean == pytest.approx(sum(expected) / 3)
    assert 0 < mean < 100
    assert E.intersection_over_union(E.boundary_confusion(label, label, 3).double(), CLASSES)[1] == 100


def test_a_shifted_contour_costs_more_at_the_boundary_than_inside():
    label = torch.zeros(1, 100, 100, dtype=torch.long)
    label[:, 20:80, 20:80] = 1
    shifted = label.roll(2, 2)
    whole = E.intersection_over_union(E.confusion_matrix(shifted, label, 2).double(), ("a", "b"))[1]
    boundary = E.intersection_over_union(E.boundary_confusion(shifted, label, 2).double(), ("a", "b"))[1]
    assert boundary < whole - 10


# ----------------------------------------------------------------------------------------------------------------------
# the report on pseudo-labels


def random_counts(seed=0, bins=50):
    rng = np.random.default_rng(seed)
    return rng.integers(0, 40, (2, bins)).astype(float)


def test_accuracy_at_equal_coverage_matches_sorted_pixels():
    counts = random_counts()
    pixels = np.concatenate([  # surest first; inside a bin right and wrong are spread evenly
        np.full(int(total), right / total) for right, total in zip(counts[1], counts.sum(0)) if total
    ])  # fmt: skip
    result = E.coverage_accuracy(counts)
    for coverage, accuracy in result["coverage"].items():
        assert accuracy == pytest.approx(pixels[: round(coverage * len(pixels))].mean(), abs=2e-3)
    running = pixels.cumsum() / np.arange(1, len(pixels) + 1)
    assert result["area"] == pytest.approx(running.mean(), abs=2e-3)
    assert E.coverage_accuracy(np.zeros((2, 5))) == {}


def test_the_report_sees_the_center_crop_alone_where_it_is_asked_for():
    data = open_dataset("shapes", "", 3)
    protocol, options = E.Protocol("center-crop", 32), refinement_options_of()
    sizes = [tuple(image.shape) for image, _ in E.images_to_score(data, data.val[:1], protocol, 0, 0, 1)]
    assert sizes == [(1, 3, 32, 32)]
    crop = E.pseudo_label_report(Stripes(), data, data.unlabeled[:1], torch.device("cpu"), 0.4, options, protocol)
    whole = E.pseudo_label_report(Stripes(), data, data.unlabeled[:1], torch.device("cpu"), 0.4, options)
    assert crop["raw"]["all"] != whole["raw"]["all"]


def test_the_report_counts_what_plain_loops_count():
    data = open_dataset("shapes", "", 3)
    items, options = data.unlabeled[:3], refinement_options_of(threshold=None)
    model, alpha = Stripes(), 0.4
    report = E.pseudo_label_report(model, data, items, torch.device("cpu"), alpha, options)
    found = {"raw": [], "refined": []}
    for item in items:
        image, mask = (torch.from_numpy(np.array(part)) for part in read(item, data))
        prob = model(E.normalize(image.permute(2, 0, 1)[None])).softmax(1)
        near = E.near_contour(mask[None], 5, image_border=False)[0]
        for name, p in (("raw", prob), ("refined", refine(prob))):
            rows = zip(confidence(p)[0][mask != 255], p.argmax(1)[0][mask != 255], mask[mask != 255], near[mask != 255])
            found[name] += [
                (conf.item(), label.item(), label.item() == truth.item(), edge.item())
                for conf, label, truth, edge in rows
            ]
    threshold = np.quantile([row[0] for row in found["raw"]], alpha)
    for name, rows in found.items():
        kept = [row for row in rows if row[0] > threshold]
        assert report[name]["kept"]["all"] == pytest.approx(len(kept) / len(rows), abs=2e-3)
        assert report[name]["correct"]["all"] == pytest.approx(np.mean([row[2] for row in kept]), abs=2e-3)
        for c, class_name in enumerate(data.classes):
            called, passed = ([row for row in part if row[1] == c] for part in (rows, kept))
            if called:
                assert report[name]["kept"][class_name] == pytest.approx(len(passed) / len(called), abs=0.02)
        for part, members in (("all", rows), ("border", [row for row in rows if row[3]])):
            members = sorted(members, key=lambda row: -row[0])
            for coverage, accuracy in report[name][part]["coverage"].items():
                surest = [row[2] for row in members[: round(coverage * len(members))]]
                assert accuracy == pytest.approx(np.mean(surest), abs=5e-3)
    assert report["raw"] != report["refined"] and "mean over all shares" in E.report_table(report)


class Stripes(torch.nn.Module):
    """Seven logits that follow the image's colors, unsure almost everywhere."""

    def forward(self, x):
        return torch.stack([x[:, i % 3] * (1 + 0.3 * i) - 0.2 * i for i in range(7)], 1)


def refinement_options_of(**changes):
    args = dict(
        refinement=True, neighborhood=3, neighbors=1, select="max", distance_weight=True, dilation=1, threshold=None, confidence="margin",
    )  # fmt: skip
    return E.refinement_options(args | changes)


def test_a_fixed_threshold_takes_the_place_of_the_quantile_in_the_report():
    data = open_dataset("shapes", "", 3)
    items, model = data.unlabeled[:2], Stripes()
    report = E.pseudo_label_report(model, data, items, torch.device("cpu"), 0.4, refinement_options_of(threshold=0.5))
    shares = []
    for item in items:
        image, mask = (torch.from_numpy(np.array(part)) for part in read(item, data))
        conf = confidence(model(E.normalize(image.permute(2, 0, 1)[None])).softmax(1))[0]
        shares.append((conf[mask != 255] > 0.5).float())
    assert report["raw"]["kept"]["all"] == pytest.approx(torch.cat(shares).mean().item(), abs=0.01)


@pytest.mark.parametrize("kind", ["margin", "max", "entropy"])
def test_doubt_is_confidence_turned_round(kind):
    prob = torch.tensor([[1.0, 0, 0], [1 / 3, 1 / 3, 1 / 3], [0.7, 0.2, 0.1]]).T.reshape(1, 3, 1, 3)
    doubts = E.doubt(confidence(prob, kind), kind, 3)[0, 0].tolist()
    assert doubts[0] == pytest.approx(0, abs=1e-6) and doubts[0] < doubts[2] < doubts[1] <= 1 + 1e-6


# ----------------------------------------------------------------------------------------------------------------------
# Figs. 4, 5 and 6


def write_metrics(folder, **changes):
    lines = []
    for step in (10, 20, 30):
        line = {
            "event": "train",
            "step": step,
            "kept": 0.7,
            "kept_raw": 0.6,
            "correct": 0.8,
            "correct_raw": 0.81,
            "tp_change": 0.01,
        }
        line |= {"fp_change": -0.02, "histogram": [0.05] * 20, "histogram_raw": [0.0] * 19 + [1.0]} | changes
        lines += [line, {"event": "val", "step": step, "miou": 50.0}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_figures_4_to_6_are_drawn_from_a_run_s_log(tmp_path):
    pytest.importorskip("matplotlib", reason="--figures needs matplotlib, which is optional")
    write_metrics(tmp_path)
    drawn = E.draw_figures(tmp_path, tmp_path)
    assert [file.name for file in drawn] == ["fig4.png", "fig5.png", "fig6.png"]
    sheets = [np.asarray(Image.open(file).convert("RGB")) for file in drawn]
    assert all(sheet.min() < 100 and sheet.shape[1] > 600 for sheet in sheets)
    write_metrics(tmp_path, kept=0.1, fp_change=0.3, histogram=[1.0] + [0.0] * 19)
    E.draw_figures(tmp_path, tmp_path)
    assert all((np.asarray(Image.open(file).convert("RGB")) != sheet).any() for file, sheet in zip(drawn, sheets))


def test_figures_without_matplotlib_or_log_get_one_sentence(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "matplotlib.figure", None)
        with pytest.raises(
            InputError, match="--figures needs matplotlib, which is not installed; pip install matplotlib"
        ):
            E.draw_figures(tmp_path, tmp_path)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", types.SimpleNamespace(Figure=None))
    with pytest.raises(InputError, match="metrics.jsonl is not there; expected the checkpoint in its run's folder"):
        E.draw_figures(tmp_path, tmp_path)
    (tmp_path / "metrics.jsonl").write_text(
        '{"event": "val", "step": 1}\n{"kept": 1}\n{"histogram": ['
    )  # and a cut line
    with pytest.raises(
        InputError, match="has no step with unlabeled images; expected a run of this version past its warm"
    ):
        E.draw_figures(tmp_path, tmp_path)
