"""`histokd`: train with every modality, deploy on H&E alone."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from logging import LogRecord

from absl import logging

from histokd_jax import __version__
from histokd_jax.cli import (
    convert,
    demo,
    embed,
    errors,
    evaluate,
    import_features,
    pairs,
    predict,
    probe,
    report,
    simulate,
    splits,
    sweep,
    tables,
    tile,
    train,
    validate,
)

COMMANDS = {
    "demo": demo,
    "simulate": simulate,
    "tile": tile,
    "import": import_features,
    "tables": tables,
    "embed": embed,
    "pairs": pairs,
    "validate": validate,
    "splits": splits,
    "train": train,
    "sweep": sweep,
    "evaluate": evaluate,
    "predict": predict,
    "probe": probe,
    "convert": convert,
    "report": report,
}

EPILOG = """\
A first session:
  histokd demo                                   everything end to end on a simulated cohort, a few minutes
  histokd simulate --out data/sim                write a simulated cohort
  histokd tile SLIDES --out job                  tissue and tile coordinates of whole-slide images
  histokd import FEATURE_FOLDER --out data/mine  bring your own cohort: CLAM, TRIDENT, STAMP, ... features
  histokd tables TABLE.csv --out data/mine       and its tables: MCAT, SurvPath, CLAM, STAMP, cBioPortal, ...
  histokd embed SLIDES --coords DIR --encoder uni --weights FILE --out data/mine    or slides and an encoder
  histokd train --config configs/mkd.py:er,fold=all --workdir runs/er --config.data.dir=DATASET
  histokd predict --model runs/er --data NEW_DATASET --out predictions.csv
"""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(
        prog="histokd", description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    top.add_argument("--version", action="version", version=f"histokd {__version__}")
    top.add_argument("--verbose", action="store_true", help="log what is read, planned and compiled")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, module in COMMANDS.items():
        sub = commands.add_parser(
            name,
            help=module.HELP,
            description=module.__doc__,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(sub)
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
      argv: arguments without the program name; None takes those of the process.

    Returns:
      Exit code: 0 success, 1 bad input or failure (one clear line on stderr), 130 interrupted after a checkpoint; a
        command may define others (`histokd import`, `tile`: 3, files in quarantine).
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    top = parser()
    args, rest = top.parse_known_args(argv)
    overrides = [text.removeprefix("--config.") for text in rest if text.startswith("--config.")]
    unknown = [text for text in rest if not text.startswith("--config.")]
    if unknown or (overrides and not getattr(args, "takes_config", False)):
        top.error(f"{args.command}: unknown arguments: {' '.join(unknown or rest)}")
    args.overrides, args.argv = overrides, ["histokd", *argv]
    logging.set_verbosity(logging.INFO if args.verbose else logging.WARNING)
    if not args.verbose:
        logging.get_absl_logger().addFilter(_without_checkpoint_threads)
    return _run(args)


def _run(args: argparse.Namespace) -> int:
    _read_flags()
    try:
        return COMMANDS[args.command].run(args) or 0
    except (Exception, KeyboardInterrupt) as error:
        code, text = errors.explain(error, args.command)
        if not text or (args.verbose and code == 1):
            raise
        print(text, file=sys.stderr)
        return code


def _without_checkpoint_threads(record: LogRecord) -> bool:
    """Orbax logs the traceback of every thread of a failed save; the error itself is reported once, by us."""
    return not (record.exc_info and "orbax" in record.pathname)


def _read_flags() -> None:
    """Grain's workers read absl flags, which raise unless the flags were parsed."""
    from absl import flags

    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()


if __name__ == "__main__":
    sys.exit(main())
