"""Runs one golden case of a bag network: outputs, scalar and gradients under the names of the golden file."""

import contextlib
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import golden_fill as gf
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from histokd_jax.losses import survival
from histokd_jax.methods.supervised.networks import CLUSTERS, GENES, PATCHES, NetworkSpec, network
from histokd_jax.methods.supervised.torch_keys import from_torch, to_torch
from histokd_jax.nn.gated_attention import Bags
from histokd_jax.nn.mil.clustered import ClusteredBags

# float64 is the authority; float32 runs in the slow suite.
PRECISIONS = (gf.FLOAT64, pytest.param(gf.FLOAT32, marks=pytest.mark.slow))
FUSION_SHAPES = {
    "fc_omic.0.0.weight": (256, 37),
    "fc_omic.0.0.bias": (256,),
    "fc_omic.1.0.weight": (256, 256),
    "fc_omic.1.0.bias": (256,),
}
CONCAT_SHAPES = FUSION_SHAPES | {
    "mm.0.weight": (256, 512),
    "mm.0.bias": (256,),
    "mm.2.weight": (256, 256),
    "mm.2.bias": (256,),
}
_INNER = {"linear_h": (32, 256), "linear_z": (32, 512), "linear_o": (32, 32)}
BILINEAR_SHAPES = (
    FUSION_SHAPES
    | {f"mm.{name}{i}.0.weight": shape for name, shape in _INNER.items() for i in (1, 2)}
    | {f"mm.{name}{i}.0.bias": shape[:1] for name, shape in _INNER.items() for i in (1, 2)}
    | {"mm.encoder1.0.weight": (256, 1089), "mm.encoder1.0.bias": (256,)}
    | {"mm.encoder2.0.weight": (256, 256), "mm.encoder2.0.bias": (256,)}
)


@dataclasses.dataclass(frozen=True)
class Case:
    """One golden case.

    Attributes:
      name: of the network and its file.
      case: of the file.
      options: that differ from the defaults of the network.
      extra_shapes: tensors that the key table lacks.
      drop: key prefixes of the key table that this case has not.
      outputs: C.
      scale: factor of the bag.
      clusters: cluster ids of the 23 patches.
      scalar: (network outputs) -> ([] to differentiate, outputs by golden name).
    """

    name: str
    case: str = "default"
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    extra_shapes: Mapping[str, tuple] = dataclasses.field(default_factory=dict)
    drop: tuple[str, ...] = ()
    outputs: int = 4
    scale: float = 1.0
    clusters: np.ndarray | None = None
    scalar: Callable = None

    @property
    def id(self):
        return f"{self.name}-{self.case}"

    def resolved(self):
        entry = network(self.name)
        return entry, {**entry.options, **self.options}


def precision_context(precision):
    return jax.enable_x64(True) if precision == gf.FLOAT64 else contextlib.nullcontext()


def cast(tree, precision):
    return jax.tree.map(lambda x: jnp.asarray(x, precision), tree)


def one_bag(x, clusters=None):
    n = x.shape[0]
    bags = Bags(x[None], jnp.ones((1, n), jnp.int32), jnp.arange(n, dtype=jnp.int32)[None], 1)
    return bags if clusters is None else ClusteredBags(*bags, clusters=jnp.asarray(clusters, jnp.int32)[None])


def survival_scalar(out):
    """The scalar of every survival case, and the outputs derived from logits."""
    z = out["logits"]
    named = {
        "logits": z,
        "hazards": jax.nn.sigmoid(z),
        "survival": survival.survival_curve(z),
        "risk": survival.risk_score(z),
        "nll_bin2_death": survival.nll_survival(z, jnp.array([2]), jnp.array([1.0])),
        "nll_bin1_censored": survival.nll_survival(z, jnp.array([1]), jnp.array([0.0])),
    }
    return (named["nll_bin2_death"] + named["nll_bin1_censored"])[0], named


@dataclasses.dataclass
class Result:
    golden: Mapping
    value: float
    outputs: dict
    gradients: dict
    input_gradients: dict
    module: Any
    params: Any
    bags: Any


def run(folder, case, precision):
    """The case computed by the library; call within `precision_context`."""
    golden = gf.load(folder, case.name, case.case)
    entry, options = case.resolved()
    tensors, reads = entry.torch(options, case.outputs), entry.reads(options)
    state = gf.state_dict(folder, case.name, dict(case.extra_shapes), case.drop)
    params = cast(from_torch(state, tensors, case.name), precision)
    arrays = cast({k: gf.inputs(k, tuple(shape)) for k, shape in golden["inputs"].items()}, precision)
    genes_name = next((k for k in arrays if k.startswith("omic")), None)
    genes = arrays[genes_name].size if genes_name else 0
    module = entry.build(NetworkSpec(1024, case.outputs, genes, chunk=16), options)

    def inputs(arrays):
        bags = one_bag(arrays["x_path"] * case.scale, case.clusters) if PATCHES in reads else None
        assert (CLUSTERS in reads) == (case.clusters is not None)
        return bags, ({GENES: arrays[genes_name].reshape(1, -1)} if genes_name else None)

    def scalar(params, arrays):
        out, sown = module.apply({"params": params}, *inputs(arrays), None, capture_intermediates=is_block)
        value, named = (case.scalar or survival_scalar)(out)
        return value, ({**out, **named}, sown)

    step = jax.jit(jax.value_and_grad(scalar, (0, 1), has_aux=True))
    (value, (outputs, sown)), (g_params, g_inputs) = step(params, arrays)
    outputs["sown"] = sown
    gradients = {f"{case.name}:{k}": g for k, g in to_torch(g_params, tensors, case.name).items()}
    return Result(golden, float(value), outputs, gradients, g_inputs, module, params, inputs(arrays)[0])


def is_block(module, _):
    return module.name is not None and module.name.startswith("blocks_")


def raw_scores(result):
    """[Q, n] scores before the softmax, from the chunk function of the network."""

    def scores(module):
        fn, params, aux, x, ids, positions = module.bag.arguments(result.bags, None)
        return fn(params, aux, x[0], ids[0], positions[0])[1]

    return result.module.apply({"params": result.params}, method=scores)


def check(case, result, precision, outputs):
    """Outputs by golden name, the scalar, and all gradients, at the stated tolerances."""
    for key, value in outputs.items():
        gf.assert_output(result.golden["outputs"][key], value, precision, f"{case.id} {key}")
    rtol = 1e-10 if precision == gf.FLOAT64 else 1e-5
    np.testing.assert_allclose(result.value, result.golden["scalar"]["float64"], rtol=rtol)
    absent = {k for k, v in result.golden["grad_l2_probe"].items() if v is None}
    for key in absent:
        np.testing.assert_array_equal(result.gradients[key], 0.0)
    gf.assert_gradients(result.golden, {k: v for k, v in result.gradients.items() if k not in absent}, precision)
    gf.assert_input_gradients(result.golden, result.input_gradients, precision)
