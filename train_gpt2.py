"""Train a GPT-2 from scratch, in one file that you can read in an evening.

    python train_gpt2.py                              # offline, 3 minutes: learns little stories
    python train_gpt2.py --n_layer=2 --max_steps=500  # each setting below is also an option
    python train_gpt2.py --preset=gpt2                # after `python prepare_data.py fineweb_edu`
    torchrun --standalone --nproc_per_node=8 train_gpt2.py --preset=gpt2      # on eight GPUs

Part 1 is the lesson: settings, the model, generating text, batches, the optimizer, the loop.
Part 2 is the machinery: the run's folder, tokenizers, files, devices, evaluation, the command
line. Skip it on a first reading.

Papers that the comments cite: GPT-2 (Radford et al. 2019, "Language Models are Unsupervised
Multitask Learners"), GPT (Radford et al. 2018), GPT-3 (Brown et al. 2020) and Attention (Vaswani
et al. 2017, "Attention Is All You Need").
"""
import argparse
import ast
import base64
import contextlib
import copy
import csv
import ctypes
import dataclasses
import difflib
import errno
import functools
import hashlib
import html
import inspect
import itertools
import json
import math
import os
import re
import signal
import statistics
import subprocess
import sys
import time
import typing
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import filelock
import numpy as np
import tiktoken
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

# ==================================================================================================
# PART 1: THE LESSON
# ==================================================================================================
# ---- Settings ------------------------------------------------------------------------------------


@dataclass
class Settings:
    # the run (edit these values, or give options: --max_steps=200)
    preset: str = "stories"  # a row of PRESETS; it changes some of the settings below
    data_dir: str = "data/stories"  # shards and meta.json, as prepare_data.py writes them
    out_dir: str = ""  # folder of the run; empty: out/<preset>
    init_from: str = ""  # start from these weights and their shape: a checkpoint, or gpt2
    overwrite: bool = False  # start over in out_dir, whatever it holds
    seed: int = 1  # fixes the initial weights, the order of the data and dropout
    # the machine
    device: str = "auto"  # auto (CUDA, else MPS, else CPU), cpu, cuda, cuda:1, mps
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # of matrix products
    compile_model: Literal["auto", True, False] = "auto"  # torch.compile; auto: on CUDA
    attention: Literal["flash", "manual"] = "flash"  # fused kernel, or the five lines it stands for
    deterministic: bool = False  # the same bits on every run on a GPU too; slower
    # the batch
    rows: Literal["stream", "documents"] = "documents"  # a document a row, or the text cut
    batch_size: int = 16  # rows in a micro-batch, which one process handles at once
    block_size: int = 112  # context length in tokens; the longest story has 108
    total_batch_size: int | None = None  # tokens per step; None: batch_size * block_size
    grad_accum_steps: int | None = None  # sets total_batch_size to batch_size * block_size * this
    # the optimization
    max_steps: int = 1800  # optimizer steps
    max_minutes: float | None = None  # save and stop after this time; the same command resumes
    warmup_steps: int = 50  # steps in which the learning rate rises to its peak
    learning_rate: float = 6e-3  # the peak; small models take high rates
    min_lr: float = 0.0  # learning rate at the end of the cosine
    weight_decay: float = 0.1  # GPT-3 paper, appendix B
    beta1: float = 0.9  # AdamW's decay of the mean gradient
    beta2: float = 0.95  # AdamW's decay of the mean squared gradient (GPT-3 paper, appendix B)
    grad_clip: float = 1.0  # clip the global gradient norm (GPT-3 paper, appendix B); 0 disables
    dropout: float = 0.0  # share of activations zeroed against overfitting (memorizing the data)
    # the model
    n_layer: int = 3  # blocks
    n_head: int = 4  # attention heads in each block
    n_embd: int = 96  # width: numbers that describe one token
    pos_encoding: Literal["learned", "sinusoidal"] = "learned"  # a learned table, or fixed sines
    activation: Literal["gelu", "relu"] = "gelu"  # the nonlinearity of the MLPs
    init_std: float = 0.02  # standard deviation of the initial weights (GPT paper, section 4.1)
    # what is measured, and how often (in steps)
    eval_only: bool = False  # measure init_from, or else out_dir's best.pt, and do not train
    eval_every: int = 100  # validation loss, picture and report
    eval_tokens: int | None = None  # validation tokens per evaluation; None: all of them
    sample_every: int = 600  # a sample text, and HellaSwag where its questions are prepared
    checkpoint_every: int = 300  # steps that a kill can cost at most
    log_every: int = 20  # a line on the screen and a row in log.csv


# What each preset changes. The larger GPT-2 sizes take the GPT-3 paper's rates, table 2.1.
_CHARS = dict(data_dir="data/shakespeare", rows="stream")
_GPT2 = dict(
    data_dir="data/fineweb_edu", rows="stream", n_layer=12, n_head=12, n_embd=768, block_size=1024,
    batch_size=32, total_batch_size=524_288,  # 2^19: the GPT-3 paper, table 2.1, has 0.5M tokens
    max_steps=19_073,  # * 2^19 tokens = 10 billion: the FineWeb-Edu sample, once
    warmup_steps=715,  # * 2^19 = 375 million tokens: GPT-3 paper, appendix B
    learning_rate=6e-4, min_lr=6e-5,  # GPT-3 paper, table 2.1; down to 10 %: appendix B
    eval_every=250, eval_tokens=10_485_760, sample_every=1000, checkpoint_every=1000, log_every=10)
PRESETS = {
    "stories": {},
    "shakespeare_char": _CHARS | dict(  # one GPU; 80 epochs of 1 MB, so dropout is needed
        n_layer=6, n_head=6, n_embd=384, block_size=256, dropout=0.2, batch_size=64, max_steps=5000,
        warmup_steps=100, learning_rate=1e-3, min_lr=1e-4, beta2=0.99,  # nanoGPT's settings
        eval_every=250, sample_every=1000, checkpoint_every=1000, log_every=10),
    "shakespeare_cpu": _CHARS | dict(  # the fastest to 1.88 of some 70 that were tried on a CPU
        n_layer=4, n_head=4, n_embd=128, block_size=64, init_std=0.07, batch_size=16, max_steps=620,
        warmup_steps=50, learning_rate=6e-3, beta1=0.75, beta2=0.98,
        eval_every=310, sample_every=310, checkpoint_every=310),
    "tinystories_char": dict(  # small enough for a CPU: reads 5 million characters
        data_dir="data/tinystories", rows="stream", n_layer=4, n_head=4, n_embd=64, block_size=32,
        activation="relu", batch_size=16, max_steps=10_000, warmup_steps=100, learning_rate=1e-3,
        min_lr=1e-4, eval_every=500, eval_tokens=200_000, sample_every=2500, checkpoint_every=2500,
        log_every=100),
    "gpt2_nano": dict(  # 32,768 tokens a step, 3.3 epochs of 99 million tokens
        data_dir="data/fineweb_edu_bpe", rows="stream", n_layer=12, n_head=8, n_embd=512,
        block_size=1024, pos_encoding="sinusoidal", activation="relu", batch_size=32,
        max_steps=10_000, warmup_steps=200, learning_rate=3e-4, eval_every=500,
        eval_tokens=1_048_576, sample_every=1000, checkpoint_every=1000),
    "gpt2_mini": dict(  # 65,536 tokens * 7,629 steps = 0.5 billion: one session on a free GPU
        data_dir="data/fineweb_edu", rows="stream", n_layer=6, n_head=6, n_embd=384,
        block_size=1024, batch_size=16, total_batch_size=65_536, max_steps=7629, warmup_steps=200,
        learning_rate=1e-3, min_lr=1e-4, eval_every=250, eval_tokens=1_048_576, sample_every=1000,
        checkpoint_every=500, log_every=10),
    "gpt2": _GPT2,
    "gpt2_medium": _GPT2 | dict(
        n_layer=24, n_head=16, n_embd=1024, batch_size=16, learning_rate=3e-4, min_lr=3e-5),
    "gpt2_large": _GPT2 | dict(
        n_layer=36, n_head=20, n_embd=1280, batch_size=8, learning_rate=2.5e-4, min_lr=2.5e-5),
    "gpt2_xl": _GPT2 | dict(
        n_layer=48, n_head=25, n_embd=1600, batch_size=4, learning_rate=2e-4, min_lr=2e-5),
}


