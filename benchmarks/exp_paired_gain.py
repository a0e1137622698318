"""What distillation bought on image pairs: the student alone, with each term of HM-KD, and with all of them.

    python -m benchmarks.exp_paired_gain [--budget SECONDS] [--real FOLDER] [--write-only] [--smoke]

Simulated pairs (`histokd simulate --kind pairs`): the grade is plain in the IHC image and faint in the H&E image. Every
seed draws its own training pairs, teacher, students and batches; all settings of a seed share the teacher, the initial
student and the batches. Test pairs are the same for all. Narrow networks on small tiles, a fixed number of epochs, the
last parameters; nothing is selected on the test pairs.

--real adds the crops of BCI (168 pixels, resized to 256 for both stages; grades of slides) with serial sections and
tiles with masks, which have no grade, as further training pairs. 16 crops show that the way works, not whether it
helps.

Every training is a file in --workdir, so an interrupted run continues; the JSON holds what is complete.
"""

from __future__ import annotations

import abc
import dataclasses
import functools
import hashlib
import pathlib
import time
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np

from benchmarks import common, paired_gain
from benchmarks import experiment as ex
from benchmarks.paired_gain import CLASSES, SETTINGS, Pairs, Recipe, Trainer
from data_pipelines.pairs.labels import HER2_CLASSES
from data_pipelines.pairs.simulate import PairSpec
from histokd_jax.evals import ablation
from histokd_jax.evals.predictions import Predictions, make_predictions
from histokd_jax.methods.hmkd.method import HE, HE_IHC

SEEDS = (0, 1, 2, 3, 4)
ALONE, TEACHER = "student_alone", "teacher"
SPEC = PairSpec(n_train=256, n_test=600, size=64, he_signal=1.0, ihc_signal=3.0)
SMALL = PairSpec(n_train=16, n_test=16, size=16, he_signal=1.0, ihc_signal=3.0)
TINY = (
    ("widths", (32, 40, 48, 64)), ("stem_patch", 2), ("teacher_depths", (0, 0, 0, 0)),
    ("student_depths", (0, 0, 0, 0)), ("mlp_ratio", 2), ("refine_min", 4), ("head_hidden", 8),
)  # fmt: skip
TEST_SEED = 1_000_000
METRICS = ("accuracy", "weighted_f1", "quadratic_kappa", "auroc")
REAL_FOLDS, REAL_SIDE = 4, 256


@dataclasses.dataclass(frozen=True, eq=False)
class Study(abc.ABC):
    """Data and trainings of one table.

    Attributes:
      name: of the table, and of its folder.
      recipe: how networks are trained.
      side: of the images.
      seeds: of everything that is drawn.
      folds: parts whose test predictions are joined to one table per seed.
      facts: what the data are.
      bootstrap: resamples of the test images.
    """

    name: str
    recipe: Recipe
    side: int
    seeds: tuple[int, ...]
    folds: int
    facts: Mapping[str, Any]
    bootstrap: int

    @abc.abstractmethod
    def data(self, seed: int, fold: int) -> tuple[Pairs, Pairs]:
        """(training pairs, test pairs) of one training."""

    def stamp(self) -> str:
        """What a stored training depends on."""
        facts = repr((self.recipe, self.side, self.folds, sorted(self.facts.items())))
        return hashlib.sha256(facts.encode()).hexdigest()[:12]


class Simulated(Study):
    """One fold; the pairs of a seed are drawn from it."""

    def data(self, seed: int, fold: int) -> tuple[Pairs, Pairs]:
        """See `Study.data`."""
        del fold
        spec = PairSpec(**self.facts["simulation"])
        train = paired_gain.simulated(dataclasses.replace(spec, seed=seed), "train")
        # Other draws than those of any training, the same for all.
        return train, paired_gain.simulated(dataclasses.replace(spec, seed=TEST_SEED), "test")


class Real(Study):
    """Every graded crop is tested once; the others and all pairs without grade are trained on."""

    def data(self, seed: int, fold: int) -> tuple[Pairs, Pairs]:
        """See `Study.data`."""
        graded, others = paired_gain.read_real(pathlib.Path(self.facts["folder"]), self.side)
        part = fold_of_rows(graded.label, self.folds, seed)
        return paired_gain.joined([graded.rows(np.flatnonzero(part != fold)), others]), graded.rows(
            np.flatnonzero(part == fold)
        )


