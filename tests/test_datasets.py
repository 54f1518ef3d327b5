"""PASCAL VOC 2012 and Cityscapes in little trees of their true layouts: lists, masks, fetching, checking, whole runs."""

import hashlib
import http.server
import io
import json
import re
import sys
import tarfile
import threading
import types

import numpy as np
import pytest
from PIL import Image
from test_train import TINY, script

import data as D
from data import SPLITS, InputError, open_dataset, palette, read

COUNTS = {
    "pascal": {"92": 92, "183": 183, "366": 366, "732": 732, "1464": 1464, "662": 662, "1323": 1323, "2646": 2646, "5291": 5291,
               "train": 10582, "val": 1449},
    "cityscapes": {"186": 186, "372": 372, "744": 744, "1488": 1488, "train": 2975, "val": 500},
}  # fmt: skip


def ids(dataset, name):
    return (SPLITS / dataset / f"{name}.txt").read_text().splitlines()


def save_palette(mask, path):
    """A PNG as VOC stores its masks: indices with a palette."""
    image = Image.fromarray(mask.astype(np.uint8), "P")
    image.putpalette(palette().tobytes())
    image.save(path)


def pascal(root, splits):
    """Six fine training images, two of SBD, two for validation, among the odd things that JPEGs can be."""
    for folder in ("JPEGImages", "SegmentationClass", "SegmentationClassAug"):
        (root / folder).mkdir(parents=True)
    names = {"1464": [f"2007_00000{i}" for i in range(6)], "coarse": ["2008_000001", "2008_000002"]}
    names["val"] = ["2009_000001", "2009_000002"]
    rng = np.random.default_rng(0)
    for i, id in enumerate(sum(names.values(), [])):
        width, height = 61 + 6 * i, 83 - 4 * i  # odd sizes
        mask = np.zeros((height, width), np.uint8)
        mask[10:50, 8:40] = 255
        mask[14:46, 12:36] = 1 + 2 * i  # the object, inside of its border
        pixels = np.where(mask == 1 + 2 * i, 200, 40)[..., None] + rng.integers(0, 40, (height, width, 3))
        image = Image.fromarray(pixels.astype(np.uint8)).convert({1: "L", 2: "CMYK"}.get(i, "RGB"))
        image.save(root / "JPEGImages" / f"{id}{'.JPG' if i == 3 else '.jpg'}", "JPEG")
        fine = id not in names["coarse"]
        save_palette(mask, root / ("SegmentationClass" if fine else "SegmentationClassAug") / f"{id}.png")
    names["train"] = names["1464"] + names.pop("coarse")
    names |= {"2": names["1464"][:2], "7": names["train"][:7]}
    (splits / "pascal").mkdir(parents=True)
    for name, members in names.items():
        (splits / "pascal" / f"{name}.txt").write_text("\n".join(members) + "\n")
    return root


def cityscapes(root, splits):
    """Four training images, two validation images; labelTrainIds for one city, labelIds for the other."""
    rng, names = np.random.default_rng(0), {"train": [], "val": []}
    for split, city, count, kind in (
        ("train", "aachen", 2, "labelTrainIds"),
        ("train", "zurich", 2, "labelIds"),
        ("val", "lindau", 2, "labelIds"),
    ):
        for i in range(count):
            id = f"{city}_00000{i}_000019"
            for folder in ("leftImg8bit", "gtFine"):
                (root / folder / split / city).mkdir(parents=True, exist_ok=True)
            pixels = rng.integers(0, 255, (48, 96, 3)).astype(np.uint8)
            Image.fromarray(pixels).save(root / "leftImg8bit" / split / city / f"{id}_leftImg8bit.png")
            road, car, void = (7, 26, 3) if kind == "labelIds" else (0, 13, 255)
            mask = np.full((48, 96), void, np.uint8)
            mask[20:40], mask[:20] = road, car
            Image.fromarray(mask).save(root / "gtFine" / split / city / f"{id}_gtFine_{kind}.png")
            if kind == "labelTrainIds":  # the other kind lies beside it, as in the archives
                Image.fromarray(mask * 0 + 7).save(root / "gtFine" / split / city / f"{id}_gtFine_labelIds.png")
            names[split].append(id)
    (splits / "cityscapes").mkdir(parents=True)
    for name, members in (names | {"2": names["train"][1:3]}).items():
        (splits / "cityscapes" / f"{name}.txt").write_text("\n".join(members) + "\n")
    return root


