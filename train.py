"""One training run of S4MC: a few labeled images, many unlabeled ones, DeepLabv3+ as student and its EMA teacher.

    python train.py                                                        # generated shapes, on a CPU, minutes
    python train.py --dataset camvid --root data --labeled 46              # photographs
    torchrun --nproc_per_node=8 train.py --dataset pascal --labeled 92     # one process per GPU, as in the paper

Writes --out: args.json, metrics.jsonl, last.pth, best.pth, panels/. `python evaluate.py OUT/last.pth` scores it.
"""

import argparse
import contextlib
import copy
import json
import math
import os
import platform
import shlex
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from torch.nn.parallel import DistributedDataParallel
from torchvision.transforms.v2 import functional as VF

import refine
from data import DATASETS, IGNORE, Data, InputError, class_pixels, cutmix, generator, normalize, open_dataset
from data import rank_and_world, read, strong_views, training_loader
from evaluate import EVAL_MODES, Protocol, evaluate, label_counts, label_figures, label_options, number, panel
from evaluate import panel_items, read_records, run_script, table
from model import ENCODERS, DeepLabV3Plus, all_reduce, average_statistics, cannot_write, ema_decay, float_tensors
from model import load_checkpoint, save_checkpoint, start_processes, update_teacher
from refine import dpa_alpha, neighbor_agreement

# The options that are left out on the command line, by --dataset.
PHOTOGRAPHS = {  # [ours], chosen on photographs of people and of PASCAL VOC; the values for GPUs are untested
    "unsup_norm": "valid", "floor": 0.95, "warmup_share": 0.2, "weights": "pretrained", "optimizer": "adamw",
    "lr": 2e-4, "head_lr": 1e-3, "lr_warmup": 0.1, "weight_decay": 1e-4, "sup_loss": "ce", "eval_mode": "original",
    "batch_size": 8,
    "cpu": {"crop": 192, "workers": 1, "framework": "fixmatch", "backbone": "mobilenet_v2", "iters": 1000},
    "cuda": {"crop": 321, "workers": 8, "framework": "unimatch", "backbone": "resnet50", "iters": 6000},
}  # fmt: skip
PRESETS = {
    "shapes": {  # [ours]
        "labeled": "24", "crop": 64, "workers": 1, "framework": "fixmatch", "unsup_norm": "kept", "floor": 0.0,
        "warmup_share": 0.2, "backbone": "resnet10", "weights": "none", "iters": 1500, "batch_size": 4,
        "optimizer": "sgd", "lr": 0.02, "head_lr": 0.02, "lr_warmup": 0.0, "weight_decay": 5e-4, "sup_loss": "ce",
        "eval_mode": "original",
    },
    "camvid": {"labeled": "46", **PHOTOGRAPHS},
    "folder": {"labeled": "all", **PHOTOGRAPHS},
    "pascal": {  # Appendix D, Secs. 4.1 and 4.3 [paper]; warm-up [authors' code]; workers [ours]
        "labeled": "366", "crop": 513, "workers": 4, "framework": "fixmatch", "unsup_norm": "kept", "floor": 0.0,
        "warmup_epochs": 1, "backbone": "resnet101", "weights": "pretrained", "epochs": 80, "batch_size": 3,
        "optimizer": "sgd", "lr": 0.001, "head_lr": 0.01, "lr_warmup": 0.0, "weight_decay": 1e-4, "sup_loss": "ce",
        "eval_mode": "original",
    },
    "cityscapes": {  # the same; ohem and sliding windows [common practice]
        "labeled": "744", "crop": 769, "workers": 4, "framework": "fixmatch", "unsup_norm": "kept", "floor": 0.0,
        "warmup_epochs": 1, "backbone": "resnet101", "weights": "pretrained", "epochs": 80, "batch_size": 2,
        "optimizer": "sgd", "lr": 0.01, "head_lr": 0.01, "lr_warmup": 0.0, "weight_decay": 5e-4, "sup_loss": "ohem",
        "eval_mode": "sliding",
    },
}  # fmt: skip
DINOV2 = {"optimizer": "adamw", "lr": 5e-6, "head_lr": 2e-4, "weight_decay": 0.01}  # for any dataset [UniMatch V2]
S4MC = {"refinement": True, "confidence": "margin", "threshold": None}  # threshold None: DPA
WITHOUT_S4MC = {"refinement": False, "confidence": "max", "threshold": 0.95, "unsup_norm": "valid", "floor": 0.0}
VIEWS = {"supervised": 0, "cutmixseg": 1, "fixmatch": 1, "unimatch": 2}  # strong views of an unlabeled image
MIN_SUPERVISED_STEPS = 1000  # of a run measured in epochs [ours]; the authors' 92 labels: 960, of 8 images
FREE_AT_RESUME = set(  # these may change; the images, ids and steps that they select are compared
    "resume out root splits workers device amp log_every eval_every eval_steps save_every compile tensorboard labeled "
    "batch_size processes weights deterministic lr head_lr epochs warmup_epochs warmup_share".split()
)

