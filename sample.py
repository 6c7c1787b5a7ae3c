"""Generate text from a trained model, or export the model to Hugging Face transformers.

    python sample.py                                          # from the newest out/*/best.pt
    python sample.py "Once there was" --num_samples=3         # continue a prompt, three times
    python sample.py "The meaning of life" --checkpoint=gpt2  # after: python prepare_data.py gpt2
    python sample.py --temperature=0                          # greedy: always the likeliest token
    python sample.py --prompt=@beginning.txt                  # the prompt from a file; -: stdin
    python sample.py "Once there was" --explain               # a table of the model's decisions
    python sample.py --interactive                            # one prompt after another
    python sample.py --export=folder                          # a folder for transformers

The model, the KV cache and the choice of each token are in train_gpt2.py. This script shows the
tokens and writes the folder.
"""
import codecs
import contextlib
import copy
import io
import json
import math
import os
import sys
import tempfile
import unicodedata
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from train_gpt2 import (  # before torch: it sets how threads wait
    END_OF_TEXT,
    UserError,
    check_ranges,
    encode_prompt,
    is_out_of_memory,
    keep_memory,
    load_model,
    parse_settings,
    pick_device,
    pick_dtype,
    reports_mistakes,
    stream_tokens,
    write_atomically,
    write_text,
)

# isort: split
import torch


@dataclass
class Settings:
    # the text
    prompt: str = ""  # text to continue; empty: a new document; -: stdin; @FILE: the file's text
    num_samples: int = 1  # texts to generate
    max_new_tokens: int = 200  # tokens per text at most; it also ends at <|endoftext|>
    # the choice of each token
    temperature: float = 0.8  # below 1 favours likely tokens; 0: always the likeliest
    top_k: int | None = None  # choose among the k likeliest tokens only
    top_p: float | None = None  # choose among the fewest tokens with this total probability
    seed: int | None = None  # the same seed gives the same text; None: a new one each time
    # the model
    checkpoint: str = ""  # a checkpoint, or gpt2 .. gpt2-xl; empty: the newest out/*/best.pt
    device: str = "auto"  # auto (CUDA, else MPS, else CPU), cpu, cuda, cuda:1, mps
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # of the weights
    # what to do instead
    explain: bool = False  # a row per token: its probability, and the alternatives
    interactive: bool = False  # ask for prompts; Ctrl-C stops a text, an empty line ends
    export: str = ""  # write the model to this folder, for transformers


def newest_checkpoint():
    """The latest out/*/best.pt that training wrote. Raises UserError where there is none."""
    # Converted weights have no log beside them: they are used only when they are named
    found = [path for path in Path("out").glob("*/best.pt") if path.with_name("log.csv").exists()]
    if not found:
        raise UserError("there is no trained model under out/: train one with python "
                        "train_gpt2.py, or name one: --checkpoint=FILE")
    return max(found, key=lambda path: path.stat().st_mtime)


def check_settings(s):
    """Raise UserError for values out of range, and for settings that exclude each other."""
    check_ranges(s, num_samples=(1, 10_000), max_new_tokens=(1, 10**9), temperature=(0, 1e6),
                 top_k=(1, 2**24), top_p=(1e-6, 1), seed=(0, 2**63 - 1))
    if s.explain and s.num_samples > 1:
        raise UserError("explain shows one text: leave out num_samples")
    if s.interactive and s.prompt:
        raise UserError("interactive asks for its prompts: leave out the prompt")
    if s.export and (s.prompt or s.explain or s.interactive):
        raise UserError("export generates no text: leave out prompt, explain and interactive")


