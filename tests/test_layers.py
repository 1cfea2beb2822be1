"""The architecture: which modules may import which, read from the source."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "drl_jax"

# From lowest to highest. A unit is a module or a subpackage of drl_jax.
LAYERS = (
    ("errors", "noise"),
    ("diffusion", "mcmc", "networks", "config", "standardisation"),
    ("recovery", "runtime"),
    ("sampling", "data"),
    ("method", "operators"),
    ("compose",),
    ("model",),
    ("storage",),
    ("metrics",),
    ("plots",),
    ("training",),
    ("tools",),
    ("tasks",),
    ("main",),
    ("__main__",),
)
LAYER = {unit: number for number, units in enumerate(LAYERS) for unit in units}

# The mathematics takes arrays, functions and small tuples. It uses no file, flag or logger.
MATHS = (
    "diffusion",
    "recovery",
    "networks",
    "mcmc",
    "sampling",
    "noise",
    "operators",
    "standardisation",
)
SIDE_EFFECTS = (
    "absl",
    "clu",
    "drl_jax.config",
    "etils",
    "grain",
    "logging",
    "ml_collections",
    "orbax",
)

FILES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def unit_of(path):
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(tree):
    """Yields the full names of all modules and names that a file imports."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def violations(unit, names):
    """Returns the imported names that a unit of this name may not import."""
    wrong = []
    for name in names:
        package, _, rest = name.partition(".")
        other = rest.partition(".")[0]
        upwards = package == "drl_jax" and other != unit and LAYER.get(other, 0) >= LAYER[unit]
        impure = unit in MATHS and name.startswith(SIDE_EFFECTS)
        wrong += [name] * (upwards or impure)
    return wrong


def test_every_unit_has_a_layer():
    assert {unit_of(path) for path in FILES} == LAYER.keys()


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_unit_imports_only_from_lower_layers(path):
    names = imported(ast.parse(path.read_text()))
    assert violations(unit_of(path), names) == []


@pytest.mark.parametrize(
    ("unit", "statement"),
    [
        ("recovery", "import logging"),
        ("sampling", "from drl_jax import config as config_lib"),
        ("mcmc", "def f():\n    from drl_jax.sampling import ladder"),
        ("metrics", "from drl_jax.training.step import Metrics"),
        ("data", "from drl_jax import sampling"),
        ("tasks", "import drl_jax.main"),
    ],
)
def test_a_forbidden_import_is_found_wherever_it_stands(unit, statement):
    assert len(violations(unit, imported(ast.parse(statement)))) == 1


@pytest.mark.parametrize(
    "module", ["drl_jax", "drl_jax.config", "drl_jax.errors", "drl_jax.tasks.table"]
)
def test_what_the_command_line_needs_loads_without_jax(module):
    code = f"import sys, {module}; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
