"""An import gives the same bytes whatever the workers and whether or not it was killed; plain TFDS opens it."""

import datetime
import hashlib
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import time

import feature_folders as folders
import numpy as np
import pytest
from test_layouts import imported

from data_pipelines import planned_writer
from data_pipelines.errors import DataError, DatasetExistsError
from data_pipelines.importers import cases, plan, run
from data_pipelines.importers.sources import Options
from data_pipelines.manifest import Manifest
from data_pipelines.reader import BagReader

ROOT = pathlib.Path(__file__).parents[3]
SLIDES = [f"TCGA-A{i // 10}-{i:04d}-01Z-00-DX1.{i:04x}" for i in range(24)]
CONTENT = folders.bags(SLIDES)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    root = tmp_path_factory.mktemp("trident")
    folder = folders.trident(root, CONTENT)
    (folder / "TCGA-A0-9999-DX1.h5").touch()
    damaged = CONTENT[SLIDES[5]][0].copy()
    damaged[0, 0] = np.nan
    folders.trident(root, {"TCGA-A0-9998-DX1": (damaged, CONTENT[SLIDES[5]][1])})
    return root


@pytest.fixture(scope="module")
def whole(source, tmp_path_factory):
    """An uninterrupted import by one worker."""
    out = tmp_path_factory.mktemp("whole") / "out"
    imported(source, out, dtype="float16")
    return out


def digests(out):
    files = [path for path in sorted(out.rglob("*")) if path.is_file()]
    return {path.relative_to(out).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def make_plan(source, **options):
    return plan.make_plan(
        source, "trident", name="toy", options=Options(), rule=cases.CaseRule(), shard_bytes=2000, **options
    )


def test_import_has_several_shards_and_its_files(whole):
    names = set(digests(whole))
    assert sum("array_record" in name for name in names) > 4
    assert {"manifest.json", "slides.csv", "sources.csv", "quarantine.csv"} <= names
    assert not [name for name in names if name.startswith(".")]
    assert {item[2] for item in map(str.split, (whole / "quarantine.csv").read_text().splitlines()) if len(item) > 2}


def test_number_of_workers_does_not_change_a_byte(source, whole, tmp_path):
    steps = []
    outcome = run.run_import(make_plan(source), tmp_path / "out", workers=3, progress=steps.append)
    assert digests(tmp_path / "out") == digests(whole)
    assert sum(steps) == len(SLIDES) + 1 and [item.reason for item in outcome.rejected] == ["not finite", "zero bytes"]


SCRIPT = """
import sys, pathlib, time
from data_pipelines import planned_writer
from data_pipelines.importers import cases, plan, run
from data_pipelines.importers.sources import Options
if __name__ == "__main__":
    made = plan.make_plan(pathlib.Path(sys.argv[1]), "trident", name="toy", options=Options(), rule=cases.CaseRule(),
                          shard_bytes=2000)
    run.run_import(made, pathlib.Path(sys.argv[2]), workers=int(sys.argv[3]),
                   progress=lambda n: (print("slide", flush=True), time.sleep(0.02)))
"""


@pytest.mark.parametrize("workers", [1, 2])
def test_killed_import_resumes_to_the_same_bytes(source, whole, tmp_path, workers):
    script, out = tmp_path / "script.py", tmp_path / "out"
    script.write_text(SCRIPT)
    command = [sys.executable, str(script), str(source), str(out), str(workers)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment, start_new_session=True) as process:
        for _ in range(12):
            assert process.stdout.readline()
        os.kill(process.pid, signal.SIGKILL)
    assert not (out / "manifest.json").exists()
    assert (out / planned_writer.WORK_FOLDER).is_dir()
    wait_for_finished_shards(out)
    outcome = run.run_import(make_plan(source), out, workers=1)
    assert outcome.shards_kept >= 1
    assert digests(out) == digests(whole)


def wait_for_finished_shards(out):
    """Workers notice the end of their parent within a second; what they leave behind must do no harm."""
    deadline = time.monotonic() + 20
    while not list((out / planned_writer.WORK_FOLDER).glob("shard-*.json")) and time.monotonic() < deadline:
        time.sleep(0.1)


@pytest.mark.parametrize("seed", [0, 1, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(2, 8))])
def test_import_killed_again_and_again_at_random_moments_ends_in_the_same_bytes(source, whole, tmp_path, seed):
    """kill -9 after a random number of slides and a random pause, of the process alone or with its workers."""
    rng, out, script = np.random.default_rng(seed), tmp_path / "out", tmp_path / "script.py"
    script.write_text(SCRIPT)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    for _ in range(3):
        command = [sys.executable, str(script), str(source), str(out), str(rng.integers(1, 3))]
        with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment, start_new_session=True) as process:
            for _ in range(rng.integers(0, len(SLIDES) + 2)):
                process.stdout.readline()  # empty once the process has ended
            time.sleep(rng.exponential(0.03))
            kill = os.killpg if rng.random() < 0.5 else os.kill
            kill(process.pid, signal.SIGKILL)
        assert not (out / "manifest.json").exists() or digests(out) == digests(whole), "complete means complete"
    run.run_import(make_plan(source), out, workers=1)
    assert digests(out) == digests(whole)


