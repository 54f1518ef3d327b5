"""Writes docs/results.md and its picture from the logs in assets/logs, so that no figure is typed by hand.

    python assets/tables.py keep runs/results/NAME      # a finished run's log, shortened, into assets/logs/NAME.jsonl
    python assets/tables.py                             # docs/results.md; assets/curves.png where matplotlib is installed

NAME is DATASET-LABELS-METHOD-SEED. A log's first line holds the arguments and the commit of its run.
"""

import json
import statistics
import sys
from collections import defaultdict
from pathlib import Path

ASSETS = Path(__file__).resolve().parent
METHODS = {
    "supervised": "only the labeled images, equal steps",
    "supervised-long": "only the labeled images, twice the steps: equal minutes",
    "fixmatch": "FixMatch: threshold 0.95, `--unsup-norm valid`",
    "dpa": "DPA without refinement",
    "refined-fixed": "refinement with threshold 0.95",
    "s4mc": "**S4MC**",
}
NOTES = {
    "animals": "A folder of 3,131 training and 218 validation photographs of PASCAL VOC 2012 that show a cat, cow, dog, horse or "
    "sheep, 240 pixels on the long side, 7 classes; labeled: the published list of 92 (366) cut to them. The encoder starts from "
    "Google's 8-bit MobileNetV2 (mobilenet_v2_1.0_224_quant), dequantized, in place of torchvision's ImageNet weights.",
    "shapes": "Drawn images, `python train.py`; nothing is pretrained.",
}
T95 = {2: 12.71, 3: 4.303, 4: 3.182, 5: 2.776}  # two-sided 95% of Student's t, by the number of pairs


def keep(run):
    """Copies what the tables need of a run's log; raises SystemExit where the run is not finished."""
    run = Path(run)
    args = json.loads((run / "args.json").read_text())
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    if lines[-1]["event"] != "val" or lines[-1]["step"] != args["iters"]:
        raise SystemExit(f"{run} is at step {lines[-1]['step']} of {args['iters']}; finish it first")
    wanted = ("event", "step", "loss", "alpha", "kept", "kept_raw", "correct", "correct_raw", "miou", "boundary_miou")
    folders = ("root", "splits", "out", "labeled", "weights")  # of the machine
    kept = [{name: value for name, value in args.items() if name not in folders}]
    for line in lines:
        if line["event"] == "val" or line["step"] % (args["iters"] // 20) < args["log_every"]:
            kept.append({name: round(value, 4) if isinstance(value, float) else value for name, value in line.items() if name in wanted})
    (ASSETS / "logs").mkdir(exist_ok=True)
    (ASSETS / "logs" / f"{run.name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in kept))


def read_logs():
    """{(dataset, labels): {method: {seed: [lines]}}}."""
    logs = defaultdict(lambda: defaultdict(dict))
    for path in sorted((ASSETS / "logs").glob("*.jsonl")):
        dataset, labels, *method, seed = path.stem.split("-")
        logs[dataset, labels]["-".join(method)][int(seed)] = [json.loads(line) for line in path.read_text().splitlines()]
    return logs


def interval(differences):
    """The mean of paired differences with its 95% interval, as text."""
    if len(differences) < 2:
        return f"{differences[0]:+.2f} (one seed)" if differences else ""
    half = T95[len(differences)] * statistics.stdev(differences) / len(differences) ** 0.5
    return f"{statistics.mean(differences):+.2f} ± {half:.2f}"


def table(runs):
    """A Markdown table of the final mIoU of one dataset's runs."""
    seeds = sorted({seed for of in runs.values() for seed in of})
    rows = [f"| | {' | '.join(f'seed {seed}' for seed in seeds)} | mean | boundary | S4MC minus this, paired |", f"|{'---|' * (len(seeds) + 4)}"]
    final = {method: {seed: lines[-1]["miou"] for seed, lines in of.items()} for method, of in runs.items()}
    for method, name in METHODS.items():
        of = final.get(method, {})
        if not of:
            continue
        cells = [f"{of[seed]:.2f}" if seed in of else "" for seed in seeds]
        boundary = statistics.mean(lines[-1]["boundary_miou"] for lines in runs[method].values())
        gain = [value - of[seed] for seed, value in final.get("s4mc", {}).items() if seed in of]
        gain = "" if method == "s4mc" else interval(gain)
        rows.append(f"| {name} | {' | '.join(cells)} | {statistics.mean(of.values()):.2f} | {boundary:.2f} | {gain} |")
    return "\n".join(rows)


def curves(logs):
    """assets/curves.png: mIoU, kept and correct over steps, the mean over seeds. Returns whether it was drawn."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(13, 3.4 * len(logs)), layout="constrained")
    axes = figure.subplots(len(logs), 3, squeeze=False)
    for row, ((dataset, labels), runs) in zip(axes, logs.items()):
        for axis, key in zip(row, ("miou", "kept", "correct")):
            for method, of in runs.items():
                points = defaultdict(list)
                for lines in of.values():
                    for line in lines[1:]:
                        if key in line:
                            points[line["step"]].append(line[key] * (1 if key == "miou" else 100))
                if points:
                    steps = sorted(points)
                    axis.plot(steps, [statistics.mean(points[step]) for step in steps], label=method)
            axis.set(title=f"{dataset}, {labels} labels: {key}", xlabel="step", ylabel="%")
            axis.legend()
    figure.savefig(ASSETS / "curves.png", dpi=100)
    return True


def main():
    """docs/results.md from all logs."""
    logs = read_logs()
    parts = ["# Results", "", "Written by `python assets/tables.py` from the logs in [assets/logs](../assets/logs); the runs are repeated by"]
    parts += ["`bash assets/reproduce.sh`. mIoU of the teacher at the last step in percent, on the validation images; blank: not run."]
    parts += ["The last column is the mean of paired differences over seeds with a 95% interval of Student's t."]
    for (dataset, labels), runs in logs.items():
        args = next(iter(next(iter(runs.values())).values()))[0]
        commits = sorted({lines[0]["commit"][:7] for of in runs.values() for lines in of.values()})
        parts += ["", f"## {dataset}, {labels} labels", "", NOTES[dataset], ""]
        parts += [f"{args['backbone']}, crop {args['crop']}, {args['batch_size']} + {args['batch_size']} images, {args['iters']} steps"]
        parts[-1] += f", the first {args['warmup_iters']} with only labeled images; {args['optimizer']}, {args['lr']} / {args['head_lr']};"
        parts += [f"two CPU cores, torch {args['torch']}, commit {', '.join(commits)}.", "", table(runs)]
    if curves(logs):
        parts += ["", "![mIoU, labels kept and labels correct over steps](../assets/curves.png)"]
    (ASSETS.parent / "docs" / "results.md").write_text("\n".join(parts) + "\n")


if __name__ == "__main__":
    keep(sys.argv[2]) if sys.argv[1:2] == ["keep"] else main()
