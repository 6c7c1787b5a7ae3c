"""Train a GPT-2 from scratch, in one file. Its first part can be read in an evening.

    python train_gpt2.py                              # offline, 2 minutes: learns little stories
    python train_gpt2.py --n_layer=4 --max_steps=500  # each setting below is also an option
    python train_gpt2.py --preset=gpt2                # after `python prepare_data.py fineweb_edu`
    torchrun --standalone --nproc_per_node=8 train_gpt2.py --preset=gpt2  # on eight GPUs

Part 1 is the lesson, Part 2 the machinery. The comments cite GPT (Radford et al. 2018), GPT-2
(Radford et al. 2019), GPT-3 (Brown et al. 2020) and Attention (Vaswani et al. 2017).
"""
import argparse
import ast
import copy
import csv
import ctypes
import difflib
import functools
import html
import inspect
import itertools
import json
import math
import os
import pickle
import platform
import re
import shlex
import signal
import subprocess
import sys
import time
import typing
import warnings
import zlib
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

# For speed, and read when torch is imported: a thread that waits for others should soon sleep.
# By default it keeps its core busy, and beside another program training was 10 times as slow
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import filelock
import numpy as np
import tiktoken
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from tqdm import tqdm

# ======== PART 1: THE LESSON ========

# ---- Settings ----


@dataclass
class Settings:
    # the run (edit values here, or give options: --max_steps=200)
    preset: str = "stories"  # a row of PRESETS, which changes some settings
    data_dir: str = "data/stories"  # shards and meta.json, as prepare_data.py writes them
    out_dir: str = ""  # the run's folder; empty: out/<preset>
    init_from: str = ""  # weights to start from: a checkpoint, or gpt2
    overwrite: bool = False  # start over in out_dir, whatever it holds
    resume: Literal["auto", "always"] = "auto"  # always: go on, with other settings or code too
    compare: str = ""  # the folder of a run to compare with; empty: the first of this name
    seed: int = 1  # of initial weights, data order and dropout
    # the machine
    device: str = "auto"  # auto (CUDA, else MPS, else CPU), cpu, cuda, cuda:1, mps
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # of matrix products
    compile_model: Literal["auto", True, False] = "auto"  # auto: on CUDA, unless deterministic
    attention: Literal["flash", "manual"] = "flash"  # fused kernel, or the five lines it stands for
    deterministic: bool = False  # the same run has the same bits on a GPU too; slower
    # the batch
    rows: Literal["stream", "documents"] = "documents"  # equal cuts, or a document per row
    batch_size: int = 16  # rows in a micro-batch: what one GPU, or the CPU, handles at once
    block_size: int = 112  # context length in tokens; the longest story has 108
    total_batch_size: int | None = None  # tokens a step with padding; None: batch_size * block_size
    grad_accum_steps: int | None = None  # sets total_batch_size to batch_size * block_size * this
    # the optimization
    max_steps: int = 600  # optimizer steps
    max_minutes: float | None = None  # save and stop after this time; the same command resumes
    warmup_steps: int = 50  # steps in which the learning rate rises to its peak
    learning_rate: float = 8e-3  # the peak; small models take high rates
    min_lr: float = 0.0  # learning rate at the end of the schedule
    weight_decay: float = 0.1  # GPT-3 paper, appendix B
    beta1: float = 0.9  # decay of AdamW's first moment, the mean gradient
    beta2: float = 0.95  # of the second, the mean square (GPT-3 paper, appendix B)
    grad_clip: float = 1.0  # clip the global gradient norm; 0 disables
    dropout: float = 0.0  # share of activations zeroed, against overfitting (memorizing)
    # the model
    n_layer: int = 2  # blocks
    n_head: int = 4  # attention heads in each block
    n_embd: int = 96  # width: the embedding dimension
    pos_encoding: Literal["learned", "sinusoidal"] = "learned"  # a learned table, or fixed sines
    activation: Literal["gelu", "relu", "gelu_exact"] = "gelu"  # the nonlinearity of the MLPs
    tie_weights: bool = True  # the token embedding is the output matrix too
    init_std: float | None = 0.08  # of initial weights; narrow models need more; None: by n_embd
    # what is measured, and how often (in steps)
    eval_only: bool = False  # measure init_from, or out_dir's best.pt; no training
    eval_every: int = 30  # validation loss, picture and report
    eval_tokens: int | None = None  # validation tokens per evaluation; None: all of them
    sample_every: int = 200  # a text; HellaSwag, a multiple-choice test, if prepared
    checkpoint_every: int = 300  # a kill loses at most these steps
    log_every: int = 20  # a line on the screen and a row in log.csv


# What each preset changes. The larger sizes take the GPT-3 paper's learning rates, table 2.1
_SHARED = dict(init_std=0.02,  # GPT paper, section 4.1
               eval_every=250, sample_every=1000, checkpoint_every=1000, log_every=10)
_CHARS = dict(data_dir="data/shakespeare", rows="stream")
_GPT2 = _SHARED | dict(
    data_dir="data/fineweb_edu", rows="stream", n_layer=12, n_head=12, n_embd=768, block_size=1024,
    batch_size=32, total_batch_size=524_288,  # 2^19: the GPT-3 paper, table 2.1, has 0.5M tokens
    max_steps=19_073,  # * 2^19 tokens = 10 billion: the FineWeb-Edu sample, once
    warmup_steps=715,  # * 2^19 = 375 million tokens: GPT-3 paper, appendix B
    learning_rate=6e-4, min_lr=6e-5,  # GPT-3 paper, table 2.1; down to 10 %: appendix B
    eval_tokens=10_485_760)
PRESETS = {
    "stories": {},
    "shakespeare_char": _CHARS | _SHARED | dict(  # 24 epochs of 1 MB: dropout is needed
        n_layer=6, n_head=6, n_embd=384, block_size=256, dropout=0.2, batch_size=64, max_steps=1500,
        warmup_steps=100, learning_rate=1e-3, min_lr=1e-4, beta2=0.99),
    "shakespeare_cpu": _CHARS | dict(  # of some 70 settings, the fastest to loss 1.88
        n_layer=4, n_head=4, n_embd=128, block_size=64, init_std=0.07, max_steps=620,
        learning_rate=6e-3, beta1=0.75, beta2=0.98, eval_every=310, sample_every=310,
        checkpoint_every=310),
    "tinystories_char": dict(
        data_dir="data/tinystories", rows="stream", n_layer=4, n_head=4, n_embd=64, block_size=32,
        activation="relu", init_std=0.02, max_steps=10_000, warmup_steps=100, learning_rate=1e-3,
        min_lr=1e-4, eval_every=500, eval_tokens=200_000, sample_every=2500,
        checkpoint_every=2500, log_every=100),
    "gpt2_nano": _SHARED | dict(  # 32,768 tokens a step, 3.3 epochs of 99 million tokens
        data_dir="data/fineweb_edu_bpe", rows="stream", n_layer=12, n_head=8, n_embd=512,
        block_size=1024, pos_encoding="sinusoidal", activation="relu", tie_weights=False,
        init_std=None, batch_size=32, max_steps=10_000, warmup_steps=200, learning_rate=3e-4,
        eval_tokens=1_048_576),
    "finetune": dict(  # of weights that learned much already: small steps, and few
        rows="stream", block_size=256, batch_size=8, max_steps=200, warmup_steps=20,
        learning_rate=3e-5, dropout=0.1, eval_every=20, sample_every=100, checkpoint_every=100,
        log_every=10, eval_tokens=65_536),
    "gpt2_mini": _SHARED | dict(  # 65,536 tokens * 7,629 steps = 0.5 billion
        data_dir="data/fineweb_edu", rows="stream", n_layer=6, n_head=6, n_embd=384,
        block_size=1024, total_batch_size=65_536, max_steps=7629, warmup_steps=200,
        learning_rate=1e-3, min_lr=1e-4, eval_tokens=1_048_576),
    "gpt2": _GPT2,
    "gpt2_medium": _GPT2 | dict(
        n_layer=24, n_head=16, n_embd=1024, batch_size=16, learning_rate=3e-4, min_lr=3e-5),
    "gpt2_large": _GPT2 | dict(
        n_layer=36, n_head=20, n_embd=1280, batch_size=8, learning_rate=2.5e-4, min_lr=2.5e-5),
    "gpt2_xl": _GPT2 | dict(
        n_layer=48, n_head=25, n_embd=1600, batch_size=4, learning_rate=2e-4, min_lr=2e-5),
}


# ---- The model ----
# A token is a piece of text, given by its number in the vocabulary; a row is a sequence of tokens
# that the model reads at once. Shapes in the comments: B rows in a batch, T tokens in a row,
# C = n_embd, head_dim = C / n_head, V = vocab_size.


@dataclass
class GPTConfig:
    """The shape of a model: all that is needed to rebuild it around its weights."""

    vocab_size: int = 50257
    block_size: int = 1024
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0
    pos_encoding: str = "learned"
    activation: str = "gelu"
    attention: str = "flash"
    tie_weights: bool = True


def kernel_is_slow(q):
    """On a CPU the kernel for bfloat16 takes 2 to 6 times as long as the plain lines."""
    return q.is_cpu and q.dtype == torch.bfloat16


def causal_attention(q, k, v, dropout=0.0, flash=True):
    """Scaled dot-product attention (Attention paper, section 3.2.1). Each token takes a
    weighted mean of the values of the tokens up to itself; the causal mask hides the later ones,
    which the model learns to predict. q and the result are (B, n_head, T, head_dim); k and v are
    (B, n_head, S, head_dim). In training S is T; a KVCache (below) puts earlier tokens before."""
    T, S = q.size(-2), k.size(-2)
    # The fused kernel, one program on the device, does the lines below without storing the scores
    # (Dao et al. 2022). It brings the causal mask for T = S; a single query needs none
    if flash and (T == 1 or (T == S and not kernel_is_slow(q))):
        return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=T > 1)
    # Scores of random vectors spread as the root of head_dim. Undivided, one could get all weight
    scores = q / math.sqrt(q.size(-1)) @ k.transpose(-2, -1)  # (B, n_head, T, S)
    # A query (line) must not look at a later key (column): e^-inf is a weight of 0. For T = S = 3,
    # and for T = 2 new tokens behind 2 in the cache, S = 4, the mask is
    #     0 -inf -inf        0  0  0 -inf      triu(d) keeps what lies on or above diagonal d,
    #     0   0  -inf        0  0  0   0       counted from the main one: S - T + 1 is the
    #     0   0    0                           first that is hidden
    mask = torch.full((T, S), -math.inf, dtype=q.dtype, device=q.device).triu(S - T + 1)
    weights = F.softmax(scores + mask, dim=-1)  # (B, n_head, T, S), each line sums to 1
    weights = F.dropout(weights.to(v.dtype), dropout)  # softmax may have gone up to float32
    return weights @ v  # (B, n_head, T, head_dim)


class CausalSelfAttention(nn.Module):
    """The one place where tokens exchange information. Each asks with a query (q), offers a key
    (k) and hands over a value (v), in n_head parallel slices of the C numbers, the heads."""

    def __init__(self, config):
        super().__init__()
        assert config.n_embd % config.n_head == 0, "the heads share the C numbers evenly"
        self.n_head = config.n_head
        self.dropout = config.dropout
        self.flash = config.attention == "flash" and kernel_agrees(causal_attention)
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)  # q, k, v at once
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)
        self.resid_dropout = nn.Dropout(config.dropout)

    def forward(self, x, cache=None):
        B, T, C = x.shape
        q, k, v = self.c_attn(x).split(C, dim=2)  # (B, T, C) each
        # Split C into heads: (B, T, C) -> (B, n_head, T, head_dim)
        head_dim = C // self.n_head
        q = q.view(B, T, -1, head_dim).transpose(1, 2)
        k = k.view(B, T, -1, head_dim).transpose(1, 2)
        v = v.view(B, T, -1, head_dim).transpose(1, 2)
        if cache is not None:  # prepend the keys and values of earlier tokens
            k, v = cache.extend(k, v)  # (B, n_head, S, head_dim)
        dropout = self.dropout if self.training else 0.0
        y = causal_attention(q, k, v, dropout, self.flash)
        y = y.transpose(1, 2).reshape(B, T, C)  # the heads side by side again
        return self.resid_dropout(self.c_proj(y))


class MLP(nn.Module):
    """Multi-layer perceptron for each token by itself, 4 C wide inside (GPT paper, 4.1)."""

    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd)
        # ReLU: max(0, x). GELU is smoother; GPT-2 computes it by tanh (Hendrycks & Gimpel 2016, 2)
        acts = {"relu": nn.ReLU(), "gelu": nn.GELU(approximate="tanh"), "gelu_exact": nn.GELU()}
        self.act = acts[config.activation]
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x):
        x = self.act(self.c_fc(x))  # (B, T, C) -> (B, T, 4C)
        return self.dropout(self.c_proj(x))  # (B, T, 4C) -> (B, T, C)


