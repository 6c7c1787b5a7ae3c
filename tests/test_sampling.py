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
from train_gpt2 import GPT, Tokenizer, encode_prompt, stream_tokens

SHAPES = [
    dict(n_layer=2, n_head=3, n_embd=48, block_size=24),
    dict(n_layer=3, n_head=1, n_embd=32, block_size=17, activation="relu",
         pos_encoding="sinusoidal"),
    dict(n_layer=1, n_head=8, n_embd=64, block_size=33, attention="manual"),
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
    """100,000 draws pass a chi-square test at 1 in 10,000; tokens that are cut off never come."""
    model = random_model(vocab_size=20, scale=2)
    idx = torch.tensor([[3, 1, 4]])
    options = (1, temperature, top_k, top_p, 6)
    tokens, _ = next(stream_tokens(model, idx.expand(100_000, -1), *options))
    counts = np.bincount(tokens.numpy(), minlength=20)
    logits = model(idx)[0][0, -1].detach().numpy()
    expected = 100_000 * probabilities(logits, temperature, top_k, top_p)
    possible = expected > 0
    assert possible.sum() >= 3
    assert not counts[~possible].any()
    counts, expected = counts[possible], expected[possible]
    chi_square = ((counts - expected) ** 2 / expected).sum()
    df = len(counts) - 1  # degrees of freedom
    spread = 2 / (9 * df)
    assert chi_square < df * (1 - spread + 3.72 * spread**0.5) ** 3  # Wilson & Hilferty 1931


def test_options_of_generate():
    """Seeds repeat a text, greedy options agree, dropout is off."""
    model = random_model(**SHAPES[0], scale=4, dropout=0.5)
    idx = torch.randint(97, (2, 5))
    greedy = model.generate(idx, 15, temperature=0)
    assert greedy.shape == (2, 20)
    assert torch.equal(greedy[:, :5], idx)
    one = model.generate(idx, 15, temperature=3.0, seed=1)
    assert torch.equal(one, model.generate(idx, 15, temperature=3.0, seed=1))
    assert not torch.equal(one, model.generate(idx, 15, temperature=3.0, seed=2))
    for options in ({"top_k": 1}, {"top_p": 1e-6}, {"temperature": 1e-40}):
        assert torch.equal(model.generate(idx, 15, seed=1, **options), greedy)
    assert not model.training
    model.train()
    assert torch.equal(model.generate(idx, 15, temperature=0), greedy)
    assert model.training


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
    sample.write_texts(says("a"), sample.Settings(max_new_tokens=1), "x" * 17)
    assert "17 tokens; the model sees the last 16" in capsys.readouterr().err


@pytest.mark.parametrize("spec, prompt, remark", [
    (BYTES, "Once there was ", "note: .* ends with a space.*\n"),
    (BYTES, "the end<|endoftext|>", "note: .* is plain text.*\n"),
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
    monkeypatch.setenv("HOME", str(Path.cwd()))
    monkeypatch.setenv("USERPROFILE", str(Path.cwd()))
    options = ["--max_new_tokens=12", "--seed=3"]
    text = write("~/ wäs", *options)
    assert text.startswith("~/ wäs")
    assert text == write("~/ w\udcc3\udca4s", *options)  # as Python passes it where LC_ALL=C
    for data in ("~/ wäs".encode(), "~/ wäs".encode("utf-8-sig")):
        Path("prompt.txt").write_bytes(data)
        assert text == write("--prompt=@prompt.txt", *options)
        assert text == write("--prompt=@~/prompt.txt", *options)
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(data), encoding="latin-1"))
        assert text == write("--prompt=-", *options)


def test_a_prompt_that_is_refused(trained, capsys, monkeypatch):
    assert "put it in quotes" in fails(sample.main, ["Once", "there", "was"], capsys)
    assert "quotes" not in fails(sample.main, ["--sed=1"], capsys)
    assert "not UTF-8" in fails(sample.main, ["w\udce4s"], capsys)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"w\xe4s"), encoding="latin-1"))
    assert "stdin: it is not UTF-8" in fails(sample.main, ["-"], capsys)


def age(path, seconds):
    """The file, made where it is missing, was written so long ago."""
    path.parent.mkdir(exist_ok=True)
    path.touch()
    os.utime(path, (time.time() - seconds,) * 2)


def test_the_newest_model_is_named(trained, capsys):
    """On stderr; converted weights are never the newest."""
    age(Path("out/older/best.pt"), 60)
    age(Path("out/older/log.csv"), 60)
    age(Path("out/openai-gpt2/best.pt"), -60)
    sample.main(["Once", "--max_new_tokens=3"])
    captured = capsys.readouterr()
    assert str(BEST) in captured.err
    assert "best.pt" not in captured.out
    sample.main(["Once", "--max_new_tokens=3", f"--checkpoint={BEST}"])
    assert "best.pt" not in capsys.readouterr().err
    Path("out").rename("elsewhere")
    assert "python train_gpt2.py" in fails(sample.main, [], capsys)


