"""How fast is this machine? Prints a table and asserts nothing.

    python tests/benchmark.py                  # training, sampling, preparation
    python tests/benchmark.py --device=cuda --rows=16 --block_size=1024
"""
import contextlib
import os
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import prepare_data  # noqa: E402
import train_gpt2  # noqa: E402


@dataclass
class Settings:
    device: str = "auto"  # auto, cpu, cuda, mps
    rows: int = 4  # in a training batch
    block_size: int = 256  # tokens in a row
    steps: int = 6  # optimizer steps, after two that warm up
    megabytes: int = 10  # of text to prepare


def training(s, world, model):
    """Tokens per second of GPT-2 124M's optimizer steps, and the MFU that this is."""
    settings = train_gpt2.Settings(compile_model="auto")
    optimizer = train_gpt2.make_optimizer(model, settings, world.device)
    called = train_gpt2.compiled_and_parallel(model.train(), settings, world)
    idx, seconds = torch.randint(50257, (s.rows, s.block_size), device=world.device), []
    for _ in range(s.steps + 2):
        began = time.perf_counter()
        with world.autocast():
            _, loss = called(idx, idx)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        train_gpt2.wait_for(world.device)
        seconds.append(time.perf_counter() - began)
    speed = idx.numel() / statistics.median(seconds[2:])
    flops = train_gpt2.flops_per_token(model, s.block_size)
    return speed, speed * flops / train_gpt2.matmul_speed(world)


def sampling(model, new=64):
    """Tokens per second of one text, behind a prompt of 16 tokens: the median of three."""
    prompt, seconds = torch.arange(16, device=model.device)[None], []
    for _ in range(3):
        began = time.perf_counter()
        model.generate(prompt, max_new_tokens=new)
        train_gpt2.wait_for(model.device)
        seconds.append(time.perf_counter() - began)
    return new / statistics.median(seconds)


def preparing(megabytes, tokenizer, folder):
    """Megabytes per second from a text file to shards, a BPE's training included."""
    text = "\n\n".join("".join(text for text, _, _ in story) for story in
                       prepare_data.write_stories(seed=1))
    path = folder / "text.txt"
    path.write_text((text * (megabytes * 10**6 // len(text) + 1))[:megabytes * 10**6])
    began = time.perf_counter()
    argv = [str(path), f"--tokenizer={tokenizer}", f"--out_dir={folder / tokenizer}"]
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), \
            contextlib.redirect_stderr(nowhere):
        prepare_data.main(argv)
    return megabytes / (time.perf_counter() - began)


@train_gpt2.reports_mistakes
def main(argv=None):
    s, _ = train_gpt2.parse_settings(Settings, argv, __doc__)
    train_gpt2.keep_memory()
    world = train_gpt2.World(train_gpt2.Settings(device=s.device))
    model = train_gpt2.GPT(train_gpt2.GPTConfig(block_size=max(s.block_size, 128))).to(world.device)
    print(f"GPT-2 124M on {world.device}, {torch.get_num_threads()} threads")
    speed, mfu = training(s, world, model)
    print(f"training, {s.rows} rows of {s.block_size}, {str(world.dtype)[6:]}: "
          f"{speed:,.0f} tokens/s, MFU {mfu:.0%}", flush=True)
    for dtype in (torch.float32, torch.bfloat16):
        print(f"sampling, {str(dtype)[6:]}: {sampling(model.to(dtype)):,.1f} tokens/s", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        for tokenizer in ("char", "bpe"):
            speed = preparing(s.megabytes, tokenizer, Path(folder))
            print(f"preparing, {tokenizer}: {speed:.2f} MB/s", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
