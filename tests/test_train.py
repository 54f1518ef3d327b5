"""train.py: short runs against a plain loop and in two processes, resuming, stop signals, what ends a run, presets."""

import copy
import json
import math
import os
import re
import resource
import shutil
import signal
import socket
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from PIL import Image
from torch import nn
from trees import camvid, folder, refused, truncate

import model as M
import train as T
from data import cutmix, generator, normalize, open_dataset, sample_index, save_mask, strong_views, training_loader
from model import DeepLabV3Plus
from refine import pseudo_labels

FRAMEWORKS = ["supervised", "cutmixseg", "fixmatch", "unimatch"]
TINY = (
    "--dataset camvid --labeled 2 --backbone resnet10 --weights none --crop 32 --batch-size 2 --warmup-iters 0 "
    "--framework fixmatch --unsup-norm kept --floor 0 --lr-warmup 0"
)
SGD = "--optimizer sgd --lr 0.02 --head-lr 0.02 --weight-decay 0"
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
FOUR_STEPS = f"--iters 4 --log-every 1 --eval-every 1 --power 0 {SGD}"


class Small(nn.Module):
    """Stands in for DeepLabV3Plus where only the loop matters. BatchNorm counts, but changes nothing."""

    def __init__(self, backbone, num_classes, output_stride=16, weights="none"):
        super().__init__()
        self.backbone, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, num_classes, 1)
        self.seen, self.deep_channels = nn.BatchNorm2d(3, affine=False), 8

    def forward(self, images, drop=None):
        self.seen(images)
        deep = self.backbone(images).relu()
        return self.head(deep if drop is None else deep * drop[:, :, None, None]).float()


@pytest.fixture(autouse=True)
def one_thread_and_the_old_signal_handlers():
    """One thread sums in one order. Tests replace handlers, and nohup ignores SIGHUP."""
    threads, handlers = torch.get_num_threads(), {number: signal.getsignal(number) for number in STOP_SIGNALS}
    torch.set_num_threads(1)
    for number in STOP_SIGNALS:
        signal.signal(number, signal.default_int_handler)
    yield
    torch.set_num_threads(threads)
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return camvid(tmp_path_factory.mktemp("data") / "camvid")


@pytest.fixture
def run(tmp_path, root, monkeypatch):
    """A function: a run with some options in this process, which is faster than a script; returns last.pth."""

    def start(options="", out="run", network=Small):
        monkeypatch.setattr(T, "DeepLabV3Plus", network)
        T.main(T.parse_args(f"{TINY} --device cpu --workers 0 --root {root} --out {tmp_path / out} {options}".split()))
        return last(tmp_path / out)

    return start


def last(out):
    return torch.load(out / "last.pth", weights_only=True)


def lines(out, event="train"):
    records = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    return [record for record in records if record["event"] == event]


def figures(out, event="train"):
    """The lines without what a clock says."""
    return [{key: value for key, value in line.items() if "second" not in key} for line in lines(out, event)]


def equal(one, two):
    """Whether two checkpoints hold the same weights, bit for bit."""
    return all(torch.equal(one[part][name], two[part][name]) for part in ("student", "teacher") for name in one[part])


def signaled(run, options, step, *numbers, **more):
    """Start a run that gets stop signals in a step."""

    def with_signals(seed, stream, *place):
        for number in numbers if place[0] == step else ():
            signal.raise_signal(number)
        return generator(seed, stream, *place)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(T, "generator", with_signals)
        return run(options, **more)


def terminated(*args, **options):
    """Start a run that SIGTERM ends in a step."""
    with pytest.raises(SystemExit, match="143"):  # 128 + 15
        signaled(*args, signal.SIGTERM, **options)


def mean_over_labeled(logits, label):
    labeled, index = label != 255, label.clamp(max=logits.shape[1] - 1).long()
    return -(logits.log_softmax(1).gather(1, index[:, None])[:, 0] * labeled).sum() / labeled.sum()


