"""Datasets, partitions, augmentation and loaders; fetching and checking what they need.

    data = open_dataset("pascal", "data", labeled=92)             # lists, and a look at a few masks
    loader = training_loader(data, steps=range(0, 1000), ...)     # one batch of labeled and unlabeled views per step

    python data.py pascal --root data                             # download PASCAL VOC 2012; --sbd: coarse masks as well
    python data.py cityscapes --root data                         # what to download, and what is there
    python data.py check --dataset pascal --root data --labeled 92
    python data.py masks --root data/mine --colors classes.csv    # masks painted in colors -> masks of class indices
    python data.py shapes --root data/mine --labeled 24           # the drawn images as a folder of files

Whatever is random here is a function of (seed, stream, number of the draw), so that neither the number of workers nor
a resumed run changes anything. Images travel as uint8 and are normalized on the device, by `normalize`.
"""

import argparse
import csv
import http.client
import os
import re
import shutil
import signal
import sys
import time
import urllib.request
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache, lru_cache
from mmap import mmap
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from torch.utils.data import DataLoader, Dataset
from torchvision.datasets import Cityscapes, SBDataset, VOCSegmentation
from torchvision.datasets.utils import check_integrity, extract_archive
from torchvision.datasets.voc import DATASET_YEAR_DICT
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as VF

IGNORE = 255
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, which torchvision's weights expect
IMAGE_SUFFIXES, MASK_SUFFIXES = (".jpg", ".jpeg", ".png"), (".png",)
READABLE = tuple(suffix for suffix, kind in Image.registered_extensions().items() if kind in Image.OPEN)
SPLITS = Path(__file__).parent / "splits"
STREAMS = {name: number for number, name in enumerate(("order_x", "order_u", "view_x", "view_u", "step", "strong"))}


class InputError(ValueError):
    """Something in the user's files or arguments; the message says what was found, expected, and to be done."""


class Item(NamedTuple):
    """One image. image and mask are files, or the number of a drawn image, or None where there is no such file."""

    id: str
    image: Path | int | None
    mask: Path | int | None


class Data(NamedTuple):
    """A dataset cut into a partition: Item lists, and what its masks mean."""

    name: str
    classes: tuple  # names, by class index
    scales: tuple  # random resizing of its training images, smallest and largest factor
    values: dict  # end of a mask's stem -> (256,) uint8, the class of each value in the file; 255 = ignore, 254 = not allowed
    labeled: list
    unlabeled: list  # their masks, where there are any, serve for figures alone
    val: list
    test: list  # empty where the dataset has none
    notes: tuple = ()  # what was found and decided, to be said aloud


def generator(*key):
    """A NumPy generator that is a pure function of the key: (seed, stream name, number, ...)."""
    return np.random.default_rng([STREAMS[part] if isinstance(part, str) else part for part in key])


def palette():
    """(256, 3) uint8 colors by class index: PASCAL's own, from the bits of the index; 255 is its pale border."""
    index = np.arange(256)
    rgb = [sum(((index >> (3 * bit + channel)) & 1) << (7 - bit) for bit in range(3)) for channel in range(3)]
    return np.stack(rgb, 1).astype(np.uint8)


# ----------------------------------------------------------------------------------------------------------------------
# shapes: drawn, not stored

SHAPES_SIZE = 96  # pixels
SHAPES_TRAIN, SHAPES_VAL = 480, 96  # images
SHAPES = (  # texture and form of each class
    ("striped", "disc"), ("checked", "square"), ("ringed", "triangle"),
    ("speckled", "disc"), ("zigzag", "square"), ("dotted", "triangle"),
)  # fmt: skip


def _distance(form, u, v, radius):
    """Signed distance in pixels from the form's outline, negative inside; (u, v) are centered and rotated."""
    if form == "disc":
        return np.hypot(u, v) - radius
    if form == "square":
        return np.maximum(np.abs(u), np.abs(v)) - 0.85 * radius
    sides = [u * np.cos(angle) + v * np.sin(angle) for angle in (np.pi / 2, np.pi * 7 / 6, np.pi * 11 / 6)]
    return np.maximum.reduce(sides) - 0.6 * radius


def _texture(texture, u, v, period, rng):
    """True where the second of an object's two shades shows."""
    if texture == "ringed":
        return np.hypot(u, v) % period < period / 2
    u, v = (w + rng.uniform(0, period) for w in (u, v))
    if texture == "striped":
        return u % period < period / 2
    if texture == "zigzag":
        return (u + np.abs(v % (2 * period) - period)) % period < period / 2
    if texture == "dotted":
        return np.hypot(u % period - period / 2, v % period - period / 2) < 0.36 * period
    cells = [np.floor(2 * w / period).astype(int) for w in (u, v)]
    if texture == "checked":
        return (cells[0] + cells[1]) % 2 == 1
    return rng.random((200, 200))[cells[0], cells[1]] < 0.5  # speckled


@cache  # 37 kB each
def draw_shapes(index):
    """Image `index` of the embedded dataset: (RGB image, mask), a pure function of the index.

    Six classes, a form with a texture each; color says nothing. Plain blobs are background, objects hide one another,
    everything is noisy, and a border two pixels wide around each object is 255, as in PASCAL.
    """
    rng = np.random.default_rng([20230913, index])
    size = SHAPES_SIZE
    y, x = np.mgrid[:size, :size].astype(np.float32)
    slope = rng.normal(0, 0.3, (2, 3))
    image = rng.uniform(0.2, 0.8, 3) + ((y / size - 0.5)[..., None] * slope[0] + (x / size - 0.5)[..., None] * slope[1])
    mask = np.zeros((size, size), np.uint8)

    def placed():
        angle = rng.uniform(0, 2 * np.pi)
        dy, dx = y - rng.uniform(0, size), x - rng.uniform(0, size)
        return dx * np.cos(angle) + dy * np.sin(angle), dy * np.cos(angle) - dx * np.sin(angle)

    for _ in range(rng.integers(4, 9)):  # clutter: background, however it looks
        u, v = placed()
        image[np.hypot(u / rng.uniform(2, 14), v / rng.uniform(2, 8)) < 1] = rng.uniform(0, 1, 3)
    for _ in range(rng.integers(3, 6)):
        kind = rng.integers(len(SHAPES))
        texture, form = SHAPES[kind]
        u, v = placed()
        radius, period = rng.uniform(14, 30), rng.uniform(6, 9)
        distance = _distance(form, u, v, radius)
        one = rng.uniform(0.5, 1, 3)  # a bright and a dark shade of one hue, whichever way round
        two = one * rng.uniform(0.1, 0.4)
        one, two = (one, two) if rng.random() < 0.5 else (two, one)
        colors = np.where(_texture(texture, u, v, period, rng)[..., None], one, two)
        image = np.where((distance < 0)[..., None], colors, image)
        mask[distance < 1] = IGNORE
        mask[distance < -1] = 1 + kind
    image += rng.normal(0, 0.06, image.shape)
    return Image.fromarray((image.clip(0, 1) * 255).astype(np.uint8)), Image.fromarray(mask)


