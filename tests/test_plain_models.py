"""Training beside models that are written out plainly: GPT-2, which takes the same steps, and the
model that gpt2_nano follows."""
import math
import random
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import FULL, log_of
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
        self.ln_1, self.ln_2 = nn.LayerNorm(C), nn.LayerNorm(C)
        self.attn = nn.ModuleDict({part: nn.Linear(C, C) for part in "qkv"})
        self.attn["c_proj"] = nn.Identity() if original else nn.Linear(C, C)
        self.mlp = nn.ModuleDict({"c_fc": nn.Linear(C, 4 * C), "c_proj": nn.Linear(4 * C, C)})
        self.act = nn.ReLU() if original else nn.GELU(approximate="tanh")

    def forward(self, x):
        normed, T = self.ln_1(x), x.size(1)
        q, k, v = (self.attn[part](normed).unflatten(2, (self.n_head, -1)).transpose(1, 2)
                   for part in "qkv")
        scores = q @ k.mT / q.size(-1) ** 0.5
        scores = scores.masked_fill(torch.ones(T, T, dtype=torch.bool).triu(1), -math.inf)
        heads = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
        x = x + self.attn["c_proj"](heads)
        return x + self.mlp["c_proj"](self.act(self.mlp["c_fc"](self.ln_2(x))))


class PlainModel(nn.Module):
    """The original has sinusoids of size 1, no last norm, a head of its own."""

    def __init__(self, V, T, n_layer, n_head, C, original=False):
        super().__init__()
        self.wte, self.wpe = nn.Embedding(V, C), nn.Embedding(T, C)  # N(0, 1), as torch has them
        self.h = nn.Sequential(*(PlainBlock(C, n_head, original) for _ in range(n_layer)))
        self.ln_f = nn.Identity() if original else nn.LayerNorm(C)
        self.head = nn.Linear(C, V, bias=original)
        if original:
            angle = torch.arange(T)[:, None] / 10_000 ** (torch.arange(0, C, 2) / C)
            table = torch.stack((angle.sin(), angle.cos()), 2).flatten(1)
            self.wpe = nn.Embedding.from_pretrained(table)
        else:
            self.head.weight = self.wte.weight

    def forward(self, idx):
        return self.head(self.ln_f(self.h(self.wte(idx) + self.wpe.weight[:idx.size(1)]))), None


def copy_of(path):
    """A plain GPT-2 with a checkpoint's weights."""
    saved, state = torch.load(path, weights_only=True), {}
    for name, tensor in saved["model"].items():
        parts = "qkv" if "c_attn" in name else [""]
        for part, piece in zip(parts, tensor.chunk(len(parts)), strict=True):
            state[name.removeprefix("transformer.").replace("c_attn", part)] = piece
    sizes = "vocab_size", "block_size", "n_layer", "n_head", "n_embd"
    model = PlainModel(*(saved["config"][size] for size in sizes))
    model.load_state_dict(state | {"head.weight": state["wte.weight"]})
    return model


