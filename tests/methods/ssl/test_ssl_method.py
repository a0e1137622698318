"""The method: contract, frozen networks, one step on 1 and 8 devices, bad input, health under training."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import ssl_setup as setup

from histokd_jax.methods.ssl import config as settings
from histokd_jax.methods.ssl import method as ssl
from histokd_jax.nn.encoders import build
from histokd_jax.train import gradients, optim, sharding, state, step
from histokd_jax.types import DataSpec


def train(run, params, extra, data, steps=1, lr=1e-2, **options):
    """(parameters, extra) after some steps of Adam."""
    stage = run.stages[0]
    tx = optim.make_optimizer(
        weight_decay=0.0, decay_bias=True, trainable=stage.trainable, groups=tuple(params), eps=1e-7, **options
    )
    names = step.metric_names(run, stage.name, params, extra, data)
    current = state.start_stage(params, extra, jax.random.key(1), tx, names)
    move = jax.jit(step.make_train_step(run, tx, stage.name))
    for _ in range(steps):
        current, _ = move(current, data, jnp.float32(lr))
    return current


def same(a, b):
    return [bool(np.array_equal(x, y)) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)]


def test_the_contract_of_every_layout():
    for name in settings.LAYOUTS:
        run = setup.method(layout__name=name)
        mode = run.mode("views")
        assert run.stages[0].trainable == mode.params and run.batch_coupled
        assert ("has_partner" in mode.fields) == (name != "unprivileged")
        assert ("image" in mode.fields) == (name != "privileged_only") and set(run.requires) == set(mode.fields)


def test_F3_4_a_frozen_network_is_bit_identical_after_a_step():
    data = setup.batch()
    run = setup.method(train_flags__frozen=("encoder_1", "projector_0"))
    params, extra = setup.init(run)
    after = train(run, params, extra, data)
    for group in params:
        frozen = group in ("encoder_1", "projector_0")
        assert all(same(params[group], after.params[group])) == frozen, group
        assert all(same(extra[group], after.extra[group])) == frozen, group


def test_deviation_20_flags_as_released_only_hold_the_batch_norms():
    run = setup.method(train_flags__frozen=("encoder_1",), train_flags__mode="bn_eval_only")
    params, extra = setup.init(run)
    after = train(run, params, extra, setup.batch())
    assert all(same(extra["encoder_1"], after.extra["encoder_1"]))
    assert not all(same(params["encoder_1"], after.params["encoder_1"]))


@pytest.mark.parametrize("scope", ["global", "per_device"])
def test_F2_6_a_training_step_on_eight_devices_equals_that_on_one(scope):
    """Augmentation, batch norms with absent partners, projectors and loss see the whole step, however it is divided.

    With statistics per device the parts are those of the configuration, so that they do not move with the mesh either.
    """
    cfg = setup.config(bn__scope=scope, loss__scope=scope)
    cfg.mesh = {"data": 4}
    run = ssl.make_method(cfg, setup.data_spec())
    data = setup.batch(16, missing=(1, 6, 12))
    params, extra = setup.init(run)

    def loss(params, extra, data):
        outputs, new = run.forward(params, {}, extra, data, jax.random.key(5), True)
        return run.objective(outputs, data, 0, "pretrain")[0], new

    move = jax.jit(jax.value_and_grad(loss, has_aux=True))
    (expected, stats), grads = move(params, extra, data)
    mesh = sharding.make_mesh(8)
    with jax.set_mesh(mesh):
        placed = jax.device_put((params, extra), sharding.replicated(mesh))
        (found, new), other = move(*placed, sharding.put_examples(mesh, data))
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    for a, b in zip(jax.tree.leaves(new), jax.tree.leaves(stats), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    # By the largest gradient of a network: those of biases in front of a batch norm are rounding of zero.
    for group, own in grads.items():
        largest = max(float(jnp.abs(g).max()) for g in jax.tree.leaves(own))
        for a, b in zip(jax.tree.leaves(other[group]), jax.tree.leaves(own), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-3, atol=2e-5 * largest)


def test_F2_9_sum_with_clip_1_and_mean_with_clip_1_over_B_give_one_direction():
    data, results = setup.batch(), {}
    for reduction, limit in (("sum", 1.0), ("mean", 1.0 / setup.B)):
        run = setup.method(loss__reduction=reduction)
        params, extra = setup.init(run)
        _, grads = setup.loss_and_gradients(run, params, extra, data)
        results[reduction] = gradients.clipped(grads, limit)
    for a, b in zip(*(jax.tree.leaves(results[name]) for name in ("sum", "mean"))):
        np.testing.assert_allclose(a, setup.B * b, rtol=1e-4, atol=1e-7)


def test_absent_partners_give_the_images_gradients_and_are_counted():
    run, data = setup.method(), setup.batch(missing=(0, 3))
    params, extra = setup.init(run)
    (loss, (metrics, _)), grads = setup.loss_and_gradients(run, params, extra, data)
    assert np.isfinite(loss) and metrics["partners"] == (6.0, 8.0)
    other = dict(data, partner=data["partner"].copy())
    other["partner"][[0, 3]] = 255
    (again, _), same_grads = setup.loss_and_gradients(run, params, extra, other)
    np.testing.assert_allclose(again, loss, rtol=1e-6)
    for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(same_grads)):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * max(np.abs(b).max(), 1e-3))


def test_evaluation_ignores_fillers_and_leaves_batch_norms_alone():
    run, data = setup.method(), setup.batch()
    params, extra = setup.init(run)
    predict = jax.jit(lambda d: run.predict(params, {}, extra, d, "views"))
    cut = {k: v[:6] for k, v in data.items()}
    padded = {k: np.concatenate([v, v[:2]]) for k, v in cut.items()}
    padded["weight"] = np.r_[np.ones(6), np.zeros(2)].astype(np.float32)
    whole, filled = predict(cut), predict(padded)
    np.testing.assert_allclose(filled["loss"][:6], whole["loss"], rtol=1e-5)
    assert filled["together"].tolist() == [6.0] * 8 and not np.any(filled["loss"][6:])
    with pytest.raises(ValueError, match="mode 'image' is not available"):
        run.predict(params, {}, extra, data, "image")


def test_the_primary_encoder_alone_gives_the_representation():
    """Inference needs neither the privileged view nor any other network: the encoder's own arrays, on plain images."""
    for kind in ("resnet", "vit"):
        vit = {"encoder__patch": 8, "encoder__token_width": 16, "encoder__depth": 1, "encoder__heads": 2}
        changes = {"encoder__kind": kind, "augment__validation": "plain", **vit}
        run, data = setup.method(**changes), setup.batch()
        params, extra = setup.init(run)
        own = ssl.image_encoders(setup.config(**changes), setup.data_spec())["encoder_0"]
        variables = {"params": params["encoder_0"]}
        variables |= {"batch_stats": extra["encoder_0"]} if "encoder_0" in extra else {}
        alone = build.build(own.spec).apply(variables, data["image"].astype(np.float32))
        found = run.predict(params, {}, extra, data, "views")["embedding"]
        np.testing.assert_allclose(found, alone, rtol=1e-4, atol=1e-4)
        assert own.export == "encoder" and (own.scale, own.mean) == (1.0, (0.0, 0.0, 0.0))


