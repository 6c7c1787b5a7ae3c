"""Turn text into shards of tokens that train_gpt2.py reads.

    python prepare_data.py                                   # the embedded stories, offline
    python prepare_data.py shakespeare                       # TinyShakespeare, downloaded, character by character
    python prepare_data.py my_text.txt                       # your own text, with a BPE trained on it, offline
    python prepare_data.py my_text.txt --tokenizer=char      # ... character by character
    python prepare_data.py my_text.txt --tokenizer=gpt2      # ... with OpenAI's vocabulary (downloaded once)

Text comes from a source, becomes ids through a tokenizer, and goes to shards in llm.c's format; meta.json, written
last, says what they hold. This file has them in that order: the stories' grammar, the BPE trainer, the shard writer.
"""
import collections
import heapq
import http.client
import json
import math
import random
import sys
import time
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import regex
from tqdm import tqdm

from train_gpt2 import (
    END_OF_TEXT,
    SPLIT_PATTERN,
    Tokenizer,
    UserError,
    parse_settings,
    reports_mistakes,
    write_shard,
    write_text,
)


@dataclass
class Settings:
    dataset: str = "stories"  # stories, shakespeare, or a UTF-8 text file
    tokenizer: Literal["auto", "gpt2", "bpe", "char"] = "auto"  # auto: char for shakespeare, else a bpe trained here
    vocab_size: int = 1024  # of a bpe: 256 bytes, the merges, and <|endoftext|>
    out_dir: str = ""  # empty: data/<dataset>, with _<tokenizer> behind it where that is not the usual one
    shard_tokens: int = 100_000_000  # tokens in a shard: 200 MB
    max_tokens: int | None = None  # stop after about so many; None: everything
    val_fraction: float = 0.1  # this share of the text, at its end, is kept for validation
    seed: int = 1  # of the stories


# ---- The embedded stories --------------------------------------------------------------------------------------------
# A story is a series of independent choices, each uniform among its options, so that its probability is exactly
# 1 / (product of the numbers of options): see `entropy`. Different choices never give the same text, because every
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


def tell(choose):
    """One story and the logarithm of its improbability. `choose(options)` returns one of a list; what decides it is the
    caller's: chance for the corpus, every path in turn for a test.

    Returns (text, nats): nats = the sum of ln(number of options) over all choices = -ln p(text)."""
    nats, known, text = 0.0, {}, []

    def pick(among):
        nonlocal nats
        nats += math.log(len(among))
        return choose(among)

    known["hero"] = pick(list(HEROES))  # first, for {child} may stand before the name
    for wordings in SENTENCES:
        wording = pick(wordings)
        for slot in regex.findall(r"\{(\w+)\}", wording):
            if slot not in known:
                known[slot] = pick(options(slot, known))
        text.append(wording.format(**known))
    return " ".join(text), nats


def write_stories(count, seed):
    """(texts, nats of each) of `count` stories, drawn with this seed."""
    choose = random.Random(seed).choice
    return tuple(zip(*(tell(choose) for _ in range(count)), strict=True))


# ---- The BPE trainer -------------------------------------------------------------------------------------------------


def train_bpe(texts, vocab_size, progress=False):
    """Learns a byte-level BPE as GPT-2's was (Sennrich et al. 2016, section 3.2; GPT-2 paper, section 2.2).

    texts: an iterable of str. vocab_size counts 256 bytes, the merges and <|endoftext|>. Returns the merges in order,
    [(bytes, bytes), ...]: fewer than asked where the text runs out of pairs. The most frequent pair of neighbours
    merges next; a tie goes to the lexicographically greater pair. Raises UserError for a size out of range."""
    if not 257 <= vocab_size <= 65_536:
        raise UserError(f"vocab_size is {vocab_size:,}: it must be from 257 (the bytes and {END_OF_TEXT}) to 65,536")
    # A corpus has few distinct words: each is taken apart once and counts as often as it occurs.
    split = regex.compile(SPLIT_PATTERN)
    counts = collections.Counter()
    for text in texts:
        counts.update(split.findall(text))
    words = [[bytes([byte]) for byte in word.encode("utf-8")] for word in counts]  # each word's tokens so far
    frequency = list(counts.values())

    pairs = collections.Counter()  # (left, right) -> how often they stand side by side in the corpus
    where = collections.defaultdict(set)  # (left, right) -> the words in which they may do
    for i, word in enumerate(words):
        for pair in zip(word, word[1:], strict=False):
            pairs[pair] += frequency[i]
            where[pair].add(i)
    # A heap finds the greatest count at once. Counts change; rather than search the heap for the old entry we add a
    # new one, and skip those that no longer tell the truth when they come up.
    heap = [Candidate(count, pair) for pair, count in pairs.items()]
    heapq.heapify(heap)

    merges = []
    with tqdm(total=vocab_size - 257, desc="merges", disable=not progress) as bar:
        while heap and len(merges) < vocab_size - 257:
            best = heapq.heappop(heap)
            if best.count != pairs[best.pair]:
                continue
            merges.append(best.pair)
            changed = merge_everywhere(best.pair, words, frequency, pairs, where)
            for pair in changed:
                if pairs[pair] > 0:
                    heapq.heappush(heap, Candidate(pairs[pair], pair))
                else:
                    pairs.pop(pair), where.pop(pair, None)
            bar.update()
            bar.set_postfix_str(repr(b"".join(best.pair)), refresh=False)
    return merges


