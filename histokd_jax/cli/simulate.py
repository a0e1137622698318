"""Write an openly simulated cohort: log-normal bags with a planted tissue signal, tied to a gene programme and a label.

  histokd simulate --out data/sim                                       300 simulated cases
  histokd simulate --out data/sim --preset demo                         the small cohort of `histokd demo`
  histokd simulate --out data/sim --set n_cases=500 --set signal_patches=0.5
  histokd simulate --out data/brca --labels labels.csv --genes brca.csv.zip --tasks ER,PR,HER2
                                                                        real genes and labels, simulated bags
  histokd simulate --out data/pairs --kind pairs --set n_train=256        image pairs: grade plain in IHC, faint in H&E

The data set, its manifest, and everything made from it later say "simulated".
"""

from __future__ import annotations

import argparse
import pathlib

HELP = "write an openly simulated cohort"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `histokd simulate`."""
    parser.add_argument("--out", type=pathlib.Path, required=True, metavar="DIR", help="data set directory to write")
    parser.add_argument("--kind", choices=("bags", "pairs"), default="bags", help="bags of patches, or image pairs")
    parser.add_argument("--preset", choices=("default", "demo"), default="default", help="sizes to start from")
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", help="replace one field")
    parser.add_argument("--seed", type=int, default=0, help="seed of everything that is drawn")
    parser.add_argument("--labels", metavar="FILE", help="real label table: simulate only the bags")
    parser.add_argument("--genes", metavar="FILE", help="real gene table, needed with --labels")
    parser.add_argument("--tasks", default="ER,PR,HER2", help="label columns, needed with --labels")


def run(args: argparse.Namespace) -> int:
    """Writes the data set and says what it is."""
    if args.kind == "pairs":
        return _pairs(args)
    from data_pipelines import simulate

    spec = make_spec(simulate.DEMO if args.preset == "demo" else simulate.SimulationSpec(), args.set, args.seed)
    if args.labels or args.genes:
        from data_pipelines.simulate_table import simulate_bags_for_table

        if not (args.labels and args.genes):
            raise ValueError("--labels and --genes go together: both real tables are needed")
        tasks = tuple(filter(None, args.tasks.split(",")))
        manifest = simulate_bags_for_table(args.out, spec, labels_path=args.labels, genes_path=args.genes, tasks=tasks)
    else:
        manifest = simulate.simulate_cohort(args.out, spec)
    print(
        f"{args.out}: {len(manifest.slides)} simulated bags, {int(manifest.sizes.sum())} patches of width "
        f"{manifest.feat_dim} ({manifest.name})"
    )
    return 0


def _pairs(args: argparse.Namespace) -> int:
    from data_pipelines.pairs.simulate import PairSpec, simulate_pairs

    if args.labels or args.genes or args.preset != "default":
        raise ValueError("--labels, --genes and --preset are for bags; image pairs take --set and --seed")
    manifest = simulate_pairs(args.out, make_spec(PairSpec(), args.set, args.seed))
    height, width = manifest.image_size
    print(f"{args.out}: {len(manifest.examples)} simulated image pairs of {height}x{width} pixels ({manifest.name})")
    return 0


def make_spec(spec, changes: list[str], seed: int):
    """A simulation spec with fields replaced, typed by their defaults.

    Raises:
      ValueError: unknown field or a value of another type.
    """
    import dataclasses

    fields = {f.name: getattr(spec, f.name) for f in dataclasses.fields(spec)}
    values = {"seed": seed}
    for text in changes:
        name, eq, value = text.partition("=")
        if name not in fields or not eq:
            raise ValueError(f"--set {text}: expected FIELD=VALUE with FIELD one of {', '.join(fields)}")
        try:
            values[name] = type(fields[name])(value)
        except ValueError as error:
            raise ValueError(f"--set {text}: expected {type(fields[name]).__name__}") from error
    return dataclasses.replace(spec, **values)
