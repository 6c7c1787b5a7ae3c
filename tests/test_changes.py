"""A changed line of the model is in force everywhere."""
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, RUN, random_model, stopped
from test_evaluation import check_hellaswag
from test_sampling import check_cache

import train_gpt2
from train_gpt2 import GPT, GPTConfig, Process, Settings


def use_silu(patch):
    patch.setattr(train_gpt2.MLP, "forward", lambda mlp, x: mlp.c_proj(F.silu(mlp.c_fc(x))))


def check_validation(model, folder, dtype, tolerance):
    s = Settings(data_dir=folder, eval_tokens=20 * 112, device="cpu", dtype=dtype)
    data = train_gpt2.open_data(folder)
    loader = train_gpt2.open_rows(s, data, "val", None)
    process = Process(s)
    found = train_gpt2.evaluate(model, loader, s, process, data)
    with process.autocast():
        _, expected = model(*loader.batch(range(20)))
    assert found["val_loss"] == pytest.approx(expected.item(), abs=tolerance)


@torch.no_grad()
def test_everything_uses_the_changed_model(stories, monkeypatch):
    tokenizer = train_gpt2.open_data(stories).tokenizer
    config = GPTConfig(tokenizer.vocab_size, 112, n_layer=2, n_head=2, n_embd=32)
    torch.manual_seed(0)
    model = GPT(config, 0.15).eval()  # weights large enough to matter
    model.tokenizer = tokenizer
    idx = torch.arange(40)[None]
    plain, _ = model(idx)
    use_silu(monkeypatch)
    changed, _ = model(idx)
    assert not torch.allclose(changed, plain, atol=0.1)
    check_cache(model, idx, 60)  # logits with the cache, and greedy text
    check_validation(model, stories, "float32", 1e-5)
    check_validation(model, stories, "bfloat16", 1e-3)
    endings = [" who lived by the sea.", " named Tom", " wanted a kite. Then", " the"]
    contexts = ["Once there was a girl", "Ben", "Every night Mia dreamed of a map. Poor Mia"]
    check_hellaswag(model, [(context, endings, 0) for context in contexts])


def test_the_cache_serves_a_head_of_its_own():
    model = random_model(n_layer=2, scale=2, tie_weights=False)
    check_cache(model, torch.arange(5)[None], 60)


def test_the_cache_serves_layers_that_share_their_weights():
    model = random_model(n_layer=2, scale=4)
    model.transformer.h[1] = model.transformer.h[0]
    check_cache(model, torch.arange(5)[None], 60)


def test_an_edited_model_starts_a_new_run(trained):
    """And an edited comment or docstring resumes."""
    source = (ROOT / "train_gpt2.py").read_text(encoding="utf-8")
    docstring = "Multi-layer perceptron"
    line = "x = self.act(self.c_fc(x))"
    assert docstring in source
    assert line in source
    for new, said in (
            ("x = self.c_fc(x)", "run in out/run-2 (out/run has other code in MLP)"),
            ("x = self.act(self.c_fc(x))  # why", "continuing out/run from step 3")):
        edited = source.replace(docstring, "MLP").replace(line, new)
        (trained / "train_gpt2.py").write_text(edited, encoding="utf-8")
        command = [sys.executable, "train_gpt2.py", *RUN]
        assert said in subprocess.run(command, check=True, capture_output=True, text=True).stdout


def test_a_checkpoint_of_older_code(trained, capsys):
    """The first ones had neither `code` nor `threads`, and the dtype as it was given."""
    path = trained / "out" / "run" / "ckpt.pt"
    checkpoint = torch.load(path, weights_only=True)
    del checkpoint["code"], checkpoint["progress"], checkpoint["config"]["tie_weights"]
    for name in ("tie_weights", "resume", "compare"):
        del checkpoint["settings"][name]
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
    seen = []
    log_step = train_gpt2.Run.log_step

    def watch(run, *args):
        seen.append((run.process.dtype, torch.get_num_threads()))
        log_step(run, *args)
    monkeypatch.setattr(train_gpt2.Run, "log_step", watch)
    capsys.readouterr()
    assert train_gpt2.main([*RUN, "--out_dir=out/kept"]) == 0  # auto is never float16 here
    assert seen == [(torch.float16, threads)] * 3
    output = capsys.readouterr().out
    assert f"it ran with {threads + 1} threads and goes on with {threads}" in output
