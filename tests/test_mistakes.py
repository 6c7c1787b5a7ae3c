"""Whatever a user gets wrong takes one line, exit status 2, and harms nothing."""
import hashlib
import inspect
import io
import json
import math
import os
import pickle
import re
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
from test_training import stop_after

import prepare_data
import sample
import train_gpt2

TINY = ["--n_layer=1", "--n_head=2", "--n_embd=16", "--block_size=16", "--batch_size=4",
        "--max_steps=6", "--eval_tokens=100", "--sample_every=10", "--log_every=1"]
RUN = ["--data_dir=data/tales", "--out_dir=out/run", *TINY]
ABC = [*RUN, "--data_dir=data/abc", "--rows=stream"]


def hashes(folder):
    return {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.rglob("*")
            if path.is_file() and path.name != ".lock"}


@pytest.fixture(scope="session")
def trained_once(tmp_path_factory):
    """Data of two kinds and a run on each: out/abc is done, out/run stopped after 3 steps."""
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(train_gpt2, "matmul_speed", lambda *_: 1e9)
        tales = [f"Tale {i} of a king, a cat and {i * i} mice.\n" for i in range(80)]
        Path("tales.txt").write_text("".join(tales))
        Path("abc.txt").write_text("abc cab bac " * 100)
        prepare_data.main(["tales.txt", "--vocab_size=280", "--out_dir=data/tales"])
        prepare_data.main(["abc.txt", "--tokenizer=char", "--out_dir=data/abc"])
        train_gpt2.main([*ABC, "--out_dir=out/abc"])
        patch.setattr(train_gpt2.StopRequest, "requested", stop_after(2))
        train_gpt2.main(RUN)
    return folder


@pytest.fixture
def trained(trained_once, tmp_path, monkeypatch):
    """A copy of it, which is the current folder."""
    monkeypatch.setattr(train_gpt2, "matmul_speed", lambda *_: 1e9)
    shutil.copytree(trained_once, tmp_path / "here", symlinks=True)
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


# ---- The table -----------------------------------------------------------------------------------
# (script, arguments, parts of the message, what is damaged before, with these arguments)


def train(option, message, damage=None, *what):
    argv = [option] if "preset" in option else ["--data_dir=data/tales", *TINY, option]
    return train_gpt2, argv, message, damage, what


def data(message, damage=None, *what, more=()):
    return train_gpt2, [*RUN, *more], message, damage, what


def prepare(argv, message):
    return prepare_data, argv.split(), message, None, ()


def write(option, message, damage=None, *what):
    return sample, option.split(), message, damage, what


def ranges(case, values):
    """A case for each "name=value" that is out of range."""
    return [case(f"--{value}", f"{value.split('=')[0]} is ... it must be")
            for value in values.split()]


def shard(change, split="train"):
    """Change the header (256 int32) and tokens of a shard to what `change` returns."""
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
    if content is None:
        path.mkdir()
    else:
        path.write_bytes(content.encode() if isinstance(content, str) else content)


def meta_file(content):
    return data("meta.json", file, "data/tales/meta.json", content)


def meta(message="meta.json", **changes):
    """A case in which meta.json has these values; None removes a key."""
    def change(text):
        content = json.loads(text) | changes
        return json.dumps({key: value for key, value in content.items() if value is not None})
    return data(message, file, "data/tales/meta.json", change)


def tokenizer(**spec):
    return meta(tokenizer=spec)


def remove(path):
    shutil.rmtree(path) if Path(path).is_dir() else Path(path).unlink()


def remove_shards(split):
    for path in Path("data/tales").glob(f"*_{split}_*.bin"):
        path.unlink()


LONG = "x" * 5000


