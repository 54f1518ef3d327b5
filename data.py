"""Datasets, partitions, augmentation and loaders.

    data = open_dataset("camvid", "data", labeled=46)             # lists only; no image is read yet
    loader = training_loader(data, steps=range(0, 1000), ...)     # one batch of labeled and unlabeled views per step

Whatever is random here is a function of (seed, stream, number of the draw), so that neither the number of workers nor
a resumed run changes anything. Images travel as uint8 and are normalized on the device, by `normalize`.
"""

from collections.abc import Callable
from functools import cache, lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as VF

IGNORE = 255
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, which torchvision's weights expect
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png")
STREAMS = {name: number for number, name in enumerate(("order_x", "order_u", "view_x", "view_u", "step"))}


class InputError(ValueError):
    """Something in the user's files or arguments; the message says what was found, expected, and to be done."""


class Item(NamedTuple):
    """One image. image and mask are files, or the number of a drawn image; mask is None where nobody labeled it."""

    id: str
    image: Path | int
    mask: Path | int | None


class Data(NamedTuple):
    """A dataset cut into a partition: Item lists, and what its masks mean."""

    name: str
    classes: tuple  # names, by class index
    scales: tuple  # random resizing of its training images, smallest and largest factor
    values: np.ndarray  # (256,) uint8: class of each mask value, 255 = ignore, 254 = not allowed
    labeled: list
    unlabeled: list  # their masks, where there are any, serve for figures alone
    val: list


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


def list_shapes(root):
    """Items of the embedded dataset; nothing is looked for on the disk."""
    numbers = range(SHAPES_TRAIN + SHAPES_VAL)
    items = [Item(f"{i:04d}", i, i) for i in numbers]
    return {"train": items[:SHAPES_TRAIN], "val": items[SHAPES_TRAIN:]}


# ----------------------------------------------------------------------------------------------------------------------
# datasets of files


def find_root(root, name, folders):
    """`root` or `root/name`, whichever holds the folders. Raises InputError where neither does."""
    for candidate in (Path(root), Path(root) / name):
        if all((candidate / folder).is_dir() for folder in folders):
            return candidate
    expected = ", ".join(f"{folder}/" for folder in folders)
    if not Path(root).is_dir():
        raise InputError(f"--root {root} is not there; expected a folder that holds {expected} or {name}/ with them")
    missing = ", ".join(f"{folder}/" for folder in folders if not (Path(root) / folder).is_dir())
    raise InputError(f"--root {root} lacks {missing}; expected {expected} in it or in {name}/ below it")


