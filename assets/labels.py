"""Which context ranks a teacher's pseudo-labels best: many ways of refining, the same predictions, no training.

    python assets/labels.py runs/results/animals-31-s4mc-0/step-000100.pth --name animals-31-10 [--images 100]
    python assets/labels.py runs/results/shapes-24-bilateral-0/last.pth --picture assets/context.png

Writes assets/labels/NAME.json, which `python assets/tables.py` reads. On unlabeled images whose ground truth is known,
everywhere and within 5 pixels of a contour: the area under the risk-coverage curve (the error of the surest pixels,
mean over all coverages), the error at fixed coverages, and what a threshold from the raw margins keeps; for the surest
80% of an image the share of a class's pixels that get a right label, mean over classes (recall), and the share of the
labels that name the largest class. Each with its difference from the raw margin in points, and a 95% interval by
bootstrap over images.
"""

import argparse
import json
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torchvision.transforms.v2 import functional as VF
from torchvision.utils import make_grid

ASSETS = Path(__file__).resolve().parent
sys.path.insert(0, str(ASSETS.parent))

from data import IGNORE, evaluation_loader, normalize, open_dataset  # noqa: E402
from evaluate import Protocol, near_contour, overlay, predict, run_script  # noqa: E402
from model import load_checkpoint, load_network  # noqa: E402
from refine import bilateral, confidence, offsets, refine  # noqa: E402
from train import class_prior  # noqa: E402

COVERAGES = (20, 40, 60, 80, 90, 100)  # percent; 100: every pixel is trained on, as at the end of a run
DISTANCES = (1, 4, 16)  # pixels
ALPHA = 0.2  # half way through a run
RESAMPLES = 1000


def union(p, q):
    """Eq. 10 with Eq. 14 and beta 1."""
    return p + q - p * q


def ways(prob, mirrored, image, colors, features, prior):
    """[(name, refined probabilities, labels or None for their argmax)] of all ways to use context; raw comes first."""
    yield "raw", prob, None
    for name, options in {
        "cross": {"neighborhood": "cross"}, "3x3 (paper)": {}, "5x5": {"neighborhood": 5}, "7x7": {"neighborhood": 7},
        "3x3, two neighbors": {"neighbors": 2}, "3x3, min": {"select": "min"},
        "3x3, random": {"select": "random", "generator": torch.Generator().manual_seed(0)},
        "3x3, prior": {"prior": prior},
    }.items():  # fmt: skip
        yield name, refine(prob, **options), None
    for dilation in (2, 4, 8, 16):
        yield f"3x3, dilation {dilation}", refine(prob, dilation=dilation), None
    for neighborhood, dilation, sigma in (
        (3, 8, 0.1), (3, 16, 0.05), (3, 16, 0.1), (3, 16, 0.2), (3, 32, 0.1), (5, 8, 0.1), (7, 8, 0.1),
    ):  # fmt: skip
        refined = refine(prob, neighborhood, dilation=dilation, guide=colors, guide_sigma=sigma)
        yield f"{neighborhood}x{neighborhood}, dilation {dilation}, colors {sigma}", refined, None
    guided = refine(prob, dilation=16, guide=colors)
    yield "the same (3x3, 16, 0.1), raw label", guided, prob.argmax(1)
    flat = refine(prob, dilation=16, guide=colors, distance_weight=False)
    yield "the same (3x3, 16, 0.1), beta 1 by distance", flat, None
    yield "3x3, dilation 16, features 0.4", refine(prob, dilation=16, guide=features, guide_sigma=0.4), None
    average = (prob + mirrored) / 2
    for neighborhood, dilation, sigma, weight in (
        (3, 16, 0.1, True), (7, 8, 0.1, True), (7, 8, 0.03, False), (7, 8, 0.05, False), (7, 8, 0.1, False),
        (7, 8, 0.2, False), (7, 4, 0.1, False), (5, 16, 0.1, False),
    ):  # fmt: skip
        options = {
            "select": "mean", "dilation": dilation, "distance_weight": weight, "guide": colors, "guide_sigma": sigma,
        }  # fmt: skip
        name = f"mean of {neighborhood}x{neighborhood}, dilation {dilation}, colors {sigma}"
        name += "" if weight else ", beta 1"
        yield name, refine(prob, neighborhood, **options), None
        yield f"{name}, both views", refine(average, neighborhood, **options), None
    both = union(prob, mirrored)
    yield "mirrored view", both, None
    yield "3x3, dilation 16, colors 0.1, then mirrored view", union(guided, mirrored), None
    yield "mean with mirrored view", average, None
    half = "half its own, half the mean of 7x7, dilation 8, colors 0.05, beta 1"
    yield half, bilateral(prob, image), None
    wider = bilateral(average, image)
    yield f"{half}, both views", wider, None
    yield f"{half}, both views, then 3x3: `--context bilateral`", refine(wider), None


