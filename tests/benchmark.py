"""How fast the program is on this machine, and how much memory it takes, beside a floor or a rival.

    python tests/benchmark.py                                     # everything that this machine can run
    python tests/benchmark.py --only labels --peer DIR            # DIR: a checkout of github.com/s4mcontext/s4mc
    python tests/benchmark.py --only scale                        # as batch, crop, classes and loader workers grow
    python tests/benchmark.py --only processes                    # one process beside several

The rows of a table are measured in turns; each is a median, with the fastest and the slowest round behind it. Nothing is
asserted about time, and figures of a busy machine are worthless.
"""

import argparse
import copy
import gc
import importlib
import itertools
import os
import platform
import random
import statistics
import sys
import tempfile
import time
import types
from datetime import date
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageFilter, ImageOps
from torch.nn.parallel import DistributedDataParallel
from torch.utils.flop_counter import FlopCounterMode
from torchvision import transforms

sys.path.insert(0, str(Path(__file__).parent.parent))
import data as D  # noqa: E402
import evaluate as E  # noqa: E402
import refine as R  # noqa: E402
import train as T  # noqa: E402
from model import ENCODERS, DeepLabV3Plus, ema_decay, update_teacher  # noqa: E402

ROUNDS = 7


def measured(rivals, device, rounds=None):
    """{name: [seconds per call of each round]} of functions without arguments, in turns; a first round warms up."""
    seconds = {name: [] for name in rivals}
    calls = 10 if device.type == "cuda" else 1  # in a run, too, the host works ahead of a GPU
    for round in range((rounds or ROUNDS) + 1):
        for name, function in rivals.items():
            synchronize(device)
            began = time.perf_counter()
            for _ in range(calls):
                function()
            synchronize(device)
            if round:
                seconds[name].append((time.perf_counter() - began) / calls)
    return seconds


def synchronize(device):
    if device.type == "cuda":
        torch.cuda.synchronize()


def peak_memory(build, device):
    """(bytes held at most during the second call of the function that `build` returns, the function).

    What building leaves behind counts too: a step's networks, gradients and momentum. On the CPU it is the most of
    building and both calls, as PyTorch's allocator sees it; NumPy's memory is not in it.
    """
    gc.collect()
    if device.type == "cuda":
        before = torch.cuda.memory_allocated()
        function = build()
        function()  # the compiler tries out kernels here, in memory of its own
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        function()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before, function
    with torch.autograd.profiler.profile(profile_memory=True) as record:
        function = build()
        function()
        function()
    events = [event for event in record.kineto_results.events() if event.name() == "[memory]"]
    changes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]  # negative: freed
    return max(itertools.accumulate(changes, initial=0)), function


def show(title, seconds, unit=1e3, suffix="ms", against=None, beside={}):
    """Prints a table: median, smallest, largest, how many times as fast as the row `against`, and `beside`, by row."""
    print(f"\n{title}")
    for name, times in seconds.items():
        median, ratio = statistics.median(times), ""
        if against in seconds and name != against:
            ratio = f"{statistics.median(seconds[against]) / median:8.1f} x {against}"
        spread = f"({min(times) * unit:.2f} to {max(times) * unit:.2f})"
        print(f"  {name:44}{median * unit:10.2f} {suffix}   {spread}{ratio}{beside.get(name, '')}", flush=True)


# ----------------------------------------------------------------------------------------------------------------------
# pseudo-labels


def load_peer(folder):
    """The authors' code as a function of logits (B,21,H,W) that decides their pseudo-labels, without their loss."""
    sys.path.insert(0, str(folder))
    for missing in ("skimage", "skimage.measure"):  # imported there, but not used by what runs here
        sys.modules.setdefault(missing, types.ModuleType(missing))
    sys.modules["skimage.measure"].label = sys.modules["skimage.measure"].regionprops = None
    try:
        helper = importlib.import_module("s4mc_utils.utils.loss_helper")
    except ImportError as error:
        sys.exit(f"--peer {folder} could not be imported ({error}); expected a checkout of s4mcontext/s4mc, and SciPy")
    helper.F = types.SimpleNamespace(cross_entropy=lambda *_, **__: 0.0)

    def label(logits):
        _, raw = logits.softmax(1).max(1)
        helper.compute_unsupervised_loss(logits, raw.clone(), 60, logits, "margin", "pascal", 4, 1)

    return label


