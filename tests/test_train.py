"""train.py: the losses, what may and may not reach them, two processes, resuming, and whole runs through the scripts."""

import json
import math
import os
import random
import re
import resource
import signal
import socket
import subprocess
import sys
import time
from collections import deque
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from PIL import Image
from test_data import camvid
from torch import nn

import evaluate as E
import train as T
from data import Data, InputError, Item, strong_views
from evaluate import pseudo_label_figures, refinement_options, stop_on_input_error
from model import DeepLabV3Plus, ema_teacher, resnet
from refine import pseudo_labels

ROOT = Path(__file__).parent.parent


def arguments(**changes):
    return SimpleNamespace(
        **{
            "framework": "fixmatch",
            "warmup_steps": 0,
            "iters": 10,
            "alpha0": 0.4,
            "sup_loss": "ce",
            "lambda_u": 1.0,
            "cutmix": 0.5,
        }
        | changes
    )


def little_batch(batch=4, size=12, classes=3, seed=0):
    rng = torch.Generator().manual_seed(seed)
    images = {
        name: torch.randint(0, 256, (batch, 3, size, size), dtype=torch.uint8, generator=rng)
        for name in ("x", "weak", "strong")
    }
    labels = {
        name: torch.randint(0, classes, (batch, size, size), dtype=torch.uint8, generator=rng)
        for name in ("y", "truth")
    }
    labels["y"][0, :5] = 255
    return images | labels | {"valid": torch.rand(batch, size, size, generator=rng) < 0.9}


class Coarse(nn.Module):
    """A network that decides on a coarser grid, as DeepLabV3Plus does."""

    def __init__(self, classes):
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, classes, 1))

    def forward(self, x, upsample=True):
        logits = self.layers(x)
        return nn.functional.interpolate(logits, x.shape[-2:], mode="bilinear") if upsample else logits


def networks(seed=0, classes=3):
    torch.manual_seed(seed)
    return [Coarse(classes) for _ in range(2)]


def losses(batch, step=3, options=None, **changes):
    student, teacher = networks()
    loss, log = T.training_losses(
        student, teacher, batch, step, arguments(**changes), options or {}, np.random.default_rng(0)
    )
    loss.backward()
    return loss.item(), [p.grad.clone() for p in student.parameters()], log


def test_the_learning_rate_is_the_paper_s_power_of_what_is_left():
    assert [T.learning_rate(step, 100, 0.01) for step in (0, 50, 99)] == pytest.approx(
        [0.01, 0.01 * 0.5**0.9, 0.01 * 0.01**0.9]
    )


def test_cross_entropy_is_the_mean_over_labeled_pixels():
    logits, label = torch.randn(2, 3, 4, 4), torch.randint(0, 3, (2, 4, 4))
    label[0, :2] = 255
    expected = -logits.log_softmax(1).gather(1, label.clamp(max=2)[:, None])[:, 0][label != 255].mean()
    assert T.cross_entropy(logits, label).item() == pytest.approx(expected.item(), rel=1e-5)


def test_the_loss_on_the_network_s_own_grid_is_that_of_full_size_logits():
    batch = little_batch()
    label, (student, _) = batch["y"].long(), networks()
    x = batch["x"].float() / 255
    whole = nn.functional.cross_entropy(student(x), label, ignore_index=255)
    expected = torch.autograd.grad(whole, list(student.parameters()))
    coarse = T.supervised_loss(student(x, upsample=False), batch["y"], "ce")
    assert coarse.item() == pytest.approx(whole.item(), rel=1e-5)
    for one, two in zip(torch.autograd.grad(coarse, list(student.parameters())), expected):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-6)
    logits = student(x, upsample=False)
    full = nn.functional.interpolate(logits, label.shape[-2:], mode="bilinear")
    for sure in (0.34, 0.4):
        assert torch.equal(T.hard_pixels(logits, batch["y"], sure, 3), T.hard_pixels(full, batch["y"], sure, 3))


def test_hard_example_mining_keeps_unsure_pixels_and_at_least_the_hardest():
    torch.manual_seed(0)
    logits, label = 4 * torch.randn(2, 5, 9, 9), torch.randint(0, 5, (2, 9, 9), dtype=torch.uint8)
    label[0, :3] = 255
    prob = logits.softmax(1).gather(1, label.clamp(max=4).long()[:, None])[:, 0]
    valid = label != 255
    mined = T.hard_pixels(logits, label, per_image=1)
    assert torch.equal(mined != 255, valid & (prob <= 0.7)) and torch.equal(mined[mined != 255], label[mined != 255])
    sure = torch.rand(2, 5, 9, 9) + 6 * nn.functional.one_hot(label.clamp(max=4).long(), 5).movedim(-1, 1)
    kept = T.hard_pixels(sure, label, per_image=5) != 255
    confidence = sure.softmax(1).gather(1, label.clamp(max=4).long()[:, None])[:, 0]
    assert (
        kept.sum() >= 10 and confidence[kept].max() <= confidence[valid & ~kept].min() and confidence[valid].min() > 0.7
    )
    assert torch.equal(T.hard_pixels(sure, label, per_image=1000), label)  # more than there are: all of them


def test_hard_example_mining_changes_the_supervised_loss_alone():
    batch = little_batch()
    plain, mined = (losses(batch, sup_loss=kind)[2]["losses"] for kind in ("ce", "ohem"))
    assert plain[2] == mined[2]
    logits = torch.randn(1, 3, 400, 400)  # more pixels than the hardest hundred thousand
    label = logits.argmax(1)
    assert T.supervised_loss(logits, label, "ohem") > T.supervised_loss(logits, label, "ce")


