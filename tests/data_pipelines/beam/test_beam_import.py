"""Work on Apache Beam gives the bytes of the local path; needs the extra `beam` (make test-beam)."""

import functools
import hashlib
import pathlib
import sys

import feature_folders as folders
import numpy as np
import pytest

from data_pipelines.beam import importing, stage
from data_pipelines.errors import DataError, DatasetExistsError, StorageError
from data_pipelines.importers import cases, plan, run
from data_pipelines.importers.sources import Options
from data_pipelines.planned_writer import work_folder

SLIDES = [f"TCGA-A{i // 10}-{i:04d}-01Z-00-DX1.{i:04x}" for i in range(12)]
CONTENT = folders.bags(SLIDES)
OPTIONS = {
    "default": (),
    "threads": ("--runner=DirectRunner", "--direct_num_workers=2", "--direct_running_mode=multi_threading"),
    "processes": ("--runner=DirectRunner", "--direct_num_workers=2", "--direct_running_mode=multi_processing"),
}


@pytest.fixture
def beam():
    return pytest.importorskip("apache_beam", reason="apache-beam is not installed: make test-beam runs this")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Twelve slides, an empty file and one with NaN."""
    root = tmp_path_factory.mktemp("trident")
    folder = folders.trident(root, CONTENT)
    (folder / "TCGA-A0-9999-DX1.h5").touch()
    damaged = CONTENT[SLIDES[5]][0].copy()
    damaged[0, 0] = np.nan
    folders.trident(root, {"TCGA-A0-9998-DX1": (damaged, CONTENT[SLIDES[5]][1])})
    return root


@pytest.fixture(scope="module")
def whole(source, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "out"
    run.run_import(make_plan(source), out)
    return digests(out)


def make_plan(source):
    rule = cases.CaseRule()
    return plan.make_plan(source, "trident", name="toy", options=Options(), rule=rule, shard_bytes=2000)


def digests(out):
    files = [path for path in sorted(out.rglob("*")) if path.is_file()]
    return {path.relative_to(out).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.mark.parametrize("options", [pytest.param(OPTIONS[name], id=name) for name in OPTIONS])
def test_import_on_beam_equals_the_local_one_byte_for_byte(beam, source, whole, tmp_path, options):
    outcome = importing.import_on_beam(make_plan(source), tmp_path / "out", options=options)
    assert digests(tmp_path / "out") == whole
    assert [item.reason for item in outcome.rejected] == ["not finite", "zero bytes"] and not outcome.already_complete
    again = importing.import_on_beam(make_plan(source), tmp_path / "out", options=options)
    assert again.already_complete and digests(tmp_path / "out") == whole


def test_beam_continues_a_local_import_and_the_other_way_round(beam, source, whole, tmp_path):
    made = make_plan(source)
    for name in ("beam", "local"):
        with work_folder(tmp_path / name) as work:
            for index in range(0, len(made.shards), 2):
                run.write_planned_shard(made, work, index, lambda count: None)
    outcome = importing.import_on_beam(made, tmp_path / "beam")
    assert outcome.shards_kept == len(range(0, len(made.shards), 2)) and digests(tmp_path / "beam") == whole
    run.run_import(made, tmp_path / "local")
    assert digests(tmp_path / "local") == whole


def test_beam_refuses_what_the_local_import_refuses(beam, source, tmp_path):
    features, coords = CONTENT[SLIDES[0]]
    folders.trident(tmp_path / "job", {SLIDES[0]: (features * np.nan, coords)})
    with pytest.raises(plan.NothingUsable, match="1 not finite"):
        importing.import_on_beam(make_plan(tmp_path / "job"), tmp_path / "none")
    assert not (tmp_path / "none" / "manifest.json").exists()
    folders.trident(tmp_path / "job", {SLIDES[1]: CONTENT[SLIDES[1]]})
    importing.import_on_beam(make_plan(tmp_path / "job"), tmp_path / "out")
    with pytest.raises(DatasetExistsError, match="--overwrite"):
        importing.import_on_beam(make_plan(source), tmp_path / "out")


def test_command_line(beam, source, whole, tmp_path, capsys):
    from histokd_jax.cli.main import main

    arguments = ["import", str(source), "--out", str(tmp_path / "toy"), "--beam=--runner=DirectRunner"]
    assert main(arguments) == 3
    assert "12 slides of 12 cases" in capsys.readouterr().out
    main([*arguments[:2], "--out", str(tmp_path / "local" / "toy")])
    assert digests(tmp_path / "toy") == digests(tmp_path / "local" / "toy")


def square(item, resource):
    if item < 0:
        raise StorageError(28, f"no space for {item}")
    return item * item + resource


def ten():
    return 10


def note(path, results):
    path.write_text(repr(list(results)))


def stage_of(items, folder):
    return stage.Stage("toy", items, square, functools.partial(note, folder / "done"), folder, setup=ten)


def test_results_arrive_in_the_order_of_the_items_and_failures_as_values(beam, tmp_path):
    stage.run(stage_of(list(range(40)), tmp_path))
    assert (tmp_path / "done").read_text() == repr([i * i + 10 for i in range(40)])
    stage.run(stage_of([], tmp_path))
    assert (tmp_path / "done").read_text() == "[]"
    (tmp_path / "done").unlink()
    with pytest.raises(StorageError, match="toy: 2 of 4 items failed, first -2: no space for -2; the same command"):
        stage.run(stage_of([1, -2, 3, -4], tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_failure_of_a_shard_is_named(beam, source, tmp_path, monkeypatch):
    def refuse(*arguments):
        raise StorageError(28, "writing shard failed: No space left on device; free some space")

    monkeypatch.setattr(run, "write_planned_shard", refuse)
    with pytest.raises(StorageError, match="import: .* items failed, first 0: .*free some space; the same"):
        importing.import_on_beam(make_plan(source), tmp_path / "out")
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_without_beam_the_remedy_is_named(source, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "apache_beam", None)
    with pytest.raises(DataError, match=r"pip install 'histokd_jax\[beam\]'"):
        importing.import_on_beam(make_plan(source), tmp_path / "out")
    assert not pathlib.Path(tmp_path / "out").exists()
