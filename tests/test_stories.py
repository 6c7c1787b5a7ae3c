"""The default run, whole: stories are prepared, learned to within 5 % of the best possible, and told anew."""
import json
import re

import pytest
import torch
from conftest import fails
from test_training import log_of

import prepare_data
import train_gpt2


def parse(text):
    """The choices that tell this story: a list of (wording, its new words) for each sentence. None where the text is no
    story of the grammar: a sentence that it lacks, a name that changes, a pronoun or a remedy that does not fit."""
    known, rest, choices = {}, text, []
    for wordings in prepare_data.SENTENCES:
        for wording in wordings:
            slots = re.findall(r"\{(\w+)\}", wording)
            values = (r"(.+?)", "([A-Z][a-z]+)")
            pattern = "".join(values[part in ("hero", "friend")] if i % 2 else re.escape(part)
                              for i, part in enumerate(re.split(r"\{(\w+)\}", wording)))
            match = re.match(pattern + r"(?: |$)", rest)
            found = dict(known)
            if match and all(found.setdefault(slot, value) == value
                             for slot, value in zip(slots, match.groups(), strict=True)):
                break
        else:
            return None
        choices.append((wording, [found[slot] for slot in found if slot not in known]))
        known, rest = found, rest[match.end():]
    if rest or known["hero"] not in prepare_data.HEROES:
        return None
    allowed = all(value in prepare_data.options(slot, known) for slot, value in known.items())
    return choices if allowed else None


def test_the_parser_accepts_the_grammar_and_nothing_else():
    texts, _ = prepare_data.write_stories(300, seed=5)
    assert all(parse(text) for text in texts)
    text = next(t for t in texts if t.startswith("Ruby was a"))
    heroes = [m.start() for m in re.finditer("Ruby", text)]
    wrong = [text[:heroes[-1]] + "Lily" + text[heroes[-1] + 4:], text + " The end.", text.replace("girl", "boy"),
             text[:-1], text[5:], ""]
    assert not any(map(parse, wrong))
    fixes = [(text, other) for text in texts if "a crow flew away" in text for other in ["made the troll laugh"]]
    for text, other in fixes:
        for right in prepare_data.TROUBLES["a crow flew away with it"]:
            assert parse(text.replace(right, other)) is None or right not in text


def test_floor_is_the_nats_of_the_validation_stories(stories):
    meta = json.loads((stories / "meta.json").read_text(encoding="utf-8"))
    texts, nats = prepare_data.write_stories(prepare_data.STORIES, seed=1)
    documents = meta["val"]["documents"]
    tokenizer = train_gpt2.Tokenizer(meta["tokenizer"])
    targets = sum(len(tokenizer.encode(text)) + 1 for text in texts[-documents:])  # + 1: the <|endoftext|> that ends it
    assert targets == meta["val"]["tokens"] - 1
    assert meta["entropy_floor"] == pytest.approx(sum(nats[-documents:]) / targets, rel=1e-12)
    assert max(len(tokenizer.encode(text)) + 1 for text in texts) <= train_gpt2.Settings.block_size
    assert documents == 1200 and meta["landmarks"]["bigram"] > meta["entropy_floor"]


def test_the_default_run(stories, tmp_path, capsys, monkeypatch):
    """python train_gpt2.py as a newcomer types it, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    assert train_gpt2.main([]) == 0
    output = capsys.readouterr().out
    floor = json.loads((tmp_path / "data" / "stories" / "meta.json").read_text(encoding="utf-8"))["entropy_floor"]
    log = log_of(tmp_path / "out" / "stories")
    values = [float(row["val_loss"]) for row in log if row["val_loss"]]
    assert floor < min(values) < 1.05 * floor
    assert "% above the best possible" in output and "tokens/s" in output
    model = train_gpt2.GPT.from_checkpoint(tmp_path / "out" / "stories" / "best.pt")
    idx = torch.tensor([model.encode_prompt("")] * 100)
    stories = [model.tokenizer.decode(row).split(train_gpt2.END_OF_TEXT)[1].strip()
               for row in model.generate(idx, max_new_tokens=111, temperature=0.8, seed=1).tolist()]
    corpus = set(prepare_data.write_stories(prepare_data.STORIES, seed=1)[0])
    follows, new = sum(parse(story) is not None for story in stories), sum(story not in corpus for story in stories)
    assert follows >= 90 and new >= 80, (follows, new)
    assert train_gpt2.main(["--max_steps=2"]) == 0
    assert "a new run in out" in capsys.readouterr().out


def test_the_floor_is_shown_only_where_it_holds(stories, tmp_path, capsys):
    common = [f"--data_dir={stories}", "--max_steps=1", "--n_layer=1", "--n_embd=16", f"--out_dir={tmp_path / 'run'}"]
    shown = []
    for extra in ([], ["--rows=stream"], ["--eval_tokens=1000"], ["--block_size=64"]):
        train_gpt2.main([*common, *extra])
        shown.append("best possible" in capsys.readouterr().out)
    assert shown == [True, False, False, False]


def test_stories_that_cannot_be_written(tmp_path, capsys):
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "diary.txt").write_text("dear diary")
    assert "something else" in fails(prepare_data.main, ["stories", f"--out_dir={tmp_path / 'taken'}"], capsys)
    assert (tmp_path / "taken" / "diary.txt").read_text() == "dear diary"
