"""Sampling: the cache changes nothing, the draws are fair, and sample.py shows what the model does."""
import builtins
import io
import math
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, fails, posix

import sample
import train_gpt2
from train_gpt2 import GPT, GPTConfig, Tokenizer, UserError, encode_prompt, stream

SHAPES = [dict(n_layer=2, n_head=3, n_embd=48, block_size=24),
          dict(n_layer=3, n_head=1, n_embd=32, block_size=17, activation="relu", pos_encoding="sinusoidal"),
          dict(n_layer=1, n_head=8, n_embd=64, block_size=33, attention="manual")]
NARROW = dict(n_layer=1, n_head=1, n_embd=8, block_size=1)


def strong_model(**shape):
    """A model whose weights are large enough that no two tokens are nearly equally likely."""
    torch.manual_seed(4)
    model = GPT(GPTConfig(vocab_size=97, **shape)).eval()
    for parameter in model.parameters():
        parameter.data.mul_(4).add_(0.1 * torch.randn_like(parameter))  # biases too
    return model


@pytest.mark.parametrize("shape", [*SHAPES, NARROW], ids=lambda shape: f"context of {shape['block_size']}")
@pytest.mark.parametrize("prompt", ["one token", "full context", "beyond it"])
@pytest.mark.parametrize("batch", [1, 5])
def test_the_cache_changes_nothing(shape, prompt, batch):
    """Greedy text is that of a model that reads everything again for every token, past the context too: there the
    older half is forgotten."""
    model, context = strong_model(**shape), shape["block_size"]
    length = {"one token": 1, "full context": context, "beyond it": context + 5}[prompt]
    idx = torch.randint(97, (batch, length), generator=torch.Generator().manual_seed(batch))
    fast = model.generate(idx, max_new_tokens=2 * context, temperature=0)
    text, window = idx, idx[:, -context:]
    for _ in range(2 * context):
        if window.size(1) > context:
            window = text[:, -max(1, context // 2):]
        with torch.no_grad():
            token = model(window)[0][:, -1].argmax(-1, keepdim=True)
        text, window = torch.cat((text, token), 1), torch.cat((window, token), 1)
    assert torch.equal(fast, text)


def test_samples_of_one_prompt_read_it_once(monkeypatch):
    model, seen = strong_model(**SHAPES[0]), []
    extend, first = train_gpt2.KVCache.extend, model.transformer.h[0].attn

    def watched(cache, layer, new):
        if layer is first:
            seen.append((new.size(1), new.size(3)))  # rows and tokens
        return extend(cache, layer, new)
    monkeypatch.setattr(train_gpt2.KVCache, "extend", watched)
    idx = torch.randint(97, (1, 9))
    together = model.generate(idx.expand(4, 9), 3, temperature=0)
    assert seen == [(1, 9), (4, 1), (4, 1)]
    assert torch.equal(together, model.generate(idx, 3, temperature=0).expand(4, -1))
    seen.clear()
    model.generate(torch.stack((idx[0], idx[0].flip(0))), 2)
    assert seen == [(2, 9), (2, 1)]


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes_that_onednn_lacks(dtype, batch, monkeypatch):
    """float64 everywhere, bfloat16 on older processors: plain products do it, greedily as the model itself does."""
    def onednn(*args):
        raise RuntimeError("could not create a primitive descriptor")
    monkeypatch.setattr(train_gpt2, "can_pack_bfloat16", lambda: False)
    monkeypatch.setattr(train_gpt2, "onednn", onednn)
    model, idx = strong_model(**SHAPES[0]).to(dtype), torch.randint(97, (batch, 5))
    text = model.generate(idx, 3, temperature=0)
    with torch.no_grad():
        logits = model(text[:, :-1])[0][:, 4:]  # (batch, 3, V)
    chosen = logits.gather(2, text[:, 5:, None])[..., 0]
    assert (chosen >= logits.amax(2) - 0.05 * logits.abs().amax()).all()


@pytest.mark.parametrize("temperature", [0, 1])
def test_what_was_sampled_can_be_trained_on(temperature):
    """As reinforcement learning does: the texts, and the logits that they were chosen from, are ordinary tensors."""
    model, idx = strong_model(**SHAPES[0]), torch.randint(97, (2, 4))
    sampled = [*stream(model, idx, 6, temperature=temperature), *stream(model, idx[:1].expand(2, 4), 6)]
    texts = torch.stack([token for token, _ in sampled], dim=1)  # (2, 12)
    model(texts[:, :-1], texts[:, 1:])[1].backward()
    scale = torch.ones(97, requires_grad=True)
    for _, logits in sampled:
        logits += 1  # as the mask of a forbidden token would
        (logits * scale).sum().backward()
    assert scale.grad.abs().sum() > 0


@pytest.mark.parametrize("batch", [1, 2])
def test_bfloat16_samples_nearly_as_float32(batch):
    model = strong_model(**SHAPES[0])
    idx = torch.randint(97, (batch, 20))
    exact = [logits for _, logits in stream(model, idx, 4, temperature=0)]
    rough = [logits for _, logits in stream(model.bfloat16(), idx, 4, temperature=0)]
    assert rough[0].dtype == torch.float32 and (exact[0] - rough[0]).abs().max() < 0.05 * exact[0].abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("shape", [(48, 96), (130, 7)])  # 7: no number of pieces that pays
def test_products_are_rounded_once(rows, shape, dtype):
    """Whichever library does a product, it adds up in float32; and what was switched off meanwhile is on again, after
    a mistake too."""
    assert torch.backends.mkldnn.enabled  # no test before this one left it off
    module = train_gpt2.Linear(*shape).to(dtype)
    x = torch.randn(rows, shape[0], dtype=dtype)
    with torch.no_grad():
        product = train_gpt2.product(module, rows, dtype)
        exact = x.double() @ module.weight.double().t() + module.bias.double()
        # Half a unit in the last place of bfloat16, and what float32's sums are off before that
        assert torch.allclose(product(x).double(), exact, rtol=torch.finfo(dtype).eps / 2, atol=1e-6)
        with pytest.raises(RuntimeError):
            product(x[:, 1:])
    assert torch.backends.mkldnn.enabled


@pytest.mark.parametrize("rows, heads, tokens", [(1, 1, 1), (1, 3, 50), (4, 2, 9)])
def test_attention_from_one_token(rows, heads, tokens):
    q, new = 3 * torch.randn(rows, heads, 1, 16), torch.randn(2, rows, heads, tokens, 16)
    cache = train_gpt2.KVCache(GPT(GPTConfig(n_layer=1, n_head=heads, n_embd=16 * heads)), rows, 60)
    layer = next(iter(cache.store))
    cache.extend(layer, new[:, :, :, :-1])
    cache.length = tokens - 1
    keys, values = cache.extend(layer, new[:, :, :, -1:])
    assert torch.equal(torch.stack((keys, values)), new)
    assert torch.allclose(train_gpt2.attend_from_one(q, keys, values), train_gpt2.attend(q, *new), atol=1e-5)


def wanted(logits, temperature, top_k, top_p):
    """The probabilities of every token, worked out in plain NumPy."""
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
    (1.0, None, None), (0.6, None, None), (1.7, 5, None), (1.0, None, 0.8), (0.8, 9, 0.7), (2.0, 3, 1.0),
])
def test_draws_are_fair(temperature, top_k, top_p):
    """100,000 draws pass a chi-square test at a chance of 1 in 10,000, and what is cut away never comes."""
    torch.manual_seed(5)
    model = GPT(GPTConfig(vocab_size=20, block_size=8, n_layer=1, n_head=2, n_embd=16)).eval()
    model.transformer.wte.weight.data.mul_(8)
    idx = torch.tensor([[3, 1, 4]])
    tokens, logits = next(stream(model, idx.expand(100_000, 3), 1, temperature, top_k, top_p, seed=6))
    uncached = model(idx)[0][0, -1].detach()
    assert (logits[0] - uncached).abs().max() < 1e-5
    probs = wanted(uncached.numpy(), temperature, top_k, top_p)
    counts = np.bincount(tokens.numpy(), minlength=20)
    assert (counts[probs == 0] == 0).all() and (probs > 0).sum() >= 3
    expected = 100_000 * probs[probs > 0]
    chi_square, df = ((counts[probs > 0] - expected) ** 2 / expected).sum(), (probs > 0).sum() - 1
    limit = df * (1 - 2 / (9 * df) + 3.72 * math.sqrt(2 / (9 * df))) ** 3  # Wilson and Hilferty 1931
    assert chi_square < limit


