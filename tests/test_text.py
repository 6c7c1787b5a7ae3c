"""Text as people really have it: read, or refused in one true line."""

import bz2
import gzip
import json
import lzma
import os
import random
import subprocess
import sys
import time

import numpy as np
import pytest
from conftest import FULL, ROOT, fails
from test_data import documents_of, prepare

import prepare_data
import train_gpt2

TEXTS = documents_of(60, seed=4)


def lines_of(rows):
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def parquet(path, **columns):
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table(columns), path, row_group_size=20)


@pytest.mark.parametrize(
    "name, pack",
    [
        ("corpus.ndjson", bytes),
        ("corpus.jsonlines", bytes),
        ("corpus.JSONL", bytes),
        ("corpus.jsonl.gz", gzip.compress),
        ("corpus.jsonl.bz2", bz2.compress),
        ("corpus.jsonl.xz", lzma.compress),
    ],
)
def test_lines_by_other_names_and_compressed(name, pack, tmp_path):
    (tmp_path / name).write_bytes(pack(lines_of({"text": text} for text in TEXTS)))
    train, val, _ = prepare(tmp_path / name, tmp_path / "out")
    assert train + val == TEXTS
    assert prepare_data.name_of(prepare_data.Settings(dataset=name))[0] == "corpus"


def test_a_compressed_text_is_the_text(tmp_path):
    text = "\n".join(TEXTS)
    (tmp_path / "tale.txt").write_text(text, newline="")
    (tmp_path / "tale.txt.gz").write_bytes(gzip.compress(text.encode())[:])
    found = [
        prepare(tmp_path / name, tmp_path / name[-3:])[:2] for name in ("tale.txt", "tale.txt.gz")
    ]
    assert found[0] == found[1] and found[0][0] + found[0][1] == [
        text[: int(len(text) * 0.9)],
        text[int(len(text) * 0.9) :],
    ]


def test_zstd_is_read_or_refused_in_one_line(tmp_path, capsys):
    pyarrow = pytest.importorskip("pyarrow")
    data = lines_of({"text": text} for text in TEXTS)
    with pyarrow.CompressedOutputStream(str(tmp_path / "a.jsonl.zst"), "zstd") as file:
        file.write(data)
    if sys.version_info >= (3, 14):
        assert sum(prepare(tmp_path / "a.jsonl.zst", tmp_path / "out")[:2], []) == TEXTS
    else:
        assert "decompress it" in fails(prepare_data.main, [str(tmp_path / "a.jsonl.zst")], capsys)


OTHERS = {
    "a new key": lambda i: {"tag": "x"} if i > 30 else {},
    "a number that becomes text": lambda i: {"n": i if i < 30 else f"x{i}"},
    "a null that becomes text": lambda i: {"n": None if i < 30 else "x"},
    "objects that become lists": lambda i: {"meta": {"a": 1} if i < 30 else [1, {"b": None}]},
    "huge numbers": lambda i: {"n": 10**40, "m": 1e400},
}


@pytest.mark.parametrize("name", OTHERS)
def test_only_the_text_column_matters(name, tmp_path):
    rows = ({**OTHERS[name](i), "text": text} for i, text in enumerate(TEXTS))
    (tmp_path / "a.jsonl").write_bytes(lines_of(rows))
    assert sum(prepare(tmp_path / "a.jsonl", tmp_path / "out")[:2], []) == TEXTS


def test_text_that_looks_like_dates_is_text(tmp_path):
    dates = [f"2024-01-{i:02d}T00:00:00" for i in range(1, 31)]
    (tmp_path / "a.jsonl").write_bytes(lines_of({"text": date} for date in dates))
    assert sum(prepare(tmp_path / "a.jsonl", tmp_path / "out")[:2], []) == dates