def test_which_encoders_are_written():
    def folders(vector=0, **changes):
        found = ssl.image_encoders(setup.config(**changes), setup.data_spec(vector))
        return {group: encoder.export for group, encoder in found.items()}

    assert folders() == {"encoder_0": "encoder", "encoder_1": ""}
    assert folders(export__privileged=True) == {"encoder_0": "encoder", "encoder_1": "encoder_privileged"}
    assert folders(layout__name="privileged_only") == {"encoder_1": "encoder_privileged"}
    assert folders(vector=5) == {"encoder_0": "encoder"}
    assert folders(layout__share_primary=False) == {"encoder_0": "encoder", "encoder_1": "", "encoder_2": ""}


FORMS = {
    "barlow": {"loss__name": "barlow"},
    "infonce": {"loss__name": "infonce"},
    "original": {"loss__assembly": "pairwise_original", "loss__ddof": 1},
    "split": {"loss__split_dims": (8, 4)},
    "split_infonce": {"loss__split_dims": (8, 4), "loss__name": "infonce"},
    "two_views_of_the_partner": {"layout__name": "privileged_only"},
    "own_networks": {"layout__share_primary": False},
    "no_projector": {"projector__widths": ()},
    "shuffled": {"privileged__source": "shuffled"},
    "bfloat16": {"train__compute_dtype": "bfloat16"},
    "released_augmentation": {"augment__preset": "a4"},
    "corrected_augmentation": {
        "augment__preset": "a4",
        "augment__shared_geometry": True,
        "augment__privileged": "geometric_only",
        "augment__noise": "after_rotation",
    },
    "transformer": {
        "encoder__kind": "vit",
        "encoder__patch": 8,
        "encoder__token_width": 16,
        "encoder__depth": 1,
        "encoder__heads": 2,
    },
}


