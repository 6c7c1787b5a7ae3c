"""What a run reports: losses by skill, HellaSwag, the picture, the report."""
import itertools
import json
import math
import random
import re
import xml.etree.ElementTree as ElementTree

import first_principles
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import FULL, fails, log_of, random_model, shared_file, stopped
from test_model import arrays, to_transformers

import prepare_data
import train_gpt2
from train_gpt2 import Process, Settings, evaluate, open_data, open_rows


def small_model(tokenizer, block_size=112):
    return random_model(tokenizer.spec, block_size=block_size, n_layer=2, n_head=2, n_embd=32)


def evaluated(folder, model, **settings):
    s = Settings(data_dir=str(folder), device="cpu", dtype="float32", **settings)
    data = open_data(folder)
    loader = open_rows(s, data, "val", None)
    return evaluate(model, loader, s, Process(s), data)


def numpy_losses(model, tokens, ends):
    """The nats of each target by a GPT-2 in NumPy, whose rows begin and end at these tokens."""
    params = arrays(model, np.float64)
    nats = []
    for first, last in itertools.pairwise(ends):
        x, y = tokens[first:last], tokens[first + 1:last + 1]
        logits, _ = first_principles.forward(params, x[None], n_head=2)
        probabilities = first_principles.softmax(logits[0])
        nats.append(-np.log(probabilities[np.arange(len(y)), y]))
    return np.concatenate(nats)


@pytest.mark.parametrize("rows, eval_tokens", [("documents", None), ("stream", 40 * 112)])
def test_validation_loss_agrees_with_numpy(rows, eval_tokens, stories):
    """Loss, bits per byte and skills, from the shard itself."""
    data = open_data(stories)
    model = small_model(data.tokenizer)
    tokens = train_gpt2.read_shard(*train_gpt2.shard_paths(stories)["val"])
    documents = np.flatnonzero(tokens == data.tokenizer.eot)
    ends = documents if rows == "documents" else range(0, 41 * 112, 112)
    nats = numpy_losses(model, tokens, ends)
    found = evaluated(stories, model, rows=rows, eval_tokens=eval_tokens)
    assert found["val_loss"] == pytest.approx(nats.mean(), abs=1e-5)
    size = data.tokenizer.token_bytes()[tokens[1:1 + len(nats)]].sum()
    bits = nats.sum() / math.log(2)
    assert found["val_bits_per_byte"] == pytest.approx(bits / size, abs=1e-5)
    if rows == "stream":
        assert "above_floor" not in found
        return
    floor = found["val_loss"] - found["above_floor"]
    assert floor == pytest.approx(data.meta["entropy_floor"], abs=1e-12)
    for number, (name, its_floor) in enumerate(data.meta["skills"].items()):
        its_nats = nats[data.skills[1:] == number].sum()
        above = its_nats / len(nats) - its_floor
        assert found[f"above_floor_{name}"] == pytest.approx(above, abs=1e-5)


def hellaswag_lines(count):
    text = shared_file("hellaswag_val_first1000.jsonl").read_text(encoding="utf-8")
    return text.splitlines()[:count]


@torch.no_grad()
def check_hellaswag(model, questions, logits_of=None, script=train_gpt2):
    """The model chooses the endings that are likeliest by these logits, its own if need be."""
    logits_of = logits_of or (lambda idx: model(idx)[0])
    encode, T = model.tokenizer.encode, model.config.block_size
    process = script.Process(script.Settings(device="cpu", dtype="float32"))
    chosen = script.hellaswag(model, questions, process)
    for (context, endings, _), choices in zip(questions, chosen, strict=True):
        endings = [encode(ending)[:T] for ending in endings]
        room = T + 1 - max(map(len, endings))
        context = encode(context)[-room:]
        sums, means = [], []
        for ending in endings:
            idx = torch.tensor([context + ending[:-1]])
            logits = logits_of(idx)[0, -len(ending):]
            nats = F.cross_entropy(logits, torch.tensor(ending), reduction="none")
            sums.append(nats.sum())
            means.append(nats.mean())
        assert choices.tolist() == [np.argmin(sums), np.argmin(means)]


def questions_of(count):
    questions = []
    for line in hellaswag_lines(count):
        question = json.loads(line)
        endings = [" " + ending for ending in question["endings"]]
        questions.append((question["ctx"], endings, question["label"]))
    return questions


@pytest.mark.parametrize("block_size", [1024, 40])
def test_hellaswag_chooses_as_transformers_does(block_size, gpt2_vocabulary):
    questions = questions_of(1000 if FULL else 30)
    questions.append(("The", [" cat sat", " dog", " sky is blue today", " end"], 0))  # one token
    model = small_model(gpt2_vocabulary, block_size)
    theirs = to_transformers(model)
    check_hellaswag(model, questions, lambda idx: theirs(idx).logits)