def read_prompt(prompt):
    """The text that --prompt stands for. Raises UserError for what cannot be read as UTF-8."""
    try:
        if prompt == "-":
            text = sys.stdin.read()
            text.encode()  # some locales let invalid bytes through as surrogates: they fail here
            return text
        return Path(prompt[1:]).read_text(encoding="utf-8") if prompt.startswith("@") else prompt
    except (OSError, ValueError) as error:  # ValueError: invalid UTF-8, or an impossible name
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        source = "stdin" if prompt == "-" else prompt[1:] or "a file without a name"
        raise UserError(f"cannot read the prompt from {source}: {reason}") from None


def note(text):
    """Print a remark to stderr: stdout is for the text."""
    print(f"note: {text}", file=sys.stderr)


# ---- Showing the tokens --------------------------------------------------------------------------


class Writer:
    """Print a text token by token. A token may be a part of a character: the decoder holds its
    bytes back until the character is complete."""

    def __init__(self, tokenizer, prompt):
        self.tokenizer, self.ended = tokenizer, False
        self.decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        print(prompt, end="", flush=True)

    def write(self, token, logits=None):  # logits: unused here, an Explainer needs them
        if token == self.tokenizer.eot:
            self.end()
        elif not self.ended:
            data = self.tokenizer.decode_bytes([token])
            print(self.decoder.decode(data), end="", flush=True)

    def end(self):
        if not self.ended:
            print(self.decoder.decode(b"", final=True))
        self.ended = True


class Explainer:
    """Print a table with a row per token: its probability, its rank, the entropy of the
    distribution in bits (how undecided the model was) and the likeliest alternatives.
    Probabilities are the model's own, before temperature, top_k and top_p change them."""

    def __init__(self, tokenizer, prompt):
        self.tokenizer, self.nats, self.bytes = tokenizer, 0.0, 0
        self.coloured = sys.stdout.isatty() and "NO_COLOR" not in os.environ
        print(prompt)
        print(f"{'token':<18}{'prob':>8}{'rank':>7}{'entropy':>9}   alternatives", flush=True)

    def show(self, token):
        """A token in quotes, at most 16 characters. Bytes of an incomplete character and
        invisible characters are escaped: \\xe6, \\n."""
        text = self.tokenizer.decode_bytes([token]).decode("utf-8", errors="backslashreplace")
        text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
        return f'"{text}"' if len(text) <= 14 else f'"{text[:13]}…"'

    def write(self, token, logits):
        log_probs = torch.log_softmax(logits.cpu().double(), dim=-1)  # (V,); MPS has no float64
        probs = log_probs.exp()
        prob = probs[token].item()
        rank = int((log_probs > log_probs[token]).sum()) + 1
        nats = -(probs * log_probs.nan_to_num(neginf=0)).sum().item()  # 0 * -inf counts as 0
        best = log_probs.topk(min(4, len(log_probs))).indices.tolist()
        others = [f"{self.show(i)} {probs[i]:.1%}" for i in best if i != token][:3]
        cell = self.show(token)
        # Padded by hand, because wide characters (W, F) take two columns of a terminal
        cell += " " * (18 - sum(1 + (unicodedata.east_asian_width(c) in "WF") for c in cell))
        if self.coloured:  # green: expected, yellow: possible, red: a surprise
            cell = f"\033[{32 if prob > 0.5 else 33 if prob > 0.1 else 31}m{cell}\033[0m"
        print(f"{cell}{prob:>8.1%}{rank:>7,}{nats / math.log(2):>9.2f}   {'  '.join(others)}",
              flush=True)
        self.nats -= log_probs[token].item()
        if token != self.tokenizer.eot:
            self.bytes += len(self.tokenizer.decode_bytes([token]))

    def end(self):
        if self.bytes:
            bits = self.nats / math.log(2) / self.bytes
            print(f"{bits:.3f} bits per byte: -log2 of the text's probability, divided by its "
                  f"{self.bytes:,} bytes")


