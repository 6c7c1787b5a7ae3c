"""Nothing is lost: runs that are killed, that meet a full disk, that change the number of their processes."""
import contextlib
import errno
import functools
import gc
import multiprocessing
import os
import random
import re
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import time
import types

import pytest
import torch
import torch._dynamo  # noqa: F401 - what an optimizer imports: here, children need not
from conftest import FULL, ROOT, fails, posix
from test_mistakes import hashes
from test_training import log_of, losses, same_bytes

import train_gpt2

IMPORTED_BY = os.getpid()
CONTEXT = multiprocessing.get_context("forkserver" if os.name == "posix" else "spawn")


@pytest.fixture(scope="module", autouse=True)
def processes():
    """Children begin with everything imported: forked from a process that has done nothing else. One thread each, as
    small models like it and several processes at once need it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        if os.name == "posix":
            CONTEXT.set_forkserver_preload(["test_survival"])
            # Python 3.11 does not hand our sys.path on to it, and it skips in silence what it does not find
            patch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(ROOT / "tests")]))
            first = CONTEXT.Process(target=begins_with_everything)
            first.start()
            first.join()
            assert first.exitcode == 0
        patch.setattr(train_gpt2, "matmul_speed", lambda *_: 1e9)  # saves half a second, and in float16 a minute
        yield
    torch.set_num_threads(threads)


@pytest.fixture
def tiny_run(stories, tmp_path):
    """Options of a run of a second, with dropout, accumulation, and checkpoints between evaluations."""
    return [f"--data_dir={stories}", f"--out_dir={tmp_path / 'run'}", "--n_layer=2", "--n_head=2", "--n_embd=16",
            "--dropout=0.1", "--batch_size=4", "--grad_accum_steps=2", "--max_steps=40", "--warmup_steps=5",
            "--eval_every=6", "--eval_tokens=1000", "--sample_every=20", "--checkpoint_every=7", "--log_every=1"]


def begins_with_everything():
    """In a child: exit status 1 if this file had to be imported anew."""
    sys.exit(IMPORTED_BY == os.getpid())


def act(argv, output, environment, patch):
    """In a child: runs main(argv), its output in a file; `patch` changes train_gpt2 before."""
    with open(output, "ab", buffering=0) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ.update(environment)
    torch.set_num_threads(1)
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


def together(count, argv, tmp_path, patch=None):
    """`count` processes as torchrun starts them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        common = dict(WORLD_SIZE=str(count), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free.getsockname()[1]))
    return [Child(argv, tmp_path, patch, RANK=str(i), LOCAL_RANK=str(i), **common) for i in range(count)]


# ---- Kills -----------------------------------------------------------------------------------------------------------


def die_in(name, count):
    """Kills this process when a function of train_gpt2 is called for the count-th time."""
    *path, last = name.split(".")
    holder = functools.reduce(getattr, path, train_gpt2)
    original, calls = getattr(holder, last), iter(range(1, 10**6))

    def deadly(*args, **kwargs):
        if next(calls) == count:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **kwargs)
    setattr(holder, last, deadly)


@posix
def test_killed_at_any_instant(tiny_run, tmp_path):
    """30 times with FULL_TESTS, and at the instants that matter most. The same command always goes on, and the end is
    that of a run which nobody touched."""
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    began = time.monotonic()
    assert Child([*tiny_run, f"--out_dir={whole}"], tmp_path).wait()[0] == 0
    took = time.monotonic() - began
    draw, kills = random.Random(5), 0
    argv = [*tiny_run, f"--out_dir={broken}"]
    exact = [functools.partial(die_in, *where) for where in (
        ("os.fsync", 4),  # in a checkpoint
        ("os.replace", 3),  # before it is moved to its place
        ("evaluate", 2), ("GPT.generate", 1))]
    randoms = 30 if FULL else 2
    while kills < randoms or exact:
        at = exact.pop() if exact else None
        run = Child(argv, tmp_path, at)
        if at is None:
            time.sleep(draw.uniform(0, took))
            run.process.kill()
        status, output = run.wait()
        assert status in (0, -signal.SIGKILL), output
        if status == 0:
            compare(whole, broken)
            shutil.rmtree(broken)
        kills += at is None and status != 0
    assert Child(argv, tmp_path).wait()[0] == 0
    compare(whole, broken)
    assert not (tmp_path / "broken-2").exists() and not list(broken.glob(".*.tmp"))


