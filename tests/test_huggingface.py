"""Models come from transformers and go there, ids and logits unchanged; a folder that means harm is refused."""
import json
import math
import os
import pickle
import random
import socket
import subprocess
import sys

import hub
import pytest
import torch
from conftest import FULL, ROOT, fails

import prepare_data
import sample
import train_gpt2
from train_gpt2 import GPT, GPTConfig, Tokenizer, UserError

transformers = pytest.importorskip("transformers")
SIZES = [dict(n_layer=1, n_head=1, n_embd=16), dict(n_layer=2, n_head=3, n_embd=48),
         dict(n_layer=3, n_head=4, n_embd=64)]


def theirs_of(vocab_size=300, **shape):
    """A random GPT-2 of transformers', its biases and norms too."""
    torch.manual_seed(len(shape))
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(
        vocab_size=vocab_size, n_positions=24, bos_token_id=0, eos_token_id=0, **shape)).eval()
    for parameter in model.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    return model


def agree(ours, theirs):
    """The same logits to 1e-4 and the same greedy text."""
    idx = torch.randint(ours.config.vocab_size, (2, 20), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert (ours(idx)[0] - theirs(idx).logits).abs().max() < 1e-4
    theirs.generation_config.eos_token_id = None
    text = theirs.generate(idx[:, :6], max_new_tokens=16, do_sample=False, pad_token_id=0)
    assert torch.equal(ours.generate(idx[:, :6], 16, temperature=0), text)


def bpe():
    """A tokenizer trained by hand."""
    return Tokenizer(prepare_data.bpe_spec(prepare_data.train_bpe([(ROOT / "README.md").read_text("utf-8")], 600)))


@pytest.mark.parametrize("size", SIZES, ids=lambda size: f"{size['n_layer']} layers")
@pytest.mark.parametrize("form", ["safetensors", "bin", "older bin", "shards"])
def test_their_models_open_here(size, form, tmp_path):
    theirs = theirs_of(**size)
    theirs.save_pretrained(tmp_path, max_shard_size="40KB" if form == "shards" else "1GB")
    if form.endswith("bin"):
        (tmp_path / "model.safetensors").unlink()
        state = theirs.state_dict()
        if form == "older bin":  # as OpenAI's gpt2 stands on the hub: no prefix, no head, the mask saved, no zip
            state = {name.removeprefix("transformer."): t for name, t in state.items() if name != "lm_head.weight"}
            state["h.0.attn.bias"] = torch.ones(1, 1, 24, 24).tril()
            state["h.0.attn.masked_bias"] = torch.tensor(-1e4)
        torch.save(state, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=form == "bin")
    agree(GPT.from_pretrained(tmp_path), theirs)


@pytest.mark.parametrize("size", SIZES, ids=lambda size: f"{size['n_layer']} layers")
@pytest.mark.parametrize("options", [{}, dict(pos_encoding="sinusoidal", activation="relu")], ids=["gpt2", "others"])
@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "bin"])
def test_our_models_open_there(size, options, safe, tmp_path, monkeypatch, capsys):
    model = GPT(GPTConfig(vocab_size=300, block_size=24, dropout=0.25, **size, **options)).eval()
    for parameter in model.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    if not safe:
        monkeypatch.setattr(train_gpt2.importlib.util, "find_spec", lambda name: None)
    model.save_pretrained(tmp_path / "new" / "folder")
    assert (tmp_path / "new" / "folder" / "model.safetensors").exists() == safe
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "new" / "folder")
    agree(model, theirs)
    assert (theirs.config.resid_pdrop, theirs.config.embd_pdrop, theirs.config.attn_pdrop) == (0.25,) * 3
    back = GPT.from_pretrained(tmp_path / "new" / "folder")
    assert all(torch.equal(t, back.state_dict()[name]) for name, t in model.state_dict().items())
    assert back.config.activation == model.config.activation and back.tokenizer is None


def random_texts(count, seed=0):
    draw = random.Random(seed)
    pieces = ["a", "the", " once", "  ", "\n", "\t ", "é", "漢", "🙂", "'s", "'ll", "12", "_", "Ā", "\u00ad",
              "\x7f", "\x00"]
    for _ in range(count):
        yield "".join(draw.choice(pieces) if draw.random() < 0.7 else chr(draw.choice((draw.randrange(0x20, 0x250),
                      draw.randrange(0x1F300, 0x1FAFF)))) for _ in range(draw.randrange(40)))


