"""GPT-2 and AdamW in NumPy, every derivative worked out by hand.

Each piece comes twice, forward and backward. dx is short for d(loss)/dx, an array shaped like x. A
backward function gets the d of its output and returns the d of its inputs (the chain rule); a value
used twice gets two d's, which add up. The tests compare train_gpt2.py with this file.

Shapes: B sequences of T tokens, C channels per token, H heads of D = C / H channels, V tokens.
"""

import math

import numpy as np

IGNORE = -1  # a target with this value takes no part in the loss
LN_EPS = 1e-5  # keeps LayerNorm from dividing by zero (GPT-2's code)
GELU_A = 0.044715  # this and the next: Hendrycks & Gimpel 2016, section 2
GELU_K = math.sqrt(2 / math.pi)


# ---- Linear ----
def linear(x, params, name):
    # (B, T, in) @ (in, out) -> (B, T, out)
    return x @ params[name + ".weight"].T + params[name + ".bias"]


def matrix_gradient(dy, x):
    # y_j = sum_i W_ji x_i, so dW_ji = dy_j x_i. W serves all B * T positions: its d is summed over
    # these, dW = dy^T x
    dy = dy.reshape(-1, dy.shape[-1])  # (B * T, out)
    x = x.reshape(-1, x.shape[-1])  # (B * T, in)
    return dy.T @ x  # (out, in)


def linear_backward(dy, x, params, name, grads):
    # y_j = sum_i W_ji x_i + b_j, so
    #   dx_i = sum_j dy_j W_ji,   db_j = dy_j, summed over all positions
    grads[name + ".weight"] = matrix_gradient(dy, x)
    grads[name + ".bias"] = dy.sum(axis=(0, 1))
    return dy @ params[name + ".weight"]  # (B, T, in)


# ---- LayerNorm (Ba et al. 2016) ----
def layer_norm(x, params, name):
    centred = x - x.mean(axis=-1, keepdims=True)
    variance = (centred * centred).mean(axis=-1, keepdims=True)  # (B, T, 1)
    std = np.sqrt(variance + LN_EPS)
    xhat = centred / std
    y = xhat * params[name + ".weight"] + params[name + ".bias"]
    return y, (xhat, std)


def layer_norm_backward(dy, saved, params, name, grads):
    # x_j moves xhat_i = (x_i - mean) / std in three ways:
    #   directly, if i = j:   + 1 / std
    #   through the mean:     - 1 / (C std)
    #   through std:          - xhat_i xhat_j / (C std), as 2 std dstd/dx_j = 2 (x_j - mean) / C
    # Times dxhat_i, summed over i (a sum divided by C is a mean):
    #   dx_j = (dxhat_j - mean(dxhat) - xhat_j mean(dxhat xhat)) / std
    xhat, std = saved
    grads[name + ".weight"] = (dy * xhat).sum(axis=(0, 1))  # (C,)
    grads[name + ".bias"] = dy.sum(axis=(0, 1))
    dxhat = dy * params[name + ".weight"]
    pull = (dxhat * xhat).mean(axis=-1, keepdims=True)  # (B, T, 1)
    mean = dxhat.mean(axis=-1, keepdims=True)  # (B, T, 1)
    return (dxhat - mean - xhat * pull) / std


# ---- Softmax ----
def softmax(s):
    e = np.exp(s - s.max(axis=-1, keepdims=True))  # the shift stops overflow
    return e / e.sum(axis=-1, keepdims=True)


def softmax_backward(dp, p):
    # p_i = exp(s_i) / Z with Z = sum_k exp(s_k): dp_i/ds_j = p_i ([i = j] - p_j), and
    #   ds_j = sum_i dp_i p_i ([i = j] - p_j) = p_j (dp_j - sum_i dp_i p_i)
    mean = (dp * p).sum(axis=-1, keepdims=True)  # of dp, weighted by p
    return p * (dp - mean)