# ---- The model -----------------------------------------------------------------------------------
# Shapes in the comments: B rows in a batch, T tokens in a row, C = n_embd, V = vocab_size.


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
    weighted mean of the values of the tokens up to itself. The causal mask hides the later
    ones, which the model must learn to predict. q is (B, n_head, T, head_dim), k and v are (B,
    n_head, S, head_dim); the T queries belong to the last T of the S tokens. Returns (B,
    n_head, T, head_dim)."""
    T, S = q.size(-2), k.size(-2)
    # (T, S), True where a query (row) may look at a key (column); the last token may see all
    mask = torch.ones(T, S, dtype=torch.bool, device=q.device).tril(S - T)
    # One fused kernel, but for bfloat16 on a CPU, where it was 1.6 to 6 times as slow
    if flash and not (q.is_cpu and q.dtype == torch.bfloat16):
        if T == S:  # the kernel brings this mask itself
            return F.scaled_dot_product_attention(q, k, v, None, dropout, is_causal=True)
        return F.scaled_dot_product_attention(q, k, v, mask if T > 1 else None, dropout)
    # Divided by the root of head_dim, scores keep a spread near 1
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.size(-1))  # (B, n_head, T, S)
    scores = scores.masked_fill(~mask, -math.inf)  # e^-inf is a weight of 0
    weights = F.softmax(scores, dim=-1)  # (B, n_head, T, S); each row sums to 1
    weights = F.dropout(weights, dropout)
    return weights.to(v.dtype) @ v  # (B, n_head, T, head_dim)


class CausalSelfAttention(nn.Module):
    """The one place where tokens exchange information. Each token asks with a query (q), offers
    a key (k) and hands over a value (v). n_head attentions run side by side, the heads, each in
    its own slice of the width."""

    def __init__(self, config):
        super().__init__()
        self.n_head = config.n_head
        self.dropout = config.dropout
        self.flash = config.attention == "flash"
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)  # q, k, v at once
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)
        self.resid_dropout = nn.Dropout(config.dropout)

    def forward(self, x, cache=None):
        B, T, C = x.shape
        q, k, v = self.c_attn(x).split(C, dim=2)  # (B, T, C) each
        # Split the width into heads: (B, T, C) -> (B, n_head, T, head_dim)
        q, k, v = (t.view(B, T, self.n_head, -1).transpose(1, 2) for t in (q, k, v))
        if cache is not None:  # put the keys and values of earlier tokens before
            k, v = cache.extend(self, k, v)  # (B, n_head, S, head_dim)
        dropout = self.dropout if self.training else 0.0
        y = causal_attention(q, k, v, dropout, self.flash)
        y = y.transpose(1, 2).reshape(B, T, C)  # the heads side by side again
        return self.resid_dropout(self.c_proj(y))


class MLP(nn.Module):
    """Multi-layer perceptron: each token is processed by itself. The hidden layer is four times
    as wide (GPT paper, section 4.1)."""

    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd)
        # GPT-2's GELU is the tanh approximation (Hendrycks & Gimpel 2016, section 2)
        self.act = nn.ReLU() if config.activation == "relu" else nn.GELU(approximate="tanh")
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x):
        x = self.act(self.c_fc(x))  # (B, T, C) -> (B, T, 4C)
        return self.dropout(self.c_proj(x))  # (B, T, 4C) -> (B, T, C)


class Block(nn.Module):
    """x + attention, then x + MLP. x is the residual stream: every block reads it and adds to
    it, so the gradient flows back to the embeddings through plain sums. A LayerNorm brings the
    C numbers of a token to mean 0 and variance 1, then applies a learned scale and shift. It
    stands before attention and MLP, not on the stream itself: pre-norm (GPT-2 paper, section
    2.3), which keeps the path of the gradient free."""

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

    `model(idx, targets)` takes (B,
    T) int64 ids and returns (logits, loss). The logits, (B, T, V), are scores; their softmax
    gives the probability of each possible next token. The loss is the mean cross-entropy, -ln
    p(target), in nats per token, over all targets that are not -1; without targets it is None.
    With a KVCache, idx follows the tokens in the cache; without targets the logits are then
    those of the last token only, (B, 1, V). Raises UserError for a config that cannot be built,
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
            drop=nn.Dropout(config.dropout),
            h=nn.ModuleList([Block(config) for _ in range(config.n_layer)]),
            ln_f=nn.LayerNorm(config.n_embd),  # GPT-2 paper, section 2.3
        ))
        # Initial weights: matrices N(0, init_std), biases 0, norms 1 (GPT paper, section 4.1).
        # 2 * n_layer products are added to the residual stream, whose spread would grow with
        # the root of their number; they start smaller by that root (GPT-2 paper, section 2.3).
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
        # Weight tying (Press & Wolf 2017): the token embedding is also the output matrix. That
        # saves 39M parameters in GPT-2, and the loss is lower.
        logits = unembed(x, self.transformer.wte.weight)  # (B, T, V)
        if targets is None:
            return logits, None
        # In float32: a mean over many tokens needs more than bfloat16's 3 digits
        loss = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=-1)
        return logits, loss

    def generate(self, prompt, max_new_tokens=100, temperature=1.0, top_k=None, top_p=None,
                 seed=None):
        """Continue a text, or a (B, T) tensor of ids. Text comes back with its prompt and ends
        before <|endoftext|>; a tensor comes back as (B, T + max_new_tokens). The same seed
        gives the same text. Raises UserError for a prompt that the vocabulary cannot write. The
        other options are those of stream_tokens."""
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
        """Load a checkpoint, or gpt2 .. gpt2-xl once they are converted. The model carries its
        tokenizer. Raises UserError for other files."""
        return load_model(path, device)

    @property
    def device(self):
        return self.transformer.wte.weight.device

    def num_parameters(self):
        """How many numbers are learned; the tied embedding counts once."""
        return sum(p.numel() for p in self.parameters() if p.requires_grad)


# ---- Generating text -----------------------------------------------------------------------------


class KVCache:
    """The keys and values of all tokens so far, for each attention layer. No token sees a later
    one, so they never change: each is computed once, and a new token costs one forward pass of
    length 1."""

    def __init__(self, max_length):
        self.max_length = max_length  # tokens that there is room for
        self.length = 0  # tokens in it
        self.store = {}  # layer -> (k, v), each (B, n_head, max_length, head_dim)

    def extend(self, layer, k, v):
        """Add T new tokens, (B, n_head, T, head_dim); return all S so far."""
        if layer not in self.store:
            shape = (*k.shape[:2], self.max_length, k.size(3))
            self.store[layer] = k.new_empty(shape), v.new_empty(shape)
        end = self.length + k.size(2)
        for room, new in zip(self.store[layer], (k, v), strict=True):
            room[:, :, self.length:end] = new
        return [room[:, :, :end] for room in self.store[layer]]


@torch.no_grad()
def stream_tokens(model, idx, max_new_tokens, temperature=1.0, top_k=None, top_p=None, seed=None):
    """Yield (token, logits) max_new_tokens times. idx is (B, T) int64, T >= 1. token is the
    next token of each row, (B,) int64, and logits are the scores it was drawn from, (B, V)
    float32. When the context is full, the older half is forgotten and the newer half is read
    again from position 0. A prompt longer than the context keeps its end."""
    block_size, was_training = model.config.block_size, model.training
    generator = torch.Generator(idx.device)
    generator.manual_seed(seed) if seed is not None else generator.seed()
    model.eval()  # no dropout
    try:
        idx = unread = idx[:, -block_size:]
        cache = KVCache(min(block_size, idx.size(1) + max_new_tokens))
        for _ in range(max_new_tokens):
            if cache.length + unread.size(1) > block_size:
                unread, cache.length = idx[:, -max(1, block_size // 2):], 0
            logits, _ = model(unread, cache=cache)  # (B, 1, V)
            logits = logits[:, -1].float()  # (B, V)
            unread = sample_token(logits, temperature, top_k, top_p, generator)
            idx = torch.cat((idx, unread), dim=1)[:, -block_size:]
            yield unread[:, 0], logits
    finally:
        model.train(was_training)


def sample_token(logits, temperature=1.0, top_k=None, top_p=None, generator=None):
    """Draw one token for each row: (B, V) logits -> (B, 1) ids. A temperature below 1 favours
    likely tokens; 0 is greedy, always the likeliest. top_k keeps the k likeliest tokens (Fan et
    al. 2018). top_p keeps the fewest likeliest tokens whose probabilities sum to p (Holtzman et
    al. 2020)."""
    if temperature < 1e-6:  # nearly 0 would overflow in the division
        return logits.argmax(dim=-1, keepdim=True)
    k = min(top_k or logits.size(-1), logits.size(-1))
    logits, ids = logits.topk(k) if top_k or top_p else (logits, None)  # sorted, (B, k)
    probs = F.softmax(logits / temperature, dim=-1)
    if top_p:
        before = probs.cumsum(dim=-1) - probs  # sum over the likelier tokens
        probs = probs.masked_fill(before >= top_p, 0)
    # The first token whose cumulative probability reaches a random number. torch.multinomial
    # would draw one random number for every token.
    cumulative = probs.cumsum(dim=-1)  # (B, k)
    u = 1 - torch.rand(len(probs), 1, generator=generator, device=probs.device)
    choice = torch.searchsorted(cumulative, u * cumulative[:, -1:])  # (B, 1)
    return choice if ids is None else ids.gather(-1, choice)


# ---- Batches from shards -------------------------------------------------------------------------


class ShardedLoader:
    """Rows of tokens from a folder of shards, which stay on disk as memory maps. `batch(rows)`
    needs no state: row number g is a pure function of (seed, g, the shards, block_size). So a
    run can stop and resume anywhere, on any number of processes. An epoch is one pass over all
    rows; each has an order of its own (RowIndex, in Part 2). rows="stream" cuts the tokens
    every block_size, elsewhere in each epoch; rows="documents" gives each document a row.
    seed=None keeps the order of the text, as evaluation wants it. Raises UserError for a folder
    without shards or with too few tokens for one row."""

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
        """Row numbers -> inputs x and targets y, both (B, T) int64. The target of a token is
        the token after it. T is the longest of these rows, rounded up to a multiple of 16 at
        most block_size; y is -1 behind the end of shorter rows, which the loss ignores."""
        places = [self.rows.locate(row) for row in rows]  # (shard, start, length)
        longest = max(length for _, _, length in places)
        T = min(self.block_size, -(-longest // 16) * 16)  # few shapes: less set-up
        x = np.zeros((len(rows), T), np.int64)
        y = np.full((len(rows), T), -1, np.int64)
        for i, (shard, start, length) in enumerate(places):
            tokens = self.shards[shard][start:start + length + 1]
            if tokens.max() >= self.vocab_size:
                raise UserError(f"{self.paths[shard]} holds token {tokens.max()}, but the "
                                f"vocabulary has {self.vocab_size}: prepare the data again")
            x[i, :length], y[i, :length] = tokens[:-1], tokens[1:]
        return torch.from_numpy(x), torch.from_numpy(y)


# ---- Optimizer and schedule ----------------------------------------------------------------------


def make_optimizer(model, s, device):
    """AdamW (Loshchilov & Hutter 2019). Adam divides the mean of a weight's gradients by the
    root of their mean square. So each weight moves by about the learning rate, whatever the
    size of its gradients. The W is weight decay: matrices also shrink by learning_rate *
    weight_decay per step, which keeps them from growing without need.
    Biases and norms are few and set scales, so they do not decay."""
    learned = [p for p in model.parameters() if p.requires_grad]
    groups = [{"params": [p for p in learned if p.dim() >= 2], "weight_decay": s.weight_decay},
              {"params": [p for p in learned if p.dim() < 2], "weight_decay": 0.0}]
    # eps keeps the root from 0 (GPT-3 paper, appendix B); fused: one kernel for all weights
    return torch.optim.AdamW(groups, lr=s.learning_rate, betas=(s.beta1, s.beta2), eps=1e-8,
                             fused=device.type in ("cuda", "cpu"))


def get_lr(step, s):
    """Learning rate of a step: a linear warm-up, then a cosine decay. Warm-up: Adam's first
    means come from few gradients, and full-size steps along them would wreck the fresh weights.
    Cosine (GPT paper, section 4.1): large steps to get close, small ones to settle."""
    if step < s.warmup_steps:
        return s.learning_rate * (step + 1) / s.warmup_steps
    progress = (step - s.warmup_steps) / max(1, s.max_steps - s.warmup_steps)
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))  # 1 -> 0
    return s.min_lr + (s.learning_rate - s.min_lr) * cosine


# ---- The loop ------------------------------------------------------------------------------------


def train(s, world):
    """Train from start to end; return the exit status. s holds the settings, world the device
    and the processes. Row n of the log describes the weights after n steps."""
    data = open_data(s.data_dir)
    loader, validation = (
        ShardedLoader(s.data_dir, split, s.block_size, s.rows, seed, data.vocab_size, data.eot)
        for split, seed in (("train", s.seed), ("val", None)))
    plan = plan_batch(s, world)  # rows per step, rows per micro-batch
    run = Run(s, data, world)  # its folder: a new one, or one to resume in
    torch.manual_seed(s.seed)
    raw_model = build_model(s, data, world)
    optimizer = make_optimizer(raw_model, s, world.device)
    # Many gradients are below 6e-8, where float16 ends. The scaler multiplies the loss by a large
    # number and divides before the step (Micikevicius et al. 2018). Other dtypes do without.
    scaler = torch.amp.GradScaler(world.device.type, enabled=world.dtype == torch.float16)
    start = run.resume(raw_model, optimizer, scaler)  # 0 for a new run
    # The two share their weights: raw_model is evaluated and saved, model takes the steps
    model = compiled_and_parallel(raw_model.train(), s, world)
    announce(run, plan, loader)

    stop = StopRequest(s, world)  # Ctrl-C, SIGTERM or max_minutes
    batches = prefetch(loader, start, s.max_steps, plan, world)
    with stop.listening(), contextlib.closing(batches):
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
            micro_batches, targets_in_step = next(batches)
            loss_sum = torch.zeros((), device=world.device)
            # Gradient accumulation: gradients of micro-batches add up to those of the whole
            # batch, which need not fit into memory at once
            for micro_step, (x, y) in enumerate(micro_batches):  # x, y: (B, T)
                # Dropout depends only on the place in the run, so that a resumed run repeats it
                torch.manual_seed(mix(s.seed, step, micro_step, world.rank))
                more = micro_step < len(micro_batches) - 1
                with world.accumulating(model, more):  # average over processes once
                    # Mixed precision: products in world.dtype are faster, weights stay float32,
                    # where small updates are not rounded away
                    with world.autocast():
                        _, loss = model(x, y)
                    # This mean's share in the mean over the step's tokens
                    loss = loss * ((y != -1).sum() / targets_in_step)
                    # DDP divides by world.size; this undoes it
                    scaler.scale(loss * world.size).backward()
                loss_sum += loss.detach()
            scaler.unscale_(optimizer)
            # A rare batch has a huge gradient: clipping bounds its length, not its direction
            grad_norm = nn.utils.clip_grad_norm_(raw_model.parameters(), s.grad_clip or math.inf)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            run.log_step(step, targets_in_step, loss_sum, lr, grad_norm)
            if stop.requested(step) and step + 1 < s.max_steps:
                return run.stopped(step + 1, stop.status)


# ==================================================================================================
# PART 2: THE MACHINERY (skip this on a first reading)
# ==================================================================================================
# ---- A run and its folder ------------------------------------------------------------------------

LOG_COLUMNS = """step tokens train_loss val_loss val_bits_per_byte lr grad_norm tokens_per_second
    seconds above_floor above_floor_wording above_floor_choices above_floor_recall hellaswag_acc
    hellaswag_acc_norm""".split()
RUN_FILES = {"ckpt.pt", "best.pt", "log.csv", "samples.md", "loss.svg", "report.md", ".lock",
             "evaluations.json"}  # the last one is from older versions
# Settings that do not shape the weights: a run may resume with other values
FREE_SETTINGS = set("""preset out_dir overwrite device dtype batch_size grad_accum_steps max_minutes
    compile_model deterministic eval_only eval_every eval_tokens sample_every checkpoint_every
    log_every""".split())
# The loss that a preset aims at on its own data; the README says where each comes from
TARGETS = {"shakespeare_char": {"nanoGPT": 1.47}, "shakespeare_cpu": {"target": 1.88},
           "tinystories_char": {"target": 1.25}, "gpt2": {"OpenAI's GPT-2": 3.2924}}


class Run:
    """A run's folder, log, checkpoints and clock, and what it prints."""

    def __init__(self, s, data, world):
        self.s, self.data, self.world = s, data, world
        self.began = time.perf_counter()
        self.best, self.bar = math.inf, None
        self.row = {}  # measured since the last row of the log
        self.mark = None  # (time, tokens) from where throughput is measured
        own_data = PRESETS[s.preset].get("data_dir", Settings.data_dir) == s.data_dir
        target = TARGETS.get(s.preset, {}) if own_data else {}
        self.baselines = data.meta.get("landmarks", {}) | target
        chosen = world.from_master(lambda: choose_folder(s, world))
        self.folder, self.saved, earlier, self.why_new = chosen
        world.compute_as(s, earlier)  # a resumed run keeps its precision

    def resume(self, model, optimizer, scaler):
        """Load the checkpoint, if there is one. Return the step to start from."""
        self.model, self.optimizer, self.scaler = model, optimizer, scaler
        self.start = 0
        if self.saved:
            self.start, self.best = load_training_state(
                self.saved, model, optimizer, scaler, self.data.tokenizer)
        if self.world.is_master:
            clear_leftovers(self.folder, self.start)
        return self.start

    @contextlib.contextmanager
    def clock_stopped(self):
        """Throughput leaves out the time spent inside."""
        wait_for(self.world.device)  # steps that are still under way do count
        began = time.perf_counter()
        yield
        if self.mark:
            self.mark = (self.mark[0] + time.perf_counter() - began, self.mark[1])

    def evaluate(self, step, loader):
        """Measure the validation loss; keep the weights if it is the lowest so far."""
        with self.clock_stopped():
            found = evaluate(self.model, loader, self.s, self.world, self.data)
            loss = found["val_loss"]
            self.say(f"step {step:,}: val {in_words(found)}")
            for name, value in self.baselines.items():
                if loss < value <= self.best:
                    self.say(f"step {step:,}: below the {name} line ({value:.4f})")
            if loss < self.best:
                self.best = loss
                self.write("best.pt", self.checkpoint(step))
            self.note(step, found)

    def show_sample(self, step):
        """Let the model write, and ask it HellaSwag's questions where they are at hand."""
        with self.clock_stopped():
            scores = hellaswag_scores(self.model, self.world)
            if scores:
                self.say(f"step {step:,}: HellaSwag {in_words(scores)}")
            if self.world.is_master:
                seed = mix(self.s.seed, step)
                text = self.model.generate("", 200, temperature=0.8, seed=seed).strip()
                self.say(f"step {step:,} writes: {text}")
                quoted = "\n".join(f"> {line}" for line in text.splitlines())
                append(self.folder / "samples.md", f"## Step {step}\n\n{quoted}\n\n")
            self.note(step, scores)

    def note(self, step, found):
        """Keep what was measured for the next row of the log, and draw the report anew."""
        self.row |= {"step": step, "tokens": self.tokens} | found
        if self.world.is_master:
            write_report(self, [*read_log(self.folder), self.row])

    def checkpoint(self, step):
        threads = torch.get_num_threads() * self.world.size
        settings = dataclasses.asdict(self.s) | {"threads": threads}
        return make_checkpoint(self.model, step, settings, self.best)

    def write(self, name, checkpoint):
        if self.world.is_master:
            write_atomically(self.folder / name, lambda file: torch.save(checkpoint, file))

    def save(self, step):
        """Write ckpt.pt, from which a run resumes; at the last step it marks the end."""
        with self.clock_stopped():
            self.check_finite()
            if step == self.s.max_steps:
                self.write_row()
            optimizer = self.optimizer.state_dict() | {"scaler": self.scaler.state_dict()}
            self.write("ckpt.pt", self.checkpoint(step) | {"optimizer": optimizer})

    def log_step(self, step, targets, loss_sum, lr, grad_norm):
        """Count a step; every log_every steps, log it. Only then does the CPU wait for a GPU."""
        self.tokens += targets
        self.latest = (step, loss_sum, lr, grad_norm)
        if self.bar:
            self.bar.update()
        if not (step % self.s.log_every == 0 or step == self.s.max_steps - 1 or self.row):
            return
        loss, norm = self.check_finite()
        row = dict(step=step, tokens=self.tokens - targets, train_loss=loss, lr=f"{lr:.6g}",
                   grad_norm=f"{norm:.6g}")
        text = f"train {loss:.4f} | lr {lr:.2e} | grad norm {norm:.2f}"
        now = time.perf_counter()
        if self.mark:
            speed = (self.tokens - self.mark[1]) / (now - self.mark[0])
            row["tokens_per_second"] = f"{speed:.0f}"
            mfu = 100 * speed * self.flops_per_token / self.peak
            left = duration((self.s.max_steps - step) * targets / speed)
            text += f" | {speed:,.0f} tokens/s, MFU {mfu:.0f} %, {left} left"
        self.mark = (now, self.tokens)
        self.write_row(**row)
        if self.scaler.is_enabled():  # AdamW counts the steps that it took
            taken = next(iter(self.optimizer.state.values()), {}).get("step", 0)
            text += f" | {step + 1 - int(taken):,} steps skipped: gradients beyond float16"
        if self.bar:
            self.bar.set_postfix_str(text)
        elif step % self.s.log_every == 0:
            self.say(f"step {step:,}/{self.s.max_steps:,} | {text}")

    def check_finite(self):
        """(loss, gradient norm) of the latest step. Raises UserError if they are not finite."""
        step, loss_sum, lr, grad_norm = self.latest
        loss, norm = self.world.reduce(loss_sum.clone()).item(), grad_norm.item()
        # float16's scaler expects infinite gradients now and then, and skips those steps
        if not math.isfinite(loss) or not (math.isfinite(norm) or self.scaler.is_enabled()):
            raise UserError(f"step {step:,} has loss {loss:.4g}, gradient norm {norm:.4g} at "
                            f"learning rate {lr:.2g}: lower --learning_rate or raise "
                            f"--warmup_steps; the checkpoint in {self.folder} is intact")
        return loss, norm

    def write_row(self, **values):
        """Add a row to log.csv: these values, and what was measured since the last row."""
        row = self.row | values | {"seconds": f"{time.perf_counter() - self.began:.2f}"}
        self.row = {}
        if self.world.is_master:
            append(self.folder / "log.csv", log_line(row))

    def say(self, text):
        if self.world.is_master:
            tqdm.write(text) if self.bar else print(text, flush=True)

    def stopped(self, step, status):
        self.save(step)
        again = "the same command" + (" without --overwrite" if self.s.overwrite else "")
        self.say(f"stopped at step {step:,}, saved in {self.folder}: {again} resumes it")
        return status

    def finished(self):
        self.say(f"done in {duration(time.perf_counter() - self.began)}, lowest validation loss "
                 f"{self.best:.4f}; see {self.folder / 'report.md'}, and let the model write:\n"
                 f"python sample.py --checkpoint={self.folder / 'best.pt'}")
        return 0