def test_without_a_labeled_pixel_the_loss_is_zero_and_training_goes_on():
    loss, gradients, log = losses(little_batch(), options={"threshold": 2.0})
    assert log["losses"][2] == 0 and loss == log["losses"][1].item() > 0 and all(g.isfinite().all() for g in gradients)
    nothing = little_batch()
    nothing["y"].fill_(255)
    loss, gradients, _ = losses(nothing, options={"threshold": 2.0})
    assert loss == 0 and all((g == 0).all() for g in gradients)


def test_the_truth_of_unlabeled_images_never_reaches_the_loss():
    batch = little_batch()
    other = batch | {"truth": (batch["truth"] + 1) % 3}
    absent = {name: value for name, value in batch.items() if name != "truth"}
    results = [losses(b)[:2] for b in (batch, other, absent)]
    for loss, gradients in results[1:]:
        assert loss == results[0][0] and all(map(torch.equal, gradients, results[0][1]))


def test_ignored_and_padded_pixels_never_reach_the_loss():
    batch = little_batch()
    batch["valid"][:] = True
    batch["valid"][:, :, 6:] = False
    student, teacher = networks()
    _, log = T.training_losses(student, teacher, batch, 3, arguments(cutmix=0.0), {}, np.random.default_rng(0))
    assert (log["pseudo"].label[:, :, 6:] == 255).all() and not log["pseudo"].keep[:, :, 6:].any()
    logits = torch.randn(1, 3, 4, 4, requires_grad=True)
    label = torch.zeros(1, 4, 4, dtype=torch.long)
    label[0, 2] = 255
    T.cross_entropy(logits, label).backward()
    assert (logits.grad[0, :, 2] == 0).all() and (logits.grad[0, :, 1] != 0).any()


def test_the_frameworks_differ_in_their_strong_view_alone():
    batch = little_batch()
    same = batch | {"strong": batch["weak"]}
    assert losses(batch, framework="cutmixseg")[0] == losses(same, framework="fixmatch")[0] != losses(batch)[0]
    loss, _, log = losses(batch, framework="supervised")
    assert log["losses"].tolist() == [loss, loss, 0] and "pseudo" not in log
    assert losses(batch, warmup_steps=4)[0] == loss != losses(batch, warmup_steps=3)[0]


def test_the_teacher_receives_no_gradient_and_lambda_weighs_the_unlabeled_loss():
    student, teacher = networks()
    loss, log = T.training_losses(
        student, teacher, little_batch(), 3, arguments(lambda_u=0.25), {}, np.random.default_rng(0)
    )
    loss.backward()
    assert all(p.grad is None for p in teacher.parameters())
    assert loss.item() == log["losses"][0] == pytest.approx((log["losses"][1] + 0.25 * log["losses"][2]).item())


def test_figures_count_kept_and_correct_with_and_without_refinement():
    prob = torch.tensor([[0.9, 0.1], [0.5, 0.5], [0.45, 0.55], [0.2, 0.8]]).T.view(1, 2, 2, 2)
    batch = {
        "valid": torch.ones(1, 2, 2, dtype=torch.bool),
        "truth": torch.tensor([[[0, 255], [0, 1]]], dtype=torch.uint8),
    }
    pseudo = pseudo_labels(prob, None, threshold=0.05)
    figures = pseudo_label_figures(prob, pseudo, batch, {})
    margins = (prob[0, 0] - prob[0, 1]).abs().flatten()
    expected = np.histogram(margins, bins=20, range=(0, 1))[0] / 4
    assert figures["histogram_raw"] == pytest.approx(expected.tolist()) and sum(figures["histogram"]) == pytest.approx(
        1
    )
    raw_keep, keep = torch.tensor([True, False, True, True]), pseudo.keep.flatten()
    right = (pseudo.label.flatten() == batch["truth"].flatten()) & keep
    judged = keep & torch.tensor([True, False, True, True])
    assert figures["kept_raw"] == raw_keep.float().mean().item() and figures["kept"] == keep.float().mean().item()
    assert figures["correct_raw"] == pytest.approx(2 / 3) and figures["correct"] == pytest.approx(
        (right.sum() / judged.sum()).item()
    )
    assert figures["tp_change"] == pytest.approx((right.sum().item() - 2) / 3)
    assert figures["fp_change"] == pytest.approx(((judged.sum() - right.sum()).item() - 1) / 3)


def _gradients_of_one_process(rank, world, path, batch, queue):
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=world)
    student, teacher = networks()
    student = nn.parallel.DistributedDataParallel(student)
    share = {name: value.chunk(world)[rank] for name, value in batch.items()}
    loss, log = T.training_losses(student, teacher, share, 3, arguments(cutmix=0.0), {}, np.random.default_rng(0))
    loss.backward()
    total = loss.detach() / world
    dist.all_reduce(total)
    queue.put((rank, total.item(), [p.grad.numpy() for p in student.parameters()]))
    del student, loss, log  # gloo hangs where the group goes before what uses it
    dist.destroy_process_group()


def test_two_processes_give_the_loss_and_gradient_of_one_with_the_whole_batch(tmp_path):
    batch = little_batch()
    batch["y"][0] = 255  # so that the processes hold very different numbers of labeled pixels
    batch["valid"][1, :8] = False
    loss, gradients, _ = losses(batch, cutmix=0.0)
    queue = mp.get_context("spawn").SimpleQueue()
    context = mp.spawn(_gradients_of_one_process, (2, tmp_path / "store", batch, queue), nprocs=2, join=False)
    results = [queue.get() for _ in range(2)]
    while not context.join():
        pass
    for _, total, grads in results:
        assert total == pytest.approx(loss, rel=1e-5)
        for one, two in zip(gradients, grads):
            torch.testing.assert_close(torch.from_numpy(two), one, rtol=1e-4, atol=1e-6)


