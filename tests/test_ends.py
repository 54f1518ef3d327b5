"""A run that has said its last sentence must end: real scripts on broken files and stop signals, with nothing left."""

import os
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from trees import camvid

ROOT = Path(__file__).parent.parent
TINY = (
    "--dataset camvid --labeled 2 --backbone resnet10 --weights none --crop 32 --batch-size 2 --warmup-iters 0 "
    "--device cpu --optimizer sgd --iters 5000 --log-every 1 --eval-every 900"
)
TWO_PROCESSES = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
SECONDS = 30


class Script:
    """A script in a session of its own, as a terminal or a scheduler starts it, and all processes that come from it."""

    def __init__(self, folder, name, options, launcher=()):
        self.mark, self.said = f"SCRIPT={uuid.uuid4()}", folder / "stderr"
        env = os.environ | {"OMP_NUM_THREADS": "1", "SCRIPT": self.mark.partition("=")[2]}
        command = [sys.executable, *launcher, str(ROOT / name), *options.split()]
        with open(self.said, "w") as stderr, open(folder / "stdout", "w") as stdout:
            self.process = subprocess.Popen(command, stdout=stdout, stderr=stderr, env=env, start_new_session=True)
        self.output = folder / "stdout"

    def alive(self):
        """Their ids, by what they inherit: loader workers leave the group, torchrun's processes the session."""
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                if self.mark.encode() in (folder / "environ").read_bytes().split(b"\0"):  # a zombie has none
                    found.append(int(folder.name))
            except OSError:  # it has just ended, or is another user's
                continue
        return found

    def reads(self, folder):
        """Whether one of them has a file below the folder open."""
        for link in (link for pid in self.alive() for link in Path(f"/proc/{pid}/fd").glob("*")):
            try:
                if os.readlink(link).startswith(f"{folder}/"):
                    return True
            except OSError:  # it has just been closed
                continue
        return False

    def wait(self, condition):
        deadline = time.monotonic() + 120
        while not condition():
            assert self.process.poll() is None, f"it ended before: {self.said.read_text()}"
            assert time.monotonic() < deadline, "it never came"
            time.sleep(0.01)

    def wait_for(self, text):
        self.wait(lambda: text in self.output.read_text())

    def end(self, seconds=SECONDS):
        """(exit code, lines of stderr without a warning), once all processes are gone; fails if one is left after so many seconds."""
        deadline = time.monotonic() + seconds
        while (self.process.poll() is None or self.alive()) and time.monotonic() < deadline:
            time.sleep(0.05)
        left = {pid: Path(f"/proc/{pid}/cmdline").read_bytes() for pid in self.alive()}
        assert not left, f"{left} run after {seconds} s, exit code {self.process.poll()}: {self.said.read_text()}"
        said = self.said.read_text().splitlines()
        return self.process.returncode, [line for line in said if "no labeled pixel is" not in line]  # of little trees


