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


def random_batch(vocab_size, rows, tokens):
    return torch.randint(vocab_size, (2, rows, tokens), generator=torch.manual_seed(0))


def arrays(model, dtype=np.float32):
    """{name: NumPy array} of a model's weights."""
    return {name: tensor.numpy().astype(dtype) for name, tensor in model.state_dict().items()}


def largest_difference(tensor, array):
    return np.abs(tensor.detach().numpy() - array).max()


def to_transformers(model):
    """The same weights in transformers' model, whose Conv1D matrices are transposed."""
    transformers = pytest.importorskip("transformers")
    c = model.config
    config = transformers.GPT2Config(
        vocab_size=c.vocab_size, n_positions=c.block_size, n_layer=c.n_layer, n_head=c.n_head,
        n_embd=c.n_embd)
    state = model.state_dict()
    for name in state:
        if name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")):
            state[name] = state[name].t()
    state["lm_head.weight"] = state["transformer.wte.weight"]
    theirs = transformers.GPT2LMHeadModel(config)
    theirs.load_state_dict(state)
    return theirs.eval()


def test_gpt2_has_its_parameters_first_loss_and_logits():
    torch.manual_seed(0)
    shape = GPTConfig(**GPT2)
    for name, value in train_gpt2.PRESETS["gpt2"].items():
        assert getattr(shape, name, value) == value
    model = GPT(shape).eval()
    assert model.num_parameters() == 124_439_808
    idx, targets = random_batch(50257, 2, 48)
    with torch.no_grad():
        logits, loss = model(idx, targets)
        theirs = to_transformers(model)(idx).logits
    assert 10.8 < loss < 11.1  # ln 50257 is 10.82; the logits' spread adds about 0.15
    assert (logits - theirs).abs().max() < 1e-4
    by_hand, _ = first_principles.forward(arrays(model), idx.numpy(), n_head=12)
    assert largest_difference(theirs, by_hand) < 1e-4
    loss_by_hand, _ = first_principles.cross_entropy(by_hand, targets.numpy())
    assert abs(loss_by_hand - loss) < 1e-4


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("activation", ["gelu", "relu"])
@pytest.mark.parametrize("positions", ["learned", "sinusoidal"])
def test_every_option_agrees_with_numpy(activation, positions, tied):
    torch.manual_seed(1)
    config = GPTConfig(**SMALL, activation=activation, pos_encoding=positions, tie_weights=tied)
    model = GPT(config)
    if not tied:
        torch.nn.init.normal_(model.lm_head.weight, std=0.05)  # zeros would hide mistakes
    idx, targets = random_batch(97, 3, 24)
    targets[0, 5:] = -1
    logits, loss = model(idx, targets)
    loss.backward()
    params = arrays(model, np.float64)
    assert ("lm_head.weight" in params) != tied
    expected, cache = first_principles.forward(params, idx.numpy(), n_head=3, activation=activation)
    expected_loss, dlogits = first_principles.cross_entropy(expected, targets.numpy())
    assert largest_difference(logits, expected) < 1e-5
    assert abs(loss - expected_loss) < 1e-6
    gradients = first_principles.backward(params, cache, dlogits)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert largest_difference(parameter.grad, gradients[name]) < 1e-6, name


def test_clipping_and_adamw_by_hand():
    torch.manual_seed(2)
    model = GPT(GPTConfig(**SMALL))
    s = Settings(weight_decay=0.1, learning_rate=1e-2)
    optimizer = make_optimizer(model, s, torch.device("cpu"))
    params = arrays(model, np.float64)
    state = {}
    idx, targets = random_batch(97, 2, 16)
    for _ in range(3):
        _, loss = model(idx, targets)
        loss.backward()
        grads = {name: p.grad.double().numpy() for name, p in model.named_parameters()}
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        assert norm > 0.5
        assert abs(first_principles.clip(grads, 0.5) - norm) < 1e-5
        optimizer.step()
        optimizer.zero_grad()
        first_principles.adamw_step(params, grads, state, 1e-2, s.beta1, s.beta2, 1e-8, 0.1)
    for name, parameter in model.named_parameters():
        assert largest_difference(parameter, params[name]) < 1e-6, name


