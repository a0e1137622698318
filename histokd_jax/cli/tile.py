"""Find the tissue of whole-slide images and lay tiles over it: coordinates, outlines for QuPath, previews, counts.

  histokd tile slides/ --out job                                  256 px at 0.5 um per pixel (20x)
  histokd tile slides/ --out job --target-mpp 1 --tile-px 224     at 10x
  histokd tile slides/ --out job --mpp 0.25                       for slides that do not record the size of a pixel
  histokd tile slides/ --out job --slides slides.csv              table: file, and optionally slide_id, mpp

Reads what OpenSlide reads: svs, tiled tiff, ndpi, mrxs, scn, bif, DICOM. Writes job/20x_256px_0px_overlap/ with
  patches/SLIDE_patches.h5            coordinates in level-0 pixels, in TRIDENT's layout
  contours_geojson/SLIDE.geojson      tissue and holes, for QuPath
  previews/SLIDE.png                  tissue (green), holes (blue), tiles; to look at
  tiles.csv  quarantine.csv           tiles kept and rejected per slide with reasons; slides that cannot be tiled
An interrupted run is continued by the same command; slides that are done are kept.

Exit code: 0 all slides tiled; 3 some slides are in quarantine; 1 nothing was tiled.
"""

from __future__ import annotations

import argparse
import os
import pathlib
import shlex

HELP = "find tissue on whole-slide images and lay tiles over it"
EXIT_QUARANTINE = 3


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `histokd tile`."""
    parser.add_argument("source", type=pathlib.Path, metavar="SRC", help="folder of slides (with subfolders), or one")
    parser.add_argument("--out", type=pathlib.Path, required=True, metavar="JOB", help="folder of the results")
    parser.add_argument("--slides", metavar="TABLE", help="CSV with file (in SRC), optionally slide_id and mpp")
    parser.add_argument("--exclude", action="append", default=[], metavar="GLOB", help="leave files out; repeatable")
    parser.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 2) // 2), help="processes")
    parser.add_argument("--beam", metavar="OPTIONS", help="run on Apache Beam, e.g. --beam='--runner=DirectRunner'")
    parser.add_argument("--overwrite", action="store_true", help="replace tiles made with other options in JOB")
    _add_tile_arguments(parser)
    _add_tissue_arguments(parser)


def _add_tile_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("tiles")
    group.add_argument(
        "--target-mpp", type=float, default=0.5, metavar="UM", help="um per tile pixel; default 0.5: 20x"
    )
    group.add_argument("--tile-px", type=int, default=256, metavar="PX", help="edge of a tile; default 256")
    group.add_argument("--overlap", type=int, default=0, metavar="PX", help="of neighbouring tiles; default 0")
    group.add_argument("--mpp", type=float, metavar="UM", help="um per level-0 pixel of slides that do not record it")
    group.add_argument(
        "--mpp-tolerance", type=float, default=0.02, metavar="SHARE",
        help="take a pyramid level as it is if its mpp differs by no more than this; default 0.02",
    )  # fmt: skip
    group.add_argument("--min-tissue", type=float, default=0.5, metavar="SHARE", help="of a tile; default 0.5")
    group.add_argument(
        "--min-sharpness", type=float, default=0.2, metavar="SHARE",
        help="tiles less sharp than this share of the slide's upper quartile are blurred; 0 keeps all; default 0.2",
    )  # fmt: skip


def _add_tissue_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("tissue")
    modes = ("brightfield", "fluorescence", "all")
    group.add_argument(
        "--tissue", choices=modes, default="brightfield", help="default brightfield; all: tile everything"
    )
    group.add_argument("--threshold", type=float, help="difference of optical densities; default: Otsu's, 0.05 to 0.15")
    group.add_argument("--segment-mpp", type=float, default=4.0, metavar="UM", help="of the overview; default 4")
    group.add_argument("--min-area", type=float, default=20_000, metavar="UM2", help="of a piece; default 20000")
    group.add_argument("--min-hole", type=float, default=10_000, metavar="UM2", help="smaller ones fill; default 10000")
    group.add_argument("--keep-ink", action="store_true", help="do not look for pen marks (blue or green stains)")


def run(args: argparse.Namespace) -> int:
    """Tiles the slides, and prints the account."""
    from tqdm import tqdm

    from data_pipelines.wsi.run import run_tiling
    from data_pipelines.wsi.sources import find_slides

    options = _options(args)
    sources = find_slides(args.source, exclude=args.exclude, table=args.slides)
    root = args.source.parent if args.source.is_file() else args.source
    print(f"{len(sources)} slides; tiles of {args.tile_px} px at {args.target_mpp:g} um per pixel")
    if args.beam is not None:
        from data_pipelines.beam.tiling import tile_on_beam

        pipeline = shlex.split(args.beam)
        outcome = tile_on_beam(root, sources, args.out, options, pipeline=pipeline, overwrite=args.overwrite)
    else:
        with tqdm(total=len(sources), unit="slide", disable=None) as bar:
            outcome = run_tiling(
                root, sources, args.out, options, workers=args.workers, overwrite=args.overwrite, progress=bar.update
            )
    _print_outcome(outcome)
    if outcome.rejected and not outcome.rows:
        raise ValueError(
            f"none of {len(sources)} slides could be tiled; the reasons are in {outcome.folder}/quarantine.csv"
        )
    return EXIT_QUARANTINE if outcome.rejected else 0


def _options(args: argparse.Namespace):
    from data_pipelines.wsi.grid import TileOptions
    from data_pipelines.wsi.tiling import TilingOptions
    from data_pipelines.wsi.tissue import TissueOptions

    if args.mpp is not None and not 0.01 <= args.mpp <= 50:
        raise ValueError(f"--mpp {args.mpp}: expected micrometres per pixel between 0.01 and 50")
    if args.workers < 1:
        raise ValueError(f"--workers {args.workers}: expected at least 1")
    tiles = TileOptions(
        args.target_mpp, args.tile_px, args.overlap, args.min_tissue, args.mpp_tolerance, args.min_sharpness
    )
    tissue = TissueOptions(
        args.tissue, args.segment_mpp, args.threshold, args.min_area, args.min_hole, ink=not args.keep_ink
    )
    return TilingOptions(tiles, tissue, args.mpp)


def _print_outcome(outcome) -> None:
    from data_pipelines.wsi.grid import REASONS

    rows = outcome.rows
    kept = f" ({outcome.kept} were done before)" if outcome.kept else ""
    total, area = sum(row["n_tiles"] for row in rows), sum(row["tissue_mm2"] for row in rows)
    print(f"{outcome.folder}: {len(rows)} slides{kept}, {total} tiles, {area:.4g} mm2 of tissue")
    counts = {reason: sum(row[reason] for row in rows) for reason in REASONS}
    print(f"left out: {', '.join(f'{count} {reason}' for reason, count in counts.items())}")
    _print_rejected(outcome.rejected)


def _print_rejected(rejected) -> None:
    import collections

    if not rejected:
        return
    counts = collections.Counter(row["reason"] for row in rejected)
    print(f"quarantine: {len(rejected)} slides: {', '.join(f'{n} {reason}' for reason, n in sorted(counts.items()))}")
    for row in rejected[:10]:
        print(f"  {row['file']}: {row['reason']}: {row['detail']}")
    if len(rejected) > 10:
        print("  ...; all are in quarantine.csv")
