"""What the test files share: small data, small runs, helpers."""
import contextlib
import csv
import hashlib
import importlib
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may depend on the network
os.environ.setdefault("OMP_NUM_THREADS", "1")  # for small models and busy machines

import prepare_data  # noqa: E402
import train_gpt2  # noqa: E402

# isort: split
import torch  # noqa: E402

TINY = ["--n_layer=1", "--n_head=2", "--n_embd=16", "--block_size=16", "--batch_size=4",
        "--max_steps=6", "--eval_tokens=100", "--sample_every=10", "--log_every=1"]
RUN = ["--data_dir=data/tales", "--out_dir=out/run", *TINY]
FULL = bool(os.environ.get("FULL_TESTS"))  # the large counts
posix = pytest.mark.skipif(os.name == "nt", reason="signals and limits of POSIX")


def pytest_collection_modifyitems(items):
    """The longest test first."""
    items.sort(key=lambda item: item.name != "test_the_default_run")


@pytest.fixture(scope="session")
def stories(tmp_path_factory):
    """The folder of the embedded stories, prepared once."""
    folder = tmp_path_factory.mktemp("data") / "stories"
    prepare_data.main(["stories", f"--out_dir={folder}"])
    return folder


def shared_file(name):
    """The path of a real text; skips where the texts are missing."""
    path = Path(os.environ.get("SHARED_DATA", "nowhere"), name)
    if not path.exists():
        pytest.skip(f"SHARED_DATA names no folder with {name}")
    return path


@pytest.fixture(scope="session")
def gpt2_vocabulary():
    """Skips where it is not cached, so that no test waits for a network."""
    if not os.environ.get("TIKTOKEN_CACHE_DIR"):
        pytest.skip("TIKTOKEN_CACHE_DIR is not set: GPT-2's vocabulary would be downloaded")
    return train_gpt2.Tokenizer({"kind": "gpt2"})


def random_model(spec=None, scale=1, **shape):
    """Its biases and norms are random too. A large scale makes nearly equal logits rare."""
    torch.manual_seed(2)
    small = dict(vocab_size=300, block_size=24, n_layer=1, n_head=1, n_embd=16)
    tokenizer = None
    if spec:
        tokenizer = train_gpt2.Tokenizer(spec)
        small["vocab_size"] = tokenizer.vocab_size
    config = train_gpt2.GPTConfig(**small | shape)
    model = train_gpt2.GPT(config).eval()
    model.tokenizer = tokenizer
    for parameter in model.parameters():
        noise = torch.randn_like(parameter)
        parameter.data.mul_(scale).add_(0.1 * noise)
    return model


