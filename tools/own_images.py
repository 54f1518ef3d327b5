"""Check a folder of your own images, convert its masks, and print the command that trains.

    python tools/own_images.py data/mine                                  # what the masks hold, and what to do next
    python tools/own_images.py data/mine --colors classes.csv             # converts masks of colors or of other values
    python tools/own_images.py data/mine --colors classes.csv --nearest   # the same for JPEG files and soft edges
    python tools/own_images.py data/mine --val list.txt                   # validates on the images of this list
    python tools/own_images.py data/mine --shrink 512                     # writes smaller copies to data/mine-512

The folder holds images/ and masks/, a mask under the name of its image. val/ may hold both again, for validation.
Training needs masks that are PNG files of class indices: 0, 1, 2 and so on, 255 for pixels to ignore. classes.txt names
the classes, one per line. For other masks this prints lines for classes.csv: write a class in place of each "?", or
ignore. --colors then replaces the masks. The originals move to masks-painted/.
"""

import argparse
import os
import re
import shlex
import shutil
import statistics
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import ExifTags, Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data import IGNORE, NO_CLASS, READABLE, InputError, files, id_list, open_dataset, open_image  # noqa: E402
from data import palette, read, read_text, save_mask, suffix, walk  # noqa: E402
from evaluate import number, run_script  # noqa: E402

NEAR = 16  # of 255 in each channel; with --nearest so near a color a pixel has its class
FEW = 50  # pixels; a class of fewer may be a slip
SHOWN = 40  # lines at most
MOST = 65536  # colors of a mask; a photograph has more
LARGE = 1500  # pixels; longer photographs are better trained on as smaller copies
NODATA = -1e308  # stands for NaN and infinity, as rasters hold them
SERIES = "frames of one video or tiles of one image belong on one side: --val FILE or a folder val/ decides otherwise"
CONVERTERS = {
    ".heic .heif": "a photograph of a phone; `magick mogrify -format jpg *.heic` converts it",
    ".dng .cr2 .cr3 .nef .arw .raf .orf .rw2": "raw data of a camera; export JPEG files from your raw converter",
    ".npy .npz .mat": "an array; Image.fromarray(numpy.load(file).astype('uint8')).save(name), from PIL, writes a PNG",
    ".json .xml .geojson .shp": "polygons, no pixels; export masks, as labelme2voc or CVAT's 'Segmentation mask' do",
    ".txt": "text, perhaps YOLO's polygons; export masks from your tool",
    ".nii .gz .dcm .mha .mhd .nrrd .h5 .hdf .hdf5": "a volume; write each slice as a PNG of 8 bits, and its mask, too",
    ".czi .lif .nd2 .svs .vsi .ims": "a microscope's own format; export TIFF or PNG files of 8 bits, as with Fiji",
    ".mp4 .avi .mov .mkv .webm .mpg .mpeg .m4v .wmv": "a video; `ffmpeg -i clip.mp4 images/%05d.png` writes its frames",
    ".csv": "a table; if it names the classes, --colors reads it",
}


def left_out(paths):
    """Return a sentence on the files that are no images by their suffix, and on what converts them; or ""."""
    others = [path for path in paths if suffix(path) not in READABLE]
    if not others:
        return ""
    first, advice = others[0], "no image"
    for suffixes, text in CONVERTERS.items():
        known = [path for path in others if suffix(path) in suffixes.split()]
        if known:
            first, advice = known[0], text
            break
    return f"{len(others)} files are left out, because their suffix is no image's, first {first}: {advice}"


def surroundings(names, cores):
    """Return what stands before and after a core in all names, a different core in each; or None."""
    for core in sorted(filter(None, cores), key=len, reverse=True):  # the longest one that stands in the first name
        before, found, after = names[0].partition(core)
        if found:
            inner = {name.removeprefix(before).removesuffix(after) for name in names}
            if inner <= cores and len(inner) == len(names):
                return before, after
    return None