class Block(nn.Module):
    """x + attention, then x + MLP. x is the residual stream: each block adds to it. Along these
    sums the gradient flows back past all blocks, and does not vanish with depth. A LayerNorm
    brings the C numbers of a token to mean 0 and variance 1, then applies a learned scale and
    shift. It changes what attention and MLP read, not x: pre-norm (GPT-2 paper, section 2.3)."""

    def __init__(self, config):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd)
        self.mlp = MLP(config)

    def forward(self, x, cache=None):
        x = x + self.attn(self.ln_1(x), cache)
        return x + self.mlp(self.ln_2(x))


def sinusoids(block_size, n_embd):
    """A fixed table of positions, (block_size, C): sines and cosines of many wavelengths, which
    together tell positions apart as the hands of a clock do (Attention paper, section 3.5)."""
    position = torch.arange(block_size, dtype=torch.float32)[:, None]  # (block_size, 1)
    i = torch.arange(0, n_embd, 2, dtype=torch.float32)  # (C/2,)
    angle = position * 10_000 ** (-i / n_embd)  # (block_size, C/2)
    return torch.stack((angle.sin(), angle.cos()), dim=2).flatten(1)  # (block_size, C)


class GPT(nn.Module):
    """GPT-2: token ids in, a prediction of the next token out.

    `model(idx, targets)` takes (B, T) int64 ids and returns (logits, loss). The logits, (B, T,
    V), are scores whose softmax gives the probability of each next token. The loss is the mean
    cross-entropy, -ln p(target), in nats per token; targets of -1 are padding and do not count.
    Without targets it is None. With a KVCache, idx is the new tokens only; without targets the
    logits are then those of the last token, (B, 1, V). Raises ValueError for too many tokens."""

    def __init__(self, config, init_std=0.02):
        super().__init__()
        self.config = config
        self.tokenizer = None  # a loaded model has one, so that it can write
        self.starts_documents = False  # each training row began with <|endoftext|>: prompts too
        self.code_difference = []  # names with other code in the script that trained it
        self.transformer = nn.ModuleDict({  # OpenAI's names, to fit their weights
            "wte": nn.Embedding(config.vocab_size, config.n_embd),  # what a token is
            "wpe": nn.Embedding(config.block_size, config.n_embd),  # where it stands
            "drop": nn.Dropout(config.dropout),
            "h": nn.ModuleList([Block(config) for _ in range(config.n_layer)]),
            "ln_f": nn.LayerNorm(config.n_embd),  # GPT-2 paper, section 2.3
        })
        if not config.tie_weights:
            self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.initialize(init_std or 1 / math.sqrt(3 * config.n_embd))

    def initialize(self, init_std):
        """Matrices start as N(0, init_std), biases as 0 (GPT paper, section 4.1). A sum of C terms
        grows as the root of C; 1 / sqrt(3 C), the std of a new nn.Linear, cancels that."""
        # Tied, the token embedding is the output matrix too, and starts as small as the others.
        # A separate one starts larger: in the first steps all blocks add nearly the same to each
        # token, in which small embeddings would be lost. (2, and 5 and 2 below: tests/README.md)
        tied = self.config.tie_weights
        embedding_std = init_std if tied else 2.0
        # Each block's two c_proj add to the residual stream. They start divided by the root of
        # 2 * n_layer, the number of additions: a deeper model's stream starts no larger (GPT-2
        # paper, section 2.3)
        residual_std = init_std / math.sqrt(2 * self.config.n_layer)
        # A head of zeros: the first loss is exactly ln V. The scale in front of it lets logits grow
        # soon; the shift, the same for each token, tells how frequent tokens are
        own_head = {"lm_head.weight": 0, "transformer.ln_f.weight": 5, "transformer.ln_f.bias": 2}
        for name, p in self.named_parameters():
            if name in own_head and not tied:
                nn.init.constant_(p, own_head[name])
            elif name.endswith("bias"):
                nn.init.zeros_(p)
            elif name.endswith("c_proj.weight"):
                nn.init.normal_(p, std=residual_std)
            elif name.endswith(("wte.weight", "wpe.weight")):
                nn.init.normal_(p, std=embedding_std)
            elif p.dim() == 2:
                nn.init.normal_(p, std=init_std)
        if self.config.pos_encoding == "sinusoidal":
            table = sinusoids(self.config.block_size, self.config.n_embd)
            if tied:  # sines, with a root mean square of 0.7, would drown such an embedding
                table *= math.sqrt(2) * embedding_std  # the same root mean square
            self.transformer.wpe.weight = nn.Parameter(table, requires_grad=False)

    def forward(self, idx, targets=None, cache=None):
        T = idx.size(1)
        start = 0
        if cache is not None:
            start = cache.length
            cache.layer = 0  # the first block's keys and values come first
        if start + T > self.config.block_size:
            raise ValueError(f"{start + T} tokens do not fit into {self.config.block_size}")
        position = torch.arange(start, start + T, device=idx.device)  # (T,)
        x = self.transformer.wte(idx) + self.transformer.wpe(position)  # (B, T, C)
        x = self.transformer.drop(x)
        for block in self.transformer.h:
            x = block(x, cache)
        if cache is not None:
            cache.length += T  # now that every layer has stored its T tokens
            if targets is None:
                x = x[:, -1:]  # (B, 1, C): generating needs the last prediction only
        x = self.transformer.ln_f(x)
        # Weight tying (Press & Wolf 2017): the token embedding is the output matrix too, which
        # saves 39M parameters in GPT-2
        head = self.transformer.wte if self.config.tie_weights else self.lm_head
        weight = head.weight  # (V, C)
        if x.is_cuda:  # a GPU is fastest at multiples of 64: add rows of zeros, cut their logits
            weight = F.pad(weight, (0, 0, 0, -len(weight) % 64))  # 47 rows below: 50,257 -> 50,304
        logits = F.linear(x, weight)[..., :self.config.vocab_size]  # x @ weight.T: (B, T, V)
        if targets is None:
            return logits, None
        # In float32: the softmax inside needs more than bfloat16's 2 to 3 digits
        loss = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=-1)
        return logits, loss

    def generate(self, prompt, max_new_tokens=100, **options):
        """Continue a text, or a (B, T) tensor of ids, by the options of stream_tokens. Text comes
        back with its prompt and ends before <|endoftext|>; a tensor as (B, T + max_new_tokens).
        Raises UserError for a prompt that the vocabulary cannot encode."""
        if isinstance(prompt, torch.Tensor):
            stream = stream_tokens(self, prompt, max_new_tokens, **options)
            return torch.cat((prompt, *(tokens[:, None] for tokens, _ in stream)), dim=1)
        idx = torch.tensor([encode_prompt(self, prompt)], device=self.device)  # (1, T)
        new = []
        for tokens, _ in stream_tokens(self, idx, max_new_tokens, **options):
            if tokens.item() == self.tokenizer.eot:
                break
            new.append(tokens.item())
        return prompt + self.tokenizer.decode(new)

    @classmethod
    def from_checkpoint(cls, path, device="cpu"):
        """The model in a file, with its tokenizer. Raises UserError for any other file."""
        return load_model(path, device)

    @property
    def device(self):
        return self.transformer.wte.weight.device

    def num_parameters(self):
        return sum(p.numel() for p in self.parameters() if p.requires_grad)


# ---- Generating text ----


class KVCache:
    """The keys and values of all tokens so far. No token sees a later one, so these never change:
    with them, a new token costs one forward pass of length 1."""

    def __init__(self, max_length):
        self.max_length = max_length  # tokens that fit in
        self.length = 0  # tokens in it
        self.layers = []  # (keys, values) of each, (B, n_head, max_length, head_dim)
        self.layer = 0  # the next to be extended: each pass goes through them in order

    def extend(self, k, v):
        """Add k and v of T new tokens, (B, n_head, T, head_dim); return those of all S tokens."""
        if self.layer == len(self.layers):
            B, n_head, _, head_dim = k.shape
            shape = (B, n_head, self.max_length, head_dim)
            self.layers.append((k.new_empty(shape), v.new_empty(shape)))
        keys, values = self.layers[self.layer]
        self.layer += 1
        end = self.length + k.size(2)
        keys[:, :, self.length:end] = k
        values[:, :, self.length:end] = v
        return keys[:, :, :end], values[:, :, :end]


@contextmanager
def evaluating(model):
    """No dropout and no gradients inside the with block."""
    was_training = model.training
    model.eval()
    with torch.no_grad():
        yield
    model.train(was_training)


def stream_tokens(model, idx, max_new_tokens, temperature=1.0, top_k=None, top_p=None, seed=None):
    """Yield (token, logits) max_new_tokens times: the next token of each row of idx, (B,) int64,
    and the scores that it was drawn from, (B, V) float32. idx is (B, T) int64, of which the last
    block_size are read. When the context is full, the cache is emptied, and the newer half of the
    tokens is read again from position 0."""
    check_sampling(temperature, top_k, top_p)
    block_size = model.config.block_size
    generator = torch.Generator(idx.device)
    if seed is None:
        generator.seed()  # another one each time
    else:
        generator.manual_seed(seed)
    cache = KVCache(min(block_size, idx.size(1) + max_new_tokens))
    idx = idx[:, -block_size:]
    unread = idx  # the tokens that are not in the cache
    for _ in range(max_new_tokens):
        if cache.length + unread.size(1) > block_size:
            unread = idx[:, -max(1, block_size // 2):]
            cache.length = 0  # what is in the cache will be overwritten
        with evaluating(model):
            logits, _ = model(unread, cache=cache)  # (B, 1, V)
        logits = logits[:, -1].float()  # (B, V)
        unread = sample_token(logits, temperature, top_k, top_p, generator)  # (B, 1)
        idx = torch.cat((idx, unread), dim=1)[:, -block_size:]
        yield unread[:, 0], logits


def sample_token(logits, temperature=1.0, top_k=None, top_p=None, generator=None):
    """Draw a token for each row: (B, V) logits -> (B, 1) ids. A temperature below 1 favours likely
    tokens; 0 is greedy, always the likeliest. Then top_k keeps the k likeliest, and those as likely
    (Fan et al. 2018), then top_p the fewest of the likeliest whose probabilities sum to p or more
    (Holtzman et al. 2020)."""
    if temperature < 1e-6:  # nearly 0 would overflow in the division
        return logits.argmax(dim=-1, keepdim=True)
    if top_k is not None:
        likeliest = logits.topk(min(top_k, logits.size(-1)), dim=-1).values  # (B, k), sorted
        logits = logits.masked_fill(logits < likeliest[:, -1:], -math.inf)
    probs = F.softmax(logits / temperature, dim=-1)
    if top_p is not None:
        in_order, ids = probs.sort(dim=-1, descending=True)  # (B, V)
        of_likelier = in_order.cumsum(dim=-1) - in_order  # sum over the likelier tokens
        in_order = in_order.masked_fill(of_likelier >= top_p, 0)
        probs = torch.zeros_like(probs).scatter(-1, ids, in_order)  # back in the order of ids
    # On a line, each token has a piece as long as its probability. A random point chooses the
    # first that ends there or later. (torch.multinomial takes 20 times as long on a CPU.) rand can
    # be 0, where token 0 would be chosen even with probability 0; 1 - rand cannot
    ends = probs.cumsum(dim=-1)  # (B, V): where the pieces end; the last is 1, or less after top_p
    rand = torch.rand(len(probs), 1, generator=generator, device=probs.device)  # in [0, 1)
    return torch.searchsorted(ends, (1 - rand) * ends[:, -1:])  # (B, 1)


# ---- Batches from shards ----


class ShardedLoader:
    """Rows of tokens from a folder of shards, files of token ids, which stay on the disk and are
    read where they are needed (memory maps). Row number g is always the same tokens, for a seed,
    the shards and block_size: a run can resume anywhere, on any number of processes. An epoch,
    one pass over all rows, has an order of its own. rows="stream" cuts the text every block_size
    tokens; "documents" gives each document a row, or several if it is long. seed=None keeps the
    order of the text. eot is the id of <|endoftext|>, which stands between documents. Raises
    UserError for a folder without enough tokens."""

    def __init__(self, data_dir, split, block_size, rows="stream", seed=None,
                 vocab_size=50257, eot=50256):
        self.block_size = block_size
        self.vocab_size = vocab_size
        self.paths = shard_paths(data_dir)[split]
        self.shards = [read_shard(path) for path in self.paths]  # (n,) uint16 each
        if rows == "stream":
            eot = None  # RowIndex then cuts across documents
        elif eot is None:
            raise UserError(f"{data_dir} is one text without documents: use --rows=stream")
        self.row_index = RowIndex(self.shards, block_size, seed, eot)  # knows where rows begin
        self.rows_per_epoch = self.row_index.rows_per_epoch
        if self.rows_per_epoch == 0:
            raise UserError(f"{data_dir} has too few {split} tokens: lower --block_size")

    def batch(self, rows):
        """Row numbers -> inputs x and targets y, the tokens after them, both (B, T) int64. T is
        the longest row's length, rounded up. Past a row's end y is -1, which the loss ignores."""
        places = [self.row_index.locate(row) for row in rows]  # (shard, first token, length)
        longest = max(length for _, _, length in places)
        # To a multiple of 16: compiled code is made anew for each new shape
        T = min(self.block_size, 16 * math.ceil(longest / 16))
        x = np.zeros((len(rows), T), np.int64)
        y = np.full((len(rows), T), -1, np.int64)
        for i, (shard, start, length) in enumerate(places):
            tokens = self.shards[shard][start:start + length + 1]
            if tokens.max() >= self.vocab_size:
                raise UserError(f"{self.paths[shard]} holds token {tokens.max()}, beyond the "
                                f"vocabulary of {self.vocab_size}: prepare the data again")
            x[i, :length] = tokens[:-1]
            y[i, :length] = tokens[1:]
        return torch.from_numpy(x), torch.from_numpy(y)


# ---- Optimizer and schedule ----


def make_optimizer(model, s, device):
    """AdamW (Loshchilov & Hutter 2019). Adam divides the running mean of a weight's gradients by
    the root of their running mean square; beta1 and beta2 say how slowly these forget. The two
    are similar in size, so a step moves a weight by about the learning rate or less.
    The W is weight decay: each step multiplies matrices, not biases and norms, by
    1 - learning_rate * weight_decay."""
    learned = [p for p in model.parameters() if p.requires_grad]
    matrices = [p for p in learned if p.dim() >= 2]
    vectors = [p for p in learned if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": s.weight_decay},
              {"params": vectors, "weight_decay": 0.0}]
    # eps avoids a division by 0 (GPT-3 paper, appendix B); fused: one kernel for all weights
    return torch.optim.AdamW(groups, lr=s.learning_rate, betas=(s.beta1, s.beta2), eps=1e-8,
                             fused=device.type in ("cuda", "cpu"))


def get_lr(step, s):
    """Learning rate of a step. Warm-up: Adam's first means come from few gradients, and full
    steps along them can do harm. Then a cosine decay (GPT paper, section 4.1)."""
    if step < s.warmup_steps:
        return s.learning_rate * (step + 1) / s.warmup_steps
    progress = (step - s.warmup_steps) / max(1, s.max_steps - s.warmup_steps)
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))  # 1 -> 0
    return s.min_lr + (s.learning_rate - s.min_lr) * cosine