def test_files_with_other_columns_and_lines_without_text(tmp_path):
    (tmp_path / "1.jsonl").write_bytes(lines_of({"text": text, "a": 1} for text in TEXTS[:20]))
    (tmp_path / "2.jsonl").write_bytes(lines_of({"b": [], "text": text} for text in TEXTS[20:40]))
    (tmp_path / "3.jsonl").write_bytes(
        lines_of([{"body": "x"}, {"text": None}, {"text": 3}, 7])
        + b" \n\r\n"
        + lines_of({"text": text} for text in TEXTS[40:])[:-1]
    )
    train, val, output = prepare(tmp_path / "*.jsonl", tmp_path / "out")
    assert train + val == TEXTS
    assert '4 lines without "text" skipped\n' in output


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
@pytest.mark.parametrize("empty", ["", None])
def test_empty_documents_are_skipped_before_the_cut(kind, empty, tmp_path):
    texts = [*TEXTS[:30], empty, *TEXTS[30:], *[empty] * 9]
    if kind == "jsonl":
        (tmp_path / "a.jsonl").write_bytes(lines_of({"text": text} for text in texts))
    else:
        parquet(tmp_path / "a.parquet", text=texts)
    train, val, output = prepare(tmp_path / f"a.{kind}", tmp_path / "out")
    assert (train, val) == (TEXTS[:54], TEXTS[54:])
    assert f'10 {"lines" if kind == "jsonl" else "rows"} without "text" skipped\n' in output


@pytest.mark.parametrize(
    "bad, message",
    [
        (b'{"text": "a"', "line 3, is not JSON"),
        (b"{'text': 'a'}", "line 3, is not JSON"),
        (b'{"text": "\xff"}', "line 3, is not UTF-8"),
        (b"[" * 100_000, "line 3, is not JSON"),
    ],
)
def test_a_bad_line_is_named(bad, message, tmp_path, capsys):
    (tmp_path / "a.jsonl").write_bytes(lines_of([{"text": "x"}, {"text": "y"}]) + bad + b"\n")
    line = fails(
        prepare_data.main, [str(tmp_path / "a.jsonl"), f"--out_dir={tmp_path / 'out'}"], capsys
    )
    assert message in line and "a.jsonl" in line and "network" not in line
    assert not (tmp_path / "out").exists()


def test_kinds_of_parquet_columns(tmp_path, capsys):
    import pyarrow

    for name, kind in (
        ("view", pyarrow.string_view()),
        ("large", pyarrow.large_string()),
        ("bytes", pyarrow.binary()),
        ("dictionary", None),
    ):
        column = (
            pyarrow.array(TEXTS * 2).dictionary_encode()
            if kind is None
            else pyarrow.array(
                [text.encode() for text in TEXTS * 2] if name == "bytes" else TEXTS * 2, kind
            )
        )
        parquet(tmp_path / f"{name}.parquet", text=column)
        train, val, _ = prepare(tmp_path / f"{name}.parquet", tmp_path / name)
        assert train + val == TEXTS * 2, name
    parquet(tmp_path / "bad.parquet", text=[text.encode() for text in TEXTS] + [b"\xff"])
    line = fails(prepare_data.main, [str(tmp_path / "bad.parquet")], capsys)
    assert "row 61, has text that is not UTF-8" in line


# Each with what must come back; a dict is a .jsonl line by line
ODD = {
    "a byte-order mark": ("\ufeffOnce. " * 50).encode(),
    "CRLF": b"one line\r\nand another\r\n\r\n" * 50,
    "NUL bytes": b"a\0b \0\0 c\n" * 50,
    "a literal end of text": b"a <|endoftext|> b\n" * 50,
    "one line without a break": "".join(random.Random(0).choices("ACGT", k=9000)).encode(),
    "white space only": "".join(random.Random(0).choices(" \t\n\u3000", k=3000)).encode(),
    "control characters": bytes(range(1, 128)) * 20,
    "combining marks": ("e\u0301\u200d\u2028\u0085\u3000x" * 200).encode(),
}


