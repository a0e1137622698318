"""Parameters and optimizer state divided over the data axis: the same training with less memory per device."""

import functools

import jax
import numpy as np
import pytest
import tiny
from jax.sharding import PartitionSpec as P

from data_pipelines.pipeline import StepIterator
from histokd_jax.methods import registry
from histokd_jax.train import experiment, memory, sharding
from histokd_jax.train.checkpoint import RunCheckpoints
from histokd_jax.train.programs import Programs
from histokd_jax.train.state import init_params

WIDE = {"model__d": 32, "model__attn": 32, "genes__token_size": 32}


class Parts:
    """What does not change in training: data and compiled programs of the tiny method, made a little wider."""

    def __init__(self, config_of, fsdp, devices, **changes):
        cfg = config_of(mesh__data=devices, mesh__fsdp=fsdp, data__rows=8, **WIDE, **changes)
        cfg = experiment.resolve_width(cfg)
        exp = experiment.load_experiment(cfg)
        method = registry.get_method("mkd")(cfg, exp.data_spec(("genes",)))
        self.source = experiment.fold_data(exp, 0, method).train
        self.programs = Programs(method, cfg, sharding.make_mesh(devices))


@pytest.fixture(scope="module")
def parts(cohort_dir):
    """(fsdp, devices) -> parts, made once."""
    config_of = tiny.config_maker(cohort_dir)
    return functools.cache(lambda fsdp, devices: Parts(config_of, fsdp, devices))


@pytest.fixture(scope="module")
def start(parts):
    """(params, extra) of every training, as NumPy arrays, which no donation can take away."""
    return jax.device_get(init_params(parts(False, 8).programs.method, 0)[:2])


class Training:
    """Steps of the tiny method from the start."""

    def __init__(self, parts, start):
        self.source, self.programs = parts.source, parts.programs
        self.stage = self.programs.method.stages[0]
        self.state = self.programs.start(self.stage, *start, jax.random.key(1), self.batch(0))

    def batch(self, number):
        host = next(StepIterator(self.source, start_step=number, num_threads=0))
        return sharding.put_batch(self.programs.mesh, host)

    def steps(self, count=3):
        losses = []
        for number in range(count):
            self.state, loss = self.programs.train(self.stage, self.state, self.batch(number), 1e-3)
            losses.append(float(loss))
        return losses

    def memory(self):
        (compiled,) = self.programs._compiled.values()
        return memory.StepMemory.of(compiled)


@pytest.fixture
def both(parts, start):
    """On eight devices, replicated and divided."""
    return tuple(Training(parts(fsdp, 8), start) for fsdp in (False, True))


def assert_close(a, b, atol):
    for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(a), jax.tree.leaves(b), strict=True):
        name = jax.tree_util.keystr(path)
        if name.endswith("['attention']['score']['bias']"):
            continue  # A softmax ignores it: its gradient is rounding, which Adam makes a step of full length.
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=atol, err_msg=name)


def test_sharded_training_equals_replicated_and_needs_less_memory(both):
    whole, divided = both
    sharded = [leaf for leaf in jax.tree.leaves(divided.state) if not leaf.sharding.is_fully_replicated]
    # Parameters, two moments and the best parameters.
    assert len(sharded) >= 4 * 4
    np.testing.assert_allclose(whole.steps(1), divided.steps(1), rtol=1e-5)
    # The first moment after one step is a tenth of the gradient.
    assert_close(whole.state.opt_state[0].mu, divided.state.opt_state[0].mu, atol=1e-6)
    np.testing.assert_allclose(whole.steps(3), divided.steps(3), rtol=1e-4)
    # Adam turns rounding noise into whole steps where the gradient is zero, so parameters are compared to its rate.
    assert_close(whole.state.params, divided.state.params, atol=1e-3)
    assert [leaf.sharding for leaf in jax.tree.leaves(divided.state)] == jax.tree.leaves(
        sharding.state_shardings(divided.programs.mesh, divided.state, True)
    )
    assert divided.memory().arguments < 0.5 * whole.memory().arguments
    assert divided.memory().total < whole.memory().total


def test_a_checkpoint_is_restored_into_either_layout_and_another_mesh(both, parts, start, tmp_path):
    whole, divided = both
    divided.steps(1)
    with RunCheckpoints(tmp_path, {"config": "x"}) as saved:
        saved.save(1, divided.state, {"step": 1})
    for other in (whole, Training(parts(True, 8), start), Training(parts(True, 4), start)):
        with RunCheckpoints(tmp_path, {"config": "x"}) as saved:
            restored = saved.restore(other.state)
        for like, leaf, want in zip(*map(jax.tree.leaves, (other.state, restored, divided.state)), strict=True):
            assert leaf.sharding == like.sharding
            if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
                leaf, want = jax.random.key_data(leaf), jax.random.key_data(want)
            np.testing.assert_array_equal(leaf, want)


@pytest.mark.slow
def test_slow_weights_and_moments_of_lookahead_are_divided_like_the_parameters(cohort_dir, start, tmp_path):
    """Six steps reach the first move; a checkpoint of the divided state fits the whole one."""
    config_of, changes = tiny.config_maker(cohort_dir), {"train__optimizer": "lookahead_radam"}
    whole, divided = (Training(Parts(config_of, fsdp, 2, **changes), start) for fsdp in (False, True))
    np.testing.assert_allclose(whole.steps(6), divided.steps(6), rtol=1e-4)
    assert_close(whole.state.params, divided.state.params, atol=1e-3)
    state = divided.state.opt_state
    placed = [leaf.sharding for leaf in jax.tree.leaves(divided.state.params)]
    assert any(not sharding.is_fully_replicated for sharding in placed)
    for tree in (state.slow, state.fast[0].mu, state.fast[0].nu):
        assert [leaf.sharding for leaf in jax.tree.leaves(tree)] == placed
    jax.tree.map(np.testing.assert_array_equal, state.slow, divided.state.params)
    with RunCheckpoints(tmp_path, {"config": "x"}) as saved:
        saved.save(1, divided.state, {"step": 1})
        restored = saved.restore(whole.state)
    jax.tree.map(np.testing.assert_array_equal, restored.opt_state, state)


@pytest.mark.parametrize(
    ("shape", "spec"),
    [
        ((64, 128), P(None, "data")),
        ((128, 64), P("data")),
        ((64, 64), P("data")),
        ((12, 1024), P(None, "data")),
        ((1031, 7), P()),
        ((8, 8), P()),
        ((), P()),
    ],
    ids=str,
)
def test_the_largest_dimension_that_divides_is_divided(shape, spec):
    mesh = sharding.make_mesh(8)
    found = sharding.state_shardings(mesh, {"w": jax.ShapeDtypeStruct(shape, "float32")}, True)["w"]
    assert found.is_equivalent_to(jax.sharding.NamedSharding(mesh, spec), len(shape))
    assert sharding.state_shardings(mesh, jax.ShapeDtypeStruct(shape, "float32"), False).is_fully_replicated