# ----------------------------------------------------------------------------------------------------------------------
# through the command line

TWO_PROCESSES = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
TINY = ["--crop", "32", "--batch-size", "2", "--workers", "0", "--device", "cpu", "--backbone", "resnet10"]


def script(name, *arguments, launcher=(), check=True, cwd=None):
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, *launcher, str(ROOT / name), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=cwd)
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done


def run(out, *arguments):
    """A run in this process, which is faster than a script."""
    torch.set_num_threads(1)
    T.train(T.Run(T.parse_args([*TINY, "--out", str(out), *map(str, arguments)])))
    return torch.load(out / "last.pth", weights_only=True)


def lines(out, event):
    return [
        record
        for record in map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
        if record["event"] == event
    ]


@pytest.fixture(scope="module")
def camvid_root(tmp_path_factory):
    return camvid(tmp_path_factory.mktemp("data") / "camvid", train=6, val=3, size=(64, 48))


def test_train_evaluate_and_panels_end_to_end(tmp_path, camvid_root):
    out = tmp_path / "run"
    done = script(
        "train.py", *TINY, "--dataset", "camvid", "--root", camvid_root, "--labeled", 2, "--iters", 4, "--warmup-epochs", 1,
        "--log-every", 1, "--eval-every", 1, "--out", out, "--prior",
    )  # fmt: skip
    assert "step 4/4" in done.stdout and "mIoU" in done.stdout
    first, last = lines(out, "train")[0], lines(out, "train")[-1]
    assert (
        len(lines(out, "train")) == 4
        and "kept" not in first
        and {"loss_u", "threshold", "kept", "correct", "tp_change"} <= set(last)
    )
    assert {"args.json", "metrics.jsonl", "last.pth", "best.pth", "panels"} == {path.name for path in out.iterdir()}
    assert sorted(path.name for path in (out / "panels").iterdir()) == ["step-000002.png", "step-000004.png"]
    assert json.loads((out / "args.json").read_text())["torch"] == torch.__version__

    done = script(
        "evaluate.py",
        out / "last.pth",
        "--json",
        tmp_path / "scores.json",
        "--panels",
        tmp_path / "panels",
        "--device",
        "cpu",
    )
    result = json.loads((tmp_path / "scores.json").read_text())
    assert result["miou"] == pytest.approx(lines(out, "val")[-1]["miou"]) and len(result["iou"]) == 11
    assert list((tmp_path / "panels").iterdir()) and "pixel accuracy" in done.stdout
    assert 0 <= result["boundary_miou"] <= 100 and result["eval_mode"] == "original" and not result["refine"]
    two = script(
        "evaluate.py", out / "last.pth", "--json", tmp_path / "two.json", "--device", "cpu",
        launcher=TWO_PROCESSES,
    )  # fmt: skip
    assert json.loads((tmp_path / "two.json").read_text())["iou"] == pytest.approx(result["iou"]), two.stderr


@pytest.fixture(scope="module")
def finished(tmp_path_factory, camvid_root):
    """The last checkpoint of a short run."""
    out = tmp_path_factory.mktemp("finished") / "run"
    options = ["--labeled", 2, "--iters", 3, "--warmup-epochs", 0, "--log-every", 1]
    run(out, "--dataset", "camvid", "--root", camvid_root, *options)
    return out / "last.pth"


def scored(tmp_path, checkpoint, *options):
    E.main([str(checkpoint), "--device", "cpu", "--json", str(tmp_path / "scores.json"), *options])
    return json.loads((tmp_path / "scores.json").read_text())


def test_every_protocol_of_evaluation_runs_through_the_command_line(tmp_path, monkeypatch, finished):
    used, predict, load_model = [], E.predict, E.load_model
    monkeypatch.setattr(
        E, "predict", lambda model, image, protocol: used.append(protocol) or predict(model, image, protocol)
    )
    monkeypatch.setattr(E, "load_model", lambda *args: used.append(args[2]) or load_model(*args))
    plain, options = (
        E.Protocol("original", 32),
        refinement_options(json.loads((finished.parent / "args.json").read_text())),
    )
    for command, protocol in (
        ([], plain),
        (["--eval-mode", "sliding", "--crop", "40"], plain._replace(eval_mode="sliding", crop=40)),
        (["--eval-mode", "center-crop"], plain._replace(eval_mode="center-crop")),
        (["--tta"], plain._replace(tta=True)),
        (["--refine"], plain._replace(refine=E.options_of_refine(options))),
        (["--student", "--split", "train"], plain),
    ):
        used.clear()
        result = scored(tmp_path, finished, *command)
        assert used[0] == result["network"] == ("student" if "--student" in command else "teacher")
        assert used[1:] == [protocol] * result["images"] and result["images"] == (6 if "train" in command else 3)
        assert result["split"] == ("train" if "train" in command else "val") and result["refine"] == (
            "--refine" in command
        )
        assert 0 <= result["miou"] <= 100 and (result["eval_mode"], result["crop"], result["tta"]) == protocol[:3]
    with pytest.raises(InputError, match="camvid has no test images; expected another --split"):
        scored(tmp_path, finished, "--split", "test")
    with pytest.raises(SystemExit):
        scored(tmp_path, finished, "--pseudo-labels", "--refine")


