"""What a run says of itself: losses counted apart, HellaSwag, the picture, the report."""
import json
import math
import re
import shlex
import threading
import time
import xml.etree.ElementTree as ElementTree
from concurrent.futures import ThreadPoolExecutor

import first_principles
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import FULL, fails
from test_model import arrays, to_transformers

import prepare_data
import train_gpt2
from train_gpt2 import GPT, GPTConfig, Settings, ShardedLoader, World, evaluate, hellaswag, open_data


@pytest.fixture(autouse=True)
def no_measuring(monkeypatch):
    """How fast this machine multiplies is nobody's question here."""
    monkeypatch.setattr(train_gpt2, "matmul_speed", lambda device, dtype: 1e11)


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
    return np.concatenate([train_gpt2.read_shard(path) for path in train_gpt2.shard_paths(folder)["val"]]).tolist()


@pytest.mark.parametrize("rows", ["documents", "stream"])
def test_validation_loss_agrees_with_numpy(rows, stories, tmp_path):
    """Loss, bits per byte and distances by skill, from the shard itself, by a NumPy GPT-2. A model that is uniform
    would show little: this one's weights are large."""
    model, data = small_model(open_data(stories)), open_data(stories)
    with torch.no_grad():
        model.transformer.wte.weight *= 20
    tokens, T, eot = val_tokens(stories), 112, data.eot
    starts = [i for i, token in enumerate(tokens[:-1]) if token == eot] if rows == "documents" else range(0, 40 * T, T)
    ends = [*starts[1:], len(tokens) - 1] if rows == "documents" else [start + T for start in starts]
    nats, labels, targets = [], [], []
    for start, end in zip(starts, ends, strict=True):
        logits, _ = first_principles.forward(arrays(model, np.float64), np.array([tokens[start:end]]), n_head=2)
        y = tokens[start + 1:end + 1]
        shifted = logits[0] - logits[0].max(axis=-1, keepdims=True)
        nats += (np.log(np.exp(shifted).sum(axis=-1)) - shifted[np.arange(len(y)), y]).tolist()
        labels += data.skills[start + 1:end + 1].tolist()
        targets += y
    found = evaluated(stories, model, rows=rows, eval_tokens=None if rows == "documents" else 40 * T)
    assert found["loss"] == pytest.approx(np.mean(nats), abs=1e-5)
    size = sum(len(data.tokenizer.decode_bytes([token])) for token in targets if token != eot)
    assert found["bits_per_byte"] == pytest.approx(sum(nats) / math.log(2) / size, abs=1e-5)
    assert ("skills" in found) == (rows == "documents")
    if rows == "documents":
        assert sum(found["skills"].values()) == pytest.approx(found["loss"] - found["floor"], abs=1e-12)
        for number, (name, distance) in enumerate(found["skills"].items()):
            its = sum(n for n, label in zip(nats, labels, strict=True) if label == number) / len(nats)
            assert distance == pytest.approx(its - data.meta["skills"][name], abs=1e-5)


def test_a_uniform_model_has_the_bits_that_its_tokenizer_needs(tmp_path, gpt2_vocabulary):
    text = "Every tokenizer writes the same text, each with tokens of its own: naïve, 漢字, 12 345. " * 40
    (tmp_path / "text.txt").write_text(text, encoding="utf-8")
    for kind in ("gpt2", "bpe", "char"):
        folder = tmp_path / kind
        prepare_data.main([str(tmp_path / "text.txt"), f"--tokenizer={kind}", "--vocab_size=300",
                           f"--out_dir={folder}"])
        data = open_data(folder)
        model = small_model(data, block_size=32)
        torch.nn.init.zeros_(model.transformer.wte.weight)
        tokens = val_tokens(folder)
        size = len(data.tokenizer.decode_bytes([token for token in tokens[1:] if token != data.eot]))
        found = evaluated(folder, model, rows="stream", block_size=32)
        expected = math.log2(data.vocab_size) * (len(tokens) - 1) / size
        assert found["bits_per_byte"] == pytest.approx(expected, rel=1e-6)
        assert found["loss"] == pytest.approx(math.log(data.vocab_size), rel=1e-6)


