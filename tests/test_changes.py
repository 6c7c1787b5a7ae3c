"""Who changes a line of the model gets the changed model everywhere."""
import subprocess
import sys

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from conftest import ROOT
from test_mistakes import RUN, trained, trained_once  # noqa: F401 - fixtures
from test_training import losses, stop_after

import train_gpt2
from train_gpt2 import GPT, GPTConfig, KVCache, Settings, World, encode_prompt


def use_silu(patch):
    original = train_gpt2.MLP.__init__

    def changed(self, config):
        original(self, config)
        self.act = nn.SiLU()
    patch.setattr(train_gpt2.MLP, "__init__", changed)


def use_rotary_positions(patch):
    """RoPE (Su et al. 2021): queries and keys turn by an angle that grows with the position."""
    def turned(x, start):  # (B, n_head, T, head_dim)
        T, D = x.shape[-2:]
        position = torch.arange(start, start + T, device=x.device)[:, None]
        angle = position * 100 ** (-torch.arange(0, D, 2, device=x.device) / D)  # (T, D/2)
        a, b = x[..., 0::2], x[..., 1::2]
        cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
        return torch.stack((a * cos - b * sin, a * sin + b * cos), dim=-1).flatten(-2)

    def forward(self, x, cache=None):
        B, T, C = x.shape
        q, k, v = (t.view(B, T, self.n_head, -1).transpose(1, 2)
                   for t in self.c_attn(x).split(C, dim=2))
        start = cache.length if cache is not None else 0
        q, k = turned(q, start), turned(k, start)
        if cache is not None:
            k, v = cache.extend(self, k, v)
        y = train_gpt2.causal_attention(q, k, v, 0.0, self.flash)
        return self.c_proj(y.transpose(1, 2).reshape(B, T, C))

    original = GPT.__init__

    def without_positions(self, *args):
        original(self, *args)
        nn.init.zeros_(self.transformer.wpe.weight).requires_grad_(False)
    patch.setattr(train_gpt2.CausalSelfAttention, "forward", forward)
    patch.setattr(GPT, "__init__", without_positions)


@pytest.fixture(params=[use_silu, use_rotary_positions], ids=lambda change: change.__name__)
def changed(request, monkeypatch):
    """A function that builds models of the changed code, with weights large enough to matter."""
    def build(tokenizer, **shape):
        torch.manual_seed(0)
        config = dict(block_size=112, n_layer=2, n_head=2, n_embd=32) | shape
        plain = GPT(GPTConfig(vocab_size=tokenizer.vocab_size, **config), 0.15)
        with monkeypatch.context() as patch:
            request.param(patch)
            model = GPT(GPTConfig(vocab_size=tokenizer.vocab_size, **config), 0.15)
            wpe = model.transformer.wpe.weight.clone()
            model.load_state_dict(plain.state_dict() | {"transformer.wpe.weight": wpe})
            idx = torch.arange(20)[None]
            assert not torch.allclose(model(idx)[0], plain(idx)[0], atol=0.1)  # it is another one
        request.param(monkeypatch)
        model.tokenizer = tokenizer
        return model.eval()
    return build


@torch.no_grad()
def test_sampling_uses_the_changed_model(changed, stories):
    """Logits with the cache are those without it, and so is greedy text."""
    model = changed(train_gpt2.open_data(stories).tokenizer)
    prompt = "Once there was a brave girl named Ruby"
    idx = torch.tensor([encode_prompt(model, prompt)])
    tokens = train_gpt2.stream_tokens(model, idx, 60, temperature=0)
    for token, logits in tokens:
        plain = model(idx)[0][:, -1]  # (1, V), read anew from the first token on
        assert (logits - plain).abs().max() < 1e-4
        likeliest = plain[0].topk(2).values
        if likeliest[0] - likeliest[1] > 1e-3:
            assert token.item() == plain.argmax()
        idx = torch.cat((idx, token[:, None]), dim=1)
    new = idx[0, -60:].tolist()
    new = new[:new.index(model.tokenizer.eot)] if model.tokenizer.eot in new else new
    text = model.generate(prompt, max_new_tokens=60, temperature=0)
    assert text == prompt + model.tokenizer.decode(new)
    cache = KVCache(112)  # also in pieces of several tokens
    pieces = [model(piece, piece, cache)[0] for piece in idx.split([5, 1, 17, idx.size(1) - 23], 1)]
    assert (torch.cat(pieces, dim=1) - model(idx)[0]).abs().max() < 1e-4