# ---- The loop ----


def train(s, place, process):
    """Train, and return the exit status. s: the settings. place: the run's folder, and whether it
    resumes. process: the device; torchrun starts one process per GPU. Line n of the log is about
    the weights after n steps, and the step that follows."""
    run = Run(s, place, process)  # the data, the log, the checkpoints
    torch.manual_seed(s.seed)
    model = build_model(s, run.data.tokenizer, process)
    optimizer = make_optimizer(model, s, process.device)
    # Gradients below 3e-8 are 0 in float16: the scaler multiplies the loss by a large number, then
    # divides the gradients; a step that overflowed is skipped (Micikevicius et al. 2018)
    scaler = torch.amp.GradScaler(process.device.type, enabled=process.dtype == torch.float16)
    start = run.begin(model, optimizer, scaler)  # 0 for a new run
    fast_model = compiled(model, s, process)  # the same weights; `model` is measured and saved

    stop = StopRequest(s, process)  # Ctrl-C, SIGTERM or max_minutes
    for step in range(start, s.max_steps):
        run.measure_and_save(step)  # validation, a text, a checkpoint, where they are due
        lr = get_lr(step, s)
        for group in optimizer.param_groups:
            group["lr"] = lr
        micro_batches, targets_in_step = step_batches(run, step)
        loss_sum = torch.zeros((), device=process.device)
        # Gradient accumulation: the gradients of micro-batches add up to those of the batch
        for micro_step, (x, y) in enumerate(micro_batches):  # x, y: (B, T)
            # Dropout depends only on the place in the run: a resumed run repeats it
            torch.manual_seed(combined_seed(s.seed, step, micro_step, process.rank))
            # Mixed precision: fast products in process.dtype, weights in float32, where
            # small updates are not rounded away
            with process.autocast():
                _, loss = fast_model(x, y)
            # A mean over the whole step, of all processes: a micro-batch counts by its share
            # of the targets, which padding makes unequal
            loss = loss * ((y != -1).sum() / targets_in_step)
            scaler.scale(loss).backward()
            loss_sum += loss.detach()
        process.sum_gradients(model)  # over all processes, each of which had other rows
        scaler.unscale_(optimizer)
        # Clipping bounds the rare huge gradient, and keeps its direction
        max_norm = s.grad_clip if s.grad_clip > 0 else math.inf  # the norm is logged anyway
        grad_norm = nn.utils.clip_grad_norm_(model.parameters(), max_norm)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        run.log_step(step, targets_in_step, loss_sum, lr, grad_norm)
        if stop.requested(step):
            return run.stopped(step + 1, stop)
    return run.finished()


# ======== PART 2: THE MACHINERY (skip this on a first reading) ========

# ---- A run and its folder ----

LOG_COLUMNS = """step tokens train_loss val_loss val_bits_per_byte lr grad_norm tokens_per_second
    seconds above_floor above_floor_wording above_floor_choices above_floor_recall hellaswag_acc
    hellaswag_acc_norm""".split()
SKILLS = ("wording", "choices", "recall")  # what it takes to predict a token of the stories
# Settings that do not shape the weights: a run may resume with other values. The three of a batch
# count by their product
BATCH_SETTINGS = ["batch_size", "grad_accum_steps", "total_batch_size"]
FREE_SETTINGS = """preset out_dir overwrite resume compare device max_minutes compile_model
    deterministic eval_only eval_every eval_tokens sample_every checkpoint_every
    log_every""".split() + BATCH_SETTINGS
# Settings that make losses at the same step incomparable, or as different as two seeds are
UNFAIR = "max_steps warmup_steps min_lr seed data_dir block_size".split() + BATCH_SETTINGS
# The fields of a model's shape, which its weights decide
SHAPE = [name for name in GPTConfig.__dataclass_fields__
         if name not in ("vocab_size", "block_size", "dropout", "attention")]
TIME_IS_UP = 1  # the "signal" of max_minutes


class Run:
    """A run's data, log, checkpoints and clock, and what it prints. `place` is its folder."""

    def __init__(self, s, place, process):
        self.s, self.process, self.folder, self.place = s, process, place.folder, place
        self.data = open_data(s.data_dir)
        self.loader = open_rows(s, self.data, "train", s.seed)
        self.validation = open_rows(s, self.data, "val", None)
        self.rows, self.rows_at_once = plan_batch(s, process)
        self.best_val_loss = math.inf
        self.measured = {}  # since the last line of the log
        self.sizes = {"log.csv": 0, "samples.md": 0}  # in bytes, of finished steps
        self.speed_from = None  # (time, tokens) from where throughput is measured
        self.progress = place.progress or {}
        self.tokens = self.progress.get("tokens", 0)  # trained on
        if s.dtype == "auto":  # a resumed run keeps its precision
            process.set_dtype(self.progress.get("dtype", "auto"))

    def begin(self, model, optimizer, scaler):
        """Load the checkpoint, or write the first one; say what will be done. Return the step to
        begin with."""
        self.model, self.optimizer, self.scaler, self.start = model, optimizer, scaler, 0
        self.began = time.perf_counter() - self.progress.get("seconds", 0)
        if self.place.checkpoint:
            self.start, self.best_val_loss = load_training_state(
                self.place.checkpoint, model, optimizer, scaler, self.s, self.process)
        else:
            self.write_checkpoint("ckpt.pt", 0, optimizer={"state": {}})
        self.speed = matmul_speed(self.process)
        if self.process.is_master:
            self.clear_leftovers()
            self.announce()
        self.progress_bar = tqdm(total=self.s.max_steps, initial=self.start, unit="step",
                                 dynamic_ncols=True, disable=self.process.rank > 0 or None)
        model.train()
        return self.start

    def clear_leftovers(self):
        """Remove what an overwritten run left, and what a killed one did after its checkpoint."""
        stale = [*self.folder.glob(".*.tmp")]
        if self.start == 0:
            stale += [self.folder / name for name in ("best.pt", "report.md", "loss.svg")]
        with writing(self.folder):
            for path in stale:
                path.unlink(missing_ok=True)
        self.sizes |= self.progress.get("sizes", {})
        for name, size in self.sizes.items():
            with writing(self.folder / name), open(self.folder / name, "ab") as file:
                file.truncate(min(size, file.tell()))
        if self.start == 0:
            self.append("log.csv", ",".join(LOG_COLUMNS) + "\n")
        write_text(self.folder / "train_gpt2.py", CODE)

    def announce(self):
        s, process = self.s, self.process
        N, V = self.model.num_parameters(), self.model.config.vocab_size
        epochs = s.max_steps * self.rows / self.loader.rows_per_epoch
        tokens = epochs * sum(len(shard) - 1 for shard in self.loader.shards)
        machine = process.device.type
        if machine == "cuda":
            machine = torch.cuda.get_device_name()
        self.plan = (
            f"model: {N:,} parameters; guessing blindly has a loss (-ln p, in nats) of ln {V:,} = "
            f"{math.log(V):.2f}\n"
            f"machine: {process.world_size} x {machine}, {process.dtype_name()} at "
            f"{self.speed / 1e9:,.0f} GFLOP/s (MFU: share in use)\n"
            f"plan: {s.max_steps:,} steps of {self.rows} rows, {self.rows_at_once} at once; "
            f"{tokens:,.0f} tokens, {epochs:.1f} epochs of {s.data_dir}, {tokens / N:.1f} tokens "
            "per parameter")
        floor = self.data.meta.get("entropy_floor")
        if floor and s.rows == "documents":
            self.plan += (f"\nfloor: {floor:.4f} nats, the lowest loss to expect. The nats above "
                          "it are of wording (fixed), choices (random), recall (of earlier "
                          "choices)")
        print(self.plan)
        if s.warmup_steps >= s.max_steps:
            print(f"note: the run ends within its {s.warmup_steps:,} warm-up steps")
        threads = self.progress.get("threads", process.threads)
        if threads != process.threads:
            print(f"note: it ran with {threads} threads and goes on with {process.threads}: "
                  "rounding may differ")

    def measure_and_save(self, step):
        """The validation loss, a text and a checkpoint, each where it is due."""
        s, is_last = self.s, step == self.s.max_steps
        # In a run that goes on after its end, the log has no line of that step yet
        was_last = self.place.was_done and step == self.start
        if is_last or was_last or step % s.eval_every == 0:
            self.validate(step)
        if is_last or was_last or (step > 0 and step % s.sample_every == 0):
            self.show_sample(step)
        if is_last or (step > self.start and step % s.checkpoint_every == 0):
            self.save(step)

    def validate(self, step):
        found = evaluate(self.model, self.validation, self.s, self.process, self.data)
        self.process.say(f"step {step:,}: val {in_words(found)}")
        if found["val_loss"] < self.best_val_loss:
            self.best_val_loss = found["val_loss"]
            self.write_checkpoint("best.pt", step)
        self.keep(step, found)

    def show_sample(self, step):
        if step > self.start:
            self.check_finite()
        scores = hellaswag_scores(self.model, self.process)
        if scores:
            self.process.say(f"step {step:,}: {in_words(scores)}")
        seed = combined_seed(self.s.seed, step)
        text = self.model.generate("", 200, temperature=0.8, seed=seed).strip()
        self.process.say(f"step {step:,} writes: {text}")
        quoted = text.replace("\n", "\n> ")
        self.append("samples.md", f"## Step {step}\n\n> {quoted}\n\n")
        self.keep(step, scores)

    def keep(self, step, found):
        """Keep what was measured for the next line of the log; draw the report anew."""
        self.measured |= {"step": step, "tokens": self.tokens} | found
        if self.process.is_master:
            other = self.place.other
            problem = unreadable(other) if other else ""
            if problem:  # somebody has removed it in the meantime
                self.process.say(f"note: no longer compared with {other}: {problem}")
                self.place.other = None
            write_report(self, [*read_log(self.folder), self.measured])
        self.restart_clock()

    def restart_clock(self):
        """What is measured and saved does not count as training time."""
        if self.speed_from is not None:  # the first logged step may have compiled the model
            self.speed_from = (time.perf_counter(), self.tokens)

    def save(self, step):
        """Write ckpt.pt, from which a run resumes; at the last step it marks the end."""
        if step > self.start:
            self.check_finite()
        if step == self.s.max_steps:
            self.write_line({})
        self.write_checkpoint("ckpt.pt", step, optimizer={
            "state": optimizer_state(self.model, self.optimizer),
            "scaler": self.scaler.state_dict()})
        self.restart_clock()

    def write_checkpoint(self, name, step, **more):
        if self.process.is_master:
            more["progress"] = {
                "tokens": self.tokens, "sizes": self.sizes, "seconds": self.seconds(),
                "dtype": self.process.dtype_name(), "threads": self.process.threads,
                "data": meta_checksum(self.data.meta)}
            settings = self.place.settings
            content = make_checkpoint(self.model, step, settings, self.best_val_loss) | more
            write_atomically(self.folder / name, lambda file: torch.save(content, file))

    def log_step(self, step, targets, loss_sum, lr, grad_norm):
        """Count a step; every log_every steps, log it. Only then does the CPU wait for a GPU."""
        s = self.s
        self.tokens += targets
        self.latest = (step, loss_sum, grad_norm)
        self.progress_bar.update()
        is_due = step % s.log_every == 0
        if not (is_due or step == s.max_steps - 1 or self.measured):
            return
        loss, norm = self.check_finite()
        line = {"step": step, "tokens": self.tokens - targets, "train_loss": loss, "lr": lr,
                "grad_norm": norm}
        text, now = f"train {loss:.4f} | lr {lr:.2e} | grad norm {norm:.2f}", time.perf_counter()
        if self.speed_from is not None:
            since, tokens = self.speed_from
            speed = (self.tokens - tokens) / (now - since)
            line["tokens_per_second"] = round(speed)
            flops = speed * flops_per_token(self.model, s.block_size)
            text += (f" | {speed:,.0f} tokens/s, "
                     f"MFU {flops / (self.speed * self.process.world_size):.0%}, "
                     f"{(s.max_steps - step - 1) * targets / speed / 60:.1f} min left")
        self.speed_from = (now, self.tokens)
        self.write_line(line)
        if self.process.is_master:
            self.sizes = {name: os.path.getsize(self.folder / name) for name in self.sizes}
        self.progress_bar.set_postfix_str(text)
        if is_due and self.progress_bar.disable:
            self.process.say(f"step {step:,}/{s.max_steps:,} | {text}")

    def check_finite(self):
        """(loss, gradient norm) of the latest step. Infinite ones end the run."""
        step, loss_sum, grad_norm = self.latest
        loss, norm = self.process.reduce(loss_sum.clone()).item(), grad_norm.item()
        # float16's scaler expects infinite gradients now and then, and skips those steps
        if not math.isfinite(loss if self.scaler.is_enabled() else loss + norm):
            raise UserError(f"step {step:,} has loss {loss:.4g}, gradient norm {norm:.4g}: lower "
                            f"--learning_rate from {self.s.learning_rate:.2g}; the last checkpoint "
                            "is intact")
        return loss, norm

    def seconds(self):
        return round(time.perf_counter() - self.began, 2)

    def write_line(self, values):
        """Add to the log what was measured since its last line, and these values."""
        line = self.measured | values | {"seconds": self.seconds()}
        self.append("log.csv", ",".join(str(line.get(name, "")) for name in LOG_COLUMNS) + "\n")
        self.measured = {}

    def append(self, name, text):
        path = self.folder / name
        if self.process.is_master:
            with writing(path), open(path, "a", encoding="utf-8", newline="") as file:
                file.write(text)

    def stopped(self, step, stop):
        """Save at a step where the run was asked to stop. Return the exit status."""
        if step == self.s.max_steps:
            return self.finished()
        self.save(step)
        again = "the same command without --overwrite" if self.s.overwrite else "the same command"
        self.process.say(f"stopped at step {step:,}, saved in {self.folder}: {again} resumes it")
        return 0 if stop.signal == TIME_IS_UP else 128 + stop.signal  # as in a shell

    def finished(self):
        self.measure_and_save(self.s.max_steps)
        if not self.process.is_master:
            return 0
        say, lines = self.process.say, read_log(self.folder)
        if self.best_val_loss == lines[0].get("val_loss"):
            say("note: the validation loss never fell below its first value, so best.pt holds the "
                "weights that the run began with")
        if self.place.other:
            say(compared(self, lines).partition("\n")[0])
        say(f"done in {self.seconds() / 60:.1f} min, lowest validation loss "
            f"{self.best_val_loss:.4f}; see {self.folder / 'report.md'}\n"
            f"now: python sample.py {shlex.quote(f'--checkpoint={self.folder}/best.pt')}")
        return 0


