"""Turn text into shards of tokens, and published weights into checkpoints, for train_gpt2.py.

    python prepare_data.py                         # the embedded stories, no network needed
    python prepare_data.py my_text.txt             # your own text, with a BPE trained on it
    python prepare_data.py "notes/*.jsonl.gz" --text_column=body --tokenizer=gpt2  # or .parquet
    python prepare_data.py shakespeare             # or tinystories: characters
    python prepare_data.py fineweb_edu --max_tokens=500_000_000  # FineWeb-Edu, GPT-2's tokens
    python prepare_data.py hf:OWNER/NAME:CONFIG    # of the hub
    python prepare_data.py hellaswag
    python prepare_data.py gpt2                    # OpenAI's weights -> out/openai-gpt2/best.pt
    python prepare_data.py my_folder               # of transformers

A source gives documents, a tokenizer turns them into ids, and these go to shards; meta.json,
written last, describes them. After a stop, the same command continues.
"""
import bisect
import codecs
import collections
import contextlib
import glob
import hashlib
import heapq
import importlib
import io
import itertools
import json
import math
import os
import random
import re
import shlex
import sys
import warnings
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import regex
from tqdm import tqdm

from train_gpt2 import (  # before torch: it sets how threads wait
    END_OF_TEXT,
    GPT,
    HELLASWAG,
    OPENAI_NAMES,
    PRESETS,
    SKILLS,
    SPLIT_PATTERN,
    GPTConfig,
    Tokenizer,
    UserError,
    check_ranges,
    converted_path,
    make_checkpoint,
    parse_settings,
    read_shard,
    reports_mistakes,
    shard_paths,
    write_atomically,
    write_text,
)

# isort: split
import torch


@dataclass
class Settings:
    dataset: str = "stories"  # a name from above, or .txt, .jsonl, .parquet files (globs, .gz too)
    tokenizer: Literal["auto", "gpt2", "bpe", "sentencepiece", "char"] = "auto"  # auto: as above
    vocab_size: int = 1024  # of a bpe: bytes, merges and <|endoftext|>
    text_column: str = "text"  # the column of a .jsonl, .parquet or hf: data set with the text
    out_dir: str = ""  # empty: data/<dataset>, plus _<tokenizer> if that is not the usual one
    shard_tokens: int = 100_000_000  # tokens per shard: 200 MB
    max_tokens: int | None = None  # at most this many training tokens; None: all
    val_fraction: float = 0.1  # the last part of the text, kept for validation
    seed: int = 1  # of the stories


# ---- The pipeline: source -> tokenizer -> shards -> meta.json ----

USUAL = {"shakespeare": "char", "tinystories": "char", "fineweb_edu": "gpt2"}
PROGRESS = "progress.json"
PIECE = 1 << 20  # characters, bytes or tokens that are processed at a time


def prepare(s):
    """Text to shards. What an earlier, unfinished run has written is kept."""
    name, kind, folder = name_of(s)
    paths = find_files(s.dataset)
    settings = asdict(s) | {"tokenizer": kind}
    del settings["out_dir"]
    if paths:
        settings["dataset"] = [f"{Path(path).name} {checksum(path):08x}" for path in paths]
    if kind in ("gpt2", "char"):
        del settings["vocab_size"]
    progress = claim(folder, settings)
    if progress is None:
        (folder / PROGRESS).unlink(missing_ok=True)
        print(f"{folder} is complete already")
        return
    parts = open_source(s, paths)
    if progress["tokenizer"]:
        print(f"continuing in {folder}")
    else:
        progress["tokenizer"] = make_tokenizer(kind, parts, s)
    tokenizer = Tokenizer(progress["tokenizer"])
    make_folder(folder)

    def save():
        write_text(folder / PROGRESS, json.dumps(progress))
    save()
    for split, part in parts.items():
        at = progress["splits"].setdefault(split, new_split(tokenizer))
        write_split(s, f"{folder / name}_{split}", part, tokenizer, at, save)
    meta = describe(folder, name, tokenizer, progress["splits"])
    if s.dataset == "stories":
        meta |= entropy_floor(s, folder, tokenizer, meta["val"])
    finish(folder, meta, settings)
    if skipped := sum(part.skipped for part in parts.values()):
        unit = file_kind(paths[0]) if paths else "rows"
        print(f'{skipped:,} {unit} without "{s.text_column}" skipped')


def name_of(s):
    path = s.dataset[3:].split(":")[0] if s.dataset.startswith("hf:") else s.dataset
    name = Path(path).parent.name or "texts" if is_pattern(path) else Path(unpacked(path)).stem
    name = re.sub(r"[^\w.-]", "_", name)
    if name in OURS and s.dataset != name:
        name += "_text"
    usual = USUAL.get(s.dataset, "bpe")
    kind = usual if s.tokenizer == "auto" else s.tokenizer
    return name, kind, Path(s.out_dir or f"data/{name}{'' if kind == usual else '_' + kind}")


CHOOSE = ": choose another --out_dir, or remove it"


def claim(folder, settings):
    """The progress of an unfinished preparation with these settings, or of a new one; None if the
    data set is complete."""
    with one_line(f"cannot use {folder}", CHOOSE):
        names = sorted(os.listdir(folder)) if folder.exists() else []
        record = "meta.json" if "meta.json" in names else PROGRESS
        if record not in names:
            if other := [name for name in names if not name.endswith(".tmp")]:
                raise UserError(f"{folder} holds something else ({other[0]}){CHOOSE}")
            return {"settings": settings, "tokenizer": None, "splits": {}}
        found = json.loads((folder / record).read_bytes())
        for key, value in settings.items():
            if (there := found["settings"].get(key)) != value:
                how = f"with {key}={there}" if key != "dataset" else "from another text"
                raise UserError(f"{folder} holds data prepared {how}{CHOOSE}")
        return found if record == PROGRESS else None


def make_folder(folder):
    with one_line(f"cannot write to {folder}", ": choose another --out_dir"):
        folder.mkdir(parents=True, exist_ok=True)


