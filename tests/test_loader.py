"""Shards in llm.c's format, and batches that are a pure function of the step."""
import json
import types

import numpy as np
import pytest
import torch

from prepare_data import write_shard
from train_gpt2 import (
    PRESETS,
    Settings,
    ShardedLoader,
    Tokenizer,
    UserError,
    check_settings,
    open_data,
    parse_settings,
    plan_batch,
    read_shard,
    shard_paths,
)


@pytest.fixture
def numbered(tmp_path):
    """A corpus whose tokens count up, in three shards: every row tells where it was cut."""
    write_shard(tmp_path / "n_train_000001.bin", np.arange(0, 1000))
    write_shard(tmp_path / "n_train_000002.bin", np.arange(1000, 1755))
    write_shard(tmp_path / "n_train_000003.bin", np.arange(1755, 2300))
    write_shard(tmp_path / "n_val_000000.bin", np.arange(5000, 5095))
    return tmp_path


def test_format_is_llm_c(tmp_path):
    """Written here, read by llm.c's rules; written by llm.c's rules, read here."""
    tokens = np.random.default_rng(0).integers(0, 50257, 5000)
    write_shard(tmp_path / "a_train_000001.bin", tokens)
    data = (tmp_path / "a_train_000001.bin").read_bytes()
    header = np.frombuffer(data[:256 * 4], dtype=np.int32)
    assert (header[0], header[1], header[2]) == (20240520, 1, 5000) and not header[3:].any()
    assert np.array_equal(np.frombuffer(data[256 * 4:], dtype=np.uint16), tokens)
    with open(tmp_path / "b_val_000000.bin", "wb") as file:
        theirs = np.zeros(256, dtype=np.int32)
        theirs[0], theirs[1], theirs[2] = 20240520, 1, len(tokens)
        file.write(theirs.tobytes())
        file.write(tokens.astype(np.uint16).tobytes())
    assert np.array_equal(read_shard(tmp_path / "b_val_000000.bin"), tokens)


def test_last_word_in_the_name_decides(tmp_path):
    for name in ("fineweb_val_000000.bin", "valley_train_000001.bin", "training_val_000001.bin"):
        write_shard(tmp_path / name, [1, 2, 3])
    paths = {split: [p.name for p in found] for split, found in shard_paths(tmp_path).items()}
    assert paths == {"train": ["valley_train_000001.bin"],
                     "val": ["fineweb_val_000000.bin", "training_val_000001.bin"]}


