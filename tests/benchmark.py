"""How fast it is, on the device that there is: medians of side-by-side runs, each beside its floor or its rival.

    python tests/benchmark.py                                     # everything that this machine can run
    python tests/benchmark.py --only labels --peer DIR            # DIR: a checkout of github.com/s4mcontext/s4mc
    python tests/benchmark.py --only scale                        # as batch, crop, classes and loader workers grow
    python tests/benchmark.py --only processes                    # one process beside several

Nothing is asserted about time. Figures of a busy machine are worthless: all rows of a table alternate, and their
medians are printed with the slowest and fastest round.
"""

import argparse
import importlib
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
from itertools import accumulate
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
from model import DeepLabV3Plus, average_batchnorm, ema_teacher  # noqa: E402

ROUNDS = 7


def synchronize(device):
    if device.type == "cuda":
        torch.cuda.synchronize()


def measured(rivals, device, rounds=ROUNDS):
    """{name: [seconds of each round]} of functions without arguments, in turns; the first round of each is not counted."""
    seconds = {name: [] for name in rivals}
    for round in range(rounds + 1):
        for name, function in rivals.items():
            synchronize(device)
            began = time.perf_counter()
            function()
            synchronize(device)
            if round:
                seconds[name].append(time.perf_counter() - began)
    return seconds


def show(title, seconds, unit=1e3, suffix="ms", against=None, notes=(), beside={}):
    """Prints a table: median, smallest, largest, the median against the named row, what `beside` says of a row."""
    print(f"\n{title}")
    base = statistics.median(seconds[against]) if against in seconds else None
    for name, times in seconds.items():
        median = statistics.median(times)
        ratio = f"{base / median:8.1f} x {against}" if base and name != against else ""
        print(
            f"  {name:44}{median * unit:10.2f} {suffix}   ({min(times) * unit:.2f} to {max(times) * unit:.2f}){ratio}"
            f"{beside.get(name, '')}"
        )
    for note in notes:
        print(f"  {note}")


def peak_memory(function, device):
    """Bytes that a function holds at most beyond what there was, at its first call.

    On the CPU only what PyTorch's allocator hands out is seen, and NumPy's memory is not; what was there before the first
    call goes on counting where the function frees it.
    """
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with torch.autograd.profiler.profile(profile_memory=True) as record:
        function()
    events = [event for event in record.kineto_results.events() if event.name() == "[memory]"]
    changes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]  # negative where freed
    return max(accumulate(changes, initial=0))


def operations(function):
    """Floating-point operations of a function's matrix products and convolutions; multiply and add are two."""
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def large_product(device, dtype):
    """(a function that multiplies two large matrices, its floating-point operations, 2 n^3)."""
    n = 8192 if device.type == "cuda" else 2048
    a, b = torch.randn(2, n, n, device=device).to(dtype)
    return lambda: a @ b, 2 * n**3


# ----------------------------------------------------------------------------------------------------------------------
# the rival: the authors' code


def peer_labels(folder):
    """The authors' function of logits (B,C,H,W) that labels, or None. Their cross-entropy is left out of it."""
    if folder is None:
        return None
    sys.path.insert(0, str(folder))
    for missing in ("skimage", "skimage.measure"):  # imported there, unused in what is run here
        sys.modules.setdefault(missing, types.ModuleType(missing))
    sys.modules["skimage.measure"].label = sys.modules["skimage.measure"].regionprops = None
    try:
        helper = importlib.import_module("s4mc_utils.utils.loss_helper")
    except ImportError as error:
        print(f"--peer {folder}: {error}; expected a checkout of s4mcontext/s4mc and what it imports")
        return None
    helper.F = types.SimpleNamespace(cross_entropy=lambda *_, **__: 0.0)

    def label(logits):
        _, raw = logits.softmax(1).max(1)
        helper.compute_unsupervised_loss(logits, raw.clone(), 60, logits, "margin", "pascal", 4, 1)

    return label


# ----------------------------------------------------------------------------------------------------------------------
# what is measured