def naming_advice(strays, images, end):
    """Return how to rename or merge masks that have no image of their name; end: their suffix."""
    front = os.path.commonprefix([*images]).rstrip("0123456789")
    back = os.path.commonprefix([id[::-1] for id in images])[::-1].lstrip("0123456789")
    for start, stop in (("", ""), (front, back)):
        found = surroundings(strays, {id.removeprefix(start).removesuffix(stop) for id in images})
        if found:
            before, after = found
            core = f'g="${{f#{before}}}"; ' if before else 'g="$f"; '
            rename = f'{core}mv -n "$f" "{start}${{g%{after}{end}}}{stop}{end}"'
            return f"expected an image's name; rename them: for f in {before}*{after}{end}; do {rename}; done"
    return (
        "expected an image's name; rename them, and if an image has several, such as one per class, merge these into "
        "one mask, see docs/faq.md"
    )


def list_pairs(place):
    """Return {id: (image, its mask or None)} of images/ and masks/, and a sentence on other files, or ""."""
    folders = place / "images", place / "masks"
    if not all(folder.is_dir() for folder in folders):
        held = ", ".join(path.name for path in sorted(place.glob("*"))[:8])
        raise InputError(
            f"{place} holds {held or 'nothing'}; expected the folders images and masks, a mask under the name of its "
            "image; make them, or name the folder that has them"
        )
    images, masks = map(files, folders)
    others = left_out([*walk(folders[0]), *walk(folders[1])])
    strays = [id for id in masks if id not in images]
    if strays and images:
        first = masks[strays[0]]
        advice = naming_advice(strays, images, first.suffix)
        raise InputError(f"{len(strays)} masks have no image of their name, first {first}; {advice}")
    for folder, found in zip(folders, (images, masks)):
        if not found:
            advice = others or "add some"
            raise InputError(f"{folder} has no image; expected masks/NAME.png for images/NAME.jpg; {advice}")
    return {id: (path, masks.get(id)) for id, path in images.items()}, others


def folders_beside(root):
    """Yield a sentence on the folders beside images/ that hold images and are not read."""
    for path in sorted(root.iterdir()):
        count = sum(suffix(file) in READABLE for file in walk(path))
        if count and path.name not in ("images", "masks", "val") and not path.name.startswith("masks-painted"):
            yield f"{path} ({count} images) is not read; expected images in images/, those to validate on in val/images"


# ----------------------------------------------------------------------------------------------------------------------
# reading


class Mask(NamedTuple):
    """What a mask holds: its values and their colors in the same order, and, once `prepare` has run, their classes."""

    path: Path
    format: str  # by content
    mode: str
    indexed: bool  # class indices under the palette that `save_mask` writes
    values: np.ndarray | None  # (n,1); None: several bands
    colors: np.ndarray | None  # (n,4): red, green, blue, alpha; None: more than 8 bits
    pixels: np.ndarray  # (n,), how many have this value
    codes: np.ndarray | None = None  # the values or the colors
    table: dict = {}  # {code: class or 255}
    reach: int = 0  # so near a code of the table, in each channel, another one has its class
    stays: bool = False  # written by this tool, and not to be converted again

    def classes(self):
        """Return the class of each code, NO_CLASS if the table does not say."""
        listed = {code: label for code, label in self.table.items() if len(code) == self.codes.shape[1]}
        if not listed:
            return np.full(len(self.codes), NO_CLASS)
        distance = np.abs(self.codes[:, None] - np.array([*listed])).max(2)  # (n, listed)
        classes = np.array([*listed.values()])[distance.argmin(1)]
        return np.where(distance.min(1) <= self.reach, classes, NO_CLASS)


