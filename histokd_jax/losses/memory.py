"""Losses with a memory, as pure transitions `(state, inputs) -> (values, new state)`: CRD, and queues of keys."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from histokd_jax.losses._masking import accumulate, keep, require_batch, unit, valid_rows

EXACT, RELAX, UNLABELLED = "exact", "relax", "unlabelled"
MODES = (EXACT, RELAX, UNLABELLED)
_CRD_EPS = 1e-7


class CrdState(NamedTuple):
    """Memory of contrastive representation distillation; part of the checkpoint.

    Attributes:
      student: [n, d] float32 memory of student vectors, one row per training example.
      teacher: [n, d] float32 memory of teacher vectors.
      z_student: [] float32 normaliser of the student's anchors, constant from the first call on.
      z_teacher: [] float32 normaliser of the teacher's anchors.
      ready: [] bool, whether the normalisers are set.
    """

    student: jax.Array
    teacher: jax.Array
    z_student: jax.Array
    z_teacher: jax.Array
    ready: jax.Array


def crd_init(key: jax.Array, examples: int, width: int = 128) -> CrdState:
    """Memories uniform in `(-c, c)`, `c = 1 / sqrt(width / 3)`, not normalised; normalisers unset."""
    bound = (width / 3.0) ** -0.5
    student, teacher = (jax.random.uniform(k, (examples, width), minval=-bound, maxval=bound) for k in _two(key))
    return CrdState(student, teacher, jnp.ones(()), jnp.ones(()), jnp.zeros((), bool))


def _two(key: jax.Array) -> tuple[jax.Array, jax.Array]:
    first, second = jax.random.split(key)
    return first, second


def _scores(memory: jax.Array, contrast: jax.Array, anchor: jax.Array, temperature: float) -> jax.Array:
    """[b, K + 1] `exp(M[j] . v / tau)`."""
    rows = jnp.take(memory.astype(anchor.dtype), contrast, axis=0)
    inner = jnp.einsum("bkd,bd->bk", rows, anchor, precision=jax.lax.Precision.HIGHEST)
    return jnp.exp(inner / temperature)


def _normaliser(scores: jax.Array, examples: int, valid: jax.Array) -> jax.Array:
    rows = jnp.maximum(jnp.sum(valid), 1).astype(scores.dtype)
    return examples * jnp.sum(jnp.where(valid[:, None], jnp.mean(scores, axis=1)[:, None], 0.0)) / rows


def _contrastive(scores: jax.Array, z: jax.Array, examples: int) -> jax.Array:
    """[b] noise-contrastive loss of one anchor side, in terms that do not underflow."""
    negatives = scores.shape[1] - 1
    noise = negatives / examples
    p = scores / z
    positive = jnp.log(p[:, 0]) - jnp.log(p[:, 0] + noise + _CRD_EPS)
    others = jnp.log(noise) - jnp.log(p[:, 1:] + noise + _CRD_EPS)
    return -(positive + jnp.sum(others, axis=1))


def _updated(memory: jax.Array, index: jax.Array, vectors: jax.Array, momentum: float) -> jax.Array:
    old = jnp.take(memory, index, axis=0, mode="clip")
    new = unit(momentum * old + (1.0 - momentum) * vectors.astype(memory.dtype))
    return memory.at[index].set(new, mode="drop")


def first_occurrence(index: jax.Array, where: jax.Array) -> jax.Array:
    """[b] bool: valid rows whose index no valid row before them has, so that a scatter does not depend on order."""
    same = (index[:, None] == index[None, :]) & where[None, :]
    earlier = jnp.tril(same, -1)
    return where & ~jnp.any(earlier, axis=1)


def crd_loss(
    state: CrdState,
    student: jax.Array,
    teacher: jax.Array,
    index: jax.Array,
    contrast: jax.Array,
    *,
    temperature: float = 0.07,
    momentum: float = 0.5,
    where: jax.Array | None = None,
) -> tuple[jax.Array, CrdState]:
    """Contrastive representation distillation (Tian et al., arXiv 1910.10699), per example, and the next memory.

    Both vectors are scaled to unit length here; their linear maps are the caller's. The normalisers are set from the
    first batch. The memories are updated after the loss, without gradient; of rows with one index the first counts.

    Args:
      state: memory of n examples.
      student: [b, d] float, projected.
      teacher: [b, d] float, projected; its projection is trained too, so no gradient is stopped.
      index: [b] int32 rows of the memory; anything in masked rows.
      contrast: [b, K + 1] int32: the positive (the row itself, or in mode "relax" another of its class), then the
        negatives, see `draw_contrast`.
      temperature: tau > 0.
      momentum: share of the old memory row.
      where: [b] bool, valid rows; others return exactly 0 and update nothing.

    Returns:
      (values [b] float32 or float64, nats; new state). Untouched memory rows are bit-identical.

    Raises:
      ValueError: if the widths or batch sizes disagree.
    """
    b, (n, width) = student.shape[0], state.student.shape
    if student.shape != teacher.shape or student.shape[1:] != (width,) or contrast.shape[0] != b or index.shape != (b,):
        raise ValueError(
            f"crd_loss needs student and teacher [b, {width}] as the memory, index [b] and contrast [b, K + 1], got "
            f"{student.shape}, {teacher.shape}, {index.shape} and {contrast.shape}"
        )
    valid = valid_rows(student, where)
    v_s, v_t = unit(accumulate(student, where)), unit(accumulate(teacher, where))
    contrast = jnp.where(valid[:, None], contrast, 0)
    a = _scores(state.teacher, contrast, v_s, temperature)
    b_ = _scores(state.student, contrast, v_t, temperature)
    fresh = [jax.lax.stop_gradient(_normaliser(x, n, valid)) for x in (a, b_)]
    z_s, z_t = (jnp.where(state.ready, old, new) for old, new in zip((state.z_student, state.z_teacher), fresh))
    values = _contrastive(a, z_s, n) + _contrastive(b_, z_t, n)
    target = jnp.where(first_occurrence(index, valid), index, n)
    vectors = jax.lax.stop_gradient((v_s, v_t))
    memories = (_updated(m, target, v, momentum) for m, v in zip((state.student, state.teacher), vectors))
    ready = state.ready | jnp.any(valid)
    z = (jnp.where(ready, x, 1.0).astype(old.dtype) for x, old in ((z_s, state.z_student), (z_t, state.z_teacher)))
    return keep(values, where), CrdState(*memories, *z, ready)


def draw_contrast(
    key: jax.Array,
    index: jax.Array,
    labels: jax.Array,
    negatives: int,
    *,
    mode: str = EXACT,
) -> jax.Array:
    """Lists of `crd_loss`: a positive and K negatives for every example; cost b n.

    Negatives are drawn without replacement where there are K candidates, else with.

    Args:
      key: of this step.
      index: [b] int32 rows of the memory.
      labels: [n] int32 class of every example of the memory.
      negatives: K.
      mode: "exact": the positive is the row itself, negatives are of other classes; "relax": the positive is a random
        row of the class; "unlabelled": the row itself against all other rows.

    Returns:
      [b, K + 1] int32.

    Raises:
      ValueError: for an unknown mode.
    """
    if mode not in MODES:
        raise ValueError(f"contrast mode {mode!r} is unknown; use one of {MODES}")
    n = labels.shape[0]
    own = jnp.arange(n)[None, :] == index[:, None]
    same = labels[None, :] == jnp.take(labels, index)[:, None]
    candidates = ~own if mode == UNLABELLED else ~same
    log_weight = jnp.where(candidates, 0.0, -jnp.inf)
    with_key, without_key, positive_key = jax.random.split(key, 3)
    with_repeats = jax.random.categorical(with_key, log_weight[:, None, :], axis=-1, shape=(len(index), negatives))
    drawn = with_repeats
    if negatives <= n:
        noise = jax.random.gumbel(without_key, candidates.shape)
        distinct = jax.lax.top_k(jnp.where(candidates, noise, -jnp.inf), negatives)[1]
        enough = jnp.sum(candidates, axis=1, keepdims=True) >= negatives
        drawn = jnp.where(enough, distinct, with_repeats)
    positive = index
    if mode == RELAX:
        positive = jax.random.categorical(positive_key, jnp.where(same, 0.0, -jnp.inf), axis=-1)
    return jnp.concatenate([positive[:, None], drawn], axis=1).astype(jnp.int32)


class QueueState(NamedTuple):
    """The newest keys of past batches, as a ring.

    Attributes:
      keys: [K, d] float32 unit vectors.
      filled: [] int32 number of keys pushed so far, at most K.
      position: [] int32 where the next key goes.
    """

    keys: jax.Array
    filled: jax.Array
    position: jax.Array


def queue_init(size: int, width: int) -> QueueState:
    """An empty queue of `size` keys."""
    return QueueState(jnp.zeros((size, width)), jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32))


def queue_push(state: QueueState, keys: jax.Array, *, where: jax.Array | None = None) -> QueueState:
    """Replaces the oldest keys by the valid rows of a batch, scaled to unit length and without gradient.

    Args:
      state: queue of K keys.
      keys: [b, d] float, b <= K.
      where: [b] bool, valid rows; others leave no trace.

    Returns:
      The next state.

    Raises:
      ValueError: if the batch is larger than the queue, or of another width.
    """
    size, width = state.keys.shape
    if keys.shape[0] > size or keys.shape[1] != width:
        raise ValueError(f"a batch of keys {keys.shape} does not fit into a queue of {state.keys.shape}")
    valid = valid_rows(keys, where)
    rank = jnp.cumsum(valid) - 1
    target = jnp.where(valid, (state.position + rank) % size, size)
    rows = jax.lax.stop_gradient(unit(accumulate(keys, where))).astype(state.keys.dtype)
    pushed = jnp.sum(valid).astype(jnp.int32)
    return QueueState(
        state.keys.at[target].set(rows, mode="drop"),
        jnp.minimum(state.filled + pushed, size),
        (state.position + pushed) % size,
    )


def queue_infonce(
    state: QueueState,
    query: jax.Array,
    key: jax.Array,
    *,
    temperature: float = 0.07,
    where: jax.Array | None = None,
) -> tuple[jax.Array, QueueState]:
    """InfoNCE of a query against its key and the keys of earlier batches (He et al., arXiv 1911.05722), per example.

    Args:
      state: queue of earlier keys.
      query: [b, d] float, trained.
      key: [b, d] float of a momentum encoder or a frozen teacher; no gradient flows into it.
      temperature: > 0.
      where: [b] bool, valid rows; others return exactly 0 and are not kept.

    Returns:
      (values [b] float32 or float64, nats, 0 while the queue is empty; the state with the keys of this batch pushed).

    Raises:
      ValueError: if the shapes disagree, b < 2, or the batch is larger than the queue.
    """
    require_batch("queue_infonce", query, key, same_width=True)
    q = unit(accumulate(query, where))
    k = jax.lax.stop_gradient(unit(accumulate(key, where)))
    old = state.keys.astype(q.dtype)
    positive = jnp.sum(q * k, axis=-1, keepdims=True)
    negative = jnp.matmul(q, old.T, precision=jax.lax.Precision.HIGHEST)
    # Keys are filled from row 0 upwards until the ring is full.
    present = (jnp.arange(len(old)) < state.filled)[None, :]
    negative = jnp.where(present, negative / temperature, jnp.finfo(q.dtype).min)
    logits = jnp.concatenate([positive / temperature, negative], axis=1)
    return keep(-jax.nn.log_softmax(logits, axis=1)[:, 0], where), queue_push(state, key, where=where)


def momentum_update(slow: Any, fast: Any, momentum: jax.Array | float) -> Any:
    """Exponential moving average of a tree of parameters: `momentum * slow + (1 - momentum) * fast`, no gradient."""
    return jax.tree.map(
        lambda s, f: jax.lax.stop_gradient(momentum * s + (1.0 - momentum) * f.astype(s.dtype)), slow, fast
    )
