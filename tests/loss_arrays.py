"""The closed-form arrays of the loss specifications, and random inputs for every entry of the catalogue."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from histokd_jax.losses import boundaries, catalogue, hints, memory


def array(function, shape):
    return np.vectorize(function)(np.arange(math.prod(shape), dtype=np.float64)).reshape(shape)


LS = array(lambda k: 2 * math.sin(0.7 * k + 0.1), (4, 5))
LT = array(lambda k: 3 * math.cos(0.9 * k + 0.2), (4, 5))
Y = np.array([1, 4, 0, 2], np.int32)
ES = array(lambda k: math.sin(0.5 * k + 0.3), (4, 3))
ET = array(lambda k: math.cos(0.8 * k + 0.6), (4, 3))
VT = array(lambda k: math.cos(0.4 * k + 0.1), (4, 6))
A0S = array(lambda k: math.sin(0.3 * k), (4, 3, 4, 4))
A0T = array(lambda k: math.cos(0.37 * k + 0.2), (4, 3, 4, 4))
A1S = array(lambda k: math.sin(0.23 * k + 0.5), (4, 5, 2, 2))
A1T = array(lambda k: math.cos(0.41 * k), (4, 5, 2, 2))
C3 = array(lambda k: math.sin(1.1 * k + 0.2), (4, 3))

WIDTHS = {catalogue.LOGITS: (6,), catalogue.VECTOR: (5,), catalogue.MAP: (3, 4, 4)}
STATELESS = sorted(name for name, e in catalogue.CATALOGUE.items() if catalogue.MEMORY not in e.needs)
COUPLED = sorted(name for name in STATELESS if catalogue.CATALOGUE[name].couples_batch)


QUICK = {"kd", "dist", "sp", "pkt", "vicreg", "cka", "vid", "ofd", "at", "fsp"}


def quick(names, chosen=frozenset(QUICK)):
    """Parameters of a test over losses, of which all but a few of every kind are marked slow."""
    return [name if name in chosen else pytest.param(name, marks=pytest.mark.slow) for name in sorted(names)]


def pair(name, b, seed=0, scale=1.0):
    """Random (student, teacher) of a loss, float64."""
    rng, reads = np.random.default_rng(seed), catalogue.CATALOGUE[name].reads
    if reads == catalogue.MAP_PAIR:
        return tuple(tuple(scale * rng.normal(size=(b, *s)) for s in ((3, 4, 4), (5, 2, 2))) for _ in range(2))
    return tuple(scale * rng.normal(size=(b, *WIDTHS[reads])) for _ in range(2))


def extras(name, student, b):
    """What a loss needs beside student and teacher."""
    needs = catalogue.CATALOGUE[name].needs
    if catalogue.LABEL in needs:
        return (jnp.arange(b, dtype=jnp.int32) % student.shape[-1],)
    if catalogue.RHO in needs:
        return (jnp.full(student.shape[1], hints.vid_rho()),)
    if catalogue.MARGIN in needs:
        return (boundaries.ofd_margin(jnp.ones(student.shape[1]), jnp.zeros(student.shape[1])),)
    return ()


def value(name, student, teacher, *, where=None, each=False, **options):
    """A loss with default options as one number: the mean over valid rows of per-example values, or those."""
    entry = catalogue.CATALOGUE[name]
    b = jax.tree.leaves(student)[0].shape[0]
    if catalogue.HEAD_LOGITS in entry.needs:
        more = (student[:, :3], teacher[:, :3])
    else:
        more = extras(name, student, b)
    found = entry.function(student, teacher, *more, where=where, **options)
    if each or not entry.per_example:
        return found
    n = b if where is None else jnp.sum(where)
    return jnp.sum(found) / n


def crd_inputs():
    """(state, student, teacher, index, contrast) of the two-call golden sequence."""
    w_s, b_s = array(lambda k: math.sin(0.6 * k + 0.2), (2, 3)), array(lambda k: 0.1 * math.cos(k + 0.5), (2,))
    w_t, b_t = array(lambda k: math.cos(0.35 * k + 0.4), (2, 6)), array(lambda k: 0.1 * math.sin(k + 0.1), (2,))
    m_s = array(lambda k: math.sin(0.9 * k + 0.3), (10, 2))
    m_t = array(lambda k: math.cos(0.8 * k + 0.7), (10, 2))
    one = np.ones(())
    state = memory.CrdState(jnp.asarray(m_s), jnp.asarray(m_t), jnp.asarray(one), jnp.asarray(one), jnp.asarray(False))
    index = np.array([2, 5, 7, 9], np.int32)
    contrast = np.array([[2, 0, 1, 3], [5, 4, 6, 8], [7, 0, 4, 9], [9, 1, 3, 6]], np.int32)
    return state, ES @ w_s.T + b_s, VT @ w_t.T + b_t, index, contrast
