"""Every source and tokenizer gives the same shards, even when preparation is cut off."""
import collections
import contextlib
import gzip
import io
import itertools
import json
import lzma
import random
import shutil
import subprocess
import sys
import time

import hub
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from conftest import FULL, ROOT, contents, fails

import prepare_data
import train_gpt2

WORDS = "the a of sun moon river 42 3.14 naïve 漢字 🙂🏽 don't\n\n \t end. \r\n It's ,,".split(" ")


# ---- Texts, and files that hold them ----


def documents_of(count, seed=0, words=60):
    draw = random.Random(seed)
    documents = []
    for _ in range(count):
        chosen = draw.choices(WORDS, k=draw.randint(1, words))
        documents.append(" ".join(chosen) + ".")
    return documents


def parquet_of(names=None, **columns):
    """A file of these columns, under other names where these are given."""
    file = io.BytesIO()
    table = pyarrow.table(columns).rename_columns(names or [*columns])
    pyarrow.parquet.write_table(table, file, row_group_size=50)
    return file.getvalue()


def lines_of(rows):
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def text_lines(texts):
    return lines_of({"text": text} for text in texts)


def source(kind, folder, documents):
    """A file of these documents; if it has columns, they are in `story`."""
    lines = lines_of({"n": i, "story": text} for i, text in enumerate(documents))
    if kind == "txt":
        data = "\n".join(filter(None, documents)).encode()
    elif kind == "parquet":
        data = parquet_of(story=documents)
    else:
        pack = {"jsonl": bytes, "jsonl.gz": gzip.compress, "ndjson.xz": lzma.compress}[kind]
        data = pack(lines)
    path = folder / f"tales.{kind}"
    path.write_bytes(data)
    return path


# ---- What was prepared ----


def split_ids(folder, split):
    shards = map(train_gpt2.read_shard, train_gpt2.shard_paths(folder)[split])
    return np.concatenate([*shards]).tolist()


def texts_in(folder, split):
    """A split's documents; one text for characters."""
    tokenizer, ids = train_gpt2.open_data(folder).tokenizer, split_ids(folder, split)
    if tokenizer.eot is None:
        return [tokenizer.decode(ids)]
    first, *documents, last = bytes_between(tokenizer, ids)
    assert first == last == b""
    return [document.decode(errors="replace") for document in documents]


def cut_of(documents):
    """How many of these documents come before the last tenth of their text."""
    sizes = [len(document) for document in documents]
    aims = [abs(sum(sizes[:i]) - 0.9 * sum(sizes)) for i in range(1, len(sizes))]
    return 1 + aims.index(min(aims))


def bytes_between(tokenizer, ids):
    """The bytes before, between and after the marks of a split's documents."""
    found = [b""]
    for token in ids:
        if token == tokenizer.eot:
            found.append(b"")
        else:
            found[-1] += tokenizer.tokens[token]
    return found


def prepare(dataset, out, *argv):
    """Prepares a data set; (training texts, validation texts, what was printed)."""
    with contextlib.redirect_stdout(io.StringIO()) as output:
        assert prepare_data.main([str(dataset), "--vocab_size=300", *argv, f"--out_dir={out}"]) == 0
    return texts_in(out, "train"), texts_in(out, "val"), output.getvalue()


@pytest.mark.parametrize("kind", ["bpe", "char"])
def test_each_split_has_its_documents_in_order(kind, tmp_path):
    """Validation is the last tenth of the text, not of the documents, of which the last may be
    long."""
    documents = sorted(documents_of(600), key=len)
    cut = cut_of(documents)
    assert cut > 550
    expected = {"train": documents[:cut], "val": documents[cut:]}
    argv = [source("jsonl", tmp_path, documents), tmp_path / "out", f"--tokenizer={kind}",
            "--text_column=story", "--shard_tokens=1000"]
    prepare(*argv)
    meta = train_gpt2.open_data(tmp_path / "out").meta
    for split, texts in expected.items():
        found = texts_in(tmp_path / "out", split)
        assert "\n\n".join(found) == "\n\n".join(texts)
        assert meta[split]["documents"] == len(texts)
        assert meta[split]["tokens"] == len(split_ids(tmp_path / "out", split))
        assert meta[split]["bytes"] == sum(len(text.encode()) for text in found)
    assert "complete already" in prepare(*argv)[2]


