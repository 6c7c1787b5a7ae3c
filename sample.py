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
import itertools
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
    check_sampling,
    encode_prompt,
    is_out_of_memory,
    keep_memory,
    load_model,
    parse_settings,
    pick_device,
    pick_dtype,
    read_checkpoint,
    reports_mistakes,
    stream_tokens,
    write_atomically,
    write_text,
    writing,
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


def note(text):
    """Print a remark to stderr: stdout is for the text."""
    print(f"note: {text}", file=sys.stderr)


# ---- Showing the tokens --------------------------------------------------------------------------


def quoted(tokenizer, token):
    """A token in quotes, at most 16 characters. Bytes of an incomplete character and invisible
    characters are escaped: \\xe6, \\n."""
    text = ""
    for c in tokenizer.decode_bytes([token]).decode(errors="backslashreplace"):
        text += c if c.isprintable() else c.encode("unicode_escape").decode()
    if len(text) > 14:
        text = text[:13] + "…"
    return f'"{text}"'


def coloured(text, prob):
    colour = 31  # red: a surprise
    if prob > 0.5:
        colour = 32  # green: expected
    elif prob > 0.1:
        colour = 33  # yellow: possible
    return f"\033[{colour}m{text}\033[0m"


def table_row(tokenizer, token, probs):
    prob = probs[token].item()
    rank = int((probs > prob).sum()) + 1
    entropy = torch.special.entr(probs).sum().item() / math.log(2)  # entr(p): -p ln p
    best = probs.argsort(descending=True, stable=True)[:4].tolist()
    others = [f"{quoted(tokenizer, i)} {probs[i]:.1%}" for i in best if i != token]
    cell = quoted(tokenizer, token)
    wide = sum(unicodedata.east_asian_width(c) in "WF" for c in cell)  # take two columns
    cell = f"{cell:<{18 - wide}}"
    if sys.stdout.isatty() and "NO_COLOR" not in os.environ:
        cell = coloured(cell, prob)
    return f"{cell}{prob:>8.1%}{rank:>7,}{entropy:>9.2f}   {'  '.join(others[:3])}"


def print_table(tokenizer, prompt, stream):
    """Print a table with a row per token: its probability, its rank, the entropy of the
    distribution in bits (how undecided the model was) and the likeliest alternatives.
    Probabilities are the model's own, before temperature, top_k and top_p change them."""
    print(prompt)
    print(f"{'token':<18}{'prob':>8}{'rank':>7}{'entropy':>9}   alternatives "
          "(all at temperature 1)", flush=True)
    bits = 0.0  # -log2 of the text's probability
    size = 0  # the text's bytes
    try:
        for token, logits in stream:
            probs = torch.softmax(logits.cpu().double(), dim=-1)  # (V,); MPS has no float64
            print(table_row(tokenizer, token, probs), flush=True)
            bits -= torch.log2(probs[token]).item()
            if token != tokenizer.eot:
                size += len(tokenizer.decode_bytes([token]))
    finally:
        if size:
            print(f"{bits / size:.3f} bits per byte: -log2 of the text's probability, divided by "
                  f"its {size:,} bytes")


