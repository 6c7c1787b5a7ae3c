"""Training beside models that are written out plainly: GPT-2, which takes the same steps, and the
model that gpt2_nano follows."""
import math
import random
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import FULL, column, shared_file
from test_data import lines_of, prepare
from test_evaluation import evaluated
from torch import nn

import prepare_data
import train_gpt2
from train_gpt2 import ShardedLoader


class PlainBlock(nn.Module):
    """GPT-2's, or that of gpt2_nano's original: no projection of the heads, and ReLU."""

    def __init__(self, C, n_head, original):
        super().__init__()
        self.n_head = n_head
        self.ln_1 = nn.LayerNorm(C)
        self.attn = nn.ModuleDict({part: nn.Linear(C, C) for part in "qkv"})
        self.attn["c_proj"] = nn.Identity() if original else nn.Linear(C, C)
        self.ln_2 = nn.LayerNorm(C)
        self.mlp = nn.ModuleDict({"c_fc": nn.Linear(C, 4 * C), "c_proj": nn.Linear(4 * C, C)})
        self.act = nn.ReLU() if original else nn.GELU(approximate="tanh")

    def heads(self, part, x):
        return self.attn[part](x).unflatten(2, (self.n_head, -1)).transpose(1, 2)

    def forward(self, x):
        T = x.size(1)
        normed = self.ln_1(x)
        q = self.heads("q", normed)  # (B, n_head, T, head_dim)
        k = self.heads("k", normed)
        v = self.heads("v", normed)
        scores = q @ k.mT / q.size(-1) ** 0.5
        future = torch.ones(T, T, dtype=torch.bool).triu(1)
        weights = scores.masked_fill(future, -math.inf).softmax(-1)
        y = (weights @ v).transpose(1, 2).flatten(2)
        x = x + self.attn["c_proj"](y)
        hidden = self.mlp["c_fc"](self.ln_2(x))
        return x + self.mlp["c_proj"](self.act(hidden))


def unit_sinusoids(T, C):
    wavelength = 10_000 ** (torch.arange(0, C, 2) / C)  # over 2 pi
    angle = torch.arange(T)[:, None] / wavelength  # (T, C / 2)
    return torch.stack((angle.sin(), angle.cos()), 2).flatten(1)


class PlainModel(nn.Module):
    """The original has sinusoids of size 1, no last norm, a head of its own."""

    def __init__(self, V, T, n_layer, n_head, C, original=False):
        super().__init__()
        self.wte = nn.Embedding(V, C)  # N(0, 1), as torch has it
        self.wpe = nn.Embedding(T, C)
        self.h = nn.Sequential(*[PlainBlock(C, n_head, original) for _ in range(n_layer)])
        self.ln_f = nn.Identity() if original else nn.LayerNorm(C)
        self.head = nn.Linear(C, V, bias=original)
        if original:
            self.wpe = nn.Embedding.from_pretrained(unit_sinusoids(T, C))
        else:
            self.head.weight = self.wte.weight

    def forward(self, idx):
        T = idx.size(1)
        x = self.wte(idx) + self.wpe.weight[:T]
        return self.head(self.ln_f(self.h(x))), None


def copy_of(path):
    """A plain GPT-2 with a checkpoint's weights."""
    saved = torch.load(path, weights_only=True)
    state = {}
    for name, tensor in saved["model"].items():
        name = name.removeprefix("transformer.")
        if "c_attn" in name:
            for part, piece in zip("qkv", tensor.chunk(3), strict=True):
                state[name.replace("c_attn", part)] = piece
        else:
            state[name] = tensor
    state["head.weight"] = state["wte.weight"]
    c = train_gpt2.GPTConfig(**saved["config"])
    model = PlainModel(c.vocab_size, c.block_size, c.n_layer, c.n_head, c.n_embd)
    model.load_state_dict(state)
    return model


