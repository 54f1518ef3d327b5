"""data.py: the datasets in little trees of their layouts, partitions, bad input, views, mixing, loaders."""

import hashlib
import io
import itertools
import os
import re
import shutil
import struct
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torchvision import transforms
from torchvision.transforms.v2 import functional as VF
from trees import Operations, camvid, cityscapes, folder, pascal, refused, save_palette

import data as D
from data import SPLITS, InputError, cutmix, draw_shapes, open_dataset, palette, random_view, read, training_loader

SUPERVISED = ("labeled", "val")


def ids(items):
    return [item.id for item in items]


@pytest.fixture
def shapes(tmp_path, monkeypatch):
    """A root for a few drawn images."""
    monkeypatch.setattr(D, "SHAPES_TRAIN", 8)
    monkeypatch.setattr(D, "SHAPES_VAL", 3)
    return tmp_path / "data"


# ----------------------------------------------------------------------------------------------------------------------
# datasets


def test_shapes_hold_every_class_in_any_color_and_a_255_border_around_objects():
    images, masks = map(np.stack, zip(*((np.asarray(image), mask) for image, mask in map(draw_shapes, range(150)))))
    assert set(np.unique(masks)) == {0, 1, 2, 3, 4, 5, 6, 255}
    beside = (masks[:, :, 1:] != masks[:, :, :-1]) & (masks[:, :, 1:] != 255) & (masks[:, :, :-1] != 255)
    assert beside.mean() < 0.002  # classes hardly ever touch without a border between them
    for c in range(1, 7):
        of_class = [image[mask == c].mean(0) for image, mask in zip(images, masks) if (mask == c).any()]
        assert len(of_class) > 50 and np.abs(np.mean(of_class, 0) - 128).max() < 20


def test_shapes_are_a_function_of_their_index_written_once_as_the_folder_they_are_read_from(shapes):
    data = open_dataset("shapes", shapes, 4)
    assert ids(data.labeled) == ["0000", "0002", "0004", "0006"]  # evenly spaced
    assert ids(data.unlabeled) == ["0001", "0003", "0005", "0007"]
    assert ids(data.val) == ["val/0008", "val/0009", "val/0010"]
    for item in data.labeled + data.unlabeled + data.val:
        assert all(map(np.array_equal, read(item, data), draw_shapes(int(item.id.removeprefix("val/")))))
    written = {path: path.stat().st_mtime_ns for path in shapes.rglob("*")}
    open_dataset("shapes", shapes, 2)
    assert written == {path: path.stat().st_mtime_ns for path in shapes.rglob("*")}
    assert ids(open_dataset("folder", shapes / "shapes", 4).labeled) == ids(data.labeled)


def test_the_slower_of_two_processes_takes_what_the_faster_one_has_drawn(shapes, monkeypatch):
    ready = D.write_shapes(shapes.parent / "ready")
    copies = {5: lambda: shutil.copytree(ready, shapes / "shapes")}
    monkeypatch.setattr(D, "draw_shapes", lambda i: (copies.get(i, int)(), draw_shapes(i))[1])
    (shapes / "shapes-1.tmp").mkdir(parents=True)  # of a process that was killed
    assert len(open_dataset("shapes", shapes, 4).val) == 3
    assert {path.name for path in shapes.iterdir()} == {"shapes", "shapes-1.tmp"}


def test_camvid_is_found_in_the_root_or_below_it_and_void_is_ignored(tmp_path):
    camvid(tmp_path / "camvid", test=1)
    for root in (tmp_path, tmp_path / "camvid"):
        data = open_dataset("camvid", root, 2)
        assert ids(data.labeled) == ["train0", "train3"] and ids(data.unlabeled) == [f"train{i}" for i in (1, 2, 4, 5)]
        assert ids(data.val) == ["val0", "val1", "val2"] and ids(data.test) == ["test0"]
    mask = np.asarray(read(data.labeled[0], data)[1])
    assert set(np.unique(mask)) == {0, 3, 255} and (mask[-1] == 255).all()
    everything = open_dataset("camvid", tmp_path, "all", use=SUPERVISED)
    assert len(everything.labeled) == 6 and not everything.unlabeled


