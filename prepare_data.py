"""Turn text into shards of tokens that train_gpt2.py reads.

    python prepare_data.py                                   # the embedded stories, offline
    python prepare_data.py my_text.txt                       # your own text, with a BPE trained on it, offline
    python prepare_data.py "notes/*.jsonl" --text_column=body --tokenizer=gpt2      # also .parquet, also many .txt
    python prepare_data.py shakespeare                       # TinyShakespeare, character by character
    python prepare_data.py tinystories                       # TinyStories, character by character
    python prepare_data.py fineweb_edu --max_tokens=500_000_000      # FineWeb-Edu, OpenAI's vocabulary
    python prepare_data.py fineweb_edu_shards                # the same, tokenized already: 20 GB (or fineweb_shards)
    python prepare_data.py hf:OWNER/NAME:CONFIG              # any data set of the Hugging Face hub
    python prepare_data.py hellaswag                         # the questions that the evaluation asks

Text comes from a source, becomes ids through a tokenizer, and goes to shards in llm.c's format; meta.json, written
last, says what they hold. Behind the stories and the BPE trainer, this file has them in that order. Stopped half way,
the same command goes on.
"""
import codecs
import collections
import contextlib
import difflib
import functools
import glob
import heapq
import http.client
import itertools
import json
import math
import operator
import os
import random
import re
import shlex
import shutil
import sys
import time
import urllib.request
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import regex
from tqdm import tqdm

from train_gpt2 import (
    END_OF_TEXT,
    HELLASWAG,
    PRESETS,
    SPLIT_PATTERN,
    Tokenizer,
    UserError,
    check_ranges,
    parse_settings,
    read_shard,
    reports_mistakes,
    shard_paths,
    write_atomically,
    write_shard,
    write_text,
)


@dataclass
class Settings:
    dataset: str = "stories"  # a name from above, hf:OWNER/NAME[:CONFIG], or .txt, .jsonl, .parquet files (globs too)
    tokenizer: Literal["auto", "gpt2", "bpe", "char"] = "auto"  # auto: as above; where nothing is said, a bpe
    vocab_size: int = 1024  # of a bpe: 256 bytes, the merges, and <|endoftext|>
    text_column: str = "text"  # which column of a .jsonl, .parquet or hf: data set is the text
    out_dir: str = ""  # empty: data/<dataset>, with _<tokenizer> behind it where that is not the usual one
    shard_tokens: int = 100_000_000  # tokens in a shard: 200 MB
    max_tokens: int | None = None  # for training at most so many (of published shards, whole ones); None: everything
    val_fraction: float = 0.1  # this share of the text, at its end, is kept for validation
    seed: int = 1  # of the stories


# ---- The embedded stories --------------------------------------------------------------------------------------------
# A story is a series of choices, each uniform among the options that those before it leave, so that its probability is
# exactly 1 / (product of the numbers of options): see `tell`. Different choices never give the same text, because every
# sentence tells its wording and each of its new words. A {word} is chosen where it appears first, recalled after that.

STORIES = 12_000  # some 1,200 for validation; more would change nothing that a short run can notice

HEROES = {"Lily": "girl", "Mia": "girl", "Anna": "girl", "Zoe": "girl", "Ruby": "girl", "Nora": "girl", "Ella": "girl",
          "Ivy": "girl", "Tom": "boy", "Ben": "boy", "Max": "boy", "Sam": "boy", "Leo": "boy", "Jack": "boy",
          "Finn": "boy", "Otto": "boy"}
TRAITS = ["brave", "shy", "clever", "sleepy", "curious", "stubborn", "cheerful", "clumsy"]
PLACES = ["by the sea", "near the old mill", "under a green hill", "at the edge of the forest", "on a tiny island",
          "above the bakery", "behind the station", "next to the zoo", "in a tall tower", "on a red boat",
          "beside the river", "in a windy village"]
THINGS = ["kite", "drum", "lantern", "robot", "puppet", "trumpet", "sword", "dragon", "balloon", "basket", "map",
          "train", "whistle", "coat", "clock", "snail"]
# What goes wrong, and the ways in which it can be put right.
TROUBLES = {
    "the wind blew it into a tree": [
        "climbed up to get it", "shook the branches until it fell", "asked a squirrel to fetch it"],
    "it fell down a deep well": [
        "let down a bucket on a rope", "asked a frog to bring it back", "filled the well to the top"],
    "a crow flew away with it": [
        "gave the crow some cheese for it", "followed the crow to its nest", "sang until the crow came back"],
    "it slipped into the pond": [
        "waded in up to the chin", "pulled it out with a net", "paid a duck to dive for it"],
    "a grumpy troll took it": [
        "made the troll laugh", "offered the troll a warm pie", "beat the troll at chess"],
    "it broke in two": [
        "mended it with glue", "tied it together with string", "carried it to the blacksmith"],
    "a goat began to eat it": [
        "scolded the goat", "gave the goat a hat instead", "tickled the goat behind the ears"],
    "it rolled under the palace": ["dug a tunnel", "asked the queen for help", "sent in a very small mouse"],
}
FEELINGS = ["cried for an hour", "stamped on the ground", "went very quiet", "wanted to give up",
            "could not believe it", "asked the moon for help"]
GAMES = ["danced", "sang", "laughed", "ate pancakes", "told jokes", "played cards"]

SENTENCES = [
    ["Once there was a {trait} {child} named {hero} who lived {place}.",
     "{hero} was a {trait} {child} who lived {place}.",
     "Long ago, {place}, lived a {trait} {child} called {hero}."],
    ["More than anything, {he} wanted a {thing}.",
     "Every night {he} dreamed of a {thing}.",
     "What {hero} wished for most was a {thing}.",
     "For weeks {hero} had been saving up for a {thing}."],
    ["One morning {his} friend {friend} gave {him} one.",
     "Then {friend} found just such a {thing} in the attic and gave it to {hero}.",
     "On {his} birthday a {thing} came by post, sent by {his} friend {friend}."],
    ["But before long {trouble}.",
     "The very next day {trouble}.",
     "Then something went wrong: {trouble}."],
    ["{hero} {feeling}.",
     "Poor {hero} {feeling}."],
    ["Luckily {friend} knew what to do and {fix}.",
     "\"Do not worry, {hero},\" said {friend}, and {fix}.",
     "But {friend} only smiled and {fix}."],
    ["That evening {hero} and {friend} {game} until the stars came out.",
     "Then {friend} and {hero} {game} all night long."],
    ["{hero} never lost the {thing} again.",
     "And {hero} slept with the {thing} under {his} pillow.",
     "From then on the {thing} belonged to both {hero} and {friend}.",
     "\"It is the best {thing} in the world,\" said {hero}."],
]


