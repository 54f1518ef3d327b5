"""One training run of S4MC: a few labeled images, many unlabeled ones, DeepLabv3+ and its moving-average teacher.

    python train.py                                                           # drawn shapes, on a CPU, minutes
    python train.py --dataset camvid --root data --labeled 46                 # photographs
    torchrun --nproc_per_node=8 train.py --dataset pascal --labeled 92        # one process per GPU, as in the paper

Writes --out: args.json, metrics.jsonl, last.pth, best.pth, panels/. `python evaluate.py OUT/last.pth` scores it.
"""

import argparse
import contextlib
import copy
import errno
import fcntl
import json
import math
import os
import platform
import shlex
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from torch.nn.parallel import DistributedDataParallel
from torchvision.transforms.v2 import functional as VF

from data import DATASETS, IGNORE, InputError, check_annotations, cutmix, generator, normalize, open_dataset, read
from data import sample_numbers, strong_views, training_loader
from evaluate import EVAL_MODES, Protocol, evaluate, label_counts, label_figures, label_options, number, panel
from evaluate import panel_items, run_script, say, table
from model import ENCODERS, DeepLabV3Plus, all_reduce, average_statistics, cannot_write, ema_decay, float_tensors
from model import load_checkpoint, save_checkpoint, start_processes, update_teacher
from refine import dpa_alpha, neighbor_agreement, pseudo_labels

# What --dataset means for every option left out.
SIZES = {  # of runs on photographs [ours]; the GPU's are untuned
    # in the minutes of a CPU more steps gain no less than a second view, docs/results.md
    "cpu": dict(crop=128, backbone="mobilenet_v2", framework="fixmatch", iters=3000, batch_size=4, workers=1),
    "cuda": dict(crop=321, backbone="resnet50", framework="unimatch", iters=6000, batch_size=8, workers=8),
}
PAPER = dict(framework="fixmatch", unsup_norm="kept", floor=0.0)  # where a preset says nothing
PHOTOGRAPHS = dict(  # [ours]
    unsup_norm="valid", floor=0.95,  # lose fewer rare classes, docs/results.md
    weights="pretrained", warmup_iters=300, optimizer="adamw", weight_decay=1e-4, sup_loss="ce", log_every=20,
    eval_mode="original",
)  # fmt: skip
PRESETS = {
    "shapes": dict(  # [ours]
        labeled="24", crop=64, backbone="resnet10", weights="none", iters=1500, warmup_iters=300, batch_size=4,
        optimizer="sgd", lr=0.02, head_lr=0.02, weight_decay=5e-4, workers=1, log_every=20, eval_mode="original",
        sup_loss="ce",
    ),
    # Learning rates: tuned on supervised runs, on 46 labeled images of CamVid and 31 of PASCAL, as a folder [ours].
    "camvid": PHOTOGRAPHS | dict(labeled="46", lr=0.0005, head_lr=0.005),
    "folder": PHOTOGRAPHS | dict(labeled="all", lr=0.0001, head_lr=0.001),
    "pascal": dict(
        # Appendix D; 1/4 is the partition of Sec. 4.3 [paper]
        labeled="366", crop=513, backbone="resnet101", weights="pretrained", epochs=80, batch_size=3, optimizer="sgd",
        lr=0.001, head_lr=0.01, weight_decay=1e-4, sup_loss="ce",
        warmup_epochs=1,  # [authors' code]
        workers=4, log_every=20, eval_mode="original",  # [ours]
    ),
    "cityscapes": dict(
        labeled="744", crop=769, backbone="resnet101", weights="pretrained", epochs=80, batch_size=2, optimizer="sgd",
        lr=0.01, head_lr=0.01, weight_decay=5e-4,  # Appendix D [paper]
        warmup_epochs=1,  # [authors' code]
        eval_mode="sliding", sup_loss="ohem",  # [common practice]
        workers=4, log_every=20,  # [ours]
    ),
}  # fmt: skip
DINOV2 = dict(optimizer="adamw", lr=5e-6, head_lr=2e-4, weight_decay=0.01)  # whatever the dataset [UniMatch V2]
STRONG_VIEWS = {"supervised": 0, "cutmixseg": 1, "fixmatch": 1, "unimatch": 2}  # of an unlabeled image
SUPERVISED_FLOOR = 1000  # steps of a supervised run measured in epochs [ours]; the authors' 80 epochs of 92 labels: 960
MAY_CHANGE = set(  # from one --resume to the next; `find_checkpoint` compares images and ids, not these words
    "resume out root splits workers device amp log_every eval_every eval_steps save_every compile tensorboard labeled "
    "batch_size processes weights deterministic".split()
)

