"""Predict masks for new images with the teacher of a checkpoint.

    python tools/predict.py runs/first/last.pth --images photographs --masks predicted --confidence
    python tools/predict.py runs/first/last.pth --images one.jpg --masks proposed --pseudo-labels  # 255: unsure
    torchrun --nproc_per_node=8 tools/predict.py runs/first/last.pth --images photographs --masks predicted

Writes OUT/NAME.png, the class indices with a palette; OUT-overlays/NAME.png, the image under the colors; OUT-sheet.png,
twelve images beside their overlays; with --confidence OUT-confidence/NAME.png, the margin between the best two classes,
0..255; and with --probabilities OUT-probabilities/NAME.npz: prob (C,H,W) float16, and classes, their names. A mask that
is there already is kept. Transparent pixels get 255.
"""

import argparse
import os
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import ImageOps
from torch.utils.data import DataLoader
from torchvision.transforms.v2 import functional as VF
from torchvision.utils import make_grid

sys.path[:0] = map(str, Path(__file__).resolve().parents[:2])

from data import IGNORE, READABLE, InputError, open_image, rank_and_world, save_mask, suffix, walk  # noqa: E402
from evaluate import Protocol, image_threshold, label_options, last_line, number, overlay, predict  # noqa: E402
from evaluate import refinement_options, run_script  # noqa: E402
from model import all_reduce, load_checkpoint, load_network, start_processes  # noqa: E402
from own_images import left_out  # noqa: E402
from refine import confidence, pseudo_labels  # noqa: E402

SHEET = 12  # images on the contact sheet
TILE = 240  # pixels, side of an image there
LARGE = 1024  # pixels; images with a longer side are predicted in windows of that side, to fit into memory


def name_images(paths, below):
    """Return {name of the mask, without .png: image}. The name holds the suffix if two images differ only in theirs."""
    names = {path: path.relative_to(below).with_suffix("").as_posix() for path in paths}
    twice = Counter(names.values())
    return {path.relative_to(below).as_posix() if twice[name] > 1 else name: path for path, name in names.items()}


def load(pair):
    """Return (id, path, image (1,4,H,W) uint8 with alpha, or the sentence that says why it cannot be read)."""
    try:
        return *pair, VF.pil_to_tensor(open_image(pair[1], "RGBA"))[None]
    except InputError as error:
        return *pair, str(error)


def parse_args(argv=None):
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("checkpoint", help="last.pth or best.pth of a run")
    add("--images", required=True, metavar="DIR", help="folder of images, nested or not, or one image")
    add("--masks", required=True, metavar="OUT", help="folder for the masks, outside of DIR")
    add("--pseudo-labels", action="store_true", help="255 where the run's method gives no label")
    add("--threshold", type=float, help="of --pseudo-labels; default: the run's, or the alpha0-quantile of each image")
    add("--confidence", action="store_true", help="also write the margin as gray images")
    add("--probabilities", action="store_true", help="also write every class's probability; large files")
    add("--shrink", type=number(int, 32), metavar="N", help="predict images as large as own_images.py --shrink N makes")
    add("--eval-mode", choices=("original", "sliding"), help=f"default: original, windows of {LARGE} pixels above")
    add("--tta", action="store_true", help="mean over flips and the scales 0.75, 1 and 1.25")
    add("--refine", action="store_true", help="refine the prediction, Sec. 4.2, with the run's options")
    add("--bilateral", action="store_true", help="first the mean with the mirrored image, filtered by color [ours]")
    add("--workers", type=number(int, 0), default=0, help="loader processes of each process; default: 0")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: the GPU where there is one")
    args = parser.parse_args(argv)
    if args.threshold is not None and not args.pseudo_labels:
        parser.error("--threshold says which pixels get a pseudo-label; expected --pseudo-labels beside it")
    if args.refine and args.pseudo_labels:
        parser.error("--pseudo-labels refines as the run did; expected it without --refine")
    return args


def extra_files(out, id, args):
    """Return {kind: file} of what is written for an image beside its mask."""
    kinds = {"overlays": "png"}
    if args.confidence:
        kinds["confidence"] = "png"
    if args.probabilities:
        kinds["probabilities"] = "npz"
    return {kind: out.with_name(f"{out.name}-{kind}") / f"{id}.{end}" for kind, end in kinds.items()}


def probabilities(network, image, args, run, refinement):
    """Return the probabilities (1,C,H,W) of an image (1,3,H,W) uint8."""
    size = image.shape[-2:]
    share = min(1, (args.shrink or LARGE**2) / max(size))
    small = VF.resize(image, [max(1, round(side * share)) for side in size])
    eval_mode, crop = args.eval_mode, run["crop"]
    if eval_mode is None:
        eval_mode, crop = "sliding" if max(small.shape[-2:]) > LARGE else "original", LARGE
    prob = predict(network, small, Protocol(eval_mode, crop, args.tta, refinement, args.bilateral))
    return F.interpolate(prob, size, mode="bilinear") if share < 1 else prob


