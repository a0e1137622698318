"""What fixes the architecture of G-HANet (specification, sections 4 and 9)."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp

from histokd_jax.ops.pooling import CHUNKED

SHARED, OWN = "shared", "own"
MEAN, CONCAT, NO_FUSION = "mean", "concat", "none"
BOTH, MORPHOLOGY, GENOTYPE, UNIFORM = "both", "morphology", "genotype", "uniform"
RAW, PROB = "raw", "prob"
LAST, FIRST = "last", "first"
FLATTEN = "flatten"


@dataclasses.dataclass(frozen=True)
class NetworkSpec:
    """Everything that fixes the architecture; names after section 9, defaults are the reference.

    Attributes:
      feat_dim: patch-embedding width D.
      outputs: time bins, or 1 for a Cox head.
      groups: kept features of each gene group; one token per group, and no head for a group of size 0.
      tokens: T.
      width: H.
      heads: attention heads.
      head_dim: width of a head.
      ffn_mult: inner width of the feed-forward blocks in units of H.
      rate: dropout everywhere.
      cab: whether CAB exists; without it F = Y and the map must not read it.
      passes: cross-attention passes of CAB, 1 or 2.
      second_attention: "shared" or "own" weights of the second pass (D8).
      fusion: "mean" (Y + R) / 2, "none" (Y), or "concat" (R joins the input of the reducing layer).
      detach_tokens: stop the gradient of the survival loss into CAB.
      map: weights of the pool: "both", "morphology" (P), "genotype" (Q), "uniform".
      ratio: fraction of patches that Q keeps.
      min_k: least number of patches that Q keeps (D12).
      detach_map: stop the gradient of Q (D10).
      map_source: "raw" mean score, or "prob": mean of head probabilities (D9).
      map_pass: "last" or "first" pass of CAB.
      hyper_layer: whether step 8 exists.
      self_attention: whether step 10 exists.
      ffn: whether step 11 exists.
      prenorm: norm in front of the self-attention (D26).
      readout: "flatten" or "mean" over tokens.
      dtype: compute dtype of matrix products; None keeps the parameters'.
      chunk: patches per chunk.
      pool: implementation of the pool.
    """

    feat_dim: int = 1024
    outputs: int = 4
    groups: tuple[int, ...] = (1,) * 6
    tokens: int = 6
    width: int = 512
    heads: int = 4
    head_dim: int = 128
    ffn_mult: int = 4
    rate: float = 0.25
    cab: bool = True
    passes: int = 2
    second_attention: str = SHARED
    fusion: str = MEAN
    detach_tokens: bool = False
    map: str = BOTH
    ratio: float = 0.2
    min_k: int = 0
    detach_map: bool = True
    map_source: str = RAW
    map_pass: str = LAST
    hyper_layer: bool = True
    self_attention: bool = True
    ffn: bool = True
    prenorm: bool = False
    readout: str = FLATTEN
    dtype: jnp.dtype | None = None
    chunk: int = 512
    pool: str = CHUNKED

    @property
    def half(self) -> int:
        """Width of the gate and of the reduced tokens."""
        return self.width // 2

    @property
    def reads_map(self) -> bool:
        """Whether HSB reads the map of CAB."""
        return self.map in (BOTH, GENOTYPE)
