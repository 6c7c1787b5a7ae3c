"""Runs: resumed to the byte, repeated in the next folder, the same on several processes."""
import csv
import os
import re
import signal
import subprocess
import sys
import time
import types

import pytest
import torch
from conftest import ROOT, fails, posix

import prepare_data
import sample
import train_gpt2


def log_of(folder):
    with open(folder / "log.csv", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def same_bytes(one, other):
    """Two checkpoints hold the same weights and optimizer state, bit for bit."""
    a, b = (torch.load(folder / "ckpt.pt", weights_only=True) for folder in (one, other))
    assert a["step"] == b["step"] and a["best_val_loss"] == b["best_val_loss"]
    for name, tensor in a["model"].items():
        assert torch.equal(tensor, b["model"][name]), name
    for i, state in a["optimizer"]["state"].items():
        assert all(torch.equal(value, b["optimizer"]["state"][i][name]) for name, value in state.items())


def losses(folder):
    return [(row["step"], row["tokens"], row["train_loss"], row["val_loss"], row["lr"]) for row in log_of(folder)]


def start(argv, script="train_gpt2.py", **environment):
    return subprocess.Popen([sys.executable, ROOT / script, *argv], text=True, cwd=ROOT, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, env=os.environ | environment)


def wait_for_step(folder, step):
    """Until the run in this folder has logged the step."""
    for _ in range(600):
        if (folder / "log.csv").exists() and f"\n{step}," in (folder / "log.csv").read_text(encoding="utf-8"):
            return
        time.sleep(0.1)
    raise AssertionError(f"step {step} was not reached")


@posix
def test_interrupted_and_killed_runs_end_with_the_same_bytes(small_run, tmp_path, capsys):
    small_run[small_run.index("--max_steps=30")] = "--max_steps=60"
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert train_gpt2.main([*small_run, f"--out_dir={whole}"]) == 0
    for number, step in ((signal.SIGINT, 7), (signal.SIGKILL, 24), (signal.SIGTERM, 41)):
        run = start([*small_run, f"--out_dir={broken}"])
        wait_for_step(broken, step)
        run.send_signal(number)
        output, errors = run.communicate(timeout=60)
        assert not errors
        if number != signal.SIGKILL:
            assert run.returncode == 128 + number and "the same command goes on" in output
    assert train_gpt2.main([*small_run, f"--out_dir={broken}"]) == 0
    assert "continuing" in capsys.readouterr().out
    same_bytes(whole, broken)
    assert losses(whole) == losses(broken)
    assert [int(row["step"]) for row in log_of(broken)] == list(range(61))


def test_again_and_changed_runs_take_the_next_free_folder(small_run, tmp_path, capsys):
    run = [*small_run, "--max_steps=4"]
    train_gpt2.main(run)
    first = (tmp_path / "run" / "ckpt.pt").read_bytes()
    train_gpt2.main(run)
    assert f"a new run in {tmp_path / 'run-2'}" in capsys.readouterr().out
    same_bytes(tmp_path / "run", tmp_path / "run-2")
    train_gpt2.main([*run, "--learning_rate=0.1"])
    assert f"a new run in {tmp_path / 'run-3'}" in capsys.readouterr().out
    assert (tmp_path / "run" / "ckpt.pt").read_bytes() == first
    train_gpt2.main([*run, "--learning_rate=0.1", "--overwrite"])
    assert f"a new run in {tmp_path / 'run'}" in capsys.readouterr().out
    assert (tmp_path / "run" / "ckpt.pt").read_bytes() != first


def test_an_edited_constant_takes_effect(small_run, tmp_path):
    """The defaults at the top of the file are what runs."""
    source = (ROOT / "train_gpt2.py").read_text(encoding="utf-8")
    assert "n_embd: int = 96" in source and "max_steps: int = " in source
    (tmp_path / "train_gpt2.py").write_text(source.replace("n_embd: int = 96", "n_embd: int = 40"), encoding="utf-8")
    argv = [small_run[0], "--max_steps=1", "--eval_tokens=500"]
    subprocess.run([sys.executable, "train_gpt2.py", *argv], cwd=tmp_path, check=True, capture_output=True)
    assert train_gpt2.load_checkpoint(tmp_path / "out" / "stories" / "ckpt.pt")["config"]["n_embd"] == 40


def test_evaluation_and_samples_leave_no_trace(small_run, tmp_path):
    often = [*small_run, f"--out_dir={tmp_path / 'often'}", "--eval_every=3", "--sample_every=4"]
    never = [*small_run, f"--out_dir={tmp_path / 'never'}", "--eval_every=1000", "--sample_every=1000"]
    for argv in (often, never):
        train_gpt2.main(argv)
    one, other = (torch.load(tmp_path / name / "ckpt.pt", weights_only=True)["model"] for name in ("often", "never"))
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("rows", ["documents", "stream"])
def test_micro_batches_change_nothing_but_rounding(small_run, tmp_path, rows):
    common = [*small_run, "--dropout=0", "--dtype=float32", f"--rows={rows}", "--total_batch_size=896", "--max_steps=8"]
    common.remove("--grad_accum_steps=2")
    for size in (8, 4, 1):
        train_gpt2.main([*common, f"--batch_size={size}", f"--out_dir={tmp_path / str(size)}"])
    whole, half, single = ([float(row["train_loss"]) for row in log_of(tmp_path / name)[:8]] for name in "841")
    assert whole == pytest.approx(half, abs=1e-5) and whole == pytest.approx(single, abs=1e-5)


def test_two_processes_give_the_losses_of_one(small_run, tmp_path):
    common = [*small_run, "--dropout=0", "--dtype=float32", "--max_steps=20"]
    train_gpt2.main([*common, f"--out_dir={tmp_path / 'one'}"])
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
               ROOT / "train_gpt2.py",
               *common, f"--out_dir={tmp_path / 'two'}"]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    for column in ("train_loss", "val_loss"):
        one, two = ([float(row[column]) for row in log_of(tmp_path / name) if row[column]] for name in ("one", "two"))
        assert len(one) == len(two) > 1 and one == pytest.approx(two, abs=1e-5)


