"""train.py: little runs against a plain loop and in two processes, resuming, what ends a run, presets."""

import copy
import errno
import json
import math
import os
import re
import resource
import signal
import socket
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from PIL import Image
from torch import nn
from trees import camvid, refused, truncate

import model as M
import train as T
from data import cutmix, generator, normalize, open_dataset, sampled, strong_views, training_loader
from model import DeepLabV3Plus
from refine import pseudo_labels

FRAMEWORKS = ["supervised", "cutmixseg", "fixmatch", "unimatch"]
TINY = (
    "--dataset camvid --labeled 2 --backbone resnet10 --weights none --crop 32 --batch-size 2 --warmup-iters 0 "
    "--framework fixmatch --unsup-norm kept --floor 0"
)
SGD = "--optimizer sgd --lr 0.02 --head-lr 0.02 --weight-decay 0"
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
    """One thread sums in one order; main() takes both signals over."""
    threads, handlers = torch.get_num_threads(), {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)}
    torch.set_num_threads(1)
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


def terminated(run, options, step, out="run", network=Small):
    """The run, ended by SIGTERM in a step."""
    mine, stop = T.sample_numbers, lambda number: number == step and os.kill(os.getpid(), signal.SIGTERM)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit, match="143"):  # 128 + 15
        patch.setattr(T, "sample_numbers", lambda number, *args: stop(number) or mine(number, *args))
        run(options, out, network)


def mean_over_labeled(logits, label):
    labeled, index = label != 255, label.clamp(max=logits.shape[1] - 1).long()
    return -(logits.log_softmax(1).gather(1, index[:, None])[:, 0] * labeled).sum() / labeled.sum()


def plain_loop(root, framework, steps=16, warmup=4, batch=2, seed=7):
    """(student, teacher) after a run, its formulas written out."""
    loader = training_loader(open_dataset("camvid", root, 2), range(steps), batch, 32, framework, seed)
    torch.manual_seed(seed)
    student = DeepLabV3Plus("resnet10", 11).to(memory_format=torch.channels_last).train()
    teacher = copy.deepcopy(student).eval()
    head = [parameter for name, parameter in student.named_parameters() if not name.startswith("backbone.")]
    groups = [{"params": [*student.backbone.parameters()]}, {"params": head}]
    optimizer = torch.optim.SGD(groups, momentum=0.9, weight_decay=5e-4)
    for step, views in enumerate(loader):
        x, y, numbers = views["x"], views["y"], range(step * batch, (step + 1) * batch)
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
            streams = range(2 if framework == "unimatch" else 1)
            seen = [weak if framework == "cutmixseg" else strong_views(weak, seed, numbers, i) for i in streams]
            parts = [cutmix(rng, 0.5, normalize(view), label) for view in seen]
            strong, target = (torch.cat(part) for part in zip(*parts))
            drop = None
            if framework == "unimatch":  # one of two images drops channels in one stream, and doubles them in the other
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


@pytest.mark.slow
def test_a_compiled_run_trains_the_same(run, tmp_path):
    for out, options in (("plain", ""), ("compiled", "--compile")):
        run(f"--iters 3 --log-every 1 {SGD} {options}", out=out)
    plain, compiled = (lines(tmp_path / out) for out in ("plain", "compiled"))
    for name in ("loss_x", "loss_u", "threshold", "kept"):
        assert [line[name] for line in compiled] == pytest.approx([line[name] for line in plain], rel=1e-4)
    assert json.loads((tmp_path / "compiled" / "args.json").read_text())["compile"]


@pytest.fixture
def photographs(tmp_path):
    """(folder of 4 labeled and 40 unlabeled images, noisy as photographs; the first three read, the third is broken)"""
    root = camvid(tmp_path / "photographs", train=44)
    for number, path in enumerate(sorted((root / "train").iterdir())):
        noise = np.random.default_rng(number).integers(0, 160, (48, 64, 3))
        Image.fromarray((np.asarray(Image.open(path)) + noise).astype(np.uint8)).save(path)
    unlabeled = open_dataset("camvid", root, 4).unlabeled
    first = [unlabeled[sampled(40, 0, "order_u", number)].image for number in range(3)]
    truncate(first[2])
    return root, first