def test_only_the_parts_in_use_need_files(tmp_path):
    root = camvid(tmp_path / "test only", train=0, val=0, test=2)
    for labeled in (2, "all", ["train0", "train3"]):
        assert ids(open_dataset("camvid", root, labeled, use=("test",)).test) == ["test0", "test1"]
    root = camvid(tmp_path / "partial")
    for name in ("trainannot/train1.png", "trainannot/train0.png", "valannot/val0.png"):
        (root / name).unlink()
    data = open_dataset("camvid", root, ["train3"], use=("labeled", "unlabeled"))  # unlabeled images need no masks
    assert ids(data.unlabeled) == [f"train{i}" for i in (0, 1, 2, 4, 5)]
    views = D.TrainingViews(data, 32, "fixmatch", 0)
    blank = [D.sampled(5, 0, "order_u", n) for n in range(5) if (views[n]["truth"] == 255).all()]
    assert sorted(blank) == [0, 1]
    says = "1 of 3 val images of camvid have no mask under .*, first val0; docs.faq"
    refused(says, open_dataset, "camvid", root, ["train3"])


def test_bad_partitions_roots_and_lists_get_one_sentence(tmp_path):
    root, voc, splits = camvid(tmp_path / "good"), tmp_path / "voc", tmp_path / "splits"
    pascal(voc, splits).joinpath("JPEGImages", "2008_000002.jpg").unlink()
    (tmp_path / "list.txt").write_text("train0\nnobody\n../../etc/passwd\n")
    for name, place, labeled, lists, says in (
        ("camvid", root, 7, None, "--labeled 7 is impossible; expected 1 to 6 images with a mask"),
        ("camvid", root, 0, None, "--labeled 0 is impossible; expected 1 to 6 images with a mask"),
        ("camvid", root, "no.txt", None, "the list no.txt is not there, or empty; expected one image id per line"),
        ("camvid", root, tmp_path / "list.txt", None, r"2 ids are not in .*, first \.\./.*; .* like train0,"),
        ("camvid", root, "all", None, r"has no unlabeled images; use --framework supervised, or fewer labels"),
        ("camvid", tmp_path / "nowhere", 2, None, "camvid under .*nowhere has no training images"),
        ("pascal", voc, 100, splits, r"no list of 100 labeled images; expected one of \[2, 7, 1464\], or a file"),
        ("pascal", voc, 92, None, "92 of 92 labeled images of pascal have no image"),
        ("pascal", voc, 2, splits, "1 of 6 unlabeled images of pascal have no image .*first 2008_000002; "),
        ("cityscapes", root, 186, None, "expected the folders leftImg8bit, gtFine in it, or in cityscapes below it"),
    ):
        refused(says, open_dataset, name, place, labeled, lists)
    assert len(open_dataset("pascal", voc, 2, splits, use=SUPERVISED).unlabeled) == 6
    refused("camvid under .* has no test images; expected some", open_dataset, "camvid", root, 2, use=("test",))
    (root / "trainannot" / "train0.png").unlink()
    says = "1 of 1 labeled images of camvid have no mask under .*, first train0"
    refused(says, open_dataset, "camvid", root, ["train0"])


def test_a_folder_has_labeled_unlabeled_and_validation_images_in_val_or_val_txt_and_names_of_its_classes(tmp_path):
    root = folder(tmp_path / "mine")
    data = open_dataset("folder", root, "all")
    assert ids(data.labeled) == [f"photo {i}" for i in range(4)] and ids(data.unlabeled) == ["photo 4", "photo 5"]
    assert ids(data.val) == ["val/photo 0", "val/photo 1"] and data.classes == ("class 0", "class 1", "class 2")
    assert all(item.mask is None for item in data.unlabeled) and not data.test
    for item in data.labeled + data.val:
        image, mask = read(item, data)
        assert image.mode == "RGB" and image.size == mask.size == (64, 48) and set(np.unique(mask)) == {0, 1, 2}
    shutil.rmtree(root / "val")
    says = r"has neither val/ nor val\.txt; `python tools/own_images\.py .*` writes"
    refused(says, open_dataset, "folder", root, "all")
    (root / "val.txt").write_text("photo 3\nphoto 1.png\n\nphoto 3\n")
    data = open_dataset("folder", root, "all")
    assert ids(data.val) == ["photo 3", "photo 1"] and ids(data.labeled) == ["photo 0", "photo 2"]
    (root / "val.txt").write_text("photo 77\n")
    refused(r"val\.txt names photo 77, which is not in images/; correct", open_dataset, "folder", root, "all")
    (root / "val.txt").write_text("photo 1\n")
    (root / "classes.txt").write_text("one\ntwo\none\n")
    refused(r"classes\.txt names one twice; expected every class once", open_dataset, "folder", root, "all")
    (root / "classes.txt").write_text("\n".join(map(str, range(255))))
    refused(r"classes\.txt names 255 classes; expected 254 at most", open_dataset, "folder", root, "all")
    says = r"--root \S+ is not the dataset; expected the folders images, masks in it$"
    refused(says, open_dataset, "folder", tmp_path / "nowhere", "all")