@pytest.mark.parametrize("kind", ["bpe", "char", "gpt2", "sentencepiece"])
@pytest.mark.parametrize("name", ODD)
def test_odd_texts_come_back_byte_for_byte(name, kind, tmp_path, request):
    if kind == "gpt2":
        request.getfixturevalue("gpt2_vocabulary")
    if kind == "sentencepiece":
        pytest.importorskip("sentencepiece")
    (tmp_path / "a.txt").write_bytes(ODD[name])
    train, val, _ = prepare(
        tmp_path / "a.txt", tmp_path / "out", f"--tokenizer={kind}", "--vocab_size=500"
    )
    assert "".join(train + val).encode() == ODD[name]


def test_odd_lines(tmp_path):
    """A byte-order mark, an escape that is half a character, Windows line ends, a key twice."""
    (tmp_path / "a.jsonl").write_bytes(
        b'\xef\xbb\xbf{"text": "one"}\r\n{"text": "a\\ud800b"}\r\n'
        b'{"text": "x", "text": "two\\u00e9"}\r\n{"text": "\\ud83d\\ude42"}'
    )
    assert sum(prepare(tmp_path / "a.jsonl", tmp_path / "out")[:2], []) == [
        "one",
        "a\ufffdb",
        "twoé",
        "🙂",
    ]


def test_a_name_with_brackets_is_a_name(tmp_path):
    (tmp_path / "data [1]").mkdir()
    (tmp_path / "data [1]" / "b[x].txt").write_text("A tale. " * 50)
    assert sum(prepare(tmp_path / "data [1]" / "b[x].txt", tmp_path / "out")[:2], [])
    assert (
        prepare_data.name_of(
            prepare_data.Settings(dataset=str(tmp_path / "data [1]" / "b[x].txt"))
        )[0]
        == "b_x_"
    )


