"""exp_ssl_ordering at smoke size; its simulation, probe and verdicts against known answers."""

import json

import numpy as np
import pytest

from benchmarks import common, exp_ssl_ordering


@pytest.mark.bench
def test_smoke_writes_the_schema_and_continues(tmp_path):
    names = ["untrained", "trident"]
    out = tmp_path / "x.json"
    record = exp_ssl_ordering.run(names, [0], exp_ssl_ordering.SMOKE, tmp_path / "w", out)
    common.check_record(json.loads(out.read_text()))
    assert set(record["derived"]["results"]) == set(names) and not record["derived"]["orderings"]
    (tmp_path / "w/trident_0.json").write_text(json.dumps({"shared": 0.25, "own": 0.75}))
    again = exp_ssl_ordering.run(names, [0], exp_ssl_ordering.SMOKE, tmp_path / "w", out)
    assert again["derived"]["mean"]["trident"] == {"shared": 0.25, "own": 0.75}


def test_labels_are_where_they_are_said_to_be():
    data = exp_ssl_ordering.simulate(0, 400)
    assert abs(np.corrcoef(data["shared"], data["own"])[0, 1]) < 0.15
    grey = {view: data[view].astype(float).mean(axis=-1) for view in ("image", "partner")}

    def power(view):
        return np.abs(np.fft.fft2(grey[view] - grey[view].mean(axis=(1, 2), keepdims=True))) ** 2

    # Stripes of 4 pixels: the sixth frequency of 24; checks of 3 or 6 pixels on both axes.
    along = power("partner")[:, 0, 6] > power("partner")[:, 6, 0]
    assert np.mean(along == (data["shared"] == 1)) > 0.99
    checks = power("image")[:, 8, 8] > power("image")[:, 4, 4]
    assert np.mean(checks == (data["own"] == 1)) > 0.95
    hidden = power("partner")[:, 8, 8] > power("partner")[:, 4, 4]
    assert 0.4 < np.mean(hidden == (data["own"] == 1)) < 0.6, "the privileged view knows nothing of it"


def test_the_probe_and_the_verdicts():
    rng = np.random.default_rng(0)
    x, label = rng.normal(size=(200, 5)), rng.integers(0, 2, 200)
    x[:, 2] += 6 * label
    assert exp_ssl_ordering.probe(x[:100], label[:100], x[100:], label[100:]) > 0.97
    accuracy = {
        "unprivileged": (0.6, 0.9),
        "privileged": (0.9, 0.6),
        "trident": (0.85, 0.89),
        "trident_blank": (0.7, 0.9),
    }
    results = {name: {"0": {"shared": a, "own": b}} for name, (a, b) in accuracy.items()}
    found = {name: row["holds"] for name, row in exp_ssl_ordering.verdicts(results)["orderings"].items()}
    assert found == {
        "F4_1 privileged above unprivileged on shared": True,
        "F4_1 trident above unprivileged on shared": True,
        "F4_2 trident near unprivileged on own": True,
        "F4_2 privileged below unprivileged on own": True,
        "F4_3 trident with a blank view near unprivileged on shared": False,
        "F4_3 trident with a blank view near unprivileged on own": True,
    }
