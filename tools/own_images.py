"""Makes a folder of one's own images ready for training: checks every mask, writes classes.txt and val.txt.

    python tools/own_images.py data/mine                        # prints the classes found and the command that trains
    python tools/own_images.py data/mine --colors classes.csv   # converts other masks; lines name,r,g,b or name,value

The folder holds images/ of any format that Pillow reads, and masks/ with the same names for some of them; val/ may hold
both again, for validation. Training needs masks that are PNG files of class indices: 0, 1, 2 and so on, 255 where
nothing is to be learned. For other masks this prints lines for classes.csv, in which the name "ignore" means 255;
--colors then replaces the masks, and the originals move to masks-painted/.
"""

import argparse
import csv
import os
import shlex
import shutil
import statistics
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data import IGNORE, READABLE, InputError, files, id_list, open_dataset, save_mask  # noqa: E402
from evaluate import run_script  # noqa: E402

CLASSES = 254  # at most; 255 means ignore, and data.py needs a value for what is no class


@contextmanager
def opened(path):
    """Pillow's image of a file, its pixels not yet read. Raises InputError."""
    try:
        with Image.open(path) as image:
            yield image
    except Exception as error:  # Pillow raises many kinds, all of them the file's fault
        raise InputError(f"{path} could not be read ({error}); replace or remove it") from error


def warn(sentence):
    """Prints a sentence that is no line of classes.csv."""
    print(f"warning: {sentence}", file=sys.stderr)


def header(path):
    """(mode, (width, height) as it is shown) of an image."""
    with opened(path) as image:
        turned = image.getexif().get(0x0112) in range(5, 9)  # the orientation
        return image.mode, image.size[::-1] if turned else image.size


def stored_mode(path):
    """Pillow's mode of a mask: L and P are one byte per pixel, 1 and I other numbers, all others colors."""
    with opened(path) as image:
        return image.mode


def open_mask(path, by_value):
    """A mask as an image of the numbers that are stored, or of the colors."""
    with opened(path) as image:
        return image.convert({"P": "P", "L": "L", "1": "L"}.get(image.mode, "I") if by_value else "RGB")


def look(path, by_value):
    """((width, height), {(value,) or (r, g, b): pixels}) of a mask. Raises InputError for blended colors."""
    image = open_mask(path, by_value)
    colors = image.getcolors(CLASSES + 1)
    if colors is None:
        raise InputError(f"mask {path} holds over {CLASSES} colors; expected one per class, not blended as in JPEG")
    return image.size, {code if isinstance(code, tuple) else (code,): count for count, code in colors}


def read_table(file):
    """({(value,) or (r, g, b): class index or 255}, class names, by value?) of a CSV file. Raises InputError."""
    if not Path(file).is_file():
        raise InputError(f"--colors {file} is not there; expected lines name,r,g,b or name,value, one per class")
    lines = csv.reader(Path(file).read_text("utf-8-sig").splitlines())
    rows = [[cell.strip() for cell in row] for row in lines if row] or [[]]
    names = list(dict.fromkeys(row[0] for row in rows if row and row[0] != "ignore"))
    table = {}
    for row in rows:
        if len(row) not in (2, 4) or len(row) != len(rows[0]) or not (row[0] and "".join(row[1:]).isdecimal()):
            raise InputError(f"--colors {file} holds {','.join(row)!r}; expected lines name,r,g,b or lines name,value")
        code = tuple(map(int, row[1:]))
        if code in table:
            raise InputError(f"--colors {file} names {','.join(row[1:])} twice; expected one class for it")
        table[code] = IGNORE if row[0] == "ignore" else names.index(row[0])
    return table, names, len(rows[0]) == 2


def convert(places, table, by_value):
    """Replaces the masks of each place by class indices, all at the end; the originals go to masks-painted/."""
    for place in places:
        if (place / "masks-painted").exists():
            raise InputError(f"{place / 'masks-painted'} is there from an earlier conversion; move it away first")
        shutil.rmtree(place / "masks.tmp", ignore_errors=True)
        (place / "masks.tmp").mkdir()
        for id, path in files(place / "masks").items():
            pixels = np.asarray(open_mask(path, by_value))
            pixels, index = pixels.reshape(*pixels.shape[:2], -1), np.zeros(pixels.shape[:2], np.uint8)
            for code, value in table.items():
                index[(pixels == code).all(2)] = value
            save_mask(index, place / "masks.tmp" / f"{id}.png")
    for place in places:
        os.replace(place / "masks", place / "masks-painted")
        os.replace(place / "masks.tmp", place / "masks")


def explain(root, pixels, by_value, named):
    """Prints what other masks hold, as lines for classes.csv. Raises InputError with the command that converts them."""
    if len(pixels) > CLASSES + 1:
        raise InputError(f"the masks in {root} hold {len(pixels)} colors; expected one per class, not blended at edges")
    ignored = by_value and (IGNORE,) in pixels and not set(pixels) <= {(0,), (IGNORE,)}  # these two are classes
    for number, code in enumerate(sorted(code for code in pixels if not (ignored and code == (IGNORE,)))):
        print(f"class {number}", *code, sep=",")
    if ignored:
        print(f"ignore,{IGNORE}")
    found = f"the values {', '.join(str(code[0]) for code in sorted(pixels)[:8])}" if by_value else "colors"
    found += f", and {root / 'classes.txt'} names {named} classes" if named else ""
    raise InputError(
        f"the masks in {root} hold {found}; expected PNG files of class indices from 0 on; write the lines above "
        f"with your names into classes.csv: python tools/own_images.py {shlex.quote(str(root))} --colors classes.csv"
    )


