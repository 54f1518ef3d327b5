"""Download PASCAL VOC 2012, say what to download of Cityscapes, and check the files of any dataset.

    python tools/prepare.py pascal --root data                               # 2 GB; --sbd: coarse masks too, 1.4 GB
    python tools/prepare.py cityscapes --root data                           # what to download, and what is there
    python tools/prepare.py check --dataset pascal --root data --labeled 92  # reads every image and mask
"""

import argparse
import os
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from torchvision.datasets import SBDataset, VOCSegmentation
from torchvision.datasets.utils import download_and_extract_archive

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data import DATASETS, IGNORE, SPLITS, InputError, id_list, list_cityscapes, list_pascal  # noqa: E402
from data import open_dataset, read, save_mask  # noqa: E402
from evaluate import run_script  # noqa: E402


def missing_of_pascal(root, sbd):
    """Return the ids of the lists whose image or mask is not under the root; coarse masks count only with sbd."""
    lists = SPLITS / "pascal"
    try:
        items = list_pascal(root, lists)
    except InputError:  # nothing is there yet
        return id_list(lists / "train.txt")
    fine = {*id_list(lists / "1464.txt"), *(item.id for item in items["val"])}
    items = items["train"] + items["val"]
    return [item.id for item in items if not (item.image and (item.mask or not sbd and item.id not in fine))]


def pascal(args):
    """Download VOC 2012 with torchvision; with --sbd also make SegmentationClassAug/, from SBD's MATLAB files."""
    root = Path(args.root)
    if args.sbd:
        try:
            from scipy.io import loadmat
        except ImportError as error:
            raise InputError("--sbd reads MATLAB files, and scipy is not installed; pip install scipy") from error
    try:
        if missing_of_pascal(root, sbd=False):
            VOCSegmentation(root, year="2012", download=True)  # a good archive is not downloaded again
        if args.sbd and missing_of_pascal(root, sbd=True):
            download_and_extract_archive(SBDataset.url, root, md5=SBDataset.md5)
    except (OSError, RuntimeError) as error:  # of the network or the disk, and torchvision's for a bad checksum
        raise InputError(f"the download to {root} failed ({error}); run the same command again") from error
    missing = missing_of_pascal(root, sbd=False)
    if missing:
        advice = "remove VOC2012 there and run the same command again"
        raise InputError(f"{root} lacks files of {len(missing)} images, first {missing[0]}; {advice}")
    folder = list_pascal(root, SPLITS / "pascal")["val"][0].image.parent.parent
    coarse = missing_of_pascal(root, sbd=True) if args.sbd else []
    if coarse:
        print(f"converts {len(coarse)} masks of SBD", flush=True)
    for id in coarse:
        mask = loadmat(root / "benchmark_RELEASE" / "dataset" / "cls" / f"{id}.mat")["GTcls"][0]["Segmentation"][0]
        save_mask(mask, folder / "SegmentationClassAug" / f"{id}.png")
    print(f"complete: {folder}; the archives in {root} are no longer needed")


def cityscapes(args):
    """Say what to download of Cityscapes, and what is there already."""
    print(
        "Cityscapes needs an account: https://www.cityscapes-dataset.com/downloads\n"
        "Download leftImg8bit_trainvaltest.zip (11 GB) and gtFine_trainvaltest.zip (241 MB), "
        f"unpack both into {Path(args.root) / 'cityscapes'}."
    )
    try:
        splits = list_cityscapes(args.root, SPLITS / "cityscapes")
    except InputError as error:
        print(f"not there yet: {error}")
        return
    for split, items in splits.items():
        images, masks = (sum(getattr(item, kind) is not None for item in items) for kind in ("image", "mask"))
        print(f"{split}: {images} images and {masks} masks of {len(items)} are there")


def check(args):
    """Read every image and mask of the dataset and print what they hold. Raises InputError if some are wrong."""
    data = open_dataset(args.dataset, args.root, args.labeled, args.splits, use=())
    sizes, pixels, problems = Counter(), np.zeros(256, np.int64), []

    def inspect(item):
        """Return (size, pixels of the mask by class), or None after noting a problem."""
        try:
            image, mask = read(item, data)
        except InputError as error:
            problems.append(str(error))
            return None
        histogram = np.array(mask.histogram()) if item.mask else np.zeros(256, np.int64)
        return image.size, histogram

    for part in ("labeled", "unlabeled", "val", "test"):
        items = getattr(data, part)
        if part == "test" and not items:
            continue
        images = [item for item in items if item.image]
        masks = [item for item in items if item.mask]
        note = " (none needed)" if part == "unlabeled" else ""
        print(f"{part}: {len(items)} images, {len(masks)} masks{note}", flush=True)
        problems += [f"image {item.id} is missing" for item in items if not item.image]
        if part != "unlabeled":
            problems += [f"mask of the {part} image {item.id} is missing" for item in items if not item.mask]
        with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
            for size, histogram in filter(None, pool.map(inspect, images)):
                sizes[size] += 1
                pixels += histogram
    common = [f"{width} x {height} ({count})" for (width, height), count in sizes.most_common(4)]
    if len(sizes) > 4:
        common.append(f"and {len(sizes) - 4} more")
    print(f"sizes: {', '.join(common)}")
    for value in np.flatnonzero(pixels):
        name = "ignored" if value == IGNORE else data.classes[value]
        print(f"{value:4} {name:20} {pixels[value] / pixels.sum():7.2%} of the mask pixels")
    if problems:
        print("\n".join(problems), file=sys.stderr)
        raise InputError(f"{len(problems)} files are missing or broken; each is named above; add or replace them")
    print("nothing is missing, nothing is broken")


def parse_args(argv=None):
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for command in (pascal, cityscapes, check):
        sub = commands.add_parser(command.__name__, description=command.__doc__)
        sub.set_defaults(command=command)
        sub.add_argument("--root", default="data", help="folder that holds the dataset; default: data")
        if command is pascal:
            sub.add_argument("--sbd", action="store_true", help="SBD's masks too, for 2646 or 5291 labels (scipy)")
        elif command is check:
            sub.add_argument("--dataset", choices=DATASETS, required=True)
            sub.add_argument("--labeled", default="all", help="number of labeled images, a file of their ids, or all")
            sub.add_argument("--splits", help="folder of published lists; default: the repository's")
    return parser.parse_args(argv)


def main(args):
    """Run one command."""
    args.command(args)


if __name__ == "__main__":
    run_script(lambda: main(parse_args()))
