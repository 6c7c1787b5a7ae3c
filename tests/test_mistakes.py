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
from conftest import RUN, TINY, Bomb, contents, fails, put

import prepare_data
import sample
import train_gpt2

CKPT = Path("out/run/ckpt.pt")


# ---- Options ----

LONG = "x" * 5000
# Arguments | parts of the message
TRAIN = f"""\
--max_iters=5 | did you mean --max_steps
--lerning_rate=1 | --learning_rate
--lr=1 | did you mean --learning_rate
-f kernel.json | in a notebook, call main([])
--batch_size=none | --batch_size: expected int
--max_steps=none | --max_steps: expected int
--max_steps | expected one argument
hello | 'hello' is not a setting
--preset=gpt3 | no preset 'gpt3' ... gpt2
--max_steps=1.5 | --max_steps: expected int
--n_embd=97 | n_embd 97 is not a multiple of n_head 2
--n_layer=10000000 | to 1,024
--n_embd=1048576 | to 65,536
--total_batch_size=1000 | must be a multiple of block_size
--total_batch_size=96 | (96) must be a multiple ... batch_size * block_size (64)
--device=cuda:99 | torch has no device
--eval_only | no checkpoint out/stories/best.pt
--init_from=resume | no checkpoint resume
--init_from=gpt2 | python prepare_data.py gpt2
--init_from=tales.txt | not a valid checkpoint
--init_from=out/abc/best.pt | different tokenizers
--init_from=out/run/ckpt.pt --block_size=512 | has a context of 16
--init_from=out/run/ckpt.pt --n_layer=3 | has n_layer=1
--preset=finetune | finetune needs weights
--data_dir=data/abc --rows=documents | --rows=stream
--data_dir=nowhere | no train shards
--data_dir=tales.txt | no train shards
--data_dir=out | no train shards
--data_dir={LONG} | no train shards
--out_dir=tales.txt | cannot write
--out_dir={LONG} | cannot write"""
PREPARE = """\
shakespear | did you mean shakespeare
nothing.txt | no such file
tales.txt --out_dir=tales.txt | use tales.txt
tales.txt --vocab_size=290 --out_dir=data/tales | another --out_dir"""
SAMPLE = """\
--device=abacus | no device
--sed=1 | did you mean --seed
--temperature=none | --temperature: expected float
w\udce4s | not UTF-8
--checkpoint=nowhere.pt | no checkpoint
--checkpoint=. | name a run's best.pt
--checkpoint=gpt2 | python prepare_data.py gpt2
--checkpoint=binary | not a valid checkpoint
hello there | put it in quotes
axe --checkpoint=out/abc/best.pt | lacks 'ex'
@nowhere.txt | the prompt from nowhere.txt
@out | cannot read
@ | (@ names a file)
@binary | not UTF-8
--explain --num_samples=2 | one text
--interactive hello | the prompt
--export=x hello | no text"""
# Numbers that are too small, too large or none
OUT_OF_RANGE = {
    train_gpt2: f"""
        max_steps=0 max_steps=1{'0' * 400} warmup_steps=-1 learning_rate=nan learning_rate=inf
        min_lr=-1 weight_decay=-1 grad_clip=-1 init_std=0 beta1=1 beta2=-0.1 dropout=1 block_size=0
        block_size=100000000 batch_size=0 total_batch_size=16000000000 grad_accum_steps=0 n_head=0
        seed=-1 seed={2**64} eval_every=0 eval_tokens=0 log_every=0""",
    prepare_data: "vocab_size=256 vocab_size=70000 shard_tokens=1 val_fraction=1",
    sample: "temperature=-1 top_k=0 top_p=0 num_samples=0 max_new_tokens=0",
}


def bad_options():
    """(script, arguments, parts of the message)"""
    for script, messages in ((train_gpt2, TRAIN), (prepare_data, PREPARE), (sample, SAMPLE)):
        for row in messages.splitlines():
            yield script, *row.split(" | ")
    for script, options in OUT_OF_RANGE.items():
        for option in options.split():
            name, _, _ = option.partition("=")
            source = "tales.txt " if script is prepare_data else ""
            yield script, f"{source}--{option}", f"{name} is ... it must be from"