def test_the_report_on_pseudo_labels_runs_through_the_command_line_and_over_processes(tmp_path, finished, capsys):
    report = scored(tmp_path, finished, "--pseudo-labels")
    assert (
        report["raw"]["kept"]["all"] == pytest.approx(0.6) and report["images"] == 4 and report["split"] == "unlabeled"
    )
    said = capsys.readouterr().out
    assert "threshold: the 40% quantile" in said and "the same near contours" in said
    script(
        "evaluate.py", finished, "--pseudo-labels", "--json", tmp_path / "two.json", "--device", "cpu",
        launcher=TWO_PROCESSES,
    )  # fmt: skip
    assert json.loads((tmp_path / "two.json").read_text())["refined"] == report["refined"]


def test_two_processes_train_and_evaluate_together(tmp_path, camvid_root):
    script(
        "train.py", *TINY, "--dataset", "camvid", "--root", camvid_root, "--labeled", 2, "--iters", 3, "--eval-every", 1, "--warmup-epochs", 1,
        "--out", tmp_path / "run", launcher=TWO_PROCESSES,
    )  # fmt: skip
    record = lines(tmp_path / "run", "train")[-1]
    assert record["step"] == 3 and math.isfinite(record["loss"]) and len(lines(tmp_path / "run", "val")) == 3


@pytest.mark.parametrize("framework", ["supervised", "cutmixseg", "fixmatch"])
@pytest.mark.parametrize("refinement", ["--refinement", "--no-refinement"])
def test_every_framework_trains_with_and_without_refinement(tmp_path, monkeypatch, framework, refinement):
    monkeypatch.setattr("data.SHAPES_VAL", 2)
    run(tmp_path, "--framework", framework, refinement, "--iters", 2, "--warmup-epochs", 0, "--log-every", 1)
    last = lines(tmp_path, "train")[-1]
    assert math.isfinite(last["loss"]) and ("kept" in last) == (framework != "supervised")
    assert framework == "supervised" or (last["kept"] == last["kept_raw"]) == (refinement == "--no-refinement")


@pytest.mark.parametrize(
    "option",
    [
        ["--neighborhood", "cross"], ["--neighborhood", "7", "--neighbors", "2"], ["--select", "min"], ["--select", "random"], ["--dilation", "4"],
        ["--no-distance-weight"], ["--prior"], ["--confidence", "max"], ["--confidence", "entropy"], ["--threshold", "0.1"], ["--output-stride", "8"],
    ],
)  # fmt: skip
def test_every_option_of_the_method_trains(tmp_path, monkeypatch, option):
    monkeypatch.setattr("data.SHAPES_VAL", 1)
    run(tmp_path, "--iters", 1, "--warmup-epochs", 0, *option)
    assert math.isfinite(lines(tmp_path, "train")[-1]["loss"])


def equal_states(one, two):
    return all(torch.equal(one[part][name], two[part][name]) for part in ("student", "teacher") for name in one[part])


@pytest.mark.parametrize("inside", [False, True], ids=["after an evaluation", "inside one"])
def test_a_resumed_run_ends_in_the_same_weights_bit_for_bit(tmp_path, monkeypatch, camvid_root, inside):
    common = [
        "--dataset",
        "camvid",
        "--root",
        camvid_root,
        "--labeled",
        2,
        "--iters",
        5,
        "--warmup-epochs",
        1,
        "--eval-every",
        1,
    ]
    whole = run(tmp_path / "whole", *common)
    original, evaluated = T.evaluate, []

    def die(*args):
        evaluated.append(None if inside and evaluated else original(*args))
        if len(evaluated) == 2:
            raise KeyboardInterrupt
        return evaluated[-1]

    with monkeypatch.context() as patch:
        patch.setattr(T, "evaluate", die)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "broken", *common, *(["--save-every", 0] if inside else []))
    assert torch.load(tmp_path / "broken" / "last.pth", weights_only=True)["step"] == (3 if inside else 2)
    resumed = run(tmp_path / "broken", *common, "--resume", "--workers", 1)
    assert equal_states(whole, resumed) and whole["best"] == resumed["best"]
    assert [r["step"] for r in lines(tmp_path / "broken", "val")] == [2, 4, 5]


LONG = [
    *TINY,
    "--labeled",
    2,
    "--iters",
    12,
    "--warmup-epochs",
    0,
    "--eval-every",
    1,
    "--log-every",
    1,
    "--dataset",
    "camvid",
]


def started(out, *arguments, launcher=(), **options):
    """A run in a process of its own; its lines come through stdout."""
    command = [sys.executable, *launcher, ROOT / "train.py", *LONG, "--out", out, *arguments]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(list(map(str, command)), **pipes, text=True, env=env, **options)


def children(process):
    """The ids of the processes that a process has started and that run one of the scripts."""
    ids = Path(f"/proc/{process}/task/{process}/children").read_text().split()
    return [int(i) for i in ids if b"train.py" in Path(f"/proc/{i}/cmdline").read_bytes()]


def wait_for(process, text):
    for line in process.stdout:
        if text in line:
            return
    raise AssertionError(f"{text!r} never came: {process.stderr.read()}")


def test_a_killed_process_resumes_bit_for_bit_wherever_it_was(tmp_path, camvid_root):
    whole = run(tmp_path / "whole", *LONG, "--root", camvid_root)
    out = tmp_path / "killed"
    for when, workers in ((3, 0), (8, 1)):  # in the middle of passes over the four unlabeled images
        process = started(out, "--root", camvid_root, "--save-every", 0, "--resume", "--workers", workers)
        wait_for(process, f"step {when:>2}/12")
        time.sleep(random.uniform(0, 0.5))  # anywhere in a step, an evaluation, a checkpoint
        process.kill()
        process.wait()
        assert torch.load(out / "last.pth", weights_only=True)["step"] >= when - 1
    resumed = run(out, *LONG, "--root", camvid_root, "--resume")
    assert equal_states(whole, resumed) and [r["step"] for r in lines(out, "train")] == list(range(1, 13))
    assert [r["step"] for r in lines(out, "val")] == [2, 4, 6, 8, 10, 12]