# ---- Cut off ----


class Cut(BaseException):
    """Stands for a kill: nothing catches it."""


def stop_after_every_shard(argv):
    """Restart main until it ends, cut off after every shard and meta.json; return how often."""
    write_text, write_shard, written = prepare_data.write_text, prepare_data.write_shard, []

    def cut(path, text):
        write_text(path, text)
        if written or path.name == "meta.json":
            written.clear()
            raise Cut
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare_data, "write_shard", lambda *a: written.append(write_shard(*a)))
        patch.setattr(prepare_data, "write_text", cut)
        for count in range(200):
            with contextlib.suppress(Cut):
                prepare_data.main(argv)
                return count
    raise AssertionError("it does not end")


@pytest.mark.parametrize("batch, longest", [(100_000, 100_000), (2, 500)])
@pytest.mark.parametrize("kind", ["txt", "ndjson.xz", "jsonl.gz", "parquet"])
def test_stopped_after_every_shard(kind, batch, longest, tmp_path, monkeypatch):
    """Whether many shards lie in a piece of a text or many pieces in a shard."""
    documents = documents_of(300, seed=6)
    dataset = source(kind, tmp_path, [*documents[:150], None, *documents[150:]])
    monkeypatch.setattr(prepare_data, "BATCH", batch)
    monkeypatch.setattr(prepare_data, "LONGEST", longest)
    monkeypatch.setattr(prepare_data, "ROWS", 40)
    argv = [str(dataset), "--text_column=story", "--shard_tokens=2000", "--vocab_size=280"]
    whole, out = tmp_path / "whole", tmp_path / "out"
    assert prepare_data.main([*argv, f"--out_dir={whole}"]) == 0
    if kind != "txt":
        assert texts_in(whole, "train") + texts_in(whole, "val") == documents
    out.mkdir()
    (out / ".out.bin.1.tmp").touch()  # as a kill leaves it
    assert stop_after_every_shard([*argv, f"--out_dir={out}"]) > 5
    assert contents(out) == contents(whole)


def shards_in(folder):
    return len([*folder.glob("*.bin")])


def test_killed_at_random_instants(tmp_path):
    """SIGKILL, in a run of more than 10 shards. 20 times with FULL_TESTS."""
    kills, size = (20, 60_000) if FULL else (3, 8_000)
    text, whole, out = tmp_path / "tales.txt", tmp_path / "whole", tmp_path / "killed"
    text.write_bytes("\n".join(documents_of(size)).encode())
    argv = [str(text), "--vocab_size=400", f"--shard_tokens={3 * size}"]
    assert prepare_data.main([*argv, f"--out_dir={whole}"]) == 0
    assert shards_in(whole) > 10
    command = [sys.executable, ROOT / "prepare_data.py", *argv, f"--out_dir={out}"]
    draw, statuses = random.Random(0), []
    for _ in range(kills):
        if (out / "meta.json").exists():  # it got through: begin again
            shutil.rmtree(out)
        enough = shards_in(out) + draw.randint(1, 3)
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        while process.poll() is None and shards_in(out) < enough:
            time.sleep(0.001)
        time.sleep(draw.uniform(0, 0.02))
        process.kill()
        statuses.append(process.wait())
    assert any(statuses)  # one was still alive
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    assert contents(out) == contents(whole)


# ---- The hub ----


CARD = {"README.md": b"---\nlicense: mit\n---\n"}


def repository(**splits):
    """The files of a data set on the hub, a .parquet for each split."""
    return CARD | {f"data/{split}-00000-of-00001.parquet": parquet_of(**columns)
                   for split, columns in splits.items()}


