"""Turn the authors' PyTorch checkpoints into models of this library, or a model back into a state dict.

  histokd convert s_0_checkpoint.pt --config configs/supervised.py:clam_sb,classification --out models/clam
  histokd convert S_P=student.pt T_M=teacher.pt --config configs/mkd.py:er --out models/er
  histokd convert models/clam --to-torch --out clam.pt

Reads .pt, .pth (both layouts of torch.save) and .safetensors; PyTorch is not needed, and no code in a file is run.
Widths of patches and number of classes are taken from the tensors. Tells how many tensors were used, and which ones
the authors' code stores but never uses; a missing or unknown key and another shape are errors that name the key.
Time bins of survival models are not in a checkpoint: give those of the training cohort with --edges. Nor is the choice
of genes: with the result, only modes that read slides alone can predict.
"""

from __future__ import annotations

import argparse
import pathlib

HELP = "convert PyTorch checkpoints to models, and back"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `histokd convert`."""
    parser.add_argument("source", nargs="+", metavar="[NETWORK=]FILE", help="checkpoints; with --to-torch, a model")
    parser.add_argument("--out", type=pathlib.Path, required=True, help="model folder; with --to-torch, FILE.pt")
    parser.add_argument("--config", metavar="FILE.py[:ARGS]", help="network of the checkpoint and its options")
    parser.add_argument("--classes", default="", metavar="A,B", help="class names; default class_0,class_1,...")
    parser.add_argument("--edges", default="", metavar="M,M,...", help="survival: edges of the time bins in months")
    parser.add_argument("--encoder", default="", metavar="NAME", help="patch encoder that the model was trained on")
    parser.add_argument("--to-torch", action="store_true", help="write a state dict from a model folder")
    parser.add_argument("--network", default="", help="with --to-torch: which network of the folder, e.g. S_P")
    parser.set_defaults(takes_config=True)


def run(args: argparse.Namespace) -> int:
    """Converts and reports."""
    return _to_torch(args) if args.to_torch else _from_torch(args)


def _from_torch(args: argparse.Namespace) -> int:
    from histokd_jax.convert import models
    from histokd_jax.utils import config

    if not args.config:
        raise config.ConfigError("--config FILE.py[:ARGS] is needed: which network the checkpoint holds")
    cfg = config.load(args.config, args.overrides)
    named = [text.rpartition("=") for text in args.source]
    if len({name for name, _, _ in named}) < len(named):
        raise config.ConfigError("every checkpoint needs the name of its network: NETWORK=FILE")
    files = {name: pathlib.Path(file) for name, _, file in named}
    converted = models.from_checkpoints(cfg, files)
    sources = dict(zip(converted.matched, (file.name for file in files.values())))
    encoder = {"name": args.encoder} if args.encoder else None
    classes = [name for name in args.classes.split(",") if name]
    edges = _numbers(args.edges)
    models.write_model(args.out, cfg, converted, class_names=classes, edges=edges, encoder=encoder, source=sources)
    for group, matched in converted.matched.items():
        print(f"{group}: {matched.summary()}")
    spec = converted.spec
    print(f"patches of width {spec.feat_dim}, {spec.num_classes} outputs: {args.out}")
    return 0


def _numbers(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",") if part]
    except ValueError as error:
        raise ValueError(f"--edges {text}: expected numbers of months, e.g. 0,12.5,24,48,120") from error


def _to_torch(args: argparse.Namespace) -> int:
    from data_pipelines.torch_file import write_state_dict
    from histokd_jax.convert import models
    from histokd_jax.utils import config

    if len(args.source) != 1:
        raise config.ConfigError("--to-torch converts one model folder")
    tensors = models.to_checkpoint(pathlib.Path(args.source[0]), args.network)
    write_state_dict(args.out, tensors)
    print(f"{len(tensors)} tensors: {args.out}")
    return 0
