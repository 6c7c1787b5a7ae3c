"""What the README prints works: its commands run, its lessons exist."""
import re
import shlex

import first_principles
import pytest
from conftest import ROOT

import prepare_data
import sample
import train_gpt2

README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"^    (?:\S.* && )?((?:python|torchrun) .+?)(?:  +#.*)?$", README, re.M)
NETWORK = ("fineweb", "tinystories", "shakespeare", "hf:", "hellaswag", "=gpt2", "py gpt2",
           "torchrun")
SCRIPTS = {"train_gpt2.py": train_gpt2, "prepare_data.py": prepare_data, "sample.py": sample}


def script_of(command):
    """(the module that a command runs, its arguments); None for pytest and the like."""
    words = shlex.split(command)
    at = next((i for i, word in enumerate(words) if word in SCRIPTS), None)
    return (None, []) if at is None else (SCRIPTS[words[at]], words[at + 1:])


def test_every_command_parses_and_runs_as_printed(tmp_path, monkeypatch, gpt2_vocabulary, capsys):
    """In the README's order, in a folder with what a reader would have; long ones are cut short.
    Those that need a network or a launcher are only parsed."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes").mkdir()
    text = "It is never too late to learn how a language model works. " * 400
    (tmp_path / "my_text.txt").write_text(text, encoding="utf-8")
    (tmp_path / "beginning.txt").write_text("Once there was", encoding="utf-8")
    for i in range(3):
        line = f'{{"body": "{text[:2000]}"}}\n'
        (tmp_path / "notes" / f"{i}.jsonl").write_text(line * 4, encoding="utf-8")
    monkeypatch.setattr("builtins.input", lambda prompt: "")
    ran = []
    for command in COMMANDS:
        script, argv = script_of(command)
        if script is None:
            continue
        bare = {prepare_data: "dataset", sample: "prompt"}.get(script)
        presets = train_gpt2.PRESETS if script is train_gpt2 else None
        train_gpt2.parse_settings(script.Settings, argv, "", presets, bare)
        if not any(word in command for word in NETWORK):
            if script is train_gpt2:
                argv = [*argv, "--max_steps=4", "--eval_tokens=2000", "--warmup_steps=2"]
            assert not script.main(argv), command
            ran.append(script)
    assert ran.count(train_gpt2) >= 2 and ran.count(prepare_data) >= 3 and ran.count(sample) >= 5
    assert "warning" not in capsys.readouterr().err.lower()


def test_links_and_glossary():
    """A link leads to a file, heading or page. The glossary's words and lines are in Part 1."""
    for link in re.findall(r'(?:\]\(|src=")(.+?)[)"]', README):
        head = "\n## " + link[1:].replace("-", " ") + "\n"
        assert link.startswith("https://") or (ROOT / link).exists() or head in README.lower(), link
    code = (ROOT / "train_gpt2.py").read_text(encoding="utf-8").partition("PART 2: ")[0]
    glossary = README.partition("Glossary")[2]
    words = re.findall(r"^\| (.+?) \| .+? \| `(.+)` \|$", glossary, re.M)
    assert len(words) >= 25
    for word, line in words:
        assert word.lower() in code.lower() and line in code, word


LESSONS = re.findall(r"^\| (.+) \| `([\w.]+)` \| `(test_\w+)` \|$", README, re.M)
assert len(LESSONS) >= 25


@pytest.mark.parametrize("idea, where, test", LESSONS)
def test_a_lesson_is_where_the_index_says(idea, where, test):
    scripts = [*SCRIPTS.values(), first_principles]
    assert any(hasattr(script, where.split(".")[-1]) for script in scripts), where
    files = (ROOT / "tests").glob("test_*.py")
    assert any(f"def {test}(" in path.read_text(encoding="utf-8") for path in files), test
