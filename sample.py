"""Let a trained model write.

    python sample.py                                        # from the newest out/*/best.pt
    python sample.py "Once there was" --num_samples=3       # go on from a prompt, three times
    python sample.py --init_from=gpt2 "The meaning of life" # OpenAI's GPT-2; also gpt2-medium, gpt2-large, gpt2-xl
    python sample.py --temperature=0                        # always the likeliest token; higher is more daring
    python sample.py --prompt=@beginning.txt                # the prompt from a file; - is standard input
    python sample.py "Once there was" --explain             # watch it decide, token by token
    python sample.py --interactive                          # one prompt after another
    python sample.py --export=folder                        # for transformers: AutoModelForCausalLM, AutoTokenizer
"""
import codecs
import contextlib
import math
import os
import sys
import unicodedata
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from train_gpt2 import (
    UserError,
    check_ranges,
    encode_prompt,
    is_out_of_memory,
    keep_memory,
    model_from,
    parse_settings,
    pick_device,
    pick_dtype,
    read_model,
    reports_mistakes,
    stream,
)


@dataclass
class Settings:
    prompt: str = ""  # the text to go on from; empty: a new document; -: standard input; @FILE: what the file holds
    checkpoint: str = ""  # a file that training wrote; empty: the best.pt most recently written under out/
    init_from: str = ""  # or: gpt2, gpt2-medium, gpt2-large, gpt2-xl, a folder that transformers wrote
    num_samples: int = 1  # texts to write
    max_new_tokens: int = 200  # tokens each, at most; <|endoftext|> ends a text before that
    temperature: float = 0.8  # below 1 the likely grows likelier; 0: always the likeliest token; 1: as learned
    top_k: int | None = None  # choose among so many likeliest tokens only; None: among all
    top_p: float | None = None  # choose among the fewest tokens that hold this share of probability; None: among all
    seed: int | None = None  # the same seed writes the same text; None: another one each time
    device: str = "auto"  # auto, cpu, cuda, mps
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # of the weights; auto: the machine's fastest
    explain: bool = False  # a line for each token: how likely it was, and what else it could have been
    interactive: bool = False  # ask for prompts; Ctrl-C stops a text, Ctrl-D or an empty line ends
    export: str = ""  # write the model to this folder, for transformers, and no text


