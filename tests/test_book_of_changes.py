"""Every patch in tests/changes is in force everywhere."""
import ast
import importlib.util
import itertools
import re
import shutil
import subprocess
import sys
from contextlib import nullcontext

import pytest
import torch
from conftest import ROOT, log_of
from test_sampling import check_cache

import train_gpt2

CHANGES = ROOT / "tests" / "changes"
PATCHES = sorted(path.stem for path in CHANGES.glob("*.patch"))
SIX = "swiglu+rmsnorm+rope+qk_norm+muon+wsd"  # GPT-2 with six ideas of 2019 to 2024
RUN = ["--n_layer=2", "--n_head=2", "--n_embd=16", "--batch_size=2", "--max_steps=40",
       "--warmup_steps=5", "--eval_every=20", "--eval_tokens=1000", "--log_every=5",
       "--checkpoint_every=10", "--device=cpu", "--dtype=float32"]
KILLED = """import os, sys, train_gpt2
train_gpt2.StopRequest.requested = lambda _, step: step == 24 and os.kill(os.getpid(), 9)
train_gpt2.main(sys.argv[1:])"""


def head_and_diff(name):
    text = (CHANGES / f"{name}.patch").read_text(encoding="utf-8")
    return text.partition("\n\n")[::2]


@pytest.fixture
def patched(tmp_path, monkeypatch):
    """A function: "rope+muon" -> train_gpt2 and sample with these patches."""
    def load(names):
        for script in ROOT.glob("*.py"):
            shutil.copy(script, tmp_path)
        for name in names.split("+"):
            subprocess.run(["git", "apply", CHANGES / f"{name}.patch"], cwd=tmp_path, check=True)
        for name in ("train_gpt2", "sample"):
            spec = importlib.util.spec_from_file_location(name, tmp_path / f"{name}.py")
            monkeypatch.setitem(sys.modules, name, importlib.util.module_from_spec(spec))
            spec.loader.exec_module(sys.modules[name])
        return sys.modules["train_gpt2"], sys.modules["sample"]
    return load


def trained(module, argv, folder):
    """(folder, rows of its log, a text by its best weights)."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "matmul_speed", lambda *_: 1e9)
        assert module.main([*argv, f"--out_dir={folder}"]) == 0
    model = module.GPT.from_checkpoint(folder / "best.pt")
    return folder, log_of(folder), model.generate("Once", 50, seed=1)


@pytest.fixture(scope="session")
def plain(stories, tmp_path_factory):
    """Runs of the unpatched scripts: a new one, and one from its best weights."""
    folder, argv = tmp_path_factory.mktemp("plain"), [f"--data_dir={stories}", *RUN]
    more = f"--init_from={folder}/base/best.pt"
    return [trained(train_gpt2, argv, folder / "base"),
            trained(train_gpt2, [*argv, more], folder / "tuned")]


def changes(ours, theirs):
    """What differs between two runs; (later): not in the log's first row."""
    found = []
    for name in ("lr", "train_loss", "val_loss"):
        differs = [a[name] != b[name] for a, b in zip(ours[1], theirs[1], strict=True)]
        found += [name if differs[0] else f"{name} (later)"] * any(differs)
    names = [{*rows[0], *(path.name for path in folder.iterdir())}
             for folder, rows, _ in (ours, theirs)]
    return ", ".join([*found, *["text"] * (ours[2] != theirs[2]), *sorted(names[0] ^ names[1])])


def parts(folder):
    """{(name, lines), ...} of functions, classes and other statements."""
    found = set()
    for path in folder.glob("*.py"):
        lines = path.read_text(encoding="utf-8").splitlines()
        for node in ast.parse("\n".join(lines)).body:
            name = getattr(node, "name", "a statement")
            found.add((name, tuple(lines[node.lineno - 1:node.end_lineno])))
    return found


