"""TransMIL and Nystrom attention: checks B1, B2, B7, B8 against an independent reference with real padding rows."""

import drawn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import survival_golden as sg

from histokd_jax.methods.supervised import torch_keys_multimodal as torch_keys
from histokd_jax.nn import nystrom
from histokd_jax.nn.mil.transmil import PPEG, TransMIL, ppeg_grid, square_side, squared_layout, tile_count

FEAT, WIDTH, HEADS, LANDMARKS = 5, 8, 2, 4
NET = TransMIL(FEAT, 3, WIDTH, HEADS, LANDMARKS, tile=8)
SIZES = (1, 300, 2, 3, 16, 17, 6)


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def norm(x, t, key):
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5) * t[f"{key}.weight"] + t[f"{key}.bias"]


def reference_attention(x, t, key):
    """One sequence [n, H] with its padding rows written out, as section 8 has it."""
    n = len(x)
    group = -(-n // LANDMARKS)
    x = np.concatenate([np.zeros((group * LANDMARKS - n, WIDTH)), x])
    packed = (x @ t[f"{key}.to_qkv.weight"].T).reshape(len(x), 3, HEADS, -1)
    q, k, v = packed.transpose(1, 2, 0, 3)
    q = q / np.sqrt(WIDTH // HEADS)
    q_means, k_means = (m.reshape(HEADS, LANDMARKS, group, -1).mean(2) for m in (q, k))
    a1, a2, a3 = softmax(q @ k_means.swapaxes(1, 2)), softmax(q_means @ k_means.swapaxes(1, 2)), None
    a3 = softmax(q_means @ k.swapaxes(1, 2))
    z = a2.swapaxes(1, 2) / (a2.sum(-1).max() * a2.sum(-2).max())
    eye = np.eye(LANDMARKS)
    for _ in range(6):
        az = a2 @ z
        z = z / 4 @ (13 * eye - az @ (15 * eye - az @ (7 * eye - az)))
    out = a1 @ z @ (a3 @ v)
    taps = t[f"{key}.res_conv.weight"][:, 0, :, 0]
    wide = np.pad(v, ((0, 0), (16, 16), (0, 0)))
    out = out + sum(taps[:, i, None, None] * wide[:, i : i + len(x)] for i in range(33))
    merged = out.transpose(1, 0, 2).reshape(len(x), -1)
    return (merged @ t[f"{key}.to_out.0.weight"].T + t[f"{key}.to_out.0.bias"])[-n:]


def reference(x, t):
    """(class token after the last norm, logits) of one bag; `t` is a state dict."""
    h = np.maximum(x @ t["_fc1.0.weight"].T + t["_fc1.0.bias"], 0)
    side = int(np.ceil(np.sqrt(len(x))))
    h = np.concatenate([t["cls_token"][0], h, h[: side**2 - len(x)]])
    h = h + reference_attention(norm(h, t, "layer1.norm"), t, "layer1.attn")
    image = h[1:].reshape(side, side, -1)
    total = image
    for name, k in (("proj", 7), ("proj1", 5), ("proj2", 3)):
        kernel, wide = t[f"pos_layer.{name}.weight"], np.pad(image, ((k // 2,) * 2, (k // 2,) * 2, (0, 0)))
        taps = (kernel[:, 0, i, j] * wide[i : i + side, j : j + side] for i in range(k) for j in range(k))
        total = total + sum(taps) + t[f"pos_layer.{name}.bias"]
    h = np.concatenate([h[:1], total.reshape(side**2, -1)])
    h = h + reference_attention(norm(h, t, "layer2.norm"), t, "layer2.attn")
    token = norm(h, t, "norm")[0]
    return token, token @ t["_fc2.weight"].T + t["_fc2.bias"]


def bags(sizes=SIZES, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.normal(size=(n, FEAT)) for n in sizes]


@pytest.fixture(scope="module")
def params():
    packed = sg.pack([np.zeros((3, FEAT), np.float32)])
    init = drawn.variables(lambda key: NET.init(key, packed)["params"], jax.random.key(0))
    # Larger than at the start, so that attention is far from uniform and every bias counts.
    return jax.tree.map(lambda p: 1.5 * np.asarray(p, np.float64), init)


@jax.jit
def apply(params, patches, segment_ids, positions, like, seed=None):
    return NET.apply({"params": params}, sg.Bags(patches, segment_ids, positions, len(like)), None, seed)


def run(params, packed, seed=None):
    like = np.zeros(packed.num_slots)
    return apply(params, packed.patches, packed.segment_ids, packed.positions, like, seed)


def test_B8_one_program_equals_the_reference_at_every_bag_size(params):
    state = torch_keys.to_torch(params, torch_keys.transmil())
    with jax.enable_x64(True):
        out = run(params, sg.pack(bags(), empty=1))
    for i, x in enumerate(bags()):
        token, logits = reference(x, state)
        np.testing.assert_allclose(out["embedding"][i], token, atol=1e-10, err_msg=f"{len(x)} patches")
        np.testing.assert_allclose(out["logits"][i], logits, atol=1e-10, err_msg=f"{len(x)} patches")
    np.testing.assert_array_equal(out["embedding"][-1], 0.0)


def test_B2_position_decides_and_place_does_not(params):
    params = sg.cast(params, "float32")
    few = [b.astype(np.float32) for b in bags((6, 17, 3))]
    seed = jnp.uint32(3)
    shuffled = sg.pack(few, order=np.random.default_rng(2).permutation)
    wide, reverse = sg.pack(few, row=16), sg.pack([b[::-1] for b in few])
    base, noisy = run(params, sg.pack(few)), run(params, sg.pack(few), seed)
    for other in (shuffled, wide):
        np.testing.assert_allclose(run(params, other)["logits"], base["logits"], atol=2e-5)
        np.testing.assert_allclose(run(params, other, seed)["logits"], noisy["logits"], atol=2e-5)
    assert np.abs(noisy["logits"] - base["logits"]).max() > 1e-3
    assert np.abs(run(params, reverse)["logits"] - base["logits"]).max(axis=1).min() > 1e-3


def test_two_devices_give_the_same_result(params):
    params = sg.cast(params, "float32")
    packed = sg.pack([b.astype(np.float32) for b in bags((6, 17, 3))])
    base = run(params, packed)
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    with jax.set_mesh(mesh):
        rows = jax.sharding.NamedSharding(mesh, jax.P("data"))
        placed = packed._replace(**{k: jax.device_put(getattr(packed, k), rows) for k in packed._fields[:3]})
        split = run(params, placed)
    np.testing.assert_allclose(split["logits"], base["logits"], atol=2e-5)


def test_gradients_stay_finite_with_empty_slots_and_nan_padding(params):
    packed = sg.pack([b.astype(np.float32) for b in bags((1, 5))], empty=1)

    def loss(params, patches):
        out = NET.apply({"params": params}, packed._replace(patches=patches), None, jnp.uint32(0))
        return jnp.sum(out["logits"] ** 2)

    grads, d_patches = jax.jit(jax.grad(loss, (0, 1)))(sg.cast(params, "float32"), packed.patches)
    assert all(np.all(np.isfinite(g)) and np.abs(g).max() > 0 for g in jax.tree.leaves(grads))
    np.testing.assert_array_equal(d_patches[packed.segment_ids == 0], 0.0)
    assert np.abs(d_patches[packed.segment_ids > 0]).max() > 0


def test_B8_ppeg_leaves_the_class_token_unchanged(params):
    packed = sg.pack([b.astype(np.float32) for b in bags((1, 5, 2))])
    source, count, tiles = jax.jit(lambda: squared_layout(packed, 4))()
    x = np.random.default_rng(0).normal(size=(source.size, WIDTH)).astype(np.float32)
    ppeg = jax.jit(lambda params, x: PPEG(WIDTH).apply({"params": params}, x, ppeg_grid(count, tiles)))
    out = np.asarray(ppeg(sg.cast(params["ppeg"], "float32"), x))
    outside = ~np.asarray(tiles.valid & (tiles.row > 0)).reshape(-1)
    assert outside[np.asarray(tiles.first)].all()
    np.testing.assert_array_equal(out[outside], x[outside])
    assert np.abs(out - x)[~outside].max(axis=1).min() > 1e-3


def test_B7_nystrom_with_all_landmarks_and_exact_inverse_is_full_attention():
    rng = np.random.default_rng(0)
    n, heads, width = 6, 2, 3

    @jax.jit
    def attend(q, k, v, taps):
        tiles = nystrom.make_tiles(jnp.array([n, n], jnp.int32), 4, 4)
        out = nystrom.nystrom_attention(q, k, v, tiles, n, jnp.linalg.inv)
        return out + nystrom.value_convolution(v, taps, tiles)

    with jax.enable_x64(True):
        q, k, v = (rng.normal(size=(2, heads, n, width)) for _ in range(3))
        rows = [jnp.asarray(np.pad(t.swapaxes(1, 2), ((0, 0), (0, 2), (0, 0), (0, 0)))) for t in (q, k, v)]
        rows = [t.reshape(4, 4, heads, width) for t in rows]
        taps = rng.normal(size=(33, heads))
        out = attend(*rows, jnp.asarray(taps))
    wide = np.pad(v, ((0, 0), (0, 0), (16, 16), (0, 0)))
    expected = softmax(q @ k.swapaxes(-1, -2)) @ v
    expected = expected + sum(taps[i][:, None, None] * wide[:, :, i : i + n] for i in range(33))
    actual = np.asarray(out).reshape(2, 8, heads, width)[:, :n].swapaxes(1, 2)
    np.testing.assert_allclose(actual, expected, atol=1e-9)


def test_B7_iterative_inverse_of_random_softmax_matrices():
    a = softmax(2 * np.random.default_rng(0).normal(size=(3, 8, 32, 32))).astype(np.float32)
    inverse = jax.jit(nystrom.iterative_pinv, static_argnums=1)
    z = np.asarray(inverse(a, 20))
    residual = np.linalg.norm(a @ z @ a - a, axis=(-2, -1))
    assert residual.max() < 1e-3
    six = np.asarray(inverse(a))
    one = np.asarray(inverse(a[1:2]))
    np.testing.assert_allclose(six[1:2], one, rtol=1e-6, atol=1e-6)


def test_B1_parameter_count():
    packed = sg.pack([np.zeros((3, 1024), np.float32)])
    shapes = jax.eval_shape(lambda key: TransMIL(1024, 4).init(key, packed), jax.random.key(0))["params"]
    assert sg.count(shapes) == 2_673_172


def test_square_side_is_exact():
    n = np.concatenate([np.arange(2000), (np.arange(40, 16000, 7)[:, None] ** 2 + np.arange(-1, 2)).reshape(-1)])
    expected = np.array([int(np.ceil(np.sqrt(float(i)))) for i in n])
    np.testing.assert_array_equal(square_side(jnp.asarray(n, jnp.int32)), expected)


@pytest.mark.parametrize("tile", [1, 7, 256])
def test_tiles_always_suffice(tile):
    rng = np.random.default_rng(0)
    for _ in range(200):
        sizes = rng.integers(0, 40, rng.integers(1, 9)) ** rng.integers(1, 3)
        used = sum(-(-(int(np.ceil(np.sqrt(n))) ** 2 + 1) // tile) for n in sizes)
        assert used <= tile_count(int(sizes.sum()), len(sizes), tile)
