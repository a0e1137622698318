"""Step semantics: check I of the MKD specification, layouts, devices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from data_pipelines.pipeline import StepIterator
from histokd_jax.methods import registry
from histokd_jax.train import experiment, optim, sharding, state, step
from histokd_jax.utils import hlo

ROWS_MULTIPLE = 8


def build(tiny_config, **changes):
    cfg = experiment.resolve_width(tiny_config(**changes))
    exp = experiment.load_experiment(cfg)
    method = registry.get_method("mkd")(cfg, exp.data_spec(("genes",)))
    return cfg, method, experiment.fold_data(exp, 0, method)


def first_batch(data, index=0):
    return next(StepIterator(data.train, start_step=index, num_threads=0))


KEY = jax.random.key(1)
# The same changes are named alike, so that tests share what was computed of them.
PACKED, PADDED = (), (("train__batching", "padded"),)


def rows(pool="chunked"):
    return ("data__rows", ROWS_MULTIPLE), ("data__pool", pool)


@pytest.fixture(scope="module")
def built(cohort_dir):
    """changes -> (cfg, method, data) of the tiny method, each built once."""
    config_of = tiny.config_maker(cohort_dir)
    return functools.cache(lambda changes: build(config_of, **dict(changes)))


@pytest.fixture(scope="module")
def params(built):
    """Initial parameters; no setting of these tests changes them."""
    return jax.jit(built(PACKED)[1].init)(jax.random.key(0))[0]


@pytest.fixture(scope="module")
def whole(built, params):
    """changes -> (loss, gradients) of the first batch on one device, each computed once."""

    def compute(changes):
        _, method, data = built(changes)
        return gradients(method, params, first_batch(data), KEY)

    return functools.cache(compute)


def gradients(method, params, batch, key, cached=False):
    fn = step.cached_loss_and_gradients if cached else step.loss_and_gradients
    loss, _, _, grads = jax.jit(
        lambda params, batch: fn(method, "online", params, {}, batch, key, jnp.zeros((), jnp.int32))
    )(params, batch)
    return loss, grads


def close(a, b, rtol=1e-4):
    a, b = jax.device_get((a, b))
    scale = max(np.abs(x).max() for x in jax.tree.leaves(a))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=rtol, atol=2e-6 * max(scale, 1.0)), a, b)


def test_check_I1_step_gradient_is_mean_ce_gradient_plus_distillation(built, params, whole):
    """The reference accumulates CE / b bag by bag and adds the distillation terms of the stacked outputs."""
    _, method, data = built(PACKED)
    batch = first_batch(data)

    def outputs_of(params):
        return method.forward(params, {}, {}, batch, KEY, True)[0]

    def ce_of_slot(params, s):
        out = outputs_of(params)
        logp = [jax.nn.log_softmax(out[z][s])[jnp.asarray(batch["label"])[s]] for z in ("z_P", "z_M", "z_G")]
        return -sum(logp)

    slots = range(len(batch["weight"]))
    gradient = jax.jit(jax.grad(ce_of_slot))
    accumulated = [jax.device_get(gradient(params, s)) for s in slots]
    mean_ce = jax.tree.map(lambda *g: sum(g) / len(g), *accumulated)

    def distillation(params):
        out = outputs_of(params)
        total = method.objective(out, batch, 0, "online")[0]
        ce = -sum(
            jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(out[z]), batch["label"][:, None], 1))
            for z in ("z_P", "z_M", "z_G")
        )
        return total - ce

    extra = jax.jit(jax.grad(distillation))(params)
    close(whole(PACKED)[1], jax.tree.map(np.add, mean_ce, jax.device_get(extra)))


def test_check_I2_grad_cache_equals_padded_with_dropout_on(built, params, whole):
    _, method, data = built(PADDED)
    padded, cached = whole(PADDED), gradients(method, params, first_batch(data), KEY, cached=True)
    np.testing.assert_allclose(padded[0], cached[0], rtol=1e-5)
    close(padded[1], cached[1])


def test_packed_equals_padded_with_dropout_on(whole):
    a, b = whole(PACKED), whole(PADDED)
    np.testing.assert_allclose(a[0], b[0], rtol=1e-5)
    close(a[1], b[1])


def run_steps(method, data, params, count, stage="online"):
    tx = optim.make_optimizer(
        weight_decay=1e-5, decay_bias=True, trainable=method.stages[0].trainable, groups=tuple(params)
    )
    batch = first_batch(data)
    names = step.metric_names(method, stage, params, {}, batch)
    current = state.start_stage(params, {}, jax.random.key(3), tx, names)
    train = jax.jit(step.make_train_step(method, tx, stage))
    for i in range(count):
        current, _ = train(current, first_batch(data, i), jnp.float32(1e-3))
    return current.params


def test_check_I3_one_step_changes_all_three_networks(built, params):
    _, method, data = built(PACKED)
    after = run_steps(method, data, params, 1)
    for group in ("S_P", "T_M", "T_G"):
        moved = [bool(jnp.any(a != b)) for a, b in zip(jax.tree.leaves(params[group]), jax.tree.leaves(after[group]))]
        assert any(moved), group


def test_check_I4_without_weights_the_networks_train_as_if_separately(tiny_config, params):
    """All lambda = 0: S_P after 10 steps equals S_P trained with no teacher in the program at all."""
    off = {f"loss__lambda_{n}": 0.0 for n in ("coral", "or", "skd", "clod")}
    _, method, data = build(tiny_config, **off)
    _, alone, _ = build(tiny_config, **off, teachers="M")
    together = run_steps(method, data, params, 10)
    fewer = run_steps(alone, data, {k: params[k] for k in ("S_P", "T_M")}, 10)
    for group in ("S_P", "T_M"):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6), together[group], fewer[group])


def test_check_I5_trailing_partial_group_causes_no_update(tiny_config):
    cfg, method, data = build(tiny_config, train__b=5)
    n = len(data.train.plan.sizes)
    assert n % cfg.train.b, "the cohort must leave a remainder for this check"
    assert data.train.plan.steps_per_epoch == n // cfg.train.b
    assert (data.train.plan.slide >= 0).all()


@pytest.mark.parametrize(
    ("devices", "sequence", "pool"),
    # Eight devices along the rows: tests/multiprocess/test_gradients.py.
    [(2, 1, "chunked"), pytest.param(8, 1, "chunked", marks=pytest.mark.slow), (2, 4, "chunked"), (2, 4, "segment")],
)
def test_one_device_equals_many(built, params, whole, devices, sequence, pool):
    """The same global batch gives the same loss and gradients; batch-coupled terms see all slides."""
    _, method, data = built(rows(pool))
    want = whole(rows(pool))
    mesh = sharding.make_mesh(devices, sequence)
    with jax.set_mesh(mesh):
        placed = jax.device_put(params, sharding.replicated(mesh))
        got = gradients(method, placed, sharding.put_batch(mesh, first_batch(data)), KEY)
    np.testing.assert_allclose(want[0], got[0], rtol=1e-5)
    close(want[1], got[1])


def test_grad_cache_divides_its_row_over_the_sequence_axis(built, params, whole):
    _, method, data = built(PADDED)
    want = whole(PADDED)
    mesh = sharding.make_mesh(1, 4)
    with jax.set_mesh(mesh):
        got = gradients(method, params, sharding.put_batch(mesh, first_batch(data)), KEY, cached=True)
    np.testing.assert_allclose(want[0], got[0], rtol=1e-5)
    close(want[1], got[1])


def compiled_step(method, batch, mesh, params):
    """HLO text of the whole training step, optimizer included."""
    tx = optim.make_optimizer(
        weight_decay=1e-5, decay_bias=True, trainable=method.stages[0].trainable, groups=tuple(params)
    )
    names = step.metric_names(method, "online", params, {}, batch)
    start = jax.device_put(state.start_stage(params, {}, jax.random.key(3), tx, names), sharding.replicated(mesh))
    shapes = {
        k: jax.ShapeDtypeStruct(v.shape, v.dtype, sharding=sharding.field_sharding(mesh, k)) for k, v in batch.items()
    }
    train = step.make_train_step(method, tx, "online")
    with jax.set_mesh(mesh):
        return jax.jit(train).lower(start, shapes, jnp.float32(1e-3)).compile().as_text()


@pytest.mark.parametrize(
    ("devices", "sequence", "pool"),
    [(2, 4, "chunked"), *(pytest.param(*p, marks=pytest.mark.slow) for p in ((8, 1, "chunked"), (2, 4, "segment")))],
)
def test_bytes_sent_are_bounded_by_parameters_and_embeddings_whatever_the_bags(built, params, devices, sequence, pool):
    """Read from the compiled program: no patch travels, and ten times longer rows send the same bytes."""
    cfg, method, data = built(rows(pool))
    batch = first_batch(data)
    mesh = sharding.make_mesh(devices, sequence)
    sent = []
    for times in (1, 10):
        longer = {k: np.concatenate([v] * times, 1) if v.ndim > 1 and v.shape[0] == ROWS_MULTIPLE else v
                  for k, v in batch.items()}  # fmt: skip
        sent.append(hlo.collective_bytes(compiled_step(method, longer, mesh, params)))
    assert sent[0] == sent[1]
    assert set(sent[0]) == {"all-reduce"}
    embeddings = 4 * cfg.train.b * cfg.model.d
    bags = [params["S_P"]["bag"], params["T_M"]["bag"]]
    encoders = sum(leaf.nbytes for leaf in jax.tree.leaves(bags))
    # Gradients of the two bag encoders, and for each of them sums [b, d] with two numbers per slide beside them.
    assert encoders <= sent[0]["all-reduce"] <= encoders + 2 * (embeddings + 2 * 4 * cfg.train.b) + 64


def test_unknown_batching_is_refused():
    with pytest.raises(ValueError, match="grad_cache"):
        step.make_train_step(None, None, "online", "lazy")


def test_more_devices_than_present_are_refused():
    with pytest.raises(ValueError, match="mesh.data=64"):
        sharding.make_mesh(64)


def test_rows_that_do_not_divide_over_devices_are_refused(tiny_config):
    _, _, data = build(tiny_config, data__rows=3)
    with pytest.raises(ValueError, match="data.rows to a multiple of 2"):
        sharding.put_batch(sharding.make_mesh(2), first_batch(data))
    with pytest.raises(ValueError, match="data.row_multiple to a multiple of 5"):
        sharding.put_batch(sharding.make_mesh(1, 5), first_batch(data))


def test_a_mesh_takes_all_devices_that_the_sequence_axis_leaves():
    assert dict(sharding.make_mesh(0, 4).shape) == {"data": 2, "sequence": 4}
    with pytest.raises(ValueError, match="mesh.data=4 x mesh.sequence=4"):
        sharding.make_mesh(4, 4)
    with pytest.raises(ValueError, match="mesh.sequence=0"):
        sharding.make_mesh(1, 0)


def test_more_slots_than_a_row_holds_is_refused(tiny_config):
    _, _, data = build(tiny_config)
    batch, mesh = first_batch(data), sharding.make_mesh()
    slots = len(batch["weight"])
    fewer = {**batch, "weight": batch["weight"][:-1]}
    with pytest.raises(ValueError, match=f"reach {slots}, but it has {slots - 1} slots"):
        sharding.put_batch(mesh, fewer)
    rows = {k: batch[k][:, : slots - 1] for k in ("patches", "segment_ids", "positions")}
    with pytest.raises(ValueError, match=f"{slots} slides does not fit into 1 rows of {slots - 1} patches"):
        sharding.put_batch(mesh, {**batch, **rows})