def plain_loop(root, framework, steps=16, warmup=4, batch=2, seed=7):
    """(student, teacher) after a run, its formulas written out."""
    loader = training_loader(open_dataset("camvid", root, 2), range(steps), batch, 32, seed)
    torch.manual_seed(seed)
    student = DeepLabV3Plus("resnet10", 11).to(memory_format=torch.channels_last).train()
    teacher = copy.deepcopy(student).eval()
    head = [parameter for name, parameter in student.named_parameters() if not name.startswith("backbone.")]
    groups = [{"params": [*student.backbone.parameters()]}, {"params": head}]
    optimizer = torch.optim.SGD(groups, momentum=0.9, weight_decay=5e-4)
    for step, views in enumerate(loader):
        x, y = views["x"], views["y"]
        rng = generator(seed, "step", step, 0)
        torch.manual_seed(int(rng.integers(2**63)))
        for group, base in zip(optimizer.param_groups, (0.02, 0.01)):
            group["lr"] = base * (1 - step / steps) ** 0.9
        if framework == "supervised" or step < warmup:
            loss = mean_over_labeled(student(normalize(x)), y)
        else:
            weak, valid = views["weak"], views["valid"]
            with torch.no_grad():
                prob = teacher(normalize(weak)).softmax(1)
            label = pseudo_labels(prob, 0.4 * (1 - step / steps), valid=valid).label
            numbers = (0, 1) if framework == "unimatch" else (0,)
            seen = [weak if framework == "cutmixseg" else strong_views(weak, seed, step, view) for view in numbers]
            parts = [cutmix(rng, 0.5, normalize(view), label) for view in seen]
            strong, target = (torch.cat(part) for part in zip(*parts))
            drop = None
            if framework == "unimatch":  # one of two images drops channels in one view, and doubles them in the other
                one = 2.0 * torch.randint(2, (batch, 512))
                one[torch.rand(batch, 1).argsort(0)[:, 0] == 0] = 1
                drop = torch.cat([torch.ones(batch, 512), one, 2 - one])
            logits = student(torch.cat([normalize(x), strong]), drop)
            loss = mean_over_labeled(logits[:batch], y) + 0.5 * mean_over_labeled(logits[batch:], target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        tau = min(1 - 1 / (max(0, step - warmup) + 1), 0.99)
        for theirs, ours in zip(teacher.state_dict().values(), student.state_dict().values()):
            if theirs.is_floating_point():
                theirs.lerp_(ours, 1 - tau)
    return student, teacher


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_sixteen_steps_equal_a_plain_loop_bit_for_bit(run, root, framework):
    options = "--iters 16 --warmup-iters 4 --seed 7 --lambda-u 0.5 --optimizer sgd --lr 0.02 --head-lr 0.01"
    saved = run(f"--framework {framework} {options} --weight-decay 0.0005", network=DeepLabV3Plus)
    for part, network in zip(("student", "teacher"), plain_loop(root, framework)):
        for name, expected in network.state_dict().items():
            assert torch.equal(saved[part][name], expected) or not expected.is_floating_point(), (part, name)


def test_options_change_the_losses_as_they_say(run, tmp_path, monkeypatch):
    """Divisors of the unlabeled loss, only hard labeled pixels, a floor of the threshold, bfloat16; same weights."""
    mine = T.ohem
    monkeypatch.setattr(T, "ohem", lambda logits, label: mine(logits, label, sure=0, per_image=50))

    def first(options):
        run(f"--iters 1 --log-every 1 --cutmix 0 {options}", out=options.replace(" ", ""))
        return lines(tmp_path / options.replace(" ", ""))[0]

    kept, valid, authors = (first(f"--unsup-norm {norm}") for norm in ("kept", "valid", "authors"))
    share = kept["kept"]  # of the valid pixels
    assert 0.3 < share < 0.99 and kept["loss_x"] == valid["loss_x"]
    assert valid["loss_u"] == pytest.approx(kept["loss_u"] * share, rel=1e-5)
    assert authors["loss_u"] == pytest.approx(kept["loss_u"] / share, rel=1e-5)
    hard = first("--sup-loss ohem")
    assert hard["loss_u"] == kept["loss_u"] and hard["loss_x"] > 1.05 * kept["loss_x"]
    low, high = first("--confidence max"), first("--confidence max --floor 0.5")
    assert low["threshold"] < 0.4 and high["threshold"] == 0.5 and high["kept_raw"] < low["kept_raw"]
    assert first("--amp")["loss_x"] != kept["loss_x"]


def test_hard_example_mining_keeps_unsure_pixels_and_at_least_the_hardest():
    torch.manual_seed(0)
    label = torch.randint(0, 5, (2, 9, 9), dtype=torch.uint8)
    label[0, :3] = 255
    own = label.clamp(max=4).long()[:, None]
    sure = torch.rand(2, 5, 9, 9) + 6 * torch.zeros(2, 5, 9, 9).scatter(1, own, 1)  # all above 0.7
    for logits, per_image in ((4 * torch.randn(2, 5, 9, 9), 1), (sure, 5), (sure, 1000)):
        prob = logits.softmax(1).gather(1, own)[:, 0].where(label != 255, torch.inf)
        limit = max(0.7, prob.flatten().sort().values[: 2 * per_image][-1])
        assert torch.equal(T.ohem(logits, label, per_image=per_image), label.where(prob <= limit, 255))


def test_strong_views_are_made_in_float32_and_before_the_step_is_seeded(run, monkeypatch):
    options = "--iters 2 --framework unimatch --amp"  # whose dropout of channels follows the seed

    def careless(*args):
        assert not torch.is_autocast_enabled("cpu")
        torch.manual_seed(0)  # as an augmentation may that draws from PyTorch's generator
        return strong_views(*args)

    amp = run(options, out="amp")
    monkeypatch.setattr(T, "strong_views", careless)
    assert equal(run(options, out="careless"), amp)


def test_without_a_labeled_pixel_loss_and_gradient_are_zero():
    logits = torch.randn(2, 3, 4, 4, requires_grad=True)
    loss = T.cross_entropy(logits, torch.full((2, 4, 4), 255), torch.tensor(0))
    loss.backward()
    assert loss == 0 and (logits.grad == 0).all()


def test_a_class_without_labeled_pixels_has_the_mean_prior_of_the_others_and_is_not_favored(root):
    prior = T.class_prior(open_dataset("camvid", root, 2), 3)  # of 11 classes, 0 and 3 are labeled
    assert 0.5 < prior[0] != prior[3] < 1
    absent = [1, 2, *range(4, 11)]
    torch.testing.assert_close(prior[absent], (prior[0] + prior[3]).expand(9) / 2)
    prob = torch.tensor([0.40, 0.27, 0.33]).view(1, 3, 1, 1).expand(1, 3, 5, 5)
    assert (pseudo_labels(prob, None, threshold=0.0, prior=prior[[0, 3, 5]]).label == 0).all()


def test_what_cannot_be_learned_is_said_before_training(tmp_path, capsys):
    def check(labeled, val):
        root = folder(tmp_path, images=3, annotated=2)
        for place, values in ((root, labeled), (root / "val", val)):
            for path in (place / "masks").iterdir():
                save_mask(np.resize(values, (48, 64)).astype(np.uint8), path)
        T.check_annotations(open_dataset("folder", root, "all"), torch.device("cpu"))

    says = "folder: 2 labeled, 1 unlabeled, 2 validation images\n"
    check([0, 1, 2, 255], [0, 255])
    assert capsys.readouterr() == (says, "")
    check([0, 2], [1])
    assert capsys.readouterr() == (says, "warning: no labeled pixel is class 1; that cannot be learned\n")
    for labeled, val, says in (
        ([2, 255], [0, 1], "the labeled images show 1 of 3 classes; expected two or more; `python tools/own_images.py"),
        ([255], [0, 1], "the labeled images show 0 of 3 classes"),
        ([0, 1, 2], [255], "the validation masks of folder are all 255; expected class indices to score"),
        ([0, 77], [0], r"/masks/photo \d\.png holds the value 77"),
        ([0, 1, 2], [77], r"val/masks/photo \d\.png holds the value 77"),
    ):
        refused(says, check, labeled, val)


def test_ground_truth_of_unlabeled_images_never_reaches_the_loss(run, tmp_path):
    (tmp_path / "two.txt").write_text("train0\ntrain3\n")
    wrong, odd = (lambda mask, size=size: Image.new("L", size, 5).save(mask) for size in ((64, 48), (77, 77)))
    changes, saved = (lambda mask: None, Path.unlink, wrong, odd, truncate), []
    for number, change in enumerate(changes):
        tree = camvid(tmp_path / f"camvid{number}")
        for mask in (tree / "trainannot").iterdir():
            if mask.stem not in ("train0", "train3"):
                change(mask)
        saved.append(run(f"--root {tree} --labeled {tmp_path / 'two.txt'} --iters 4 --log-every 2", out=f"run{number}"))
    assert all(equal(saved[0], other) for other in saved[1:])
    right = [lines(tmp_path / f"run{number}")[0].get("correct") for number in range(5)]
    assert None not in (right[0], right[2]) and right[0] != right[2]  # the figures did see it
    assert {right[1], right[3], right[4]} == {None}  # what cannot be read is as good as none


def test_a_logged_loss_is_the_mean_of_the_steps_since_the_last_line(run, tmp_path):
    for every in (1, 3):
        run(f"--iters 6 --log-every {every} --eval-every 9", out=str(every))
    one, three = ([line["loss"] for line in lines(tmp_path / out)] for out in ("1", "3"))
    assert three == pytest.approx([np.mean(one[:3]), np.mean(one[3:])], rel=1e-5)


def test_learning_rates_rise_from_zero_and_fall_to_zero(run, tmp_path):
    run(f"--iters 4 --log-every 1 {SGD} --lr 0.08 --lr-warmup 0.5 --power 1")
    assert [line["lr"] for line in lines(tmp_path / "run")] == pytest.approx([0.04, 0.06, 0.04, 0.02])


@pytest.mark.slow
def test_a_compiled_run_trains_the_same(run, tmp_path, monkeypatch):
    monkeypatch.setattr(T.refine, "dpa_threshold", T.refine.dpa_threshold)  # which compiling replaces
    for out, options in (("plain", ""), ("compiled", "--compile --workers 1")):
        run(f"--iters 3 --log-every 1 {SGD} {options}", out=out)
    plain, compiled = (lines(tmp_path / out) for out in ("plain", "compiled"))
    for name in ("loss_x", "loss_u", "threshold", "kept"):
        assert [line[name] for line in compiled] == pytest.approx([line[name] for line in plain], rel=1e-4)
    assert json.loads((tmp_path / "compiled" / "args.json").read_text())["compile"]


@pytest.fixture
def photographs(tmp_path):
    """(folder of 4 labeled and 40 unlabeled images, noisy as photographs; the third of these that is read is broken)"""
    root = camvid(tmp_path / "photographs", train=44)
    for number, path in enumerate(sorted((root / "train").iterdir())):
        noise = np.random.default_rng(number).integers(0, 160, (48, 64, 3))
        Image.fromarray((np.asarray(Image.open(path)) + noise).astype(np.uint8)).save(path)
    unlabeled = open_dataset("camvid", root, 4).unlabeled
    broken = unlabeled[sample_index(40, 0, "order_u", 2)].image
    truncate(broken)
    return root, broken


def test_a_broken_photograph_is_named_once_and_replaced_and_the_run_stays_exact(run, tmp_path, photographs, capfd):
    root, broken = photographs
    options = f"--root {root} --labeled 4 --iters 24 --log-every 1 --eval-every 1"  # more than one pass
    whole, said = run(options, out="whole"), capfd.readouterr().err
    terminated(run, options, 5, out="broken")
    capfd.readouterr()
    assert equal(run(f"{options} --resume --workers 1", out="broken"), whole)
    for text in (said, capfd.readouterr().err):  # once after each start
        assert text.count(f"warning: {broken} could not be read (image ") == text.count("could not be read") == 1
        assert text.count("; the next image is used\n") == 1
    assert figures(tmp_path / "whole") == figures(tmp_path / "broken")


def one_of_two(rank, port, options):
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    T.DeepLabV3Plus = Small
    T.main(T.parse_args(options.split()))
    dist.destroy_process_group()


def test_two_processes_train_as_one_does_with_the_whole_batch(run, tmp_path, photographs, capfd):
    mask = open_dataset("camvid", photographs[0], 4).labeled[1].mask  # which only the second process reads first
    pixels = np.array(Image.open(mask))
    pixels[pixels == 3] = 5
    save_mask(pixels, mask)
    options = f"--root {photographs[0]} --labeled 4 --framework cutmixseg --cutmix 0 --unsup-norm authors --crop 64 "
    options += f"{SGD} --iters 6 --log-every 1 --eval-every 1"  # of images of 64 x 48 pixels, resized: there is padding
    one, said = run(f"{options} --batch-size 4", out="one"), [capfd.readouterr()]
    options = f"{TINY} --device cpu --workers 0 {options} --batch-size 2 --out {tmp_path / 'two'}"
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    mp.spawn(one_of_two, (port, options), nprocs=2)
    two, said = last(tmp_path / "two"), [*said, capfd.readouterr()]
    for text in said:
        assert text.out.count("camvid: 4 labeled, 40 unlabeled, 3 validation images\n") == 1
        assert re.findall("warning: no labeled pixel is (.*); that", text.err) == [
            "building, pole, pavement, sign symbol, fence, car, pedestrian, bicyclist"
        ]
    assert (one["args"]["processes"], two["args"]["processes"]) == (1, 2)
    for part in ("student", "teacher"):
        for name in one[part].keys() - {"seen.running_var", "seen.num_batches_tracked"}:  # each process has its own
            torch.testing.assert_close(two[part][name], one[part][name], rtol=0, atol=1e-6)
    for event in ("train", "val"):
        for ours, theirs in zip(figures(tmp_path / "one", event), figures(tmp_path / "two", event), strict=True):
            assert [*ours] == [*theirs]
            for name, value in ours.items():
                assert theirs[name] == (pytest.approx(value, rel=1e-4) if isinstance(value, float) else value), name


# ----------------------------------------------------------------------------------------------------------------------
# resuming


def test_a_resumed_run_ends_in_the_same_weights_bit_for_bit(run, tmp_path, monkeypatch):
    options = "--iters 6 --warmup-iters 1 --eval-every 1 --prior --log-every 1"
    whole, out = run(options, out="whole", network=DeepLabV3Plus), tmp_path / "run"
    terminated(run, options, 2, network=DeepLabV3Plus)
    with monkeypatch.context() as patch, pytest.raises(NameError):
        patch.delattr(T, "evaluate")  # it dies there
        run(f"{options} --resume", network=DeepLabV3Plus)
    assert last(out)["step"] == 3 and lines(out)[-1]["step"] == 4
    with (out / "metrics.jsonl").open("a") as file:
        file.write('null\n{"event": "train", "st')  # a kill may cut a line
    resumed = run(f"{options} --resume --workers 1", network=DeepLabV3Plus)
    assert equal(whole, resumed) and whole["best"] == resumed["best"]
    assert all(figures(tmp_path / "whole", event) == figures(out, event) for event in ("train", "val"))
    assert [line["step"] for line in lines(out, "val")] == [2, 4, 6]
    starts, settled = lines(out, "start"), json.loads((out / "args.json").read_text())
    assert [line["step"] for line in starts] == [0, 3, 3]
    for name in ("commit", "python", "torch", "torchvision", "hardware"):
        assert {line[name] for line in starts} == {settled[name]}
    assert (settled["torch"], settled["hardware"]) == (torch.__version__, "1 x CPU") and settled["commit"]


def found(out, root, options="", world=1):
    """Return what find_checkpoint finds for the run in `out`, continued with other options."""
    args = resolved(f"{TINY} {FOUR_STEPS} --root {root} --out {out} --resume {options}", "cpu")
    data, device = open_dataset("camvid", args.root, args.labeled), torch.device("cpu")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(T, "rank_and_world", lambda: (0, world))
        return T.find_checkpoint(T.count_steps(args, data, device), data, device)


def test_a_run_continues_elsewhere_and_with_other_learning_rates(run, root, tmp_path):
    (tmp_path / "two.txt").write_text("train3\ntrain0\n")
    mine, moved, out = f"--labeled {tmp_path / 'two.txt'}", camvid(tmp_path / "moved"), tmp_path / "run"
    terminated(run, FOUR_STEPS, 1)
    for where, options, world in ((root, "", 1), (root, "--batch-size 1", 2), (root, mine, 1), (moved, "", 1)):
        assert found(out, where, options, world)["step"] == 2
    saved = run(f"{FOUR_STEPS} --root {moved} {mine} --lr 0.005 --head-lr 0.03 --resume")
    assert [line["lr"] for line in lines(out)] == [0.02, 0.02, 0.005, 0.005]
    assert [group["lr"] for group in saved["optimizer"]["param_groups"]] == [0.005, 0.03]
    assert json.loads((out / "args.json").read_text())["lr"] == 0.005
    run(f"{FOUR_STEPS} --framework supervised", "supervised")  # which reads no unlabeled image
    assert found(tmp_path / "supervised", camvid(tmp_path / "more", train=7), f"{mine} --framework supervised")


def test_an_option_that_a_checkpoint_does_not_know_had_its_default(run, root, tmp_path):
    saved = run(FOUR_STEPS)
    del saved["args"]["dilation"], saved["args"]["weight_decay"]
    torch.save(saved, tmp_path / "run" / "last.pth")
    assert found(tmp_path / "run", root, "--weight-decay 0.0001")["step"] == 4  # the preset's
    says = "another run, dilation was 1 and is 4, weight_decay was 0.0001 and is 0.0; use"
    refused(says, found, tmp_path / "run", root, "--dilation 4")


def test_any_other_change_is_another_run(run, root, tmp_path, monkeypatch):
    run(FOUR_STEPS)
    monkeypatch.chdir(tmp_path)
    Path("two.txt").write_text("train0\ntrain3\n")
    Path("others.txt").write_text("train1\ntrain2\n")
    renamed = camvid(tmp_path / "renamed") / "train" / "train5.png"
    renamed.rename(renamed.with_name("train6.png"))
    camvid(tmp_path / "fewer", train=5), camvid(tmp_path / "more", train=7), camvid(tmp_path / "scored", val=4)
    for options, world, says in (
        ("--alpha0 0.2 --seed 1", 1, "alpha0 was 0.4 and is 0.2, seed was 0 and is 1"),
        ("--iters 5", 1, "iters was 4 and is 5"),
        ("", 2, "steps_per_epoch was 2 and is 1, batch size x processes was 2 and is 4"),
        ("--labeled others.txt", 1, "the labeled images are different, the unlabeled images are different"),
        ("--root renamed", 1, "the unlabeled images are different"),
        ("--root fewer", 1, "the unlabeled images are different"),
        ("--root more", 1, "steps_per_epoch was 2 and is 3, the unlabeled images are different"),
        ("--root scored", 1, "the val images are different"),
    ):
        says = f"--resume: .*run is another run, {says}; use another --out"
        refused(says, found, tmp_path / "run", root, f"--labeled two.txt {options}", world)


def test_a_finished_run_has_nothing_to_do_and_is_not_overwritten(run, tmp_path, capsys):
    run(FOUR_STEPS)
    out, options, loaded = tmp_path / "run", f"{FOUR_STEPS} --weights gone.pth", []
    before = (out / "last.pth").read_bytes()
    for _ in range(2):
        refused("run already holds a run; continue it with --resume, or choose another", run, options)
        (out / "args.json").write_text("")  # as a full disk leaves it
    run(f"{options} --log-every 7 --resume", network=lambda *args: loaded.append(args[3]) or Small(*args))
    assert f"nothing to do: {out / 'last.pth'} is at step 4 of 4" in capsys.readouterr().out
    assert (out / "last.pth").read_bytes() == before and len(lines(out)) == 4 and loaded == ["none"]


def test_the_best_checkpoint_is_written_before_the_last_that_knows_of_it(run, monkeypatch):
    save, written, evaluate, scores = T.save_checkpoint, [], T.evaluate, iter((20.0, 30.0, 25.0))
    monkeypatch.setattr(T, "save_checkpoint", lambda run, to: written.append((to.name, run["best"])) or save(run, to))
    monkeypatch.setattr(T, "evaluate", lambda *args: evaluate(*args) | {"miou": next(scores)})
    run("--iters 6 --eval-every 1")
    assert written == [("best.pth", 20), ("last.pth", 20), ("best.pth", 30), ("last.pth", 30), ("last.pth", 30)]


# ----------------------------------------------------------------------------------------------------------------------
# stop signals, and errors


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_after_the_first_stop_signal_and_after_the_run_the_old_handlers_are_back(run, tmp_path, capfd, number):
    second = []
    signal.signal(number, lambda *args: second.append(args[0]))
    handlers = [signal.getsignal(number) for number in STOP_SIGNALS]
    with pytest.raises(SystemExit, match=str(128 + number)):
        signaled(run, "--iters 4", 1, number, number)
    assert second == [number] and last(tmp_path / "run")["step"] == 2
    name, saved = signal.Signals(number).name, tmp_path / "run" / "last.pth"
    said = capfd.readouterr().err
    assert f"{name}: saving after this step; a second signal ends at once\n" in said
    assert f"{name}: saved step 2 to {saved}; continue with" in said
    run("--iters 4 --resume")
    assert [signal.getsignal(number) for number in STOP_SIGNALS] == handlers


def test_a_signal_that_nohup_ignores_ends_no_run(run):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    assert signaled(run, "--iters 2", 0, signal.SIGHUP)["step"] == 2
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN


def test_a_run_in_a_thread_has_no_stop_signals_and_says_so(run, capsys):
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(run, "--iters 2").result()["step"] == 2
    assert "warning: outside the main thread a stop signal does not save a checkpoint\n" in capsys.readouterr().err


def test_a_folder_that_cannot_be_written_is_named_with_what_to_do_but_a_panel_may_fail(
    run, tmp_path, monkeypatch, capsys
):
    def full(*args):
        raise OSError("no space left")

    record, advice = T.train_record, r".*\); free disk space or check the folder, then use --resume"
    (tmp_path / "file").touch()
    refused(rf"file/run could not be written \(.*Not a directory{advice}", run, "--iters 1", out="file/run")
    with monkeypatch.context() as patch:
        patch.setattr(T, "train_record", lambda run, *args: shutil.rmtree(run.out) or record(run, *args))
        refused(rf"run/metrics\.jsonl could not be written \(.*No such file{advice}", run, "--iters 1")
    with monkeypatch.context() as patch:
        patch.setattr(M.os, "fsync", full)
        refused(rf"run/best\.pth could not be written \(no space left{advice}", run, "--iters 1")
    monkeypatch.setattr(T, "panel", full)
    assert run("--iters 1 --resume")["step"] == 1
    assert "warning: no panel of step 1 (no space left)\n" in capsys.readouterr().err


@pytest.mark.parametrize("step, says", [(2, "the loss is (nan|inf) .* 3 and 4"), (3, "weights .* after step 4")])
def test_a_loss_or_weights_that_are_not_finite_reach_no_checkpoint(run, tmp_path, monkeypatch, step, says):
    monkeypatch.setattr(T, "learning_rate", lambda now, *_: 0.001 if now < step else math.inf)
    says += "; .*run keeps its checkpoints; lower --lr and --head-lr, then use --resume"
    refused(says, run, f"--iters 8 --eval-every 1 {SGD}", network=DeepLabV3Plus)
    saved = last(tmp_path / "run")
    values = [*saved["student"].values(), *saved["teacher"].values()]
    assert saved["step"] == 2 and all(value.isfinite().all() for value in values)


@pytest.mark.slow
def test_memory_and_open_files_stay_as_they_are_over_hundreds_of_steps(run, monkeypatch):
    write, seen = T.write_record, []

    def measured(run, record):
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        seen.append((record["step"], pages * resource.getpagesize() / 2**20, len(os.listdir("/proc/self/fd"))))
        write(run, record)

    monkeypatch.setattr(T, "write_record", measured)
    run("--iters 1000 --log-every 50 --eval-every 50")
    settled = [(mib, handles) for step, mib, handles in seen if step >= 300]
    assert len(settled) == 23 and settled[-1][0] - settled[0][0] < 8 and len({handles for _, handles in settled}) == 1


# ----------------------------------------------------------------------------------------------------------------------
# lengths, presets, words


def resolved(options="", device="cuda"):
    return T.fill_presets(T.parse_args(options.split()), torch.device(device))


def lengths(options, labeled, unlabeled, world=1, device="cuda"):
    """Return (epoch, run, warm-up, evaluation) in steps."""
    data = SimpleNamespace(labeled=range(labeled), unlabeled=range(unlabeled))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(T, "rank_and_world", lambda: (0, world))
        args = T.count_steps(resolved(options, device), data, torch.device(device))
    assert args.processes == world
    return args.steps_per_epoch, args.iters, args.warmup_iters, args.eval_steps


@pytest.mark.parametrize("options, images, expected", [
    ("--dataset pascal", (366, 10216), (3406, 80 * 3406, 3406, 8 * 3406)),  # warm-up: one epoch
    ("--dataset pascal --epochs 2 --eval-every 1", (366, 10216, 4), (852, 1704, 852, 852)),
    ("--dataset pascal --framework supervised", (366, 0), (122, 9760, 122, 976)),  # epochs over the labeled images
    ("--dataset pascal --framework supervised --epochs 3", (10, 0), (4, T.MIN_SUPERVISED_STEPS, 4, 100)),
    ("--dataset folder --epochs 7 --warmup-epochs 2", (10, 33), (5, 35, 10, 4)),
    ("--dataset folder --epochs 7", (10, 33), (5, 35, 7, 4)),  # a fifth
    ("--dataset shapes", (24, 376), (94, 1500, 300, 150)),  # a fifth
    ("--dataset shapes --iters 100", (24, 376), (94, 100, 20, 10)),
])  # fmt: skip
def test_epochs_become_steps(options, images, expected):
    assert lengths(options, *images) == expected


def test_lengths_that_cannot_train_are_refused():
    says, options = "the warm-up of 9 steps leaves no step of 9 for unlabeled", "--iters 9 --warmup-iters 9"
    refused(f"{says} images; lower --warmup-iters", lengths, options, 4, 4)
    lengths(f"{options} --framework supervised", 4, 0)
    for options, world, device in (("--framework supervised", 1, "cuda"), ("--warmup-iters 1", 2, "cpu")):
        says = "--batch-size 1 leaves BatchNorm a single value in a batch"
        refused(says, lengths, f"--batch-size 1 {options}", 4, 4, world, device)
        lengths(f"--batch-size 1 {options}", 4, 4, world=2)  # which GPUs share


def test_presets_are_appendix_d_s_and_the_command_line_beats_them():
    paper = dict(
        epochs=80, crop=513, batch_size=3, lr=0.001, head_lr=0.01, weight_decay=1e-4, power=0.9, optimizer="sgd",
        cutmix=0.5, ema=0.99, alpha0=0.4, neighborhood=3, neighbors=1, select="max", confidence="margin", prior=False,
        backbone="resnet101", threshold=None, refinement=True, distance_weight=True, sup_loss="ce", unsup_norm="kept",
        dilation=1, lambda_u=1.0, warmup_epochs=1, iters=None, warmup_iters=None, floor=0.0, eval_mode="original",
        framework="fixmatch", s4mc=True, lr_warmup=0.0,
    )  # fmt: skip
    assert paper.items() <= vars(resolved("--dataset pascal")).items()
    paper |= dict(crop=769, batch_size=2, lr=0.01, head_lr=0.01, weight_decay=5e-4, eval_mode="sliding")
    paper["sup_loss"] = "ohem"
    assert paper.items() <= vars(resolved("--dataset cityscapes")).items()
    args = resolved("--dataset pascal --crop 321 --iters 100 --warmup-iters 5 --lr 0.5")
    assert (args.crop, args.epochs, args.warmup_epochs, args.lr, args.head_lr) == (321, None, None, 0.5, 0.01)
    ours = dict(framework="fixmatch", unsup_norm="valid", floor=0.95, iters=1000, crop=192, backbone="mobilenet_v2")
    ours |= dict(lr=2e-4, head_lr=1e-3, lr_warmup=0.1, warmup_share=0.2, batch_size=8)
    assert ours.items() <= vars(resolved("--dataset folder", "cpu")).items()
    ours |= dict(framework="unimatch", iters=6000, crop=321, backbone="resnet50")
    assert ours.items() <= vars(resolved("--dataset folder", "cuda")).items()
    assert resolved("--dataset camvid --confidence entropy").floor == 0
    args = resolved("--dataset pascal --backbone dinov2_vitb14 --weight-decay 0")
    assert (args.optimizer, args.lr, args.head_lr, args.weight_decay) == ("adamw", 5e-6, 2e-4, 0)
    assert (args.weights, args.output_stride, args.crop) == ("pretrained", 16, 513)


@pytest.mark.parametrize("options, changes, out", [
    ("", {}, "fixmatch-0"), ("--framework fixmatch --seed 3", {}, "fixmatch-3"),
    ("--framework cutmixseg", {"threshold": 0.97}, "cutmixseg-0"),
    ("--framework cutmixseg --threshold 0.8", {"threshold": 0.8}, "cutmixseg-0"),
    ("--refinement", {"refinement": True}, "fixmatch-0"), ("--floor 0.5", {"floor": 0.5}, "fixmatch-0"),
    ("--confidence margin", {"confidence": "margin"}, "fixmatch-0"),
    ("--unsup-norm kept", {"unsup_norm": "kept"}, "fixmatch-0"),
])  # fmt: skip
def test_without_s4mc_pseudo_labels_are_the_framework_s_own_and_each_setting_can_be_given(options, changes, out):
    own = {"refinement": False, "confidence": "max", "threshold": 0.95, "unsup_norm": "valid", "floor": 0.0}
    args = vars(resolved(f"--dataset camvid --no-s4mc {options}", "cpu"))
    assert {name: args[name] for name in own} == own | changes and args["out"] == f"runs/camvid-46-{out}"


def test_the_folder_of_a_run_names_dataset_labels_method_and_seed():
    assert resolved("--seed 3").out == "runs/shapes-24-s4mc-fixmatch-3"
    assert resolved("--dataset camvid --labeled lists/mine.txt").out == "runs/camvid-mine-s4mc-unimatch-0"
    assert resolved("--framework supervised").out == "runs/shapes-24-supervised-0"


@pytest.mark.parametrize("new", [True, False])
def test_bfloat16_is_the_default_only_on_gpus_that_do_not_emulate_it(monkeypatch, new):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation or new)
    assert (resolved().amp, resolved(device="cpu").amp, resolved("--amp", "cpu").amp) == (new, False, True)
    assert not resolved("--no-amp").amp and resolved("--amp").amp