# ----------------------------------------------------------------------------------------------------------------------
# the published lists


@pytest.mark.parametrize("dataset", COUNTS)
def test_the_lists_are_sorted_whole_and_apart_from_validation(dataset):
    train, val = set(ids(dataset, "train")), set(ids(dataset, "val"))
    assert not train & val
    for name, count in COUNTS[dataset].items():
        members = ids(dataset, name)
        assert members == sorted(set(members)) and len(members) == count
        assert name == "val" or set(members) <= train
    assert {path.stem for path in (SPLITS / dataset).iterdir()} == set(COUNTS[dataset])


def test_classic_lists_hold_fine_images_alone_and_large_coarse_ones_all_of_them():
    fine = set(ids("pascal", "1464"))
    for name in ("92", "183", "366", "732", "662", "1323"):
        assert set(ids("pascal", name)) <= fine
    for name in ("2646", "5291"):
        assert fine < set(ids("pascal", name))


def test_the_checksums_in_splits_readme_are_those_of_the_files():
    rows = re.findall(r"^\| (\w+/\w+\.txt) \| (\d+) \| .* \| `(\w{64})` \|$", (SPLITS / "README.md").read_text(), re.M)
    assert {file for file, _, _ in rows} == {f"{dataset}/{name}.txt" for dataset in COUNTS for name in COUNTS[dataset]}
    for file, count, checksum in rows:
        content = (SPLITS / file).read_bytes()
        assert hashlib.sha256(content).hexdigest() == checksum and len(content.split()) == int(count)


# ----------------------------------------------------------------------------------------------------------------------
# loading


@pytest.mark.parametrize("below", ["", "VOC2012", "VOCdevkit/VOC2012"])
def test_pascal_is_found_at_three_places_and_cut_by_its_lists(tmp_path, below):
    pascal(tmp_path / "root" / below, tmp_path / "splits")
    data = open_dataset("pascal", tmp_path / "root", 2, tmp_path / "splits")
    assert [item.id for item in data.labeled] == ["2007_000000", "2007_000001"]
    assert (len(data.unlabeled), len(data.val), len(data.classes)) == (6, 2, 21)
    assert {item.id for item in data.labeled + data.unlabeled} == set(
        (tmp_path / "splits" / "pascal" / "train.txt").read_text().split()
    )


def test_pascal_masks_are_indices_with_their_255_border_from_the_fine_or_the_coarse_folder(tmp_path):
    root = pascal(tmp_path / "root", tmp_path / "splits")
    save_palette(np.zeros((83, 61)), root / "SegmentationClassAug" / "2007_000000.png")  # must not be taken
    data = open_dataset("pascal", root, 7, tmp_path / "splits")
    folders = {item.id: item.mask.parent.name for item in data.labeled}
    assert folders.pop("2008_000001") == "SegmentationClassAug" and set(folders.values()) == {"SegmentationClass"}
    for i, item in enumerate(data.labeled):
        image, mask = read(item, data)
        assert image.mode == "RGB" and image.size == mask.size == (61 + 6 * i, 83 - 4 * i)  # grey, CMYK and .JPG too
        mask = np.asarray(mask)
        assert mask[30, 20] == 1 + 2 * i and mask[11, 9] == 255 and mask[0, 0] == 0
        assert np.asarray(image)[30, 20].mean() > 150 > np.asarray(image)[2, 2].mean()