def newest_checkpoint():
    """The best.pt most recently written under out/. Raises UserError where there is none."""
    found = sorted(Path("out").glob("*/best.pt"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise UserError("no checkpoint under out/: train one with python train_gpt2.py, or name it: --checkpoint=FILE")
    return found[-1]


def check_settings(s):
    """Raises UserError for a value out of range."""
    check_ranges(s, num_samples=(1, 10_000), max_new_tokens=(1, 10**9), temperature=(0, 1e6), top_k=(1, 2**24),
                 seed=(0, 2**63 - 1))
    for wrong, why in (
            (s.top_p is not None and not 0 < s.top_p <= 1, f"top_p is {s.top_p}: it must be above 0 and at most 1"),
            (s.checkpoint and s.init_from, "checkpoint and init_from both name a model: leave one out"),
            (s.explain and s.num_samples > 1, "explain shows one text: leave out num_samples"),
            (s.interactive and s.prompt, "interactive asks for its prompts: leave out the prompt"),
            (s.export and (s.prompt or s.explain or s.interactive), "export writes no text: leave out the rest")):
        if wrong:
            raise UserError(why)


def read_prompt(prompt):
    """The text that --prompt stands for. Raises UserError for a file that cannot be read or is no text."""
    try:
        if prompt == "-":
            text = sys.stdin.read()
            text.encode()  # fails where Python let through what is no UTF-8
            return text
        return Path(prompt[1:]).read_text(encoding="utf-8") if prompt.startswith("@") else prompt
    except (OSError, ValueError) as error:  # ValueError: bytes that are no UTF-8, or a name that none can have
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        source = "standard input" if prompt == "-" else prompt[1:] or "a file without a name"
        raise UserError(f"cannot read the prompt from {source}: {reason}") from None


class Writer:
    """Prints one text as its tokens come. A character spread over several tokens appears when it is whole."""

    def __init__(self, tokenizer, prompt):
        self.tokenizer, self.decoder, self.ended = tokenizer, codecs.getincrementaldecoder("utf-8")("replace"), False
        print(prompt, end="", flush=True)

    def write(self, token, logits=None):  # which an Explainer needs in this place
        if token == self.tokenizer.eot:
            self.end()
        elif not self.ended:
            print(self.decoder.decode(self.tokenizer.decode_bytes([token])), end="", flush=True)

    def end(self):
        if not self.ended:
            print(self.decoder.decode(b"", final=True))
        self.ended = True


class Explainer:
    """Prints a table instead: a row for each token chosen. Probabilities are the model's own, before temperature,
    top_k and top_p change them."""

    def __init__(self, tokenizer, prompt):
        self.tokenizer, self.nats, self.bytes = tokenizer, 0.0, 0
        self.colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
        print(f"{prompt}\n{'token':<18}{'chance':>8}{'rank':>7}{'entropy':>9}   instead of", flush=True)

    def show(self, token):
        """A token as a visible, quoted string, at most 16 long; a part of a character as its bytes, such as \\xe6."""
        text = self.tokenizer.decode_bytes([token]).decode("utf-8", errors="backslashreplace")
        text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
        return f'"{text}"' if len(text) <= 14 else f'"{text[:13]}…"'

    def write(self, token, logits):
        logs = torch.log_softmax(logits.cpu().double(), dim=-1)  # (V,); MPS has no float64
        chance, entropy = logs[token].exp().item(), -(logs.exp() * logs.nan_to_num(neginf=0)).sum().item()
        rank = int((logs > logs[token]).sum()) + 1
        best = [i for i in logs.topk(min(4, len(logs))).indices.tolist() if i != token][:3]
        others = "  ".join(f"{self.show(i)} {logs[i].exp():.1%}" for i in best)
        cell = self.show(token)
        cell += " " * (18 - sum(1 + (unicodedata.east_asian_width(c) in "WF") for c in cell))  # W, F: two columns wide
        if self.colour:  # green, yellow, red: expected, possible, a surprise
            cell = f"\033[{32 if chance > 0.5 else 33 if chance > 0.1 else 31}m{cell}\033[0m"
        print(f"{cell}{chance:>8.1%}{rank:>7,}{entropy / math.log(2):>9.2f}   {others}", flush=True)
        self.nats -= logs[token].item()
        if token != self.tokenizer.eot:
            self.bytes += len(self.tokenizer.decode_bytes([token]))

    def end(self):
        if self.bytes:
            print(f"{self.nats / math.log(2) / self.bytes:.3f} bits per byte: what this text of {self.bytes:,} "
                  "bytes costs under the model that wrote it; entropy is in bits a token")


def write_texts(model, s, prompt):
    """Writes num_samples texts as one batch: the first appears as it is chosen, the others when all are done."""
    ids = encode_prompt(model, prompt)
    if len(ids) > model.config.block_size:
        print(f"note: the prompt has {len(ids):,} tokens; the model sees the last {model.config.block_size:,}",
              file=sys.stderr)
    idx = torch.tensor([ids] * s.num_samples, device=model.device)  # (num_samples, T)
    first, columns = (Explainer if s.explain else Writer)(model.tokenizer, prompt), []
    over = torch.zeros(s.num_samples, dtype=torch.bool)
    try:
        for tokens, logits in stream(model, idx, s.max_new_tokens, s.temperature, s.top_k, s.top_p, s.seed):
            columns.append(tokens.cpu())  # (num_samples,)
            first.write(columns[-1][0].item(), logits[0])
            over |= columns[-1] == (-1 if model.tokenizer.eot is None else model.tokenizer.eot)
            if over.all():
                break
    finally:  # also after Ctrl-C
        first.end()
    for row in torch.stack(columns, dim=1)[1:].tolist():
        print("---------------")
        writer = Writer(model.tokenizer, prompt)
        for token in row:
            writer.write(token)
        writer.end()


def converse(model, s):
    """Asks for prompts and writes on from each, until the input ends."""
    with contextlib.suppress(ImportError):  # not on Windows, whose terminal has a history of its own
        import readline  # noqa: F401 - lets input() know the arrow keys
    print("Each line is a prompt. Ctrl-C stops a text; Ctrl-D (on Windows Ctrl-Z, Enter) or an empty line ends.")
    while True:
        try:
            prompt = input("> ")
            if not prompt:
                return
            write_texts(model, s, prompt)
        except UserError as error:  # a character that the vocabulary lacks is no reason to go
            print(f"error: {error}", file=sys.stderr)
        except UnicodeDecodeError:
            print("error: that was no UTF-8 text", file=sys.stderr)
        except KeyboardInterrupt:
            print()
        except EOFError:
            return print()


def answer(s, where, device, prompt):
    """Reads the model, and does with it what the settings ask for."""
    model = model_from(read_model(where))
    if s.export:
        model.save_pretrained(s.export)
        print(f"{s.export} is ready, made from {where}: AutoModelForCausalLM.from_pretrained({s.export!r})")
        return
    if model.tokenizer is None:
        raise UserError(f"{where} has no tokenizer that can be used here: generate from token ids in Python instead")
    model = model.to(device, pick_dtype(s.dtype, device))
    if s.interactive:
        print(f"This is {where}.", end=" ")
        converse(model, s)
    else:
        write_texts(model, s, prompt)
        if not s.init_from and not s.checkpoint:
            print(f"note: written by {where}, the newest model here", file=sys.stderr)  # stdout is for the text


@reports_mistakes
def main(argv=None):
    s, _ = parse_settings(Settings, argv, __doc__, bare="prompt")
    check_settings(s)
    keep_memory()
    device, prompt = pick_device(s.device), read_prompt(s.prompt)
    try:
        answer(s, s.init_from or s.checkpoint or newest_checkpoint(), device, prompt)
    except KeyboardInterrupt:
        return 130
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(f"{device} is out of memory: lower num_samples, or take a smaller model") from None
    return 0


if __name__ == "__main__":
    sys.exit(main())
