"""Scores of a checkpoint: IoU per class and at boundaries, by the usual protocols; quality of pseudo-labels; panels.

    python evaluate.py runs/shapes-24-s4mc-fixmatch-0/last.pth
    python evaluate.py ckpt.pth --root data --json scores.json --panels panels
    python evaluate.py ckpt.pth --pseudo-labels                               # with and without refinement
    torchrun --nproc_per_node=8 evaluate.py ckpt.pth --eval-mode sliding --tta

The dataset, the classes, the network and the protocol are those that the checkpoint names.
"""

import argparse
import contextlib
import itertools
import json
import math
import os
import signal
import sys
import traceback
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torchvision.transforms.v2 import functional as VF
from torchvision.utils import draw_segmentation_masks, make_grid

from data import IGNORE, InputError, end_workers, evaluation_loader, normalize, open_dataset, palette, rank_and_world
from data import whole_image
from model import all_reduce, load_checkpoint, load_network, start_processes
from refine import confidence, dpa_threshold, pseudo_labels, refine

# ----------------------------------------------------------------------------------------------------------------------
# prediction

EVAL_MODES = ("original", "sliding", "center-crop")
TTA_SCALES = (0.75, 1.0, 1.25)


class Protocol(NamedTuple):
    """How images are predicted."""

    eval_mode: str = "original"  # one of EVAL_MODES; "center-crop" cuts image and mask before they get here
    crop: int = 0  # side of the windows or of the center crop, pixels
    tta: bool = False  # mean over TTA_SCALES and flips
    refine: dict | None = None  # options of `refine.refine`: Sec. 4.2, refinement at inference
    bilateral: bool = False  # [ours] mean with the mirrored image, then the filter `bilateral`