def options(slot, known):
    """What a {slot} may become, given what is known by now: a list, whose entries are equally likely."""
    if slot in ("child", "he", "his", "him"):
        girl = HEROES[known["hero"]] == "girl"
        return [dict(child="girl" if girl else "boy", he="she" if girl else "he", his="her" if girl else "his",
                     him="her" if girl else "him")[slot]]
    if slot == "friend":
        return [name for name in HEROES if name != known["hero"]]
    if slot == "fix":
        return TROUBLES[known["trouble"]]
    return dict(hero=list(HEROES), trait=TRAITS, place=PLACES, thing=THINGS, trouble=list(TROUBLES), feeling=FEELINGS,
                game=GAMES)[slot]


SKILLS = ["wording", "choices", "recall"]  # what it takes to foresee a piece of a story; skills.npy holds their numbers


def story(choose):
    """One story, piece by piece: a list of (text, skill, nats). `choose(options)` returns one of a list; what decides
    it is the caller's: chance for the corpus, every path in turn for a test.

    A sentence's first word is one of the choices, for it tells the wording, and so is a {word} where it appears first;
    from then on it is recalled, at the beginning of a sentence too, and the hero's name tells the pronouns. nats = the
    sum of ln(number of options) over what was chosen since the piece before."""
    nats, known, told, pieces = 0.0, {}, set(), []

    def pick(among):
        nonlocal nats
        nats += math.log(len(among))
        return choose(among)

    known["hero"] = pick(list(HEROES))  # first, for {child} may stand before the name
    for wordings in SENTENCES:
        parts = regex.findall(r'\{\w+\}|^"|^\w+|[^{]+', pick(wordings))  # slots, the first word, and what is between
        for i, text in enumerate(parts):
            skill, slot = "wording" if i else "choices", text.strip("{}")
            if text != slot:
                if slot not in known:
                    known[slot] = pick(options(slot, known))
                skill, text = "recall" if slot in told else "choices", known[slot]
                told |= {slot, "child", "he", "his", "him"} if slot == "hero" else {slot}
            pieces.append((text if i or not pieces else " " + text, skill, nats))
            nats = 0.0
    return pieces


def tell(choose):
    """(text, nats) of one story: nats = the sum of ln(number of options) over all choices = -ln p(text)."""
    pieces = story(choose)
    return "".join(text for text, _, _ in pieces), sum(nats for _, _, nats in pieces)


def label(stories, tokenizer):
    """(n,) uint8: the number in SKILLS of each token of a split that holds these stories, a list of what story()
    returns. A token has the skill of its last character; what stands between stories is wording."""
    between, sizes, labels = len(separator(tokenizer)), tokenizer.token_bytes(), []
    for pieces in stories:
        ends = np.cumsum([len(text) for text, _, _ in pieces])
        ids = tokenizer.encode("".join(text for text, _, _ in pieces))
        last = np.cumsum(sizes[ids]) - 1  # each token's last byte, which is a character: the stories are ASCII
        skills = np.array([SKILLS.index(skill) for _, skill, _ in pieces], np.uint8)
        labels += [np.zeros(between, np.uint8), skills[np.searchsorted(ends, last, side="right")]]
    if tokenizer.eot is None:
        return np.concatenate(labels[1:])  # no blank line before the first story
    return np.concatenate([*labels, np.zeros(1, np.uint8)])  # <|endoftext|> after the last


def write_stories(count, seed):
    """(texts, nats of each) of `count` stories, drawn with this seed."""
    choose = random.Random(seed).choice
    return tuple(zip(*(tell(choose) for _ in range(count)), strict=True))


# ---- The BPE trainer -------------------------------------------------------------------------------------------------


def train_bpe(texts, vocab_size):
    """Learns a byte-level BPE as GPT-2's was (Sennrich et al. 2016, section 3.2; GPT-2 paper, section 2.2).

    texts: an iterable of str. vocab_size counts 256 bytes, the merges and <|endoftext|>. Returns the merges in order,
    [(bytes, bytes), ...]: fewer than asked where the text runs out of pairs. The most frequent pair of neighbours
    merges next; a tie goes to the lexicographically greater pair. Raises UserError for a size out of range."""
    if not 257 <= vocab_size <= 65_536:
        raise UserError(f"vocab_size is {vocab_size:,}: it must be from 257 (the bytes and {END_OF_TEXT}) to 65,536")
    counts = count_words(texts)  # few are distinct: each is taken apart once and counts as often as it occurs
    # A word is a string with a character for each of its tokens, at first its bytes: to merge is to replace two
    # characters by one.
    words = [word.encode("utf-8").decode("latin-1") for word in counts]
    frequency = list(counts.values())
    tokens = [bytes([byte]) for byte in range(256)]  # what character number 0, 1, ... stands for

    pairs = collections.Counter()  # two characters -> how often they stand side by side in the corpus
    # two characters -> numbers of the words that hold them, or did once, or twice over: all the same to a merge
    where = collections.defaultdict(list)
    for i, word in enumerate(words):
        for pair in map(operator.add, word, word[1:]):
            pairs[pair] += frequency[i]
            where[pair].append(i)
    # A heap finds the greatest count at once. Counts fall when other merges take neighbours away; an entry that comes
    # up with an old count goes back with the present one.
    heap = [candidate(pair, pairs, tokens) for pair in pairs]
    heapq.heapify(heap)

    merges = []
    with tqdm(total=vocab_size - 257, desc="merges", disable=None) as bar:
        while heap and len(merges) < vocab_size - 257:
            count, *_, pair = heapq.heappop(heap)
            if -count != pairs[pair]:
                if pairs[pair] > 0:
                    heapq.heappush(heap, candidate(pair, pairs, tokens))
                continue
            left, right = (tokens[ord(character)] for character in pair)
            merges.append((left, right))
            gained = merge_everywhere(pair, chr(len(tokens)), words, frequency, pairs, where)
            tokens.append(left + right)
            for new in gained:
                heapq.heappush(heap, candidate(new, pairs, tokens))
            bar.update()
            bar.set_postfix_str(repr(left + right), refresh=False)
    return merges


