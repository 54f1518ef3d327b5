"""Check a folder of your own images, convert its masks, and print the command that trains.

    python tools/own_images.py data/mine                                  # what the masks hold, and what to do next
    python tools/own_images.py data/mine --colors classes.csv             # converts masks of colors or of other values
    python tools/own_images.py data/mine --colors classes.csv --nearest   # the same for JPEG files and soft edges
    python tools/own_images.py data/mine --val list.txt                   # writes the validation images to val.txt
    python tools/own_images.py data/mine --shrink 512                     # writes smaller copies to data/mine-512

The folder holds images/ and masks/. A mask has the name of its image. val/ may hold both again, for validation.
Training needs masks that are PNG files of class indices: 0, 1, 2 and so on, 255 for pixels to ignore. classes.txt names
the classes, one per line. For other masks this prints lines for classes.csv. Write a class, or ignore, in place of each
"?". --colors then replaces the masks. The originals move to masks-painted/.
"""

import argparse
import math
import os
import re
import shlex
import shutil
import statistics
import sys
from collections import Counter, namedtuple
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import ExifTags, Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data import IGNORE, NO_CLASS, READABLE, InputError, files, id_list, open_dataset, open_image  # noqa: E402
from data import palette, read, read_classes, read_text, save_mask, suffix, walk  # noqa: E402
from evaluate import number, run_script  # noqa: E402
from train import PHOTOGRAPHS  # noqa: E402

NEAR = 16  # of 255 in each channel; with --nearest, a pixel this close to a listed color has its class
SHOWN = 40  # lines to fill in at most
SERIES = "if the images are frames of a video or tiles of one image, choose yourself: --val FILE or a folder val/"
MOST = 65536  # colors of a mask; a photograph has more
LARGE = 1500  # pixels; above this, smaller copies are advised
CONVERTERS = {
    ".heic .heif": "a photograph from a phone; `magick mogrify -format jpg *.heic` converts it",
    ".dng .cr2 .cr3 .nef .arw .raf .orf .rw2": "raw data from a camera; export JPEG files from your raw converter",
    ".npy .npz .mat": "an array; Image.fromarray(numpy.load(file).astype('uint8')).save(name), from PIL, writes a PNG",
    ".json .xml .geojson .shp .txt .csv": "polygons or a list; export masks, as CVAT's 'Segmentation mask' does",
    ".nii .gz .dcm .mha .mhd .nrrd .h5 .hdf .hdf5": "a volume; write each slice and its mask as a PNG of 8 bits",
    ".mp4 .avi .mov .mkv .webm .mpg .mpeg .m4v .wmv": "a video; `ffmpeg -i clip.mp4 images/%05d.png` writes its frames",
}


def left_out(paths):
    """Return a sentence on the files whose suffix is not one of an image, and on what converts them; or ""."""
    others = [path for path in paths if suffix(path) not in READABLE]
    for suffixes, advice in CONVERTERS.items():
        for path in others:
            if suffix(path) in suffixes.split():
                return f"{len(others)} files are skipped because they are not images, first {path}: {advice}"
    return f"{len(others)} files are skipped because they are not images, first {others[0]}" if others else ""


def naming_advice(strays, images):
    """Return how to rename or merge masks that have no image of the same name."""
    around = set()
    for stray in strays:
        inside = [id for id in images if id in stray]
        before, _, after = stray.partition(max(inside, key=len, default=stray))
        around.add((before, after))
    if len(around) == 1 and around != {("", "")}:
        before, after = around.pop()
        extra = [f"'{before}' at the start"] * bool(before) + [f"'{after}' at the end"] * bool(after)
        return f"expected the image's name; remove {' and '.join(extra)}"
    return (
        f"expected names such as {next(iter(images))}; rename them, and if an image has several masks, merge them into "
        "one (see docs/faq.md)"
    )


