"""What a checkpoint is worth: IoU per class, mIoU, pixel accuracy; panels.

    python evaluate.py runs/shapes-24-fixmatch-0/last.pth
    python evaluate.py ckpt.pth --root data --json scores.json --panels panels
    torchrun --nproc_per_node=8 evaluate.py ckpt.pth

The dataset, the classes and the network are those that the checkpoint names.
"""

import argparse
import json
import math
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torchvision.utils import draw_segmentation_masks

from data import IGNORE, InputError, evaluation_loader, normalize, open_dataset, palette
from model import DeepLabV3Plus
from refine import confidence, dpa_alpha, pseudo_labels

# ----------------------------------------------------------------------------------------------------------------------
# scores


def confusion_matrix(prediction, label, num_classes):
    """(C,C) counts, rows truth and columns prediction, over the pixels whose label is not 255."""
    counted = label != IGNORE
    pairs = label[counted].long() * num_classes + prediction[counted].long()
    return torch.bincount(pairs, minlength=num_classes**2).view(num_classes, num_classes)


def scores(confusion, classes):
    """{"miou": 0-100, "pixel_accuracy": 0-100, "iou": {class: 0-100, or None}} from a confusion matrix.

    IoU = TP / (TP + FP + FN). A class in neither truth nor prediction is None and counts nowhere.
    """
    confusion = confusion.double().cpu()
    hit, union = confusion.diag(), confusion.sum(0) + confusion.sum(1) - confusion.diag()
    present = union > 0
    iou = 100 * hit / union
    return {
        "miou": iou[present].mean().item() if present.any() else None,
        "pixel_accuracy": (100 * hit.sum() / confusion.sum()).item() if present.any() else None,
        "iou": {name: value.item() if there else None for name, value, there in zip(classes, iou, present)},
    }


@torch.no_grad()
def evaluate(model, data, items, device, workers=0, rank=0, world=1):
    """The scores of a model in evaluation mode on items at their original size, summed over all processes."""
    confusion = torch.zeros(len(data.classes), len(data.classes), dtype=torch.long, device=device)
    for image, label in evaluation_loader(data, items, workers, rank, world):
        prediction = model(normalize(image.to(device))).argmax(1)
        confusion += confusion_matrix(prediction, label.to(device), len(data.classes))
    if world > 1:
        dist.all_reduce(confusion)
    return scores(confusion, data.classes)


def table(result):
    """The scores as lines of text."""
    width = max(map(len, [*result["iou"], "pixel accuracy"]))
    rows = [*result["iou"].items(), ("mIoU", result["miou"]), ("pixel accuracy", result["pixel_accuracy"])]
    return "\n".join(f"{name:{width}}  {'absent' if value is None else f'{value:6.2f}'}" for name, value in rows)


# ----------------------------------------------------------------------------------------------------------------------
# pseudo-labels: Figs. 4 and 5


def pseudo_label_figures(prob, pseudo, batch, options):
    """Figs. 4 and 5 for one batch, summed over all processes: shares of pixels, 0..1, with and without refinement.

    kept, kept_raw: of the valid pixels, those given a label. correct, correct_raw: of the labels whose truth is known,
    those that are right. tp_change, fp_change: right and wrong labels added by refinement, of the pixels of known truth.
    """
    raw = pseudo_labels(
        prob, None, valid=batch["valid"], **options | {"refinement": False, "threshold": pseudo.threshold}
    )
    known = batch["truth"] != IGNORE
    counts = [batch["valid"].sum(), known.sum()]
    for labels in (raw, pseudo):
        judged = labels.keep & known
        counts += [labels.keep.sum(), judged.sum(), (judged & (labels.label == batch["truth"])).sum()]
    counts = torch.stack(counts)
    if dist.is_initialized():
        dist.all_reduce(counts)
    valid, known, kept_raw, judged_raw, right_raw, kept, judged, right = counts.tolist()
    figures = {"kept": kept / max(valid, 1), "kept_raw": kept_raw / max(valid, 1), "threshold": pseudo.threshold.item()}
    if known:
        figures |= {
            "correct": right / max(judged, 1),
            "correct_raw": right_raw / max(judged_raw, 1),
            "tp_change": (right - right_raw) / known,
            "fp_change": ((judged - right) - (judged_raw - right_raw)) / known,
        }
    return figures


# ----------------------------------------------------------------------------------------------------------------------
# panels: Figs. 1, 3 and 7


def overlay(image, label):
    """The image (3,H,W) uint8 under the label's colors; 255 shows the plain image, dimmed."""
    colors = palette()
    present = [c for c in label.unique().tolist() if c != IGNORE]
    dimmed = image // 3
    if not present:
        return dimmed
    masks = torch.stack([label == c for c in present])
    return draw_segmentation_masks(dimmed, masks, alpha=0.8, colors=[tuple(colors[c].tolist()) for c in present])


def heat(conf):
    """(H,W) in 0..1 -> (3,H,W) uint8: black, red, yellow, white as the model grows surer."""
    return (torch.stack([3 * conf, 3 * conf - 1, 3 * conf - 2]).clamp(0, 1) * 255).to(torch.uint8)