# ---- Which folder: a new run, or one to resume ----


@dataclass
class Place:
    """Where a run lives, and how it came to be there."""

    folder: Path
    settings: dict  # as the person set them
    command: str
    other: Path | None  # the folder of the run to compare with
    checkpoint: Path | None = None  # to resume from
    progress: dict | None = None  # what it says of the run
    step: int = 0  # to go on from
    was_done: bool = False  # that step was its last
    remark: str = ""  # why it is a new run


def choose_folder(s, command, process):
    """Lock the folder of the unfinished run of these settings, or the next free one."""
    base = Path(s.out_dir or f"out/{s.preset}")
    if base.resolve() == SCRIPT.resolve().parent:
        raise UserError(f"{base} holds the scripts: choose another --out_dir")
    if s.overwrite and s.init_from and weights_path(s.init_from).resolve().parent == base.resolve():
        raise UserError(f"--overwrite would delete {s.init_from}: choose another --out_dir")
    folder, number, remark, resumed = base, 1, "", None
    runs = []  # that took steps
    while not s.overwrite and is_taken(folder):
        why = "holds other files"
        if (folder / "ckpt.pt").exists():
            found = read_checkpoint(folder / "ckpt.pt")
            why, has_steps = difference(found, s), found["step"] > 0
            if has_steps:
                runs.append(folder)
            if s.resume == "always" and (has_steps or not resumed):
                resumed = folder
            if not why:
                resumed = folder
                break
        remark = f" ({folder} {why})"
        number += 1
        folder = base.parent / f"{base.name or 'run'}-{number}"
    folder = resumed or folder
    process.at_end.callback(lock_folder(folder).release)
    place = Place(folder, asdict(s), command, other_run(s, runs, folder))
    if not resumed:
        place.remark = f"a new run in {folder}{remark}"
        return place
    place.checkpoint = folder / "ckpt.pt"
    found = read_checkpoint(place.checkpoint)  # now no other run can change it
    place.step = found["step"]
    place.was_done = place.step == found["settings"].get("max_steps")
    place.progress = found.get("progress", found["settings"])  # as older checkpoints have it
    go_on(s, folder, found)
    return place


def is_taken(folder):
    """Has a run written there, or somebody else? Before its first checkpoint it has a lock only."""
    names = os.listdir(folder) if os.path.isdir(folder) else []
    return "ckpt.pt" in names or (".lock" not in names and len(names) > 0)


def go_on(s, folder, found):
    """Say where a run resumes, and what has changed since."""
    step, why = found["step"], difference(found, s)
    if step > s.max_steps:
        raise UserError(f"{folder} has taken {step:,} steps, more than --max_steps={s.max_steps}")
    if step == s.max_steps:
        print(f"{folder} has taken its {step:,} steps: nothing is left to do")
        return
    for name, (there, here) in different_settings(found, asdict(s)).items():
        if name in SHAPE:
            raise UserError(f"{folder} has {name}={there}, not {here}: its shape cannot change")
    print(f"continuing {folder} from step {step:,} ({start_over(folder)})")
    if why:
        print(f"note: until now {folder} {why}")
    for name in other_code(found, machinery):
        if name in ("RowIndex", "step_batches", "evaluate"):
            print(f"note: until now {folder} has other code in {name}")


def difference(found, s):
    """What sets a checkpoint's run apart from an unfinished run of these settings, in words."""
    settings = different_settings(found, asdict(s))
    said = [f"{name}={value}" if value != "" else f"no {name}"
            for name, (value, _) in settings.items()]
    names = other_code(found)
    if names:
        said.insert(0, f"other code in {' and '.join(names)}")
    if has_other_data(found, s):
        said.insert(0, f"other data in {s.data_dir}")
    if said:
        return f"has {', '.join(said)}"
    return "is done" if found["step"] >= s.max_steps else ""


def different_settings(found, ours):
    """{name: (the value of a checkpoint's run, ours)} of the settings that shape the weights."""
    theirs = asdict(Settings()) | found["settings"]  # the default of a setting newer than the run
    theirs["dtype"] = found.get("progress", theirs)["dtype"]  # that "auto" stood for
    names = [name for name in ours if name not in FREE_SETTINGS]
    if tokens_in_a_step(SimpleNamespace(**theirs)) != tokens_in_a_step(SimpleNamespace(**ours)):
        names += BATCH_SETTINGS
    if ours["dtype"] == "auto":
        names.remove("dtype")
    return {name: (theirs[name], ours[name]) for name in names if theirs[name] != ours[name]}


def start_over(folder):
    return f"to start over: {shlex.quote(f'--out_dir={folder}')} --overwrite"


def lock_folder(folder):
    """A lock until this process ends. Raises UserError where another run has it."""
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(folder / ".lock")
        try:
            lock.acquire(timeout=0)
        except filelock.Timeout:
            raise UserError(f"another run uses {folder}: stop it, or change --out_dir") from None
        return lock


def read_log(folder):
    """The lines of log.csv, {column: number}, without an unfinished one. Raises UserError where
    it is damaged."""
    path = folder / "log.csv"
    try:
        with open(path, encoding="utf-8", newline="") as file:
            lines = [line for line in csv.DictReader(file) if None not in line.values()]
        return [{name: float(value) for name, value in line.items() if value} for line in lines]
    except (OSError, ValueError, csv.Error) as error:
        raise UserError(f"{path} is damaged ({error})") from None


class StopRequest:
    """Ctrl-C, SIGTERM or max_minutes: the run finishes its step, saves and ends."""

    def __init__(self, s, process):
        self.s, self.process = s, process
        self.signal, self.began = 0, time.perf_counter()
        for number in (signal.SIGINT, signal.SIGTERM):
            handler_before = signal.signal(number, self.handle)
            process.at_end.callback(signal.signal, number, handler_before)

    def handle(self, number, frame=None):
        self.signal = number
        signal.signal(number, signal.SIG_DFL)  # a second one ends the process at once

    def requested(self, step):
        """Is it time to stop? Several processes agree on it in logged steps."""
        minutes = (time.perf_counter() - self.began) / 60
        if self.s.max_minutes is not None and minutes >= self.s.max_minutes:
            self.signal = self.signal or TIME_IS_UP
        if self.process.world_size > 1 and step % self.s.log_every:
            return False
        agreed = int(self.process.reduce(torch.tensor(self.signal), dist.ReduceOp.MAX))
        if agreed:  # else a signal may have come in the meantime
            self.signal = agreed
        return agreed > 0


# ---- The code of a run, and its comparison with another run ----


SCRIPT = Path(globals().get("__file__", "train_gpt2.py"))  # code typed in has no file
CODE = ""
if SCRIPT.is_file():  # read at the start: people edit while a run goes on
    CODE = SCRIPT.read_text(encoding="utf-8")


def lesson(code):
    """Part 1 of a script."""
    return code.partition("\n# ======== PART 2")[0]


def machinery(code):
    return code.removeprefix(lesson(code))


def model_code(code):
    """From the class GPTConfig to the end of GPT; all of Part 1 where these are gone."""
    found = re.search(r"^class GPTConfig.*^class GPT\(.*?^(?=\S)", code, re.M | re.S)
    return found[0] if found else lesson(code)


def name_of(node):
    """The name that a statement at the top level defines."""
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return node.name
    if isinstance(node, ast.Assign):
        return ast.unparse(node.targets[0])
    if isinstance(node, ast.AnnAssign | ast.AugAssign):
        return ast.unparse(node.target)
    return "a statement at the top level"


@functools.cache
def definitions(code):
    """{name: syntax tree} of the functions, classes and constants in a part of a script, without
    docstrings and comments."""
    try:
        tree = ast.parse(code)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return {"all": code}
    found = {}
    for node in tree.body:
        for part in ast.walk(node):
            if isinstance(part, ast.FunctionDef | ast.ClassDef) and ast.get_docstring(part):
                part.body = part.body[1:]
        is_text = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        if not is_text and not isinstance(node, ast.Import | ast.ImportFrom):
            found[name_of(node)] = found.get(name_of(node), "") + ast.dump(node)
    for name in ("Settings", "PRESETS", "_SHARED", "_CHARS", "_GPT2"):  # compared by value
        found.pop(name, None)
    return found


def other_code(found, part=lesson):
    """The names whose definitions differ between a checkpoint's script and this one, in a part
    of both. Older checkpoints have a hash in its place, converted ones nothing: both count as the
    same."""
    code = found.get("code")
    if not CODE or "\n" not in str(code):
        return []
    theirs, ours = definitions(part(code)), definitions(part(CODE))
    return [name for name in ours | theirs if ours.get(name) != theirs.get(name)]


def unreadable(folder):
    """Why a run cannot be compared with; empty if it can."""
    try:
        read_checkpoint(folder / "ckpt.pt")
        read_log(folder)
    except UserError as error:
        return str(error)
    return ""


def other_run(s, runs, folder):
    """The folder to compare a run with: --compare, the first of the runs of its name, or
    out/<preset>."""
    others = [run for run in runs if run != folder] + [Path("out", s.preset)]
    other = Path(s.compare or others[0])
    if other.resolve() == folder.resolve() or not (s.compare or other.exists()):
        return None
    problem = unreadable(other)
    if problem:
        print(f"note: not compared with {other}: {problem}")
        return None
    found = read_checkpoint(other / "ckpt.pt")
    same_data = found["settings"].get("data_dir") == s.data_dir and not has_other_data(found, s)
    return other if s.compare or same_data else None


def has_other_data(found, s):
    """Was a checkpoint trained on other data than there is now? Older ones do not say."""
    then = found.get("progress", {}).get("data")
    return then not in (None, meta_checksum(open_data(s.data_dir).meta))


