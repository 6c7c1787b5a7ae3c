"""Every source of text, through every tokenizer, to the same shards, however often the work is cut off."""
import collections
import hashlib
import io
import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import hub
import numpy as np
import pytest
import regex
from conftest import FULL, ROOT, fails, posix

import prepare_data
import train_gpt2

WORDS = "the a of sun moon river 42 3.14 naïve 漢字 🙂🏽 don't\n\n \t end. \r\n It's so ,, --".split(" ")


def documents_of(count, seed=0, words=60):
    draw = random.Random(seed)
    return [" ".join(draw.choices(WORDS, k=draw.randint(1, words))) + "." for _ in range(count)]


def contents(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def split_ids(folder, split):
    return [i for path in train_gpt2.shard_paths(folder)[split] for i in train_gpt2.read_shard(path).tolist()]


def write_rows(folder, documents, kind):
    """The documents as a file of this kind, in a column that is called story."""
    path = folder / f"tales.{kind}"
    if kind == "jsonl":
        path.write_text("".join(json.dumps({"n": i, "story": text}) + "\n" for i, text in enumerate(documents)))
    else:
        import pyarrow
        import pyarrow.parquet
        pyarrow.parquet.write_table(pyarrow.table({"n": range(len(documents)), "story": documents}), path,
                                    row_group_size=50)
    return path


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "txt"])
def test_every_kind_of_file_gives_the_documents_in_order(kind, tmp_path, capsys):
    documents = documents_of(600 if kind != "txt" else 30)
    if kind == "txt":
        for i, text in enumerate(documents):
            (tmp_path / f"{i:03d}.txt").write_bytes(text.encode())
        dataset = str(tmp_path / "*.txt")
    else:
        dataset = str(write_rows(tmp_path, [*documents[:100], "", *documents[100:]], kind))  # an empty one is left out
    for tokenizer in ("bpe", "char"):
        out = tmp_path / tokenizer
        assert prepare_data.main([dataset, f"--out_dir={out}", f"--tokenizer={tokenizer}", "--text_column=story",
                                  "--shard_tokens=1000", "--vocab_size=400"]) == 0
        data = train_gpt2.open_data(out)
        cut = len(documents) - round(len(documents) * 0.1)
        for split, expected in (("train", documents[:cut]), ("val", documents[cut:])):
            ids = split_ids(out, split)
            assert data.meta[split]["documents"] == len(expected) and data.meta[split]["tokens"] == len(ids)
            if tokenizer == "bpe":
                ends = [i for i, token in enumerate(ids) if token == data.eot]
                found = [data.tokenizer.decode(ids[a + 1:b]) for a, b in zip(ends, ends[1:], strict=False)]
                assert found == expected and ids[0] == ids[-1] == data.eot
            else:
                assert data.tokenizer.decode(ids) == "\n\n".join(expected)
                assert data.meta[split]["bytes"] == len("\n\n".join(expected).encode())
        capsys.readouterr()
        assert prepare_data.main([dataset, f"--out_dir={out}", f"--tokenizer={tokenizer}", "--text_column=story",
                                  "--shard_tokens=1000", "--vocab_size=400"]) == 0
        assert "complete already" in capsys.readouterr().out