def test_the_stories_tell_the_skill_of_every_token(stories):
    """As a reader finds it: a name that has been told is recalled, and what no story words otherwise is wording."""
    meta, skills = open_data(stories).meta, open_data(stories).skills
    tokens, tokenizer = val_tokens(stories), open_data(stories).tokenizer
    assert sum(meta["skills"].values()) == meta["entropy_floor"] and meta["skills"]["wording"] == 0
    words = [tokenizer.decode([token]).strip() for token in tokens]
    told = set()
    for i, (word, skill) in enumerate(zip(words, skills, strict=True)):
        if tokens[i] == tokenizer.eot:
            told = set()
        elif word in prepare_data.HEROES or word in prepare_data.THINGS:
            assert prepare_data.SKILLS[skill] == ("recall" if word in told else "choices"), words[i - 20:i + 1]
            told.add(word)
        elif word in ("he", "she", "him", "his", "her", "boy", "girl") and told & prepare_data.HEROES.keys():
            assert prepare_data.SKILLS[skill] == "recall"
        elif word in (*prepare_data.TRAITS, "Luckily", "Poor", "Once"):
            assert prepare_data.SKILLS[skill] == "choices"
        elif word in ("named", "who", "morning", "anything", "evening", ".", ","):
            assert prepare_data.SKILLS[skill] == "wording", words[i - 20:i + 1]


@pytest.mark.parametrize("tokenizer", ["char", "gpt2"])
def test_skills_with_other_tokenizers_add_up(tokenizer, tmp_path, monkeypatch, gpt2_vocabulary):
    monkeypatch.setattr(prepare_data, "STORIES", 60)
    prepare_data.main(["stories", f"--tokenizer={tokenizer}", f"--out_dir={tmp_path / 'data'}", "--shard_tokens=150"])
    data, tokens = open_data(tmp_path / "data"), val_tokens(tmp_path / "data")
    recalled = "".join(data.tokenizer.decode([t]) for t, skill in zip(tokens, data.skills, strict=True) if skill == 2)
    assert set(re.findall(r"[A-Za-z]+", re.sub(r"([A-Z])", r" \1", recalled))) and "lived" not in recalled
    if tokenizer == "gpt2":
        found = evaluated(tmp_path / "data", rows="documents", block_size=112)  # documents cross these small shards
        assert sum(found["skills"].values()) == pytest.approx(found["loss"] - found["floor"], abs=1e-12)


def questions_of(shared_file, count):
    lines = shared_file("hellaswag_val_first1000.jsonl").read_text(encoding="utf-8").splitlines()
    questions = [json.loads(line) for line in lines[:count]]
    return [(each["ctx"], [" " + ending for ending in each["endings"]], each["label"]) for each in questions]


@pytest.mark.parametrize("block_size", [1024, 40])
def test_hellaswag_chooses_as_transformers_does(block_size, shared_file, gpt2_vocabulary):
    questions = questions_of(shared_file, 1000 if FULL else 30)
    questions.append(("The", [" cat sat", " dog", " sky is blue today", " end"], 0))  # nothing to share but its end
    data = train_gpt2.Data({}, gpt2_vocabulary)
    model = small_model(data, block_size=block_size)
    theirs, encode, T = to_transformers(model), gpt2_vocabulary.encode, block_size
    chosen = hellaswag(model, questions, World(Settings(device="cpu", dtype="float32")), at_once=8)
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


