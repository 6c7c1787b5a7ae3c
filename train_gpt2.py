"""Train a GPT-2 from scratch, in one file that you can read in an evening.

    python train_gpt2.py                              # offline, 3 minutes: learns little stories
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
import hashlib
import inspect
import itertools
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
import typing
import warnings
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

# Waiting threads spin, which keeps their cores busy. GNU's OpenMP spins so long that beside another
# program training was up to 10 times as slow
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import filelock
import numpy as np
import tiktoken
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
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
    seed: int = 1  # of initial weights, data order and dropout
    # the machine
    device: str = "auto"  # auto (CUDA, else MPS, else CPU), cpu, cuda, cuda:1, mps
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # of matrix products
    compile_model: Literal["auto", True, False] = "auto"  # auto: on CUDA, unless deterministic
    attention: Literal["flash", "manual"] = "flash"  # fused kernel, or the five lines it stands for
    deterministic: bool = False  # the same run has the same bits on a GPU too; slower
    # the batch
    rows: Literal["stream", "documents"] = "documents"  # equal cuts, or a document per row
    batch_size: int = 16  # rows in a micro-batch, which one process handles at once
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
    activation: Literal["gelu", "relu"] = "gelu"  # the nonlinearity of the MLPs
    init_std: float = 0.08  # standard deviation of initial weights; narrow models need more
    # what is measured, and how often (in steps)
    eval_only: bool = False  # measure init_from, or out_dir's best.pt; no training
    eval_every: int = 100  # validation loss, picture and report
    eval_tokens: int | None = None  # validation tokens per evaluation; None: all of them
    sample_every: int = 200  # a text; HellaSwag, a multiple-choice test, if prepared
    checkpoint_every: int = 300  # a kill loses at most these steps
    log_every: int = 20  # a line on the screen and a row in log.csv


# What each preset changes. The larger GPT-2 sizes take the GPT-3 paper's rates, table 2.1.
_OFTEN = dict(init_std=0.02,  # GPT paper, section 4.1
              eval_every=250, sample_every=1000, checkpoint_every=1000, log_every=10)
_CHARS = dict(data_dir="data/shakespeare", rows="stream")
_GPT2 = _OFTEN | dict(
    data_dir="data/fineweb_edu", rows="stream", n_layer=12, n_head=12, n_embd=768, block_size=1024,
    batch_size=32, total_batch_size=524_288,  # 2^19: the GPT-3 paper, table 2.1, has 0.5M tokens
    max_steps=19_073,  # * 2^19 tokens = 10 billion: the FineWeb-Edu sample, once
    warmup_steps=715,  # * 2^19 = 375 million tokens: GPT-3 paper, appendix B
    learning_rate=6e-4, min_lr=6e-5,  # GPT-3 paper, table 2.1; down to 10 %: appendix B
    eval_tokens=10_485_760)
PRESETS = {
    "stories": {},
    "shakespeare_char": _CHARS | _OFTEN | dict(  # 24 epochs of 1 MB: dropout is needed
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
    "gpt2_nano": _OFTEN | dict(  # 32,768 tokens a step, 3.3 epochs of 99 million tokens
        data_dir="data/fineweb_edu_bpe", rows="stream", n_layer=12, n_head=8, n_embd=512,
        block_size=1024, pos_encoding="sinusoidal", activation="relu", batch_size=32,
        max_steps=10_000, warmup_steps=200, learning_rate=3e-4, eval_tokens=1_048_576),
    "gpt2_mini": _OFTEN | dict(  # 65,536 tokens * 7,629 steps = 0.5 billion
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
# Shapes in the comments: B rows in a batch, T tokens in a row, C = n_embd, head_dim = C / n_head,
# V = vocab_size.


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


def causal_attention(q, k, v, dropout=0.0, flash=True):
    """Scaled dot-product attention (Attention paper, section 3.2.1). Each token takes a
    weighted mean of the values of the tokens up to itself; the causal mask hides the later ones,
    which the model learns to predict. q and the result are (B, n_head, T, head_dim); k and v are
    (B, n_head, S, head_dim), where S is T plus the tokens in the cache."""
    T, S = q.size(-2), k.size(-2)
    if T == 1 and q.is_cpu and q.dtype == torch.bfloat16:  # faster in float32
        return causal_attention(q.float(), k.float(), v.float(), dropout, flash).to(q.dtype)
    # -inf where a query (row) must not look at a key (column), else 0; added to the scores
    mask = torch.full((T, S), -math.inf, dtype=q.dtype, device=q.device).triu(S - T + 1)
    # One kernel (a program on the device) does the lines below without storing the scores. On a
    # CPU it is avoided in bfloat16 (1.6 to 6 times as slow) and with dropout (not supported)
    if flash and not (q.is_cpu and (q.dtype == torch.bfloat16 or dropout)):
        if T == S:  # the kernel brings this mask itself
            return F.scaled_dot_product_attention(q, k, v, None, dropout, is_causal=True)
        return F.scaled_dot_product_attention(q, k, v, mask if T > 1 else None, dropout)
    # Undivided, scores grow with head_dim, and the largest can get nearly all weight
    scores = q / math.sqrt(q.size(-1)) @ k.transpose(-2, -1) + mask  # (B, n_head, T, S)
    weights = F.softmax(scores, dim=-1)  # each row sums to 1; e^-inf is a weight of 0
    weights = dropped(weights.to(v.dtype), dropout)
    return weights @ v  # (B, n_head, T, head_dim)


class CausalSelfAttention(nn.Module):
    """The one place where tokens exchange information. Each asks with a query (q), offers a key
    (k) and hands over a value (v), in n_head parallel slices of the C numbers, the heads."""

    def __init__(self, config):
        super().__init__()
        self.n_head = config.n_head
        self.dropout = config.dropout
        self.flash = config.attention == "flash"
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)  # q, k, v at once
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)
        self.resid_dropout = Dropout(config.dropout)

    def forward(self, x, cache=None):
        B, T, C = x.shape
        q, k, v = self.c_attn(x).split(C, dim=2)  # (B, T, C) each
        # Split C into heads: (B, T, C) -> (B, n_head, T, head_dim)
        q, k, v = (t.view(B, T, self.n_head, -1).transpose(1, 2) for t in (q, k, v))
        if cache is not None:  # prepend the keys and values of earlier tokens
            k, v = cache.extend(self, k, v)  # (B, n_head, S, head_dim)
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
        # ReLU: max(0, x). GELU is smoother, computed with tanh (Hendrycks & Gimpel 2016, section 2)
        self.act = nn.ReLU() if config.activation == "relu" else nn.GELU(approximate="tanh")
        self.dropout = Dropout(config.dropout)

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


class GPT(nn.Module):
    """GPT-2: token ids in, a prediction of the next token out.

    `model(idx, targets)` takes (B, T) int64 ids and returns (logits, loss). The logits, (B, T,
    V), are scores whose softmax gives the probability of each next token. The loss is the mean
    cross-entropy, -ln p(target), in nats per token; targets of -1 are padding and do not count.
    Without targets it is None. With a KVCache, idx is the new tokens only; without targets the
    logits are then those of the last token, (B, 1, V). Raises UserError for an impossible config,
    ValueError for too many tokens."""

    def __init__(self, config, init_std=0.02):
        super().__init__()
        check_shape(config)
        self.config = config
        self.tokenizer = None  # a loaded model has one, so that it can write
        self.starts_documents = False  # did each training row begin a document?
        self.transformer = nn.ModuleDict(dict(  # OpenAI's names, to fit their weights
            wte=nn.Embedding(config.vocab_size, config.n_embd),  # what a token is
            wpe=nn.Embedding(config.block_size, config.n_embd),  # where it stands
            drop=Dropout(config.dropout),
            h=nn.ModuleList([Block(config) for _ in range(config.n_layer)]),
            ln_f=nn.LayerNorm(config.n_embd),  # GPT-2 paper, section 2.3
        ))
        # Matrices start as N(0, init_std), biases as 0 (GPT paper, section 4.1). Each block's two
        # c_proj add to the residual stream. They start divided by the root of 2 * n_layer, the
        # number of additions: a deeper model's stream starts no larger (GPT-2 paper, 2.3).
        residual_std = init_std / math.sqrt(2 * config.n_layer)
        for name, p in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(p)
            elif p.dim() == 2:
                is_residual = name.endswith("c_proj.weight")
                nn.init.normal_(p, std=residual_std if is_residual else init_std)
        if config.pos_encoding == "sinusoidal":
            table = sinusoids(config.block_size, config.n_embd, init_std)
            self.transformer.wpe.weight = nn.Parameter(table, requires_grad=False)

    def forward(self, idx, targets=None, cache=None):
        start = cache.length if cache is not None else 0
        T, block_size = idx.size(1), self.config.block_size
        if start + T > block_size:
            raise ValueError(f"{start + T} tokens do not fit into block_size {block_size}")
        position = torch.arange(start, start + T, device=idx.device)  # (T,)
        x = self.transformer.wte(idx) + self.transformer.wpe(position)  # (B, T, C)
        x = self.transformer.drop(x)
        for block in self.transformer.h:
            x = block(x, cache)
        if cache is not None:
            cache.length += T
            if targets is None:
                x = x[:, -1:]  # (B, 1, C): generating needs the last prediction only
        x = self.transformer.ln_f(x)
        # Weight tying (Press & Wolf 2017): the token embedding is the output matrix too, which
        # saves 39M parameters in GPT-2
        logits = unembed(x, self.transformer.wte.weight)  # (B, T, V)
        if targets is None:
            return logits, None
        # In float32: a mean over many tokens needs more than bfloat16's 2 to 3 digits
        loss = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=-1)
        return logits, loss

    def generate(self, prompt, max_new_tokens=100, temperature=1.0, top_k=None, top_p=None,
                 seed=None):
        """Continue a text, or a (B, T) tensor of ids, by the options of sample_token. Text comes
        back with its prompt and ends before <|endoftext|>; a tensor as (B, T + max_new_tokens).
        Raises UserError for a prompt that the vocabulary cannot encode."""
        options = (max_new_tokens, temperature, top_k, top_p, seed)
        if isinstance(prompt, torch.Tensor):
            new = [token[:, None] for token, _ in stream_tokens(self, prompt, *options)]
            return torch.cat((prompt, *new), dim=1)
        idx = torch.tensor([encode_prompt(self, prompt)], device=self.device)
        new = (token.item() for token, _ in stream_tokens(self, idx, *options))
        new = itertools.takewhile(lambda token: token != self.tokenizer.eot, new)
        return prompt + self.tokenizer.decode(list(new))

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
        self.max_length = max_length  # room in tokens
        self.length = 0  # tokens in it
        self.store = {}  # layer -> (k, v), each (B, n_head, max_length, head_dim)

    def extend(self, layer, k, v):
        """Add k and v of T new tokens, (B, n_head, T, head_dim); return those of all S tokens."""
        if layer not in self.store:
            shape = (*k.shape[:2], self.max_length, k.size(3))
            self.store[layer] = k.new_empty(shape), v.new_empty(shape)
        end = self.length + k.size(2)
        for room, new in zip(self.store[layer], (k, v), strict=True):
            room[:, :, self.length:end] = new
        return [room[:, :, :end] for room in self.store[layer]]


def stream_tokens(model, idx, max_new_tokens, temperature=1.0, top_k=None, top_p=None, seed=None):
    """Yield (token, logits) max_new_tokens times: the next token of each row of idx, (B,) int64,
    and the scores that it was drawn from, (B, V) float32. idx is (B, T) int64, of which the last
    block_size are read. When the context is full, the older half is forgotten and the newer half
    read again from position 0."""
    block_size = model.config.block_size
    generator = torch.Generator(idx.device)
    generator.manual_seed(seed) if seed is not None else generator.seed()
    idx = unread = idx[:, -block_size:]
    cache = KVCache(min(block_size, idx.size(1) + max_new_tokens))
    for _ in range(max_new_tokens):
        if cache.length + unread.size(1) > block_size:
            unread, cache.length = idx[:, -max(1, block_size // 2):], 0
        with evaluating(model):  # no dropout, no gradients
            logits, _ = model(unread, cache=cache)  # (B, 1, V)
        logits = logits[:, -1].float()  # (B, V)
        unread = sample_token(logits, temperature, top_k, top_p, generator)
        idx = torch.cat((idx, unread), dim=1)[:, -block_size:]
        yield unread[:, 0], logits


def sample_token(logits, temperature=1.0, top_k=None, top_p=None, generator=None):
    """Draw a token for each row: (B, V) logits -> (B, 1) ids. A temperature below 1 favours likely
    tokens; 0 is greedy, always the likeliest. top_k keeps the k likeliest (Fan et al. 2018), top_p
    the fewest of the likeliest whose probabilities sum to p or more (Holtzman et al. 2020)."""
    if temperature < 1e-6:  # nearly 0 would overflow in the division
        return logits.argmax(dim=-1, keepdim=True)
    k = min(top_k or logits.size(-1), logits.size(-1))
    logits, ids = logits.topk(k) if top_k or top_p else (logits, None)  # sorted, (B, k)
    probs = F.softmax(logits / temperature, dim=-1)
    if top_p:
        before = probs.cumsum(dim=-1) - probs  # sum over the likelier tokens
        probs = probs.masked_fill(before >= top_p, 0)
    # The first token whose cumulative probability reaches a random number
    cumulative = probs.cumsum(dim=-1)  # (B, k)
    u = 1 - torch.rand(len(probs), 1, generator=generator, device=probs.device)
    choice = torch.searchsorted(cumulative, u * cumulative[:, -1:])  # (B, 1)
    return choice if ids is None else ids.gather(-1, choice)


# ---- Batches from shards ----


class ShardedLoader:
    """Rows of tokens from a folder of shards, which stay on disk as memory maps. Row number g is
    a pure function of (seed, g, rows, the shards, block_size): a run can resume anywhere, on any
    number of processes. An epoch, one pass over all rows, has an order of its own (RowIndex, Part
    2). rows="stream" cuts the tokens every block_size, "documents" gives each document a row.
    seed=None keeps the order of the text. Raises UserError for a folder without enough tokens."""

    def __init__(self, data_dir, split, block_size, rows="stream", seed=None,
                 vocab_size=50257, eot=50256):
        self.block_size, self.vocab_size = block_size, vocab_size
        self.paths = shard_paths(data_dir)[split]
        self.shards = [read_shard(path) for path in self.paths]  # (n,) uint16 each
        if rows == "documents" and eot is None:
            raise UserError(f"{data_dir} is one text without documents: use --rows=stream")
        self.rows = RowIndex(self.shards, block_size, seed, eot if rows == "documents" else None)
        self.rows_per_epoch = self.rows.per_epoch
        if not self.rows_per_epoch:
            raise UserError(f"{data_dir} has too few {split} tokens: lower --block_size")

    def batch(self, rows):
        """Row numbers -> inputs x and targets y, the tokens after them, both (B, T) int64. T is
        the longest row's length, rounded up to a multiple of 16; past a row's end y is -1."""
        places = [self.rows.locate(row) for row in rows]  # (shard, start, length)
        longest = max(length for _, _, length in places)
        T = min(self.block_size, -(-longest // 16) * 16)  # few different shapes
        x = np.zeros((len(rows), T), np.int64)
        y = np.full((len(rows), T), -1, np.int64)
        for i, (shard, start, length) in enumerate(places):
            tokens = self.shards[shard][start:start + length + 1]
            if tokens.max() >= self.vocab_size:
                raise UserError(f"{self.paths[shard]} holds token {tokens.max()}, beyond the "
                                f"vocabulary of {self.vocab_size}: prepare the data again")
            x[i, :length], y[i, :length] = tokens[:-1], tokens[1:]
        return torch.from_numpy(x), torch.from_numpy(y)


# ---- Optimizer and schedule ----


def make_optimizer(model, s, device):
    """AdamW (Loshchilov & Hutter 2019). Adam divides the running mean of a weight's gradients by
    the root of their mean square: a step is at most about the learning rate. The W is weight decay:
    each step multiplies matrices, not biases and norms, by 1 - learning_rate * weight_decay."""
    learned = [p for p in model.parameters() if p.requires_grad]
    groups = [{"params": [p for p in learned if p.dim() >= 2], "weight_decay": s.weight_decay},
              {"params": [p for p in learned if p.dim() < 2], "weight_decay": 0.0}]
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


def train(s, world):
    """Train, and return the exit status. s holds the settings, world the device and processes.
    Row n of the log describes the weights after n steps."""
    data = open_data(s.data_dir)
    loader, validation = (
        open_rows(s, data, split, seed) for split, seed in (("train", s.seed), ("val", None)))
    plan = plan_batch(s, world)  # rows per step, rows per micro-batch
    run = Run(s, data, world)  # its folder: a new one, or one to resume in
    torch.manual_seed(s.seed)
    raw_model = build_model(s, data, world)
    optimizer = make_optimizer(raw_model, s, world.device)
    # Gradients below 3e-8 are 0 in float16: the scaler multiplies the loss by a large number, and
    # divides the gradients by it before the step (Micikevicius et al. 2018)
    scaler = torch.amp.GradScaler(world.device.type, enabled=world.dtype == torch.float16)
    start = run.resume(raw_model, optimizer, scaler)  # 0 for a new run
    # The same weights, compiled or copied to each process; raw_model is evaluated and saved
    model = compiled_and_parallel(raw_model.train(), s, world)
    announce(run, plan, loader)

    stop = StopRequest(s, world)  # Ctrl-C, SIGTERM or max_minutes
    with stop.listening():
        for step in range(start, s.max_steps + 1):
            last = step == s.max_steps  # the final weights are measured too
            if last or step % s.eval_every == 0:
                run.evaluate(step, validation)
            if last or (step and step % s.sample_every == 0):
                run.show_sample(step)
            if last or (step > start and step % s.checkpoint_every == 0):
                run.save(step)
            if last:
                return run.finished()

            lr = get_lr(step, s)
            for group in optimizer.param_groups:
                group["lr"] = lr
            micro_batches, targets_in_step = step_batches(loader, step, plan, world)
            loss_sum = torch.zeros((), device=world.device)
            # Gradient accumulation: the gradients of micro-batches add up to those of the batch
            for micro_step, (x, y) in enumerate(micro_batches):  # x, y: (B, T)
                # Dropout depends only on the place in the run: a resumed run repeats it
                torch.manual_seed(mix(s.seed, step, micro_step, world.rank))
                more = micro_step < len(micro_batches) - 1
                with world.accumulating(model, more):
                    # Mixed precision: fast products in world.dtype, weights in float32, where
                    # small updates are not rounded away
                    with world.autocast():
                        _, loss = model(x, y)
                    # Weight it by its share of the step's tokens
                    loss = loss * ((y != -1).sum() / targets_in_step)
                    # Several processes average their gradients; times world.size that is a sum
                    scaler.scale(loss * world.size).backward()
                loss_sum += loss.detach()
            scaler.unscale_(optimizer)
            # Clipping bounds the rare huge gradient, and keeps its direction
            grad_norm = nn.utils.clip_grad_norm_(raw_model.parameters(), s.grad_clip or math.inf)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            run.log_step(step, targets_in_step, loss_sum, lr, grad_norm)
            if stop.requested(step) and step + 1 < s.max_steps:
                return run.stopped(step + 1, stop.signal)


# ======== PART 2: THE MACHINERY (skip this on a first reading) ========

# ---- A run and its folder ----

LOG_COLUMNS = """step tokens train_loss val_loss val_bits_per_byte lr grad_norm tokens_per_second
    seconds above_floor above_floor_wording above_floor_choices above_floor_recall hellaswag_acc
    hellaswag_acc_norm""".split()
SKILLS = ("wording", "choices", "recall")  # what it takes to predict a token of the stories
# Settings that do not shape the weights: a run may resume with other values
FREE_SETTINGS = """preset out_dir overwrite device batch_size grad_accum_steps max_minutes
    compile_model deterministic eval_only eval_every eval_tokens sample_every checkpoint_every
    log_every""".split()
TIME_IS_UP = 1  # the "signal" of max_minutes


class Run:
    """A run's folder, log, checkpoints and clock, and what it prints."""

    def __init__(self, s, data, world):
        self.s, self.data, self.world = s, data, world
        self.began = time.perf_counter()
        self.best, self.bar = math.inf, None
        self.row = {}  # measured since the last row of the log
        self.mark = None  # (time, tokens) from where throughput is measured
        chosen = world.from_master(lambda: choose_folder(s, world))
        self.folder, self.saved, earlier, self.why_new = chosen
        self.tokens = earlier.get("tokens", 0)  # trained on
        world.compute_as(s, earlier)

    def resume(self, model, optimizer, scaler):
        """Load the checkpoint, if there is one; return the step to start from."""
        self.model, self.optimizer, self.scaler, self.start = model, optimizer, scaler, 0
        if self.saved:
            self.start, self.best = load_training_state(
                self.saved, model, optimizer, scaler, self.data.tokenizer)
        if self.world.is_master:
            clear_leftovers(self.folder, self.start)
        return self.start

    @contextmanager
    def clock_stopped(self):
        wait_for(self.world.device)  # for the steps under way
        began = time.perf_counter()
        yield
        if self.mark:
            self.mark = (self.mark[0] + time.perf_counter() - began, self.mark[1])

    def evaluate(self, step, loader):
        with self.clock_stopped():
            found = evaluate(self.model, loader, self.s, self.world, self.data)
            self.say(f"step {step:,}: val {in_words(found)}")
            if found["val_loss"] < self.best:
                self.best = found["val_loss"]
                self.write("best.pt", step)
            self.note(step, found)

    def show_sample(self, step):
        with self.clock_stopped():
            scores = hellaswag_scores(self.model, self.world)
            if scores:
                self.say(f"step {step:,}: {in_words(scores)}")
            if self.world.is_master:
                seed = mix(self.s.seed, step)
                text = self.model.generate("", 200, temperature=0.8, seed=seed).strip()
                self.say(f"step {step:,} writes: {text}")
                quoted = "\n".join(f"> {line}" for line in text.splitlines())
                append(self.folder / "samples.md", f"## Step {step}\n\n{quoted}\n\n")
            self.note(step, scores)

    def note(self, step, found):
        """Keep what was measured for the next row of the log; draw the report anew."""
        self.row |= {"step": step, "tokens": self.tokens} | found
        if self.world.is_master:
            write_report(self, [*read_log(self.folder), self.row])

    def write(self, name, step, **more):
        threads = torch.get_num_threads() * self.world.size
        settings = asdict(self.s) | {"threads": threads, "tokens": self.tokens}
        content = make_checkpoint(self.model, step, settings, self.best) | more
        if self.world.is_master:
            write_atomically(self.folder / name, lambda file: torch.save(content, file))

    def save(self, step):
        """Write ckpt.pt, from which a run resumes; at the last step it marks the end."""
        with self.clock_stopped():
            self.check_finite()
            if step == self.s.max_steps:
                self.write_row()
            optimizer = self.optimizer.state_dict() | {"scaler": self.scaler.state_dict()}
            self.write("ckpt.pt", step, optimizer=optimizer)

    def log_step(self, step, targets, loss_sum, lr, grad_norm):
        """Count a step; every log_every steps, log it. Only then does the CPU wait for a GPU."""
        self.tokens += targets
        self.latest = (step, loss_sum, lr, grad_norm)
        if self.bar:
            self.bar.update()
        if not (step % self.s.log_every == 0 or step == self.s.max_steps - 1 or self.row):
            return
        loss, norm = self.check_finite()
        row = dict(step=step, tokens=self.tokens - targets, train_loss=loss, lr=lr, grad_norm=norm)
        text, now = f"train {loss:.4f} | lr {lr:.2e} | grad norm {norm:.2f}", time.perf_counter()
        if self.mark:
            speed = (self.tokens - self.mark[1]) / (now - self.mark[0])
            row["tokens_per_second"] = round(speed)
            mfu = 100 * speed * self.flops_per_token / self.peak
            minutes = (self.s.max_steps - step) * targets / speed / 60
            text += f" | {speed:,.0f} tokens/s, MFU {mfu:.0f} %, {minutes:.1f} min left"
        self.mark = (now, self.tokens)
        self.write_row(**row)
        if self.bar:
            self.bar.set_postfix_str(text)
        elif step % self.s.log_every == 0:
            self.say(f"step {step:,}/{self.s.max_steps:,} | {text}")

    def check_finite(self):
        """(loss, gradient norm) of the latest step. Infinite ones end the run."""
        step, loss_sum, lr, grad_norm = self.latest
        loss, norm = self.world.reduce(loss_sum.clone()).item(), grad_norm.item()
        # float16's scaler expects infinite gradients now and then, and skips those steps
        if not math.isfinite(loss) or not (math.isfinite(norm) or self.scaler.is_enabled()):
            raise UserError(f"step {step:,} has loss {loss:.4g}, gradient norm {norm:.4g}: lower "
                            f"--learning_rate from {lr:.2g}; the last checkpoint is intact")
        return loss, norm

    def write_row(self, **values):
        row = self.row | values | {"seconds": round(time.perf_counter() - self.began, 2)}
        self.row = {}
        if self.world.is_master:
            append(self.folder / "log.csv", log_line(row))

    def say(self, text):
        if self.world.is_master:
            tqdm.write(text) if self.bar else print(text, flush=True)

    def stopped(self, step, number):
        self.save(step)
        again = "the same command" + " without --overwrite" * self.s.overwrite
        self.say(f"stopped at step {step:,}, saved in {self.folder}: {again} resumes it")
        return 0 if number == TIME_IS_UP else 128 + number  # as in a shell

    def finished(self):
        minutes = (time.perf_counter() - self.began) / 60
        self.say(f"done in {minutes:.1f} min, lowest validation loss {self.best:.4f}; see "
                 f"{self.folder / 'report.md'}\nnow: python sample.py --checkpoint="
                 f"{self.folder / 'best.pt'}")
        return 0