def train_plainly(model, loader, rows, max_steps, warmup, lr):
    """The loss of each step."""
    learned = [p for p in model.parameters() if p.requires_grad]
    matrices = [p for p in learned if p.dim() > 1]
    vectors = [p for p in learned if p.dim() == 1]
    optimizer = torch.optim.AdamW(matrices, lr, (0.9, 0.95), weight_decay=0.1)
    optimizer.add_param_group({"params": vectors, "weight_decay": 0})

    def share_of_rate(step):
        if step < warmup:
            return (step + 1) / warmup
        progress = (step - warmup) / (max_steps - warmup)
        return (1 + math.cos(math.pi * progress)) / 2
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, share_of_rate)
    losses = []
    for step in range(max_steps):
        x, y = loader.batch(range(step * rows, (step + 1) * rows))
        logits, _ = model(x)
        loss = F.cross_entropy(logits.flatten(0, 1), y.flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(learned, 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return losses


def test_a_plain_gpt2_takes_the_same_steps(stories, tmp_path):
    """GPT-2 124M with FULL_TESTS."""
    data, shape = stories, dict(n_layer=2, n_head=2, n_embd=32)
    if FULL:
        data, shape = tmp_path / "data", dict(n_layer=12, n_head=12, n_embd=768)
        text = shared_file("tinyshakespeare.txt")
        prepare_data.main([str(text), "--tokenizer=gpt2", f"--out_dir={data}"])
    vocab_size = train_gpt2.open_data(data).tokenizer.vocab_size
    config = train_gpt2.GPTConfig(vocab_size, block_size=112, **shape)
    torch.manual_seed(0)
    path = tmp_path / "new.pt"
    torch.save(train_gpt2.make_checkpoint(train_gpt2.GPT(config)), path)
    train_gpt2.main([
        f"--init_from={path}", f"--data_dir={data}", f"--out_dir={tmp_path / 'run'}",
        "--rows=stream", "--batch_size=2", "--learning_rate=6e-4", "--warmup_steps=715",
        "--max_steps=200", "--dtype=float32", "--log_every=1", "--eval_tokens=112"])
    ours = column(tmp_path / "run", "train_loss")
    loader = ShardedLoader(data, "train", 112, "stream", 1)
    plain = train_plainly(copy_of(path), loader, 2, 200, 715, 6e-4)
    assert ours == pytest.approx(plain, abs=1e-3)
    assert ours[-1] < ours[0]


# ---- gpt2_nano ----


def docstrings(size):
    """At least so many bytes of English, from installed packages."""
    found = []
    for path in sorted(Path(torch.__file__).parents[1].rglob("*.py")):
        code = path.read_text(encoding="utf-8", errors="replace")
        for text in re.findall(r'"""(.*?)"""', code, re.S):
            if len(text) > 300:
                found.append(text)
        if sum(map(len, found)) > size:
            break
    random.Random(0).shuffle(found)
    return found


def test_gpt2_nano_beside_the_model_that_it_follows(tmp_path):
    """From BPE to report, on docstrings in place of FineWeb-Edu. FULL_TESTS: 5 MB, 300 steps, a
    tenth of its size."""
    size, V, T, C, rows, max_steps = 200_000, 400, 32, 16, 8, 60
    if FULL:
        size, V, T, C, rows, max_steps = 5_000_000, 9157, 256, 144, 12, 300
    data, run = tmp_path / "data", tmp_path / "run"
    docs = tmp_path / "docs.jsonl"
    docs.write_bytes(lines_of({"text": text} for text in docstrings(size)))
    prepare(docs, data, f"--vocab_size={V}")
    train_gpt2.main([
        "--preset=gpt2_nano", f"--data_dir={data}", f"--out_dir={run}", f"--n_embd={C}",
        f"--block_size={T}", f"--batch_size={rows}", f"--max_steps={max_steps}",
        "--warmup_steps=10", "--learning_rate=1e-3", f"--sample_every={max_steps // 2}",
        "--dtype=float32"])
    assert (run / "samples.md").read_text().count("## Step") == 2
    assert "bits per byte" in (run / "report.md").read_text()
    first, *_, ours = column(run, "val_bits_per_byte")

    torch.manual_seed(1)
    original = PlainModel(V, T, 12, 8, C, original=True)
    loader = ShardedLoader(data, "train", T, "stream", 1)
    train_plainly(original, loader, rows, max_steps, 10, 1e-3)
    theirs = evaluated(data, original, rows="stream", block_size=T)["val_bits_per_byte"]
    print(f"bits per byte after {max_steps} steps: gpt2_nano {ours:.3f}, original {theirs:.3f}")
    assert ours < 0.96 * first
    assert ours < 1.02 * theirs
