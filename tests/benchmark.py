"""How fast is this machine? Prints tables and asserts nothing.

    python tests/benchmark.py                                 # the CPU presets: training, sampling, preparation
    python tests/benchmark.py --presets=gpt2 --device=cuda
    python tests/benchmark.py --ladder=True                   # GPT-2 124M: what each trick is worth, one at a time
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


# A child process prints the most memory that it held, in MB, after the script's own output.
WITH_PEAK = """import runpy, sys
sys.argv = sys.argv[1:]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    try:
        import resource
        unit = 2**20 if sys.platform == "darwin" else 2**10
        print("peak", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // unit)
    except ImportError:
        print("peak 0")
"""


def run(script, *argv):
    """Runs one of the scripts in a process of its own; returns (seconds, peak MB)."""
    began = time.perf_counter()
    output = subprocess.run([sys.executable, "-c", WITH_PEAK, str(ROOT / script), *argv], check=True, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL).stdout
    return time.perf_counter() - began, int(output.split()[-1])


def make_data(folder, vocab_size):
    """A corpus of stories under a tokenizer of this kind of size: speed does not depend on what the text says."""
    texts, _ = prepare_data.write_stories(3000, seed=1)
    file = folder / "text.txt"
    file.write_text("\n\n".join(texts), encoding="utf-8")
    kind = "char" if vocab_size < 100 else "bpe"
    data = folder / f"data_{vocab_size}"
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        prepare_data.main([str(file), f"--tokenizer={kind}", f"--out_dir={data}"])
    if vocab_size > 10_000:  # GPT-2's width of the last product, without its vocabulary: the ids used are a few of it
        meta = json.loads((data / "meta.json").read_text(encoding="utf-8"))
        tokens = meta["tokenizer"]["ranks"]
        tokens += [f"\x00{i:05d}" for i in range(vocab_size - 1 - len(tokens))]
        (data / "meta.json").write_text(json.dumps(meta), encoding="utf-8")
    return data


def benchmark_presets(s, folder):
    print(f"{'preset':<20}{'tokens/s':>10}{'of matmul':>11}{'start-up s':>12}{'peak MB':>9}{'sampling tokens/s':>19}")
    for preset in s.presets.split(","):
        changes = train_gpt2.PRESETS[preset]
        vocab = {"data/fineweb_edu": 50257, "data/fineweb_edu_bpe": 9157}.get(changes.get("data_dir"), 65)
        data = make_data(folder, 1024 if preset == "stories" else vocab)
        out = folder / preset
        common = [f"--preset={preset}", f"--data_dir={data}", "--rows=stream", f"--out_dir={out}", "--overwrite=True",
                  f"--device={s.device}", "--eval_tokens=2000", "--sample_every=1000000", "--log_every=1"]
        start_up, _ = run("train_gpt2.py", *common, "--max_steps=1")
        _, peak = run("train_gpt2.py", *common, f"--max_steps={s.steps}")
        with open(out / "log.csv", encoding="utf-8") as file:
            speeds = [float(row["tokens_per_second"]) for row in csv.DictReader(file) if row["tokens_per_second"]]
        speed = statistics.median(speeds[len(speeds) // 3:])
        model = GPT.from_checkpoint(out / "best.pt", train_gpt2.pick_device(s.device))
        dtype = train_gpt2.pick_dtype("auto", model.device)
        share = speed * train_gpt2.operations_per_token(model) / train_gpt2.matmul_speed(model.device, dtype)
        idx, count = torch.zeros((1, 8), dtype=torch.int64, device=model.device), model.config.block_size - 8
        seconds = []
        for _ in range(3):
            began = time.perf_counter()
            model.generate(idx, max_new_tokens=count)
            seconds.append(time.perf_counter() - began)
        print(f"{preset:<20}{speed:>10,.0f}{share:>10.0%} {start_up:>12.1f}{peak:>9,}"
              f"{count / statistics.median(seconds):>19,.0f}", flush=True)


def benchmark_preparation(folder):
    texts, _ = prepare_data.write_stories(40_000, seed=1)
    file = folder / "long.txt"
    file.write_text("\n\n".join(texts), encoding="utf-8")
    for kind in ("char", "bpe"):
        seconds, peak = run("prepare_data.py", str(file), f"--tokenizer={kind}", f"--out_dir={folder / kind}")
        meta = json.loads((folder / kind / "meta.json").read_text(encoding="utf-8"))
        tokens = meta["train"]["tokens"] + meta["val"]["tokens"]
        print(f"preparing {file.stat().st_size / 1e6:.0f} MB as {kind}: {tokens / seconds:,.0f} tokens/s in all, "
              f"peak {peak:,} MB")


def step_time(model, optimizer, idx, dtype, steps=6):
    """Seconds of an optimizer step, the median after two for warming up (and for compiling)."""
    device, seconds = idx.device, []
    context = torch.autocast(device.type, dtype) if dtype != torch.float32 else contextlib.nullcontext()
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    for _ in range(steps + 2):
        began = time.perf_counter()
        with context:
            model(idx, idx)[1].backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        wait()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds[2:])


def ladder(s):
    """One row for each rung: plain float32 first, each further row adds to those before it."""
    device = train_gpt2.pick_device(s.device)
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=s.block_size, attention="manual")).to(device)
    idx = torch.randint(50257, (s.rows, s.block_size), device=device)
    dtype, faster, first = torch.float32, train_gpt2.linear, None
    train_gpt2.linear = torch.nn.functional.linear
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, foreach=False)
    called = model

    def flash():
        for block in model.transformer.h:
            block.attn.flash = True

    def change_products():
        train_gpt2.linear = faster

    rungs = [("float32, every step spelled out", lambda: None), ("flash attention", flash)]
    if device.type == "cuda":
        rungs.insert(1, ("TF32", lambda: torch.set_float32_matmul_precision("high")))
        rungs.append(("padded vocabulary", change_products))
    elif train_gpt2.ON_X86:
        rungs.insert(1, ("products by oneDNN", change_products))
    best = train_gpt2.pick_dtype("auto", device)
    if best == torch.bfloat16:
        rungs.insert(2, ("bfloat16", lambda: None))
    rungs.append(("fused AdamW", lambda: None))
    if sys.platform == "linux" and device.type == "cpu":
        rungs.append(("memory kept by malloc", train_gpt2.keep_memory))
    rungs.append(("compiled", lambda: None))
    print(f"GPT-2 124M, {s.rows} rows of {s.block_size} tokens on {device}")
    for name, climb in rungs:
        climb()
        if name == "bfloat16":
            dtype = torch.bfloat16
        if name == "fused AdamW":
            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=device.type in ("cpu", "cuda"))
        if name == "compiled":
            called = torch.compile(model)
        began = time.perf_counter()
        try:
            seconds = step_time(called, optimizer, idx, dtype)
        except Exception as error:  # no compiler here: the other rungs stand
            print(f"  + {name:<34} not here ({type(error).__name__})")
            continue
        speed = idx.numel() / seconds
        first = first or speed
        share = speed * train_gpt2.operations_per_token(model) / train_gpt2.matmul_speed(device, dtype)
        print(f"  + {name:<34}{speed:>10,.0f} tokens/s  x {speed / first:.2f}  {share:.0%} of matmul speed in "
              f"{str(dtype)[6:]}  ({time.perf_counter() - began:.0f} s)", flush=True)
    train_gpt2.linear = faster


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