def test_no_mask_is_asked_for_among_the_unlabeled_and_supervised_runs_need_no_unlabeled_image(tmp_path):
    root = pascal(tmp_path / "root", tmp_path / "splits")
    for path in (root / "SegmentationClassAug").iterdir():
        path.unlink()
    data = open_dataset("pascal", root, 2, tmp_path / "splits")
    assert [item.id for item in data.unlabeled if item.mask is None] == ["2008_000001", "2008_000002"]
    with pytest.raises(InputError, match=r"1 of 7 labeled images of pascal have no mask.*2008_000001; .*--sbd"):
        open_dataset("pascal", root, 7, tmp_path / "splits")
    (root / "JPEGImages" / "2008_000002.jpg").unlink()
    with pytest.raises(InputError, match=r"1 of 6 unlabeled images of pascal have no image .*2008_000002; python data"):
        open_dataset("pascal", root, 2, tmp_path / "splits")
    assert len(open_dataset("pascal", root, 2, tmp_path / "splits", use=("labeled", "val")).unlabeled) == 6


def test_cityscapes_reads_both_kinds_of_labels(tmp_path):
    root = cityscapes(tmp_path / "cityscapes", tmp_path / "splits")
    for place in (root, tmp_path):
        data = open_dataset("cityscapes", place, 2, tmp_path / "splits")
    assert [item.id for item in data.labeled] == ["aachen_000001_000019", "zurich_000000_000019"]
    assert [item.mask.stem.split("_")[-1] for item in data.labeled] == ["labelTrainIds", "labelIds"]
    for item in data.labeled + data.val:
        mask = np.asarray(read(item, data)[1])
        assert mask[30, 5] == 0 and mask[5, 5] == 13 and mask[45, 5] == 255
    assert data.classes[0] == "road" and data.classes[13] == "car" and data.classes[18] == "bicycle"


def test_label_ids_mean_what_torchvision_s_table_says():
    values = D.DATASETS["cityscapes"].values["labelIds"]
    assert [np.flatnonzero(values == c).tolist() for c in (0, 1, 13, 18)] == [[7], [8], [26], [33]]
    assert (values[[0, 3, 9, 30, 255]] == 255).all() and (values[34:255] == 254).all()


def test_wrong_trees_and_lists_get_one_sentence(tmp_path):
    root = pascal(tmp_path / "root", tmp_path / "splits")
    with pytest.raises(InputError, match=r"no list of 100 labeled images; expected one of \[2, 7, 1464\]"):
        open_dataset("pascal", root, 100, tmp_path / "splits")
    with pytest.raises(InputError, match=r"lacks leftImg8bit/, gtFine/; expected .* in it or in cityscapes/ below it"):
        open_dataset("cityscapes", root, 186)
    (tmp_path / "splits" / "pascal" / "val.txt").unlink()
    with pytest.raises(InputError, match=r"the list .*val\.txt is not there; expected one image id per line"):
        open_dataset("pascal", root, 2, tmp_path / "splits")
    with pytest.raises(InputError, match=r"92 of 92 labeled images of pascal have no image"):
        open_dataset("pascal", root, 92)
    with pytest.raises(InputError, match="--root .*nowhere is not there; expected a folder with JPEGImages/"):
        open_dataset("pascal", tmp_path / "nowhere", 92)


def test_masks_of_0_and_255_alone_are_refused(tmp_path):
    root = pascal(tmp_path / "root", tmp_path / "splits")
    for path in (root / "SegmentationClass").glob("2007*"):
        mask = np.asarray(Image.open(path))
        Image.fromarray(np.where(mask > 0, 255, 0).astype(np.uint8)).save(path)
    with pytest.raises(
        InputError, match="hold 0 and 255 alone .* 255 means ignore; .* write 1 where the masks say 255"
    ):
        open_dataset("pascal", root, 2, tmp_path / "splits")


# ----------------------------------------------------------------------------------------------------------------------
# fetching and checking


