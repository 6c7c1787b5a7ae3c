"""Turn text into shards of tokens, and published weights into checkpoints, for train_gpt2.py.

    python prepare_data.py                         # the embedded stories, no network needed
    python prepare_data.py my_text.txt             # your own text, with a BPE trained on it
    python prepare_data.py "notes/*.jsonl.gz" --text_column=body --tokenizer=gpt2  # or .parquet
    python prepare_data.py shakespeare             # or tinystories: characters
    python prepare_data.py fineweb_edu --max_tokens=500_000_000  # FineWeb-Edu, GPT-2's tokens
    python prepare_data.py hf:OWNER/NAME:CONFIG    # of the hub
    python prepare_data.py hellaswag
    python prepare_data.py gpt2                    # OpenAI's weights -> out/openai-gpt2/best.pt
    python prepare_data.py model:OWNER/NAME        # another GPT-2 of the hub
    python prepare_data.py my_folder               # of transformers, or nanoGPT's ckpt.pt

A source gives documents, a tokenizer turns them into ids, and these go to shards; meta.json,
written last, describes them. After a stop, the same command continues.
"""
import array
import bisect
import collections
import contextlib
import glob
import hashlib
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
import textwrap
import traceback
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

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
    WithoutInit,
    check_ranges,
    check_shape,
    converted_path,
    load_plain,
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

# The libraries of the hub say what one line of ours says
os.environ |= {"DATASETS_VERBOSITY": "critical", "HF_HUB_VERBOSITY": "error",
               "HF_DATASETS_DISABLE_PROGRESS_BARS": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}


@dataclass
class Settings:
    dataset: str | list = "stories"  # a name from above, or .txt, .jsonl, .parquet files, globs
    tokenizer: Literal["auto", "gpt2", "bpe", "sentencepiece", "char"] = "auto"  # auto: as above
    vocab_size: int = 1024  # of a bpe: bytes, merges and <|endoftext|>
    text_column: str = "text"  # the column of a .jsonl, .parquet or hf: data set with the text
    out_dir: str = ""  # empty: data/<dataset>, plus _<tokenizer> if that is not the usual one
    shard_tokens: int = 100_000_000  # tokens per shard: 200 MB
    max_tokens: int | None = None  # at most this many training tokens; None: all
    val_fraction: float = 0.1  # the last part of the text, kept for validation
    seed: int = 1  # of the stories


# ---- A user's mistakes, in one line each ----

# What the exceptions of Python's and the hub's libraries are called when a network fails
NETWORK = re.compile(r"^[\w.]*(Connect|Timeout|Transport|Proxy|SSL|Offline|gaierror)\w*(:|$)", re.M)


@contextlib.contextmanager
def one_line(what, advice=""):
    """Turns what a library raises over a user's input into one line."""
    try:
        yield
    except (UserError, MemoryError):
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        if NETWORK.search("".join(traceback.format_exception(error))):
            reason = "the network failed; later, the same command goes on"
        raise UserError(f"{what} ({textwrap.shorten(reason, 200)}){advice}") from None


def make_folder(folder):
    with one_line(f"cannot write to {folder}", ": choose another --out_dir"):
        folder.mkdir(parents=True, exist_ok=True)


# ---- Documents: a source, and the part of it that a split gets ----
# A source is a function. source(where) yields (where, (text, begins)): a document, or a long one in
# pieces, of which the first `begins` it. `where` is plain data, 0 at first: source(where) goes on
# with the piece that it stood at.

PIECE = 1 << 20  # characters, bytes or tokens that are processed at a time
ROWS = 256  # rows of a table that are read at a time


class Place(NamedTuple):
    """Where a piece stands in its source, and what of the source and of a part is before it."""

    where: Any = 0
    characters: int = 0
    documents: int = 0


START = Place()


@dataclass
class Part:
    """The characters number `first` to `last` of a source."""

    source: Callable
    first: int = 0
    last: int = sys.maxsize

    def pieces(self, place=START):
        """Yields (place, text, begins). A text may be empty. pieces(place) goes on there."""
        where, characters, documents = place
        for where, (text, begins) in self.source(place[0]):
            if characters >= self.last:
                break
            inside = text[max(0, self.first - characters):self.last - characters]
            if inside or not text and characters >= self.first:
                begins = inside != "" and (begins or characters <= self.first)
                yield Place(where, characters, documents), inside, begins
                documents += begins
            characters += len(text)


def at_hand(read, where):
    """The source of what read() yields, the pieces of a text on this machine. `where` is a number
    of pieces: they are read again, in an eighth (.jsonl) to an eightieth (.txt) of the time of
    encoding them."""
    return itertools.islice(enumerate(read()), where, None)


def read_all(texts, paths, column):
    """Yields (text, begins) of texts, and of files."""
    for text in texts:
        yield text, True
    for path in paths:
        with one_line(f"cannot read {path}"):
            yield from reader_of(path)(path, column)


PACKED = {".gz": "gzip", ".bz2": "bz2", ".xz": "lzma"}


def open_file(path, mode, **how):
    library = importlib.import_module(PACKED.get(Path(path).suffix.lower(), "io"))
    return library.open(path, mode, **how)


# A line of it, whether lines end with \n, \r\n or \r, or a byte-order mark begins the first
MARK = re.compile(rf"(?:\A\ufeff?|(?<=[\r\n])){re.escape(END_OF_TEXT)}(?:\r\n|\r|\n|\Z)")


def read_text(path, column):
    """A UTF-8 file is one document, byte for byte; or several, with lines of <|endoftext|> between
    them."""
    text, begins = "", True
    with open_file(path, "rt", encoding="utf-8", newline="") as file:
        while more := read_more(file, path):
            text += more
            if END_OF_TEXT in text:
                *documents, text = MARK.split(text)
                for document in documents:
                    if document:
                        yield document.removesuffix("\n").removesuffix("\r"), begins
                    begins = True
            if len(text) > LONGEST:
                cut = safe_cut(text, 0, len(text) - 2)  # not in a line break before a mark
                yield text[:cut], begins
                text, begins = text[cut:], False
    if text:
        yield text, begins


def read_more(file, path):
    """The next LONGEST characters of a text file, and up to so many of the line they end in."""
    try:
        return file.read(LONGEST) + file.readline(LONGEST)
    except UnicodeDecodeError as error:
        place = file.buffer.tell() - len(error.object) + error.start
        raise UserError(f"{path} is not UTF-8 text: {error.object[error.start]:#04x} at byte "
                        f"{place:,}; convert it with iconv") from None