def test_options_of_generate():
    model = strong_model(**SHAPES[0])
    idx = torch.randint(97, (2, 5))
    one, same, other = (model.generate(idx, 15, temperature=3.0, seed=seed) for seed in (1, 1, 2))
    greedy = model.generate(idx, 15, temperature=0)
    assert torch.equal(one, same) and not torch.equal(one, other)
    for options in (dict(top_k=1), dict(top_p=1e-6), dict(temperature=1e-40)):
        assert torch.equal(model.generate(idx, 15, seed=1, **options), greedy)
    assert model.train().generate(idx, 1).shape == (2, 6) and model.training


def test_dropout_is_for_training():
    """Sampling leaves it out, and the model in the mode in which it was."""
    model, idx = strong_model(**SHAPES[0], dropout=0.5), torch.randint(97, (1, 9))
    text = model.eval().generate(idx, 9, temperature=0)
    assert not model.training and torch.equal(model.train().generate(idx, 9, temperature=0), text) and model.training


def test_one_cache_serves_a_text_of_any_length(monkeypatch):
    """Past the context too: two of them would be two to find room for."""
    made, real = [], train_gpt2.KVCache.__init__
    monkeypatch.setattr(train_gpt2.KVCache, "__init__", lambda *args: made.append(args) or real(*args))
    strong_model(**SHAPES[0]).generate(torch.randint(97, (2, 9)), 90)
    assert len(made) == 1