class Server(http.server.BaseHTTPRequestHandler):
    """Serves one archive, knows ranges, and hangs up after `limit` bytes of an answer."""

    content, limit, status, ranges = b"", None, 206, []

    def do_GET(self):  # noqa: N802, the library's name
        start = int(re.match(r"bytes=(\d+)-", self.headers["Range"])[1])
        self.ranges.append(start)
        start = 0 if self.status == 200 else start
        self.send_response(self.status)
        self.send_header("Content-Length", str(len(self.content) - start))
        self.end_headers()
        self.wfile.write(self.content[start:][: self.limit])

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        Server.limit, Server.status, Server.ranges = None, 206, []
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()


def archive(folder):
    """A folder as an uncompressed tar."""
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as tar:
        tar.add(folder, ".")
    return content.getvalue()


def test_pascal_is_downloaded_goes_on_after_a_break_and_is_unpacked(tmp_path, monkeypatch, server):
    pascal(tmp_path / "there" / "VOCdevkit" / "VOC2012", tmp_path / "splits")
    (tmp_path / "there" / "VOCdevkit" / "VOC2012" / "ImageSets" / "Segmentation").mkdir(parents=True)
    (tmp_path / "there" / "VOCdevkit" / "VOC2012" / "ImageSets" / "Segmentation" / "train.txt").write_text(
        "2007_000000\n"
    )
    Server.content = archive(tmp_path / "there")
    facts = {"url": f"{server}/VOC.tar", "filename": "VOC.tar", "md5": hashlib.md5(Server.content).hexdigest()}
    monkeypatch.setitem(D.DATASET_YEAR_DICT, "2012", facts | {"base_dir": "VOCdevkit/VOC2012"})
    monkeypatch.setattr(D, "SPLITS", tmp_path / "splits")
    Server.limit = 5000
    for _ in range(2):
        with pytest.raises(InputError, match="run the same command again"):
            D.main(["pascal", "--root", str(tmp_path / "root")])
    Server.limit = None
    D.main(["pascal", "--root", str(tmp_path / "root")])
    assert Server.ranges == [0, 5000, 10000]
    assert len(open_dataset("pascal", tmp_path / "root", 7).labeled) == 7


def test_what_is_there_in_another_layout_is_left_alone(tmp_path, monkeypatch, capsys):
    root = pascal(tmp_path / "root" / "VOC2012", tmp_path / "splits")
    monkeypatch.setattr(D, "SPLITS", tmp_path / "splits")
    D.main(["pascal", "--root", str(tmp_path / "root")])
    assert f"complete: {root}" in capsys.readouterr().out
    (root / "SegmentationClass" / "2009_000001.png").unlink()
    with pytest.raises(
        InputError, match="VOC2012 lacks 1 files of VOC 2012, first 2009_000001; expected all, or another"
    ):
        D.main(["pascal", "--root", str(tmp_path / "root")])


def test_a_server_without_ranges_sends_everything_again(tmp_path, server):
    Server.content, Server.status = b"0123456789", 200
    (tmp_path / "file.tar.part").write_bytes(b"xyz")
    path = D.download(f"{server}/file.tar", tmp_path, hashlib.md5(Server.content).hexdigest())
    assert path.read_bytes() == Server.content and [file.name for file in tmp_path.iterdir()] == ["file.tar"]


def test_a_download_that_was_killed_before_its_last_word_needs_no_second_one(tmp_path, server):
    Server.content, Server.status = b"0123456789", 416
    (tmp_path / "file.tar.part").write_bytes(b"0123456789")
    assert D.download(f"{server}/file.tar", tmp_path, hashlib.md5(Server.content).hexdigest()).is_file()


def test_a_download_with_another_checksum_is_thrown_away(tmp_path, server):
    Server.content = b"something else"
    for _ in range(2):
        with pytest.raises(InputError, match="sent 14 bytes of 14 with another checksum than abc"):
            D.download(f"{server}/file.tar", tmp_path, "abc")
        assert not list(tmp_path.iterdir())
    assert Server.ranges == [0, 0]


