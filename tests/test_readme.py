"""What the READMEs print works: commands run, links lead somewhere, lessons exist."""
import re
import shlex

import pytest
from conftest import ROOT

import prepare_data
import sample
import train_gpt2


def text_of(pattern):
    """The text of the files of this name, one behind the other."""
    return "\n".join(path.read_text(encoding="utf-8") for path in ROOT.glob(pattern))


README = text_of("README.md")
PART_1 = text_of("train_gpt2.py").partition("PART 2: ")[0]
ALL_CODE = text_of("*.py") + text_of("tests/first_principles.py")
COMMANDS = re.findall(
    r"^    (?:\S.* && )?(python|torchrun.+) (\w+\.py)(.*?)(?:  +#.*)?$", README, re.M)
NETWORK = ("fineweb", "tinystories", "shakespeare", "hf:", "model:", "hellaswag", "=gpt2", " gpt2")
SCRIPTS = {"train_gpt2.py": train_gpt2, "prepare_data.py": prepare_data, "sample.py": sample}
LESSONS = re.findall(r"^\| (.+) \| `([\w.]+)` \| `(test_\w+)` \|$",
                     text_of("tests/README.md"), re.M)
assert len(LESSONS) >= 25


def test_the_readme_is_short():
    assert len(README.encode()) <= 24_000


@pytest.fixture
def reader(tmp_path, monkeypatch):
    """A folder with what a reader would have, who types an empty line."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes").mkdir()
    text = "It is never too late to learn how a language model works. " * 400
    (tmp_path / "my_text.txt").write_text(text, encoding="utf-8")
    for i in range(3):
        line = f'{{"body": "{text[:2000]}"}}\n'
        (tmp_path / "notes" / f"{i}.jsonl").write_text(line * 4, encoding="utf-8")
    monkeypatch.setattr("builtins.input", lambda prompt: "")


def test_every_command_parses_and_runs_as_printed(reader, gpt2_vocabulary, capsys):
    """In the README's order; long ones are cut short. Those that need a network or a launcher are
    only parsed."""
    ran = []
    for launcher, name, words in COMMANDS:
        script = SCRIPTS[name]
        argv = shlex.split(words)
        bare = {prepare_data: "dataset", sample: "prompt"}.get(script)
        presets = train_gpt2.PRESETS if script is train_gpt2 else None
        train_gpt2.parse_settings(script.Settings, argv, "", presets, bare)
        if launcher != "python" or any(word in words for word in NETWORK):
            continue
        if script is train_gpt2:
            argv += ["--max_steps=4", "--eval_tokens=2000", "--warmup_steps=2"]
        assert not script.main(argv), words
        ran.append(script)
    assert ran.count(train_gpt2) >= 4
    assert ran.count(prepare_data) >= 2
    assert ran.count(sample) >= 5
    assert "warning" not in capsys.readouterr().err.lower()


@pytest.mark.parametrize("name", ["README.md", "tests/README.md", "tests/changes/README.md"])
def test_links_lead_to_a_file_or_page(name):
    links = re.findall(r'(?:\]\(|src=")(.+?)[)"]', text_of(name))
    for link in links:
        assert link.startswith("https://") or (ROOT / name).parent.joinpath(link).exists(), link


def test_the_code_that_is_shown_is_the_code():
    shown = README.partition("### The heart of the code")[2].partition("\n## ")[0]
    blocks = re.findall(r"```python\n(.*?)```", shown, re.S)
    assert len(blocks) == 2
    for block in blocks:
        assert block in PART_1


def test_the_glossary_quotes_part_1():
    glossary = text_of("tests/README.md").partition("## Words")[2].partition("\n## ")[0]
    words = re.findall(r"^\| (.+?) \| .+? \| `(.+)` \|$", glossary, re.M)
    assert len(words) >= 25
    for word, line in words:
        assert word.lower() in PART_1.lower(), word
        assert line in PART_1, word


def test_the_tour_leads_through_part_1():
    tour = re.findall(r"^\| ([\w ]+) \| (\d+) \| .+ \|$", README, re.M)
    assert len(tour) == PART_1.count("\n# ---- ")
    for name, lines in tour:
        section = PART_1.partition(f"# ---- {name} ----\n")[2].partition("\n# ---- ")[0]
        assert int(lines) == pytest.approx(section.count("\n"), abs=8), name


@pytest.mark.parametrize("idea, where, test", LESSONS)
def test_a_lesson_is_where_the_index_says(idea, where, test):
    name = where.split(".")[-1]
    assert re.search(rf"^ *(def|class) {name}\b", ALL_CODE, re.M), where
    assert f"def {test}(" in text_of("tests/test_*.py")


def test_every_patch_has_a_row():
    rows = re.findall(r"^\| `(\w+)` \|", text_of("tests/changes/README.md"), re.M)
    patches = ROOT.glob("tests/changes/*.patch")
    assert sorted(rows) == sorted(path.stem for path in patches)
