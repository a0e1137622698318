"""The report: self-contained, complete, honest about simulation and patient overlap, and strict about its input."""

import html.parser
import json
import re

import pytest
from run_builder import write_run

from histokd_jax.evals import predictions as P
from histokd_jax.report import plots
from histokd_jax.report.build import build_report
from histokd_jax.report.run_dir import RunDirError, flatten, load_run

VOID = {"img", "meta", "br"}


class Balanced(html.parser.HTMLParser):
    """Checks nesting and collects images, captions and resources."""

    def __init__(self, text):
        super().__init__()
        self.stack, self.images, self.links = [], [], []
        self.captions, self.text = [], []
        self.feed(text)
        assert not self.stack

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        if tag == "img":
            self.images.append(attrs)
        self.links += [attrs[key] for key in ("src", "href") if key in attrs]
        if tag in ("caption", "figcaption"):
            self.captions.append("")
        if tag not in VOID:
            self.stack.append(tag)

    def handle_endtag(self, tag):
        assert self.stack.pop() == tag

    def handle_data(self, data):
        self.text.append(data)
        if {"caption", "figcaption"} & set(self.stack):
            self.captions[-1] += data


@pytest.fixture(scope="module")
def binary(tmp_path_factory):
    run = write_run(tmp_path_factory.mktemp("run") / "er")
    path = build_report(run)
    return run, path, path.read_text()


def test_report_is_one_self_contained_page(binary):
    run, path, text = binary
    parsed = Balanced(text)
    assert path == run / "report.html"
    assert "<script" not in text and "@import" not in text and "url(" not in text
    assert all(link.startswith(("data:image/svg+xml;base64,", "#")) for link in parsed.links)
    assert not list(run.glob("*.tmp")) and not list(run.glob(".writing*"))


def test_every_image_has_alternative_text(binary):
    images = Balanced(binary[2]).images
    assert len(images) == 8
    assert all(len(image["alt"]) > 20 for image in images)


def test_simulated_is_said_in_title_and_in_every_caption_and_alt_text(binary):
    parsed = Balanced(binary[2])
    assert "simulated bags" in re.search("<title>(.*?)</title>", binary[2]).group(1)
    assert len(parsed.captions) >= 15
    assert all("simulated bags" in caption for caption in parsed.captions)
    assert all("simulated bags" in image["alt"] for image in parsed.images)


def test_report_holds_the_numbers_of_the_summary(binary):
    run, _, text = binary
    summary = json.loads((run / "summary.json").read_text())
    for entry in summary["modes"].values():
        row = entry["metrics"]["auroc"]
        assert f"{row['mean']:.3f} ± {row['std']:.3f}" in text
        assert f"[{row['ci'][0]:.3f}, {row['ci'][1]:.3f}]" in text


def test_report_has_every_section_and_cohort_provenance_and_fingerprints(binary):
    text = binary[2]
    for anchor in ("trained", "results", "distillation", "curves", "calibration", "training", "folds", "provenance"):
        assert f'id="{anchor}"' in text and f'href="#{anchor}"' in text
    for fact in ("TCGA-X0", "and 4 more", "no label", "a" * 64, "b" * 64, "0.10.2", "histokd train"):
        assert fact in text
    for panel in ("ce_p", "coral", "norm_m", "auroc_pathology"):
        assert panel in text


def test_a_real_gain_and_no_gain_are_said_in_plain_words(binary, tmp_path):
    assert "<strong>the interval excludes zero: a gain</strong>" in binary[2]
    text = build_report(write_run(tmp_path / "same", gain=0.0, n=40, folds=2)).read_text()
    assert "<strong>the interval includes zero: no gain shown</strong>" in text


def test_same_run_gives_the_same_bytes(binary):
    assert build_report(binary[0]).read_text() == binary[2]


def test_one_fold_without_control_multiclass_real_data_with_patient_overlap(tmp_path):
    options = {"folds": 1, "num_classes": 4, "n": 60, "modes": ("pathology",)}
    run = write_run(tmp_path / "r", control=False, simulated=False, patient_overlap=True, **options)
    parsed = Balanced(build_report(run).read_text())
    text = "".join(parsed.text)
    assert "This run has no control" in text and "AUROC (macro one-vs-rest)" in text and " ± 0.000" not in text
    assert "simulated bags" not in text
    assert all("within one patient, across sections" in caption for caption in parsed.captions)


def test_single_patient_is_resampled_by_slide_and_says_so(tmp_path):
    options = {"num_classes": 3, "folds": 2, "n": 60, "one_patient": True, "unit": "slide"}
    text = build_report(write_run(tmp_path / "r", simulated=False, patient_overlap=True, **options)).read_text()
    assert "slides resampled within folds" in text and "no interval" not in text