def list_pairs(place, prefix=""):
    """Return {id: (image, its mask or None)} of images/ and masks/ below a folder. Raises InputError."""
    if not (place / "images").is_dir() or not (place / "masks").is_dir():
        raise InputError(f"{place} lacks images/ or masks/; expected both; a mask has the name of its image")
    images, masks = files(place / "images"), files(place / "masks")
    strays = [id for id in masks if id not in images]
    if strays and images:
        advice = naming_advice(strays, images)
        raise InputError(f"{len(strays)} masks have no image of the same name, first {masks[strays[0]]}; {advice}")
    if not images or not masks:
        advice = left_out([*walk(place / "images"), *walk(place / "masks")]) or "add some"
        raise InputError(f"{place} has {len(images)} images and {len(masks)} masks; expected some of both; {advice}")
    return {prefix + id: (path, masks.get(id)) for id, path in images.items()}


# ----------------------------------------------------------------------------------------------------------------------
# images and masks


class Mask(NamedTuple):
    """What a mask holds. A code is a value such as "3", or a color such as "255,0,0", as classes.csv writes it."""

    path: Path
    kind: str  # format by content, and Pillow's mode
    is_index_file: bool  # PNG of one 8-bit value per pixel
    is_ours: bool  # its palette is that of `save_mask`
    codes: list
    pixels: list  # how many have this code
    colors: list  # of the codes, if they are indices of a palette
    table: dict = {}  # {code: class or 255}
    stays: bool = False  # class indices, which are not converted


Look = namedtuple("Look", "size remark mask")  # what an image and its mask hold


def code_of(numbers):
    """Return the code of a value (one number) or of a color (red, green, blue, alpha)."""
    if len(numbers) == 4 and numbers[3] == 0:
        return "0,0,0,0"  # transparent, whatever its color
    if len(numbers) == 4 and numbers[3] == 255:
        numbers = numbers[:3]
    return ",".join(str(float(one)).removesuffix(".0") for one in numbers)


def read_mask(path):
    """Return a Mask, and for each pixel (H,W) the place of its code in it."""
    image = open_image(path, "L")
    is_index_file = image.format == "PNG" and suffix(path) == ".png" and image.mode in ("L", "P")
    is_ours = is_index_file and image.getpalette() == palette().ravel().tolist()
    many_bands = len(image.getbands()) > 1
    colors = []
    stored = np.array(image.convert("RGBA") if many_bands else image)  # (H,W,4) or (H,W)
    if many_bands:
        stored = stored.view(np.uint32)[..., 0]
    values, first, where, pixels = np.unique(stored, return_index=True, return_inverse=True, return_counts=True)
    if len(values) > MOST:
        raise InputError(f"mask {path} holds {len(values)} colors, as a photograph does; expected a color per class")
    codes = [code_of([value]) for value in values.tolist()]
    if many_bands:
        codes = [code_of(color) for color in values.view(np.uint8).reshape(-1, 4).tolist()]
    elif image.mode == "P":
        rgba = np.array(image.convert("RGBA")).reshape(-1, 4)
        colors = [code_of(color) for color in rgba[first].tolist()]
    kind = f"{image.format}, mode {image.mode}"
    return Mask(path, kind, is_index_file, is_ours, codes, pixels.tolist(), colors), where.reshape(stored.shape)


def look(path, mask):
    """Return the Look of an image and its mask, or None. Raises InputError if they do not fit."""
    image, remark = open_image(path, "RGBA"), ""
    if image.getchannel("A").histogram()[0]:
        remark = "have transparent pixels; they are used like all other pixels"
    if mask is None:
        return Look(image.size, remark, None)
    mask, where = read_mask(mask)
    size = where.shape[::-1]
    if size != image.size:
        advice = "expected the same size; if an EXIF tag turns the image, turn its mask, too"
        raise InputError(f"mask {mask.path} has {size} pixels, its image {image.size}; {advice}")
    with suppress(Exception), Image.open(path) as stored:  # damaged metadata
        if stored.getexif().get(ExifTags.Base.Orientation, 1) != 1 and stored.size == size:
            remark = "are turned by an EXIF tag; check that their masks are, too"
    return Look(size, remark, mask)