def read_lines(path, column):
    """A line of JSON is a document, "" if it has no such text."""
    with open_file(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if line.isspace():
                continue
            with one_line(f"{path}, line {number}, is not JSON in UTF-8"):
                # A byte-order mark may stand first. float: Python refuses an int of 4,301 digits
                row = json.loads(line.decode("utf-8-sig"), parse_int=float)
            text = ""
            if isinstance(row, dict) and isinstance(row.get(column), str):
                text = row[column]
            if b"\\u" in line:  # an escape can be half of a surrogate pair, which is no character
                text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
            yield text, True


def read_parquet(path, column):
    from pyarrow.parquet import ParquetFile

    # A megabyte at a time: by itself the library reads a gigabyte ahead
    with ParquetFile(path, pre_buffer=False, buffer_size=PIECE) as file:
        check_column(file.schema_arrow, column)
        before = 0
        for table in file.iter_batches(ROWS, columns=[column]):
            found = bytes_in(table.column(0))
            try:
                texts = [data.decode("utf-8") for data in found]
            except UnicodeDecodeError as error:
                row = before + found.index(error.object) + 1
                raise UserError(f"{path}, row {row:,} is not UTF-8 text") from None
            for text in texts:
                yield text, True
            before += len(texts)


def read_hub(name, config, column, split, where):
    """The source of a split of a data set on the hub, which is streamed. where: the state of the
    library's stream, and the row after that."""
    state, first = where or (None, 0)
    with one_line(f"cannot read {name} from the hub", OFFLINE):
        rows = open_hub(name, config, split).with_format("arrow")
        if state:
            rows.load_state_dict(state)
        for table in rows.iter(ROWS):
            check_column(table.schema, column)
            for row, data in enumerate(bytes_in(table[column])):
                if row >= first:
                    yield (state, row), (data.decode("utf-8"), True)
            # Only now: before that, the library does not return the state that it was given
            state, first = rows.state_dict(), 0


def check_column(schema, column):
    kind = " and ".join(str(field.type) for field in schema if field.name == column) or "missing"
    if not re.fullmatch(r"(dictionary<values=)?(large_)?(string|binary)(_view)?(,.*)?|null", kind):
        raise UserError(f"the column {column!r} is {kind}: choose one column of text as "
                        f"--text_column, from {', '.join(schema.names)}")


def bytes_in(column):
    """The texts in a column, whatever Arrow calls its type; b"" where there is none."""
    return column.cast("large_binary").fill_null(b"").to_pylist()


# ---- Which source: the stories, files or the hub ----

OFFLINE = "; a text on this machine needs no network: name its file"
SHAKESPEARE_URL = (
    "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt")
HUB = {"fineweb_edu": ("HuggingFaceFW/fineweb-edu", "sample-10BT"),
       "tinystories": ("roneneldan/TinyStories", None)}
USUAL = {"shakespeare": "char", "tinystories": "char", "fineweb_edu": "gpt2"}  # tokenizers
OURS = ["stories", *USUAL, "hellaswag"]
HUB_NAME = re.compile(r"hf:([\w.-]+/[\w.-]+)(?::(.+))?")
READERS = {".jsonl": read_lines, ".ndjson": read_lines, ".jsonlines": read_lines,
           ".parquet": read_parquet}
READERS |= dict.fromkeys([".json", ".csv", ".tsv", ".tar", ".zip", ".zst", ".pdf", ".docx",
                          ".bin", ".pth", ".ckpt", ".safetensors"])


def unpacked(path):
    path = Path(path)
    return path.with_suffix("") if path.suffix.lower() in PACKED else path


def reader_of(path):
    """The function that reads such a file, None if there is none."""
    return READERS.get(unpacked(path).suffix.lower(), read_text)


def why_no_file(path):
    if os.path.isdir(path):
        return f"a folder: its files are {os.path.join(path, '*.txt')}"
    if os.path.exists(path):
        return "a device, no file"
    near = get_close_matches(path, [*OURS, *OPENAI_NAMES], 1)
    return f"no such file, did you mean {near[0]}" if near else "no such file"


def find_files(words):
    """The files that paths and patterns name; [] for a data set that is not files."""
    if words[0] in OURS or HUB_NAME.fullmatch(words[0]):
        return []
    paths = []
    for word in words:
        if os.path.exists(word):  # one file, even with brackets in its name
            paths.append(word)
        else:
            paths += sorted(glob.glob(word, recursive=True)) or [word]
    for path in paths:
        if not os.path.isfile(path):
            raise UserError(f"cannot read {path} ({why_no_file(path)}): name files, "
                            "hf:OWNER/NAME (a data set of the hub), model:OWNER/NAME (a GPT-2 "
                            f"there), or one of {', '.join(OURS)}")
    readers = {*map(reader_of, paths)}
    if len(readers) > 1 or None in readers:
        raise UserError(f"{' '.join(words)} must be files of one kind: .txt, .parquet, or .jsonl "
                        "with an object per line (text also as .gz, .bz2, .xz); of weights, name "
                        "their folder with config.json, or nanoGPT's ckpt.pt")
    return paths


def checksum(path):
    """A file's name and the sum of its bytes: another content, another sum."""
    value = 0
    with one_line(f"cannot read {path}"), open(path, "rb") as file:
        while data := file.read(PIECE):
            value = zlib.crc32(data, value)
    return f"{Path(path).name} {value:08x}"


def download(url):
    import requests
    with one_line(f"cannot download {url}", OFFLINE):
        answer = requests.get(url, timeout=30)
        answer.raise_for_status()
        return answer.content.decode("utf-8")


def open_hub(repository, config, split):
    import datasets
    return datasets.load_dataset(repository, config, split=split, streaming=True)


def columns_of(path):
    """What columns the first line of a .jsonl has."""
    if reader_of(path) is not read_lines:
        return ""
    with open_file(path, "rb") as file:
        row = json.loads(next(filter(bytes.strip, file), b"0"))
    if not isinstance(row, dict):
        return f"; its first line is no object: {type(row).__name__}"
    kinds = [f"{name} ({type(value).__name__})" for name, value in row.items()]
    return f"; its first line has {', '.join(kinds)}"


def split_source(source, s, paths=(), enough=sys.maxsize):
    """Cuts a source in two between documents, or inside a single one. All is read once, so bad
    input shows early. But a stream that has more than `enough` characters is cut there: its first
    documents are for validation, since its end is far."""
    starts = array.array("q")
    size = marks = 0
    for _, (text, begins) in source(0):
        if begins and text:
            if size >= enough:
                return {"train": Part(source, size), "val": Part(source, 0, size)}
            starts.append(size)
        size += len(text)
        marks += text.count(END_OF_TEXT)
    if not starts:
        raise UserError(f"{s.dataset} holds 0 documents with --text_column={s.text_column}"
                        f"{''.join(map(columns_of, paths[:1]))}")
    if len(starts) > len(paths) > 0 and reader_of(paths[0]) is read_text:
        print(f"lines of {END_OF_TEXT} cut the text into {len(starts):,} documents")
    if marks:
        print(f"note: {END_OF_TEXT} inside of a document stays text ({marks:,} times)")
    cut = int(size * (1 - s.val_fraction))
    if s.dataset == "stories" and s.val_fraction == Settings.val_fraction:
        cut = starts[-HELD_OUT]  # few: stories are all alike, and are measured often
    elif len(starts) > 1:
        cut = min(starts[1:], key=lambda start: abs(start - cut))
    if min(cut, size - cut) < 4:
        raise UserError(f"{s.dataset} is too short: {size} characters")
    return {"train": Part(source, 0, cut), "val": Part(source, cut)}


def open_repository(s):
    """The parts of a data set on the hub: its own validation split, or the first documents, about
    a shard at 4 characters per token."""
    name, config = HUB.get(s.dataset) or HUB_NAME.fullmatch(s.dataset).groups()
    with one_line(f"cannot read {s.dataset} from the hub", OFFLINE):
        import datasets
        splits = datasets.get_dataset_split_names(name, config)
    train = "train" if "train" in splits else splits[0]
    source = partial(read_hub, name, config, s.text_column)
    for split in splits:
        if split.startswith("val") and split != train:
            print(f"train is the split {train}, val the split {split}")
            return {"train": Part(partial(source, train)), "val": Part(partial(source, split))}
    print(f"train and val are two parts of the split {train}")
    wanted = int(min(s.shard_tokens, (s.max_tokens or sys.maxsize) * s.val_fraction))
    return split_source(partial(source, train), s, (), 4 * max(1, wanted))


def open_source(s, paths):
    """{"train": Part, "val": Part}. paths: the files on this machine, if it is files."""
    texts = []
    if s.dataset == "stories":
        texts = [*map(text_of_story, write_stories(s.seed))]
    elif s.dataset == "shakespeare":
        texts = [download(SHAKESPEARE_URL)]
    elif not paths:
        return open_repository(s)
    read = partial(read_all, texts, paths, s.text_column)
    return split_source(partial(at_hand, read), s, paths)


def write_hellaswag(s):
    """HellaSwag's validation questions (Zellers et al. 2019), a JSON object per line."""
    if HELLASWAG.exists() or s.out_dir:
        raise UserError(f"hellaswag writes {HELLASWAG}: remove it, or leave out --out_dir")
    with one_line("cannot read HellaSwag from the hub"):
        rows = open_hub("Rowan/hellaswag", None, "validation")
        lines = [*map(json.dumps, rows.select_columns(["ctx", "endings", "label"])), ""]
    make_folder(HELLASWAG.parent)
    write_text(HELLASWAG, "\n".join(lines))
    print(f"{len(lines) - 1:,} questions written to {HELLASWAG}, for runs with GPT-2's tokens")


# ---- Tokenizers ----

BPE_SAMPLE = 15_000_000  # characters that a BPE learns from
LONGEST = 100_000
# GPT-2's pattern always cuts before a space or line break that a visible character follows: the ids
# of the two sides are those of the whole. (?r) searches backwards
SAFE_CUT = regex.compile(r"(?r)[ \n](?=\S)")


def as_text(tokens):
    """Tokens as a spec keeps them: a character per byte."""
    return [token.decode("latin-1") for token in tokens]


def bpe_spec(merges):
    return {"kind": "bpe", "ranks": as_text([*BYTES, *(left + right for left, right in merges)])}


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


def make_tokenizer(kind, parts, s):
    """The spec of a tokenizer (see Tokenizer), made from the text except for gpt2."""
    if kind == "gpt2":
        return {"kind": kind}
    if kind == "char":
        return character_spec(parts)
    texts = sample_of(parts["train"])
    if kind == "bpe":
        spec = bpe_spec(train_bpe(texts, s.vocab_size))
    else:
        spec = train_sentencepiece(texts, s.vocab_size)
    if (size := len(spec["ranks"]) + 1) < s.vocab_size:
        print(f"only {size:,} tokens, not {s.vocab_size:,}: no pair left to merge")
    return spec


def sample_of(part):
    """The first documents of a part, about BPE_SAMPLE characters."""
    texts, size = [], 0
    for _, text, _ in part.pieces():
        texts.append(text)
        size += len(text)
        if size >= BPE_SAMPLE:
            break
    return texts


def character_spec(parts):
    alphabet = set()
    for part in parts.values():
        for place, text, begins in part.pieces():
            alphabet.update(text)
            if begins and place.documents > 0:
                alphabet.add("\n")  # a blank line stands between two
    if len(alphabet) > 65_536:
        raise UserError(f"{len(alphabet):,} distinct characters: use --tokenizer=bpe")
    return {"kind": "char", "alphabet": "".join(sorted(alphabet))}


def train_sentencepiece(texts, vocab_size):
    """The spec of a SentencePiece BPE. It writes rare characters in bytes, so no text needs its
    unknown token, <|endoftext|>. Every text comes back, but U+2581 becomes a space."""
    model = io.BytesIO()
    # The library takes 4,192 bytes at most
    pieces = itertools.chain.from_iterable(safe_pieces(text, 1000) for text in texts)
    with one_line("SentencePiece fails", ": pip install sentencepiece, or raise --vocab_size"):
        import sentencepiece
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=pieces, model_writer=model, model_type="bpe",
            vocab_size=vocab_size, hard_vocab_limit=False, byte_fallback=True, required_chars="▁",
            normalization_rule_name="identity", add_dummy_prefix=False,
            remove_extra_whitespaces=False, unk_id=256, bos_id=-1, eos_id=-1, num_threads=1,
            minloglevel=2)
        learned = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    tokens = [*BYTES]
    for name in learned.id_to_piece([*range(257, len(learned))]):
        tokens.append(name.replace("▁", " ").encode())
    return {"kind": "sentencepiece", "ranks": as_text(tokens),
            "model": model.getvalue().decode("latin-1")}


