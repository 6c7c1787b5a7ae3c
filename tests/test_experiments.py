"""Every run is an experiment: an edit is never taken for damage and never overlooked, and its
effect is shown."""
import itertools
import re
import shutil
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
import torch
from conftest import RUN, fails, log_of, stopped
from test_sampling import check_cache
from test_training import same_bytes

import prepare_data
import train_gpt2
from train_gpt2 import read_checkpoint


@pytest.fixture
def begun(small_run):
    """The options of a run that was stopped after step 14 of 30."""
    stopped(14, small_run)
    return small_run


SILU = ('nn.GELU(approximate="tanh")', "nn.SiLU()")
TYPO = ("y = causal_attention(q", "y = casual_attention(q")
NO_POSITIONS = ("self.transformer.wte(idx) + self.transformer.wpe(position)",
                "self.transformer.wte(idx)")
COMMENT = ("  # (B, T, C) -> (B, T, 4C)", "")
DOCSTRING = ("Multi-layer", "Many-layered")
ROW_INDEX = ("epoch, row = divmod(row, self.rows_per_epoch)",
             "epoch, row = divmod(int(row), self.rows_per_epoch)")
SLOPE = ('attention: str = "flash"\n', 'attention: str = "flash"\n    slope: float = 0.1\n')
SWISH = ('"gelu_exact": nn.GELU()', '"gelu_exact": nn.GELU(), "swish": nn.SiLU()')
SWISH_TOO = ('"gelu_exact"] = "gelu"', '"gelu_exact", "swish"] = "swish"')  # in Settings
ADAFACTOR = ("optim.AdamW(groups, lr=s.learning_rate, betas=(s.beta1, s.beta2), eps=1e-8,",
             "optim.Adafactor(groups, lr=s.learning_rate)")
ADAFACTOR_TOO = ('fused=device.type in ("cuda", "cpu"))', "")
EDITS = {  # the name that has to be said: (what is replaced, by what)
    "MLP": SILU,
    "RATE": ("class MLP(", "RATE: float = 0.5\n\n\nclass MLP("),
    "a statement at the top level": ("class MLP(", "if True:\n    RATE = 1\n\n\nclass MLP("),
    "FACTOR": ("class MLP(", "FACTOR = 4\n\n\nclass MLP("),
    "GPT": NO_POSITIONS,
    "causal_attention": ("scores + mask", "scores * 1.1 + mask"),
    "Block": ("x = x + self.attn(", "x = x + 0.9 * self.attn("),
    "sample_token": ("probs = F.softmax(logits / temp", "probs = F.softmax(2 * logits / temp"),
    "KVCache": ("self.length = 0", "self.length = 1 - 1"),
    "ShardedLoader": ("np.full((len(rows), T), -1, np.int64)", "np.full((len(rows), T), -1)"),
    "make_optimizer": ("eps=1e-8", "eps=1e-6"),
    "get_lr": ("0.5 * (1 + math.cos(", "0.6 * (1 + math.cos("),
    "train": ("optimizer.zero_grad()", "optimizer.zero_grad(set_to_none=False)"),
}


@pytest.mark.parametrize("name", EDITS)
def test_an_edit_begins_a_new_run_that_names_it(name, scripts, begun, capsys):
    edited, _ = scripts(EDITS[name])
    assert edited.main(begun) == 0
    said = rf"a new run in \S+-2 \(\S+ has other code in {name}\)"
    assert re.search(said, capsys.readouterr().out)


def test_an_edit_of_attention_is_in_force_everywhere(scripts, small_run, tmp_path, capsys):
    """Where torch's kernel would be used too."""
    edited, _ = scripts(EDITS["causal_attention"])
    edited.main([*small_run, "--dtype=float32"])
    assert "differ from torch's kernel, so it is not used" in capsys.readouterr().out
    model = edited.GPT.from_checkpoint(tmp_path / "run" / "best.pt")
    assert not model.transformer.h[0].attn.flash
    check_cache(model, torch.arange(5)[None], 40, edited.stream_tokens)


