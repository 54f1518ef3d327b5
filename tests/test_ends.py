"""Real scripts on broken files, at stop signals and kills: all processes end, and a run goes on where it was."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
import uuid
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from test_train import TINY, equal, last, lines
from trees import camvid, truncate

import train
from data import InputError

ROOT = Path(__file__).parent.parent
TINY = f"{TINY} --device cpu --optimizer sgd --iters 5000 --log-every 1 --eval-every 900"
LONG = f"{TINY} --optimizer adamw --iters 12 --eval-every 1 --save-every 0 --resume"  # starts without a checkpoint
TWO_PROCESSES = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
UNREADABLE = ".png could not be read (image file is truncated)"


class Script:
    """A script in a session of its own, as a terminal or a scheduler starts it, and all processes that come from it."""

    def __init__(self, folder, name, options, launcher=()):
        self.mark, self.said, self.output = str(uuid.uuid4()), folder / "stderr", folder / "stdout"
        env = os.environ | {"OMP_NUM_THREADS": "1", "SCRIPT": self.mark}
        command = [sys.executable, *launcher, str(ROOT / name), *options.split()]
        with open(self.said, "w") as stderr, open(self.output, "w") as stdout:
            self.process = subprocess.Popen(command, stdout=stdout, stderr=stderr, env=env, start_new_session=True)

    def alive(self):
        """{id: environment}, which they inherit: loader workers leave the group, torchrun's processes the session."""
        found = {}
        for folder in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):  # it has just ended, or is another user's
                found[int(folder.name)] = (folder / "environ").read_bytes()  # a zombie has none
        return {pid: environment for pid, environment in found.items() if self.mark.encode() in environment}

    def reads(self, folder):
        """Whether one of them has a file below the folder open."""
        for link in (link for pid in self.alive() for link in Path(f"/proc/{pid}/fd").glob("*")):
            with suppress(OSError):  # it has just been closed
                if os.readlink(link).startswith(f"{folder}/"):
                    return True
        return False

    def wait(self, condition):
        """Waits until it holds, or, where it is a text, until it has been printed."""
        deadline = time.monotonic() + 120
        while not (condition in self.output.read_text() if isinstance(condition, str) else condition()):
            assert self.process.poll() is None, f"it ended before: {self.said.read_text()}"
            assert time.monotonic() < deadline, "it never came"
            time.sleep(0.01)

    def ranks(self):
        """The process of each rank."""
        processes = sorted(self.alive().items(), reverse=True)  # loader workers, which inherit it, have higher ids
        return {int(rank): pid for pid, said in processes for rank in re.findall(rb"\0RANK=(\d+)", said)}

    def kill(self):
        for pid in self.alive():
            os.kill(pid, signal.SIGKILL)
        self.process.wait()

    def end(self, seconds=30):
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
    yield lambda *args: scripts.append(Script(tmp_path, *args)) or scripts[-1]
    for script in scripts:
        script.kill()


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return camvid(tmp_path_factory.mktemp("data") / "camvid", val=2)


def first_fast(*cases):
    """Parameters, of which all but the first are run with --slow only."""
    return [cases[0], *(pytest.param(*case, marks=pytest.mark.slow) for case in cases[1:])]


@pytest.mark.parametrize("defect, workers", first_fast(("image", 2), ("loss", 1), ("image before", 0), ("worker", 2)))
def test_a_run_that_cannot_go_on_says_why_in_one_line_and_ends(tmp_path, start, defect, workers):
    root, rate = camvid(tmp_path / "camvid", val=2), "--lr 1e30 --head-lr 1e30" if defect == "loss" else ""
    labeled = sorted((root / "train").iterdir())[::3]
    truncate(*labeled if defect == "image before" else ())
    run = start("train.py", f"{TINY} {rate} --root {root} --workers {workers} --out {tmp_path / 'run'}")
    if defect in ("image", "worker"):
        run.wait("step 3/5000")
    if defect == "image":
        truncate(*labeled)
    if defect == "worker":  # as a machine out of memory does
        os.kill(next(pid for pid in run.alive() if pid != run.process.pid), signal.SIGKILL)
    code, said = run.end(120)
    says = {"loss": "the loss is nan between the steps ", "worker": "a loading process was killed ("}
    assert code == 1 and said[-1].startswith(f"train.py: {says.get(defect, f'{root}/tr')}"), said
    assert len(said) == 1 and (UNREADABLE in said[0]) == ("image" in defect), said
    assert not (tmp_path / "run" / "last.pth").exists()


