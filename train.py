"""One training run of S4MC: a few labeled images, many unlabeled ones, DeepLabv3+ and its moving-average teacher.

    python train.py                                                           # drawn shapes, CPU, a few minutes
    python train.py --dataset camvid --root data --labeled 46                 # real photographs
    torchrun --nproc_per_node=8 train.py --dataset pascal --labeled 92        # one process per GPU, the paper's protocol

Writes --out: args.json, metrics.jsonl, last.pth, best.pth, panels/. `evaluate.py last.pth` reads them.
"""

import argparse
import json
import math
import os
import platform
import signal
import subprocess
import sys
import time
from collections import deque
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint as recomputed
from torchvision.transforms.v2.functional import pil_to_tensor

from data import (
    DATASETS,
    IGNORE,
    InputError,
    batches,
    cutmix,
    drawn,
    draws,
    generator,
    normalize,
    open_dataset,
    palette,
    read,
    read_image,
    say,
    strong_views,
    time_left,
    training_loader,
)
from evaluate import (
    EVAL_MODES,
    PREPROCESSING,
    Protocol,
    evaluate,
    load_checkpoint,
    number,
    panel,
    panel_items,
    pseudo_label_figures,
    refinement_options,
    start_processes,
    stop_on_input_error,
    table,
)
from model import BACKBONES, DeepLabV3Plus, average_batchnorm, ema_teacher
from refine import dpa_alpha, neighbor_agreement, pseudo_labels, use_compiler

# What --dataset means for every option left out: (dataset, on which device, whose numbers, the numbers).
ANY = ("cpu", "cuda")
PRESETS = (
    ("shapes", ANY, "ours", dict(
        labeled="24", crop=64, backbone="resnet10", weights="none", iters=600, batch_size=4, lr=0.02, head_lr=0.02,
        weight_decay=5e-4, warmup_epochs=2, eval_every=3, workers=1, log_every=20, eval_mode="original", sup_loss="ce",
    )),
    ("camvid", ANY, "ours", dict(
        labeled="46", weight_decay=1e-4, warmup_epochs=1, log_every=10, eval_mode="original", sup_loss="ce",
    )),
    ("camvid", ("cpu",), "ours", dict(
        crop=128, backbone="resnet18", weights="none", iters=600, batch_size=4, lr=0.02, head_lr=0.02, eval_every=4, workers=1,
    )),
    ("camvid", ("cuda",), "ours", dict(
        crop=352, backbone="resnet50", weights="imagenet", epochs=80, batch_size=8, lr=0.005, head_lr=0.05, eval_every=5, workers=8,
    )),
    ("folder", ANY, "ours", dict(labeled="all", weight_decay=1e-4, log_every=20, eval_mode="original", sup_loss="ce")),
    ("folder", ("cpu",), "ours", dict(
        backbone="resnet18", weights="none", batch_size=4, lr=0.02, head_lr=0.02, workers=1,
    )),
    ("folder", ("cuda",), "ours", dict(
        backbone="resnet50", weights="imagenet", batch_size=8, lr=0.005, head_lr=0.05, workers=8,
    )),
    ("pascal", ANY, "paper", dict(  # Appendix D; 1/4 is the partition of Sec. 4.3
        labeled="366", crop=513, backbone="resnet101", weights="imagenet", epochs=80, batch_size=3, lr=0.001, head_lr=0.01,
        weight_decay=1e-4, sup_loss="ce",
    )),
    ("pascal", ANY, "authors' code", dict(warmup_epochs=1, eval_every=1)),
    ("pascal", ANY, "ours", dict(workers=4, log_every=50, eval_mode="original")),
    ("cityscapes", ANY, "paper", dict(  # Appendix D
        labeled="744", crop=769, backbone="resnet101", weights="imagenet", epochs=80, batch_size=2, lr=0.01, head_lr=0.01,
        weight_decay=5e-4,
    )),
    ("cityscapes", ANY, "authors' code", dict(warmup_epochs=1)),
    ("cityscapes", ANY, "common practice", dict(eval_mode="sliding", sup_loss="ohem")),
    ("cityscapes", ANY, "ours", dict(workers=4, log_every=20, eval_every=5)),
)  # fmt: skip
FROM_IMAGES = ("crop", "iters", "warmup_epochs", "eval_every")  # of a folder; see `suit_folder`

# ----------------------------------------------------------------------------------------------------------------------
# schedules and losses


def learning_rate(step, total_steps, base, power=0.9):
    """Appendix D: lr_base * (1 - iter / total_iter) ** power."""
    return base * (1 - step / total_steps) ** power


def full_size(logits, label):
    """One image's logits (C,h,w) -> (1,C,H,W) float32, interpolated to its label (H,W)."""
    return F.interpolate(logits[None].float(), label.shape, mode="bilinear")


