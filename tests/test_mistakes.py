"""A user's mistake gets one line and exit status 2, and harms nothing."""
import inspect
import io
import json
import math
import os
import pickle
import re
import shutil
import zipfile
from pathlib import Path

import pytest
import tiktoken
import torch
from conftest import RUN, TINY, Bomb, contents, fails

import prepare_data
import sample
import train_gpt2

CKPT = Path("out/run/ckpt.pt")


# ---- The table: arguments => parts of the message. LONG is a name of 5,000 letters ----

TRAIN = """
--max_iters=5 => did you mean --max_steps  --lerning_rate=1 => --learning_rate
--max_steps => expected one argument
hello => 'hello' is not a setting  --preset=gpt3 => no preset 'gpt3' ... gpt2
--max_steps=1.5 => --max_steps: expected int
--n_embd=97 => n_embd 97 is not a multiple of n_head 2  --n_layer=10000000 => to 1,024
--n_embd=1048576 => to 65,536  --total_batch_size=1000 => must be a multiple of block_size
--total_batch_size=96 => (96) must be a multiple ... batch_size * block_size (64)
--device=cuda:99 => torch has no device
--eval_only => no checkpoint out/stories/best.pt  --init_from=resume => no checkpoint resume
--init_from=gpt2 => python prepare_data.py gpt2
--init_from=tales.txt => not a valid checkpoint
--init_from=out/abc/best.pt => different tokenizers
--data_dir=data/abc --rows=documents => --rows=stream  --data_dir=nowhere => no train shards
--data_dir=tales.txt => no train shards  --data_dir=out => no train shards
--data_dir=LONG => no train shards
--out_dir=tales.txt => cannot write  --out_dir=LONG => cannot write
""" + "  ".join(f"--{value} => {value.split('=')[0]} is ... it must be from" for value in f"""
max_steps=0 max_steps=1{'0' * 400} warmup_steps=-1 learning_rate=nan
learning_rate=inf min_lr=-1 weight_decay=-1 grad_clip=-1 init_std=0 beta1=1 beta2=-0.1 dropout=1
block_size=0 block_size=100000000 batch_size=0 total_batch_size=16000000000
grad_accum_steps=0 n_head=0 seed=-1 seed={2**64} eval_every=0 eval_tokens=0 log_every=0""".split())
PREPARE = """
shakespear => did you mean shakespeare  nothing.txt => no such file
tales.txt --out_dir=tales.txt => use tales.txt
tales.txt --vocab_size=290 --out_dir=data/tales => another --out_dir
""" + "  ".join(f"tales.txt --{value} => it must be from" for value in (
    "vocab_size=256 vocab_size=70000 shard_tokens=1 val_fraction=1".split()))
SAMPLE = "  ".join(f"--{value} => it must be from" for value in (
    "temperature=-1 top_k=0 top_p=0 num_samples=0 max_new_tokens=0".split())) + """
--device=abacus => no device  --checkpoint=nowhere.pt => no checkpoint
--checkpoint=. => name a run's best.pt  --checkpoint=gpt2 => python prepare_data.py gpt2
--checkpoint=binary => not a valid checkpoint  hello there => put it in quotes
axe --checkpoint=out/abc/best.pt => lacks 'ex'  @nowhere.txt => the prompt from nowhere.txt
@out => cannot read  @ => a file without a name  @binary => not UTF-8
--explain --num_samples=2 => one text  --interactive hello => the prompt
--export=x hello => no text
"""


def table():
    for script, text in ((train_gpt2, TRAIN), (prepare_data, PREPARE), (sample, SAMPLE)):
        for argv, message in re.findall(r"(\S.*?) => (.*?)(?:  |\n|$)", text):
            argv = argv.replace("LONG", "x" * 5000).split()
            if script is train_gpt2 and "preset" not in argv[0]:
                argv = ["--data_dir=data/tales", *TINY, *argv]
            yield script, argv, message


@pytest.mark.parametrize("script, argv, message", [*table()])
def test_bad_options(script, argv, message, trained, capsys):
    Path("binary").write_bytes(b"\xff\xfe\x00")
    harmless(script, argv, message, capsys)


