"""Every recorded result follows the common schema, and the check refuses what does not."""

import copy
import json
import pathlib
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks import common, plots, report  # noqa: E402

RESULTS = sorted(common.RESULTS.glob("*.json"))


@pytest.fixture
def record():
    return json.loads((common.RESULTS / "bench_step.json").read_text())


def test_there_are_results():
    assert len(RESULTS) >= 6


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_recorded_results_follow_the_schema(path):
    record = json.loads(path.read_text())
    common.check_record(record)
    assert record["benchmark"] == path.stem
    assert not record["derived"].get("smoke"), "a smoke run is no result"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r.update(schema=99), "is not a benchmark result of schema 1"),
        (lambda r: r.pop("notes"), r"\['notes'\] differ"),
        (lambda r: r.update(extra=1), r"\['extra'\] differ"),
        (lambda r: r["host"].update(name="x"), "host is"),
        (lambda r: r["metrics"].update(a={"median": 1.0}), "metric 'a' has the keys"),
        (lambda r: r["metrics"].update(a=common.metric([1.0], "s") | {"p10": 2.0}), "metric 'a' is .*p10 <= median"),
        (lambda r: r["metrics"].update(a=common.metric([1.0], "s") | {"p90": float("inf")}), "expected finite"),
    ],
)
def test_malformed_results_are_refused_by_name(record, change, message):
    common.check_record(record)
    broken = copy.deepcopy(record)
    change(broken)
    with pytest.raises(ValueError, match=message):
        common.check_record(broken)


def test_write_result_refuses_a_malformed_metric_and_writes_nothing(tmp_path):
    bad = {"a": {"median": 1.0}}
    with pytest.raises(ValueError, match="metric 'a' has the keys"):
        common.write_result(tmp_path / "x.json", benchmark="x", config={}, metrics=bad, derived={})
    assert not list(tmp_path.iterdir())


def test_curves_are_found_where_metrics_share_an_axis_of_sizes():
    one = common.metric([1.0, 2.0], "x")
    axis, lines = plots.curves({"a[median 1000]": one, "b[median 100]": one, "a[median 100]": one})
    assert axis == "median" and [x for x, _ in lines["a"]] == [100, 1000] and list(lines) == ["a", "b"]
    assert plots.curves({"step[2 devices]": one, "step[4 devices]": one})[0] == "devices"
    for alone in ({"a[median 100]": one}, {"a[median 100]": one, "b": one}, {"a[1 x]": one, "a[2 y]": one}):
        assert plots.curves(alone)[1] == {}


def test_report_writes_tables_and_figures(tmp_path, record):
    pytest.importorskip("matplotlib")
    record["derived"]["rows"] = [{"n": 8, "ok": True}, {"n": 64, "ok": False}]
    bare = {**copy.deepcopy(record), "benchmark": "bare", "metrics": {}}
    report.write([record, bare], tmp_path / "out")
    text = (tmp_path / "out" / "report.md").read_text()
    assert "![bench_step](bench_step.svg)" in text and "![bare]" not in text
    assert "| n | ok |" in text and "| 64 | no |" in text and "| rows |" not in text
    files = {path.name: path.stat().st_size for path in (tmp_path / "out").iterdir()}
    assert set(files) == {"report.md", "bench_step.png", "bench_step.svg"} and min(files.values()) > 1000