def test_two_processes_go_on_by_themselves_when_one_dies_and_resume_when_both_do(tmp_path, camvid_root):
    tree = ["--root", camvid_root, "--save-every", 0, "--eval-every", 4]
    script("train.py", *LONG, *tree, "--out", tmp_path / "whole", launcher=TWO_PROCESSES)
    out = tmp_path / "killed"
    process = started(out, *tree, launcher=[*TWO_PROCESSES, "--max-restarts=1"])
    wait_for(process, "step  3/12")
    os.kill(children(process.pid)[1], signal.SIGKILL)
    wait_for(process, "step  7/12")  # after the restart, from the last checkpoint
    time.sleep(random.uniform(0, 0.5))
    for pid in [process.pid, *children(process.pid)]:  # torchrun first
        os.kill(pid, signal.SIGKILL)
    process.wait()
    script("train.py", *LONG, *tree, "--out", out, "--resume", launcher=TWO_PROCESSES)
    one, two = (torch.load(folder / "last.pth", weights_only=True) for folder in (tmp_path / "whole", out))
    assert equal_states(one, two) and one["step"] == two["step"] == 12
    assert [r["step"] for r in lines(out, "train")] == list(range(1, 13))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_deterministic_run_on_a_gpu_resumes_bit_for_bit(tmp_path, camvid_root):
    common = [*LONG, "--root", camvid_root, "--device", "cuda", "--deterministic", "--crop", 64]
    script("train.py", *common, "--out", tmp_path / "whole")
    process = started(tmp_path / "killed", *common, "--save-every", 0)
    wait_for(process, "step  5/12")
    process.kill()
    process.wait()
    script("train.py", *common, "--out", tmp_path / "killed", "--resume")
    one, two = (torch.load(tmp_path / name / "last.pth", weights_only=True) for name in ("whole", "killed"))
    assert equal_states(one, two)


def test_a_loader_worker_that_dies_says_which_file_it_held(tmp_path, camvid_root):
    process = started(tmp_path / "run", "--root", camvid_root, "--workers", 1, "--iters", 10000)
    wait_for(process, "step     3/10000")
    os.kill(children(process.pid)[0], signal.SIGKILL)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 1 and len(said.strip().splitlines()) == 1, said
    file = re.search(
        r"a loader worker died .*(?:Killed|unexpectedly).*; the last file it opened is (\S+\.png); look at that file",
        said,
    )
    assert file, said
    assert Path(file[1]).is_file() and Path(file[1]).is_relative_to(camvid_root)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_a_checkpoint_and_says_so_in_the_exit_code(tmp_path, camvid_root, number):
    process = started(tmp_path / "run", "--root", camvid_root, "--workers", 1, start_new_session=True)
    wait_for(process, "step  3/12")
    os.killpg(process.pid, number)  # the loader's worker gets it too, as from a scheduler or a terminal
    _, said = process.communicate(timeout=60)
    step = torch.load(tmp_path / "run" / "last.pth", weights_only=True)["step"]
    assert process.returncode == 128 + number and step >= 3
    assert f"{number.name}: saved step {step} to " in said and "continue with --resume" in said


def test_processes_that_find_different_checkpoints_say_so(tmp_path, camvid_root):
    run(tmp_path / "one" / "run", *LONG, "--root", camvid_root)
    command = [sys.executable, ROOT / "train.py", *LONG, "--root", camvid_root, "--out", "run", "--resume"]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": "2"}
    checkpoint = torch.load(tmp_path / "one" / "run" / "last.pth", weights_only=True)
    checkpoint["args"] |= {"processes": 2, "steps_per_epoch": 1}
    torch.save(checkpoint, tmp_path / "one" / "run" / "last.pth")
    started = []
    for rank, folder in enumerate(("one", "two")):
        (tmp_path / folder).mkdir(exist_ok=True)
        env = os.environ | address | {"RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"}
        pipe = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
        started.append(subprocess.Popen(list(map(str, command)), cwd=tmp_path / folder, env=env, **pipe))
    for process in started:
        _, said = process.communicate(timeout=120)
        assert (
            process.returncode == 1 and "some processes find run at step 0, others at 12; expected one folder" in said
        )


def test_a_restart_goes_on_with_its_own_run_alone(tmp_path, monkeypatch):
    run = object.__new__(T.Run)
    run.out = tmp_path
    assert not run.restarted()
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "this one")
    assert run.restarted()  # it died before it had written anything
    for machines, launch in (("2", "this one"), ("1", f"this one {os.getppid()}")):
        monkeypatch.setenv("GROUP_WORLD_SIZE", machines)
        for name in (launch, "another"):
            (tmp_path / "args.json").write_text(json.dumps({"launch": name}))
            assert run.restarted() == (name == launch)


def test_the_best_checkpoint_is_written_before_the_last_that_knows_of_it(tmp_path, monkeypatch):
    names, save = [], T.Run.save
    monkeypatch.setattr(T.Run, "save", lambda self, name: (names.append(name), save(self, name)))
    monkeypatch.setattr("data.SHAPES_VAL", 1)
    run(tmp_path, "--iters", 1, "--warmup-epochs", 0)
    assert names == ["best.pth", "last.pth"]


