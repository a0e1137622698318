"""A whole evaluation: embed, train every probe, compare, and write tables, predictions, embeddings and a manifest."""

from __future__ import annotations

import collections
import dataclasses
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from data_pipelines.labelled.parts import Parts, Protocol, split
from data_pipelines.labelled.patches import LabelledPatches
from histokd_jax.embed.embedder import Compute
from histokd_jax.evals import ablation
from histokd_jax.evals.predictions import concatenate, write_predictions
from histokd_jax.evals.summary import write_summary
from histokd_jax.probe import files
from histokd_jax.probe.clusters import cluster, principal_components, require_umap
from histokd_jax.probe.features import embed_patches, embed_views, scale_of
from histokd_jax.probe.maps_files import MapOptions, check_map_options, write_maps
from histokd_jax.probe.results import results_table
from histokd_jax.probe.settings import FINETUNE, Settings, title_of
from histokd_jax.probe.sources import Source
from histokd_jax.probe.training import Probed, train_probes
from histokd_jax.train.provenance import git_revision, versions

Say = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class Computing:
    """Where and how embeddings are computed.

    Attributes:
      compute: batch, dtype, devices.
      threads: that decode.
      progress: called with the number of embedded patches.
    """

    compute: Compute = Compute()
    threads: int = 2
    progress: Callable[[int], None] | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class Outcome:
    """A finished evaluation.

    Attributes:
      table: see `results.results_table`, with the facts beside it.
      probed: encoder -> predictions, linear probes, failures.
      parts: the split.
      maps: files of maps.
    """

    table: Mapping[str, Any]
    probed: Mapping[str, Probed]
    parts: Parts
    maps: tuple[pathlib.Path, ...] = ()


def run_probes(
    patches: LabelledPatches,
    sources: Sequence[Source],
    out: pathlib.Path,
    *,
    protocol: Protocol | None = None,
    settings: Settings | None = None,
    computing: Computing | None = None,
    maps: MapOptions | None = None,
    command: Sequence[str] = (),
    overwrite: bool = False,
    say: Say = lambda _: None,
) -> Outcome:
    """Evaluates encoders on labelled patches.

    Args:
      patches: the data.
      sources: what is probed; the others are compared with the first.
      out: folder of the results; embeddings already there are used again if encoder and data are the same.
      protocol: of the split; None: the defaults, as for the next two.
      settings: of the probes.
      computing: of the embeddings.
      maps: also write maps of evidence.
      command: for the manifest.
      overwrite: replace another evaluation in `out`.
      say: told what begins.

    Returns:
      What was found; everything is also in files, probe_manifest.json last.

    Raises:
      DataError, ValueError: before anything is written, if the data, the split or the settings do not fit.
    """
    protocol, settings, computing = protocol or Protocol(), settings or Settings(), computing or Computing()
    parts = split(patches, protocol)
    facts = _facts(patches, sources, protocol, settings, computing)
    files.check_out(out, facts, overwrite)
    _check(sources, settings, maps)
    (out / files.MANIFEST).unlink(missing_ok=True)
    embedded = {source.label: _embedded(source, patches, out, computing, say) for source in sources}
    probed = {}
    for source in sources:
        views = _views(source, patches, settings, computing, say)
        probed[source.label] = train_probes(source, embedded[source.label], views, patches, parts, settings, say)
    table = results_table(probed, settings.bootstrap, parts.unit_name)
    table |= _table_facts(patches, sources, parts, probed, settings)
    table |= {"structure": _structure(patches, embedded, out, settings, say)}
    ablation.write_table(out, table, table)
    for label, found in probed.items():
        _write_predictions(out / files.PREDICTIONS / label, found)
    drawn = []
    for source in sources if maps is not None else ():
        drawn += write_maps(source, patches, parts, probed[source.label].linear, maps)
    manifest = {**facts, "versions": versions(), "git": git_revision(), "command": " ".join(command), **_devices()}
    write_summary(out / files.MANIFEST, manifest)
    return Outcome(table, probed, parts, tuple(drawn))


def _check(sources: Sequence[Source], settings: Settings, maps: MapOptions | None) -> None:
    """Everything that could stop the evaluation half way."""
    arrays = [source.label for source in sources if source.loaded is None]
    if arrays and FINETUNE in settings.probes:
        raise ValueError(f"feature arrays cannot be fine-tuned: {', '.join(arrays)}; leave finetune out of --probes")
    if arrays and settings.n_views:
        raise ValueError(
            f"--augment {settings.augment} needs images, {', '.join(arrays)} are feature arrays: --augment none"
        )
    if maps is not None:
        check_map_options(sources, settings, maps)
    if settings.clusters is not None:
        require_umap()