def test_a_broken_photograph_is_named_replaced_and_counted_and_many_end_the_run(run, tmp_path, photographs, capsys):
    root, images = photographs
    options = f"--root {root} --labeled 4 --iters 24 --log-every 1 --eval-every 1"  # more than one pass
    whole, said = run(options, out="whole"), capsys.readouterr().err
    terminated(run, options, 5, out="broken")
    capsys.readouterr()
    assert equal(run(f"{options} --resume --workers 1", out="broken"), whole)
    for text in (said, capsys.readouterr().err):  # once after each start
        assert text.count("could not be read") == text.count(f"warning: {images[2]} could not be read (image ") == 1
    one, two = ([line | {"broken": 1} for line in figures(tmp_path / out)] for out in ("whole", "broken"))
    assert one == two and [line.get("broken") for line in lines(tmp_path / "whole")] == [None] + [1] * 23
    truncate(*images[:2])
    says = "3 of 40 unlabeled images could not be read, each is named above; replace or remove them, then use --resume"
    refused(says, run, f"--root {root} --labeled 4 --iters 4 --log-every 2", out="three")
    assert capsys.readouterr().err.count("could not be read (image file is truncated)") == 3


def one_of_two(rank, port, options):
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    T.DeepLabV3Plus = Small
    T.main(T.parse_args(options.split()))
    dist.destroy_process_group()


def test_two_processes_train_as_one_does_with_the_whole_batch(run, tmp_path, photographs):
    options = f"--root {photographs[0]} --labeled 4 --framework cutmixseg --cutmix 0 --unsup-norm authors --crop 64 "
    options += f"{SGD} --iters 6 --log-every 1 --eval-every 1"  # of images of 64 x 48 pixels, resized: there is padding
    one = run(f"{options} --batch-size 4", out="one")
    options = f"{TINY} --device cpu --workers 0 {options} --batch-size 2 --out {tmp_path / 'two'}"
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    mp.spawn(one_of_two, (port, options), nprocs=2)
    two = last(tmp_path / "two")
    assert (one["args"]["processes"], two["args"]["processes"]) == (1, 2)
    for part in ("student", "teacher"):
        for name in one[part].keys() - {"seen.running_var", "seen.num_batches_tracked"}:  # each process has its own
            torch.testing.assert_close(two[part][name], one[part][name], rtol=0, atol=1e-6)
    for event in ("train", "val"):
        for ours, theirs in zip(figures(tmp_path / "one", event), figures(tmp_path / "two", event), strict=True):
            assert [*ours] == [*theirs]
            for name, value in ours.items():
                assert theirs[name] == (pytest.approx(value, rel=1e-4) if isinstance(value, float) else value), name
    assert lines(tmp_path / "two")[-1]["broken"] == 1


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
        file.write('{"event": "train", "st')  # a kill may cut a line
    resumed = run(f"{options} --resume --workers 1", network=DeepLabV3Plus)
    assert equal(whole, resumed) and whole["best"] == resumed["best"]
    assert all(figures(tmp_path / "whole", event) == figures(out, event) for event in ("train", "val"))
    assert [line["step"] for line in lines(out, "val")] == [2, 4, 6]


def found(out, root, options="", world=1):
    """(arguments, what find_checkpoint finds) for the run in `out`, continued with other options."""
    args = resolved(f"{TINY} {FOUR_STEPS} --root {root} --out {out} --resume {options}", "cpu")
    data = open_dataset("camvid", args.root, args.labeled)
    T.epochs_to_steps(args, data, world, torch.device("cpu"))
    return args, T.find_checkpoint(args, data, 0)