def smooth_logits(batch, classes, side, device):
    """Logits like a network's: bilinear from a quarter of the side."""
    small = 3 * torch.randn(batch, classes, side // 4 + 1, side // 4 + 1, device=device)
    return F.interpolate(small, (side, side), mode="bilinear")


def benchmark_labels(device, peer):
    """Full-resolution logits to labels, beside copying the logits once and the authors' code."""

    def ours(logits, compiled):
        if compiled:
            R._COMPILED[logits.shape] = function
        result = R.pseudo_labels(logits.softmax(1), 0.4)
        R._COMPILED.clear()
        return result

    for batch, classes, side in ((3, 21, 513), (3, 2, 513), (2, 19, 769), (1, 150, 513)):
        logits = smooth_logits(batch, classes, side, device)
        torch._dynamo.reset()  # it gives up after eight shapes
        R.use_compiler(logits.shape)
        function = R._COMPILED.pop(logits.shape)
        rivals = {
            "copy the logits": logits.clone,
            "S4MC": lambda: ours(logits, False),
            "S4MC, compiled": lambda: ours(logits, True),
        }
        if peer and classes == 21:  # the number their constants are for
            rivals["authors' code"] = lambda: peer(logits)
        size = logits.numel() * 4
        if device.type == "cuda":
            rivals["S4MC, compiled"]()  # the compiler tries kernels out at first, in memory of its own
        peaks = {name: peak_memory(rival, device) for name, rival in rivals.items()}
        notes = [f"peak beyond the logits, in logits: {name} {peak / size:.1f}" for name, peak in peaks.items() if peak]
        show(
            f"pseudo-labels, logits {tuple(logits.shape)}",
            measured(rivals, device),
            against="authors' code",
            notes=notes,
        )
    conf = R.confidence(smooth_logits(3, 21, 513, device).softmax(1))
    rivals = {"exact threshold": lambda: R.dpa_threshold(conf, 0.4), "sort": lambda: conf.flatten().sort()}
    rivals["kthvalue"] = lambda: conf.flatten().kthvalue(300_000)
    show(f"threshold of {conf.numel():,} pixels", measured(rivals, device))


# ----------------------------------------------------------------------------------------------------------------------
# the step


def step_arguments(**changes):
    args = dict(framework="cutmixseg", warmup_steps=0, iters=100, alpha0=0.4, lambda_u=1.0, cutmix=0.5, sup_loss="ce")
    return argparse.Namespace(**args | changes)


def random_batch(batch, classes, crop, device):
    images = {
        name: torch.randint(0, 256, (batch, 3, crop, crop), dtype=torch.uint8, device=device) for name in ("x", "weak")
    }
    y = torch.randint(0, classes, (batch, crop, crop), dtype=torch.uint8, device=device)
    return images | {"y": y, "valid": torch.ones(batch, crop, crop, dtype=torch.bool, device=device)}


def authors_step(student, teacher, batch, rng, peer):
    """The authors' order of things, in fp32: two passes of the teacher, the second in training mode and on mixed images."""
    x, weak, y = D.normalize(batch["x"]), D.normalize(batch["weak"]), batch["y"].long()
    with torch.no_grad():
        label = teacher.eval()(weak).softmax(1).max(1).indices
    mixed, label = D.cutmix(weak, label, rng)
    logits_x, logits_u = student(torch.cat([x, mixed])).split([len(x), len(mixed)])
    with torch.no_grad():
        teacher_logits = teacher.train()(torch.cat([x, mixed]))[len(x) :]
        if peer:
            peer(teacher_logits)  # their labels; the loss below has the same size whichever pixels it leaves out
        else:
            top = teacher_logits.softmax(1).topk(2, 1).values
            margin = top[:, 0] - top[:, 1]
            label = label.masked_fill(margin <= np.percentile(margin.cpu().numpy(), 40), 255)
    return F.cross_entropy(logits_x, y, ignore_index=255) + F.cross_entropy(logits_u, label, ignore_index=255)


def base_point(device):
    """The step that is measured: (backbone, classes, crop, labeled images; as many unlabeled ones)."""
    return ("resnet101", 21, 513, 3) if device.type == "cuda" else ("resnet18", 21, 128, 4)


def trainer(backbone, classes, device, amp, loss_of, layout=torch.channels_last):
    """A function that does train.py's whole step on networks of its own; loss_of: (student, teacher, rng) -> loss."""
    cuda, together = device.type == "cuda", dist.is_initialized()
    model = DeepLabV3Plus(backbone, classes).to(device, memory_format=layout).train()
    if together and cuda:
        model = torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)
    teacher = ema_teacher(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.001, 0.9, weight_decay=1e-4, fused=cuda and amp)
    student = DistributedDataParallel(model, broadcast_buffers=False) if together else model
    rng = np.random.default_rng(0)

    def step():
        with torch.autocast(device.type, torch.bfloat16, enabled=amp):
            loss = loss_of(student, teacher, rng)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if together and not cuda:
            average_batchnorm(model, dist.get_world_size())
        teacher.update_parameters(model)

    return step


