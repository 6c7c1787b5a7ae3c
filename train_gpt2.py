"""Train a GPT-2 by yourself, in one file that you can read in an evening.

    python train_gpt2.py                              # offline: writes little stories, learns to tell them, 3 minutes
    python train_gpt2.py --n_layer=2 --max_steps=500  # every setting below is also an option; --help lists them
    python train_gpt2.py --preset=gpt2                # GPT-2 124M, once `python prepare_data.py fineweb_edu` has run
    torchrun --standalone --nproc_per_node=8 train_gpt2.py --preset=gpt2      # the same run on eight GPUs

Part 1 is the lesson: settings, the model, batches, the schedule and the optimizer, the loop. Part 2 is the machinery
(formats, devices, checkpoints, the command line); skip it on a first reading.

Papers that the comments cite: GPT-2 (Radford et al. 2019, "Language Models are Unsupervised Multitask Learners"),
GPT (Radford et al. 2018), GPT-3 (Brown et al. 2020), Attention (Vaswani et al. 2017, "Attention Is All You Need").
"""
import contextlib
import copy
import dataclasses
import difflib
import errno
import functools
import hashlib
import html
import importlib.util
import inspect
import json
import math
import os
import re
import shlex
import signal
import statistics
import subprocess
import sys
import textwrap
import time
import typing
import warnings
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

# ======================================================================================================================
# PART 1: THE LESSON
# ======================================================================================================================
# ---- Settings --------------------------------------------------------------------------------------------------------


@dataclass
class Settings:
    # Edit these, or give them as options: --max_steps=200. As they stand they are the preset `stories`.
    preset: str = "stories"  # a row of PRESETS, which changes some of the settings below
    data_dir: str = "data/stories"  # shards and meta.json, as prepare_data.py writes them
    out_dir: str = ""  # where the run is kept; empty: out/<preset>
    init_from: str = ""  # weights to start from, and their shape: a checkpoint, gpt2 .. gpt2-xl, or a folder
    overwrite: bool = False  # start over in out_dir, where a run of other settings would take the next free folder
    seed: int = 1  # decides the first weights, the order of the data and dropout
    # the machine
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # of the matrix products; weights stay float32
    compile_model: Literal["auto", True, False] = "auto"  # torch.compile; auto: on CUDA, where it pays
    attention: Literal["flash", "manual"] = "flash"  # a fused kernel, where it is faster, or the lines it stands for
    deterministic: bool = False  # the same bits again on a GPU too, more slowly
    # the batch
    rows: Literal["stream", "documents"] = "documents"  # cut the text every block_size tokens, or a document a row
    batch_size: int = 16  # rows that a process handles at once: lower it when memory runs out
    block_size: int = 112  # tokens in a row: how far the model looks back; the longest story has 108, 112 in sixteens
    total_batch_size: int | None = None  # tokens per optimizer step over all processes; None: batch_size * block_size
    grad_accum_steps: int | None = None  # the same, said otherwise, and it wins: total = batch_size * block_size * this
    # the optimization
    max_steps: int = 1800  # optimizer steps in the whole run
    max_minutes: float | None = None  # end after so much time, the cosine too: for a session that is cut off
    warmup_steps: int = 50  # the rate rises for so many steps
    learning_rate: float = 6e-3  # its peak: small models bear high rates
    min_lr: float = 0.0  # where the cosine ends
    weight_decay: float = 0.1  # GPT-3 paper, appendix B
    beta1: float = 0.9  # how long Adam's average of gradients lasts: some 1 / (1 - beta1) steps
    beta2: float = 0.95  # and that of their squares (GPT-3 paper, appendix B)
    grad_clip: float = 1.0  # the longest gradient allowed (GPT-3 paper, appendix B); 0: any length
    dropout: float = 0.0  # share of numbers set to 0, others each step, so that none relies on one; for data seen often
    # the model
    n_layer: int = 3  # blocks, one after another
    n_head: int = 4  # attentions side by side in each
    n_embd: int = 96  # the width: numbers that describe one token
    pos_encoding: Literal["learned", "sinusoidal"] = "learned"  # how a token knows its place: a table, or sines
    activation: Literal["gelu", "relu"] = "gelu"  # the bend between the two matrices of an MLP
    init_std: float = 0.02  # spread of the first weights (GPT paper, section 4.1); narrower models bear more
    # what is shown, and how often (in steps)
    eval_only: bool = False  # measure init_from, or else out_dir's best.pt, and train nothing
    eval_every: int = 100  # validation loss, picture and report
    eval_tokens: int | None = None  # validation tokens to look at each time; None: all, of which the known best speaks
    sample_every: int = 600  # a text; HellaSwag (which of 4 endings fits?) once it is prepared, with GPT-2's tokens
    checkpoint_every: int = 300  # what a kill can cost, at most
    log_every: int = 20  # a line on the screen and in log.csv


# Each preset lists what it changes. The larger sisters of gpt2 take the rates of the GPT-3 paper, table 2.1.
_CHARS = dict(data_dir="data/shakespeare", rows="stream")
_GPT2 = dict(
    data_dir="data/fineweb_edu", rows="stream", n_layer=12, n_head=12, n_embd=768, block_size=1024, batch_size=32,
    total_batch_size=524_288,  # 2^19: GPT-3 paper, table 2.1, has 0.5M tokens a step for this size
    max_steps=19_073,  # * 2^19 tokens = 10 billion: the whole of FineWeb-Edu's sample, once
    warmup_steps=715,  # * 2^19 = 375 million tokens: GPT-3 paper, appendix B
    learning_rate=6e-4, min_lr=6e-5,  # GPT-3 paper, table 2.1; down to 10 %: appendix B
    eval_every=250, eval_tokens=10_485_760, sample_every=1000, checkpoint_every=1000, log_every=10)
PRESETS = {
    "stories": {},
    "shakespeare_char": _CHARS | dict(  # for one GPU; 80 epochs of 1 MB: dropout keeps it from learning them by heart
        n_layer=6, n_head=6, n_embd=384, block_size=256, dropout=0.2, batch_size=64, max_steps=5000, warmup_steps=100,
        learning_rate=1e-3, min_lr=1e-4, beta2=0.99,  # nanoGPT's, for steps of few tokens: a longer average
        eval_every=250, sample_every=1000, checkpoint_every=1000, log_every=10),
    "shakespeare_cpu": _CHARS | dict(  # of some 70 tried the fastest to 1.88, thanks to larger first weights above all
        n_layer=4, n_head=4, n_embd=128, block_size=64, init_std=0.07, batch_size=16, max_steps=620, warmup_steps=50,
        learning_rate=6e-3, beta1=0.75, beta2=0.98, eval_every=310, sample_every=310, checkpoint_every=310),
    "tinystories_char": dict(  # so small that a CPU takes minutes: 5 million characters of it are read
        data_dir="data/tinystories", rows="stream", n_layer=4, n_head=4, n_embd=64, block_size=32, activation="relu",
        batch_size=16, max_steps=10_000, warmup_steps=100, learning_rate=1e-3, min_lr=1e-4, eval_every=500,
        eval_tokens=200_000, sample_every=2500, checkpoint_every=2500, log_every=100),
    "gpt2_nano": dict(  # 32,768 tokens a step, 3.3 epochs of 99 million
        data_dir="data/fineweb_edu_bpe", rows="stream", n_layer=12, n_head=8, n_embd=512, block_size=1024,
        pos_encoding="sinusoidal", activation="relu", batch_size=32, max_steps=10_000, warmup_steps=200,
        learning_rate=3e-4, eval_every=500, eval_tokens=1_048_576, sample_every=1000, checkpoint_every=1000),
    "gpt2_mini": dict(  # 65,536 tokens * 7,629 = 0.5 billion: a session on a free GPU; small, it bears a higher rate
        data_dir="data/fineweb_edu", rows="stream", n_layer=6, n_head=6, n_embd=384, block_size=1024, batch_size=16,
        total_batch_size=65_536, max_steps=7629, warmup_steps=200, learning_rate=1e-3, min_lr=1e-4, eval_every=250,
        eval_tokens=1_048_576, sample_every=1000, checkpoint_every=500, log_every=10),
    "gpt2": _GPT2,
    "gpt2_medium": _GPT2 | dict(n_layer=24, n_head=16, n_embd=1024, batch_size=16, learning_rate=3e-4, min_lr=3e-5),
    "gpt2_large": _GPT2 | dict(n_layer=36, n_head=20, n_embd=1280, batch_size=8, learning_rate=2.5e-4, min_lr=2.5e-5),
    "gpt2_xl": _GPT2 | dict(n_layer=48, n_head=25, n_embd=1600, batch_size=4, learning_rate=2e-4, min_lr=2e-5),
}


# ---- The model -------------------------------------------------------------------------------------------------------
# In the comments on shapes: B rows in a batch, T tokens in a row, C = n_embd, V = vocab_size. Linear is nn.Linear, and
# linear F.linear, by the fastest product that the machine has (Part 2).


@dataclass
class GPTConfig:
    """The shape of a model: everything that must be known to rebuild it around its weights."""

    vocab_size: int = 50257
    block_size: int = 1024
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0
    pos_encoding: str = "learned"
    activation: str = "gelu"
    attention: str = "flash"


def attend(q, k, v, dropout=0.0, flash=True):
    """Scaled dot-product attention (Attention paper, section 3.2.1): every token takes a weighted mean of the values
    of the tokens up to itself. q is (B, n_head, T, head_dim), k and v (B, n_head, S, head_dim): S is T, or more where q
    has only the last T of S tokens. Returns the shape of q."""
    T, S = q.size(-2), k.size(-2)
    # The CPU's fused kernel is the slower one in bfloat16: by 1.6 times on 2 rows of 1,024 tokens, 6 on 24 rows of 64
    if flash and not (q.is_cpu and q.dtype == torch.bfloat16):
        # It has the mask built in for T = S, and a single new token needs none: everything is before it
        seen = None if T in (1, S) else torch.ones(T, S, dtype=torch.bool, device=q.device).tril(S - T)
        return F.scaled_dot_product_attention(q, k, v, seen, dropout, is_causal=T == S)
    scores = q / math.sqrt(q.size(-1)) @ k.transpose(-2, -1)  # (B, n_head, T, S); the root keeps their spread near 1
    # Above the diagonal lies the future, which must not help: e^-inf is a weight of 0
    scores = scores + torch.full((T, S), -math.inf, dtype=scores.dtype, device=q.device).triu(1 + S - T)
    weights = F.dropout(F.softmax(scores, dim=-1), dropout)  # (B, n_head, T, S); before dropout a row adds up to 1
    return weights.to(v.dtype) @ v  # (B, n_head, T, head_dim)


class CausalSelfAttention(nn.Module):
    """The part where tokens exchange information. Each asks (q), offers a key (k) and hands over a value (v);
    n_head such exchanges run side by side, each in its own slice of the width."""

    def __init__(self, config):
        super().__init__()
        self.n_head, self.dropout, self.flash = config.n_head, config.dropout, config.attention == "flash"
        self.c_attn = Linear(config.n_embd, 3 * config.n_embd)  # q, k and v in one product
        self.c_proj = Linear(config.n_embd, config.n_embd)
        self.resid_dropout = nn.Dropout(config.dropout)

    def forward(self, x, cache=None):
        B, T, C = x.shape
        qkv = self.c_attn(x).view(B, T, 3, self.n_head, C // self.n_head).permute(2, 0, 3, 1, 4)
        q, k, v = qkv  # (B, T, 3C) -> (B, T, 3, n_head, head_dim) -> (3, B, n_head, T, head_dim)
        if cache is not None:  # in sampling and HellaSwag: the keys and values of the tokens before these
            k, v = cache.extend(self, qkv[1:])  # (B, n_head, tokens so far, head_dim)
        y = attend(q, k, v, self.dropout if self.training else 0.0, self.flash)
        y = y.transpose(1, 2).reshape(B, T, C)  # the heads side by side again
        return self.resid_dropout(self.c_proj(y))


class MLP(nn.Module):
    """Multi-layer perceptron, where each token thinks for itself: four times as wide inside (GPT paper, 4.1)."""

    def __init__(self, config):
        super().__init__()
        self.c_fc = Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = Linear(4 * config.n_embd, config.n_embd)
        # GPT-2's GELU is the tanh approximation (Hendrycks & Gimpel 2016, section 2)
        self.act = nn.GELU(approximate="tanh") if config.activation == "gelu" else nn.ReLU()
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x):
        return self.dropout(self.c_proj(self.act(self.c_fc(x))))  # (B, T, C) -> (B, T, 4C) -> (B, T, C)


