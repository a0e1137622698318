"""Settings that every method shares, and the parser of `--config file.py:arg`."""

from __future__ import annotations

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder


def parse_arg(arg: str, flags: tuple[str, ...], values: dict[str, type]) -> dict:
    """Reads "er,fold=2,smoke": bare words are flags, key=value pairs are typed.

    Raises:
      ValueError: for a word that is neither, listing what is allowed.
    """
    out = {}
    for word in filter(None, (w.strip() for w in arg.split(","))):
        key, eq, value = word.partition("=")
        if not eq and key.lower() in flags:
            out[key.lower()] = True
        elif eq and key in values:
            out[key] = values[key](value)
        else:
            raise ValueError(
                f"config argument {word!r} is not known; words: {', '.join(flags)}; "
                f"settings: {', '.join(f'{k}=...' for k in values)}"
            )
    return out


def fold_value(text: str) -> str:
    """Checks "all" or a fold number; kept as text so that both fit one config key."""
    if text != "all" and not text.isdigit():
        raise ValueError(f"fold={text!r}: give 'all' or a fold number from 0")
    return text


def base() -> ConfigDict:
    """Data, splits, trainer, checkpoints, evaluation and report settings with their defaults."""
    cfg = ConfigDict()
    cfg.seed = 0
    cfg.task = "ER"
    cfg.task_kind = "classification"  # classification: classes of the label table | survival: follow-up per patient
    cfg.fold = "all"
    cfg.data = ConfigDict(
        dict(
            dir="",  # data set directory (manifest.json, shards, tables/)
            labels="",  # table of labels; empty: tables/labels.csv of the data set
            genes="",  # table of genes; empty: tables/genes.npz of the data set
            cnv="",  # table of copy numbers, only for variants with two gene streams
            survival="",  # table of survival; empty: tables/survival.csv of the data set
            clusters="",  # NPZ file of cluster ids (DeepAttnMISL); empty: fitted on the training part of every fold
            unit="case",  # case: one slide per case | slide: every slide is a sample, tables keyed by slide id
            feat_dim=1024,  # must match the data set; 0: taken from it
            slide_choice="first_sorted",  # first_sorted | largest_bag | listing_order | all: every slide, one bag
            missing_slides="exclude",  # cases or slides without features: exclude (and count) | error
            max_patches_train=placeholder(int),
            grouping="size_balanced",
            rows=0,  # packed rows per step; 0: one per device of the data axis
            chunk=512,  # patches per chunk of the pooling kernel
            pool="chunked",  # chunked: memory does not grow with the bag | segment: keeps all activations (small bags)
            row_multiple=128,  # packed rows are rounded up to a multiple of this; a last, shorter chunk costs a compile
            threads=2,
            buffer_mib=256,
            resident="off",  # cohort in device memory: off | auto (if it fits) | on (or fail)
            resident_dtype="stored",  # stored: bit-equal to reading from disk | int8: half of fp16, with a small error
            resident_gib=0.0,  # memory it may take on each device; 0: 80 % of what is free
            allow_patient_overlap=False,
        )
    )
    # protocol: corrected | published: the reported part is the validation part as well, and marked so.
    cfg.split = ConfigDict(dict(dir="", n_folds=5, val_fraction=0.2, stratify=True, seed=0, protocol="corrected"))
    # bins_from: cohort (as published) | train_fold. monitor: c_index | nll. Columns of another endpoint: time_column
    # (months) with event_column (1 = death) or censorship_column (1 = censored); empty: found by name.
    cfg.survival = ConfigDict(
        dict(
            n_bins=4,
            bins_from="cohort",
            monitor="c_index",
            time_column="",
            event_column="",
            censorship_column="",
        )
    )
    cfg.train = ConfigDict(
        dict(
            b=16,
            batching="packed",
            lr=2e-4,
            wd=1e-5,
            decay_bias=True,
            # adamw: decay beside the gradient | adam_l2: L2 in the gradient, as many authors train | radam and
            # lookahead_radam: rectified, decay beside the gradient | sgd: momentum betas[0], L2 in the gradient
            optimizer="adamw",
            betas=(0.9, 0.999),
            # constant | cosine50_floor0 | cosine50_periodic | cosine_to_max_epochs | cosine_to_floor (train.lr_floor) |
            # warmup_cosine (per step: one epoch up, then down to 0)
            lr_schedule="cosine50_floor0",
            lr_floor=0.0,
            max_epochs=100,
            sampler="class_balanced_replacement",
            drop_last=True,
            compute_dtype="float32",
            replica_loop="auto",  # trainings of one program: map (one after the other) | vmap | auto: by backend
        )
    )
    # monitor: mean_auc3 | student_auc | a metric of the summary (accuracy, weighted_f1, ...); enabled=False trains
    # max_epochs and keeps the last state.
    cfg.early_stop = ConfigDict(dict(enabled=True, monitor="mean_auc3", patience=5, min_epoch=5))
    cfg.ckpt = ConfigDict(dict(teachers="best_joint", every_epochs=5, keep=2))
    cfg.eval = ConfigDict(dict(teacher_dropout=False, slots=32))
    cfg.infer = ConfigDict(dict(mode="pathology", ensemble="none"))
    # data: devices that divide the rows of a step; 0, or several processes: all that `sequence` leaves. sequence:
    # devices that divide the patches of every row. fsdp: the data axis divides parameters and optimizer state as well.
    # replica: devices over which the trainings of a sweep are divided; 0: all. A run may be continued on another mesh.
    cfg.mesh = ConfigDict(dict(data=1, sequence=1, fsdp=False, replica=1))
    # control: train the same networks with every distillation weight at 0, for the paired comparison.
    cfg.compare = ConfigDict(dict(control=True))
    cfg.report = ConfigDict(dict(bootstrap=2000))
    return cfg


def override(cfg: ConfigDict, values: dict) -> None:
    """Sets dotted keys, e.g. {"loss.lambda_skd": 0.0}; unknown keys raise."""
    cfg.update_from_flattened_dict(values)


def image_pairs(cfg: ConfigDict) -> None:
    """Adds and sets what a configuration for image pairs (`histokd pairs`) has beyond or unlike `base`."""
    cfg.data.kind = "pairs"
    cfg.data.partner = "auto"  # auto: what the data set has | image | vector | none
    cfg.data.official_split = True  # parts that came with the data set; False: folds by group (split.n_folds)
    cfg.data.feat_dim = 0
    cfg.train.sampler = "uniform"
    # Any metric of the summary; on the validation part (split.protocol=published: the reported one).
    cfg.early_stop.monitor = "weighted_f1"