@pytest.fixture
def start(tmp_path):
    """A function that starts a script; in the end all is killed that is left of it."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs inherit that it is ignored
    scripts = []

    def one(name, options, launcher=()):
        scripts.append(Script(tmp_path, name, options, launcher))
        return scripts[-1]

    yield one
    for script in scripts:
        for pid in script.alive():
            os.kill(pid, signal.SIGKILL)
        script.process.wait()


def truncate(folder):
    for path in folder.iterdir():
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return camvid(tmp_path_factory.mktemp("data") / "camvid", val=2)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, root):
    """last.pth of a run of one step."""
    out = tmp_path_factory.mktemp("run") / "run"
    options = f"{TINY} --root {root} --workers 0 --out {out} --iters 1 --eval-every 1"
    subprocess.run([sys.executable, str(ROOT / "train.py"), *options.split()], check=True, capture_output=True)
    return out / "last.pth"


def with_slow(*cases):
    """Parameters, of which only the first are run without --slow."""
    return [pytest.param(*case, marks=() if fast else pytest.mark.slow) for fast, *case in cases]


# ----------------------------------------------------------------------------------------------------------------------
# what breaks a run

BROKEN = {
    "image": ".png could not be read (image file is truncated); replace the file, or leave this image out",
    "value": " holds the value 77; expected a class index from 0 to 10, or 255",
    "mask": "1 of 2 labeled images of camvid have no mask under ",
    "loss": "the loss is nan between the steps ",
}


@pytest.mark.parametrize("defect, workers", with_slow(
    (True, "image", 2), (True, "loss", 1), (False, "image", 0), (False, "value", 1), (False, "mask", 2),
    (False, "loss", 0),
))  # fmt: skip
def test_a_run_that_cannot_go_on_says_why_in_one_line_and_ends(tmp_path, start, defect, workers):
    root, options = camvid(tmp_path / "camvid", val=2), f"{TINY} --workers {workers} --out {tmp_path / 'run'}"
    if defect == "image":
        truncate(root / "train")
    elif defect == "value":
        for mask in (root / "trainannot").iterdir():
            Image.fromarray(np.full((48, 64), 77, np.uint8)).save(mask)
    elif defect == "mask":
        (root / "trainannot" / "train4.png").unlink()
        (tmp_path / "two.txt").write_text("train1\ntrain4\n")
        options += f" --labeled {tmp_path / 'two.txt'}"
    else:
        options += " --lr 1e30 --head-lr 1e30"
    code, said = start("train.py", f"{options} --root {root}").end(120)
    assert code == 1 and len(said) == 1 and said[0].startswith("train.py: ") and BROKEN[defect] in said[0], said
    assert not (tmp_path / "run" / "last.pth").exists()


@pytest.mark.parametrize("number, group, workers", with_slow(
    (True, signal.SIGINT, True, 2), (True, signal.SIGTERM, False, 1), (False, signal.SIGINT, True, 0),
    (False, signal.SIGTERM, False, 0), (False, signal.SIGTERM, True, 2),
))  # fmt: skip
def test_a_signal_saves_a_checkpoint_says_so_and_ends(tmp_path, start, root, number, group, workers):
    run = start("train.py", f"{TINY} --root {root} --workers {workers} --out {tmp_path / 'run'}")
    run.wait_for("step 3/5000")
    (os.killpg if group else os.kill)(run.process.pid, number)
    code, said = run.end()
    step = torch.load(tmp_path / "run" / "last.pth", weights_only=True)["step"]
    assert 3 <= step < 5000 and code == 128 + number
    assert said == [
        f"{number.name}: saves as soon as this step or evaluation is done; again: at once",
        f"{number.name}: saved step {step} to {tmp_path / 'run' / 'last.pth'}; continue with --resume",
    ]


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_a_signal_in_an_evaluation_waits_for_its_scores(tmp_path, start, root, workers):
    many = camvid(tmp_path / "camvid", val=60, size=(320, 240))
    run = start(
        "train.py", f"{TINY} --root {many} --workers {workers} --out {tmp_path / 'run'} --iters 10 --eval-every 1"
    )
    run.wait(lambda: run.reads(many / "val"))
    before = run.output.read_text().count("teacher's mIoU")  # evaluations, one after every second step
    os.killpg(run.process.pid, signal.SIGINT)
    code, said = run.end(180)
    step = 2 * (before + 1)
    assert code == 130 and len(said) == 2 and f"SIGINT: saved step {step} to" in said[1]  # right after the evaluation
    assert f"step {step}/10  teacher's mIoU" in run.output.read_text()


@pytest.mark.slow
def test_a_run_whose_loader_worker_is_killed_ends(tmp_path, start, root):
    run = start("train.py", f"{TINY} --root {root} --workers 2 --out {tmp_path / 'run'}")
    run.wait_for("step 3/5000")
    os.kill(
        next(pid for pid in run.alive() if pid != run.process.pid), signal.SIGKILL
    )  # as a machine out of memory does
    assert run.end()[0] == 1


# ----------------------------------------------------------------------------------------------------------------------
# evaluation and prediction


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """So many images, all but the first of them links, that a signal comes in the middle of them on any machine."""
    root = camvid(tmp_path_factory.mktemp("many") / "camvid", train=2, val=1, size=(640, 480))
    for folder in ("val", "valannot"):
        for i in range(1, 400):
            os.link(root / folder / "val0.png", root / folder / f"val{i}.png")
    return root


@pytest.mark.parametrize("workers", with_slow((False, 0), (True, 1)))
def test_an_evaluation_names_a_truncated_image_and_ends(tmp_path, start, checkpoint, workers):
    root = camvid(tmp_path / "camvid")
    truncate(root / "val")
    code, said = start("evaluate.py", f"{checkpoint} --root {root} --workers {workers} --device cpu").end(120)
    assert (
        code == 1
        and len(said) == 1
        and said[0].startswith(f"evaluate.py: {root / 'val'}/val")
        and BROKEN["image"] in said[0]
    )


@pytest.mark.parametrize("workers", with_slow((False, 0), (True, 2)))
def test_an_interrupted_evaluation_ends(start, checkpoint, photographs, workers):
    evaluation = start("evaluate.py", f"{checkpoint} --root {photographs} --workers {workers} --device cpu --tta")
    evaluation.wait(lambda: evaluation.reads(photographs / "val"))
    os.killpg(evaluation.process.pid, signal.SIGINT)
    assert evaluation.end() == (130, [])


@pytest.mark.parametrize("workers", with_slow((False, 0), (True, 1)))
def test_a_prediction_names_an_unreadable_image_predicts_the_others_and_ends(tmp_path, start, checkpoint, workers):
    images = camvid(tmp_path / "camvid") / "train"
    (images / "train3.png").write_bytes((images / "train3.png").read_bytes()[:70])
    options = f"{checkpoint} --images {images} --masks {tmp_path / 'masks'} --workers {workers} --device cpu"
    code, said = start("tools/predict.py", options).end(120)
    assert code == 1 and len(said) == 2 and f"{images / 'train3.png'} could not be read" in said[0]
    assert said[1] == "predict.py: 1 images have no mask, for the reasons named above"
    assert sorted(path.stem for path in (tmp_path / "masks").iterdir()) == [f"train{i}" for i in (0, 1, 2, 4, 5)]


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_an_interrupted_prediction_ends(tmp_path, start, checkpoint, photographs, workers):
    options = (
        f"{checkpoint} --images {photographs / 'val'} --masks {tmp_path / 'masks'} --workers {workers} --device cpu"
    )
    prediction = start("tools/predict.py", options)
    prediction.wait(lambda: len(list(tmp_path.glob("masks/*.png"))) > 3)
    os.killpg(prediction.process.pid, signal.SIGINT)
    assert prediction.end() == (130, [])


# ----------------------------------------------------------------------------------------------------------------------
# two processes


@pytest.mark.slow
def test_two_processes_end_together_on_a_truncated_image(tmp_path, start):
    root = camvid(tmp_path / "camvid")
    truncate(root / "train")
    options = f"{TINY} --root {root} --workers 1 --out {tmp_path / 'run'}"
    code, said = start("train.py", options, TWO_PROCESSES).end(120)
    ours = [line for line in said if line.startswith("train.py: ")]  # torchrun says much more
    assert code == 1 and len(ours) <= 2 and any(BROKEN["image"] in line for line in ours), said
    assert not any("Traceback" in line for line in ours), said


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_two_processes_end_together_if_only_one_of_them_cannot_go_on(tmp_path, start, rank):
    root = camvid(tmp_path / "camvid", val=2)
    image = root / "val" / f"val{rank}.png"  # which only this process scores
    image.write_bytes(image.read_bytes()[:70])
    options = f"{TINY} --root {root} --workers 1 --out {tmp_path / 'run'} --eval-every 1"
    code, said = start("train.py", options, TWO_PROCESSES).end(180)
    assert code == 1 and sum(BROKEN["image"] in line for line in said) == 1, said
    assert not any(line.startswith("train.py: Traceback") for line in said), said  # of the one that waits for the other


@pytest.mark.slow
@pytest.mark.parametrize("group, number", [(False, signal.SIGTERM), (True, signal.SIGINT)])
def test_torchrun_passes_a_signal_on_and_all_end(tmp_path, start, root, group, number):
    run = start("train.py", f"{TINY} --root {root} --workers 1 --out {tmp_path / 'run'}", TWO_PROCESSES)
    run.wait_for("step 3/5000")
    (os.killpg if group else os.kill)(run.process.pid, number)
    code, said = run.end(60)
    step = torch.load(tmp_path / "run" / "last.pth", weights_only=True)["step"]
    assert code and 3 <= step < 5000
    assert sum(f"saved step {step} to {tmp_path / 'run' / 'last.pth'}" in line for line in said) == 1, said


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_signal_to_one_of_two_processes_ends_both(tmp_path, start, root, rank):
    run = start("train.py", f"{TINY} --root {root} --workers 0 --out {tmp_path / 'run'}", TWO_PROCESSES)
    run.wait_for("step 3/5000")
    ranks = {}
    for pid in run.alive():
        variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        ranks |= {int(variable[5:]): pid for variable in variables if variable.startswith(b"RANK=")}
    os.kill(ranks[rank], signal.SIGTERM)
    code, said = run.end(60)
    step = torch.load(tmp_path / "run" / "last.pth", weights_only=True)["step"]
    assert code and 3 <= step < 5000 and sum(f"SIGTERM: saved step {step} to" in line for line in said) == 1, said