CASES = [
    # settings of train_gpt2.py: names, types, ranges
    train("--max_iters=5", "did you mean --max_steps"), train("--eval_interval=5", "--eval_every"),
    train("--log_interval=1", "--log_every"), train("--dataset=x", "--data_dir"),
    train("--compile=0", "--compile_model"), train("--lerning_rate=1", "--learning_rate"),
    train("--gradient_accumulation_steps=2", "--grad_accum_steps"),
    train("--max_steps", "--max_steps: expected one argument"), train("hello", "no setting"),
    train("--preset=gpt3", "no preset 'gpt3' ... gpt2"), train("--preset=", "no preset"),
    train("--max_steps=1" + "0" * 400, "max_steps is ... it must be"),
    train("--max_steps=1.5", "--max_steps: '1.5' must be a whole number"),
    train("--learning_rate=nan", "a number"), train("--learning_rate=inf", "a number"),
    train("--learning_rate=1" + "0" * 400, "a number"),
    *ranges(train, f"""max_steps=0 warmup_steps=-1 learning_rate=-1 min_lr=-1 weight_decay=-1
        grad_clip=-1 max_minutes=0 init_std=0 beta1=1 beta2=-0.1 dropout=1 block_size=0
        block_size=100000000 batch_size=0 batch_size=1000000000 total_batch_size=0
        total_batch_size=16000000000 grad_accum_steps=0 seed=-1 seed={2**64} eval_every=0
        eval_tokens=0 sample_every=0 checkpoint_every=0 log_every=0"""),
    train("--n_embd=97", "divisible by n_head"), train("--n_embd=0", "n_embd"),
    train("--n_head=0", "n_head"), train("--n_layer=-1", "n_layer"),
    train("--n_layer=10000000", "1,024"), train("--n_embd=1048576", "GB"),
    train("--total_batch_size=1000", "multiple of block_size"),
    train("--total_batch_size=96", "(96) must be a multiple ... batch_size * block_size (64)"),
    train("--device=abacus", "device"), train("--device=cuda:99", "cuda"),
    train("--eval_only", "no checkpoint out/stories/best.pt"),
    train("--init_from=resume", "no checkpoint resume"),
    train("--init_from=gpt2", "python prepare_data.py gpt2"),
    data("different tokenizers", more=["--eval_only", "--init_from=out/abc/best.pt"]),
    data("different tokenizers", more=["--init_from=out/abc/best.pt", "--out_dir=out/new"]),
    train("--preset=shakespeare_char", "python prepare_data.py shakespeare"),
    train("--preset=gpt2", "python prepare_data.py fineweb_edu"),
    # settings of prepare_data.py, beside what test_data.py has
    prepare("shakespear", "did you mean shakespeare?"), prepare("tales.json", ".jsonl"),
    prepare("nothing.txt", "no such file"), prepare("tales.txt abc.txt", "in quotes"),
    *ranges(lambda value, message: prepare(f"tales.txt {value}", message), f"""vocab_size=256
        vocab_size=70000 shard_tokens=1 max_tokens=1 val_fraction=1 seed=-1 seed={2**64}"""),
    prepare("tales.txt --vocab_size=290 --out_dir=data/tales", "another --out_dir"),
    prepare("tales.txt --out_dir=tales.txt", "tales.txt"),
    # settings of sample.py, and prompts
    *ranges(write, "temperature=-1 top_k=0 num_samples=0 max_new_tokens=0 seed=-1"),
    write("--device=abacus", "device"), write("--checkpoint=nowhere.pt", "no checkpoint"),
    write("--checkpoint=.", "name the best.pt"), write("--checkpoint=" + LONG, "no checkpoint"),
    write("--prompt=@", "prompt"), write("--strat=x", "no setting"), write("a b", "in quotes"),
    write("axe --checkpoint=out/abc/best.pt", "has no 'e'"), write("", "train one", remove, "out"),
    # folders
    train("--data_dir=nowhere", "prepare_data.py"), train("--data_dir=tales.txt", "no data"),
    train("--data_dir=out", "no train shards"), train("--data_dir=" + LONG, "no data"),
    train("--out_dir=tales.txt", "cannot write"), train("--out_dir=" + LONG, "cannot write"),
    train("--out_dir=tales.txt/in", "cannot write"), train("--init_from=none.pt", "no checkpoint"),
    train("--init_from=data/tales", "data/tales"), train("--init_from=tales.txt", "tales.txt"),
    data("no train shards", remove_shards, "train"), data("no val shards", remove_shards, "val"),
    data("cannot write", file, "out/run", b"a file where the run was"),
    data("cannot write", file, "out", b"a file where runs were"),
    data("ckpt.pt", file, "out/run/ckpt.pt", None), data("log.csv", file, "out/run/log.csv", None),
    data("samples.md", file, "out/run/samples.md", None),
    # shards
    data("is not a shard", shard, head(0, 20240521)), data("is not a shard", shard, head(1, 2)),
    data("cut short", shard, head(2, 10**6)), data("cut short", shard, head(2, -5)),
    data("cut short", shard, head(2, 0)), data("0 tokens", shard, fitting([])),
    data("cut short", shard, lambda header, tokens: (header, tokens[:-7])),
    data("is not a shard", shard, lambda header, tokens: (header[:100], tokens[:0])),
    data("is not a shard", shard, lambda header, tokens: (header[:0], tokens[:0])),
    data("holds token 9000", shard, fitting([279] + [9000] * 100)),
    data("holds token 9000", shard, fitting([279] + [9000] * 100), "val", more=["--eval_every=3"]),
    data("too few", shard, fitting([279])), data("too few", shard, fitting([279]), "val"),
    data("too few", shard, fitting([279] * 16), more=["--rows=stream"]),
    data("--rows=stream", more=["--data_dir=data/abc", "--rows=documents"]),
    # meta.json
    *map(meta_file, [b"", b"{'a': 1}", b"\xff\xfe", "[]", "[" * 10**5, None]),
    meta(tokenizer=None), meta(dataset=None), tokenizer(kind="word"), tokenizer(kind="bpe"),
    tokenizer(kind="bpe", ranks=["a", "a"]), tokenizer(kind="bpe", ranks=[1, 2]),
    tokenizer(kind="char", alphabet=""), tokenizer(kind="char", alphabet="aa"),
    tokenizer(kind="char", alphabet="\ud800"), tokenizer(kind="sentencepiece", model="none"),
    meta(entropy_floor="low"), meta(entropy_floor=math.nan), meta(landmarks=[1]),
    meta(landmarks={"unigram": "?"}), meta(skills={"wording": 0}),
    meta("another tokenizer", tokenizer=dict(kind="bpe", ranks=[chr(255 - i) for i in range(256)])),
]


