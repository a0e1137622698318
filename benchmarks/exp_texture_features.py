"""A real privileged view: colorectal patches whose teacher sees every feature family and whose student sees one.

    python -m benchmarks.exp_texture_features --data FOLDER [--only histogram_lower/kd ...] [--budget SECONDS]

3,336 patches, 8 classes, 5 folds over contiguous blocks of rows within each class, 5 seeds; the student reads one of
six families (first the smallest, 5 numbers), the teacher all of them. Every loss of the catalogue that applies to
vectors, at its customary weight, against the student alone: same initialisation, same batches, last epoch. Every
(family, term) is a file in --workdir, so an interrupted run continues; the JSON holds what is complete.
"""

from __future__ import annotations

import dataclasses
import hashlib
import pathlib
import time
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from benchmarks import common, texture
from benchmarks import experiment as ex
from histokd_jax.evals import bootstrap
from histokd_jax.losses import catalogue

SEEDS, FOLDS = (0, 1, 2, 3, 4), 5
ALONE, TEACHER = "student_alone", "teacher"
BLOCK = 21
"""Rows of a class that are resampled together: neighbours in the published file may come from one slide."""
_LINEAR = {"connector": "linear"}
_BOTH = {"connector": "linear", "width": 32}
_CHANGES: Mapping[str, Mapping[str, Any]] = {
    **{name: _LINEAR for name in ("fitnet", "cosine", "srd", "srrl", "cc_product", "coral", "mkd_coral", "mmd")},
    **{name: _BOTH for name in ("infonce", "infonce_pairs", "vicreg", "vicreg_original", "barlow", "crd")},
    "queue_infonce": _BOTH,
    "vid": {"connector": "mlp"},
    "ab": {**_LINEAR, "layers": "boundary"},
    "ofd": {**_LINEAR, "layers": "boundary"},
    "cmd": {"layers": "prob"},
    "hsic": {"options": {"kernel": "rbf"}},
}
"""What a term needs beside its weight: trained connectors where widths differ or the loss projects; pre-activations;
bounded activations (CMD); a bounded kernel (HSIC grows without end with a linear one)."""
_SAME = {"supervision_transfer": "the same function as fitnet"}
_SURVIVAL = ("hazard", "event")


def not_applicable() -> dict[str, str]:
    """Entries of the catalogue that are not run, and why."""
    maps = (catalogue.MAP, catalogue.MAP_PAIR)
    reasons = {name: "compares feature maps; these views are vectors" for name, e in catalogue.CATALOGUE.items()
               if e.reads in maps}  # fmt: skip
    reasons |= {name: "distils hazards of survival models" for name in _SURVIVAL}
    return {**reasons, **_SAME, **catalogue.NOT_OFFERED}


