"""Makes a folder of one's own images ready for training: checks every file, writes classes.txt and val.txt.

    python tools/own_images.py data/mine                        # prints the classes found and the command that trains
    python tools/own_images.py data/mine --colors classes.csv   # converts other masks; lines name,r,g,b or name,value
    python tools/own_images.py data/mine --shrink 512           # then data/mine-512: copies of large photographs

The folder holds images/ of any format that Pillow reads, and masks/ with the same names for some of them; val/ may hold
both again, for validation. Training needs masks that are PNG files of class indices: 0, 1, 2 and so on, 255 where
nothing is to be learned. For other masks this prints lines for classes.csv, in which the name "ignore" means 255;
--colors then replaces the masks, and the originals move to masks-painted/.
"""

import argparse
import os
import re
import shlex
import shutil
import statistics
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data import IGNORE, InputError, files, id_list, left_out, open_dataset, open_image, read  # noqa: E402
from data import read_text, save_mask, suffix, walk  # noqa: E402
from evaluate import number, run_script  # noqa: E402

CLASSES = 254  # at most; 255 means ignore, and data.py needs a value for what is no class
NAN = -1e308  # stands for NaN, which does not equal itself
NEAR = 16  # of 255 in each channel: so near its color a pixel belongs to a class, where edges are blended
NUMBER = r"(?:-?\d+\.?\d*(?:e[+-]?\d+)?|nan)"
LINE = rf"\s*(\"[^\"]*\"|[^\",;\t]+?)\s*[,;:\t]\s*({NUMBER}(\s*[,;\t]\s*{NUMBER}){{0,3}})\s*([,;:\t].*)?"
LARGE = 1500  # pixels; longer photographs are better trained on as smaller copies


def warn(sentence):
    """Prints a sentence that is no line of classes.csv."""
    print(f"warning: {sentence}", file=sys.stderr)


def each(function, members):
    """The results of a function for the members, or the InputErrors that it raised; by several threads.
    Says every ten seconds how far it is."""

    def result(member):
        try:
            return function(member)
        except InputError as error:
            return error

    results, said = [], time.monotonic()
    with ThreadPoolExecutor(min(8, os.cpu_count())) as pool:
        for one in pool.map(result, members):
            results.append(one)
            if time.monotonic() > said + 10:
                said = time.monotonic()
                print(f"{len(results)} of {len(members)} files", file=sys.stderr)
    return results


def read_mask(path, by_value):
    """A mask's codes: the numbers that are stored (n,1), or colors with alpha (n,4), and where which one is (H,W)."""
    image = open_image(path, "L")
    if by_value and len(image.getbands()) > 1:
        raise InputError(f"mask {path} is a {image.mode} image; expected lines name,r,g,b for its colors")
    stored = np.array(image.convert("L" if image.mode == "1" else image.mode) if by_value else image.convert("RGBA"))
    if stored.dtype.kind == "f":
        stored = np.nan_to_num(stored.astype(float), nan=NAN, posinf=NAN, neginf=NAN)
    elif not by_value:
        stored[stored[..., 3] == 0] = 0  # what is fully transparent has no color
        stored = stored.view(np.uint32)[..., 0]
    found, where = np.unique(stored, return_inverse=True)
    found = found[:, None] if by_value else found.view(np.uint8).reshape(-1, 4)
    return found.astype(float), where.reshape(stored.shape)


def text(code):
    """A code as classes.csv names it: its number, or r,g,b, and alpha where that is not 255."""
    numbers = code[:3] if code[3:] == (255,) else code
    return ",".join("nan" if one == NAN else str(float(one)).removesuffix(".0") for one in numbers)


def distances(some, others):
    """Of codes (n,k) from codes (m,k), in the channel that differs most: (n,m)."""
    return np.abs(np.array([*some])[:, None] - np.array([*others])).max(2)


def classify(found, table, reach):
    """Codes (n,k) -> classes (n,) uint8: of the nearest code in the table, 255 where that is farther than reach."""
    distance, classes = distances(found, table), np.array([*table.values()], np.uint8)
    return np.where(distance.min(1) <= reach, classes[distance.argmin(1)], IGNORE).astype(np.uint8)


