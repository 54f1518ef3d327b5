"""Tables of docs/results.md and README.md, between their marks, and results.png, from assets/logs.

    python assets/results.py keep cpu runs/results/cpu/92-s4mc-0 ...     # finished runs, shortened, into assets/logs
    python assets/results.py                                             # tables; the plot if matplotlib is installed

A run's folder is LIST-METHOD-SEED, its log SETTINGS-LIST-METHOD-SEED.jsonl: first arguments and commit, then metrics.
"""

import json
import re
import sys
from collections import defaultdict
from pathlib import Path
from statistics import mean, stdev

ASSETS = Path(__file__).resolve().parent
PAGES = (ASSETS.parent / "docs" / "results.md", ASSETS.parent / "README.md")
VARIANT = "--framework unimatch --unsup-norm valid --floor"
METHODS = {  # in the order of the tables: title, options of train.py; methods that only have logs come after these
    "supervised": ("supervised, equal steps", "--framework supervised"),
    "fixmatch": ("FixMatch", "--no-s4mc"),
    "cutmixseg": ("CutMix-Seg", "--framework cutmixseg --no-s4mc"),
    "dpa": ("DPA without refinement", "--no-refinement"),
    "s4mc-cutmixseg": ("S4MC + CutMix-Seg", "--framework cutmixseg"),
    "s4mc": ("S4MC + FixMatch (the paper)", ""),
    "two-streams": ("two views, FixMatch's threshold", "--framework unimatch --no-s4mc"),
    "variant": ("S4MC, two views, `--unsup-norm valid --floor 0.95` [ours]", f"{VARIANT} 0.95"),
    "floor-0.9": ("the same with a floor of 0.9", f"{VARIANT} 0.9"),
    "floor-0.97": ("the same with a floor of 0.97", f"{VARIANT} 0.97"),
    "one-stream": ("S4MC, one view, floor 0.95", "--unsup-norm valid --floor 0.95"),
    "fixmatch-fine": ("FixMatch, unlabeled: the rest of 1,464", "--no-s4mc"),
    "fixmatch-long": ("FixMatch, 3,000 steps", "--no-s4mc --iters 3000"),
    "one-stream-long": ("S4MC, one view, floor 0.95, 3,000 steps", "--unsup-norm valid --floor 0.95 --iters 3000"),
    "rival-fixmatch": ("UniMatch's own fixmatch.py loop", None),
    "rival-unimatch": ("UniMatch's own unimatch.py loop", None),
}
PAIRS = (  # one method minus another
    ("what refinement adds: S4MC - DPA", "s4mc", "dpa"),
    ("S4MC + FixMatch - supervised", "s4mc", "supervised"),
    ("S4MC + CutMix-Seg - CutMix-Seg", "s4mc-cutmixseg", "cutmixseg"),
    ("variant - two views, FixMatch's threshold", "variant", "two-streams"),
    ("variant - one view", "variant", "one-stream"),
    ("variant - FixMatch, 3,000 steps", "variant", "fixmatch-long"),
    ("FixMatch, 3,000 steps - two views, FixMatch's threshold", "fixmatch-long", "two-streams"),
    ("one view, 3,000 steps - FixMatch, 3,000 steps", "one-stream-long", "fixmatch-long"),
    ("one view, 3,000 steps - variant", "one-stream-long", "variant"),
    ("variant - UniMatch's own unimatch.py loop", "variant", "rival-unimatch"),
    ("FixMatch - UniMatch's own fixmatch.py loop", "fixmatch", "rival-fixmatch"),
)
SETTINGS = {  # title, dataset, lists
    "h200": ("One H200, 256 pixels, 186 labels, 3,493 unlabeled photographs", "pascal", ("186",)),
    "gpu": ("One GPU, 256 pixels, all others of 6,932 unlabeled", "pascal", ("92", "183", "366", "732", "1464")),
    "cpu": ("Two cores, 160 pixels, all others of 6,932 unlabeled", "pascal", ("92", "183", "366", "732", "1464")),
    "camvid": ("CamVid, 480 x 360, 46 labels, 321 unlabeled photographs", "camvid", ("46",)),
}
SAME = "backbone crop batch_size optimizer lr head_lr weight_decay eval_mode".split()  # in all runs of one settings
MACHINE = "root splits labeled out weights".split()  # arguments that are paths; the list is in the log's name
CLASSES = {  # the rarest first, by labeled pixels: of PASCAL's list 1464, of all of CamVid's training masks
    "pascal": (
        "bicycle", "bottle", "boat", "potted plant", "aeroplane", "cow", "bird", "sheep", "tv monitor", "horse",
        "motorbike", "chair", "dining table", "car", "sofa", "train", "bus", "dog", "cat", "person", "background",
    ),
    "camvid": (
        "bicyclist", "pedestrian", "pole", "fence", "sign symbol", "pavement", "car", "tree", "sky", "building", "road",
    ),
}  # fmt: skip
RARE = {dataset: classes[: round(len(classes) / 3)] for dataset, classes in CLASSES.items()}
MEASURES = ("mIoU", "boundary IoU", "rarest third", "kept, %", "correct, %")
T95 = dict(  # two-sided 95% quantiles of Student's t, by the number of pairs
    enumerate(
        (4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160)
        + (2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064),
        start=3,
    )
)


