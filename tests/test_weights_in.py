"""GPT-2s of OpenAI and transformers become checkpoints, their logits and ids unchanged; a malicious
folder is refused in one line."""
import json
import math
import socket
import sys

import hub
import pytest
import torch
from conftest import ROOT, Bomb, agree, contents, fails, random_model

import prepare_data
import sample
import train_gpt2
from train_gpt2 import GPT, Tokenizer, UserError

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


@pytest.mark.parametrize("name", ["gelu_new", "gelu_fast", "gelu_pytorch_tanh", "gelu_accurate",
                                  "relu", "gelu", "gelu_python"])
def test_activations_that_are_here_too(name, tmp_path):
    """The last two are the exact GELU. Large weights tell it from GPT-2's."""
    theirs = theirs_of(**SMALL, activation_function=name)
    for parameter in theirs.transformer.h.parameters():
        parameter.data.mul_(9)
    theirs.save_pretrained(tmp_path)
    agree(GPT.from_checkpoint(convert(tmp_path)), theirs)


def test_without_safetensors(tmp_path, monkeypatch):
    """Shards of pytorch_model.bin are read, and the package is named where only its files are."""
    theirs = theirs_of(**SMALL)
    theirs.save_pretrained(tmp_path)
    for module in ("safetensors", "safetensors.torch"):
        monkeypatch.setitem(sys.modules, module, None)  # so an import fails
    with pytest.raises(UserError, match="pip install safetensors"):
        convert(tmp_path)
    shards, index = {"a.bin": {}, "b.bin": {}}, {}
    for i, (name, tensor) in enumerate(theirs.state_dict().items()):
        index[name] = [*shards][i % 2]
        shards[index[name]][name] = tensor
    for name, shard in shards.items():
        torch.save(shard, tmp_path / name)
    # What an earlier save left is in no index
    torch.save({"transformer.wpe.weight": torch.zeros(2)},
               tmp_path / "pytorch_model-00009-of-00009.bin")
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": index}))
    agree(GPT.from_checkpoint(convert(tmp_path)), theirs)
    (tmp_path / "b.bin").unlink()
    with pytest.raises(UserError, match="b.bin"):
        convert(tmp_path)


def nanogpt_of(theirs, vocab_size, bias):
    """The same model as a checkpoint of nanoGPT's, its vocabulary padded."""
    state = {"transformer.h.0.attn.bias": torch.ones(1, 1, 24, 24).tril()}
    for name, tensor in theirs.state_dict().items():
        if name.endswith(prepare_data.TRANSPOSED):
            tensor = tensor.t()
        if name.endswith(("wte.weight", "lm_head.weight")):
            tensor = torch.cat([tensor, torch.zeros(vocab_size - len(tensor), tensor.shape[1])])
        if bias or not name.endswith(".bias"):
            state[f"_orig_mod.{name}"] = tensor
    shape = dict(n_layer=2, n_head=3, n_embd=48, block_size=24, bias=bias, dropout=0.0)
    return {"model": state, "model_args": shape | {"vocab_size": vocab_size}, "iter_num": 5,
            "best_val_loss": torch.tensor(2.0), "config": {"dataset": "openwebtext"}}


@pytest.mark.parametrize("bias", [True, False])
def test_a_checkpoint_of_nanogpt(bias, tmp_path, monkeypatch, capsys):
    """Biases that are missing are zeros; rows behind GPT-2's ids are cut off."""
    monkeypatch.chdir(tmp_path)
    theirs = theirs_of(50257, **LARGER, activation_function="gelu")
    for name, parameter in theirs.named_parameters():
        if name.endswith(".bias") and not bias:
            parameter.data.zero_()
    torch.save(nanogpt_of(theirs, 50304, bias), "ckpt.pt")
    assert prepare_data.main(["ckpt.pt"]) == 0
    output = capsys.readouterr().out
    assert "47 rows behind the tokenizer's last id are cut off" in output
    assert "GELU is taken to be exact" in output
    agree(GPT.from_checkpoint("out/ckpt/best.pt"), theirs)
    assert torch.load("out/ckpt/best.pt", weights_only=True)["tokenizer"] == {"kind": "gpt2"}