def fold_of_rows(label: np.ndarray, folds: int, seed: int) -> np.ndarray:
    """[n] fold of every row: classes one after the other, in a drawn order, dealt out in turn."""
    order = np.random.default_rng(seed).permutation(len(label))
    order = order[np.argsort(label[order], kind="stable")]
    fold = np.empty(len(label), int)
    fold[order] = np.arange(len(label)) % folds
    return fold


def studies(args: Any) -> list[Study]:
    """The tables that are asked for."""
    recipe = Recipe(epochs=1, b=8, model=TINY) if args.smoke else Recipe()
    spec, seeds = (SMALL, SEEDS[:2]) if args.smoke else (SPEC, SEEDS)
    resamples = 50 if args.smoke else ex.BOOTSTRAP
    drawn = {key: value for key, value in dataclasses.asdict(spec).items() if key != "seed"}
    facts: dict[str, Any] = {"simulation": drawn, "simulated": True}
    found: list[Study] = [Simulated("simulated", recipe, spec.size, seeds, 1, facts, resamples)]
    if args.real:
        side = 32 if args.smoke else REAL_SIDE
        own = recipe if args.smoke else dataclasses.replace(recipe, b=8, model=_wider_stem(recipe.model))
        facts = {"folder": str(args.real), "resized": f"168 to {side} pixels (lanczos), both stages"}
        folds, seeds = (2, SEEDS[:1]) if args.smoke else (REAL_FOLDS, SEEDS[:3])
        found.append(Real("real", own, side, seeds, folds, facts, resamples))
    return found


def _wider_stem(model: tuple[tuple[str, Any], ...]) -> tuple[tuple[str, Any], ...]:
    return tuple((key, 32 if key == "stem_patch" else value) for key, value in model)


def parts(study: Study) -> Iterator[tuple[int, int, str]]:
    """(seed, fold, setting) of every training, a teacher before its students."""
    for seed in study.seeds:
        for fold in range(study.folds):
            yield from ((seed, fold, name) for name in (TEACHER, *SETTINGS))


def file_of(args: Any, study: Study, seed: int, fold: int, name: str) -> pathlib.Path:
    """Where a training is kept."""
    return args.workdir / study.name / f"{name}_seed{seed}_fold{fold}_{study.stamp()}.npz"


def main() -> None:
    """Trains what is missing and writes the JSON."""
    parser = ex.parser(__doc__, "exp_paired_gain", real_data=False)
    parser.add_argument("--real", type=pathlib.Path, metavar="FOLDER", help="folder with bci_her2, serial_sections_256")
    parser.add_argument("--budget", type=float, default=np.inf, help="start no further training after so many seconds")
    parser.add_argument("--write-only", action="store_true", help="train nothing: write what is complete")
    args = parser.parse_args()
    began = ex.start(args)
    wanted = studies(args)
    for study in wanted if not args.write_only else ():
        run(args, study, began)
    write(args, wanted)


def run(args: Any, study: Study, began: float) -> None:
    """Trains the parts that are not there."""
    trainer, held, data = None, (None, None, None), functools.lru_cache(maxsize=1)(study.data)
    for seed, fold, name in parts(study):
        file = file_of(args, study, seed, fold, name)
        if file.exists() or time.perf_counter() - began > args.budget:
            continue
        trainer = trainer or Trainer(study.recipe, study.side)
        start = time.perf_counter()
        train, test = data(seed, fold)
        if name == TEACHER:
            params, extra, losses = trainer.teacher(train, seed)
            probs = trainer.predict(HE_IHC, test, params, extra)
        else:
            if held[:2] != (seed, fold):
                known = read_teacher(file_of(args, study, seed, fold, TEACHER), trainer)
                held = seed, fold, trainer.ask(train, *known)
            params, extra, losses = trainer.student(train, seed, held[2], SETTINGS[name])
            probs = trainer.predict(HE, test, params, extra)
        seconds = time.perf_counter() - start
        save(file, test, probs, losses, seconds, (params, extra) if name == TEACHER else ())
        right = np.mean(probs.argmax(1) == test.label)
        print(f"{study.name}/{name}, seed {seed}, fold {fold}: accuracy {right:.3f}, {seconds:.0f} s", flush=True)


def save(file: pathlib.Path, test: Pairs, probs: np.ndarray, losses: np.ndarray, seconds: float, kept: Any) -> None:
    """Keeps the test predictions of a training, and the networks that later ones need."""
    file.parent.mkdir(parents=True, exist_ok=True)
    leaves = {f"leaf{i:05d}": np.asarray(leaf) for i, leaf in enumerate(jax.tree.leaves(kept))}
    facts = {"names": np.array(test.names), "label": test.label, "loss": losses, "seconds": seconds}
    unfinished = file.with_suffix(".tmp")
    with unfinished.open("wb") as stream:
        np.savez_compressed(stream, probs=probs, **facts, **leaves)
    unfinished.replace(file)


