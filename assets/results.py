"""Write the tables of docs/results.md, docs/benchmarks.md and README.md, and results.png, from assets/logs.

    python assets/results.py keep fair runs/results/fair/183-s4mc-0 ...  # finished runs, shortened, into assets/logs
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
PAGES = [ASSETS.parent / name for name in ("docs/results.md", "docs/benchmarks.md", "README.md")]
METHODS = {  # in the order of the tables: title, options of train.py
    "supervised": ("supervised", "--framework supervised"),
    "fixmatch": ("FixMatch", "--no-s4mc"),
    "fixmatch-ema": ("FixMatch with `--ema 0.95`", "--no-s4mc --ema 0.95"),
    "two-views": ("FixMatch with two strong views, `--framework unimatch`", "--framework unimatch --no-s4mc"),
    "dpa": ("DPA without refinement", "--no-refinement"),
    "dpa-lower": ("DPA with `--alpha0 0.337`, which keeps as many pixels as S4MC", "--no-refinement --alpha0 0.337"),
    "s4mc": ("S4MC + FixMatch (the paper)", ""),
    "s4mc-warm": ("S4MC, the first 300 steps with labeled images only", "--warmup-iters 300"),
    "preset": ("S4MC, `--unsup-norm valid --floor 0.95` [ours]", "--unsup-norm valid --floor 0.95"),
    "preset-high": (
        "S4MC [ours] with `--lr 5e-4 --head-lr 5e-3`",
        "--unsup-norm valid --floor 0.95 --lr 5e-4 --head-lr 5e-3",
    ),
    "preset-ema": ("S4MC [ours] with `--ema 0.95`", "--unsup-norm valid --floor 0.95 --ema 0.95"),
    "preset-views": ("S4MC [ours] with two views", "--framework unimatch --unsup-norm valid --floor 0.95"),
    "preset-long": ("S4MC [ours] with 3,000 steps", "--unsup-norm valid --floor 0.95 --iters 3000"),
    "amp": ("S4MC [ours] with `--amp`", "--unsup-norm valid --floor 0.95 --amp"),
    "rival": ("Unet of segmentation_models_pytorch, supervised", None),
}
PAIRS = (  # one method minus another
    ("what refinement adds: S4MC - DPA", "s4mc", "dpa"),
    ("the same at equal kept: S4MC - DPA with `--alpha0 0.337`", "s4mc", "dpa-lower"),
    ("S4MC - supervised", "s4mc", "supervised"),
    ("preset of photographs - FixMatch", "preset", "fixmatch"),
)
SETTINGS = {  # title, dataset, lists
    "fair": ("PASCAL VOC 2012, 256 pixels, 5,398 training photographs", "pascal", ("183", "732", "92")),
    "camvid": ("CamVid, 480 x 360, 46 labels, 321 unlabeled photographs", "camvid", ("46",)),
    "camvid192": ("The same photographs, with the preset", "camvid", ("46",)),
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
    """Copy what the tables need of a finished run into assets/logs; other programs' too, with an args.json."""
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
    """{method: {(list, seed): lines of the log}}; raises SystemExit if runs differ in an argument of SAME."""
    runs, first = defaultdict(dict), {}
    for path in sorted((ASSETS / "logs").glob(f"{settings}-*.jsonl")):
        labeled, *method, seed = path.stem.removeprefix(f"{settings}-").split("-")
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        runs["-".join(method)][labeled, int(seed)] = lines
        own = METHODS.get("-".join(method), ["", ""])[1] or ""  # options that the method itself sets
        for name in (name for name in SAME if name in lines[0] and f"--{name.replace('_', '-')} " not in own):
            if lines[0][name] != first.setdefault(name, lines[0][name]):
                raise SystemExit(f"{path.name}: {name} is {lines[0][name]}, in others {first[name]}; rename it")
    if unknown := runs.keys() - METHODS.keys():
        raise SystemExit(f"assets/logs has runs of {unknown.pop()}, which is not in METHODS; add it there")
    return {method: runs[method] for method in METHODS if method in runs}


