"""train.py: whole little runs against a plain loop, the losses, two processes, resuming, lengths and presets."""

import copy
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
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from PIL import Image
from torch import nn
from trees import camvid

import train as T
from data import InputError, TrainingViews, cutmix, generator, normalize, open_dataset, strong_views
from model import DeepLabV3Plus
from refine import pseudo_labels

ROOT = Path(__file__).parent.parent
TWO_PROCESSES = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
TINY = (
    "--dataset camvid --labeled 2 --backbone resnet10 --weights none --crop 32 --batch-size 2 --warmup-iters 0 "
    "--workers 0"
)


@pytest.fixture(autouse=True)
def one_thread_and_the_old_signal_handlers():
    """One thread sums in one order; main() takes both signals over."""
    handlers, threads = (
        {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)},
        torch.get_num_threads(),
    )
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return camvid(tmp_path_factory.mktemp("data") / "camvid")


@pytest.fixture
def run(tmp_path, root):
    """A function: a run with some options in this process, which is faster than a script; returns last.pth."""

    def start(options="", out="run"):
        T.main(T.parse_args(f"{TINY} --device cpu --root {root} --out {tmp_path / out} {options}".split()))
        return torch.load(tmp_path / out / "last.pth", weights_only=True)

    return start


@pytest.fixture(scope="module")
def finished(tmp_path_factory, root):
    """The folder of a run of four steps, which no test may change."""
    out = tmp_path_factory.mktemp("finished") / "run"
    T.main(
        T.parse_args(f"{TINY} --device cpu --root {root} --iters 4 --log-every 1 --eval-every 1 --out {out}".split())
    )
    return out


def lines(out, event="train"):
    records = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    return [record for record in records if record["event"] == event]


def equal(one, two):
    """Whether two checkpoints hold the same weights, bit for bit."""
    return all(torch.equal(one[part][name], two[part][name]) for part in ("student", "teacher") for name in one[part])


# ----------------------------------------------------------------------------------------------------------------------
# the reference


def mean_over_labeled(logits, label):
    labeled, own = (
        label != 255,
        logits.log_softmax(1).gather(1, label.clamp(max=logits.shape[1] - 1).long()[:, None])[:, 0],
    )
    return -(own * labeled).sum() / labeled.sum()


def plain_loop(root, framework, steps=16, warmup=4, batch=2, seed=7):
    """(student, teacher) after a run, its formulas written out."""
    views = TrainingViews(open_dataset("camvid", root, 2), 32, framework, seed)
    torch.manual_seed(seed)
    student = DeepLabV3Plus("resnet10", 11).to(memory_format=torch.channels_last).train()
    teacher = copy.deepcopy(student).eval()
    encoder, head = [], []
    for name, parameter in student.named_parameters():
        (encoder if name.startswith("backbone.") else head).append(parameter)
    optimizer = torch.optim.SGD([{"params": encoder}, {"params": head}], momentum=0.9, weight_decay=5e-4)
    for step in range(steps):
        numbers = range(step * batch, (step + 1) * batch)
        samples = [views[number] for number in numbers]
        x, y, weak, valid = (torch.stack([sample[name] for sample in samples]) for name in ("x", "y", "weak", "valid"))
        rng = generator(seed, "step", step, 0)
        torch.manual_seed(int(rng.integers(2**63)))
        for group, base in zip(optimizer.param_groups, (0.02, 0.01)):
            group["lr"] = base * (1 - step / steps) ** 0.9
        if step < warmup:
            loss = mean_over_labeled(student(normalize(x)), y)
        else:
            with torch.no_grad():
                prob = teacher(normalize(weak)).softmax(1)
            label = pseudo_labels(prob, 0.4 * (1 - step / steps), valid=valid).label
            if framework == "cutmixseg":
                parts = [cutmix(rng, 0.5, normalize(weak), label)]
            else:
                streams = range(2 if framework == "unimatch" else 1)
                parts = [cutmix(rng, 0.5, normalize(strong_views(weak, seed, numbers, i)), label) for i in streams]
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
        updates = max(0, step - warmup)
        tau = min(1 - 1 / (updates + 1), 0.99)
        for theirs, ours in zip(teacher.state_dict().values(), student.state_dict().values()):
            if theirs.is_floating_point():
                theirs.lerp_(ours, 1 - tau)
    return student, teacher


@pytest.mark.parametrize("framework", ["fixmatch", "cutmixseg", "unimatch"])
def test_sixteen_steps_equal_a_plain_loop_bit_for_bit(run, root, framework):
    saved = run(
        f"--framework {framework} --iters 16 --warmup-iters 4 --seed 7 --lambda-u 0.5 "
        "--optimizer sgd --lr 0.02 --head-lr 0.01 --weight-decay 0.0005"
    )
    for part, network in zip(("student", "teacher"), plain_loop(root, framework)):
        for name, expected in network.state_dict().items():
            assert torch.equal(saved[part][name], expected) or not expected.is_floating_point(), (part, name)


# ----------------------------------------------------------------------------------------------------------------------
# the losses


