"""The scripts of tools/: fetching and checking datasets, a folder of one's own, masks for new images, reports."""

import hashlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import torch
import trees
from PIL import Image, ImageFilter
from torchvision.datasets import SBDataset
from torchvision.datasets.voc import DATASET_YEAR_DICT

import data as D
import evaluate as E
import train as T
from data import InputError, open_dataset, palette, read, save_mask
from model import load_checkpoint, load_network
from refine import confidence, pseudo_labels, refine
from tools import own_images, predict, prepare, report

TOOLS = Path(__file__).parent.parent / "tools"


def call(tool, *words):
    """A tool in this process, with the words of its command line."""
    tool.main(tool.parse_args(list(map(str, words))))


def refused(says, tool, *words):
    """The sentence with which a tool ends, which has to match."""
    with pytest.raises(InputError, match=says) as error:
        call(tool, *words)
    return str(error.value)


def pixels(path):
    with Image.open(path) as image:
        return np.array(image)


def names_below(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.*"))


def test_every_tool_starts_from_any_folder(tmp_path):
    for tool in TOOLS.glob("*.py"):
        said = subprocess.check_output([sys.executable, tool, "--help"], cwd=tmp_path, text=True)
        assert f"python tools/{tool.name}" in said


# prepare.py


@pytest.fixture
def voc(tmp_path, monkeypatch):
    """A tiny VOC 2012 behind the address that torchvision knows; returns the archive."""
    tree = trees.pascal(tmp_path / "there" / "VOCdevkit" / "VOC2012", tmp_path / "splits")
    shutil.rmtree(tree / "SegmentationClassAug")
    (tree / "ImageSets" / "Segmentation").mkdir(parents=True)
    (tree / "ImageSets" / "Segmentation" / "train.txt").write_text("2007_000000\n")
    tar = Path(shutil.make_archive(str(tmp_path / "VOC"), "tar", tmp_path / "there"))
    facts = {"url": tar.as_uri(), "filename": tar.name, "md5": hashlib.md5(tar.read_bytes()).hexdigest()}
    monkeypatch.setitem(DATASET_YEAR_DICT, "2012", facts | {"base_dir": "VOCdevkit/VOC2012"})
    monkeypatch.setattr("torchvision.datasets.utils._urlretrieve", urllib.request.urlretrieve)  # that of files, too
    monkeypatch.setattr(prepare, "SPLITS", tmp_path / "splits")
    return tar


def test_pascal_is_downloaded_once_mended_where_files_are_gone_and_what_fails_is_one_sentence(tmp_path, voc, capsys):
    tar, root, good = voc, tmp_path / "root", voc.read_bytes()
    words = ["pascal", "--root", root]
    for content, reason in ((b"something else", "corrupted"), (None, "No such file")):
        tar.unlink() if content is None else tar.write_bytes(content)
        refused(rf"the download to .*root failed \(.*{reason}.*\); run the same command", prepare, *words)
    tar.write_bytes(good)
    call(prepare, *words)
    assert f"complete: {root / 'VOCdevkit' / 'VOC2012'}" in capsys.readouterr().out
    assert len(open_dataset("pascal", root, 2, tmp_path / "splits").labeled) == 2
    tar.unlink()
    (root / "VOCdevkit" / "VOC2012" / "SegmentationClass" / "2009_000001.png").unlink()
    call(prepare, *words)  # unpacks the archive that is there
    (root / "VOC.tar").rename(root / "away.tar")
    call(prepare, *words)  # needs nothing
    (root / "away.tar").rename(root / "VOC.tar")
    (tmp_path / "splits" / "pascal" / "val.txt").write_text("2009_000001\n2009_000009\n")
    refused("lacks files of 1 images, first 2009_000009; remove it and start again", prepare, *words)


def test_the_coarse_masks_are_converted_once_from_sbd_s_matlab_files(tmp_path, voc, monkeypatch):
    scipy_io = pytest.importorskip("scipy.io", reason="--sbd needs scipy, which is optional")
    matlab, words = tmp_path / "sbd/benchmark_RELEASE/dataset/cls", ["pascal", "--root", tmp_path / "root", "--sbd"]
    matlab.mkdir(parents=True)
    masks = np.random.default_rng(0).integers(0, 21, (2, 55, 97)).astype(np.uint8)
    for i in range(2):
        scipy_io.savemat(matlab / f"2008_00000{i + 1}.mat", {"GTcls": {"Segmentation": masks[i]}})
    packed = Path(shutil.make_archive(str(tmp_path / "benchmark"), "gztar", tmp_path / "sbd"))
    monkeypatch.setattr(SBDataset, "md5", hashlib.md5(packed.read_bytes()).hexdigest())
    monkeypatch.setattr(SBDataset, "url", packed.as_uri())
    call(prepare, *words)
    folder = tmp_path / "root" / "VOCdevkit" / "VOC2012" / "SegmentationClassAug"
    assert all(np.array_equal(pixels(folder / f"2008_00000{i + 1}.png"), masks[i]) for i in range(2))
    packed.unlink()
    (tmp_path / "root" / packed.name).unlink()
    call(prepare, *words)  # needs nothing
    monkeypatch.setitem(sys.modules, "scipy.io", None)
    refused("--sbd reads MATLAB files, and scipy is not installed; pip install scipy", prepare, *words)


def test_cityscapes_says_what_to_download_and_what_is_there(tmp_path, monkeypatch, capsys):
    trees.cityscapes(tmp_path / "cityscapes", tmp_path / "splits")
    monkeypatch.setattr(prepare, "SPLITS", tmp_path / "splits")
    (tmp_path / "cityscapes/gtFine/val/lindau/lindau_000000_000019_gtFine_labelIds.png").unlink()
    call(prepare, "cityscapes", "--root", tmp_path)
    assert f"241 MB), unpack both into {tmp_path / 'cityscapes'}" in (said := capsys.readouterr().out)
    assert "train: 4 images and 4 masks of 4" in said and "val: 2 images and 1 masks of 2" in said


def test_check_counts_every_pixel_and_names_everything_that_is_wrong_at_once(tmp_path, capsys):
    root, splits = trees.pascal(tmp_path / "root", tmp_path / "splits"), tmp_path / "splits"
    words = ["check", "--dataset", "pascal", "--root", root, "--labeled", 7, "--splits", splits]
    (root / "SegmentationClassAug" / "2008_000002.png").unlink()  # unlabeled, not needed
    call(prepare, *words)
    said, data = capsys.readouterr().out, open_dataset("pascal", root, 7, splits)
    assert "labeled: 7 images, 7 masks" in said and "unlabeled: 1 images, 0 masks (none needed)" in said
    assert "nothing is missing, nothing is broken" in said and "61 x 83 (1)" in said
    masks = [np.asarray(read(item, data)[1]).ravel() for item in data.labeled + data.val]
    for value, name in ((0, "background"), (1, "aeroplane"), (255, "ignored")):
        assert f"{value:4} {name:20} {np.mean(np.concatenate(masks) == value):7.2%} of the mask pixels" in said
    (root / "JPEGImages" / "2007_000000.jpg").unlink()
    (root / "JPEGImages" / "2007_000001.jpg").write_bytes(b"no image")
    (root / "SegmentationClass" / "2007_000002.png").unlink()
    save_mask(np.full((71, 79), 77, np.uint8), root / "SegmentationClass" / "2007_000003.png")
    refused("4 files are missing or broken, each is named above", prepare, *words)
    assert len((said := capsys.readouterr().err).splitlines()) == 4
    assert "image 2007_000000 is missing" in said and "2007_000001.jpg could not be read" in said
    assert "mask of the labeled image 2007_000002 is missing" in said and "holds the value 77" in said
    Image.new("L", (3, 3)).save(trees.camvid(tmp_path / "camvid", test=2) / "testannot" / "test0.png")
    refused("1 files are missing", prepare, "check", "--dataset", "camvid", "--root", tmp_path, "--labeled", 2)
    assert "has (3, 3) pixels, its image (64, 48)" in capsys.readouterr().err


# own_images.py


def mine(root, images=8, annotated=6, **options):
    """A folder of one's own as a user puts it there: images/ and masks/, nothing else."""
    trees.folder(root, images, annotated, **options)
    shutil.rmtree(root / "val")
    (root / "classes.txt").unlink()
    return root


def change_masks(root, change, suffix=".png"):
    """Every mask becomes change(mask, its number), an image or an array, in a file with the suffix."""
    for number, path in enumerate(sorted((root / "masks").rglob("*.png"))):
        changed = change(pixels(path), number)
        path.unlink()
        (Image.fromarray(changed) if isinstance(changed, np.ndarray) else changed).save(path.with_suffix(suffix))


def masks_of(root):
    return {path.stem: pixels(path) for path in sorted((root / "masks").rglob("*.*"))}


def test_masks_of_indices_get_names_every_fifth_validates_and_the_printed_command_fits(tmp_path, capsys):
    root = mine(tmp_path / "my data", images=14, annotated=11)
    save_mask(np.full((48, 64), 255, np.uint8), root / "masks" / "photo 4.png")  # cannot validate
    call(own_images, root)
    said, useful = capsys.readouterr().out.splitlines(), sorted(f"photo {i}" for i in range(11) if i != 4)
    assert (root / "val.txt").read_text().splitlines() == useful[4::5]
    assert (root / "classes.txt").read_text() == "class 0\nclass 1\nclass 2\n"
    assert "14 images, 11 of them annotated; 2 for validation" in said[0] and "typically 48 pixels" in said[0]
    masks = np.stack([mask for id, mask in masks_of(root).items() if id in useful])
    shares = [f"{np.mean(masks == c):7.2%} of the annotated pixels" for c in range(3)]
    assert said[1:-1] == [f"{c:4} class {c}              {share}" for c, share in enumerate(shares)]
    assert (words := shlex.split(said[-1]))[:2] == ["python", "train.py"]
    args = T.parse_args(words[2:])
    assert (args.dataset, args.root, args.crop, args.framework) == ("folder", str(root), 32, None)
    data = open_dataset(args.dataset, args.root, "all")
    assert [item.id for item in data.labeled] == sorted({*useful, "photo 4"} - {*useful[4::5]})
    assert [item.id for item in data.unlabeled] == [f"photo {i}" for i in (11, 12, 13)]


def test_a_crop_is_named_only_for_images_smaller_than_the_preset(tmp_path, capsys, monkeypatch):
    crops = {(128, 300): "", (127, 200): " --crop 96", (20, 20): " --crop 32", (400, 300): " --crop 288"}
    for size, crop in crops.items():
        monkeypatch.setattr(torch.cuda, "is_available", lambda: size == (400, 300))
        call(own_images, root := mine(tmp_path / str(size), images=2, annotated=2, size=size))  # all are annotated
        words = ["python", "train.py", "--dataset", "folder", "--root", str(root), *crop.split()]
        assert shlex.split(capsys.readouterr().out.splitlines()[-1]) == [*words, "--framework", "supervised"]
        assert (root / "val.txt").read_text() == "photo 1\n"


BLUR = ImageFilter.GaussianBlur(0.7)
COLORS = {(0, 0, 0, 255): 0, (128, 64, 128, 255): 1}
NODATA = (np.nan, np.inf, -3.4e38)
OTHER_MASKS = {  # a change, a suffix, the class of each index
    "0 and 255": (lambda m, _: (m > 0).astype(np.uint8) * 255, ".png", [0, 1, 1]),
    "grays and 255": (lambda m, _: np.array([255, 100, 200], np.uint8)[m], ".png", [255, 0, 1]),
    "two values": (lambda m, _: m > 0, ".png", [0, 1, 1]),
    "16 bits": (lambda m, _: m.astype(np.uint16) * 300, ".png", [0, 1, 2]),
    "32 bits": (lambda m, _: np.array([-9999, 70000, 5], np.int32)[m], ".tif", [255, 1, 0]),
    "float": (lambda m, i: np.array([NODATA[i % 3], 0.25, 7], np.float32)[m], ".tif", [255, 0, 1]),
    "colors": (lambda m, _: palette()[m + 3], ".png", [2, 0, 1]),
    "transparent": (lambda m, i: np.array([[i, 9, 9, 0], [0, 0, 0, 255], [255] * 4], np.uint8)[m], ".png", [0, 1, 2]),
    "palettes that differ": (lambda m, i: Image.fromarray(palette()[m]).quantize(3).remap_palette(
        np.roll([0, 1, 2], i).tolist()), ".png", [0, 2, 1]),  # one color has another index in each file
    "indices in TIFF": (lambda m, _: m, ".tif", [0, 1, 2]),
    "soft colors": (lambda m, _: Image.fromarray(palette()[m]).filter(BLUR), ".png", [0, 2, 1]),
    "soft grays in JPEG": (lambda m, _: Image.fromarray(m * np.uint8(120)).filter(BLUR), ".jpg", [0, 1, 2]),
    "soft indices": (lambda m, _: Image.fromarray(np.array([0, 7, 3], np.uint8)[m]).filter(BLUR), ".png", [0, 2, 1]),
}  # fmt: skip


@pytest.mark.parametrize("name", OTHER_MASKS)
def test_other_masks_are_listed_as_csv_lines_with_which_the_printed_command_converts_them(tmp_path, capsys, name):
    (change, suffix, expected), root = OTHER_MASKS[name], mine(tmp_path / "mine")
    before = masks_of(root)
    change_masks(root, change, suffix)
    said = refused("expected PNG files of class indices from 0 on; write the lines", own_images, root)
    assert not [*root.glob("*.txt")]
    assert ("blended at edges, as by JPEG or a soft brush" in said) == name.startswith("soft")
    assert ("their palettes differ" in said) == name.startswith("palettes")
    (tmp_path / "classes.csv").write_text(capsys.readouterr().out)
    words = shlex.split(said.rpartition(": ")[2])
    assert words == ["python", "tools/own_images.py", str(root), "--colors", "classes.csv"]
    call(own_images, root, "--colors", tmp_path / "classes.csv")
    for id, mask in masks_of(root).items():
        right = np.array(expected)[before[id]]
        assert np.array_equal(mask, right) or name.startswith("soft") and (mask == right).mean() > 0.7
        assert set(np.unique(mask[mask != right])) <= {255}  # soft edges are ignored
    assert names_below(root / "masks-painted") == [f"{id}{suffix}" for id in before]
    assert len(open_dataset("folder", root, "all").classes) == len({*expected} - {255})
    call(own_images, root)  # ready now


def test_a_table_names_the_classes_and_what_to_ignore_in_val_too(tmp_path, capsys):
    root, table = trees.folder(tmp_path / "mine"), tmp_path / "classes.csv"
    (root / "classes.txt").unlink()
    for place in (root, root / "val"):
        change_masks(place, lambda m, _: palette()[m + 1])
    save_mask(np.zeros((1, 1), np.uint8), root / "masks.tmp" / "photo 9.png")  # a conversion was killed
    rows = [",".join(map(str, palette()[c + 1])) for c in range(3)]
    table.write_text(f"wheat, {rows[1]}\nignore,{rows[0]}\nwheat,{rows[2]}\nsoil,7,7,7\n")
    call(own_images, root, "--colors", table)
    assert (root / "classes.txt").read_text() == "wheat\nsoil\n" and not (root / "val.txt").exists()
    for place in (root, root / "val"):
        assert all(set(np.unique(mask)) == {0, 255} for mask in masks_of(place).values())
        assert len(names_below(place / "masks-painted")) == len(names_below(place / "masks")) > 0
    assert "2 for validation" in (said := capsys.readouterr().out) and "0 wheat                100.00% of the" in said


@pytest.mark.parametrize("text, names, says", [
    ("soil,1\nwheat,2\n", "", "mask .*photo 1.png holds 3, which .*classes.csv does not; add lines for them"),
    ("soil,1\nsoil,2\nignore,3\n", "", "expected 2 to 254 different names"),
    ("soil,1\nwheat,2\nweed,3\n", "soil\nmaize\n", "classes.txt and .*classes.csv name other classes; make them the"),
    ("soil,1\nwheat,2\nweed,3\n", None, "masks-painted is there from an earlier conversion; move it away first"),
    ("soil,0\nwheat,1,2,3\n", "", "holds 'wheat,1,2,3'; expected lines name,r,g,b or lines name,value, one per class"),
    ("", "", "holds ''"), (",1\n", "", "holds ',1'"), ("soil,1,2,300\n", "", "holds 'soil,1,2,300'"),
    ("soil,1.2.3\n", "", "holds 'soil,1.2.3'"),
    ("soil,1\nwheat,1\n", "", "names 1 twice; expected one class for it"), (None, "", "classes.csv is not there; "),
])  # fmt: skip
def test_a_conversion_that_cannot_end_well_gets_a_sentence_and_changes_nothing(tmp_path, text, names, says):
    root, table = mine(tmp_path / "mine"), tmp_path / "classes.csv"
    change_masks(root, lambda m, i: np.minimum(m + 1, 3 if i else 2).astype(np.uint8))  # the first has no 3
    (root / "masks-painted").mkdir() if names is None else (root / "classes.txt").write_text(names) if names else None
    table.write_text(text) if text is not None else None
    before = {path: path.is_file() and path.read_bytes() for path in root.rglob("*")}
    refused(says, own_images, root, "--colors", table)
    assert {path: path.is_file() and path.read_bytes() for path in root.rglob("*")} == before


@pytest.mark.parametrize("text, table", [
    ("Void,0,0,0\n\n  \n,,,\nStraße,128,64,128\n", COLORS), ("Void;0;0;0\nStraße;128;64;128\n", COLORS),
    ("name,r,g,b,class_11\nVoid,0,0,0,0\nStraße,128,64,128,1\n", COLORS),
    ("0 0 0\tVoid\n128 64 128\tStraße\n", COLORS), ("Void,0,0,0,\n\"Straße\",128,64,128,\n", COLORS),
    ("# label:color_rgb:parts:actions\nVoid:0,0,0::\nStraße:128,64,128::\n", COLORS),
    ("name,value\nVoid,-9999\nignore,nan\nStraße,2.5\n", {(-9999,): 0, (own_images.NAN,): 255, (2.5,): 1}),
    ("ignore,7,7,7,0\nVoid,0,0,0\nStraße,1,2,3,128\n", {(0,) * 4: 255, (0, 0, 0, 255): 0, (1, 2, 3, 128): 1}),
])  # fmt: skip
def test_tables_of_other_tools_and_encodings_are_read(tmp_path, text, table):
    for encoding in ("utf-8-sig", "latin-1", "utf-16"):
        (tmp_path / "classes.csv").write_bytes(text.encode(encoding))
        assert own_images.read_table(tmp_path / "classes.csv") == (table, ["Void", "Straße"])


def test_mistakes_in_a_folder_get_a_sentence(tmp_path, capsys):
    refused("lacks images/ or masks/; expected both", own_images, tmp_path)
    refused("has 1 annotated images; expected two, to learn", own_images, mine(tmp_path / "one", annotated=1))
    root = mine(tmp_path / "mine")
    change_masks(root, lambda m, _: (m > 0).astype(np.uint8), ".jpg")
    refused(r"and JPEG has changed some \(what nobody drew is to have the name ignore\)", own_images, root)
    (mine(root := tmp_path / "two") / "classes.txt").write_text("soil\ncrack\n")
    change_masks(root, lambda m, _: (m > 0).astype(np.uint8) * 255)
    capsys.readouterr()
    refused("hold the values 0; 255, and .*classes.txt names 2 classes; expected PNG", own_images, root)
    assert capsys.readouterr().out == "soil,0\ncrack,255\n"
    (root / "classes.txt").unlink()
    change_masks(root, lambda m, i: np.random.default_rng(i).integers(0, 256, (48, 64, 3)).astype(np.uint8))  # no masks
    refused(r"hold 1\d+ colors, none of them in areas; expected 2 to 254 classes, each in areas", own_images, root)
    (tmp_path / "classes.csv").write_text("soil,0\ncrack,1\n")
    refused("6 files cannot be used", own_images, root, "--colors", tmp_path / "classes.csv")
    assert capsys.readouterr().err.count("is a RGB image; expected lines name,r,g,b for its colors") == 6
    change_masks(root, lambda m, _: m[..., 0] * 0)
    refused("hold the values 0; expected 2 to 254 classes", own_images, root)
    (root / "masks" / "photo 0.png").rename(root / "masks" / "photo 0_mask.png")
    refused("1 masks belong to no image, first .*photo 0_mask.png; rename or remove them", own_images, root)
    (root / "masks" / "photo 1.png").rename(root / "masks" / "photo 1.npy")
    refused("an array: Image.fromarray", own_images, root)  # before anything is to be removed


def test_all_files_that_cannot_be_used_are_named_at_once_and_unlabeled_ones_stop_nothing(tmp_path, capsys):
    root = mine(tmp_path / "mine")
    images, whole = root / "images", (root / "images" / "photo 0.jpg").read_bytes()
    (images / "notes.odt").write_text("x")
    (images / "photo 6.png").write_bytes(whole[:-100])  # its header is whole
    (images / "photo 9.jpg").symlink_to("nowhere.jpg")
    Image.fromarray(np.zeros((48, 64), np.uint16)).save(images / "photo 7.bmp", "PNG")
    call(own_images, root)
    said = capsys.readouterr().err
    assert "1 files are left out, for their suffix is no image's, first" in said and "notes.odt" in said
    assert "photo 6.png could not be read (image file is truncated" in said and "training goes on without it" in said
    assert "photo 7.bmp is a I;16 image; convert it" in said and "photo 9.jpg could not be read ([Errno 2]" in said
    (images / "photo 0.jpg").write_bytes(whole[:-100])
    (root / "masks" / "photo 1.png").write_bytes(b"broken")
    Image.new("L", (48, 64)).save(root / "masks" / "photo 2.png")
    refused("6 files cannot be used, each is named above; replace or remove them", own_images, root)
    said = capsys.readouterr().err
    assert all(f"photo {name} could not be read" in said for name in ("0.jpg", "1.png", "6.png"))
    assert "photo 2.png has (48, 64) pixels, its image (64, 48); expected the same size" in said


def test_folders_in_folders_links_hidden_files_unicode_forms_and_lists_that_are_there_fit(tmp_path, capsys):
    root = mine(tmp_path / "mine")
    (root / "images" / "._photo 0.jpg").write_bytes(b"\0")
    (root / "images" / "circle").symlink_to(root / "images")
    for kind, name in (("images", "e\u0301 .jpg"), ("masks", "\u00e9 .png ")):  # two forms of one letter, and spaces
        (root / kind).rename(tmp_path / kind)
        (root / kind).mkdir()
        (tmp_path / kind / f"photo 0{name.strip()[-4:]}").rename(root / kind / name)
        (root / kind / "trip").symlink_to(tmp_path / kind)
    (root / "val.txt").write_text(listed := "trip/photo 1\ne\u0301 .jpg\n")
    (root / "classes.txt").write_bytes("soil\nStraße\nweed\nnever annotated\n".encode("latin-1"))
    call(own_images, root)
    said, data = capsys.readouterr(), open_dataset("folder", root, "all")
    assert "8 images, 6 of them annotated; 2 for validation" in said.out and not said.err
    assert "3 never annotated        0.00%" in said.out and "1 Straße" in said.out
    assert {item.id for item in data.val} == {"trip/photo 1", "\u00e9 "} and (root / "val.txt").read_text() == listed


@pytest.mark.parametrize("orientation, stored, size, says", [
    (6, (48, 64), (64, 48), ""), (6, (48, 64), (48, 64), "lies as stored, its image is turned"),
    (3, (64, 48), (64, 48), "1 images are turned by an EXIF tag"), (6, (48, 48), (48, 48), "1 images are turned"),
])  # fmt: skip
def test_a_mask_that_may_lie_beside_a_turned_photograph_is_said(tmp_path, capsys, orientation, stored, size, says):
    root, exif = mine(tmp_path / "mine"), Image.Exif()
    exif[0x0112] = orientation
    Image.new("RGB", stored).save(root / "images" / "photo 0.jpg", exif=exif)
    save_mask(np.resize([0, 1, 2], size[::-1]).astype(np.uint8), root / "masks" / "photo 0.png")
    refused("1 files cannot be used", own_images, root) if "lies" in says else call(own_images, root)
    said = capsys.readouterr().err
    assert says in said and bool(says) == bool(said)


def test_smaller_copies_hold_the_same_lists_and_masks_of_the_same_values(tmp_path, capsys, monkeypatch):
    root, small = mine(tmp_path / "mine", size=(1600, 40)), tmp_path / "mine-64"
    call(own_images, root)
    assert f"train on smaller copies: python tools/own_images.py {root} --shrink 512;" in capsys.readouterr().err
    (root / "classes.txt").write_text("soil\nwheat\nweed\n")
    (root / "val.txt").write_text("photo 2\n")
    monkeypatch.chdir(root)
    call(own_images, ".", "--shrink", 64)
    assert f"--root {small}" in capsys.readouterr().out
    data = open_dataset("folder", small, "all")
    image, mask = read(data.labeled[0], data)
    assert data.classes == ("soil", "wheat", "weed") and [item.id for item in data.val] == ["photo 2"]
    assert (len(data.labeled), len(data.unlabeled), image.size, {*np.unique(mask)}) == (5, 2, (64, 2), {0, 1, 2})
    refused("mine-64 is there already", own_images, root, "--shrink", 64)


# predict.py


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a run of two steps on a folder of one's own whose unlabeled images have masks, too."""
    tmp_path = tmp_path_factory.mktemp("run")
    root = trees.folder(tmp_path / "data", images=6, annotated=6)
    options = "--dataset folder --labeled 2 --backbone resnet10 --weights none --crop 32 --batch-size 2 --iters 2"
    options += " --framework fixmatch --floor 0 --device cpu --warmup-iters 0 --workers 0 --log-every 1 --lr 0.01"
    options += " --head-lr 0.01"
    with pytest.MonkeyPatch.context() as patch:  # pytest keeps its signal handlers
        patch.setattr(signal, "signal", lambda *_: None)
        T.main(T.parse_args([*options.split(), "--root", str(root), "--out", str(tmp_path / "run")]))
    return tmp_path / "run"


@pytest.fixture
def new(tmp_path):
    """Images to predict, in two folders and several formats, with a file that is none."""
    images = trees.folder(tmp_path / "new", images=5, annotated=0, size=(70, 51)).joinpath("images")
    (images / "trip").mkdir()
    (images / "photo 1.png").rename(images / "trip" / "photo 1.png")
    (images / "readme.txt").write_text("x")
    return images


def probabilities(checkpoint, path, protocol=E.Protocol(), size=None):
    image = D.VF.pil_to_tensor(D.open_image(path, "RGB"))[None]
    network = load_network(load_checkpoint(checkpoint)).to(memory_format=torch.channels_last)
    # the tool's layout, which rounds otherwise
    return E.predict(network, D.VF.resize(image, size) if size else image, protocol)


def test_outputs_come_from_the_checkpoint_alone_for_a_folder_one_image_and_a_smaller_copy(tmp_path, run, new, capsys):
    checkpoint, out = shutil.copy(run / "last.pth", tmp_path / "elsewhere.pth"), tmp_path / "out"
    words = [checkpoint, "--images", new, "--device", "cpu", "--masks"]
    call(predict, *words, out, "--confidence", "--probabilities")
    assert "5 masks written to" in (said := capsys.readouterr().out) and "0 class 0, 1 class 1, 2 class 2" in said
    assert "1 files are left out, for their suffix is no image's, first" in said and "readme.txt" in said
    call(predict, *words, tmp_path / "labels", "--pseudo-labels", "--workers", 1)
    assert "255 no label" in capsys.readouterr().out
    call(predict, *words, tmp_path / "fixed", "--pseudo-labels", "--threshold", 0.03)
    saved, ids = load_checkpoint(checkpoint), ["photo 0", "photo 2", "photo 3", "photo 4", "trip/photo 1"]
    options = E.label_options(saved["args"], saved["prior"])
    for kind, suffix in (("", "png"), ("-overlays", "png"), ("-confidence", "png"), ("-probabilities", "npz")):
        assert names_below(tmp_path / f"out{kind}") == [f"{id}.{suffix}" for id in ids]
    for id, path in D.files(new).items():
        prob, mask = probabilities(checkpoint, path), Image.open(out / f"{id}.png")
        image, label = D.VF.pil_to_tensor(D.open_image(path, "RGB")), prob.argmax(1)[0]
        own = pseudo_labels(prob, saved["args"]["alpha0"], **options).label[0].numpy()  # the quantile of one image
        expected = {
            "out": label, "labels": own, "out-confidence": (255 * confidence(prob)[0]).round(),
            "fixed": pseudo_labels(prob, None, **options | {"threshold": 0.03}).label[0],
            "out-overlays": E.overlay(image, label, dim=1, opacity=0.5).permute(1, 2, 0),
        }  # fmt: skip
        assert all(np.array_equal(pixels(tmp_path / kind / f"{id}.png"), array) for kind, array in expected.items())
        assert mask.mode == "P" and mask.getpalette()[:9] == palette()[:3].ravel().tolist()
        assert 0.01 < (own == 255).mean() <= 0.42
        with np.load(tmp_path / "out-probabilities" / f"{id}.npz") as said:
            assert said["prob"].dtype == np.float16 and said["classes"].tolist() == saved["classes"]
            np.testing.assert_array_equal(said["prob"], prob[0].half())
    call(predict, *words, tmp_path / "one", "--images", new / "photo 2.bmp", "--shrink", 35)
    small = probabilities(checkpoint, new / "photo 2.bmp", size=[26, 35])  # of 51 x 70
    prob = torch.nn.functional.interpolate(small, (51, 70), mode="bilinear")
    assert names_below(tmp_path / "one") == ["photo 2.png"]
    assert np.array_equal(pixels(tmp_path / "one" / "photo 2.png"), prob.argmax(1)[0])


@pytest.mark.parametrize("words, large, small", [
    ("", ("sliding", 64, False), ("original", 64, False)),
    ("--eval-mode original --refine", ("original", 32, False), ("original", 32, False)),
    ("--eval-mode sliding --tta", ("sliding", 32, True), ("sliding", 32, True)),
])  # fmt: skip
def test_large_images_are_predicted_in_windows_unless_told_otherwise(tmp_path, run, monkeypatch, words, large, small):
    seen, plain, checkpoint = [], E.predict, run / "last.pth"
    monkeypatch.setattr(predict, "predict", lambda *given: seen.append(given[2]) or plain(*given))
    monkeypatch.setattr(predict, "LARGE", 64)
    (wide := tmp_path / "wide").mkdir()
    for name, width in (("large", 100), ("small", 64)):
        Image.new("RGB", (width, 40), (200, 30, 90)).save(wide / f"{name}.png")
    call(predict, checkpoint, "--images", wide, "--device", "cpu", "--masks", tmp_path / "out", *words.split())
    assert [(one.eval_mode, one.crop, one.tta) for one in seen] == [large, small]
    assert seen[0].refine == (E.refinement_options(load_checkpoint(checkpoint)["args"]) if "refine" in words else None)
    for name, protocol in zip(("large", "small"), seen):
        prob = probabilities(checkpoint, wide / f"{name}.png", protocol)
        assert np.array_equal(pixels(tmp_path / "out" / f"{name}.png"), prob.argmax(1)[0])


def test_what_is_there_stays_and_what_cannot_be_read_or_written_is_named(tmp_path, run, new, capsys):
    out, long = tmp_path / "out", "x" * 250  # with .png.tmp no name of a file
    out.mkdir()
    (out / "photo 0.png").write_bytes(b"corrected by hand")
    (new / "photo 2.bmp").write_bytes(b"BM broken")
    for name in (long, "photo 4"):
        Image.new("RGB", (40, 40)).save(new / f"{name}.png")
    words = [run / "last.pth", "--images", new, "--masks", out, "--device", "cpu"]
    refused("2 images have no mask, for the reasons named above", predict, *words)
    said = capsys.readouterr()
    assert "photo 2.bmp could not be read" in said.err and f"{long}.png has no mask: [Errno 36] File name" in said.err
    assert "1 masks were in" in said.out and "4 masks written" in said.out
    assert (out / "photo 0.png").read_bytes() == b"corrected by hand"
    two = ["photo 4.png.png", "photo 4.webp.png"]  # of one stem
    assert names_below(out) == ["photo 0.png", "photo 3.png", *two, "trip/photo 1.png"]
    for inside in (new, new / ".." / new.name / "masks"):
        refused("lies in --images .*; use another folder", predict, *words, "--masks", inside)
    refused("holds no image; expected one, or a folder with images", predict, *words, "--images", tmp_path / "nowhere")


@pytest.mark.slow
def test_two_processes_predict_what_one_does(tmp_path, run, new):
    (new / "photo 2.bmp").write_bytes(b"BM broken")
    words = [run / "last.pth", "--images", new, "--pseudo-labels", "--device", "cpu", "--masks"]
    refused("1 images have no mask, for the reasons named above", predict, *words, tmp_path / "one")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command, env = [*torchrun, TOOLS / "predict.py", *words, tmp_path / "two"], os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == 1 and "4 masks written" in done.stdout
    assert done.stderr.count("predict.py: 1 images have no mask") == 1
    assert names_below(tmp_path / "two") == names_below(tmp_path / "one")
    for name in names_below(tmp_path / "one"):
        assert np.array_equal(pixels(tmp_path / "one" / name), pixels(tmp_path / "two" / name))


# report.py


@pytest.mark.parametrize("kind", ["margin", "max", "entropy"])
def test_the_report_counts_what_plain_loops_count_and_prints_a_row_each(tmp_path, run, capsys, kind):
    saved, checkpoint, file = load_checkpoint(run / "last.pth"), tmp_path / "other.pth", tmp_path / "json" / "one.json"
    args, classes = saved["args"] | {"confidence": kind, "floor": 0.01 * (kind == "max")}, saved["classes"]
    torch.save(saved | {"args": args}, checkpoint)
    call(report, checkpoint, "--json", file, "--device", "cpu")
    said, summary = capsys.readouterr().out, json.loads(file.read_text())
    says = f"{checkpoint}, step 2: 4 unlabeled images of folder, threshold: the 40% quantile of each image"
    assert f"{says}{', at least 0.01' * (kind == 'max')}\n" in said
    for row in (*classes, "together", "20%", "90%", "area"):
        assert sum(line.startswith(f"{row} ") for line in said.splitlines()) == 1
    data, found = open_dataset("folder", args["root"], saved["labeled"], use=("unlabeled",)), {"raw": [], "refined": []}
    for item in data.unlabeled:
        truth, prob = torch.from_numpy(pixels(item.mask)), probabilities(checkpoint, item.image)
        near = E.near_contour(truth[None], 5, image_border=False)[0]
        for name, p in (("raw", prob), ("refined", refine(prob))):
            conf, label = confidence(p, kind)[0], p.argmax(1)[0]
            columns = conf, conf > E.image_threshold(prob, args), label, label == truth, near
            found[name].append([column[truth != 255].numpy() for column in columns])
    for name, images in found.items():
        conf, keep, label, right, near = map(np.concatenate, zip(*images))
        for row, members in {**{c: label == i for i, c in enumerate(classes)}, "together": label >= 0}.items():
            kept = members & keep
            assert summary[name]["kept"][row] == (pytest.approx(keep[members].mean()) if members.any() else None)
            assert summary[name]["correct"][row] == (pytest.approx(right[kept].mean()) if kept.any() else None)
        for part, members in (("coverage", conf > -9), ("coverage_near_contours", near)):
            surest = right[members][np.argsort(-conf[members])]
            running = surest.cumsum() / np.arange(1, len(surest) + 1)
            for share in report.COVERAGES:
                exact = running[round(share / 100 * len(surest)) - 1]
                assert summary[name][part][str(share)] == pytest.approx(exact, abs=0.01)
            assert summary[name][part]["area"] == pytest.approx(running.mean(), abs=0.01)


def test_figures_4_to_6_show_the_log_and_the_checkpoint(tmp_path, run):
    pytest.importorskip("matplotlib", reason="--figures needs matplotlib, which is optional")
    folder, sheets = shutil.copytree(run, tmp_path / "run"), []
    for change in ({}, {"kept": 0.1, "fp_change": 0.5}):
        lines = [json.loads(line) | change for line in (run / "metrics.jsonl").read_text().splitlines()]
        lines = [*map(json.dumps, lines), '{"event": "train", "kept']  # a cut line
        (folder / "metrics.jsonl").write_text("\n".join(lines))
        call(report, folder, "--figures", tmp_path / "figures", "--device", "cpu")
        sheets.append([pixels(tmp_path / "figures" / f"fig{number}.png") for number in (4, 5, 6)])
    assert [not np.array_equal(before, after) for before, after in zip(*sheets)] == [True, True, False]


def test_a_report_that_cannot_be_made_is_one_sentence(tmp_path, run, monkeypatch):
    shutil.copy(run / "last.pth", tmp_path / "last.pth")
    refused("metrics.jsonl has no step with pseudo-labels; expected the log", report, tmp_path, "--figures", tmp_path)
    root = trees.folder(tmp_path / "few", images=6, annotated=6)
    for id in {f"photo {i}" for i in range(6)} - {*load_checkpoint(run / "last.pth")["labeled"]}:
        (root / "masks" / f"{id}.png").unlink()
    refused("no unlabeled image of folder under .*few has a mask; expected some", report, run, "--root", root)
    (root / "classes.txt").write_text("soil\nwheat\nweed\n")
    refused(r"has the classes \('soil', .*; expected the run's, \['class 0'", report, run, "--root", root)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    refused("--figures needs matplotlib, .* pip install matplotlib", report, run, "--figures", tmp_path)
