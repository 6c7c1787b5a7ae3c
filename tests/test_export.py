"""Export: transformers opens the folder and computes the same, or one line says why not."""
import json
import random
import sys
from pathlib import Path

import pytest
import torch
from conftest import FULL, agree, contents, random_model
from test_changes import use_silu

import sample
import train_gpt2
from train_gpt2 import UserError

transformers = pytest.importorskip("transformers")
_ = transformers.GPT2LMHeadModel  # before a test hides safetensors
BYTES = {"kind": "bpe", "ranks": [*map(chr, range(256)), "ab", "abc"]}


# ---- What transformers opens ----


@pytest.mark.parametrize("shape", [
    dict(n_layer=2, n_head=3, n_embd=48), dict(n_layer=3, n_head=4, n_embd=64),
    dict(n_layer=2, n_head=2, n_embd=32, pos_encoding="sinusoidal", activation="relu"),
])
@pytest.mark.parametrize("safe", [True, False])
def test_transformers_computes_the_same(shape, safe, tmp_path, monkeypatch):
    """The same logits to 1e-4 and the same greedy text, in float32 whatever the model is in."""
    ours, folder = random_model(**shape), tmp_path / "new" / "folder"
    if not safe:
        monkeypatch.setitem(sys.modules, "safetensors.torch", None)
        ours = ours.bfloat16()
    sample.export(ours, folder)
    weight_file = "model.safetensors" if safe else "pytorch_model.bin"
    assert {path.name for path in folder.iterdir()} == {weight_file, "config.json"}
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert {parameter.dtype for parameter in theirs.parameters()} == {torch.float32}
    agree(ours.float(), theirs)
    idx = torch.randint(300, (2, 6), generator=torch.Generator().manual_seed(1))
    text = theirs.generate(idx, max_new_tokens=16, do_sample=False, pad_token_id=0)
    assert torch.equal(ours.generate(idx, 16, temperature=0), text)


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
    eot = model.tokenizer.eot
    assert theirs.eos_token_id == config.eos_token_id == config.bos_token_id == eot
    assert theirs("<|endoftext|>")["input_ids"] == [eot]  # there it is a token, here plain text
    for text in random_texts(1000 if FULL else 100):
        ids = model.tokenizer.encode(text)
        assert theirs(text)["input_ids"] == ids, repr(text)
        assert theirs.decode(ids, clean_up_tokenization_spaces=False) == text


# ---- What is refused ----


def adds_to_mlp(name, make):
    def edit(monkeypatch):
        init = train_gpt2.MLP.__init__

        def edited(mlp, config):
            init(mlp, config)
            setattr(mlp, name, make(config.n_embd))
        monkeypatch.setattr(train_gpt2.MLP, "__init__", edited)
    return edit


EDITS = {use_silu: "differ by",
         adds_to_mlp("gate", lambda C: torch.nn.Linear(C, 4)): "mlp.gate.bias has shape (4,) here",
         adds_to_mlp("c_fc", lambda C: torch.nn.Linear(C, 4 * C, bias=False)): "and (64,) there"}


@pytest.mark.parametrize("edit", EDITS, ids=lambda edit: edit.__name__)
def test_an_edited_model_is_refused(edit, tmp_path, monkeypatch):
    """In one line, which leaves nothing behind; an earlier export stays."""
    sample.export(random_model(), tmp_path / "earlier")
    before = contents(tmp_path)
    edit(monkeypatch)
    for folder in ("earlier", "new"):
        with pytest.raises(UserError, match="another function than transformers' GPT-2") as error:
            sample.export(random_model(), tmp_path / folder)
        assert EDITS[edit] in str(error.value) and "\n" not in str(error.value)
    assert contents(tmp_path) == before


def test_another_models_folder_is_refused(tmp_path, capsys):
    """A file that transformers would read beside ours is named, and nothing changes. An export of
    ours is replaced; files of no model stay."""
    (tmp_path / "notes.txt").write_text("mine")
    for _ in range(2):
        sample.export(random_model(BYTES), tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "mine"
    letters = random_model({"kind": "char", "alphabet": "\nabc"})
    with pytest.raises(UserError, match="already holds tokenizer_config.json"):
        sample.export(letters, tmp_path)
    sample.export(letters, tmp_path / "letters")
    assert capsys.readouterr().err.count("no tokenizer was written") == 1
    (tmp_path / "tokenizer.json").write_text("{}")
    before = contents(tmp_path)
    with pytest.raises(UserError, match="already holds tokenizer.json"):
        sample.export(random_model(BYTES), tmp_path)
    assert contents(tmp_path) == before


# ---- The command line ----


def test_export_from_the_command_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("out/run").mkdir(parents=True)
    torch.save(train_gpt2.make_checkpoint(random_model(BYTES), settings={"rows": "documents"}),
               "out/run/best.pt")
    Path("out/run/log.csv").touch()
    assert sample.main(["--export=folder"]) == 0
    captured = capsys.readouterr()
    assert str(Path("out/run/best.pt")) in captured.out and captured.out.count("\n") == 1
    assert captured.err.count("\n") == 1 and "put <|endoftext|> before each prompt" in captured.err
    assert transformers.AutoTokenizer.from_pretrained("folder")("abc")["input_ids"] == [257]
