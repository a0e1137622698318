"""Replicas: equal to sequential runs, masked, resumable, alone in their failures, and without communication."""

import json
import pathlib
import re
import shutil

import jax
import numpy as np
import pytest
import tiny

from configs.ablations import mkd as ablations
from histokd_jax.evals.predictions import read_predictions
from histokd_jax.methods.mkd.method import make_method
from histokd_jax.train import feed, replica_loop, replica_step, replicas, run, sweep
from histokd_jax.train.checkpoint import CheckpointMismatchError
from histokd_jax.train.signals import Interrupted, StopRequest
from histokd_jax.train.state import init_params
from histokd_jax.types import DataSpec
from histokd_jax.utils import config

SEEDS = (0, 1)
# Early stopping decides when a replica ends; an epoch without improvement is enough.
EARLY = dict(early_stop__enabled=True, early_stop__patience=1, early_stop__min_epoch=0, train__max_epochs=3)


@pytest.fixture(scope="module")
def tiny_settings(cohort_dir):
    """changes -> {"full", "without_skd"} with every fold, as `histokd sweep` resolves them."""

    def make(**changes):
        texts = tiny.overrides(cohort_dir, **{"fold": "all", **EARLY, **changes})
        return config.load_sweep("configs/ablations/mkd.py:er,terms", texts, ["without_skd"])[0]

    return make


@pytest.fixture(scope="module")
def sequential(tiny_settings, tmp_path_factory):
    """The same trainings one by one: setting/seed_N as `histokd train` leaves it; read only."""
    root = tmp_path_factory.mktemp("sequential")
    for name, cfg in tiny_settings().items():
        for seed in SEEDS:
            run.train(sweep._plain(cfg, seed), root / name / f"seed_{seed}")
    return root


@pytest.fixture(scope="module")
def swept(tiny_settings, tmp_path_factory):
    """A finished sweep of one seed; read only."""
    path = tmp_path_factory.mktemp("swept")
    do_sweep(tiny_settings(), path, seeds=(0,))
    return path


def do_sweep(settings, path, seeds=SEEDS, **options):
    return sweep.train(sweep.prepare(settings, "full", seeds), path, **options)


def records(path):
    lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    noise = ("time_epoch", "time_data_wait", "input_bound_fraction", "patches_per_second")
    return [{k: v for k, v in line.items() if k not in noise} for line in lines]


def fold_directories(root):
    found = sorted(path.parent.relative_to(root) for path in root.glob("*/seed_*/fold_*/fold.json"))
    assert found
    return found


class StopAfter(StopRequest):
    """A request that arrives after a number of steps."""

    def __init__(self, steps):
        super().__init__()
        self._left = steps

    @property
    def requested(self):
        self._left -= 1
        return self._left < 0


@pytest.mark.parametrize(("loop", "devices"), [("map", 1), ("vmap", 1), pytest.param("map", 3, marks=pytest.mark.slow)])
def test_replicas_equal_sequential_runs(tiny_settings, sequential, tmp_path, monkeypatch, loop, devices):
    """2 folds x 2 seeds x 2 weights; on 3 devices one place of the last is filled up."""
    programs, compile_one = [], replica_step.ReplicaPrograms._compile

    def recording(self, *args, **kwargs):
        programs.append(compile_one(self, *args, **kwargs))
        return programs[-1]

    monkeypatch.setattr(replica_step.ReplicaPrograms, "_compile", recording)
    do_sweep(tiny_settings(train__replica_loop=loop, mesh__replica=devices), tmp_path)
    assert fold_directories(tmp_path) == fold_directories(sequential)
    assert len(fold_directories(tmp_path)) == 8
    for path in fold_directories(sequential):
        ours, theirs = records(tmp_path / path), records(sequential / path)
        assert len(ours) == len(theirs), path
        for mine, other in zip(ours, theirs):
            # A traced weight of 0 still reports its term; everything that a single run reports must be there.
            for key, value in other.items():
                expected = pytest.approx(value, rel=2e-4, abs=2e-5) if isinstance(value, float) else value
                assert mine[key] == expected, (path, key)
        for part in ("val", "test"):
            mine, other = (read_predictions(root / path / f"predictions_{part}.csv") for root in (tmp_path, sequential))
            np.testing.assert_allclose(mine.probs, other.probs, atol=2e-5)
            assert mine.case_id.tolist() == other.case_id.tolist()
    assert len(programs) == 2, "one training step and one prediction for the whole group"
    for program in programs:
        assert not re.search(r"all-(reduce|gather|to-all)|reduce-scatter|collective-permute", program.as_text())
    traces = {json.loads((tmp_path / path / "fold.json").read_text())["traces"] for path in fold_directories(tmp_path)}
    assert traces == {1}