# Base classes of network errors in Python, requests, httpx and aiohttp
NETWORK = {"ConnectionError", "Timeout", "TimeoutError", "TransportError", "ClientConnectionError",
           "OfflineModeIsEnabled"}


@contextlib.contextmanager
def one_line(what, advice=""):
    """Turns what a library raises over a user's input into one line."""
    try:
        yield
    except (UserError, MemoryError):
        raise
    except Exception as error:
        reason, cause = getattr(error, "strerror", 0) or " ".join(str(error).split())[:200], error
        while cause:
            if NETWORK & {base.__name__ for base in type(cause).__mro__}:
                advice = ": the network failed; run the same command later"
            cause = cause.__cause__ or cause.__context__
        raise UserError(f"{what} ({type(error).__name__}: {reason}){advice}") from None


@dataclass
class Part:
    """Documents number `first` to `last` of a reader (see Sources), or characters of a single one
    (`inside`)."""

    read: Callable
    first: int = 0
    last: int = sys.maxsize
    inside: bool = False
    skipped: int = 0

    def batches(self, position=None):
        """Yields (position, [(text, begins a document), ...]), about PIECE characters at a time.
        batches(position) continues with that batch."""
        count, where, self.skipped = position or (0, None, 0)
        place, pieces, size = None, [], 0
        with contextlib.closing(self.read(where)) as found:
            for where, text, begins in found:
                number = count if begins or self.inside else count - 1
                if number >= self.last and (text or number > self.last):
                    break
                place = place or [count, where, self.skipped]
                if not text:  # it counts with the document before it
                    self.skipped += count > self.first or not self.first
                    continue
                count += len(text) if self.inside else begins
                if self.inside:
                    text = text[max(0, self.first - number):self.last - number]
                    begins = number <= self.first
                if text and count > self.first:
                    pieces.append((text, begins))
                    size += len(text)
                if size >= PIECE:
                    yield place, pieces
                    place, pieces, size = None, [], 0
        if pieces:
            yield place, pieces

    def pieces(self):
        for _, pieces in self.batches():
            yield from pieces


def open_source(s, paths):
    """{"train": Part, "val": Part}. paths: the local files, [] for other data sets."""
    if s.dataset == "stories":
        texts = ["".join(text for text, _, _ in pieces) for pieces in write_stories(s.seed)]
        return split_source(read_string, texts, s)
    if s.dataset == "shakespeare":
        return split_source(read_string, [download(SHAKESPEARE_URL)], s)
    if paths:
        read = {"text": read_text, "lines": read_lines, "rows": read_parquet}[file_kind(paths[0])]
        return split_source(read, paths, s)
    repository, _, config = s.dataset.removeprefix("hf:").partition(":")
    source = HUB.get(s.dataset, (repository, config or None))
    with one_line(f"cannot read {s.dataset} from the hub"):
        names = quiet_datasets().get_dataset_split_names(*source)
    train, val = (partial(read_hub, (*source, name), s.text_column) for name in (
        "train" if "train" in names else names[0], "validation"))
    if "validation" in names:
        return {"train": Part(train), "val": Part(val)}
    return split_stream(train, s)


def split_source(read, files, s):
    """The two parts of files, cut between documents, or inside a single one. All is read once, so
    bad input shows early."""
    read = partial(read_files, read, files, s.text_column)
    whole, documents, characters = Part(read), 0, 0
    for text, begins in whole.pieces():
        documents, characters = documents + begins, characters + len(text)
    if documents == 1:
        cut = int(characters * (1 - s.val_fraction))
        return {"train": Part(read, 0, cut, True), "val": Part(read, cut, characters, True)}
    return split_documents(read, documents, s)


def split_documents(read, count, s):
    if count < 2:
        raise UserError(f"{s.dataset} holds {count} documents with --text_column={s.text_column}: "
                        "too few for a validation split")
    cut = count - min(count - 1, max(1, round(count * s.val_fraction)))
    return {"train": Part(read, 0, cut), "val": Part(read, cut, count)}


def split_stream(read, s):
    """The two parts of a stream of unknown length: its first documents, about a shard at 4
    characters per token, are for validation; of a shorter stream the last ones."""
    limit = int(s.max_tokens * s.val_fraction) if s.max_tokens else sys.maxsize
    wanted = 4 * max(1, min(s.shard_tokens, limit))
    documents = characters = 0
    for text, _ in Part(read).pieces():
        if characters >= wanted:
            return {"train": Part(read, documents), "val": Part(read, 0, documents)}
        documents, characters = documents + 1, characters + len(text)
    return split_documents(read, documents, s)


BPE_SAMPLE = 15_000_000


def make_tokenizer(kind, parts, s):
    """The spec of a tokenizer (see Tokenizer), made from the text except for gpt2."""
    if kind == "gpt2":
        return {"kind": kind}
    if kind == "char":
        return character_spec(parts)
    texts, room = [], BPE_SAMPLE
    for text, _ in parts["train"].pieces():
        start = text.encode()[:room]
        texts.append(start.decode("utf-8", "ignore"))
        room -= len(start)
        if not room:
            break
    spec = train_sentencepiece(texts, s.vocab_size) if kind == "sentencepiece" else \
        bpe_spec(train_bpe(texts, s.vocab_size))
    if (size := len(spec["ranks"]) + 1) < s.vocab_size:
        print(f"only {size:,} tokens, not {s.vocab_size:,}: no pair left to merge")
    return spec


def train_sentencepiece(texts, vocab_size):
    """The spec of a SentencePiece BPE. It writes rare characters in bytes, so no text needs its
    unknown token, <|endoftext|>. Every text comes back, but U+2581 becomes a space."""
    model = io.BytesIO()
    pieces = (part for text in texts for part in safe_pieces(text, 1000))  # 4,192 bytes at most
    with one_line("SentencePiece fails", ": pip install sentencepiece, or raise --vocab_size"):
        import sentencepiece
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=pieces, model_writer=model, model_type="bpe", vocab_size=vocab_size,
            byte_fallback=True, required_chars="▁", normalization_rule_name="identity",
            add_dummy_prefix=False, remove_extra_whitespaces=False, hard_vocab_limit=False,
            unk_id=256, bos_id=-1, eos_id=-1, num_threads=1, minloglevel=2)
        learned = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    names = learned.id_to_piece([*range(257, len(learned))])
    return bpe_spec((name.replace("▁", " ").encode(), b"") for name in names) | {
        "kind": "sentencepiece", "model": model.getvalue().decode("latin-1")}


