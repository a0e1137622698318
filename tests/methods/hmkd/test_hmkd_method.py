"""HM-KD as a method: stages, frozen teacher, masks, modes, cached teacher (checks M8, L2, L4, L5 and T4)."""

import functools

import hmkd_setup as setup
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from histokd_jax.methods.hmkd import cache, images
from histokd_jax.methods.hmkd.method import CONTROL, FAITHFUL, HE, HE_IHC, make_run
from histokd_jax.methods.hmkd.objective import ObjectiveSpec, objective
from histokd_jax.types import DataSpec

KEY = jax.random.key(7)


@functools.cache
def start(**changes):
    run = setup.method(**changes)
    params, extra = setup.init(run)
    return run, setup.warmed(params), extra


def same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_two_stages_two_modes_and_what_they_need():
    run, params, extra = start()
    assert [(s.name, s.trainable, s.monitor_modes) for s in run.stages] == [
        ("teacher", ("teacher",), (HE_IHC,)),
        ("student", ("student",), (HE,)),
    ]
    assert run.mode(HE).fields == ("image", "weight") and run.mode(HE).params == ("student",)
    assert run.mode(HE_IHC).fields == ("image", "partner", "weight")
    assert set(params) == set(extra) == {"student", "teacher"}
    alone = setup.method(**{key.replace(".", "__"): value for key, value in CONTROL.items()})
    assert [s.name for s in alone.stages] == ["student"] and "partner" not in alone.requires
    teacher = setup.method(distill__schedule="teacher_only")
    assert [s.name for s in teacher.stages] == ["teacher"] and [m.name for m in teacher.modes] == [HE_IHC]
    given = setup.method(distill__teacher="somewhere")
    assert [s.name for s in given.stages] == ["student"] and "partner" in given.requires


def test_the_student_starts_alike_with_and_without_a_teacher():
    alone = setup.method(**{key.replace(".", "__"): value for key, value in CONTROL.items()})
    same(setup.init(alone)[0]["student"], setup.init(setup.method())[0]["student"])


def test_L5_the_second_stage_gives_the_teacher_no_gradient_and_leaves_its_statistics():
    run, params, extra = start()
    (_, (metrics, new)), found = setup.gradients(run, "student", params, extra, setup.batch(), KEY)
    assert setup.norm(found["teacher"]) == 0.0 and setup.norm(found["student"]) > 0
    same(new["teacher"], extra["teacher"])
    moved = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), new["student"], extra["student"])
    assert min(jax.tree.leaves(moved)) > 0
    assert {"ce", "kl", "at_0", "at_1", "at_2", "cos", "acc_student"} <= set(metrics)


def test_L4_the_loss_is_the_plain_sum_of_its_terms_at_the_default_weights():
    run, params, extra = start()
    (loss, (metrics, _)), _ = setup.gradients(run, "student", params, extra, setup.batch(), KEY)
    terms = [float(metrics[name][0]) for name in ("ce", "kl", "at_0", "at_1", "at_2", "cos")]
    np.testing.assert_allclose(float(loss), sum(terms), rtol=1e-6)
    assert all(term > 0 for term in terms)


def test_the_first_stage_moves_the_teacher_alone():
    run, params, extra = start()
    (loss, (metrics, new)), found = setup.gradients(run, "teacher", params, extra, setup.batch(), KEY)
    assert setup.norm(found["student"]) == 0.0 and setup.norm(found["teacher"]) > 0
    same(new["student"], extra["student"])
    np.testing.assert_allclose(float(loss), float(metrics["ce"][0]))


def test_a_frozen_teacher_as_an_argument_equals_one_among_the_parameters():
    run, params, extra = start()
    (expected, _), _ = setup.gradients(run, "student", params, extra, setup.batch(), KEY)
    frozen = {"teacher": {"params": params["teacher"], "batch_stats": extra["teacher"]}}
    given = setup.method(distill__teacher="somewhere")
    own = {"student": params["student"]}, {"student": extra["student"]}
    (loss, (_, new)), _ = setup.gradients(given, "student", *own, setup.batch(), KEY, frozen)
    np.testing.assert_allclose(float(loss), float(expected), rtol=1e-6)
    assert set(new) == {"student"}
    with pytest.raises(ValueError, match="'teacher' are needed but absent"):
        given.forward(*own[:1], {}, own[1], setup.batch(), KEY, True)