def encode_array(tokenizer, text):
    """str -> (n,) uint16 ids: those of encode, but a run of more than LONGEST characters without a
    break is cut there, because tiktoken's regular expression fails on a million spaces. Nothing is
    lost: decoding gives the same bytes."""
    kind = tokenizer.spec["kind"]
    if kind == "char":
        return np.fromiter(map(tokenizer.ids.get, text), np.uint16, len(text))
    encode = tokenizer.encode
    if kind != "sentencepiece":
        encode = partial(tokenizer.encoding.encode_to_numpy, disallowed_special=())
    if len(text) <= LONGEST:
        return encode(text)
    return np.concatenate([*map(encode, safe_pieces(text, LONGEST))])


# ---- Shards ----

BATCH = 100_000  # characters that a thread encodes at a time
NEW = dict(shards=0, place=START, used=0, documents=0, skipped=0)  # a split's state


def separator(tokenizer):
    """The ids before a document: <|endoftext|>, or a blank line between two of characters."""
    return tokenizer.document_start * (2 if tokenizer.eot is None else 1)


def batches(pieces):
    """Lists of pieces, of some BATCH characters each."""
    batch, size = [], 0
    for piece in pieces:
        batch.append(piece)
        size += len(piece[1])
        if size >= BATCH:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def encode_batch(batch, tokenizer):
    """A batch's (n,) uint16 ids, with a separator before each document; where in them documents
    begin; and how many of its texts are empty."""
    texts = [text for _, text, _ in batch]
    whole = all(begins and len(text) <= LONGEST for _, text, begins in batch)
    marked = "".join([END_OF_TEXT + text for text in texts])
    if whole and hasattr(tokenizer, "encoding") and marked.count(END_OF_TEXT) == len(texts):
        # In one call, since threads wait for each other whenever they return to Python
        ids = tokenizer.encoding.encode_to_numpy(marked, allowed_special={END_OF_TEXT})
        return ids.astype(np.uint16), np.flatnonzero(ids == tokenizer.eot), 0
    before = np.array(separator(tokenizer), np.uint16)
    found, starts, size = [], [], 0
    for place, text, begins in batch:
        ids = encode_array(tokenizer, text)
        if begins:
            starts.append(size)
            if place.documents > 0 or tokenizer.eot is not None:
                ids = np.concatenate([before, ids])
        found.append(ids)
        size += len(ids)
    return np.concatenate(found).astype(np.uint16), starts, texts.count("")