def test_no_network_is_one_sentence(tmp_path):
    with pytest.raises(InputError, match=r"could not be downloaded \(.*\); run the same command again to go on"):
        D.download("http://127.0.0.1:9/file.tar", tmp_path, "abc")


def test_sbd_s_masks_are_built_once_from_its_matlab_files(tmp_path, monkeypatch, server):
    root = tmp_path / "root"
    voc = pascal(root / "VOCdevkit" / "VOC2012", tmp_path / "splits")
    (voc / "SegmentationClassAug" / "2008_000001.png").unlink()
    (tmp_path / "sbd" / "benchmark_RELEASE" / "dataset" / "cls").mkdir(parents=True)
    (tmp_path / "sbd" / "benchmark_RELEASE" / "dataset" / "cls" / "2008_000001.mat").write_text("broken")
    Server.content = archive(tmp_path / "sbd")
    monkeypatch.setattr(D.SBDataset, "url", f"{server}/benchmark.tar")
    monkeypatch.setattr(D.SBDataset, "md5", hashlib.md5(Server.content).hexdigest())
    monkeypatch.setattr(D, "SPLITS", tmp_path / "splits")
    monkeypatch.setitem(sys.modules, "scipy", None)
    with pytest.raises(InputError, match="--sbd reads MATLAB files and needs scipy, which is not installed"):
        D.main(["pascal", "--root", str(root), "--sbd"])

    asked = []

    def loadmat(path):  # what scipy returns for SBD's struct
        asked.append(path.stem)
        if path.read_text() == "broken":
            raise ValueError("Unknown mat file type")
        return {"GTcls": [{"Segmentation": [np.full((55, 97), 17, np.uint8)]}]}

    monkeypatch.setitem(sys.modules, "scipy", types.ModuleType("scipy"))
    monkeypatch.setitem(sys.modules, "scipy.io", types.SimpleNamespace(loadmat=loadmat))
    with pytest.raises(InputError, match=r"2008_000001\.mat could not be read .*; remove it and run this again"):
        D.main(["pascal", "--root", str(root), "--sbd"])
    (root / "benchmark_RELEASE" / "dataset" / "cls" / "2008_000001.mat").write_text("good")
    for _ in range(2):
        D.main(["pascal", "--root", str(root), "--sbd"])
    assert asked == ["2008_000001"] * 2 and Server.ranges == [0]
    built = Image.open(voc / "SegmentationClassAug" / "2008_000001.png")
    assert (
        built.mode == "P"
        and (np.asarray(built) == 17).all()
        and built.convert("RGB").getpixel((0, 0)) == tuple(palette()[17])
    )


def test_cityscapes_says_what_to_download_and_what_is_there(tmp_path, monkeypatch, capsys):
    cityscapes(tmp_path / "cityscapes", tmp_path / "splits")
    monkeypatch.setattr(D, "SPLITS", tmp_path / "splits")
    (tmp_path / "cityscapes" / "gtFine" / "val" / "lindau" / "lindau_000000_000019_gtFine_labelIds.png").unlink()
    D.main(["cityscapes", "--root", str(tmp_path)])
    said = capsys.readouterr().out
    assert (
        "gtFine_trainvaltest.zip" in said and "val: 1 of 2 masks are there" in said and "train: 4 of 4 images" in said
    )
    D.main(["cityscapes", "--root", str(tmp_path / "empty")])
    assert "not complete yet" in capsys.readouterr().out


