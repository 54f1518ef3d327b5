"""Generated images for the first run: six classes, each a form with a texture. Nothing is downloaded.

    write_shapes(Path("data/shapes"))                     # 480 images for training, 96 in val/, all with masks
"""

import os
import shutil

import numpy as np
from PIL import Image

IGNORE = 255
SIZE = 96  # pixels
TRAIN, VAL = 480, 96  # images
CLASSES = (  # texture and form
    ("striped", "disc"), ("checked", "square"), ("ringed", "triangle"),
    ("speckled", "disc"), ("zigzag", "square"), ("dotted", "triangle"),
)  # fmt: skip


def triangle(u, v, radius):
    """Return the signed distance from an equilateral triangle."""
    sides = [u * np.cos(angle) + v * np.sin(angle) for angle in np.pi * np.array([1 / 2, 7 / 6, 11 / 6])]
    return np.maximum.reduce(sides) - 0.6 * radius


def speckled(u, v, period, rng):
    """Return random squares, half of them True."""
    row, column = (np.floor(2 * w / period).astype(int) for w in (u, v))
    return rng.random((200, 200))[row, column] < 0.5


FORMS = {  # signed distance from the outline in pixels, negative inside; u and v: centered and rotated coordinates
    "disc": lambda u, v, radius: np.hypot(u, v) - radius,
    "square": lambda u, v, radius: np.maximum(np.abs(u), np.abs(v)) - 0.85 * radius,
    "triangle": triangle,
}
TEXTURES = {  # True where the second of an object's two shades shows
    "ringed": lambda u, v, period, rng: np.hypot(u, v) % period < period / 2,
    "striped": lambda u, v, period, rng: u % period < period / 2,
    "zigzag": lambda u, v, period, rng: (u + np.abs(v % (2 * period) - period)) % period < period / 2,
    "dotted": lambda u, v, period, rng: np.hypot(u % period - period / 2, v % period - period / 2) < 0.36 * period,
    "checked": lambda u, v, period, rng: (np.floor(2 * u / period) + np.floor(2 * v / period)) % 2 == 1,
    "speckled": speckled,
}


def generate(index):
    """Return generated image `index` as an RGB image and its mask (H,W) uint8. It is a pure function of the index.

    Color says nothing about the class. Plain blobs are background, objects overlap, everything is noisy, and
    a border two pixels wide around each object is 255, as in PASCAL.
    """
    rng = np.random.default_rng([20230913, index])
    y, x = np.mgrid[:SIZE, :SIZE].astype(np.float32)
    slope = rng.normal(0, 0.3, (2, 3))
    shade = (y / SIZE - 0.5)[..., None] * slope[0] + (x / SIZE - 0.5)[..., None] * slope[1]
    image = rng.uniform(0.2, 0.8, 3) + shade
    mask = np.zeros((SIZE, SIZE), np.uint8)

    def random_axes():
        angle = rng.uniform(0, 2 * np.pi)
        dy, dx = y - rng.uniform(0, SIZE), x - rng.uniform(0, SIZE)
        return dx * np.cos(angle) + dy * np.sin(angle), dy * np.cos(angle) - dx * np.sin(angle)

    for _ in range(rng.integers(4, 9)):  # clutter, labeled background
        u, v = random_axes()
        color = rng.uniform(0, 1, 3)
        image[np.hypot(u / rng.uniform(2, 14), v / rng.uniform(2, 8)) < 1] = color
    for _ in range(rng.integers(3, 6)):
        kind = rng.integers(len(CLASSES))
        texture, form = CLASSES[kind]
        u, v = random_axes()
        radius, period = rng.uniform(14, 30), rng.uniform(6, 9)
        distance = FORMS[form](u, v, radius)
        bright = rng.uniform(0.5, 1, 3)
        dark = bright * rng.uniform(0.1, 0.4)
        shades = (bright, dark) if rng.random() < 0.5 else (dark, bright)
        if texture != "ringed":
            u, v = u + rng.uniform(0, period), v + rng.uniform(0, period)
        colors = np.where(TEXTURES[texture](u, v, period, rng)[..., None], *shades)
        image = np.where((distance < 0)[..., None], colors, image)
        mask[distance < 1] = IGNORE
        mask[distance < -1] = 1 + kind
    image += rng.normal(0, 0.06, image.shape)
    return Image.fromarray((image.clip(0, 1) * 255).astype(np.uint8)), mask


def write_shapes(root):
    """Write the images to a folder that `--dataset folder` can read, unless it exists."""
    if root.is_dir():
        return
    part = root.with_name(f"{root.name}-{os.getpid()}.tmp")
    for index in range(TRAIN + VAL):
        folder = part if index < TRAIN else part / "val"
        for kind, picture in zip(("images", "masks"), generate(index)):
            (folder / kind).mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.asarray(picture)).save(folder / kind / f"{index:04d}.png")
    names = ["background", *(f"{texture} {form}" for texture, form in CLASSES)]
    (part / "classes.txt").write_text("\n".join(names) + "\n")
    try:
        os.rename(part, root)
    except OSError:  # another process was faster
        shutil.rmtree(part)
