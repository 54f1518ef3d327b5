"""README.md: each of its commands is run, shortened, on little trees; its tables name lists that exist."""

import re
import shlex
import shutil
import subprocess
from importlib.util import find_spec
from pathlib import Path

import benchmark
import numpy as np
import pytest
import torch
from PIL import Image
from test_data import camvid
from test_datasets import cityscapes, pascal
from torch import nn

import data
import evaluate
import train

README = (Path(__file__).parent.parent / "README.md").read_text()
COMMAND = re.compile(r"^(?:\S*python3?|torchrun .*?) (?:-m )?(train|evaluate|data)\.py\b(.*)$")


def commands():
    """(script, arguments) of every line that runs one of the scripts, in blocks of commands."""
    found = []
    for block in re.findall(r"^```sh\n(.*?)^```", README, re.M | re.S):
        for line in block.splitlines():
            match = COMMAND.match(line.split("&&")[-1].split(" > ")[0].strip())
            if match:
                found.append((match[1], tuple(shlex.split(match[2], comments=True))))
    return found


def table_cells():
    """The arguments of every cell of Tables 1-3."""
    cells = []
    for dataset, body in re.findall(r"^\*\*Table \d\*\*.*`--dataset (\w+)`\n\n((?:\|.*\n)+)", README, re.M):
        head, _, *rows = [[cell.strip() for cell in row.strip("|").split("|")] for row in body.splitlines()]
        for row in rows:
            for column, figures in zip(head[2:], row[2:]):
                assert re.fullmatch(r"(\d+\.\d+|-) /( \d+\.\d+)?", figures), row
                cells.append(("--dataset", dataset, "--labeled", column, *shlex.split(row[1].strip("`"))))
    return cells


def test_the_commands_and_tables_are_found():
    assert len(commands()) > 20 and {name for name, _ in commands()} == {"train", "evaluate", "data"}
    assert len(table_cells()) == 7 * 5 + 4 * 4 + 4 * 4 and len(set(table_cells())) == len(table_cells())


@pytest.mark.parametrize("name, arguments", sorted(set(commands())))
def test_a_command_is_one_that_its_script_takes(name, arguments):
    if "DATASET" in arguments:  # the pattern of the tables
        return
    args = {"train": train, "evaluate": evaluate, "data": data}[name].parse_args(list(arguments))
    if name == "train":
        train.fill_presets(args, torch.device("cuda"))


SHORT = [
    "--iters", "2", "--warmup-epochs", "0", "--crop", "32", "--batch-size", "2", "--backbone", "resnet10", "--weights", "none",
    "--workers", "0", "--device", "cpu", "--log-every", "1",
]  # fmt: skip


@pytest.fixture
def little_world(tmp_path, monkeypatch):
    """A working directory with the datasets that README's commands name, a few images each, under lists of their names."""
    splits = tmp_path / "splits"
    camvid(tmp_path / "data" / "camvid", train=5, val=2, size=(64, 48))
    pascal(tmp_path / "data" / "VOCdevkit" / "VOC2012", splits)
    cityscapes(tmp_path / "data" / "cityscapes", splits)
    for number in data.SPLITS.glob("pascal/[1-9]*.txt"):
        if number.stem != "1464":
            shutil.copy(splits / "pascal" / "2.txt", splits / "pascal" / number.name)
    masks = tmp_path / "data" / "painted" / "masks"
    masks.mkdir(parents=True)
    Image.fromarray(np.repeat([[[9, 8, 7]], [[0, 0, 255]]], 20, 1).astype(np.uint8)).save(masks / "a.png")
    monkeypatch.setattr(data, "SPLITS", splits)
    monkeypatch.setattr(data, "SHAPES_VAL", 2)
    monkeypatch.chdir(tmp_path)
    torch.set_num_threads(1)


def run_line(line, capsys):
    """Runs one command of README in this process, a training run for two steps. torchrun's own part is tested elsewhere."""
    line = line.split("&&")[-1].split("  #")[0].strip()
    match = COMMAND.match(line.split(" > ")[0])
    if match is None:
        subprocess.run(line, shell=True, check=True)
        return
    name, arguments = match[1], shlex.split(match[2])
    capsys.readouterr()
    if name == "train":
        if "camvid" in arguments:  # five images are fewer than the number asked for
            arguments[arguments.index("--labeled") + 1] = "2"
        train.train(train.Run(train.parse_args(arguments + SHORT)))
    elif name == "evaluate":
        evaluate.main(arguments + ([] if "--figures" in arguments else ["--device", "cpu"]))
    else:
        data.main(arguments)
    if " > " in line:
        Path(line.split(" > ")[1]).write_text(capsys.readouterr().out)


def test_every_command_runs(little_world, capsys):
    done = []
    for block in re.findall(r"^```sh\n(.*?)^```", README, re.M | re.S):
        for line in block.splitlines():
            if line.startswith("python3 -m venv"):  # .ci/run runs these two
                continue
            if "DATASET" in line or "CELL" in line:  # the pattern of the tables, whose cells are looked at below
                continue
            if "--figures" in line and find_spec("matplotlib") is None:
                continue
            run_line(line, capsys)
            done.append(line)
            if "data.py shapes" in line:  # the rest of the circle on few images
                for path in sorted(Path("data/drawn").rglob("*.png")):
                    if int(path.stem) > 4 and int(path.stem) not in (20, 101, 102, 480, 481):
                        path.unlink()
    assert len(done) > 30


def test_the_benchmark_prints_its_tables(monkeypatch, capsys):
    monkeypatch.setattr(benchmark, "ROUNDS", 1)
    benchmark.main(["--only", "evaluation", "--device", "cpu"])
    assert re.search(r"confusion matrix +\d+\.\d+ ms .* x histograms on the host", capsys.readouterr().out)


def test_the_lines_for_other_code_run():
    code = re.search(r"^```python\n(.*?)^```", README, re.M | re.S)[1]
    student, teacher = nn.Conv2d(3, 5, 1), nn.Conv2d(3, 5, 1)
    names = {
        "student": student,
        "teacher": teacher.requires_grad_(False),
        "F": nn.functional,
        "step": 3,
        "total_steps": 9,
    }
    names |= {"weak": torch.randn(2, 3, 16, 16), "strong": torch.randn(2, 3, 16, 16)}
    exec(code, names)
    names["loss_u"].backward()
    assert student.weight.grad.abs().sum() > 0 and 0 < (names["pseudo"].label != 255).float().mean() < 1


@pytest.mark.parametrize("arguments", table_cells(), ids=" ".join)
def test_a_cell_of_the_tables_names_a_published_list(arguments):
    args = train.parse_args(list(arguments))
    train.fill_presets(args, torch.device("cuda"))
    assert (data.SPLITS / args.dataset / f"{args.labeled}.txt").is_file() and args.epochs == 80


def test_the_tests_behind_the_promises_exist():
    named = re.findall(r"`(test_\w+)` \|$", README, re.M)
    sources = "".join(path.read_text() for path in Path(__file__).parent.glob("test_*.py"))
    assert len(named) >= 9 and all(f"def {name}(" in sources for name in named)
