import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from drl_jax import config as config_lib
from drl_jax.errors import UserError
from drl_jax.runtime.progress import Progress
from drl_jax.tools import benchmark, flops

ROOT = Path(__file__).parents[1]


def test_the_command_prints_a_table_and_writes_json(tmp_path):
    path = tmp_path / "benchmark.json"
    command = [sys.executable, "-m", "drl_jax.tools.benchmark", "--quick", "--repeats=1"]
    command += ["--config=configs/digits.py", "--K=1", "--samples=3"]
    done = subprocess.run(
        [*command, f"--json={path}"],
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "2"},
        capture_output=True,
        text=True,
        check=True,
    )
    result = json.loads(path.read_text())
    assert 2**27 < result["peak_memory"] < 2**36
    rows = result["programs"]
    names = ["forward pass", "chain step", "training step", "generation, T6"]
    names += ["generation, T1000"]
    assert [row["name"] for row in rows] == names
    assert all(row["name"] in done.stdout and row["efficiency"][0] > 0 for row in rows)


@pytest.mark.parametrize("trains", [True, False])
def test_new_processes_are_timed_until_the_first_step(tmp_path, monkeypatch, trains):
    """Of a module that says when it did what, in place of `drl_jax.main`."""
    says = "print('step 1/1  1 step/s', flush=True)" if trains else "sys.exit('no')"
    package = tmp_path / "drl_jax"
    package.mkdir()
    (package / "main.py").write_text(
        "import os, sys, time\n"
        "if '--help' not in sys.argv:\n"
        "    cache = os.environ['JAX_COMPILATION_CACHE_DIR']\n"
        "    time.sleep(0 if os.path.exists(cache) else 3)\n"
        "    os.makedirs(cache, exist_ok=True)\n"
        f"    {says}\n"
        "    time.sleep(600)\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path))  # not a new one
    monkeypatch.chdir(tmp_path)
    if not trains:
        with pytest.raises(UserError, match="before its first step: no"):
            benchmark.startup("any.py")
        return
    found = benchmark.startup("any.py")
    assert list(found) == ["help", "first step, cold", "first step, cached"]
    _, cold, cached = found.values()
    assert cached < 3 < cold < 60
    assert "first step, cold" in benchmark.startup_table(found)


@pytest.fixture
def machine(monkeypatch):
    """Changes its speed, and is disturbed before or after; a program is as fast as at best."""
    measured, best = itertools.cycle([1e9, 3e11, 1e14, 2e9]), itertools.cycle([3e11, 1e14])
    monkeypatch.setattr(benchmark, "matmul_flops_per_second", lambda: next(measured))
    monkeypatch.setattr(benchmark, "seconds_a_call", lambda call: call() / next(best))


def test_efficiency_is_the_floor_of_one_step_over_its_time(machine):
    """Of 4 steps of 1e9 FLOPs on 2 devices, in the time of a product of 16e9 on one."""
    programs = [benchmark.Program("chain", 1e9, 4, (0.5, 0.1), lambda: 16e9)]
    with Progress(3, "measurement") as progress:
        (row,), peaks = benchmark.timed(programs, 3, 2, progress)
    np.testing.assert_allclose(row.efficiency, [1e9 / 2 / (16e9 / 4)] * 3)
    np.testing.assert_allclose(row.seconds, 4e9 / np.array(peaks))
    assert peaks == [3e11, 1e14, 3e11]


def test_growth_varies_a_size_and_fits_the_exponent(machine, monkeypatch):
    """Of programs whose time is their FLOPs to the power of 1.3, times the product's."""
    seen = []

    class Subject(SimpleNamespace):
        def __init__(self, config):
            super().__init__(config=config, chips=2)

        def training_step(self):
            seen.append(self.config.mcmc.K)
            work = flops.training_step(self.config)
            return benchmark.Program("", work, 1, (0.0, 0.0), lambda: work**1.3)

    monkeypatch.setattr(benchmark, "Subject", Subject)
    monkeypatch.setattr(benchmark, "GROWTH", (("K", "mcmc.K", (1, 3, 10), "training step"),))
    (found,) = benchmark.growth(config_lib.load("configs/digits.py"), 3)
    assert seen == [1, 3, 10]
    assert found["exponent"] == pytest.approx(1.3, rel=1e-6)
    assert "K = 10" in benchmark.growth_table([found])


@pytest.mark.parametrize(("name", "field", "values", "kind"), benchmark.GROWTH)
def test_every_size_that_is_varied_costs_more_flops(name, field, values, kind):
    work = []
    for value in values:
        config = benchmark.varied(benchmark.default_config(), {field: value})
        each = flops.sampling if kind == "generation" else flops.training_step
        work.append(config.train.batch_size * each(config))
    assert all(b > a for a, b in itertools.pairwise(work))


@pytest.mark.parametrize(
    ("changes", "whole", "levels", "K"),
    [
        ({}, False, 1, 5),
        ({"mcmc.K": 2}, False, 2, 2),
        (benchmark.T1K, False, 5, 1),
        ({}, True, 6, 15),
    ],
)
def test_generation_is_measured_through_the_steps_that_are_counted(
    changes, whole, levels, K, monkeypatch
):
    monkeypatch.setattr(
        benchmark.sampling,
        "descend",
        lambda keys, F, x, top, bottom, schedule, sampler: 0 * x + (top - bottom) * sampler.K,
    )
    config = benchmark.varied(config_lib.load("configs/digits.py"), changes)
    program = benchmark.Subject(config).generation(3, whole=whole)
    x = np.asarray(program.call())
    np.testing.assert_array_equal(x, np.full_like(x, levels * K))
    assert program.flops == pytest.approx(len(x) * 2 * levels * K * flops.forward(config))


def test_a_program_is_compiled_and_then_read_from_the_cache():
    """And JAX's own cache is what it was."""
    met = []
    before = jax.config.jax_compilation_cache_dir
    x = np.ones((8, 8), np.float32)  # of NumPy: making it compiles nothing

    def listener(event, **_):
        met.append(event)

    jax.monitoring.register_event_listener(listener)
    try:
        program, (cold, cached) = benchmark.compiled(jax.jit(lambda x: jnp.sin(x @ x)), x)
    finally:
        jax.monitoring.unregister_event_listener(listener)
    hits = [event for event in met if event.startswith("/jax/compilation_cache/cache_")]
    assert hits == [f"/jax/compilation_cache/cache_{name}" for name in ("misses", "hits")]
    np.testing.assert_allclose(program(x), np.sin(8 * np.ones((8, 8))), rtol=1e-5)
    assert min(cold, cached) > 0
    assert jax.config.jax_compilation_cache_dir == before


def test_batches_are_read_out_of_random_images(monkeypatch):
    monkeypatch.setattr(benchmark, "BATCHES", 3)
    config = config_lib.load("configs/cifar10.py")
    config.data.image_size, config.train.batch_size = 16, 5
    found = benchmark.reading(config, 2, images=7)
    assert (found["batch"], found["shape"]) == (5, (16, 16, 3))
    assert len(found["batches_a_second"]) == 2
    assert min(found["batches_a_second"]) > 0
    assert "batches of 5 images of 16x16x3: " in benchmark.reading_table(found)
