"""The public names of the package."""

import re
import rlcompleter
import subprocess
import sys
import tomllib
from importlib import metadata

import pytest
from helpers import tiny

import drl_jax


def test_importing_the_package_does_not_load_jax():
    program = "import sys, drl_jax; dir(drl_jax); print({'jax', 'numpy'} & set(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tiny.ROOT, capture_output=True, text=True
    )
    assert done.stdout == "set()\n", done.stderr


@pytest.mark.parametrize("name", drl_jax.__all__)
def test_every_public_name_exists_and_is_listed(name):
    assert getattr(drl_jax, name)
    assert name in dir(drl_jax)


def test_the_tab_key_completes_the_public_names():
    completer = rlcompleter.Completer({"drl_jax": drl_jax})
    found = {completer.complete("drl_jax.", i) for i in range(len(drl_jax.__all__))} - {None}
    names = {name for name in drl_jax.__all__ if not name.startswith("_")}
    assert {re.sub(r"\(.*", "", name) for name in found} == {f"drl_jax.{n}" for n in names}


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="'drl_jax' has no attribute 'nonesuch'"):
        drl_jax.nonesuch  # noqa: B018


def test_the_version_is_that_of_the_installed_package():
    assert drl_jax.__version__ == metadata.version("drl_jax")


def test_the_citation_has_the_version_of_the_project():
    project = tomllib.loads((tiny.ROOT / "pyproject.toml").read_text())["project"]
    citation = (tiny.ROOT / "CITATION.cff").read_text()
    assert f"\nversion: {project['version']}\n" in citation


def test_loading_returns_the_model():
    assert isinstance(drl_jax.load("digits"), drl_jax.Model)
    with pytest.raises(drl_jax.UserError, match="'nonesuch'"):
        drl_jax.load("nonesuch")
