"""JAX's devices and compilation cache, as the command line and `drl_jax.load` set them up.

JAX reads environment variables when it is imported, so most tests start a new process.
"""

import json
import os
import subprocess
import sys

import jax
import pytest
from helpers import tiny

from drl_jax.runtime import jax_setup

# Runs its last argument, and prints JAX's settings and the number of devices.
PROGRAM = """
import json, sys
exec(sys.argv[1])
import jax
names = (
    "jax_num_cpu_devices",
    "jax_compilation_cache_dir",
    "jax_persistent_cache_min_compile_time_secs",
)
settings = {name: getattr(jax.config, name) for name in names}
print(json.dumps(settings | {"devices": jax.device_count("cpu")}))
"""
OURS = {"JAX_NUM_CPU_DEVICES", "JAX_COMPILATION_CACHE_DIR", "XLA_FLAGS", "XDG_CACHE_HOME"}


def run(code, home, **variables):
    """Runs the program above in a new process with an empty home directory."""
    inherited = {name: value for name, value in os.environ.items() if name not in OURS}
    return subprocess.run(
        [sys.executable, "-c", PROGRAM, code],
        cwd=tiny.ROOT,
        env=inherited | {"HOME": str(home)} | variables,
        capture_output=True,
        text=True,
        check=True,
    )


def settings_after(code, home, **variables):
    """Returns JAX's settings after some code."""
    return json.loads(run(code, home, **variables).stdout)


@pytest.fixture
def environ(monkeypatch, tmp_path):
    """The environment of a user who has set nothing, on a machine without a TPU."""
    monkeypatch.setattr(os, "environ", {"HOME": str(tmp_path)})
    monkeypatch.setattr(jax_setup, "has_google_hardware", lambda: False)
    return os.environ


COMMAND = (
    "from drl_jax import main\n"
    "main.run_task = lambda *_: None\n"
    "assert main.main(['drl_jax', '--mode=sample', '--workdir=x']) == 0"
)
PREPARE = "from drl_jax.runtime import jax_setup\njax_setup.prepare()"
LOAD = "import jax, drl_jax\nassert drl_jax.load('digits').mesh.size == jax.device_count()"


def test_python_and_the_command_line_set_up_jax_equally(tmp_path):
    """Fails if `load` does not prepare JAX, or if it is prepared after the model is loaded."""
    from_command = settings_after(COMMAND, tmp_path)
    cores = len(os.sched_getaffinity(0))
    assert from_command == {
        "jax_num_cpu_devices": min(cores, 8),
        "jax_compilation_cache_dir": f"{tmp_path}/.cache/drl_jax",
        "jax_persistent_cache_min_compile_time_secs": 0,
        "devices": min(cores, 8),
    }
    # While another process uses libtpu, this variable lets it search for a TPU all the same.
    from_python = run(LOAD, tmp_path, ALLOW_MULTIPLE_LIBTPU_LOAD="1")
    assert json.loads(from_python.stdout) == from_command
    assert from_python.stderr == ""
    assert list((tmp_path / ".cache" / "drl_jax").iterdir())


def test_settings_that_the_program_has_made_are_kept(tmp_path):
    made = (
        "import jax\n"
        "jax.config.update('jax_num_cpu_devices', 3)\n"
        f"jax.config.update('jax_compilation_cache_dir', '{tmp_path}/mine')\n"
        "jax.config.update('jax_persistent_cache_min_compile_time_secs', 7)\n"
    )
    assert settings_after(made + PREPARE, tmp_path) == {
        "jax_num_cpu_devices": 3,
        "jax_compilation_cache_dir": f"{tmp_path}/mine",
        "jax_persistent_cache_min_compile_time_secs": 7,
        "devices": 3,
    }


def test_settings_in_environment_variables_are_kept(tmp_path):
    """An empty cache folder disables the cache, and 1 second is JAX's own default."""
    variables = {
        "JAX_NUM_CPU_DEVICES": "3",
        "JAX_COMPILATION_CACHE_DIR": "",
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "1",
    }
    assert settings_after(PREPARE, tmp_path, **variables) == {
        "jax_num_cpu_devices": 3,
        "jax_compilation_cache_dir": "",
        "jax_persistent_cache_min_compile_time_secs": 1,
        "devices": 3,
    }
    assert list(tmp_path.iterdir()) == []


def test_a_flag_of_xla_can_set_the_number_of_devices(tmp_path):
    flag = "--xla_force_host_platform_device_count=3"
    found = settings_after(PREPARE, tmp_path, XLA_FLAGS=flag)
    assert (found["jax_num_cpu_devices"], found["devices"]) == (-1, 3)


def test_devices_that_jax_has_initialised_are_kept(tmp_path):
    """As in a notebook whose first cell draws a key."""
    found = settings_after("import jax\njax.random.key(0)\n" + PREPARE, tmp_path)
    assert (found["jax_num_cpu_devices"], found["devices"]) == (-1, 1)
    assert found["jax_compilation_cache_dir"] == f"{tmp_path}/.cache/drl_jax"


def test_jax_can_be_left_as_it_is(tmp_path):
    code = "import jax, drl_jax\ndrl_jax.load('digits', set_up_jax=False)"
    assert settings_after(code, tmp_path) == {
        "jax_num_cpu_devices": -1,
        "jax_compilation_cache_dir": None,
        "jax_persistent_cache_min_compile_time_secs": 1,
        "devices": 1,
    }
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("variables", "folder"),
    [
        ({}, "HOME/.cache"),
        ({"XDG_CACHE_HOME": "HOME/mine"}, "HOME/mine"),
        ({"XDG_CACHE_HOME": ""}, "HOME/.cache"),
        ({"XDG_CACHE_HOME": "mine"}, "HOME/.cache"),
        ({"XDG_CACHE_HOME": "~/mine"}, "HOME/.cache"),
        ({"XDG_CACHE_HOME": "HOME/file"}, None),  # a folder cannot be created there
        ({"HOME": "home"}, None),
    ],
)
def test_compiled_programs_are_cached_in_a_folder_of_the_user(
    variables, folder, environ, tmp_path, monkeypatch
):
    (tmp_path / "file").write_text("")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    environ.update({name: v.replace("HOME", str(tmp_path)) for name, v in variables.items()})
    found = jax_setup.cache_folder()
    assert found == (folder and f"{folder.replace('HOME', str(tmp_path))}/drl_jax")
    assert list((tmp_path / "here").iterdir()) == []


def test_a_user_without_a_home_directory_has_no_cache(environ, tmp_path, monkeypatch):
    """`os.path.expanduser` asks the database of users if HOME is not set."""
    monkeypatch.chdir(tmp_path)
    environ.clear()
    monkeypatch.setattr(os, "getuid", lambda: 2**31 - 7)
    assert jax_setup.cache_folder() is None
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("given", [None, "--xla_force_host_platform_device_count=3"])
def test_long_steps_are_no_deadlock(given, environ):
    if given:
        environ["XLA_FLAGS"] = given
    jax_setup.prepare()
    jax_setup.prepare()  # as a second run in the same process does
    flags = environ["XLA_FLAGS"].split()
    assert flags == [jax_setup.CPU_DEADLOCK_TIMEOUT, *([given] if given else [])]


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


def test_the_settings_of_this_process_are_kept():
    before = jax.config.jax_compilation_cache_dir, jax.device_count()
    jax_setup.prepare()
    assert (jax.config.jax_compilation_cache_dir, jax.device_count()) == before