# ----------------------------------------------------------------------------------------------------------------------
# schedules and losses


def learning_rate(step, total_steps, base, power=0.9):
    """Appendix D: lr_base * (1 - iter / total_iter) ** power."""
    return base * (1 - step / total_steps) ** power


def count(mask):
    """The number of True pixels over all processes, 0-d."""
    return all_reduce(mask.sum())


def cross_entropy(logits, label, divisor):
    """Eqs. 2-3: the sum over this process's labeled pixels, divided by `divisor`, their number in all processes, 0-d.

    logits (B,C,H,W), label (B,H,W) with 255 = not labeled. Scaled by the number of processes, because
    DistributedDataParallel averages gradients: N processes equal one process with the whole batch. With class weights
    the divisor, too, becomes a sum of weights.
    """
    total = F.cross_entropy(logits, label.long(), ignore_index=IGNORE, reduction="sum")
    return total * (dist.get_world_size() if dist.is_initialized() else 1) / divisor.clamp(min=1)


@torch.no_grad()
def ohem(logits, label, sure=0.7, per_image=50_000):
    """Online hard example mining (Shrivastava et al., 2016): the label with 255 where the network is right and sure.

    logits (B,C,H,W), label (B,H,W). A pixel stays if its own class has probability `sure` or less, and so do the
    hardest B * per_image pixels of this process. Both numbers are common practice on Cityscapes: 100,000 of two images.
    """
    own = logits.softmax(1).gather(1, label.clamp(max=logits.shape[1] - 1).long()[:, None])[:, 0]
    prob = own.masked_fill(label == IGNORE, torch.inf)
    hardest = prob.flatten().kthvalue(min(per_image * len(label), prob.numel())).values
    return label.masked_fill(prob > hardest.clamp(min=sure), IGNORE)


def complementary_dropout(labeled, unlabeled, channels, device):
    """Multipliers of the student's deepest features, (labeled + 2 * unlabeled, channels) [UniMatch V2].

    For a random half of the unlabeled images each channel is dropped in one strong view and doubled in the other; the
    other half, and labeled images, keep theirs.
    """
    first = 2.0 * torch.randint(2, (unlabeled, channels), device=device)
    whole = torch.rand(unlabeled, 1, device=device).argsort(0) < unlabeled // 2
    first = torch.where(whole, 1, first)
    return torch.cat([torch.ones(labeled, channels, device=device), first, 2 - first])


def class_prior(data, neighborhood):
    """Eq. 15 over the labeled images of the run, (C,): each image's `neighbor_agreement`, weighted by its pixels."""
    agreement, pixels = torch.zeros(2, len(data.classes), dtype=torch.double)
    for item in data.labeled:
        mask = VF.pil_to_tensor(read(item, data)[1])  # (1,H,W)
        seen = torch.bincount(mask.flatten().long(), minlength=256)[: len(data.classes)]
        agreement += seen * neighbor_agreement(mask, len(data.classes), neighborhood)
        pixels += seen
    return (agreement / pixels.clamp(min=1)).float()


# ----------------------------------------------------------------------------------------------------------------------
# one run


