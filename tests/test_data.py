"""Every source and tokenizer gives the same shards, even when preparation is cut off."""
import collections
import contextlib
import gzip
import io
import json
import lzma
import os
import random
import signal
import subprocess
import sys
import time

import hub
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from conftest import FULL, ROOT, contents, fails, posix, small_files

import prepare_data
import train_gpt2

WORDS = "the a of sun moon river 42 3.14 naïve 漢字 🙂🏽 don't\n\n \t end. \r\n It's ,,".split(" ")


def documents_of(count, seed=0, words=60):
    draw = random.Random(seed)
    return [" ".join(draw.choices(WORDS, k=draw.randint(1, words))) + "." for _ in range(count)]


def split_ids(folder, split):
    return [i for path in train_gpt2.shard_paths(folder)[split]
            for i in train_gpt2.read_shard(path).tolist()]


def documents_in(folder):
    """(the training split's texts, the validation split's); for characters one text each."""
    tokenizer, found = train_gpt2.open_data(folder).tokenizer, []
    for split in ("train", "val"):
        ids, eot = split_ids(folder, split), tokenizer.eot
        ends = [i for i, token in enumerate(ids) if eot is not None and token == eot]
        assert eot is None or ends[0] == 0 and ends[-1] == len(ids) - 1
        found.append([tokenizer.decode(ids[a + 1:b]) for a, b in zip(ends, ends[1:], strict=False)]
                     or [tokenizer.decode(ids)])
    return found


def prepare(dataset, out, *argv):
    """Prepares a data set; (training texts, validation texts, what was printed)."""
    with contextlib.redirect_stdout(io.StringIO()) as output:
        assert prepare_data.main([str(dataset), "--vocab_size=300", *argv, f"--out_dir={out}"]) == 0
    return *documents_in(out), output.getvalue()


def parquet_of(names=None, **columns):
    """A file of these columns, under other names where these are given."""
    file = io.BytesIO()
    table = pyarrow.table(columns).rename_columns(names or [*columns])
    pyarrow.parquet.write_table(table, file, row_group_size=50)
    return file.getvalue()


def lines_of(rows):
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def source(kind, folder, documents):
    """A file of these documents; if it has columns, they are in `story`."""
    lines = lines_of({"n": i, "story": text} for i, text in enumerate(documents))
    data = {"txt": "\n".join(filter(None, documents)).encode(), "jsonl": lines,
            "jsonl.gz": gzip.compress(lines), "ndjson.xz": lzma.compress(lines),
            "parquet": parquet_of(story=documents)}
    path = folder / f"tales.{kind}"
    path.write_bytes(data[kind])
    return path


def test_each_split_has_its_documents_in_order(tmp_path):
    documents = documents_of(600)
    dataset = source("jsonl", tmp_path, documents)
    cut = len(documents) - len(documents) // 10
    expected = dict(train=documents[:cut], val=documents[cut:])
    for kind in ("bpe", "char"):
        argv = [dataset, tmp_path / kind, f"--tokenizer={kind}", "--text_column=story",
                "--shard_tokens=1000"]
        *found, _ = prepare(*argv)
        assert found == [t if kind == "bpe" else ["\n\n".join(t)] for t in expected.values()]
        meta = train_gpt2.open_data(tmp_path / kind).meta
        for (split, texts), tokens in zip(expected.items(), found, strict=True):
            assert meta[split] == {
                "documents": len(texts), "tokens": len(split_ids(tmp_path / kind, split)),
                "bytes": sum(len(text.encode()) for text in tokens)}
        assert "complete already" in prepare(*argv)[2]


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


