"""README.md and docs/: each command is run, shortened, on little trees; tables name lists and tests that exist."""

import importlib
import re
import shlex
import shutil
import textwrap
from importlib.util import find_spec
from pathlib import Path

import benchmark
import pytest
import torch
from torch import nn
from trees import camvid, cityscapes, folder, pascal

import data
import refine
import shapes
import train

ROOT = Path(__file__).parent.parent
PAGES = {path.name: path.read_text() for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))}
COMMAND = re.compile(r"^(?:\S*python3?|torchrun .*?) (train|evaluate|tools/\w+|tests/benchmark)\.py\b(.*)$")


def commands(page):
    """(script, arguments) of every line that runs one of the scripts, in the order of the page."""
    found = []
    for block in re.findall(r"^ *```sh\n(.*?)^ *```", PAGES[page], re.M | re.S):
        for line in block.splitlines():
            match = COMMAND.match(line.split("&&")[-1].strip())
            if match and "DATASET" not in line and "CELL" not in line:
                found.append((match[1], shlex.split(match[2], comments=True)))
    return found


def cells():
    """The arguments of every cell of Tables 1-3."""
    found = []
    tables = re.findall(r"^\*\*Table \d\*\*.*`--dataset (\w+)`\n\n((?:\|.*\n)+)", PAGES["reproduce.md"], re.M)
    for dataset, body in tables:
        head, _, *rows = [[cell.strip() for cell in row.strip("|").split("|")] for row in body.splitlines()]
        for row in rows:
            for column, figures in zip(head[2:], row[2:]):
                assert re.fullmatch(r"(\d+\.\d+|-) /( \d+\.\d+)?", figures), row
                found.append(("--dataset", dataset, "--labeled", column, *shlex.split(row[1].strip("`"))))
    return found


def test_the_commands_and_tables_are_found_and_the_tests_behind_the_guarantees_exist():
    assert len(commands("README.md")) >= 10 and len(commands("reproduce.md")) >= 11 and len(commands("faq.md")) >= 5
    assert len(cells()) == 7 * 5 + 4 * 4 + 4 * 4 and len(set(cells())) == len(cells())
    named = re.findall(r"`(test_\w+)`", PAGES["guarantees.md"], re.M)
    sources = "".join(path.read_text() for path in Path(__file__).parent.glob("test_*.py"))
    missing = [name for name in named if f"def {name}(" not in sources]
    assert len(named) >= 12 and not missing, missing


def test_every_cell_of_the_tables_names_a_published_list():
    for arguments in cells():
        args = train.fill_presets(train.parse_args(list(arguments)), torch.device("cuda"))
        assert (data.SPLITS / args.dataset / f"{args.labeled}.txt").is_file() and args.epochs == 80, arguments


SHORT = "--iters 2 --warmup-iters 0 --crop 32 --backbone resnet10 --weights none --workers 0 --device cpu".split()


@pytest.fixture
def little_world(tmp_path, monkeypatch):
    """A working directory with the datasets that the commands name, a few images each, under lists of their names."""
    splits = tmp_path / "splits"
    camvid(tmp_path / "data/camvid", train=50, val=2)
    pascal(tmp_path / "data/VOCdevkit/VOC2012", splits)
    cityscapes(tmp_path / "data/cityscapes", splits)
    folder(tmp_path / "data/mine", images=6, annotated=4, val=0)
    (tmp_path / "classes.csv").write_text("class 0,0\nclass 1,1\nclass 2,2\n")
    for number in data.SPLITS.glob("pascal/[1-9]*.txt"):
        if number.stem != "1464":
            shutil.copy(splits / "pascal" / "2.txt", splits / "pascal" / number.name)
    monkeypatch.setattr(data, "SPLITS", splits)
    monkeypatch.setattr(shapes, "TRAIN", 30)
    monkeypatch.setattr(shapes, "VAL", 2)
    monkeypatch.syspath_prepend(ROOT / "tools")
    monkeypatch.chdir(tmp_path)
    torch.set_num_threads(1)


def run_command(script, arguments):
    """Runs one command in this process, a training run for two steps. torchrun's own part is tested elsewhere."""
    module = importlib.import_module(Path(script).name)
    if script == "train":
        arguments = [*arguments, *SHORT, *([] if "--batch-size" in arguments else ["--batch-size", "2"])]
    elif script == "evaluate" or script in ("tools/predict", "tools/report"):
        arguments = [*arguments, "--device", "cpu"]
    module.main(module.parse_args(arguments))


@pytest.mark.parametrize("page", ["README.md", pytest.param("reproduce.md", marks=pytest.mark.slow), "faq.md"])
def test_every_command_runs(little_world, page):
    if page == "faq.md":
        run_command("train", [])  # whose checkpoint the page looks at
    for script, arguments in commands(page):
        if "--figures" not in arguments or find_spec("matplotlib"):
            run_command(script, arguments)


@pytest.mark.slow
def test_the_benchmark_prints_its_tables(monkeypatch, capsys):
    monkeypatch.setattr(benchmark, "ROUNDS", 1)
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)  # takes minutes
    monkeypatch.setitem(benchmark.POINTS, "cpu", [{"batch": 2, "crop": 64, "classes": 3}])
    for part, says in (("step", r"S4MC, strong views of FixMatch +\d+\.\d+ ms .* x authors' order"),
                       ("evaluation", r"confusion matrix +\d+\.\d+ ms .* x histograms on the host")):  # fmt: skip
        benchmark.main(["--only", part, "--device", "cpu", "--backbone", "resnet10"])
        assert re.search(says, capsys.readouterr().out)


@pytest.mark.parametrize("kept", [True, False])
def test_the_first_lines_of_refine_give_the_mean_over_the_kept_pixels_and_no_nan_if_there_are_none(kept):
    code = textwrap.dedent(re.search(r"\n\n(( {4}.*\n)+)\n", refine.__doc__)[1])
    student, teacher = nn.Conv2d(3, 5, 1), nn.Conv2d(3, 5, 1).requires_grad_(False)
    if not kept:
        nn.init.zeros_(teacher.weight), nn.init.zeros_(teacher.bias)  # equal classes have no margin
    image, strong = torch.randn(2, 2, 3, 16, 16)
    names = {"student": student, "teacher": teacher, "image": image, "strong_view_of_image": strong}
    names |= {"cross_entropy": nn.functional.cross_entropy, "step": 3, "total_steps": 9}
    exec(code, vars(refine) | names, names)
    names["loss"].backward()
    share = (names["pseudo"].label != 255).float().mean()
    if kept:
        expected = nn.functional.cross_entropy(student(strong), names["pseudo"].label, ignore_index=255)
        torch.testing.assert_close(names["loss"], expected)
        assert student.weight.grad.abs().sum() > 0 and 0 < share < 1
    else:
        assert names["loss"] == share == 0 and not student.weight.grad.any()


def test_links_lead_somewhere():
    for page, text in PAGES.items():
        folder = ROOT if page == "README.md" else ROOT / "docs"
        for target in re.findall(r"\]\(([^)#]+)\)", text):
            assert target.startswith("https://") or (folder / target).exists(), f"{page}: {target}"
