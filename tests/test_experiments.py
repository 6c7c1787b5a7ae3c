"""Every run is an experiment: an edit is never taken for damage and never overlooked, and its
effect is shown."""
import importlib.util
import re
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ElementTree

import pytest
import torch
from conftest import ROOT, fails, log_of, stop_after
from test_training import same_bytes

SHORT = ["--max_steps=30", "--eval_every=10", "--checkpoint_every=10", "--log_every=1"]


@pytest.fixture
def scripts(tmp_path, monkeypatch):
    """A function: replacements [(old, new), ...] or the name of a patch -> the modules train_gpt2
    and sample of copies of the scripts that are edited so. They work in tmp_path."""
    monkeypatch.chdir(tmp_path)

    def load(*edits):
        folder = tmp_path / "scripts"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        for script in ROOT.glob("*.py"):
            shutil.copy(script, folder)
        path = folder / "train_gpt2.py"
        for edit in edits:
            if isinstance(edit, str):
                patch = ROOT / "tests" / "changes" / f"{edit}.patch"
                subprocess.run(["git", "apply", patch], cwd=folder, check=True)
            else:
                text = path.read_text(encoding="utf-8")
                assert edit[0] in text
                path.write_text(text.replace(*edit), encoding="utf-8")
        for name in ("train_gpt2", "sample"):
            spec = importlib.util.spec_from_file_location(name, folder / f"{name}.py")
            monkeypatch.setitem(sys.modules, name, importlib.util.module_from_spec(spec))
            spec.loader.exec_module(sys.modules[name])
        sys.modules["train_gpt2"].matmul_speed = lambda *_: 1e9
        return sys.modules["train_gpt2"], sys.modules["sample"]
    return load


