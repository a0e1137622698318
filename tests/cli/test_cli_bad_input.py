"""Bad input through `histokd train`: one clear message that names the culprit and the fix, and a non-zero exit."""

import csv
import errno
import json
import os
import pathlib
import shutil
import subprocess
import sys

import numpy as np
import pytest
import tiny

from data_pipelines.tables import read_gene_table, write_gene_table
from data_pipelines.writer import DatasetWriter
from histokd_jax.train import checkpoint, loop


@pytest.fixture
def refused(histokd, cohort_dir, tmp_path):
    """Runs a tiny training that must be refused; returns the message."""

    def call(*flags, data=cohort_dir, workdir=tmp_path / "run", **changes):
        shown = histokd(*tiny.train_arguments(data, workdir, *flags, **changes))
        assert shown.code == 1
        assert shown.err.startswith("histokd train: ")
        return shown.err

    return call


@pytest.fixture
def data(cohort_dir, tmp_path):
    """A copy of the data set, free to be damaged."""
    return shutil.copytree(cohort_dir, tmp_path / "data")


def rows_of(path):
    with path.open(newline="") as stream:
        return list(csv.reader(stream))


def write_rows(path, rows):
    with path.open("w", newline="") as stream:
        csv.writer(stream).writerows(rows)


@pytest.mark.parametrize(
    ("key", "near"), [("loss.lambda_sdk", "loss.lambda_skd"), ("train.lrr", "train.lr"), ("genes.topk", "genes.top_k")]
)
def test_unknown_config_key_is_refused_with_the_nearest_names(histokd, tmp_path, key, near):
    shown = histokd("train", "--config", tiny.CONFIG, "--workdir", tmp_path, f"--config.{key}=1")
    assert shown.code == 1 and f"unknown config key {key!r}" in shown.err and near in shown.err


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ("configs/none.py", "mkd.py"),
        ("configs/mkd.py:err", "er, pr, her2"),
        ("configs/mkd.py:fold=x", "fold"),
    ],
)
def test_unknown_configuration_is_refused(histokd, tmp_path, config, named):
    shown = histokd("train", "--config", config, "--workdir", tmp_path)
    assert shown.code == 1 and named in shown.err


def test_workdir_is_asked_for(histokd):
    shown = histokd("train", "--config", tiny.CONFIG)
    assert shown.code == 1 and "--workdir" in shown.err


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"genes__top_k": 30}, ("genes.top_k = 30", "not divisible", "token_size = 16")),
        ({"train__b": 1}, ("train.b = 1", ">= 2")),
        ({"teachers": "()"}, ("teachers is empty", "lambda")),
        ({"teachers": "G", "infer__mode": "both"}, ("infer.mode", "needs teacher 'M'")),
        ({"inter_loss": "crd"}, ("crd", "infonce")),
        ({"inter_loss": "spp"}, ("inter_loss", "sp")),
        ({"train__batching": "pakced"}, ("train.batching", "packed")),
        ({"loss__lambda_skd": -1}, ("loss.lambda_skd", ">= 0")),
        ({"model__dropout": 1.5}, ("model.dropout", "[0, 1)")),
        ({"variant": "gmkdn"}, ("copy-number", "data.cnv")),
        ({"variant": "gmkdn", "fusion__type": "concat"}, ("gmkdn", "bilinear")),
        (
            {
                "distill__schedule": "two_stage",
                "teachers": "()",
                **{f"loss__lambda_{n}": 0 for n in ("coral", "or", "skd", "clod")},
            },
            ("two_stage", "online"),
        ),
        ({"data__feat_dim": 1024}, ("12-d patches", "expects 1024", "data.feat_dim=12")),
        ({"genes__top_k": 128}, ("128", "64")),
        ({"fold": 7}, ("fold=7", "0 to 1")),
        ({"mesh__data": 64}, ("mesh.data=64",)),
        ({"mesh__data": 2, "data__rows": 3}, ("3 packed rows", "mesh.data=2", "data.rows")),
        ({"mesh__sequence": 3, "data__row_multiple": 32}, ("mesh.sequence=3", "data.row_multiple")),
        ({"mesh__data": 2, "train__batching": "grad_cache"}, ("grad_cache", "mesh.data=1")),
        ({"data__pool": "scan"}, ("data.pool", "segment")),
        ({"task": "PR"}, ("PR", "ER")),
        ({"split__n_folds": 60}, ("n_folds=60",)),
        ({"train__b": 64}, ("64",)),
        ({"genes__ranking": "table"}, ("genes.ranking_table",)),
        ({"train__drop_last": False}, ("drop_last",)),
        ({"method": "mkdd"}, ("mkdd", "mkd")),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
def test_contradictory_or_impossible_settings_are_refused(refused, changes, named):
    message = refused(**changes)
    for text in named:
        assert text in message, message


def test_empty_and_missing_data_directories_are_refused(refused, tmp_path):
    assert "--config.data.dir=DIRECTORY" in refused(data="")
    message = refused(data=tmp_path / "nowhere")
    assert "nowhere" in message and "manifest" in message