def test_hellaswag_by_itself_and_in_a_run(shared_file, gpt2_vocabulary, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    questions = shared_file("hellaswag_val_first1000.jsonl").read_text(encoding="utf-8").splitlines()[:12]
    (tmp_path / "data" / "hellaswag").mkdir(parents=True)
    path = tmp_path / "data" / "hellaswag" / "hellaswag_val.jsonl"
    path.write_text("\n".join(questions), encoding="utf-8")
    (tmp_path / "text.txt").write_text("Some words to train on, and to be validated by. " * 100, encoding="utf-8")
    prepare_data.main(["text.txt", "--tokenizer=gpt2", "--out_dir=data/text"])
    assert train_gpt2.main(["--data_dir=data/text", "--rows=stream", "--max_steps=2", "--n_layer=1", "--n_embd=16",
                            "--block_size=64", "--batch_size=2", "--dtype=float32", "--device=cpu"]) == 0
    said = re.findall(r"HellaSwag:? (acc [\d.]+%, acc_norm [\d.]+% of 12 questions)", capsys.readouterr().out)
    assert len(said) == 2 and said[0] == said[1]  # in the run, and at its end
    assert said[0] in (tmp_path / "out" / "stories" / "report.md").read_text(encoding="utf-8")
    evaluation = ["--eval_only", "--init_from=out/stories/ckpt.pt", "--dtype=float32"]
    assert train_gpt2.main([*evaluation, "--data_dir=data/hellaswag"]) == 0
    output = capsys.readouterr().out
    assert said[0] in output and "validation loss" not in output
    assert train_gpt2.main([*evaluation, "--data_dir=data/text", "--rows=stream"]) == 0
    output = capsys.readouterr().out
    assert said[0] in output and "validation loss" in output
    path.write_text('{"ctx": "broken"}', encoding="utf-8")
    assert "run that again" in fails(train_gpt2.main, [*evaluation, "--data_dir=data/hellaswag"], capsys)


@pytest.mark.skipif(not FULL, reason="minutes of work: FULL_TESTS=1")
def test_hellaswag_in_batches_is_three_times_as_fast(shared_file, gpt2_vocabulary):
    """GPT-2 124M on this CPU, against a plain loop over endings; also shown: a question's four endings as a batch."""
    questions = questions_of(shared_file, 1000)
    model = small_model(train_gpt2.Data({}, gpt2_vocabulary), block_size=1024, n_layer=12, n_head=12, n_embd=768).eval()
    world, encode = World(Settings(device="cpu")), gpt2_vocabulary.encode
    train_gpt2.keep_memory()

    def one_at_a_time(numbers, rows):
        """(questions a second, choices), with so many endings at once."""
        began, choices = time.perf_counter(), []
        for number in numbers:
            context, *endings = [encode(text) for text in (questions[number][0], *questions[number][1])]
            nats = []
            for some in (endings[i:i + rows] for i in range(0, 4, rows)):
                x = torch.zeros((rows, len(context) + max(map(len, some))), dtype=torch.int64)
                y = torch.full_like(x, -1)
                for row, ending in enumerate(some):
                    x[row, :len(context) + len(ending)] = torch.tensor(context + ending)
                    y[row, len(context) - 1:len(context) + len(ending) - 1] = torch.tensor(ending)
                with torch.no_grad(), world.autocast():
                    nats += train_gpt2.token_losses(model(x)[0], y).sum(dim=1).tolist()
            means = [n / len(ending) for n, ending in zip(nats, endings, strict=True)]
            choices.append([np.argmin(nats), np.argmin(means)])
        return len(numbers) / (time.perf_counter() - began), np.array(choices)
    numbers = list(range(0, 1000, 20))
    one_at_a_time(numbers[:3], 1)
    singly, choices = one_at_a_time(numbers, 1)
    began = time.perf_counter()
    chosen = hellaswag(model, questions, world)
    batched = len(questions) / (time.perf_counter() - began)
    by_four, _ = one_at_a_time(numbers, 4)
    print(f"{batched:.2f} questions/s in groups, {by_four:.2f} by four endings, {singly:.2f} by single endings")
    assert (chosen[numbers].numpy() == choices).all() and batched > 3 * singly


@pytest.mark.skipif(not train_gpt2.can_pack_bfloat16(), reason="needs oneDNN and a processor on which it has bfloat16")
@pytest.mark.parametrize("activation", ["gelu", "relu"])
def test_packed_weights_compute_the_same(activation):
    torch.manual_seed(0)
    config = GPTConfig(vocab_size=97, block_size=24, n_layer=2, n_head=3, n_embd=48, activation=activation)
    model, idx = GPT(config, init_std=0.2).eval(), torch.randint(97, (2, 24))
    for p in model.parameters():
        if p.dim() == 1:
            torch.nn.init.normal_(p)  # biases of 0 and norms of 1 could be left out unnoticed
    world = World(Settings(device="cpu", dtype="bfloat16"))
    modules, acts = dict(model.named_modules()), [block.mlp.act for block in model.transformer.h]
    with torch.no_grad():
        exact = model(idx)[0]
        with world.autocast(), train_gpt2.packed(model, world):
            assert model.transformer.h[1].mlp.c_fc.packed
            rough = model(idx)[0]
        assert (rough - exact).norm() < 0.03 * exact.norm()
        with pytest.raises(KeyError), train_gpt2.packed(model, world):
            raise KeyError
        assert [block.mlp.act for block in model.transformer.h] == acts and dict(model.named_modules()) == modules
        assert torch.equal(model(idx)[0], exact)


def weights_of(folder):
    return torch.load(folder / "ckpt.pt", weights_only=True)["model"]


def test_evaluation_changes_no_weight(small_run, tmp_path, monkeypatch):
    often, never = tmp_path / "often", tmp_path / "never"
    train_gpt2.main([*small_run, "--eval_every=10", "--sample_every=10", f"--out_dir={often}"])
    nothing = {"loss": 1.0, "bits_per_byte": 1.0, "seconds": 0.0}
    monkeypatch.setattr(train_gpt2, "evaluate", lambda *_: dict(nothing))
    monkeypatch.setattr(train_gpt2.Run, "show_sample", lambda *_: None)
    train_gpt2.main([*small_run, f"--out_dir={never}"])
    for name, tensor in weights_of(often).items():
        assert torch.equal(tensor, weights_of(never)[name]), name


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
    """To the last bit, in validation losses; and the same choices, of which three processes share three groups."""
    data, questions = open_data(stories), questions_of(shared_file, 20)
    s = Settings(data_dir=str(stories), device="cpu", dtype="float32", eval_tokens=20_000)
    loader = ShardedLoader(stories, "val", s.block_size, s.rows, None, data.vocab_size, data.eot)
    model, asked = small_model(data), small_model(train_gpt2.Data({}, gpt2_vocabulary), n_embd=8)
    alone = World(s)
    losses = {1: {evaluate(model, loader, s, alone, data)["loss"]}}
    choices = [hellaswag(asked, questions, alone, at_once=8)]
    for size in (2, 3):
        meeting, sums = threading.Barrier(size), {}
        worlds = [Together(s, rank, size, meeting, sums) for rank in range(size)]
        with ThreadPoolExecutor(size) as pool:
            found = list(pool.map(lambda world: evaluate(model, loader, s, world, data), worlds))
            choices += pool.map(lambda world: hellaswag(asked, questions, world, at_once=8), worlds)
        losses[size] = {each["loss"] for each in found}
    assert losses[1] == losses[2] == losses[3] and len(losses[1]) == 1
    assert all(torch.equal(choices[0], other) for other in choices) and len(choices) == 6


def test_report_and_picture_of_a_run_and_of_one_that_was_resumed(small_run, tmp_path, capsys):
    """Whole and broken runs have the same report, but for their times; the command in it repeats the run."""
    small_run = [*(word for word in small_run if "eval_tokens" not in word), "--sample_every=10"]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert train_gpt2.main([*small_run, f"--out_dir={whole}"]) == 0
    output = capsys.readouterr().out
    assert "past the uniform line" in output and output.count("left, evaluations included") == 1
    assert "warning: under 1 token a parameter" in output and "done in" in output
    save = train_gpt2.Run.save

    def save_and_break(run, step):
        save(run, step)
        if step == 20:
            run.signal = 2
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_gpt2.Run, "save", save_and_break)
        assert train_gpt2.main([*small_run, f"--out_dir={broken}"]) == 130
    assert train_gpt2.main([*small_run, f"--out_dir={broken}"]) == 0
    texts = [(folder / "report.md").read_text(encoding="utf-8") for folder in (whole, broken)]
    kept = [[line for line in text.replace(str(folder), "DIR").splitlines()
             if not re.match(r"\| (time|on|speed)", line)] for text, folder in zip(texts, (whole, broken), strict=True)]
    assert kept[0] == kept[1]
    assert re.findall(r"^## Step (\d+), validation loss", texts[1], re.MULTILINE) == ["10", "20", "30"]
    for folder in (whole, broken):
        root = ElementTree.parse(folder / "loss.svg").getroot()
        assert root.tag.endswith("svg") and "prefers-color-scheme: dark" in (folder / "loss.svg").read_text()
        words = "".join(root.itertext())
        for name in ("training", "validation", "uniform 6.77", "unigram", "bigram", "floor 0.3119", "recall", "tokens"):
            assert name in words, name
        assert (folder / "loss.svg").stat().st_size < 60_000
    again = shlex.split(re.search(r"\| again \| `python train_gpt2.py (.*)` \|", texts[0])[1])
    assert train_gpt2.main([*again, f"--out_dir={tmp_path / 'again'}"]) == 0
    for name, tensor in weights_of(whole).items():
        assert torch.equal(tensor, weights_of(tmp_path / "again")[name]), name


