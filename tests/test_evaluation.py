"""What a run says of itself: losses by skill, HellaSwag, the picture, the report."""
import json
import math
import re
import threading
import time
import xml.etree.ElementTree as ElementTree
from concurrent.futures import ThreadPoolExecutor

import first_principles
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import FULL, fails, log_of
from test_model import arrays, to_transformers
from test_training import stop_after

import prepare_data
import train_gpt2
from train_gpt2 import (
    GPT,
    GPTConfig,
    Settings,
    ShardedLoader,
    World,
    evaluate,
    hellaswag,
    open_data,
)


@pytest.fixture(autouse=True)
def no_measuring(monkeypatch):
    """The speed of this machine is not the question here."""
    monkeypatch.setattr(train_gpt2, "matmul_speed", lambda *_: 1e11)


def small_model(data, **changes):
    torch.manual_seed(0)
    shape = dict(block_size=112, n_layer=2, n_head=2, n_embd=32) | changes
    model = GPT(GPTConfig(vocab_size=data.vocab_size, **shape))
    model.tokenizer = data.tokenizer
    return model


def evaluated(folder, model=None, **settings):
    data = open_data(folder)
    s = Settings(data_dir=str(folder), device="cpu", dtype="float32", **settings)
    loader = ShardedLoader(folder, "val", s.block_size, s.rows, None, data.vocab_size, data.eot)
    return evaluate(model or small_model(data), loader, s, World(s), data)


def val_tokens(folder):
    paths = train_gpt2.shard_paths(folder)["val"]
    return np.concatenate([train_gpt2.read_shard(path) for path in paths]).tolist()


@pytest.mark.parametrize("rows", ["documents", "stream"])
def test_validation_loss_agrees_with_numpy(rows, stories, tmp_path):
    """Loss, bits per byte and skills, from the shard itself by a NumPy GPT-2 with large weights."""
    model, data = small_model(open_data(stories)), open_data(stories)
    with torch.no_grad():
        model.transformer.wte.weight *= 20
    tokens, T, eot, params = val_tokens(stories), 112, data.eot, arrays(model, np.float64)
    if rows == "documents":
        starts = [i for i, token in enumerate(tokens[:-1]) if token == eot]
        ends = [*starts[1:], len(tokens) - 1]
    else:
        starts, ends = range(0, 40 * T, T), range(T, 41 * T, T)
    nats, labels, targets = [], [], []
    for start, end in zip(starts, ends, strict=True):
        logits, _ = first_principles.forward(params, np.array([tokens[start:end]]), n_head=2)
        y = tokens[start + 1:end + 1]
        shifted = logits[0] - logits[0].max(axis=-1, keepdims=True)
        nats += (np.log(np.exp(shifted).sum(axis=-1)) - shifted[np.arange(len(y)), y]).tolist()
        labels += data.skills[start + 1:end + 1].tolist()
        targets += y
    found = evaluated(stories, model, rows=rows,
                      eval_tokens=None if rows == "documents" else 40 * T)
    assert found["val_loss"] == pytest.approx(np.mean(nats), abs=1e-5)
    size = len(data.tokenizer.decode_bytes([token for token in targets if token != eot]))
    bits = sum(nats) / math.log(2) / size
    assert found["val_bits_per_byte"] == pytest.approx(bits, abs=1e-5)
    assert ("above_floor" in found) == (rows == "documents")
    if rows == "documents":
        assert add_up(found) and found["val_loss"] - found["above_floor"] == pytest.approx(
            data.meta["entropy_floor"], abs=1e-12)
        for number, (name, floor) in enumerate(data.meta["skills"].items()):
            its = sum(n for n, label in zip(nats, labels, strict=True) if label == number)
            expected = its / len(nats) - floor
            assert found[f"above_floor_{name}"] == pytest.approx(expected, abs=1e-5)


def add_up(found):
    skills = sum(found[f"above_floor_{name}"] for name in prepare_data.SKILLS)
    return skills == pytest.approx(found["above_floor"], abs=1e-12)