def look_at_all(pairs):
    """Return {id: Look} of the images that can be used. Raises InputError if an unusable one has a mask."""
    looks, broken = {}, 0
    with ThreadPoolExecutor(min(8, os.cpu_count())) as pool:
        results = {id: pool.submit(look, *pair) for id, pair in pairs.items()}
    for id, result in results.items():
        try:
            looks[id] = result.result()
        except InputError as error:
            annotated = pairs[id][1] is not None
            broken += annotated
            print(error if annotated else f"{error}; training goes on without it", file=sys.stderr)
    if broken:
        raise InputError(f"{broken} annotated images cannot be used; each is named above; replace or remove them")
    return looks


# ----------------------------------------------------------------------------------------------------------------------
# codes and classes


def read_names(file):
    """Return the names in classes.txt, [] if there is no such file."""
    names = list(read_classes(file)) if file.is_file() else []
    for name in names:
        if name.strip("_").lower() == "ignore":
            raise InputError(f"{file} names {name}; expected only the classes 0, 1, ...; remove it, it is always 255")
    return names


def split_line(line):
    """Return (texts, numbers) of a line: name,value or name,r,g,b or name,r,g,b,alpha or name,#rrggbb or name:r,g,b:"""
    line = re.sub("^# .*", "", line)  # a comment
    line = re.sub("#([0-9a-fA-F]{6})", lambda found: ",".join(map(str, bytes.fromhex(found[1]))), line)
    if ":" in line:
        line = ",".join(line.split(":")[:2])
    fields = [field.strip(" \"'") for field in re.split("[,;\t]", line)]
    fields = [field for field in fields if field]
    is_number = re.compile(r"-?(\d+\.?\d*(e[+-]?\d+)?|nan|inf)").fullmatch
    numbers = [float(field) for field in fields if is_number(field)]
    texts = [field for field in fields if not is_number(field)]
    if texts and texts[0] not in (fields[0], fields[-1]):  # numbers on both sides of the name
        texts = fields
    return ["ignore" if text.strip("_").lower() == "ignore" else text for text in texts], numbers


def read_table(file, names):
    """Return ({code: class or 255}, names) of a file for --colors. names: of classes.txt; []: in the file's order."""
    expected = "expected lines name,r,g,b or name,value, one for each color or value"
    if not Path(file).is_file():
        raise InputError(f"--colors {file} does not exist; {expected}")
    rows = {}
    for line in read_text(file).splitlines():
        texts, numbers = split_line(line)
        is_title = not rows and not numbers
        if is_title or not texts + numbers:
            continue
        if len(texts) != 1 or texts == ["?"] or len(numbers) not in (1, 3, 4) or code_of(numbers) in rows:
            raise InputError(f"--colors {file} holds {line[:60]!r}; {expected}, and a class name or ignore for each ?")
        rows[code_of(numbers)] = texts[0]
    named = [name for name in dict.fromkeys(rows.values()) if name != "ignore"]
    unknown = [name for name in named if names and name not in names]
    if unknown:
        raise InputError(f"--colors {file} names {unknown[0]}, but classes.txt does not; correct one of the two files")
    names = names or named
    if not rows or not 2 <= len(names) <= NO_CLASS:
        raise InputError(f"--colors {file} names {len(named)} classes; expected 2 to {NO_CLASS}; {expected}")
    return {code: IGNORE if name == "ignore" else names.index(name) for code, name in rows.items()}, names


def index_table(names):
    """Return the table of masks that are class indices."""
    return {str(index): index for index in range(len(names))} | {str(IGNORE): IGNORE}


def numbers_of(code):
    """Return the value of a code, or its red, green, blue and alpha."""
    numbers = [float(one) for one in code.split(",")]
    return numbers + [255] if len(numbers) == 3 else numbers


