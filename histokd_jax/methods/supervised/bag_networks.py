"""The bag baselines and the SNN as entries of the table of networks (survival_baselines, sections 2 to 8b)."""

from __future__ import annotations

from collections.abc import Mapping

from histokd_jax.methods.supervised.networks import GENES, PATCHES, Network, NetworkSpec, Options
from histokd_jax.methods.supervised.torch_keys import Tensor, gated_attention, linear
from histokd_jax.nn.mil.abmil import AbmilNet
from histokd_jax.nn.mil.deepsets import POOLS, SUM, DeepSetsNet
from histokd_jax.nn.mil.readout import BILINEAR, CONCAT, FUSIONS, NONE, OMIC_BLOCKS
from histokd_jax.nn.snn import SnnNet

DROPOUT = 0.25
XAVIER_NORMAL, ORTHOGONAL = "xavier_normal", "orthogonal"
TORCH_DEFAULT = "torch_default"


def _reads_patches(options: Options) -> tuple[str, ...]:
    return (PATCHES, GENES) if options.get("fusion", NONE) != NONE else (PATCHES,)


def _machine(spec: NetworkSpec) -> dict:
    return dict(dtype=spec.dtype, chunk=spec.chunk, impl=spec.pool)


def _readout_layers(options: Options) -> dict[str, str]:
    """rho, late fusion and head under the names that MCAT gives them."""
    layers = {"rho.0": "readout/rho", "classifier": "readout/head"}
    if options["fusion"] != NONE:
        layers |= {f"fc_omic.{i}.0": f"readout/omics/blocks_{i}" for i in range(OMIC_BLOCKS)}
    if options["fusion"] == CONCAT:
        layers |= {"mm.0": "readout/fuse/encode", "mm.2": "readout/fuse/merge"}
    if options["fusion"] == BILINEAR:
        inner = [f"{letter}{i}" for letter in "hzo" for i in (1, 2)]
        layers |= {f"mm.linear_{name}.0": f"readout/fuse/{name}" for name in inner}
        layers |= {"mm.encoder1.0": "readout/fuse/encode", "mm.encoder2.0": "readout/fuse/merge"}
    return layers


def _snn(spec: NetworkSpec, options: Options) -> SnnNet:
    return SnnNet(spec.num_genes, spec.num_outputs, tuple(options["widths"]), options["dropout"], spec.dtype)


def _snn_torch(options: Options) -> Mapping[str, Tensor]:
    blocks = {f"fc_omic.{i}.0": f"body/blocks_{i}" for i in range(len(options["widths"]))}
    return linear({**blocks, "classifier": "head"})


SNN = Network(
    build=_snn,
    reads=lambda options: (GENES,),
    options={"widths": (256, 256, 256, 256), "dropout": DROPOUT},
    torch=_snn_torch,
)


def _deepsets(spec: NetworkSpec, options: Options) -> DeepSetsNet:
    return DeepSetsNet(
        spec.feat_dim,
        spec.num_outputs,
        options["width"],
        options["rho"],
        options["pool"],
        options["fusion"],
        spec.num_genes,
        options["dropout"],
        **_machine(spec),
    )


DEEPSETS = Network(
    build=_deepsets,
    reads=_reads_patches,
    options={"width": 512, "rho": 256, "pool": SUM, "fusion": NONE, "dropout": DROPOUT},
    torch=lambda options: linear({"phi.0": "phi", **_readout_layers(options)}),
    choices={"pool": POOLS, "fusion": FUSIONS},
)


def _abmil(spec: NetworkSpec, options: Options) -> AbmilNet:
    if not options["rho"] and options["fusion"] != NONE:
        raise ValueError(
            f"model.abmil.rho = 0 leaves no 256-wide image vector for fusion = {options['fusion']!r}: "
            "set model.abmil.rho, or fusion = 'none'"
        )
    return AbmilNet(
        spec.feat_dim,
        spec.num_outputs,
        options["width"],
        options["attn"],
        options["rho"],
        options["gated"],
        options["fusion"],
        spec.num_genes,
        options["dropout"],
        **_machine(spec),
    )


def _abmil_torch(options: Options) -> Mapping[str, Tensor]:
    layers = {"attention_net.0": "bag/proj", **_readout_layers(options)}
    attention = gated_attention("attention_net.3", "bag/attention")
    if not options["gated"]:
        # The plain network is a sequence: tanh layer, (tanh, dropout,) score layer.
        attention = {
            "attention_net.3.module.0": "bag/attention/tanh",
            "attention_net.3.module.3": "bag/attention/score",
        }
    if not options["rho"]:
        del layers["rho.0"]
    return linear({**layers, **attention})


ABMIL = Network(
    build=_abmil,
    reads=_reads_patches,
    options={
        "width": 512,
        "attn": 256,
        "rho": 256,  # 0: no rho
        "gated": True,
        "fusion": NONE,
        "dropout": DROPOUT,
        "init": TORCH_DEFAULT,
    },
    torch=_abmil_torch,
    choices={"fusion": FUSIONS, "init": (TORCH_DEFAULT, XAVIER_NORMAL)},
    initializer=lambda options: None if options["init"] == TORCH_DEFAULT else options["init"],
)