def read_mask(path):
    """Return a Mask, and the place (H,W) of each pixel's value in it."""
    image = open_image(path, "L")
    one_band = len(image.getbands()) == 1
    indexed = image.format == "PNG" and image.mode == "P" and image.getpalette() == palette().ravel().tolist()
    colors = None
    if image.mode[0] not in "IF":
        rgba = np.array(image.convert("RGBA"))
        rgba[rgba[..., 3] == 0] = 0  # what is fully transparent has no color
        colors = rgba.view(np.uint32)[..., 0]
    stored = np.array(image.convert("L") if image.mode == "1" else image) if one_band else colors
    if stored.dtype.kind == "f":
        stored = np.nan_to_num(stored.astype(float), nan=NODATA, posinf=NODATA, neginf=NODATA)
    found, first, where, pixels = np.unique(stored, return_index=True, return_inverse=True, return_counts=True)
    if len(found) > MOST:
        raise InputError(f"mask {path} holds {len(found)} colors, as a photograph does; expected a color per class")
    values = found[:, None].astype(float) if one_band else None
    colors = None if colors is None else rgba.reshape(-1, 4)[first].astype(float)
    return Mask(path, image.format, image.mode, indexed, values, colors, pixels), where.reshape(stored.shape)


class Look(NamedTuple):
    """What an image and its mask hold."""

    size: tuple
    turned: bool  # by an EXIF tag, and the mask cannot tell whether it is, too
    clear: bool  # some pixels are fully transparent
    mask: Mask | None


def look(path, mask):
    """Return the Look of an image and its mask, or None. Raises InputError if they do not fit."""
    image = open_image(path, "RGBA")
    stored, orientation = image.size, 1
    with Image.open(path) as opened, suppress(Exception):  # damaged metadata
        stored, orientation = opened.size, opened.getexif().get(ExifTags.Base.Orientation, 1)
    turned = orientation != 1 and stored == image.size
    clear = image.getchannel("A").histogram()[0] > 0
    if mask is None:
        return Look(image.size, False, clear, None)
    mask, where = read_mask(mask)
    size = where.shape[::-1]
    if size == stored != image.size:
        raise InputError(f"mask {mask.path} lies as stored, its image is turned by an EXIF tag; turn it, too")
    if size != image.size:
        raise InputError(f"mask {mask.path} has {size} pixels, its image {image.size}; expected the same size")
    return Look(image.size, turned, clear, mask)


def look_at_all(pairs):
    """Return the Looks of the images of {id: (image, mask)} that can be read. Raises InputError if another one has a
    mask."""
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
            if len(looks) % 500 == 499:
                print(f"{len(looks)} of {len(pairs)} images", file=sys.stderr)
    if broken:
        raise InputError(f"{broken} annotated images cannot be used, each is named above; replace or remove them")
    return looks


def read_line(line, most):
    """Return (name, code) of a line, or None; of more numbers than `most` the others are no color."""
    line = re.sub(r"#([0-9a-fA-F]{6})\b", lambda found: ",".join(map(str, bytes.fromhex(found[1]))), line)
    if not re.search("[,;:]", line):  # 0 0 0 name, or name 0 0 0
        line = re.sub(r"(?<=\d)\s+|\s+(?=\d)", ",", line)
    fields = [field.strip(" \"'[]()") for field in re.split("[,;:\t]", line)]
    is_number = re.compile(r"-?\d+\.?\d*(e[+-]?\d+)?|nan", re.IGNORECASE).fullmatch
    name = next((field for field in fields if field and not is_number(field)), None)
    if name is None:
        return None
    place = fields.index(name)
    numbers = [float(field) for field in fields[place:] if is_number(field)]
    numbers = numbers or [float(field) for field in fields[:place] if is_number(field)]
    if len(numbers) == 1:
        return name, (NODATA if numbers[0] != numbers[0] else numbers[0],)
    color = numbers[:most]
    if len(color) == 3:
        color.append(255.0)
    if len(color) != 4 or not set(color) <= set(range(256)):
        return None
    return name, tuple(color) if color[3] else (0.0,) * 4  # fully transparent: no color