def test_links_are_followed_but_not_in_a_circle_and_what_is_no_image_of_the_folder_is_passed_over_or_named(tmp_path):
    images, elsewhere = tmp_path / "images", tmp_path / "elsewhere"
    names = "a.jpg", "scene.png/b.PNG", ".hidden/c.jpg", "._a.jpg", ".DS_Store", "Thumbs.db", "note.txt", "clip.mpg"
    names += "@eaDir/a.jpg", "#recycle/a.jpg", "__MACOSX/a.jpg", "lost+found/a.jpg", "$RECYCLE.BIN/a.jpg"
    for path in (*map(images.joinpath, names), elsewhere / "d .jpg ", elsewhere / "e\u0301.jpg"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
    (images / "linked").symlink_to(elsewhere)
    (elsewhere / "back").symlink_to(images)
    assert [*D.files(images)] == ["a", "linked/d ", "linked/\u00e9", "scene.png/b"]  # a letter and its accent are one
    (images / "linked" / "\u00e9.png").write_bytes(b"")
    refused(r"have the same name; remove one of them", D.files, images)
    (images / "linked" / "\u00e9.png").rename(images / os.fsdecode(b"caf\xe9.jpg"))
    refused(r"the name of .*caf.*jpg is not UTF-8; rename the file", D.files, images)


def test_a_list_may_hold_suffixes_spaces_folders_masks_other_unicode_forms_and_any_encoding(tmp_path):
    known, file = ["cow", "d ", "\u00e9", "v1.2"], tmp_path / "list.txt"
    lines = "images/cow.jpg", "JPEGImages/cow.jpg Masks/cow.png", "./images\\v1.2.jpg", "/home/me/images/cow.jpg,x"
    file.write_text("\n".join(lines))
    assert D.id_list(file, known) == ["cow", "cow", "v1.2", "cow"]
    file.write_text("val/images/cow.jpg\ncows\n")  # another image, and none
    assert D.id_list(file, known) == ["val/images/cow.jpg", "cows"]
    for encoding, lines in (("utf-8-sig", "cow.JPG\n\n d\ne\u0301\nv1.2\n"),
                            ("utf-16", "cow\r\nd \r\n\u00e9.png\r\nv1.2"),
                            ("latin-1", " cow \nd .jpg\n\u00e9\nv1.2.png\n")):  # fmt: skip
        file.write_text(lines, encoding)
        assert D.id_list(file, known) == known, encoding
    file.write_text("val/photo 0\n")
    says = "1 ids are not in .*, first val/photo 0; .* images for validation"
    refused(says, open_dataset, "folder", folder(tmp_path / "mine"), file)


def test_the_lists_are_those_of_their_readme_sorted_whole_apart_from_validation_and_the_classic_ones_fine():
    rows = re.findall(r"^\| (\w+/\w+\.txt) \| (\d+) \| .* \| `(\w{64})` \|$", (SPLITS / "README.md").read_text(), re.M)
    assert {file for file, *_ in rows} == {path.relative_to(SPLITS).as_posix() for path in SPLITS.glob("*/*.txt")}
    lists = {}
    for file, count, checksum in rows:
        content = (SPLITS / file).read_bytes()
        members = content.decode().splitlines()
        lists[file[:-4]] = set(members)
        assert hashlib.sha256(content).hexdigest() == checksum
        assert members == sorted(set(members)) and len(members) == int(count)
        assert Path(file).stem in ("train", "val", count)
    for file, members in lists.items():
        train, val = (lists[f"{file.split('/')[0]}/{name}"] for name in ("train", "val"))
        assert file.endswith("/val") or members <= train and not members & val
    assert (len(lists["pascal/train"]), len(lists["cityscapes/train"])) == (10582, 2975)
    fine = lists["pascal/1464"]
    assert all(lists[f"pascal/{n}"] <= fine for n in (92, 183, 366, 732, 662, 1323))
    assert fine < lists["pascal/2646"] and fine < lists["pascal/5291"]


@pytest.mark.parametrize("below", ["", "VOC2012", "VOCdevkit/VOC2012"])
def test_pascal_is_cut_by_its_lists_and_masks_with_a_255_border_come_from_the_fine_or_coarse_folder(tmp_path, below):
    root = pascal(tmp_path / "root" / below, tmp_path / "splits")
    save_palette(np.zeros((83, 61)), root / "SegmentationClassAug" / "2007_000000.png")  # must not be taken
    save_palette(np.zeros((59, 97)), root / "SegmentationClass" / "2008_000001.png")  # nor this
    data = open_dataset("pascal", tmp_path / "root", 7, tmp_path / "splits")
    assert (len(data.unlabeled), len(data.val), len(data.classes)) == (1, 2, 21)
    folders = {item.id: item.mask.parent.name for item in data.labeled}
    assert folders.pop("2008_000001") == "SegmentationClassAug" and set(folders.values()) == {"SegmentationClass"}
    for i, item in enumerate(data.labeled):
        image, mask = read(item, data)
        assert image.mode == "RGB" and image.size == mask.size == (61 + 6 * i, 83 - 4 * i)
        mask = np.asarray(mask)
        assert mask[30, 20] == 1 + 2 * i and mask[11, 9] == 255 and mask[0, 0] == 0
        assert np.asarray(image)[30, 20].mean() > 150 > np.asarray(image)[2, 2].mean()


def test_cityscapes_reads_both_kinds_of_labels_and_ignores_what_is_no_class(tmp_path):
    root = cityscapes(tmp_path / "cityscapes", tmp_path / "splits")
    for place in (root, tmp_path):
        data = open_dataset("cityscapes", place, 2, tmp_path / "splits")
    assert ids(data.labeled) == ["aachen_000001_000019", "zurich_000000_000019"]
    assert [item.mask.stem.split("_")[-1] for item in data.labeled] == ["labelTrainIds", "labelIds"]
    for item in data.labeled + data.val:
        mask = np.asarray(read(item, data)[1])
        assert mask[30, 5] == 0 and mask[5, 5] == 13 and mask[45, 5] == 255
    assert len(data.classes) == 19 and [data.classes[c] for c in (0, 13, 18)] == ["road", "car", "bicycle"]
    values = data.values["labelIds"]
    assert [np.flatnonzero(values == c).tolist() for c in (0, 1, 13, 18)] == [[7], [8], [26], [33]]
    assert (values[[0, 3, 9, 30, 255]] == 255).all() and (values[34:255] == D.NO_CLASS).all()


@pytest.mark.parametrize("file, bad, says", [
    ("image", Image.new("I;16", (64, 48)), r"0\.png has more than 8 bits per channel; expected 8; "),
    ("mask", Image.new("L", (64, 48), 77), r"0\.png holds the value 77; expected .* from 0 to 10"),
    ("mask", Image.new("L", (65, 48)), r"0\.png has \(65, 48\) pixels, its image \(64, 48\)"),
    ("mask", Image.new("RGB", (64, 48)), r"0\.png is a RGB image; expected class indices"),
])  # fmt: skip
def test_a_bad_labeled_file_is_named_by_reading_checking_and_loading(tmp_path, file, bad, says):
    data = open_dataset("camvid", camvid(tmp_path), 2)
    bad.save(getattr(data.labeled[0], file))
    loader = training_loader(data, range(2), 1, 32, "supervised", 0, workers="77" in says)
    for call, *args in ((read, data.labeled[0], data), (D.check_annotations, data), (list, loader)):
        refused(says, call, *args)


def check(root, labeled, val):
    """Checks a folder of two labeled and two validation images, whose masks hold such values."""
    root = folder(root, images=3, annotated=2)
    for place, values in ((root, labeled), (root / "val", val)):
        for path in (place / "masks").iterdir():
            D.save_mask(np.resize(values, (48, 64)).astype(np.uint8), path)
    D.check_annotations(open_dataset("folder", root, "all"))


def test_what_cannot_be_learned_is_said_before_training(tmp_path, capsys, monkeypatch):
    for seconds, said in ((0.5, ""), (0.9, "reads 2 labeled and 2 validation images first\n")):  # of each of the four
        clock = iter(1 + seconds * np.arange(5))
        monkeypatch.setattr(D, "time", SimpleNamespace(monotonic=lambda: next(clock)))
        check(tmp_path, [0, 1, 2, 255], [0, 255])
        assert capsys.readouterr() == (said, "")
    monkeypatch.setattr(D, "time", SimpleNamespace(monotonic=lambda: 1))
    check(tmp_path, [0, 2], [1])
    assert capsys.readouterr() == ("", "warning: no labeled pixel is class 1, which cannot be learned\n")
    for labeled, val, says in (
        ([2, 255], [0, 1], "of folder show only 1 of its 3 classes, and 255 is none; ex"),
        ([255], [0, 1], "of folder show only 0 of its 3 classes, and 255 is none; ex"),
        ([0, 1, 2], [255], "the validation masks of folder are all 255; expected class indices to score"),
        ([0, 1, 2], [77], r"val/masks/photo \d\.png holds the value 77"),
    ):
        refused(says, check, tmp_path, labeled, val)


def encoded(image, kind, **options):
    """The bytes of an image's file."""
    image.save(content := io.BytesIO(), kind, **options)
    return content.getvalue()


def test_odd_files_load_and_broken_ones_are_named(tmp_path, monkeypatch):
    rng, path = np.random.default_rng(0), tmp_path / "photo.bmp"  # the suffix says nothing
    photo, exif = Image.fromarray(rng.integers(0, 256, (30, 40, 3), np.uint8)), Image.Exif()
    exif[0x0112] = 6  # stored lying on its side
    turned = photo.transpose(Image.Transpose.ROTATE_90)
    for content in (encoded(turned, "PNG", exif=exif), *(encoded(photo.convert(mode), kind) for mode, kind in (
            ("CMYK", "JPEG"), ("RGBA", "PNG"), ("LA", "PNG"), ("L", "PNG"), ("P", "PNG"), ("1", "PNG")))):  # fmt: skip
        path.write_bytes(content)
        image = D.open_image(path, "RGB")
        assert image.mode == "RGB" and image.size == photo.size
    jpeg, png = encoded(photo, "JPEG"), encoded(photo, "PNG")
    for content, place in itertools.product((jpeg, png), range(0, len(jpeg) - 8, 10)):
        for middle in (b"", rng.bytes(8) + content[place + 8 :]):  # cut, or with noise in it, which may stay unseen
            path.write_bytes(content[:place] + middle)
            try:
                D.open_image(path, "RGB")
            except InputError as error:
                assert str(path) in str(error)
            else:
                assert middle
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500)  # as beside a header that promises ten thousand million
    path.write_bytes(png)
    refused(re.escape(f"{path} is too large (Image size (1200 pixels)") + ".*tiles", D.open_image, path, "RGB")