def encoded(pieces, tokenizer):
    """Encodes pieces on all cores, some batches ahead. Yields (the place of a batch, its ids, ...)
    in their order."""
    workers = os.cpu_count() or 1
    waiting = collections.deque()
    with ThreadPoolExecutor(workers) as pool:
        for batch in batches(pieces):
            waiting.append((batch[0][0], pool.submit(encode_batch, batch, tokenizer)))
            if len(waiting) > 2 * workers:
                place, result = waiting.popleft()
                yield place, *result.result()
        for place, result in waiting:
            yield place, *result.result()


def write_split(s, path, part, tokenizer, at):
    """Writes the shards <path>_000001.bin .. of a part, from where `at` says: `used` ids after its
    place. Yields after each, when `at` says where the next one begins: nowhere, at the end."""
    number, limit, end = at["shards"], sys.maxsize, []
    if tokenizer.eot is not None:
        end = [tokenizer.eot]
    if path.endswith("train"):
        number += 1  # llm.c's numbers: a validation shard is 0, those for training are 1, 2, ...
        limit = (s.max_tokens or sys.maxsize) - len(end)
    tokens, used = at["shards"] * s.shard_tokens, at["used"]
    waiting, size = [], 0
    pieces = encoded(part.pieces(at["place"]), tokenizer)
    bar = tqdm(desc=path[-5:], unit=" tokens", unit_scale=True, initial=tokens, disable=None)
    with bar, contextlib.closing(pieces):
        for place, ids, starts, empty in pieces:
            fresh = ids[used:used + limit - tokens]
            waiting.append(fresh)
            tokens, used, size = tokens + len(fresh), used + len(fresh), size + len(fresh)
            bar.update(len(fresh))
            while size > s.shard_tokens:
                ids = np.concatenate(waiting)
                waiting, size = [ids[s.shard_tokens:]], size - s.shard_tokens
                write_shard(f"{path}_{number:06d}.bin", ids[:s.shard_tokens])
                number += 1
                at.update(shards=at["shards"] + 1, place=place, used=used - size)
                yield
            at["documents"] = place.documents + bisect.bisect_left(starts, used)
            at["skipped"] += empty
            if tokens == limit:
                break
            used = 0
    waiting.append(np.array(end, np.uint16))
    write_shard(f"{path}_{number:06d}.bin", np.concatenate(waiting))
    at["place"] = None
    yield


def write_shard(path, tokens):
    """Writes a shard in llm.c's format, atomically. tokens: (n,) ids below 65,536."""
    header = np.zeros(256, "<i4")
    header[:3] = 20240520, 1, len(tokens)
    ids = np.asarray(tokens).astype("<u2")
    if not np.array_equal(ids, tokens):
        raise UserError(f"{path} cannot hold ids of 65,536 or more: it has 16 bits for each")
    write_atomically(path, lambda file: file.writelines([header.data, ids.data]))


# ---- meta.json ----

PROGRESS = "unfinished.json"
CHOOSE = ": choose another --out_dir, or remove it"


def overlapping(paths, overlap=1):
    """Yields (n,) int64 ids, each time beginning with the last one before: no pair is lost."""
    last = np.zeros(0, np.int64)
    for path in paths:
        shard = read_shard(path)
        for begin in range(0, len(shard), PIECE):
            ids = np.concatenate([last, shard[begin:begin + PIECE]])
            yield ids
            last = ids[len(ids) - overlap:]


def count_tokens(paths, vocab_size):
    counts = np.zeros(vocab_size, np.int64)
    for ids in overlapping(paths, 0):
        counts += np.bincount(ids, minlength=vocab_size)
    return counts


def count_pairs(paths, vocab_size):
    """(V, V): how often each token follows each"""
    pairs = np.zeros(vocab_size**2, np.uint32)
    for ids in overlapping(paths):
        np.add.at(pairs, ids[:-1] * vocab_size + ids[1:], np.uint32(1))
    return pairs.reshape(vocab_size, vocab_size)


def baselines(train, val, counts):
    """Validation losses of models that only count, in nats per token. train, val: paths of shards;
    counts: of the training tokens. Unseen tokens count once, unseen pairs by frequency (Witten &
    Bell 1991, method C)."""
    unigram = (counts + 1) / (counts + 1).sum()  # (V,)
    nats, targets, has_pairs = collections.Counter(), 0, len(counts) <= 10_000
    if has_pairs:
        pairs = count_pairs(train, len(counts))  # (V, V), at most 400 MB
        follow = pairs.sum(1, np.int64)  # (V,)
        kinds = np.maximum(np.count_nonzero(pairs, 1), 1)  # (V,)
    for ids in overlapping(val):
        first, second = ids[:-1], ids[1:]
        targets += len(second)
        nats["unigram"] -= np.log(unigram[second]).sum()
        if has_pairs:
            likely = pairs[first, second] + kinds[first] * unigram[second]
            nats["bigram"] -= np.log(likely / (follow[first] + kinds[first])).sum()
    means = {name: float(total / max(1, targets)) for name, total in nats.items()}
    return {"uniform": math.log(len(counts))} | means


