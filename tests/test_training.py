"""Runs resume bit for bit, or start again in the next folder."""
import signal
import time

import pytest
import torch
from conftest import RUN, column, fails, log_of, put, stopped

import train_gpt2
from train_gpt2 import GPT, read_checkpoint


def same_tensors(one, other):
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name


def same_bytes(one, other):
    """Two runs have the same weights and optimizer state, bit for bit."""
    a, b = read_checkpoint(one / "ckpt.pt"), read_checkpoint(other / "ckpt.pt")
    assert a["step"] == b["step"]
    assert a["best_val_loss"] == b["best_val_loss"]
    same_tensors(a["model"], b["model"])
    states, others = a["optimizer"]["state"], b["optimizer"]["state"]
    assert states.keys() == others.keys()
    for name in states:
        same_tensors(states[name], others[name])


def losses(folder):
    """The log without what a clock decides."""
    log = log_of(folder)
    for row in log:
        del row["tokens_per_second"], row["seconds"]
    return log


def compare(whole, broken, steps):
    """Two runs ended alike: weights, log, samples; and no step is logged twice."""
    same_bytes(whole, broken)
    log = losses(broken)
    assert log == losses(whole)
    assert [int(row["step"]) for row in log] == list(range(steps + 1))
    assert (whole / "samples.md").read_bytes() == (broken / "samples.md").read_bytes()


def test_where_a_run_starts_and_why(small_run, tmp_path, capsys):
    """After the end, changed, overwritten, stopped, or beside other files."""
    at, first = tmp_path / "run", tmp_path / "run" / "ckpt.pt"
    argv = [*small_run, "--max_steps=9", "--eval_every=3"]
    faster = [*argv, "--learning_rate=0.1"]

    def said(argv):
        """What a run to the end prints."""
        capsys.readouterr()
        assert train_gpt2.main(argv) == 0
        return capsys.readouterr().out

    assert f"a new run in {at}\n" in said(argv)
    before = first.read_bytes()
    assert f"a new run in {at}-2 ({at} is done)\n" in said(argv)
    assert f"{at}-3 ({at}-2 has learning_rate=0.008)" in said(faster)
    assert first.read_bytes() == before

    assert stopped(4, [*faster, "--overwrite"]) == 128 + signal.SIGTERM
    output = capsys.readouterr().out
    assert f"a new run in {at}\n" in output
    assert "the same command without --overwrite resumes it" in output
    assert f"{at} from step 5 (to start over: --out_dir={at} --overwrite)\n" in said(faster)

    before = first.read_bytes()
    line = fails(train_gpt2.main, [*argv, "--overwrite", f"--init_from={first}"], capsys)
    assert f"would delete {first}" in line
    assert first.read_bytes() == before

    own = tmp_path / "own"
    own.mkdir()
    (own / "thesis.txt").write_text("mine")
    assert f"{own}-2 ({own} holds other files)" in said([*argv, f"--out_dir={own}"])
    assert [path.name for path in own.iterdir()] == ["thesis.txt"]


def weights_of(folder):
    return read_checkpoint(folder / "ckpt.pt")["model"]


def test_evaluation_and_samples_leave_no_trace(small_run, tmp_path, monkeypatch):
    often, never = tmp_path / "often", tmp_path / "never"
    train_gpt2.main([*small_run, f"--out_dir={often}", "--eval_every=3", "--sample_every=4"])
    monkeypatch.setattr(train_gpt2, "evaluate",
                        lambda *_: {"val_loss": 1.0, "val_bits_per_byte": 1.0})
    monkeypatch.setattr(train_gpt2.Run, "show_sample", lambda *_: None)
    train_gpt2.main([*small_run, f"--out_dir={never}"])
    same_tensors(weights_of(often), weights_of(never))


@pytest.mark.parametrize("rows", ["documents", "stream"])
def test_micro_batches_change_nothing_but_rounding(small_run, tmp_path, rows):
    small_run.remove("--grad_accum_steps=2")
    argv = [*small_run, "--dropout=0", "--dtype=float32", f"--rows={rows}",
            "--total_batch_size=896", "--max_steps=8"]
    train_gpt2.main([*argv, "--batch_size=8", f"--out_dir={tmp_path / 'whole'}"])
    whole = column(tmp_path / "whole", "train_loss")
    for size in ("4", "1"):
        train_gpt2.main([*argv, f"--batch_size={size}", f"--out_dir={tmp_path / size}"])
        assert column(tmp_path / size, "train_loss") == pytest.approx(whole, abs=1e-5)


