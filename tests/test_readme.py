"""README.md: its commands are ones that the scripts take, its tables name lists that exist."""

import re
import shlex
from pathlib import Path

import pytest
import torch

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
            match = COMMAND.match(line.split("&&")[-1].strip())
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


@pytest.mark.parametrize("arguments", table_cells(), ids=" ".join)
def test_a_cell_of_the_tables_names_a_published_list(arguments):
    args = train.parse_args(list(arguments))
    train.fill_presets(args, torch.device("cuda"))
    assert (data.SPLITS / args.dataset / f"{args.labeled}.txt").is_file() and args.epochs == 80


def test_the_tests_behind_the_promises_exist():
    named = re.findall(r"`(test_\w+)` \|$", README, re.M)
    sources = "".join(path.read_text() for path in Path(__file__).parent.glob("test_*.py"))
    assert len(named) >= 9 and all(f"def {name}(" in sources for name in named)