@pytest.mark.parametrize("run", [" ", "\t", "\n", "-", "ab", "1", "漢"])
def test_runs_too_long_for_the_regular_expression(run, gpt2_vocabulary):
    """Nothing is lost, around the run the ids are those of the whole text."""
    text = "Once upon a time" + run * (1_200_000 // len(run)) + "the end"
    ids = prepare_data.encode_array(gpt2_vocabulary, text)
    assert gpt2_vocabulary.decode(ids.tolist()) == text
    assert ids[:4].tolist() == gpt2_vocabulary.encode("Once upon a time")


def test_pieces_of_a_long_text_have_the_tokens_of_the_whole(tmp_path, monkeypatch):
    """Read a few bytes at a time, from anywhere, and cut up: the pieces add up to the text, and
    their
    tokens to those of the whole."""
    text = "\u3000 \n\n".join(documents_of(40, seed=3)) + "  \u2003 x" + "\x1c \x1fz y" * 300
    (tmp_path / "text.txt").write_bytes(text.encode())
    tokenizer = train_gpt2.Tokenizer(prepare_data.bpe_spec(prepare_data.train_bpe([text], 400)))
    whole = tokenizer.encode(text)
    for size in (300, 1000, 10**6):
        monkeypatch.setattr(prepare_data, "PIECE", size)
        monkeypatch.setattr(prepare_data, "LONGEST", size)
        pieces = list(prepare_data.read_text(tmp_path / "text.txt", "", 0))
        assert "".join(piece for _, piece, _ in pieces) == text
        assert [i for _, piece, _ in pieces for i in tokenizer.encode(piece)] == whole
        at = pieces[len(pieces) // 2][0]
        rest = list(prepare_data.read_text(tmp_path / "text.txt", "", at))
        assert rest == [piece[:2] + (piece[0] == 0,) for piece in pieces if piece[0] >= at]
        assert prepare_data.encode_array(tokenizer, text).tolist() == whole


def awkward_texts(size):
    """Texts of `size` bytes that were slow to learn from."""
    import base64

    draw = np.random.default_rng(0)
    letters = np.array(list("etaoinshrdlu"))
    lexicon = ["".join(draw.choice(letters, draw.integers(2, 10))) for _ in range(20_000)]
    rank = draw.zipf(1.2, size // 5) % len(lexicon)
    english = " ".join(lexicon[i] for i in rank)[:size]
    return {
        "English": english,
        "spaces": english[: size // 3] + " " * (size // 2) + english[: size // 6],
        "DNA": "".join(draw.choice(list("ACGT"), size)),
        "base64": base64.b64encode(draw.bytes(size * 3 // 4)).decode(),
        "JavaScript": "".join(
            f"function {a}({b},{a}){{return {b}.{a}({b}||{{}})}};"
            for a, b in draw.choice(list("abcdefghijk"), (size // 36, 2))
        ),
        "Chinese": "".join(map(chr, 0x4E00 + (draw.zipf(1.3, size // 3) - 1) % 3000)),
    }


def test_training_on_one_long_word_is_linear():
    """2 MB with FULL_TESTS, in a table of seconds. A fixed part is allowed, so that small sizes
    hold."""
    size, seconds = 2_000_000 if FULL else 200_000, {}
    for name, text in awkward_texts(size).items():
        began = time.perf_counter()
        assert prepare_data.train_bpe([text], 1024)
        seconds[name] = time.perf_counter() - began
    print({name: round(value, 2) for name, value in seconds.items()})
    assert max(seconds.values()) < 4 * seconds["English"] + 1, seconds


def peak_memory(argv):
    """Runs the script in a process of its own; (exit status, stderr, peak memory in bytes)."""
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "prepare_data.py"), *argv],
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
    )
    errors = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    return os.waitstatus_to_exitcode(status), errors, usage.ru_maxrss * 1024


@pytest.mark.skipif(not FULL or os.name == "nt", reason="FULL_TESTS: a minute")
@pytest.mark.parametrize("name", ["line.txt", "line.jsonl", "empty.jsonl", "rows.parquet"])
def test_memory_stays_below_a_limit(name, tmp_path):
    """100 MB in a single line; 100,000 empty documents; 100 MB in one row."""
    text = "A single line, very long. " * 4_000_000
    if name == "line.txt":
        (tmp_path / name).write_text(text)
    elif name == "rows.parquet":
        parquet(tmp_path / name, text=[text, "another tale, not too short"])
    else:
        rows = (
            [{"text": text}, {"text": "another tale, not too short"}]
            if name == "line.jsonl"
            else [{"text": ""}] * 100_000 + [{"text": "one tale"}, {"text": "another"}]
        )
        (tmp_path / name).write_bytes(lines_of(rows))
    code, errors, peak = peak_memory([str(tmp_path / name), f"--out_dir={tmp_path / 'out'}"])
    print(name, f"{peak / 1e9:.2f} GB")
    assert code == 0 and peak < 1.5e9, (errors, peak)


@pytest.mark.skipif(not FULL, reason="FULL_TESTS: half a minute")
@pytest.mark.parametrize("kind", ["txt", "jsonl"])
def test_preparation_is_as_fast_as_tiktoken(kind, tmp_path, gpt2_vocabulary, shared_file):
    text = (
        shared_file("tinyshakespeare.txt").read_text()
        + shared_file("tinystories_10k.txt").read_text()
    ) * 10
    texts = [text[i : i + 1500] for i in range(0, len(text), 1500)]
    path = tmp_path / f"a.{kind}"
    path.write_bytes(
        "".join(texts).encode() if kind == "txt" else lines_of({"text": t} for t in texts)
    )
    ours, theirs = [], []
    for i in range(3):
        began = time.perf_counter()
        gpt2_vocabulary.encoding.encode_ordinary_batch(texts, num_threads=2)
        middle = time.perf_counter()
        prepare_data.main([str(path), "--tokenizer=gpt2", f"--out_dir={tmp_path / str(i)}"])
        theirs, ours = [*theirs, middle - began], [*ours, time.perf_counter() - middle]
    print(f"{len(text) / 1e6:.0f} MB: {sorted(ours)[1]:.2f} s, tiktoken {sorted(theirs)[1]:.2f} s")
    assert sorted(ours)[1] < sorted(theirs)[1] / 0.8