def test_pieces_of_a_long_text_have_the_tokens_of_the_whole(tmp_path, monkeypatch):
    """Read a few bytes at a time, from anywhere: the pieces add up to the file, and their tokens to the whole's."""
    text = "\u3000 \n\n".join(documents_of(40, seed=3)) + "  \u2003 x" + "y" * 300
    (tmp_path / "text.txt").write_bytes(text.encode())
    tokenizer = train_gpt2.Tokenizer(prepare_data.bpe_spec(prepare_data.train_bpe([text], 400)))
    whole = tokenizer.encode(text)
    for size in (1, 7, 64, 1000):
        monkeypatch.setattr(prepare_data, "PIECE", size)
        pieces = list(prepare_data.read_pieces(tmp_path / "text.txt"))
        assert "".join(piece for _, piece in pieces) == text
        assert [i for _, piece in pieces for i in tokenizer.encode(piece)] == whole
        at = pieces[len(pieces) // 2][0]
        assert "".join(piece for _, piece in prepare_data.read_pieces(tmp_path / "text.txt", at)) == (
            text.encode()[at:].decode())


def test_the_fast_count_of_words_is_the_slow_one():
    texts = documents_of(200, seed=1) + ["", " ", "  a  b ", "a\u3000 b", "x \u2003y", "'s n't", "\x00 a\x1c b\x85 c"]
    slow = collections.Counter(word for text in texts for word in regex.findall(train_gpt2.SPLIT_PATTERN, text))
    assert prepare_data.count_words(texts) == slow


def test_every_text_comes_back_through_a_trained_bpe():
    """Also what the trainer never saw, and a million bytes without a space."""
    tokenizer = train_gpt2.Tokenizer(prepare_data.bpe_spec(prepare_data.train_bpe(documents_of(300), 500)))
    for text in ["🙂🏽👨‍👩‍👧", "漢字かな混じり文", "e\u0301a\u0308\u200d", "\x00\x00a\x00", "\n", "\n\n \n",
                 "\r\n", "ab" * 500_000, "<|endoftext|>", "", " ", "\ufeffx", "𝔘𝔫𝔦"]:
        ids = tokenizer.encode_array(text)
        assert tokenizer.decode_bytes(ids.tolist()) == text.encode() and tokenizer.eot not in ids
        assert ids.tolist() == tokenizer.encode(text)
    assert tokenizer.decode(tokenizer.encode_array("a\ud800b").tolist()) == "a\ufffdb"  # no character: half of a pair


class Cut(BaseException):
    """Stands for a kill: nothing catches it."""


@pytest.mark.parametrize("kind", ["txt", "jsonl", "both"])
def test_cut_off_at_every_write(kind, tmp_path, monkeypatch):
    """Cut off just before and just after each file is moved into its place, then started again: the same bytes."""
    documents = documents_of(150)
    if kind == "txt":
        dataset = tmp_path / "tales.txt"
        dataset.write_bytes("\n".join(documents).encode())
    else:
        dataset = write_rows(tmp_path, documents, "jsonl")
    if kind == "both":  # as of a corpus on the hub: nobody knows how long it is
        open_source = prepare_data.open_source

        def unknown_length(s, paths):
            rows = open_source(s, paths)["train"]
            return {"both": prepare_data.Rows(rows.tables, rows.column)}
        monkeypatch.setattr(prepare_data, "open_source", unknown_length)
    argv = [str(dataset), "--text_column=story", "--shard_tokens=1800", "--vocab_size=280"]
    assert prepare_data.main([*argv, f"--out_dir={tmp_path / 'whole'}"]) == 0
    whole = contents(tmp_path / "whole")
    assert len(whole) >= 6
    replace, count = os.replace, 0
    for moment in range(1000):
        writes = [0]

        def cut_replace(old, new, moment=moment, writes=writes):
            writes[0] += 1
            if 2 * writes[0] - 2 == moment:
                raise Cut
            replace(old, new)
            if 2 * writes[0] - 1 == moment:
                raise Cut
        out = tmp_path / f"cut{moment}"
        monkeypatch.setattr(train_gpt2.os, "replace", cut_replace)
        try:
            prepare_data.main([*argv, f"--out_dir={out}"])
            break
        except Cut:
            count += 1
        monkeypatch.setattr(train_gpt2.os, "replace", replace)
        assert prepare_data.main([*argv, f"--out_dir={out}"]) == 0
        assert {name: value for name, value in contents(out).items() if not name.endswith(".tmp")} == whole, moment
    assert count >= 2 * len(whole)


def test_killed_at_random_instants(tmp_path):
    """SIGKILL, in a run of more than 10 shards. 20 times with FULL_TESTS."""
    text = tmp_path / "tales.txt"
    text.write_bytes("\n".join(documents_of(60_000 if FULL else 8_000)).encode())
    argv = [sys.executable, str(ROOT / "prepare_data.py"), str(text), "--vocab_size=400",
            "--shard_tokens=" + ("200000" if FULL else "20000")]
    began = time.monotonic()
    assert prepare_data.main([*argv[2:], f"--out_dir={tmp_path / 'whole'}"]) == 0
    whole, took = contents(tmp_path / "whole"), time.monotonic() - began
    assert len(whole) > 11
    draw, killed = random.Random(0), 0
    for _ in range(20 if FULL else 3):
        if (tmp_path / "killed" / "meta.json").exists():  # it got through: begin again
            for path in (tmp_path / "killed").iterdir():
                path.unlink()
        process = subprocess.Popen([*argv, f"--out_dir={tmp_path / 'killed'}"], stdout=subprocess.DEVNULL)
        while process.poll() is None and not (tmp_path / "killed" / "preparing.json").exists():
            time.sleep(0.01)
        time.sleep(draw.uniform(0, 0.5 * took))
        process.kill()
        killed += process.wait() == (-signal.SIGKILL if os.name == "posix" else 1)
    subprocess.run([*argv, f"--out_dir={tmp_path / 'killed'}"], check=True, stdout=subprocess.DEVNULL)
    assert {name: value for name, value in contents(tmp_path / "killed").items() if ".tmp" not in name} == whole
    assert killed >= 1


# ---- The hub ---------------------------------------------------------------------------------------------------------


def parquet_of(**columns):
    import pyarrow
    import pyarrow.parquet
    file = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table(columns), file, row_group_size=100)
    return file.getvalue()