def parse_args(argv=None):
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="holds images/ and masks/, perhaps val/ with the same two")
    parser.add_argument("--colors", metavar="CSV", help="convert the masks; lines name,r,g,b or name,value")
    return parser.parse_args(argv)


def list_pairs(places):
    """({image: (width, height)}, [(image, mask)]) of the files there; warns of images that cannot be used."""
    sizes, pairs = {}, []
    for place in places:
        if not ((place / "images").is_dir() and (place / "masks").is_dir()):
            raise InputError(f"{place} lacks images/ or masks/; expected both, masks with the names of their images")
        images, masks = files(place / "images"), files(place / "masks")
        strays = [path for id, path in masks.items() if id not in images]
        if strays:
            raise InputError(f"{len(strays)} masks belong to no image, first {strays[0]}; rename or remove them")
        others = [path for path in (place / "images").rglob("*.*") if path.suffix.lower() not in READABLE]
        if others:
            warn(f"{len(others)} files are left out, for their suffix is no image's, first {min(others)}")
        for path in images.values():
            try:
                mode, sizes[path] = header(path)
                if mode[0] in "IF":
                    warn(f"{path} is a {mode} image, training stops at it; convert it to 8 bits per channel")
            except InputError as error:
                warn(f"{error}, training stops at it")
        pairs += [(images[id], mask) for id, mask in masks.items()]
    if len(pairs) < 2:
        raise InputError(f"{places[0]} has {len(pairs)} annotated images; expected two, to learn from and to validate")
    return sizes, pairs


def main(args):
    """Checks the folder, converts its masks, writes its lists, prints what was found. Raises InputError."""
    root = Path(args.folder)
    places = [root, root / "val"] if (root / "val").is_dir() else [root]
    sizes, pairs = list_pairs(places)
    masks, listed, val = [mask for _, mask in pairs], root / "classes.txt", root / "val.txt"
    names = id_list(listed) if listed.is_file() else []
    if args.colors:
        table, names_of_table, by_value = read_table(args.colors)
        if names and names != names_of_table:
            raise InputError(f"{listed} and {args.colors} name other classes; make them the same, or remove {listed}")
        names = names_of_table
    else:
        modes = {stored_mode(mask) for mask in masks}
        by_value = all(mode in ("1", "L", "P") or mode.startswith("I") for mode in modes)
    pixels = Counter()
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for (image, mask), (size, found) in zip(pairs, pool.map(lambda mask: look(mask, by_value), masks)):
            if size != sizes.get(image, size):
                raise InputError(f"mask {mask} has {size} pixels, its image {sizes[image]}; expected the same size")
            unknown = [",".join(map(str, code)) for code in found if args.colors and code not in table]
            if unknown:
                held = f"mask {mask} holds {' and '.join(unknown[:5])}, which {args.colors} does not"
                raise InputError(f"{held}; add lines for them, with the name ignore where they mean nothing")
            pixels.update(found)
    if not args.colors:
        values = sorted(code[0] for code in pixels if code != (IGNORE,))
        whole = max(values, default=0) < len(names) if names else values == list(range(len(values)))
        png = modes <= {"L", "P"} and all(mask.suffix.lower() == ".png" for mask in masks)
        if not (png and len(values) > 1 and whole):
            explain(root, pixels, by_value, len(names))
        names = names or [f"class {value}" for value in values]
        table = {code: code[0] for code in pixels}
    if not 2 <= len(names) <= CLASSES or len(set(names)) < len(names):
        raise InputError(f"{root} has the classes {', '.join(names)}; expected 2 to {CLASSES} different names")
    if args.colors:
        convert(places, table, by_value)
    if not listed.is_file():
        listed.write_text("\n".join(names) + "\n")
    if len(places) == 1 and not val.is_file():
        annotated = [mask.relative_to(root / "masks").with_suffix("").as_posix() for mask in masks]
        val.write_text("\n".join(annotated[4::5] or annotated[-1:]) + "\n")

    data = open_dataset("folder", root, "all", use=("labeled", "val"))
    side = statistics.median([min(size) for size in sizes.values()] or [0])
    print(f"{root}: {len(data.labeled + data.unlabeled + data.val)} images, {len(pairs)} of them annotated; ", end="")
    print(f"{len(data.val)} for validation, the others for training; the short side is typically {side:.0f} pixels")
    counts = [sum(pixels[code] for code in pixels if table[code] == value) for value in range(len(names))]
    for value, (name, count) in enumerate(zip(names, counts)):
        print(f"{value:4} {name:20} {count / max(1, sum(counts)):7.2%} of the annotated pixels")
    crop = min(128, max(32, int(side) // 32 * 32))
    supervised = "" if data.unlabeled else " --framework supervised"  # all images are annotated
    print(f"python train.py --dataset folder --root {shlex.quote(str(root))} --crop {crop}{supervised}")


if __name__ == "__main__":
    run_script(lambda: main(parse_args()))
