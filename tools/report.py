"""Pseudo-labels of a run: how many are kept and correct, raw and refined; Figs. 4, 5 and 6.

    python tools/report.py runs/shapes-24-s4mc-fixmatch-0                     # of its last.pth
    python tools/report.py runs/shapes-24-s4mc-fixmatch-0/best.pth --figures figures --json labels.json

It counts the annotated pixels of the unlabeled images. The threshold is that of evaluate.py --pseudo-labels. It comes
from the raw confidence, so refinement may only let more pixels pass. So both are also compared at equal coverage: the
accuracy of the 20 to 90% most confident pixels. "area" is its mean over all coverages.
"""

import argparse
import json
import math
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data import IGNORE, InputError, evaluation_loader, rank_and_world  # noqa: E402
from evaluate import Protocol, image_threshold, near_contour, open_dataset_of, predict, read_records  # noqa: E402
from evaluate import refinement_options, run_script  # noqa: E402
from model import all_reduce, load_checkpoint, load_network, start_processes  # noqa: E402
from refine import confidence, refine  # noqa: E402

COVERAGES = (20, 40, 60, 80, 90)  # percent
BINS = 2**15  # of uncertainty, by the upper bits of the float: 1/256 wide, relatively, so that margins of 0.9999 differ


@torch.no_grad()
def count_labels(network, data, items, device, run, prior):
    """Count pixels of known ground truth, raw and refined.

    Returns labels (2,C,2,2) by class, kept and right, and bins (2,2,2,BINS) by near a contour, right and uncertainty.
    """
    classes, kind = len(data.classes), run["confidence"]
    options = refinement_options(run, prior)
    labels = torch.zeros(2, classes * 4, dtype=torch.long, device=device)
    bins = torch.zeros(2, 4 * BINS, dtype=torch.long, device=device)
    protocol = Protocol(run["eval_mode"], run["crop"])
    for image, truth in evaluation_loader(data, items, device):
        known = truth != IGNORE
        near = near_contour(truth, 5, image_border=False)
        prob = predict(network, image, protocol)
        threshold = image_threshold(prob, run)
        for i, p in enumerate((prob, refine(prob, **options))):
            label, conf = p.argmax(1), confidence(p, kind)
            right = label == truth
            keep = conf > threshold
            place = (label * 2 + keep) * 2 + right
            labels[i] += torch.bincount(place[known], minlength=labels.shape[1])
            # Refined probabilities need not sum to 1, so their entropy may lie outside its range; abs is for -0.0.
            uncertainty = (-conf / math.log(classes) if kind == "entropy" else 1 - conf).clamp(0, 1).abs()
            place = (near * 2 + right) * BINS + (uncertainty.view(torch.int32) >> 15)
            bins[i] += torch.bincount(place[known], minlength=bins.shape[1])
    labels, bins = (all_reduce(counts).cpu().numpy() for counts in (labels, bins))
    return labels.reshape(2, classes, 2, 2), bins.reshape(2, 2, 2, BINS)


def coverage_accuracy(counts):
    """Share of right labels among the surest pixels: {"20", ..., "90" percent of them, "area": 0..1}; {} of no pixels.

    counts (2,BINS): wrong and right pixels by uncertainty. Inside a bin pixels count as equally sure.
    """
    if not counts.sum():
        return {}
    covered, right = (np.concatenate([[0], part.cumsum()]) / counts.sum() for part in (counts.sum(0), counts[1]))
    grid = (np.arange(1000) + 0.5) / 1000
    accuracy = {str(share): float(np.interp(share / 100, covered, right) / (share / 100)) for share in COVERAGES}
    return accuracy | {"area": float((np.interp(grid, covered, right) / grid).mean())}


def summarize(labels, bins, classes):
    """Return {"raw" and "refined": {"kept", "correct", "coverage", "coverage_near_contours"}}.

    kept: {class: share of its predicted pixels that are kept}; correct: {class: share of the kept pixels that are
    correct}; None means no such pixels. The coverages are those of `coverage_accuracy`.
    """
    report = {}
    for name, label, one in zip(("raw", "refined"), labels, bins):
        by_class = dict(zip(classes, label)) | {"together": label.sum(0)}  # (dropped or kept, wrong or right) each
        report[name] = {
            "kept": {c: part[1].sum() / part.sum() if part.any() else None for c, part in by_class.items()},
            "correct": {c: part[1, 1] / part[1].sum() if part[1].any() else None for c, part in by_class.items()},
            "coverage": coverage_accuracy(one.sum(0)),
            "coverage_near_contours": coverage_accuracy(one[1]),
        }
    return report