@pytest.mark.parametrize("name, workers", first_fast(("SIGINT", 2), ("SIGTERM", 2), ("SIGINT", 0)))
def test_a_second_run_is_refused_and_a_signal_saves_the_first_and_ends(tmp_path, start, root, name, workers):
    out, options = tmp_path / "run", f"{TINY} --root {root} --workers {workers} --out {tmp_path / 'run'}"
    run = start("train.py", options)
    run.wait("step 3/5000")
    for resume in ("", "--resume"):
        with pytest.raises(InputError, match="another process is training in .*run; wait for it, or choose"):
            train.main(train.parse_args(f"{options} --iters 4 --alpha0 0.1 {resume}".split()))
    for pid in run.alive() if name == "SIGTERM" else ():  # a scheduler's, to the loader's workers too
        os.kill(pid, signal.SIGTERM)
    if name == "SIGINT":  # the terminal's
        os.killpg(run.process.pid, signal.SIGINT)
    code, said = run.end()
    step, args = last(out)["step"], json.loads((out / "args.json").read_text())
    assert 3 <= step < 5000 and code == 128 + signal.Signals[name]
    assert said == [
        f"{name}: saves when this step or evaluation is done; again: ends at once",
        f"{name}: saved step {step} to {out / 'last.pth'}; continue with --resume",
    ]
    assert [line["step"] for line in lines(out)] == [*range(1, step + 1)] and args["alpha0"] == 0.4  # its own alone