class Block(nn.Module):
    """x + attention, then x + MLP. The sums leave a straight road for the gradient from the loss to the embeddings. A
    norm brings the C numbers of a token to mean 0 and spread 1, then scales and shifts them as learned; it stands on
    the side road (GPT-2 paper, section 2.3), for on the main one it would bend that gradient in every block."""

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
    """GPT-2: token ids in; out, for each position, V logits: scores whose softmax says how likely each next token is.

    `model(idx, targets)` takes (B, T) int64 ids and returns `(logits, loss)`: logits (B, T, V), and the mean of
    -ln(probability of the target), in nats a token, over the targets that are not -1. Without targets the loss is None.
    With a cache (KVCache) idx is what follows the tokens in it, and the logits are (B, 1, V), of the last token.
    Raises UserError for a config that cannot be built and ValueError for rows longer than block_size."""

    def __init__(self, config, init_std=0.02):
        super().__init__()
        check_shape(config)
        self.config = config
        self.tokenizer = None  # set where a model is read from disk; generate() needs it to take and return text
        self.starts_documents = False  # does a prompt need <|endoftext|> before it? True after rows="documents"
        self.transformer = nn.ModuleDict(dict(  # all names are OpenAI's, so that their weights fit
            wte=nn.Embedding(config.vocab_size, config.n_embd),  # a vector for each token ...
            wpe=nn.Embedding(config.block_size, config.n_embd),  # ... and for each position: attention sees no order
            drop=nn.Dropout(config.dropout),
            h=nn.ModuleList([Block(config) for _ in range(config.n_layer)]),
            ln_f=nn.LayerNorm(config.n_embd),  # x has grown with every block (GPT-2 paper, section 2.3)
        ))
        # First weights: norms keep their ones, biases are 0, matrices random, as in the GPT paper, section 4.1. The
        # 2 * n_layer products that are added to x would make its spread grow with the root of their number; so they
        # start smaller by that root (GPT-2 paper, section 2.3), and a deep model starts as calmly as a shallow one.
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif parameter.dim() == 2:
                is_added = name.endswith("c_proj.weight")
                nn.init.normal_(parameter, std=init_std / math.sqrt(2 * config.n_layer) if is_added else init_std)
        if config.pos_encoding == "sinusoidal":
            table = sinusoids(config.block_size, config.n_embd, init_std)
            self.transformer.wpe.weight = nn.Parameter(table, requires_grad=False)

    def forward(self, idx, targets=None, cache=None):
        start, T = cache.length if cache is not None else 0, idx.size(1)
        if start + T > self.config.block_size:
            raise ValueError(f"{start + T} tokens do not fit into block_size {self.config.block_size}")
        position = torch.arange(start, start + T, device=idx.device)  # (T,)
        x = self.transformer.drop(self.transformer.wte(idx) + self.transformer.wpe(position))  # (B, T, C) + (T, C)
        for block in self.transformer.h:
            x = block(x, cache)
        if cache is not None:
            x = cache.advance(x)  # only positions whose predictions are asked for: in sampling the last, (B, 1, C)
        # How well does each token's embedding fit what the network wants to say? The matrix of embeddings serves twice
        # (weight tying, Press & Wolf 2017): 39M parameters saved in GPT-2, and a better loss
        logits = linear(self.transformer.ln_f(x), self.transformer.wte.weight)  # (B, T, V)
        if targets is None:
            return logits, None
        # float32: a mean over many tokens needs more than bfloat16's three digits
        return logits, F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=-1)

    def generate(self, prompt, max_new_tokens=100, temperature=1.0, top_k=None, top_p=None, seed=None):
        """Text in, text out (with its prompt, ending before <|endoftext|>); or a (B, T) tensor of ids in and a
        (B, T + max_new_tokens) tensor out. Temperature 0 takes the likeliest token; top_k and top_p keep only the
        likeliest tokens to choose from. The same seed gives the same text. `stream` states what happens to texts
        longer than block_size. Raises UserError for a prompt that the vocabulary cannot write."""
        options = dict(temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
        if isinstance(prompt, torch.Tensor):
            return torch.cat([prompt, *(t[:, None] for t, _ in stream(self, prompt, max_new_tokens, **options))], dim=1)
        ids, new = encode_prompt(self, prompt), []
        for token, _ in stream(self, torch.tensor([ids], device=self.device), max_new_tokens, **options):
            if token.item() == self.tokenizer.eot:
                break
            new.append(token.item())
        return prompt + self.tokenizer.decode(new)

    @property
    def device(self):
        return self.transformer.wte.weight.device

    def num_parameters(self):
        """How many numbers are learned. The embedding serves twice, and counts once."""
        return sum(p.numel() for p in self.parameters() if p.requires_grad)

    @classmethod
    def from_checkpoint(cls, path, device="cpu"):
        """The model in a checkpoint that training wrote, ready to sample from. Raises UserError if it is none."""
        return model_from(load_checkpoint(path), device)

    @classmethod
    def from_pretrained(cls, name, device="cpu"):
        """OpenAI's weights by name (gpt2 .. gpt2-xl), or a folder of transformers'. Raises UserError if it is none."""
        return model_from(read_pretrained(name), device)

    def save_pretrained(self, folder):
        """Writes a folder that transformers' AutoModelForCausalLM and AutoTokenizer open."""
        write_pretrained(self, folder)


# ---- Batches from shards ---------------------------------------------------------------------------------------------


class ShardedLoader:
    """Rows of tokens from a folder of shards, which stay on disk and are mapped into memory.

    Row number g is a pure function of (seed, g, the shards, block_size): `batch(rows)` needs no state, so a run can
    stop and go on anywhere, on any number of processes. Each epoch sees every row once, in another order (RowIndex).
    `rows="stream"` cuts the tokens every block_size, from another place each epoch; `rows="documents"` gives each
    document its own row. seed=None keeps the order of the text, for evaluation. Raises UserError where the folder
    holds no such shards or too few tokens for one row."""

    def __init__(self, data_dir, split, block_size, rows="stream", seed=None, vocab_size=50257, eot=50256):
        self.block_size, self.vocab_size, self.paths = block_size, vocab_size, shard_paths(data_dir)[split]
        self.shards = [read_shard(path) for path in self.paths]
        if rows == "documents" and eot is None:
            raise UserError(f"{data_dir} is one text without <|endoftext|>: it has no documents; use --rows=stream")
        self.rows = RowIndex(self.shards, block_size, seed, eot if rows == "documents" else None)
        self.rows_per_epoch = self.rows.per_epoch
        if not self.rows_per_epoch:
            raise UserError(f"{data_dir}: {sum(map(len, self.shards))} {split} tokens are too few: lower --block_size")

    def batch(self, rows):
        """For a list of row numbers: inputs and targets, both (B, T) int64 tensors, T the longest of these rows,
        rounded up to a multiple of 16. Each target is the token after its input; past the end of a shorter row targets
        are -1, which the loss ignores."""
        places = [self.rows.locate(row) for row in rows]
        longest = max(length for _, _, length in places)
        T = min(self.block_size, -(-longest // 16) * 16)  # of few kinds: libraries set up a kernel for each
        x, y = np.zeros((len(rows), T), np.int64), np.full((len(rows), T), -1, np.int64)
        for i, (shard, start, length) in enumerate(places):
            tokens = self.shards[shard][start:start + length + 1]
            if tokens.max() >= self.vocab_size:
                raise UserError(f"{self.paths[shard]} holds token {tokens.max()}, but the vocabulary ends at "
                                f"{self.vocab_size - 1}: prepare the data again, or mend its meta.json")
            x[i, :length], y[i, :length] = tokens[:-1], tokens[1:]
        return torch.from_numpy(x), torch.from_numpy(y)


# ---- Schedule and optimizer ------------------------------------------------------------------------------------------


def learning_rate(step, s, time_used=0.0):
    """Linear warm-up, because Adam's first averages come from few gradients and at the full rate would throw the fresh
    weights about; then a cosine from learning_rate down to min_lr (GPT paper, section 4.1): large steps to get there,
    small ones to settle. It ends with the steps, or with max_minutes where `time_used`, their share, is ahead."""
    if step < s.warmup_steps:
        return s.learning_rate * (step + 1) / s.warmup_steps
    progress = (step - s.warmup_steps) / max(1, s.max_steps - s.warmup_steps)  # 0 -> 1
    progress = min(1.0, max(progress, time_used))
    return s.min_lr + (s.learning_rate - s.min_lr) * 0.5 * (1 + math.cos(math.pi * progress))


def make_optimizer(model, s, device):
    """AdamW (Loshchilov & Hutter 2019). Adam moves each number by lr * (average of its gradients) / (root of average of
    their squares): by about lr, however large they are, so that one rate suits all. The W is for weight decay: the
    matrices also shrink by lr * weight_decay of themselves, which keeps them from growing without need; biases and
    norms are few and set the scale of things, so they are left alone."""
    learned = [p for p in model.parameters() if p.requires_grad]
    groups = [{"params": [p for p in learned if p.dim() >= 2], "weight_decay": s.weight_decay},
              {"params": [p for p in learned if p.dim() < 2], "weight_decay": 0.0}]
    # eps keeps the root from 0 (GPT-3 paper, appendix B); fused: one kernel for all parameters, not several for each
    return torch.optim.AdamW(groups, lr=s.learning_rate, betas=(s.beta1, s.beta2), eps=1e-8,
                             fused=device.type in ("cuda", "cpu"))


# ---- The loop --------------------------------------------------------------------------------------------------------


def train(s, world):
    """The whole of training: read a batch, measure the loss, step downhill, again. `s` holds the settings, `world` the
    devices and processes. Row n of the log describes the weights after n steps. Returns the exit status."""
    data = open_data(s.data_dir)
    torch.manual_seed(s.seed)
    raw_model = build_model(s, data, world)
    validation = ShardedLoader(s.data_dir, "val", s.block_size, s.rows, None, data.vocab_size, data.eot)
    plan = plan_batch(s, world)  # rows in a step, and how many of them a process handles at once
    optimizer = make_optimizer(raw_model, s, world.device)
    loader = ShardedLoader(s.data_dir, "train", s.block_size, s.rows, s.seed, data.vocab_size, data.eot)
    # float16 ends at 6e-8, and many gradients are smaller: the scaler multiplies the loss, and so them, by a large
    # number and divides again before the step (Micikevicius et al. 2018). Other dtypes do not need it: it does nothing
    scaler = torch.amp.GradScaler(world.device.type, enabled=world.dtype == torch.float16)
    run = Run(s, raw_model, optimizer, scaler, data, world)
    start = run.resume_or_begin()
    # The same weights in a faster wrapping: raw_model evaluates, samples and is saved, model takes the steps
    model = compiled_and_parallel(raw_model.train(), s, world)
    if world.device.type == "cuda":
        fit_in_memory(model, optimizer, plan, s, world)
    run.announce(plan, loader)

    with run.interruptible(), contextlib.closing(prefetch(loader, start, s.max_steps, plan, world)) as batches:
        for step in range(start, s.max_steps + 1):
            # One pass more than there are steps: the last weights too are evaluated and saved
            last = step == s.max_steps or run.time_used >= 1
            if step > start and (last or step % s.checkpoint_every == 0):
                run.save(step)
            if last or step % s.eval_every == 0:
                run.evaluate(step, validation)
            if last or (step and step % s.sample_every == 0):
                run.show_sample(step)
            if last:
                return run.finished(step)

            lr = learning_rate(step, s, run.time_used)
            for group in optimizer.param_groups:
                group["lr"] = lr
            micro_batches, targets_in_step = next(batches)
            loss_sum = torch.zeros((), device=world.device)
            # Gradients of micro-batches add up as if all rows had fit into memory at once (gradient accumulation)
            for micro_step, (x, y) in enumerate(micro_batches):
                # Seeded afresh, so that dropout too depends on nothing but the place in the run
                torch.manual_seed(mix(s.seed, step, micro_step, world.rank))
                # DistributedDataParallel averages all processes' gradients with the last micro-batch, not before
                with world.accumulating(model, micro_step < len(micro_batches) - 1):
                    # Matrix products in world.dtype are several times as fast. Weights and optimizer stay float32,
                    # for bfloat16's three digits would round most steps away
                    with world.autocast():
                        _, loss = model(x, y)  # x, y: (rows, T); documents differ in length, and so T does
                    # A mean over this micro-batch becomes its share of the mean over the whole step, all processes'
                    loss = loss * ((y != -1).sum() / targets_in_step)
                    scaler.scale(loss * world.size).backward()  # times their number, by which DDP's average divides
                loss_sum += loss.detach()
            scaler.unscale_(optimizer)
            # A rare batch can give a huge gradient, which Adam's averages would remember for many steps; clipping
            # bounds its length and keeps its direction
            grad_norm = nn.utils.clip_grad_norm_(raw_model.parameters(), s.grad_clip or math.inf)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            run.after_step(step, targets_in_step, loss_sum, lr, grad_norm)
            if run.stop_requested(step) and step + 1 < s.max_steps:
                return run.stopped(step + 1)


# ======================================================================================================================
# PART 2: THE MACHINERY (skip this on a first reading)
# ======================================================================================================================


class UserError(Exception):
    """A mistake that its maker can mend. `reports_mistakes` turns it into one line and exit status 2."""


def reports_mistakes(main):
    """Decorates a script's main(): a UserError becomes `error: ...` on stderr and exit status 2, Ctrl-C one line and
    130, a reader such as `head` that has had enough 141, as SIGPIPE would; anything else is a bug and stays one."""
    @functools.wraps(main)
    def wrapper(argv=None):
        for stream in (sys.stdout, sys.stderr):
            if hasattr(stream, "reconfigure"):  # Windows would write redirected text in a code page of 256 characters
                stream.reconfigure(encoding="utf-8", errors="replace")
        try:
            try:
                return main(argv)
            finally:
                print(end="", flush=True)  # not later, when nobody could catch what it raises
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise SystemExit(141) from None
        except UserError as error:
            if os.environ.get("RANK", "0") != "0":
                # Most mistakes are met by all processes, and told by the first. Where it has met the same one it is
                # gone by now, and torchrun ends this process in its sleep; if not, it must be told from here.
                time.sleep(3)
            print(f"error: {error}", file=sys.stderr, flush=True)
            raise SystemExit(2) from None
        except KeyboardInterrupt:
            print("stopped", file=sys.stderr)
            raise SystemExit(130) from None
    return wrapper


def is_out_of_memory(error):
    """Does this exception say so? CUDA has a class of its own for it, other devices have only words."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or isinstance(error, RuntimeError) and bool(
        re.search("out of memory|can't allocate memory|not enough memory", str(error)))


def physical_memory():
    """This machine's, in bytes; infinite where the system does not say."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # Windows has no sysconf
        return math.inf


def mix(*numbers):
    """One 64-bit seed from several whole numbers, so that (1, 2) and (2, 1) have nothing in common."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])


# ---- Tokenizer -------------------------------------------------------------------------------------------------------

END_OF_TEXT = "<|endoftext|>"
NO_ID = 65_535  # of no character: an alphabet has at most 65,535
# How GPT-2 cuts text into words before it merges bytes (GPT-2 paper, section 2.2): English endings, letters, digits
# and other signs, each with the space before it, then white space. The pattern is part of the published tokenizer.
SPLIT_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""


class Tokenizer:
    """Text <-> token ids. `spec` is what meta.json and checkpoints keep of it, one of
    {"kind": "gpt2"}: OpenAI's 50,257 tokens, through tiktoken;
    {"kind": "bpe", "ranks": [...]}: a byte-level BPE by train_bpe, its tokens in order, a character for each byte;
    {"kind": "char", "alphabet": "..."}: the characters of one corpus.
    `eot` is the id of <|endoftext|>, None for char; it never comes out of encoding text. Raises UserError for a spec
    that is none of these, and where GPT-2's vocabulary cannot be loaded."""

    def __init__(self, spec):
        self.spec = spec
        kind = spec.get("kind") if isinstance(spec, dict) else None
        if kind == "char" and isinstance(spec.get("alphabet"), str) and spec["alphabet"]:
            self.alphabet, self.eot = spec["alphabet"], None
            if len(set(self.alphabet)) != len(self.alphabet) or re.search("[\ud800-\udfff]", self.alphabet):
                raise UserError("the `alphabet` of a char tokenizer must be distinct characters")
            self.ids = {character: i for i, character in enumerate(self.alphabet)}
            self.vocab_size = len(self.alphabet)
        elif kind == "bpe":
            try:
                tokens = [token.encode("latin-1") for token in spec["ranks"]]
            except (KeyError, TypeError, AttributeError, UnicodeEncodeError):
                raise UserError("a bpe tokenizer needs `ranks`: strings with a character for each byte") from None
            if len(set(tokens)) != len(tokens) or len({t for t in tokens if len(t) == 1}) != 256:
                raise UserError("the `ranks` of a bpe tokenizer must be distinct and hold all 256 bytes")
            import tiktoken
            self.eot, self.vocab_size = len(tokens), len(tokens) + 1
            self.encoding = tiktoken.Encoding("bpe", pat_str=SPLIT_PATTERN, special_tokens={END_OF_TEXT: self.eot},
                                              mergeable_ranks={token: i for i, token in enumerate(tokens)})
        elif kind == "gpt2":
            self.encoding, self.eot, self.vocab_size = gpt2_encoding(), 50256, 50257
        else:
            raise UserError(f"unknown tokenizer {str(spec)[:60]!r}: it must be of kind gpt2, bpe (with ranks) or char "
                            "(with an alphabet)")

    @property
    def document_start(self):
        """The ids after which a document begins: <|endoftext|>, or a line break in a corpus of characters."""
        return [self.eot] if self.eot is not None else [self.ids.get("\n", 0)]

    def encode(self, text):
        """str -> list of ids. Raises UserError for a character that a char vocabulary lacks."""
        if self.eot is not None:  # <|endoftext|> inside a text is text like any other
            return self.encoding.encode_ordinary(text)
        try:
            return [self.ids[character] for character in text]
        except KeyError as error:
            raise UserError(f"the vocabulary of {self.vocab_size} characters has no {error.args[0]!r}; it has: "
                            f"{''.join(c for c in self.alphabet if c.isprintable())[:200]}") from None

    def encode_array(self, text):
        """str -> (n,) uint16 ids, the fastest way, for whole corpora."""
        if self.eot is None:
            points = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4")
            if len(points) and (points.max() >= len(self.by_point) or self.by_point[points].max() == NO_ID):
                self.encode(text)  # says which character it is
            return self.by_point[points]
        try:
            ids = self.encoding.encode_to_numpy(text, disallowed_special=())
        except UnicodeEncodeError:  # half of a UTF-16 pair, as JSON can hold it, is no character
            ids = self.encoding.encode_to_numpy(text.encode("utf-16", "surrogatepass").decode("utf-16", "replace"),
                                                disallowed_special=())
        return ids.astype(np.uint16)

    @functools.cached_property
    def by_point(self):
        """(largest code point + 1,) uint16: the id of each character by its number in Unicode."""
        table = np.full(max(map(ord, self.alphabet)) + 1, NO_ID, np.uint16)
        table[[ord(character) for character in self.alphabet]] = np.arange(self.vocab_size)
        return table

    def decode_bytes(self, ids):
        """ids -> bytes, which may end inside a character."""
        if self.eot is None:
            return "".join(self.alphabet[i] for i in ids).encode("utf-8")
        return self.encoding.decode_bytes(ids)

    def decode(self, ids):
        """ids -> str, with U+FFFD for bytes that are no UTF-8."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def token_bytes(self):
        """(vocab_size,) int64: how many bytes of text each token stands for; <|endoftext|> for none."""
        return np.array([0 if i == self.eot else len(self.decode_bytes([i])) for i in range(self.vocab_size)])


@functools.cache
def gpt2_encoding():
    """tiktoken's GPT-2. Raises UserError where its vocabulary is not cached and cannot be downloaded."""
    import tiktoken
    try:
        return tiktoken.get_encoding("gpt2")
    except (OSError, ValueError) as error:  # requests' errors are OSErrors; a wrong hash is a ValueError
        raise UserError(f"GPT-2's vocabulary cannot be loaded ({type(error).__name__}): set TIKTOKEN_CACHE_DIR to a "
                        "folder that has it, or prepare data with --tokenizer=bpe, which needs no network") from None


# ---- Shards and meta.json --------------------------------------------------------------------------------------------

SHARD_MAGIC, SHARD_VERSION = 20240520, 1  # llm.c's numbers: 256 int32 of header, then uint16 tokens, little-endian


def write_shard(path, tokens):
    """Writes token ids, each below 65,536, as one shard, atomically: a list or an array of them, or a generator of
    arrays, which are written one behind the other and need not fit into memory together."""
    def write(file):
        header = np.zeros(256, "<i4")
        file.write(header.tobytes())  # keeps the place until the number of tokens is known
        for piece in tokens if inspect.isgenerator(tokens) else [tokens]:
            file.write(np.ascontiguousarray(piece, dtype="<u2").data)
        header[:3] = SHARD_MAGIC, SHARD_VERSION, (file.tell() - header.nbytes) // 2
        file.seek(0)
        file.write(header.tobytes())
    write_atomically(path, write)


def read_shard(path):
    """The tokens of a shard as a memory map, (n,) uint16. Raises UserError for a file that is no whole shard."""
    try:
        size = os.path.getsize(path)
        header = np.fromfile(path, "<i4", count=256)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    if len(header) < 256 or header[0] != SHARD_MAGIC or header[1] != SHARD_VERSION:
        raise UserError(f"{path} is no shard (256 int32, magic {SHARD_MAGIC}, version {SHARD_VERSION}): "
                        "make it with prepare_data.py")
    count = int(header[2])
    if count < 1 or size != 1024 + 2 * count:
        raise UserError(f"{path} says {count:,} tokens, but has room for {(size - 1024) // 2:,}: it was cut short or "
                        "changed; prepare it again")
    return np.memmap(path, "<u2", mode="r", offset=1024, shape=(count,))


def shard_paths(data_dir):
    """{"train": [...], "val": [...]}: every .bin file in the folder; the last of both words in its name decides."""
    paths = {"train": [], "val": []}
    for path in sorted(Path(data_dir).glob("*.bin")):
        words = re.findall("train|val", path.name)
        if words:
            paths[words[-1]].append(path)
    for split, found in paths.items():
        if not found:
            raise UserError(f"no {split} shards (*_{split}_*.bin) in {data_dir}; {how_to_prepare(data_dir)}")
    return paths


def how_to_prepare(data_dir):
    """The command that makes a preset's data, for messages."""
    commands = {"stories": "", "shakespeare": " shakespeare", "tinystories": " tinystories",
                "fineweb_edu": " fineweb_edu", "hellaswag": " hellaswag",
                "fineweb_edu_bpe": " fineweb_edu --tokenizer=bpe --vocab_size=9157 --max_tokens=99_000_000"}
    name = Path(data_dir).name
    if name not in commands:
        return "make them with: python prepare_data.py FILE.txt --out_dir=" + str(data_dir)
    return f"make them with: python prepare_data.py{commands[name]}"


@dataclass
class Data:
    """What meta.json says of a folder of shards."""

    meta: dict
    tokenizer: Tokenizer
    skills: np.ndarray | None = None  # (n,) for each validation token, which of meta["skills"] foresees it

    @property
    def vocab_size(self):
        return self.tokenizer.vocab_size

    @property
    def eot(self):
        return self.tokenizer.eot

    @functools.cached_property
    def token_bytes(self):
        return torch.from_numpy(self.tokenizer.token_bytes())


def open_data(data_dir):
    """Reads meta.json; a folder of shards without one is taken as GPT-2 tokens. Raises UserError where there is no
    data, or where meta.json is not what prepare_data.py writes."""
    path = Path(data_dir) / "meta.json"
    if not os.path.isdir(data_dir):
        raise UserError(f"there is no data in {data_dir}; {how_to_prepare(data_dir)}")
    if not os.path.exists(path):  # not path.exists, which fails where nobody may look
        if path.parent != HELLASWAG.parent:  # which --eval_only=True takes as well
            shard_paths(data_dir)
        return Data({"dataset": path.parent.name}, Tokenizer({"kind": "gpt2"}))
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(meta["dataset"], str) or not isinstance(meta["tokenizer"], dict):
            raise TypeError("dataset or tokenizer")
        for value in (meta.get("entropy_floor", 0), *meta.get("landmarks", {}).values()):
            if type(value) not in (int, float) or not 0 <= value < math.inf:
                raise ValueError(f"{value!r} nats")
        skills = np.load(path.with_name("skills.npy")) if meta.get("skills") else None
        if skills is not None and (skills.shape != (meta["val"]["tokens"],) or skills.max() >= len(meta["skills"])):
            raise ValueError("skills.npy belongs to other shards")
    except (ValueError, KeyError, TypeError, AttributeError, OSError, EOFError, RecursionError) as error:
        raise UserError(f"{path} is not what prepare_data.py writes ({type(error).__name__}: {error}); "
                        f"{how_to_prepare(data_dir)}") from None
    try:
        return Data(meta, Tokenizer(meta["tokenizer"]), skills)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


# ---- Files and checkpoints -------------------------------------------------------------------------------------------


def write_atomically(path, write):
    """Calls write(file) on a file beside `path`, and moves it there once it is whole and on the disk: whoever looks
    sees the old file or the new one, also after a power cut. Raises UserError where the disk does not take it."""
    path = Path(path)
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(beside, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            beside.unlink()
        reason = error.__context__ if isinstance(error, RuntimeError) else error  # torch.save wraps a full disk's error
        if not isinstance(reason, OSError):
            raise
        raise cannot_write(path, reason) from None


def cannot_write(path, error):
    """The UserError for an OSError in writing."""
    return UserError(f"cannot write {path} ({error.strerror}): free some space there or choose another folder; what "
                     "was there before is whole")


def write_text(path, text):
    write_atomically(path, lambda file: file.write(text.encode("utf-8")))


def load_checkpoint(path, look=False):
    """The dict in a checkpoint, tensors on the CPU (with look=True still in the file: to look and let go). Only plain
    data is ever unpickled, and shapes are checked against the config before anything is allocated. Raises UserError
    for everything that is no whole checkpoint."""
    if not os.path.isfile(path):
        raise UserError(f"there is no checkpoint {path}; train one with: python train_gpt2.py")
    try:
        with zipfile.ZipFile(path) as archive:  # that is what torch.save writes, with a checksum for each part
            if any(part.compress_type for part in archive.infolist()) or not look and archive.testzip():
                raise ValueError
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            # mmap: tensors stay in the file until they are used, so a file that claims terabytes costs nothing yet
            checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        for key, value in checkpoint.items():
            if not all(key in ("model", "optimizer") and is_plain(tensor) for tensor in tensors_in(value)):
                raise ValueError
    except PermissionError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except Exception as error:  # a damaged file can fail in any of a dozen ways
        raise UserError(f"{path} is no checkpoint, or a damaged one ({type(error).__name__})") from None
    kinds = {"model": dict, "step": int, "config": dict, "settings": dict, "tokenizer": dict, "best_val_loss": float}
    for key, kind in kinds.items():
        if not isinstance(checkpoint.get(key), kind):
            raise UserError(f"{path} is no checkpoint of train_gpt2.py: it has no {key}")
    if checkpoint["step"] < 0 or math.isnan(checkpoint["best_val_loss"]):
        raise UserError(f"{path} is damaged: its step or its best loss is impossible")
    check_weights(checkpoint["model"], checkpoint["config"], path, look)
    try:
        if Tokenizer(checkpoint["tokenizer"]).vocab_size != checkpoint["config"]["vocab_size"]:
            raise UserError("its tokenizer has another vocabulary than its model")
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    return checkpoint if look else copy.deepcopy(checkpoint)  # into memory of its own: the file may be replaced


def tensors_in(value):
    """Yields the tensors in nested dicts and lists."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict | list | tuple):
        for part in value.values() if isinstance(value, dict) else value:
            yield from tensors_in(part)


def is_plain(tensor):
    """Is this floats with all their numbers in memory or in the file? A sparse, a repeated or a "meta" tensor can
    claim terabytes in a few bytes."""
    return (type(tensor) is torch.Tensor and tensor.device.type == "cpu" and tensor.layout is torch.strided
            and tensor.is_floating_point()
            and tensor.untyped_storage().nbytes() >= tensor.numel() * tensor.element_size())


def check_weights(weights, config, path, look=False):
    """Raises UserError unless the state dict has exactly the tensors of a model of this config, and (unless look=True)
    numbers in them."""
    try:
        numbers = sum(t.numel() for t in weights.values())
        if config["n_layer"] > len(weights) or config["vocab_size"] * config["n_embd"] > numbers:
            raise UserError("its config does not fit its weights")
        with torch.device("meta"):  # shapes without memory
            expected = {name: t.shape for name, t in GPT(GPTConfig(**config)).state_dict().items()}
    except (AttributeError, KeyError, TypeError, UserError) as error:
        raise UserError(f"{path} is damaged: its model or config is malformed ({error})") from None
    for name in sorted(expected.keys() ^ weights.keys()):
        raise UserError(f"{path} does not fit its own config: {name} {'lacks' if name in expected else 'is too many'}")
    for name, shape in expected.items():
        if weights[name].shape != shape:
            raise UserError(f"{path} does not fit its own config: {name} is {tuple(weights[name].shape)}, "
                            f"not {tuple(shape)}")
        if not look and not weights[name].float().sum().isfinite():  # one NaN or infinity makes the sum one
            raise UserError(f"{path} is damaged: {name} holds what is no number")


# ---- Hugging Face ----------------------------------------------------------------------------------------------------

OPENAI_NAMES = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
TURNED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")  # stored (in, out) there
ACTIVATIONS = {"gelu_new": "gelu", "gelu_pytorch_tanh": "gelu", "relu": "relu"}  # theirs -> ours
# What else their config can say, and the one value of each that this model computes
FIXED = dict(model_type="gpt2", layer_norm_epsilon=1e-5, scale_attn_weights=True, scale_attn_by_inverse_layer_idx=False,
             tie_word_embeddings=True, add_cross_attention=False)
# How the SHA-256 of OpenAI's 50,256 tokens in order begins: a folder with these tokens has the tokenizer of kind gpt2
GPT2_TOKENS = "e424375bafc3"
TOKENIZER_FILES = ("vocab.json", "merges.txt", "tokenizer_config.json")
# What else transformers would read of a folder that holds it
MODEL_FILES = ("model*.safetensors*", "pytorch_model*.bin*", "generation_config.json", "tokenizer.json",
               "special_tokens_map.json", "added_tokens.json", *TOKENIZER_FILES)


def read_model(where, look=False):
    """What load_checkpoint returns, of a checkpoint, an OpenAI name or a folder of Hugging Face's; with look=True
    only its config can be relied on."""
    if where in OPENAI_NAMES or os.path.isdir(where):  # not Path.is_dir, which fails where a name is too long
        return read_pretrained(where, look)
    if not os.path.exists(where):
        raise UserError(f"there is no checkpoint or folder {where}: train one with python train_gpt2.py, or take one "
                        f"of OpenAI's: {', '.join(OPENAI_NAMES)}")
    return load_checkpoint(where, look)


def model_from(checkpoint, device="cpu", **changes):
    """The model in what read_model returned, some of its config changed, ready to sample from."""
    model = GPT(GPTConfig(**checkpoint["config"] | changes))
    model.load_state_dict(checkpoint["model"])
    if checkpoint["tokenizer"]:
        model.tokenizer = Tokenizer(checkpoint["tokenizer"])
    model.starts_documents = checkpoint["settings"].get("rows") == "documents"
    return model.to(device).eval()


def read_pretrained(name, look=False):
    """Reads a folder of Hugging Face's, or OpenAI's by name, as if it were a checkpoint of ours; look=True reads no
    weights. Nothing in it is run, and shapes are checked before anything of their size is allocated. Raises UserError
    for everything that is no GPT-2."""
    folder = Path(name)
    if not os.path.isdir(folder):
        if name not in OPENAI_NAMES:
            raise UserError(f"there is no folder {name}, and OpenAI's models are called {', '.join(OPENAI_NAMES)}")
        folder = download(name, look)
    config, starts_documents = read_config(folder / "config.json")
    settings = {"rows": "documents"} if starts_documents else {}
    found = {"config": config, "settings": settings, "tokenizer": None, "model": {}}
    if look:
        return found
    for path in weight_files(folder):
        try:
            if path.suffix == ".safetensors":
                from safetensors.torch import load_file
                tensors = load_file(path)
            else:  # mmap: what is claimed costs nothing until it is used; files of before 2020 are no zip, and cannot
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
            for key, tensor in tensors.items():
                key = "transformer." + key.removeprefix("transformer.")
                if key.endswith((".attn.bias", ".attn.masked_bias")):  # the causal mask, which older files keep
                    continue
                if not is_plain(tensor.detach()):  # detached, a Parameter is a tensor
                    raise ValueError
                found["model"][key] = tensor.t() if key.endswith(TURNED) else tensor
        except Exception as error:  # a damaged file can fail in any of a dozen ways
            if is_out_of_memory(error):
                raise
            raise UserError(f"{path} holds no weights, or is damaged ({type(error).__name__})") from None
    head = found["model"].pop("transformer.lm_head.weight", None)
    check_weights(found["model"], config, folder)
    if head is not None and not torch.equal(head, found["model"]["transformer.wte.weight"]):
        raise UserError(f"{folder} has an output matrix of its own: GPT-2's is that of the embedding")
    found["model"] = {key: tensor.float() for key, tensor in found["model"].items()}
    spec = read_tokenizer(folder)
    if config["vocab_size"] == 50257 and not any((folder / name).exists() for name in ("vocab.json", "tokenizer.json")):
        spec = {"kind": "gpt2"}  # the model was saved alone, and so many tokens are GPT-2's
    if spec and config["vocab_size"] == (50257 if spec["kind"] == "gpt2" else len(spec["ranks"]) + 1):
        found["tokenizer"] = spec
    return found


def download(name, look):
    """The folder in Hugging Face's cache with an OpenAI model's files, which are downloaded where they are not there
    yet. Raises UserError where that fails."""
    import huggingface_hub
    from huggingface_hub.errors import EntryNotFoundError
    huggingface_hub.logging.set_verbosity_error()  # we say it ourselves, in one line
    weights = "model.safetensors" if importlib.util.find_spec("safetensors") else "pytorch_model.bin"
    problem = None
    for offline in (True, False):  # what is at hand needs no network
        for repository in (f"openai-community/{name}", name):  # the name that it has now, and its first one
            get = functools.partial(huggingface_hub.hf_hub_download, repository, local_files_only=offline)
            try:
                if not offline:  # without a network this fails at once; a download would try for half a minute
                    huggingface_hub.get_hf_file_metadata(huggingface_hub.hf_hub_url(repository, "config.json"))
                folder = Path(get("config.json")).parent
                if not look:
                    with contextlib.suppress(EntryNotFoundError):
                        get("vocab.json")
                        get("merges.txt")
                    try:
                        get(weights)
                    except EntryNotFoundError:
                        get("pytorch_model.bin")
                return folder
            except Exception as error:  # a network fails in a dozen ways
                problem = problem or (None if offline else error)
    reason = getattr(problem, "strerror", None) or type(problem).__name__
    raise UserError(f"{name} cannot be downloaded ({reason}): connect to the network, or give a folder that holds it")


def weight_files(folder):
    """The files with a folder's weights. Raises UserError where there are none that can be read here."""
    safe = [folder / "model.safetensors"] if (folder / "model.safetensors").exists() else \
        sorted(folder.glob("model-*-of-*.safetensors"))
    if safe and importlib.util.find_spec("safetensors"):
        return safe
    if (folder / "pytorch_model.bin").exists():
        return [folder / "pytorch_model.bin"]
    raise UserError(f"{folder} has " + ("its weights in model.safetensors: pip install safetensors" if safe else
                                        "neither model.safetensors nor pytorch_model.bin"))


def read_config(path):
    """Our config for their config.json, and whether the model's prompts begin with <|endoftext|>, as ours note there.
    Raises UserError for one that describes no GPT-2."""
    if not os.path.isfile(path):  # not path.is_file, which fails where nobody may look
        raise UserError(f"{path.parent} is no folder of Hugging Face's: it has no config.json (of a run's folder, name "
                        "the best.pt)")
    try:
        theirs = json.loads(path.read_text(encoding="utf-8"))
        sizes = {name: theirs[name] for name in ("vocab_size", "n_layer", "n_head", "n_embd")}
        sizes["block_size"] = theirs["n_positions"]
        for name, value in (FIXED | dict(n_inner=None)).items():
            allowed = (value, 4 * sizes["n_embd"]) if name == "n_inner" else (value,)
            if theirs.get(name, value) not in allowed:
                raise UserError(f"{path} has {name} {theirs[name]!r}: only GPT-2's {value!r} can be opened here")
        activation = ACTIVATIONS.get(theirs.get("activation_function", "gelu_new"))
        if activation is None:
            raise UserError(f"{path} has activation_function {theirs['activation_function']!r}: only "
                            f"{', '.join(ACTIVATIONS)} can be opened here")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path} does not describe a GPT-2 ({type(error).__name__}: {error})") from None
    check_shape(GPTConfig(**sizes))
    return dataclasses.asdict(GPTConfig(**sizes, activation=activation)), theirs.get("starts_documents") is True


def byte_characters():
    """GPT-2's vocab.json writes every byte as a visible character: printable ones as themselves, the others as the
    characters from number 256 on. Returns them in the order of the bytes."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = iter(range(256, 512))
    return "".join(chr(byte if byte in shown else next(hidden)) for byte in range(256))


def read_tokenizer(folder):
    """The spec of the tokenizer in a folder: a byte-level BPE whose ids are in the order of its merges, with
    <|endoftext|> behind them. None where there is none, or another kind."""
    characters = {character: byte for byte, character in enumerate(byte_characters())}
    try:
        if (folder / "vocab.json").exists():
            vocabulary = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
            lines = (folder / "merges.txt").read_text(encoding="utf-8").splitlines()
            merges = [line.split(" ") for line in lines if line and not line.startswith("#version")]
        else:  # tokenizer.json says the same in one file
            whole = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
            model, words = whole["model"], whole["pre_tokenizer"]
            if whole["normalizer"] or words["type"] != "ByteLevel" or words["add_prefix_space"] \
                    or not words.get("use_regex", True):
                return None
            vocabulary, merges = model["vocab"], [m.split(" ") if isinstance(m, str) else m for m in model["merges"]]
        tokens = sorted(vocabulary, key=vocabulary.get)
        if tokens[-1] != END_OF_TEXT or [vocabulary[token] for token in tokens] != list(range(len(tokens))):
            return None
        longer = [token for token in tokens[:-1] if len(token) > 1]
        if ["".join(merge) for merge in merges] != longer:
            return None
        ranks = [bytes(characters[c] for c in token) for token in tokens[:-1]]
        if len(ranks) - len(longer) != 256:  # it cannot write all bytes
            return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError):
        return None
    if hashlib.sha256(b"\n".join(ranks)).hexdigest().startswith(GPT2_TOKENS):
        return {"kind": "gpt2"}
    return {"kind": "bpe", "ranks": [token.decode("latin-1") for token in ranks]}


def merges_of(tokens):
    """[(left, right), ...]: for every token of several bytes, in order, the two that were merged into it: what the
    merges before it leave of its bytes. Raises UserError for tokens that no merges make."""
    rank, merges = {token: i for i, token in enumerate(tokens)}, []
    for token in tokens:
        parts = [token[i:i + 1] for i in range(len(token))]
        while len(parts) > 2:
            ranks = [rank.get(a + b, math.inf) for a, b in zip(parts, parts[1:], strict=False)]
            i = ranks.index(min(ranks))
            if ranks[i] >= rank[token]:
                raise UserError(f"no merges make the token {token!r}: this tokenizer cannot be exported")
            parts[i:i + 2] = [parts[i] + parts[i + 1]]
        if len(parts) == 2:
            merges.append(tuple(parts))
    return merges


def write_pretrained(model, folder):
    """GPT.save_pretrained: weights, config.json and, unless it is one of characters, the tokenizer. Sinusoidal
    positions become a table of learned ones, which is the same function. Raises UserError where nothing can be
    written, or a file of another model would be left beside it."""
    folder, c, tokenizer = Path(folder), model.config, model.tokenizer
    has_merges = tokenizer is not None and tokenizer.eot is not None
    weight_file = "model.safetensors" if importlib.util.find_spec("safetensors") else "pytorch_model.bin"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        there = {path.name for pattern in MODEL_FILES for path in folder.glob(pattern)}
    except OSError as error:
        raise UserError(f"cannot make the folder {folder} ({error.strerror}): choose another") from None
    left = there - {weight_file, *(TOKENIZER_FILES if has_merges else ())}
    if left:
        raise UserError(f"{folder} holds another model, whose {min(left)} would be read with this one's files: choose "
                        "another folder")
    weights = {name: (tensor.t() if name.endswith(TURNED) else tensor).float().contiguous().cpu()
               for name, tensor in model.state_dict().items()}
    if weight_file.endswith(".safetensors"):
        from safetensors.torch import save
        write_atomically(folder / weight_file, lambda file: file.write(save(weights, {"format": "pt"})))
    else:
        write_atomically(folder / weight_file, lambda file: torch.save(weights, file))
    theirs = FIXED | {
        "architectures": ["GPT2LMHeadModel"], "vocab_size": c.vocab_size, "n_positions": c.block_size,
        "n_layer": c.n_layer, "n_head": c.n_head, "n_embd": c.n_embd, "resid_pdrop": c.dropout, "embd_pdrop": c.dropout,
        "attn_pdrop": c.dropout, "activation_function": "gelu_new" if c.activation == "gelu" else c.activation,
        "starts_documents": model.starts_documents,  # ours: transformers leaves it alone
        "bos_token_id": tokenizer.eot if tokenizer else None, "eos_token_id": tokenizer.eot if tokenizer else None}
    if has_merges:
        write_tokenizer(tokenizer, folder, c.block_size)
        if model.starts_documents:
            print(f"note: this model has read texts from their beginning only: for transformers, put {END_OF_TEXT} "
                  "before each prompt")
    else:
        print(f"note: no tokenizer was written to {folder}: transformers has none of single characters; ids are the "
              "places of characters in the alphabet" if tokenizer else "note: this model has no tokenizer to write")
    write_text(folder / "config.json", json.dumps(theirs, indent=2) + "\n")  # last: with it the folder is whole


def write_tokenizer(tokenizer, folder, block_size):
    """vocab.json, merges.txt and tokenizer_config.json, as GPT-2's own tokenizer has them."""
    characters = byte_characters()
    tokens = [tokenizer.decode_bytes([i]) for i in range(tokenizer.eot)]
    written = ["".join(characters[byte] for byte in token) for token in tokens]
    vocabulary = {token: i for i, token in enumerate([*written, END_OF_TEXT])}
    names = dict(zip(tokens, written, strict=True))
    write_text(folder / "vocab.json", json.dumps(vocabulary, ensure_ascii=False))
    lines = [f"{names[left]} {names[right]}" for left, right in merges_of(tokens)]
    write_text(folder / "merges.txt", "\n".join(["#version: 0.2", *lines]) + "\n")
    special = dict.fromkeys(("bos_token", "eos_token", "unk_token"), END_OF_TEXT)
    write_text(folder / "tokenizer_config.json", json.dumps(
        special | {"tokenizer_class": "GPT2Tokenizer", "model_max_length": block_size}, indent=2) + "\n")


# ---- Devices and processes -------------------------------------------------------------------------------------------


class World:
    """This process among its siblings (torchrun starts one for each GPU), and its device."""

    def __init__(self, s):
        self.rank, self.size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self.main = self.rank == 0  # the one that writes and prints
        local = int(os.environ.get("LOCAL_RANK", 0))
        self.device = pick_device(s.device, local)
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)  # what torch says of "the" GPU is then said of this one
        if self.device.type == "mps" and self.size > 1:
            raise UserError("several processes cannot train on MPS: add --device=cpu, or start one process with python")
        self.dtype = pick_dtype(s.dtype, self.device)
        self.at_end = contextlib.ExitStack()  # what has to be closed, however the run ends
        # How many processes share the device's memory: a CPU's belongs to all that torchrun started here
        self.sharing = int(os.environ.get("LOCAL_WORLD_SIZE", 1)) if self.device.type == "cpu" else 1
        if self.size > 1:
            dist.init_process_group("nccl" if self.device.type == "cuda" else "gloo")
        if s.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS asks for it
            torch.use_deterministic_algorithms(True)
        if self.device.type == "cuda":
            torch.set_float32_matmul_precision("high")  # TF32 for the products that stay float32

    def autocast(self):
        """Inside, matrix products are in world.dtype; norms, softmaxes and losses stay in float32."""
        if self.dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, self.dtype)

    def accumulating(self, model, more_to_come):
        return model.no_sync() if self.size > 1 and more_to_come else contextlib.nullcontext()

    def reduce(self, tensor, largest=False):
        """The sum of a tensor over all processes, or the largest; NCCL wants it on the GPU, and leaves it there."""
        if self.size > 1:
            tensor = tensor.to(self.device)
            dist.all_reduce(tensor, dist.ReduceOp.MAX if largest else dist.ReduceOp.SUM)
        return tensor

    def from_main(self, value):
        """What the main process says (any plain value), on every process."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def close(self):
        self.at_end.close()
        if self.size > 1 and dist.is_initialized():
            dist.destroy_process_group()


def pick_device(name, local_rank=0):
    """CUDA, then MPS, then CPU; or the one named. Raises UserError where that one is not here."""
    has = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(kind for kind in has if has[kind])
    match = re.fullmatch(r"(cpu|mps|cuda)(?::(\d+))?", name)
    if not match:
        raise UserError(f"device is {name!r}: it must be auto, cpu, cuda, cuda:N or mps")
    kind, number = match.groups()
    if not has[kind]:
        here = ", ".join(kind for kind in has if has[kind])
        raise UserError(f"--device={name}: torch sees no {kind} here, only {here}; leave it out to take the best")
    if kind != "cuda":
        return torch.device(kind)
    index = int(number) if number else local_rank
    if index >= torch.cuda.device_count():
        raise UserError(f"cuda:{index} is asked for, but there are {torch.cuda.device_count()} CUDA devices; start at "
                        "most one process for each")
    return torch.device("cuda", index)


def wait_for(device):
    """Returns when the device has done all that it was asked for: a GPU works on while Python goes ahead."""
    {"cuda": torch.cuda.synchronize, "mps": torch.mps.synchronize}.get(device.type, lambda: None)()


def pick_dtype(name, device):
    """bfloat16 where the hardware computes it natively and it is faster, float16 on older CUDA cards, else float32."""
    if name != "auto":
        return getattr(torch, name)
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    if device.type == "cpu" and getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)():
        return torch.bfloat16
    return torch.float32


def compiled_and_parallel(model, s, world):
    """The model that the training step calls: compiled, and wrapped for several processes. It shares the weights of
    `model`, which evaluation and sampling go on using uncompiled, since their shapes vary."""
    if s.compile_model is True or (s.compile_model == "auto" and world.device.type == "cuda"):
        try:
            x = torch.zeros(8, device=world.device, requires_grad=True)
            torch.compile(lambda x: x.exp().sum())(x).backward()  # a missing compiler shows only when it is used
            model = torch.compile(model)
        except Exception as error:
            if world.main:
                print(f"warning: torch.compile does not work here ({type(error).__name__}), going on without it")
    if world.size > 1:
        devices = [world.device.index] if world.device.type == "cuda" else None
        # As views of the buckets in which they travel, gradients need no second copy: 6 GB less for GPT-2 XL
        model = nn.parallel.DistributedDataParallel(model, device_ids=devices, gradient_as_bucket_view=True)
    return model


def fit_in_memory(model, optimizer, plan, s, world):
    """Tries a micro-batch, with room for the optimizer's two averages unless a resumed run has them already; while that
    is too much, halves plan.micro_rows. The step keeps its rows, in more micro-batches, so that the optimization stays
    the same."""
    began_with = plan.micro_rows
    while True:
        failed = 0
        try:
            averages = [torch.empty_like(p) for p in model.parameters() for _ in range(0 if optimizer.state else 2)]
            idx = torch.zeros((plan.micro_rows, s.block_size), dtype=torch.int64, device=world.device)
            with world.autocast(), world.accumulating(model, True):
                model(idx, idx)[1].backward()
        except torch.OutOfMemoryError:
            failed = 1
        averages = None  # noqa: F841 - given back before the next try
        model.zero_grad()
        torch.cuda.empty_cache()
        if not world.reduce(torch.tensor(failed, device=world.device), largest=True).item():  # all or none
            break
        if plan.micro_rows == 1:
            raise UserError(f"not even one row of {s.block_size} tokens fits into the memory of {world.device}: halve "
                            "--block_size or --n_embd")
        plan.micro_rows = next(n for n in range(plan.micro_rows // 2, 0, -1) if plan.micro_rows % n == 0)
    if world.main and plan.micro_rows < began_with:
        print(f"batch_size {began_with} does not fit into memory: going on with {plan.micro_rows} rows at once, "
              "the rest accumulated; the optimization stays the same")


class Linear(nn.Linear):
    """nn.Linear, its product by linear(), or by what `packed` puts in its place."""

    packed = None

    def forward(self, x):
        return linear(x, self.weight, self.bias) if self.packed is None else self.packed(x)


def linear(x, weight, bias=None):
    """F.linear, by a faster way where there is one: x (..., in), weight (out, in), bias (out,) -> (..., out)."""
    out = len(weight)
    if x.is_cuda and out % 8:  # tensor cores are fast on multiples of 8 only: 47 rows of zeros make GPT-2's 50,257
        return F.linear(x, F.pad(weight, (0, 0, 0, -out % 64)))[..., :out]  # 786 * 64; their logits are cut off again
    in_float32 = x.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
    if ON_X86 and x.is_cpu and in_float32 and not torch.compiler.is_compiling():  # which does not know this way
        return Float32Product.apply(x, weight, bias)
    return F.linear(x, weight, bias)


ON_X86 = torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()


def can_pack_bfloat16():
    return ON_X86 and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def onednn(x, weight, bias=None, then="none"):
    """F.linear by oneDNN, and then "none", "relu" or "gelu" (tanh) while the result is still at hand."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, then, [], "tanh" if then == "gelu" else "")


@contextlib.contextmanager
def packed(model, world):
    """While it lasts, a model that only reads, in bfloat16 on a CPU, does so from a copy of its weights that oneDNN has
    packed its way, with each activation done by the product before it: 1.2 to 1.4 times as fast."""
    able = world.device.type == "cpu" and world.dtype == torch.bfloat16 and can_pack_bfloat16()
    blocks = model.transformer.h if able else []
    acts = [block.mlp.act for block in blocks]
    try:
        for block in blocks:
            for module in (block.attn.c_attn, block.attn.c_proj, block.mlp.c_proj):
                module.packed = product(module, 512, world.dtype)
            block.mlp.c_fc.packed = product(block.mlp.c_fc, 512, world.dtype, model.config.activation)
            block.mlp.act = nn.Identity()
        yield
    finally:
        for block, act in zip(blocks, acts, strict=True):
            block.mlp.act = act
            for module in (block.attn.c_attn, block.attn.c_proj, block.mlp.c_fc, block.mlp.c_proj):
                module.packed = None


def product(module, rows, dtype, then="none"):
    """The product of a Linear, or with the tied embedding, for weights that stay as they are: a function from
    x (..., in), of about `rows` rows in all, to (..., out), with "none", "relu" or "gelu" (tanh) done to the result.

    Few rows take as long as it takes to read the weights. On a CPU F.linear reads a float32 matrix at a third of the
    memory's speed; oneDNN at two thirds once the weights are packed its way, for which a copy is made. A single row
    needs no copy to be read at nearly full speed: in float32 MKL does it, asked for many small products, in bfloat16
    torch's own kernel, which it takes where oneDNN is out of the way."""
    act = {"none": lambda y: y, "relu": F.relu, "gelu": functools.partial(F.gelu, approximate="tanh")}[then]
    weight, bias = module.weight.to(dtype), getattr(module, "bias", None)
    bias = bias.to(dtype) if bias is not None else None
    if not (weight.is_cpu and ON_X86 and (dtype == torch.float32 or dtype == torch.bfloat16 and can_pack_bfloat16())):
        return lambda x: act(F.linear(x, weight, bias))
    if dtype == torch.bfloat16 and rows == 1:
        wanted = torch.backends.mkldnn.enabled

        def without_onednn(x):
            torch.backends.mkldnn.enabled = False
            try:
                return act(F.linear(x, weight, bias))
            finally:
                torch.backends.mkldnn.enabled = wanted
        return without_onednn
    n = next(n for n in range(64, 0, -1) if len(weight) % n == 0)
    if dtype == torch.float32 and rows == 1 and n >= 8:
        pieces = weight.unflatten(0, (n, -1))  # (n, out / n, in), the same memory

        def by_pieces(x):
            y = torch.bmm(pieces, x.t().expand(n, -1, 1)).view(1, -1)  # n products, (out / n, in) @ (in, 1)
            return act(y if bias is None else y + bias)
        return by_pieces
    weight = torch.ops.mkldnn._reorder_linear_weight(weight, rows)
    return lambda x: onednn(x.to(dtype), weight, bias, then)


class Float32Product(torch.autograd.Function):
    """F.linear in float32 by oneDNN, and its gradients. torch itself would call MKL, which leaves more than half of an
    AMD processor unused (200 against 440 GFLOP/s): a step of GPT-2 takes 1.7 times as long."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        return onednn(x, weight, bias)

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        x, rows = x.flatten(0, -2), grad.flatten(0, -2)  # (rows, in), (rows, out)
        grad_x = onednn(rows, weight.t()).view(*grad.shape[:-1], -1)  # what each input did to the outputs it fed
        grad_weight = onednn(rows.t(), x.t())  # (out, in)
        return grad_x, grad_weight, rows.sum(0) if ctx.needs_input_grad[2] else None


def keep_memory():
    """glibc hands large blocks back to the kernel after every step and gets them again page by page, which takes half
    of a step with GPT-2's 200 MB of logits. Told so, it keeps them (mallopt(3)). Elsewhere than glibc: nothing."""
    try:
        import ctypes
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-4, 0)  # M_MMAP_MAX: no block gets a mapping of its own
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: the heap is not cut back
    except (OSError, AttributeError):
        pass