# ---- Attention (Vaswani et al. 2017, section 3.2) ----
def attention(x, params, name, n_head):
    B, T, C = x.shape
    D = C // n_head
    qkv = linear(x, params, name + ".c_attn")  # (B, T, 3C)
    qkv = qkv.reshape(B, T, 3, n_head, D)
    q, k, v = qkv.transpose(2, 0, 3, 1, 4)  # each (B, H, T, D)
    # A dot product of D terms of variance 1 has variance D, over sqrt(D) again 1 (section 3.2.1)
    scores = q @ k.swapaxes(-1, -2) / math.sqrt(D)  # (B, H, T, T): row asks, column answers
    past = np.tri(T, dtype=bool)  # (T, T), True where column <= row
    scores = np.where(past, scores, -np.inf)  # exp(-inf) = 0 hides the future
    p = softmax(scores)  # (B, H, T, T)
    out = p @ v  # (B, H, T, D)
    merged = out.transpose(0, 2, 1, 3).reshape(B, T, C)
    return linear(merged, params, name + ".c_proj"), (x, q, k, v, p, merged)


def attention_backward(dy, saved, params, name, grads):
    # out = p v, p = softmax(scores), scores = q k^T / sqrt(D). Y = A B has dA = dY B^T and
    # dB = A^T dY. Hence
    #   dp = dout v^T,   dv = p^T dout,   dq = dscores k / sqrt(D),   dk = dscores^T q / sqrt(D)
    # The mask needs no line: where p = 0, softmax_backward gives 0
    x, q, k, v, p, merged = saved
    B, H, T, D = q.shape
    dmerged = linear_backward(dy, merged, params, name + ".c_proj", grads)  # (B, T, C)
    dout = dmerged.reshape(B, T, H, D).transpose(0, 2, 1, 3)  # (B, H, T, D)
    dv = p.swapaxes(-1, -2) @ dout  # (B, H, T, D)
    dp = dout @ v.swapaxes(-1, -2)  # (B, H, T, T)
    dscores = softmax_backward(dp, p) / math.sqrt(D)
    dq = dscores @ k  # (B, H, T, D)
    dk = dscores.swapaxes(-1, -2) @ q
    dqkv = np.stack([dq, dk, dv])  # (3, B, H, T, D)
    dqkv = dqkv.transpose(1, 3, 0, 2, 4).reshape(B, T, -1)  # (B, T, 3C)
    return linear_backward(dqkv, x, params, name + ".c_attn", grads)  # (B, T, C)


# ---- MLP (Vaswani et al. 2017, section 3.3) ----
def activate(x, activation):
    """The nonlinearity and its slope at each entry."""
    if activation == "relu":
        return np.maximum(x, 0), (x > 0).astype(x.dtype)
    # y = x (1 + t) / 2 with t = tanh(u), u = K (x + A x^3). tanh(u) has slope 1 - t^2:
    #   slope = (1 + t) / 2  +  x / 2 * (1 - t^2) * K (1 + 3 A x^2)
    t = np.tanh(GELU_K * (x + GELU_A * x * x * x))
    du = GELU_K * (1 + 3 * GELU_A * x * x)
    slope = (1 + t) / 2 + x / 2 * (1 - t * t) * du
    return x * (1 + t) / 2, slope


def mlp(x, params, name, activation):
    wide = linear(x, params, name + ".c_fc")
    hidden, slope = activate(wide, activation)
    y = linear(hidden, params, name + ".c_proj")
    return y, (x, hidden, slope)


def mlp_backward(dy, saved, params, name, grads):
    x, hidden, slope = saved
    dhidden = linear_backward(dy, hidden, params, name + ".c_proj", grads)
    dwide = dhidden * slope
    return linear_backward(dwide, x, params, name + ".c_fc", grads)


# ---- The model ----
WTE, WPE, HEAD = "transformer.wte.weight", "transformer.wpe.weight", "lm_head.weight"


def output_matrix(params):
    """(V, C): one of its own, or the embedding again (weight tying, Press & Wolf 2017)."""
    return params.get(HEAD, params[WTE])


def forward(params, idx, n_head, activation="gelu"):
    """Token ids (B, T) -> logits (B, T, V), plus what backward will need."""
    T = idx.shape[1]
    x = params[WTE][idx] + params[WPE][:T]  # (B, T, C) + (T, C)
    n_layer = sum(name.endswith(".ln_1.weight") for name in params)
    blocks = []
    for i in range(n_layer):
        h = f"transformer.h.{i}"
        # Pre-norm: the branches' input is normalized, not the residual stream x (GPT-2, 2.3)
        normed, ln_1 = layer_norm(x, params, h + ".ln_1")
        branch, attn = attention(normed, params, h + ".attn", n_head)
        x = x + branch
        normed, ln_2 = layer_norm(x, params, h + ".ln_2")
        branch, ff = mlp(normed, params, h + ".mlp", activation)
        x = x + branch
        blocks.append((ln_1, attn, ln_2, ff))
    final, ln_f = layer_norm(x, params, "transformer.ln_f")  # (B, T, C)
    logits = final @ output_matrix(params).T  # (B, T, V)
    return logits, {"idx": idx, "blocks": blocks, "ln_f": ln_f, "final": final}