def count_words(texts):
    """{word: how often it occurs}: words are what GPT-2's pattern finds. A fast pattern that knows only white space
    cuts first, and the slow one sees each distinct piece once."""
    pieces, words = collections.Counter(), collections.Counter()
    # `re` takes four control characters for white space that Unicode, and so GPT-2's pattern, does not
    space, other = r"[^\S\x1c-\x1f]", r"[\S\x1c-\x1f]"
    cut = re.compile(f" ?{other}+|{space}+(?!{other})|{space}+")
    for text in texts:
        pieces.update(cut.findall(text))
    split = regex.compile(SPLIT_PATTERN)
    for piece, count in pieces.items():
        for word in split.findall(piece) if not piece.isspace() else [piece]:
            words[word] += count
    return words


def candidate(pair, pairs, tokens):
    """A pair's entry in the heap, whose smallest comes first: the count is negated, and the bytes are turned upside
    down, so that among equal counts the greater pair comes first. "ab" is greater than "a": chr(256) behind each, above
    every byte, sees to that."""
    upside_down = ("".join(chr(255 - byte) for byte in tokens[ord(token)]) + chr(256) for token in pair)
    return -pairs[pair], *upside_down, pair


def merge_everywhere(pair, merged, words, frequency, pairs, where):
    """Merges a pair in all words that hold it, and updates the counts of the pairs around: of those alone, which is
    what makes this fast. Returns the pairs that came to be."""
    first, second = pair
    gained = collections.Counter()
    for i in where.pop(pair):
        parts = words[i].split(pair)  # what stands between its occurrences
        words[i] = merged.join(parts)
        for left, right in itertools.pairwise(parts):  # around one occurrence
            if left:
                pairs[left[-1] + first] -= frequency[i]
                gained[left[-1] + merged] += frequency[i]
                where[left[-1] + merged].append(i)
            if right:
                pairs[second + right[0]] -= frequency[i]
                gained[merged + right[0]] += frequency[i]
                where[merged + right[0]].append(i)
        for between in parts[1:-1]:
            if not between:  # two occurrences side by side
                pairs[second + first] -= frequency[i]
                gained[merged + merged] += frequency[i]
                where[merged + merged].append(i)
    pairs.update(gained)
    del pairs[pair]
    return gained


def bpe_spec(merges):
    """The tokenizer's entry in meta.json: all bytes, then the merged tokens, a character for each byte."""
    tokens = [bytes([byte]) for byte in range(256)] + [left + right for left, right in merges]
    return {"kind": "bpe", "ranks": [token.decode("latin-1") for token in tokens]}


# ---- Where text comes from -------------------------------------------------------------------------------------------
# A source gives, for each split, a part: an object whose `batches(position)` yields (position, pieces) one after
# another, from the position given on (None: the beginning). A piece is (text, whether a document begins with it);
# a position is plain data, so that it can be kept in a file. `done(position)` is the share that lies before it.

SHAKESPEARE_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
HUB = {  # name: (repository on the Hugging Face hub, configuration)
    "fineweb_edu": ("HuggingFaceFW/fineweb-edu", "sample-10BT"), "tinystories": ("roneneldan/TinyStories", None)}
SHARDS_ON_HUB = {"fineweb_edu_shards": "kjj0/finewebedu10B-gpt2", "fineweb_shards": "kjj0/fineweb10B-gpt2"}
USUAL = {"shakespeare": "char", "tinystories": "char", "fineweb_edu": "gpt2"}  # tokenizers; bpe for all others
OURS = ["stories", *USUAL, *SHARDS_ON_HUB, "hellaswag"]  # the data sets that have a name here
PIECE = 1 << 20  # bytes of a file, or tokens of a shard, that are read at once
ROWS = 256  # documents that a thread encodes at once


class Texts:
    """Documents in memory."""

    def __init__(self, documents):
        self.documents = documents

    def batches(self, position):
        for i in range(position or 0, len(self.documents), ROWS):
            yield i, [(text, True) for text in self.documents[i:i + ROWS]]

    def done(self, position):
        return position / len(self.documents)


class TextFiles:
    """Text files, each a document: a list of (path, first byte, byte behind the last)."""

    def __init__(self, files):
        self.files = files

    def batches(self, position):
        number, offset = position or (0, None)
        for i, (path, begin, end) in enumerate(self.files[number:], number):
            for at, text in read_pieces(path, begin if offset is None else offset, end):
                yield (i, at), [(text, at == begin)]
            offset = None

    def done(self, position):
        sizes = [end - begin for _, begin, end in self.files]
        return (sum(sizes[:position[0]]) + position[1] - self.files[position[0]][1]) / sum(sizes)


class Rows:
    """A column of text in tables: the documents from number `first` up to `last`. `tables(column, row, state)` yields
    (state, table) one after another, from that row on; the state is what it needs to go on there, or None."""

    def __init__(self, tables, column, first=0, last=None):
        self.tables, self.column, self.first, self.last = tables, column, first, last

    def batches(self, position):
        row, state = position or (0, None)
        with hub_mistakes(), contextlib.closing(self.tables(self.column, row, state)) as tables:
            for state, table in tables:
                if self.last is not None and row >= self.last:
                    return
                if row + len(table) > self.first:
                    texts = table[self.column][max(0, self.first - row):self.last and self.last - row]
                    yield (row, state), [(text, True) for text in texts.to_pylist() if text]
                row += len(table)

    def done(self, position):
        return max(0, position[0] - self.first) / (self.last - self.first) if self.last else 0


def check_column(features, column):
    """Raises UserError where there is no such column, or where it is not text."""
    if features and column not in features:
        raise UserError(f"there is no column {column!r}: choose one with --text_column, from {', '.join(features)}")
    kind = features and features[column]
    if kind and getattr(kind, "dtype", "") not in ("string", "large_string", "null"):
        raise UserError(f"the column {column!r} does not hold text, but {kind}: choose another --text_column")