def compare(whole, broken):
    same_bytes(whole, broken)
    assert losses(whole) == losses(broken)
    assert [int(row["step"]) for row in log_of(broken)] == list(range(41))


@posix
def test_killed_between_the_last_checkpoint_and_the_last_evaluation(tiny_run, tmp_path):
    """Steps 0, 6, .. 36 are evaluated, and the end is the eighth: all is trained then, but not all is told."""
    assert Child(tiny_run, tmp_path, functools.partial(die_in, "evaluate", 8)).wait()[0] == -signal.SIGKILL
    assert train_gpt2.load_checkpoint(tmp_path / "run" / "ckpt.pt")["step"] == 40
    assert not log_of(tmp_path / "run")[-1]["val_loss"]
    assert train_gpt2.main(tiny_run) == 0
    assert log_of(tmp_path / "run")[-1]["val_loss"] and not (tmp_path / "run-2").exists()


def sleep_after_steps(seconds=60):
    train_gpt2.Run.after_step = lambda *_: (print("asleep", flush=True), time.sleep(seconds))


@posix
def test_a_second_ctrl_c_leaves_at_once(tiny_run, tmp_path):
    run = Child(tiny_run, tmp_path, sleep_after_steps)
    while "asleep" not in (run.output.read_text() if run.output.exists() else ""):
        time.sleep(0.05)
    os.kill(run.process.pid, signal.SIGINT)
    time.sleep(0.7)
    assert run.process.is_alive()  # it would finish its step
    os.kill(run.process.pid, signal.SIGINT)
    status, output = run.wait(5)
    assert status == 130 and "Traceback" not in output


