"""The modules of CoCoFNet against an independent NumPy implementation, and the checks M1 to M7 of its specification."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import paired_reference as ref
import paired_setup as setup
import pytest

from histokd_jax.nn.paired.attention import PlaneAttention
from histokd_jax.nn.paired.block import Block
from histokd_jax.nn.paired.cross import CrossBlock, SelfBlock
from histokd_jax.nn.paired.initial import init_variables
from histokd_jax.nn.paired.local_unit import MultiScale
from histokd_jax.nn.paired.primitives import BatchNorm, gelu, normal
from histokd_jax.nn.paired.spec import FFN_SOURCES, NormSpec, PairedSpec
from histokd_jax.ops.token_attention import GATES


@pytest.fixture(autouse=True)
def double():
    with jax.enable_x64(True):
        yield


def close(ours, theirs, atol=1e-11):
    theirs = np.moveaxis(theirs, 1, -1) if theirs.ndim == 4 and theirs.shape[1] != 1 else theirs
    theirs = theirs[:, 0] if theirs.ndim == 4 and theirs.shape[1] == 1 else theirs
    np.testing.assert_allclose(np.asarray(ours), theirs, rtol=1e-9, atol=atol)


def part(tree, *path):
    for name in path:
        tree = {collection: leaves[name] for collection, leaves in tree.items()}
    return tree


@pytest.mark.parametrize("train", [False, True])
def test_backbone_block_equals_the_reference(train):
    state = setup.tiny_state("student")
    x = setup.noise(5, 2 * 32 * 6 * 5).reshape(2, 32, 6, 5)
    tensors = ref.Tensors(state, train)
    expected = ref.block(tensors, "block_A0.0", x)
    own = part(setup.variables(state, "student"), "stream_a_0", "block_0")
    run = lambda v, x: Block(32, setup.TINY).apply(v, x, train, mutable=["batch_stats"])  # noqa: E731
    found, new = setup.once(run, own, setup.last(x))
    close(found, expected)
    if train:
        moved = new["batch_stats"]["global"]["attention"]["norm"]["var"]
        stem = "block_A0.0.token_mixer.global_unit.attn_conv_0.1"
        np.testing.assert_allclose(moved, tensors.new[f"{stem}.running_var"], rtol=1e-9)


@pytest.mark.parametrize("elements", [2**22, 200])
@pytest.mark.parametrize("gate", GATES)
def test_teacher_cross_block_equals_the_reference_whole_and_in_blocks(gate, elements):
    spec, state = setup.tiny(gate=gate, plane_elements=elements), setup.tiny_state("teacher")
    a, b = (setup.noise(s, 2 * 32 * 12).reshape(2, 32, 4, 3) for s in (5, 6))
    expected = ref.cross_block(ref.Tensors(state, True), "cross_attn_0", a, b, gate=gate)
    own = part(setup.variables(state, "teacher"), "cross_update_0")
    found, _ = setup.training(CrossBlock(32, spec), own, setup.last(a), setup.last(b))
    for ours, theirs in zip(found, expected):
        close(ours, theirs)


@pytest.mark.parametrize("source", FFN_SOURCES)
def test_student_cross_block_equals_the_reference(source):
    spec, state = setup.tiny(cross_ffn_source=source), setup.tiny_state("student")
    x = setup.noise(5, 2 * 32 * 12).reshape(2, 32, 4, 3)
    expected = ref.self_block(ref.Tensors(state, True), "kd_cross_attn_0", x, source=source)
    own = part(setup.variables(state, "student"), "cross_update_0")
    found, _ = setup.training(SelfBlock(32, spec), own, setup.last(x))
    for ours, theirs in zip(found, expected):
        close(ours, theirs)


def test_gelu_is_the_exact_form_with_its_exact_slope_down_to_the_tail():
    x = jnp.asarray([-30.0, -9.0, -1.5, -0.1, 0.0, 0.2, 3.0, 12.0])
    cdf = np.array([0.5 * math.erfc(-v / math.sqrt(2)) for v in x.tolist()])
    slope = cdf + np.asarray(x) * np.exp(-0.5 * np.asarray(x) ** 2) / math.sqrt(2 * math.pi)
    np.testing.assert_allclose(gelu(x), np.asarray(x) * cdf, rtol=1e-10)
    np.testing.assert_allclose(jax.vmap(jax.grad(gelu))(x), slope, rtol=1e-9)


def test_M1_sizes_of_the_multi_scale_groups():
    sizes = {c: PairedSpec().scale_sizes(c // 2 // 4) for c in PairedSpec().widths}
    assert sizes == {48: (3, 1, 1, 1), 96: (3, 3, 3, 3), 224: (7, 7, 7, 7), 448: (14, 14, 14, 14)}


def test_M1_a_channel_reaches_its_own_group_and_no_further_than_its_kernel():
    module, x = MultiScale(6, setup.TINY), jnp.asarray(setup.noise(1, 9 * 9 * 6).reshape(1, 9, 9, 6))
    variables = module.init(jax.random.key(0), x)
    run = jax.jit(module.apply)
    before = run(variables, x)
    groups, reach = (0, 0, 0, 1, 2, 3), (0, 0, 0, 1, 2, 3)
    for channel in range(6):
        moved = np.asarray(run(variables, x.at[0, 4, 4, channel].add(1.0)) - before)[0] != 0
        assert {groups[c] for c in np.flatnonzero(moved.any((0, 1)))} == {groups[channel]}
        rows = np.flatnonzero(moved.any((1, 2)))
        assert (rows.min(), rows.max()) == (4 - reach[channel], 4 + reach[channel])


def plane_inputs(height=3, width=4, c=5, maps=4, seed=0):
    rng = np.random.default_rng(seed)
    n = height * width
    return tuple(jnp.asarray(rng.normal(size=s)) for s in ((2, n, maps, c), (2, n, maps, c), (2, n, c)))


def plane_variables(q, k, v, scale=1.0):
    module = PlaneAttention(setup.TINY)
    variables = setup.once(lambda key: module.init(key, q, k, v, False, True), jax.random.key(1))
    params = jax.tree.map(lambda x: 20 * scale * x if x.ndim == 4 else x, variables["params"])
    run = jax.jit(lambda variables, q, k, v: module.apply(variables, q, k, v, False, True))
    return run, {**variables, "params": params}


def test_M2_column_m_of_the_map_multiplies_value_token_m():
    q, k, v = plane_inputs()
    run, variables = plane_variables(q, k, v)
    _, found = run(variables, q, k, v)
    assert found.shape == (2, 12, 12)
    for m in (0, 7):
        hot = jnp.zeros_like(v).at[:, m].set(1.0)
        out, _ = run(variables, q, k, hot)
        np.testing.assert_allclose(out, np.asarray(found[:, :, m])[..., None] * np.ones(5), rtol=1e-12)
    assert np.abs(found - jnp.swapaxes(found, 1, 2)).max() > 1e-3


def permuted_difference(run, variables, q, k, v):
    order = np.random.default_rng(2).permutation(q.shape[1])
    out, _ = run(variables, q, k, v)
    again, _ = run(variables, *(x[:, order] for x in (q, k, v)))
    return float(jnp.abs(again - out[:, order]).max() / jnp.abs(out).max())


def test_M3_only_identity_filters_make_it_permutation_equivariant():
    q, k, v = plane_inputs()
    run, variables = plane_variables(q, k, v)
    assert permuted_difference(run, variables, q, k, v) > 1e-2
    params = dict(variables["params"])
    params["mix"] = jnp.zeros_like(params["mix"]).at[1, 1].set(jnp.eye(4, dtype=params["mix"].dtype))
    params["collapse"] = jnp.zeros_like(params["collapse"]).at[1, 1].set(0.25)
    assert permuted_difference(run, {**variables, "params": params}, q, k, v) < 1e-12


def test_M4_rows_of_the_map_do_not_sum_to_one_and_are_signed():
    q, k, v = plane_inputs()
    run, variables = plane_variables(q, k, v)
    _, found = run(variables, q, k, v)
    assert float(found.min()) < 0 < float(found.max())
    assert np.abs(np.asarray(found.sum(-1)) - 1.0).max() > 0.1


def swapped(tree):
    """All parameters of stream A in the place of those of B, and the other way round."""

    def name(key):
        if key in ("a", "b"):
            return "b" if key == "a" else "a"
        if key.startswith(("stream_a", "stream_b")):
            return key.replace("stream_a", "stream_?").replace("stream_b", "stream_a").replace("stream_?", "stream_b")
        return key

    return {name(k): swapped(v) for k, v in tree.items()} if isinstance(tree, dict) else tree


@pytest.fixture(scope="module")
def teacher():
    with jax.enable_x64(True):
        variables = setup.variables(setup.tiny_state("teacher"), "teacher")
        tiles = setup.last(setup.tile(11)), setup.last(setup.tile(12))
        run = jax.jit(setup.NETWORKS["teacher"](setup.TINY).apply).lower(variables, *tiles).compile(setup.QUICK)
        return variables, run, *tiles


def test_M5_swapping_inputs_and_streams_changes_nothing_but_the_names_of_the_maps(teacher):
    variables, run, a, b = teacher
    before, after = run(variables, a, b), run(swapped(variables), b, a)
    np.testing.assert_allclose(after["logits"], before["logits"], rtol=1e-11)
    for level in range(3):
        np.testing.assert_allclose(after[f"map_a{level}"], before[f"map_b{level}"], rtol=1e-9, atol=1e-14)


def test_M6_ihc_reaches_the_h_and_e_stream_through_the_cross_values_only(teacher):
    variables, run, a, b = teacher
    before, after = run(variables, a, b), run(variables, a, b + 1.0)
    for name in ("map_a0", "stream_a0"):
        assert float(jnp.abs(after[name] - before[name]).max()) > 1e-6, name
    silent = jax.tree_util.tree_map_with_path(
        lambda path, x: jnp.zeros_like(x) if _is_cross_value(path) else x, variables["params"]
    )
    variables = {**variables, "params": silent}
    before, after = run(variables, a, b), run(variables, a, b + 1.0)
    for level in range(3):
        np.testing.assert_array_equal(after[f"stream_a{level}"], before[f"stream_a{level}"])
    assert float(jnp.abs(after["map_a0"] - before["map_a0"]).max()) > 1e-6


def _is_cross_value(path):
    names = [entry.key for entry in path]
    return names[0].startswith("cross_update") and "value" in names


def test_M7_both_sources_of_the_students_ffn_agree_without_an_attention_update():
    x = setup.last(setup.tile(11))
    variables = setup.variables(setup.tiny_state("student"), "student")
    runs = [jax.jit(setup.NETWORKS["student"](setup.tiny(cross_ffn_source=s)).apply) for s in FFN_SOURCES]

    def difference(variables):
        return float(jnp.abs(runs[0](variables, x)["logits"] - runs[1](variables, x)["logits"]).max())

    assert difference(variables) > 1e-7
    silent = jax.tree_util.tree_map_with_path(
        lambda path, v: jnp.zeros_like(v) if "proj" in [entry.key for entry in path] else v, variables["params"]
    )
    assert difference({**variables, "params": silent}) == 0.0


@pytest.mark.parametrize("unbiased,factor", [(True, 6 / 5), (False, 1.0)])
def test_T3_running_variance_takes_the_factor_n_over_n_minus_1(unbiased, factor):
    x = setup.noise(3, 6 * 2).reshape(6, 2)
    module = BatchNorm(2, NormSpec(unbiased=unbiased))
    variables = module.init(jax.random.key(0), jnp.asarray(x), False)
    y, new = module.apply(variables, jnp.asarray(x), True, mutable=["batch_stats"])
    np.testing.assert_allclose(new["batch_stats"]["mean"], 0.1 * x.mean(0), rtol=1e-12)
    np.testing.assert_allclose(new["batch_stats"]["var"], 0.9 + 0.1 * factor * x.var(0), rtol=1e-12)
    np.testing.assert_allclose(y, (x - x.mean(0)) / np.sqrt(x.var(0) + 1e-5), rtol=1e-12)


def test_a_batch_of_one_value_per_channel_cannot_be_normalised():
    module = BatchNorm(2, NormSpec())
    variables = module.init(jax.random.key(0), jnp.zeros((1, 2)), False)
    with pytest.raises(ValueError, match="at least two images per step"):
        module.apply(variables, jnp.zeros((1, 2)), True, mutable=["batch_stats"])


def test_initial_kernels_have_the_stated_spread_and_everything_else_is_one_or_zero():
    kernel = np.asarray(normal(0.02)(jax.random.key(0), (32, 32, 3, 48)))
    assert abs(kernel.std() - 0.02) < 1e-4 and abs(kernel.mean()) < 2e-4
    network, shape = setup.NETWORKS["student"](setup.TINY), (2, 16, 16, 3)
    variables = setup.once(lambda key: init_variables(network, key, shape), jax.random.key(0))
    like = jax.eval_shape(network.init, jax.random.key(0), jax.ShapeDtypeStruct(shape, jnp.float32))
    assert jax.tree.map(jnp.shape, variables) == jax.tree.map(jnp.shape, dict(like))
    for path, leaf in jax.tree_util.tree_leaves_with_path(variables):
        name = path[-1].key
        if name in ("kernel", "mix", "collapse"):
            std = 0.01 if "head" in [p.key for p in path] else 0.02
            # Not a slice that another kernel has as well, and not one number repeated.
            assert leaf.std() < 3 * std and np.unique(np.asarray(leaf)).size > 0.99 * leaf.size
        else:
            assert (leaf == (1.0 if name in ("scale", "var") else 0.0)).all(), path