def test_half_written_data_set_is_refused(refused, data):
    (data / "manifest.json").unlink()
    assert "manifest.json" in refused(data=data)


@pytest.mark.parametrize(("table", "named"), [("labels.csv", "data.labels"), ("genes.npz", "data.genes")])
def test_missing_table_is_named_with_the_key_that_sets_it(refused, data, table, named):
    (data / "tables" / table).unlink()
    message = refused(data=data)
    assert table in message and named in message


def shard(data):
    return next(data.glob("*.array_record*"))


def test_truncated_shard_is_named(refused, data):
    path = shard(data)
    path.write_bytes(path.read_bytes()[:-100])
    message = refused(data=data)
    assert path.name in message and "restore the shard" in message


def test_flipped_bit_is_named_with_shard_and_record(refused, data):
    path = shard(data)
    content = bytearray(path.read_bytes())
    content[content.index(b"SIM-0020-SIMBAG") + 64] ^= 1
    path.write_bytes(content)
    message = refused(data=data)
    assert f"{path.name}, record " in message


def test_missing_shard_is_named(refused, data):
    path = shard(data)
    path.unlink()
    assert path.name in refused(data=data)


def test_manifest_that_disagrees_with_the_shards_is_refused(refused, data):
    path = data / "slides.csv"
    header, first, *rest = rows_of(path)
    first[header.index("n_patches")] = str(int(first[header.index("n_patches")]) + 1)
    write_rows(path, [header, first, *rest])
    assert "slides.csv" in refused(data=data)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_genes_that_are_no_numbers_are_named(refused, data, value):
    path = data / "tables" / "genes.npz"
    table = read_gene_table(path)
    table.values[3, 5] = value
    with np.load(path) as old:
        arrays = {**old, "values": table.values}
    np.savez(path, **arrays)
    message = refused(data=data, genes__top_k=64)
    assert table.case_id[3] in message or table.names[5] in message


def test_cases_without_label_or_features_or_genes_are_counted_and_listed(histokd, data, tmp_path):
    tables = data / "tables"
    header, gone, blank, *rest = rows_of(tables / "labels.csv")
    blank[1] = ""
    write_rows(tables / "labels.csv", [header, blank, *rest, ["GHOST-1", "1"], ["GHOST-2", "0"]])
    genes = read_gene_table(tables / "genes.npz")
    write_gene_table(genes.align(genes.case_id[:-1]), tables / "genes.npz")
    shown = histokd(*tiny.train_arguments(data, tmp_path / "run", "--no-report", train__max_epochs=1))
    assert shown.code == 0, shown.err
    cohort = json.loads((tmp_path / "run" / "run_manifest.json").read_text())["cohort"]
    listed = {reason: (entry["n"], entry["ids"]) for reason, entry in cohort["dropped"].items()}
    assert listed["no features"] == (2, ["GHOST-1", "GHOST-2"])
    assert listed["no genes"] == (1, [f"{genes.case_id[-1]}-SIMBAG"])
    assert sorted(i for n, ids in listed.values() for i in ids if i.startswith((gone[0], blank[0]))) == sorted(
        f"{row[0]}-SIMBAG" for row in (gone, blank)
    )
    assert cohort["n"] == 37 == 40 - 3


@pytest.fixture(scope="module")
def two_sections(tmp_path_factory):
    """Ten patients with four labelled sections each, and splits that put sections of one patient into all parts."""
    path = tmp_path_factory.mktemp("sections") / "data"
    rng = np.random.default_rng(0)
    slides = [(f"P{p}", f"P{p}-S{s}") for p in range(10) for s in range(4)]
    with DatasetWriter(path, name="sections", feat_dim=6) as writer:
        for case, slide in slides:
            writer.add(slide, case, rng.standard_normal((9, 6), dtype=np.float32), None)
    tables = path / "tables"
    tables.mkdir(exist_ok=True)
    label = {slide: int(case[1:]) % 2 for case, slide in slides}
    write_rows(tables / "labels.csv", [["case_id", "ER"], *label.items()])
    values = rng.standard_normal((len(slides), 32)).astype(np.float32)
    np.savez(
        tables / "genes.npz",
        case_id=np.array([slide for _, slide in slides]),
        gene=np.array([f"G{g}" for g in range(32)]),
        values=values,
    )
    parts = {
        part: [slide for _, slide in slides if slide[-1] in ends]
        for part, ends in (("train", "01"), ("val", "2"), ("test", "3"))
    }
    rows = [[column[i] if i < len(column) else "" for column in parts.values()] for i in range(20)]
    (path / "splits").mkdir()
    write_rows(path / "splits" / "splits_0.csv", [list(parts), *rows])
    return path


def overlapping(data, workdir, *flags):
    return tiny.train_arguments(
        data,
        workdir,
        *flags,
        data__unit="slide",
        split__dir=data / "splits",
        genes__ranking="anova",
        train__max_epochs=1,
    )


