"""DeepLabv3+ (Chen et al., 2018b) on torchvision's encoders, its EMA teacher, checkpoints and processes.

    student = DeepLabV3Plus("resnet101", num_classes=21, weights="pretrained")
    logits = student(images)                                      # (B,3,H,W) -> (B,21,H,W)
    teacher = copy.deepcopy(student).eval()
    averaged = float_tensors(teacher), float_tensors(student)
    update_teacher(*averaged, ema_decay(updates))                 # after each optimizer step

Encoders, ASPP and the moving average come from torch and torchvision. This file joins them.
"""

import contextlib
import itertools
import math
import os
import pickle
from collections import OrderedDict
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn
from torchvision.models.resnet import BasicBlock, ResNet
from torchvision.models.segmentation.deeplabv3 import ASPP
from torchvision.models.vision_transformer import VisionTransformer
from torchvision.ops import Conv2dNormActivation

from data import MEAN, STD, InputError, rank_and_world


class Encoder(NamedTuple):
    """The stages of a torchvision network that DeepLabv3+ reads, with their channels."""

    shallow: str  # the last stage at stride 4, or an early block of a transformer
    shallow_channels: int
    deep: str  # the last stage that is used
    deep_channels: int
    width: int = 256  # channels of the decoder; Chen et al., 2018b; 64 for CPUs [ours]


ENCODERS = {
    "mobilenet_v2": Encoder("3", 24, "17", 320, width=64),
    "resnet10": Encoder("layer1", 64, "layer4", 512, width=64),  # one block per stage [ours]
    "resnet18": Encoder("layer1", 64, "layer4", 512),
    "resnet50": Encoder("layer1", 256, "layer4", 2048),
    "resnet101": Encoder("layer1", 256, "layer4", 2048),
    "dinov2_vits14": Encoder("encoder_layer_2", 384, "encoder_layer_11", 384),  # [UniMatch V2] feeds four blocks
    "dinov2_vitb14": Encoder("encoder_layer_2", 768, "encoder_layer_11", 768),
}
ATROUS_RATES = {16: (6, 12, 18), 8: (12, 24, 36)}  # by output stride; Chen et al., 2018b


class Stages(nn.Sequential):
    """Modules in a row: x -> (output of the one named `shallow`, output of the last one)."""

    def __init__(self, stages, shallow):
        super().__init__(OrderedDict(stages))
        self.shallow = shallow

    def forward(self, x):
        for name, stage in self.named_children():
            x = stage(x)
            if name == self.shallow:
                shallow = x
        return shallow, x


