"""`bench_methods`: smoke mode in the common schema, and a configuration that exists for every name."""

import pytest

from benchmarks import bench_methods, common

pytestmark = pytest.mark.bench


def test_bench_methods_smoke(tmp_path):
    record = bench_methods.run(dict(bench_methods.SMOKE), True, tmp_path / "out.json")
    common.check_record(record)
    assert set(record["metrics"]) == {"abmil[100 patches]", "mcat[100 patches]"}
    for facts in record["derived"]["100 patches"].values():
        assert facts["patches_per_s"] > 0 and facts["temp_mib"] >= 0


@pytest.mark.parametrize("name", sorted(bench_methods.METHODS))
def test_every_method_can_be_built_at_its_published_widths(name):
    method = bench_methods.build(name, bench_methods.FULL)
    assert method.stages and method.modes
