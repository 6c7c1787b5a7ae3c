"""Shards in llm.c's format, and batches that are a pure function of the step."""
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import limited, posix

import prepare_data
import train_gpt2
from prepare_data import write_shard
from train_gpt2 import PRESETS, Settings, ShardedLoader, UserError, read_shard

# ---- Shards ----


def llm_c_shard(tokens, magic=20240520, version=1, count=None):
    """The bytes of a shard by llm.c's rules."""
    header = np.zeros(256, np.int32)
    header[0] = magic
    header[1] = version
    header[2] = len(tokens) if count is None else count
    return header.tobytes() + np.array(tokens, np.uint16).tobytes()


def test_format_is_llm_c(tmp_path):
    tokens = np.random.default_rng(0).integers(0, 50257, 5000)
    path = tmp_path / "a_train_000001.bin"
    write_shard(path, tokens)
    assert path.read_bytes() == llm_c_shard(tokens)
    assert np.array_equal(read_shard(path), tokens)


@pytest.mark.parametrize("content", [
    b"",
    llm_c_shard([]),
    llm_c_shard([1, 2, 3], magic=20240521),
    llm_c_shard([1, 2, 3], version=2),
    llm_c_shard([1, 2, 3], count=2),
    llm_c_shard([1, 2, 3], count=4),
    llm_c_shard([1, 2, 3], count=-1),
])
def test_damaged_shards(tmp_path, content):
    path = tmp_path / "a_train_000001.bin"
    path.write_bytes(content)
    with pytest.raises(UserError, match="is incomplete.*no header"):
        read_shard(path)


def test_last_word_in_the_name_decides(tmp_path):
    for name in ("fineweb_val_000000.bin", "valley_train_000001.bin", "training_val_000001.bin"):
        write_shard(tmp_path / name, [1, 2, 3])
    paths = train_gpt2.shard_paths(tmp_path)
    assert [path.name for path in paths["train"]] == ["valley_train_000001.bin"]


# ---- Batches ----


@pytest.fixture
def numbered(tmp_path):
    """Tokens that count up, in three shards: every row tells where it was cut."""
    write_shard(tmp_path / "n_train_1.bin", range(1000))
    write_shard(tmp_path / "n_train_2.bin", range(1000, 1755))
    write_shard(tmp_path / "n_train_3.bin", range(1755, 2300))
    write_shard(tmp_path / "n_val_0.bin", range(5000, 5095))
    return tmp_path


def numbers(folder, split="train", seed=7):
    return ShardedLoader(folder, split, 16, "stream", seed, vocab_size=9999)


def test_batches_are_a_pure_function(numbered):
    loader = numbers(numbered)
    batches = [loader.batch(range(i, i + 8)) for i in range(0, 400, 8)]
    again = numbers(numbered)
    for number in (49, 0, 16, 25):  # in another order
        x, y = again.batch(range(8 * number, 8 * number + 8))
        assert torch.equal(x, batches[number][0])
        assert torch.equal(y, batches[number][1])
    other, _ = numbers(numbered, seed=8).batch(range(8))
    assert not torch.equal(other, batches[0][0])


def test_stream_epochs(numbered):
    """Each has every row once and no token twice; cuts and order change."""
    loader = numbers(numbered)
    starts = []
    for epoch in range(3):
        rows = range(epoch * loader.rows_per_epoch, (epoch + 1) * loader.rows_per_epoch)
        x, y = loader.batch(rows)
        assert torch.equal(x + 1, y)
        assert x.unique().numel() == x.numel()
        assert x.numel() > 2300 - 3 * 2 * 16
        starts.append(x[:, 0].tolist())
    assert starts[0] != sorted(starts[0])
    assert set(starts[0]) != set(starts[1])
    assert set(starts[1]) != set(starts[2])


def test_validation_rows_cover_every_token_once(numbered):
    loader = numbers(numbered, "val", None)
    _, y = loader.batch(range(loader.rows_per_epoch))
    assert y[y != -1].tolist() == list(range(5001, 5095))


def test_documents_get_their_own_rows(tmp_path):
    eot = 99
    for split in ("val", "train"):
        write_shard(tmp_path / f"{split}.bin", [eot, 1, 2, 3, eot, 4, eot, *range(5, 11), eot])
    val = ShardedLoader(tmp_path, "val", 4, "documents", vocab_size=100, eot=eot)
    x, y = val.batch(range(val.rows_per_epoch))
    assert y.tolist() == [
        [1, 2, 3, eot],
        [4, eot, -1, -1],
        [5, 6, 7, 8],
        [9, 10, eot, -1],
    ]
    assert x[:, 0].tolist() == [eot, eot, eot, 8]
    train = ShardedLoader(tmp_path, "train", 4, "documents", seed=1, vocab_size=100, eot=eot)
    for epoch in range(3):
        _, shuffled = train.batch(range(4 * epoch, 4 * epoch + 4))
        assert sorted(shuffled.tolist()) == sorted(y.tolist())


def open_files():
    """Their number, where the system tells."""
    return len(list(Path("/proc/self/fd").glob("*")))


@posix
def test_more_shards_than_files_may_be_open(tmp_path):
    """Written and read: 600, where a system allows 200."""
    text, out = tmp_path / "a.txt", tmp_path / "out"
    text.write_text("a tale of a king and a cat\n" * 1300)
    with limited("RLIMIT_NOFILE", 200):
        argv = [str(text), "--shard_tokens=50", "--tokenizer=char", f"--out_dir={out}"]
        prepare_data.main(argv)
        before = open_files()
        loader = numbers(out)
        x, y = loader.batch(range(loader.rows_per_epoch))
        assert open_files() == before
    assert len(loader.shards) > 600
    assert torch.equal(x[:, 1:], y[:, :-1])


def test_presets_run_on_any_number_of_processes():
    for preset in PRESETS.values():
        s = Settings(**preset, init_from="gpt2")  # which finetune asks for
        train_gpt2.check_settings(s)
        for size in (1, 2, 4, 8):
            rows, at_once = train_gpt2.plan_batch(s, SimpleNamespace(world_size=size))
            assert rows * s.block_size == train_gpt2.tokens_in_a_step(s)
            assert at_once <= s.batch_size
            assert rows // size % at_once == 0


def test_shards_without_meta_json_hold_gpt2s_tokens(numbered, gpt2_vocabulary):
    assert train_gpt2.open_data(numbered).tokenizer.spec == gpt2_vocabulary.spec