def character_spec(parts):
    alphabet, documents = set(), 0
    for text, begins in itertools.chain(*(part.pieces() for part in parts.values())):
        alphabet.update(text)
        documents += begins
    alphabet |= {"\n"} if documents > len(parts) else set()
    if len(alphabet) > 65_536:
        raise UserError(f"{len(alphabet):,} distinct characters: use --tokenizer=bpe")
    return {"kind": "char", "alphabet": "".join(sorted(alphabet))}


def encode_array(tokenizer, text):
    """str -> (n,) uint16 ids: those of encode, but a run of more than LONGEST characters without a
    break is cut there, because tiktoken's regular expression fails on a million spaces. Nothing is
    lost: decoding gives the same bytes."""
    if tokenizer.spec["kind"] == "char":
        return np.fromiter(map(tokenizer.ids.get, text), np.uint16, len(text))
    ids = [tokenizer.encode(piece) if tokenizer.spec["kind"] == "sentencepiece" else
           tokenizer.encoding.encode_to_numpy(piece, disallowed_special=())
           for piece in safe_pieces(text, LONGEST)]
    return np.concatenate(ids).astype(np.uint16)


LONGEST = 100_000
# GPT-2's pattern always cuts before a space or line break that a visible character follows: the ids
# of the two sides are those of the whole. (?r) searches backwards
SAFE_CUT = regex.compile(r"(?r)[ \n](?=\S)")


def safe_cut(text, begin, end):
    """The last place inside text[begin:end] where a cut changes no ids; `end` if there is none."""
    found = SAFE_CUT.search(text, begin, end)
    return found.start() if found and found.start() > begin else end


def safe_pieces(text, size):
    begin = 0
    while len(text) - begin > size:
        end = safe_cut(text, begin, begin + size)
        yield text[begin:end]
        begin = end
    yield text[begin:]


def separator(tokenizer):
    """(n,) uint16: the ids before each document: <|endoftext|>, or a blank line for characters."""
    return np.array(tokenizer.document_start * (2 if tokenizer.eot is None else 1), np.uint16)


def new_split(tokenizer):
    """The state of a split: what is written, and where to continue, `used` ids after the beginning
    of the batch at `position`. No blank line stands before the first text of characters."""
    skip = len(separator(tokenizer)) if tokenizer.eot is None else 0
    return dict(shards=0, tokens=0, documents=int(skip > 0), finished=False, position=None,
                used=skip)


def encoded(batches, tokenizer):
    """Encodes batches on all cores. Yields (position, (n,) uint16 ids with a separator before each
    document, (d,) int64 where those begin)."""
    before = separator(tokenizer)

    def encode(pieces):
        arrays, starts, length = [], [], 0
        for text, begins in pieces:
            if begins:
                starts.append(length)
                arrays.append(before)
            arrays.append(encode_array(tokenizer, text))
            length += len(arrays[-1]) + begins * len(before)
        return np.concatenate(arrays), np.array(starts, np.int64)

    workers = os.cpu_count() or 1
    with ThreadPoolExecutor(workers) as pool:
        waiting = collections.deque()
        for position, pieces in batches:
            waiting.append((position, pool.submit(encode, pieces)))
            if len(waiting) > 2 * workers:
                position, result = waiting.popleft()
                yield position, *result.result()
        for position, result in waiting:
            yield position, *result.result()


def write_split(s, path, part, tokenizer, at, save):
    """Writes the shards <path>_000001.bin .. of a part, from where `at` says; save() keeps it."""
    end = np.array([] if tokenizer.eot is None else [tokenizer.eot], np.uint16)
    is_train = path.endswith("train")
    limit = s.max_tokens - len(end) if is_train and s.max_tokens else sys.maxsize
    source = encoded(part.batches(at["position"]), tokenizer)
    batch = None if at["finished"] else next(source, None)

    def shard():
        """The ids of the next shard; `at` follows, and in the end says what comes after."""
        nonlocal batch
        shard_end = min(at["tokens"] + s.shard_tokens, limit)
        while batch:
            position, ids, starts = batch
            used = at["used"]
            if used >= len(ids):
                batch = next(source, None)
                at.update(position=batch and batch[0], used=used - len(ids))
                continue
            piece = ids[used:used + shard_end - at["tokens"]]
            if not len(piece):
                break
            yield piece
            at["documents"] += int(((starts >= used) & (starts < used + len(piece))).sum())
            at.update(tokens=at["tokens"] + len(piece), used=used + len(piece))
            bar.update(len(piece))
        at["finished"] = not batch or at["tokens"] >= limit
        if at["finished"]:
            yield end

    total = limit if limit < sys.maxsize else None
    with contextlib.closing(source), tqdm(desc=path[-5:], unit=" tokens", unit_scale=True,
                                          total=total, initial=at["tokens"], disable=None) as bar:
        while not at["finished"]:
            # llm.c's numbers: validation is 0, training 1, 2, ...
            write_shard(f"{path}_{at['shards'] + is_train:06d}.bin", shard())
            at["shards"] += 1
            save()  # after the shard: if a kill comes between, it is written again


def write_shard(path, tokens):
    """Writes a shard in llm.c's format, atomically. tokens: ids below 65,536, or arrays of them,
    which need not fit into memory together."""
    def write(file):
        header = np.zeros(256, "<i4")
        file.write(header.tobytes())
        for piece in tokens:
            file.write(np.ascontiguousarray(piece, dtype="<u2").data)
        header[:3] = 20240520, 1, (file.tell() - header.nbytes) // 2
        file.seek(0)
        file.write(header.tobytes())
    write_atomically(path, write)