def test_a_uniform_model_has_the_bits_that_its_tokenizer_needs(tmp_path, gpt2_vocabulary):
    text = "Each tokenizer writes the same text with its own tokens: naïve, 漢字, 12 345. " * 40
    (tmp_path / "text.txt").write_text(text, encoding="utf-8")
    for kind in ("gpt2", "bpe", "char"):
        folder = tmp_path / kind
        prepare_data.main([str(tmp_path / "text.txt"), f"--tokenizer={kind}", "--vocab_size=300",
                           f"--out_dir={folder}"])
        data = open_data(folder)
        model = small_model(data, block_size=32)
        torch.nn.init.zeros_(model.transformer.wte.weight)
        tokens = val_tokens(folder)
        size = len(data.tokenizer.decode_bytes([t for t in tokens[1:] if t != data.eot]))
        found = evaluated(folder, model, rows="stream", block_size=32)
        expected = math.log2(data.vocab_size) * (len(tokens) - 1) / size
        assert found["val_bits_per_byte"] == pytest.approx(expected, rel=1e-6)
        assert found["val_loss"] == pytest.approx(math.log(data.vocab_size), rel=1e-6)


def test_the_stories_tell_the_skill_of_every_token(stories):
    """As a reader finds it: a name that was told is recalled, other fixed words are wording."""
    data, tokens = open_data(stories), val_tokens(stories)
    meta, skills, grammar = data.meta, data.skills, prepare_data
    assert sum(meta["skills"].values()) == meta["entropy_floor"] and meta["skills"]["wording"] == 0
    told, pronouns = set(), ("he", "she", "him", "his", "her", "boy", "girl")
    for i, (token, skill) in enumerate(zip(tokens, skills, strict=True)):
        word, skill = data.tokenizer.decode([token]).strip(), grammar.SKILLS[skill]
        if token == data.eot:
            told = set()
        elif word in grammar.HEROES or word in grammar.THINGS:
            assert skill == ("recall" if word in told else "choices"), i
            told.add(word)
        elif word in pronouns and told & grammar.HEROES.keys():
            assert skill == "recall"
        elif word in (*grammar.TRAITS, "Luckily", "Poor", "Once"):
            assert skill == "choices"
        elif word in ("named", "who", "morning", "anything", "evening", ".", ","):
            assert skill == "wording", i


@pytest.mark.parametrize("tokenizer", ["char", "gpt2"])
def test_skills_with_other_tokenizers_add_up(tokenizer, tmp_path, monkeypatch, gpt2_vocabulary):
    monkeypatch.setattr(prepare_data, "STORIES", 60)
    folder = tmp_path / "data"
    prepare_data.main(["stories", f"--tokenizer={tokenizer}", f"--out_dir={folder}",
                       "--shard_tokens=150"])
    data, tokens = open_data(folder), val_tokens(folder)
    recalled = [token for token, skill in zip(tokens, data.skills, strict=True) if skill == 2]
    assert recalled and "lived" not in data.tokenizer.decode(recalled)
    if tokenizer == "gpt2":  # documents cross these small shards
        assert add_up(evaluated(folder, rows="documents", block_size=112))


def questions_of(shared_file, count):
    lines = shared_file("hellaswag_val_first1000.jsonl").read_text(encoding="utf-8").splitlines()
    questions = [json.loads(line) for line in lines[:count]]
    return [(each["ctx"], [" " + ending for ending in each["endings"]], each["label"])
            for each in questions]


@pytest.mark.parametrize("block_size", [1024, 40])
def test_hellaswag_chooses_as_transformers_does(block_size, shared_file, gpt2_vocabulary):
    questions = questions_of(shared_file, 1000 if FULL else 30)
    questions.append(("The", [" cat sat", " dog", " sky is blue today", " end"], 0))  # one token
    data = train_gpt2.Data({}, gpt2_vocabulary)
    model = small_model(data, block_size=block_size)
    theirs, encode, T = to_transformers(model), gpt2_vocabulary.encode, block_size
    chosen = hellaswag(model, questions, World(Settings(device="cpu", dtype="float32")))
    for (context, endings, _), choices in zip(questions, chosen.tolist(), strict=True):
        endings = [encode(ending)[:T] for ending in endings]
        context, losses = encode(context)[-(T + 1 - max(map(len, endings))):], []
        for ending in endings:
            ids = torch.tensor([context + ending])
            with torch.no_grad():
                logits = theirs(ids[:, :-1]).logits[0, -len(ending):]
            nats = F.cross_entropy(logits, torch.tensor(ending), reduction="none")
            losses.append((nats.sum().item(), nats.mean().item()))
        assert choices == np.argmin(losses, axis=0).tolist()


