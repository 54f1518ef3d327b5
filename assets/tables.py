"""Writes docs/results.md, README's tables and the pictures from assets/logs, labels and inference: none is typed by hand.

    python assets/tables.py keep runs/results/NAME      # a finished run's log, shortened, into assets/logs/NAME.jsonl
    python assets/tables.py                             # everything else; the pictures where matplotlib is installed

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
    "fixmatch": "FixMatch: fixed threshold 0.95, `--unsup-norm valid`",
    "dpa": "DPA without refinement",
    "refined-fixed": "refinement with threshold 0.95",
    "s4mc": "**S4MC**",
    "floor": "S4MC, alpha from 0.4 to 0.2 [ours]",
    "bilateral": "S4MC, `--context bilateral` [ours]",
    "guided": "tried: Eq. 9 among neighbors 16 pixels apart, beta times the likeness of colors (sigma 0.1)",
    "views-guided": "tried: the same on the mean of the view and its mirror image",
    "views-mean": "tried: joint bilateral filter of that mean, beta of Eq. 10, sigma 0.1, no union after it",
    "cutmixseg-dpa": "CutMix-Seg: DPA without refinement",
    "cutmixseg-s4mc": "CutMix-Seg: **S4MC**",
}
SMALL = {  # one seed each
    "Table 4a in small: neighborhoods": (
        "dpa",
        "cross",
        "s4mc",
        "5x5",
        "7x7",
        "two",
        "min",
        "random",
        "prior",
        "dilation4",
    ),
    "Table 4b in small: alpha0": ("alpha20", "s4mc", "alpha60", "alpha80"),
    "Table 5 in small: confidence": ("max", "entropy", "s4mc"),
}
NAMES = {"animals": "photographs of animals", "camvid": "CamVid", "shapes": "drawn shapes"}
NOTES = {
    "animals": "A folder of 3,131 training and 218 validation photographs of PASCAL VOC 2012 that show a cat, cow, dog, horse or\n"
    "sheep, 240 pixels on the long side, 7 classes; labeled: the published list of 92 (366) cut to them. The encoder starts\n"
    "from Google's 8-bit MobileNetV2 (mobilenet_v2_1.0_224_quant), dequantized, in place of torchvision's ImageNet weights.",
    "camvid": "367 training and 101 validation photographs of CamVid in SegNet's layout, 480 x 360, 11 classes; the same weights.",
    "shapes": "Drawn images, `python train.py`; nothing is pretrained.",
}
T95 = {3: 4.303, 4: 3.182, 5: 2.776}  # two-sided 95% of Student's t, by the number of pairs


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
            kept.append(
                {
                    name: round(value, 4) if isinstance(value, float) else value
                    for name, value in line.items()
                    if name in wanted
                }
            )
    (ASSETS / "logs").mkdir(exist_ok=True)
    (ASSETS / "logs" / f"{run.name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in kept))


def read_logs():
    """{(dataset, labels): {method: {seed: [lines]}}}, and the same with the final mIoU in place of the lines."""
    logs, final = (defaultdict(lambda: defaultdict(dict)) for _ in range(2))
    for path in sorted((ASSETS / "logs").glob("*.jsonl")):
        dataset, labels, *method, seed = path.stem.split("-")
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        logs[dataset, int(labels)]["-".join(method)][int(seed)] = lines
        final[dataset, int(labels)]["-".join(method)][int(seed)] = lines[-1]["miou"]
    return dict(sorted(logs.items())), final


def read_labels():
    """{(dataset, labels): {percent of the run: report}} of assets/labels.py."""
    reports = defaultdict(dict)
    for path in (ASSETS / "labels").glob("*.json"):
        dataset, labels, percent = path.stem.split("-")
        reports[dataset, int(labels)][int(percent)] = json.loads(path.read_text())
    return {key: dict(sorted(reports[key].items())) for key in sorted(reports)}


def read_inference():
    """{(dataset, labels): {method: {context: {seed: (mIoU, boundary mIoU)}}}} of evaluate.py --refine."""
    scores = defaultdict(lambda: defaultdict(lambda: defaultdict(dict)))
    for path in sorted((ASSETS / "inference").glob("*.json")):
        dataset, labels, *method, seed, context = path.stem.split("-")
        found = json.loads(path.read_text())
        scores[dataset, int(labels)]["-".join(method)][context][int(seed)] = found["miou"], found["boundary_miou"]
    return scores


def difference(one, other):
    """The mean of paired differences over the seeds of both with its 95% interval of Student's t, as text."""
    paired = [one[seed] - other[seed] for seed in one if seed in other]
    if len(paired) < 3:  # an interval from two is wider than any difference
        return f"{statistics.mean(paired):+.2f} ({len(paired)} seed{'s' * (len(paired) > 1)})" if paired else ""
    half = T95[len(paired)] * statistics.stdev(paired) / len(paired) ** 0.5
    return f"{statistics.mean(paired):+.2f} ± {half:.2f}"