@pytest.mark.parametrize("script, argv, message, damage, what", CASES, ids=[
    f"{case[0].__name__} {' '.join(case[1])[-40:]} {case[2]}" for case in CASES])
def test_mistakes(script, argv, message, damage, what, trained, capsys):
    if damage:
        damage(*what)
    before = hashes(trained)
    line = fails(script.main, argv, capsys)
    assert all(part in line for part in message.split(" ... "))
    after = hashes(trained)
    assert {path: after.get(path) for path in before} == before


def test_the_table_is_long():
    assert len(CASES) >= 75


def wrong_types():
    for script in (train_gpt2, prepare_data, sample):
        for name, kind in typing.get_type_hints(script.Settings).items():
            if kind is not str:
                yield script, name


@pytest.mark.parametrize("script, name", list(wrong_types()))
def test_every_setting_of_the_wrong_type(script, name, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert f"--{name}: '?' must be" in fails(script.main, [f"--{name}=?"], capsys)
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="nobody may write in /proc")
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


# ---- Checkpoints ---------------------------------------------------------------------------------


def refused(path, capsys):
    """Nothing samples from this checkpoint, resumes it, or starts from it; who resumes is told how
    to start over."""
    before = hashes(Path.cwd())
    line = fails(train_gpt2.main, RUN, capsys)
    assert str(path) in line and line.endswith(f"--out_dir={path.parent} --overwrite=True")
    assert str(path) in fails(sample.main, [f"--checkpoint={path}"], capsys)
    init = ["--out_dir=out/new", f"--init_from={path}"]
    assert str(path) in fails(train_gpt2.main, [*RUN, *init], capsys)
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
BIAS = "transformer.ln_f.bias"
DAMAGES = [
    put({}, "config"), put(32, "config", "n_embd"), put(5, "config", "n_head"),
    put(10**9, "config", "n_layer"), put(2**60, "config", "vocab_size"),
    put("two", "config", "n_layer"), put("red", "config", "color"), put(-16, "config", "n_embd"),
    put(math.nan, "config", "dropout"), put(torch.zeros(1), "model", "extra"),
    lambda c: c["model"].popitem(), put("/etc/passwd", "model", WTE), put(HUGE, "model", WTE),
    put(torch.zeros(16, dtype=torch.int64), "model", BIAS),
    put(torch.full((16,), math.nan), "model", BIAS),
    put(torch.sparse_coo_tensor(size=(10**6, 10**6), check_invariants=True), "model", WTE),
    put(torch.empty(10**6, 10**6, device="meta"), "model", WTE), put(None, "model"),
    lambda c: c.pop("tokenizer"),
    put({"kind": "x"}, "tokenizer"), put({"kind": "char", "alphabet": "abc"}, "tokenizer"),
    put("many", "step"), put(-3, "step"), put(math.nan, "best_val_loss"),
    put(torch.zeros(3), "settings", "seed"), lambda c: c.clear(),
]


