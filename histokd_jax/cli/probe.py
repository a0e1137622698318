"""Evaluate patch encoders on labelled patches: frozen features, small probes, few labels, paired comparison.

  histokd probe patches/ --encoder my_encoder/ --out probes              linear probe and nearest neighbours
  histokd probe patches/ --encoder ours=my_encoder/ --encoder uni@uni.safetensors --fractions 1,0.1 --out probes
  histokd probe patches/ --encoder my_encoder/ --encoder floor=vit_tiny@random:0 --maps probes/maps --out probes
  histokd probe data/pairs --encoder my_encoder/ --probes linear,mlp256,finetune --out probes
  histokd probe features.npz --encoder array:f_lbp --encoder array:gabor --missing mean --out probes

DATA is a folder of images with labels.csv (file, label, and if known group and part) or with one folder per class, a
data set of `histokd pairs` with labels, or an .npz with labels and images or feature arrays. Official parts train/test
are used where there are some; else folds that keep groups (slides, patients) together; without groups the results say
that leakage cannot be excluded. Encoders after the first are compared with it on the same patches.

OUT holds table.{csv,json,md}, report.html, predictions/, embeddings/ (npz: ids, labels, features, encoder fingerprint)
and probe_manifest.json. Nothing is downloaded; embeddings that are there already are used again.

Exit code: 0 done; 3 done, but some trainings diverged and are listed in the table; 1 nothing was evaluated.
"""

from __future__ import annotations

import argparse
import os
import pathlib

