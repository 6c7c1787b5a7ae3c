"""What a run reports: losses by skill, HellaSwag, the picture, the report."""
import json
import math
import re
import xml.etree.ElementTree as ElementTree

import first_principles
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import FULL, fails, log_of, random_model, stopped
from test_model import arrays, to_transformers

import prepare_data
import train_gpt2
from train_gpt2 import Settings, Process, evaluate, hellaswag, open_data, open_rows


def small_model(tokenizer, **changes):
    shape = dict(block_size=112, n_layer=2, n_head=2, n_embd=32) | changes
    return random_model(tokenizer.spec, **shape)


def evaluated(folder, model, **settings):
    data, s = open_data(folder), Settings(
        data_dir=str(folder), device="cpu", dtype="float32", **settings)
    return evaluate(model, open_rows(s, data, "val", None), s, Process(s), data)


def val_tokens(folder):
    paths = train_gpt2.shard_paths(folder)["val"]
    return np.concatenate([train_gpt2.read_shard(path) for path in paths]).tolist()


@pytest.mark.parametrize("rows", ["documents", "stream"])
def test_validation_loss_agrees_with_numpy(rows, stories):
    """Loss, bits per byte and skills, from the shard itself by a GPT-2 in NumPy."""
    data = open_data(stories)
    model = small_model(data.tokenizer)
    tokens, T, eot, params = val_tokens(stories), 112, data.tokenizer.eot, arrays(model, np.float64)
    starts, ends, count = range(0, 40 * T, T), range(T, 41 * T, T), 40 * T
    if rows == "documents":
        starts = [i for i, token in enumerate(tokens[:-1]) if token == eot]
        ends, count = [*starts[1:], len(tokens) - 1], None
    nats, labels, targets = [], [], []
    for start, end in zip(starts, ends, strict=True):
        logits, _ = first_principles.forward(params, np.array([tokens[start:end]]), n_head=2)
        y = tokens[start + 1:end + 1]
        shifted = logits[0] - logits[0].max(axis=-1, keepdims=True)
        nats += (np.log(np.exp(shifted).sum(axis=-1)) - shifted[np.arange(len(y)), y]).tolist()
        labels += data.skills[start + 1:end + 1].tolist()
        targets += y
    found = evaluated(stories, model, rows=rows, eval_tokens=count)
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
    skills = sum(found[f"above_floor_{name}"] for name in train_gpt2.SKILLS)
    return skills == pytest.approx(found["above_floor"], abs=1e-12)


def lines_of(shared_file, count):
    text = shared_file("hellaswag_val_first1000.jsonl").read_text(encoding="utf-8")
    return text.splitlines()[:count]


def questions_of(shared_file, count):
    questions = map(json.loads, lines_of(shared_file, count))
    return [(each["ctx"], [" " + ending for ending in each["endings"]], each["label"])
            for each in questions]


@pytest.mark.parametrize("block_size", [1024, 40])
def test_hellaswag_chooses_as_transformers_does(block_size, shared_file, gpt2_vocabulary):
    questions = questions_of(shared_file, 1000 if FULL else 30)
    questions.append(("The", [" cat sat", " dog", " sky is blue today", " end"], 0))  # one token
    model = small_model(gpt2_vocabulary, block_size=block_size)
    theirs, encode, T = to_transformers(model), gpt2_vocabulary.encode, block_size
    chosen = hellaswag(model, questions, Process(Settings(device="cpu", dtype="float32")))
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


def test_hellaswag_in_a_run_and_by_itself(shared_file, gpt2_vocabulary, tmp_path, monkeypatch,
                                          capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train_gpt2, "matmul_speed", lambda *_: 1e11)
    path = tmp_path / train_gpt2.HELLASWAG
    path.parent.mkdir(parents=True)
    path.write_text("\n".join(lines_of(shared_file, 12)), encoding="utf-8")
    (tmp_path / "text.txt").write_text("Words to train on, and to be validated by. " * 100)
    prepare_data.main(["text.txt", "--tokenizer=gpt2", "--out_dir=data/text"])
    argv = ["--data_dir=data/text", "--rows=stream", "--dtype=float32", "--device=cpu"]
    assert train_gpt2.main([*argv, "--max_steps=2", "--n_layer=1", "--n_embd=16", "--block_size=64",
                            "--batch_size=2"]) == 0
    said = re.search(r"HellaSwag (acc [\d.]+%, acc_norm [\d.]+%)", capsys.readouterr().out)[1]
    row = log_of(tmp_path / "out" / "stories")[-1]
    assert said == f"acc {float(row['hellaswag_acc']):.2%}, " \
                   f"acc_norm {float(row['hellaswag_acc_norm']):.2%}"
    assert said in (tmp_path / "out" / "stories" / "report.md").read_text(encoding="utf-8")
    argv += ["--eval_only", "--init_from=out/stories/ckpt.pt"]
    assert train_gpt2.main(argv) == 0
    assert said in capsys.readouterr().out
    path.write_text('{"ctx": "broken"}', encoding="utf-8")
    assert f"{train_gpt2.HELLASWAG} is damaged" in fails(train_gpt2.main, argv, capsys)


def test_what_a_run_says_draws_and_reports(small_run, tmp_path, capsys):
    """A resumed run draws and reports as a whole run does, from log and samples."""
    argv = [*(word for word in small_run if "eval_tokens" not in word), "--sample_every=10"]
    whole, broken = tmp_path / "a" / "run", tmp_path / "b" / "run"
    assert train_gpt2.main([*argv, f"--out_dir={whole}"]) == 0
    output, data = capsys.readouterr().out, open_data(argv[0][11:])
    V, T, C, train = data.tokenizer.vocab_size, 112, 32, data.meta["train"]
    N = V * C + T * C + 2 * (12 * C * C + 13 * C) + 2 * C
    plan = re.search(r"^model: (.*) parameters; .* of ln .* = (.*)\n.*\nplan: 30 steps of 8 "
                     r"rows, 4 at once; (.*) tokens, .* (.*) tokens per parameter$", output, re.M)
    tokens = 30 * 8 * (train["tokens"] - 1) / train["documents"]
    assert plan.groups() == (f"{N:,}", f"{math.log(V):.2f}", f"{tokens:,.0f}", f"{tokens / N:.1f}")
    assert re.search(r"^step 30: val \d\.\d{4}, \d\.\d{3} bits per byte, [\d,.]+ % above the floor "
                     r"\(wording [\d.]+, choices -?[\d.]+, recall [\d.]+\)$", output, re.M)
    assert stopped(24, [*argv, f"--out_dir={broken}"]) == 143
    for name in ("report.md", "loss.svg"):
        (broken / name).unlink()
    assert train_gpt2.main([*argv, f"--out_dir={broken}"]) == 0
    texts = [(folder / "report.md").read_text(encoding="utf-8") for folder in (whole, broken)]
    assert texts[0] == texts[1].replace(str(broken), str(whole)) and texts[0].startswith("# run\n") and plan[0] in texts[0]
    assert re.findall(r"^\| (\d+) \|", texts[0], re.M) == ["0", "10", "20", "30"]
    assert re.findall(r"^## Step (\d+)", texts[1], re.M) == ["10", "20", "30"]
    assert (whole / "loss.svg").read_bytes() == (broken / "loss.svg").read_bytes()
    words = "".join(ElementTree.parse(whole / "loss.svg").getroot().itertext())
    floor = f"floor {data.meta['entropy_floor']:.4f}"
    for name in ("training", "validation", "uniform 6.", "unigram", "bigram", floor, "recall"):
        assert name in words, name
