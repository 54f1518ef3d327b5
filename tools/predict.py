"""Predict masks for new images with the teacher of a checkpoint.

    python tools/predict.py runs/first/last.pth --images photographs --masks predicted --confidence
    python tools/predict.py runs/first/last.pth --images one.jpg --masks proposed --pseudo-labels  # 255: unsure
    torchrun --nproc_per_node=8 tools/predict.py runs/first/last.pth --images photographs --masks predicted

It writes:

    OUT/NAME.png                  class indices with a palette; 255 for transparent pixels
    OUT-overlays/NAME.png         the image under the colors
    OUT-sheet.png                 up to twelve images beside their overlays
    OUT-confidence/NAME.png       with --confidence: the margin between the best two classes, 0..255
    OUT-probabilities/NAME.npz    with --probabilities: prob (C,H,W) float16, and classes, their names

A mask that exists already is kept.
"""

import argparse
import os
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import ImageOps
from torch.utils.data import DataLoader
from torchvision.transforms.v2 import functional as VF
from torchvision.utils import make_grid

sys.path[:0] = map(str, Path(__file__).resolve().parents[:2])

from data import IGNORE, InputError, files, open_image, rank_and_world, save_mask, walk  # noqa: E402
from evaluate import Protocol, image_threshold, label_options, last_line, number, overlay, predict  # noqa: E402
from evaluate import refinement_options, run_script  # noqa: E402
from model import all_reduce, load_checkpoint, load_network, start_processes  # noqa: E402
from own_images import left_out  # noqa: E402
from refine import confidence, pseudo_labels  # noqa: E402

SHEET = 12  # images on the contact sheet
TILE = 240  # pixels, side of an image there
LARGE = 1024  # pixels; images with a longer side are predicted in windows of that side, to fit into memory


def find_images(args):
    """Return {name of its mask, without .png: image}, and a sentence on other files. Raises InputError."""
    folder = Path(args.images)
    if folder.is_file():
        others, paths = left_out([folder]), {folder.stem: folder}
    else:
        others, paths = left_out(walk(folder)), files(folder)
    if not paths or (others and folder.is_file()):
        raise InputError(f"--images {folder} has no image; expected one, or a folder of images; {others or 'add some'}")
    if args.masks.is_relative_to(folder.resolve()):
        raise InputError(f"--masks {args.masks} lies in --images {folder}, among what is predicted; use another folder")
    return paths, others


def load(pair):
    """Return (id, path, image (1,4,H,W) uint8 with alpha, or the InputError that says why it cannot be read)."""
    try:
        return *pair, VF.pil_to_tensor(open_image(pair[1], "RGBA"))[None]
    except InputError as error:
        return *pair, error


def parse_args(argv=None):
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("checkpoint", help="last.pth or best.pth of a run")
    add("--images", required=True, metavar="DIR", help="folder of images, nested or not, or one image")
    add("--masks", required=True, type=Path, metavar="OUT", help="folder for the masks, outside of DIR")
    add("--pseudo-labels", action="store_true", help="255 for pixels that the run's method does not keep")
    add("--threshold", type=float, help="lowest confidence of --pseudo-labels; default: the run's rule")
    add("--confidence", action="store_true", help="also write the margin as gray images")
    add("--probabilities", action="store_true", help="also write every class's probability; large files")
    add("--shrink", type=number(int, 32), metavar="N", help="shrink as own_images.py --shrink N does, then predict")
    add("--eval-mode", choices=("original", "sliding"), help=f"default: original; larger than {LARGE} pixels: sliding")
    add("--tta", action="store_true", help="mean over flips and the scales 0.75, 1 and 1.25")
    add("--refine", action="store_true", help="refine the prediction, Sec. 4.2, with the run's options")
    add("--bilateral", action="store_true", help="mean with the mirrored image, then a filter by color [ours]")
    add("--workers", type=number(int, 0), default=0, help="loader workers of each process; default: 0")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: the GPU if there is one")
    args = parser.parse_args(argv)
    args.masks = args.masks.resolve()
    if args.threshold is not None and not args.pseudo_labels:
        parser.error("--threshold says which pixels get a pseudo-label; add --pseudo-labels")
    if args.refine and args.pseudo_labels:
        parser.error("--pseudo-labels refines as the run did; leave out --refine")
    return args


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