def s4mc_loss(batch, framework="cutmixseg", **options):
    """train.py's loss of a batch, for `trainer`; options: of `pseudo_labels`."""
    args = step_arguments(framework=framework)
    return lambda student, teacher, rng: T.training_losses(student, teacher, batch, 50, args, options, rng)[0]


def benchmark_step(device, peer):
    """A step of training: images per second, memory, arithmetic, and what the pseudo-labels cost, beside the authors'."""
    cuda = device.type == "cuda"
    backbone, classes, crop, batch_size = base_point(device)
    batch = random_batch(batch_size, classes, crop, device)

    of = partial(trainer, backbone, classes, device)
    theirs = partial(of, False, layout=torch.contiguous_format)  # fp32 and PyTorch's default layout, as in their code
    rivals = {
        "S4MC": of(cuda, s4mc_loss(batch)),
        "S4MC, no refinement, fixed threshold": of(cuda, s4mc_loss(batch, refinement=False, threshold=0.0)),
        "labeled images alone": of(cuda, s4mc_loss(batch, "supervised")),
        "authors' order": theirs(lambda student, teacher, rng: authors_step(student, teacher, batch, rng, peer)),
    }
    peaks = {name: peak_memory(rival, device) for name, rival in rivals.items()}
    product, product_operations = large_product(device, torch.bfloat16 if cuda else torch.float32)
    seconds = measured(rivals | {"product": product}, device)
    product_seconds = seconds.pop("product")
    images = dict.fromkeys(rivals, 2 * batch_size) | {"labeled images alone": batch_size}
    notes = [f"{name}: {images[name] / statistics.median(times):.1f} images/s" for name, times in seconds.items()]
    notes += [f"{name}: {peak / 2**30:.2f} GiB beyond the networks" for name, peak in peaks.items() if peak]
    logits = smooth_logits(batch_size, classes, crop, device)
    stage = measured({"stage": lambda: R.pseudo_labels(logits.softmax(1), 0.4)}, device)["stage"]
    notes.append(f"pseudo-labels: {statistics.median(stage) / statistics.median(seconds['S4MC']):.1%} of the step")
    rate = product_operations / statistics.median(product_seconds) / 1e12
    count = operations(rivals["S4MC"]) / 1e12
    notes.append(
        f"model FLOPs utilization: {count / statistics.median(seconds['S4MC']) / rate:.1%} of the {rate:.3g} TFLOP/s "
        f"that a matrix product reaches here; {count:.3g} TFLOP a step"
    )
    show(
        f"step, {backbone}, {batch_size} + {batch_size} images of {crop}",
        seconds,
        against="authors' order",
        notes=notes,
    )


# ----------------------------------------------------------------------------------------------------------------------
# the loader


