"""Every source of text, through every tokenizer, to the same shards, however often the work is
cut off."""

import collections
import contextlib
import gzip
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

WORDS = ("the a of sun moon river 42 3.14 naïve 漢字 🙂🏽 don't\n\n \t end. \r\n It's so ,, --".split(
    " "))


def documents_of(count, seed=0, words=60):
    draw = random.Random(seed)
    return [" ".join(draw.choices(WORDS, k=draw.randint(1, words))) + "." for _ in range(count)]


def contents(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(
        folder.iterdir()) if path.suffix != ".tmp"}


def split_ids(folder, split):
    return [i for path in train_gpt2.shard_paths(folder)[split] for i in train_gpt2.read_shard(
        path).tolist()]


def documents_in(folder):
    """(the training split's texts, the validation split's): cut at <|endoftext|>; of characters
    each is one text."""
    tokenizer, found = train_gpt2.open_data(folder).tokenizer, []
    for split in ("train", "val"):
        ids = split_ids(folder, split)
        ends = ([i for i, token in enumerate(
            ids) if token == tokenizer.eot] if tokenizer.eot is not None else [])
        assert not ends or ends[0] == 0 and ends[-1] == len(ids) - 1
        found.append([tokenizer.decode(ids[a + 1 : b]) for a, b in zip(ends, ends[1:],
            strict=False)] or [tokenizer.decode(ids)])
    return found


def prepare(dataset, out, *argv):
    """Prepares a data set; (training texts, validation texts, what was printed)."""
    with contextlib.redirect_stdout(io.StringIO()) as output:
        assert prepare_data.main([str(dataset), "--vocab_size=300", *argv, f"--out_dir={out}"]) == 0
    return *documents_in(out), output.getvalue()


def write_rows(folder, documents, kind):
    """The documents as a file of this kind, in a column that is called story."""
    path = folder / f"tales.{kind}"
    if kind == "jsonl":
        path.write_text("".join(json.dumps({"n": i, "story": text}) + "\n" for i, text in enumerate(
            documents)))
    else:
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.table({"n": range(len(documents)), "story": documents}),
             path, row_group_size=50)
    return path


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "txt"])
def test_every_kind_of_file_gives_the_documents_in_order(kind, tmp_path):
    documents = documents_of(600 if kind != "txt" else 30)
    if kind == "txt":
        for i, text in enumerate(documents):
            (tmp_path / f"{i:03d}.txt").write_bytes(text.encode())
        dataset = str(tmp_path / "*.txt")
    else:
        dataset = write_rows(tmp_path, documents, kind)
    cut = len(documents) - round(len(documents) * 0.1)
    for tokenizer in ("bpe", "char"):
        argv = [dataset, tmp_path / tokenizer, f"--tokenizer={tokenizer}", "--text_column=story",
             "--shard_tokens=1000"]
        *found, _ = prepare(*argv)
        expected = [documents[:cut], documents[cut:]]
        assert found == (expected if tokenizer == "bpe" else [["\n\n".join(
                texts)] for texts in expected])
        meta = train_gpt2.open_data(tmp_path / tokenizer).meta
        for split, texts, tokens in zip(("train", "val"), expected, found, strict=True):
            assert meta[split]["documents"] == len(texts)
            assert meta[split]["tokens"] == len(split_ids(tmp_path / tokenizer, split))
            assert meta[split]["bytes"] == sum(len(text.encode()) for text in tokens)
        assert "complete already" in prepare(*argv)[2]


def test_the_fast_count_of_words_is_the_slow_one():
    texts = documents_of(200, seed=1) + ["", " ", "  a  b ", "a\u3000 b", "x \u2003y", "'s n't",
         "\x00 a\x1c b\x85 c"]
    slow = collections.Counter(word for text in texts for word in regex.findall(
        train_gpt2.SPLIT_PATTERN, text))
    assert prepare_data.count_words(texts) == slow


def test_every_text_comes_back_through_a_trained_bpe():
    """Also what the trainer never saw, and 80,000 bytes without a space."""
    tokenizer = train_gpt2.Tokenizer(prepare_data.bpe_spec(prepare_data.train_bpe(documents_of(300),
         500)))
    for text in ["🙂🏽👨‍👩‍👧", "漢字かな混じり文", "e\u0301a\u0308\u200d", "\x00\x00a\x00", "\n", "\n\n \n",
             "\r\n", "ab" * 40_000, "<|endoftext|>", "", " ", "\ufeffx", "𝔘𝔫𝔦"]:
        ids = prepare_data.encode_array(tokenizer, text)
        assert tokenizer.decode_bytes(ids.tolist()) == text.encode() and tokenizer.eot not in ids
        assert ids.tolist() == tokenizer.encode(text)