def list_shapes(root, lists):
    """Items of the embedded dataset; nothing is looked for on the disk."""
    numbers = range(SHAPES_TRAIN + SHAPES_VAL)
    items = [Item(f"{i:04d}", i, i) for i in numbers]
    return {"train": items[:SHAPES_TRAIN], "val": items[SHAPES_TRAIN:]}


# ----------------------------------------------------------------------------------------------------------------------
# datasets of files


def find_root(root, names, folders):
    """`root`, or the first of `root/name`, that holds the folders. Raises InputError where none does."""
    candidates = [Path(root), *(Path(root) / name for name in names)]
    lacking = {place: [f"{folder}/" for folder in folders if not (place / folder).is_dir()] for place in candidates}
    best = min(candidates, key=lambda place: len(lacking[place]))
    if not lacking[best]:
        return best
    below = f" or in {' or '.join(f'{name}/' for name in names)} below it" if names else ""
    expected = f"{', '.join(f'{folder}/' for folder in folders)} in it{below}"
    if not Path(root).is_dir():
        raise InputError(f"--root {root} is not there; expected a folder with {expected}")
    raise InputError(f"--root {root}: {best} lacks {', '.join(lacking[best])}; expected {expected}")


def files(folder, suffixes, nested=False):
    """{stem: path} of the files in and below a folder with one of the suffixes, in either case; {} without the folder.

    nested: the stem keeps the folders on the way, "trip/0001". Raises InputError where two files have the same stem.
    """
    paths = [path for path in sorted(Path(folder).rglob("*")) if path.suffix.lower() in suffixes and path.is_file()]
    stems = [path.relative_to(folder).with_suffix("").as_posix() if nested else path.stem for path in paths]
    found = dict(zip(stems, paths))
    if len(found) < len(paths):
        twice, stem = next((path, stem) for path, stem in zip(paths, stems) if found[stem] != path)
        raise InputError(f"{twice} and {found[stem]} have the same name; expected one of them, remove the other")
    return found


def id_list(file):
    """The ids in a file, one per line. Raises InputError where it is not there or empty."""
    if not file.is_file():
        raise InputError(f"the list {file} is not there; expected one image id per line")
    lines = file.read_text("utf-8-sig", errors="replace").splitlines()
    ids = [line.strip() for line in lines if line.strip()]
    if not ids:
        raise InputError(f"the list {file} is empty; expected one image id per line")
    return ids


def list_camvid(root, lists):
    """Items of CamVid (Brostow et al., 2008) in SegNet's layout: train/, trainannot/, val/, valannot/; test likewise."""
    root = find_root(root, ("camvid",), ("train", "trainannot", "val", "valannot"))
    splits = {}
    for split in ("train", "val", "test"):
        images, masks = files(root / split, IMAGE_SUFFIXES), files(root / f"{split}annot", MASK_SUFFIXES)
        splits[split] = [Item(id, image, masks.get(id)) for id, image in images.items()]
    return splits


PASCAL_PLACES, PASCAL_FOLDERS = ("VOC2012", "VOCdevkit/VOC2012"), ("JPEGImages", "SegmentationClass")


def list_pascal(root, lists):
    """Items of PASCAL VOC 2012 (Everingham et al., 2010), extended by SBD (Hariharan et al., 2011), as the lists name them.

    Masks: SegmentationClass/ for the images that VOC annotated finely, SegmentationClassAug/ for all others.
    """
    root = find_root(root, PASCAL_PLACES, PASCAL_FOLDERS)
    images = files(root / "JPEGImages", IMAGE_SUFFIXES)
    fine, coarse = (files(root / folder, MASK_SUFFIXES) for folder in ("SegmentationClass", "SegmentationClassAug"))
    masks = fine | {
        id: coarse.get(id, fine.get(id)) for id in set(id_list(lists / "train.txt")) - set(id_list(lists / "1464.txt"))
    }
    return {
        split: [Item(id, images.get(id), masks.get(id)) for id in id_list(lists / f"{split}.txt")]
        for split in ("train", "val")
    }


def list_cityscapes(root, lists):
    """Items of Cityscapes (Cordts et al., 2016), as the lists name them; masks: labelTrainIds, else labelIds."""
    root = find_root(root, ("cityscapes",), ("leftImg8bit", "gtFine"))
    splits = {}
    for split in ("train", "val"):
        images = files(root / "leftImg8bit" / split, IMAGE_SUFFIXES)
        masks = files(root / "gtFine" / split, MASK_SUFFIXES)
        splits[split] = []
        for id in id_list(lists / f"{split}.txt"):
            kinds = (masks.get(f"{id}_gtFine_{kind}") for kind in ("labelTrainIds", "labelIds"))
            splits[split].append(Item(id, images.get(f"{id}_leftImg8bit"), next(filter(None, kinds), None)))
    return splits


def list_folder(root, lists):
    """Items of a folder of one's own: images/ of any kind, and masks/ of the same path with .png for those that were painted.

    Validation: val/ with images/ and masks/ of its own, else the ids in val.txt, else every fifth painted image.
    """
    root = find_root(root, (), ("images", "masks"))
    items = _folder_items(root, "")
    painted = [item for item in items if item.mask]
    if (root / "val").is_dir():
        val = _folder_items(find_root(root / "val", (), ("images", "masks")), "val/")
    elif (root / "val.txt").is_file():
        ids = dict.fromkeys(id_list(root / "val.txt"))  # each once
        known = {item.id: item for item in items}
        if not set(ids) <= set(known):
            unknown = next(id for id in ids if id not in known)
            raise InputError(
                f"{root / 'val.txt'} names {unknown}, and there is no images/{unknown}.*; correct the list: "
                "one name per line, without suffix"
            )
        val = [known[id] for id in ids]
    else:
        if len(painted) < 2:
            raise InputError(
                f"{root} has {len(painted)} painted images; expected two or more, one to learn from and one to validate with"
            )
        val = painted[4::5] or painted[-1:]
    taken = set(val)
    return {"train": [item for item in items if item not in taken], "val": val}