def same_ids(tokenizer, folder, count):
    theirs = transformers.AutoTokenizer.from_pretrained(folder, model_max_length=10**6)
    assert theirs.eos_token_id == tokenizer.eot
    for text in random_texts(count):
        ids = tokenizer.encode(text)
        assert theirs(text)["input_ids"] == ids, repr(text)
        assert theirs.decode(ids, clean_up_tokenization_spaces=False) == text


def test_a_trained_tokenizer_opens_there_and_here(tmp_path):
    tokenizer = bpe()
    model = GPT(GPTConfig(vocab_size=tokenizer.vocab_size, block_size=24, **SIZES[0]))
    model.tokenizer = tokenizer
    model.save_pretrained(tmp_path)
    same_ids(tokenizer, tmp_path, 10_000)
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    assert config.eos_token_id == config.bos_token_id == tokenizer.eot
    assert transformers.AutoTokenizer.from_pretrained(tmp_path).model_max_length == 24
    assert GPT.from_pretrained(tmp_path).tokenizer.spec == tokenizer.spec
    other = tmp_path / "theirs"  # transformers 5 writes tokenizer.json alone
    transformers.AutoTokenizer.from_pretrained(tmp_path).save_pretrained(other)
    transformers.AutoModelForCausalLM.from_pretrained(tmp_path).save_pretrained(other)
    assert GPT.from_pretrained(other).tokenizer.spec == tokenizer.spec


def test_gpt2s_tokenizer_opens_there_and_here(gpt2_vocabulary, tmp_path):
    model = GPT(GPTConfig(vocab_size=50257, block_size=24, **SIZES[0])).eval()
    model.tokenizer = gpt2_vocabulary
    model.save_pretrained(tmp_path)
    same_ids(gpt2_vocabulary, tmp_path, 10_000 if FULL else 1000)
    assert GPT.from_pretrained(tmp_path).tokenizer.spec == {"kind": "gpt2"}
    for name in ("vocab.json", "merges.txt", "tokenizer_config.json"):
        (tmp_path / name).unlink()
    assert GPT.from_pretrained(tmp_path).tokenizer.spec == {"kind": "gpt2"}  # by its size


def test_tokenizers_that_cannot_be_expressed(tmp_path, capsys):
    """Characters are not exported, which is said; a folder with tokens in another order is opened without them."""
    model = GPT(GPTConfig(vocab_size=3, block_size=24, **SIZES[0]))
    model.tokenizer = Tokenizer({"kind": "char", "alphabet": "abc"})
    model.save_pretrained(tmp_path)
    assert capsys.readouterr().out.count("no tokenizer was written") == 1
    assert not (tmp_path / "vocab.json").exists() and (tmp_path / "config.json").exists()
    (tmp_path / "vocab.json").write_text('{"<|endoftext|>": 0, "b": 1, "a": 2}')
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    assert GPT.from_pretrained(tmp_path).tokenizer is None
    assert "no tokenizer" in fails(sample.main, [f"--init_from={tmp_path}"], capsys)
    with pytest.raises(UserError, match="no merges make"):
        train_gpt2.merges_of([bytes([byte]) for byte in range(256)] + [b"abc"])


def changed(**changes):
    """Changes a part of tokenizer.json: a function from what it holds."""
    return lambda whole: (whole.update if "normalizer" in changes else whole["pre_tokenizer"].update)(changes)


def swapped(a, b):
    """Lets the tokens at two places change them."""
    def change(whole):
        vocab = whole["model"]["vocab"]
        names = sorted(vocab, key=vocab.get)
        vocab[names[a]], vocab[names[b]] = vocab[names[b]], vocab[names[a]]
    return change


def bytes_lacking(model):
    """As a trainer leaves out what its texts do not have: one byte and all that was merged from it."""
    gone = [token for token in model["vocab"] if "\u0143" in token]  # the byte ad
    kept = [token for token in sorted(model["vocab"], key=model["vocab"].get) if token not in gone]
    merges = [m for m in model["merges"] if "\u0143" not in "".join(m)]
    return {"vocab": {token: i for i, token in enumerate(kept)}, "merges": merges}


def another_end(whole):
    vocab = whole["model"]["vocab"]
    vocab["<pad>"] = vocab.pop("<|endoftext|>")


