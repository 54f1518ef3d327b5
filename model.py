"""DeepLabv3+ (Chen et al., 2018b) on torchvision's encoders, its moving-average teacher, checkpoints and processes.

    student = DeepLabV3Plus("resnet101", num_classes=21, weights="pretrained")
    logits = student(images)                                      # (B,3,H,W) -> (B,21,H,W)
    teacher = copy.deepcopy(student).eval()
    averaged = float_tensors(teacher), float_tensors(student)
    update_teacher(*averaged, ema_decay(updates))                 # after each optimizer step

Encoders, ASPP and the moving average are the libraries' own; this file joins them.
"""

import itertools
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
    """What DeepLabv3+ needs to know of a torchvision network: the stages that it reads, with their channels."""

    shallow: str  # the last stage at stride 4, or an early block of a transformer
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
    "dinov2_vits14": Encoder("encoder_layer_2", 384, "encoder_layer_11", 384),  # the blocks of [UniMatch V2]
    "dinov2_vitb14": Encoder("encoder_layer_2", 768, "encoder_layer_11", 768),
}
ATROUS_RATES = {16: (6, 12, 18), 8: (12, 24, 36)}  # by output stride; Chen et al., 2018b


class Stages(nn.Sequential):
    """Modules one after the other: x -> (what the one named `shallow` returns, what the last returns)."""

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

    Images of any size are enlarged to whole patches. Attention compares all of them: 5,476 of 1,024 x 1,024 pixels.
    """

    def __init__(self, shallow, channels):
        super().__init__(518, 14, 12, channels // 64, channels, 4 * channels)
        self.heads = nn.Identity()  # else parameters without a gradient
        self.encoder.layers = Stages(self.encoder.layers.named_children(), shallow)

    def forward(self, images):
        rows, columns = (-(-side // 14) for side in images.shape[-2:])
        x = self.conv_proj(F.interpolate(images, (14 * rows, 14 * columns), mode="bilinear")).flatten(2).mT  # (B,N,C)
        first, grid = self.encoder.pos_embedding.split([1, 37 * 37], 1)
        if (rows, columns) != (37, 37):
            scales = [(side + 0.1) / 37 for side in (rows, columns)]  # authors' code: interpolate_offset
            grid = F.interpolate(grid.mT.unflatten(2, (37, 37)), scale_factor=scales, mode="bicubic").flatten(2).mT
        x = torch.cat([(self.class_token + first).expand(len(x), -1, -1), x + grid], 1)
        shallow, deep = (self.encoder.ln(x)[:, 1:].mT.unflatten(2, (rows, columns)) for x in self.encoder.layers(x))
        return F.interpolate(shallow, [-(-side // 4) for side in images.shape[-2:]], mode="bilinear"), deep


def convert_dinov2(state):
    """DINOv2's published state dict as that of `DINOv2`. LayerScale: gamma * (W x + b) = (gamma W) x + gamma b."""
    state = {name: value for name, value in state.items() if name != "mask_token"}  # only for pretraining
    for name in [name for name in state if name.endswith(".gamma")]:
        gamma, before = state.pop(name), name.replace("ls1.gamma", "attn.proj").replace("ls2.gamma", "mlp.fc2")
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
    """Load pretrained weights into a network of torchvision's or DINOv2's names.

    weights: "pretrained" (torchvision's IMAGENET1K_V1 or DINOv2's own, downloaded once), or a file with that state
    dict. No code in the file is run. Raises InputError if there are none, or if they do not fit.
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
            f"--weights {weights} could not be loaded into {name} ({_reason(error)}); expected pretrained (needs a "
            f"network the first time), none, or a file with {source}'s state dict"
        ) from error


def _reason(error):
    """Return the error in one line; torch.load's own text advises to trust the file, so it is replaced."""
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
            # The convolution that had the stride still sees the grid before it.
            rate = dilation // 2 if module.stride == (2, 2) else dilation
            module.stride = (1, 1)
            if module.kernel_size != (1, 1):
                module.dilation = (rate, rate)
                module.padding = tuple(rate * (side // 2) for side in module.kernel_size)


class DeepLabV3Plus(nn.Module):
    """DeepLabv3+: ASPP on the deepest features, joined at stride 4 by the shallow ones.

    backbone: one of ENCODERS; output_stride 16 or 8, not for DINOv2; weights: see `encoder`.
    forward: images (B,3,H,W), normalized -> logits (B,num_classes,H,W), float32, interpolated from stride 4, where they
    are decided. In training mode B must be at least 2, for ASPP's image pooling has BatchNorm on one pixel per image.
    drop (B,deep_channels): multiplies the channels of the deepest features [UniMatch V2].
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
        part.unlink(missing_ok=True)
        raise cannot_write(path, error) from error


def cannot_write(path, error):
    """Return the InputError for a file that could not be written."""
    reason = str(error).splitlines()[0]
    return InputError(f"{path} could not be written ({reason}); make room or mend the folder, then use --resume")


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

def all_reduce(tensor, operation=dist.ReduceOp.SUM):
    """Turn the tensor, in place, into its sum (or another operation) over all processes, and return it."""
    if dist.is_initialized():
        dist.all_reduce(tensor, operation)
    return tensor


def average_statistics(network):
    """Turn BatchNorm's running statistics into their mean over the processes."""
    _, world = rank_and_world()
    for statistic in network.buffers():
        if statistic.is_floating_point():
            all_reduce(statistic)
            statistic /= world


def start_processes(wanted="auto", minutes=10):
    """Join the processes that torchrun started, if any, and return this one's device. wanted: auto, cpu or cuda."""
    world = int(os.environ.get("WORLD_SIZE", 1))
    local_rank = int(os.environ.get("LOCAL_RANK", 0)) if world > 1 else 0
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
