"""What a checkpoint is worth: IoU per class and at boundaries, the quality of its pseudo-labels, pictures; masks for new images.

    python evaluate.py runs/shapes-24-fixmatch-0/last.pth
    python evaluate.py ckpt.pth --root data --json scores.json --panels panels
    python evaluate.py ckpt.pth --pseudo-labels                               # with and without refinement
    python evaluate.py ckpt.pth --figures figures                             # Figs. 4, 5 and 6 of its run
    python evaluate.py ckpt.pth --images photographs --masks predicted        # masks for images of one's own
    python evaluate.py ckpt.pth --images photographs --masks proposed --pseudo-labels   # 255 where it is unsure
    torchrun --nproc_per_node=8 evaluate.py ckpt.pth --eval-mode sliding --tta

The dataset, the classes, the network and the protocol are those that the checkpoint names.
"""

import argparse
import json
import math
import os
import signal
import sys
import traceback
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch.distributed.rendezvous import rendezvous
from torchvision.transforms.v2 import functional as VF
from torchvision.utils import draw_segmentation_masks

from data import (
    IGNORE,
    MEAN,
    READABLE,
    STD,
    InputError,
    batches,
    dead_worker,
    evaluation_loader,
    files,
    image_loader,
    normalize,
    open_dataset,
    palette,
    reported,
    save_mask,
)
from model import DeepLabV3Plus
from refine import confidence, dpa_threshold, pseudo_labels, refine

# ----------------------------------------------------------------------------------------------------------------------
# prediction

EVAL_MODES = ("original", "sliding", "center-crop")
TTA_SCALES = (0.75, 1.0, 1.25)


class Protocol(NamedTuple):
    """How images are predicted."""

    eval_mode: str = "original"  # one of EVAL_MODES; "center-crop" cuts image and truth before they get here
    crop: int = 0  # pixels, of the windows and of the center crop
    tta: bool = False  # mean over TTA_SCALES and flips
    refine: dict | None = None  # options of `refine.refine`: Sec. 4.2, refinement at inference


