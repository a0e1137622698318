"""Who may import whom, checked on the syntax trees; and what importing may not do."""

import ast
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]

# Project modules that each layer may import. The longest matching name decides.
LAYERS = {
    "data_pipelines": {"data_pipelines"},
    "histokd_jax.types": set(),
    "histokd_jax.ops": {"histokd_jax.ops", "histokd_jax.types"},
    "histokd_jax.losses": {"histokd_jax.losses", "histokd_jax.ops", "histokd_jax.types"},
    "histokd_jax.nn": {"histokd_jax.nn", "histokd_jax.ops", "histokd_jax.types"},
    "histokd_jax.methods": {
        *("histokd_jax.methods", "histokd_jax.nn", "histokd_jax.losses", "histokd_jax.ops", "histokd_jax.types"),
        "data_pipelines.schema",
    },
    # Pretrained weights in the place of a stem.
    "histokd_jax.methods.hmkd.encoder": {"histokd_jax.methods", "histokd_jax.nn", "histokd_jax.encoders"},
    "histokd_jax.utils": {"histokd_jax.utils"},
    "histokd_jax.evals": {"histokd_jax.evals", "data_pipelines"},
    "histokd_jax.tasks": {"histokd_jax.tasks", "histokd_jax.evals", "histokd_jax.types", "data_pipelines"},
    "histokd_jax.report": {"histokd_jax.report", "histokd_jax.evals", "data_pipelines"},
    "histokd_jax.train": {
        *("histokd_jax.train", "histokd_jax.methods.registry", "histokd_jax.evals", "histokd_jax.utils"),
        *("histokd_jax.types", "histokd_jax.ops", "histokd_jax.tasks", "histokd_jax.encoders", "data_pipelines"),
    },
    "histokd_jax.inference": {
        *("histokd_jax.train", "histokd_jax.tasks", "histokd_jax.evals", "histokd_jax.utils", "histokd_jax.types"),
        "data_pipelines",
    },
    "histokd_jax.convert": {
        *("histokd_jax.convert", "histokd_jax.methods", "histokd_jax.train", "histokd_jax.utils", "histokd_jax.types"),
        *("histokd_jax.tasks", "data_pipelines"),
    },
    "histokd_jax.encoders": {
        *("histokd_jax.encoders", "histokd_jax.nn", "histokd_jax.types", "data_pipelines"),
    },
    "histokd_jax.embed": {
        *("histokd_jax.embed", "histokd_jax.encoders", "histokd_jax.nn", "histokd_jax.ops", "histokd_jax.types"),
        *("histokd_jax.train.sharding", "data_pipelines"),
    },
    "histokd_jax.probe": {
        *("histokd_jax.probe", "histokd_jax.embed", "histokd_jax.encoders", "histokd_jax.nn", "histokd_jax.ops"),
        *("histokd_jax.evals", "histokd_jax.types", "histokd_jax.train.provenance", "data_pipelines"),
    },
    "histokd_jax.cli": {
        *("histokd_jax.cli", "histokd_jax.train", "histokd_jax.evals", "histokd_jax.report", "histokd_jax.utils"),
        *("histokd_jax.inference", "histokd_jax.convert", "histokd_jax.tasks", "data_pipelines"),
        *("histokd_jax.encoders", "histokd_jax.embed", "histokd_jax.probe", "histokd_jax.ops.image.presets"),
    },
    "configs": {"configs"},
}
# Libraries that a layer must do without.
WITHOUT = {
    "data_pipelines": {"jax", "flax", "ml_collections"},
    "histokd_jax.types": {"flax", "ml_collections", "grain"},
    "histokd_jax.ops": {"flax", "ml_collections", "grain", "optax"},
    "histokd_jax.losses": {"flax", "ml_collections", "grain", "optax"},
    "histokd_jax.nn": {"ml_collections", "grain", "optax"},
    "histokd_jax.methods": {"grain", "orbax", "array_record"},
    "configs": {"jax", "numpy", "flax"},
}
HEAVY = {"tensorflow", "tensorflow_datasets", "torch", "openslide", "apache_beam", "umap"}


def sources():
    for package in ("histokd_jax", "data_pipelines", "configs"):
        for path in sorted((ROOT / package).rglob("*.py")):
            yield path, ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {name: path for path, name in sources()}
KNOWN = set(MODULES)


def tree(name):
    return ast.parse(MODULES[name].read_text(), MODULES[name].name)