def summed_loss(logits, label):
    """The sum of one image's cross-entropy over its labeled pixels; logits (C,h,w), label (H,W)."""
    return F.cross_entropy(full_size(logits, label), label[None].long(), ignore_index=IGNORE, reduction="sum")


def cross_entropy(logits, label):
    """Eqs. 2-3: the sum over all labeled pixels divided by their number M, both counted over all processes.

    logits (B,C,h,w) on any grid, label (B,H,W) with 255 = not labeled; 0 where no pixel is labeled. The value is this
    process's part times the number of processes, because DistributedDataParallel averages: N processes equal one with the
    whole batch. Logits of full size exist for one image at a time, and again in the backward pass.
    """
    # Paper: M counts pixels of the batch. Authors' code: a mean per GPU. Here: M of the batch of all processes.
    count = (label != IGNORE).sum()
    world = 1
    if dist.is_initialized():
        dist.all_reduce(count)
        world = dist.get_world_size()
    once_more = {"use_reentrant": False, "preserve_rng_state": False}
    total = sum(recomputed(summed_loss, *image, **once_more) for image in zip(logits, label))
    return total * world / count.clamp(min=1)


@torch.no_grad()
def hard_pixels(logits, label, sure=0.7, per_image=50_000):
    """Online hard example mining (Shrivastava et al., 2016): the label with 255 where the network is right and sure already.

    logits (B,C,h,w), label (B,H,W). A pixel stays where its own class has probability `sure` or less, and so do the hardest
    B * per_image pixels of this process. Both numbers are common practice on Cityscapes, there 100,000 for two images.
    """
    own = [
        full_size(*image).softmax(1).gather(1, image[1].clamp(max=logits.shape[1] - 1).long()[None, None])[0]
        for image in zip(logits, label)
    ]
    prob = torch.cat(own).masked_fill(label == IGNORE, torch.inf)
    hardest = prob.flatten().kthvalue(min(per_image * len(label), prob.numel())).values
    return label.masked_fill(prob > hardest.clamp(min=sure), IGNORE)


def supervised_loss(logits, label, kind):
    """Eq. 2 over all labeled pixels ("ce"), or over the hard ones ("ohem")."""
    return cross_entropy(logits, hard_pixels(logits, label) if kind == "ohem" else label)


# ----------------------------------------------------------------------------------------------------------------------
# the step


def training_losses(student, teacher, batch, step, args, options, rng):
    """Eqs. 1-3 for one batch, Sec. 3.3 in its own order: (loss, what the log needs).

    student, teacher: (B,3,H,W) -> logits (B,C,H,W); batch: see data.TrainingViews; options: of `pseudo_labels`; rng: a
    NumPy generator for CutMix. batch["strong"], for "fixmatch", is like batch["weak"]; batch["truth"] is not touched.
    The log holds "losses", Eqs. 1, 2 and 3 detached, and where there are pseudo-labels "prob", the teacher's (B,C,H,W),
    and "pseudo".
    """
    x, y = normalize(batch["x"]), batch["y"]
    if args.framework == "supervised" or step < args.warmup_steps:
        loss_x = supervised_loss(student(x, upsample=False), y, args.sup_loss)
        return loss_x, {"losses": torch.stack([loss_x, loss_x, torch.zeros_like(loss_x)]).detach()}
    weak = normalize(batch["weak"])
    strong = normalize(batch["strong"]) if args.framework == "fixmatch" else weak

    with torch.no_grad():
        prob = teacher(weak).float().softmax(1)
    pseudo = pseudo_labels(prob, dpa_alpha(step, args.iters, args.alpha0), valid=batch["valid"], **options)
    strong, target = cutmix(strong, pseudo.label, rng, args.cutmix)

    logits_x, logits_u = student(torch.cat([x, strong]), upsample=False).split([len(x), len(strong)])
    loss_x, loss_u = supervised_loss(logits_x, y, args.sup_loss), cross_entropy(logits_u, target)
    loss = loss_x + args.lambda_u * loss_u
    return loss, {"losses": torch.stack([loss, loss_x, loss_u]).detach(), "prob": prob, "pseudo": pseudo}


# ----------------------------------------------------------------------------------------------------------------------
# one run


