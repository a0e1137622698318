"""The embedding benchmark runs in smoke mode and writes the common schema; values are checked for sanity only."""

import pytest
from test_bench_input_smoke import _assert_no_paths, _assert_schema, _smoke

pytestmark = pytest.mark.bench


def test_bench_embed_smoke(tmp_path):
    record = _smoke("bench_embed", tmp_path)
    _assert_schema(record, "bench_embed")
    _assert_no_paths(record)
    wanted = {"decode[2 threads]", "encode[vit_tiny/float32/xla]", "end_to_end[vit_tiny/float32/xla/2 threads]"}
    assert set(record["metrics"]) == wanted
    facts = record["derived"]["utilisation[vit_tiny/float32/xla]"]
    assert facts["gflops_per_tile"] == pytest.approx(2 * 1.26, rel=0.03) and facts["tflops"] > 0
    assert record["derived"]["smoke"] is True
