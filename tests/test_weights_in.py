"""GPT-2s of OpenAI and transformers become checkpoints, their logits and ids unchanged; a malicious
folder is refused in one line."""
import json
import math
import sys
from functools import partial
from pathlib import Path

import hub
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, Bomb, agree, contents, fails, put, random_model
from test_training import same_tensors

import prepare_data
import sample
import train_gpt2
from train_gpt2 import GPT, Tokenizer, UserError, read_checkpoint

transformers = pytest.importorskip("transformers")
SMALL = dict(n_layer=1, n_head=1, n_embd=16)
LARGER = dict(n_layer=2, n_head=3, n_embd=48)
UNTIED = SMALL | dict(tie_word_embeddings=False)
WTE, WPE = "transformer.wte.weight", "transformer.wpe.weight"
LN, HEAD = "transformer.ln_f.bias", "lm_head.weight"


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


WHOLE = transformers.GPT2LMHeadModel.save_pretrained
PARTS = partial(WHOLE, max_shard_size="40KB")


def as_openai_has_it(theirs, folder):
    """gpt2 on the hub has no prefix, no head, and the mask saved."""
    state = {"h.0.attn.bias": torch.ones(1, 1, 24, 24).tril(), **theirs.transformer.state_dict()}
    theirs.config.save_pretrained(folder)
    torch.save(state, folder / "pytorch_model.bin")


@pytest.mark.parametrize("save, shape", [
    (WHOLE, SMALL),
    (WHOLE, LARGER),
    (PARTS, LARGER),
    (as_openai_has_it, LARGER),
    (WHOLE, UNTIED),
    (WHOLE, SMALL | dict(activation_function="relu")),
    (WHOLE, SMALL | dict(activation_function="gelu_fast")),
    (WHOLE, SMALL | dict(activation_function="gelu_pytorch_tanh")),
    (WHOLE, SMALL | dict(activation_function="gelu", initializer_range=0.3)),
    (WHOLE, SMALL | dict(activation_function="gelu_python", initializer_range=0.3)),
])
def test_their_models_open_here(save, shape, tmp_path):
    theirs = theirs_of(**shape)
    save(theirs, tmp_path)
    path = convert(tmp_path)
    agree(GPT.from_checkpoint(path), theirs)
    checkpoint = read_checkpoint(path)
    assert checkpoint["config"]["tie_weights"] == theirs.config.tie_word_embeddings
    assert checkpoint["step"] == 0
    assert checkpoint["best_val_loss"] == math.inf
    assert checkpoint["tokenizer"] == {}
    assert checkpoint["settings"] == {}


def test_an_untied_model_is_fine_tuned(stories, tmp_path):
    theirs = theirs_of(train_gpt2.open_data(stories).tokenizer.vocab_size, **UNTIED)
    theirs.save_pretrained(tmp_path)
    argv = ["--preset=finetune", f"--init_from={convert(tmp_path)}", f"--data_dir={stories}",
            f"--out_dir={tmp_path / 'run'}", "--max_steps=3", "--learning_rate=1e-3"]
    assert train_gpt2.main(argv) == 0
    weights = read_checkpoint(tmp_path / "run" / "ckpt.pt")["model"]
    assert not torch.equal(weights[HEAD], theirs.lm_head.weight)


def test_without_safetensors(tmp_path, monkeypatch):
    """Parts of pytorch_model.bin are read, and the package is named where only its files are."""
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


@pytest.mark.parametrize("bias", [True, False])
def test_a_checkpoint_of_nanogpt(bias, tmp_path, monkeypatch, capsys):
    """Its matrices lie as ours do. Biases that are missing are zeros; rows behind GPT-2's ids are
    cut off."""
    monkeypatch.chdir(tmp_path)
    weights = random_model(vocab_size=50257).state_dict()
    state = {"_orig_mod.transformer.h.0.attn.bias": torch.ones(1, 1, 24, 24).tril()}
    for name, tensor in weights.items():
        if bias or not name.endswith(".bias"):
            state[f"_orig_mod.{name}"] = tensor
        else:
            tensor.zero_()
    padded = F.pad(weights[WTE], (0, 0, 0, 47))
    state |= {f"_orig_mod.{WTE}": padded, f"_orig_mod.{HEAD}": padded}
    shape = SMALL | dict(vocab_size=50304, block_size=24, bias=bias, dropout=0.0)
    torch.save({"model": state, "model_args": shape, "iter_num": 5}, "ckpt.pt")
    with pytest.raises(UserError, match="nanoGPT wrote it"):
        read_checkpoint("ckpt.pt")
    assert prepare_data.main(["ckpt.pt"]) == 0
    output = capsys.readouterr().out
    assert "47 rows behind the tokenizer's last id are cut off" in output
    assert "GELU is taken to be exact" in output
    converted = read_checkpoint("out/ckpt/best.pt")
    assert converted["config"]["activation"] == "gelu_exact"
    same_tensors(converted["model"], weights)
    assert converted["tokenizer"] == {"kind": "gpt2"}