def run(environment, home, *argv):
    return subprocess.run([sys.executable, str(ROOT / "prepare_data.py"), *argv], capture_output=True, text=True,
                          env=environment | {"HF_HOME": str(home)}, cwd=home)


CARD = {"README.md": b"---\nlicense: mit\n---\n"}


def test_a_data_set_of_the_hub(tmp_path):
    """Streamed through the unmodified library, while connections drop; its first shard is for validation."""
    documents = documents_of(500, seed=2)
    files = CARD | {f"data/train-0000{i}-of-00002.parquet": parquet_of(story=documents[250 * i:250 * i + 250])
                    for i in range(2)}
    with hub.serve(datasets={"me/tales": files}, breaks=2) as (environment, server):
        argv = ["hf:me/tales", "--text_column=story", "--vocab_size=400"]
        done = run(environment, tmp_path, *argv, "--shard_tokens=4000")
        assert done.returncode == 0, done.stderr
        assert server.breaks == 0
        again = run(environment, tmp_path, *argv, "--shard_tokens=5000")
        assert again.returncode == 2 and "shard_tokens=4000, not 5000" in again.stderr
        wrong = run(environment, tmp_path, "hf:me/tales", "--out_dir=other")
        assert wrong.returncode == 2 and wrong.stderr.count("\n") == 1 and "no column 'text'" in wrong.stderr
    folder = tmp_path / "data" / "tales"
    tokenizer = train_gpt2.open_data(folder).tokenizer
    texts = {split: tokenizer.decode(split_ids(folder, split)).split(train_gpt2.END_OF_TEXT)[1:-1]
             for split in ("val", "train")}
    assert texts["val"] + texts["train"] == documents
    assert 4000 < len(split_ids(folder, "val")) < 4300 and len(train_gpt2.shard_paths(folder)["train"]) > 2


def test_named_data_sets_of_the_hub(tmp_path):
    """Its own validation split comes first; HellaSwag as JSON lines; shards that others have published."""
    tales = CARD | {"data/train-00000-of-00001.parquet": parquet_of(text=documents_of(300)),
                    "data/validation-00000-of-00001.parquet": parquet_of(text=documents_of(20, seed=9))}
    questions = CARD | {"data/validation-00000-of-00001.parquet": parquet_of(
        ind=[1, 2], ctx=["A man", "A dog"], label=["0", "1"],
        endings=[["sits", "b", "c", "d"], ["x", "runs", "y", "z"]])}
    with hub.serve(datasets={"roneneldan/TinyStories": tales, "Rowan/hellaswag": questions}) as (environment, _):
        assert run(environment, tmp_path, "tinystories").returncode == 0
        assert run(environment, tmp_path, "hellaswag").returncode == 0
    data = train_gpt2.open_data(tmp_path / "data" / "tinystories")
    assert data.meta["val"]["documents"] == 20 and data.meta["tokenizer"]["kind"] == "char"
    assert data.tokenizer.decode(split_ids(tmp_path / "data" / "tinystories", "val")) == "\n\n".join(
        documents_of(20, seed=9))
    lines = (tmp_path / "data" / "hellaswag" / "hellaswag_val.jsonl").read_text().splitlines()
    assert json.loads(lines[1]) == {"ctx": "A dog", "endings": ["x", "runs", "y", "z"], "label": 1}


def test_published_shards(tmp_path, gpt2_vocabulary):
    files = {"README.md": b"---\nlicense: mit\n---\n"}
    for name in ("finewebedu_val_000000", "finewebedu_train_000001", "finewebedu_train_000002"):
        train_gpt2.write_shard(tmp_path / "shard", [50256, *gpt2_vocabulary.encode(name * 50)])
        files[name + ".bin"] = (tmp_path / "shard").read_bytes()
    count = len(train_gpt2.read_shard(tmp_path / "shard"))
    files["finewebedu_train_000003.bin"] = b"no shard"
    with hub.serve(datasets={"kjj0/finewebedu10B-gpt2": files}) as (environment, _):
        done = run(environment, tmp_path, "fineweb_edu_shards", f"--max_tokens={count + 1}")
        assert done.returncode == 0, done.stderr
        broken = run(environment, tmp_path, "fineweb_edu_shards", "--out_dir=all")
        assert broken.returncode == 2 and "no shard" in broken.stderr and broken.stderr.count("\n") == 1
    folder = tmp_path / "data" / "fineweb_edu_shards"
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        [*[name for name in files if "0003" not in name and ".bin" in name], "meta.json"])
    assert train_gpt2.open_data(folder).meta["train"]["documents"] == 2