def settings(steps: int) -> dict[str, texture.Setting]:
    """Name -> what a student learns from; the student alone first."""
    found = {ALONE: texture.Setting({})}
    skipped = not_applicable()
    for name, entry in catalogue.CATALOGUE.items():
        if name in skipped:
            continue
        term = {"weight": entry.weight, **_CHANGES.get(name, {})}
        if name == "dkd":  # 20 of 240 epochs
            term |= {"schedule": "linear", "steps": max(steps // 12, 1)}
        found[name] = texture.Setting({name: term}, entry.ce, online=name in ("dml", "kdcl"))
    found["crd+kd"] = texture.Setting({"kd": 1.0, "crd": {"weight": 0.8, **_BOTH}})
    return found


def main() -> None:
    """Trains what is missing and writes the JSON."""
    parser = ex.parser(__doc__, "exp_texture_features", real_data=True)
    parser.add_argument("--only", nargs="*", metavar="FAMILY[/TERM]", help="train only these")
    parser.add_argument("--budget", type=float, default=np.inf, help="start no further part after so many seconds")
    parser.add_argument("--write-only", action="store_true", help="train nothing: write what is complete")
    args = parser.parse_args()
    began = ex.start(args)
    args.data = pathlib.Path(args.data)
    study = make_study(args)
    wanted = settings(study.per_epoch * study.recipe.epochs)
    if not args.write_only:
        run(args, study, wanted, began)
    write(args, study, wanted)


def make_study(args: Any) -> texture.Study:
    """Data, folds, seeds and recipe."""
    recipe = texture.Recipe(epochs=1, negatives=4, queue=128) if args.smoke else texture.Recipe()
    seeds, folds = (SEEDS[:1], 2) if args.smoke else (SEEDS, FOLDS)
    return texture.Study(texture.read(args.data), recipe, seeds, folds)


def chosen(args: Any, family: str, name: str) -> bool:
    """Whether --only asks for a part."""
    return not args.only or family in args.only or f"{family}/{name}" in args.only


def run(args: Any, study: texture.Study, wanted: Mapping[str, texture.Setting], began: float) -> None:
    """Trains the parts that are not there, the smallest family first; one compiled program per term."""
    shared: dict[str, Any] = {}
    programs: dict[str, Any] = {}
    for family in texture.FAMILIES:
        for name, setting in wanted.items():
            file = part(args, study, family, name, setting)
            if file.exists() or not chosen(args, family, name) or time.perf_counter() - began > args.budget:
                continue
            shared = shared or shared_inputs(args, study)
            train = programs.setdefault(name, jax.jit(jax.vmap(study.trainer(setting).train)))
            found = train({**shared, **study.inputs((family,), widest(study))})
            save(file, study, found)
            print(f"{family}/{name}: {summary(np.load(file))} after {time.perf_counter() - began:.0f} s", flush=True)


def widest(study: texture.Study) -> int:
    """Width to which the inputs of every family are padded."""
    return max(x.shape[1] for x in study.patches.features.values())


def shared_inputs(args: Any, study: texture.Study) -> dict[str, Any]:
    """Everything of the trainings but the student's features: teachers, their inputs, order of the batches."""
    everything = study.common()
    seen = study.inputs(texture.FAMILIES, sum(x.shape[1] for x in study.patches.features.values()))
    recipe = dataclasses.replace(study.recipe, student=study.recipe.teacher)
    teachers = dataclasses.replace(study, recipe=recipe).trainer(texture.Setting({}))
    # Another key than the students': a teacher must not start from what a student starts from.
    keys = jax.vmap(lambda key: jax.random.fold_in(key, 1))(everything["key"])
    found = jax.jit(jax.vmap(teachers.train))({**everything, **seen, "key": keys})
    file = args.workdir / f"teacher_{stamp(study, texture.Setting({}))}.npz"
    save(file, study, found)
    margins = study.teacher_margins(found["params"], seen["x"])
    return {**everything, "x_teacher": seen["x"], "teacher": found["params"], "margin": margins}


def stamp(study: texture.Study, setting: texture.Setting) -> str:
    """What a stored part depends on, besides the data."""
    facts = repr((study.recipe, study.seeds, study.n_folds, sorted(map(repr, setting.terms.items())), setting.ce,
                  setting.online))  # fmt: skip
    return hashlib.sha256(facts.encode()).hexdigest()[:12]


def part(args: Any, study: texture.Study, family: str, name: str, setting: texture.Setting) -> pathlib.Path:
    """File of one (family, term)."""
    return args.workdir / family / f"{name}_{stamp(study, setting)}.npz"


def save(file: pathlib.Path, study: texture.Study, found: Mapping[str, Any]) -> None:
    """Keeps the scores of all rows; a training that diverged is counted, not hidden."""
    logits = np.asarray(found["logits"], np.float64)
    diverged = ~np.isfinite(logits).all(axis=(1, 2))
    scores = study.scores(np.where(np.isfinite(logits), logits, 0.0))
    file.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(file, **scores, diverged=diverged, loss=np.asarray(found["loss"]))


def summary(scores: Mapping[str, np.ndarray]) -> str:
    """Accuracy and log loss in words."""
    return f"accuracy {scores['correct'].mean():.4f}, log loss {scores['nll'].mean():.3f}"


def write(args: Any, study: texture.Study, wanted: Mapping[str, texture.Setting]) -> None:
    """Gathers the tables of all families whose student alone is there."""
    derived: dict[str, Any] = {"smoke": True} if args.smoke else {}
    teacher = args.workdir / f"teacher_{stamp(study, texture.Setting({}))}.npz"
    if teacher.exists():
        derived["teacher"] = level(study, np.load(teacher))
    tables = {}
    for family in texture.FAMILIES:
        files = {name: part(args, study, family, name, setting) for name, setting in wanted.items()}
        found = {name: dict(np.load(file)) for name, file in files.items() if file.exists()}
        if ALONE in found:
            derived[f"alone.{family}"] = level(study, found[ALONE])
            tables[family] = table(study, found, 100 if args.smoke else ex.BOOTSTRAP)
    derived |= {f"ranked.{family}": rows for family, rows in tables.items() if rows}
    complete = {family: rows for family, rows in tables.items() if len(rows) == len(wanted) - 1}
    if len(complete) > 1:
        derived["ranked_mean_over_families"] = overall(complete)
    derived["complete_families"] = ", ".join(complete)
    common.write_result(
        args.out,
        benchmark="exp_texture_features",
        config=facts(study, wanted),
        metrics={},
        derived=derived,
        notes="Real colorectal H&E patches (Kather 2016, texture features), no images. No slide or patient ids exist: "
        "folds are contiguous blocks of rows within each class, so patches of one slide may lie on both sides and "
        "leakage cannot be excluded; accuracies are no estimate for new patients. Differences are to the student alone "
        "with the same initialisation and batches: mean over 5 seeds, 95 % interval from a bootstrap of blocks of "
        f"{BLOCK} neighbouring rows; folds_t is a t interval over folds, too narrow since training parts overlap. "
        "Weights are customary ones, mostly of image benchmarks; nothing was tuned on the reported folds. With about "
        "30 terms per family one or two intervals exclude 0 by chance.",
        devices=(jax.devices()[0].device_kind, jax.device_count()),
    )


def facts(study: texture.Study, wanted: Mapping[str, texture.Setting]) -> dict[str, Any]:
    """What was run, for the JSON."""
    widths = {name: x.shape[1] for name, x in study.patches.features.items()}
    return {
        "patches": len(study.patches.label),
        "classes": list(study.patches.classes),
        "families": widths,
        "absent_values": {name: int(np.isnan(x).sum()) for name, x in study.patches.features.items()},
        "folds": study.n_folds,
        "seeds": list(study.seeds),
        "split": "contiguous source_row blocks within class; no slide ids exist, leakage cannot be excluded",
        "tuning": "none: recipe and weights were fixed before the first training",
        "recipe": dataclasses.asdict(study.recipe),
        "settings": {name: dataclasses.asdict(setting) for name, setting in wanted.items()},
        "not_applicable": not_applicable(),
    }


def level(study: texture.Study, scores: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Accuracy and log loss of one side, over seeds."""
    by_seed = scores["correct"].mean(axis=1)
    return {
        "accuracy": float(by_seed.mean()),
        "sd_seeds": float(by_seed.std()),
        "log_loss": float(scores["nll"].mean()),
    }


def table(study: texture.Study, found: Mapping[str, Mapping[str, np.ndarray]], resamples: int) -> list[dict[str, Any]]:
    """One row per term, best first: accuracy, and the paired difference to the student alone."""
    alone = found[ALONE]
    weights = block_weights(study.patches.label, resamples)
    rows = [row(study, name, scores, alone, weights) for name, scores in found.items() if name != ALONE]
    return sorted(rows, key=lambda r: -r["difference"])


def row(study: texture.Study, name: str, scores, alone, weights: np.ndarray) -> dict[str, Any]:
    """One row of the table."""
    each = (scores["correct"].astype(float) - alone["correct"].astype(float)).mean(axis=0)
    drawn = bootstrap.percentile_interval(weights @ each / weights.sum(axis=1))
    t = bootstrap.paired_t_interval([each[study.fold == k].mean() for k in range(study.n_folds)])
    return {
        "term": name,
        "accuracy": float(scores["correct"].mean()),
        "difference": float(each.mean()),
        "ci_low": drawn.low,
        "ci_high": drawn.high,
        "excludes_0": bool(drawn.low > 0.0 or drawn.high < 0.0),
        "folds_t": f"[{t.low:+.4f}, {t.high:+.4f}]",
        "log_loss": float(scores["nll"].mean()),
        "diverged": int(scores["diverged"].sum()),
    }


def block_weights(label: np.ndarray, resamples: int, seed: int = 0) -> np.ndarray:
    """[resamples, n] how often every row is drawn: blocks of `BLOCK` neighbours of a class, with replacement."""
    rng, weights = np.random.default_rng(seed), np.zeros((resamples, len(label)), np.float64)
    for value in np.unique(label):
        rows = np.flatnonzero(label == value)
        blocks = np.arange(len(rows)) // BLOCK
        number = blocks[-1] + 1
        drawn = rng.multinomial(number, np.full(number, 1.0 / number), size=resamples)
        weights[:, rows] = drawn[:, blocks]
    return weights


def overall(tables: Mapping[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Terms by their mean difference over families, best first."""
    by_term: dict[str, list[dict[str, Any]]] = {}
    for rows in tables.values():
        for found in rows:
            by_term.setdefault(found["term"], []).append(found)
    rows = [
        {
            "term": term,
            "mean_difference": float(np.mean([r["difference"] for r in found])),
            "families_better": sum(r["ci_low"] > 0 for r in found),
            "families_worse": sum(r["ci_high"] < 0 for r in found),
            "families": len(found),
        }
        for term, found in by_term.items()
    ]
    return sorted(rows, key=lambda r: -r["mean_difference"])


if __name__ == "__main__":
    main()