def test_patient_in_two_splits_is_refused(histokd, two_sections, tmp_path):
    shown = histokd(*overlapping(two_sections, tmp_path / "run"))
    assert shown.code == 1
    assert "patient 'P0' is in train and in" in shown.err and "splits_0.csv" in shown.err
    assert "allow_patient_overlap" in shown.err.replace("-", "_")


def test_patient_in_two_splits_is_marked_everywhere_when_allowed(histokd, two_sections, tmp_path):
    workdir = tmp_path / "run"
    shown = histokd(*overlapping(two_sections, workdir, "--allow-patient-overlap"))
    assert shown.code == 0, shown.err
    assert "within one patient, across sections" in shown.out
    for name in ("run_manifest.json", "summary.json"):
        assert json.loads((workdir / name).read_text())["patient_overlap"] is True, name
    model = json.loads((workdir / "fold_0" / "model" / "model.json").read_text())
    assert model["trained_on"]["patient_overlap"] is True
    assert "within one patient, across sections" in (workdir / "report.html").read_text()
    assert json.loads((workdir / "summary.json").read_text())["bootstrap"]["unit"] == "slide"


def test_splits_without_overlap_are_not_marked(finished_run):
    for name in ("run_manifest.json", "summary.json"):
        assert json.loads((finished_run / name).read_text())["patient_overlap"] is False


def test_workdir_below_a_file_is_refused(refused, tmp_path):
    (tmp_path / "file").write_text("")
    message = refused(workdir=tmp_path / "file" / "run")
    assert "writing" in message and "writable" in message


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_workdir_without_permission_is_refused(refused, tmp_path):
    (tmp_path / "locked").mkdir(mode=0o500)
    assert "Permission denied" in refused(workdir=tmp_path / "locked" / "run")


@pytest.mark.parametrize("where", ["checkpoint", "metrics"])
def test_full_disk_is_named_with_the_fix(refused, monkeypatch, where):
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def fail(*_, **__):
        raise full

    if where == "checkpoint":
        monkeypatch.setattr(checkpoint.ocp.training.Checkpointer, "save", fail)
    else:
        original = pathlib.Path.open

        def open_or_fail(path, *args, **options):
            return fail() if path.name == "metrics.jsonl" else original(path, *args, **options)

        monkeypatch.setattr(pathlib.Path, "open", open_or_fail)
    message = refused()
    assert "No space left on device" in message and "free some space" in message


LIMIT_FILES = "import resource; limit = lambda n: resource.setrlimit(resource.RLIMIT_FSIZE, (n, n))\n"
AT_ONCE = LIMIT_FILES + "limit(3000)"
AT_THE_FIRST_CHECKPOINT = (
    LIMIT_FILES
    + """
from histokd_jax.train.checkpoint import RunCheckpoints
save = RunCheckpoints.save
RunCheckpoints.save = lambda *args: (limit(3000), save(*args))
"""
)


@pytest.mark.parametrize(
    ("prelude", "target"),
    [(AT_ONCE, "run_manifest.json"), (AT_THE_FIRST_CHECKPOINT, "")],
    ids=["at once", "at the first checkpoint"],
)
def test_files_that_may_not_grow_stop_the_run_with_one_message(cohort_dir, tmp_path, prelude, target):
    """A real refusal of the operating system (file size limit), not a simulated one."""
    arguments = tiny.train_arguments(cohort_dir, tmp_path / "run")
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            f"{prelude}\nfrom histokd_jax.cli.main import main\nraise SystemExit(main({arguments}))",
        ],
        env={**os.environ, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "8"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 1, done.stderr
    # Threads of the checkpoint and TensorBoard libraries may complain at the same time, even within our line.
    for text in ("histokd train: ", f"writing {tmp_path}", f"{target} failed: ", "File too large; free some space"):
        assert text in done.stderr, done.stderr


def test_diverging_run_ends_with_the_metric_and_a_remedy(refused):
    message = refused(train__lr=1e38)
    assert "became NaN or infinite" in message and "lower train.lr" in message


def test_second_run_with_other_settings_is_refused(histokd, refused, finished_run, cohort_dir, tmp_path):
    workdir = shutil.copytree(finished_run, tmp_path / "run")
    message = refused(workdir=workdir, fold="all", compare__control=True, seed=3, loss__lambda_skd=0)
    assert "loss.lambda_skd" in message and "another --workdir" in message


def test_finished_run_is_not_trained_again(histokd, finished_run, cohort_dir, tmp_path, monkeypatch):
    workdir = shutil.copytree(finished_run, tmp_path / "run")
    monkeypatch.setattr(loop, "fit", lambda *_: pytest.fail("trained again"))
    shown = histokd(*tiny.train_arguments(cohort_dir, workdir, fold="all", compare__control=True, seed=3))
    assert shown.code == 0
    assert (workdir / "summary.json").read_bytes() == (finished_run / "summary.json").read_bytes()


def test_verbose_shows_where_it_failed(cohort_dir, tmp_path):
    from histokd_jax.cli.main import main

    with pytest.raises(ValueError, match="top_k"):
        main(["--verbose", *tiny.train_arguments(cohort_dir, tmp_path, genes__top_k=30)])