def imported(node, module):
    """Modules that an import statement names; `from package import module` names the module."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    base = node.module or ""
    if node.level:
        package = module.split(".")
        is_package = MODULES[module].name == "__init__.py"
        base = ".".join(filter(None, [*package[: len(package) - node.level + is_package], base]))
    return [f"{base}.{a.name}" if f"{base}.{a.name}" in KNOWN else base for a in node.names]


def imports(module):
    for node in ast.walk(tree(module)):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            yield from ((name, node.lineno) for name in imported(node, module))


def within(name, prefix):
    return name == prefix or name.startswith(f"{prefix}.")


def rule_of(module, rules):
    return max((key for key in rules if within(module, key)), key=len, default=None)


def import_time_nodes(node):
    """Everything that runs when a module is imported: all but the bodies of functions and of TYPE_CHECKING."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            continue
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test):
            continue
        yield child
        yield from import_time_nodes(child)


def test_the_walk_sees_every_package():
    for package in LAYERS:
        assert any(within(module, package) for module in KNOWN), package
    assert len(KNOWN) > 60


def test_the_walk_resolves_every_form_of_import():
    def found(module):
        return {name for name, _ in imports(module)}

    assert "configs.common" in found("configs.mkd"), "from . import module"
    assert "histokd_jax.train.loop" in found("histokd_jax.train.run"), "from package import module"
    assert "histokd_jax.report.build" in found("histokd_jax.cli.report"), "inside a function"
    top = {
        n
        for node in import_time_nodes(tree("histokd_jax.cli.report"))
        if isinstance(node, ast.ImportFrom)
        for n in imported(node, "histokd_jax.cli.report")
    }
    assert "histokd_jax.report.build" not in top


@pytest.mark.parametrize("module", sorted(KNOWN))
def test_layers_import_only_what_lies_below_them(module):
    layer = rule_of(module, LAYERS)
    if layer is None:  # the packages themselves: a version and a docstring
        assert not [name for name, _ in imports(module) if name != "__future__"], module
        return
    for name, line in imports(module):
        if name == "histokd_jax" or not any(within(name, p) for p in ("histokd_jax", "data_pipelines", "configs")):
            continue  # the version, or another library
        assert any(within(name, allowed) for allowed in LAYERS[layer]), f"{module}:{line} imports {name}"


@pytest.mark.parametrize("layer", sorted(WITHOUT))
def test_layers_do_without_libraries_of_other_layers(layer):
    for module in (m for m in KNOWN if within(m, layer)):
        for name, line in imports(module):
            assert name.split(".")[0] not in WITHOUT[layer], f"{module}:{line} imports {name}"


def test_configs_import_the_config_library_only():
    for module in (m for m in KNOWN if within(m, "configs")):
        for name, line in imports(module):
            assert name.split(".")[0] in ("__future__", "ml_collections", "configs"), f"{module}:{line} imports {name}"


def test_only_the_entry_point_knows_the_command_line():
    users = [m for m in KNOWN for name, _ in imports(m) if within(name, "histokd_jax.cli.main")]
    assert users == []
    assert '"histokd = histokd_jax.cli.main:main"' in (ROOT / "setup.py").read_text()


@pytest.mark.parametrize("module", sorted(KNOWN))
def test_no_heavy_or_optional_library_is_imported_with_a_module(module):
    for node in import_time_nodes(tree(module)):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            for name in imported(node, module):
                assert name.split(".")[0] not in HEAVY, f"{module}:{node.lineno} imports {name}"


@pytest.mark.parametrize("module", sorted(KNOWN))
def test_importing_changes_no_global_setting(module):
    for node in import_time_nodes(tree(module)):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            assert not called.endswith("config.update"), f"{module}:{node.lineno}: {called}"
            assert called not in ("os.putenv", "os.environ.setdefault", "os.environ.update"), f"{module}:{node.lineno}"
        if isinstance(node, (ast.Assign, ast.AugAssign)):
            target = ast.unparse(node.targets[0] if isinstance(node, ast.Assign) else node.target)
            assert not target.startswith("os.environ"), f"{module}:{node.lineno} sets {target}"


def test_the_registry_names_modules_that_exist():
    from histokd_jax.methods.registry import METHODS

    assert METHODS and set(METHODS.values()) <= KNOWN


def child(code):
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_help_needs_no_jax():
    """`histokd --help` answers at once: the parser is built without JAX, pandas or matplotlib."""
    code = (
        "import sys; from histokd_jax.cli.main import parser; parser().format_help();"
        "print([m for m in ('jax', 'flax', 'pandas', 'matplotlib', 'grain', 'tensorflow') if m in sys.modules])"
    )
    assert child(code).strip() == "[]"


def test_importing_everything_needs_no_tensorflow_torch_or_slides_and_starts_no_device():
    modules = [m for m in KNOWN if not within(m, "configs")]
    code = (
        f"import importlib, sys; [importlib.import_module(m) for m in {sorted(modules)!r}];"
        f"print([m for m in {sorted(HEAVY)!r} if m in sys.modules]);"
        "from jax._src import xla_bridge; print(xla_bridge.backends_are_initialized())"
    )
    assert child(code).split("\n")[:2] == ["[]", "False"]