def training_table(runs, final):
    """The final mIoU of one dataset's runs, seed by seed."""
    methods = [method for method in METHODS if final[method]]
    seeds = sorted({seed for method in methods for seed in final[method]})
    rows = [f"| | {' | '.join(f'seed {seed}' for seed in seeds)} | mean | boundary | S4MC minus this, paired |"]
    rows.append(f"|{'---|' * (len(seeds) + 4)}")
    for method in methods:
        cells = [f"{final[method][seed]:.2f}" if seed in final[method] else "" for seed in seeds]
        boundary = statistics.mean(lines[-1]["boundary_miou"] for lines in runs[method].values())
        base = "cutmixseg-s4mc" if method.startswith("cutmixseg") else "s4mc"
        cells += [f"{statistics.mean(final[method].values()):.2f}", f"{boundary:.2f}"]
        rows.append(
            f"| {METHODS[method]} | {' | '.join(cells)} | {'' if method == base else difference(final[base], final[method])} |"
        )
    return rows


def inference_table(runs, scores):
    """What refinement at inference gains, mIoU and boundary IoU, over the same teachers' plain predictions."""
    rows = [
        "",
        "Refinement at inference (`evaluate.py --refine`), gain in mIoU and in boundary IoU over the plain prediction:",
        "",
    ]
    rows += [
        "| teacher of | as in the paper: mIoU | boundary | `--context bilateral`: mIoU | boundary |",
        "|---|---|---|---|---|",
    ]
    for method in (method for method in METHODS if method in scores):
        cells = []
        for context in ("paper", "bilateral"):
            for part, key in enumerate(("miou", "boundary_miou")):
                refined = {seed: values[part] for seed, values in scores[method][context].items()}
                cells.append(difference(refined, {seed: lines[-1][key] for seed, lines in runs[method].items()}))
        rows.append(f"| {METHODS[method]} | {' | '.join(cells)} |")
    return rows if len(rows) > 5 else []


def small_tables(runs, final):
    """Tables of the paper in small, one seed."""
    parts = []
    for title, methods in SMALL.items():
        there = [method for method in methods if 0 in final[method]]
        if set(there) - {"dpa", "s4mc"}:
            parts += ["", f"**{title}**, seed 0 only, so that two points are noise:", "", f"| | {' | '.join(there)} |"]
            parts += [
                f"|{'---|' * (len(there) + 1)}",
                "| mIoU | " + " | ".join(f"{final[m][0]:.2f}" for m in there) + " |",
            ]
            kept = [
                next((line for line in reversed(runs[m][0]) if "kept" in line and line["alpha"] >= 0.1), None)
                for m in there
            ]
            parts += ["| kept, % at alpha 0.1 | " + " | ".join(f"{100 * line['kept']:.1f}" for line in kept) + " |"]
            parts += ["| correct, % | " + " | ".join(f"{100 * line['correct']:.1f}" for line in kept) + " |"]
    return parts


