"""Embed the tiles of slides with a patch encoder, straight into a data set; no image files in between.

  histokd embed slides/ --coords job/20x_256px_0px_overlap --encoder uni --weights uni.safetensors --out data/mine
  histokd embed slides/ --coords job --weights my_encoder/ --out data/mine       an encoder that this library trained
  histokd embed tiles/ --tiles --mpp 0.5 --encoder resnet50_clam --weights resnet50.pth --out data/mine
  histokd embed slides/ --coords job --encoder vit_tiny --random-weights 0 --out data/trial      only to try it

Coordinates are those of `histokd tile`, TRIDENT or CLAM. Weights are local files (timm, torchvision or transformers;
.safetensors, .pt, .pth, .bin); nothing is downloaded and no code in them is run. Each slide that was finished survives
a kill: the same command continues, and ends in the same bytes on the same device. Slides that cannot be used are
listed with reasons in quarantine.csv.

Exit code: 0 all slides embedded; 3 embedded, but some slides are in quarantine; 1 nothing was embedded.
"""

from __future__ import annotations

import argparse
import functools
import os
import pathlib
import shlex

from histokd_jax.cli.import_features import print_rejected

HELP = "embed tiles of slides with a patch encoder, straight into a data set"
EXIT_QUARANTINE = 3


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `histokd embed`."""
    parser.add_argument("source", type=pathlib.Path, metavar="SRC", help="folder of slides, one slide, or tile images")
    parser.add_argument("--out", type=pathlib.Path, required=True, metavar="DATASET", help="data set to write")
    parser.add_argument("--coords", type=pathlib.Path, metavar="DIR", help="coordinate files *_patches.h5")
    parser.add_argument("--tiles", action="store_true", help="SRC holds one folder of ready-cut images per slide")
    parser.add_argument("--exclude", action="append", default=[], metavar="GLOB", help="leave slides out; repeatable")
    parser.add_argument("--name", help="name of the data set; default: that of the folder DATASET")
    parser.add_argument("--mpp", type=float, help="micrometres per pixel of the tiles, where the files do not say")
    parser.add_argument("--any-mpp", action="store_true", help="accept tiles of a resolution the encoder does not know")
    parser.add_argument("--beam", metavar="OPTIONS", help="run on Apache Beam, e.g. --beam='--runner=DirectRunner'")
    parser.add_argument("--overwrite", action="store_true", help="replace another data set in DATASET")
    parser.add_argument("--dry-run", action="store_true", help="only show what would be done")
    parser.add_argument("--store-dtype", choices=("float16", "float32"), default="float16", help="stored type")
    parser.add_argument("--seed", type=int, default=0, help="of the order of patches within a slide")
    _add_encoder_arguments(parser)
    _add_compute_arguments(parser)
    group = parser.add_argument_group("stain normalisation, fitted to each slide (default: none)")
    group.add_argument("--stain", default="", metavar="METHOD", help="macenko, reinhard, vahadane, or a JSON file")
    group.add_argument("--stain-reference", type=pathlib.Path, metavar="IMAGE", help="tile with the stains to aim at")
    group = parser.add_argument_group("patients (default: the first 12 characters of TCGA barcodes)")
    group.add_argument("--cases", metavar="TABLE", help="CSV with slide_id and case_id; slides not in it are left out")
    group.add_argument("--case-regex", metavar="REGEX", help="searched in the slide id; its group is the case id")
    group.add_argument("--case-per-slide", action="store_true", help="every slide is a patient of its own")


def _add_encoder_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("encoder")
    group.add_argument("--encoder", default="", metavar="NAME", help="e.g. uni, virchow2; --list-encoders names all")
    group.add_argument("--list-encoders", action=_ListEncoders, help="print the known encoders and exit")
    group.add_argument("--weights", type=pathlib.Path, metavar="FILE", help="checkpoint, or folder of our own encoder")
    group.add_argument("--random-weights", type=int, metavar="SEED", help="untrained; said so in the manifest")
    group.add_argument(
        "--spec", action="append", default=[], metavar="KEY=VALUE", help="change the architecture, e.g. image=518"
    )


def _add_compute_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("computation")
    group.add_argument("--batch", type=int, default=64, help="tiles per step, over all devices (default 64)")
    group.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of products")
    group.add_argument("--attention", choices=("xla", "cudnn"), default="xla", help="cudnn: fused, bfloat16 on GPUs")
    group.add_argument("--devices", type=int, default=0, help="default: all")
    group.add_argument("--threads", type=int, default=os.cpu_count() or 2, help="that decode tiles")
    group.add_argument("--ahead", type=int, default=4, help="batches decoded ahead of the device")


class _ListEncoders(argparse.Action):
    """Prints the table of encoders."""

    def __init__(self, option_strings, dest, **kwargs):
        super().__init__(option_strings, dest, nargs=0, **kwargs)

    def __call__(self, parser, namespace, values, option_string=None):
        from histokd_jax.encoders.presets import PRESETS

        for encoder in PRESETS.values():
            mpp = ", ".join(f"{value:g}" for value in encoder.mpp) or "-"
            print(
                f"{encoder.name:14} width {encoder.features:5}  input {encoder.transform.size}  mpp {mpp:15} "
                f"{encoder.licence}"
            )
        parser.exit()


def run(args: argparse.Namespace) -> int:
    """Plans, embeds and prints an account."""
    from histokd_jax.embed import plan as planning
    from histokd_jax.embed import run as running

    try:
        return _plan_and_run(args)
    except planning.NothingUsable as error:
        if not args.dry_run and not (args.out / "manifest.json").exists():
            running.write_quarantine(args.out, error.rejected)
        raise


def _plan_and_run(args: argparse.Namespace) -> int:
    loaded, stain = load_encoder(args), _stain(args)
    plan = _plan(args, loaded, stain)
    _print_plan(plan)
    if args.dry_run:
        print_rejected(plan.rejected, "slides")
        return EXIT_QUARANTINE if plan.rejected else 0
    outcome = _embed(args, loaded, plan, stain)
    _print_outcome(outcome, args.out)
    return EXIT_QUARANTINE if outcome.rejected else 0


def load_encoder(args: argparse.Namespace):
    """The encoder that the arguments name, with its weights."""
    from histokd_jax.encoders import folder, loading, presets

    if (args.weights is None) == (args.random_weights is None):
        raise ValueError("give --weights FILE, or --random-weights SEED to try the command without a trained encoder")
    if args.weights is not None and (args.weights / folder.ENCODER_FILE).exists():
        if args.encoder or args.spec:
            raise ValueError(f"{args.weights} says itself which encoder it holds: leave --encoder and --spec out")
        return loading.load_folder(args.weights)
    if not args.encoder:
        raise ValueError(f"--encoder NAME is needed: {', '.join(presets.PRESETS)}")
    encoder = presets.changed(presets.get(args.encoder), args.spec)
    if args.weights is not None:
        return loading.load(encoder, args.weights)
    return loading.random(encoder, args.random_weights)


def _stain(args: argparse.Namespace):
    if not args.stain:
        if args.stain_reference is not None:
            raise ValueError("--stain-reference needs --stain METHOD")
        return None
    from histokd_jax.embed import stains

    return stains.load(args.stain, args.stain_reference)


def _plan(args: argparse.Namespace, loaded, stain):
    import jax

    from data_pipelines.importers.cases import CaseRule
    from histokd_jax.embed import plan, slides

    if args.tiles == (args.coords is not None):
        raise ValueError("give --coords DIR for slides, or --tiles if SRC holds ready-cut images")
    if args.mpp is not None and not 0 < args.mpp < 100:
        raise ValueError(f"--mpp {args.mpp}: expected micrometres per pixel, e.g. 0.5")
    found, rejected = (slides.find_images(args.source), []) if args.tiles else _slides(args)
    devices = jax.devices()[: args.devices or None]
    compute = {"dtype": args.dtype, "attention": args.attention, "batch": args.batch}
    compute |= {"devices": [device.device_kind for device in devices], "jax": jax.__version__}
    return plan.make_plan(
        args.source if args.source.is_dir() else args.source.parent,
        found,
        rejected,
        loaded,
        options=plan.Options(
            args.name or args.out.resolve().name,
            args.mpp,
            args.any_mpp,
            args.store_dtype,
            args.seed,
            stain=None if stain is None else stain.facts,
        ),
        rule=CaseRule(args.case_regex, args.cases, args.case_per_slide),
        compute=compute,
    )


def _slides(args: argparse.Namespace):
    from histokd_jax.embed import slides

    return slides.find_slides(args.source, args.coords, args.exclude)


def _embed(args: argparse.Namespace, loaded, plan, stain):
    from tqdm import tqdm

    from histokd_jax.embed import embedder, run

    if (done := run.existing(plan, args.out)) is not None:
        return done
    if args.beam is not None:
        from histokd_jax.embed.beam import embed_on_beam

        options = {"threads": args.threads, "ahead": args.ahead, "overwrite": args.overwrite}
        setup = functools.partial(set_up, args)
        return embed_on_beam(plan, args.out, setup, options=shlex.split(args.beam), **options)
    engine = embedder.Embedder(loaded, _compute(args), stain)
    total = sum(slide.facts.count for slide in plan.slides)
    with tqdm(total=total, unit="tile", unit_scale=True, disable=None) as bar:
        return run.run_embedding(
            plan,
            args.out,
            engine,
            threads=args.threads,
            ahead=args.ahead,
            overwrite=args.overwrite,
            progress=bar.update,
        )


def set_up(args: argparse.Namespace):
    """The encoder on the devices of this process, as the arguments say; called once by every worker of a runner."""
    from histokd_jax.embed import embedder

    return embedder.Embedder(load_encoder(args), _compute(args), _stain(args))


def _compute(args: argparse.Namespace):
    from histokd_jax.embed import embedder

    return embedder.Compute(args.batch, args.dtype, args.attention, args.devices)


def _print_plan(plan) -> None:
    encoder = plan.facts["encoder"]
    tiles = sum(slide.facts.count for slide in plan.slides)
    print(
        f"{len(plan.slides)} slides, {tiles} tiles of {encoder['patch_size']} px; encoder {encoder['name']}, width "
        f"{plan.facts['feat_dim']}, weights {encoder['weights']}; licence: {encoder['licence']}"
    )
    for note in plan.notes:
        print(f"  {note}")


def _print_outcome(outcome, out: pathlib.Path) -> None:
    manifest = outcome.manifest
    cases = len({slide.case_id for slide in manifest.slides})
    state = "was complete already, nothing changed" if outcome.already_complete else "written"
    kept = f"; {outcome.slides_kept} slides kept from an interrupted run" if outcome.slides_kept else ""
    print(
        f"{out}: {state}: {len(manifest.slides)} slides of {cases} cases, {int(manifest.sizes.sum())} patches of width "
        f"{manifest.feat_dim} in {manifest.dtype}{kept}"
    )
    print_rejected(outcome.rejected, "slides")