# ----------------------------------------------------------------------------------------------------------------------
# schedules and losses


def learning_rate(step, total_steps, base, power=0.9, warmup=0.0):
    """Appendix D: return lr_base * (1 - iter / total_iter) ** power.

    warmup: the share of the run in which it rises linearly from 0 [ours]; 0 is the paper.
    """
    rise = min(1, (step + 1) / (warmup * total_steps)) if warmup else 1
    return base * rise * (1 - step / total_steps) ** power


def count(mask):
    """Return the number of True pixels over all processes, 0-d."""
    return all_reduce(mask.sum())


def cross_entropy(logits, label, divisor):
    """Eqs. 2-3: return the loss summed over this process's labeled pixels, divided by `divisor`.

    logits (B,C,H,W), label (B,H,W) with 255 = not labeled; divisor, 0-d: pixels of all processes, in Eq. 2 the labeled.
    The sum is multiplied by the number of processes, because DistributedDataParallel averages gradients. So N processes
    give the loss of one with the whole batch.
    """
    _, world = rank_and_world()
    total = F.cross_entropy(logits, label.long(), ignore_index=IGNORE, reduction="sum")
    return total * world / divisor.clamp(min=1)


@torch.no_grad()
def ohem(logits, label, sure=0.7, per_image=50_000):
    """Online hard example mining (Shrivastava et al., 2016): return the label with 255 on easy pixels.

    logits (B,C,H,W), label (B,H,W). A pixel is easy if its own class has a probability above `sure`. The hardest
    B * per_image pixels of this process always stay. Both numbers are common practice on Cityscapes.
    """
    index = label.clamp(max=logits.shape[1] - 1).long()  # 255 is not an index
    own = logits.softmax(1).gather(1, index[:, None])[:, 0]
    prob = own.masked_fill(label == IGNORE, torch.inf).flatten()
    place = min(per_image * len(label), prob.numel()) - 1
    hardest = prob.sort().values[place]  # kthvalue is slow on a GPU
    return label.masked_fill(own > hardest.clamp(min=sure), IGNORE)


def complementary_dropout(labeled, unlabeled, channels, device):
    """Return multipliers of the student's deepest features, (labeled + 2 * unlabeled, channels) [UniMatch V2].

    For a random half of the unlabeled images each channel is dropped in one strong view and doubled in the other.
    Labeled images, and the other half, stay as they are. UniMatch V2 does this on four levels of features.
    """
    first = 2.0 * torch.randint(2, (unlabeled, channels), device=device)
    unchanged = torch.rand(unlabeled, 1, device=device).argsort(0) < unlabeled // 2
    first = torch.where(unchanged, 1, first)
    return torch.cat([torch.ones(labeled, channels, device=device), first, 2 - first])


def class_prior(data, neighborhood):
    """Eq. 15 over the labeled images of the run, (C,): the mean `neighbor_agreement` over the pixels.

    A class without labeled pixels takes the mean of the others.
    """
    classes = len(data.classes)
    agreement, pixels = torch.zeros(2, classes, dtype=torch.double)
    for item in data.labeled:
        _, mask = read(item, data)
        mask = VF.pil_to_tensor(mask)  # (1,H,W)
        in_image = torch.bincount(mask.flatten().long(), minlength=256)[:classes]
        agreement += in_image * neighbor_agreement(mask, classes, neighborhood)
        pixels += in_image
    prior = agreement / pixels
    return torch.where(pixels > 0, prior, prior.nanmean()).float()


# ----------------------------------------------------------------------------------------------------------------------
# one run


class Run(NamedTuple):
    """The parts of a run that logging and saving need."""

    args: argparse.Namespace
    out: Path
    data: Data
    device: torch.device
    student: torch.nn.Module
    teacher: torch.nn.Module
    optimizer: torch.optim.Optimizer
    prior: torch.Tensor | None
    board: object  # TensorBoard's writer, or None


def main(given):
    """Train from the first step, or from last.pth, to --iters. A stop signal saves a checkpoint before the run ends."""
    with stop_signals() as stop:
        train(given, stop)


