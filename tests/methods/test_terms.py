"""Composition of named terms: settings, schedules, connectors, online and offline teachers, weight plumbing."""

import jax
import jax.numpy as jnp
import loss_arrays as la
import ml_collections
import numpy as np
import optax
import pytest

from histokd_jax import losses
from histokd_jax.losses import catalogue
from histokd_jax.methods import terms as compositions

B, WIDE, NARROW, CLASSES = 8, 6, 4, 3
STUDENT = {"embedding": (NARROW,), "logits": (CLASSES,), "maps": (NARROW, 3, 3), "upper": (NARROW, 2, 2)}
TEACHER = {"embedding": (WIDE,), "logits": (CLASSES,), "maps": (WIDE, 3, 3), "upper": (WIDE, 2, 2)}
LABEL = jnp.arange(B) % CLASSES


def views(shapes, seed):
    rng = np.random.default_rng(seed)
    found = {name: jnp.asarray(rng.normal(size=(B, *shape)), jnp.float32) for name, shape in shapes.items()}
    return {**found, "embedding_margin": -jnp.ones(WIDE)}


def evaluate(given, *, student=None, teacher=None, online=False, step=0, where=None, params=None, head=None):
    terms = compositions.parse_terms(given, online=online)
    s, t = views(STUDENT, 0) if student is None else student, views(TEACHER, 1) if teacher is None else teacher
    if params is None:
        params = compositions.init_connectors(jax.random.key(0), terms, STUDENT, TEACHER)
    links = compositions.connect(terms, params, s, t, online=online, head=head)
    found, _ = compositions.values(terms, links, label=LABEL, where=where)
    return compositions.total(terms, found, step)


def test_the_total_is_the_weighted_sum_of_catalogue_losses():
    value, log = evaluate({"kd": 0.9, "sp": 3000, "dkd": 0.5})
    s, t = views(STUDENT, 0), views(TEACHER, 1)
    kd = jnp.mean(losses.kd_loss(s["logits"], t["logits"]))
    sp = losses.sp_loss(s["embedding"], t["embedding"])
    dkd = jnp.mean(losses.dkd_loss(s["logits"], t["logits"], LABEL))
    np.testing.assert_allclose(value, 0.9 * kd + 3000 * sp + 0.5 * dkd, rtol=1e-6)
    np.testing.assert_allclose([log["kd"], log["weighted_sp"]], [kd, 3000 * sp], rtol=1e-6)


def test_check_14_weight_plumbing():
    _, one = evaluate({"kd": 1.0, "sp": 2.0})
    _, other = evaluate({"kd": 3.0, "sp": 2.0})
    np.testing.assert_allclose(other["weighted_kd"], 3 * one["weighted_kd"], rtol=1e-6)
    assert other["kd"] == one["kd"] and other["weighted_sp"] == one["weighted_sp"]
    _, without = evaluate({"kd": 1.0, "rkd": 0.0})
    assert set(without) == {"kd", "weighted_kd"}, "weight 0 removes the compute"
    traced = compositions.with_weights(compositions.parse_terms({"kd": 1.0}), {"kd": jnp.asarray(0.25)})
    np.testing.assert_allclose(compositions.total(traced, {"kd": jnp.asarray(8.0)})[0], 2.0)
    with pytest.raises(ValueError, match="weights of ..sp.. are given"):
        compositions.with_weights(traced, {"sp": jnp.ones(())})


EVERY = {name: e for name, e in catalogue.CATALOGUE.items() if catalogue.MEMORY not in e.needs}


def complete(name):
    """Settings under which a term compares the views of this file."""
    entry = catalogue.CATALOGUE[name]
    given = {"weight": 1.0}
    if entry.same_width and entry.reads != catalogue.LOGITS:
        given["connector"] = "mlp" if name == "vid" else "linear"
    if entry.reads == catalogue.MAP:
        given["layers"] = "maps>maps"
    if entry.reads == catalogue.MAP_PAIR:
        given |= {"layers": ("maps+upper>maps+upper",)}
    return given


def head(vectors):
    return jnp.tanh(vectors[:, :CLASSES])


@pytest.mark.parametrize("name", la.quick(set(EVERY) - {"dml", "kdcl", "fsp"}, la.QUICK | {"srrl"}))
def test_check_3_no_gradient_reaches_a_constant_teacher_and_every_term_trains_the_student(name):
    s, t = views(STUDENT, 0), views(TEACHER, 1)
    goal = jax.grad(
        lambda a, b: evaluate({name: complete(name)}, student=a, teacher=b, head=head)[0], (0, 1), allow_int=True
    )
    own, other = goal(s, t)
    assert all(not np.any(leaf) for leaf in jax.tree.leaves(other))
    assert any(np.any(leaf) for leaf in jax.tree.leaves(own))