def harmless(script, argv, message, capsys):
    before = contents(Path.cwd())
    line = fails(script.main, argv, capsys)
    assert all(part in line for part in message.split(" ... "))
    after = contents(Path.cwd())
    assert {path: after.get(path) for path in before} == before


def file(path, content):
    """content: text, a function of the old text, or None for a folder."""
    path = Path(path)
    if callable(content):
        content = content(path.read_text(encoding="utf-8"))
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    if content is None:
        path.mkdir()
    else:
        path.write_bytes(content.encode() if isinstance(content, str) else content)


def shard(split, tokens):
    """A shard with these tokens; None: without the last of its own; []: no shard."""
    path = next(Path("data/tales").glob(f"*_{split}_*.bin"))
    if tokens:
        prepare_data.write_shard(path, tokens)
    else:
        path.unlink() if tokens == [] else os.truncate(path, path.stat().st_size - 2)


def meta(**changes):
    """meta.json has these values; None removes a key."""
    def change(text):
        content = json.loads(text) | changes
        return json.dumps({key: value for key, value in content.items() if value is not None})
    return "meta.json", file, "data/tales/meta.json", change


def tokenizer(**spec):
    return meta(tokenizer=spec)


DAMAGED = [  # message, damage, its arguments
    ("cannot write", file, "out/run", b"a file"), ("cannot write", file, "out", b"a file"),
    ("ckpt.pt", file, CKPT, None), ("log.csv", file, "out/run/log.csv", None),
    ("no train shards", shard, "train", []), ("no val shards", shard, "val", []),
    ("is incomplete", shard, "val", None),
    ("holds token 9000", shard, "val", [279] + [9000] * 100),
    ("too few", shard, "train", [279]), ("too few", shard, "val", [279]),
    *(("meta.json", file, "data/tales/meta.json", content)
      for content in (b"", b"{'a': 1}", b"\xff\xfe", "[" * 10**5, None)),
    meta(tokenizer=None), tokenizer(kind="word"),
    tokenizer(kind="bpe", ranks=["a", "a"]), tokenizer(kind="bpe", ranks=[1, 2]),
    tokenizer(kind="char", alphabet="\ud800"), tokenizer(kind="char", alphabet=""),
    tokenizer(kind="sentencepiece", model="none"),
    meta(landmarks=[1]), meta(skills={"wording": 0}),
    # The run's tokenizer has 280 tokens too
    ("different tokenizers", *tokenizer(kind="bpe", ranks=[*map(chr, range(256)), *("th" * i for i in range(
        1, 24))])[1:]),
]


@pytest.mark.parametrize("message, damage, what", [(m, d, what) for m, d, *what in DAMAGED])
def test_damaged_files(message, damage, what, trained, capsys):
    damage(*what)
    harmless(train_gpt2, [*RUN, "--eval_every=3"], message, capsys)


# ---- Checkpoints ----


def refused(capsys):
    """Nothing resumes, samples or starts from it; a way out is named."""
    harmless(train_gpt2, RUN, f"{CKPT} ... --out_dir={CKPT.parent} --overwrite", capsys)
    harmless(sample, [f"--checkpoint={CKPT}"], f"{CKPT}", capsys)
    harmless(train_gpt2, [*RUN, "--out_dir=out/new", f"--init_from={CKPT}"], f"{CKPT}", capsys)


@pytest.mark.parametrize("place", [0, 0.05, 0.3, 0.6, 0.95, 0.99999])
def test_a_checkpoint_cut_short(place, trained, capsys):
    os.truncate(CKPT, int(place * CKPT.stat().st_size))
    refused(capsys)


def put(value, *path):
    """A change of a checkpoint: this value at a path of keys."""
    def change(checkpoint):
        for key in path[:-1]:
            checkpoint = checkpoint[key]
        checkpoint[path[-1]] = value
    return change


def change_checkpoint(change):
    checkpoint = torch.load(CKPT, weights_only=True)
    change(checkpoint)
    torch.save(checkpoint, CKPT)


WTE = "transformer.wte.weight"
HUGE = torch.zeros(1).expand(10**6, 10**6)  # claims 4 TB