def _folder_items(root, prefix):
    """The images below root/images, sorted, with their masks; ids begin with the prefix. Raises InputError for odd masks."""
    images, masks = files(root / "images", READABLE, nested=True), files(root / "masks", READABLE, nested=True)
    other = [path for path in masks.values() if path.suffix.lower() not in MASK_SUFFIXES]
    if other:
        raise InputError(
            f"{len(other)} masks in {root / 'masks'} are not PNG, first {other[0]}; {CONVERT.format(root)} makes PNGs of them"
        )
    stray = [id for id in masks if id not in images]
    if stray:
        raise InputError(
            f"{len(stray)} of {len(masks)} masks in {root / 'masks'} belong to no image, first {masks[stray[0]]}; expected "
            f"{root / 'images' / stray[0]} with any suffix; rename one of them"
        )
    return [Item(prefix + id, path, masks.get(id)) for id, path in images.items()]


CONVERT = "python data.py masks --root {} --colors classes.csv"


def folder_classes(root, masks):
    """The names in root/classes.txt, else the numbers of the classes found, as a tuple. Looks into every mask.

    Raises InputError, with the command that mends it, for masks that do not hold class indices.
    """
    file = Path(root) / "classes.txt"
    mend = f"{CONVERT.format(root)} converts them; without --colors it prints what they hold"
    names = tuple(id_list(file)) if file.is_file() else None
    if names and (len(set(names)) < len(names) or "all" in names):
        raise InputError(f"{file} names a class twice, or one of them all; expected another name for each")
    try:
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            histograms = pool.map(lambda mask: _decode(mask, "index").histogram(), masks)
            histograms = np.array(list(reported(histograms, len(masks), "masks looked at")))
    except InputError as error:
        raise InputError(f"{error}; {mend}") from error
    counts = histograms.sum(0)
    found = [value for value in np.flatnonzero(counts).tolist() if value != IGNORE]
    values = f"the {len(masks)} masks in {root} hold the values {', '.join(map(str, np.flatnonzero(counts)[:12]))}"
    if found in ([], [0]) and counts[IGNORE]:
        raise InputError(
            f"{values} alone, and 255 means ignore; expected class indices from 0; write the lines background,0 and "
            f"object,255 into classes.csv: {CONVERT.format(root)} converts them"
        )
    if found in ([], [0]):
        raise InputError(f"{values} alone; expected two classes or more, as indices from 0; paint the others")
    if names and found[-1] >= len(names):
        odd = np.flatnonzero(histograms[:, len(names) : IGNORE].any(1))
        raise InputError(
            f"{values}, and {file} names {len(names)} classes, 0 to {len(names) - 1}; {len(odd)} masks hold more, first "
            f"{masks[odd[0]]}; repaint them, name the other classes, or {mend}"
        )
    if not names and (found[0] > 0 or 2 * len(found) <= found[-1]):
        raise InputError(
            f"{values}; expected class indices 0, 1, 2 and so on; write one line name,value for each into classes.csv: {mend}; "
            "or name the classes from 0 on in classes.txt, if the others were just never painted"
        )
    names = names or tuple(map(str, range(found[-1] + 1)))
    if len(names) > 254:
        raise InputError(f"{root} has {len(names)} classes; expected at most 254")
    return names


def mask_values(classes):
    """(256,) uint8 from {value in the file: class}, with 255 to ignore; see Data.values."""
    values = np.full(256, 254, np.uint8)
    for value, index in {IGNORE: IGNORE, **classes}.items():
        values[value] = index
    return values


class Spec(NamedTuple):
    """The facts of a dataset. Nothing about a dataset stands anywhere else."""

    classes: tuple
    list_items: Callable  # (root, folder of lists) -> {"train": [Item], "val": [Item], perhaps "test": [Item]}
    values: dict  # see Data
    get: str = "add what is missing, or leave these images out"  # what to do about missing files
    scales: tuple = (0.5, 2.0)  # of random resizing; the field's usual range


def indices(count):
    """The values of masks that hold class indices."""
    return {"": mask_values({i: i for i in range(count)})}


SHAPES_CLASSES = ("background", *(f"{texture} {form}" for texture, form in SHAPES))
CAMVID_CLASSES = (
    "sky", "building", "pole", "road", "pavement", "tree", "sign symbol", "fence", "car", "pedestrian", "bicyclist",
)  # fmt: skip
PASCAL_CLASSES = (
    "background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "dining table",
    "dog", "horse", "motorbike", "person", "potted plant", "sheep", "sofa", "train", "tv monitor",
)  # fmt: skip
CITYSCAPES_CLASSES = tuple(label.name for label in Cityscapes.classes if not label.ignore_in_eval)  # by train_id
DATASETS = {
    "shapes": Spec(SHAPES_CLASSES, list_shapes, indices(7), scales=(0.75, 1.5)),
    "camvid": Spec(CAMVID_CLASSES, list_camvid, {"": mask_values({i: i for i in range(11)} | {11: IGNORE})}),
    "pascal": Spec(
        PASCAL_CLASSES,
        list_pascal,
        indices(21),
        "python data.py pascal --root DIR downloads VOC 2012 and, with --sbd, builds SegmentationClassAug",
    ),
    "cityscapes": Spec(
        CITYSCAPES_CLASSES,
        list_cityscapes,
        {
            "labelTrainIds": mask_values({i: i for i in range(19)}),
            # -1, the licence plates, is stored as 255
            "labelIds": mask_values(
                {c.id % 256: IGNORE if c.ignore_in_eval else c.train_id for c in Cityscapes.classes}
            ),
        },
        "python data.py cityscapes --root DIR says what to download",
    ),
    "folder": Spec((), list_folder, {}, "paint them, or leave them out of val"),  # classes and values: of its masks
}