@pytest.mark.parametrize("rank", [0, 1])
def test_a_signal_to_one_of_two_processes_saves_a_checkpoint_and_ends_both(tmp_path, camvid_root, rank):
    process = started(tmp_path / "run", "--root", camvid_root, "--iters", 1000, launcher=TWO_PROCESSES)
    wait_for(process, "step    3/1000")
    os.kill(children(process.pid)[rank], signal.SIGTERM)
    _, said = process.communicate(timeout=60)
    step = torch.load(tmp_path / "run" / "last.pth", weights_only=True)["step"]
    assert process.returncode and 3 <= step < 1000
    assert f"SIGTERM: saved step {step} to " in said and "Connection closed" not in said


@pytest.mark.parametrize("full", [True, False], ids=["full", "not to be written to"])
def test_a_full_disk_keeps_the_last_good_checkpoint(tmp_path, monkeypatch, full):
    monkeypatch.setattr("data.SHAPES_VAL", 1)
    run(tmp_path, "--iters", 1, "--warmup-epochs", 0)
    before = (tmp_path / "last.pth").read_bytes()
    going_on = T.Run(T.parse_args([*TINY, "--out", str(tmp_path), "--iters", "1", "--warmup-epochs", "0", "--resume"]))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    if full:
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, hard))
    else:  # a test that runs as root may write everywhere
        monkeypatch.setattr(torch, "save", lambda _, file: open("/proc/version", "wb"))
    try:
        with pytest.raises(
            InputError, match=r"last\.pth could not be written \(.*last.pth is the last good checkpoint; make"
        ):
            going_on.save("last.pth")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (tmp_path / "last.pth").read_bytes() == before and not (tmp_path / "last.pth.tmp").exists()


class Tiny(nn.Module):
    """Stands in for DeepLabV3Plus where only the loop is looked at."""

    def __init__(self, backbone, num_classes, output_stride=16, weights="none"):
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4))
        self.head = nn.Conv2d(4, num_classes, 1)

    def forward(self, x, upsample=True):
        return self.head(self.backbone(x).relu())


def test_memory_and_open_files_stay_as_they_are_over_two_thousand_steps(tmp_path, monkeypatch):
    monkeypatch.setattr(T, "DeepLabV3Plus", Tiny)
    monkeypatch.setattr("data.SHAPES_VAL", 2)
    seen, log = [], T.Run.log

    def measured(self, *args):
        record = log(self, *args)
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        seen.append((record["step"], pages * resource.getpagesize() / 2**20, len(os.listdir("/proc/self/fd"))))
        return record

    monkeypatch.setattr(T.Run, "log", measured)
    run(tmp_path, "--iters", 2000, "--warmup-epochs", 0, "--log-every", 100, "--eval-every", 100)
    settled = [(mib, handles) for step, mib, handles in seen if step >= 600]  # until then drawn images are kept
    assert len(settled) == 15 and settled[-1][0] - settled[0][0] < 8 and len({handles for _, handles in settled}) == 1


@pytest.mark.parametrize(
    "options",
    [
        ["--labeled", 1], ["--labeled", 1, "--batch-size", 8], ["--batch-size", 1], ["--batch-size", 1, "--framework", "cutmixseg"],
        ["--labeled", 5, "--batch-size", 8],
    ],
    ids=lambda options: " ".join(map(str, options)),
)  # fmt: skip
def test_few_images_and_little_batches_train(tmp_path, monkeypatch, camvid_root, options):
    tree = ["--dataset", "camvid", "--root", camvid_root, "--labeled", 2]
    run(tmp_path, *tree, "--iters", 2, "--warmup-epochs", 0, "--log-every", 1, *options)
    assert all(math.isfinite(record["loss"]) for record in lines(tmp_path, "train"))


def test_masks_without_a_single_label_and_of_one_class_train(tmp_path):
    root = camvid(tmp_path / "camvid", train=4, val=2, size=(64, 48))
    for i, value in enumerate((255, 3)):
        Image.fromarray(np.full((48, 64), value, np.uint8)).save(root / "trainannot" / f"train{i}.png")
    (tmp_path / "list.txt").write_text("train0\ntrain1\n")
    common = ["--dataset", "camvid", "--root", root, "--iters", 3, "--warmup-epochs", 0, "--log-every", 1]
    run(tmp_path / "run", *common, "--labeled", tmp_path / "list.txt")
    assert all(math.isfinite(record["loss"]) for record in lines(tmp_path / "run", "train"))


def test_more_processes_than_images_score_the_same(tmp_path):
    root = camvid(tmp_path / "camvid", train=3, val=1, size=(64, 48))
    out = tmp_path / "run"
    run(out, "--dataset", "camvid", "--root", root, "--labeled", 1, "--iters", 1, "--warmup-epochs", 0)
    script("evaluate.py", out / "last.pth", "--json", tmp_path / "two.json", "--device", "cpu", launcher=TWO_PROCESSES)
    assert json.loads((tmp_path / "two.json").read_text())["iou"] == pytest.approx(lines(out, "val")[-1]["iou"])