def beside(out, kind, name):
    """Return the file of a kind beside the masks; make its folder."""
    path = out.with_name(f"{out.name}-{kind}") / name
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def save(prob, label, image, id, classes, args):
    """Write everything that belongs to an image (3,H,W); the mask last, because it says that this image is done."""
    if args.probabilities:
        file = beside(args.masks, "probabilities", f"{id}.npz")
        np.savez_compressed(file, prob=prob[0].half().cpu().numpy(), classes=classes)
    if args.confidence:
        margin = (255 * confidence(prob)).round().to("cpu", torch.uint8)
        VF.to_pil_image(margin).save(beside(args.masks, "confidence", f"{id}.png"))
    VF.to_pil_image(overlay(image, label, dim=1, opacity=0.5)).save(beside(args.masks, "overlays", f"{id}.png"))
    save_mask(label, args.masks / f"{id}.png")


def write_sheet(out, paths):
    """Write up to SHEET images, evenly spaced, beside their overlays, to OUT-sheet.png."""
    pairs = [(path, beside(out, "overlays", f"{id}.png")) for id, path in paths.items()]
    pairs = [pair for pair in pairs if pair[1].exists()]
    count, tiles = min(SHEET, len(pairs)), []
    for place in range(count):
        for path in pairs[place * len(pairs) // count]:
            tile = ImageOps.pad(open_image(path, "RGB"), (TILE, TILE), color="white")
            tiles.append(VF.pil_to_tensor(tile))
    if tiles:
        sheet = out.with_name(f"{out.name}-sheet.png")
        VF.to_pil_image(make_grid(tiles, nrow=6, pad_value=255)).save(sheet)
        print(f"look at {sheet}: images beside their masks")


def write_masks(missing, checkpoint, device, args):
    """Write the masks of [(id, path)] and what belongs to them. Return how many have failed; each is named."""
    run, prior, failed = checkpoint["args"], checkpoint.get("prior"), 0
    network = load_network(checkpoint).to(device, memory_format=torch.channels_last)
    refinement = refinement_options(run, prior) if args.refine else None
    loader = DataLoader(missing, batch_size=None, collate_fn=load, num_workers=args.workers)
    for done, (id, path, image) in enumerate(loader, 1):
        try:
            if isinstance(image, InputError):
                raise image
            prob = probabilities(network, image[:, :3].to(device), args, run, refinement)
            label = labels(prob, args, run, label_options(run, prior)).masked_fill(image[0, 3] == 0, IGNORE)
            save(prob, label, image[0, :3], id, checkpoint["classes"], args)
        except (InputError, OSError, MemoryError, RuntimeError) as error:  # a full disk, no memory for its size
            print(f"{path} has no mask: {last_line(error)}", file=sys.stderr)
            failed += 1
        if done % 100 == 0 and rank_and_world()[0] == 0:
            print(f"{done} of {len(missing)} images", flush=True)
    return failed


@torch.no_grad()
def main(args):
    """Write the masks that do not exist yet. Raises InputError for unreadable images, after all others are done."""
    paths, others = find_images(args)
    checkpoint = load_checkpoint(args.checkpoint)
    device = start_processes(args.device)
    rank, world = rank_and_world()
    mine = list(paths.items())[rank::world]
    missing = [(id, path) for id, path in mine if not os.path.exists(args.masks / f"{id}.png")]
    failed = write_masks(missing, checkpoint, device, args)
    counts = torch.tensor([len(missing) - failed, len(mine) - len(missing), failed], device=device)
    written, kept, failed = all_reduce(counts).tolist()
    if rank != 0:
        return
    if others:
        print(others)
    if kept:
        print(
            f"{kept} existing masks in {args.masks} are kept, even if another checkpoint or option made them, and "
            "their other files (--confidence, ...) are not written; to write all, use another --masks"
        )
    names = ", ".join(f"{index} {name}" for index, name in enumerate(checkpoint["classes"]))
    print(f"{written} masks written to {args.masks}: {names}, 255 no label")
    write_sheet(args.masks, paths)
    if failed:
        raise InputError(f"{failed} images have no mask, for the reasons named above")


if __name__ == "__main__":
    run_script(lambda: main(parse_args()))