def open_dataset(name, root, labeled, splits=None, use=("labeled", "unlabeled", "val"), val=None):
    """Lists a dataset and cuts its training images into labeled and unlabeled ones.

    labeled: "all", a list of image ids or a file of them, or a number N: the list splits/<name>/N.txt where there is one,
    else N images evenly spaced over the sorted ids; of a folder, of the painted ones. unlabeled = the training images that
    are not labeled, by construction. use: the parts that will be read. val: ids to validate on in place of the dataset's
    own, those of a run.
    Raises InputError for an unknown dataset, list or id, an empty folder, and for parts in use: missing images, missing
    masks (unlabeled images need none), and labeled masks of 0 and 255 alone.
    """
    if name not in DATASETS:
        raise InputError(f"dataset {name!r} is unknown; expected one of {', '.join(DATASETS)}")
    spec, lists = DATASETS[name], Path(splits or SPLITS) / name
    items = spec.list_items(root, lists)
    for split in ("train", "val"):
        if not items[split]:
            place = "images" if name == "folder" else split
            raise InputError(f"--root {root} holds no {split} images of {name}; expected {place}/*.jpg or *.png")
    if val is not None:
        items |= _validate_on(val, items, root)
    values, classes, notes = spec.values, spec.classes, ()
    can_be_labeled = items["train"]
    if name == "folder":
        can_be_labeled = [item for item in items["train"] if item.mask]
        masks = [item.mask for item in items["train"] + items["val"] if item.mask]
        if not masks or not (can_be_labeled or isinstance(labeled, list)):
            raise InputError(
                f"{root} has no painted image to learn from; expected masks/ for some of images/, beside those that validate"
            )
        classes = folder_classes(root, masks)
        values, notes = indices(len(classes)), folder_notes(root, items, classes)
    labeled = labeled if isinstance(labeled, list) else str(labeled)
    chosen = labeled_ids(name, [item.id for item in can_be_labeled], labeled, lists)
    parts = ([item for item in items["train"] if (item.id in chosen) == labeled] for labeled in (True, False))
    data = Data(name, classes, spec.scales, values, *parts, items["val"], items.get("test", []), notes)
    for part in use:
        _expect_files(data, part, root, ("image",) if part == "unlabeled" else ("image", "mask"))
    if "labeled" in use and name != "folder":  # there, every mask has been looked at
        _expect_classes(data)
    return data


def _validate_on(ids, items, root):
    """{"train", "val"} with the ids as validation images. Raises InputError where one of them is gone."""
    known = {item.id: item for item in items["train"] + items["val"]}
    gone = [id for id in ids if id not in known]
    if gone:
        raise InputError(
            f"{len(gone)} of the run's {len(ids)} validation images are not under {root}, first {gone[0]}; put them back"
        )
    taken = set(ids)
    return {"train": [item for item in items["train"] if item.id not in taken], "val": [known[id] for id in ids]}


def _expect_files(data, part, root, kinds):
    """Raises InputError where images of a part have no file of one of the kinds."""
    members = getattr(data, part)
    for kind in kinds:
        missing = [item.id for item in members if getattr(item, kind) is None]
        if missing:
            raise InputError(
                f"{len(missing)} of {len(members)} {part} images of {data.name} have no {kind} under {root}, first "
                f"{', '.join(missing[:3])}; {DATASETS[data.name].get}"
            )