def cross_entropy(logits, targets):
    """The mean of -log p(target) over the targets that count, and the d of the logits."""
    # loss = log Z - s_target, and d log Z / ds_j = exp(s_j) / Z = p_j: ds_j = p_j - [j = target]
    keep = targets != IGNORE  # (B, T)
    n = int(keep.sum())
    target = np.where(keep, targets, 0)[..., None]  # (B, T, 1); 0 stands in where ignored
    s = logits - logits.max(axis=-1, keepdims=True)  # (B, T, V), at most 0
    z = np.exp(s).sum(axis=-1, keepdims=True)  # (B, T, 1), at least 1
    losses = np.log(z) - np.take_along_axis(s, target, axis=-1)  # (B, T, 1)
    loss = losses[keep].sum() / n
    p = np.exp(s) / z  # (B, T, V)
    right = np.arange(s.shape[-1]) == target  # (B, T, V), [j = target]
    dlogits = (p - right) * keep[..., None] / n
    return float(loss), dlogits


def backward(params, cache, dlogits):
    """{parameter name: gradient}."""
    grads = {}
    dhead = matrix_gradient(dlogits, cache["final"])  # (V, C)
    dfinal = dlogits @ output_matrix(params)  # (B, T, C)
    dx = layer_norm_backward(dfinal, cache["ln_f"], params, "transformer.ln_f", grads)
    for i in reversed(range(len(cache["blocks"]))):
        h = f"transformer.h.{i}"
        ln_1, attn, ln_2, ff = cache["blocks"][i]
        # x + branch(x) uses x twice: the sum passes dx on, the branch adds its share
        dnormed = mlp_backward(dx, ff, params, h + ".mlp", grads)
        dx = dx + layer_norm_backward(dnormed, ln_2, params, h + ".ln_2", grads)
        dnormed = attention_backward(dx, attn, params, h + ".attn", grads)
        dx = dx + layer_norm_backward(dnormed, ln_1, params, h + ".ln_1", grads)
    idx = cache["idx"]  # (B, T)
    grads[WTE] = np.zeros_like(params[WTE])
    np.add.at(grads[WTE], idx, dx)  # grads[WTE][idx] += dx would count a repeated token once
    grads[WPE] = np.zeros_like(params[WPE])
    grads[WPE][:idx.shape[1]] = dx.sum(axis=0)  # the B sequences share positions
    if HEAD in params:
        grads[HEAD] = dhead
    else:
        grads[WTE] += dhead  # the same matrix, used twice
    return grads


# ---- Learning from the gradients ----
def clip(grads, max_norm):
    """Scale the gradients, as one vector, to max_norm (Pascanu et al. 2013)."""
    squares = sum((g * g).sum() for g in grads.values())
    norm = math.sqrt(squares)
    scale = min(1.0, max_norm / (norm + 1e-6))  # 1e-6 as in torch.nn.utils.clip_grad_norm_
    for g in grads.values():
        g *= scale
    return norm


def adamw_step(params, grads, state, lr, beta1, beta2, eps=1e-8, weight_decay=0.1):
    """One AdamW update, in place; state begins as {}. eps: Kingma & Ba 2015, Algorithm 1."""
    t = state.get("step", 0) + 1
    state["step"] = t
    for name, g in grads.items():
        w = params[name]
        m, v = state.setdefault(name, (np.zeros_like(w), np.zeros_like(w)))
        # Decay acts on the weight itself (Loshchilov & Hutter 2019, Algorithm 2), and on matrices
        # only (GPT paper, section 4.1)
        if w.ndim >= 2:
            w *= 1 - lr * weight_decay
        m *= beta1
        m += (1 - beta1) * g  # running mean of g
        v *= beta2
        v += (1 - beta2) * g * g  # running mean of g^2
        # They start at 0: after t steps they hold a share 1 - beta^t of a full average
        mhat = m / (1 - beta1 ** t)
        vhat = v / (1 - beta2 ** t)
        w -= lr * mhat / (np.sqrt(vhat) + eps)  # about lr per step