def streamed_tables(open_rows, column, row, state):
    """Tables as the `datasets` library streams them: Arrow's, for a dict a row would take longer than its tokens."""
    rows = open_rows().with_format("arrow")
    check_column(rows.features, column)
    if state:
        rows.load_state_dict(state)
    with contextlib.closing(rows.iter(batch_size=ROWS)) as tables:
        while True:
            state = rows.state_dict()
            if (table := next(tables, None)) is None:
                return
            yield state, table


def parquet_tables(paths, column, row, state):
    """The tables of local .parquet files, read a megabyte at a time: `datasets` would read a gigabyte ahead."""
    import datasets
    from pyarrow.parquet import ParquetFile
    for path in paths:
        with ParquetFile(path, pre_buffer=False, buffer_size=PIECE) as file:
            check_column(datasets.Features.from_arrow_schema(file.schema_arrow), column)
            for table in file.iter_batches(ROWS, columns=[column]):
                yield None, table.slice(min(row, len(table)))
                row = max(0, row - len(table))


def read_pieces(path, begin=0, end=None):
    """Yields (offset in bytes, text) of one piece after another of a UTF-8 file, cut only where GPT-2's pattern always
    cuts, before a lone space or line break: their tokens are those of the whole. Raises UserError for other bytes."""
    decoder, text, offset = codecs.getincrementaldecoder("utf-8")(), "", begin
    with open(path, "rb") as file:
        file.seek(begin)
        while True:
            data = file.read(PIECE if end is None else min(PIECE, end - file.tell()))
            try:
                text += decoder.decode(data, final=not data)
            except UnicodeDecodeError as error:
                raise UserError(f"{path} is not UTF-8: byte {error.object[error.start]:#04x} at position "
                                f"{file.tell() - len(error.object) + error.start:,}; convert it, for instance with "
                                "iconv") from None
            last = regex.search(r"(?r)(?<=\S)[ \n](?=\S)", text)  # (?r): search backwards
            cut = len(text) if not data else last.start() if last else 0
            if cut:
                yield offset, text[:cut]
                offset += len(text[:cut].encode("utf-8"))
                text = text[cut:]
            if not data:
                return


def download(url, tries=3):
    """The bytes at a URL; a connection that drops is tried again. Raises UserError where none gets through."""
    for attempt in range(1, tries + 1):
        try:
            with urllib.request.urlopen(url, timeout=30) as response:
                data = response.read()
                if len(data) == int(response.headers.get("Content-Length", len(data))):
                    return data
                error = "it broke off"
        except (OSError, http.client.HTTPException) as problem:
            error = problem
        if attempt < tries:
            time.sleep(attempt)
    raise UserError(f"cannot download {url} ({error}): get the file in another way, then: "
                    "python prepare_data.py FILE.txt --tokenizer=char --out_dir=data/shakespeare")


@contextlib.contextmanager
def hub_mistakes():
    """Whatever fails in reading a data set that is not ours becomes one line: the library raises dozens of kinds."""
    try:
        yield
    except (UserError, MemoryError):
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"cannot read the data set ({type(error).__name__}: {reason}); if the network failed, the same "
                        "command goes on from where it stopped") from None


def quiet_datasets():
    """The `datasets` library without its bars and its log: what goes wrong is said in our one line."""
    import datasets
    datasets.disable_progress_bars()
    import huggingface_hub
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    huggingface_hub.logging.set_verbosity_error()
    return datasets


def open_hub(repository, config, split):
    """A split of a data set on the hub, streamed: nothing is kept on the disk. Dropped connections are tried again by
    the library."""
    return quiet_datasets().load_dataset(repository, config, split=split, streaming=True)


def find_files(pattern):
    """The files that a path or glob names. Raises UserError where there are none, or of several kinds."""
    paths = sorted(glob.glob(pattern, recursive=True)) if glob.has_magic(pattern) else [pattern]
    if not paths:
        raise UserError(f"nothing matches {pattern}")
    for path in paths:
        if Path(path).suffix.lower() in (".json", ".csv", ".tsv"):
            raise UserError(f"{path} is in a form that is not read here: convert it to .jsonl, an object a line")
        if os.path.isfile(path) and not os.access(path, os.R_OK):
            raise UserError(f"cannot read {path}: permission denied")
        if not os.path.isfile(path):
            near = "".join(f"; did you mean {name}?" for name in difflib.get_close_matches(pattern, OURS, 1)) or ":"
            raise UserError(f"cannot read {path} ({'a folder' if os.path.isdir(path) else 'no such file'}){near} a "
                            f"data set is {', '.join(OURS)}, hf:OWNER/NAME, or a .txt, .jsonl or .parquet file")
    kinds = {file_kind(path) for path in paths}
    if len(kinds) > 1:
        raise UserError(f"{pattern} matches files of several kinds ({', '.join(sorted(kinds))}): name one kind")
    return paths


def file_kind(path):
    """json or parquet, as `datasets` names what it reads; everything else is text."""
    return {".jsonl": "json", ".parquet": "parquet"}.get(Path(path).suffix.lower(), "text")


def open_source(s, paths):
    """{split: part}, in the order in which they are prepared; or one part, called "both", where the length is unknown
    and the first shard will be the validation split. `paths`: the local files, if that is what the data set is."""
    if s.dataset == "stories":
        return split_texts(write_stories(STORIES, s.seed)[0], s)
    if s.dataset == "shakespeare":
        return split_texts([download(SHAKESPEARE_URL).decode("utf-8")], s)
    if paths:
        paths = [path for path in paths if os.path.getsize(path)]
        if not paths:
            raise UserError(f"{s.dataset} is empty")
        return text_files(paths, s) if file_kind(paths[0]) == "text" else local_rows(paths, s)
    repository, _, config = s.dataset.removeprefix("hf:").partition(":")
    repository, config = HUB.get(s.dataset, (repository, config or None))
    with hub_mistakes():
        splits = quiet_datasets().get_dataset_split_names(repository, config)
    found = {"train": "train" if "train" in splits else splits[0], "val": "validation"}
    if "validation" not in splits:
        found = {"both": found["train"]}
    return {split: Rows(functools.partial(streamed_tables, functools.partial(open_hub, repository, config, theirs)),
                        s.text_column) for split, theirs in found.items()}


