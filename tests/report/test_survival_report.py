"""The report of a survival run: complete, self-contained, honest about protocol and simulation."""

import json
import re

import pytest
from survival_builder import write_run
from test_report_build import Balanced

from histokd_jax.report.build import build_report
from histokd_jax.report.run_dir import RunDirError


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    run = write_run(tmp_path_factory.mktemp("survival") / "run", published=True)
    return run, build_report(run).read_text()


def test_page_is_self_contained_and_has_every_section(report):
    _, text = report
    parsed = Balanced(text)
    assert all(link.startswith(("data:image/svg+xml;base64,", "#")) for link in parsed.links)
    anchors = ("trained", "results", "risk-groups", "comparison", "over-time", "calibration", "training", "folds")
    assert all(f'id="{anchor}"' in text and f'href="#{anchor}"' in text for anchor in anchors)
    for figure in ("Kaplan-Meier curves", "AUC over time", "Calibration", "Forest plot"):
        assert any(image["alt"].startswith(figure) for image in parsed.images), figure
    assert "AUROC" not in text and "ROC" not in re.sub(r"base64,[^\"]*", "", text)


def test_numbers_are_those_of_the_summary(report):
    run, text = report
    words = "".join(Balanced(text).text)
    summary = json.loads((run / "summary.json").read_text())
    for entry in summary["modes"].values():
        assert f"{entry['metrics']['c_index']['mean']:.3f}" in words
        for row in entry["metrics"].values():
            assert f"{row['mean']:.3f}" in words and "{:.3f}, {:.3f}".format(*row["ci"]) in words
        for value in entry["metrics"]["c_index"]["per_fold"]:
            assert f"{value:.3f}" in words


def test_every_figure_and_table_says_that_bags_are_simulated_and_the_part_was_selected_on(report):
    _, text = report
    for caption in Balanced(text).captions:
        assert "simulated bags" in caption and "published protocol" in caption
    assert "numbers are optimistic" in text and "no features" in text


def test_control_is_named_by_what_it_changes(report):
    _, text = report
    assert "the same network with loss.rec_weight = 0.0" in text and "Bootstrap p" in text


def test_every_metric_is_compared_with_the_control(report):
    _, text = report
    for label in ("C-index (Harrell)", "C-index (IPCW)", "Integrated AUC", "Integrated Brier score"):
        assert f"{label}, Slides alone" in text and f"{label}, Slides and genes" in text
    assert "100 resamples" in text and "a difference below 0 is a gain" in text


def test_cox_run_without_control_has_no_calibration(tmp_path):
    text = build_report(write_run(tmp_path / "run", control=False, cox=True, folds=2)).read_text()
    assert 'id="calibration"' not in text and "not predicted" in text
    assert "no control arm" in text and "published protocol" not in text


def test_missing_training_follow_up_and_unknown_kind_are_named(tmp_path):
    run = write_run(tmp_path / "run", control=False, folds=2)
    (run / "fold_1" / "follow_up_train.csv").unlink()
    with pytest.raises(RunDirError, match="fold_1/follow_up_train.csv is missing"):
        build_report(run)
    manifest = json.loads((run / "run_manifest.json").read_text())
    (run / "run_manifest.json").write_text(json.dumps({**manifest, "task_kind": "regression"}))
    with pytest.raises(RunDirError, match="task_kind is 'regression'"):
        build_report(run)