def environment():
    """Versions, commit and launch, for args.json."""
    try:
        git = subprocess.run(["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True)
        commit = git.stdout.strip() or None
    except OSError:  # git is not installed
        commit = None
    versions = {"python": platform.python_version(), "torch": torch.__version__, "torchvision": torchvision.__version__}
    return versions | {"commit": commit, "launch": launch()}


def launch():
    """torchrun's own name for this launch, None without it; on one machine with its process, for the name may be "none"."""
    name = os.environ.get("TORCHELASTIC_RUN_ID")
    return f"{name} {os.getppid()}" if os.environ.get("GROUP_WORLD_SIZE") == "1" else name


def write_aside(path, text):
    """Writes a file under another name and renames it, so that no moment leaves half of it."""
    aside = path.with_name(f"{path.name}.tmp")
    aside.write_text(text)
    os.replace(aside, path)


def summary_writer():
    """TensorBoard's class. Raises InputError where the package is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise InputError("--tensorboard needs a package that is not installed; pip install tensorboard") from error
    return SummaryWriter


def show_on_board(board, record):
    """The numbers of a line of metrics.jsonl, and the histograms of Fig. 6."""
    for name, value in record.items():
        if isinstance(value, (int, float)) and name != "step":
            board.add_scalar(f"{record['event']}/{name}", value, record["step"])
        elif name.startswith("histogram"):
            middles = (np.arange(20) + 0.5) / 20
            board.add_histogram(
                name, np.repeat(middles, np.round(10_000 * np.array(value)).astype(int)), record["step"], bins=20
            )
    board.flush()


def class_prior(data, neighborhood):
    """Eq. 15 over the labeled images of the run, (C,): each image's `neighbor_agreement`, weighted by its pixels."""
    agreement, pixels = torch.zeros(2, len(data.classes), dtype=torch.double)
    for item in data.labeled:
        mask = pil_to_tensor(read(item, data)[1])  # (1,H,W)
        seen = torch.bincount(mask[mask != IGNORE].long(), minlength=len(data.classes))
        agreement += seen * neighbor_agreement(mask, len(data.classes), neighborhood)
        pixels += seen
    return (agreement / pixels.clamp(min=1)).float()


def progress(record, args, seconds_left):
    """The log line of one record."""
    parts = [f"step {record['step']:>{len(str(args.iters))}}/{args.iters}", f"{time_left(seconds_left)} left"]
    parts.append(f"loss {record['loss']:.3f}")
    if "kept" in record:
        parts[-1] += f" = {record['loss_x']:.3f} + {args.lambda_u:g} x {record['loss_u']:.3f}"
        parts.append(f"alpha {record['alpha']:.2f}  threshold {record['threshold']:.3f}")
        parts.append(f"kept {record['kept']:.1%} (raw {record['kept_raw']:.1%})")
        if "correct" in record:
            parts.append(f"correct {record['correct']:.1%} (raw {record['correct_raw']:.1%})")
    parts.append(f"{record['images_per_second']:.1f} images/s")
    return "  ".join(parts)


class Run:
    """What one run holds: arguments, data, process, networks, optimizer; and its checkpoints."""

    def __init__(self, args):
        if args.tensorboard:
            summary_writer()  # every process says so at once where it is missing
        self.rank, self.world, self.device = start_processes(args.device)
        fill_presets(args, self.device)
        self.args, self.out = args, Path(args.out)
        args.resume = args.resume or self.restarted()
        use = ("labeled", "val") if args.framework == "supervised" else ("labeled", "unlabeled", "val")
        self.data = open_dataset(args.dataset, args.root, args.labeled, args.splits, use)
        if args.dataset == "folder":
            self.data = suit_folder(args, self.data, self.device, self.world)
        resolve_lengths(args, self.data, self.device, self.world)
        checkpoint = self.find_checkpoint()

        torch.manual_seed(args.seed)
        if args.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.use_deterministic_algorithms(True, warn_only=True)
        weights = "none" if checkpoint else args.weights  # the checkpoint holds what they have become
        try:
            self.model = DeepLabV3Plus(args.backbone, len(self.data.classes), args.output_stride, weights)
        except ValueError as error:
            raise InputError(str(error)) from error
        self.model.to(self.device, memory_format=torch.channels_last)
        if self.world > 1 and self.device.type == "cuda":
            self.model = torch.nn.SyncBatchNorm.convert_sync_batchnorm(self.model)
        self.teacher = ema_teacher(self.model, args.ema)
        groups = {True: [], False: []}
        for name, parameter in self.model.named_parameters():
            groups[name.startswith("backbone.")].append(parameter)
        groups = [{"params": groups[True], "base": args.lr}, {"params": groups[False], "base": args.head_lr}]
        self.optimizer = torch.optim.SGD(
            groups, args.lr, 0.9, weight_decay=args.weight_decay, fused=self.device.type == "cuda"
        )
        self.prior = class_prior(self.data, args.neighborhood).to(self.device) if args.prior else None
        self.options = refinement_options(vars(args), self.prior)
        self.step, self.best, self.saved = 0, -math.inf, time.monotonic()
        self.losses, self.arriving, self.board = [], deque(), None
        self.noticed, self.ending = [], None  # signals to this process; one that all processes know of
        if checkpoint:
            self.restore(checkpoint)
        self.student, self.predict = self.model.train(), self.teacher
        if self.world > 1:
            self.student = DistributedDataParallel(self.model, broadcast_buffers=False)
        if args.compile:
            # For each batch size anew: a symbolic one costs speed. SyncBatchNorm breaks the student's graph at every layer.
            self.predict = torch.compile(self.teacher, dynamic=False)
            if self.world == 1 or self.device.type == "cpu":
                self.student = torch.compile(self.student, dynamic=False)
            use_compiler((args.batch_size, len(self.data.classes), args.crop, args.crop))

    def restarted(self):
        """Whether torchrun --max-restarts starts this run again, because a process of it died."""
        if not int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)):
            return False
        file = self.out / "args.json"  # of another launch: a folder that the first attempt refused
        return not file.exists() or json.loads(file.read_text()).get("launch") == launch()

    def find_checkpoint(self):
        """With --resume the last checkpoint of --out, if there is one. Raises InputError for another run's folder."""
        last = self.out / "last.pth"
        if (self.out / "args.json").exists() and not self.args.resume:
            raise InputError(
                f"{self.out} already holds a run; continue it with --resume, or choose another folder with --out"
            )
        if not (self.args.resume and last.exists()):
            return None
        checkpoint = load_checkpoint(last)
        if list(checkpoint["classes"]) != list(self.data.classes):
            raise InputError(
                f"{last} predicts {len(checkpoint['classes'])} classes, {self.data.name} has {len(self.data.classes)}; "
                "expected the run's own dataset, or another --out"
            )
        saved, now = checkpoint["args"], vars(self.args)
        changed = [name for name in now if name not in MAY_CHANGE and saved.get(name) != now[name]]
        if changed:
            difference = ", ".join(f"{name} was {saved.get(name)} and is {now[name]}" for name in changed)
            raise InputError(
                f"--resume: in {self.out}, {difference}; expected the same arguments, because schedules and randomness "
                "follow from them, or another --out for another run"
            )
        for part in ("labeled", "unlabeled", "val"):
            before, ids = checkpoint[part], [item.id for item in getattr(self.data, part)]
            if before != ids:
                raise InputError(
                    f"--resume: {self.out} began with {len(before)} {part} images, and {len(ids)} others are there now; "
                    "expected the same ones, or another --out for another run"
                )
        return checkpoint

    def open_folder(self):
        """Makes --out, writes args.json, and drops the lines of metrics.jsonl that will be written again."""
        if self.world > 1:  # every process has looked for a checkpoint before one of them writes
            steps = torch.tensor([self.step, -self.step], device=self.device)
            dist.all_reduce(steps, dist.ReduceOp.MIN)
            first, last = steps[0].item(), -steps[1].item()
            if first != last:
                raise InputError(
                    f"--resume: some processes find {self.out} at step {first}, others at {last}; expected one folder "
                    "that all machines see; put --out there"
                )
        if self.rank == 0:
            if self.args.tensorboard:  # purge_step: what an earlier part of the run wrote past its checkpoint
                self.board = summary_writer()(self.out / "tensorboard", purge_step=self.step + 1)
            (self.out / "panels").mkdir(parents=True, exist_ok=True)
            metrics = self.out / "metrics.jsonl"
            lines = metrics.read_text().splitlines(keepends=True) if metrics.exists() else []
            whole = [line for line in lines if line.endswith("\n")]  # a kill may have cut the last one
            write_aside(metrics, "".join(line for line in whole if json.loads(line)["step"] <= self.step))
            write_aside(self.out / "args.json", json.dumps(vars(self.args) | environment(), indent=2) + "\n")
            for note in (*self.data.notes, self.summary(), json.dumps(vars(self.args))):
                say(note)
            if self.args.resume:
                say(
                    f"going on with {self.out} after step {self.step}"
                    if self.step
                    else f"{self.out} has no checkpoint: step 0"
                )
            if self.args.framework != "supervised" and self.args.warmup_steps >= self.args.iters:
                steps = f"the warm-up of {self.args.warmup_steps} steps outlasts the run of {self.args.iters}"
                say(f"note: {steps}, so no unlabeled image will be used; see --warmup-epochs")

    def summary(self):
        """A sentence about the run, for whoever starts it."""
        args, data = self.args, self.data
        images = f"{len(data.labeled)} labeled, {len(data.unlabeled)} unlabeled, {len(data.val)} validation images"
        device = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "the CPU"
        steps = f"{args.iters} steps of {args.batch_size} labeled"
        if args.framework == "supervised":
            steps += " images"
        else:
            steps += f" + {args.batch_size} unlabeled images, the first {args.warmup_steps} of labeled ones alone"
        processes = f", {self.world} processes" if self.world > 1 else ""
        return f"{data.name}: {images}; {args.backbone} on {device}{processes}; {steps}; writes to {self.out}"

    def restore(self, checkpoint):
        """Continues where the checkpoint was saved; schedules and randomness follow from the step alone."""
        self.step, self.best = checkpoint["step"], checkpoint["best"]
        self.model.load_state_dict(checkpoint["student"])
        self.teacher.module.load_state_dict(checkpoint["teacher"])
        self.teacher.n_averaged.fill_(checkpoint["updates"])
        self.optimizer.load_state_dict(checkpoint["optimizer"])

    def save(self, name):
        """Writes a checkpoint aside and renames it, so that no moment leaves a broken one. Plain values and tensors only."""
        self.check_weights()
        state = {
            "step": self.step, "best": self.best, "args": vars(self.args), "classes": list(self.data.classes),
            "labeled": [item.id for item in self.data.labeled], "val": [item.id for item in self.data.val],
            "unlabeled": [item.id for item in self.data.unlabeled],
            "palette": torch.from_numpy(palette()), "preprocessing": PREPROCESSING,
            "prior": self.prior, "student": self.model.state_dict(), "teacher": self.teacher.module.state_dict(),
            "updates": int(self.teacher.n_averaged), "optimizer": self.optimizer.state_dict(),
        }  # fmt: skip
        aside = self.out / f"{name}.tmp"
        try:
            torch.save(state, aside)
            os.replace(aside, self.out / name)
        except (OSError, RuntimeError) as error:  # torch.save turns some of the system's errors into RuntimeError
            aside.unlink(missing_ok=True)
            reason = str(error).splitlines()[0]
            raise InputError(
                f"{self.out / name} could not be written ({reason}), {self.last_good()}; make room, then use --resume"
            ) from error
        self.saved = time.monotonic()

    def check_weights(self):
        """Raises InputError where a weight is not finite, so that no such checkpoint is written or scored."""
        if not all(parameter.isfinite().all() for parameter in self.model.parameters()):
            raise InputError(
                f"step {self.step} left weights that are not finite, {self.last_good()}; lower --lr and --head-lr"
            )

    def last_good(self):
        """Half a sentence about last.pth."""
        last = self.out / "last.pth"
        return f"{last} is the last good checkpoint" if last.exists() else "no checkpoint had been written yet"

    def write(self, record):
        """Appends one record to metrics.jsonl, and to TensorBoard where it is asked for."""
        with open(self.out / "metrics.jsonl", "a") as file:
            file.write(json.dumps(record) + "\n")
        if self.board:
            show_on_board(self.board, record)

    def log(self, log, batch, since):
        """One training line: means since the last one and its time, figures of the last batch. Waits for the device."""
        args = self.args
        record = {"event": "train", "step": self.step, "epoch": self.step / args.steps_per_epoch}
        record["lr"] = self.optimizer.param_groups[0]["lr"]
        record["loss"], record["loss_x"], loss_u = torch.stack(self.losses).mean(0).tolist()
        seconds = time.perf_counter() - since
        self.look_at_losses(waiting=0)
        if "pseudo" in log:
            record["loss_u"] = loss_u
            record["alpha"] = dpa_alpha(self.step - 1, args.iters, args.alpha0)
            record |= pseudo_label_figures(log["prob"], log["pseudo"], batch, self.options)
        record["seconds_per_step"] = seconds / len(self.losses)
        images = args.batch_size * self.world * (2 if "pseudo" in log else 1)
        record["images_per_second"] = images / record["seconds_per_step"]
        if self.device.type == "cuda":
            record["peak_memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
        if self.rank == 0:
            self.write(record)
        self.losses.clear()
        return record

    def note(self, losses):
        """Takes down (loss, loss_x, loss_u) of the step in work, means over the processes; the device never stands still."""
        losses = torch.cat((losses, losses.new_full((1,), len(self.noticed))))  # a signal to any process travels along
        if self.world > 1:
            dist.all_reduce(losses)
            losses /= self.world
        self.losses.append(losses[:3])
        arrived = torch.cuda.Event() if self.device.type == "cuda" else None
        self.arriving.append((self.step + 1, losses.to("cpu", non_blocking=True), arrived))
        if arrived:
            arrived.record()
        self.look_at_losses(waiting=2 if arrived else 0)

    def look_at_losses(self, waiting):
        """Those that note() took down, but for the last `waiting`. Raises InputError where a loss is not finite.

        A fixed number, and no look at what has arrived, lets all processes stop at the same step. With two of them left
        the device still has work to do while the host waits for the one before.
        """
        while len(self.arriving) > waiting:
            step, losses, arrived = self.arriving.popleft()
            if arrived:
                arrived.synchronize()
            loss, _, _, signals = losses
            if not loss.isfinite():
                rate = learning_rate(step - 1, self.args.iters, self.args.lr, self.args.power)
                raise InputError(
                    f"the loss of step {step} is {loss.item()}, at --lr {rate:.3g} with the images {', '.join(self.seen(step))}; "
                    f"training stopped, {self.last_good()}; look at these images, or lower --lr and --head-lr"
                )
            if signals:
                self.ending = signal.Signals(self.noticed[0]) if self.noticed else signal.SIGTERM

    def seen(self, step):
        """The ids of the batches of all processes in a step, 1 the first; from the seed, as the loader draws them."""
        supervised = self.args.framework == "supervised" or step <= self.args.warmup_steps
        streams = [("order_x", self.data.labeled)] + [("order_u", self.data.unlabeled)] * (not supervised)
        numbers = draws(step - 1, self.args.batch_size * self.world)
        return [drawn(items, self.args.seed, stream, number).id for stream, items in streams for number in numbers]

    def evaluate(self):
        """Scores the teacher, saves last.pth and perhaps best.pth, draws the panel. Returns the scores."""
        args, data = self.args, self.data
        self.check_weights()
        protocol = Protocol(args.eval_mode, args.crop)
        result = evaluate(self.teacher, data, data.val, self.device, protocol, args.workers, self.rank, self.world)
        if result["miou"] is None:
            raise InputError("no pixel of the validation images has a label; expected class indices, not 255 alone")
        improved = result["miou"] > self.best
        self.best = max(self.best, result["miou"])
        if self.rank == 0:
            self.write({"event": "val", "step": self.step, "epoch": self.step / args.steps_per_epoch} | result)
            say(f"step {self.step}/{args.iters}  teacher's mIoU {result['miou']:.2f}, best {self.best:.2f}")
            for name in ("best.pth", "last.pth")[not improved :]:  # after a kill between them this is done again
                self.save(name)
            sheet = panel(self.teacher, data, panel_items(data), self.device, args.alpha0, self.options)
            sheet.save(self.out / "panels" / f"step-{self.step:06d}.png")
            if self.board:
                self.board.add_image("panel", np.asarray(sheet), self.step, dataformats="HWC")
        return result


def train(run):
    """Does the `steps`, and meanwhile takes down SIGTERM and SIGINT in place of ending at once."""
    numbers = (signal.SIGTERM, signal.SIGINT)
    before = [signal.signal(number, lambda number, _: run.noticed.append(number)) for number in numbers]
    try:
        steps(run)
    finally:
        for number, handler in zip(numbers, before):
            signal.signal(number, handler)


def steps(run):
    """The loop: from run.step to --iters. A signal saves a checkpoint and ends it with 128 + its number."""
    args, optimizer = run.args, run.optimizer
    loader = training_loader(
        run.data, range(run.step, args.iters), args.batch_size, args.crop, args.framework, args.seed,
        args.workers, run.rank, run.world, pin_memory=run.device.type == "cuda",
    )  # fmt: skip
    run.open_folder()
    first, paused, result = run.step, 0.0, None
    began = since = time.perf_counter()
    for step, batch in enumerate(batches(loader), first):
        batch = {name: view.to(run.device, non_blocking=True) for name, view in batch.items() if torch.is_tensor(view)}
        if args.framework == "fixmatch" and step >= args.warmup_steps:
            numbers = draws(step, args.batch_size, run.rank, run.world)
            batch["strong"] = strong_views(batch["weak"], args.seed, numbers)
        rng = generator(args.seed, "step", step, run.rank)  # for CutMix, and through the next line for dropout
        torch.manual_seed(int(rng.integers(2**63)))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args.iters, group["base"], args.power)

        with torch.autocast(run.device.type, torch.bfloat16, enabled=args.amp):
            loss, log = training_losses(run.student, run.predict, batch, step, args, run.options, rng)
        run.note(log["losses"])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if run.world > 1 and run.device.type == "cpu":
            average_batchnorm(run.model, run.world)
        run.teacher.update_parameters(run.model)
        if step < args.warmup_steps:
            run.teacher.n_averaged.zero_()  # the next update is a copy again: averaging begins after the warm-up

        run.step = step + 1
        evaluating = run.step == args.iters or run.step % (args.eval_every * args.steps_per_epoch) == 0
        if run.step % args.log_every == 0 or evaluating:
            record = run.log(log, batch, since)
            since = time.perf_counter()
            if run.rank == 0:
                seconds_per_step = (since - began - paused) / (run.step - first)
                say(progress(record, args, seconds_per_step * (args.iters - run.step)), live=True)
        if evaluating:
            result = run.evaluate()
            paused += time.perf_counter() - since
            since = time.perf_counter()
        # After an evaluation, never before it: a run that is resumed would leave it out.
        if run.rank == 0 and (run.ending or time.monotonic() - run.saved > 60 * args.save_every):
            run.save("last.pth")
        if run.ending:
            if run.rank == 0:
                saved = f"saved step {run.step} to {run.out / 'last.pth'}"
                print(f"{run.ending.name}: {saved}; continue with --resume", file=sys.stderr)
            if run.world > 1:
                dist.barrier()  # torchrun ends all processes as soon as one has ended
            sys.exit(128 + run.ending)
    if run.rank == 0:
        last = run.out / "last.pth"
        say(table(result) if result else f"nothing to do: {last} is at step {first} of {args.iters}")
        print(f"score it again with: python evaluate.py {last}")


