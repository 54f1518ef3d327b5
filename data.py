"""Datasets, partitions, weak and strong views, CutMix, loaders.

    data = open_dataset("pascal", "data", labeled=92)             # lists of images, cut into a partition
    loader = training_loader(data, steps=range(0, 1000), ...)     # one batch of labeled and unlabeled views per step

Samples and views are pure functions of the seed and the number of the sample. So neither the number of workers nor a
resumed run changes anything. Loaders give uint8 images. `normalize` makes them float on the device.

255 has three meanings, and no loss sees any of them. In a mask: not annotated. In a pseudo-label: not sure enough. In
a padded view: outside the image.
"""

import atexit
import logging
import multiprocessing
import os
import re
import shlex
import signal
import sys
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
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageOps, PngImagePlugin
from torch.utils.data import DataLoader, Dataset
from torchvision.datasets import Cityscapes
from torchvision.transforms.v2 import functional as VF

IGNORE, NO_CLASS = 255, 254
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, which torchvision's weights expect
STUBS = ("BUFR", "GRIB", "HDF5", "MPEG", "WMF")  # Pillow knows their names and cannot read them
SUFFIXES = Image.registered_extensions()
READABLE = tuple(suffix for suffix, kind in SUFFIXES.items() if kind in Image.OPEN and kind not in STUBS)
SYSTEM_FILES = ("thumbs.db", "desktop.ini", "__macosx", "lost+found", "@eadir", "#recycle", "@recycle", "$recycle.bin")
SPLITS = Path(__file__).parent / "splits"
STREAMS = ("order_x", "order_u", "view_x", "view_u", "step", "strong", "jitter")


class InputError(ValueError):
    """A mistake in the user's files or arguments. The message says what was found, what was expected, what to do."""


def generator(seed, stream, *numbers):
    """Return a NumPy generator that is a pure function of the seed, the name of a random stream and the numbers."""
    return np.random.default_rng([seed, STREAMS.index(stream), *numbers])


def rank_and_world():
    """Return the number of this process and the number of processes; (0, 1) without torchrun."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


# ----------------------------------------------------------------------------------------------------------------------
# lists of images


class Item(NamedTuple):
    """One image and its mask: files, or None if there is no such file."""

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
    suffixes. Raises InputError if two files have one id, or a name is not UTF-8."""
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
    """`root`, or the first of `root/name`, that holds the folders. Raises InputError if none does."""
    for place in (Path(root), *(Path(root) / name for name in names)):
        if all((place / folder).is_dir() for folder in folders):
            return place
    below = f", or in {' or '.join(names)} below it" if names else ""
    raise InputError(f"--root {root} is not the dataset; expected the folders {', '.join(folders)} in it{below}")


