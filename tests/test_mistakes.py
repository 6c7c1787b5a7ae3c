"""Whatever a user gets wrong takes one line, exit status 2, and harms nothing."""
import hashlib

import pytest
import torch
from conftest import fails

import prepare_data
import sample
import train_gpt2


def hashes(folder):
    return {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.rglob("*") if path.is_file()
            and path.name != ".lock"}


@pytest.fixture
def trained(small_run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train_gpt2.main([*small_run, "--max_steps=3", f"--out_dir={tmp_path / 'out' / 'run'}"])
    return tmp_path


SETTINGS = [
    ("--max_iters=5", "did you mean --max_steps"), ("--eval_interval=5", "--eval_every"),
    ("--log_interval=1", "--log_every"),
    ("--dataset=x", "--data_dir"), ("--compile=False", "--compile_model"),
    ("--gradient_accumulation_steps=2", "--grad_accum_steps"), ("--lerning_rate=1", "--learning_rate"),
    ("--max_steps=many", "whole number"), ("--max_steps=1.5", "whole number"), ("--max_steps=0", "at least 1"),
    ("--learning_rate=fast", "a number"), ("--learning_rate=nan", "a number"), ("--learning_rate=-1", "at least 0"),
    ("--overwrite=maybe", "True or False"), ("--dtype=int8", "one of"), ("--rows=lines", "one of"),
    ("--preset=gpt3", "gpt2"),
    ("--max_steps", "needs a value"), ("hello", "no option"), ("--n_embd=97", "divisible by n_head"),
    ("--n_head=0", "n_head"),
    ("--n_layer=-1", "n_layer"), ("--block_size=100000000", "2^24"), ("--n_layer=10000000", "GB"),
    ("--block_size=0", "at least 1"),
    ("--total_batch_size=1000", "multiple of block_size"), ("--batch_size=0", "at least 1"),
    ("--dropout=1", "below 1"), ("--beta1=1", "below 1"), ("--device=abacus", "device"), ("--seed=-1", "at least 0"),
    ("--data_dir=nowhere", "prepare_data.py"), ("--init_from=nowhere.pt", "no checkpoint"),
    ("--pos_encoding=x", "one of"),
    ("--preset=shakespeare_char", "python prepare_data.py shakespeare"), ("--eval_tokens=0", "at least 1"),
    ("--preset=gpt2", "python prepare_data.py fineweb_edu"), ("--log_every=0", "at least 1"),
]


@pytest.mark.parametrize("option, message", SETTINGS)
def test_settings_of_training(option, message, stories, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = hashes(stories)
    data = [] if "preset" in option else [f"--data_dir={stories}"]
    assert message in fails(train_gpt2.main, [*data, option], capsys)
    assert hashes(stories) == before and not list(tmp_path.rglob("*.pt"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_where_there_is_none(stories, capsys):
    assert "no cuda here" in fails(train_gpt2.main, [f"--data_dir={stories}", "--device=cuda"], capsys)


@pytest.mark.parametrize("argv, message", [
    (["--temperature=-1"], "at least 0"), (["--top_k=0"], "at least 1"), (["--num_samples=0"], "at least 1"),
    (["--max_new_tokens=x"], "whole number"), (["--checkpoint=nowhere.pt"], "no checkpoint"),
    (["--strat=x"], "no setting"),
    (["--checkpoint=."], "no checkpoint"), (["one", "two"], "no option"),
])
def test_settings_of_sampling(argv, message, trained, capsys):
    before = hashes(trained)
    assert message in fails(sample.main, argv, capsys)
    assert hashes(trained) == before


def test_sampling_with_nothing_trained(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "train one with" in fails(sample.main, [], capsys)


def test_a_prompt_outside_the_vocabulary(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "abc.txt").write_text("abc cab bac " * 100)
    prepare_data.main(["abc.txt", "--tokenizer=char", "--out_dir=data/abc"])
    train_gpt2.main(["--data_dir=data/abc", "--rows=stream", "--block_size=8", "--n_embd=16", "--max_steps=2"])
    assert "has no 'x'" in fails(sample.main, ["axe"], capsys)
    assert sample.main(["", "--max_new_tokens=4"]) == 0
    assert sample.main(["abc" * 10, "--max_new_tokens=4"]) == 0
    assert "the model sees the last 8" in capsys.readouterr().err


@pytest.mark.parametrize("keep", [0, 1, 100, 1000, 5000, -1000, -100, -1])
def test_a_checkpoint_cut_short(keep, trained, small_run, capsys):
    path = trained / "out" / "run" / "ckpt.pt"
    path.write_bytes(path.read_bytes()[:keep])
    before = hashes(trained)
    assert "checkpoint" in fails(sample.main, [f"--checkpoint={path}"], capsys)
    assert "checkpoint" in fails(train_gpt2.main, [*small_run, f"--out_dir={path.parent}"], capsys)
    assert hashes(trained) == before


def change(checkpoint, key, value):
    checkpoint[key] = value


@pytest.mark.parametrize("damage", [
    lambda c: change(c, "config", {}), lambda c: change(c["config"], "n_embd", 64),
    lambda c: change(c["config"], "n_head", 5),
    lambda c: change(c["config"], "n_layer", 10**9), lambda c: change(c["config"], "vocab_size", 2**60),
    lambda c: change(c["config"], "n_layer", "two"), lambda c: change(c["config"], "color", "red"),
    lambda c: change(c["model"], "extra", torch.zeros(1)), lambda c: c["model"].popitem(),
    lambda c: change(c["model"], "transformer.wte.weight", "/etc/passwd"),
    lambda c: change(c["model"], "transformer.ln_f.bias", torch.zeros(32, dtype=torch.int64)),
    lambda c: change(c["model"], "transformer.wte.weight", torch.zeros(1).expand(10**6, 10**6)),
    lambda c: change(c, "model", None), lambda c: c.pop("tokenizer"), lambda c: change(c, "tokenizer", {"kind": "x"}),
    lambda c: change(c, "step", "many"), lambda c: c.clear(),
])
def test_a_checkpoint_that_does_not_fit(damage, trained, capsys):
    path = trained / "out" / "run" / "best.pt"
    checkpoint = torch.load(path, weights_only=True)
    damage(checkpoint)
    torch.save(checkpoint, path)
    fails(sample.main, [], capsys)


def test_a_pickle_is_not_run(trained, capsys):
    class Bomb:
        def __reduce__(self):
            return (open, (str(trained / "exploded"), "w"))
    torch.save({"model": Bomb()}, trained / "out" / "run" / "best.pt")
    fails(sample.main, [], capsys)
    assert not (trained / "exploded").exists()


def test_gpt2_vocabulary_out_of_reach(monkeypatch, tmp_path, capsys):
    """A machine without network or cache gets the way out rather than a traceback."""
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
    # with no clipping and no bound a rate this high overflows within some steps
    line = fails(train_gpt2.main, [*small_run, "--learning_rate=1e30", "--grad_clip=0"], capsys)
    assert "step" in line and "lower --learning_rate" in line


def test_help_names_every_setting(capsys):
    for main, cls in ((train_gpt2.main, train_gpt2.Settings), (prepare_data.main, prepare_data.Settings),
                      (sample.main, sample.Settings)):
        with pytest.raises(SystemExit) as stop:
            main(["--help"])
        output = capsys.readouterr().out
        comments = train_gpt2.setting_comments(cls)
        assert stop.value.code == 0
        for name in cls.__dataclass_fields__:
            assert f"--{name}=" in output and (comments.get(name, "") in output)
        assert len(comments) > 0.6 * len(cls.__dataclass_fields__)