def test_the_learning_rate_is_the_paper_s_power_of_what_is_left():
    rates = [T.learning_rate(step, 100, 0.01) for step in (0, 50, 99)]
    assert rates == pytest.approx([0.01, 0.01 * 0.5**0.9, 0.01 * 0.01**0.9])


def test_cross_entropy_is_the_mean_over_labeled_pixels_and_others_get_no_gradient():
    logits, label = torch.randn(2, 3, 4, 4, requires_grad=True), torch.randint(0, 3, (2, 4, 4), dtype=torch.uint8)
    label[0, :2] = 255
    loss = T.cross_entropy(logits, label, T.count(label != 255))
    assert T.count(label != 255) == 24 and loss.item() == pytest.approx(
        mean_over_labeled(logits, label).item(), rel=1e-5
    )
    loss.backward()
    assert (logits.grad[0, :, :2] == 0).all() and (logits.grad[0, :, 2:] != 0).all()


def test_the_unlabeled_loss_is_divided_by_the_kept_pixels_or_all_valid_ones_or_as_the_authors_do(run, tmp_path):
    first = {}
    for norm in ("kept", "valid", "authors"):
        run(f"--iters 1 --log-every 1 --cutmix 0 --unsup-norm {norm}", out=norm)
        first[norm] = lines(tmp_path / norm)[0]
    kept = first["kept"]["kept"]  # share of the valid pixels
    assert 0.3 < kept < 0.99 and first["kept"]["loss_x"] == first["valid"]["loss_x"]
    assert first["valid"]["loss_u"] == pytest.approx(first["kept"]["loss_u"] * kept, rel=1e-5)
    assert first["authors"]["loss_u"] == pytest.approx(first["kept"]["loss_u"] / kept, rel=1e-5)


def test_hard_example_mining_keeps_unsure_pixels_and_at_least_the_hardest():
    torch.manual_seed(0)
    logits, label = 4 * torch.randn(2, 5, 9, 9), torch.randint(0, 5, (2, 9, 9), dtype=torch.uint8)
    label[0, :3] = 255
    own = label.clamp(max=4).long()[:, None]
    prob, labeled = logits.softmax(1).gather(1, own)[:, 0], label != 255
    mined = T.ohem(logits, label, per_image=1)
    assert torch.equal(mined != 255, labeled & (prob <= 0.7)) and torch.equal(mined[mined != 255], label[mined != 255])
    sure = torch.rand(2, 5, 9, 9) + 6 * nn.functional.one_hot(own[:, 0], 5).movedim(-1, 1)
    prob, kept = sure.softmax(1).gather(1, own)[:, 0], T.ohem(sure, label, per_image=5) != 255
    assert kept.sum() == 10 and prob[kept].max() <= prob[labeled & ~kept].min() and prob[labeled].min() > 0.7
    assert torch.equal(T.ohem(sure, label, per_image=1000), label)  # more than there are: all of them


def test_hard_example_mining_changes_only_the_supervised_loss(run, tmp_path, monkeypatch):
    ohem = T.ohem
    monkeypatch.setattr(T, "ohem", lambda logits, label: ohem(logits, label, sure=0, per_image=50))
    for kind in ("ce", "ohem"):
        run(f"--iters 1 --log-every 1 --sup-loss {kind}", out=kind)
    plain, mined = (lines(tmp_path / kind)[0] for kind in ("ce", "ohem"))
    assert plain["loss_u"] == mined["loss_u"] and mined["loss_x"] > 1.05 * plain["loss_x"]


def test_without_a_labeled_pixel_the_loss_is_zero_and_training_goes_on(run, tmp_path, monkeypatch):
    monkeypatch.setattr(T, "check_annotations", lambda data: None)  # a batch may be so, a whole list may not
    tree = camvid(tmp_path / "camvid")
    for mask in (tree / "trainannot").iterdir():
        Image.fromarray(np.full((48, 64), 255, np.uint8)).save(mask)
    saved = run(f"--root {tree} --iters 3 --log-every 1 --threshold 2")
    assert [(record["loss_x"], record["loss_u"], record["kept"]) for record in lines(tmp_path / "run")] == [
        (0, 0, 0)
    ] * 3
    assert all(value.isfinite().all() for value in saved["student"].values())


def test_ground_truth_of_unlabeled_images_never_reaches_the_loss(run, tmp_path):
    (tmp_path / "two.txt").write_text("train0\ntrain3\n")
    changes, saved = (lambda mask: None, Path.unlink, lambda mask: Image.new("L", (64, 48), 5).save(mask)), []
    for number, change in enumerate(changes):
        tree = camvid(tmp_path / f"camvid{number}")
        for mask in (tree / "trainannot").iterdir():
            if mask.stem not in ("train0", "train3"):
                change(mask)
        saved.append(run(f"--root {tree} --labeled {tmp_path / 'two.txt'} --iters 4 --log-every 2", out=f"run{number}"))
    assert equal(saved[0], saved[1]) and equal(saved[0], saved[2])
    right = [lines(tmp_path / f"run{number}")[0].get("correct") for number in range(3)]
    assert right[0] != right[2] and right[1] is None  # the figures did see it


