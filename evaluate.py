"""Scores of a checkpoint: IoU per class and at boundaries, by the field's protocols; quality of pseudo-labels; panels.

    python evaluate.py runs/shapes-24-fixmatch-0/last.pth
    python evaluate.py ckpt.pth --root data --json scores.json --panels panels
    python evaluate.py ckpt.pth --pseudo-labels                               # with and without refinement
    torchrun --nproc_per_node=8 evaluate.py ckpt.pth --eval-mode sliding --tta

The dataset, the classes, the network and the protocol are those that the checkpoint names.
"""

import argparse
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

from data import IGNORE, InputError, evaluation_loader, normalize, open_dataset, palette
from model import all_reduce, load_checkpoint, load_network, start_processes
from refine import confidence, pseudo_labels, refine

# ----------------------------------------------------------------------------------------------------------------------
# prediction

EVAL_MODES = ("original", "sliding", "center-crop")
TTA_SCALES = (0.75, 1.0, 1.25)


class Protocol(NamedTuple):
    """How images are predicted."""

    eval_mode: str = "original"  # one of EVAL_MODES; "center-crop" cuts image and mask before they get here
    crop: int = 0  # pixels, of the windows and of the center crop
    tta: bool = False  # mean over TTA_SCALES and flips
    refine: dict | None = None  # options of `refine.refine`: Sec. 4.2, refinement at inference
    bilateral: bool = False  # [ours] first the mean with the mirrored image and the filter `bilateral`