def describe(folder, name, tokenizer, splits):
    shards, meta = {}, {"dataset": name, "tokenizer": tokenizer.spec}
    for split, paths in shard_paths(folder).items():
        shards[split] = [read_shard(path) for path in paths if path.stat().st_size > 1024]
        counts = np.zeros(tokenizer.vocab_size, np.int64)
        for ids in overlapping(shards[split], 0):
            counts += np.bincount(ids, minlength=len(counts))
        tokens = int(counts.sum())
        if tokens < 4:
            for path in [*folder.glob("*.bin"), folder / PROGRESS]:
                path.unlink(missing_ok=True)  # a longer text may then use the folder
            raise UserError(f"{name} is too short: its {split} split has {tokens} tokens")
        meta[split] = {"tokens": tokens, "documents": splits[split]["documents"],
                       "bytes": int(counts @ tokenizer.token_bytes())}
    return meta | {"landmarks": baselines(shards["train"], shards["val"], tokenizer.vocab_size)}


def baselines(train, val, vocab_size):
    """Validation losses of models that only count, in nats per token; train, val: lists of (n,)
    ids. Unseen tokens count once, unseen pairs by frequency (Witten & Bell 1991, method C)."""
    counts = np.ones(vocab_size, np.int64)
    pairs = np.zeros(vocab_size**2 if vocab_size <= 10_000 else 0, np.uint32)  # at most 400 MB
    for number, ids in enumerate(overlapping(train)):
        counts += np.bincount(ids[number > 0:], minlength=vocab_size)
        if len(pairs):
            np.add.at(pairs, ids[:-1] * vocab_size + ids[1:], np.uint32(1))
    unigram = counts / counts.sum()  # (V,)
    table = pairs.reshape(-1, vocab_size)  # (V, V)
    follow = table.sum(1, np.int64)  # (V,)
    kinds = np.maximum(np.count_nonzero(table, 1), 1)  # (V,)
    targets, nats = 0, collections.Counter()
    for ids in overlapping(val):
        first, second = ids[:-1], ids[1:]
        targets += len(second)
        nats["unigram"] -= np.log(unigram[second]).sum()
        if len(pairs):
            likely = table[first, second] + kinds[first] * unigram[second]
            nats["bigram"] -= np.log(likely / (follow[first] + kinds[first])).sum()
    return {"uniform": math.log(vocab_size)} | {
        name: float(value / targets) for name, value in nats.items()}


def overlapping(shards, overlap=1):
    """Yields (n,) int64 ids, each time beginning with the last one before: no pair is lost."""
    last = np.zeros(0, np.int64)
    for shard in shards:
        for begin in range(0, len(shard), PIECE):
            ids = np.concatenate([last, shard[begin:begin + PIECE]])
            yield ids
            last = ids[len(ids) - overlap:]


def finish(folder, meta, settings):
    # Before meta.json: no later run cleans a complete folder
    for path in folder.glob(".*.tmp"):
        path.unlink(missing_ok=True)
    write_text(folder / "meta.json", json.dumps(meta | {"settings": settings}) + "\n")
    (folder / PROGRESS).unlink(missing_ok=True)
    for split in ("train", "val"):
        m = meta[split]
        print(f"{split}: {m['documents']:,} documents, {m['tokens']:,} tokens, "
              f"{m['bytes'] / m['tokens']:.2f} bytes per token")
    values = meta["landmarks"] | {"entropy_floor": meta.get("entropy_floor")}
    print(f"{meta['tokenizer']['kind']} tokenizer; baselines in nats per token: "
          + ", ".join(f"{name} {value:.4f}" for name, value in values.items() if value))
    where = folder.as_posix()
    presets = [preset for preset, change in PRESETS.items() if change.get("data_dir") == where]
    options = f" --preset={' or '.join(presets)}" if presets else ""
    if not presets and where != "data/stories":
        own = f"--data_dir={folder}", f"--out_dir=out/{folder.name}", "--rows=stream"
        options = " " + shlex.join(own)
    print(f"written to {folder}; now: python train_gpt2.py{options}")


# ---- Sources ----
# A reader yields (where, text, begins): documents in order, long ones in pieces. A reader can begin
# again from `where`, plain data. `begins` marks a document's first piece; text can be "" or None.

SHAKESPEARE_URL = (
    "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt")
HUB = {"fineweb_edu": ("HuggingFaceFW/fineweb-edu", "sample-10BT"),
       "tinystories": ("roneneldan/TinyStories", None)}
OURS = ["stories", *USUAL, "hellaswag"]
KINDS = {".jsonl": "lines", ".ndjson": "lines", ".jsonlines": "lines", ".parquet": "rows"} | \
    dict.fromkeys((".json", ".csv", ".tsv", ".tar", ".zip", ".zst", ".pdf", ".docx"), "unknown")
PACKED = {".gz": "gzip", ".bz2": "bz2", ".xz": "lzma"}
ROWS = 256


def read_files(read, files, column, where=None):
    start, first = where or (0, 0)
    for number, file in enumerate(files[start:], start):
        for place, text, begins in read(file, column, first):
            yield (number, place), text, begins
        first = 0


def read_string(text, column, place):
    yield 0, text, True


def read_text(path, column, offset):
    """A UTF-8 file is one document, byte for byte. A piece depends only on the byte where it
    begins, so a resumed run finds the same ones."""
    with one_line(f"cannot read {path}"), open_file(path, offset) as file:
        data, is_last = b"", False
        while not is_last:
            data += file.read(PIECE - len(data))
            is_last = len(data) < PIECE
            try:
                text, _ = codecs.utf_8_decode(data, "strict", is_last)
            except UnicodeDecodeError as error:
                raise UserError(f"{path} is not UTF-8 text: {data[error.start]:#04x} at byte "
                                f"{offset + error.start:,}; convert it with iconv") from None
            if not is_last:
                text = text[:safe_cut(text, 0, len(text))]
            if text:
                yield offset, text, offset == 0
            size = len(text.encode("utf-8"))
            offset, data = offset + size, data[size:]