def test_a_checkpoint_is_a_plain_file_with_huggingface_names(small_run, tmp_path):
    train_gpt2.main([*small_run, "--max_steps=3"])
    checkpoint = torch.load(tmp_path / "run" / "ckpt.pt", weights_only=True)
    assert set(checkpoint) == {"model", "optimizer", "step", "config", "settings", "tokenizer", "best_val_loss"}
    assert set(torch.load(tmp_path / "run" / "best.pt", weights_only=True)) == set(checkpoint) - {"optimizer"}
    assert "transformer.h.0.attn.c_attn.weight" in checkpoint["model"] and "lm_head.weight" not in checkpoint["model"]
    assert {t.dtype for t in checkpoint["model"].values()} == {torch.float32}
    model = train_gpt2.GPT.from_checkpoint(tmp_path / "run" / "best.pt")
    assert model.generate("Once", max_new_tokens=5, seed=1).startswith("Once")


def test_a_new_run_from_old_weights(small_run, tmp_path, capsys):
    train_gpt2.main([*small_run, "--max_steps=20"])
    last = float([row for row in log_of(tmp_path / "run") if row["val_loss"]][-1]["val_loss"])
    train_gpt2.main([*small_run, f"--init_from={tmp_path / 'run' / 'ckpt.pt'}", f"--out_dir={tmp_path / 'tuned'}"])
    assert float(log_of(tmp_path / "tuned")[0]["val_loss"]) == pytest.approx(last, abs=1e-6)
    capsys.readouterr()
    data, tokens = small_run[0], "--eval_tokens=2000"
    train_gpt2.main([data, tokens, "--eval_only", f"--init_from={tmp_path / 'run' / 'ckpt.pt'}", "--dtype=float32"])
    assert f"validation loss {last:.2f}" in capsys.readouterr().out  # its shape comes from the checkpoint
    assert "positions" in fails(train_gpt2.main, [data, f"--init_from={tmp_path / 'run' / 'ckpt.pt'}",
                                                  "--block_size=128"], capsys)


