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
SMALL = dict(n_layer=1, n_head=1, n_embd=16)
LARGER = dict(n_layer=2, n_head=3, n_embd=48)


def theirs_of(vocab_size=300, **shape):
    """A random GPT-2 of transformers', its biases and norms too."""
    torch.manual_seed(1)
    config = transformers.GPT2Config(
        vocab_size=vocab_size, n_positions=24, bos_token_id=0, eos_token_id=0, **shape)
    model = transformers.GPT2LMHeadModel(config).eval()
    for parameter in model.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    return model


def convert(folder):
    return prepare_data.convert_weights(str(folder), str(folder / "converted"))


def as_openai_has_it(theirs, folder):
    """gpt2 on the hub has no prefix, no head, and the mask saved."""
    state = {"h.0.attn.bias": torch.ones(1, 1, 24, 24).tril()}
    for name, tensor in theirs.transformer.state_dict().items():
        state[name] = tensor
    theirs.config.save_pretrained(folder)
    torch.save(state, folder / "pytorch_model.bin")


FORMS = {"safetensors": lambda theirs, folder: theirs.save_pretrained(folder),
         "shards": lambda theirs, folder: theirs.save_pretrained(folder, max_shard_size="40KB"),
         "openai": as_openai_has_it}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("size", [SMALL, LARGER])
def test_their_models_open_here(size, form, tmp_path):
    theirs = theirs_of(**size)
    FORMS[form](theirs, tmp_path)
    path = convert(tmp_path)
    agree(GPT.from_checkpoint(path), theirs)
    checkpoint = torch.load(path, weights_only=True)
    assert checkpoint["step"] == 0
    assert checkpoint["best_val_loss"] == math.inf
    assert checkpoint["tokenizer"] == {}
    assert checkpoint["settings"] == {}


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
        one, other = names[a], names[b]
        vocab[one], vocab[other] = vocab[other], vocab[one]
    return change


def words_cut(**how):
    return lambda whole: whole["pre_tokenizer"].update(how)


OTHER_TOKENIZERS = {
    "spaces before texts": words_cut(add_prefix_space=True),
    "words not cut": words_cut(use_regex=False), "cut elsewhere": words_cut(type="Whitespace"),
    "accents taken apart": lambda whole: whole.update(normalizer={"type": "NFD"}),
    "merges in another order": lambda whole: whole["model"]["merges"].reverse(),
    "two tokens in another order": swapped(300, 301), "the end not at the end": swapped(300, -1),
    "damaged": lambda whole: whole.update(model=[])}


@pytest.fixture(scope="module")
def tokenizer_json(trained, tmp_path_factory):
    """What transformers makes of an export."""
    folder = tmp_path_factory.mktemp("export")
    write_tokenizer(trained, folder)
    transformers.AutoTokenizer.from_pretrained(folder).save_pretrained(folder)
    return (folder / "tokenizer.json").read_text(encoding="utf-8")


def test_a_tokenizer_comes_back(trained, tokenizer_json, tmp_path):
    """From vocab.json and merges.txt, or from tokenizer.json."""
    write_tokenizer(trained, tmp_path)
    checkpoint = torch.load(convert(tmp_path), weights_only=True)
    assert checkpoint["tokenizer"] == trained
    assert checkpoint["settings"] == {"rows": "documents"}
    (tmp_path / "vocab.json").unlink()
    (tmp_path / "tokenizer.json").write_text(tokenizer_json, encoding="utf-8")
    assert prepare_data.read_tokenizer(tmp_path, Tokenizer(trained).vocab_size) == trained


@pytest.mark.parametrize("name", OTHER_TOKENIZERS)
def test_a_tokenizer_that_reads_otherwise_is_none_of_ours(name, trained, tokenizer_json, tmp_path):
    """Its ids would be wrong, so the model is converted without it."""
    whole = json.loads(tokenizer_json)
    OTHER_TOKENIZERS[name](whole)
    (tmp_path / "tokenizer.json").write_text(json.dumps(whole), encoding="utf-8")
    assert prepare_data.read_tokenizer(tmp_path, Tokenizer(trained).vocab_size) == {}


def test_gpt2s_tokenizer_is_recognised(gpt2_vocabulary, tmp_path):
    """By its tokens, or by its size where no tokenizer was saved."""
    write_tokenizer(gpt2_vocabulary.spec, tmp_path)
    assert prepare_data.read_tokenizer(tmp_path, 50257) == {"kind": "gpt2"}
    (tmp_path / "vocab.json").unlink()
    assert prepare_data.read_tokenizer(tmp_path, 50257) == {"kind": "gpt2"}


# ---- The hub ----


def files_in(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_gpt2_from_the_hub(tmp_path):
    """Downloaded once, then used without a network; out of reach: one line."""
    theirs, served = theirs_of(50257, **LARGER), tmp_path / "served"
    theirs.save_pretrained(served)
    for name in ("vocab.json", "merges.txt", "pytorch_model.bin"):
        (served / name).write_bytes(b"damaged")
    best = tmp_path / "out" / "openai-gpt2" / "best.pt"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        done = hub.run(f"http://127.0.0.1:{free.getsockname()[1]}", tmp_path, "gpt2")
    hub.is_one_line(done, "gpt2 cannot be downloaded")
    with hub.serve(models={"openai-community/gpt2": files_in(served)}) as (address, _):
        done = hub.run(address, tmp_path, "gpt2")
        assert done.returncode == 0, done
    agree(GPT.from_checkpoint(best), theirs)
    best.unlink()
    done = hub.run(None, tmp_path, "gpt2")
    assert best.exists(), done
    assert "written to out" in done.stdout
    best.write_bytes(b"kept")
    assert "is there already" in hub.run(None, tmp_path, "gpt2").stdout
    assert best.read_bytes() == b"kept"


# ---- Harm ----


def weights(**changes):
    """Damages the weights: a function from the folder. None removes one."""
    def change(folder):
        path = folder / "pytorch_model.bin"
        state = torch.load(path, weights_only=True)
        for name, value in changes.items():
            name = name.replace("__", ".")
            state[name] = value
            if value is None:
                del state[name]
        torch.save(state, path)
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
    theirs = theirs_of(**LARGER)
    theirs.config.save_pretrained(tmp_path)
    torch.save(theirs.state_dict(), tmp_path / "pytorch_model.bin")
    DAMAGE[name](tmp_path)
    before = contents(tmp_path)
    fails(prepare_data.main, ["."], capsys)
    assert contents(tmp_path) == before  # nothing exploded
