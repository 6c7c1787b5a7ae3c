"""Text as people really have it is read, or refused in one line."""
import collections
import random
import shlex

import pytest
import regex
from conftest import fails
from test_data import documents_of, lines_of, prepare, text_lines

import prepare_data
import train_gpt2

TEXTS = documents_of(60, seed=4)


def test_only_the_text_column_matters(tmp_path):
    """Whatever else a line has. A line without it is counted; a date is text too."""
    dates = [f"2024-01-{day}T00:00:00" for day in range(10, 30)]
    odd = [{"a": {"b": 1}, "text": TEXTS[20]}, {"a": [], "text": TEXTS[21]}]
    without = lines_of([{"body": "x"}, {"text": None}, {"text": 3}, 7])
    files = [b"\xef\xbb\xbf" + lines_of({"text": text, "a": 1e400} for text in TEXTS[:20]),
             lines_of(odd), without + b" \n\r\n" + text_lines(dates)[:-1]]
    for i, data in enumerate(files):
        (tmp_path / f"{i}.jsonl").write_bytes(data)
    train, val, output = prepare(tmp_path / "[0-9].jsonl", tmp_path / "out")
    assert train + val == [*TEXTS[:22], *dates]
    assert '4 rows without "text" skipped\n' in output


@pytest.mark.parametrize(
    "bad", [b'{"text": "a"', b"{'text': 'a'}", b'{"text": "\xff"}', b"[" * 100_000])
def test_a_bad_line_is_named(bad, tmp_path, capsys):
    path, out = tmp_path / "a.jsonl", tmp_path / "out"
    path.write_bytes(text_lines(["x", "y"]) + bad + b"\n")
    line = fails(prepare_data.main, [str(path), f"--out_dir={out}"], capsys)
    assert "a.jsonl, line 3, is not JSON in UTF-8" in line
    assert "network" not in line
    assert not out.exists()


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_marks_of_an_end_cut_a_text(end, tmp_path):
    """Lines of <|endoftext|>, as TinyStories has them. Inside of a line it is a part of a text."""
    texts = [f"A cat.{end}{end}It sat. " * 9, f"A dog{end}ran. <|endoftext|> " * 9, "x" * 150_000,
             "The end. "]
    mark = f"{end}<|endoftext|>{end}"
    marked = mark.join(texts) + mark + "<|endoftext|>"
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbf<|endoftext|>\n" + marked.encode())
    train, val, output = prepare(tmp_path / "a.txt", tmp_path / "out")
    assert train + val == texts
    assert "lines of <|endoftext|> cut the text into 4 documents\n" in output
    assert "note: <|endoftext|> inside of a document stays text (9 times)\n" in output