class Cut(BaseException):
    """Stands for a kill: nothing catches it."""


def stream_of(path, monkeypatch):
    """Lets hf:me/tales be this .parquet file, streamed by `datasets`, whose length nobody knows."""
    import datasets

    monkeypatch.setattr(datasets, "get_dataset_split_names", lambda *_: ["train"])
    monkeypatch.setattr(prepare_data, "open_hub", lambda *_: datasets.load_dataset("parquet",
         data_files=str(path), split="train", streaming=True))
    return "hf:me/tales"


def source(kind, folder, documents, monkeypatch):
    if kind == "txt":
        (folder / "tales.txt").write_bytes("\n".join(documents).encode())
        return str(folder / "tales.txt")
    if kind == "jsonl.gz":
        path = write_rows(folder, documents, "jsonl")
        (folder / "packed.jsonl.gz").write_bytes(gzip.compress(path.read_bytes()))
        return str(folder / "packed.jsonl.gz")
    path = write_rows(folder, documents, "parquet" if kind == "hub" else kind)
    return stream_of(path, monkeypatch) if kind == "hub" else str(path)


@pytest.mark.parametrize("kind", ["txt", "jsonl", "hub"])
def test_cut_off_at_every_write(kind, tmp_path, monkeypatch):
    """Cut off just before and just after each file is moved into its place, then started again:
    the same bytes."""
    dataset = source(kind, tmp_path, documents_of(100), monkeypatch)
    argv = [dataset, "--text_column=story", "--shard_tokens=1800", "--vocab_size=280"]
    assert prepare_data.main([*argv, f"--out_dir={tmp_path / 'whole'}"]) == 0
    whole = contents(tmp_path / "whole")
    assert len(whole) >= 5
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
        assert contents(out) == whole, moment
    assert count >= 2 * len(whole)


def stop_after_every_shard(argv):
    """Starts main again and again, each time cut off after one more shard; how often."""
    save, write, written = prepare_data.Job.save, prepare_data.write_shard, []

    def cut(job):
        save(job)
        if written:
            written.clear()
            raise Cut

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare_data, "write_shard", lambda *args: written.append(write(*args)))
        patch.setattr(prepare_data.Job, "save", cut)
        for count in range(200):
            with contextlib.suppress(Cut):
                prepare_data.main(argv)
                return count
    raise AssertionError("it does not end")


@pytest.mark.parametrize("piece", [1 << 20, 3000])
@pytest.mark.parametrize("kind", ["txt", "jsonl", "jsonl.gz", "parquet", "hub"])
def test_stopped_after_every_shard(kind, piece, tmp_path, monkeypatch):
    """Whether many shards lie in a batch or many batches in a shard."""
    documents = documents_of(300, seed=6)
    dataset = source(kind, tmp_path, [*documents[:150], None, *documents[
        150:]] if kind != "txt" else documents, monkeypatch)
    monkeypatch.setattr(prepare_data, "PIECE", piece)
    monkeypatch.setattr(prepare_data, "ROWS", 40)
    argv = [dataset, "--text_column=story", "--shard_tokens=2000", "--vocab_size=280"]
    assert prepare_data.main([*argv, f"--out_dir={tmp_path / 'whole'}"]) == 0
    if kind != "txt":
        train, val = documents_in(tmp_path / "whole")
        assert (val + train if kind == "hub" else train + val) == documents
    assert stop_after_every_shard([*argv, f"--out_dir={tmp_path / 'out'}"]) > 5
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


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
        process = subprocess.Popen([*argv, f"--out_dir={tmp_path / 'killed'}"],
            stdout=subprocess.DEVNULL)
        while process.poll() is None and not (tmp_path / "killed" / prepare_data.PROGRESS).exists():
            time.sleep(0.01)
        time.sleep(draw.uniform(0, 0.5 * took))
        process.kill()
        killed += process.wait() == (-signal.SIGKILL if os.name == "posix" else 1)
    subprocess.run([*argv, f"--out_dir={tmp_path / 'killed'}"], check=True,
        stdout=subprocess.DEVNULL)
    assert contents(tmp_path / "killed") == whole
    assert killed >= 1


# ---- The hub ----


def parquet_of(**columns):
    import pyarrow
    import pyarrow.parquet

    file = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table(columns), file, row_group_size=100)
    return file.getvalue()


