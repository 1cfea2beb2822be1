import os
import subprocess
import sys

import pytest
from helpers import tiny

from drl_jax.runtime import jax_setup


@pytest.fixture
def environ(monkeypatch):
    """An empty environment, of a machine without a TPU."""
    monkeypatch.setattr(os, "environ", {})
    monkeypatch.setattr(jax_setup, "has_google_hardware", lambda: False)
    return os.environ


def test_the_users_compilation_cache_is_used(environ):
    environ["XDG_CACHE_HOME"] = "/mine"
    jax_setup.prepare()
    assert environ["JAX_COMPILATION_CACHE_DIR"] == "/mine/drl_jax"
    environ["JAX_COMPILATION_CACHE_DIR"] = "/theirs"
    jax_setup.prepare()
    assert environ["JAX_COMPILATION_CACHE_DIR"] == "/theirs"


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, "2"),
        ({"JAX_NUM_CPU_DEVICES": "5"}, "5"),
        ({"XLA_FLAGS": "--xla_force_host_platform_device_count=3"}, None),
    ],
)
def test_the_users_number_of_cpu_devices_is_used(given, expected, environ):
    environ.update(given)
    jax_setup.prepare(cpu_devices=2)
    jax_setup.prepare(cpu_devices=2)  # as a second run in the same process does
    assert environ.get("JAX_NUM_CPU_DEVICES") == expected
    assert environ["XLA_FLAGS"].split() == [
        jax_setup.CPU_DEADLOCK_TIMEOUT,
        *given.get("XLA_FLAGS", "").split(),
    ]


def test_the_variables_of_a_topology_override_the_users(environ):
    environ["JAX_PLATFORMS"] = "cuda"
    jax_setup.prepare(environment={"JAX_PLATFORMS": "cpu"})
    assert environ["JAX_PLATFORMS"] == "cpu"
    assert environ["JAX_ENABLE_COMPILATION_CACHE"] == "false"


@pytest.mark.parametrize("has_tpu", [False, True])
def test_libtpu_does_not_search_for_a_tpu_where_there_is_none(has_tpu, environ, monkeypatch):
    monkeypatch.setattr(jax_setup, "has_google_hardware", lambda: has_tpu)
    jax_setup.prepare()
    assert ("TPU_SKIP_MDS_QUERY" in environ) is not has_tpu
    assert "JAX_PLATFORMS" not in environ


def test_jax_is_not_imported_and_gets_the_cpu_devices():
    program = (
        "import sys\n"
        "from drl_jax.runtime import jax_setup\n"
        "jax_setup.prepare(cpu_devices=3)\n"
        "assert 'jax' not in sys.modules\n"
        "import jax\n"
        "print(jax.device_count('cpu'))\n"
    )
    variables = {
        name: value
        for name, value in os.environ.items()
        if name not in ("XLA_FLAGS", "JAX_NUM_CPU_DEVICES")
    }
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tiny.ROOT,
        env=variables,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "3\n"