def test_no_character_is_cut(capsys):
    """Every byte is a token here, so most of them are a part of a character."""
    tokenizer = Tokenizer({"kind": "bpe", "ranks": [chr(byte) for byte in range(256)]})
    text, shown = "aé漢🙂z", ""
    writer = sample.Writer(tokenizer, "")
    for byte in text.encode():
        writer.write(byte)
        shown += capsys.readouterr().out
        assert text.startswith(shown)
    writer.write(0xE6)  # a text may end inside one all the same
    writer.end()
    assert shown == text and capsys.readouterr().out == "\ufffd\n"


@pytest.fixture
def says(monkeypatch):
    """A function from texts to a model whose rows say these, whatever the prompt: its tokens are bytes, and 256 is
    <|endoftext|>, here written |. Each call for a next token adds to model.asked."""
    def model_for(*texts):
        model = GPT(GPTConfig(vocab_size=257, block_size=16, n_layer=1, n_head=1, n_embd=8)).eval()
        model.tokenizer, model.asked = Tokenizer({"kind": "bpe", "ranks": [chr(byte) for byte in range(256)]}), 0

        def pick(logits, *options):
            model.asked += 1
            return torch.tensor([[256 if text[model.asked - 1] == "|" else ord(text[model.asked - 1])]
                                 for text in texts])
        monkeypatch.setattr(train_gpt2, "pick", pick)
        return model
    return model_for


def test_a_text_ends_with_its_document(says, capsys):
    model = says("ab|cdef")
    assert model.generate("x", 7) == "xab" and model.asked == 3
    assert says("abcdefg").generate("x", 4) == "xabcd"
    model = says("ab|cdef")
    sample.write_texts(model, sample.Settings(max_new_tokens=7), "x")
    assert capsys.readouterr().out == "xab\n" and model.asked == 3


def test_each_text_of_a_batch_ends_for_itself(says, capsys):
    """Those that go on are not cut, and of those that have ended nothing more is shown."""
    model = says("a|..|...", "bcd|....", "|.......")
    sample.write_texts(model, sample.Settings(num_samples=3, max_new_tokens=8), "x")
    assert capsys.readouterr().out.split("---------------\n") == ["xa\n", "xbcd\n", "x\n"] and model.asked == 4