HELP = "evaluate patch encoders on labelled patches (probes)"
EXIT_UNFINISHED = 3


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `histokd probe`."""
    parser.add_argument("data", type=pathlib.Path, metavar="DATA", help="folder, pair data set or .npz; see above")
    parser.add_argument("--out", type=pathlib.Path, required=True, metavar="DIR", help="folder of the results")
    parser.add_argument(
        "--encoder",
        action="append",
        default=[],
        metavar="[NAME=]WHAT",
        help="what to probe, repeatable: an encoder folder, PRESET[,KEY=VALUE]@FILE, PRESET@random:SEED, FILE.npy, "
        "FILE.npz[:ARRAY] or array:NAME of DATA; default: all arrays of DATA",
    )
    parser.add_argument("--missing", choices=("refuse", "mean"), default="refuse", help="feature values that are NaN")
    parser.add_argument("--overwrite", action="store_true", help="replace another evaluation in DIR")
    parser.add_argument("--no-report", action="store_true", help="write no report.html (it needs Matplotlib)")
    _add_data_arguments(parser)
    _add_probe_arguments(parser)
    _add_extra_arguments(parser)
    group = parser.add_argument_group("computation of the embeddings")
    group.add_argument("--batch", type=int, default=64, help="images per step, over all devices (default 64)")
    group.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of products")
    group.add_argument("--attention", choices=("xla", "cudnn"), default="xla", help="cudnn: fused, bfloat16 on GPUs")
    group.add_argument("--devices", type=int, default=0, help="default: all")
    group.add_argument("--threads", type=int, default=os.cpu_count() or 2, help="that decode images")


def _add_data_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("data and split")
    group.add_argument("--input", choices=("image", "partner"), default="image", help="pairs: H&E, or the other view")
    group.add_argument("--classes", default="", metavar="A,B,...", help="the classes in their order")
    group.add_argument("--leave-out-unlabelled", action="store_true", help="patches without a label are no error")
    group.add_argument("--folds", type=int, default=5, help="where there are no official parts (default 5)")
    group.add_argument("--split-seed", type=int, default=0, help="of the folds")
    group.add_argument("--no-official-parts", action="store_true", help="draw folds even so")
    group.add_argument("--allow-overlap", action="store_true", help="accept a group in both official parts, marked")
    group.add_argument("--block", type=int, default=20, metavar="N", help="neighbours resampled together (npz: order)")


def _add_probe_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("probes")
    group.add_argument("--probes", default="linear,knn", metavar="LIST", help="of linear, knn, mlp256, finetune")
    group.add_argument(
        "--fractions", default="1", metavar="LIST", help="shares of the training labels, e.g. 1,0.1,0.01"
    )
    group.add_argument("--seeds", default="0,1,2", metavar="LIST", help="of label subsets and trainings")
    group.add_argument("--bootstrap", type=int, default=2000, metavar="N", help="resamples of the intervals")
    group.add_argument("--l2", type=float, default=1.0, help="linear: penalty, 1/C of scikit-learn (default 1)")
    group.add_argument("--k", default="5,20", metavar="LIST", help="knn: neighbours by cosine similarity")
    group.add_argument("--votes", choices=("uniform", "similarity"), default="uniform", help="knn: weights of votes")
    group.add_argument("--knn-standardise", action="store_true", help="knn: for features in different units")
    group.add_argument(
        "--protocol",
        choices=("corrected", "faithful"),
        default="corrected",
        help="mlp256: faithful keeps the running averages of the released head and trains on fully augmented images",
    )
    group.add_argument("--epochs", type=int, default=100, help="mlp256 (default 100)")
    group.add_argument(
        "--augment",
        choices=("none", "light", "faithful", "a4_corrected"),
        help="mlp256: training images; default: none, or faithful with --protocol faithful",
    )
    group.add_argument("--views", type=int, default=0, metavar="N", help="augmented views; default: one per epoch")
    group.add_argument("--finetune-epochs", type=int, default=20)
    group.add_argument("--finetune-lr", type=float, default=1e-4, help="of the encoder; its head has ten times that")
    group.add_argument("--finetune-batch", type=int, default=32)
    group.add_argument("--finetune-augment", choices=("none", "light", "faithful", "a4_corrected"), default="none")


def _add_extra_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("maps of evidence (Grad-CAM) of the linear probe")
    group.add_argument("--maps", type=pathlib.Path, metavar="DIR", help="overlays as PNG, and float arrays")
    group.add_argument("--map-count", type=int, default=16, metavar="N", help="tested images (default 16)")
    group.add_argument("--map-class", choices=("predicted", "true"), default="predicted", help="whose evidence")
    group = parser.add_argument_group(
        "clusters (pip install 'histokd_jax[clusters]'); principal components need nothing"
    )
    group.add_argument("--clusters", action="store_true", help="UMAP, then HDBSCAN on its two dimensions")
    group.add_argument("--cluster-neighbours", type=int, default=15, metavar="N", help="of UMAP")
    group.add_argument("--cluster-min-samples", type=int, default=100, metavar="N", help="of HDBSCAN")
    group.add_argument("--cluster-min-size", type=int, default=200, metavar="N", help="of HDBSCAN")


def run(args: argparse.Namespace) -> int:
    """Evaluates, writes and prints the table."""
    from data_pipelines.labelled.opening import open_patches
    from histokd_jax.probe.results import printed
    from histokd_jax.probe.run import run_probes
    from histokd_jax.probe.sources import open_sources

    settings, protocol, computing = _settings(args), _protocol(args), _computing(args)
    patches = open_patches(
        args.data,
        which=args.input,
        unlabelled="leave_out" if args.leave_out_unlabelled else "refuse",
        classes=_texts(args.classes),
    )
    sources = open_sources(args.encoder, patches, args.missing)
    counts = ", ".join(f"{name} {count}" for name, count in patches.counts().items())
    print(f"{patches.name}: {len(patches)} patches ({counts}); probing {', '.join(s.label for s in sources)}")
    outcome = run_probes(
        patches, sources, args.out, protocol=protocol, settings=settings, computing=computing, maps=_maps(args),
        command=args.argv, overwrite=args.overwrite, say=lambda text: print(f"  {text}", flush=True),
    )  # fmt: skip
    for mark in outcome.table["marks"]:
        print(f"  NOTE: {mark}")
    for note in outcome.table["notes"]:
        print(f"  {note}")
    print(printed(outcome.table))
    _print_structure(outcome.table["structure"])
    print(f"results: {args.out}" + (f"; {len(outcome.maps)} files of maps: {args.maps}" if outcome.maps else ""))
    if not args.no_report:
        from histokd_jax.report.probe import build_probe_report

        print(f"report: {build_probe_report(args.out)}")
    for name, why in outcome.table["failed"].items():
        print(f"NOT FINISHED: {name}: {why}")
    return EXIT_UNFINISHED if outcome.table["failed"] else 0


def _settings(args: argparse.Namespace):
    from data_pipelines.labelled.parts import check_fractions
    from histokd_jax.ops.image import presets
    from histokd_jax.probe.clusters import ClusterOptions
    from histokd_jax.probe.finetune import FinetuneRecipe
    from histokd_jax.probe.mlp import MlpRecipe
    from histokd_jax.probe.settings import AUGMENTATIONS, FAITHFUL, NONE, Settings

    augment = args.augment or (FAITHFUL if args.protocol == FAITHFUL and "mlp256" in _texts(args.probes) else NONE)
    clusters = ClusterOptions(args.cluster_neighbours, args.cluster_min_samples, args.cluster_min_size)
    pipeline = presets.recipe(AUGMENTATIONS[args.finetune_augment]).image
    return Settings(
        probes=_texts(args.probes),
        fractions=check_fractions(_numbers(args.fractions, "--fractions", float)),
        seeds=_numbers(args.seeds, "--seeds", int),
        l2=args.l2,
        ks=_numbers(args.k, "--k", int),
        votes=args.votes,
        knn_standardise=args.knn_standardise,
        head=MlpRecipe(epochs=args.epochs, protocol=args.protocol),
        augment=augment,
        views=args.views,
        tune=FinetuneRecipe(
            args.finetune_epochs, args.finetune_batch, args.finetune_lr, 10 * args.finetune_lr, pipeline
        ),
        bootstrap=args.bootstrap,
        clusters=clusters if args.clusters else None,
    )


def _protocol(args: argparse.Namespace):
    from data_pipelines.labelled.parts import Protocol

    return Protocol(args.folds, args.split_seed, not args.no_official_parts, args.allow_overlap, args.block)


def _computing(args: argparse.Namespace):
    from histokd_jax.embed.embedder import Compute
    from histokd_jax.probe.run import Computing

    if args.threads < 1:
        raise ValueError(f"--threads {args.threads}: expected at least 1")
    return Computing(Compute(args.batch, args.dtype, args.attention, args.devices), args.threads)


def _maps(args: argparse.Namespace):
    from histokd_jax.probe.maps_files import MapOptions

    return None if args.maps is None else MapOptions(args.maps, args.map_count, args.map_class)


def _texts(text: str) -> tuple[str, ...]:
    return tuple(filter(None, (part.strip() for part in text.split(","))))


def _numbers(text: str, option: str, kind: type) -> tuple:
    try:
        return tuple(kind(part) for part in _texts(text))
    except ValueError as error:
        raise ValueError(f"{option} {text}: expected numbers separated by commas, e.g. 1,5") from error


def _print_structure(structure) -> None:
    for label, facts in structure.items():
        if "clusters" in facts:
            own = facts["clusters"]
            print(
                f"{label}: {own['n_labels']} labels of clusters (noise counts as one), {own['share_assigned']:.1%} of "
                "the patches assigned"
            )