def announce(run, plan, loader):
    """Print the plan; measure the speed that throughput is compared with (MFU)."""
    s, world, model, (rows, at_once) = run.s, run.world, run.model, plan
    run.flops_per_token, run.peak = flops_per_token(model, s.block_size), math.inf
    if not world.is_master:
        return
    speed, N, V = matmul_speed(world), model.num_parameters(), model.config.vocab_size
    run.peak, epochs = speed * world.size, s.max_steps * rows / loader.rows_per_epoch
    tokens = epochs * sum(len(shard) - 1 for shard in loader.shards)
    device = torch.cuda.get_device_name() if world.device.type == "cuda" else world.device
    run.plan = (
        f"model: {N:,} parameters; guessing blindly has a loss (-ln p, in nats) of ln {V:,} = "
        f"{math.log(V):.2f}\nmachine: {world.size} x {device}, {s.dtype} at {speed / 1e9:,.0f} "
        "GFLOP/s (MFU: share in use)\n"
        f"plan: {s.max_steps:,} steps of {rows} rows, {at_once} at once; {tokens:,.0f} tokens, "
        f"{epochs:.1f} epochs of {s.data_dir}, {tokens / N:.1f} tokens per parameter")
    if s.rows == "documents" and (floor := run.data.meta.get("entropy_floor")):
        run.plan += (f"\nfloor: {floor:.4f} nats, the lowest loss to expect. The nats above it are "
                     "of wording (fixed), choices (random), recall (of earlier choices)")
    print(run.plan)
    print(f"continuing {run.folder} from step {run.start:,} ({start_over(run.folder)})"
          if run.start else f"a new run in {run.folder}{run.why_new}")
    if sys.stderr.isatty():
        run.bar = tqdm(total=s.max_steps, initial=run.start, unit="step", dynamic_ncols=True)