def test_other_checkpoints(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for value, message in (({"model": {}}, "no checkpoint of nanoGPT's"), (Bomb(), "ckpt.pt")):
        torch.save(value, "ckpt.pt")
        assert message in fails(prepare_data.main, ["ckpt.pt"], capsys)
    assert [path.name for path in tmp_path.iterdir()] == ["ckpt.pt"]


def test_a_checkpoint_is_not_taken_for_another_models(tmp_path, monkeypatch, capsys):
    """Every run of transformers' Trainer has a folder of this name; and it may train on."""
    monkeypatch.chdir(tmp_path)
    theirs = theirs_of(**SMALL)
    for folder in ("a", "b"):
        theirs.transformer.wpe.weight.data.add_(1)
        theirs.save_pretrained(f"{folder}/checkpoint-5")
    for _ in range(2):
        assert prepare_data.main(["a/checkpoint-5"]) == 0
    assert "is there already" in capsys.readouterr().out
    assert "another --out_dir" in fails(prepare_data.main, ["b/checkpoint-5"], capsys)
    theirs.save_pretrained("a/checkpoint-5")
    assert "another --out_dir" in fails(prepare_data.main, ["a/checkpoint-5"], capsys)


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


@pytest.mark.parametrize("added", [[], ["<pad>"]])
def test_rows_behind_the_tokenizers_last_id(added, trained, tmp_path, capsys):
    """They are cut off, whether they only make the vocabulary round or have tokens."""
    write_tokenizer(trained, tmp_path)
    theirs = transformers.GPT2LMHeadModel.from_pretrained(tmp_path).eval()
    theirs.resize_token_embeddings(408)
    theirs.save_pretrained(tmp_path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    tokenizer.add_tokens(added)
    tokenizer.save_pretrained(tmp_path)
    ours = GPT.from_checkpoint(convert(tmp_path))
    assert "8 rows behind the tokenizer's last id are cut off" in capsys.readouterr().out
    assert ours.tokenizer.spec == trained
    idx = torch.arange(20)[None]
    with torch.no_grad():
        difference = ours(idx)[0] - theirs(idx).logits[..., :400]
    assert difference.abs().max() < 1e-4


def test_special_tokens_before_the_others(trained, tmp_path, capsys):
    """The model is converted, no command that fails is recommended, and a line says why."""
    write_tokenizer(trained, tmp_path)
    for path in tmp_path.glob("tokenizer*.json"):
        path.unlink()
    vocabulary = json.loads((tmp_path / "vocab.json").read_text(encoding="utf-8"))
    moved = {name: (i + 1) % 400 for name, i in vocabulary.items()}  # <|endoftext|> is 0
    (tmp_path / "vocab.json").write_text(json.dumps(moved))
    assert torch.load(convert(tmp_path), weights_only=True)["tokenizer"] == {}
    output = capsys.readouterr().out
    assert "its tokenizer is none of ours" in output
    assert "sample.py" not in output


def test_gpt2s_tokenizer_is_recognised(gpt2_vocabulary, tmp_path):
    """By its tokens, or by its size where no tokenizer was saved."""
    write_tokenizer(gpt2_vocabulary.spec, tmp_path)
    assert prepare_data.read_tokenizer(tmp_path, 50257) == {"kind": "gpt2"}
    for size in (50257, 50304):
        assert prepare_data.read_tokenizer(tmp_path / "nowhere", size) == {"kind": "gpt2"}


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


def test_other_models_of_the_hub(tmp_path):
    """Any GPT-2; another architecture is refused by its name, before its weights come."""
    theirs, served = theirs_of(**LARGER), tmp_path / "served"
    theirs.save_pretrained(served, max_shard_size="100KB")
    llama = {"config.json": b'{"model_type": "llama"}', "model.safetensors": b"never asked for"}
    models = {"me/tales-gpt2": files_in(served), "me/llama": llama}
    with hub.serve(models=models) as (address, _):
        done = hub.run(address, tmp_path, "model:me/tales-gpt2")
        hub.is_one_line(hub.run(address, tmp_path, "model:me/llama"), "'llama'")
    assert done.returncode == 0, done
    agree(GPT.from_checkpoint(tmp_path / "out" / "tales-gpt2" / "best.pt"), theirs)
    assert not [*(tmp_path / "hf").rglob("models--me--llama/**/*.safetensors")]


def test_a_folder_counts_with_its_config_only(tmp_path):
    (tmp_path / "gpt2").mkdir()
    hub.is_one_line(hub.run(None, tmp_path, "gpt2"), "gpt2 cannot be downloaded")


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
    "another GELU": config(activation_function="quick_gelu"),
    "a billion layers": config(n_layer=10**9), "another model": config(model_type="bert")}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_folder_that_means_harm(name, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    theirs = theirs_of(**LARGER)
    theirs.config.save_pretrained(tmp_path)
    torch.save(theirs.state_dict(), tmp_path / "pytorch_model.bin")
    DAMAGE[name](tmp_path)
    before = contents(tmp_path)
    line = fails(prepare_data.main, ["."], capsys)
    assert contents(tmp_path) == before  # nothing exploded
    if name in ("another GELU", "another model"):
        assert f"is {'quick_gelu' if name == 'another GELU' else 'bert'!r}" in line


def test_a_head_of_its_own(tmp_path, capsys):
    """An untied folder of transformers' converts with equal logits, and is fine-tuned."""
    config = transformers.GPT2Config(vocab_size=257, n_positions=32, n_embd=32, n_layer=2, n_head=2,
                                     tie_word_embeddings=False)
    theirs = transformers.GPT2LMHeadModel(config).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    path = prepare_data.convert_weights(str(tmp_path / "theirs"), str(tmp_path / "ours"))
    ours = GPT.from_checkpoint(path)
    assert not ours.config.tie_weights
    assert torch.equal(ours.lm_head.weight, theirs.lm_head.weight)
    agree(ours, theirs)
    (tmp_path / "text.txt").write_text("A cat sat on a mat. " * 200, encoding="utf-8")
    prepare_data.main([str(tmp_path / "text.txt"), "--vocab_size=257",
                       f"--out_dir={tmp_path / 'data'}"])
    tune = ["--preset=finetune", f"--init_from={path}", f"--data_dir={tmp_path / 'data'}",
            f"--out_dir={tmp_path / 'run'}", "--max_steps=3", "--learning_rate=1e-3"]
    assert train_gpt2.main(tune) == 0
    saved = torch.load(tmp_path / "run" / "ckpt.pt", weights_only=True)
    assert not torch.equal(saved["model"]["lm_head.weight"], theirs.lm_head.weight)