def test_padded_pixels_are_never_trained_on(run, monkeypatch):
    seen = []

    def watched(rng, probability, strong, label, valid):
        seen.append((~valid).sum().item())
        assert (label[~valid] == 255).all() and (label != 255).any()
        return cutmix(rng, probability, strong, label, valid)

    monkeypatch.setattr(T, "cutmix", watched)
    run("--crop 64 --iters 3 --confidence max --threshold 0")  # every valid pixel is kept
    assert len(seen) == 3 and min(seen) > 0


def test_the_frameworks_differ_only_in_their_strong_view(run, monkeypatch):
    fixmatch, cutmixseg = (run(f"--iters 2 --framework {name}", out=name) for name in ("fixmatch", "cutmixseg"))
    monkeypatch.setattr(T, "strong_views", lambda weak, *_: weak)
    assert equal(run("--iters 2", out="weak"), cutmixseg) and not equal(fixmatch, cutmixseg)


def test_steps_of_the_warm_up_are_those_of_a_supervised_run(run, tmp_path):
    run("--iters 4 --log-every 1 --framework supervised", out="supervised")
    run("--iters 4 --log-every 1 --warmup-iters 3", out="warm")
    supervised, warm = (lines(tmp_path / out) for out in ("supervised", "warm"))
    assert [r["loss"] for r in supervised[:3]] == [r["loss"] for r in warm[:3]] and supervised[3]["loss"] != warm[3][
        "loss"
    ]
    assert ["kept" in r for r in warm] == [False, False, False, True] and not any("kept" in r for r in supervised)


def test_lambda_weighs_the_unlabeled_loss_and_zero_trains_on_labels_only(run, tmp_path, monkeypatch):
    run("--iters 1 --log-every 1 --lambda-u 0.25", out="quarter")
    first = lines(tmp_path / "quarter")[0]
    assert first["loss"] == pytest.approx(first["loss_x"] + 0.25 * first["loss_u"]) and first["loss_u"] > 0
    other = run("--iters 2 --lambda-u 0", out="zero")
    monkeypatch.setattr(
        T, "pseudo_labels", lambda prob, alpha, **options: pseudo_labels(1 - prob, None, threshold=-1.0)
    )
    assert equal(other, run("--iters 2 --lambda-u 0", out="wrong"))


@pytest.mark.parametrize("framework", ["supervised", "cutmixseg", "fixmatch"])
@pytest.mark.parametrize("refinement", ["--refinement", "--no-refinement"])
def test_every_framework_trains_with_and_without_refinement(run, tmp_path, framework, refinement):
    run(f"--framework {framework} {refinement} --iters 2 --log-every 1")
    last = lines(tmp_path / "run")[-1]
    assert math.isfinite(last["loss"]) and ("kept" in last) == (framework != "supervised")
    assert framework == "supervised" or (last["kept"] == last["kept_raw"]) == (refinement == "--no-refinement")


@pytest.mark.parametrize("options", [
    "--neighborhood cross", "--neighborhood 7 --neighbors 2", "--select min", "--select random", "--dilation 4",
    "--no-distance-weight", "--prior", "--confidence max", "--confidence entropy", "--threshold 0.01",
    "--output-stride 8", "--amp", "--deterministic", "--ema 0", "--eval-mode sliding", "--eval-mode center-crop",
    "--sup-loss ohem", "--labeled 1 --batch-size 8", "--batch-size 1",
])  # fmt: skip
def test_every_option_trains(run, tmp_path, options):
    run(f"--iters 2 {options}")
    torch.use_deterministic_algorithms(False)
    assert all(math.isfinite(record["loss"]) for record in lines(tmp_path / "run"))


@pytest.mark.slow
def test_compiled_networks_train_the_same(run, tmp_path):
    run("--iters 2 --log-every 1", out="plain")
    run("--iters 2 --log-every 1 --compile", out="compiled")
    plain, compiled = ([record["loss"] for record in lines(tmp_path / out)] for out in ("plain", "compiled"))
    assert compiled == pytest.approx(plain, rel=5e-2)  # dropout takes other random numbers


@pytest.mark.slow
def test_loader_workers_may_be_spawned_as_on_a_mac(run):
    before = mp.get_start_method()
    mp.set_start_method("spawn", force=True)
    try:
        assert run("--iters 2 --workers 1")["step"] == 2
    finally:
        mp.set_start_method(before, force=True)


# ----------------------------------------------------------------------------------------------------------------------
# two processes


def little_network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 3, 1))


def little_losses(network, batch):
    """Eq. 1 as train.py computes it; network without BatchNorm and dropout, which look at their own process only."""
    logits_x, logits_u = network(torch.cat([batch["x"], batch["u"]])).chunk(2)
    loss_x = T.cross_entropy(logits_x, batch["y"], T.count(batch["y"] != 255))
    return loss_x + 0.5 * T.cross_entropy(logits_u, batch["label"], T.count(batch["label"] != 255))