def announce(run, plan, loader):
    """Print the plan of a run; measure the speed that throughput will be compared with."""
    s, world, V = run.s, run.world, run.data.vocab_size
    run.tokens = loader.rows.targets_before(run.start * plan.rows_per_step)
    run.flops_per_token, run.peak = flops_per_token(run.model, s.block_size), math.inf
    if not world.is_master:
        return
    speed = matmul_speed(world.device, world.dtype)
    run.peak, N = speed * world.size, run.model.num_parameters()
    epochs = s.max_steps * plan.rows_per_step / loader.rows_per_epoch
    tokens = epochs * loader.rows.targets_before(loader.rows_per_epoch)
    on_cuda = world.device.type == "cuda"
    device = torch.cuda.get_device_name(world.device) if on_cuda else world.device
    run.machine = f"{world.size} x {device}, {s.dtype} products at {speed / 1e9:,.0f} GFLOP/s"
    print(f"model: {N:,} parameters, {V * s.n_embd:,} of them in the embedding of {V:,} tokens; "
          f"expect a first loss near ln {V:,} = {math.log(V):.2f}")
    print(f"machine: {run.machine}")
    print(f"plan: {s.max_steps:,} steps of {plan.rows_per_step} rows, {plan.micro_batch_size} at "
          f"once; {short(tokens)} tokens, {epochs:.1f} epochs of {s.data_dir}, "
          f"{tokens / N:.1f} tokens per parameter; {short(run.flops_per_token)} FLOPs per token")
    print(f"continuing {run.folder} from step {run.start:,} ({start_over(run.folder)})"
          if run.start else f"a new run in {run.folder}{run.why_new}")
    if sys.stderr.isatty():
        run.bar = tqdm(total=s.max_steps, initial=run.start, unit="step", dynamic_ncols=True)


