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


def text_of(pieces):
    return "".join(text for text, _, _ in pieces)


def parse(text):
    """What was chosen in this story, {slot: words}; None if the grammar cannot tell it: an unknown
    sentence, a name that changes, a pronoun or a remedy that does not fit."""
    known, rest = {}, text
    for wordings in prepare_data.SENTENCES:
        for wording in wordings:
            slots, found = re.findall(r"\{(\w+)\}", wording), dict(known)
            pattern = "".join(
                re.escape(part) if i % 2 == 0 else
                "([A-Z][a-z]+)" if part in ("hero", "friend") else "(.+?)"
                for i, part in enumerate(re.split(r"\{(\w+)\}", wording)))
            match = re.match(pattern + r"(?: |$)", rest)
            if match and all(found.setdefault(slot, value) == value
                             for slot, value in zip(slots, match.groups(), strict=True)):
                break
        else:
            return None
        known, rest = found, rest[match.end():]
    if rest or known["hero"] not in prepare_data.HEROES:
        return None
    allowed = all(value in prepare_data.options(slot, known) for slot, value in known.items())
    return known if allowed else None


def test_the_parser_accepts_the_grammar_and_nothing_else():
    texts = list(map(text_of, prepare_data.write_stories(seed=5)[:300]))
    assert all(map(parse, texts))
    text = next(t for t in texts if t.startswith("Ruby was a") and "a grumpy troll" not in t)
    last, fix = text.rindex("Ruby"), parse(text)["fix"]
    wrong = [text[:last] + "Lily" + text[last + 4:], text + " The end.", text[:-1], text[5:], "",
             text.replace("girl", "boy"), text.replace(fix, "beat the troll at chess")]
    assert not any(map(parse, wrong))


def test_floor_and_skills_are_those_of_the_validation_stories(stories):
    meta = json.loads((stories / "meta.json").read_text(encoding="utf-8"))
    tokenizer, documents = train_gpt2.Tokenizer(meta["tokenizer"]), meta["val"]["documents"]
    told = prepare_data.write_stories(seed=1)
    lengths = [len(tokenizer.encode(text_of(pieces))) + 1 for pieces in told]  # 1: <|endoftext|>
    targets = sum(lengths[-documents:])
    assert documents == 1200 and max(lengths) <= train_gpt2.Settings.block_size
    assert targets == meta["val"]["tokens"] - 1
    nats = sum(nats for pieces in told[-documents:] for _, _, nats in pieces)
    assert meta["entropy_floor"] == pytest.approx(nats / targets, rel=1e-12)
    assert sum(meta["skills"].values()) == pytest.approx(meta["entropy_floor"], rel=1e-12)
    assert meta["landmarks"]["bigram"] > meta["entropy_floor"] > 0
    labels = []  # a token has the skill of its last character
    for pieces in told[-documents:]:
        skills = [skill for text, skill, _ in pieces for _ in text]
        ends = itertools.accumulate(
            len(tokenizer.decode([i])) for i in tokenizer.encode(text_of(pieces)))
        labels += ["wording", *(skills[end - 1] for end in ends)]
    found = [train_gpt2.SKILLS[i] for i in np.load(stories / "skills.npy")]
    assert found == [*labels, "wording"] and set(labels) == set(train_gpt2.SKILLS)


def test_different_choices_never_tell_the_same_story():
    """The probabilities of all stories of a cut-down grammar add up to 1. Of many stories of the
    whole grammar, only those with equal choices are equal."""
    told, pending = {}, [[]]
    while pending:  # a path is a list of choices, 0 behind its end
        path, sizes = pending.pop(), []

        def choose(among, path=path, sizes=sizes):
            kept = among[:2] if len(sizes) % 3 else among[:1]
            sizes.append(len(kept))
            return kept[path[len(sizes) - 1] if len(sizes) <= len(path) else 0]
        text = text_of(prepare_data.story(choose))
        assert text not in told
        told[text] = 1 / math.prod(sizes)
        for i in range(len(path), len(sizes)):
            pending += [[*path, *[0] * (i - len(path)), k] for k in range(1, sizes[i])]
    assert len(told) > 500 and sum(told.values()) == pytest.approx(1)

    seen, draw = {}, random.Random(9).choice
    for _ in range(1_000_000 if FULL else 20_000):
        made = []
        pieces = prepare_data.story(
            lambda among, made=made: made.append((len(among), draw(among))) or made[-1][1])
        nats = sum(nats for _, _, nats in pieces)
        assert nats == pytest.approx(sum(math.log(n) for n, _ in made))
        choices = hash(tuple(made))
        assert seen.setdefault(hash(text_of(pieces)), choices) == choices


def test_the_default_run(tmp_path, capsys, monkeypatch):
    """python train_gpt2.py as a newcomer types it, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    assert train_gpt2.main([]) == 0
    output = capsys.readouterr().out
    assert "% above the floor" in output and "tokens/s" in output
    meta = json.loads((tmp_path / "data" / "stories" / "meta.json").read_text(encoding="utf-8"))
    log = log_of(tmp_path / "out" / "stories")
    best = min(float(row["val_loss"]) for row in log if row["val_loss"])
    model = train_gpt2.GPT.from_checkpoint(tmp_path / "out" / "stories" / "best.pt")
    idx = torch.tensor([train_gpt2.encode_prompt(model, "")] * 800)
    texts = [model.tokenizer.decode(row).split(train_gpt2.END_OF_TEXT)[1]
             for row in model.generate(idx, 111, temperature=0.8, seed=1).tolist()]
    corpus = set(map(text_of, prepare_data.write_stories(seed=1)))
    follows, new = sum(map(bool, map(parse, texts))), sum(text not in corpus for text in texts)
    assert 1 < best / meta["entropy_floor"] < 1.03
    # Some 740 follow; 30 are four standard deviations
    assert follows >= 710 and new >= 780
    assert train_gpt2.main(["--max_steps=2"]) == 0
    assert "a new run in out" in capsys.readouterr().out
