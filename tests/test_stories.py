"""The embedded stories and the default run: prepared, learned, and told again."""
import itertools
import json
import math
import random
import re

import numpy as np
import pytest
import torch
from conftest import FULL, log_of

import prepare_data
import train_gpt2
from prepare_data import text_of_story


def pattern_of(wording):
    """A regular expression for a wording, with a group for each of its {words}."""
    found = ""
    for part in re.split(r"(\{\w+\})", wording):
        if part in ("{hero}", "{friend}"):
            found += "([A-Z][a-z]+)"
        elif part.startswith("{"):
            found += "(.+?)"
        else:
            found += re.escape(part)
    return found + r"(?: |$)"


def parse_sentence(text, wordings, known):
    """(what follows this text's first sentence, what is known after it); None for an unknown
    wording, or a name that changes."""
    for wording in wordings:
        match = re.match(pattern_of(wording), text)
        if match:
            slots = re.findall(r"\{(\w+)\}", wording)
            said = [*known.items(), *zip(slots, match.groups(), strict=True)]
            if len({*said}) == len(dict(said)):  # no {word} has two values
                return text[match.end():], dict(said)
    return None


def parse(text):
    """What was chosen in this story, {slot: words}; None if the grammar cannot tell it, for example
    because a pronoun or a remedy does not fit."""
    known = {}
    for wordings in prepare_data.SENTENCES:
        found = parse_sentence(text, wordings, known)
        if found is None:
            return None
        text, known = found
    if text or known["hero"] not in prepare_data.HEROES:
        return None
    for slot, value in known.items():
        if value not in prepare_data.options(slot, known):
            return None
    return known


def test_the_parser_accepts_the_grammar_and_nothing_else():
    texts = [*map(text_of_story, prepare_data.write_stories(seed=5)[:300])]
    assert all(map(parse, texts))
    text = next(filter(re.compile("Ruby was a(?!.*a grumpy troll)").match, texts))
    last, fix = text.rindex("Ruby"), parse(text)["fix"]
    wrong = [text[:last] + "Lily" + text[last + 4:], text + " The end.", text[:-1], text[5:], "",
             text.replace("girl", "boy"), text.replace(fix, "beat the troll at chess")]
    assert not any(map(parse, wrong))


# ---- The floor ----


@pytest.fixture(scope="module")
def told():
    return prepare_data.write_stories(seed=1)


def labels_of(pieces, tokenizer):
    """The skill of each of a story's tokens, which is that of its last character."""
    skills = []
    for text, skill, _ in pieces:
        skills += itertools.repeat(skill, len(text))
    end, found = 0, []
    for token in tokenizer.encode(text_of_story(pieces)):
        end += len(tokenizer.decode([token]))
        found.append(skills[end - 1])
    return found


def test_floor_and_skills_are_those_of_the_validation_stories(stories, told):
    meta = json.loads((stories / "meta.json").read_text(encoding="utf-8"))
    tokenizer = train_gpt2.Tokenizer(meta["tokenizer"])
    assert meta["val"]["documents"] == prepare_data.HELD_OUT
    labels, nats = [], 0.0
    for pieces in told[-prepare_data.HELD_OUT:]:
        labels += ["wording", *labels_of(pieces, tokenizer)]
        nats += sum(its for _, _, its in pieces)
    targets = meta["val"]["tokens"] - 1
    assert targets == len(labels)
    assert meta["entropy_floor"] == pytest.approx(nats / targets, rel=1e-12)
    assert sum(meta["skills"].values()) == pytest.approx(nats / targets, rel=1e-12)
    assert meta["landmarks"]["bigram"] > meta["entropy_floor"] > 0
    found = [train_gpt2.SKILLS[i] for i in np.load(stories / "skills.npy")]
    assert found == [*labels, "wording"]
    assert {*labels} == {*train_gpt2.SKILLS}


def test_a_story_fits_into_a_row(stories, told):
    tokenizer = train_gpt2.open_data(stories).tokenizer
    longest = max(len(tokenizer.encode(text_of_story(pieces))) for pieces in told)
    assert longest + 1 <= train_gpt2.Settings.block_size  # 1: <|endoftext|>


def tell(numbers):
    """A story by the numbers of its choices, each modulo how many options there are: (its text, its
    nats, how many options each choice had)."""
    sizes = []

    def choose(among):
        number = numbers[len(sizes)]
        sizes.append(len(among))
        return among[number % len(among)]
    pieces = prepare_data.story(choose)
    return text_of_story(pieces), sum(its for _, _, its in pieces), sizes


def test_another_choice_tells_another_story():
    draw = random.Random(9)
    for _ in range(150_000 if FULL else 3000):
        numbers = draw.choices(range(10_000), k=50)
        text, nats, sizes = tell(numbers)
        assert nats == pytest.approx(sum(map(math.log, sizes)))
        place = draw.randrange(len(sizes))
        for other in range(1, sizes[place]):
            numbers[place] += 1
            assert tell(numbers)[0] != text, (numbers, other)


def test_the_default_run(tmp_path, capsys, monkeypatch, told):
    """python train_gpt2.py as a newcomer types it, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    assert train_gpt2.main([]) == 0
    output = capsys.readouterr().out
    assert "% above the floor" in output
    assert "tokens/s" in output
    floor = train_gpt2.open_data("data/stories").meta["entropy_floor"]
    log = log_of(tmp_path / "out" / "stories")
    best = min(float(row["val_loss"]) for row in log if row["val_loss"])
    assert 1 < best / floor < 1.03
    model = train_gpt2.GPT.from_checkpoint("out/stories/best.pt")
    idx = torch.tensor([train_gpt2.encode_prompt(model, "")] * 800)
    rows = model.generate(idx, 111, temperature=0.8, seed=1).tolist()
    texts = [model.tokenizer.decode(row).split(train_gpt2.END_OF_TEXT)[1] for row in rows]
    # Some 740 follow; 30 are four standard deviations
    assert len([*filter(parse, texts)]) >= 710
    known = {*map(text_of_story, told)}
    assert sum(text not in known for text in texts) >= 780
    assert train_gpt2.main(["--max_steps=2"]) == 0
    assert "a new run in out" in capsys.readouterr().out