@pytest.mark.parametrize("queries", [20, 5, 1])  # fewer queries than keys: behind a cache
def test_manual_attention_is_flash_attention(queries):
    """Outputs and gradients. In bfloat16 too, where a CPU has no fast kernel."""
    torch.manual_seed(3)
    q = torch.randn(2, 3, queries, 16, requires_grad=True)
    k, v = torch.randn(2, 2, 3, 20, 16, requires_grad=True)

    def attend(flash):
        y = causal_attention(q, k, v, flash=flash)
        return [y, *torch.autograd.grad(y.square().sum(), (q, k, v))]
    for flash, manual in zip(attend(True), attend(False), strict=True):
        assert (flash - manual).abs().max() < 1e-5
    with torch.autocast("cpu", torch.bfloat16):
        rough = causal_attention(q.bfloat16(), k.bfloat16(), v.bfloat16())
    assert rough.dtype == torch.bfloat16
    assert (rough - causal_attention(q, k, v)).abs().max() < 0.05


def test_the_future_is_hidden():
    model = GPT(GPTConfig(**SMALL)).eval()
    idx = torch.arange(24)[None]
    before, _ = model(idx)  # (1, 24, 97)
    idx[0, 12] = 50
    after, _ = model(idx)
    assert torch.equal(before[:, :12], after[:, :12])
    assert not torch.allclose(before[:, 12:], after[:, 12:])


def size(weights):
    """Root mean square."""
    return weights.square().mean().sqrt().item()


@pytest.mark.parametrize("tied, init_std, matrices, embeddings, sinusoids", [
    (True, 0.02, 0.02, 0.02, 0.02),
    (True, 0.08, 0.08, 0.08, 0.08),
    (False, 0.08, 0.08, 2, math.sqrt(1 / 2)),
    (False, None, 1 / math.sqrt(3 * 96), 2, math.sqrt(1 / 2)),
])
def test_initial_weights(tied, init_std, matrices, embeddings, sinusoids):
    """Their sizes; residual projections are divided by the root of 2 * n_layer. A table of
    sinusoids is fixed."""
    shape = SMALL | dict(n_embd=96, n_layer=8, tie_weights=tied)
    torch.manual_seed(0)
    model = GPT(GPTConfig(**shape), init_std)
    weights = model.state_dict()
    for name, expected in {
            "transformer.wte": embeddings,
            "transformer.wpe": embeddings,
            "transformer.h.0.attn.c_attn": matrices,
            "transformer.h.0.attn.c_proj": matrices / 4,
            "transformer.h.0.mlp.c_fc": matrices,
            "transformer.h.0.mlp.c_proj": matrices / 4}.items():
        assert size(weights[f"{name}.weight"]) == pytest.approx(expected, rel=0.05), name
    if not tied:
        assert size(model.lm_head.weight) == 0
        assert size(model.transformer.ln_f.weight) == 5
        assert size(model.transformer.ln_f.bias) == 2
    fixed = GPT(GPTConfig(**shape, pos_encoding="sinusoidal"), init_std)
    assert size(fixed.transformer.wpe.weight) == pytest.approx(sinusoids, rel=1e-5)
    assert fixed.num_parameters() == model.num_parameters() - 24 * 96


def test_learning_rate_schedule():
    s = Settings(max_steps=100, warmup_steps=10, learning_rate=1.0, min_lr=0.1)
    a_third = 0.1 + 0.9 * (1 + math.cos(math.pi / 3)) / 2
    for step, rate in {0: 0.1, 9: 1.0, 10: 1.0, 40: a_third, 100: 0.1}.items():
        assert train_gpt2.get_lr(step, s) == pytest.approx(rate)


@pytest.mark.parametrize("tied", [True, False])  # the one matrix, or the head alone
@pytest.mark.parametrize("T", [1024, 256])  # rows may be shorter than the context
def test_flops_per_token(T, tied):
    model = GPT(GPTConfig(**GPT2 | dict(n_layer=1, tie_weights=tied)))
    matrices = 50257 * 768 + 12 * 768 * 768
    vectors = 13 * 768 + 2 * 768  # biases and norms, which PaLM's count includes in N
    expected = 6 * (matrices + vectors) + 12 * 768 * T
    assert train_gpt2.flops_per_token(model, T) == expected
