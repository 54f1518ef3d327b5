"""data.py: the datasets in little trees of their layouts, partitions, bad input, views, mixing, loaders."""

import hashlib
import io
import itertools
import os
import re
import shutil
import socket
import struct
import zlib
from multiprocessing.resource_sharer import DupFd
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torchvision import transforms
from torchvision.transforms.v2 import functional as VF
from trees import Operations, camvid, cityscapes, folder, pascal, refused, save_palette

import data as D
import shapes as S
from data import SPLITS, InputError, cutmix, open_dataset, palette, random_view, read, training_loader
from shapes import generate

SUPERVISED = ("labeled", "val")


def ids(items):
    return [item.id for item in items]


@pytest.fixture
def shapes(tmp_path, monkeypatch):
    """A root for a few generated images."""
    monkeypatch.setattr(S, "TRAIN", 8)
    monkeypatch.setattr(S, "VAL", 3)
    return tmp_path / "data"


@pytest.fixture
def become(monkeypatch):
    """A function: from now on this is process `rank` of `world`."""
    return lambda rank, world: monkeypatch.setattr(D, "rank_and_world", lambda: (rank, world))


# ----------------------------------------------------------------------------------------------------------------------
# datasets


def test_shapes_hold_every_class_in_any_color_and_a_255_border_around_objects():
    images, masks = map(np.stack, zip(*((np.asarray(image), mask) for image, mask in map(generate, range(150)))))
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
        assert all(map(np.array_equal, read(item, data), generate(int(item.id.removeprefix("val/")))))
    written = {path: path.stat().st_mtime_ns for path in shapes.rglob("*")}
    open_dataset("shapes", shapes, 2)
    assert written == {path: path.stat().st_mtime_ns for path in shapes.rglob("*")}
    assert ids(open_dataset("folder", shapes / "shapes", 4).labeled) == ids(data.labeled)


def test_the_slower_of_two_processes_takes_what_the_faster_one_has_written(shapes, monkeypatch):
    S.write_shapes(shapes.parent / "ready")

    def late(index):
        if index == 5:
            shutil.copytree(shapes.parent / "ready", shapes / "shapes")
        return generate(index)

    monkeypatch.setattr(S, "generate", late)
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
    assert ids(open_dataset("camvid", root, ["train0", "train3"], use=("test",)).test) == ["test0", "test1"]
    root = camvid(tmp_path / "partial")
    for name in ("trainannot/train1.png", "trainannot/train0.png", "valannot/val0.png"):
        (root / name).unlink()
    data = open_dataset("camvid", root, ["train3"], use=("labeled", "unlabeled"))  # unlabeled images need no masks
    assert ids(data.unlabeled) == [f"train{i}" for i in (0, 1, 2, 4, 5)]
    views = D.TrainingViews(data, 32, 0)
    blank = [D.sample_index(5, 0, "order_u", n) for n in range(5) if (views[n, True, True]["truth"] == 255).all()]
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
        ("camvid", root, "no.txt", None, "--labeled no.txt is not a file; expected a number, all, or a file"),
        ("pascal", voc, "1/8", splits, r"1/8 is not a file; expected a number of \[2, 7, 1464\], all, or a file"),
        ("camvid", root, tmp_path / "list.txt", None, r"2 ids are not .*, first \.\./.*; .* like train0,"),
        ("camvid", root, "all", None, r"has no unlabeled images; all are labeled; use --framework supervised, or"),
        ("camvid", tmp_path / "nowhere", 2, None, "camvid under .* has no training images"),
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
    for mask in (root / "trainannot").iterdir():
        mask.unlink()
    refused("no training image of camvid has a mask; expected some; docs/faq.md", open_dataset, "camvid", root, 2)


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
    refused(r"classes\.txt names 255 classes; expected at most 254", open_dataset, "folder", root, "all")
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
    says = "1 ids are not .*, first val/photo 0; .* and no validation image"
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
def test_a_bad_labeled_file_is_named_by_reading_counting_and_loading(tmp_path, file, bad, says):
    data = open_dataset("camvid", camvid(tmp_path), 2)
    bad.save(getattr(data.labeled[0], file))
    loader = training_loader(data, range(2), 1, 32, 0, workers="77" in says)
    for call, *args in ((read, data.labeled[0], data), (D.class_pixels, data, data.labeled), (list, loader)):
        refused(says, call, *args)


def test_each_process_counts_the_pixels_of_each_class_in_its_share(tmp_path, become):
    data = open_dataset("camvid", camvid(tmp_path), 2)
    for rank in range(2):
        become(rank, 2)
        masks = [np.asarray(read(item, data)[1]) for item in data.val[rank::2]]
        assert D.class_pixels(data, data.val).tolist() == np.bincount(np.ravel(masks), minlength=256).tolist()


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


