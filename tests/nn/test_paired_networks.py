"""CoCoFNet and its student as wholes: sizes (S1 to S3), gradients (S5), batches (M9), sharding, half precision."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import paired_reference as ref
import paired_setup as setup
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from histokd_jax.nn.paired.spec import PairedSpec

BLOCKS = {48: 30_088, 96: 107_828, 224: 554_168, 448: 2_174_388}
CROSS = {"teacher": (111_160, 433_912, 2_330_872), "student": (55_580, 216_956, 1_165_436)}
FULL = PairedSpec()
DEPTHS = {"teacher": (2, 2, 6, 2), "student": (2, 2, 2, 2)}
PATCHES = (147_600, 18_720, 86_688, 402_752)


@functools.cache
def shapes(model, side=256, batch=2, spec=FULL):
    """(variables, outputs) as shapes; nothing is computed."""
    tiles = (jax.ShapeDtypeStruct((batch, side, side, 3), jnp.float32),) * (2 if model == "teacher" else 1)
    network = setup.NETWORKS[model](spec)
    return jax.eval_shape(lambda key, *t: network.init_with_output(key, *t), jax.random.key(0), *tiles)


def size(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize("model,total,tensors", [("teacher", 15_394_308, 1342), ("student", 7_885_816, 521)])
def test_S1_parameters_of_the_networks_and_of_their_parts(model, total, tensors):
    params = shapes(model)[1]["params"]
    assert (size(params), len(jax.tree.leaves(params))) == (total, tensors)
    widths, depths = PairedSpec().widths, DEPTHS[model]
    for level in range(4):
        streams = ("fused" if model == "teacher" else "joint",) if level == 3 else (f"stream_a_{level}",)
        streams += (f"stream_b_{level}",) if model == "teacher" and level < 3 else ()
        for name in streams:
            assert size(params[name]["patch"]) == PATCHES[level]
            blocks = [size(v) for k, v in params[name].items() if k.startswith("block_")]
            assert blocks == [BLOCKS[widths[level]]] * depths[level]
    assert tuple(size(params[f"cross_update_{i}"]) for i in range(3)) == CROSS[model]
    head = params["head"]
    assert size(head["norm"]) == 896 and size(head["logits"]) == 516
    assert size(head["hidden"]) + size(head["hidden_norm"]) == 57_728


@pytest.mark.parametrize("width,parts", [
    (48, (2_400, 192, 452, 6_308, 2_304, 18_432)),
    (96, (4_800, 384, 1_560, 22_796, 4_560, 73_728)),
    (224, (11_200, 896, 7_224, 117_452, 15_988, 401_408)),
    (448, (22_400, 1_792, 26_992, 460_508, 57_064, 1_605_632)),
])  # fmt: skip
def test_S1_parameters_of_a_block(width, parts):
    params, level = shapes("student")[1]["params"], PairedSpec().widths.index(width)
    block = params["joint" if level == 3 else f"stream_a_{level}"]["block_0"]
    norms = size(block["norm1"]) + size(block["norm2"])
    found = [size(block[name]) for name in ("position", "local", "global", "refine", "mlp")]
    assert (found[0], norms, *found[1:]) == parts


@pytest.mark.parametrize("width,attention,ffn", [(48, 36_476, 18_912), (96, 141_884, 74_688), (224, 760_892, 403_648)])
def test_S1_parameters_of_a_side_of_a_cross_block(width, attention, ffn):
    side = shapes("teacher")[1]["params"][f"cross_update_{PairedSpec().widths.index(width)}"]["b"]
    assert size(side["mlp"]) == ffn
    assert sum(size(side[name]) for name in ("query", "key", "value", "attention", "proj")) == attention


@pytest.mark.parametrize("model,total", [("teacher", 53_824), ("student", 23_096)])
def test_S2_running_statistics(model, total):
    stats = shapes(model)[1]["batch_stats"]
    assert size(stats) == total
    if model == "teacher":
        assert len(jax.tree.leaves(stats)) == 2 * 236


@pytest.mark.parametrize("model", ["teacher", "student"])
@pytest.mark.parametrize(
    "side,grids", [(256, (8, 4, 2)), (512, (16, 8, 4)), (1024, (32, 16, 8)), (288, (9, 4, 2)), (320, (10, 5, 2))]
)
def test_S3_shapes_of_outputs_and_maps(model, side, grids):
    found = shapes(model, side)[0]
    for level, grid in enumerate(grids):
        assert found[f"stream_a{level}"].shape == (2, grid, grid, PairedSpec().widths[level])
        for name in ("map_a", "map_b")[: 2 if model == "teacher" else 1]:
            assert found[f"{name}{level}"].shape == (2, grid**2, grid**2)
    assert [found[name].shape for name in ("f3", "feat", "logits")] == [(2, 448), (2, 128), (2, 4)]


@pytest.mark.parametrize("model", ["teacher", "student"])
def test_S3_a_side_of_224_is_refused_with_the_least_one(model):
    with pytest.raises(ValueError, match="224 x 224 pixels are too small.*at least 256"):
        shapes(model, 224)
    assert shapes(model, 128, spec=PairedSpec(stem_patch=16))[0]["logits"].shape == (2, 4)


def run(model, spec, variables, tiles, train=False):
    network = setup.NETWORKS[model](spec)
    return setup.training(network, variables, *tiles) if train else (setup.once(network.apply, variables, *tiles), {})


@pytest.mark.parametrize(
    "model,train",
    [
        *(("teacher", True), ("student", False)),
        *(pytest.param(*case, marks=pytest.mark.long) for case in (("teacher", False), ("student", True))),
    ],
)
def test_networks_equal_an_independent_implementation(model, train):
    """Images that are not square and leave remainders at every level."""
    with jax.enable_x64(True):
        state = setup.tiny_state(model)
        tiles = [setup.tile(s, 3, 18, 22) for s in (21, 22)[: 2 if model == "teacher" else 1]]
        tensors = ref.Tensors(state, train)
        expected = {"teacher": ref.teacher, "student": ref.student}[model](tensors, *tiles)
        variables = setup.variables(state, model)
        found, new = run(model, setup.TINY, variables, [setup.last(t) for t in tiles], train)
        for name, value in expected.items():
            value = value[:, 0] if name.startswith("map") else value
            value = np.moveaxis(value, 1, -1) if name.startswith("stream") else value
            np.testing.assert_allclose(found[name], value, rtol=1e-6, atol=1e-8, err_msg=name)
        if train:
            moved = setup.torch_keys.to_torch(variables["params"], new["batch_stats"], setup.TINY, model)
            assert tensors.new.keys() == {k for k in moved if "running" in k}
            for key, value in tensors.new.items():
                np.testing.assert_allclose(moved[key], value, rtol=1e-6, atol=1e-9, err_msg=key)


@pytest.mark.parametrize("model", ["teacher", pytest.param("student", marks=pytest.mark.long)])
def test_S5_every_parameter_receives_a_gradient(model):
    tiles = [setup.last(setup.tile(s, 4)).astype(jnp.float32) for s in (21, 22)[: 2 if model == "teacher" else 1]]
    variables = setup.variables(setup.tiny_state(model), model, dtype=jnp.float32)
    label = jnp.arange(4)

    def gradient(params):
        def loss(params):
            found, _ = setup.NETWORKS[model](setup.TINY).apply(
                {**variables, "params": params}, *tiles, True, mutable=["batch_stats"]
            )
            picked = jnp.take_along_axis(jax.nn.log_softmax(found["logits"]), label[:, None], axis=1)
            # A softmax of a single token is constant, but its map is part of the student's loss.
            return -picked.mean() + sum(jnp.sum(found[f"map_a{i}"] ** 2) for i in range(3))

        return jax.grad(loss)(params)

    for path, leaf in jax.tree_util.tree_leaves_with_path(setup.once(gradient, variables["params"])):
        names = [p.key for p in path]
        assert np.isfinite(leaf).all(), names
        # A constant in front of a batch norm has no effect.
        if not _cancelled(names):
            assert np.abs(leaf).max() > 1e-9, names


def _cancelled(names):
    if names[-1] != "bias":
        return False
    return "patch" in names[-2:] or "hidden" in names or ("refine" in names and not names[-2].endswith("norm"))


@pytest.mark.parametrize("model", [pytest.param("teacher", marks=pytest.mark.long), "student"])
def test_M9_inference_does_not_depend_on_the_rest_of_the_batch(model):
    with jax.enable_x64(True):
        tiles = [setup.last(setup.tile(s, 3)) for s in (21, 22)[: 2 if model == "teacher" else 1]]
        variables = setup.variables(setup.tiny_state(model), model)
        together, _ = run(model, setup.TINY, variables, tiles)
        alone, _ = run(model, setup.TINY, variables, [t[1:2] for t in tiles])
        for name, value in alone.items():
            np.testing.assert_allclose(value[0], together[name][1], rtol=1e-10, atol=1e-13, err_msg=name)


@pytest.mark.long
def test_planes_in_blocks_change_nothing_in_training():
    with jax.enable_x64(True):
        tiles = [setup.last(setup.tile(21, 3))]
        variables = setup.variables(setup.tiny_state("student"), "student")
        whole, stats = run("student", setup.TINY, variables, tiles, True)
        blocks, again = run("student", setup.tiny(plane_elements=600), variables, tiles, True)
        for a, b in zip(jax.tree.leaves((whole, stats)), jax.tree.leaves((blocks, again))):
            np.testing.assert_allclose(a, b, rtol=1e-7, atol=1e-9)


def test_statistics_of_a_divided_batch_are_those_of_the_whole_batch():
    with jax.enable_x64(True):
        tiles = setup.last(setup.tile(21, 8))
        variables = setup.variables(setup.tiny_state("student"), "student")
        mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:4])
        divided = jax.device_put(tiles, NamedSharding(mesh, PartitionSpec("data")))
        one, stats = run("student", setup.TINY, variables, [tiles], True)
        four, again = run("student", setup.TINY, variables, [divided], True)
        np.testing.assert_allclose(four["logits"], one["logits"], rtol=1e-8)
        for a, b in zip(jax.tree.leaves(stats), jax.tree.leaves(again)):
            np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12)


def test_half_precision_keeps_scores_maps_and_head_in_float32():
    tiles = [setup.last(setup.tile(21, 2)).astype(jnp.float32)]
    variables = setup.variables(setup.tiny_state("student"), "student", dtype=jnp.float32)
    exact, _ = run("student", setup.TINY, variables, tiles)
    low, _ = run("student", setup.tiny(dtype=jnp.bfloat16), variables, tiles)
    assert low["stream_a0"].dtype == jnp.bfloat16
    assert {low[name].dtype for name in ("map_a0", "f3", "feat", "logits")} == {jnp.dtype(jnp.float32)}
    np.testing.assert_allclose(low["logits"], exact["logits"], atol=0.05)


def test_stains_of_two_sizes_are_refused():
    with pytest.raises(ValueError, match="must have one shape"):
        jax.eval_shape(
            setup.NETWORKS["teacher"](setup.TINY).init,
            jax.random.key(0),
            jnp.zeros((1, 16, 16, 3)),
            jnp.zeros((1, 18, 16, 3)),
        )