def is_ignore(name):
    return name.strip("_").lower() == "ignore"


def read_rows(file):
    """Return {code: name} of a file for --colors.

    Lines name,value or name,r,g,b or name,r,g,b,alpha or name,#rrggbb, also with the name behind; a line of titles.
    """
    expected = "expected lines name,r,g,b or name,value, one per class"
    if not Path(file).is_file():
        raise InputError(f"--colors {file} is not there; {expected}")
    written = read_text(file)
    if written.lstrip()[:1] in ("[", "{"):
        raise InputError(f"--colors {file} is JSON; {expected}; write its names and colors as such lines")
    lines = [line for line in written.splitlines() if line.strip(" ,;\t")]
    lines = [line for line in lines if not re.match("#(?![0-9a-fA-F]{6})", line)]  # comments
    rows, most = {}, 4
    for line in lines:
        found = read_line(line, most)
        if line == lines[0] and not found and re.match(r"name|label|class|\D*$", line, re.IGNORECASE):  # titles
            most = 4 if re.search("[,;] *a", line, re.IGNORECASE) else 3
            continue
        if not found:
            raise InputError(f"--colors {file} holds {line[:60]!r}; {expected}; correct the line")
        name, code = found
        if name == "?" or code in rows:
            raise InputError(f"--colors {file} holds {line!r}; expected one class, or ignore, for each code")
        rows[code] = name
    if not rows:
        raise InputError(f"--colors {file} holds no line; {expected}")
    return rows


def read_table(file, names):
    """Return ({code: class or 255}, names) of a file for --colors. names: those of classes.txt, which number the
    classes, or []: then their order in the file does."""
    rows = read_rows(file)
    named = list(dict.fromkeys(name for name in rows.values() if not is_ignore(name)))
    unknown = [name for name in named if names and name not in names]
    if unknown:
        raise InputError(f"--colors {file} names {unknown[0]}, classes.txt does not; expected the same; correct one")
    names = names or named
    if not 2 <= len(names) <= NO_CLASS:
        raise InputError(f"--colors {file} names {len(names)} classes; expected 2 to {NO_CLASS}; correct it")
    return {code: IGNORE if is_ignore(name) else names.index(name) for code, name in rows.items()}, names


def read_names(file):
    """Return the names in classes.txt, [] if there is no such file."""
    names = id_list(file) if file.is_file() else []
    for name in names:
        if is_ignore(name):
            raise InputError(f"{file} names {name}, which is 255 and no class; expected names of 0, 1, ...; remove it")
        if names.count(name) > 1:
            raise InputError(f"{file} names {name} twice; expected different names; correct it")
    return names


def indices(names):
    """Return the table of masks that are class indices."""
    return {(index,): index for index in [*range(len(names)), IGNORE]}


def held(masks):
    """Return the set of all values."""
    return set().union(*(mask.values.ravel().tolist() for mask in masks))


def prepare(masks, names, table, reach=0):
    """Return the masks with the codes, values or colors, by which they are read, and the table of their classes.

    Class indices that this tool has written stay, if classes.txt names them. Other masks are read by value if they have
    one band and no palette of their own, else by color; or as all lines of the table are.
    """
    prepared, kinds = [], {len(code) for code in table}
    for mask in masks:
        if mask.indexed and names and held([mask]) <= {*range(len(names)), IGNORE}:
            prepared.append(mask._replace(codes=mask.values, table=indices(names), stays=True))
            continue
        by_value = mask.mode != "P" or mask.indexed
        if len(kinds) == 1 and not mask.indexed:
            by_value = kinds == {1}
        codes, instead = (mask.values, mask.colors) if by_value else (mask.colors, mask.values)
        if codes is None:  # such as colors of a mask of 16 bits
            codes = instead
        prepared.append(mask._replace(codes=codes, table=table, reach=reach))
    return prepared


