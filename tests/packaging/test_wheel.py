"""The wheel: what it installs, and that the named configurations resolve from it in any folder."""

import importlib.util
import os
import pathlib
import shutil
import subprocess
import sys
import zipfile

import pytest

ROOT = pathlib.Path(__file__).parents[2]
SOURCES = ("setup.py", "pyproject.toml", "README.md", "LICENSE", "histokd_jax", "data_pipelines", "configs")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from a copy of the sources, so that nothing is left in the source tree."""
    for module in ("pip", "setuptools"):
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"{module} is not installed: no wheel can be built without a download")
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
        elif (ROOT / name).exists():
            shutil.copy(ROOT / name, source / name)
    for decoy in ("tests", "benchmarks"):
        (source / decoy).mkdir()
        (source / decoy / "__init__.py").write_text("")
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-q"]
    done = subprocess.run([*command, "-w", out, source], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    (file,) = out.glob("*.whl")
    return file


def names(wheel):
    with zipfile.ZipFile(wheel) as archive:
        return archive.namelist()


def text_of(wheel, ending):
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [n for n in archive.namelist() if n.endswith(ending)]
        return archive.read(name).decode()


def test_wheel_holds_both_packages_and_the_configurations(wheel):
    found = set(names(wheel))
    for path in (ROOT / "histokd_jax").rglob("*.py"):
        assert path.relative_to(ROOT).as_posix() in found, f"{path.name} is not packaged: __init__.py missing?"
    for path in (ROOT / "data_pipelines").rglob("*.py"):
        assert path.relative_to(ROOT).as_posix() in found
    for path in (ROOT / "configs").rglob("*.py"):
        assert f"histokd_jax/{path.relative_to(ROOT).as_posix()}" in found


def test_wheel_installs_no_clashing_top_level_names(wheel):
    top = {name.split("/")[0] for name in names(wheel)}
    assert {name for name in top if not name.endswith(".dist-info")} == {"histokd_jax", "data_pipelines"}


def test_wheel_declares_script_python_licence_and_a_lean_core(wheel):
    assert "histokd = histokd_jax.cli.main:main" in text_of(wheel, "entry_points.txt")
    metadata = text_of(wheel, "dist-info/METADATA")
    assert "Requires-Python: >=3.11" in metadata and "Apache-2.0" in metadata
    core = [line for line in metadata.splitlines() if line.startswith("Requires-Dist:") and "extra ==" not in line]
    required = {line.split()[1].split(">")[0].lower() for line in core}
    assert {"jax", "flax", "optax", "grain", "numpy"} <= required
    assert not required & {"tensorflow", "torch", "matplotlib", "scikit-image", "lifelines"}
    for extra in ("test", "wsi", "report", "torch", "cuda", "tpu"):
        assert f"Provides-Extra: {extra}" in metadata


def test_installed_configurations_resolve_from_another_folder(wheel, tmp_path):
    site, elsewhere = tmp_path / "site", tmp_path / "elsewhere"
    elsewhere.mkdir()
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    code = (
        "import sys, histokd_jax; from histokd_jax.cli.main import main\n"
        f"assert histokd_jax.__file__.startswith({str(site)!r}), histokd_jax.__file__\n"
        "sys.exit(main(['train', '--config', 'configs/mkd.py:pr', '--print-config']))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=elsewhere,
        env={**os.environ, "PYTHONPATH": str(site), "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert '"task": "PR"' in done.stdout
