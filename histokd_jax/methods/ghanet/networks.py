"""The parts of G-HANet: CAB, its reconstruction heads, and HSB (specification 4.2 and 4.3)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from histokd_jax.methods.ghanet.layers import Attention, FeedForward, Norm, maybe_drop
from histokd_jax.methods.ghanet.patches import (
    ContextPatches,
    HeadProbabilities,
    SurvivalPatches,
    patch_map,
    select_largest,
)
from histokd_jax.methods.ghanet.spec import (
    BOTH,
    CONCAT,
    FIRST,
    FLATTEN,
    GENOTYPE,
    MEAN,
    MORPHOLOGY,
    OWN,
    RAW,
    UNIFORM,
    NetworkSpec,
)
from histokd_jax.nn.affine import TORCH_DEFAULT, Affine
from histokd_jax.nn.gated_attention import Bags, GatedAttention
from histokd_jax.ops.pooling import attention_pool, attention_weights

CAB, HEADS, HSB = "CAB", "HEADS", "HSB"
NETWORKS = (CAB, HEADS, HSB)

_ROWS = {BOTH: (MORPHOLOGY, GENOTYPE), MORPHOLOGY: (MORPHOLOGY,), GENOTYPE: (GENOTYPE,), UNIFORM: (UNIFORM,)}


class _Pass(NamedTuple):
    """One cross-attention pass: output [S, T, H], queries [S or 1, heads * T, H], lse [S, heads * T]."""

    output: jax.Array
    queries: jax.Array
    lse: jax.Array


class CabNet(nn.Module):
    """CAB: learned tokens read the patches twice (section 4.2, steps 1 to 9).

    Attributes:
      spec: the architecture.
    """

    spec: NetworkSpec

    def setup(self) -> None:
        """Declares the layers."""
        s = self.spec
        self.tokens = self.param("tokens", nn.initializers.normal(1.0), (s.tokens, s.width))
        self.proj = Affine(s.feat_dim, s.width, TORCH_DEFAULT)
        self.norm_context = Norm(s.width)
        self.cross_attn = Attention(s.width, s.heads, s.head_dim, dtype=s.dtype)
        self.ffn_1 = FeedForward(s.width, s.ffn_mult, s.rate, 3, s.dtype)
        self.norm_query_1, self.norm_ffn_1, self.norm_out = Norm(s.width), Norm(s.width), Norm(s.width)
        if s.passes == 2:
            self.ffn_2 = FeedForward(s.width, s.ffn_mult, s.rate, 4, s.dtype)
            self.norm_query_2, self.norm_ffn_2 = Norm(s.width), Norm(s.width)
            if s.second_attention == OWN:
                self.cross_attn_2 = Attention(s.width, s.heads, s.head_dim, dtype=s.dtype)

    def __call__(self, bags: Bags, seed: jax.Array | None = None) -> tuple[jax.Array, jax.Array | None]:
        """Reads every slide.

        Args:
          bags: the packed patches.
          seed: [] uint32 to draw dropout, None for none.

        Returns:
          (R [S, T, H], map M [T, R, L] with 0 on padding, or None if HSB does not read it).
        """
        bags.check_width(self.spec.feat_dim)
        done = self._read(bags, self.cross_attn, self.norm_query_1(self.tokens[None]), 1, seed)
        x = done.output + self.ffn_1(self.norm_ffn_1(done.output), seed)
        first = done
        if self.spec.passes == 2:
            attention = self.cross_attn_2 if self.spec.second_attention == OWN else self.cross_attn
            done = self._read(bags, attention, self.norm_query_2(self.tokens[None] + x), 2, seed)
            x = done.output + self.ffn_2(self.norm_ffn_2(done.output), seed)
        mapped = first if self.spec.map_pass == FIRST else done
        return self.norm_out(x), self._map(bags, mapped, seed) if self.spec.reads_map else None

    def _patches(self, prob_layer: int) -> ContextPatches:
        return ContextPatches(self.spec.rate, 0, prob_layer, self.spec.dtype)

    def _params(self, queries: jax.Array) -> dict:
        return {"proj": self.proj.columns(), "norm": self.norm_context.weights(), "queries": queries}

    def _read(self, bags: Bags, attention: Attention, tokens: jax.Array, layer: int, seed: jax.Array | None) -> _Pass:
        queries = attention.moved_queries(tokens)
        pooled, lse = attention_pool(
            self._patches(layer),
            self._params(queries),
            {} if seed is None else {"seed": seed},
            *bags[:3],
            num_slots=bags.num_slots,
            chunk=self.spec.chunk,
            impl=self.spec.pool,
        )
        number = queries.shape[1]
        if seed is not None:
            # Sum over kept patches relative to the normaliser of all: softmax, then inverted dropout.
            share = jnp.exp(lse[:, :number] - lse[:, number:]) / (1.0 - self.spec.rate)
            pooled, lse = pooled[:, :number] * share[..., None], lse[:, number:]
        return _Pass(attention.finish(pooled), queries, lse)

    def _map(self, bags: Bags, done: _Pass, seed: jax.Array | None) -> jax.Array:
        spec = self.spec
        queries, params = done.queries, self._params(done.queries)
        if spec.map_source == RAW:
            # The mean of the scores over heads is the score of the mean query.
            grouped = queries.reshape(queries.shape[0], spec.heads, spec.tokens, spec.width)
            fn, params = self._patches(0), self._params(jnp.mean(grouped, axis=1))
        else:
            fn, params = HeadProbabilities(self._patches(0), spec.heads), {**params, "lse": done.lse}
        if spec.detach_map:
            params, bags = jax.lax.stop_gradient(params), bags._replace(patches=jax.lax.stop_gradient(bags.patches))
        aux = {} if seed is None else {"seed": seed}
        return patch_map(fn.scores, params, aux, bags, spec.chunk, spec.pool)


class _Head(nn.Module):
    """Step 10 for one group: tokens of the group [S, H] to predictions [S, g]."""

    spec: NetworkSpec
    size: int
    layer: int

    def setup(self) -> None:
        width, dtype = self.spec.width, self.spec.dtype
        self.dense = Affine(width, width, TORCH_DEFAULT, dtype)
        self.norm = Norm(width)
        self.out = Affine(width, self.size, TORCH_DEFAULT, dtype)

    def __call__(self, token: jax.Array, seed: jax.Array | None) -> jax.Array:
        hidden = jax.nn.elu(self.norm(self.dense(token)))
        return self.out(maybe_drop(hidden, seed, self.spec.rate, self.layer))


class HeadsNet(nn.Module):
    """The reconstruction heads of CAB (step 10); needed in training only.

    Attributes:
      spec: the architecture.
    """

    spec: NetworkSpec

    @nn.compact
    def __call__(self, tokens: jax.Array, seed: jax.Array | None = None) -> jax.Array:
        """R [S, T, H] to reconstructions of all groups, [S, sum of sizes]."""
        parts = [
            _Head(self.spec, size, i, name=f"head_{i}")(tokens[:, i], seed)
            for i, size in enumerate(self.spec.groups)
            if size
        ]
        return jnp.concatenate(parts, axis=-1)


class HsbNet(nn.Module):
    """HSB: hyper-attention pooling and the survival head (section 4.3).

    Attributes:
      spec: the architecture.
    """

    spec: NetworkSpec

    def setup(self) -> None:
        """Declares the layers."""
        s = self.spec
        self.patch_proj = Affine(s.feat_dim, s.width, TORCH_DEFAULT)
        self.patch_norm = Norm(s.width)
        if s.map in (BOTH, MORPHOLOGY):
            self.gate = GatedAttention(s.width, s.half, TORCH_DEFAULT)
        if s.hyper_layer:
            self.hyper_dense_1, self.hyper_dense_2 = (
                Affine(s.width, s.width, TORCH_DEFAULT, s.dtype) for _ in range(2)
            )
            self.hyper_norm_1, self.hyper_norm_2 = Norm(s.width), Norm(s.width)
        if s.self_attention:
            self.self_attn = Attention(s.width, s.heads, s.head_dim, s.rate, 1, s.dtype)
            if s.prenorm:
                self.norm_attn = Norm(s.width)
        if s.ffn:
            self.ffn, self.norm_ffn = FeedForward(s.width, s.ffn_mult, s.rate, 2, s.dtype), Norm(s.width)
        wide = s.width * (2 if s.fusion == CONCAT and s.cab else 1)
        self.reduce_dense, self.reduce_norm = Affine(wide, s.half, TORCH_DEFAULT, s.dtype), Norm(s.half)
        tokens = s.tokens if s.readout == FLATTEN else 1
        self.hazard_head = Affine(tokens * s.half, s.outputs, TORCH_DEFAULT, s.dtype)

    def __call__(
        self, bags: Bags, tokens: jax.Array | None, values: jax.Array | None, seed: jax.Array | None = None
    ) -> dict[str, jax.Array]:
        """Predicts every slide.

        Args:
          bags: the packed patches.
          tokens: R [S, T, H] of CAB, or None without CAB.
          values: the map M [T, R, L], or None if the weights do not read it.
          seed: [] uint32 to draw dropout, None for none.

        Returns:
          {"logits" [S, C], "embedding" [S, T * H / 2 or H / 2], "pooled" A, "hyper" Y [S, T, H]}.
        """
        bags.check_width(self.spec.feat_dim)
        pooled = self._pool(bags, values, seed)
        y = self._hyper(pooled)
        f = self._mix(y, tokens, seed)
        if self.spec.fusion == CONCAT and self.spec.cab:
            f = jnp.concatenate([f, tokens], axis=-1)
        z = maybe_drop(jax.nn.relu(self.reduce_norm(self.reduce_dense(f))), seed, self.spec.rate, 3)
        flat = z.reshape(z.shape[0], -1) if self.spec.readout == FLATTEN else jnp.mean(z, axis=1)
        return {"logits": self.hazard_head(flat), "embedding": flat, "pooled": pooled, "hyper": y}

    def weights(self, bags: Bags, values: jax.Array | None) -> dict[str, jax.Array]:
        """The weights over patches without dropout.

        Args:
          bags: the packed patches.
          values: see `__call__`.

        Returns:
          The parts that exist of {"P": [1, R, L], "Q": [T, R, L], "uniform": [1, R, L]}, and their mixture "G"
          [T, R, L]; every row sums to 1 over a slide and is 0 on padding.
        """
        rows = attention_weights(*self._arguments(bags, values, None), num_slots=bags.num_slots, chunk=self.spec.chunk)
        parts = self._split(rows)
        named = {{MORPHOLOGY: "P", GENOTYPE: "Q"}.get(name, name): part for name, part in parts.items()}
        return named | {"G": self._average(parts)}

    def _pool(self, bags: Bags, values: jax.Array | None, seed: jax.Array | None) -> jax.Array:
        """Step 7, A = G B: as G is an average of weights, A is that of the pooled values; [S, T, H]."""
        pooled, _ = attention_pool(
            *self._arguments(bags, values, seed),
            num_slots=bags.num_slots,
            chunk=self.spec.chunk,
            impl=self.spec.pool,
        )
        return jnp.moveaxis(self._average(self._split(jnp.moveaxis(pooled, 1, 0))), 0, 1)

    def _arguments(self, bags: Bags, values: jax.Array | None, seed: jax.Array | None) -> tuple:
        spec = self.spec
        params = {"proj": self.patch_proj.columns(), "norm": self.patch_norm.weights()}
        if spec.map in (BOTH, MORPHOLOGY):
            params["gate"] = self.gate.columns()
        aux = {"positions": jnp.asarray(bags.positions).reshape(-1)} | ({} if seed is None else {"seed": seed})
        if spec.reads_map:
            kept = select_largest(values, bags.segment_ids, bags.num_slots, spec.ratio, spec.min_k)
            (aux if spec.detach_map else params)["map"] = kept.reshape(kept.shape[0], -1)
        index = jnp.arange(bags.segment_ids.size, dtype=jnp.int32).reshape(bags.segment_ids.shape)
        features = SurvivalPatches(_ROWS[spec.map], spec.rate, 0, spec.dtype)
        return features, params, aux, bags.patches, bags.segment_ids, index

    def _split(self, rows: jax.Array) -> Mapping[str, jax.Array]:
        """Cuts the first axis by kind of weight."""
        names = _ROWS[self.spec.map]
        return {name: rows[i:] if name == GENOTYPE else rows[i : i + 1] for i, name in enumerate(names)}

    def _average(self, parts: Mapping[str, jax.Array]) -> jax.Array:
        """Mean over the kinds, each broadcast to T rows."""
        any_part = next(iter(parts.values()))
        shape = (self.spec.tokens, *any_part.shape[1:])
        return sum(jnp.broadcast_to(part, shape) for part in parts.values()) / len(parts)

    def _hyper(self, a: jax.Array) -> jax.Array:
        """Step 8."""
        if not self.spec.hyper_layer:
            return a
        hidden = jax.nn.relu(self.hyper_norm_1(self.hyper_dense_1(a)))
        return a + jax.nn.relu(self.hyper_norm_2(self.hyper_dense_2(hidden)))

    def _mix(self, y: jax.Array, tokens: jax.Array | None, seed: jax.Array | None) -> jax.Array:
        """Steps 9 to 11."""
        f = (y + tokens) / 2 if self.spec.cab and self.spec.fusion == MEAN else y
        if self.spec.self_attention:
            f = f + self.self_attn(self.norm_attn(f) if self.spec.prenorm else f, seed)
        return f + self.ffn(self.norm_ffn(f), seed) if self.spec.ffn else f


def build(spec: NetworkSpec) -> dict[str, nn.Module]:
    """The networks of a run, by parameter group.

    Returns:
      {"CAB", "HEADS", "HSB"} without CAB if it is switched off, and without heads if no group has features.
    """
    networks: dict[str, nn.Module] = {HSB: HsbNet(spec)}
    if spec.cab:
        networks[CAB] = CabNet(spec)
        if any(spec.groups):
            networks[HEADS] = HeadsNet(spec)
    return {name: networks[name] for name in NETWORKS if name in networks}