def test_what_pillow_would_lose_without_a_word_is_refused_and_damaged_metadata_are_not(tmp_path):
    photo, path = Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 40, 3), np.uint8)), tmp_path / "a.tif"
    more = {"save_all": True, "append_images": [photo.rotate(180)]}
    overview = {"save_all": True, "append_images": [photo.resize((20, 15))]}
    exif, comment = Image.Exif(), PngInfo()
    exif[0x0112] = 6
    comment.add_text("comment", "long " * 10**6, zip=True)
    deep = bytearray(encoded(Image.new("I;16", (12, 5)), "PNG"))  # becomes four RGB pixels a row
    deep[16:26] = struct.pack(">IIBB", 4, 5, 16, 2)
    deep[29:33] = struct.pack(">I", zlib.crc32(deep[12:29]))
    bands = b"\x15\x01\x03\0\x01\0\0\0"  # TIFF's SamplesPerPixel, a short
    many = encoded(photo, "TIFF").replace(bands + b"\x03", bands + b"\x05")
    for content, says in (
        *((encoded(photo, kind, **more), "holds 2 pages; expected one; ") for kind in ("TIFF", "GIF", "PNG", "WEBP")),
        (b"P6 2 1 4095\n" + bytes(12), "has more than 8 bits per channel; expected 8; "),
        (deep, "has more than 8 bits per channel; expected 8; "), (many, "more bands than four; expected gray, RGB"),
        (encoded(photo, "TIFF", **overview), ""), (encoded(photo, "MPO", **more), ""),
        (encoded(photo, "PNG", pnginfo=comment), ""), (encoded(photo, "JPEG", exif=exif.tobytes()[:-9]), ""),
    ):  # fmt: skip
        path.write_bytes(content)
        for mode in ("RGB", "L"):
            if says:
                refused(f"{re.escape(str(path))} .*{says}", D.open_image, path, mode)
            else:
                assert D.open_image(path, mode).size == photo.size