def test_the_seed_alone_decides_a_run(tmp_path, monkeypatch):
    monkeypatch.setattr("data.SHAPES_VAL", 1)
    one, two, other = (
        run(tmp_path / str(i), "--iters", 2, "--warmup-epochs", 0, "--seed", seed) for i, seed in enumerate((0, 0, 1))
    )
    assert equal_states(one, two) and not equal_states(one, other)


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_good_checkpoint(tmp_path, monkeypatch, camvid_root):
    original, calls = T.training_losses, []

    def poisoned(*args):
        loss, log = original(*args)
        calls.append(1)
        return (loss * math.nan, log | {"losses": log["losses"] * math.nan}) if len(calls) == 3 else (loss, log)

    monkeypatch.setattr(T, "training_losses", poisoned)
    with pytest.raises(
        InputError,
        match=r"the loss of step 3 is nan, at --lr 0.0\d+ with the images (train\d, ){3}train\d; training stopped, .*last.pth is the last",
    ):
        run(
            tmp_path,
            "--dataset",
            "camvid",
            "--root",
            camvid_root,
            "--labeled",
            2,
            "--iters",
            5,
            "--eval-every",
            1,
            "--log-every",
            100,
        )
    checkpoint = torch.load(tmp_path / "last.pth", weights_only=True)
    assert (
        len(calls) == 3
        and checkpoint["step"] == 2
        and all(value.isfinite().all() for value in checkpoint["student"].values())
    )


def test_a_run_is_never_overwritten_nor_continued_with_other_arguments(tmp_path, monkeypatch):
    monkeypatch.setattr("data.SHAPES_VAL", 1)
    run(tmp_path, "--iters", 1, "--warmup-epochs", 0)
    with pytest.raises(InputError, match="already holds a run; continue it with --resume, or choose another folder"):
        run(tmp_path, "--iters", 1, "--warmup-epochs", 0)
    with pytest.raises(InputError, match="--resume: in .*, alpha0 was 0.4 and is 0.2; expected the same arguments"):
        run(tmp_path, "--iters", 1, "--warmup-epochs", 0, "--alpha0", 0.2, "--resume")
    with pytest.raises(
        InputError, match="--resume: .*, iters was 1 and is 2; expected the same arguments, because sched"
    ):
        run(tmp_path, "--iters", 2, "--warmup-epochs", 0, "--resume")
    monkeypatch.setattr("data.SHAPES_TRAIN", 479)  # other images are spaced evenly then
    with pytest.raises(InputError, match="began with 24 labeled images, and 24 others are there now"):
        run(tmp_path, "--iters", 1, "--warmup-epochs", 0, "--resume")


def test_a_checkpoint_of_another_class_count_is_refused(tmp_path, monkeypatch, camvid_root):
    monkeypatch.setattr("data.SHAPES_VAL", 1)
    run(tmp_path, "--iters", 1, "--warmup-epochs", 0)
    with pytest.raises(InputError, match="last.pth predicts 7 classes, camvid has 11"):
        run(tmp_path, "--dataset", "camvid", "--root", camvid_root, "--labeled", 2, "--iters", 1, "--resume")


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["--dataset", "mnist"], "invalid choice: 'mnist'"),
        (
            ["--dataset", "camvid", "--root", "nowhere"],
            "--root nowhere is not there; expected a folder with train/",
        ),
        (["--labeled", "1000"], "--labeled 1000 is impossible; expected 1 to 480"),
        (["--labeled", "all"], "--labeled all leaves no unlabeled image; use --framework supervised"),
        (["--crop", "4000"], "--crop 4000 is larger than the images can fill"),
        (["--batch-size", "1"], "--batch-size 1 gives BatchNorm a single value"),
        (["--weights", "nowhere.pth"], "--weights nowhere.pth: no such file"),
        (["--alpha0", "2"], "2 is out of range; expected at least 0 and at most 1"),
        (["--neighborhood", "4"], "invalid choice: 4"),
    ],
)
def test_bad_arguments_end_in_one_sentence(tmp_path, capsys, arguments, says):
    command = ["--device", "cpu", "--workers", "0", "--out", str(tmp_path / "run"), *arguments]
    with pytest.raises(SystemExit) as end:
        stop_on_input_error(lambda: T.train(T.Run(T.parse_args(command))))
    said = capsys.readouterr().err
    assert says in said and (end.value.code == 2 or said.count("\n") == 1)  # 2: argparse's, which prints the usage too


def test_a_broken_image_in_a_loader_worker_ends_in_one_sentence(tmp_path):
    root = camvid(tmp_path / "camvid")
    for path in (root / "train").iterdir():
        path.write_bytes(path.read_bytes()[:70])
    labeled = ["--dataset", "camvid", "--root", root, "--labeled", 2]
    done = script("train.py", *TINY, *labeled, "--workers", 1, "--out", tmp_path / "run", check=False)
    assert done.returncode == 1 and len(done.stderr.strip().splitlines()) == 1
    assert ".png could not be read" in done.stderr and "replace the file" in done.stderr


def test_help_names_where_defaults_come_from():
    said = " ".join(script("train.py", "--help").stdout.split())
    assert "[paper]" in said and "[authors' code" in said and "(default: 0.4)" in said
    assert "pascal 513 [paper], cityscapes 769 [paper]" in said and "camvid on cpu 128 [ours]" in said
    assert "pascal 1 [authors' code]" in said and "cityscapes ohem [common practice]" in said
    assert "cityscapes 769 [paper], folder: from the images found [ours]" in said