def commands(argvs, stops):
    """What run_all's child does: prints [(status, output, errors), ...] as JSON."""
    results = []
    for argv in argvs:
        output, errors = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
            try:
                status = stop_after_every_shard(argv) if stops else prepare_data.main(argv)
            except SystemExit as stop:
                status = stop.code
        results.append((status, output.getvalue(), errors.getvalue()))
    print(json.dumps(results), flush=True)
    os._exit(0)


def run_all(environment, home, *argvs, stops=False):
    """Runs commands in a process of its own, since the library reads its environment when it is
    imported. With stops, each is stopped after every shard, and the status says how often."""
    code = f"import json, sys, test_data; test_data.commands(json.loads(sys.argv[1]), {stops})"
    environment = environment | {"HF_HOME": str(home), "PYTHONPATH": f"{ROOT / 'tests'}:{ROOT}"}
    if environment.get("HF_ENDPOINT"):
        environment["HF_HUB_OFFLINE"] = "0"
    child = subprocess.run([sys.executable, "-c", code, json.dumps(argvs)], cwd=home,
        env=environment, capture_output=True, text=True, timeout=300)
    assert child.returncode == 0, child.stderr
    return json.loads(child.stdout.splitlines()[-1])


def is_one_line(result, message):
    status, _, errors = result
    assert status == 2 and errors.startswith("error: ") and errors.count("\n") == 1, result
    assert message in errors, errors


CARD = {"README.md": b"---\nlicense: mit\n---\n"}


def test_a_data_set_of_the_hub(tmp_path):
    """Streamed through the unmodified library, while connections drop; its first documents are for
    validation. Stopped after every shard it gives the same bytes."""
    documents = documents_of(500, seed=2)
    files = CARD | {f"data/train-0000{i}-of-00002.parquet": parquet_of(story=documents[
        250 * i:250 * i + 250]) for i in range(2)}
    argv = ["hf:me/tales", "--text_column=story", "--vocab_size=400", "--shard_tokens=2000"]
    with hub.serve(datasets={"me/tales": files}, breaks=2) as (environment, server):
        whole, again, wrong = run_all(environment, tmp_path, argv, [*argv, "--shard_tokens=5000"], [
            "hf:me/tales", "--out_dir=other"])
        assert whole[0] == 0 and server.breaks == 0, whole
        is_one_line(again, "shard_tokens=2000")
        is_one_line(wrong, "no column 'text'")
        [stopped] = run_all(environment, tmp_path, [*argv, "--out_dir=stopped"], stops=True)
    assert stopped[0] > 3
    assert contents(tmp_path / "stopped") == contents(tmp_path / "data" / "tales")
    train, val = documents_in(tmp_path / "data" / "tales")
    assert val + train == documents and 10 < len(val) < len(train)


def test_named_data_sets_of_the_hub(tmp_path):
    """Its own validation split comes first; HellaSwag as JSON lines."""
    tales = CARD | {"data/train-00000-of-00001.parquet": parquet_of(text=documents_of(300)),
         "data/validation-00000-of-00001.parquet": parquet_of(text=documents_of(20, 9))}
    questions = CARD | {"data/validation-00000-of-00001.parquet": parquet_of(ind=[1, 2], ctx=[
        "A man", "A dog"], label=["0", "1"], endings=[["sits", "b", "c", "d"], ["x", "runs", "y",
         "z"]])}
    served = {"roneneldan/TinyStories": tales, "Rowan/hellaswag": questions}
    with hub.serve(datasets=served) as (environment, _):
        results = run_all(environment, tmp_path, ["tinystories"], ["hellaswag"], ["hf:me/nobody"])
    assert [result[0] for result in results] == [0, 0, 2], results
    assert "network" not in results[2][2]
    assert documents_in(tmp_path / "data" / "tinystories")[1] == ["\n\n".join(documents_of(20, 9))]
    meta = json.loads((tmp_path / "data" / "tinystories" / "meta.json").read_text())
    assert meta["val"]["documents"] == 20 and meta["tokenizer"]["kind"] == "char"
    lines = (tmp_path / "data" / "hellaswag" / "hellaswag_val.jsonl").read_text().splitlines()
    assert json.loads(lines[1]) == {"ctx": "A dog", "endings": ["x", "runs", "y", "z"], "label": 1}