def test_a_mask_that_is_no_png_file_by_its_content_is_refused(tmp_path):
    data = open_dataset("folder", folder(tmp_path), "all")
    Image.new("L", (64, 48)).save(data.labeled[0].mask, "JPEG")
    refused(r"photo 0\.png is a JPEG file; expected PNG of class indices", read, data.labeled[0], data)


def test_a_mask_is_saved_with_pascal_s_palette_and_makes_its_folder(tmp_path):
    mask = np.arange(256, dtype=np.uint8).reshape(8, 32)
    D.save_mask(torch.from_numpy(mask), tmp_path / "new" / "mask.png")
    image = Image.open(tmp_path / "new" / "mask.png")
    assert image.mode == "P" and np.array_equal(image, mask)
    assert np.array_equal(np.asarray(image.convert("RGB")).reshape(-1, 3), palette())
    some = [[0, 0, 0], [128, 0, 0], [0, 128, 0], [192, 128, 128], [0, 64, 128], [224, 224, 192]]
    assert palette()[[0, 1, 2, 15, 20, 255]].tolist() == some


# ----------------------------------------------------------------------------------------------------------------------
# views and mixing


@pytest.mark.parametrize("width, height", [(150, 100), (30, 200), (1, 7)])
def test_a_view_is_padded_cut_out_resized_and_flipped(width, height):
    pixels = np.random.default_rng(0).integers(0, 250, (height, width, 4), np.uint8)
    image, mask = Image.fromarray(pixels[..., :3].copy()), Image.fromarray(pixels[..., 3].copy())
    for seed in range(30):
        view = random_view(image, mask, 64, (0.5, 2.0), np.random.default_rng(seed))
        rng = np.random.default_rng(seed)
        side = round(64 / rng.uniform(0.5, 2.0))
        left, top = (int(rng.integers(max(length - side, 0) + 1)) for length in image.size)
        flip = rng.random() < 0.5
        for one, whole, padding, kind in (
            (view[0], np.asarray(image), [124, 116, 104], "BILINEAR"),  # ImageNet's mean
            (view[1], np.asarray(mask), 255, "NEAREST"),
            (view[2], np.ones((height, width), np.uint8), 0, "NEAREST"),
        ):
            plain = np.empty((height + side, width + side, *whole.shape[2:]), np.uint8)
            plain[:], plain[:height, :width] = padding, whole
            square = Image.fromarray(plain[top : top + side, left : left + side])
            expected = np.asarray(square.resize((64, 64), Image.Resampling[kind]))[:, :: -1 if flip else 1]
            assert np.array_equal(one.numpy() if one.dim() == 2 else one.permute(1, 2, 0).numpy(), expected)