def _expect_classes(data):
    """Raises InputError where a few of the labeled masks hold 0 and 255 alone."""
    sample = data.labeled[:: max(1, len(data.labeled) // 8)]
    seen = [set(np.unique(read(item, data)[1])) for item in sample]
    if set().union(*seen) == {0, IGNORE}:
        raise InputError(
            f"the labeled masks of {data.name} hold 0 and 255 alone (looked at {len(seen)}, first {sample[0].mask}), and 255 means "
            "ignore; expected class indices, so write 1 where the masks say 255"
        )


def folder_notes(root, items, classes):
    """Sentences about a folder: what was found, which classes, and what validates."""
    train, val = items["train"], items["val"]
    painted = sum(item.mask is not None for item in train + val)
    notes = [f"{root}: {len(train + val)} images, {painted} of them painted; classes: {', '.join(classes)}"]
    below = [path for path in Path(root, "images").rglob("*") if path.is_file() and path.suffix.lower() not in READABLE]
    if below:
        notes.append(f"{len(below)} files in images/ have no suffix of an image and are left out, first {below[0]}")
    if not any(Path(root, name).exists() for name in ("val", "val.txt")):
        shown = ", ".join(item.id for item in val[:5]) + (", ..." if len(val) > 5 else "")
        notes.append(
            f"there is no val.txt, so every fifth painted image validates and is not trained on: {len(val)} of {painted} ({shown}); "
            "write their names into val.txt to keep them when more are painted"
        )
    return tuple(notes)


def labeled_ids(name, train_ids, labeled, lists):
    """The set of ids that `--labeled` means; see `open_dataset`."""
    if isinstance(labeled, list):
        return set(labeled)
    published = sorted(int(path.stem) for path in lists.glob("*.txt") if path.stem.isdecimal())
    if labeled == "all":
        return set(train_ids)
    if labeled.isdecimal() and int(labeled) not in published:
        if published:
            raise InputError(f"{name} has no list of {labeled} labeled images; expected one of {published}, or a file")
        if not 1 <= int(labeled) <= len(train_ids):
            raise InputError(f"--labeled {labeled} is impossible; expected 1 to {len(train_ids)} images of {name}")
        return {train_ids[i * len(train_ids) // int(labeled)] for i in range(int(labeled))}
    file = lists / f"{labeled}.txt" if labeled.isdecimal() else Path(labeled)
    if not file.is_file():
        raise InputError(
            f"--labeled {labeled} is no file that exists; expected a number, all, or a file with one image id per line"
        )
    chosen = set(id_list(file))
    unknown = sorted(chosen - set(train_ids))
    if unknown:
        raise InputError(
            f"{file} names {len(chosen)} images, {len(unknown)} of them not among the {len(train_ids)} training images "
            f"(first {', '.join(unknown[:3])}); expected one id of {name} per line"
        )
    return chosen


# ----------------------------------------------------------------------------------------------------------------------
# reading


_OPENED, _ROOM = mmap(-1, 2**18), 2**9  # by process id: the last file that it opened, for when a worker has died


def _decode(path, mode):
    """The file's pixels: an upright RGB image, or a mask of indices as they are stored. Raises InputError."""
    place = os.getpid() * _ROOM % len(_OPENED)
    _OPENED[place : place + _ROOM] = os.fsencode(path)[-_ROOM:].ljust(_ROOM, b"\0")
    try:
        with Image.open(path) as image:
            stored = image.mode
            image.load()
            if mode == "RGB":
                ImageOps.exif_transpose(image, in_place=True)
                image = image.convert("RGB") if image.mode != "RGB" else image
    except Exception as error:  # Pillow raises many kinds, all of them the file's fault
        raise InputError(f"{path} could not be read ({error}); replace the file, or leave this image out") from error
    if mode == "RGB" and stored[0] in "IF":  # Pillow would cut the values off at 255
        raise InputError(f"{path} is a {stored} image; convert it to 8 bits per channel")
    if mode != "RGB" and stored not in ("L", "P"):
        raise InputError(f"mask {path} is a {stored} image; expected one class index per pixel, 8 bits, L or P")
    return image


def dead_worker(error):
    """The sentence about a loader's worker that died, from the RuntimeError that PyTorch raises then; None for another error."""
    died = re.search(r"DataLoader worker \(pid(?:\(s\))? (\d+)[^)]*\) (.*)", str(error))
    if not died:
        return None
    place = int(died[1]) * _ROOM % len(_OPENED)
    file = os.fsdecode(_OPENED[place : place + _ROOM].rstrip(b"\0")) or "none"
    return (
        f"a loader worker died ({died[2].strip(' .')}); the last file it opened is {file}; look at that file, and whether "
        "memory lasts for --workers"
    )


def read_image(item):
    """The item's image, RGB. Raises InputError that names an unreadable file."""
    return draw_shapes(item.image)[0] if isinstance(item.image, int) else _decode(item.image, "RGB")


def read(item, data):
    """(image, mask) of an item that has a mask: PIL images of the same size, the mask of classes and 255.

    Raises InputError that names the file: unreadable, of another size than its image, or with a value that is no class.
    """
    if isinstance(item.image, int):
        return draw_shapes(item.image)
    image, mask = _decode(item.image, "RGB"), _decode(item.mask, "index")
    if mask.size != image.size:
        raise InputError(
            f"mask {item.mask} is {mask.width} x {mask.height}, its image {image.width} x {image.height}; expected the same size"
        )
    values = next(values for ending, values in data.values.items() if item.mask.stem.endswith(ending))
    classes = mask.point(values.tolist())
    if 254 in np.asarray(classes):  # not a class
        wrong = [value for value, pixels in enumerate(mask.histogram()) if pixels and values[value] == 254]
        raise InputError(
            f"mask {item.mask} holds the value {', '.join(map(str, wrong[:5]))}; expected "
            f"0 to {np.flatnonzero(values[:255] != 254).max()}, and 255 for pixels to ignore"
        )
    return image, classes


# ----------------------------------------------------------------------------------------------------------------------
# augmentation


def random_view(image, mask, crop, scales, rng):
    """Random scale, crop and flip of an image and its mask together: the weak view.

    Returns uint8 tensors image (3,crop,crop), mask (crop,crop) and the bool valid (crop,crop), False on padding, where
    the mask is 255. Only the part of the image that the crop shows is resized.
    """
    scale = rng.uniform(*scales)
    shown = [min(side, round(crop / scale)) for side in image.size]  # width and height, in pixels of the image
    size = [  # in pixels of the view
        crop if part < side else min(crop, max(1, round(side * scale))) for part, side in zip(shown, image.size)
    ]
    left, top = (int(rng.integers(side - part + 1)) for part, side in zip(shown, image.size))
    box = (left, top, left + shown[0], top + shown[1])
    x, y = (int(rng.integers(crop - side + 1)) for side in size)  # > 0: padding before
    window = (..., slice(y, y + size[1]), slice(x, x + size[0]))

    view = torch.tensor([round(255 * mean) for mean in MEAN], dtype=torch.uint8).view(3, 1, 1).repeat(1, crop, crop)
    view[window] = VF.resize(VF.pil_to_tensor(image.crop(box)), size[::-1], antialias=True)
    label = torch.full((crop, crop), IGNORE, dtype=torch.uint8)
    label[window] = VF.pil_to_tensor(mask.resize(size, Image.Resampling.NEAREST, box))[0]
    valid = torch.zeros(crop, crop, dtype=torch.bool)
    valid[window] = True
    if rng.random() < 0.5:
        view, label, valid = view.flip(-1), label.flip(-1), valid.flip(-1)
    return view, label, valid


STRONG = v2.Compose(  # FixMatch's strong view of a weak one, with the field's usual strengths
    [
        v2.RandomApply([v2.ColorJitter(0.5, 0.5, 0.5, 0.25)], p=0.8),
        v2.RandomGrayscale(p=0.2),
        v2.RandomApply([v2.GaussianBlur(kernel_size=9, sigma=(0.1, 2.0))], p=0.5),
    ]
)


def strong_views(weak, seed, numbers):
    """Color jitter, grey and blur of uint8 images (B,3,H,W), on their device; a pure function of (seed, number) for each.

    Geometry stays, so labels of the weak views fit. numbers: of the draws, see `TrainingViews`.
    """
    strong = []
    with torch.random.fork_rng(devices=[]):
        for image, number in zip(weak, numbers):
            torch.manual_seed(int(generator(seed, "strong", number).integers(2**63)))
            strong.append(STRONG(image))
    return torch.stack(strong)


def cutmix(images, labels, rng, probability=0.5):
    """CutMix (Yun et al., 2019): a box of another image of the batch, and of its labels, is pasted into each image.

    images (B,3,H,W), labels (B,H,W); each image is mixed with the given probability, with the next one of the batch; the
    box covers half of the image in a random shape (French et al., 2020). Returns new tensors; a batch of one stays.
    """
    batch, height, width = labels.shape
    mixed_images, mixed_labels = images.clone(), labels.clone()
    for i in range(batch):
        rows = 0.5 ** rng.random()  # share of the height; the share of the width makes the area one half
        box_height, box_width = round(rows * height), round(0.5 / rows * width)
        top, left = rng.integers(height - box_height + 1), rng.integers(width - box_width + 1)
        if rng.random() < probability:
            box = (..., slice(top, top + box_height), slice(left, left + box_width))
            partner = (i + 1) % batch
            mixed_images[i][box] = images[partner][box]
            mixed_labels[i][box] = labels[partner][box]
    return mixed_images, mixed_labels


def normalize(images):
    """uint8 images (B,3,H,W) -> float, with ImageNet's mean and standard deviation; on whatever device they are."""
    mean, std = _mean_and_std(images.device)
    return (images - mean) / std


@lru_cache  # a copy to the device waits for it, so there is one
def _mean_and_std(device):
    return [torch.tensor(values, device=device).view(3, 1, 1) * 255 for values in (MEAN, STD)]


# ----------------------------------------------------------------------------------------------------------------------
# loaders


@lru_cache(maxsize=4)
def _order(seed, stream, epoch, length):
    return generator(seed, stream, epoch).permutation(length)


def drawn(items, seed, stream, number):
    """Draw `number` from an endless row of shuffled passes over the items; a pure function of its arguments."""
    epoch, place = divmod(number, len(items))
    return items[_order(seed, stream, epoch, len(items))[place]]


class TrainingViews(Dataset):
    """Sample n of the whole run: the n-th draw of a labeled image and, unless supervised, of an unlabeled one.

    x (3,crop,crop) uint8, y (crop,crop) uint8; weak like x; valid (crop,crop) bool, False on padding; truth like y, 255
    where nobody labeled: for figures, never for the loss. Strong views are made on the device, by `strong_views`.
    """

    def __init__(self, data, crop, framework, seed):
        self.data, self.crop, self.framework, self.seed = data, crop, framework, seed

    def __getitem__(self, n):
        rng = generator(self.seed, "view_x", n)
        item = drawn(self.data.labeled, self.seed, "order_x", n)
        x, y, _ = random_view(*read(item, self.data), self.crop, self.data.scales, rng)
        sample = {"x": x, "y": y, "id_x": item.id}
        if self.framework == "supervised":
            return sample
        rng = generator(self.seed, "view_u", n)
        item = drawn(self.data.unlabeled, self.seed, "order_u", n)
        if item.mask is None:
            image = read_image(item)
            mask = Image.new("L", image.size, IGNORE)
        else:
            image, mask = read(item, self.data)
        weak, truth, valid = random_view(image, mask, self.crop, self.data.scales, rng)
        return sample | {"weak": weak, "truth": truth, "valid": valid, "id_u": item.id}


def draws(step, batch_size, rank=0, world=1):
    """The numbers of the draws that a process sees in a step: together the processes see B * world new ones."""
    first = (step * world + rank) * batch_size
    return range(first, first + batch_size)


def training_loader(data, steps, batch_size, crop, framework, seed, workers=0, rank=0, world=1, pin_memory=False):
    """One batch per step of the range `steps`, for one process of `world`: the draws that `draws` names.

    Together the processes see what one process with batch B*world would see. Raises InputError where the crop is larger
    than any view of the first labeled image could fill.
    """
    side = max(read_image(data.labeled[0]).size)
    if crop > data.scales[1] * side:
        raise InputError(
            f"--crop {crop} is larger than the images can fill: {data.labeled[0].id} is {side} pixels long and at most "
            f"{data.scales[1]:g} times as large when resized; expected at most {int(data.scales[1] * side)}"
        )
    views = TrainingViews(data, crop, framework, seed)
    numbers = [draws(t, batch_size, rank, world) for t in steps]
    return DataLoader(
        views, batch_sampler=numbers, num_workers=workers, pin_memory=pin_memory, worker_init_fn=_outlast_sigterm
    )


def _outlast_sigterm(worker):
    """Schedulers signal all processes at once; the run still has a step to finish, and ends its workers itself."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def batches(loader):
    """What the loader gives. A worker that dies is a RuntimeError that `dead_worker` understands."""
    iterator = iter(loader)
    while True:
        try:
            batch = next(iterator)
        except StopIteration:
            return
        except (ConnectionError, EOFError):  # the worker died while it was handing something over
            time.sleep(5)  # until PyTorch hears of it, and raises its own error
            raise
        yield batch


def _reading(read_one, items, workers):
    """read_one(item), in the loader's workers, for one item after another."""
    return DataLoader(items, batch_size=None, collate_fn=read_one, num_workers=workers, worker_init_fn=_outlast_sigterm)


def image_loader(paths, workers=0):
    """Images of files {id: path}: (id, (3,H,W) uint8), or (id, what is wrong with the file)."""

    def read_one(item):
        id, path = item
        try:
            return id, VF.pil_to_tensor(_decode(path, "RGB"))
        except InputError as error:
            return id, str(error)

    return _reading(read_one, list(paths.items()), workers)


def evaluation_loader(data, items, workers=0, rank=0, world=1):
    """Whole images (1,3,H,W) with their masks (1,H,W), uint8, 255 to ignore; each process sees its own share, none twice."""

    def read_one(item):
        image, mask = read(item, data)
        return VF.pil_to_tensor(image)[None], VF.pil_to_tensor(mask)

    return _reading(read_one, items[rank::world], workers)


# ----------------------------------------------------------------------------------------------------------------------
# fetching and checking


def say(line, live=False):
    """Prints a line. On a terminal a live one gives way to the next; anywhere else each stays."""
    terminal = sys.stdout.isatty()
    if terminal and live:
        line = line[: os.get_terminal_size().columns - 1]
    print(("\r\033[K" if terminal else "") + line, end="" if terminal and live else "\n", flush=True)


def reported(items, total, what, start=0):
    """Yields the items, and says how far it is and how long the rest takes: every few seconds, on a terminal all the time."""
    began = last = time.monotonic()
    for done, item in enumerate(items, start + 1):
        yield item
        now = time.monotonic()
        if now - last > (0.2 if sys.stdout.isatty() else 5):
            left = (now - began) / (done - start) * (total - done)
            say(f"{what}: {done} of {total}, {time_left(left)} left", live=True)
            last = now
    if last != began:
        say(f"{what}: {total} of {total}")


def time_left(seconds):
    """A duration as people say it."""
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}h{minutes % 60:02d}m" if minutes >= 60 else f"{minutes}m{seconds:02d}s"


def download(url, folder, md5):
    """Downloads a file whole, going on where an earlier attempt stopped. Returns its path. Raises InputError."""
    path = Path(folder) / url.rsplit("/", 1)[1]
    if check_integrity(path, md5):
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    start = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"User-Agent": "S4MC", "Range": f"bytes={start}-"})
    try:
        with (
            urllib.request.urlopen(request, timeout=60) as answer,
            open(part, "ab" if answer.status == 206 else "wb") as file,  # 200: the server sends all of it again
        ):
            start = file.tell()
            blocks, size = iter(lambda: answer.read(2**20), b""), start + int(answer.headers.get("Content-Length", 0))
            for block in reported(blocks, size >> 20, f"MiB of {path.name}", start >> 20):
                file.write(block)
    except (OSError, http.client.HTTPException) as error:
        if getattr(error, "code", None) != 416:  # 416: nothing is left to ask for
            raise InputError(f"{url} could not be downloaded ({error}); run the same command again to go on") from error
        size = start
    if not check_integrity(part, md5):
        arrived = part.stat().st_size
        if arrived >= size:
            part.unlink()
        raise InputError(
            f"{url} sent {arrived} bytes of {size} with another checksum than {md5}; run the same command again"
        )
    os.replace(part, path)
    return path


def fetch_pascal(root, sbd):
    """PASCAL VOC 2012 by torchvision; with sbd also SegmentationClassAug/ for the images that SBD annotated."""
    if sbd:
        try:
            from scipy.io import loadmat
        except ImportError as error:
            raise InputError(
                "--sbd reads MATLAB files and needs scipy, which is not installed; pip install scipy"
            ) from error
    root, facts, lists = Path(root), DATASET_YEAR_DICT["2012"], SPLITS / "pascal"
    fine, val, train = (id_list(lists / f"{name}.txt") for name in ("1464", "val", "train"))

    def missing():
        """(the dataset's folder, files that it lacks)."""
        try:
            folder = find_root(root, PASCAL_PLACES, PASCAL_FOLDERS)
        except InputError:
            return root / facts["base_dir"], ["everything"]
        images, masks = (files(folder / name, IMAGE_SUFFIXES) for name in PASCAL_FOLDERS)
        return folder, [id for id in train + val if id not in images] + [id for id in fine + val if id not in masks]

    folder, lacking = missing()
    if lacking:
        if folder != root / facts["base_dir"]:
            raise InputError(
                f"{folder} lacks {len(lacking)} files of VOC 2012, first {lacking[0]}; expected all, or another --root"
            )
        download(facts["url"], root, facts["md5"])
        print("checking and unpacking", flush=True)
        VOCSegmentation(root, year="2012", download=True)  # finds the archive there
        folder, lacking = missing()
        if lacking:
            raise InputError(
                f"{folder} still lacks {len(lacking)} files, first {lacking[0]}; remove it and run this again"
            )
    if sbd:
        masks, matlab = folder / "SegmentationClassAug", root / "benchmark_RELEASE" / "dataset" / "cls"
        ids = [id for id in sorted(set(train) - set(fine)) if not (masks / f"{id}.png").is_file()]
        if not all((matlab / f"{id}.mat").is_file() for id in ids):
            archive = download(SBDataset.url, root, SBDataset.md5)
            print("unpacking", flush=True)
            extract_archive(str(archive), str(root))
        masks.mkdir(exist_ok=True)
        for id in reported(ids, len(ids), "coarse masks"):
            try:
                indices = loadmat(matlab / f"{id}.mat")["GTcls"][0]["Segmentation"][0]
            except Exception as error:  # scipy raises many kinds, all of them the file's fault
                raise InputError(
                    f"{matlab / id}.mat could not be read ({error}); remove it and run this again"
                ) from error
            save_mask(indices, masks / f"{id}.png")
    print(f"complete: {folder}; what was downloaded to {root} is no longer needed")


def fetch_cityscapes(root):
    """Says what to download, because Cityscapes asks for a login, and what is there."""
    print(
        "Cityscapes needs an account: https://www.cityscapes-dataset.com/downloads\n"
        f"Download leftImg8bit_trainvaltest.zip (11 GB) and gtFine_trainvaltest.zip (241 MB), and unpack both in {root}/cityscapes."
    )
    try:
        splits = list_cityscapes(root, SPLITS / "cityscapes")
    except InputError as error:
        print(f"not complete yet: {error}")
        return
    for split, items in splits.items():
        for kind in ("image", "mask"):
            there = sum(getattr(item, kind) is not None for item in items)
            print(f"{split}: {there} of {len(items)} {kind}s are there")


def export_shapes(root, labeled):
    """The drawn images as a folder of files: images/, masks/ of the labeled ones, val/, classes.txt."""
    data, root = open_dataset("shapes", None, labeled), Path(root)
    if root.exists() and any(root.iterdir()):
        raise InputError(f"--root {root} is not empty; expected a new folder, so that nothing in it is overwritten")
    for folder, items, masks in (
        ("", data.labeled + data.unlabeled, {item.id for item in data.labeled}),
        ("val", data.val, {item.id for item in data.val}),
    ):
        for kind in ("images", "masks"):
            (root / folder / kind).mkdir(parents=True)
        for item in items:
            image, mask = draw_shapes(item.image)
            image.save(root / folder / "images" / f"{item.id}.png")
            if item.id in masks:
                save_mask(np.asarray(mask), root / folder / "masks" / f"{item.id}.png")
    (root / "classes.txt").write_text("\n".join(data.classes) + "\n")
    print(
        f"wrote {root}: {len(data.labeled)} labeled, {len(data.unlabeled)} unlabeled, {len(data.val)} validation images"
    )


def save_mask(mask, path, colors=None):
    """Writes class indices (H,W) uint8 as a PNG with a palette, aside and then renamed."""
    image, path = Image.fromarray(mask), Path(path)
    image.putpalette((palette() if colors is None else colors).tobytes())
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f"{path.name}.tmp")
    image.save(aside, "PNG")
    os.replace(aside, path)