def main(args):
    """Trains from the first step, or from where last.pth was saved, to --iters."""
    # --- set-up: arguments, data, checkpoint, networks, optimizer
    rank, world, device = start_processes(args.device)
    fill_presets(args, device)
    out, supervised = Path(args.out), args.framework == "supervised"
    parts = ("labeled", "val") if supervised else ("labeled", "unlabeled", "val")
    data = open_dataset(args.dataset, args.root, args.labeled, args.splits, parts)
    epochs_to_steps(args, data, world, device)
    checkpoint = find_checkpoint(args, data, rank)
    if rank == 0:
        check_annotations(data)

    torch.manual_seed(args.seed)
    if args.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
    weights = "none" if checkpoint else args.weights  # the checkpoint holds what they have become
    student = DeepLabV3Plus(args.backbone, len(data.classes), args.output_stride, weights)
    student = student.to(device, memory_format=torch.channels_last).train()
    if world > 1 and device.type == "cuda":
        student = torch.nn.SyncBatchNorm.convert_sync_batchnorm(student)
    teacher = copy.deepcopy(student).eval().requires_grad_(False)
    head = [parameter for name, parameter in student.named_parameters() if not name.startswith("backbone.")]
    groups = [{"params": [*student.backbone.parameters()], "base": args.lr}, {"params": head, "base": args.head_lr}]
    settings = {"lr": args.lr, "weight_decay": args.weight_decay, "fused": device.type == "cuda"}
    if args.optimizer == "sgd":
        optimizer = torch.optim.SGD(groups, momentum=0.9, **settings)
    else:
        optimizer = torch.optim.AdamW(groups, **settings)
    prior = class_prior(data, args.neighborhood).to(device) if args.prior else None
    first, best, unlabeled_ids = 0, -math.inf, [item.id for item in data.unlabeled]
    if checkpoint:
        first, best, unlabeled_ids = checkpoint["step"], checkpoint["best"], checkpoint["unlabeled"]
        student.load_state_dict(checkpoint["student"])
        teacher.load_state_dict(checkpoint["teacher"])
        for group, base in zip(checkpoint["optimizer"]["param_groups"], (args.lr, args.head_lr)):
            group |= {"base": base, "fused": settings["fused"]}  # rate and device may have changed
        optimizer.load_state_dict(checkpoint["optimizer"])
        checkpoint = None  # as large as networks and optimizer together
    averaged = float_tensors(teacher), float_tensors(student)
    run_student, run_teacher, make_labels = student, teacher, pseudo_labels
    if world > 1:
        run_student = DistributedDataParallel(student, broadcast_buffers=False)
    if args.compile:
        args.compile = compiles(device)
    if args.compile:
        run_teacher, make_labels = torch.compile(teacher, dynamic=False), torch.compile(pseudo_labels)
        if world == 1 or device.type == "cpu":  # SyncBatchNorm breaks the graph at every layer
            run_student = torch.compile(run_student, dynamic=False)
    options = label_options(vars(args), prior)
    loader = training_loader(
        data, range(first, args.iters), args.batch_size, args.crop, args.framework, args.seed, args.workers,
        rank, world, pin_memory=device.type == "cuda",
    )  # fmt: skip
    board, lock = open_run(args, data, first, rank, device)
    stop = stop_signals(rank, world)
    scores, losses, broken = None, torch.zeros(3, device=device), set()
    logged, logged_at = first, time.monotonic()
    saved_at = logged_at

    # --- the loop: one step of training, Sec. 3.3
    for step, batch in enumerate(loader, first):
        unlabeled = not supervised and step >= args.warmup_iters
        for sentence in {*batch.pop("broken", ())} - broken - {""}:
            say(f"warning: {sentence}; the next image is used", sys.stderr)
            broken.add(sentence)
        batch = {name: view.to(device, non_blocking=True) for name, view in batch.items()}
        x, y = normalize(batch["x"]), batch["y"]  # (B,3,H,W), (B,H,W)
        if unlabeled:
            weak, valid = normalize(batch["weak"]), batch["valid"]  # the same crop; valid is False on padding
            views = [weak]
            if args.framework != "cutmixseg":
                samples = sample_numbers(step, args.batch_size, rank, world)
                streams = range(STRONG_VIEWS[args.framework])
                views = [normalize(strong_views(batch["weak"], args.seed, samples, stream)) for stream in streams]
        rng = generator(args.seed, "step", step, rank)  # for CutMix, and through the next line for dropout
        torch.manual_seed(int(rng.integers(2**63)))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args.iters, group["base"], args.power)

        with torch.autocast(device.type, torch.bfloat16, enabled=args.amp):
            if unlabeled:
                with torch.no_grad():
                    prob = run_teacher(weak).softmax(1)  # (B,C,H,W)
                alpha = dpa_alpha(step, args.iters, args.alpha0)  # Eq. 6
                pseudo = make_labels(prob, alpha, valid=valid, **options)  # Eqs. 4-10
                mixed = [cutmix(rng, args.cutmix, view, pseudo.label, valid) for view in views]
                strong, target, mixed_valid = (torch.cat(parts) for parts in zip(*mixed))  # of all views: (VB,...)
                drop = None
                if args.framework == "unimatch":
                    drop = complementary_dropout(len(x), len(weak), student.deep_channels, device)
                logits_x, logits_u = run_student(torch.cat([x, strong]), drop).split([len(x), len(strong)])
            else:
                logits_x = run_student(x)
        if args.sup_loss == "ohem":
            y = ohem(logits_x, y)
        loss = loss_x = cross_entropy(logits_x, y, count(y != IGNORE))  # Eq. 2
        loss_u = torch.zeros_like(loss_x)
        if unlabeled:
            kept, total = count(target != IGNORE), count(mixed_valid)
            divisor = {"kept": kept, "valid": total, "authors": kept * (kept / total.clamp(min=1))}[args.unsup_norm]
            loss_u = cross_entropy(logits_u, target, divisor)  # Eq. 3
            loss = loss_x + args.lambda_u * loss_u  # Eq. 1
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if world > 1 and device.type == "cpu":  # on GPUs SyncBatchNorm does it
            average_statistics(student, world)
        update_teacher(*averaged, ema_decay(max(0, step - args.warmup_iters), args.ema))
        losses += torch.stack([loss, loss_x, loss_u]).detach()

        # --- log, evaluation, checkpoint
        done = step + 1
        evaluating = done == args.iters or done % args.eval_steps == 0
        if not (evaluating or done % args.log_every == 0 or (stop and world == 1)):
            continue
        mean = (all_reduce(losses) / (world * (done - logged))).tolist()
        if not math.isfinite(mean[0]):
            raise not_finite(f"the loss is {mean[0]} between the steps {logged + 1} and {done}", out)
        record = {"event": "train", "step": done, "epoch": done / args.steps_per_epoch}
        record |= {"lr": optimizer.param_groups[0]["lr"], "loss": mean[0], "loss_x": mean[1]}
        if unlabeled:
            counts = all_reduce(label_counts(prob, pseudo, batch["truth"], valid, options))
            record |= {"loss_u": mean[2], "alpha": alpha, "threshold": pseudo.threshold.item()} | label_figures(counts)
        most = all_reduce(torch.tensor(len(broken), device=device), dist.ReduceOp.MAX).item()  # of any process
        if most > len(data.unlabeled) / 20:
            raise InputError(
                f"{most} of {len(data.unlabeled)} unlabeled images could not be read, each is named above; replace or "
                "remove them, then use --resume"
            )
        record |= {"broken": most} if most else {}
        record["seconds_per_step"] = (time.monotonic() - logged_at) / (done - logged)
        record["images_per_second"] = args.batch_size * world * (1 + unlabeled) / record["seconds_per_step"]
        if device.type == "cuda":
            record["peak_memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
        write_record(out, board, rank, record)
        if rank == 0:
            say(progress(record, args))
        improved = False
        if evaluating:
            protocol = Protocol(args.eval_mode, args.crop)
            scores = evaluate(teacher, data, data.val, device, protocol, args.workers, rank, world)
            improved, best = scores["miou"] > best, max(best, scores["miou"])
            write_record(out, board, rank, {"event": "val", "step": done, "epoch": record["epoch"]} | scores)
            if rank == 0:
                say(f"step {done}/{args.iters}  teacher's mIoU {scores['miou']:.2f}, best {best:.2f}")
        stopping = torch.tensor(max(stop, default=0), device=device)
        stopping = all_reduce(stopping, dist.ReduceOp.MAX).item() if done < args.iters else 0  # that of any process
        # Saved after evaluating, or a resumed run would skip that evaluation.
        if rank == 0 and (evaluating or stopping or time.monotonic() - saved_at > 60 * args.save_every):
            if not all(parameter.isfinite().all() for parameter in student.parameters()):
                raise not_finite(f"weights are not finite after step {done}", out)
            run = {
                "step": done, "best": best, "args": vars(args), "classes": list(data.classes), "prior": prior,
                "labeled": [item.id for item in data.labeled], "unlabeled": unlabeled_ids,
                "val": [item.id for item in data.val],
                "student": student.state_dict(), "teacher": teacher.state_dict(), "optimizer": optimizer.state_dict(),
            }  # fmt: skip
            for name in ("best.pth", "last.pth")[not improved :]:  # after a kill between them this is done again
                save_checkpoint(run, out / name)
            saved_at = time.monotonic()
        if stopping:
            if rank == 0:
                name = signal.Signals(stopping).name
                say(f"{name}: saved step {done} to {out / 'last.pth'}; continue with --resume", sys.stderr)
            if world > 1:
                dist.barrier()  # torchrun ends all processes as soon as one has ended
            sys.exit(128 + stopping)
        if rank == 0 and evaluating:
            write_panel(out, board, done, teacher, data, device, args, prior)
        logged, logged_at = done, time.monotonic()
        losses.zero_()
    if rank == 0:
        print(table(scores) if scores else f"nothing to do: {out / 'last.pth'} is at step {first} of {args.iters}")
        print(f"score it again with: python evaluate.py {shlex.quote(str(out / 'last.pth'))}")


def epochs_to_steps(args, data, world, device):
    """Adds steps_per_epoch, iters, warmup_iters and eval_steps to the arguments. An epoch is a pass over the unlabeled
    images, in a supervised run over the labeled ones. Raises InputError for a batch of one or an endless warm-up."""
    images = data.labeled if args.framework == "supervised" else data.unlabeled
    args.steps_per_epoch = math.ceil(len(images) / (args.batch_size * world))
    floor = SUPERVISED_FLOOR if args.framework == "supervised" else 0
    args.iters = args.iters or max(args.epochs * args.steps_per_epoch, floor)
    if args.warmup_iters is None:
        args.warmup_iters = args.warmup_epochs * args.steps_per_epoch
    args.eval_steps = args.eval_every * args.steps_per_epoch if args.eval_every else math.ceil(args.iters / 10)
    args.processes = world
    alone = args.batch_size == 1 and (world == 1 or device.type == "cpu")  # GPUs share BatchNorm's statistics
    if alone and (args.framework == "supervised" or args.warmup_iters):
        raise InputError("--batch-size 1 leaves BatchNorm a single value in a batch of labeled images; use 2 or more")
    if args.framework != "supervised" and args.warmup_iters >= args.iters:
        raise InputError(
            f"the warm-up of {args.warmup_iters} steps leaves no step of {args.iters} for unlabeled images; "
            "lower --warmup-iters"
        )


def find_checkpoint(args, data, rank):
    """With --resume the last checkpoint of --out, if there is one. Raises InputError for another run's folder.

    Another number of processes with the same images a step, another path of the same list, fewer unlabeled images (a
    broken one was taken away) and a lower learning rate continue the run; the latter two are said aloud.
    """
    out, last = Path(args.out), Path(args.out) / "last.pth"
    if not (args.resume and last.exists()):
        return None
    checkpoint = load_checkpoint(last)
    saved, now, changes, said = checkpoint["args"], vars(args), [], []
    ids = {part: [item.id for item in getattr(data, part)] for part in ("labeled", "unlabeled", "val")}
    gone = len(checkpoint["unlabeled"]) - len(ids["unlabeled"])
    if args.framework == "supervised":
        ids["unlabeled"] = checkpoint["unlabeled"]  # it never reads them
    elif gone > 0 and set(ids["unlabeled"]) < set(checkpoint["unlabeled"]):
        said.append(f"{gone} unlabeled images fewer")
        ids["unlabeled"] = checkpoint["unlabeled"]
        epochs = {"steps_per_epoch": True, "eval_steps": True, "iters": args.epochs, "warmup_iters": args.warmup_epochs}
        now |= {name: saved[name] for name, given in epochs.items() if given}  # counted before the images went away
    for name in now.keys() - MAY_CHANGE:
        if saved.get(name) != now[name]:
            lower = name in ("lr", "head_lr") and now[name] < saved[name]
            (said if lower else changes).append(f"{name} was {saved.get(name)} and is {now[name]}")
    images = [some["batch_size"] * some["processes"] for some in (saved, now)]
    if images[0] != images[1]:
        changes.append(f"batch size x processes was {images[0]} and is {images[1]}")
    changes += [f"the {part} images are others" for part in ids if ids[part] != checkpoint.get(part, ids[part])]
    if changes or checkpoint["classes"] != list(data.classes):
        found = ", ".join(sorted(changes)) or "other classes"
        raise InputError(f"--resume: {out} is another run, {found}; use another --out")
    if said and rank == 0:
        print(f"--resume: {', '.join(said)}", file=sys.stderr)
    return checkpoint


def open_run(args, data, first, rank, device):
    """Makes --out, writes args.json, drops the lines of metrics.jsonl after step `first`, says what the run is.

    Returns (the writer of --tensorboard or None, args.json, which stays locked while it is open). Raises InputError if
    another process writes there, or if processes found different checkpoints.
    """
    out, world = Path(args.out), args.processes
    steps = all_reduce(torch.tensor([first, -first], device=device), dist.ReduceOp.MAX)
    if steps[0] != -steps[1]:
        raise InputError(f"--resume: the processes find different checkpoints in {out}; use a shared folder")
    if rank != 0:
        return None, None
    if args.tensorboard:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise InputError("--tensorboard needs a package that is not installed; pip install tensorboard") from error
    git = subprocess.run("git rev-parse HEAD", shell=True, cwd=Path(__file__).parent, capture_output=True, text=True)
    versions = {"python": platform.python_version(), "torch": torch.__version__, "torchvision": torchvision.__version__}
    settled, metrics = vars(args) | versions | {"commit": git.stdout.strip() or None}, out / "metrics.jsonl"
    try:
        (out / "panels").mkdir(parents=True, exist_ok=True)
        lock = open(out / "args.json", "a+")
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the system frees it when this process ends, at any rate
        except OSError as error:
            if error.errno not in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP):  # of a file system without locks
                raise
        if (lock.tell() or (out / "last.pth").exists()) and not args.resume:
            raise InputError(f"{out} already holds a run; continue it with --resume, or choose another --out")
        lock.truncate(0)
        print(json.dumps(settled, indent=2), file=lock, flush=True)
        lines = metrics.read_text().splitlines(keepends=True) if metrics.exists() else []
        whole = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= first]
        metrics.with_suffix(".tmp").write_text("".join(whole))  # a kill may have cut the last line
        os.replace(metrics.with_suffix(".tmp"), metrics)
    except BlockingIOError as error:
        raise InputError(
            f"another process is training in {out}; wait for it, or choose another --out; if its machine is gone, "
            f"remove {out / 'args.json'} and use --resume"
        ) from error
    except OSError as error:
        raise cannot_write(out, error) from error
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    more = f" + {args.batch_size} unlabeled images, the first {args.warmup_iters} of labeled ones only"
    more = " images" if args.framework == "supervised" else more
    labeled, unlabeled, val = len(data.labeled), len(data.unlabeled), len(data.val)
    print(f"{data.name}: {labeled} labeled, {unlabeled} unlabeled, {val} validation images")
    print(f"{args.framework}, {args.backbone} on {world} x {name}; {args.iters} steps of "
          f"{args.batch_size} labeled{more}")
    print(f"{f'continues after step {first}' if first else 'starts'}, writes to {out}", flush=True)
    if args.batch_size == 1 and args.framework != "supervised" and args.cutmix:
        print("warning: with one image per process CutMix has no second image and changes nothing", file=sys.stderr)
    return SummaryWriter(out / "tensorboard", purge_step=first + 1) if args.tensorboard else None, lock


