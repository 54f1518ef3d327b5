"""DeepLabv3+ (Chen et al., 2018b) on torchvision's encoders, its moving-average teacher, checkpoints and processes.

    student = DeepLabV3Plus("resnet101", num_classes=21, weights="imagenet")
    logits = student(images)                                      # (B,3,H,W) -> (B,21,H,W)
    teacher = copy.deepcopy(student).eval()
    averaged = float_tensors(teacher), float_tensors(student)
    update_teacher(*averaged, ema_decay(updates))                 # after each optimizer step

Encoders, ASPP and the moving average are the libraries' own; this file joins them.
"""

import errno
import itertools
import os
import pickle
import sys
from collections import OrderedDict
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from torch import nn
from torch.distributed.rendezvous import rendezvous
from torch.optim.swa_utils import get_ema_multi_avg_fn
from torchvision.models.resnet import BasicBlock, ResNet
from torchvision.models.segmentation.deeplabv3 import ASPP
from torchvision.ops import Conv2dNormActivation

from data import MEAN, STD, InputError


class Encoder(NamedTuple):
    """What DeepLabv3+ needs to know of a torchvision network: the stages that it reads, with their channels."""

    shallow: str  # the last stage at stride 4
    shallow_channels: int
    deep: str  # the last stage of all
    deep_channels: int
    width: int = 256  # channels of the decoder; Chen et al., 2018b; 64 for CPUs [ours]


ENCODERS = {
    "mobilenet_v2": Encoder("3", 24, "17", 320, width=64),
    "resnet10": Encoder("layer1", 64, "layer4", 512, width=64),  # one block per stage [ours]
    "resnet18": Encoder("layer1", 64, "layer4", 512),
    "resnet50": Encoder("layer1", 256, "layer4", 2048),
    "resnet101": Encoder("layer1", 256, "layer4", 2048),
}
ATROUS_RATES = {16: (6, 12, 18), 8: (12, 24, 36)}  # by output stride; Chen et al., 2018b


def _reason(error):
    """torch.load's error in few words; its own run over lines and advise to trust the file."""
    if isinstance(error, pickle.UnpicklingError):
        return "it is not a torch.save file, or holds more than tensors and plain values"
    return (str(error) or type(error).__name__).splitlines()[0]


def encoder(name, weights="none"):
    """The stages of a torchvision network up to its deepest features, as an nn.Sequential under their own names.

    weights: "imagenet" (torchvision's IMAGENET1K_V1, downloaded once), "none", or a file that holds the state dict of
    the whole torchvision network. Raises InputError where there are none, or they do not fit.
    """
    net = ResNet(BasicBlock, [1, 1, 1, 1]) if name == "resnet10" else torchvision.models.get_model(name)
    try:
        if weights == "imagenet":
            net.load_state_dict(torchvision.models.get_model_weights(name).IMAGENET1K_V1.get_state_dict())
        elif weights != "none":
            net.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
    except Exception as error:  # no network, no file, another network's weights, or no weights at all
        reason = _reason(error)
        raise InputError(
            f"--weights {weights} could not be loaded into torchvision's {name} ({reason}); expected imagenet (needs a "
            "network the first time), none, or a file with its state dict"
        ) from error
    stages = list((net.features if hasattr(net, "features") else net).named_children())
    names = [stage for stage, _ in stages]
    return nn.Sequential(OrderedDict(stages[: names.index(ENCODERS[name].deep) + 1]))


def replace_stride_with_dilation(stages, output_stride):
    """Replaces strides beyond output_stride by dilation, in place: the same values on a finer grid."""
    # torchvision's option of this name does the same for Bottleneck ResNets only; a test holds both side by side.
    stride, dilation = 1, 1
    for stage in stages:
        strided = any(getattr(module, "stride", 1) in (2, (2, 2)) for module in stage.modules())
        if strided and stride == output_stride:
            dilation *= 2
        elif strided:
            stride *= 2
        for module in stage.modules() if dilation > 1 else ():
            if isinstance(module, nn.Conv2d):
                # The convolution that had the stride still sees the grid before it.
                rate = dilation // 2 if module.stride == (2, 2) else dilation
                module.stride = (1, 1)
                if module.kernel_size == (3, 3):
                    module.dilation = module.padding = (rate, rate)