@pytest.mark.parametrize(
    "mode", ["paired", *(pytest.param(mode, marks=pytest.mark.long) for mode in ("independent", "none"))]
)
def test_a_student_of_cached_outputs_equals_one_beside_its_teacher(mode):
    cfg = setup.config(data__flip_mode=mode)
    run = make_run(cfg, DataSpec(feat_dim=0, num_classes=setup.CLASSES))
    _, params, extra = start()
    data = setup.batch(6)
    variables = {"params": params["teacher"], "batch_stats": extra["teacher"]}
    ask = jax.jit(cache.variant_outputs(run.networks["teacher"], mode, run.objective_spec.teacher_outputs()))
    halves = [{k: v[rows] for k, v in data.items()} for rows in (slice(0, 4), slice(2, 6))]
    table = cache.fill_table(lambda image, partner: ask(variables, image, partner), halves, 6)
    frozen = {"teacher_outputs": jax.tree.map(jnp.asarray, table)}
    beside = setup.forward(run, params, {}, extra, data, KEY, True)
    own = {"student": params["student"]}, frozen, {"student": extra["student"]}
    cached = setup.forward(run, *own, data, KEY, True)
    assert beside.keys() == cached.keys()
    for name, value in beside.items():
        np.testing.assert_allclose(cached[name], value, rtol=1e-4, atol=1e-6, err_msg=name)


def test_a_table_of_examples_without_partners_is_refused():
    data = setup.batch(2) | {"has_partner": np.zeros(2, bool)}
    with pytest.raises(ValueError, match="no example of the data set has a partner"):
        cache.fill_table(lambda image, partner: {"f3": np.ones((2, 1, 3))}, [data], 2)


def outputs(n=4, seed=0):
    rng = np.random.default_rng(seed)
    found = {}
    for group in ("student", "teacher"):
        found[f"{group}_logits"] = rng.normal(size=(n, 4))
        found[f"{group}_f3"] = rng.normal(size=(n, 6))
        found |= {f"{group}_map_a{i}": rng.normal(size=(n, 3, 3)) for i in range(3)}
    return found


def answers(n=4, **changes):
    return {k: v for k, v in setup.batch(n).items() if k not in ("image", "partner")} | changes


def terms(found, data, spec=ObjectiveSpec()):  # noqa: B008
    return {k: float(v[0]) for k, v in objective(spec, found, data)[1].items()}


def test_labels_mask_the_cross_entropy_and_partners_the_distillation():
    """Examples without a grade still distil; examples without a partner still learn their grade."""
    with jax.enable_x64(True):
        found = outputs()
        no_label, no_partner = np.array([True, True, False, False]), np.array([True, False, True, False])
        masked = terms(found, answers(has_label=no_label, has_partner=no_partner))
        ce = terms(jax.tree.map(lambda x: x[:2], found), answers(2))["ce"]
        taught = terms(jax.tree.map(lambda x: x[::2], found), answers(2))
        np.testing.assert_allclose(masked["ce"], ce, rtol=1e-12)
        for name in ("kl", "at_0", "at_1", "at_2", "cos"):
            np.testing.assert_allclose(masked[name], taught[name], rtol=1e-12, err_msg=name)


def test_fillers_count_nowhere_and_may_hold_anything():
    found, data = outputs(6), answers(6)
    real = {k: v[:4] for k, v in data.items()}
    expected = terms(jax.tree.map(lambda x: x[:4], found), real)
    data["weight"][4:] = 0.0
    for value in found.values():
        value[4:] = np.nan
    got = terms(found, data)
    for name, value in expected.items():
        np.testing.assert_allclose(got[name], value, rtol=1e-6, err_msg=name)


def test_L2_repeating_the_batch_doubles_the_cosine_term_alone():
    found, data = outputs(), answers()
    twice = terms(jax.tree.map(lambda x: np.concatenate([x, x]), (found)), {k: np.tile(v, 2) for k, v in data.items()})
    once = terms(found, data)
    np.testing.assert_allclose(twice["cos"], 2 * once["cos"], rtol=1e-6)
    for name in ("ce", "kl", "at_0", "at_1", "at_2"):
        np.testing.assert_allclose(twice[name], once[name], rtol=1e-6)
    mean = ObjectiveSpec(cos_reduction="mean")
    np.testing.assert_allclose(terms(found, data, mean)["cos"], once["cos"] / 4, rtol=1e-6)


