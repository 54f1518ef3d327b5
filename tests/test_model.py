"""model.py: sizes, strides, DINOv2, weights from files, the moving average, checkpoints."""

import copy
import os
import pickle
import resource
import subprocess
import sys
from datetime import timedelta
from functools import partial
from pathlib import Path
from unittest.mock import Mock
from urllib.request import urlopen

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torchvision.models import mobilenet_v2, mobilenet_v3_small, resnet18, resnet50
from torchvision.ops.misc import SqueezeExcitation
from trees import camvid, refused, truncate

import model as M
import train as T
from model import ENCODERS, DeepLabV3Plus, ema_decay, encoder, update_teacher
from tools import predict

MORE = {  # another encoder needs one row
    "resnet34": M.Encoder("layer1", 64, "layer4", 512),
    "mobilenet_v3_large": M.Encoder("3", 24, "15", 160, width=64),
}


def features(network, image, drop=None):
    """Runs a network in evaluation mode: (shallow features, deep features, ASPP's output, logits)."""
    seen = {}
    network.low_level.register_forward_hook(lambda module, inputs, out: seen.update(shallow=inputs[0]))
    network.aspp.register_forward_hook(lambda module, inputs, out: seen.update(deep=inputs[0], context=out))
    with torch.no_grad():
        logits = network.eval()(image, drop)
    return seen["shallow"], seen["deep"], seen["context"], logits