def checksum(path):
    value = 0
    with open(path, "rb") as file:
        while data := file.read(PIECE):
            value = zlib.crc32(data, value)
    return value


def for_validation(count, fraction):
    """How many of `count` documents, two or more, are for validation: not none and not all."""
    return min(count - 1, max(1, round(count * fraction)))


def split_texts(documents, s):
    """The parts of documents in memory: cut between them, or inside where there is only one."""
    if len(documents) == 1:
        cut = int(len(documents[0]) * (1 - s.val_fraction))
        return {"train": Texts([documents[0][:cut]]), "val": Texts([documents[0][cut:]])}
    cut = len(documents) - for_validation(len(documents), s.val_fraction)
    return {"train": Texts(documents[:cut]), "val": Texts(documents[cut:])}


def text_files(paths, s):
    """The parts of text files. All is read once first, so that bytes that are not UTF-8 show before the work begins."""
    files = []
    for path in paths:
        marks = [(0, 0)]  # (characters, bytes) that end with each piece
        for offset, text in read_pieces(path):
            marks.append((marks[-1][0] + len(text), offset + len(text.encode("utf-8"))))
        files.append((path, 0, marks[-1][1]))
    if len(files) > 1:
        cut = len(files) - for_validation(len(files), s.val_fraction)
        return {"train": TextFiles(files[:cut]), "val": TextFiles(files[cut:])}
    path, begin, end = files[0]
    wanted = int(marks[-1][0] * (1 - s.val_fraction))  # one document is cut inside, between characters
    characters, offset = max(mark for mark in marks if mark[0] <= wanted)
    text = next(read_pieces(path, offset))[1] if offset < end else ""
    cut = offset + len(text[:wanted - characters].encode("utf-8"))
    return {"train": TextFiles([(path, begin, cut)]), "val": TextFiles([(path, cut, end)])}


def local_rows(paths, s):
    """The parts of .jsonl or .parquet files; .jsonl is read through once to count its documents."""
    def open_json():
        return quiet_datasets().load_dataset("json", split="train", streaming=True,
                                             data_files={"train": [os.path.abspath(path) for path in paths]})
    with hub_mistakes():
        if file_kind(paths[0]) == "json":
            tables = functools.partial(streamed_tables, open_json)
            count = sum(map(len, open_json().with_format("arrow").iter(batch_size=ROWS)))
        else:
            from pyarrow.parquet import read_metadata
            tables, count = functools.partial(parquet_tables, paths), sum(read_metadata(p).num_rows for p in paths)
    whole = Rows(tables, s.text_column, 0, count)
    if not any(pieces for _, pieces in whole.batches(None)):  # a wrong column shows here
        raise UserError(f"{s.dataset} is empty")
    if count == 1:
        return split_texts([text for _, pieces in whole.batches(None) for text, _ in pieces], s)
    cut = count - for_validation(count, s.val_fraction)
    return {"train": Rows(tables, s.text_column, 0, cut), "val": Rows(tables, s.text_column, cut, count)}


# ---- The tokenizer ---------------------------------------------------------------------------------------------------

BPE_SAMPLE = 50_000_000  # characters of the corpus that a bpe is trained on: more changes few merges


def make_tokenizer(kind, batches, parts, s):
    """The tokenizer's spec, made from the text where it has to be, and the batches, of which a bpe has seen some."""
    if kind == "gpt2":
        return {"kind": "gpt2"}, batches
    if kind == "char":
        alphabet, documents = set(), 0
        for part in parts.values():
            for _, pieces in part.batches(None):
                alphabet.update(*(text for text, _ in pieces))
                documents += sum(begins for _, begins in pieces)
        alphabet |= {"\n"} if documents > len(parts) else set()  # between documents
        if len(alphabet) > 65_535:
            raise UserError(f"the text has {len(alphabet):,} distinct characters; more than 65,535 do not fit: use bpe")
        return {"kind": "char", "alphabet": "".join(sorted(alphabet))}, batches
    sample, characters = [], 0
    for position, pieces in batches:
        sample.append((position, pieces))
        characters += sum(len(text) for text, _ in pieces)
        if characters >= BPE_SAMPLE:
            break
    texts = (text for _, pieces in sample for text, _ in pieces)
    merges = train_bpe(texts, s.vocab_size)
    if len(merges) < s.vocab_size - 257:
        print(f"the text ran out of pairs: the vocabulary has {len(merges) + 257:,} tokens, not {s.vocab_size:,}")
    return bpe_spec(merges), itertools.chain(sample, batches)


# ---- Shards ----------------------------------------------------------------------------------------------------------
# PROGRESS lies beside the shards while they are made, and says after each finished shard where to go on.

PROGRESS = "preparing.json"


def separator(tokenizer):
    """(n,) uint16: the tokens before each document: <|endoftext|>, or a blank line in a corpus of characters."""
    return np.array(tokenizer.document_start * (1 if tokenizer.eot is not None else 2), np.uint16)


def encoded(batches, tokenizer):
    """Yields (position, ids, starts) of one batch after another: ids (n,) uint16, each document behind its separator,
    which begins at one of `starts`. All cores encode at once: tiktoken lets go of the interpreter's lock, so threads
    do, which is simpler than processes."""
    before = separator(tokenizer)

    def encode(pieces):
        arrays, starts, length = [], [], 0
        for text, begins in pieces:
            if begins:
                starts.append(length)
                arrays.append(before)
            arrays.append(tokenizer.encode_array(text))
            length += len(arrays[-1]) + (len(before) if begins else 0)
        return np.concatenate(arrays) if arrays else np.zeros(0, np.uint16), np.array(starts, np.int64)

    workers = os.cpu_count() or 1
    with ThreadPoolExecutor(workers) as pool:
        waiting = collections.deque()
        try:
            for position, pieces in batches:
                waiting.append((position, pool.submit(encode, pieces)))
                if len(waiting) > 3 * workers:  # so much is read ahead, and no more: memory stays flat
                    position, result = waiting.popleft()
                    yield position, *result.result()
            while waiting:
                position, result = waiting.popleft()
                yield position, *result.result()
        finally:
            for _, result in waiting:
                result.cancel()