# ----------------------------------------------------------------------------------------------------------------------
# arguments

MAY_CHANGE = set("resume out root splits workers device log_every eval_every save_every compile tensorboard".split())


def fill_presets(args, device):
    """Options left out take the dataset's preset; the command line beats it."""
    given = {name for name, value in vars(args).items() if value is not None}
    if given & {"epochs", "iters"}:
        given |= {"epochs", "iters"}
    for dataset, devices, _, numbers in PRESETS:
        if dataset == args.dataset and device.type in devices:
            vars(args).update({name: value for name, value in numbers.items() if name not in given})
    if args.amp is None:
        args.amp = device.type == "cuda"
    if args.out is None:
        args.out = f"runs/{args.dataset}-{Path(args.labeled).stem}-{args.framework}-{args.seed}"


def suit_folder(args, data, device, world):
    """What the preset of a folder leaves open: crop and length, from the images found. Ours; the command line beats it."""
    sides = sorted(min(read_image(item).size) for item in data.labeled[:: max(1, len(data.labeled) // 16)])
    largest, least = (128, 2000) if device.type == "cpu" else (512, 6000)
    epoch = math.ceil(len(data.unlabeled or data.labeled) / (args.batch_size * world))  # steps
    iters = args.iters or (args.epochs * epoch if args.epochs else max(least, 10 * epoch))
    tenth = round(iters / epoch / 10) or int(4 * epoch <= iters)  # of the run, in epochs
    crop = max(32, min(largest, sides[len(sides) // 2]) // 32 * 32)
    found = dict(zip(FROM_IMAGES, (crop, None if args.epochs else iters, tenth, max(1, tenth))))
    found = {name: value for name, value in found.items() if getattr(args, name) is None and value is not None}
    for name, value in found.items():
        setattr(args, name, value)
    if found:
        chosen = ", ".join(f"--{name.replace('_', '-')} {value}" for name, value in found.items())
        data = data._replace(
            notes=(
                *data.notes,
                f"chosen from the images found, their short side about {sides[len(sides) // 2]}: {chosen}",
            )
        )
    return data


def resolve_lengths(args, data, device, world):
    """Epochs into steps. Raises InputError for a partition or batch that cannot be trained on."""
    if args.framework != "supervised" and not data.unlabeled:
        raise InputError(
            f"--labeled {args.labeled} leaves no unlabeled image; use --framework supervised, or fewer labels"
        )
    args.steps_per_epoch = math.ceil(len(data.unlabeled or data.labeled) / (args.batch_size * world))
    args.iters = args.iters or args.epochs * args.steps_per_epoch
    args.warmup_steps = args.warmup_epochs * args.steps_per_epoch
    args.processes = world
    alone = args.batch_size == 1 and not (world > 1 and device.type == "cuda")
    if alone and (args.framework == "supervised" or args.warmup_steps):
        raise InputError(
            "--batch-size 1 gives BatchNorm a single value per channel while only labeled images are trained on; "
            "use --batch-size 2 or more"
        )


def neighborhood(text):
    """An argparse type: 3, 5, 7 or cross."""
    return text if text == "cross" else int(text)


SWITCH = argparse.BooleanOptionalAction
COUNT, SHARE = number(int, 1), number(float, 0, 1)


def data_arguments(add):
    """What is trained on."""
    add("--dataset", choices=DATASETS, default="shapes", help="shapes is drawn and needs no files")
    add("--root", default="data", help="folder that holds the dataset, or the dataset's own folder")
    add("--labeled", help="number of labeled images, a file of their ids, or all")
    add("--splits", help="folder of published lists, <dataset>/<N>.txt; default: the one beside this file")
    add("--crop", type=number(int, 32), help="side of the square training views, pixels")
    add("--workers", type=number(int, 0), help="loader processes of each process")


def method_arguments(add):
    """The paper."""
    frameworks = ("fixmatch", "cutmixseg", "supervised")
    said = "strong view: colors and CutMix, or CutMix alone; supervised: labeled images alone [paper]"
    add("--framework", choices=frameworks, default="fixmatch", help=said)
    add("--refinement", action=SWITCH, default=True, help="Eqs. 7-10; without: the baseline [paper]")
    said = "N x N neighbors, or the four beside the pixel [paper: 3; authors' code: cross]"
    add("--neighborhood", type=neighborhood, choices=(3, 5, 7, "cross"), default=3, help=said)
    add("--dilation", type=COUNT, default=1, help="distance of the neighbors, pixels; 4: the logits' own grid [ours]")
    add("--neighbors", type=COUNT, default=1, help="how many neighbors are united, Table 4a [paper]")
    add("--select", choices=("max", "min", "random"), default="max", help="which neighbor, Table 4a [paper]")
    add("--distance-weight", action=SWITCH, default=True, help="beta of Eq. 10; without: 1 [paper]")
    add("--prior", action=SWITCH, default=False, help="Eqs. 15-16, estimated from the labeled images [paper]")
    add("--confidence", choices=("margin", "max", "entropy"), default="margin", help="kappa, Table 5 [paper]")
    add("--alpha0", type=SHARE, default=0.4, help="share of pixels below the threshold at first, Eq. 6 [paper]")
    add("--threshold", type=float, help="a fixed one, in place of Eq. 6 [FixMatch: 0.95, of --confidence max]")
    add("--lambda-u", type=number(float, 0), default=1.0, help="weight of the unlabeled loss, Eq. 1 [ours]")
    add("--ema", type=SHARE, default=0.99, help="tau of the teacher, Sec. 4.1 [paper]")
    add("--cutmix", type=SHARE, default=0.5, help="probability per image, Appendix D [paper]")
    add("--warmup-epochs", type=number(int, 0), help="epochs on labeled images alone [authors' code: 1]")


def model_arguments(add):
    """The network."""
    add("--backbone", choices=BACKBONES, help="torchvision's; resnet10 is for CPUs [paper: resnet101]")
    add("--weights", help="imagenet, none, or a file with torchvision's state dict [paper: imagenet]")
    add("--output-stride", type=int, choices=(16, 8), default=16, help="8 needs more memory [authors' code: 8]")


def optimizer_arguments(add):
    """SGD with momentum 0.9 [paper]."""
    add("--epochs", type=COUNT, help="passes over the unlabeled images [paper: 80]")
    add("--iters", type=COUNT, help="steps, in place of --epochs")
    add("--batch-size", type=COUNT, help="labeled and unlabeled images each, per process")
    add("--lr", type=number(float, 0, above=True), help="of the backbone")
    add("--head-lr", type=number(float, 0, above=True), help="of everything else")
    add("--weight-decay", type=number(float, 0), help="on all parameters")
    add("--sup-loss", choices=("ce", "ohem"), help="of the labeled images; ohem: their hard pixels alone")
    add("--power", type=number(float, 0), default=0.9, help="of the learning rate's decay, Appendix D [paper]")


def run_arguments(add):
    """How and where."""
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: the GPU where there is one")
    add("--amp", action=SWITCH, help="bfloat16 autocast; default: on CUDA")
    add("--compile", action=SWITCH, default=False, help="torch.compile teacher, pseudo-labels and, on one GPU, student")
    add("--deterministic", action=SWITCH, default=False, help="ask for deterministic CUDA kernels; the CPU's are")
    add("--seed", type=number(int, 0), default=0, help="of everything random")
    add("--eval-every", type=COUNT, help="epochs between evaluations; each saves a checkpoint")
    add("--eval-mode", choices=EVAL_MODES, help="at original size, in sliding windows of --crop, or its center crop")
    add("--log-every", type=COUNT, help="steps between log lines")
    add("--save-every", type=number(float, 0), default=10.0, help="minutes between checkpoints, besides evaluations")
    add("--tensorboard", action=SWITCH, default=False, help="log, panels and histograms for TensorBoard too")
    add("--out", help="folder of the run; default: runs/<dataset>-<labeled>-<framework>-<seed>")
    add("--resume", action="store_true", help="continue the run in --out from its last checkpoint")


class Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Defaults are printed where they say something, presets with their sources; the description stays as it is written."""

    def _get_help_string(self, action):
        presets = [
            f"{dataset}{'' if devices == ANY else f' on {devices[0]}'} {numbers[action.dest]} [{source}]"
            for dataset, devices, source, numbers in PRESETS
            if action.dest in numbers
        ]
        if action.dest in FROM_IMAGES:
            presets.append("folder: from the images found [ours]")
        if presets:
            return f"{action.help}; default: {', '.join(presets)}"
        return action.help if action.default is None else super()._get_help_string(action)


def parse_args(argv=None):
    """The command line. What is None here takes the preset of the dataset."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Help)
    for arguments in (data_arguments, method_arguments, model_arguments, optimizer_arguments, run_arguments):
        group = parser.add_argument_group(arguments.__name__.removesuffix("_arguments"), arguments.__doc__)
        arguments(group.add_argument)
    args = parser.parse_args(argv)
    if args.epochs and args.iters:
        parser.error("--epochs and --iters both set the length of the run; expected one of them")
    return args


if __name__ == "__main__":
    stop_on_input_error(lambda: train(Run(parse_args())))
