"""GPT-2s of OpenAI and transformers become checkpoints, their logits and ids unchanged; a folder
that means harm is
refused in one line."""

import json
import math
import os
import pickle
import socket
import subprocess
import sys

import hub
import pytest
import torch
from conftest import ROOT, fails

import prepare_data
from train_gpt2 import GPT, UserError

transformers = pytest.importorskip("transformers")
SIZES = [dict(n_layer=1, n_head=1, n_embd=16), dict(n_layer=2, n_head=3, n_embd=48), dict(n_layer=3,
     n_head=4, n_embd=64)]


def theirs_of(vocab_size=300, **shape):
    """A random GPT-2 of transformers', its biases and norms too."""
    torch.manual_seed(len(shape))
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=vocab_size,
        n_positions=24, bos_token_id=0, eos_token_id=0, **shape)).eval()
    for parameter in model.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    return model


def converted(folder, tmp_path):
    """The checkpoint that the command makes of a folder, and its model."""
    out = tmp_path / "converted"
    assert prepare_data.main([str(folder), f"--out_dir={out}"]) == 0
    return torch.load(out / "best.pt", weights_only=True), GPT.from_checkpoint(out / "best.pt")


def agree(ours, theirs):
    """The same logits to 1e-4."""
    idx = torch.randint(ours.config.vocab_size, (2, 20), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert (ours(idx)[0] - theirs(idx).logits).abs().max() < 1e-4


def write_tokenizer(tokens, merges, folder):
    """vocab.json and merges.txt as GPT-2's own tokenizer has them."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = iter(range(256, 512))
    characters = [chr(byte if byte in shown else next(hidden)) for byte in range(256)]

    def name(token):
        return "".join(characters[byte] for byte in token)

    names = [*map(name, tokens), "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({name: i for i, name in enumerate(names)}))
    lines = ["#version: 0.2", *(f"{name(a)} {name(b)}" for a, b in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


@pytest.fixture(scope="module")
def trained():
    """(spec, tokens, merges) of a BPE trained by hand."""
    merges = prepare_data.train_bpe([(ROOT / "README.md").read_text("utf-8")], 600)
    spec = prepare_data.bpe_spec(merges)
    return spec, [token.encode("latin-1") for token in spec["ranks"]], merges


@pytest.mark.parametrize("form", ["safetensors", "bin", "older bin", "shards"])
@pytest.mark.parametrize("size", SIZES, ids=lambda size: f"{size['n_layer']} layers")
def test_their_models_open_here(size, form, tmp_path):
    theirs = theirs_of(**size)
    theirs.save_pretrained(tmp_path, max_shard_size="40KB" if form == "shards" else "1GB")
    if form.endswith("bin"):
        (tmp_path / "model.safetensors").unlink()
        state = theirs.state_dict()
        if (
            form == "older bin"
        ):  # as OpenAI's gpt2 stands on the hub: no prefix, no head, the mask saved, no zip
            state = {name.removeprefix("transformer."): t for name,
                t in state.items() if name != "lm_head.weight"}
            state["h.0.attn.bias"] = torch.ones(1, 1, 24, 24).tril()
            state["h.0.attn.masked_bias"] = torch.tensor(-1e4)
        torch.save(state, tmp_path / "pytorch_model.bin",
            _use_new_zipfile_serialization=form == "bin")
    checkpoint, model = converted(tmp_path, tmp_path)
    agree(model, theirs)
    assert checkpoint.keys() == {"model", "step", "config", "settings", "tokenizer",
            "best_val_loss", "code"}
    assert (checkpoint["step"] == 0 and checkpoint["best_val_loss"] == math.inf and checkpoint[
            "tokenizer"] == {})


def test_where_checkpoints_go(tmp_path, monkeypatch, capsys):
    """out/<name of the folder>/best.pt, which is not written twice."""
    monkeypatch.chdir(tmp_path)
    theirs_of(**SIZES[0]).save_pretrained("models/mine")
    path = prepare_data.convert_weights("models/mine")
    assert (path.as_posix() == "out/mine/best.pt" and
            "--checkpoint=out/mine/best.pt" in capsys.readouterr().out)
    path.write_bytes(b"kept")
    assert prepare_data.main(["models/mine"]) == 0
    assert "is there already" in capsys.readouterr().out and path.read_bytes() == b"kept"
    with pytest.raises(UserError, match="gpt5 cannot be downloaded"):
        prepare_data.convert_weights("gpt5")


# ---- Tokenizers ----


def test_gpt2s_tokenizer_is_recognised(gpt2_vocabulary, tmp_path):
    """By its tokens, or by its size where no tokenizer was saved; not by its size alone."""
    tokens = [gpt2_vocabulary.decode_bytes([i]) for i in range(50256)]
    write_tokenizer(tokens, [(t[:1], t[1:]) for t in tokens if len(t) > 1], tmp_path)
    assert prepare_data.read_tokenizer(tmp_path, 50257) == {"kind": "gpt2"}
    vocabulary = json.loads((tmp_path / "vocab.json").read_text())
    (tmp_path / "vocab.json").write_text(json.dumps({token: (i + 1) % 50257 for token,
        i in vocabulary.items()}))
    assert prepare_data.read_tokenizer(tmp_path, 50257) == {}
    (tmp_path / "vocab.json").unlink()
    assert prepare_data.read_tokenizer(tmp_path, 50257) == {"kind": "gpt2"}


def changed(**changes):
    """Changes a part of tokenizer.json: a function from what it holds."""
    return lambda whole: (whole.update if "normalizer" in changes else whole[
        "pre_tokenizer"].update)(changes)


def swapped(a, b):
    """Lets the tokens at two places change them."""

    def change(whole):
        vocab = whole["model"]["vocab"]
        names = sorted(vocab, key=vocab.get)
        vocab[names[a]], vocab[names[b]] = vocab[names[b]], vocab[names[a]]

    return change


def bytes_lacking(model):
    """As a trainer leaves out what its texts do not have: one byte and all that was merged from
    it."""
    gone = [token for token in model["vocab"] if "\u0143" in token]  # the byte ad
    kept = [token for token in sorted(model["vocab"], key=model["vocab"].get) if token not in gone]
    merges = [m for m in model["merges"] if "\u0143" not in "".join(m)]
    return {"vocab": {token: i for i, token in enumerate(kept)}, "merges": merges}


def another_end(whole):
    vocab = whole["model"]["vocab"]
    vocab["<pad>"] = vocab.pop("<|endoftext|>")


OTHER_TOKENIZERS = {"another end": another_end, "spaces before texts": changed(
    add_prefix_space=True), "words not cut": changed(use_regex=False), "cut elsewhere": changed(
    type="Whitespace"), "accents taken apart": changed(normalizer={"type": "NFD"}),
     "two merges in another order": lambda whole: whole["model"]["merges"].reverse(),
     "two tokens in another order": swapped(300, 301), "the end not at the end": swapped(300, -1),
     "a byte lacking": lambda whole: whole["model"].update(bytes_lacking(whole["model"]))}


@pytest.mark.parametrize("name", [None, *OTHER_TOKENIZERS])
def test_a_tokenizer_that_reads_otherwise_is_none_of_ours(name, trained, tmp_path):
    """Its ids would be wrong: the model is converted without it. Unchanged (None) it is kept, from
    vocab.json and merges.txt as from tokenizer.json."""
    spec, tokens, merges = trained
    write_tokenizer(tokens, merges, tmp_path)
    theirs_of(len(tokens) + 1, **SIZES[0]).save_pretrained(tmp_path)
    folder = tmp_path / "theirs"
    transformers.AutoTokenizer.from_pretrained(tmp_path).save_pretrained(folder)
    (folder / "vocab.json").unlink(missing_ok=True)
    whole = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    OTHER_TOKENIZERS.get(name, lambda whole: None)(whole)
    (folder / "tokenizer.json").write_text(json.dumps(whole), encoding="utf-8")
    size = len(whole["model"]["vocab"])
    assert prepare_data.read_tokenizer(folder, size) == ({} if name else spec)
    if name is None:
        assert converted(tmp_path, tmp_path)[0]["tokenizer"] == spec


def test_a_damaged_tokenizer_is_none(tmp_path):
    for vocabulary, merges in (("[]", ""), ('{"a": "x"}', ""), ("{", ""), ('{"a": [], "b": {}}',
             "a b"), ("null", "\xff"), ('{"<|endoftext|>": 0}', ""), ("[" * 100_000, ""), (
            '{"漢": 0, "<|endoftext|>": 1}', ""),):
        (tmp_path / "vocab.json").write_text(vocabulary, encoding="utf-8")
        (tmp_path / "merges.txt").write_text(merges, encoding="latin-1")
        assert prepare_data.read_tokenizer(tmp_path, 300) == {}


# ---- The hub ----


def convert(environment, home):
    """The command in a process of its own, because huggingface_hub reads its environment when it
    is imported."""
    environment = {name: value for name, value in environment.items() if not name.startswith((
        "HF_HUB", "HF_TOKEN"))}
    return subprocess.run([sys.executable, ROOT / "prepare_data.py", "gpt2"], cwd=home, text=True,
         capture_output=True, timeout=200, env=environment | {"HF_HOME": str(home / "hf")})


def test_gpt2_from_the_hub(tmp_path):
    """The repository as it stands on the hub, small: downloaded once, then at hand without a
    network."""
    theirs, folder = theirs_of(50257, **SIZES[1]), tmp_path / "served"
    theirs.save_pretrained(folder)
    for name in ("vocab.json", "merges.txt", "pytorch_model.bin"):
        (folder / name).write_bytes(b"damaged")
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    best = tmp_path / "out" / "openai-gpt2" / "best.pt"
    with hub.serve(models={"openai-community/gpt2": files}) as (environment, server):
        done = convert(environment, tmp_path)
        assert done.returncode == 0 and "--checkpoint=gpt2" in done.stdout, done.stderr
        agree(GPT.from_checkpoint(best), theirs)
        assert "model.safetensors" in " ".join(server.requests) and ".bin" not in " ".join(
                server.requests)
        server.requests.clear()
        best.unlink()
        assert convert(environment, tmp_path).returncode == 0 and best.exists()
        assert "gpt2" not in " ".join(server.requests)


def test_the_hub_without_gpt2_or_out_of_reach(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        nobody = f"http://127.0.0.1:{free.getsockname()[1]}"
        done = convert(os.environ | {"HF_ENDPOINT": nobody}, tmp_path)
    assert done.returncode == 2 and done.stderr.startswith("error: gpt2 cannot be downloaded"), (
            done.stderr)
    assert len(done.stderr.splitlines()) == 1 and not (tmp_path / "out").exists()


# ---- Harm ----


class Bomb:
    def __reduce__(self):
        return (open, ("exploded", "w"))


def weights(**changes):
    """Damages the weights: a function from the folder."""

    def change(folder):
        state = torch.load(folder / "pytorch_model.bin", weights_only=True)
        for name, value in changes.items():
            state[name.replace("__", ".")] = value
        torch.save({name: value for name, value in state.items() if value is not None},
            folder / "pytorch_model.bin")

    return change


def config(**changes):
    def change(folder):
        values = json.loads((folder / "config.json").read_text()) | changes
        values = {name: value for name, value in values.items() if value != "gone"}
        (folder / "config.json").write_text(json.dumps(values))

    return change


def claims(n_embd):
    """A model of that width whose tensors fit its config, each one number repeated: kilobytes
    that claim terabytes."""

    def change(folder):
        config(n_embd=n_embd, n_head=1)(folder)
        with torch.device("meta"):
            model = transformers.GPT2LMHeadModel(transformers.GPT2Config.from_pretrained(folder))
        torch.save({name: torch.zeros(1).expand(t.shape) for name, t in model.state_dict().items()},
             folder / "pytorch_model.bin")

    return change


def replaced(name, data):
    return lambda folder: (folder / name).write_bytes(data)


def safe(header, size=8):
    """model.safetensors with this header."""
    text = json.dumps(header).encode()
    return replaced("model.safetensors", len(text).to_bytes(8, "little") + text + bytes(size))


WTE, LN = "transformer__wte__weight", "transformer__ln_f__bias"
DAMAGE = {"a pickle that opens a file": weights(**{LN: Bomb()}), "a bare pickle": replaced(
    "pytorch_model.bin", pickle.dumps(Bomb())), "a pickle in the old form": lambda f: torch.save({
    "a": Bomb()}, f / "pytorch_model.bin", _use_new_zipfile_serialization=False),
     "a path in place of a tensor": weights(**{WTE: "/etc/passwd"}),
    "a tensor larger than memory": weights(**{WTE: torch.zeros(1).expand(10**6, 10**6)}),
     "a model larger than memory": claims(200_000), "a tensor without numbers": weights(**{
    WTE: torch.empty(300, 48, device="meta")}), "a sparse tensor": weights(**{WTE: torch.zeros(300,
     48).to_sparse()}), "whole numbers": weights(**{LN: torch.zeros(48, dtype=torch.int64)}),
     "another shape": weights(**{LN: torch.zeros(47)}), "one too many": weights(**{
    "transformer__x": torch.zeros(1)}), "one missing": weights(**{LN: None}),
    "a head of its own": weights(lm_head__weight=torch.ones(300, 48)),
    "a head of another shape": weights(lm_head__weight=torch.ones(3)),
    "no dict": lambda f: torch.save([1, 2], f / "pytorch_model.bin"), "nothing": replaced(
    "pytorch_model.bin", b""), "keys that are numbers": lambda f: torch.save({1: torch.zeros(1)},
    f / "pytorch_model.bin"), "no weights at all": lambda f: (f / "pytorch_model.bin").unlink(),
     "safetensors that are none": replaced("model.safetensors", b"PK" * 100),
     "safetensors that claim terabytes": safe({"a": {"dtype": "F32", "shape": [10**6, 10**6],
     "data_offsets": [0, 4 * 10**12]}}), "a header that claims more than the file": replaced(
    "model.safetensors", (2**40).to_bytes(8, "little") + b"{}"),
    "safetensors of another model": safe({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0,
    8]}}), "no JSON": replaced("config.json", b"{"), "no text": replaced("config.json",
    b"\xff\xfe"), "a list": replaced("config.json", b"[]"), "no config": lambda f: (
    f / "config.json").unlink(), "no sizes": replaced("config.json", b"{}"),
    "another architecture": config(model_type="llama"), "another GELU": config(
    activation_function="gelu"), "no activation": config(activation_function=["relu"]),
     "another epsilon": config(layer_norm_epsilon=1e-6), "an untied head": config(
    tie_word_embeddings=False), "a wide MLP": config(n_inner=100), "other scores": config(
    scale_attn_by_inverse_layer_idx=True), "unscaled scores": config(scale_attn_weights=False),
     "a billion layers": config(n_layer=10**9), "a vocabulary beyond bounds": config(
    vocab_size=2**60), "a huge vocabulary": config(vocab_size=2**24), "many positions": config(
    n_positions=2**24), "heads that do not divide": config(n_head=5), "words for numbers": config(
    n_layer="two"), "no heads": config(n_head="gone"), "not a number": weights(**{LN: torch.full((
    48,), math.nan)}), "cross attention": config(add_cross_attention=True),
    "an infinite number": weights(transformer__h__0__ln_1__weight=torch.full((48,), -math.inf)),
     "nested too deeply": replaced("config.json", b"[" * 100_000), "layers true": config(
    n_layer=True), "fewer layers": config(n_layer=1), "more layers": config(n_layer=3)}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_folder_that_means_harm(name, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    theirs = theirs_of(**SIZES[1])
    theirs.config.save_pretrained(tmp_path)
    torch.save(theirs.state_dict(), tmp_path / "pytorch_model.bin")
    DAMAGE[name](tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    fails(prepare_data.main, ["."], capsys)
    assert {
        path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()
    } == before  # nothing exploded


def test_that_folder_unharmed(tmp_path):
    """What the damage is done to is a folder that opens."""
    theirs = theirs_of(**SIZES[1], n_inner=4 * 48)  # as it may say, although it need not
    theirs.config.save_pretrained(tmp_path)
    config(activation_function="gone", starts_documents=True)(tmp_path)  # GPT-2's, then
    torch.save(theirs.state_dict(), tmp_path / "pytorch_model.bin")
    checkpoint, model = converted(tmp_path, tmp_path)
    agree(model, theirs)
    assert checkpoint["settings"] == {"rows": "documents"}


def test_weights_that_need_a_library_that_is_not_here(tmp_path, capsys, monkeypatch):
    theirs_of(**SIZES[1]).save_pretrained(tmp_path)
    monkeypatch.setattr(prepare_data.importlib.util, "find_spec", lambda name: None)
    assert "pip install safetensors" in fails(prepare_data.main, [str(tmp_path)], capsys)