def meta_checksum(meta):
    """Of meta.json, which has a checksum of the text: other data, another number."""
    return zlib.crc32(json.dumps(meta, sort_keys=True).encode())


# ---- Report and picture ----

COLOURS = {"training": "#e8710a", "validation": "#2f80ed", "wording": "#16a07a",
           "choices": "#a352cc", "recall": "#d6336c"}
STYLE = """<style>text { font: 13px sans-serif; fill: #555 } path { fill: none; stroke-width: 3 }
.thin { stroke: #999; stroke-width: 1; opacity: 0.5 }
path[stroke="#888"] { stroke-dasharray: 9 5 } path[stroke="#999"] { stroke-dasharray: 2 4 }
@media (prefers-color-scheme: dark) { text { fill: #bbb } }</style>"""


def points(lines, column):
    """[(step, value), ...] of the log's lines that have a value there."""
    return [(line["step"], line[column]) for line in lines if column in line]


def compared(run, lines):
    """The report's part on the run that this one is compared with; its first line is for the
    screen. It says what else differs: a shorter schedule falls sooner, so that its middle is not
    comparable; and the difference of two seeds is the noise that an effect has to exceed."""
    other = run.place.other
    found = read_checkpoint(other / "ckpt.pt")
    ours, theirs = dict(points(lines, "val_loss")), dict(points(read_log(other), "val_loss"))
    said = f"{other} has no validation loss at a step of this run"
    table = []
    for step in sorted(ours.keys() & theirs.keys()):
        here, there = ours[step], theirs[step]
        said = (f"validation loss {here:.4f} at step {step:,.0f}, {other} had {there:.4f} "
                f"({here - there:+.4f})")
        table.append(f"| {step:,.0f} | {here:.4f} | {there:.4f} | {here - there:+.4f} |")
    ours = run.place.settings | {"dtype": run.process.dtype_name()}
    differ = different_settings(found, ours)
    unfair = [name for name in differ if name in UNFAIR]
    if has_other_data(found, run.s) and "data_dir" not in unfair:
        unfair.append("data")
    if unfair:
        said += f"; not a fair pair: other {' and '.join(unfair)}"
    text = [f"{said}\n\n| step | val here | val in {other} | difference |",
            "| --- | --- | --- | --- |", *table]
    text += [f"\n* {name} is {here} here, {there} there" for name, (there, here) in differ.items()]
    if other_code(found):
        before, now = lesson(found["code"]).splitlines(), lesson(CODE).splitlines()
        changed = [*difflib.unified_diff(before, now, lineterm="", n=1)]
        text += ["\n```diff", *changed[2:], "```"]
    return "\n".join(text)


def round_numbers(low, high):
    """1, 2 and 5 times a power of ten, from low to high."""
    numbers = [digit * 10.0**power for power, digit in itertools.product(range(-3, 10), (1, 2, 5))]
    return [number for number in numbers if low <= number <= high]


def panel(top, title, curves, levels):
    """A part of an SVG, 720 x 340: curves {name: [(step, value), ...]}, levels {name: value}, on a
    logarithmic scale. Names stand behind the ends of the lines."""
    curves = {name: found for name, found in curves.items() if found}
    last_step = max(6, *[found[-1][0] for found in curves.values()])
    for name, value in levels.items():
        curves[name] = [(0, value), (last_step, value)]
    values = [value for _, value in itertools.chain(*curves.values())]
    low, high = max(0.001, 0.9 * min(values)), 1.1 * max(values)

    def x(step):
        return 50 + 500 * step / last_step

    def y(value):
        share = math.log(max(value, low) / low) / math.log(high / low)
        return top + 300 - 260 * share

    def last_value(name):
        return curves[name][-1][1]

    shapes = [f'<text x="10" y="{top + 20}">{title}</text>']
    for value in round_numbers(low, high):
        shapes.append(f'<path class="thin" d="M50 {y(value):.1f}H550"/>'
                      f'<text x="44" y="{y(value) + 4:.1f}" text-anchor="end">{value:g}</text>')
    for step in np.arange(0, last_step + 1, round_numbers(last_step / 6, math.inf)[0]):
        shapes.append(f'<text x="{x(step):.1f}" y="{top + 320}" text-anchor="middle">'
                      f'{step:,.0f}</text>')
    lowest = top + 316
    for name in sorted(curves, key=last_value):  # from the bottom up
        path = "L".join(f"{x(step):.1f} {y(value):.1f}" for step, value in curves[name])
        colour = COLOURS.get(name, "#888")  # another run's: grey, and by STYLE dashed
        if name in levels:
            colour = "#999"  # dotted
        lowest = min(y(last_value(name)) + 4, lowest - 16)  # the names do not touch one another
        shapes.append(f'<path stroke="{colour}" d="M{path}"/><text x="558" y="{lowest:.1f}" '
                      f'style="fill: {colour}">{name} {last_value(name):.4f}</text>')
    shapes.append(f'<text x="576" y="{top + 320}">steps</text>')
    return "\n".join(shapes)


def write_report(run, lines):
    """Draw loss.svg and write report.md, from the log's lines and samples.md."""
    folder, other, meta = run.folder, run.place.other, run.data.meta
    levels, comparison = dict(meta.get("landmarks", {})), ""
    has_floor = points(lines, "above_floor")
    if has_floor:
        levels["floor"] = meta["entropy_floor"]
    curves = {"training": points(lines, "train_loss"), "validation": points(lines, "val_loss")}
    if other:
        curves[html.escape(other.as_posix()[-18:])] = points(read_log(other), "val_loss")
        comparison = f"\n## Compared with {other}\n\n{compared(run, lines)}\n"
    panels = [panel(0, f"{html.escape(folder.name)}: loss, in nats per token", curves, levels)]
    if has_floor:
        skills = {skill: points(lines, f"above_floor_{skill}") for skill in SKILLS}
        title = "nats per token above the floor, by skill (0.001 and less: at the bottom)"
        panels.append(panel(340, title, skills, {}))
    shapes = "".join(panels)
    write_text(folder / "loss.svg", f"""<svg xmlns="http://www.w3.org/2000/svg"
viewBox="0 0 720 {340 * len(panels)}">{STYLE}{shapes}</svg>
""")
    table = "\n".join(f"| {line['step']:,.0f} | {in_words(line)} |"
                      for line in lines if in_words(line))
    samples = (folder / "samples.md").read_text(encoding="utf-8")
    write_text(folder / "report.md", f"""# {folder.name}

    {run.place.command}

![loss](loss.svg)

```
{run.plan}
```

| step | measured |
| --- | --- |
{table}
{comparison}
{samples}""")


# ---- The batches of a step, the rows of an epoch ----


def tokens_in_a_step(s):
    if s.total_batch_size is None or s.grad_accum_steps is not None:
        return s.batch_size * s.block_size * (s.grad_accum_steps or 1)
    return s.total_batch_size


def plan_batch(s, process):
    """(rows of a step, of all processes; rows that one process handles at once). Raises UserError
    where they cannot be dealt evenly."""
    tokens = tokens_in_a_step(s)
    rows, rest = divmod(tokens, s.block_size)
    share, uneven = divmod(rows, process.world_size)
    if rest or uneven or rows == 0 or (rows > s.batch_size and rows % s.batch_size):
        raise UserError(
            f"total_batch_size ({tokens:,}) must be a multiple of block_size * "
            f"processes ({s.block_size * process.world_size:,}) and, if larger, of batch_size * "
            f"block_size ({s.batch_size * s.block_size:,})")
    size = min(s.batch_size, share)
    while share % size:
        size -= 1
    return rows, size


def step_batches(run, step):
    """This process's micro-batches of a step, [(x, y), ...], and the targets in the whole step."""
    process, rows = run.process, range(step * run.rows, (step + 1) * run.rows)
    targets = sum(run.loader.row_index.locate(row)[2] for row in rows)
    share = run.rows // process.world_size
    own_rows = rows[process.rank * share:][:share]
    batches = []
    for first in range(0, share, run.rows_at_once):
        batch = run.loader.batch(own_rows[first:first + run.rows_at_once])
        if process.device.type == "cuda":  # pinned memory: the copy runs beside the computation
            batch = [t.pin_memory() for t in batch]
        batches.append([t.to(process.device, non_blocking=True) for t in batch])
    return batches, targets


class RowIndex:
    """Which tokens are row number g? With `eot`, a row is a document. An epoch shuffles the shards,
    and the rows within each: memory holds two shards' order. Without a seed nothing is shuffled."""

    def __init__(self, shards, block_size, seed, eot):
        self.shards, self.block_size, self.seed, self.eot = shards, block_size, seed, eot
        self.order = functools.lru_cache(maxsize=2)(self._order)
        self.rows = functools.lru_cache(maxsize=2)(self._rows)
        self.counts = [len(self.rows(0, shard)) for shard in range(len(shards))]
        self.rows_per_epoch = sum(self.counts)

    def locate(self, row):
        """Row number -> (shard, first token, number of targets)."""
        epoch, row = divmod(row, self.rows_per_epoch)
        for shard in self.order(epoch):
            if row < self.counts[shard]:
                start, length = self.rows(epoch, shard)[row].tolist()
                return shard, start, length
            row -= self.counts[shard]

    def _order(self, epoch):
        return self._shuffled(np.arange(len(self.shards)), epoch)

    def _shuffled(self, array, *place):
        return array if self.seed is None else self._random(*place).permutation(array)

    def _random(self, *place):
        return np.random.default_rng([self.seed, *place])

    def _rows(self, epoch, shard):
        """(rows, 2) int64: first token and number of targets of a shard's rows, in the order of the
        epoch."""
        tokens, T = self.shards[shard], self.block_size
        last = len(tokens) - 1
        marks = [0, last]  # where rows have to begin and end
        if self.eot is not None:
            marks = [0, *np.flatnonzero(tokens == self.eot).tolist(), last]
        elif self.seed is not None:
            count = last // T
            if count > 1:
                count -= 1  # one row's length is left to shift the cuts
            shift = self._random(epoch, shard, 0).integers(0, min(T, last + 1 - count * T))
            marks = [shift, shift + count * T]
        # From mark to mark, every T tokens: a row ends where the next one begins
        starts = [np.arange(begin, end, T) for begin, end in itertools.pairwise(marks)]
        edges = np.concatenate([*starts, marks[-1:]])
        rows = np.stack((edges[:-1], np.diff(edges)), axis=1)
        return self._shuffled(rows, epoch, shard, 1)


# ---- Tokenizer ----

END_OF_TEXT = "<|endoftext|>"
# How GPT-2 cuts text into words, within which bytes are merged (GPT-2 paper, section 2.2)
SPLIT_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


class Tokenizer:
    """Text <-> token ids. `spec` is what meta.json and checkpoints keep of it:

    {"kind": "gpt2"}, OpenAI's 50,257 tokens; {"kind": "bpe", "ranks": [...]}, a byte-level BPE,
    its tokens in order, a character per byte; {"kind": "sentencepiece"}, "ranks" and the "model";
    {"kind": "char", "alphabet": "..."}, the characters of one corpus. `eot` is the id of
    <|endoftext|>, None for char. Raises ValueError for another spec, UserError where OpenAI's
    vocabulary is missing."""

    def __init__(self, spec):
        self.spec, self.eot, kind = spec, None, spec.get("kind")
        if kind == "gpt2":
            self.encoding = openai_encoding()
            self.tokens = self.encoding.decode_tokens_bytes(range(50256))
        else:
            self.tokens = tokens_of(spec)
        if kind == "char":
            self.ids = {character: i for i, character in enumerate(spec["alphabet"])}
        else:
            self.eot = 256 if kind == "sentencepiece" else len(self.tokens)
            self.tokens.insert(self.eot, END_OF_TEXT.encode())
        if kind == "bpe":
            self.encoding = tiktoken.Encoding(
                "bpe", pat_str=SPLIT_PATTERN, special_tokens={END_OF_TEXT: self.eot},
                mergeable_ranks={token: i for i, token in enumerate(self.tokens[:-1])})
        self.vocab_size = len(self.tokens)

    @property
    def document_start(self):
        """The ids before a document: <|endoftext|>, or a line break in a corpus of characters."""
        if self.eot is None:
            return [self.ids.get("\n", 0)]
        return [self.eot]

    @functools.cached_property
    def sentencepiece(self):
        try:
            from sentencepiece import SentencePieceProcessor
        except ImportError:
            raise UserError("to encode text: pip install sentencepiece") from None
        return SentencePieceProcessor(model_proto=self.spec["model"].encode("latin-1"))

    def encode(self, text):
        """str -> list of ids. Raises UserError for a character that a char vocabulary lacks."""
        if self.spec["kind"] == "sentencepiece":
            return self.sentencepiece.encode(text.encode(errors="replace"))
        if self.spec["kind"] != "char":
            return self.encoding.encode_ordinary(text)  # "<|endoftext|>" in a text is plain text
        unknown = "".join(sorted(set(text) - self.ids.keys()))
        if unknown:
            raise UserError(f"the vocabulary lacks {unknown!r}, it has {self.spec['alphabet']!r}")
        return [self.ids[character] for character in text]

    def decode_bytes(self, ids):
        """ids -> bytes, which may end inside a character."""
        return b"".join(self.tokens[i] for i in ids)

    def decode(self, ids):
        """ids -> str, with U+FFFD for bytes that are not UTF-8."""
        return self.decode_bytes(ids).decode(errors="replace")

    def token_bytes(self):
        """(vocab_size,) int64: bytes of text per token; 0 for <|endoftext|>."""
        sizes = np.array([len(token) for token in self.tokens])
        if self.eot is not None:
            sizes[self.eot] = 0
        return sizes


