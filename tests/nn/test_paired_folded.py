"""Folded networks: equal to those written out, with the same parameters, and much smaller programs."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import paired_setup as setup
import pytest

from histokd_jax.nn.paired.networks import Student, Teacher

DEEP = {"teacher_depths": (2, 0, 0, 2), "student_depths": (2, 0, 0, 2)}


def tiles(model, dtype=None):
    return [
        setup.last(setup.tile(s, 3)).astype(dtype or jnp.float64) for s in (21, 22)[: 2 if model == "teacher" else 1]
    ]


@pytest.mark.parametrize(("model", "train"), [("teacher", True), ("student", True), ("teacher", False)])
def test_outputs_and_running_statistics_are_those_of_the_network_written_out(model, train):
    spec = setup.tiny(**DEEP)
    with jax.enable_x64(True):
        variables = setup.variables(setup.tiny_state(model, spec), model, spec)
        found = []
        for folded in (True, False):
            network = setup.NETWORKS[model](dataclasses.replace(spec, folded=folded))
            run = setup.training if train else lambda n, *a: (setup.once(n.apply, *a), {})
            found.append(run(network, variables, *tiles(model)))
        assert jax.tree.structure(found[0]) == jax.tree.structure(found[1])
        for (path, ours), theirs in zip(jax.tree_util.tree_leaves_with_path(found[0]), jax.tree.leaves(found[1])):
            np.testing.assert_allclose(ours, theirs, rtol=1e-8, atol=1e-10, err_msg=jax.tree_util.keystr(path))


def test_initialisation_gives_the_same_tree_either_way():
    spec = setup.tiny(**DEEP)
    shapes = [
        jax.eval_shape(Student(dataclasses.replace(spec, folded=f)).init, jax.random.key(0), jnp.zeros((2, 16, 16, 3)))
        for f in (True, False)
    ]
    assert jax.tree.structure(shapes[0]) == jax.tree.structure(shapes[1])


def equations(value):
    """Equations of a program, the bodies of loops counted once."""
    if hasattr(value, "eqns"):
        return sum(1 + sum(map(equations, eqn.params.values())) for eqn in value.eqns)
    if hasattr(value, "jaxpr"):
        return equations(value.jaxpr)
    return sum(map(equations, value)) if isinstance(value, (tuple, list)) else 0


def test_a_training_step_of_the_teacher_is_less_than_half_as_long():
    counts = []
    for folded in (True, False):
        network = Teacher(setup.tiny(teacher_depths=(3, 0, 0, 0), folded=folded))
        variables = jax.eval_shape(network.init, jax.random.key(0), *tiles("teacher", jnp.float32))

        def loss(params, stats, a, b, network=network):
            found, _ = network.apply({"params": params, "batch_stats": stats}, a, b, True, mutable=["batch_stats"])
            return jnp.sum(found["logits"])

        given = variables["params"], variables["batch_stats"], *tiles("teacher", jnp.float32)
        counts.append(equations(jax.make_jaxpr(jax.grad(loss))(*given)))
    assert counts[0] < 0.5 * counts[1], counts
