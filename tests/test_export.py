"""Export: transformers opens the folder and computes the same, or one line says why not."""
import json
import os
import random
import sys

import pytest
import torch
from conftest import FULL, agree, contents, posix, random_model, small_files
from test_changes import use_silu

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
]


def opens_alike(ours, folder):
    """transformers opens an export of `ours` in float32, with the same logits and greedy text."""
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert theirs.dtype == torch.float32
    agree(ours, theirs)
    idx = torch.randint(300, (2, 6), generator=torch.Generator().manual_seed(1))
    text = theirs.generate(idx, max_new_tokens=16, do_sample=False, pad_token_id=0)
    assert torch.equal(ours.generate(idx, 16, temperature=0), text)
    return theirs


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: f"{shape['n_embd']} wide")
def test_transformers_computes_the_same(shape, tmp_path):
    ours = random_model(**shape)
    sample.export(ours, tmp_path / "new" / "folder")
    opens_alike(ours, tmp_path / "new" / "folder")


def test_layers_that_share_their_weights(tmp_path):
    ours = random_model(n_layer=2)
    ours.transformer.h[1] = ours.transformer.h[0]
    sample.export(ours, tmp_path)
    agree(ours, transformers.AutoModelForCausalLM.from_pretrained(tmp_path))


def test_a_head_of_its_own(tmp_path, monkeypatch):
    ours = random_model()
    ours.config.tie_weights = False
    ours.lm_head = torch.nn.Linear(16, 300, bias=False)
    monkeypatch.setattr(train_gpt2, "unembed", lambda x, _: ours.lm_head(x))
    sample.export(ours, tmp_path)
    theirs = opens_alike(ours, tmp_path)
    assert not theirs.config.tie_word_embeddings
    assert torch.equal(theirs.lm_head.weight, ours.lm_head.weight)


def test_without_safetensors_from_bfloat16(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    ours = random_model(**SHAPES[0]).bfloat16()
    sample.export(ours, tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["config.json", "pytorch_model.bin"]
    opens_alike(ours.float(), tmp_path)


PIECES = ["a", "the", " once", "  ", "\n", "\t ", "é", "漢", "🙂", "'s", "'ll", "12", "_", "Ā",
          "\u00ad", "\x7f", "\x00", "<|endoftext"]
RANGES = [(0x20, 0x250), (0x1F300, 0x1FAFF)]  # characters of many kinds


def random_text(draw):
    text = ""
    for _ in range(draw.randrange(40)):
        if draw.random() < 0.7:
            text += draw.choice(PIECES)
        else:
            text += chr(draw.randrange(*draw.choice(RANGES)))
    return text


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
    assert theirs.eos_token_id == config.eos_token_id == config.bos_token_id == eot
    assert theirs("<|endoftext|>")["input_ids"] == [eot]  # there it is a token, here plain text
    draw = random.Random(0)
    for _ in range(1000 if FULL else 100):
        text = random_text(draw)
        ids = model.tokenizer.encode(text)
        assert theirs(text)["input_ids"] == ids, repr(text)
        assert theirs.decode(ids, clean_up_tokenization_spaces=False) == text


# ---- What is refused ----


def adds_to_mlp(name, make):
    """An edit: each MLP has make(n_embd) as its part `name`."""
    def edit(monkeypatch):
        init = train_gpt2.MLP.__init__

        def edited(mlp, config):
            init(mlp, config)
            setattr(mlp, name, make(config.n_embd))
        monkeypatch.setattr(train_gpt2.MLP, "__init__", edited)
    return edit


def no_bias(C):
    return torch.nn.Linear(C, 4 * C, bias=False)


EDITS = {  # what has changed: (an edit, what the message says)
    "the function": (use_silu, "differ by"),
    "a weight more": (adds_to_mlp("gate", lambda C: torch.nn.Linear(C, 4)), "it has 8,564 param"),
    "a weight less": (adds_to_mlp("c_fc", no_bias), "it has 8,432 parameters, not 8,496"),
    "a shape": (adds_to_mlp("c_proj", lambda C: Conv1D(C, 4 * C)), "differ by"),
}


@pytest.mark.parametrize("name", EDITS)
def test_an_edited_model_is_refused(name, tmp_path, monkeypatch, capsys):
    """In one line, which leaves nothing behind; an earlier export stays."""
    sample.export(random_model(), tmp_path / "earlier")
    before = contents(tmp_path)
    edit, message = EDITS[name]
    edit(monkeypatch)
    capsys.readouterr()
    for folder in ("earlier", "new"):
        with pytest.raises(UserError, match="another function than transformers' GPT-2") as error:
            sample.export(random_model(), tmp_path / folder)
        assert message in str(error.value)
        assert "\n" not in str(error.value)
    assert capsys.readouterr().err == ""
    assert contents(tmp_path) == before


def test_without_transformers_the_number_of_weights_decides(tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "transformers", None)
        sample.export(random_model(BYTES), tmp_path / "plain")
        assert "its logits were not compared" in capsys.readouterr().err
        adds_to_mlp("c_fc", no_bias)(patch)
        with pytest.raises(UserError, match="parameters, not"):
            sample.export(random_model(BYTES), tmp_path / "edited")
    assert os.listdir(tmp_path) == ["plain"]
    opens_alike(random_model(BYTES), tmp_path / "plain")


def test_another_models_folder_is_refused(tmp_path, capsys):
    """A file that transformers would read beside ours is named, and nothing changes. An export of
    ours is replaced; files of no model stay."""
    (tmp_path / "notes.txt").write_text("mine")
    sample.export(random_model(BYTES), tmp_path)
    sample.export(random_model(BYTES), tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "mine"
    (tmp_path / "tokenizer.json").write_text("{}")
    before = contents(tmp_path)
    with pytest.raises(UserError, match="already holds tokenizer.json"):
        sample.export(random_model(BYTES), tmp_path)
    assert contents(tmp_path) == before


def test_a_tokenizer_that_gpt2_has_not(tmp_path, capsys):
    """No tokenizer is written, and none of an earlier export may be read instead."""
    letters = random_model({"kind": "char", "alphabet": "\nabc"})
    sample.export(letters, tmp_path / "letters")
    assert "no tokenizer was written" in capsys.readouterr().err
    sample.export(random_model(BYTES), tmp_path / "bytes")
    with pytest.raises(UserError, match="already holds tokenizer_config.json"):
        sample.export(letters, tmp_path / "bytes")


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
    monkeypatch.setattr(os, "replace", dies)
    with pytest.raises(KeyboardInterrupt):
        sample.export(random_model(BYTES), tmp_path)
    monkeypatch.undo()
    if moves < 5:
        with pytest.raises(OSError, match="not a valid JSON"):
            transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
        sample.export(random_model(BYTES), tmp_path)
    opens_alike(random_model(BYTES), tmp_path)


@posix
def test_a_full_disk(tmp_path):
    before = contents(tmp_path)
    with small_files(5000), pytest.raises(UserError, match="cannot write .*model.safetensors"):
        sample.export(random_model(BYTES), tmp_path / "new" / "folder")
    assert contents(tmp_path) == before


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


def test_other_model_code_is_not_exported(tmp_path, monkeypatch, capsys):
    path = tmp_path / "best.pt"
    torch.save(train_gpt2.make_checkpoint(random_model()), path)
    monkeypatch.setattr(train_gpt2, "model_code", lambda: "edited")
    with pytest.raises(UserError, match="trained by other model code"):
        sample.export(train_gpt2.GPT.from_checkpoint(path), tmp_path / "new")
    assert os.listdir(tmp_path) == ["best.pt"]