def test_a_run_continues_elsewhere_with_a_lower_rate_or_fewer_photographs(run, root, tmp_path, capsys):
    (tmp_path / "two.txt").write_text("train3\ntrain0\n")
    mine, moved, out = f"--labeled {tmp_path / 'two.txt'}", camvid(tmp_path / "moved"), tmp_path / "run"
    terminated(run, FOUR_STEPS, 1)
    capsys.readouterr()
    for where, options, world in ((root, "", 1), (root, "--batch-size 1", 2), (root, mine, 1), (moved, "", 1)):
        assert found(out, where, options, world)[1]["step"] == 2 and capsys.readouterr().err == ""
    for number in (1, 5):
        (moved / "train" / f"train{number}.png").unlink()
    args = found(out, moved, mine)[0]
    assert (args.steps_per_epoch, args.eval_steps) == (2, 2)  # as they were, for two images less are one step
    assert capsys.readouterr().err == "--resume: 2 unlabeled images fewer\n"
    saved = run(f"{FOUR_STEPS} --root {moved} {mine} --lr 0.005 --head-lr 0.01 --resume")
    said = capsys.readouterr().err
    assert " lr was 0.02 and is 0.005" in said and "head_lr was 0.02 and is 0.01" in said
    assert [line["lr"] for line in lines(out)] == [0.02, 0.02, 0.005, 0.005]
    assert [group["lr"] for group in saved["optimizer"]["param_groups"]] == [0.005, 0.01]
    assert json.loads((out / "args.json").read_text())["lr"] == 0.005
    assert len(saved["unlabeled"]) == 4  # so that it continues once more
    run(f"{FOUR_STEPS} --framework supervised", "alone")
    assert found(tmp_path / "alone", camvid(tmp_path / "more", train=7), f"{mine} --framework supervised")


def test_any_other_change_is_another_run(run, root, tmp_path, monkeypatch):
    run(FOUR_STEPS)
    monkeypatch.chdir(tmp_path)
    Path("two.txt").write_text("train0\ntrain3\n")
    Path("others.txt").write_text("train1\ntrain2\n")
    renamed = camvid(tmp_path / "renamed") / "train" / "train5.png"
    renamed.rename(renamed.with_name("train6.png")).with_name("train4.png").unlink()  # fewer, but others among them
    camvid(tmp_path / "more", train=7), camvid(tmp_path / "scored", val=4)
    for options, world, says in (
        ("--alpha0 0.2 --seed 1", 1, "alpha0 was 0.4 and is 0.2, seed was 0 and is 1"),
        ("--iters 5", 1, "iters was 4 and is 5"),
        ("--lr 0.03", 1, "lr was 0.02 and is 0.03"),
        ("", 2, "batch size x processes was 2 and is 4, .*"),
        ("--labeled others.txt", 1, "the labeled images are others, the unlabeled images are others"),
        ("--root renamed", 1, "the unlabeled images are others"),
        ("--root more", 1, ".*the unlabeled images are others"),
        ("--root scored", 1, "the val images are others"),
    ):
        says = f"--resume: .*run is another run, {says}; use another --out"
        refused(says, found, tmp_path / "run", root, f"--labeled two.txt {options}", world)


def test_a_finished_run_has_nothing_to_do_and_is_not_overwritten(run, tmp_path, monkeypatch, capsys):
    run(FOUR_STEPS)
    out, options, loaded = tmp_path / "run", f"{FOUR_STEPS} --weights gone.pth", []
    before = (out / "last.pth").read_bytes()
    for _ in range(2):
        refused("run already holds a run; continue it with --resume, or choose another", run, options)
        (out / "args.json").write_text("")  # as a full disk leaves it
    run(f"{options} --log-every 7 --resume", network=lambda *args: loaded.append(args[3]) or Small(*args))
    assert f"nothing to do: {out / 'last.pth'} is at step 4 of 4" in capsys.readouterr().out
    assert (out / "last.pth").read_bytes() == before and len(lines(out)) == 4 and loaded == ["none"]
    monkeypatch.setattr(T, "all_reduce", lambda steps, *_: steps.clamp(min=0))  # as beside a process without it
    says = "--resume: the processes find different checkpoints in .*; use a shared"
    refused(says, run, f"{options} --resume")


def test_the_best_checkpoint_is_written_before_the_last_that_knows_of_it(run, monkeypatch):
    save, written, evaluate, scores = T.save_checkpoint, [], T.evaluate, iter((20.0, 30.0, 25.0))
    monkeypatch.setattr(T, "save_checkpoint", lambda run, to: written.append((to.name, run["best"])) or save(run, to))
    monkeypatch.setattr(T, "evaluate", lambda *args: evaluate(*args) | {"miou": next(scores)})
    run("--iters 6 --eval-every 1")
    assert written == [("best.pth", 20), ("last.pth", 20), ("best.pth", 30), ("last.pth", 30), ("last.pth", 30)]