def plain_strong_view(weak, factors, places, gray, sigma):
    """torchvision's functions one after the other, without rounding."""
    x = VF.to_dtype(weak, torch.float32, scale=True)
    jitter = (VF.adjust_brightness, VF.adjust_contrast, VF.adjust_saturation, VF.adjust_hue)
    for part in np.argsort(places):
        x = jitter[part](x, float(factors[part]))
    x = VF.rgb_to_grayscale(x, 3) if gray else x
    return 255 * (VF.gaussian_blur(x, [9, 9], [sigma, sigma]) if sigma >= 0.1 else x)


@pytest.mark.parametrize("stream", [0, 1])
def test_strong_views_are_torchvision_s(stream):
    weak = torch.randint(0, 256, (96, 3, 21, 30), dtype=torch.uint8)
    weak[:16] = weak[:16, :1]  # gray
    weak[16:40] = weak[16:40] // 128 * 255  # black, white and full colors: two channels are often equal
    weak[40:56] = weak[40:56, :, :1, :1]  # one color everywhere
    with torch.autocast("cpu", torch.bfloat16):
        strong = D.strong_views(weak, 3, range(5, 101), stream)
    expected = [plain_strong_view(x, *D.strong_parameters(3, n, stream)) for n, x in enumerate(weak, 5)]
    torch.testing.assert_close(strong, torch.stack(expected), atol=0.01, rtol=0)  # of 255
    torch.testing.assert_close(strong[40:56], strong[40:56, :, :1, :1].expand(-1, -1, 21, 30), atol=0.001, rtol=0)