class Candidate(tuple):
    """(count, pair) in a heap: greater counts come first, and of equal ones the greater pair."""

    def __new__(cls, count, pair):
        return super().__new__(cls, (count, pair))

    count = property(lambda self: self[0])
    pair = property(lambda self: self[1])

    def __lt__(self, other):
        return tuple.__gt__(self, other)


def merge_everywhere(pair, words, frequency, pairs, where):
    """Merges a pair in all words that hold it, and updates the counts of the pairs around: of those alone, which is
    what makes this fast. Returns the pairs whose count changed."""
    left, right = pair
    merged = left + right
    changed = set()
    for i in where.pop(pair):
        old, new, j = words[i], [], 0
        while j < len(old):
            if old[j] == left and j + 1 < len(old) and old[j + 1] == right:
                new.append(merged)
                j += 2
            else:
                new.append(old[j])
                j += 1
        if len(new) == len(old):
            continue  # an earlier merge took the pair apart
        words[i] = new
        before, after = list(zip(old, old[1:], strict=False)), list(zip(new, new[1:], strict=False))
        for neighbours in before:
            pairs[neighbours] -= frequency[i]
        for neighbours in after:
            pairs[neighbours] += frequency[i]
            where[neighbours].add(i)
        changed.update(before)
        changed.update(after)
    return changed


def bpe_spec(merges):
    """The tokenizer's entry in meta.json: all bytes, then the merged tokens, a character for each byte."""
    tokens = [bytes([byte]) for byte in range(256)] + [left + right for left, right in merges]
    return {"kind": "bpe", "ranks": [token.decode("latin-1") for token in tokens]}


# ---- Shards ----------------------------------------------------------------------------------------------------------


SHAKESPEARE_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"


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


def read_text(path):
    """The text of a file, byte for byte. Raises UserError where it cannot be read, is empty or is not UTF-8."""
    try:
        data = download(SHAKESPEARE_URL) if path == "shakespeare" else Path(path).read_bytes()
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8: byte {data[error.start]:#04x} at position {error.start:,}; convert it, "
                        "for instance with iconv") from None
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror}): a data set is `stories`, `shakespeare` or the path of "
                        "a text file") from None
    if not text:
        raise UserError(f"{path} is empty")
    return text


def split_documents(documents, val_fraction):
    """(train, val): the last part is for validation, cut between documents, or inside where there is only one."""
    if len(documents) == 1:
        cut = int(len(documents[0]) * (1 - val_fraction))
        return [documents[0][:cut]], [documents[0][cut:]]
    cut = len(documents) - max(1, round(len(documents) * val_fraction))
    return documents[:cut], documents[cut:]


def encode_documents(documents, tokenizer, max_tokens=None):
    """All ids of a split, (n,) uint16, cut after max_tokens: <|endoftext|> before each document and after the last; for
    characters, the documents joined by a blank line."""
    if tokenizer.eot is None:
        return np.array(tokenizer.encode("\n\n".join(documents)), dtype=np.uint16)[:max_tokens]
    ids = []
    for document in tqdm(documents, desc="tokens", unit=" documents", disable=len(documents) < 20_000):
        ids.append(tokenizer.eot)
        ids.extend(tokenizer.encode(document))
        if max_tokens and len(ids) >= max_tokens:
            break
    return np.array([*ids[:max_tokens and max_tokens - 1], tokenizer.eot], dtype=np.uint16)