def test_written_files_hold_no_time_host_user_or_path(source, whole, tmp_path, monkeypatch):
    copy = tmp_path / "elsewhere"
    shutil.copytree(source, copy)
    for path in copy.rglob("*.h5"):
        os.utime(path, (1_000_000_000, 1_000_000_000))
    monkeypatch.setattr(time, "time", lambda: 1.0)
    monkeypatch.setenv("TZ", "Pacific/Kiritimati")
    run.run_import(make_plan(copy), tmp_path / "out")
    assert digests(tmp_path / "out") == digests(whole)
    now = datetime.datetime.now(datetime.UTC)
    words = {str(source), str(copy), str(tmp_path), socket.gethostname(), now.strftime("%Y-%m-%d"), "site-packages"}
    for path in filter(pathlib.Path.is_file, (tmp_path / "out").rglob("*")):
        content = path.read_bytes()
        assert not [word for word in words if len(word) > 3 and word.encode() in content], path.name


@pytest.mark.parametrize("moved", [1, 4, 99])
def test_killed_while_files_get_their_names(source, whole, tmp_path, monkeypatch, moved):
    out, replace, count = tmp_path / "out", os.replace, []

    class Killed(BaseException):
        pass

    def replace_some(path, target):
        if "array_record" in str(target) or str(target).endswith("manifest.json"):
            count.append(target)
            if len(count) > moved or str(target).endswith("manifest.json"):
                raise Killed
        replace(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", replace_some)
        with pytest.raises(Killed):
            run.run_import(make_plan(source), out)
    outcome = run.run_import(make_plan(source), out)
    assert outcome.shards_kept == len(make_plan(source).shards)
    assert digests(out) == digests(whole)


def test_repetition_changes_nothing_and_other_content_is_not_overwritten(source, whole, tmp_path):
    out = tmp_path / "out"
    run.run_import(make_plan(source), out)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    again = run.run_import(make_plan(source), out)
    assert again.already_complete and len(again.rejected) == 2
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before
    with pytest.raises(DatasetExistsError, match="--overwrite"):
        run.run_import(make_plan(source, seed=1), out)
    assert digests(out) == digests(whole)
    run.run_import(make_plan(source, seed=1), out, overwrite=True)
    assert Manifest.load(out).seed == 1


def test_a_source_that_changed_after_the_kill_is_read_again(tmp_path):
    content = dict(list(CONTENT.items())[:6])
    folder = folders.trident(tmp_path / "job", content)
    made = make_plan(tmp_path / "job")
    with planned_writer.work_folder(tmp_path / "out") as work:
        for index in range(len(made.shards)):
            run.write_planned_shard(made, work, index, lambda n: None)
    features, coords = content[SLIDES[0]]
    changed = {**content, SLIDES[0]: (features + 1, coords)}
    size = (folder / f"{SLIDES[0]}.h5").stat().st_size
    folders.trident(tmp_path / "job", {SLIDES[0]: changed[SLIDES[0]]})
    assert (folder / f"{SLIDES[0]}.h5").stat().st_size == size
    outcome = run.run_import(make_plan(tmp_path / "job"), tmp_path / "out")
    assert outcome.shards_kept == len(made.shards) - 1
    found = np.sort(BagReader(tmp_path / "out").read_bag(0)[0], axis=0)
    np.testing.assert_array_equal(found, np.sort((features + 1).astype(np.float16), axis=0))


def test_two_imports_into_one_folder_are_refused(source, tmp_path):
    with planned_writer.work_folder(tmp_path / "out"):
        with pytest.raises(DataError, match="another process is writing"):
            run.run_import(make_plan(source), tmp_path / "out")


def test_only_unusable_slides_leave_no_dataset(tmp_path):
    features, coords = CONTENT[SLIDES[0]]
    folders.trident(tmp_path / "job", {SLIDES[0]: (features * np.nan, coords)})
    with pytest.raises(plan.NothingUsable, match="1 not finite"):
        run.run_import(make_plan(tmp_path / "job"), tmp_path / "out")
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_shards_are_planned_like_a_sequential_writer():
    assert planned_writer.plan_shards([5, 5, 5, 20, 1], 10) == [range(0, 2), range(2, 3), range(3, 4), range(4, 5)]
    assert planned_writer.plan_shards([], 10) == []


def test_same_records_as_the_sequential_writer(whole, tmp_path):
    """The two writers differ in how shards are cut, not in what a record holds."""
    from data_pipelines.writer import DatasetWriter

    with DatasetWriter(tmp_path / "seq", name="toy", feat_dim=8) as writer:
        for slide in sorted(CONTENT):
            writer.add(slide, slide[:12], *CONTENT[slide])
    one, other = BagReader(tmp_path / "seq"), BagReader(whole)
    for row in range(len(SLIDES)):
        for a, b in zip(one.read_bag(row), other.read_bag(row)):
            np.testing.assert_array_equal(a, b, strict=True)


def test_opens_with_plain_tensorflow_datasets(whole):
    import tensorflow_datasets as tfds

    examples = tfds.builder_from_directory(str(whole)).as_data_source("train")
    assert "tensorflow" not in sys.modules
    reader = BagReader(whole)
    assert len(examples) == sum(shard.n_records for shard in reader.manifest.shards)
    for row, slide in enumerate(reader.manifest.slides):
        first = examples[row]  # one record per slide at this size, in the order of the slides
        assert first["slide_id"] in (slide.slide_id, slide.slide_id.encode())
        found = first["patches"]
        found = np.frombuffer(found, np.float16).reshape(-1, 8) if isinstance(found, bytes) else found
        np.testing.assert_array_equal(found, reader.read_bag(row)[0])
