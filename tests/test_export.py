"""Export: transformers opens the folder and computes the same, or one line says why not."""
import json
import random
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import FULL, fails

import sample
import train_gpt2
from train_gpt2 import GPT, GPTConfig, Tokenizer, UserError

transformers = pytest.importorskip("transformers")
LETTERS = {"kind": "char", "alphabet": "\nabc"}
BYTES = {"kind": "bpe", "ranks": [*map(chr, range(256)), "ab", "abc"]}


def random_model(spec=None, **shape):
    """A model whose biases and norms are random too."""
    torch.manual_seed(2)
    tokenizer = Tokenizer(spec) if spec else None
    shape = dict(vocab_size=tokenizer.vocab_size if spec else 300, block_size=24, n_layer=1,
                 n_head=1, n_embd=16) | shape
    model = GPT(GPTConfig(**shape)).eval()
    for parameter in model.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    model.tokenizer = tokenizer
    return model


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# ---- What transformers opens ---------------------------------------------------------------------


@pytest.mark.parametrize("shape", [
    dict(), dict(n_layer=2, n_head=3, n_embd=48), dict(n_layer=3, n_head=4, n_embd=64),
    dict(n_layer=2, n_head=2, n_embd=32, pos_encoding="sinusoidal", activation="relu"),
], ids=lambda shape: " ".join(map(str, shape.values())))
@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "bin"])
def test_transformers_computes_the_same(shape, safe, tmp_path, monkeypatch):
    """The same logits to 1e-4 and the same greedy text."""
    ours, folder = random_model(dropout=0.25, **shape), tmp_path / "new" / "folder"
    if not safe:
        monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    sample.export(ours, folder)
    weight_file = "model.safetensors" if safe else "pytorch_model.bin"
    assert {path.name for path in folder.iterdir()} == {weight_file, "config.json"}
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)
    c = theirs.config
    assert c.resid_pdrop == c.embd_pdrop == c.attn_pdrop == 0.25
    idx = torch.randint(300, (2, 20), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert (ours(idx)[0] - theirs(idx).logits).abs().max() < 1e-4
    text = theirs.generate(idx[:, :6], max_new_tokens=16, do_sample=False, pad_token_id=0)
    assert torch.equal(ours.generate(idx[:, :6], 16, temperature=0), text)


def test_exports_are_in_float32(tmp_path):
    """Whatever the model is in, which stays as it is; marked as transformers wants its files."""
    safetensors = pytest.importorskip("safetensors")
    model = random_model(BYTES).bfloat16().train()
    sample.export(model, tmp_path)
    assert model.training and {p.dtype for p in model.parameters()} == {torch.bfloat16}
    with safetensors.safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert {file.get_tensor(name).dtype for name in file.keys()} == {torch.float32}


def random_texts(count):
    draw = random.Random(0)
    pieces = ["a", "the", " once", "  ", "\n", "\t ", "é", "漢", "🙂", "'s", "'ll", "12", "_", "Ā",
              "\u00ad", "\x7f", "\x00", "<|endoftext"]
    ranges = (0x20, 0x250), (0x1F300, 0x1FAFF)
    for _ in range(count):
        yield "".join(draw.choice(pieces) if draw.random() < 0.7 else
                      chr(draw.randrange(*draw.choice(ranges))) for _ in range(draw.randrange(40)))


@pytest.mark.parametrize("kind", ["bpe", "gpt2"])
def test_tokenizers_give_equal_ids(kind, request, tmp_path):
    if kind == "gpt2":
        spec = request.getfixturevalue("gpt2_vocabulary").spec
    else:  # trained by hand, on the stories
        meta = request.getfixturevalue("stories") / "meta.json"
        spec = json.loads(meta.read_text(encoding="utf-8"))["tokenizer"]
    model = random_model(spec)
    sample.export(model, tmp_path)
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert theirs.model_max_length == 24
    eot = model.tokenizer.eot
    assert theirs.eos_token_id == config.eos_token_id == config.bos_token_id == eot
    assert theirs("<|endoftext|>")["input_ids"] == [eot]  # there it is a token, here plain text
    for text in random_texts(1000 if FULL else 100):
        ids = model.tokenizer.encode(text)
        assert theirs(text)["input_ids"] == ids, repr(text)
        assert theirs.decode(ids, clean_up_tokenization_spaces=False) == text


@pytest.mark.parametrize("tokenizer", [
    Tokenizer(LETTERS), SimpleNamespace(spec={"kind": "sentencepiece"}, eot=3), None])
def test_other_tokenizers_are_left_out(tokenizer, tmp_path, capsys):
    model = random_model(vocab_size=4)
    model.tokenizer = tokenizer
    sample.export(model, tmp_path)
    assert capsys.readouterr().err.count("no tokenizer was written") == 1
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "model.safetensors"}
    eos = json.loads((tmp_path / "config.json").read_text())["eos_token_id"]
    assert eos == (tokenizer and tokenizer.eot)


def test_merges_are_found_from_tokens():
    single = [bytes([byte]) for byte in range(256)]
    assert sample.merges_of([*single, b"ab", b"bc", b"abc"]) == [
        (b"a", b"b"), (b"b", b"c"), (b"ab", b"c")]
    with pytest.raises(UserError, match="no merges make"):
        sample.merges_of([*single, b"abc"])


