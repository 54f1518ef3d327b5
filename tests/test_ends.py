"""Real scripts on broken files, at stop signals and kills: no process is left, and a run resumes where it was."""

import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
import uuid
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from test_train import STOP_SIGNALS, TINY, equal, figures, last, lines
from trees import camvid, truncate

import train

ROOT = Path(__file__).parent.parent
TINY = f"{TINY} --device cpu --optimizer sgd --iters 5000 --log-every 1 --eval-every 900"
LONG = f"{TINY} --optimizer adamw --iters 12 --eval-every 1 --save-every 0 --resume"  # starts without a checkpoint
TORCHRUN = ("-m", "torch.distributed.run")
TWO_PROCESSES = (*TORCHRUN, "--standalone", "--nproc_per_node=2")
UNREADABLE = ".png could not be read (image file is truncated)"


class Script:
    """A script in a session of its own, as a terminal or a scheduler starts it, and all processes that come from it."""

    def __init__(self, folder, name, options, launcher=(), agents=1):
        self.mark, self.said, self.output = str(uuid.uuid4()), folder / "stderr", folder / "stdout"
        env = os.environ | {"OMP_NUM_THREADS": "1", "SCRIPT": self.mark}
        command = [sys.executable, *launcher, str(ROOT / name), *options.split()]
        if agents == 2:  # as on two machines
            command = ["sh", "-c", '"$@" & "$@" && wait $!', "sh", *command]
        with open(self.said, "w") as stderr, open(self.output, "w") as stdout:
            self.process = subprocess.Popen(command, stdout=stdout, stderr=stderr, env=env, start_new_session=True)

    def alive(self):
        """Return {id: environment}, which is inherited, while torchrun's processes leave the session."""
        found = {}
        for folder in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):  # it has just ended, or is another user's
                found[int(folder.name)] = (folder / "environ").read_bytes()  # a zombie has none
        return {pid: environment for pid, environment in found.items() if self.mark.encode() in environment}

    def reads(self, folder):
        """Return whether one of them has a file below the folder open."""
        for link in (link for pid in self.alive() for link in Path(f"/proc/{pid}/fd").glob("*")):
            with suppress(OSError):  # it has just been closed
                if os.readlink(link).startswith(f"{folder}/"):
                    return True
        return False

    def wait(self, condition):
        """Wait until it is true, or, if it is a text, until it has been printed."""
        deadline = time.monotonic() + 120
        while not (condition in self.output.read_text() if isinstance(condition, str) else condition()):
            assert self.process.poll() is None, f"it ended before: {self.said.read_text()}"
            assert time.monotonic() < deadline, "it never came"
            time.sleep(0.01)

    def ranks(self):
        """Return the process of each rank."""
        processes = sorted(self.alive().items(), reverse=True)  # loader workers, which inherit it, have higher ids
        return {int(rank): pid for pid, said in processes for rank in re.findall(rb"\0RANK=(\d+)", said)}

    def send(self, number, *processes):
        """Send a signal to some processes; default: to the group, as a terminal does."""
        for pid in processes or [-self.process.pid]:
            os.kill(pid, number)

    def kill(self):
        for pid in self.alive():
            os.kill(pid, signal.SIGKILL)
        self.process.wait()

    def end(self, seconds=30):
        """Return (exit code, lines of stderr without a warning) once all processes are gone; fail if one is left."""
        deadline = time.monotonic() + seconds
        while (self.process.poll() is None or self.alive()) and time.monotonic() < deadline:
            time.sleep(0.05)
        left = {pid: Path(f"/proc/{pid}/cmdline").read_bytes() for pid in self.alive()}
        assert not left, f"{left} run after {seconds} s, exit code {self.process.poll()}: {self.said.read_text()}"
        said = self.said.read_text().splitlines()
        return self.process.returncode, [line for line in said if "no labeled pixel is" not in line]  # of little trees