def test_published_shards(tmp_path, gpt2_vocabulary):
    files = dict(CARD)
    for name in ("finewebedu_val_000000", "finewebedu_train_000001", "finewebedu_train_000002"):
        prepare_data.write_shard(tmp_path / "shard", [50256, *gpt2_vocabulary.encode(name * 50)])
        files[name + ".bin"] = (tmp_path / "shard").read_bytes()
    count = len(train_gpt2.read_shard(tmp_path / "shard"))
    files["finewebedu_train_000003.bin"] = b"no shard"
    with hub.serve(datasets={"kjj0/finewebedu10B-gpt2": files}) as (environment, _):
        done, broken = run_all(environment, tmp_path, ["fineweb_edu_shards",
             f"--max_tokens={count + 1}"], ["fineweb_edu_shards", "--out_dir=all"])
    assert done[0] == 0, done
    is_one_line(broken, "shard")
    folder = tmp_path / "data" / "fineweb_edu_shards"
    assert sorted(path.name for path in folder.iterdir()) == sorted([*[
            name for name in files if "0003" not in name and ".bin" in name], "meta.json"])
    assert train_gpt2.open_data(folder).meta["train"]["documents"] == 2


def test_a_hub_that_is_out_of_reach(tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "HF_ENDPOINT"}
    [result] = run_all(environment | {"HF_HUB_OFFLINE": "1"}, tmp_path, ["hf:me/tales"])
    is_one_line(result, "network")
    assert not (tmp_path / "data").exists()
    if FULL:  # the library tries for 25 s
        environment["HF_ENDPOINT"] = "http://127.0.0.1:9"
        is_one_line(run_all(environment, tmp_path, ["hf:me/tales"])[0], "network")


# ---- Mistakes ----


def test_mistakes_of_preparation(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = write_rows(tmp_path, documents_of(50), "parquet")
    (tmp_path / "half.jsonl").write_text('{"story": "a"')
    (tmp_path / "lists.jsonl").write_text('{"story": ["a"]}\n{"story": ["b"]}\n')
    (tmp_path / "cut.parquet").write_bytes(rows.read_bytes()[:-100])
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "cut.txt.gz").write_bytes(gzip.compress(b"a tale " * 99)[:-9])
    (tmp_path / "a.csv").write_text("text\na tale\n")
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "short.txt").write_text("ab")
    (tmp_path / "latin.txt").write_bytes("Ein schöner Tag. ".encode("latin-1") * 100)
    (tmp_path / "wide.txt").write_text("".join(map(chr, [*range(32, 0xD800), *range(0xE000,
        0x12000)])), "utf-8")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "diary.txt").write_text("mine")
    (tmp_path / "file").write_text("a file")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for argv, message in [(["nothing.txt"], "no such file"), (["no*.txt"], "no such file"), (["."],
             "a folder"), (["*.*[lt]"], "several kinds"), (["empty.txt"], "is empty"), ([
            "empty.jsonl"], "is empty"), (["tales.parquet"], "no column 'text'"), (["tales.parquet",
             "--text_column=n"], "not hold text"), (["lists.jsonl", "--text_column=story"],
             "no text in"), (["half.jsonl"], "is not JSON"), (["cut.parquet"],
             "cannot read cut.parquet"), (["latin.txt"], "0xf6 at position 7"), (["cut.txt.gz"],
             "cannot read cut.txt.gz"), (["a.csv"], "not read here"), (["gpt3"],
             "did you mean gpt2?"), (["wide.txt", "--tokenizer=char"], "distinct characters"), ([
            "hf:"], "OWNER/NAME"), (["hf:x y/z"], "OWNER/NAME"), (["--vocab_size=256"], "257"), ([
            "--vocab_size=65537"], "65,536"), (["--val_fraction=0"], "between"), ([
            "--val_fraction=x"], "val_fraction"), (["--shard_tokens=1"], "shard_tokens"), ([
            "--max_tokens=1"], "max_tokens"), (["--shard_tokens=3_000_000_000"], "shard_tokens"), ([
            "--seed=-1"], "seed"), (["--tokenizer=word"], "tokenizer"), (["--nonsense=1"],
             "nonsense"), (["--out_dir=full"], "something else"), (["--out_dir=file"], "file"), ([
            "--out_dir=file/deeper"], "file"), (["hellaswag", "--out_dir=mine"],
             "leave out --out_dir")]:
        assert message in fails(prepare_data.main, argv, capsys), argv
        assert {path: path.read_bytes() for path in tmp_path.rglob(
                "*") if path.is_file()} == before, argv
    for text in "ab", "a":
        (tmp_path / "short.txt").write_text(text)
        argv = ["short.txt", "--tokenizer=char", f"--out_dir={text}"]
        assert "too short" in fails(prepare_data.main, argv, capsys)
        (tmp_path / "short.txt").write_text(text * 100)  # lengthened, it may take the folder
        assert prepare_data.main(argv) == 0