def test_forms_of_the_terms_are_options():
    found, data = outputs(), answers()
    found |= {f"teacher_map_b{i}": found[f"teacher_map_a{i}"][::-1] for i in range(3)}
    found |= {f"{group}_feat": found[f"{group}_f3"] + 1.0 for group in ("student", "teacher")}
    a, b, both = (terms(found, data, ObjectiveSpec(at_maps=maps))["at_1"] for maps in (("a",), ("b",), ("a", "b")))
    np.testing.assert_allclose(both, a + b, rtol=1e-6)
    f3, feat = (terms(found, data, ObjectiveSpec(cos_feature=name))["cos"] for name in ("f3", "feat"))
    assert f3 != feat
    assert "kl" not in terms(found, data, ObjectiveSpec(kd_weight=0.0))
    assert set(ObjectiveSpec(kd_weight=0, at_weight=0).teacher_outputs()) == {"f3"}


def test_balanced_classes_give_the_weighted_mean():
    found, data = outputs(), answers(label=np.array([0, 0, 1, 3], np.int32))
    spec = ObjectiveSpec(class_weights=(1.0, 2.0, 3.0, 4.0))
    z = found["student_logits"]
    each = np.log(np.exp(z).sum(-1)) - z[np.arange(4), data["label"]]
    weight = np.array(spec.class_weights)[data["label"]]
    np.testing.assert_allclose(terms(found, data, spec)["ce"], (weight * each).sum() / weight.sum(), rtol=1e-5)
    with pytest.raises(ValueError, match="names 2 classes, the networks have 4"):
        terms(found, data, ObjectiveSpec(class_weights=(1.0, 2.0)))


def test_M8_inference_of_the_student_never_reads_ihc():
    run, params, extra = start()
    data = setup.batch()
    own = {"student": params["student"]}, {"student": extra["student"]}
    alone = setup.predict(run, *own, {name: data[name] for name in run.mode(HE).fields}, HE)
    garbage = setup.predict(run, *own, data | {"partner": np.full_like(data["partner"], 255)}, HE)
    same(alone, garbage)
    np.testing.assert_allclose(np.asarray(alone["prob"]).sum(-1), 1.0, rtol=1e-6)
    both = setup.predict(run, params, extra, data, HE_IHC)
    assert both["prob"].shape == (4, 4) and both["embedding"].shape == (4, 64)
    with pytest.raises(ValueError, match=r"no \['partner'\]"):
        run.predict(params, {}, extra, {name: data[name] for name in run.mode(HE).fields}, HE_IHC)
    with pytest.raises(ValueError, match="mode 'pathology' is not available"):
        run.predict(params, {}, extra, data, "pathology")


@pytest.mark.parametrize("mode", [HE, pytest.param(HE_IHC, marks=pytest.mark.long)])
def test_attention_is_a_distribution_over_the_finest_grid(mode):
    run, params, extra = start()
    found = setup.predict(run, params, extra, setup.batch(), mode, "attention")
    assert found.shape == (4, 8, 8) and float(found.min()) >= 0
    np.testing.assert_allclose(np.asarray(found).sum((1, 2)), 1.0, rtol=1e-5)


def test_augmentation_is_seeded_and_inference_has_none():
    run, params, extra = start()
    data = setup.batch()
    first, again, other = (
        setup.forward(run, params, {}, extra, data, key, True) for key in (KEY, KEY, jax.random.key(8))
    )
    same(first, again)
    assert np.abs(other["student_f3"] - first["student_f3"]).max() > 1e-4
    quiet = setup.forward(run, params, {}, extra, data)
    shown = setup.predict(run, params, extra, data, HE)
    np.testing.assert_allclose(quiet["student_logits"], shown["logits"], atol=1e-5)