def test_other_checkpoints(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    refused = {"no checkpoint of nanoGPT's": {"model": {}}, "more than tensors": Bomb()}
    for message, value in refused.items():
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


OTHER_TOKENIZERS = {  # where tokenizer.json differs: by what
    "pre_tokenizer add_prefix_space": True,
    "pre_tokenizer use_regex": False,
    "pre_tokenizer type": "Whitespace",
    "normalizer": {"type": "NFD"},
    "model vocab Ġt": 399,
    "model vocab <|endoftext|>": 5,
    "model": [],
}


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
    checkpoint = read_checkpoint(convert(tmp_path))
    assert checkpoint["tokenizer"] == trained
    assert checkpoint["settings"] == {"rows": "documents"}
    (tmp_path / "vocab.json").unlink()
    (tmp_path / "tokenizer.json").write_text(tokenizer_json, encoding="utf-8")
    assert prepare_data.read_tokenizer(tmp_path, Tokenizer(trained).vocab_size) == trained


@pytest.mark.parametrize("where", OTHER_TOKENIZERS)
def test_a_tokenizer_that_reads_otherwise_is_none_of_ours(where, trained, tokenizer_json, tmp_path):
    """Its ids would be wrong, so the model is converted without it."""
    whole = json.loads(tokenizer_json)
    put(whole, where, OTHER_TOKENIZERS[where])
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
    agree(ours, theirs)


def test_special_tokens_before_the_others(trained, tmp_path, capsys):
    """The model is converted, no command that fails is recommended, and a line says why."""
    write_tokenizer(trained, tmp_path)
    vocabulary = json.loads((tmp_path / "vocab.json").read_text(encoding="utf-8"))
    moved = {name: (i + 1) % 400 for name, i in vocabulary.items()}  # <|endoftext|> is 0
    (tmp_path / "vocab.json").write_text(json.dumps(moved))
    assert read_checkpoint(convert(tmp_path))["tokenizer"] == {}
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
    """Downloaded once, then used without a network. Its tokens are known."""
    theirs = theirs_of(50257, **SMALL)
    theirs.save_pretrained(tmp_path / "served")
    served = files_in(tmp_path / "served") | {"pytorch_model.bin": b"never asked for"}
    best = tmp_path / "out" / "openai-gpt2" / "best.pt"
    with hub.serve(models={"openai-community/gpt2": served}) as (address, _):
        done = hub.run(address, tmp_path, "gpt2")
    assert done.returncode == 0, done
    agree(GPT.from_checkpoint(best), theirs)
    best.unlink()
    done = hub.run(None, tmp_path, "gpt2")
    assert best.exists(), done
    best.write_bytes(b"kept")
    assert "is there already" in hub.run(None, tmp_path, "gpt2").stdout
    assert best.read_bytes() == b"kept"


def test_other_models_of_the_hub(tmp_path):
    """Any GPT-2; another architecture is refused by its name, before its weights come."""
    theirs = theirs_of(**LARGER)
    theirs.save_pretrained(tmp_path / "served", max_shard_size="100KB")
    llama = {"config.json": b'{"model_type": "llama"}', "model.safetensors": b"never asked for"}
    models = {"me/tales-gpt2": files_in(tmp_path / "served"), "me/llama": llama}
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


@pytest.fixture
def refuses(tmp_path, monkeypatch, capsys):
    """The current folder is one of transformers'. A function: expects one line, and no harm."""
    monkeypatch.chdir(tmp_path)
    theirs = theirs_of(**LARGER)
    theirs.config.save_pretrained(tmp_path)
    torch.save(theirs.state_dict(), "pytorch_model.bin")

    def check(message="holds no GPT-2"):
        before = contents(tmp_path)
        assert message in fails(prepare_data.main, ["."], capsys)
        assert contents(tmp_path) == before  # nothing exploded
    return check


@pytest.mark.parametrize("name, value", [
    (LN, Bomb()),
    (LN, None),
    (LN, torch.full((48,), math.nan)),
    (LN, torch.empty(48, device="meta")),
    (WTE, torch.zeros(1).expand(10**6, 10**6)),  # claims 4 TB
    (WPE, torch.zeros(2)),
    (HEAD, torch.ones(300, 48)),
])
def test_weights_that_mean_harm(name, value, refuses):
    state = torch.load("pytorch_model.bin", weights_only=True)
    put(state, name, value)
    torch.save(state, "pytorch_model.bin")
    refuses()


@pytest.mark.parametrize("name, value, message", [
    ("n_layer", 10**9, "n_layer"),
    ("activation_function", "quick_gelu", "is 'quick_gelu'"),
    ("model_type", "bert", "is 'bert'"),
])
def test_configs_of_other_models(name, value, message, refuses):
    config = json.loads(Path("config.json").read_text())
    config[name] = value
    Path("config.json").write_text(json.dumps(config))
    refuses(message)


HEADER = b'{"a": {"dtype": "F32", "shape": [1000000, 1000000], "data_offsets": [0, 4000000]}}'


@pytest.mark.parametrize("name, content", [
    ("config.json", b"[" * 100_000),
    ("model.safetensors", len(HEADER).to_bytes(8, "little") + HEADER + bytes(8)),
])
def test_files_that_mean_harm(name, content, refuses):
    Path(name).write_bytes(content)
    refuses()
