"""What the README prints works: its commands run, its lessons exist."""
import re
import shlex
import sys

import first_principles
import pytest
from conftest import ROOT

import prepare_data
import sample
import train_gpt2

README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"^    (?:\S.* && )?((?:python|torchrun) .+?)(?:  +#.*)?$", README, re.MULTILINE)
NETWORK = ("fineweb", "tinystories", "shakespeare", "hf:", "hellaswag", "--init_from=gpt2", "--preset=gpt2", "torchrun")


def test_every_command_runs_as_printed(tmp_path, monkeypatch, gpt2_vocabulary, capsys):
    """In the README's order, in an empty folder that holds what a reader would have; long ones cut short. Those that
    need a network are tested with servers of our own, torchrun and the benchmark by themselves."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes").mkdir()
    text = "It is never too late to learn how a language model works. " * 400
    (tmp_path / "my_text.txt").write_text(text, encoding="utf-8")
    for i in range(3):
        (tmp_path / "notes" / f"{i}.jsonl").write_text(f'{{"body": "{text[:2000]}"}}\n' * 4, encoding="utf-8")
    monkeypatch.setattr("builtins.input", lambda prompt: "")
    ran = []
    for command in COMMANDS:
        words = shlex.split(command)
        if any(word in command for word in NETWORK) or words[1] in ("-m", "tests/benchmark.py"):
            continue
        main, argv = {"train_gpt2.py": train_gpt2.main, "prepare_data.py": prepare_data.main, "sample.py": sample.main,
                      "tests/first_principles.py": first_principles.main}[words[1]], words[2:]
        if main is train_gpt2.main:
            # The stories are prepared by a child process, whose script stands beside ours
            argv += ["--max_steps=4", "--eval_tokens=2000", "--warmup_steps=2"]
        if main is first_principles.main:
            monkeypatch.setattr(sys, "argv", words[1:])
            argv = []
        assert not main(*([argv] if argv or main is not first_principles.main else [])), command
        ran.append(words[1])
    assert ran.count("train_gpt2.py") >= 2 and ran.count("sample.py") >= 5 and ran.count("prepare_data.py") >= 3
    assert "warning" not in capsys.readouterr().err.lower()


@pytest.mark.parametrize("idea, where, test", re.findall(r"^\| (.+) \| `([\w.]+)` \| `(test_\w+)` \|$", README, re.M))
def test_a_lesson_is_where_the_index_says(idea, where, test):
    scripts = [train_gpt2, prepare_data, sample, first_principles]
    assert any(hasattr(script, where.split(".")[-1]) for script in scripts), where
    assert any(f"def {test}(" in path.read_text(encoding="utf-8") for path in (ROOT / "tests").glob("test_*.py")), test


def test_there_are_enough_lessons():
    assert len(re.findall(r"^\| .+ \| `[\w.]+` \| `test_\w+` \|$", README, re.MULTILINE)) >= 25
