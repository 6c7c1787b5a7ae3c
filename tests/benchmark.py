"""How fast is this machine? Prints a table and asserts nothing.

    python tests/benchmark.py                  # GPT-2 124M: training, sampling; preparation
    python tests/benchmark.py --tokenizers=FILE.txt  # our BPE beside those of other libraries
"""
import contextlib
import importlib.util
import io
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import prepare_data  # noqa: E402
import train_gpt2  # noqa: E402

# isort: split
import torch  # noqa: E402


@dataclass
class Settings:
    device: str = "auto"  # auto, cpu, cuda, mps
    rows: int = 4  # in a training batch
    block_size: int = 256  # tokens in a row
    tokenizers: str = ""  # a text file: only compare the tokenizers that learn from it


def median_seconds(device, count, function):
    """The median of `count` calls, after two that warm up."""
    seconds = []
    for _ in range(count + 2):
        began = time.perf_counter()
        function()
        train_gpt2.wait_for(device)
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds[2:])


def training(s, world, model):
    """Tokens per second, and the MFU that this is."""
    settings = train_gpt2.Settings()
    optimizer = train_gpt2.make_optimizer(model, settings, world.device)
    called = train_gpt2.compiled_and_parallel(model.train(), settings, world)
    idx = torch.randint(50257, (s.rows, s.block_size), device=world.device)

    def step():
        with world.autocast():
            _, loss = called(idx, idx)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    speed = idx.numel() / median_seconds(world.device, 3, step)
    flops = train_gpt2.flops_per_token(model, s.block_size)
    return speed, speed * flops / train_gpt2.matmul_speed(world)


def preparing(tokenizer, folder):
    """Megabytes per second from a text file to shards, a BPE's training included."""
    stories = prepare_data.write_stories(seed=1)
    text = "\n\n".join("".join(text for text, _, _ in story) for story in stories)
    path = folder / "text.txt"
    path.write_text(text * 3)
    argv = [str(path), f"--tokenizer={tokenizer}", f"--out_dir={folder / tokenizer}"]
    began = time.perf_counter()
    nowhere = io.StringIO()
    with contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        prepare_data.main(argv)
    return path.stat().st_size / 1e6 / (time.perf_counter() - began)


# ---- Tokenizers ----
# Each function learns a vocabulary of this size from a text, and returns a function that encodes


def ours(text, vocab_size):
    spec = prepare_data.bpe_spec(prepare_data.train_bpe([text], vocab_size))
    return partial(prepare_data.encode_array, train_gpt2.Tokenizer(spec))


def sentencepiece(text, vocab_size):
    spec = prepare_data.train_sentencepiece([text], vocab_size)
    return partial(prepare_data.encode_array, train_gpt2.Tokenizer(spec))


def rust(text, vocab_size):
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    tokenizer, byte_level = Tokenizer(models.BPE()), pre_tokenizers.ByteLevel
    tokenizer.pre_tokenizer = byte_level(add_prefix_space=False)
    tokenizer.train_from_iterator([text], trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[train_gpt2.END_OF_TEXT], show_progress=False,
        initial_alphabet=byte_level.alphabet()))
    return lambda text: tokenizer.encode(text).ids


LIBRARIES = {"prepare_data": ours, "sentencepiece": sentencepiece, "tokenizers": rust}


def compare_tokenizers(path):
    """A table of those that are installed, trained on the first nine tenths of a text."""
    with prepare_data.one_line(f"cannot read {path}"):
        text = Path(path).read_bytes().decode("utf-8")
    cut = int(len(text) * 0.9)
    size = len(text[cut:].encode())
    found = [name for name in LIBRARIES if importlib.util.find_spec(name)]
    print(f"bytes per token on the last tenth ({size:,} bytes), seconds of training")
    print("| vocabulary |", " | ".join(found), "|")
    print("| --- " * (len(found) + 1) + "|")
    for vocab_size in (1024, 4096, 9157):
        cells = []
        for name in found:
            began = time.perf_counter()
            encode = LIBRARIES[name](text[:cut], vocab_size)
            seconds = time.perf_counter() - began
            cells.append(f"{size / len(encode(text[cut:])):.3f}, {seconds:.1f} s")
        print(f"| {vocab_size:,} |", " | ".join(cells), "|", flush=True)


@train_gpt2.reports_mistakes
def main(argv=None):
    s, _ = train_gpt2.parse_settings(Settings, argv, __doc__)
    if s.tokenizers:
        compare_tokenizers(s.tokenizers)
        return 0
    train_gpt2.keep_memory()
    world = train_gpt2.World(train_gpt2.Settings(device=s.device))
    config = train_gpt2.GPTConfig(block_size=max(s.block_size, 128))
    model = train_gpt2.GPT(config).to(world.device)
    speed, mfu = training(s, world, model)
    print(f"training on {world.device} in {world.dtype}: {speed:,.0f} tokens/s, MFU {mfu:.0%}")
    prompt = torch.arange(16, device=world.device)[None]
    for dtype in (torch.float32, torch.bfloat16):
        model.to(dtype)
        seconds = median_seconds(world.device, 3, lambda: model.generate(prompt, 64))
        print(f"sampling in {dtype}: {64 / seconds:,.1f} tokens/s")
    for tokenizer in ("char", "bpe"):
        with tempfile.TemporaryDirectory() as folder:
            speed = preparing(tokenizer, Path(folder))
        print(f"preparing, {tokenizer}: {speed:.2f} MB/s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