@pytest.mark.parametrize("vector", [0, 9])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_can_be_traced(form, vector):
    """Shapes alone: nothing is compiled."""
    run, data = setup.method(vector=vector, **FORMS[form]), setup.batch(vector=vector)
    params, extra = jax.eval_shape(run.init, jax.random.key(0))

    def loss(params, extra, data):
        outputs, new = run.forward(params, {}, extra, data, jax.random.key(5), True)
        value, metrics = run.objective(outputs, data, 0, "pretrain")
        return value, (metrics, new)

    (value, (metrics, new)), grads = jax.eval_shape(jax.value_and_grad(loss, has_aux=True), params, extra, data)
    assert value.shape == () and value.dtype == jnp.float32
    assert jax.tree.map(lambda x: x.shape, grads) == jax.tree.map(lambda x: x.shape, params)
    assert jax.tree.structure(new) == jax.tree.structure(extra)
    found = jax.eval_shape(lambda p, e, d: run.predict(p, {}, e, d, "views"), params, extra, data)
    assert found["loss"].shape == found["together"].shape == (setup.B,)


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_every_form_moves_every_network(form):
    run, data = setup.method(**FORMS[form]), setup.batch(missing=(2,))
    params, extra = setup.init(run)
    (loss, _), grads = setup.loss_and_gradients(run, params, extra, data)
    assert np.isfinite(loss)
    for group, tree in grads.items():
        assert all(np.isfinite(g).all() for g in jax.tree.leaves(tree)) and any(
            np.any(g) for g in jax.tree.leaves(tree)
        )
        del group


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"train__b": 1}, "train.b = 1 is not possible; expected at least 2"),
        ({"train__drop_last": False}, "train.drop_last"),
        ({"loss__name": "byol"}, "loss.name = 'byol' is not possible"),
        ({"loss__split_dims": (7, 4)}, r"\(7, 4\) sum to 11, the embedding is 12 wide .* cannot be divided so"),
        ({"loss__split_dims": (12,)}, "has 2 branches beside the first"),
        ({"loss__split_dims": (6, 6), "loss__name": "barlow"}, "section C5"),
        ({"loss__name": "barlow", "loss__barlow_branches": "two_only"}, "released form for two branches"),
        ({"layout__name": "unprivileged", "privileged__source": "blank"}, "has no privileged view"),
        ({"train_flags__frozen": ("encoder_7",)}, "train_flags.frozen"),
        ({"projector__widths": (), "encoder__kind": "resnet", "privileged_encoder__widths": (5,)}, "not be compared"),
        ({"privileged_encoder__kind": "resnet"}, "does not read vectors of 6 numbers"),
        ({"layout__encoders": (0, 0, 0)}, "cannot read images and vectors"),
        ({"layout__projectors": (0, 0, 0), "privileged_encoder__widths": (5,)}, "projectors of their own"),
    ],
)
def test_contradictory_settings_are_refused_by_name(changes, match):
    with pytest.raises(ValueError, match=match):
        setup.method(vector=6, **changes)


def test_bad_input_data_that_are_no_square_image_pairs():
    with pytest.raises(ValueError, match="set data.kind=pairs"):
        ssl.make_method(setup.config(), DataSpec(feat_dim=8, num_classes=0))
    with pytest.raises(ValueError, match="16 x 24 pixels.*--resize 16x16"):
        ssl.make_method(setup.config(), DataSpec(0, 0, task="representation", image_size=(16, 24)))
    with pytest.raises(ValueError, match="cannot be cut into patches of 16|multiple|divides image"):
        ssl.make_method(setup.config(encoder__kind="vit"), setup.data_spec(side=24))


@pytest.mark.slow
def test_F4_4_vicreg_keeps_the_embedding_spread_and_without_its_variance_term_it_collapses():
    stds = {}
    for variance in (25.0, 0.0):
        run = setup.method(loss__variance=variance, loss__covariance=1.0 if variance else 0.0)
        params, extra = setup.init(run)
        data = setup.batch(16)
        after = train(run, params, extra, data, steps=80, lr=3e-3, clip_per_tensor=1.0)
        outputs, _ = setup.forward(run, after.params, after.extra, data)
        stds[variance] = float(np.mean([np.std(outputs[f"z_{k}"], axis=0).mean() for k in range(3)]))
    assert stds[25.0] > 0.5 > 2 * stds[0.0]