def new_split(tokenizer, **changes):
    """Where the preparation of a split stands: shards and documents so far, and where to go on: at this position of its
    part, so many tokens behind it (a corpus of characters begins without a blank line, and since documents are counted
    by what stands before them, its first is counted here)."""
    skip = 0 if tokenizer.eot is not None else len(separator(tokenizer))
    return dict(shards=0, documents=1 if skip else 0, position=None, skip=skip, finished=False) | changes


@dataclass
class Job:
    """One data set in the making."""

    s: Settings
    name: str
    folder: Path
    progress: dict  # {"settings": ..., "tokenizer": its spec, "splits": {split: see new_split}}
    tokenizer: Tokenizer | None = None

    def save_progress(self):
        write_text(self.folder / PROGRESS, json.dumps(self.progress))

    def save_shard(self, split, pieces, **where):
        """Writes the next shard of a split and then, so that a kill in between does no harm, where to go on."""
        at = self.progress["splits"][split]
        number = at["shards"] + (split == "train")  # as llm.c counts: the first shard, 0, is the validation split
        # A generator, also of a list: so write_shard takes the pieces one by one
        write_shard(self.folder / f"{self.name}_{split}_{number:06d}.bin", (piece for piece in pieces))
        at.update(shards=at["shards"] + 1, **where)
        self.save_progress()


def write_split(job, split, part, batches):
    """Encodes a part and writes its shards, from where job.progress says. A shard goes to the disk as it comes, so that
    memory does not grow with it."""
    s, at = job.s, job.progress["splits"][split]
    end = [] if job.tokenizer.eot is None else [job.tokenizer.eot]
    limit = s.max_tokens - len(end) if split == "train" and s.max_tokens else math.inf
    source, used, tokens = encoded(batches, job.tokenizer), at["skip"], at["shards"] * s.shard_tokens
    batch = next(source, None)

    def next_shard():
        """The ids of a shard, piece by piece; `at` follows, and says in the end where the shard after it begins."""
        nonlocal batch, used, tokens
        room = min(s.shard_tokens, limit - tokens)
        while batch:
            position, ids, starts = batch
            if used >= len(ids):
                batch, used = next(source, None), used - len(ids)
                continue
            if not room:
                break
            piece = ids[used:used + room]
            yield piece
            at["documents"] += int(((starts >= used) & (starts < used + len(piece))).sum())
            used, room, tokens = used + len(piece), room - len(piece), tokens + len(piece)
            at.update(position=position, skip=used)
            share = part.done(position)
            total = min(limit, tokens / share if share else math.inf)
            bar.total = int(total) if total < math.inf else None
            bar.update(len(piece))
        at["finished"] = batch is None or tokens >= limit
        if at["finished"]:
            yield np.array(end, np.uint16)

    with tqdm(desc=split, unit=" tokens", unit_scale=True, initial=tokens, disable=None) as bar:
        while not at["finished"]:
            job.save_shard(split, next_shard())


def write_both_splits(job, batches):
    """Where nobody knows how long the text is: its first shard is the validation split, whole documents of it, and
    write_split goes on behind it. A text that ends before is small, and gives its last documents instead."""
    s, splits = job.s, job.progress["splits"]
    end = np.array([] if job.tokenizer.eot is None else [job.tokenizer.eot], np.uint16)
    wanted = min(s.shard_tokens, int(s.max_tokens * s.val_fraction) if s.max_tokens else sys.maxsize)
    first = splits["val"]["skip"]  # where a split begins, counted from its first document's separator
    read, begins, length = [], [], 0  # ids, piece by piece; where documents begin in them
    for position, ids, starts in encoded(batches, job.tokenizer):
        beyond = starts[length + starts >= max(wanted, 1)]
        if len(beyond):
            cut = int(beyond[0])
            splits["train"] = new_split(job.tokenizer, position=position, skip=first + cut)
            documents = len(begins) + int((starts < cut).sum())
            pieces = [*read, ids[:cut], end]
            job.save_shard("val", [pieces[0][first:], *pieces[1:]], documents=documents, finished=True)
            return
        read.append(ids)
        begins += (length + starts).tolist()
        length += len(ids)
    if len(begins) < 2:
        raise UserError(f"{s.dataset} holds {len(begins)} documents: too few to keep one for validation")
    ids, cut = np.concatenate(read), len(begins) - for_validation(len(begins), s.val_fraction)
    train = ids[first:begins[cut]][:s.max_tokens and s.max_tokens - len(end)]
    splits["train"] = new_split(job.tokenizer)
    documents = int((np.array(begins[:cut]) < first + len(train)).sum())
    job.save_shard("train", [train, end], documents=documents, finished=True)
    job.save_shard("val", [ids[begins[cut] + first:], end], documents=len(begins) - cut, finished=True)


# ---- What was made ---------------------------------------------------------------------------------------------------


def chunks(shards, size=1_000_000):
    """The tokens of successive shards, (n,) int64 at a time, each beginning with the last one of those before."""
    last = np.zeros(0, np.int64)
    for shard in shards:
        for begin in range(0, len(shard), size):
            tokens = np.concatenate([last, shard[begin:begin + size]])  # int64, as `last` is
            yield tokens
            last = tokens[-1:]


def landmarks(train, val, vocab_size):
    """What models of counting alone reach on the validation tokens, in nats a token: `uniform` knows nothing, `unigram`
    how frequent each token is, `bigram` what follows what. They are counted on `train`; both are lists of arrays of
    ids. Unseen tokens get a little too (add-one), unseen pairs a share by their frequency (Witten & Bell 1991)."""
    counts = np.ones(vocab_size, np.int64)
    pairs = np.zeros(vocab_size**2 if vocab_size <= 10_000 else 0, np.uint32)  # of 10,000: 400 MB
    for number, tokens in enumerate(chunks(train)):
        counts += np.bincount(tokens[number > 0:], minlength=vocab_size)
        if len(pairs):
            np.add.at(pairs, tokens[:-1] * vocab_size + tokens[1:], np.uint32(1))
    unigram = counts / counts.sum()  # (V,)
    table = pairs.reshape(-1, vocab_size)
    follow = np.array([row.sum(dtype=np.int64) for row in table])  # (V,) how often anything follows each token
    kinds = np.array([max(np.count_nonzero(row), 1) for row in table])  # (V,) ... how many different ones
    targets, nats = 0, {"unigram": 0.0, "bigram": 0.0}
    for tokens in chunks(val):
        first, second = tokens[:-1], tokens[1:]
        targets += len(second)
        nats["unigram"] -= np.log(unigram[second]).sum()
        if len(pairs):
            likely = table[first, second] + kinds[first] * unigram[second]
            nats["bigram"] -= np.log(likely / (follow[first] + kinds[first])).sum()
    if not len(pairs):
        del nats["bigram"]
    return {"uniform": math.log(vocab_size)} | {name: float(sum_ / targets) for name, sum_ in nats.items()}