def test_a_run_outlives_what_reads_its_output_and_saves_at_a_signal(tmp_path, root):
    options = f"{TINY} --root {root} --workers 0 --out {tmp_path / 'run'}".split()
    command = [sys.executable, str(ROOT / "train.py"), *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as run:
        assert any("step 3/5000" in line for line in run.stdout)
        run.stdout.close()  # as `| tee`, which Ctrl-C ends first
        time.sleep(0.5)
        run.send_signal(signal.SIGTERM)
        assert run.wait(60) == 143 and last(tmp_path / "run")["step"] > 3


@pytest.mark.slow
@pytest.mark.parametrize("times, workers", [(1, 2), (2, 1)])
def test_a_signal_in_an_evaluation_waits_for_its_scores_and_a_second_one_does_not(tmp_path, start, times, workers):
    many = camvid(tmp_path / "camvid", val=100, size=(320, 240))
    options = f"--root {many} --workers {workers} --out {tmp_path / 'run'} --iters 10 --eval-every 2"
    run = start("train.py", f"{TINY} {options}")
    run.wait("step 4/10  0m")
    run.wait(lambda: run.reads(many / "val"))
    os.killpg(run.process.pid, signal.SIGINT)
    run.wait(lambda: "again: ends at once" in run.said.read_text())
    if times == 2:
        os.killpg(run.process.pid, signal.SIGINT)
    code, said = run.end(180)
    assert code == 130 and len(said) == 3 - times, said
    evaluated = re.findall(r"step (\d+)/10  teacher's mIoU", run.output.read_text())
    if times == 1:
        step = last(tmp_path / "run")["step"]
        assert said[1].startswith(f"SIGINT: saved step {step} to ") and step == int(evaluated[-1])
        assert not (tmp_path / "run" / "panels" / f"step-{step:06d}.png").exists()
    else:
        assert said[0].endswith("again: ends at once") and len(evaluated) < 3  # a machine may miss one or two


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


@pytest.mark.parametrize("tool, workers", first_fast(("evaluate.py", 2), ("evaluate.py", 0), ("tools/predict.py", 2)))
def test_an_interrupted_evaluation_or_prediction_ends(tmp_path, start, checkpoint, photographs, tool, workers):
    val, masks, evaluation = photographs / "val", tmp_path / "masks", tool == "evaluate.py"
    options = f"--root {photographs} --tta" if evaluation else f"--images {val} --masks {masks}"
    run = start(tool, f"{checkpoint} {options} --workers {workers} --device cpu")
    run.wait(lambda: run.reads(val) if evaluation else len(list(masks.glob("*.png"))) > 3)
    os.killpg(run.process.pid, signal.SIGINT)
    assert run.end() == (130, [])


@pytest.mark.slow
@pytest.mark.parametrize("rank, began", [(0, False), (1, True)])
def test_two_processes_end_together_if_only_one_of_them_cannot_go_on(tmp_path, start, rank, began):
    root = camvid(tmp_path / "camvid", val=2)
    image = root / "val" / f"val{rank}.png"  # which only this process scores; the first one reads it before it starts
    options = f"{TINY} --root {root} --workers 1 --out {tmp_path / 'run'} --eval-every 1"
    truncate(*() if began else [image])
    run = start("train.py", options, TWO_PROCESSES)
    if began:
        run.wait("step 1/")
        truncate(image)
    code, said = run.end(180)
    assert code == 1 and sum(UNREADABLE in line for line in said) == 1, said  # torchrun says much more
    assert not any(line.startswith("train.py: Traceback") for line in said), said  # of the one that waits for the other


@pytest.mark.slow
@pytest.mark.parametrize("sent_to, number", [("torchrun", "SIGTERM"), ("all", "SIGINT"), (1, "SIGTERM")])
def test_two_processes_end_together_at_a_signal_whoever_gets_it(tmp_path, start, root, sent_to, number):
    run = start("train.py", f"{TINY} --root {root} --workers 1 --out {tmp_path / 'run'}", TWO_PROCESSES)
    run.wait("step 3/5000")
    number, to = signal.Signals[number], run.process.pid if sent_to == "torchrun" else run.ranks().get(sent_to)
    os.killpg(run.process.pid, number) if sent_to == "all" else os.kill(to, number)
    code, said = run.end(60)
    step = last(tmp_path / "run")["step"]
    assert code and sum(f": saved step {step} to {tmp_path / 'run'}" in line for line in said) == 1, said


@pytest.mark.parametrize("device", [
    pytest.param("cpu", marks=pytest.mark.slow),
    pytest.param("cuda --deterministic", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")),
])  # fmt: skip
def test_a_killed_process_resumes_bit_for_bit_wherever_it_was(tmp_path, start, root, device):
    def train(out, workers=0):
        return start("train.py", f"{LONG} --root {root} --device {device} --workers {workers} --out {tmp_path / out}")

    assert train("whole").end(120)[0] == 0
    for step, workers in ((3, 0), (8, 1)):  # in the middle of passes over the four unlabeled images
        run = train("run", workers)
        run.wait(f"step {step}/12")
        time.sleep(random.uniform(0, 0.5))  # anywhere in a step, an evaluation, a checkpoint
        run.process.kill()
        run.end()
        assert last(tmp_path / "run")["step"] >= step - 1
    assert train("run").end(120)[0] == 0
    assert equal(last(tmp_path / "whole"), last(tmp_path / "run"))
    for event, steps in (("train", range(1, 13)), ("val", range(2, 13, 2))):
        assert [line["step"] for line in lines(tmp_path / "run", event)] == [*steps]


@pytest.mark.slow
def test_two_processes_go_on_by_themselves_when_one_is_killed_and_resume_when_all_are(tmp_path, start, root):
    def train(out, *more):
        options = f"{LONG} --root {root} --eval-every 4 --workers 0 --out {tmp_path / out}"
        return start("train.py", options, [*TWO_PROCESSES, *more])

    assert train("whole").end(120)[0] == 0
    run = train("run", "--max-restarts=1")
    run.wait("step 3/12")
    os.kill(run.ranks()[1], signal.SIGKILL)
    run.wait("continues after step")
    run.wait("step 7/12")
    time.sleep(random.uniform(0, 0.5))
    run.kill()
    assert train("run").end(120)[0] == 0
    whole, killed = last(tmp_path / "whole"), last(tmp_path / "run")
    assert equal(whole, killed) and whole["step"] == killed["step"] == 12
    assert [line["step"] for line in lines(tmp_path / "run")] == [*range(1, 13)]