def test_comments_docstrings_and_part_2_resume(scripts, begun, tmp_path, capsys):
    edited, _ = scripts(COMMENT, DOCSTRING, ROW_INDEX)
    assert edited.main(begun) == 0
    output = capsys.readouterr().out
    assert f"continuing {tmp_path / 'run'} from step 15" in output
    assert f"note: until now {tmp_path / 'run'} has other code in RowIndex" in output


def test_a_mistake_in_edited_code_keeps_its_traceback(scripts, begun, tmp_path):
    edited, sample = scripts(TYPO)
    with pytest.raises(NameError, match="casual_attention"):
        edited.main([*begun, "--resume=always"])
    with pytest.raises(NameError, match="casual_attention"):
        sample.main(["Once", f"--checkpoint={tmp_path / 'run' / 'ckpt.pt'}"])


def test_a_parameter_without_a_gradient_has_no_state(scripts, small_run, tmp_path):
    """Positions are not added: the embedding of positions never learns."""
    edited, _ = scripts(NO_POSITIONS)
    argv = [*small_run, "--dropout=0"]
    edited.main([*argv, f"--out_dir={tmp_path / 'whole'}"])
    stopped(14, argv, edited)
    assert edited.main(argv) == 0
    same_bytes(tmp_path / "whole", tmp_path / "run")
    saved = read_checkpoint(tmp_path / "run" / "ckpt.pt")
    assert "transformer.wpe.weight" not in saved["optimizer"]["state"]


def test_another_optimizer_resumes(scripts, small_run, tmp_path):
    """Its state has other shapes than AdamW's."""
    edited, _ = scripts(ADAFACTOR, ADAFACTOR_TOO)
    edited.main([*small_run, f"--out_dir={tmp_path / 'whole'}"])
    stopped(14, small_run, edited)
    assert edited.main(small_run) == 0
    same_bytes(tmp_path / "whole", tmp_path / "run")


@pytest.mark.parametrize("name, edits", [("GPTConfig", [SLOPE]), ("MLP", [SWISH, SWISH_TOO])])
def test_an_edit_of_the_config_is_taken_back(name, edits, scripts, small_run, tmp_path, capsys):
    """Its checkpoint is no damaged one: it is of other code."""
    edited, _ = scripts(*edits)
    edited.main(small_run)
    plain, sample = scripts()
    assert plain.main(small_run) == 0
    output = capsys.readouterr().out
    assert re.search(rf"a new run in \S+-2 \(\S+ has other code in {name}", output)
    assert "run had" in output  # the two are compared
    line = fails(sample.main, [f"--checkpoint={tmp_path / 'run'}"], capsys)
    assert f"trained by other code in {name}: put that back" in line


def test_a_finished_run_is_continued(small_run, tmp_path, capsys):
    """With the learning rates of the new schedule, and every step once. What was measured at the
    end, where nothing else was due, stays in the log."""
    small_run.append("--eval_every=20")
    train_gpt2.main(small_run)
    end = log_of(tmp_path / "run")[-1]
    longer = [*small_run, "--max_steps=45", "--resume=always"]
    assert train_gpt2.main(longer) == 0
    output = capsys.readouterr().out
    assert f"note: until now {tmp_path / 'run'} has max_steps=30" in output
    lines = log_of(tmp_path / "run")
    assert [int(line["step"]) for line in lines] == list(range(46))
    assert lines[30]["val_loss"] == end["val_loss"]
    s = train_gpt2.Settings(max_steps=45, warmup_steps=5)
    for line in lines[30:45]:
        assert float(line["lr"]) == train_gpt2.get_lr(int(line["step"]), s)
    seconds = [float(line["seconds"]) for line in lines]
    assert seconds == sorted(seconds)
    assert train_gpt2.main(longer) == 0
    assert "nothing is left to do" in capsys.readouterr().out
    for more, message in (("--max_steps=40", "has taken 45 steps"), ("--overwrite", "leave one")):
        assert message in fails(train_gpt2.main, [*longer, more], capsys)