def tokens_of(spec):
    """The tokens of a spec, bytes each. Raises ValueError unless they can write every text."""
    kind, tokens = spec.get("kind"), []
    with suppress(LookupError, TypeError, AttributeError, UnicodeError):
        if kind == "char":
            tokens = [character.encode() for character in spec["alphabet"]]
        elif kind in ("bpe", "sentencepiece"):
            tokens = [token.encode("latin-1") for token in spec["ranks"]]
    distinct = set(tokens)
    lacks_bytes = kind == "bpe" and sum(len(token) == 1 for token in distinct) < 256
    if not tokens or lacks_bytes or (len(distinct) < len(tokens) and kind != "sentencepiece"):
        raise ValueError(f"{str(spec)[:50]} is no tokenizer: its tokens must be distinct and write "
                         "all bytes")
    return tokens


def openai_encoding():
    """GPT-2's vocabulary, which tiktoken downloads once."""
    try:
        return tiktoken.get_encoding("gpt2")
    except Exception as error:  # of the network or the disk, of whatever library
        raise UserError(f"GPT-2's vocabulary is missing here ({error!r:.100}): without a network, "
                        "set TIKTOKEN_CACHE_DIR to a folder that holds it; own text can also be "
                        "prepared with --tokenizer=bpe") from None


def encode_prompt(model, text):
    """Ids to start from. An empty prompt begins a document, or all do, as training rows did."""
    if model.tokenizer is None:
        raise UserError("this model has no tokenizer: give it token ids")
    ids = model.tokenizer.encode(text)
    if model.starts_documents or not ids:
        return model.tokenizer.document_start + ids
    return ids


# ---- Shards and meta.json ----

def read_shard(path):
    """A shard's tokens as a memory map, (n,) uint16. Raises UserError for a damaged one."""
    # llm.c's format: 256 int32 (magic 20240520, version 1, token count), then uint16 tokens
    try:
        size = os.path.getsize(path)
        header = np.fromfile(path, "<i4", count=3).tolist()
    except OSError:
        size, header = 0, []
    if size <= 1024 or header != [20240520, 1, (size - 1024) / 2]:
        raise UserError(f"{path} is incomplete, or not in llm.c's format (nanoGPT's files have no "
                        "header): prepare it again")
    # numpy's memmap keeps each file open, and a system may allow as few as 256; torch closes it
    return torch.from_file(str(path), size=size // 2, dtype=torch.uint16).numpy()[512:]


def shard_paths(data_dir):
    """{"train": [...], "val": [...]}: the last of both words in a .bin file's name decides."""
    paths = {"train": [], "val": []}
    if os.path.isdir(data_dir):
        for path in sorted(Path(data_dir).glob("*.bin")):
            words = re.findall("train|val", path.name)
            if words:
                paths[words[-1]].append(path)
    for split, found in paths.items():
        if not found:
            raise UserError(f"no {split} shards in {data_dir}; {how_to_prepare(data_dir)}")
    return paths


def open_rows(s, data, split, seed):
    tokenizer = data.tokenizer
    return ShardedLoader(s.data_dir, split, s.block_size, s.rows, seed, tokenizer.vocab_size,
                         tokenizer.eot)


def how_to_prepare(data_dir):
    name = Path(data_dir).name
    if os.path.isfile(data_dir):
        return f"it is a file: python prepare_data.py {shlex.quote(str(data_dir))} makes a folder"
    if name == "fineweb_edu_bpe":
        name = "fineweb_edu --tokenizer=bpe --vocab_size=9157 --max_tokens=99_000_000"
    elif name not in ("stories", "shakespeare", "tinystories", "fineweb_edu"):
        name = "FILE.txt"
    folder = shlex.quote(f"--out_dir={data_dir}")
    return f"make them with: python prepare_data.py {name} {folder}"


@dataclass
class Data:
    """What meta.json says of a folder of shards."""

    meta: dict
    tokenizer: Tokenizer
    skills: np.ndarray | None = None  # (n,): which of SKILLS predicts a validation token


def open_data(data_dir):
    """Read meta.json; shards without one are GPT-2 tokens. Raises UserError where it is damaged."""
    path = Path(data_dir) / "meta.json"
    if not os.path.exists(path):
        if os.path.exists(path.with_name("unfinished.json")):
            raise UserError(f"{data_dir} is not complete: repeat the command that prepares it")
        shard_paths(data_dir)  # a UserError where there are none
        return Data({}, Tokenizer({"kind": "gpt2"}))
    try:
        meta = json.loads(path.read_text(encoding="utf-8-sig"))
        sum(meta.get("landmarks", {}).values())  # fails unless they are numbers
        data = Data(meta, Tokenizer(meta["tokenizer"]))
        if "skills" in meta:
            data.skills = np.load(path.with_name("skills.npy"))
        return data
    except UserError:  # the vocabulary is missing, which is not the folder's fault
        raise
    except Exception as error:
        raise UserError(f"{path} is damaged ({error}); {how_to_prepare(data_dir)}") from None


# ---- Files and checkpoints ----

OPENAI_NAMES = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")


@contextmanager
def writing(path):
    """Turn a disk's error into a UserError; torch.save wraps it in a RuntimeError."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        for reason in (error, error.__context__):
            if isinstance(reason, OSError):
                raise UserError(f"cannot write {path} ({reason.strerror}): make room or choose "
                                "another folder; older files are intact") from None
        raise


def write_atomically(path, write):
    """Call write(file) on a file beside `path`; move it there once it is on the disk."""
    path = Path(path)
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with writing(path):
        try:
            with open(beside, "wb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            replace(beside, path)
        finally:
            beside.unlink(missing_ok=True)


def replace(source, target):
    """os.replace. On Windows it fails while another program, such as a virus scanner, reads the
    target: so try again for two seconds."""
    for _ in range(20):
        try:
            os.replace(source, target)
            return
        except PermissionError:
            time.sleep(0.1)
    os.replace(source, target)


def write_text(path, text):
    write_atomically(path, lambda file: file.write(text.encode("utf-8")))


def make_checkpoint(model, step=0, settings=None, best_val_loss=math.inf):
    """What best.pt holds; ckpt.pt has the optimizer too."""
    return {"model": model.state_dict(), "step": step, "config": asdict(model.config),
            "settings": settings or {}, "best_val_loss": float(best_val_loss),
            "tokenizer": model.tokenizer.spec if model.tokenizer else {}, "code": CODE}


def converted_path(name):
    """Where prepare_data.py puts the weights of `name`, one of OpenAI's or a folder."""
    folder = f"openai-{name}" if name in OPENAI_NAMES else Path(name).resolve().name
    return Path("out", folder, "best.pt")


def weights_path(name):
    """The file that --init_from or --checkpoint names; of a run's folder, its best.pt."""
    path = converted_path(name) if name in OPENAI_NAMES else Path(name)
    return path / "best.pt" if os.path.isfile(path / "best.pt") else path


def way_out(path):
    """What else to do where a run's checkpoint does not serve."""
    path = Path(path)
    return f"; {start_over(path.parent)}" if path.name == "ckpt.pt" else ""


def not_valid(path, reason):
    """The UserError for a file that is no whole checkpoint."""
    reason = reason[:150].replace("\n", " ")
    return UserError(f"{path} is not a valid checkpoint ({reason}){way_out(path)}")


def load_plain(path, **options):
    """The tensors and plain data that torch.save wrote. Nothing in the file is executed."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True, **options)
    except (pickle.UnpicklingError, RuntimeError):  # torch says how to execute it all the same
        raise ValueError("damaged, or more than tensors and plain data") from None


def read_checkpoint(path):
    """The dict in a checkpoint, its tensors still in the file. Only plain data is unpickled.
    Raises UserError for a file that is none."""
    hint = "name a run's best.pt"
    if not str(path).endswith(".pt"):
        hint += f", or try: python prepare_data.py {shlex.quote(str(path))}"
    if path in OPENAI_NAMES:
        hint = f"make it with: python prepare_data.py {path}"
    path = weights_path(path)
    if not os.path.isfile(path):
        raise UserError(f"there is no checkpoint {path}: {hint}")
    try:
        found = load_plain(path, mmap=True)
        if "model_args" in found:
            raise ValueError("nanoGPT wrote it: convert it with prepare_data.py")
        if found["step"] < 0 or math.isnan(found["best_val_loss"]):
            raise ValueError("its step or loss is impossible")
        for key in ("model", "config", "settings", "tokenizer"):
            found[key].keys()
        return found
    except KeyError as error:
        raise not_valid(path, f"it lacks {error}") from None
    except Exception as error:  # a damaged file can make the unpickler raise anything
        raise not_valid(path, str(error)) from None


def refuse_other_code(found, path):
    """Raise UserError if the script that trained a checkpoint had another model."""
    names = other_code(found, model_code)
    if names:
        raise UserError(f"{path} was trained by other code in {' and '.join(names)}: put that back "
                        "(the run's folder has its train_gpt2.py), or name another")


def config_in(found, path, **changes):
    """The GPTConfig in a checkpoint, parts of it changed. Raises UserError for an impossible one,
    and for one that only other code has."""
    unknown = found["config"].keys() - GPTConfig.__dataclass_fields__.keys()
    if unknown:
        refuse_other_code(found, path)
        raise not_valid(path, f"its config has {unknown}")
    config = GPTConfig(**found["config"] | changes)
    try:
        check_ranges(config, vocab_size=(1, 2**24))
        check_shape(config)
    except (TypeError, UserError) as error:
        refuse_other_code(found, path)
        raise not_valid(path, str(error)) from None
    return config


def shapes(weights):
    return {name: (t.shape, t.dtype, t.layout) for name, t in weights.items()}


def fitting_weights(model, found, path, lenient):
    """A checkpoint's weights that fit a model, which may be on the device "meta" and take no
    memory. Raises UserError where some do not, unless `lenient`."""
    ours, theirs = shapes(model.state_dict()), shapes(found["model"])
    wrong = [name for name in ours | theirs if ours.get(name) != theirs.get(name)]
    if wrong and not lenient:
        refuse_other_code(found, path)
        raise not_valid(path, f"this model code has other weights: {', '.join(wrong)}")
    fitting = {name: found["model"][name] for name in ours if name not in wrong}
    for tensor in fitting.values():
        is_whole = 4 * tensor.numel() <= tensor.untyped_storage().nbytes()
        if not is_whole or not tensor.isfinite().all():
            raise not_valid(path, "its weights are incomplete or infinite")
    return fitting


class WithoutInit(TorchFunctionMode):
    """Inside, torch.nn.init does nothing. On the device "meta" there are no numbers to draw, and
    torch would take a second to import what pretends to."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if getattr(function, "__module__", "") == "torch.nn.init":
            return None
        return function(*args, **(kwargs or {}))


def load_model(path, device="cpu", lenient=False, **changes):
    """The model in a checkpoint, parts of its config changed, ready to generate text. Where it is
    lenient, weights that do not fit an edited model start anew."""
    found = read_checkpoint(path)
    lenient = lenient and bool(other_code(found))
    config = config_in(found, path, **changes)
    with torch.device("meta"), WithoutInit():
        weights = fitting_weights(GPT(config), found, path, lenient)
    model = GPT(config)
    model.new_weights = model.load_state_dict(weights, strict=False).missing_keys
    model.code_difference = other_code(found, model_code)
    if found["tokenizer"]:
        try:
            model.tokenizer = Tokenizer(found["tokenizer"])
        except ValueError as error:
            raise not_valid(path, str(error)) from None
        if model.tokenizer.vocab_size != config.vocab_size:
            raise not_valid(path, "its tokenizer has another size")
    model.starts_documents = found["settings"].get("rows") == "documents"
    return model.to(device).eval()


def optimizer_state(model, optimizer):
    """{parameter's name: what the optimizer remembers of it}; nothing for one without gradients."""
    return {name: optimizer.state[p] for name, p in model.named_parameters()
            if p in optimizer.state}


def load_optimizer_state(model, optimizer, saved):
    """The reverse. Raises ValueError for a state of AdamW's that has other shapes."""
    names = {p: name for name, p in model.named_parameters()}
    learned = sum((group["params"] for group in optimizer.param_groups), [])
    states = {}
    for number, p in enumerate(learned):  # torch counts parameters, and so did older checkpoints
        state = saved.get(names[p]) or saved.get(number) or {}
        is_adamw = type(optimizer) is torch.optim.AdamW
        if is_adamw and any(value.shape not in ((), p.shape) for value in state.values()):
            raise ValueError(f"another shape of {names[p]}")
        if state:
            states[number] = copy.deepcopy(state)
    optimizer.load_state_dict(optimizer.state_dict() | {"state": states})


def load_training_state(path, model, optimizer, scaler, s, process):
    """Resume from ckpt.pt, whose weights the model has already; return (step, lowest validation
    loss). Where the run goes on in any case, an optimizer that does not fit starts anew."""
    found, always = read_checkpoint(path), s.resume == "always"
    try:
        if always and "make_optimizer" in other_code(found):
            raise ValueError("another optimizer")
        load_optimizer_state(model, optimizer, found["optimizer"]["state"])
        if scaler.is_enabled() and "scaler" in found["optimizer"]:
            scaler.load_state_dict(found["optimizer"]["scaler"])
    except (LookupError, TypeError, AttributeError, ValueError) as error:
        if not always:
            raise not_valid(path, f"its optimizer does not fit: {error!r}") from None
        process.say(f"note: the optimizer starts anew ({error})")
    # A best.pt of another model's is replaced by the first of this one's
    return found["step"], math.inf if other_code(found, model_code) else found["best_val_loss"]


# ---- Devices and processes ----


class Process:
    """This process among its siblings (torchrun starts one per GPU), its device and precision."""

    def __init__(self, s):
        self.rank = int(os.environ.get("RANK", 0))
        self.world_size = int(os.environ.get("WORLD_SIZE", 1))
        self.is_master = self.rank == 0  # the process that writes and prints
        self.threads = torch.get_num_threads() * self.world_size
        name = s.device
        if name == "auto" and self.world_size > 1 and not torch.cuda.is_available():
            name = "cpu"  # a Mac has one MPS device, and gloo cannot reach it
        self.device = pick_device(name, os.environ.get("LOCAL_RANK", "0"))
        self.set_dtype(s.dtype)
        self.at_end = ExitStack()  # closed at the end
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
            torch.set_float32_matmul_precision("high")  # TF32 for products in float32
        if s.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS asks for it
            torch.use_deterministic_algorithms(True)
        if self.world_size > 1:
            has_nccl = self.device.type == "cuda" and dist.is_nccl_available()
            dist.init_process_group("nccl" if has_nccl else "gloo")
            self.at_end.callback(dist.destroy_process_group)

    def set_dtype(self, name):
        self.dtype = pick_dtype(name, self.device)

    def say(self, text):
        if self.is_master:
            with tqdm.external_write_mode():  # above the progress bar
                print(text, flush=True)

    def dtype_name(self):
        return str(self.dtype).removeprefix("torch.")

    def autocast(self):
        single = self.dtype == torch.float32
        return nullcontext() if single else torch.autocast(self.device.type, self.dtype)

    def reduce(self, tensor, operation=dist.ReduceOp.SUM):
        """The sum over all processes, on each of them; or what another operation makes. A tensor on
        the device is changed itself."""
        if self.world_size > 1:
            tensor = tensor.to(self.device)
            dist.all_reduce(tensor, operation)
        return tensor

    def sum_gradients(self, model):
        """Add up the processes' gradients, on each of them."""
        for p in model.parameters():
            if p.grad is not None:
                self.reduce(p.grad)

    def copy_from_master(self, model):
        """The master's weights on each process: another machine may have rounded differently."""
        if self.world_size > 1:
            for tensor in model.state_dict().values():
                dist.broadcast(tensor, src=0)

    def from_master(self, compute):
        """What compute() returns on the master, on every process; a UserError reaches all."""
        answer = [None]
        if self.is_master:
            try:
                answer = [compute()]
            except UserError as error:
                answer = [error]
        if self.world_size > 1:
            dist.broadcast_object_list(answer, src=0)
        if isinstance(answer[0], UserError):
            raise answer[0]
        return answer[0]


def pick_device(name, local_rank=0):
    """CUDA, else MPS, else CPU; or the one named, if it is here."""
    if name == "auto":
        here = torch.accelerator.is_available()
        name = torch.accelerator.current_accelerator().type if here else "cpu"
    try:
        device = torch.device(f"cuda:{local_rank}" if name == "cuda" else name)
        torch.zeros(1, device=device).item()
        return device
    except (RuntimeError, AssertionError):
        raise UserError(f"torch has no device {name!r} for process {local_rank} here: leave out "
                        "--device, and start one process per GPU") from None


def pick_dtype(name, device):
    """bfloat16 where the hardware computes it, float16 on older CUDA cards, else float32."""
    if name != "auto":
        return getattr(torch, name)
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if native else torch.float16
    probe = getattr(torch.cpu, "_is_avx512_bf16_supported", None)  # not in each torch
    if device.type == "cpu" and probe and probe():
        return torch.bfloat16
    return torch.float32


def wait_for(device):
    if device.type != "cpu":  # a GPU works on while Python goes ahead
        torch.accelerator.synchronize()


def compiled(model, s, process):
    """The model that takes the training steps: compiled on CUDA, or where it is asked for."""
    wanted = s.compile_model
    if wanted == "auto":
        wanted = process.device.type == "cuda" and not s.deterministic
    if not wanted:
        return model
    try:  # a missing compiler shows only when it is used
        torch.compile(lambda x: x.exp().sum())(torch.zeros(8, device=process.device))
    except Exception as error:
        process.say(f"warning: torch.compile does not work here ({type(error).__name__}); training "
                    "goes on without it")
        return model
    return torch.compile(model)


def keep_memory():
    """Let glibc keep large blocks: new ones for GPT-2's logits took half of each step."""
    with suppress(OSError, AttributeError):  # not glibc
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-4, 0)  # M_MMAP_MAX
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


