"""Makes the scripts importable from wherever pytest is started, and gives the disk back."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent))


@pytest.fixture(autouse=True)
def no_checkpoints_left(tmp_path):
    """A checkpoint takes 90 MB and pytest keeps the folders of its last three runs: 17 GB each without this."""
    yield
    for checkpoint in tmp_path.rglob("*.pth*"):
        checkpoint.unlink()