# ----------------------------------------------------------------------------------------------------------------------
# what ends a run, or may not


@pytest.mark.parametrize("number, says", [
    (errno.ENOSPC, "make room"), (errno.EROFS, "it is read-only; choose a folder of your own"),
    (errno.ENOENT, "the folder is gone; make it again"), (errno.ENOTDIR, "a part of the path is a file"),
])  # fmt: skip
def test_a_folder_that_cannot_be_written_is_named_with_what_to_do(run, monkeypatch, number, says):
    def refuse(*args):
        raise OSError(number, os.strerror(number))

    for module, name, file in ((M.os, "fsync", "run/best.pth"), (T.fcntl, "lockf", "run")):  # a late and an early write
        monkeypatch.setattr(module, name, refuse)
        refused(rf"/{file} could not be written .*\): {says}, then use --resume", run, "--iters 1 --resume")


def test_a_run_goes_on_without_a_compiler_locks_of_files_or_a_panel_and_says_so(run, monkeypatch, capsys):
    def refuse(*args, **options):
        raise OSError(errno.ENOLCK, "none\nhere")

    for module, name in ((torch, "compile"), (T.fcntl, "lockf"), (T, "panel")):
        monkeypatch.setattr(module, name, refuse)
    saved, said = run("--iters 1 --compile"), capsys.readouterr().err
    assert saved["step"] == 1 and not saved["args"]["compile"] and "warning: no panel of step 1 ([Errno 37]" in said
    assert "warning: trains without --compile ([Errno 37] none)\n" in said


@pytest.mark.parametrize("step, says", [(2, "the loss is (nan|inf) .* 3 and 4"), (3, "weights .* after step 4")])
def test_a_loss_or_weights_that_are_not_finite_reach_no_checkpoint(run, tmp_path, monkeypatch, step, says):
    monkeypatch.setattr(T, "learning_rate", lambda now, *_: 0.001 if now < step else math.inf)
    says += "; .*last.pth is the last good checkpoint; lower --lr and"
    refused(says, run, f"--iters 8 --eval-every 1 {SGD}", network=DeepLabV3Plus)
    saved = last(tmp_path / "run")
    values = [*saved["student"].values(), *saved["teacher"].values()]
    assert saved["step"] == 2 and all(value.isfinite().all() for value in values)


@pytest.mark.slow
def test_memory_and_open_files_stay_as_they_are_over_hundreds_of_steps(run, monkeypatch):
    write, seen = T.write_record, []

    def measured(out, board, rank, record):
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        seen.append((record["step"], pages * resource.getpagesize() / 2**20, len(os.listdir("/proc/self/fd"))))
        write(out, board, rank, record)

    monkeypatch.setattr(T, "write_record", measured)
    run("--iters 1000 --log-every 50 --eval-every 50")
    settled = [(mib, handles) for step, mib, handles in seen if step >= 300]
    assert len(settled) == 23 and settled[-1][0] - settled[0][0] < 8 and len({handles for _, handles in settled}) == 1


def test_what_is_in_the_environment_of_processes_is_said_and_a_gpu_shown_alone_is_taken(monkeypatch, capsys):
    monkeypatch.setattr(os, "environ", {"WORLD_SIZE": "2"})
    refused("WORLD_SIZE=2 is in the environment, RANK, MASTER_ADDR, MASTER_PORT not; st", M.start_processes, "cpu")
    monkeypatch.setattr(M, "WAIT", 1)
    monkeypatch.setattr(os, "environ", dict(WORLD_SIZE="2", RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="0"))
    refused("2 processes did not meet in 1 s; start all, or unset WORLD_SIZE", M.start_processes, "cpu")
    assert "waits up to 1 s for 2 processes, as the environment says: RANK=0, WORLD_SIZE=2" in capsys.readouterr().err
    chosen = []
    for name, function in (("is_available", lambda: True), ("device_count", lambda: 1), ("set_device", chosen.append)):
        monkeypatch.setattr(torch.cuda, name, function)
    monkeypatch.setattr(os, "environ", {"LOCAL_RANK": "3"})  # a scheduler's
    assert M.start_processes()[2] == torch.device("cuda", 0) == chosen[0]