def is_out_of_memory(error):
    said = re.search("(out of|allocate|enough) memory", str(error))
    return isinstance(error, MemoryError) or said is not None


def check_sampling(temperature, top_k, top_p):
    """Raise UserError for options that no text can be drawn by."""
    options = SimpleNamespace(temperature=temperature, top_k=top_k, top_p=top_p)
    check_ranges(options, temperature=(0, 1e6), top_k=(1, 2**24), top_p=(1e-6, 1))


def combined_seed(*numbers):
    """One seed that depends on all the numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])


# ---- Building a model ----


@functools.cache
def kernel_agrees(attention):
    """Does causal_attention compute the same with torch's kernel as without? An edit of its lines
    would be in force only where the kernel is not used."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad(), suppress(Exception):  # which the model will meet again
        q, k, v = torch.randn(3, 1, 2, 40, 8, generator=generator, device="cpu")
        for queries in (q, q[..., -1:, :]):  # a whole text, and a token behind a cache
            fused = attention(queries, k, v, flash=True)
            if not torch.allclose(fused, attention(queries, k, v, flash=False), atol=1e-4):
                return False
    return True


def build_model(s, tokenizer, process):
    """A new model of the settings' shape, or the one in --init_from, on the device."""
    if s.init_from:
        model = load_model(s.init_from, lenient=True, dropout=s.dropout, attention=s.attention)
        own = model.tokenizer or tokenizer
        if own.spec != tokenizer.spec or model.config.vocab_size != tokenizer.vocab_size:
            raise UserError(f"{s.init_from} and {s.data_dir} have different tokenizers")
        if model.code_difference and s.resume == "auto":
            process.say(f"note: {s.init_from} was trained by other code in "
                        f"{' and '.join(model.code_difference)}")
        if model.new_weights:
            process.say(f"note: {len(model.new_weights)} weights of this model code do "
                        f"not fit {s.init_from} and start anew: {model.new_weights[0]}, ...")
    else:
        # A field that an edit added to GPTConfig alone has its default
        names = GPTConfig.__dataclass_fields__.keys() & vars(s).keys()
        shape = {name: getattr(s, name) for name in names}
        model = GPT(GPTConfig(vocab_size=tokenizer.vocab_size, **shape), s.init_std)
    if s.attention == "flash" and not kernel_agrees(causal_attention):
        process.say("note: the lines of causal_attention differ from torch's kernel, so it is not "
                    "used")
    model.tokenizer = tokenizer
    model.starts_documents = s.rows == "documents"
    model = model.to(process.device)
    process.copy_from_master(model)
    return model


def adopt_shape(s, given, path):
    """The weights in a file have their own shape; only the rows may be shorter."""
    config = config_in(read_checkpoint(path), path)
    for name in SHAPE:
        value = getattr(config, name)
        if given.get(name, value) != value:
            raise UserError(f"{path} has {name}={value}: leave that out{way_out(path)}")
    if given.get("block_size", 0) > config.block_size:
        raise UserError(f"{path} has a context of {config.block_size}: lower --block_size")
    wanted = (PRESETS[s.preset] | given).get("block_size", config.block_size)
    s.block_size = min(wanted, config.block_size)
    s.init_from = str(path)


def check_shape(c):
    """Raise UserError for a model that cannot be built; c: Settings, or a GPTConfig."""
    check_ranges(c, block_size=(1, 2**24), n_layer=(1, 1024), n_head=(1, 2**16), n_embd=(1, 2**16),
                 dropout=(0, 0.9999999))
    for name, kind in typing.get_type_hints(Settings).items():
        is_choice = typing.get_origin(kind) is Literal and hasattr(c, name)
        if is_choice and getattr(c, name) not in typing.get_args(kind):
            choices = ", ".join(map(str, typing.get_args(kind)))
            raise UserError(f"{name} is {getattr(c, name)!r}, none of {choices}")
    if c.n_embd % c.n_head:
        raise UserError(f"n_embd {c.n_embd} is not a multiple of n_head {c.n_head}")
    if c.pos_encoding == "sinusoidal" and c.n_embd % 2:
        raise UserError(f"n_embd {c.n_embd} is odd: sinusoids come in pairs")


# ---- Evaluation ----

HELLASWAG = Path("data/hellaswag/hellaswag_val.jsonl")


def token_losses(logits, y):
    """Logits (B, T, V) and targets (B, T) -> nats of each target, (B, T) float32 on the CPU; 0 for
    a target of -1."""
    targets = y.flatten().to(logits.device)
    nats = F.cross_entropy(logits.flatten(0, 1).float(), targets, ignore_index=-1, reduction="none")
    return nats.view(y.shape).cpu()