def label_table(reports, keys, ways=None):
    """What ways of refining change, {column: figures of assets/labels.py by way}, with their intervals."""
    columns = {
        f"{percent}% of the run, {title}": (report["ways"], key)
        for percent, report in reports.items()
        for title, key in keys
    }
    rows = [f"| | {' | '.join(columns)} |", f"|{'---|' * (len(columns) + 1)}"]
    for name in next(iter(reports.values()))["ways"]:
        if ways is None or name.split(": ")[-1] in ways:
            cells = [figures[name][key] for figures, key in columns.values()]
            shown = (
                f"{change:+.2f} [{low:+.2f}, {high:+.2f}]" if name != "raw" else f"{value:.2f}"
                for value, change, low, high in cells
            )
            rows.append(f"| {name} | {' | '.join(shown)} |")
    return rows


def results(logs, final, inference, reports):
    """docs/results.md, as lines."""
    parts = [
        "# Results",
        "",
        "Written by `python assets/tables.py` from the logs in [assets/logs](../assets/logs) and the reports in",
    ]
    parts += [
        "[assets/labels](../assets/labels); `bash assets/reproduce.sh` repeats all of it. mIoU of the teacher at the last step in"
    ]
    parts += [
        "percent, on the validation images; blank: not run. The last column is the mean of paired differences over seeds with a"
    ]
    parts += ["95% interval of Student's t."]
    for (dataset, labels), runs in logs.items():
        args = next(iter(next(iter(runs.values())).values()))[0]
        commits = sorted({lines[0]["commit"][:7] for of in runs.values() for lines in of.values()})
        parts += ["", f"## {NAMES[dataset]}, {labels} labels", "", NOTES[dataset], ""]
        parts += [
            f"{args['backbone']}, crop {args['crop']}, {args['batch_size']} + {args['batch_size']} images, {args['iters']} steps"
        ]
        parts[-1] += f", the first {args['warmup_iters']} with only labeled images; {args['optimizer']},"
        parts += [
            f"learning rates {args['lr']} / {args['head_lr']}; two CPU cores, torch {args['torch']}, commits {', '.join(commits)}.",
            "",
        ]
        parts += training_table(runs, final[dataset, labels]) + inference_table(runs, inference[dataset, labels])
        parts += small_tables(runs, final[dataset, labels])
    parts += ["", "![mIoU, labels kept and labels correct over steps](../assets/curves.png)"]
    parts += ["", "![What each way of refining changes, with intervals](../assets/labels.png)"] if reports else []
    for (dataset, labels), by_age in reports.items():
        images = next(iter(by_age.values()))["about"]["images"]
        parts += ["", f"## Pseudo-labels without training: {NAMES[dataset]}, {labels} labels", ""]
        parts += [
            f"On {images} unlabeled images whose ground truth is known, with the teachers of one S4MC run (seed 0): raw margins, then the"
        ]
        parts += [
            "difference that each way of refining makes, with a 95% interval by bootstrap over images. Area under the risk-coverage"
        ]
        parts += [
            "curve in percent (the mean error of the surest pixels over all coverages), everywhere and within 5 pixels of a contour;"
        ]
        parts += ["recall: share of a class's pixels with a right label among the surest 80%, mean over classes.", ""]
        parts += label_table(by_age, (("area", "area"), ("near contours", "near area"), ("recall", "mean recall")))
        parts += ["", "Error of the surest labels, in percent, by coverage:", ""]
        middle = {30: by_age[30]} if 30 in by_age else by_age
        shares = [(f"{share}%", f"error at {share}") for share in (20, 40, 60, 80, 90)]
        parts += label_table(
            middle,
            shares,
            ("raw", "3x3 (paper)", "3x3, dilation 16", "3x3, dilation 16, colors 0.05", "`--context bilateral`"),
        )
    return parts