class Row(NamedTuple):
    """A line of the table of what the masks hold."""

    code: str
    label: int  # class, 255 or NO_CLASS
    counts: dict  # {mask: pixels}

    @property
    def pixels(self):
        return sum(self.counts.values())


def tally(masks):
    """Return a Row for each value or color, the most frequent first. --nearest sums up those that are not listed."""
    rows = {}
    for mask in masks:
        for code, label, pixels in zip(mask.codes.tolist(), mask.classes().tolist(), mask.pixels.tolist()):
            name = text(code)
            if mask.reach and tuple(code) not in mask.table:
                name = "others, far" if label == NO_CLASS else "others, near"
                label = IGNORE if label == NO_CLASS else label
            counts = rows.setdefault((name, label), Row(name, label, {})).counts
            counts[mask.path] = counts.get(mask.path, 0) + pixels
    return sorted(rows.values(), key=lambda row: -row.pixels)


def text(code):
    """Return a value or color as classes.csv names it: its number, or r,g,b, and alpha if that is not 255."""
    if len(code) == 4 and code[3] == 255:
        code = code[:3]
    return ",".join("nan" if one == NODATA else str(one).removesuffix(".0") for one in code)


def show(rows, names, out):
    """Print the table."""
    print(f"{'value or color':>16} {'pixels':>12} {'masks':>6}  {'first mask':30} is", file=out)
    for row in rows:
        if row.label == NO_CLASS:
            meaning = "?"
        elif row.label == IGNORE:
            meaning = "255 = ignore"
        else:
            meaning = f"{row.label} {names[row.label]}"
            if row.pixels < FEW:
                meaning += " (a slip?)"
        first = next(iter(row.counts)).name
        print(f"{row.code:>16} {row.pixels:12,} {len(row.counts):6}  {first:30} {meaning}", file=out)


def two_conventions(masks):
    """Return a sentence if 255 in some masks may be what 1 is in others, or ""."""
    full = [mask.path for mask in masks if held([mask]) == {0, IGNORE} and not mask.indexed]
    ones = [mask.path for mask in masks if 1 in mask.values]
    if not full or not ones or not held(masks) <= {0, 1, IGNORE}:
        return ""
    return f"{len(full)} masks hold only 0 and 255, first {full[0]}, and {len(ones)} hold 1, first {ones[0]}"


def problem_with(masks, names):
    """Return why the masks are no class indices of these names, or ""."""
    colored = [mask for mask in masks if mask.values is None]
    if colored:
        return f"{len(colored)} masks hold colors, first {colored[0].path}"
    colors = {(*value, *color) for mask in masks if mask.mode == "P" for value, color in zip(mask.values, mask.colors)}
    if len(colors) > len({value for value, *_ in colors}):
        return "the masks have different palettes"
    odd = [mask for mask in masks if mask.format != "PNG" or suffix(mask.path) != ".png" or mask.mode not in ("L", "P")]
    if odd:
        problem = f"{len(odd)} masks are no 8-bit PNG files, first {odd[0].path} ({odd[0].format}, mode {odd[0].mode})"
        return f"{problem}; JPEG changes values, better export PNG files" if odd[0].format == "JPEG" else problem
    classes = sorted(held(masks) - {IGNORE})
    if len(classes) < 2:
        return "the masks hold fewer than two classes"
    wrong = [value for value in classes if value not in range(min(len(names), NO_CLASS))]
    if not wrong:
        return two_conventions(masks)
    first = next(mask.path for mask in masks if wrong[0] in mask.values)
    problem = (
        f"the masks hold {', '.join(text([value]) for value in wrong[:5])}, first {first}, and there are {len(names)} "
        "classes; if all values are indices, write a name for each from 0 on, often background first, into classes.txt"
    )
    if classes == [*range(len(classes))]:
        raise InputError(problem)
    return problem


