"""model.py: sizes, strides, weights from files, the moving average, checkpoints."""

import copy
import pickle
import resource

import pytest
import torch
from torch import nn
from torchvision.models import mobilenet_v2, resnet18, resnet50

import model as M
from data import InputError
from model import ENCODERS, DeepLabV3Plus, ema_decay, encoder, replace_stride_with_dilation, update_teacher


def features(network, image):
    """Runs a network in evaluation mode: (shallow features, deep features, ASPP's output, logits)."""
    seen = {}
    network.low_level.register_forward_hook(lambda module, inputs, out: seen.update(shallow=inputs[0]))
    network.aspp.register_forward_hook(lambda module, inputs, out: seen.update(deep=inputs[0], context=out))
    with torch.no_grad():
        logits = network.eval()(image)
    return seen["shallow"], seen["deep"], seen["context"], logits


@pytest.mark.parametrize("backbone", ENCODERS)
@pytest.mark.parametrize("output_stride, rates", [(16, (6, 12, 18)), (8, (12, 24, 36))])
def test_logits_have_the_size_of_the_image_and_features_the_stride(backbone, output_stride, rates):
    network, about = DeepLabV3Plus(backbone, 5, output_stride), ENCODERS[backbone]
    shallow, deep, context, logits = features(network, torch.zeros(1, 3, 65, 97))
    grid = (-(-65 // output_stride), -(-97 // output_stride))
    assert shallow.shape == (1, about.shallow_channels, 17, 25) and deep.shape == (1, about.deep_channels, *grid)
    assert context.shape == (1, about.width, *grid) and logits.shape == (1, 5, 65, 97)
    assert tuple(branch[0].dilation[0] for branch in network.aspp.convs[1:4]) == rates


def test_mobilenet_is_read_at_24_channels_of_stride_4_and_320_of_stride_16():
    shallow, deep, *_ = features(DeepLabV3Plus("mobilenet_v2", 2), torch.zeros(1, 3, 64, 64))
    assert shallow.shape == (1, 24, 16, 16) and deep.shape == (1, 320, 4, 4)


def test_logits_are_float32_and_lie_class_after_class_whatever_the_layout_and_type_of_the_network():
    network = DeepLabV3Plus("resnet10", 5).eval().to(memory_format=torch.channels_last)
    with torch.autocast("cpu", torch.bfloat16):
        logits = network(torch.rand(2, 3, 64, 64))
    assert logits.is_contiguous() and logits.dtype == torch.float32


@pytest.mark.parametrize(
    "stages, channels",
    [(lambda: [resnet18().layer4], 256), (lambda: list(mobilenet_v2().features[14:18]), 96)],
    ids=["resnet18", "mobilenet_v2"],
)
def test_a_dilated_stage_computes_what_the_strided_one_did_on_a_finer_grid(stages, channels):
    torch.manual_seed(0)
    stages, x = stages(), torch.randn(1, channels, 16, 16)
    run = nn.Sequential(*stages).eval()
    with torch.no_grad():
        strided = run(x)
        replace_stride_with_dilation(stages, 1)
        assert strided.shape[-2:] == (8, 8) and run(x).shape[-2:] == (16, 16)
        torch.testing.assert_close(run(x)[..., ::2, ::2], strided)


@pytest.mark.parametrize("output_stride, dilated", [(16, [False, False, True]), (8, [False, True, True])])
def test_a_dilated_resnet_is_torchvision_s_own_under_torchvision_s_names(output_stride, dilated):
    ours = DeepLabV3Plus("resnet50", 2, output_stride).backbone
    theirs = resnet50(replace_stride_with_dilation=dilated)
    for name, conv in theirs.named_modules():
        if isinstance(conv, nn.Conv2d):
            mine = ours.get_submodule(name)
            assert (mine.stride, mine.dilation, mine.padding) == (conv.stride, conv.dilation, conv.padding), name


@pytest.mark.parametrize(
    "name, build, below, one",
    [
        ("resnet50", resnet50, "", "layer1.0.conv1.weight"),
        ("mobilenet_v2", mobilenet_v2, "features.", "3.conv.0.0.weight"),
    ],
)
def test_weights_come_from_a_file_of_torchvision_s_state_dict(tmp_path, name, build, below, one):
    wanted, file = build().state_dict(), str(tmp_path / "weights.pth")
    torch.save(wanted, file)
    backbone = DeepLabV3Plus(name, 3, weights=file).backbone.state_dict()
    assert one in backbone and all(torch.equal(value, wanted[below + key]) for key, value in backbone.items())


class Evil:
    def __reduce__(self):
        return print, ("this must not run",)


def one_sentence(call, says):
    """Asserts that the call raises an InputError of one line, which matches and advises nobody to trust a file."""
    with pytest.raises(InputError, match=says) as error:
        call()
    message = str(error.value)
    assert len(message.splitlines()) == 1 and "trust" not in message and "\x1b" not in message, message


def test_weights_that_do_not_fit_get_one_sentence_and_run_no_code(tmp_path, capsys):
    torch.save(resnet50().state_dict(), tmp_path / "other.pth")
    torch.save({"conv1.weight": Evil()}, tmp_path / "evil.pth")
    (tmp_path / "text.pth").write_text("no weights")
    (tmp_path / "empty.pth").touch()
    for file in ("other.pth", "evil.pth", "text.pth", "empty.pth", "nowhere.pth"):
        says = rf"--weights \S+{file} could not be loaded into torchvision's resnet18 \(.+\); expected imagenet"
        one_sentence(lambda: encoder("resnet18", str(tmp_path / file)), says)
    one_sentence(lambda: encoder("resnet10", "imagenet"), "--weights imagenet could not be loaded into .* resnet10")
    assert "must not run" not in capsys.readouterr().out


def test_without_a_network_the_imagenet_weights_get_one_sentence(monkeypatch):
    def offline(*args, **kwargs):
        raise OSError("no route to host")

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", offline)
    says = r"resnet18 \(no route to host\); .*needs a network the first time"
    one_sentence(lambda: encoder("resnet18", "imagenet"), says)


def test_another_encoder_needs_one_row(monkeypatch):
    monkeypatch.setitem(ENCODERS, "resnet34", M.Encoder("layer1", 64, "layer4", 512))
    monkeypatch.setitem(ENCODERS, "mobilenet_v3_large", M.Encoder("3", 24, "15", 160, width=64))
    for name in ("resnet34", "mobilenet_v3_large"):
        shallow, deep, _, logits = features(DeepLabV3Plus(name, 3), torch.zeros(1, 3, 64, 96))
        assert shallow.shape[-2:] == (16, 24) and deep.shape[-2:] == (4, 6) and logits.shape == (1, 3, 64, 96)


# ----------------------------------------------------------------------------------------------------------------------
# the teacher


def test_tau_warms_up_to_its_limit():
    assert [ema_decay(n) for n in (0, 1, 3, 98, 99, 1000)] == pytest.approx([0, 0.5, 0.75, 98 / 99, 0.99, 0.99])
    assert ema_decay(9, 0.5) == 0.5


def test_the_teacher_is_the_closed_form_of_the_moving_average():
    student = nn.Sequential(nn.Linear(1, 1, bias=False), nn.BatchNorm1d(1))
    teacher = copy.deepcopy(student).eval().requires_grad_(False)
    expected = None
    for n, value in enumerate([1.0, 4.0, -2.0, 3.0, 8.0, 8.0]):
        nn.init.constant_(student[0].weight, value)
        student[1].running_mean.fill_(10 * value)
        student[1].running_var.fill_(value**2)
        student[1].num_batches_tracked += 1
        tau = ema_decay(n, 0.7)
        update_teacher(teacher, student, tau)
        new = torch.tensor([value, 10 * value, value**2])
        expected = new if n == 0 else tau * expected + (1 - tau) * new  # the first update is a copy
        averaged = torch.cat([teacher[0].weight[0], teacher[1].running_mean, teacher[1].running_var])
        torch.testing.assert_close(averaged, expected)
        assert teacher[1].num_batches_tracked == 0  # whole numbers are no average
    assert student[0].weight.item() == 8 and student[0].weight.requires_grad


# ----------------------------------------------------------------------------------------------------------------------
# checkpoints


def checkpoint(**changes):
    weights = {"student": torch.rand(20_000), "teacher": torch.rand(20_000)}
    return {"args": {"lr": 0.1}, "classes": ["a", "b"], "step": 1} | weights | changes


def test_a_checkpoint_is_read_as_it_was_written(tmp_path):
    state = checkpoint()
    M.save_checkpoint(state, tmp_path / "last.pth")
    loaded = M.load_checkpoint(tmp_path / "last.pth")
    assert [*tmp_path.iterdir()] == [tmp_path / "last.pth"]
    assert loaded.pop("preprocessing") == {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
    assert loaded.keys() == state.keys() and torch.equal(loaded["teacher"], state["teacher"])
    assert (loaded["args"], loaded["classes"], loaded["step"]) == ({"lr": 0.1}, ["a", "b"], 1)


def refuse(handle):
    raise PermissionError("not permitted")


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("full", [True, False], ids=["full", "not to be written to"])
def test_a_full_disk_keeps_the_last_good_checkpoint(tmp_path, monkeypatch, full, before):
    last = tmp_path / "last.pth"
    if before:
        M.save_checkpoint(checkpoint(), last)
    content = last.read_bytes() if before else None
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    if full:
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
    else:  # a test that runs as root may write everywhere
        monkeypatch.setattr(M.os, "fsync", refuse)
    try:
        kept = "the one before is kept" if before else "there was none before"
        says = rf"last\.pth could not be written \(.+\), {kept}; make room, then use --resume"
        one_sentence(lambda: M.save_checkpoint(checkpoint(step=2), last), says)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [*tmp_path.iterdir()] == ([last] if before else [])
    assert not before or last.read_bytes() == content


def test_a_bad_checkpoint_gets_one_sentence_and_runs_no_code(tmp_path, capsys):
    gray = {"preprocessing": {"mean": [0.5] * 3, "std": [1.0] * 3}}
    M.save_checkpoint(checkpoint(), tmp_path / "good.pth")
    foreign = resnet18().state_dict()
    bad = {"evil": checkpoint(args=Evil()), "list": [1], "foreign": foreign, "gray": checkpoint() | gray}
    for name, content in bad.items():
        torch.save(content, tmp_path / f"{name}.pth")
    M.save_checkpoint({"args": {}, "classes": []}, tmp_path / "no teacher.pth")
    (tmp_path / "pickle.pth").write_bytes(pickle.dumps(Evil(), protocol=2))
    (tmp_path / "truncated.pth").write_bytes((tmp_path / "good.pth").read_bytes()[:1000])
    (tmp_path / "empty.pth").touch()
    for name in ("evil", "list", "foreign", "gray", "no teacher", "pickle", "truncated", "empty"):
        says = rf"checkpoint .*{name}\.pth could not be read \(.+\); expected last.pth or best.pth of this train.py"
        one_sentence(lambda: M.load_checkpoint(tmp_path / f"{name}.pth"), says)
    for place in (tmp_path / "none.pth", tmp_path):
        one_sentence(lambda: M.load_checkpoint(place), r"could not be read \(it is not there\)")
    assert "must not run" not in capsys.readouterr().out


def test_a_checkpoint_s_networks_are_those_that_were_trained(tmp_path):
    args, names = {"backbone": "resnet10", "output_stride": 8}, ("student", "teacher")
    networks = {name: DeepLabV3Plus("resnet10", 3, 8).eval() for name in names}
    states = {name: networks[name].state_dict() for name in names}
    M.save_checkpoint({"args": args, "classes": ["a", "b", "c"]} | states, tmp_path / "last.pth")
    loaded, image = M.load_checkpoint(tmp_path / "last.pth"), torch.rand(1, 3, 40, 50)
    for name in names:
        network = M.load_network(loaded, name)
        assert not network.training and torch.equal(network(image), networks[name](image))


# ----------------------------------------------------------------------------------------------------------------------
# processes


def test_without_torchrun_there_is_one_process_and_a_gpu_is_only_asked_for_where_there_is_one(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    assert M.start_processes("cpu") == (0, 1, torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert M.start_processes("auto") == (0, 1, torch.device("cpu"))
    one_sentence(lambda: M.start_processes("cuda"), "--device cuda, but PyTorch sees no GPU; use --device cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("LOCAL_RANK", "1")
    one_sentence(lambda: M.start_processes("auto"), "process 1 has no GPU of its own; start at most 1")