def landmarks(train, val, vocab_size):
    """What models of counting alone reach on the validation tokens, in nats a token: `uniform` knows nothing, `unigram`
    how frequent each token is, `bigram` what follows what. They are counted on `train`, each an array of ids; unseen
    tokens get a little too (add-one), unseen pairs a share by their frequency (Witten & Bell 1991)."""
    counts = np.bincount(train, minlength=vocab_size) + 1
    unigram = counts / counts.sum()  # (V,)
    found = {"uniform": math.log(vocab_size), "unigram": float(-np.log(unigram[val[1:]]).mean())}
    if vocab_size <= 10_000:
        pair, times = np.unique(train[:-1].astype(np.int64) * vocab_size + train[1:], return_counts=True)
        total = np.bincount(pair // vocab_size, weights=times, minlength=vocab_size)  # (V,) pairs that begin with each
        kinds = np.bincount(pair // vocab_size, minlength=vocab_size)  # (V,) ... how many different ones
        wanted = val[:-1].astype(np.int64) * vocab_size + val[1:]
        at = np.minimum(np.searchsorted(pair, wanted), len(pair) - 1)
        seen = np.where(pair[at] == wanted, times[at], 0)
        first = val[:-1]
        weight = np.maximum(kinds[first], 1)
        found["bigram"] = float(-np.log((seen + weight * unigram[val[1:]]) / (total[first] + weight)).mean())
    return found


def make_tokenizer(kind, documents, s):
    """The tokenizer's spec: trained on the documents where it has to be."""
    if kind == "gpt2":
        return {"kind": "gpt2"}
    if kind == "char":
        alphabet = sorted(set("".join(documents)) | ({"\n"} if len(documents) > 1 else set()))
        if len(alphabet) > 65_535:
            raise UserError(f"the text has {len(alphabet):,} distinct characters; more than 65,535 do not fit: use bpe")
        return {"kind": "char", "alphabet": "".join(alphabet)}
    merges = train_bpe(documents, s.vocab_size, progress=sys.stderr.isatty())
    if len(merges) < s.vocab_size - 257:
        print(f"the text ran out of pairs: the vocabulary has {len(merges) + 257:,} tokens, not {s.vocab_size:,}")
    return bpe_spec(merges)


def check_settings(s):
    """Raises UserError for a value out of range."""
    if not 0 < s.val_fraction < 1:
        raise UserError(f"val_fraction is {s.val_fraction}: it must be between 0 and 1")
    for name, least in dict(shard_tokens=2, max_tokens=2, seed=0).items():
        value = getattr(s, name)
        if value is not None and value < least:
            raise UserError(f"{name} is {value}: it must be at least {least}")


@reports_mistakes
def main(argv=None):
    s, _ = parse_settings(Settings, argv, __doc__, bare="dataset")
    check_settings(s)
    if s.dataset == "stories":
        name = "stories"
        documents, nats = write_stories(STORIES, s.seed)
    else:
        name, documents = Path(s.dataset).stem, [read_text(s.dataset)]
    usual = "char" if name == "shakespeare" else "bpe"
    kind = usual if s.tokenizer == "auto" else s.tokenizer
    folder = Path(s.out_dir or f"data/{name}" + (f"_{kind}" if kind != usual else ""))

    parts = dict(zip(("train", "val"), split_documents(documents, s.val_fraction), strict=True))
    tokenizer = Tokenizer(make_tokenizer(kind, documents, s))
    ids = {"train": encode_documents(parts["train"], tokenizer, s.max_tokens),
           "val": encode_documents(parts["val"], tokenizer)}
    meta = {"dataset": name, "tokenizer": tokenizer.spec}
    token_bytes = tokenizer.token_bytes()
    for split, tokens in ids.items():
        if len(tokens) < 4:
            raise UserError(f"{s.dataset} is too short: its {split} split has {len(tokens)} tokens")
        begun = len(parts[split]) if tokenizer.eot is None else int((tokens[:-1] == tokenizer.eot).sum())
        meta[split] = {"tokens": len(tokens), "documents": begun, "bytes": int(token_bytes[tokens].sum())}
    meta["landmarks"] = landmarks(ids["train"], ids["val"], tokenizer.vocab_size)
    if s.dataset == "stories":
        # The lowest loss that any model can be expected to reach on exactly the validation targets: every token but
        # the first one, the closing <|endoftext|> of each story included, which is certain and so costs nothing.
        meta["entropy_floor"] = sum(nats[-meta["val"]["documents"]:]) / (len(ids["val"]) - 1)

    claim(folder, name)  # only now, so that a mistake leaves an older data set alone
    for split, first in (("train", 1), ("val", 0)):
        for number, begin in enumerate(range(0, len(ids[split]), s.shard_tokens), first):
            write_shard(folder / f"{name}_{split}_{number:06d}.bin", ids[split][begin:begin + s.shard_tokens])
    write_text(folder / "meta.json", json.dumps(meta) + "\n")
    summarize(folder, meta)
    return 0


def claim(folder, name):
    """Makes the folder, or empties it of an older data set of this name. Raises UserError for other contents."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        old = [path for path in folder.iterdir() if path.name != "meta.json"]
        ours = regex.compile(regex.escape(name) + r"_(train|val)_\d{6}\.bin|\..*\.tmp")
        foreign = [path.name for path in old if not ours.fullmatch(path.name)]
        if foreign:
            raise UserError(f"{folder} holds something else ({foreign[0]}): choose another --out_dir")
        (folder / "meta.json").unlink(missing_ok=True)
        for path in old:
            path.unlink()
    except OSError as error:
        raise UserError(f"cannot write to {folder} ({error.strerror}): choose another --out_dir") from None


def summarize(folder, meta):
    for split in ("train", "val"):
        m = meta[split]
        print(f"{split}: {m['documents']:,} documents, {m['tokens']:,} tokens, "
              f"{m['bytes'] / m['tokens']:.2f} bytes a token")
    print(f"{meta['tokenizer']['kind']} tokenizer; nats a token by counting alone: "
          + ", ".join(f"{name} {value:.2f}" for name, value in meta["landmarks"].items())
          + (f"; the best possible: {meta['entropy_floor']:.4f}" if "entropy_floor" in meta else ""))
    rows = "" if folder == Path("data/stories") else f" --data_dir={folder} --rows=stream"
    print(f"written to {folder}; now: python train_gpt2.py{rows}")


if __name__ == "__main__":
    sys.exit(main())
