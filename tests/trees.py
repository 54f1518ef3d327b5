"""Tiny trees of files in the layouts of the datasets, each function returns the root; what else several tests use."""

import re

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode

from data import InputError, palette, save_mask


def camvid(root, train=6, val=3, size=(64, 48), test=0):
    """SegNet's layout: masks are 0 above, 3 below, in val/ from other rows, then void (11); images show them."""
    for split, count in (("train", train), ("val", val), ("test", test)):
        for i in range(count):
            horizon = size[1] // 2
            if split == "val":
                horizon += (0, 9, 3, 15)[i % 4]
            mask = np.zeros((size[1], size[0]), np.uint8)
            mask[horizon:] = 3
            mask[-1] = 11
            for folder, pixels in ((split, np.stack([mask * 20 + i] * 3, 2)), (f"{split}annot", mask)):
                (root / folder).mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels).save(root / folder / f"{split}{i}.png")
    return root


def folder(root, images=6, annotated=4, val=2, size=(64, 48), classes=3):
    """A folder of one's own: images/ in several formats, masks/ of the first, val/, classes.txt; stripes of classes."""
    suffixes = (".jpg", ".png", ".bmp", ".TIFF", ".webp")
    stripes = np.arange(size[0]) * classes // size[0]
    for place, count, masks in ((root, images, annotated), (root / "val", val, val)):
        for i in range(count):
            mask = np.roll(stripes, 3 * i).astype(np.uint8)[None].repeat(size[1], 0)
            pixels = np.stack([mask * 40 + i, 200 - mask * 30, mask * 20], 2)
            (place / "images").mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(place / "images" / f"photo {i}{suffixes[i % 5]}")
            if i < masks:
                save_mask(mask, place / "masks" / f"photo {i}.png")
    (root / "classes.txt").write_text("".join(f"class {c}\n" for c in range(classes)))
    return root


def save_palette(mask, path):
    """A PNG as VOC stores its masks: indices with a palette."""
    (image := Image.fromarray(mask.astype(np.uint8), "P")).putpalette(palette().tobytes())
    image.save(path)


def write_lists(splits, lists):
    splits.mkdir(parents=True)
    for name, ids in lists.items():
        (splits / f"{name}.txt").write_text("\n".join(ids) + "\n")


def pascal(root, splits):
    """Six fine training images, two of SBD, two for validation; lists of 2 and of 7."""
    for folder in ("JPEGImages", "SegmentationClass", "SegmentationClassAug"):
        (root / folder).mkdir(parents=True)
    fine = [f"2007_00000{i}" for i in range(6)]
    coarse, val = ([f"{year}_00000{i}" for i in (1, 2)] for year in (2008, 2009))
    rng = np.random.default_rng(0)
    for i, id in enumerate(fine + coarse + val):
        width, height = 61 + 6 * i, 83 - 4 * i  # odd sizes
        mask = np.zeros((height, width), np.uint8)
        mask[10:50, 8:40] = 255
        mask[14:46, 12:36] = 1 + 2 * i  # the object, inside its border
        pixels = np.where(mask == 1 + 2 * i, 200, 40)[..., None] + rng.integers(0, 40, (height, width, 3))
        Image.fromarray(pixels.astype(np.uint8)).save(root / "JPEGImages" / f"{id}.jpg")
        save_palette(mask, root / f"SegmentationClass{'Aug' if id in coarse else ''}" / f"{id}.png")
    train = fine + coarse
    write_lists(splits / "pascal", {"1464": fine, "train": train, "val": val, "2": fine[:2], "7": train[:7]})
    return root


def cityscapes(root, splits):
    """Four training images, two for validation; labelTrainIds in one city, labelIds in the others; a list of 2."""
    rng, names = np.random.default_rng(0), {"train": [], "val": []}
    for split, city, kind in (("train", "aachen", "labelTrainIds"), ("train", "zurich", "labelIds"),
                              ("val", "lindau", "labelIds")):  # fmt: skip
        images, masks = (root / folder / split / city for folder in ("leftImg8bit", "gtFine"))
        images.mkdir(parents=True), masks.mkdir(parents=True)
        for i in range(2):
            id = f"{city}_00000{i}_000019"
            Image.fromarray(rng.integers(0, 255, (48, 96, 3)).astype(np.uint8)).save(images / f"{id}_leftImg8bit.png")
            road, car, void = (7, 26, 3) if kind == "labelIds" else (0, 13, 255)
            mask = np.full((48, 96), void, np.uint8)
            mask[20:40], mask[:20] = road, car
            Image.fromarray(mask).save(masks / f"{id}_gtFine_{kind}.png")
            if kind == "labelTrainIds":  # the other kind lies beside it, as in the archives
                Image.fromarray(mask * 0 + 7).save(masks / f"{id}_gtFine_labelIds.png")
            names[split].append(id)
    write_lists(splits / "cityscapes", names | {"2": names["train"][1:3]})
    return root


class Operations(TorchDispatchMode):
    """Counts and names what PyTorch is asked to compute. Views, which only look at a tensor, are not launched."""

    count, launched, names = 0, 0, ()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        self.launched += not operation.is_view
        self.count += operation is not torch.ops.prim.device.default  # a fake tensor's question about itself
        self.names += (operation.__name__,)
        return operation(*args, **(kwargs or {}))


def truncate(*paths):
    """Cuts files in half, as an interrupted copy leaves them."""
    for path in paths:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def refused(says, function, *args, **options):
    """Fails unless the function refuses such arguments in one line that matches and advises nobody to trust a file."""
    with pytest.raises(InputError, match=says) as error:
        function(*args, **options)
    said = str(error.value)
    assert said.startswith("Caught") or not re.search("\n|trust|\x1b", said), said  # from a loader worker: a traceback