def test_explain_counts_the_end_but_not_as_text(says, capsys):
    model = says("ab|cdef")
    sample.write_texts(model, sample.Settings(explain=True, max_new_tokens=7), "x")
    *rows, last = capsys.readouterr().out.splitlines()[2:]
    with torch.no_grad():
        chances = torch.log_softmax(model(torch.tensor([[120, 97, 98]]))[0][0].double(), -1)
    bits = -sum(chances[place, token].item() for place, token in enumerate((97, 98, 256))) / math.log(2)
    assert len(rows) == 3 and last.startswith(f"{bits / 2:.3f} bits per byte: what this text of 2 bytes")


def test_a_long_prompt_keeps_its_end_and_says_so(says, capsys):
    sample.write_texts(says("a"), sample.Settings(max_new_tokens=1), "x" * 17)
    captured = capsys.readouterr()
    assert "17 tokens; the model sees the last 16" in captured.err and captured.out == "x" * 17 + "a\n"
    sample.write_texts(says("a"), sample.Settings(max_new_tokens=1), "x" * 16)
    assert capsys.readouterr().err == ""


def test_colours_on_a_terminal(says, capsys, monkeypatch):
    tokenizer, logits = says("").tokenizer, torch.tensor([0.7, 0.29, 0.01]).log()
    for terminal, wish, colours in ((True, {}, ["32", "33", "31"]), (True, {"NO_COLOR": "1"}, []), (False, {}, [])):
        with monkeypatch.context() as patch:
            patch.delenv("NO_COLOR", raising=False)
            for name, value in wish.items():
                patch.setenv(name, value)
            patch.setattr(sys.stdout, "isatty", lambda terminal=terminal: terminal)
            explainer = sample.Explainer(tokenizer, "")
        for token in range(3):
            explainer.write(token, logits)
        assert re.findall(r"\033\[(3\d)m", capsys.readouterr().out) == colours


def test_texts_that_do_not_fit_into_memory(monkeypatch):
    model = GPT(GPTConfig(vocab_size=3, block_size=8, n_layer=1, n_head=1, n_embd=8))
    for rows in (10**7, 10**5):  # more than a process can name, and a petabyte, which Linux would promise
        with pytest.raises(UserError, match="lower num_samples"):
            train_gpt2.KVCache(model, rows, 10**7)
    with pytest.raises(RuntimeError, match="negative"):  # no want of memory: a bug stays one
        train_gpt2.KVCache(model, -1, 8)
    needed = sum(part.numel() * part.element_size() for part in train_gpt2.KVCache(model, 5, 8).store.popitem()[1])
    monkeypatch.setattr(train_gpt2, "physical_memory", lambda: needed)
    train_gpt2.KVCache(model, 5, 8)
    monkeypatch.setattr(train_gpt2, "physical_memory", lambda: needed - 1)
    with pytest.raises(UserError, match="lower num_samples"):
        train_gpt2.KVCache(model, 5, 8)


def test_too_little_memory_is_one_line(trained, monkeypatch, capsys):
    def pick(*args):
        raise RuntimeError(words)
    monkeypatch.chdir(trained)
    monkeypatch.setattr(train_gpt2, "pick", pick)
    words = "DefaultCPUAllocator: can't allocate memory: you tried to allocate 10 bytes"
    assert "cpu is out of memory: lower num_samples" in fails(sample.main, ["--device=cpu"], capsys)
    words = "index out of range"
    with pytest.raises(RuntimeError, match=words):
        sample.main(["--device=cpu"])


