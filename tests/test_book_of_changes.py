"""Every patch in tests/changes is in force everywhere."""
import ast
import re
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from conftest import ROOT, column, log_of
from test_evaluation import check_hellaswag
from test_sampling import check_cache
from test_training import same_tensors, weights_of

import train_gpt2

CHANGES = ROOT / "tests" / "changes"
PATCHES = sorted(path.stem for path in CHANGES.glob("*.patch"))
SIX = "swiglu+rmsnorm+rope+qk_norm+muon+wsd"  # GPT-2 with six ideas of 2019 to 2024
RUN = ["--n_layer=2", "--n_head=2", "--n_embd=16", "--batch_size=2", "--max_steps=40",
       "--warmup_steps=5", "--eval_every=20", "--eval_tokens=1000", "--log_every=5",
       "--checkpoint_every=10", "--device=cpu", "--dtype=float32"]
ENDINGS = [" who lived by the sea.", " named Tom", " wanted a kite. Then", " the"]
QUESTIONS = [("Once there was a girl", ENDINGS, 0), ("Every night Mia dreamed", ENDINGS, 0)]


def head_and_diff(name):
    text = (CHANGES / f"{name}.patch").read_text(encoding="utf-8")
    head, _, diff = text.partition("\n\n")
    return head, diff


class Trained(NamedTuple):
    folder: Path
    log: list  # its rows
    text: str  # by its best weights


def trained(module, argv, folder):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "matmul_speed", lambda *_: 1e9)
        assert module.main([*argv, f"--out_dir={folder}"]) == 0
    model = module.GPT.from_checkpoint(folder / "best.pt")
    return Trained(folder, log_of(folder), model.generate("Once", 50, seed=1))


@pytest.fixture(scope="session")
def plain(stories, tmp_path_factory):
    """A run of the unpatched scripts."""
    folder = tmp_path_factory.mktemp("plain")
    return trained(train_gpt2, [f"--data_dir={stories}", *RUN], folder / "base")


@pytest.fixture(scope="session")
def tuned(plain, stories, tmp_path_factory):
    """A second one, from the best weights of the first."""
    argv = [f"--data_dir={stories}", *RUN, f"--init_from={plain.folder / 'best.pt'}"]
    return trained(train_gpt2, argv, tmp_path_factory.mktemp("tuned") / "run")


def columns_and_files(run):
    files = {path.name for path in run.folder.iterdir()}
    return files.union(run.log[0])


def changes(ours, theirs):
    """What differs between two runs; (later): not in the log's first row."""
    found = []
    for name in ("lr", "train_loss", "val_loss"):
        values = [row[name] for row in ours.log]
        others = [row[name] for row in theirs.log]
        if values[0] != others[0]:
            found.append(name)
        elif values != others:
            found.append(f"{name} (later)")
    if ours.text != theirs.text:
        found.append("text")
    found += sorted(columns_and_files(ours) ^ columns_and_files(theirs))
    return ", ".join(found)


def parts(folder):
    """{(name, lines), ...} of functions, classes and other statements."""
    found = set()
    for path in folder.glob("*.py"):
        code = path.read_text(encoding="utf-8")
        lines = code.splitlines()
        for node in ast.parse(code).body:
            name = getattr(node, "name", "a statement")
            found.add((name, tuple(lines[node.lineno - 1:node.end_lineno])))
    return found


@pytest.mark.parametrize("name", PATCHES)
def test_a_patch_is_small(name, scripts, tmp_path):
    scripts(name)
    head, diff = head_and_diff(name)
    assert re.match(r".*\([^)]* (19|20)\d\d\b.*\n.+\nChanges: .+$", head)
    lines = re.findall(r"^[-+](?![-+])", diff, re.M)
    assert 0 < len(lines) <= (25 if name in ("gqa", "muon", "lora") else 15)
    changed = {part for part, _ in parts(ROOT) ^ parts(tmp_path / "scripts")}
    assert len(changed) <= 2


def crash(module, argv, folder):
    """Train until after step 24 and end there, without saving."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(module.StopRequest, "requested", lambda _, step: step == 24 and 1 / 0)
        trained(module, argv, folder)


@pytest.mark.parametrize("names", [*PATCHES, SIX])
def test_a_change_is_in_force_everywhere(names, scripts, plain, tuned, stories, tmp_path, capsys):
    train_gpt2, sample = scripts(*names.split("+"))
    argv = [f"--data_dir={stories}", *RUN]
    unpatched, seen = plain, "train_loss, val_loss, text"
    if names == "lora":
        argv.append(f"--init_from={plain.folder / 'best.pt'}")
        unpatched = tuned
    whole = trained(train_gpt2, argv, tmp_path / "whole")
    if names != SIX:
        head, _ = head_and_diff(names)
        seen = changes(whole, unpatched)
        assert head.endswith(f"Changes: {seen}")

    crash(train_gpt2, argv, tmp_path / "broken")
    broken = trained(train_gpt2, argv, tmp_path / "broken")
    assert f"continuing {broken.folder} from step 20" in capsys.readouterr().out
    assert changes(broken, whole) == ""
    weights = weights_of(whole.folder)
    same_tensors(weights, weights_of(broken.folder))

    if names == "lora":  # the base is as it was
        base = torch.load(plain.folder / "best.pt", weights_only=True)
        assert float(whole.log[0]["val_loss"]) == base["best_val_loss"]
        for name, tensor in base["model"].items():
            assert torch.equal(weights[name], tensor)
    if names == "log":
        steps = re.findall(r'"step": (\d+)', (broken.folder / "log.jsonl").read_text())
        assert steps == [row["step"] for row in whole.log]

    best = whole.folder / "best.pt"
    model = train_gpt2.GPT.from_checkpoint(best)
    check_cache(model, torch.arange(40)[None], 40, train_gpt2.stream_tokens)
    check_hellaswag(model, QUESTIONS, script=train_gpt2)
    s = train_gpt2.Settings(data_dir=stories)
    loader = train_gpt2.open_rows(s, train_gpt2.open_data(stories), "val", None)
    _, loss = model(*loader.batch(range(1000 // 112)))
    lowest = min(column(whole.folder, "val_loss"))
    assert lowest == pytest.approx(loss.item(), abs=1e-5)
    capsys.readouterr()
    assert sample.main(["Once", f"--checkpoint={best}", "--max_new_tokens=10"]) == 0
    assert capsys.readouterr().out.startswith("Once")
    if "val_loss," in seen or names == "lora":  # another function than GPT-2
        with pytest.raises(train_gpt2.UserError, match="GPT-2: [^\n]+$"):
            sample.export(model, tmp_path / "exported")
    else:
        sample.export(model, tmp_path / "exported")
