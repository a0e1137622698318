"""MoMKD as a Method: gradients per term, channel between branches, memories, deployment: checks 6, 7, 13, 16, 17."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import momkd_setup as setup
import numpy as np
import optax
import pytest

from histokd_jax.methods.momkd.config import FAITHFUL, PAPER_HPARAMS, default_config, validate
from histokd_jax.methods.momkd.method import make_method
from histokd_jax.methods.momkd.objective import loss_terms
from histokd_jax.methods.registry import get_method
from histokd_jax.train import optim, sharding, step
from histokd_jax.types import DataSpec

ENCODER = ("gat_1", "gat_2", "norm_1", "norm_2", "residual")
PARTS = {
    "encoder": [("SLIDE", name) for name in ENCODER],
    "patch_proj": [("SLIDE", "patch_proj")],
    "log_tau": [("SLIDE", "log_tau")],
    "pool_proj": [("SLIDE", "slide_proj")],
    "classifier": [("SLIDE", name) for name in ("head_norm", "head_dense", "head_out")],
    "gene_encoder": [("GENES", name) for name in ("encode_dense", "encode_norm", "encode_out")],
    "gene_proj": [("GENES", "gene_proj")],
    "decoder": [("GENES", name) for name in ("decode_dense", "decode_norm", "decode_out")],
}
TABLE = {
    "ce": {"encoder", "patch_proj", "log_tau", "classifier"},
    "align_slide": {"encoder", "patch_proj", "log_tau", "pool_proj", "own", "other"},
    "align_gene": {"gene_encoder", "gene_proj", "own", "other"},
    "rec": {"gene_encoder", "decoder"},
    "commit": {"encoder", "patch_proj"},
    "orth": {"own"},
}
"""Term -> parts whose gradient is not zero (table 5.1)."""


def reached(gradients, label):
    """Parts with a gradient anywhere; all others are exactly zero."""
    found = {
        part
        for part, places in PARTS.items()
        if any(np.any(leaf) for group, name in places for leaf in jax.tree.leaves(gradients[group][name]))
    }
    memories = {"own": gradients["MEMORY"]["codes"][label], "other": gradients["MEMORY"]["codes"][1 - label]}
    return found | {name for name, value in memories.items() if np.any(value)}


def term_gradients(run, params, batch, extra=None):
    """Term -> gradient of that term alone."""

    def terms(params):
        out, _ = run.forward(params, {}, extra or {}, batch, None, False)
        return {name: value for name, value in loss_terms(run.objective_spec, out, batch).items() if name in TABLE}

    @jax.jit
    def every(params):
        values, pull = jax.vjp(terms, params)
        return {name: pull({k: jnp.float32(k == name) for k in values})[0] for name in values}

    return every(params)


@pytest.mark.parametrize("label", [1, 0])
def test_C6_every_term_reaches_exactly_the_parts_of_table_5_1(label):
    run = setup.small_run()
    params, _ = setup.init(run)
    found = {n: reached(g, label) for n, g in term_gradients(run, params, setup.batch(label=label)).items()}
    assert found == TABLE


def test_C6_switches_open_what_they_name():
    batch = setup.batch(label=1)
    opened = {
        "attention__grad_to_memory": {"ce": {"own", "other"}, "align_slide": set()},
        "commit__move_codes": {"commit": {"own"}},
    }
    for key, terms in opened.items():
        run = setup.small_run(**{key: True})
        found = term_gradients(run, setup.init(run)[0], batch)
        for name, table in TABLE.items():
            assert reached(found[name], 1) == table | terms.get(name, set()), (key, name)


def steps(method, batches, params, extra, undecayed=(), lr=1e-2, clip=0.0):
    """Training steps of the trainer without dropout; yields (params, extra) after each."""
    original = method.forward

    def forward(params, frozen, extra, batch, key, train, stage="train"):
        # Dropout off, moving averages on: no key, but the step counts as training.
        return original(params, frozen, extra, batch, None, train, stage=stage)

    own = dataclasses.replace(method, forward=forward)
    tx = optim.make_optimizer(
        weight_decay=1e-4,
        decay_bias=True,
        trainable=tuple(params),
        groups=tuple(params),
        clip_norm=clip,
        undecayed=undecayed,
    )
    state = tx.init(params)

    @jax.jit
    def one(params, extra, state, batch):
        key = jax.random.key(0)
        _, _, extra, grads = step.loss_and_gradients(own, "train", params, extra, batch, key, jnp.int32(0))
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, jax.tree.map(lambda u: -lr * u, updates))
        return (params if own.after_update is None else own.after_update(params)), extra, state

    for batch in batches:
        params, extra, state = one(params, extra, state, batch)
        yield params, extra


def same(a, b):
    return all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


@pytest.mark.parametrize("update", ["gradient", "fixed"])
def test_C7_genes_reach_the_slide_branch_one_step_later_through_the_memories(update):
    method = setup.small_method(memory__update_by=update)
    params, extra = setup.init(method)
    batch = setup.batch()
    other = batch | {"genes": batch["genes"] + 1.0}
    plain = list(steps(method, [batch, batch], params, extra))
    perturbed = list(steps(method, [other, batch], params, extra))
    assert not same(plain[0][0]["GENES"], perturbed[0][0]["GENES"])
    assert same(plain[0][0]["SLIDE"], perturbed[0][0]["SLIDE"])
    assert same(plain[1][0]["SLIDE"], perturbed[1][0]["SLIDE"]) == (update == "fixed")
    assert not same(plain[0][0]["SLIDE"], plain[1][0]["SLIDE"]), "it trains"


def test_C7_clipping_couples_the_branches():
    method = setup.small_method()
    params, extra = setup.init(method)
    batch = setup.batch()
    other = batch | {"genes": batch["genes"] + 1.0}
    # Adam forgets the scale of a first gradient only up to its eps.
    plain, perturbed = (next(steps(method, [b], params, extra, clip=0.01))[0] for b in (batch, other))
    assert not same(plain["SLIDE"], perturbed["SLIDE"])


def test_C13_prediction_needs_neither_genes_nor_their_branch():
    method = setup.small_method()
    params, extra = setup.init(method)
    mode = method.mode("pathology")
    assert mode.params == ("SLIDE", "MEMORY") and "genes" not in mode.fields and "label" not in mode.fields
    batch = setup.batch()
    deployed = {group: params[group] for group in mode.params}
    fields = {name: batch[name] for name in mode.fields}
    alone = setup.predict(method, deployed, extra, fields)
    full = setup.predict(method, params, extra, batch | {"genes": batch["genes"] * 100})
    jax.tree.map(np.testing.assert_array_equal, alone, full)
    assert alone["prob"].shape == (4, 2) and alone["embedding"].shape == (4, 8)
    np.testing.assert_allclose(alone["prob"].sum(axis=1), 1, rtol=1e-6)
    with pytest.raises(ValueError, match="mode 'genomics' is not available"):
        method.predict(params, {}, extra, batch, "genomics")
    with pytest.raises(ValueError, match="'MEMORY'.*absent"):
        method.predict({"SLIDE": params["SLIDE"]}, {}, extra, fields, "pathology")
    with pytest.raises(ValueError, match=r"no \['neighbours'\]"):
        setup.predict(method, params, extra, {n: v for n, v in fields.items() if n != "neighbours"})


@pytest.mark.parametrize("decay", [False, True])
def test_C16_the_task_alone_leaves_the_memories_as_they_are(decay):
    zero = {f"loss__{name}": 0.0 for name in ("alpha_wsi", "alpha_gene", "lambda_rec", "mem")}
    method = setup.small_method(**zero, memory__weight_decay=decay)
    params, extra = setup.init(method)
    assert method.stages[0].undecayed == (() if decay else ("MEMORY",))
    *_, (after, _) = steps(method, [setup.batch()] * 10, params, extra, undecayed=method.stages[0].undecayed)
    assert same(after["MEMORY"], params["MEMORY"]) == (not decay)
    assert not same(after["SLIDE"], params["SLIDE"])


def test_C17_a_moving_average_that_never_moves_equals_fixed_memories():
    batches = [setup.batch(seed=seed) for seed in range(3)]
    ends = {}
    for name, changes in {
        "fixed": {"memory__update_by": "fixed"},
        "still": {"memory__update_by": "ema", "memory__momentum": 1.0},
        "moving": {"memory__update_by": "ema", "memory__momentum": 0.5},
    }.items():
        method = setup.small_method(**changes)
        params, extra = setup.init(method)
        assert set(params) == {"SLIDE", "GENES"} and extra["SLIDE"]["codes"].shape == (2, 4, 5)
        assert method.mode("pathology").params == ("SLIDE",)
        *_, ends[name] = steps(method, batches, params, extra)
        assert name == "moving" or same(ends[name][1], extra)
    assert same(ends["fixed"], ends["still"])
    assert not same(ends["moving"][1], ends["fixed"][1])
    np.testing.assert_allclose(np.linalg.norm(ends["moving"][1]["SLIDE"]["codes"], axis=2), 1, rtol=1e-5)


def test_renormalised_codes_keep_unit_length():
    for renormalise in (False, True):
        method = setup.small_method(memory__renormalise=renormalise)
        params, extra = setup.init(method)
        *_, (after, _) = steps(method, [setup.batch()] * 3, params, extra, lr=0.05)
        norms = np.linalg.norm(after["MEMORY"]["codes"], axis=2)
        assert np.allclose(norms, 1, rtol=1e-5) == renormalise


def test_slides_without_genes_train_the_slide_branch_only():
    run = setup.small_run()
    params, _ = setup.init(run)
    batch = setup.batch()
    has = np.array([True, False, True, False])
    genes = np.where(has[:, None], batch["genes"], np.nan).astype(np.float32)
    partly = batch | {"has_genes": has, "genes": genes}

    def loss(params, batch):
        out, _ = run.forward(params, {}, {}, batch, None, False)
        return run.objective(out, batch)[0], loss_terms(run.objective_spec, out, batch)

    (value, terms), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params, partly)
    loss = jax.jit(loss)
    assert np.isfinite(value) and all(np.isfinite(g).all() for g in jax.tree.leaves(grads))
    pair = [setup.bags()[0], setup.bags()[2]]
    fields = {name: value[has] for name, value in setup.slot_fields(4).items()}
    _, of_pair = loss(params, setup.packed(pair) | fields)
    _, of_all = loss(params, batch)
    for name in ("align_gene", "rec"):
        np.testing.assert_allclose(terms[name], of_pair[name], rtol=1e-5)
    for name in ("ce", "align_slide", "commit", "orth"):
        np.testing.assert_allclose(terms[name], of_all[name], rtol=1e-6)
    nobody = partly | {"has_genes": np.zeros(4, bool)}
    assert loss(params, nobody)[1]["align_gene"] == 0 and np.isfinite(loss(params, nobody)[0])


def test_empty_slots_count_nothing():
    run = setup.small_run()
    params, _ = setup.init(run)
    batch = setup.batch()
    wide = {n: np.concatenate([v, np.zeros_like(v[:2])]) if v.shape[0] == 4 and n in setup.slot_fields(4) else v
            for n, v in batch.items()}  # fmt: skip

    def loss(params, batch):
        out, _ = run.forward(params, {}, {}, batch, None, False)
        return run.objective(out, batch)[0]

    a, b = (jax.jit(jax.value_and_grad(loss))(params, x) for x in (batch, wide))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-5, atol=1e-6), a, b)


def test_grad_cache_gives_the_gradient_of_the_whole_step():
    """One slide per row; neighbours are offsets, so that a row alone means the same."""
    run, found = setup.small_run(), setup.bags()
    params, extra = setup.init(run)
    method = setup.small_method()
    rows = [setup.packed([bag], row=12) for bag in found]
    one = {name: np.concatenate([r[name][:1] for r in rows]) for name in rows[0]}
    one["segment_ids"] = one["segment_ids"] * np.arange(1, 5, dtype=np.int32)[:, None]
    batch = jax.tree.map(jnp.asarray, one | setup.slot_fields(4))
    args = (params, extra, batch, jax.random.key(1), jnp.int32(0))
    whole, cached = (
        jax.jit(functools.partial(f, method, "train"))(*args)
        for f in (step.loss_and_gradients, step.cached_loss_and_gradients)
    )
    np.testing.assert_allclose(whole[0], cached[0], rtol=1e-5)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=2e-5), whole[3], cached[3])


def test_rows_and_patches_divided_over_devices_give_the_same_gradient():
    run, mesh = setup.small_run(), sharding.make_mesh(2, 2)
    params, _ = setup.init(run)
    batch = setup.batch(row=10)
    assert batch["segment_ids"].shape == (4, 10)

    def loss(params, batch):
        out, _ = run.forward(params, {}, {}, batch, jax.random.key(1), True)
        return run.objective(out, batch)[0]

    whole = jax.jit(jax.value_and_grad(loss))(params, batch)
    with jax.set_mesh(mesh):
        divided = jax.jit(jax.value_and_grad(loss))(params, sharding.put_batch(mesh, batch))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5), whole, divided)


def test_weights_as_data_equal_weights_as_constants():
    batch = setup.batch()
    changed = {"loss.alpha_gene": 0.7, "loss.mem": 0.0, "align.margin": 0.1}
    a = setup.small_run()
    b = setup.small_run(**{key.replace(".", "__"): value for key, value in changed.items()})
    params, _ = setup.init(a)
    out, _ = jax.jit(lambda p: a.forward(p, {}, {}, batch, None, False))(params)
    values = {key: jnp.float32(value) for key, value in changed.items()}
    np.testing.assert_allclose(a.objective(out, batch, values=values)[0], b.objective(out, batch)[0], rtol=1e-5)


@pytest.mark.parametrize("pool", ["gated_attention", "mean"])
def test_baseline_pools_do_not_read_the_memories(pool):
    run = setup.small_run(ablate__baseline=True, ablate__baseline_pool=pool)
    params, _ = setup.init(run)
    assert ("gate" in params["SLIDE"]) == (pool == "gated_attention") and "log_tau" not in params["SLIDE"]
    batch, other = setup.batch(), {**params, "MEMORY": {"codes": -params["MEMORY"]["codes"] + 1}}
    a, b = (setup.predict(run, p, {}, batch)["logits"] for p in (params, other))
    np.testing.assert_array_equal(a, b)
    weights = setup.attention(run, params, {}, batch)
    first = weights[batch["segment_ids"] == 1]
    np.testing.assert_allclose(first.sum(), 1, rtol=1e-6)
    assert np.allclose(first, 1 / 9) == (pool == "mean")


def test_fixed_temperature_is_no_parameter():
    run = setup.small_run(attention__learn_temperature=False)
    params, _ = setup.init(run)
    assert "log_tau" not in params["SLIDE"]
    learned = setup.small_run()
    with_tau = {**params, "SLIDE": {**params["SLIDE"], "log_tau": jnp.log(0.2)}}
    a, b = setup.predict(run, params, {}, setup.batch()), setup.predict(learned, with_tau, {}, setup.batch())
    np.testing.assert_allclose(a["logits"], b["logits"], rtol=1e-5, atol=1e-6)


def test_without_genes_in_the_data_there_is_no_gene_branch():
    config = setup.small_config(genes__kind="none", loss__alpha_gene=0.0, loss__lambda_rec=0.0)
    method = make_method(config, DataSpec(setup.FEAT, 2))
    params, extra = setup.init(method)
    assert set(params) == {"SLIDE", "MEMORY"} and "genes" not in method.requires
    out, _ = jax.jit(lambda p: method.forward(p, {}, extra, setup.batch(), None, False))(params)
    assert set(method.objective(out, setup.batch())[1]) >= {"loss", "ce", "align_slide", "mem"}


def test_bfloat16_operands_stay_close():
    a, b = setup.small_method(), setup.small_method(train__compute_dtype="bfloat16")
    params, extra = setup.init(a)
    x, y = (setup.predict(m, params, extra, setup.batch()) for m in (a, b))
    assert y["prob"].dtype == jnp.float32
    np.testing.assert_allclose(x["prob"], y["prob"], atol=0.03)


@pytest.mark.parametrize(
    "key,value",
    [
        ("graph.direction", "both"),
        ("graph.k", 0),
        ("model.d", 9),
        ("model.codes", 0),
        ("model.edge_dropout", 1.0),
        ("memory.update_by", "momentum"),
        ("memory.momentum", 1.5),
        ("loss.alpha_wsi", -0.1),
        ("align.tau", 0.0),
        ("attention.temperature", 3.0),
        ("train.plateau_factor", 1.0),
        ("train.clip_norm", -1.0),
        ("ablate.baseline_pool", "max"),
        ("eval.edgeless", "drop"),
        ("genes.clip", -1.0),
    ],
)
def test_bad_values_are_named(key, value):
    config = default_config()
    config.update_from_flattened_dict({key: value})
    with pytest.raises(ValueError, match=f"{key} = "):
        validate(config)


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"genes.kind": "none"}, "loss.alpha_gene = 0.05 compares with genes"),
        ({"memory.update_by": "fixed", "commit.move_codes": True}, "commit.move_codes = True"),
        ({"memory.update_by": "ema", "train.batching": "grad_cache"}, "grad_cache"),
        ({"memory.update_by": "ema", "memory.renormalise": True}, "memory.renormalise = True"),
    ],
)
def test_contradictions_are_named(changes, message):
    config = default_config()
    config.update_from_flattened_dict(changes)
    with pytest.raises(ValueError, match=message):
        validate(config)


def test_presets_and_data_are_checked():
    for preset in (FAITHFUL, PAPER_HPARAMS):
        config = default_config()
        config.update_from_flattened_dict({k: v for k, v in preset.items()})
        validate(config)
    with pytest.raises(ValueError, match="width 7, but data.feat_dim = 6"):
        get_method("momkd")(setup.small_config(), DataSpec(7, 2, setup.GENES))
    method = make_method(setup.small_config(), DataSpec(setup.FEAT, 3, setup.GENES))
    params, extra = setup.init(method)
    with pytest.raises(ValueError, match="has 3: choose a task of two classes"):
        method.forward(params, {}, extra, setup.batch(), None, False)