def describe(folder, name, tokenizer, documents):
    """meta.json's contents but for the settings: counted from the shards, so that nothing had to be kept on the way."""
    shards, token_bytes, meta = {}, tokenizer.token_bytes(), {"dataset": name, "tokenizer": tokenizer.spec}
    for split, paths in shard_paths(folder).items():
        tokens = sum(path.stat().st_size - 1024 for path in paths) // 2
        if tokens < 4:
            for path in [*folder.glob("*.bin"), folder / PROGRESS]:  # nothing was prepared: a longer text may come here
                path.unlink(missing_ok=True)
            raise UserError(f"{name} is too short: its {split} split has {tokens} tokens")
        shards[split] = [read_shard(path) for path in paths]
        counts = np.zeros(tokenizer.vocab_size, np.int64)
        for array in shards[split]:
            for begin in range(0, len(array), PIECE):
                counts += np.bincount(array[begin:begin + PIECE], minlength=tokenizer.vocab_size)
        meta[split] = {"tokens": int(counts.sum()), "documents": documents.get(split, int(counts[tokenizer.eot or 0])),
                       "bytes": int(counts @ token_bytes)}
    return meta | {"landmarks": landmarks(shards["train"], shards["val"], tokenizer.vocab_size)}


def claim(folder, settings):
    """The progress of an unfinished preparation with these settings, or a new one's; None where all is done. Raises
    UserError where the folder holds anything else."""
    try:
        names = sorted(path.name for path in folder.iterdir()) if folder.exists() else []
        finished = next((file for file in ("meta.json", PROGRESS) if file in names), None)
        if finished:
            found = json.loads((folder / finished).read_text(encoding="utf-8"))
            for key, value in settings.items():
                if (there := found["settings"].get(key)) != value:
                    difference = "from another text" if key == "dataset" else f"with {key}={there}, not {value}"
                    raise UserError(f"{folder} holds data prepared {difference}: choose another --out_dir, or remove "
                                    "that folder")
            if finished == PROGRESS:
                return found
            (folder / PROGRESS).unlink(missing_ok=True)
            return None
        foreign = [file for file in names if not re.fullmatch(r"\..*\.tmp", file)]  # which a kill can leave
        if foreign:
            raise UserError(f"{folder} holds something else ({foreign[0]}): choose another --out_dir")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{folder / finished} is not what prepare_data.py writes ({type(error).__name__}): choose "
                        "another --out_dir, or remove that folder") from None
    except OSError as error:
        raise UserError(f"cannot look into {folder} ({error.strerror}): choose another --out_dir") from None
    return {"settings": settings, "tokenizer": None, "splits": {}}


def make_folder(folder):
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write to {folder} ({error.strerror}): choose another --out_dir") from None


def summarize(folder, meta):
    for split in ("train", "val"):
        m = meta[split]
        print(f"{split}: {m['documents']:,} documents, {m['tokens']:,} tokens, "
              f"{m['bytes'] / m['tokens']:.2f} bytes a token, {len(shard_paths(folder)[split])} shards")
    print(f"{meta['tokenizer']['kind']} tokenizer; nats a token by counting alone: "
          + ", ".join(f"{name} {value:.2f}" for name, value in meta["landmarks"].items())
          + (f"; the best possible: {meta['entropy_floor']:.4f}" if "entropy_floor" in meta else ""))
    made_for = [preset for preset, changes in PRESETS.items() if changes.get("data_dir") == folder.as_posix()]
    there = shlex.quote(f"--data_dir={folder}")
    if made_for:
        options = f" --preset={made_for[0]}" + (f" (or {', '.join(made_for[1:])})" if made_for[1:] else "")
    elif meta["dataset"] in SHARDS_ON_HUB:
        options = f" --preset=gpt2 {there}"
    else:
        options = "" if folder == Path("data/stories") else f" {there} --rows=stream"
    print(f"written to {folder}; now: python train_gpt2.py{options}")


# ---- The command -----------------------------------------------------------------------------------------------------


def fetch_shards(s):
    """Downloads shards of GPT-2 tokens that others have published, the validation split and as many more as max_tokens
    asks for. What is there already is kept."""
    import huggingface_hub as hub
    folder, repository = Path(s.out_dir or f"data/{s.dataset}"), SHARDS_ON_HUB[s.dataset]
    if (progress := claim(folder, {"dataset": s.dataset, "max_tokens": s.max_tokens})) is None:
        return print(f"{folder} is complete already") or 0
    tokenizer, tokens = Tokenizer({"kind": "gpt2"}), 0
    with hub_mistakes():
        quiet_datasets()
        names = [name for name in hub.HfApi().list_repo_files(repository, repo_type="dataset") if name.endswith(".bin")]
        make_folder(folder)
        write_text(folder / PROGRESS, json.dumps(progress))
        for name in sorted(names, key=lambda name: ("val" not in name, name)):
            if "val" not in name and tokens >= (s.max_tokens or sys.maxsize):
                break
            path = folder / name
            if not path.exists():
                hub.hf_hub_download(repository, name, repo_type="dataset", local_dir=folder)
            try:
                count = len(read_shard(path))
            except UserError:
                path.unlink()  # so that the next try downloads it again
                raise
            tokens += 0 if "val" in name else count
    shutil.rmtree(folder / ".cache", ignore_errors=True)  # the hub's notes on its downloads
    return finish(folder, describe(folder, s.dataset, tokenizer, {}), progress["settings"])