OTHER_TOKENIZERS = {
    "another end": another_end,
    "spaces before texts": changed(add_prefix_space=True), "words not cut": changed(use_regex=False),
    "cut elsewhere": changed(type="Whitespace"), "accents taken apart": changed(normalizer={"type": "NFD"}),
    "two merges in another order": lambda whole: whole["model"]["merges"].reverse(),
    "two tokens in another order": swapped(300, 301), "the end not at the end": swapped(300, -1),
    "a byte lacking": lambda whole: whole["model"].update(bytes_lacking(whole["model"])),
}


@pytest.mark.parametrize("name", [None, *OTHER_TOKENIZERS])
def test_a_tokenizer_that_reads_otherwise_is_none_of_ours(name, tmp_path):
    """Its ids would be wrong: the model is opened without it. Unchanged (None) it is opened."""
    tokenizer = bpe()
    train_gpt2.write_tokenizer(tokenizer, tmp_path, 24)
    theirs = tmp_path / "theirs"
    transformers.AutoTokenizer.from_pretrained(tmp_path).save_pretrained(theirs)
    whole = json.loads((theirs / "tokenizer.json").read_text(encoding="utf-8"))
    OTHER_TOKENIZERS.get(name, lambda whole: None)(whole)
    model = GPT(GPTConfig(vocab_size=len(whole["model"]["vocab"]), block_size=24, **SIZES[0]))
    model.save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "tokenizer.json").write_text(json.dumps(whole), encoding="utf-8")
    found = GPT.from_pretrained(tmp_path / "model").tokenizer
    assert found is None if name else found.spec == tokenizer.spec


def test_a_tokenizer_of_gpt2s_size_is_not_taken_for_gpt2s(gpt2_vocabulary, tmp_path):
    model = GPT(GPTConfig(vocab_size=50257, block_size=24, **SIZES[0]))
    model.tokenizer = gpt2_vocabulary
    model.save_pretrained(tmp_path)
    vocabulary = json.loads((tmp_path / "vocab.json").read_text(encoding="utf-8"))
    moved = {token: (i + 1) % 50257 for token, i in vocabulary.items()}  # <|endoftext|> is the first
    (tmp_path / "vocab.json").write_text(json.dumps(moved), encoding="utf-8")
    assert GPT.from_pretrained(tmp_path).tokenizer is None


def test_an_export_is_not_mixed_with_another_model(tmp_path, capsys):
    """What transformers would read beside our files is named, and everything stays; our own export is replaced."""
    tokenizer = bpe()
    model = GPT(GPTConfig(vocab_size=tokenizer.vocab_size, block_size=24, **SIZES[0]))
    model.tokenizer = tokenizer
    for name in ("mine", "theirs", "shards"):
        model.save_pretrained(tmp_path / name)
    model.save_pretrained(tmp_path / "mine")
    transformers.AutoTokenizer.from_pretrained(tmp_path / "mine").save_pretrained(tmp_path / "theirs")
    (tmp_path / "shards" / "model-00001-of-00002.safetensors").write_bytes(b"")
    letters = GPT(GPTConfig(vocab_size=3, block_size=24, **SIZES[0]))
    letters.tokenizer = Tokenizer({"kind": "char", "alphabet": "abc"})
    for name, other, rest in (("theirs", model, "tokenizer.json"), ("mine", letters, "merges.txt"),
                              ("shards", model, "model-00001-of-00002.safetensors")):
        before = {path: path.read_bytes() for path in (tmp_path / name).iterdir()}
        with pytest.raises(UserError, match=f"{name} holds another model, whose {rest}"):
            other.save_pretrained(tmp_path / name)
        assert {path: path.read_bytes() for path in (tmp_path / name).iterdir()} == before
    assert "before each prompt" not in capsys.readouterr().out
    model.starts_documents = True
    model.save_pretrained(tmp_path / "mine")
    assert "put <|endoftext|> before each prompt" in capsys.readouterr().out