def test_a_run_is_continued_by_other_code(scripts, begun, tmp_path, capsys):
    """Its folder keeps the script that went on. A run that took no step is passed over, and a shape
    cannot change."""
    failing, _ = scripts(("lr = get_lr(step, s)", "lr = 1 / 0"))
    with pytest.raises(ZeroDivisionError):
        failing.main(begun)
    edited, _ = scripts(SILU)
    always = [*begun, "--resume=always"]
    assert "has n_layer=2, not 3" in fails(edited.main, [*always, "--n_layer=3"], capsys)
    assert edited.main(always) == 0
    assert f"continuing {tmp_path / 'run'} from step 15" in capsys.readouterr().out
    assert "nn.SiLU()" in (tmp_path / "run" / "train_gpt2.py").read_text(encoding="utf-8")
    assert "nn.SiLU()" in read_checkpoint(tmp_path / "run" / "best.pt")["code"]


def test_other_data_begins_a_new_run(trained, capsys):
    """Under the same name; the run on the old data is not compared with it."""
    shutil.rmtree("data/tales")
    Path("tales.txt").write_text("Another tale of a queen and 9 mice.\n" * 80)
    prepare_data.main(["tales.txt", "--vocab_size=280", "--out_dir=data/tales"])
    assert train_gpt2.main(RUN) == 0
    output = capsys.readouterr().out
    assert "a new run in out/run-2 (out/run has other data in data/tales" in output
    assert "out/run had" not in output


def test_an_optimizer_that_does_not_fit_starts_anew(scripts, small_run, capsys):
    edited, _ = scripts("muon")
    stopped(14, small_run, edited)
    plain, _ = scripts()
    assert plain.main([*small_run, "--resume=always"]) == 0
    assert "note: the optimizer starts anew" in capsys.readouterr().out


def test_a_run_goes_on_without_the_weights_that_it_began_with(small_run, tmp_path, capsys):
    first = tmp_path / "first"
    train_gpt2.main([*small_run, "--max_steps=2", f"--out_dir={first}"])
    argv = [*small_run, f"--init_from={first / 'best.pt'}"]
    stopped(14, argv)
    shutil.rmtree(first)
    assert train_gpt2.main(argv) == 0
    assert "from step 15" in capsys.readouterr().out


def test_other_code_is_not_exported_or_evaluated(scripts, small_run, tmp_path, capsys):
    edited, _ = scripts(SILU)
    edited.main(small_run)
    plain, sample = scripts()
    best = tmp_path / "run" / "best.pt"
    told = "trained by other code in MLP"
    assert told in fails(sample.main, [f"--checkpoint={best}", "--export=new"], capsys)
    evaluation = [*small_run[:1], "--eval_only", f"--init_from={best}"]
    assert told in fails(plain.main, evaluation, capsys)
    assert sample.main(["Once", f"--checkpoint={best}"]) == 0
    assert told in capsys.readouterr().err


def test_weights_of_other_shapes_name_the_code(scripts, small_run, tmp_path, capsys):
    edited, _ = scripts("rope")
    edited.main(small_run)
    _, sample = scripts()
    line = fails(sample.main, [f"--checkpoint={tmp_path / 'run' / 'best.pt'}"], capsys)
    assert "trained by other code in CausalSelfAttention and GPT: put that back" in line
    assert "not a valid checkpoint" not in line


