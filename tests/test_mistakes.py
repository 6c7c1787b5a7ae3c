"""Whatever a user gets wrong takes one line, exit status 2, and harms nothing."""
import hashlib
import io
import json
import os
import pickle
import shutil
import typing
import zipfile
from pathlib import Path

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from conftest import FULL, fails

import prepare_data
import sample
import train_gpt2

TINY = ["--n_layer=1", "--n_head=2", "--n_embd=16", "--block_size=16", "--batch_size=4", "--max_steps=6",
        "--eval_tokens=100", "--sample_every=10", "--log_every=1"]
RUN = ["--data_dir=data/tales", "--out_dir=out/run", *TINY]


def hashes(folder):
    return {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.rglob("*") if path.is_file()
            and path.name != ".lock"}


@pytest.fixture(scope="session")
def trained_once(tmp_path_factory):
    """A folder with small data of both kinds, and a run on each: out/abc is done, out/run was stopped after 3 steps."""
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(train_gpt2, "matmul_speed", lambda *_: 1e9)
        Path("tales.txt").write_text("".join(f"Tale {i} of a king, a cat and {i * i} mice.\n" for i in range(80)))
        Path("abc.txt").write_text("abc cab bac " * 100)
        prepare_data.main(["tales.txt", "--vocab_size=280", "--out_dir=data/tales"])
        prepare_data.main(["abc.txt", "--tokenizer=char", "--out_dir=data/abc"])
        train_gpt2.main([*RUN, "--data_dir=data/abc", "--out_dir=out/abc", "--rows=stream"])
        patch.setattr(train_gpt2.Run, "signal", 15, raising=False)
        patch.setattr(train_gpt2.Run, "stop_requested", lambda run, step: step == 2)
        patch.setattr(train_gpt2.Run, "stopped", lambda run, step: (run.save(step), run.close()))
        train_gpt2.main(RUN)
    return folder


@pytest.fixture
def trained(trained_once, tmp_path, monkeypatch):
    """A copy of it, which is the current folder."""
    shutil.copytree(trained_once, tmp_path / "here", symlinks=True)
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


# ---- The table -------------------------------------------------------------------------------------------------------
# (script, arguments, part of the message, what is damaged before, with this argument)


def train(option, message, damage=None, *what):
    argv = [option] if "preset" in option else ["--data_dir=data/tales", *TINY, option]
    return train_gpt2, argv, message, damage, what


def data(message, damage, *what):
    return train_gpt2, RUN, message, damage, what


def prepare(argv, message):
    return prepare_data, argv.split(), message, None, ()


def write(option, message, damage=None, *what):
    return sample, option.split(), message, damage, what


def shard(change, split="train"):
    """Changes the header (256 int32) and tokens of a shard; `change` returns what remains of both."""
    path = next(Path("data/tales").glob(f"*_{split}_*.bin"))
    header, tokens = np.fromfile(path, "<i4", 256), np.fromfile(path, "<u2", offset=1024)
    header, tokens = change(header.copy(), tokens.copy())
    path.write_bytes(header.tobytes() + tokens.tobytes())


def head(position, value):
    def change(header, tokens):
        header[position] = value
        return header, tokens
    return change


def fitting(tokens):
    """These tokens, with a header that is true of them."""
    def change(header, _):
        header[2] = len(tokens)
        return header, np.array(tokens, "<u2")
    return change


def file(path, content):
    """A file's content, or None for a folder in its place, or a function of its text."""
    path = Path(path)
    if callable(content):
        content = content(path.read_text(encoding="utf-8"))
    if path.exists():
        remove(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content) if content is not None else path.mkdir()


def meta(**changes):
    path = Path("data/tales/meta.json")
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def remove(path):
    shutil.rmtree(path) if Path(path).is_dir() else Path(path).unlink()