def difference(checkpoint, s):
    """Why a checkpoint does not belong to an unfinished run of these settings; else empty."""
    theirs = dataclasses.asdict(Settings()) | checkpoint["settings"]
    for name, value in dataclasses.asdict(s).items():
        if theirs[name] != value and name not in FREE_SETTINGS:
            return f"a run with {name}={theirs[name]}"
    if s.dtype not in ("auto", theirs["dtype"]):
        return f"a run in {theirs['dtype']}"
    if checkpoint.get("code", model_code()) != model_code():
        return "a run of other model code"
    return "a finished run" if checkpoint["step"] == s.max_steps else ""


def choose_folder(s, world):
    """The folder of the unfinished run of these settings, or else the next free one.

    Returns (folder, checkpoint to resume from or None, its settings, why a new run starts) and
    locks the folder. Raises UserError where the run is alive or nothing can be written.
    """
    base, why_new = Path(s.out_dir or f"out/{s.preset}"), ""
    if s.overwrite and s.init_from and Path(s.init_from).resolve().parent == base.resolve():
        raise UserError(f"--overwrite=True would delete {s.init_from}: choose another --out_dir")
    for number in itertools.count(1):
        folder = base if number == 1 else base.parent / f"{base.name or 'run'}-{number}"
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            names = {path.name for path in folder.iterdir() if path.suffix != ".tmp"}
            lock = lock_folder(folder)
        # Killed before its first checkpoint, a run has best.pt, which tells whose it is
        saved = [name for name in ("ckpt.pt", "best.pt") if name in names and not s.overwrite]
        why = "other files" if names - RUN_FILES and not s.overwrite else ""
        if saved:
            found = load_checkpoint(folder / saved[0], start_over(folder))
            why = difference(found, s)
        if not why and lock is None:
            raise UserError(f"a run is at work in {folder}: wait for it, stop it, or choose "
                            "another --out_dir")
        if not why:
            world.at_end.callback(lock.release)
            if "ckpt.pt" in saved:
                return folder, folder / "ckpt.pt", found["settings"], ""
            return folder, None, {}, why_new
        why_new = why_new or f" ({folder} holds {why})"
        if lock:
            lock.release()


def start_over(folder):
    return f"to start over: --out_dir={folder} --overwrite=True"


def lock_folder(folder):
    """Claim a folder until the lock is released or this process ends; None if it is taken."""
    lock = filelock.FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        return None
    except OSError as error:  # a network drive without locks: better unguarded than not at all
        if error.errno not in (errno.ENOLCK, errno.ENOTSUP):
            raise
    return lock


def clear_leftovers(folder, start):
    """Remove what a killed run left: half-written files, log rows and samples from `start` on."""
    with writing(folder):
        for path in folder.glob(".*.tmp"):
            path.unlink()
        for name in () if start else ("ckpt.pt", "best.pt"):
            (folder / name).unlink(missing_ok=True)
    header = dict(zip(LOG_COLUMNS, LOG_COLUMNS, strict=True))
    rows = [row for row in read_log(folder) if int(row["step"]) < start]
    write_text(folder / "log.csv", "".join(map(log_line, [header, *rows])))
    samples = [block for block in read_samples(folder) if int(block.split()[2]) < start]
    write_text(folder / "samples.md", "".join(samples))


def log_line(row):
    return ",".join(str(row.get(name, "")) for name in LOG_COLUMNS) + "\n"


def read_log(folder):
    """The rows of log.csv, {column: text}; one that a power cut left unfinished is dropped."""
    try:
        with open(folder / "log.csv", encoding="utf-8", errors="replace", newline="") as file:
            rows = list(csv.DictReader(file))
    except (OSError, csv.Error):
        return []
    return [row for row in rows if None not in row.values() and row.get("step", "").isdigit()]


def read_samples(folder):
    """The blocks of samples.md, each from its heading to the next."""
    path = folder / "samples.md"
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    return re.findall(r"^## Step \d.*?(?=^## Step |\Z)", text, re.M | re.S)


class StopRequest:
    """Ctrl-C, SIGTERM or max_minutes: the run finishes its step, saves and ends."""

    TIME_IS_UP = 1  # stands in for a signal; those handled here have larger numbers

    def __init__(self, s, world):
        self.s, self.world, self.began = s, world, time.perf_counter()
        self.signal, self.received = 0, math.inf

    def handle(self, number, frame=None):
        # A second signal leaves at once; half a second, since torchrun sends the first one twice
        if self.signal and time.perf_counter() - self.received > 0.5:
            os._exit(128 + number)
        self.received, self.signal = time.perf_counter(), number

    @contextlib.contextmanager
    def listening(self):
        before = {}
        with contextlib.suppress(ValueError):  # raised where this is not the main thread
            for number in (signal.SIGINT, signal.SIGTERM):
                before[number] = signal.signal(number, self.handle)
        try:
            yield
        finally:
            for number, previous in before.items():
                signal.signal(number, previous)

    def requested(self, step):
        """Is it time to stop? Several processes agree on it in the steps that they log."""
        minutes = (time.perf_counter() - self.began) / 60
        if self.s.max_minutes and minutes >= self.s.max_minutes:
            self.signal = self.signal or self.TIME_IS_UP
        if self.world.size > 1:
            if step % self.s.log_every:
                return False
            self.signal = int(self.world.reduce(torch.tensor(self.signal), largest=True))
            self.received = time.perf_counter()  # a late signal is still the same one
        return self.signal > 0

    @property
    def status(self):
        """The exit status: 0 after max_minutes, else what a shell reports of the signal."""
        return 0 if self.signal == self.TIME_IS_UP else 128 + self.signal


# ---- Report and picture --------------------------------------------------------------------------

STYLE = """<style>text { font: 13px system-ui, sans-serif; fill: #1f2328 } .grid { stroke: #e4e8ec }
.mark { stroke: #818b98; stroke-dasharray: 6 4 } .c0 { color: #e8710a } .c1 { color: #2f80ed }
.c2 { color: #16a07a } polyline { fill: none; stroke-width: 2; stroke: currentColor } rect {
fill: #fff } tspan { fill: currentColor } @media (prefers-color-scheme: dark) { rect { fill: #0d1117 }
text { fill: #f0f6fc } .grid { stroke: #262c36 } }</style>"""


def write_report(run, rows):
    """Draw loss.svg and write report.md, from the log's rows and from samples.md."""
    s, c = run.s, run.model.config
    rows = [{name: float(value) for name, value in row.items() if value != ""} for row in rows]
    curves = {name: [(row["tokens"], row[name]) for row in rows if name in row]
              for name in LOG_COLUMNS}
    evaluated = [row for row in rows if "val_loss" in row]
    if not evaluated:
        return
    last, best = evaluated[-1], min(evaluated, key=lambda row: row["val_loss"])
    floor = {"floor": last["val_loss"] - last["above_floor"]} if "above_floor" in last else {}
    panels = [("nats per token, over the tokens read:", {
        "training": curves["train_loss"], "validation": curves["val_loss"]}, run.baselines | floor)]
    if floor:
        panels.append(("nats per token above the floor, for lack of:", {
            skill: curves[f"above_floor_{skill}"] for skill in run.data.meta["skills"]}, {}))
    write_text(run.folder / "loss.svg", draw(panels))
    speeds = [speed for _, speed in curves["tokens_per_second"]]
    scores = [row for row in rows if "hellaswag_acc" in row]
    facts = {
        "model": f"{run.model.num_parameters():,} parameters: {c.n_layer} layers, {c.n_head} "
                 f"heads, width {c.n_embd}, context {c.block_size}",
        "data": f"{s.data_dir}, {run.data.tokenizer.spec['kind']} vocabulary of {c.vocab_size:,}",
        "trained": f"{last['step']:,.0f} of {s.max_steps:,} steps, {last['tokens']:,.0f} tokens",
        "machine": f"{run.machine}, torch {torch.__version__}",
        "speed": f"{statistics.median(speeds):,.0f} tokens/s" if speeds else "",
        "time": duration(time.perf_counter() - run.began),
        "validation loss": in_words(last),
        "lowest": f"{best['val_loss']:.4f} at step {best['step']:,.0f}",
        "HellaSwag": f"{in_words(scores[-1])} (OpenAI's GPT-2: 29.45 %)" if scores else ""}
    table = "\n".join(f"| {name} | {words} |" for name, words in facts.items() if words)
    write_text(run.folder / "report.md", f"# {s.preset}\n\n![loss](loss.svg)\n\n| | |\n"
               f"| --- | --- |\n{table}\n\n" + "".join(read_samples(run.folder)))


def short(number):
    """1,500,000 -> 1.5M."""
    units = ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k"))
    size, letter = next((unit for unit in units if number >= unit[0]), (1, ""))
    return f"{number / size:.3g}{letter}"


def duration(seconds):
    units = ((3600, "h"), (60, "min"), (1, "s"))
    return next(f"{seconds / n:.3g} {name}" for n, name in units if seconds >= 2 * n or n == 1)


