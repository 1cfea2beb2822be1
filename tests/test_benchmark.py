import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from drl_jax import benchmark
from drl_jax.energies import resnet

ROOT = Path(__file__).parents[1]


def test_forward_flops_of_a_network_counted_by_hand():
    # Embedding 2 -> 8 -> 8; conv_in 1 -> 2 at 4x4; a block of 2 at 4x4; one of 4 at 2x2 with
    # a skip convolution; head 8 -> 4.
    dense = 2 * 8 + 8 * 8 + 8 * 2 + 8 * 4 + 8 * 4
    taps = 9 * (16 * (1 * 2 + 2 * 2 + 2 * 2) + 4 * (2 * 4 + 4 * 4 + 2 * 4))
    assert benchmark.forward_flops(4, 1, ch=2, mult=(1, 2), N=1) == 2 * (dense + taps)


def test_forward_flops_are_what_xla_counts():
    size, ch, mult, N = 64, 32, (1, 2), 2
    energy = resnet.energy(size, 3, ch=ch, mult=mult, N=N)
    params, _ = jax.eval_shape(energy.init, jax.random.key(0))
    x, t = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32), jnp.zeros((1,), jnp.int32)
    counted = jax.jit(energy.f).lower(params, x, t).cost_analysis()["flops"]
    # XLA leaves out the taps on the border and counts elementwise operations: a few percent.
    assert benchmark.forward_flops(size, 3, ch, mult, N) == pytest.approx(counted, rel=0.05)


def test_the_command_prints_a_table_and_writes_json(tmp_path):
    path = tmp_path / "benchmark.json"
    command = [sys.executable, "-m", "drl_jax.benchmark", "--quick", "--repeats=1"]
    command += ["--config=configs/digits.py", "--K=1"]
    done = subprocess.run(
        [*command, f"--json={path}"],
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=True,
    )
    rows = json.loads(path.read_text())["programs"]
    assert [row["name"] for row in rows] == ["forward pass", "chain step", "training step"]
    assert all(row["name"] in done.stdout and row["efficiency"][0] > 0 for row in rows)
