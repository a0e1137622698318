"""Predict from slides with a trained student; no genes and no teacher parameters are needed.

  histokd predict --model runs/er --data NEW_DATASET --out predictions.csv
  histokd predict --model runs/er/fold_0/model --data NEW_DATASET --out p.csv --attention attention/
  histokd predict --model runs/hmkd --data FOLDER_OF_TILES --out p.csv     models of image pairs: H&E images alone

A run directory applies all its folds (one row per slide and fold). --attention writes one CSV per slide with the
level-0 coordinates and the attention of each patch (first model only).
"""

from __future__ import annotations

import argparse
import pathlib

HELP = "predict from slides alone with a trained student"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `histokd predict`."""
    parser.add_argument("--model", type=pathlib.Path, required=True, help="RUN, RUN/fold_0 or a model folder")
    parser.add_argument("--data", type=pathlib.Path, required=True, metavar="DATASET", help="data set directory")
    parser.add_argument("--out", type=pathlib.Path, required=True, metavar="FILE.csv", help="predictions")
    parser.add_argument("--mode", default="", help="pathology, both or genomics; default: infer.mode of the model")
    parser.add_argument("--genes", default="", metavar="FILE", help="gene table, if the mode needs genes")
    parser.add_argument("--cnv", default="", metavar="FILE", help="copy-number table, for gmkdn modes that need it")
    parser.add_argument("--attention", type=pathlib.Path, metavar="DIR", help="also write attention per patch or token")
    parser.add_argument(
        "--pictures", type=pathlib.Path, metavar="DIR", help="image pairs: also draw the attention of every network"
    )
    parser.add_argument("--picture-count", type=int, default=8, metavar="N", help="how many images; default: 8")


def run(args: argparse.Namespace) -> int:
    """Writes the predictions."""
    from histokd_jax import inference

    folders = inference.model_folders(args.model)
    mode = args.mode or inference.default_mode(folders[0])
    table = inference.predict(folders, args.data, mode, genes=args.genes, cnv=args.cnv)
    inference.write_table(folders[0], args.out, table)
    print(f"{len(set(table.slide_id))} slides x {len(folders)} models: {args.out}")
    if args.attention:
        files = inference.export_attention(folders[0], args.data, mode, args.attention)
        print(f"attention of {len(files)} slides: {args.attention}")
    if args.pictures:
        print(f"{_draw(folders[0], args)} pictures: {args.pictures}")
    return 0


def _draw(folder: pathlib.Path, args: argparse.Namespace) -> int:
    """Teacher and student side by side on the first images."""
    from histokd_jax.report.attention import write_picture
    from histokd_jax.train.pair_attention import attend_all

    if args.picture_count < 1:
        raise ValueError(f"--picture-count {args.picture_count}: expected at least 1")
    shown = attend_all(folder, args.data, args.picture_count)
    for one in shown:
        write_picture(args.pictures / f"{one.example_id.replace('/', '_')}.png", one.image, one.partner, one.maps)
    return len(shown)