# ---- What is refused -----------------------------------------------------------------------------


def silu(monkeypatch):
    monkeypatch.setattr(train_gpt2.MLP, "forward",
                        lambda mlp, x: mlp.c_proj(F.silu(mlp.c_fc(x))))


def sliding_window(monkeypatch):
    def attention(q, k, v, *options):
        T, S = q.size(2), k.size(2)
        mask = torch.ones(T, S, dtype=torch.bool).tril(S - T).triu(S - T - 15)
        return F.scaled_dot_product_attention(q, k, v, mask)
    monkeypatch.setattr(train_gpt2, "causal_attention", attention)


def adds_to_mlp(name, make):
    def edit(monkeypatch):
        init = train_gpt2.MLP.__init__

        def edited(mlp, config):
            init(mlp, config)
            setattr(mlp, name, make(config.n_embd))
        monkeypatch.setattr(train_gpt2.MLP, "__init__", edited)
    return edit


def unknown_activation(monkeypatch):
    monkeypatch.setattr(sample, "config_of", lambda model, real=sample.config_of:
                        real(model) | {"activation_function": "zelu"})


EDITS = {
    silu: "differ by", sliding_window: "differ by", unknown_activation: "zelu",
    adds_to_mlp("gate", lambda C: torch.nn.Linear(C, 4)): "mlp.gate.bias has shape (4,) here",
    adds_to_mlp("c_fc", lambda C: torch.nn.Linear(C, 4 * C, bias=False)): "and (64,) there",
    adds_to_mlp("c_fc", lambda C: torch.nn.Linear(C, 5 * C)): "has shape (80,) here",
}


@pytest.mark.parametrize("edit", EDITS, ids=lambda edit: edit.__name__)
@pytest.mark.parametrize("place", ["new", "an earlier export"])
def test_an_edited_model_is_refused(edit, place, tmp_path, monkeypatch):
    """In one line; nothing is left of it, and an earlier export is as it was."""
    if place != "new":
        sample.export(random_model(), tmp_path / "folder")
    before = contents(tmp_path)
    edit(monkeypatch)
    with pytest.raises(UserError, match="another function than transformers' GPT-2") as error:
        sample.export(random_model(), tmp_path / "folder")
    assert EDITS[edit] in str(error.value) and "\n" not in str(error.value)
    assert contents(tmp_path) == before
    assert [path.name for path in tmp_path.iterdir()] == ["folder"] * (place != "new")


def test_without_transformers(tmp_path, monkeypatch, capsys):
    """Names and shapes are compared all the same."""
    monkeypatch.setitem(sys.modules, "transformers", None)
    sample.export(random_model(BYTES), tmp_path / "folder")
    assert capsys.readouterr().err.count("transformers is not installed") == 1
    assert (tmp_path / "folder" / "vocab.json").exists()
    adds_to_mlp("gate", lambda C: torch.nn.Linear(C, 4))(monkeypatch)
    with pytest.raises(UserError, match="mlp.gate"):
        sample.export(random_model(), tmp_path / "other")
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("other", [
    "tokenizer.json", "model-00001-of-00002.safetensors", "pytorch_model.bin", "config.json"])
def test_another_models_folder_is_refused(other, tmp_path):
    """What transformers would read beside our files is named, and everything stays. An export of
    ours is replaced, and what is no model's is left alone."""
    model = random_model(BYTES)
    (tmp_path / "notes.txt").write_text("mine")
    for _ in range(2):
        sample.export(model, tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "mine"
    (tmp_path / other).write_text("{}")
    before = contents(tmp_path)
    with pytest.raises(UserError, match="already holds") as error:
        sample.export(model, tmp_path)
    assert other in str(error.value) or other == "config.json"
    assert contents(tmp_path) == before


def test_a_tokenizer_of_an_earlier_export_is_not_left(tmp_path):
    sample.export(random_model(BYTES), tmp_path)
    with pytest.raises(UserError, match="already holds tokenizer_config.json"):
        sample.export(random_model(LETTERS), tmp_path)


# ---- The command line ----------------------------------------------------------------------------


def test_export_from_the_command_line(tmp_path, monkeypatch, capsys):
    """A shell leaves the ~ in --export=~/folder alone."""
    monkeypatch.chdir(tmp_path)
    for name in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(name, str(tmp_path))
    Path("out/run").mkdir(parents=True)
    torch.save(train_gpt2.make_checkpoint(random_model(BYTES), settings={"rows": "documents"}),
               "out/run/best.pt")
    assert sample.main(["--export=~/folder"]) == 0
    captured = capsys.readouterr()
    assert str(Path("out/run/best.pt")) in captured.out and captured.out.count("\n") == 1
    assert captured.err.count("\n") == 1 and "put <|endoftext|> before each prompt" in captured.err
    assert transformers.AutoTokenizer.from_pretrained("folder")("abc")["input_ids"] == [257]
    Path("file").write_text("mine")
    for place in ("file", "file/folder"):
        assert "choose another" in fails(sample.main, [f"--export={place}"], capsys)
    assert Path("file").read_text() == "mine"
    silu(monkeypatch)
    assert "differ by" in fails(sample.main, ["--export=new"], capsys)
    assert {path.name for path in tmp_path.iterdir()} == {"out", "folder", "file"}