def accept_indices(root, masks, names):
    """Return the names of the classes, and the masks, if these are class indices. Otherwise print what they hold, and
    lines for classes.csv, and raise InputError."""
    known = names
    if not names and all(mask.values is not None for mask in masks):
        known = [f"class {index}" for index in range(len(held(masks) - {IGNORE}))]
    problem = problem_with(masks, known)
    if not problem:
        return known, [mask._replace(codes=mask.values, table=indices(known)) for mask in masks]
    masks = prepare(masks, names, {})
    rows = tally([mask for mask in masks if not mask.stays])
    show(tally([mask for mask in masks if mask.stays]) + rows[:SHOWN], names, sys.stderr)
    if len(rows) > SHOWN:
        print(f"{len(rows)} in all; of JPEG and soft edges list the true ones, and add --nearest", file=sys.stderr)
    for row in rows[:SHOWN]:
        print(f"?,{row.code}", flush=True)
    if names:
        problem += f" (classes.txt: {', '.join(names)})"
    command = f"python tools/own_images.py {shlex.quote(str(root))} --colors classes.csv"
    raise InputError(
        f"{problem}; expected class indices 0, 1, 2, ... and 255; correct the masks, or save the lines above as "
        f"classes.csv, with a class or ignore for each ?, then: {command}"
    )


def apply_table(masks, listed, file, nearest):
    """Return the names of the classes, and the masks, as --colors says. Raises InputError if it lacks a code.

    listed: the names in classes.txt, or [].
    """
    table, names = read_table(file, listed)
    masks = prepare(masks, listed, table, NEAR if nearest else 0)
    new_values = any(mask.codes.shape[1] == 1 for mask in masks if not mask.stays)
    for mask in masks:
        if new_values and mask.stays and any(table.get((value,), value) != value for value in held([mask])):
            raise InputError(
                f"mask {mask.path} is class indices already, and its values have other classes in {file}; expected one "
                "meaning; convert the new masks in a folder of their own"
            )
    for row in tally(masks):
        if row.label == NO_CLASS:
            first, count = next(iter(row.counts)), len(row.counts)
            raise InputError(
                f"{row.code} is not in {file}: {row.pixels} pixels in {count} masks, first {first}; expected every "
                "value or color; add lines, or for JPEG and soft edges --nearest"
            )
    return names, masks


# ----------------------------------------------------------------------------------------------------------------------
# writing


def convert(places, masks):
    """Replace masks by class indices, all at the end; the originals go to masks-painted/, or masks-painted-2/."""
    changes = {mask.path: mask for mask in masks if not mask.stays}
    places = [place for place in places if not set(changes).isdisjoint(files(place / "masks").values())]
    for place in places:
        shutil.rmtree(place / "masks.tmp", ignore_errors=True)
        for id, path in files(place / "masks").items():
            target = place / "masks.tmp" / f"{id}.png"
            target.parent.mkdir(parents=True, exist_ok=True)
            if path in changes:
                classes = changes[path].classes()
                classes[classes == NO_CLASS] = IGNORE
                _, where = read_mask(path)
                save_mask(classes.astype(np.uint8)[where], target)
            else:
                shutil.copy(path, target)
    for place in places:
        painted, number = place / "masks-painted", 1
        while painted.exists():
            number += 1
            painted = place / f"masks-painted-{number}"
        os.replace(place / "masks", painted)
        os.replace(place / "masks.tmp", place / "masks")