def shared_errors(prediction, wrong, distance):
    """How many wrong pixels have eight neighbors at this distance, inside the image, that predict the same; (1,H,W)."""
    same = wrong.clone()
    for dy, dx, _ in offsets(3, distance):
        around = F.pad(prediction, [distance] * 4, value=-1)
        there = around[:, distance + dy :, distance + dx :][:, : same.shape[1], : same.shape[2]]
        same &= (there == prediction) | (there == -1)
    return same.sum()


@torch.no_grad()
def count(network, data, items, prior):
    """What one pass over the images counts: a tuple of

    {way: pixels, float (images, 2 near contours, 2 wrong or right, 2**13 by uncertainty)};
    {way: (images, 3 + 3C): known pixels, kept ones, and kept and right ones at the ALPHA-quantile of the image's raw
        margins; by class all true pixels and, at equal coverage, the predicted and the right ones};
    {distance: share of the wrong pixels whose neighbors all predict the same}.
    """
    bins, kept, shared, classes = {}, {}, torch.zeros(1 + len(DISTANCES)), len(data.classes)
    for image, truth in evaluation_loader(data, items):
        weak = normalize(image)
        colors = F.avg_pool2d(image / 255, 3, 1, 1, count_include_pad=False)  # as in `bilateral`
        prob, mirrored = network(weak).softmax(1), network(weak.flip(-1)).softmax(1).flip(-1)
        low = network.low_level(network.backbone(weak)[0])
        features = F.interpolate(F.normalize(low), size=image.shape[-2:], mode="bilinear")
        known, near = truth != IGNORE, near_contour(truth, 5, image_border=False)
        rank = 1 + int(ALPHA * (truth.numel() - 1))
        threshold = confidence(prob).flatten().kthvalue(rank).values
        wrong = known & (prob.argmax(1) != truth)
        shared += torch.stack(
            [wrong.sum(), *(shared_errors(prob.argmax(1), wrong, distance) for distance in DISTANCES)]
        )
        for name, refined, label in ways(prob, mirrored, image, colors, features, prior):
            label = refined.argmax(1) if label is None else label
            conf, right = confidence(refined), label == truth
            unsure = (1 - conf).clamp(0, 1).abs().view(torch.int32) >> 17  # the float's upper bits: steps of 1/64
            place = (near * 2 + right) * 2**13 + unsure
            counts = torch.bincount(place[known], minlength=4 * 2**13).float().view(2, 2, 2**13)
            bins.setdefault(name, []).append(counts)
            keep = known & (conf > threshold)
            counts = [torch.stack([known.sum(), keep.sum(), (keep & right).sum()])]
            sure = known & (conf > conf.flatten().kthvalue(rank).values)  # as many pixels, whatever the way
            by_class = truth[known], label[sure], truth[sure & right]
            counts += [torch.bincount(one, minlength=classes) for one in by_class]
            kept.setdefault(name, []).append(torch.cat(counts).float())
    shares = {distance: round(100 * (one / shared[0]).item(), 1) for distance, one in zip(DISTANCES, shared[1:])}
    return *({name: torch.stack(images) for name, images in counts.items()} for counts in (bins, kept)), shares


def risks(counts):
    """Counts (R,2,BINS), wrong and right by uncertainty -> (R, 1 + COVERAGES), %: the area, errors of the surest."""
    counts = counts.double()
    total, wrong = counts.sum(1).cumsum(1), counts[:, 0].cumsum(1)
    everything = total[:, -1:]
    risk = wrong / total.clamp(min=1)
    before = F.pad(risk, [1, 0])[:, :-1]
    columns = [(counts.sum(1) / everything * (risk + before) / 2).sum(1)]
    for share in COVERAGES:  # the risk where the curve reaches it, linear inside of a bin
        goal = everything * share / 100
        i = torch.searchsorted(total, goal).clamp(max=total.shape[1] - 1)
        below, errors = (F.pad(x, [1, 0])[:, :-1].gather(1, i) for x in (total, wrong))
        part = (goal - below) / (total.gather(1, i) - below).clamp(min=1)
        columns.append(((errors + part * (wrong.gather(1, i) - errors)) / goal)[:, 0])
    return 100 * torch.stack(columns, 1)