@pytest.mark.parametrize("piece", [1 << 20, 3000])
@pytest.mark.parametrize("kind", ["txt", "ndjson.xz", "jsonl.gz", "parquet"])
def test_stopped_after_every_shard(kind, piece, tmp_path, monkeypatch):
    """Whether many shards lie in a batch or many batches in a shard."""
    documents = documents_of(300, seed=6)
    dataset = source(kind, tmp_path, [*documents[:150], None, *documents[150:]])
    monkeypatch.setattr(prepare_data, "PIECE", piece)
    monkeypatch.setattr(prepare_data, "ROWS", 40)
    argv = [str(dataset), "--text_column=story", "--shard_tokens=2000", "--vocab_size=280"]
    assert prepare_data.main([*argv, f"--out_dir={tmp_path / 'whole'}"]) == 0
    if kind != "txt":
        train, val = documents_in(tmp_path / "whole")
        assert train + val == documents
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ".out.bin.1.tmp").touch()  # as a kill leaves it
    assert stop_after_every_shard([*argv, f"--out_dir={tmp_path / 'out'}"]) > 5
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_killed_at_random_instants(tmp_path):
    """SIGKILL, in a run of more than 10 shards. 20 times with FULL_TESTS."""
    text, out = tmp_path / "tales.txt", tmp_path / "killed"
    text.write_bytes("\n".join(documents_of(60_000 if FULL else 8_000)).encode())
    argv = [sys.executable, str(ROOT / "prepare_data.py"), str(text), "--vocab_size=400",
            f"--shard_tokens={200_000 if FULL else 20_000}", f"--out_dir={out}"]
    assert prepare_data.main([*argv[2:], f"--out_dir={tmp_path / 'whole'}"]) == 0
    whole = contents(tmp_path / "whole")
    assert len(whole) > 11
    draw, killed = random.Random(0), 0
    for _ in range(20 if FULL else 3):
        if (out / "meta.json").exists():  # it got through: begin again
            for path in out.iterdir():
                path.unlink()
        enough = len([*out.glob("*.bin")]) + draw.randint(1, 3)
        process = subprocess.Popen(argv, stdout=subprocess.DEVNULL)
        while process.poll() is None and len([*out.glob("*.bin")]) < enough:
            time.sleep(0.001)
        time.sleep(draw.uniform(0, 0.02))
        process.kill()
        killed += process.wait() == (-signal.SIGKILL if os.name == "posix" else 1)
    subprocess.run(argv, check=True, stdout=subprocess.DEVNULL)
    assert contents(out) == whole and killed


@posix
def test_a_full_disk_in_the_middle_of_a_shard(tmp_path, capsys):
    """With room again, the same command ends with the same bytes."""
    (tmp_path / "tales.txt").write_bytes("\n".join(documents_of(2000)).encode())
    argv = [str(tmp_path / "tales.txt"), "--shard_tokens=30000", "--vocab_size=300"]
    assert prepare_data.main([*argv, f"--out_dir={tmp_path / 'whole'}"]) == 0
    argv.append(f"--out_dir={tmp_path / 'out'}")
    with small_files(30_000):
        assert "cannot write" in fails(prepare_data.main, argv, capsys)
    assert [path.name for path in (tmp_path / "out").iterdir()] == [prepare_data.PROGRESS]
    assert prepare_data.main(argv) == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


# ---- The hub ----


CARD = {"README.md": b"---\nlicense: mit\n---\n"}


def test_a_data_set_of_the_hub(tmp_path):
    """Streamed through the unmodified library, while connections drop; its first documents are for
    validation. Stopped after every shard it gives the same bytes."""
    documents = documents_of(500, seed=2)
    files = CARD | {f"data/train-0000{i}-of-00002.parquet": parquet_of(story=rows) for i, rows in
                    enumerate(([*documents[:99], None, *documents[99:250]], documents[250:]))}
    argv = ["hf:me/tales", "--text_column=story", "--vocab_size=400", "--shard_tokens=2000"]
    with hub.serve(datasets={"me/tales": files}, breaks=2) as (address, server):
        done = hub.run(address, tmp_path, *argv)
        assert done.returncode == 0 and server.breaks == 0, done
        stopped = hub.run(address, tmp_path, *argv, "--out_dir=stopped", code="""if True:
            import os, sys, test_data
            test_data.prepare_data.PIECE, test_data.prepare_data.ROWS = 3000, 40
            print("\\nstops:", test_data.stop_after_every_shard(sys.argv[1:]), flush=True)
            os._exit(0)""")
    assert int(stopped.stdout.split("stops: ")[1]) > 3, stopped
    assert contents(tmp_path / "stopped") == contents(tmp_path / "data" / "tales")
    train, val = documents_in(tmp_path / "data" / "tales")
    assert val + train == documents and 10 < len(val) < len(train)


def test_named_data_sets_of_the_hub(tmp_path):
    """Its own validation split comes first; HellaSwag as JSON lines. Out of reach: one line."""
    name = "data/{}-00000-of-00001.parquet".format
    tales = CARD | {name("train"): parquet_of(text=documents_of(300)),
                    name("validation"): parquet_of(text=documents_of(20, 9))}
    questions = CARD | {name("validation"): parquet_of(
        ind=[1, 2], ctx=["A man", "A dog"], label=["0", "1"],
        endings=[["sits", "b", "c", "d"], ["x", "runs", "y", "z"]])}
    served = {"roneneldan/TinyStories": tales, "Rowan/hellaswag": questions}
    with hub.serve(datasets=served) as (address, _):
        for dataset in ("tinystories", "hellaswag"):
            assert hub.run(address, tmp_path, dataset).returncode == 0
    assert documents_in(tmp_path / "data" / "tinystories")[1] == ["\n\n".join(documents_of(20, 9))]
    meta = train_gpt2.open_data(tmp_path / "data" / "tinystories").meta
    assert meta["val"]["documents"] == 20 and meta["tokenizer"]["kind"] == "char"
    lines = (tmp_path / train_gpt2.HELLASWAG).read_text().splitlines()
    assert json.loads(lines[1])["endings"] == ["x", "runs", "y", "z"]
    hub.is_one_line(hub.run(None, tmp_path, "hf:me/others"), "network")
    assert not (tmp_path / "data" / "others").exists()