def test_several_files(tmp_path, monkeypatch, capsys):
    """As a shell expands *.txt; ~ is the home folder. Their command works when pasted."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    for name, text in zip(("a.txt", "b [1].txt", "b.txt"), TEXTS, strict=False):
        (tmp_path / name).write_bytes(text.encode())
    prepare_data.main(["~/a.txt", "b [1].txt", "b.txt", "--vocab_size=300", "--out_dir=my data"])
    command = capsys.readouterr().out.split("now: ")[1]
    assert "--data_dir=my data" in shlex.split(command)
    train, val, _ = prepare("~/[ab]*.txt", "my data")
    assert train + val == TEXTS[:3]
    assert prepare_data.name_of(["notes/**/*.txt"]) == "notes"
    assert prepare_data.name_of(["*.txt"]) == "texts"


ODD = {"a byte-order mark": "\ufeffOnce. " * 50, "CRLF": "a line\r\nand another\r\n\r\n" * 50,
       "CR": "a line\rand another\r\r" * 50,
       "NUL bytes": "a\0b \0\0 c\n" * 50, "an end of text": "a <|endoftext|> b\n" * 50,
       "white space only": "".join(random.Random(0).choices(" \t\n\u3000", k=3000)),
       "spaces": "  two  and \t tabs\t\n    four \n" * 50, "rare ones": "漢字" * 9999 + " a b",
       "control characters": "".join(map(chr, range(1, 128))) * 20,
       "combining marks": "e\u0301\u200d\u2028\u0085\u3000x🙂🏽👨‍👩‍👧" * 200,
       "notation": "<unk> <s> <0x41> ▅<|endoftext|>" * 9 + "no " * 999,
       "other alphabets": "plain words " * 90 + "漢字🙂é\u0378" * 9}


@pytest.mark.parametrize("name", ODD)
@pytest.mark.parametrize("kind", ["bpe", "char", "gpt2", "sentencepiece"])
def test_tokenizers_give_back_every_text(kind, name, tmp_path, request):
    """From the shards, and by the tokenizer that meta.json holds."""
    if kind == "gpt2":
        request.getfixturevalue("gpt2_vocabulary")
    if kind == "sentencepiece":
        pytest.importorskip("sentencepiece")
    text, path = ODD[name], tmp_path / "a.txt"
    path.write_bytes(text.encode())
    argv = [f"--tokenizer={kind}", "--vocab_size=1024", "--shard_tokens=2000"]
    train, val, _ = prepare(path, tmp_path / "data", *argv)
    assert "".join(train + val) == text
    tokenizer = train_gpt2.open_data(tmp_path / "data").tokenizer
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.eot not in ids
    assert tokenizer.token_bytes()[ids].sum() == len(text.encode())


def test_runs_too_long_for_the_regular_expression(gpt2_vocabulary):
    """Nothing is lost, and before the run the ids are those of the whole text."""
    for run in [" ", "\t", "\n", "-", "ab", "1", "漢"]:
        text = "Once upon a time" + run * (1_200_000 // len(run)) + "the end"
        ids = prepare_data.encode_array(gpt2_vocabulary, text).tolist()
        assert gpt2_vocabulary.decode(ids) == text
        assert ids[:4] == gpt2_vocabulary.encode("Once upon a time")


def test_pieces_of_a_long_text_have_the_tokens_of_the_whole(tmp_path, monkeypatch):
    """Cut when it is read, and again when it is encoded."""
    text = "\u3000 \n\n".join(documents_of(40, seed=3)) + "  \u2003 x" + "\x1c \x1fz y" * 300
    tokenizer = train_gpt2.Tokenizer(prepare_data.bpe_spec(prepare_data.train_bpe([text], 400)))
    whole, path = tokenizer.encode(text), tmp_path / "a.txt"
    path.write_bytes(text.encode())
    for size in (300, 1000, 10**6):
        monkeypatch.setattr(prepare_data, "LONGEST", size)
        assert prepare_data.encode_array(tokenizer, text).tolist() == whole
        ids = []
        for piece, _ in prepare_data.read_text(path, ""):
            ids += tokenizer.encode(piece)
        assert ids == whole


# ---- The BPE trainer ----


def words_of(texts):
    found = []
    for text in texts:
        found += regex.findall(train_gpt2.SPLIT_PATTERN, text)
    return found


def join_pair(word, pair):
    """Joins two tokens wherever they stand side by side in a word, from left to right."""
    i = 0
    while i < len(word) - 1:
        if (word[i], word[i + 1]) == pair:
            word[i:i + 2] = [b"".join(pair)]
        i += 1


def naive_bpe(texts, vocab_size):
    """Counts every pair anew before each merge: slow, and plainly right."""
    words = [[bytes([byte]) for byte in word.encode()] for word in words_of(texts)]
    merges = []
    while len(merges) < vocab_size - 257:
        counts = collections.Counter()
        for word in words:
            counts.update(zip(word, word[1:], strict=False))
        if not counts:
            break
        merges.append(max(counts, key=lambda pair: (counts[pair], pair)))
        for word in words:
            join_pair(word, merges[-1])
    return merges


@pytest.mark.parametrize("text", [
    "low low low lower lowest newer newest wider", "aaaa aaa aa a baaab aaaaaaaa", "", "x",
    "the cat sat on the mat, the cat! 123 123 1234",
    "漢字 漢字 漢 🙂🙂 🙂🏽 é é", " ".join(TEXTS[:20]), "a\u3000 b x \u2003y 's n't \x1c a\x85 c",
    "".join(random.Random(0).choices("ACGT", k=2000)), "ab" * 99 + "a" * 50 + "b" * 51])
def test_merges_are_those_of_a_naive_trainer(text):
    texts = [text, text[::-1]]
    for size in (257, 260, 300):
        assert prepare_data.train_bpe(texts, size) == naive_bpe(texts, size)
    assert prepare_data.count_words(texts) == collections.Counter(words_of(texts))