def nearest(code, table):
    """Return the class of the nearest code of the table, 255 if none is within NEAR in each channel."""
    numbers, classes = numbers_of(code), {}
    for listed, label in table.items():
        other = numbers_of(listed)
        distance = max(abs(a - b) for a, b in zip(numbers, other))
        if len(other) == len(numbers) and distance <= NEAR:
            classes[distance] = label
    return classes[min(classes)] if classes else IGNORE


def give_tables(masks, names, table):
    """Return the masks with their tables. Class indices that this tool has written stay, if classes.txt names them.

    Palettes are read as colors if other masks are colors, or if an index has different colors.
    """
    pairs = {pair for mask in masks for pair in zip(mask.codes, mask.colors)}
    by_color = len(pairs) > len({code for code, _ in pairs}) or any("," in mask.codes[0] for mask in masks)
    indices, given = index_table(names), []
    for mask in masks:
        if mask.is_ours and names and set(mask.codes) <= set(indices):
            mask = mask._replace(table=indices, stays=True)
        elif by_color and mask.colors and not mask.is_ours:
            kind = f"{mask.kind}, a palette that is read as colors"
            mask = mask._replace(table=table, codes=mask.colors, is_index_file=False, kind=kind)
        else:
            mask = mask._replace(table=table)
        given.append(mask)
    return given


Row = namedtuple("Row", "code label pixels masks")  # a line of the summary; label: class, 255 or NO_CLASS


def tally(masks, near=()):
    """Return the Rows, the most frequent first. near: codes assigned by --nearest; they share one row."""
    pixels, paths = Counter(), {}
    for mask in masks:
        for code, count in zip(mask.codes, mask.pixels):
            label = mask.table.get(code, NO_CLASS)
            key = ("others" if code in near and not mask.stays else code, label)
            pixels[key] += count
            paths.setdefault(key, {})[mask.path] = True
    return [Row(*key, count, [*paths[key]]) for key, count in pixels.most_common()]


def show(rows, names, out):
    """Print the table."""
    meanings = {NO_CLASS: "?", IGNORE: "255 = ignore"}
    meanings |= {index: f"{index} {name}" for index, name in enumerate(names)}
    print(f"{'value or color':>16} {'pixels':>12} {'masks':>6}  {'first mask':30} is", file=out)
    for code, label, pixels, masks in rows:
        print(f"{code:>16} {pixels:12,} {len(masks):6}  {masks[0].name:30} {meanings[label]}", file=out)



def problem_with(masks, names):
    """Return why the masks are not class indices of these names, or ""."""
    odd = [mask for mask in masks if not mask.is_index_file]
    if odd:
        problem = f"{len(odd)} masks are not PNG of one 8-bit value per pixel, first {odd[0].path} ({odd[0].kind})"
        return f"{problem}; JPEG changes values; export PNG instead" if "JPEG" in odd[0].kind else problem
    values = {code for mask in masks for code in mask.codes}
    unknown = sorted(values - set(index_table(names)), key=int)
    if unknown:
        first = next(mask.path for mask in masks if unknown[0] in mask.codes)
        return (
            f"the masks hold {', '.join(unknown[:5])}, first {first}, but only 0 to "
            f"{len(names) - 1} are valid; if they are class indices, write all names into classes.txt, one per line, "
            "that of 0 (often background) first"
        )
    full = [mask.path for mask in masks if set(mask.codes) == {"0", "255"} and not mask.is_ours]
    ones = [mask.path for mask in masks if "1" in mask.codes]
    if full and ones and values == {"0", "1", "255"}:  # 255 may be what 1 is in other masks
        return f"{len(full)} masks hold only 0 and 255, first {full[0]}, and {len(ones)} hold 1, first {ones[0]}"
    if values == {"0", str(IGNORE)}:
        return "the masks hold only 0 and 255, and 255 means not annotated"
    return "" if len(values - {str(IGNORE)}) > 1 else "the masks hold fewer than two classes"