@pytest.mark.parametrize("name", PATCHES)
def test_a_patch_is_small(name, patched, tmp_path):
    patched(name)
    head, diff = head_and_diff(name)
    lines = re.findall(r"^[-+](?![-+])", diff, re.M)
    assert 0 < len(lines) <= (25 if name in ("gqa", "muon", "lora") else 15)
    assert len({part for part, _ in parts(ROOT) ^ parts(tmp_path)}) <= 2
    assert re.match(r".*\([^)]* (19|20)\d\d\b.*\n.+\nChanges: .+$", head)


@pytest.mark.parametrize("names", [*PATCHES, SIX])
def test_a_change_is_in_force_everywhere(names, patched, plain, stories, tmp_path, capsys):
    train_gpt2, sample = patched(names)
    argv, whole, broken = [f"--data_dir={stories}", *RUN], tmp_path / "whole", tmp_path / "broken"
    argv += [f"--init_from={plain[0][0] / 'best.pt'}"] * (names == "lora")
    ours, seen = trained(train_gpt2, argv, whole), "train_loss, val_loss, text"
    if names != SIX:
        seen = changes(ours, plain[names == "lora"])
        assert head_and_diff(names)[0].endswith(f"Changes: {seen}")

    if names == "gqa":  # of other shapes: a run of the plain model stays
        there = shutil.copytree(plain[0][0], tmp_path / "run")
        assert train_gpt2.main([*argv, f"--out_dir={there}"]) == 0 and (tmp_path / "run-2").exists()
    if names in ("rope", "muon"):
        killed = subprocess.run([sys.executable, "-c", KILLED, *argv, f"--out_dir={broken}"],
                                cwd=tmp_path)
        assert killed.returncode in (-9, 9)  # 9: on Windows
    else:
        with pytest.MonkeyPatch.context() as patch, pytest.raises(ZeroDivisionError):
            patch.setattr(train_gpt2.StopRequest, "requested", lambda _, step: step == 24 and 1 / 0)
            trained(train_gpt2, argv, broken)
    assert not changes(trained(train_gpt2, argv, broken), ours)
    assert f"continuing {broken} from step 20" in capsys.readouterr().out
    weights, others = (torch.load(folder / "ckpt.pt", weights_only=True)["model"]
                       for folder in (whole, broken))
    assert all(torch.equal(weights[name], others[name]) for name in weights)
    if names == "lora":  # the base is as it was
        base = torch.load(plain[0][0] / "best.pt", weights_only=True)
        assert all(torch.equal(weights[name], base["model"][name]) for name in base["model"])
        assert float(ours[1][0]["val_loss"]) == base["best_val_loss"]
    if names == "log":
        steps = re.findall(r'"step": (\d+)', (broken / "log.jsonl").read_text())
        assert steps == [row["step"] for row in ours[1]]

    model = train_gpt2.GPT.from_checkpoint(whole / "best.pt")
    check_cache(model, torch.arange(40)[None], 40, train_gpt2.stream_tokens)
    s, data = train_gpt2.Settings(data_dir=stories), train_gpt2.open_data(stories)
    x, y = train_gpt2.open_rows(s, data, "val", None).batch(range(1000 // 112))
    logged = min(float(row["val_loss"]) for row in ours[1] if row["val_loss"])
    assert logged == pytest.approx(model(x, y)[1].item(), abs=1e-5)
    assert sample.main(["Once", f"--checkpoint={whole / 'best.pt'}", "--max_new_tokens=10"]) == 0
    assert capsys.readouterr().out.startswith("Once")
    is_gpt2 = "val_loss," not in seen and names != "lora"
    with nullcontext() if is_gpt2 else pytest.raises(train_gpt2.UserError, match="GPT-2: [^\n]+$"):
        sample.export(model, tmp_path / "exported")


@pytest.mark.parametrize("two", [*itertools.combinations(SIX.split("+"), 2)], ids="+".join)
def test_two_changes_go_together(two, patched):
    train_gpt2, _ = patched("+".join(two))
    model = train_gpt2.GPT(train_gpt2.GPTConfig(1024, 80, n_layer=2, n_head=2, n_embd=32), 0.2)
    check_cache(model.eval(), torch.arange(40)[None], 40, train_gpt2.stream_tokens)