def test_a_living_run_is_left_alone(small_run, tmp_path, capsys):
    run = start([*small_run, "--max_steps=3000"])
    try:
        wait_for_step(tmp_path / "run", 12)
        assert "a run is at work" in fails(train_gpt2.main, [*small_run, "--max_steps=3000"], capsys)
    finally:
        run.kill()
        run.communicate()
    train_gpt2.main([*small_run, "--max_steps=13"])  # and the dead one blocks nobody


def test_a_run_lives_until_its_report_is_written(small_run, tmp_path, monkeypatch):
    locks, write_report = [], train_gpt2.write_report

    def watched(run, step):
        locks.append(train_gpt2.lock(run.folder))  # None: the run still has it
        return write_report(run, step)
    monkeypatch.setattr(train_gpt2, "write_report", watched)
    train_gpt2.main([*small_run, "--max_steps=3"])
    assert len(locks) > 1 and not any(locks)
    assert train_gpt2.lock(tmp_path / "run")


def test_samples(small_run, tmp_path, capsys, monkeypatch):
    train_gpt2.main([*small_run, "--max_steps=5", f"--out_dir={tmp_path / 'out' / 'mine'}"])
    monkeypatch.chdir(tmp_path)
    texts = []
    for argv in (["Once", "--seed=3"], ["Once", "--seed=3"], ["Once", "--seed=4"], ["--prompt=Once", "--seed=3"]):
        capsys.readouterr()
        assert sample.main([*argv, "--num_samples=2", "--max_new_tokens=12", "--temperature=1"]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] == texts[3] != texts[2]
    assert texts[0].startswith("Once") and "\n---------------\nOnce" in texts[0]


@pytest.mark.parametrize("options", [
    ["--pos_encoding=learned", "--activation=gelu"],
    ["--pos_encoding=sinusoidal", "--activation=relu", "--attention=manual"],
    ["--preset=tinystories_char"], ["--preset=shakespeare_cpu"],
], ids=" ".join)
def test_every_option_learns_real_text(options, shared_file, tmp_path, monkeypatch):
    """After 300 steps the validation loss is well below the unigram line: what came before is being used."""
    monkeypatch.chdir(tmp_path)
    prepare_data.main([str(shared_file("tinyshakespeare.txt")), "--tokenizer=char", "--out_dir=data/shakespeare"])
    assert train_gpt2.open_data("data/shakespeare").meta["landmarks"]["unigram"] == pytest.approx(3.35, abs=0.02)
    train_gpt2.main([*options, "--data_dir=data/shakespeare", "--rows=stream", "--max_steps=300", "--n_layer=2",
                     "--eval_every=300", "--eval_tokens=20000", "--sample_every=300", "--out_dir=run"])
    assert 1.5 < float(log_of(tmp_path / "run")[-1]["val_loss"]) < 2.8


def test_a_run_that_is_given_minutes(small_run, tmp_path, capsys):
    """It ends in time, the rate near its end, and is done: the same command then begins another."""
    argv = [*small_run, "--max_steps=100000", "--max_minutes=0.05", "--eval_every=1000", "--sample_every=100000"]
    began = time.perf_counter()
    assert train_gpt2.main(argv) == 0
    assert 3 <= time.perf_counter() - began < 10
    rates = [float(row["lr"]) for row in log_of(tmp_path / "run") if row["lr"]]
    assert max(rates) > 5e-3 and rates[-1] < 1e-4
    assert log_of(tmp_path / "run")[-1]["val_loss"]
    train_gpt2.main(argv)
    assert f"a new run in {tmp_path / 'run-2'}" in capsys.readouterr().out