def test_a_hub_that_is_out_of_reach(tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "HF_ENDPOINT"}
    done = run(environment | {"HF_HUB_OFFLINE": "1"}, tmp_path, "hf:me/tales")
    assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
    assert not (tmp_path / "data").exists()
    if FULL:  # the library tries for 25 s
        done = run({**environment, "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0"}, tmp_path, "hf:me/tales")
        assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr


# ---- Mistakes --------------------------------------------------------------------------------------------------------


def test_mistakes_of_preparation(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = write_rows(tmp_path, documents_of(50), "parquet")
    (tmp_path / "half.jsonl").write_text('{"story": "a"')
    (tmp_path / "lists.jsonl").write_text('{"story": ["a"]}\n{"story": ["b"]}\n')
    (tmp_path / "cut.parquet").write_bytes(rows.read_bytes()[:-100])
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "short.txt").write_text("ab")
    (tmp_path / "latin.txt").write_bytes("Ein schöner Tag. ".encode("latin-1") * 100)
    (tmp_path / "wide.txt").write_text("".join(map(chr, [*range(32, 0xD800), *range(0xE000, 0x12000)])), "utf-8")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "diary.txt").write_text("mine")
    (tmp_path / "file").write_text("a file")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for argv, message in [
        (["nothing.txt"], "no such file"), (["no*.txt"], "nothing matches"), (["."], "a folder"),
        (["*.[jt]*"], "several kinds"), (["empty.txt"], "is empty"), (["empty.jsonl"], "is empty"),
        (["tales.parquet"], "no column 'text'"), (["tales.parquet", "--text_column=n"], "not hold text"),
        (["lists.jsonl", "--text_column=story"], "not hold text"), (["half.jsonl"], "cannot read the data set"),
        (["cut.parquet"], "cannot read the data set"), (["latin.txt"], "0xf6 at position 7"),
        (["wide.txt", "--tokenizer=char"], "distinct characters"), (["hf:"], "OWNER/NAME"),
        (["hf:x y/z"], "OWNER/NAME"),
        (["--vocab_size=256"], "at least 257"), (["--vocab_size=65537"], "at most 65,536"),
        (["--val_fraction=0"], "between"), (["--val_fraction=x"], "a number"), (["--shard_tokens=1"], "at least 2"),
        (["--max_tokens=1"], "at least 2"), (["--shard_tokens=3_000_000_000"], "at most"),
        (["--seed=-1"], "at least 0"), (["--tokenizer=word"], "one of"),
        (["--nonsense=1"], "no setting"), (["--out_dir=full"], "something else"), (["--out_dir=file"], "file"),
        (["--out_dir=file/deeper"], "file"), (["hellaswag", "--out_dir=mine"], "leave out --out_dir"),
    ]:
        assert message in fails(prepare_data.main, argv, capsys), argv
        assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before, argv
    for text in "ab", "a":
        (tmp_path / "short.txt").write_text(text)
        argv = ["short.txt", "--tokenizer=char", f"--out_dir={text}"]
        assert "too short" in fails(prepare_data.main, argv, capsys)
        (tmp_path / "short.txt").write_text(text * 100)  # lengthened, it may take the folder
        assert prepare_data.main(argv) == 0
    monkeypatch.setattr(os, "access", lambda path, mode: path != "short.txt")  # root, who may run this, reads anything
    assert "permission" in fails(prepare_data.main, ["short.txt"], capsys)


@pytest.mark.parametrize("names", [["a", "b"], ["b", "a"]])
def test_an_empty_file_among_others_changes_nothing(names, tmp_path, capsys):
    """Nor where it is the last one: a text is cut where it would be alone."""
    text = "One more tale of a king and a cat. " * 40
    (tmp_path / "alone.txt").write_text(text)
    for name, content in zip(names, (text, ""), strict=True):
        (tmp_path / f"{name}.txt").write_text(content)
    for dataset, out in ("alone.txt", "1"), ("[ab].txt", "2"):
        prepare_data.main([str(tmp_path / dataset), "--tokenizer=char", f"--out_dir={tmp_path / out}"])
    one, two = (train_gpt2.open_data(tmp_path / out).meta for out in "12")
    assert one["train"]["tokens"] == int(len(text) * 0.9) and [one[k] for k in ("train", "val")] == [
        two[k] for k in ("train", "val")]