def _facts(
    patches: LabelledPatches, sources: Sequence[Source], protocol: Protocol, settings: Settings, computing: Computing
) -> dict[str, Any]:
    return {
        "data": patches.name,
        "data_fingerprint": patches.fingerprint(),
        "encoders": {source.label: source.facts() for source in sources},
        "settings": settings.facts(),
        "protocol": dataclasses.asdict(protocol),
        "compute": {"dtype": computing.compute.dtype, "attention": computing.compute.attention},
    }


def _devices() -> dict[str, str]:
    return {"devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}"}


def _embedded(
    source: Source, patches: LabelledPatches, out: pathlib.Path, computing: Computing, say: Say
) -> np.ndarray:
    path = out / files.EMBEDDINGS / f"{source.label}.npz"
    encoder = {**source.facts(), "compute_dtype": computing.compute.dtype}
    if source.features is not None:
        files.write_embeddings(path, source.features, patches, encoder)
        return source.features
    found = files.stored_embeddings(path, patches, encoder)
    if found is None:
        say(f"{source.label}: embedding {len(patches)} patches")
        found = embed_patches(
            source.loaded, patches, computing.compute, threads=computing.threads, progress=computing.progress
        )
        files.write_embeddings(path, found, patches, encoder)
    return found


def _views(
    source: Source, patches: LabelledPatches, settings: Settings, computing: Computing, say: Say
) -> np.ndarray | None:
    if not settings.n_views:
        return None
    say(f"{source.label}: embedding {settings.n_views} augmented views of {len(patches)} patches")
    return embed_views(
        source.loaded, patches, computing.compute, settings.pipeline, settings.n_views, settings.seeds[0],
        threads=computing.threads, progress=computing.progress,
    )  # fmt: skip


def _table_facts(
    patches: LabelledPatches, sources: Sequence[Source], parts: Parts, probed: Mapping[str, Probed], settings: Settings
) -> dict[str, Any]:
    marks = ["simulated images"] if patches.simulated else []
    marks += [*parts.marks, *(mark for source in sources for mark in source.marks)]
    notes = [*patches.notes, *parts.notes, *(note for found in probed.values() for note in found.notes)]
    failed = {name: why for found in probed.values() for name, why in found.failed.items()}
    groups = len({group for group in patches.group if group})
    modes = dict.fromkeys(mode for found in probed.values() for run in found.runs.values() for mode in run.modes)
    return {
        "title": f"Probes on {patches.name}",
        "titles": {mode: title_of(mode) for mode in modes},
        "marks": marks,
        "notes": list(dict.fromkeys(notes)),
        "failed": failed,
        "data": {"name": patches.name, "patches": len(patches), "classes": patches.counts(), "groups": groups},
        "split": {
            "kind": parts.kind,
            "folds": [{"train": len(fold.train), "test": len(fold.test)} for fold in parts.folds],
        },
        "settings": settings.facts(),
        "encoders": {source.label: source.facts() for source in sources},
    }


def _structure(
    patches: LabelledPatches, embedded: Mapping[str, np.ndarray], out: pathlib.Path, settings: Settings, say: Say
) -> dict[str, Any]:
    """Principal components of every encoder, and clusters if asked; the points go to points.npz."""
    everything = np.arange(len(patches))
    points: dict[str, np.ndarray] = {"ids": np.array(patches.ids), "label": patches.label}
    found: dict[str, Any] = collections.defaultdict(dict)
    for label, features in embedded.items():
        values = scale_of(features, everything).filled(features)
        scores, shares = principal_components(values)
        points[f"pca/{label}"] = scores
        found[label]["pca_shares"] = shares.tolist()
        if settings.clusters is not None:
            say(f"{label}: UMAP and HDBSCAN")
            clusters = cluster(values, patches.label, settings.clusters)
            points |= {f"umap/{label}": clusters.pop("points"), f"cluster/{label}": clusters.pop("cluster")}
            found[label]["clusters"] = clusters
    files.write_npz(out / files.POINTS, **points)
    return dict(found)


def _write_predictions(folder: pathlib.Path, found: Probed) -> None:
    """folder/seed_S.csv: all folds, one mode per probe and label fraction."""
    folder.mkdir(parents=True, exist_ok=True)
    for seed in sorted({seed for seed, _ in found.runs}):
        tables = [table for (own, _), table in sorted(found.runs.items()) if own == seed]
        write_predictions(folder / f"seed_{seed}.csv", concatenate(tables))
