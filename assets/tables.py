"""Writes docs/results.md, README's tables and the pictures from assets/logs, labels, inference: none is typed by hand.

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
    "refined-fixed": "refinement, fixed threshold 0.95 on the largest probability",
    "s4mc": "**S4MC**",
    "bilateral": "S4MC, `--context bilateral` [ours]",
    "floor": "tried: alpha from 0.4 to 0.2 in place of 0",
    "guided": "tried: Eq. 9 among neighbors 16 pixels apart, beta times the likeness of colors (sigma 0.1)",
    "views-guided": "tried: the same on the mean of the view and its mirror image",
    "views-mean": "tried: joint bilateral filter of that mean, beta of Eq. 10, sigma 0.1, no union after it",
    "filter": "tried: joint bilateral filter of that mean, sigma 0.05, beta 1, without the half that stays, then S4MC",
    "cutmixseg-dpa": "CutMix-Seg: DPA without refinement",
    "cutmixseg-s4mc": "CutMix-Seg: **S4MC**",
}
SMALL = {  # one seed each
    "Table 4a in small: neighborhoods": tuple("dpa cross s4mc 5x5 7x7 two min random prior dilation4".split()),
    "Table 4b in small: alpha0": ("alpha20", "s4mc", "alpha60", "alpha80"),
    "Table 5 in small: confidence": ("max", "entropy", "s4mc"),
}
DRAWN = {  # methods in the pictures, each in one color everywhere
    "supervised": "tab:gray", "fixmatch": "tab:orange", "refined-fixed": "tab:brown", "dpa": "tab:blue",
    "s4mc": "tab:red", "bilateral": "tab:green", "floor": "tab:purple",
}  # fmt: skip
NAMES = {"animals": "photographs of animals", "camvid": "CamVid", "shapes": "drawn shapes"}
NOTES = {
    "animals": """
A folder of 3,131 training and 218 validation photographs of PASCAL VOC 2012 that show a cat, cow, dog, horse or
sheep, 240 pixels on the long side, 7 classes; labeled: the published list of 92 (366) cut to them. The encoder starts
from Google's 8-bit MobileNetV2 (mobilenet_v2_1.0_224_quant), dequantized, in place of torchvision's ImageNet weights.
""",
    "camvid": """
367 training and 101 validation photographs of CamVid in SegNet's layout, 480 x 360, 11 classes; the same weights.
""",
    "shapes": """
Drawn images, `python train.py`; nothing is pretrained.
""",
}
T95 = {3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306}  # two-sided 95% of Student's t, by the number of pairs


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
            shown = {name: value for name, value in line.items() if name in wanted}
            kept.append({name: round(x, 4) if isinstance(x, float) else x for name, x in shown.items()})
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


def table(rows):
    """Markdown of rows of cells, the first of which is the head."""
    lines = [f"| {' | '.join(row)} |\n" for row in rows]
    return "".join([lines[0], f"|{'---|' * len(rows[0])}\n", *lines[1:]])


def training_table(runs, final):
    """The final mIoU of one dataset's runs, seed by seed, and what happens in the last 30% of a run."""
    seeds = sorted({seed for method in METHODS for seed in final[method]})
    rows = [["", *(f"seed {seed}" for seed in seeds), "mean", "boundary", "S4MC minus this, paired"]]
    rows[0] += ["last 30%: mIoU", "kept, %", "correct, %"]
    for method in (method for method in METHODS if final[method]):
        of = runs[method].values()
        boundary = statistics.mean(lines[-1]["boundary_miou"] for lines in of)
        base = "cutmixseg-s4mc" if method.startswith("cutmixseg") else "s4mc"
        rows.append([METHODS[method]])
        rows[-1] += [f"{final[method][seed]:.2f}" if seed in final[method] else "" for seed in seeds]
        rows[-1] += [f"{statistics.mean(final[method].values()):.2f}", f"{boundary:.2f}"]
        rows[-1] += ["" if method == base else difference(final[base], final[method])]
        late = [[line for line in lines[1:] if line["step"] >= 0.7 * lines[-1]["step"]] for lines in of]
        before = statistics.mean(next(line["miou"] for line in lines if "miou" in line) for lines in late)
        rows[-1] += [f"{statistics.mean(final[method].values()) - before:+.2f}"]
        for key in ("kept", "correct"):
            shares = [100 * line[key] for lines in late for line in lines if key in line]
            rows[-1] += [f"{statistics.mean(shares):.1f}" if shares else ""]
    return table(rows)