def test_a_run_says_first_what_it_trains_on_and_how_long(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("data.SHAPES_VAL", 2)
    run(tmp_path, "--iters", 1, "--warmup-epochs", 0)
    images = "shapes: 24 labeled, 456 unlabeled, 2 validation images; resnet10 on the CPU"
    steps = "1 steps of 2 labeled + 2 unlabeled images, the first 0 of labeled ones alone"
    assert capsys.readouterr().out.startswith(f"{images}; {steps}; writes to {tmp_path}\n{{")
    run(tmp_path / "alone", "--iters", 1, "--framework", "supervised")
    assert "; 1 steps of 2 labeled images; writes to" in capsys.readouterr().out


def test_a_resumed_run_needs_no_pretrained_weights(tmp_path, monkeypatch):
    monkeypatch.setattr("data.SHAPES_VAL", 1)
    weights = tmp_path / "resnet10.pth"
    torch.save(resnet("resnet10").state_dict(), weights)
    common = ["--iters", 1, "--warmup-epochs", 0, "--weights", weights]
    saved = run(tmp_path / "run", *common)
    weights.unlink()
    assert equal_states(run(tmp_path / "run", *common, "--resume"), saved)


def test_an_interrupted_program_ends_without_a_traceback(capsys):
    def interrupted():
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as end:
        stop_on_input_error(interrupted)
    assert end.value.code == 128 + signal.SIGINT and capsys.readouterr().err == ""


def resolved(*command, device="cuda"):
    args = T.parse_args(list(command))
    T.fill_presets(args, torch.device(device))
    return args


def test_presets_are_appendix_d_s_and_the_command_line_beats_them():
    paper = dict(epochs=80, crop=513, batch_size=3, lr=0.001, head_lr=0.01, weight_decay=1e-4, power=0.9, sup_loss="ce")
    paper |= dict(cutmix=0.5, ema=0.99, alpha0=0.4, neighborhood=3, neighbors=1, select="max", confidence="margin")
    paper |= dict(
        backbone="resnet101", weights="imagenet", threshold=None, refinement=True, prior=False, distance_weight=True
    )
    args = vars(resolved("--dataset", "pascal", "--labeled", "92"))
    assert {name: args[name] for name in paper} == paper and args["labeled"] == "92" and args["eval_mode"] == "original"
    paper |= dict(crop=769, batch_size=2, lr=0.01, head_lr=0.01, weight_decay=5e-4, sup_loss="ohem")
    args = vars(resolved("--dataset", "cityscapes", "--labeled", "186"))
    assert {name: args[name] for name in paper} == paper and args["eval_mode"] == "sliding"
    args = resolved("--dataset", "pascal", "--crop", "321", "--iters", "100", "--sup-loss", "ohem")
    assert (args.crop, args.iters, args.epochs, args.sup_loss) == (321, 100, None, "ohem")


@pytest.mark.parametrize("dataset", T.DATASETS)
@pytest.mark.parametrize("device", T.ANY)
def test_a_preset_leaves_nothing_open_but_what_has_another_meaning(dataset, device):
    args = vars(resolved("--dataset", dataset, device=device))
    from_the_images = {"crop", "warmup_epochs", "eval_every"} if dataset == "folder" else set()
    assert {name for name, value in args.items() if value is None} <= {
        "splits",
        "threshold",
        "epochs",
        "iters",
    } | from_the_images
    assert args["epochs"] or args["iters"] or dataset == "folder"


@pytest.mark.parametrize("device, images, expected", [
    ("cpu", 2000, dict(crop=128, iters=5000, warmup_epochs=1, eval_every=1)),
    ("cuda", 2000, dict(crop=480, iters=6000, warmup_epochs=2, eval_every=2)),
    ("cpu", 20, dict(crop=128, iters=2000, warmup_epochs=40, eval_every=40)),
])  # fmt: skip
def test_the_preset_of_a_folder_follows_from_the_images_found(tmp_path, device, images, expected):
    Image.new("RGB", (640, 480)).save(tmp_path / "a.png")
    item = Item("a", tmp_path / "a.png", None)
    data = Data("folder", ("0", "1"), (0.5, 2.0), {}, [item] * 40, [item] * images, [item], [], ("found",))
    args = resolved("--dataset", "folder", device=device)
    said = T.suit_folder(args, data, torch.device(device), 1).notes
    assert {name: getattr(args, name) for name in expected} == expected
    assert said[0] == "found" and "their short side about 480: --crop" in said[1]
    args = resolved("--dataset", "folder", "--crop", "96", "--epochs", "3", device=device)
    T.suit_folder(args, data, torch.device(device), 1)
    assert (args.crop, args.epochs, args.iters) == (96, 3, None)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_few_steps_on_a_gpu(tmp_path):
    out = tmp_path / "run"
    script(
        "train.py", "--crop", 64, "--workers", 0, "--device", "cuda", "--iters", 3, "--warmup-epochs", 0, "--out", out
    )
    assert math.isfinite(lines(out, "train")[-1]["loss"]) and lines(out, "train")[-1]["peak_memory_gib"] > 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("framework", ["supervised", "cutmixseg", "fixmatch"])
def test_no_step_waits_for_the_gpu(framework):
    device, rng = torch.device("cuda"), np.random.default_rng(0)
    student = DeepLabV3Plus("resnet10", 3).to(device, memory_format=torch.channels_last).train()
    teacher = ema_teacher(student)
    optimizer = torch.optim.SGD(student.parameters(), 0.01, 0.9, fused=True)
    batch = {name: value.to(device) for name, value in little_batch(size=64).items()}
    run = object.__new__(T.Run)  # the part of it that takes down the losses
    run.world, run.device, run.losses, run.arriving = 1, device, [], deque()
    run.noticed, run.ending = [], None

    def step(number):
        run.step = number
        batch["strong"] = strong_views(batch["weak"], 0, range(4))
        with torch.autocast("cuda", torch.bfloat16):
            loss, log = T.training_losses(student, teacher, batch, number, arguments(framework=framework), {}, rng)
        run.note(log["losses"])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        teacher.update_parameters(student)

    step(1)  # constants are copied, algorithms are chosen
    torch.cuda.set_sync_debug_mode("error")
    try:
        for number in range(2, 5):
            step(number)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    run.look_at_losses(waiting=0)
    assert len(run.losses) == 4 and not run.arriving