def one_of_two(rank, store, batch, queue):
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    network = nn.parallel.DistributedDataParallel(little_network())
    loss = little_losses(network, {name: value.chunk(2)[rank] for name, value in batch.items()})
    loss.backward()
    queue.put((loss.item(), [parameter.grad.numpy() for parameter in network.parameters()]))
    del network, loss  # gloo hangs if the group goes before what uses it
    dist.destroy_process_group()


def test_two_processes_give_the_loss_and_gradient_of_one_with_the_whole_batch(tmp_path):
    batch = {name: torch.randn(4, 3, 12, 12) for name in ("x", "u")}
    batch |= {name: torch.randint(0, 3, (4, 12, 12)) for name in ("y", "label")}
    batch["y"][0], batch["label"][1, :8] = 255, 255  # so that the processes hold different numbers of labeled pixels
    network = little_network()
    whole = little_losses(network, batch)
    whole.backward()
    queue = mp.get_context("spawn").SimpleQueue()
    context = mp.spawn(one_of_two, (tmp_path / "store", batch, queue), nprocs=2, join=False)
    results = [queue.get() for _ in range(2)]
    while not context.join():
        pass
    assert sum(loss for loss, _ in results) / 2 == pytest.approx(whole.item(), rel=1e-5)
    for _, gradients in results:
        for gradient, parameter in zip(gradients, network.parameters()):
            torch.testing.assert_close(torch.from_numpy(gradient), parameter.grad, rtol=1e-4, atol=1e-6)


ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}


def script(name, options, launcher=(), cwd=None):
    """Runs a script to its end."""
    command = [sys.executable, *launcher, str(ROOT / name), *options.split()]
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, cwd=cwd)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_two_processes_train_and_evaluate_together(tmp_path, root):
    out, options = tmp_path / "run", "--iters 4 --warmup-iters 1 --log-every 1 --eval-every 1"
    said = script("train.py", f"{TINY} --device cpu --root {root} --out {out} {options}", TWO_PROCESSES)
    assert said.count("step 4/4") == 2 and "on 2 x CPU" in said
    assert [record["step"] for record in lines(out)] == [1, 2, 3, 4] == [record["step"] for record in lines(out, "val")]
    saved = torch.load(out / "last.pth", weights_only=True)
    assert saved["args"]["processes"] == 2 and all(value.isfinite().all() for value in saved["student"].values())
    tables = [script("evaluate.py", f"{out / 'last.pth'} --device cpu", launcher) for launcher in ((), TWO_PROCESSES)]
    assert tables[0] == tables[1] and f"{lines(out, 'val')[-1]['miou']:8.2f}" in tables[0]
    again = tmp_path / "again"
    script("train.py", f"{TINY} --device cpu --root {root} --out {again} {options}", TWO_PROCESSES)
    assert equal(saved, torch.load(again / "last.pth", weights_only=True))


@pytest.mark.slow
def test_processes_that_find_different_checkpoints_say_so(tmp_path, root):
    options = f"{TINY} --device cpu --root {root} --iters 4 --resume --out run"
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    script("train.py", options, TWO_PROCESSES, cwd=tmp_path / "one")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": "2"}
    processes = [
        subprocess.Popen(
            [sys.executable, str(ROOT / "train.py"), *options.split()], cwd=tmp_path / folder, stderr=subprocess.PIPE,
            env=ENVIRONMENT | address | {"RANK": str(rank), "LOCAL_RANK": str(rank)}, stdout=subprocess.DEVNULL,
            text=True,
        )
        for rank, folder in enumerate(("one", "two"))
    ]  # fmt: skip
    for process in processes:
        said = process.communicate(timeout=120)[1]
        assert process.returncode == 1 and "--resume: the processes find different checkpoints in run" in said, said


# ----------------------------------------------------------------------------------------------------------------------
# resuming


@pytest.mark.parametrize("stop", ["in an evaluation", "in an evaluation, saved since", "by a signal"])
def test_a_resumed_run_ends_in_the_same_weights_bit_for_bit(run, tmp_path, monkeypatch, capfd, stop):
    options = "--iters 6 --warmup-iters 1 --eval-every 1 --prior --log-every 1"
    whole = run(options, out="whole")
    evaluate, evaluated = T.evaluate, []

    def die(*args):
        evaluated.append(1)
        if len(evaluated) == 2:
            raise KeyboardInterrupt
        return evaluate(*args)

    def signaled(step, *args, sample_numbers=T.sample_numbers):
        if step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return sample_numbers(step, *args)

    with monkeypatch.context() as patch:
        patch.setattr(*((T, "sample_numbers", signaled) if stop == "by a signal" else (T, "evaluate", die)))
        with pytest.raises(SystemExit if stop == "by a signal" else KeyboardInterrupt) as end:
            run(f"{options} {'--save-every 0' if 'since' in stop else ''}", out="broken")
    if stop == "by a signal":
        at_once, saved = capfd.readouterr().err.splitlines()[-2:]
        assert at_once == "SIGTERM: saves as soon as this step or evaluation is done; again: at once"
        assert saved == f"SIGTERM: saved step 3 to {tmp_path / 'broken' / 'last.pth'}; continue with --resume"
        assert end.value.code == 143
    broken = torch.load(tmp_path / "broken" / "last.pth", weights_only=True)
    assert broken["step"] == (2 if stop == "in an evaluation" else 3)
    with (tmp_path / "broken" / "metrics.jsonl").open("a") as file:
        file.write('{"event": "train", "st')  # a kill may cut a line
    resumed = run(f"{options} --resume --workers 1", out="broken")
    assert equal(whole, resumed) and whole["best"] == resumed["best"]
    for event in ("train", "val"):
        without_times = [
            [{k: v for k, v in record.items() if "second" not in k} for record in lines(tmp_path / out, event)]
            for out in ("whole", "broken")
        ]
        assert without_times[0] == without_times[1]


