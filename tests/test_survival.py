"""Nothing is lost: runs that are killed, meet a full disk, or change their number of processes."""
import functools
import multiprocessing
import os
import platform
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from unittest.mock import DEFAULT, Mock

import pytest
import torch
import torch._dynamo  # noqa: F401 - what an optimizer imports: here, children need not
from conftest import (
    FULL,
    ROOT,
    RUN,
    column,
    contents,
    fails,
    limited,
    posix,
    stop_after,
    stopped,
)
from test_training import compare

import train_gpt2

CONTEXT = multiprocessing.get_context("forkserver" if os.name == "posix" else "spawn")


@pytest.fixture(scope="module", autouse=True)
def processes():
    """Children begin with everything imported: forked from a process that did nothing else."""
    with pytest.MonkeyPatch.context() as patch:
        if os.name == "posix":
            CONTEXT.set_forkserver_preload(["test_survival"])
            # Python 3.11 does not pass our sys.path on, and silently skips what is not found
            patch.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{ROOT / 'tests'}")
        yield


@pytest.fixture
def tiny_run(small_run):
    """Options of a run of a second, with checkpoints between evaluations."""
    return [*small_run, "--n_embd=16", "--max_steps=40", "--eval_every=6", "--eval_tokens=1000",
            "--checkpoint_every=7"]


def act(argv, output, environment, patch):
    """In a child: run main(argv), its output in a file; `patch` changes train_gpt2 before."""
    with open(output, "ab", buffering=0) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ.update(environment)
    train_gpt2.matmul_speed = lambda *_: 1e9
    if patch:
        patch()
    sys.exit(train_gpt2.main(argv))


class Child:
    """A run in a process of its own."""

    def __init__(self, argv, tmp_path, patch=None, **environment):
        self.output = tmp_path / f"output{environment.get('RANK', '')}"
        self.output.unlink(missing_ok=True)
        self.process = CONTEXT.Process(target=act, args=(argv, self.output, environment, patch))
        self.process.start()

    def wait(self, seconds=120):
        """(exit status, its output)"""
        self.process.join(seconds)
        alive = self.process.is_alive()
        self.process.kill()
        text = self.output.read_text(encoding="utf-8") if self.output.exists() else ""
        assert not alive, f"still running after {seconds} s: {text}"
        return self.process.exitcode, text

    def ends_with(self, status, seconds=120):
        """Its output, of a run that ends with this exit status."""
        found, output = self.wait(seconds)
        assert found == status, output
        return output