@pytest.mark.parametrize("names", [["a", "b"], ["b", "a"]])
def test_an_empty_file_among_others_changes_nothing(names, tmp_path, capsys):
    """Nor where it is the last one: a text is cut where it would be alone."""
    text = "One more tale of a king and a cat. " * 40
    (tmp_path / "alone.txt").write_text(text)
    for name, content in zip(names, (text, ""), strict=True):
        (tmp_path / f"{name}.txt").write_text(content)
    for dataset, out in ("alone.txt", "1"), ("[ab].txt", "2"):
        prepare_data.main([str(tmp_path / dataset), "--tokenizer=char",
             f"--out_dir={tmp_path / out}"])
    one, two = (train_gpt2.open_data(tmp_path / out).meta for out in "12")
    assert one["train"]["tokens"] == int(len(text) * 0.9) and [one[k] for k in ("train",
            "val")] == [two[k] for k in ("train", "val")]


def test_training_keeps_a_document(tmp_path, capsys):
    """However large the share for validation."""
    (tmp_path / "two.jsonl").write_text(
        '{"text": "A king and a cat."}\n{"text": "A cat and a mouse."}\n')
    prepare_data.main([str(tmp_path / "two.jsonl"), "--tokenizer=char", "--val_fraction=0.9",
         f"--out_dir={tmp_path / 'out'}"])
    meta = train_gpt2.open_data(tmp_path / "out").meta
    assert meta["train"]["documents"] == meta["val"]["documents"] == 1


@pytest.mark.parametrize(
    "dataset, expected",
    [
        ("stories", ("stories", "bpe", "data/stories")),
        ("shakespeare", ("shakespeare", "char", "data/shakespeare")),
        ("my.txt", ("my", "bpe", "data/my")),
        ("notes/*.jsonl", ("notes", "bpe", "data/notes")),
        ("hf:me/tales:en", ("tales", "bpe", "data/tales")),
        ("fineweb_edu", ("fineweb_edu", "gpt2", "data/fineweb_edu")),
        # a text of one's own is not ours, whatever its name
        ("stories.txt", ("stories_text", "bpe", "data/stories_text")),
        ("shakespeare.txt", ("shakespeare_text", "bpe", "data/shakespeare_text")),
        ("hf:me/tinystories", ("tinystories_text", "bpe", "data/tinystories_text")),
        ("notes: 2024.txt", ("notes__2024", "bpe", "data/notes__2024")),
    ],
)
def test_names(dataset, expected):
    name, kind, folder = prepare_data.name_of(prepare_data.Settings(dataset=dataset))
    assert (name, kind, folder.as_posix()) == expected


@pytest.mark.parametrize("folder, options", [("stories", ""), ("stories_2",
     " --data_dir=data/stories_2 --rows=stream"), ("shakespeare",
     " --preset=shakespeare_char (or shakespeare_cpu)"), ("my text",
     " '--data_dir=data/my text' --rows=stream"), ("fineweb_edu_shards",
     " --preset=gpt2 --data_dir=data/fineweb_edu_shards")])
def test_the_command_to_type_next(folder, options):
    """Every preset that fits, the path quoted, and a model as large as what was downloaded."""
    assert (prepare_data.training_options(pathlib.Path("data") / folder, {
            "dataset": folder}) == options)


@posix
def test_a_full_disk_in_the_middle_of_a_shard(tmp_path, capsys):
    """A limit on the size of files stands for the disk; afterwards the same command ends with the
    same bytes."""
    import resource

    text = tmp_path / "tales.txt"
    text.write_bytes("\n".join(documents_of(2000)).encode())
    argv = [str(text), "--shard_tokens=30000", "--vocab_size=300"]
    assert prepare_data.main([*argv, f"--out_dir={tmp_path / 'whole'}"]) == 0
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, limits[1]))
    try:
        assert "cannot write" in fails(prepare_data.main, [*argv, f"--out_dir={tmp_path / 'out'}"],
                 capsys)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list((tmp_path / "out").glob(".*.tmp")) and not list((tmp_path / "out").glob(
            "*.bin"))
    assert prepare_data.main([*argv, f"--out_dir={tmp_path / 'out'}"]) == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


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
        kinds = max(1, len([1 for first, _ in pairs if first == a]))
        nats.append(-np.log((pairs[a, b] + kinds * unigram[b]) / (total + kinds)))
    found = prepare_data.baselines(shards, [np.array(val, np.uint16)], 30)
    assert found["bigram"] == pytest.approx(np.mean(nats), rel=1e-9) and found[
            "uniform"] == pytest.approx(np.log(30))
    assert found["unigram"] == pytest.approx(-np.mean([np.log(unigram[b]) for b in val[
            1:].tolist()]), rel=1e-9)