def describe(folder, name, tokenizer, splits):
    """What meta.json says of the shards."""
    meta, shards = {"dataset": name, "tokenizer": tokenizer.spec}, shard_paths(folder)
    for split, at in splits.items():
        counts = count_tokens(shards[split], tokenizer.vocab_size)
        meta[split] = dict(tokens=int(counts.sum()), documents=at["documents"],
                           bytes=int(counts @ tokenizer.token_bytes()))
        if split == "train":
            train_counts = counts
    meta["landmarks"] = baselines(shards["train"], shards["val"], train_counts)
    return meta


def report(folder, meta):
    for split in ("train", "val"):
        its = meta[split]
        print(f"{split}: {its['documents']:,} documents, {its['tokens']:,} tokens, "
              f"{its['bytes'] / its['tokens']:.2f} bytes per token")
    losses = meta["landmarks"] | {"entropy_floor": meta.get("entropy_floor")}
    shown = [f"{name} {value:.4f}" for name, value in losses.items() if value]
    print(f"{meta['tokenizer']['kind']} tokenizer; baselines in nats per token: "
          f"{', '.join(shown)}")
    where, command = folder.as_posix(), ["python", "train_gpt2.py"]
    presets = [name for name, change in PRESETS.items() if change.get("data_dir") == where]
    if presets:
        command.append(f"--preset={presets[0]}")
    elif where != "data/stories":
        command += [f"--data_dir={folder}", f"--out_dir=out/{folder.name}", "--rows=stream"]
    print(f"written to {folder}; now: {shlex.join(command)}")


# ---- The pipeline: source -> tokenizer -> shards -> meta.json ----


def name_of(words):
    """A data set's name: that of a file without its ending, or of the folder of several."""
    word = words[0]
    name = unpacked(word).stem
    if on_hub := HUB_NAME.fullmatch(word):
        name = Path(on_hub[1]).stem
    elif len(words) > 1 or glob.has_magic(word) and not os.path.exists(word):
        folders = [part for part in Path(word).parent.parts if not glob.has_magic(part)]
        name = Path(*folders).name or "texts"
    name = re.sub(r"[^\w.-]", "_", name)
    if name in OURS and word != name:
        name += "_text"
    return name


def claim(folder, settings):
    """The progress of an unfinished preparation with these settings, or of a new one; None if the
    data set is complete."""
    with one_line(f"cannot use {folder}", CHOOSE):
        names = sorted(os.listdir(folder)) if folder.exists() else []
        record = "meta.json" if "meta.json" in names else PROGRESS
        if record not in names:
            for name in names:
                if not name.endswith(".tmp"):
                    raise UserError(f"{folder} holds something else ({name}){CHOOSE}")
            return {"settings": settings, "tokenizer": None, "splits": {}}
        found = json.loads((folder / record).read_bytes())
        for key, value in settings.items():
            there = found["settings"].get(key)
            if there != value:
                how = "from another text" if key == "dataset" else f"with {key}={there}"
                raise UserError(f"{folder} holds data prepared {how}{CHOOSE}")
    return found if record == PROGRESS else None


def prepare(s):
    """Text to shards. What an earlier, unfinished run has written is kept."""
    words = [s.dataset] if isinstance(s.dataset, str) else s.dataset
    words = [*map(os.path.expanduser, words)]
    s.dataset = " ".join(words)
    paths, name = find_files(words), name_of(words)
    kind, folder = USUAL.get(s.dataset, "bpe"), f"data/{name}"
    if s.tokenizer not in ("auto", kind):
        kind, folder = s.tokenizer, f"{folder}_{s.tokenizer}"
    folder = Path(s.out_dir or folder)
    settings = asdict(s) | {"tokenizer": kind, "dataset": [*map(checksum, paths)] or s.dataset}
    del settings["out_dir"]
    if kind in ("gpt2", "char"):
        del settings["vocab_size"]
    progress, record = claim(folder, settings), folder / PROGRESS
    if progress is None:
        record.unlink(missing_ok=True)
        print(f"{folder} is complete already")
        return
    parts = open_source(s, paths)
    if progress["tokenizer"]:
        print(f"continuing in {folder}")
    else:
        progress["tokenizer"] = make_tokenizer(kind, parts, s)
    tokenizer = Tokenizer(progress["tokenizer"])
    make_folder(folder)
    write_text(record, json.dumps(progress))
    for split, part in parts.items():
        at = progress["splits"].setdefault(split, NEW | {})
        if at["place"]:
            for _ in write_split(s, f"{folder / name}_{split}", part, tokenizer, at):
                # After the shard: if a kill comes between, it is written again
                write_text(record, json.dumps(progress))
    meta = describe(folder, name, tokenizer, progress["splits"])
    if s.dataset == "stories":
        meta |= entropy_floor(s, folder, tokenizer, meta["val"])
    # Before meta.json: no later run cleans a complete folder
    for path in folder.glob(".*.tmp"):
        path.unlink(missing_ok=True)
    write_text(folder / "meta.json", json.dumps(meta | {"settings": settings}) + "\n")
    record.unlink(missing_ok=True)
    report(folder, meta)
    skipped = sum(at["skipped"] for at in progress["splits"].values())
    if skipped:
        print(f'{skipped:,} rows without "{s.text_column}" skipped')


# ---- The BPE trainer ----

BYTES = [bytes([byte]) for byte in range(256)]
NO_TOKEN = 255  # a byte that is not in UTF-8: between words, and where a merge took a token out
SHIFT = 65_536  # a pair of tokens is one number, left * SHIFT + right