def train(given, stop):
    """Train with the options of the command line; `stop` holds the stop signals that came."""
    # --- set-up: arguments, data, networks, checkpoint
    device = start_processes(given.device)
    args = fill_presets(given, device)
    supervised = args.framework == "supervised"
    parts = ("labeled", "val") if supervised else ("labeled", "unlabeled", "val")
    data = open_dataset(args.dataset, args.root, args.labeled, args.splits, parts)
    args = count_steps(args, data, device)
    check_annotations(data, device)
    checkpoint = find_checkpoint(args, data, device)

    torch.manual_seed(args.seed)
    if args.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
    student = build_student(args, len(data.classes), "none" if checkpoint else args.weights, device)
    teacher = copy.deepcopy(student).eval().requires_grad_(False)
    optimizer = build_optimizer(args, student)
    prior = None
    if args.prior:
        prior = checkpoint["prior"] if checkpoint else class_prior(data, args.neighborhood)
        prior = prior.to(device)
    first, best = 0, -math.inf
    if checkpoint:
        first, best = checkpoint["step"], checkpoint["best"]
        restore(checkpoint, args, student, teacher, optimizer)
    board = open_run(args, first, device)
    run = Run(args, Path(args.out), data, device, student, teacher, optimizer, prior, board)
    fast_student, fast_teacher, fast_labels = distribute_and_compile(args, device, student, teacher)
    label_settings = label_options(vars(args), prior)
    averaged = float_tensors(teacher), float_tensors(student)
    loader = training_loader(
        data, range(first, args.iters), args.batch_size, args.crop, args.seed, args.workers,
        unlabeled=lambda step: not supervised and step >= args.warmup_iters,
        truth=lambda step: is_logged(args, step + 1), pin_memory=device.type == "cuda",
    )  # fmt: skip
    losses = torch.zeros(3, device=device)
    logged, logged_at = first, time.monotonic()
    saved_at = logged_at

    # --- the loop: one step of training, Sec. 3.3
    for step, batch in enumerate(loader, first):
        batch = {name: view.to(device, non_blocking=True) for name, view in batch.items()}
        x, y = normalize(batch["x"]), batch["y"]  # (B,3,H,W), (B,H,W)
        unlabeled = "weak" in batch  # not in the warm-up, nor in a supervised run
        if unlabeled:
            weak = normalize(batch["weak"])
            valid = batch["valid"].clone()  # False on padding; cloned because compiled code may read past its end
            views = [weak]
            if args.framework != "cutmixseg":
                views = [strong_views(batch["weak"], args.seed, step, view) for view in range(VIEWS[args.framework])]
                views = [normalize(view) for view in views]
        rng = generator(args.seed, "step", step, rank_and_world()[0])  # for CutMix; the next line seeds dropout
        torch.manual_seed(int(rng.integers(2**63)))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args.iters, group["base"], args.power, args.lr_warmup)

        with torch.autocast(device.type, torch.bfloat16, enabled=args.amp):
            if unlabeled:
                with torch.no_grad():
                    prob = fast_teacher(weak).softmax(1)  # (B,C,H,W)
                alpha = dpa_alpha(step, args.iters, args.alpha0)  # Eq. 6
                pseudo = fast_labels(prob, alpha, valid=valid, **label_settings)  # Eqs. 4-10
                mixed = [cutmix(rng, args.cutmix, view, pseudo.label, valid) for view in views]
                strong, target, mixed_valid = (torch.cat(parts) for parts in zip(*mixed))  # of V views: (VB,...)
                drop = None
                if args.framework == "unimatch":
                    drop = complementary_dropout(len(x), len(weak), student.deep_channels, device)
                logits = fast_student(torch.cat([x, strong]), drop)
                logits_x, logits_u = logits.split([len(x), len(strong)])
            else:
                logits_x = fast_student(x)
        if args.sup_loss == "ohem":
            y = ohem(logits_x, y)
        loss = loss_x = cross_entropy(logits_x, y, count(y != IGNORE))  # Eq. 2
        loss_u = torch.zeros_like(loss_x)
        if unlabeled:
            kept, all_valid = count(target != IGNORE), count(mixed_valid)
            divisors = {"kept": kept, "valid": all_valid, "authors": kept * (kept / all_valid.clamp(min=1))}
            loss_u = cross_entropy(logits_u, target, divisors[args.unsup_norm])  # Eq. 3
            loss = loss_x + args.lambda_u * loss_u  # Eq. 1
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if device.type == "cpu":  # on GPUs SyncBatchNorm does it
            average_statistics(student)
        update_teacher(*averaged, ema_decay(max(0, step - args.warmup_iters), args.ema))  # Sec. 4.1
        losses += torch.stack([loss, loss_x, loss_u]).detach()

        # --- log, evaluate, save
        done = step + 1
        if not (is_logged(args, done) or (stop and args.processes == 1)):
            continue
        record = train_record(run, done, done - logged, losses, time.monotonic() - logged_at)
        if unlabeled:
            counts = label_counts(prob, pseudo, batch["truth"], valid, label_settings)
            record |= {"alpha": alpha, "threshold": pseudo.threshold.item()} | label_figures(all_reduce(counts))
        write_record(run, record)
        say(progress(record, args))
        improved, evaluating = False, is_evaluated(args, done)
        if evaluating:
            scores = evaluate_and_log(run, record, best)
            improved, best = scores["miou"] > best, max(best, scores["miou"])
        stopping = torch.tensor(max(stop, default=0), device=device)
        stopping = all_reduce(stopping, dist.ReduceOp.MAX).item()  # that of any process
        if evaluating or stopping or time.monotonic() - saved_at > 60 * args.save_every:
            save(run, done, best, improved)  # after evaluating: else a resumed run would skip it
            saved_at = time.monotonic()
        if stopping and done < args.iters:
            end_early(run, stopping, done)
        if evaluating:
            write_panel(run, done)
        logged, logged_at = done, time.monotonic()
        losses.zero_()

    # --- the end
    last = run.out / "last.pth"
    say(table(scores) if first < args.iters else f"nothing to do: {last} is at step {first} of {args.iters}")
    say(f"score it again with: python evaluate.py {shlex.quote(str(last))}")


