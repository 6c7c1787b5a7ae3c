"""GPT-2s of OpenAI and transformers become checkpoints, their logits and ids unchanged; a malicious
folder is refused in one line."""
import json
import math
import socket

import hub
import pytest
import torch
from conftest import ROOT, Bomb, agree, contents, fails, random_model

import prepare_data
import sample
from train_gpt2 import GPT, Tokenizer

transformers = pytest.importorskip("transformers")
SIZES = [dict(n_layer=1, n_head=1, n_embd=16), dict(n_layer=2, n_head=3, n_embd=48)]


def theirs_of(vocab_size=300, **shape):
    """A random GPT-2 of transformers', its biases and norms too."""
    torch.manual_seed(1)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(
        vocab_size=vocab_size, n_positions=24, bos_token_id=0, eos_token_id=0, **shape)).eval()
    for parameter in model.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("form", ["safetensors", "openai", "shards"])
@pytest.mark.parametrize("size", SIZES, ids=lambda size: f"{size['n_layer']} layers")
def test_their_models_open_here(size, form, tmp_path):
    theirs = theirs_of(**size)
    theirs.save_pretrained(tmp_path, max_shard_size="40KB" if form == "shards" else "1GB")
    if form == "openai":  # gpt2 on the hub has no prefix, no head, and the mask saved
        state = {name.removeprefix("transformer."): t for name, t in theirs.state_dict().items()
                 if name != "lm_head.weight"}
        state["h.0.attn.bias"] = torch.ones(1, 1, 24, 24).tril()
        (tmp_path / "model.safetensors").unlink()
        torch.save(state, tmp_path / "pytorch_model.bin")
    path = prepare_data.convert_weights(str(tmp_path), str(tmp_path / "converted"))
    agree(GPT.from_checkpoint(path), theirs)
    checkpoint = torch.load(path, weights_only=True)
    assert checkpoint["step"] == 0 and checkpoint["best_val_loss"] == math.inf
    assert checkpoint["tokenizer"] == {} == checkpoint["settings"]


# ---- Tokenizers ----


def write_tokenizer(spec, folder):
    """An export of a model with this tokenizer."""
    model = random_model(spec)
    model.starts_documents = True
    sample.export(model, folder)


@pytest.fixture(scope="module")
def trained():
    """The spec of a BPE trained by hand."""
    text = (ROOT / "README.md").read_text("utf-8")
    return prepare_data.bpe_spec(prepare_data.train_bpe([text], 400))


def swapped(a, b):
    """Swaps the tokens at two places."""
    def change(whole):
        vocab = whole["model"]["vocab"]
        names = sorted(vocab, key=vocab.get)
        vocab[names[a]], vocab[names[b]] = vocab[names[b]], vocab[names[a]]
    return change


def words_cut(**how):
    return lambda whole: whole["pre_tokenizer"].update(how)


OTHER_TOKENIZERS = {
    "unchanged": lambda whole: None, "spaces before texts": words_cut(add_prefix_space=True),
    "words not cut": words_cut(use_regex=False), "cut elsewhere": words_cut(type="Whitespace"),
    "accents taken apart": lambda whole: whole.update(normalizer={"type": "NFD"}),
    "merges in another order": lambda whole: whole["model"]["merges"].reverse(),
    "two tokens in another order": swapped(300, 301), "the end not at the end": swapped(300, -1),
    "damaged": lambda whole: whole.update(model=[])}


def test_a_tokenizer_that_reads_otherwise_is_none_of_ours(trained, tmp_path):
    """Its ids would be wrong, so the model is converted without it. Unchanged, it is kept, from
    vocab.json and merges.txt or from tokenizer.json."""
    write_tokenizer(trained, tmp_path)
    size, folder = Tokenizer(trained).vocab_size, tmp_path / "theirs"
    path = prepare_data.convert_weights(str(tmp_path), str(tmp_path / "converted"))
    checkpoint = torch.load(path, weights_only=True)
    assert checkpoint["tokenizer"] == trained
    assert checkpoint["settings"] == {"rows": "documents"}
    transformers.AutoTokenizer.from_pretrained(tmp_path).save_pretrained(folder)
    (folder / "vocab.json").unlink(missing_ok=True)
    good = (folder / "tokenizer.json").read_text(encoding="utf-8")
    for name, change in OTHER_TOKENIZERS.items():
        whole = json.loads(good)
        change(whole)
        (folder / "tokenizer.json").write_text(json.dumps(whole), encoding="utf-8")
        expected = trained if name == "unchanged" else {}
        assert prepare_data.read_tokenizer(folder, size) == expected, name


