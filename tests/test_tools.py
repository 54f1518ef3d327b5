"""The scripts of tools/: fetching and checking datasets, a folder of one's own, masks for new images, reports."""

import functools
import hashlib
import http.server
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
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

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")


def call(tool, *words):
    """A tool in this process, with the words of its command line."""
    tool.main(tool.parse_args(list(map(str, words))))


def pixels(path):
    with Image.open(path) as image:
        return np.array(image)


def names_below(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.*"))


def test_every_tool_starts_from_any_folder(tmp_path):
    code = """
import runpy, sys
for tool in sys.argv[1:]:
    sys.argv, path = [tool, "--help"], list(sys.path)
    try:
        runpy.run_path(tool, run_name="__main__")
    except SystemExit as end:
        assert not end.code
    sys.path[:] = path
    for name in ("data", "evaluate", "model", "refine"):  # the next one has to find them by itself
        sys.modules.pop(name, None)
"""
    command = [sys.executable, "-c", code, *sorted((ROOT / "tools").glob("*.py"))]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert all(f"python tools/{name}.py" in done.stdout for name in ("own_images", "predict", "prepare", "report"))


# ----------------------------------------------------------------------------------------------------------------------
# prepare.py


def archive(folder, file):
    """A folder packed into a tar file; returns its checksum."""
    with tarfile.open(file, "w:gz" if file.suffix == ".tgz" else "w") as tar:
        tar.add(folder, ".")
    return hashlib.md5(file.read_bytes()).hexdigest()


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@pytest.fixture
def served(tmp_path):
    """The address under which tmp_path is served."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=tmp_path)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture
def voc(tmp_path, served, monkeypatch):
    """A tiny VOC 2012 behind the address that torchvision knows; returns the archive."""
    tree = trees.pascal(tmp_path / "there" / "VOCdevkit" / "VOC2012", tmp_path / "splits")
    shutil.rmtree(tree / "SegmentationClassAug")
    (tree / "ImageSets" / "Segmentation").mkdir(parents=True)
    (tree / "ImageSets" / "Segmentation" / "train.txt").write_text("2007_000000\n")
    md5 = archive(tmp_path / "there", tmp_path / "VOC.tar")
    facts = {"url": f"{served}/VOC.tar", "filename": "VOC.tar", "md5": md5, "base_dir": "VOCdevkit/VOC2012"}
    monkeypatch.setitem(DATASET_YEAR_DICT, "2012", facts)
    monkeypatch.setattr(prepare, "SPLITS", tmp_path / "splits")
    return tmp_path / "VOC.tar"


def test_pascal_is_downloaded_once_and_mended_where_files_are_gone(tmp_path, voc, capsys):
    root = tmp_path / "root"
    call(prepare, "pascal", "--root", root)
    assert f"complete: {root / 'VOCdevkit' / 'VOC2012'}" in capsys.readouterr().out
    assert len(open_dataset("pascal", root, 2, tmp_path / "splits").labeled) == 2
    voc.unlink()
    (root / "VOCdevkit" / "VOC2012" / "SegmentationClass" / "2009_000001.png").unlink()
    call(prepare, "pascal", "--root", root)  # unpacks the archive that is there
    (root / "VOC.tar").unlink()
    call(prepare, "pascal", "--root", root)  # needs nothing


def test_a_download_that_fails_or_lacks_files_of_the_lists_is_one_sentence(tmp_path, voc):
    archive = voc.read_bytes()
    for content, reason in ((b"something else", "corrupted"), (None, "404")):
        voc.unlink() if content is None else voc.write_bytes(content)
        with pytest.raises(InputError, match=rf"the download to .*root failed \(.*{reason}.*\); run the same command"):
            call(prepare, "pascal", "--root", tmp_path / "root")
    voc.write_bytes(archive)
    with open(tmp_path / "splits" / "pascal" / "val.txt", "a") as file:
        file.write("2009_000009\n")
    with pytest.raises(InputError, match="lacks files of 1 images, first 2009_000009; remove it and start again"):
        call(prepare, "pascal", "--root", tmp_path / "root")


def test_the_coarse_masks_are_converted_once_from_sbd_s_matlab_files(tmp_path, voc, served, monkeypatch):
    scipy_io = pytest.importorskip("scipy.io", reason="--sbd needs scipy, which is optional")
    matlab, words = tmp_path / "sbd" / "benchmark_RELEASE" / "dataset" / "cls", ["--root", tmp_path / "root", "--sbd"]
    matlab.mkdir(parents=True)
    masks = np.random.default_rng(0).integers(0, 21, (2, 55, 97)).astype(np.uint8)
    for id, mask in zip(("2008_000001", "2008_000002"), masks):
        scipy_io.savemat(matlab / f"{id}.mat", {"GTcls": {"Segmentation": mask}})
    monkeypatch.setattr(SBDataset, "md5", archive(tmp_path / "sbd", tmp_path / "benchmark.tgz"))
    monkeypatch.setattr(SBDataset, "url", f"{served}/benchmark.tgz")
    call(prepare, "pascal", *words)
    folder = tmp_path / "root" / "VOCdevkit" / "VOC2012" / "SegmentationClassAug"
    assert names_below(folder) == ["2008_000001.png", "2008_000002.png"]
    assert all(np.array_equal(pixels(folder / f"2008_00000{i + 1}.png"), masks[i]) for i in range(2))
    for packed in (tmp_path / "benchmark.tgz", tmp_path / "root" / "benchmark.tgz"):
        packed.unlink()
    call(prepare, "pascal", *words)  # needs nothing
    monkeypatch.setitem(sys.modules, "scipy.io", None)
    with pytest.raises(InputError, match="--sbd reads MATLAB files, and scipy is not installed; pip install scipy"):
        call(prepare, "pascal", *words)


def test_cityscapes_says_what_to_download_and_what_is_there(tmp_path, monkeypatch, capsys):
    trees.cityscapes(tmp_path / "cityscapes", tmp_path / "splits")
    monkeypatch.setattr(prepare, "SPLITS", tmp_path / "splits")
    (tmp_path / "cityscapes" / "gtFine" / "val" / "lindau" / "lindau_000000_000019_gtFine_labelIds.png").unlink()
    call(prepare, "cityscapes", "--root", tmp_path)
    said = capsys.readouterr().out
    assert f"gtFine_trainvaltest.zip (241 MB), unpack both into {tmp_path / 'cityscapes'}" in said
    assert "train: 4 images and 4 masks of 4" in said and "val: 2 images and 1 masks of 2" in said
    call(prepare, "cityscapes", "--root", tmp_path / "empty")
    assert "not there yet" in capsys.readouterr().out


def test_check_counts_every_pixel_and_names_everything_that_is_wrong_at_once(tmp_path, capsys):
    root = trees.pascal(tmp_path / "root", tmp_path / "splits")
    words = ["check", "--dataset", "pascal", "--root", root, "--labeled", 7, "--splits", tmp_path / "splits"]
    call(prepare, *words)
    said = capsys.readouterr().out
    assert "labeled: 7 images, 7 masks" in said and "unlabeled: 1 images, 1 masks (none needed)" in said
    assert "nothing is missing, nothing is broken" in said and "61 x 83 (1)" in said
    data = open_dataset("pascal", root, 7, tmp_path / "splits")
    masks = [np.asarray(read(item, data)[1]).ravel() for item in data.labeled + data.unlabeled + data.val]
    for value, name in ((0, "background"), (1, "aeroplane"), (255, "ignored")):
        assert f"{value:4} {name:20} {np.mean(np.concatenate(masks) == value):7.2%} of the mask pixels" in said

    (root / "JPEGImages" / "2007_000000.jpg").unlink()
    (root / "JPEGImages" / "2007_000001.jpg").write_bytes(b"no image")
    (root / "SegmentationClass" / "2007_000002.png").unlink()
    (root / "SegmentationClassAug" / "2008_000002.png").unlink()  # unlabeled, not needed
    save_mask(np.full((71, 79), 77, np.uint8), root / "SegmentationClass" / "2007_000003.png")
    with pytest.raises(InputError, match="4 files are missing or broken, each is named above"):
        call(prepare, *words)
    said = capsys.readouterr().err
    assert "image 2007_000000 is missing" in said and "2007_000001.jpg could not be read" in said
    assert "mask of the labeled image 2007_000002 is missing" in said and "holds the value 77" in said
    assert len(said.splitlines()) == 4


def test_check_reads_the_test_images_of_a_dataset_that_has_some(tmp_path, capsys):
    root = trees.camvid(tmp_path / "camvid", test=2)
    Image.new("L", (3, 3)).save(root / "testannot" / "test0.png")
    with pytest.raises(InputError, match="1 files are missing or broken"):
        call(prepare, "check", "--dataset", "camvid", "--root", tmp_path, "--labeled", 2)
    assert "has (3, 3) pixels, its image (64, 48)" in capsys.readouterr().err


# ----------------------------------------------------------------------------------------------------------------------
# own_images.py


def mine(root, images=8, annotated=6, **options):
    """A folder of one's own as a user puts it there: images/ and masks/, nothing else."""
    trees.folder(root, images, annotated, **options)
    shutil.rmtree(root / "val")
    (root / "classes.txt").unlink()
    return root


def change_masks(root, change, suffix=".png"):
    """Every mask m becomes change(m), or change(m, its number), in a file with the suffix."""
    for number, path in enumerate(sorted((root / "masks").rglob("*.png"))):
        mask = pixels(path)
        path.unlink()
        changed = change(mask, number) if change.__code__.co_argcount == 2 else change(mask)
        changed = changed if isinstance(changed, Image.Image) else Image.fromarray(changed)
        changed.save(path.with_suffix(suffix))


def masks_of(root):
    return {path.stem: pixels(path) for path in sorted((root / "masks").rglob("*.*"))}


def test_masks_of_indices_get_names_every_fifth_validates_and_the_printed_command_fits(tmp_path, capsys):
    root = mine(tmp_path / "my data", images=14, annotated=11)
    save_mask(np.full((48, 64), 255, np.uint8), root / "masks" / "photo 4.png")  # cannot validate
    call(own_images, root)
    said, annotated = capsys.readouterr().out.splitlines(), sorted(f"photo {i}" for i in range(11))
    useful = [id for id in annotated if id != "photo 4"]
    assert (root / "val.txt").read_text().splitlines() == useful[4::5]
    assert (root / "classes.txt").read_text() == "class 0\nclass 1\nclass 2\n"
    assert "14 images, 11 of them annotated; 2 for validation" in said[0] and "typically 48 pixels" in said[0]
    masks = np.stack([mask for id, mask in masks_of(root).items() if id in useful])
    shares = [f"{np.mean(masks == c):7.2%} of the annotated pixels" for c in range(3)]
    assert said[1:-1] == [f"{c:4} class {c}              {share}" for c, share in enumerate(shares)]
    words = shlex.split(said[-1])
    assert words[:2] == ["python", "train.py"]
    args = T.parse_args(words[2:])
    assert (args.dataset, args.root, args.crop, args.framework) == ("folder", str(root), 32, "fixmatch")
    data = open_dataset(args.dataset, args.root, "all")
    assert [item.id for item in data.labeled] == [id for id in annotated if id not in useful[4::5]]
    assert [item.id for item in data.unlabeled] == [f"photo {i}" for i in (11, 12, 13)]


@pytest.mark.parametrize("size, gpu, crop", [
    ((400, 300), False, None), ((127, 200), False, 96), ((20, 20), False, 32), ((400, 300), True, 288),
    ((400, 330), True, None),
])  # fmt: skip
def test_a_crop_is_named_only_for_images_smaller_than_the_preset(tmp_path, capsys, monkeypatch, size, gpu, crop):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    call(own_images, mine(tmp_path / "mine", images=2, annotated=2, size=size))
    words = shlex.split(capsys.readouterr().out.splitlines()[-1])
    assert ("--crop" in words) == (crop is not None) and (crop is None or str(crop) in words)
    assert "supervised" in words and (tmp_path / "mine" / "val.txt").read_text() == "photo 1\n"  # all are annotated


def test_folders_may_be_nested_and_lists_that_are_there_stay(tmp_path, capsys):
    root = mine(tmp_path / "mine")
    for kind in ("images", "masks"):
        (root / kind).rename(root / "trip")
        (root / kind).mkdir()
        (root / "trip").rename(root / kind / "trip")
    (root / "val.txt").write_text("trip/photo 1\ntrip/photo 2\n")
    (root / "classes.txt").write_bytes("soil\nStraße\nweed\nnever annotated\n".encode("latin-1"))
    call(own_images, root)
    said = capsys.readouterr().out
    assert "2 for validation" in said and "3 never annotated        0.00%" in said and "1 Straße" in said
    assert (root / "val.txt").read_text() == "trip/photo 1\ntrip/photo 2\n"


def shuffled(mask, number):
    """Indices in another order in each file, the palette too: the colors are the same."""
    order = np.random.default_rng(number).permutation(3)
    image = Image.fromarray(np.argsort(order)[mask].astype(np.uint8), "P")
    image.putpalette(palette()[order].tobytes())
    return image


def soft(mask, levels, **blur):
    """The mask in colors, or grays, with soft edges; enlarged, so that there are areas."""
    image = Image.fromarray(np.array(levels, np.uint8)[mask])
    return image.resize((64, 48), Image.Resampling.NEAREST).filter(ImageFilter.GaussianBlur(0.7))


def see_through(mask):
    """Class 0 is transparent, over colors that mean nothing; class 1 black, class 2 red."""
    colors = np.array([[9, 9, 9, 0], [0, 0, 0, 255], [255, 0, 0, 255]], np.uint8)[mask]
    colors[::2][mask[::2] == 0] = 77, 77, 77, 0
    return colors


OTHER_MASKS = {  # a change, a suffix, the class of each index
    "0 and 255": (lambda m: (m > 0).astype(np.uint8) * 255, ".png", {0: 0, 1: 1, 2: 1}),
    "0 only": (lambda m: m * 0, ".png", None),
    "from 1": (lambda m: m + np.uint8(1), ".png", {0: 0, 1: 1, 2: 2}),
    "grays and 255": (lambda m: np.array([255, 100, 200], np.uint8)[m], ".png", {0: 255, 1: 0, 2: 1}),
    "two values": (lambda m: m > 0, ".png", {0: 0, 1: 1, 2: 1}),
    "16 bits": (lambda m: m.astype(np.uint16) * 300, ".png", {0: 0, 1: 1, 2: 2}),
    "32 bits": (lambda m: np.array([-9999, 70000, 5], np.int32)[m], ".tif", {0: 255, 1: 1, 2: 0}),
    "float": (lambda m, i: np.array([(np.nan, np.inf, -3.4e38)[i % 3], 0.25, 7], np.float32)[m], ".tif",
              {0: 255, 1: 0, 2: 1}),
    "colors": (lambda m: palette()[m + 3], ".png", {0: 2, 1: 0, 2: 1}),
    "colors in BMP": (lambda m: palette()[m], ".bmp", {0: 0, 1: 2, 2: 1}),
    "transparent": (see_through, ".png", {0: 0, 1: 1, 2: 2}),
    "palettes that differ": (shuffled, ".png", {0: 0, 1: 2, 2: 1}),
    "indices in TIFF": (lambda m: m, ".tif", {0: 0, 1: 1, 2: 2}),
    "soft colors": (lambda m: soft(m, [[0, 0, 0], [255, 0, 0], [0, 0, 255]]), ".png", {0: 0, 1: 2, 2: 1}),
    "soft grays in JPEG": (lambda m: soft(m, [0, 120, 250]), ".jpg", {0: 0, 1: 1, 2: 2}),
    "soft indices": (lambda m: soft(m, [0, 7, 3]), ".png", {0: 0, 1: 2, 2: 1}),
}  # fmt: skip


@pytest.mark.parametrize("name", OTHER_MASKS)
def test_other_masks_are_listed_as_csv_lines_with_which_the_printed_command_converts_them(tmp_path, capsys, name):
    change, suffix, expected = OTHER_MASKS[name]
    root = mine(tmp_path / "mine")
    before = masks_of(root)
    change_masks(root, change, suffix)
    given = masks_of(root)
    if expected is None:
        with pytest.raises(InputError, match="hold the values 0; expected 2 to 254 classes"):
            call(own_images, root)
        return
    with pytest.raises(InputError, match="expected PNG files of class indices from 0 on; write the lines") as error:
        call(own_images, root)
    assert not (root / "classes.txt").exists() and not (root / "val.txt").exists()
    assert ("blended at edges, as by JPEG or a soft brush" in str(error.value)) == name.startswith("soft")
    assert ("their palettes differ" in str(error.value)) == name.startswith("palettes")
    (tmp_path / "classes.csv").write_text(capsys.readouterr().out)
    words = shlex.split(str(error.value).rpartition(": ")[2])
    assert words == ["python", "tools/own_images.py", str(root), "--colors", "classes.csv"]
    call(own_images, root, "--colors", tmp_path / "classes.csv")
    for id, mask in masks_of(root).items():
        right = np.vectorize(expected.get)(before[id])
        assert np.array_equal(mask, right) or name.startswith("soft") and (mask == right).mean() > 0.7
        assert set(np.unique(mask[mask != right])) <= {255}  # soft edges are ignored
    assert names_below(root / "masks-painted") == [f"{id}{suffix}" for id in sorted(given)]
    assert len(open_dataset("folder", root, "all").classes) == len({*expected.values()} - {255})
    call(own_images, root)  # ready now


def test_a_table_names_the_classes_and_what_to_ignore_in_val_too(tmp_path, capsys):
    root, table = trees.folder(tmp_path / "mine"), tmp_path / "classes.csv"
    (root / "classes.txt").unlink()
    for place in (root, root / "val"):
        change_masks(place, lambda m: palette()[m + 1])
    (root / "masks.tmp").mkdir()  # a conversion was killed
    (root / "masks.tmp" / "photo 9.png").write_bytes(b"half")
    rows = [",".join(map(str, palette()[c + 1])) for c in range(3)]
    table.write_text(f"wheat, {rows[1]}\nignore,{rows[0]}\nwheat,{rows[2]}\nsoil,7,7,7\n")
    call(own_images, root, "--colors", table)
    assert (root / "classes.txt").read_text() == "wheat\nsoil\n" and not (root / "val.txt").exists()
    for place in (root, root / "val"):
        assert all(set(np.unique(mask)) == {0, 255} for mask in masks_of(place).values())
        assert len(names_below(place / "masks-painted")) == len(names_below(place / "masks")) > 0
    said = capsys.readouterr().out
    assert "8 images, 6 of them annotated; 2 for validation" in said and "0 wheat                100.00% of the" in said


@pytest.mark.parametrize("text, names, says", [
    ("soil,1\nwheat,2\n", "", "mask .*photo 0.png holds 3, which .*classes.csv does not; add lines for them"),
    ("soil,1\nsoil,2\nignore,3\n", "", "expected 2 to 254 different names"),
    ("soil,1\nwheat,2\nweed,3\n", "soil\nmaize\n", "classes.txt and .*classes.csv name other classes; make them the"),
    ("soil,1\nwheat,2\nweed,3\n", None, "masks-painted is there from an earlier conversion; move it away first"),
])  # fmt: skip
def test_a_conversion_that_cannot_end_well_changes_nothing(tmp_path, text, names, says):
    root, table = mine(tmp_path / "mine"), tmp_path / "classes.csv"
    change_masks(root, lambda m: m + np.uint8(1))
    before = masks_of(root)
    (root / "masks-painted").mkdir() if names is None else (root / "classes.txt").write_text(names) if names else None
    table.write_text(text)
    with pytest.raises(InputError, match=says):
        call(own_images, root, "--colors", table)
    after = masks_of(root)
    assert after.keys() == before.keys() and all(np.array_equal(after[id], before[id]) for id in before)
    assert not (root / "masks.tmp").exists() and not (root / "val.txt").exists()


COLORS = {(0, 0, 0, 255): 0, (128, 64, 128, 255): 1}


@pytest.mark.parametrize("text, table", [
    ("Void,0,0,0\n\n  \n,,,\nStraße,128,64,128\n", COLORS), ("Void;0;0;0\nStraße;128;64;128\n", COLORS),
    ("name,r,g,b,class_11\nVoid,0,0,0,0\nStraße,128,64,128,1\n", COLORS),
    ("0 0 0\tVoid\n128 64 128\tStraße\n", COLORS), ("Void,0,0,0,\n\"Straße\",128,64,128,\n", COLORS),
    ("# label:color_rgb:parts:actions\nVoid:0,0,0::\nStraße:128,64,128::\n", COLORS),
    ("name,value\nVoid,-9999\nignore,nan\nStraße,2.5\n", {(-9999,): 0, (own_images.NAN,): 255, (2.5,): 1}),
    ("ignore,7,7,7,0\nVoid,0,0,0\nStraße,1,2,3,128\n", {(0,) * 4: 255, (0, 0, 0, 255): 0, (1, 2, 3, 128): 1}),
])  # fmt: skip
@pytest.mark.parametrize("encoding", ["utf-8-sig", "latin-1", "utf-16"])
def test_tables_of_other_tools_and_encodings_are_read(tmp_path, text, table, encoding):
    (tmp_path / "classes.csv").write_bytes(text.encode(encoding))
    assert own_images.read_table(tmp_path / "classes.csv") == (table, ["Void", "Straße"])


@pytest.mark.parametrize("text, says", [
    ("soil,0\nwheat,1,2,3\n", "holds 'wheat,1,2,3'; expected lines name,r,g,b or lines name,value"),
    ("soil\n", "holds 'soil'"), (",1\n", "holds ',1'"), ("", "holds ''"), ("soil,1,2\n", "holds 'soil,1,2'"),
    ("soil,1,2,300\n", "holds 'soil,1,2,300'"), ("soil,1\nwheat,1\n", "names 1 twice; expected one class for it"),
    (None, "is not there; expected lines name,r,g,b or lines name,value, one per class"),
])  # fmt: skip
def test_a_bad_table_gets_a_sentence(tmp_path, text, says):
    if text is not None:
        (tmp_path / "classes.csv").write_text(text)
    with pytest.raises(InputError, match=says):
        call(own_images, mine(tmp_path / "mine"), "--colors", tmp_path / "classes.csv")


def test_mistakes_in_a_folder_get_a_sentence(tmp_path):
    def refused(root, says):
        with pytest.raises(InputError, match=says):
            call(own_images, root)

    refused(tmp_path, "lacks images/ or masks/; expected both")
    refused(mine(tmp_path / "few", annotated=1), "has 1 annotated images; expected two, to learn from and to validate")
    root = mine(tmp_path / "mine")
    (root / "val.txt").write_text("photo 77\n")
    refused(root, "val.txt names photo 77, ")
    (root / "classes.txt").write_text("soil\nsoil\nweed\n")
    refused(root, "has the classes soil, soil, weed; expected 2 to 254 different names")
    (root / "classes.txt").unlink()
    change_masks(root, lambda m, i: np.random.default_rng(i).integers(0, 256, (48, 64, 3)).astype(np.uint8))  # no masks
    refused(root, r"hold 1\d+ colors, none of them in areas; expected 2 to 254 classes, each in areas of its own value")
    (root / "masks" / "photo 0.png").rename(root / "masks" / "photo 0_mask.png")
    refused(root, "1 masks belong to no image, first .*photo 0_mask.png; rename or remove them")


def test_what_is_in_classes_txt_names_the_printed_lines_and_jpeg_s_strays_are_said(tmp_path, capsys):
    root = mine(tmp_path / "mine")
    (root / "classes.txt").write_text("soil\ncrack\n")
    change_masks(root, lambda m: (m > 0).astype(np.uint8) * 255)
    with pytest.raises(InputError, match="hold the values 0; 255, and .*classes.txt names 2 classes; expected PNG"):
        call(own_images, root)
    assert capsys.readouterr().out == "soil,0\ncrack,255\n"
    change_masks(root, lambda m: m // 128, ".jpg")
    with pytest.raises(InputError, match=r"and JPEG has changed some \(what nobody drew is to have the name ignore\)"):
        call(own_images, root)


def test_all_files_that_cannot_be_used_are_named_at_once_and_unlabeled_ones_stop_nothing(tmp_path, capsys):
    root = mine(tmp_path / "mine")
    (root / "images" / "notes.odt").write_text("x")
    whole = (root / "images" / "photo 0.jpg").read_bytes()
    (root / "images" / "photo 6.png").write_bytes(whole[:-100])  # its header is whole
    (root / "images" / "photo 9.jpg").symlink_to("nowhere.jpg")
    Image.fromarray(np.zeros((48, 64), np.uint16)).save(root / "images" / "photo 7.bmp", "PNG")
    call(own_images, root)
    said = capsys.readouterr().err
    assert "1 files are left out, for their suffix is no image's, first" in said and "notes.odt" in said
    assert "photo 6.png could not be read (image file is truncated" in said and "training goes on without it" in said
    assert "photo 7.bmp is a I;16 image; convert it" in said and "photo 9.jpg could not be read ([Errno 2]" in said
    (root / "images" / "photo 0.jpg").write_bytes(whole[:-100])
    (root / "masks" / "photo 1.png").write_bytes(b"broken")
    Image.new("L", (48, 64)).save(root / "masks" / "photo 2.png")
    with pytest.raises(InputError, match="6 files cannot be used, each is named above; replace or remove them"):
        call(own_images, root)
    said = capsys.readouterr().err
    assert all(f"photo {name} could not be read" in said for name in ("0.jpg", "1.png", "6.png"))
    assert "photo 2.png has (48, 64) pixels, its image (64, 48); expected the same size" in said


@pytest.mark.parametrize("suffix, says", [
    (".HEIC", "a photograph as phones store them: `magick mogrify -format jpg"), (".json", "export masks from your to"),
    (".npy", "an array: Image.fromarray"), (".nef", "a camera's raw data"),
])  # fmt: skip
def test_files_of_another_kind_are_explained_before_anything_is_to_be_removed(tmp_path, suffix, says):
    root = mine(tmp_path / "mine")
    for path in (root / ("images" if suffix in (".HEIC", ".nef") else "masks")).iterdir():
        path.rename(path.with_suffix(suffix))
    with pytest.raises(InputError, match=re.escape(says)):
        call(own_images, root)


def test_links_hidden_files_unicode_forms_and_odd_names_do_not_matter(tmp_path, capsys):
    root, elsewhere = mine(tmp_path / "mine"), tmp_path / "elsewhere"
    elsewhere.mkdir()
    (root / "images" / "photo 7.bmp").rename(elsewhere / "photo 7.bmp")
    (root / "images" / "phone").symlink_to(elsewhere)
    (elsewhere / "circle").symlink_to(root / "images")
    (root / "images" / "scene.tif").mkdir()
    for name in ("._photo 0.jpg", ".DS_Store", "Thumbs.db"):
        (root / "images" / name).write_bytes(b"\0")
    for kind, name in (("images", "e\u0301 .jpg"), ("masks", "\u00e9 .png ")):  # two forms of one letter, and spaces
        (root / kind / f"photo 0{name.strip()[-4:]}").rename(root / kind / name)
    call(own_images, root)
    said = capsys.readouterr()
    assert "8 images, 6 of them annotated" in said.out and not said.err
    (root / "val.txt").write_text("e\u0301 .jpg\nphoto 1\n")
    data = open_dataset("folder", root, "all")
    assert {item.id for item in data.val} == {"photo 1", "\u00e9 "}
    assert "phone/photo 7" in [item.id for item in data.unlabeled]
    (root / "labels.txt").write_text("photo 2.bmp\nphoto 3\n")
    assert len(open_dataset("folder", root, root / "labels.txt").labeled) == 2
    (root / "labels.txt").write_text("photo 1\n")
    with pytest.raises(InputError, match="1 ids are not in the training images, first photo 1; .* none of the images"):
        open_dataset("folder", root, root / "labels.txt")
    (root / "images" / os.fsdecode(b"caf\xe9.jpg")).write_bytes(b"")
    with pytest.raises(InputError, match="is not UTF-8; rename the file"):
        call(own_images, root)


@pytest.mark.parametrize("orientation, stored, size, fits", [
    (6, (48, 64), (64, 48), "fits"), (6, (48, 64), (48, 64), "lies as stored, its image is turned"),
    (3, (64, 48), (64, 48), "1 images are turned by an EXIF tag"), (6, (48, 48), (48, 48), "1 images are turned"),
])  # fmt: skip
def test_a_photograph_turned_by_its_tag_is_upright_and_a_mask_that_may_lie_is_said(
    tmp_path, capsys, orientation, stored, size, fits
):  # fmt: skip
    root = mine(tmp_path / "mine")
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.new("RGB", stored).save(root / "images" / "photo 0.jpg", exif=exif)
    save_mask(np.resize([0, 1, 2], size[::-1]).astype(np.uint8), root / "masks" / "photo 0.png")
    if "lies" in fits:
        with pytest.raises(InputError, match="1 files cannot be used"):
            call(own_images, root)
    else:
        call(own_images, root)
        data = open_dataset("folder", root, "all")
        assert read(data.labeled[0], data)[0].size == size
    said = capsys.readouterr().err
    assert fits in said if fits != "fits" else not said


def test_smaller_copies_hold_the_same_lists_and_masks_of_the_same_values(tmp_path, capsys):
    root = mine(tmp_path / "mine", size=(1600, 40))
    call(own_images, root)
    assert f"train on smaller copies: python tools/own_images.py {root} --shrink 512;" in capsys.readouterr().err
    call(own_images, root, "--shrink", 64)
    assert f"--root {root}-64" in capsys.readouterr().out
    assert (tmp_path / "mine-64" / "val.txt").read_text() == (root / "val.txt").read_text()
    data = open_dataset("folder", tmp_path / "mine-64", "all")
    assert len(data.labeled) == 5 and len(data.unlabeled) == 2
    image, mask = read(data.labeled[0], data)
    assert image.size == (64, 2) and set(np.unique(mask)) == {0, 1, 2}
    with pytest.raises(InputError, match="mine-64 is there already"):
        call(own_images, root, "--shrink", 64)


# ----------------------------------------------------------------------------------------------------------------------
# a checkpoint for the others


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a run of two steps on a folder of one's own whose unlabeled images have masks, too."""
    tmp_path = tmp_path_factory.mktemp("run")
    trees.folder(tmp_path / "data", images=6, annotated=6)
    options = "--dataset folder --labeled 2 --backbone resnet10 --weights none --crop 32 --batch-size 2 --iters 2"
    options += " --device cpu --warmup-iters 0 --workers 0 --log-every 1 --lr 0.01 --head-lr 0.01"
    places = ["--root", str(tmp_path / "data"), "--out", str(tmp_path / "run")]
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    T.main(T.parse_args([*options.split(), *places]))
    for number, handler in handlers.items():
        signal.signal(number, handler)
    return tmp_path / "run"


@pytest.fixture
def new(tmp_path):
    """Images to predict, in two folders and several formats, with a file that is none."""
    images = trees.folder(tmp_path / "new", images=5, annotated=0, size=(70, 51)).joinpath("images")
    (images / "trip").mkdir()
    (images / "photo 1.png").rename(images / "trip" / "photo 1.png")
    (images / "readme.txt").write_text("x")
    return images


def probabilities(checkpoint, path, protocol=E.Protocol(), which="teacher"):
    image = D.VF.pil_to_tensor(D.open_image(path, "RGB"))[None]
    network = load_network(load_checkpoint(checkpoint), which).to(memory_format=torch.channels_last)
    return E.predict(network, image, protocol)  # the tool's layout, which rounds otherwise


# ----------------------------------------------------------------------------------------------------------------------
# predict.py


def test_masks_overlays_and_margins_come_from_the_checkpoint_alone_under_the_images_names(tmp_path, run, new, capsys):
    checkpoint = tmp_path / "elsewhere.pth"
    shutil.copy(run / "last.pth", checkpoint)
    call(predict, checkpoint, "--images", new, "--masks", tmp_path / "out", "--confidence", "--device", "cpu")
    ids = ["photo 0", "photo 2", "photo 3", "photo 4", "trip/photo 1"]
    for kind in ("out", "out-overlays", "out-confidence"):
        assert names_below(tmp_path / kind) == [f"{id}.png" for id in ids]
    for id, path in D.files(new).items():
        prob = probabilities(checkpoint, path)
        mask = Image.open(tmp_path / "out" / f"{id}.png")
        assert mask.mode == "P" and mask.getpalette()[:9] == palette()[:3].ravel().tolist()
        assert np.array_equal(np.asarray(mask), prob.argmax(1)[0])
        assert np.array_equal(pixels(tmp_path / "out-confidence" / f"{id}.png"), (255 * confidence(prob)[0]).round())
        image = D.VF.pil_to_tensor(D.open_image(path, "RGB"))
        drawn = E.overlay(image, prob.argmax(1)[0], dim=1, opacity=0.5).permute(1, 2, 0)
        assert np.array_equal(pixels(tmp_path / "out-overlays" / f"{id}.png"), drawn)
    said = capsys.readouterr().out
    assert "5 masks written to" in said and "0 class 0, 1 class 1, 2 class 2" in said
    assert "1 files are left out, for their suffix is no image's, first" in said and "readme.txt" in said


def test_pseudo_labels_are_the_run_s_own_and_the_rest_is_255(tmp_path, run, new, capsys):
    common = [run / "last.pth", "--images", new, "--pseudo-labels", "--device", "cpu", "--workers", 1]
    call(predict, *common, "--masks", tmp_path / "out")
    assert "255 no label" in capsys.readouterr().out
    call(predict, *common, "--masks", tmp_path / "fixed", "--threshold", 0.03)
    saved = load_checkpoint(run / "last.pth")
    options = E.label_options(saved["args"], saved["prior"])
    for id, path in D.files(new).items():
        prob, mask = probabilities(run / "last.pth", path), pixels(tmp_path / "out" / f"{id}.png")
        expected = pseudo_labels(prob, saved["args"]["alpha0"], **options)  # the quantile of one image
        assert np.array_equal(mask, expected.label[0]) and 0.01 < (mask == 255).mean() <= 0.42
        fixed = pseudo_labels(prob, None, **options | {"threshold": 0.03}).label[0]
        assert np.array_equal(pixels(tmp_path / "fixed" / f"{id}.png"), fixed)


@pytest.mark.parametrize("words, large, small", [
    ("", ("sliding", 64, False), ("original", 64, False)),
    ("--eval-mode original --refine", ("original", 32, False), ("original", 32, False)),
    ("--eval-mode sliding --tta --student", ("sliding", 32, True), ("sliding", 32, True)),
    ("--crop 50", ("sliding", 50, False), ("original", 50, False)),
])  # fmt: skip
def test_large_images_are_predicted_in_windows_unless_told_otherwise(tmp_path, run, monkeypatch, words, large, small):
    seen, plain, wide = [], E.predict, tmp_path / "wide"
    wide.mkdir()
    monkeypatch.setattr(predict, "predict", lambda *given: seen.append(given[2]) or plain(*given))
    monkeypatch.setattr(predict, "LARGE", 64)
    for name, size in (("large", (100, 40)), ("small", (64, 40))):
        Image.new("RGB", size, (200, 30, 90)).save(wide / f"{name}.png")
    out = ["--images", wide, "--device", "cpu", "--masks", tmp_path / "out", *words.split()]
    call(predict, run / "last.pth", *out)
    assert [(one.eval_mode, one.crop, one.tta) for one in seen] == [large, small]
    options = E.refinement_options(load_checkpoint(run / "last.pth")["args"]) if "--refine" in words else None
    assert seen[0].refine == options
    for name, protocol in zip(("large", "small"), seen):
        which = "student" if "--student" in words else "teacher"
        expected = probabilities(run / "last.pth", wide / f"{name}.png", protocol, which).argmax(1)[0]
        assert np.array_equal(pixels(tmp_path / "out" / f"{name}.png"), expected)


def test_what_is_there_stays_and_what_cannot_be_read_or_written_is_named_after_all_others(tmp_path, run, new, capsys):
    out = tmp_path / "out"
    out.mkdir()
    (out / "photo 0.png").write_bytes(b"corrected by hand")
    (new / "photo 2.bmp").write_bytes(b"BM broken")
    long = "x" * 250  # with .png.tmp no name of a file
    Image.new("RGB", (40, 40)).save(new / f"{long}.png")
    with pytest.raises(InputError, match="2 images have no mask, for the reasons named above"):
        call(predict, run / "last.pth", "--images", new, "--masks", out, "--device", "cpu")
    said = capsys.readouterr()
    assert "photo 2.bmp could not be read" in said.err and f"{long}.png has no mask: [Errno 36] File name" in said.err
    assert "1 masks were in" in said.out and "3 masks written" in said.out
    assert (out / "photo 0.png").read_bytes() == b"corrected by hand"
    assert names_below(out) == ["photo 0.png", "photo 3.png", "photo 4.png", "trip/photo 1.png"]


def test_one_image_two_of_one_stem_probabilities_and_smaller_copies(tmp_path, run, new):
    Image.new("RGB", (40, 30), (200, 30, 90)).save(new / "photo 0.png")
    call(predict, run / "last.pth", "--images", new, "--masks", tmp_path / "out", "--device", "cpu")
    assert {"photo 0.jpg.png", "photo 0.png.png", "photo 2.png"} < {*names_below(tmp_path / "out")}
    words = ["--images", new / "photo 2.bmp", "--masks", tmp_path / "one", "--probabilities", "--device", "cpu"]
    call(predict, run / "last.pth", *words)
    assert names_below(tmp_path / "one") == ["photo 2.png"]
    with np.load(tmp_path / "one-probabilities" / "photo 2.npz") as said:
        assert said["prob"].dtype == np.float16 and said["classes"].tolist() == ["class 0", "class 1", "class 2"]
        np.testing.assert_array_equal(said["prob"], probabilities(run / "last.pth", new / "photo 2.bmp")[0].half())
    call(predict, run / "last.pth", *words, "--shrink", 35, "--masks", tmp_path / "small")
    small = D.VF.resize(D.VF.pil_to_tensor(D.open_image(new / "photo 2.bmp", "RGB"))[None], [26, 35])  # of 51 x 70
    network = load_network(load_checkpoint(run / "last.pth")).to(memory_format=torch.channels_last)
    prob = torch.nn.functional.interpolate(E.predict(network, small), (51, 70), mode="bilinear")
    assert np.array_equal(pixels(tmp_path / "small" / "photo 2.png"), prob.argmax(1)[0])


def test_what_cannot_be_meant_is_refused(tmp_path, run, new):
    common = [run / "last.pth", "--device", "cpu", "--images"]
    with pytest.raises(InputError, match="holds no image; expected one, or a folder with images"):
        call(predict, *common, tmp_path / "nowhere", "--masks", tmp_path / "out")
    for inside in (new, new / "masks", new / ".." / new.name / "masks"):
        with pytest.raises(InputError, match="lies in --images .*; use another folder"):
            call(predict, *common, new, "--masks", inside)
    for words in (["--threshold", 0.5], ["--refine", "--pseudo-labels"], ["--eval-mode", "center-crop"]):
        with pytest.raises(SystemExit):
            call(predict, *common, new, "--masks", tmp_path / "out", *words)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_two_processes_predict_what_one_does(tmp_path, run, new):
    (new / "photo 2.bmp").write_bytes(b"BM broken")
    words = [run / "last.pth", "--images", new, "--pseudo-labels", "--device", "cpu", "--masks"]
    with pytest.raises(InputError, match="1 images have no mask, for the reasons named above"):
        call(predict, *words, tmp_path / "one")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = [*torchrun, ROOT / "tools" / "predict.py", *words, tmp_path / "two"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 1 and "4 masks written" in done.stdout
    assert done.stderr.count("predict.py: 1 images have no mask") == 1
    assert names_below(tmp_path / "two") == names_below(tmp_path / "one")
    for name in names_below(tmp_path / "one"):
        assert np.array_equal(pixels(tmp_path / "one" / name), pixels(tmp_path / "two" / name))


# ----------------------------------------------------------------------------------------------------------------------
# report.py


def opened(run):
    """(data, checkpoint, network) of a run."""
    saved = load_checkpoint(run / "last.pth")
    args = saved["args"]
    return open_dataset(args["dataset"], args["root"], saved["labeled"], use=("unlabeled",)), saved, load_network(saved)


@pytest.mark.parametrize("kind", ["margin", "max", "entropy"])
def test_the_report_counts_what_plain_loops_count(run, kind):
    data, saved, network = opened(run)
    args, items = saved["args"] | {"confidence": kind}, data.unlabeled[:2]
    summary = report.summarize(*report.count_labels(network, data, items, CPU, args, None), data.classes)
    found = {"raw": [], "refined": []}
    for item in items:
        image, mask = read(item, data)
        prob = E.predict(network, D.VF.pil_to_tensor(image)[None])
        truth = torch.from_numpy(np.array(mask))
        near = E.near_contour(truth[None], 5, image_border=False)[0]
        threshold = E.image_threshold(prob, args)
        for name, p in (("raw", prob), ("refined", refine(prob))):
            conf, label = confidence(p, kind)[0], p.argmax(1)[0]
            for y in range(truth.shape[0]):
                for x in range(truth.shape[1]):
                    if truth[y, x] != 255:
                        one = conf[y, x], conf[y, x] > threshold, label[y, x], label[y, x] == truth[y, x], near[y, x]
                        found[name].append([value.item() for value in one])
    for name, rows in found.items():
        conf, keep, label, right, near = (np.array(column) for column in zip(*rows))
        for row, members in {**{c: label == i for i, c in enumerate(data.classes)}, "together": label >= 0}.items():
            kept = members & keep
            assert summary[name]["kept"][row] == (pytest.approx(keep[members].mean()) if members.any() else None)
            assert summary[name]["correct"][row] == (pytest.approx(right[kept].mean()) if kept.any() else None)
        for part, members in (("coverage", conf > -9), ("coverage_near_contours", near)):
            surest = right[members][np.argsort(-conf[members])]
            for share in report.COVERAGES:
                exact = surest[: round(share / 100 * len(surest))].mean()
                assert summary[name][part][str(share)] == pytest.approx(exact, abs=0.01)
            running = surest.cumsum() / np.arange(1, len(surest) + 1)
            assert summary[name][part]["area"] == pytest.approx(running.mean(), abs=0.01)


def test_the_report_prints_a_row_per_class_and_coverage_and_agrees_with_evaluate(tmp_path, run, capsys):
    call(report, run, "--json", tmp_path / "json" / "labels.json", "--device", "cpu")
    said, numbers = capsys.readouterr().out, json.loads((tmp_path / "json" / "labels.json").read_text())
    assert f"{run / 'last.pth'}, step 2: 4 unlabeled images of folder, threshold: the 40% quantile of each" in said
    for row in ("class 0", "class 1", "class 2", "together", "20%", "90%", "area"):
        assert sum(line.startswith(f"{row} ") for line in said.splitlines()) == 1
    data, saved, network = opened(run)
    figures = E.evaluate_labels(network, data, data.unlabeled, CPU, E.Protocol(), saved["args"], None)
    for name, ending in (("raw", "_raw"), ("refined", "")):
        assert numbers[name]["kept"]["together"] == pytest.approx(figures[f"kept{ending}"])  # every pixel is known here
        assert numbers[name]["correct"]["together"] == pytest.approx(figures[f"correct{ending}"])
    call(report, run / "best.pth", "--limit", 2, "--device", "cpu")
    assert "best.pth, step" in (said := capsys.readouterr().out) and "2 unlabeled images" in said


def test_figures_4_to_6_show_the_log_and_the_checkpoint(tmp_path, run):
    pytest.importorskip("matplotlib", reason="--figures needs matplotlib, which is optional")
    folder, sheets = shutil.copytree(run, tmp_path / "run"), []
    for change in ({}, {"kept": 0.1, "fp_change": 0.5}):
        lines = [json.loads(line) | change for line in (run / "metrics.jsonl").read_text().splitlines()]
        text = "".join(json.dumps(line) + "\n" for line in lines) + '{"event": "train", "kept'  # a cut line
        (folder / "metrics.jsonl").write_text(text)
        call(report, folder, "--figures", tmp_path / "figures", "--device", "cpu")
        sheets.append([pixels(tmp_path / "figures" / f"fig{number}.png") for number in (4, 5, 6)])
    assert [not np.array_equal(before, after) for before, after in zip(*sheets)] == [True, True, False]


def test_a_report_that_cannot_be_made_is_one_sentence(tmp_path, run, monkeypatch):
    with pytest.raises(InputError, match="checkpoint .*last.pth could not be read"):
        call(report, tmp_path)
    shutil.copy(run / "last.pth", tmp_path / "last.pth")
    with pytest.raises(InputError, match="metrics.jsonl has no step with pseudo-labels; expected the log of a run"):
        call(report, tmp_path, "--figures", tmp_path)
    root = trees.folder(tmp_path / "few", images=6, annotated=6)
    for id in {f"photo {i}" for i in range(6)} - {*load_checkpoint(run / "last.pth")["labeled"]}:
        (root / "masks" / f"{id}.png").unlink()
    with pytest.raises(InputError, match="no unlabeled image of folder under .*few has a mask; expected some"):
        call(report, run, "--root", root)
    (root / "classes.txt").write_text("soil\nwheat\nweed\n")
    with pytest.raises(InputError, match=r"has the classes \('soil', .*; expected the run's, \['class 0'"):
        call(report, run, "--root", root)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(InputError, match="--figures needs matplotlib, which is not installed; pip install matplotlib"):
        call(report, run, "--figures", tmp_path)