def test_batches_are_a_pure_function(numbered):
    first, again = (ShardedLoader(numbered, "train", 16, "stream", seed=7, vocab_size=9999)
                    for _ in range(2))
    forward = [first.batch(range(i, i + 8)) for i in range(0, 400, 8)]
    for i in (392, 0, 128, 200):  # in another order, from another loader
        x, y = again.batch(range(i, i + 8))
        assert torch.equal(x, forward[i // 8][0]) and torch.equal(y, forward[i // 8][1])
    other = ShardedLoader(numbered, "train", 16, "stream", seed=8, vocab_size=9999)
    assert not torch.equal(other.batch(range(8))[0], forward[0][0])


def test_stream_epochs(numbered):
    """Each epoch has every row once and no token twice; cuts and order change with the epoch."""
    loader = ShardedLoader(numbered, "train", 16, "stream", seed=7, vocab_size=9999)
    starts = []
    for epoch in range(3):
        rows = range(epoch * loader.rows_per_epoch, (epoch + 1) * loader.rows_per_epoch)
        x, y = loader.batch(rows)
        assert torch.equal(x + 1, y)
        assert x.unique().numel() == x.numel() > 2300 - 3 * 2 * 16
        starts.append(x[:, 0].tolist())
    assert starts[0] != starts[1] and set(starts[0]) != set(starts[1]) != set(starts[2])
    assert starts[0] != sorted(starts[0])


def test_validation_rows_cover_every_token_once(numbered):
    loader = ShardedLoader(numbered, "val", 16, "stream", seed=None, vocab_size=9999)
    _, y = loader.batch(range(loader.rows_per_epoch))
    assert y[y != -1].tolist() == list(range(5001, 5095))


def test_documents_get_their_own_rows(tmp_path):
    eot = 99
    tokens = [eot, 1, 2, 3, eot, 4, eot, 5, 6, 7, 8, 9, 10, eot]
    write_shard(tmp_path / "d_train_000001.bin", tokens)
    write_shard(tmp_path / "d_val_000000.bin", tokens)
    loader = ShardedLoader(tmp_path, "val", 4, "documents", seed=None, vocab_size=100, eot=eot)
    x, y = loader.batch(range(loader.rows_per_epoch))
    assert y.tolist() == [[1, 2, 3, eot], [4, eot, -1, -1], [5, 6, 7, 8], [9, 10, eot, -1]]
    assert x[:, 0].tolist() == [eot, eot, eot, 8]
    train = ShardedLoader(tmp_path, "train", 4, "documents", seed=1, vocab_size=100, eot=eot)
    for epoch in range(3):
        _, shuffled = train.batch(range(4 * epoch, 4 * epoch + 4))
        assert sorted(shuffled.tolist()) == sorted(y.tolist())
    assert train.rows.targets_before(4) == 13
    assert train.rows.targets_before(9) == 26 + train.rows.locate(8)[2]


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_runs_on_any_number_of_processes(preset):
    s, _ = parse_settings(
        Settings, [f"--preset={preset}"], "", PRESETS)
    check_settings(s)
    for size in (1, 2, 4, 8):
        for sharing in (1, size):  # processes that share the memory of one CPU
            world = types.SimpleNamespace(size=size, sharing=sharing)
            plan = plan_batch(s, world)
            assert plan.rows_per_step == s.total_batch_size // s.block_size
            rows = plan.micro_batch_size
            assert rows == 1 or rows * sharing <= s.batch_size


@pytest.mark.parametrize("change, message", [
    (lambda data: b"x" * len(data), "not a shard"),
    (lambda data: data[:1000], "not a shard"),
    (lambda data: b"", "not a shard"),
    (lambda data: data[:4] + b"\2\0\0\0" + data[8:], "not a shard"),
    (lambda data: data[:-2], "cut short"),
    (lambda data: data + b"\0\0", "cut short"),
    (lambda data: data[:8] + b"\0\0\0\0" + data[12:1024], "cut short"),
    (lambda data: data[:8] + b"\xff\xff\xff\xff" + data[12:], "cut short"),
])
def test_damaged_shards(tmp_path, change, message):
    path = tmp_path / "a_train_000001.bin"
    write_shard(path, np.arange(100))
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(UserError, match=message):
        read_shard(path)


def test_tokens_beyond_the_vocabulary(numbered):
    loader = ShardedLoader(numbered, "train", 16, "stream", seed=7, vocab_size=1000)
    with pytest.raises(UserError, match="the vocabulary has 1000"):
        loader.batch(range(loader.rows_per_epoch))


def test_too_little_text_for_a_row(numbered):
    with pytest.raises(UserError, match="too few"):
        ShardedLoader(numbered, "val", 95, "stream", seed=1)
    assert ShardedLoader(numbered, "val", 94, "stream", seed=1).rows_per_epoch == 1


def test_shards_without_meta_are_gpt2_tokens(numbered, gpt2_vocabulary):
    data = open_data(numbered)
    token_bytes = data.tokenizer.token_bytes()
    assert data.vocab_size == 50257 and data.eot == 50256
    assert token_bytes[gpt2_vocabulary.encode("hello")[0]] == 5 and token_bytes[50256] == 0


TEXTS = ["", "plain words", "a<|endoftext|>b", "naïve 漢字 é 🙂🏽 \0\n\n \t end ", "x" * 300]


def test_tokenizers_give_back_every_text(stories, gpt2_vocabulary):
    bpe = open_data(stories).tokenizer
    char = Tokenizer({"kind": "char", "alphabet": "".join(sorted(set("".join(TEXTS))))})
    for tokenizer in (bpe, char, gpt2_vocabulary):
        copy = Tokenizer(json.loads(json.dumps(tokenizer.spec)))  # as meta.json keeps it
        for text in TEXTS:
            ids = tokenizer.encode(text)
            assert tokenizer.decode(ids) == text and tokenizer.eot not in ids
            assert tokenizer.token_bytes()[ids].sum() == len(text.encode("utf-8"))
            assert copy.encode(text) == ids