def summarize(bins, kept):
    """{way: {figure: [value, difference from raw, its lower and upper end]}}, in percent and points."""
    images = len(kept["raw"])
    generator = torch.Generator().manual_seed(0)
    samples = torch.multinomial(torch.ones(RESAMPLES, images), images, replacement=True, generator=generator)
    weights = torch.cat([torch.ones(1, images), F.one_hot(samples, images).sum(1).float()])  # the first row: as it is

    def figures(name):
        everywhere = risks((weights @ bins[name].sum(1).flatten(1)).view(len(weights), 2, -1))
        near = risks((weights @ bins[name][:, 1].flatten(1)).view(len(weights), 2, -1))
        sums = (weights @ kept[name]).double()
        known, keep, right = sums[:, :3].unbind(1)
        true, predicted, hit = sums[:, 3:].unflatten(1, (3, -1)).unbind(1)  # (1 + RESAMPLES, C)
        largest = true[0].argmax()
        recall = (hit / true.clamp(min=1)).sum(1) / (true > 0).sum(1)  # mean over the classes that are there
        by_class = torch.stack([recall, predicted[:, largest] / predicted.sum(1)], 1)
        return torch.cat([everywhere, near, 100 * torch.stack([keep / known, 1 - right / keep], 1), 100 * by_class], 1)

    errors = [f"error at {share}" for share in COVERAGES]
    names = [f"{part}{figure}" for part in ("", "near ") for figure in ("area", *errors)]
    names += ["kept", "error of kept", "mean recall", "largest class"]
    raw, report = figures("raw"), {}
    for name in bins:
        values = figures(name)
        ends = (values - raw)[1:].quantile(torch.tensor([0.025, 0.975], dtype=torch.double), 0)
        columns = torch.cat([values[:1], (values - raw)[:1], ends]).T
        report[name] = {title: [round(value, 3) for value in column] for title, column in zip(names, columns.tolist())}
    return report


@torch.no_grad()
def picture(network, data, items, coverage=0.8, width=160):
    """Image, truth, the surest labels by the paper's context and by `bilateral`; last, what the second changes of the
    first: added and changed labels green (right) and red (wrong), dropped ones light (wrong) and dark (right) blue."""
    tiles = []
    for image, truth in evaluation_loader(data, items):
        kept = []
        for context in ("paper", "bilateral"):
            refined = refine(predict(network, image, Protocol(context=context)))
            conf, label = confidence(refined), refined.argmax(1)
            kept.append(label.masked_fill(conf < conf.flatten().quantile(1 - coverage), IGNORE))
        right = [label == truth for label in kept]
        new = (kept[0] != kept[1]) & (kept[1] != IGNORE) & (truth != IGNORE)
        gone = (kept[0] != kept[1]) & (kept[1] == IGNORE) & (truth != IGNORE)
        change = image[0] // 4
        for where, color in (
            (new & right[1], (0, 200, 0)), (new & ~right[1], (230, 0, 0)),
            (gone & ~right[0], (120, 200, 255)), (gone & right[0], (0, 60, 200)),
        ):  # fmt: skip
            change = torch.where(where, torch.tensor(color, dtype=torch.uint8).view(3, 1, 1), change)
        shown = [image[0], *(overlay(image[0], label[0]) for label in (truth, *kept)), change]
        tiles += [VF.resize(tile, [width, width], interpolation=VF.InterpolationMode.NEAREST) for tile in shown]
    return VF.to_pil_image(make_grid(tiles, nrow=5, pad_value=255))


def main():
    """One checkpoint, one file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="of train.py")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--name", help="of the file to write, DATASET-LABELS-PERCENT OF THE RUN; MobileNetV2 only")
    what.add_argument("--picture", help="file to write in place of figures: labels by both contexts, as in README")
    parser.add_argument("--images", type=int, default=100, help="unlabeled images, evenly spaced")
    args = parser.parse_args()
    checkpoint = load_checkpoint(args.checkpoint)
    run = checkpoint["args"]
    data = open_dataset(run["dataset"], run["root"], checkpoint["labeled"], run["splits"], ("labeled", "unlabeled"))
    items = [item for item in data.unlabeled if item.mask]
    items = [items[i * len(items) // args.images] for i in range(min(args.images, len(items)))]
    if args.picture:
        picture(load_network(checkpoint), data, items[:3]).save(args.picture, optimize=True)
        return
    bins, kept, shares = count(load_network(checkpoint), data, items, class_prior(data, 3))
    about = {"step": checkpoint["step"], "iters": run["iters"], "seed": run["seed"], "images": len(items)}
    true = kept["raw"].sum(0)[3:].view(3, -1)[0]
    about["share of the largest class in the ground truth, percent"] = round(100 * (true.max() / true.sum()).item(), 1)
    about["wrong pixels whose eight neighbors predict the same, percent by distance"] = shares
    (ASSETS / "labels").mkdir(exist_ok=True)
    report = {"about": about, "ways": summarize(bins, kept)}
    (ASSETS / "labels" / f"{args.name}.json").write_text(json.dumps(report, indent=1) + "\n")
    for name, figures in report["ways"].items():
        print(
            f"{name:62}"
            + "  ".join(
                "{:6.2f} {:+5.2f} [{:+.2f} {:+.2f}]".format(*figures[key])
                for key in ("area", "near area", "error at 100", "mean recall", "largest class")
            )
        )


if __name__ == "__main__":
    run_script(main)
