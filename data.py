"""Datasets, partitions, weak and strong views, CutMix, loaders.

    data = open_dataset("pascal", "data", labeled=92)             # lists of images, cut into a partition
    loader = training_loader(data, steps=range(0, 1000), ...)     # one batch of labeled and unlabeled views per step

Samples and views are functions of (seed, stream, number of the sample), so that neither the number of workers nor a
resumed run changes anything. Images travel as uint8 and are normalized on the device, by `normalize`.
"""

import logging
import os
import re
import shlex
import shutil
import signal
import sys
import threading
import time
import unicodedata
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import lru_cache, partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps, PngImagePlugin, UnidentifiedImageError
from torch.utils.data import DataLoader, Dataset
from torchvision.datasets import Cityscapes
from torchvision.transforms.v2 import functional as VF

IGNORE, NO_CLASS = 255, 254
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, which torchvision's weights expect
STUBS = ("BUFR", "GRIB", "HDF5", "MPEG", "WMF")  # Pillow knows their names and cannot read them
SUFFIXES = Image.registered_extensions()
READABLE = tuple(suffix for suffix, kind in SUFFIXES.items() if kind in Image.OPEN and kind not in STUBS)
SYSTEM_FILES = (  # of Windows, macOS, Linux and network storage, in lower case; names with a dot in front beside them
    "thumbs.db", "desktop.ini", "__macosx", "lost+found", "@eadir", "@tmp", "#recycle", "#snapshot", "@recycle",
    "@recently-snapshot", "$recycle.bin", "system volume information",
)  # fmt: skip
SPLITS = Path(__file__).parent / "splits"
STREAMS = {name: number for number, name in enumerate(("order_x", "order_u", "view_x", "view_u", "step", "strong"))}


class InputError(ValueError):
    """Something in the user's files or arguments; the message says what was found, expected, and to be done."""


def generator(*key):
    """A NumPy generator that is a pure function of the key: (seed, stream name, number, ...)."""
    return np.random.default_rng([STREAMS[part] if isinstance(part, str) else part for part in key])


# ----------------------------------------------------------------------------------------------------------------------
# lists of images


class Item(NamedTuple):
    """One image and its mask: files, or None where there is no such file."""

    id: str
    image: Path | None
    mask: Path | None


def walk(folder, above=()):
    """Yield every file below a folder in sorted order; links are followed, unless in a circle. Hidden files and those
    of the operating system are skipped."""
    place = os.path.realpath(folder)
    if place in above or not os.path.isdir(place):
        return
    for path in sorted(Path(folder).iterdir()):
        if path.name.startswith(".") or path.name.lower() in SYSTEM_FILES:
            continue
        if path.is_dir():
            yield from walk(path, (*above, place))
        else:
            yield path


def suffix(path):
    """In lower case, and without a space at its end."""
    return path.suffix.lower().rstrip()


def files(folder, suffixes=READABLE):
    """{path below the folder, without suffix and in Unicode's composed form: path} of `walk`'s files with one of the
    suffixes. Raises InputError where two files have one id, or a name is not UTF-8."""
    found = {}
    for path in walk(folder):
        if suffix(path) in suffixes:
            id = unicodedata.normalize("NFC", path.relative_to(folder).with_suffix("").as_posix())
            if id in found:
                raise InputError(f"{found[id]} and {path} have the same name; remove one of them")
            if any("\ud800" <= letter <= "\udfff" for letter in id):  # how Python holds bytes that are not UTF-8
                raise InputError(f"the name of {path} is not UTF-8; rename the file")
            found[id] = path
    return found


def find_root(root, names, folders):
    """`root`, or the first of `root/name`, that holds the folders. Raises InputError where none does."""
    for place in (Path(root), *(Path(root) / name for name in names)):
        if all((place / folder).is_dir() for folder in folders):
            return place
    below = f", or in {' or '.join(names)} below it" if names else ""
    raise InputError(f"--root {root} is not the dataset; expected the folders {', '.join(folders)} in it{below}")