def painted_codes(path, by_value):
    """(H,W) int: the values of a mask as stored, or its colors as 0xRRGGBB. Raises InputError."""
    if by_value:
        return np.asarray(_decode(path, "index")).astype(int)
    return np.asarray(_decode(path, "RGB")).astype(int) @ [1 << 16, 1 << 8, 1]


def _holds_values(path):
    """Whether a mask is stored as one value per pixel."""
    try:
        return bool(_decode(path, "index"))
    except InputError:
        return False


def code_text(code, by_value):
    """A value, or a color as r,g,b."""
    return str(code) if by_value else f"{code >> 16},{code >> 8 & 255},{code & 255}"


def read_colors(file):
    """({code: class index or 255}, [class names], by value?) of a CSV with lines name,r,g,b or name,value; "ignore" is 255."""
    if not file.is_file():
        raise InputError(f"--colors {file} is not there; expected lines name,r,g,b or name,value, one per class")
    lines = csv.reader(file.read_text("utf-8-sig", errors="replace").splitlines())
    rows = [[cell.strip() for cell in row] for row in lines if row] or [[]]
    for row in rows:
        numbers = all(cell.isdecimal() and int(cell) < 256 for cell in row[1:])
        if len(row) not in (2, 4) or len(row) != len(rows[0]) or not numbers:
            held = f"--colors {file} holds {','.join(row)!r}"
            raise InputError(f"{held}; expected lines name,r,g,b or name,value alone")
    twice = [row for row, count in Counter(tuple(row[1:]) for row in rows).items() if count > 1]
    if twice:
        raise InputError(f"--colors {file} names {','.join(twice[0])} twice; expected one class for it")
    names = list(dict.fromkeys(row[0] for row in rows if row[0] != "ignore"))
    codes = {int.from_bytes(map(int, row[1:])): IGNORE if row[0] == "ignore" else names.index(row[0]) for row in rows}
    return codes, names, len(rows[0]) == 2