def together(count, argv, tmp_path, patch=None):
    """`count` processes as torchrun starts them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        _, port = free.getsockname()
    environment = dict(WORLD_SIZE=str(count), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    children = []
    for rank in map(str, range(count)):
        children.append(Child(argv, tmp_path, patch, RANK=rank, LOCAL_RANK=rank, **environment))
    return children


# ---- Kills ----


def die_in(name, count):
    """Kill this process when a function of train_gpt2 is called for the count-th time."""
    *path, last = name.split(".")
    holder = functools.reduce(getattr, path, train_gpt2)
    original = getattr(holder, last)
    calls = []

    def deadly(*args, **kwargs):
        calls.append(name)
        if len(calls) == count:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **kwargs)
    setattr(holder, last, deadly)


INSTANTS = [
    ("evaluate", 3),
    ("GPT.generate", 1),
    ("evaluate", 8),  # measured, then saved
    ("torch.save", 2),  # a checkpoint is half written
    ("os.replace", 8),  # or not yet in place
    ("write_report", 2),
    ("Run.append", 20),
]


@posix
def test_killed_at_any_instant(tiny_run, tmp_path):
    """At 30 random ones with FULL_TESTS, and at those that matter most. The same command always
    resumes, and ends as an undisturbed run does."""
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    Child(["--help"], tmp_path).wait()  # imports, once for all
    began = time.monotonic()
    Child([*tiny_run, f"--out_dir={whole}"], tmp_path).ends_with(0)
    took = time.monotonic() - began
    argv = [*tiny_run, f"--out_dir={broken}"]
    draw = random.Random(5)
    instants = [*INSTANTS, *[None] * (30 if FULL else 2)]
    while instants:
        if instants[-1]:
            run = Child(argv, tmp_path, functools.partial(die_in, *instants[-1]))
        else:
            run = Child(argv, tmp_path)
            time.sleep(draw.uniform(0, took))
            run.process.kill()
        status, output = run.wait()
        last = broken / "ckpt.pt"
        if last.exists() and train_gpt2.read_checkpoint(last)["step"] == 40:
            # It was done before that instant: the next run would be a new one
            compare(whole, broken, 40)
            shutil.rmtree(broken)
        else:
            assert status == -signal.SIGKILL, output
            instants.pop()
    Child(argv, tmp_path).ends_with(0)
    compare(whole, broken, 40)
    assert not (tmp_path / "broken-2").exists()
    assert not list(broken.glob(".*.tmp"))


def wait_for_step(run, folder, step):
    """Wait until the run in this folder has logged the step."""
    log = folder / "log.csv"
    while not log.exists() or f"\n{step}," not in log.read_text(encoding="utf-8"):
        time.sleep(0.05)
        assert run.process.is_alive(), run.wait()


@posix
def test_interrupted_runs_end_with_the_same_bytes(small_run, tmp_path, capsys):
    """While a run is alive, no other one takes its folder."""
    small_run.append("--max_steps=60")
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert train_gpt2.main([*small_run, f"--out_dir={whole}"]) == 0
    argv = [*small_run, f"--out_dir={broken}"]
    for number, step in ((signal.SIGINT, 7), (signal.SIGTERM, 31)):
        run = Child(argv, tmp_path)
        wait_for_step(run, broken, step)
        os.kill(run.process.pid, signal.SIGSTOP)
        assert "another run uses" in fails(train_gpt2.main, argv, capsys)
        os.kill(run.process.pid, signal.SIGCONT)
        os.kill(run.process.pid, number)
        assert "the same command resumes it" in run.ends_with(128 + number)
    assert train_gpt2.main(argv) == 0
    assert f"continuing {broken} from step " in capsys.readouterr().out
    compare(whole, broken, 60)
    samples = (broken / "samples.md").read_text(encoding="utf-8")
    assert re.findall(r"## Step (\d+)", samples) == ["20", "40", "60"]


def test_without_a_compiler(tiny_run, tmp_path):
    """A run that asks for torch.compile warns, and trains."""
    command = [sys.executable, ROOT / "train_gpt2.py", *tiny_run, "--max_steps=3",
               "--compile_model=true", "--device=cpu"]
    environment = os.environ | {"CXX": str(tmp_path / "none"),
                                "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    output = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    assert "torch.compile does not work here" in output.stdout


# ---- Disks ----


def test_a_file_that_another_program_reads(tmp_path, monkeypatch):
    """Windows does not replace it meanwhile; a virus scanner is soon done."""
    busy = Mock(side_effect=[PermissionError, PermissionError, DEFAULT], wraps=os.replace)
    monkeypatch.setattr(os, "replace", busy)
    train_gpt2.write_text(tmp_path / "log.csv", "new")
    assert (tmp_path / "log.csv").read_text() == "new"


@posix
def test_a_limit_on_file_size(tiny_run, tmp_path, capsys):
    """The previous checkpoint stays whole; with room again, the end has the same bytes."""
    whole, run = tmp_path / "whole", tmp_path / "run"
    train_gpt2.main([*tiny_run, f"--out_dir={whole}"])
    stopped(9, tiny_run)
    ckpt, before = Path("ckpt.pt"), contents(run)
    with limited("RLIMIT_FSIZE", 300_000):  # bytes of a file, as on a full disk
        line = fails(train_gpt2.main, tiny_run, capsys)
    assert f"cannot write {run / ckpt} (File too large)" in line
    assert "make room" in line
    after = contents(run)
    assert after[ckpt] == before[ckpt]
    assert after.keys() == before.keys()
    assert train_gpt2.main(tiny_run) == 0
    compare(whole, run, 40)


# ---- Several processes ----


def stop_after_ten_steps():
    train_gpt2.StopRequest.requested = stop_after(9)


def test_other_numbers_of_processes(tiny_run, tmp_path):
    """Two and four processes have the losses of one, and resume each other's runs."""
    one, two, four = tmp_path / "one", tmp_path / "two", tmp_path / "four"
    argv = [*tiny_run, "--dropout=0", "--dtype=float32", "--max_steps=20"]
    train_gpt2.main([*argv, f"--out_dir={one}"])
    for run in together(2, [*argv, f"--out_dir={two}"], tmp_path, stop_after_ten_steps):
        run.ends_with(128 + signal.SIGTERM)
    shutil.copytree(two, four)
    assert train_gpt2.main([*argv, f"--out_dir={two}"]) == 0
    runs = together(4, [*argv, f"--out_dir={four}"], tmp_path)
    outputs = [run.ends_with(0) for run in runs]
    assert "from step 10" in outputs[0]
    for name in ("train_loss", "val_loss"):
        expected = column(one, name)
        assert len(expected) > 3
        assert column(two, name) == pytest.approx(expected, abs=1e-5)
        assert column(four, name) == pytest.approx(expected, abs=1e-5)