@pytest.mark.parametrize("best, latest, used", [
    (0, 52, "ckpt.pt"),
    (0, 0, "best.pt"),
    (9, 52, "best.pt"),
])
def test_the_weights_before_training_are_not_the_newest(best, latest, used, trained, capsys):
    model = GPT.from_checkpoint(BEST)
    for name, step in (("best.pt", best), ("ckpt.pt", latest)):
        torch.save(train_gpt2.make_checkpoint(model, step), BEST.with_name(name))
    sample.main(["Once", "--max_new_tokens=3"])
    error = capsys.readouterr().err
    assert f"generated by {BEST.with_name(used)}" in error
    assert ("of step 0" in error) == (used == "ckpt.pt")
    sample.main(["Once", "--max_new_tokens=3", f"--checkpoint={BEST}"])  # used as it was named
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("option", ["--temperature=1", "--top_k=5", "--top_p=0.5", "--export=new"])
def test_logits_that_are_not_finite(option, trained, capsys):
    model = random_model(BYTES, scale=1e30)
    torch.save(train_gpt2.make_checkpoint(model), BEST)
    error = fails(sample.main, [f"--checkpoint={BEST}", "--dtype=float32", option], capsys)
    assert "the model's logits are not finite" in error


def test_other_model_code_gives_a_note(trained, capsys, monkeypatch):
    monkeypatch.setattr(train_gpt2, "CODE", train_gpt2.CODE.replace("nn.GELU(", "nn.SiLU("))
    sample.main(["Once", f"--checkpoint={BEST}", "--max_new_tokens=3"])
    [line] = capsys.readouterr().err.splitlines()
    assert "trained by other code in MLP" in line


OPTIONS = {  # given: what arrives as (max_new_tokens, temperature, top_k, top_p, seed)
    "--max_new_tokens=3": (3, 0.8, None, None, None),
    "--max_new_tokens=4 --temperature=1.5 --top_k=7 --top_p=0.9 --seed=5": (4, 1.5, 7, 0.9, 5)}


def test_every_option_arrives(write, monkeypatch):
    seen = []

    def spy(model, idx, *options):
        seen.append((options, len(idx), model.transformer.wte.weight.dtype))
        return stream_tokens(model, idx, *options)
    monkeypatch.setattr(sample, "stream_tokens", spy)
    auto = train_gpt2.pick_dtype("auto", torch.device("cpu"))
    for given, options in OPTIONS.items():
        write("Once", *given.split())
        assert seen.pop() == (options, 1, auto)
    texts = write("Once", "--num_samples=2", "--dtype=bfloat16").split("---------------\n")
    assert seen.pop()[1:] == (2, torch.bfloat16)
    assert [text[:4] for text in texts] == ["Once", "Once"]
    assert texts[0] != texts[1]


def expected_row(model, ids, token):
    """What a row of the table says of a token: percent, rank, entropy and the alternatives'
    percent, from logits without a cache."""
    with torch.no_grad():
        logits = model(torch.tensor([ids]))[0][0, -1]
    logs = torch.log_softmax(logits.double(), -1)
    percent = 100 * logs.exp()
    rank = (logs > logs[token]).sum().item() + 1
    entropy = -(logs.exp() * logs).sum().item() / math.log(2)
    others = [i for i in logs.argsort(descending=True)[:4].tolist() if i != token]
    return [percent[token].item(), rank, entropy, *percent[others[:3]].tolist()]


def test_explain_says_what_the_model_thinks(write):
    """Probabilities are the model's own, whatever the temperature."""
    model = GPT.from_checkpoint(BEST)
    ids = encode_prompt(model, "Once")
    idx = model.generate(torch.tensor([ids]), 12, seed=8, temperature=3)
    new = idx[0, len(ids):].tolist()
    assert len(set(new)) > 6
    assert 256 not in new
    _, head, *rows = write("Once", "--explain", "--max_new_tokens=12", "--seed=8",
                           "--temperature=3", "--dtype=float32").splitlines()
    assert "temperature 1" in head
    bits = 0
    for token, row in zip(new, rows, strict=False):
        expected = expected_row(model, ids, token)
        numbers = [float(number) for number in re.findall(r" +([\d.]+)(?:%|(?= +))", row)]
        assert numbers == pytest.approx(expected, abs=0.06)  # of a percent
        assert numbers[1:3] == pytest.approx(expected[1:3], abs=0.006)
        bits -= math.log2(expected[0] / 100)
        ids.append(token)
    assert float(rows[12].split()[0]) == pytest.approx(bits / 12, abs=0.002)


def test_ctrl_c_stops_a_text_and_not_the_conversation(write, monkeypatch, capsys):
    asked = 0

    def sample_token(*args):
        nonlocal asked
        asked += 1
        if asked == 4:
            raise KeyboardInterrupt
        return torch.tensor([[97]])
    lines = iter(["Once", "there", ""])
    monkeypatch.setattr(builtins, "input", lambda _: next(lines))
    monkeypatch.setattr(train_gpt2, "sample_token", sample_token)
    output = write("--interactive", "--max_new_tokens=6")
    assert f"This is {BEST}." in output
    assert "Onceaaa\n" in output
    assert "thereaaaaaa\n" in output
    asked = 0
    with pytest.raises(SystemExit) as stop:  # what is written stays
        sample.main(["Once", "--device=cpu"])
    assert stop.value.code == 130
    assert capsys.readouterr().out == "Onceaaa\n"
