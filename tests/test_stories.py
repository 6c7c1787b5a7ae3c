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
    if rest or known["hero"] not in prepare_data.HEROES or known["hero"] == known["friend"]:
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
    idx = torch.tensor([train_gpt2.encode_prompt(model, "")] * 100)
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


def test_a_mistake_leaves_the_older_data_alone(tmp_path, capsys):
    text, folder = tmp_path / "text.txt", tmp_path / "data"
    text.write_text("some words to learn from, again and again. " * 40, encoding="utf-8")
    argv = [str(text), f"--out_dir={folder}"]
    assert prepare_data.main(argv) == 0
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    for wrong, message in (("--vocab_size=256", "257"), ("--val_fraction=1.5", "between 0 and 1"),
                           ("--vocab_size=70000", "65,536"), ("--shard_tokens=1", "shard_tokens")):
        assert message in fails(prepare_data.main, [*argv, wrong], capsys)
    text.write_text("other words", encoding="utf-8")
    assert "from another text" in fails(prepare_data.main, argv, capsys)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_a_text_file_comes_back_byte_for_byte(tmp_path):
    """Through every tokenizer, in shards that are smaller than the text, line ends and all."""
    data = ("Line ends: \r\n and \n and \r; naïve 漢字 🙂🏽 <|endoftext|> \t tabs  and   spaces\n" * 60).encode()
    (tmp_path / "text.txt").write_bytes(data)
    for kind in ("bpe", "char"):
        folder = tmp_path / kind
        prepare_data.main([str(tmp_path / "text.txt"), f"--tokenizer={kind}", f"--out_dir={folder}",
                           "--shard_tokens=500", "--vocab_size=300"])
        opened = train_gpt2.open_data(folder)
        found = b""
        for split in ("train", "val"):
            ids = [i for path in train_gpt2.shard_paths(folder)[split] for i in train_gpt2.read_shard(path).tolist()]
            assert len(ids) == opened.meta[split]["tokens"]
            eot = opened.tokenizer.eot
            if eot is not None:
                assert ids[0] == ids[-1] == eot not in ids[1:-1]
            found += b"".join(opened.tokenizer.decode_bytes([i]) for i in ids if i != eot)
        assert found == data and len(train_gpt2.shard_paths(folder)["train"]) > 1


def naive_bpe(texts, vocab_size):
    """Counts every pair anew before each merge: slow, and plainly right."""
    import collections

    import regex
    words = [[bytes([b]) for b in word.encode()] for text in texts
             for word in regex.findall(train_gpt2.SPLIT_PATTERN, text)]
    merges = []
    while len(merges) < vocab_size - 257:
        counts = collections.Counter(pair for word in words for pair in zip(word, word[1:], strict=False))
        if not counts:
            break
        best = max(counts, key=lambda pair: (counts[pair], pair))
        merges.append(best)
        for word in words:
            i = 0
            while i < len(word) - 1:
                if (word[i], word[i + 1]) == best:
                    word[i:i + 2] = [best[0] + best[1]]
                i += 1
    return merges


@pytest.mark.parametrize("text", [
    "low low low lower lowest newer newest wider", "aaaa aaa aa a baaab aaaaaaaa", "abab baba abba " * 3,
    "the cat sat on the mat, the cat! 123 123 1234", "漢字 漢字 漢 🙂🙂 🙂🏽 é é", "", "x",
])
def test_bpe_merges_are_those_of_a_naive_trainer(text):
    for size in (257, 260, 300):
        assert prepare_data.train_bpe([text, text[::-1]], size) == naive_bpe([text, text[::-1]], size)


def test_different_choices_never_tell_the_same_story():
    """The probabilities of a cut-down grammar, all of whose stories are told, add up to 1; and of many stories of the
    whole grammar no two are alike unless their choices are."""
    import itertools
    import math
    import random

    from conftest import FULL

    def all_stories():
        """Every path through a grammar with few options: a choice beyond the first few of each list is cut off."""
        pending = [[]]
        while pending:
            path, sizes = pending.pop(), []

            def choose(among, path=path, sizes=sizes):
                kept = among[:2] if len(sizes) % 3 else among[:1]
                sizes.append(len(kept))
                return kept[path[len(sizes) - 1] if len(sizes) <= len(path) else 0]
            text, _ = prepare_data.tell(choose)
            yield text, math.prod(1 / n for n in sizes)
            for i in range(len(path), len(sizes)):
                pending += [[*path, *[0] * (i - len(path)), k] for k in range(1, sizes[i])]
    told = list(itertools.islice(all_stories(), 100_000))
    assert len(told) > 500 and len({text for text, _ in told}) == len(told)
    assert sum(p for _, p in told) == pytest.approx(1)

    seen = {}
    draw = random.Random(9).choice
    for _ in range(1_000_000 if FULL else 30_000):
        made = []
        text, nats = prepare_data.tell(lambda among, made=made: made.append((len(among), draw(among))) or made[-1][1])
        assert nats == pytest.approx(sum(math.log(n) for n, _ in made))
        choices = hash(tuple(made))
        assert seen.setdefault(hash(text), choices) == choices


@pytest.mark.parametrize("broken", [0, 1, 3])
def test_shakespeare_by_url(broken, tmp_path, monkeypatch, capsys):
    """From a server on the loopback address, whose first answers break off in the middle."""
    import http.server
    import threading
    text = b"First Citizen:\nBefore we proceed any further, hear me speak.\n\n" * 50
    answers = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            answers.append(self.path)
            self.send_response(200)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text if len(answers) > broken else text[:100])

        def log_message(self, *_):
            pass
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(prepare_data, "SHAKESPEARE_URL", f"http://127.0.0.1:{server.server_port}/input.txt")
    monkeypatch.setattr(prepare_data.time, "sleep", lambda seconds: None)
    monkeypatch.chdir(tmp_path)
    if broken < 3:
        assert prepare_data.main(["shakespeare"]) == 0
        meta = train_gpt2.open_data("data/shakespeare").meta
        assert meta["tokenizer"]["kind"] == "char" and meta["train"]["bytes"] + meta["val"]["bytes"] == len(text)
    else:
        assert "cannot download" in fails(prepare_data.main, ["shakespeare"], capsys)
        assert not (tmp_path / "data").exists()
    server.shutdown()
    server.server_close()