def test_tokens_are_shown_as_they_are(says):
    tokenizer = Tokenizer({"kind": "bpe", "ranks": [*map(chr, range(256)), "é漢".encode().decode("latin-1")]})
    shown = sample.Explainer(tokenizer, "").show
    assert [shown(token) for token in (*b"a \n\0", 0xE6, 0x9F, 256)] == [
        '"a"', '" "', r'"\n"', r'"\x00"', r'"\xe6"', r'"\x9f"', '"é漢"']
    tokenizer = Tokenizer({"kind": "bpe", "ranks": [*map(chr, range(256)), "x" * 14, "x" * 15]})
    shown = sample.Explainer(tokenizer, "").show
    assert shown(256) == f'"{"x" * 14}"' and shown(257) == f'"{"x" * 13}…"'


def test_wide_characters_keep_the_columns(capsys):
    model = GPT(GPTConfig(vocab_size=3, block_size=8, n_layer=1, n_head=1, n_embd=8)).eval()
    model.tokenizer = Tokenizer({"kind": "char", "alphabet": "\na漢"})
    with torch.no_grad():
        explainer = sample.Explainer(model.tokenizer, "")
        for token in (1, 2):
            explainer.write(token, torch.zeros(3))
    narrow, wide = capsys.readouterr().out.splitlines()[2:]
    assert narrow.index("%") == wide.index("%") + 1


def test_a_prompt_begins_a_document_where_all_rows_did(says):
    model = says("")
    assert encode_prompt(model, "ab") == [97, 98] and encode_prompt(model, "") == [256]
    model.starts_documents = True
    assert encode_prompt(model, "ab") == [256, 97, 98] and encode_prompt(model, "") == [256]
    model.tokenizer = Tokenizer({"kind": "char", "alphabet": "ab\n"})
    assert encode_prompt(model, "") == [2] and encode_prompt(model, "ab") == [2, 0, 1]


@pytest.fixture(scope="module")
def trained(stories, tmp_path_factory):
    """A folder in which a small model has been trained."""
    folder = tmp_path_factory.mktemp("sampling")
    train_gpt2.main([f"--data_dir={stories}", f"--out_dir={folder / 'out' / 'run'}", "--n_layer=1", "--n_embd=32",
                     "--max_steps=20", "--eval_tokens=500", "--sample_every=1000", "--device=cpu"])
    return folder


@pytest.fixture
def write(trained, capsys, monkeypatch):
    """A function from options of sample.py to what it prints."""
    def run(*argv):
        capsys.readouterr()
        assert sample.main([*argv, "--device=cpu"]) == 0
        return capsys.readouterr().out
    monkeypatch.chdir(trained)
    return run


def test_a_prompt_from_anywhere(write, trained, monkeypatch):
    options = ["--max_new_tokens=12", "--seed=3"]
    (trained / "prompt.txt").write_bytes("Once there wäs".encode())
    text = write("Once there wäs", *options)
    monkeypatch.setattr("sys.stdin", io.StringIO("Once there wäs"))
    assert text == write("--prompt=-", *options) == write("@prompt.txt", *options)
    assert text.startswith("Once there wäs") and write("--init_from=out/run/best.pt", "@prompt.txt", *options) == text


def test_the_newest_model_is_named(trained, tmp_path, monkeypatch, capsys):
    """Where no model is asked for, beside the text and not in it."""
    monkeypatch.chdir(trained)
    for name, age in (("a", -60), ("z", -120)):  # older ones, whatever they are called
        path = trained / "out" / name / "best.pt"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"")
        os.utime(path, (time.time() + age,) * 2)
    sample.main(["Once", "--max_new_tokens=3"])
    captured = capsys.readouterr()
    assert str(Path("out") / "run" / "best.pt") in captured.err and "best.pt" not in captured.out
    sample.main([f"--export={tmp_path / 'exported'}"])
    assert str(Path("out") / "run" / "best.pt") in capsys.readouterr().out


def test_samples_are_a_batch(write):
    texts = write("Once", "--num_samples=3", "--max_new_tokens=8", "--top_p=0.9", "--seed=1").split("---------------\n")
    assert len(texts) == len(set(texts)) == 3 and all(text.startswith("Once") for text in texts)