def table(report):
    """The report as lines of text, in percent."""
    lines = []
    for first, second, *titles in (
        ("kept", "correct", "predicted class", "kept", "correct"),
        ("coverage", "coverage_near_contours", "most confident", "correct", "near contours"),
    ):
        width = max(24, *map(len, report["raw"][first]))
        lines.append(f"{titles[0]:{width}}{titles[1]:>20}{titles[2]:>20}")
        lines.append(f"{'':{width}}{'raw   refined':>20}{'raw   refined':>20}")
        for row in report["raw"][first]:
            values = [report[kind][part].get(row) for part in (first, second) for kind in ("raw", "refined")]
            shown = ["none" if value is None else f"{100 * value:.2f}" for value in values]
            name = f"{row}%" if row.isdecimal() and first == "coverage" else row
            lines.append(f"{name:{width}}" + "".join(f"{value:>10}" for value in shown))
    return "\n".join(lines)


def read_log(run):
    """Return the records of a run's metrics.jsonl about pseudo-labels. Raises InputError if there are none."""
    metrics = run / "metrics.jsonl"
    records = [record for record in read_records(metrics) if "kept" in record]
    if not records:
        raise InputError(f"{metrics} has no step with pseudo-labels; expected the log of a run past its warm-up")
    return records


CURVES = {  # of Figs. 4 and 5, {title: {legend: key of the log}}
    "kept": {"refined": "kept", "raw": "kept_raw"},
    "correct": {"refined": "correct", "raw": "correct_raw"},
    "added by refinement": {"correct labels": "tp_change", "wrong labels": "fp_change"},
}


def draw_figures(lines, bins, folder):
    """Figs. 4 and 5 from lines of metrics.jsonl, Fig. 6 from the bins of `count_labels`, as PNG."""
    from matplotlib.figure import Figure

    figures = [Figure(figsize=(5 * panels, 3.6), layout="constrained") for panels in (2, 1, 1)]
    for axes, (title, curves) in zip((*figures[0].subplots(1, 2), figures[1].subplots()), CURVES.items()):
        for legend, key in curves.items():
            there = [line for line in lines if key in line]
            axes.plot([line["step"] for line in there], [100 * line[key] for line in there], label=legend)
        axes.set(title=title, xlabel="step", ylabel="% of the pixels")
        axes.legend()
    axes, edges = figures[2].subplots(), np.linspace(0, 1, 41)
    sure = 1 - ((np.arange(BINS, dtype=np.int32) << 15) + (1 << 14)).view(np.float32).clip(0, 1)  # of each bin's middle
    for legend, counts in (("refined", bins[1]), ("raw", bins[0])):  # the colors of Fig. 4
        pixels = np.histogram(sure, edges, weights=counts.sum((0, 1)))[0]
        axes.stairs(100 * pixels / pixels.sum(), edges, label=legend)
    axes.set(title="confidence", xlabel="unsure to sure", ylabel="% of the pixels", yscale="log")
    axes.legend()
    folder.mkdir(parents=True, exist_ok=True)
    for i, figure in enumerate(figures, 4):
        figure.savefig(folder / f"fig{i}.png", dpi=150)
        print(f"wrote {folder / f'fig{i}.png'}")


def parse_args(argv=None):
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("run", help="folder of a run, or one of its checkpoints")
    add("--figures", metavar="DIR", help="also draw Figs. 4, 5 and 6 there; needs matplotlib")
    add("--json", metavar="FILE", help="also write the numbers there, 0..1")
    add("--root", help="folder of the dataset; default: the one of the run")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: the GPU if there is one")
    return parser.parse_args(argv)


def main(args):
    """Print the report of a checkpoint, and draw the figures."""
    path = Path(args.run) / "last.pth" if Path(args.run).is_dir() else Path(args.run)
    checkpoint = load_checkpoint(path)
    run = checkpoint["args"]
    if args.figures:  # asked before the work is done
        records = read_log(path.parent)
        try:
            import matplotlib.figure  # noqa: F401
        except ImportError as error:
            raise InputError("--figures needs matplotlib, which is not installed; pip install matplotlib") from error
    data = open_dataset_of(checkpoint, args.root, ("unlabeled",))
    items = [item for item in data.unlabeled if item.mask]
    if not items:
        raise InputError(f"no unlabeled image of {data.name} has a mask; expected some, to compare with")
    device = start_processes(args.device)
    network = load_network(checkpoint).to(device, memory_format=torch.channels_last)
    labels, bins = count_labels(network, data, items, device, run, checkpoint["prior"])
    if rank_and_world()[0] != 0:
        return
    report = summarize(labels, bins, data.classes)
    threshold = run["threshold"]
    if threshold is None:
        threshold = f"the {run['alpha0']:.0%} quantile of each image"
        if run.get("floor"):
            threshold += f", at least {run['floor']}"
    step = checkpoint["step"]
    print(f"{path}, step {step}: {len(items)} unlabeled images of {data.name}, threshold: {threshold}")
    print(table(report))
    if args.json:
        about = {"checkpoint": str(path), "step": step, "dataset": data.name, "images": len(items)}
        Path(args.json).parent.mkdir(parents=True, exist_ok=True)
        Path(args.json).write_text(json.dumps(about | report, indent=2) + "\n")
    if args.figures:
        draw_figures(records, bins, Path(args.figures))


if __name__ == "__main__":
    run_script(lambda: main(parse_args()))
