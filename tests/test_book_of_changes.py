"""The patches in tests/changes, one idea each: every one is in force everywhere."""
import importlib.util
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

PATCHES = sorted((ROOT / "tests" / "changes").glob("*.patch"))
RUN = ["--n_layer=2", "--n_head=2", "--n_embd=32", "--batch_size=4", "--max_steps=40",
       "--warmup_steps=5", "--eval_every=20", "--eval_tokens=1000", "--sample_every=1000",
       "--checkpoint_every=10", "--device=cpu", "--dtype=float32", "--log_every=5"]


@pytest.fixture
def changed(request, tmp_path, monkeypatch):
    """train_gpt2 and sample as modules, with the patch applied to copies of the scripts."""
    for name in ("train_gpt2.py", "prepare_data.py", "sample.py"):
        shutil.copy(ROOT / name, tmp_path)
    subprocess.run(["git", "apply", request.param], cwd=tmp_path, check=True)
    modules = []
    for name in ("train_gpt2", "sample"):
        spec = importlib.util.spec_from_file_location(name, tmp_path / f"{name}.py")
        modules.append(importlib.util.module_from_spec(spec))
        monkeypatch.setitem(sys.modules, name, modules[-1])
        spec.loader.exec_module(modules[-1])
    monkeypatch.setattr(modules[0], "matmul_speed", lambda *_: 1e9)
    return modules


@pytest.mark.parametrize("patch", PATCHES, ids=lambda path: path.stem)
def test_a_patch_is_small(patch):
    lines = patch.read_text(encoding="utf-8").splitlines()
    counts = [sum(line.startswith(sign) and not line.startswith(sign * 3) for line in lines)
              for sign in "+-"]
    assert 0 < max(counts) <= (25 if patch.stem in ("gqa", "muon", "lora") else 15)
    assert lines[0][0].isalpha()  # prose says what it is


def uncached_text(model, idx, count):
    """Greedy text that reads everything again for each token, and how sure each choice was."""
    gaps = []
    for _ in range(count):
        top = model(idx)[0][:, -1].topk(2)
        gaps.append((top.values[0, 0] - top.values[0, 1]).item())
        idx = torch.cat((idx, top.indices[:, :1]), dim=1)
    return idx, gaps


@torch.no_grad()
def check_model(train_gpt2, model, folder):
    """The cache, generate and evaluate compute what GPT.forward computes."""
    generator = torch.Generator().manual_seed(1)
    idx = torch.randint(model.config.vocab_size, (1, 60), generator=generator)
    cache = train_gpt2.KVCache(60)
    parts = (idx[:, :40], *idx[:, 40:].split(1, dim=1))
    cached = [model(part, cache=cache)[0][:, -1] for part in parts]
    plain = model(idx)[0]
    assert (torch.stack(cached, dim=1) - plain[:, 39:]).abs().max() < 1e-4
    text, gaps = uncached_text(model, idx[:, :10], 40)
    greedy = model.generate(idx[:, :10], 40, temperature=0)
    sure = next((i for i, gap in enumerate(gaps) if gap < 1e-3), 40)  # until a tie
    assert torch.equal(greedy[:, :10 + sure], text[:, :10 + sure])
    s = train_gpt2.Settings(data_dir=str(folder), eval_tokens=2000, device="cpu", dtype="float32")
    data = train_gpt2.open_data(folder)
    loader = train_gpt2.open_rows(s, data, "val", None)
    found = train_gpt2.evaluate(model, loader, s, train_gpt2.World(s), data)["val_loss"]
    x, y = loader.batch(range(2000 // s.block_size))
    assert found == pytest.approx(model(x, y)[1].item(), abs=1e-5)


@pytest.mark.parametrize("changed", PATCHES, indirect=True, ids=lambda path: path.stem)
def test_a_change_is_in_force_everywhere(changed, stories, tmp_path, monkeypatch, capsys):
    train_gpt2, sample = changed
    whole, broken = tmp_path / "out" / "whole", tmp_path / "out" / "broken"
    argv = [f"--data_dir={stories}", *RUN]
    assert train_gpt2.main([*argv, f"--out_dir={whole}"]) == 0
    with monkeypatch.context() as patch:
        patch.setattr(train_gpt2.StopRequest, "requested", lambda self, step: step == 24)
        train_gpt2.main([*argv, f"--out_dir={broken}"])
    assert train_gpt2.main([*argv, f"--out_dir={broken}"]) == 0
    assert f"continuing {broken} from step 25" in capsys.readouterr().out
    ours, theirs = (torch.load(folder / "ckpt.pt", weights_only=True)["model"]
                    for folder in (whole, broken))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    model = train_gpt2.GPT.from_checkpoint(whole / "best.pt")
    check_model(train_gpt2, model, stories)
    argv = ["Once", f"--checkpoint={whole / 'best.pt'}", "--max_new_tokens=10", "--seed=1"]
    assert sample.main(argv) == 0
    assert capsys.readouterr().out.startswith("Once")
    try:
        sample.export(model, tmp_path / "exported")
    except train_gpt2.UserError as error:
        assert "another function than transformers' GPT-2" in str(error)