@pytest.mark.parametrize("dtype", ["auto", "float32", "bfloat16", "float16"])
def test_dtypes(write, dtype, asked):
    assert write("Once", f"--dtype={dtype}", "--max_new_tokens=5", "--temperature=0").startswith("Once")
    expected = train_gpt2.pick_dtype(dtype, torch.device("cpu"))
    assert asked["model"].transformer.wte.weight.dtype == expected and (dtype == "auto" or dtype in str(expected))


@pytest.fixture
def asked(monkeypatch):
    """What sample.py asks `stream` for."""
    found = {}

    def spy(model, idx, *options):
        found.update(model=model, options=options, rows=len(idx))
        return stream(model, idx, *options)
    monkeypatch.setattr(sample, "stream", spy)
    return found


def test_every_option_arrives(write, asked):
    write("Once", "--max_new_tokens=3")
    assert asked["options"] == (3, 0.8, None, None, None) and asked["rows"] == 1
    write("Once", "--max_new_tokens=4", "--temperature=1.5", "--top_k=7", "--top_p=0.9", "--seed=5", "--num_samples=2")
    assert asked["options"] == (4, 1.5, 7, 0.9, 5) and asked["rows"] == 2


def test_explain_says_what_the_model_thinks(write, trained):
    model = GPT.from_checkpoint(trained / "out" / "run" / "best.pt")
    ids = encode_prompt(model, "Once")
    new = model.generate(torch.tensor([ids]), 12, seed=8, temperature=0.7)[0].tolist()[len(ids):]
    # The chances are the model's own, whatever the temperature
    rows = write("Once", "--explain", "--max_new_tokens=12", "--seed=8", "--temperature=0.7", "--dtype=float32")
    assert "\033" not in rows
    rows = rows.splitlines()[2:]
    nats = 0
    for place, (token, row) in enumerate(zip(new, rows, strict=False)):
        logs = torch.log_softmax(model(torch.tensor([ids + new[:place]]))[0][0, -1].double(), -1).detach()
        chance, rank, entropy = re.search(r"([\d.]+)% +([\d,]+) +([\d.]+)   ", row).groups()
        assert float(chance) == pytest.approx(100 * logs[token].exp().item(), abs=0.06)
        assert int(rank) == (logs > logs[token]).sum() + 1
        assert float(entropy) == pytest.approx(-(logs.exp() * logs).sum().item() / math.log(2), abs=0.006)
        best = [i for i in logs.argsort(descending=True)[:4].tolist() if i != token][:3]
        assert [float(x) for x in re.findall(r" ([\d.]+)%", row)[1:]] == pytest.approx(
            [100 * logs[i].exp().item() for i in best], abs=0.06)
        nats -= logs[token].item()
    size = len(model.tokenizer.decode_bytes(new))
    assert float(rows[12].split()[0]) == pytest.approx(nats / math.log(2) / size, abs=0.002)


def test_ctrl_c_stops_a_text_and_not_the_program(write, monkeypatch):
    lines = iter(["Once", "there", EOFError()])
    calls = []

    def type_in(_):
        line = next(lines)
        if isinstance(line, Exception):
            raise line
        return line

    def pick(*args):
        calls.append(args)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(*args)
    real = train_gpt2.pick
    monkeypatch.setattr(builtins, "input", type_in)
    monkeypatch.setattr(train_gpt2, "pick", pick)
    output = write("--interactive", "--max_new_tokens=6")
    assert f"This is {Path('out') / 'run' / 'best.pt'}." in output
    assert "Once" in output and "there" in output and len(calls) == 10


def test_ctrl_c_keeps_what_is_written(trained, monkeypatch, capsys):
    """And ends sample.py with the status of Ctrl-C."""
    monkeypatch.chdir(trained)
    tokens = iter([97, 98])  # then KeyboardInterrupt

    def pick(*args):
        for token in tokens:
            return torch.tensor([[token]])
        raise KeyboardInterrupt
    monkeypatch.setattr(train_gpt2, "pick", pick)
    assert sample.main(["Once", "--device=cpu"]) == 130
    model = GPT.from_checkpoint(trained / "out" / "run" / "best.pt")
    assert capsys.readouterr().out == "Once" + model.tokenizer.decode([97, 98]) + "\n" and not model.training