@torch.no_grad()
def test_evaluation_uses_the_changed_model(changed, stories):
    data = train_gpt2.open_data(stories)
    model = changed(data.tokenizer)
    s = Settings(eval_tokens=2240, device="cpu", dtype="float32")
    loader = train_gpt2.ShardedLoader(stories, "val", 112, "documents", None, 871, data.eot)
    x, y = loader.batch(range(20))
    found = train_gpt2.evaluate(model, loader, s, World(s), data)
    assert found["val_loss"] == pytest.approx(model(x, y)[1].item(), abs=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        expected = model(x, y)[1].item()
    s.dtype = "bfloat16"
    rough = train_gpt2.evaluate(model, loader, s, World(s), data)["val_loss"]
    assert rough == pytest.approx(expected, abs=1e-3)


@torch.no_grad()
def test_hellaswag_uses_the_changed_model(changed, stories):
    model = changed(train_gpt2.open_data(stories).tokenizer)
    endings = [" who lived by the sea.", " named Tom", " wanted a kite. Then", " the"]
    contexts = ["Once there was a girl", "Ben", "Every night Mia dreamed of a map. Poor Mia"]
    questions = [(context, endings[i:] + endings[:i], 0)
                 for context in contexts for i in range(4)]
    world = World(Settings(device="cpu", dtype="float32"))
    chosen = train_gpt2.hellaswag(model, questions, world).tolist()
    for (context, endings, _), choices in zip(questions, chosen, strict=True):
        nats, context = [], model.tokenizer.encode(context)
        for ending in map(model.tokenizer.encode, endings):
            logits = model(torch.tensor([context + ending[:-1]]))[0][0, -len(ending):]
            nats.append(F.cross_entropy(logits, torch.tensor(ending), reduction="none"))
        assert choices == [min(range(4), key=lambda i: nats[i].sum()),
                           min(range(4), key=lambda i: nats[i].mean())]


def test_an_edited_model_starts_a_new_run(trained):  # noqa: F811
    """An edited comment resumes; an edited constant that a preset overrides is named."""
    source = (ROOT / "train_gpt2.py").read_text(encoding="utf-8")

    def run(edited, *options):
        (trained / "train_gpt2.py").write_text(edited, encoding="utf-8")
        command = [sys.executable, "train_gpt2.py", *RUN, *options]
        result = subprocess.run(command, check=True, capture_output=True, text=True)
        return result.stdout
    old, new = "x = self.act(self.c_fc(x))", "x = 1.1 * self.act(self.c_fc(x))"
    assert old in source and "beta2: float = 0.95" in source
    output = run(source.replace(old, new).replace("beta2: float = 0.95", "beta2: float = 0.9"),
                 "--preset=shakespeare_char")
    assert "note: preset shakespeare_char overrides the edited beta2\n" in output
    assert "a new run in out/run-2 (out/run holds a run with rows=documents)" in output
    output = run(source.replace(old, new))
    assert "a new run in out/run-3 (out/run holds a run of other model code)" in output
    commented = source.replace(old, old + "  # why").replace("Multi-layer perceptron:", "MLP:")
    output = run(commented)
    assert "continuing out/run from step 3" in output


def test_a_checkpoint_of_older_code(trained, capsys):  # noqa: F811
    """Commit 9ba26c6 wrote neither `code` nor `threads`, and the dtype as it was given."""
    path = trained / "out" / "run" / "ckpt.pt"
    checkpoint = torch.load(path, weights_only=True)
    del checkpoint["code"], checkpoint["settings"]["threads"]
    checkpoint["settings"]["dtype"] = "auto"
    torch.save(checkpoint, path)
    text = GPT.from_checkpoint(path).generate("Tale 7", max_new_tokens=5, seed=1)
    assert text.startswith("Tale 7")
    assert train_gpt2.main(RUN) == 0
    assert "continuing out/run from step 3" in capsys.readouterr().out


def test_a_resumed_run_keeps_its_dtype_and_threads(trained, monkeypatch):  # noqa: F811
    argv = [word for word in RUN if "out_dir" not in word]
    threads, seen = torch.get_num_threads(), []
    torch.set_num_threads(threads + 1)
    with monkeypatch.context() as patch:
        patch.setattr(train_gpt2.StopRequest, "requested", stop_after(2))
        train_gpt2.main([*argv, "--out_dir=out/kept", "--dtype=bfloat16"])
        patch.setattr(train_gpt2.StopRequest, "requested", stop_after(99))
        train_gpt2.main([*argv, "--out_dir=out/whole", "--dtype=bfloat16"])
    torch.set_num_threads(threads)
    original = train_gpt2.Run.log_step

    def watch(run, *args):
        seen.append((run.world.dtype, torch.get_num_threads()))
        original(run, *args)
    monkeypatch.setattr(train_gpt2.Run, "log_step", watch)
    assert train_gpt2.main([*argv, "--out_dir=out/kept"]) == 0  # --dtype=auto
    assert seen == [(torch.bfloat16, threads + 1)] * 3 and torch.get_num_threads() == threads
    assert losses(trained / "out" / "kept") == losses(trained / "out" / "whole")