def carriers(found, pixels, solid):
    """Of codes (n,k) those that stand for classes if the others are blended at edges; None if nothing is blended.

    solid: the pixels that complete a square of 2 x 2 of their code; in areas most do, at blended edges few. Blended are
    a third of all codes, two between those of areas or ten. A thin class has many more pixels than they; what is near a
    color is the same color.
    """
    thin = solid < pixels / 3
    low, high = found[~thin].min(0, initial=np.inf), found[~thin].max(0, initial=-np.inf)
    between = (thin[:, None] & (low <= found) & (found <= high)).all(1)
    if thin.sum() < max(2 if between.sum() > 1 else 10, len(found) / 3):
        return None
    usual, total, kept = pixels[thin].mean(), pixels[thin].sum(), []
    heavy = (solid > pixels / 1.5) & (pixels > usual) | (pixels > 10 * usual) & (pixels > total / 10)
    for place in np.flatnonzero(heavy)[np.argsort(-pixels[heavy])]:
        value = found.shape[1] == 1 and solid[place] > 0.75 * pixels[place]
        if not kept or value or distances(found[[place]], kept).min() > NEAR:
            kept.append(tuple(found[place].tolist()))
    return sorted(kept)


def read_table(file):
    """({code: class index or 255}, class names) of a file for --colors. Raises InputError.

    Lines name,value or name,r,g,b or name,r,g,b,alpha; or CVAT's labelmap.txt, or r g b name; a line of titles.
    """
    expected, rows, rest = "expected lines name,r,g,b or lines name,value, one per class", {}, 4
    if not Path(file).is_file():
        raise InputError(f"--colors {file} is not there; {expected}")
    lines = [line for line in read_text(file).splitlines() if line.strip(" ,;\t") and line[0] != "#"]
    for line in lines:
        line = re.sub(r"^\s*(\d+)\s+(\d+)\s+(\d+)\s+(\S.*)$", r"\4,\1,\2,\3", line)
        found = re.fullmatch(LINE, line)
        if line == lines[0] and not found and re.match(r"(name|label|class)\w*[,;\t]", line, re.IGNORECASE):
            rest = 3 if re.search(r"[,;]b\w*[,;](?!a)", line, re.IGNORECASE) else 4  # after blue, but not alpha
            continue
        code = tuple(map(float, re.split(r"\s*[,;\t]\s*", found[2])[:rest])) if found else ()
        code = code + (255.0,) if len(code) == 3 else code
        fits = len(code) == 1 or len(code) == 4 and {*code} <= {*range(256)}
        if not fits or len(code) != len([*rows, code][0]):
            raise InputError(f"--colors {file} holds {line!r}; {expected}")
        code = (NAN,) if code[0] != code[0] else (0.0,) * 4 if code[3:] == (0,) else code
        if code in rows:
            raise InputError(f"--colors {file} names {text(code)} twice; expected one class for it")
        rows[code] = found[1].strip('" ')
    if not rows:
        raise InputError(f"--colors {file} holds ''; {expected}")
    names = list(dict.fromkeys(name for name in rows.values() if name != "ignore"))
    return {code: IGNORE if name == "ignore" else names.index(name) for code, name in rows.items()}, names


def convert(places, table, by_value, reach):
    """Replaces the masks of each place by class indices, all at the end; the originals go to masks-painted/."""
    for place in places:
        if (place / "masks-painted").exists():
            raise InputError(f"{place / 'masks-painted'} is there from an earlier conversion; move it away first")
        shutil.rmtree(place / "masks.tmp", ignore_errors=True)
        (place / "masks.tmp").mkdir()
        for id, path in files(place / "masks").items():
            found, where = read_mask(path, by_value)
            save_mask(classify(found, table, reach)[where], place / "masks.tmp" / f"{id}.png")
    for place in places:
        os.replace(place / "masks", place / "masks-painted")
        os.replace(place / "masks.tmp", place / "masks")


def explain(root, shown, names, held):
    """Prints the codes of other masks as lines for classes.csv. Raises InputError with the command that converts."""
    if not 2 <= len(shown) <= CLASSES + 1:
        raise InputError(f"{held}; expected 2 to {CLASSES} classes, each in areas of its own value or color")
    ignored = [code for code in shown if len(code) == 1 and code[0] < 0]  # in GIS: no data
    ignored += [(IGNORE,)] if {*shown} - {(0,), (IGNORE,)} else []  # these two alone are classes
    classes = [code for code in shown if code not in ignored]
    if len(names) != len(classes):
        names = ["transparent" if code == (0,) * 4 else f"class {index}" for index, code in enumerate(classes)]
    for code in shown:
        print(f"{'ignore' if code in ignored else names[classes.index(code)]},{text(code)}")
    raise InputError(
        f"{held}; expected PNG files of class indices from 0 on; write the lines above with your names into "
        f"classes.csv: python tools/own_images.py {shlex.quote(str(root))} --colors classes.csv"
    )