def test_a_prompt_that_cannot_be_written_is_no_reason_to_go(tmp_path, capsys, monkeypatch):
    tokenizer = Tokenizer({"kind": "char", "alphabet": "\nabc"})
    model = GPT(GPTConfig(vocab_size=4, block_size=8, n_layer=1, n_head=1, n_embd=8)).eval()
    model.tokenizer = tokenizer
    lines = iter(["axe", "abc", ""])
    monkeypatch.setattr(builtins, "input", lambda _: next(lines))
    sample.converse(model, sample.Settings(max_new_tokens=3))
    captured = capsys.readouterr()
    assert "has no 'x'" in captured.err and "abc" in captured.out


@pytest.mark.parametrize("argv, message", [
    (["--top_p=0"], "above 0"), (["--top_p=1.5"], "at most 1"), (["--top_p=x"], "a number"),
    (["--dtype=int8"], "one of"), (["--seed=18446744073709551616"], "at most"), (["--seed=-1"], "at least 0"),
    (["--num_samples=100000000"], "at most"), (["--max_new_tokens=0"], "at least 1"),
    (["--checkpoint=out/run/best.pt", "--init_from=gpt2"], "leave one out"),
    (["--explain", "--num_samples=2"], "one text"), (["--interactive", "hello"], "leave out the prompt"),
    (["@nowhere.txt"], "cannot read the prompt from nowhere.txt"), (["@out"], "cannot read"),
    (["@binary"], "not UTF-8"), (["--init_from=nowhere"], "there is no"), (["--init_from=out"], "no config.json"),
    (["--export=binary"], "choose another"), (["--explain=perhaps"], "True or False"), (["--prompt"], "needs a value"),
    (["--export=x", "hello"], "writes no text"), (["-temperature=0"], "two dashes: --temperature=0"),
    (["--init_from=binary"], "no checkpoint"), (["--init_from=gpt3"], "OpenAI's: gpt2, gpt2-medium"),
], ids=lambda value: " ".join(value) if isinstance(value, list) else "")
def test_bad_settings(argv, message, trained, capsys, monkeypatch):
    monkeypatch.chdir(trained)
    (trained / "binary").write_bytes(b"\xff\xfe\x00")
    line = fails(sample.main, argv, capsys)
    assert message in line and "overwrite" not in line  # which is for runs
    assert (trained / "binary").read_bytes() == b"\xff\xfe\x00"


def test_bytes_that_are_no_text_are_no_prompt(trained, says, capsys, monkeypatch):
    lines = iter([b"a\xff", b"ok", b""])
    monkeypatch.setattr(builtins, "input", lambda _: next(lines).decode())
    sample.converse(says("b"), sample.Settings(max_new_tokens=1))
    captured = capsys.readouterr()
    assert captured.err == "error: that was no UTF-8 text\n" and captured.out.endswith("\nokb\n")
    monkeypatch.chdir(trained)
    monkeypatch.setattr("sys.stdin", io.StringIO("a\udcff"))  # as Python reads the byte ff in some locales
    assert "not UTF-8" in fails(sample.main, ["-"], capsys)


def test_the_home_folder_of_a_value(write, tmp_path, monkeypatch):
    """A shell leaves the ~ in --export=~/folder alone."""
    for name in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(name, str(tmp_path))
    write("--export=~/folder")
    assert (tmp_path / "folder" / "config.json").exists() and not Path("~").exists()
    assert write("--prompt=~", "--max_new_tokens=1").startswith("~")


@posix
@pytest.mark.parametrize("argv", [["--help"], ["Once", "--max_new_tokens=2000"]])
def test_a_reader_that_has_had_enough(argv, trained):
    """`sample.py --help | head -1` says nothing of pipes."""
    child = subprocess.Popen([sys.executable, ROOT / "sample.py", *argv], stdout=subprocess.PIPE,
                             stderr=subprocess.PIPE, cwd=trained)
    child.stdout.close()
    assert child.stderr.read() == b"" and child.wait() == 141
