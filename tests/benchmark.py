"""How fast the program is on this machine, and how much memory it takes, beside a floor or a rival.

    python tests/benchmark.py                                     # everything that this machine can run
    python tests/benchmark.py --only labels --peer DIR            # DIR: a checkout of github.com/s4mcontext/s4mc
    python tests/benchmark.py --only scale                        # as batch, crop, classes and loader workers grow
    python tests/benchmark.py --only processes                    # one process beside several

The rows of a table are measured in turns; each shows the median round, then the fastest and the slowest. Nothing is
asserted about time, and figures of a busy machine are worthless.
"""

import argparse
import copy
import gc
import itertools
import json
import os
import platform
import random
import subprocess
import sys
import tempfile
import time
import types
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageFilter, ImageOps
from torch.utils.flop_counter import FlopCounterMode
from torchvision import transforms

sys.path.insert(0, str(Path(__file__).parent.parent))
import data as D  # noqa: E402
import evaluate as E  # noqa: E402
import refine as R  # noqa: E402
import train as T  # noqa: E402
from model import ENCODERS, DeepLabV3Plus, ema_decay, float_tensors, update_teacher  # noqa: E402
from shapes import write_shapes  # noqa: E402

ROUNDS = 7
POINTS = {  # where a step is measured: so many labeled and unlabeled images each
    "cpu": [{"batch": 4, "crop": 126, "classes": 21}],  # whole patches of DINOv2
    "cuda": [{"batch": batch, "crop": 513, "classes": 21} for batch in (3, 8)],
}


def measured(rivals, device):
    """{name: [seconds per call of each round]} of functions without arguments, in turns; a first round warms up."""
    seconds, cuda = {name: [] for name in rivals}, device.type == "cuda"
    calls = 10 if cuda else 1  # in a run, too, the host works ahead of a GPU
    for number, (name, function) in itertools.product(range(ROUNDS + 1), rivals.items()):
        torch.cuda.synchronize() if cuda else None
        began = time.perf_counter()
        for _ in range(calls):
            function()
        torch.cuda.synchronize() if cuda else None
        if number:
            seconds[name].append((time.perf_counter() - began) / calls)
    return seconds


def peak_memory(build, device):
    """(bytes held at most during the second call of the function that `build` returns, the function).

    What building leaves behind counts too: a step's networks, gradients and momentum. On the CPU it is the most of
    building and both calls, as PyTorch's allocator sees it; NumPy's memory is not in it.
    """
    gc.collect()
    before, cuda = torch.cuda.memory_allocated(), device.type == "cuda"
    with torch.autograd.profiler.profile(enabled=not cuda, profile_memory=True) as record:
        function = build()
        function()  # torch.compile tries out kernels here, in memory of its own
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        function()
    if cuda:
        return torch.cuda.max_memory_allocated() - before, function
    events = [event for event in record.kineto_results.events() if event.name() == "[memory]"]
    changes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]  # negative: freed
    return max(itertools.accumulate(changes, initial=0)), function


def show(title, seconds, unit=1e3, suffix="ms", against=None, beside={}):
    """Prints a table: median, smallest, largest, how many times as fast as the row `against`, and `beside`, by row."""
    print(f"\n{title}")
    for name, times in seconds.items():
        median, ratio = np.median(times), ""
        if against in seconds and name != against:
            ratio = f"{np.median(seconds[against]) / median:8.1f} x {against}"
        spread = f"({min(times) * unit:.2f} to {max(times) * unit:.2f})"
        print(f"  {name:44}{median * unit:10.2f} {suffix}   {spread}{ratio}{beside.get(name, '')}", flush=True)


def load_peer(folder):
    """The authors' code as a function of logits (B,21,H,W) that decides their pseudo-labels, without their loss."""
    sys.path.insert(0, str(folder))
    unused = types.SimpleNamespace(label=None, regionprops=None)  # imported there, not needed by what runs here
    sys.modules.update({"skimage": unused, "skimage.measure": unused})
    try:
        from s4mc_utils.utils import loss_helper as helper
    except ImportError as error:
        sys.exit(f"--peer {folder} could not be imported ({error}); expected a checkout of s4mcontext/s4mc, and SciPy")
    helper.F = types.SimpleNamespace(cross_entropy=lambda *_, **__: 0.0)

    def label(logits):
        raw = logits.softmax(1).max(1).indices
        helper.compute_unsupervised_loss(logits, raw, 60, logits, "margin", "pascal", 4, 1)

    return label


