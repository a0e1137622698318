"""Every layout, written as its software does, is recognised and imported with its values, coordinates and facts."""

import csv
import hashlib
import json

import feature_folders as folders
import numpy as np
import pytest

from data_pipelines.bag import NO_COORDS, permutation
from data_pipelines.importers import cases, detect, plan, run
from data_pipelines.importers.sources import Options
from data_pipelines.reader import BagReader
from data_pipelines.torch_file import write_state_dict

CONTENT = folders.bags()


def imported(root, out, *, layout="auto", rule=None, dtype="float32", seed=0, shard_bytes=2000, **options):
    name, _ = detect.detect(root, layout)
    made = plan.make_plan(
        root,
        name,
        name="toy",
        options=Options(**options),
        rule=rule or cases.CaseRule(),
        dtype=dtype,
        seed=seed,
        shard_bytes=shard_bytes,
    )
    return name, run.run_import(made, out)


def check_content(out, content, *, coords=True, dtype="float32", cast=None, seed=0):
    reader = BagReader(out)
    assert [slide.slide_id for slide in reader.manifest.slides] == sorted(content)
    for row, slide in enumerate(reader.manifest.slides):
        features, xy = content[slide.slide_id]
        order = permutation(seed, slide.slide_id, len(features))
        found, found_xy = reader.read_bag(row)
        expected = features if cast is None else features.astype(cast)
        np.testing.assert_array_equal(found, expected[order].astype(dtype), strict=True)
        np.testing.assert_array_equal(found_xy, xy[order] if coords else NO_COORDS)
        assert slide.case_id == slide.slide_id[:12]
    return reader.manifest