def stop_at(train_gpt2, step, argv):
    """Train until the run is asked to stop after this step."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_gpt2.StopRequest, "requested", stop_after(step))
        assert train_gpt2.main(argv) == 143


SILU = ('nn.GELU(approximate="tanh")', "nn.SiLU()")
TYPO = ("y = causal_attention(q", "y = casual_attention(q")
NO_POSITIONS = ("self.transformer.wte(idx) + self.transformer.wpe(position)",
                "self.transformer.wte(idx)")
EDITS = [  # (what is replaced, by what), the name that has to be said
    (SILU, "MLP"),
    (NO_POSITIONS, "GPT"),
    (("scores + mask", "scores * 1.1 + mask"), "causal_attention"),
    (("x = x + self.attn(", "x = x + 0.9 * self.attn("), "Block"),
    (("probs = F.softmax(logits / temperature", "probs = F.softmax(2 * logits / temperature"),
     "sample_token"),
    (("self.length = 0", "self.length = 1 - 1"), "KVCache"),
    (("y = np.full((len(rows), T), -1, np.int64)", "y = np.full((len(rows), T), -1)"),
     "ShardedLoader"),
    (("eps=1e-8", "eps=1e-6"), "make_optimizer"),
    (("0.5 * (1 + math.cos(", "0.6 * (1 + math.cos("), "get_lr"),
    (("optimizer.zero_grad()", "optimizer.zero_grad(set_to_none=False)"), "train"),
]


@pytest.mark.parametrize("edit, name", EDITS, ids=[name for _, name in EDITS])
def test_an_edit_begins_a_new_run_that_names_it(edit, name, scripts, small_run, capsys):
    train_gpt2, _ = scripts()
    stop_at(train_gpt2, 14, [*small_run, *SHORT])
    train_gpt2, _ = scripts(edit)
    assert train_gpt2.main([*small_run, *SHORT]) == 0
    said = rf"a new run in \S+-2 \(\S+ has other code in {name}\)"
    assert re.search(said, capsys.readouterr().out)


def test_comments_docstrings_and_part_2_resume(scripts, small_run, tmp_path, capsys):
    train_gpt2, _ = scripts()
    stop_at(train_gpt2, 14, [*small_run, *SHORT])
    train_gpt2, _ = scripts(("  # (B, T, C) -> (B, T, 4C)", ""), ("Multi-layer", "Many-layered"),
                            ("epoch, row = divmod(row, self.rows_per_epoch)",
                             "epoch, row = divmod(int(row), self.rows_per_epoch)"))
    assert train_gpt2.main([*small_run, *SHORT]) == 0
    output = capsys.readouterr().out
    assert f"continuing {tmp_path / 'run'} from step 15" in output
    assert f"note: until now {tmp_path / 'run'} has other code in RowIndex" in output


def test_a_mistake_in_edited_code_keeps_its_traceback(scripts, small_run, tmp_path):
    train_gpt2, _ = scripts()
    stop_at(train_gpt2, 14, [*small_run, *SHORT])
    train_gpt2, sample = scripts(TYPO)
    with pytest.raises(NameError, match="casual_attention"):
        train_gpt2.main([*small_run, *SHORT, "--resume=always"])
    with pytest.raises(NameError, match="casual_attention"):
        sample.main(["Once", f"--checkpoint={tmp_path / 'run' / 'ckpt.pt'}"])


def test_a_parameter_without_a_gradient_has_no_state(scripts, small_run, tmp_path):
    """Positions are not added: the embedding of positions never learns."""
    train_gpt2, _ = scripts(NO_POSITIONS)
    argv = [*small_run, *SHORT, "--dropout=0"]
    train_gpt2.main([*argv, f"--out_dir={tmp_path / 'whole'}"])
    stop_at(train_gpt2, 14, argv)
    assert train_gpt2.main(argv) == 0
    same_bytes(tmp_path / "whole", tmp_path / "run")
    saved = torch.load(tmp_path / "run" / "ckpt.pt", weights_only=True)
    assert "transformer.wpe.weight" not in saved["optimizer"]["state"]


def test_a_finished_run_is_continued(scripts, small_run, tmp_path, capsys):
    """With the learning rates of the new schedule, and every step once."""
    train_gpt2, _ = scripts()
    train_gpt2.main([*small_run, *SHORT])
    longer = [*small_run, *SHORT, "--max_steps=45", "--resume=always"]
    assert train_gpt2.main(longer) == 0
    output = capsys.readouterr().out
    assert f"note: until now {tmp_path / 'run'} has max_steps=30" in output
    lines = log_of(tmp_path / "run")
    assert [int(line["step"]) for line in lines] == list(range(46))
    s = train_gpt2.Settings(max_steps=45, warmup_steps=5)
    for line in lines[30:45]:
        assert float(line["lr"]) == train_gpt2.get_lr(int(line["step"]), s)
    seconds = [float(line["seconds"]) for line in lines]
    assert seconds == sorted(seconds)
    assert train_gpt2.main(longer) == 0
    assert "nothing is left to do" in capsys.readouterr().out
    for more, message in (("--max_steps=40", "has taken 45 steps"), ("--overwrite", "leave one")):
        assert message in fails(train_gpt2.main, [*longer, more], capsys)


def test_an_optimizer_that_does_not_fit_starts_anew(scripts, small_run, capsys):
    train_gpt2, _ = scripts("muon")
    stop_at(train_gpt2, 14, [*small_run, *SHORT])
    train_gpt2, _ = scripts()
    assert train_gpt2.main([*small_run, *SHORT, "--resume=always"]) == 0
    assert "note: the optimizer starts anew" in capsys.readouterr().out


def test_a_run_goes_on_without_the_weights_that_it_began_with(scripts, small_run, tmp_path, capsys):
    train_gpt2, _ = scripts()
    train_gpt2.main([*small_run, "--max_steps=2", f"--out_dir={tmp_path / 'first'}"])
    argv = [*small_run, *SHORT, f"--init_from={tmp_path / 'first' / 'best.pt'}"]
    stop_at(train_gpt2, 14, argv)
    shutil.rmtree(tmp_path / "first")
    assert train_gpt2.main(argv) == 0
    assert "from step 15" in capsys.readouterr().out


def test_other_code_is_not_exported_or_evaluated(scripts, small_run, tmp_path, capsys):
    train_gpt2, _ = scripts(SILU)
    train_gpt2.main([*small_run, *SHORT])
    train_gpt2, sample = scripts()
    best = tmp_path / "run" / "best.pt"
    told = "trained by other code in MLP"
    assert told in fails(sample.main, [f"--checkpoint={best}", "--export=new"], capsys)
    evaluation = [*small_run[:1], "--eval_only", f"--init_from={best}"]
    assert told in fails(train_gpt2.main, evaluation, capsys)
    assert sample.main(["Once", f"--checkpoint={best}"]) == 0
    assert told in capsys.readouterr().err


def test_weights_of_other_shapes_name_the_code(scripts, small_run, tmp_path, capsys):
    train_gpt2, _ = scripts("rope")
    train_gpt2.main([*small_run, *SHORT])
    _, sample = scripts()
    line = fails(sample.main, [f"--checkpoint={tmp_path / 'run' / 'best.pt'}"], capsys)
    assert "trained by other code in CausalSelfAttention and GPT: put that back" in line
    assert "not a valid checkpoint" not in line


@pytest.mark.parametrize("moment", ["build_model", "Run.clear_leftovers"])
def test_an_overwritten_run_stays_until_the_new_one_is_there(moment, scripts, small_run, tmp_path):
    """Killed before the new run's first checkpoint, and right after it."""
    train_gpt2, _ = scripts()
    train_gpt2.main([*small_run, *SHORT])
    before = (tmp_path / "run" / "best.pt").read_bytes()

    def killed(*_):
        raise ZeroDivisionError
    holder, name = (train_gpt2.Run, "clear_leftovers") if "." in moment else (train_gpt2, moment)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(holder, name, killed)
        train_gpt2.main([*small_run, *SHORT, "--overwrite"])
    step = torch.load(tmp_path / "run" / "ckpt.pt", weights_only=True)["step"]
    assert step == (30 if moment == "build_model" else 0)
    assert (tmp_path / "run" / "best.pt").read_bytes() == before