def read_lines(path, column, offset):
    with one_line(f"cannot read {path}"), open_file(path, offset) as file:
        for number, line in enumerate(file, 1):
            if not line.isspace():
                yield offset, text_in(line, column, f"{path}, line {number}"), True
            offset += len(line)


def text_in(line, column, place):
    """The text in a line of JSON, None if there is none. Raises UserError if it is not JSON."""
    with one_line(f"{place}, is not JSON in UTF-8"):
        # A byte-order mark may stand first. float: Python refuses an int of 4,301 digits
        row = json.loads(line.decode("utf-8-sig"), parse_int=float)
    text = row.get(column) if isinstance(row, dict) else None
    if not isinstance(text, str):
        return None
    if b"\\u" in line:  # an escape can be half of a surrogate pair, which is not a character
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def read_parquet(path, column, first):
    from pyarrow.parquet import ParquetFile

    # A megabyte at a time: by itself the library reads a gigabyte ahead
    with one_line(f"cannot read {path}"), \
            ParquetFile(path, pre_buffer=False, buffer_size=PIECE) as file:
        check_column(file.schema_arrow, column)
        tables = file.iter_batches(ROWS, columns=[column])
        for row, value in enumerate(value for table in tables for value in table.column(0)):
            if row >= first:
                yield row, text_of(value, f"{path}, row {row + 1}"), True


def read_hub(source, column, where):
    """Streams a split of a data set on the hub, (repository, configuration, split); where = (state
    of the library's stream, row after that)."""
    state, first = where or (None, 0)
    with one_line(f"cannot read {source[0]} from the hub"):
        rows = open_hub(*source).with_format("arrow")
        if state:
            rows.load_state_dict(state)
        for table in rows.iter(batch_size=ROWS):
            check_column(table.schema, column)
            for row, value in enumerate(table[column]):
                if row >= first:
                    yield (state, row), text_of(value, source[0]), True
            # Only now: before that, the library does not return the state it was given
            state, first = rows.state_dict(), 0


def check_column(schema, column):
    kind = " and ".join(str(field.type) for field in schema if field.name == column) or "missing"
    if not re.fullmatch(r"(dictionary<values=)?(large_)?(string|binary)(_view)?(,.*)?|null", kind):
        raise UserError(f"the column {column!r} is {kind}: choose one column of text as "
                        f"--text_column, from {', '.join(schema.names)}")


def text_of(value, place):
    try:
        text = value.as_py()
        return text.decode("utf-8") if isinstance(text, bytes) else text
    except UnicodeDecodeError:
        raise UserError(f"{place}, has text that is not UTF-8") from None


def is_pattern(path):  # a file that exists is one file, even with brackets in its name
    return glob.has_magic(path) and not os.path.exists(path)


def unpacked(path):
    stem, suffix = os.path.splitext(path)
    return stem if suffix.lower() in PACKED else path


def file_kind(path):
    return KINDS.get(os.path.splitext(unpacked(path))[1].lower(), "text")


def find_files(dataset):
    """The files that a path or pattern names; [] for a data set that is not files."""
    if dataset in OURS or re.fullmatch(r"hf:[\w.-]+/[\w.-]+(:.+)?", dataset):
        return []
    paths = sorted(glob.glob(dataset, recursive=True)) if is_pattern(dataset) else [dataset]
    for path in paths or [dataset]:
        if not os.path.isfile(path):
            near = get_close_matches(dataset, [*OURS, *OPENAI_NAMES], 1)
            what = "a folder" if os.path.isdir(path) else \
                "not a file" if os.path.exists(path) else \
                f"no such file{', did you mean ' * len(near)}{''.join(near)}"
            raise UserError(f"cannot read {path} ({what}): name files, hf:OWNER/NAME, or one of "
                            f"{', '.join(OURS)}")
    kinds = {file_kind(path) for path in paths}
    if len(kinds) > 1 or "unknown" in kinds:
        raise UserError(f"{dataset} must be files of one kind: .txt, .parquet, or .jsonl with an "
                        "object per line (text also as .gz, .bz2, .xz)")
    return paths


def open_file(path, offset):
    """Open a file of bytes, decompressed, `offset` bytes after its beginning."""
    name = PACKED.get(os.path.splitext(path)[1].lower(), "io")
    file = importlib.import_module(name).open(path, "rb")
    file.seek(offset)
    return file


def checksum(path):
    value = 0
    with one_line(f"cannot read {path}"), open(path, "rb") as file:
        while data := file.read(PIECE):
            value = zlib.crc32(data, value)
    return value


def download(url):
    import requests
    with one_line(f"cannot download {url}"):
        answer = requests.get(url, timeout=30)
        answer.raise_for_status()
        return answer.content.decode("utf-8")


def quiet_datasets():
    import datasets
    import huggingface_hub
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    huggingface_hub.logging.set_verbosity_error()
    return datasets


def open_hub(repository, config, split):
    return quiet_datasets().load_dataset(repository, config, split=split, streaming=True)


def write_hellaswag(s):
    """HellaSwag's validation questions (Zellers et al. 2019), a JSON object per line."""
    if HELLASWAG.exists() or s.out_dir:
        raise UserError(f"hellaswag writes {HELLASWAG}: remove it, or leave out --out_dir")
    with one_line("cannot read HellaSwag from the hub"):
        lines = [json.dumps({key: row[key] for key in ("ctx", "endings", "label")}) + "\n"
                 for row in open_hub("Rowan/hellaswag", None, "validation")]
    make_folder(HELLASWAG.parent)
    write_text(HELLASWAG, "".join(lines))
    print(f"{len(lines):,} questions written to {HELLASWAG}, for runs with GPT-2's tokens")


# ---- The BPE trainer ----

BYTES = [bytes([byte]) for byte in range(256)]
NO_TOKEN = 255  # a byte that is not in UTF-8: between words, and where a merge took a token out


