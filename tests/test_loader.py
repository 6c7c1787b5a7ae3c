"""Shards in llm.c's format, and batches that are a pure function of the step."""
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import train_gpt2
from prepare_data import write_shard
from train_gpt2 import PRESETS, Settings, ShardedLoader, Tokenizer, UserError, open_data, read_shard


@pytest.fixture
def numbered(tmp_path):
    """Tokens that count up, in three shards: every row tells where it was cut."""
    for name, start, end in (("train_1", 0, 1000), ("train_2", 1000, 1755), ("train_3", 1755, 2300),
                             ("val_0", 5000, 5095)):
        write_shard(tmp_path / f"n_{name}.bin", np.arange(start, end))
    return tmp_path


def numbers(folder, split="train", seed=7, **more):
    return ShardedLoader(folder, split, 16, "stream", seed, **{"vocab_size": 9999} | more)


def test_format_is_llm_c(tmp_path):
    """Written here, read by llm.c's rules; written by llm.c's rules, read here."""
    tokens = np.random.default_rng(0).integers(0, 50257, 5000)
    write_shard(tmp_path / "a_train_000001.bin", tokens)
    data = (tmp_path / "a_train_000001.bin").read_bytes()
    header = np.frombuffer(data[:256 * 4], dtype=np.int32)
    assert (header[0], header[1], header[2]) == (20240520, 1, 5000) and not header[3:].any()
    assert np.array_equal(np.frombuffer(data[256 * 4:], dtype=np.uint16), tokens)
    theirs = np.zeros(256, dtype=np.int32)
    theirs[0], theirs[1], theirs[2] = 20240520, 1, len(tokens)
    content = theirs.tobytes() + tokens.astype(np.uint16).tobytes()
    (tmp_path / "b_val_000000.bin").write_bytes(content)
    assert np.array_equal(read_shard(tmp_path / "b_val_000000.bin"), tokens)


def test_last_word_in_the_name_decides(tmp_path):
    for name in ("fineweb_val_000000.bin", "valley_train_000001.bin", "training_val_000001.bin"):
        write_shard(tmp_path / name, [1, 2, 3])
    paths = train_gpt2.shard_paths(tmp_path)
    assert [path.name for path in paths["train"]] == ["valley_train_000001.bin"]


def test_batches_are_a_pure_function(numbered):
    first, again = numbers(numbered), numbers(numbered)
    forward = [first.batch(range(i, i + 8)) for i in range(0, 400, 8)]
    for i in (392, 0, 128, 200):  # in another order
        x, y = again.batch(range(i, i + 8))
        assert torch.equal(x, forward[i // 8][0]) and torch.equal(y, forward[i // 8][1])
    assert not torch.equal(numbers(numbered, seed=8).batch(range(8))[0], forward[0][0])


def test_stream_epochs(numbered):
    """Each has every row once and no token twice; cuts and order change."""
    loader, starts = numbers(numbered), []
    for epoch in range(3):
        rows = range(epoch * loader.rows_per_epoch, (epoch + 1) * loader.rows_per_epoch)
        x, y = loader.batch(rows)
        assert torch.equal(x + 1, y)
        assert x.unique().numel() == x.numel() > 2300 - 3 * 2 * 16
        starts.append(x[:, 0].tolist())
    assert starts[0] != starts[1] and set(starts[0]) != set(starts[1]) != set(starts[2])
    assert starts[0] != sorted(starts[0])


def test_validation_rows_cover_every_token_once(numbered):
    loader = numbers(numbered, "val", None)
    _, y = loader.batch(range(loader.rows_per_epoch))
    assert y[y != -1].tolist() == list(range(5001, 5095))


def test_documents_get_their_own_rows(tmp_path):
    eot = 99
    for split in ("val", "train"):
        write_shard(tmp_path / f"{split}.bin", [eot, 1, 2, 3, eot, 4, eot, *range(5, 11), eot])
    val, train = (ShardedLoader(tmp_path, split, 4, "documents", seed, vocab_size=100, eot=eot)
                  for split, seed in (("val", None), ("train", 1)))
    x, y = val.batch(range(val.rows_per_epoch))
    assert y.tolist() == [[1, 2, 3, eot], [4, eot, -1, -1], [5, 6, 7, 8], [9, 10, eot, -1]]
    assert x[:, 0].tolist() == [eot, eot, eot, 8]
    for epoch in range(3):
        _, shuffled = train.batch(range(4 * epoch, 4 * epoch + 4))
        assert sorted(shuffled.tolist()) == sorted(y.tolist())


def test_presets_run_on_any_number_of_processes():
    for preset in PRESETS.values():
        s = Settings(**preset, init_from="gpt2")  # which finetune asks for
        train_gpt2.check_settings(s)
        for size in (1, 2, 4, 8):
            rows, at_once = train_gpt2.plan_batch(s, SimpleNamespace(world_size=size))
            assert rows == train_gpt2.tokens_in_a_step(s) // s.block_size
            assert at_once <= s.batch_size and rows // size % at_once == 0


@pytest.mark.parametrize("change", [
    lambda data: b"", lambda data: data + b"\0\0",
    lambda data: data[:4] + b"\2\0\0\0" + data[8:],  # another version
    lambda data: data[:8] + b"\0\0\0\0" + data[12:1024],  # whole, and empty
    lambda data: data[:8] + b"\xff\xff\xff\xff" + data[12:]])
def test_damaged_shards(tmp_path, change):
    path = tmp_path / "a_train_000001.bin"
    write_shard(path, np.arange(100))
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(UserError, match="is incomplete"):
        read_shard(path)


TEXTS = ["", "plain words", "a<|endoftext|>b", "naïve 漢字 é 🙂🏽 \0\n\n \t end ", "x" * 300]


def test_tokenizers_give_back_every_text(stories, numbered, gpt2_vocabulary):
    bpe, gpt2 = open_data(stories).tokenizer, open_data(numbered).tokenizer  # no meta.json: GPT-2's
    assert gpt2.vocab_size == 50257 and gpt2.token_bytes()[gpt2.eot] == 0
    char = Tokenizer({"kind": "char", "alphabet": "".join(sorted(set("".join(TEXTS))))})
    for tokenizer in (bpe, char, gpt2):
        copy = Tokenizer(json.loads(json.dumps(tokenizer.spec)))  # as meta.json keeps it
        for text in TEXTS:
            ids = tokenizer.encode(text)
            assert tokenizer.decode(ids) == text and tokenizer.eot not in ids
            assert tokenizer.token_bytes()[ids].sum() == len(text.encode("utf-8"))
            assert copy.encode(text) == ids