class DINOv2(VisionTransformer):
    """DINOv2 with patches of 14 pixels (Oquab et al., 2023): images (B,3,H,W) -> (B,C,H/4,W/4), (B,C,H/14,W/14).

    Images of any size are enlarged to whole patches. Its cost grows with the square of the number of patches.
    """

    def __init__(self, shallow, channels):
        super().__init__(518, 14, 12, channels // 64, channels, 4 * channels)
        torch.backends.mha.set_fastpath_enabled(False)  # in evaluation mode it is slower and takes more memory
        self.heads = nn.Identity()  # an unused head would have no gradient
        self.encoder.layers = Stages(self.encoder.layers.named_children(), shallow)

    def forward(self, images):
        height, width = images.shape[-2:]
        rows, columns = math.ceil(height / 14), math.ceil(width / 14)
        images = F.interpolate(images, (14 * rows, 14 * columns), mode="bilinear")
        patches = self.conv_proj(images).flatten(2).mT  # (B,N,C)
        of_token, grid = self.encoder.pos_embedding.split([1, 37 * 37], 1)
        if (rows, columns) != (37, 37):
            scales = [(rows + 0.1) / 37, (columns + 0.1) / 37]  # authors' code: interpolate_offset
            grid = grid.mT.unflatten(2, (37, 37))
            grid = F.interpolate(grid, scale_factor=scales, mode="bicubic").flatten(2).mT
        token = (self.class_token + of_token).expand(len(patches), -1, -1)
        features = self.encoder.layers(torch.cat([token, patches + grid], 1))
        shallow, deep = (self.encoder.ln(x)[:, 1:].mT.unflatten(2, (rows, columns)) for x in features)
        size = [math.ceil(height / 4), math.ceil(width / 4)]
        return F.interpolate(shallow, size, mode="bilinear"), deep


def convert_dinov2(state):
    """Return DINOv2's published state dict as that of `DINOv2`.

    LayerScale's gamma goes into the weights: gamma * (W x + b) = (gamma W) x + gamma b.
    """
    state = {name: value for name, value in state.items() if name != "mask_token"}  # only for pretraining
    for name in [name for name in state if name.endswith(".gamma")]:
        gamma = state.pop(name)
        before = name.replace("ls1.gamma", "attn.proj").replace("ls2.gamma", "mlp.fc2")
        state[f"{before}.weight"] = gamma[:, None] * state[f"{before}.weight"]
        state[f"{before}.bias"] = gamma * state[f"{before}.bias"]
    names = {
        "blocks.": "encoder.layers.encoder_layer_", ".norm1.": ".ln_1.", ".norm2.": ".ln_2.", "norm.": "encoder.ln.",
        ".attn.qkv.": ".self_attention.in_proj_", ".attn.proj.": ".self_attention.out_proj.", ".fc1.": ".0.",
        ".fc2.": ".3.", "cls_": "class_", "pos_embed": "encoder.pos_embedding", "patch_embed.proj": "conv_proj",
    }  # fmt: skip
    for theirs, ours in names.items():
        state = {name.replace(theirs, ours): value for name, value in state.items()}
    return state


def encoder(name, weights="none", output_stride=16):
    """Return an encoder of ENCODERS: images (B,3,H,W) -> (shallow, deep), features at stride 4 and the deepest ones.

    weights: see `load_weights`.
    """
    about = ENCODERS[name]
    if name.startswith("dinov2"):
        net = features = DINOv2(about.shallow, about.deep_channels)
    else:
        net = ResNet(BasicBlock, [1, 1, 1, 1]) if name == "resnet10" else torchvision.models.get_model(name)
        stages = list((net.features if hasattr(net, "features") else net).named_children())
        names = [stage for stage, _ in stages]
        stages = stages[: names.index(about.deep) + 1]
        replace_stride_with_dilation([stage for _, stage in stages], output_stride)
        features = Stages(stages, about.shallow)
    if weights != "none":
        load_weights(net, name, weights)
    return features


def load_weights(net, name, weights):
    """Load pretrained weights into a network whose parameters have torchvision's or DINOv2's names.

    weights: "pretrained" (torchvision's IMAGENET1K_V1 or DINOv2's own, downloaded once), or a file with that state
    dict. No code in the file is run. Raises InputError if no weights are found, or if they do not fit.
    """
    try:
        if weights != "pretrained":
            state = torch.load(weights, map_location="cpu", weights_only=True)
        elif name.startswith("dinov2"):
            url = f"https://dl.fbaipublicfiles.com/dinov2/{name}/{name}_pretrain.pth"
            state = torch.hub.load_state_dict_from_url(url, map_location="cpu", weights_only=True)
        else:
            published = torchvision.models.get_model_weights(name).IMAGENET1K_V1
            state = published.get_state_dict(map_location="cpu", weights_only=True, check_hash=True)
        if name.startswith("dinov2"):
            state = convert_dinov2(state)
        net.load_state_dict(state)
    except Exception as error:  # no network, no file, another network's weights, or none are published
        source = "DINOv2" if name.startswith("dinov2") else "torchvision"
        raise InputError(
            f"--weights {weights} could not be loaded into {name} ({_reason(error)}); expected pretrained (needs "
            f"internet access the first time), none, or a file with {source}'s state dict"
        ) from error


def _reason(error):
    """Return the error in one line; torch.load's own text advises trusting the file, so it is replaced."""
    if isinstance(error, EOFError):
        return "it is empty or cut off"
    if isinstance(error, pickle.UnpicklingError):
        return "it is not a torch.save file, or holds more than tensors and plain values"
    text = str(error) or type(error).__name__
    if text.startswith("Error(s) in loading"):
        return "its tensors have other names or sizes"
    return text.splitlines()[0]


def replace_stride_with_dilation(stages, output_stride):
    """Replace strides beyond output_stride by dilation, in place: the same values on a finer grid."""
    # torchvision's option of this name does the same for Bottleneck ResNets only.
    stride, dilation = 1, 1
    for stage in stages:
        has_stride = any(getattr(module, "stride", 1) in (2, (2, 2)) for module in stage.modules())
        if has_stride and stride < output_stride:
            stride *= 2
        elif has_stride:
            dilation *= 2
        if dilation == 1:
            continue
        for module in stage.modules():
            if not isinstance(module, nn.Conv2d):
                continue
            # The convolution that had the stride reads the previous grid, so it takes the previous dilation.
            rate = dilation // 2 if module.stride == (2, 2) else dilation
            module.stride = (1, 1)
            if module.kernel_size != (1, 1):
                module.dilation = (rate, rate)
                module.padding = tuple(rate * (side // 2) for side in module.kernel_size)


class DeepLabV3Plus(nn.Module):
    """DeepLabv3+: ASPP on the deepest features, joined at stride 4 by the shallow ones.

    backbone: one of ENCODERS; output_stride: 16 or 8, not for DINOv2; weights: see `load_weights`, or "none".
    forward: images (B,3,H,W), normalized -> logits (B,num_classes,H,W), float32, interpolated from stride 4.
    In training mode B must be at least 2, because ASPP's image pooling has BatchNorm on one pixel per image.
    drop (B,deep_channels): multiplies the channels of the deepest features.
    """

    def __init__(self, backbone, num_classes, output_stride=16, weights="none"):
        super().__init__()
        _, shallow_channels, _, self.deep_channels, width = ENCODERS[backbone]
        self.backbone = encoder(backbone, weights, output_stride)
        self.aspp = ASPP(self.deep_channels, ATROUS_RATES[output_stride], width)
        self.low_level = Conv2dNormActivation(shallow_channels, 48, kernel_size=1)
        self.decoder = nn.Sequential(Conv2dNormActivation(width + 48, width), Conv2dNormActivation(width, width))
        self.classifier = nn.Conv2d(width, num_classes, 1)

    def forward(self, images, drop=None):
        shallow, deep = self.backbone(images)
        if drop is not None:
            deep = deep * drop[:, :, None, None]
        low = self.low_level(shallow)  # (B,48,H/4,W/4)
        context = F.interpolate(self.aspp(deep), size=low.shape[-2:], mode="bilinear")  # from (B,width,H/16,W/16)
        logits = self.classifier(self.decoder(torch.cat([context, low], 1)))
        # float32: bfloat16 would give equal margins. Contiguous: refine.py reads class after class.
        return F.interpolate(logits.float().contiguous(), size=images.shape[-2:], mode="bilinear")


# ----------------------------------------------------------------------------------------------------------------------
# the teacher


def ema_decay(updates, decay=0.99):
    """Sec. 4.1: return tau after `updates` updates, min(1 - 1/(updates+1), decay); the first update is a copy."""
    # Paper: tau = 0.99. Authors' code: this warm-up of tau. Here: theirs.
    return min(1 - 1 / (updates + 1), decay)


def float_tensors(network):
    """Return what the teacher averages: the parameters and BatchNorm's running statistics."""
    tensors = itertools.chain(network.parameters(), network.buffers())
    return [tensor for tensor in tensors if tensor.is_floating_point()]


@torch.no_grad()
def update_teacher(teacher, student, tau):
    """Sec. 4.1: theta_t = tau theta_t + (1 - tau) theta_s, for the `float_tensors` of both networks."""
    # Not AveragedModel: it copies a counter to the GPU at each update and waits.
    get_ema_multi_avg_fn(tau)(teacher, student, None)


# ----------------------------------------------------------------------------------------------------------------------
# checkpoints

PREPROCESSING = {"mean": list(MEAN), "std": list(STD)}  # see `data.normalize`; stored in the checkpoint


def save_checkpoint(state, path):
    """Write a dictionary of tensors and plain values, atomically. Raises InputError if it cannot be written."""
    part = path.with_name(f"{path.name}.tmp")
    try:
        with open(part, "wb") as file:
            torch.save(state | {"preprocessing": PREPROCESSING}, file)
            file.flush()
            os.fsync(file.fileno())  # on the disk before it replaces the last good one
        os.replace(part, path)
    except (OSError, RuntimeError) as error:  # torch.save turns a full disk into a RuntimeError
        with contextlib.suppress(OSError):
            part.unlink()
        raise cannot_write(path, error) from error


def cannot_write(path, error):
    """Return the InputError for a file that could not be written."""
    reason = str(error).splitlines()[0]
    return InputError(f"{path} could not be written ({reason}); free disk space or check the folder, then use --resume")


def load_checkpoint(path):
    """Return the dictionary that train.py saved. No code in the file is run. Raises InputError for any other file."""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        if checkpoint["preprocessing"] != PREPROCESSING or not {"args", "classes", "teacher"} <= set(checkpoint):
            raise ValueError("it is of another version")
    except Exception as error:  # torch.load raises many kinds, all of them the file's fault
        reason = _reason(error) if Path(path).is_file() else "it does not exist"
        raise InputError(
            f"checkpoint {path} could not be read ({reason}); expected last.pth or best.pth of this train.py; if only "
            "one of them is damaged, copy the other over it"
        ) from error
    return checkpoint


def load_network(checkpoint, which="teacher"):
    """Return the checkpoint's teacher or student, in evaluation mode on the CPU."""
    args = checkpoint["args"]
    network = DeepLabV3Plus(args["backbone"], len(checkpoint["classes"]), args["output_stride"])
    network.load_state_dict(checkpoint[which])
    return network.eval()


# ----------------------------------------------------------------------------------------------------------------------
# processes

LAUNCHERS = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")  # number of tasks by srun, mpirun and others


def all_reduce(tensor, operation=dist.ReduceOp.SUM):
    """Turn the tensor, in place, into its sum (or another operation) over all processes, and return it."""
    if dist.is_initialized():
        dist.all_reduce(tensor, operation)
    return tensor


def average_statistics(network):
    """Turn BatchNorm's running statistics into their mean over the processes."""
    _, world = rank_and_world()
    if world == 1:
        return
    for statistic in network.buffers():
        if statistic.is_floating_point():
            all_reduce(statistic)
            statistic /= world


def start_processes(wanted="auto", minutes=10):
    """Join the processes that torchrun started, if any, and return this one's device. wanted: auto, cpu or cuda."""
    world = int(os.environ.get("WORLD_SIZE", 1))
    local_rank = int(os.environ.get("LOCAL_RANK", 0)) if world > 1 else 0
    tasks = max(int(os.environ.get(name, 1)) for name in LAUNCHERS)
    if tasks > 1 and "WORLD_SIZE" not in os.environ:
        raise InputError(f"{tasks} tasks without torchrun would each train alone; start one task, with torchrun")
    if world > 1 and "MASTER_ADDR" not in os.environ:
        raise InputError(f"WORLD_SIZE={world} is set, but MASTER_ADDR is not; start with torchrun, or unset WORLD_SIZE")
    if wanted == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda, but PyTorch sees no GPU; use --device cpu, or install a CUDA build and driver")
    device = torch.device("cpu")
    if wanted != "cpu" and torch.cuda.is_available():
        if local_rank >= torch.cuda.device_count():
            raise InputError(
                f"process {local_rank} has no GPU; start at most {torch.cuda.device_count()}, or use --device cpu"
            )
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    if world > 1:
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(minutes=minutes))
    return device