def train_bpe(texts, vocab_size):
    """Learns a byte-level BPE (Sennrich et al. 2016, section 3.2; GPT-2 paper, section 2.2).

    texts: an iterable of str. vocab_size counts 256 bytes, the merges and <|endoftext|>. Returns
    the merges in order, [(bytes, bytes), ...]. With words as lists of bytes, they are those of

        while len(merges) < vocab_size - 257:
            counts = Counter(pair for word in words for pair in zip(word, word[1:]))
            best = max(counts, key=lambda pair: (counts[pair], pair))  # a tie: the greater bytes
            merges.append(best)
            words = [merged(word, best) for word in words]

    It is faster: equal words are counted together, a merge visits only the places of its pair, and
    pairs wait in a list for each count. One whose count fell moves on when its list is `top`."""
    if not 257 <= vocab_size <= 65_536:
        raise UserError(f"vocab_size is {vocab_size:,}: it must be from 257 to 65,536")
    corpus = Corpus(count_words(texts))
    tokens = [*BYTES]
    counts, merges, top, heap = corpus.count(), [], [], []
    waiting = {0: []}

    def names(pair):
        return tokens[pair >> 16], tokens[pair & 65_535]

    def wait(pair):
        if (count := counts[pair]) not in waiting:
            waiting[count] = []
            heapq.heappush(heap, -count)  # the smallest comes first
        waiting[count].append(pair)

    for pair in counts:
        wait(pair)
    with tqdm(total=vocab_size - 257, desc="merges", disable=None) as bar:
        while len(merges) < vocab_size - 257 and (top or heap):
            if not top:
                most = -heapq.heappop(heap)
                top = sorted(waiting.pop(most), key=names)
            pair = top.pop()
            if counts[pair] < most:
                wait(pair)
                continue
            merges.append(names(pair))
            tokens.append(b"".join(names(pair)))
            for made, gone, count in corpus.merge(pair, len(tokens) - 1):
                counts[gone] -= count
                counts[made] = count  # all of it: from now on it can only fall
                if count == most:
                    bisect.insort(top, made, key=names)
                else:
                    wait(made)
            bar.update()
    return merges


class Corpus:
    """Distinct words as one row of tokens; a pair of tokens is left << 16 | right."""

    def __init__(self, words):
        row = "\udcff".join(["", *words, ""]).encode("utf-8", "surrogateescape")  # between: 255
        self.token = np.frombuffer(row, np.uint8).astype(np.uint16)
        sizes = np.diff(np.flatnonzero(self.token == NO_TOKEN), prepend=-1)
        self.weight = np.repeat([1, *words.values()], sizes)
        self.after = np.arange(1, len(row) + 1, dtype=np.int32)  # the next token's place
        self.before = self.after - 2
        self.where = {}  # a pair's newer token, 255 for two bytes: (sorted pairs, their places)

    def count(self):
        """{pair of bytes: its count}"""
        first, last = self.token[:-1], self.token[1:]
        places = np.flatnonzero((first != NO_TOKEN) & (last != NO_TOKEN)).astype(np.int32)
        places = places[np.argsort(first[places] << 8 | last[places], kind="stable")]
        pairs, counts = self.add(255, join(first[places], last[places]), places)
        return dict(zip(pairs.tolist(), counts.tolist(), strict=True))

    def add(self, newer, pairs, places):
        """Keeps sorted pairs and their places. Returns the distinct pairs and their counts."""
        self.where[newer] = pairs, places
        begins = np.flatnonzero(np.append(True, pairs[1:] != pairs[:-1])[:len(pairs)])
        return pairs[begins], np.add.reduceat(self.weight[places], begins)

    def merge(self, pair, new):
        """Makes a pair the token `new`. Yields (pair that appears, pair it replaces, count)."""
        left, right = pair >> 16, pair & 65_535
        pairs, places = self.where[max(left, right, 255)]
        places = places[slice(*np.searchsorted(pairs, np.array([pair, pair + 1], np.uint32)))]
        places = places[(self.token[places] == left) & (self.token[self.after[places]] == right)]
        if left == right:  # in a run of one token, every other place begins a pair
            number = np.arange(len(places))
            follows = np.append(False, self.before[places[1:]] == places[:-1])
            begin = np.maximum.accumulate(np.where(follows, 0, number))
            places = places[(number - begin) % 2 == 0]
        second = self.after[places]
        before, after = self.before[places], self.after[second]
        self.token[places], self.token[second] = new, NO_TOKEN
        self.after[places], self.before[after] = after, places
        first, last = self.token[before], self.token[after]
        ahead, behind = first != NO_TOKEN, last != NO_TOKEN
        first, last = first[ahead], last[behind]
        # Sorted by the other token, of 16 bits, which numpy does in linear time
        order = np.append(np.argsort(first, kind="stable"),
                          np.argsort(last, kind="stable") + len(first))
        pairs = np.append(join(first, new), join(new, last))[order]
        pairs, counts = self.add(new, pairs, np.append(before[ahead], places[behind])[order])
        first, last = pairs >> 16, pairs & 65_535
        # What stands before `new` stood before `left`, what follows it followed `right`
        gone = join(np.where(first == new, right, first), np.where(last == new, left, last))
        return zip(pairs.tolist(), gone.tolist(), counts.tolist(), strict=True)


def join(left, right):
    return np.left_shift(left, 16, dtype=np.uint32) | np.uint32(right)


def count_words(texts):
    """{word: how often it occurs}; words are what GPT-2's pattern finds."""
    words, pattern = collections.Counter(), regex.compile(SPLIT_PATTERN)
    for text in texts:
        for piece in safe_pieces(text, PIECE):  # saves memory
            words.update(pattern.findall(piece))
    return words


def bpe_spec(merges):
    tokens = [*BYTES, *(left + right for left, right in merges)]
    return {"kind": "bpe", "ranks": [token.decode("latin-1") for token in tokens]}


# ---- Weights of OpenAI and transformers -> a checkpoint ----

# transformers stores these as Conv1D does, (in, out); nn.Linear stores (out, in)
TRANSPOSED = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
ACTIVATIONS = {"gelu_new": "gelu", "gelu_pytorch_tanh": "gelu", "relu": "relu"}
FIXED = dict(model_type="gpt2", layer_norm_epsilon=1e-5, scale_attn_weights=True,
             scale_attn_by_inverse_layer_idx=False, tie_word_embeddings=True,
             add_cross_attention=False)