def is_evaluated(args, done):
    """Return whether the run evaluates after `done` steps."""
    return done == args.iters or done % args.eval_steps == 0


def is_logged(args, done):
    """Return whether the run logs a line after `done` steps."""
    return is_evaluated(args, done) or done % args.log_every == 0


# ----------------------------------------------------------------------------------------------------------------------
# set-up


def method_name(args):
    """Return the framework, with s4mc- before it if the pseudo-labels are the paper's."""
    return f"s4mc-{args.framework}" if args.s4mc and args.framework != "supervised" else args.framework


def fill_presets(given, device):
    """Return the arguments, in which every option that was left out takes the preset of the dataset."""
    preset = dict(PRESETS[given.dataset])
    on_cpu, on_cuda = preset.pop("cpu", {}), preset.pop("cuda", {})
    preset |= on_cuda if device.type == "cuda" else on_cpu
    if given.backbone and given.backbone.startswith("dinov2"):
        preset |= DINOV2
    if given.confidence == "entropy":
        preset["floor"] = 0.0  # entropy is never above 0
    preset |= S4MC if given.s4mc else WITHOUT_S4MC
    framework = given.framework or preset["framework"]
    if framework == "cutmixseg" and not given.s4mc:
        preset["threshold"] = 0.97  # French et al., 2020
    for names in (("epochs", "iters"), ("warmup_epochs", "warmup_iters", "warmup_share")):
        if any(getattr(given, name) is not None for name in names):
            preset = {name: value for name, value in preset.items() if name not in names}
    args = argparse.Namespace(**vars(given))
    for name, value in preset.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.amp is None:  # older GPUs only emulate bfloat16, slowly
        args.amp = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    if args.out is None:
        args.out = f"runs/{args.dataset}-{Path(args.labeled).stem}-{method_name(args)}-{args.seed}"
    return args


def count_steps(given, data, device):
    """Return the arguments with steps_per_epoch, iters, warmup_iters, eval_steps and processes.

    An epoch is a pass over the unlabeled images, in a supervised run over the labeled ones. Raises InputError for a
    batch of one labeled image, and for a warm-up as long as the run.
    """
    args = argparse.Namespace(**vars(given))
    supervised = args.framework == "supervised"
    args.processes = rank_and_world()[1]
    images = data.labeled if supervised else data.unlabeled
    args.steps_per_epoch = math.ceil(len(images) / (args.batch_size * args.processes))
    if args.iters is None:
        args.iters = args.epochs * args.steps_per_epoch
        if supervised:
            args.iters = max(args.iters, MIN_SUPERVISED_STEPS)
    if args.warmup_iters is None and args.warmup_epochs is not None:
        args.warmup_iters = args.warmup_epochs * args.steps_per_epoch
    elif args.warmup_iters is None:
        args.warmup_iters = round(args.warmup_share * args.iters)
    args.eval_steps = args.eval_every * args.steps_per_epoch if args.eval_every else math.ceil(args.iters / 10)
    is_alone = args.processes == 1 or device.type == "cpu"  # GPUs share BatchNorm's statistics
    if args.batch_size == 1 and is_alone and (supervised or args.warmup_iters):
        raise InputError("--batch-size 1 leaves BatchNorm a single value in a batch of labeled images; use 2 or more")
    if not supervised and args.warmup_iters >= args.iters:
        raise InputError(
            f"the warm-up of {args.warmup_iters} steps leaves no step of {args.iters} for unlabeled images; "
            "lower --warmup-iters"
        )
    return args


def check_annotations(data, device):
    """Read every labeled and validation image with its mask before the first step. Each process reads a part.

    Raises InputError for a broken file, for fewer than two labeled classes, and if no validation pixel has a label.
    Warns of classes without a labeled pixel.
    """
    say(f"{data.name}: {len(data.labeled)} labeled, {len(data.unlabeled)} unlabeled, {len(data.val)} validation images")
    pixels = torch.stack([class_pixels(data, data.labeled), class_pixels(data, data.val)])
    labeled, val = all_reduce(pixels.to(device)).cpu()[:, : len(data.classes)] > 0
    if labeled.sum() < 2:
        tool = "own_images.py" if data.name == "folder" else f"prepare.py check --dataset {data.name}"
        raise InputError(
            f"the labeled images show {labeled.sum()} of {len(data.classes)} classes; expected two or more; `python "
            f"tools/{tool}` says what the masks hold"
        )
    if not val.any():
        raise InputError(f"the validation masks of {data.name} are all {IGNORE}; expected class indices to score")
    absent = [name for name, there in zip(data.classes, labeled) if not there]
    if absent:
        say(f"warning: no labeled pixel is {', '.join(absent)}; that cannot be learned", sys.stderr)


