"""The scripts of tools/: fetching and checking datasets, masks for new images, reports."""

import hashlib
import json
import os
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
from PIL import Image, ImageOps
from torchvision.datasets import SBDataset
from torchvision.datasets.voc import DATASET_YEAR_DICT

import data as D
import evaluate as E
import train as T
from data import InputError, open_dataset, palette, read, save_mask
from model import load_checkpoint, load_network
from refine import confidence, pseudo_labels, refine
from tools import predict, prepare, report

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
    refused("lacks files of 1 images, first 2009_000009; remove VOC2012 there and run", prepare, *words)


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
    refused("4 files are missing or broken; each is named above", prepare, *words)
    assert len((said := capsys.readouterr().err).splitlines()) == 4
    assert "image 2007_000000 is missing" in said and "2007_000001.jpg could not be read" in said
    assert "mask of the labeled image 2007_000002 is missing" in said and "holds the value 77" in said
    Image.new("L", (3, 3)).save(trees.camvid(tmp_path / "camvid", test=2) / "testannot" / "test0.png")
    refused("1 files are missing", prepare, "check", "--dataset", "camvid", "--root", tmp_path, "--labeled", 2)
    assert "has (3, 3) pixels, its image (64, 48)" in capsys.readouterr().err


# predict.py


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a run of two steps on a folder of one's own whose unlabeled images have masks, too."""
    tmp_path = tmp_path_factory.mktemp("run")
    root = trees.folder(tmp_path / "data", images=6, annotated=6)
    options = "--dataset folder --labeled 2 --backbone resnet10 --weights none --crop 32 --batch-size 2 --iters 2"
    options += " --framework fixmatch --floor 0 --device cpu --warmup-iters 0 --workers 0 --log-every 1 --lr 0.01"
    options += " --head-lr 0.01 --lr-warmup 0 --seed 2"
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
    assert "1 files are skipped because they are not images, first" in said and "readme.txt" in said
    assert said.endswith(f"look at {out}-sheet.png: images beside their masks\n")
    with Image.open(f"{out}-sheet.png") as sheet:
        for place, file in enumerate((new / "photo 0.jpg", tmp_path / "out-overlays" / "photo 0.png")):
            left, expected = 2 + 242 * place, ImageOps.pad(D.open_image(file, "RGB"), (240, 240), color="white")
            assert np.array_equal(sheet.crop((left, 2, left + 240, 242)), expected)
        assert sheet.size == (2 + 6 * 242, 2 + 2 * 242)  # five images, three in a row
    call(predict, *words, tmp_path / "labels", "--pseudo-labels", "--workers", 1)
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
    Image.new("RGB", (40, 40)).save(new / f"{long}.png")
    words = [run / "last.pth", "--images", new, "--masks", out, "--device", "cpu"]
    refused("2 images have no mask, for the reasons named above", predict, *words)
    said = capsys.readouterr()
    assert "photo 2.bmp could not be read" in said.err and f"{long}.png has no mask: [Errno 36] File name" in said.err
    assert "1 existing masks in" in said.out and "are kept, even if another checkpoint or option made them" in said.out
    assert "3 masks written" in said.out and "their other files (--confidence, ...) are not written" in said.out
    assert (out / "photo 0.png").read_bytes() == b"corrected by hand"
    assert names_below(out) == ["photo 0.png", "photo 3.png", "photo 4.png", "trip/photo 1.png"]
    Image.new("RGB", (40, 40)).save(new / "photo 4.png")
    refused("photo 4.webp have the same name; remove one of them", predict, *words)
    (new / "photo 4.png").unlink()
    for inside in (new, new / ".." / new.name / "masks"):
        refused("lies in --images .*; use another folder", predict, *words, "--masks", inside)
    Image.new("RGBA", (9, 9), (200, 0, 0, 0)).save(tmp_path / "clear.png")
    call(predict, *words[:2], tmp_path / "clear.png", *words[3:])
    assert (pixels(out / "clear.png") == 255).all()
    (tmp_path / "clip.mp4").write_bytes(b"x")
    for name, says in (("nowhere", "add some"), ("clip.mp4", "1 files are skipped .*clip.mp4: a video; `ffmpeg")):
        says = f"has no image; expected one, or a folder of images; {says}"
        refused(says, predict, *words[:2], tmp_path / name, *words[3:])


def test_the_sheet_holds_twelve_images_evenly_spaced(tmp_path):
    out, paths = tmp_path / "out", {}
    predict.write_sheet(out, paths)
    assert names_below(tmp_path) == []
    (tmp_path / "out-overlays").mkdir()
    for gray in range(24):
        paths[f"{gray:02}"] = tmp_path / f"{gray:02}.png"
        for file in (paths[f"{gray:02}"], tmp_path / "out-overlays" / f"{gray:02}.png"):
            Image.new("RGB", (30, 30), (gray, gray, gray)).save(file)
    predict.write_sheet(out, paths)
    sheet = pixels(tmp_path / "out-sheet.png")
    assert [sheet[2 + 242 * (i // 6), 2 + 242 * (i % 6), 0] for i in range(24)] == [i // 2 * 2 for i in range(24)]
    assert names_below(tmp_path)[-1] == "out-sheet.png" and sheet.shape == (2 + 4 * 242, 2 + 6 * 242, 3)


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
    refused("no unlabeled image of folder has a mask; expected some", report, run, "--root", root)
    (root / "classes.txt").write_text("soil\nwheat\nweed\n")
    refused(r"has the classes \('soil', .*; expected those of the run, \['class 0'", report, run, "--root", root)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    refused("--figures needs matplotlib, .* pip install matplotlib", report, run, "--figures", tmp_path)
