"""How fast is this machine? Prints a table and asserts nothing.

    python tests/benchmark.py                       # some 10 minutes on 2 cores
    python tests/benchmark.py --only=sampling       # the rows with this in their name
    python tests/benchmark.py --nanogpt=FOLDER      # beside a checkout of nanoGPT
    python tests/benchmark.py --tokenizers=FILE.txt  # our BPE beside those of other libraries

Each row is measured in turns with a peer, if it is installed.
"""
import contextlib
import importlib.util
import itertools
import math
import os
import statistics
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import prepare_data  # noqa: E402
import train_gpt2  # noqa: E402

# isort: split
import pyarrow.parquet  # noqa: E402
import torch  # noqa: E402

TURNS = 3  # of us and a peer; medians are printed


@dataclass
class Settings:
    device: str = "auto"  # auto, cpu, cuda, mps
    dtype: str = "auto"  # of our training
    only: str = ""  # measure only the rows with this in their name
    nanogpt: str = ""  # a checkout of nanoGPT
    tokenizers: str = ""  # a text file: compare the tokenizers that learn from it, nothing else


def not_at_hand():
    """What is measured of a peer that is not installed."""
    return math.nan


def speed(process, count, function):
    """A function that calls another one, and returns how many of `count` things a second it did."""
    def measure():
        began = time.perf_counter()
        function()
        train_gpt2.wait_for(process.device)
        return count / (time.perf_counter() - began)
    return measure


# ---- Training ----


def training(process, model, optimizer, rows, block_size):
    """Tokens per second of a step. Here and in nanoGPT, model(x, y) returns (logits, loss)."""
    called = train_gpt2.compiled(model.train(), train_gpt2.Settings(), process)
    x = torch.randint(65, (rows, block_size), device=process.device)

    def step():
        with process.autocast():
            _, loss = called(x, x)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return speed(process, x.numel(), step)


def ours(process, rows, **shape):
    model = train_gpt2.GPT(train_gpt2.GPTConfig(**shape)).to(process.device)
    optimizer = train_gpt2.make_optimizer(model, train_gpt2.Settings(), process.device)
    return training(process, model, optimizer, rows, shape["block_size"])


def nanogpt(folder, device, rows, **shape):
    """With the biases that GPT-2 has and its train.py leaves out by default, 50,304 tokens, and
    float32 on a CPU, as train.py has it."""
    sys.path.insert(0, folder)
    from model import GPT, GPTConfig
    dtype = "float32" if device.type == "cpu" else "auto"
    process = train_gpt2.Process(train_gpt2.Settings(device=str(device), dtype=dtype))
    shape = dict(vocab_size=50304, bias=True, dropout=0.0) | shape
    model = GPT(GPTConfig(**shape)).to(device)
    optimizer = model.configure_optimizers(0.1, 6e-4, (0.9, 0.95), device.type)
    return training(process, model, optimizer, rows, shape["block_size"])


def training_both(s, process, rows, **shape):
    peer = not_at_hand
    if s.nanogpt:
        peer = nanogpt(s.nanogpt, process.device, rows, **shape)
    return ours(process, rows, **shape), peer


# ---- Sampling and preparation ----


def sampling(process, dtype, texts, new_tokens=128):
    """Tokens per second of GPT-2 124M behind 16 tokens, and of transformers' GPT-2."""
    idx = torch.randint(50257, (texts, 16), device=process.device)
    count = texts * new_tokens
    model = train_gpt2.GPT(train_gpt2.GPTConfig()).eval().to(process.device, dtype)
    us = speed(process, count, lambda: model.generate(idx, new_tokens))
    if not importlib.util.find_spec("transformers"):
        return us, not_at_hand
    from transformers import GPT2Config, GPT2LMHeadModel
    peer = GPT2LMHeadModel(GPT2Config()).eval().to(process.device, dtype)
    options = dict(attention_mask=torch.ones_like(idx), do_sample=True, top_k=0,
                   min_new_tokens=new_tokens, max_new_tokens=new_tokens, pad_token_id=0)
    return us, speed(process, count, lambda: peer.generate(idx, **options))