def plain_strong_view(weak, order, *parameters):
    """torchvision's functions one after the other, without rounding."""
    *factors, gray, sigma = map(float, parameters)
    x = VF.to_dtype(weak, torch.float32, scale=True)
    jitter = (VF.adjust_brightness, VF.adjust_contrast, VF.adjust_saturation, VF.adjust_hue)
    for part in order:
        x = jitter[part](x, factors[part])
    x = VF.rgb_to_grayscale(x, 3) if gray else x
    return 255 * (VF.gaussian_blur(x, [9, 9], [sigma, sigma]) if sigma >= 0.1 else x)


@pytest.mark.parametrize("view", [0, 1])
def test_strong_views_are_torchvision_s_all_in_the_order_of_their_step(view):
    weak = torch.randint(0, 256, (12, 3, 21, 30), dtype=torch.uint8)
    weak[:2] = weak[:2, :1]  # gray
    weak[2:5] = weak[2:5] // 128 * 255  # black, white and full colors: two channels are often equal
    weak[5:7] = weak[5:7, :, :1, :1]  # one color everywhere
    for step in range(5, 25):
        order = D.generator(3, "jitter", step, view).permutation(4)
        parameters = [D.strong_parameters(3, 12 * step + i, view) for i in range(12)]
        expected = [plain_strong_view(x, order, *strength) for x, strength in zip(weak, parameters)]
        strong = D.strong_views(weak, 3, step, view)
        torch.testing.assert_close(strong, torch.stack(expected), atol=0.01, rtol=0)  # of 255
        torch.testing.assert_close(strong[5:7], strong[5:7, :, :1, :1].expand(-1, -1, 21, 30), atol=0.001, rtol=0)


def test_strong_parameters_have_the_promised_ranges_and_shares():
    table = np.array([D.strong_parameters(0, number) for number in range(4000)])
    factors, gray, sigmas = table[:, :4], table[:, 4], table[:, 5]
    jitter, blur = (factors != (1, 1, 1, 0)).all(1), sigmas >= 0.1
    shares = [jitter, gray, blur, jitter * gray, jitter & blur, gray * blur]  # each on its own
    assert np.mean(shares, 1) == pytest.approx([0.8, 0.2, 0.5, 0.16, 0.4, 0.1], abs=0.03) and {*gray} == {0, 1}
    assert (factors[~jitter] == (1, 1, 1, 0)).all() and (sigmas[~blur] == 0.01).all()
    orders = [D.generator(0, "jitter", step, 0).permutation(4) for step in range(3200)]
    orders, counts = np.unique(orders, axis=0, return_counts=True)
    assert len(orders) == 24 and counts.min() > 90 and counts.max() < 180  # 133 each
    for values, low, high in [*((column, 0.5, 1.5) for column in factors[jitter, :3].T),
                              (factors[jitter, 3], -0.25, 0.25), (sigmas[blur], 0.1, 2.0)]:  # fmt: skip
        distance = np.sort(values - low) / (high - low) - np.linspace(0, 1, len(values))  # Kolmogorov and Smirnov's
        assert np.abs(distance).max() < 0.04


def test_a_strong_view_is_the_same_in_any_process_and_eighty_operations_make_those_of_a_batch_of_any_size(become):
    weak, state = torch.randint(0, 256, (6, 3, 16, 20), dtype=torch.uint8), torch.get_rng_state()
    with Operations() as six:
        strong = D.strong_views(weak, 0, 4)
    assert strong.shape == weak.shape and strong.dtype == torch.float32
    assert torch.equal(torch.get_rng_state(), state)
    for seed, step, view in ((1, 4, 0), (0, 5, 0), (0, 4, 1)):
        assert (D.strong_views(weak, seed, step, view) - strong).abs().mean() > 5
    for rank, alone in enumerate(weak.split(1)):
        become(rank, 6)
        with Operations() as one:
            again = D.strong_views(alone, 0, 4)
        torch.testing.assert_close(again[0], strong[rank], atol=0.001, rtol=0)
        assert one.launched == six.launched <= 80


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
    passes = [[D.sample_index(7, 0, "order_u", 7 * epoch + place) for place in range(7)] for epoch in range(3)]
    assert all(sorted(order) == [*range(7)] for order in passes)
    assert passes[0] != passes[1] != passes[2]


def same(one, two):
    return one.keys() == two.keys() and all(np.array_equal(one[name], two[name]) for name in one)


