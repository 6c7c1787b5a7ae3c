"""A changed line of the model is in force everywhere."""
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, RUN, stopped
from test_sampling import check_cache
from test_training import losses

import train_gpt2
from train_gpt2 import GPT, GPTConfig, Settings, Process


def use_silu(patch):
    patch.setattr(train_gpt2.MLP, "forward", lambda mlp, x: mlp.c_proj(F.silu(mlp.c_fc(x))))


def use_rotary_positions(patch):
    """RoPE (Su et al. 2021): queries and keys turn by an angle that grows with the position."""
    def turned(x, start):  # (B, n_head, T, head_dim)
        T, D = x.shape[-2:]
        angle = torch.arange(start, start + T)[:, None] * 100 ** (-torch.arange(0, D, 2) / D)
        pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
        turn = torch.polar(torch.ones_like(angle), angle)  # (T, D / 2)
        return torch.view_as_real(pairs * turn).flatten(-2).to(x.dtype)

    def forward(self, x, cache=None):
        B, T, C = x.shape
        q, k, v = (t.view(B, T, self.n_head, -1).transpose(1, 2)
                   for t in self.c_attn(x).split(C, dim=2))
        q, k = (turned(t, cache.length if cache is not None else 0) for t in (q, k))
        if cache is not None:
            k, v = cache.extend(k, v)
        y = train_gpt2.causal_attention(q, k, v, 0.0, self.flash)
        return self.c_proj(y.transpose(1, 2).reshape(B, T, C))
    patch.setattr(train_gpt2.CausalSelfAttention, "forward", forward)


@torch.no_grad()
@pytest.mark.parametrize("change", [use_silu, use_rotary_positions])
def test_everything_uses_the_changed_model(change, stories, monkeypatch):
    data, T = train_gpt2.open_data(stories), 112
    config = GPTConfig(data.tokenizer.vocab_size, T, n_layer=2, n_head=2, n_embd=32)
    torch.manual_seed(0)
    model = GPT(config, 0.15).eval()  # weights large enough to matter
    model.tokenizer, encode = data.tokenizer, data.tokenizer.encode
    old = model(torch.arange(20)[None])[0]
    change(monkeypatch)
    assert not torch.allclose(model(torch.arange(20)[None])[0], old, atol=0.1)
    check_cache(model, torch.arange(40)[None], 60)  # logits with the cache, and greedy text

    # Validation, in both dtypes
    for dtype, tolerance in (("float32", 1e-5), ("bfloat16", 1e-3)):
        s = Settings(data_dir=stories, eval_tokens=20 * T, device="cpu", dtype=dtype)
        loader, process = train_gpt2.open_rows(s, data, "val", None), Process(s)
        with process.autocast():
            expected = model(*loader.batch(range(20)))[1].item()
        found = train_gpt2.evaluate(model, loader, s, process, data)
        assert found["val_loss"] == pytest.approx(expected, abs=tolerance)

    # HellaSwag
    endings = [" who lived by the sea.", " named Tom", " wanted a kite. Then", " the"]
    contexts = ["Once there was a girl", "Ben", "Every night Mia dreamed of a map. Poor Mia"]
    process = Process(Settings(device="cpu", dtype="float32"))
    chosen = train_gpt2.hellaswag(model, [(each, endings, 0) for each in contexts], process)
    for context, choices in zip(map(encode, contexts), chosen.tolist(), strict=True):
        nats = []
        for ending in map(encode, endings):
            targets = torch.tensor([[-1] * (len(context) - 1) + ending])
            mean = model(torch.tensor([context + ending[:-1]]), targets)[1].item()
            nats.append((mean * len(ending), mean))
        assert choices == torch.tensor(nats).argmin(dim=0).tolist()


def test_an_edited_model_starts_a_new_run(trained):
    """And an edited comment or docstring resumes."""
    source = (ROOT / "train_gpt2.py").read_text(encoding="utf-8")
    old = "x = self.act(self.c_fc(x))"
    for new, said in (("x = self.c_fc(x)", "run in out/run-2 (out/run has other code in MLP)"),
                      (old + "  # why", "continuing out/run from step 3")):
        edited = source.replace(old, new).replace("Multi-layer perceptron", "MLP")
        assert old in source and edited.count("MLP") > source.count("MLP")
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
    states = checkpoint["optimizer"]["state"].values()  # they were numbered
    checkpoint["optimizer"]["state"] = dict(enumerate(states))
    torch.save(checkpoint, path)
    text = GPT.from_checkpoint(path).generate("Tale 7", max_new_tokens=5, seed=1)
    assert text.startswith("Tale 7")
    assert train_gpt2.main(RUN) == 0
    assert "continuing out/run from step 3" in capsys.readouterr().out


def test_a_resumed_run_keeps_its_dtype_but_not_its_threads(trained, monkeypatch, capsys):
    """Their number is the environment's; a remark says that rounding may differ."""
    threads, seen, original = torch.get_num_threads(), [], train_gpt2.Run.log_step
    torch.set_num_threads(threads + 1)
    stopped(2, [*RUN, "--out_dir=out/kept", "--dtype=bfloat16"])
    torch.set_num_threads(threads)

    def watch(run, *args):
        seen.append((run.process.dtype, torch.get_num_threads()))
        original(run, *args)
    monkeypatch.setattr(train_gpt2.Run, "log_step", watch)
    capsys.readouterr()
    assert train_gpt2.main([*RUN, "--out_dir=out/kept"]) == 0  # --dtype=auto
    assert seen == [(torch.bfloat16, threads)] * 3
    output = capsys.readouterr().out
    assert f"it ran with {threads + 1} threads and goes on with {threads}" in output