def test_hellaswag_by_itself_and_in_a_run(shared_file, gpt2_vocabulary, tmp_path, monkeypatch,
                                          capsys):
    monkeypatch.chdir(tmp_path)
    lines = shared_file("hellaswag_val_first1000.jsonl").read_text(encoding="utf-8").splitlines()
    path = tmp_path / "data" / "hellaswag" / "hellaswag_val.jsonl"
    path.parent.mkdir(parents=True)
    path.write_text("\n".join(lines[:12]), encoding="utf-8")
    text = "Some words to train on, and to be validated by. " * 100
    (tmp_path / "text.txt").write_text(text, encoding="utf-8")
    prepare_data.main(["text.txt", "--tokenizer=gpt2", "--out_dir=data/text"])
    assert train_gpt2.main(["--data_dir=data/text", "--rows=stream", "--max_steps=2", "--n_layer=1",
                            "--n_embd=16", "--block_size=64", "--batch_size=2", "--dtype=float32",
                            "--device=cpu"]) == 0
    said = re.search(r"HellaSwag (acc [\d.]+%, acc_norm [\d.]+%)", capsys.readouterr().out)[1]
    row = log_of(tmp_path / "out" / "stories")[-1]
    assert said == f"acc {float(row['hellaswag_acc']):.2%}, " \
                   f"acc_norm {float(row['hellaswag_acc_norm']):.2%}"
    assert said in (tmp_path / "out" / "stories" / "report.md").read_text(encoding="utf-8")
    argv = ["--eval_only", "--init_from=out/stories/ckpt.pt", "--dtype=float32"]
    for data, both in (("--data_dir=data/hellaswag", False), ("--data_dir=data/text", True)):
        assert train_gpt2.main([*argv, data, "--rows=stream"]) == 0
        output = capsys.readouterr().out
        assert said in output and ("validation loss" in output) == both
    path.write_text('{"ctx": "broken"}', encoding="utf-8")
    assert "python prepare_data.py hellaswag" in fails(train_gpt2.main, [*argv, data], capsys)


@pytest.mark.skipif(not FULL, reason="minutes of work: FULL_TESTS=1")
def test_hellaswag_takes_ten_questions_a_second(shared_file, gpt2_vocabulary):
    """GPT-2 124M on two CPU cores."""
    data = train_gpt2.Data({}, gpt2_vocabulary)
    model = small_model(data, block_size=1024, n_layer=12, n_head=12, n_embd=768)
    questions, world = questions_of(shared_file, 200), World(Settings(device="cpu"))
    train_gpt2.keep_memory()
    torch.set_num_threads(2)
    began = time.perf_counter()
    hellaswag(model, questions, world)
    speed = len(questions) / (time.perf_counter() - began)
    torch.set_num_threads(1)
    assert speed > 10


class Together(World):
    """One of several processes, which here are threads that meet in reduce()."""

    def __init__(self, s, rank, size, meeting, sums):
        super().__init__(s)
        self.rank, self.size, self.meeting, self.sums = rank, size, meeting, sums

    def reduce(self, tensor, largest=False):
        self.sums[self.rank] = tensor
        self.meeting.wait()
        return sum(self.sums[rank] for rank in reversed(range(self.size)))