def test_a_broken_unlabeled_image_gives_one_warning_a_worker_and_the_next_takes_its_place(shapes, capfd):
    data = open_dataset("shapes", shapes, 3)
    views = D.TrainingViews(data, 32, 0)
    whole = [views[n, True, True] for n in range(5)]
    items = [data.unlabeled[D.sample_index(5, 0, "order_u", n)] for n in range(5)]
    items[2].image.write_bytes(b"")
    items[4].mask.write_bytes(b"")  # as good as none
    used = [*items[:2], items[3], items[3], items[4]._replace(mask=None)]
    for n, item in enumerate(used):
        new = random_view(*read(item, data), 32, data.scales, D.generator(0, "view_u", n))
        assert same(views[n, True, True], whole[n] | dict(zip(("weak", "truth", "valid"), new)))
    loader = training_loader(data, range(4), 5, 32, 0, workers=2)
    for workers, samples in ((1, (views[2, True, flag] for flag in (True, False))), (2, loader)):
        assert len([*samples]) == 2 * workers
        warnings = capfd.readouterr().err.splitlines()
        assert len(warnings) == workers and warnings[0].startswith(f"warning: {items[2].image} could not be read (")
        assert all(warning.endswith("; the next image is used") for warning in warnings)
    for item in data.unlabeled:
        item.image.write_bytes(b"")
    says = "none of the unlabeled images can be read; `python tools/prepare.py check"
    refused(says, views.__getitem__, (0, True, False))


def batches(root, steps, batch_size, workers=0, seed=0, **when):
    return list(training_loader(open_dataset("shapes", root, 3), steps, batch_size, 32, seed, workers, **when))


def test_neither_workers_nor_an_interruption_nor_processes_change_a_batch(shapes, become):
    whole = batches(shapes, range(4), 4)
    assert len(whole) == 4 and whole[0]["weak"].shape == (4, 3, 32, 32) and whole[0]["y"].dtype == torch.uint8
    assert all(map(same, whole, batches(shapes, range(4), 4, workers=2)))
    assert all(map(same, whole[2:], batches(shapes, range(2, 4), 4)))
    assert not same(whole[0], batches(shapes, range(1), 4, seed=1)[0])
    shares = []
    for rank in range(2):
        become(rank, 2)
        shares.append(batches(shapes, range(4), 2))
    for batch, *parts in zip(whole, *shares):
        assert same(batch, {name: np.concatenate([part[name] for part in parts]) for name in batch})


def test_a_worker_says_nothing_if_the_main_process_is_interrupted_while_it_takes_a_batch(shapes, monkeypatch, capfd):
    take = DupFd.detach

    def interrupted_before(handle):
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(handle._id[0])  # and close it at once, as an interrupted process does
        return take(handle)  # after it, because the worker serves one connection at a time

    monkeypatch.setattr(DupFd, "detach", interrupted_before)
    assert len(batches(shapes, range(2), 1, workers=1)) == 2
    assert capfd.readouterr().err == ""


def test_an_unlabeled_image_is_opened_after_the_warm_up_and_its_ground_truth_for_logged_steps(shapes, monkeypatch):
    whole, unlabeled = batches(shapes, range(6), 4), open_dataset("shapes", shapes, 3).unlabeled
    opened, open_image = set(), D.open_image
    monkeypatch.setattr(D, "open_image", lambda path, mode: opened.add(path) or open_image(path, mode))
    when = {"unlabeled": lambda step: step >= 2, "truth": lambda step: step == 4}
    for step, wanted in enumerate(whole):
        if step < 2:
            wanted = {name: wanted[name] for name in "xy"}
        elif step != 4:
            wanted["truth"] = torch.full_like(wanted["truth"], 255)
        assert same(batches(shapes, [step], 4, **when)[0], wanted)
        assert bool(opened & {item.image for item in unlabeled}) == (step >= 2)
        assert bool(opened & {item.mask for item in unlabeled}) == (step == 4)
        opened.clear()


def test_evaluation_shares_hold_every_image_exactly_once_and_whole_and_are_normalized_on_the_device(shapes, become):
    data, seen = open_dataset("shapes", shapes, 3), []
    for rank, world, count in ((0, 2, 2), (1, 2, 1), (3, 4, 0)):
        become(rank, world)
        share = [*D.evaluation_loader(data, data.val, torch.device("cpu"))]
        assert len(share) == count
        seen += share
    for (image, mask), index in zip(seen, (0, 2, 1)):
        for one, whole in zip((image[0], mask), read(data.val[index], data)):
            assert one.dtype == torch.uint8 and torch.equal(one, VF.pil_to_tensor(whole))
        torch.testing.assert_close(D.normalize(image), transforms.Normalize(D.MEAN, D.STD)(image / 255))