def agree(ours, theirs):
    """The logits of a model here and of one in transformers, which may have more tokens."""
    vocab_size = ours.config.vocab_size
    idx = torch.randint(vocab_size, (2, 20), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        logits, _ = ours(idx)
        difference = logits - theirs(idx).logits[..., :vocab_size]
    assert difference.abs().max() < 1e-4


@pytest.fixture
def small_run(stories, tmp_path, monkeypatch):
    """Options of a run of seconds with all that a resume has to get right."""
    monkeypatch.setattr(train_gpt2, "matmul_speed", lambda *_: 1e9)  # saves half a second
    return [f"--data_dir={stories}", f"--out_dir={tmp_path / 'run'}", "--n_layer=2", "--n_head=2",
            "--n_embd=32", "--dropout=0.1", "--batch_size=4", "--grad_accum_steps=2",
            "--max_steps=30", "--warmup_steps=5", "--eval_every=10", "--eval_tokens=2000",
            "--sample_every=20", "--checkpoint_every=10", "--log_every=1"]


def stop_after(step, number=signal.SIGTERM):
    """A StopRequest that comes after this step."""
    def requested(self, now):
        self.signal = number
        return now == step
    return requested


def stopped(step, argv, script=train_gpt2):
    """Runs main(argv) until a signal comes after this step; the exit status."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(script.StopRequest, "requested", stop_after(step))
        return script.main(argv)


def change_scripts(folder, edit):
    """Applies a patch of this name, or puts one text in place of another, (old, new)."""
    if isinstance(edit, str):
        patch = ROOT / "tests" / "changes" / f"{edit}.patch"
        subprocess.run(["git", "apply", patch], cwd=folder, check=True)
    else:
        path = folder / "train_gpt2.py"
        text = path.read_text(encoding="utf-8")
        assert edit[0] in text
        path.write_text(text.replace(*edit), encoding="utf-8")


@pytest.fixture
def scripts(tmp_path, monkeypatch):
    """A function: changes -> the modules train_gpt2 and sample of copies of the scripts that are
    changed so, in the folder `scripts`. They work in tmp_path."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "scripts"

    def load(*edits):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        for script in ROOT.glob("*.py"):
            shutil.copy(script, folder)
        for edit in edits:
            change_scripts(folder, edit)
        monkeypatch.syspath_prepend(folder)
        for name in ("train_gpt2", "sample"):
            monkeypatch.delitem(sys.modules, name, raising=False)
        changed = importlib.import_module("train_gpt2")
        monkeypatch.setattr(changed, "matmul_speed", lambda *_: 1e9)
        return changed, importlib.import_module("sample")
    return load


@pytest.fixture(scope="session")
def trained_once(tmp_path_factory):
    """Two kinds of data, a run on each: out/abc is done, out/run stopped after 3 steps."""
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(train_gpt2, "matmul_speed", lambda *_: 1e9)
        tales = [f"Tale {i} of a king, a cat and {i * i} mice.\n" for i in range(80)]
        Path("tales.txt").write_text("".join(tales))
        Path("abc.txt").write_text("abc cab bac " * 100)
        prepare_data.main(["tales.txt", "--vocab_size=280", "--out_dir=data/tales"])
        prepare_data.main(["abc.txt", "--tokenizer=char", "--out_dir=data/abc"])
        train_gpt2.main([*RUN, "--data_dir=data/abc", "--rows=stream", "--out_dir=out/abc"])
        stopped(2, RUN)
    return folder


@pytest.fixture
def trained(trained_once, tmp_path, monkeypatch):
    """A copy of it, which is the current folder."""
    monkeypatch.setattr(train_gpt2, "matmul_speed", lambda *_: 1e9)
    shutil.copytree(trained_once, tmp_path / "here", symlinks=True)
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


def log_of(folder):
    with open(folder / "log.csv", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def column(folder, name):
    """What was measured under this name, in the order of the log."""
    return [float(row[name]) for row in log_of(folder) if row[name]]


def put(tree, where, value):
    """Puts a value at the end of a path of keys; None removes what is there."""
    *keys, name = where.split()
    for key in keys:
        tree = tree[key]
    tree[name] = value
    if value is None:
        del tree[name]


def contents(folder):
    """{path: the file's hash, or "folder"}"""
    found = {}
    for path in folder.rglob("*"):
        if path.name != ".lock":
            name = path.relative_to(folder)
            found[name] = "folder"
            if path.is_file():
                found[name] = hashlib.sha256(path.read_bytes()).digest()
    return found


@contextlib.contextmanager
def limited(name, value):
    """A limit of this process is lower inside the with block."""
    import resource
    limit = getattr(resource, name)
    before = resource.getrlimit(limit)
    resource.setrlimit(limit, (value, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(limit, before)


class Bomb:
    """Its pickle makes a folder when it is loaded carelessly."""

    def __reduce__(self):
        return os.mkdir, ("exploded",)


def fails(main, argv, capsys):
    """Run main(argv), which has to end in exit status 2; return its one line."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main(argv)
    assert stop.value.code == 2
    errors = capsys.readouterr().err.strip()
    assert errors.startswith("error: ")
    assert "\n" not in errors, errors
    return errors