def write_texts(model, s, prompt):
    """Generate num_samples texts as one batch and print them: the first one while it is
    generated, the others when all are done."""
    ids = encode_prompt(model, prompt)
    block_size, eot = model.config.block_size, model.tokenizer.eot
    if len(ids) > block_size:
        note(f"the prompt has {len(ids):,} tokens; the model sees the last {block_size:,}")
    idx = torch.tensor([ids] * s.num_samples, device=model.device)  # (num_samples, T)
    first = (Explainer if s.explain else Writer)(model.tokenizer, prompt)
    columns = []  # one tensor of (num_samples,) per step
    ended = torch.zeros(s.num_samples, dtype=torch.bool)
    options = (s.max_new_tokens, s.temperature, s.top_k, s.top_p, s.seed)
    try:
        for tokens, logits in stream_tokens(model, idx, *options):
            columns.append(tokens.cpu())
            first.write(columns[-1][0].item(), logits[0])
            ended |= columns[-1] == (-1 if eot is None else eot)
            if ended.all():
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
    """Ask for prompts and continue each, until the input ends."""
    with contextlib.suppress(ImportError):  # Windows' terminal has a line editor of its own
        import readline  # noqa: F401 - gives input() arrow keys and a history
    print("Each line is a prompt. Ctrl-C stops a text. An empty line or Ctrl-D (on Windows "
          "Ctrl-Z, Enter) ends.")
    while True:
        try:
            prompt = input("> ")
            if not prompt:
                return
            write_texts(model, s, prompt)
        except UserError as error:  # such as a character that the vocabulary lacks
            print(f"error: {error}", file=sys.stderr)
        except UnicodeDecodeError:
            print("error: that is not UTF-8 text", file=sys.stderr)
        except KeyboardInterrupt:
            print()
        except EOFError:
            print()
            return


# ---- Export to transformers ----------------------------------------------------------------------

# torch's Linear stores these weights as (out, in), the Conv1D of transformers as (in, out)
TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
ANOTHER = ("only sample.py and GPT.from_checkpoint can use this model: it computes another "
           "function than transformers' GPT-2: ")


def export(model, folder):
    """Write a folder that transformers' AutoModelForCausalLM and AutoTokenizer open.

    Weights are written in float32. Sinusoidal positions become a learned table, which is the
    same function. Where transformers is installed, it opens the folder, and its logits are
    compared with the model's. Raises UserError for a model that computes another function, for
    a folder that holds another model's files, and where nothing can be written. The folder is
    then as it was before.
    """
    folder = Path(folder)
    check_weights(model)
    files = tokenizer_files(model) | {"config.json": as_json(config_of(model))}
    try:
        from safetensors.torch import save
        weight_file = "model.safetensors"
    except ImportError:
        save, weight_file = None, "pytorch_model.bin"
    try:
        check_folder(folder, {weight_file, *files})
        # Files are written to a temporary folder, checked there, and then moved. It lies in the
        # target or the nearest folder above that exists: moving within a disk copies nothing
        nearest = next(path for path in (folder, *folder.parents) if os.path.isdir(path))
        with tempfile.TemporaryDirectory(prefix=".export-", dir=nearest) as name:
            beside = Path(name)
            write_weights(model, beside / weight_file, save)
            for name, text in files.items():
                write_text(beside / name, text)
            compare_with_transformers(model, beside)
            folder.mkdir(parents=True, exist_ok=True)
            for name in (weight_file, *files):  # config.json last: with it the folder is whole
                os.replace(beside / name, folder / name)
    except OSError as error:
        raise UserError(f"cannot write the folder {folder} ({error.strerror or error}): choose "
                        "another") from None
    if "vocab.json" not in files:
        note("no tokenizer was written: transformers' GPT-2 has none of this kind")
    elif model.starts_documents:
        note(f"each training row was a document: for transformers, put {END_OF_TEXT} before "
             "each prompt")