def train_bpe(texts, vocab_size):
    """Learns a byte-level BPE (Sennrich et al. 2016, section 3.2; GPT-2 paper, section 2.2).

    texts: an iterable of str. vocab_size counts 256 bytes, the merges and <|endoftext|>. Returns
    the merges in order, [(bytes, bytes), ...]. With words as lists of bytes, they are those of

        while len(merges) < vocab_size - 257:
            counts = Counter(pair for word in words for pair in zip(word, word[1:]))
            best = max(counts, key=lambda pair: (counts[pair], pair))  # a tie: the greater bytes
            merges.append(best)
            words = [merged(word, best) for word in words]

    It is faster: each distinct word is kept once, with its count; a merge visits only the places of
    its pair; and pairs wait in a list for each count. A pair's count can only fall: all its places
    appear at once, when its newer token is made, and later merges take some."""
    if not 257 <= vocab_size <= 65_536:
        raise UserError(f"vocab_size is {vocab_size:,}: it must be from 257 to 65,536")
    corpus = Corpus(count_words(texts))
    tokens, merges, waiting = [*BYTES], [], collections.defaultdict(list)
    names = partial(names_of, tokens)
    for pair, count in corpus.keep(corpus.token[:-1], corpus.token[1:], corpus.before[1:]):
        waiting[count].append(pair)
    while waiting and len(merges) < vocab_size - 257:
        most = max(waiting)
        best = sorted(waiting.pop(most), key=names)
        # Now no pair outside of `best` occurs so often, and of those in it the last comes first
        while best and len(merges) < vocab_size - 257:
            pair = best.pop()
            count = corpus.recount(pair)
            if count < most:
                waiting[count].append(pair)
                continue
            merges.append(names(pair))
            tokens.append(b"".join(merges[-1]))
            for made, count in corpus.merge(pair, len(tokens) - 1):
                if count < most:
                    waiting[count].append(made)
                else:
                    bisect.insort(best, made, key=names)
        waiting.pop(0, None)
    return merges


def names_of(tokens, pair):
    left, right = divmod(pair, SHIFT)
    return tokens[left], tokens[right]


def count_words(texts):
    """{word: how often it occurs}; words are what GPT-2's pattern finds."""
    words, pattern = collections.Counter(), regex.compile(SPLIT_PATTERN)
    for text in texts:
        for piece in safe_pieces(text, PIECE):  # saves memory
            words.update(pattern.findall(piece))
    return words


class Corpus:
    """All distinct words in one row of tokens, a byte each at first. `after` and `before` link each
    token to its neighbours, so that a merge can take one out without moving the rest."""

    def __init__(self, words):
        row = b"\xff".join([b"", *(word.encode() for word in words), b""])
        self.token = np.frombuffer(row, np.uint8).astype(np.int64)
        number = np.cumsum(self.token == NO_TOKEN)  # of a place's word, from 1 on
        self.weight = np.array([0, *words.values(), 0])[number]  # how often that occurs
        self.after = np.arange(1, len(row) + 1)
        self.before = self.after - 2
        self.places = {}  # of each pair: where its first token stands, or stood before a merge

    def keep(self, left, right, places):
        """Keeps the places of new pairs of tokens. Returns [(pair, its count)]."""
        inside = (left != NO_TOKEN) & (right != NO_TOKEN)
        pairs, places = (left * SHIFT + right)[inside], places[inside]
        if len(pairs) == 0:
            return []
        order = np.argsort(pairs, kind="stable")
        pairs, places = pairs[order], places[order]
        # Now equal pairs are side by side, and another begins wherever the pair changes
        begins = [0, *(np.flatnonzero(pairs[1:] != pairs[:-1]) + 1).tolist()]
        counts = np.add.reduceat(self.weight[places], begins).tolist()
        pairs = pairs[begins].tolist()
        for pair, begin, end in zip(pairs, begins, [*begins[1:], len(places)], strict=True):
            self.places[pair] = places[begin:end]
        return zip(pairs, counts, strict=True)

    def recount(self, pair):
        """How often a pair occurs by now. From here on `places` has only those that are left."""
        left, right = divmod(pair, SHIFT)
        places = self.places[pair]
        places = places[self.token[places] == left]
        places = places[self.token[self.after[places]] == right]
        self.places[pair] = places
        return int(self.weight[places].sum())

    def merge(self, pair, new):
        """Makes a pair the token `new` everywhere. Returns (pair, its count) of the pairs that
        `new` is in."""
        left, right = divmod(pair, SHIFT)
        places = self.places.pop(pair)
        if left == right:
            places = self.every_other(places)
        # Now no two of these pairs overlap
        second = self.after[places]
        ahead, behind = self.before[places], self.after[second]
        self.token[places], self.token[second] = new, NO_TOKEN
        self.after[places], self.before[behind] = behind, places
        # Now `new` has the place of both tokens in the row. Where two of them are side by side,
        # `ahead` of the right one is the NO_TOKEN inside the left one: so they are found once
        news = self.token[places]
        return self.keep(np.concatenate([self.token[ahead], news]),
                         np.concatenate([news, self.token[behind]]),
                         np.concatenate([ahead, places]))

    def every_other(self, places):
        """In a run of one token, as in "aaaa", every other place begins a pair."""
        chosen, taken = [], None
        for place in places.tolist():
            if place != taken:
                chosen.append(place)
                taken = self.after[place]
        return np.array(chosen, np.int64)


# ---- The embedded stories ----
# A story is a series of choices, each uniform among the options that earlier choices leave, so its
# probability is exactly 1 / (product of the numbers of options): different choices never give the
# same text. A {word} is chosen where it appears first, and recalled after that

STORIES = 11_200  # a short run would not notice more
HELD_OUT = 400  # of them, for validation

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
OPTIONS = dict(hero=list(HEROES), trait=TRAITS, place=PLACES, thing=THINGS,
               trouble=list(TROUBLES), feeling=FEELINGS, game=GAMES)


def options(slot, known):
    """What a {slot} may become, given what is known so far: a list of equally likely entries."""
    if slot in PRONOUNS["girl"]:
        return [PRONOUNS[HEROES[known["hero"]]][slot]]
    if slot == "friend":
        return [name for name in HEROES if name != known["hero"]]
    if slot == "fix":
        return TROUBLES[known["trouble"]]
    return OPTIONS[slot]


def story(choose):
    """One story as a list of (text, skill, nats). choose(options) returns one of a list. The first
    word of a sentence is a choice, since it shows the wording; so is a {word} where it appears
    first. nats: the sum of ln(number of options) over the choices since the piece before."""
    heroes = list(HEROES)
    known, told, pieces, nats = {"hero": choose(heroes)}, set(), [], math.log(len(heroes))
    for wordings in SENTENCES:
        nats += math.log(len(wordings))
        parts = re.findall(r'\{\w+\}|^"|^\w+|[^{]+', choose(wordings))
        for number, text in enumerate(parts):
            skill = "choices" if number == 0 else "wording"
            slot = text.strip("{}")
            if slot != text:
                if slot not in known:
                    among = options(slot, known)
                    nats += math.log(len(among))
                    known[slot] = choose(among)
                text = known[slot]
                skill = "recall" if slot in told else "choices"
                told.add(slot)
                if slot == "hero":
                    told.update(PRONOUNS["girl"])  # the name shows which they are
            if number == 0 and pieces:
                text = " " + text
            pieces.append((text, skill, nats))
            nats = 0.0
    return pieces