def inference_gains(runs, scores, context):
    """What refining a method's teachers at inference gains, as text: (mIoU, boundary IoU)."""
    for part, key in enumerate(("miou", "boundary_miou")):
        refined = {seed: values[part] for seed, values in scores[context].items()}
        yield difference(refined, {seed: lines[-1][key] for seed, lines in runs.items()})


def inference_table(runs, scores):
    """The same for all methods of one dataset."""
    rows = [["teacher of", "as in the paper: mIoU", "boundary", "`--context bilateral`: mIoU", "boundary"]]
    for method in (method for method in METHODS if method in scores):
        rows.append([METHODS[method]])
        for context in ("paper", "bilateral"):
            rows[-1] += inference_gains(runs[method], scores[method], context)
    what = "Refinement at inference (`evaluate.py --refine`), gain in mIoU and boundary IoU over the plain prediction:"
    return f"\n{what}\n\n{table(rows)}" if len(rows) > 1 else ""


def small_tables(runs, final):
    """Tables of the paper in small, one seed."""
    text = ""
    for title, methods in SMALL.items():
        there = [method for method in methods if 0 in final[method]]
        if not set(there) - {"dpa", "s4mc"}:
            continue
        at = [next(line for line in reversed(runs[m][0]) if "kept" in line and line["alpha"] >= 0.1) for m in there]
        rows = [["", *there], ["mIoU", *(f"{final[method][0]:.2f}" for method in there)]]
        rows += [["kept, % at alpha 0.1", *(f"{100 * line['kept']:.1f}" for line in at)]]
        rows += [["correct, %", *(f"{100 * line['correct']:.1f}" for line in at)]]
        text += f"\n**{title}**, seed 0 only, so that two points are noise:\n\n{table(rows)}"
    return text


def label_table(reports, keys, ways=None):
    """What ways of refining change, {column: figures of assets/labels.py by way}, with their intervals."""
    columns = [(percent, title, key) for percent in reports for title, key in keys]
    rows = [["", *(f"{percent}% of the run, {title}" for percent, title, _ in columns)]]
    for name in next(iter(reports.values()))["ways"]:
        if ways is None or name.split(": ")[-1] in ways:
            cells = [reports[percent]["ways"][name][key] for percent, _, key in columns]
            rows.append([name, *(with_interval(cell) if name != "raw" else f"{cell[0]:.2f}" for cell in cells)])
    return table(rows)


def with_interval(figures, digits=2):
    """A difference of assets/labels.py with its interval, as text."""
    return "{:+.{d}f} [{:+.{d}f}, {:+.{d}f}]".format(*figures[1:], d=digits)


def results(logs, final, inference, reports):
    """docs/results.md."""
    text = """# Results

Written by `python assets/tables.py` from the logs in [assets/logs](../assets/logs) and the reports in
[assets/labels](../assets/labels); `bash assets/reproduce.sh` repeats all but what was tried and dropped, whose code is
in the commit that its log names. mIoU of the teacher at the last step in percent, on the validation images; blank: not
run. Differences are means of paired differences over seeds with a 95% interval of Student's t. The last 30% of a run:
what it adds to the mIoU, and the pixels kept and correct in its logged steps. There S4MC's alpha falls from 0.12 to 0.
"""
    for key, runs in logs.items():
        args = next(iter(next(iter(runs.values())).values()))[0]
        commits = ", ".join(sorted({lines[0]["commit"][:7] for of in runs.values() for lines in of.values()}))
        text += f"""
## {NAMES[key[0]]}, {key[1]} labels
{NOTES[key[0]]}
{args["backbone"]}, crop {args["crop"]}, {args["batch_size"]} + {args["batch_size"]} images, {args["iters"]} steps, \
the first {args["warmup_iters"]} with only labeled images; {args["optimizer"]},
learning rates {args["lr"]} / {args["head_lr"]}; one CPU core, torch {args["torch"]}, commits {commits}.

"""
        text += training_table(runs, final[key])
        text += inference_table(runs, inference[key]) + small_tables(runs, final[key])
    text += "\n![mIoU, labels kept and labels correct over steps](../assets/curves.png)\n"
    text += "\n![What each way of refining changes, with intervals](../assets/labels.png)\n" if reports else ""
    for (dataset, labels), by_age in reports.items():
        text += f"""
## Pseudo-labels without training: {NAMES[dataset]}, {labels} labels

On {next(iter(by_age.values()))["about"]["images"]} unlabeled images whose ground truth is known, with the teachers of \
one S4MC run (seed 0): raw margins, then the
difference that each way of refining makes, with a 95% interval by bootstrap over images. Area under the risk-coverage
curve in percent (the mean error of the surest pixels over all coverages), everywhere and within 5 pixels of a contour;
recall: share of a class's pixels with a right label among the surest 80%, mean over classes.

"""
        text += label_table(by_age, (("area", "area"), ("near contours", "near area"), ("recall", "mean recall")))
        text += "\nError of the surest labels, in percent, by coverage:\n\n"
        ways = ("raw", "3x3 (paper)", "3x3, dilation 16", "3x3, dilation 16, colors 0.05", "`--context bilateral`")
        shares = [(f"{share}%", f"error at {share}") for share in (20, 40, 60, 80, 90)]
        text += label_table({30: by_age[30]} if 30 in by_age else by_age, shares, ways)
    return text