@pytest.mark.parametrize("script, argv, message", [*bad_options()])
def test_bad_options(script, argv, message, trained, capsys):
    Path("binary").write_bytes(b"\xff\xfe\x00")
    argv = argv.split()
    if script is train_gpt2 and argv != ["--preset=gpt3"]:
        argv = ["--data_dir=data/tales", *TINY, *argv]
    harmless(script, argv, message, capsys)


def harmless(script, argv, message, capsys):
    before = contents(Path.cwd())
    line = fails(script.main, argv, capsys)
    for part in message.split(" ... "):
        assert part in line
    after = contents(Path.cwd())
    for path in before:
        assert after.get(path) == before[path], path


# ---- Files ----

META = Path("data/tales/meta.json")
TRAIN_SHARD = Path("data/tales/tales_train_000001.bin")
VAL_SHARD = Path("data/tales/tales_val_000000.bin")


def remove(path):
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()


def write(path, content):
    remove(path)
    path.write_bytes(content)


def make_folder(path):
    remove(path)
    path.mkdir()


def cut_off_a_token(path):
    os.truncate(path, path.stat().st_size - 2)


@pytest.mark.parametrize("message, path, damage, content", [
    ("cannot write", "out/run", write, [b"a file"]),
    ("cannot write", "out", write, [b"a file"]),
    ("ckpt.pt", CKPT, make_folder, []),
    ("log.csv", "out/run/log.csv", make_folder, []),
    ("no train shards", TRAIN_SHARD, remove, []),
    ("no val shards", VAL_SHARD, remove, []),
    ("is incomplete", VAL_SHARD, cut_off_a_token, []),
    ("holds token 9000", VAL_SHARD, prepare_data.write_shard, [[279] + [9000] * 100]),
    ("too few", TRAIN_SHARD, prepare_data.write_shard, [[279]]),
    ("too few", VAL_SHARD, prepare_data.write_shard, [[279]]),
    ("is not complete", META, lambda path: path.rename(path.with_name("unfinished.json")), []),
    ("meta.json", META, make_folder, []),
    ("meta.json", META, write, [b""]),
    ("meta.json", META, write, [b"{'a': 1}"]),
    ("meta.json", META, write, [b"\xff\xfe"]),
    ("meta.json", META, write, [b"[" * 10**5]),
])
def test_damaged_files(message, path, damage, content, trained, capsys):
    damage(Path(path), *content)
    harmless(train_gpt2, [*RUN, "--eval_every=3"], message, capsys)


@pytest.mark.parametrize("name, value", [
    ("landmarks", [1]),
    ("skills", {"wording": 0}),
    ("tokenizer", None),
    ("tokenizer", {"kind": "word"}),
    ("tokenizer", {"kind": "bpe", "ranks": ["a", "a"]}),
    ("tokenizer", {"kind": "bpe", "ranks": [1, 2]}),
    ("tokenizer", {"kind": "char", "alphabet": "\ud800"}),
    ("tokenizer", {"kind": "char", "alphabet": ""}),
    ("tokenizer", {"kind": "sentencepiece", "model": "none"}),
])
def test_meta_json_that_does_not_fit(name, value, trained, capsys):
    content = json.loads(META.read_text(encoding="utf-8"))
    put(content, name, value)
    META.write_text(json.dumps(content), encoding="utf-8")
    harmless(train_gpt2, RUN, "meta.json", capsys)


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


def change_checkpoint(where, value):
    checkpoint = torch.load(CKPT, weights_only=True)
    put(checkpoint, where, value)
    torch.save(checkpoint, CKPT)


WTE = "transformer.wte.weight"
HUGE = torch.zeros(1).expand(10**6, 10**6)  # claims 4 TB
HUGE_SPARSE = torch.sparse_coo_tensor(size=HUGE.shape, check_invariants=True)


