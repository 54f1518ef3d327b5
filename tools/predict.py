"""Masks for new images, predicted by the teacher of a checkpoint.

    python tools/predict.py runs/first/last.pth --images photographs --masks predicted --confidence
    python tools/predict.py runs/first/last.pth --images one.jpg --masks proposed --pseudo-labels  # 255: unsure
    torchrun --nproc_per_node=8 tools/predict.py runs/first/last.pth --images photographs --masks predicted

Writes OUT/NAME.png, the class indices with a palette; OUT-overlays/NAME.png, the image under the colors; with
--confidence OUT-confidence/NAME.png, the margin between the best two classes, 0..255; and with --probabilities
OUT-probabilities/NAME.npz: prob (C,H,W) float16, and classes, their names. Masks that are there stay.
"""

import argparse
import os
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader
from torchvision.transforms.v2 import functional as VF

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data import READABLE, InputError, left_out, open_image, save_mask, suffix, walk  # noqa: E402
from evaluate import Protocol, image_threshold, label_options, last_line, number, overlay, predict  # noqa: E402
from evaluate import refinement_options, run_script  # noqa: E402
from model import all_reduce, load_checkpoint, load_network, start_processes  # noqa: E402
from refine import confidence, pseudo_labels  # noqa: E402

LARGE = 1024  # pixels; images with a longer side are predicted in windows of that side, to fit into memory


def name_images(place):
    """{name of its mask, without .png: image} of an image, or of a folder: where two names differ only in their suffix,
    the masks' names hold it."""
    paths = [place] if place.is_file() else [path for path in walk(place) if suffix(path) in READABLE]
    below = place.parent if place.is_file() else place
    names = {path: path.relative_to(below).with_suffix("").as_posix() for path in paths}
    twice = Counter(names.values())
    return {path.relative_to(below).as_posix() if twice[name] > 1 else name: path for path, name in names.items()}


def load(pair):
    """(id, path, image (1,3,H,W) uint8 or the sentence that says why it cannot be read) of (id, path)."""
    try:
        return *pair, VF.pil_to_tensor(open_image(pair[1], "RGB"))[None]
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


@torch.no_grad()
def main(args):
    """Writes the masks that are not there yet. Raises InputError for unreadable images, after all others are done."""
    folder, out = Path(args.images), Path(args.masks).resolve()
    paths, others = name_images(folder), left_out(walk(folder))
    if not paths:
        held = others or f"--images {folder} holds no image"
        raise InputError(f"{held}; expected one, or a folder with images in it or below it")
    if out.is_relative_to(folder.resolve()):
        raise InputError(f"--masks {args.masks} lies in --images {folder}, among what is predicted; use another folder")
    checkpoint = load_checkpoint(args.checkpoint)
    run, prior = checkpoint["args"], checkpoint.get("prior")
    rank, world, device = start_processes(args.device)
    network = load_network(checkpoint).to(device, memory_format=torch.channels_last)
    at_inference = refinement_options(run, prior) if args.refine else None
    options, crop = label_options(run, prior), run["crop"] if args.eval_mode else LARGE

    mine, failed = list(paths.items())[rank::world], 0
    missing = [(id, path) for id, path in mine if not os.path.exists(out / f"{id}.png")]

    def write(id, image):
        """Predicts an image (1,3,H,W) and writes all that belongs to it."""
        share = min(1, (args.shrink or LARGE**2) / max(image.shape[-2:]))
        small = VF.resize(image.to(device), [max(1, round(side * share)) for side in image.shape[-2:]])
        eval_mode = args.eval_mode or ("sliding" if max(small.shape[-2:]) > LARGE else "original")
        prob = predict(network, small, Protocol(eval_mode, crop, args.tta, at_inference, args.bilateral))
        prob = F.interpolate(prob, image.shape[-2:], mode="bilinear") if share < 1 else prob
        label = prob.argmax(1)  # (1,H,W)
        if args.pseudo_labels:
            options["threshold"] = image_threshold(prob, run) if args.threshold is None else args.threshold
            label = pseudo_labels(prob, None, **options).label
        label = label[0].to("cpu", torch.uint8)
        pictures = {"overlays": overlay(image[0], label, dim=1, opacity=0.5)}
        if args.confidence:
            pictures["confidence"] = (255 * confidence(prob)).round().to("cpu", torch.uint8)
        if args.probabilities:
            pictures["probabilities"] = prob[0].half().cpu().numpy()
        for kind, picture in pictures.items():
            file = out.with_name(f"{out.name}-{kind}") / id
            file.parent.mkdir(parents=True, exist_ok=True)
            if kind == "probabilities":
                np.savez_compressed(f"{file}.npz", prob=picture, classes=checkpoint["classes"])
            else:
                VF.to_pil_image(picture).save(f"{file}.png")
        save_mask(label, out / f"{id}.png")  # last, because it says that this image is done

    loader = DataLoader(missing, batch_size=None, collate_fn=load, num_workers=args.workers)
    for done, (id, path, image) in enumerate(loader, 1):
        try:
            problem = image if isinstance(image, str) else write(id, image)
        except (OSError, MemoryError, RuntimeError) as error:  # a name too long, a full disk, no memory for its size
            problem = f"{path} has no mask: {last_line(error)}"
        if problem:
            print(problem, file=sys.stderr)
            failed += 1
        if rank == 0 and done % 100 == 0:
            print(f"{done} of {len(missing)} images", flush=True)

    counts = torch.tensor([len(missing) - failed, len(mine) - len(missing), failed], device=device)
    written, kept, failed = all_reduce(counts).tolist()
    if rank != 0:
        return
    if others:
        print(others)
    if kept:
        print(f"{kept} masks were in {args.masks} already and stay as they are")
    names = ", ".join(f"{index} {name}" for index, name in enumerate(checkpoint["classes"]))
    print(f"{written} masks written to {args.masks}: {names}{', 255 no label' if args.pseudo_labels else ''}")
    if failed:
        raise InputError(f"{failed} images have no mask, for the reasons named above")


if __name__ == "__main__":
    run_script(lambda: main(parse_args()))