def windows(side, crop):
    """Where the windows along a side begin: every two thirds of a window, the last one flush with the border."""
    last = max(side - crop, 0)
    return [*range(0, last, max(1, 2 * crop // 3)), last]


def probabilities(model, image, protocol):
    """softmax(model(image)): (1,3,H,W), normalized -> (1,C,H,W); the mean of it where windows overlap."""
    if protocol.eval_mode != "sliding":
        return model(image).float().softmax(1)
    crop, total, covered = protocol.crop, None, image.new_zeros(image.shape[-2:])
    for top in windows(image.shape[-2], crop):
        for left in windows(image.shape[-1], crop):
            view = (..., slice(top, top + crop), slice(left, left + crop))
            prob = model(image[view]).float().softmax(1)
            if total is None:
                total = prob.new_zeros(*prob.shape[:2], *image.shape[-2:])
            total[view] += prob
            covered[view] += 1
    return total / covered


@torch.no_grad()
def predict(model, image, protocol):
    """Class probabilities of a uint8 image (1,3,H,W) on the model's device: (1,C,H,W)."""
    image = normalize(image)
    if protocol.tta:
        prob = 0
        for scale in TTA_SCALES:
            size = [max(1, round(side * scale)) for side in image.shape[-2:]]
            resized = F.interpolate(image, size, mode="bilinear", antialias=True)
            for flipped in (False, True):
                one = probabilities(model, resized.flip(-1) if flipped else resized, protocol)
                one = F.interpolate(one.flip(-1) if flipped else one, image.shape[-2:], mode="bilinear")
                prob = prob + one / (2 * len(TTA_SCALES))
    else:
        prob = probabilities(model, image, protocol)
    return prob if protocol.refine is None else refine(prob, **protocol.refine)


# ----------------------------------------------------------------------------------------------------------------------
# scores


def confusion_matrix(prediction, label, num_classes):
    """(C,C) counts, rows truth and columns prediction, over the pixels whose label is not 255."""
    pairs = label.long() * num_classes + prediction.long()
    pairs = pairs.masked_fill(label == IGNORE, num_classes**2).flatten()
    return torch.bincount(pairs, minlength=num_classes**2 + 1)[:-1].view(num_classes, num_classes)


def near_contour(label, distance, image_border=True):
    """(B,H,W) -> bool, True on pixels at most `distance` from a pixel of another value, in a square neighborhood.

    image_border: whether everything outside the image counts as another value.
    """
    label = label.to(torch.int16)
    near = torch.zeros_like(label, dtype=torch.bool)
    for extreme, outside in ((torch.maximum, 30000), (torch.minimum, -30000)):
        around = F.pad(label, [distance] * 4, value=outside if image_border else -outside)
        for dim in (1, 2):  # the extreme of a window, from two overlapping ones of half its size
            width = 1
            while width < 2 * distance + 1:
                step = min(width, 2 * distance + 1 - width)
                length = around.shape[dim] - step
                around = extreme(around.narrow(dim, 0, length), around.narrow(dim, step, length))
                width += step
        near |= around != label
    return near


def boundary_confusion(prediction, label, num_classes):
    """Boundary IoU's counts (Cheng et al., 2021), (C+1,C+1): like `confusion_matrix`, class C standing for interiors.

    A pixel keeps its class where it is within 2% of the image's diagonal of the contour of its region. Ignored pixels
    are a region of their own in truth and prediction, so that a contour under PASCAL's 255 border costs nothing.
    """
    distance = max(1, round(0.02 * math.hypot(*label.shape[-2:])))
    prediction = prediction.masked_fill(label == IGNORE, IGNORE)
    inside = [labels.long().masked_fill(~near_contour(labels, distance), num_classes) for labels in (prediction, label)]
    return confusion_matrix(inside[0], inside[1].masked_fill(label == IGNORE, IGNORE), num_classes + 1)


def intersection_over_union(confusion, classes):
    """({class: 0-100, or None}, their mean or None): TP / (TP + FP + FN) of the first classes of a confusion matrix.

    A class in neither truth nor prediction is None and counts nowhere.
    """
    union = confusion.sum(0) + confusion.sum(1) - confusion.diag()
    iou = (100 * confusion.diag() / union)[: len(classes)].tolist()
    known = [value for value in iou if not math.isnan(value)]
    iou = {name: None if math.isnan(value) else value for name, value in zip(classes, iou)}
    return iou, sum(known) / len(known) if known else None


def scores(confusion, boundaries, classes):
    """{"miou", "pixel_accuracy", "boundary_miou": 0-100, "iou", "boundary_iou": {class: 0-100, or None}} from the counts."""
    confusion, boundaries = confusion.double().cpu(), boundaries.double().cpu()
    iou, miou = intersection_over_union(confusion, classes)
    boundary_iou, boundary_miou = intersection_over_union(boundaries, classes)
    total = confusion.sum()
    accuracy = (100 * confusion.diag().sum() / total).item() if total else None
    return {
        "miou": miou, "pixel_accuracy": accuracy, "boundary_miou": boundary_miou, "iou": iou, "boundary_iou": boundary_iou,
    }  # fmt: skip


def images_to_score(data, items, protocol, workers, rank, world):
    """(image, truth) of this process's items as `evaluation_loader` gives them; of the center crop, their center."""
    for image, label in batches(evaluation_loader(data, items, workers, rank, world)):
        if protocol.eval_mode == "center-crop":
            top, left = (max(side - protocol.crop, 0) // 2 for side in label.shape[-2:])
            view = (..., slice(top, top + protocol.crop), slice(left, left + protocol.crop))
            image, label = image[view], label[view]
        yield image, label


@torch.no_grad()
def evaluate(model, data, items, device, protocol=Protocol(), workers=0, rank=0, world=1):
    """The scores of a model in evaluation mode on items, summed over all processes."""
    classes = len(data.classes)
    confusion = torch.zeros(classes, classes, dtype=torch.long, device=device)
    boundaries = torch.zeros(classes + 1, classes + 1, dtype=torch.long, device=device)
    for image, label in images_to_score(data, items, protocol, workers, rank, world):
        label = label.to(device)
        prediction = predict(model, image.to(device), protocol).argmax(1)
        confusion += confusion_matrix(prediction, label, classes)
        boundaries += boundary_confusion(prediction, label, classes)
    if world > 1:
        dist.all_reduce(confusion)
        dist.all_reduce(boundaries)
    return scores(confusion, boundaries, data.classes)


def table(result):
    """The scores as lines of text: IoU, and IoU at boundaries."""

    def row(name, *values):
        shown = ("absent" if value is None else f"{value:6.2f}" for value in values)
        return f"{name:{width}}  {'    '.join(f'{value:>8}' for value in shown)}"

    width = max(map(len, [*result["iou"], "pixel accuracy"]))
    rows = [f"{'':{width}}       IoU    boundary"]
    rows += [row(name, value, result["boundary_iou"][name]) for name, value in result["iou"].items()]
    rows += [row("mean", result["miou"], result["boundary_miou"]), row("pixel accuracy", result["pixel_accuracy"])]
    return "\n".join(rows)


# ----------------------------------------------------------------------------------------------------------------------
# pseudo-labels: Figs. 4, 5 and 6, and what refinement is worth


def doubt(conf, kind, num_classes):
    """Confidence turned round, 0 (sure) to 1: one minus margin or maximum, or entropy by its largest value."""
    # Refined probabilities need not sum to 1, so that their entropy may lie outside its range.
    return (-conf / math.log(num_classes) if kind == "entropy" else 1 - conf).clamp(0, 1)


def pseudo_label_figures(prob, pseudo, batch, options):
    """Figs. 4-6 for one batch, summed over all processes: shares of pixels, 0..1, with and without refinement.

    kept, kept_raw: of the valid pixels, those given a label. correct, correct_raw: of the labels whose truth is known,
    those that are right. tp_change, fp_change: right and wrong labels added by refinement, of the pixels of known truth.
    histogram, histogram_raw: of the valid pixels, those in each twentieth of the confidence's range.
    """
    raw = pseudo_labels(
        prob, None, valid=batch["valid"], **options | {"refinement": False, "threshold": pseudo.threshold}
    )
    known = batch["truth"] != IGNORE
    counts = [torch.stack([batch["valid"].sum(), known.sum()])]
    for labels in (raw, pseudo):
        judged = labels.keep & known
        counts += [torch.stack([labels.keep.sum(), judged.sum(), (judged & (labels.label == batch["truth"])).sum()])]
    for labels in (raw, pseudo):
        sure = 1 - doubt(labels.confidence[batch["valid"]], options.get("kind", "margin"), prob.shape[1])
        counts.append(torch.bincount((sure * 20).long().clamp(0, 19), minlength=20))
    counts = torch.cat(counts)
    if dist.is_initialized():
        dist.all_reduce(counts)
    valid, known, kept_raw, judged_raw, right_raw, kept, judged, right, *histograms = counts.tolist()
    shares = [round(count / max(valid, 1), 5) for count in histograms]
    figures = {"kept": kept / max(valid, 1), "kept_raw": kept_raw / max(valid, 1), "threshold": pseudo.threshold.item()}
    figures |= {"histogram_raw": shares[:20], "histogram": shares[20:]}
    if known:
        figures |= {
            "correct": right / max(judged, 1),
            "correct_raw": right_raw / max(judged_raw, 1),
            "tp_change": (right - right_raw) / known,
            "fp_change": ((judged - right) - (judged_raw - right_raw)) / known,
        }
    return figures


COVERAGES = (0.2, 0.4, 0.6, 0.8, 0.9)
BINS = 2**15  # of doubt, by the upper bits of the float: relative width 1/256, so that margins of 0.9999 are told apart


@torch.no_grad()
def pseudo_label_report(model, data, items, device, alpha, options, protocol=Protocol(), workers=0, rank=0, world=1):
    """Quantity and quality of the labels that a teacher gives items of known truth, raw and refined.

    alpha: share of the raw confidences below the threshold (the fixed one, if options hold it); options: of `pseudo_labels`.
    Returns {"raw" and "refined": {"kept": {class: share of the pixels called so that pass, or None}, "correct": {class:
    share of those that are right, or None}, "all" and "border": {"coverage": {share of pixels: accuracy of the surest},
    "area": mean accuracy over all coverages}}}; classes include "all". "border": pixels at most 5 from a contour.
    """
    classes, kind = len(data.classes), options["kind"]
    counts = torch.zeros(2, classes * 4 * BINS, dtype=torch.long, device=device)  # by class, right, border, doubt
    for image, truth in images_to_score(data, items, protocol, workers, rank, world):
        truth = truth.to(device)
        known, border = truth != IGNORE, near_contour(truth, 5, image_border=False)
        prob = predict(model, image.to(device), protocol)
        for i, p in enumerate((prob, refine(prob, **options_of_refine(options)))):
            label = p.argmax(1)
            bits = doubt(confidence(p, kind), kind, classes).view(torch.int32) >> 15
            place = ((label * 2 + (label == truth)) * 2 + border) * BINS + bits
            counts[i] += torch.bincount(place[known], minlength=counts.shape[1])
    if world > 1:
        dist.all_reduce(counts)
    counts = counts.view(2, classes, 2, 2, BINS).cpu().double().numpy()
    passing = np.zeros(BINS)  # share of each bin's pixels that pass
    if options["threshold"] is None:
        raw = counts[0].sum((0, 1, 2))
        passing = (((1 - alpha) * raw.sum() - (raw.cumsum() - raw)) / raw.clip(1)).clip(0, 1)
    else:
        least = doubt(torch.tensor(float(options["threshold"])), kind, classes)
        passing[: int(least.view(torch.int32) >> 15)] = 1
    report = {}
    for name, one in zip(("raw", "refined"), counts):
        by_class = dict(zip(data.classes, one.sum(2))) | {"all": one.sum((0, 2))}  # (wrong or right, BINS) each
        kept = {c: part @ passing for c, part in by_class.items()}  # wrong and right
        report[name] = {
            "kept": {c: share(kept[c].sum(), part.sum()) for c, part in by_class.items()},
            "correct": {c: share(kept[c][1], kept[c].sum()) for c in by_class},
            "all": coverage_accuracy(by_class["all"]),
            "border": coverage_accuracy(one[:, :, 1].sum(0)),
        }
    return report


def share(part, whole):
    """part / whole, or None of nothing."""
    return float(part / whole) if whole else None


def coverage_accuracy(counts):
    """Accuracy of the surest pixels, by the share of pixels: {"coverage": {share: 0..1}, "area": 0..1}; {} of nothing.

    counts (2,BINS): wrong and right pixels by doubt. Inside a bin pixels count as equally sure.
    """
    if not counts.sum():
        return {}
    covered, right = (np.concatenate([[0], part.cumsum()]) / counts.sum() for part in (counts.sum(0), counts[1]))
    grid = (np.arange(1000) + 0.5) / 1000
    at = {coverage: float(np.interp(coverage, covered, right) / coverage) for coverage in COVERAGES}
    return {"coverage": at, "area": float((np.interp(grid, covered, right) / grid).mean())}


def report_table(report):
    """The report as lines of text, in percent."""

    def row(name, raw, refined):
        shown = ("   none" if value is None else f"{100 * value:7.2f}" for value in (raw, refined))
        return f"{name:26}{'    '.join(shown)}"

    raw, refined = report["raw"], report["refined"]
    rows = []
    for part, title in (("kept", "kept, of the pixels called"), ("correct", "right, of those kept")):
        rows += [f"{title:26}    raw    refined"] + [row(f"  {c}", raw[part][c], refined[part][c]) for c in raw[part]]
    for part, title in (("all", "right, of the surest"), ("border", "the same near contours")):
        if raw[part]:
            rows += [f"{title:26}    raw    refined"]
            rows += [row(f"  {c:.0%}", raw[part]["coverage"][c], refined[part]["coverage"][c]) for c in COVERAGES]
            rows += [row("  mean over all shares", raw[part]["area"], refined[part]["area"])]
    return "\n".join(rows)


def draw_figures(run, folder):
    """Figs. 4, 5 and 6 from a run's metrics.jsonl, as PNG. Returns the files. Raises InputError."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise InputError("--figures needs matplotlib, which is not installed; pip install matplotlib") from error
    metrics = Path(run) / "metrics.jsonl"
    if not metrics.is_file():
        raise InputError(f"{metrics} is not there; expected the checkpoint in its run's folder")
    whole = metrics.read_text().rpartition("\n")[0].splitlines()  # a kill may have cut the last line
    lines = [line for line in map(json.loads, whole) if "histogram" in line]
    if not lines:
        raise InputError(
            f"{metrics} has no step with unlabeled images; expected a run of this version past its warm-up"
        )

    def curves(name, *panels):
        """One picture: panels of (title, {legend: key of metrics.jsonl}) over steps."""
        figure = Figure(figsize=(5 * len(panels), 3.6), layout="constrained")
        for axes, (title, keys) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels):
            for legend, key in keys.items():
                there = [line for line in lines if key in line]
                axes.plot([line["step"] for line in there], [100 * line[key] for line in there], label=legend)
            axes.set(title=title, xlabel="step", ylabel="% of pixels")
            axes.legend()
        figure.savefig(folder / name, dpi=150)
        return folder / name

    drawn = [curves("fig4.png", ("given a label", {"S4MC": "kept", "without refinement": "kept_raw"}),
                    ("right, of those", {"S4MC": "correct", "without refinement": "correct_raw"}))]  # fmt: skip
    added = {"true positives": "tp_change", "false positives": "fp_change"}
    drawn.append(curves("fig5.png", ("added by refinement", added)))
    figure = Figure(figsize=(12, 3.6), layout="constrained")
    for axes, place in zip(figure.subplots(1, 3, sharey=True), (0, len(lines) // 2, -1)):
        for legend, key in (("refined", "histogram"), ("raw", "histogram_raw")):
            axes.stairs([100 * value for value in lines[place][key]], np.linspace(0, 1, 21), label=legend)
        axes.set(title=f"step {lines[place]['step']}", xlabel="confidence", yscale="log")
        axes.legend()
    figure.supylabel("% of pixels")
    figure.savefig(folder / "fig6.png", dpi=150)
    return [*drawn, folder / "fig6.png"]


# ----------------------------------------------------------------------------------------------------------------------
# panels: Figs. 1, 3 and 7


def overlay(image, label, dim=3, alpha=0.8):
    """The image (3,H,W) uint8, its values divided by dim, under the label's colors; 255 shows the image alone."""
    colors, image = palette(), image // dim
    present = [c for c in label.unique().tolist() if c != IGNORE]
    if not present:
        return image
    masks = torch.stack([label == c for c in present])
    return draw_segmentation_masks(image, masks, alpha=alpha, colors=[tuple(colors[c].tolist()) for c in present])


def heat(conf):
    """(H,W) in 0..1 -> (3,H,W) uint8: black, red, yellow, white as the model grows surer."""
    return (torch.stack([3 * conf, 3 * conf - 1, 3 * conf - 2]).clamp(0, 1) * 255).to(torch.uint8)


TITLES = (
    "image", "truth", "teacher", "confidence", "confidence, refined", "labels without refinement", "labels, refined",
)  # fmt: skip


@torch.no_grad()
def panel(model, data, items, device, alpha, options):
    """A sheet with one row per item: image, truth, prediction, confidence and pseudo-labels without and with refinement.

    options: the keyword arguments of `refine.pseudo_labels` that the run trains with. The threshold is the alpha-quantile
    of the row's own pixels, unless options hold a fixed one; a run's alpha0 makes its panels comparable over time, where
    its own alpha falls to 0. Where a pixel has no pseudo-label the image shows, dimmed. Returns a PIL image.
    """
    fixed = options["threshold"]
    passing = f"the {alpha:.0%} quantile of the raw confidence, image by image" if fixed is None else f"{fixed}"
    rows = []
    for image, truth in evaluation_loader(data, items):
        prob = model(normalize(image.to(device))).float().softmax(1)
        threshold = fixed
        if threshold is None:  # not dpa_threshold, which would wait for the other processes
            conf = confidence(prob, options["kind"]).flatten()
            threshold = conf.kthvalue(1 + int(alpha * (len(conf) - 1))).values
        raw, refined = (
            pseudo_labels(prob, None, **options | {"refinement": on, "threshold": threshold}) for on in (False, True)
        )
        sure = [1 - doubt(pseudo.confidence[0].cpu(), options["kind"], len(data.classes)) for pseudo in (raw, refined)]
        labels = [truth[0], *(label[0].cpu() for label in (prob.argmax(1), raw.label, refined.label))]
        truth, teacher, *kept = (overlay(image[0], label) for label in labels)
        rows.append([image[0], truth, teacher, *map(heat, sure), *kept])
    return sheet(rows, data.classes, f"labels: confidence above {passing}")


def sheet(rows, classes, note, width=200):
    """Rows of tiles (3,H,W) uint8 under TITLES; below: the classes' colors, the scale of the confidence, the note. A PIL image."""
    font, gap, line = ImageFont.load_default(13), 4, 20  # pixels
    rows = [[VF.to_pil_image(tile) for tile in row] for row in rows]
    heights = [round(width * row[0].height / row[0].width) for row in rows]
    page = Image.new("RGB", (len(TITLES) * (width + gap) + gap, 1), "white")
    entries, x, y = [], gap, line + sum(heights) + len(rows) * gap + gap
    for name, color in zip(
        (*classes, "no label: the image, dimmed"), [*palette()[: len(classes)].tolist(), [85, 85, 85]]
    ):
        length = 20 + round(font.getlength(name)) + 3 * gap
        if x + length > page.width:
            x, y = gap, y + line
        entries.append((x, y, name, tuple(color)))
        x += length
    page = page.resize((page.width, y + 2 * line + gap))
    draw = ImageDraw.Draw(page)
    for column, title in enumerate(TITLES):
        draw.text((gap + column * (width + gap), 2), title, "black", font)
    top = line
    for row, height in zip(rows, heights):
        for column, tile in enumerate(row):
            page.paste(tile.resize((width, height), Image.Resampling.BOX), (gap + column * (width + gap), top))
        top += height + gap
    for x, y, name, color in entries:
        draw.rectangle((x, y + 3, x + 14, y + 15), color, "black")
        draw.text((x + 20, y), name, "black", font)
    scale = VF.to_pil_image(heat(torch.linspace(0, 1, width).expand(12, width)))
    page.paste(scale, (gap + 30, y + line + 4))
    draw.text((gap, y + line), "0", "black", font)
    draw.text((gap + 36 + width, y + line), f"1  confidence: unsure to sure;  {note}", "black", font)
    return page


def panel_items(data, count=4):
    """Unlabeled images, evenly spaced, where their truth is known; else validation images."""
    whole = [[item for item in items if None not in (item.image, item.mask)] for items in (data.unlabeled, data.val)]
    items = whole[0] or whole[1]
    return [items[i * len(items) // count] for i in range(min(count, len(items)))]


# ----------------------------------------------------------------------------------------------------------------------
# masks for images of one's own

BLOCK, MARGIN = 1024, 128  # pixels; larger images are predicted in blocks, each with that much of what surrounds it


def blocks(height, width):
    """[(window of the image, what to keep of it)] that cover an image once, so that memory does not grow with the image."""

    def cuts(side):
        edges = [round(i * side / -(-side // BLOCK)) for i in range(-(-side // BLOCK) + 1)]
        for low, high in zip(edges, edges[1:]):
            first = max(0, low - MARGIN)
            yield slice(first, min(side, high + MARGIN)), slice(low - first, high - first)

    return [((..., *outer), (..., *inner)) for outer, inner in (zip(y, x) for y in cuts(height) for x in cuts(width))]


def sampled_threshold(model, paths, device, protocol, alpha, kind, workers, rank, world):
    """The alpha-quantile of the raw confidences of at most 100 of the images {id: path}, evenly spaced."""
    chosen = list(paths.items())[:: -(-len(paths) // 100)]
    samples = [torch.zeros(0, device=device)]
    for id, image in batches(image_loader(dict(chosen[rank::world]), workers)):
        if not isinstance(image, str):
            for window, keep in blocks(*image.shape[-2:]):
                conf = confidence(predict(model, image[window][None].to(device), protocol)[keep], kind).flatten()
                samples.append(conf[:: max(1, len(conf) // 100_000)])
    return dpa_threshold(torch.cat(samples), alpha)


@torch.no_grad()
def predicted(model, image, device, protocol, options):
    """(mask (H,W), overlay (3,H,W), confidence (H,W)) of an image (3,H,W), all uint8; confidence 0..255.

    options: of `pseudo_labels`, for a mask that is 255 where the pixel has no pseudo-label; None for the prediction.
    """
    (mask, sure), picture = torch.empty(2, *image.shape[-2:], dtype=torch.uint8), torch.empty_like(image)
    for window, keep in blocks(*image.shape[-2:]):
        prob = predict(model, image[window][None].to(device), protocol)
        kind, target = options["kind"] if options else "margin", mask[window][keep]
        if options:
            pseudo = pseudo_labels(prob, None, **options)
            label, conf = pseudo.label, pseudo.confidence
        else:
            label, conf = prob.argmax(1), confidence(prob)
        target.copy_(label[0][keep])
        picture[window][keep] = overlay(image[window][keep], target, 1, 0.5)
        sure[window][keep].copy_(255 * (1 - doubt(conf[0][keep], kind, prob.shape[1])))
    return mask, picture, sure


def predict_folder(model, paths, out, device, protocol, options, colors, with_confidence, workers, rank, world):
    """Writes a mask for each of the images {id: path}: out/<id>.png; overlays and confidence maps in folders beside it.

    Masks that are there already stay. Returns (how many were written, how many stayed, [what is wrong with a file]).
    """
    mine = dict(list(paths.items())[rank::world])
    missing = {id: path for id, path in mine.items() if not (out / f"{id}.png").exists()}
    wrong, beside = [], {kind: out.with_name(f"{out.name}-{kind}") for kind in ("overlays", "confidence")}
    loader = batches(image_loader(missing, workers))
    for id, image in reported(loader, len(missing), "images") if rank == 0 else loader:
        if isinstance(image, str):
            wrong.append(image)
            continue
        mask, *pictures = predicted(model, image, device, protocol, options)
        for kind, picture in zip(("overlays", "confidence")[: 1 + with_confidence], pictures):
            (beside[kind] / id).parent.mkdir(parents=True, exist_ok=True)
            VF.to_pil_image(picture).save(beside[kind] / f"{id}.png")
        save_mask(mask.numpy(), out / f"{id}.png", colors)  # last, because it says that this image is done
    counts = torch.tensor([len(missing) - len(wrong), len(mine) - len(missing)], device=device)
    if world > 1:
        dist.all_reduce(counts)
    return *counts.tolist(), wrong


# ----------------------------------------------------------------------------------------------------------------------
# checkpoints


RUN_ARGUMENTS = {  # what is read of checkpoint["args"]
    "dataset", "root", "splits", "crop", "backbone", "output_stride", "eval_mode", "alpha0", "confidence", "threshold", "refinement",
    "neighborhood", "neighbors", "select", "distance_weight", "dilation",
}  # fmt: skip


PREPROCESSING = {"mean": list(MEAN), "std": list(STD)}  # see `data.normalize`; travels in the checkpoint


def load_checkpoint(path):
    """The dictionary that train.py saved. Nothing in the file is executed. Raises InputError."""
    if not Path(path).is_file():
        found = "is a folder" if Path(path).is_dir() else "is not there"
        raise InputError(f"checkpoint {path} {found}; expected the last.pth or best.pth of a run")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises many kinds, all of them the file's fault
        raise InputError(
            f"checkpoint {path} could not be read ({type(error).__name__}); it is truncated, or not of train.py"
        ) from error
    lacking = {
        "step",
        "args",
        "classes",
        "labeled",
        "unlabeled",
        "val",
        "palette",
        "preprocessing",
        "student",
        "teacher",
    } - set(checkpoint if isinstance(checkpoint, dict) else ())
    lacking = lacking or RUN_ARGUMENTS - set(checkpoint["args"])
    if lacking:
        raise InputError(
            f"checkpoint {path} lacks {', '.join(sorted(lacking))}; expected one that this version of train.py saved"
        )
    if checkpoint["preprocessing"] != PREPROCESSING:
        raise InputError(f"checkpoint {path} expects {checkpoint['preprocessing']}; this version gives {PREPROCESSING}")
    return checkpoint


def load_model(checkpoint, path, which="teacher"):
    """The checkpoint's teacher or student, in evaluation mode on the CPU. Raises InputError where its weights do not fit."""
    args, classes = checkpoint["args"], checkpoint["classes"]
    model = DeepLabV3Plus(args["backbone"], len(classes), args["output_stride"])
    try:
        model.load_state_dict(checkpoint[which])
    except RuntimeError as error:
        raise InputError(
            f"the weights in {path} do not fit a {args['backbone']} with {len(classes)} classes "
            f"({str(error).splitlines()[-1].strip()}); expected the classes and weights of one run"
        ) from error
    return model.eval()


def items_to_score(data, part, root):
    """Items of "val", "test", "train" or "unlabeled" that have image and mask. Raises InputError where too few do."""
    items = data.labeled + data.unlabeled if part == "train" else getattr(data, part)
    whole = [item for item in items if None not in (item.image, item.mask)]
    if not items:
        instead = "a run that left some unlabeled" if part == "unlabeled" else "another --split, val or train"
        raise InputError(f"{data.name} has no {part} images; expected {instead}")
    if not whole or (part in ("val", "test") and len(whole) < len(items)):
        raise InputError(
            f"{len(whole)} of the {len(items)} {part} images of {data.name} have image and mask under {root}; expected "
            f"{'all' if part in ('val', 'test') else 'some'} of them"
            f"{''.join(f', without: {item.id}' for item in [item for item in items if item not in whole][:3])}"
        )
    return whole


def options_of_refine(options):
    """Of the arguments of `pseudo_labels`, those of `refine.refine`."""
    return {name: value for name, value in options.items() if name not in ("refinement", "threshold", "kind")}


def refinement_options(args, prior=None):
    """The arguments of `refine.pseudo_labels` that a run's arguments (a dictionary) mean."""
    same = ("refinement", "neighborhood", "neighbors", "select", "distance_weight", "dilation", "threshold")
    return {name: args[name] for name in same} | {"kind": args["confidence"], "prior": prior}


# ----------------------------------------------------------------------------------------------------------------------
# processes


def start_processes(wanted):
    """Joins the processes of torchrun, where it started this one: (rank, world, device). wanted: auto, cpu or cuda."""
    rank, world, local = (
        int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0))
    )
    if wanted == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda, but PyTorch sees no GPU; use --device cpu, or a CUDA build and driver")
    device = torch.device("cpu")
    if wanted != "cpu" and torch.cuda.is_available():
        if local >= torch.cuda.device_count():
            raise InputError(
                f"process {local} of this machine has no GPU of its own; start at most {torch.cuda.device_count()}, or use --device cpu"
            )
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    if world > 1:
        # Within one machine torchrun --max-restarts keeps its store, and in it the addresses of processes that are gone.
        alone = os.environ.get("GROUP_WORLD_SIZE") == "1"
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT") if alone else None
        store = dist.PrefixStore(f"attempt {attempt}", next(rendezvous("env://"))[0])
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", store=store, rank=rank, world_size=world)
    return rank, world, device


def stop_on_input_error(main):
    """Runs main; what the user can mend, also what stopped a loader's worker, ends the program with its sentence alone."""
    end = None
    try:
        main()
    except SystemExit as error:
        end = error.code
    except InputError as error:
        end = str(error).strip().splitlines()[-1].removeprefix("data.InputError: ")
    except OSError as error:
        end = str(error)
    except KeyboardInterrupt:
        end = 128 + signal.SIGINT
    except RuntimeError as error:
        end = dead_worker(error) or traceback.format_exc()
    if end and sys.stdout.isatty():
        print()  # below the live line
    if isinstance(end, str):
        print(f"{Path(sys.argv[0]).name}: {end}", file=sys.stderr)
        end = 1
    if dist.is_initialized():  # after the traceback is gone: gloo hangs where the group goes before what uses it
        if end and dist.get_backend() == "nccl":  # its teardown would wait for processes that wait for this one
            sys.stdout.flush()
            os._exit(end)
        dist.destroy_process_group()
    sys.exit(end)


def number(kind, low, high=math.inf, above=False):
    """An argparse type: a number from low (or above it) to high."""

    def parse(text):
        value = kind(text)
        if not (low < value if above else low <= value) or not value <= high:
            limit = f"{'more than' if above else 'at least'} {low}"
            limit += f" and at most {high}" if high < math.inf else ""
            raise argparse.ArgumentTypeError(f"{text} is out of range; expected {limit}")
        return value

    parse.__name__ = kind.__name__
    return parse


def parse_args(argv=None):
    """The command line. What is None here is as in the run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("checkpoint", help="last.pth or best.pth of a run")
    add("--root", help="folder of the dataset; default: the one of the run")
    add("--splits", help="folder of published lists; default: the run's")
    add("--split", choices=("val", "test", "train"), default="val", help="the images to score; default: val")
    add(
        "--eval-mode",
        choices=EVAL_MODES,
        help="how images are predicted; default: the run's way, of new images: original",
    )
    add("--crop", type=number(int, 1), help="side of the windows or the center crop, pixels; default: the run's")
    add("--tta", action="store_true", help="mean over flips and the scales 0.75, 1 and 1.25")
    add("--refine", action="store_true", help="refine the prediction, Sec. 4.2, with the run's options")
    add("--student", action="store_true", help="the student instead of the teacher")
    add("--pseudo-labels", action="store_true", help="report on the pseudo-labels of the unlabeled images instead")
    add("--images", metavar="DIR", help="predict the images in and below this folder instead, into --masks")
    add("--masks", metavar="OUT", help="where they go, and OUT-overlays; with --pseudo-labels: 255 where unsure")
    add("--confidence", action="store_true", help="with --images: also maps of the confidence, to OUT-confidence")
    add("--threshold", type=float, help="of --images --pseudo-labels; default: the run's, or their own quantile")
    add("--figures", metavar="DIR", help="draw Figs. 4, 5 and 6 from the run's log there instead; needs matplotlib")
    add("--panels", metavar="DIR", help="also draw panels of unlabeled images there, as Figs. 1, 3 and 7")
    add("--json", metavar="FILE", help="also write the numbers there")
    add("--workers", type=number(int, 0), default=0, help="loader processes of each process; default: 0")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: the GPU where there is one")
    args = parser.parse_args(argv)
    if args.refine and args.pseudo_labels:
        parser.error("--pseudo-labels compares with and without refinement already; expected it without --refine")
    if args.images and args.eval_mode == "center-crop":
        parser.error("center-crop leaves most of an image out; expected original or sliding for new images")
    if bool(args.images) != bool(args.masks):
        parser.error("--images and --masks belong together: what to predict, and where the masks go")
    if not args.images and (args.confidence or args.threshold is not None):
        parser.error("--confidence and --threshold are for new images; expected --images and --masks beside them")
    if args.threshold is not None and not args.pseudo_labels:
        parser.error("--threshold says which pixels get a pseudo-label; expected --pseudo-labels beside it")
    if args.figures and (args.json or args.panels or args.pseudo_labels):
        parser.error("--figures draws what the run logged; expected it without --json, --panels and --pseudo-labels")
    if args.images and (args.json or args.panels or args.figures):
        parser.error("new images have no truth to score; expected --images without --json, --panels and --figures")
    return args


def set_up(args, checkpoint, eval_mode):
    """(network, options of `pseudo_labels`, protocol, rank, world, device) that the command line and the run mean."""
    rank, world, device = start_processes(args.device)
    model = load_model(checkpoint, args.checkpoint, "student" if args.student else "teacher")
    options = refinement_options(checkpoint["args"], checkpoint.get("prior"))
    at_inference = options_of_refine(options) if args.refine else None
    protocol = Protocol(args.eval_mode or eval_mode, args.crop or checkpoint["args"]["crop"], args.tta, at_inference)
    return model.to(device, memory_format=torch.channels_last), options, protocol, rank, world, device


def predict_images(args, checkpoint):
    """--images and --masks: needs nothing but the checkpoint. Raises InputError that names each file it could not read."""
    folder, out, run = Path(args.images), Path(args.masks), checkpoint["args"]
    paths = files(folder, READABLE, nested=True)
    if not paths:
        raise InputError(f"--images {folder} holds no image; expected a folder with images in it or below it")
    if out.resolve().is_relative_to(folder.resolve()):
        raise InputError(
            f"--masks {out} lies in --images {folder}, where masks would be taken for images; expected another folder"
        )
    model, options, protocol, rank, world, device = set_up(args, checkpoint, "original")
    sharing = (args.workers, rank, world)
    if args.pseudo_labels:
        if args.threshold is not None:
            options["threshold"] = args.threshold
        if options["threshold"] is None:
            alpha, kind = run["alpha0"], options["kind"]
            options["threshold"] = sampled_threshold(model, paths, device, protocol, alpha, kind, *sharing).item()
        if rank == 0:
            limit = f"{options['threshold']:.4f}"
            print(f"pixels whose refined confidence is above {limit} get a label, the others 255; another: --threshold")
    options, colors = options if args.pseudo_labels else None, checkpoint["palette"].numpy()
    written, stayed, wrong = predict_folder(
        model, paths, out, device, protocol, options, colors, args.confidence, *sharing
    )
    if rank == 0:
        print(
            f"{written} masks written to {out}, 0 to {len(checkpoint['classes']) - 1} for {', '.join(checkpoint['classes'])}"
        )
        left_out = [
            path for path in sorted(folder.rglob("*")) if path.is_file() and path.suffix.lower() not in READABLE
        ]
        if left_out:
            print(f"{len(left_out)} files have no suffix of an image and are left out, first {left_out[0]}")
        if stayed:
            print(f"{stayed} masks were in {out} already and stay as they are; another --masks for new ones")
    if wrong:
        print("\n".join(wrong), file=sys.stderr)
        raise InputError(f"{len(wrong)} images could not be read and have no mask; each is named above")


def main(argv=None):
    """Scores, report or figures of a checkpoint."""
    args = parse_args(argv)
    checkpoint = load_checkpoint(args.checkpoint)
    run, step = checkpoint["args"], checkpoint["step"]
    for folder in (args.panels, args.figures, args.json and Path(args.json).parent):
        if folder:
            Path(folder).mkdir(parents=True, exist_ok=True)
    if args.figures:
        for file in draw_figures(Path(args.checkpoint).parent, Path(args.figures)):
            print(f"wrote {file}")
        return
    if args.images:
        return predict_images(args, checkpoint)
    data = open_dataset(
        run["dataset"], args.root or run["root"], checkpoint["labeled"], args.splits or run["splits"], use=(),
        val=None if args.splits else checkpoint["val"],
    )  # fmt: skip
    if list(data.classes) != list(checkpoint["classes"]):
        raise InputError(
            f"checkpoint {args.checkpoint} predicts {len(checkpoint['classes'])} classes, {data.name} has "
            f"{len(data.classes)}; expected the same classes in the same order"
        )
    part, network = "unlabeled" if args.pseudo_labels else args.split, "student" if args.student else "teacher"
    items = items_to_score(data, part, args.root or run["root"])
    model, options, protocol, rank, world, device = set_up(args, checkpoint, run["eval_mode"])
    if args.pseudo_labels:
        sharing = (protocol, args.workers, rank, world)
        result = pseudo_label_report(model, data, items, device, run["alpha0"], options, *sharing)
        quantile = f"the {run['alpha0']:.0%} quantile of the raw confidences"
        fixed = options["threshold"]
        text = f"threshold: {quantile if fixed is None else fixed}\n{report_table(result)}"
    else:
        result = evaluate(model, data, items, device, protocol, args.workers, rank, world)
        text = table(result)
    if rank != 0:
        return
    about = {"checkpoint": str(args.checkpoint), "step": step, "network": network, "dataset": data.name, "split": part}
    about |= {"images": len(items)} | protocol._asdict() | {"refine": args.refine}
    print(", ".join(f"{name} {value}" for name, value in about.items()) + f"\n{text}")
    if args.json:
        Path(args.json).write_text(json.dumps(result | about, indent=2) + "\n")
    if args.panels:
        file, shown = Path(args.panels) / f"step-{step:06d}.png", panel_items(data)
        if not shown:
            raise InputError(f"no unlabeled or validation image of {data.name} has image and mask, so no panel")
        panel(model, data, shown, device, run["alpha0"], options).save(file)
        print(f"wrote {file}")


if __name__ == "__main__":
    stop_on_input_error(main)