def test_a_data_set_of_the_hub(tmp_path):
    """Streamed through the unmodified library, while connections drop. Without a split for training
    the first one is cut in two, and its first documents are for validation. Stopped after every
    shard it gives the same bytes."""
    documents = documents_of(500, seed=2)
    files = CARD | {
        "data/validation-00000-of-00002.parquet": parquet_of(
            story=[*documents[:99], None, *documents[99:250]]),
        "data/validation-00001-of-00002.parquet": parquet_of(story=documents[250:]),
        "data/test-00000-of-00001.parquet": parquet_of(story=documents_of(9))}
    argv = ["hf:me/tales", "--text_column=story", "--vocab_size=400", "--shard_tokens=2000"]
    with hub.serve(datasets={"me/tales": files}, breaks=2) as (address, server):
        done = hub.run(address, tmp_path, *argv)
        assert done.returncode == 0, done
        assert server.breaks == 0
        stopped = hub.run(address, tmp_path, *argv, "--out_dir=stopped", code="""if True:
            import os, sys, test_data
            test_data.prepare_data.BATCH, test_data.prepare_data.ROWS = 2, 40
            print("\\nstops:", test_data.stop_after_every_shard(sys.argv[1:]), flush=True)
            os._exit(0)""")
    assert int(stopped.stdout.split("stops: ")[1]) > 3, stopped
    out = tmp_path / "data" / "tales"
    assert contents(tmp_path / "stopped") == contents(out)
    assert texts_in(out, "val") + texts_in(out, "train") == documents
    assert 10 < len(texts_in(out, "val")) < 250
    assert '1 rows without "story" skipped' in done.stdout
    assert "train and val are two parts of the split validation\n" in done.stdout


def test_named_data_sets_of_the_hub(tmp_path):
    """Its own validation split comes first; HellaSwag as JSON lines."""
    held_out = documents_of(20, 9)
    tales = repository(train={"text": documents_of(300)}, validation={"text": held_out})
    endings = [["sits", "b", "c", "d"], ["x", "runs", "y", "z"]]
    questions = repository(validation={
        "ind": [1, 2], "ctx": ["A man", "A dog"], "label": ["0", "1"], "endings": endings})
    served = {"roneneldan/TinyStories": tales, "Rowan/hellaswag": questions}
    with hub.serve(datasets=served) as (address, _):
        for dataset in ("tinystories", "hellaswag"):
            assert hub.run(address, tmp_path, dataset).returncode == 0
    out = tmp_path / "data" / "tinystories"
    assert texts_in(out, "val") == ["\n\n".join(held_out)]
    meta = train_gpt2.open_data(out).meta
    assert meta["val"]["documents"] == 20
    assert meta["tokenizer"]["kind"] == "char"
    lines = (tmp_path / train_gpt2.HELLASWAG).read_text().splitlines()
    assert json.loads(lines[1]) == {"ctx": "A dog", "endings": endings[1], "label": "1"}


def test_without_a_network(tmp_path):
    """One whole line, with a way that needs none."""
    for dataset, way in {"hf:me/others": "name its file", "shakespeare": "name its file",
                         "gpt2": "name a folder that holds it"}.items():
        done = hub.run(None, tmp_path, dataset, code="""if True:
            import requests, sys, prepare_data
            def unreachable(*_, **__):
                raise requests.ConnectionError("Max retries exceeded. " * 99)
            requests.get = unreachable
            prepare_data.main(sys.argv[1:])""")
        hub.is_one_line(done, "(the network failed; ")
        assert done.stderr.endswith(f"{way}\n")


def test_shakespeare(tmp_path, monkeypatch):
    text = "To be, or not to be. " * 99
    with hub.serve(models={"me/plays": {"all.txt": text.encode()}}) as (address, _):
        url = f"{address}/me/plays/resolve/main/all.txt"
        monkeypatch.setattr(prepare_data, "SHAKESPEARE_URL", url)
        train, val, _ = prepare("shakespeare", tmp_path / "out")
    assert "".join(train + val) == text


# ---- Mistakes ----

MISTAKES = """\
. | a folder: its files are ./*.txt
~nobody/a.txt | no such file
a.csv | of one kind
z.zst | of one kind
model.safetensors | of weights, name their folder
empty.jsonl | 0 documents
short.txt | too short
tales.parquet | 'text' is missing
tales.parquet --text_column=n | is int64: choose one column of text
twice.parquet | is string and string: choose one
odd.parquet | row 2 is not UTF-8
lists.jsonl --text_column=story | 0 documents with --text_column=story
all.txt --tokenizer=char | distinct characters
cut.parquet | cannot read
cut.txt.gz | cannot read
latin.txt | 0xf6 at byte 7
--out_dir=full | something else
hellaswag --out_dir=mine | leave out
other.jsonl | its first line has n (int), story (str)
array.jsonl | its first line is no object: list
distilgpt2 | model:OWNER/NAME (a GPT-2 there)"""