def print_text(tokenizer, prompt, stream):
    """Print a text token by token. A token may be a part of a character: the decoder holds its
    bytes back until the character is complete."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    print(prompt, end="", flush=True)
    try:
        for token, _ in stream:
            if token != tokenizer.eot:
                print(decoder.decode(tokenizer.decode_bytes([token])), end="", flush=True)
    finally:  # also after Ctrl-C
        print(decoder.decode(b"", final=True))


def first_text(model, s, ids, texts):
    """Yield (token, logits) for each token of the first text, <|endoftext|> too. On the way, add
    the tokens of all texts to `texts`, and go on until each has ended."""
    idx = torch.tensor(ids, device=model.device).expand(len(texts), -1)  # (num_samples, T)
    running = set(range(len(texts)))
    stream = stream_tokens(model, idx, s.max_new_tokens, s.temperature, s.top_k, s.top_p, s.seed)
    for tokens, logits in stream:
        tokens = tokens.tolist()
        if 0 in running:
            yield tokens[0], logits[0]
        for i in sorted(running):
            if tokens[i] == model.tokenizer.eot:
                running.remove(i)
            else:
                texts[i].append(tokens[i])
        if not running:
            return


def write_texts(model, s, prompt):
    """Generate num_samples texts as one batch and print them: the first one while it is
    generated, the others when all are done."""
    ids = encode_prompt(model, prompt)
    block_size = model.config.block_size
    if len(ids) > block_size:
        note(f"the prompt has {len(ids):,} tokens; the model sees the last {block_size:,}")
    if END_OF_TEXT in prompt:
        note(f"{END_OF_TEXT} in a prompt is plain text: it ends no document")
    if prompt.endswith(" ") and model.tokenizer.eot is not None:
        note("the prompt ends with a space. This tokenizer's words begin with one, so the text may "
             "be better without it")
    texts = [[] for _ in range(s.num_samples)]  # the tokens of each
    stream = first_text(model, s, ids, texts)
    if s.explain:
        print_table(model.tokenizer, prompt, stream)
    else:
        print_text(model.tokenizer, prompt, stream)
    for tokens in texts[1:]:
        print("---------------")
        print(prompt + model.tokenizer.decode(tokens))


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
        except (UserError, UnicodeDecodeError) as error:  # such as a character that is no token
            print(f"error: {error}", file=sys.stderr)
        except KeyboardInterrupt:
            print()
        except EOFError:
            print()
            return


# ---- Export to transformers ----------------------------------------------------------------------

OTHER_CODE = ("was trained by other code in {}: put that back (the run's folder has its "
              "train_gpt2.py), or train again")
UNFINISHED = "starts_documents: this export was not finished"
ANOTHER = ("only sample.py and GPT.from_checkpoint can use this model: it computes another "
           "function than transformers' GPT-2: ")


def check_size(model):
    """Raise UserError unless the model has as many parameters as a GPT-2 of its shape."""
    c, C = model.config, model.config.n_embd
    expected = c.n_layer * (12 * C + 13) * C  # blocks: four matrices; their biases and two norms
    expected += (c.vocab_size + c.block_size + 2) * C  # two embeddings and the last norm
    if not c.tie_weights:
        expected += c.vocab_size * C
    found = sum(tensor.numel() for tensor in model.state_dict().values())
    if found != expected:
        raise UserError(f"{ANOTHER}it has {found:,} parameters, not {expected:,}")


GELUS = {"gelu": "gelu_new", "gelu_exact": "gelu"}  # transformers' names for both


def config_of(model):
    """What config.json holds: the model's shape under transformers' names."""
    c = model.config
    eot = getattr(model.tokenizer, "eot", None)  # a model may have no tokenizer
    return {
        "architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "vocab_size": c.vocab_size,
        "n_positions": c.block_size, "n_layer": c.n_layer, "n_head": c.n_head, "n_embd": c.n_embd,
        "activation_function": GELUS.get(c.activation, c.activation),
        "resid_pdrop": c.dropout, "embd_pdrop": c.dropout, "attn_pdrop": c.dropout,
        "layer_norm_epsilon": 1e-5, "tie_word_embeddings": c.tie_weights,
        "bos_token_id": eot, "eos_token_id": eot,
        "starts_documents": model.starts_documents}  # for prepare_data.py; transformers ignores it


# GPT-2 writes these bytes as the characters from number 256 on, the others as themselves
CHARACTERS = {byte: 256 + i for i, byte in enumerate([*range(33), *range(127, 161), 173])}


def spelled(token):
    """A token's bytes as vocab.json and merges.txt have them: a character for each."""
    return token.decode("latin-1").translate(CHARACTERS)


def last_merge(token, ranks):
    """The two parts that were merged to this token, the last of its merges. `ranks` are the ids
    of all tokens. Raises UserError for a token that no merges make."""
    parts = [bytes([byte]) for byte in token]
    while len(parts) > 2:
        ranked = [ranks.get(a + b, math.inf) for a, b in itertools.pairwise(parts)]
        i = ranked.index(min(ranked))
        if ranked[i] >= ranks[token]:
            raise UserError(f"no merges make the token {token!r}: it cannot be exported")
        parts[i] += parts.pop(i + 1)
    return parts


def tokenizer_files(model):
    """{file name: its text}, as GPT-2's own tokenizer has them: vocab.json, merges.txt and
    tokenizer_config.json. Empty for tokenizers that are not byte-level BPEs."""
    tokenizer = model.tokenizer
    if tokenizer is None or tokenizer.spec["kind"] not in ("gpt2", "bpe"):
        return {}
    ids = {spelled(token): i for i, token in enumerate(tokenizer.tokens)}
    ranks = {token: i for i, token in enumerate(tokenizer.tokens[:tokenizer.eot])}
    merges = "#version: 0.2\n"
    for token in ranks:
        if len(token) > 1:
            left, right = last_merge(token, ranks)
            merges += f"{spelled(left)} {spelled(right)}\n"
    config = {"tokenizer_class": "GPT2Tokenizer", "model_max_length": model.config.block_size,
              "bos_token": END_OF_TEXT, "eos_token": END_OF_TEXT, "unk_token": END_OF_TEXT}
    return {"vocab.json": json.dumps(ids, ensure_ascii=False), "merges.txt": merges,
            "tokenizer_config.json": json.dumps(config, indent=2)}