def read_text(file):
    """Return the text of a file in UTF-8 or UTF-16, or Latin-1 if it is neither."""
    written = Path(file).read_bytes()
    if written[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return written.decode("utf-16", "replace")
    try:
        return written.decode("utf-8-sig")
    except UnicodeDecodeError:
        return written.decode("latin-1")


def image_id(line):
    r"""Return the id in a line such as "p1.jpg", "images/p1.jpg masks/p1.png" or "images\p1.jpg", else the line."""
    line = line.strip()
    pattern = r"(?!.*val/images/)(?:\S*images/|\./)?(.+?)(\.\w+)(?=[\s,;]|$)"  # ids of val/ keep their folder
    found = re.match(pattern, line.replace("\\", "/"), re.IGNORECASE)
    return found[1] if found and found[2].lower() in READABLE else line


def id_list(file, known=()):
    """Return the names in a file, one per line, as they are spelled in `known`. Raises InputError if there are none."""
    lines = read_text(file).splitlines() if Path(file).is_file() else []
    spelled = {id.strip(): id for id in known} | {id: id for id in known}
    ids = []
    for line in filter(str.strip, lines):
        line = unicodedata.normalize("NFC", line)
        name = next((name for name in (line, image_id(line)) if name in spelled), line.strip())
        ids.append(spelled.get(name, name))
    if not ids:
        raise InputError(f"the list {file} does not exist or is empty; expected one image id per line")
    return ids


def list_folder(root, lists):
    """Return the items of a user's folder: images/, and masks/ (PNG) for some of them.

    Validation: val/ with the same two folders, or the ids in val.txt.
    """
    root = find_root(root, (), ("images", "masks"))
    command = f"`python tools/own_images.py {shlex.quote(str(root))}`"
    train, val = list_pairs(root, "", command), list_pairs(root / "val", "val/", command)
    if (root / "val").is_dir():
        return {"train": list(train.values()), "val": list(val.values())}
    if not (root / "val.txt").is_file():
        raise InputError(f"{root} has neither val/ nor val.txt; {command} writes val.txt")
    ids = dict.fromkeys(id_list(root / "val.txt", train))
    unknown = [id for id in ids if id not in train]
    if unknown:
        raise InputError(f"{root / 'val.txt'} names {unknown[0]}, which is not in images/; correct the list")
    return {
        "train": [item for id, item in train.items() if id not in ids],
        "val": [train[id] for id in ids],
    }


def list_pairs(folder, prefix, command):
    """Return {id: Item} of images/ and masks/ below a folder; the ids of the items begin with the prefix."""
    images, masks = files(folder / "images"), files(folder / "masks")
    for mask in masks.values():
        if suffix(mask) != ".png":
            raise InputError(f"mask {mask} is not a PNG file of class indices; {command} says how to convert it")
    return {id: Item(prefix + id, path, masks.get(id)) for id, path in images.items()}


def list_camvid(root, lists):
    """Return the items of CamVid (Brostow et al., 2008) in SegNet's layout: train/, trainannot/; val, test likewise."""
    root = Path(root)
    if (root / "camvid").is_dir():
        root = root / "camvid"
    splits = {}
    for split in ("train", "val", "test"):
        images, masks = files(root / split), files(root / f"{split}annot", (".png",))
        splits[split] = [Item(id, image, masks.get(id)) for id, image in images.items()]
    return splits


def list_pascal(root, lists):
    """Return the items of PASCAL VOC 2012 (Everingham et al., 2010) and SBD (Hariharan et al., 2011) in the lists.

    Masks: SegmentationClass/ for the images that VOC annotated finely, SegmentationClassAug/ for all others.
    """
    root = find_root(root, ("VOC2012", "VOCdevkit/VOC2012"), ("JPEGImages", "SegmentationClass"))
    images = files(root / "JPEGImages")
    fine = files(root / "SegmentationClass", (".png",))
    coarse = files(root / "SegmentationClassAug", (".png",))
    fine_ids = {*id_list(lists / "1464.txt"), *id_list(lists / "val.txt")}
    splits = {}
    for split in ("train", "val"):
        splits[split] = []
        for id in id_list(lists / f"{split}.txt"):
            mask = fine.get(id)
            if id not in fine_ids:
                mask = coarse.get(id, mask)
            splits[split].append(Item(id, images.get(id), mask))
    return splits


def list_cityscapes(root, lists):
    """Return the items of Cityscapes (Cordts et al., 2016) in the lists; masks: labelTrainIds, else labelIds."""
    root = find_root(root, ("cityscapes",), ("leftImg8bit", "gtFine"))
    splits = {}
    for split in ("train", "val"):
        images = files(root / "leftImg8bit" / split)
        masks = files(root / "gtFine" / split, (".png",))
        splits[split] = []
        for id in id_list(lists / f"{split}.txt"):
            place = f"{id.split('_')[0]}/{id}"
            mask = masks.get(f"{place}_gtFine_labelTrainIds") or masks.get(f"{place}_gtFine_labelIds")
            splits[split].append(Item(id, images.get(f"{place}_leftImg8bit"), mask))
    return splits


# ----------------------------------------------------------------------------------------------------------------------
# the table of datasets


def mask_values(classes):
    """Return the class of each value in a mask's file, (256,) uint8, from {value: class}; other values: NO_CLASS."""
    values = np.full(256, NO_CLASS, np.uint8)
    values[[IGNORE, *classes]] = [IGNORE, *classes.values()]
    return values


class Spec(NamedTuple):
    """The facts of a dataset. Its presets are in train.py."""

    classes: tuple | None  # names by index; None: those of root/classes.txt
    list_items: Callable  # (root, folder of lists) -> {"train": [Item], "val": [Item], perhaps "test": [Item]}
    values: dict  # {ending of a mask's name: its `mask_values`}; {}: the values are the classes
    scales: tuple = (0.5, 2.0)  # range of random resizing


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
    "shapes": Spec(None, list_folder, {}, scales=(0.75, 1.5)),  # generated by shapes.py
    "folder": Spec(None, list_folder, {}, scales=(0.5, 1.5)),
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
    unlabeled: list  # their masks, if any, are used only for numbers in the log
    val: list
    test: list  # empty if the dataset has none


def open_dataset(name, root, labeled, splits=None, use=("labeled", "unlabeled", "val")):
    """List a dataset and cut its training images into labeled and unlabeled ones.

    labeled: "all", a file of image ids, a list of ids, or a number N: the list splits/<name>/N.txt, or N annotated
    images evenly spaced by id if the dataset has no lists. All other training images are unlabeled.
    use: the parts that will be read. Only their files have to exist, and unlabeled images need no masks.
    Raises InputError for an unknown list or id, and for a part in use that is empty or lacks files.
    """
    spec, lists, root = DATASETS[name], Path(splits or SPLITS) / name, Path(root)
    if name == "shapes":
        from shapes import write_shapes  # only here: no other dataset needs it

        root = root / "shapes"
        write_shapes(root)
    items = spec.list_items(root, lists)
    classes = spec.classes or read_classes(root / "classes.txt")
    values = spec.values or {"": mask_values({index: index for index in range(len(classes))})}
    if isinstance(labeled, (list, tuple)):
        chosen = set(labeled)  # a checkpoint's own ids; their files may be absent
    elif not items["train"]:
        raise InputError(f"{name} under {root} has no training images; docs/faq.md says where the files go")
    else:
        chosen = labeled_ids(name, items["train"], labeled, lists)
    labeled_items = [item for item in items["train"] if item.id in chosen]
    unlabeled_items = [item for item in items["train"] if item.id not in chosen]
    data = Data(name, classes, spec.scales, values, labeled_items, unlabeled_items, items["val"], items.get("test", []))
    for part in use:
        check_files(data, part, root)
    return data


def read_classes(file):
    """Return the class names of a folder's classes.txt. Raises InputError for a repeated name or too many."""
    names = tuple(id_list(file))
    for name in names:
        if names.count(name) > 1:
            raise InputError(f"{file} names {name} twice; expected every class once")
    if len(names) > NO_CLASS:
        raise InputError(f"{file} names {len(names)} classes; expected at most {NO_CLASS}")
    return names


def check_files(data, part, root):
    """Raise InputError if a part of the dataset is empty, or if one of its images lacks a file."""
    items = getattr(data, part)
    if not items:
        advice = "expected some"
        if part == "unlabeled":
            advice = "all are labeled; use --framework supervised, or lower --labeled"
        raise InputError(f"{data.name} under {root} has no {part} images; {advice}")
    for kind in ("image", "mask"):
        missing = [item.id for item in items if getattr(item, kind) is None]
        if missing and not (part == "unlabeled" and kind == "mask"):
            raise InputError(
                f"{len(missing)} of {len(items)} {part} images of {data.name} have no {kind} under {root}, first "
                f"{', '.join(missing[:3])}; docs/faq.md says where the files go"
            )


def labeled_ids(name, items, labeled, lists):
    """Return the set of ids that --labeled selects; see `open_dataset`."""
    known = [item.id for item in items]
    annotated = [item.id for item in items if item.mask]
    published = sorted(int(path.stem) for path in lists.glob("*.txt") if path.stem.isdecimal())
    if not annotated:
        raise InputError(f"no training image of {name} has a mask; expected some; docs/faq.md says where masks belong")
    if labeled == "all":
        return set(annotated)
    is_number = str(labeled).isdecimal()
    if is_number and not published:
        count = int(labeled)
        if not 1 <= count <= len(annotated):
            raise InputError(f"--labeled {count} is impossible; expected 1 to {len(annotated)} images with a mask")
        return {annotated[i * len(annotated) // count] for i in range(count)}
    if is_number and int(labeled) not in published:
        raise InputError(f"{name} has no list of {labeled} labeled images; expected one of {published}, or a file")
    if not is_number and not Path(labeled).is_file():
        numbers = f"a number of {published}" if published else "a number"
        raise InputError(f"--labeled {labeled} is not a file; expected {numbers}, all, or a file; see splits/README.md")
    chosen = set(id_list(lists / f"{labeled}.txt" if is_number else labeled, known))
    unknown = sorted(chosen - set(known))
    if unknown:
        raise InputError(
            f"--labeled {labeled}: {len(unknown)} ids are not training images, first {unknown[0]}; expected ids like "
            f"{known[0]}, and no validation image"
        )
    return chosen


# ----------------------------------------------------------------------------------------------------------------------
# reading and writing


SIXTEEN_BITS = re.compile(r";16[BLN]|'RGB', \d{4,}")  # in the arguments of Pillow's decoders

warnings.filterwarnings("ignore", module="PIL")  # they name a line of Pillow, not the picture
logging.getLogger("PIL").setLevel(logging.CRITICAL)
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY  # a large comment is no reason to refuse a picture


def count_pages(image):
    """Return the number of pages of an opened file. Overviews, masks, layers and MPO's second one do not count."""
    if image.format in ("MPO", "PSD"):
        return 1
    size, pages = image.size, 0
    for number in range(getattr(image, "n_frames", 1)):
        image.seek(number)
        subfile = image.tag_v2.get(254, 0) if image.format == "TIFF" else 0  # 1: overview, 4: mask
        if image.size == size and not subfile & 5:
            pages += 1
    image.seek(0)
    return pages


def what_is_lost(image, mode):
    """Return what Pillow would silently lose of an opened file, and what to do about it; usually ""."""
    pages = count_pages(image)
    if pages > 1:
        return f"holds {pages} pages; expected one; write each page to a separate file"
    bits_of_tiff = max(image.tag_v2.get(258, (8,))) if image.format == "TIFF" else 8
    deep = bits_of_tiff > 8 or SIXTEEN_BITS.search(str(image.tile))
    if image.mode[0] in "IF":  # gray; the values of a mask are kept
        deep = mode != "L"
    return "has more than 8 bits per channel; expected 8; scale all files in the same way to 0..255" if deep else ""


def open_image(path, mode):
    """Return an upright image ("RGB", "RGBA"), or a mask's values as stored ("L"). Raises InputError, also if
    Pillow would lose values."""
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
        if suffix(Path(path)) in (".tif", ".tiff"):
            advice += "; perhaps it has more bands than four; expected gray, RGB or RGBA"
        raise InputError(f"{path} could not be read ({error}); {advice}") from error
    if lost:
        raise InputError(f"{path} {lost}")
    return image


def read(item, data):
    """Return the image and the mask of an item, PIL images of the same size; without a mask file the mask is all 255.

    Raises InputError, which names the file: unreadable, of another size than its image, or with a value that is no
    class.
    """
    image = open_image(item.image, "RGB")
    if item.mask is None:
        return image, Image.new("L", image.size, IGNORE)
    mask = open_image(item.mask, "L")
    advice = "tools/own_images.py converts other masks"
    if data.name not in ("folder", "shapes"):
        advice = f"use the masks of {data.name}'s own archive"
    if mask.format != "PNG":  # whatever its suffix says; JPEG changes values
        raise InputError(f"mask {item.mask} is a {mask.format} file; expected PNG of class indices ({advice})")
    if mask.mode not in ("L", "P"):
        raise InputError(f"mask {item.mask} is a {mask.mode} image; expected class indices ({advice})")
    if mask.size != image.size:
        raise InputError(f"mask {item.mask} has {mask.size} pixels, its image {image.size}; expected the same size")
    values = next(values for ending, values in data.values.items() if item.mask.stem.endswith(ending))
    wrong = [value for value, pixels in enumerate(mask.histogram()) if pixels and values[value] == NO_CLASS]
    if wrong:
        raise InputError(
            f"mask {item.mask} holds the value {', '.join(map(str, wrong[:5]))}; expected a class index from 0 to "
            f"{len(data.classes) - 1}, or 255 for pixels to ignore ({advice})"
        )
    return image, mask.point(values.tolist(), "L")


def class_pixels(data, items):
    """Read this process's share of the items; return how many pixels have each class, (256,). Raises InputError."""
    rank, world = rank_and_world()
    pixels = torch.zeros(256, dtype=torch.long)
    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:  # each thread holds a photograph
        for histogram in pool.map(lambda item: read(item, data)[1].histogram(), items[rank::world]):
            pixels += torch.tensor(histogram)
    return pixels


def palette():
    """Return PASCAL's colors by class index, (256,3) uint8, made from the bits of the index."""
    index = np.arange(256)
    colors = np.zeros((256, 3), np.uint8)
    for bit in range(3):
        for channel in range(3):
            colors[:, channel] |= (((index >> (3 * bit + channel)) & 1) << (7 - bit)).astype(np.uint8)
    return colors


def save_mask(mask, path):
    """Write class indices (H,W) uint8 as a PNG with the palette, atomically; make the folder."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(np.asarray(mask))
    image.putpalette(palette().tobytes())
    part = path.with_name(f"{path.name}.tmp")
    image.save(part, "PNG")
    os.replace(part, path)


# ----------------------------------------------------------------------------------------------------------------------
# weak and strong views


def random_view(image, mask, crop, scales, rng):
    """The weak view: cut a square from an image and its mask, resize it to `crop`, and flip it with probability 0.5.

    Returns uint8 image (3,crop,crop), uint8 mask (crop,crop) and bool valid (crop,crop), which is False on padding.
    There the mask is 255. The square's side is crop / scale, with a random scale.
    """
    side = max(1, round(crop / rng.uniform(*scales)))
    left, top = (int(rng.integers(max(length - side, 0) + 1)) for length in image.size)
    flipped = rng.random() < 0.5

    def cut(whole, padding, resampling):
        square = Image.new(whole.mode, (side, side), padding)
        square.paste(whole, (-left, -top))
        view = VF.pil_to_tensor(square.resize((crop, crop), resampling))
        return view.flip(-1) if flipped else view

    mean_color = tuple(round(255 * mean) for mean in MEAN)
    inside = Image.new("L", image.size, 1)
    view = cut(image, mean_color, Image.Resampling.BILINEAR)
    label = cut(mask, IGNORE, Image.Resampling.NEAREST)
    valid = cut(inside, 0, Image.Resampling.NEAREST)
    return view, label[0], valid[0].bool()


def strong_parameters(seed, number, view=0):
    """Sample the strength of a strong view: brightness, contrast, saturation, hue, gray (0 or 1), blur's sigma.

    Four factors of torchvision's ColorJitter(0.5, 0.5, 0.5, 0.25) with probability 0.8, gray with 0.2, and a blur of
    0.1 to 2 pixels with 0.5; else values that change nothing.
    """
    rng = generator(seed, "strong", number, view)
    factors = rng.uniform((0.5, 0.5, 0.5, -0.25), (1.5, 1.5, 1.5, 0.25))
    jitter, gray, blur = rng.random(3) < (0.8, 0.2, 0.5)
    if not jitter:
        factors = (1, 1, 1, 0)
    sigma = rng.uniform(0.1, 2.0) if blur else 0.01
    return *factors, gray, sigma


def adjust_brightness(x, factor):
    """Multiply images (B,3,H,W) in 0..255 by factors (B,1,1,1)."""
    return (x * factor).clamp(0, 255)


def adjust_contrast(x, factor):
    """Multiply the distance of each pixel to its image's mean gray by the factor."""
    mean = VF.rgb_to_grayscale(x).mean((1, 2, 3), keepdim=True)
    return torch.lerp(mean, x, factor).clamp(0, 255)


def adjust_saturation(x, factor):
    """Multiply the distance of each pixel to its own gray by the factor."""
    return torch.lerp(VF.rgb_to_grayscale(x), x, factor).clamp(0, 255)


def adjust_hue(x, shift):
    """Turn the hue by -0.5..0.5 of the color circle. Hue is counted in sixths: red 0, green 2, blue 4."""
    low = x.amin(1, keepdim=True)
    chroma = (x.amax(1, keepdim=True) - low).clamp(min=1e-6)
    red, green, blue = (x - low).split(1, 1)
    hue = ((green + blue - red) / chroma + 1).copysign(green - blue) + 6 * shift
    shares = []
    for peak in (0, 2, 4):
        distance = ((hue - peak + 3).remainder(6) - 3).abs()  # from the channel's own hue, around the circle
        shares.append((2 - distance).clamp(0, 1))
    return low + chroma * torch.cat(shares, 1)


def gaussian_blur(x, sigma):
    """Blur images (B,3,H,W) by 9 x 9 pixels, each with its own sigma (B,1,1,1)."""
    kernels = torch.exp(-((torch.arange(-4, 5, device=x.device) / sigma) ** 2) / 2)  # (B,1,1,9)
    kernels = (kernels / kernels.sum(-1, keepdim=True)).repeat_interleave(3, 0)  # one for each channel
    planes = F.pad(x, (4, 4, 4, 4), "reflect").flatten(0, 1)[None]  # (1,3B,H+8,W+8)
    planes = F.conv2d(planes, kernels, groups=len(kernels))
    return F.conv2d(planes, kernels.mT, groups=len(kernels)).view_as(x)


def strong_views(weak, seed, step, view=0):
    """FixMatch's strong views of this process's batch in a step: uint8 (B,3,H,W) -> float32 in 0..255, same device.

    All images of all processes take brightness, contrast, saturation and hue in the same random order, a function of
    (seed, step, view). Each image has its own `strong_parameters`, a function of (seed, its number, view). The
    geometry stays, so labels of the weak views fit. view: each number gives an independent view.
    """
    parameters = [strong_parameters(seed, number, view) for number in sample_numbers(step, len(weak))]
    table = torch.tensor(parameters, dtype=torch.float32)
    if weak.is_cuda:
        table = table.pin_memory()  # so that the copy waits for nothing
    *factors, gray, sigma = table.to(weak.device, non_blocking=True).view(-1, 6, 1, 1, 1).unbind(1)
    adjustments = (adjust_brightness, adjust_contrast, adjust_saturation, adjust_hue)
    x = weak.float()
    for place in generator(seed, "jitter", step, view).permutation(4):
        x = adjustments[place](x, factors[place])
    x = torch.lerp(x, VF.rgb_to_grayscale(x), gray)
    return gaussian_blur(x, sigma)


def cutmix(rng, probability, images, *maps):
    """CutMix (Yun et al., 2019): paste a box of the next image of the batch, and of its maps, into each image.

    images (B,3,H,W), maps (B,H,W) each. Each image is mixed with the given probability. The box covers half of the
    image in a random shape (French et al., 2020). Returns new tensors. A batch of one does not change.
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
    """Return images (B,3,H,W) in 0..255 as float with ImageNet's mean and standard deviation."""
    mean, std = _mean_and_std(images.device)
    return (images - mean) / std


@lru_cache  # a copy to the device waits for the device, so it is made once
def _mean_and_std(device):
    return [torch.tensor(values, device=device).view(3, 1, 1) * 255 for values in (MEAN, STD)]


# ----------------------------------------------------------------------------------------------------------------------
# loaders


@lru_cache(maxsize=8)
def _permutation(count, seed, stream, epoch):
    return generator(seed, stream, epoch).permutation(count)


def sample_index(count, seed, stream, number):
    """Return the index of sample `number` in an endless sequence of shuffled passes over `count` items."""
    epoch, place = divmod(number, count)
    return int(_permutation(count, seed, stream, epoch)[place])


def sample_numbers(step, batch_size):
    """Return the numbers of the samples that this process sees in a step; together the processes see B * world."""
    rank, world = rank_and_world()
    first = (step * world + rank) * batch_size
    return range(first, first + batch_size)


class TrainingViews(Dataset):
    """Views, indexed by (number of the sample, load an unlabeled image or not, load its mask or not).

    x (3,crop,crop) uint8, y (crop,crop) uint8; weak like x; valid (crop,crop) bool, False on padding; truth like y, for
    numbers in the log only, 255 if nothing is annotated. Strong views are made on the device, by `strong_views`.
    An unlabeled image that cannot be read is replaced by that of the next sample, with a warning.
    """

    def __init__(self, data, crop, seed):
        self.data, self.crop, self.seed = data, crop, seed
        self.warned = set()

    def __getitem__(self, sample):
        number, with_unlabeled, with_truth = sample
        labeled = self.data.labeled
        item = labeled[sample_index(len(labeled), self.seed, "order_x", number)]
        x, y, _ = self.view(read(item, self.data), "view_x", number)
        if not with_unlabeled:
            return {"x": x, "y": y}
        weak, truth, valid = self.view(self.read_unlabeled(number, with_truth), "view_u", number)
        return {"x": x, "y": y, "weak": weak, "truth": truth, "valid": valid}

    def view(self, pair, stream, number):
        return random_view(*pair, self.crop, self.data.scales, generator(self.seed, stream, number))

    def read_unlabeled(self, first, with_truth):
        unlabeled = self.data.unlabeled
        for number in range(first, first + len(unlabeled)):
            item = unlabeled[sample_index(len(unlabeled), self.seed, "order_u", number)]
            if with_truth:
                try:
                    return read(item, self.data)
                except InputError:
                    pass  # perhaps only the mask cannot be read
            try:
                return read(item._replace(mask=None), self.data)
            except InputError as error:
                if item.id not in self.warned:
                    print(f"warning: {error}; the next image is used", file=sys.stderr, flush=True)
                self.warned.add(item.id)
        raise InputError(
            f"none of the unlabeled images can be read; `python tools/prepare.py check --dataset {self.data.name}` "
            "names them"
        )


def training_loader(data, steps, batch_size, crop, seed, workers=0, unlabeled=None, truth=None, pin_memory=False):
    """Return one batch of `TrainingViews` for each of `steps`, for this process.

    unlabeled, truth: functions of the step, whether its samples have an unlabeled image, and that image's mask;
    default: always.
    """
    batches = []
    for step in steps:
        with_unlabeled = unlabeled is None or unlabeled(step)
        with_truth = truth is None or truth(step)
        batches.append([(number, with_unlabeled, with_truth) for number in sample_numbers(step, batch_size)])
    return DataLoader(
        TrainingViews(data, crop, seed), batch_sampler=batches, num_workers=workers, pin_memory=pin_memory,
        worker_init_fn=ignore_signals,
    )  # fmt: skip


def evaluation_loader(data, items, device, workers=0):
    """Yield whole images (1,3,H,W) and masks (1,H,W), uint8, 255 to ignore; each process has its own share."""
    rank, world = rank_and_world()
    loader = DataLoader(
        items[rank::world], batch_size=None, collate_fn=partial(whole_image, data), num_workers=workers,
        pin_memory=device.type == "cuda", worker_init_fn=ignore_signals,
    )  # fmt: skip
    for pair in loader:
        yield [part.to(device, non_blocking=True) for part in pair]


def whole_image(data, item):
    """Return an item's image (1,3,H,W) and mask (1,H,W), uint8."""
    image, mask = read(item, data)
    return VF.pil_to_tensor(image)[None], VF.pil_to_tensor(mask)


def ignore_signals(worker):
    """Leave stop signals to the main process, which saves and then ends its loader workers."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    sys.excepthook = report_unless_interrupted


def report_unless_interrupted(kind, error, trace):
    """Print an error of a loader worker's thread, unless the main process was interrupted while it took a batch."""
    if not issubclass(kind, (ConnectionError, EOFError)):
        sys.__excepthook__(kind, error, trace)


@atexit.register
def end_workers():
    """Kill the loader workers, which ignore softer signals."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # PyTorch's handler would report each of them
    for worker in multiprocessing.active_children():
        worker.kill()