def photograph(width, height, rng):
    """(image, mask) with a photograph's share of detail: smooth colors with some noise; patches."""
    small = Image.fromarray(rng.integers(0, 256, (height // 16, width // 16, 3), dtype=np.uint8))
    pixels = np.asarray(small.resize((width, height), Image.Resampling.BICUBIC)) + rng.normal(0, 8, (height, width, 3))
    mask = Image.fromarray(rng.integers(0, 19, (height // 32, width // 32), dtype=np.uint8))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8)), mask.resize((width, height), Image.Resampling.NEAREST)


class PlainViews:
    """The pipeline of most repositories of this field: the whole image is resized, everything is done in turn."""

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

    def labeled(self):
        image, mask = self.weak()
        return self.normalize(image), torch.from_numpy(np.array(mask)).long()

    def labeled_strongly(self):
        image, mask = self.weak()
        return self.strong(image), torch.from_numpy(np.array(mask)).long()

    def both(self):
        image, mask = self.weak()
        return self.normalize(image), self.strong(image), torch.from_numpy(np.array(mask)).long()


def benchmark_loader(device, peer):
    """One worker's time for a sample, from files, beside the plain pipeline; a round is a row of samples."""
    torch.set_num_threads(1)
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        for name, suffix, size, crop, samples in (
            ("PASCAL", "jpg", (500, 375), 513, 30),
            ("Cityscapes", "png", (2048, 1024), 769, 5),
        ):
            image, mask = photograph(*size, rng)
            item = D.Item(name, Path(folder) / f"{name}.{suffix}", Path(folder) / f"{name}-mask.png")
            image.save(item.image, quality=90)
            mask.save(item.mask)
            data = D.Data(name, ("",) * 19, (0.5, 2.0), D.DATASETS["pascal"].values, [item], [item], [item], [])
            views, plain = D.TrainingViews(data, crop, "supervised", 0), PlainViews(item, crop, (0.5, 2.0))
            numbers = iter(range(10**6))
            both = D.TrainingViews(data, crop, "fixmatch", 0)

            def strong():
                number = next(numbers)
                return D.strong_views(both[number]["weak"][None], 0, [number])

            rivals = {
                "decoding image and mask": lambda: D.read(item, data),
                "plain, labeled": plain.labeled,
                "plain, labeled, with colors": plain.labeled_strongly,
                "plain, weak and strong": plain.both,
                "S4MC, labeled": lambda: views[next(numbers)],
                "S4MC, labeled and weak": lambda: both[next(numbers)],
                "S4MC, labeled, weak and strong on the CPU": strong,
            }
            rows = {name: lambda one=one: [one() for _ in range(samples)] for name, one in rivals.items()}
            seconds = measured(rows, torch.device("cpu"))
            show(f"loader, {name}-like {size[0]} x {size[1]}, crop {crop}, a sample", seconds, 1e3 / samples)
    if device.type == "cuda":
        weak = torch.randint(0, 256, (8, 3, 513, 513), dtype=torch.uint8, device=device)
        show(
            "strong views of 8 x 513 x 513 on the GPU",
            measured({"all 8": lambda: D.strong_views(weak, 0, range(8))}, device),
        )


# ----------------------------------------------------------------------------------------------------------------------
# evaluation


def numpy_scores(prediction, label, classes):
    """Intersection and union of one image by three histograms on the host, as most repositories of this field do."""
    prediction, label = prediction.cpu().numpy().ravel(), label.cpu().numpy().ravel()
    prediction = np.where(label == 255, 255, prediction)
    bins = np.arange(classes + 1)
    areas = [np.histogram(values, bins)[0] for values in (prediction[prediction == label], prediction, label)]
    return areas[0], areas[1] + areas[2] - areas[0]


def benchmark_evaluation(device, peer):
    """An image at original size and in windows; and the counting alone, beside histograms on the host."""
    backbone, size = ("resnet101", (1024, 2048)) if device.type == "cuda" else ("resnet18", (375, 500))
    model = DeepLabV3Plus(backbone, 19).to(device, memory_format=torch.channels_last).eval()
    image = torch.randint(0, 256, (1, 3, *size), dtype=torch.uint8, device=device)
    label = torch.randint(0, 19, (1, *size), dtype=torch.uint8, device=device)
    prediction = torch.randint(0, 19, (1, *size), device=device)
    rivals = {
        "original size": lambda: E.predict(model, image, E.Protocol()),
        "sliding windows, crop 321": lambda: E.predict(model, image, E.Protocol("sliding", 321)),
        "flips and scales": lambda: E.predict(model, image, E.Protocol(tta=True)),
    }
    show(f"prediction, {backbone}, {size[1]} x {size[0]}", measured(rivals, device, 3))
    rivals = {
        "confusion matrix": lambda: E.confusion_matrix(prediction, label, 19),
        "confusion matrix of the boundaries": lambda: E.boundary_confusion(prediction, label, 19),
        "histograms on the host": lambda: numpy_scores(prediction, label, 19),
    }
    show(f"counting, {size[1]} x {size[0]}, 19 classes", measured(rivals, device), against="histograms on the host")


# ----------------------------------------------------------------------------------------------------------------------
# as images, classes, workers and processes grow in number


def benchmark_scale(device, peer):
    """Time and memory of a step as batch, crop and classes grow, one at a time; then the loader's workers."""
    cuda = device.type == "cuda"
    backbone, classes, crop, batch_size = base_point(device)
    base = {"batch": batch_size, "crop": crop, "classes": classes}
    batches, crops = ((3, 6, 12), (321, 513, 769)) if cuda else ((2, 4, 8), (96, 128, 192))
    for factor, values in {"batch": batches, "crop": crops, "classes": (2, 21, 150)}.items():
        rivals, beside = {}, {}
        for value in values:
            point, name = base | {factor: value}, f"{factor} {value}"
            step = trainer(backbone, point["classes"], device, cuda, s4mc_loss(random_batch(**point, device=device)))
            try:
                beside[name] = f"{peak_memory(step, device) / 2**30:8.2f} GiB beyond the networks"
                rivals[name] = step
            except torch.OutOfMemoryError:
                print(f"\n{name}: does not fit into the GPU's memory")
        others = ", ".join(f"{name} {value}" for name, value in base.items() if name != factor)
        show(f"step by {factor}, {backbone}, {others}", measured(rivals, device), beside=beside)
    scale_workers()


def scale_workers(crop=513, batch_size=4, steps=10):
    """Images per second out of train.py's loader by its --workers: labeled and weak views, from JPEG files."""
    torch.set_num_threads(1)
    rng = np.random.default_rng(0)

    def rate(data, workers):
        """Counted from when all workers are at work to before the first of them has nothing to do."""
        ahead = 2 * workers + 1
        loader = iter(D.training_loader(data, range(steps + 2 * ahead), batch_size, crop, "fixmatch", 0, workers))
        for _ in range(ahead):
            next(loader)
        began = time.perf_counter()
        for _ in range(steps):
            next(loader)
        return 2 * batch_size * steps / (time.perf_counter() - began)

    with tempfile.TemporaryDirectory() as folder:
        items = [D.Item(str(i), Path(folder) / f"{i}.jpg", Path(folder) / f"{i}.png") for i in range(16)]
        for item in items:
            image, mask = photograph(500, 375, rng)
            image.save(item.image, quality=90)
            mask.save(item.mask)
        data = D.Data("photographs", ("",) * 19, (0.5, 2.0), D.DATASETS["pascal"].values, items, items, [], [])
        rates = {str(workers): [] for workers in (0, 1, 2, 4, 8) if workers <= max(2, os.cpu_count())}
        for _ in range(ROUNDS):
            for workers, row in rates.items():
                row.append(rate(data, int(workers)))
    show(f"loader by --workers, JPEG files of 500 x 375, crop {crop}, {os.cpu_count()} cores", rates, 1, "images/s")


def expected_efficiency(processes, size, step_seconds, bandwidth, overlap=2 / 3):
    """Speed of n processes over n times the speed of one, 0..1, where nothing but the gradients' all-reduce costs.

    all_reduce = 2 (n - 1) / n * size / bandwidth               seconds, of a ring
    efficiency = step / (step + max(0, all_reduce - overlap * step))

    size: bytes of gradients; step_seconds: of one process; bandwidth: bytes per second of the slowest link of the ring;
    overlap: the backward pass's share of the step, about 2/3, beside which the all-reduce runs.
    """
    all_reduce = 2 * (processes - 1) / processes * size / bandwidth
    return step_seconds / (step_seconds + max(0, all_reduce - overlap * step_seconds))


def gradient_bytes(backbone, classes):
    """Bytes of gradients that a step exchanges: 4 for each parameter."""
    with torch.device("meta"):
        return 4 * sum(parameter.numel() for parameter in DeepLabV3Plus(backbone, classes).parameters())


def _steps_of_one_process(rank, world, together, cuda, store, barrier, queue):
    """Puts the seconds of each step of process `rank` into the queue."""
    device = torch.device("cuda", rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    torch.set_num_threads(1)
    if together:
        dist.init_process_group("nccl" if cuda else "gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    backbone, classes, crop, batch_size = base_point(device)
    step = trainer(backbone, classes, device, cuda, s4mc_loss(random_batch(batch_size, classes, crop, device)))
    barrier.wait()
    queue.put(measured({"step": step}, device, ROUNDS // 2)["step"])
    del step  # gloo hangs where the group goes before what uses it
    if together:
        dist.destroy_process_group()


def seconds_of_steps(world, together, cuda):
    """Seconds of each step of each of `world` new processes."""
    context = mp.get_context("spawn")
    queue, barrier = context.SimpleQueue(), context.Barrier(world)
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_steps_of_one_process, (world, together, cuda, Path(folder) / "store", barrier, queue), nprocs=world)
    return [seconds for _ in range(world) for seconds in queue.get()]


def benchmark_processes(device, peer):
    """One process beside two on the CPU, with one thread each, or beside one for each GPU; and what is to be expected."""
    cuda = device.type == "cuda"
    backbone, classes, crop, batch_size = base_point(device)
    world = torch.cuda.device_count() if cuda else 2
    ways = {"1 process": (1, False)}
    if world > 1:
        ways |= {f"{world} processes, each for itself": (world, False), f"{world} processes": (world, True)}
    else:
        print("\nseveral processes: left out, because this machine has one GPU only")
    torch.cuda.empty_cache()  # the first process shares this one's GPU
    rates = {name: [] for name in ways}
    for _ in range(3):
        for name, (count, together) in ways.items():
            rates[name] += [count * 2 * batch_size / seconds for seconds in seconds_of_steps(count, together, cuda)]
    medians = {name: statistics.median(row) for name, row in rates.items()}
    one = medians.pop("1 process")
    notes = [f"efficiency of {name}: {rate / (world * one):.0%}" for name, rate in medians.items()]
    notes.append(f"gradients: {gradient_bytes(backbone, classes) / 1e6:.1f} MB a step and process")
    title = f"a step in one process and in several, {backbone}, {batch_size} + {batch_size} images of {crop} each"
    show(title, rates, 1, "images/s", notes=notes)
    show_expected({"measured": 2 * batch_size / one} if cuda else {})


def show_expected(steps):
    """Prints `expected_efficiency` with ResNet-101's gradients for steps {name: seconds} and for two assumed ones."""
    size = gradient_bytes("resnet101", 21)
    print(f"\nefficiency to be expected of resnet101, {size / 1e6:.0f} MB of gradients: computed, not measured")
    for name, seconds in (steps | {"assumed": 0.1, "assumed, short": 0.02}).items():
        for processes, gigabytes, link in ((8, 100, "NVLink in a node"), (64, 25, "200 Gb/s InfiniBand between nodes")):
            share = expected_efficiency(processes, size, seconds, gigabytes * 1e9)
            row = f"{processes} processes, step of {seconds * 1e3:.0f} ms, {name}"
            print(f"  {row:44}{share:10.1%}   at an assumed {gigabytes} GB/s, {link}")


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
    parser.add_argument("--only", choices=BENCHMARKS, help="one of the tables; default: all")
    parser.add_argument("--peer", type=Path, help="a checkout of github.com/s4mcontext/s4mc, run beside")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)
    device, threads = torch.device(args.device), torch.get_num_threads()
    name = (
        torch.cuda.get_device_name()
        if device.type == "cuda"
        else f"{platform.processor() or platform.machine()}, {threads} threads"
    )
    print(f"{name}; torch {torch.__version__}, torchvision {torchvision.__version__}; {date.today()}")
    peer = peer_labels(args.peer)
    for title, benchmark in BENCHMARKS.items():
        if args.only in (None, title):
            torch.manual_seed(0)
            torch.set_num_threads(threads)
            benchmark(device, peer)


if __name__ == "__main__":
    main()