def test_check_lists_everything_that_is_missing_or_broken_at_once(tmp_path, capsys):
    root = pascal(tmp_path / "root", tmp_path / "splits")
    command = [
        "check",
        "--dataset",
        "pascal",
        "--root",
        str(root),
        "--labeled",
        "7",
        "--splits",
        str(tmp_path / "splits"),
    ]
    D.main(command)
    said = capsys.readouterr().out
    assert "nothing is missing" in said and "labeled: 7 images, 7 masks" in said and "per thousand" in said
    assert "61 x 83 (1)" in said and re.search(r"255 ignored +\d+\.\d+%", said) and re.search(r"1 aeroplane +\d", said)
    (root / "JPEGImages" / "2007_000000.jpg").unlink()
    (root / "JPEGImages" / "2007_000001.jpg").write_bytes(b"no image")
    (root / "SegmentationClass" / "2007_000002.png").unlink()
    save_palette(np.full((71, 79), 77), root / "SegmentationClass" / "2007_000003.png")
    with pytest.raises(InputError) as stop:
        D.main(command)
    said = str(stop.value)
    assert (
        "2007_000000 is missing" in said
        and "2007_000001.jpg could not be read" in said
        and "holds the value 77" in said
    )
    assert "mask of the labeled image 2007_000002 is missing" in said and "4 files are missing or broken" in said


# ----------------------------------------------------------------------------------------------------------------------
# whole runs, in the datasets' own protocols


def end_to_end(tmp_path, dataset, build, *changes):
    root = build(tmp_path / "root", tmp_path / "splits")
    out = tmp_path / "run"
    script(
        "train.py", *TINY, "--dataset", dataset, "--root", root, "--splits", tmp_path / "splits", "--labeled", 2, "--weights", "none",
        "--iters", 3, "--warmup-epochs", 0, "--log-every", 1, "--out", out, *changes,
    )  # fmt: skip
    script("evaluate.py", out / "last.pth", "--device", "cpu", "--json", tmp_path / "scores.json")
    resolved = json.loads((out / "args.json").read_text())
    return resolved, json.loads((tmp_path / "scores.json").read_text())


def test_pascal_trains_and_is_scored_at_original_size(tmp_path):
    resolved, scores = end_to_end(tmp_path, "pascal", pascal, "--framework", "cutmixseg")
    assert (resolved["lr"], resolved["head_lr"], resolved["weight_decay"], resolved["sup_loss"]) == (
        0.001,
        0.01,
        1e-4,
        "ce",
    )
    assert scores["eval_mode"] == "original" and scores["images"] == 2 and len(scores["iou"]) == 21


def test_cityscapes_trains_with_ohem_and_is_scored_in_sliding_windows(tmp_path):
    resolved, scores = end_to_end(tmp_path, "cityscapes", cityscapes)
    assert (resolved["lr"], resolved["head_lr"], resolved["weight_decay"]) == (0.01, 0.01, 5e-4)
    assert (resolved["sup_loss"], scores["eval_mode"]) == ("ohem", "sliding") and 0 <= scores["miou"] <= 100


def test_a_checkpoint_is_scored_where_only_the_validation_images_are(tmp_path):
    end_to_end(tmp_path, "pascal", pascal)
    root = tmp_path / "root"
    for path in [*root.glob("*/2007*"), *root.glob("*/2008*")]:
        path.unlink()
    done = script("evaluate.py", tmp_path / "run" / "last.pth", "--device", "cpu")
    assert "dataset pascal, split val, images 2, eval_mode original" in done.stdout
    done = script("evaluate.py", tmp_path / "run" / "last.pth", "--device", "cpu", "--split", "train", check=False)
    assert "0 of the 8 train images of pascal have image and mask" in done.stderr and done.returncode == 1
    assert "some of them, without: 2007_000000, without: 2007_000001" in done.stderr


def test_lists_are_found_wherever_the_scripts_are_started(tmp_path):
    root = pascal(tmp_path / "root", tmp_path / "splits")
    done = script("data.py", "check", "--dataset", "pascal", "--root", root, "--labeled", 92, check=False, cwd=tmp_path)
    assert "labeled: 92 images, 0 masks" in done.stdout and "12028 files are missing or broken" in done.stderr