def keep(settings, run):
    """Copies what the tables need of a finished run into assets/logs; a rival's needs args.json with iters."""
    args = json.loads((run / "args.json").read_text())
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    if lines[-1]["event"] != "val" or lines[-1]["step"] != args["iters"]:
        raise SystemExit(f"{run} is at step {lines[-1]['step']} of {args['iters']}; finish it first")
    kept = [json.dumps({name: args[name] for name in args if name not in MACHINE})]
    wanted = "event step kept kept_raw correct correct_raw miou boundary_miou iou".split()
    for line in lines:
        if line["event"] == "val" or ("kept" in line and line["step"] % 50 == 0):
            text = json.dumps({name: line[name] for name in wanted if name in line})
            kept.append(json.dumps(json.loads(text, parse_float=lambda digits: round(float(digits), 4))))
    (ASSETS / "logs" / f"{settings}-{run.name}.jsonl").write_text("\n".join(kept) + "\n")


def read(settings):
    """{method: {(list, seed): lines of the log}}; raises SystemExit if runs differ in what makes the settings."""
    runs, first = defaultdict(dict), {}
    for path in sorted((ASSETS / "logs").glob(f"{settings}-*.jsonl")):
        labeled, *method, seed = path.stem.removeprefix(f"{settings}-").split("-")
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        runs["-".join(method)][labeled, int(seed)] = lines
        for name in (name for name in SAME if name in lines[0]):
            if lines[0][name] != first.setdefault(name, lines[0][name]):
                raise SystemExit(f"{path.name}: {name} is {lines[0][name]}, in others {first[name]}; rename it")
    return {method: runs[method] for method in [*METHODS, *sorted(runs.keys() - METHODS)] if method in runs}


def measure(lines, dataset=None):
    """{measure: percent} of one run: its last evaluation, and the labels in the last 30% of its logged steps."""
    last = lines[-1]
    found = {"mIoU": last["miou"], "boundary IoU": last["boundary_miou"]}
    if dataset:
        rare, others = RARE[dataset], set(last["iou"]) - set(RARE[dataset])
        means = {"rarest third": rare, "other classes": others}
        found |= last["iou"] | {title: mean(last["iou"][name] for name in names) for title, names in means.items()}
    late = [line for line in lines[1:] if "correct" in line and line["step"] > 0.7 * last["step"]]
    return found | {f"{key}, %": 100 * mean(line[key] for line in late) for key in ("kept", "correct") if late}


