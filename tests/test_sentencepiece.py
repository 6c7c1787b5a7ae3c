"""SentencePiece's tokens in place of ours."""
import importlib.util
import sys

import pytest
from conftest import fails, stopped
from test_data import documents_of, prepare
from test_text import ODD
from test_training import compare

import prepare_data
import sample
import train_gpt2

needs_library = pytest.mark.skipif(not importlib.util.find_spec("sentencepiece"),
                                   reason="sentencepiece is not installed")
KIND = "--tokenizer=sentencepiece"
TEXTS = ODD | {
    "spaces": "  two  and \t tabs\t\n    four \n" * 50, "rare ones": "漢字" * 9999 + " a b",
    "notation": "<unk> <s> <0x41> ▅<|endoftext|>" * 9 + "no " * 999,
    "other alphabets": "plain words " * 90 + "漢字🙂é\u0378" * 9}


@needs_library
@pytest.mark.parametrize("name", TEXTS)
def test_texts_come_back_byte_for_byte(name, tmp_path):
    """All but the library's sign for a space."""
    text = TEXTS[name]
    (tmp_path / "a.txt").write_bytes(text.encode())
    train, val, _ = prepare(tmp_path / "a.txt", tmp_path / "data", KIND, "--vocab_size=1024")
    assert "".join(train + val) == text
    tokenizer = train_gpt2.open_data(tmp_path / "data").tokenizer
    ids, sizes = tokenizer.encode(text), tokenizer.token_bytes()
    assert tokenizer.decode(ids) == text
    assert sizes[ids].sum() == len(text.encode())
    assert tokenizer.eot not in ids
    assert sizes[tokenizer.eot] == 0
    assert tokenizer.decode(tokenizer.encode("a▁b")) == "a b"


@needs_library
def test_from_a_text_to_an_explanation(small_run, tmp_path, capsys):
    (tmp_path / "tales.txt").write_text("\n".join(documents_of(300)), encoding="utf-8")
    prepare(tmp_path / "tales.txt", tmp_path / "data", KIND)
    argv = [*small_run, f"--data_dir={tmp_path / 'data'}", "--rows=stream", "--max_steps=20"]
    train_gpt2.main([*argv, f"--out_dir={tmp_path / 'whole'}"])
    stopped(9, argv)
    assert train_gpt2.main(argv) == 0
    compare(tmp_path / "whole", tmp_path / "run", 20)
    capsys.readouterr()
    assert not sample.main(["the sun", f"--checkpoint={tmp_path / 'run' / 'best.pt'}", "--explain"])
    output = capsys.readouterr().out
    assert output.startswith("the sun\n")
    assert "bits per byte" in output


def test_without_the_library(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "sentencepiece", None)  # so an import fails
    (tmp_path / "a.txt").write_text("some words " * 99)
    argv = [str(tmp_path / "a.txt"), KIND, f"--out_dir={tmp_path / 'data'}"]
    assert "pip install sentencepiece" in fails(prepare_data.main, argv, capsys)
    spec = {"kind": "sentencepiece", "ranks": [*map(chr, range(256))], "model": ""}
    with pytest.raises(train_gpt2.UserError, match="pip install sentencepiece"):
        train_gpt2.Tokenizer(spec).encode("words")