def list_pairs(place):
    """{image: its mask, or None} of images/ and masks/; warns of other files."""
    if not ((place / "images").is_dir() and (place / "masks").is_dir()):
        raise InputError(f"{place} lacks images/ or masks/; expected both, masks with the names of their images")
    images, masks = files(place / "images"), files(place / "masks")
    strays = [path for id, path in masks.items() if id not in images]
    if others := left_out([*walk(place / "images"), *walk(place / "masks")]):
        if strays or not masks:
            raise InputError(others)
        warn(others)
    if strays:
        raise InputError(f"{len(strays)} masks belong to no image, first {strays[0]}; rename or remove them")
    return {path: masks.get(id) for id, path in images.items()}


def look(image, mask, by_value):
    """(size of an image, whether a tag turns it and its mask cannot tell; of its mask: codes, their pixels, those of
    them that complete a square of 2 x 2). Raises InputError."""
    upright = open_image(image, "RGB").size
    if mask is None:
        return (upright,)
    with Image.open(image) as opened:
        stored, turned = opened.size, opened.getexif().get(0x0112, 1) != 1
    codes, where = read_mask(mask, by_value)
    if where.shape[::-1] == stored != upright:
        raise InputError(f"mask {mask} lies as stored, its image is turned by an EXIF tag; turn it, or drop the tag")
    if where.shape[::-1] != upright:
        raise InputError(f"mask {mask} has {where.shape[::-1]} pixels, its image {upright}; expected the same size")
    corner = where[1:, 1:]
    square = (corner == where[:-1, 1:]) & (corner == where[1:, :-1]) & (corner == where[:-1, :-1])
    pixels, solid = (np.bincount(part.ravel(), minlength=len(codes)) for part in (where, corner[square]))
    return upright, turned and upright == stored, codes, pixels, solid


def palette_of(mask):
    """(mode, {(index, color)} of the indices in use) of a mask."""
    image = open_image(mask, "L")
    colors, used = image.getpalette(), image.getcolors() if image.mode == "P" else []
    return image.mode, {(index, *colors[3 * index : 3 * index + 3]) for _, index in used}


def shrink(root, data, side):
    """Writes the folder ROOT-side, images whose longer side is that, with their masks. Returns it."""
    place = root.resolve() if root.name in ("", "..") else root
    target, part = (place.with_name(f"{place.name}-{side}{end}") for end in ("", ".tmp"))
    if target.exists():
        raise InputError(f"{target} is there already; move it away first")
    shutil.rmtree(part, ignore_errors=True)

    def copy(item):
        image, mask = read(item, data)
        image.thumbnail((side, side))
        name = str(item.image.relative_to(root).with_suffix(""))  # images/..., or val/images/...
        (part / name).parent.mkdir(parents=True, exist_ok=True)
        image.save(part / f"{name}.jpg", quality=95)
        if item.mask:
            save_mask(mask.resize(image.size, 0), part / f"{name.replace('images', 'masks', 1)}.png")  # 0: nearest

    each(copy, data.labeled + data.unlabeled + data.val)  # what is broken was named before
    for file in root.glob("*.txt"):  # the two lists
        shutil.copy(file, part)
    os.replace(part, target)
    return target


def parse_args(argv=None):
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="holds images/ and masks/, perhaps val/ with the same two")
    parser.add_argument("--colors", metavar="CSV", help="convert the masks; lines name,r,g,b or name,value")
    parser.add_argument("--shrink", type=number(int, 32), metavar="N", help="write copies, N pixels on the longer side")
    return parser.parse_args(argv)


