"""Makes the scripts importable wherever pytest starts; slow tests run with --slow; checkpoints are not kept."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent))


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="also run the tests that take longer than about 15 seconds")


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: takes longer than about 15 seconds; runs with --slow")


def pytest_collection_modifyitems(config, items):
    for item in items:
        if "slow" in item.keywords and not config.getoption("--slow"):
            item.add_marker(pytest.mark.skip(reason="slow; run it with --slow"))


@pytest.fixture(autouse=True)
def no_checkpoints_left(tmp_path):
    """A checkpoint takes up to 90 MB and pytest keeps the folders of its last three runs."""
    yield
    for checkpoint in tmp_path.rglob("*.pth*"):
        checkpoint.unlink()