def shrink(root, side):
    """Write the folder ROOT-side: images whose longer side is that, their masks, and the two lists. Return it."""
    data = open_dataset("folder", root, "all", use=("labeled", "val"))
    place = root.resolve() if root.name in ("", "..") else root
    target, part = (place.with_name(f"{place.name}-{side}{end}") for end in ("", ".tmp"))
    if target.exists():
        raise InputError(f"{target} is there already; expected a new folder; move it away first")
    shutil.rmtree(part, ignore_errors=True)

    def copy(item):
        with suppress(InputError):  # what is broken was named before
            image, mask = read(item, data)
            image.thumbnail((side, side))
            name = str(item.image.relative_to(root).with_suffix(""))  # images/..., or val/images/...
            (part / name).parent.mkdir(parents=True, exist_ok=True)
            image.save(part / f"{name}.jpg", quality=95)
            if item.mask:
                small = mask.resize(image.size, Image.Resampling.NEAREST)
                save_mask(small, part / f"{name.replace('images', 'masks', 1)}.png")

    with ThreadPoolExecutor(min(8, os.cpu_count())) as pool:
        list(pool.map(copy, data.labeled + data.unlabeled + data.val))
    for file in root.glob("*.txt"):  # the lists
        shutil.copy(file, part)
    os.replace(part, target)
    return target


def choose_validation(root, pairs, inside, useful, listed):
    """Return the ids to validate on, and how they were chosen.

    inside: the ids of val/; useful: those of masks that show a class; listed: the file of --val, or None.
    """
    file = listed or root / "val.txt"
    if len(useful) < 2:
        raise InputError(f"{root} has {len(useful)} masks that show a class; expected two; annotate more images")
    if inside and listed:
        raise InputError(f"--val {listed} and {root / 'val'} both say what to validate on; expected one; move val away")
    if inside:
        ids, chosen = inside, "those of val/"
    elif listed or file.is_file():
        ids, chosen = list(dict.fromkeys(id_list(file, pairs))), f"those of {file}"
    else:
        ids, chosen = useful[4::5] or useful[-1:], "every fifth mask by name; " + SERIES
    wrong = [id for id in ids if id not in pairs or pairs[id][1] is None]
    if wrong:
        raise InputError(f"{wrong[0]} is to validate on and has no image or no mask; expected both, as of {useful[0]}")
    if set(useful) <= set(ids):
        raise InputError(f"all masks are to validate on ({chosen}); expected some to learn from; choose fewer")
    return ids, chosen


def write_lists(root, names, ids, replace):
    """Write classes.txt and val.txt unless they are there; replace: val.txt in any case."""
    if not (root / "classes.txt").is_file():
        (root / "classes.txt").write_text("\n".join(names) + "\n", "utf-8")
    if not (root / "val").is_dir() and (replace or not (root / "val.txt").is_file()):
        (root / "val.txt").write_text("\n".join(ids) + "\n", "utf-8")