def find_checkpoint(args, data, device):
    """Return the last checkpoint of --out if --resume was given and there is one, else None.

    Raises InputError if it belongs to another run. The same run has the same images and ids, the same number of images
    a step, and the same arguments except FREE_AT_RESUME. An argument that the checkpoint lacks counts as its default.
    """
    last = Path(args.out) / "last.pth"
    if not (args.resume and last.exists()):
        return None
    checkpoint = load_checkpoint(last)
    saved, now = checkpoint["args"], vars(args)
    words = ["--dataset", args.dataset, "--framework", args.framework, "--backbone", args.backbone]
    if not args.s4mc:
        words.append("--no-s4mc")
    defaults = vars(fill_presets(parse_args(words), device))
    changes = []
    for name in sorted(now.keys() - FREE_AT_RESUME):
        before = saved.get(name, defaults.get(name))
        if now[name] != before:
            changes.append(f"{name} was {before} and is {now[name]}")
    images_before, images_now = (one["batch_size"] * one["processes"] for one in (saved, now))
    if images_before != images_now:
        changes.append(f"batch size x processes was {images_before} and is {images_now}")
    for part in ("labeled", "unlabeled", "val"):
        is_used = part != "unlabeled" or args.framework != "supervised"
        if is_used and checkpoint[part] != [item.id for item in getattr(data, part)]:
            changes.append(f"the {part} images are different")
    if checkpoint["classes"] != list(data.classes):
        changes.append("the classes are different")
    if changes:
        raise InputError(f"--resume: {args.out} is another run, {', '.join(changes)}; use another --out")
    return checkpoint


def build_student(args, classes, weights, device):
    """Return DeepLabv3+ in training mode on the device."""
    student = DeepLabV3Plus(args.backbone, classes, args.output_stride, weights)
    student = student.to(device, memory_format=torch.channels_last).train()
    if args.processes > 1 and device.type == "cuda":
        student = torch.nn.SyncBatchNorm.convert_sync_batchnorm(student)
    return student


def build_optimizer(args, student):
    """Return SGD or AdamW with a learning rate for the encoder and one for everything else."""
    head = [parameter for name, parameter in student.named_parameters() if not name.startswith("backbone.")]
    groups = [
        {"params": list(student.backbone.parameters()), "base": args.lr},
        {"params": head, "base": args.head_lr},
    ]
    settings = {"lr": args.lr, "weight_decay": args.weight_decay, "fused": head[0].is_cuda}
    if args.optimizer == "sgd":
        return torch.optim.SGD(groups, momentum=0.9, **settings)
    return torch.optim.AdamW(groups, **settings)


def restore(checkpoint, args, student, teacher, optimizer):
    """Load networks and optimizer from a checkpoint. The learning rates and the device may have changed."""
    student.load_state_dict(checkpoint["student"])
    teacher.load_state_dict(checkpoint["teacher"])
    state = checkpoint["optimizer"]
    for group, base in zip(state["param_groups"], (args.lr, args.head_lr)):
        group["base"] = base
        group["fused"] = optimizer.defaults["fused"]
    optimizer.load_state_dict(state)


def distribute_and_compile(args, device, student, teacher):
    """Return student, teacher and `pseudo_labels` as the step calls them: with DDP and torch.compile if asked for."""
    labels = refine.pseudo_labels
    if args.processes > 1:
        student = DistributedDataParallel(student, broadcast_buffers=False, gradient_as_bucket_view=True)
    if args.compile:
        teacher = torch.compile(teacher, dynamic=False)
        refine.dpa_threshold = torch.compiler.disable(refine.dpa_threshold)  # else every new alpha would compile again
        labels = torch.compile(labels, dynamic=False)
        if args.processes == 1 or device.type == "cpu":  # SyncBatchNorm breaks the graph at every layer
            student = torch.compile(student, dynamic=False)
    return student, teacher, labels


# ----------------------------------------------------------------------------------------------------------------------
# the folder of a run; only the first process writes


def say(line, file=None):
    """Print a line at once, in the first process."""
    if rank_and_world()[0] == 0:
        print(line, file=file or sys.stdout, flush=True)