def windows(side, crop):
    """Where the windows along a side begin: every two thirds of a window, the last one flush with the border."""
    last = max(side - crop, 0)
    return [*range(0, last, max(1, 2 * crop // 3)), last]


def probabilities(network, image, protocol):
    """softmax(network(image)): (1,3,H,W), normalized -> (1,C,H,W); the mean of it where windows overlap."""
    if protocol.eval_mode != "sliding":
        return network(image).softmax(1)
    (height, width), crop, total, covered = image.shape[-2:], protocol.crop, None, image.new_zeros(image.shape[-2:])
    for top, left in itertools.product(windows(height, crop), windows(width, crop)):
        view = (..., slice(top, top + crop), slice(left, left + crop))
        prob = network(image[view]).softmax(1)
        total = prob.new_zeros(1, prob.shape[1], height, width) if total is None else total
        total[view] += prob
        covered[view] += 1
    return total / covered


def bilateral(prob, images):
    """[ours] Half of a pixel's probabilities are its own, half their mean over pixels of similar color.

    The mean is a joint bilateral filter (Petschnigg et al., 2004) over a 7x7 grid of pixels, 8 apart; for finished
    networks, in training it gains nothing. prob (B,C,H,W), images (B,3,H,W) uint8 -> (B,C,H,W), a distribution.
    """
    colors = F.avg_pool2d(images / 255, 3, 1, 1, count_include_pad=False)  # single pixels are noisy
    (height, width), reach, sigma = prob.shape[-2:], 24, 0.05
    probs, others = F.pad(prob, [reach] * 4), F.pad(colors, [reach] * 4, value=99)  # 99: outside the image, weight 0
    total, weights = torch.zeros_like(prob), torch.zeros_like(prob[:, :1])
    for top, left in itertools.product(range(0, 2 * reach + 1, 8), repeat=2):
        view = (..., slice(top, top + height), slice(left, left + width))
        weight = ((others[view] - colors).square().sum(1, keepdim=True) / (-2 * sigma**2)).exp()
        total.addcmul_(probs[view], weight)
        weights += weight
    return (prob + total / weights) / 2


@torch.no_grad()
def predict(network, pixels, protocol=Protocol()):
    """Class probabilities of a uint8 image (1,3,H,W) on the network's device: (1,C,H,W)."""
    image, prob = normalize(pixels), None
    scales = TTA_SCALES if protocol.tta else (1,)
    flips = (False, True) if protocol.tta or protocol.bilateral else (False,)
    for scale in scales:
        size = [max(1, round(side * scale)) for side in image.shape[-2:]]
        resized = image if scale == 1 else F.interpolate(image, size, mode="bilinear", antialias=True)
        for flip in flips:  # in place where it can be: of a large photograph each copy is a gigabyte
            one = probabilities(network, resized.flip(-1) if flip else resized, protocol)
            one = one.flip(-1) if flip else one
            one = one if scale == 1 else F.interpolate(one, image.shape[-2:], mode="bilinear")
            prob = one if prob is None else prob.add_(one)
    prob /= len(scales) * len(flips)
    if protocol.bilateral:
        prob = bilateral(prob, pixels)
    return prob if protocol.refine is None else refine(prob, **protocol.refine)


# ----------------------------------------------------------------------------------------------------------------------
# scores


def confusion_matrix(prediction, label, num_classes):
    """(C,C) counts, rows ground truth and columns prediction, over the pixels whose label is not 255."""
    pairs = label.long() * num_classes + prediction.long()
    pairs = pairs.masked_fill(label == IGNORE, num_classes**2).flatten()
    counts = pairs.new_zeros(num_classes**2 + 1)  # bincount would have the host wait for the GPU
    counts.scatter_add_(0, pairs, torch.ones_like(pairs))
    return counts[:-1].view(num_classes, num_classes)


def near_contour(label, distance, image_border=True):
    """(B,H,W) -> bool, True on pixels at most `distance` from a pixel of another value, in a square neighborhood.

    label: 0..255. image_border: whether everything outside the image counts as another value.
    """
    values = torch.stack([label, 255 - label]).to(torch.uint8)  # the largest of 255 - x is the smallest of x
    around = F.pad(values, [distance] * 4, value=255 if image_border else 0)
    for dim in (-2, -1):
        side = 1  # maxima over windows of this side; two of them make a larger one, up to 2 * distance + 1
        while side <= 2 * distance:
            shift = min(side, 2 * distance + 1 - side)
            rest = around.shape[dim] - shift
            around = torch.maximum(around.narrow(dim, 0, rest), around.narrow(dim, shift, rest))
            side += shift
    return (around != values).any(0)


def boundary_confusion(prediction, label, num_classes):
    """Boundary IoU's counts (Cheng et al., 2021), (C+1,C+1): like `confusion_matrix`, class C standing for interiors.

    A pixel keeps its class where it is within 2% of the image's diagonal of the contour of its region. Ignored pixels
    are a region of their own in ground truth and prediction, so that a contour under PASCAL's 255 border costs nothing.
    """
    distance = max(1, round(0.02 * math.hypot(*label.shape[-2:])))
    labels = torch.stack([prediction.masked_fill(label == IGNORE, IGNORE), label]).to(torch.uint8)
    bands = labels.masked_fill(~near_contour(labels.flatten(0, 1), distance).view_as(labels), num_classes)
    return confusion_matrix(*bands, num_classes + 1)


def intersection_over_union(confusion, classes):
    """({class: 0-100, or None}, their mean or None): TP / (TP + FP + FN) of the first classes of a confusion matrix.

    A class in neither ground truth nor prediction is None and counts nowhere.
    """
    confusion = confusion.double()
    iou = (100 * confusion.diag() / (confusion.sum(0) + confusion.sum(1) - confusion.diag()))[: len(classes)]
    *iou, mean = [None if math.isnan(value) else value for value in (*iou.tolist(), iou.nanmean().item())]
    return dict(zip(classes, iou)), mean


@torch.no_grad()
def evaluate(network, data, items, device, protocol=Protocol(), workers=0, rank=0, world=1):
    """Scores of a network in evaluation mode on items, counted over all processes.

    {"miou", "boundary_miou", "pixel_accuracy": 0-100, "iou", "boundary_iou": {class: 0-100, or None}}.
    Raises InputError if no pixel has a label.
    """
    classes = len(data.classes)
    counts = torch.zeros(2, classes + 1, classes + 1, dtype=torch.long, device=device)
    for image, label in evaluation_loader(data, items, device, workers, rank, world):
        if protocol.eval_mode == "center-crop":
            size = [min(protocol.crop, side) for side in label.shape[-2:]]
            image, label = VF.center_crop(image, size), VF.center_crop(label, size)
        prediction = predict(network, image, protocol).max(1).indices  # on a CPU a quarter of argmax's time
        counts[0] += confusion_matrix(prediction, label, classes + 1)
        counts[1] += boundary_confusion(prediction, label, classes)
    confusion, boundaries = all_reduce(counts).cpu()
    if not confusion.any():
        raise InputError("no pixel of the images to score has a label; expected class indices, not only 255")
    iou, miou = intersection_over_union(confusion, data.classes)
    boundary_iou, boundary_miou = intersection_over_union(boundaries, data.classes)
    scores = {"miou": miou, "boundary_miou": boundary_miou, "iou": iou, "boundary_iou": boundary_iou}
    return scores | {"pixel_accuracy": (100 * confusion.diag().sum() / confusion.sum()).item()}


def table(scores):
    """The scores as lines of text: IoU, and IoU at boundaries."""
    rows = {name: (value, scores["boundary_iou"][name]) for name, value in scores["iou"].items()}
    rows["mIoU"], width = (scores["miou"], scores["boundary_miou"]), max(map(len, [*rows, "mIoU"]))
    lines = [f"{'':{width}}       IoU  boundary"]
    for name, values in rows.items():
        lines.append(f"{name:{width}}" + "".join(f"{'absent' if v is None else f'{v:.2f}':>10}" for v in values))
    return "\n".join([*lines, f"pixel accuracy {scores['pixel_accuracy']:.2f}"])


# ----------------------------------------------------------------------------------------------------------------------
# pseudo-labels


def refinement_options(args, prior=None):
    """The keyword arguments of `refine.refine` that a run's arguments (a dictionary) mean."""
    names = ("neighborhood", "neighbors", "select", "distance_weight", "dilation")
    return {name: args[name] for name in names} | {"prior": prior}


def label_options(args, prior=None):
    """The keyword arguments of `refine.pseudo_labels` that a run's arguments (a dictionary) mean."""
    options = {"kind": args["confidence"], "refinement": args["refinement"]}
    options |= {"threshold": args["threshold"], "floor": args.get("floor", 0.0)}
    return options | refinement_options(args, prior)


def label_counts(prob, pseudo, truth, valid, options):
    """(8,) counts of pixels: valid, annotated; then of raw labels and of `pseudo`: kept, kept and annotated, right.

    prob: what `pseudo` was decided from; raw: the labels without refinement, at the same threshold.
    """
    raw = pseudo_labels(prob, None, valid=valid, **options | {"refinement": False, "threshold": pseudo.threshold})
    known, masks = truth != IGNORE, [valid, truth != IGNORE]
    for keep, label in ((raw.keep, raw.label), (pseudo.keep, pseudo.label)):
        masks += [keep, keep & known, keep & (label == truth)]
    return torch.stack([mask.sum() for mask in masks])


def label_figures(counts):
    """Figs. 4 and 5 from the counts: shares of pixels, 0..1, with and without refinement.

    kept, kept_raw: of the valid pixels, those given a label. correct, correct_raw: of the labels whose truth is known,
    those that are right. tp_change, fp_change: right and wrong labels added by refinement, of the annotated pixels.
    """
    valid, known, kept_raw, judged_raw, right_raw, kept, judged, right = counts.tolist()
    figures = {"kept": kept / max(valid, 1), "kept_raw": kept_raw / max(valid, 1)}
    if known:
        figures |= {"correct": right / max(judged, 1), "correct_raw": right_raw / max(judged_raw, 1)}
        figures["tp_change"] = (right - right_raw) / known
        figures["fp_change"] = ((judged - right) - (judged_raw - right_raw)) / known
    return figures


@torch.no_grad()
def evaluate_labels(network, data, items, device, protocol, args, prior, workers=0, rank=0, world=1):
    """`label_figures` of a teacher on whole images, each with the threshold of its own pixels at alpha0."""
    counts, options = torch.zeros(8, dtype=torch.long, device=device), label_options(args, prior)
    for image, truth in evaluation_loader(data, items, device, workers, rank, world):
        prob = predict(network, image, protocol)
        pseudo = pseudo_labels(prob, None, **options | {"threshold": image_threshold(prob, args)})
        counts += label_counts(prob, pseudo, truth, torch.ones_like(truth, dtype=torch.bool), options)
    return label_figures(all_reduce(counts))


def image_threshold(prob, args):
    """The run's fixed threshold, or else the alpha0-quantile of these pixels' raw confidence, not below its floor."""
    if args["threshold"] is not None:
        return args["threshold"]
    conf = confidence(prob, args["confidence"]).flatten()  # not dpa_threshold, which waits for the other processes
    threshold = conf.kthvalue(1 + int(args["alpha0"] * (len(conf) - 1))).values
    return threshold.clamp(min=args["floor"]) if args.get("floor") else threshold


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
    """Confidence (H,W) -> (3,H,W) uint8: black, red, yellow, white as the network grows surer."""
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
    for pair in evaluation_loader(data, items, device):
        size = [math.ceil(side * min(1, longest / max(pair[0].shape[-2:]))) for side in pair[0].shape[-2:]]
        image, truth = VF.resize(pair[0], size), VF.resize(pair[1], size, VF.InterpolationMode.NEAREST)
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
    """Unlabeled images, evenly spaced, whose ground truth is known; else validation images."""
    annotated = [item for item in data.unlabeled if item.image and item.mask] or data.val
    count = min(count, len(annotated))
    return [annotated[i * len(annotated) // count] for i in range(count)]


# ----------------------------------------------------------------------------------------------------------------------
# command line


def say(line, file=None, end="\n"):
    """Prints at once and in one piece, beside other processes; a reader that is gone, as `| tee` is at Ctrl-C, ends
    nothing."""
    file = file or sys.stdout
    try:
        file.write(line + end)
        file.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), file.fileno())


def last_line(error):
    """Of its text, or of its kind where it has none."""
    return (str(error).strip() or repr(error)).splitlines()[-1]


def run_script(main):
    """Runs main and ends the process: a user's error is one sentence, a bug a traceback, both exit code 1."""
    code = 0
    try:
        main()
    except SystemExit as error:
        code = error.code
    except KeyboardInterrupt:
        code = 128 + signal.SIGINT
    except torch.OutOfMemoryError:
        code = "the GPU's memory is full; lower --crop or --batch-size, or, for large photographs, --eval-mode sliding"
    except Exception as error:
        what = last_line(error)
        if isinstance(error, ConnectionError) or str(error).startswith("DataLoader worker"):
            code = f"a loading process was killed ({what}); lower --workers, or give the job more (shared) memory"
        elif isinstance(error, (InputError, OSError)):  # a loader's worker puts its traceback before the sentence
            code = what.removeprefix("data.InputError: ")
        elif "gloo/transport" in str(error) or isinstance(error, dist.DistBackendError):
            code = f"a process is lost, whose own message may say why ({what})"
        else:
            code = traceback.format_exc()
    if isinstance(code, str):
        say(f"{Path(sys.argv[0]).name}: {code}", sys.stderr)
        code = 1
    if dist.is_initialized():
        if code:  # a process group is not taken down while others wait in it
            say("", end="")
            os._exit(code)
        dist.destroy_process_group()
    sys.exit(code)


def number(kind, low, high=math.inf, above=False):
    """An argparse type: a number from low (or above it) to high."""

    def parse(text):
        if low <= kind(text) <= high and not (above and kind(text) == low):
            return kind(text)
        limits = f"{'more than' if above else 'at least'} {low}{f' and at most {high}' if high < math.inf else ''}"
        raise argparse.ArgumentTypeError(f"{text} is out of range; expected {limits}")

    parse.__name__ = kind.__name__
    return parse


def parse_args(argv=None):
    """The command line. What is None here is as in the run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("checkpoint", help="last.pth or best.pth of a run")
    add("--root", help="folder of the dataset; default: the one of the run")
    add("--split", choices=("val", "test", "train"), help="the images to score; default: val")
    add("--eval-mode", choices=EVAL_MODES, help="how images are predicted; default: the run's way")
    add("--crop", type=number(int, 1), help="side of the windows or the center crop, pixels; default: the run's")
    add("--tta", action="store_true", help="mean over flips and the scales 0.75, 1 and 1.25")
    add("--refine", action="store_true", help="refine the prediction, Sec. 4.2, with the run's options")
    add("--bilateral", action="store_true", help="first the mean with the mirrored image, filtered by color [ours]")
    add("--student", action="store_true", help="the student instead of the teacher")
    add("--pseudo-labels", action="store_true", help="instead of scores: how many pseudo-labels, how right")
    add("--panels", metavar="DIR", help="also write a panel of unlabeled images there, as Figs. 1, 3 and 7")
    add("--json", metavar="FILE", help="also write the numbers there")
    workers = min(4, (os.cpu_count() or 1) - 1)
    add("--workers", type=number(int, 0), default=workers, help="loading processes; default: 4, or all cores but one")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: the GPU where there is one")
    args = parser.parse_args(argv)
    if args.pseudo_labels and (args.refine or args.split):
        parser.error("--pseudo-labels are refined as in the run, on unlabeled images; expected no --refine, no --split")
    return args


def main(args):
    """Scores a checkpoint, or its pseudo-labels."""
    checkpoint = load_checkpoint(args.checkpoint)
    run, prior, root = checkpoint["args"], checkpoint.get("prior"), args.root or checkpoint["args"]["root"]
    rank, world, device = start_processes(args.device)
    which = "student" if args.student else "teacher"
    network = load_network(checkpoint, which).to(device, memory_format=torch.channels_last)
    part = "unlabeled" if args.pseudo_labels else args.split or "val"
    parts = ("labeled", "unlabeled") if part == "train" else (part,)
    data = open_dataset(run["dataset"], root, checkpoint["labeled"], run["splits"], parts[:1])
    if list(data.classes) != checkpoint["classes"]:
        raise InputError(f"{root} has the classes {data.classes}; expected those of the run, {checkpoint['classes']}")
    items = [item for one in parts for item in getattr(data, one) if item.image and (item.mask or args.pseudo_labels)]
    options = refinement_options(run, prior) if args.refine else None
    eval_mode, crop = args.eval_mode or run["eval_mode"], args.crop or run["crop"]
    if args.pseudo_labels and eval_mode == "center-crop":  # a way to score, not to label
        eval_mode = "original"
    protocol = Protocol(eval_mode, crop, args.tta, options, args.bilateral)
    if args.pseudo_labels:
        result = evaluate_labels(network, data, items, device, protocol, run, prior, args.workers, rank, world)
        text = "\n".join(f"{name:12}{100 * value:8.2f} %" for name, value in result.items())
    else:
        result = evaluate(network, data, items, device, protocol, args.workers, rank, world)
        text = table(result)
    if rank != 0:
        return
    print(f"{args.checkpoint}, step {checkpoint['step']}: {len(items)} {part} images of {data.name}, {eval_mode}")
    print(text)
    if args.json:
        about = {"checkpoint": args.checkpoint, "step": checkpoint["step"], "split": part, "images": len(items)}
        about |= {"network": which} | protocol._asdict() | {"refine": args.refine}
        Path(args.json).parent.mkdir(parents=True, exist_ok=True)
        Path(args.json).write_text(json.dumps(result | about, indent=2) + "\n")
    if args.panels:
        file = Path(args.panels) / f"step-{checkpoint['step']:06d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        protocol = Protocol(bilateral=args.bilateral)
        VF.to_pil_image(panel(network, data, panel_items(data), device, run, prior, protocol)).save(file)
        print(f"wrote {file}")


if __name__ == "__main__":
    run_script(lambda: main(parse_args()))