CASES = [
    # settings of train_gpt2.py: names, types, ranges
    train("--max_iters=5", "did you mean --max_steps"), train("--eval_interval=5", "--eval_every"),
    train("--log_interval=1", "--log_every"), train("--dataset=x", "--data_dir"),
    train("--compile=0", "--compile_model"),
    train("--gradient_accumulation_steps=2", "--grad_accum_steps"), train("--lerning_rate=1", "--learning_rate"),
    train("--max_steps", "needs a value"), train("hello", "no option"), train("--preset=gpt3", "gpt2"),
    train("--preset=zzzz", "'zzzz'. All"),
    train("--max_steps=1" + "0" * 400, "at most"), train("--warmup_steps=1" + "0" * 400, "at most"),
    train("--preset=", "no preset"), train("--max_steps=1.5", "whole number"), train("--max_steps=0", "at least 1"),
    train("--learning_rate=nan", "a number"), train("--learning_rate=inf", "a number"),
    train("--learning_rate=-1", "at least 0"), train("--min_lr=-1", "at least 0"),
    train("--weight_decay=-1", "at least 0"), train("--grad_clip=-1", "at least 0"),
    train("--warmup_steps=-1", "at least 0"), train("--max_minutes=0", "more than 0"),
    train("--init_std=0", "more than 0"),
    train("--beta1=1", "below 1"), train("--beta2=-0.1", "at least 0"), train("--dropout=1", "below 1"),
    train("--n_embd=97", "divisible by n_head"), train("--n_embd=0", "n_embd"), train("--n_head=0", "n_head"),
    train("--n_layer=-1", "n_layer"), train("--n_layer=10000000", "1,024"), train("--n_embd=1048576", "GB"),
    train("--block_size=100000000", "at most"),
    train("--block_size=0", "at least 1"), train("--total_batch_size=1000", "multiple of block_size"),
    train("--total_batch_size=96", "multiple of 64"), train("--total_batch_size=0", "at least 1"),
    train("--total_batch_size=16000000000", "at most"), train("--batch_size=0", "at least 1"),
    train("--batch_size=1000000000", "at most"), train("--grad_accum_steps=0", "at least 1"),
    train("--seed=-1", "at least 0"), train(f"--seed={2**64}", "at most"), train("--device=abacus", "device"),
    train("--device=cuda:99", "cuda"), train("--eval_every=0", "at least 1"), train("--eval_tokens=0", "at least 1"),
    train("--sample_every=0", "at least 1"), train("--checkpoint_every=0", "at least 1"),
    train("--log_every=0", "at least 1"), train("--eval_only", "to evaluate"),
    train("--init_from=resume", "resumes it"),
    (train_gpt2, ["--eval_only", "--out_dir=out/run", "--data_dir=data/abc", "--rows=stream"], "name the run of this",
     None, ()),
    train("--preset=shakespeare_char", "python prepare_data.py shakespeare"),
    train("--preset=gpt2", "python prepare_data.py fineweb_edu"),
    # settings of prepare_data.py, beside what test_data.py has
    prepare("shakespear", "did you mean shakespeare?"), prepare("tales.json", "convert it to .jsonl"),
    prepare("nothing.txt", "no such file"), prepare("tales.txt --vocab_size=256", "at least 257"),
    prepare("tales.txt --vocab_size=70000", "at most 65,536"), prepare("tales.txt --shard_tokens=1", "at least 2"),
    prepare("tales.txt --max_tokens=1", "at least 2"), prepare("tales.txt --val_fraction=1", "between"),
    prepare("--seed=-1", "at least 0"), prepare(f"--seed={2**64}", "at most"),
    prepare("tales.txt --vocab_size=290 --out_dir=data/tales", "another --out_dir"),
    prepare("tales.txt --out_dir=tales.txt", "tales.txt"), prepare("tales.txt abc.txt", "stands in quotes"),
    # settings of sample.py, and prompts
    write("--temperature=-1", "at least 0"), write("--top_k=0", "at least 1"), write("--num_samples=0", "at least 1"),
    write("--max_new_tokens=0", "at least 1"), write("--seed=-1", "at least 0"), write("--device=abacus", "device"),
    write("--checkpoint=nowhere.pt", "no checkpoint"), write("--checkpoint=.", "name the best.pt"),
    write("--checkpoint=" + "x" * 5000, "no checkpoint"), write("--init_from=" + "x" * 5000, "no checkpoint"),
    write("--prompt=@", "without a name"), write("--strat=x", "no setting"), write("a b", "stands in quotes"),
    write("axe --checkpoint=out/abc/best.pt", "has no 'x'"), write("", "train one with", remove, "out"),
    # folders
    train("--data_dir=nowhere", "prepare_data.py"), train("--data_dir=tales.txt", "no data"),
    train("--data_dir=out", "no train shards"), train("--data_dir=" + "x" * 5000, "no data"),
    train("--out_dir=tales.txt", "cannot write"), train("--out_dir=tales.txt/deeper", "cannot write"),
    train("--out_dir=" + "x" * 5000, "cannot write"), train("--init_from=nowhere.pt", "no checkpoint"),
    train("--init_from=data/tales", "data/tales"), train("--init_from=tales.txt", "tales.txt"),
    data("no train shards", lambda: [path.unlink() for path in Path("data/tales").glob("*_train_*.bin")]),
    data("no val shards", lambda: [path.unlink() for path in Path("data/tales").glob("*_val_*.bin")]),
    data("cannot write", file, "out/run", b"a file where the run was"),
    data("cannot write", file, "out", b"a file where runs were"),
    data("ckpt.pt", file, "out/run/ckpt.pt", None), data("log.csv", file, "out/run/log.csv", None),
    # shards
    data("is no shard", shard, head(0, 20240521)), data("is no shard", shard, head(1, 2)),
    data("cut short", shard, head(2, 10**6)), data("cut short", shard, head(2, -5)),
    data("cut short", shard, head(2, 0)), data("0 tokens", shard, fitting([])),
    data("cut short", shard, lambda header, tokens: (header, tokens[:-7])),
    data("is no shard", shard, lambda header, tokens: (header[:100], tokens[:0])),
    data("is no shard", shard, lambda header, tokens: (header[:0], tokens[:0])),
    data("holds token 9000", shard, fitting([279] + [9000] * 100)),
    (train_gpt2, [*RUN, "--eval_every=3"], "holds token 9000", shard, (fitting([279] + [9000] * 100), "val")),
    data("too few", shard, fitting([279])), data("too few", shard, fitting([279]), "val"),
    (train_gpt2, [*RUN, "--rows=stream"], "too few", shard, (fitting([279] * 16),)),
    (train_gpt2, [*RUN, "--data_dir=data/abc", "--rows=documents"], "--rows=stream", None, ()),
    # meta.json
    data("meta.json", file, "data/tales/meta.json", b""), data("meta.json", file, "data/tales/meta.json", b"{'a': 1}"),
    data("meta.json", file, "data/tales/meta.json", b"\xff\xfe"), data("meta.json", file, "data/tales/meta.json", "[]"),
    data("meta.json", file, "data/tales/meta.json", "[" * 10**5), data("meta.json", file, "data/tales/meta.json", None),
    data("meta.json", meta, dict(tokenizer=None)), data("meta.json", meta, dict(dataset=None)),
    data("meta.json", meta, dict(tokenizer={"kind": "word"})), data("meta.json", meta, dict(tokenizer={"kind": "bpe"})),
    data("meta.json", meta, dict(tokenizer={"kind": "bpe", "ranks": ["a", "a"]})),
    data("meta.json", meta, dict(tokenizer={"kind": "bpe", "ranks": [1, 2]})),
    data("meta.json", meta, dict(tokenizer={"kind": "char", "alphabet": ""})),
    data("meta.json", meta, dict(tokenizer={"kind": "char", "alphabet": "aa"})),
    data("meta.json", meta, dict(tokenizer={"kind": "char", "alphabet": "\ud800"})),
    data("meta.json", meta, dict(entropy_floor="low")), data("meta.json", meta, dict(entropy_floor=float("nan"))),
    data("meta.json", meta, dict(landmarks=[1])), data("meta.json", meta, dict(landmarks={"unigram": "?"})),
    data("another tokenizer", meta, dict(tokenizer={"kind": "bpe", "ranks": [chr(i) for i in range(255, -1, -1)]})),
    (train_gpt2, [*RUN, "--data_dir=data/abc", "--rows=stream", "--init_from=out/run/ckpt.pt"], "different tokenizers",
     None, ()),
]