def measure(lines, dataset=None):
    """{measure: percent} of one run: its last evaluation, and the labels in the last 30% of its logged steps."""
    last = lines[-1]
    found = {"mIoU": last["miou"]} | {"boundary IoU": last[key] for key in ["boundary_miou"] if key in last}
    if dataset:
        found["rarest third"] = mean(last["iou"][name] for name in RARE[dataset])
    late = [line for line in lines[1:] if "correct" in line and line["step"] > 0.7 * last["step"]]
    return found | {f"{key}, %": 100 * mean(line[key] for line in late) for key in ("kept", "correct") if late}


def scores_of(settings, dataset=None):
    """{method: {(list, seed): {measure: percent}}}."""
    return {method: {key: measure(of[key], dataset) for key in of} for method, of in read(settings).items()}


def difference(one, other):
    """Return the mean of paired differences as text, with a 95% interval if there are three pairs or more."""
    paired = [one[key] - other[key] for key in one if key in other]
    half = f" ± {T95[len(paired)] * stdev(paired) / len(paired) ** 0.5:.2f}" if len(paired) > 2 else ""
    return f"{mean(paired):+.2f}{half}" if paired else ""


def values(scores, method, name, labeled):
    """{(list, seed): one measure of a method's runs of a list}."""
    runs = scores.get(method, {}).items()
    return {key: found[name] for key, found in runs if key[0] == labeled and name in found}


def table(head, rows):
    """Markdown; rows without a number are left out."""
    lines = [["", *head], *(row for row in rows if any(row[1:]))]
    lines = [f"| {' | '.join(row)} |\n" for row in lines]
    return "".join([lines[0], f"|{'---|' * (len(head) + 1)}\n", *lines[1:]])


def method_table(scores, columns):
    """A row per method; columns (title, measure, list): mean (number of seeds): paired difference to FixMatch."""
    rows = []
    for method in scores:
        rows.append([METHODS[method][0]])
        for _, name, labeled in columns:
            one = values(scores, method, name, labeled)
            base = values(scores, "fixmatch", name, labeled) if name in MEASURES[:3] and method != "fixmatch" else {}
            text = f"{mean(one.values()):.2f}" + f" ({len(one)})" * (name == "mIoU") if one else ""
            rows[-1] += [": ".join(filter(None, [text, difference(one, base)]))]
    return table([title for title, *_ in columns], rows)


def pair_table(scores, columns):
    """Return the same for PAIRS: one method minus another."""
    rows = [[title] for title, *_ in PAIRS]
    for row, (_, *pair) in zip(rows, PAIRS):
        row += [difference(*(values(scores, method, *column[1:]) for method in pair)) for column in columns]
    return table([title for title, *_ in columns], rows) if any(any(row[1:]) for row in rows) else ""


def seed_table(scores, columns):
    """A row per method: the mean mIoU, and that of each seed."""
    rows = []
    for method in scores:
        rows.append([METHODS[method][0]])
        for _, name, labeled in columns:
            one = [miou for _, miou in sorted(values(scores, method, name, labeled).items())]
            rows[-1] += [f"{mean(one):.1f} ({', '.join(f'{miou:.1f}' for miou in one)})" if one else ""]
    return table([title for title, *_ in columns], rows)