def test_fsp_compares_pairs_of_maps_of_equal_channels():
    given = {"fsp": {"weight": 1.0, "layers": "maps+upper"}}
    s = views(STUDENT, 0)
    terms = compositions.parse_terms(given)
    links = compositions.connect(terms, {}, s, views(STUDENT, 1))
    found, _ = compositions.values(terms, links)
    expected = losses.fsp_loss((s["maps"], s["upper"]), tuple(views(STUDENT, 1)[name] for name in ("maps", "upper")))
    np.testing.assert_allclose(found["fsp"], jnp.mean(expected), rtol=1e-6)


@pytest.mark.parametrize("name", la.quick(["dml", "kdcl", "infonce", "vicreg", "barlow"], {"dml", "vicreg"}))
def test_online_mode_trains_the_teacher_where_the_loss_is_made_for_it(name):
    given = {name: complete(name)}
    gradient = jax.grad(lambda t: evaluate(given, teacher=t, online=True)[0])(views(TEACHER, 1))
    assert any(np.any(leaf) for leaf in jax.tree.leaves(gradient))


def test_online_mode_holds_the_teacher_constant_elsewhere_unless_asked():
    gradient = jax.grad(lambda t, g: evaluate({"sp": g}, teacher=t, online=True)[0])
    assert not np.any(gradient(views(TEACHER, 1), 1.0)["embedding"])
    assert np.any(gradient(views(TEACHER, 1), {"weight": 1.0, "teacher_gradient": True})["embedding"])


def test_masked_examples_do_not_count():
    where = jnp.arange(B) < 5
    spoiled = {k: jnp.where(where.reshape(-1, *[1] * (v.ndim - 1)), v, jnp.nan) if len(v) == B else v
               for k, v in views(TEACHER, 1).items()}  # fmt: skip
    value, _ = evaluate({"kd": 1.0, "sp": 1.0}, teacher=spoiled, where=where)
    s, t = views(STUDENT, 0), views(TEACHER, 1)
    kd = jnp.mean(losses.kd_loss(s["logits"][:5], t["logits"][:5]))
    np.testing.assert_allclose(value, kd + losses.sp_loss(s["embedding"][:5], t["embedding"][:5]), rtol=1e-5)


SCHEDULES = {
    "constant": ({}, {0: 1.0, 10**6: 1.0}),
    "linear": ({"schedule": "linear", "steps": 20}, {0: 1 / 20, 9: 0.5, 19: 1.0, 50: 1.0}),
    "late linear": ({"schedule": "linear", "steps": 10, "start": 5}, {4: 0.0, 5: 0.1, 14: 1.0}),
    "cosine": ({"schedule": "cosine", "steps": 100}, {0: 1.0, 50: 0.5, 100: 0.0, 200: 0.0}),
    "cosine to": ({"schedule": "cosine", "steps": 100, "final": 0.2}, {0: 1.0, 100: 0.2}),
    "step": ({"schedule": "step", "boundaries": (10, 20), "factor": 0.1}, {9: 1.0, 10: 0.1, 20: 0.01}),
    "gaussian": ({"schedule": "gaussian", "steps": 80}, {0: np.exp(-5.0), 80: 1.0, 99: 1.0}),
}


@pytest.mark.parametrize("kind", SCHEDULES)
def test_schedules(kind):
    settings, expected = SCHEDULES[kind]
    (term,) = compositions.parse_terms({"kd": {"weight": 2.0, **settings}})
    for step, share in expected.items():
        value, log = jax.jit(lambda at, t=term: compositions.total((t,), {"kd": jnp.ones(())}, at))(step)
        np.testing.assert_allclose([value, log["weighted_kd"]], 2.0 * share, rtol=1e-5, atol=1e-7)


def test_a_config_dict_is_read_like_a_mapping():
    given = ml_collections.ConfigDict({"kd": 0.9, "fitnet": {"connector": "linear", "layers": ("embedding",)}})
    terms = {term.name: term for term in compositions.parse_terms(given)}
    kd, fitnet = terms["kd"], terms["fitnet"]
    assert kd.weight == 0.9 and fitnet.weight == 100.0 and fitnet.layers == (("embedding", "embedding"),)


def test_several_layers_are_summed_with_the_weights_of_the_loss():
    given = {"ab": {"weight": 1.0, "layers": ("logits", "logits", "logits")}}
    one = evaluate({"ab": {"weight": 1.0, "layers": "logits"}})[0]
    np.testing.assert_allclose(evaluate(given)[0], (0.25 + 0.5 + 1.0) * one, rtol=1e-6)


def test_memory_terms_hand_on_their_state():
    given = {"crd": {"weight": 0.8, "connector": "linear", "width": 5},
             "queue_infonce": {"weight": 1.0, "connector": "linear", "width": 5}}  # fmt: skip
    terms = compositions.parse_terms(given)
    params = compositions.init_connectors(jax.random.key(0), terms, STUDENT, TEACHER)
    links = compositions.connect(terms, params, views(STUDENT, 0), views(TEACHER, 1))
    states = compositions.init_memory(jax.random.key(1), terms, 20, links)
    index = jnp.arange(B)
    contrast = losses.draw_contrast(jax.random.key(2), index, jnp.arange(20) % CLASSES, 5)
    found, after = compositions.values(terms, links, states=states, index=index, contrast=contrast)
    assert all(np.isfinite(v) for v in found.values()) and after["crd"].ready and after["queue_infonce"].filled == B
    np.testing.assert_array_equal(after["crd"].student[B:], states["crd"].student[B:])
    with pytest.raises(ValueError, match="'crd' has a memory: give its state"):
        compositions.values(terms, links)


