"""tools/own_images.py: what it shows of a folder, what it asks, what it converts, and which mistakes it names."""

import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import trees
from PIL import Image, ImageFilter

import train as T
from data import InputError, open_dataset, palette, read, save_mask
from tools import own_images

CLASSES = ("soil", "wheat", "weed")


def call(*words):
    """The tool in this process, with the words of its command line."""
    own_images.main(own_images.parse_args(list(map(str, words))))


def refused(says, *words):
    """The sentence with which the tool ends, which has to match."""
    with pytest.raises(InputError, match=says) as error:
        call(*words)
    return str(error.value)


def pixels(path):
    with Image.open(path) as image:
        return np.array(image)


def mine(root, images=8, annotated=6, **options):
    """A folder of one's own as a user puts it there: images/ and masks/, nothing else."""
    trees.folder(root, images, annotated, **options)
    shutil.rmtree(root / "val")
    (root / "classes.txt").unlink()
    return root


def change_masks(root, change, suffix=".png", first=0):
    """Every mask from a number on becomes change(mask, its number), an image or an array, in a file with the suffix."""
    for number, path in enumerate(sorted((root / "masks").rglob("*.png"))):
        if number >= first:
            changed = change(pixels(path), number)
            path.unlink()
            (Image.fromarray(changed) if isinstance(changed, np.ndarray) else changed).save(path.with_suffix(suffix))


def masks_of(root):
    return {path.stem: pixels(path) for path in sorted((root / "masks").rglob("*.*"))}


def contents(root):
    return {path: path.is_file() and path.read_bytes() for path in root.rglob("*")}


def test_class_indices_get_names_every_fifth_validates_and_the_printed_command_fits(tmp_path, capsys):
    root = mine(tmp_path / "my data", images=14, annotated=11)
    save_mask(np.full((48, 64), 255, np.uint8), root / "masks" / "photo 4.png")  # cannot validate
    call(root)
    said, useful = capsys.readouterr().out, sorted(f"photo {i}" for i in range(11) if i != 4)
    assert (root / "val.txt").read_text().splitlines() == useful[4::5]
    assert (root / "classes.txt").read_text() == "class 0\nclass 1\nclass 2\n"
    assert said.startswith("14 images, 11 masks; 2 for validation: every fifth mask by name; if the images")
    assert f"{1 / 11:.1%} of the pixels of the masks are" in said and "1 of 11 masks hold a single value, first" in said
    counts = np.bincount(np.concatenate([mask.ravel() for mask in masks_of(root).values()]))
    for index, name in ((0, "0 class 0"), (2, "2 class 2"), (255, "255 = ignore")):
        (row,) = [line.split(maxsplit=5) for line in said.splitlines() if line.startswith(f"{index:16} ")]
        assert row[1] == f"{counts[index]:,}" and row[2] == ("1" if index == 255 else "10") and row[5] == name
    words = shlex.split(said.splitlines()[-1])
    assert words[:2] == ["python", "train.py"]
    args = T.parse_args(words[2:])
    assert (args.dataset, args.root, args.crop, args.out) == ("folder", str(root), 64, "runs/my data")
    data = open_dataset(args.dataset, args.root, "all")
    assert [item.id for item in data.labeled] == sorted({*useful, "photo 4"} - {*useful[4::5]})
    assert [item.id for item in data.unlabeled] == [f"photo {i}" for i in (11, 12, 13)]


@pytest.mark.parametrize("gpu, side, crop", [(False, 20, 32), (False, 127, 128), (False, 300, 192), (True, 300, 320),
                                             (True, 400, 321)])  # fmt: skip