def write_hellaswag(s):
    """The validation questions of HellaSwag (Zellers et al. 2019) as JSON lines, for train_gpt2.py's evaluation."""
    path = HELLASWAG
    if s.out_dir and Path(s.out_dir) != path.parent:
        raise UserError(f"hellaswag is written to {path.parent}, where the evaluation looks: leave out --out_dir")
    if path.exists():
        return print(f"{path} is there already") or 0
    with hub_mistakes():
        rows = [json.dumps({"ctx": row["ctx"], "endings": row["endings"], "label": int(row["label"])})
                for row in open_hub("Rowan/hellaswag", None, "validation")]
    make_folder(path.parent)
    write_text(path, "\n".join(rows) + "\n")
    print(f"{len(rows):,} questions written to {path}; now: python train_gpt2.py --eval_only=True --init_from=gpt2 "
          f"--data_dir={path.parent}, or a training run with GPT-2's tokens")
    return 0


def check_settings(s):
    """Raises UserError for a value out of range."""
    if not 0 < s.val_fraction < 1:
        raise UserError(f"val_fraction is {s.val_fraction}: it must be between 0 and 1")
    check_ranges(s, shard_tokens=(2, 2**31 - 1), max_tokens=(2, 2**63), seed=(0, 2**63))
    if s.tokenizer in ("auto", "bpe"):
        check_ranges(s, vocab_size=(257, 65_536))  # at least the bytes and <|endoftext|>; ids are uint16


def finish(folder, meta, settings):
    """Writes meta.json, by which the data set is whole, and says what there is."""
    write_text(folder / "meta.json", json.dumps(meta | {"settings": settings}) + "\n")
    (folder / PROGRESS).unlink(missing_ok=True)
    summarize(folder, meta)
    return 0


def name_of(s):
    """(name of the data set, kind of tokenizer, folder)."""
    path = s.dataset[3:].split(":")[0] if s.dataset.startswith("hf:") else s.dataset  # C:\\ is no configuration
    name = Path(path).parent.name or "texts" if glob.has_magic(path) else Path(path).stem
    name = re.sub(r"[^\w.-]", "_", name)
    if name in OURS and s.dataset != name:  # a file of that name is another text
        name += "_text"
    usual = USUAL.get(s.dataset, "bpe")
    kind = usual if s.tokenizer == "auto" else s.tokenizer
    return name, kind, Path(s.out_dir or f"data/{name}" + (f"_{kind}" if kind != usual else ""))


def prepare(s):
    """Text to shards: whatever is not there already."""
    name, kind, folder = name_of(s)
    paths = find_files(s.dataset) if s.dataset not in {"stories", *USUAL} and not s.dataset.startswith("hf:") else []
    settings = {"dataset": [f"{Path(path).name} {checksum(path):08x}" for path in paths] or s.dataset,
                "tokenizer": kind, "text_column": s.text_column, "seed": s.seed, "shard_tokens": s.shard_tokens,
                "max_tokens": s.max_tokens, "val_fraction": s.val_fraction}
    settings |= {"vocab_size": s.vocab_size} if kind == "bpe" else {}
    if s.dataset.startswith("hf:") and not re.fullmatch(r"hf:[\w.-]+/[\w.-]+(:.+)?", s.dataset):
        raise UserError(f"{s.dataset!r} is no data set of the hub: it is written hf:OWNER/NAME or hf:OWNER/NAME:CONFIG")
    if (progress := claim(folder, settings)) is None:
        return print(f"{folder} is complete already; to prepare it anew, remove it") or 0
    parts = open_source(s, paths)
    make_folder(folder)
    for path in folder.glob(".*.tmp"):  # left by a run that was killed while writing
        path.unlink()
    job, splits, seen = Job(s, name, folder, progress), progress["splits"], {}
    if progress["tokenizer"]:
        job.tokenizer = Tokenizer(progress["tokenizer"])
        print(f"going on in {folder}, behind {sum(at['shards'] for at in splits.values())} finished shards")
    else:
        first = next(iter(parts))
        progress["tokenizer"], seen[first] = make_tokenizer(kind, parts[first].batches(None), parts, s)
        job.tokenizer = Tokenizer(progress["tokenizer"])
        job.save_progress()  # before the first shard, which would be nobody's otherwise
    if "both" in parts:
        parts["train"] = parts.pop("both")
        if not splits.get("val", {}).get("finished"):
            splits["val"] = new_split(job.tokenizer)
            write_both_splits(job, seen.pop("both", None) or parts["train"].batches(None))
    for split, part in parts.items():
        at = splits.setdefault(split, new_split(job.tokenizer))
        if not at["finished"]:
            write_split(job, split, part, seen.get(split) or part.batches(at["position"]))
    meta = describe(folder, name, job.tokenizer, {split: at["documents"] for split, at in splits.items()})
    if s.dataset == "stories":
        # The lowest loss that any model can be expected to reach on exactly the validation targets: every token but
        # the first one, the closing <|endoftext|> of each story included, which is certain and so costs nothing.
        choose, targets = random.Random(s.seed).choice, meta["val"]["tokens"] - 1  # as in write_stories
        told = [story(choose) for _ in range(STORIES)][-meta["val"]["documents"]:]
        meta["skills"] = {skill: sum(nats for pieces in told for _, its, nats in pieces if its == skill) / targets
                          for skill in SKILLS}
        meta["entropy_floor"] = sum(meta["skills"].values())
        write_atomically(folder / "skills.npy", lambda file: np.save(file, label(told, job.tokenizer)))
    return finish(folder, meta, settings)


@reports_mistakes
def main(argv=None):
    s, _ = parse_settings(Settings, argv, __doc__, bare="dataset")
    check_settings(s)
    try:
        if s.dataset in SHARDS_ON_HUB:
            return fetch_shards(s)
        return write_hellaswag(s) if s.dataset == "hellaswag" else prepare(s)
    except KeyboardInterrupt:
        print("stopped; the same command goes on behind the last finished shard", file=sys.stderr)
        return 130


if __name__ == "__main__":
    try:
        status = main()
    except SystemExit as stop:
        status = stop.code
    # Not sys.exit: pyarrow aborts at the interpreter's end where a parquet stream was left early (apache/arrow#45214)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status or 0)
