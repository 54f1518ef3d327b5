"""A run that has said its last sentence must end: real scripts on broken files and stop signals, with nothing left."""

import os
import re
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest
import torch
from trees import camvid, truncate

import train

ROOT = Path(__file__).parent.parent
TINY = (
    "--dataset camvid --labeled 2 --backbone resnet10 --weights none --crop 32 --batch-size 2 --warmup-iters 0 "
    "--device cpu --optimizer sgd --iters 5000 --log-every 1 --eval-every 900"
)
TWO_PROCESSES = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
UNREADABLE = ".png could not be read (image file is truncated); replace the file, or leave this image out"
SECONDS = 30


class Script:
    """A script in a session of its own, as a terminal or a scheduler starts it, and all processes that come from it."""

    def __init__(self, folder, name, options, launcher=()):
        self.mark, self.said, self.output = f"SCRIPT={uuid.uuid4()}", folder / "stderr", folder / "stdout"
        env = os.environ | {"OMP_NUM_THREADS": "1", "SCRIPT": self.mark.partition("=")[2]}
        command = [sys.executable, *launcher, str(ROOT / name), *options.split()]
        with open(self.said, "w") as stderr, open(self.output, "w") as stdout:
            self.process = subprocess.Popen(command, stdout=stdout, stderr=stderr, env=env, start_new_session=True)

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
        """(exit code, lines of stderr without a warning), once all processes are gone; fails if one is left."""
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


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return camvid(tmp_path_factory.mktemp("data") / "camvid", val=2)


def saved(folder):
    return torch.load(folder / "run" / "last.pth", weights_only=True)["step"]


def with_slow(*cases):
    """Parameters, of which only those with a leading True are run without --slow."""
    return [pytest.param(*case, marks=() if fast else pytest.mark.slow) for fast, *case in cases]


# ----------------------------------------------------------------------------------------------------------------------
# a run


@pytest.mark.parametrize("defect, workers", with_slow(
    (True, "image", 2), (True, "loss", 1), (False, "image before", 0), (False, "loss", 0), (False, "worker", 2),
))  # fmt: skip
def test_a_run_that_cannot_go_on_says_why_in_one_line_and_ends(tmp_path, start, defect, workers):
    root, rate = camvid(tmp_path / "camvid", val=2), "--lr 1e30 --head-lr 1e30" if defect == "loss" else ""
    labeled = sorted((root / "train").iterdir())[::3]
    truncate(*labeled if defect == "image before" else ())
    run = start("train.py", f"{TINY} {rate} --root {root} --workers {workers} --out {tmp_path / 'run'}")
    if defect in ("image", "worker"):
        run.wait_for("step 3/5000")
    if defect == "image":
        truncate(*labeled)
    if defect == "worker":  # as a machine out of memory does
        os.kill(next(pid for pid in run.alive() if pid != run.process.pid), signal.SIGKILL)
    code, said = run.end(120)
    says = {"loss": "train.py: the loss is nan between the steps ", "worker": ""}.get(defect, f"train.py: {root}/tr")
    assert code == 1 and said[-1].startswith(says) and (UNREADABLE in said[-1]) == ("image" in defect), said
    assert defect == "worker" or len(said) == 1 and not (tmp_path / "run" / "last.pth").exists()


@pytest.mark.parametrize("number, group, workers", with_slow(
    (True, signal.SIGINT, True, 2), (False, signal.SIGTERM, False, 1), (False, signal.SIGINT, True, 0),
    (False, signal.SIGTERM, False, 0), (False, signal.SIGTERM, True, 2),
))  # fmt: skip
def test_a_signal_saves_a_checkpoint_says_so_and_ends(tmp_path, start, root, number, group, workers):
    run = start("train.py", f"{TINY} --root {root} --workers {workers} --out {tmp_path / 'run'}")
    run.wait_for("step 3/5000")
    (os.killpg if group else os.kill)(run.process.pid, number)
    code, said = run.end()
    step = saved(tmp_path)
    assert 3 <= step < 5000 and code == 128 + number
    assert said == [
        f"{number.name}: saves when this step or evaluation is done; again: ends at once",
        f"{number.name}: saved step {step} to {tmp_path / 'run' / 'last.pth'}; continue with --resume",
    ]


@pytest.mark.slow
@pytest.mark.parametrize("times, workers", [(1, 2), (2, 1)])
def test_a_signal_in_an_evaluation_waits_for_its_scores_and_a_second_one_does_not(tmp_path, start, times, workers):
    many = camvid(tmp_path / "camvid", val=100, size=(320, 240))
    options = f"--workers {workers} --out {tmp_path / 'run'} --iters 10 --eval-every 2"
    run = start("train.py", f"{TINY} --root {many} {options}")
    run.wait_for("step 4/10  0m")
    run.wait(lambda: run.reads(many / "val"))
    os.killpg(run.process.pid, signal.SIGINT)
    run.wait(lambda: "again: at once" in run.said.read_text())
    if times == 2:
        os.killpg(run.process.pid, signal.SIGINT)
    code, said = run.end(180)
    assert code == 130 and len(said) == 3 - times, said
    evaluated = re.findall(r"step (\d+)/10  teacher's mIoU", run.output.read_text())
    if times == 1:
        assert said[1].startswith(f"SIGINT: saved step {evaluated[-1]} to ") and saved(tmp_path) == int(evaluated[-1])
    else:
        assert said[0].endswith("again: at once") and len(evaluated) < 3  # a machine may miss the first or the second


