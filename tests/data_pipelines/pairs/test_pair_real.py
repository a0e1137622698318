"""Real image pairs go through the pipeline: BCI with grades, serial sections and DeepLIIF without."""

import json

import pair_files
import pytest

from data_pipelines.pairs.labels import LabelRule
from data_pipelines.pairs.reader import PairReader

pytestmark = pytest.mark.real_data
NO_LABELS = LabelRule("none")


@pytest.fixture
def stains(real_data):
    return real_data / "paired_stains"


def test_bci_crops_keep_their_grades_and_the_new_size_is_recorded(stains, tmp_path):
    manifest = pair_files.imported(stains / "bci_her2", tmp_path / "out", resize=(256, 256)).manifest
    counts = [sum(e.label == c for e in manifest.examples) for c in range(4)]
    assert manifest.class_names == ("0", "1+", "2+", "3+") and counts == [1, 2, 8, 5]
    assert all(e.has_partner and e.split == "test" for e in manifest.examples)
    facts = json.loads((tmp_path / "out/manifest.json").read_text())
    assert facts["resized"] == {"from": {"168x168": 16}, "to": [256, 256], "filter": "lanczos"}
    assert facts["import"]["layout"] == "bci" and facts["import"]["n_quarantined"] == 0
    found = PairReader(manifest).read(0)
    assert found.image.shape == found.partner.shape == (256, 256, 3)
    # H&E is pink: more red than green; the IHC of a negative slide is bluish grey. They are not the same picture.
    assert found.image[..., 0].mean() > found.image[..., 1].mean() + 10 and (found.image != found.partner).mean() > 0.5


def test_serial_sections_without_grades_are_pairs_by_position(stains, tmp_path):
    counts = {}
    for case, stain in (("1", "proSPC"), ("3", "CD31"), ("3", "Cc10"), ("3", "Ki67"), ("3", "proSPC")):
        root, out = stains / f"serial_sections_256/lung-lesion_{case}", tmp_path / f"{case}{stain}"
        manifest = pair_files.imported(root, out, partner_folder=stain, rule=NO_LABELS).manifest
        counts[case, stain] = len(manifest.examples)
        assert all(e.has_partner and e.label == -1 for e in manifest.examples) and manifest.image_size == (256, 256)
        assert json.loads((out / "manifest.json").read_text())["import"]["stored"] == {"kept": len(manifest.examples)}
    assert counts == {("1", "proSPC"): 9, **{("3", stain): 6 for stain in ("CD31", "Cc10", "Ki67", "proSPC")}}


def test_deepliif_tiles_with_masks_and_a_strip_cut_into_pairs(stains, tmp_path):
    folder = stains / "deepliif/ihc_with_mask"
    options = {"image_folder": "ihc", "partner_folder": "mask", "rule": NO_LABELS}
    manifest = pair_files.imported(folder, tmp_path / "masks", **options).manifest
    assert [e.example_id for e in manifest.examples] == ["22_2", "34_3", "6_2"] and manifest.image_size == (512, 512)
    strip = stains / "deepliif/multimodal/Lung1.png"
    (tmp_path / "strip.png").symlink_to(strip)
    rows = [f"t{i},strip.png,strip.png,0 0 512 512,{512 * i} 0 {512 * (i + 1)} 512" for i in range(1, 6)]
    (tmp_path / "t.csv").write_text("\n".join(["example_id,he_path,ihc_path,he_box,ihc_box", *rows]) + "\n")
    cut = pair_files.imported(tmp_path / "t.csv", tmp_path / "cut").manifest
    assert len(cut.examples) == 5 and cut.image_size == (512, 512)


@pytest.mark.parametrize(
    ("name", "size", "n", "classes"),
    [("prostate_tiles", (256, 256), 49, 4), ("crc_val_he_7k", (224, 224), 49, 7), ("uni_tcga_luadlusc", None, 130, 2)],
)
def test_labelled_patches_are_single_images_with_groups(real_data, tmp_path, name, size, n, classes):
    manifest = pair_files.imported(real_data / "labelled_patches" / name, tmp_path / "out", resize=size).manifest
    assert (len(manifest.examples), len(manifest.class_names), manifest.partner) == (n, classes, False)