def test_the_crop_comes_from_the_short_side_and_without_unlabeled_images_training_is_supervised(
    tmp_path, capsys, monkeypatch, gpu, side, crop
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    call(root := mine(tmp_path / "mine", images=2, annotated=2, size=(400, side)))
    options = f"--crop {crop} --framework supervised --out runs/mine"
    assert capsys.readouterr().out.splitlines()[-1] == f"python train.py --dataset folder --root {root} {options}"
    assert (root / "val.txt").read_text() == "photo 1\n"


GRAYS, NODATA = np.array([255, 100, 200], np.uint8), (np.nan, np.inf, -np.inf)
BY_COLOR = {"0,0,0": "soil", "128,0,0": "wheat", "0,128,0": "weed"}
OTHER_MASKS = {  # a change of masks, a suffix, the name of each value or color, and of each former index
    "0 and 255": (lambda m, _: (m > 0) * np.uint8(255), ".png", {"0": "soil", "255": "weed"}, "soil weed weed"),
    "0 and 255 beside 0 and 1": (lambda m, i: (m > 0) * np.uint8(255 if i else 1), ".png",
                                 {"0": "soil", "1": "weed", "255": "weed"}, "soil weed weed"),
    "grays": (lambda m, _: GRAYS[m], ".png", {"255": "ignore", "100": "weed", "200": "soil"}, "ignore weed soil"),
    "two values": (lambda m, _: m > 0, ".png", {"0": "soil", "1": "weed"}, "soil weed weed"),
    "16 bits": (lambda m, _: m.astype(np.uint16) * 300, ".png",
                {"0": "weed", "300": "wheat", "600": "soil"}, "weed wheat soil"),
    "float": (lambda m, i: np.array([NODATA[i % 3], 0.25, 7], np.float32)[m], ".tif",
              {"nan": "ignore", "inf": "ignore", "-inf": "ignore", "0.25": "weed", "7": "soil"}, "ignore weed soil"),
    "colors": (lambda m, _: palette()[m], ".png", BY_COLOR, "soil wheat weed"),
    "transparent": (lambda m, i: np.array([[i, 9, 9, 0], [0, 0, 0, 255], [255] * 4], np.uint8)[m], ".png",
                    {"0,0,0,0": "ignore", "0,0,0": "weed", "255,255,255": "soil"}, "ignore weed soil"),
    "palettes that differ": (lambda m, i: Image.fromarray(palette()[m]).quantize(3).remap_palette(
        np.roll([0, 1, 2], i).tolist()), ".png", BY_COLOR, "soil wheat weed"),  # an index has several colors
    "values beside colors": (lambda m, i: palette()[m] if i else m, ".png",
                             {"0": "soil", "1": "wheat", "2": "weed", **BY_COLOR}, "soil wheat weed"),
    "indices in TIFF": (lambda m, _: m, ".tif", {"0": "soil", "1": "wheat", "2": "weed"}, "soil wheat weed"),
}  # fmt: skip


@pytest.mark.parametrize("kind", OTHER_MASKS)
def test_other_masks_are_shown_without_a_guess_and_converted_as_the_person_says(tmp_path, capsys, kind):
    change, suffix, names, expected = OTHER_MASKS[kind]
    root, table = mine(tmp_path / "mine"), tmp_path / "classes.csv"
    before = masks_of(root)
    (root / "classes.txt").write_text("\n".join(CLASSES))
    change_masks(root, change, suffix)
    files = contents(root)
    sentence = refused("expected class indices 0, 1, 2, .* a class name or ignore for each \\?, then: python", root)
    asked = capsys.readouterr().out
    assert {*asked.split()} == {f"?,{code}" for code in names} and contents(root) == files
    assert sentence.endswith(f"python tools/own_images.py {root} --colors classes.csv")
    table.write_text(asked)
    refused(r"holds '\?,.*'; .* a class name or ignore for each \?", root, "--colors", table)
    table.write_text("".join(f"{name},{code}\n" for code, name in names.items()))
    call(root, "--colors", table)
    index = np.array([{**dict(zip(CLASSES, range(3))), "ignore": 255}[name] for name in expected.split()])
    for id, mask in masks_of(root).items():
        assert np.array_equal(mask, index[before[id]])
    assert {path.name for path in (root / "masks-painted").iterdir()} == {f"{id}{suffix}" for id in before}
    assert "6 masks are converted now; 0 are" in capsys.readouterr().out
    call(root)  # ready now


@pytest.mark.parametrize("suffix", [".jpg", ".png"])
def test_soft_edges_need_nearest_which_says_how_many_pixels_go_each_way(tmp_path, capsys, suffix):
    root, table = mine(tmp_path / "mine"), tmp_path / "classes.csv"
    before, blur = masks_of(root), ImageFilter.GaussianBlur(0.7)
    change_masks(root, lambda m, _: Image.fromarray(palette()[m]).filter(blur), suffix)
    advice = refused("6 masks are not PNG of one 8-bit value per pixel, first .*mode RGB.", root)
    said = capsys.readouterr()
    assert advice.endswith("--colors classes.csv" + " --nearest" * (suffix == ".jpg"))
    assert said.out.count("?,") == (40 if suffix == ".jpg" else 15)
    assert ("values, of which the 40 most frequent" in said.err) == (suffix == ".jpg")
    table.write_text("".join(f"{name},{code}\n" for code, name in BY_COLOR.items()))
    says = r"is not in .*csv: \d+ pixels in [1-6] masks, first .*photo \d.*; expected every .* edges --nearest"
    refused(says, root, "--colors", table)
    call(root, "--colors", table, "--nearest")
    rows, counts, after = capsys.readouterr().out.splitlines(), {"near": 0, "far": 0}, masks_of(root)
    listed = np.array([[int(number) for number in code.split(",")] for code in BY_COLOR])
    for id, mask in after.items():
        painted = pixels(root / "masks-painted" / f"{id}{suffix}").astype(int)
        distance = np.abs(painted[..., None, :] - listed).max(-1)
        near, far = (distance.min(-1) > 0) & (distance.min(-1) <= 16), distance.min(-1) > 16
        counts["near"], counts["far"] = counts["near"] + near.sum(), counts["far"] + far.sum()
        assert np.array_equal(mask, np.where(far, 255, distance.argmin(-1)))
        assert 0.5 < (mask == before[id]).mean() < 1
    for place, count in counts.items():
        said = [line.split() for line in rows if line.lstrip().startswith("others ")]
        said = [int(words[1].replace(",", "")) for words in said if (words[-1] == "ignore") == (place == "far")]
        assert count > 0 and sum(said) == count


def test_a_second_batch_is_converted_beside_the_first_which_stays(tmp_path, capsys):
    root, table = mine(tmp_path / "mine"), tmp_path / "classes.csv"
    before = masks_of(root)
    table.write_text("soil,0,0,0\nweed,0,128,0\nwheat,128,0,0\n")  # in another order than the tool's palette
    change_masks(root, lambda m, _: palette()[m])
    call(root, "--colors", table)
    index = np.array([0, 2, 1])
    for number in (3, 4, 5):
        Image.fromarray(palette()[before[f"photo {number}"]]).save(root / "masks" / f"photo {number}.png")
    capsys.readouterr()
    refused("3 masks are not PNG .*, first .*photo 3.png .*classes.txt: soil, weed, wheat.", root)
    assert {*capsys.readouterr().out.split()} == {"?,0,0,0", "?,0,128,0", "?,128,0,0"}
    call(root, "--colors", table)
    assert "3 masks are converted now; 3 are class indices and stay" in capsys.readouterr().out
    assert all(np.array_equal(mask, index[before[id]]) for id, mask in masks_of(root).items())
    assert len([*(root / "masks-painted-2").iterdir()]) == 6
    change_masks(root, lambda m, _: m + np.uint8(1), first=3)  # values, of which 1 means soil
    table.write_text("soil,1\nweed,2\nwheat,3\n")
    refused("photo 0.png holds class indices already, but .*csv gives its values", root, "--colors", table)
    (root / "classes.txt").unlink()
    table.write_text("soil,0,0,0\nweed,0,128,0\nwheat,128,0,0\n")
    refused(r"\d is not in .*classes.csv", root, "--colors", table)  # indices are never read as colors


def test_masks_of_0_and_255_can_be_added_after_a_conversion(tmp_path, capsys):
    root, table = mine(tmp_path / "mine"), tmp_path / "classes.csv"
    foreground = {id: mask > 0 for id, mask in masks_of(root).items()}
    change_masks(root, lambda m, _: (m > 0) * np.uint8(255))
    refused("the masks hold only 0 and 255, and 255 means not annotated", root)
    table.write_text("soil,0\nplant,255\n")
    call(root, "--colors", table)
    Image.fromarray(foreground["photo 3"] * np.uint8(255)).save(root / "masks" / "photo 3.png")
    call(root, "--colors", table)
    assert "1 masks are converted now; 5 are class indices and stay" in capsys.readouterr().out
    assert all(np.array_equal(mask, foreground[id]) for id, mask in masks_of(root).items())


def test_a_class_that_is_new_or_drawn_nowhere_needs_a_line_of_classes_txt(tmp_path, capsys):
    root = mine(tmp_path / "mine")
    (root / "classes.txt").write_text("soil\nwheat\n")
    says = "masks hold 2, first .*photo 0.png, but only 0 to 1 are valid; if .* write all names into classes.txt"
    refused(says, root)
    (root / "classes.txt").write_bytes("soil\nStraße\nweed\nmaize\n".encode("latin-1"))
    call(root)
    said = capsys.readouterr().out
    assert "no mask shows maize; are the lines of classes.txt" in said and "1 Straße" in said
    mask = pixels(root / "masks" / "photo 3.png")
    mask[0, 0] = 3
    save_mask(mask, root / "masks" / "photo 3.png")
    call(root)
    row = [line for line in capsys.readouterr().out.splitlines() if line.endswith("3 maize")]
    assert row[0].split() == ["3", "1", "1", "photo", "3.png", "3", "maize"]
    mask[0, 0] = 7
    Image.fromarray(mask).save(root / "masks" / "photo 3.png")
    refused("masks hold 7, first .*photo 3.png, but only 0 to 3 are valid; .*classes.txt: soil, Straße", root)


def test_255_beside_0_is_no_class_while_1_is_one_in_other_masks(tmp_path):
    root = mine(tmp_path / "mine")
    change_masks(root, lambda m, i: (m > 0) * np.uint8(1 if i < 4 else 255))
    refused("2 masks hold only 0 and 255, first .*photo 4.png, and 4 hold 1, first .*photo 0.png; expected", root)


@pytest.mark.parametrize("text, names, says", [
    ("soil,1\nwheat,2\n", "", r"3 is not in .*classes.csv: \d+ pixels in 5 masks, first .*photo 1.png; expected every"),
    ("soil,1\nsoil,2\nignore,3\n", "", "names 1 classes; expected 2 to 254"),
    ("soil,1\nwheat,2\nweed,3\n", "soil\nmaize\n", "csv names wheat, but classes.txt does not; correct one"),
    ("soil,1\nwheat,2\n?,3\n", "", r"holds '\?,3'; .*, and a class name or ignore for each \?"),
    ("soil,1\nwheat,1\n", "", "holds 'wheat,1'; expected lines .* one for each color"),
    ("soil,1,2,3\nwheat,4,5,6\n", "", r"\d is not in .*csv"), (",1\n", "", "holds ',1'"),
    ("", "", "names 0 classes"), ("soil,1\nwheat,1.2.3\n", "", "holds 'wheat,1.2.3'"),
    ("name,value\n1,soil,2\n", "", "holds '1,soil,2'"), ("soil,1\n2,3\n", "", "holds '2,3'"),
    ('[{"name": "soil"}]', "soil\nweed\n", "names 0 classes; expected 2 to 254; expected lines name,r,g,b"),
    (None, "", "classes.csv does not exist; expected lines name,r,g,b"),
    ("soil,1\nwheat,2\n", "__ignore__\nsoil\n", "names __ignore__; expected only the classes .*; remove it"),
    ("soil,1\nwheat,2\n", "soil\nsoil\n", "names soil twice"),
])  # fmt: skip
def test_a_conversion_that_cannot_end_well_gets_a_sentence_and_changes_nothing(tmp_path, text, names, says):
    root, table = mine(tmp_path / "mine"), tmp_path / "classes.csv"
    change_masks(root, lambda m, i: np.minimum(m + 1, 3 if i else 2).astype(np.uint8))  # the first has no 3
    if names:
        (root / "classes.txt").write_text(names)
    if text is not None:
        table.write_text(text)
    before = contents(root)
    refused(says, root, "--colors", table)
    assert contents(root) == before


@pytest.mark.parametrize("text, codes", [
    ("Void,0,0,0\n\n  \n,,,\nStraße,128,64,128\n", ("0,0,0", "128,64,128")),
    ("name;r;g;b\nVoid;0;0;0;255\n\"Straße\";128;64;128\n", ("0,0,0", "128,64,128")),
    ("# label:color_rgb:parts:actions\nVoid:0,0,0::\nStraße:128,64,128:a,b:c\n", ("0,0,0", "128,64,128")),
    ("Void,#000000\nStraße,#804080\n", ("0,0,0", "128,64,128")), ("r,g,b,name\n0,0,0,Void\n128,64,128,Straße\n",
                                                                   ("0,0,0", "128,64,128")),
    ("#000000,Void\n#804080,Straße\n", ("0,0,0", "128,64,128")), ("Void,1\nStraße,0,0,0\n", ("1", "0,0,0")),
    ("Pixel Value, Class\n0, Void\n2.5, Straße\n", ("0", "2.5")), ("Void,nan\nStraße,-9999\n", ("nan", "-9999")),
    ("Void,7,7,7,0\nStraße,1,2,3,128\n", ("0,0,0,0", "1,2,3,128")),
])  # fmt: skip
def test_tables_of_other_tools_and_encodings_are_read(tmp_path, text, codes):
    for encoding in ("utf-8-sig", "latin-1", "utf-16"):
        (tmp_path / "classes.csv").write_bytes(f"{text}__ignore__,9\n".encode(encoding))
        table = dict(zip((*codes, "9"), (0, 1, 255)))
        assert own_images.read_table(tmp_path / "classes.csv", []) == (table, ["Void", "Straße"])
        reverse = dict(zip((*codes, "9"), (2, 0, 255)))
        names = ["Straße", "maize", "Void"]  # classes.txt numbers them
        assert own_images.read_table(tmp_path / "classes.csv", names) == (reverse, names)


def test_mistakes_in_a_folder_get_a_sentence(tmp_path):
    refused("mine lacks images/ or masks/; expected both; a mask has the name of", tmp_path / "mine")
    refused("has 1 masks that show a class; expected two; annotate", mine(tmp_path / "one", annotated=1))
    root = mine(tmp_path / "mine")
    shutil.move(root / "masks", root / "labels")
    refused("mine lacks images/ or masks/", root)
    (root / "masks").mkdir()
    (root / "masks" / "photo 0.npy").write_bytes(b"x")
    refused("has 8 images and 0 masks; expected some of both; .*photo 0.npy: an array; Image.fromarray", root)
    shutil.rmtree(root / "masks")
    shutil.move(root / "labels", root / "masks")
    change_masks(root, lambda m, _: m * np.uint8(0))
    refused("the masks hold fewer than two classes", root)
    change_masks(root, lambda m, _: m.astype(np.uint8), ".jpg")
    refused(r"6 masks are not PNG of one .*, first .*photo 0.jpg .JPEG, mode L.", root)
    (root / "masks" / "photo 0.jpg").rename(root / "masks" / "photo 0.png")
    refused(r"6 masks are not PNG of one .*, first .*photo 0.png .JPEG, mode L.; JPEG changes values", root)
    noise = np.random.default_rng(0).integers(0, 256, (300, 300, 3)).astype(np.uint8)
    with pytest.raises(InputError, match="colors, as a photograph does; expected a color per class"):
        Image.fromarray(noise).save(root / "photo.png")
        own_images.read_mask(root / "photo.png")


@pytest.mark.parametrize("masks, says", [
    (["{}_mask"], "remove '_mask' at the end"),
    (["SegmentationClass/gt-{}.jpg___fuse"], "SegmentationClass/gt-' at the start and '.jpg___fuse' at the end"),
    (["{}-cat", "{}-dog"], "if an image has several masks, merge them into one .see docs/faq.md."),
    (["other"], "expected names such as photo 0; rename them"),
])  # fmt: skip
def test_masks_under_other_names_are_to_be_renamed_or_merged(tmp_path, masks, says):
    root = mine(tmp_path / "mine", images=12, annotated=11)  # photo 1 and photo 10
    for path in sorted((root / "masks").iterdir()):
        for pattern in masks:
            target = root / "masks" / f"{pattern.format(path.stem)}.png"
            target.parent.mkdir(exist_ok=True)
            shutil.copy(path, target)
        path.unlink()
    (root / "masks" / "_classes.csv").write_text("Pixel Value, Class\n")
    refused(f"masks have no image of the same name, first .*; .*{says}", root)


def test_all_files_that_cannot_be_used_are_named_at_once_and_unlabeled_ones_stop_nothing(tmp_path, capsys):
    root = mine(tmp_path / "mine")
    images, whole = root / "images", (root / "images" / "photo 0.jpg").read_bytes()
    (images / "notes.odt").write_text("x")
    (images / "photo 6.png").write_bytes(whole[:-100])  # its header is whole
    (images / "photo 9.jpg").symlink_to("nowhere.jpg")
    Image.fromarray(np.zeros((48, 64), np.uint16)).save(images / "photo 7.bmp", "PNG")
    call(root)
    said = capsys.readouterr()
    assert "1 files are skipped because they are not images, first" in said.out and "notes.odt" in said.out
    assert "photo 6.png could not be read (image file is truncated" in said.err
    assert "photo 7.bmp has more than 8 bits per channel" in said.err and "photo 9.jpg could not be read" in said.err
    assert said.err.count("training goes on without it") == 3
    (images / "photo 0.jpg").write_bytes(whole[:-100])
    (root / "masks" / "photo 1.png").write_bytes(b"broken")
    Image.new("L", (48, 64)).save(root / "masks" / "photo 2.png")
    Image.new("L", (64, 48)).save(
        root / "masks" / "photo 3.png", "TIFF", save_all=True, append_images=[Image.new("L", (64, 48))]
    )
    refused("4 annotated images cannot be used; each is named above; replace or remove them", root)
    said = capsys.readouterr().err
    assert all(f"photo {name} could not be read" in said for name in ("0.jpg", "1.png", "6.png"))
    assert "photo 2.png has (48, 64) pixels, its image (64, 48); expected the same size" in said
    assert "photo 3.png holds 2 pages; expected one" in said


def test_nearest_is_within_16_in_each_channel_and_alpha_is_one():
    table = {"nan": 255, "0": 0, "20": 1, "255,0,0": 2, "250,0,10": 3}
    expected = {"9": 0, "11": 1, "37": 255, "252,0,4": 2, "250,0,7": 3, "255,17,0": 255, "255,0,0,250": 2, "inf": 255}
    assert {code: own_images.nearest(code, table) for code in expected} == expected


@pytest.mark.parametrize("name, says", [
    ("a.HEIC", "magick mogrify -format jpg"), ("a.json", "CVAT's 'Segmentation mask'"), ("a.txt", "polygons or a list"),
    ("a.nii.gz", "a volume; write each slice"), ("a.dcm", "a volume"), ("a.h5", "a volume"), ("a.mp4", "ffmpeg -i"),
    ("a.mpg", "ffmpeg -i"),
])  # fmt: skip
def test_files_that_are_no_images_are_counted_with_what_converts_the_first_known_one(name, says):
    said = own_images.left_out(map(Path, ("photo.jpg", "a.odt", name, "mask.PNG ")))
    assert said.startswith(f"2 files are skipped because they are not images, first {name}: ") and says in said
    assert own_images.left_out([Path("photo.jpg")]) == ""


def test_the_summary_names_folders_what_is_not_read_and_what_is_odd(tmp_path, capsys):
    root = mine(tmp_path / "mine")
    for kind in ("images", "masks"):
        (root / kind / "trip").mkdir()
    (root / "images" / "photo 0.jpg").rename(root / "images" / "trip" / "photo 0.jpg")
    (root / "masks" / "photo 0.png").rename(root / "masks" / "trip" / "photo 0.png")
    for folder in ("valid/images", "unlabeled", "notes", "masks-painted"):
        (root / folder).mkdir(parents=True)
        Image.new("RGB", (9, 9)).save(root / folder / ("a.odt" if folder == "notes" else "a.png"), "PNG")
    Image.new("RGBA", (64, 48)).save(root / "images" / "photo 6.png")
    change_masks(root, lambda m, i: np.where(m < 2, 255, i % 3).astype(np.uint8))
    call(root)
    said = capsys.readouterr().out
    for folder in ("unlabeled", "valid"):
        assert f"{root / folder} (1 images) is not read; expected images in images/, validation images" in said
    assert "notes (" not in said and "masks-painted (" not in said
    assert "images by folder: . 7, trip 1" in said and "1 images have transparent pixels; they" in said
    assert "pixels of 255 are never learned; give the background a class of its own" in said


def test_validation_images_come_from_a_list_or_from_val(tmp_path, capsys, monkeypatch):
    root, chosen = mine(tmp_path / "mine"), tmp_path / "chosen.txt"
    call(root)
    for listed, says in (
        ("photo 7", "validation image photo 7 lacks image or mask; expected both, as photo 0 has"),
        ("nobody", "validation image nobody lacks image or mask"),
        ("\n".join(f"photo {i}" for i in range(6)), "all masks are validation masks .*; expected some for training"),
    ):
        chosen.write_text(listed)
        refused(says, root, "--val", chosen)
    chosen.write_text("images\\photo 0.jpg\nimages/photo 3.png masks/photo 3.png\n")
    call(root, "--val", chosen)
    assert f"2 for validation: those of {chosen}" in capsys.readouterr().out
    assert (root / "val.txt").read_text() == "photo 0\nphoto 3\n"
    root, table = trees.folder(tmp_path / "other"), tmp_path / "classes.csv"
    for place in (root, root / "val"):
        change_masks(place, lambda m, _: palette()[m + 1])
    table.write_text("class 0,0,128,0\nignore,128,0,0\nclass 2,128,128,0\n")

    def save_outside_val(mask, path):
        if path.is_relative_to(root / "val"):
            raise OSError(28, "No space left on device")
        save_mask(mask, path)

    with monkeypatch.context() as patch:
        patch.setattr(own_images, "save_mask", save_outside_val)
        refused("other cannot be written to .*No space left", root, "--colors", table)
    call(root, "--colors", table)  # goes on with val/
    assert "2 for validation: those of val/" in capsys.readouterr().out and not (root / "val.txt").exists()
    for place in (root, root / "val"):
        assert all(set(np.unique(mask)) == {0, 2, 255} for mask in masks_of(place).values())
        assert len([*(place / "masks-painted").iterdir()]) == len([*(place / "masks").iterdir()]) > 0
    refused("both name validation images; expected one; move val away", root, "--val", chosen)
    (root / "val" / "masks" / "photo 1.png").unlink()
    refused("validation image val/photo 1 lacks image or mask", root)


@pytest.mark.parametrize("orientation, stored, size, says", [
    (6, (48, 64), (64, 48), ""), (6, (48, 64), (48, 64), "expected the same size; if an EXIF tag turns"),
    (3, (64, 48), (64, 48), "1 images are turned by an EXIF tag"), (6, (48, 48), (48, 48), "1 images are turned"),
])  # fmt: skip
def test_a_mask_that_may_lie_beside_a_turned_photograph_is_said(tmp_path, capsys, orientation, stored, size, says):
    root, exif = mine(tmp_path / "mine"), Image.Exif()
    exif[0x0112] = orientation
    Image.new("RGB", stored).save(root / "images" / "photo 0.jpg", exif=exif)
    save_mask(np.resize([0, 1, 2], size[::-1]).astype(np.uint8), root / "masks" / "photo 0.png")
    refused("1 annotated images cannot be used", root) if "size" in says else call(root)
    said = "".join(capsys.readouterr())
    assert says in said and ("EXIF" in said) == bool(says)


def test_smaller_copies_hold_the_same_lists_and_masks_of_the_same_values(tmp_path, capsys, monkeypatch):
    root, small = mine(tmp_path / "mine", size=(1600, 40)), tmp_path / "mine-64"
    (root / "classes.txt").write_text("soil\nwheat\nweed\n")
    (root / "val.txt").write_text("photo 2\n")
    call(root)
    assert f"train on smaller copies: python tools/own_images.py {root} --shrink 512," in capsys.readouterr().out
    monkeypatch.chdir(root)
    call(".", "--shrink", 64)
    command = f"python train.py --dataset folder --root {small} --crop 32 --out runs/mine-64"
    assert capsys.readouterr().out.splitlines()[-1] == command
    data = open_dataset("folder", small, "all")
    image, mask = read(data.labeled[0], data)
    assert data.classes == ("soil", "wheat", "weed") and [item.id for item in data.val] == ["photo 2"]
    assert (len(data.labeled), len(data.unlabeled), image.size, {*np.unique(mask)}) == (5, 2, (64, 2), {0, 1, 2})
    refused("mine-64 already exists; expected a new folder", root, "--shrink", 64)


def test_a_folder_that_cannot_be_written_to_gets_the_report_and_a_way_out_that_works(tmp_path, capsys, monkeypatch):
    root = mine(tmp_path / "mine")

    def read_only(path, *args):
        raise OSError(30, "Read-only file system", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", read_only)
        sentence = refused(r"mine cannot be written to .*Read-only.*; make a folder of links and use it: ", root)
    assert "2 class 2" in capsys.readouterr().out
    (away := tmp_path / "away").mkdir()
    subprocess.run(["bash", "-c", sentence.rpartition("use it: ")[2]], cwd=away, check=True)
    call(away / "mine")
    assert (away / "mine" / "val.txt").is_file() and not (root / "val.txt").exists()


def test_as_a_script_it_prints_no_warning_of_pillow(tmp_path):
    root = mine(tmp_path / "mine")
    image = Image.open(root / "images" / "photo 0.jpg").quantize(8)
    image.save(root / "images" / "photo 1.png", transparency=bytes([0, 128, 255]))
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (64, 48)).save(root / "images" / "photo 5.jpg", exif=exif.tobytes()[:-9])
    script = Path(own_images.__file__)
    done = subprocess.run([sys.executable, script, root], capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == "" and "python train.py" in done.stdout
