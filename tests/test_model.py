"""The model is GPT-2: counted, compared with transformers, and with plain NumPy."""
import math
import time

import first_principles
import numpy as np
import pytest
import torch

import train_gpt2
from train_gpt2 import (
    GPT,
    PRESETS,
    GPTConfig,
    Settings,
    ShardedLoader,
    causal_attention,
    make_optimizer,
    open_data,
)

SMALL = dict(vocab_size=97, block_size=24, n_layer=2, n_head=3, n_embd=48)
GPT2 = dict(vocab_size=50257, block_size=1024, n_layer=12, n_head=12, n_embd=768)


def random_batch(vocab_size, rows, tokens, seed=0):
    generator = torch.Generator().manual_seed(seed)
    idx = torch.randint(vocab_size, (rows, tokens + 1), generator=generator)
    return idx[:, :-1].contiguous(), idx[:, 1:].contiguous()


def arrays(model, dtype=np.float32):
    return {name: t.detach().numpy().astype(dtype) for name, t in model.state_dict().items()}


def to_transformers(model):
    """The same weights in transformers' GPT2LMHeadModel, whose Conv1D matrices are transposed."""
    transformers = pytest.importorskip("transformers")
    c = model.config
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(
        vocab_size=c.vocab_size, n_positions=c.block_size, n_layer=c.n_layer, n_head=c.n_head,
        n_embd=c.n_embd))
    conv1d = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
    state = {name: t.t() if name.endswith(conv1d) else t for name, t in model.state_dict().items()}
    theirs.load_state_dict(state | {"lm_head.weight": state["transformer.wte.weight"]})
    return theirs.eval()


def test_gpt2_has_its_parameters_first_loss_and_logits():
    torch.manual_seed(0)
    settings = Settings(**PRESETS["gpt2"])
    names = ("block_size", "n_layer", "n_head", "n_embd")
    shape = {name: getattr(settings, name) for name in names}
    model = GPT(GPTConfig(vocab_size=50257, **shape)).eval()
    assert model.num_parameters() == 124_439_808
    idx, targets = random_batch(50257, 2, 48)
    with torch.no_grad():
        logits, loss = model(idx, targets)
        theirs = to_transformers(model)(idx).logits
    assert 10.8 < loss.item() < 11.1  # ln 50257 is 10.82; the logits' spread adds about 0.15
    assert (logits - theirs).abs().max() < 1e-4
    oracle, _ = first_principles.forward(arrays(model), idx.numpy(), n_head=12)
    assert np.abs(oracle - theirs.numpy()).max() < 1e-4
    assert abs(first_principles.cross_entropy(oracle, targets.numpy())[0] - loss.item()) < 1e-4


@pytest.mark.parametrize("activation", ["gelu", "relu"])
@pytest.mark.parametrize("positions", ["learned", "sinusoidal"])
def test_every_option_agrees_with_numpy(activation, positions):
    torch.manual_seed(1)
    model = GPT(GPTConfig(**SMALL, activation=activation, pos_encoding=positions))
    idx, targets = random_batch(97, 3, 24)
    targets[0, 5:] = -1
    logits, loss = model(idx, targets)
    loss.backward()
    params = arrays(model, np.float64)
    expected, cache = first_principles.forward(params, idx.numpy(), n_head=3, activation=activation)
    expected_loss, dlogits = first_principles.cross_entropy(expected, targets.numpy())
    assert np.abs(logits.detach().numpy() - expected).max() < 1e-5
    assert abs(loss.item() - expected_loss) < 1e-6
    gradients = first_principles.backward(params, cache, dlogits)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert np.abs(parameter.grad.numpy() - gradients[name]).max() < 1e-6, name


def test_adamw_step_is_torchs():
    torch.manual_seed(2)
    model = GPT(GPTConfig(**SMALL))
    settings = Settings(weight_decay=0.1, learning_rate=1e-2)
    optimizer = make_optimizer(model, settings, torch.device("cpu"))
    params, state = arrays(model, np.float64), {}
    for seed in range(3):
        model.zero_grad()
        model(*random_batch(97, 2, 16, seed))[1].backward()
        grads = {name: p.grad.double().numpy() for name, p in model.named_parameters()}
        optimizer.step()
        first_principles.adamw_step(
            params, grads, state, 1e-2, settings.beta1, settings.beta2, 1e-8, 0.1)
    for name, parameter in model.named_parameters():
        assert np.abs(parameter.detach().numpy() - params[name]).max() < 1e-6, name