@pytest.mark.parametrize("output_stride, rates", [(16, (6, 12, 18)), (8, (12, 24, 36))])
@pytest.mark.parametrize("backbone", [*ENCODERS, *MORE])
def test_logits_have_the_size_of_the_image_and_features_the_stride(monkeypatch, backbone, output_stride, rates):
    monkeypatch.setattr(M, "ENCODERS", ENCODERS | MORE)
    network, about = DeepLabV3Plus(backbone, 5, output_stride), M.ENCODERS[backbone]
    shallow, deep, context, logits = features(network, torch.zeros(1, 3, 65, 97))
    stride = 14 if backbone.startswith("dinov2") else output_stride
    grid = (-(-65 // stride), -(-97 // stride))
    assert shallow.shape == (1, about.shallow_channels, 17, 25) and deep.shape == (1, network.deep_channels, *grid)
    assert context.shape == (1, about.width, *grid) and logits.shape == (1, 5, 65, 97)
    assert tuple(branch[0].dilation[0] for branch in network.aspp.convs[1:4]) == rates


@pytest.mark.parametrize("backbone", ["resnet10", "dinov2_vits14"])
def test_drop_multiplies_the_channels_of_the_deepest_features_and_nothing_else(backbone):
    network, image = DeepLabV3Plus(backbone, 3).eval(), torch.rand(2, 3, 42, 42)
    drop = torch.rand(2, network.deep_channels)
    shallow, deep, _, plain = features(network, image)
    seen = features(network, image, drop)
    assert torch.equal(seen[0], shallow) and not torch.equal(seen[3], plain)
    torch.testing.assert_close(seen[1], deep * drop.view(2, -1, 1, 1))


def test_logits_are_float32_and_lie_class_after_class_whatever_the_layout_and_type_of_the_network():
    network = DeepLabV3Plus("resnet10", 5).eval().to(memory_format=torch.channels_last)
    with torch.autocast("cpu", torch.bfloat16):
        logits = network(torch.rand(2, 3, 64, 64))
    assert logits.is_contiguous() and logits.dtype == torch.float32


@pytest.mark.parametrize("output_stride, dilated", [(16, [False, False, True]), (8, [False, True, True])])
def test_a_dilated_resnet_is_torchvision_s_own_under_torchvision_s_names(output_stride, dilated):
    ours = DeepLabV3Plus("resnet50", 2, output_stride).backbone
    theirs = resnet50(replace_stride_with_dilation=dilated)
    for name, conv in theirs.named_modules():
        if isinstance(conv, nn.Conv2d):
            mine = ours.get_submodule(name)
            assert (mine.stride, mine.dilation, mine.padding) == (conv.stride, conv.dilation, conv.padding), name


@pytest.mark.parametrize("output_stride, apart", [(16, 2), (8, 4)])
def test_dilation_keeps_the_strided_network_s_values_whatever_its_kernels(monkeypatch, output_stride, apart):
    monkeypatch.setattr(SqueezeExcitation, "forward", lambda self, x: x)  # it averages the pixels, which are now more
    strided = mobilenet_v3_small(norm_layer=partial(nn.BatchNorm2d, momentum=None)).features.double()
    image = torch.rand(1, 3, 150, 101, dtype=torch.double)
    with torch.no_grad():
        strided(image)  # takes the image's statistics, or the values would vanish
        dilated = copy.deepcopy(strided.eval())
        M.replace_stride_with_dilation([*dilated], output_stride)
        coarse, fine = strided(image), dilated(image)
    assert fine.shape[2:] == (-(-150 // output_stride), -(-101 // output_stride)) and coarse.std() > 0.1
    torch.testing.assert_close(fine[:, :, ::apart, ::apart], coarse)


@pytest.mark.parametrize(
    "name, build, below", [("resnet50", resnet50, ""), ("mobilenet_v2", mobilenet_v2, "features.")]
)
def test_weights_come_from_a_file_of_torchvision_s_state_dict(tmp_path, name, build, below):
    wanted, file = build().state_dict(), str(tmp_path / "weights.pth")
    torch.save(wanted, file)
    backbone = DeepLabV3Plus(name, 3, weights=file).backbone.state_dict()
    assert len(backbone) > 200 and all(torch.equal(value, wanted[below + key]) for key, value in backbone.items())


class Evil:
    def __reduce__(self):
        return print, ("this must not run",)


PUBLISHED = {
    "resnet18": "https://download.pytorch.org/models/resnet18-f37072fd.pth",
    "dinov2_vits14": "https://dl.fbaipublicfiles.com/dinov2/dinov2_vits14/dinov2_vits14_pretrain.pth",
}


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """torch.hub without a network and with a cache of its own; returns the dictionary of what each address holds."""
    online = {}

    def urlopen_offline(request):
        if request.full_url not in online:
            raise OSError("no route to host")
        torch.save(online[request.full_url], tmp_path / "online.pth")
        return urlopen((tmp_path / "online.pth").as_uri())

    monkeypatch.setattr("torch.hub.urlopen", urlopen_offline)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    return online


@pytest.mark.parametrize("name, whose", [("resnet18", "torchvision"), ("dinov2_vits14", "DINOv2")])
def test_weights_that_cannot_be_loaded_get_one_sentence_and_run_no_code(tmp_path, hub, capsys, name, whose):
    def fails(weights, reason):
        says = rf"^--weights {weights} could not be loaded into {name} \({reason}\); expected pretrained "
        says += rf"\(needs internet access the first time\), none, or a file with {whose}'s state dict$"
        refused(says, encoder, name, str(weights))

    foreign = "it is not a torch.save file, or holds more than tensors and plain values"
    torch.save({"conv1.weight": Evil()}, tmp_path / "evil.pth")
    (tmp_path / "text.pth").write_text("no weights")
    (tmp_path / "empty.pth").touch()
    fails(tmp_path / "nowhere.pth", ".*No such file or directory.*")
    fails(tmp_path / "empty.pth", "it is empty or cut off")
    fails(tmp_path / "text.pth", foreign)
    fails(tmp_path / "evil.pth", foreign)
    fails("pretrained", "no route to host")
    (tmp_path / "evil.pth").rename(tmp_path / "hub" / "checkpoints" / Path(PUBLISHED[name]).name)
    fails("pretrained", foreign)  # from the cache
    assert "must not run" not in capsys.readouterr().out


def test_weights_of_another_network_and_others_than_the_published_ones_are_refused(tmp_path, hub):
    vits, vitb = published("dinov2_vits14"), published("dinov2_vitb14")
    for name, state in (
        ("resnet18", resnet50().state_dict()), ("mobilenet_v2", {"state_dict": {}}),
        ("mobilenet_v2", mobilenet_v2(num_classes=21).state_dict()), ("dinov2_vits14", vitb),
        ("dinov2_vits14", vits | {"register_tokens": torch.zeros(1, 4, 384)}),
    ):  # fmt: skip
        torch.save(state, tmp_path / "other.pth")
        refused(r"\(its tensors have other names or sizes\);", encoder, name, str(tmp_path / "other.pth"))
    hub[PUBLISHED["resnet18"]] = resnet18().state_dict()
    refused('invalid hash value .expected "f37072fd", got', encoder, "resnet18", "pretrained")
    refused("--weights pretrained could not be loaded into resnet10", encoder, "resnet10", "pretrained")


# ----------------------------------------------------------------------------------------------------------------------
# DINOv2


def published(name, blocks=12):
    """A random state dict with the names and shapes of the published one."""
    c = ENCODERS[name].deep_channels
    shapes = {"cls_token": (1, 1, c), "pos_embed": (1, 1370, c), "mask_token": (1, c), "norm.weight": (c,)}
    shapes |= {"norm.bias": (c,), "patch_embed.proj.weight": (c, 3, 14, 14), "patch_embed.proj.bias": (c,)}
    for i in range(blocks):
        sizes = {"norm1": (c,), "attn.qkv": (3 * c, c), "attn.proj": (c, c), "norm2": (c,), "mlp.fc1": (4 * c, c)}
        for layer, size in (sizes | {"mlp.fc2": (c, 4 * c)}).items():
            shapes |= {f"blocks.{i}.{layer}.weight": size, f"blocks.{i}.{layer}.bias": size[:1]}
        shapes |= {f"blocks.{i}.ls1.gamma": (c,), f"blocks.{i}.ls2.gamma": (c,)}
    torch.manual_seed(0)
    return {name: torch.randn(shape) * (0.05 if len(shape) > 1 else 1) for name, shape in shapes.items()}


def keep_one_block(network):
    network.encoder.layers = M.Stages([*network.encoder.layers.named_children()][:1], "encoder_layer_0")


def plain_dinov2(state, image, blocks):
    """[normalized patches (rows,columns,C) after the third block (or the first, of one) and after the last]."""

    def linear(x, name):
        return F.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])

    def norm(x, name):
        return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], eps=1e-6)

    image = F.interpolate(image, [-(-side // 14) * 14 for side in image.shape[2:]], mode="bilinear")[0]
    patches = image.unfold(1, 14, 14).unfold(2, 14, 14)  # (3,rows,columns,14,14)
    x = torch.einsum("krsyx,ckyx->rsc", patches, state["patch_embed.proj.weight"]) + state["patch_embed.proj.bias"]
    (rows, columns, channels), grid = x.shape, state["pos_embed"][0, 1:].view(37, 37, -1)
    if (rows, columns) != (37, 37):
        scales = (rows + 0.1) / 37, (columns + 0.1) / 37  # the authors' offset
        grid = F.interpolate(grid.permute(2, 0, 1)[None], scale_factor=scales, mode="bicubic")[0].permute(1, 2, 0)
    x = torch.cat([state["cls_token"][0] + state["pos_embed"][0, :1], (x + grid).flatten(0, 1)])
    seen = []
    for block in (f"blocks.{i}." for i in range(blocks)):
        q, k, v = linear(norm(x, f"{block}norm1"), f"{block}attn.qkv").view(len(x), 3, -1, 64).permute(1, 2, 0, 3)
        mixed = ((q @ k.mT / 8).softmax(2) @ v).transpose(0, 1).flatten(1)
        x = x + state[f"{block}ls1.gamma"] * linear(mixed, f"{block}attn.proj")
        hidden = F.gelu(linear(norm(x, f"{block}norm2"), f"{block}mlp.fc1"))
        x = x + state[f"{block}ls2.gamma"] * linear(hidden, f"{block}mlp.fc2")
        seen.append(norm(x, "norm")[1:].view(rows, columns, channels))
    return [seen[min(2, blocks - 1)], seen[-1]]


@pytest.mark.parametrize("name, size, blocks", [
    ("dinov2_vits14", (70, 98), 12), ("dinov2_vits14", (65, 40), 12), ("dinov2_vits14", (518, 518), 1),
    ("dinov2_vitb14", (42, 56), 1),
])  # fmt: skip
def test_dinov2_is_the_plain_loop_over_published_weights_at_any_size(name, size, blocks):
    state = {name: value.double() for name, value in published(name, blocks).items()}
    network, image = encoder(name).double(), torch.rand(1, 3, *size, dtype=torch.double)
    if blocks == 1:
        keep_one_block(network)
    network.load_state_dict(M.convert_dinov2(state))
    early, last = plain_dinov2(state, image, blocks)
    assert last.std() > 0.5
    early = F.interpolate(early.permute(2, 0, 1)[None], [-(-side // 4) for side in size], mode="bilinear")
    for training in (True, False):
        with torch.no_grad():
            shallow, deep = network.train(training)(image)
        torch.testing.assert_close(deep[0], last.permute(2, 0, 1), rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(shallow, early, rtol=1e-9, atol=1e-9)


def test_dinov2_s_weights_come_from_its_authors_or_a_file_of_theirs(tmp_path, hub):
    state, file = published("dinov2_vits14"), str(tmp_path / "published.pth")
    torch.save(state, file)
    hub[PUBLISHED["dinov2_vits14"]] = state
    one, two = (encoder("dinov2_vits14", weights).state_dict() for weights in ("pretrained", file))
    assert all(torch.equal(value, two[key]) for key, value in one.items())
    assert torch.equal(one["conv_proj.weight"], state["patch_embed.proj.weight"])


@pytest.mark.slow
def test_dinov2_compiles_as_one_graph_with_the_same_gradients():
    network, gradients = encoder("dinov2_vits14"), []
    keep_one_block(network)
    for run in (network, torch.compile(network, fullgraph=True, backend="aot_eager")):
        network.zero_grad()
        sum((feature.square().mean() for feature in run(torch.ones(2, 3, 30, 50))), torch.zeros(())).backward()
        gradients.append({name: parameter.grad.clone() for name, parameter in network.named_parameters()})
    assert all(gradient.abs().max() > 0 for gradient in gradients[0].values())
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-6)


DINOV2_RUN = (
    "--dataset camvid --labeled 2 --backbone dinov2_vits14 --weights none --crop 56 --batch-size 2 --warmup-iters 1 "
    "--iters 3 --eval-every 1 --workers 0 --device cpu --optimizer adamw --lr 5e-6 --head-lr 2e-4 --floor 0 "
    "--framework unimatch"
)


@pytest.mark.slow
def test_unimatch_with_dinov2_resumes_bit_for_bit_and_predicts_images_of_any_size(tmp_path, monkeypatch):
    data = camvid(tmp_path / "data")

    def run(options="", out="run"):
        T.main(T.parse_args(f"{DINOV2_RUN} --root {data} --out {tmp_path / out} {options}".split()))
        return M.load_checkpoint(tmp_path / out / "last.pth")

    whole = run(out="whole")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(T, "write_panel", Mock(side_effect=KeyboardInterrupt))  # after a checkpoint was saved
        run()
    assert M.load_checkpoint(tmp_path / "run" / "last.pth")["step"] == 2
    resumed = run("--resume")
    for part in ("student", "teacher"):
        torch.testing.assert_close(resumed[part], whole[part], rtol=0, atol=0)
    Image.new("RGB", (91, 47)).save(data / "photo.png")
    options = f"{tmp_path / 'run' / 'last.pth'} --images {data} --masks {tmp_path / 'masks'} --device cpu"
    predict.main(predict.parse_args(options.split()))
    assert Image.open(tmp_path / "masks" / "photo.png").size == (91, 47)


@pytest.mark.slow
def test_two_processes_train_dinov2_together(tmp_path):
    command = f"{sys.executable} -m torch.distributed.run --standalone --nproc_per_node=2 {T.__file__} {DINOV2_RUN} "
    command += f"--root {camvid(tmp_path / 'data')} --out {tmp_path / 'run'}"
    subprocess.run(command.split(), check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    saved = M.load_checkpoint(tmp_path / "run" / "last.pth")
    assert saved["step"] == 3 and saved["args"]["processes"] == 2


# ----------------------------------------------------------------------------------------------------------------------
# the teacher


def test_tau_warms_up_to_its_limit():
    assert [ema_decay(n) for n in (0, 1, 3, 98, 99, 1000)] == pytest.approx([0, 0.5, 0.75, 98 / 99, 0.99, 0.99])
    assert ema_decay(9, 0.5) == 0.5


def test_the_teacher_is_the_closed_form_of_the_moving_average():
    student, expected = nn.BatchNorm1d(1), None
    teacher = copy.deepcopy(student).eval().requires_grad_(False)
    for n, value in enumerate([1.0, 4.0, -2.0, 3.0, 8.0, 8.0]):
        nn.init.constant_(student.weight, value)
        student.running_mean.fill_(10 * value)
        student.running_var.fill_(value**2)
        student.num_batches_tracked += 1
        tau = ema_decay(n, 0.7)
        update_teacher(M.float_tensors(teacher), M.float_tensors(student), tau)
        new = torch.tensor([value, 10 * value, value**2])
        expected = new if n == 0 else tau * expected + (1 - tau) * new  # the first update is a copy
        torch.testing.assert_close(torch.cat([teacher.weight, teacher.running_mean, teacher.running_var]), expected)
        assert teacher.num_batches_tracked == 0  # whole numbers are no average
    assert student.weight.item() == 8 and student.weight.requires_grad


# ----------------------------------------------------------------------------------------------------------------------
# checkpoints


def checkpoint(**changes):
    weights = {"student": torch.rand(20_000), "teacher": torch.rand(20_000)}
    return {"args": {"lr": 0.1}, "classes": ["a", "b"], "step": 1} | weights | changes


def test_a_checkpoint_is_read_as_it_was_written_and_its_networks_are_those_that_were_trained(tmp_path):
    args, image = {"backbone": "resnet10", "output_stride": 8}, torch.rand(1, 3, 40, 50)
    networks = {name: DeepLabV3Plus("resnet10", 2, 8).eval() for name in ("student", "teacher")}
    states = {name: network.state_dict() for name, network in networks.items()}
    M.save_checkpoint(checkpoint(args=args, **states), tmp_path / "last.pth")
    loaded = M.load_checkpoint(tmp_path / "last.pth")
    assert [*tmp_path.iterdir()] == [tmp_path / "last.pth"]
    for name, network in networks.items():
        again = M.load_network(loaded, name)
        assert not again.training and torch.equal(again(image), network(image))
        del loaded[name]
    preprocessing = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
    assert loaded == {"args": args, "classes": ["a", "b"], "step": 1, "preprocessing": preprocessing}


@pytest.mark.parametrize("before", [True, False])
def test_a_full_disk_keeps_the_last_good_checkpoint(tmp_path, before):
    path = tmp_path / "last.pth"
    if before:
        M.save_checkpoint(checkpoint(), path)
    content = path.read_bytes() if before else None
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
    try:
        says = r"last\.pth could not be written \(.+\); free disk space or check the folder, then use --resume"
        refused(says, M.save_checkpoint, checkpoint(step=2), path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [*tmp_path.iterdir()] == ([path] if before else []) and (not before or path.read_bytes() == content)


def test_a_bad_checkpoint_gets_one_sentence_and_runs_no_code(tmp_path, capsys):
    good = checkpoint(preprocessing=M.PREPROCESSING)
    bad = {"evil": good | {"args": Evil()}, "list": [1], "foreign": resnet18().state_dict()}
    bad |= {"gray": good | {"preprocessing": {"mean": [0.5] * 3, "std": [1.0] * 3}}}
    bad |= {"no teacher": {name: value for name, value in good.items() if name != "teacher"}}
    for name, content in (bad | {"truncated": good}).items():
        torch.save(content, tmp_path / f"{name}.pth")
    truncate(tmp_path / "truncated.pth")
    (tmp_path / "pickle.pth").write_bytes(pickle.dumps(Evil(), protocol=2))
    (tmp_path / "empty.pth").touch()
    for path in tmp_path.glob("*.pth"):
        says = rf"checkpoint {path} could not be read \(.+\); expected last.pth or best.pth of this train.py"
        refused(says, M.load_checkpoint, path)
    for place in (tmp_path / "none.pth", tmp_path):
        refused(r"could not be read \(it does not exist\)", M.load_checkpoint, place)
    assert "must not run" not in capsys.readouterr().out


# ----------------------------------------------------------------------------------------------------------------------
# processes


def test_without_torchrun_there_is_one_process_and_a_gpu_is_only_asked_for_where_there_is_one(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", *M.LAUNCHERS):
        monkeypatch.delenv(name, raising=False)
    joined = Mock()
    monkeypatch.setattr(torch.distributed, "init_process_group", joined)
    assert M.start_processes("cpu") == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert M.start_processes("auto") == torch.device("cpu")
    refused("--device cuda, but PyTorch sees no GPU; use --device cpu", M.start_processes, "cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for name in ("RANK", "LOCAL_RANK"):  # a leftover alone means nothing
        monkeypatch.setenv(name, "1")
    assert M.start_processes("cpu") == torch.device("cpu")
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "4")
    refused("4 tasks without torchrun would each train alone; start one task, with torchrun", M.start_processes, "cpu")
    monkeypatch.setenv("WORLD_SIZE", "2")
    refused("WORLD_SIZE=2 is set, but MASTER_ADDR is not; start with torchrun, or", M.start_processes, "cpu")
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    refused("process 1 has no GPU; start at most 1, or use --device cpu", M.start_processes, "auto")
    joined.assert_not_called()
    assert M.start_processes("cpu", minutes=3) == torch.device("cpu")
    joined.assert_called_once_with("gloo", timeout=timedelta(minutes=3))