GPT2_TOKENS = "e424375bafc3"


def convert_weights(name, out_dir=""):
    """Writes a GPT-2 as a checkpoint at step 0 and returns its path: out/openai-<name>/best.pt for
    one of OpenAI's models, downloaded if it is not cached; out/<its name>/best.pt for a folder that
    transformers wrote. Nothing in it is executed. Raises UserError for anything but a GPT-2."""
    path = Path(out_dir, "best.pt") if out_dir else converted_path(name)
    if path.exists():
        print(f"{path} is there already")
        return path
    folder = Path(name) if os.path.isdir(name) else download_model(name)
    with one_line(f"{folder} holds no GPT-2 that can be converted"):
        config, settings = read_config(folder / "config.json")
        with torch.device("meta"):
            model = GPT(GPTConfig(**config))
        weights = read_weights(folder, model)
    checkpoint = make_checkpoint(model, settings=settings) | {
        "model": weights, "tokenizer": read_tokenizer(folder, config["vocab_size"])}
    make_folder(path.parent)
    write_atomically(path, lambda file: torch.save(checkpoint, file))
    print(f"written to {path}; now: python sample.py {shlex.quote(f'--checkpoint={path}')}")
    return path


def weight_file():
    found = importlib.util.find_spec("safetensors")
    return "model.safetensors" if found else "pytorch_model.bin"


def download_model(name):
    import huggingface_hub as hub
    hub.logging.set_verbosity_error()
    with one_line(f"{name} cannot be downloaded", ": name a folder that holds it"):
        return Path(hub.snapshot_download(f"openai-community/{name}", allow_patterns=[
            "config.json", "vocab.json", "merges.txt", weight_file()]))


def read_config(path):
    """(config for GPTConfig, settings) from a config.json; ValueError if it is not GPT-2's."""
    theirs = json.loads(path.read_bytes())
    config = {key: theirs[key] for key in ("vocab_size", "n_layer", "n_head", "n_embd")}
    wrong = [key for key, value in FIXED.items() if theirs.get(key, value) != value]
    if wrong:
        raise ValueError(f"it differs in {', '.join(wrong)}")
    config["activation"] = ACTIVATIONS[theirs.get("activation_function", "gelu_new")]
    config["block_size"] = theirs["n_positions"]
    return config, {"rows": "documents"} if theirs.get("starts_documents") is True else {}


def read_weights(folder, model):
    """{name: float32 tensor}, named and turned as our model has them. Before memory is taken for a
    tensor, a model on the "meta" device has checked its shape. Raises ValueError, or whatever a
    library raises, for anything else."""
    paths = sorted(folder.glob("model*.safetensors"))
    if paths and weight_file() == "model.safetensors":
        from safetensors.torch import load_file
        found = {name: tensor for path in paths for name, tensor in load_file(path).items()}
    else:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = torch.load(folder / "pytorch_model.bin", "cpu", weights_only=True)
    weights = {f"transformer.{name.removeprefix('transformer.')}":
               tensor.t() if name.endswith(TRANSPOSED) else tensor
               for name, tensor in found.items()
               if not name.endswith((".attn.bias", ".attn.masked_bias"))}
    embedding = weights["transformer.wte.weight"]
    head = weights.pop("transformer.lm_head.weight", embedding)
    model.load_state_dict(weights, assign=True)
    if not torch.equal(head, embedding):
        raise ValueError("its output matrix is not its embedding")
    if not all(tensor.isfinite().all() for tensor in weights.values()):
        raise ValueError("weights are not finite")
    return {name: tensor.float().contiguous() for name, tensor in weights.items()}


def read_tokenizer(folder, vocab_size):
    """The spec of the tokenizer in a folder: a byte-level BPE whose ids are in the order of its
    merges, <|endoftext|> last. {} if there is none, or one of another kind or size."""
    if not any((folder / name).exists() for name in ("vocab.json", "tokenizer.json")):
        return {"kind": "gpt2"} if vocab_size == 50257 else {}
    with contextlib.suppress(Exception):  # a damaged tokenizer is none
        plain = True
        if (folder / "vocab.json").exists():
            vocabulary = json.loads((folder / "vocab.json").read_bytes())
            merges = (folder / "merges.txt").read_text(encoding="utf-8").splitlines()[1:]
        else:
            whole = json.loads((folder / "tokenizer.json").read_bytes())
            vocabulary, merges = whole["model"]["vocab"], whole["model"]["merges"]
            words = whole["pre_tokenizer"]
            plain = (not whole["normalizer"] and words["type"] == "ByteLevel" and
                     not words["add_prefix_space"] and words.get("use_regex", True))
        *names, last = sorted(vocabulary, key=vocabulary.get)
        merged = ["".join(merge).replace(" ", "") for merge in merges]
        # Printable bytes stand for themselves, characters from number 256 on for the others
        shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
        hidden = [byte for byte in range(256) if byte not in shown]
        byte_of = dict(zip(map(chr, [*shown, *range(256, 324)]), [*shown, *hidden], strict=True))
        tokens = [bytes(byte_of[character] for character in name) for name in names]
        if (plain and last == END_OF_TEXT and merged == [name for name in names if len(name) > 1]
                and sorted(vocabulary.values()) == list(range(vocab_size))
                and len(names) - len(merged) == 256):
            if hashlib.sha256(b"\n".join(tokens)).hexdigest().startswith(GPT2_TOKENS):
                return {"kind": "gpt2"}
            return {"kind": "bpe", "ranks": [token.decode("latin-1") for token in tokens]}
    return {}


# ---- The embedded stories ----
# A story is a series of choices, each uniform among the options that earlier choices leave, so its
# probability is exactly 1 / (product of the numbers of options): different choices never give the
# same text. A {word} is chosen where it appears first, and recalled after that

STORIES = 12_000  # 1,200 for validation; a short run would not notice more