def accept_indices(root, masks, names):
    """Return the names of the classes, and the masks, if these are class indices. Otherwise print what they hold, and
    lines for classes.csv, and raise InputError."""
    values = {code for mask in masks for code in mask.codes} - {str(IGNORE)}
    known = names or [f"class {index}" for index in range(min(len(values), NO_CLASS))]
    masks = give_tables(masks, names, {})
    problem = problem_with(masks, known)
    if not problem:
        return known, [mask._replace(table=index_table(known), stays=True) for mask in masks]
    rows = tally(masks)
    show(rows[:SHOWN], names, sys.stderr)
    lines, option = "the lines above", ""
    if len(rows) > SHOWN:
        print(f"{len(rows)} values, of which the {SHOWN} most frequent are shown", file=sys.stderr)
        lines, option = "only the lines of the true colors", " --nearest"
    for row in rows[:SHOWN]:
        if row.label == NO_CLASS:
            print(f"?,{row.code}", flush=True)
    raise InputError(
        f"{problem}; expected class indices 0, 1, 2, ... and 255 (classes.txt: {', '.join(names) or 'none'}); correct "
        f"the masks, or save {lines} as classes.csv, with a class name or ignore for each ?, then: "
        f"python tools/own_images.py {shlex.quote(str(root))} --colors classes.csv{option}"
    )


def apply_table(masks, names, file, by_distance):
    """Return the names of the classes, the masks with the table of --colors, and the codes that --nearest adds to it.

    names: those in classes.txt, or []. Raises InputError if the table lacks a code.
    """
    table, known = read_table(file, names)
    masks = give_tables(masks, names, table)
    near = {}
    if by_distance:
        codes = {code for mask in masks if not mask.stays for code in mask.codes}
        near = {code: nearest(code, table) for code in codes - set(table)}
    masks = [mask if mask.stays else mask._replace(table=table | near) for mask in masks]
    for mask in masks:
        if mask.stays and any(table.get(code, mask.table[code]) != mask.table[code] for code in mask.codes):
            raise InputError(
                f"mask {mask.path} holds class indices already, but {file} gives its values other classes; expected "
                "the same classes; convert the new masks in a separate folder"
            )
    for row in tally(masks):
        if row.label == NO_CLASS:
            raise InputError(
                f"{row.code} is not in {file}: {row.pixels} pixels in {len(row.masks)} masks, first {row.masks[0]}; "
                "expected every value or color; add lines, or for JPEG and soft edges --nearest"
            )
    return known, masks, near


# ----------------------------------------------------------------------------------------------------------------------
# the summary


def choose_validation(root, looks, masks, listed):
    """Return the ids to validate on, and how they were chosen. listed: the file of --val, or None."""
    with_class = {mask.path for mask in masks if any(mask.table[code] != IGNORE for code in mask.codes)}
    useful = [id for id, seen in looks.items() if seen.mask and seen.mask.path in with_class]
    if len(useful) < 2:
        raise InputError(f"{root} has {len(useful)} masks that show a class; expected two; annotate more images")
    if listed and (root / "val").is_dir():
        raise InputError(f"--val {listed} and {root / 'val'} both name validation images; expected one; move val away")
    file = Path(listed or root / "val.txt")
    if (root / "val").is_dir():
        ids, chosen = [id for id in looks if id.startswith("val/")], "those of val/"
    elif listed or file.is_file():
        ids, chosen = list(dict.fromkeys(id_list(file, looks))), f"those of {file}"
    else:
        ids = useful[4::5] or useful[-1:]
        chosen = f"{'every fifth' if len(useful) > 4 else 'the last'} mask by name; {SERIES}"
    wrong = [id for id in ids if id not in looks or looks[id].mask is None]
    if wrong:
        raise InputError(f"validation image {wrong[0]} lacks image or mask; expected both, as {useful[0]} has")
    if set(useful) <= set(ids):
        raise InputError(f"all masks are validation masks ({chosen}); expected some for training; choose fewer")
    return ids, chosen