LONG = f"{TINY} --iters 12 --eval-every 1 --log-every 1 --save-every 0 --resume"  # starts anew without a checkpoint


def started(options, launcher=()):
    """A run in a process of its own; its lines come through stdout."""
    command = [sys.executable, *launcher, str(ROOT / "train.py"), *options.split()]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=ENVIRONMENT)


def wait_for(process, text):
    said = []
    for line in process.stdout:
        said.append(line)
        if text in line:
            return
    raise AssertionError(f"{text!r} never came: {''.join(said)}")


def children(process):
    """The ids of the runs that torchrun started."""
    ids = Path(f"/proc/{process}/task/{process}/children").read_text().split()
    return [int(i) for i in ids if b"train.py" in Path(f"/proc/{i}/cmdline").read_bytes()]


@pytest.mark.slow
def test_a_killed_process_resumes_bit_for_bit_wherever_it_was(run, tmp_path, root):
    whole, out = run(LONG, out="whole"), tmp_path / "killed"
    for step, workers in ((3, 0), (8, 1)):  # in the middle of passes over the four unlabeled images
        process = started(f"{LONG} --device cpu --root {root} --out {out} --workers {workers}")
        wait_for(process, f"step {step}/12")
        time.sleep(random.uniform(0, 0.5))  # anywhere in a step, an evaluation, a checkpoint
        process.kill()
        process.communicate()
        assert torch.load(out / "last.pth", weights_only=True)["step"] >= step - 1
    assert equal(whole, run(LONG, out="killed"))
    assert [record["step"] for record in lines(out)] == [*range(1, 13)]
    assert [record["step"] for record in lines(out, "val")] == [2, 4, 6, 8, 10, 12]


@pytest.mark.slow
def test_two_processes_go_on_by_themselves_when_one_is_killed_and_resume_when_all_are(tmp_path, root):
    options = f"{LONG} --device cpu --root {root} --eval-every 4"
    script("train.py", f"{options} --out {tmp_path / 'whole'}", TWO_PROCESSES)
    process = started(f"{options} --out {tmp_path / 'killed'}", [*TWO_PROCESSES, "--max-restarts=1"])
    wait_for(process, "step 3/12")
    os.kill(children(process.pid)[1], signal.SIGKILL)
    wait_for(process, "continues after step")
    wait_for(process, "step 7/12")
    time.sleep(random.uniform(0, 0.5))
    for pid in [process.pid, *children(process.pid)]:  # torchrun first
        os.kill(pid, signal.SIGKILL)
    process.communicate()
    script("train.py", f"{options} --out {tmp_path / 'killed'}", TWO_PROCESSES)
    whole, killed = (torch.load(tmp_path / out / "last.pth", weights_only=True) for out in ("whole", "killed"))
    assert equal(whole, killed) and whole["step"] == killed["step"] == 12
    assert [record["step"] for record in lines(tmp_path / "killed")] == [*range(1, 13)]


def test_a_run_is_never_overwritten_nor_continued_with_other_arguments_or_images(run, finished, tmp_path, root):
    before = (finished / "last.pth").read_bytes()
    options = f"--iters 4 --eval-every 1 --out {finished}"
    with pytest.raises(InputError, match="already holds a run; continue it with --resume, or choose another"):
        run(options)
    with pytest.raises(InputError, match="is another run.* alpha0 was 0.4 and is 0.2, seed was 0 and is 1;"):
        run(f"{options} --resume --alpha0 0.2 --seed 1")
    with pytest.raises(InputError, match="iters was 4 and is 5"):
        run(f"{options} --resume --iters 5")
    (tmp_path / "others.txt").write_text("train1\ntrain2\n")
    with pytest.raises(
        InputError, match="is another run, the labeled images are others, the unlabeled images are others; use another --out"
    ):
        run(f"{options} --resume --labeled {tmp_path / 'others.txt'}")
    tree = camvid(tmp_path / "camvid")
    for name in ("train/train5.png", "trainannot/train5.png"):
        (tree / name).rename((tree / name).with_name("train6.png"))
    with pytest.raises(
        InputError, match=f"{finished} is another run.* the unlabeled images are others;"
    ):
        run(f"{options} --resume --root {tree}")
    assert (finished / "last.pth").read_bytes() == before