@pytest.fixture
def run_of_stories(stories, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train_gpt2.main([f"--data_dir={stories}", "--n_layer=1", "--n_embd=32", "--max_steps=5", "--eval_tokens=500",
                     "--sample_every=100"])
    return tmp_path / "out" / "stories"


def test_export_then_train_on(run_of_stories, stories, tmp_path, capsys):
    """sample.py --export, then --init_from=FOLDER: in sample.py, in training, and to evaluate."""
    assert sample.main(["--export=folder"]) == 0
    options = ["Once", "--temperature=0", "--max_new_tokens=9", "--dtype=float32"]
    capsys.readouterr()
    assert sample.main([*options, "--init_from=folder"]) == 0
    text = capsys.readouterr().out
    assert sample.main([*options, f"--checkpoint={run_of_stories / 'best.pt'}"]) == 0
    assert capsys.readouterr().out == text and text.startswith("Once")  # a story's prompt begins a document in both
    ours = GPT.from_checkpoint(run_of_stories / "best.pt")
    theirs = GPT.from_pretrained("folder")
    assert all(torch.equal(t, theirs.state_dict()[name]) for name, t in ours.state_dict().items())
    assert ours.starts_documents and theirs.starts_documents
    train_gpt2.main([f"--data_dir={stories}", "--init_from=folder", "--eval_only=True"])
    loss = capsys.readouterr().out.split("validation loss")[1]
    train_gpt2.main([f"--data_dir={stories}", f"--init_from={run_of_stories / 'best.pt'}", "--eval_only=True"])
    assert capsys.readouterr().out.endswith(loss)
    for name in ("vocab.json", "merges.txt"):  # without a tokenizer the size of the vocabulary has to fit
        (tmp_path / "folder" / name).unlink()
    train_gpt2.main([f"--data_dir={stories}", "--init_from=folder", "--max_steps=2", "--out_dir=on", "--n_layer=7",
                     "--dropout=0.1", "--learning_rate=1e-4", "--eval_tokens=500"])
    config = torch.load(tmp_path / "on" / "ckpt.pt", weights_only=True)["config"]
    assert (config["n_layer"], config["n_embd"], config["dropout"]) == (1, 32, 0.1)
    output = capsys.readouterr().out
    assert "note: --n_layer is not heeded: folder has 1" in output and "n_layer=7" not in output
    assert "block_size" in fails(train_gpt2.main, [f"--data_dir={stories}", "--init_from=folder", "--block_size=999"],
                                 capsys)


def test_another_tokenizer_than_the_datas(stories, tmp_path, capsys):
    theirs_of(**SIZES[0]).save_pretrained(tmp_path)
    line = fails(train_gpt2.main, [f"--data_dir={stories}", f"--init_from={tmp_path}"], capsys)
    assert "different tokenizers" in line


def test_gpt2_is_tuned_on_shakespeare(gpt2_vocabulary, shared_file, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    theirs_of(50257, **SIZES[0]).save_pretrained("gpt2")
    prepare_data.main([str(shared_file("tinyshakespeare.txt")), "--tokenizer=gpt2", "--out_dir=data/tuned"])
    train_gpt2.main(["--init_from=gpt2", "--data_dir=data/tuned", "--rows=stream", "--max_steps=3", "--batch_size=2",
                     "--learning_rate=3e-5", "--eval_tokens=200", "--sample_every=100"])
    assert "best validation loss" in capsys.readouterr().out
    assert sample.main(["--max_new_tokens=4"]) == 0


def sampling(environment, home, *argv):
    """sample.py in a process of its own, because huggingface_hub reads its environment when it is imported."""
    environment = {name: value for name, value in environment.items() if not name.startswith(("HF_HUB", "HF_TOKEN"))}
    run = subprocess.run([sys.executable, ROOT / "sample.py", "--init_from=gpt2", "--temperature=0", "--dtype=float32",
                          "--max_new_tokens=8", "--device=cpu", *argv], cwd=home, text=True, capture_output=True,
                         encoding="utf-8", timeout=200, env=environment | {"HF_HOME": str(home / "hf")})
    return run.returncode, run.stdout, run.stderr


@pytest.mark.parametrize("repository, form", [("openai-community/gpt2", "both"), ("gpt2", "bin")])
def test_gpt2_from_the_hub(repository, form, gpt2_vocabulary, tmp_path):
    """The repository as it stands on the hub, small: downloaded once, then at hand without a network."""
    folder, home = tmp_path / "served", tmp_path / "home"
    home.mkdir()
    theirs = theirs_of(50257, **SIZES[1])
    theirs.save_pretrained(folder)
    state = {name.removeprefix("transformer."): t for name, t in theirs.transformer.state_dict().items()}
    torch.save(state, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    train_gpt2.write_tokenizer(gpt2_vocabulary, folder, 24)
    if form == "bin":
        for name in ("model.safetensors", "vocab.json", "merges.txt"):  # so many tokens are GPT-2's all the same
            (folder / name).unlink()
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    ids = gpt2_vocabulary.encode("Hello there")
    expected = theirs.generate(torch.tensor([ids]), max_new_tokens=8, do_sample=False, pad_token_id=0,
                               eos_token_id=None)
    with hub.serve(models={repository: files}) as (environment, server):
        code, output, errors = sampling(environment, home, "Hello there")
        assert code == 0, errors
        assert output == gpt2_vocabulary.decode(expected[0].tolist()) + "\n"
        asked = " ".join(server.requests)
        assert ("model.safetensors" in asked) and ("pytorch_model.bin" in asked) == (form == "bin")
        if form == "both":
            server.requests.clear()
            code, again, errors = sampling(environment, home, "Hello there")
            assert code == 0 and again == output and "gpt2" not in " ".join(server.requests), errors


def test_what_went_wrong_first_is_said(gpt2_vocabulary, tmp_path):
    """A cache that cannot be written, here a file where its folder should be; not that the old name is unknown."""
    (tmp_path / "file").write_text("")
    with hub.serve(models={"openai-community/gpt2": {"config.json": b"{}"}}) as (environment, _):
        code, _, errors = sampling(environment | {"HF_HUB_CACHE": str(tmp_path / "file")}, tmp_path)
    assert code == 2 and "RepositoryNotFound" not in errors and len(errors.splitlines()) == 1, errors


def test_no_network_is_one_line(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        nobody = f"http://127.0.0.1:{free.getsockname()[1]}"
        code, output, errors = sampling(os.environ | {"HF_ENDPOINT": nobody}, tmp_path)
    assert code == 2 and len(errors.splitlines()) == 1 and errors.startswith("error: gpt2 cannot be downloaded"), errors


class Bomb:
    def __reduce__(self):
        return (open, ("exploded", "w"))


def weights(**changes):
    """Damages the weights: a function from the folder."""
    def change(folder):
        state = torch.load(folder / "pytorch_model.bin", weights_only=True)
        for name, value in changes.items():
            state[name.replace("__", ".")] = value
        torch.save({name: value for name, value in state.items() if value is not None}, folder / "pytorch_model.bin")
    return change


def config(**changes):
    def change(folder):
        values = json.loads((folder / "config.json").read_text()) | changes
        values = {name: value for name, value in values.items() if value != "gone"}
        (folder / "config.json").write_text(json.dumps(values))
    return change


def claims(n_embd):
    """A model of that width whose tensors fit its config, each one number repeated: kilobytes that claim terabytes."""
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
DAMAGE = {
    "a pickle that opens a file": weights(**{LN: Bomb()}),
    "a bare pickle": replaced("pytorch_model.bin", pickle.dumps(Bomb())),
    "a pickle in the old form": lambda f: torch.save({"a": Bomb()}, f / "pytorch_model.bin",
                                                     _use_new_zipfile_serialization=False),
    "a path in place of a tensor": weights(**{WTE: "/etc/passwd"}),
    "a tensor larger than memory": weights(**{WTE: torch.zeros(1).expand(10**6, 10**6)}),
    "a model larger than memory": claims(200_000),
    "a tensor without numbers": weights(**{WTE: torch.empty(300, 48, device="meta")}),
    "a huge one without numbers": weights(**{WTE: torch.empty(10**7, 10**6, device="meta")}),
    "a sparse tensor": weights(**{WTE: torch.zeros(300, 48).to_sparse()}),
    "whole numbers": weights(**{LN: torch.zeros(48, dtype=torch.int64)}),
    "another shape": weights(**{LN: torch.zeros(47)}), "one too many": weights(**{"transformer__x": torch.zeros(1)}),
    "one missing": weights(**{LN: None}), "a head of its own": weights(lm_head__weight=torch.ones(300, 48)),
    "a head of another shape": weights(lm_head__weight=torch.ones(3)),
    "no dict": lambda f: torch.save([1, 2], f / "pytorch_model.bin"), "nothing": replaced("pytorch_model.bin", b""),
    "keys that are numbers": lambda f: torch.save({1: torch.zeros(1)}, f / "pytorch_model.bin"),
    "no weights at all": lambda f: (f / "pytorch_model.bin").unlink(),
    "safetensors that are none": replaced("model.safetensors", b"PK" * 100),
    "safetensors that claim terabytes": safe({"a": {"dtype": "F32", "shape": [10**6, 10**6],
                                                    "data_offsets": [0, 4 * 10**12]}}),
    "a header that claims more than the file": replaced("model.safetensors", (2**40).to_bytes(8, "little") + b"{}"),
    "safetensors of another model": safe({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}),
    "no JSON": replaced("config.json", b"{"), "no text": replaced("config.json", b"\xff\xfe"),
    "a list": replaced("config.json", b"[]"), "no config": lambda f: (f / "config.json").unlink(),
    "no sizes": replaced("config.json", b"{}"), "another architecture": config(model_type="llama"),
    "another GELU": config(activation_function="gelu"), "no activation": config(activation_function=["relu"]),
    "another epsilon": config(layer_norm_epsilon=1e-6), "an untied head": config(tie_word_embeddings=False),
    "a wide MLP": config(n_inner=100), "other scores": config(scale_attn_by_inverse_layer_idx=True),
    "unscaled scores": config(scale_attn_weights=False), "a billion layers": config(n_layer=10**9),
    "a vocabulary beyond bounds": config(vocab_size=2**60), "a huge vocabulary": config(vocab_size=2**24),
    "many positions": config(n_positions=2**24), "heads that do not divide": config(n_head=5),
    "words for numbers": config(n_layer="two"), "no heads": config(n_head="gone"), "a null": config(n_embd=None),
    "not a number": weights(**{LN: torch.full((48,), math.nan)}), "cross attention": config(add_cross_attention=True),
    "an infinite number": weights(transformer__h__0__ln_1__weight=torch.full((48,), -math.inf)),
    "nested too deeply": replaced("config.json", b"[" * 100_000),
    "layers true": config(n_layer=True), "fewer layers": config(n_layer=1), "more layers": config(n_layer=3),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_folder_that_means_harm(name, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    theirs = theirs_of(**SIZES[1])
    theirs.config.save_pretrained(tmp_path)
    torch.save(theirs.state_dict(), tmp_path / "pytorch_model.bin")
    DAMAGE[name](tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    # Not for want of a tokenizer, which sample.py asks for once a model is there: the folder has none
    assert "has no tokenizer" not in fails(sample.main, ["--init_from=."], capsys)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before  # so nothing exploded


def test_that_folder_unharmed(tmp_path):
    """What the damage is done to is a folder that opens."""
    theirs = theirs_of(**SIZES[1], n_inner=4 * 48)  # as it may say, although it need not
    theirs.config.save_pretrained(tmp_path)
    config(activation_function="gone")(tmp_path)  # GPT-2's, then
    assert train_gpt2.read_model(str(tmp_path), look=True)["config"]["n_embd"] == 48  # for which no weights are read
    torch.save(theirs.state_dict(), tmp_path / "pytorch_model.bin")
    agree(GPT.from_pretrained(tmp_path), theirs)


def test_weights_that_need_a_library_that_is_not_here(tmp_path, capsys, monkeypatch):
    theirs_of(**SIZES[1]).save_pretrained(tmp_path)
    monkeypatch.setattr(train_gpt2.importlib.util, "find_spec", lambda name: None)
    assert "pip install safetensors" in fails(sample.main, [f"--init_from={tmp_path}"], capsys)


def test_exports_are_in_float32(tmp_path):
    """Whatever the weights are in, and marked as transformers wants them: before version 5 it refuses others."""
    safetensors = pytest.importorskip("safetensors")
    GPT(GPTConfig(vocab_size=300, block_size=24, **SIZES[0])).bfloat16().save_pretrained(tmp_path)
    with safetensors.safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert {file.get_tensor(name).dtype for name in file.keys()} == {torch.float32}  # noqa: SIM118


def test_a_tokenizer_that_means_harm(tmp_path):
    """A damaged tokenizer is none."""
    theirs_of(**SIZES[0]).save_pretrained(tmp_path)
    for vocabulary, merges in (("[]", ""), ('{"a": "x"}', ""), ("{", ""), ('{"a": [], "b": {}}', "a b"),
                               ("null", "\xff"), ('{"<|endoftext|>": 0}', ""), ("[" * 100_000, ""),
                               ('{"漢": 0, "<|endoftext|>": 1}', "")):
        (tmp_path / "vocab.json").write_text(vocabulary, encoding="utf-8")
        (tmp_path / "merges.txt").write_text(merges, encoding="latin-1")
        assert GPT.from_pretrained(tmp_path).tokenizer is None
