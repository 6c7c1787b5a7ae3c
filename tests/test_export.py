"""Export: transformers opens the folder and computes the same, or one line says why not."""
import json
import os
import random
import sys

import pytest
import torch
from conftest import FULL, agree, contents, random_model

import sample
import train_gpt2
from train_gpt2 import UserError

transformers = pytest.importorskip("transformers")
Conv1D = transformers.pytorch_utils.Conv1D
_ = transformers.GPT2LMHeadModel  # before a test hides safetensors
BYTES = {"kind": "bpe", "ranks": [*map(chr, range(256)), "ab", "abc"]}


# ---- What transformers opens ----

SHAPES = [
    dict(n_layer=2, n_head=3, n_embd=48),
    dict(n_layer=3, n_head=4, n_embd=64),
    dict(n_layer=2, n_head=2, n_embd=32, pos_encoding="sinusoidal", activation="relu"),
    dict(tie_weights=False, n_embd=8, activation="gelu_exact"),
]


def opens_alike(ours, folder):
    """transformers opens an export of `ours` in float32, with the same logits and greedy text."""
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert theirs.dtype == torch.float32
    assert theirs.config.tie_word_embeddings == ours.config.tie_weights
    agree(ours, theirs)
    idx = torch.arange(1, 13).view(2, 6)  # 0 is padding
    text = theirs.generate(idx, max_new_tokens=16, do_sample=False, pad_token_id=0)
    assert torch.equal(ours.generate(idx, 16, temperature=0), text)


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: f"{shape['n_embd']} wide")
def test_transformers_computes_the_same(shape, tmp_path):
    ours = random_model(**shape)
    sample.export(ours, tmp_path / "new" / "folder")
    opens_alike(ours, tmp_path / "new" / "folder")


def test_without_safetensors_from_bfloat16(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    ours = random_model(**SHAPES[0]).bfloat16()
    sample.export(ours, tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["config.json", "pytorch_model.bin"]
    opens_alike(ours.float(), tmp_path)


PIECES = ["a", "the", " once", "  ", "\n", "\t ", "é", "漢", "🙂", "'s", "'ll", "12", "_", "Ā",
          "\u00ad", "\x7f", "\x00", "<|endoftext"]
CHARACTERS = [chr(i) for i in (*range(0x20, 0x250), *range(0x1F300, 0x1FAFF))]


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
    eot = model.tokenizer.eot
    assert theirs.eos_token_id == eot
    assert config.eos_token_id == eot
    assert theirs("<|endoftext|>")["input_ids"] == [eot]  # there it is a token, here plain text
    draw = random.Random(0)
    for _ in range(1000 if FULL else 100):
        pieces = draw.choices(PIECES * 300 + CHARACTERS, k=draw.randrange(40))
        text = "".join(pieces)
        ids = model.tokenizer.encode(text)
        assert theirs(text)["input_ids"] == ids, repr(text)
        assert theirs.decode(ids, clean_up_tokenization_spaces=False) == text


# ---- What is refused ----


def edited_model(part, make):
    """Its MLP has make(n_embd) as this part."""
    model = random_model(BYTES)
    setattr(model.transformer.h[0].mlp, part, make(model.config.n_embd))
    return model


def no_bias(C):
    return torch.nn.Linear(C, 4 * C, bias=False)


@pytest.mark.parametrize("part, make, message", [
    ("act", lambda C: torch.nn.SiLU(), "differ by"),
    ("c_proj", lambda C: Conv1D(C, 4 * C), "differ by"),
    ("gate", lambda C: torch.nn.Linear(C, 4), "it has 7,908 parameters, not 7,840"),
    ("c_fc", no_bias, "it has 7,776 parameters, not 7,840"),
])
def test_an_edited_model_is_refused(part, make, message, tmp_path, capsys):
    """In one line, which leaves nothing behind; an earlier export stays."""
    sample.export(random_model(BYTES), tmp_path / "earlier")
    before = contents(tmp_path)
    capsys.readouterr()
    for folder in ("earlier", "new"):
        with pytest.raises(UserError, match="another function than transformers' GPT-2") as error:
            sample.export(edited_model(part, make), tmp_path / folder)
        assert message in str(error.value)
        assert "\n" not in str(error.value)
    assert capsys.readouterr().err == ""
    assert contents(tmp_path) == before


def test_without_transformers_the_number_of_weights_decides(tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "transformers", None)
        sample.export(random_model(BYTES), tmp_path / "plain")
        assert "its logits were not compared" in capsys.readouterr().err
        with pytest.raises(UserError, match="parameters, not"):
            sample.export(edited_model("c_fc", no_bias), tmp_path / "edited")
    assert os.listdir(tmp_path) == ["plain"]
    opens_alike(random_model(BYTES), tmp_path / "plain")


@pytest.mark.parametrize("spec, foreign", [
    (BYTES, "tokenizer.json"),
    ({"kind": "char", "alphabet": "\nabc"}, "vocab.json"),
])
def test_another_models_folder_is_refused(spec, foreign, tmp_path, capsys):
    """A file that transformers would read beside ours is named, and nothing changes. An export of
    ours is replaced; files of no model stay. Of characters there is no tokenizer to write."""
    (tmp_path / "notes.txt").write_text("mine")
    for _ in range(2):
        sample.export(random_model(spec), tmp_path)
    no_tokenizer = "no tokenizer was written" in capsys.readouterr().err
    assert no_tokenizer == (spec != BYTES)
    (tmp_path / foreign).write_text("{}")
    before = contents(tmp_path)
    with pytest.raises(UserError, match=f"already holds {foreign}"):
        sample.export(random_model(spec), tmp_path)
    assert contents(tmp_path) == before


# ---- Never half written ----


@pytest.mark.parametrize("moves", range(6))
def test_a_killed_export_cannot_be_opened(moves, tmp_path, monkeypatch):
    """Killed after each of its six moves into the folder of an earlier export. The next export
    replaces what was left."""
    sample.export(random_model(BYTES, scale=2), tmp_path)
    replace, done = os.replace, []

    def dies(source, target):
        replace(source, target)
        done.append(target.parent)
        if done.count(tmp_path) > moves:
            raise KeyboardInterrupt
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "replace", dies)
        sample.export(random_model(BYTES), tmp_path)
    if moves < 5:
        with pytest.raises(OSError, match="not a valid JSON"):
            transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
        sample.export(random_model(BYTES), tmp_path)
    opens_alike(random_model(BYTES), tmp_path)


# ---- The command line ----


def test_export_from_the_command_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    checkpoint = train_gpt2.make_checkpoint(random_model(BYTES), settings={"rows": "documents"})
    torch.save(checkpoint, "best.pt")
    assert sample.main(["--checkpoint=best.pt", "--export=folder"]) == 0
    captured = capsys.readouterr()
    [line] = captured.out.splitlines()
    assert line.startswith("folder is ready, made from best.pt")
    [line] = captured.err.splitlines()
    assert "put <|endoftext|> before each prompt" in line
    assert transformers.AutoTokenizer.from_pretrained("folder")("abc")["input_ids"] == [257]
