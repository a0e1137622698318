"""The bag baselines and the SNN as entries of the table of networks (survival_baselines, sections 2 to 8b)."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from histokd_jax.methods.supervised.networks import CLUSTERS, GENES, PATCHES, Network, NetworkSpec, Options
from histokd_jax.methods.supervised.torch_keys import Tensor, gated_attention, linear
from histokd_jax.nn.mil.abmil import AbmilNet
from histokd_jax.nn.mil.clam import ClamNet
from histokd_jax.nn.mil.clustered import DeepAttnMislNet
from histokd_jax.nn.mil.deepsets import POOLS, SUM, DeepSetsNet
from histokd_jax.nn.mil.dsmil import DsmilNet
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


def _bag_layers(options: Options) -> dict[str, str]:
    """Projection and attention of the patches under the names that CLAM gives them."""
    attention = gated_attention("attention_net.3", "bag/attention")
    if not options["gated"]:
        # The plain network is a sequence: tanh layer, tanh, dropout, score layer.
        plain = {"0": "tanh", "3": "score"}
        attention = {f"attention_net.3.module.{i}": f"bag/attention/{ours}" for i, ours in plain.items()}
    return {"attention_net.0": "bag/proj", **attention}


def _snn(spec: NetworkSpec, options: Options) -> SnnNet:
    return SnnNet(spec.num_genes, spec.num_outputs, tuple(options["widths"]), options["dropout"], spec.dtype)


def _snn_torch(options: Options, num_outputs: int) -> Mapping[str, Tensor]:
    del num_outputs
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
    torch=lambda options, num_outputs: linear({"phi.0": "phi", **_readout_layers(options)}),
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


def _abmil_torch(options: Options, num_outputs: int) -> Mapping[str, Tensor]:
    del num_outputs
    layers = _readout_layers(options)
    attention = _bag_layers(options)
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
    may_be_zero=("rho",),
)


def _deepattnmisl(spec: NetworkSpec, options: Options) -> DeepAttnMislNet:
    return DeepAttnMislNet(
        spec.feat_dim,
        spec.num_outputs,
        options["clusters"],
        options["width"],
        options["attn"],
        options["rho"],
        options["fusion"],
        spec.num_genes,
        options["dropout"],
        **_machine(spec),
    )


def _deepattnmisl_torch(options: Options, num_outputs: int) -> Mapping[str, Tensor]:
    del num_outputs
    parts = {"0": "first", "3": "second"}
    phis = {f"phis.{j}.{i}": f"{ours}_{j}" for j in range(options["clusters"]) for i, ours in parts.items()}
    attention = gated_attention("attention_net.3", "attention")
    return linear({**phis, "attention_net.0": "proj", **attention, **_readout_layers(options)})


DEEPATTNMISL = Network(
    build=_deepattnmisl,
    reads=lambda options: (PATCHES, CLUSTERS, *_reads_patches(options)[1:]),
    options={"clusters": 10, "width": 512, "attn": 256, "rho": 256, "fusion": NONE, "dropout": DROPOUT},
    torch=_deepattnmisl_torch,
    choices={"fusion": FUSIONS},
)


def _clam(spec: NetworkSpec, options: Options, multi_branch: bool) -> ClamNet:
    return ClamNet(
        spec.feat_dim,
        spec.num_outputs,
        multi_branch,
        options["width"],
        options["attn"],
        options["instances"],
        options["gated"],
        options["dropout"],
        **_machine(spec),
    )


def _clam_torch(options: Options, num_outputs: int, multi_branch: bool) -> Mapping[str, Tensor]:
    classes = range(num_outputs)
    heads = {f"classifiers.{c}": f"heads_{c}" for c in classes} if multi_branch else {"classifiers": "heads_0"}
    instance = {f"instance_classifiers.{c}": f"instance_{c}" for c in classes}
    return linear({**_bag_layers(options), **heads, **instance})


def _clam_network(multi_branch: bool) -> Network:
    return Network(
        build=lambda spec, options: _clam(spec, options, multi_branch),
        reads=_reads_patches,
        options={"width": 512, "attn": 256, "instances": 8, "gated": True, "dropout": DROPOUT},
        torch=lambda options, num_outputs: _clam_torch(options, num_outputs, multi_branch),
        instance_classes=True,
    )


CLAM_SB, CLAM_MB = _clam_network(False), _clam_network(True)


def _dsmil(spec: NetworkSpec, options: Options) -> DsmilNet:
    return DsmilNet(
        spec.feat_dim,
        spec.num_outputs,
        options["query"],
        options["linear_query"],
        options["passing_value"],
        options["dropout"],
        **_machine(spec),
    )


def _class_mixing(module: str, path: str) -> dict[str, Tensor]:
    """A one-step convolution over the class rows, (C, C, D) there, one matrix [C D, C] here."""

    def read(value: np.ndarray) -> np.ndarray:
        return value.reshape(value.shape[0], -1).T

    def write(value: np.ndarray) -> np.ndarray:
        return value.T.reshape(value.shape[1], value.shape[1], -1)

    return {f"{module}.weight": Tensor(f"{path}/kernel", read, write), f"{module}.bias": Tensor(f"{path}/bias")}


def _dsmil_torch(options: Options, num_outputs: int) -> Mapping[str, Tensor]:
    del num_outputs
    layers = {"i_classifier.fc.0": "instance"}
    layers |= {"b_classifier.q": "queries_0"} if options["linear_query"] else {}
    layers |= {} if options["linear_query"] else {"b_classifier.q.0": "queries_0", "b_classifier.q.2": "queries_1"}
    layers |= {"b_classifier.v.1": "value"} if options["passing_value"] else {}
    return {**linear(layers), **_class_mixing("b_classifier.fcc", "head")}


DSMIL = Network(
    build=_dsmil,
    reads=_reads_patches,
    options={
        "query": 128,
        "linear_query": False,
        "passing_value": False,
        "dropout": 0.0,
        "init": ORTHOGONAL,
    },
    torch=_dsmil_torch,
    choices={"init": (ORTHOGONAL, TORCH_DEFAULT)},
    initializer=lambda options: None if options["init"] == TORCH_DEFAULT else options["init"],
)