def convert_masks(root, colors):
    """Masks painted in colors or other values -> class indices, and classes.txt; the painted ones stay in masks-painted/.

    colors None: prints what the masks hold, as lines for the CSV. Raises InputError, before anything is changed.
    """
    root = find_root(root, (), ("masks",))
    masks, kept, made = root / "masks", root / "masks-painted", root / "masks-converted"
    painted = files(masks, READABLE, nested=True)
    if not painted:
        raise InputError(f"{masks} holds no image; expected painted masks")
    if colors is None:
        by_value = all(map(_holds_values, painted.values()))
        pixels = Counter()
        for path in painted.values():
            pixels.update(dict(zip(*np.unique(painted_codes(path, by_value), return_counts=True))))
        if len(pixels) > 256:
            raise InputError(f"{masks} holds {len(pixels)} colors; expected one per class, not blended (PNG, no JPEG)")
        ignored = by_value and not set(pixels) <= {0, IGNORE} and pixels.pop(IGNORE, None)
        lines = [f"class {i},{code_text(int(code), by_value)}" for i, (code, _) in enumerate(pixels.most_common())]
        print("\n".join(lines + [f"ignore,{IGNORE}"] * bool(ignored)))
        return
    codes, names, by_value = read_colors(Path(colors))
    if len(names) < 2:
        raise InputError(f"{colors} names {len(names)} classes; expected two or more, beside ignore")
    listed = root / "classes.txt"
    if listed.exists() and id_list(listed) != names:
        raise InputError(
            f"{listed} names other classes than {colors}, {', '.join(names)}; make them the same, or remove it"
        )
    for folder in (kept, made):
        if folder.exists():
            raise InputError(f"{folder} is there already, from an earlier conversion; move it away first")
    try:
        for id, path in reported(painted.items(), len(painted), "masks"):
            image = painted_codes(path, by_value)
            found, place = np.unique(image, return_inverse=True)
            unknown = [code_text(int(code), by_value) for code in found if int(code) not in codes]
            if unknown:
                raise InputError(
                    f"{path} holds {' and '.join(unknown[:5])}{f' and {len(unknown) - 5} more' if len(unknown) > 5 else ''}, which {colors} "
                    f"does not; add a line for it, ignore,{unknown[0]} where it means nothing"
                )
            index = np.array([codes[int(code)] for code in found], np.uint8)[place]
            save_mask(index.reshape(image.shape), made / f"{id}.png")
    except InputError:
        shutil.rmtree(made, ignore_errors=True)
        raise
    os.replace(masks, kept)
    os.replace(made, masks)
    listed.write_text("\n".join(names) + "\n")
    print(f"wrote {len(painted)} masks and classes.txt; the painted ones are in {kept}")