def write_weights(model, folder):
    """Write the weights for safetensors, or for torch where that is not installed. Returns the
    file's name."""
    weights = {}
    for name, tensor in model.state_dict().items():
        if name.startswith("transformer.h.") and tensor.dim() == 2:
            tensor = tensor.t()  # torch's Linear stores (out, in), transformers' Conv1D (in, out)
        # A copy: layers may share their weights, which safetensors refuses
        weights[name] = tensor.clone(memory_format=torch.contiguous_format)
    try:
        from safetensors.torch import save
    except ImportError:
        write_atomically(folder / "pytorch_model.bin", lambda file: torch.save(weights, file))
        return "pytorch_model.bin"
    data = save(weights, {"format": "pt"})  # transformers asks which library's tensors these are
    write_atomically(folder / "model.safetensors", lambda file: file.write(data))
    return "model.safetensors"


def check_folder(folder, names):
    """Raise UserError where files of another model would be replaced, or be read with `names`."""
    others = {path.name for path in folder.glob("*")
              if path.suffix in (".json", ".safetensors", ".bin")}
    config = folder / "config.json"
    if config.is_file() and "starts_documents" in config.read_text("utf-8", "replace"):
        others -= set(names)  # an earlier export of ours, which is replaced
    if others:
        raise UserError(f"{folder} already holds {min(others)}, which is not from an export like "
                        "this one: choose another folder")


def compare_with_transformers(folder, idx, ours):
    """Raise UserError unless transformers, with the files in `folder`, computes the same logits
    after the tokens idx."""
    try:
        import transformers
    except ImportError:
        note("transformers is not installed, so its logits were not compared with the model's")
        return
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        # Weights of other sizes become random numbers, and the logits differ
        model = transformers.AutoModelForCausalLM.from_pretrained(
            folder, ignore_mismatched_sizes=True)
    except (KeyError, ValueError) as error:  # an activation that it does not know
        raise UserError(f"{ANOTHER}it cannot open the export ({error})") from None
    with torch.no_grad():
        theirs = model(idx).logits[:, -1]
    difference, size = (theirs - ours).abs().max(), ours.abs().max()
    if not difference <= 1e-4 * size:  # float32 rounds at 1e-7, and errors add up over layers
        raise UserError(f"{ANOTHER}logits of size {size:.3g} differ by {difference:.2g}")


def export(model, folder):
    """Write a folder that transformers' AutoModelForCausalLM and AutoTokenizer open.

    Weights are written in float32. Sinusoidal positions become a learned table, which is the
    same function. Where transformers is installed, it opens the folder, and its logits have to be
    the model's. Raises UserError for a model that computes another function, for a folder that
    holds another model's files, and where nothing can be written. The folder is then as it was
    before.
    """
    folder = Path(folder)
    if model.code_difference:
        raise UserError("the model " + OTHER_CODE.format(" and ".join(model.code_difference)))
    if model.device.type != "cpu" or model.transformer.wte.weight.dtype != torch.float32:
        model = copy.deepcopy(model).cpu().float()  # other dtypes round too much to compare
    check_size(model)
    texts = tokenizer_files(model)
    texts["config.json"] = json.dumps(config_of(model), indent=2)
    idx = torch.arange(1024)[None, :model.config.block_size] % model.config.vocab_size  # (1, T)
    [(_, logits)] = stream_tokens(model, idx, 1)  # (1, V)
    with writing(folder):
        # Files are written to a temporary folder, checked there, and then moved. It lies in the
        # target or the nearest folder above that exists: moving within a disk copies nothing
        nearest = next(path for path in (folder, *folder.parents) if path.is_dir())
        with tempfile.TemporaryDirectory(prefix=".export-", dir=nearest) as name:
            beside = Path(name)
            files = [write_weights(model, beside), *texts]
            for file, text in texts.items():
                write_text(beside / file, text)
            check_folder(folder, files)
            compare_with_transformers(beside, idx, logits)
            folder.mkdir(parents=True, exist_ok=True)
            # Killed from here on, it leaves a folder that transformers does not open. The true
            # config.json comes last
            write_text(folder / "config.json", UNFINISHED)
            for file in files:
                os.replace(beside / file, folder / file)
    if "vocab.json" not in texts:
        note("no tokenizer was written: transformers' GPT-2 has none of this kind")
    elif model.starts_documents:
        note(f"each training row was a document: for transformers, put {END_OF_TEXT} before "
             "each prompt")