def test_training_keeps_a_document(tmp_path, capsys):
    """However large the share for validation."""
    (tmp_path / "two.jsonl").write_text('{"text": "A king and a cat."}\n{"text": "A cat and a mouse."}\n')
    prepare_data.main([str(tmp_path / "two.jsonl"), "--tokenizer=char", "--val_fraction=0.9",
                       f"--out_dir={tmp_path / 'out'}"])
    meta = train_gpt2.open_data(tmp_path / "out").meta
    assert meta["train"]["documents"] == meta["val"]["documents"] == 1


@pytest.mark.parametrize("dataset, expected", [
    ("stories", ("stories", "bpe", "data/stories")), ("shakespeare", ("shakespeare", "char", "data/shakespeare")),
    ("my.txt", ("my", "bpe", "data/my")), ("notes/*.jsonl", ("notes", "bpe", "data/notes")),
    ("hf:me/tales:en", ("tales", "bpe", "data/tales")), ("fineweb_edu", ("fineweb_edu", "gpt2", "data/fineweb_edu")),
    # a text of one's own is not ours, whatever its name
    ("stories.txt", ("stories_text", "bpe", "data/stories_text")),
    ("shakespeare.txt", ("shakespeare_text", "bpe", "data/shakespeare_text")),
    ("hf:me/tinystories", ("tinystories_text", "bpe", "data/tinystories_text")),
    ("notes: 2024.txt", ("notes__2024", "bpe", "data/notes__2024")),
])
def test_names(dataset, expected):
    name, kind, folder = prepare_data.name_of(prepare_data.Settings(dataset=dataset))
    assert (name, kind, folder.as_posix()) == expected


@pytest.mark.parametrize("folder, command", [
    ("stories", ""), ("stories_2", " --data_dir=data/stories_2 --rows=stream"),
    ("shakespeare", " --preset=shakespeare_char (or shakespeare_cpu)"),
    ("my text", " '--data_dir=data/my text' --rows=stream"),
    ("fineweb_edu_shards", " --preset=gpt2 --data_dir=data/fineweb_edu_shards"),
])
def test_the_command_to_type_next(folder, command, capsys, monkeypatch):
    """Every preset that fits, the whole road quoted, and a model as large as what was downloaded."""
    monkeypatch.setattr(prepare_data, "shard_paths", lambda folder: {"train": [1], "val": [1]})
    counts = {"documents": 1, "tokens": 8, "bytes": 9}
    prepare_data.summarize(pathlib.Path("data") / folder, {
        "dataset": folder, "train": counts, "val": counts, "tokenizer": {"kind": "bpe"}, "landmarks": {"uniform": 1.0}})
    assert capsys.readouterr().out.endswith(f"; now: python train_gpt2.py{command}\n")


@posix
def test_a_full_disk_in_the_middle_of_a_shard(tmp_path, capsys):
    """A limit on the size of files stands for the disk; afterwards the same command ends with the same bytes."""
    import resource
    text = tmp_path / "tales.txt"
    text.write_bytes("\n".join(documents_of(2000)).encode())
    argv = [str(text), "--shard_tokens=30000", "--vocab_size=300"]
    assert prepare_data.main([*argv, f"--out_dir={tmp_path / 'whole'}"]) == 0
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, limits[1]))
    try:
        assert "cannot write" in fails(prepare_data.main, [*argv, f"--out_dir={tmp_path / 'out'}"], capsys)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list((tmp_path / "out").glob(".*.tmp")) and not list((tmp_path / "out").glob("*.bin"))
    assert prepare_data.main([*argv, f"--out_dir={tmp_path / 'out'}"]) == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_landmarks_are_those_of_a_plain_count():
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
        kinds = max(1, len([1 for first, _ in pairs if first == a]))
        nats.append(-np.log((pairs[a, b] + kinds * unigram[b]) / (total + kinds)))
    found = prepare_data.landmarks(shards, [np.array(val, np.uint16)], 30)
    assert found["bigram"] == pytest.approx(np.mean(nats), rel=1e-9) and found["uniform"] == pytest.approx(np.log(30))
    assert found["unigram"] == pytest.approx(-np.mean([np.log(unigram[b]) for b in val[1:].tolist()]), rel=1e-9)