def test_a_finished_run_resumes_with_nothing_to_do_wherever_its_data_is_now(run, finished, tmp_path, capsys):
    options = (
        f"--iters 4 --eval-every 2 --log-every 7 --save-every 3 --seed 0 --resume --root {camvid(tmp_path / 'moved')}"
    )
    run(f"{options} --out {finished}", out=finished)
    said = capsys.readouterr().out
    assert (
        "continues after step 4, writes to" in said
        and f"nothing to do: {finished / 'last.pth'} is at step 4 of 4" in said
    )


def test_a_resumed_run_needs_no_pretrained_weights(run, tmp_path, monkeypatch):
    weights = tmp_path / "resnet10.pth"
    weights.touch()
    network, loaded = DeepLabV3Plus, []
    monkeypatch.setattr(T, "DeepLabV3Plus", lambda *args: (loaded.append(args[3]), network(*args[:3]))[1])
    saved = run(f"--iters 1 --weights {weights}")
    weights.unlink()
    assert equal(run(f"--iters 1 --weights {weights} --resume"), saved) and loaded == [str(weights), "none"]


def test_the_best_checkpoint_is_written_before_the_last_that_knows_of_it(run, monkeypatch):
    save, written = T.save_checkpoint, []
    monkeypatch.setattr(
        T, "save_checkpoint", lambda state, path: (written.append((path.name, state["best"])), save(state, path))
    )
    scores = iter((20.0, 30.0, 25.0))
    evaluate = T.evaluate
    monkeypatch.setattr(T, "evaluate", lambda *args: evaluate(*args) | {"miou": next(scores)})
    run("--iters 6 --eval-every 1")
    assert written == [("best.pth", 20), ("last.pth", 20), ("best.pth", 30), ("last.pth", 30), ("last.pth", 30)]


def test_only_the_seed_decides_a_run(run):
    one, two, other = (run(f"--iters 2 --seed {seed}", out=str(i)) for i, seed in enumerate((0, 0, 1)))
    assert equal(one, two) and not equal(one, other)


# ----------------------------------------------------------------------------------------------------------------------
# numbers that are not finite, memory


def test_a_loss_that_is_not_finite_ends_the_run_and_last_pth_stays_finite(run, tmp_path, monkeypatch):
    monkeypatch.setattr(T, "learning_rate", lambda step, *_: 0.001 if step < 2 else 1e30)
    sentence = "the loss is (nan|inf) between the steps 3 and 4; .*last.pth is the last good checkpoint; lower --lr and"
    with pytest.raises(InputError, match=sentence):
        run("--iters 8 --eval-every 1 --optimizer sgd")
    saved = torch.load(tmp_path / "run" / "last.pth", weights_only=True)
    assert saved["step"] == 2 and all(
        value.isfinite().all() for part in ("student", "teacher") for value in saved[part].values()
    )
    with pytest.raises(
        InputError, match="the loss is .* between the steps 1 and 2; no checkpoint had been written yet"
    ):
        monkeypatch.setattr(T, "learning_rate", lambda *_: 1e30)
        run("--iters 8 --eval-every 1 --optimizer sgd", out="first")


def test_weights_that_are_not_finite_are_never_saved(run, tmp_path, monkeypatch):
    update, steps = T.update_teacher, []

    def poisoned(teacher, student, tau):
        update(teacher, student, tau)
        steps.append(1)
        if len(steps) == 4:  # after the loss, before the checkpoint
            student[0].data.fill_(math.inf)

    monkeypatch.setattr(T, "update_teacher", poisoned)
    with pytest.raises(
        InputError, match="weights .*not finite.*last.pth is the last good checkpoint"
    ):
        run("--iters 8 --eval-every 1")
    assert torch.load(tmp_path / "run" / "last.pth", weights_only=True)["step"] == 2


class Tiny(nn.Module):
    """Stands in for DeepLabV3Plus when only the loop matters."""

    def __init__(self, backbone, num_classes, output_stride=16, weights="none"):
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4))
        self.head = nn.Conv2d(4, num_classes, 1)

    def forward(self, images):
        return self.head(self.backbone(images).relu())


@pytest.mark.slow
def test_memory_and_open_files_stay_as_they_are_over_a_thousand_steps(run, monkeypatch):
    write, seen = T.write_record, []

    def measured(out, board, rank, record):
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        seen.append((record["step"], pages * resource.getpagesize() / 2**20, len(os.listdir("/proc/self/fd"))))
        write(out, board, rank, record)

    monkeypatch.setattr(T, "DeepLabV3Plus", Tiny)
    monkeypatch.setattr(T, "write_record", measured)
    run("--iters 1000 --log-every 50 --eval-every 50")
    settled = [(mib, handles) for step, mib, handles in seen if step >= 300]
    assert len(settled) == 23 and settled[-1][0] - settled[0][0] < 8 and len({handles for _, handles in settled}) == 1


