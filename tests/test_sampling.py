"""The cache changes nothing, draws are fair, and sample.py shows what the model does."""
import io
import math
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from conftest import ROOT, fails, random_model

import sample
import train_gpt2
from train_gpt2 import GPT, Tokenizer, encode_prompt, stream_tokens

SHAPES = [
    dict(n_layer=2, n_head=3, n_embd=48, block_size=24),
    dict(n_layer=3, n_head=1, n_embd=32, block_size=17, activation="relu",
         pos_encoding="sinusoidal"),
    dict(n_layer=1, n_head=8, n_embd=64, block_size=33, attention="manual"),
    dict(n_layer=2, n_head=2, n_embd=16, block_size=20, tie_weights=False),
    dict(n_layer=1, n_head=1, n_embd=8, block_size=1),
]
BYTES = {"kind": "bpe", "ranks": [*map(chr, range(256))]}  # every byte is a token


# ---- The cache and the draws ----


def check_cache(model, idx, steps, stream_tokens=stream_tokens):
    """Greedy text and its logits are those of a model that reads all again for every token."""
    context = model.config.block_size
    text = idx
    window = idx[:, -context:]
    sure = 0  # tokens far likelier than the second
    for token, logits in stream_tokens(model, idx, steps, temperature=0):
        if window.size(1) > context:  # the older half is forgotten
            window = text[:, -max(1, context // 2):]
        with torch.no_grad():
            uncached = model(window)[0][:, -1]
        assert (logits - uncached).abs().max() < 1e-5 * uncached.abs().max()
        best, second = uncached.topk(2).values.unbind(1)
        clear = best - second > 1e-3
        assert torch.equal(token[clear], uncached.argmax(1)[clear])
        sure += clear.sum().item()
        text = torch.cat((text, token[:, None]), 1)
        window = torch.cat((window, token[:, None]), 1)
    assert sure > 0.9 * len(idx) * steps


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: f"context of {shape['block_size']}")
@pytest.mark.parametrize("batch", [1, 5])
def test_the_cache_changes_nothing(shape, batch):
    context = shape["block_size"]
    model = random_model(scale=4, **shape)
    for length in (1, context, context + 5):
        idx = torch.randint(97, (batch, length), generator=torch.Generator().manual_seed(batch))
        check_cache(model, idx, context + 9)  # past the context twice


def test_the_cache_serves_layers_that_share_their_weights():
    model = random_model(n_layer=2, scale=4)
    model.transformer.h[1] = model.transformer.h[0]
    check_cache(model, torch.arange(5)[None], 60)


def probabilities(logits, temperature, top_k, top_p):
    """The probability of every token, in plain NumPy."""
    logits = logits.astype(np.float64) / temperature
    order = np.argsort(-logits)
    probs = np.exp(logits - logits.max())
    if top_k:
        probs[order[top_k:]] = 0
    probs /= probs.sum()
    if top_p:
        nucleus = np.searchsorted(np.cumsum(probs[order]), top_p) + 1  # as few as reach top_p
        probs[order[nucleus:]] = 0
    return probs / probs.sum()


@pytest.mark.parametrize("temperature, top_k, top_p", [
    (0.6, None, None),
    (1.7, 5, None),
    (1.0, None, 0.8),
    (0.8, 9, 0.7),
    (2.0, 3, 1.0),
])
def test_draws_are_fair(temperature, top_k, top_p):
    """Of 100,000 draws, each token has its share, within four standard deviations (at most the root
    of what is expected); tokens that are cut off never come."""
    model = random_model(vocab_size=20, scale=2)
    idx = torch.tensor([[3, 1, 4]])
    options = (1, temperature, top_k, top_p, 6)
    tokens, _ = next(stream_tokens(model, idx.expand(100_000, -1), *options))
    counts = np.bincount(tokens.numpy(), minlength=20)
    logits = model(idx)[0][0, -1].detach().numpy()
    expected = 100_000 * probabilities(logits, temperature, top_k, top_p)
    assert (expected > 0).sum() >= 3
    assert (np.abs(counts - expected) <= 4 * np.sqrt(expected)).all()


def test_options_of_generate():
    """Seeds repeat a text, greedy options agree, dropout is off."""
    model = random_model(**SHAPES[0], scale=4, dropout=0.5).train()
    idx = torch.arange(10).view(2, 5)
    greedy = model.generate(idx, 15, temperature=0)
    assert model.training
    assert greedy.shape == (2, 20)
    assert torch.equal(greedy[:, :5], idx)
    for options in ({"temperature": 0}, {"top_k": 1}, {"top_p": 1e-6}, {"temperature": 1e-40}):
        assert torch.equal(model.generate(idx, 15, seed=1, **options), greedy)
    one, again, two = (model.generate(idx, 15, temperature=3.0, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(one, again)
    assert not torch.equal(one, two)
    for options in ({"temperature": -1}, {"top_k": 0}, {"top_p": 0}, {"temperature": math.nan}):
        with pytest.raises(train_gpt2.UserError, match="it must be from"):
            model.generate(idx, 1, **options)


# ---- What is shown ----


def test_no_character_is_cut(capsys):
    text = "aé漢🙂z"
    shown = []

    def tokens():
        for byte in text.encode():
            yield byte, None
            shown.append(capsys.readouterr().out)
        yield 0xE6, None  # a text may end inside one
    sample.print_text(Tokenizer(BYTES), "", tokens())
    assert shown == ["a", "", "é", "", "", "漢", "", "", "", "🙂", "z"]
    assert capsys.readouterr().out == "\ufffd\n"


@pytest.fixture
def says(monkeypatch):
    """A function from texts to a model whose rows say these; Ā, character 256, stands for token
    256, <|endoftext|>. model.asked counts the tokens."""
    def model_that_says(*texts):
        model = random_model(BYTES, block_size=16)
        model.asked = 0

        def sample_token(logits, *options):
            tokens = [[ord(text[model.asked])] for text in texts]
            model.asked += 1
            return torch.tensor(tokens)
        monkeypatch.setattr(train_gpt2, "sample_token", sample_token)
        return model
    return model_that_says


def test_a_text_ends_with_its_document(says, capsys):
    model = says("abĀcdef")
    assert model.generate("x", 7) == "xab"
    assert model.asked == 3
    assert says("abcdefg").generate("x", 4) == "xabcd"
    # Each text of a batch for itself: longer ones are not cut
    model = says("aĀ..Ā...", "bcdĀ....", "Ā.......")
    sample.write_texts(model, sample.Settings(num_samples=3, max_new_tokens=8), "x")
    assert capsys.readouterr().out.split("---------------\n") == ["xa\n", "xbcd\n", "x\n"]
    assert model.asked == 4


@pytest.mark.parametrize("spec, prompt, remark", [
    (BYTES, "Once there was ", "note: .* ends with a space.*\n"),
    (BYTES, "the end<|endoftext|>", "note: .* is plain text.*\n"),
    (BYTES, "x" * 25, "note: .* 25 tokens; the model sees the last 24\n"),
    (BYTES, "Once there was", ""),
    ({"kind": "char", "alphabet": "Once "}, "Once ", ""),
])
def test_remarks_on_a_prompt(spec, prompt, remark, capsys):
    sample.write_texts(random_model(spec), sample.Settings(max_new_tokens=1), prompt)
    assert re.fullmatch(remark, capsys.readouterr().err)


def test_a_prompt_begins_a_document_where_all_rows_did():
    model = random_model(BYTES)
    assert encode_prompt(model, "ab") == [97, 98]
    assert encode_prompt(model, "") == [256]
    model.starts_documents = True
    assert encode_prompt(model, "ab") == [256, 97, 98]
    assert encode_prompt(model, "") == [256]


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
    """In UTF-8, with Windows' mark of it or without, whatever the locale says."""
    for home in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(home, str(Path.cwd()))
    options = ["--max_new_tokens=12", "--seed=3"]
    text = write("~/ wäs\r\n", *options)
    assert text.startswith("~/ wäs")
    assert text == write("~/ w\udcc3\udca4s\r\n", *options)  # as Python passes it where LC_ALL=C
    for data in ("~/ wäs\r\n".encode(), "~/ wäs\r\n".encode("utf-8-sig")):
        Path("prompt.txt").write_bytes(data)
        assert text == write("--prompt=@prompt.txt", *options)
        assert text == write("--prompt=@~/prompt.txt", *options)
        stdin = io.TextIOWrapper(io.BytesIO(data), encoding="latin-1", newline="\n")
        monkeypatch.setattr("sys.stdin", stdin)
        assert text == write("--prompt=-", *options)


def save(model, path, step, age):
    """A checkpoint of this step, written so many seconds ago, with a log beside it."""
    path.parent.mkdir(exist_ok=True)
    torch.save(train_gpt2.make_checkpoint(model, step), path)
    path.with_name("log.csv").touch()
    os.utime(path, (time.time() - age,) * 2)


@pytest.mark.parametrize("best, latest, used", [
    (0, 52, "ckpt.pt"),
    (0, 0, "best.pt"),
    (9, 52, "best.pt"),
])
def test_the_newest_model_is_used_and_named(best, latest, used, trained, capsys):
    """On stderr. Weights from before training are not the newest; converted ones never are."""
    model = GPT.from_checkpoint(BEST)
    save(model, BEST, best, 0)
    save(model, BEST.with_name("ckpt.pt"), latest, 0)
    save(model, Path("out/older/best.pt"), 600, 60)
    save(model, Path("out/openai-gpt2/best.pt"), 0, -60)
    Path("out/openai-gpt2/log.csv").unlink()
    sample.main(["Once", "--max_new_tokens=3"])
    output, errors = capsys.readouterr()
    assert f"generated by {BEST.with_name(used)}" in errors
    assert ("of step 0" in errors) == (used == "ckpt.pt")
    assert "generated by" not in output
    sample.main(["Once", "--max_new_tokens=3", f"--checkpoint={BEST}"])  # used as it was named
    assert capsys.readouterr().err == ""


def test_a_model_is_soon_loaded(trained):
    """Without what takes torch a second to import."""
    code = "import sample, sys; sample.main(['Once']); assert 'torch._dynamo' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": str(ROOT)},
                   check=True)


def test_without_a_model(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert "python train_gpt2.py" in fails(sample.main, [], capsys)


@pytest.mark.parametrize("option", ["--temperature=1", "--top_k=5", "--top_p=0.5", "--export=new"])
def test_logits_that_are_not_finite(option, trained, capsys):
    model = random_model(BYTES, scale=1e30)
    torch.save(train_gpt2.make_checkpoint(model), BEST)
    error = fails(sample.main, [f"--checkpoint={BEST}", "--dtype=float32", option], capsys)
    assert "the model's logits are not finite" in error


@pytest.mark.parametrize("given, texts, dtype, options", [
    ("--max_new_tokens=3 --dtype=bfloat16", 1, torch.bfloat16, [3, 0.8, None, None, None]),
    ("--max_new_tokens=4 --dtype=float32 --temperature=1.5 --top_k=7 --top_p=0.9 --seed=5 "
     "--num_samples=2", 2, torch.float32, [4, 1.5, 7, 0.9, 5]),
])
def test_every_option_arrives(given, texts, dtype, options, write, monkeypatch):
    spy = Mock(wraps=stream_tokens)
    monkeypatch.setattr(sample, "stream_tokens", spy)
    found = write("Once", *given.split()).split("---------------\n")
    model, idx, *arrived = spy.call_args.args
    assert arrived == options
    assert model.transformer.wte.weight.dtype == dtype
    assert len({*found}) == texts
    for text in found:
        assert text.startswith("Once")


def test_explain_says_what_the_model_thinks(write):
    """Percent, rank, entropy and the alternatives' percent of each token: the model's own, whatever
    the temperature."""
    model = GPT.from_checkpoint(BEST)
    prompt = encode_prompt(model, "Once")
    idx = model.generate(torch.tensor([prompt]), 12, seed=8, temperature=3)
    new = idx[0, len(prompt):].tolist()
    assert len(set(new)) > 6
    assert 256 not in new
    logits = model(idx)[0][0, len(prompt) - 1:-1].detach()
    logs = torch.log_softmax(logits.double(), -1).numpy() / math.log(2)
    _, head, *rows = write("Once", "--explain", "--max_new_tokens=12", "--seed=8",
                           "--temperature=3", "--dtype=float32").splitlines()
    assert "temperature 1" in head
    for token, bits, row in zip(new, logs, rows, strict=False):
        percent = 100 * np.exp2(bits)
        rank = (bits > bits[token]).sum() + 1
        entropy = -(np.exp2(bits) * bits).sum()
        others = [i for i in np.argsort(-bits)[:4] if i != token]
        numbers = [float(number) for number in re.findall(r" +([\d.]+)(?:%|(?= +))", row)]
        assert numbers[1:3] == pytest.approx([rank, entropy], abs=0.006)
        expected = [percent[token], *percent[others[:3]]]
        assert [numbers[0], *numbers[3:]] == pytest.approx(expected, abs=0.06)
    surprise = -logs[range(12), new].mean()
    assert float(rows[12].split()[0]) == pytest.approx(surprise, abs=0.002)


def test_ctrl_c_stops_a_text_and_not_the_conversation(write, monkeypatch, capsys):
    a, stop = torch.tensor([[97]]), KeyboardInterrupt
    drawn = Mock(side_effect=[a, a, a, stop, a, a, a, a, a, a, a, a, stop])
    monkeypatch.setattr(train_gpt2, "sample_token", drawn)
    monkeypatch.setattr("builtins.input", Mock(side_effect=["Once", "there", ""]))
    output = write("--interactive", "--max_new_tokens=6")
    assert f"This is {BEST}." in output
    assert "Onceaaa\n" in output
    assert "thereaaaaaa\n" in output
    with pytest.raises(SystemExit) as end:  # what is written stays
        sample.main(["Once", "--device=cpu"])
    assert end.value.code == 130
    assert capsys.readouterr().out == "Onceaa\n"