def remarks_on_masks(masks, rows, names):
    """Yield sentences on what is done with the masks, and on what may be wrong with them."""
    stay = sum(mask.stays for mask in masks)
    yield f"{len(masks) - stay} masks are converted now; {stay} are class indices and stay"
    total = sum(row.pixels for row in rows)
    ignored = sum(row.pixels for row in rows if row.label == IGNORE)
    yield f"{ignored / total:.1%} of the pixels of the masks are ignored (255)"
    if ignored > total / 2:
        yield "pixels of 255 are never learned; give the background a class of its own if it is to be predicted"
    shown = {row.label for row in rows}
    absent = [name for index, name in enumerate(names) if index not in shown]
    if absent:
        yield f"no mask shows {', '.join(absent)}; are the lines of classes.txt the names of 0, 1, 2, ...?"
    single = [mask.path for mask in masks if len(set(mask.codes)) == 1]
    if single:
        what = f"{len(single)} of {len(masks)} masks hold a single value, first {single[0]}"
        yield f"{what}; if an image is not annotated yet, remove its mask: it is then unlabeled"


def remarks_on_folder(root, looks, side):
    """Yield sentences on what is odd in the images, and on what is not read. side: of --shrink, or None."""
    folders = [root / "images", root / "masks", root / "val"]
    others = left_out([path for folder in folders for path in walk(folder)])
    if others:
        yield others
    for path in sorted(set(root.iterdir()) - set(folders)):
        count = sum(suffix(file) in READABLE for file in walk(path))
        if count and not path.name.startswith("masks-painted"):
            yield f"{path} ({count} images) is not read; expected images in images/, validation images in val/images"
    for remark in sorted({seen.remark for seen in looks.values() if seen.remark}):
        ids = [id for id, seen in looks.items() if seen.remark == remark]
        yield f"{len(ids)} images {remark}, first {ids[0]}"
    below = Counter(Path(id).parent.as_posix() for id in looks)
    if set(below) - {".", "val"}:
        yield "images by folder: " + ", ".join(f"{name} {count}" for name, count in below.items())
    if not side and statistics.median(max(seen.size) for seen in looks.values()) > LARGE:
        command = f"python tools/own_images.py {shlex.quote(str(root))} --shrink 512"
        what_next = "then the command that it prints, then predict.py --shrink 512"
        yield f"the images are large; better train on smaller copies: {command}, {what_next}"


def train_command(root, looks):
    """Return the command that trains."""
    short_side = int(statistics.median(min(seen.size) for seen in looks.values()))
    preset = PHOTOGRAPHS["cuda" if torch.cuda.is_available() else "cpu"]
    crop = min(preset["crop"], math.ceil(short_side / 32) * 32)
    words = ["python", "train.py", "--dataset", "folder", "--root", str(root), "--crop", str(crop)]
    if all(seen.mask for seen in looks.values()):
        words += ["--framework", "supervised"]
    return shlex.join([*words, "--out", f"runs/{root.resolve().name}"])


# ----------------------------------------------------------------------------------------------------------------------
# writing


def convert(place, changes):
    """Replace the masks of a folder that are in {path: Mask} by class indices, all at the end. The originals go to
    masks-painted/, or masks-painted-2/."""
    masks, new = files(place / "masks"), place / "masks.tmp"
    if not changes.keys() & masks.values():
        return
    shutil.rmtree(new, ignore_errors=True)
    for id, path in masks.items():
        target = new / f"{id}.png"
        target.parent.mkdir(parents=True, exist_ok=True)
        if path not in changes:
            shutil.copy(path, target)
            continue
        mask = changes[path]
        classes = np.array([mask.table[code] for code in mask.codes], np.uint8)
        save_mask(classes[read_mask(path)[1]], target)
    painted, count = place / "masks-painted", 1
    while painted.exists():
        count += 1
        painted = place / f"masks-painted-{count}"
    os.replace(place / "masks", painted)
    os.replace(new, place / "masks")
    print(f"- the masks before this are in {painted}")


