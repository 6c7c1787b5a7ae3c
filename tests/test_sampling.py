"""Sampling: the cache changes nothing, draws are fair, and sample.py shows what the model does."""
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
from train_gpt2 import GPT, GPTConfig, Tokenizer, encode_prompt, stream_tokens

SHAPES = [dict(n_layer=2, n_head=3, n_embd=48, block_size=24),
          dict(n_layer=3, n_head=1, n_embd=32, block_size=17, activation="relu",
               pos_encoding="sinusoidal"),
          dict(n_layer=1, n_head=8, n_embd=64, block_size=33, attention="manual"),
          dict(n_layer=1, n_head=1, n_embd=8, block_size=1)]
BYTES = {"kind": "bpe", "ranks": [*map(chr, range(256))]}  # every byte is a token


def strong_model(vocab_size=97, **shape):
    """A model with large weights: few tokens are nearly equally likely."""
    torch.manual_seed(4)
    model = GPT(GPTConfig(vocab_size=vocab_size, **shape)).eval()
    for parameter in model.parameters():
        parameter.data.mul_(4).add_(0.1 * torch.randn_like(parameter))  # biases too
    return model


def tiny_model(spec):
    model = GPT(GPTConfig(vocab_size=Tokenizer(spec).vocab_size, block_size=16, n_layer=1,
                          n_head=1, n_embd=8)).eval()
    model.tokenizer = Tokenizer(spec)
    return model


# ---- The cache and the draws ---------------------------------------------------------------------