def test_shakespeare(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    text = "To be, or not to be. " * 99
    with hub.serve(models={"me/plays": {"all.txt": text.encode()}}) as (address, _):
        monkeypatch.setattr(prepare_data, "SHAKESPEARE_URL", f"{address}/none.txt")
        assert "404" in fails(prepare_data.main, ["shakespeare"], capsys)
        url = f"{address}/me/plays/resolve/main/all.txt"
        monkeypatch.setattr(prepare_data, "SHAKESPEARE_URL", url)
        train, val, _ = prepare("shakespeare", tmp_path / "out")
    assert "".join(train + val) == text
    assert "the network failed" in fails(prepare_data.main, ["shakespeare"], capsys)
    assert not (tmp_path / "data").exists()


# ---- Mistakes ----

MISTAKES = """\
. | a folder
a.csv | of one kind
z.zst | of one kind
empty.jsonl | 0 documents
tales.parquet | 'text' is missing
tales.parquet --text_column=n | is int64: choose one column of text
twice.parquet | is string and string: choose one
odd.parquet | row 2, has text that is not UTF-8
lists.jsonl --text_column=story | 0 documents with --text_column=story
all.txt --tokenizer=char | distinct characters
cut.parquet | cannot read
cut.txt.gz | cannot read
latin.txt | 0xf6 at byte 7
--out_dir=full | something else
hellaswag --out_dir=mine | leave out"""


def test_mistakes_of_preparation(tmp_path, capsys, monkeypatch):
    """One line each, and nothing is written."""
    monkeypatch.chdir(tmp_path)
    texts = documents_of(50)
    rows, odd = parquet_of(story=texts, n=range(50)), pyarrow.array([b"a", b"\xff"])
    every = "".join(map(chr, [*range(0xD800), *range(0xE000, 0x11000)]))
    (tmp_path / "full").mkdir()
    for name, data in {
            "tales.parquet": rows, "cut.parquet": rows[:-100], "a.csv": b"text\na tale\n",
            "lists.jsonl": lines_of({"story": [text]} for text in texts), "empty.jsonl": b"",
            "twice.parquet": parquet_of(["text", "text"], a=texts, b=texts),
            "odd.parquet": parquet_of(text=odd.view("string")), "all.txt": every.encode(),
            "cut.txt.gz": gzip.compress(b"a tale " * 99)[:-9], "z.zst": b"",
            "latin.txt": "Ein schöner Tag. ".encode("latin-1") * 100, "full/diary.txt": b"mine",
    }.items():
        (tmp_path / name).write_bytes(data)
    before = contents(tmp_path)
    for line in MISTAKES.splitlines():
        argv, message = line.split(" | ")
        assert message in fails(prepare_data.main, argv.split(), capsys), argv
        assert contents(tmp_path) == before, argv
    argv = ["short.txt", "--tokenizer=char", "--out_dir=out"]
    (tmp_path / "short.txt").write_text("ab")
    assert "too short" in fails(prepare_data.main, argv, capsys)
    (tmp_path / "short.txt").write_text("ab" * 100)  # lengthened, it may take the folder
    assert prepare_data.main(argv) == 0
    before = contents(tmp_path / "out")
    (tmp_path / "short.txt").write_text("other words")
    assert "from another text" in fails(prepare_data.main, argv, capsys)
    assert contents(tmp_path / "out") == before


def test_baselines_are_those_of_a_plain_count():
    """Written out with dictionaries, over shards that cut pairs apart."""
    draw = np.random.default_rng(0)
    train, val = (draw.zipf(1.5, size) % 30 for size in (3000, 500))
    shards = [np.array(part, np.uint16) for part in np.split(train, [700, 701, 2500])]
    singles = collections.Counter(train.tolist())
    pairs = collections.Counter(zip(train[:-1].tolist(), train[1:].tolist(), strict=True))
    unigram = {i: (singles[i] + 1) / (len(train) + 30) for i in range(30)}
    nats = []
    for a, b in zip(val[:-1].tolist(), val[1:].tolist(), strict=True):
        total = sum(count for (first, _), count in pairs.items() if first == a)
        kinds = max(1, sum(first == a for first, _ in pairs))
        nats.append(-np.log((pairs[a, b] + kinds * unigram[b]) / (total + kinds)))
    assert prepare_data.baselines(shards, [np.array(val, np.uint16)], 30) == pytest.approx({
        "uniform": np.log(30), "bigram": np.mean(nats),
        "unigram": -np.mean([np.log(unigram[b]) for b in val[1:].tolist()])}, rel=1e-9)