def test_ctrl_c_before_the_first_step(tiny_run, capsys, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt
    monkeypatch.setattr(train_gpt2, "open_data", interrupted)
    with pytest.raises(SystemExit) as stop:
        train_gpt2.main(tiny_run)
    assert stop.value.code == 130 and capsys.readouterr().err == "stopped\n"


def test_best_weights_of_another_run_are_not_taken_for_rubbish(tiny_run, tmp_path):
    """A folder that has lost its ckpt.pt, or never had one, still tells by best.pt whose it is."""
    short = [*tiny_run, "--max_steps=3"]
    train_gpt2.main(short)
    (tmp_path / "run" / "ckpt.pt").unlink()
    before = hashes(tmp_path / "run")
    train_gpt2.main([*short, "--learning_rate=0.001"])
    assert hashes(tmp_path / "run") == before and (tmp_path / "run-2" / "ckpt.pt").exists()


# ---- Disks -----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def small_files(size):
    import resource
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@posix
@pytest.mark.parametrize("size, name", [(300_000, "ckpt.pt"), *[(50_000, "best.pt"), (700, "log.csv")][:2 * FULL]])
def test_a_limit_on_file_size(size, name, tiny_run, tmp_path, capsys, monkeypatch):
    """The files of the moment before are whole, and when there is room the same command ends with the same bytes."""
    whole = tmp_path / "whole"
    train_gpt2.main([*tiny_run, f"--out_dir={whole}"])
    stop_requested = train_gpt2.Run.stop_requested
    monkeypatch.setattr(train_gpt2.Run, "stop_requested", lambda self, step: step == 9)
    monkeypatch.setattr(train_gpt2.Run, "signal", 15, raising=False)
    monkeypatch.setattr(train_gpt2.Run, "stopped", lambda self, step: self.close())
    train_gpt2.main(tiny_run)
    monkeypatch.setattr(train_gpt2.Run, "stop_requested", stop_requested)
    before = hashes(tmp_path / "run")
    with small_files(size):
        line = fails(train_gpt2.main, tiny_run, capsys)
    assert f"cannot write {tmp_path / 'run' / name}" in line and "free some space" in line
    after = hashes(tmp_path / "run")
    assert after.keys() == before.keys()
    assert all(after[path] == before[path] for path in before if path.name == "ckpt.pt")
    monkeypatch.undo()
    train_gpt2.load_checkpoint(tmp_path / "run" / "best.pt")
    assert train_gpt2.main(tiny_run) == 0
    compare(whole, tmp_path / "run")


@posix
def test_torch_wraps_what_the_disk_says(tmp_path):
    """A large tensor's failure comes as a RuntimeError of torch's; any other RuntimeError is a bug and stays one."""
    tensor = torch.zeros(10**6)
    with small_files(10**6), pytest.raises(train_gpt2.UserError, match="File too large"):
        train_gpt2.write_atomically(tmp_path / "file", lambda file: torch.save(tensor, file))
    with pytest.raises(RuntimeError, match="a bug"):
        train_gpt2.write_atomically(tmp_path / "file", lambda file: exec('raise RuntimeError("a bug")'))
    assert not list(tmp_path.iterdir())


@posix
def test_a_full_disk(tiny_run, tmp_path, capsys):
    """A real one, of 600 KB, where mounting is allowed: a checkpoint and its successor do not fit beside each other."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=600k", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("no disk can be mounted here")
    try:
        line = fails(train_gpt2.main, [*tiny_run, f"--out_dir={disk / 'run'}"], capsys)
        assert "No space left on device" in line and "free some space" in line
        step = train_gpt2.load_checkpoint(disk / "run" / "ckpt.pt")["step"]
        subprocess.run(["mount", "-o", "remount,size=20m", disk], check=True)
        assert train_gpt2.main([*tiny_run, f"--out_dir={disk / 'run'}"]) == 0
        assert f"from step {step}" in capsys.readouterr().out
        train_gpt2.main([*tiny_run, f"--out_dir={tmp_path / 'whole'}"])
        compare(tmp_path / "whole", disk / "run")
        subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
        before = hashes(disk)
        assert "Read-only file system" in fails(train_gpt2.main, [*tiny_run, f"--out_dir={disk / 'run'}"], capsys)
        assert hashes(disk) == before
    finally:
        subprocess.run(["umount", "-l", disk], check=True)


@posix
def test_a_file_system_without_locks(tiny_run, monkeypatch):
    import fcntl

    def no_locks(*_):
        raise OSError(errno.ENOLCK, "No locks available")
    monkeypatch.setattr(fcntl, "flock", no_locks)
    assert train_gpt2.main([*tiny_run, "--max_steps=2"]) == 0


def test_a_lock_on_windows(tmp_path, monkeypatch):
    """Its other module and its other error, as far as they can be played here."""
    held = set()

    def locking(number, mode, count):
        if mode != "at once" or held:
            raise PermissionError(errno.EACCES, "Permission denied")
        held.add(number)
    monkeypatch.setitem(sys.modules, "msvcrt", types.SimpleNamespace(locking=locking, LK_NBLCK="at once"))
    monkeypatch.setattr(train_gpt2, "os", types.SimpleNamespace(name="nt"))
    with train_gpt2.lock(tmp_path):
        assert train_gpt2.lock(tmp_path) is None


@pytest.mark.parametrize("script", ["train_gpt2.py", "prepare_data.py", "sample.py"])
def test_scripts_are_portable(script):
    """Text states its encoding, for Windows has another default; what only POSIX has is asked for in one place."""
    source = (ROOT / script).read_text(encoding="utf-8")
    for call in re.findall(r"(?:(?<!os\.)\bopen|\.read_text)\(.*\)", source):
        assert re.search(r'encoding="utf-8"|"[rwa]b"', call), call
    assert "catch_warnings(action" not in source  # which is newer than the oldest Python that torch runs on
    assert not re.search(r"os\.fork|SIGKILL|SIGHUP|os\.getuid|import (pwd|resource)|/tmp|/dev/", source)
    assert source.count("import fcntl") == (script == "train_gpt2.py")


# ---- Several processes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", train_gpt2.PRESETS)
def test_a_preset_runs_on_any_number_of_processes(preset):
    s, _ = train_gpt2.parse_settings(train_gpt2.Settings, [f"--preset={preset}"], "", train_gpt2.PRESETS)
    train_gpt2.check_settings(s)
    for on_a_cpu in (False, True):
        plans = {size: train_gpt2.plan_batch(s, types.SimpleNamespace(size=size, sharing=size if on_a_cpu else 1))
                 for size in (1, 2, 4, 8)}
        assert {plan.rows_per_step for plan in plans.values()} == {s.total_batch_size // s.block_size}
        assert all(plan.micro_rows <= s.batch_size for plan in plans.values())
        if on_a_cpu:  # all together take no more memory than one process would, or a row each
            assert all(plan.micro_rows == 1 or plan.micro_rows * size <= s.batch_size for size, plan in plans.items())


def stop_after_ten_steps():
    def stop(run, step):
        run.signal = signal.SIGTERM
        return step == 9
    train_gpt2.Run.stop_requested = stop


def test_other_numbers_of_processes(tiny_run, tmp_path):
    """The losses of one process; and what two have begun, one and four finish."""
    argv = [*tiny_run, "--dropout=0", "--dtype=float32", "--max_steps=20"]
    train_gpt2.main([*argv, f"--out_dir={tmp_path / 'one'}"])
    for run in together(2, [*argv, f"--out_dir={tmp_path / 'two'}"], tmp_path, stop_after_ten_steps):
        assert run.wait()[0] == 128 + signal.SIGTERM
    shutil.copytree(tmp_path / "two", tmp_path / "four")
    assert train_gpt2.main([*argv, f"--out_dir={tmp_path / 'two'}"]) == 0
    runs = together(4, [*argv, f"--out_dir={tmp_path / 'four'}"], tmp_path)
    results = [run.wait() for run in runs]
    assert [status for status, _ in results] == [0] * 4, results
    assert "from step 10" in results[0][1]
    for column in ("train_loss", "val_loss"):
        one, two, four = ([float(row[column]) for row in log_of(tmp_path / name) if row[column]]
                          for name in ("one", "two", "four"))
        assert len(one) > 3 and one == pytest.approx(two, abs=1e-5) and one == pytest.approx(four, abs=1e-5)


@posix
@pytest.mark.parametrize("victim", [0, 1] if FULL else [0])
def test_a_process_that_dies(victim, tiny_run, tmp_path):
    """The other one ends by itself, in one line, and the run goes on from its checkpoint."""
    argv = [*tiny_run, "--max_steps=100000"]
    runs = together(2, argv, tmp_path)
    while not (tmp_path / "run" / "ckpt.pt").exists():
        time.sleep(0.05)
        assert all(run.process.is_alive() for run in runs), [run.wait() for run in runs]
    runs[victim].process.kill()
    status, output = runs[1 - victim].wait(30)
    assert status == 1 and f"error: process {1 - victim} ends, because another one was killed" in output
    assert "Traceback" not in output
    runs[victim].wait()
    for run in (runs := together(2, argv, tmp_path, functools.partial(stop_soon, 20))):
        assert run.wait()[0] == 128 + signal.SIGTERM
    assert "continuing" in runs[0].output.read_text()


def stop_soon(steps):
    def stop(run, step):
        run.signal = signal.SIGTERM
        return step >= run.start + steps
    train_gpt2.Run.stop_requested = stop


@pytest.mark.skipif(not FULL or not os.path.exists("/proc/self/stat"), reason="long; finds children in /proc")
def test_torchrun_ends_all_and_goes_on(tiny_run, tmp_path):
    """With the launcher: one process is killed, and all are gone within 30 s; the same command goes on, and SIGTERM to
    the launcher lets all finish their step and save."""
    argv = [*tiny_run, "--max_steps=100000"]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
               ROOT / "train_gpt2.py", *argv]
    for number in (signal.SIGKILL, signal.SIGTERM):
        run = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        before = log_of(tmp_path / "run")[-1]["step"] if number == signal.SIGTERM else 0
        while not (tmp_path / "run" / "ckpt.pt").exists() or int(log_of(tmp_path / "run")[-1]["step"]) <= int(before):
            time.sleep(0.1)
            assert run.poll() is None, run.communicate()
        began = time.monotonic()
        if number == signal.SIGKILL:
            os.kill(worker_of(run.pid, "1"), number)
        else:
            time.sleep(1)
            run.send_signal(number)
        output, errors = run.communicate(timeout=60)
        assert run.returncode and time.monotonic() - began < 30, (output, errors)
    assert "continuing" in output and "the same command goes on" in output


def worker_of(launcher, rank):
    """The process id of a rank below torchrun."""
    for entry in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError, IndexError):
            with open(f"/proc/{entry}/environ", "rb") as file:
                environment = file.read().split(b"\0")
            with open(f"/proc/{entry}/stat", encoding="utf-8") as file:
                parent = int(file.read().rsplit(")", 1)[1].split()[1])
            if parent == launcher and b"RANK=" + rank.encode() in environment:
                return int(entry)
    raise AssertionError("no such process")


def test_a_mistake_that_one_process_meets(tiny_run, tmp_path):
    """The first process says what all meet; what only another one meets, that one says."""
    first, second = together(2, tiny_run, tmp_path, fail_on_second)
    status, output = second.wait(60)
    assert status == 2 and "error: only here" in output
    assert first.wait(30)[0] == 1


def fail_on_second():
    original = train_gpt2.step_batches

    def batches(*args):
        if os.environ["RANK"] == "1":
            raise train_gpt2.UserError("only here")
        return original(*args)
    train_gpt2.step_batches = batches


# ---- Numbers and memory ----------------------------------------------------------------------------------------------


def test_float16_counts_the_steps_that_it_skips(tiny_run, tmp_path, capsys, monkeypatch):
    """A scale that is much too large overflows at first. Its state and the count survive a stop."""
    monkeypatch.setattr(torch.amp, "GradScaler", functools.partial(torch.amp.GradScaler, init_scale=2.0**25))
    argv = [*tiny_run, "--dtype=float16", "--max_steps=12", "--eval_tokens=200", "--sample_every=100"]
    train_gpt2.main([*argv, f"--out_dir={tmp_path / 'whole'}"])
    last = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step 11/12")][0]
    state = train_gpt2.load_checkpoint(tmp_path / "whole" / "ckpt.pt")["optimizer"]
    skipped = 12 - int(state["state"][0]["step"])
    assert 2 < skipped < 12 and f"{skipped} steps skipped" in last
    assert state["scaler"]["scale"] == 2.0**25 / 2**skipped
    with monkeypatch.context() as stopping:
        stopping.setattr(train_gpt2.Run, "stop_requested", lambda self, step: step == 3)
        stopping.setattr(train_gpt2.Run, "signal", 15, raising=False)
        stopping.setattr(train_gpt2.Run, "stopped", lambda self, step: (self.save(step), self.close()))
        train_gpt2.main(argv)
    train_gpt2.main(argv)
    same_bytes(tmp_path / "whole", tmp_path / "run")
    assert losses(tmp_path / "whole") == losses(tmp_path / "run")
    resumed = train_gpt2.load_checkpoint(tmp_path / "run" / "ckpt.pt")["optimizer"]
    assert resumed["scaler"] == state["scaler"]


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory."), MemoryError(),
                                   RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate")])
def test_out_of_memory_names_what_to_halve_and_what_to_double(error, tiny_run, capsys, monkeypatch):
    def forward(*_):
        raise error
    monkeypatch.setattr(train_gpt2.MLP, "forward", forward)
    line = fails(train_gpt2.main, tiny_run, capsys)
    assert "halve --batch_size (4) and double --grad_accum_steps (2)" in line


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="memory is read from /proc")
def test_memory_and_open_files_stay_flat(tiny_run, tmp_path, monkeypatch):
    """3,000 steps with FULL_TESTS, with evaluations, samples and checkpoints among them."""
    gc.collect()  # files that earlier tests have left to it are not closed in the middle of this one
    steps = 3000 if FULL else 400
    memory, files, after_step = [], [], train_gpt2.Run.after_step

    def measure(*args):
        after_step(*args)
        with open("/proc/self/status", encoding="utf-8") as file:
            memory.append(next(int(line.split()[1]) for line in file if line.startswith("RssAnon")))  # KB
        files.append(len(os.listdir("/proc/self/fd")))
    monkeypatch.setattr(train_gpt2.Run, "after_step", measure)
    train_gpt2.main([*tiny_run, f"--max_steps={steps}", "--eval_every=50", "--checkpoint_every=50",
                     "--sample_every=100"])
    quarter = (steps - 100) // 4
    first, last = memory[100:100 + quarter], memory[-quarter:]
    print("RssAnon (MB) every tenth of the run:", [memory[i] // 1024 for i in range(0, steps, steps // 10)])
    assert statistics.median(last) - statistics.median(first) < 6000  # KB
    assert max(files[100:]) == min(files[100:])