def test_a_clock_that_is_looked_at_in_every_step(small_run, tmp_path):
    """However seldom the run is logged."""
    began = time.perf_counter()
    train_gpt2.main([*small_run, "--max_steps=100000", "--max_minutes=0.03", "--log_every=100000",
                     "--eval_every=100000", "--sample_every=100000", "--checkpoint_every=100000"])
    assert time.perf_counter() - began < 15 and int(log_of(tmp_path / "run")[-1]["step"]) > 1


def test_the_rate_goes_on_where_the_clock_stood(small_run, tmp_path, monkeypatch):
    """A run of some minutes that was stopped half way goes on with the rate of half way, from its first step on."""
    argv = [*small_run, "--max_steps=100000", "--max_minutes=0.05", "--eval_every=100000", "--sample_every=100000",
            "--warmup_steps=0"]

    def stop_half_way(run, step):
        run.signal = signal.SIGTERM
        return run.time_used > 0.5
    with monkeypatch.context() as patch:
        patch.setattr(train_gpt2.Run, "stop_requested", stop_half_way)
        assert train_gpt2.main(argv) == 128 + signal.SIGTERM
    stopped = int(log_of(tmp_path / "run")[-1]["step"]) + 1
    assert train_gpt2.main(argv) == 0
    rates = {int(row["step"]): float(row["lr"]) for row in log_of(tmp_path / "run") if row["lr"]}
    assert 0.3 * 6e-3 < rates[stopped] < 0.6 * 6e-3


def test_throughput_where_every_logged_step_also_evaluates(small_run, tmp_path, monkeypatch):
    """It is that of training alone: an evaluation that takes long changes nothing."""
    evaluate, clock, hours = train_gpt2.evaluate, time.perf_counter, []
    monkeypatch.setattr(train_gpt2, "evaluate", lambda *args: hours.append(1) or evaluate(*args))
    monkeypatch.setattr(train_gpt2.time, "perf_counter", lambda: clock() + 3600 * len(hours))
    train_gpt2.main([*small_run, "--log_every=10", "--eval_every=10", "--checkpoint_every=10", "--sample_every=10"])
    rows = [row for row in log_of(tmp_path / "run") if row["train_loss"]]
    speeds = [float(row["tokens_per_second"]) for row in rows[1:]]
    assert [int(row["step"]) for row in rows] == [0, 10, 20, 29] and not rows[0]["tokens_per_second"]
    tokens = [int(row["tokens"]) for row in rows]
    assert min(speeds) > (tokens[2] - tokens[1]) / 60  # with an hour more it would be less


def test_what_starts_over_says_so(small_run, tmp_path, capsys, monkeypatch):
    """--overwrite=True is no part of the commands that go on, and what it would delete it does not start from."""
    argv = [*small_run, "--overwrite=True", "--max_steps=9", "--eval_every=3"]
    with monkeypatch.context() as patch:
        patch.setattr(train_gpt2.Run, "signal", 15, raising=False)
        patch.setattr(train_gpt2.Run, "stop_requested", lambda run, step: setattr(run, "signal", 15) or step == 4)
        train_gpt2.main(argv)
    assert "the same command without --overwrite goes on" in capsys.readouterr().out
    assert train_gpt2.main([word for word in argv if "overwrite" not in word]) == 0
    assert f"(to start over: --out_dir={tmp_path / 'run'} --overwrite=True)" in capsys.readouterr().out
    again = re.search(r"\| again \| `(.*)` \|", (tmp_path / "run" / "report.md").read_text(encoding="utf-8"))[1]
    assert "--n_embd=32" in again and "overwrite" not in again
    for name in ("ckpt.pt", "best.pt"):
        file = tmp_path / "run" / name
        before = file.read_bytes()
        assert "would delete" in fails(train_gpt2.main, [*argv, f"--init_from={file}"], capsys)
        assert file.read_bytes() == before