def sources_of(out):
    with open(out / "sources.csv", newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("below", ["", "h5_files"])
def test_clam_h5_with_coordinates_and_facts_from_patches(tmp_path, below):
    root = folders.clam(tmp_path / "clam", CONTENT)
    layout, outcome = imported(root / below, tmp_path / "out")
    assert layout == "clam" and outcome.rejected == ()
    manifest = check_content(tmp_path / "out", CONTENT)
    assert manifest.patch_size_level0 == 512 and manifest.encoder == {"patch_size": 256}
    assert manifest.slides[0].source == ("h5_files/" if not below else "") + f"{folders.BRCA[0]}.h5"


@pytest.mark.parametrize("patches", [True, False])
def test_clam_pt_files_take_coordinates_from_patches_where_those_are(tmp_path, patches):
    root = folders.clam(tmp_path / "clam", CONTENT, h5_files=False, patches=patches)
    layout, _ = imported(root, tmp_path / "out")
    assert layout == "clam"
    check_content(tmp_path / "out", CONTENT, coords=patches)


def test_clam_patches_elsewhere_and_files_of_both_kinds(tmp_path):
    folders.clam(tmp_path / "clam", dict(list(CONTENT.items())[:2]), pt=False, patches=False)
    folders.clam(tmp_path / "clam", dict(list(CONTENT.items())[1:]), h5_files=False, patches=False)
    folders.clam(tmp_path / "tiles", CONTENT, h5_files=False, pt=False)
    imported(tmp_path / "clam", tmp_path / "out", patches=str(tmp_path / "tiles" / "patches"))
    check_content(tmp_path / "out", CONTENT)
    assert [row["file"][:2] for row in sources_of(tmp_path / "out")] == ["h5", "h5", "pt", "pt"]


def test_clam_image_patches_are_no_features(tmp_path):
    folders.h5(tmp_path / "clam" / "h5_files" / "TCGA-A1-A0SB-1.h5", {"imgs": np.zeros((2, 8, 8, 3), np.uint8)})
    with pytest.raises(plan.NothingUsable, match="holds image patches"):
        imported(tmp_path / "clam", tmp_path / "out")


@pytest.mark.parametrize("below", ["", "20x_256px_0px_overlap", "20x_256px_0px_overlap/features_uni_v1"])
def test_trident_job_magnification_folder_or_feature_folder(tmp_path, below):
    folders.trident(tmp_path / "job", CONTENT)
    folders.h5(tmp_path / "job/20x_256px_0px_overlap/slide_features_titan/x.h5", {"features": np.zeros(8, np.float32)})
    layout, outcome = imported(tmp_path / "job" / below, tmp_path / "out")
    assert layout == "trident" and outcome.rejected == ()
    manifest = check_content(tmp_path / "out", CONTENT)
    assert manifest.encoder == {"name": "uni_v1", "patch_size": 256}
    assert manifest.magnification == 20 and manifest.patch_size_level0 == 512 and manifest.mpp is None
    row = sources_of(tmp_path / "out")[0]
    content = (tmp_path / "job" / below / row["file"]).read_bytes()
    assert (row["sha256"], row["n_bytes"]) == (hashlib.sha256(content).hexdigest(), str(len(content)))
    for shard in manifest.shards:
        assert shard.sha256 == hashlib.sha256((tmp_path / "out" / shard.file).read_bytes()).hexdigest()
    assert row["level0_magnification"] == "40" and row["overlap"] == "0" and row["dtype"] == "float32"


@pytest.mark.parametrize("legacy", [True, False])
@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_trident_leading_axis_half_precision_and_encoder_none(tmp_path, legacy, dtype):
    folders.trident(tmp_path / "job", CONTENT, legacy=legacy, dtype=dtype)
    imported(tmp_path / "job", tmp_path / "out")
    manifest = check_content(tmp_path / "out", CONTENT, cast=dtype)
    assert manifest.encoder["name"] == "uni_v1", "the literal 'None' is no encoder; the folder names it"
    assert manifest.magnification == 20


def test_trident_empty_and_locked_slides_go_to_quarantine(tmp_path):
    folder = folders.trident(tmp_path / "job", CONTENT)
    for name, shape in (("TCGA-A1-0001-DX1", (0, 8)), ("TCGA-A1-0002-DX1", (0,))):
        empty = {"features": np.zeros(shape, np.float32), "coords": np.zeros((0, 2), np.int64)}
        folders.h5(folder / f"{name}.h5", empty)
    (folder / f"{folders.BRCA[3]}.h5.lock").write_text("pid 1")
    (folder / "TCGA-A1-0003-DX1.h5.lock").write_text("pid 1")
    _, outcome = imported(tmp_path / "job", tmp_path / "out")
    reasons = {item.slide_id: item.reason for item in outcome.rejected}
    assert reasons == {
        "TCGA-A1-0001-DX1": "no patches",
        "TCGA-A1-0002-DX1": "no patches",
        "TCGA-A1-0003-DX1": "locked",
        folders.BRCA[3]: "locked",
    }
    check_content(tmp_path / "out", dict(list(CONTENT.items())[:3]))
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["import"]["n_quarantined"] == 4


def test_trident_of_several_encoders_asks_for_one(tmp_path):
    folders.trident(tmp_path / "job", CONTENT)
    folders.trident(tmp_path / "job", folders.bags(dim=5), encoder="conch_v15")
    with pytest.raises(ValueError, match="features_conch_v15, .*features_uni_v1; point at one"):
        imported(tmp_path / "job", tmp_path / "out")
    imported(tmp_path / "job", tmp_path / "out", encoder="uni_v1")
    check_content(tmp_path / "out", CONTENT)


def test_trident_slide_level_features_are_refused(tmp_path):
    folder = tmp_path / "slide_features_titan"
    folders.h5(folder / "TCGA-A1-A0SB-1.h5", {"features": np.zeros(8, np.float32)})
    with pytest.raises(ValueError, match="one vector per slide"):
        imported(folder, tmp_path / "out")


def test_trident_pt_features_take_coordinates_from_patches(tmp_path):
    job = tmp_path / "job" / "20x_256px_0px_overlap"
    for slide, (features, coords) in CONTENT.items():
        folders.tensor_pt(job / "features_uni_v1" / f"{slide}.pt", features)
        folders.h5(job / "patches" / f"{slide}_patches.h5", {"coords": coords}, {"coords": {"patch_size_level0": 512}})
    imported(tmp_path / "job", tmp_path / "out")
    assert check_content(tmp_path / "out", CONTENT).patch_size_level0 == 512


def test_stamp_micrometres_become_level0_pixels(tmp_path):
    content = {slide: (f, xy // 4 * 4) for slide, (f, xy) in CONTENT.items()}
    root = folders.stamp(tmp_path / "uni-0abc", content, mpp0=0.25)
    layout, _ = imported(root, tmp_path / "out", level0_mpp=0.25)
    assert layout == "stamp"
    manifest = check_content(tmp_path / "out", content, cast=np.float16)
    assert manifest.mpp == pytest.approx(256 / 224, abs=1e-6) and manifest.encoder["name"] == "uni"


def test_stamp_coordinates_without_a_pixel_size_are_refused_kept_or_dropped(tmp_path):
    content = {slide: (f, xy // 4 * 4) for slide, (f, xy) in CONTENT.items()}
    root = folders.stamp(tmp_path / "stamp", content, mpp0=0.25)
    with pytest.raises(ValueError, match="coordinates in um.*--level0-mpp"):
        imported(root, tmp_path / "no")
    imported(root, tmp_path / "kept", coords="as-recorded")
    check_content(tmp_path / "kept", {slide: (f, xy // 4) for slide, (f, xy) in content.items()}, cast=np.float16)
    assert sources_of(tmp_path / "kept")[0]["coords_unit"] == "um"
    imported(root, tmp_path / "dropped", coords="drop")
    check_content(tmp_path / "dropped", content, cast=np.float16, coords=False)


def test_stamp_pixel_size_per_slide_from_the_table(tmp_path):
    content = {slide: (f, xy // 4 * 4) for slide, (f, xy) in list(CONTENT.items())[:2]}
    (a, one), (b, two) = content.items()
    folders.stamp(tmp_path / "stamp", {a: one}, mpp0=0.25)
    folders.stamp(tmp_path / "stamp", {b: two}, mpp0=0.5)
    table = tmp_path / "slides.csv"
    table.write_text(f"FILENAME;PATIENT;level0_mpp\n{a}.h5;{a[:12]};0.25\n{b}.h5;{b[:12]};0.5\n")
    imported(tmp_path / "stamp", tmp_path / "out", rule=cases.CaseRule(table=str(table)))
    check_content(tmp_path / "out", content, cast=np.float16)


def test_stamp_old_grid_of_224_pixels_and_plain_pixels(tmp_path):
    features, grid = folders.bag(0)[0], np.stack([np.arange(10), np.arange(10) + 1], 1) * 224
    features = features[:10]
    folders.h5(tmp_path / "grid" / "TCGA-A1-A0SB-1.h5", {"feats": features, "coords": grid})
    imported(tmp_path / "grid", tmp_path / "a", level0_mpp=0.5)
    check_content(tmp_path / "a", {"TCGA-A1-A0SB-1": (features, grid // 224 * 512)})
    folders.h5(tmp_path / "px" / "TCGA-A1-A0SB-1" / "features.h5", {"feats": features, "coords": grid + 512})
    imported(tmp_path / "px", tmp_path / "b")
    check_content(tmp_path / "b", {"TCGA-A1-A0SB-1": (features, grid + 512)})


def test_stamp_slide_level_files_and_unknown_units_are_refused(tmp_path):
    folders.stamp(tmp_path / "s", dict(list(CONTENT.items())[:1]), unit="px", mpp0=1)
    folders.stamp(tmp_path / "s", dict(list(CONTENT.items())[1:2]), feat_type="slide")
    folders.stamp(tmp_path / "s", dict(list(CONTENT.items())[2:3]), unit="furlong")
    _, outcome = imported(tmp_path / "s", tmp_path / "out")
    assert [item.reason for item in outcome.rejected] == ["slide-level", "bad coords"]


def test_slideflow_locations_and_configuration(tmp_path):
    layout, _ = imported(folders.slideflow(tmp_path / "bags", CONTENT), tmp_path / "out")
    assert layout == "slideflow"
    manifest = check_content(tmp_path / "out", CONTENT)
    assert manifest.mpp == 0.5 and manifest.encoder["name"].endswith("Uni")


def test_gigapath_by_name_of_the_folder_and_leading_axis(tmp_path):
    for slide, (features, coords) in CONTENT.items():
        folders.h5(tmp_path / "gigapath_features" / f"{slide}.h5", {"features": features[None], "coords": coords})
    layout, _ = imported(tmp_path / "gigapath_features", tmp_path / "out")
    assert layout == "gigapath"
    check_content(tmp_path / "out", CONTENT)


@pytest.mark.parametrize("kind", ["npy", "npz", "pt", "dict.pt", "h5", "torchmil"])
def test_plain_files(tmp_path, kind):
    root = tmp_path / "plain"
    for slide, (features, coords) in CONTENT.items():
        path = root / "sub" / f"{slide}.{kind.split('.')[-1]}"
        path.parent.mkdir(parents=True, exist_ok=True)
        if kind == "npy":
            np.save(path, features)
        elif kind == "npz":
            np.savez(path, features=features, coords=coords)
        elif kind == "pt":
            folders.tensor_pt(path, features)
        elif kind == "dict.pt":
            write_state_dict(path, {"features": features, "coords": coords})
        elif kind == "h5":
            folders.h5(path, {"embeddings": features, "coordinates": coords.astype(np.float64)})
        else:
            for name, array in (("features", features), ("coords", coords), ("labels", np.ones(1))):
                (root / name).mkdir(exist_ok=True)
                np.save(root / name / f"{slide}.npy", array)
    layout, _ = imported(root, tmp_path / "out")
    assert layout == "plain"
    check_content(tmp_path / "out", CONTENT, coords=kind not in ("npy", "pt"))


def test_forced_layout_and_unknown_folders(tmp_path):
    for slide, (features, coords) in CONTENT.items():
        folders.h5(tmp_path / "x" / f"{slide}.h5", {"features": features, "coords": coords})
    assert imported(tmp_path / "x", tmp_path / "a")[0] == "plain"
    imported(tmp_path / "x", tmp_path / "b", layout="gigapath")
    check_content(tmp_path / "b", CONTENT)
    (tmp_path / "nothing").mkdir()
    for root, message in ((tmp_path / "nothing", "no feature file"), (tmp_path / "nowhere", "is no folder")):
        with pytest.raises(ValueError, match=message):
            imported(root, tmp_path / "c")
    with pytest.raises(ValueError, match="layout 'bogus' is unknown"):
        detect.detect(tmp_path, "bogus")


@pytest.mark.torch
def test_pt_files_of_pytorch_itself(tmp_path):
    torch = pytest.importorskip("torch")
    (tmp_path / "pt_files").mkdir()
    for slide, (features, _) in CONTENT.items():
        torch.save(torch.from_numpy(features), tmp_path / "pt_files" / f"{slide}.pt")
    imported(tmp_path, tmp_path / "out")
    check_content(tmp_path / "out", CONTENT, coords=False)