def draw(panels):
    """An SVG of panels, each (title, {curve: [(tokens, value)]}, {line: value}), with log axes."""
    width, height, body = 656, 250, []

    def text(x, y, words, anchor="start"):
        body.append(f'<text x="{x:.0f}" y="{y:.0f}" text-anchor="{anchor}">{words}</text>')

    for number, (title, curves, lines) in enumerate(panels):
        points = [point for curve in curves.values() for point in curve]
        tokens = [t for t, _ in points if t] or [1]  # step 0, of no tokens, is at the left edge
        values = [max(v, 1e-3) for v in (*(v for _, v in points), *lines.values())]
        x = log_scale(min(tokens) / 2, max(tokens), 0, width)
        y = log_scale(0.95 * min(values), 1.1 * max(values), height, 0)
        body.append(f'<g transform="translate(52, {34 + number * (height + 60)})">')
        text(0, -12, html.escape(title) + "".join(
            f' <tspan class="c{i}">&#160; {name}</tspan>' for i, name in enumerate(curves)))
        levels = [(n * 10.0**power, "grid") for power in range(-3, 3) for n in (1, 2, 5)]
        for value, style in [*levels, *((value, "mark") for value in lines.values())]:
            if 0 <= y(value) <= height:
                body.append(f'<path class="{style}" d="M0 {y(value):.1f} H{width}"/>')
                if style == "grid":
                    text(-6, y(value) + 4, f"{value:g}", "end")
        for name, value in lines.items():
            text(4, y(value) - 4, f"{html.escape(name)} {value:.4g}")
        for power in range(2, 13):
            if 0 <= x(10**power) <= width:
                text(x(10**power), height + 18, short(10**power), "middle")
        for i, curve in enumerate(curves.values()):
            some = curve[::max(1, len(curve) // 600)]
            path = " ".join(f"{max(0, x(t)):.1f},{y(v):.1f}" for t, v in some)
            body.append(f'<polyline class="c{i}" points="{path}"/>')
        body.append("</g>")
    size = f'viewBox="0 0 720 {len(panels) * (height + 60)}" width="720"'
    return (f'<svg xmlns="http://www.w3.org/2000/svg" {size}>{STYLE}<rect width="100%" '
            'height="100%"/>' + "\n".join(body) + "</svg>\n")


def log_scale(low, high, start, end):
    """A function from low .. high to start .. end, even in the logarithm."""
    low, high = math.log(low), math.log(high)
    return lambda value: start + (end - start) * (math.log(max(value, 1e-3)) - low) / (high - low)


# ---- The batches of a step, the rows of an epoch -------------------------------------------------


@dataclass
class Plan:
    rows_per_step: int  # over all processes
    micro_batch_size: int  # rows that one process handles at once


def plan_batch(s, world):
    """Deal the rows of a step to processes and micro-batches. Raises UserError if that fails."""
    rows, rest = divmod(s.total_batch_size, s.block_size)
    if rest or not rows or rows % world.size or (rows > s.batch_size and rows % s.batch_size):
        raise UserError(f"total_batch_size ({s.total_batch_size:,}) must be a multiple of "
                        f"block_size times processes ({s.block_size * world.size:,}) and, if it "
                        f"is larger, of batch_size * block_size ({s.batch_size * s.block_size:,})")
    share = rows // world.size
    # Processes on one CPU share its memory: together they take no more rows than one would
    most = max(1, min(s.batch_size // world.sharing, share))
    return Plan(rows, next(n for n in range(most, 0, -1) if share % n == 0))


def step_batches(loader, step, plan, world):
    """This process's part of a step, [(x, y), ...], and the targets in the whole step."""
    every_row = range(step * plan.rows_per_step, (step + 1) * plan.rows_per_step)
    targets = sum(loader.rows.locate(row)[2] for row in every_row)
    share = plan.rows_per_step // world.size
    mine, batches = every_row[world.rank * share:(world.rank + 1) * share], []
    for i in range(0, share, plan.micro_batch_size):
        pair = loader.batch(mine[i:i + plan.micro_batch_size])
        if world.device.type == "cuda":  # pinned memory: the copy runs beside the computation
            pair = [tensor.pin_memory() for tensor in pair]
        batches.append([tensor.to(world.device, non_blocking=True) for tensor in pair])
    return batches, targets


def prefetch(loader, start, stop, plan, world):
    """Yield the batches of each step; a thread prepares the next one meanwhile."""
    with ThreadPoolExecutor(max_workers=1) as pool:
        future = pool.submit(step_batches, loader, start, plan, world)
        for step in range(start, stop):
            ready = future.result()
            if step + 1 < stop:
                future = pool.submit(step_batches, loader, step + 1, plan, world)
            yield ready


class RowIndex:
    """Which tokens are row number g? With `eot`, a row is a document.

    Shards are shuffled, and the rows within a shard: an epoch reads one file after another, and
    memory holds the order of two shards at most. seed=None keeps everything in order.
    """

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

    def targets_before(self, row):
        """How many targets the rows 0 to row - 1 hold."""
        if self.eot is None:
            return row * self.block_size
        epochs, rest = divmod(row, self.per_epoch)
        whole = sum(int(self.cuts(0, shard)[1].sum()) for shard in range(len(self.shards)))
        return epochs * whole + sum(self.locate(before)[2] for before in range(row - rest, row))

    def _rng(self, *key):
        return np.random.default_rng([self.seed, *key])

    def _order(self, epoch):
        """The numbers of the shards in the order of this epoch."""
        n = len(self.shards)
        return range(n) if self.seed is None else self._rng(epoch).permutation(n).tolist()

    def _count(self, shard):
        """Rows of a shard, the same in every epoch."""
        if self.eot is not None or self.seed is None:
            return len(self.cuts(0, shard)[0])
        fit = (len(self.shards[shard]) - 1) // self.block_size
        return fit - 1 if fit > 1 else fit  # one row's length is left to shift the cuts

    def _cuts(self, epoch, shard):
        """Where the rows of a shard begin, and how many targets each has, in epoch order."""
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
        """Rows from each <|endoftext|> to the next. A document of 25 targets gives rows of 10, 10
        and 5 for block_size 10."""
        T, eots = self.block_size, np.flatnonzero(tokens == self.eot)
        marks = np.unique(np.concatenate(([0], eots, [len(tokens) - 1])))
        pieces = -(-np.diff(marks) // T)  # rows that each document takes, rounded up
        self.has_long_documents |= bool((pieces > 1).any())
        index = np.arange(pieces.sum()) - np.repeat(np.cumsum(pieces) - pieces, pieces)
        starts = np.repeat(marks[:-1], pieces) + T * index
        return starts, np.minimum(T, np.repeat(marks[1:], pieces) - starts)


# ---- Tokenizer -----------------------------------------------------------------------------------

END_OF_TEXT = "<|endoftext|>"
# How GPT-2 cuts text into words before it merges bytes (GPT-2 paper, section 2.2): English
# endings, letters, digits and other signs, each with the space before it, then white space
SPLIT_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


class Tokenizer:
    """Text <-> token ids. `spec` is what meta.json and checkpoints keep of it, one of

    {"kind": "gpt2"}: OpenAI's 50,257 tokens, through tiktoken;
    {"kind": "bpe", "ranks": [...]}: a byte-level BPE, its tokens in order, a character per byte;
    {"kind": "char", "alphabet": "..."}: the characters of one corpus;
    {"kind": "sentencepiece", "model": "..."}: a SentencePiece model in base64.

    `eot` is the id of <|endoftext|>, None for char; no text is encoded to it. Raises UserError for
    another spec, and where a vocabulary or library cannot be loaded.
    """

    def __init__(self, spec):
        self.spec = spec
        try:
            kind = spec["kind"]
            if kind == "char":
                self.alphabet, self.eot = spec["alphabet"], None
                self.ids = {character: i for i, character in enumerate(self.alphabet)}
                if not 0 < len(self.ids) == len(self.alphabet.encode("utf-32-le")) // 4:
                    raise ValueError("characters must be distinct")
            elif kind == "bpe":
                tokens = [token.encode("latin-1") for token in spec["ranks"]]
                ranks, self.eot = {token: i for i, token in enumerate(tokens)}, len(tokens)
                if len(ranks) != self.eot or not {bytes([i]) for i in range(256)} <= ranks.keys():
                    raise ValueError("tokens must be distinct and hold all 256 bytes")
                self.encoding = tiktoken.Encoding(
                    "bpe", pat_str=SPLIT_PATTERN, mergeable_ranks=ranks,
                    special_tokens={END_OF_TEXT: self.eot})
            elif kind == "sentencepiece":
                import sentencepiece
                self.pieces = sentencepiece.SentencePieceProcessor(
                    model_proto=base64.b64decode(spec["model"]))
                self.eot = self.pieces.get_piece_size()
            elif kind == "gpt2":
                self.encoding, self.eot = gpt2_encoding(), 50256
            self.vocab_size = len(self.alphabet) if self.eot is None else self.eot + 1
        except (LookupError, TypeError, ValueError, AttributeError, RuntimeError,
                ImportError) as error:
            raise UserError(f"no tokenizer can be made of {str(spec)[:60]} ({error})") from None

    @property
    def document_start(self):
        """The ids before a document: <|endoftext|>, or a line break in a corpus of characters."""
        return [self.eot] if self.eot is not None else [self.ids.get("\n", 0)]

    def encode(self, text):
        """str -> list of ids. Raises UserError for a character that a char vocabulary lacks."""
        if self.eot is None:
            if unknown := set(text) - self.ids.keys():
                raise UserError(f"the vocabulary has no {min(unknown)!r}; its {self.vocab_size} "
                                f"characters are {self.alphabet[:200]!r}")
            return [self.ids[character] for character in text]
        if self.spec["kind"] == "sentencepiece":
            return self.pieces.encode(text)
        return self.encoding.encode_ordinary(text)  # "<|endoftext|>" in a text is plain text

    def decode_bytes(self, ids):
        """ids -> bytes, which may end inside a character."""
        if self.eot is None:
            return "".join(self.alphabet[i] for i in ids).encode("utf-8")
        if self.spec["kind"] != "sentencepiece":
            return self.encoding.decode_bytes(ids)
        pieces = (END_OF_TEXT if i == self.eot else self.pieces.id_to_piece(i) for i in ids)
        return b"".join(bytes([int(piece[3:5], 16)]) if re.fullmatch("<0x..>", piece) else
                        piece.replace("\u2581", " ").encode("utf-8") for piece in pieces)

    def decode(self, ids):
        """ids -> str, with U+FFFD for bytes that are not UTF-8."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def token_bytes(self):
        """(vocab_size,) int64: bytes of text per token; 0 for <|endoftext|>."""
        return np.array([0 if i == self.eot else len(self.decode_bytes([i]))
                         for i in range(self.vocab_size)])


@functools.cache
def gpt2_encoding():
    try:
        return tiktoken.get_encoding("gpt2")
    except (OSError, ValueError) as error:  # a failed download, a wrong hash
        raise UserError(f"GPT-2's vocabulary cannot be loaded ({type(error).__name__}): set "
                        "TIKTOKEN_CACHE_DIR to a folder that has it, or prepare data with "
                        "--tokenizer=bpe, which needs no network") from None


def encode_prompt(model, text):
    """The ids to start from: an empty prompt begins a document, and so does every prompt of a
    model whose training rows all did."""
    if model.tokenizer is None:
        raise UserError("this model has no tokenizer: give token ids instead of text")
    ids = model.tokenizer.encode(text)
    return ids if ids and not model.starts_documents else model.tokenizer.document_start + ids


# ---- Shards and meta.json ------------------------------------------------------------------------


def read_shard(path):
    """A shard's tokens as a memory map, (n,) uint16. Raises UserError for a damaged one.

    llm.c's format: 256 int32 (magic 20240520, version 1, token count), then uint16 tokens.
    """
    try:
        size, header = os.path.getsize(path), np.fromfile(path, "<i4", count=256).tolist()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    if header[:2] != [20240520, 1] or len(header) < 256:
        raise UserError(f"{path} is not a shard: make it with prepare_data.py")
    if header[2] < 1 or size != 1024 + 2 * header[2]:
        raise UserError(f"{path} should hold {header[2]:,} tokens, but has {(size - 1024) // 2:,}: "
                        "it was cut short; prepare it again")
    return np.memmap(path, "<u2", mode="r", offset=1024, shape=(header[2],))


def shard_paths(data_dir):
    """{"train": [...], "val": [...]}: the last of both words in a .bin file's name decides."""
    paths = {"train": [], "val": []}
    for path in sorted(Path(data_dir).glob("*.bin")):
        if words := re.findall("train|val", path.name):
            paths[words[-1]].append(path)
    for split, found in paths.items():
        if not found:
            raise UserError(f"there are no {split} shards (*_{split}_*.bin) in {data_dir}; "
                            f"{how_to_prepare(data_dir)}")
    return paths


def how_to_prepare(data_dir):
    """The command that makes a preset's data, for messages."""
    name, options = Path(data_dir).name, f"FILE.txt --out_dir={data_dir}"
    if name in ("stories", "shakespeare", "tinystories", "fineweb_edu", "hellaswag"):
        options = name
    elif name == "fineweb_edu_bpe":
        options = "fineweb_edu --tokenizer=bpe --vocab_size=9157 --max_tokens=99_000_000"
    return f"make them with: python prepare_data.py {options}"


@dataclass
class Data:
    """What meta.json says of a folder of shards."""

    meta: dict
    tokenizer: Tokenizer
    skills: np.ndarray | None = None  # (n,): which of meta["skills"] predicts a validation token

    @property
    def vocab_size(self):
        return self.tokenizer.vocab_size

    @property
    def eot(self):
        return self.tokenizer.eot


def open_data(data_dir):
    """Read meta.json; shards without one are GPT-2 tokens. Raises UserError where it is damaged."""
    path = Path(data_dir) / "meta.json"
    if not os.path.isdir(data_dir):
        raise UserError(f"there is no data in {data_dir}; {how_to_prepare(data_dir)}")
    if not os.path.exists(path):
        if Path(data_dir) != HELLASWAG.parent:  # which --eval_only takes as well
            shard_paths(data_dir)
        return Data({"dataset": Path(data_dir).name}, Tokenizer({"kind": "gpt2"}))
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
        data = Data(meta, Tokenizer(meta["tokenizer"]))
        numbers = [meta.get("entropy_floor", 0), *meta.get("landmarks", {}).values()]
        if not meta["dataset"] or not all(0 <= number < math.inf for number in numbers):
            raise ValueError("a value is missing or impossible")
        if meta.get("skills"):
            data.skills = np.load(path.with_name("skills.npy"))
            if len(data.skills) != meta["val"]["tokens"] or data.skills.max() >= len(meta["skills"]):
                raise ValueError("skills.npy belongs to other shards")
        return data
    except (ValueError, LookupError, TypeError, AttributeError, OSError, EOFError,
            RecursionError, UserError) as error:
        raise UserError(f"{path} is not what prepare_data.py writes ({error}); "
                        f"{how_to_prepare(data_dir)}") from None


# ---- Files and checkpoints -----------------------------------------------------------------------

OPENAI_NAMES = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")


@contextlib.contextmanager
def writing(path):
    """Turn what a disk reports into a UserError; torch.save wraps it in a RuntimeError."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        reason = error if isinstance(error, OSError) else error.__context__
        if not isinstance(reason, OSError):
            raise
        raise UserError(f"cannot write {path} ({reason.strerror}): free some space there or choose "
                        "another folder; what was there before is intact") from None


def write_atomically(path, write):
    """Call write(file) on a file beside `path`; move it there once it is safely on the disk.

    A reader sees the old file or the new one, also after a power cut.
    """
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
            with contextlib.suppress(OSError):
                beside.unlink()


def write_text(path, text):
    write_atomically(path, lambda file: file.write(text.encode("utf-8")))


def append(path, text):
    with writing(path), open(path, "a", encoding="utf-8", newline="") as file:
        file.write(text)


@functools.cache
def model_code():
    """A hash of the syntax tree from GPTConfig to GPT; comments and docstrings do not count."""
    body = ast.parse(Path(__file__).read_text(encoding="utf-8")).body
    names = [getattr(node, "name", "") for node in body]
    part = ast.Module(body[names.index("GPTConfig"):names.index("GPT") + 1], [])
    for node in ast.walk(part):
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node):
            node.body = node.body[1:]
    return hashlib.sha256(ast.unparse(part).encode()).hexdigest()[:16]


def make_checkpoint(model, step=0, settings=None, best_val_loss=math.inf):
    """What best.pt holds; ckpt.pt holds the optimizer's state too."""
    return {"model": model.state_dict(), "step": step, "config": dataclasses.asdict(model.config),
            "settings": settings or {}, "best_val_loss": float(best_val_loss),
            "tokenizer": model.tokenizer.spec if model.tokenizer else {}, "code": model_code()}


def converted_path(name):
    """Where prepare_data.py puts the weights of `name`, one of OpenAI's or a folder."""
    name = f"openai-{name}" if name in OPENAI_NAMES else Path(name).resolve().name
    return Path("out") / name / "best.pt"


def load_checkpoint(path, hint=""):
    """The dict in a checkpoint, its tensors still in the file.

    Only plain data is unpickled, and shapes are compared with the config before anything of their
    size is allocated. Raises UserError, with a hint, for all that is no checkpoint.
    """
    if path in OPENAI_NAMES:
        path, hint = converted_path(path), f"make it with: python prepare_data.py {path}"
    elif os.path.isdir(path):
        hint = f"name the best.pt of a run, or convert a model: python prepare_data.py {path}"
    if not os.path.isfile(path):
        hint = hint or f"train one, or name one of {', '.join(OPENAI_NAMES)}"
        raise UserError(f"there is no checkpoint {path}: {hint}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        for key, kind in dict(model=dict, step=int, config=dict, settings=dict, tokenizer=dict,
                              best_val_loss=float).items():
            if not isinstance(checkpoint[key], kind):
                raise TypeError(f"{key} is of another type")
        with torch.device("meta"):  # shapes without memory
            model = GPT(GPTConfig(**checkpoint["config"]))
        expected = {name: tensor.shape for name, tensor in model.state_dict().items()}
        if expected != {name: tensor.shape for name, tensor in checkpoint["model"].items()}:
            raise ValueError("its weights do not fit its config")
        if not all(tensor.isfinite().all() for tensor in checkpoint["model"].values()):
            raise ValueError("its weights are not finite")
        spec = checkpoint["tokenizer"]
        if spec and Tokenizer(spec).vocab_size != model.config.vocab_size:
            raise ValueError("its tokenizer does not fit its config")
    except Exception as error:  # a damaged file can fail in dozens of ways
        if is_out_of_memory(error):
            raise
        reason = f"{type(error).__name__}: {str(error).strip()}".split("\n")[0][:200]
        raise UserError(f"{path} is no checkpoint, or damaged ({reason}); {hint}") from None
    return checkpoint


def load_model(path, device="cpu", **changes):
    """The model in a checkpoint, parts of its config changed, ready to generate text."""
    checkpoint = load_checkpoint(path)
    model = GPT(GPTConfig(**checkpoint["config"] | changes))
    model.load_state_dict(checkpoint["model"])
    model.tokenizer = Tokenizer(checkpoint["tokenizer"]) if checkpoint["tokenizer"] else None
    model.starts_documents = checkpoint["settings"].get("rows") == "documents"
    model.is_edited = checkpoint.get("code", model_code()) != model_code()
    return model.to(device).eval()


def load_training_state(path, model, optimizer, scaler, tokenizer):
    """Load weights, optimizer and scaler from ckpt.pt; return (step, lowest validation loss)."""
    checkpoint = load_checkpoint(path, start_over(path.parent))
    params = [p for group in optimizer.param_groups for p in group["params"]]
    try:
        if checkpoint["tokenizer"] != tokenizer.spec:
            raise ValueError("the data has another tokenizer now")
        model.load_state_dict(checkpoint["model"])
        state = copy.deepcopy(checkpoint["optimizer"]["state"])  # out of the mapped file
        for i, p in enumerate(params):
            if not state[i] or any(t.shape not in ((), p.shape) for t in state[i].values()):
                raise ValueError("the optimizer's state has other shapes")
        optimizer.load_state_dict(optimizer.state_dict() | {"state": state})
        if scaler.is_enabled():
            scaler.load_state_dict(checkpoint["optimizer"]["scaler"])
    except (LookupError, ValueError, RuntimeError, TypeError, AttributeError) as error:
        reason = str(error).split("\n")[0]
        raise UserError(f"{path} does not fit ({reason}); {start_over(path.parent)}") from None
    return checkpoint["step"], checkpoint["best_val_loss"]


# ---- Devices and processes -----------------------------------------------------------------------


class World:
    """This process among its siblings (torchrun starts one per GPU), its device and precision."""

    def __init__(self, s):
        self.rank = int(os.environ.get("RANK", 0))
        self.size = int(os.environ.get("WORLD_SIZE", 1))
        self.is_master = self.rank == 0  # the process that writes and prints
        self.device = pick_device(s.device, os.environ.get("LOCAL_RANK", "0"))
        self.at_end = contextlib.ExitStack()  # what must be closed, however the run ends
        on_cuda = self.device.type == "cuda"
        # The processes on one CPU share its memory
        self.sharing = 1 if on_cuda else int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        if self.size > 1 and self.device.type == "mps":
            raise UserError("several processes cannot train on MPS: add --device=cpu")
        if on_cuda:
            torch.cuda.set_device(self.device)
            torch.set_float32_matmul_precision("high")  # TF32 for products in float32
        if s.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS asks for it
            torch.use_deterministic_algorithms(True)
        if self.size > 1:
            dist.init_process_group("nccl" if on_cuda else "gloo")
        self.dtype = pick_dtype(s.dtype, self.device)

    def compute_as(self, s, earlier):
        """Settle precision and threads: those of the run to resume, where there is one."""
        self.dtype = pick_dtype(earlier.get("dtype", s.dtype), self.device)
        s.dtype = str(self.dtype).removeprefix("torch.")
        if "threads" in earlier:  # of all processes together
            torch.set_num_threads(max(1, earlier["threads"] // self.size))

    def autocast(self):
        """Inside, matrix products are in self.dtype; norms, softmax and losses in float32."""
        enabled = self.dtype != torch.float32
        return torch.autocast(self.device.type, self.dtype) if enabled else contextlib.nullcontext()

    def accumulating(self, model, more_to_come):
        """DDP averages gradients over the processes; it waits for the last micro-batch."""
        return model.no_sync() if self.size > 1 and more_to_come else contextlib.nullcontext()

    def reduce(self, tensor, largest=False):
        """The sum of a tensor over all processes, or the largest."""
        if self.size > 1:
            tensor = tensor.to(self.device)  # NCCL wants it on the GPU
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

    def close(self):
        self.at_end.close()
        if self.size > 1 and dist.is_initialized():
            dist.destroy_process_group()


def pick_device(name, local_rank=0):
    """CUDA, else MPS, else CPU; or the one named. Raises UserError where that is not here."""
    if name == "auto":
        has_mps = torch.backends.mps.is_available()
        name = "cuda" if torch.cuda.is_available() else "mps" if has_mps else "cpu"
    try:
        device = torch.device(f"cuda:{local_rank}" if name == "cuda" else name)
        torch.zeros(1, device=device).item()
        return device
    except (RuntimeError, AssertionError):
        raise UserError(f"torch has no device {name!r} for process {local_rank} here: leave out "
                        "--device to take the best, and start one process per GPU") from None


def pick_dtype(name, device):
    """bfloat16 where the hardware computes it, float16 on older CUDA cards, else float32."""
    if name != "auto":
        return getattr(torch, name)
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if native else torch.float16
    has_bfloat16 = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    return torch.bfloat16 if device.type == "cpu" and has_bfloat16() else torch.float32


def wait_for(device):
    """Return when the device has finished; a GPU works on while Python goes ahead."""
    {"cuda": torch.cuda.synchronize, "mps": torch.mps.synchronize}.get(device.type, int)()


def compiled_and_parallel(model, s, world):
    """The model that takes the training steps: compiled, and wrapped for several processes."""
    if s.compile_model is True or (s.compile_model == "auto" and world.device.type == "cuda"):
        try:  # a missing compiler shows only when it is used
            x = torch.zeros(8, device=world.device, requires_grad=True)
            torch.compile(lambda x: x.exp().sum())(x).backward()
            model = torch.compile(model)
        except Exception as error:
            if world.is_master:
                print(f"warning: torch.compile does not work here ({type(error).__name__}); "
                      "training goes on without it")
    if world.size > 1:
        devices = [world.device.index] if world.device.type == "cuda" else None
        # Gradients as views of the buffers they travel in: 6 GB less for GPT-2 XL
        model = nn.parallel.DistributedDataParallel(
            model, device_ids=devices, gradient_as_bucket_view=True)
    return model


def keep_memory():
    """Let glibc keep large blocks. Otherwise it returns them to the kernel after every step and
    gets them again page by page: half of the time with GPT-2's 200 MB of logits."""
    with contextlib.suppress(OSError, AttributeError):  # not glibc
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-4, 0)  # M_MMAP_MAX: no block gets a mapping of its own
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: the heap is not cut back


def is_out_of_memory(error):
    """CUDA has an exception of its own; other devices have only words."""
    words = "out of memory|can't allocate memory|not enough memory"
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and re.search(words, str(error)) is not None)


def mix(*numbers):
    """One 64-bit seed from several whole numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])


# ---- Building a model ----------------------------------------------------------------------------


def build_model(s, data, world):
    """On the device: a new model of the settings' shape, or the one in --init_from."""
    if s.init_from:
        model = load_model(s.init_from, dropout=s.dropout, attention=s.attention)
        own = model.tokenizer
        if own.spec != data.tokenizer.spec if own else model.config.vocab_size != data.vocab_size:
            raise UserError(f"{s.init_from} and {s.data_dir} have different tokenizers: prepare "
                            "the data with that of the model")
    else:
        shape = {f.name: getattr(s, f.name) for f in dataclasses.fields(GPTConfig)
                 if f.name != "vocab_size"}
        model = GPT(GPTConfig(vocab_size=data.vocab_size, **shape), s.init_std)
    model.tokenizer, model.starts_documents = data.tokenizer, s.rows == "documents"
    return model.to(world.device)


def adopt_shape(s, given):
    """With --init_from, take the shape from its weights; rows may be shorter."""
    if s.eval_only and not s.init_from:
        s.init_from = str(Path(s.out_dir or f"out/{s.preset}") / "best.pt")
    config = load_checkpoint(s.init_from)["config"] if s.init_from else {}
    for name in config.keys() & {"n_layer", "n_head", "n_embd", "pos_encoding", "activation"}:
        if given.get(name, config[name]) != config[name] and os.environ.get("RANK", "0") == "0":
            print(f"note: --{name} is ignored: {s.init_from} has {config[name]}")
        setattr(s, name, config[name])
    if config and s.block_size > config["block_size"] and "block_size" in given:
        raise UserError(f"block_size {s.block_size} is more than the {config['block_size']} "
                        f"positions of {s.init_from}")
    if "block_size" not in given:
        s.block_size = config.get("block_size", s.block_size)


def check_shape(config):
    """Raise UserError for a shape that cannot be built."""
    c = config
    sizes = [c.vocab_size, c.block_size, c.n_layer, c.n_head, c.n_embd]
    if not all(type(size) is int and 0 < size <= 2**24 for size in sizes) or c.n_layer > 1024 \
            or c.n_embd % c.n_head or (c.pos_encoding == "sinusoidal" and c.n_embd % 2) \
            or c.pos_encoding not in ("learned", "sinusoidal") or not 0 <= c.dropout < 1 \
            or c.n_embd * (c.block_size + c.vocab_size + 12 * c.n_layer * c.n_embd) > 2.5e11:
        raise UserError(
            f"no model has this shape: {c}. Sizes are whole numbers above 0, n_layer at most "
            "1,024, n_embd divisible by n_head (and even for sinusoidal positions), all weights "
            "below 1,000 GB")


def sinusoids(block_size, n_embd, std):
    """(block_size, n_embd): sines and cosines (Attention paper, section 3.5).

    They are scaled to the size of the embeddings, std: at their own size of 1 they would drown
    embeddings of 0.02, and training would stall.
    """
    position = torch.arange(block_size, dtype=torch.float32)[:, None]  # (T, 1)
    i = torch.arange(0, n_embd, 2, dtype=torch.float32)  # (C/2,)
    angle = position * 10_000 ** (-i / n_embd)  # (T, C/2)
    table = torch.stack((angle.sin(), angle.cos()), dim=2).flatten(1)  # (T, C)
    return std * math.sqrt(2) * table  # the rms of a sine is 1/sqrt(2)


def unembed(x, weight):
    """(B, T, C) states, (V, C) embedding -> (B, T, V) logits."""
    if not (x.is_cuda and len(weight) % 64):
        return F.linear(x, weight)
    # Tensor cores want multiples of 64 (50,257 -> 50,304): rows of zeros are added for this
    # product, and their logits cut off again
    return F.linear(x, F.pad(weight, (0, 0, 0, -len(weight) % 64)))[..., :len(weight)]


# ---- Evaluation ----------------------------------------------------------------------------------

HELLASWAG = Path("data/hellaswag/hellaswag_val.jsonl")


def token_losses(logits, targets):
    """(B, T, V), (B, T) -> (B, T) float32 on the CPU: nats of each target, 0 for -1."""
    # 256 tokens at a time: in float32 all logits may take more memory than the model
    pieces = zip(logits.flatten(0, 1).split(256), targets.flatten().split(256), strict=True)
    nats = [F.cross_entropy(some.float(), wanted, ignore_index=-1, reduction="none")
            for some, wanted in pieces]
    return torch.cat(nats).view(targets.shape).cpu()


@torch.no_grad()
def evaluate(model, loader, s, world, data):
    """Measure the validation rows, always the same ones. Returns columns of the log:

    val_loss (nats per token), val_bits_per_byte, and where the entropy floor is known for just
    these rows, the nats above it for lack of each skill. Batches are dealt to the processes and
    summed in one order, so that every number of processes finds the same.
    """
    count = loader.rows_per_epoch
    if s.eval_tokens is not None:
        count = min(count, max(1, s.eval_tokens // s.block_size))
    skills, whole = {"": 0}, count == loader.rows_per_epoch
    if data.skills is not None and loader.rows.eot and whole and not loader.rows.has_long_documents:
        skills = data.meta["skills"]  # {name: its part of the floor}
    bounds = np.cumsum([0, *map(len, loader.shards)])  # where each shard begins
    token_bytes = torch.from_numpy(data.tokenizer.token_bytes())
    at_once = max(1, 4096 // s.block_size)  # fits wherever training fits
    batches = [range(i, min(i + at_once, count)) for i in range(0, count, at_once)]
    sums = torch.zeros((len(batches), 2 + len(skills)), dtype=torch.float64)
    was_training = model.training
    model.eval()
    for i in range(world.rank, len(batches), world.size):
        x, y = (tensor.to(world.device) for tensor in loader.batch(batches[i]))
        with world.autocast():
            logits, _ = model(x)
        nats, known = token_losses(logits, y), y.cpu() != -1
        nats, targets = nats[known].double(), y.cpu()[known]  # (tokens,), row after row
        skill = np.zeros(len(targets), np.int64)
        if len(skills) > 1:
            places = map(loader.rows.locate, batches[i])
            skill = np.concatenate([data.skills[bounds[shard] + start + 1:][:length]
                                    for shard, start, length in places])
        by_skill = np.bincount(skill, nats, minlength=len(skills))
        sums[i] = torch.tensor([len(targets), token_bytes[targets].sum(), *by_skill])
    model.train(was_training)
    tokens, size, *nats = world.reduce(sums).cpu().sum(dim=0).tolist()
    found = {"val_loss": sum(nats) / tokens,
             "val_bits_per_byte": sum(nats) / math.log(2) / size if size else math.nan}
    if len(skills) > 1:
        found["above_floor"] = found["val_loss"] - data.meta["entropy_floor"]
        for (name, floor), n in zip(skills.items(), nats, strict=True):
            found[f"above_floor_{name}"] = n / tokens - floor
    return found


@torch.no_grad()
def hellaswag(model, questions, world):
    """Which of its four endings does the model expect of each question (Zellers et al. 2019)?

    A question is (context, [four endings], number of the right one). Returns (questions, 2)
    int64: the ending with the lowest total loss, and the one with the lowest loss per token. The
    context is read once; its endings go on from the cache as one batch.
    """
    tokenizer, block_size = model.tokenizer, model.config.block_size
    losses = torch.zeros((len(questions), 4, 2))
    was_training = model.training
    model.eval()
    for number in range(world.rank, len(questions), world.size):
        context, endings, _ = questions[number]
        endings = [tokenizer.encode(ending)[:block_size] for ending in endings]
        sizes = torch.tensor([len(ending) for ending in endings])
        longest = int(sizes.max())
        context = tokenizer.encode(context) or tokenizer.document_start
        context = context[-(block_size + 1 - longest):]
        x, y = torch.zeros((4, longest), dtype=torch.int64), torch.full((4, longest), -1)
        for row, ending in enumerate(endings):
            # The context's last token predicts the ending's first
            x[row, :len(ending)] = torch.tensor([context[-1], *ending[:-1]])
            y[row, :len(ending)] = torch.tensor(ending)
        x, y = x.to(world.device), y.to(world.device)
        cache = KVCache(len(context) - 1 + longest)
        with world.autocast():
            if len(context) > 1:
                model(torch.tensor([context[:-1]], device=world.device), cache=cache)
                cache.store = {layer: [room.repeat(4, 1, 1, 1) for room in rooms]
                               for layer, rooms in cache.store.items()}
            logits, _ = model(x, y, cache)  # (4, longest, V)
        nats = token_losses(logits, y).sum(dim=1)  # (4,)
        losses[number] = torch.stack((nats, nats / sizes), dim=1)
    model.train(was_training)
    return world.reduce(losses).argmin(dim=1).cpu()


def read_questions():
    """HellaSwag's questions, if prepare_data.py has fetched them."""
    try:
        rows = [json.loads(line) for line in HELLASWAG.read_text(encoding="utf-8").splitlines()]
        return [(row["ctx"], [" " + row["endings"][i] for i in range(4)], int(row["label"]))
                for row in rows]
    except FileNotFoundError:
        return []
    except (ValueError, LookupError, TypeError, OSError) as error:
        raise UserError(f"{HELLASWAG} is damaged ({type(error).__name__}): remove it, then: python "
                        "prepare_data.py hellaswag") from None


def hellaswag_scores(model, world):
    """{"hellaswag_acc", "hellaswag_acc_norm" (per token)}; empty where there are no questions, or
    for another vocabulary than GPT-2's, whose scores would compare with nobody's."""
    is_gpt2 = model.tokenizer.spec["kind"] == "gpt2"
    questions = world.from_master(read_questions) if is_gpt2 else []
    if not questions:
        return {}
    right = torch.tensor([[label] for _, _, label in questions])
    acc, acc_norm = (hellaswag(model, questions, world) == right).double().mean(dim=0).tolist()
    return {"hellaswag_acc": acc, "hellaswag_acc_norm": acc_norm}


def in_words(found):
    """What evaluate() or hellaswag_scores() returned, in words."""
    if "hellaswag_acc" in found:
        return f"acc {found['hellaswag_acc']:.2%}, acc_norm {found['hellaswag_acc_norm']:.2%}"
    loss = found["val_loss"]
    text = f"{loss:.4f}, {found['val_bits_per_byte']:.3f} bits per byte"
    if "above_floor" in found:
        floor, skills = loss - found["above_floor"], ("wording", "choices", "recall")
        parts = ", ".join(f"{skill} {found[f'above_floor_{skill}']:.3f}" for skill in skills)
        text += f", {100 * (loss / floor - 1):.1f} % above the floor of {floor:.4f} ({parts})"
    return text


def report_evaluation(s, world):
    """Instead of train(): print what --eval_only=True measures; return the exit status."""
    data = open_data(s.data_dir)
    model = build_model(s, data, world)
    found = {}
    if Path(s.data_dir) != HELLASWAG.parent:
        loader = ShardedLoader(s.data_dir, "val", s.block_size, s.rows, None, data.vocab_size,
                               data.eot)
        found["validation loss"] = evaluate(model, loader, s, world, data)
    found["HellaSwag"] = hellaswag_scores(model, world)
    for name, scores in found.items():
        if scores and world.is_master:
            print(f"{s.init_from} on {s.data_dir}: {name} {in_words(scores)}")
    return 0


def matmul_speed(device, dtype, n=2048):
    """FLOP/s of this machine in an n x n x n product: the median of ten."""
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    seconds = []
    for _ in range(12):
        began = time.perf_counter()
        a @ b
        wait_for(device)
        seconds.append(time.perf_counter() - began)
    return 2 * n**3 / statistics.median(seconds[2:])  # the first two warm up


def flops_per_token(model, T):
    """FLOPs per token of training on rows of T tokens (PaLM, Chowdhery et al. 2022, appendix B).

    6 per parameter, 2 forward and 4 backward, and 12 * n_layer * n_embd * T for attention.
    Position embeddings are added, not multiplied.
    """
    c = model.config
    positions = c.block_size * c.n_embd if c.pos_encoding == "learned" else 0
    return 6 * (model.num_parameters() - positions) + 12 * c.n_layer * c.n_embd * T


# ---- The command line ----------------------------------------------------------------------------

# What nanoGPT's users will type first
OTHER_NAMES = {
    "max_iters": "max_steps", "lr_decay_iters": "max_steps", "eval_interval": "eval_every",
    "eval_iters": "eval_tokens", "log_interval": "log_every", "dataset": "data_dir",
    "gradient_accumulation_steps": "grad_accum_steps", "start": "prompt"}
# The constants above as we ship them, so that an edited one that a preset overrides is noticed
SHIPPED = dict(
    data_dir="data/stories", rows="documents", batch_size=16, block_size=112,
    total_batch_size=None, max_steps=1800, warmup_steps=50, learning_rate=6e-3, min_lr=0.0,
    beta1=0.9, beta2=0.95, dropout=0.0, n_layer=3, n_head=4, n_embd=96, pos_encoding="learned",
    activation="gelu", init_std=0.02, eval_every=100, eval_tokens=None, sample_every=600,
    checkpoint_every=300, log_every=20)


class UserError(Exception):
    """A mistake that the user can correct."""


def reports_mistakes(main):
    """Decorate a script's main(): a UserError becomes `error: ...` on stderr and exit status 2.

    Ctrl-C gives one line and 130; a closed pipe, as behind `| head`, 141. The rest are bugs and
    keep their traceback.
    """
    @functools.wraps(main)
    def wrapper(argv=None):
        for stream in (sys.stdout, sys.stderr):
            if hasattr(stream, "reconfigure"):  # Windows would write an old code page
                stream.reconfigure(encoding="utf-8", errors="replace")
        try:
            status = main(argv)
            print(end="", flush=True)  # a closed pipe shows here, not at the interpreter's end
            return status
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise SystemExit(141) from None
        except UserError as error:
            if os.environ.get("RANK", "0") != "0":
                time.sleep(3)  # most mistakes meet all processes: the first one tells them
            print(f"error: {error}", file=sys.stderr, flush=True)
            raise SystemExit(2) from None
        except KeyboardInterrupt:
            print("stopped", file=sys.stderr)
            raise SystemExit(130) from None
    return wrapper


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(message.removeprefix("argument "))


def converter(kind):
    """A function from an option's text to a value of a setting's type."""
    choices = (True, False) if kind is bool else typing.get_args(kind)

    def convert(text):
        for choice in choices:
            if str(choice).lower() == text.lower():
                return choice
        if type(None) in choices and text.lower() == "none":
            return None
        number = choices[0] if type(None) in choices else kind
        try:
            value = os.path.expanduser(text) if kind is str else number(text)
            if number is float and not math.isfinite(value):
                raise ValueError
            return value
        except (ValueError, TypeError):
            wanted = {int: "a whole number", float: "a number"}.get(
                number, f"one of {', '.join(map(str, choices))}")
            raise argparse.ArgumentTypeError(f"{text!r} must be {wanted}") from None
    return convert


def make_parser(cls, doc, presets, bare):
    """An argparse parser of a Settings class, whose comments are the help and name the groups."""
    kinds = typing.get_type_hints(cls)
    rows = [f"  {name:<17}" + " ".join(f"{key}={value}" for key, value in changes.items())
            for name, changes in (presets or {}).items()]
    parser = Parser(
        description=doc, epilog="\n".join(["presets:", *(row[:100] for row in rows)]) * bool(rows),
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, 32, 32, 100),
        allow_abbrev=False)
    group, pattern = parser, r"^    (?:# (.*)|(\w+): .*?(?:  # (.*))?)$"
    for heading, name, comment in re.findall(pattern, inspect.getsource(cls), re.M):
        if heading:
            group = parser.add_argument_group(heading)
        else:
            group.add_argument(
                f"--{name}", type=converter(kinds[name]), default=argparse.SUPPRESS,
                metavar=str(getattr(cls, name)), help=comment.replace("%", "%%"))
    if bare:
        parser.add_argument(f"bare_{bare}", nargs="?", metavar=bare, help=argparse.SUPPRESS)
    return parser


def parse_settings(cls, argv=None, doc="", presets=None, bare=None):
    """(settings, {name: value} given on the command line), of a script's Settings class.

    Order: defaults, preset, command line. `bare` is the setting that a word without dashes sets.
    Raises UserError for what is no setting or not of its type; --help prints and exits.
    """
    kinds, words = typing.get_type_hints(cls), []
    argv = list(sys.argv[1:] if argv is None else argv)
    for word, following in zip(argv, [*argv[1:], ""], strict=True):
        name, equals, value = word.partition("=")
        if word.startswith("--"):
            name = "--" + name[2:].replace("-", "_")
            # A bare flag means True; argparse would take the next word as its value
            is_flag = kinds.get(name[2:]) is bool and following.lower() not in ("true", "false")
            word = name + (equals + value if equals else "=True" if is_flag else "")
        words.append(word)
    found, extra = make_parser(cls, doc, presets, bare).parse_known_args(words)
    given = vars(found)
    if bare and (value := given.pop(f"bare_{bare}")) is not None:
        given.setdefault(bare, value)
    for word in extra:
        name = word.partition("=")[0].lstrip("-")
        near = [OTHER_NAMES.get(name)] if OTHER_NAMES.get(name) in kinds else \
            difflib.get_close_matches(name, kinds, 1, 0.5)
        raise UserError(f"{word!r} is no setting" + (
            f"; did you mean --{near[0]}?" if near and word.startswith("-") else
            f" (see --help); a {bare} with spaces stands in quotes" if bare else " (see --help)"))
    preset = given.get("preset", getattr(cls, "preset", None))
    if presets and preset not in presets:
        raise UserError(f"there is no preset {preset!r}, only {', '.join(presets)}")
    return cls(**(presets[preset] if presets else {}) | given), given


def check_ranges(s, **ranges):
    """Raise UserError for a setting outside its (least, most)."""
    for name, (least, most) in ranges.items():
        value = getattr(s, name)
        if value is not None and not least <= value <= most:
            raise UserError(f"{name} is {value:,}: it must be from {least:,} to {most:,}")


def check_settings(s):
    """Raise UserError for a value out of range; fill in total_batch_size."""
    size, amount, share = (1, 2**53), (0, 1e9), (0, 0.9999999)
    check_ranges(
        s, batch_size=(1, 2**20), block_size=(1, 2**24), total_batch_size=size, seed=(0, 2**63 - 1),
        grad_accum_steps=size, max_steps=size, warmup_steps=(0, 2**53), eval_every=size,
        eval_tokens=size, sample_every=size, checkpoint_every=size, log_every=size,
        learning_rate=amount, min_lr=(0, s.learning_rate), weight_decay=amount, grad_clip=amount,
        max_minutes=(1e-9, 1e9), init_std=(1e-9, 1e9), beta1=share, beta2=share, dropout=share)
    per_step = s.batch_size * s.block_size
    if s.grad_accum_steps:
        s.total_batch_size = per_step * s.grad_accum_steps
    s.total_batch_size = s.total_batch_size or per_step
    check_ranges(s, total_batch_size=(1, 2**27))


def prepare_stories(s):
    """The default preset makes its own data."""
    if s.data_dir == Settings.data_dir and not (Path(s.data_dir) / "meta.json").exists():
        script = Path(__file__).with_name("prepare_data.py")
        print(f"no data in {s.data_dir} yet: running python {script.name}", flush=True)
        command = [sys.executable, str(script), "stories", f"--out_dir={s.data_dir}"]
        if subprocess.run(command).returncode:
            raise UserError("prepare_data.py could not write the stories; its message is above")


@reports_mistakes
def main(argv=None):
    s, given = parse_settings(Settings, argv, __doc__, PRESETS)
    adopt_shape(s, given)
    check_settings(s)
    keep_memory()
    world = World(s)
    try:
        if world.is_master:
            changes = PRESETS[s.preset] | given
            print(f"preset {s.preset}: " + " ".join(f"{k}={v}" for k, v in changes.items()))
            edited = [name for name in PRESETS[s.preset].keys() - given.keys()
                      if getattr(Settings, name) != SHIPPED[name]]
            if edited:
                print(f"note: preset {s.preset} overrides the edited {', '.join(sorted(edited))}")
        world.from_master(lambda: prepare_stories(s))
        return report_evaluation(s, world) if s.eval_only else train(s, world)
    except (RuntimeError, MemoryError) as error:
        if is_out_of_memory(error):
            steps = max(1, s.total_batch_size // (s.batch_size * s.block_size))
            raise UserError(f"{world.device} is out of memory: halve --batch_size ({s.batch_size}) "
                            f"and double --grad_accum_steps ({steps}); without --overwrite, the "
                            "run goes on from its last checkpoint") from None
        if world.size > 1 and (isinstance(error, dist.DistError) or "peer" in str(error)):
            print(f"error: process {world.rank} ends because another one was killed or failed: see "
                  "above; the same command, without --overwrite, resumes the run", file=sys.stderr,
                  flush=True)
            raise SystemExit(1) from None
        raise
    finally:
        world.close()


if __name__ == "__main__":
    sys.exit(main())