# ----------------------------------------------------------------------------------------------------------------------
# lengths, presets, words


def resolved(options="", device="cuda"):
    args = T.parse_args(options.split())
    T.fill_presets(args, torch.device(device))
    return args


def lengths(options, labeled, unlabeled, world=1):
    """(epoch, run, warm-up, evaluation) in steps."""
    args = resolved(options)
    T.epochs_to_steps(
        args, SimpleNamespace(labeled=range(labeled), unlabeled=range(unlabeled)), world, torch.device("cuda")
    )
    return args.steps_per_epoch, args.iters, args.warmup_iters, args.eval_steps


@pytest.mark.parametrize("options, images, expected", [
    ("--dataset pascal", (366, 10216), (3406, 80 * 3406, 3406, 8 * 3406)),  # warm-up: one epoch
    ("--dataset pascal --epochs 2 --eval-every 1", (366, 10216, 4), (852, 1704, 852, 852)),
    ("--dataset pascal --iters 5000 --warmup-epochs 0", (366, 10216), (3406, 5000, 0, 500)),
    ("--dataset pascal --framework supervised", (366, 0), (122, 9760, 122, 976)),  # epochs over the labeled images
    ("--dataset pascal --framework supervised", (10, 0), (4, T.SUPERVISED_FLOOR, 4, 100)),
    ("--dataset pascal --framework supervised --iters 50", (10, 0), (4, 50, 4, 5)),
    ("--dataset pascal --framework supervised --epochs 3", (10, 0), (4, T.SUPERVISED_FLOOR, 4, 100)),
    ("--dataset folder --epochs 7 --warmup-epochs 2", (10, 33), (5, 35, 10, 4)),
    ("--dataset folder --iters 35 --warmup-iters 9", (10, 33), (5, 35, 9, 4)),
])  # fmt: skip
def test_epochs_become_steps(options, images, expected):
    assert lengths(options, *images) == expected


def test_lengths_that_cannot_train_are_refused():
    with pytest.raises(
        InputError, match="the warm-up of 9 steps leaves no step of 9 for unlabeled images; lower --warmup"
    ):
        lengths("--iters 9 --warmup-iters 9", 4, 4)
    lengths("--iters 9 --warmup-iters 9 --framework supervised", 4, 0)
    for options in ("--framework supervised", "--warmup-iters 1"):
        with pytest.raises(InputError, match="--batch-size 1 leaves BatchNorm a single value"):
            lengths(f"--batch-size 1 {options}", 4, 4)
    for options in ("--epochs 3 --iters 9", "--warmup-epochs 1 --warmup-iters 9"):
        with pytest.raises(SystemExit):
            resolved(options)


def test_presets_are_appendix_d_s_and_the_command_line_beats_them():
    paper = dict(
        epochs=80, crop=513, batch_size=3, lr=0.001, head_lr=0.01, weight_decay=1e-4, power=0.9, optimizer="sgd"
    )
    paper |= dict(
        cutmix=0.5, ema=0.99, alpha0=0.4, neighborhood=3, neighbors=1, select="max", confidence="margin", prior=False
    )
    paper |= dict(
        backbone="resnet101", weights="pretrained", threshold=None, refinement=True, distance_weight=True, sup_loss="ce"
    )
    paper |= dict(
        dilation=1, unsup_norm="kept", lambda_u=1.0, warmup_epochs=1, iters=None, warmup_iters=None, labeled="92"
    )
    args = vars(resolved("--dataset pascal --labeled 92"))
    assert {name: args[name] for name in paper} == paper and args["eval_mode"] == "original"
    paper |= dict(crop=769, batch_size=2, lr=0.01, head_lr=0.01, weight_decay=5e-4, sup_loss="ohem", labeled="186")
    args = vars(resolved("--dataset cityscapes --labeled 186"))
    assert {name: args[name] for name in paper} == paper and args["eval_mode"] == "sliding"
    args = resolved("--dataset pascal --crop 321 --iters 100 --warmup-iters 5 --sup-loss ohem --lr 0.5")
    assert (args.crop, args.iters, args.epochs, args.warmup_iters, args.warmup_epochs) == (321, 100, None, 5, None)
    assert (args.sup_loss, args.lr, args.head_lr) == ("ohem", 0.5, 0.01)
    args = resolved("--dataset pascal --backbone dinov2_vitb14 --weights imagenet --weight-decay 0")
    assert (args.optimizer, args.lr, args.head_lr, args.weight_decay) == ("adamw", 5e-6, 2e-4, 0)
    assert (args.weights, args.output_stride, args.crop) == ("pretrained", 16, 513)


