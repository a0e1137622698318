"""Every bag network on a mesh of devices: the same value and gradient as on one, and patches stay where they lie."""

import drawn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from histokd_jax.nn.gated_attention import Bags
from histokd_jax.nn.mil.abmil import AbmilNet
from histokd_jax.nn.mil.clam import ClamNet
from histokd_jax.nn.mil.clustered import ClusteredBags, DeepAttnMislNet
from histokd_jax.nn.mil.deepsets import DeepSetsNet
from histokd_jax.nn.mil.dsmil import DsmilNet
from histokd_jax.utils import hlo

D, SIZES, SHAPE = 6, (20, 1, 30, 7), (4, 16)
NETWORKS = {
    "deepsets": DeepSetsNet(D, 4, 8, 8, chunk=4),
    "abmil": AbmilNet(D, 4, 8, 5, 8, chunk=4),
    "deepattnmisl": DeepAttnMislNet(D, 4, 3, 8, 5, 8, chunk=4),
    "clam_mb": ClamNet(D, 4, True, 8, 5, 4, chunk=4),
    "dsmil": DsmilNet(D, 4, 5, chunk=4),
}


def fields():
    rng, total = np.random.default_rng(0), sum(SIZES)
    x = np.full((64, D), np.nan, np.float32)
    x[:total] = rng.normal(size=(total, D))
    ids, positions = np.zeros(64, np.int32), np.zeros(64, np.int32)
    ids[:total] = np.repeat(np.arange(1, 5), SIZES)
    positions[:total] = np.concatenate([np.arange(n) for n in SIZES])
    clusters = rng.integers(0, 3, 64).astype(np.int32)
    return x.reshape(*SHAPE, D), *(t.reshape(SHAPE) for t in (ids, positions, clusters))


@pytest.mark.parametrize("name", NETWORKS)
def test_a_mesh_gives_the_same_value_and_gradient_with_all_reduces_only(name):
    module, arrays = NETWORKS[name], fields()

    def bags(x, ids, positions, clusters):
        plain = Bags(x, ids, positions, len(SIZES))
        return ClusteredBags(*plain, clusters=clusters) if name == "deepattnmisl" else plain

    params = drawn.variables(lambda *rows: module.init(jax.random.key(0), bags(*rows)), *arrays)

    def loss(params, *rows):
        out = module.apply(params, bags(*rows), None, jnp.uint32(3))
        return sum(jnp.mean(jnp.sin(v)) for v in out.values())

    step = jax.value_and_grad(loss)
    want = jax.jit(step)(params, *arrays)
    mesh = jax.make_mesh((2, 2), ("data", "sequence"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    with jax.set_mesh(mesh):
        placed = [jax.device_put(a, NamedSharding(mesh, P("data", "sequence"))) for a in arrays]
        whole = jax.device_put(params, NamedSharding(mesh, P()))
        compiled = jax.jit(step).lower(whole, *placed).compile()
        got = compiled(whole, *placed)
        assert set(hlo.collective_bytes(compiled.as_text())) == {"all-reduce"}
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), got, want)