class DeepLabV3Plus(nn.Module):
    """DeepLabv3+: ASPP on the deepest features, joined at stride 4 by the shallow ones.

    backbone: one of ENCODERS; output_stride 16 or 8; weights: see `encoder`.
    drop (B,C): multiplies the channels of the deepest features [UniMatch V2].
    forward: images (B,3,H,W), normalized -> logits (B,num_classes,H,W), float32, interpolated from stride 4, where they
    are decided. In training mode B must be at least 2, for ASPP's image pooling has BatchNorm on one pixel per image.
    """

    def __init__(self, backbone, num_classes, output_stride=16, weights="none"):
        super().__init__()
        self.shallow, shallow_channels, _, deep_channels, width = ENCODERS[backbone]
        self.deep_channels = deep_channels
        self.backbone = encoder(backbone, weights)
        replace_stride_with_dilation(self.backbone, output_stride)
        self.aspp = ASPP(deep_channels, ATROUS_RATES[output_stride], width)
        self.low_level = Conv2dNormActivation(shallow_channels, 48, kernel_size=1)
        self.decoder = nn.Sequential(Conv2dNormActivation(width + 48, width), Conv2dNormActivation(width, width))
        self.classifier = nn.Conv2d(width, num_classes, 1)

    def forward(self, images, drop=None):
        x = images
        for name, stage in self.backbone.named_children():
            x = stage(x)
            if name == self.shallow:
                low = self.low_level(x)  # (B,48,H/4,W/4)
        if drop is not None:
            x = x * drop[:, :, None, None]
        context = F.interpolate(self.aspp(x), size=low.shape[-2:], mode="bilinear")  # from (B,width,H/16,W/16)
        logits = self.classifier(self.decoder(torch.cat([context, low], 1)))
        # float32, because bfloat16 would tie the margins; contiguous, because refine.py goes from class to class.
        return F.interpolate(logits.float().contiguous(), size=images.shape[-2:], mode="bilinear")


# ----------------------------------------------------------------------------------------------------------------------
# the teacher


def ema_decay(updates, decay=0.99):
    """tau of Sec. 4.1 after so many updates: min(1 - 1/(updates+1), decay); the first update is a copy."""
    # Paper: tau = 0.99. Authors' code: this warm-up of tau. Here: theirs.
    return min(1 - 1 / (updates + 1), decay)


def float_tensors(network):
    """What the teacher averages: the list of parameters and BatchNorm's running statistics."""
    return [tensor for tensor in itertools.chain(network.parameters(), network.buffers()) if tensor.is_floating_point()]


@torch.no_grad()
def update_teacher(teacher, student, tau):
    """theta_t = tau theta_t + (1 - tau) theta_s, Sec. 4.1, of both networks' `float_tensors`."""
    # AveragedModel copies its counter to the device at each update, and a GPU would wait for it.
    get_ema_multi_avg_fn(tau)(teacher, student, None)


# ----------------------------------------------------------------------------------------------------------------------
# checkpoints

PREPROCESSING = {"mean": list(MEAN), "std": list(STD)}  # see `data.normalize`; travels in the checkpoint


def cannot_write(path, error):
    """The InputError for a system's error of writing; torch.save turns that of a full disk into a RuntimeError."""
    advice = {errno.ENOENT: "the folder is gone; make it again", errno.ENOTDIR: "a part of the path is a file"}
    advice |= dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), "it is read-only; choose a folder of your own")
    what = advice.get(getattr(error, "errno", None), "make room")
    kept = "the one before is kept, " if path.suffix == ".pth" and path.exists() else ""
    return InputError(f"{path} could not be written ({str(error).splitlines()[0]}): {kept}{what}, then use --resume")