def open_run(args, first, device):
    """Make --out with args.json and metrics.jsonl, say what the run is, and return TensorBoard's writer or None."""
    if rank_and_world()[0] != 0:
        return None
    if args.tensorboard:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise InputError("--tensorboard needs a package that is not installed; pip install tensorboard") from error
    out = Path(args.out)
    git = "git describe --always --dirty"
    commit = subprocess.run(git, shell=True, cwd=Path(__file__).parent, capture_output=True, text=True).stdout.strip()
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    about = {
        "commit": commit or None, "python": platform.python_version(), "torch": torch.__version__,
        "torchvision": torchvision.__version__, "hardware": f"{args.processes} x {name}",
    }  # fmt: skip
    try:
        (out / "panels").mkdir(parents=True, exist_ok=True)
        with open(out / "args.json", "w" if args.resume else "x") as file:
            print(json.dumps(vars(args) | about, indent=2), file=file)
        records = [record for record in read_records(out / "metrics.jsonl") if record["step"] <= first]
        records.append({"event": "start", "step": first} | about)
        part = out / "metrics.jsonl.tmp"
        part.write_text("".join(json.dumps(record) + "\n" for record in records))
        os.replace(part, out / "metrics.jsonl")
    except FileExistsError as error:
        raise InputError(f"{out} already holds a run; continue it with --resume, or choose another --out") from error
    except OSError as error:
        raise cannot_write(out, error) from error
    images = f"{args.batch_size} labeled"
    if args.framework != "supervised":
        images += f" + {args.batch_size} unlabeled images, the first {args.warmup_iters} with labeled images only"
    say(f"{method_name(args)}, {args.backbone} on {args.processes} x {name}; {args.iters} steps of {images}")
    say(f"{f'continues after step {first}' if first else 'starts'}, writes to {out}")
    return SummaryWriter(out / "tensorboard", purge_step=first + 1) if args.tensorboard else None