@pytest.mark.parametrize("options, says", [
    ("--alpha0 2", "2 is out of range; expected at least 0 and at most 1"),
    ("--epochs 3 --iters 9", "a length is given twice"),
    ("--backbone dinov2_vits14 --output-stride 16", "--output-stride has no meaning for dinov2_vits14"),
    ("--prior --dilation 2", "--prior is counted over adjacent pixels; expected --dilation 1 with it"),
])  # fmt: skip
def test_bad_arguments_are_named(capsys, options, says):
    with pytest.raises(SystemExit):
        resolved(options)
    assert says in capsys.readouterr().err


def test_a_run_says_first_what_it_trains_on_and_then_a_line_per_log(run, tmp_path, capsys):
    run("--iters 2 --log-every 1 --eval-every 1 --warmup-iters 1 --amp")
    said = capsys.readouterr().out.splitlines()
    assert said[:3] == [
        "camvid: 2 labeled, 4 unlabeled, 3 validation images",
        "s4mc-fixmatch, resnet10 on 1 x CPU; 2 steps of 2 labeled + 2 unlabeled images, "
        "the first 1 with labeled images only",
        f"starts, writes to {tmp_path / 'run'}",
    ]
    assert re.fullmatch(r"step 1/2  \d+m\d\ds left  loss \d\.\d{3}  [\d.]+ images/s", said[3])
    share = r"\d+\.\d% \(raw \d+\.\d%\)"
    figures = rf"alpha 0\.20  threshold 0\.\d{{3}}  kept {share}  correct {share}  [\d.]+ images/s"
    assert re.fullmatch(rf"step 2/2  0m00s left  loss \d\.\d{{3}} = \d\.\d{{3}} \+ 1 x \d\.\d{{3}}  {figures}", said[4])
    assert re.fullmatch(r"step 2/2  teacher's mIoU [\d.]+, best [\d.]+", said[5])
    assert said[-1] == f"score it again with: python evaluate.py {tmp_path / 'run' / 'last.pth'}"
    assert [path.name for path in (tmp_path / "run" / "panels").iterdir()] == ["step-000002.png"]
    settled = json.loads((tmp_path / "run" / "args.json").read_text())
    assert (settled["iters"], settled["amp"], settled["processes"]) == (2, True, 1)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_no_step_waits_for_the_gpu(run, tmp_path, monkeypatch, framework):
    decay, steps = T.ema_decay, []

    def watched(updates, limit):  # the last call of a step before the log
        steps.append(updates)
        torch.cuda.set_sync_debug_mode({2: "error", 6: "default"}.get(len(steps), torch.cuda.get_sync_debug_mode()))
        return decay(updates, limit)

    monkeypatch.setattr(T, "ema_decay", watched)
    try:
        options = f"--device cuda --crop 64 --iters 8 --log-every 7 --eval-every 9 --framework {framework}"
        run(options, network=DeepLabV3Plus)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(steps) == 8 and lines(tmp_path / "run")[-1]["peak_memory_gib"] > 0
