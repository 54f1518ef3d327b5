"""Own images: a folder as a dataset, masks converted, masks predicted, and the circle between them."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_train import ROOT, TWO_PROCESSES, equal_states, lines, run, script

import data as D
import evaluate as E
import train as T
from data import InputError, open_dataset
from refine import pseudo_labels


def painted(size=(48, 40), classes=(0, 1, 2)):
    """A mask of vertical stripes, one per class."""
    return np.repeat(np.array(classes, np.uint8), -(-size[0] // len(classes)))[None, : size[0]].repeat(size[1], 0)


def folder(root, images=8, masks=6, size=(48, 40), nested=False):
    """images/ in several formats, masks/ for the first ones; colors follow the classes."""
    for name in ("images", "masks"):
        (root / name / "trip" if nested else root / name).mkdir(parents=True)
    for i in range(images):
        stem, suffix = f"{'trip/' if nested else ''}photo {i}", (".jpg", ".png", ".bmp", ".TIFF", ".webp")[i % 5]
        mask = np.roll(painted(size), 3 * i, 1)
        Image.fromarray(np.stack([mask * 90 + i, 200 - mask * 60, mask * 20], 2)).save(
            root / "images" / f"{stem}{suffix}"
        )
        if i < masks:
            Image.fromarray(mask).save(root / "masks" / f"{stem}.png")
    return root


def opened(root, labeled="all", **options):
    return open_dataset("folder", root, labeled, **options)


def repaint(root, change):
    """Every mask m of a folder becomes change(m)."""
    for path in (root / "masks").rglob("*.png"):
        Image.fromarray(change(np.asarray(Image.open(path)))).save(path)


# ----------------------------------------------------------------------------------------------------------------------
# what is found


def test_painted_images_are_labeled_every_fifth_validates_and_the_rest_is_unlabeled(tmp_path):
    data = opened(folder(tmp_path / "mine", images=14, masks=11))
    ids = [[item.id for item in part] for part in (data.labeled, data.val, data.unlabeled)]
    masks = sorted(f"photo {i}" for i in range(11))
    assert ids[1] == masks[4::5] and ids[0] == [id for id in masks if id not in ids[1]]
    assert ids[2] == ["photo 11", "photo 12", "photo 13"] and data.classes == ("0", "1", "2")
    assert any("every fifth painted image validates and is not trained on: 2 of 11" in note for note in data.notes)
    assert all(item.mask is None for item in data.unlabeled)


def test_folders_may_be_nested_and_n_of_the_painted_images_may_be_labeled(tmp_path):
    data = opened(folder(tmp_path / "mine", nested=True), labeled=2)
    assert len(data.labeled) == 2 and all(item.id.startswith("trip/") and item.mask for item in data.labeled)
    assert len(data.unlabeled) == 8 - 2 - 1 and not {item.id for item in data.val} & {
        item.id for item in data.unlabeled
    }
    with pytest.raises(InputError, match="--labeled 6 is impossible; expected 1 to 5"):
        opened(tmp_path / "mine", labeled=6)


def test_a_list_or_a_folder_of_validation_images_is_respected_and_classes_get_their_names(tmp_path):
    root = folder(tmp_path / "mine")
    (root / "val.txt").write_text("photo 1\nphoto 5\n\n")
    (root / "classes.txt").write_text("soil\nwheat plant\nweed\n")
    data = opened(root)
    assert [item.id for item in data.val] == ["photo 1", "photo 5"] and len(data.labeled) == 4
    assert data.classes == ("soil", "wheat plant", "weed") and not any("fifth" in note for note in data.notes)
    folder(root / "val", images=3, masks=3)
    data = opened(root)
    assert [item.id for item in data.val] == [f"val/photo {i}" for i in range(3)] and len(data.labeled) == 6
    shutil.rmtree(root / "val")
    (root / "val.txt").write_text("photo 77\n")
    with pytest.raises(
        InputError, match=r"val.txt names photo 77, and there is no images/photo 77\.\*; correct the list"
    ):
        opened(root)
    (root / "val.txt").write_text("photo 7\n")
    with pytest.raises(InputError, match="1 of 1 val images of folder have no mask .* first photo 7; paint them"):
        opened(root)


def test_files_that_are_no_images_are_said_to_be_left_out(tmp_path):
    root = folder(tmp_path / "mine")
    (root / "images" / "notes.odt").write_text("x")
    assert any("1 files in images/ have no suffix of an image" in note for note in opened(root).notes)


@pytest.mark.parametrize(
    "change, says",
    [
        (
            lambda m: (m > 0).astype(np.uint8) * 255,
            "hold the values 0, 255 alone, and 255 means ignore; .*background,0",
        ),
        (
            lambda m: np.stack([m * 90] * 3, 2),
            r"is a RGB image; expected one class index per pixel.*--colors classes.csv",
        ),
        (
            lambda m: m + np.uint8(1),
            "hold the values 1, 2, 3; expected class indices 0, 1, 2 and so on; write one line name,value",
        ),
        (lambda m: m * np.uint8(60), "hold the values 0, 60, 120; expected class indices"),
        (lambda m: m.astype(np.uint16), "is a I;16 image; expected one class index"),
    ],
    ids=["0 and 255", "colors", "from 1", "gray levels", "16 bits"],
)
def test_masks_that_hold_no_class_indices_get_a_sentence_with_the_command_that_mends_them(tmp_path, change, says):
    root = folder(tmp_path / "mine")
    repaint(root, change)
    with pytest.raises(InputError, match=says) as error:
        opened(root)
    assert f"python data.py masks --root {root} --colors classes.csv" in str(error.value)


def test_other_mistakes_in_a_folder_get_a_sentence(tmp_path):
    with pytest.raises(InputError, match=r"--root \S+ is not there; expected a folder with images/, masks/ in it$"):
        opened(tmp_path / "nowhere")
    root = folder(tmp_path / "mine")
    (root / "classes.txt").write_text("soil\nwheat\n")
    with pytest.raises(
        InputError,
        match=r"hold the values 0, 1, 2, and \S+ names 2 classes, 0 to 1; 6 masks hold more, first .*photo 0.png",
    ):
        opened(root)
    (root / "masks" / "photo 0.png").rename(root / "masks" / "photo 0_mask.png")
    with pytest.raises(InputError, match=r"1 of 6 masks .* belong to no image, first .*photo 0_mask.png; expected"):
        opened(root)
    (root / "masks" / "photo 0_mask.png").rename(root / "masks" / "photo 0.bmp")
    with pytest.raises(InputError, match=r"1 masks in .* are not PNG, first .*photo 0.bmp; python data.py masks"):
        opened(root)
    with pytest.raises(InputError, match="has 1 painted images; expected two or more"):
        opened(folder(tmp_path / "few", masks=1))
    for names in ("soil\nweed\nweed\n", "soil\nall\nweed\n"):
        (folder(tmp_path / names[-5], images=5) / "classes.txt").write_text(names)
        with pytest.raises(InputError, match="names a class twice, or one of them all; expected another name for each"):
            opened(tmp_path / names[-5])
        shutil.rmtree(tmp_path / names[-5])


def test_a_folder_needs_a_painted_image_beside_those_that_validate(tmp_path):
    roots = [folder(tmp_path / name) for name in ("all validate", "none to learn from", "none at all")]
    (roots[0] / "val.txt").write_text("".join(f"photo {i}\n" for i in range(6)))
    for root in roots[1:]:
        shutil.copytree(root, root / "val")
        shutil.rmtree(root / "masks")
        (root / "masks").mkdir()
    shutil.rmtree(roots[2] / "val" / "masks")
    (roots[2] / "val" / "masks").mkdir()
    for root in roots:
        with pytest.raises(InputError, match="has no painted image to learn from; expected masks/ for some of images/"):
            opened(root)


def test_rare_classes_are_seen_and_names_in_val_txt_count_once(tmp_path):
    root = folder(tmp_path / "mine", images=40, masks=40)
    for i in range(40):
        values = [0, 255, 1] if i in (1, 2) else [0, 255]  # the sample of other datasets would miss both
        Image.fromarray(painted(classes=values)).save(root / "masks" / f"photo {i}.png")
    (root / "classes.txt").write_text("ground\nlesion\n")
    (root / "val.txt").write_text("photo 1\nphoto 1\nphoto 3\n")
    data = opened(root)
    assert data.classes == ("ground", "lesion") and [item.id for item in data.val] == ["photo 1", "photo 3"]


# ----------------------------------------------------------------------------------------------------------------------
# converting


@pytest.mark.parametrize("by_value", [True, False], ids=["values", "colors"])
def test_masks_are_converted_from_values_or_colors_and_the_painted_ones_are_kept(tmp_path, capsys, by_value):
    root = folder(tmp_path / "mine", nested=True)
    before = {path.name: np.asarray(Image.open(path)) for path in (root / "masks").rglob("*.png")}
    paint = D.palette()
    repaint(root, lambda m: m * np.uint8(60) + np.uint8(7) if by_value else paint[m + 3])
    D.main(["masks", "--root", str(root)])
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 3 and all(line.count(",") == (1 if by_value else 3) for line in said)
    rows = {0: "7", 1: "67", 2: "127"} if by_value else {i: ",".join(map(str, paint[i + 3])) for i in range(3)}
    assert {line.split(",", 1)[1] for line in said} == set(rows.values())
    table = tmp_path / "classes.csv"
    table.write_text(f"soil,{rows[0]}\nwheat,{rows[1]}\n")
    with pytest.raises(
        InputError, match=f"holds {rows[2]}, which .* does not; add a line for it, ignore,{rows[2]} where"
    ):
        D.main(["masks", "--root", str(root), "--colors", str(table)])
    assert not (root / "masks-converted").exists() and not (root / "masks-painted").exists()
    table.write_text(f"soil, {rows[0]}\nwheat,{rows[1]}\nignore,{rows[2]}\n")
    (root / "classes.txt").write_text("soil\nmaize\n")
    with pytest.raises(InputError, match="classes.txt names other classes than .*, soil, wheat; make them the same"):
        D.main(["masks", "--root", str(root), "--colors", str(table)])
    (root / "classes.txt").unlink()
    D.main(["masks", "--root", str(root), "--colors", str(table)])
    for name, mask in before.items():
        assert np.array_equal(np.asarray(Image.open(root / "masks" / "trip" / name)), np.where(mask == 2, 255, mask))
    assert len(list((root / "masks-painted").rglob("*.png"))) == 6 and opened(root).classes == ("soil", "wheat")
    with pytest.raises(InputError, match="masks-painted is there already"):
        D.main(["masks", "--root", str(root), "--colors", str(table)])


def test_a_bad_table_of_colors_gets_a_sentence(tmp_path):
    root, table = folder(tmp_path / "mine"), tmp_path / "classes.csv"
    for text, says in (
        ("soil,0\nwheat,1,2,3\n", "expected lines"),
        ("soil,300\n", "soil,300"),
        ("", "expected lines"),
        ("soil\n", "'soil'"),
        ("soil,1\nwheat,1\n", "names 1 twice; expected one class for it"),
    ):
        table.write_text(text)
        with pytest.raises(InputError, match=says):
            D.convert_masks(root, table)
    with pytest.raises(InputError, match="is not there; expected lines name,r,g,b"):
        D.convert_masks(root, tmp_path / "none.csv")


# ----------------------------------------------------------------------------------------------------------------------
# training and predicting


@pytest.fixture(scope="module")
def mine(tmp_path_factory):
    """(root, last checkpoint) of a short run on a folder with named classes."""
    root = folder(tmp_path_factory.mktemp("mine") / "data", images=10, masks=6)
    (root / "classes.txt").write_text("soil\nwheat plant\nweed\n")
    run(
        root.parent / "run", "--dataset", "folder", "--root", root, "--iters", 2, "--warmup-epochs", 0, "--log-every", 1
    )
    return root, root.parent / "run" / "last.pth"


def test_a_folder_trains_says_what_it_chose_and_scores(tmp_path, mine, capsys):
    root, checkpoint = mine
    out = tmp_path / "run"
    options = [
        "--dataset",
        "folder",
        "--root",
        root,
        "--iters",
        2,
        "--backbone",
        "resnet10",
        "--device",
        "cpu",
        "--out",
        out,
    ]
    T.train(T.Run(T.parse_args(list(map(str, options)))))
    said = capsys.readouterr().out
    assert "10 images, 6 of them painted; classes: soil, wheat plant, weed" in said
    assert (
        "chosen from the images found, their short side about 40: --crop 32, --warmup-epochs 0, --eval-every 1" in said
    )
    E.main([str(checkpoint), "--device", "cpu", "--json", str(tmp_path / "scores.json")])
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert set(scores["iou"]) == {"soil", "wheat plant", "weed"} and scores["images"] == 1


def test_a_run_is_scored_on_its_own_validation_images_and_not_resumed_after_more_were_painted(tmp_path, mine):
    root, checkpoint = tmp_path / "data", tmp_path / "run" / "last.pth"
    shutil.copytree(mine[0], root)
    shutil.copytree(mine[1].parent, tmp_path / "run")
    assert [item.id for item in opened(root).val] == ["photo 4"]
    (root / "masks" / "photo 1.png").rename(root / "masks" / "photo 9.png")  # another one is the fifth now
    assert [item.id for item in opened(root).val] == ["photo 5"]
    again = ["--dataset", "folder", "--root", root, "--iters", 2, "--warmup-epochs", 0, "--log-every", 1, "--resume"]
    with pytest.raises(InputError, match="began with 5 labeled images, and 5 others are there now"):
        run(checkpoint.parent, *again)
    (root / "masks" / "photo 9.png").rename(root / "masks" / "photo 1.png")
    unlabeled = next((root / "images").glob("photo 8.*"))
    unlabeled.rename(unlabeled.with_stem("photo 8b"))
    with pytest.raises(InputError, match="began with 4 unlabeled images, and 4 others are there now"):
        run(checkpoint.parent, *again)
    saved = torch.load(checkpoint, weights_only=True)
    data = opened(root, saved["labeled"], use=(), val=saved["val"])
    assert [item.id for item in data.val] == saved["val"] == ["photo 4"] and not set(data.val) & set(data.labeled)


def predicted(checkpoint, images, masks, *options):
    E.main([str(checkpoint), "--images", str(images), "--masks", str(masks), "--device", "cpu", *options])


def model_and_run(checkpoint):
    saved = E.load_checkpoint(checkpoint)
    return E.load_model(saved, checkpoint), saved


def test_masks_are_predicted_at_original_size_in_the_folder_s_own_order_from_the_checkpoint_alone(
    tmp_path, mine, capsys
):
    _, checkpoint = mine
    alone = tmp_path / "elsewhere" / "ckpt.pth"  # no run, no dataset beside it
    alone.parent.mkdir()
    shutil.copy(checkpoint, alone)
    images = folder(tmp_path / "new", images=3, masks=0, size=(70, 51), nested=True) / "images"
    Image.fromarray(painted()).convert("RGB").save(images / "top.png")
    (images / "readme.txt").write_text("x")
    predicted(alone, images, tmp_path / "out", "--confidence")
    stems = ["top", *(f"trip/photo {i}" for i in range(3))]
    for kind in ("out", "out-overlays", "out-confidence"):
        found = sorted(path.relative_to(tmp_path / kind).as_posix() for path in (tmp_path / kind).rglob("*.*"))
        assert found == [f"{stem}.png" for stem in stems]
    model, saved = model_and_run(alone)
    for stem, path in D.files(images, D.READABLE, nested=True).items():
        image = D.VF.pil_to_tensor(Image.open(path).convert("RGB"))
        prob = E.predict(model, image[None], E.Protocol())
        mask = Image.open(tmp_path / "out" / f"{stem}.png")
        assert mask.mode == "P" and np.array_equal(np.asarray(mask), prob.argmax(1)[0])
        assert mask.getpalette()[:9] == D.palette()[:3].ravel().tolist() == saved["palette"][:3].ravel().tolist()
        margin = prob.topk(2, 1).values
        sure = np.asarray(Image.open(tmp_path / "out-confidence" / f"{stem}.png")).astype(float)
        assert np.abs(sure - 255 * (margin[0, 0] - margin[0, 1]).numpy()).max() <= 1.001
        assert Image.open(tmp_path / "out-overlays" / f"{stem}.png").size == mask.size
    said = capsys.readouterr().out
    assert (
        "4 masks written to" in said
        and "0 to 2 for soil, wheat plant, weed" in said
        and "1 files have no suffix of an image" in said
    )


def test_nothing_is_overwritten_nothing_is_skipped_silently(tmp_path, mine, capsys):
    images = folder(tmp_path / "new", images=4, masks=0) / "images"
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "photo 1.png").write_bytes(b"corrected by hand")
    (images / "photo 2.bmp").write_bytes(b"BM broken")
    with pytest.raises(InputError, match="1 images could not be read and have no mask; each is named above"):
        predicted(mine[1], images, tmp_path / "out")
    said = capsys.readouterr()
    assert (
        "photo 2.bmp could not be read" in said.err and "1 masks were in" in said.out and "2 masks written" in said.out
    )
    assert (tmp_path / "out" / "photo 1.png").read_bytes() == b"corrected by hand"
    for images_, masks, says in (
        (tmp_path / "none", "out", "holds no image"), (images, images / "masks", "lies in --images"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=says):
            predicted(mine[1], images_, tmp_path / masks)
    new = ["--images", "x", "--masks", "y"]
    for options in (["--images", "x"], ["--threshold", "0.5"], [*new, "--threshold", "0.5"], [*new, "--json", "z"],
                    [*new, "--eval-mode", "center-crop"], ["--figures", "x", "--json", "y"]):  # fmt: skip
        with pytest.raises(SystemExit):
            E.parse_args(["last.pth", *options])


def test_a_map_of_refined_entropy_stays_in_its_range():
    logits = 0.6 * torch.randn(1, 7, 40, 48, generator=torch.Generator().manual_seed(0))
    options = dict(threshold=-9.0, kind="entropy")
    image = torch.zeros(3, 40, 48, dtype=torch.uint8)
    mask, _, sure = E.predicted(lambda _: logits, image, torch.device("cpu"), E.Protocol(), options)
    unsure = pseudo_labels(logits.softmax(1), None, **options).confidence[0] < -np.log(7)  # than seven equal classes
    assert unsure.float().mean() > 0.9 and (sure[unsure] == 0).all() and (mask != 255).all()


def test_pseudo_labels_of_broken_images_alone_name_each(tmp_path, mine, capsys):
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "photo.jpg").write_bytes(b"broken")
    with pytest.raises(InputError, match="1 images could not be read"):
        predicted(mine[1], tmp_path / "new", tmp_path / "out", "--pseudo-labels")
    assert "photo.jpg could not be read" in capsys.readouterr().err


def test_an_overlay_by_blocks_is_the_overlay(monkeypatch, mine):
    monkeypatch.setattr(E, "BLOCK", 16)
    monkeypatch.setattr(E, "MARGIN", 4)
    image, (model, _) = torch.randint(0, 256, (3, 50, 37), dtype=torch.uint8), model_and_run(mine[1])
    mask, picture, _ = E.predicted(model, image, torch.device("cpu"), E.Protocol(), None)
    assert torch.equal(picture, E.overlay(image, mask, 1, 0.5))


def test_two_processes_predict_what_one_does(tmp_path, mine):
    images = folder(tmp_path / "new", images=5, masks=0) / "images"
    predicted(mine[1], images, tmp_path / "one", "--pseudo-labels")
    options = ["--images", images, "--masks", tmp_path / "two", "--pseudo-labels", "--device", "cpu"]
    done = script("evaluate.py", mine[1], *options, launcher=TWO_PROCESSES)
    assert "5 masks written" in done.stdout
    for path in (tmp_path / "one").iterdir():
        assert np.array_equal(np.asarray(Image.open(path)), np.asarray(Image.open(tmp_path / "two" / path.name)))


def test_proposed_labels_are_the_method_s_own_and_the_rest_is_255(tmp_path, mine, capsys):
    images = folder(tmp_path / "new", images=4, masks=0) / "images"
    predicted(mine[1], images, tmp_path / "out", "--pseudo-labels")
    threshold = float(capsys.readouterr().out.split("is above ")[1].split()[0])
    model, saved = model_and_run(mine[1])
    options = E.refinement_options(saved["args"])
    probs = {}
    for stem, path in D.files(images, D.READABLE).items():
        probs[stem] = E.predict(model, D.VF.pil_to_tensor(Image.open(path).convert("RGB"))[None], E.Protocol())
    margins = torch.cat(
        [(p.topk(2, 1).values * torch.tensor([1, -1])[:, None, None]).sum(1).flatten() for p in probs.values()]
    )
    assert (margins < threshold).float().mean().item() == pytest.approx(0.4, abs=0.01)
    fixed = margins.quantile(0.7).item()
    predicted(mine[1], images, tmp_path / "fixed", "--pseudo-labels", "--threshold", str(fixed))
    for stem, prob in probs.items():
        expected = pseudo_labels(prob, None, **options | {"threshold": fixed}).label[0]
        assert np.array_equal(np.asarray(Image.open(tmp_path / "fixed" / f"{stem}.png")), expected)
        assert (expected == 255).any() and (expected != 255).any()


@pytest.mark.parametrize("size", [(30, 20), (64, 64), (65, 200), (1, 150)])
def test_blocks_cover_each_pixel_of_an_image_once_with_their_surroundings(monkeypatch, size):
    monkeypatch.setattr(E, "BLOCK", 64)
    monkeypatch.setattr(E, "MARGIN", 16)
    seen = torch.zeros(size, dtype=torch.long)
    for window, keep in E.blocks(*size):
        shape = seen[window].shape
        seen[window][keep] += 1
        assert max(shape) <= 64 + 2 * 16
        for side, whole, inner in zip(shape, size, keep[1:]):
            assert inner.start in (0, 16) and (
                side - inner.stop == 16 or window[1:][shape.index(side)].stop == whole or side == whole
            )
    assert (seen == 1).all()


def test_an_image_larger_than_a_block_is_predicted_as_a_whole_one_but_for_its_seams(monkeypatch, mine):
    model, _ = model_and_run(mine[1])
    image = D.VF.pil_to_tensor(D.draw_shapes(3)[0].resize((300, 200)))
    whole, _, _ = E.predicted(model, image, torch.device("cpu"), E.Protocol(), None)
    monkeypatch.setattr(E, "BLOCK", 160)
    monkeypatch.setattr(E, "MARGIN", 64)
    largest, predict = [], E.predict
    monkeypatch.setattr(
        E, "predict", lambda model, image, protocol: largest.append(image.shape) or predict(model, image, protocol)
    )
    mask, _, sure = E.predicted(model, image, torch.device("cpu"), E.Protocol(), None)
    assert mask.shape == sure.shape == (200, 300) and len(largest) == 4 and max(map(max, largest)) <= 160 + 128
    assert (mask == whole).float().mean() > 0.7  # the network looks at all that it sees at once, so seams may differ


def test_names_of_files_never_lead_out_of_the_folders(tmp_path, mine):
    root, out = mine[0], tmp_path / "out"
    (tmp_path / "ids.txt").write_text("../../../etc/passwd\n")
    with pytest.raises(
        InputError, match="1 of them not among the 9 training images|names 1 images, 1 of them not among"
    ):
        opened(root, tmp_path / "ids.txt")
    images = tmp_path / "new" / "images"
    (images / "$(touch owned)").mkdir(parents=True)
    Image.new("RGB", (40, 40)).save(images / "$(touch owned)" / "; touch owned; ..png")
    predicted(mine[1], images, out)
    written = sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.png"))
    assert (
        len(written) == 3
        and not list(tmp_path.rglob("owned"))
        and all(name.split("/")[0] in ("new", "out", "out-overlays") for name in written)
    )


# ----------------------------------------------------------------------------------------------------------------------
# the circle of README, and what is shown on the way


def test_the_circle_on_exported_shapes_train_propose_correct_train_again(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    script("data.py", "shapes", "--root", "data/drawn", "--labeled", 4, cwd=tmp_path)
    exported = opened("data/drawn")
    assert (len(exported.labeled), len(exported.unlabeled), len(exported.val)) == (4, 476, 96)
    image, mask = D.read(exported.labeled[1], exported)
    number = int(exported.labeled[1].id)
    assert np.array_equal(image, D.draw_shapes(number)[0]) and np.array_equal(mask, D.draw_shapes(number)[1])
    for item in exported.unlabeled[6:] + exported.val[2:]:  # the rest of the circle on few images
        os.remove(item.image)
    for item in exported.val[2:]:
        os.remove(item.mask)
    short = ["--iters", 2, "--warmup-epochs", 0]
    run(Path("runs/first"), "--dataset", "folder", "--root", "data/drawn", *short)
    predicted("runs/first/last.pth", "data/drawn/images", "proposed", "--pseudo-labels")
    proposals = sorted(path.name for path in Path("proposed").iterdir())
    assert len(proposals) == 10
    subprocess.run(
        "cp -n proposed/*.png data/drawn/masks/", shell=True, check=True
    )  # as README says: without overwriting
    again = opened("data/drawn")
    assert len(again.labeled) == 10 and again.classes == exported.classes
    assert np.array_equal(D.read(again.labeled[[i.id for i in again.labeled].index(f"{number:04d}")], again)[1], mask)
    run(Path("runs/second"), "--dataset", "folder", "--root", "data/drawn", *short, "--framework", "supervised")
    with pytest.raises(InputError, match="is not empty; expected a new folder"):
        D.main(["shapes", "--root", "data/drawn"])


def test_refine_alone_works_in_another_project(tmp_path):
    shutil.copy(ROOT / "refine.py", tmp_path)
    code = (
        "import sys, torch, refine\n"
        "labels = refine.pseudo_labels(torch.rand(2, 5, 9, 9).softmax(1), refine.dpa_alpha(1, 10))\n"
        "assert labels.label.shape == (2, 9, 9) and refine.__file__.startswith(sys.argv[1])\n"
        "assert not {'data', 'model', 'train', 'evaluate', 'torchvision', 'numpy.random.mtrand'} & set(sys.modules) - set(before)\n"
    )
    code = "import sys, torch\nbefore = list(sys.modules)\n" + code
    subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], cwd=tmp_path, check=True, env=os.environ | {"PYTHONPATH": ""}
    )


def test_a_sheet_has_titles_a_legend_and_the_scale_of_the_confidence():
    tile = torch.zeros(3, 30, 40, dtype=torch.uint8)
    names = [f"a rather long class name {i}" for i in range(30)]
    small, large = (
        np.asarray(E.sheet([[tile] * len(E.TITLES)] * 2, classes, "a note")) for classes in (names[:2], names)
    )
    assert small.shape[1] == large.shape[1] and large.shape[0] > small.shape[0]  # the legend takes several lines
    assert (small[:18] < 128).any() and (small[-16:] < 128).any()  # titles, numbers beside the scale
    colors = {tuple(color) for color in large.reshape(-1, 3)}
    assert {tuple(color) for color in D.palette()[:30].tolist()} <= colors and (255, 255, 255) in colors


def test_a_terminal_has_one_live_line_and_a_log_has_them_all(capsys, monkeypatch):
    for line in ("one", "two"):
        D.say(line, live=True)
    D.say("done")
    assert capsys.readouterr().out == "one\ntwo\ndone\n"
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    monkeypatch.setattr(os, "get_terminal_size", lambda: os.terminal_size((6, 9)))
    for line in ("one", "a long line"):
        D.say(line, live=True)
    D.say("done")
    assert capsys.readouterr().out == "\r\033[Kone\r\033[Ka lon\r\033[Kdone\n"


def test_tensorboard_holds_the_log_the_panels_and_the_histograms(tmp_path, mine):
    accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator", reason="needs tensorboard"
    )
    common = ["--dataset", "folder", "--root", mine[0], "--iters", 4, "--warmup-epochs", 0, "--log-every", 1]
    run(tmp_path / "run", *common, "--tensorboard")
    events = accumulator.EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    tags, train = events.Tags(), lines(tmp_path / "run", "train")
    assert {"train/loss", "train/kept", "train/threshold", "val/miou"} <= set(tags["scalars"])
    assert [event.value for event in events.Scalars("train/loss")] == pytest.approx([line["loss"] for line in train])
    assert tags["images"] == ["panel"] and set(tags["histograms"]) == {"histogram", "histogram_raw"}
    plain = run(tmp_path / "plain", *common)
    assert equal_states(plain, torch.load(tmp_path / "run" / "last.pth", weights_only=True))


def test_without_tensorboard_there_is_a_sentence(tmp_path, monkeypatch, mine):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(
        InputError, match="--tensorboard needs a package that is not installed; pip install tensorboard"
    ):
        run(tmp_path / "run", "--dataset", "folder", "--root", mine[0], "--iters", 1, "--tensorboard")
    assert not (tmp_path / "run" / "last.pth").exists()


def test_values_0_and_255_are_listed_as_two_classes_and_one_class_is_refused(tmp_path, capsys):
    root = folder(tmp_path / "data", images=6, masks=5)
    for path in (root / "masks").iterdir():
        mask = np.asarray(Image.open(path)).copy()
        mask[:], mask[:4] = 0, 255
        Image.fromarray(mask).save(path)
    D.main(["masks", "--root", str(root)])
    (tmp_path / "listed.csv").write_text(capsys.readouterr().out)
    assert {line.split(",")[1] for line in (tmp_path / "listed.csv").read_text().split()[1::2]} == {"0", "255"}
    (tmp_path / "one.csv").write_text("ground,0\nignore,255\n")
    with pytest.raises(InputError, match="names 1 classes; expected two or more"):
        D.main(["masks", "--root", str(root), "--colors", str(tmp_path / "one.csv")])
    D.main(["masks", "--root", str(root), "--colors", str(tmp_path / "listed.csv")])
    assert len(D.folder_classes(root, sorted((root / "masks").iterdir()))) == 2
    for path in (root / "masks").iterdir():
        Image.fromarray(np.zeros((4, 4), np.uint8)).save(path)
    with pytest.raises(InputError, match="hold the values 0 alone; expected two classes or more"):
        D.folder_classes(root, sorted((root / "masks").iterdir()))