def draw(logs, final, reports):
    """The pictures: curves.png over steps; gains.png for README, every seed; labels.png, ways to use context."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    figure = Figure(figsize=(13, 3.4 * len(logs)), layout="constrained")
    for row, ((dataset, labels), runs) in zip(figure.subplots(len(logs), 3, squeeze=False), logs.items()):
        for axis, key in zip(row, ("miou", "kept", "correct")):
            for method in (method for method in DRAWN if method in runs):
                points = defaultdict(list)
                for lines in runs[method].values():
                    for line in lines[1:]:
                        if key in line:
                            points[line["step"]].append(line[key] * (1 if key == "miou" else 100))
                if points:
                    means = [statistics.mean(points[step]) for step in sorted(points)]
                    axis.plot(sorted(points), means, label=method, color=DRAWN[method])
            axis.set(title=f"{NAMES[dataset]}, {labels} labels: {key}", xlabel="step", ylabel="%")
        row[0].legend(fontsize="x-small", loc="lower right")
    figure.savefig(ASSETS / "curves.png", dpi=80)

    figure = Figure(figsize=(3.2 * len(logs), 3.2), layout="constrained")
    for axis, ((dataset, labels), _) in zip(figure.subplots(1, len(logs), squeeze=False)[0], logs.items()):
        methods = [method for method in DRAWN if method != "floor"]
        for x, method in enumerate(methods):
            values = list(final[dataset, labels][method].values())
            if not values:
                continue
            axis.plot([x] * len(values), values, "o", alpha=0.6, color=DRAWN[method])
            axis.hlines(statistics.mean(values), x - 0.3, x + 0.3, color="black")
        axis.set(title=f"{NAMES[dataset]}, {labels} labels", ylabel="mIoU, %")
        axis.set_xticks(range(len(methods)), methods, rotation=30, ha="right")
    figure.savefig(ASSETS / "gains.png", dpi=80)

    if reports:  # how much each way of refining changes, with its interval
        figure = Figure(figsize=(5 + 3.5 * len(reports), 8), layout="constrained")
        axes = figure.subplots(1, len(reports), squeeze=False, sharey=True)[0]
        for axis, ((dataset, labels), by_age) in zip(axes, reports.items()):
            percent = 30 if 30 in by_age else max(by_age)
            names = list(by_age[percent]["ways"])[::-1]
            for key, color, shift in (("area", "tab:blue", 0.15), ("near area", "tab:orange", -0.15)):
                figures = [by_age[percent]["ways"][name][key] for name in names]
                errors = [[x - low for _, x, low, _ in figures], [high - x for _, x, _, high in figures]]
                places = [y + shift for y in range(len(names))]
                axis.errorbar([x for _, x, *_ in figures], places, xerr=errors, fmt=".", color=color, label=key)
            axis.axvline(0, color="gray", linewidth=0.5)
            axis.set_yticks(range(len(names)), names, fontsize="x-small")
            axis.set(title=f"{NAMES[dataset]}, {labels} labels", xlabel="change, points (left is better)")
            axis.legend(fontsize="x-small", loc="upper left")
        figure.savefig(ASSETS / "labels.png", dpi=80)


def summary(final):
    """README's table: a method's mean over seeds, S4MC minus it, and the same pooled over all photographs."""
    rows = [["", *(f"{NAMES[dataset]}, {labels} labels" for dataset, labels in sorted(final)), "photographs, pooled"]]
    for method in ("supervised", "fixmatch", "refined-fixed", "dpa", "s4mc"):
        rows.append([METHODS[method]])
        for _, of in sorted(final.items()):
            mean = f"{statistics.mean(of[method].values()):.2f} ({len(of[method])})" if of[method] else ""
            rows[-1] += [f"{mean}: {difference(of['s4mc'], of[method])}" if mean and method != "s4mc" else mean]
        ours, theirs = photographs(final, "s4mc"), photographs(final, method)
        pairs = f"{difference(ours, theirs)} ({len(ours.keys() & theirs.keys())} pairs)"
        rows[-1] += [pairs if method != "s4mc" else ""]
    return table(rows)


def photographs(final, method):
    """{(dataset, labels, seed): final mIoU} of all runs on photographs."""
    return {(*key, seed): miou for key, of in final.items() if key[0] != "shapes" for seed, miou in of[method].items()}


def context_summary(logs, final, inference, reports):
    """README's table of wider context: why, in labels, in the student, at inference."""
    keys = [key for key in logs if key in reports or inference[key]]
    rows = [["", *(f"{NAMES[dataset]}, {labels} labels" for dataset, labels in keys)]]

    def row(title, cell, of=None):
        """A row with cell(of's entry), blank where there is none; of: a report of assets/labels.py by default."""
        found = [reports.get(key, {}).get(30) if of is None else of(key) for key in keys]
        rows.append([title, *(cell(one) if one else "" for one in found)])

    def way(report, name):
        return next(figures for title, figures in report["ways"].items() if title.split(": ")[-1] == name)

    def shared(report):
        shares = report["about"]["wrong pixels whose eight neighbors predict the same, percent by distance"]
        return f"{shares['1']:.0f}% and {shares['16']:.0f}%"

    def recall(report):
        return f"{way(report, 'raw')['mean recall'][0]:.1f}: " + with_interval(way(report, ours)["mean recall"], 1)

    ours = "`--context bilateral`"
    row("wrong pixels whose eight neighbors predict the same, 1 and 16 pixels apart", shared)
    row(
        "labels of a teacher at 30% of a run: mean error over all coverages, raw margins, %",
        lambda report: f"{way(report, 'raw')['area'][0]:.2f}",
    )
    row("the paper's 3x3, difference", lambda report: with_interval(way(report, "3x3 (paper)")["area"]))
    row(f"{ours}, difference", lambda report: with_interval(way(report, ours)["area"]))
    row(f"recall, mean over classes, of the surest 80%: raw, then the difference with {ours}", recall)
    together = difference(photographs(final, "bilateral"), photographs(final, "s4mc"))
    row(
        f"student trained with it: mIoU minus S4MC's; all photographs, paired: {together}",
        lambda of: difference(of["bilateral"], of["s4mc"]),
        lambda key: final[key],
    )

    def gain(context):
        return lambda key: ", ".join(inference_gains(logs[key]["s4mc"], inference[key]["s4mc"], context))

    def scored(key):
        return inference[key]["s4mc"] and key

    row("S4MC's teacher, refined at inference as in the paper: mIoU, boundary IoU", gain("paper"), scored)
    row(f"the same with {ours}", gain("bilateral"), scored)
    return table(rows)


def between(text, name, new):
    """The text with the new part between <!-- name --> and <!-- end of name -->."""
    before, _, rest = text.partition(f"<!-- {name} -->\n")
    _, _, after = rest.partition(f"<!-- end of {name} -->")
    return f"{before}<!-- {name} -->\n{new}<!-- end of {name} -->{after}"


def main():
    """docs/results.md, the tables in README between their marks, and the pictures."""
    (logs, final), inference, reports = read_logs(), read_inference(), read_labels()
    (ASSETS.parent / "docs" / "results.md").write_text(results(logs, final, inference, reports))
    readme = ASSETS.parent / "README.md"
    text = between(readme.read_text(), "results", summary(final))
    readme.write_text(between(text, "context", context_summary(logs, final, inference, reports)))
    draw(logs, final, reports)


if __name__ == "__main__":
    keep(sys.argv[2]) if sys.argv[1:2] == ["keep"] else main()