@pytest.fixture
def start(tmp_path):
    """Return a function that starts a script; in the end kill what is left of it."""
    for number in STOP_SIGNALS:  # background jobs and nohup ignore some, and a script inherits that
        signal.signal(number, signal.default_int_handler)
    scripts = []
    yield lambda *args: scripts.append(Script(tmp_path, *args)) or scripts[-1]
    for script in scripts:
        script.kill()


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return camvid(tmp_path_factory.mktemp("data") / "camvid", val=2)


def first_fast(*cases):
    """Return parameters, of which all but the first are run with --slow only."""
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
        run.send(signal.SIGKILL, next(pid for pid in run.alive() if pid != run.process.pid))
    code, said = run.end(120)
    says = {"loss": "the loss is nan between the steps ", "worker": "a loader worker has ended ("}
    assert code == 1 and said[-1].startswith(f"train.py: {says.get(defect, f'{root}/tr')}"), said
    assert len(said) == 1 and (UNREADABLE in said[0]) == ("image" in defect), said
    assert not (tmp_path / "run" / "last.pth").exists()


@pytest.mark.parametrize("name, workers, everywhere", first_fast(
    ("SIGINT", 2, False), ("SIGTERM", 2, True), ("SIGTERM", 1, False), ("SIGHUP", 2, False), ("SIGINT", 0, False)
))  # fmt: skip
def test_a_stop_signal_saves_and_leaves_no_process(tmp_path, start, root, name, workers, everywhere):
    out, number = tmp_path / "run", signal.Signals[name]
    run = start("train.py", f"{TINY} --root {root} --workers {workers} --out {out}")
    run.wait("step 3/5000")
    processes = run.alive() if everywhere else [run.process.pid]  # a scheduler's, to the loader workers, too
    run.send(number, *processes if name == "SIGTERM" else ())
    code, said = run.end(10)
    step = last(out)["step"]
    assert 3 <= step < 5000 and code == 128 + number
    assert said == [
        f"{name}: saving soon; a second signal ends at once",
        f"{name}: saved step {step} to {out / 'last.pth'}; continue with --resume",
    ]
    assert [line["step"] for line in lines(out)] == [*range(1, step + 1)]


@pytest.mark.slow
@pytest.mark.parametrize("name, times, ended", [("SIGINT", 1, 130), ("SIGINT", 2, 130), ("SIGTERM", 2, -15)])
def test_a_signal_in_an_evaluation_waits_for_its_scores_and_a_second_one_does_not(tmp_path, start, name, times, ended):
    many = camvid(tmp_path / "camvid", val=100, size=(320, 240))
    run = start("train.py", f"{TINY} --root {many} --workers 2 --out {tmp_path / 'run'} --iters 10 --eval-every 2")
    run.wait("step 4/10  0m")
    run.wait(lambda: run.reads(many / "val"))
    run.send(signal.Signals[name])
    run.wait(lambda: "a second signal ends at once" in run.said.read_text())
    if times == 2:
        run.send(signal.Signals[name])
    code, said = run.end(180 if times == 1 else 15)
    assert code == ended and len(said) == 3 - times, said
    evaluated = re.findall(r"step (\d+)/10  teacher's mIoU", run.output.read_text())
    if times == 1:
        step = last(tmp_path / "run")["step"]
        assert said[1].startswith(f"SIGINT: saved step {step} to ") and step == int(evaluated[-1])
        assert not (tmp_path / "run" / "panels" / f"step-{step:06d}.png").exists()
    else:
        assert len(evaluated) < 3  # a machine may miss one or two


@pytest.mark.parametrize("tool, workers", first_fast(("evaluate.py", 2), ("evaluate.py", 0), ("tools/predict.py", 2)))
def test_an_interrupted_evaluation_or_prediction_ends(tmp_path, start, root, tool, workers):
    many, out, masks = camvid(tmp_path / "many", 2, 1, size=(640, 480)), tmp_path / "run", tmp_path / "masks"
    for file in (many / "val" / "val0.png", many / "valannot" / "val0.png"):
        for number in range(1, 400):  # so that the signal comes in the middle of them on any machine
            os.link(file, file.with_name(f"val{number}.png"))
    train.main(train.parse_args(f"{TINY} --root {root} --workers 0 --out {out} --iters 1".split()))
    options = f"--root {many} --tta" if tool == "evaluate.py" else f"--images {many / 'val'} --masks {masks}"
    run = start(tool, f"{out / 'last.pth'} {options} --workers {workers} --device cpu")
    run.wait(lambda: run.reads(many / "val") if tool == "evaluate.py" else len(list(masks.glob("*.png"))) > 3)
    run.send(signal.SIGINT)
    assert run.end() == (130, [])