@pytest.mark.parametrize("script, argv, message, damage, what", CASES, ids=[
    f"{case[0].__name__} {' '.join(case[1])[-40:]} {case[2]}" for case in CASES])
def test_mistakes(script, argv, message, damage, what, trained, capsys):
    if damage is meta:
        meta(**what[0])
    elif damage:
        damage(*what)
    before = hashes(trained)
    line = fails(script.main, argv, capsys)
    assert message in line
    after = hashes(trained)
    assert {path: after.get(path) for path in before} == before


def wrong_types():
    for script in (train_gpt2, prepare_data, sample):
        for name, kind in typing.get_type_hints(script.Settings).items():
            if kind is not str:
                yield script, name


@pytest.mark.parametrize("script, name", list(wrong_types()))
def test_every_setting_of_the_wrong_type(script, name, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert f"--{name}=?: it must be" in fails(script.main, [f"--{name}=?"], capsys)
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="/proc is a folder where nobody may write, root included")
def test_an_unwritable_folder(trained, capsys):
    assert "cannot write" in fails(train_gpt2.main, [*RUN, "--out_dir=/proc/run"], capsys)
    assert "cannot write" in fails(prepare_data.main, ["tales.txt", "--out_dir=/proc/data"], capsys)


def test_prompts_that_are_none_or_too_long(trained, capsys):
    assert sample.main(["", "--max_new_tokens=4"]) == 0
    assert sample.main(["abc" * 10, "--max_new_tokens=4", "--checkpoint=out/abc/best.pt"]) == 0
    assert "the model sees the last 16" in capsys.readouterr().err