def draw(logs, final, reports):
    """The pictures: curves.png over steps; gains.png for README, every seed; labels.png, ways to use context."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    figure = Figure(figsize=(13, 3.4 * len(logs)), layout="constrained")
    for row, ((dataset, labels), runs) in zip(figure.subplots(len(logs), 3, squeeze=False), logs.items()):
        for axis, key in zip(row, ("miou", "kept", "correct")):
            for method in (method for method in METHODS if method in runs):
                points = defaultdict(list)
                for lines in runs[method].values():
                    for line in lines[1:]:
                        if key in line:
                            points[line["step"]].append(line[key] * (1 if key == "miou" else 100))
                if points:
                    axis.plot(sorted(points), [statistics.mean(points[step]) for step in sorted(points)], label=method)
            axis.set(title=f"{NAMES[dataset]}, {labels} labels: {key}", xlabel="step", ylabel="%")
            axis.legend(fontsize="x-small")
    figure.savefig(ASSETS / "curves.png", dpi=80)

    figure = Figure(figsize=(3.2 * len(logs), 3.2), layout="constrained")
    for axis, ((dataset, labels), _) in zip(figure.subplots(1, len(logs), squeeze=False)[0], logs.items()):
        methods = ("supervised", "fixmatch", "dpa", "s4mc", "bilateral")
        for x, method in enumerate(methods):
            values = list(final[dataset, labels][method].values())
            if not values:
                continue
            axis.plot([x] * len(values), values, "o", alpha=0.6)
            axis.hlines(statistics.mean(values), x - 0.3, x + 0.3, color="black")
        axis.set(title=f"{NAMES[dataset]}, {labels} labels", ylabel="mIoU, %")
        axis.set_xticks(range(len(methods)), methods, rotation=30)
    figure.savefig(ASSETS / "gains.png", dpi=80)

    if reports:  # how much each way of refining changes, with its interval
        figure = Figure(figsize=(5 + 3.5 * len(reports), 8), layout="constrained")
        for axis, ((dataset, labels), by_age) in zip(
            figure.subplots(1, len(reports), squeeze=False, sharey=True)[0], reports.items()
        ):
            percent = 30 if 30 in by_age else max(by_age)
            names = list(by_age[percent]["ways"])[::-1]
            for key, color, shift in (("area", "tab:blue", 0.15), ("near area", "tab:orange", -0.15)):
                figures = [by_age[percent]["ways"][name][key] for name in names]
                errors = [
                    [change - low for _, change, low, _ in figures],
                    [high - change for _, change, _, high in figures],
                ]
                places = [y + shift for y in range(len(names))]
                axis.errorbar(
                    [change for _, change, *_ in figures], places, xerr=errors, fmt=".", color=color, label=key
                )
            axis.axvline(0, color="gray", linewidth=0.5)
            axis.set_yticks(range(len(names)), names, fontsize="x-small")
            axis.set(title=f"{NAMES[dataset]}, {labels} labels", xlabel="change, points (left is better)")
            axis.legend(fontsize="x-small", loc="upper left")
        figure.savefig(ASSETS / "labels.png", dpi=80)


def summary(final):
    """README's table: means with the number of seeds, and what S4MC gains."""
    methods = ("supervised", "fixmatch", "dpa", "s4mc")
    rows = [
        "| images, labels | only labeled | FixMatch | DPA without refinement | S4MC | S4MC minus only labeled | minus DPA |"
    ]
    rows.append("|---|---|---|---|---|---|---|")
    for (dataset, labels), of in sorted(final.items()):
        cells = [
            f"{statistics.mean(of[method].values()):.2f} ({len(of[method])})" if of[method] else ""
            for method in methods
        ]
        cells += [difference(of["s4mc"], of[method]) for method in ("supervised", "dpa")]
        rows.append(f"| {NAMES[dataset]}, {labels} | {' | '.join(cells)} |")
    return rows