def test_every_number_of_processes_finds_the_same(stories, shared_file, gpt2_vocabulary):
    """To the last bit, in validation losses; and the same choices."""
    data, questions = open_data(stories), questions_of(shared_file, 20)
    s = Settings(data_dir=str(stories), device="cpu", dtype="float32", eval_tokens=20_000)
    loader = ShardedLoader(stories, "val", s.block_size, s.rows, None, data.vocab_size, data.eot)
    model, asked = small_model(data), small_model(train_gpt2.Data({}, gpt2_vocabulary), n_embd=8)
    alone = World(s)
    losses = {1: {evaluate(model, loader, s, alone, data)["val_loss"]}}
    choices = [hellaswag(asked, questions, alone)]
    for size in (2, 3):
        meeting, sums = threading.Barrier(size), {}
        worlds = [Together(s, rank, size, meeting, sums) for rank in range(size)]
        with ThreadPoolExecutor(size) as pool:
            found = list(pool.map(lambda world: evaluate(model, loader, s, world, data), worlds))
            choices += pool.map(lambda world: hellaswag(asked, questions, world), worlds)
        losses[size] = {each["val_loss"] for each in found}
    assert losses[1] == losses[2] == losses[3] and len(losses[1]) == 1
    assert all(torch.equal(choices[0], other) for other in choices) and len(choices) == 6


def test_report_and_picture_come_from_the_log_and_samples_alone(small_run, tmp_path, capsys,
                                                                monkeypatch):
    """A resumed run draws them anew, the same as a whole run but for its times."""
    argv = [*(word for word in small_run if "eval_tokens" not in word), "--sample_every=10"]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert train_gpt2.main([*argv, f"--out_dir={whole}"]) == 0
    output = capsys.readouterr().out
    assert "below the uniform line" in output and "done in" in output
    with monkeypatch.context() as patch:
        patch.setattr(train_gpt2.StopRequest, "requested", stop_after(24))
        assert train_gpt2.main([*argv, f"--out_dir={broken}"]) == 143
    names = {path.name for path in broken.iterdir()}
    for name in ("report.md", "loss.svg"):
        (broken / name).unlink()
    assert train_gpt2.main([*argv, f"--out_dir={broken}"]) == 0
    assert {path.name for path in broken.iterdir()} == names
    texts = [(folder / "report.md").read_text(encoding="utf-8") for folder in (whole, broken)]
    kept = [re.sub(r"\| (time|speed|machine).*\n", "", text) for text in texts]
    assert kept[0] == kept[1] and "| lowest |" in kept[0]
    assert re.findall(r"^## Step (\d+)", texts[1], re.MULTILINE) == ["10", "20", "30"]
    assert (whole / "loss.svg").read_bytes() == (broken / "loss.svg").read_bytes()
    root = ElementTree.parse(whole / "loss.svg").getroot()
    words = "".join(root.itertext())
    for name in ("training", "validation", "uniform 6.77", "unigram", "bigram", "floor 0.3119",
                 "recall", "tokens", "prefers-color-scheme: dark"):
        assert name in words, name
    assert root.tag.endswith("svg") and (whole / "loss.svg").stat().st_size < 60_000


def test_the_plan_is_counted_right(stories, tmp_path, capsys):
    V, T, C, steps = 871, 112, 8, 4000
    N = V * C + T * C + 12 * C * C + 13 * C + 2 * C
    train_gpt2.main([f"--data_dir={stories}", "--n_layer=1", "--n_embd=8", "--n_head=1",
                     f"--out_dir={tmp_path / 'run'}", "--max_minutes=0.001", "--eval_tokens=2000",
                     "--dtype=float32", "--device=cpu", f"--max_steps={steps}"])
    output = capsys.readouterr().out
    assert f"model: {N:,} parameters, {V * C:,} of them" in output
    assert f"ln 871 = {math.log(V):.2f}" in output
    train = [train_gpt2.read_shard(path) for path in train_gpt2.shard_paths(stories)["train"]]
    tokens = steps * 16 * (sum(map(len, train)) - 1) / 10_800
    short = train_gpt2.short
    assert f"{short(tokens)} tokens, {steps * 16 / 10_800:.1f} epochs" in output
    assert f"{tokens / N:.1f} tokens per parameter" in output
    assert f"{short(6 * (N - T * C) + 12 * C * T)} FLOPs per token" in output