def test_the_plan_is_counted_right_and_warns(stories, tmp_path, capsys):
    common = [f"--data_dir={stories}", "--n_layer=1", "--n_embd=8", "--n_head=1", f"--out_dir={tmp_path / 'run'}",
              "--max_minutes=0.001", "--eval_tokens=2000", "--dtype=float32", "--device=cpu"]
    V, T, C = 871, 112, 8
    attention, mlp, norms = C * 3 * C + 3 * C + C * C + C, 8 * C * C + 5 * C, 6 * C
    N = V * C + T * C + attention + mlp + norms
    for options, steps, warning in ((["--warmup_steps=2"], 2, "under 1 token"), (["--warmup_steps=9"], 9, "warm-up"),
                                    ([], 40_000, "epochs"), ([], 4000, "over 200 tokens")):
        train_gpt2.main([*common, f"--max_steps={steps}", "--log_every=50", *options])
        output = capsys.readouterr().out
        assert warning in "".join(re.findall("warning: .*", output)), output
        assert f"model: {N:,} parameters" in output and f"ln 871 = {math.log(871):.2f}" in output
        assert (f"embeddings {V * C:,}, positions {T * C:,}, attention {attention:,}, MLPs {mlp:,}, norms {norms:,}"
                in output)
        a_token = 6 * (N - T * C) + 12 * 1 * C * T
        tokens = steps * 16 * (len(np.concatenate([train_gpt2.read_shard(path) for path in
                               train_gpt2.shard_paths(stories)["train"]])) - 1) / 10_800
        assert f"{train_gpt2.short(a_token)} operations a token, {a_token * tokens:.2g} in all" in output
        assert f"{train_gpt2.short(tokens)} in all: {steps * 16 / 10_800:.1f} epochs" in output