ERRORS = {
    "unknown term": ({"kdd": 1.0}, "term 'kdd' is unknown; did you mean 'kd'.*Known terms"),
    "unknown key": ({"kd": {"wait": 1.0}}, "terms.kd has no key 'wait'"),
    "unknown option": ({"kd": {"options": {"tau": 2}}}, "'kd' has no option 'tau'"),
    "unknown schedule": ({"kd": {"schedule": "warm"}}, "terms.kd.schedule = 'warm' is unknown"),
    "no length": ({"kd": {"schedule": "linear"}}, "terms.kd.steps = 0"),
    "no boundaries": ({"kd": {"schedule": "step"}}, "terms.kd.boundaries"),
    "negative": ({"kd": -1.0}, "terms.kd.weight = -1.0"),
    "unknown connector": ({"fitnet": {"connector": "conv"}}, "terms.fitnet.connector = 'conv' is unknown"),
    "width alone": ({"fitnet": {"width": 3}}, "set terms.fitnet.connector"),
    "maps need layers": ({"at": 1.0}, "terms.at.layers is empty: at compares maps"),
    "pair form": ({"fsp": {"layers": "maps>maps"}}, r"expected LOWER\+UPPER>LOWER\+UPPER"),
    "dml offline": ({"dml": 1.0}, "trains teacher and student together: train online, or use 'kd'"),
    "gradient offline": (
        {"sp": {"weight": 1.0, "teacher_gradient": True}},
        "a frozen or cached teacher has no gradient",
    ),
}


@pytest.mark.parametrize("case", ERRORS)
def test_bad_settings_are_refused_by_name(case):
    given, message = ERRORS[case]
    with pytest.raises(ValueError, match=message):
        compositions.parse_terms(given)


WIDTHS_DIFFER = (
    r"terms.fitnet compares the student's 'embedding' \(4,\) with the teacher's 'embedding' \(6,\): "
    "the widths 4 and 6 differ; set terms.fitnet.connector = 'linear' or 'mlp'"
)


@pytest.mark.parametrize(
    "given,message",
    [
        ({"fitnet": 1.0}, WIDTHS_DIFFER),
        ({"sp": {"layers": "stage3>embedding"}}, "names the student's view 'stage3'; it has"),
        ({"at": {"layers": "embedding>embedding"}}, "at needs maps"),
        ({"kd": {"layers": "embedding>embedding"}}, "logits must be of the same classes"),
        ({"kd": {"connector": "linear"}}, "logits are compared as they are"),
    ],
)
def test_bad_input_layers_of_different_sizes_without_a_connector(given, message):
    with pytest.raises(ValueError, match=message):
        compositions.check_views(compositions.parse_terms(given), STUDENT, TEACHER)


def test_srrl_without_the_teachers_classifier_is_refused():
    with pytest.raises(ValueError, match="'srrl' needs the teacher's classifier"):
        evaluate({"srrl": {"weight": 1.0, "connector": "linear"}})


NOT_ZERO = {"hsic", "vicreg", "vicreg_original", "infonce", "infonce_pairs", "vid", "generalised", "srd"}
SMOKE = sorted(set(EVERY) - NOT_ZERO - {"fsp", "kdcl", "dml", "supervision_transfer"})


@pytest.mark.slow
@pytest.mark.parametrize("name", SMOKE)
def test_check_13_a_student_lowers_every_loss_by_half(name):
    """Terms whose minimum is not 0 are left out."""
    (term,) = compositions.parse_terms({name: complete(name)})
    t, x = views(TEACHER, 1), jax.random.normal(jax.random.key(3), (B, 5))
    keys = jax.random.split(jax.random.key(4), 5)
    student = {n: 0.5 * jax.random.normal(k, (5, int(np.prod(s)))) for (n, s), k in zip(STUDENT.items(), keys)}
    params = {"student": student, "links": compositions.init_connectors(keys[4], (term,), STUDENT, TEACHER)}

    def loss(p):
        own = {n: (x @ p["student"][n]).reshape(B, *s) for n, s in STUDENT.items()}
        links = compositions.connect((term,), p["links"], own, t, head=head)
        return compositions.values((term,), links, label=LABEL)[0][name]

    tx = optax.adam(0.03)
    state, run, first = tx.init(params), jax.jit(jax.value_and_grad(loss)), float(loss(params))
    for _ in range(400):
        _, grads = run(params)
        updates, state = tx.update(grads, state)
        params = optax.apply_updates(params, updates)
    assert float(loss(params)) < 0.5 * first