@pytest.mark.parametrize("damage", range(len(DAMAGES)))
def test_a_checkpoint_that_does_not_fit(damage, trained, capsys):
    checkpoint = torch.load(CKPT, weights_only=True)
    DAMAGES[damage](checkpoint)
    torch.save(checkpoint, CKPT)
    refused(CKPT, capsys)


@pytest.mark.parametrize("damage", [
    put({}, "optimizer"), put({}, "optimizer", "state"), lambda c: c.pop("optimizer"),
    put(torch.zeros(3), "optimizer", "state", 1, "exp_avg_sq"),
    put(HUGE, "optimizer", "state", 0, "exp_avg"),
    lambda c: c["optimizer"]["state"].pop(0), put(3, "optimizer", "state", 0, "step"),
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
    """Files that would run code if anything unpickled them carelessly."""
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
    names = ["archive/data.pkl", "archive/version"]
    return [saved({"model": Bomb()}), saved(Bomb()), pickle.dumps(Bomb()),
            saved({"model": Bomb()}, _use_new_zipfile_serialization=False),
            zipped(names), zipped([*names, "archive/constants.pkl"]),  # TorchScript's mark
            zipped(names, zipfile.ZIP_DEFLATED)]


@pytest.mark.parametrize("content", bombs(), ids=range(7))
def test_a_pickle_is_not_run(content, trained, capsys):
    CKPT.write_bytes(content)
    refused(CKPT, capsys)
    assert not (trained / "exploded").exists()


# ---- Fuzzing -------------------------------------------------------------------------------------

often = hypothesis.settings(
    max_examples=2000 if FULL else 30, deadline=None, database=None, derandomize=not FULL)


def mutations(size):
    """Changes of some bytes: [(where, how many are replaced, by what)]."""
    length = st.sampled_from([1, 1, 1, 0, 4, 1000])
    change = st.tuples(st.integers(0, size - 1), length, st.binary(max_size=4))
    return st.lists(change, min_size=1, max_size=4)


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
    s = train_gpt2.Settings(n_layer=1, n_head=2, n_embd=16, block_size=16, device="cpu")
    data, world = train_gpt2.open_data(trained_once / "data" / "tales"), train_gpt2.World(s)
    model = train_gpt2.build_model(s, data, world)
    optimizer = train_gpt2.make_optimizer(model, s, world.device)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    clean_or_one_line(lambda: train_gpt2.GPT.from_checkpoint(path))
    clean_or_one_line(lambda: train_gpt2.load_training_state(
        path, model, optimizer, scaler, data.tokenizer))


# ---- The rest ------------------------------------------------------------------------------------


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_where_there_is_none(trained, capsys):
    assert "no device 'cuda'" in fails(train_gpt2.main, [*RUN, "--device=cuda"], capsys)


def test_gpt2_vocabulary_out_of_reach(monkeypatch, tmp_path, capsys):
    """A machine without network or cache gets the way out, not a traceback."""
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
    # Without clipping, a rate this high overflows within some steps
    line = fails(train_gpt2.main, [*small_run, "--learning_rate=1e9", "--grad_clip=0"], capsys)
    assert "step" in line and "lower --learning_rate" in line


def test_a_loss_that_is_not_finite_leaves_the_last_checkpoint(trained, capsys, monkeypatch):
    monkeypatch.setattr(train_gpt2.MLP, "forward", lambda self, x: x * float("nan"))
    before = CKPT.read_bytes()
    line = fails(train_gpt2.main, RUN, capsys)
    assert "step 3 has loss nan" in line and "at learning rate" in line
    assert CKPT.read_bytes() == before


def test_help_names_every_setting(capsys):
    for script in (train_gpt2, prepare_data, sample):
        with pytest.raises(SystemExit) as stop:
            script.main(["--help"])
        output = capsys.readouterr().out
        assert stop.value.code == 0 and max(map(len, output.splitlines())) <= 100
        words = " ".join(output.split())
        source = inspect.getsource(script.Settings)
        comments = re.findall(r"^    (\w+): .*? = (.*?)(?:  # (.*))?$", source, re.M)
        assert [name for name, _, _ in comments] == list(script.Settings.__dataclass_fields__)
        for name, _, comment in comments:
            value = str(getattr(script.Settings, name))
            assert " ".join(f"--{name} {value} {comment}".split()) in words
        for name in script.__dict__.get("PRESETS", ()) if script is train_gpt2 else ():
            assert f"\n  {name} " in output