def difference(checkpoint, s):
    """Why a checkpoint is not of an unfinished run of these settings."""
    theirs = asdict(Settings()) | checkpoint["settings"]
    theirs["code"] = checkpoint.get("code", model_code())
    for name, value in (asdict(s) | {"code": model_code()}).items():
        same = repr(theirs[name]) == repr(value) or (name, value) == ("dtype", "auto")
        if not same and name not in FREE_SETTINGS:
            return f"a run with {name}={theirs[name]}"
    return "a finished run" if checkpoint["step"] == s.max_steps else ""


def choose_folder(s, world):
    """Lock the folder of the unfinished run of these settings, or the next free one: (folder,
    checkpoint to resume from, its settings, why a new run starts)."""
    base, why_new = Path(s.out_dir or f"out/{s.preset}"), ""
    if s.overwrite and s.init_from and Path(s.init_from).resolve().parent == base.resolve():
        raise UserError(f"--overwrite=True would delete {s.init_from}: choose another --out_dir")
    for number in itertools.count(1):
        folder = base if number == 1 else base.parent / f"{base.name or 'run'}-{number}"
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            names = {path.name for path in folder.iterdir()}
            is_free = s.overwrite or not names or names & {".lock", "ckpt.pt", "best.pt"}
            lock = lock_folder(folder) if is_free else None
        # Killed before its first checkpoint, a run has best.pt, which tells whose it is
        saved = [name for name in ("ckpt.pt", "best.pt") if name in names and not s.overwrite]
        why = "" if is_free else "other files"
        if saved:
            found = load_checkpoint(folder / saved[0], start_over(folder), edited=True)
            why = difference(found, s)
        if not why and lock is None:
            raise UserError(f"another run uses {folder}: stop it, or change --out_dir")
        if not why:
            world.at_end.callback(lock.release)
            if "ckpt.pt" in saved:
                return folder, folder / "ckpt.pt", found["settings"], ""
            return folder, None, {}, why_new
        why_new = why_new or f" ({folder} holds {why})"