@pytest.mark.parametrize("dataset", T.DATASETS)
@pytest.mark.parametrize("device", T.SIZES)
def test_a_preset_leaves_nothing_open_but_what_has_another_meaning(dataset, device, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    args = vars(resolved(f"--dataset {dataset}", device=device))
    missing = {name for name, value in args.items() if value is None}
    assert missing - {"splits", "threshold", "eval_every"} in ({"iters", "warmup_iters"}, {"epochs", "warmup_epochs"})
    assert args["amp"] == (device == "cuda") and args["out"] == f"runs/{dataset}-{args['labeled']}-fixmatch-0"
    assert resolved(f"--dataset {dataset} --labeled lists/mine.txt").out == f"runs/{dataset}-mine-fixmatch-0"


def test_help_names_where_defaults_come_from(capsys):
    with pytest.raises(SystemExit):
        T.parse_args(["--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert "Eq. 6; 0.4 [paper]" in said and "side of the square training views, pixels [preset]" in said
    assert "pascal: labeled 366, crop 513, backbone resnet101" in said and "folder on cpu: crop 128," in said


@pytest.mark.parametrize("options, says", [
    ("--dataset mnist", "invalid choice: 'mnist'"),
    ("--alpha0 2", "2 is out of range; expected at least 0 and at most 1"),
    ("--neighborhood 4", "invalid choice: 4"), ("--crop 16", "16 is out of range; expected at least 32"),
    ("--lr 0", "0 is out of range; expected more than 0"), ("--batch-size 0", "0 is out of range"),
    ("--backbone dinov2_vits14 --output-stride 16", "--output-stride has no meaning for dinov2_vits14"),
    ("--prior --dilation 2", "--prior is counted over adjacent pixels; expected --dilation 1 with it"),
])  # fmt: skip
def test_bad_arguments_are_named(capsys, options, says):
    with pytest.raises(SystemExit) as end:
        resolved(options)
    assert end.value.code == 2 and says in capsys.readouterr().err


def test_a_missing_package_is_named_before_anything_is_written(run, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(InputError, match="--tensorboard needs a package that is not installed; pip install"):
        run("--iters 2 --tensorboard")
    assert not (tmp_path / "run").exists()


def test_a_run_says_first_what_it_trains_on_and_then_a_line_per_log(run, tmp_path, capsys):
    run("--iters 2 --log-every 1 --eval-every 1 --warmup-iters 1")
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
    assert sorted(path.name for path in (tmp_path / "run").rglob("*")) == [
        "args.json", "best.pth", "last.pth", "metrics.jsonl", "panels", "step-000002.png",
    ]  # fmt: skip
    settled = json.loads((tmp_path / "run" / "args.json").read_text())
    assert settled["torch"] == torch.__version__ and settled["crop"] == 32 and settled["iters"] == 2
    run("--iters 1 --framework supervised", out="supervised")
    assert "supervised, resnet10 on 1 x CPU; 1 steps of 2 labeled images\n" in capsys.readouterr().out


def test_a_logged_loss_is_the_mean_of_the_steps_since_the_last_line(run, tmp_path):
    for every in (1, 3):
        run(f"--iters 6 --log-every {every} --eval-every 9", out=str(every))
    one, three = (lines(tmp_path / out) for out in ("1", "3"))
    for name in ("loss", "loss_x", "loss_u"):
        expected = [np.mean([record[name] for record in one[i : i + 3]]) for i in (0, 3)]
        assert [record[name] for record in three] == pytest.approx(expected, rel=1e-5)
    assert three[1]["step"] == 6 and three[1]["kept"] == one[5]["kept"] and three[1]["lr"] == one[5]["lr"]


# ----------------------------------------------------------------------------------------------------------------------
# with a GPU

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@needs_gpu
@pytest.mark.parametrize("framework", ["supervised", "cutmixseg", "fixmatch"])
def test_no_step_waits_for_the_gpu(run, tmp_path, monkeypatch, framework):
    decay, steps = T.ema_decay, []

    def watched(updates, limit):  # the last call of a step before the log
        steps.append(updates)
        torch.cuda.set_sync_debug_mode({2: "error", 6: "default"}.get(len(steps), torch.cuda.get_sync_debug_mode()))
        return decay(updates, limit)

    monkeypatch.setattr(T, "ema_decay", watched)
    try:
        run(f"--device cuda --crop 64 --iters 8 --log-every 7 --eval-every 9 --framework {framework}")
    finally:
        torch.cuda.set_sync_debug_mode("default")
    last = lines(tmp_path / "run")[-1]
    assert len(steps) == 8 and math.isfinite(last["loss"]) and last["peak_memory_gib"] > 0


@needs_gpu
def test_a_deterministic_run_on_a_gpu_resumes_bit_for_bit(tmp_path, root):
    options = f"{LONG} --root {root} --device cuda --deterministic --crop 64"
    script("train.py", f"{options} --out {tmp_path / 'whole'}")
    process = started(f"{options} --out {tmp_path / 'killed'}")
    wait_for(process, "step 5/12")
    process.kill()
    process.communicate()
    script("train.py", f"{options} --out {tmp_path / 'killed'}")
    whole, killed = (torch.load(tmp_path / out / "last.pth", weights_only=True) for out in ("whole", "killed"))
    assert equal(whole, killed)