def test_single_class_fold_is_undefined_with_a_note_never_zero(tmp_path):
    from histokd_jax.evals import summary as S

    run = write_run(tmp_path / "r", control=False, n=40, folds=2, modes=("pathology",))
    t = P.read_predictions(run / "predictions_test.csv")
    t = P.make_predictions(t.case_id, t.slide_id, t.fold, t.mode, t.label * (t.fold != 1), t.probs)
    P.write_predictions(run / "predictions_test.csv", t)
    S.write_summary(run / "summary.json", S.summarise(t, num_classes=2, bootstrap=50))
    text = build_report(run).read_text()
    assert "undefined" in text and "fold 1: only class 0 occurs (20 rows)" in text


def test_run_without_curves_or_validation_predictions(tmp_path):
    run = write_run(tmp_path / "r", control=False, n=40, folds=2)
    for path in run.glob("fold_*/metrics.jsonl"):
        path.unlink()
    (run / "predictions_val.csv").unlink()
    text = build_report(run).read_text()
    assert "No metrics.jsonl was found" in text and "below it the AUROC on its validation part" not in text


def test_text_from_the_run_is_escaped(tmp_path):
    run = write_run(tmp_path / "r", control=False, n=40, folds=2)
    manifest = json.loads((run / "run_manifest.json").read_text())
    (run / "run_manifest.json").write_text(json.dumps({**manifest, "dataset": "<script>x</script>"}))
    text = build_report(run).read_text()
    assert "<script" not in text and "&lt;script&gt;" in text


def edit(path, change):
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda r: (r / "summary.json").unlink(), "summary.json is missing"),
        (lambda r: (r / "config.json").write_text("{"), "config.json: not JSON"),
        (lambda r: edit(r / "run_manifest.json", lambda m: m.pop("simulated")), "`simulated` must be true or false"),
        (lambda r: edit(r / "summary.json", lambda s: s["folds"].pop()), "stale"),
        (lambda r: edit(r / "control/config.json", lambda c: c["loss"].update(lambda_or=1)), "every lambda at 0"),
        (lambda r: edit(r / "control/run_manifest.json", lambda m: m.update(split_fingerprint="x")), "no fair control"),
        (lambda r: (r / "fold_0/metrics.jsonl").write_text('{"step": 1\n{"step": 2}\n'), "line 1 is not JSON"),
    ],
)
def test_inconsistent_run_directories_are_refused(tmp_path, damage, message):
    run = write_run(tmp_path / "r", n=40, folds=2, modes=("pathology",))
    damage(run)
    with pytest.raises(RunDirError, match=message):
        build_report(run)
    assert not (run / "report.html").exists()


def test_last_line_of_a_killed_run_may_be_half_written(tmp_path):
    run = write_run(tmp_path / "r", control=False, n=40, folds=2)
    path = run / "fold_0" / "metrics.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join(lines)[:-5])
    assert len(load_run(run).curves[0]) == len(lines) - 1


def test_missing_matplotlib_names_the_extra(monkeypatch, tmp_path):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"histokd_jax\[report\]"):
        build_report(tmp_path)


def test_flatten_and_finite_series():
    assert dict(flatten({"a": {"b": 1}, "c": [1, 2], "d": [{"e": 3}]})) == {"a.b": 1, "c": [1, 2], "d.0.e": 3}
    x, y = plots.finite_series(iter([(1, 2.0), (1, 4.0), (0, 1.0), (2, None), (3, float("nan"))]))
    assert x.tolist() == [0, 1] and y.tolist() == [1, 3]


def test_the_share_of_time_spent_waiting_for_input_is_told_without_the_compiling_epoch(tmp_path):
    run = write_run(tmp_path / "er")
    timed = [(60.0, 30.0), (4.0, 1.0), (6.0, 1.5)]
    lines = [
        {"step": i, "epoch": i, "split": "train", "stage": "student", "loss": 1.0, "time_epoch": seconds,
         "time_data_wait": waited, "input_bound_fraction": waited / seconds, "images_per_second": 96.0 / seconds}
        for i, (seconds, waited) in enumerate(timed)
    ]  # fmt: skip
    (run / "fold_1/metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    text = build_report(run).read_text()
    row = re.search(r"fold 1, student</th>(.*?)</tr>", text, re.S).group(1)
    assert re.findall(r">([^<>]+)<", row) == ["19 images/s", "25.0&nbsp;%", "2"]
    assert not any("input_bound_fraction" in image["alt"] for image in Balanced(text).images)
    assert "fold 0, online" not in text, "a fold without times has no row"