def labels(prob, args, run, options):
    """Return the class of each pixel (H,W) uint8, 255 where --pseudo-labels gives none."""
    if not args.pseudo_labels:
        return prob.argmax(1)[0].to("cpu", torch.uint8)
    threshold = image_threshold(prob, run) if args.threshold is None else args.threshold
    pseudo = pseudo_labels(prob, None, **options | {"threshold": threshold})
    return pseudo.label[0].to("cpu", torch.uint8)


def save(prob, label, image, path, files, classes):
    """Write everything that belongs to an image (3,H,W); the mask last, because it says that this image is done."""
    for kind, file in files.items():
        file.parent.mkdir(parents=True, exist_ok=True)
        if kind == "probabilities":
            np.savez_compressed(file, prob=prob[0].half().cpu().numpy(), classes=classes)
        elif kind == "confidence":
            VF.to_pil_image((255 * confidence(prob)).round().to("cpu", torch.uint8)).save(file)
        else:
            VF.to_pil_image(overlay(image, label, dim=1, opacity=0.5)).save(file)
    save_mask(label, path)


def write_sheet(out, paths, args):
    """Write up to SHEET images, evenly spaced, beside their overlays, to OUT-sheet.png. Return the file, or None if
    there are none."""
    files = {path: extra_files(out, id, args)["overlays"] for id, path in paths.items()}
    pairs = [(path, file) for path, file in files.items() if file.exists()]
    if not pairs:
        return None
    count, tiles = min(SHEET, len(pairs)), []
    for pair in (pairs[i * len(pairs) // count] for i in range(count)):
        for path in pair:
            tile = ImageOps.pad(open_image(path, "RGB"), (TILE, TILE), color="white")
            tiles.append(VF.pil_to_tensor(tile))
    sheet = out.with_name(f"{out.name}-sheet.png")
    part = sheet.with_name(f"{sheet.name}.tmp")
    VF.to_pil_image(make_grid(tiles, nrow=6, pad_value=255)).save(part, "PNG")
    os.replace(part, sheet)
    return sheet


@torch.no_grad()
def main(args):
    """Write the masks that are not there yet. Raises InputError for unreadable images, after all others are done."""
    folder, out = Path(args.images), Path(args.masks).resolve()
    found = [folder] if folder.is_file() else list(walk(folder))
    others = left_out(found)
    images = [path for path in found if suffix(path) in READABLE]
    if not images:
        raise InputError(f"--images {folder} has no image; expected one, or a folder of images; {others or 'add some'}")
    if out.is_relative_to(folder.resolve()):
        raise InputError(f"--masks {args.masks} lies in --images {folder}, among what is predicted; use another folder")
    paths = name_images(images, folder.parent if folder.is_file() else folder)
    checkpoint = load_checkpoint(args.checkpoint)
    run, prior, classes = checkpoint["args"], checkpoint.get("prior"), checkpoint["classes"]
    device = start_processes(args.device)
    rank, world = rank_and_world()
    network = load_network(checkpoint).to(device, memory_format=torch.channels_last)
    refinement = refinement_options(run, prior) if args.refine else None
    options = label_options(run, prior)

    mine = list(paths.items())[rank::world]
    missing = [(id, path) for id, path in mine if not os.path.exists(out / f"{id}.png")]
    kept = [id for id, _ in mine if os.path.exists(out / f"{id}.png")]
    lacking = sum(not file.exists() for id in kept for file in extra_files(out, id, args).values())
    failed = 0
    loader = DataLoader(missing, batch_size=None, collate_fn=load, num_workers=args.workers)
    for done, (id, path, image) in enumerate(loader, 1):
        problem = image if isinstance(image, str) else ""
        try:
            if not problem:
                prob = probabilities(network, image[:, :3].to(device), args, run, refinement)
                label = labels(prob, args, run, options).masked_fill(image[0, 3] == 0, IGNORE)
                save(prob, label, image[0, :3], out / f"{id}.png", extra_files(out, id, args), classes)
        except (OSError, MemoryError, RuntimeError) as error:  # a name too long, a full disk, no memory for its size
            problem = f"{path} has no mask: {last_line(error)}"
        if problem:
            print(problem, file=sys.stderr)
            failed += 1
        if rank == 0 and done % 100 == 0:
            print(f"{done} of {len(missing)} images", flush=True)

    counts = torch.tensor([len(missing) - failed, len(kept), lacking, failed], device=device)
    written, kept, lacking, failed = all_reduce(counts).tolist()
    if rank != 0:
        return
    if others:
        print(others)
    if kept:
        print(f"{kept} masks were in {args.masks} already and are kept, whatever checkpoint and options made them")
    if lacking:
        print(f"{lacking} files beside them, such as of --confidence, are not written; use another --masks to have all")
    names = ", ".join(f"{index} {name}" for index, name in enumerate(classes))
    print(f"{written} masks written to {args.masks}: {names}, 255 no label")
    sheet = write_sheet(out, paths, args)
    if sheet:
        print(f"look at {sheet}: images beside their masks")
    if failed:
        raise InputError(f"{failed} images have no mask, for the reasons named above")


if __name__ == "__main__":
    run_script(lambda: main(parse_args()))