def difference(one, other, lists=1):
    """The mean of paired differences over the keys of both, from three pairs on with its 95% interval, as text; empty
    if they are of fewer lists."""
    both = [key for key in one if key in other]
    if lists > 1 and len({labeled for labeled, _ in both}) < lists:
        return ""
    paired = [one[key] - other[key] for key in both]
    half = f" ± {T95[len(paired)] * stdev(paired) / len(paired) ** 0.5:.2f}" if len(paired) > 2 else ""
    return f"{mean(paired):+.2f}{half}" if paired else ""


def values(scores, method, name, labeled):
    """{(list, seed): one measure of a method's runs}, of one list, or of all if `labeled` is None."""
    runs = scores.get(method, {}).items()
    return {key: found[name] for key, found in runs if labeled in (None, key[0]) and name in found}


def table(head, rows):
    """Markdown; rows without a figure are left out."""
    lines = [["", *head], *(row for row in rows if any(row[1:]))]
    lines = [f"| {' | '.join(row)} |\n" for row in lines]
    return "".join([lines[0], f"|{'---|' * (len(head) + 1)}\n", *lines[1:]])


def method_table(scores, columns):
    """A row per method; columns (title, measure, list): mean (number of seeds): paired difference to FixMatch."""
    rows = []
    for method in scores:
        rows.append([METHODS.get(method, (method,))[0]])
        for _, name, labeled in columns:
            one = values(scores, method, name, labeled)
            base = values(scores, "fixmatch", name, labeled) if name in MEASURES[:3] else {}
            change = difference(one, base, 1 if labeled else 2)
            text = f"{mean(one.values()):.2f}" + f" ({len(one)})" * (name == "mIoU") if one else ""
            parts = [text if labeled else "", change if method != "fixmatch" else ""]
            rows[-1] += [": ".join(filter(None, parts))]
    return table([title for title, *_ in columns], rows)


def pair_table(scores, columns):
    """The same of PAIRS, a method minus another."""
    rows = [[title] for title, *_ in PAIRS]
    for row, (_, *pair) in zip(rows, PAIRS):
        for _, name, labeled in columns:
            row += [difference(*(values(scores, method, name, labeled) for method in pair), 1 if labeled else 2)]
    return table([title for title, *_ in columns], rows) if any(any(row[1:]) for row in rows) else ""


def sections(settings):
    """(for README, for results.md): Markdown of the runs of one settings, empty if there are none."""
    title, dataset, lists = SETTINGS[settings]
    runs = read(settings)
    if not runs:
        return "", f"{title}: not run yet.\n"
    every = [lines for of in runs.values() for lines in of.values()]
    lists = [labeled for labeled in lists if any(labeled == key[0] for of in runs.values() for key in of)]
    args = next(iter(runs.get("fixmatch", next(iter(runs.values()))).values()))[0]
    title += "" if len(lists) > 1 or "labels" in title else f", {lists[0]} labels"
    commits = ", ".join(sorted({(lines[0].get("commit") or "?")[:7] for lines in every}))
    about = (
        f"**{title}**: {args['backbone']}, crop {args['crop']}, {args['batch_size']} + {args['batch_size']} images,\n"
        f"{args['iters']:,} steps, the first {args['warmup_iters']} with labeled images only, {args['optimizer']}, "
        f"learning rates {args['lr']} / {args['head_lr']}."
    )
    scores = {method: {key: measure(of[key], dataset) for key in of} for method, of in runs.items()}
    most = max(lists, key=lambda labeled: sum(key[0] == labeled for of in runs.values() for key in of))
    first = [(name, name, most) for name in MEASURES]
    if len(lists) == 1:
        by, short = [first], first[:3]
    else:
        short = [*((f"{labeled} labels", "mIoU", labeled) for labeled in lists), ("all lists, paired", "mIoU", None)]
        more = [(f"{name}, {most} labels", name, most) for name, *_ in first[1:]]
        by = [short, [*more, *((f"{name}, all lists, paired", name, None) for name in MEASURES[1:3])]]
    tables = [method_table(scores, columns) for columns in by]
    tables += filter(None, [pair_table(scores, short)])
    readme = f"{about}\n\n{method_table(scores, short)}"
    return readme, f"{about}\ntorch {args['torch']}, project at {commits}.\n\n" + "\n".join(tables)