def list_camvid(root):
    """Items of CamVid (Brostow et al., 2008) in SegNet's layout: train/, trainannot/, val/, valannot/."""
    root = find_root(root, "camvid", ("train", "trainannot", "val", "valannot"))
    splits = {}
    for split in ("train", "val", "test"):
        masks = {path.stem: path for path in sorted((root / f"{split}annot").glob("*.png"))}
        images = sorted(path for path in (root / split).glob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
        splits[split] = [Item(path.stem, path, masks.get(path.stem)) for path in images]
    return splits


class Spec(NamedTuple):
    """The facts of a dataset. Nothing about a dataset stands anywhere else."""

    classes: tuple
    list_items: Callable  # root -> {"train": [Item], "val": [Item]}
    scales: tuple = (0.5, 2.0)  # of random resizing; the field's usual range
    void: tuple = ()  # mask values besides 255 that mean ignore


DATASETS = {
    "shapes": Spec(
        ("background", *(f"{texture} {form}" for texture, form in SHAPES)),
        list_shapes,
        scales=(0.75, 1.5),
    ),
    "camvid": Spec(
        (
            "sky",
            "building",
            "pole",
            "road",
            "pavement",
            "tree",
            "sign symbol",
            "fence",
            "car",
            "pedestrian",
            "bicyclist",
        ),
        list_camvid,
        void=(11,),
    ),
}


def mask_values(num_classes, void=()):
    """(256,) uint8: what each value of a mask file means; see Data.values."""
    values = np.full(256, 254, np.uint8)
    values[:num_classes] = np.arange(num_classes)
    values[[IGNORE, *void]] = IGNORE
    return values


def open_dataset(name, root, labeled, splits="splits"):
    """Lists a dataset and cuts its training images into labeled and unlabeled ones.

    labeled: "all", a list of image ids or a file of them, or a number N: the list splits/<name>/N.txt where there is one, else N images
    evenly spaced over the sorted ids. unlabeled = the training images that are not labeled, by construction.
    Raises InputError for an unknown dataset, list or id, an empty folder, and labeled images without a mask.
    """
    if name not in DATASETS:
        raise InputError(f"dataset {name!r} is unknown; expected one of {', '.join(DATASETS)}")
    spec = DATASETS[name]
    items = spec.list_items(root)
    for split in ("train", "val"):
        if not items[split]:
            raise InputError(f"--root {root} holds no {split} images of {name}; expected {split}/*.jpg or *.png")
    labeled = labeled if isinstance(labeled, list) else str(labeled)
    chosen = labeled_ids(name, [item.id for item in items["train"]], labeled, Path(splits))
    data = Data(
        name,
        spec.classes,
        spec.scales,
        mask_values(len(spec.classes), spec.void),
        [item for item in items["train"] if item.id in chosen],
        [item for item in items["train"] if item.id not in chosen],
        items["val"],
    )
    for split, members in (("labeled", data.labeled), ("validation", data.val)):
        bare = [item.id for item in members if item.mask is None]
        if bare:
            raise InputError(
                f"{len(bare)} of {len(members)} {split} images of {name} have no mask, first {', '.join(bare[:3])}; "
                "add a PNG of the same stem for each, or leave these images out"
            )
    return data


def labeled_ids(name, train_ids, labeled, splits):
    """The set of ids that `--labeled` means; see `open_dataset`."""
    if isinstance(labeled, list):
        return set(labeled)
    published = sorted(int(path.stem) for path in (splits / name).glob("*.txt") if path.stem.isdecimal())
    if labeled == "all":
        return set(train_ids)
    if labeled.isdecimal() and int(labeled) not in published:
        if published:
            raise InputError(f"{name} has no list of {labeled} labeled images; expected one of {published}, or a file")
        if not 1 <= int(labeled) <= len(train_ids):
            raise InputError(
                f"--labeled {labeled} is impossible; expected 1 to {len(train_ids)}, the training images of {name}"
            )
        return {train_ids[i * len(train_ids) // int(labeled)] for i in range(int(labeled))}
    file = splits / name / f"{labeled}.txt" if labeled.isdecimal() else Path(labeled)
    if not file.is_file():
        raise InputError(
            f"--labeled {labeled} is not a number and no such file exists; expected a number, all, or a list of ids"
        )
    chosen = set(file.read_text(errors="replace").split())
    unknown = sorted(chosen - set(train_ids))
    if unknown or not chosen:
        raise InputError(
            f"{file} names {len(chosen)} images, {len(unknown)} of them not among the {len(train_ids)} training images"
            f"{' (first ' + ', '.join(unknown[:3]) + ')' if unknown else ''}; expected one id of {name} per line"
        )
    return chosen


# ----------------------------------------------------------------------------------------------------------------------
# reading


def _decode(path, mode):
    """The file's pixels: an RGB image, or a mask of indices as they are stored. Raises InputError."""
    try:
        with Image.open(path) as image:
            if mode == "RGB":
                return image.convert("RGB")
            if image.mode not in ("L", "P"):
                raise InputError(
                    f"mask {path} is a {image.mode} image; expected one class index per pixel, 8 bits, L or P"
                )
            image.load()
            return image.copy()
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path} could not be read ({error}); replace the file or take its id off the list") from error


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
    stored = np.asarray(mask)
    classes = data.values[stored]
    if (classes == 254).any():
        wrong = sorted(set(stored[classes == 254].tolist()))
        raise InputError(
            f"mask {item.mask} holds the value {', '.join(map(str, wrong[:5]))}; expected class indices "
            f"0 to {len(data.classes) - 1} and 255 for pixels to ignore"
        )
    return image, Image.fromarray(classes)


# ----------------------------------------------------------------------------------------------------------------------
# augmentation


def random_view(image, mask, crop, scales, rng):
    """Random scale, crop and flip of an image and its mask together: the weak view.

    Returns uint8 tensors image (3,crop,crop), mask (crop,crop) and the bool valid (crop,crop), False on padding, where
    the mask is 255. Only the part of the image that the crop shows is resized.
    """
    scale = rng.uniform(*scales)
    full = [max(1, round(side * scale)) for side in image.size]  # width, height
    start = [int(rng.integers(min(0, side - crop), max(0, side - crop) + 1)) for side in full]  # < 0: padding before
    low = [max(s, 0) for s in start]
    high = [min(s + crop, side) for s, side in zip(start, full)]
    factor = [original / side for original, side in zip(image.size, full)]
    box = (low[0] * factor[0], low[1] * factor[1], high[0] * factor[0], high[1] * factor[1])
    size = (high[0] - low[0], high[1] - low[1])
    window = (..., slice(low[1] - start[1], high[1] - start[1]), slice(low[0] - start[0], high[0] - start[0]))

    view = torch.tensor([round(255 * mean) for mean in MEAN], dtype=torch.uint8).view(3, 1, 1).repeat(1, crop, crop)
    view[window] = VF.pil_to_tensor(image.resize(size, Image.Resampling.BILINEAR, box))
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


def strong_view(weak, rng):
    """Color jitter, grey and blur of a uint8 image (3,H,W). Geometry stays, so weak labels fit it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(rng.integers(2**63)))
        return STRONG(weak)


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

    x (3,crop,crop) uint8, y (crop,crop) uint8; weak, and strong for "fixmatch", like x; valid (crop,crop) bool, False on
    padding; truth like y, 255 where nobody labeled: for figures, never for the loss.
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
        sample |= {"weak": weak, "truth": truth, "valid": valid, "id_u": item.id}
        if self.framework == "fixmatch":
            sample["strong"] = strong_view(weak, rng)
        return sample


def training_loader(data, steps, batch_size, crop, framework, seed, workers=0, rank=0, world=1, pin_memory=False):
    """One batch per step of the range `steps`, for one process of `world`: step t draws numbers t*B*world + rank*B + 0..B-1.

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
    batches = [range((t * world + rank) * batch_size, (t * world + rank + 1) * batch_size) for t in steps]
    return DataLoader(views, batch_sampler=batches, num_workers=workers, pin_memory=pin_memory)


class EvaluationImages(Dataset):
    """Whole images with their masks: image (3,H,W) uint8, mask (H,W) uint8 with 255."""

    def __init__(self, data, items):
        self.data, self.items = data, items

    def __len__(self):
        return len(self.items)

    def __getitem__(self, i):
        image, mask = read(self.items[i], self.data)
        return VF.pil_to_tensor(image), VF.pil_to_tensor(mask)[0]


def evaluation_loader(data, items, workers=0, rank=0, world=1):
    """One whole image at a time; of several processes each sees its own share, and no image is seen twice."""
    return DataLoader(EvaluationImages(data, items[rank::world]), batch_size=1, num_workers=workers)