@pytest.mark.slow
@pytest.mark.parametrize("rank, began", [(0, False), (1, True)])
def test_two_processes_end_together_if_only_one_of_them_cannot_go_on(tmp_path, start, rank, began):
    root = camvid(tmp_path / "camvid", val=2)
    image = root / "val" / f"val{rank}.png"  # which only this process reads
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
@pytest.mark.parametrize("name, to, times", [
    ("SIGTERM", "torchrun", 1), ("SIGHUP", "torchrun", 1), ("SIGINT", "torchrun", 2), ("SIGTERM", "one", 1),
    ("SIGTERM", "all", 1),  # of which each process of the run gets two, for torchrun passes it on
])  # fmt: skip
def test_two_processes_end_together_at_a_signal_whoever_gets_it(tmp_path, start, root, name, to, times):
    run = start("train.py", f"{TINY} --root {root} --workers 1 --out {tmp_path / 'run'}", TWO_PROCESSES)
    run.wait("step 3/5000")
    processes = {"torchrun": [run.process.pid], "one": [run.ranks()[1]], "all": run.alive()}
    for _ in range(times):
        run.send(signal.Signals[name], *processes[to])
        time.sleep(0.2)
    code, said = run.end(60)
    step = last(tmp_path / "run")["step"]
    assert code and sum(f": saved step {step} to {tmp_path / 'run'}" in line for line in said) == 1, said


@pytest.mark.parametrize("agents, device", [
    pytest.param(0, "cpu", marks=pytest.mark.slow),
    pytest.param(1, "cpu", marks=pytest.mark.slow), pytest.param(2, "cpu", marks=pytest.mark.slow),
    pytest.param(0, "cuda --deterministic",
                 marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")),
])  # fmt: skip
def test_killed_processes_continue_bit_for_bit_wherever_they_were(tmp_path, start, root, monkeypatch, agents, device):
    """With torchrun, which restarts them, on one machine or two; or without it by --resume."""
    monkeypatch.setenv("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")  # else it keeps the addresses of dead processes
    with socket.create_server(("127.0.0.1", 0)) as free:
        rendezvous = f"--rdzv-backend=c10d --rdzv-id=x --rdzv-endpoint=localhost:{free.getsockname()[1]}"
    launcher = [(), TWO_PROCESSES, (*TORCHRUN, "--nnodes=2", *rendezvous.split())][agents]

    def train(out, workers=0):
        options = f"{LONG} --root {root} --device {device} --workers {workers} --out {tmp_path / out}"
        return start("train.py", options, (*launcher, "--max-restarts=1") if agents else (), agents)

    assert train("whole").end(120)[0] == 0
    run = train("run")
    run.wait("step 3/12")
    time.sleep(random.uniform(0, 0.5))  # anywhere in a step, an evaluation, a checkpoint
    run.send(signal.SIGKILL, run.ranks()[1] if agents else run.process.pid)
    if agents == 0:
        run.end()
        run = train("run", workers=1)
    run.wait("continues after step")
    run.wait("step 8/12")
    time.sleep(random.uniform(0, 0.5))
    run.kill() if agents else run.send(signal.SIGKILL, run.process.pid)
    run.end(15)  # a loader worker looks for its main process every five seconds
    assert last(tmp_path / "run")["step"] >= 7
    assert train("run").end(120)[0] == 0
    whole, killed = last(tmp_path / "whole"), last(tmp_path / "run")
    assert equal(whole, killed) and whole["step"] == killed["step"] == 12
    for event in ("train", "val"):
        assert figures(tmp_path / "whole", event) == figures(tmp_path / "run", event)