def check_weights(model):
    """Raise UserError unless the model's weights have the names and shapes of GPT-2's."""
    c = model.config
    C = c.n_embd
    layer = {"ln_1": (C,), "attn.c_attn": (3 * C, C), "attn.c_proj": (C, C),
             "ln_2": (C,), "mlp.c_fc": (4 * C, C), "mlp.c_proj": (C, 4 * C)}
    modules = {f"h.{i}.{name}": shape for i in range(c.n_layer) for name, shape in layer.items()}
    expected = {"transformer.wte.weight": (c.vocab_size, C),
                "transformer.wpe.weight": (c.block_size, C)}
    for name, shape in (modules | {"ln_f": (C,)}).items():
        expected[f"transformer.{name}.weight"] = shape
        expected[f"transformer.{name}.bias"] = shape[:1]
    found = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    for name in sorted(expected.keys() | found.keys()):
        if found.get(name) != expected.get(name):
            raise UserError(f"{ANOTHER}{name} has shape {found.get(name, 'none')} here and "
                            f"{expected.get(name, 'none')} there")


def check_folder(folder, names):
    """Raise UserError where files of another model would be replaced, or be read with `names`."""
    files = list(folder.iterdir()) if os.path.isdir(folder) else []
    others = {path.name for path in files if path.suffix in (".json", ".safetensors", ".bin")}
    config = folder / "config.json"
    # A config.json of ours marks an earlier export, which is replaced
    is_ours = config in files and "starts_documents" in config.read_text("utf-8", "replace")
    others -= names if is_ours else set()
    if others:
        raise UserError(f"{folder} already holds {min(others)}, which is not from an export like "
                        "this one: choose another folder")


def write_weights(model, path, save):
    """Write float32 weights with safetensors' `save`, or with torch.save where it is None."""
    weights = {name: (tensor.t() if name.endswith(TRANSPOSED) else tensor)
               .float().contiguous().cpu() for name, tensor in model.state_dict().items()}
    if save:  # transformers wants to know which library's tensors these are
        write_atomically(path, lambda file: file.write(save(weights, {"format": "pt"})))
    else:
        write_atomically(path, lambda file: torch.save(weights, file))


def config_of(model):
    """What config.json holds: the model's shape under transformers' names."""
    c = model.config
    eot = model.tokenizer.eot if model.tokenizer else None
    return {
        "architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "vocab_size": c.vocab_size,
        "n_positions": c.block_size, "n_layer": c.n_layer, "n_head": c.n_head, "n_embd": c.n_embd,
        "activation_function": "gelu_new" if c.activation == "gelu" else c.activation,
        "resid_pdrop": c.dropout, "embd_pdrop": c.dropout, "attn_pdrop": c.dropout,
        "layer_norm_epsilon": 1e-5, "tie_word_embeddings": True,
        "bos_token_id": eot, "eos_token_id": eot,
        "starts_documents": model.starts_documents}  # for prepare_data.py; transformers ignores it


def compare_with_transformers(model, folder):
    """Raise UserError unless transformers, with the files in `folder`, computes the same
    logits as the model, those after the last of up to 1,024 random tokens."""
    try:
        import transformers
    except ImportError:
        note("transformers is not installed, so its logits were not compared with the model's")
        return
    c = model.config
    if model.device.type != "cpu" or model.transformer.wte.weight.dtype != torch.float32:
        model = copy.deepcopy(model).cpu().float()  # other dtypes round too much to compare
    idx = torch.randint(c.vocab_size, (1, min(c.block_size, 1024)),
                        generator=torch.Generator().manual_seed(0))
    [(_, ours)] = stream_tokens(model, idx, 1)  # (1, V)
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # no progress bar
            theirs = transformers.AutoModelForCausalLM.from_pretrained(folder).float().eval()
    except (KeyError, ValueError) as error:  # an activation that it does not know
        raise UserError(f"{ANOTHER}it cannot open the export ({error})") from None
    with torch.no_grad():
        difference = (theirs(idx).logits[:, -1] - ours).abs().max().item()
    scale = ours.abs().max().item()
    if not difference <= 1e-4 * scale:  # float32 rounds at 1e-7, and errors add up over layers
        raise UserError(f"{ANOTHER}logits of size {scale:.3g} differ by {difference:.2g}")


