"""The pool, both implementations, against an independent float64 NumPy evaluation, and its invariances."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from histokd_jax.nn.gated_attention import PatchFeatures
from histokd_jax.ops import pooling
from histokd_jax.ops.pooling import chunked
from histokd_jax.utils import hlo

D, H, A = 6, 5, 4


def features(params, aux, x, seg, pos):
    del aux, seg, pos
    h = jnp.maximum(params["f"].astype(x.dtype) @ x.T + params["b"].astype(x.dtype)[:, None], 0)
    gate = jnp.tanh(params["v"].astype(x.dtype) @ h) * jax.nn.sigmoid(params["u"].astype(x.dtype) @ h)
    return h, params["w"].astype(x.dtype) @ gate


def make(sizes, rows, length, queries=1, seed=0):
    rng = np.random.default_rng(seed)
    params = {
        "f": rng.normal(size=(H, D)),
        "b": rng.normal(size=(H,)),
        "v": rng.normal(size=(A, H)),
        "u": rng.normal(size=(A, H)),
        "w": rng.normal(size=(queries, A)),
    }
    seg = np.zeros(rows * length, np.int32)
    pos = np.zeros(rows * length, np.int32)
    start = 0
    for slot, n in enumerate(sizes):
        seg[start : start + n] = slot + 1
        pos[start : start + n] = np.arange(n)
        start += n
    x = rng.normal(size=(rows * length, D))
    return params, x.reshape(rows, length, D), seg.reshape(rows, length), pos.reshape(rows, length)


def reference(params, x, seg, slots):
    """Equation of the docstring, bag by bag, float64."""
    x, seg = x.reshape(-1, D), seg.reshape(-1)
    out = np.zeros((slots, params["w"].shape[0], H))
    for s in range(slots):
        bag = x[seg == s + 1]
        if not len(bag):
            continue
        h = np.maximum(bag @ params["f"].T + params["b"], 0)
        gate = np.tanh(h @ params["v"].T) / (1 + np.exp(-h @ params["u"].T))
        scores = gate @ params["w"].T
        a = np.exp(scores - scores.max(0))
        out[s] = (a / a.sum(0)).T @ h
    return out


def f32(tree):
    return jax.tree.map(lambda a: jnp.asarray(a, jnp.float32) if a.dtype == np.float64 else jnp.asarray(a), tree)


def pool(params, x, seg, pos, slots, chunk=8, impl="chunked"):
    return pooling.attention_pool(features, params, (), x, seg, pos, num_slots=slots, chunk=chunk, impl=impl)


both = pytest.mark.parametrize("impl", pooling.IMPLS)


@pytest.mark.parametrize("chunk", [1, 5, 8, 64, "segment"])
@pytest.mark.parametrize("queries", [1, 3])
def test_equals_bag_by_bag_reference(chunk, queries):
    params, x, seg, pos = make([7, 1, 0, 20], 2, 17, queries)
    how = {"impl": "segment"} if chunk == "segment" else {"chunk": chunk}
    got, lse = pool(*f32((params, x, seg, pos)), 5, **how)
    np.testing.assert_allclose(got, reference(params, x, seg, 5), atol=2e-6)
    assert np.all(np.asarray(got)[[2, 4]] == 0) and np.all(np.asarray(lse)[[2, 4]] == pooling.NEG)


@both
def test_gradients_equal_the_plain_graph(impl):
    params, x, seg, pos = f32(make([7, 1, 0, 20], 2, 17, 2))
    target = jax.random.normal(jax.random.key(1), (5, 2, H))
    aim = jax.random.normal(jax.random.key(2), (5, 2))

    def plain(params, x):
        flat, ids = x.reshape(-1, D), seg.reshape(-1)
        flat = jnp.where((ids > 0)[:, None], flat, 0)
        h, s = features(params, (), flat, ids, None)
        logits = jnp.where(ids[None, None] == jnp.arange(1, 6)[:, None, None], s[None], pooling.NEG)
        a = jnp.where(logits > pooling.NEG / 2, jax.nn.softmax(logits, -1), 0)
        pooled = jnp.einsum("sqn,hn->sqh", a, h)
        return jnp.sum(pooled * target) + jnp.sum(
            jnp.where(jnp.isin(jnp.arange(5), jnp.array([0, 1, 3]))[:, None], jax.nn.logsumexp(logits, -1) * aim, 0)
        )

    def ours(params, x):
        pooled, lse = pool(params, x, seg, pos, 5, impl=impl)
        valid = jnp.isin(jnp.arange(5), jnp.array([0, 1, 3]))[:, None]
        return jnp.sum(pooled * target) + jnp.sum(jnp.where(valid, lse * aim, 0))

    want, got = (jax.grad(fn, argnums=(0, 1))(params, x) for fn in (plain, ours))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=3e-5), want, got)


@both
def test_check_F1_padding_of_any_content_is_unobservable(impl):
    params, x, seg, pos = make([7, 1, 20], 2, 17)
    dirty = np.where((seg > 0)[..., None], x, np.nan)
    dirty[1, -1] = 1e6

    def value(params, x):
        return jnp.sum(pool(params, x, *f32((seg, pos)), 3, impl=impl)[0] ** 2)

    clean = jax.value_and_grad(value, argnums=(0, 1))(*f32((params, x)))
    noisy = jax.value_and_grad(value, argnums=(0, 1))(*f32((params, dirty)))
    assert clean[0] == noisy[0]
    jax.tree.map(np.testing.assert_array_equal, clean[1], noisy[1])
    assert np.all(np.asarray(noisy[1][1])[seg == 0] == 0)


def test_packed_equals_padded_layout():
    sizes = [7, 1, 20]
    params, x, seg, pos = make(sizes, 1, 40)
    padded, pseg, ppos = np.full((3, 24, D), np.nan), np.zeros((3, 24), np.int32), np.zeros((3, 24), np.int32)
    for s, n in enumerate(sizes):
        padded[s, :n], pseg[s, :n], ppos[s, :n] = x[seg == s + 1], s + 1, np.arange(n)
    a, _ = pool(*f32((params, x, seg, pos)), 3)
    b, _ = pool(*f32((params, padded, pseg, ppos)), 3)
    np.testing.assert_allclose(a, b, atol=1e-6)


def test_patch_order_and_duplication_do_not_matter():
    params, x, seg, pos = make([9, 6], 1, 15)
    order = np.random.default_rng(3).permutation(15)
    a, _ = pool(*f32((params, x, seg, pos)), 2)
    b, _ = pool(*f32((params, x[:, order], seg[:, order], pos[:, order])), 2)
    twice = [np.concatenate([t, t], 1) for t in (x, seg, pos)]
    c, _ = pool(*f32((params, *twice)), 2)
    np.testing.assert_allclose(a, b, atol=1e-6)
    np.testing.assert_allclose(a, c, atol=1e-6)


def test_attention_weights_sum_to_one_and_single_patch_weighs_one():
    params, x, seg, pos = make([7, 1, 20], 2, 17, 2)
    w = pooling.attention_weights(features, *f32((params,)), (), *f32((x, seg, pos)), num_slots=3, chunk=8)
    for s in range(3):
        np.testing.assert_allclose(np.asarray(w)[:, seg == s + 1].sum(1), 1, atol=1e-6)
    np.testing.assert_allclose(np.asarray(w)[:, seg == 2], 1, atol=1e-6)
    assert np.all(np.asarray(w)[:, seg == 0] == 0)


def auto_mesh(data, sequence=1, *more):
    names = ("data", "sequence", *(name for name, _ in more))
    shape = (data, sequence, *(size for _, size in more))
    return jax.make_mesh(shape, names, axis_types=(jax.sharding.AxisType.Auto,) * len(names))


@both
@pytest.mark.parametrize(("data", "sequence"), [(2, 1), (8, 1), (1, 8), (2, 4)])
def test_sharded_patches_equal_one_device_and_are_never_gathered(impl, data, sequence):
    params, x, seg, pos = f32(make([37, 1, 0, 60], 8, 16, 2))
    target = jax.random.normal(jax.random.key(1), (4, 2, H))

    def value(params, x):
        return jnp.sum(pool(params, x, seg, pos, 4, 4, impl)[0] * target)

    want = jax.value_and_grad(value, argnums=(0, 1))(params, x)
    mesh = auto_mesh(data, sequence)
    with jax.set_mesh(mesh):
        spec = jax.sharding.NamedSharding(mesh, jax.P("data", "sequence"))
        sharded = jax.device_put(x, spec)
        seg, pos = jax.device_put((seg, pos), spec)
        step = jax.jit(jax.value_and_grad(value, argnums=(0, 1)))
        got = step(params, sharded)
        w = jax.jit(lambda p, x: pooling.attention_weights(features, p, (), x, seg, pos, num_slots=4, chunk=4))(
            params, sharded
        )
        sent = hlo.collective_bytes(step.lower(params, sharded).compile().as_text())
    np.testing.assert_allclose(got[0], want[0], rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), got[1], want[1])
    assert got[1][1].sharding.is_equivalent_to(spec, 3), "the gradient of the patches stays where they lie"
    np.testing.assert_allclose(np.asarray(w)[:, np.asarray(seg) == 4].sum(1), 1, atol=1e-6)
    assert set(sent) == {"all-reduce"}
    weights = sum(p.nbytes for p in params.values())
    assert 0 < sent["all-reduce"] <= weights + 4 * (4 * 2 * (H + 2)) + 64, "parameters, and S x Q x (H + 2) sums"


@both
def test_other_axes_of_the_mesh_are_left_alone(impl):
    """Replicas on an axis of their own: nothing travels between them."""
    params, x, seg, pos = f32(make([37, 1, 0, 60], 4, 32))
    stacked = jax.tree.map(lambda p: jnp.stack([p, 2 * p]), params)
    mesh = auto_mesh(2, 2, ("replica", 2))
    with jax.set_mesh(mesh):
        placed = jax.device_put(stacked, jax.sharding.NamedSharding(mesh, jax.P("replica")))
        step = jax.jit(jax.vmap(jax.grad(lambda p: jnp.sum(pool(p, x, seg, pos, 4, 8, impl)[0] ** 2))))
        many = step(placed)
        sent = hlo.collective_bytes(step.lower(placed).compile().as_text())
    for k in range(2):
        one = jax.grad(lambda p: jnp.sum(pool(p, x, seg, pos, 4, 8)[0] ** 2))(
            jax.tree.map(lambda p, k=k: p[k], stacked)
        )
        jax.tree.map(lambda a, b, k=k: np.testing.assert_allclose(a[k], b, rtol=2e-4, atol=1e-5), many, one)
    assert set(sent) == {"all-reduce"} and sent["all-reduce"] < 2 * sum(p.nbytes for p in params.values())


def test_rows_that_do_not_divide_over_the_mesh_are_refused():
    params, x, seg, pos = f32(make([7], 3, 4))
    with jax.set_mesh(auto_mesh(2)), pytest.raises(ValueError, match="data.rows to a multiple of 2"):
        pool(params, x, seg, pos, 1)
    with jax.set_mesh(auto_mesh(1, 8)), pytest.raises(ValueError, match="data.row_multiple to a multiple of 8"):
        pool(params, x, seg, pos, 1)


def test_bad_arguments_are_refused():
    params, x, seg, pos = f32(make([7, 3], 2, 5))
    with pytest.raises(ValueError, match="reach 2, but the step has 1 slots"):
        pool(params, x, seg, pos, 1)
    with pytest.raises(ValueError, match="num_slots=0"):
        pool(params, x, seg, pos, 0)
    with pytest.raises(ValueError, match="impl='scan'.*chunked"):
        pool(params, x, seg, pos, 2, impl="scan")
    with pytest.raises(ValueError, match=r"segment_ids \(2, 4\)"):
        pool(params, x, seg[:, :4], pos, 2)


@both
def test_bfloat16_products_with_float32_sums_and_finite_gradients(impl):
    """Every product has bfloat16 operands and float32 results, forward and backward, with NaN padding and no patch."""
    params, x, seg, pos = f32(make([37, 1, 0, 60], 2, 64))
    dirty = jnp.where((seg > 0)[..., None], x, jnp.nan)
    net = {
        "proj": {"kernel_t": params["f"], "bias": params["b"]},
        "attention": {
            "gate": {"kernel_t": jnp.concatenate([params["v"], params["u"]]), "bias": jnp.zeros(2 * A)},
            "score": {"kernel_t": params["w"], "bias": jnp.zeros(1)},
        },
    }

    def value(dtype, net, x):
        fn = PatchFeatures(dtype=dtype)
        pooled, lse = pooling.attention_pool(fn, net, (), x, seg, pos, num_slots=4, chunk=16, impl=impl)
        assert pooled.dtype == lse.dtype == jnp.float32
        return jnp.sum(pooled**2)

    grad = jax.grad(value, argnums=(1, 2))
    low, full = grad(jnp.bfloat16, net, dirty), grad(None, net, dirty)
    scale = max(float(jnp.max(jnp.abs(leaf))) for leaf in jax.tree.leaves(full[0]))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=0.03 * scale), low, full)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(low))
    jaxpr = jax.make_jaxpr(lambda net, x: grad(jnp.bfloat16, net, x))(net, dirty)
    dots = list(products(jaxpr.jaxpr))
    assert len(dots) >= 12
    assert set(dots) == {("bfloat16", "bfloat16", "float32")}


def products(jaxpr):
    """Dtypes (operand, operand, result) of every matrix product of a graph."""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            yield tuple(str(v.aval.dtype) for v in (*eqn.invars, *eqn.outvars))
        for value in eqn.params.values():
            for inner in value if isinstance(value, (tuple, list)) else [value]:
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from products(inner)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float16, jnp.bfloat16])
def test_temporary_memory_does_not_grow_with_the_bag(dtype):
    """Compiled, not run: 200,000 patches must need no more temporaries than 20,000."""

    def temporaries(length):
        shapes = [jax.ShapeDtypeStruct((1, length, 64), dtype)] + [jax.ShapeDtypeStruct((1, length), jnp.int32)] * 2
        params = {
            k: jax.ShapeDtypeStruct(s, jnp.float32)
            for k, s in {"f": (H, 64), "b": (H,), "v": (A, H), "u": (A, H), "w": (1, A)}.items()
        }

        def cast(params, aux, x, seg, pos):
            return features(params, aux, x.astype(jnp.float32), seg, pos)

        def value(params, x, seg, pos):
            return jnp.sum(pooling.attention_pool(cast, params, (), x, seg, pos, num_slots=2, chunk=1000)[0])

        return jax.jit(jax.grad(value)).lower(params, *shapes).compile().memory_analysis().temp_size_in_bytes

    small, large = temporaries(20_000), temporaries(200_000)
    assert large < small + 1_000_000


@both
def test_vmap_over_replicas_equals_a_loop(impl):
    params, x, seg, pos = f32(make([7, 1, 20], 2, 17))
    stacked = jax.tree.map(lambda p: jnp.stack([p, 2 * p]), params)
    fn = jax.grad(lambda p: jnp.sum(pool(p, x, seg, pos, 3, impl=impl)[0] ** 2))
    many = jax.vmap(fn)(stacked)
    for k in range(2):
        one = fn(jax.tree.map(lambda p, k=k: p[k], stacked))
        jax.tree.map(lambda a, b, k=k: np.testing.assert_allclose(a[k], b, rtol=2e-4, atol=1e-5), many, one)


@jax.custom_vjp
def known_product(w, x, y):
    return y


known_product.defvjp(lambda w, x, y: (y, (w, x)), lambda kept, g: (g @ kept[1].T, kept[0].T @ g, None))


class WithProducts:
    """The same features, which can take their products from outside."""

    def with_products(self, params, aux, x, seg, pos, known=()):
        f, v = params["f"].astype(x.dtype), params["v"]
        product = known_product(f, x.T, known[0]) if known else f @ x.T
        h = jnp.maximum(product + params["b"].astype(x.dtype)[:, None], 0)
        gate = known_product(v, h, known[1]) if len(known) > 1 else v @ h
        return h, params["w"] @ (jnp.tanh(gate) * jax.nn.sigmoid(params["u"] @ h)), (product, gate)

    def __call__(self, params, aux, x, seg, pos):
        return self.with_products(params, aux, x, seg, pos)[:2]


@pytest.mark.parametrize("devices", [1, 4])
@pytest.mark.parametrize(("save", "cache"), [(0, 0), (2**30, 0), (2**30, 2**30)], ids=["none", "first", "all"])
def test_kept_products_equal_recomputed_ones(monkeypatch, devices, save, cache):
    monkeypatch.setattr(chunked, "SAVE_BYTES", save)
    monkeypatch.setattr(chunked, "CACHE_BYTES", cache)
    params, x, seg, pos = f32(make([37, 1, 0, 60], 4, 30, 2))
    dirty = jnp.where((seg > 0)[..., None], x, jnp.nan)
    target = jax.random.normal(jax.random.key(1), (4, 2, H))
    split = WithProducts()

    def value(fn, params, x):
        return jnp.sum(pooling.attention_pool(fn, params, (), x, seg, pos, num_slots=4, chunk=8)[0] * target)

    want = jax.value_and_grad(lambda p, x: value(features, p, x), argnums=(0, 1))(params, x)
    mesh = jax.make_mesh((devices,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    with jax.set_mesh(mesh):
        got = jax.jit(jax.value_and_grad(lambda p, x: value(split, p, x), argnums=(0, 1)))(params, dirty)
        only_params = jax.jit(jax.grad(lambda p: value(split, p, dirty)))(params)
    np.testing.assert_allclose(got[0], want[0], rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=3e-5), got[1], want[1])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=3e-5), only_params, want[1][0])


def test_products_are_kept_only_while_they_fit(monkeypatch):
    def temporaries(save, cache):
        monkeypatch.setattr(chunked, "SAVE_BYTES", save)
        monkeypatch.setattr(chunked, "CACHE_BYTES", cache)
        params, x, seg, pos = f32(make([3000], 1, 4096))
        grad = jax.grad(
            lambda p: jnp.sum(pooling.attention_pool(WithProducts(), p, (), x, seg, pos, num_slots=1, chunk=64)[0])
        )
        return jax.jit(grad).lower(params).compile().memory_analysis().temp_size_in_bytes

    first, both = H * 4096 * 4, (H + A) * 4096 * 4
    assert temporaries(first, 0) - temporaries(first - 1, 0) > first // 2
    assert temporaries(both, both) - temporaries(both, both - 1) > (both - first) // 2