def crop_for(short_side):
    """Return the --crop for photographs of this short side."""
    return min(256, max(32, int(short_side) // 32 * 32))


def remarks(root, looks, masks, rows, names):
    """Yield sentences on what may be wrong with the masks and images."""
    total = sum(row.pixels for row in rows)
    ignored = sum(row.pixels for row in rows if row.label == IGNORE)
    yield f"255 is {ignored / total:.1%} of the pixels of the masks"
    if ignored > total / 2:
        yield "what is 255 is never learned; give the background a class of its own if it is to be predicted"
    share = sum(row.pixels for row in rows if row.label == 0) / total
    if share > 0.5 and not re.match("_*background|class 0", names[0], re.IGNORECASE):
        yield f"{share:.0%} of the pixels are {names[0]}; if that is background, its line is missing in classes.txt"
    absent = [name for index, name in enumerate(names) if index not in [row.label for row in rows]]
    if absent:
        yield f"no mask shows {', '.join(absent)}; are the lines of classes.txt the names of 0, 1, 2, ...?"
    single = [mask.path for mask in masks if len(mask.pixels) == 1]
    if single:
        what = f"{len(single)} of {len(masks)} masks hold a single value, first {single[0]}"
        yield f"{what}; remove those of images that are not annotated yet: they are unlabeled then"
    turned = [id for id, seen in looks.items() if seen.turned]
    if turned:
        yield f"{len(turned)} images are turned by an EXIF tag, first {turned[0]}; check that their masks are, too"
    clear = [id for id, seen in looks.items() if seen.clear]
    if clear:
        yield f"{len(clear)} images have transparent pixels, first {clear[0]}; they are trained on as any other"
    folders = Counter(Path(id).parent.as_posix() for id in looks)
    if set(folders) - {".", "val"}:
        yield "images by folder: " + ", ".join(f"{name} {count}" for name, count in folders.items())
    if statistics.median(max(seen.size) for seen in looks.values()) > LARGE:
        command = f"python tools/own_images.py {shlex.quote(str(root))} --shrink 512"
        yield f"the images are large; better train on smaller copies: {command}, then predict.py --shrink 512"
    yield from folders_beside(root)


def train_command(root, looks, all_annotated):
    """Return the command that trains."""
    crop = crop_for(statistics.median(min(seen.size) for seen in looks.values()))
    words = ["python", "train.py", "--dataset", "folder", "--root", str(root), "--crop", str(crop)]
    if all_annotated:
        words += ["--framework", "supervised"]
    return shlex.join([*words, "--out", f"runs/{root.resolve().name}"])


def parse_args(argv=None):
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="holds images/ and masks/, perhaps val/ with the same two")
    parser.add_argument("--colors", metavar="CSV", help="convert the masks; lines name,r,g,b or name,value")
    parser.add_argument("--nearest", action="store_true", help=f"with --colors: up to {NEAR} from a listed one")
    parser.add_argument("--val", metavar="FILE", help="list of the images to validate on, one name per line")
    parser.add_argument("--shrink", type=number(int, 32), metavar="N", help="write copies, N pixels on the longer side")
    return parser.parse_args(argv)


def write(root, masks, names, val, args):
    """Convert the masks if asked to, and write the lists and smaller copies. Return the folder to train on."""
    try:
        if args.colors:
            convert([root, root / "val"], masks)
        write_lists(root, names, val, bool(args.val))
        return shrink(root, args.shrink) if args.shrink else root
    except OSError as error:
        raise InputError(
            f"{root} cannot be written to ({error}); expected to write classes.txt, val.txt and masks there; make a "
            f"folder of links and use it: mkdir mine && ln -s {shlex.quote(str(root.resolve()))}/* mine/"
        ) from error


def main(args):
    """Check the folder, convert its masks if asked to, write its lists, and print a summary. Raises InputError."""
    root = Path(args.folder)
    pairs, left = list_pairs(root)
    inside, left_in_val = list_pairs(root / "val") if (root / "val").is_dir() else ({}, "")
    inside = {f"val/{id}": pair for id, pair in inside.items()}
    pairs |= inside
    looks = look_at_all(pairs)
    masks = [seen.mask for seen in looks.values() if seen.mask]
    names = read_names(root / "classes.txt")
    if args.colors:
        names, masks = apply_table(masks, names, args.colors, args.nearest)
    else:
        names, masks = accept_indices(root, masks, names)
    useful = {mask.path for mask in masks if (mask.classes() < NO_CLASS).any()}
    useful = [id for id, (_, mask) in pairs.items() if mask in useful]
    val, chosen = choose_validation(root, pairs, list(inside), useful, args.val)

    print(f"{len(pairs)} images, {len(masks)} masks; {len(val)} to validate on: {chosen}")
    rows = tally(masks)
    show(rows, names, sys.stdout)
    if args.colors:
        stay = sum(mask.stays for mask in masks)
        print(f"- {len(masks) - stay} masks to convert; {stay} are class indices already and stay")
    for remark in filter(None, [left, left_in_val, *remarks(root, looks, masks, rows, names)]):
        print(f"- {remark}")
    place = write(root, masks, names, val, args)
    if place != root:
        return main(parse_args([str(place)]))
    print(train_command(root, looks, all_annotated=all(mask for _, mask in pairs.values())))


if __name__ == "__main__":
    run_script(lambda: main(parse_args()))
