"""Masks for new images, predicted by the teacher of a checkpoint.

    python tools/predict.py runs/first/last.pth --images photographs --masks predicted --confidence
    python tools/predict.py runs/first/last.pth --images photographs --masks proposed --pseudo-labels  # 255: unsure
    torchrun --nproc_per_node=8 tools/predict.py runs/first/last.pth --images photographs --masks predicted

Writes OUT/NAME.png, the class indices with a palette; OUT-overlays/NAME.png, the image under the colors; and with
--confidence OUT-confidence/NAME.png, the margin between the best two classes, 0..255. Masks that are there stay.
"""

import argparse
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.utils.data import DataLoader
from torchvision.transforms.v2 import functional as VF

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data import READABLE, InputError, files, open_image, save_mask  # noqa: E402
from evaluate import Protocol, image_threshold, label_options, number, overlay, predict  # noqa: E402
from evaluate import refinement_options, run_script  # noqa: E402
from model import load_checkpoint, load_network, start_processes  # noqa: E402
from refine import confidence, pseudo_labels  # noqa: E402

LARGE = 1024  # pixels; images with a longer side are predicted in windows of that side, to fit into memory


def load(pair):
    """(id, image (1,3,H,W) uint8, or the sentence that says why it cannot be read) of (id, path)."""
    id, path = pair
    try:
        return id, VF.pil_to_tensor(open_image(path, "RGB"))[None]
    except InputError as error:
        return id, str(error)


def parse_args(argv=None):
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("checkpoint", help="last.pth or best.pth of a run")
    add("--images", required=True, metavar="DIR", help="folder of images, nested or not")
    add("--masks", required=True, metavar="OUT", help="folder for the masks, outside of DIR")
    add("--pseudo-labels", action="store_true", help="255 where the run's method gives no label")
    add("--threshold", type=float, help="of --pseudo-labels; default: the run's, or the alpha0-quantile of each image")
    add("--confidence", action="store_true", help="also write the margin as gray images")
    add("--eval-mode", choices=("original", "sliding"), help=f"default: original, sliding above {LARGE} pixels")
    add("--crop", type=number(int, 1), help=f"side of the windows, pixels; default: {LARGE}, or as in the run")
    add("--tta", action="store_true", help="mean over flips and the scales 0.75, 1 and 1.25")
    add("--refine", action="store_true", help="refine the prediction, Sec. 4.2, with the run's options")
    add("--bilateral", action="store_true", help="first the mean with the mirrored image, filtered by color [ours]")
    add("--student", action="store_true", help="the student instead of the teacher")
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
    paths = files(folder)
    if not paths:
        raise InputError(f"--images {folder} holds no image; expected a folder with images in it or below it")
    if out.is_relative_to(folder.resolve()):
        raise InputError(f"--masks {args.masks} lies in --images {folder}, among what is predicted; use another folder")
    checkpoint = load_checkpoint(args.checkpoint)
    run, prior = checkpoint["args"], checkpoint.get("prior")
    rank, world, device = start_processes(args.device)
    network = load_network(checkpoint, "student" if args.student else "teacher")
    network = network.to(device, memory_format=torch.channels_last)
    at_inference = refinement_options(run, prior) if args.refine else None
    options, crop = label_options(run, prior), args.crop or (run["crop"] if args.eval_mode else LARGE)

    mine = list(paths.items())[rank::world]
    missing = [(id, path) for id, path in mine if not (out / f"{id}.png").exists()]
    unreadable = 0
    loader = DataLoader(missing, batch_size=None, collate_fn=load, num_workers=args.workers)
    for done, (id, image) in enumerate(loader, 1):
        if isinstance(image, str):
            print(image, file=sys.stderr)
            unreadable += 1
            continue
        eval_mode = args.eval_mode or ("sliding" if max(image.shape[-2:]) > LARGE else "original")
        prob = predict(network, image.to(device), Protocol(eval_mode, crop, args.tta, at_inference, args.bilateral))
        label = prob.argmax(1)  # (1,H,W)
        if args.pseudo_labels:
            options["threshold"] = image_threshold(prob, run) if args.threshold is None else args.threshold
            label = pseudo_labels(prob, None, **options).label
        label = label[0].to("cpu", torch.uint8)
        pictures = {"overlays": overlay(image[0], label, dim=1, opacity=0.5)}
        if args.confidence:
            pictures["confidence"] = (255 * confidence(prob)).round().to("cpu", torch.uint8)
        for kind, picture in pictures.items():
            file = out.with_name(f"{out.name}-{kind}") / f"{id}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            VF.to_pil_image(picture).save(file)
        save_mask(label, out / f"{id}.png")  # last, because it says that this image is done
        if rank == 0 and done % 100 == 0:
            print(f"{done} of {len(missing)} images", flush=True)

    counts = torch.tensor([len(missing) - unreadable, len(mine) - len(missing), unreadable], device=device)
    if world > 1:
        dist.all_reduce(counts)
    written, kept, unreadable = counts.tolist()
    if rank != 0:
        return
    others = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.suffix.lower() not in READABLE]
    if others:
        print(f"{len(others)} files are left out, for their suffix is no image's, first {others[0]}")
    if kept:
        print(f"{kept} masks were in {args.masks} already and stay as they are")
    names = ", ".join(f"{index} {name}" for index, name in enumerate(checkpoint["classes"]))
    print(f"{written} masks written to {args.masks}: {names}{', 255 no label' if args.pseudo_labels else ''}")
    if unreadable:
        raise InputError(f"{unreadable} images could not be read and have no mask; each is named above")


if __name__ == "__main__":
    run_script(lambda: main(parse_args()))