def sections(settings):
    """(for README, for results.md): Markdown of the runs of one settings."""
    title, dataset, lists = SETTINGS[settings]
    every = [of[key][0] for of in read(settings).values() for key in sorted(of)]
    args = every[0]
    commits = ", ".join(sorted({(of.get("commit") or "?")[:7] for of in every}))
    about = (
        f"**{title}**: {args['backbone']}, crop {args['crop']}.\n"
        f"{args['iters']:,} steps of {args['batch_size']} labeled and {args['batch_size']} unlabeled images, the first "
        f"{args['warmup_iters']} with labeled images only. {args['optimizer']}, "
        f"learning rates {args['lr']} / {args['head_lr']}."
    )
    scores = scores_of(settings, dataset)
    columns = [(name, name, lists[0]) for name in MEASURES]
    if len(lists) > 1:
        columns = [(f"{name}, {labeled} labels", name, labeled) for _, name, labeled in columns]
    more = [(f"mIoU, {labeled} labels", "mIoU", labeled) for labeled in lists[1:]]
    tables = [method_table(scores, columns + more), pair_table(scores, columns[:3] + more)]
    several = {method: of for method, of in scores.items() if len(values(scores, method, "mIoU", lists[0])) > 1}
    short = [(name, name, lists[0]) for name in MEASURES[:3]]
    readme = f"{about.replace('**:', f', {lists[0]} labels**:')}\n\n{method_table(several, short)}"
    return readme, f"{about}\ntorch {args['torch']}, project at {commits}.\n\n" + "\n".join(filter(None, tables))


def parts():
    """{mark: Markdown} for the pages."""
    found = {settings: sections(settings)[1] for settings in SETTINGS}
    found["results"] = sections("fair")[0]
    found["rarest"] = "".join(f"{dataset}: {', '.join(names)}.\n" for dataset, names in RARE.items())
    columns = [(f"{time} minutes", "mIoU", f"{time}min") for time in (2, 5, 15)]
    people = scores_of("people")
    found["people"] = seed_table(people, columns)
    found["camvid25"] = seed_table(scores_of("camvid25"), [("7 to 8 minutes", "mIoU", "7min")])
    shown = ("supervised", "preset", "preset-high", "rival")
    found["masks"] = seed_table({method: people[method] for method in shown}, columns[1:])
    shapes = scores_of("shapes")
    ours, alone = (values(shapes, method, "mIoU", "24") for method in ("s4mc", "supervised"))
    found["shapes"] = (
        f"Generated shapes, 24 labels, {len(alone)} seeds: supervised {mean(alone.values()):.2f}, S4MC "
        f"{mean(ours.values()):.2f}, {difference(ours, alone)}.\n"
    )
    return found


def draw():
    """results.png: labels kept and correct over steps; mIoU of single runs, and their differences to FixMatch."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    runs, scores = read("fair"), scores_of("fair", "pascal")
    figure = Figure(figsize=(14, 4.2), layout="constrained")
    labels, points, differences = figure.subplots(1, 3)
    base = {name: values(scores, "fixmatch", name, "183") for name in MEASURES[:2]}
    for place, method in enumerate(scores):
        for key, style in (("kept", "-"), ("correct", ":")):
            for (labeled, _), of in runs[method].items():
                steps = {line["step"]: 100 * line[key] for line in of if line.get("kept") and labeled == "183"}
                labels.plot(list(steps), list(steps.values()), style, color=f"C{place}")
        own = values(scores, method, "mIoU", "183")
        points.plot(list(own.values()), [place] * len(own), "o", color=f"C{place}")
        for name, mark in (("mIoU", "o"), ("boundary IoU", "|")):
            both = values(scores, method, name, "183")
            gains = [both[key] - base[name][key] for key in both if key in base[name]]
            differences.plot(gains, [place] * len(gains), mark, color=f"C{place}", markersize=8)
    labels.set(title="labels kept (line), correct (dots)", xlabel="step", ylabel="%")
    points.set(title="mIoU of each run", xlabel="%")
    differences.set(title="minus FixMatch, same seed", xlabel="points of mIoU (o), boundary IoU (|)")
    points.set_yticks(range(len(scores)), [METHODS[method][0].replace("`", "").split(",")[0] for method in scores])
    differences.set_yticks(range(len(scores)), [""] * len(scores))
    for axis in (points, differences):
        axis.invert_yaxis()
        axis.grid(alpha=0.3)
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