def preparing(process, kind):
    """Tokens per second of prepare_data.py with GPT-2's vocabulary, and of tiktoken's encode in as
    many threads, which reads the same 60 MB and writes nothing."""
    stories = [*map(prepare_data.text_of_story, prepare_data.write_stories(seed=1))] * 11
    folder = Path(tempfile.mkdtemp())
    path = folder / f"stories.{kind}"
    if kind == "parquet":
        pyarrow.parquet.write_table(pyarrow.table({"text": stories}), path)
    else:
        path.write_text("\n\n".join(stories), encoding="utf-8")
    encode = partial(train_gpt2.Tokenizer({"kind": "gpt2"}).encoding.encode_to_numpy,
                     disallowed_special=())

    def encode_all(texts):
        return [*map(encode, texts)]

    def alone():
        if kind == "parquet":
            texts = pyarrow.parquet.read_table(path).column("text").to_pylist()
        else:
            texts = path.read_text(encoding="utf-8").split("\n\n")
        batches = [texts[i:i + 200] for i in range(0, len(texts), 200)]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            return [*itertools.chain.from_iterable(pool.map(encode_all, batches))]

    def prepared():
        with contextlib.redirect_stdout(None):
            prepare_data.main([str(path), "--tokenizer=gpt2",
                               f"--out_dir={tempfile.mkdtemp(dir=folder)}"])
    count = sum(map(len, alone()))
    return speed(process, count, prepared), speed(process, count, alone)


# ---- The table ----


def table(s, process):
    """{name: a function that makes a measurement of us and one of a peer}"""
    rows, T = (32, 1024) if process.device.type == "cuda" else (4, 256)
    gpt2 = dict(n_layer=12, n_head=12, n_embd=768, block_size=T)
    char = dict(vocab_size=65, n_layer=6, n_head=6, n_embd=384, block_size=256, dropout=0.2)
    found = {
        f"training GPT-2 124M, {rows} x {T}, tokens/s; nanoGPT": partial(
            training_both, s, process, rows, **gpt2),
        "shakespeare_char, 64 x 256, tokens/s; nanoGPT": partial(
            training_both, s, process, 64, **char),
        "preparation of a .txt, tokens/s; tiktoken alone": partial(preparing, process, "txt"),
        "preparation of a .parquet, tokens/s; tiktoken alone": partial(
            preparing, process, "parquet")}
    for texts in (1, 16):
        for dtype in (torch.float32, torch.bfloat16):
            name = f"sampling GPT-2 124M, {texts} at once, {dtype}, tokens/s; transformers"
            found[name] = partial(sampling, process, dtype, texts)
    return found


def in_turns(us, peer):
    """The medians of both; a first turn, not counted, warms up."""
    us()
    peer()
    found = [(us(), peer()) for _ in range(TURNS)]
    return map(statistics.median, zip(*found, strict=True))


# ---- Tokenizers ----
# Each function learns a vocabulary of this size from a text, and returns a function that encodes


def ours_by(train):
    def learn(text, vocab_size):
        tokenizer = train_gpt2.Tokenizer(train([text], vocab_size))
        return partial(prepare_data.encode_array, tokenizer)
    return learn


def rust(text, vocab_size):
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    byte_level = pre_tokenizers.ByteLevel
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = byte_level(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[train_gpt2.END_OF_TEXT], show_progress=False,
        initial_alphabet=byte_level.alphabet())
    tokenizer.train_from_iterator([text], trainer)
    return lambda text: tokenizer.encode(text).ids


LIBRARIES = {
    "prepare_data": ours_by(lambda *how: prepare_data.bpe_spec(prepare_data.train_bpe(*how))),
    "sentencepiece": ours_by(prepare_data.train_sentencepiece),
    "tokenizers": rust,
}


def compare_tokenizers(path):
    """Those that are installed, trained on the first nine tenths of a text."""
    text = Path(path).read_bytes().decode("utf-8")
    cut = len(text) * 9 // 10
    size = len(text[cut:].encode())
    print("| vocabulary | library | bytes per token on the last tenth | seconds of training |")
    print("| --- | --- | --- | --- |")
    for vocab_size in (1024, 4096, 9157):
        for name, learn in LIBRARIES.items():
            if importlib.util.find_spec(name):
                began = time.perf_counter()
                encode = learn(text[:cut], vocab_size)
                seconds = time.perf_counter() - began
                bytes_per_token = size / len(encode(text[cut:]))
                print(f"| {vocab_size:,} | {name} | {bytes_per_token:.3f} | {seconds:.1f} |")


@train_gpt2.reports_mistakes
def main(argv=None):
    s, _ = train_gpt2.parse_settings(Settings, argv, __doc__)
    if s.tokenizers:
        compare_tokenizers(s.tokenizers)
        return 0
    train_gpt2.keep_memory()
    process = train_gpt2.Process(train_gpt2.Settings(device=s.device, dtype=s.dtype))
    print(f"{process.device} in {process.dtype}, {torch.get_num_threads()} threads; "
          f"torch {torch.__version__}; nan: the peer is not at hand")
    print("| measured | this | peer | ratio |\n| --- | --- | --- | --- |")
    for name, make in table(s, process).items():
        if s.only in name:
            us, peer = in_turns(*make())
            print(f"| {name} | {us:,.4g} | {peer:,.4g} | {us / peer:.2f} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