@pytest.mark.parametrize("change", [
    put({}, "config"), put(32, "config", "n_embd"), put(2**60, "config", "vocab_size"),
    put("two", "config", "n_layer"), put("red", "config", "color"),
    put(torch.zeros(1), "model", "extra"), lambda c: c["model"].popitem(), put(HUGE, "model", WTE),
    put(torch.zeros(16).long(), "model", "transformer.ln_f.bias"),
    put(torch.sparse_coo_tensor(size=(10**6, 10**6), check_invariants=True), "model", WTE),
    put(torch.empty(10**6, 10**6, device="meta"), "model", WTE), put(None, "model"),
    lambda c: c.pop("tokenizer"), put({"kind": "x"}, "tokenizer"),
    put({"kind": "char", "alphabet": "abc"}, "tokenizer"), put("many", "step"), put(-3, "step"),
    put(math.nan, "best_val_loss"), lambda c: c.clear()])
def test_a_checkpoint_that_does_not_fit(change, trained, capsys):
    change_checkpoint(change)
    refused(capsys)


@pytest.mark.parametrize("change", [
    put({}, "optimizer"), lambda c: c.pop("optimizer"),
    put(torch.zeros(3), "optimizer", "state", WTE, "exp_avg_sq"),
    put(HUGE, "optimizer", "state", WTE, "exp_avg"),
    put(3, "optimizer", "state", WTE, "step")])
def test_an_optimizer_that_does_not_fit(change, trained, capsys):
    change_checkpoint(change)
    harmless(train_gpt2, RUN, "optimizer ... --overwrite", capsys)
    assert train_gpt2.main([*RUN, "--overwrite"]) == 0


def bombs():
    """Files that run code if anything unpickles them carelessly."""
    for value, options in ((Bomb(), {}), ({"model": Bomb()}, {}),
                           (Bomb(), {"_use_new_zipfile_serialization": False})):
        box = io.BytesIO()
        torch.save(value, box, **options)
        yield box.getvalue()
    yield pickle.dumps(Bomb())
    for compression in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        box = io.BytesIO()
        with zipfile.ZipFile(box, "w", compression) as archive:
            for part in ("data.pkl", "version", "constants.pkl"):  # TorchScript has the last one
                archive.writestr(f"archive/{part}", pickle.dumps(Bomb(), 2))
        yield box.getvalue()


@pytest.mark.parametrize("content", [*bombs()], ids=range(6))
def test_a_pickle_is_not_run(content, trained, capsys):
    CKPT.write_bytes(content)
    refused(capsys)
    assert not (trained / "exploded").exists()


# ---- The rest ----


def test_gpt2_vocabulary_out_of_reach(trained, monkeypatch, capsys):
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: 1 / 0)  # no network
    harmless(prepare_data, ["tales.txt", "--tokenizer=gpt2"],
             "TIKTOKEN_CACHE_DIR ... --tokenizer=bpe", capsys)


def test_a_loss_that_is_not_finite(trained, capsys, monkeypatch):
    monkeypatch.setattr(train_gpt2.MLP, "forward", lambda self, x: x * math.nan)
    before = CKPT.read_bytes()
    assert "step 3 has loss nan" in fails(train_gpt2.main, RUN, capsys)
    assert CKPT.read_bytes() == before


def test_help_names_every_setting(capsys):
    for script in (train_gpt2, prepare_data, sample):
        with pytest.raises(SystemExit) as stop:
            script.main(["--help"])
        output, cls = capsys.readouterr().out, script.Settings
        assert stop.value.code == 0 and max(map(len, output.splitlines())) <= 100
        comments = re.findall(r"^    (\w+): .*  # (.*)$", inspect.getsource(cls), re.M)
        assert [name for name, _ in comments] == list(cls.__dataclass_fields__)
        for name, comment in comments:
            default = getattr(cls, name)
            if isinstance(default, bool):
                words = f"--{name}, --no-{name} {comment}".split()
            else:
                words = f"--{name} {default} {comment}".split()
            assert " ".join(words) in " ".join(output.split())
        if script is train_gpt2:
            assert all(f"\n  {name}\n" in output for name in script.PRESETS)
