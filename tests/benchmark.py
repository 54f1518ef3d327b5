"""How fast it is, on the device that there is: medians of side-by-side runs, each beside its floor or its rival.

    python tests/benchmark.py                                     # everything that this machine can run
    python tests/benchmark.py --only labels --peer DIR            # DIR: a checkout of github.com/s4mcontext/s4mc

Nothing is asserted about time. Figures of a busy machine are worthless: all rows of a table alternate, and their
medians are printed with the slowest and fastest round.
"""

import argparse
import importlib
import platform
import random
import statistics
import sys
import tempfile
import time
import types
from datetime import date
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageFilter, ImageOps
from torchvision import transforms

sys.path.insert(0, str(Path(__file__).parent.parent))
import data as D  # noqa: E402
import evaluate as E  # noqa: E402
import refine as R  # noqa: E402
import train as T  # noqa: E402
from model import DeepLabV3Plus, ema_teacher  # noqa: E402

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


def show(title, seconds, unit=1e3, suffix="ms", against=None, notes=()):
    """Prints a table: median, fastest, slowest, and the median against the named row."""
    print(f"\n{title}")
    base = statistics.median(seconds[against]) if against in seconds else None
    for name, times in seconds.items():
        median = statistics.median(times)
        ratio = f"{base / median:8.1f} x {against}" if base and name != against else ""
        print(
            f"  {name:44}{median * unit:10.2f} {suffix}   ({min(times) * unit:.2f} to {max(times) * unit:.2f}){ratio}"
        )
    for note in notes:
        print(f"  {note}")


def peak_memory(function, device):
    """Bytes that a function holds at most beyond what there was, on CUDA; None elsewhere."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    function()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


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
    eager = R._both_after
    R.use_compiler()
    compiled = R._both_after

    def ours(logits, function):
        R._both_after = function
        return R.pseudo_labels(logits.softmax(1), 0.4)

    for batch, classes, side in ((3, 21, 513), (3, 2, 513), (2, 19, 769), (1, 150, 513)):
        logits = smooth_logits(batch, classes, side, device)
        torch._dynamo.reset()  # it gives up after eight shapes
        rivals = {
            "copy the logits": logits.clone,
            "S4MC": lambda: ours(logits, eager),
            "S4MC, compiled": lambda: ours(logits, compiled),
        }
        if peer and classes == 21:  # the number their constants are for
            rivals["authors' code"] = lambda: peer(logits)
        size = logits.numel() * 4
        peaks = {name: peak_memory(rival, device) for name, rival in rivals.items()}
        notes = [f"peak beyond the logits, in logits: {name} {peak / size:.1f}" for name, peak in peaks.items() if peak]
        show(
            f"pseudo-labels, logits {tuple(logits.shape)}",
            measured(rivals, device),
            against="authors' code",
            notes=notes,
        )
    R._both_after = eager
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


def benchmark_step(device, peer):
    """A step of training: images per second, memory, and what the pseudo-labels cost, beside the authors' order of things."""
    cuda = device.type == "cuda"
    backbone, classes, crop, batch_size = ("resnet101", 21, 513, 3) if cuda else ("resnet18", 21, 128, 4)
    batch = random_batch(batch_size, classes, crop, device)

    def trainer(amp, loss_of):
        """A function that does one whole step on networks of its own."""
        student = DeepLabV3Plus(backbone, classes).to(device, memory_format=torch.channels_last).train()
        teacher = ema_teacher(student)
        optimizer = torch.optim.SGD(student.parameters(), 0.001, 0.9, weight_decay=1e-4, fused=cuda and amp)
        rng = np.random.default_rng(0)

        def step():
            with torch.autocast(device.type, torch.bfloat16, enabled=amp):
                loss = loss_of(student, teacher, rng)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            teacher.update_parameters(student)

        return step

    def ours(framework, refinement=True):
        options = {"refinement": refinement} | ({} if refinement else {"threshold": 0.0})
        return lambda student, teacher, rng: T.training_losses(
            student, teacher, batch, 50, step_arguments(framework=framework), options, rng
        )[0]

    rivals = {
        "S4MC": trainer(cuda, ours("cutmixseg")),
        "S4MC, no refinement, fixed threshold": trainer(cuda, ours("cutmixseg", False)),
        "labeled images alone": trainer(cuda, ours("supervised")),
        "authors' order": trainer(
            False, lambda student, teacher, rng: authors_step(student, teacher, batch, rng, peer)
        ),
    }
    peaks = {name: peak_memory(rival, device) for name, rival in rivals.items()}
    seconds = measured(rivals, device)
    notes = [f"{name}: {2 * batch_size / statistics.median(times):.1f} images/s" for name, times in seconds.items()]
    notes += [f"{name}: {peak / 2**30:.2f} GiB beyond the networks" for name, peak in peaks.items() if peak]
    logits = smooth_logits(batch_size, classes, crop, device)
    stage = measured({"stage": lambda: R.pseudo_labels(logits.softmax(1), 0.4)}, device)["stage"]
    notes.append(f"pseudo-labels: {statistics.median(stage) / statistics.median(seconds['S4MC']):.1%} of the step")
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

    def both(self):
        image, mask = self.weak()
        return self.normalize(image), self.strong(image), torch.from_numpy(np.array(mask)).long()


def benchmark_loader(device, peer):
    """One worker's samples per second, from files, beside the plain pipeline."""
    torch.set_num_threads(1)
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        for name, suffix, size, crop in (("PASCAL", "jpg", (500, 375), 513), ("Cityscapes", "png", (2048, 1024), 769)):
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
                "plain, weak and strong": plain.both,
                "S4MC, labeled": lambda: views[next(numbers)],
                "S4MC, labeled and weak": lambda: both[next(numbers)],
                "S4MC, labeled, weak and strong on the CPU": strong,
            }
            show(f"loader, {name}-like {size[0]} x {size[1]}, crop {crop}", measured(rivals, torch.device("cpu"), 30))
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

BENCHMARKS = {
    "labels": benchmark_labels,
    "step": benchmark_step,
    "loader": benchmark_loader,
    "evaluation": benchmark_evaluation,
}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=BENCHMARKS, help="one of the tables; default: all")
    parser.add_argument("--peer", type=Path, help="a checkout of github.com/s4mcontext/s4mc, run beside")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
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