def compiles(device):
    """Whether torch.compile works here; if not, says why in one sentence."""
    try:
        torch.compile(lambda x: x + 1)(torch.ones(1, device=device))
    except Exception as error:  # no C++ compiler, no Triton, a GPU too old
        print(f"warning: trains without --compile ({str(error).splitlines()[0]})", file=sys.stderr)
        return False
    return True


def stop_signals(rank, world):
    """A list that gets the stop signals which come from now on; a second Ctrl-C ends a lone process at once."""
    received, process = [], os.getpid()
    when = "this step or evaluation is done; again: ends at once" if world == 1 else "all processes log the next step"

    def receive(number, _):
        if received and number == signal.SIGINT and world == 1:
            os._exit(128 + number)
        if not received and rank == 0 and os.getpid() == process:  # not a loader's worker, which inherits this
            with contextlib.suppress(BrokenPipeError):
                os.write(2, f"{signal.Signals(number).name}: saves when {when}\n".encode())  # print may be interrupted
        received.append(number)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, receive)
    return received


def write_record(out, board, rank, record):
    """Appends a line to metrics.jsonl, and its numbers to TensorBoard."""
    if rank != 0:
        return
    try:
        with open(out / "metrics.jsonl", "a") as file:
            file.write(json.dumps(record) + "\n")
    except OSError as error:
        raise cannot_write(out / "metrics.jsonl", error) from error
    if board:
        for name, value in record.items():
            if isinstance(value, (int, float)):
                board.add_scalar(f"{record['event']}/{name}", value, record["step"])
        board.flush()