def smooth_logits(batch, classes, side, device):
    """Logits like a network's: bilinear from a quarter of the side."""
    small = 3 * torch.randn(batch, classes, side // 4 + 1, side // 4 + 1, device=device)
    return F.interpolate(small, (side, side), mode="bilinear")


def benchmark_labels(device, peer, backbone):
    """Full-resolution logits to labels, beside copying the logits once and the authors' code; the threshold alone."""
    for batch, classes, side in ((3, 21, 513), (3, 2, 513), (2, 19, 769), (1, 150, 513)):
        logits = smooth_logits(batch, classes, side, device)
        torch._dynamo.reset()  # it gives up after eight shapes
        compiled = torch.compile(R.pseudo_labels, dynamic=False)
        rivals = {
            "copy the logits": logits.clone,
            "S4MC": lambda: R.pseudo_labels(logits.softmax(1), 0.4),
            "S4MC, compiled": lambda: compiled(logits.softmax(1), 0.4),
        }
        if peer and classes == 21:  # their constants are for PASCAL
            rivals["authors' code"] = lambda: peer(logits)
        size = logits.numel() * logits.element_size()
        peaks = {name: peak_memory(lambda: rival, device)[0] / size for name, rival in rivals.items()}
        beside = {name: f"   peak memory {peak:.1f} x the logits" for name, peak in peaks.items()}
        title = f"pseudo-labels, logits {tuple(logits.shape)}"
        show(title, measured(rivals, device), against="authors' code", beside=beside)
    conf = R.confidence(smooth_logits(3, 21, 513, device).softmax(1)).flatten()
    rivals = {
        "exact threshold": lambda: R.dpa_threshold(conf, 0.4),
        "sort": conf.sort,
        "kthvalue": lambda: conf.kthvalue(1 + int(0.4 * (len(conf) - 1))),
    }
    show(f"threshold of {len(conf):,} pixels", measured(rivals, device))


# ----------------------------------------------------------------------------------------------------------------------
# the step


def random_batch(batch, classes, crop, device):
    draw = partial(torch.randint, dtype=torch.uint8, device=device)
    images = {name: draw(256, (batch, 3, crop, crop)) for name in ("x", "weak")}
    valid = torch.ones(batch, crop, crop, dtype=torch.bool, device=device)
    return images | {"y": draw(classes, (batch, crop, crop)), "valid": valid}


def trainer(backbone, classes, batch, framework="cutmixseg", compiled=False, authors=False, peer=None, **options):
    """A function that does train.py's next step, in the order of its main, on networks of its own.

    batch: see `random_batch`, on the device. authors: their order of things instead, in fp32 and PyTorch's default
    layout. options: those of `pseudo_labels`.
    """
    device, world = batch["x"].device, dist.get_world_size() if dist.is_initialized() else 1
    cuda, layout = device.type == "cuda", torch.contiguous_format if authors else torch.channels_last
    student = DeepLabV3Plus(backbone, classes).to(device, memory_format=layout).train()
    if world > 1 and cuda:
        student = torch.nn.SyncBatchNorm.convert_sync_batchnorm(student)
    teacher = copy.deepcopy(student).eval().requires_grad_(False)
    optimizer = torch.optim.SGD(student.parameters(), 0.001, 0.9, weight_decay=1e-4, fused=cuda and not authors)
    networks = [student, teacher, R.pseudo_labels]
    if world > 1:
        networks[0] = DistributedDataParallel(student, broadcast_buffers=False)
    if compiled:
        networks[:2] = (torch.compile(network, dynamic=False) for network in networks[:2])
        networks[2] = torch.compile(R.pseudo_labels)  # not static: alpha changes with each step
    numbers = itertools.count()

    def step():
        number = next(numbers)
        rng = D.generator(0, "step", number)
        torch.manual_seed(int(rng.integers(2**63)))
        if authors:
            loss = authors_loss(student, teacher, batch, rng, peer)
        else:
            loss = s4mc_loss(*networks, batch, number, rng, framework, options)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if world > 1 and not cuda:
            T.average_statistics(student, world)
        update_teacher(teacher, student, ema_decay(number))

    return step


def s4mc_loss(forward, predict, label, batch, number, rng, framework, options):
    """Eqs. 1-3 of a batch."""
    x, y, device = D.normalize(batch["x"]), batch["y"], batch["x"].device
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        if framework == "supervised":
            logits_x = forward(x)
        else:
            weak, valid = D.normalize(batch["weak"]), batch["valid"]
            strong = weak
            if framework == "fixmatch":
                numbers = D.sample_numbers(number, len(x))
                strong = D.normalize(D.strong_views(batch["weak"], 0, numbers))
            with torch.no_grad():
                prob = predict(weak).softmax(1)
            pseudo = label(prob, R.dpa_alpha(number, 10_000), valid=valid, **options)
            strong, target, valid = D.cutmix(rng, 0.5, strong, pseudo.label, valid)
            logits_x, logits_u = forward(torch.cat([x, strong])).split([len(x), len(strong)])
    loss_x = T.cross_entropy(logits_x, y, T.count(y != D.IGNORE))
    if framework == "supervised":
        return loss_x
    return loss_x + T.cross_entropy(logits_u, target, T.count(target != D.IGNORE))


def authors_loss(student, teacher, batch, rng, peer):
    """Theirs: the teacher's second pass is in training mode and on the mixed images; a percentile is taken on the host."""
    x, weak, y = D.normalize(batch["x"]), D.normalize(batch["weak"]), batch["y"].long()
    with torch.no_grad():
        label = teacher.eval()(weak).softmax(1).max(1).indices
    mixed, label = D.cutmix(rng, 0.5, weak, label)
    logits_x, logits_u = student(torch.cat([x, mixed])).split([len(x), len(mixed)])
    with torch.no_grad():
        teacher_logits = teacher.train()(torch.cat([x, mixed]))[len(x) :]
        if peer and teacher_logits.shape[1] == 21:
            peer(teacher_logits)  # the loss below costs the same, whichever pixels it leaves out
        else:
            top = teacher_logits.softmax(1).topk(2, 1).values
            margin = top[:, 0] - top[:, 1]
            label = label.masked_fill(margin <= np.percentile(margin.cpu().numpy(), 40), D.IGNORE)
    loss_x, loss_u = (F.cross_entropy(*pair, ignore_index=D.IGNORE) for pair in ((logits_x, y), (logits_u, label)))
    return loss_x + loss_u


def points(device):
    """(classes, crop, labeled images of a step, as many unlabeled ones): where a step is measured."""
    return [(21, 513, 3), (21, 513, 8)] if device.type == "cuda" else [(21, 128, 4)]


def compare_steps(title, builds, images, device, against=None, alone={}):
    """Prints time, images per second and memory of steps, {name: function that builds one}, and the time of functions `alone`.

    images: {name: images of a step}. Returns the steps that fit into memory, and {name: median seconds} of all.
    """
    torch._dynamo.reset()
    steps, peaks = {}, {}
    for name, build in builds.items():
        try:
            peaks[name], steps[name] = peak_memory(build, device)
        except torch.OutOfMemoryError:
            print(f"\n{title}: {name} does not fit into the GPU's memory")
    seconds = measured(steps | alone, device)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    beside = {name: f"{images[name] / medians[name]:9.1f} images/s{peaks[name] / 2**30:8.2f} GiB" for name in steps}
    show(title, seconds, against=against, beside=beside)
    return steps, medians


def benchmark_step(device, peer, backbone):
    """A step of training beside the authors' order of things; the share of pseudo-labels and of useful arithmetic."""
    n = 8192 if device.type == "cuda" else 2048
    a, b = torch.randn(2, n, n, device=device).to(torch.bfloat16 if device.type == "cuda" else torch.float32)
    for classes, crop, batch_size in points(device):
        batch = random_batch(batch_size, classes, crop, device)
        build = partial(partial, trainer, backbone, classes, batch)
        builds = {
            "S4MC": build(),
            "S4MC, compiled": build(compiled=True),
            "S4MC, strong views of FixMatch": build(framework="fixmatch"),
            "S4MC, no refinement, fixed threshold": build(refinement=False, threshold=0.95),
            "labeled images only": build(framework="supervised"),
            "authors' order": build(authors=True, peer=peer),
        }
        images = dict.fromkeys(builds, 2 * batch_size) | {"labeled images only": batch_size}
        logits = smooth_logits(batch_size, classes, crop, device)
        alone = {"pseudo-labels alone": lambda: R.pseudo_labels(logits.softmax(1), 0.4), "matrix product": lambda: a @ b}
        title = f"step, {backbone}, {batch_size} + {batch_size} images of {crop}"
        steps, medians = compare_steps(title, builds, images, device, "authors' order", alone)
        if "S4MC" not in steps:
            continue
        print(f"  pseudo-labels: {medians['pseudo-labels alone'] / medians['S4MC']:.1%} of the step")
        with FlopCounterMode(display=False) as counter:
            steps["S4MC"]()
        operations, rate = counter.get_total_flops(), 2 * n**3 / medians["matrix product"]
        print(f"  {operations / 1e12:.3g} TFLOP a step, at {operations / medians['S4MC'] / rate:.1%} of", end=" ")
        print(f"the {rate / 1e12:.3g} TFLOP/s that the product of two {n} x {n} matrices reaches")


# ----------------------------------------------------------------------------------------------------------------------
# views and loader


def photographs(folder, count, size, suffix):
    """A dataset of files with a photograph's share of detail: smooth colors with some noise; masks of patches."""
    rng, items, (width, height) = np.random.default_rng(0), [], size
    for i in range(count):
        small = Image.fromarray(rng.integers(0, 256, (height // 16, width // 16, 3), dtype=np.uint8))
        pixels = np.asarray(small.resize(size, Image.Resampling.BICUBIC)) + rng.normal(0, 8, (height, width, 3))
        mask = Image.fromarray(rng.integers(0, 19, (height // 32, width // 32), dtype=np.uint8))
        items.append(D.Item(str(i), Path(folder) / f"{i}.{suffix}", Path(folder) / f"{i}-mask.png"))
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(items[-1].image, quality=90)
        mask.resize(size, Image.Resampling.NEAREST).save(items[-1].mask)
    values = {"": D.mask_values({i: i for i in range(19)})}
    return D.Data("photographs", ("",) * 19, (0.5, 2.0), values, items, items, [], [])


class PlainViews:
    """The pipeline of most repositories of this field: the whole image is resized, in Pillow, and every view is float."""

    normalize = transforms.Compose([transforms.ToTensor(), transforms.Normalize(D.MEAN, D.STD)])
    jitter, grey = transforms.ColorJitter(0.5, 0.5, 0.5, 0.25), transforms.RandomGrayscale(0.2)

    def __init__(self, item, crop, scales):
        self.item, self.crop, self.scales = item, crop, scales

    def weak(self):
        image, mask = Image.open(self.item.image).convert("RGB"), Image.open(self.item.mask)
        scale = random.uniform(*self.scales)
        size = [round(side * scale) for side in image.size]
        image, mask = image.resize(size, Image.Resampling.BILINEAR), mask.resize(size, Image.Resampling.NEAREST)
        padding = (0, 0, *(max(0, self.crop - side) for side in size))
        image, mask = ImageOps.expand(image, padding, 0), ImageOps.expand(mask, padding, 255)
        left, top = (random.randint(0, side - self.crop) for side in image.size)
        box = (left, top, left + self.crop, top + self.crop)
        image, mask = image.crop(box), mask.crop(box)
        return (ImageOps.mirror(image), ImageOps.mirror(mask)) if random.random() < 0.5 else (image, mask)

    def strong(self, image):
        image = self.grey(self.jitter(image) if random.random() < 0.8 else image)
        if random.random() < 0.5:
            image = image.filter(ImageFilter.GaussianBlur(random.uniform(0.1, 2.0)))
        return self.normalize(image)

    def sample(self, *views):
        """The views, each a function of the weak image, and the mask."""
        image, mask = self.weak()
        return *(view(image) for view in views), torch.from_numpy(np.array(mask)).long()


def benchmark_loader(device, peer, backbone):
    """One worker's time for a sample from files, beside the plain pipeline."""
    torch.set_num_threads(1)
    for name, suffix, size, crop, count in (("PASCAL", "jpg", (500, 375), 513, 30), ("Cityscapes", "png", (2048, 1024), 769, 5)):
        with tempfile.TemporaryDirectory() as folder:
            data = photographs(folder, 1, size, suffix)
            one, both = (D.TrainingViews(data, crop, framework, 0) for framework in ("supervised", "fixmatch"))
            plain, numbers = PlainViews(data.labeled[0], crop, data.scales), itertools.count()
            rivals = {
                "decoding image and mask": lambda: D.read(data.labeled[0], data),
                "plain, labeled": lambda: plain.sample(plain.normalize),
                "plain, labeled, with colors": lambda: plain.sample(plain.strong),
                "plain, weak and strong": lambda: plain.sample(plain.normalize, plain.strong),
                "S4MC, labeled": lambda: one[next(numbers)],
                "S4MC, labeled and weak": lambda: both[next(numbers)],
                "S4MC, labeled, weak and strong on the CPU": lambda: D.strong_views(
                    both[next(numbers)]["weak"][None], 0, [next(numbers)]
                ),
            }
            rows = {row: lambda rival=rival: [rival() for _ in range(count)] for row, rival in rivals.items()}
            title = f"loader, {name}-like {size[0]} x {size[1]}, crop {crop}, a sample"
            show(title, measured(rows, torch.device("cpu")), 1e3 / count)
    if device.type == "cuda":
        weak = random_batch(8, 2, 513, device)["weak"]
        rows = {"all 8": lambda: D.strong_views(weak, 0, range(8))}
        show("strong views of 8 x 513 x 513 on the GPU", measured(rows, device))


def loader_rate(data, workers, crop, batch_size=4, steps=10):
    """Images per second, from when all workers are at work to before the first of them has nothing to do."""
    ahead = 2 * workers + 1
    loader = iter(D.training_loader(data, range(steps + 2 * ahead), batch_size, crop, "fixmatch", 0, workers))
    for _ in range(ahead):
        next(loader)
    began = time.perf_counter()
    for _ in range(steps):
        next(loader)
    return 2 * batch_size * steps / (time.perf_counter() - began)


# ----------------------------------------------------------------------------------------------------------------------
# evaluation


def numpy_scores(prediction, label, classes):
    """Intersection and union of one image by three histograms on the host, as most repositories of this field do."""
    prediction, label = prediction.cpu().numpy().ravel(), label.cpu().numpy().ravel()
    prediction = np.where(label == D.IGNORE, D.IGNORE, prediction)
    bins = np.arange(classes + 1)
    areas = [np.histogram(values, bins)[0] for values in (prediction[prediction == label], prediction, label)]
    return areas[0], areas[1] + areas[2] - areas[0]


def benchmark_evaluation(device, peer, backbone):
    """Prediction of an image by each protocol; the counting alone, beside histograms on the host."""
    size, crop = ((1024, 2048), 769) if device.type == "cuda" else ((375, 500), 321)
    network = DeepLabV3Plus(backbone, 19).to(device, memory_format=torch.channels_last).eval()
    image = torch.randint(256, (1, 3, *size), dtype=torch.uint8, device=device)
    label = torch.randint(19, (1, *size), dtype=torch.uint8, device=device)
    prediction = torch.randint(19, (1, *size), device=device)
    rivals = {
        "original size": lambda: E.predict(network, image),
        f"sliding windows, crop {crop}": lambda: E.predict(network, image, E.Protocol("sliding", crop)),
        "flips and scales": lambda: E.predict(network, image, E.Protocol(tta=True)),
    }
    show(f"prediction, {backbone}, {size[1]} x {size[0]}", measured(rivals, device))
    rivals = {
        "confusion matrix": lambda: E.confusion_matrix(prediction, label, 19),
        "confusion matrix of the boundaries": lambda: E.boundary_confusion(prediction, label, 19),
        "histograms on the host": lambda: numpy_scores(prediction, label, 19),
    }
    show(f"counting, {size[1]} x {size[0]}, 19 classes", measured(rivals, device), against="histograms on the host")


# ----------------------------------------------------------------------------------------------------------------------
# as images, classes, workers and processes grow in number


def benchmark_scale(device, peer, backbone):
    """Time and memory of a step as batch, crop and classes grow, one at a time; then the loader's workers."""
    base = dict(zip(("classes", "crop", "batch"), points(device)[0]))
    batches, crops = ((3, 8, 16), (321, 513, 769)) if device.type == "cuda" else ((2, 4, 8), (96, 128, 192))
    for factor, values in {"batch": batches, "crop": crops, "classes": (2, 21, 150)}.items():
        builds, images = {}, {}
        for value in values:
            point, name = base | {factor: value}, f"{factor} {value}"
            builds[name] = partial(trainer, backbone, point["classes"], random_batch(**point, device=device))
            images[name] = 2 * point["batch"]
        others = ", ".join(f"{name} {value}" for name, value in base.items() if name != factor)
        compare_steps(f"step by {factor}, {backbone}, {others}", builds, images, device)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        data = photographs(folder, 16, (500, 375), "jpg")
        rates = {str(workers): [] for workers in (0, 1, 2, 4, 8) if workers <= max(2, os.cpu_count())}
        for _ in range(ROUNDS):
            for workers, row in rates.items():
                row.append(loader_rate(data, int(workers), 513))
    show(f"loader by --workers, JPEG files of 500 x 375, crop 513, {os.cpu_count()} cores", rates, 1, "images/s")


def _steps_of_one_process(rank, world, together, device_type, backbone, store, barrier, queue):
    """Puts the seconds of each step of process `rank` into the queue."""
    torch.set_num_threads(1)
    device = torch.device(device_type, rank if device_type == "cuda" else None)
    if device_type == "cuda":
        torch.cuda.set_device(device)
    if together:
        kind = "nccl" if device_type == "cuda" else "gloo"
        dist.init_process_group(kind, init_method=f"file://{store}", rank=rank, world_size=world)
    classes, crop, batch_size = points(device)[0]
    step = trainer(backbone, classes, random_batch(batch_size, classes, crop, device))
    step()
    barrier.wait()
    queue.put(measured({"step": step}, device, rounds=3)["step"])
    del step  # gloo hangs where the group goes before what uses it
    if together:
        dist.destroy_process_group()


def seconds_of_steps(world, together, device, backbone):
    """Seconds of each step of each of `world` new processes."""
    context = mp.get_context("spawn")
    queue, barrier = context.SimpleQueue(), context.Barrier(world)
    with tempfile.TemporaryDirectory() as folder:
        arguments = (world, together, device.type, backbone, Path(folder) / "store", barrier, queue)
        mp.spawn(_steps_of_one_process, arguments, nprocs=world)
    return [seconds for _ in range(world) for seconds in queue.get()]


def benchmark_processes(device, peer, backbone):
    """One process beside two on the CPU, with one thread each, or beside one for each GPU."""
    world = torch.cuda.device_count() if device.type == "cuda" else 2
    if world == 1:
        print("\none process beside several: left out, for this machine has one GPU")
        return
    torch.cuda.empty_cache()  # the first process shares this one's GPU
    together, apart = f"{world} processes", f"{world} processes, each for itself"
    ways = {"1 process": (1, False), apart: (world, False), together: (world, True)}
    classes, crop, batch_size = points(device)[0]
    rates = {name: [] for name in ways}
    for _ in range(min(3, ROUNDS)):
        for name, (count, joined) in ways.items():
            seconds = seconds_of_steps(count, joined, device, backbone)
            rates[name] += [count * 2 * batch_size / one for one in seconds]
    one, *rest = (statistics.median(row) for row in rates.values())
    beside = {name: f"   efficiency {rate / (world * one):.0%}" for name, rate in zip((apart, together), rest)}
    title = f"a step in one process and in several, {backbone}, {batch_size} + {batch_size} images of {crop} each"
    show(title, rates, 1, "images/s", beside=beside)
    with torch.device("meta"):
        parameters = sum(parameter.numel() for parameter in DeepLabV3Plus(backbone, classes).parameters())
    print(f"  gradients: {4 * parameters / 1e6:.1f} MB a step and process")


# ----------------------------------------------------------------------------------------------------------------------

BENCHMARKS = {
    "labels": benchmark_labels,
    "step": benchmark_step,
    "loader": benchmark_loader,
    "evaluation": benchmark_evaluation,
    "scale": benchmark_scale,
    "processes": benchmark_processes,
}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=BENCHMARKS, help="one of the parts; default: all")
    parser.add_argument("--peer", type=Path, metavar="DIR", help="a checkout of github.com/s4mcontext/s4mc, run beside")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--backbone", choices=ENCODERS, help="default: resnet101 on a GPU, else resnet18")
    args = parser.parse_args(argv)
    device, threads = torch.device(args.device), torch.get_num_threads()
    cuda = device.type == "cuda"
    name = torch.cuda.get_device_name() if cuda else f"{platform.processor() or platform.machine()}, {threads} threads"
    print(f"{name}; torch {torch.__version__}, torchvision {torchvision.__version__}; {date.today()}")
    peer = load_peer(args.peer) if args.peer else None
    for title, benchmark in BENCHMARKS.items():
        if args.only in (None, title):
            torch.manual_seed(0)
            torch.set_num_threads(threads)
            benchmark(device, peer, args.backbone or ("resnet101" if cuda else "resnet18"))


if __name__ == "__main__":
    main()