@torch.no_grad()
def panel(model, data, items, device, alpha, options):
    """A sheet with one row per item: image, truth, prediction, confidence and pseudo-labels without and with refinement.

    options: the keyword arguments of `refine.pseudo_labels` that the run trains with. The threshold is the alpha-quantile
    of the row's own pixels. Where a pixel has no pseudo-label the image shows, dimmed. Returns a PIL image.
    """
    titles = ("image", "truth", "teacher", "confidence", "confidence, refined", "kept", "kept, refined")
    rows = []
    for image, truth in evaluation_loader(data, items):
        prob = model(normalize(image.to(device))).float().softmax(1)
        threshold = options["threshold"]
        if threshold is None:  # not dpa_threshold, which would wait for the other processes
            conf = confidence(prob, options["kind"]).flatten()
            threshold = conf.kthvalue(1 + int(alpha * (len(conf) - 1))).values
        raw, refined = (
            pseudo_labels(prob, None, **options | {"refinement": on, "threshold": threshold}) for on in (False, True)
        )
        sure = [pseudo.confidence[0].cpu() for pseudo in (raw, refined)]
        if options["kind"] == "entropy":
            sure = [1 + conf / math.log(len(data.classes)) for conf in sure]
        labels = [truth[0], *(label[0].cpu() for label in (prob.argmax(1), raw.label, refined.label))]
        truth, teacher, *kept = (overlay(image[0], label) for label in labels)
        tiles = [image[0], truth, teacher, *map(heat, sure), *kept]
        row = torch.cat([F.pad(tile, (2, 2, 2, 2), value=255) for tile in tiles], 2).permute(1, 2, 0)
        row = Image.fromarray(row.numpy())
        row.thumbnail((260 * len(titles), row.height))  # readable at a glance, however large the images are
        rows.append(row)
    header = 14  # pixels
    sheet = Image.new("RGB", (max(row.width for row in rows), header + sum(row.height for row in rows)), "white")
    top = header
    for row in rows:
        sheet.paste(row, (0, top))
        top += row.height
    for i, title in enumerate(titles):
        ImageDraw.Draw(sheet).text((i * rows[0].width // len(titles) + 3, 1), title, fill="black")
    return sheet


def panel_items(data, count=4):
    """Unlabeled images, evenly spaced, where their truth is known; else validation images."""
    items = [item for item in data.unlabeled if item.mask is not None] or data.val
    return [items[i * len(items) // count] for i in range(min(count, len(items)))]


# ----------------------------------------------------------------------------------------------------------------------
# checkpoints


def load_checkpoint(path):
    """The dictionary that train.py saved. Nothing in the file is executed. Raises InputError."""
    if not Path(path).is_file():
        raise InputError(f"checkpoint {path} is not there; expected the last.pth or best.pth of a run")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises many kinds, all of them the file's fault
        raise InputError(
            f"checkpoint {path} could not be read ({type(error).__name__}); it is truncated, or not of train.py"
        ) from error
    lacking = {"step", "args", "classes", "labeled", "student", "teacher"} - set(
        checkpoint if isinstance(checkpoint, dict) else ()
    )
    if lacking:
        raise InputError(f"checkpoint {path} lacks {', '.join(sorted(lacking))}; expected one that train.py saved")
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
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return rank, world, device


def stop_on_input_error(main):
    """Runs main; an InputError, also one of a loader's worker, ends the program with its sentence alone."""
    try:
        main()
    except InputError as error:
        sentence = str(error).strip().splitlines()[-1].removeprefix("data.InputError: ")
        sys.exit(f"{Path(sys.argv[0]).name}: {sentence}")
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def main(argv=None):
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("checkpoint", help="last.pth or best.pth of a run")
    parser.add_argument("--root", help="folder of the dataset; default: the one the run was trained on")
    parser.add_argument("--student", action="store_true", help="score the student instead of the teacher")
    parser.add_argument("--json", metavar="FILE", help="also write the scores there")
    parser.add_argument(
        "--panels", metavar="DIR", help="also draw panels of unlabeled images there, as Figs. 1, 3 and 7"
    )
    parser.add_argument("--workers", type=int, default=0, help="loader processes")
    parser.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: the GPU where there is one"
    )
    args = parser.parse_args(argv)
    checkpoint = load_checkpoint(args.checkpoint)
    run = checkpoint["args"]
    data = open_dataset(run["dataset"], args.root or run["root"], checkpoint["labeled"])
    if list(data.classes) != list(checkpoint["classes"]):
        raise InputError(
            f"checkpoint {args.checkpoint} predicts {len(checkpoint['classes'])} classes, {data.name} has "
            f"{len(data.classes)}; expected the same classes in the same order"
        )
    for folder in (args.panels, args.json and Path(args.json).parent):
        if folder:
            Path(folder).mkdir(parents=True, exist_ok=True)
    rank, world, device = start_processes(args.device)
    model = load_model(checkpoint, args.checkpoint, "student" if args.student else "teacher").to(device)
    result = evaluate(model, data, data.val, device, args.workers, rank, world)
    if rank != 0:
        return
    print(
        f"{args.checkpoint}: step {checkpoint['step']}, {len(data.val)} validation images of {data.name}\n{table(result)}"
    )
    if args.json:
        result |= {
            "checkpoint": str(args.checkpoint),
            "step": checkpoint["step"],
            "dataset": data.name,
            "images": len(data.val),
        }
        Path(args.json).write_text(json.dumps(result, indent=2) + "\n")
    if args.panels:
        prior = checkpoint.get("prior")
        options = refinement_options(run, None if prior is None else prior.to(device))
        file = Path(args.panels) / f"step-{checkpoint['step']:06d}.png"
        panel(
            model, data, panel_items(data), device, dpa_alpha(checkpoint["step"], run["iters"], run["alpha0"]), options
        ).save(file)
        print(f"wrote {file}")


if __name__ == "__main__":
    stop_on_input_error(main)