def test_strong_parameters_have_the_promised_ranges_and_shares():
    factors, places, gray, sigmas = map(np.array, zip(*(D.strong_parameters(0, n) for n in range(4000))))
    jitter, blur = (factors != (1, 1, 1, 0)).all(1), sigmas >= 0.1
    shares = [jitter, gray, blur, jitter & gray, jitter & blur, gray & blur]  # each on its own
    assert np.mean(shares, 1) == pytest.approx([0.8, 0.2, 0.5, 0.16, 0.4, 0.1], abs=0.03)
    assert (factors[~jitter] == (1, 1, 1, 0)).all() and (sigmas[~blur] == 0.01).all()
    orders, counts = np.unique(places[jitter], axis=0, return_counts=True)
    assert len(orders) == 24 and counts.min() > 90 and counts.max() < 180  # 133 each
    for values, low, high in [*((column, 0.5, 1.5) for column in factors[jitter, :3].T),
                              (factors[jitter, 3], -0.25, 0.25), (sigmas[blur], 0.1, 2.0)]:  # fmt: skip
        distance = np.sort(values - low) / (high - low) - np.linspace(0, 1, len(values))  # Kolmogorov and Smirnov's
        assert np.abs(distance).max() < 0.04


def test_a_strong_view_depends_on_seed_number_and_stream_and_takes_sixty_operations_however_large_the_batch():
    weak, state = torch.randint(0, 256, (6, 3, 16, 20), dtype=torch.uint8), torch.get_rng_state()
    with Operations() as six:
        strong = D.strong_views(weak, 0, range(6))
    assert strong.shape == weak.shape and strong.dtype == torch.float32
    assert torch.equal(torch.get_rng_state(), state)
    for i, alone in enumerate(weak.split(1)):  # whatever the rest of the batch
        with Operations() as one:
            again = D.strong_views(alone, 0, [i])
        torch.testing.assert_close(again[0], strong[i], atol=0.001, rtol=0)
        assert one.count == six.count <= 60
    for seed, numbers, stream in ((1, range(6), 0), (0, range(6, 12), 0), (0, range(6), 1)):
        assert (D.strong_views(weak, seed, numbers, stream) - strong).abs().mean() > 5


def test_mixing_moves_image_and_maps_together_with_the_probability_that_is_asked_for():
    labels = torch.arange(4).view(4, 1, 1).expand(4, 40, 60).clone()
    images, odd, mixed = labels[:, None].repeat(1, 3, 1, 1).float(), labels % 2 == 1, {0.0: 0, 0.5: 0, 1.0: 0}
    for seed, probability in itertools.product(range(50), mixed):
        image, label, map = cutmix(np.random.default_rng(seed), probability, images, labels, odd)
        assert torch.equal(image, label[:, None].expand(-1, 3, -1, -1).float()) and torch.equal(map, label % 2 == 1)
        for i in range(4):
            foreign = label[i] != i
            mixed[probability] += foreign.any().item()
            assert set(label[i].unique().tolist()) <= {i, (i + 1) % 4}
            rows, columns = foreign.any(1).sum().item(), foreign.any(0).sum().item()
            assert foreign.sum() == rows * columns  # one box
            assert not foreign.any() or rows * columns / 2400 == pytest.approx(0.5, abs=0.03)
    assert mixed[0.0] == 0 and 70 < mixed[0.5] < 130 and mixed[1.0] == 200
    assert torch.equal(labels, torch.arange(4).view(4, 1, 1).expand(4, 40, 60))
    assert torch.equal(cutmix(np.random.default_rng(0), 1.0, images[2:3], labels[2:3])[0], images[2:3])