def smooth_logits(batch, classes, side, device):
    """Logits like a network's: bilinear from a quarter of the side."""
    small = 3 * torch.randn(batch, classes, side // 4 + 1, side // 4 + 1, device=device)
    return F.interpolate(small, (side, side), mode="bilinear")


def benchmark_labels(device, backbone, peer):
    """Full-resolution logits to labels, beside copying the logits once and the authors' code; the threshold alone."""
    for shape in ((3, 21, 513), (3, 2, 513), (2, 19, 769), (1, 150, 513)):
        logits = smooth_logits(*shape, device)
        torch._dynamo.reset()  # it gives up after eight shapes
        settings = argparse.Namespace(processes=1, compile=True)
        compiled = T.distribute_and_compile(settings, device, torch.nn.Identity(), torch.nn.Identity())[2]
        rivals = {
            "copy the logits": logits.clone,
            "S4MC": lambda: R.pseudo_labels(logits.softmax(1), 0.4),
            "S4MC, compiled": lambda: compiled(logits.softmax(1), 0.4),
        }
        if peer and shape[1] == 21:  # their constants are for PASCAL
            rivals["authors' code"] = lambda: peer(logits)
        peaks = {name: peak_memory(lambda: rival, device)[0] / logits.nbytes for name, rival in rivals.items()}
        beside = {name: f"   peak memory {peak:.1f} x the logits" for name, peak in peaks.items()}
        title = f"pseudo-labels, logits {tuple(logits.shape)}"
        show(title, measured(rivals, device), against="authors' code", beside=beside)
    conf = R.confidence(smooth_logits(3, 21, 513, device).softmax(1)).flatten()
    rivals = {"exact threshold": lambda: R.dpa_threshold(conf, 0.4), "sort": conf.sort}
    rivals["kthvalue"] = lambda: conf.kthvalue(1 + int(0.4 * (len(conf) - 1)))
    show(f"threshold of {len(conf):,} pixels", measured(rivals, device))


def trainer(
    device, backbone, batch, crop, classes, fixmatch=False, compile=False, authors=False, peer=None, **options
):  # fmt: skip
    """A function that does the next step of train.py, in the order of its loop, on networks and a batch of its own.

    authors: see `authors_loss`; options: those of `pseudo_labels`.
    """
    pixels, numbers = partial(torch.randint, dtype=torch.uint8, device=device), itertools.count()
    x_pixels, weak_pixels = pixels(256, (2, batch, 3, crop, crop))
    y, valid = pixels(classes, (batch, crop, crop)), torch.ones(batch, crop, crop, dtype=torch.bool, device=device)
    cuda, layout = device.type == "cuda", torch.contiguous_format if authors else torch.channels_last
    student = DeepLabV3Plus(backbone, classes).to(device, memory_format=layout).train()
    teacher = copy.deepcopy(student).eval().requires_grad_(False)
    averaged = float_tensors(teacher), float_tensors(student)
    optimizer = torch.optim.SGD(student.parameters(), 0.001, 0.9, weight_decay=1e-4, fused=cuda and not authors)
    forward, predict, label = student, teacher, R.pseudo_labels
    if compile:
        settings = argparse.Namespace(processes=1, compile=True)
        forward, predict, label = T.distribute_and_compile(settings, device, student, teacher)

    def train_step():
        step = next(numbers)
        rng = D.generator(0, "step", step)
        torch.manual_seed(int(rng.integers(2**63)))
        x, weak = D.normalize(x_pixels), D.normalize(weak_pixels)
        if authors:
            loss = authors_loss(student, teacher, x, y.long(), weak, rng, peer)
        else:
            strong = weak
            if fixmatch:
                strong = D.normalize(D.strong_views(weak_pixels, 0, step))
            with torch.autocast(device.type, torch.bfloat16, enabled=cuda):
                with torch.no_grad():
                    prob = predict(weak).softmax(1)
                pseudo = label(prob, R.dpa_alpha(step, 10_000), valid=valid, **options)
                strong, target, _ = D.cutmix(rng, 0.5, strong, pseudo.label, valid)
                logits_x, logits_u = forward(torch.cat([x, strong])).split(batch)
            loss_x = T.cross_entropy(logits_x, y, T.count(y != D.IGNORE))
            loss = loss_x + T.cross_entropy(logits_u, target, T.count(target != D.IGNORE))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        update_teacher(*averaged, ema_decay(step))

    return train_step


def authors_loss(student, teacher, x, y, weak, rng, peer):
    """The authors' order of operations in float32: two passes of the teacher, the second in training mode."""
    with torch.no_grad():
        label = teacher.eval()(weak).softmax(1).max(1).indices
    mixed, label = D.cutmix(rng, 0.5, weak, label)
    logits_x, logits_u = student(torch.cat([x, mixed])).split([len(x), len(mixed)])
    with torch.no_grad():
        teacher_logits = teacher.train()(torch.cat([x, mixed]))[len(x) :]
        if peer:
            peer(teacher_logits)  # the loss below costs the same, whichever pixels it leaves out
        else:
            top = teacher_logits.softmax(1).topk(2, 1).values
            margin = top[:, 0] - top[:, 1]
            label = label.masked_fill(margin <= np.percentile(margin.cpu().numpy(), 40), D.IGNORE)
    loss_u = F.cross_entropy(logits_u, label, ignore_index=D.IGNORE)
    return F.cross_entropy(logits_x, y, ignore_index=D.IGNORE) + loss_u


def compare_steps(title, device, backbone, rows, against=None, alone={}):
    """Prints time, images per second and memory of steps, {name: arguments of `trainer`}, and the time of `alone`.

    Returns the steps that fit into memory, and {name: median seconds} of everything.
    """
    torch._dynamo.reset()
    steps, peaks = {}, {}
    for name, row in rows.items():
        try:
            peaks[name], steps[name] = peak_memory(partial(trainer, device, backbone, **row), device)
        except torch.OutOfMemoryError:
            print(f"\n{title}: {name} does not fit into the GPU's memory")
    seconds = measured(steps | alone, device)
    medians = {name: np.median(times) for name, times in seconds.items()}
    speeds = {name: 2 * rows[name]["batch"] / medians[name] for name in steps}
    beside = {name: f"{speeds[name]:9.1f} images/s{peaks[name] / 2**30:8.2f} GiB" for name in steps}
    show(title, seconds, against=against, beside=beside)
    return steps, medians


def benchmark_step(device, backbone, peer):
    """A step beside the authors' order of things; the share of pseudo-labels; operations per second beside a peak."""
    n, count, dtype = (8192, 64, torch.bfloat16) if device.type == "cuda" else (1024, 1, torch.float32)
    a, b = torch.randn(2, n, n, device=device).to(dtype)
    maps, kernel = (torch.randn(k, 256, s, s, device=device).to(dtype) for k, s in ((count, 64), (256, 3)))
    maps, kernel = (tensor.to(memory_format=torch.channels_last) for tensor in (maps, kernel))
    operations = {"large matrix product": 2 * n**3, "large convolution": 2 * 9 * 256 * maps.numel()}
    for point in POINTS[device.type]:
        rows = {
            "S4MC": point,
            "S4MC, compiled": point | {"compile": True},
            "S4MC, strong views of FixMatch": point | {"fixmatch": True},
            "S4MC, no refinement, fixed threshold": point | {"refinement": False, "threshold": 0.95},
            "authors' order": point | {"authors": True, "peer": peer},
        }
        logits = smooth_logits(point["batch"], point["classes"], point["crop"], device)
        alone = {
            "pseudo-labels": lambda: R.pseudo_labels(logits.softmax(1), 0.4),
            "large matrix product": lambda: a @ b,
            "large convolution": lambda: F.conv2d(maps, kernel, padding=1),  # the faster one on some CPUs
        }
        title = f"step, {backbone}, {point['batch']} + {point['batch']} images of {point['crop']}"
        steps, medians = compare_steps(title, device, backbone, rows, "authors' order", alone)
        if "S4MC" in steps:
            with FlopCounterMode(display=False) as counter:
                steps["S4MC"]()
            done, step = counter.get_total_flops() / 1e12, medians["S4MC"]
            rate = max(operations[name] / medians[name] for name in operations) / 1e12
            print(f"  pseudo-labels: {medians['pseudo-labels'] / step:.1%} of the step")
            print(f"  {done:.3g} TFLOP, at {done / step / rate:.1%} of the {rate:.3g} TFLOP/s that the faster reaches")


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
    """The pipeline of most repositories of this field: resizes the whole image, works in Pillow throughout."""

    jitter, gray = transforms.ColorJitter(0.5, 0.5, 0.5, 0.25), transforms.RandomGrayscale(0.2)

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
        image = self.gray(self.jitter(image) if random.random() < 0.8 else image)
        if random.random() < 0.5:
            image = image.filter(ImageFilter.GaussianBlur(random.uniform(0.1, 2.0)))
        return image


def plain_sample(plain, *views):
    """Views, each a function of the weak image, and the mask, as most repositories of this field make and send them."""
    image, mask = plain.weak()
    normalize = transforms.Compose([transforms.ToTensor(), transforms.Normalize(D.MEAN, D.STD)])
    return *(normalize(view(image)) for view in views), torch.from_numpy(np.array(mask)).long()


def benchmark_loader(device, backbone, peer):
    """One worker's time for a sample from files, beside the plain pipeline."""
    torch.set_num_threads(1)
    for suffix, size, crop, count in (("jpg", (500, 375), 513, 30), ("png", (2048, 1024), 769, 5)):
        with tempfile.TemporaryDirectory() as folder:
            data, numbers = photographs(folder, 1, size, suffix), itertools.count()
            views = D.TrainingViews(data, crop, 0)
            plain = PlainViews(data.labeled[0], crop, data.scales)
            rivals = {
                "decoding image and mask": lambda: D.read(data.labeled[0], data),
                "plain, labeled": lambda: plain_sample(plain, Image.Image.copy),
                "plain, weak and strong": lambda: plain_sample(plain, Image.Image.copy, plain.strong),
                "S4MC, labeled": lambda: views[next(numbers), False, False],
                "S4MC, labeled and weak": lambda: views[next(numbers), True, False],
                "S4MC, also strong on the CPU": lambda: D.strong_views(
                    views[next(numbers), True, False]["weak"][None], 0, 0
                ),
            }
            rows = {name: lambda rival=rival: [rival() for _ in range(count)] for name, rival in rivals.items()}
            title = f"views from {suffix.upper()} files of {size[0]} x {size[1]}, crop {crop}, a sample"
            show(title, measured(rows, torch.device("cpu")), 1e3 / count)


def loader_rate(data, workers, batch_size=4, steps=10):
    """Images per second, from when all workers are at work to before the first of them has nothing to do."""
    ahead = 2 * workers + 1
    loader = iter(D.training_loader(data, range(steps + 2 * ahead), batch_size, 513, 0, workers))
    [next(loader) for _ in range(ahead)]
    began = time.perf_counter()
    [next(loader) for _ in range(steps)]
    return 2 * batch_size * steps / (time.perf_counter() - began)


def numpy_scores(prediction, label):
    """Intersection and union by three histograms on the host, as most repositories of this field count them."""
    prediction, label = prediction.cpu().numpy().ravel(), label.cpu().numpy().ravel()
    prediction = np.where(label == D.IGNORE, D.IGNORE, prediction)
    areas = [np.histogram(values, np.arange(20))[0] for values in (prediction[prediction == label], prediction, label)]
    return areas[0], areas[1] + areas[2] - areas[0]


def benchmark_evaluation(device, backbone, peer):
    """Prediction of an image by each protocol; the counting alone, beside histograms on the host."""
    size, crop = ((1024, 2048), 769) if device.type == "cuda" else ((375, 500), 321)
    network = DeepLabV3Plus(backbone, 19).to(device, memory_format=torch.channels_last).eval()
    image = torch.randint(256, (1, 3, *size), dtype=torch.uint8, device=device)
    label, prediction = torch.randint(19, (2, 1, *size), device=device)
    label = label.to(torch.uint8)
    protocols = {"original size": E.Protocol(), f"sliding windows of {crop}": E.Protocol("sliding", crop)}
    protocols["flips and scales"] = E.Protocol(tta=True)
    rivals = {name: partial(E.predict, network, image, protocol) for name, protocol in protocols.items()}
    show(f"prediction, {backbone}, {size[1]} x {size[0]}", measured(rivals, device))
    rivals = {
        "confusion matrix": lambda: E.confusion_matrix(prediction, label, 19),
        "confusion matrix of the boundaries": lambda: E.boundary_confusion(prediction, label, 19),
        "histograms on the host": lambda: numpy_scores(prediction, label),
    }
    show(f"counting, {size[1]} x {size[0]}, 19 classes", measured(rivals, device), against="histograms on the host")


def benchmark_scale(device, backbone, peer):
    """Time and memory of a step as batch, crop and classes grow, one at a time; then the loader's workers."""
    base = POINTS[device.type][0]
    batches, crops = ((3, 8, 16), (321, 513, 769)) if device.type == "cuda" else ((2, 4, 8), (96, 128, 192))
    for factor, values in {"batch": batches, "crop": crops, "classes": (2, 21, 150)}.items():
        others = ", ".join(f"{name} {value}" for name, value in base.items() if name != factor)
        rows = {f"{factor} {value}": base | {factor: value} for value in values}
        compare_steps(f"step by {factor}, {backbone}, {others}", device, backbone, rows)
    torch.set_num_threads(1)
    rates = {str(workers): [] for workers in (0, 1, 2, 4, 8) if workers <= max(2, os.cpu_count())}
    with tempfile.TemporaryDirectory() as folder:
        data = photographs(folder, 16, (500, 375), "jpg")
        for _, (workers, row) in itertools.product(range(ROUNDS), rates.items()):
            row.append(loader_rate(data, int(workers)))
    show(f"loader by --workers, JPG files of 500 x 375, crop 513, {os.cpu_count()} cores", rates, 1, "images/s")


def benchmark_processes(device, backbone, peer):
    """Runs of train.py in one process beside two on the CPU, with one thread each, or beside one for each GPU."""
    world = torch.cuda.device_count() if device.type == "cuda" else 2
    if world == 1:
        print("\none process beside several: skipped, because this machine has one GPU")
        return
    gc.collect()
    torch.cuda.empty_cache()  # the runs share this process's GPU
    batch, crop, _ = POINTS[device.type][0].values()
    options = (
        f"--framework cutmixseg --warmup-iters 0 --iters 20 --log-every 5 --eval-every 9 --backbone {backbone} "
        f"--crop {crop} --batch-size {batch} --weights none --device {device.type} "
        f"--workers {4 if device.type == 'cuda' else 0}"
    ).split()
    launcher = f"-m torch.distributed.run --standalone --nproc_per_node={world}".split()
    rates = {"1 process": [], f"{world} processes": []}
    with tempfile.TemporaryDirectory() as folder:
        write_shapes(Path(folder) / "shapes")
        for number, (name, row) in itertools.product(range(min(3, ROUNDS)), rates.items()):
            out = Path(folder) / f"{number} {name}"
            start = [sys.executable] if name == "1 process" else [sys.executable, *launcher]
            command = [*start, T.__file__, "--root", folder, "--out", out, *options]
            environment = os.environ | {"OMP_NUM_THREADS": "1"}
            subprocess.run(command, env=environment, stdout=subprocess.DEVNULL, check=True)
            lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
            row += [line["images_per_second"] for line in lines if line["event"] == "train"][1:]
    one, several = (np.median(row) for row in rates.values())
    beside = {f"{world} processes": f"   efficiency {several / (world * one):.0%}"}
    title = f"a run in one process and in several, {backbone}, {batch} + {batch} images of {crop} each"
    show(title, rates, 1, "images/s", beside=beside)


BENCHMARKS = dict(
    labels=benchmark_labels, step=benchmark_step, loader=benchmark_loader, evaluation=benchmark_evaluation,
    scale=benchmark_scale, processes=benchmark_processes,
)  # fmt: skip


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=BENCHMARKS, help="one of the parts; default: all")
    parser.add_argument("--peer", type=Path, metavar="DIR", help="a checkout of github.com/s4mcontext/s4mc, run beside")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--backbone", choices=ENCODERS, help="default: resnet101 on a GPU, else resnet18")
    args = parser.parse_args(argv)
    device, threads, cuda = torch.device(args.device), torch.get_num_threads(), args.device == "cuda"
    if cuda and not torch.cuda.is_available():
        parser.error("--device cuda, but PyTorch sees no GPU; use --device cpu")
    name = torch.cuda.get_device_name() if cuda else f"{platform.processor() or platform.machine()}, {threads} threads"
    print(f"{name}; torch {torch.__version__}, torchvision {torchvision.__version__}; {time.strftime('%F')}")
    peer = load_peer(args.peer) if args.peer else None
    for title, benchmark in BENCHMARKS.items():
        if args.only in (None, title):
            torch.manual_seed(0)
            torch.set_num_threads(threads)
            benchmark(device, args.backbone or ("resnet101" if cuda else "resnet18"), peer)


if __name__ == "__main__":
    main()