def test_hellaswag_reads_equal_contexts_together(gpt2_vocabulary):
    """Each batch takes two passes: one for its contexts, one for their endings."""
    encode = gpt2_vocabulary.encode
    texts = []
    for context, endings, _ in questions_of(1000):
        texts.append((encode(context), [*map(encode, endings)]))
    batches = train_gpt2.question_batches(texts)
    assert sorted(itertools.chain(*batches)) == list(range(1000))
    assert 2 * len(batches) <= 300
    whole_set = random.Random(0).choices(texts, k=10_042)
    batches = train_gpt2.question_batches(whole_set)
    assert 2 * len(batches) <= 1500
    for batch in batches:
        assert len({len(whole_set[number][0]) for number in batch}) == 1


def test_hellaswag_in_a_run_and_by_itself(gpt2_vocabulary, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train_gpt2, "matmul_speed", lambda *_: 1e11)
    train_gpt2.HELLASWAG.parent.mkdir(parents=True)
    train_gpt2.HELLASWAG.write_text("\n".join(hellaswag_lines(12)), encoding="utf-8")
    (tmp_path / "text.txt").write_text("Words to train on, and to be validated by. " * 100)
    prepare_data.main(["text.txt", "--tokenizer=gpt2", "--out_dir=data/text"])
    argv = ["--data_dir=data/text", "--rows=stream", "--dtype=float32", "--device=cpu"]
    shape = ["--n_layer=1", "--n_embd=16", "--block_size=64", "--batch_size=2", "--max_steps=2"]
    assert train_gpt2.main([*argv, *shape]) == 0
    run = tmp_path / "out" / "stories"
    row = log_of(run)[-1]
    acc, acc_norm = float(row["hellaswag_acc"]), float(row["hellaswag_acc_norm"])
    said = f"HellaSwag acc {acc:.2%}, acc_norm {acc_norm:.2%}"
    assert said in capsys.readouterr().out
    assert said in (run / "report.md").read_text(encoding="utf-8")
    argv += ["--eval_only", "--init_from=out/stories/ckpt.pt"]
    assert train_gpt2.main(argv) == 0
    assert said in capsys.readouterr().out
    train_gpt2.HELLASWAG.write_text('{"ctx": "broken"}', encoding="utf-8")
    assert f"{train_gpt2.HELLASWAG} is damaged" in fails(train_gpt2.main, argv, capsys)


def test_what_a_run_says_draws_and_reports(small_run, stories, tmp_path, capsys):
    """A resumed run draws and reports as a whole run does, from log and samples."""
    small_run.remove("--eval_tokens=2000")
    whole, broken = tmp_path / "a" / "run", tmp_path / "b" / "run"
    assert train_gpt2.main([*small_run, f"--out_dir={whole}"]) == 0
    output = capsys.readouterr().out
    data = open_data(stories)
    V, T, C = data.tokenizer.vocab_size, 112, 32
    N = V * C + T * C + 2 * (12 * C * C + 13 * C) + 2 * C
    tokens = 30 * 8 * (data.meta["train"]["tokens"] - 1) / data.meta["train"]["documents"]
    assert f"model: {N:,} parameters; " in output
    assert f" of ln {V:,} = {math.log(V):.2f}\n" in output
    assert f"\nplan: 30 steps of 8 rows, 4 at once; {tokens:,.0f} tokens, " in output
    assert f", {tokens / N:.1f} tokens per parameter\n" in output
    assert re.search(r"^step 30: val \d\.\d{4}, \d\.\d{3} bits per byte, [\d,.]+ % above the floor "
                     r"\(wording [\d.]+, choices -?[\d.]+, recall [\d.]+\)$", output, re.M)
    stopped(24, [*small_run, f"--out_dir={broken}"])
    (broken / "report.md").unlink()
    (broken / "loss.svg").unlink()
    train_gpt2.main([*small_run, f"--out_dir={broken}"])
    report = (whole / "report.md").read_text(encoding="utf-8")
    again = (broken / "report.md").read_text(encoding="utf-8")
    assert again.replace(str(broken), str(whole)) == report
    assert output[output.index("model:"):output.index(" tokens per parameter")] in report
    assert re.findall(r"^\| (\d+) \|", report, re.M) == ["0", "10", "20", "30"]
    assert re.findall(r"^## Step (\d+)", report, re.M) == ["20", "30"]
    picture = (whole / "loss.svg").read_text(encoding="utf-8")
    assert picture == (broken / "loss.svg").read_text(encoding="utf-8")
    words = "".join(ElementTree.fromstring(picture).itertext())
    floor = f"floor {data.meta['entropy_floor']:.4f}"
    for name in ("training", "validation", "uniform 6.", "unigram", "bigram", floor, "recall"):
        assert name in words, name