def context_summary(logs, final, inference, reports):
    """README's table of wider context: why, in labels, in the student, at inference."""
    keys = [key for key in logs if key in reports or inference[key]]
    rows = [
        f"| | {' | '.join(f'{NAMES[dataset]}, {labels} labels' for dataset, labels in keys)} |",
        f"|{'---|' * (len(keys) + 1)}",
    ]

    def row(title, cell):
        rows.append(f"| {title} | {' | '.join(cell(key) for key in keys)} |")

    def label_cell(key, way):
        report = reports.get(key, {}).get(30)
        if report is None:
            return ""
        ways = {name.split(": ")[-1]: figures["area"] for name, figures in report["ways"].items()}
        value, change, low, high = ways[way]
        return f"{value:.2f}" if way == "raw" else f"{change:+.2f} [{low:+.2f}, {high:+.2f}]"

    def shared(key):
        about = reports.get(key, {}).get(30, {}).get("about", {})
        shares = about.get("wrong pixels whose eight neighbors predict the same, percent by distance", {})
        return f"{shares['1']:.0f}% and {shares['16']:.0f}%" if shares else ""

    def recall(key):
        ways = reports.get(key, {}).get(30, {}).get("ways", {})
        return next((f"{ways['raw']['mean recall'][0]:.1f}: {figures['mean recall'][1]:+.1f} [{figures['mean recall'][2]:+.1f}, "
            f"{figures['mean recall'][3]:+.1f}]" for name, figures in ways.items() if "--context" in name), "")  # fmt: skip

    def gain(key, context):
        parts = []
        for part, name in enumerate(("miou", "boundary_miou")):
            refined = {seed: values[part] for seed, values in inference[key]["s4mc"][context].items()}
            parts.append(difference(refined, {seed: lines[-1][name] for seed, lines in logs[key]["s4mc"].items()}))
        return ", ".join(part for part in parts if part)

    row("wrong pixels whose eight neighbors predict the same, 1 and 16 pixels apart", shared)
    row(
        "labels of a teacher at 30% of a run: mean error over all coverages, raw margins, %",
        lambda key: label_cell(key, "raw"),
    )
    row("the paper's 3x3, difference", lambda key: label_cell(key, "3x3 (paper)"))
    row("`--context bilateral`, difference", lambda key: label_cell(key, "`--context bilateral`"))
    row("recall, mean over classes, of the surest 80%: raw, then the difference with `--context bilateral`", recall)
    row(
        "student trained with it: mIoU minus S4MC's",
        lambda key: difference(final[key]["bilateral"], final[key]["s4mc"]),
    )
    row("S4MC's teacher, refined at inference as in the paper: mIoU, boundary IoU", lambda key: gain(key, "paper"))
    row("the same with `--context bilateral`", lambda key: gain(key, "bilateral"))
    return rows


def between(text, name, lines):
    """The text with the lines between <!-- name --> and <!-- end of name -->."""
    before, _, rest = text.partition(f"<!-- {name} -->\n")
    _, _, after = rest.partition(f"<!-- end of {name} -->")
    return f"{before}<!-- {name} -->\n" + "\n".join(lines) + f"\n<!-- end of {name} -->{after}"


def main():
    """docs/results.md, the tables in README between their marks, and the pictures."""
    (logs, final), inference, reports = read_logs(), read_inference(), read_labels()
    (ASSETS.parent / "docs" / "results.md").write_text("\n".join(results(logs, final, inference, reports)) + "\n")
    readme = ASSETS.parent / "README.md"
    text = between(readme.read_text(), "results", summary(final))
    readme.write_text(between(text, "context", context_summary(logs, final, inference, reports)))
    draw(logs, final, reports)


if __name__ == "__main__":
    keep(sys.argv[2]) if sys.argv[1:2] == ["keep"] else main()