def check(dataset, root, labeled, splits):
    """Reads every image and mask in use and prints what was found. Raises InputError that lists what is missing or broken."""
    data = open_dataset(dataset, root, labeled, splits, use=())
    sizes, values, problems = Counter(), np.zeros(256, np.int64), []

    def look(item):
        """((width, height), counts of the mask's classes), or a sentence."""
        try:
            if item.image is None:
                return f"image {item.id} is missing"
            if item.mask is None:
                return read_image(item).size, 0
            image, mask = read(item, data)
            return image.size, np.bincount(np.asarray(mask).ravel(), minlength=256)
        except InputError as error:
            return str(error)

    began = time.monotonic()
    print("\n".join(data.notes), end="\n" if data.notes else "")
    parts = {"labeled": data.labeled, "unlabeled": data.unlabeled, "val": data.val}
    for part, items in parts.items():
        masks = sum(item.mask is not None for item in items)
        print(f"{part}: {len(items)} images, {masks} masks{', none is needed' if part == 'unlabeled' else ''}")
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            for item, found in reported(zip(items, pool.map(look, items)), len(items), "images read"):
                if isinstance(found, str):
                    problems.append(found)
                    continue
                sizes[found[0]] += 1
                values += found[1]
                if item.mask is None and part != "unlabeled":
                    problems.append(f"mask of the {part} image {item.id} is missing; {DATASETS[dataset].get}")
    seconds, count = time.monotonic() - began, max(1, sizes.total())
    common = ", ".join(f"{width} x {height} ({n})" for (width, height), n in sizes.most_common(4))
    print(f"sizes: {common}{f', and {len(sizes) - 4} more' if len(sizes) > 4 else ''}")
    for value in np.flatnonzero(values):
        meaning = "ignored" if value == IGNORE else data.classes[value]
        print(f"{value:4} {meaning:20} {values[value] / values.sum():7.2%} of the mask pixels")
    print(f"{sizes.total()} images read in {seconds:.1f} s, {1000 * seconds / count:.1f} s per thousand")
    if problems:
        listed = "\n".join(problems)
        raise InputError(f"{listed}\n{len(problems)} files are missing or broken; each is named above")
    print("nothing is missing, nothing is broken")


COMMANDS = {
    "pascal": fetch_pascal, "cityscapes": fetch_cityscapes, "check": check, "masks": convert_masks, "shapes": export_shapes,
}  # fmt: skip


def parse_args(argv=None):
    """The command line: a function of COMMANDS and its arguments."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    pascal = commands.add_parser("pascal", help="download PASCAL VOC 2012")
    pascal.add_argument("--sbd", action="store_true", help="also SBD's masks, for 2646 and 5291 labels; needs scipy")
    cityscapes = commands.add_parser("cityscapes", help="say what to download, and what is there")
    check = commands.add_parser("check", help="read every image and mask in use")
    check.add_argument("--dataset", choices=DATASETS, required=True)
    check.add_argument("--labeled", default="all", help="number of labeled images, a file of their ids, or all")
    check.add_argument("--splits", help="folder of published lists; default: the one beside this file")
    masks = commands.add_parser("masks", help="masks painted in colors -> masks of class indices")
    masks.add_argument("--colors", metavar="CSV", help="name,r,g,b or name,value; without: print what the masks hold")
    shapes = commands.add_parser("shapes", help="write the drawn images as a folder of files")
    shapes.add_argument("--labeled", type=int, default=24, help="how many images get a mask; default: 24")
    for command in (pascal, cityscapes, check, masks, shapes):
        command.add_argument("--root", default="data", help="folder of the dataset; default: data")
    return parser.parse_args(argv)


def main(argv=None):
    """Fetches, checks, converts, exports."""
    args = vars(parse_args(argv))
    COMMANDS[args.pop("command")](**args)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    except (InputError, OSError) as error:
        sys.exit(f"data.py: {error}")
