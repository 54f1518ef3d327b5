"""DeepLabv3+ (Chen et al., 2018b) on torchvision's ResNets, and its moving-average teacher.

    student = DeepLabV3Plus("resnet101", num_classes=21, weights="imagenet")
    logits = student(images)                                      # (B,3,H,W) -> (B,21,H,W)
    teacher = ema_teacher(student, decay=0.99)
    teacher.update_parameters(student)                            # after each optimizer step

Backbone, ASPP and moving average are the libraries' own; this file joins them.
"""

from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torchvision.models.resnet import BasicBlock, ResNet
from torchvision.models.segmentation.deeplabv3 import ASPP
from torchvision.ops import Conv2dNormActivation

BACKBONES = ("resnet10", "resnet18", "resnet50", "resnet101")
ATROUS_RATES = {16: (6, 12, 18), 8: (12, 24, 36)}  # by output stride; Chen et al., 2018b


def resnet(name, weights="none"):
    """One of torchvision's ResNets. "resnet10" is its ResNet class with one BasicBlock per stage [ours, for CPUs].

    weights: "imagenet" (torchvision's IMAGENET1K_V1, downloaded once), "none", or a file that holds the state dict of
    the same torchvision ResNet. Raises ValueError where there are none, or they do not fit.
    """
    net = ResNet(BasicBlock, [1, 1, 1, 1]) if name == "resnet10" else torchvision.models.get_model(name)
    if weights == "none":
        return net
    if weights == "imagenet":
        if name == "resnet10":
            raise ValueError("there are no ImageNet weights for resnet10; use --weights none or another --backbone")
        enum = torchvision.models.get_model_weights(name).IMAGENET1K_V1
        try:
            state = enum.get_state_dict(progress=True, check_hash=True)
        except (OSError, RuntimeError) as error:  # no network; or another hash than torchvision's
            raise ValueError(
                f"the ImageNet weights of {name} could not be downloaded from {enum.url} ({error}); "
                "download that file elsewhere and give --weights FILE, or train from scratch with --weights none"
            ) from error
    else:
        if not Path(weights).is_file():
            raise ValueError(f"--weights {weights}: no such file; expected imagenet, none, or a ResNet's state dict")
        try:
            state = torch.load(weights, map_location="cpu", weights_only=True)
        except Exception as error:  # torch.load raises many kinds, all of them the file's fault
            raise ValueError(
                f"--weights {weights} could not be read safely as a state dict ({type(error).__name__})"
            ) from error
    try:
        net.load_state_dict(state)
    except (RuntimeError, TypeError, AttributeError) as error:
        raise ValueError(f"--weights {weights} does not hold the state dict of torchvision's {name}") from error
    return net


def replace_stride_with_dilation(stage, dilation):
    """Turns a ResNet stage of stride 2 into one of stride 1 that computes the same values on the finer grid.

    dilation: 2 for the first stage that is changed, 4 for the next. The 3x3 convolution that had the stride still sees
    the grid before it, so it keeps half of that dilation.
    """
    # torchvision's option of this name does the same, for Bottleneck blocks alone; a test holds both side by side.
    for module in stage.modules():
        if isinstance(module, nn.Conv2d):
            rate = dilation // 2 if module.stride == (2, 2) else dilation
            module.stride = (1, 1)
            if module.kernel_size == (3, 3):
                module.dilation = module.padding = (rate, rate)


class DeepLabV3Plus(nn.Module):
    """DeepLabv3+: ASPP on the deepest features, joined at stride 4 by the shallow ones.

    backbone: one of BACKBONES; output_stride 16 or 8; weights: see `resnet`.
    forward: images (B,3,H,W), normalized -> logits (B,num_classes,H,W), float32; without upsample
    (B,num_classes,H/4,W/4), which is where they are decided. In training mode B must be at least 2, because ASPP's image
    pooling has BatchNorm on a single pixel per image.
    """

    def __init__(self, backbone, num_classes, output_stride=16, weights="none"):
        super().__init__()
        if output_stride not in ATROUS_RATES:
            raise ValueError(f"output stride {output_stride} is unknown; expected 16 or 8")
        self.backbone = resnet(backbone, weights)
        deep, low = self.backbone.fc.in_features, 64 * self.backbone.layer1[-1].expansion
        del self.backbone.fc, self.backbone.avgpool
        if output_stride == 8:
            replace_stride_with_dilation(self.backbone.layer3, 2)
        replace_stride_with_dilation(self.backbone.layer4, 32 // output_stride)
        self.aspp = ASPP(deep, ATROUS_RATES[output_stride], 256)
        self.low_level = Conv2dNormActivation(low, 48, kernel_size=1)
        self.decoder = nn.Sequential(Conv2dNormActivation(256 + 48, 256), Conv2dNormActivation(256, 256))
        self.classifier = nn.Conv2d(256, num_classes, 1)

    def forward(self, x, upsample=True):
        net = self.backbone
        stem = net.maxpool(net.relu(net.bn1(net.conv1(x))))
        low = net.layer1(stem)  # (B,256,H/4,W/4); 64 channels in the BasicBlock ResNets
        deep = net.layer4(net.layer3(net.layer2(low)))  # (B,2048,H/16,W/16); 512 likewise
        low = self.low_level(low)
        context = F.interpolate(self.aspp(deep), size=low.shape[-2:], mode="bilinear")
        logits = self.classifier(self.decoder(torch.cat([context, low], 1)))
        # float32, because bfloat16 would tie the margins; class after class, as all that follows goes through them.
        logits = logits.float().contiguous()
        return F.interpolate(logits, size=x.shape[-2:], mode="bilinear") if upsample else logits


def ema_decay(updates, decay=0.99):
    """tau of Sec. 4.1 after so many updates: min(1 - 1/(updates+1), decay); the first update is a copy."""
    # Paper: tau = 0.99. Authors' code: this warm-up of tau. Here: theirs.
    return min(1 - 1 / (updates + 1), decay)


class Teacher(AveragedModel):
    """The moving average of a student: theta_t = tau theta_t + (1 - tau) theta_s, Sec. 4.1; BatchNorm statistics are copied."""

    def __init__(self, student, decay):
        super().__init__(student)
        self.decay = decay

    @torch.no_grad()
    def update_parameters(self, student):
        """One update, without waiting for the device: the library's own copies its counter there each time."""
        average = get_ema_multi_avg_fn(ema_decay(int(self.n_averaged), self.decay))  # the counter is on the CPU
        average([*self.module.parameters()], [*student.parameters()], None)
        buffers = list(zip(self.module.buffers(), student.buffers()))
        for kind in {buffer.dtype for buffer, _ in buffers}:  # one launch for each; mixed, they are copied one by one
            torch._foreach_copy_(*map(list, zip(*(pair for pair in buffers if pair[0].dtype == kind))))
        self.n_averaged += 1


def ema_teacher(student, decay=0.99):
    """The teacher of a student that is on its device already: a copy, in evaluation mode. Returns an AveragedModel."""
    return Teacher(student, decay).requires_grad_(False).eval()


def average_batchnorm(model, world):
    """Averages BatchNorm's running statistics over the processes; on CUDA SyncBatchNorm keeps them equal already."""
    buffers = [buffer for buffer in model.buffers() if buffer.is_floating_point()]
    flat = torch.cat([buffer.flatten() for buffer in buffers])
    dist.all_reduce(flat)
    for buffer, mean in zip(buffers, (flat / world).split([buffer.numel() for buffer in buffers])):
        buffer.copy_(mean.view_as(buffer))