def evaluate(model, loader, s, process, data):
    """The loss on the validation rows, always the same ones, in nats per token, and its part above
    the floor where that is known: {column of the log: value}."""
    rows = range(loader.rows_per_epoch)
    if s.eval_tokens is not None:
        rows = rows[:max(1, s.eval_tokens // s.block_size)]
    rows_at_once = s.batch_size
    if process.device.type == "cpu":  # where more would only take memory
        rows_at_once = max(1, 4096 // s.block_size)
    # The floor is that of the whole split. Its skills are in the order of the one shard's tokens
    has_floor = (data.skills is not None and s.rows == "documents" and len(loader.shards) == 1
                 and len(rows) == loader.rows_per_epoch)
    token_bytes = torch.from_numpy(data.tokenizer.token_bytes())
    # Of each row: its targets, their bytes of text, the nats of each skill. So the sums do not
    # depend on how many rows are read at once, or by how many processes
    sums = torch.zeros((len(rows), 2 + len(SKILLS)), dtype=torch.float64)
    stride = rows_at_once * process.world_size
    for first in range(process.rank * rows_at_once, len(rows), stride):
        batch = rows[first:first + rows_at_once]
        x, y = loader.batch(batch)
        with evaluating(model), process.autocast():
            logits, _ = model(x.to(process.device))  # (B, T, V)
        nats = token_losses(logits, y).double()
        for i, row in enumerate(batch):
            _, start, length = loader.row_index.locate(row)
            targets = y[i, :length]
            skill = torch.zeros_like(targets)
            if has_floor:
                skill += torch.from_numpy(data.skills[start + 1:start + 1 + length])
            sums[row, 0], sums[row, 1] = length, token_bytes[targets].sum()
            sums[row, 2:] = torch.bincount(skill, nats[i, :length], minlength=len(SKILLS))
    tokens, text_bytes, *nats = process.reduce(sums).cpu().sum(dim=0).tolist()
    bits = sum(nats) / math.log(2)
    found = {"val_loss": sum(nats) / tokens,
             "val_bits_per_byte": bits / text_bytes if text_bytes else math.nan}
    if has_floor:
        found["above_floor"] = found["val_loss"] - data.meta["entropy_floor"]
        for skill, its_nats in zip(SKILLS, nats, strict=True):
            found[f"above_floor_{skill}"] = its_nats / tokens - data.meta["skills"][skill]
    return found


TOKENS_OF_ENDINGS = 1280  # that are read at once: for GPT-2, logits and cache take 1.2 GB


def question_batches(texts):
    """(context, [endings]) in tokens of each question -> lists of numbers of questions whose
    contexts are equally long."""
    def lengths(number):
        context, endings = texts[number]
        return len(context), max(map(len, endings))

    batches, length_before = [], None
    for number in sorted(range(len(texts)), key=lengths):
        length, longest = lengths(number)
        if length != length_before or 4 * longest * (1 + len(batches[-1])) > TOKENS_OF_ENDINGS:
            batches.append([])
        batches[-1].append(number)
        length_before = length
    return batches


def hellaswag(model, questions, process):
    """Which of its four endings does the model expect of each question (Zellers et al. 2019)? A
    question is (context, [endings], number of the right one). Returns (questions, 2) int64: the
    ending of the lowest loss, in total and per token."""
    tokenizer, block_size = model.tokenizer, model.config.block_size
    texts = []  # (context, [endings]) in tokens
    for context, endings, _ in questions:
        endings = [tokenizer.encode(ending)[:block_size] for ending in endings]
        context = tokenizer.encode(context) or tokenizer.document_start
        context = context[-(block_size + 1 - max(map(len, endings))):]  # what fits before them
        texts.append((context, endings))
    losses = torch.zeros((len(questions), 4, 2))
    for numbers in question_batches(texts)[process.rank::process.world_size]:
        contexts = [texts[number][0] for number in numbers]
        endings = itertools.chain(*[texts[number][1] for number in numbers])
        contexts = torch.tensor(contexts, device=process.device)  # (B, P): B texts of P tokens
        y = nn.utils.rnn.pad_sequence([torch.tensor(ending) for ending in endings],
                                      batch_first=True, padding_value=-1)  # (4 B, T)
        y = y.to(process.device)
        # The context's last token predicts the ending's first
        last = contexts[:, -1:].repeat_interleave(4, dim=0)
        x = torch.cat((last, y[:, :-1].clamp(min=0)), dim=1)
        cache = KVCache(contexts.size(1) - 1 + y.size(1))
        with evaluating(model), process.autocast():
            if contexts.size(1) > 1:  # it is read once, for all four endings
                model(contexts[:, :-1], cache=cache)
                for i, (keys, values) in enumerate(cache.layers):
                    cache.layers[i] = keys.repeat_interleave(4, 0), values.repeat_interleave(4, 0)
            logits, _ = model(x, y, cache)  # (4 B, T, V)
        nats = token_losses(logits, y).sum(dim=1)  # (4 B,)
        per_token = nats / (y != -1).sum(dim=1).cpu()
        losses[numbers] = torch.stack((nats, per_token), dim=1).view(-1, 4, 2)
    return process.reduce(losses).argmin(dim=1).cpu()


def read_questions():
    """[(context, [endings], number of the right one), ...]; [] where HellaSwag is not prepared."""
    if not HELLASWAG.exists():
        return []
    try:
        lines = [json.loads(line) for line in HELLASWAG.read_text(encoding="utf-8").splitlines()]
        return [(line["ctx"], [" " + line["endings"][i] for i in range(4)], int(line["label"]))
                for line in lines]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise UserError(f"{HELLASWAG} is damaged ({error!r}): prepare it again") from None


def hellaswag_scores(model, process):
    """Columns of the log: the share of right choices, by total loss and by loss per token."""
    if model.tokenizer.spec["kind"] != "gpt2":
        return {}
    questions = process.from_master(read_questions)
    if not questions:
        return {}
    right = torch.tensor([[label] for _, _, label in questions])
    acc, acc_norm = (hellaswag(model, questions, process) == right).double().mean(dim=0).tolist()
    return {"hellaswag_acc": acc, "hellaswag_acc_norm": acc_norm}


def in_words(found):
    text = ""
    if "val_loss" in found:
        text = "{val_loss:.4f}, {val_bits_per_byte:.3f} bits per byte"
    if "above_floor" in found:
        above = found["above_floor"] / (found["val_loss"] - found["above_floor"])
        parts = ", ".join(f"{skill} {{above_floor_{skill}:.3f}}" for skill in SKILLS)
        text += f", {100 * above:,.1f} % above the floor ({parts})"
    if "hellaswag_acc" in found:
        text += " HellaSwag acc {hellaswag_acc:.2%}, acc_norm {hellaswag_acc_norm:.2%}"
    return text.format(**found).strip()


def report_evaluation(s, process):
    data = open_data(s.data_dir)
    # The loss would not be that of this code
    refuse_other_code(read_checkpoint(s.init_from), s.init_from)
    model = build_model(s, data.tokenizer, process)
    found = evaluate(model, open_rows(s, data, "val", None), s, process, data)
    found |= hellaswag_scores(model, process)
    process.say(f"{s.init_from} on {s.data_dir}: {in_words(found)}")
    return 0


def matmul_speed(process, n=2048):
    """FLOP/s of a device in an n x n x n product: the mean of ten in a row."""
    a = torch.randn(n, n, device=process.device, dtype=process.dtype)
    for i in range(12):
        if i == 2:  # the first two warmed up
            wait_for(process.device)
            began = time.perf_counter()
        a @ a
    wait_for(process.device)
    return 10 * 2 * n**3 / (time.perf_counter() - began)


def flops_per_token(model, T):
    """FLOPs of training per token, in rows of T (Chowdhery et al. 2022, appendix B)."""
    looked_up = ("wpe.weight",) if model.config.tie_weights else ("wpe.weight", "wte.weight")
    N = sum(p.numel() for name, p in model.named_parameters() if not name.endswith(looked_up))
    return 6 * N + 12 * model.config.n_layer * model.config.n_embd * T


# ---- The command line ----


class UserError(Exception):
    """A user's mistake."""


def reports_mistakes(main):
    """Decorate main(): a UserError becomes one line on stderr and exit status 2."""
    @functools.wraps(main)
    def wrapper(argv=None):
        for stream in (sys.stdout, sys.stderr):
            if hasattr(stream, "reconfigure"):  # a notebook's has none
                stream.reconfigure(encoding="utf-8", errors="replace")
        try:
            status = main(argv)
            print(end="", flush=True)  # a closed pipe shows here
            return status
        except BrokenPipeError:  # as behind `| head`
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise SystemExit(141) from None
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            raise SystemExit(2) from None
        except KeyboardInterrupt:
            print("stopped", file=sys.stderr)
            raise SystemExit(130) from None
    return wrapper


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(message)


# What other programs call some settings
OTHER_NAMES = {"lr": "learning_rate", "max_iters": "max_steps", "warmup_iters": "warmup_steps",
               "eval_iters": "eval_tokens", "eval_interval": "eval_every",
               "log_interval": "log_every", "compile": "compile_model",
               "gradient_accumulation_steps": "grad_accum_steps"}


def parse_settings(cls, argv=None, doc="", presets=None, bare=None):
    """(settings, {name: value} given): defaults, then the preset, then the command line. Words
    without dashes set the setting `bare`. In the source of cls, the comment behind a setting is
    its help, and a comment on a line of its own heads a group."""
    parser = Parser(usage="%(prog)s [--name=value ...]", description=doc, allow_abbrev=False,
                    epilog="\n  ".join(["presets:", *presets]) if presets else "",
                    argument_default=argparse.SUPPRESS,  # what is not given is not in the result
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = typing.get_type_hints(cls)
    group = parser
    for line in inspect.getsource(cls).splitlines():
        code, _, comment = line.partition("# ")
        name = code.partition(":")[0].strip()
        if name in kinds:
            add_option(group, name, kinds[name], getattr(cls, name), comment)
        elif comment:
            group = parser.add_argument_group(comment)
    if bare:
        parser.add_argument("words", nargs="*", help=argparse.SUPPRESS)
    found, unknown = parser.parse_known_args(argv)
    given = vars(found)
    words = given.pop("words", [])
    if unknown:
        raise UserError(f"{unknown[0]!r} is not a setting; {nearest(unknown[0], kinds)}")
    if words and (bare in given or (len(words) > 1 and kinds[bare] is str)):
        raise UserError(f"{words[-1]!r} is one word too many: if it belongs to the {bare}, put it "
                        "in quotes")
    if words:
        given[bare] = words[0] if len(words) == 1 else words
    if presets is None:
        return cls(**given), given
    preset = given.get("preset", cls.preset)
    if preset not in presets:
        raise UserError(f"there is no preset {preset!r}, only {', '.join(presets)}")
    return cls(**presets[preset] | given), given


def add_option(group, name, kind, default, comment):
    """Add a setting to the parser, by the kind of its value."""
    option, comment = f"--{name}", comment.replace("%", "%%")
    if kind is bool:
        group.add_argument(option, action=argparse.BooleanOptionalAction, help=comment)
        return
    parts, choices = typing.get_args(kind) or [kind], None
    if typing.get_origin(kind) is Literal:
        choices, convert = parts, parse_choice
        comment += f" ({', '.join(map(str, parts))})"
    elif str in parts:
        convert = str
    else:
        convert = functools.partial(parse_number, parts[0], type(None) in parts)
    group.add_argument(option, type=convert, choices=choices, metavar=str(default), help=comment)


def parse_choice(text):
    return {"true": True, "false": False}.get(text.lower(), text)


def parse_number(kind, is_optional, text):
    """int or float; also None where the setting may be none. 1e3 and 1_000 are ints."""
    if is_optional and text.lower() == "none":
        return None
    with suppress(ValueError):
        return kind(text)
    with suppress(ValueError):
        if float(text).is_integer():
            return int(float(text))
    raise argparse.ArgumentTypeError(f"expected {kind.__name__}, got {text!r}")


def nearest(word, names):
    """A hint at the setting that was meant."""
    name = word.partition("=")[0].strip("-")
    if name == "f":  # what a notebook is called with
        return 'in a notebook, call main([]) or main(["--name=value"])'
    near = difflib.get_close_matches(OTHER_NAMES.get(name, name), names, 1, 0.5)
    if near and word.startswith("-"):
        return f"did you mean --{near[0]}?"
    return "see --help"


def check_ranges(s, **ranges):
    for name, (least, most) in ranges.items():
        value = getattr(s, name)
        if value is not None and not least <= value <= most:
            raise UserError(f"{name} is {value:,}: it must be from {least:,} to {most:,}")


def check_settings(s):
    """Raise UserError for a value out of range."""
    for name, kind in typing.get_type_hints(Settings).items():
        if kind in (float, float | None) or name in ("seed", "warmup_steps"):
            check_ranges(s, **{name: (0, 2**53)})
        elif kind in (int, int | None):
            check_ranges(s, **{name: (1, 2**53)})
        if kind in (int, int | None) and not isinstance(getattr(s, name), kind):
            raise UserError(f"{name} is {getattr(s, name)!r}: it must be a whole number")
    below_1 = (0, 0.9999999)
    check_ranges(s, min_lr=(0, s.learning_rate), init_std=(1e-9, 1e9), beta1=below_1, beta2=below_1)
    check_shape(s)
    step = SimpleNamespace(total_batch_size=tokens_in_a_step(s))
    check_ranges(step, total_batch_size=(1, 2**27))
    if s.preset == "finetune" and not s.init_from:
        raise UserError("finetune needs weights: --init_from=gpt2, or a run's best.pt")
    if s.resume == "always" and s.overwrite:
        raise UserError("--resume=always goes on, and --overwrite starts over: leave one out")


def prepare_stories(s):
    """The default data set makes itself."""
    if s.data_dir != Settings.data_dir or (Path(s.data_dir) / "meta.json").exists():
        return
    script = SCRIPT.with_name("prepare_data.py")
    if subprocess.run([sys.executable, script]).returncode:
        raise UserError("prepare_data.py failed; its message is above")


@reports_mistakes
def main(argv=None):
    s, given = parse_settings(Settings, argv, __doc__, PRESETS)
    for name in ("data_dir", "out_dir", "init_from", "compare"):
        setattr(s, name, os.path.expanduser(getattr(s, name)))
    check_settings(s)
    keep_memory()
    process = Process(s)
    try:
        if process.from_master(lambda: CODE) != CODE:
            raise UserError(f"process {process.rank} runs another train_gpt2.py than the first one")
        changes = PRESETS[s.preset] | given
        if changes:
            process.say(f"preset and options change the constants at the top: {changes}")
        process.from_master(lambda: prepare_stories(s))
        if s.eval_only:
            adopt_shape(s, given, s.init_from or Path(s.out_dir or f"out/{s.preset}") / "best.pt")
            return report_evaluation(s, process)
        open_data(s.data_dir)  # its mistakes come before a new folder
        command = shlex.join(["python", "train_gpt2.py", *(sys.argv[1:] if argv is None else argv)])
        place = process.from_master(lambda: choose_folder(s, command, process))
        if place.step == s.max_steps:
            return 0
        source = place.checkpoint or s.init_from
        if source:
            adopt_shape(s, given, source)
        if place.remark:
            process.say(place.remark)
        return train(s, place, process)
    except UserError as error:
        if process.world_size == 1:
            raise
        raise UserError(f"{error} (process {process.rank} on {platform.node()}: each machine needs "
                        "the data, and the run's folder to resume)") from None
    except (RuntimeError, MemoryError) as error:
        if isinstance(error, dist.DistError) or "peer" in str(error):
            print(f"error: process {process.rank} lost another one; the same command resumes",
                  file=sys.stderr)
            os._exit(1)  # a regular end may wait for the other one
        if not is_out_of_memory(error):
            raise
        steps = max(1, tokens_in_a_step(s) // (s.batch_size * s.block_size))
        raise UserError(f"{process.device} is out of memory: halve --batch_size ({s.batch_size}) "
                        f"and double --grad_accum_steps ({steps})") from None
    finally:
        process.at_end.close()


if __name__ == "__main__":
    sys.exit(main())
