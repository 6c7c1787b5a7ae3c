"""The model is GPT-2: counted, compared with transformers, and with plain NumPy."""
import math

import first_principles
import numpy as np
import pytest
import torch

import train_gpt2
from train_gpt2 import GPT, GPTConfig, Settings, causal_attention, make_optimizer

SMALL = dict(vocab_size=97, block_size=24, n_layer=2, n_head=3, n_embd=48)
GPT2 = dict(vocab_size=50257, block_size=1024, n_layer=12, n_head=12, n_embd=768)
CPU = torch.device("cpu")


def random_batch(vocab_size, rows, tokens, seed=0):
    generator = torch.Generator().manual_seed(seed)
    idx = torch.randint(vocab_size, (rows, tokens + 1), generator=generator)
    return idx[:, :-1].contiguous(), idx[:, 1:].contiguous()


def arrays(model, dtype=np.float32):
    return {name: t.detach().numpy().astype(dtype) for name, t in model.state_dict().items()}


def to_transformers(model):
    """The same weights in transformers' model, whose Conv1D matrices are transposed."""
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
    assert (train_gpt2.PRESETS["gpt2"] | GPT2) == train_gpt2.PRESETS["gpt2"] | {"vocab_size": 50257}
    model = GPT(GPTConfig(**GPT2)).eval()
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


def test_clipping_and_adamw_by_hand():
    torch.manual_seed(2)
    model, s = GPT(GPTConfig(**SMALL)), Settings(weight_decay=0.1, learning_rate=1e-2)
    optimizer, params, state = make_optimizer(model, s, CPU), arrays(model, np.float64), {}
    for seed in range(3):
        model.zero_grad()
        model(*random_batch(97, 2, 16, seed))[1].backward()
        grads = {name: p.grad.double().numpy() for name, p in model.named_parameters()}
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5).item()
        assert abs(first_principles.clip(grads, 0.5) - norm) < 1e-5 and norm > 0.5
        optimizer.step()
        first_principles.adamw_step(params, grads, state, 1e-2, s.beta1, s.beta2, 1e-8, 0.1)
    for name, parameter in model.named_parameters():
        assert np.abs(parameter.detach().numpy() - params[name]).max() < 1e-6, name


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
def test_initial_weights(spread):
    """Residual projections start smaller; sinusoids have the embeddings' size, and are fixed."""
    std = spread.get("init_std", 0.02)
    shape = SMALL | dict(n_embd=96, n_layer=8)
    model = GPT(GPTConfig(**shape), **spread)
    fixed = GPT(GPTConfig(**shape, pos_encoding="sinusoidal"), **spread)
    block = model.transformer.h[0]
    assert block.mlp.c_fc.weight.std().item() == pytest.approx(std, rel=0.05)
    assert block.mlp.c_proj.weight.std().item() == pytest.approx(std / 4, rel=0.05)
    rms = fixed.transformer.wpe.weight.square().mean().sqrt().item()
    assert rms == pytest.approx(std, rel=0.05)
    assert fixed.num_parameters() == model.num_parameters() - 24 * 96


def test_learning_rate_schedule():
    s = Settings(max_steps=100, warmup_steps=10, learning_rate=1.0, min_lr=0.1)
    rates = [train_gpt2.get_lr(step, s) for step in range(101)]
    assert rates[0] == pytest.approx(0.1) and rates[9] == pytest.approx(1.0)
    assert rates[10] == pytest.approx(1.0) and rates[100] == pytest.approx(0.1)
    assert rates[55] == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi / 2)))


def test_flops_per_token():
    model = GPT(GPTConfig(**GPT2 | dict(n_layer=1)))
    matrices = 50257 * 768 + 12 * 768 * 768
    vectors = 13 * 768 + 2 * 768  # biases and norms, which PaLM's count includes in N
    for T in (1024, 256):  # rows may be shorter than the context
        expected = 6 * (matrices + vectors) + 12 * 768 * T
        assert train_gpt2.flops_per_token(model, T) == expected
