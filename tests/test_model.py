"""model.py: shapes, strides, weights from files, and the moving average."""

import pytest
import torch
from torch import nn
from torchvision.models import resnet50

from model import ATROUS_RATES, BACKBONES, DeepLabV3Plus, ema_decay, ema_teacher, replace_stride_with_dilation, resnet


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("output_stride", [16, 8])
def test_logits_have_the_size_of_the_image_and_features_the_stride(backbone, output_stride):
    model = DeepLabV3Plus(backbone, 5, output_stride).eval()
    sizes = {}
    model.aspp.register_forward_hook(
        lambda module, inputs, out: sizes.update(deep=inputs[0].shape[-2:], context=out.shape[1])
    )
    model.low_level.register_forward_hook(lambda module, inputs, out: sizes.update(low=out.shape))
    with torch.no_grad():
        assert model(torch.zeros(1, 3, 65, 97)).shape == (1, 5, 65, 97)
    assert sizes["deep"] == (-(-65 // output_stride), -(-97 // output_stride)) and sizes["context"] == 256
    assert sizes["low"] == (1, 48, 17, 25)
    rates = [branch[0].dilation[0] for branch in model.aspp.convs[1:4]]
    assert tuple(rates) == ATROUS_RATES[output_stride] == {16: (6, 12, 18), 8: (12, 24, 36)}[output_stride]


def test_a_dilated_stage_computes_what_the_strided_one_did_on_a_finer_grid():
    torch.manual_seed(0)
    stage = resnet("resnet18").eval().layer4
    x = torch.randn(1, 256, 16, 16)
    with torch.no_grad():
        strided = stage(x)
        replace_stride_with_dilation(stage, 2)
        assert stage(x).shape[-2:] == x.shape[-2:]
        torch.testing.assert_close(stage(x)[..., ::2, ::2], strided)


@pytest.mark.parametrize("output_stride, dilated", [(16, [False, False, True]), (8, [False, True, True])])
def test_a_dilated_resnet_is_torchvision_s_own(output_stride, dilated):
    ours = DeepLabV3Plus("resnet50", 2, output_stride).backbone
    theirs = resnet50(replace_stride_with_dilation=dilated)
    for name, conv in theirs.named_modules():
        if isinstance(conv, nn.Conv2d):
            mine = ours.get_submodule(name)
            assert (mine.stride, mine.dilation, mine.padding) == (conv.stride, conv.dilation, conv.padding), name


def test_weights_come_from_a_local_file(tmp_path):
    torch.manual_seed(1)
    torch.save(resnet50().state_dict(), tmp_path / "weights.pth")
    wanted = torch.load(tmp_path / "weights.pth", weights_only=True)
    model = DeepLabV3Plus("resnet50", 3, weights=str(tmp_path / "weights.pth"))
    assert all(torch.equal(value, wanted[name]) for name, value in model.backbone.state_dict().items())


class Evil:
    def __reduce__(self):
        return print, ("this must not run",)


def test_weights_that_do_not_fit_get_one_sentence(tmp_path, capsys):
    with pytest.raises(ValueError, match="no such file; expected imagenet, none, or"):
        resnet("resnet18", "nowhere.pth")
    with pytest.raises(ValueError, match="there are no ImageNet weights for resnet10"):
        resnet("resnet10", "imagenet")
    torch.save(resnet50().state_dict(), tmp_path / "other.pth")
    with pytest.raises(ValueError, match="does not hold the state dict of torchvision's resnet18"):
        resnet("resnet18", str(tmp_path / "other.pth"))
    torch.save({"conv1.weight": Evil()}, tmp_path / "evil.pth")
    with pytest.raises(ValueError, match="could not be read safely"):
        resnet("resnet18", str(tmp_path / "evil.pth"))
    assert "must not run" not in capsys.readouterr().out


def test_without_a_network_the_imagenet_weights_get_one_sentence(monkeypatch):
    def offline(*args, **kwargs):
        raise OSError("no route")

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", offline)
    with pytest.raises(
        ValueError, match="could not be downloaded from https.*resnet18.*--weights FILE.*--weights none"
    ):
        resnet("resnet18", "imagenet")


def test_tau_warms_up_to_its_limit():
    assert [ema_decay(n) for n in (0, 1, 3, 98, 99, 1000)] == pytest.approx([0, 0.5, 0.75, 98 / 99, 0.99, 0.99])


def test_the_teacher_is_the_closed_form_of_the_moving_average():
    student = nn.Sequential(nn.Linear(1, 1, bias=False), nn.BatchNorm1d(1))
    teacher = ema_teacher(student, decay=0.7)
    expected = None
    for n, value in enumerate([1.0, 4.0, -2.0, 3.0, 8.0, 8.0]):
        nn.init.constant_(student[0].weight, value)
        student[1].running_mean.fill_(10 * value)
        teacher.update_parameters(student)
        tau = min(1 - 1 / (n + 1), 0.7)
        expected = value if n == 0 else tau * expected + (1 - tau) * value
        assert teacher.module[0].weight.item() == pytest.approx(expected)
        assert teacher.module[1].running_mean.item() == 10 * value  # statistics are copied
    assert not teacher.training and not any(p.requires_grad for p in teacher.parameters())


@pytest.mark.parametrize("upsample", [True, False])
def test_logits_lie_class_after_class_whatever_the_layout_of_the_network(upsample):
    model = DeepLabV3Plus("resnet10", 5).eval().to(memory_format=torch.channels_last)
    assert model(torch.rand(2, 3, 64, 64), upsample=upsample).is_contiguous()
