"""data.py: the drawn dataset, partitions, views, mixing, and what it says about bad input."""

import io
import random
import struct
import zlib

import benchmark
import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from torchvision.transforms.v2.functional import pil_to_tensor

import data as D
from data import (
    InputError,
    Item,
    cutmix,
    draw_shapes,
    drawn,
    open_dataset,
    palette,
    random_view,
    read,
    training_loader,
)


def camvid(root, train=4, val=2, size=(40, 30)):
    """A little CamVid tree: masks are upper half 0, lower half 3, last row void (11); images show the mask."""
    mask = np.zeros((size[1], size[0]), np.uint8)
    mask[size[1] // 2 :], mask[-1] = 3, 11
    for split, count in (("train", train), ("val", val)):
        (root / split).mkdir(parents=True)
        (root / f"{split}annot").mkdir()
        for i in range(count):
            Image.fromarray(np.stack([mask * 20 + i] * 3, 2)).save(root / split / f"{split}{i}.png")
            Image.fromarray(mask).save(root / f"{split}annot" / f"{split}{i}.png")
    return root


def test_shapes_are_a_pure_function_of_their_index():
    image, mask = draw_shapes(7)
    draw_shapes.cache_clear()
    again, same = draw_shapes(7)
    assert np.array_equal(image, again) and np.array_equal(mask, same)
    assert not np.array_equal(image, draw_shapes(8)[0])


def test_shapes_hold_every_class_and_a_255_border_around_objects():
    masks = np.stack([draw_shapes(i)[1] for i in range(60)])
    assert set(np.unique(masks)) == {0, 1, 2, 3, 4, 5, 6, 255}
    assert len(D.DATASETS["shapes"].classes) == 7
    beside = (masks[:, :, 1:] != masks[:, :, :-1]) & (masks[:, :, 1:] != 255) & (masks[:, :, :-1] != 255)
    assert beside.mean() < 0.002  # classes hardly ever touch without a border between them


def test_color_says_nothing_about_the_class_of_a_shape():
    means = {c: [] for c in range(1, 7)}
    for i in range(300):
        image, mask = map(np.asarray, draw_shapes(i))
        for c in set(np.unique(mask)) - {0, 255}:
            means[c].append(image[mask == c].mean(0))
    for values in means.values():
        assert np.abs(np.mean(values, 0) - 128).max() < 20


def test_the_unlabeled_images_are_the_training_images_that_are_not_labeled():
    data = open_dataset("shapes", "nowhere", 12)
    labeled, unlabeled, val = ({item.id for item in items} for items in (data.labeled, data.unlabeled, data.val))
    assert len(labeled) == 12 and not labeled & unlabeled and not (labeled | unlabeled) & val
    assert len(labeled | unlabeled) == D.SHAPES_TRAIN and len(val) == D.SHAPES_VAL
    assert [item.image for item in data.labeled] == [i * 40 for i in range(12)]  # evenly spaced


def test_camvid_is_found_in_the_root_or_below_it_and_void_is_ignored(tmp_path):
    camvid(tmp_path / "camvid")
    for root in (tmp_path, tmp_path / "camvid"):
        data = open_dataset("camvid", root, 2)
        assert (len(data.labeled), len(data.unlabeled), len(data.val)) == (2, 2, 2)
    image, mask = read(data.labeled[0], data)
    assert set(np.unique(mask)) == {0, 3, 255} and (np.asarray(mask)[-1] == 255).all()


def test_unlabeled_images_need_no_mask(tmp_path):
    root = camvid(tmp_path)
    (root / "trainannot" / "train1.png").unlink()
    data = open_dataset("camvid", root, 2)
    assert [item.id for item in data.unlabeled] == ["train1", "train3"] and data.unlabeled[0].mask is None
    views = D.TrainingViews(data, 32, "fixmatch", 0)
    samples = [views[n] for n in range(6)]
    assert {s["id_u"] for s in samples} == {"train1", "train3"}
    assert all((s["truth"] == 255).all() for s in samples if s["id_u"] == "train1")


def test_a_file_of_ids_is_a_partition(tmp_path):
    root = camvid(tmp_path / "camvid")
    (tmp_path / "mine.txt").write_text("train3\ntrain0\n")
    assert [item.id for item in open_dataset("camvid", root, tmp_path / "mine.txt").labeled] == ["train0", "train3"]


def test_a_published_list_beats_even_spacing(tmp_path):
    root = camvid(tmp_path / "root")
    (tmp_path / "splits" / "camvid").mkdir(parents=True)
    (tmp_path / "splits" / "camvid" / "1.txt").write_text("train2\n")
    assert [item.id for item in open_dataset("camvid", root, 1, tmp_path / "splits").labeled] == ["train2"]
    with pytest.raises(InputError, match=r"no list of 3 labeled images; expected one of \[1\]"):
        open_dataset("camvid", root, 3, tmp_path / "splits")


def numbered_image(width, height):
    """An image whose red and green are its own coordinates, and a mask that follows them."""
    x, y = np.meshgrid(np.arange(width), np.arange(height))
    image = np.stack([x, y, np.full_like(x, 255)], 2).astype(np.uint8)
    return Image.fromarray(image), Image.fromarray((x // 50 + 4 * (y // 50)).astype(np.uint8))


def test_a_view_keeps_image_and_mask_together_and_marks_its_padding():
    image, mask = numbered_image(150, 100)
    for seed in range(40):
        view, label, valid = random_view(image, mask, 120, (0.5, 2.0), np.random.default_rng(seed))
        assert view.shape == (3, 120, 120) and label.shape == valid.shape == (120, 120)
        assert torch.equal(valid, view[2] == 255) and torch.equal(label == 255, ~valid)
        expected = view[0].long() // 50 + 4 * (view[1].long() // 50)
        inside = valid & ((view[:2].long() + 4) % 50 > 8).all(0)  # interpolation may round at the edges of the tiles
        assert torch.equal(label.long()[inside], expected[inside])


def test_a_view_is_a_part_of_the_image_resized_as_pillow_does():
    image, mask = numbered_image(200, 160)
    for seed in range(10):
        rng = np.random.default_rng(seed)
        view, label, valid = random_view(image, mask, 64, (0.5, 2.0), rng)
        rng = np.random.default_rng(seed)
        side = round(64 / rng.uniform(0.5, 2.0))
        left, top = int(rng.integers(200 - side + 1)), int(rng.integers(160 - side + 1))
        rng.integers(1, size=2)  # no padding
        flip = rng.random() < 0.5
        for one, other, kind in ((view, image, "BILINEAR"), (label[None], mask, "NEAREST")):
            part = other.crop((left, top, left + side, top + side)).resize((64, 64), Image.Resampling[kind])
            part = pil_to_tensor(ImageOps.mirror(part) if flip else part)
            assert (one.int() - part.int()).abs().max() <= (kind == "BILINEAR")
        assert valid.all()


@pytest.mark.parametrize("width, height", [(30, 200), (1, 7), (65, 64), (128, 31)])
def test_odd_sizes_give_whole_views(width, height):
    image, mask = numbered_image(width, height)
    for seed in range(30):
        view, label, valid = random_view(image, mask, 64, (0.5, 2.0), np.random.default_rng(seed))
        scale = np.random.default_rng(seed).uniform(0.5, 2.0)
        rows, columns = valid.any(1).sum().item(), valid.any(0).sum().item()
        assert valid.sum() == rows * columns and torch.equal(label == 255, ~valid)
        assert abs(rows - min(64, height * scale)) <= 1 and abs(columns - min(64, width * scale)) <= 1


def test_scales_and_flips_are_spread_as_promised():
    image, mask = numbered_image(100, 100)
    flips, steps = 0, []
    for seed in range(400):
        view, _, valid = random_view(image, mask, 32, (0.5, 2.0), np.random.default_rng(seed))
        slope = (view[0, 16, -1].item() - view[0, 16, 0].item()) / 31
        flips += slope < 0
        steps.append(1 / abs(slope))
    assert 160 < flips < 240 and 0.45 < min(steps) < 0.6 and 1.8 < max(steps) < 2.3
    assert np.mean(steps) == pytest.approx(1.25, abs=0.08)


def test_the_strong_view_changes_colors_and_nothing_else():
    weak = random_view(*numbered_image(150, 150), 64, (0.5, 2.0), np.random.default_rng(0))[0]
    strong = D.strong_views(torch.stack([weak] * 20), 0, range(20))
    assert strong.shape == (20, *weak.shape) and strong.dtype == torch.uint8
    assert sum(not torch.equal(view, weak) for view in strong) > 15
    assert torch.equal(D.strong_views(weak[None], 0, [3])[0], strong[3])  # whatever the rest of the batch
    assert not torch.equal(D.strong_views(weak[None], 1, [3])[0], strong[3])


def test_strong_views_leave_the_generator_of_everything_else_alone():
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    D.strong_views(torch.zeros(2, 3, 16, 16, dtype=torch.uint8), 0, range(2))
    assert torch.equal(torch.rand(1), expected)


def test_mixing_moves_image_and_label_together():
    labels = torch.arange(4).view(4, 1, 1).expand(4, 40, 60).clone()
    images = labels[:, None].repeat(1, 3, 1, 1).float()
    mixed = 0
    for seed in range(50):
        rng = np.random.default_rng(seed)
        image, label = cutmix(images, labels, rng)
        assert torch.equal(image, label[:, None].expand(-1, 3, -1, -1).float())
        for i in range(4):
            foreign = (label[i] != i).float().mean().item()
            mixed += foreign > 0
            assert set(label[i].unique().tolist()) <= {i, (i + 1) % 4} and (
                foreign == 0 or foreign == pytest.approx(0.5, abs=0.03)
            )
    assert 70 < mixed < 130  # of 200, with probability one half
    assert torch.equal(labels, torch.arange(4).view(4, 1, 1).expand(4, 40, 60))


def test_mixing_a_batch_of_one_changes_nothing():
    image, label = torch.rand(1, 3, 8, 8), torch.zeros(1, 8, 8, dtype=torch.long)
    assert all(torch.equal(a, b) for a, b in zip(cutmix(image, label, np.random.default_rng(0), 1.0), (image, label)))


def test_every_pass_draws_every_image_once_and_in_another_order():
    items = [Item(str(i), i, None) for i in range(7)]
    passes = [[drawn(items, 0, "order_u", 7 * epoch + place).id for place in range(7)] for epoch in range(3)]
    assert all(sorted(order) == [item.id for item in items] for order in passes)
    assert passes[0] != passes[1] != passes[2]


def batches(steps, workers=0, rank=0, world=1, batch_size=2, seed=0):
    data = open_dataset("shapes", "", 3)
    return list(training_loader(data, steps, batch_size, 32, "fixmatch", seed, workers, rank, world))


def same(one, two):
    return one.keys() == two.keys() and all(
        torch.equal(one[k], two[k]) if torch.is_tensor(one[k]) else one[k] == two[k] for k in one
    )


def test_neither_workers_nor_an_interruption_change_a_batch():
    whole = batches(range(4))
    assert all(map(same, whole, batches(range(4), workers=2)))
    assert all(map(same, whole[2:], batches(range(2, 4))))
    assert not same(whole[0], batches(range(1), seed=1)[0])


def test_two_processes_see_together_what_one_sees():
    for step in zip(
        batches(range(3), batch_size=4), batches(range(3), rank=0, world=2), batches(range(3), rank=1, world=2)
    ):
        for name in ("x", "y", "weak", "valid", "truth"):
            assert torch.equal(step[0][name], torch.cat([step[1][name], step[2][name]]))


def test_evaluation_shares_hold_every_image_exactly_once():
    data = open_dataset("shapes", "", 3)
    shares = [D.evaluation_loader(data, data.val, rank=rank, world=5).dataset for rank in range(5)]
    assert sorted(item.id for share in shares for item in share) == [item.id for item in data.val]


def test_the_palette_is_pascal_s():
    colors = palette()
    assert colors[[0, 1, 2, 15, 20, 255]].tolist() == [
        [0, 0, 0],
        [128, 0, 0],
        [0, 128, 0],
        [192, 128, 128],
        [0, 64, 128],
        [224, 224, 192],
    ]


def broken(root, what):
    """Breaks one thing in a little CamVid tree."""
    image, mask = root / "train" / "train0.png", root / "trainannot" / "train0.png"
    if what == "truncated image":
        image.write_bytes(image.read_bytes()[:60])
    elif what == "text as image":
        image.write_text("not an image")
    elif what == "value outside the classes":
        Image.fromarray(np.full((30, 40), 77, np.uint8)).save(mask)
    elif what == "other size":
        Image.fromarray(np.zeros((30, 41), np.uint8)).save(mask)
    elif what == "color mask":
        Image.fromarray(np.zeros((30, 40, 3), np.uint8)).save(mask)
    return root


@pytest.mark.parametrize(
    "what, says",
    [
        ("truncated image", r"train0\.png could not be read \(.*\); replace the file"),
        ("text as image", r"train0\.png could not be read \(.*\); replace the file"),
        (
            "value outside the classes",
            r"trainannot/train0\.png holds the value 77; expected 0 to 11, and 255",
        ),
        ("other size", r"trainannot/train0\.png is 41 x 30, its image 40 x 30; expected the same size"),
        ("color mask", r"trainannot/train0\.png is a RGB image; expected one class index per pixel"),
    ],
)
def test_a_bad_file_is_named(tmp_path, what, says):
    data = open_dataset("camvid", broken(camvid(tmp_path), what), "all", use=())
    with pytest.raises(InputError, match=says):
        read(data.labeled[0], data)
    with pytest.raises(InputError, match=says):  # at once, where it is among the masks that are looked at
        open_dataset("camvid", tmp_path, "all")


def test_bad_datasets_and_partitions_get_one_sentence(tmp_path):
    root = camvid(tmp_path / "good")
    for labeled, says in (
        (5, "--labeled 5 is impossible; expected 1 to 4"),
        (0, "--labeled 0 is impossible; expected 1 to 4"),
        ("no.txt", "--labeled no.txt is no file that exists; expected a number, all, or a file"),
    ):
        with pytest.raises(InputError, match=says):
            open_dataset("camvid", root, labeled)
    (tmp_path / "list.txt").write_text("train0\nnobody\n")
    with pytest.raises(InputError, match=r"names 2 images, 1 of them not among the 4 training images \(first nobody\)"):
        open_dataset("camvid", root, tmp_path / "list.txt")
    with pytest.raises(InputError, match="dataset 'mnist' is unknown; expected one of shapes, camvid"):
        open_dataset("mnist", root, 1)
    with pytest.raises(InputError, match="is not there; expected a folder with train/, trainannot/"):
        open_dataset("camvid", tmp_path / "nowhere", 1)
    for path in (root / "valannot").iterdir():
        path.unlink()
    with pytest.raises(InputError, match="2 of 2 val images of camvid have no mask under .*, first val0, val1"):
        open_dataset("camvid", root, 1)
    (root / "valannot").rmdir()
    with pytest.raises(InputError, match="lacks valannot/; expected train/, trainannot/, val/, valannot/"):
        open_dataset("camvid", root, 1)


def test_an_empty_folder_and_a_labeled_image_without_mask_get_one_sentence(tmp_path):
    with pytest.raises(InputError, match="holds no train images of camvid"):
        open_dataset("camvid", camvid(tmp_path / "empty", train=0), 1)
    root = camvid(tmp_path / "partial")
    (root / "trainannot" / "train0.png").unlink()
    with pytest.raises(
        InputError, match="1 of 4 labeled images of camvid have no mask under .*, first train0; add what is missing"
    ):
        open_dataset("camvid", root, "all")


def test_a_crop_that_no_image_can_fill_is_refused(tmp_path):
    data = open_dataset("camvid", camvid(tmp_path), 2)
    with pytest.raises(
        InputError, match="--crop 81 is larger than the images can fill: train0 is 40 pixels long.*at most 80"
    ):
        training_loader(data, range(1), 2, 81, "fixmatch", 0)
    assert len(training_loader(data, range(1), 2, 80, "fixmatch", 0)) == 1


def mutated(path, rng):
    """Writes one odd or broken image of 40 x 30 pixels. Returns whether it must load, or None where it may."""
    image = Image.fromarray(rng.integers(0, 256, (30, 40, 3), dtype=np.uint8))
    content = io.BytesIO()
    kind = rng.integers(10)
    if kind < 4:
        image.save(content, ("JPEG", "PNG")[kind % 2])
        content = content.getvalue()
        place = int(rng.integers(1, len(content) - 1))
        if kind < 2:
            path.write_bytes(content[:place])  # a JPEG that lacks its last bytes alone may still be whole
            return None
        noise = rng.integers(0, 256, 8, dtype=np.uint8).tobytes()
        path.write_bytes(content[:place] + noise + content[place + 8 :])
        return None
    if kind == 4:
        path.write_bytes(b"\0" * int(rng.integers(0, 300)))
        return False
    if kind == 5:
        Image.fromarray(rng.integers(0, 65535, (30, 40)).astype(np.uint16)).save(path, "PNG")
        return False
    if kind == 6:  # a header that promises ten thousand million pixels
        image.save(content, "PNG")
        header = b"IHDR" + struct.pack(">II", 100_000, 100_000) + content.getvalue()[24:29]
        path.write_bytes(
            content.getvalue()[:12] + header + struct.pack(">I", zlib.crc32(header)) + content.getvalue()[33:]
        )
        return False
    if kind == 7:
        exif = Image.Exif()
        exif[0x0112] = 6  # stored lying on its side
        image.transpose(Image.Transpose.ROTATE_90).save(path, "JPEG", exif=exif)
    elif kind == 8:
        image.convert("CMYK").save(path, "JPEG")
    else:
        image.convert(("RGBA", "LA", "L", "1")[rng.integers(4)]).save(path, "PNG")
    return True


def test_three_hundred_odd_and_broken_files_load_right_or_are_named(tmp_path, capsys):
    root, rng = camvid(tmp_path, train=1), np.random.default_rng(0)
    verdicts = {}
    for i in range(300):
        path = root / "train" / f"odd{i:03d}{('.jpg', '.png')[rng.integers(2)]}"  # the suffix says nothing
        must = mutated(path, rng)
        try:
            loads = D.read_image(Item(path.stem, path, None)).size == (40, 30)
            assert loads or must is None
        except InputError as error:
            assert str(path) in str(error)
            loads = False
        assert must in (None, loads), path
        verdicts[path.stem] = loads
    assert 60 < sum(verdicts.values()) < 240
    (tmp_path / "list.txt").write_text("train0\n")
    with pytest.raises(InputError) as stop:
        D.main(["check", "--dataset", "camvid", "--root", str(root), "--labeled", str(tmp_path / "list.txt")])
    assert all((stem in str(stop.value)) != loads for stem, loads in verdicts.items())


# ----------------------------------------------------------------------------------------------------------------------
# the same views as the plain pipeline's, which resizes the whole image and works in Pillow throughout


def farthest(one, two):
    """The Kolmogorov-Smirnov distance of two samples: the largest difference of their distribution functions."""
    values = np.concatenate([one, two])
    shares = [np.searchsorted(np.sort(sample), values, side="right") / len(sample) for sample in (one, two)]
    return np.abs(shares[0] - shares[1]).max()


DRAWS = 400
BY_CHANCE = 1.63 * np.sqrt(2 / DRAWS)  # two samples of one distribution are farther apart in 1% of cases


@pytest.fixture
def rivals(tmp_path):
    """(data of one image whose red and green tell the place of each pixel, the plain pipeline on the same)."""
    y, x = np.mgrid[:48, :64]
    image = np.stack([x * 4, y * 5, (x + y) * 2 % 200], 2).astype(np.uint8)
    Image.fromarray(image).save(tmp_path / "image.png")
    Image.fromarray(np.zeros((48, 64), np.uint8)).save(tmp_path / "mask.png")
    item = Item("image", tmp_path / "image.png", tmp_path / "mask.png")
    data = D.Data("one", ("0",), (0.5, 2.0), D.indices(1), [item], [item], [item], [])
    return data, benchmark.PlainViews(item, 48, (0.5, 2.0))


def test_crops_are_distributed_like_the_plain_pipeline_s(rivals):
    data, plain = rivals
    views = D.TrainingViews(data, 48, "supervised", 0)
    random.seed(0)

    def features(image, mask):
        """Size and place of what is seen, and whether it is mirrored."""
        seen = mask == 0
        red, green = image[0][seen].astype(float), image[1][seen].astype(float)
        columns = np.flatnonzero(seen.any(0))
        row = image[0][np.flatnonzero(seen.any(1))[0]].astype(float)
        return (
            seen.any(0).sum(),
            seen.any(1).sum(),
            red.mean(),
            green.mean(),
            red.std(),
            row[columns[-1]] < row[columns[0]],
        )

    ours = np.array([features(views[n]["x"].numpy(), views[n]["y"].numpy()) for n in range(DRAWS)])
    pairs = (plain.weak() for _ in range(DRAWS))
    theirs = np.array([features(np.asarray(image).transpose(2, 0, 1), np.asarray(mask)) for image, mask in pairs])
    assert all(farthest(one, two) < BY_CHANCE for one, two in zip(ours.T, theirs.T))
    assert farthest(ours[:, 0], theirs[:, 0] * 0.8) > BY_CHANCE  # the distance sees a difference


def test_colors_are_distributed_like_the_plain_pipeline_s(rivals):
    data, plain = rivals
    image = read(data.labeled[0], data)[0]
    weak = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)
    random.seed(0)
    torch.manual_seed(0)

    def features(strong):
        """Brightness, contrast, color and sharpness of an image (3,H,W), 0..255."""
        gray = strong.mean(0)
        numbers = [*strong.mean((1, 2)), gray.std(), strong.std(0).mean(), np.abs(np.diff(gray)).mean()]
        return np.round(numbers, 1)  # many images are gray or as they were, and normalizing them back is not exact

    ours = np.array([features(D.strong_views(weak[None], 0, [n])[0].numpy().astype(float)) for n in range(DRAWS)])
    mean, std = (255 * np.array(values)[:, None, None] for values in (D.MEAN, D.STD))
    theirs = np.array([features(plain.strong(image).numpy() * std + mean) for _ in range(DRAWS)])
    distances = [farthest(one, two) for one, two in zip(ours.T, theirs.T)]
    assert max(distances) < BY_CHANCE, distances
    assert farthest(ours[:, 3], theirs[:, 3] * 1.3) > BY_CHANCE