@pytest.mark.parametrize("steps", [pytest.param(2, marks=pytest.mark.slow), 5])
def test_interrupted_sweep_continues_bit_for_bit(tiny_settings, swept, tmp_path, monkeypatch, steps):
    settings = tiny_settings()
    with monkeypatch.context() as patch:
        patch.setattr(sweep, "StopRequest", lambda: StopAfter(steps))
        with pytest.raises(Interrupted, match="run the same command again"):
            do_sweep(settings, tmp_path, seeds=(0,))
    assert not list(tmp_path.glob("*/seed_*/fold_*/fold.json")) and list((tmp_path / "groups").glob("*/checkpoints/*"))
    do_sweep(settings, tmp_path, seeds=(0,))
    assert not list((tmp_path / "groups").iterdir()), "checkpoints of finished groups are removed"
    for path in fold_directories(swept):
        assert records(tmp_path / path) == records(swept / path)
        for part in ("val", "test"):
            name = f"predictions_{part}.csv"
            assert (tmp_path / path / name).read_bytes() == (swept / path / name).read_bytes()
    assert (tmp_path / "table.csv").read_bytes() == (swept / "table.csv").read_bytes()


def test_finished_trainings_are_kept_and_seeds_can_be_added(tiny_settings, swept, sequential, tmp_path):
    work = shutil.copytree(swept, tmp_path / "sweep")
    before = {p: (work / p / "fold.json").stat().st_mtime_ns for p in fold_directories(work)}
    table = do_sweep(tiny_settings(), work)
    assert {p: (work / p / "fold.json").stat().st_mtime_ns for p in before} == before
    assert fold_directories(work) == fold_directories(sequential)
    assert {row["seeds"] for row in table["rows"]} == {2} and {row["pairs"] for row in table["rows"]} == {4}