def read_teacher(file: pathlib.Path, trainer: Trainer) -> tuple[Any, Any]:
    """(parameters, statistics) that `save` kept."""
    params, extra = jax.eval_shape(trainer.init, jax.random.key(0))
    tree = jax.tree.structure((params[TEACHER], extra[TEACHER]))
    with np.load(file) as stored:
        return jax.tree.unflatten(tree, [stored[f"leaf{i:05d}"] for i in range(tree.num_leaves)])


def table_of(files: list[pathlib.Path]) -> Predictions | None:
    """The test predictions of all folds of a seed; None if one is missing. A training that diverged knows nothing."""
    if not all(file.exists() for file in files):
        return None
    stored = [np.load(file) for file in files]
    probs = np.concatenate([s["probs"] for s in stored])
    probs = np.where(np.isfinite(probs).all(axis=1, keepdims=True), probs, 1.0 / CLASSES)
    names = [str(name) for s in stored for name in s["names"]]
    label = np.concatenate([s["label"] for s in stored])
    return make_predictions(names, names, 0, "test", label, probs).sorted()


def collect(args: Any, study: Study) -> dict[str, dict[tuple[int, int], Predictions]]:
    """setting -> (seed, 0) -> predictions of what is complete."""
    found: dict[str, dict[tuple[int, int], Predictions]] = {}
    for name in (TEACHER, *SETTINGS):
        for seed in study.seeds:
            table = table_of([file_of(args, study, seed, fold, name) for fold in range(study.folds)])
            if table is not None:
                found.setdefault(name, {})[seed, 0] = table
    return found


def write(args: Any, wanted: list[Study]) -> None:
    """Writes every table whose student alone is there."""
    derived: dict[str, Any] = {"smoke": True} if args.smoke else {}
    metrics: dict[str, Any] = {}
    for study in wanted:
        found = collect(args, study)
        if ALONE not in found:
            derived[f"table.{study.name}"] = "no training of the student alone is complete"
            continue
        measure = dataclasses.replace(ablation.CLASSIFICATION, names=METRICS)
        table = ablation.ablation_table(found, ALONE, bootstrap=study.bootstrap, unit="slide", measure=measure)
        derived[f"table.{study.name}"] = table["rows"]
        derived[f"how.{study.name}"] = f"{table['how']}; reference: {ALONE}"
        derived[f"complete.{study.name}"] = {name: len(tables) for name, tables in found.items()}
        for name, tables in found.items():
            values = [float(np.mean(t.probs.argmax(1) == t.label)) for t in tables.values()]
            metrics[f"{study.name}/{name}/accuracy"] = common.metric(values, "share of test images")
        done = [file for part in parts(study) if (file := file_of(args, study, *part)).exists()]
        derived[f"diverged.{study.name}"] = [f.name for f in done if not np.isfinite(np.load(f)["loss"]).all()]
        for name in found:
            seconds = [float(np.load(f)["seconds"]) for f in done if f.name.startswith(f"{name}_seed")]
            metrics[f"{study.name}/{name}/seconds"] = common.metric(seconds, "s, compilation of the first included")
    spec = wanted[0].facts["simulation"]
    derived["best_accuracy_from_he"] = paired_gain.best_accuracy(spec["he_signal"])
    common.write_result(
        args.out or common.RESULTS / "exp_paired_gain.json",
        benchmark="exp_paired_gain",
        config={study.name: describe(study) for study in wanted},
        metrics=metrics,
        derived=derived,
        notes=(
            "Simulated images unless the table says real. Intervals: bootstrap over test images (training given), and "
            "t over seeds (test images given). best_accuracy_from_he: an ideal reader of the nuclear radius."
        ),
        devices=(jax.devices()[0].device_kind, 1),
    )


def describe(study: Study) -> dict[str, Any]:
    """What was run."""
    facts = {key: value for key, value in study.facts.items() if key != "folder"}
    recipe = {**dataclasses.asdict(study.recipe), "model": dict(study.recipe.model)}
    described = {"classes": list(HER2_CLASSES[:CLASSES]), "settings": {k: list(v) for k, v in SETTINGS.items()}}
    sizes = {"image_side": study.side, "seeds": list(study.seeds), "folds": study.folds}
    return {**described, **facts, **sizes, "recipe": recipe, "selection": "none: last parameters after all epochs"}


if __name__ == "__main__":
    main()