def text_of_story(pieces):
    return "".join(text for text, _, _ in pieces)


def write_stories(seed):
    choose = random.Random(seed).choice
    return [story(choose) for _ in range(STORIES)]


def label(stories, tokenizer):
    """(n,) uint8: the index in SKILLS of each token of a split with these stories. A token has the
    skill of its last character; separators are wording."""
    between = np.zeros(len(separator(tokenizer)), np.uint8)
    sizes, labels = tokenizer.token_bytes(), []
    for pieces in stories:
        texts, skills, _ = zip(*pieces, strict=True)
        last = np.cumsum(sizes[tokenizer.encode("".join(texts))]) - 1  # each token's last character
        numbers = np.array([*map(SKILLS.index, skills)], np.uint8)
        labels += [between, np.repeat(numbers, [*map(len, texts)])[last]]
    if tokenizer.eot is None:
        return np.concatenate(labels[1:])
    return np.concatenate([*labels, between])


def entropy_floor(s, folder, tokenizer, val):
    """Writes skills.npy, and returns the lowest loss to expect of any model: the sum of -ln p over
    the validation targets (all tokens but the first) by their number, also for each skill."""
    targets = val["tokens"] - 1
    told = write_stories(s.seed)[-val["documents"]:]
    write_atomically(folder / "skills.npy", lambda file: np.save(file, label(told, tokenizer)))
    nats = dict.fromkeys(SKILLS, 0.0)
    for pieces in told:
        for _, skill, its in pieces:
            nats[skill] += its
    skills = {skill: total / targets for skill, total in nats.items()}
    return {"skills": skills, "entropy_floor": sum(skills.values())}


# ---- Weights of OpenAI and transformers -> a checkpoint ----

# transformers stores these as Conv1D does, (in, out); nn.Linear stores (out, in)
TRANSPOSED = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
ACTIVATIONS = {"relu": "relu", "gelu": "gelu_exact", "gelu_python": "gelu_exact"}
ACTIVATIONS |= dict.fromkeys(  # all of these are GPT-2's GELU, by tanh
    ["gelu_new", "gelu_fast", "gelu_pytorch_tanh", "gelu_python_tanh", "gelu_accurate"], "gelu")
FIXED = dict(model_type="gpt2", layer_norm_epsilon=1e-5, scale_attn_weights=True,
             scale_attn_by_inverse_layer_idx=False, add_cross_attention=False)
GPT2_TOKENS = "e424375bafc3e423128be739985d6bac4839b3014b9ed3f34c3b55f6d2b968d9"


def config_of(theirs):
    """The config for GPTConfig, from config.json's values; ValueError if they are not GPT-2's."""
    for key, value in FIXED.items():
        if theirs.get(key, value) != value:
            raise ValueError(f"its {key} is {theirs[key]!r}, not GPT-2's {value!r}")
    activation = theirs.get("activation_function", "gelu_new")
    if activation not in ACTIVATIONS:
        raise ValueError(f"its activation_function is {activation!r}, none of GPT-2's")
    config = {key: theirs[key] for key in ("vocab_size", "n_layer", "n_head", "n_embd")}
    return config | dict(block_size=theirs["n_positions"], activation=ACTIVATIONS[activation],
                         tie_weights=theirs.get("tie_word_embeddings", True))


def read_config(folder):
    return json.loads((folder / "config.json").read_bytes())


def shape_of(config):
    """A model without memory for its weights. Raises UserError for an impossible one."""
    config = GPTConfig(**config)
    check_ranges(config, vocab_size=(1, 2**24))
    check_shape(config)
    with torch.device("meta"), WithoutInit():
        return GPT(config)


def weight_names():
    """The names of files of weights, first those that are read first."""
    names = ["model.safetensors", "pytorch_model.bin"]
    return names if importlib.util.find_spec("safetensors") else names[::-1]


def weight_files(folder):
    """A folder's files of weights: a whole one, or the parts that its index names."""
    for name in weight_names():
        index = folder / f"{name}.index.json"
        if (folder / name).exists():
            return [folder / name]
        if index.exists():
            parts = json.loads(index.read_bytes())["weight_map"].values()
            return [folder / part for part in sorted({*parts})]
    raise ValueError("it has no weights")


def download_model(name):
    """The folder of a GPT-2 of the hub. Another model is refused before its weights are loaded."""
    import huggingface_hub as hub
    repository = name.removeprefix("model:")
    if name in OPENAI_NAMES:
        repository = f"openai-community/{name}"
    get = partial(hub.snapshot_download, repository)
    with one_line(f"{name} cannot be downloaded", "; offline, name a folder that holds it"):
        folder = Path(get(allow_patterns=["config.json", "vocab.json", "merges.txt",
                                          "tokenizer.json"]))
        config_of(read_config(folder))
        print(f"downloading {repository}", flush=True)
        for name in weight_names():
            pattern = name.replace(".", "*.") + "*"  # the parts and the index too
            get(allow_patterns=[pattern])
            if any(folder.glob(pattern)):
                break
    return folder


def load_tensors(path):
    """{name: tensor} of a file of weights."""
    if path.suffix != ".safetensors":
        return load_plain(path)
    with one_line(f"{path} cannot be read", ": pip install safetensors"):
        from safetensors.torch import load_file
    return load_file(path)


def read_model(place):
    """(config.json's values, {name: tensor}) of a folder, or of a checkpoint of nanoGPT's."""
    if place.is_dir():
        tensors = {}
        for path in weight_files(place):
            tensors |= load_tensors(path)
        return read_config(place), tensors
    found = load_tensors(place)
    if "model_args" not in found:
        raise ValueError("no checkpoint of nanoGPT's; one of train_gpt2.py needs no conversion")
    print("note: its GELU is taken to be exact, as nanoGPT's is since June 2023; older ones have "
          "GPT-2's, by tanh, and their logits differ by some 0.001")
    theirs = found["model_args"]
    as_config = {"n_positions": theirs["block_size"], "activation_function": "gelu"}
    return theirs | as_config, found["model"]


