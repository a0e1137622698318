"""The import benchmark runs in smoke mode and writes the common schema; values are checked for sanity only."""

import math

import pytest
from test_bench_input_smoke import _assert_no_paths, _assert_schema, _smoke

pytestmark = pytest.mark.bench


def test_bench_import_smoke(tmp_path):
    record = _smoke("bench_import", tmp_path)
    _assert_schema(record, "bench_import")
    _assert_no_paths(record)
    for layout in ("trident", "clam"):
        for count in (1, 2):
            cell = f"[{layout}/{count} processes]"
            assert {f"{side}{cell}" for side in ("import", "source", "write")} <= set(record["metrics"])
            assert 0 < record["derived"][f"import_over_slower{cell}"] < math.inf
        assert record["derived"][f"reread_over_source[{layout}]"] > 0
    assert record["derived"]["smoke"] is True