def windows(side, crop):
    """Return where the windows along a side begin: every two thirds of a window, the last one at the border."""
    last = max(side - crop, 0)
    step = max(1, 2 * crop // 3)
    return [*range(0, last, step), last]


def probabilities(network, image, protocol):
    """Return softmax(network(image)): (1,3,H,W), normalized -> (1,C,H,W); its mean where windows overlap."""
    if protocol.eval_mode != "sliding":
        return network(image).softmax(1)
    height, width = image.shape[-2:]
    crop = protocol.crop
    total = 0
    for top, left in itertools.product(windows(height, crop), windows(width, crop)):
        view = (..., slice(top, top + crop), slice(left, left + crop))
        prob = network(image[view]).softmax(1)
        if not torch.is_tensor(total):
            total = prob.new_zeros(1, prob.shape[1] + 1, height, width)  # the last channel counts the windows
        total[:, :-1][view] += prob
        total[:, -1:][view] += 1
    return total[:, :-1] / total[:, -1:]


def bilateral(prob, images):
    """[ours] Return the mean of each pixel's own probabilities and those of pixels of similar color.

    The latter is a joint bilateral filter (Petschnigg et al., 2004) over a 7 x 7 grid of pixels, 8 apart. Use it after
    training. prob (B,C,H,W), images (B,3,H,W) uint8 -> (B,C,H,W), a distribution.
    """
    height, width = prob.shape[-2:]
    reach, sigma = 24, 0.05
    colors = F.avg_pool2d(images / 255, 3, 1, 1, count_include_pad=False)  # single pixels are noisy
    probs = F.pad(prob, [reach] * 4)
    others = F.pad(colors, [reach] * 4, value=99)  # outside the image: weight 0
    total = torch.zeros_like(prob)
    weights = torch.zeros_like(prob[:, :1])
    for top, left in itertools.product(range(0, 2 * reach + 1, 8), repeat=2):
        view = (..., slice(top, top + height), slice(left, left + width))
        distance = (others[view] - colors).square().sum(1, keepdim=True)
        weight = (distance / (-2 * sigma**2)).exp()
        total.addcmul_(probs[view], weight)
        weights += weight
    return (prob + total / weights) / 2


@torch.no_grad()
def predict(network, pixels, protocol=Protocol()):
    """Return the class probabilities (1,C,H,W) of a uint8 image (1,3,H,W) on the network's device."""
    image = normalize(pixels)
    scales = TTA_SCALES if protocol.tta else (1,)
    flips = (False, True) if protocol.tta or protocol.bilateral else (False,)
    total = None
    for scale, flip in itertools.product(scales, flips):
        size = [max(1, round(side * scale)) for side in image.shape[-2:]]
        view = image.flip(-1) if flip else image
        if scale != 1:
            view = F.interpolate(view, size, mode="bilinear", antialias=True)
        prob = probabilities(network, view, protocol)
        if scale != 1:
            prob = F.interpolate(prob, image.shape[-2:], mode="bilinear")
        if flip:
            prob = prob.flip(-1)
        total = prob if total is None else total.add_(prob)  # in place: a large photograph's copy takes a gigabyte
    prob = total.div_(len(scales) * len(flips))
    if protocol.bilateral:
        prob = bilateral(prob, pixels)
    if protocol.refine is not None:
        prob = refine(prob, **protocol.refine)
    return prob


# ----------------------------------------------------------------------------------------------------------------------
# scores


def confusion_matrix(prediction, label, num_classes):
    """(C,C) counts, rows ground truth and columns prediction, over the pixels whose label is not 255."""
    pairs = label.long() * num_classes + prediction.long()
    pairs = pairs.masked_fill(label == IGNORE, num_classes**2).flatten()
    counts = pairs.new_zeros(num_classes**2 + 1)  # bincount would make the host wait for the GPU
    counts.scatter_add_(0, pairs, torch.ones_like(pairs))
    return counts[:-1].view(num_classes, num_classes)


def near_contour(label, distance, image_border=True):
    """(B,H,W) -> bool, True on pixels at most `distance` from a pixel of another value, in a square neighborhood.

    label: 0..255. image_border: whether everything outside the image counts as another value.
    """
    values = torch.stack([label, 255 - label]).to(torch.uint8)  # 255 - x turns a minimum into a maximum
    around = F.pad(values, [distance] * 4, value=255 if image_border else 0)
    for dim in (-2, -1):
        side = 1  # of the windows; two shifted maxima give that of a larger window
        while side <= 2 * distance:
            shift = min(side, 2 * distance + 1 - side)
            rest = around.shape[dim] - shift
            around = torch.maximum(around.narrow(dim, 0, rest), around.narrow(dim, shift, rest))
            side += shift
    return (around != values).any(0)


def boundary_confusion(prediction, label, num_classes):
    """Return boundary IoU's counts (Cheng et al., 2021), (C+1,C+1): a `confusion_matrix` with class C for interiors.

    A pixel keeps its class if it is within 2% of the image's diagonal of the contour of its region. Ignored pixels are
    one region in both ground truth and prediction, so its contour always agrees.
    """
    distance = max(1, round(0.02 * math.hypot(*label.shape[-2:])))
    prediction = prediction.masked_fill(label == IGNORE, IGNORE)
    labels = torch.stack([prediction, label]).to(torch.uint8)
    near = near_contour(labels.flatten(0, 1), distance).view_as(labels)
    return confusion_matrix(*labels.masked_fill(~near, num_classes), num_classes + 1)


def intersection_over_union(confusion, classes):
    """Return {class: IoU 0-100, or None} and their mean, or None: TP / (TP + FP + FN) of a confusion matrix.

    A class in neither ground truth nor prediction is None and counts nowhere.
    """
    confusion = confusion.double()
    iou = 100 * confusion.diag() / (confusion.sum(0) + confusion.sum(1) - confusion.diag())
    iou = iou[: len(classes)]
    values = [None if math.isnan(value) else value for value in iou.tolist()]
    mean = None if iou.isnan().all() else iou.nanmean().item()
    return dict(zip(classes, values)), mean


@torch.no_grad()
def evaluate(network, data, items, device, protocol=Protocol(), workers=0):
    """Return the scores of a network in evaluation mode on items, counted over all processes.

    {"miou", "boundary_miou", "pixel_accuracy": 0-100, "iou", "boundary_iou": {class: 0-100, or None}}.
    Raises InputError if no pixel has a label.
    """
    classes = len(data.classes)
    counts = torch.zeros(2, classes + 1, classes + 1, dtype=torch.long, device=device)
    for image, label in evaluation_loader(data, items, device, workers):
        if protocol.eval_mode == "center-crop":
            size = [min(protocol.crop, side) for side in label.shape[-2:]]
            image, label = VF.center_crop(image, size), VF.center_crop(label, size)
        prediction = predict(network, image, protocol).max(1).indices  # four times as fast as argmax on a CPU
        counts[0] += confusion_matrix(prediction, label, classes + 1)
        counts[1] += boundary_confusion(prediction, label, classes)
    confusion, boundaries = all_reduce(counts).cpu()
    if not confusion.any():
        raise InputError("no pixel of the images to score has a label; expected class indices, not only 255")
    iou, miou = intersection_over_union(confusion, data.classes)
    boundary_iou, boundary_miou = intersection_over_union(boundaries, data.classes)
    accuracy = 100 * confusion.diag().sum() / confusion.sum()
    return {
        "miou": miou, "boundary_miou": boundary_miou, "iou": iou, "boundary_iou": boundary_iou,
        "pixel_accuracy": accuracy.item(),
    }  # fmt: skip


def table(scores):
    """Return the scores as lines of text: IoU, and IoU at boundaries."""
    rows = {name: (value, scores["boundary_iou"][name]) for name, value in scores["iou"].items()}
    present = [name for name, (value, _) in rows.items() if value is not None]
    rows["mIoU"] = (scores["miou"], scores["boundary_miou"])
    width = max(map(len, rows))
    lines = [f"{'':{width}}       IoU  boundary"]
    for name, values in rows.items():
        shown = ["absent" if value is None else f"{value:.2f}" for value in values]
        lines.append(f"{name:{width}}{shown[0]:>10}{shown[1]:>10}")
    lines.append(f"pixel accuracy {scores['pixel_accuracy']:.2f}")
    if len(present) == 1:
        lines.append(f"only {present[0]} occurs, so this mIoU is the IoU of one class")
    return "\n".join(lines)


# ----------------------------------------------------------------------------------------------------------------------
# pseudo-labels


def refinement_options(args, prior=None):
    """Return the keyword arguments of `refine.refine` for a run's arguments (a dictionary)."""
    names = ("neighborhood", "neighbors", "select", "distance_weight", "dilation")
    return {name: args[name] for name in names} | {"prior": prior}


def label_options(args, prior=None):
    """Return the keyword arguments of `refine.pseudo_labels` for a run's arguments (a dictionary)."""
    options = {
        "kind": args["confidence"], "refinement": args["refinement"], "threshold": args["threshold"],
        "floor": args.get("floor", 0.0),
    }  # fmt: skip
    return options | refinement_options(args, prior)


def label_counts(prob, pseudo, truth, valid, options):
    """Return (8,) counts of pixels.

    valid, annotated; of raw labels: kept, kept and annotated, correct; of `pseudo`: the same three.
    prob: the probabilities behind `pseudo`. Raw labels are those without refinement, at the same threshold.
    """
    options = options | {"refinement": False, "threshold": pseudo.threshold}
    raw = pseudo_labels(prob, None, valid=valid, **options)
    known = truth != IGNORE
    masks = [valid, known]
    for keep, label in ((raw.keep, raw.label), (pseudo.keep, pseudo.label)):
        masks += [keep, keep & known, keep & (label == truth)]
    return torch.stack([mask.sum() for mask in masks])


def label_figures(counts):
    """Return the numbers of Figs. 4 and 5 from the counts: shares of pixels, 0..1, with and without refinement.

    kept, kept_raw: of the valid pixels, those given a label. correct, correct_raw: of the labels with ground truth,
    those that are correct. tp_change, fp_change: correct and wrong labels that refinement adds, as
    shares of the annotated pixels.
    """
    valid, known, kept_raw, judged_raw, right_raw, kept, judged, right = counts.tolist()
    figures = {"kept": kept / max(valid, 1), "kept_raw": kept_raw / max(valid, 1)}
    if known:
        wrong, wrong_raw = judged - right, judged_raw - right_raw
        figures["correct"] = right / max(judged, 1)
        figures["correct_raw"] = right_raw / max(judged_raw, 1)
        figures["tp_change"] = (right - right_raw) / known
        figures["fp_change"] = (wrong - wrong_raw) / known
    return figures


@torch.no_grad()
def evaluate_labels(network, data, items, device, protocol, args, prior, workers=0):
    """Return `label_figures` of a teacher on whole images, each with its own `image_threshold`."""
    options = label_options(args, prior)
    counts = torch.zeros(8, dtype=torch.long, device=device)
    for image, truth in evaluation_loader(data, items, device, workers):
        prob = predict(network, image, protocol)
        options["threshold"] = image_threshold(prob, args)
        pseudo = pseudo_labels(prob, None, **options)
        counts += label_counts(prob, pseudo, truth, torch.ones_like(truth, dtype=torch.bool), options)
    return label_figures(all_reduce(counts))


def image_threshold(prob, args):
    """Return the run's fixed threshold, or else the alpha0-quantile of these pixels, at least the floor."""
    if args["threshold"] is not None:
        return args["threshold"]
    threshold = dpa_threshold(confidence(prob, args["confidence"]), args["alpha0"], everywhere=False)
    if args.get("floor"):
        threshold = threshold.clamp(min=args["floor"])
    return threshold


# ----------------------------------------------------------------------------------------------------------------------
# panels: Figs. 1, 3 and 7


def overlay(image, label, dim=2, opacity=0.65, colors=palette()):
    """The image (3,H,W) uint8, its values divided by dim, under the label's colors; 255 shows only the image."""
    present = [c for c in label.unique().tolist() if c != IGNORE]
    if not present:
        return image // dim
    masks = torch.stack([label == c for c in present])
    return draw_segmentation_masks(image // dim, masks, opacity, [tuple(map(int, colors[c])) for c in present])


def heat(conf, kind, num_classes):
    """Confidence (H,W) -> (3,H,W) uint8: black, red, yellow, white with increasing confidence."""
    sure = 1 + conf / math.log(num_classes) if kind == "entropy" else conf
    return (torch.stack([3 * sure, 3 * sure - 1, 3 * sure - 2]).clamp(0, 1) * 255).to(torch.uint8)


COLUMNS = (
    "image", "ground truth", "teacher", "confidence, raw", "confidence, refined", "labels, raw", "labels, refined",
    "new green, lost red, other blue",
)  # fmt: skip
CHANGES = ((0, 220, 0), (255, 0, 0), (0, 90, 255))  # a label appears, disappears, becomes another


@torch.no_grad()
def panel(network, data, items, device, args, prior=None, protocol=Protocol(), width=160, longest=1024):
    """A (3,H,W) uint8 picture with a title and a row per item: COLUMNS, the last what refinement changes.

    The threshold is that of `image_threshold`; where a pixel has no pseudo-label the image shows, dimmed. Larger images
    are shrunk first, to `longest` pixels on their long side.
    """
    options, kind, classes = label_options(args, prior), args["confidence"], len(data.classes)
    tiles = []
    for item in items:
        image, truth = (part.to(device) for part in whole_image(data, item))
        shrink = min(1, longest / max(truth.shape[-2:]))
        size = [math.ceil(side * shrink) for side in truth.shape[-2:]]
        image, truth = VF.resize(image, size), VF.resize(truth, size, VF.InterpolationMode.NEAREST)
        prob = predict(network, image, protocol)
        options["threshold"] = image_threshold(prob, args)
        raw, refined = (pseudo_labels(prob, None, **options | {"refinement": on}) for on in (False, True))
        change = torch.where(raw.label == IGNORE, 0, torch.where(refined.label == IGNORE, 1, 2))
        change = change.masked_fill(raw.label == refined.label, IGNORE)
        row = [image[0], *(overlay(image[0], label[0]) for label in (truth, prob.argmax(1)))]
        row += [heat(pseudo.confidence[0], kind, classes) for pseudo in (raw, refined)]
        row += [overlay(image[0], pseudo.label[0]) for pseudo in (raw, refined)]
        row.append(overlay(image[0], change[0], opacity=1, colors=CHANGES))
        tiles += [VF.resize(tile, [width, width]).cpu() for tile in row]
    titles = Image.new("RGB", (2 + (width + 2) * len(COLUMNS), 16), "white")
    for i, title in enumerate(COLUMNS):
        ImageDraw.Draw(titles).text((2 + (width + 2) * i, 2), title, "black")
    return torch.cat([VF.pil_to_tensor(titles), make_grid(tiles, nrow=len(COLUMNS), pad_value=255)], 1)


def panel_items(data, count=4):
    """Return unlabeled images with a mask, evenly spaced, or else validation images."""
    annotated = [item for item in data.unlabeled if item.image and item.mask] or data.val
    count = min(count, len(annotated))
    return [annotated[i * len(annotated) // count] for i in range(count)]


# ----------------------------------------------------------------------------------------------------------------------
# command line


def read_records(file):
    """Return the records of a metrics.jsonl, a dictionary each. Damaged lines are dropped."""
    records = []
    lines = file.read_text(errors="replace").splitlines() if file.is_file() else []
    for line in lines:
        with contextlib.suppress(ValueError):
            records.append(json.loads(line))
    return [record for record in records if isinstance(record, dict) and "step" in record]


def last_line(error):
    """Return the last line of an error's text, or its kind if it has no text."""
    text = str(error).strip() or repr(error)
    return text.splitlines()[-1].removeprefix("data.InputError: ")  # after a loader worker's traceback


def explain(error):
    """Return a sentence for an error that the user can fix, else the traceback."""
    said = last_line(error)
    if isinstance(error, torch.OutOfMemoryError):
        return "the GPU's memory is full; lower --crop or --batch-size, or use --eval-mode sliding for large images"
    if isinstance(error, dist.DistError) or "gloo/transport" in str(error):
        return f"another process ended; its own message may say why ({said})"
    if isinstance(error, ConnectionError) or "DataLoader worker (pid" in str(error) or "shared memory" in str(error):
        return f"a loader worker has ended ({said}); lower --workers, or give it more memory (Docker: --shm-size=2g)"
    if isinstance(error, (InputError, OSError)):
        return said
    return "".join(traceback.format_exception(error))


def run_script(main):
    """Run main and end the process. A user's error is one sentence, a bug a traceback; both have exit code 1."""
    code = 0
    try:
        main()
    except SystemExit as stop:
        code = stop.code
    except KeyboardInterrupt:
        code = 128 + signal.SIGINT
    except Exception as error:
        code = f"{Path(sys.argv[0]).name}: {explain(error)}"
    if isinstance(code, str):
        print(code, file=sys.stderr)
        code = 1
    if dist.is_initialized():
        if code:  # the others may wait for this process; end at once
            sys.stdout.flush()
            end_workers()
            os._exit(code)
        dist.destroy_process_group()
    sys.exit(code)


def number(kind, low, high=math.inf, above=False):
    """Return an argparse type: a number from low (or above it) to high."""

    def parse(text):
        value = kind(text)
        if not low <= value <= high or (above and value == low):
            limits = f"more than {low}" if above else f"at least {low}"
            if high < math.inf:
                limits += f" and at most {high}"
            raise argparse.ArgumentTypeError(f"{text} is out of range; expected {limits}")
        return value

    parse.__name__ = kind.__name__
    return parse


def parse_args(argv=None):
    """The command line. Options left at None come from the run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("checkpoint", help="last.pth or best.pth of a run")
    add("--root", help="folder of the dataset; default: that of the run")
    add("--split", choices=("val", "test", "train"), help="the images to score; default: val")
    add("--eval-mode", choices=EVAL_MODES, help="how images are predicted; default: as in the run")
    add("--crop", type=number(int, 1), help="side of the windows or the center crop, pixels; default: as in the run")
    add("--tta", action="store_true", help="mean over flips and the scales 0.75, 1 and 1.25")
    add("--refine", action="store_true", help="refine the prediction, Sec. 4.2, with the run's options")
    add("--bilateral", action="store_true", help="mean with the mirrored image, then a filter by color [ours]")
    add("--student", action="store_true", help="the student instead of the teacher")
    add("--pseudo-labels", action="store_true", help="score pseudo-labels instead: share kept, share correct")
    add("--panels", metavar="DIR", help="also write a figure of unlabeled images there, as Figs. 1, 3 and 7")
    add("--json", metavar="FILE", help="also write the numbers there")
    workers = min(4, (os.cpu_count() or 1) - 1)
    add("--workers", type=number(int, 0), default=workers, help="loader workers; default: 4, or all cores but one")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: the GPU if there is one")
    args = parser.parse_args(argv)
    if args.pseudo_labels and (args.refine or args.split):
        parser.error("--pseudo-labels cannot be combined with --refine or --split; leave them out")
    return args


def open_dataset_of(checkpoint, root, use):
    """Open the dataset of a checkpoint, cut as in its run. Raises InputError if the classes are different."""
    run = checkpoint["args"]
    root = root or run["root"]
    data = open_dataset(run["dataset"], root, checkpoint["labeled"], run["splits"], use)
    if list(data.classes) != checkpoint["classes"]:
        raise InputError(f"{root} has the classes {data.classes}; expected those of the run, {checkpoint['classes']}")
    return data


def warn_of_ids(checkpoint, part, items):
    """Warn if the images to score are not the run's, or if the run was trained on their labels."""
    ids = {item.id for item in items}
    trained = len(ids & set(checkpoint["labeled"]))
    if trained:
        print(f"warning: {trained} of these {len(ids)} images were labeled in training; scores on them are too high")
    if part == "val" and ids != set(checkpoint["val"]):
        print("warning: these are not the validation images of the run; do not compare the scores")


def main(args):
    """Score a checkpoint, or its pseudo-labels."""
    checkpoint = load_checkpoint(args.checkpoint)
    run, prior = checkpoint["args"], checkpoint["prior"]
    device = start_processes(args.device)
    network = load_network(checkpoint, "student" if args.student else "teacher")
    network = network.to(device, memory_format=torch.channels_last)
    part = "unlabeled" if args.pseudo_labels else args.split or "val"
    parts = ("labeled", "unlabeled") if part == "train" else (part,)
    data = open_dataset_of(checkpoint, args.root, parts[:1])
    items = [item for name in parts for item in getattr(data, name) if item.image]
    if not args.pseudo_labels:
        items = [item for item in items if item.mask]
    protocol = Protocol(
        args.eval_mode or run["eval_mode"], args.crop or run["crop"], args.tta,
        refinement_options(run, prior) if args.refine else None, args.bilateral,
    )  # fmt: skip
    if args.pseudo_labels:
        if protocol.eval_mode == "center-crop":  # it is a way to score, not to label
            protocol = protocol._replace(eval_mode="original")
        result = evaluate_labels(network, data, items, device, protocol, run, prior, args.workers)
        text = "\n".join(f"{name:12}{100 * value:8.2f} %" for name, value in result.items())
    else:
        result = evaluate(network, data, items, device, protocol, args.workers)
        text = table(result)
    if rank_and_world()[0] != 0:
        return
    step = checkpoint["step"]
    print(f"{args.checkpoint}, step {step}: {len(items)} {part} images of {data.name}, {protocol.eval_mode}")
    if not args.pseudo_labels:
        warn_of_ids(checkpoint, part, items)
    print(text)
    if args.json:
        about = {"checkpoint": args.checkpoint, "step": step, "split": part, "images": len(items)}
        about |= protocol._asdict() | {"student": args.student, "refine": args.refine}
        Path(args.json).parent.mkdir(parents=True, exist_ok=True)
        Path(args.json).write_text(json.dumps(result | about, indent=2) + "\n")
    if args.panels:
        file = Path(args.panels) / f"step-{step:06d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        picture = panel(network, data, panel_items(data), device, run, prior, Protocol(bilateral=args.bilateral))
        VF.to_pil_image(picture).save(file)
        print(f"wrote {file}")


if __name__ == "__main__":
    run_script(lambda: main(parse_args()))