def start_over(folder):
    return f"to start over: --out_dir={folder} --overwrite=True"


def lock_folder(folder):
    """A lock until this process ends; None if the folder is taken."""
    try:
        return filelock.FileLock(folder / ".lock").acquire(timeout=0).lock
    except filelock.Timeout:
        return None


def clear_leftovers(folder, start):
    """Remove what a killed run left: partial files, rows and samples from `start` on."""
    with writing(folder):
        stale = [] if start else [folder / "ckpt.pt", folder / "best.pt"]
        for path in [*folder.glob(".*.tmp"), *stale]:
            path.unlink(missing_ok=True)
    rows = [row for row in read_log(folder) if int(row["step"]) < start]
    header = ",".join(LOG_COLUMNS) + "\n"
    write_text(folder / "log.csv", header + "".join(map(log_line, rows)))
    samples = [block for block in read_samples(folder) if int(block.split()[2]) < start]
    write_text(folder / "samples.md", "".join(samples))


def log_line(row):
    return ",".join(str(row.get(name, "")) for name in LOG_COLUMNS) + "\n"


def read_log(folder):
    """The rows of log.csv, {column: text}, without an unfinished one."""
    try:
        with open(folder / "log.csv", encoding="utf-8", errors="replace", newline="") as file:
            rows = list(csv.DictReader(file))
    except (OSError, csv.Error):
        return []
    return [row for row in rows if None not in row.values() and row.get("step", "").isdigit()]


def read_samples(folder):
    path = folder / "samples.md"
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    return re.findall(r"^## Step \d.*?(?=^## Step |\Z)", text, re.M | re.S)


