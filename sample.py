"""Let a trained model write.

    python sample.py                                        # from the newest out/*/best.pt
    python sample.py "Once there was" --num_samples=3       # go on from a prompt, three times
    python sample.py --temperature=0                        # always the likeliest token; higher is more daring
    python sample.py --prompt=- < beginning.txt             # the prompt from standard input
"""
import codecs
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from train_gpt2 import GPT, UserError, keep_memory, parse_settings, pick_device, reports_mistakes


@dataclass
class Settings:
    prompt: str = ""  # the text to go on from; empty: a new document; -: standard input
    checkpoint: str = ""  # empty: the best.pt most recently written under out/
    num_samples: int = 1  # texts to write
    max_new_tokens: int = 200  # tokens each, at most; <|endoftext|> ends a text before that
    temperature: float = 0.8  # below 1 the likely grows likelier; 0: always the likeliest token; 1: as learned
    top_k: int | None = None  # choose among so many likeliest tokens only; None: among all
    seed: int | None = None  # the same seed writes the same text; None: another one each time
    device: str = "auto"  # auto, cpu, cuda, mps


def newest_checkpoint():
    """The best.pt most recently written under out/. Raises UserError where there is none."""
    found = sorted(Path("out").glob("*/best.pt"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise UserError("no checkpoint under out/: train one with python train_gpt2.py, or name it: --checkpoint=FILE")
    return found[-1]


def check_settings(s):
    """Raises UserError for a value out of range."""
    for name, least in dict(num_samples=1, max_new_tokens=1, temperature=0, top_k=1, seed=0).items():
        value = getattr(s, name)
        if value is not None and value < least:
            raise UserError(f"{name} is {value}: it must be at least {least}")


class Writer:
    """Prints one text as its tokens come. A character spread over several tokens appears when it is whole."""

    def __init__(self, tokenizer, prompt):
        self.tokenizer, self.decoder, self.ended = tokenizer, codecs.getincrementaldecoder("utf-8")("replace"), False
        print(prompt, end="", flush=True)

    def write(self, token):
        if token == self.tokenizer.eot:
            self.end()
        elif not self.ended:
            print(self.decoder.decode(self.tokenizer.decode_bytes([token])), end="", flush=True)

    def end(self):
        if not self.ended:
            print(self.decoder.decode(b"", final=True))
        self.ended = True


def write_texts(model, s, prompt):
    """Writes num_samples texts as one batch: the first appears as it is chosen, the others when all are done."""
    ids = model.encode_prompt(prompt)
    if len(ids) > model.config.block_size:
        print(f"note: the prompt has {len(ids):,} tokens; the model sees the last {model.config.block_size:,}",
              file=sys.stderr)
    idx = torch.tensor([ids] * s.num_samples, device=model.device)  # (num_samples, T)
    first, columns = Writer(model.tokenizer, prompt), []
    over = torch.zeros(s.num_samples, dtype=torch.bool)
    for tokens, _ in model.stream(idx, s.max_new_tokens, s.temperature, s.top_k, None, s.seed):
        columns.append(tokens.cpu())  # (num_samples,)
        first.write(columns[-1][0].item())
        over |= columns[-1] == (-1 if model.tokenizer.eot is None else model.tokenizer.eot)
        if over.all():
            break
    first.end()
    for row in torch.stack(columns, dim=1)[1:].tolist():
        print("---------------")
        writer = Writer(model.tokenizer, prompt)
        for token in row:
            writer.write(token)
        writer.end()


@reports_mistakes
def main(argv=None):
    s, _ = parse_settings(Settings, argv, __doc__, bare="prompt")
    check_settings(s)
    keep_memory()
    model = GPT.from_checkpoint(s.checkpoint or newest_checkpoint(), pick_device(s.device))
    write_texts(model, s, sys.stdin.read() if s.prompt == "-" else s.prompt)
    return 0


if __name__ == "__main__":
    sys.exit(main())