@pytest.mark.parametrize("where, value", [
    ("config", {}),
    ("config n_embd", 32),
    ("config vocab_size", 2**60),
    ("config n_layer", "two"),
    ("config color", "red"),
    ("model", "none"),
    ("model extra", torch.zeros(1)),
    ("model transformer.ln_f.bias", torch.zeros(16).long()),
    ("model transformer.ln_f.bias", None),
    (f"model {WTE}", HUGE),
    (f"model {WTE}", HUGE_SPARSE),
    (f"model {WTE}", HUGE.to("meta")),
    ("tokenizer", {"kind": "x"}),
    ("tokenizer", {"kind": "char", "alphabet": "abc"}),
    ("tokenizer", None),
    ("step", "many"),
    ("step", -3),
    ("best_val_loss", math.nan),
])
def test_a_checkpoint_that_does_not_fit(where, value, trained, capsys):
    change_checkpoint(where, value)
    refused(capsys)


@pytest.mark.parametrize("where, value", [
    ("optimizer", {}),
    ("optimizer", None),
    (f"optimizer state {WTE} exp_avg_sq", torch.zeros(3)),
    (f"optimizer state {WTE} exp_avg", HUGE),
    (f"optimizer state {WTE} step", 3),
])
def test_an_optimizer_that_does_not_fit(where, value, trained, capsys):
    change_checkpoint(where, value)
    harmless(train_gpt2, RUN, "optimizer ... --overwrite", capsys)
    assert train_gpt2.main([*RUN, "--overwrite"]) == 0


def saved_bomb(value, **options):
    box = io.BytesIO()
    torch.save(value, box, **options)
    return box.getvalue()


def archived_bomb():
    box = io.BytesIO()
    with zipfile.ZipFile(box, "w") as archive:
        for part in ("data.pkl", "version", "constants.pkl"):  # TorchScript has the last one
            archive.writestr(f"archive/{part}", pickle.dumps(Bomb(), 2))
    return box.getvalue()


BOMBS = {  # files that run code if anything unpickles them carelessly
    "a checkpoint": saved_bomb(Bomb()),
    "inside a checkpoint": saved_bomb({"model": Bomb()}),
    "an old checkpoint": saved_bomb(Bomb(), _use_new_zipfile_serialization=False),
    "a pickle": pickle.dumps(Bomb()),
    "an archive": archived_bomb(),
}


@pytest.mark.parametrize("kind", BOMBS)
def test_a_pickle_is_not_run(kind, trained, capsys):
    CKPT.write_bytes(BOMBS[kind])
    refused(capsys)
    assert not (trained / "exploded").exists()


# ---- The rest ----


def test_a_whole_number_may_have_an_exponent():
    s, _ = train_gpt2.parse_settings(train_gpt2.Settings, ["--max_steps=1e3"])
    assert s.max_steps == 1000


def test_gpt2_vocabulary_out_of_reach(trained, monkeypatch, capsys):
    """No checkpoint is blamed for it."""
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: 1 / 0)  # no network
    harmless(prepare_data, ["tales.txt", "--tokenizer=gpt2"],
             "TIKTOKEN_CACHE_DIR ... --tokenizer=bpe", capsys)
    change_checkpoint("tokenizer", {"kind": "gpt2"})
    line = fails(sample.main, [f"--checkpoint={CKPT}"], capsys)
    assert "TIKTOKEN_CACHE_DIR" in line
    assert "valid" not in line


def test_a_loss_that_is_not_finite(trained, capsys, monkeypatch):
    monkeypatch.setattr(train_gpt2.MLP, "forward", lambda self, x: x * math.nan)
    before = CKPT.read_bytes()
    assert "step 3 has loss nan" in fails(train_gpt2.main, RUN, capsys)
    assert CKPT.read_bytes() == before


@pytest.mark.parametrize("script", [train_gpt2, prepare_data, sample])
def test_help_names_every_setting_and_preset(script, capsys):
    with pytest.raises(SystemExit) as stop:
        script.main(["--help"])
    assert stop.value.code == 0
    output = capsys.readouterr().out
    for line in output.splitlines():
        assert len(line) <= 100
    words = " ".join(output.split())
    source = inspect.getsource(script.Settings)
    comments = dict(re.findall(r"^    (\w+): .*  # (.*)$", source, re.M))
    for name, field in script.Settings.__dataclass_fields__.items():
        value = field.default
        option = f"--{name}, --no-{name}" if isinstance(value, bool) else f"--{name} {value}"
        assert " ".join(f"{option} {comments[name]}".split()) in words
    for name in train_gpt2.PRESETS:
        assert script is not train_gpt2 or f"\n  {name}\n" in output