def write_panel(out, board, step, teacher, data, device, args, prior):
    """A picture of the teacher's labels; where it fails, says so, and the run goes on."""
    try:
        picture = panel(teacher, data, panel_items(data), device, vars(args), prior)
        VF.to_pil_image(picture).save(out / "panels" / f"step-{step:06d}.png")
        if board:
            board.add_image("panel", picture, step)
    except (InputError, OSError) as error:
        say(f"warning: no panel of step {step} ({error})", sys.stderr)


def progress(record, args):
    """The log line of one record."""
    minutes, seconds = divmod(round(record["seconds_per_step"] * (args.iters - record["step"])), 60)
    line = f"step {record['step']}/{args.iters}  {minutes}m{seconds:02d}s left  loss {record['loss']:.3f}"
    if "kept" in record:
        line += f" = {record['loss_x']:.3f} + {args.lambda_u:g} x {record['loss_u']:.3f}  alpha {record['alpha']:.2f}"
        line += f"  threshold {record['threshold']:.3f}  kept {record['kept']:.1%} (raw {record['kept_raw']:.1%})"
        if "correct" in record:
            line += f"  correct {record['correct']:.1%} (raw {record['correct_raw']:.1%})"
    return f"{line}  {record['images_per_second']:.1f} images/s"


def not_finite(what, out):
    """The error for a loss or weights that are not finite."""
    last = out / "last.pth"
    good = f"{last} is the last good checkpoint" if last.exists() else "no checkpoint had been written yet"
    return InputError(f"{what}; {good}; lower --lr and --head-lr")