# ----------------------------------------------------------------------------------------------------------------------
# lengths, presets, words


def resolved(options="", device="cuda"):
    args = T.parse_args(options.split())
    T.fill_presets(args, torch.device(device))
    return args


def lengths(options, labeled, unlabeled, world=1, device="cuda"):
    """(epoch, run, warm-up, evaluation) in steps."""
    args, data = resolved(options), SimpleNamespace(labeled=range(labeled), unlabeled=range(unlabeled))
    T.epochs_to_steps(args, data, world, torch.device(device))
    return args.steps_per_epoch, args.iters, args.warmup_iters, args.eval_steps


@pytest.mark.parametrize("options, images, expected", [
    ("--dataset pascal", (366, 10216), (3406, 80 * 3406, 3406, 8 * 3406)),  # warm-up: one epoch
    ("--dataset pascal --epochs 2 --eval-every 1", (366, 10216, 4), (852, 1704, 852, 852)),
    ("--dataset pascal --framework supervised", (366, 0), (122, 9760, 122, 976)),  # epochs over the labeled images
    ("--dataset pascal --framework supervised --epochs 3", (10, 0), (4, T.SUPERVISED_FLOOR, 4, 100)),
    ("--dataset folder --epochs 7 --warmup-epochs 2", (10, 33), (5, 35, 10, 4)),
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
        framework="fixmatch",
    )  # fmt: skip
    assert paper.items() <= vars(resolved("--dataset pascal")).items()
    paper |= dict(crop=769, batch_size=2, lr=0.01, head_lr=0.01, weight_decay=5e-4, eval_mode="sliding")
    paper["sup_loss"] = "ohem"
    assert paper.items() <= vars(resolved("--dataset cityscapes")).items()
    args = resolved("--dataset pascal --crop 321 --iters 100 --warmup-iters 5 --lr 0.5")
    assert (args.crop, args.epochs, args.warmup_epochs, args.lr, args.head_lr) == (321, None, None, 0.5, 0.01)
    ours = dict(framework="fixmatch", unsup_norm="valid", floor=0.95, iters=3000, crop=128, backbone="mobilenet_v2")
    assert ours.items() <= vars(resolved("--dataset folder", "cpu")).items()
    ours |= dict(framework="unimatch", iters=6000, crop=321, backbone="resnet50")
    assert ours.items() <= vars(resolved("--dataset camvid", "cuda")).items()
    assert resolved("--dataset camvid --confidence entropy").floor == 0
    args = resolved("--dataset pascal --backbone dinov2_vitb14 --weights imagenet --weight-decay 0")
    assert (args.optimizer, args.lr, args.head_lr, args.weight_decay) == ("adamw", 5e-6, 2e-4, 0)
    assert (args.weights, args.output_stride, args.crop) == ("pretrained", 16, 513)


@pytest.mark.parametrize("new", [True, False])
def test_bfloat16_is_the_default_only_on_gpus_that_do_not_emulate_it(monkeypatch, new):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation or new)
    assert (resolved().amp, resolved(device="cpu").amp, resolved("--amp", "cpu").amp) == (new, False, True)
    assert not resolved("--no-amp").amp and resolved("--amp").amp


@pytest.mark.parametrize("options, says", [
    ("--alpha0 2", "2 is out of range; expected at least 0 and at most 1"), ("--epochs 3 --iters 9", "same length"),
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
        "fixmatch, resnet10 on 1 x CPU; 2 steps of 2 labeled + 2 unlabeled images, the first 1 of labeled ones only",
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
    assert (settled["torch"], settled["iters"], settled["amp"]) == (torch.__version__, 2, True)
    run("--iters 1 --batch-size 1", out="one")
    assert "with one image per process CutMix has no second image and changes nothing" in capsys.readouterr().err


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
