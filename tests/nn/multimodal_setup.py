"""Small MCAT, PORPOISE MMF and SurvPath networks, their inputs, and one forward pass."""

import functools

import drawn
import jax
import numpy as np
import survival_golden as sg

from histokd_jax.nn.mcat import Mcat
from histokd_jax.nn.porpoise import PorpoiseMmf
from histokd_jax.nn.survpath import SurvPath

FEAT, GROUPS, SIZES = 6, (3, 1, 20, 2), (5, 1, 19, 3)
GENES = sum(GROUPS)
OFF = (False, False)
NETS = {
    "mcat_concat": Mcat(FEAT, 4, GROUPS, 16, chunk=8),
    "mcat_bilinear": Mcat(FEAT, 4, GROUPS, 32, "bilinear", chunk=8),
    "porpoise": PorpoiseMmf(FEAT, 4, GENES, 16, 8, 5, chunk=8),
    "porpoise_plain": PorpoiseMmf(FEAT, 4, GENES, 16, 8, 5, gates=OFF, skip=False, use_mlp=True, chunk=8),
    "survpath": SurvPath(FEAT, 4, GROUPS, 16, 8, 5, chunk=8),
}


def bags(sizes=SIZES, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.normal(size=(n, FEAT)).astype(np.float32) for n in sizes]


def genes(slots, seed=1):
    return {"genes": np.random.default_rng(seed).normal(size=(slots, GENES)).astype(np.float32)}


@functools.lru_cache
def parameters(net, key=0):
    """Random parameters, so that zero biases and equal layers do not hide mistakes."""
    return drawn.variables(lambda k: net.init(k, sg.pack(bags()), genes(4))["params"], jax.random.key(0), seed=key)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _applied(net, method, slots, params, patches, ids, positions, molecular, seed):
    inputs = sg.Bags(patches, ids, positions, slots), molecular
    if method is None:
        return net.apply({"params": params}, *inputs, seed)
    return net.apply({"params": params}, *inputs, method=method)


def run(net, params, packed, molecular, seed=None, method=None):
    """One forward pass, or another method of bags and genes; traced once per network and shapes."""
    arrays = packed.patches, packed.segment_ids, packed.positions, molecular
    return _applied(net, method, packed.num_slots, params, *arrays, seed)


def assert_same(a, b, atol=2e-5):
    assert set(a) == set(b)
    for k in a:
        np.testing.assert_allclose(a[k], b[k], atol=atol, rtol=1e-4, err_msg=k)