# ----------------------------------------------------------------------------------------------------------------------
# arguments


def fill_presets(args, device):
    """Options left out take the dataset's preset; the command line beats it."""
    sizes = {} if "crop" in PRESETS[args.dataset] else SIZES[device.type]
    preset = PAPER | sizes | PRESETS[args.dataset]
    preset |= DINOV2 if (args.backbone or "").startswith("dinov2") else {}
    preset |= {"floor": 0.0} if args.confidence == "entropy" else {}  # which is never above 0
    for pair in ({"epochs", "iters"}, {"warmup_epochs", "warmup_iters"}):
        if any(getattr(args, name) is not None for name in pair):
            preset = {name: value for name, value in preset.items() if name not in pair}
    for name, value in preset.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.amp is None:  # older GPUs only emulate bfloat16, slowly
        args.amp = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    args.out = args.out or f"runs/{args.dataset}-{Path(args.labeled).stem}-{args.framework}-{args.seed}"


def parse_args(argv=None):
    """The command line. What is None here takes the preset of the dataset."""
    presets = PRESETS | {f"camvid, folder on {device}": sizes for device, sizes in SIZES.items()}
    presets["dinov2_vits14, dinov2_vitb14 [UniMatch V2]"] = DINOV2
    lines = [": ".join((name, ", ".join(f"{key} {value}" for key, value in presets[name].items()))) for name in presets]
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="[preset]: the dataset's, which the command line beats. pascal and cityscapes: Appendix D [paper], but\n"
        "warmup_epochs [authors' code], eval_mode, ohem [common practice], workers, log_every [ours]; others [ours]\n\n"
        + "\n".join(textwrap.fill(line, 118, subsequent_indent="    ") for line in lines),
    )  # fmt: skip
    switch, natural, positive = argparse.BooleanOptionalAction, number(int, 1), number(float, 0, above=True)
    share = number(float, 0, 1)

    add = parser.add_argument_group("data").add_argument
    add("--dataset", choices=DATASETS, default="shapes", help="default: shapes, which are drawn, nothing is downloaded")
    add("--root", default="data", help="folder that holds the dataset, or the dataset's own folder; default: data")
    add("--labeled", help="number of labeled images, a file of their ids, or all [preset]")
    add("--splits", help="folder of published lists, <dataset>/<N>.txt; default: the one beside this file")
    add("--crop", type=number(int, 32), help="side of the square training views, pixels [preset]")
    add("--workers", type=number(int, 0), help="data-loading workers of each process [preset]")

    add = parser.add_argument_group("method").add_argument
    add("--framework", choices=STRONG_VIEWS, help="strong view: CutMix [paper: cutmixseg]; colors too [FixMatch]; two "
        "of these, and complementary dropout [UniMatch V2]; supervised: only labels [preset, else fixmatch]")
    add("--refinement", action=switch, default=True, help="Eqs. 7-10, on by default; without: the baseline [paper]")
    add("--neighborhood", type=lambda text: text if text == "cross" else int(text), default=3,
        choices=(3, 5, 7, "cross"), help="N x N, default 3 [paper]; cross: the four beside the pixel [authors' code]")
    add("--dilation", type=natural, default=1, help="distance of neighbors, pixels; 1 [paper], 4: the logits' [ours]")
    add("--neighbors", type=natural, default=1, help="how many neighbors are united, Table 4a, default 1 [paper]")
    add("--select", choices=("max", "min", "random"), default="max", help="which one, Table 4a, default max [paper]")
    add("--distance-weight", action=switch, default=True, help="beta of Eq. 10, on by default [paper]; without: 1")
    add("--prior", action=switch, default=False, help="Eqs. 15-16, estimated from the labeled images [paper]")
    add("--confidence", choices=("margin", "max", "entropy"), default="margin", help="kappa, Table 5, default margin "
        "[paper]")
    add("--alpha0", type=share, default=0.4, help="share of pixels below the threshold at first, Eq. 6; 0.4 [paper]")
    add("--threshold", type=float, help="fixed, in place of Eq. 6: 0.95 with --confidence max [FixMatch]; refined, it "
        "acts like 0.89 where neighbors agree")
    add("--floor", type=float, help="Eq. 6's threshold is never below it [ours]; 0: none [preset, else 0: paper]")
    add("--lambda-u", type=number(float, 0), default=1.0, help="weight of the unlabeled loss, Eq. 1, default 1 [ours]")
    add("--unsup-norm", choices=("kept", "valid", "authors"), help="divides the sum over the kept pixels: by their "
        "number, few weigh as much as many [paper, Eq. 3]; by all valid pixels, few weigh little [FixMatch]; by "
        "kept^2 / valid, few weigh more than many [authors' code] [preset, else kept]")
    add("--ema", type=share, default=0.99, help="tau of the teacher, Sec. 4.1, default 0.99 [paper]; in the warm-up it "
        "is a copy of the student [authors' code]")
    add("--cutmix", type=share, default=0.5, help="probability of CutMix, default 0.5 [paper], for each image [ours]")
    add("--warmup-epochs", type=number(int, 0), help="epochs with only labeled images [preset]")
    add("--warmup-iters", type=number(int, 0), help="the same in steps, in place of --warmup-epochs [preset]")

    add = parser.add_argument_group("model").add_argument
    add("--backbone", choices=ENCODERS, help="torchvision's encoder, or DINOv2; resnet10 is for CPUs [preset]")
    add("--weights", type=lambda word: "pretrained" if word == "imagenet" else word,
        help="pretrained, none, or a file with the state dict that torchvision or DINOv2 publishes [preset]")
    add("--output-stride", type=int, choices=(16, 8), help="default 16; 8, for more memory [authors' code]")

    add = parser.add_argument_group("optimizer").add_argument
    add("--epochs", type=natural, help="passes over the unlabeled images; supervised: the labeled, 1,000 steps or more "
        "[preset]")
    add("--iters", type=natural, help="steps, in place of --epochs; compares a supervised run at equal length [preset]")
    add("--batch-size", type=natural, help="labeled and unlabeled images each, per process [preset]")
    add("--optimizer", choices=("sgd", "adamw"), help="SGD with momentum 0.9, or AdamW [preset]")
    add("--lr", type=positive, help="learning rate of the encoder [preset]")
    add("--head-lr", type=positive, help="learning rate of everything else [preset]")
    add("--weight-decay", type=number(float, 0), help="of all parameters [preset]")
    add("--sup-loss", choices=("ce", "ohem"), help="of the labeled images; ohem: only their hard pixels [preset]")
    add("--power", type=number(float, 0), default=0.9, help="of the learning rate's decay, default 0.9 [paper]")

    add = parser.add_argument_group("run").add_argument
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: the GPU if there is one")
    add("--amp", action=switch, help="bfloat16 autocast; default: on GPUs that compute in it")
    add("--compile", action=switch, default=False, help="torch.compile teacher, pseudo-labels and, on one GPU, student")
    add("--deterministic", action=switch, default=False, help="ask for deterministic CUDA kernels; the CPU's are")
    add("--seed", type=number(int, 0), default=0, help="random seed, default 0")
    add("--eval-every", type=natural, help="epochs between evaluations; default: a tenth of the run")
    add("--eval-mode", choices=EVAL_MODES, help="original size, sliding windows or a center crop of --crop [preset]")
    add("--log-every", type=natural, help="steps between log lines [preset]")
    add("--save-every", type=number(float, 0), default=10.0, help="minutes between checkpoints, default 10")
    add("--tensorboard", action=switch, default=False, help="log and panels for TensorBoard too")
    add("--out", help="folder of the run; default: runs/<dataset>-<labeled>-<framework>-<seed>")
    add("--resume", action="store_true", help="continue the run in --out; starts it if there is no checkpoint yet")
    args = parser.parse_args(argv)
    if (args.epochs and args.iters) or None not in (args.warmup_epochs, args.warmup_iters):
        parser.error("--epochs and --iters are the same length, as are their --warmup-...; expected one of them")
    if args.prior and args.dilation > 1:
        parser.error("--prior is counted over adjacent pixels; expected --dilation 1 with it")
    if args.output_stride and (args.backbone or "").startswith("dinov2"):
        parser.error(f"--output-stride has no meaning for {args.backbone}, whose patches have 14 pixels; leave it out")
    args.output_stride = args.output_stride or 16
    return args


if __name__ == "__main__":
    run_script(lambda: main(parse_args()))