def test_a_checkpoint_is_a_plain_file_and_starts_new_runs(small_run, stories, tmp_path, capsys):
    argv = [*small_run, "--max_steps=20", "--dtype=float32"]
    train_gpt2.main(argv)
    path = tmp_path / "run" / "ckpt.pt"
    checkpoint = torch.load(path, weights_only=True)
    assert set(checkpoint) == {"model", "optimizer", "step", "config", "settings", "tokenizer",
                               "best_val_loss", "code", "progress"}
    best = torch.load(path.with_name("best.pt"), weights_only=True)
    assert set(best) == set(checkpoint) - {"optimizer"}
    weights = checkpoint["model"]
    assert "transformer.h.0.attn.c_attn.weight" in weights
    assert "lm_head.weight" not in weights
    for tensor in weights.values():
        assert tensor.dtype == torch.float32

    *_, last = column(tmp_path / "run", "val_loss")
    train_gpt2.main([*argv, f"--init_from={path}", f"--out_dir={tmp_path / 'tuned'}"])
    first, *_ = column(tmp_path / "tuned", "val_loss")
    assert first == pytest.approx(last, abs=1e-6)
    capsys.readouterr()
    train_gpt2.main([f"--data_dir={stories}", "--eval_tokens=2000", "--eval_only",
                     f"--init_from={path}", "--dtype=float32"])  # the shape is the checkpoint's
    assert f"\n{path} on {stories}: {last:.4f}, " in capsys.readouterr().out


def test_a_checkpoint_of_older_code(trained, capsys):
    """The first ones had neither `code` nor `threads`, and the dtype as it was given."""
    path = trained / "out" / "run" / "ckpt.pt"
    checkpoint = torch.load(path, weights_only=True)
    for where in ("code", "progress", "config tie_weights", "settings tie_weights",
                  "settings resume", "settings compare"):
        put(checkpoint, where, None)
    # They were numbered, matrices first
    states, weights = checkpoint["optimizer"]["state"], checkpoint["model"]
    names = sorted(states, key=lambda name: weights[name].dim() < 2)
    checkpoint["optimizer"]["state"] = {i: states[name] for i, name in enumerate(names)}
    torch.save(checkpoint, path)
    text = GPT.from_checkpoint(path).generate("Tale 7", max_new_tokens=5, seed=1)
    assert text.startswith("Tale 7")
    assert train_gpt2.main(RUN) == 0
    assert "continuing out/run from step 3" in capsys.readouterr().out


def test_a_resumed_run_keeps_its_dtype_but_not_its_threads(trained, monkeypatch, capsys):
    """Their number is the environment's; a remark says that rounding may differ."""
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    stopped(2, [*RUN, "--out_dir=out/kept", "--dtype=float16"])
    torch.set_num_threads(threads)
    assert train_gpt2.main([*RUN, "--out_dir=out/kept"]) == 0  # auto is never float16 here
    assert torch.get_num_threads() == threads
    output = capsys.readouterr().out
    assert f"it ran with {threads + 1} threads and goes on with {threads}" in output
    assert read_checkpoint("out/kept/ckpt.pt")["progress"]["dtype"] == "float16"


def test_max_minutes_ends_a_run_that_other_minutes_resume(small_run, tmp_path, capsys):
    """Even with rare logs, and with no effect on the weights."""
    run, whole = tmp_path / "run", tmp_path / "whole"
    seldom = [*small_run, "--log_every=100000", "--eval_every=100000", "--checkpoint_every=100000"]
    assert train_gpt2.main([*seldom, "--max_minutes=0.0001"]) == 0
    assert "the same command resumes it" in capsys.readouterr().out
    assert train_gpt2.main([*seldom, "--max_minutes=5"]) == 0
    output = capsys.readouterr().out
    assert f"continuing {run}" in output
    assert "done in" in output
    train_gpt2.main([*seldom, f"--out_dir={whole}"])
    same_bytes(whole, run)


def test_throughput_is_that_of_training_alone(small_run, tmp_path, monkeypatch):
    """An evaluation that takes an hour changes nothing."""
    evaluate, clock = train_gpt2.evaluate, time.perf_counter
    hours = []

    def evaluate_for_an_hour(*args):
        hours.append(1)
        return evaluate(*args)
    monkeypatch.setattr(train_gpt2, "evaluate", evaluate_for_an_hour)
    monkeypatch.setattr(train_gpt2.time, "perf_counter", lambda: clock() + 3600 * len(hours))
    train_gpt2.main([*small_run, "--log_every=10"])
    speeds = column(tmp_path / "run", "tokens_per_second")
    assert len(speeds) == 3
    assert min(speeds) > 100  # of some 8,000 tokens between two lines