def main(args):
    """Checks the folder, converts its masks, writes its lists, prints what was found. Raises InputError."""
    root = Path(args.folder)
    places = [root, root / "val"] if (root / "val").is_dir() else [root]
    pairs = {image: mask for place in places for image, mask in list_pairs(place).items()}
    masks, listed, val = list(filter(None, pairs.values())), root / "classes.txt", root / "val.txt"
    if len(masks) < 2:
        raise InputError(f"{root} has {len(masks)} annotated images; expected two, to learn from and to validate")
    names, why = id_list(listed) if listed.is_file() else [], ""
    if args.colors:
        table, names_of_table = read_table(args.colors)
        if names and names != names_of_table:
            raise InputError(f"{listed} and {args.colors} name other classes; make them the same, or remove {listed}")
        names, by_value = names_of_table, len([*table][0]) == 1
    else:
        kinds = [kind for kind in each(palette_of, masks) if not isinstance(kind, InputError)]
        modes, colors = {mode for mode, _ in kinds}, set().union(*(used for _, used in kinds))
        why = ", for their palettes differ" if len(colors) > len({index for index, *_ in colors}) else ""
        by_value = all(Image.getmodebands(mode) == 1 for mode in modes) and not why

    looks = dict(zip(pairs, each(lambda pair: look(*pair, by_value), pairs.items())))
    broken = [image for image, seen in looks.items() if isinstance(seen, InputError)]
    for image in broken:
        warn(f"{looks[image]}{'' if pairs[image] else '; training goes on without it'}")
    if any(pairs[image] for image in broken):
        raise InputError(f"{len(broken)} files cannot be used, each is named above; replace or remove them")
    sizes = [seen[0] for image, seen in looks.items() if image not in broken]
    looks = {image: seen for image, seen in looks.items() if pairs[image]}
    if turned := [image for image, seen in looks.items() if seen[1]]:
        warn(f"{len(turned)} images are turned by an EXIF tag, first {turned[0]}; look whether their masks are, too")

    _, _, *parts = zip(*looks.values())
    found, inverse = np.unique(np.concatenate(parts[0]), axis=0, return_inverse=True)
    pixels, solid = (np.bincount(inverse.ravel(), np.concatenate(part)) for part in parts[1:])
    codes, kept, reach = list(map(tuple, found.tolist())), carriers(found, pixels, solid), 0
    shown = codes if kept is None else kept
    held = f"the masks in {root} hold the {'values' if by_value else 'colors'} {'; '.join(map(text, shown[:8]))}"
    held += "; ..." * (len(shown) > 8) + why
    if kept:
        held += f", and {len(codes) - len(kept)} blended at edges, as by JPEG or a soft brush (with --colors pixels "
        held += "near a listed one get its class, all others 255)"
    elif kept is not None:
        held = f"the masks in {root} hold {len(codes)} {'values' if by_value else 'colors'}, none of them in areas"
    elif any(suffix(mask) in (".jpg", ".jpeg") for mask in masks):
        held += ", and JPEG has changed some (what nobody drew is to have the name ignore)"
    if args.colors:
        if kept is not None and not {*codes} <= {*table}:
            unlike = distances(table, table)
            reach = min(NEAR, unlike[unlike > 0].min(initial=99) / 4)  # a mixture of two classes may look like a third
            warn(held)
        unknown = [code for code in shown if distances([code], table).min() > reach]
        if unknown:
            mask = next(pairs[image] for image, seen in looks.items() if 0 in distances(unknown, seen[2]))
            held = f"mask {mask} holds {' and '.join(map(text, unknown[:5]))}, which {args.colors} does not"
            raise InputError(f"{held}; add lines for them, with the name ignore where they mean nothing")
    else:
        values = [int(code[0]) for code in codes if code != (IGNORE,)]
        whole = max(values, default=0) < len(names) if names else values == list(range(len(values)))
        png = modes <= {"L", "P"} and all(suffix(mask) == ".png" for mask in masks)
        if not (by_value and png and whole and len(values) > 1 and (kept is None or names)):
            explain(root, shown, names, held + f", and {listed} names {len(names)} classes" * bool(names))
        if kept is not None:
            warn(held)
        names, table = names or [f"class {value}" for value in values], {code: int(code[0]) for code in codes}
    if not 2 <= len(names) <= CLASSES or len(set(names)) < len(names):
        raise InputError(f"{root} has the classes {', '.join(names)}; expected 2 to {CLASSES} different names")
    if args.colors:
        convert(places, table, by_value, reach)
    if not listed.is_file():
        listed.write_text("\n".join(names) + "\n", "utf-8")
    if len(places) == 1 and not val.is_file():
        ids = {image: id for id, image in files(root / "images").items()}
        useful = [ids[image] for image, seen in looks.items() if (classify(seen[2], table, reach) != IGNORE).any()]
        val.write_text("\n".join(useful[4::5] or useful[-1:]) + "\n", "utf-8")

    data = open_dataset("folder", root, "all", use=("labeled", "val"))
    if args.shrink:
        return main(parse_args([str(shrink(root, data, args.shrink))]))
    short, long = (statistics.median(map(side, sizes)) for side in (min, max))
    print(f"{root}: {len(pairs)} images, {len(masks)} of them annotated; {len(data.val)} for validation, ", end="")
    print(f"the others for training; the short side is typically {short:.0f} pixels")
    counts = np.bincount(classify(found, table, reach), pixels, IGNORE + 1)[:IGNORE]
    for value, name in enumerate(names):
        print(f"{value:4} {name:20} {counts[value] / max(1, counts.sum()):7.2%} of the annotated pixels")
    if long > LARGE:
        command = f"python tools/own_images.py {shlex.quote(str(root))} --shrink 512"
        warn(f"these photographs are large; better train on smaller copies: {command}; then predict.py --shrink 512")
    crop = "" if short >= (321 if torch.cuda.is_available() else 128) else f" --crop {max(32, int(short) // 32 * 32)}"
    supervised = "" if data.unlabeled else " --framework supervised"  # all images are annotated
    print(f"python train.py --dataset folder --root {shlex.quote(str(root))}{crop}{supervised}")


if __name__ == "__main__":
    run_script(lambda: main(parse_args()))