def shrink(root, side):
    """Write the folder ROOT-side: images of at most `side` pixels, masks, the .txt files. Return it."""
    data = open_dataset("folder", root, "all", use=("labeled", "val"))
    place = root.resolve()
    target = place.with_name(f"{place.name}-{side}")
    if target.exists():
        raise InputError(f"{target} already exists; expected a new folder; move it away first")

    def copy(item):
        with suppress(InputError):  # what is broken was named before
            image, mask = read(item, data)
            image.thumbnail((side, side))
            name = str(item.image.relative_to(root).with_suffix(""))  # images/..., or val/images/...
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            image.save(target / f"{name}.jpg", quality=95)
            if item.mask:
                small = mask.resize(image.size, Image.Resampling.NEAREST)
                save_mask(small, target / f"{name.replace('images', 'masks', 1)}.png")

    with ThreadPoolExecutor(min(8, os.cpu_count())) as pool:
        list(pool.map(copy, data.labeled + data.unlabeled + data.val))
    for file in root.glob("*.txt"):  # the lists, which say that the folder is complete
        shutil.copy(file, target)
    return target


def write(root, masks, names, val, args):
    """Write the lists, the converted masks and smaller copies. Return the folder to train on."""
    changes = {mask.path: mask for mask in masks if not mask.stays}
    try:
        if not (root / "classes.txt").is_file():
            (root / "classes.txt").write_text("\n".join(names) + "\n", "utf-8")
        if not (root / "val").is_dir() and (args.val or not (root / "val.txt").is_file()):
            (root / "val.txt").write_text("\n".join(val) + "\n", "utf-8")
        for place in (root, root / "val"):
            convert(place, changes)
        return shrink(root, args.shrink) if args.shrink else root
    except OSError as error:
        raise InputError(
            f"{root} cannot be written to ({error}); expected to write classes.txt, val.txt and masks there; make a "
            f"folder of links and use it: mkdir mine && ln -s {shlex.quote(str(root.resolve()))}/* mine/"
        ) from error


def parse_args(argv=None):
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="holds images/ and masks/, perhaps val/ with the same two")
    parser.add_argument("--colors", metavar="CSV", help="convert the masks; lines name,r,g,b or name,value")
    parser.add_argument("--nearest", action="store_true", help=f"with --colors: also colors within {NEAR}")
    parser.add_argument("--val", metavar="FILE", help="list of the validation images, one name per line")
    parser.add_argument("--shrink", type=number(int, 32), metavar="N", help="write copies of at most N pixels")
    return parser.parse_args(argv)


def main(args):
    """Check the folder, convert its masks if asked to, write its lists, and print a summary. Raises InputError."""
    root = Path(args.folder)
    pairs = list_pairs(root)
    if (root / "val").is_dir():
        pairs |= list_pairs(root / "val", "val/")
    looks = look_at_all(pairs)
    masks = [seen.mask for seen in looks.values() if seen.mask]
    names, near = read_names(root / "classes.txt"), {}
    if args.colors:
        names, masks, near = apply_table(masks, names, args.colors, args.nearest)
    else:
        names, masks = accept_indices(root, masks, names)
    val, chosen = choose_validation(root, looks, masks, args.val)

    print(f"{len(looks)} images, {len(masks)} masks; {len(val)} for validation: {chosen}")
    rows = tally(masks, near)
    show(rows, names, sys.stdout)
    for remark in (*remarks_on_masks(masks, rows, names), *remarks_on_folder(root, looks, args.shrink)):
        print(f"- {remark}")
    place = write(root, masks, names, val, args)
    if place != root:
        return main(parse_args([str(place)]))
    print(train_command(root, looks))


if __name__ == "__main__":
    run_script(lambda: main(parse_args()))