# ----------------------------------------------------------------------------------------------------------------------
# loaders


def test_every_pass_shows_every_image_once_and_in_another_order():
    passes = [[D.sampled(7, 0, "order_u", 7 * epoch + place) for place in range(7)] for epoch in range(3)]
    assert all(sorted(order) == [*range(7)] for order in passes)
    assert passes[0] != passes[1] != passes[2]


def same(one, two):
    return one.keys() == two.keys() and all(np.array_equal(one[name], two[name]) for name in one)


def test_a_broken_unlabeled_image_costs_only_its_sample_and_the_next_one_takes_its_place(shapes):
    data = open_dataset("shapes", shapes, 3)
    views = D.TrainingViews(data, 32, "fixmatch", 0)
    whole, images = [views[n] for n in range(5)], [data.unlabeled[D.sampled(5, 0, "order_u", n)] for n in range(5)]
    images[2].image.write_bytes(b"")
    assert all(same(whole[n], views[n]) and not whole[n]["broken"] for n in (0, 1, 3, 4))
    instead = random_view(*read(images[3], data), 32, data.scales, D.generator(0, "view_u", 2))
    reason = views[2]["broken"]
    assert same(views[2], whole[2] | dict(zip(("weak", "truth", "valid"), instead)) | {"broken": reason})
    assert reason.startswith(f"{images[2].image} could not be read")
    for item in data.unlabeled:
        item.image.write_bytes(b"")
    refused("none of the unlabeled images can be read; `python tools/prepare.py check`", views.__getitem__, 0)


def batches(root, steps, batch_size, *more, seed=0, framework="fixmatch"):
    data = open_dataset("shapes", root, 3)
    return list(training_loader(data, steps, batch_size, 32, framework, seed, *more))


def test_neither_workers_nor_an_interruption_nor_processes_change_a_batch_and_supervised_ones_are_half_of_it(shapes):
    whole = batches(shapes, range(4), 4)
    assert len(whole) == 4 and whole[0]["weak"].shape == (4, 3, 32, 32) and whole[0]["y"].dtype == torch.uint8
    assert all(map(same, whole, batches(shapes, range(4), 4, 2)))
    assert all(map(same, whole[2:], batches(shapes, range(2, 4), 4)))
    for batch, *parts in zip(whole, *(batches(shapes, range(4), 2, 0, rank, 2) for rank in range(2))):
        assert same(batch, {name: np.concatenate([part[name] for part in parts]) for name in batch})
    assert not same(whole[0], batches(shapes, range(1), 4, seed=1)[0])
    assert same(batches(shapes, range(1), 4, framework="supervised")[0], {name: whole[0][name] for name in "xy"})


def test_evaluation_shares_hold_every_image_exactly_once_and_whole_and_are_normalized_on_the_device(shapes):
    data = open_dataset("shapes", shapes, 3)
    shares = [list(D.evaluation_loader(data, data.val, torch.device("cpu"), 0, rank, 2)) for rank in range(2)]
    seen = sum(shares, [])
    assert len(seen) == 3 and not list(D.evaluation_loader(data, data.val, torch.device("cpu"), 0, 3, 4))
    for (image, mask), index in zip(seen, (0, 2, 1)):
        for one, whole in zip((image[0], mask), read(data.val[index], data)):
            assert one.dtype == torch.uint8 and torch.equal(one, VF.pil_to_tensor(whole))
        torch.testing.assert_close(D.normalize(image), transforms.Normalize(D.MEAN, D.STD)(image / 255))