def train_plainly(model, loader, rows, max_steps, warmup, lr):
    """The loss of each step."""
    learned, losses = [p for p in model.parameters() if p.requires_grad], []
    optimizer = torch.optim.AdamW(
        [{"params": [p for p in learned if p.dim() > 1], "weight_decay": 0.1},
         {"params": [p for p in learned if p.dim() == 1], "weight_decay": 0}], lr, (0.9, 0.95))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: (
        (step + 1) / warmup if step < warmup else
        0.5 + 0.5 * math.cos(math.pi * (step - warmup) / (max_steps - warmup))))
    for step in range(max_steps):
        x, y = loader.batch(range(step * rows, (step + 1) * rows))
        loss = F.cross_entropy(model(x)[0].flatten(0, 1), y.flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(learned, 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("max_steps, warmup, origin", [
    (200, 715, "new"), (20, 10, "converted")])
def test_a_plain_gpt2_takes_the_same_steps(max_steps, warmup, origin, stories, tmp_path, request):
    """With new weights and transformers'. GPT-2 124M with FULL_TESTS."""
    shape, data = dict(n_layer=2, n_head=2, n_embd=32), stories
    if FULL:
        shape, data = dict(n_layer=12, n_head=12, n_embd=768), tmp_path / "data"
        text = request.getfixturevalue("shared_file")("tinyshakespeare.txt")
        prepare_data.main([str(text), "--tokenizer=gpt2", f"--out_dir={data}"])
    V, path = train_gpt2.open_data(data).tokenizer.vocab_size, tmp_path / "new.pt"
    torch.manual_seed(0)
    if origin == "new":
        model = train_gpt2.GPT(train_gpt2.GPTConfig(V, 112, **shape))
        torch.save(train_gpt2.make_checkpoint(model), path)
    else:
        transformers = pytest.importorskip("transformers")
        config = transformers.GPT2Config(vocab_size=V, n_positions=112, **shape)
        transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "theirs")
        path = prepare_data.convert_weights(str(tmp_path / "theirs"), str(tmp_path / "converted"))
    train_gpt2.main([
        f"--init_from={path}", f"--data_dir={data}", f"--out_dir={tmp_path / 'run'}",
        "--rows=stream", "--batch_size=2", "--learning_rate=6e-4", f"--warmup_steps={warmup}",
        f"--max_steps={max_steps}", "--dtype=float32", "--log_every=1", "--eval_tokens=112"])
    ours = [float(row["train_loss"]) for row in log_of(tmp_path / "run") if row["train_loss"]]
    loader = ShardedLoader(data, "train", 112, "stream", 1)
    plain = train_plainly(copy_of(path), loader, 2, max_steps, warmup, 6e-4)
    print(f"largest difference: {max(abs(a - b) for a, b in zip(ours, plain, strict=True)):.1e}")
    assert ours == pytest.approx(plain, abs=1e-3) and ours[-1] < ours[0]


# ---- gpt2_nano ----


def docstrings(size):
    """At least so many bytes of English, from installed packages."""
    found = []
    for path in sorted(Path(torch.__file__).parents[1].rglob("*.py")):
        texts = re.findall(r'"""(.*?)"""', path.read_text(encoding="utf-8", errors="replace"), re.S)
        found += [text for text in texts if len(text) > 300]
        if sum(map(len, found)) > size:
            break
    return random.Random(0).sample(found, len(found))


def test_gpt2_nano_beside_the_model_that_it_follows(tmp_path):
    """From BPE to report, on docstrings in place of FineWeb-Edu. FULL_TESTS: 5 MB, 300 steps, a
    tenth of its size."""
    size, V, T, C, rows, max_steps = 200_000, 400, 32, 16, 8, 60
    if FULL:
        size, V, T, C, rows, max_steps = 5_000_000, 9157, 256, 144, 12, 300
    data, run, docs = (tmp_path / name for name in ("data", "run", "docs.jsonl"))
    docs.write_bytes(lines_of({"text": text} for text in docstrings(size)))
    prepare(docs, data, f"--vocab_size={V}")
    train_gpt2.main([
        "--preset=gpt2_nano", f"--data_dir={data}", f"--out_dir={run}", f"--n_embd={C}",
        f"--block_size={T}", f"--batch_size={rows}", f"--max_steps={max_steps}",
        "--warmup_steps=10", "--learning_rate=1e-3", f"--sample_every={max_steps // 2}",
        "--dtype=float32"])
    samples, report = ((run / name).read_text() for name in ("samples.md", "report.md"))
    assert samples.count("## Step") == 2 and "bits per byte" in report
    first, *_, ours = (float(row["val_bits_per_byte"] or 0) for row in log_of(run))

    torch.manual_seed(1)
    original, train = PlainModel(V, T, 12, 8, C, True), ShardedLoader(data, "train", T, "stream", 1)
    train_plainly(original, train, rows, max_steps, 10, 1e-3)
    theirs = evaluated(data, original, rows="stream", block_size=T)["val_bits_per_byte"]
    print(f"bits per byte after {max_steps} steps: gpt2_nano {ours:.3f}, original {theirs:.3f}")
    assert ours < 0.96 * first and ours < 1.2 * theirs