@pytest.mark.long
def test_constant_loss_scaling_of_half_precision_changes_no_gradient_but_by_rounding():
    run, params, extra = start()
    (_, _), exact = setup.gradients(run, "student", params, extra, setup.batch(), KEY)
    low = setup.method(train__compute_dtype="float16", loss__scale=1024.0)
    (loss, _), found = setup.gradients(low, "student", params, extra, setup.batch(), KEY)
    assert np.isfinite(float(loss))
    ratio = setup.norm(found["student"]) / setup.norm(exact["student"])
    assert 0.8 < ratio < 1.25


@pytest.mark.long
def test_a_preset_of_augmentations_stands_in_the_place_of_the_flips():
    run = setup.method(data__augment="stain_jitter")
    _, params, extra = start()
    data = setup.batch()
    first = setup.forward(run, params, {}, extra, data, KEY, True)
    flips = setup.forward(start()[0], params, {}, extra, data, KEY, True)
    assert all(np.isfinite(v).all() for v in first.values())
    assert np.abs(first["student_f3"] - flips["student_f3"]).max() > 1e-4
    with pytest.raises(ValueError, match="knows all pairs of flips"):
        setup.method(data__augment="stain_jitter", distill__schedule="cached", distill__teacher="somewhere")


def test_images_that_are_too_small_are_refused_before_anything_is_compiled():
    with pytest.raises(ValueError, match="sides must be at least 256"):
        setup.hmkd.make_method(setup.hmkd.default_config(), DataSpec(0, 4, image_size=(224, 224)))


def test_a_teacher_of_other_widths_is_named():
    run, params, extra = start()
    wide = setup.method(model__widths=(32, 40, 48, 96))
    theirs, stats = jax.eval_shape(wide.init, jax.random.key(0))
    frozen = {"teacher": {"params": theirs["teacher"], "batch_stats": stats["teacher"]}}
    with pytest.raises(Exception, match="shape"):
        jax.eval_shape(lambda f: run.forward(params, f, extra, setup.batch(), KEY, True), frozen)


def test_faithful_values_are_the_defaults():
    from histokd_jax.utils.config import flatten

    flat = flatten(setup.hmkd.default_config())
    assert {key: value for key, value in FAITHFUL.items() if key in flat} == {k: flat[k] for k in FAITHFUL if k in flat}


def _noisy_pairs(side):
    """32 pairs: one texture per grade, added to fresh noise (T4)."""
    rng = np.random.default_rng(0)
    texture, grade = rng.normal(size=(4, side, side, 3)), np.arange(32) % 4

    def stain(amplitude):
        return rng.normal(size=(32, side, side, 3)) + amplitude * texture[grade]

    return stain(0.3).astype(np.float32), stain(0.6).astype(np.float32), grade.astype(np.int32)


@pytest.mark.long
@pytest.mark.parametrize("stage", ["teacher", "student"])
def test_T4_either_stage_overfits_synthetic_pairs(stage, monkeypatch):
    """On tiny networks and images; rate 1e-2, because they see less of each texture."""
    monkeypatch.setattr(images, "standardise", lambda x: x)
    monkeypatch.setattr(images, "check_images", lambda x: None)
    he, ihc, label = _noisy_pairs(setup.SIDE)
    run = setup.method(data__flip_mode="none", train__b=16)
    params, extra = setup.init(run)
    trace = jax.tree.map(jnp.zeros_like, params)

    @jax.jit
    def step(params, extra, trace, data):
        def loss(params):
            out, new = run.forward(params, {}, extra, data, KEY, True, stage=stage)
            return run.objective(out, data, 0, stage)[0], new

        (value, new), grads = jax.value_and_grad(loss, has_aux=True)(params)
        trace = jax.tree.map(lambda t, g, p: 0.9 * t + g + 5e-4 * p, trace, grads, params)
        return jax.tree.map(lambda p, t: p - 1e-2 * t, params, trace), new, trace, value

    data = answers(32) | {"image": he, "partner": ihc, "label": label}
    rng = np.random.default_rng(1)
    for _ in range(150):
        rows = rng.permutation(32)[:16]
        params, extra, trace, value = step(params, extra, trace, {k: v[rows] for k, v in data.items()})
    mode = {"teacher": HE_IHC, "student": HE}[stage]
    found = setup.predict(run, params, extra, data, mode)["prob"].argmax(-1)
    assert (np.asarray(found) == label).mean() == 1.0, float(value)