def test_gpt2s_tokenizer_is_recognised(gpt2_vocabulary, tmp_path):
    """By its tokens, or by its size where no tokenizer was saved."""
    write_tokenizer(gpt2_vocabulary.spec, tmp_path)
    assert prepare_data.read_tokenizer(tmp_path, 50257) == {"kind": "gpt2"}
    (tmp_path / "vocab.json").unlink()
    assert prepare_data.read_tokenizer(tmp_path, 50257) == {"kind": "gpt2"}


# ---- The hub ----


def test_gpt2_from_the_hub(tmp_path):
    """Downloaded once, then used without a network; out of reach: one line."""
    theirs, served = theirs_of(50257, **SIZES[1]), tmp_path / "served"
    theirs.save_pretrained(served)
    for name in ("vocab.json", "merges.txt", "pytorch_model.bin"):
        (served / name).write_bytes(b"damaged")
    files = {path.name: path.read_bytes() for path in served.iterdir()}
    best = tmp_path / "out" / "openai-gpt2" / "best.pt"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        done = hub.run(f"http://127.0.0.1:{free.getsockname()[1]}", tmp_path, "gpt2")
    hub.is_one_line(done, "gpt2 cannot be downloaded")
    with hub.serve(models={"openai-community/gpt2": files}) as (address, _):
        done = hub.run(address, tmp_path, "gpt2")
        assert done.returncode == 0, done
    agree(GPT.from_checkpoint(best), theirs)
    best.unlink()
    done = hub.run(None, tmp_path, "gpt2")
    assert done.returncode == 0 and best.exists() and "written to out" in done.stdout
    best.write_bytes(b"kept")
    assert "is there already" in hub.run(None, tmp_path, "gpt2").stdout
    assert best.read_bytes() == b"kept"


# ---- Harm ----


def weights(**changes):
    """Damages the weights: a function from the folder."""
    def change(folder):
        path = folder / "pytorch_model.bin"
        state = torch.load(path, weights_only=True)
        state |= {name.replace("__", "."): value for name, value in changes.items()}
        torch.save({name: value for name, value in state.items() if value is not None}, path)
    return change


def config(**changes):
    def change(folder):
        values = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(values | changes))
    return change


def safe(header):
    data = len(header).to_bytes(8, "little") + header + bytes(8)
    return lambda folder: (folder / "model.safetensors").write_bytes(data)


LN = "transformer__ln_f__bias"
DAMAGE = {
    "a pickle that makes a folder": weights(**{LN: Bomb()}),
    "a tensor larger than memory": weights(
        transformer__wte__weight=torch.zeros(1).expand(10**6, 10**6)),
    "a number that is none": weights(**{LN: torch.full((48,), math.nan)}),
    "a tensor without numbers": weights(**{LN: torch.empty(48, device="meta")}),
    "another shape, one missing": weights(**{LN: None}, transformer__wpe__weight=torch.zeros(2)),
    "a head of its own": weights(lm_head__weight=torch.ones(300, 48)),
    "safetensors that claim more than the file": safe(
        b'{"a": {"dtype": "F32", "shape": [1000000, 1000000], "data_offsets": [0, 4000000]}}'),
    "no JSON": lambda folder: (folder / "config.json").write_bytes(b"[" * 100_000),
    "another GELU": config(activation_function="gelu"),
    "a billion layers": config(n_layer=10**9)}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_folder_that_means_harm(name, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    theirs = theirs_of(**SIZES[1])
    theirs.config.save_pretrained(tmp_path)
    torch.save(theirs.state_dict(), tmp_path / "pytorch_model.bin")
    DAMAGE[name](tmp_path)
    before = contents(tmp_path)
    fails(prepare_data.main, ["."], capsys)
    assert contents(tmp_path) == before  # nothing exploded