def read_text(file):
    """A text file in UTF-8, UTF-16 or, where it is neither, Latin-1."""
    written = Path(file).read_bytes()
    if written[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return written.decode("utf-16", "replace")
    try:
        return written.decode("utf-8-sig")
    except UnicodeDecodeError:
        return written.decode("latin-1")


def spellings(line):
    r"""Yield the image ids that a line may mean: "p1", "p1.jpg", "images/p1.jpg masks/p1.png", "images\p1.jpg"."""
    yield line
    columns = line.strip(), line.split()[0], re.match(r".*?\.\w+(?=[\s,;])|", line.strip())[0]
    for name in columns:
        *above, name = re.split("images/", name.replace("\\", "/"), flags=re.IGNORECASE)
        if above and above[-1].endswith("val/"):  # images of another folder, with ids of their own
            continue
        path = Path(name)
        yield path.as_posix()
        if suffix(path) in READABLE:
            yield path.with_suffix("").as_posix()


def id_list(file, known=()):
    """Return the names in a file, one per line, as they are spelled in `known`. Raises InputError if there are none."""
    lines = read_text(file).splitlines() if Path(file).is_file() else []
    spelled = {id.strip(): id for id in known} | {id: id for id in known}
    ids = []
    for line in filter(str.strip, lines):
        line = unicodedata.normalize("NFC", line)
        meant = next((name for name in spellings(line) if name in spelled), None)
        ids.append(line.strip() if meant is None else spelled[meant])
    if not ids:
        raise InputError(f"the list {file} is not there, or empty; expected one image id per line")
    return ids


def list_folder(root, lists):
    """Items of a folder of one's own: images/, and masks/ (PNG) of the annotated ones; for validation val/ with
    the same two, or the ids of val.txt."""
    root, parts, convert = find_root(root, (), ("images", "masks")), [], f"tools/own_images.py {shlex.quote(str(root))}"
    for place, prefix in ((root, ""), (root / "val", "val/")):
        images, masks = files(place / "images"), files(place / "masks")
        others = [mask for mask in masks.values() if suffix(mask) != ".png"]
        if others:
            raise InputError(f"mask {others[0]} is no PNG file of class indices; `python {convert}` converts")
        parts.append({id: Item(prefix + id, path, masks.get(id)) for id, path in images.items()})
    items, val = parts
    if (root / "val").is_dir():
        return {"train": [*items.values()], "val": [*val.values()]}
    if not (root / "val.txt").is_file():
        raise InputError(f"{root} has neither val/ nor val.txt; `python {convert}` writes val.txt")
    ids = dict.fromkeys(id_list(root / "val.txt", items))
    unknown = [id for id in ids if id not in items]
    if unknown:
        raise InputError(f"{root / 'val.txt'} names {unknown[0]}, which is not in images/; correct the list")
    return {"train": [item for id, item in items.items() if id not in ids], "val": [items[id] for id in ids]}


def list_camvid(root, lists):
    """Items of CamVid (Brostow et al., 2008) in SegNet's layout: train/, trainannot/; val and test likewise."""
    root, splits = Path(root), {}
    root = root / "camvid" if (root / "camvid").is_dir() else root
    for split in ("train", "val", "test"):
        images, masks = files(root / split), files(root / f"{split}annot", (".png",))
        splits[split] = [Item(id, image, masks.get(id)) for id, image in images.items()]
    return splits


def list_pascal(root, lists):
    """Items of PASCAL VOC 2012 (Everingham et al., 2010), and SBD (Hariharan et al., 2011), as the lists name them.

    Masks: SegmentationClass/ for the images that VOC annotated finely, SegmentationClassAug/ for all others.
    """
    root = find_root(root, ("VOC2012", "VOCdevkit/VOC2012"), ("JPEGImages", "SegmentationClass"))
    images = files(root / "JPEGImages")
    fine, coarse = (files(root / folder, (".png",)) for folder in ("SegmentationClass", "SegmentationClassAug"))
    finely = set(id_list(lists / "1464.txt")) | set(id_list(lists / "val.txt"))
    masks = fine | {id: mask for id, mask in coarse.items() if id not in finely}
    splits = {split: id_list(lists / f"{split}.txt") for split in ("train", "val")}
    return {split: [Item(id, images.get(id), masks.get(id)) for id in ids] for split, ids in splits.items()}


def list_cityscapes(root, lists):
    """Items of Cityscapes (Cordts et al., 2016), as the lists name them; masks: labelTrainIds, else labelIds."""
    root, splits = find_root(root, ("cityscapes",), ("leftImg8bit", "gtFine")), {}
    for split in ("train", "val"):
        images, masks = files(root / "leftImg8bit" / split), files(root / "gtFine" / split, (".png",))
        splits[split] = []
        for id in id_list(lists / f"{split}.txt"):
            place = f"{id.split('_')[0]}/{id}"
            kinds = (masks.get(f"{place}_gtFine_{kind}") for kind in ("labelTrainIds", "labelIds"))
            splits[split].append(Item(id, images.get(f"{place}_leftImg8bit"), next(filter(None, kinds), None)))
    return splits


# ----------------------------------------------------------------------------------------------------------------------
# the table of datasets


def mask_values(classes):
    """(256,) uint8: the class of each value in a mask's file, from {value: class}; NO_CLASS for any other but 255."""
    values = np.full(256, NO_CLASS, np.uint8)
    values[[IGNORE, *classes]] = [IGNORE, *classes.values()]
    return values


class Spec(NamedTuple):
    """The facts of a dataset; only its presets stand elsewhere, in train.py."""

    classes: tuple | None  # names by index; None: those of root/classes.txt
    list_items: Callable  # (root, folder of lists) -> {"train": [Item], "val": [Item], perhaps "test": [Item]}
    values: dict  # for each end of a mask's name its `mask_values`; {}: the values are the classes
    scales: tuple = (0.5, 2.0)  # of random resizing; the field's usual range


SHAPES = (  # texture and form of each class
    ("striped", "disc"), ("checked", "square"), ("ringed", "triangle"),
    ("speckled", "disc"), ("zigzag", "square"), ("dotted", "triangle"),
)  # fmt: skip
CAMVID_CLASSES = (
    "sky", "building", "pole", "road", "pavement", "tree", "sign symbol", "fence", "car", "pedestrian", "bicyclist",
)  # fmt: skip
PASCAL_CLASSES = (
    "background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "dining table",
    "dog", "horse", "motorbike", "person", "potted plant", "sheep", "sofa", "train", "tv monitor",
)  # fmt: skip
CITYSCAPES = [(c.name, c.id % 256, c.train_id, c.ignore_in_eval) for c in Cityscapes.classes]  # id -1 is stored as 255
CITYSCAPES_VALUES = {
    "labelTrainIds": mask_values({i: i for i in range(19)}),
    "labelIds": mask_values({id: IGNORE if ignored else train_id for _, id, train_id, ignored in CITYSCAPES}),
}
DATASETS = {
    "shapes": Spec(None, list_folder, {}, scales=(0.75, 1.5)),  # drawn, see `write_shapes`
    "folder": Spec(None, list_folder, {}),
    "camvid": Spec(CAMVID_CLASSES, list_camvid, {"": mask_values({i: i for i in range(11)} | {11: IGNORE})}),
    "pascal": Spec(PASCAL_CLASSES, list_pascal, {}),
    "cityscapes": Spec(tuple(name for name, *_, off in CITYSCAPES if not off), list_cityscapes, CITYSCAPES_VALUES),
}


class Data(NamedTuple):
    """A dataset cut into a partition."""

    name: str
    classes: tuple  # names by class index
    scales: tuple
    values: dict  # see Spec
    labeled: list  # of Item
    unlabeled: list  # their masks, where there are any, serve only for figures
    val: list
    test: list  # empty where the dataset has none


def open_dataset(name, root, labeled, splits=None, use=("labeled", "unlabeled", "val")):
    """Lists a dataset and cuts its training images into labeled and unlabeled ones.

    labeled: "all", a file or a list of image ids, or a number N: the list splits/<name>/N.txt, or, for datasets without
    lists, N annotated images evenly spaced by id. unlabeled: the training images that are not labeled.
    use: the parts that will be read; only their files have to be there, and unlabeled images need no masks.
    Raises InputError for an unknown list or id, and for a part in use that is empty or lacks files.
    """
    spec, lists = DATASETS[name], Path(splits or SPLITS) / name
    root = write_shapes(Path(root) / "shapes") if name == "shapes" else Path(root)
    items = spec.list_items(root, lists)
    classes = spec.classes or tuple(id_list(root / "classes.txt"))
    twice = [one for one in dict.fromkeys(classes) if classes.count(one) > 1]
    if twice:
        raise InputError(f"{root / 'classes.txt'} names {twice[0]} twice; expected every class once")
    if len(classes) > NO_CLASS:
        raise InputError(f"{root / 'classes.txt'} names {len(classes)} classes; expected {NO_CLASS} at most")
    values = spec.values or {"": mask_values({i: i for i in range(len(classes))})}
    training = {"labeled", "unlabeled"} & set(use)
    if training and not items["train"]:
        raise InputError(f"{name} under {root} has no training images; docs/faq.md says where its files go")
    named = isinstance(labeled, (list, tuple))  # a run's own ids; their files may be absent
    chosen = labeled_ids(name, items["train"], labeled, lists) if training else set(labeled if named else ())
    parts = ([item for item in items["train"] if (item.id in chosen) == wanted] for wanted in (True, False))
    data = Data(name, classes, spec.scales, values, *parts, items["val"], items.get("test", []))
    for part in use:
        members = getattr(data, part)
        if not members:
            advice = "use --framework supervised, or fewer labels" if part == "unlabeled" else "expected some"
            raise InputError(f"{name} under {root} has no {part} images; {advice}")
        for kind in ("image",) if part == "unlabeled" else ("image", "mask"):
            missing = [item.id for item in members if getattr(item, kind) is None]
            if missing:
                raise InputError(
                    f"{len(missing)} of {len(members)} {part} images of {name} have no {kind} under {root}, first "
                    f"{', '.join(missing[:3])}; docs/faq.md says where its files go"
                )
    return data


def labeled_ids(name, items, labeled, lists):
    """The set of ids that --labeled means; see `open_dataset`."""
    annotated, known = [item.id for item in items if item.mask], [item.id for item in items]
    published = sorted(int(path.stem) for path in lists.glob("*.txt") if path.stem.isdecimal())
    if isinstance(labeled, (list, tuple)):
        chosen = set(labeled)
    elif str(labeled) == "all":
        chosen = set(annotated)
    elif str(labeled).isdecimal() and not published:
        if not 1 <= int(labeled) <= len(annotated):
            raise InputError(f"--labeled {labeled} is impossible; expected 1 to {len(annotated)} images with a mask")
        chosen = {annotated[i * len(annotated) // int(labeled)] for i in range(int(labeled))}
    elif str(labeled).isdecimal() and int(labeled) not in published:
        raise InputError(f"{name} has no list of {labeled} labeled images; expected one of {published}, or a file")
    else:
        chosen = set(id_list(lists / f"{labeled}.txt" if str(labeled).isdecimal() else labeled, known))
    unknown = sorted(chosen - set(known))
    if unknown:
        raise InputError(
            f"--labeled {labeled}: {len(unknown)} ids are not in the training images, first {unknown[0]}; expected ids "
            f"like {known[0]}, and none of the images for validation"
        )
    return chosen


# ----------------------------------------------------------------------------------------------------------------------
# reading and writing


SUBFILE, BITS, BANDS, REDUCED_OR_MASK = 254, 258, 277, 1 | 4  # tags of TIFF; bits of the first
SIXTEEN_BITS = re.compile(r";16[BLN]|'RGB', \d{4,}")  # in the arguments of Pillow's decoders
THREE_BANDS = "expected gray, RGB or RGBA of 8 bits; write such a copy, as gdal_translate -b 1 -b 2 -b 3 does"

warnings.filterwarnings("ignore", module="PIL")  # they name a line of Pillow, not the picture
logging.getLogger("PIL").setLevel(logging.CRITICAL)
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY  # a large comment is no reason to refuse a picture


def count_pages(image):
    """Return the number of full-size pages of an opened file: slices of a stack, frames of an animation.

    Overviews and masks of a GeoTIFF, the second picture of a phone (MPO) and layers (PSD) are no pages.
    """
    count = getattr(image, "n_frames", 1)
    if image.format in ("MPO", "PSD"):
        return 1
    if image.format != "TIFF" or count == 1:
        return count
    sizes = []
    for number in range(count):
        image.seek(number)
        if not image.tag_v2.get(SUBFILE, 0) & REDUCED_OR_MASK:
            sizes.append(image.size)
    image.seek(0)
    return sizes.count(image.size)


def what_is_lost(image, mode):
    """Return what Pillow would lose of an opened file without a word, and what to do about it; usually ""."""
    pages = count_pages(image)
    if pages > 1:
        return f"holds {pages} pages; expected one; write each page to a file of its own"
    tags = image.tag_v2 if image.format == "TIFF" else {}
    if tags.get(BANDS, 1) > 4:
        return f"holds {tags[BANDS]} bands; {THREE_BANDS}"
    deep = SIXTEEN_BITS.search(str(image.tile)) or max(tags.get(BITS, (8,))) > 8
    if image.mode[0] in "IF":  # gray; the values of a mask are kept
        deep = mode != "L"
    if deep:
        return "has more than 8 bits per channel; expected 8; scale all files alike to 0..255"
    return ""


def open_image(path, mode):
    """Return a file's pixels: an upright image ("RGB", "RGBA"), or a mask's values as they are stored ("L").

    Raises InputError for a file that Pillow cannot read, or cannot read without loss.
    """
    try:
        with Image.open(path) as image:
            lost = what_is_lost(image, mode)
            image.load()
            if mode != "L":
                with suppress(Exception):  # damaged metadata
                    ImageOps.exif_transpose(image, in_place=True)
                image = image.convert(mode)
    except Image.DecompressionBombError as error:
        size = str(error).partition(",")[0]
        raise InputError(f"{path} is too large ({size}); cut it into tiles, as gdal_retile.py does") from error
    except Exception as error:  # Pillow raises many kinds, all of them the file's fault
        advice = "replace the file, or leave this image out"
        if isinstance(error, UnidentifiedImageError) and suffix(Path(path)) in (".tif", ".tiff"):
            advice = f"perhaps it has more bands than four; {THREE_BANDS}"
        raise InputError(f"{path} could not be read ({error}); {advice}") from error
    if lost:
        raise InputError(f"{path} {lost}")
    return image


def read(item, data):
    """(image, mask) of an item: PIL images of the same size, the mask of classes and 255; without a mask all is 255.

    Raises InputError that names the file: unreadable, of another size than its image, or with a value that is no class.
    """
    image = open_image(item.image, "RGB")
    if item.mask is None:
        return image, Image.new("L", image.size, IGNORE)
    mask = open_image(item.mask, "L")
    convert = "tools/own_images.py converts other masks"
    if data.name not in ("folder", "shapes"):
        convert = f"as {data.name}'s own archive has them; there are copies with others"
    if mask.format != "PNG":  # whatever its suffix says; JPEG changes values
        raise InputError(f"mask {item.mask} is a {mask.format} file; expected PNG of class indices ({convert})")
    if mask.mode not in ("L", "P"):
        raise InputError(f"mask {item.mask} is a {mask.mode} image; expected class indices ({convert})")
    if mask.size != image.size:
        raise InputError(f"mask {item.mask} has {mask.size} pixels, its image {image.size}; expected the same size")
    values = next(values for ending, values in data.values.items() if item.mask.stem.endswith(ending))
    wrong = [value for value, pixels in enumerate(mask.histogram()) if pixels and values[value] == NO_CLASS]
    if wrong:
        raise InputError(
            f"mask {item.mask} holds the value {', '.join(map(str, wrong[:5]))}; expected a class index from 0 to "
            f"{len(data.classes) - 1}, or 255 for pixels to ignore ({convert})"
        )
    return image, mask.point(values.tolist(), "L")


def palette():
    """(256, 3) uint8 colors by class index: PASCAL's own, from the bits of the index; 255 is its pale border."""
    index = np.arange(256)
    rgb = [sum(((index >> (3 * bit + channel)) & 1) << (7 - bit) for bit in range(3)) for channel in range(3)]
    return np.stack(rgb, 1).astype(np.uint8)


def save_mask(mask, path):
    """Atomic write of class indices (H,W) uint8 as a PNG with the palette; makes the folder."""
    path, image = Path(path), Image.fromarray(np.asarray(mask))
    image.putpalette(palette().tobytes())
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.tmp")
    image.save(part, "PNG")
    os.replace(part, path)


def check_annotations(data):
    """Reads every labeled and validation image with its mask, so that no run fails on one hours later; warns of classes
    without a labeled pixel.

    Raises InputError for a broken file, for fewer than two labeled classes, and if nothing is annotated to validate on.
    """
    began, pixels = time.monotonic(), np.zeros((2, 256), np.int64)
    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:  # each holds a photograph
        for counts, items in zip(pixels, (data.labeled, data.val)):
            for histogram in pool.map(lambda item: read(item, data)[1].histogram(), items):
                counts += histogram
                if began and time.monotonic() > began + 2:
                    print(f"reads {len(data.labeled)} labeled and {len(data.val)} validation images first", flush=True)
                    began = None
    labeled, val = pixels[:, : len(data.classes)] > 0
    absent = [name for name, there in zip(data.classes, labeled) if not there]
    if labeled.sum() < 2:
        tool = "own_images.py" if data.name == "folder" else f"prepare.py check --dataset {data.name}"
        raise InputError(
            f"the labeled images of {data.name} show only {labeled.sum()} of its {len(data.classes)} classes, and "
            f"{IGNORE} is none; expected two or more, `python tools/{tool}` says what the masks hold"
        )
    if not val.any():
        raise InputError(f"the validation masks of {data.name} are all {IGNORE}; expected class indices to score")
    if absent:
        print(f"warning: no labeled pixel is {', '.join(absent)}, which cannot be learned", file=sys.stderr)


# ----------------------------------------------------------------------------------------------------------------------
# weak and strong views


def random_view(image, mask, crop, scales, rng):
    """The weak view: a square of an image and its mask, padded right and below, resized to `crop`, perhaps flipped.

    Returns uint8 tensors image (3,crop,crop), mask (crop,crop) and the bool valid (crop,crop), False on padding, where
    the mask is 255. The square's side is crop / scale, so that scale is that of the image in the view.
    """
    side = max(1, round(crop / rng.uniform(*scales)))
    left, top = (int(rng.integers(max(length - side, 0) + 1)) for length in image.size)
    flipped, views = rng.random() < 0.5, []
    for whole, padding, resampling in (
        (image, tuple(round(255 * mean) for mean in MEAN), Image.Resampling.BILINEAR),
        (mask, IGNORE, Image.Resampling.NEAREST),
        (Image.new("L", image.size, 1), 0, Image.Resampling.NEAREST),
    ):
        square = Image.new(whole.mode, (side, side), padding)
        square.paste(whole, (-left, -top))
        view = VF.pil_to_tensor(square.resize((crop, crop), resampling))
        views.append(view.flip(-1) if flipped else view)
    return views[0], views[1][0], views[2][0].bool()


def strong_parameters(seed, number, stream=0):
    """(factors, places, gray, sigma): of brightness, contrast, saturation and hue the factors, and the places 0 to 3 in
    their order; whether the view is gray; the blur's sigma in pixels, 0.01 for none."""
    rng = generator(seed, "strong", number, stream)
    factors, places = rng.uniform((0.5, 0.5, 0.5, -0.25), (1.5, 1.5, 1.5, 0.25)), rng.permutation(4)
    jitter, gray, blur = rng.random(3) < (0.8, 0.2, 0.5)
    return factors if jitter else (1, 1, 1, 0), places, gray, rng.uniform(0.1, 2.0) if blur else 0.01


def strong_views(weak, seed, samples, stream=0):
    """FixMatch's strong views of uint8 images (B,3,H,W), on their device: float32 in 0..255, not rounded.

    torchvision's ColorJitter(0.5, 0.5, 0.5, 0.25) with probability 0.8, gray with 0.2 and GaussianBlur(9) with 0.5, on
    all images at once; each view is a pure function of (seed, number, stream). Geometry stays, so labels of the weak
    views fit. samples: their numbers, see `sample_numbers`; stream: each gives another, independent view.
    """
    batch = len(weak)
    same, gray = np.eye(3), np.tile((0.2989, 0.587, 0.114), (3, 1))  # matrices that keep a color, or make it gray
    means, blends = np.zeros((6, batch, 3, 3)), np.tile(same, (7, batch, 1, 1))  # of the image's mean, of each pixel
    turns, kernels = np.empty((batch, 3)), np.empty((batch, 3, 9))
    for i, number in enumerate(samples):
        (brightness, contrast, saturation, hue), places, is_gray, sigma = strong_parameters(seed, number, stream)
        # Hue lies between the steps 2 and 3: (contrast, hue, brightness, saturation) in this order are 0, -, 4 and 5.
        one, two, three = places[:3] + 2 * (places[:3] > places[3])
        blends[one, i] = brightness * same
        blends[two, i], means[two, i] = contrast * same, (1 - contrast) * gray
        blends[three, i] = saturation * same + (1 - saturation) * gray
        blends[6, i] = gray if is_gray else same
        turns[i] = 6 * hue + np.array([0, 4, 2])  # sixths of the circle, for red, green, blue
        kernels[i] = np.exp(-((np.arange(-4, 5) / sigma) ** 2) / 2)
    kernels /= kernels.sum(2, keepdims=True)
    table = torch.from_numpy(np.float32(np.hstack([*map(np.ravel, (means, blends, turns, kernels))])))
    table = (table.pin_memory() if weak.is_cuda else table).to(weak.device, non_blocking=True)  # waits for nothing
    matrices, turns, kernels = table.split([117 * batch, 3 * batch, 27 * batch])
    *matrices, last = matrices.view(13, batch, 3, 3).unbind()

    x = weak.flatten(2).float()  # (B,3,HW)
    with torch.autocast(weak.device.type, enabled=False):
        for step, (mean, blend) in enumerate(zip(matrices[:6], matrices[6:])):
            if step == 3:  # hue: its angle, -3 to 3 with red at 0, is turned and becomes RGB again
                low = x.amin(1, keepdim=True)
                r, g, b = x.sub_(low).split(1, 1)
                chroma = x.amax(1, keepdim=True).clamp_(min=1e-6)
                hue = (g + b).sub_(r).add_(chroma).div_(chroma).copysign_(g - b)
                share = (hue + turns.view(batch, 3, 1)).remainder_(6).sub_(3).abs_().sub_(1).clamp_(0, 1)
                x = torch.addcmul(low, chroma, share)
            x = torch.baddbmm(mean.bmm(x.mean(2, keepdim=True)), blend, x).clamp_(0, 255)
        x = F.pad(last.bmm(x).view(1, -1, *weak.shape[2:]), (4, 4, 4, 4), "reflect")
        for shape in ((1, 9), (9, 1)):
            x = F.conv2d(x, kernels.view(3 * batch, 1, *shape), groups=3 * batch)
    return x.view(weak.shape)


def cutmix(rng, probability, images, *maps):
    """CutMix (Yun et al., 2019): a box of another image of the batch, and of its maps, is pasted into each image.

    images (B,3,H,W), maps (B,H,W) each; an image is mixed with the next one of the batch, with the given probability;
    the box covers half of the image in a random shape (French et al., 2020). Returns new tensors; a batch of one stays.
    """
    batch, height, width = maps[0].shape
    mixed = [tensor.clone() for tensor in (images, *maps)]
    for i in range(batch):
        rows = 0.5 ** rng.random()  # share of the height; the share of the width makes the area one half
        box_height, box_width = round(rows * height), round(0.5 / rows * width)
        top, left = rng.integers(height - box_height + 1), rng.integers(width - box_width + 1)
        if rng.random() < probability:
            box = (..., slice(top, top + box_height), slice(left, left + box_width))
            for new, tensor in zip(mixed, (images, *maps)):
                new[i][box] = tensor[(i + 1) % batch][box]
    return mixed


def normalize(images):
    """Images (B,3,H,W) in 0..255 -> float, with ImageNet's mean and standard deviation; on whatever device they are."""
    mean, std = _mean_and_std(images.device)
    return (images - mean) / std


@lru_cache  # a copy to the device waits for it, so there is one
def _mean_and_std(device):
    return [torch.tensor(values, device=device).view(3, 1, 1) * 255 for values in (MEAN, STD)]


# ----------------------------------------------------------------------------------------------------------------------
# loaders


def sampled(count, seed, stream, number):
    """The index of sample `number` in an endless row of shuffled passes over `count` items; a pure function."""
    epoch, place = divmod(number, count)
    return int(generator(seed, stream, epoch).permutation(count)[place])


def sample_numbers(step, batch_size, rank=0, world=1):
    """The samples that a process sees in a step: together the processes see B * world new ones."""
    first = (step * world + rank) * batch_size
    return range(first, first + batch_size)


class TrainingViews(Dataset):
    """Sample n of the whole run: a view of a labeled image and, unless supervised, of an unlabeled one.

    x (3,crop,crop) uint8, y (crop,crop) uint8; weak like x; valid (crop,crop) bool, False on padding; truth like y, 255
    where nothing is annotated: for figures, never for the loss. Strong views are made on the device, by `strong_views`.
    An unlabeled image that cannot be read is replaced by that of sample n + 1; broken says why, or is empty. A mask of
    an unlabeled image that cannot be read is as good as none.
    """

    def __init__(self, data, crop, framework, seed):
        self.data, self.crop, self.framework, self.seed = data, crop, framework, seed

    def __getitem__(self, n):
        labeled, unlabeled, how = self.data.labeled, self.data.unlabeled, (self.crop, self.data.scales)
        item = labeled[sampled(len(labeled), self.seed, "order_x", n)]
        x, y, _ = random_view(*read(item, self.data), *how, generator(self.seed, "view_x", n))
        if self.framework == "supervised":
            return {"x": x, "y": y}
        broken = ""
        for number in range(n, n + len(unlabeled)):
            item = unlabeled[sampled(len(unlabeled), self.seed, "order_u", number)]
            for item in (item, item._replace(mask=None)):
                try:
                    pair, rng = read(item, self.data), generator(self.seed, "view_u", n)
                    weak, truth, valid = random_view(*pair, *how, rng)
                    return {"x": x, "y": y, "weak": weak, "truth": truth, "valid": valid, "broken": broken}
                except InputError as error:
                    reason = str(error)
            broken = broken or reason
        raise InputError("none of the unlabeled images can be read; `python tools/prepare.py check` names them")


def training_loader(data, steps, batch_size, crop, framework, seed, workers=0, rank=0, world=1, pin_memory=False):
    """One batch per step of `steps` for one process of `world`; together they see one process's batch of B * world."""
    views = TrainingViews(data, crop, framework, seed)
    samples = [sample_numbers(step, batch_size, rank, world) for step in steps]
    return DataLoader(
        views, batch_sampler=samples, num_workers=workers, pin_memory=pin_memory, worker_init_fn=left_to_main
    )


def evaluation_loader(data, items, device, workers=0, rank=0, world=1):
    """Whole images (1,3,H,W) with masks (1,H,W), uint8, 255 to ignore; each process sees its own share, none twice."""
    loader = DataLoader(
        items[rank::world], batch_size=None, collate_fn=partial(_tensors, data), num_workers=workers,
        pin_memory=device.type == "cuda", worker_init_fn=left_to_main,
    )  # fmt: skip
    for pair in loader:
        yield [part.to(device, non_blocking=True) for part in pair]


def _tensors(data, item):
    image, mask = read(item, data)
    return VF.pil_to_tensor(image)[None], VF.pil_to_tensor(mask)


def left_to_main(worker):
    """Stop signals are for the main process, which saves, and then ends its workers."""
    os.setpgrp()  # Ctrl-C is sent to the main process's group
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})  # which a scheduler may send to every process

    def obey():
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
            pass
        os._exit(0)

    threading.Thread(target=obey, daemon=True).start()
    sys.excepthook = lambda *error: None  # of the thread that hands tensors to a process which may have ended


# ----------------------------------------------------------------------------------------------------------------------
# shapes: drawn images for the first run

SHAPES_SIZE = 96  # pixels
SHAPES_TRAIN, SHAPES_VAL = 480, 96  # images


FORMS = {  # signed distance in pixels from the outline, negative inside; (u, v): centered and rotated
    "disc": lambda u, v, radius: np.hypot(u, v) - radius,
    "square": lambda u, v, radius: np.maximum(np.abs(u), np.abs(v)) - 0.85 * radius,
    "triangle": lambda u, v, radius: (
        np.maximum.reduce([u * np.cos(a) + v * np.sin(a) for a in (np.pi / 2, np.pi * 7 / 6, np.pi * 11 / 6)])
        - 0.6 * radius
    ),
}
TEXTURES = {  # where the second of an object's two shades shows
    "ringed": lambda u, v, period, rng: np.hypot(u, v) % period < period / 2,
    "striped": lambda u, v, period, rng: u % period < period / 2,
    "zigzag": lambda u, v, period, rng: (u + np.abs(v % (2 * period) - period)) % period < period / 2,
    "dotted": lambda u, v, period, rng: np.hypot(u % period - period / 2, v % period - period / 2) < 0.36 * period,
    "checked": lambda u, v, period, rng: (np.floor(2 * u / period) + np.floor(2 * v / period)) % 2 == 1,
    "speckled": lambda u, v, period, rng: (
        rng.random((200, 200))[np.floor(2 * u / period).astype(int), np.floor(2 * v / period).astype(int)] < 0.5
    ),
}


def draw_shapes(index):
    """Drawn image `index`: (RGB image, mask), a pure function of the index.

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

    for _ in range(rng.integers(4, 9)):  # clutter, labeled background
        u, v = placed()
        image[np.hypot(u / rng.uniform(2, 14), v / rng.uniform(2, 8)) < 1] = rng.uniform(0, 1, 3)
    for _ in range(rng.integers(3, 6)):
        kind = rng.integers(len(SHAPES))
        texture, form = SHAPES[kind]
        u, v = placed()
        radius, period = rng.uniform(14, 30), rng.uniform(6, 9)
        distance = FORMS[form](u, v, radius)
        one = rng.uniform(0.5, 1, 3)  # a bright and a dark shade of one hue, in either order
        two = one * rng.uniform(0.1, 0.4)
        one, two = (one, two) if rng.random() < 0.5 else (two, one)
        if texture != "ringed":
            u, v = (w + rng.uniform(0, period) for w in (u, v))
        colors = np.where(TEXTURES[texture](u, v, period, rng)[..., None], one, two)
        image = np.where((distance < 0)[..., None], colors, image)
        mask[distance < 1] = IGNORE
        mask[distance < -1] = 1 + kind
    image += rng.normal(0, 0.06, image.shape)
    return Image.fromarray((image.clip(0, 1) * 255).astype(np.uint8)), mask


def write_shapes(root):
    """Writes the drawn images to a folder in the layout of `list_folder`, unless it is there. Returns the folder."""
    if root.is_dir():
        return root
    part = root.with_name(f"{root.name}-{os.getpid()}.tmp")
    for index in range(SHAPES_TRAIN + SHAPES_VAL):
        image, mask = draw_shapes(index)
        folder = part if index < SHAPES_TRAIN else part / "val"
        save_mask(mask, folder / "masks" / f"{index:04d}.png")
        (folder / "images").mkdir(exist_ok=True)
        image.save(folder / "images" / f"{index:04d}.png")
    names = ["background", *(f"{texture} {form}" for texture, form in SHAPES)]
    (part / "classes.txt").write_text("\n".join(names) + "\n")
    try:
        os.rename(part, root)
    except OSError:  # another process was faster
        shutil.rmtree(part)
    return root