def test_out_of_memory_while_resuming(scripts, small_run, capsys):
    train_gpt2, _ = scripts()
    stop_at(train_gpt2, 14, [*small_run, *SHORT])

    def no_memory(*_):
        raise MemoryError
    train_gpt2.load_training_state = no_memory
    line = fails(train_gpt2.main, [*small_run, *SHORT], capsys)
    assert "out of memory: halve --batch_size" in line and "--overwrite" not in line


def test_the_scripts_folder_is_refused(scripts, small_run, tmp_path, capsys):
    train_gpt2, _ = scripts()
    argv = [*small_run, "--overwrite", f"--out_dir={tmp_path / 'scripts'}"]
    assert "holds the scripts" in fails(train_gpt2.main, argv, capsys)


# ---- What is said ----


def test_what_was_set_is_used_or_refused_or_said(scripts, small_run, tmp_path, capsys):
    train_gpt2, _ = scripts()
    assert train_gpt2.main([*small_run, "--max_steps=5", "--warmup_steps=9"]) == 0
    assert "the run ends within its 9 warm-up steps" in capsys.readouterr().out
    best = tmp_path / "run" / "best.pt"
    argv = [*small_run, f"--init_from={best}"]
    assert "has a context of 112" in fails(train_gpt2.main, [*argv, "--block_size=512"], capsys)
    assert "has n_layer=2" in fails(train_gpt2.main, [*argv, "--n_layer=3"], capsys)
    assert "finetune needs weights" in fails(train_gpt2.main, ["--preset=finetune"], capsys)
    idle = [*argv, "--learning_rate=0", f"--out_dir={tmp_path / 'idle'}"]
    assert train_gpt2.main(idle) == 0
    assert "validation loss never fell below its first value" in capsys.readouterr().out


# ---- The comparison ----


def compared_runs(scripts, small_run, *more):
    """A run, then one with SiLU; what the second run prints is still to be read."""
    train_gpt2, _ = scripts()
    train_gpt2.main([*small_run, *SHORT])
    train_gpt2, _ = scripts(SILU)
    train_gpt2.main([*small_run, *SHORT, *more])


