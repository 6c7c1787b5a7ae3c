"""SentencePiece's tokens in place of ours."""
import sys

import pytest
from conftest import fails
from test_data import documents_of, prepare

import prepare_data
import sample
import train_gpt2

KIND = "--tokenizer=sentencepiece"


def test_from_a_text_to_an_explanation(small_run, tmp_path, capsys):
    pytest.importorskip("sentencepiece")
    (tmp_path / "tales.txt").write_text("\n".join(documents_of(300)), encoding="utf-8")
    prepare(tmp_path / "tales.txt", tmp_path / "data", KIND)
    tokenizer = train_gpt2.open_data(tmp_path / "data").tokenizer
    assert tokenizer.decode(tokenizer.encode("a▁b")) == "a b"  # the library's sign for a space
    assert tokenizer.token_bytes()[tokenizer.eot] == 0
    argv = [*small_run, f"--data_dir={tmp_path / 'data'}", "--rows=stream", "--max_steps=20"]
    assert train_gpt2.main(argv) == 0
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