def save_checkpoint(state, path):
    """Atomic write of a dictionary of tensors and plain values. Raises InputError if it cannot be written."""
    part = path.with_name(f"{path.name}.tmp")
    try:
        with open(part, "wb") as file:
            torch.save(state | {"preprocessing": PREPROCESSING}, file)
            file.flush()
            os.fsync(file.fileno())  # on the disk before it replaces the last good one
        os.replace(part, path)
    except (OSError, RuntimeError) as error:
        part.unlink(missing_ok=True)
        raise cannot_write(path, error) from error


def load_checkpoint(path):
    """The dictionary that train.py saved; no code in the file is run. Raises InputError where it is none."""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        if checkpoint["preprocessing"] != PREPROCESSING or not {"args", "classes", "teacher"} <= set(checkpoint):
            raise ValueError("it is of another version")
    except Exception as error:  # torch.load raises many kinds, all of them the file's fault
        reason = _reason(error) if Path(path).is_file() else "it is not there"
        raise InputError(
            f"checkpoint {path} could not be read ({reason}); expected last.pth or best.pth of this train.py"
        ) from error
    return checkpoint


def load_network(checkpoint, which="teacher"):
    """The checkpoint's teacher or student, in evaluation mode on the CPU."""
    args = checkpoint["args"]
    network = DeepLabV3Plus(args["backbone"], len(checkpoint["classes"]), args["output_stride"])
    network.load_state_dict(checkpoint[which])
    return network.eval()


# ----------------------------------------------------------------------------------------------------------------------
# processes

WAIT = 600  # seconds, for the other processes to start



def all_reduce(tensor, operation=dist.ReduceOp.SUM):
    """The tensor, which becomes, in place, its sum (or other operation) over all processes."""
    if dist.is_initialized():
        dist.all_reduce(tensor, operation)
    return tensor


def average_statistics(network, world):
    """BatchNorm's running statistics become their mean over the processes."""
    for statistic in network.buffers():
        if statistic.is_floating_point():
            dist.all_reduce(statistic)
            statistic /= world


def start_processes(wanted="auto"):
    """Joins the processes of torchrun, if it started this one: (rank, world, device). wanted: auto, cpu or cuda."""
    names, torchrun = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"), "TORCHELASTIC_RUN_ID" in os.environ
    rank, world, local = (int(os.environ.get(name, 0)) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    world = max(world, 1)
    missing = [name for name in names if name not in os.environ]
    if world > 1 and missing:
        raise InputError(
            f"WORLD_SIZE={world} is in the environment, {', '.join(missing)} not; start with torchrun, or unset it"
        )
    if wanted == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda, but PyTorch sees no GPU; use --device cpu, or a CUDA build and driver")
    device = torch.device("cpu")
    if wanted != "cpu" and torch.cuda.is_available():
        if torch.cuda.device_count() == 1 and not torchrun:
            local = 0  # a scheduler that shows each process only its own GPU
        if local >= torch.cuda.device_count():
            raise InputError(
                f"process {local} has no GPU of its own; start at most {torch.cuda.device_count()}, or use --device cpu"
            )
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    if world > 1:
        if not torchrun:
            given = ", ".join(f"{name}={os.environ[name]}" for name in names)
            print(f"waits up to {WAIT} s for {world} processes, as the environment says: {given}", file=sys.stderr)
        # On one machine torchrun --max-restarts keeps its store, and in it the addresses of processes that are gone.
        alone = os.environ.get("GROUP_WORLD_SIZE") == "1"
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT") if alone else None
        backend = "nccl" if device.type == "cuda" else "gloo"
        try:
            store = next(rendezvous("env://", timeout=timedelta(seconds=WAIT)))[0]
            store = dist.PrefixStore(f"attempt {attempt}", store)
            dist.init_process_group(backend, store=store, rank=rank, world_size=world)
        except dist.DistError as error:
            raise InputError(f"{world} processes did not meet in {WAIT} s; start all, or unset WORLD_SIZE") from error
    return rank, world, device