class StopRequest:
    """Ctrl-C, SIGTERM or max_minutes: the run finishes its step, saves and ends."""

    def __init__(self, s, world):
        self.s, self.world, self.began = s, world, time.perf_counter()
        self.signal, self.received = 0, math.inf

    @contextmanager
    def listening(self):
        before = {n: signal.signal(n, self.handle) for n in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, previous in before.items():
                signal.signal(number, previous)

    def handle(self, number, frame=None):
        # A second signal leaves at once, but not within 0.5 s: torchrun sends the first twice
        if self.signal and time.perf_counter() - self.received > 0.5:
            os._exit(128 + number)
        self.received, self.signal = time.perf_counter(), number

    def requested(self, step):
        """Is it time to stop? Several processes agree on it in logged steps."""
        minutes = (time.perf_counter() - self.began) / 60
        if minutes >= (self.s.max_minutes or math.inf):
            self.signal = self.signal or TIME_IS_UP
        if self.world.size > 1:
            if step % self.s.log_every:
                return False
            self.signal = int(self.world.reduce(torch.tensor(self.signal), largest=True))
            self.received = time.perf_counter()  # a late signal is still the same one
        return self.signal > 0


# ---- Report and picture ----


def write_report(run, rows):
    """Draw loss.svg and write report.md, from the log's rows and samples.md."""
    rows = [{name: float(value) for name, value in row.items() if value != ""} for row in rows]

    def curves(**columns):
        found = {name: [(row["tokens"], row[column]) for row in rows if column in row]
                 for name, column in columns.items()}
        return {name: curve for name, curve in found.items() if curve}
    lines = dict(run.data.meta.get("landmarks", {}))
    panels = [("nats per token:", curves(training="train_loss", validation="val_loss"), lines)]
    if "above_floor" in rows[-1]:
        lines["floor"] = rows[-1]["val_loss"] - rows[-1]["above_floor"]
        skills = curves(**{skill: f"above_floor_{skill}" for skill in SKILLS})
        panels.append(("nats per token above the floor, by skill:", skills, {}))
    body = "\n".join(draw(30 + 310 * i, *panel) for i, panel in enumerate(panels))
    write_text(run.folder / "loss.svg", '<svg xmlns="http://www.w3.org/2000/svg" fill="#888" '
               f'font-family="sans-serif" font-size="13" viewBox="0 0 720 620">{body}</svg>\n')
    table = "".join(f"| {row['step']:,.0f} | {in_words(row)} |\n" for row in rows if in_words(row))
    write_text(run.folder / "report.md", f"# {run.folder.name}\n\n![loss](loss.svg)\n\n```\n"
               f"{run.plan}\n```\n\n| step | measured |\n| --- | --- |\n{table}\n"
               + "".join(read_samples(run.folder)))


def draw(top, title, curves, lines):
    """A panel of an SVG, on a logarithmic scale: {curve: [(tokens, value)]}, {line: value}."""
    points = [point for curve in curves.values() for point in curve]
    span = max(t for t, _ in points) or 1
    logs = [math.log(max(v, 1e-3)) for v in (*(v for _, v in points), *lines.values())]
    low, high = min(logs), max(logs) + 0.1

    def place(t, v):
        y = top + 250 * (high - math.log(max(v, 1e-3))) / (high - low)
        return f"{10 + 560 * t / span:.0f}", f"{y:.1f}"

    body, legend = [], ""
    flat = {name: [(0, value), (span, value)] for name, value in lines.items()}
    colours = ["#e8710a", "#2f80ed", "#16a07a"][:len(curves)] + ["#888"] * len(lines)
    for colour, (name, curve) in zip(colours, (curves | flat).items(), strict=True):
        some = curve[::len(curve) // 600 + 1] + curve[-1:]
        path = " ".join(",".join(place(t, v)) for t, v in some)
        x, y = place(*curve[-1])
        body.append(f'<polyline fill="none" stroke="{colour}" points="{path}"/>')
        label = f'fill="{colour}">{name} {curve[-1][1]:.4f}</'
        if name in curves:
            legend += f' <tspan {label}tspan>'
        else:
            body.append(f'<text x="{x}" y="{y}" {label}text>')
    body.append(f'<text x="10" y="{top - 12}">{title}{legend}, {span:,.0f} tokens</text>')
    return "\n".join(body)


# ---- The batches of a step, the rows of an epoch ----


def plan_batch(s, world):
    """(rows in a step, of all processes; rows that one process handles at once)."""
    rows, rest = divmod(s.total_batch_size, s.block_size)
    if rest or not rows or rows % world.size or (rows > s.batch_size and rows % s.batch_size):
        raise UserError(f"total_batch_size ({s.total_batch_size:,}) must be a multiple of "
                        f"block_size * processes ({s.block_size * world.size:,}) and, if larger, "
                        f"of batch_size * block_size ({s.batch_size * s.block_size:,})")
    share = rows // world.size
    return rows, next(n for n in range(min(s.batch_size, share), 0, -1) if share % n == 0)


def step_batches(loader, step, plan, world):
    """This process's part of a step, [(x, y), ...], and the targets in the whole step."""
    rows, micro_batch_size = plan
    every_row, share = range(step * rows, (step + 1) * rows), rows // world.size
    targets = sum(loader.rows.locate(row)[2] for row in every_row)
    mine, batches = every_row[world.rank * share:(world.rank + 1) * share], []
    for i in range(0, share, micro_batch_size):
        x, y = loader.batch(mine[i:i + micro_batch_size])
        if world.device.type == "cuda":  # pinned memory: the copy runs beside the computation
            x, y = x.pin_memory(), y.pin_memory()
        batches.append([t.to(world.device, non_blocking=True) for t in (x, y)])
    return batches, targets


class RowIndex:
    """Which tokens are row number g? With `eot`, a row is a document. An epoch shuffles the shards,
    and the rows within each: memory holds two shards' order."""

    def __init__(self, shards, block_size, seed, eot):
        self.shards, self.block_size, self.seed, self.eot = shards, block_size, seed, eot
        self.has_long_documents = False  # longer than a row
        self.cuts = functools.lru_cache(maxsize=2)(self._cuts)
        self.order = functools.lru_cache(maxsize=2)(self._order)
        self.counts = [self._count(shard) for shard in range(len(shards))]  # rows of each
        self.per_epoch = sum(self.counts)

    def locate(self, row):
        """Row number -> (shard, first token, number of targets)."""
        epoch, row = divmod(row, self.per_epoch)
        for shard in self.order(epoch):
            if row < self.counts[shard]:
                starts, lengths = self.cuts(epoch, shard)
                return shard, int(starts[row]), int(lengths[row])
            row -= self.counts[shard]

    def _rng(self, *key):
        return np.random.default_rng([self.seed, *key])

    def _order(self, epoch):
        n = len(self.shards)
        return range(n) if self.seed is None else self._rng(epoch).permutation(n).tolist()

    def _count(self, shard):
        if self.eot is not None or self.seed is None:
            return len(self.cuts(0, shard)[0])
        fit = (len(self.shards[shard]) - 1) // self.block_size
        return fit - 1 if fit > 1 else fit  # one row's length is left to shift the cuts

    def _cuts(self, epoch, shard):
        """(starts, numbers of targets) of a shard's rows, in the order of the epoch."""
        n, T = len(self.shards[shard]), self.block_size
        if self.eot is not None:
            starts, lengths = self._documents(self.shards[shard])
        elif self.seed is None:
            starts = np.arange(0, n - 1, T)
            lengths = np.minimum(T, n - 1 - starts)
        else:
            count = self._count(shard)
            shift = self._rng(epoch, shard, 0).integers(0, min(T, n - count * T))
            starts, lengths = shift + T * np.arange(count), np.full(count, T)
        if self.seed is not None:
            order = self._rng(epoch, shard, 1).permutation(len(starts))
            starts, lengths = starts[order], lengths[order]
        return starts, lengths

    def _documents(self, tokens):
        """Rows between <|endoftext|>; a document of 25 targets makes 10, 10 and 5 for T = 10."""
        T, eots = self.block_size, np.flatnonzero(tokens == self.eot)
        marks = np.unique(np.concatenate(([0], eots, [len(tokens) - 1])))
        pieces = -(-np.diff(marks) // T)  # rows that each document takes, rounded up
        self.has_long_documents |= bool((pieces > 1).any())
        index = np.arange(pieces.sum()) - np.repeat(np.cumsum(pieces) - pieces, pieces)
        starts = np.repeat(marks[:-1], pieces) + T * index
        return starts, np.minimum(T, np.repeat(marks[1:], pieces) - starts)


# ---- Tokenizer ----

END_OF_TEXT = "<|endoftext|>"
# How GPT-2 cuts text into words, within which bytes are merged (GPT-2 paper, section 2.2)
SPLIT_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


class Tokenizer:
    """Text <-> token ids. `spec` is what meta.json and checkpoints keep of it:

    {"kind": "gpt2"}, OpenAI's 50,257 tokens; {"kind": "bpe", "ranks": [...]}, a byte-level BPE,
    its tokens in order, a character per byte; {"kind": "sentencepiece"}, "ranks" and the "model";
    {"kind": "char", "alphabet": "..."}, the characters of one corpus. `eot` is the id of
    <|endoftext|>, None for char. Raises UserError for another spec or a missing vocabulary."""

    def __init__(self, spec):
        self.spec, self.eot, kind = spec, None, None
        try:
            kind = spec["kind"]
            if kind == "char":
                self.ids = {character: i for i, character in enumerate(spec["alphabet"])}
                self.tokens = [character.encode() for character in spec["alphabet"]]
            elif kind == "gpt2":
                self.encoding = tiktoken.get_encoding("gpt2")
                self.tokens = [self.encoding.decode_single_token_bytes(i) for i in range(50256)]
            else:
                self.tokens = [token.encode("latin-1") for token in spec["ranks"]]
            if kind == "bpe":
                self.encoding = tiktoken.Encoding(
                    "bpe", pat_str=SPLIT_PATTERN, special_tokens={END_OF_TEXT: len(self.tokens)},
                    mergeable_ranks={token: i for i, token in enumerate(self.tokens)})
            single = sum(len(token) == 1 for token in self.tokens)
            if kind != "sentencepiece" and not 0 < len(set(self.tokens)) == len(self.tokens) or \
                    kind == "bpe" and single < 256:
                raise ValueError("tokens must be distinct and write all bytes")
        except Exception as error:
            hint = "; offline, set TIKTOKEN_CACHE_DIR or use --tokenizer=bpe" * (kind == "gpt2")
            raise UserError(f"no tokenizer of {str(spec)[:50]}: {error!r:.150}{hint}") from None
        if kind != "char":
            self.eot = 256 if kind == "sentencepiece" else len(self.tokens)
            self.tokens.insert(self.eot, END_OF_TEXT.encode())
        self.vocab_size = len(self.tokens)

    @property
    def document_start(self):
        """The ids before a document: <|endoftext|>, or a line break in a corpus of characters."""
        return [self.eot] if self.eot is not None else [self.ids.get("\n", 0)]

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
        if self.eot is not None:
            return self.encoding.encode_ordinary(text)  # "<|endoftext|>" in a text is plain text
        if unknown := set(text) - self.ids.keys():
            raise UserError(f"the vocabulary has no {min(unknown)!r}, only {[*self.ids][:200]}")
        return [self.ids[character] for character in text]

    def decode_bytes(self, ids):
        """ids -> bytes, which may end inside a character."""
        return b"".join(self.tokens[i] for i in ids)

    def decode(self, ids):
        """ids -> str, with U+FFFD for bytes that are not UTF-8."""
        return self.decode_bytes(ids).decode(errors="replace")

    def token_bytes(self):
        """(vocab_size,) int64: bytes of text per token; 0 for <|endoftext|>."""
        return np.array([len(token) * (i != self.eot) for i, token in enumerate(self.tokens)])


def encode_prompt(model, text):
    """Ids to start from. An empty prompt begins a document, or all do, as training rows did."""
    if model.tokenizer is None:
        raise UserError("this model has no tokenizer: give it token ids")
    ids = model.tokenizer.encode(text)
    return ids if ids and not model.starts_documents else model.tokenizer.document_start + ids


# ---- Shards and meta.json ----


def read_shard(path):
    """A shard's tokens as a memory map, (n,) uint16. Raises UserError for a damaged one."""
    # llm.c's format: 256 int32 (magic 20240520, version 1, token count), then uint16 tokens
    try:
        size, header = os.path.getsize(path), np.fromfile(path, "<i4", count=256)
        magic, version, count = header[:3].tolist()
        if (magic, version) == (20240520, 1) and size == 1024 + 2 * count > 1024:
            return np.memmap(path, "<u2", mode="r", offset=1024, shape=(count,))
    except (OSError, ValueError):
        pass
    raise UserError(f"{path} is incomplete or unreadable: prepare it again")


def shard_paths(data_dir):
    """{"train": [...], "val": [...]}: the last of both words in a .bin file's name decides."""
    paths = {"train": [], "val": []}
    for path in sorted(Path(data_dir).glob("*.bin")) if os.path.isdir(data_dir) else ():
        if words := re.findall("train|val", path.name):
            paths[words[-1]].append(path)
    for split, found in paths.items():
        if not found:
            raise UserError(f"no {split} shards in {data_dir}; {how_to_prepare(data_dir)}")
    return paths


def open_rows(s, data, split, seed):
    eot, vocab_size = data.tokenizer.eot, data.tokenizer.vocab_size
    return ShardedLoader(s.data_dir, split, s.block_size, s.rows, seed, vocab_size, eot)


def how_to_prepare(data_dir):
    name = Path(data_dir).name
    if name == "fineweb_edu_bpe":
        name = "fineweb_edu --tokenizer=bpe --vocab_size=9157 --max_tokens=99_000_000"
    elif name not in ("stories", "shakespeare", "tinystories", "fineweb_edu"):
        name = f"FILE.txt --out_dir={data_dir}"
    return f"make them with: python prepare_data.py {name}"


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
        shard_paths(data_dir)
        return Data({}, Tokenizer({"kind": "gpt2"}))
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
        data = Data(meta, Tokenizer(meta["tokenizer"]))
        sum(meta.get("landmarks", {}).values())
        if "skills" in meta:
            data.skills = np.load(path.with_name("skills.npy"))
        return data
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
        reason = error if isinstance(error, OSError) else error.__context__
        if not isinstance(reason, OSError):
            raise
        raise UserError(f"cannot write {path} ({reason.strerror}): make room or choose another "
                        "folder; older files are intact") from None


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
            os.replace(beside, path)
        finally:
            beside.unlink(missing_ok=True)


def write_text(path, text):
    write_atomically(path, lambda file: file.write(text.encode("utf-8")))


def append(path, text):
    with writing(path), open(path, "a", encoding="utf-8", newline="") as file:
        file.write(text)


@functools.cache
def model_code():
    """A hash of the syntax tree from GPTConfig to GPT, without docstrings."""
    body = ast.parse(Path(__file__).read_text(encoding="utf-8")).body
    names = [getattr(node, "name", "") for node in body]
    part = ast.Module(body[names.index("GPTConfig"):names.index("GPT") + 1], [])
    for node in ast.walk(part):
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node):
            node.body = node.body[1:]
    return hashlib.sha256(ast.unparse(part).encode()).hexdigest()[:16]


def make_checkpoint(model, step=0, settings=None, best_val_loss=math.inf):
    """What best.pt holds; ckpt.pt has the optimizer too."""
    return {"model": model.state_dict(), "step": step, "config": asdict(model.config),
            "settings": settings or {}, "best_val_loss": float(best_val_loss),
            "tokenizer": model.tokenizer.spec if model.tokenizer else {}, "code": model_code()}


def converted_path(name):
    """Where prepare_data.py puts the weights of `name`, one of OpenAI's or a folder."""
    name = f"openai-{name}" if name in OPENAI_NAMES else Path(name).resolve().name
    return Path("out") / name / "best.pt"


def load_checkpoint(path, hint="", edited=False):
    """The dict in a checkpoint, its tensors still in the file; else a UserError. Only plain data
    is unpickled, and shapes are checked before memory of their size is taken."""
    if path in OPENAI_NAMES:
        path, hint = converted_path(path), f"make it with: python prepare_data.py {path}"
    if not os.path.isfile(path):
        hint = hint or f"name a run's best.pt, or try: python prepare_data.py {path}"
        raise UserError(f"there is no checkpoint {path}: {hint}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        if edited and found.get("code", model_code()) != model_code():
            return found
        with torch.device("meta"):  # shapes without memory
            model = GPT(GPTConfig(**found["config"]))
        ours, theirs = ({name: (t.shape, t.dtype) for name, t in weights.items()}
                        for weights in (model.state_dict(), found["model"]))
        V, spec = model.config.vocab_size, found["tokenizer"]
        if ours != theirs or (spec and Tokenizer(spec).vocab_size != V):
            raise ValueError("weights, tokenizer and model code do not fit")
        if not all(tensor.isfinite().all() for tensor in found["model"].values()):
            raise ValueError("weights are not finite")
        found["settings"].keys()
        if found["step"] < 0 or math.isnan(found["best_val_loss"]):
            raise ValueError("step or loss")
        return found
    except Exception as error:
        if is_out_of_memory(error):
            raise
        hint = f"{path} is not a valid checkpoint ({error!r:.150}) {hint}"
        raise UserError(hint.strip()) from None


def load_model(path, device="cpu", **changes):
    """The model in a checkpoint, parts of its config changed, ready to generate text."""
    found = load_checkpoint(path)
    model = GPT(GPTConfig(**found["config"] | changes))
    model.load_state_dict(found["model"])
    model.tokenizer = Tokenizer(found["tokenizer"]) if found["tokenizer"] else None
    model.starts_documents = found["settings"].get("rows") == "documents"
    model.is_edited = found.get("code", model_code()) != model_code()
    return model.to(device).eval()


def load_training_state(path, model, optimizer, scaler, tokenizer):
    """Resume from ckpt.pt; return (step, lowest validation loss)."""
    found = load_checkpoint(path, start_over(path.parent))
    try:
        state = copy.deepcopy(found["optimizer"]["state"])
        for i, p in enumerate(p for group in optimizer.param_groups for p in group["params"]):
            if not {t.shape for t in state[i].values()} - {()} == {p.shape}:
                raise ValueError("the optimizer's state has other shapes")
        if found["tokenizer"] != tokenizer.spec:
            raise ValueError("the data has another tokenizer now")
        model.load_state_dict(found["model"])
        optimizer.load_state_dict(optimizer.state_dict() | {"state": state})
        if scaler.is_enabled():
            scaler.load_state_dict(found["optimizer"]["scaler"])
        return found["step"], found["best_val_loss"]
    except Exception as error:
        raise UserError(f"{path} does not fit ({error!r:.99}); {start_over(path.parent)}") from None


# ---- Devices and processes ----


class World:
    """This process among its siblings (torchrun starts one per GPU), its device and precision."""

    def __init__(self, s):
        self.rank = int(os.environ.get("RANK", 0))
        self.size = int(os.environ.get("WORLD_SIZE", 1))
        self.is_master = self.rank == 0  # the process that writes and prints
        self.device = pick_device(s.device, os.environ.get("LOCAL_RANK", "0"))
        self.dtype = pick_dtype(s.dtype, self.device)
        self.at_end = ExitStack()  # closed at the end
        on_cuda = self.device.type == "cuda"
        if on_cuda:
            torch.cuda.set_device(self.device)
            torch.set_float32_matmul_precision("high")  # TF32 for products in float32
        if s.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS asks for it
            torch.use_deterministic_algorithms(True)
        if self.size > 1:
            dist.init_process_group("nccl" if on_cuda else "gloo")
            self.at_end.callback(dist.destroy_process_group)

    def compute_as(self, s, earlier):
        """Settle precision and threads; a run that resumes keeps its own."""
        self.dtype = pick_dtype(earlier.get("dtype", s.dtype), self.device)
        s.dtype = str(self.dtype).removeprefix("torch.")
        if "threads" in earlier:  # of all processes together
            self.at_end.callback(torch.set_num_threads, torch.get_num_threads())
            torch.set_num_threads(max(1, earlier["threads"] // self.size))

    def autocast(self):
        single = self.dtype == torch.float32
        return nullcontext() if single else torch.autocast(self.device.type, self.dtype)

    def accumulating(self, model, more_to_come):
        # DDP averages after the last micro-batch only
        return model.no_sync() if self.size > 1 and more_to_come else nullcontext()

    def reduce(self, tensor, largest=False):
        if self.size > 1:
            tensor = tensor.to(self.device)
            dist.all_reduce(tensor, dist.ReduceOp.MAX if largest else dist.ReduceOp.SUM)
        return tensor

    def from_master(self, compute):
        """What compute() returns on the master, on every process; a UserError reaches all."""
        box = [None, None]
        if self.is_master:
            try:
                box[0] = compute()
            except UserError as error:
                box[1] = str(error)
        if self.size > 1:
            dist.broadcast_object_list(box, src=0)
        if box[1]:
            raise UserError(box[1])
        return box[0]


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
    if name == "auto" and device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        name = "bfloat16" if native else "float16"
    elif name == "auto":
        native = getattr(torch.cpu, "_is_avx512_bf16_supported", bool)()
        name = "bfloat16" if device.type == "cpu" and native else "float32"
    return getattr(torch, name)


def wait_for(device):
    if device.type != "cpu":  # a GPU works on while Python goes ahead
        torch.accelerator.synchronize()


def compiled_and_parallel(model, s, world):
    """The model that takes the training steps."""
    on_cuda = world.device.type == "cuda"
    if s.compile_model is True or on_cuda and not s.deterministic and s.compile_model == "auto":
        try:  # a missing compiler shows only when it is used
            torch.compile(lambda x: x.exp().sum())(torch.zeros(8, device=world.device))
            model = torch.compile(model)
        except Exception as error:
            print(f"warning: torch.compile does not work here ({type(error).__name__}); training "
                  "goes on without it")
    if world.size > 1:
        model = nn.parallel.DistributedDataParallel(
            model, [world.device.index] if on_cuda else None, gradient_as_bucket_view=True)
    return model


def keep_memory():
    """Let glibc keep large blocks: new ones for GPT-2's logits took half of each step."""
    with suppress(OSError, AttributeError):  # not glibc
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-4, 0)  # M_MMAP_MAX
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


def is_out_of_memory(error):
    said = re.search("(out of|allocate|enough) memory", str(error))
    return isinstance(error, MemoryError) or said is not None


def mix(*numbers):
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])


# ---- Building a model ----


def build_model(s, data, world):
    """A new model of the settings' shape, or the one in --init_from, on the device."""
    tokenizer = data.tokenizer
    if s.init_from:
        model = load_model(s.init_from, dropout=s.dropout, attention=s.attention)
        own, V = model.tokenizer or tokenizer, model.config.vocab_size
        if own.spec != tokenizer.spec or V != tokenizer.vocab_size:
            raise UserError(f"{s.init_from} and {s.data_dir} have different tokenizers")
    else:
        names = GPTConfig.__dataclass_fields__.keys() - {"vocab_size"}
        shape = {name: getattr(s, name) for name in names}
        model = GPT(GPTConfig(vocab_size=tokenizer.vocab_size, **shape), s.init_std)
    model.tokenizer, model.starts_documents = tokenizer, s.rows == "documents"
    return model.to(world.device)


def adopt_shape(s, given):
    """With --init_from, the shape is that of its weights; only the rows may be shorter."""
    if s.eval_only and not s.init_from:
        s.init_from = str(Path(s.out_dir or f"out/{s.preset}") / "best.pt")
    if s.init_from:
        config = load_checkpoint(s.init_from)["config"]
        shape = ("n_layer", "n_head", "n_embd", "pos_encoding", "activation")
        if other := [name for name in shape if given.get(name, config[name]) != config[name]]:
            raise UserError(f"{s.init_from} has another {', '.join(other)}: leave that out")
        s.block_size = min(given.get("block_size", math.inf), config["block_size"])


def check_shape(c):
    sizes = [c.vocab_size, c.block_size, c.n_layer, c.n_head, c.n_embd]
    odd = c.pos_encoding == "sinusoidal" and c.n_embd % 2
    if not all(type(size) is int and 0 < size <= 2**24 for size in sizes) or c.n_layer > 1024 \
            or c.n_embd % c.n_head or odd or c.n_embd > 2**16 or not 0 <= c.dropout < 1:
        raise UserError(f"impossible shape {c}: n_embd must be a multiple of n_head (and even with "
                        "sinusoids), at most 65,536, n_layer at most 1,024")


def sinusoids(block_size, n_embd, std):
    """(block_size, n_embd): sines and cosines (Attention paper, section 3.5), scaled to the
    size of the embeddings. At their own size of 1 they would drown embeddings of 0.02."""
    position = torch.arange(block_size, dtype=torch.float32)[:, None]  # (T, 1)
    i = torch.arange(0, n_embd, 2, dtype=torch.float32)  # (C/2,)
    angle = position * 10_000 ** (-i / n_embd)  # (T, C/2)
    table = torch.stack((angle.sin(), angle.cos()), dim=2).flatten(1)  # (T, C)
    return std * math.sqrt(2) * table  # the rms of a sine is 1/sqrt(2)


def dropped(x, p):
    """Zero a share p of x; scale up the rest, so that sums keep their size."""
    if not (p and x.is_cpu):
        return F.dropout(x, p)
    # F.dropout is slow; here 64 random bits serve for four numbers
    bits = torch.empty(x.numel() // 4 + 1, dtype=torch.int64).random_(-2**63, None)
    keep = bits.view(torch.int16)[:x.numel()].view(x.shape) >= int(2**16 * p) - 2**15
    return x * (keep / (1 - p)).to(x.dtype)


class Dropout(nn.Dropout):
    def forward(self, x):
        return dropped(x, self.p) if self.training else x


def unembed(x, weight):
    """(B, T, C) states, (V, C) embedding -> (B, T, V) logits."""
    if not (x.is_cuda and len(weight) % 64):
        return F.linear(x, weight)
    # Tensor cores want multiples of 64 (50,257 -> 50,304): add rows of zeros, then cut them
    return F.linear(x, F.pad(weight, (0, 0, 0, -len(weight) % 64)))[..., :len(weight)]


# ---- Evaluation ----

HELLASWAG = Path("data/hellaswag/hellaswag_val.jsonl")


def token_losses(logits, targets):
    """(B, T, V), (B, T) -> (B, T) float32 on the CPU: nats of each target, 0 for -1."""
    nats = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten().to(logits.device),
                           ignore_index=-1, reduction="none")
    return nats.view(targets.shape).cpu()


@contextmanager
def evaluating(model):
    """No dropout and no gradients inside the with block."""
    was_training = model.training
    with torch.no_grad():
        yield model.eval()
    model.train(was_training)


def evaluate(model, loader, s, world, data):
    """The loss on the validation rows, always the same ones, in nats per token, and its part above
    the floor where that is known: {column of the log: value}. Any number of processes sums in the
    same order."""
    count = loader.rows_per_epoch
    if s.eval_tokens is not None:
        count = min(count, max(1, s.eval_tokens // s.block_size))
    has_floor = data.skills is not None and s.rows == "documents" \
        and count == loader.rows_per_epoch and not loader.rows.has_long_documents
    bounds = np.cumsum([0, *map(len, loader.shards)])  # where each shard begins
    token_bytes = torch.from_numpy(data.tokenizer.token_bytes())
    at_once = max(1, 4096 // s.block_size)
    batches = [range(i, min(i + at_once, count)) for i in range(0, count, at_once)]
    sums = torch.zeros((len(batches), 2 + len(SKILLS)), dtype=torch.float64)
    for i in range(world.rank, len(batches), world.size):
        x, y = loader.batch(batches[i])
        with evaluating(model), world.autocast():
            logits, _ = model(x.to(world.device))
        known = y != -1
        nats, targets = token_losses(logits, y)[known].double(), y[known]  # (tokens,) by row
        skill = np.zeros(len(targets), np.int64)
        if has_floor:
            places = map(loader.rows.locate, batches[i])
            skill = np.concatenate([data.skills[bounds[shard] + start + 1:][:length]
                                    for shard, start, length in places])
        by_skill = np.bincount(skill, nats, minlength=len(SKILLS))
        sums[i] = torch.tensor([len(targets), token_bytes[targets].sum(), *by_skill])
    tokens, size, *nats = world.reduce(sums).cpu().sum(dim=0).tolist()
    found = {"val_loss": sum(nats) / tokens,
             "val_bits_per_byte": sum(nats) / math.log(2) / size if size else math.nan}
    if has_floor:
        found["above_floor"] = found["val_loss"] - data.meta["entropy_floor"]
        for skill, n in zip(SKILLS, nats, strict=True):
            found[f"above_floor_{skill}"] = n / tokens - data.meta["skills"][skill]
    return found


def hellaswag(model, questions, world):
    """Which of its four endings does the model expect of each question (Zellers et al. 2019)? A
    question is (context, [endings], number of the right one). Returns (questions, 2) int64: the
    ending of the lowest loss, in total and per token."""
    encode, block_size, device = model.tokenizer.encode, model.config.block_size, world.device
    losses = torch.zeros((len(questions), 4, 2))
    for number in range(world.rank, len(questions), world.size):
        context, endings, _ = questions[number]
        endings = [encode(ending)[:block_size] for ending in endings]
        y = nn.utils.rnn.pad_sequence([torch.tensor(ending) for ending in endings],
                                      batch_first=True, padding_value=-1)  # (4, longest)
        room = block_size + 1 - y.size(1)
        context = torch.tensor([(encode(context) or model.tokenizer.document_start)[-room:]])
        # The context's last token predicts the ending's first
        x = torch.cat((context[:, -1:].expand(4, 1), y[:, :-1].clamp(min=0)), dim=1)
        cache = KVCache(context.size(1) + y.size(1))
        with evaluating(model), world.autocast():
            if context.size(1) > 1:
                # The context is read once, then its endings from the cache, as one batch
                model(context[:, :-1].to(device), cache=cache)
                cache.store = {layer: [t.repeat(4, 1, 1, 1) for t in kv]
                               for layer, kv in cache.store.items()}
            logits, _ = model(x.to(device), y.to(device), cache)  # (4, longest, V)
        nats = token_losses(logits, y).sum(dim=1)  # (4,)
        losses[number] = torch.stack((nats, nats / (y != -1).sum(dim=1)), dim=1)
    return world.reduce(losses).argmin(dim=1).cpu()


def read_questions():
    if not HELLASWAG.exists():
        return []
    try:
        rows = map(json.loads, HELLASWAG.read_text(encoding="utf-8").splitlines())
        return [(row["ctx"], [" " + row["endings"][i] for i in range(4)], int(row["label"]))
                for row in rows]
    except Exception as error:
        raise UserError(f"{HELLASWAG} is damaged ({error}): prepare it again") from None


def hellaswag_scores(model, world):
    """Columns of the log: the share of right choices, by total loss and by loss per token."""
    is_gpt2 = model.tokenizer.spec["kind"] == "gpt2"
    questions = world.from_master(read_questions) if is_gpt2 else []
    if not questions:
        return {}
    right = torch.tensor([[label] for _, _, label in questions])
    acc, acc_norm = (hellaswag(model, questions, world) == right).double().mean(dim=0).tolist()
    return {"hellaswag_acc": acc, "hellaswag_acc_norm": acc_norm}


def in_words(found):
    text = ""
    if "val_loss" in found:
        text = "{val_loss:.4f}, {val_bits_per_byte:.3f} bits per byte"
    if "above_floor" in found:
        above = 100 * found["above_floor"] / (found["val_loss"] - found["above_floor"])
        parts = ", ".join(f"{skill} {{above_floor_{skill}:.3f}}" for skill in SKILLS)
        text += f", {above:,.1f} % above the floor ({parts})"
    if "hellaswag_acc" in found:
        text += " HellaSwag acc {hellaswag_acc:.2%}, acc_norm {hellaswag_acc_norm:.2%}"
    return text.format(**found).strip()


def report_evaluation(s, world):
    data = open_data(s.data_dir)
    model = build_model(s, data, world)
    found = evaluate(model, open_rows(s, data, "val", None), s, world, data)
    found |= hellaswag_scores(model, world)
    if world.is_master:
        print(f"{s.init_from} on {s.data_dir}: {in_words(found)}")
    return 0


def matmul_speed(world, n=2048):
    """FLOP/s of a device in an n x n x n product: the mean of ten in a row."""
    a, b = (torch.randn(n, n, device=world.device, dtype=world.dtype) for _ in range(2))
    for count in (2, 10):
        began = time.perf_counter()
        for _ in range(count):
            a @ b
        wait_for(world.device)
    return 2 * n**3 * count / (time.perf_counter() - began)


def flops_per_token(model, T):
    """FLOPs of training per token, in rows of T (Chowdhery et al. 2022, appendix B)."""
    N = sum(p.numel() for name, p in model.named_parameters() if "wpe" not in name)
    return 6 * N + 12 * model.config.n_layer * model.config.n_embd * T


# ---- The command line ----


class UserError(Exception):
    """A user's mistake."""


def reports_mistakes(main):
    """Decorate main(): a UserError becomes one line on stderr and exit status 2."""
    @functools.wraps(main)
    def wrapper(argv=None):
        for stream in (sys.stdout, sys.stderr):
            if hasattr(stream, "reconfigure"):  # on Windows
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
        raise UserError(message.removeprefix("argument "))


def parse_settings(cls, argv=None, doc="", presets=None, bare=None):
    """(settings, {name: value} given): defaults, then the preset, then the command line. The
    comments of the class are the help. A word without dashes sets the setting `bare`."""
    table = ["presets:"] * bool(presets)
    for name, changes in (presets or {}).items():
        s = cls(**changes)
        table.append(f"  {name:<17}{s.n_layer} layers, {s.n_head} heads, {s.n_embd} wide, context "
                     f"{s.block_size}, {s.max_steps:,} steps, {s.data_dir}")
    parser = Parser(
        usage="%(prog)s [--name=value ...]", description=doc, epilog="\n".join(table),
        allow_abbrev=False, formatter_class=functools.partial(
            argparse.RawDescriptionHelpFormatter, max_help_position=32, width=100))
    kinds, pattern = typing.get_type_hints(cls), r"^    (?:# (.*)|(\w+): .*?(?:  # (.*))?)$"
    special, group = {"true": True, "false": False, "none": None}, parser
    for heading, name, comment in re.findall(pattern, inspect.getsource(cls), re.M):
        if heading:
            group = parser.add_argument_group(heading)
            continue
        kind, options = kinds[name], typing.get_args(kinds[name])
        if kind is bool or typing.get_origin(kind) is Literal:
            how = dict(type=lambda text: special.get(text.lower(), text),
                       choices=options or (True, False))
        else:  # str, int, float, or one of these and None
            kind = options[0] if options else kind
            how = dict(type=os.path.expanduser if kind is str else functools.partial(number, kind))
        group.add_argument(f"--{name}", default=argparse.SUPPRESS, metavar=str(getattr(cls, name)),
                           help=comment.replace("%", "%%"), **how)
    if bare:
        parser.add_argument("bare", nargs="?", metavar=bare, help=argparse.SUPPRESS)
    words = list(sys.argv[1:] if argv is None else argv)
    for i, word in enumerate(words):  # a bare flag means True, whatever follows
        follows = [*words, ""][i + 1].lower()
        if kinds.get(word[2:]) is bool and follows not in ("true", "false"):
            words[i] = f"{word}=True"
    found, unknown = parser.parse_known_args(words)
    given = vars(found)
    if (text := given.pop("bare", None)) is not None:
        given.setdefault(bare, text)
    for word in unknown:
        name = word.partition("=")[0].strip("-").replace("iters", "steps")  # as in nanoGPT
        near = difflib.get_close_matches(name.replace("interval", "every"), kinds, 1, 0.5)
        hint = f"did you mean --{near[0]}?" if near and word.startswith("-") else "see --help"
        raise UserError(f"{word!r} is not a setting; {hint}")
    preset = given.get("preset", getattr(cls, "preset", None))
    if presets and preset not in presets:
        raise UserError(f"there is no preset {preset!r}, only {', '.join(presets)}")
    return cls(**(presets[preset] if presets else {}) | given), given


def number(kind, text):
    try:
        return None if text.lower() == "none" else kind(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected {kind.__name__}, got {text!r}") from None


def check_ranges(s, **ranges):
    for name, (least, most) in ranges.items():
        value = getattr(s, name)
        if value is not None and not least <= value <= most:
            raise UserError(f"{name} is {value:,}: it must be from {least:,} to {most:,}")


def check_settings(s):
    """Raise UserError for a value out of range; fill in total_batch_size."""
    for name, kind in typing.get_type_hints(Settings).items():
        if kind in (float, float | None):
            check_ranges(s, **{name: (0, 1e9)})
        elif kind in (int, int | None):
            check_ranges(s, **{name: (name not in ("seed", "warmup_steps"), 2**53)})
    share = (0, 0.9999999)
    check_ranges(s, batch_size=(1, 2**20), block_size=(1, 2**24), min_lr=(0, s.learning_rate),
                 init_std=(1e-9, 1e9), beta1=share, beta2=share, dropout=share)
    if s.grad_accum_steps or not s.total_batch_size:
        s.total_batch_size = s.batch_size * s.block_size * (s.grad_accum_steps or 1)
    check_ranges(s, total_batch_size=(1, 2**27))


def prepare_stories(s):
    if s.data_dir == Settings.data_dir and not (Path(s.data_dir) / "meta.json").exists():
        script = Path(__file__).with_name("prepare_data.py")
        if subprocess.run([sys.executable, script]).returncode:
            raise UserError("prepare_data.py failed; its message is above")


@reports_mistakes
def main(argv=None):
    s, given = parse_settings(Settings, argv, __doc__, PRESETS)
    adopt_shape(s, given)
    check_settings(s)
    keep_memory()
    world = World(s)
    try:
        if world.is_master and (changes := PRESETS[s.preset] | given):
            print(f"preset and options change the constants at the top: {changes}")
        world.from_master(lambda: prepare_stories(s))
        return report_evaluation(s, world) if s.eval_only else train(s, world)
    except (RuntimeError, MemoryError) as error:
        if isinstance(error, dist.DistError) or "peer" in str(error):
            print(f"error: process {world.rank} lost another one; the same command resumes",
                  file=sys.stderr)
            os._exit(1)  # a regular end may wait for the other one
        if not is_out_of_memory(error):
            raise
        steps = max(1, s.total_batch_size // (s.batch_size * s.block_size))
        raise UserError(f"{world.device} is out of memory: halve --batch_size ({s.batch_size}) and "
                        f"double --grad_accum_steps ({steps})") from None
    finally:
        world.at_end.close()


if __name__ == "__main__":
    sys.exit(main())