# ---- Sampling --------------------------------------------------------------------------------------------------------


class KVCache:
    """The keys and values of all tokens so far: they never change, so each is computed once. Without it every new
    token would send the whole text through the network again. Room for `length` tokens of `batch` rows is made
    at once; the first tokens may come as a single row, which then stands for all. Raises UserError where there is
    too little memory."""

    def __init__(self, model, batch, length):
        config, weight = model.config, model.transformer.wte.weight
        on_cpu, shape = weight.device.type == "cpu", (config.n_head, length, config.n_embd // config.n_head)
        # The CPU's bfloat16 attention takes 5 times as long over 1,000 tokens as the conversion and float32
        self.dtype = torch.float32 if on_cpu else weight.dtype
        make = functools.partial(torch.empty, dtype=self.dtype, device=weight.device)
        try:
            # Linux promises more memory than there is, and kills who then uses it
            if on_cpu and 4 * config.n_layer * 2 * batch * math.prod(shape) > physical_memory():
                raise MemoryError
            # The values of a single text on a CPU lie turned, (head_dim, length), and so apart from the keys: 1,000 of
            # them are read in two thirds of the time. For many texts writing them takes as long as that saves
            turned = shape[0], shape[2], shape[1]
            self.store = {block.attn: [make(1, 1, *shape), make(1, 1, *turned).transpose(3, 4)] if on_cpu and batch == 1
                          else [make(2, batch, *shape)] for block in model.transformer.h}
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            raise UserError(f"{batch:,} texts of {length:,} tokens at once do not fit into memory: lower num_samples "
                            "or max_new_tokens") from None
        self.length = 0  # tokens in it

    def extend(self, layer, new):
        """Adds a layer's keys and values of T new tokens, `new` (2, B, n_head, T, head_dim); returns those of all its
        tokens so far. Where the cache has a dtype of its own, so has what is returned, but for the first tokens."""
        parts, T = self.store[layer], new.size(3)
        for part, added in zip(parts, new.chunk(len(parts)), strict=True):
            part.narrow(3, self.length, T).copy_(added)  # a slice of the tokens, at a third of the cost of indexing
        # At first `new` is all there is, in the rows that were given, of which one may stand for all
        return new if self.length == 0 else [t for part in parts for t in part.narrow(3, 0, self.length + T)]

    def advance(self, x):
        """Counts T tokens, which all layers have seen now; (B, T, C) -> (B, 1, C), for only what follows the last of
        them is asked for."""
        self.length += x.size(1)
        return x[:, -1:]


def attend_from_one(q, keys, values):
    """attend() on a CPU for a single token, after all others: q is (B, n_head, 1, head_dim), and so is the result. Its
    two products read all keys and values, and MKL reads them the faster if the products are asked for in this way."""
    scores = keys @ (q / math.sqrt(q.size(-1))).transpose(2, 3)  # (B, n_head, tokens so far, 1)
    return F.softmax(scores.transpose(2, 3), dim=-1) @ values


def token_reader(model, rows):
    """A function read(token, cache): token (rows, 1), one new one of each row, to logits (rows, V). It does what
    GPT.forward does with a cache, written out, with all that stays the same looked up beforehand: for so little work
    the way through modules would take a third of the time."""
    def norm(module):
        shape, weight, bias, eps = module.normalized_shape, module.weight, module.bias, module.eps
        return lambda x: torch.layer_norm(x, shape, weight, bias, eps)

    parts, n_head, then = model.transformer, model.config.n_head, model.config.activation
    wte, wpe, dtype = parts.wte.weight, parts.wpe.weight, parts.wte.weight.dtype
    layers = [(block.attn, norm(block.ln_1), product(block.attn.c_attn, rows, dtype),
               product(block.attn.c_proj, rows, dtype), norm(block.ln_2),
               product(block.mlp.c_fc, rows, dtype, then), product(block.mlp.c_proj, rows, dtype)) for block in parts.h]
    ln_f, to_logits = norm(parts.ln_f), product(parts.wte, rows, dtype)
    look = attend_from_one if wte.is_cpu else functools.partial(attend, flash=parts.h[0].attn.flash)

    def read(token, cache):
        B, C = len(token), wte.size(1)
        with torch.inference_mode():  # no_grad, and not even a count of changes: 3 % faster
            x = wte[token[:, 0]] + wpe[cache.length]  # (B, C)
            for attn, ln_1, to_qkv, from_heads, ln_2, widen, narrow in layers:
                qkv = to_qkv(ln_1(x)).view(B, 3, n_head, 1, C // n_head).transpose(0, 1).to(cache.dtype)
                keys, values = cache.extend(attn, qkv[1:])  # (B, n_head, tokens so far, head_dim)
                y = look(qkv[0], keys, values)  # (B, n_head, 1, head_dim)
                x = x + from_heads(y.reshape(B, C).to(dtype))
                x = x + narrow(widen(ln_2(x)))
            x = ln_f(x)
        cache.length += 1
        return to_logits(x)  # outside: what inference_mode makes, training could not use
    return read


def encode_prompt(model, text):
    """The ids to begin with: an empty prompt begins a document, and so does every prompt if the model was trained
    on rows that all do."""
    if model.tokenizer is None:
        raise UserError("this model carries no tokenizer: give token ids, or load one that does")
    ids = model.tokenizer.encode(text)
    return ids if ids and not model.starts_documents else model.tokenizer.document_start + ids


@torch.no_grad()
def stream(model, idx, max_new_tokens, temperature=1.0, top_k=None, top_p=None, seed=None):
    """Yields (token, logits), `max_new_tokens` times: the chosen next token of every row, (B,) int64, and the logits
    that it was chosen from, (B, V) float32. idx is (B, T) int64, T at least 1.

    A full context makes room by a fixed rule: the older half is forgotten, the newer half is read again from
    position 0, and the text goes on from there. A prompt longer than block_size keeps its end."""
    generator = torch.Generator(idx.device)
    generator.manual_seed(seed) if seed is not None else generator.seed()
    context, B = model.config.block_size, len(idx)
    read_token = token_reader(model, B)
    was_training = model.training
    model.eval()
    try:
        text, cache = [idx[:, -context:]], None
        fresh = text[0]  # what the model has not read yet
        for _ in range(max_new_tokens):
            if cache is None:
                cache = KVCache(model, B, min(context, fresh.size(1) + max_new_tokens))
            elif cache.length + fresh.size(1) > context:
                fresh = torch.cat(text, dim=1)[:, -max(1, context // 2):]
                text, cache.length = [fresh], 0
            if cache.length:
                logits = read_token(fresh, cache).float()  # (B, V)
            else:
                if (fresh == fresh[:1]).all():  # samples of one prompt: read it once
                    fresh = fresh[:1]
                logits = model(fresh, cache=cache)[0][:, -1].float().expand(B, -1).contiguous()
            fresh = pick(logits, temperature, top_k, top_p, generator)  # (B, 1)
            text.append(fresh)
            yield fresh[:, 0], logits
    finally:
        model.train(was_training)


def pick(logits, temperature=1.0, top_k=None, top_p=None, generator=None):
    """(B, V) logits -> (B, 1) ids. First temperature, then top-k (Fan et al. 2018), then top-p, which keeps the
    smallest set of tokens that holds that share of probability (Holtzman et al. 2020)."""
    if temperature < 1e-6:  # 0; and what comes close to it, where logits / temperature would overflow
        return logits.argmax(dim=-1, keepdim=True)
    index = None
    if top_k is not None or top_p is not None:  # sorted, the likeliest first
        logits, index = logits.topk(min(top_k or logits.size(-1), logits.size(-1)))  # (B, k)
    probs = F.softmax(logits / temperature, dim=-1)
    if top_p is not None:
        before = probs.cumsum(dim=-1) - probs  # the probability of all likelier tokens
        probs = probs.masked_fill(before >= top_p, 0)
    # One random number a row and the first token whose cumulated probability reaches it: torch.multinomial draws a
    # number for every token, which for 16 texts of GPT-2 takes half as long as the model
    cumulated = probs.cumsum_(dim=-1)  # (B, V or k), in the place of probs, which nothing needs after this
    # Above 0, at most 1: a first token without any probability would reach 0
    drawn = 1 - torch.rand((len(probs), 1), generator=generator, device=probs.device)
    choice = torch.searchsorted(cumulated, drawn * cumulated[:, -1:])
    return choice if index is None else index.gather(-1, choice)


# ---- Evaluation ------------------------------------------------------------------------------------------------------


HELLASWAG = Path("data/hellaswag/hellaswag_val.jsonl")


def token_losses(logits, targets):
    """(B, T, V), (B, T) -> (B, T) float32 on the CPU: nats of each target, 0 for a target of -1. A few tokens at a
    time, for in float32 all of GPT-2's 50,257 logits for each would take more memory than the model."""
    pairs = zip(logits.flatten(0, 1).split(64), targets.flatten().to(logits.device).split(64), strict=True)
    nats = [F.cross_entropy(some.float(), wanted, ignore_index=-1, reduction="none") for some, wanted in pairs]
    return torch.cat(nats).view(targets.shape).cpu()


@torch.no_grad()
def evaluate(model, loader, s, world, data):
    """What the validation rows, always the same ones, say of a model: {"loss" in nats a token, "bits_per_byte",
    "seconds"}. Where the lowest possible loss is known, and these are the rows that it speaks of, also {"floor",
    "skills": {name: nats a token above the floor for want of this skill}}. Whole batches are dealt to the processes
    and summed in their own order, so that the figures are the same for every number of processes."""
    began, count = time.perf_counter(), loader.rows_per_epoch
    if s.eval_tokens is not None:
        count = min(count, max(1, s.eval_tokens // s.block_size))
    whole = s.rows == "documents" and not loader.rows.cut_documents and count == loader.rows_per_epoch
    floor = data.meta.get("entropy_floor") if whole else None
    skills = data.meta["skills"] if floor and data.skills is not None else {}  # {name: its part of the floor}
    sizes = [len(shard) for shard in loader.shards]
    labels = np.split(data.skills if skills else np.broadcast_to(0, sum(sizes)), np.cumsum(sizes)[:-1])
    at_once = max(1, 4096 // s.block_size)  # so few fit into memory wherever training fits
    batches = [range(i, min(i + at_once, count)) for i in range(0, count, at_once)]
    sums = torch.zeros((len(batches), 2 + max(1, len(skills))), dtype=torch.float64)  # tokens, bytes, nats by skill
    model.eval()
    with world.autocast(), packed(model, world):
        for i in range(world.rank, len(batches), world.size):
            x, y = loader.batch(batches[i])
            logits, _ = model(x.to(world.device))
            nats, known = token_losses(logits, y)[y != -1], y[y != -1]  # (tokens,), row after row
            places = map(loader.rows.locate, batches[i])
            label = np.concatenate([labels[shard][at + 1:at + 1 + size] for shard, at, size in places])
            by_skill = np.bincount(label, nats.double(), minlength=max(1, len(skills)))
            sums[i] = torch.tensor([len(known), data.token_bytes[known].sum(), *by_skill])
    model.train()
    tokens, size, *nats = world.reduce(sums).cpu().sum(dim=0).tolist()
    loss = sum(nats) / tokens
    found = {"loss": loss, "bits_per_byte": sum(nats) / math.log(2) / size if size else math.nan}
    if floor:
        found["floor"] = floor
        found["skills"] = {name: n / tokens - skills[name] for name, n in zip(skills, nats, strict=False)}
    return found | {"seconds": time.perf_counter() - began}


class SharedContext:
    """In KVCache's place: the keys and values of some contexts, read once, which rows of other tokens then continue."""

    def __init__(self):
        self.store, self.length = {}, 0
        self.chosen = None  # (rows,): the context that each row continues
        self.scored = None  # (rows, T) bool: the tokens whose predictions are asked for

    def extend(self, layer, new):
        if self.length == 0:
            self.store[layer] = new  # (2, contexts, n_head, tokens, head_dim): keys and values
            return new
        return torch.cat((self.store[layer][:, self.chosen], new), dim=3)

    def advance(self, x):
        """(rows, T, C) -> (1, scored tokens, C): a third of the work is in the logits, which only those need."""
        if self.scored is not None:
            return x[self.scored][None]
        self.length = x.size(1)
        return x[:, -1:]  # nobody asks what the contexts themselves predict


@torch.no_grad()
def hellaswag(model, questions, world, at_once=96):
    """Which of its four endings does the model expect of each question (Zellers et al. 2019)? (questions, 2) int64: the
    one with the lowest loss in all, and the one with the lowest mean loss a token. A question is (context, [endings],
    number of the right one).

    A context is read once for its four endings: of a group of questions, sorted by length, the model first reads as
    much as the shortest context has; the rest goes with the endings. Groups are dealt to the processes."""
    tokenizer, T, rows = model.tokenizer, model.config.block_size, []
    for number, (context, endings, _) in enumerate(questions):
        endings = [tokenizer.encode(ending)[:T] for ending in endings]
        room = T + 1 - max(map(len, endings))
        rows.append(((tokenizer.encode(context) or tokenizer.document_start)[-room:], endings, number))
    rows.sort(key=lambda row: len(row[0]))
    losses = torch.zeros((len(rows), 4, 2))  # in all, a token
    model.eval()
    with world.autocast(), packed(model, world):
        for i in range(world.rank * at_once, len(rows), world.size * at_once):
            group, cache = rows[i:i + at_once], SharedContext()
            shared = len(group[0][0]) - 1  # not its last token, which foretells the ending's first
            if shared:
                model(torch.tensor([context[:shared] for context, _, _ in group], device=world.device), cache=cache)
            texts = [(context[shared:] + ending, len(ending), place, number, e)
                     for place, (context, endings, number) in enumerate(group) for e, ending in enumerate(endings)]
            texts.sort(key=lambda text: len(text[0]))  # alike in length, they need little padding
            while texts:
                # 512 tokens: 384 and 768 were slower on a CPU, by 3 and 4 %
                rows_at_once = max(1, 512 // len(texts[-1][0]))
                batch, sizes, places, numbers, which = map(list, zip(*texts[-rows_at_once:], strict=True))
                del texts[-rows_at_once:]
                x = torch.zeros((len(batch), len(batch[-1]) - 1), dtype=torch.int64)
                scored = torch.zeros_like(x, dtype=torch.bool)
                for row, (text, size) in enumerate(zip(batch, sizes, strict=True)):
                    x[row, :len(text) - 1] = torch.tensor(text[:-1])
                    scored[row, len(text) - 1 - size:len(text) - 1] = True
                endings = torch.tensor([[t for text, size in zip(batch, sizes, strict=True) for t in text[-size:]]])
                cache.chosen, cache.scored = torch.tensor(places, device=world.device), scored.to(world.device)
                logits, _ = model(x.to(world.device), cache=cache)  # (1, tokens of all these endings, V)
                nats = token_losses(logits, endings)[0].split(sizes)
                losses[numbers, which] = torch.tensor([[n.sum(), n.mean()] for n in nats])
    model.train()
    return world.reduce(losses).argmin(dim=1).cpu()


def hellaswag_scores(model, world):
    """{"questions", "acc", "acc_norm" (by the mean loss)}; nothing where prepare_data.py has not fetched the questions,
    or for another vocabulary than GPT-2's, whose figures would compare with nobody's."""
    questions = None
    if world.main and HELLASWAG.exists() and model.tokenizer.spec["kind"] == "gpt2":
        try:
            rows = [json.loads(line) for line in HELLASWAG.read_text(encoding="utf-8").splitlines()]
            questions = [(row["ctx"], [" " + row["endings"][i] for i in range(4)], int(row["label"])) for row in rows]
        except (ValueError, LookupError, TypeError, OSError) as error:
            raise UserError(f"{HELLASWAG} is not what prepare_data.py hellaswag writes ({type(error).__name__}): "
                            "remove it and run that again") from None
    questions = world.from_main(questions)
    if not questions:
        return {}
    right = hellaswag(model, questions, world) == torch.tensor([[label] for _, _, label in questions])
    acc, acc_norm = right.double().mean(dim=0).tolist()
    return {"questions": len(questions), "acc": acc, "acc_norm": acc_norm}


def in_words(found):
    """What evaluate() or hellaswag_scores() found, for people."""
    if "loss" not in found:
        return f"acc {found['acc']:.2%}, acc_norm {found['acc_norm']:.2%} of {found['questions']:,} questions"
    text = f"{found['loss']:.4f}"
    if "floor" in found:
        above = 100 * (found["loss"] / found["floor"] - 1)
        text += f", floor {found['floor']:.4f}: {above:.1f} % above the best possible"
        skills = ", ".join(f"{name} {round(nats, 3) + 0.0:.3f}" for name, nats in found["skills"].items())
        text += f" ({skills})" if skills else ""
    return f"{text}; perplexity {math.exp(min(found['loss'], 700)):.2f}, {found['bits_per_byte']:.3f} bits per byte"


def report_evaluation(s, world):
    """In the place of train(): prints what --eval_only=True finds out; returns the exit status."""
    data = open_data(s.data_dir)
    model = build_model(s, data, world)

    def say(name, found):
        if world.main and found:
            print(f"{s.init_from} on {s.data_dir}: {name} {in_words(found)}")
    if Path(s.data_dir) != HELLASWAG.parent:
        validation = ShardedLoader(s.data_dir, "val", s.block_size, s.rows, None, data.vocab_size, data.eot)
        say("validation loss", evaluate(model, validation, s, world, data))
    say("HellaSwag", hellaswag_scores(model, world))
    return 0


def matmul_speed(device, dtype, n=2048):
    """Operations a second of this machine at an n x n x n product, the median of ten: what is there to be used."""
    a, b = torch.randn(n, n, device=device, dtype=dtype), torch.randn(n, n, device=device, dtype=dtype)
    seconds = []
    for _ in range(12):
        began = time.perf_counter()
        linear(a, b)
        wait_for(device)
        seconds.append(time.perf_counter() - began)
    return 2 * n**3 / statistics.median(seconds[2:])  # the first two warm up


def operations_per_token(model, T=None):
    """6 for each parameter that multiplies, 12 * n_layer * n_embd * T for attention (PaLM, Chowdhery et al. 2022,
    appendix B): 2 forwards, 4 backwards. Position embeddings are only added. T: tokens in a row; None: all it takes."""
    c = model.config
    learned_positions = c.block_size * c.n_embd if c.pos_encoding == "learned" else 0
    return 6 * (model.num_parameters() - learned_positions) + 12 * c.n_layer * c.n_embd * (T or c.block_size)


# ---- Picture and report ----------------------------------------------------------------------------------------------

# What a preset's loss is measured by, on its own data: the README says where each comes from.
TARGETS = {"shakespeare_char": {"nanoGPT": 1.47}, "shakespeare_cpu": {"target": 1.88},
           "tinystories_char": {"target": 1.25}, "gpt2": {"OpenAI's GPT-2": 3.2924}}
STYLE = """<style>
text { font: 13px system-ui, sans-serif; fill: #1f2328 } .small { font-size: 12px; fill: #59636e }
rect { fill: #ffffff } line { stroke: #e4e8ec } .mark { stroke: #818b98; stroke-dasharray: 6 4 }
polyline { fill: none; stroke-width: 2; stroke-linejoin: round } .c0 { stroke: #e8710a } .c1 { stroke: #2f80ed }
.c2 { stroke: #16a07a } .t0 { fill: #e8710a } .t1 { fill: #2f80ed } .t2 { fill: #16a07a }
@media (prefers-color-scheme: dark) { text { fill: #f0f6fc } .small { fill: #9198a1 } rect { fill: #0d1117 }
line { stroke: #262c36 } .mark { stroke: #7d8590 } }
</style>"""


def short(number):
    """1,500,000 -> 1.5M."""
    size, letter = next(((size, letter) for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k"))
                         if number >= size), (1, ""))
    return f"{number / size:.3g}{letter}"


def duration(seconds):
    return next(f"{seconds / unit:.3g} {name}" for unit, name in ((3600, "h"), (60, "min"), (1, "s"))
                if seconds >= 2 * unit or unit == 1)


def ticks(low, high):
    """Round numbers from `low` to `high`, both positive, for a logarithmic axis: at most twelve, or powers of ten."""
    for steps in ((1, 1.5, 2, 3, 4, 5, 7), (1, 2, 5), (1,)):
        powers = range(math.floor(math.log10(low)), math.floor(math.log10(high)) + 1)
        found = [step * 10.0**power for power in powers for step in steps if low <= step * 10.0**power <= high]
        if len(found) <= 12:
            break
    return found


def draw(panels):
    """An SVG picture of panels one above another, each (title, {curve: [(tokens, value)]}, {line: value}). All axes are
    logarithmic, as in most papers on scaling; a curve is averaged over each column of pixels."""
    left, right, high = 52, 708, 250
    tokens = [t for _, curves, _ in panels for points in curves.values() for t, _ in points if t > 0] or [1]
    first, last = min(tokens) / 2, max(tokens)
    body = [f'<rect width="720" height="{len(panels) * (high + 60)}"/>']

    def x(t):  # step 0 has seen no tokens, and stands at the left edge
        return left + (right - left) * math.log(max(t, first) / first) / math.log(last / first)

    def text(at, y, words, anchor="start", style="small"):
        body.append(f'<text x="{at:.1f}" y="{y:.1f}" text-anchor="{anchor}" class="{style}">{words}</text>')

    for top, (title, curves, lines) in zip(range(34, 10**6, high + 60), panels, strict=False):
        values = [v for points in curves.values() for _, v in points] + list(lines.values())
        least, most = 0.95 * max(1e-3, min(values)), 1.1 * max(1e-2, *values)

        def y(v, top=top, least=least, most=most):
            return top + high * math.log(most / max(v, least)) / math.log(most / least)

        names = "".join(f' <tspan class="t{i}">&#160; {name}</tspan>' for i, name in enumerate(curves))
        text(left, top - 12, html.escape(title) + names, style="")
        for tick in ticks(least, most):
            body.append(f'<line x1="{left}" x2="{right}" y1="{y(tick):.1f}" y2="{y(tick):.1f}"/>')
            text(left - 6, y(tick) + 4, f"{tick:g}", "end")
        for tick in ticks(first, last):
            text(x(tick), top + high + 16, short(tick), "middle")
        for name, value in lines.items():
            body.append(f'<line class="mark" x1="{left}" x2="{right}" y1="{y(value):.1f}" y2="{y(value):.1f}"/>')
            # Its name stands where the curves are not: at the right once they are far below
            passed = min((x(t) for points in curves.values() for t, v in points if v < value), default=right)
            side = (right, "end") if passed < 360 else (left + 4, "start")
            text(side[0], y(value) - 4, f"{html.escape(name)} {value:.4g}", side[1])
        for i, points in enumerate(curves.values()):
            columns = {}
            for t, v in points:
                columns.setdefault(round(x(t)), []).append(v)
            path = " ".join(f"{column},{y(statistics.fmean(vs)):.1f}" for column, vs in columns.items())
            body.append(f'<polyline class="c{i}" points="{path}"/>')
    return (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 720 {len(panels) * (high + 60)}" width="720">'
            + "\n".join([STYLE, *body]) + "</svg>\n")


def command(s, world):
    """What repeats this run, or goes on with it: so without --overwrite."""
    usual = Settings(**PRESETS[s.preset])
    check_settings(usual)
    changed = [shlex.quote(f"--{f.name}={getattr(s, f.name)}") for f in dataclasses.fields(s)
               if f.name != "overwrite" and getattr(s, f.name) != getattr(usual, f.name)]
    here = int(os.environ.get("LOCAL_WORLD_SIZE", world.size))  # processes on this machine
    machines = "--standalone" if here == world.size else f"--nnodes={world.size // here}"
    start = "python" if world.size == 1 else f"torchrun {machines} --nproc_per_node={here}"
    return " ".join([start, "train_gpt2.py", *changed])


def summary(run, step, found):
    """What a run has come to, {what: in words}. `found`: {step: what evaluate() found}."""
    s, c = run.s, run.model.config
    best, asked = min(found, key=lambda n: found[n]["loss"]), [n for n in run.history if "hellaswag" in run.history[n]]
    speed = statistics.median([float(row["tokens_per_second"]) for row in run.log() if row["tokens_per_second"]] or [0])
    facts = {"model": f"{run.model.num_parameters():,} parameters: {c.n_layer} layers, {c.n_head} heads, {c.n_embd} "
                      f"wide, context {c.block_size}",
             "data": f"{s.data_dir}, a {run.data.tokenizer.spec['kind']} vocabulary of {c.vocab_size:,}",
             "trained": f"{step:,} of {s.max_steps:,} steps, {run.tokens:,} tokens, {run.epochs(step):.1f} epochs",
             "on": f"{run.machine}, torch {torch.__version__}",
             "time": duration(time.perf_counter() - run.began),
             "validation loss": in_words(found[max(found)]),
             "lowest": f"{found[best]['loss']:.4f} at step {best:,}"}
    if speed:
        facts["speed"] = f"{speed:,.0f} tokens/s, {run.utilisation(speed):.0f} % of matmul speed"
    if asked:
        facts["HellaSwag"] = f"{in_words(run.history[max(asked)]['hellaswag'])} (OpenAI's GPT-2: acc_norm 29.45%)"
    return facts | {"again": f"`{command(s, run.world)}`"}


def write_report(run, step):
    """Writes report.md and loss.svg anew, from the log and what the evaluations found; returns the summary."""
    found = {n: f for n, f in sorted(run.history.items()) if "loss" in f}
    if not found:  # evaluations.json was lost, and nothing has been evaluated since
        return {}
    last = found[max(found)]

    def curve(value):
        return [(f["tokens"], value(f)) for f in found.values() if value(f) is not None]
    trained = [(int(row["tokens"]), float(row["train_loss"])) for row in run.log() if row["train_loss"]]
    panels = [("nats a token, over the tokens read:", {"training": trained, "validation": curve(lambda f: f["loss"])},
               run.lines | ({"floor": last["floor"]} if "floor" in last else {}))]
    if last.get("skills"):
        panels.append(("nats a token above the floor, for want of:", {
            name: curve(lambda f, name=name: f.get("skills", {}).get(name)) for name in last["skills"]}, {}))
    write_text(run.folder / "loss.svg", draw(panels))
    facts = summary(run, step, found)
    lines = [f"# {run.s.preset}", "", "![loss](loss.svg)", "", "| | |", "| --- | --- |"]
    lines += [f"| {name} | {words} |" for name, words in facts.items()]
    for n, f in sorted(run.history.items()):
        if "sample" in f:
            loss = f", validation loss {f['loss']:.4f}" if "loss" in f else ""
            text = [wrapped for line in f["sample"].splitlines() for wrapped in textwrap.wrap(line, 100) or [""]]
            lines += ["", f"## Step {n:,}{loss}", "", "~~~~~~text", *text, "~~~~~~"]
    write_text(run.folder / "report.md", "\n".join(lines) + "\n")
    return facts


# ---- A run and its folder --------------------------------------------------------------------------------------------

FREE_SETTINGS = {"preset", "out_dir", "overwrite", "device", "batch_size", "grad_accum_steps",
                 "compile_model", "deterministic", "eval_only", "eval_every", "eval_tokens", "sample_every",
                 "checkpoint_every", "log_every"}
LOG_COLUMNS = "step,tokens,train_loss,val_loss,val_bits_per_byte,lr,grad_norm,tokens_per_second,seconds".split(",")
RUN_FILES = {"ckpt.pt", "best.pt", "log.csv", "loss.svg", "report.md", "evaluations.json", ".lock"}


@dataclass
class Plan:
    rows_per_step: int  # over all processes
    micro_rows: int  # that one process handles at once


def plan_batch(s, world):
    """How the rows of a step are dealt. Raises UserError where they do not divide."""
    rows, rest = divmod(s.total_batch_size, s.block_size)
    if rest or rows < 1:
        raise UserError(f"total_batch_size ({s.total_batch_size:,}) must be a multiple of block_size ({s.block_size})")
    if rows > s.batch_size and rows % s.batch_size:
        raise UserError(f"a step's {rows} rows do not divide into micro-batches of batch_size {s.batch_size}: make "
                        f"total_batch_size a multiple of {s.batch_size * s.block_size:,}")
    share, rest = divmod(rows, world.size)
    if rest:
        raise UserError(f"a step's {rows} rows cannot be dealt evenly to {world.size} processes: make total_batch_size "
                        f"a multiple of {s.block_size * world.size:,}, or start another number of processes")
    # What fits one process fits several: their smaller shares are cut into equal parts of at most batch_size rows
    most = max(1, min(s.batch_size // world.sharing, share))
    return Plan(rows, next(n for n in range(most, 0, -1) if share % n == 0))


def step_batches(loader, step, plan, world):
    """The part of a step's batch that falls to this process: a list of (x, y) micro-batches, and the number of targets
    in the whole step, which every process works out alike."""
    first = step * plan.rows_per_step
    targets = sum(loader.rows.locate(row)[2] for row in range(first, first + plan.rows_per_step))
    share = plan.rows_per_step // world.size
    mine = [first + world.rank * share + i for i in range(share)]
    batches = [loader.batch(mine[i:i + plan.micro_rows]) for i in range(0, share, plan.micro_rows)]
    if world.device.type == "cuda":  # pinned memory lets the copy run while the GPU computes
        batches = [(x.pin_memory(), y.pin_memory()) for x, y in batches]
    return [(x.to(world.device, non_blocking=True), y.to(world.device, non_blocking=True)) for x, y in batches], targets


def prefetch(loader, start, stop, plan, world):
    """Yields the batches of steps start to stop - 1: a thread prepares each while the one before is being used."""
    with ThreadPoolExecutor(max_workers=1) as pool:
        future = pool.submit(step_batches, loader, start, plan, world)
        for step in range(start, stop):
            ready = future.result()
            if step + 1 < stop:
                future = pool.submit(step_batches, loader, step + 1, plan, world)
            yield ready


class RowIndex:
    """Which tokens are row number g? `shards` are arrays of tokens; with `eot` rows are documents. Shards are shuffled,
    and rows inside a shard: so an epoch reads one file after another, and its order takes no memory to speak of."""

    def __init__(self, shards, block_size, seed, eot):
        self.shards, self.block_size, self.seed, self.eot = shards, block_size, seed, eot
        self.cut_documents = False  # is any document longer than a row?
        self.cuts = functools.lru_cache(maxsize=2)(self._cuts)  # of the shard in use and its neighbour
        self.order = functools.lru_cache(maxsize=2)(self._order)
        self.counts = [self._count(i) for i in range(len(shards))]
        self.per_epoch = sum(self.counts)

    def locate(self, row):
        """Row number -> (shard, first token, number of targets)."""
        epoch, row = divmod(row, self.per_epoch)
        for shard in self.order(epoch):
            if row < self.counts[shard]:
                starts, lengths = self.cuts(epoch, shard)
                return shard, int(starts[row]), int(lengths[row])
            row -= self.counts[shard]

    def _order(self, epoch):
        """The numbers of the shards in the order of this epoch."""
        shards = len(self.shards)
        return list(range(shards)) if self.seed is None else self._rng(epoch).permutation(shards).tolist()

    def _rng(self, *key):
        return np.random.default_rng([self.seed, *key])

    def _count(self, shard):
        """Rows of a shard in every epoch. A stream in training keeps one row's length free to shift its cuts."""
        if self.eot is not None or self.seed is None:
            return len(self.cuts(0, shard)[0])
        fit = (len(self.shards[shard]) - 1) // self.block_size
        return fit - 1 if fit > 1 else fit

    def _cuts(self, epoch, shard):
        """Where the rows of a shard begin and how many targets each has, in the order of this epoch."""
        n, T = len(self.shards[shard]), self.block_size
        if self.eot is not None:
            starts, lengths, longer = cut_documents(self.shards[shard], self.eot, T)
            self.cut_documents |= longer
        elif self.seed is None:
            starts = np.arange(0, n - 1, T)
            lengths = np.minimum(T, n - 1 - starts)
        else:
            count = self._count(shard)
            # The row kept free by _count is dealt out before the first cut and behind the last, differently each epoch
            starts = self._rng(epoch, shard, 0).integers(0, min(T, n - count * T)) + T * np.arange(count)
            lengths = np.full(count, T)
        if self.seed is not None:
            order = self._rng(epoch, shard, 1).permutation(len(starts))
            starts, lengths = starts[order], lengths[order]
        return starts, lengths

    def targets_before(self, row):
        """How many targets the rows 0 to row - 1 hold."""
        if self.eot is None:
            return row * self.block_size
        epochs, rest = divmod(row, self.per_epoch)
        whole = sum(int(self.cuts(0, shard)[1].sum()) for shard in range(len(self.shards)))
        return epochs * whole + sum(self.locate(earlier)[2] for earlier in range(row - rest, row))


def cut_documents(tokens, eot, T):
    """Rows of at most T targets, from each <|endoftext|> to the next: (where each begins, how many targets it has,
    whether any document is longer than a row). Longer ones go on in rows of their own: one of 25 tokens gives rows of
    10, 10 and 5 for T = 10."""
    marks = np.unique(np.concatenate(([0], np.flatnonzero(tokens == eot), [len(tokens) - 1])))
    pieces = -(-np.diff(marks) // T)  # rows that each document takes, rounded up
    index = np.arange(pieces.sum()) - np.repeat(np.cumsum(pieces) - pieces, pieces)  # 0, 1, .. in each
    starts = np.repeat(marks[:-1], pieces) + T * index
    return starts, np.minimum(T, np.repeat(marks[1:], pieces) - starts), bool((pieces > 1).any())


def sinusoids(block_size, n_embd, std):
    """(block_size, n_embd): sines and cosines of falling frequency (Attention paper, section 3.5), scaled to the spread
    of the embeddings they are added to: at their own size of 1 they would drown embeddings of 0.02, and the model
    would learn nothing beyond the frequencies of tokens."""
    position = torch.arange(block_size, dtype=torch.float32)[:, None]  # (T, 1)
    frequency = 10_000 ** (-torch.arange(0, n_embd, 2, dtype=torch.float32) / n_embd)  # (C/2,)
    angle = position * frequency  # (T, C/2)
    return std * math.sqrt(2) * torch.stack((angle.sin(), angle.cos()), dim=2).flatten(1)  # a sine's rms is 1/sqrt(2)


def check_shape(config):
    """Raises UserError for a shape that cannot be built."""
    for name, most in dict(vocab_size=2**24, block_size=2**24, n_layer=2**10, n_head=2**24, n_embd=2**24).items():
        if type(getattr(config, name)) is not int or not 1 <= getattr(config, name) <= most:
            raise UserError(f"{name} is {getattr(config, name)!r}: it must be a whole number from 1 to {most:,}")
    if config.n_embd % config.n_head:
        raise UserError(f"n_embd ({config.n_embd}) must be divisible by n_head ({config.n_head})")
    if config.pos_encoding == "sinusoidal" and config.n_embd % 2:
        raise UserError(f"sinusoidal positions come in pairs: n_embd ({config.n_embd}) must be even")
    if not isinstance(config.dropout, float | int) or not 0 <= config.dropout < 1:
        raise UserError(f"dropout is {config.dropout!r}: it must be at least 0 and below 1")
    for name, allowed in (("pos_encoding", ("learned", "sinusoidal")), ("activation", ("gelu", "relu")),
                          ("attention", ("flash", "manual"))):
        if getattr(config, name) not in allowed:
            raise UserError(f"{name} is {getattr(config, name)!r}: it must be {' or '.join(allowed)}")


def build_model(s, data, world):
    """On the device, a new model of the settings' shape for this vocabulary, or the one in --init_from."""
    if s.init_from:
        model = model_from(read_model(s.init_from), dropout=s.dropout, attention=s.attention)
        own = model.tokenizer  # None where a folder holds none: then the data's has to have its size
        if (own.spec != data.tokenizer.spec) if own else model.config.vocab_size != data.vocab_size:
            raise UserError(f"{s.init_from} and {s.data_dir} have different tokenizers: prepare the data with its own"
                            + (" (--tokenizer=gpt2)" if own and own.spec["kind"] == "gpt2" else "")
                            + (", or name the run of this data with --out_dir" if s.eval_only else ""))
    else:
        names = [f.name for f in dataclasses.fields(GPTConfig) if f.name != "vocab_size"]
        config = GPTConfig(vocab_size=data.vocab_size, **{name: getattr(s, name) for name in names})
        check_shape(config)
        needed = 4 * (config.block_size + config.vocab_size + 12 * config.n_layer * config.n_embd) * config.n_embd
        if needed > 2**40:
            raise UserError(f"a model of this shape takes {needed / 1e9:,.0f} GB: lower n_layer, n_embd or block_size")
        model = GPT(config, s.init_std)
    model.tokenizer, model.starts_documents = data.tokenizer, s.rows == "documents"
    return model.to(world.device)


def adopt_shape(s, given):
    """With --init_from the shape is that of its model; only shorter rows may be asked for."""
    if s.eval_only and not s.init_from:
        s.init_from = str(Path(s.out_dir or f"out/{s.preset}") / "best.pt")
        if not os.path.exists(s.init_from):
            raise UserError(f"there is no {s.init_from} to evaluate: name a run's folder with --out_dir, or weights "
                            "with --init_from")
    if s.init_from in ("scratch", "resume"):
        raise UserError(f"--init_from={s.init_from}: leave it out; a run starts from scratch, and the same command, "
                        "given again, resumes it")
    if s.init_from:
        config = read_model(s.init_from, look=True)["config"]
        if s.block_size > config["block_size"] and "block_size" in given:
            raise UserError(f"block_size {s.block_size} is more than {s.init_from}'s {config['block_size']} positions")
        for name in ("n_layer", "n_head", "n_embd", "pos_encoding", "activation"):
            if given.pop(name, config[name]) != config[name] and os.environ.get("RANK", "0") == "0":
                print(f"note: --{name} is not heeded: {s.init_from} has {config[name]}")
            setattr(s, name, config[name])
        if "block_size" not in given:
            s.block_size = config["block_size"]


def same_run(settings, other):
    """Do two dicts of settings lead to the same weights?"""
    names = (settings.keys() | other.keys()) - FREE_SETTINGS
    return all(settings.get(name) == other.get(name) for name in names)


def lock(folder):
    """Claims a folder for this process until it ends, however it ends: the system keeps the lock, not the file.
    Returns the open file, or None where another process has it."""
    file = open(folder / ".lock", "a", encoding="utf-8")
    try:
        if os.name == "nt":
            import msvcrt
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES, errno.EDEADLK):  # somebody has it, in each system's words
            file.close()
            return None
        # A file system without locks, as some network drives are: better to run unguarded than not at all
    return file


def own_checkpoint(path, look=False):
    """What load_checkpoint returns of a run's own file; where that fails, the way out is said."""
    try:
        return load_checkpoint(path, look)
    except UserError as error:
        raise UserError(f"{error}; to start over: --out_dir={path.parent} --overwrite=True") from None


def choose_folder(s):
    """(folder, checkpoint to go on from or None, lock): the unfinished run of these settings, or the next free folder.
    Raises UserError where that run is still alive, or the folder cannot be written."""
    base = Path(s.out_dir or f"out/{s.preset}")
    if s.overwrite and os.path.isfile(s.init_from) and Path(s.init_from).resolve().parent == base.resolve():
        raise UserError(f"--overwrite=True would delete {s.init_from}, from which to start: choose another --out_dir")
    for number in range(1, 10_000):
        folder = base if number == 1 else base.parent / f"{base.name or 'run'}-{number}"
        with contextlib.ExitStack() as unless_taken:
            try:
                folder.mkdir(parents=True, exist_ok=True)
                names = {path.name for path in folder.iterdir() if not path.name.endswith(".tmp")}
                if names - RUN_FILES and not names & {"ckpt.pt", "best.pt"} and not s.overwrite:
                    continue  # somebody keeps other things here
                lock_file = unless_taken.enter_context(lock(folder) or contextlib.nullcontext())
            except OSError as error:
                raise UserError(f"cannot write to {folder} ({error.strerror}): choose another --out_dir") from None
            # Killed before its first checkpoint, a run has only a best.pt, which tells whose the folder is
            saved = [path for path in (folder / "ckpt.pt", folder / "best.pt") if path.exists() and not s.overwrite]
            found = own_checkpoint(saved[0], look=True) if saved else None
            if found and not same_run(found["settings"], dataclasses.asdict(s)):
                continue
            if lock_file is None:
                raise UserError(f"a run is at work in {folder}: wait for it, stop it, or choose another --out_dir")
            if not found or not is_done(folder, found["step"]):
                unless_taken.pop_all()
                return folder, saved[0] if saved and saved[0].name == "ckpt.pt" else None, lock_file
    raise UserError(f"{base} has {number:,} runs beside it: choose another --out_dir")


def read_log(folder):
    """The whole rows of a folder's log.csv, as lists of strings; half a row, left by a power cut, is none."""
    try:
        text = (folder / "log.csv").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    return [row.split(",") for row in re.findall(r"^[0-9]{1,15}(?:,[-+.\w]*){7},[0-9]+\.[0-9]{2}$", text, re.MULTILINE)]


def read_history(folder, before):
    """{step: what was found and written there}, of a folder's evaluations.json, for steps below `before`."""
    try:
        history = json.loads((folder / "evaluations.json").read_text(encoding="utf-8"))
        return {int(step): found for step, found in history.items() if int(step) < before}
    except (OSError, ValueError, AttributeError):
        return {}


def is_done(folder, step):
    """Has the run in this folder, saved at `step`, come to its end? Only its very last row has no training loss: a run
    that was killed between its last step and its last sample still has something to do."""
    rows = read_log(folder)
    return bool(rows) and int(rows[-1][0]) == step and not rows[-1][LOG_COLUMNS.index("train_loss")]


def not_training(method):
    """Decorates a method of Run whose time is left out of the throughput."""
    @functools.wraps(method)
    def wrapper(run, *args):
        wait_for(run.world.device)  # for steps that are still under way
        began = time.perf_counter()
        method(run, *args)
        if run.mark:
            run.mark = (run.mark[0] + time.perf_counter() - began, run.mark[1])
    return wrapper


class Run:
    """What a run keeps on disk and says on the terminal: the one owner of its folder, log, checkpoints and clock."""

    def __init__(self, s, model, optimizer, scaler, data, world):
        self.s, self.model, self.data, self.world = s, model, data, world
        self.optimizer, self.scaler = optimizer, scaler
        self.best, self.signal, self.bar, self.evaluation_seconds, self.to_estimate = math.inf, None, None, 0, True
        self.tokens, self.row, self.time_used = 0, {}, 0.0
        self.began = time.perf_counter()
        self.mark = None  # (time, tokens) since which throughput is measured; None: not before something was logged

    # -- beginning and end

    def resume_or_begin(self):
        """Finds the folder, loads what is there; returns the step to go on from."""
        folder = saved = problem = None
        if self.world.main:
            try:
                folder, saved, self.lock = choose_folder(self.s)
                # Also after an error: whoever calls main() again in this process, as in a notebook, finds it free
                self.world.at_end.callback(self.lock.close)
            except UserError as error:
                problem = str(error)
        self.folder, saved, problem = self.world.from_main((folder, saved, problem))
        if problem:
            raise UserError(problem)
        self.start = self.load(saved) if saved else 0
        rows = [row for row in read_log(self.folder) if int(row[0]) < self.start]
        used = float(rows[-1][-1]) if rows else 0
        self.began -= used
        if self.s.max_minutes:  # the schedule too goes on from where the clock stood
            self.time_used = used / (60 * self.s.max_minutes)
        if self.world.main:
            try:
                left = [*self.folder.glob(".*.tmp")]  # by a run that was killed while writing
                for path in left if saved else [*left, self.folder / "ckpt.pt", self.folder / "best.pt"]:
                    path.unlink(missing_ok=True)
            except OSError as error:
                raise cannot_write(path, error) from None
            write_text(self.folder / "log.csv", "\n".join(map(",".join, [LOG_COLUMNS, *rows])) + "\n")
        return self.start

    def load(self, path):
        """Takes weights, optimizer and scaler from a checkpoint; returns its step."""
        checkpoint = own_checkpoint(path)
        if checkpoint["tokenizer"] != self.data.tokenizer.spec:
            raise UserError(f"{path} was trained with another tokenizer than {self.s.data_dir} has now: prepare "
                            f"the same data again, or start over with --out_dir={self.folder} --overwrite=True")
        learned = [p for group in self.optimizer.param_groups for p in group["params"]]
        shapes = [dict(step=(), exp_avg=p.shape, exp_avg_sq=p.shape) for p in learned]
        try:
            self.model.load_state_dict(checkpoint["model"])
            state, scale = checkpoint["optimizer"]["state"], checkpoint["optimizer"].get("scaler")
            if [{name: t.shape for name, t in state[i].items()} for i in range(len(state))] != shapes:
                raise ValueError("the optimizer's averages have other shapes")
            self.optimizer.load_state_dict(self.optimizer.state_dict() | {"state": state})
            if self.scaler.is_enabled() and scale:
                if any(type(scale[name]) is not type(value) for name, value in self.scaler.state_dict().items()):
                    raise TypeError("the scaler's state is malformed")
                self.scaler.load_state_dict(scale)
        except (KeyError, ValueError, RuntimeError, TypeError, AttributeError) as error:
            raise UserError(f"{path} does not fit this model ({str(error).splitlines()[0]}); start over with "
                            f"--out_dir={self.folder} --overwrite=True") from None
        self.best = checkpoint["best_val_loss"]
        return checkpoint["step"]

    def announce(self, plan, loader):
        """Says what is about to happen, and where the plan is poor."""
        s, world, model, V = self.s, self.world, self.model, self.model.config.vocab_size
        self.tokens = loader.rows.targets_before(self.start * plan.rows_per_step)
        self.epochs = lambda step: step * plan.rows_per_step / loader.rows_per_epoch
        own = PRESETS[s.preset].get("data_dir", Settings.data_dir) == s.data_dir
        self.lines = self.data.meta.get("landmarks", {}) | (TARGETS.get(s.preset, {}) if own else {})
        self.history = read_history(self.folder, before=self.start)
        if not world.main:
            return
        self.speed = matmul_speed(world.device, world.dtype)
        device = torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else str(world.device)
        self.machine = f"{world.size} x {device}, {str(world.dtype)[6:]} at {self.speed / 1e9:,.0f} GFLOP/s"
        operations = operations_per_token(model, s.block_size)
        parameters, epochs = model.num_parameters(), self.epochs(s.max_steps)
        in_rows = loader.rows_per_epoch * s.block_size
        tokens = epochs * (sum(len(shard) - 1 for shard in loader.shards) if s.rows == "documents" else in_rows)
        parts = [f"{part} {sum(p.numel() for name, p in model.named_parameters() if key in name and p.requires_grad):,}"
                 for key, part in (("wte", "embeddings"), ("wpe", "positions"), ("attn", "attention"), ("mlp", "MLPs"),
                                   ("ln", "norms"))]
        print(f"model: {parameters:,} parameters, {s.n_layer} layers, {s.n_head} heads, {s.n_embd} wide")
        print(f"       {', '.join(parts)}")
        above = ", or somewhat above, with first weights so large" if s.init_std > 0.02 else ""
        print(f"       {V:,} tokens, so expect a first loss near ln {V:,} = {math.log(V):.2f}{above}")
        print(f"machine: {self.machine}")
        print(f"batch: {plan.rows_per_step} rows of at most {s.block_size} tokens, {plan.micro_rows} at once")
        most = f" or {s.max_minutes:g} minutes, whichever comes first" if s.max_minutes else ""
        print(f"plan: {s.max_steps:,} steps{most}, {short(tokens / s.max_steps)} tokens each, {short(tokens)} in all: "
              f"{epochs:.1f} epochs of {s.data_dir}, {tokens / parameters:.1f} tokens a parameter; "
              f"{short(operations)} operations a token, {operations * tokens:.2g} in all")
        for poor, why in (
                (tokens < parameters, "under 1 token a parameter: so large a model learns little in so few steps"),
                (tokens > 200 * parameters, "over 200 tokens a parameter: a larger model would learn more from them"),
                # Muennighoff et al. 2023, section 6
                (epochs > 40, f"{epochs:.0f} epochs: from some 40 on, reading a text again teaches nothing new"),
                (s.warmup_steps >= s.max_steps, "the warm-up is as long as the run: learning_rate is never reached")):
            if poor:
                print(f"warning: {why}")
        if self.start:
            print(f"continuing {self.folder} from step {self.start:,} (to start over: --out_dir={self.folder} "
                  "--overwrite=True)")
        else:
            print(f"a new run in {self.folder}")
        if sys.stderr.isatty():
            self.bar = tqdm(total=s.max_steps, initial=self.start, unit="step", dynamic_ncols=True)

    def finished(self, step):
        self.write_row(step, {})  # by which a run is done: see is_done
        facts = write_report(self, max(self.history)) if self.world.main else {}
        self.close()
        if self.world.main:
            print(f"done in {facts['time']}, best validation loss {self.best:.4f}")
            for name in ("trained", "validation loss", "HellaSwag", "speed"):
                print(f"{name}: {facts[name]}") if name in facts else None
            print(f"see {self.folder / 'report.md'}, and read what it writes: "
                  f"python sample.py --checkpoint={self.folder / 'best.pt'}")
        return 0

    def stopped(self, step):
        self.save(step)
        self.close()
        if self.world.main:
            again = "the same command" + (" without --overwrite" if self.s.overwrite else "")
            print(f"stopped at step {step:,}, saved in {self.folder}: {again} goes on from here", flush=True)
        return 128 + self.signal

    def close(self):
        if self.bar:
            self.bar.close()
        if self.world.main:
            self.lock.close()

    @contextlib.contextmanager
    def interruptible(self):
        """Ctrl-C and SIGTERM let the step finish and save; the second leaves at once."""
        def handler(number, _):
            if self.signal and time.perf_counter() - self.signal_time > 0.5:  # torchrun sends the first one twice
                os._exit(128 + number)
            self.signal, self.signal_time = number, time.perf_counter()
        try:
            before = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
        except ValueError:  # not in the main thread: whoever started us minds the signals
            before = {}
        try:
            yield
        finally:
            for number, was in before.items():
                signal.signal(number, was)
            self.close()

    def stop_requested(self, step):
        """Was the run asked to stop? Several processes must agree, which they do where they meet to log."""
        if self.world.size == 1:
            return bool(self.signal)
        if step % self.s.log_every:
            return False
        signals = torch.tensor(self.signal or 0, device=self.world.device)
        self.signal = self.world.reduce(signals, largest=True).item()
        self.signal_time = time.perf_counter()  # one that comes to this process only now is the same
        return bool(self.signal)

    # -- what is written and shown

    def say(self, text):
        if self.world.main:
            tqdm.write(text) if self.bar else print(text, flush=True)

    def checkpoint(self, step):
        return {"model": self.model.state_dict(), "step": step, "config": dataclasses.asdict(self.model.config),
                "settings": dataclasses.asdict(self.s), "tokenizer": self.data.tokenizer.spec,
                "best_val_loss": float(self.best)}

    @not_training
    def save(self, step):
        self.check_finite()
        if self.world.main:
            # float16's scaler is part of what a resume needs; where it is not used its state is empty
            optimizer = self.optimizer.state_dict() | {"scaler": self.scaler.state_dict()}
            state = self.checkpoint(step) | {"optimizer": optimizer}
            write_atomically(self.folder / "ckpt.pt", lambda file: torch.save(state, file))

    def log(self):
        """The rows of log.csv, {column: text}."""
        return [dict(zip(LOG_COLUMNS, row, strict=True)) for row in read_log(self.folder)]

    def note(self, step, **found):
        """Keeps what an evaluation found, and brings picture and report up to date."""
        if self.world.main and math.isfinite(found.get("loss", 0)):
            self.history.setdefault(step, {"tokens": self.tokens}).update(found)
            write_text(self.folder / "evaluations.json", json.dumps(self.history))
            write_report(self, step)

    @not_training
    def evaluate(self, step, loader):
        """Measures the model on validation rows, takes note, and keeps the weights if their loss is the lowest."""
        found = evaluate(self.model, loader, self.s, self.world, self.data)
        loss, self.evaluation_seconds = found["loss"], found.pop("seconds")
        self.row = {"val_loss": repr(loss), "val_bits_per_byte": repr(found["bits_per_byte"])}
        self.say(f"step {step:,}: val {in_words(found)}")
        for name, value in self.lines.items():
            if loss < value <= self.best:
                self.say(f"step {step:,}: past the {name} line ({value:.4f})")
        if loss < self.best:
            self.best = loss
            if self.world.main:
                write_atomically(self.folder / "best.pt", lambda file: torch.save(self.checkpoint(step), file))
        self.note(step, **found)

    @not_training
    def show_sample(self, step):
        """Lets the model write, and asks it HellaSwag's questions where they are at hand."""
        text = ""
        if self.world.main:
            text = self.model.generate("", max_new_tokens=200, temperature=0.8, seed=mix(self.s.seed, step)).strip()
            self.say(f"step {step:,} writes: {text}")
        scores = hellaswag_scores(self.model, self.world)
        if scores:
            self.say(f"step {step:,}: HellaSwag {in_words(scores)}")
        self.note(step, sample=text, **({"hellaswag": scores} if scores else {}))

    def utilisation(self, speed):
        """Of a speed in tokens a second: how many per cent of this machine's arithmetic it is."""
        operations = operations_per_token(self.model, self.s.block_size)
        return 100 * speed * operations / (self.speed * self.world.size)

    def after_step(self, step, targets, loss_sum, lr, grad_norm):
        """Counts the step's tokens and, every log_every steps, logs it: only then does anybody wait for the device."""
        s = self.s
        self.tokens += targets
        self.latest = (step, loss_sum, lr, grad_norm)
        if s.max_minutes:  # by the slowest clock, so that all processes end together
            used = torch.tensor((time.perf_counter() - self.began) / (60 * s.max_minutes))
            self.time_used = self.world.reduce(used, largest=True).item()
        if self.bar:
            self.bar.update()
        if not (step % s.log_every == 0 or step == s.max_steps - 1 or self.row):
            return
        loss, norm = self.check_finite()
        now = time.perf_counter()
        speed = (self.tokens - self.mark[1]) / (now - self.mark[0]) if self.mark else None
        self.mark = (now, self.tokens)
        self.write_row(step, {"train_loss": repr(loss), "lr": f"{lr:.6g}", "grad_norm": f"{norm:.6g}",
                              "tokens_per_second": f"{speed:.0f}" if speed else ""}, self.tokens - targets)
        if not self.world.main:
            return
        used = ""
        if speed:
            used = f" | {speed:,.0f} tokens/s, {self.utilisation(speed):.0f} % of matmul speed"
            if self.to_estimate:
                evaluations = math.ceil(s.max_steps / s.eval_every) - step // s.eval_every
                left = (s.max_steps - step) * targets / speed + evaluations * self.evaluation_seconds
                left = min(left, 60 * s.max_minutes * (1 - self.time_used)) if s.max_minutes else left
                self.say(f"about {duration(left)} left, evaluations included")
                self.to_estimate = False
        if skipped := self.skipped_steps(step):
            used += f" | {skipped:,} steps skipped: gradients beyond float16"
        if self.bar:
            self.bar.set_postfix_str(f"train {loss:.4f}{used}")
        elif step % s.log_every == 0:
            print(f"step {step:,}/{s.max_steps:,} | train {loss:.4f} | lr {lr:.2e} | grad {norm:.2f}{used}", flush=True)

    def skipped_steps(self, step):
        """How many steps float16's scaler has left out, because their gradients overflowed. The optimizer, whose state
        a checkpoint keeps, counts those that it took."""
        taken = self.optimizer.state[self.optimizer.param_groups[0]["params"][0]].get("step", 0)
        return step + 1 - int(taken) if self.scaler.is_enabled() else 0

    def check_finite(self):
        """(loss, gradient norm) of the latest step. Raises UserError where they are no numbers any more: from there the
        run would learn nothing, and a checkpoint of it would bury the last good one."""
        step, loss_sum, lr, grad_norm = self.latest
        loss, norm = self.world.reduce(loss_sum.clone()).item(), grad_norm.item()
        # float16's scaler expects infinite gradients now and then, and skips those steps
        if not math.isfinite(loss) or not (math.isfinite(norm) or self.world.dtype == torch.float16):
            raise UserError(f"step {step:,} has loss {loss:.4g}, gradient norm {norm:.4g} at learning rate {lr:.2g}: "
                            "try a lower --learning_rate or more --warmup_steps; what was saved in "
                            f"{self.folder} before is whole")
        return loss, norm

    def write_row(self, step, values, tokens=None):
        values |= self.row | {"step": str(step), "tokens": str(self.tokens if tokens is None else tokens),
                              "seconds": f"{time.perf_counter() - self.began:.2f}"}
        self.row = {}
        if self.world.main:
            try:
                with open(self.folder / "log.csv", "a", encoding="utf-8", newline="") as file:
                    file.write(",".join(values.get(name, "") for name in LOG_COLUMNS) + "\n")
            except OSError as error:
                raise cannot_write(self.folder / "log.csv", error) from None


# ---- The command line ------------------------------------------------------------------------------------------------

# What nanoGPT's users will type first.
OTHER_NAMES = {"max_iters": "max_steps", "lr_decay_iters": "max_steps", "warmup_iters": "warmup_steps",
               "eval_interval": "eval_every", "eval_iters": "eval_tokens", "log_interval": "log_every",
               "dataset": "data_dir", "compile": "compile_model", "gradient_accumulation_steps": "grad_accum_steps",
               "start": "prompt", "lr": "learning_rate"}


def setting_comments(cls):
    """{setting: its comment}, read off the source, so that --help and the file say the same."""
    try:
        source = inspect.getsource(cls)
    except OSError:
        return {}
    return dict(re.findall(r"^    (\w+):.*?  # (.*)$", source, re.MULTILINE))


def print_help(cls, doc, presets):
    print(doc.strip() + "\n\nSettings (edit their defaults at the top of the file, or give them as --name=value):")
    comments = setting_comments(cls)
    for field in dataclasses.fields(cls):
        print(f"  --{field.name}={field.default!s:<16} {comments.get(field.name, '')}")
    for name, changes in (presets or {}).items():
        print(f"  --preset={name}: " + (" ".join(f"{k}={v}" for k, v in changes.items()) or "the defaults"))


def parse_value(name, kind, text):
    """The value that `text` stands for, of a setting's type. Raises UserError where it stands for none."""
    choices = typing.get_args(kind)
    if typing.get_origin(kind) is Literal:
        for choice in choices:
            if str(choice).lower() == text.lower():
                return choice
        raise UserError(f"--{name}={text}: it must be one of {', '.join(map(str, choices))}")
    if type(None) in choices:  # int | None
        if text.lower() == "none":
            return None
        kind = choices[0]
    try:
        if kind is bool:
            return {"true": True, "false": False}[text.lower()]
        value = kind(text)
        if kind is float and not math.isfinite(value):
            raise ValueError
        return value
    except (ValueError, KeyError):
        wanted = {int: "a whole number", float: "a number", bool: "True or False"}[kind]
        raise UserError(f"--{name}={text}: it must be {wanted}") from None


def parse_settings(cls, argv=None, doc="", presets=None, bare=None):
    """(settings, those given on the command line): defaults, then the preset, then the command line. `bare` names the
    setting that a first word without dashes sets. Prints the help and exits for --help; raises UserError for
    anything that is not a setting or not of its type."""
    argv = list(sys.argv[1:] if argv is None else argv)
    kinds = typing.get_type_hints(cls)
    given, words = {}, iter(range(len(argv)))
    for i in words:
        word = argv[i]
        if word in ("-h", "--help"):
            print_help(cls, doc, presets)
            raise SystemExit(0)
        if not word.startswith("--"):
            if word.startswith("-") and word[1:].partition("=")[0] in kinds:
                raise UserError(f"{word}: settings begin with two dashes: -{word}")
            if bare is None or bare in given:
                quotes = f", and a {bare} with spaces or a glob stands in quotes" if bare else ""
                raise UserError(f"{word!r} is no option: settings are given as --name=value (see --help){quotes}")
            given[bare] = word
            continue
        name, equals, text = word[2:].partition("=")
        name = name.replace("-", "_")
        if name not in kinds:
            known = OTHER_NAMES.get(name)
            near = [known] if known in kinds else difflib.get_close_matches(name, kinds, 1, 0.5)
            raise UserError(f"--{name} is no setting" + (f"; did you mean --{near[0]}?" if near else " (see --help)"))
        following = argv[i + 1] if i + 1 < len(argv) else None
        if not equals and kinds[name] is bool:  # --overwrite alone means True
            text = argv[next(words)] if str(following).lower() in ("true", "false") else "True"
        elif not equals:
            if following is None or following.startswith("--"):
                raise UserError(f"--{name} needs a value: --{name}=...")
            text = argv[next(words)]
        if name != bare:  # a shell reads ~ as the home folder where a word begins, not behind a =
            text = os.path.expanduser(text)
        given[name] = parse_value(name, kinds[name], text)
    preset_changes = {}
    if presets is not None:
        preset = given.get("preset", cls.preset)
        if preset not in presets:
            near = difflib.get_close_matches(preset, presets, 1, 0.4)
            raise UserError(f"there is no preset {preset!r}" + (f"; did you mean {near[0]}?" if near else ".")
                            + f" All: {', '.join(presets)}")
        preset_changes = presets[preset]
    return cls(**preset_changes | given), given


def check_ranges(s, **ranges):
    """Raises UserError for a setting outside its (least, most)."""
    for name, (least, most) in ranges.items():
        value = getattr(s, name)
        if value is not None and not least <= value <= most:
            raise UserError(f"{name} is {value:,}: it must be " + (f"at least {least:,}" if value < least
                                                                   else f"at most {most:,}"))


def check_settings(s):
    """Raises UserError for a value out of range; fills in total_batch_size."""
    positive, any_size = (1, 2**53), (0, math.inf)
    check_ranges(s, batch_size=(1, 2**20), block_size=(1, 2**24), total_batch_size=positive, grad_accum_steps=positive,
                 max_steps=positive, warmup_steps=(0, 2**53), seed=(0, 2**63), eval_every=positive,
                 eval_tokens=positive, sample_every=positive, checkpoint_every=positive, log_every=positive,
                 learning_rate=any_size, min_lr=any_size, weight_decay=any_size, grad_clip=any_size)
    if s.min_lr > s.learning_rate:
        raise UserError(f"min_lr ({s.min_lr:g}) is above learning_rate ({s.learning_rate:g}): the cosine falls to it")
    for name in ("max_minutes", "init_std"):
        if getattr(s, name) is not None and getattr(s, name) <= 0:
            raise UserError(f"{name} is {getattr(s, name)}: it must be more than 0")
    for name in ("beta1", "beta2", "dropout"):
        if not 0 <= getattr(s, name) < 1:
            raise UserError(f"{name} is {getattr(s, name)}: it must be at least 0 and below 1")
    if s.grad_accum_steps is not None:
        s.total_batch_size = s.batch_size * s.block_size * s.grad_accum_steps
    elif s.total_batch_size is None:
        s.total_batch_size = s.batch_size * s.block_size
    check_ranges(s, total_batch_size=(1, 2**27))


def prepare_stories(s, world):
    """The default preset makes its own data, on one process, while the others wait."""
    missing = s.data_dir == Settings.data_dir and not (Path(s.data_dir) / "meta.json").exists()
    status = 0
    if missing and world.main:
        script = Path(__file__).with_name("prepare_data.py")
        print(f"no data in {s.data_dir} yet: running python {script.name}", flush=True)
        status = subprocess.run([sys.executable, str(script), "stories", f"--out_dir={s.data_dir}"]).returncode
    if world.from_main(status):
        raise UserError("prepare_data.py could not write the stories; its message is above")


@reports_mistakes
def main(argv=None):
    s, given = parse_settings(Settings, argv, __doc__, PRESETS)
    adopt_shape(s, given)
    check_settings(s)
    keep_memory()
    world = World(s)
    try:
        if world.main:
            changes = PRESETS[s.preset] | given
            changed = " ".join(f"{name}={value}" for name, value in changes.items() if name != "preset")
            print(f"preset {s.preset}: {changed or 'as it stands'}")
        prepare_stories(s, world)
        return report_evaluation(s, world) if s.eval_only else train(s, world)
    except (RuntimeError, MemoryError) as error:
        if is_out_of_memory(error):
            accumulated = max(1, s.total_batch_size // (s.batch_size * s.block_size))
            raise UserError(f"{world.device} is out of memory: halve --batch_size ({s.batch_size}) and double "
                            f"--grad_accum_steps ({accumulated}), and the same run, without --overwrite, goes on from "
                            "its last checkpoint; where one row is too much, lower --block_size or --n_embd") from None
        if world.size > 1 and (isinstance(error, dist.DistError) or "peer" in str(error)):
            # Each one says it that is left: nobody knows which they are
            print(f"error: process {world.rank} ends, because another one was killed or failed: see above; the same "
                  "command, without --overwrite, goes on from the last checkpoint", file=sys.stderr, flush=True)
            raise SystemExit(1) from None
        raise
    finally:
        world.close()


if __name__ == "__main__":
    sys.exit(main())