def test_a_part_that_was_interrupted_with_other_trainings_is_refused(tiny_settings, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(sweep, "StopRequest", lambda: StopAfter(1))
        with pytest.raises(Interrupted):
            do_sweep(tiny_settings(), tmp_path)
    with pytest.raises(CheckpointMismatchError, match="full, seed 1, fold 0.*remove the folder"):
        do_sweep(tiny_settings(), tmp_path, seeds=(0,))


def test_a_diverging_replica_is_stopped_alone_and_reported(tiny_settings, swept, tmp_path):
    settings = tiny_settings()
    bad = config.ConfigDict(settings["full"].to_dict())
    bad.loss.lambda_coral = 1e38
    found = do_sweep({**settings, "exploding": bad.lock()}, tmp_path, seeds=(0,))
    assert sorted(found["failed"]) == [f"exploding, seed 0, fold {k}" for k in (0, 1)]
    assert all("NaN or infinite" in why and "epoch 0" in why for why in found["failed"].values())
    for k in (0, 1):
        saved = json.loads((tmp_path / "exploding" / "seed_0" / f"fold_{k}" / "failed.json").read_text())
        assert saved["replica"] == f"exploding, seed 0, fold {k}" and saved["epoch"] == 0
    assert not (tmp_path / "exploding" / "seed_0" / "summary.json").exists()
    text = (tmp_path / "table.md").read_text()
    assert "## Not finished" in text and "exploding, seed 0, fold 1" in text
    for path in fold_directories(swept):
        mine, other = (read_predictions(root / path / "predictions_test.csv") for root in (tmp_path, swept))
        np.testing.assert_allclose(mine.probs, other.probs, atol=2e-5)
    again = do_sweep({**settings, "exploding": bad.lock()}, tmp_path, seeds=(0,))
    assert again["failed"] == found["failed"], "what failed is reported again, not trained again"


@pytest.mark.parametrize("loop", ["map", "vmap"])
def test_inactive_replicas_keep_every_bit(tiny_settings, loop):
    group, stage, state, batches = started(tiny_settings(train__replica_loop=loop))
    before = jax.device_get(state.params)
    active = np.array([True, False, True, False])
    state, loss = group.programs.train(stage, state, batches, np.full(4, 1e-3, np.float32), group.values, active)
    assert (np.asarray(loss) != 0).tolist() == active.tolist()
    assert state.step.tolist() == active.astype(int).tolist()
    pairs = list(zip(jax.tree.leaves(before), jax.tree.leaves(jax.device_get(state.params)), strict=True))
    for old, new in pairs:
        np.testing.assert_array_equal(old[~active], new[~active])
    assert all(any((old[r] != new[r]).any() for old, new in pairs) for r in np.flatnonzero(active))


def test_the_map_loop_updates_the_states_in_place(tiny_settings):
    """Temporaries are those of one replica, whatever the number of replicas."""
    temporaries, states = [], []
    for names in (["full"], ["full", "without_skd"]):
        settings = tiny_settings(train__replica_loop="map")
        group, stage, state, batches = started({name: settings[name] for name in names})
        count = len(group.replicas)
        states.append(sum(leaf.nbytes for leaf in jax.tree.leaves((state.params, state.opt_state))) / count)
        group.programs.train(stage, state, batches, np.zeros(count, np.float32), group.values, np.ones(count, bool))
        (program,) = group.programs._compiled.values()
        temporaries.append(program.memory_analysis().temp_size_in_bytes)
    assert temporaries[1] - temporaries[0] < states[0], "two more replicas must not need two more temporary states"


def started(settings):
    """(group of settings x 2 folds, its stage, state at step 0, stacked batches)."""
    plan = sweep.prepare(settings, "full", (0,))
    trainer = sweep._Trainer(plan, plan.groups[0], None, (), StopRequest(), 0, "")
    first = plan.experiments["full"]
    programs = run.make_programs(first, trainer.method)
    feeder = feed.StreamFeeder(programs.mesh, 1)
    folds = dict(enumerate(replicas.align([trainer._plan(first, k) for k in plan.folds])))
    members = []
    for member in plan.members(plan.groups[0]):
        experiment = plan.experiments[member.setting]
        arm = run.Arm(experiment, folds, pathlib.Path("not written"), {}, "")
        job = arm.job(member.fold, programs, feeder)
        members.append(replica_loop.Replica(str(member), job, trainer._values(experiment.cfg)))
    group = replica_loop._Group(members, [replica_loop.Standing() for _ in members], None, [], StopRequest(), "")
    streams = replica_loop._Streams(feeder, [data.train for data in group.data])
    fed = streams.advance({stream: 0 for stream in range(len(group.data))})
    stage = group.method.stages[0]
    starts = [init_params(group.method, 0)] * len(members)
    state = group.programs.start(stage, starts, fed[0].batch, group.values)
    return group, stage, state, group._stacked(fed)


def all_settings(words="er"):
    settings, reference = config.load_sweep(f"configs/ablations/mkd.py:{words}")
    assert reference == "full"
    methods = {
        name: make_method(cfg, DataSpec(cfg.data.feat_dim, 2, cfg.genes.top_k)) for name, cfg in settings.items()
    }
    return settings, methods


def test_the_ablation_list_is_grouped_by_graph():
    settings, methods = all_settings()
    groups = replicas.group_settings(settings, methods)
    assert groups[0].settings == (
        *("full", "without_mkd", "without_coral", "without_or", "without_skd", "without_clod", "genes_bottom"),
        *("genes_random", "alpha_half", "alpha_one", "temperature_2", "temperature_6", "temperature_8"),
    )
    assert set(groups[0].varying) == set(methods["full"].traced)
    alone = [group.settings for group in groups[1:]]
    assert alone == [
        ("no_distillation",),
        ("fusion_concat",),
        *((f"genes_{k}",) for k in (512, 1024, 2048, 4096, 17920)),
    ]
    assert all(not group.varying for group in groups[1:])


def test_all_families_name_what_their_settings_change():
    settings, methods = all_settings("er,all")
    assert len(settings) == 1 + sum(map(len, ablations.FAMILIES.values()))
    assert len(replicas.group_settings(settings, methods)) == 17


@pytest.mark.parametrize(
    ("changes", "together"),
    [
        ({"loss.lambda_skd": 0.0}, True),
        ({"seed": 5, "train.lr": 1e-3}, True),
        ({"mkd.alpha": 1.0}, True),
        ({"genes.filter": "random"}, True),
        ({"train.wd": 0.0}, False),
        ({"train.b": 8}, False),
        ({"skd.stop_grad_teacher": True}, False),
        ({f"loss.lambda_{name}": 0.0 for name in ("coral", "or", "skd", "clod")}, False),
    ],
)
def test_settings_share_a_group_if_and_only_if_they_differ_in_data_only(changes, together):
    base = config.load("configs/mkd.py:er")
    other = config.ConfigDict(base.to_dict())
    other.update_from_flattened_dict(changes)
    settings = {"a": base, "b": other}
    methods = {name: make_method(cfg, DataSpec(1024, 2, 8192)) for name, cfg in settings.items()}
    assert (len(replicas.group_settings(settings, methods)) == 1) == together


def test_layout_shares_streams_within_a_device_only():
    layout = replica_step.make_layout([0, 0, 1, 1, 2], 2)
    assert layout.streams == ((0, 1), (1, 2)) and layout.place.tolist() == [0, 0, 1, 0, 1, 1]
    assert (layout.count, layout.padded, layout.per_device) == (5, 6, 3)
    one = replica_step.make_layout([0, 1, 0], 1)
    assert one.streams == ((0, 1),) and one.place.tolist() == [0, 1, 0]


def test_parts_fit_into_memory_and_are_nearly_equal():
    streams = [0, 0, 1, 1, 2, 2, 3]
    assert replicas.split_to_fit(range(7), streams, 10, 100, 10**6) == [list(range(7))]
    parts = replicas.split_to_fit(range(7), streams, 10, 100, 260)
    assert [len(part) for part in parts] == [4, 3] or [len(part) for part in parts] == [3, 4]
    assert sum(parts, []) == list(range(7))
    assert [len(p) for p in replicas.split_to_fit(range(7), streams, 10, 100, 10**6, most=3)] == [2, 3, 2]
    with pytest.raises(ValueError, match="one replica needs"):
        replicas.split_to_fit(range(7), streams, 200, 100, 260)


@pytest.mark.parametrize(
    ("name", "platform", "loop"), [("auto", "cpu", "map"), ("auto", "gpu", "vmap"), ("vmap", "cpu", "vmap")]
)
def test_the_loop_is_chosen_by_backend(name, platform, loop):
    assert replica_step.resolve_loop(name, platform) == loop


def test_bad_settings_are_refused_before_anything_is_trained(tiny_settings):
    with pytest.raises(ValueError, match="replica_loop='scan'.*auto, map, vmap"):
        sweep.prepare(tiny_settings(train__replica_loop="scan"), "full", (0,))
    with pytest.raises(ValueError, match="mesh.data=2.*mesh.replica"):
        sweep.prepare(tiny_settings(mesh__data=2), "full", (0,))
    with pytest.raises(ValueError, match="each once"):
        sweep.prepare(tiny_settings(), "full", (1, 1))
    with pytest.raises(ValueError, match="setting full: .*128"):
        sweep.prepare(tiny_settings(genes__top_k=128), "full", (0,))
    with pytest.raises(ValueError, match="mesh.replica=9, but 8"):
        sweep.prepare(tiny_settings(mesh__replica=9), "full", (0,))