@pytest.fixture
def faulty(tmp_path, monkeypatch):
    """The current folder, with the files that the table names."""
    monkeypatch.chdir(tmp_path)
    texts = documents_of(50)
    rows, odd = parquet_of(story=texts, n=range(50)), pyarrow.array([b"a", b"\xff"])
    every = "".join(map(chr, [*range(0xD800), *range(0xE000, 0x11000)]))
    files = {
        "tales.parquet": rows, "cut.parquet": rows[:-100], "z.zst": b"", "empty.jsonl": b"",
        "short.txt": b"ab", "model.safetensors": b"{}", "array.jsonl": b"[1, 2]",
        "twice.parquet": parquet_of(["text", "text"], a=texts, b=texts),
        "odd.parquet": parquet_of(text=odd.view("string")), "all.txt": every.encode(),
        "other.jsonl": lines_of([{"n": 1, "story": "a tale"}]),
        "lists.jsonl": lines_of({"story": [text]} for text in texts), "a.csv": b"text\na tale\n",
        "cut.txt.gz": gzip.compress(b"a tale " * 99)[:-9],
        "latin.txt": "Ein schöner Tag. ".encode("latin-1") * 100, "full/diary.txt": b"mine"}
    (tmp_path / "full").mkdir()
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    return tmp_path


@pytest.mark.parametrize("row", MISTAKES.splitlines())
def test_mistakes_of_preparation(row, faulty, capsys):
    """One line each, and nothing is written."""
    argv, message = row.split(" | ")
    before = contents(faulty)
    assert message in fails(prepare_data.main, argv.split(), capsys)
    assert contents(faulty) == before


def test_a_text_that_changes(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text, out = tmp_path / "a.txt", tmp_path / "out"
    argv = ["a.txt", "--tokenizer=char", "--out_dir=out"]
    text.write_text("some words " * 9)
    prepare_data.main(argv)
    before = contents(out)
    text.write_text("other words " * 9)
    assert "from another text" in fails(prepare_data.main, argv, capsys)
    assert contents(out) == before


def test_ids_that_do_not_fit_into_a_shard(tmp_path):
    for ids in ([1, 65_536], np.array([-1, 2])):
        with pytest.raises(train_gpt2.UserError, match="65,536 or more"):
            prepare_data.write_shard(tmp_path / "a.bin", ids)
    assert not [*tmp_path.iterdir()]


def test_in_a_notebook(tmp_path):
    """%run, which runs a script in the kernel's process, does not end it."""
    (tmp_path / "a.txt").write_text("a tale " * 99)
    done = hub.run(None, tmp_path, "a.txt", code=f"""if True:
        import runpy
        try:
            runpy.run_path({str(ROOT / "prepare_data.py")!r}, run_name="__main__")
        except SystemExit as stop:
            print("the kernel is alive:", stop.code)""")
    assert "the kernel is alive: 0\n" in done.stdout, done


def test_baselines_are_those_of_a_plain_count(tmp_path):
    """Written out with dictionaries, over shards that cut pairs apart."""
    draw = np.random.default_rng(0)
    train, val = (draw.zipf(1.5, size) % 30 for size in (3000, 500))
    paths = [tmp_path / f"{number}.bin" for number in range(5)]
    for path, part in zip(paths, [*np.split(train, [700, 701, 2500]), val], strict=True):
        prepare_data.write_shard(path, part)
    counts, first_counts = collections.Counter(train), collections.Counter(train[:-1])
    pairs = collections.Counter(itertools.pairwise(train))
    followers = collections.Counter(first for first, _ in pairs)  # of how many kinds
    unigram, bigram = [], []
    for first, second in itertools.pairwise(val):
        share = (counts[second] + 1) / (len(train) + 30)
        unigram.append(-np.log(share))
        kinds = max(1, followers[first])
        share = (pairs[first, second] + kinds * share) / (first_counts[first] + kinds)
        bigram.append(-np.log(share))
    expected = {"uniform": np.log(30), "unigram": np.mean(unigram), "bigram": np.mean(bigram)}
    found = prepare_data.baselines(paths[:4], paths[4:], np.bincount(train, minlength=30))
    assert found == pytest.approx(expected, rel=1e-9)
