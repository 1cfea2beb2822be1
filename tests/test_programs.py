import importlib.util
import os
import subprocess
import sys

import pytest
from helpers import tiny

from drl_jax.errors import UserError
from drl_jax.tools.plan import chips, programs


@pytest.mark.parametrize(("topology", "extra"), [("v5e:2x2", "tpu"), ("h100:8", "cuda12")])
def test_the_error_for_a_missing_compiler_says_how_to_install_it(monkeypatch, topology, extra):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(UserError, match=rf"not installed.*-m pip install 'jax\[{extra}\]'$"):
        programs.mesh_of(chips.parse(topology))


def test_the_compiler_has_as_many_devices_as_the_topology():
    names = ["v3:2x2", "v4:2x2x1", "v4:4x4x4", "v5e:1x1", "v5e:16x16", "v5p:2x2x1", "v6e:2x4"]
    code = (
        "import sys; from drl_jax.tools.plan import chips, programs\n"
        "for name in sys.argv[1:]: print(programs.mesh_of(chips.parse(name)).size)"
    )
    environment = os.environ | chips.parse("v5e:1x1").environment
    command = [sys.executable, "-c", code, *names]
    out = subprocess.run(
        command, cwd=tiny.ROOT, env=environment, capture_output=True, text=True, check=True
    ).stdout
    assert list(map(int, out.split())) == [chips.parse(name).devices for name in names]


@pytest.mark.parametrize(
    ("message", "size"),
    [
        (
            "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO "
            "temporaries (67.98G) exceeds available HBM (15.75G).",
            67.98 * 2**30,
        ),
        ("XLA:TPU compile permanent error. Used 512.5M of 15.75G hbm.", 512.5 * 2**20),
        ("RESOURCE_EXHAUSTED: out of memory", None),
    ],
)
def test_the_memory_needed_is_read_from_an_out_of_memory_error(message, size):
    assert programs.reported_memory(message) == size
