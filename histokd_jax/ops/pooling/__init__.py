"""Attention pooling of ragged bags: one function for gated attention and for co-attention.

The caller gives a pure function from some patches to values and scores (or keys); the pool does the softmax of each
slide. `impl="chunked"` streams over chunks, with memory that does not grow with the bag; `impl="segment"` computes all
patches at once and keeps the activations. Under a mesh with the axes "data" or "sequence" (entered with `jax.set_mesh`)
rows are divided over the first and the patches of every row over the second: patches are pooled where they lie and only
sums per slot travel, so a slide may span rows and devices with an exact result.
"""

from histokd_jax.ops.pooling.api import CHUNKED, IMPLS, SEGMENT, attention_pool, attention_weights
from histokd_jax.ops.pooling.features import FeaturesFn
from histokd_jax.ops.pooling.softmax import NEG

__all__ = ["CHUNKED", "IMPLS", "NEG", "SEGMENT", "FeaturesFn", "attention_pool", "attention_weights"]
