"""How fast is this machine? Prints tables and asserts nothing.

    python tests/benchmark.py                   # CPU presets: training, sampling, preparation
    python tests/benchmark.py --presets=gpt2 --device=cuda
    python tests/benchmark.py --ladder          # GPT-2 124M: what each trick is worth
"""
import contextlib
import csv
import json
import os
import statistics
import subprocess
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
from train_gpt2 import GPT, GPTConfig  # noqa: E402


@dataclass
class Settings:
    presets: str = "stories,shakespeare_cpu,tinystories_char"  # with commas between them
    device: str = "auto"  # auto, cpu, cuda, mps
    steps: int = 40  # optimizer steps for each preset; the first third warms up
    ladder: bool = False  # instead: GPT-2 124M with one trick after another
    rows: int = 4  # in the ladder's batch
    block_size: int = 256  # in the ladder's batch


def run(script, *argv):
    """Run one of the scripts in a process of its own; return its seconds."""
    began, silent = time.perf_counter(), subprocess.DEVNULL
    subprocess.run([sys.executable, ROOT / script, *argv], check=True, stdout=silent, stderr=silent)
    return time.perf_counter() - began


def write_corpus(path, count):
    texts, _ = prepare_data.write_stories(count, seed=1)
    path.write_text("\n\n".join(texts), encoding="utf-8")


def make_data(folder, vocab_size):
    """Stories under a vocabulary of this size: speed does not depend on what a text says."""
    write_corpus(folder / "text.txt", 3000)
    kind = "char" if vocab_size < 100 else "bpe"
    data = folder / f"data_{vocab_size}"
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        prepare_data.main([str(folder / "text.txt"), f"--tokenizer={kind}", f"--out_dir={data}"])
    if kind == "bpe":  # the width of the last product, filled up with tokens that do not occur
        meta = json.loads((data / "meta.json").read_text(encoding="utf-8"))
        tokens = meta["tokenizer"]["ranks"]
        tokens += [f"\x00{i:05d}" for i in range(vocab_size - 1 - len(tokens))]
        (data / "meta.json").write_text(json.dumps(meta), encoding="utf-8")
    return data


def benchmark_presets(s, folder):
    print(f"{'preset':<20}{'tokens/s':>10}{'MFU':>6}{'start-up s':>12}"
          f"{'sampling tokens/s':>19}")
    sizes = {"data/stories": 1024, "data/fineweb_edu": 50257, "data/fineweb_edu_bpe": 9157}
    for preset in s.presets.split(","):
        data_dir = train_gpt2.PRESETS[preset].get("data_dir", "data/stories")
        data, out = make_data(folder, sizes.get(data_dir, 65)), folder / preset
        common = [f"--preset={preset}", f"--data_dir={data}", "--rows=stream", f"--out_dir={out}",
                  "--overwrite=True", f"--device={s.device}", "--eval_tokens=2000",
                  "--sample_every=1000000", "--log_every=1"]
        start_up = run("train_gpt2.py", *common, "--max_steps=1")
        run("train_gpt2.py", *common, f"--max_steps={s.steps}")
        with open(out / "log.csv", encoding="utf-8") as file:
            column = [row["tokens_per_second"] for row in csv.DictReader(file)]
        speeds = [float(value) for value in column if value]
        speed = statistics.median(speeds[len(speeds) // 3:])
        model = GPT.from_checkpoint(out / "best.pt", train_gpt2.pick_device(s.device))
        dtype = train_gpt2.pick_dtype("auto", model.device)
        T = model.config.block_size
        peak_flops = train_gpt2.matmul_speed(model.device, dtype)
        mfu = speed * train_gpt2.flops_per_token(model, T) / peak_flops
        idx, seconds = torch.zeros((1, 8), dtype=torch.int64, device=model.device), []
        for _ in range(3):
            began = time.perf_counter()
            model.generate(idx, max_new_tokens=T - 8)
            seconds.append(time.perf_counter() - began)
        print(f"{preset:<20}{speed:>10,.0f}{mfu:>6.0%}{start_up:>12.1f}"
              f"{(T - 8) / statistics.median(seconds):>19,.0f}", flush=True)


def benchmark_preparation(folder):
    file = folder / "long.txt"
    write_corpus(file, 40_000)
    for kind in ("char", "bpe"):
        out = folder / kind
        seconds = run("prepare_data.py", str(file), f"--tokenizer={kind}", f"--out_dir={out}")
        meta = json.loads((out / "meta.json").read_text(encoding="utf-8"))
        tokens = meta["train"]["tokens"] + meta["val"]["tokens"]
        print(f"preparing {file.stat().st_size / 1e6:.0f} MB as {kind}: "
              f"{tokens / seconds:,.0f} tokens/s in all")


def step_time(model, optimizer, idx, dtype, steps=6):
    """Seconds of an optimizer step: the median after two that warm up and compile."""
    device, seconds = idx.device, []
    for _ in range(steps + 2):
        began = time.perf_counter()
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            model(idx, idx)[1].backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        train_gpt2.wait_for(device)
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds[2:])


def ladder(s):
    """A row for each rung: plain float32 first, then each adds to those before it."""
    device = train_gpt2.pick_device(s.device)
    torch.manual_seed(0)
    config = GPTConfig(block_size=s.block_size, vocab_size=50257, attention="manual")
    model = called = GPT(config).to(device)
    idx = torch.randint(50257, (s.rows, s.block_size), device=device)
    dtype, unembed, first = torch.float32, train_gpt2.unembed, None
    train_gpt2.unembed = torch.nn.functional.linear
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, foreach=False)
    on_cuda = device.type == "cuda"
    rungs = ["float32, every step spelled out", "TF32" * on_cuda, "bfloat16", "flash attention",
             "padded vocabulary" * on_cuda, "fused AdamW", "memory kept by malloc", "compiled"]
    print(f"GPT-2 124M, {s.rows} rows of {s.block_size} tokens on {device}")
    for name in filter(None, rungs):
        match name:
            case "TF32":
                torch.set_float32_matmul_precision("high")
            case "bfloat16":
                dtype = train_gpt2.pick_dtype("auto", device)
            case "flash attention":
                for block in model.transformer.h:
                    block.attn.flash = True
            case "padded vocabulary":
                train_gpt2.unembed = unembed
            case "fused AdamW":
                optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
            case "memory kept by malloc":
                train_gpt2.keep_memory()
            case "compiled":
                called = torch.compile(model)
        try:
            seconds = step_time(called, optimizer, idx, dtype)
        except Exception as error:  # no compiler here
            print(f"  + {name:<34} not here ({type(error).__name__})")
            continue
        speed = idx.numel() / seconds
        first = first or speed
        flops = train_gpt2.flops_per_token(model, s.block_size)
        mfu = speed * flops / train_gpt2.matmul_speed(device, dtype)
        print(f"  + {name:<34}{speed:>10,.0f} tokens/s  x {speed / first:.2f}  MFU {mfu:.0%} in "
              f"{str(dtype)[6:]}", flush=True)
    train_gpt2.unembed = unembed


@train_gpt2.reports_mistakes
def main(argv=None):
    s, _ = train_gpt2.parse_settings(Settings, argv, __doc__)
    if s.ladder:
        ladder(s)
        return 0
    with tempfile.TemporaryDirectory() as folder, open(os.devnull, "w") as nowhere:
        folder = Path(folder)
        with contextlib.redirect_stderr(nowhere):
            benchmark_presets(s, folder)
            benchmark_preparation(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