@pytest.mark.parametrize("holder, name, step", [
    (train_gpt2, "build_model", 30),  # killed before the new run's first checkpoint
    (train_gpt2.Run, "clear_leftovers", 0),  # and right after it
])
def test_an_overwritten_run_stays_until_the_new_one_is_there(
        holder, name, step, small_run, tmp_path, monkeypatch):
    train_gpt2.main(small_run)
    best = tmp_path / "run" / "best.pt"
    before = best.read_bytes()
    monkeypatch.setattr(holder, name, lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train_gpt2.main([*small_run, "--overwrite"])
    assert read_checkpoint(best.with_name("ckpt.pt"))["step"] == step
    assert best.read_bytes() == before


def test_the_scripts_folder_is_refused(scripts, small_run, tmp_path, capsys):
    copied, _ = scripts()
    argv = [*small_run, "--overwrite", f"--out_dir={tmp_path / 'scripts'}"]
    assert "holds the scripts" in fails(copied.main, argv, capsys)


@pytest.mark.parametrize("options, said", [
    (["--max_steps=5", "--warmup_steps=9"], "the run ends within its 9 warm-up steps"),
    (["--learning_rate=0"], "validation loss never fell below its first value"),
])
def test_a_run_that_learns_little_says_so(options, said, small_run, capsys):
    assert train_gpt2.main([*small_run, *options]) == 0
    assert said in capsys.readouterr().out


# ---- The comparison ----


def compared_runs(scripts, argv, *more):
    """A run, then one with SiLU; what the second run prints is still to be read."""
    train_gpt2.main(argv)
    edited, _ = scripts(SILU)
    edited.main([*argv, *more])


def test_what_an_edit_did(scripts, small_run, tmp_path, capsys):
    """In one line, one table, one diff and one picture."""
    compared_runs(scripts, small_run)
    ours, theirs = (float(log_of(tmp_path / name)[-1]["val_loss"]) for name in ("run-2", "run"))
    assert (f"validation loss {ours:.4f} at step 30, {tmp_path / 'run'} had {theirs:.4f} "
            f"({ours - theirs:+.4f})\n") in capsys.readouterr().out
    report = (tmp_path / "run-2" / "report.md").read_text(encoding="utf-8")
    assert f"| 30 | {ours:.4f} | {theirs:.4f} | {ours - theirs:+.4f} |" in report
    assert re.search(r"^\+ .* nn\.SiLU\(\)", report, re.M)
    assert "    python train_gpt2.py --data_dir=" in report
    assert '<path stroke="#888" d="M' in (tmp_path / "run-2" / "loss.svg").read_text()


@pytest.mark.parametrize("option, said", [
    ("--seed=2", "other seed"), ("--max_steps=20", "other max_steps"),
    ("--batch_size=8", "other batch_size")])
def test_an_unfair_pair_is_called_so(option, said, scripts, small_run, capsys):
    compared_runs(scripts, small_run, option)
    assert f"not a fair pair: {said}" in capsys.readouterr().out


def test_a_damaged_run_is_left_out(small_run, tmp_path, capsys):
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "ckpt.pt").write_bytes(b"not one")
    assert train_gpt2.main([*small_run, f"--compare={tmp_path / 'damaged'}"]) == 0
    output = capsys.readouterr().out
    assert f"note: not compared with {tmp_path / 'damaged'}: " in output


def test_a_run_that_is_removed_meanwhile(small_run, tmp_path, monkeypatch, capsys):
    other = tmp_path / "a&b"
    train_gpt2.main([*small_run, f"--out_dir={other}"])
    log_step = train_gpt2.Run.log_step

    def remove(run, *args):
        shutil.rmtree(other, ignore_errors=True)
        log_step(run, *args)
    monkeypatch.setattr(train_gpt2.Run, "log_step", remove)
    assert train_gpt2.main([*small_run, f"--compare={other}"]) == 0
    assert f"note: no longer compared with {other}: " in capsys.readouterr().out
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


def overlap(one, other):
    lefts, tops, rights, bottoms = zip(one, other, strict=True)
    return max(lefts) < min(rights) and max(tops) < min(bottoms)


def test_no_label_touches_another(scripts, small_run, tmp_path):
    small_run.remove("--eval_tokens=2000")  # of the whole split the floor is known
    compared_runs(scripts, small_run)
    for name in ("run", "run-2"):
        labels = boxes(tmp_path / name / "loss.svg")
        assert len(labels) > 20
        for left, _, right, _ in labels:
            assert 0 <= left < right <= 760
        for pair in itertools.combinations(labels, 2):
            assert not overlap(*pair), pair


def test_without_a_floor_there_is_one_panel(small_run, tmp_path):
    train_gpt2.main([*small_run, "--rows=stream"])
    picture = (tmp_path / "run" / "loss.svg").read_text(encoding="utf-8")
    assert 'viewBox="0 0 720 340"' in picture
    assert "by skill" not in picture
    assert "prefers-color-scheme: dark" in picture