@posix
def test_a_process_that_dies(tiny_run, tmp_path):
    """The other one ends by itself, with one line."""
    runs = together(2, [*tiny_run, "--max_steps=100000"], tmp_path)
    while not (tmp_path / "run" / "ckpt.pt").exists():
        time.sleep(0.05)
        for run in runs:
            assert run.process.is_alive(), run.wait()
    runs[0].process.kill()
    output = runs[1].ends_with(1, 30)
    assert "error: process 1 lost another one; the same" in output
    assert "Traceback" not in output


# ---- Numbers and memory ----


def take_the_data_away():
    """As on a second machine that nobody copied it to."""
    if os.environ["RANK"] == "1":
        open_data = train_gpt2.open_data
        train_gpt2.open_data = lambda data_dir: open_data("elsewhere")


def test_a_machine_without_the_data_names_itself(tiny_run, tmp_path):
    _, second = together(2, [*tiny_run, f"--out_dir={tmp_path}/run"], tmp_path, take_the_data_away)
    line = second.ends_with(2).strip().splitlines()[-1]
    assert line.startswith("error: no train shards in elsewhere; ")
    assert f"(process 1 on {platform.node()}: each machine needs the data" in line


def test_several_processes_without_cuda_train_on_cpus(monkeypatch):
    """A Mac has one MPS device, which gloo cannot reach."""
    join = Mock()
    monkeypatch.setattr(train_gpt2.dist, "init_process_group", join)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("mps"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert train_gpt2.Process(train_gpt2.Settings()).device.type == "cpu"
    join.assert_called_once_with("gloo")


def test_float16s_scaler_survives_a_stop(tiny_run, tmp_path, monkeypatch):
    """A scale that is much too large overflows at first, and those steps are skipped."""
    scaler = functools.partial(torch.amp.GradScaler, init_scale=2.0**25)
    monkeypatch.setattr(torch.amp, "GradScaler", scaler)
    argv = [*tiny_run, "--dtype=float16", "--max_steps=12", "--eval_tokens=200",
            "--grad_accum_steps=1"]
    whole, run = tmp_path / "whole", tmp_path / "run"
    train_gpt2.main([*argv, f"--out_dir={whole}"])
    saved = train_gpt2.read_checkpoint(whole / "ckpt.pt")["optimizer"]
    skipped = 12 - int(saved["state"]["transformer.wte.weight"]["step"])
    assert 2 < skipped < 12
    assert saved["scaler"]["scale"] == 2.0**25 / 2**skipped
    stopped(3, argv)
    train_gpt2.main(argv)
    compare(whole, run, 12)
    resumed = train_gpt2.read_checkpoint(run / "ckpt.pt")["optimizer"]
    assert resumed["scaler"] == saved["scaler"]


@pytest.mark.parametrize("holder, name, error", [
    (train_gpt2.MLP, "forward", torch.OutOfMemoryError("CUDA out of memory.")),
    (train_gpt2.MLP, "forward", RuntimeError("DefaultCPUAllocator: can't allocate memory")),
    (torch.optim.Optimizer, "load_state_dict", torch.OutOfMemoryError("CUDA out of memory.")),
    (torch.optim.Optimizer, "load_state_dict", MemoryError()),
])
def test_out_of_memory_names_what_to_halve_and_what_to_double(
        holder, name, error, trained, capsys, monkeypatch):
    """In a step, or while a run resumes."""
    monkeypatch.setattr(holder, name, Mock(side_effect=error))
    line = fails(train_gpt2.main, RUN, capsys)
    assert "halve --batch_size (4) and double --grad_accum_steps (1)" in line
    assert "--overwrite" not in line
