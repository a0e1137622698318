"""G-HANet in plain PyTorch, one bag at a time, written from the specification: the peer of the planted-cohort check."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

WIDTH, HALF, RATE, RATIO = 512, 256, 0.25, 0.2


class Attention(nn.Module):
    """Attn(q, c) of section 4.1: four heads, dropout of the probabilities; returns output and raw scores."""

    def __init__(self, heads: int = 4):
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(3))
        self.out = nn.Linear(WIDTH, WIDTH)

    def forward(self, query: torch.Tensor, context: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """[T, 512] and [N, 512] to ([T, 512], [heads, T, N])."""
        q, k, v = (self._split(layer(x)) for layer, x in ((self.q, query), (self.k, context), (self.v, context)))
        scores = q @ k.transpose(1, 2) / math.sqrt(q.shape[-1])
        p = F.dropout(scores.softmax(-1), RATE, self.training)
        return self.out((p @ v).transpose(0, 1).reshape(query.shape[0], -1)), scores

    def _split(self, x: torch.Tensor) -> torch.Tensor:
        return x.view(x.shape[0], self.heads, -1).transpose(0, 1)


class FeedForward(nn.Module):
    """GFF of section 4.1."""

    def __init__(self):
        super().__init__()
        self.expand, self.contract = nn.Linear(WIDTH, 8 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[T, 512] to [T, 512]."""
        a, b = self.expand(x).chunk(2, -1)
        return F.dropout(self.contract(a * F.gelu(b)), RATE, self.training)


class Head(nn.Module):
    """Step 10 of CAB for one group."""

    def __init__(self, size: int):
        super().__init__()
        self.dense, self.norm, self.out = nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH), nn.Linear(WIDTH, size)

    def forward(self, token: torch.Tensor) -> torch.Tensor:
        """[512] to [size]."""
        return self.out(F.dropout(F.elu(self.norm(self.dense(token))), RATE, self.training))


class GHanet(nn.Module):
    """CAB, heads and HSB of sections 4.2 and 4.3 with the faithful options."""

    def __init__(self, feat_dim: int, groups: tuple[int, ...], bins: int = 4):
        super().__init__()
        tokens = len(groups)
        self.tokens = nn.Parameter(torch.randn(tokens, WIDTH))
        self.proj, self.cross, self.ffn_1, self.ffn_2 = nn.Linear(feat_dim, WIDTH), Attention(), *_feed_forwards()
        self.context, self.query_1, self.query_2, self.norm_1, self.norm_2, self.norm_out = _norms(6)
        self.heads = nn.ModuleList(Head(size) for size in groups)
        self.patch, self.patch_norm = nn.Linear(feat_dim, WIDTH), nn.LayerNorm(WIDTH)
        self.tanh, self.sigmoid, self.score = nn.Linear(WIDTH, HALF), nn.Linear(WIDTH, HALF), nn.Linear(HALF, 1)
        self.hyper_1, self.hyper_2 = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.hyper_norm_1, self.hyper_norm_2, self.norm_ffn = _norms(3)
        self.self_attention, self.ffn = Attention(), FeedForward()
        self.reduce, self.reduce_norm = nn.Linear(WIDTH, HALF), nn.LayerNorm(HALF)
        self.hazards = nn.Linear(tokens * HALF, bins)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor], torch.Tensor]:
        """One bag [N, D] to (hazard logits, reconstructions of the groups, Q [T, N])."""
        read, scores = self._associate(x)
        pooled, q = self._pool(x, scores.mean(0))
        hidden = F.relu(self.hyper_norm_1(self.hyper_1(pooled)))
        f = (pooled + F.relu(self.hyper_norm_2(self.hyper_2(hidden))) + read) / 2
        f = f + self.self_attention(f, f)[0]
        f = f + self.ffn(self.norm_ffn(f))
        z = F.dropout(F.relu(self.reduce_norm(self.reduce(f))), RATE, self.training)
        return self.hazards(z.reshape(-1)), [head(token) for head, token in zip(self.heads, read)], q

    def _associate(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        context = self.context(F.dropout(F.relu(self.proj(x)), RATE, self.training))
        u, _ = self.cross(self.query_1(self.tokens), context)
        u = u + self.ffn_1(self.norm_1(u))
        v, scores = self.cross(self.query_2(self.tokens + u), context)
        return self.norm_out(v + self.ffn_2(self.norm_2(v))), scores

    def _pool(self, x: torch.Tensor, m: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        b = F.dropout(F.relu(self.patch_norm(self.patch(x))), RATE, self.training)
        p = self.score(torch.tanh(self.tanh(b)) * torch.sigmoid(self.sigmoid(b))).T.softmax(-1)
        least = m.topk(int(len(x) * RATIO), 1).values[:, -1:]
        q = torch.where(m >= least, m, m - 100000).softmax(-1).detach()
        return (p + q) / 2 @ b, q


def _norms(count: int) -> tuple[nn.LayerNorm, ...]:
    return tuple(nn.LayerNorm(WIDTH) for _ in range(count))


def _feed_forwards() -> tuple[FeedForward, FeedForward]:
    return FeedForward(), FeedForward()


def _loss(logits: torch.Tensor, parts: list[torch.Tensor], targets: torch.Tensor, label: int, event: bool) -> Any:
    hazard = logits.sigmoid()
    survival = torch.cumprod(1 - hazard, 0)
    before = survival[label - 1] if label else torch.ones(())
    terms = (before, hazard[label]) if event else (survival[label],)
    total = -sum(torch.log(term.clamp(min=1e-7)) for term in terms)
    for part, target in zip(parts, targets):
        total = total + 0.3 * ((1 - F.cosine_similarity(part, target, 0)) ** 3 + F.mse_loss(part, target))
    return total


def fit_and_predict(
    cohort: Any,
    train: int,
    groups: tuple[int, ...],
    window: int,
    epochs: int,
    seed: int,
    net: GHanet | None = None,
) -> tuple:
    """Trains on the first `train` patients and predicts the others.

    Args:
      cohort: as `exp_ghanet_planted.Cohort`.
      train: training patients.
      groups: sizes of the gene groups, all equal.
      window: patients whose gradients are accumulated.
      epochs: passes in uniform order.
      seed: of initialisation, order and dropout.
      net: where to begin; None: initialised.

    Returns:
      (risk [n], reconstruction [n, groups, size], list of Q [groups, N]) of the other patients.
    """
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    net = net or GHanet(cohort.patches.shape[-1], groups)
    optimizer = torch.optim.Adam(net.parameters(), lr=2e-4, weight_decay=1e-5)
    bags = [torch.tensor(x[:n]) for x, n in zip(cohort.patches, cohort.size)]
    targets = torch.tensor(cohort.genes).view(len(bags), len(groups), -1)
    for _ in range(epochs):
        for number, i in enumerate(rng.permutation(train)):
            logits, parts, _ = net(bags[i])
            (_loss(logits, parts, targets[i], int(cohort.bins[i]), bool(cohort.event[i])) / window).backward()
            if (number + 1) % window == 0:
                optimizer.step()
                optimizer.zero_grad()
    net.eval()
    with torch.no_grad():
        found = [net(bag) for bag in bags[train:]]
    risk = [-float(torch.cumprod(1 - logits.sigmoid(), 0).sum()) for logits, _, _ in found]
    parts = np.stack([torch.stack(parts).numpy() for _, parts, _ in found])
    return np.array(risk), parts, [q.numpy() for _, _, q in found]