HEROES = dict.fromkeys("Lily Mia Anna Zoe Ruby Nora Ella Ivy".split(), "girl") | \
    dict.fromkeys("Tom Ben Max Sam Leo Jack Finn Otto".split(), "boy")
TRAITS = "brave shy clever sleepy curious stubborn cheerful clumsy".split()
PLACES = ("by the sea, near the old mill, under a green hill, at the edge of the forest, on a tiny "
          "island, above the bakery, behind the station, next to the zoo, in a tall tower, on a "
          "red boat, beside the river, in a windy village").split(", ")
THINGS = ("kite drum lantern robot puppet trumpet sword dragon balloon basket map train whistle "
          "coat clock snail").split()
TROUBLES = {trouble: fixes.split(", ") for trouble, fixes in (line.split(": ") for line in """\
the wind blew it into a tree: climbed up to get it, shook the branches until it fell, asked a \
squirrel to fetch it
it fell down a deep well: let down a bucket on a rope, asked a frog to bring it back, filled the \
well to the top
a crow flew away with it: gave the crow some cheese for it, followed the crow to its nest, sang \
until the crow came back
it slipped into the pond: waded in up to the chin, pulled it out with a net, paid a duck to dive \
for it
a grumpy troll took it: made the troll laugh, offered the troll a warm pie, beat the troll at chess
it broke in two: mended it with glue, tied it together with string, carried it to the blacksmith
a goat began to eat it: scolded the goat, gave the goat a hat instead, tickled the goat behind the \
ears
it rolled under the palace: dug a tunnel, asked the queen for help, sent in a very small mouse\
""".splitlines())}
FEELINGS = ("cried for an hour, stamped on the ground, went very quiet, wanted to give up, could "
            "not believe it, asked the moon for help").split(", ")
GAMES = "danced, sang, laughed, ate pancakes, told jokes, played cards".split(", ")

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
PRONOUNS = {"girl": dict(child="girl", he="she", his="her", him="her"),
            "boy": dict(child="boy", he="he", his="his", him="him")}


def options(slot, known):
    """What a {slot} may become, given what is known so far: a list of equally likely entries."""
    if slot in PRONOUNS["girl"]:
        return [PRONOUNS[HEROES[known["hero"]]][slot]]
    if slot == "friend":
        return [name for name in HEROES if name != known["hero"]]
    if slot == "fix":
        return TROUBLES[known["trouble"]]
    return dict(hero=list(HEROES), trait=TRAITS, place=PLACES, thing=THINGS,
                trouble=list(TROUBLES), feeling=FEELINGS, game=GAMES)[slot]


def story(choose):
    """One story as a list of (text, skill, nats). choose(options) returns one of a list. The first
    word of a sentence is a choice, since it shows the wording; so is a {word} where it appears
    first. nats: the sum of ln(number of options) over the choices since the piece before."""
    nats, known, told, pieces = 0.0, {}, set(), []

    def pick(among):
        nonlocal nats
        nats += math.log(len(among))
        return choose(among)

    known["hero"] = pick(list(HEROES))
    for wordings in SENTENCES:
        for i, text in enumerate(regex.findall(r'\{\w+\}|^"|^\w+|[^{]+', pick(wordings))):
            skill, slot = "wording" if i else "choices", text.strip("{}")
            if text != slot:
                if slot not in known:
                    known[slot] = pick(options(slot, known))
                skill, text = "recall" if slot in told else "choices", known[slot]
                told |= {slot, *PRONOUNS["girl"]} if slot == "hero" else {slot}
            pieces.append((text if i or not pieces else " " + text, skill, nats))
            nats = 0.0
    return pieces


def write_stories(seed):
    choose = random.Random(seed).choice
    return [story(choose) for _ in range(STORIES)]


def label(stories, tokenizer):
    """(n,) uint8: the index in SKILLS of each token of a split with these stories. A token has the
    skill of its last character; separators are wording."""
    between, sizes, labels = len(separator(tokenizer)), tokenizer.token_bytes(), []
    for pieces in stories:
        ends = np.cumsum([len(text) for text, _, _ in pieces])
        ids = tokenizer.encode("".join(text for text, _, _ in pieces))
        last = np.cumsum(sizes[ids]) - 1
        skills = np.array([SKILLS.index(skill) for _, skill, _ in pieces], np.uint8)
        labels += [np.zeros(between, np.uint8), skills[np.searchsorted(ends, last, side="right")]]
    if tokenizer.eot is None:
        return np.concatenate(labels[1:])
    return np.concatenate([*labels, np.zeros(1, np.uint8)])


def entropy_floor(s, folder, tokenizer, val):
    """Writes skills.npy, and returns the lowest loss to expect of any model: the sum of -ln p over
    the validation targets (all tokens but the first) by their number, also for each skill."""
    targets, told = val["tokens"] - 1, write_stories(s.seed)[-val["documents"]:]
    write_atomically(folder / "skills.npy", lambda file: np.save(file, label(told, tokenizer)))
    skills = {skill: sum(nats for pieces in told for _, its, nats in pieces if its == skill)
              / targets for skill in SKILLS}
    return {"skills": skills, "entropy_floor": sum(skills.values())}


# ---- The command line ----


@reports_mistakes
def main(argv=None):
    s, _ = parse_settings(Settings, argv, __doc__, bare="dataset")
    check_ranges(s, shard_tokens=(2, 2**31 - 1), max_tokens=(2, 2**63), seed=(0, 2**63),
                 val_fraction=(1e-9, 0.999))
    if s.tokenizer not in ("gpt2", "char"):
        check_ranges(s, vocab_size=(257, 65_536))
    if s.dataset in OPENAI_NAMES or os.path.isfile(os.path.join(s.dataset, "config.json")):
        convert_weights(s.dataset, s.out_dir)
    elif s.dataset == "hellaswag":
        write_hellaswag(s)
    else:
        prepare(s)
    return 0


if __name__ == "__main__":
    try:
        status = main()
    except SystemExit as stop:
        status = stop.code
    # Not sys.exit: pyarrow can abort at the interpreter's end (apache/arrow#45214)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status or 0)