def as_json(value):
    return json.dumps(value, indent=2) + "\n"


def tokenizer_files(model):
    """{file name: its text}, as GPT-2's own tokenizer has them: vocab.json, merges.txt and
    tokenizer_config.json. Empty for tokenizers that are not byte-level BPEs."""
    tokenizer = model.tokenizer
    if tokenizer is None or tokenizer.spec["kind"] not in ("gpt2", "bpe"):
        return {}
    characters = byte_characters()
    tokens = [tokenizer.decode_bytes([i]) for i in range(tokenizer.eot)]
    names = {token: "".join(characters[byte] for byte in token) for token in tokens}
    ids = {name: i for i, name in enumerate([*names.values(), END_OF_TEXT])}
    lines = [f"{names[left]} {names[right]}" for left, right in merges_of(tokens)]
    special = dict.fromkeys(("bos_token", "eos_token", "unk_token"), END_OF_TEXT)
    return {
        "vocab.json": json.dumps(ids, ensure_ascii=False),
        "merges.txt": "\n".join(["#version: 0.2", *lines]) + "\n",
        "tokenizer_config.json": as_json(special | {
            "tokenizer_class": "GPT2Tokenizer", "model_max_length": model.config.block_size})}


def byte_characters():
    """256 characters that stand for the bytes in vocab.json. GPT-2 writes printable bytes as
    themselves and the others as the characters from number 256 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return "".join(chr(byte if byte in printable else next(others)) for byte in range(256))


def merges_of(tokens):
    """[(left, right), ...]: the merge that made each token of two or more bytes, in order.

    Earlier merges reduce a token's bytes to two parts, which its own merge joins.
    Raises UserError for tokens that no merges make.
    """
    rank, merges = {token: i for i, token in enumerate(tokens)}, []
    for token in tokens:
        parts = [token[i:i + 1] for i in range(len(token))]
        while len(parts) > 2:
            ranks = [rank.get(a + b, math.inf) for a, b in zip(parts, parts[1:], strict=False)]
            i = ranks.index(min(ranks))
            if ranks[i] >= rank[token]:
                raise UserError(f"no merges make the token {token!r}: this tokenizer cannot be "
                                "exported")
            parts[i:i + 2] = [parts[i] + parts[i + 1]]
        if len(parts) == 2:
            merges.append(tuple(parts))
    return merges


# ---- The command line ----------------------------------------------------------------------------


def run(s, path, device, prompt):
    """Load the model and do what the settings ask for."""
    model = load_model(path)
    if model.is_edited:
        note(f"{path} was written by other model code. If the text is poor, go back to that code, "
             "or train again")
    if s.export:
        export(model, s.export)
        print(f"{s.export} is ready, made from {path}: "
              f"AutoModelForCausalLM.from_pretrained({s.export!r})")
        return
    if model.tokenizer is None:
        raise UserError(f"{path} has no tokenizer: generate from token ids in Python instead")
    model = model.to(device, pick_dtype(s.dtype, device))
    if s.interactive:
        print(f"This is {path}.", end=" ")
        converse(model, s)
    else:
        write_texts(model, s, prompt)
        if not s.checkpoint:
            note(f"generated by {path}, the newest model here")


@reports_mistakes
def main(argv=None):
    s, _ = parse_settings(Settings, argv, __doc__, bare="prompt")
    check_settings(s)
    keep_memory()
    device, prompt = pick_device(s.device), read_prompt(s.prompt)
    try:
        run(s, s.checkpoint or newest_checkpoint(), device, prompt)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(f"{device} is out of memory: lower num_samples, or use a smaller "
                        "model") from None
    return 0


if __name__ == "__main__":
    sys.exit(main())