def test_numpy_trains_on_the_stories_as_torch_does(stories):
    """Twenty steps with warm-up and clipping: all losses and gradients agree."""
    data = open_data(stories)
    settings = Settings(warmup_steps=5, max_steps=20, learning_rate=3e-3, grad_clip=0.5)
    torch.manual_seed(3)
    model = GPT(GPTConfig(data.vocab_size, block_size=112, n_layer=2, n_head=2, n_embd=32))
    optimizer = make_optimizer(model, settings, torch.device("cpu"))
    loader = ShardedLoader(stories, "train", 112, "documents", 1, data.vocab_size, data.eot)
    params, state, losses = arrays(model, np.float64), {}, []
    for step in range(20):
        idx, targets = loader.batch(range(8 * step, 8 * step + 8))
        lr = train_gpt2.get_lr(step, settings)
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.zero_grad()
        loss = model(idx, targets)[1]
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), settings.grad_clip)
        logits, cache = first_principles.forward(params, idx.numpy(), n_head=2)
        expected, dlogits = first_principles.cross_entropy(logits, targets.numpy())
        grads = first_principles.backward(params, cache, dlogits)
        assert abs(first_principles.clip(grads, settings.grad_clip) - norm.item()) < 1e-5
        assert abs(loss.item() - expected) < 1e-5
        for name, parameter in model.named_parameters():
            assert np.abs(parameter.grad.numpy() - grads[name]).max() < 1e-5, (step, name)
        optimizer.step()
        first_principles.adamw_step(
            params, grads, state, lr, settings.beta1, settings.beta2, 1e-8, 0.1)
        losses.append(expected)
    assert losses[-1] < losses[0] - 1


@pytest.mark.parametrize("queries", [20, 5, 1])  # fewer queries than keys: behind a cache
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_manual_attention_is_flash_attention(dtype, queries):
    torch.manual_seed(3)
    found = []
    q, k, v = (torch.randn(2, 3, n, 16, dtype=dtype, requires_grad=True) for n in (queries, 20, 20))
    for flash in (True, False):
        y = causal_attention(q, k, v, flash=flash)
        found.append((y, *torch.autograd.grad(y.square().sum(), (q, k, v))))
    for one, other in zip(*found, strict=True):
        assert (one - other).abs().max() < 1e-5
    with torch.autocast("cpu", torch.bfloat16):  # its manual path, where a CPU has no fast kernel
        rough = causal_attention(*(t.bfloat16() for t in (q, k, v)))
    assert rough.dtype == torch.bfloat16 and (rough - found[0][0]).abs().max() < 0.05


def test_the_future_is_hidden():
    model = GPT(GPTConfig(**SMALL)).eval()
    idx, _ = random_batch(97, 1, 24)
    changed = idx.clone()
    changed[0, 12] = (idx[0, 12] + 1) % 97
    before, after = model(idx)[0], model(changed)[0]  # (1, 24, 97)
    assert torch.equal(before[0, :12], after[0, :12])
    assert not torch.allclose(before[0, 12:], after[0, 12:])


@pytest.mark.parametrize("spread", [{}, {"init_std": 0.08}])
def test_residual_projections_start_smaller(spread):
    std = spread.get("init_std", 0.02)
    model = GPT(GPTConfig(**SMALL | dict(n_embd=96, n_layer=8)), **spread)
    block = model.transformer.h[0]
    assert block.mlp.c_fc.weight.std().item() == pytest.approx(std, rel=0.05)
    assert block.mlp.c_proj.weight.std().item() == pytest.approx(std / 4, rel=0.05)


@pytest.mark.parametrize("spread", [{}, {"init_std": 0.08}])
def test_sinusoids_have_the_size_of_embeddings_and_are_not_learned(spread):
    model = GPT(GPTConfig(**SMALL, pos_encoding="sinusoidal"), **spread)
    std = model.transformer.wte.weight.std().item()
    rms = model.transformer.wpe.weight.square().mean().sqrt().item()
    assert rms == pytest.approx(std, rel=0.05)
    assert model.num_parameters() == GPT(GPTConfig(**SMALL)).num_parameters() - 24 * 48


def test_learning_rate_schedule():
    s = Settings(max_steps=100, warmup_steps=10, learning_rate=1.0, min_lr=0.1)
    rates = [train_gpt2.get_lr(step, s) for step in range(101)]
    assert rates[0] == pytest.approx(0.1) and rates[9] == pytest.approx(1.0)
    assert rates[10] == pytest.approx(1.0) and rates[100] == pytest.approx(0.1)
    assert rates[55] == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi / 2)))


def test_decay_on_matrices_only():
    model = GPT(GPTConfig(**SMALL))
    decayed, left = make_optimizer(model, Settings(), torch.device("cpu")).param_groups
    assert decayed["weight_decay"] > 0 and left["weight_decay"] == 0
    assert {p.dim() for p in decayed["params"]} == {2} and {p.dim() for p in left["params"]} == {1}
    assert sum(p.numel() for g in (decayed, left) for p in g["params"]) == model.num_parameters()


def test_matmul_speed_is_measured():
    began = time.perf_counter()
    speed = train_gpt2.matmul_speed(torch.device("cpu"), torch.float32, n=256)
    seconds = time.perf_counter() - began
    assert 2 * 256**3 / seconds < speed < 1e15


def test_flops_per_token():
    model = GPT(GPTConfig(**GPT2 | dict(n_layer=1)))
    matrices = 50257 * 768 + 12 * 768 * 768
    vectors = 13 * 768 + 2 * 768  # biases and norms, which PaLM's count includes in N
    for T in (1024, 256):  # rows may be shorter than the context
        expected = 6 * (matrices + vectors) + 12 * 768 * T
        assert train_gpt2.flops_per_token(model, T) == expected