# ---- The command line ----------------------------------------------------------------------------


def check_settings(s):
    """Raise UserError for values out of range, and for settings that exclude each other."""
    check_sampling(s.temperature, s.top_k, s.top_p)
    check_ranges(s, num_samples=(1, 10_000), max_new_tokens=(1, 10**9), seed=(0, 2**63 - 1))
    if s.explain and s.num_samples > 1:
        raise UserError("explain shows one text: leave out num_samples")
    if s.interactive and s.prompt:
        raise UserError("interactive asks for its prompts: leave out the prompt")
    if s.export and (s.prompt or s.explain or s.interactive):
        raise UserError("export generates no text: leave out prompt, explain and interactive")


def newest_checkpoint():
    """The latest out/*/best.pt that training wrote, or the ckpt.pt beside it where that best.pt
    has the weights before training. Raises UserError where there is none."""
    # Converted weights have no log beside them: they are used only when they are named
    found = [path for path in Path("out").glob("*/best.pt") if path.with_name("log.csv").exists()]
    if not found:
        raise UserError("there is no trained model under out/: train one with python "
                        "train_gpt2.py, or name one: --checkpoint=FILE")
    best = max(found, key=os.path.getmtime)
    latest = best.with_name("ckpt.pt")
    if latest.exists() and read_checkpoint(best)["step"] == 0:
        step = read_checkpoint(latest)["step"]
        if step > 0:
            note(f"{best} is of step 0, so {latest} of step {step:,} is used")
            return latest
    return best


def read_prompt(prompt):
    """The text that --prompt stands for. Raises UserError for what cannot be read as UTF-8."""
    source = "the command line"
    try:
        if prompt == "-":
            source = "stdin"
            return sys.stdin.read()
        if prompt.startswith("@"):
            source = f"{prompt[1:] or 'no name'} (@ names a file)"
            # Bytes, since a text file would lose its \r
            return Path(os.path.expanduser(prompt[1:])).read_bytes().decode("utf-8-sig")
        # What this locale could not decode may be UTF-8
        return prompt.encode(errors="surrogateescape").decode()
    except OSError as error:
        raise UserError(f"cannot read the prompt from {source}: {error.strerror}") from None
    except ValueError:
        raise UserError(f"cannot read the prompt from {source}: it is not UTF-8 text") from None


def check_logits(model, inputs, outputs):
    """A hook that runs after each forward pass. Raises UserError for logits that are not finite."""
    logits, _ = outputs
    if not logits.amax(dim=-1).isfinite().all():  # -inf may rule out some tokens, not all
        raise UserError("the model's logits are not finite: try --dtype=float32, or train it again")


def run(s, path, device, prompt):
    """Load the model and do what the settings ask for."""
    model = load_model(path)
    model.register_forward_hook(check_logits)
    if s.export:
        export(model, s.export)
        print(f"{s.export} is ready, made from {path}: "
              f"AutoModelForCausalLM.from_pretrained({s.export!r})")
        return
    if model.code_difference:
        note(f"{path} " + OTHER_CODE.format(" and ".join(model.code_difference)))
    model = model.to(device, pick_dtype(s.dtype, device))
    if s.interactive:
        print(f"This is {path}.", end=" ")
        converse(model, s)
        return
    write_texts(model, s, prompt)
    if not s.checkpoint:
        note(f"generated by {path}, the newest model here")


@reports_mistakes
def main(argv=None):
    s, _ = parse_settings(Settings, argv, __doc__, bare="prompt")
    check_settings(s)
    keep_memory()
    if sys.stdin is None:  # closed by whoever started this: it is read as an empty one
        sys.stdin = open(os.devnull, encoding="utf-8")
    with contextlib.suppress(AttributeError, OSError):  # a notebook's stdin, or one in use
        sys.stdin.reconfigure(encoding="utf-8-sig")  # whatever the locale says
    device = pick_device(s.device)
    prompt = read_prompt(s.prompt)
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