def check_cache(model, idx, steps):
    """Greedy text and its logits are those of a model that reads all again for every token. Past
    the context, the older half is forgotten."""
    context = model.config.block_size
    text, window = idx, idx[:, -context:]
    for token, logits in stream_tokens(model, idx, steps, temperature=0):
        if window.size(1) > context:
            window = text[:, -max(1, context // 2):]
        with torch.no_grad():
            uncached = model(window)[0][:, -1]
        assert (logits - uncached).abs().max() < 1e-5 * uncached.abs().max()
        best, second = uncached.topk(2).values.unbind(1)
        sure = best - second > 1e-3
        assert sure.any() and torch.equal(token[sure], uncached.argmax(1)[sure])
        text = torch.cat((text, token[:, None]), 1)
        window = torch.cat((window, token[:, None]), 1)


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: f"context of {shape['block_size']}")
@pytest.mark.parametrize("prompt", ["one token", "full context", "beyond it"])
@pytest.mark.parametrize("batch", [1, 5])
def test_the_cache_changes_nothing(shape, prompt, batch):
    context = shape["block_size"]
    length = {"one token": 1, "full context": context, "beyond it": context + 5}[prompt]
    idx = torch.randint(97, (batch, length), generator=torch.Generator().manual_seed(batch))
    check_cache(strong_model(**shape), idx, context + 9)  # past the context twice


def silu(monkeypatch):
    monkeypatch.setattr(train_gpt2.MLP, "forward",
                        lambda mlp, x: mlp.c_proj(torch.nn.functional.silu(mlp.c_fc(x))))


def rotary(monkeypatch):
    """Rotary positions (Su et al. 2021)."""
    real = train_gpt2.causal_attention

    def turned(x, start):
        angle = torch.arange(start, start + x.size(2))[:, None] / 10 ** torch.arange(x.size(3) // 2)
        a, b = x.chunk(2, dim=3)
        return torch.cat((a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()), 3)

    def attention(q, k, v, *options):
        return real(turned(q, k.size(2) - q.size(2)), turned(k, 0), v, *options)
    monkeypatch.setattr(train_gpt2, "causal_attention", attention)


@pytest.mark.parametrize("edit", [silu, rotary])
def test_sampling_follows_an_edited_model(edit, monkeypatch):
    idx = torch.randint(97, (2, 7), generator=torch.Generator().manual_seed(1))
    model = strong_model(**SHAPES[0])
    if edit is rotary:  # in place of the learned positions
        model.transformer.wpe.weight.data.zero_()
    before = model.generate(idx, 20, temperature=0)
    edit(monkeypatch)
    check_cache(model, idx, 40)
    assert not torch.equal(model.generate(idx, 20, temperature=0), before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_sample_nearly_as_float32(dtype):
    model, idx = strong_model(**SHAPES[0]), torch.randint(97, (2, 20))
    exact = [logits for _, logits in stream_tokens(model, idx, 2, temperature=0)]
    rough = [logits for _, logits in stream_tokens(model.to(dtype), idx, 2, temperature=0)]
    assert rough[0].dtype == torch.float32
    assert (exact[0] - rough[0]).abs().max() < 0.05 * exact[0].abs().max()


def test_what_was_sampled_can_be_trained_on():
    """As in reinforcement learning: ids and logits are ordinary tensors."""
    model, idx = strong_model(**SHAPES[0]), torch.randint(97, (2, 4))
    tokens, logits = next(stream_tokens(model, idx, 1))
    model(idx, torch.cat((idx[:, 1:], tokens[:, None]), dim=1))[1].backward()
    scale = torch.ones(97, requires_grad=True)
    logits += 1  # as the mask of a forbidden token would
    (logits * scale).sum().backward()
    assert scale.grad.abs().sum() > 0


def wanted(logits, temperature, top_k, top_p):
    """The probability of every token, computed in plain NumPy."""
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
    (1.0, None, None), (0.6, None, None), (1.7, 5, None), (1.0, None, 0.8), (0.8, 9, 0.7),
    (2.0, 3, 1.0),
])
def test_draws_are_fair(temperature, top_k, top_p):
    """100,000 draws pass a chi-square test at 1 in 10,000; what is cut away never comes."""
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
    """Seeds repeat a text, greedy options agree, and dropout is left out of it."""
    model, idx = strong_model(**SHAPES[0], dropout=0.5), torch.randint(97, (2, 5))
    one, same, other = (model.generate(idx, 15, temperature=3.0, seed=seed) for seed in (1, 1, 2))
    greedy = model.generate(idx, 15, temperature=0)
    new = torch.stack([token for token, _ in stream_tokens(model, idx, 15, temperature=0)], dim=1)
    assert torch.equal(greedy, torch.cat((idx, new), dim=1))
    assert torch.equal(one, same) and not torch.equal(one, other)
    for options in (dict(top_k=1), dict(top_p=1e-6), dict(temperature=1e-40)):
        assert torch.equal(model.generate(idx, 15, seed=1, **options), greedy)
    assert not model.training
    assert torch.equal(model.train().generate(idx, 15, temperature=0), greedy) and model.training


# ---- What is shown -------------------------------------------------------------------------------


def test_no_character_is_cut(capsys):
    """Every byte is a token here, so most tokens are parts of a character."""
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
    """A function from texts to a model whose rows say these, whatever the prompt. Its tokens are
    bytes, and | stands for <|endoftext|>. Each call for a next token adds to model.asked."""
    def model_for(*texts):
        model = tiny_model(BYTES)
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
    model = says("ab|cdef")
    sample.write_texts(model, sample.Settings(max_new_tokens=7), "x")
    assert capsys.readouterr().out == "xab\n" and model.asked == 3


def test_each_text_of_a_batch_ends_for_itself(says, capsys):
    """Longer ones are not cut, and nothing is shown behind the end of shorter ones."""
    model = says("a|..|...", "bcd|....", "|.......")
    sample.write_texts(model, sample.Settings(num_samples=3, max_new_tokens=8), "x")
    texts = capsys.readouterr().out.split("---------------\n")
    assert texts == ["xa\n", "xbcd\n", "x\n"] and model.asked == 4


def test_explain_counts_the_end_but_not_as_text(says, capsys):
    model = says("ab|cdef")
    sample.write_texts(model, sample.Settings(explain=True, max_new_tokens=7), "x")
    *rows, last = capsys.readouterr().out.splitlines()[2:]
    with torch.no_grad():
        log_probs = torch.log_softmax(model(torch.tensor([[120, 97, 98]]))[0][0].double(), -1)
    nats = -sum(log_probs[place, token].item() for place, token in enumerate((97, 98, 256)))
    assert len(rows) == 3 and last.startswith(f"{nats / math.log(2) / 2:.3f} bits per byte")
    assert last.endswith("its 2 bytes")


def test_a_long_prompt_keeps_its_end_and_says_so(says, capsys):
    remark = "note: the prompt has 17 tokens; the model sees the last 16\n"
    for length, said in ((17, remark), (16, "")):
        sample.write_texts(says("a"), sample.Settings(max_new_tokens=1), "x" * length)
        assert capsys.readouterr() == ("x" * length + "a\n", said)


@pytest.mark.parametrize("terminal, no_color, colours", [
    (True, False, ["32", "33", "31"]), (True, True, []), (False, False, [])])
def test_colours_on_a_terminal(terminal, no_color, colours, capsys, monkeypatch):
    monkeypatch.setenv("NO_COLOR", "1")
    if not no_color:
        monkeypatch.delenv("NO_COLOR")
    with monkeypatch.context() as patch:
        patch.setattr(sys.stdout, "isatty", lambda: terminal)
        explainer = sample.Explainer(Tokenizer(BYTES), "")
    for token in range(3):
        explainer.write(token, torch.tensor([0.7, 0.29, 0.01]).log())
    assert re.findall(r"\033\[(3\d)m", capsys.readouterr().out) == colours


def test_tokens_are_shown_as_they_are():
    longer = ["é漢".encode().decode("latin-1"), "x" * 14, "x" * 15]
    show = sample.Explainer(Tokenizer({"kind": "bpe", "ranks": BYTES["ranks"] + longer}), "").show
    assert [show(token) for token in (*b"a \n\0", 0xE6, 0x9F, 256)] == [
        '"a"', '" "', r'"\n"', r'"\x00"', r'"\xe6"', r'"\x9f"', '"é漢"']
    assert show(257) == f'"{"x" * 14}"' and show(258) == f'"{"x" * 13}…"'


def test_wide_characters_keep_the_columns(capsys):
    explainer = sample.Explainer(Tokenizer({"kind": "char", "alphabet": "\na漢"}), "")
    for token in (1, 2):
        explainer.write(token, torch.zeros(3))
    narrow, wide = capsys.readouterr().out.splitlines()[2:]
    assert narrow.index("%") == wide.index("%") + 1


def test_a_prompt_begins_a_document_where_all_rows_did():
    model = tiny_model(BYTES)
    assert encode_prompt(model, "ab") == [97, 98] and encode_prompt(model, "") == [256]
    model.starts_documents = True
    assert encode_prompt(model, "ab") == [256, 97, 98] and encode_prompt(model, "") == [256]
    model.tokenizer = Tokenizer({"kind": "char", "alphabet": "ab\n"})
    assert encode_prompt(model, "") == [2] and encode_prompt(model, "ab") == [2, 0, 1]


# ---- The command line ----------------------------------------------------------------------------

BEST = Path("out") / "run" / "best.pt"


@pytest.fixture
def trained(tmp_path, monkeypatch):
    """The current folder, with the checkpoint of a model in out/run."""
    monkeypatch.chdir(tmp_path)
    model = strong_model(257, **SHAPES[0])
    model.tokenizer = Tokenizer(BYTES)
    BEST.parent.mkdir(parents=True)
    torch.save(train_gpt2.make_checkpoint(model, settings={"rows": "documents"}), BEST)
    return tmp_path


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
    assert write("--prompt=~", "--max_new_tokens=1").startswith(os.path.expanduser("~"))


def test_the_newest_model_is_named(trained, capsys):
    """Where no model is asked for, beside the text and not in it; never converted weights."""
    for name, age in (("a", -60), ("z", -120), ("openai-gpt2", 60)):
        path = Path("out") / name / "best.pt"
        path.parent.mkdir()
        path.write_bytes(b"")
        os.utime(path, (time.time() + age,) * 2)
    sample.main(["Once", "--max_new_tokens=3"])
    captured = capsys.readouterr()
    assert str(BEST) in captured.err and "best.pt" not in captured.out
    sample.main([f"--checkpoint={BEST}", "--max_new_tokens=3"])
    assert capsys.readouterr().err == ""
    for name in "run", "a", "z":
        (Path("out") / name / "best.pt").unlink()
    assert "python train_gpt2.py" in fails(sample.main, [], capsys)


def test_another_models_code_is_one_note(trained, capsys, monkeypatch):
    monkeypatch.setattr(train_gpt2, "model_code", lambda: "edited")
    sample.main(["Once", f"--checkpoint={BEST}", "--max_new_tokens=3", "--num_samples=2"])
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1 and "other model code" in captured.err
    assert captured.out.startswith("Once")


@pytest.fixture
def asked(monkeypatch):
    """What sample.py asks stream_tokens for."""
    found = {}

    def spy(model, idx, *options):
        found.update(model=model, options=options, rows=len(idx))
        return stream_tokens(model, idx, *options)
    monkeypatch.setattr(sample, "stream_tokens", spy)
    return found


@pytest.mark.parametrize("dtype", ["auto", "float32", "bfloat16"])
def test_dtypes(write, dtype, asked):
    text = write("Once", f"--dtype={dtype}", "--max_new_tokens=5", "--temperature=0")
    expected = train_gpt2.pick_dtype(dtype, torch.device("cpu"))
    assert text.startswith("Once") and dtype in ("auto", str(expected).removeprefix("torch."))
    assert asked["model"].transformer.wte.weight.dtype == expected


def test_every_option_arrives(write, asked):
    write("Once", "--max_new_tokens=3")
    assert asked["options"] == (3, 0.8, None, None, None) and asked["rows"] == 1
    output = write("Once", "--max_new_tokens=4", "--temperature=1.5", "--top_k=7", "--top_p=0.9",
                   "--seed=5", "--num_samples=2")
    assert asked["options"] == (4, 1.5, 7, 0.9, 5) and asked["rows"] == 2
    one, other = output.split("---------------\n")
    assert one.startswith("Once") and other.startswith("Once") and one != other


def test_explain_says_what_the_model_thinks(write):
    model = GPT.from_checkpoint(BEST)
    ids = encode_prompt(model, "Once")
    new = model.generate(torch.tensor([ids]), 12, seed=8, temperature=3)[0].tolist()[len(ids):]
    assert len(set(new)) > 6 and 256 not in new
    # The probabilities are the model's own, whatever the temperature
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


def test_ctrl_c_stops_a_text_and_not_the_program(write, monkeypatch):
    lines, calls = iter(["Once", "there"]), []

    def type_in(_):
        for line in lines:
            return line
        raise EOFError

    def sample_token(*args):
        calls.append(args)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return torch.tensor([[97]])
    monkeypatch.setattr(builtins, "input", type_in)
    monkeypatch.setattr(train_gpt2, "sample_token", sample_token)
    output = write("--interactive", "--max_new_tokens=6")
    assert f"This is {BEST}." in output and "Onceaaa\n" in output and "thereaaaaaa\n" in output
    assert len(calls) == 10


def test_ctrl_c_keeps_what_is_written(trained, monkeypatch, capsys):
    tokens = iter([97, 98])

    def sample_token(*args):
        for token in tokens:
            return torch.tensor([[token]])
        raise KeyboardInterrupt
    monkeypatch.setattr(train_gpt2, "sample_token", sample_token)
    with pytest.raises(SystemExit) as stop:
        sample.main(["Once", "--device=cpu"])
    assert stop.value.code == 130 and capsys.readouterr().out == "Onceab\n"


def test_a_bad_prompt_does_not_end_the_conversation(says, capsys, monkeypatch):
    model = says("bb")
    model.tokenizer = Tokenizer({"kind": "char", "alphabet": "".join(map(chr, range(128)))})
    lines = iter(["a漢".encode(), b"a\xff", b"ok", b""])
    monkeypatch.setattr(builtins, "input", lambda _: next(lines).decode())
    sample.converse(model, sample.Settings(max_new_tokens=1))
    captured = capsys.readouterr()
    assert captured.out.endswith("\nokb\n")
    first, second = captured.err.splitlines()
    assert "has no '漢'" in first and second == "error: that is not UTF-8 text"


def test_too_little_memory_is_one_line(trained, monkeypatch, capsys):
    def sample_token(*args):
        raise RuntimeError(words)
    monkeypatch.setattr(train_gpt2, "sample_token", sample_token)
    words = "DefaultCPUAllocator: can't allocate memory: you tried to allocate 10 bytes"
    line = fails(sample.main, ["--device=cpu"], capsys)
    assert "cpu is out of memory: lower num_samples" in line
    words = "index out of range"
    with pytest.raises(RuntimeError, match=words):
        sample.main(["--device=cpu"])


@pytest.mark.parametrize("argv, message", [
    (["--top_p=0"], "must be from"), (["--top_p=x"], "top_p"), (["--dtype=int8"], "int8"),
    (["--seed=18446744073709551616"], "must be from"), (["--num_samples=100000000"], "to 10,000"),
    (["--max_new_tokens=0"], "from 1"), (["--explain", "--num_samples=2"], "one text"),
    (["--explain=perhaps"], "True, False"), (["--device=abacus"], "no device"),
    (["--interactive", "hello"], "leave out the prompt"), (["--prompt"], "expected one"),
    (["@nowhere.txt"], "cannot read the prompt from nowhere.txt"), (["@out"], "cannot read"),
    (["@binary"], "not UTF-8"), (["@"], "a file without a name"), (["-"], "not UTF-8"),
    (["--checkpoint=nowhere"], "there is no"), (["--checkpoint=out"], "best.pt"),
    (["--checkpoint=gpt2"], "python prepare_data.py gpt2"), (["--checkpoint=binary"], "damaged"),
    (["--checkpoint=no_tokenizer"], "no tokenizer"), (["--export=x", "hello"], "no text"),
    (["-temperature=0"], "did you mean --temperature"), (["hello", "there"], "is no setting"),
], ids=lambda value: " ".join(value) if isinstance(value, list) else "")
def test_bad_settings(argv, message, trained, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("a\udcff"))  # Python's ff byte in some locales
    Path("binary").write_bytes(b"\xff\xfe\x00")
    torch.save(torch.load(BEST, weights_only=True) | {"tokenizer": {}}, "no_tokenizer")
    assert message in fails(sample.main, argv, capsys)
    assert Path("binary").read_bytes() == b"\xff\xfe\x00"


@posix
def test_a_reader_that_has_had_enough(trained):
    """`sample.py ... | head -1` says nothing of pipes."""
    argv = [sys.executable, ROOT / "sample.py", "Once", "--max_new_tokens=2000"]
    child = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    child.stdout.close()
    assert child.stderr.read() == b"" and child.wait() == 141