def test_what_an_edit_did(scripts, small_run, tmp_path, capsys):
    """In one line, one table, one diff and one picture."""
    compared_runs(scripts, small_run)
    ours, theirs = (log_of(tmp_path / name)[-1]["val_loss"] for name in ("run-2", "run"))
    ours, theirs = float(ours), float(theirs)
    assert (f"validation loss {ours:.4f} at step 30, {tmp_path / 'run'} had {theirs:.4f} "
            f"({ours - theirs:+.4f})\n") in capsys.readouterr().out
    report = (tmp_path / "run-2" / "report.md").read_text(encoding="utf-8")
    assert f"| 30 | {ours:.4f} | {theirs:.4f} | {ours - theirs:+.4f} |" in report
    assert '+        acts = {"relu": nn.ReLU(), "gelu": nn.SiLU(), "gelu_exact"' in report
    assert "    python train_gpt2.py --data_dir=" in report
    assert '<path stroke="#888" d="M' in (tmp_path / "run-2" / "loss.svg").read_text()


@pytest.mark.parametrize("option, said", [
    ("--seed=2", "other seed"), ("--max_steps=20", "other max_steps"),
    ("--batch_size=8", "other batch_size")])
def test_an_unfair_pair_is_called_so(option, said, scripts, small_run, capsys):
    compared_runs(scripts, small_run, option)
    assert f"not a fair pair: {said}" in capsys.readouterr().out


def test_a_damaged_run_is_left_out(scripts, small_run, tmp_path, capsys):
    train_gpt2, _ = scripts()
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "ckpt.pt").write_bytes(b"not one")
    assert train_gpt2.main([*small_run, *SHORT, f"--compare={tmp_path / 'damaged'}"]) == 0
    output = capsys.readouterr().out
    assert f"note: not compared with {tmp_path / 'damaged'}: " in output


def test_a_run_that_is_removed_meanwhile(scripts, small_run, tmp_path, capsys):
    train_gpt2, _ = scripts()
    train_gpt2.main([*small_run, *SHORT, f"--out_dir={tmp_path / 'a&b'}"])
    log_step = train_gpt2.Run.log_step

    def remove(run, *args):
        shutil.rmtree(tmp_path / "a&b", ignore_errors=True)
        log_step(run, *args)
    train_gpt2.Run.log_step = remove
    assert train_gpt2.main([*small_run, *SHORT, f"--compare={tmp_path / 'a&b'}"]) == 0
    assert f"note: no longer compared with {tmp_path / 'a&b'}: " in capsys.readouterr().out
    ElementTree.parse(tmp_path / "run" / "loss.svg")


# ---- The picture ----


def boxes(path):
    """(left, top, right, bottom) of every text; a letter is at most 8 wide, a line 13 high."""
    found = []
    for text in ElementTree.parse(path).getroot().iter("{http://www.w3.org/2000/svg}text"):
        width = 8 * len("".join(text.itertext()))
        x, y = float(text.get("x")), float(text.get("y"))
        shift = {"end": width, "middle": width / 2}.get(text.get("text-anchor"), 0)
        found.append((x - shift, y - 11, x - shift + width, y + 2))
    return found


def test_no_label_touches_another(scripts, small_run, tmp_path):
    whole_split = [option for option in small_run if "eval_tokens" not in option]
    compared_runs(scripts, whole_split)
    for name in ("run", "run-2"):
        labels = boxes(tmp_path / name / "loss.svg")
        assert len(labels) > 20
        for i, (left, top, right, bottom) in enumerate(labels):
            assert left >= 0 and right <= 760
            for other in labels[:i]:
                apart = (right <= other[0] or other[2] <= left or bottom <= other[1]
                         or other[3] <= top)
                assert apart, (labels[i], other)


def test_without_a_floor_there_is_one_panel(scripts, small_run, tmp_path):
    train_gpt2, _ = scripts()
    train_gpt2.main([*small_run, *SHORT, "--rows=stream"])
    picture = (tmp_path / "run" / "loss.svg").read_text(encoding="utf-8")
    assert 'viewBox="0 0 720 340"' in picture and "by skill" not in picture
    assert "prefers-color-scheme: dark" in picture