def fit(model, tensors, theirs):
    """{name: float32 tensor}, named and turned as our model has them. Before memory is taken for a
    tensor, a model on the "meta" device has checked its shape. Raises ValueError, or whatever torch
    raises, for anything else."""
    weights = {}
    if not theirs.get("bias", True):  # nanoGPT may leave the biases out
        for name, tensor in model.state_dict().items():
            if name.endswith(".bias"):
                weights[name] = torch.zeros(tensor.shape)
    for name, tensor in tensors.items():
        name = name.removeprefix("_orig_mod.")
        if name.endswith(TRANSPOSED) and "model_type" in theirs:
            tensor = tensor.t()
        if name.endswith((".attn.bias", ".attn.masked_bias")):  # the causal mask
            continue
        if name != "lm_head.weight":
            name = f"transformer.{name.removeprefix('transformer.')}"
        weights[name] = tensor
    if model.config.tie_weights:
        embedding = weights["transformer.wte.weight"]
        if not torch.equal(weights.pop("lm_head.weight", embedding), embedding):
            raise ValueError("its output matrix is not its embedding, though they should be tied")
    for name in {"transformer.wte.weight", "lm_head.weight"} & weights.keys():
        weights[name] = weights[name][:model.config.vocab_size]
    model.load_state_dict(weights, assign=True)
    if not all(tensor.isfinite().all() for tensor in weights.values()):
        raise ValueError("weights are not finite")
    return {name: tensor.float().contiguous().clone() for name, tensor in weights.items()}


def read_vocabulary(folder):
    """({token: id}, merges) as a folder of transformers' has them. Raises ValueError for a
    tokenizer that changes texts or cuts them elsewhere than GPT-2's."""
    if (folder / "vocab.json").exists():
        lines = (folder / "merges.txt").read_text(encoding="utf-8").splitlines()
        return json.loads((folder / "vocab.json").read_bytes()), lines[1:]
    whole = json.loads((folder / "tokenizer.json").read_bytes())
    words = whole["pre_tokenizer"]
    cuts = words["type"], words["add_prefix_space"], words.get("use_regex", True)
    if whole["normalizer"] or cuts != ("ByteLevel", False, True):
        raise ValueError("it cuts texts elsewhere")
    return whole["model"]["vocab"], map("".join, whole["model"]["merges"])


def read_tokenizer(folder, vocab_size):
    """The spec of a model's tokenizer: a byte-level BPE whose ids are in the order of its merges,
    and then <|endoftext|>. {} if there is none, or another one: then it says so."""
    if not (folder / "vocab.json").exists() and not (folder / "tokenizer.json").exists():
        # GPT-2's tokens, perhaps with rows behind them that make their number a multiple of 128
        return {"kind": "gpt2"} if 50257 <= vocab_size <= 50304 else {}
    # GPT-2 writes the bytes of printable characters as these, and the others from number 256 on
    hidden = dict(enumerate([*range(33), *range(127, 161), 173], 256))
    try:
        vocabulary, merges = read_vocabulary(folder)
        names = sorted(vocabulary, key=vocabulary.get)[:256]
        names += [merge.replace(" ", "") for merge in merges]
        ids = [vocabulary.get(name) for name in [*names, END_OF_TEXT]]
        if ids != [*range(len(ids))] or len(ids) > vocab_size:
            raise ValueError(f"its ids are not those of bytes, merges and then {END_OF_TEXT}")
        ranks = [name.translate(hidden) for name in names]
        if hashlib.sha256("\n".join(ranks).encode("latin-1")).hexdigest() == GPT2_TOKENS:
            return {"kind": "gpt2"}
        return Tokenizer({"kind": "bpe", "ranks": ranks}).spec
    except Exception as error:
        print(f"its tokenizer is none of ours: {error!r:.150}")
        return {}


def is_model(name):
    """Whether a name is that of a GPT-2 to convert."""
    return (name in OPENAI_NAMES or name.startswith("model:") or name.endswith(".pt")
            or os.path.isfile(os.path.join(os.path.expanduser(name), "config.json")))


def convert_weights(name, out_dir=""):
    """Writes a GPT-2 as a checkpoint at step 0 and returns its path: out/openai-<name>/best.pt for
    one of OpenAI's models, and out/<its name>/best.pt for model:OWNER/NAME of the hub, a folder
    that transformers wrote, or a checkpoint of nanoGPT's. Nothing in it is executed. Raises
    UserError for anything but a GPT-2."""
    path = Path(out_dir, "best.pt") if out_dir else converted_path(name.removesuffix(".pt"))
    place, source = Path(os.path.expanduser(name)), name
    with one_line(f"{name} holds no GPT-2 that can be converted"):
        if name.endswith(".pt"):
            source = checksum(place)
        elif (place / "config.json").is_file():
            config_of(read_config(place))  # another architecture is refused by its name
            source = " ".join(map(checksum, [place / "config.json", *weight_files(place)]))
        if path.exists():
            there = source
            with contextlib.suppress(Exception):  # a file that cannot be read says nothing
                there = load_plain(path, mmap=True).get("source")
            if there != source:
                raise UserError(f"{path} holds another model ({there or 'trained here'}){CHOOSE}")
            print(f"{path} is there already")
            return path
        if source == name:
            place = download_model(name)
        theirs, tensors = read_model(place)
        config = config_of(theirs)
        tokenizer = read_tokenizer(place, config["vocab_size"])
        command = "without a tokenizer"
        if tokenizer:
            size = len(tokenizer.get("ranks", range(50256))) + 1
            if size < config["vocab_size"]:
                cut = config["vocab_size"] - size
                print(f"{cut:,} rows behind the tokenizer's last id are cut off")
            config["vocab_size"] = size
            command = "now: " + shlex.join(["python", "sample.py", f"--checkpoint={path}"])
        model = shape_of(config)
        weights = fit(model, tensors, theirs)
    settings = {"rows": "documents"} if theirs.get("starts_documents") is True else {}
    checkpoint = make_checkpoint(model, settings=settings)
    checkpoint |= {"model": weights, "tokenizer": tokenizer, "source": source}
    make_folder(path.parent)
    write_atomically(path, partial(torch.save, checkpoint))
    print(f"written to {path}; {command}")
    return path


# ---- The command line ----


@reports_mistakes
def main(argv=None):
    s, _ = parse_settings(Settings, argv, __doc__, bare="dataset")
    check_ranges(s, shard_tokens=(2, 2**31 - 1), max_tokens=(2, 2**63), seed=(0, 2**63),
                 val_fraction=(1e-9, 0.999), vocab_size=(257, 65_536))
    if isinstance(s.dataset, str) and is_model(s.dataset):
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
    # pyarrow can abort at the interpreter's end (apache/arrow#45214), so a process that was started
    # for this script ends here. A notebook's, in which it is run, does not
    if Path(__file__).name in [Path(word).name for word in sys.orig_argv]:
        sys.stdout.flush()
        os._exit(status or 0)
    sys.exit(status)
