"""TransMIL, MCAT, PORPOISE MMF and SurvPath as entries of the table of networks (survival_baselines, 8 to 11)."""

from __future__ import annotations

from histokd_jax.methods.supervised import torch_keys_multimodal as torch_keys
from histokd_jax.methods.supervised.networks import GENES, PATCHES, Network, NetworkSpec, Options
from histokd_jax.nn.grouped_snn import check_groups
from histokd_jax.nn.mcat import FUSIONS, Mcat
from histokd_jax.nn.mil.readout import CONCAT
from histokd_jax.nn.mil.transmil import TransMIL
from histokd_jax.nn.porpoise import PorpoiseMmf
from histokd_jax.nn.survpath import SurvPath

DROPOUT = 0.25
CORRECTED, FAITHFUL = "corrected", "faithful"
GENE_GROUPS = "gene_groups"
"""Key under which `Network.torch` of MCAT and SurvPath finds the group sizes beside the options."""


def _machine(spec: NetworkSpec) -> dict:
    return dict(dtype=spec.dtype, chunk=spec.chunk, impl=spec.pool)


def _both(options: Options) -> tuple[str, ...]:
    return (PATCHES, GENES)


def _groups(spec: NetworkSpec, name: str) -> tuple[int, ...]:
    """The gene groups of the data, which must be there and describe the genes."""
    if not spec.gene_groups:
        raise ValueError(
            f"model.name = {name!r} reads genes in groups, but the data set names none: give it gene groups "
            "(functional groups or pathways), or use a network that reads genes as one vector"
        )
    check_groups(tuple(spec.gene_groups), spec.num_genes)
    return tuple(spec.gene_groups)


def _sizes(options: Options, name: str) -> tuple[int, ...]:
    """Group sizes for the key table, which depends on the data."""
    if not options.get(GENE_GROUPS):
        raise ValueError(
            f"checkpoint keys of {name} depend on the data: pass {{**options, {GENE_GROUPS!r}: sizes of the groups}}"
        )
    return tuple(options[GENE_GROUPS])


def _check_multiple(key: str, width: int, of: int, reason: str) -> None:
    if width % of:
        raise ValueError(f"model.{key} = {width} is not possible; expected a multiple of {of} ({reason})")


def _transmil(spec: NetworkSpec, options: Options) -> TransMIL:
    _check_multiple("transmil.width", options["width"], options["heads"], "model.transmil.heads")
    return TransMIL(
        spec.feat_dim,
        spec.num_outputs,
        options["width"],
        options["heads"],
        options["landmarks"],
        options["dropout"],
        options["tile"],
        spec.dtype,
    )


TRANSMIL = Network(
    build=_transmil,
    reads=lambda options: (PATCHES,),
    # tile: rows per tile of the layout; it changes speed and memory, not results.
    options={"width": 512, "heads": 8, "landmarks": 256, "dropout": 0.1, "tile": 256},
    torch=lambda options, num_outputs: torch_keys.transmil(),
)


def _mcat(spec: NetworkSpec, options: Options) -> Mcat:
    _check_multiple("mcat.width", options["width"], 8, "heads of its transformers, scale of its bilinear fusion")
    return Mcat(
        spec.feat_dim,
        spec.num_outputs,
        _groups(spec, "mcat"),
        options["width"],
        options["fusion"],
        options["dropout"],
        **_machine(spec),
    )


MCAT = Network(
    build=_mcat,
    reads=_both,
    options={"width": 256, "fusion": CONCAT, "dropout": DROPOUT},
    torch=lambda options, num_outputs: torch_keys.mcat(options["fusion"], _sizes(options, "mcat")),
    choices={"fusion": FUSIONS},
)


def _gates(options: Options) -> tuple[bool, bool]:
    return options["gate_path"], options["gate_omic"]


def _porpoise(spec: NetworkSpec, options: Options) -> PorpoiseMmf:
    _check_multiple("porpoise_mmf.width", options["width"], options["scale"], "model.porpoise_mmf.scale")
    return PorpoiseMmf(
        spec.feat_dim,
        spec.num_outputs,
        spec.num_genes,
        options["width"],
        options["patch_width"],
        options["attn"],
        options["scale"],
        _gates(options),
        options["skip"],
        options["use_mlp"],
        options["dropout"],
        options["input_dropout"],
        **_machine(spec),
    )


PORPOISE_MMF = Network(
    build=_porpoise,
    reads=_both,
    options={
        "width": 256,
        "patch_width": 512,
        "attn": 256,
        "scale": 8,
        "gate_path": True,
        "gate_omic": True,
        "skip": True,
        "use_mlp": False,
        "dropout": DROPOUT,
        "input_dropout": 0.1,
    },
    torch=lambda options, num_outputs: torch_keys.porpoise_mmf(_gates(options)),
    l1=("omics", "fuse"),
)


def _survpath(spec: NetworkSpec, options: Options) -> SurvPath:
    return SurvPath(
        spec.feat_dim,
        spec.num_outputs,
        _groups(spec, "survpath"),
        options["width"],
        options["attn"],
        options["hidden"],
        options["dropout"],
        options["feed_dropout"],
        options["bag_size"] if options["padding"] == FAITHFUL else 0,
        **_machine(spec),
    )


SURVPATH = Network(
    build=_survpath,
    reads=_both,
    options={
        "width": 256,
        "attn": 128,
        "hidden": 64,
        "dropout": DROPOUT,
        "feed_dropout": 0.1,
        "padding": CORRECTED,  # "faithful": training bags below bag_size are filled with zero patches, which take part
        "bag_size": 4096,
    },
    torch=lambda options, num_outputs: torch_keys.survpath(_sizes(options, "survpath")),
    choices={"padding": (CORRECTED, FAITHFUL)},
)
