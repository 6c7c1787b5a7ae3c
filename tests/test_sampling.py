"""The cache changes nothing, draws are fair, and sample.py shows what the model does."""
import builtins
import io
import math
import os
import re
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import fails, random_model

import sample
import train_gpt2
from train_gpt2 import GPT, GPTConfig, Tokenizer, encode_prompt, stream_tokens

SHAPES = [dict(n_layer=2, n_head=3, n_embd=48, block_size=24),
          dict(n_layer=3, n_head=1, n_embd=32, block_size=17, activation="relu",
               pos_encoding="sinusoidal"),
          dict(n_layer=1, n_head=8, n_embd=64, block_size=33, attention="manual"),
          dict(n_layer=1, n_head=1, n_embd=8, block_size=1)]
BYTES = {"kind": "bpe", "ranks": [*map(chr, range(256))]}  # every byte is a token


# ---- The cache and the draws ----


def check_cache(model, idx, steps, stream_tokens=stream_tokens):
    """Greedy text and its logits are those of a model that reads all again for every token."""
    context, count = model.config.block_size, 0
    text, window = idx, idx[:, -context:]
    for token, logits in stream_tokens(model, idx, steps, temperature=0):
        if window.size(1) > context:  # the older half is forgotten
            window = text[:, -max(1, context // 2):]
        with torch.no_grad():
            uncached = model(window)[0][:, -1]
        assert (logits - uncached).abs().max() < 1e-5 * uncached.abs().max()
        best, second = uncached.topk(2).values.unbind(1)
        sure = best - second > 1e-3
        assert torch.equal(token[sure], uncached.argmax(1)[sure])
        count += sure.sum().item()
        text = torch.cat((text, token[:, None]), 1)
        window = torch.cat((window, token[:, None]), 1)
    assert count > 0.9 * len(idx) * steps


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: f"context of {shape['block_size']}")
@pytest.mark.parametrize("batch", [1, 5])
def test_the_cache_changes_nothing(shape, batch):
    context, model = shape["block_size"], random_model(scale=4, **shape)
    for length in (1, context, context + 5):
        idx = torch.randint(97, (batch, length), generator=torch.Generator().manual_seed(batch))
        check_cache(model, idx, context + 9)  # past the context twice


def wanted(logits, temperature, top_k, top_p):
    """The probability of every token, in plain NumPy."""
    logits = logits.astype(np.float64) / temperature
    order = np.argsort(-logits)
    kept = order[:top_k] if top_k else order
    probs = np.zeros(len(logits))
    probs[kept] = np.exp(logits[kept] - logits.max())
    probs /= probs.sum()
    if top_p:
        nucleus = np.searchsorted(np.cumsum(probs[order]), top_p) + 1  # as few as reach top_p
        probs[order[nucleus:]] = 0
    return probs / probs.sum()


@pytest.mark.parametrize("temperature, top_k, top_p", [
    (0.6, None, None), (1.7, 5, None), (1.0, None, 0.8), (0.8, 9, 0.7), (2.0, 3, 1.0)])
def test_draws_are_fair(temperature, top_k, top_p):
    """100,000 draws pass a chi-square test at 1 in 10,000; tokens that are cut off never come."""
    torch.manual_seed(5)
    model = GPT(GPTConfig(vocab_size=20, block_size=8, n_layer=1, n_head=2, n_embd=16)).eval()
    model.transformer.wte.weight.data.mul_(8)
    idx = torch.tensor([[3, 1, 4]])
    tokens, _ = next(stream_tokens(model, idx.expand(100_000, 3), 1, temperature, top_k, top_p, 6))
    probs = wanted(model(idx)[0][0, -1].detach().numpy(), temperature, top_k, top_p)
    counts = np.bincount(tokens.numpy(), minlength=20)
    assert (counts[probs == 0] == 0).all() and (probs > 0).sum() >= 3
    expected = 100_000 * probs[probs > 0]
    chi_square = ((counts[probs > 0] - expected) ** 2 / expected).sum()
    df = (probs > 0).sum() - 1
    limit = df * (1 - 2 / (9 * df) + 3.72 * math.sqrt(2 / (9 * df))) ** 3  # Wilson, Hilferty 1931
    assert chi_square < limit


def test_options_of_generate():
    """Seeds repeat a text, greedy options agree, dropout is off."""
    model, idx = random_model(**SHAPES[0], scale=4, dropout=0.5), torch.randint(97, (2, 5))
    one, same, other = (model.generate(idx, 15, temperature=3.0, seed=seed) for seed in (1, 1, 2))
    greedy = model.generate(idx, 15, temperature=0)
    assert greedy.shape == (2, 20) and torch.equal(greedy[:, :5], idx)
    assert torch.equal(one, same) and not torch.equal(one, other)
    for options in ({"top_k": 1}, {"top_p": 1e-6}, {"temperature": 1e-40}):
        assert torch.equal(model.generate(idx, 15, seed=1, **options), greedy)
    assert not model.training
    assert torch.equal(model.train().generate(idx, 15, temperature=0), greedy) and model.training


# ---- What is shown ----


def test_no_character_is_cut(capsys):
    text, shown = "aé漢🙂z", ""
    writer = sample.Writer(Tokenizer(BYTES), "")
    for byte in text.encode():
        writer.write(byte)
        shown += capsys.readouterr().out
        assert text.startswith(shown)
    writer.write(0xE6)  # a text may end inside one
    writer.end()
    assert shown == text and capsys.readouterr().out == "\ufffd\n"


@pytest.fixture
def says(monkeypatch):
    """A function from texts to a model whose rows say these; | stands for <|endoftext|>.
    model.asked counts the tokens."""
    def model_for(*texts):
        model = random_model(BYTES, block_size=16)
        model.asked = 0

        def sample_token(logits, *options):
            letters = [text[model.asked] for text in texts]
            model.asked += 1
            return torch.tensor([[256 if letter == "|" else ord(letter)] for letter in letters])
        monkeypatch.setattr(train_gpt2, "sample_token", sample_token)
        return model
    return model_for


def test_a_text_ends_with_its_document(says, capsys):
    model = says("ab|cdef")
    assert model.generate("x", 7) == "xab" and model.asked == 3
    assert says("abcdefg").generate("x", 4) == "xabcd"
    # Each text of a batch for itself: longer ones are not cut
    model = says("a|..|...", "bcd|....", "|.......")
    sample.write_texts(model, sample.Settings(num_samples=3, max_new_tokens=8), "x")
    texts = capsys.readouterr().out.split("---------------\n")
    assert texts == ["xa\n", "xbcd\n", "x\n"] and model.asked == 4
    sample.write_texts(says("a"), sample.Settings(max_new_tokens=1), "x" * 17)
    assert "17 tokens; the model sees the last 16" in capsys.readouterr().err


def test_a_prompt_begins_a_document_where_all_rows_did():
    model = random_model(BYTES)
    assert encode_prompt(model, "ab") == [97, 98] and encode_prompt(model, "") == [256]
    model.starts_documents = True
    assert encode_prompt(model, "ab") == [256, 97, 98] and encode_prompt(model, "") == [256]


# ---- The command line ----

BEST = Path("out") / "run" / "best.pt"


@pytest.fixture
def trained(tmp_path, monkeypatch):
    """The current folder, with a checkpoint in out/run."""
    monkeypatch.chdir(tmp_path)
    model = random_model(BYTES, scale=4, **SHAPES[0])
    BEST.parent.mkdir(parents=True)
    torch.save(train_gpt2.make_checkpoint(model, settings={"rows": "documents"}), BEST)
    BEST.with_name("log.csv").touch()


@pytest.fixture
def write(trained, capsys):
    """A function from options of sample.py to what it prints."""
    def run(*argv):
        capsys.readouterr()
        assert sample.main([*argv, "--device=cpu"]) == 0
        return capsys.readouterr().out
    return run


def test_a_prompt_from_anywhere(write, monkeypatch):
    options = ["--max_new_tokens=12", "--seed=3"]
    Path("prompt.txt").write_bytes("Once there wäs".encode())
    text = write("Once there wäs", *options)
    monkeypatch.setattr("sys.stdin", io.StringIO("Once there wäs"))
    assert text == write("--prompt=-", *options) == write("@prompt.txt", *options)
    assert text.startswith("Once there wäs")


def test_the_newest_model_is_named(trained, capsys, monkeypatch):
    """On stderr; converted weights are never the newest. Other model code gives a note."""
    for name, age in (("a", -60), ("openai-gpt2", 60)):
        path = Path("out") / name / "best.pt"
        path.parent.mkdir()
        path.write_bytes(b"")
        if age < 0:
            path.with_name("log.csv").touch()
        os.utime(path, (time.time() + age,) * 2)
    for argv, named in (([], True), ([f"--checkpoint={BEST}"], False)):
        sample.main(["Once", "--max_new_tokens=3", *argv])
        captured = capsys.readouterr()
        assert (str(BEST) in captured.err) == named and "best.pt" not in captured.out
    with monkeypatch.context() as patch:
        patch.setattr(train_gpt2, "model_code", lambda: "edited")
        sample.main(["Once", f"--checkpoint={BEST}", "--max_new_tokens=3"])
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "other model code" in error
    for name in "run", "a":
        (Path("out") / name / "best.pt").unlink()
    assert "python train_gpt2.py" in fails(sample.main, [], capsys)


def test_every_option_arrives(write, monkeypatch):
    found = {}

    def spy(model, idx, *options):
        found.update(dtype=model.transformer.wte.weight.dtype, options=options, rows=len(idx))
        return stream_tokens(model, idx, *options)
    monkeypatch.setattr(sample, "stream_tokens", spy)
    write("Once", "--max_new_tokens=3")
    auto = train_gpt2.pick_dtype("auto", torch.device("cpu"))
    assert found == {"dtype": auto, "options": (3, 0.8, None, None, None), "rows": 1}
    output = write("Once", "--max_new_tokens=4", "--temperature=1.5", "--top_k=7", "--top_p=0.9",
                   "--seed=5", "--num_samples=2", "--dtype=bfloat16")
    assert found == {"dtype": torch.bfloat16, "options": (4, 1.5, 7, 0.9, 5), "rows": 2}
    one, other = output.split("---------------\n")
    assert one[:4] == other[:4] == "Once" and one != other


def test_explain_says_what_the_model_thinks(write):
    model = GPT.from_checkpoint(BEST)
    ids = encode_prompt(model, "Once")
    new = model.generate(torch.tensor([ids]), 12, seed=8, temperature=3)[0].tolist()[len(ids):]
    assert len(set(new)) > 6 and 256 not in new
    # Probabilities are the model's own, whatever the temperature
    rows = write("Once", "--explain", "--max_new_tokens=12", "--seed=8", "--temperature=3",
                 "--dtype=float32").splitlines()[2:]
    nats = 0
    for place, (token, row) in enumerate(zip(new, rows, strict=False)):
        with torch.no_grad():
            logits = model(torch.tensor([ids + new[:place]]))[0][0, -1]
        logs = torch.log_softmax(logits.double(), -1)
        percent, rank, entropy = re.search(r"([\d.]+)% +([\d,]+) +([\d.]+)   ", row).groups()
        assert float(percent) == pytest.approx(100 * logs[token].exp().item(), abs=0.06)
        assert int(rank) == (logs > logs[token]).sum() + 1
        bits = -(logs.exp() * logs).sum().item() / math.log(2)
        assert float(entropy) == pytest.approx(bits, abs=0.006)
        best = [i for i in logs.argsort(descending=True)[:4].tolist() if i != token][:3]
        assert [float(x) for x in re.findall(r" ([\d.]+)%", row)[1:]] == pytest.approx(
            [100 * logs[i].exp().item() for i in best], abs=0.06)
        nats -= logs[token].item()
    assert float(rows[12].split()[0]) == pytest.approx(nats / math.log(2) / 12, abs=0.002)


def test_ctrl_c_stops_a_text_and_not_the_conversation(write, monkeypatch, capsys):
    lines, calls = iter(["Once", "there", ""]), []

    def sample_token(*args):
        calls.append(args)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return torch.tensor([[97]])
    monkeypatch.setattr(builtins, "input", lambda _: next(lines))
    monkeypatch.setattr(train_gpt2, "sample_token", sample_token)
    output = write("--interactive", "--max_new_tokens=6")
    assert f"This is {BEST}." in output and "Onceaaa\n" in output and "thereaaaaaa\n" in output
    calls.clear()
    with pytest.raises(SystemExit) as stop:  # what is written stays
        sample.main(["Once", "--device=cpu"])
    assert stop.value.code == 130 and capsys.readouterr().out == "Onceaaa\n"