def train_record(run, done, steps, losses, seconds):
    """Return the record of the last `steps` steps. Raises InputError if their loss is not finite."""
    args = run.args
    mean = (all_reduce(losses) / (args.processes * steps)).tolist()
    if not math.isfinite(mean[0]):
        raise not_finite(run, f"the loss is {mean[0]} between the steps {done - steps + 1} and {done}")
    record = {"event": "train", "step": done, "epoch": done / args.steps_per_epoch}
    record |= {"lr": run.optimizer.param_groups[0]["lr"], "loss": mean[0], "loss_x": mean[1], "loss_u": mean[2]}
    images = args.batch_size * args.processes * steps
    if args.framework != "supervised" and done > args.warmup_iters:
        images *= 2
    record |= {"seconds_per_step": seconds / steps, "images_per_second": images / seconds}
    if run.device.type == "cuda":
        record["peak_memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
    return record


def not_finite(run, found):
    """Return the InputError for a loss or weights that are not finite."""
    return InputError(f"{found}; {run.out} keeps its checkpoints; lower --lr and --head-lr, then use --resume")


def write_record(run, record):
    """Append a line to metrics.jsonl, and its numbers to TensorBoard."""
    if rank_and_world()[0] != 0:
        return
    try:
        with open(run.out / "metrics.jsonl", "a") as file:
            file.write(json.dumps(record) + "\n")
    except OSError as error:
        raise cannot_write(run.out / "metrics.jsonl", error) from error
    if run.board:
        for name, value in record.items():
            if isinstance(value, (int, float)):
                run.board.add_scalar(f"{record['event']}/{name}", value, record["step"])
        run.board.flush()


def progress(record, args):
    """Return the log line of one record."""
    minutes, seconds = divmod(round(record["seconds_per_step"] * (args.iters - record["step"])), 60)
    line = f"step {record['step']}/{args.iters}  {minutes}m{seconds:02d}s left  loss {record['loss']:.3f}"
    if "kept" in record:
        line += f" = {record['loss_x']:.3f} + {args.lambda_u:g} x {record['loss_u']:.3f}  alpha {record['alpha']:.2f}"
        line += f"  threshold {record['threshold']:.3f}  kept {record['kept']:.1%} (raw {record['kept_raw']:.1%})"
        if "correct" in record:
            line += f"  correct {record['correct']:.1%} (raw {record['correct_raw']:.1%})"
    return f"{line}  {record['images_per_second']:.1f} images/s"


def evaluate_and_log(run, record, best):
    """Evaluate the teacher on the validation images, log the scores and return them."""
    args, step = run.args, record["step"]
    protocol = Protocol(args.eval_mode, args.crop)
    scores = evaluate(run.teacher, run.data, run.data.val, run.device, protocol, args.workers)
    write_record(run, {"event": "val", "step": step, "epoch": record["epoch"]} | scores)
    say(f"step {step}/{args.iters}  teacher's mIoU {scores['miou']:.2f}, best {max(best, scores['miou']):.2f}")
    return scores


def save(run, done, best, improved):
    """Write last.pth, and before it best.pth if the scores improved. Raises InputError if weights are not finite."""
    if rank_and_world()[0] != 0:
        return
    if not all(parameter.isfinite().all() for parameter in run.student.parameters()):
        raise not_finite(run, f"weights are not finite after step {done}")
    state = {
        "step": done, "best": best, "args": vars(run.args), "classes": list(run.data.classes), "prior": run.prior,
        "labeled": [item.id for item in run.data.labeled], "unlabeled": [item.id for item in run.data.unlabeled],
        "val": [item.id for item in run.data.val], "student": run.student.state_dict(),
        "teacher": run.teacher.state_dict(), "optimizer": run.optimizer.state_dict(),
    }  # fmt: skip
    if improved:
        save_checkpoint(state, run.out / "best.pth")
    save_checkpoint(state, run.out / "last.pth")


def write_panel(run, step):
    """Write a figure of the teacher's labels. If that fails, say so and go on."""
    if rank_and_world()[0] != 0:
        return
    try:
        picture = panel(run.teacher, run.data, panel_items(run.data), run.device, vars(run.args), run.prior)
        VF.to_pil_image(picture).save(run.out / "panels" / f"step-{step:06d}.png")
    except (InputError, OSError) as error:
        say(f"warning: no panel of step {step} ({error})", sys.stderr)


# ----------------------------------------------------------------------------------------------------------------------
# stop signals


@contextlib.contextmanager
def stop_signals():
    """Yield a list that collects the stop signals. In a run of one process a second signal ends it at once."""
    received, before, process = [], {}, os.getpid()

    def restore_handlers():
        for number, handler in before.items():
            signal.signal(number, handler)

    def receive(number, _):
        if os.getpid() != process:  # a loader worker that has just been forked
            return
        received.append(number)
        rank, world = rank_and_world()
        said = "saving at the next log line"
        if world == 1:  # torchrun sends each signal again, and ends all processes after 30 seconds
            said = "saving after this step; a second signal ends at once"
            restore_handlers()
        if rank == 0:
            os.write(2, f"{signal.Signals(number).name}: {said}\n".encode())  # print may be interrupted by a signal

    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            if signal.getsignal(number) != signal.SIG_IGN:  # as under nohup
                before[number] = signal.signal(number, receive)
    else:
        print("warning: outside the main thread a stop signal does not save a checkpoint", file=sys.stderr)
    try:
        yield received
    finally:
        restore_handlers()


def end_early(run, stopping, done):
    """End the run after a stop signal, in all processes at once."""
    name = signal.Signals(stopping).name
    say(f"{name}: saved step {done} to {run.out / 'last.pth'}; continue with --resume", sys.stderr)
    if dist.is_initialized():
        dist.barrier()  # torchrun ends all processes as soon as one has ended
    sys.exit(128 + stopping)


# ----------------------------------------------------------------------------------------------------------------------
# arguments


def parse_args(argv=None):
    """Return the command line. Options left at None take the dataset's preset."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="[preset]: the value of the dataset's preset, which an option given here replaces.\n\n" + preset_table(),
    )  # fmt: skip
    switch, natural, positive = argparse.BooleanOptionalAction, number(int, 1), number(float, 0, above=True)
    share = number(float, 0, 1)

    add = parser.add_argument_group("data").add_argument
    add("--dataset", choices=DATASETS, default="shapes", help="default: shapes, which are generated")
    add("--root", default="data", help="the dataset's own folder, or (except for folder) the one above; default: data")
    add("--labeled", help="number of labeled images, a file of their ids, or all [preset]")
    add("--splits", help="folder of published lists, <dataset>/<N>.txt; default: splits/ beside this file")
    add("--crop", type=number(int, 32), help="side of the square training views, pixels [preset]")
    add("--workers", type=number(int, 0), help="loader workers of each process [preset]")

    add = parser.add_argument_group("method").add_argument
    add("--framework", choices=VIEWS, help="cutmixseg: CutMix only; fixmatch: colors, blur and CutMix; unimatch: two "
        "such views and feature dropout; supervised: labeled images only [preset]")
    add("--s4mc", action=switch, default=True, help="the paper's pseudo-labels, on by default. --no-s4mc means the "
        "framework's own: --no-refinement --confidence max --threshold 0.95 (cutmixseg 0.97) --unsup-norm valid")
    add("--refinement", action=switch, help="refine with the best neighbor, Eqs. 7-10 [paper]")
    add("--neighborhood", type=lambda text: text if text == "cross" else int(text), default=3,
        choices=(3, 5, 7, "cross"), help="N x N, default 3 [paper]; cross: the four beside the pixel [authors' code]")
    add("--dilation", type=natural, default=1, help="distance of neighbors, pixels; default 1 [paper]")
    add("--neighbors", type=natural, default=1, help="how many neighbors are united, Table 4a, default 1 [paper]")
    add("--select", choices=("max", "min", "random"), default="max",
        help="which neighbor, Table 4a; default max [paper]")
    add("--distance-weight", action=switch, default=True, help="beta of Eq. 10, on by default [paper]; off: 1")
    add("--prior", action=switch, default=False, help="Eqs. 15-16, estimated from the labeled images [paper]")
    add("--confidence", choices=("margin", "max", "entropy"), help="kappa, Table 5; default: margin [paper]")
    add("--alpha0", type=share, default=0.4, help="share of pixels below the threshold at first, Eq. 6; 0.4 [paper]")
    add("--threshold", type=float, help="fixed, in place of DPA's; default: DPA [paper]")
    add("--floor", type=float, help="DPA's threshold is never below it; 0 means no floor, as in the paper [preset]")
    add("--lambda-u", type=number(float, 0), default=1.0, help="weight of the unlabeled loss, Eq. 1, default 1 [ours]")
    add("--unsup-norm", choices=("kept", "valid", "authors"), help="divide the unlabeled loss by: kept (pixels kept, "
        "Eq. 3), valid (all pixels, as FixMatch), authors (kept^2 / valid) [preset]")
    add("--ema", type=share, default=0.99, help="decay tau of the EMA teacher, Sec. 4.1, default 0.99 [paper]")
    add("--cutmix", type=share, default=0.5, help="probability of CutMix for each image, default 0.5 [paper]")
    add("--warmup-epochs", type=number(int, 0), help="epochs with labeled images only [preset]")
    add("--warmup-iters", type=number(int, 0), help="the same in steps [preset: a share of the run]")

    add = parser.add_argument_group("model").add_argument
    add("--backbone", choices=ENCODERS, help="torchvision's encoder, or DINOv2; resnet10 is for CPUs [preset]")
    add("--weights", help="pretrained, none, or a file with torchvision's or DINOv2's state dict [preset]")
    add("--output-stride", type=int, choices=(16, 8), help="default 16; 8, as in the authors' code, takes more memory")

    add = parser.add_argument_group("optimizer").add_argument
    add("--epochs", type=natural, help="passes over the unlabeled images (supervised: over the labeled ones) [preset]")
    add("--iters", type=natural, help="steps, in place of --epochs [preset]")
    add("--batch-size", type=natural, help="N labeled and N unlabeled images for each process [preset]")
    add("--optimizer", choices=("sgd", "adamw"), help="SGD with momentum 0.9, or AdamW [preset]")
    add("--lr", type=positive, help="learning rate of the encoder [preset]")
    add("--head-lr", type=positive, help="learning rate of everything else [preset]")
    add("--lr-warmup", type=share, help="share of the run in which the learning rates rise from 0 [preset]")
    add("--weight-decay", type=number(float, 0), help="of all parameters [preset]")
    add("--sup-loss", choices=("ce", "ohem"), help="loss of the labeled images; ohem: only hard pixels [preset]")
    add("--power", type=number(float, 0), default=0.9, help="exponent of the rates' decay, default 0.9 [paper]")

    add = parser.add_argument_group("run").add_argument
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: the GPU if there is one")
    add("--amp", action=switch, help="bfloat16 autocast; default: on, if the GPU computes in bfloat16")
    add("--compile", action=switch, default=False, help="torch.compile teacher, pseudo-labels and, on one GPU, student")
    add("--deterministic", action=switch, default=False, help="ask for deterministic CUDA kernels")
    add("--seed", type=number(int, 0), default=0, help="random seed, default 0")
    add("--eval-every", type=natural, help="epochs between evaluations; default: a tenth of the run")
    add("--eval-mode", choices=EVAL_MODES, help="original size, sliding windows or a center crop of --crop [preset]")
    add("--log-every", type=natural, default=20, help="steps between log lines, default 20")
    add("--save-every", type=number(float, 0), default=10.0, help="minutes between checkpoints, default 10")
    add("--tensorboard", action=switch, default=False, help="write the log for TensorBoard too")
    add("--out", help="folder of the run; default: runs/<dataset>-<labeled>-<method>-<seed>")
    add("--resume", action="store_true", help="continue the run in --out; start it if there is no checkpoint yet")
    args = parser.parse_args(argv)
    if (args.epochs and args.iters) or None not in (args.warmup_epochs, args.warmup_iters):
        parser.error("a length is given twice; expected --epochs or --iters, and --warmup-epochs or --warmup-iters")
    if args.prior and args.dilation > 1:
        parser.error("--prior is counted over adjacent pixels; expected --dilation 1 with it")
    if args.output_stride and (args.backbone or "").startswith("dinov2"):
        parser.error(f"--output-stride has no meaning for {args.backbone}, whose patches have 14 pixels; leave it out")
    args.output_stride = args.output_stride or 16
    args.warmup_share = None
    return args


def preset_table():
    """Return PRESETS as a table, a row for each option."""
    columns = {}
    for name, preset in PRESETS.items():
        shared = {option: value for option, value in preset.items() if option not in ("cpu", "cuda")}
        if "cpu" in preset:
            columns[f"{name}/CPU"] = shared | preset["cpu"]
            columns[f"{name}/GPU"] = shared | preset["cuda"]
        else:
            columns[name] = shared
    options = dict.fromkeys(option for column in columns.values() for option in column)
    lines = [f"{'':14}" + "".join(f"{name:>13}" for name in columns)]
    for option in options:
        lines.append(f"{option:14}" + "".join(f"{str(column.get(option, '')):>13}" for column in columns.values()))
    lines.append("dinov2_...: " + ", ".join(f"{option} {value}" for option, value in DINOV2.items()) + " [UniMatch V2]")
    return "\n".join(lines)


if __name__ == "__main__":
    run_script(lambda: main(parse_args()))