# ----------------------------------------------------------------------------------------------------------------------
# evaluation and prediction


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, root):
    """last.pth of a run of one step."""
    out = tmp_path_factory.mktemp("run") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "stop_signals", lambda rank, world: [])
        train.main(train.parse_args(f"{TINY} --root {root} --workers 0 --out {out} --iters 1 --eval-every 1".split()))
    return out / "last.pth"


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
    truncate(*(root / "val").iterdir())
    code, said = start("evaluate.py", f"{checkpoint} --root {root} --workers {workers} --device cpu").end(120)
    assert code == 1 and len(said) == 1 and UNREADABLE in said[0], said
    assert said[0].startswith(f"evaluate.py: {root / 'val'}/val")


@pytest.mark.parametrize("workers", with_slow((False, 0), (True, 2)))
def test_an_interrupted_evaluation_ends(start, checkpoint, photographs, workers):
    evaluation = start("evaluate.py", f"{checkpoint} --root {photographs} --workers {workers} --device cpu --tta")
    evaluation.wait(lambda: evaluation.reads(photographs / "val"))
    os.killpg(evaluation.process.pid, signal.SIGINT)
    assert evaluation.end() == (130, [])


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 1])
def test_a_prediction_names_an_unreadable_image_predicts_the_others_and_ends(tmp_path, start, checkpoint, workers):
    images = camvid(tmp_path / "camvid") / "train"
    truncate(images / "train3.png")
    options = f"{checkpoint} --images {images} --masks {tmp_path / 'masks'} --workers {workers} --device cpu"
    code, said = start("tools/predict.py", options).end(120)
    assert code == 1 and len(said) == 2 and f"{images / 'train3'}{UNREADABLE.split(';')[0]}" in said[0], said
    assert said[1] == "predict.py: 1 images have no mask, for the reasons named above"
    assert sorted(path.stem for path in (tmp_path / "masks").iterdir()) == [f"train{i}" for i in (0, 1, 2, 4, 5)]


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_an_interrupted_prediction_ends(tmp_path, start, checkpoint, photographs, workers):
    options = f"--images {photographs / 'val'} --masks {tmp_path / 'masks'} --workers {workers} --device cpu"
    prediction = start("tools/predict.py", f"{checkpoint} {options}")
    prediction.wait(lambda: len(list(tmp_path.glob("masks/*.png"))) > 3)
    os.killpg(prediction.process.pid, signal.SIGINT)
    assert prediction.end() == (130, [])


# ----------------------------------------------------------------------------------------------------------------------
# two processes


@pytest.mark.slow
@pytest.mark.parametrize("rank, began", [(0, False), (0, True), (1, True)])
def test_two_processes_end_together_if_only_one_of_them_cannot_go_on(tmp_path, start, rank, began):
    root = camvid(tmp_path / "camvid", val=2)
    image = root / "val" / f"val{rank}.png"  # which only this process scores; the first one reads it before it starts
    options = f"{TINY} --root {root} --workers 1 --out {tmp_path / 'run'} --eval-every 1"
    truncate(*() if began else [image])
    run = start("train.py", options, TWO_PROCESSES)
    if began:
        run.wait_for("step 1/")
        truncate(image)
    code, said = run.end(180)
    assert code == 1 and sum(UNREADABLE in line for line in said) == 1, said  # torchrun says much more
    assert not any(line.startswith("train.py: Traceback") for line in said), said  # of the one that waits for the other


@pytest.mark.slow
@pytest.mark.parametrize("sent_to, number", [
    ("torchrun", signal.SIGTERM), ("all", signal.SIGINT), (0, signal.SIGTERM), (1, signal.SIGTERM),
])  # fmt: skip
def test_two_processes_end_together_at_a_signal_whoever_gets_it(tmp_path, start, root, sent_to, number):
    run = start("train.py", f"{TINY} --root {root} --workers 1 --out {tmp_path / 'run'}", TWO_PROCESSES)
    run.wait_for("step 3/5000")
    pids = {"torchrun": run.process.pid}
    for pid in sorted(run.alive(), reverse=True):  # a loader worker, whose id is higher, inherits it
        variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        pids |= {int(variable[5:]): pid for variable in variables if variable.startswith(b"RANK=")}
    os.killpg(run.process.pid, number) if sent_to == "all" else os.kill(pids[sent_to], number)
    code, said = run.end(60)
    assert code and sum(f": saved step {saved(tmp_path)} to {tmp_path / 'run'}" in line for line in said) == 1, said