def test_the_folder_is_free_after_any_end(small_run, tmp_path, monkeypatch):
    """Also after an error before the first step that somebody keeps, as a notebook does."""
    def announce(run, plan, loader):
        raise train_gpt2.UserError("no")
    monkeypatch.setattr(train_gpt2.Run, "announce", announce)
    with pytest.raises(SystemExit) as kept:
        train_gpt2.main(small_run)
    assert kept.value.code == 2 and train_gpt2.lock(tmp_path / "run")


def test_a_late_signal_is_the_same_one():
    """Processes agree to stop where they log; the signal itself may come to one of them only after that."""
    world = types.SimpleNamespace(size=2, main=False, device="cpu", reduce=lambda *args, **options: torch.tensor(15))
    run = train_gpt2.Run(train_gpt2.Settings(), None, None, None, None, world)
    with run.interruptible():
        assert run.stop_requested(0)
        signal.raise_signal(signal.SIGINT)
    assert run.signal == signal.SIGINT


def test_the_command_of_several_machines(monkeypatch):
    s = train_gpt2.Settings(max_steps=7)
    train_gpt2.check_settings(s)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    for size, machines in ((8, "--standalone"), (16, "--nnodes=2")):
        command = train_gpt2.command(s, types.SimpleNamespace(size=size))
        assert command == f"torchrun {machines} --nproc_per_node=8 train_gpt2.py --max_steps=7"


def test_a_missing_compiler_is_no_mistake(small_run, tmp_path):
    """torch.compile is tried on something that needs a compiler: without one it warns, and trains."""
    words = [*small_run, "--max_steps=3", "--compile_model=True", "--device=cpu"]
    run = start(words, CXX=str(tmp_path / "none"), TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "cache"))
    output, _ = run.communicate(timeout=300)
    assert run.returncode == 0 and "torch.compile does not work here" in output


def test_several_processes_are_refused_on_mps(monkeypatch):
    monkeypatch.setattr(train_gpt2, "pick_device", lambda *args: torch.device("mps"))
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(train_gpt2.UserError, match="MPS"):
        train_gpt2.World(train_gpt2.Settings())


def test_micro_batches_shrink_until_they_fit(capsys, monkeypatch):
    """Stands in for a GPU of which only four rows fit: the model says that memory ran out."""
    model = train_gpt2.GPT(train_gpt2.GPTConfig(vocab_size=11, block_size=8, n_layer=1, n_head=1, n_embd=8))
    forward, limit = model.forward, 4

    def small_forward(idx, targets):
        if len(idx) > limit:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(idx, targets)
    monkeypatch.setattr(model, "forward", small_forward)
    s = train_gpt2.Settings(device="cpu", dtype="float32", block_size=8)
    world, plan = train_gpt2.World(s), train_gpt2.Plan(rows_per_step=24, micro_rows=24)
    optimizer = train_gpt2.make_optimizer(model, s, world.device)
    train_gpt2.fit_in_memory(model, optimizer, plan, s, world)
    assert plan.micro_rows == 3 and all(p.grad is None for p in model.parameters())
    assert "going on with 3 rows" in capsys.readouterr().out
    limit = 0
    with pytest.raises(train_gpt2.UserError, match="--block_size"):
        train_gpt2.fit_in_memory(model, optimizer, plan, s, world)
    limit, taken = 24, []
    monkeypatch.setattr(torch, "empty_like", lambda p, like=torch.empty_like: taken.append(p) or like(p))
    for _ in range(2):  # a resumed run has its averages already: room for others would be too much
        train_gpt2.fit_in_memory(model, optimizer, plan, s, world)
        assert len(taken) == 2 * len(list(model.parameters()))
        model(torch.zeros((1, 8), dtype=torch.int64), torch.zeros((1, 8), dtype=torch.int64))[1].backward()
        optimizer.step()