def parts():
    """{mark: Markdown} for the pages."""
    both = {settings: sections(settings) for settings in SETTINGS}
    found = {settings: text for settings, (_, text) in both.items()}
    found["results"] = both["h200"][0]
    found["rarest"] = "".join(f"{dataset}: {', '.join(names)}.\n" for dataset, names in RARE.items())
    gpu = {method: {key: measure(of[key], "pascal") for key in of} for method, of in read("h200").items()}
    columns = [*RARE["pascal"], "other classes"]
    found["classes"] = method_table(gpu, [(name, name, "186") for name in columns])
    shapes = {method: {key: measure(of[key]) for key in of} for method, of in read("shapes").items()}
    ours, alone = (values(shapes, method, "mIoU", "24") for method in ("s4mc", "supervised"))
    found["shapes"] = (
        f"Generated shapes, 24 labels, {len(alone)} seeds: supervised {mean(alone.values()):.2f}, S4MC "
        f"{mean(ours.values()):.2f}, {difference(ours, alone)}.\n"
    )
    return found


def draw():
    """results.png: labels kept and correct over steps; IoU by class against FixMatch; mIoU by number of labels."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    gpu, cpu = read("h200"), read("cpu")
    cpu = {method: runs for method, runs in cpu.items() if len({labeled for labeled, _ in runs}) > 2}
    figure = Figure(figsize=(15 if cpu else 10, 3.8), layout="constrained")
    labels, classes, *lists = figure.subplots(1, 2 + bool(cpu), width_ratios=(1, 1.6, 1)[: 2 + bool(cpu)])
    colors = {method: f"C{number}" for number, method in enumerate(METHODS)}
    base = {key: lines[-1]["iou"] for key, lines in gpu["fixmatch"].items()}
    for method, runs in gpu.items():
        for key, style in (("kept", "-"), ("correct", ":")):
            lines = [{line["step"]: line[key] for line in of if key in line} for of in runs.values()]
            means = [100 * mean(of[step] for of in lines) for step in lines[0]]
            labels.plot([*lines[0]], means, style, color=colors[method])
        gains = [mean(runs[key][-1]["iou"][name] - base[key][name] for key in base) for name in CLASSES["pascal"]]
        style = "-" if method == "fixmatch" else "o"
        classes.plot(gains, style, color=colors[method], label=METHODS[method][0], alpha=0.8)
    labels.set(title="labels kept (line), correct (dots), 186 labels", xlabel="step", ylabel="%")
    classes.set(title="IoU by class minus FixMatch's, 186 labels, the rarest class first", ylabel="points")
    classes.set_xticks(range(21), CLASSES["pascal"], rotation=60, ha="right", fontsize="small")
    classes.legend(fontsize="small")
    for axis in lists:
        for method, runs in cpu.items():
            points = sorted((int(labeled), lines[-1]["miou"]) for (labeled, _), lines in runs.items())
            axis.plot(*zip(*points), ".", color=colors.get(method, "black"), label=METHODS[method][0][:30])
        axis.set(title="mIoU of single runs, two cores", xlabel="labels", xscale="log", ylabel="%")
        seen = sorted({int(labeled) for runs in cpu.values() for labeled, _ in runs})
        axis.set_xticks(seen, seen)
        axis.minorticks_off()
        axis.legend(fontsize="small", loc="upper left", bbox_to_anchor=(1, 1))
    figure.savefig(ASSETS / "results.png", dpi=80)


def main():
    """The pages and the plot."""
    found = parts()
    for page in PAGES:
        marks = r"(<!-- (\w+) -->\n).*?(<!-- end of \2 -->)"
        page.write_text(re.sub(marks, lambda m: m[1] + found[m[2]] + m[3], page.read_text(), flags=re.DOTALL))
    draw()


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["keep", settings, *runs]:
            for run in runs:
                keep(settings, Path(run))
        case ["options", method]:  # for reproduce.sh
            print(METHODS[method][1])
        case _:
            main()