def test_the_current_folder_as_out_dir(trained):
    """It holds other things, so the run goes into a folder inside."""
    before = hashes(trained)
    train_gpt2.main([*RUN, "--out_dir=."])
    assert (trained / "run-2" / "ckpt.pt").exists() and before.items() <= hashes(trained).items()


# ---- Checkpoints -----------------------------------------------------------------------------------------------------


def refused(path, capsys):
    """Neither sampling nor going on nor starting from it does anything with this checkpoint; the way to start over is
    said to whoever goes on."""
    before = hashes(Path.cwd())
    line = fails(train_gpt2.main, RUN, capsys)
    assert str(path) in line and line.endswith(f"--out_dir={path.parent} --overwrite=True")
    assert str(path) in fails(sample.main, [f"--checkpoint={path}"], capsys)
    assert str(path) in fails(train_gpt2.main, [*RUN, "--out_dir=out/new", f"--init_from={path}"], capsys)
    after = hashes(Path.cwd())
    assert {path: after.get(path) for path in before} == before


CKPT = Path("out/run/ckpt.pt")


@pytest.mark.parametrize("place", [*range(20), -1])
def test_a_checkpoint_cut_short(place, trained, capsys):
    whole = CKPT.read_bytes()
    CKPT.write_bytes(whole[:len(whole) * place // 20] if place >= 0 else whole[:-1])
    refused(CKPT, capsys)


def put(value, *path):
    """A change of a checkpoint: the value at a path of keys."""
    def change(checkpoint):
        for key in path[:-1]:
            checkpoint = checkpoint[key]
        checkpoint[path[-1]] = value
    return change


WTE = "transformer.wte.weight"
HUGE = torch.zeros(1).expand(10**6, 10**6)  # claims 4 TB
DAMAGES = [
    put({}, "config"), put(32, "config", "n_embd"), put(5, "config", "n_head"), put(10**9, "config", "n_layer"),
    put(2**60, "config", "vocab_size"), put("two", "config", "n_layer"), put("red", "config", "color"),
    put(-16, "config", "n_embd"), put(float("nan"), "config", "dropout"),
    put(torch.zeros(1), "model", "extra"), lambda c: c["model"].popitem(), put("/etc/passwd", "model", WTE),
    put(torch.zeros(16, dtype=torch.int64), "model", "transformer.ln_f.bias"), put(HUGE, "model", WTE),
    put(torch.full((16,), float("nan")), "model", "transformer.ln_f.bias"),
    put(torch.sparse_coo_tensor(size=(10**6, 10**6), check_invariants=True), "model", WTE),
    put(torch.empty(10**6, 10**6, device="meta"), "model", WTE), put(HUGE, "optimizer", "state", 0, "exp_avg"),
    put(None, "model"), lambda c: c.pop("tokenizer"), put({"kind": "x"}, "tokenizer"),
    put({"kind": "char", "alphabet": "abc"}, "tokenizer"), put("many", "step"), put(-3, "step"),
    put(float("nan"), "best_val_loss"), put(torch.zeros(3), "settings", "seed"), lambda c: c.clear(),
]


@pytest.mark.parametrize("damage", range(len(DAMAGES)))
def test_a_checkpoint_that_does_not_fit(damage, trained, capsys):
    checkpoint = torch.load(CKPT, weights_only=True)
    DAMAGES[damage](checkpoint)
    torch.save(checkpoint, CKPT)
    refused(CKPT, capsys)


@pytest.mark.parametrize("damage", [
    put({}, "optimizer"), put({}, "optimizer", "state"), put(torch.zeros(3), "optimizer", "state", 1, "exp_avg_sq"),
    lambda c: c["optimizer"]["state"].pop(0), put(3, "optimizer", "state", 0, "step"), lambda c: c.pop("optimizer"),
])
def test_an_optimizer_that_does_not_fit(damage, trained, capsys):
    checkpoint = torch.load(CKPT, weights_only=True)
    damage(checkpoint)
    torch.save(checkpoint, CKPT)
    before = hashes(trained)
    assert "--overwrite=True" in fails(train_gpt2.main, RUN, capsys)
    assert hashes(trained) == before
    assert train_gpt2.main([*RUN, "--overwrite=True"]) == 0  # the way out is one


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("exploded",)


def bombs():
    """Files that would run code if anything unpickled them without care."""
    def saved(value, **options):
        box = io.BytesIO()
        torch.save(value, box, **options)
        return box.getvalue()

    def zipped(names, compression=zipfile.ZIP_STORED):
        box = io.BytesIO()
        with zipfile.ZipFile(box, "w", compression) as archive:
            for name in names:
                archive.writestr(name, pickle.dumps(Bomb(), 2))
        return box.getvalue()
    return [saved({"model": Bomb()}), saved(Bomb()), saved({"model": Bomb()}, _use_new_zipfile_serialization=False),
            pickle.dumps(Bomb()), zipped(["archive/data.pkl", "archive/version"]),
            zipped(["archive/data.pkl", "archive/constants.pkl", "archive/version"]),  # TorchScript's mark
            zipped(["archive/data.pkl", "archive/version"], zipfile.ZIP_DEFLATED)]


@pytest.mark.parametrize("content", bombs(), ids=range(7))
def test_a_pickle_is_not_run(content, trained, capsys):
    CKPT.write_bytes(content)
    refused(CKPT, capsys)
    assert not (trained / "exploded").exists()


# ---- Fuzzing ---------------------------------------------------------------------------------------------------------

often = hypothesis.settings(max_examples=2000 if FULL else 35, deadline=None, database=None, derandomize=not FULL)


def mutations(size):
    """Changes of some bytes: [(where, with how many the byte there is replaced, by what)]."""
    return st.lists(st.tuples(st.integers(0, size - 1), st.sampled_from([1, 1, 1, 0, 4, 1000]), st.binary(max_size=4)),
                    min_size=1, max_size=4)


def mutated(content, changes):
    for where, length, new in changes:
        content = content[:where] + new + content[where + length:]
    return content


def clean_or_one_line(load):
    """A load that succeeds, or a UserError of one line."""
    try:
        load()
    except train_gpt2.UserError as error:
        assert "\n" not in str(error).strip(), error


@often
@hypothesis.given(changes=mutations(1100), split=st.sampled_from(["train", "val"]))
def test_fuzzed_shards(changes, split, trained_once, tmp_path_factory):
    folder = tmp_path_factory.getbasetemp() / "fuzzed_shards"
    shutil.copytree(trained_once / "data" / "tales", folder, dirs_exist_ok=True)
    path = next(folder.glob(f"*_{split}_*.bin"))
    path.write_bytes(mutated(path.read_bytes(), changes))

    def load():
        for rows in ("documents", "stream"):
            loader = train_gpt2.ShardedLoader(folder, split, 16, rows, 1, 280, 279)
            loader.batch(range(min(8, loader.rows_per_epoch)))
    clean_or_one_line(load)


@often
@hypothesis.given(changes=mutations(1500), kind=st.sampled_from(["tales", "abc"]))
def test_fuzzed_meta(changes, kind, trained_once, tmp_path_factory):
    folder = tmp_path_factory.getbasetemp() / "fuzzed_meta"
    shutil.copytree(trained_once / "data" / kind, folder, dirs_exist_ok=True)
    path = folder / "meta.json"
    path.write_bytes(mutated(path.read_bytes(), changes))

    def load():
        data = train_gpt2.open_data(folder)
        data.tokenizer.token_bytes()
    clean_or_one_line(load)


@often
@hypothesis.given(data=st.data(), inside=st.booleans())
def test_fuzzed_checkpoints(data, inside, trained_once, tmp_path_factory):
    """Bytes anywhere; or inside the pickle, in an archive whose checksums are right."""
    path = tmp_path_factory.getbasetemp() / "fuzzed.pt"
    content = (trained_once / CKPT).read_bytes()
    if inside:
        box = io.BytesIO()
        with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(box, "w") as new:
            for part in old.infolist():
                inner = old.read(part)
                if part.filename.endswith("data.pkl"):
                    inner = mutated(inner, data.draw(mutations(len(inner))))
                new.writestr(part.filename, inner)
        path.write_bytes(box.getvalue())
    else:
        path.write_bytes(mutated(content, data.draw(mutations(len(content)))))
    run = make_run(trained_once)
    clean_or_one_line(lambda: train_gpt2.GPT.from_checkpoint(path))
    clean_or_one_line(lambda: run.load(path))


def make_run(folder):
    s = train_gpt2.Settings(data_dir=str(folder / "data" / "tales"), n_layer=1, n_head=2, n_embd=16, block_size=16,
                            device="cpu", dtype="float32")
    data, world = train_gpt2.open_data(s.data_dir), train_gpt2.World(s)
    model = train_gpt2.build_model(s, data, world)
    return train_gpt2.Run(s, model, train_gpt2.make_optimizer(model, s, world.device),
                          torch.amp.GradScaler("cpu", enabled=False), data, world)


# ---- The rest --------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_where_there_is_none(trained, capsys):
    assert "no cuda here" in fails(train_gpt2.main, [*RUN, "--device=cuda"], capsys)


def test_gpt2_vocabulary_out_of_reach(monkeypatch, tmp_path, capsys):
    """A machine without network or cache gets the way out rather than a traceback."""
    import tiktoken
    train_gpt2.gpt2_encoding.cache_clear()

    def unreachable(name):
        raise ConnectionError("no network")
    monkeypatch.setattr(tiktoken, "get_encoding", unreachable)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("some text " * 50)
    line = fails(prepare_data.main, ["a.txt", "--tokenizer=gpt2"], capsys)
    assert "TIKTOKEN_CACHE_DIR" in line and "--tokenizer=bpe" in line
    train_gpt2.gpt2_encoding.cache_clear()


def test_a_run_whose_loss_is_not_finite(small_run, tmp_path, capsys):
    # with no clipping and no bound a rate this high overflows within some steps
    line = fails(train_gpt2.main, [*small_run, "--learning_rate=1e30", "--grad_clip=0"], capsys)
    assert "step" in line and "lower --learning_rate" in line


def test_a_loss_that_is_not_finite_leaves_the_last_checkpoint(trained, capsys, monkeypatch):
    monkeypatch.setattr(train_gpt2.MLP, "forward", lambda self, x: x * float("nan"))
    before = CKPT.read_bytes()
    line = fails(train_gpt2.main, RUN, capsys)
    assert "step 3 has loss nan" in line and "at learning rate" in line and CKPT.read_bytes() == before


def test_help_names_every_setting(capsys):
    for main, cls in ((train_gpt2.main, train_gpt2.Settings), (prepare_data.main, prepare_data.Settings),
                      (sample.main, sample.Settings)):
        with pytest.raises(SystemExit) as stop:
            main(["--help"])
        output = capsys.readouterr().out
        comments = train_gpt2.setting_comments(cls)
        assert stop.value.code == 0
        for name in cls.__dataclass_fields__:
            assert f"--{name}=" in output and (comments.get(name, "") in output)
        assert len(comments) > 0.6 * len(cls.__dataclass_fields__)
