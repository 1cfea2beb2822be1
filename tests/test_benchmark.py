import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from drl_jax import config as config_lib
from drl_jax import method as method_lib
from drl_jax.errors import UserError
from drl_jax.runtime.progress import Progress
from drl_jax.tools import benchmark, flops

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_the_command_prints_a_table_and_writes_json(tmp_path):
    path, config = tmp_path / "benchmark.json", tmp_path / "config.py"
    config.write_text(
        "from drl_jax import config\n"
        "def get_config():\n"
        "    small = config.load('configs/digits_t6.py')\n"
        "    small.energy.update(ch=8, mult=(1,))\n"
        "    return small\n"
    )
    command = [sys.executable, "-m", "drl_jax.tools.benchmark", "--quick", "--repeats=1"]
    command += [f"--config={config}", "--K=1", "--samples=3"]
    done = subprocess.run(
        [*command, f"--json={path}"],
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "2"},
        capture_output=True,
        text=True,
        check=True,
    )
    result = json.loads(path.read_text())
    assert 2**27 < result["peak_memory_bytes"] < 2**36
    rows = result["programs"]
    names = ["forward pass", "chain step", "training step", "generation, T6"]
    names += ["generation, T1000"]
    assert [row["name"] for row in rows] == names
    assert all(row["name"] in done.stdout and row["efficiency"][0] > 0 for row in rows)


@pytest.mark.slow
@pytest.mark.parametrize("trains", [True, False])
def test_new_processes_are_timed_until_the_first_step(tmp_path, monkeypatch, trains):
    """Replaces `drl_jax.main` by a module that sleeps unless the cache folder exists."""
    ends = "print('step 1/1  1 step/s', flush=True)" if trains else "sys.exit('no')"
    package = tmp_path / "drl_jax"
    package.mkdir()
    (package / "main.py").write_text(
        "import os, sys, time\n"
        "if '--help' not in sys.argv:\n"
        "    cache = os.environ['JAX_COMPILATION_CACHE_DIR']\n"
        "    time.sleep(0 if os.path.exists(cache) else 3)\n"
        "    os.makedirs(cache, exist_ok=True)\n"
        f"    {ends}\n"
        "    time.sleep(600)\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path))  # must not be used
    monkeypatch.chdir(tmp_path)
    if not trains:
        with pytest.raises(UserError, match=r"before its first step.*: no$"):
            benchmark.measure_startup("any.py")
        return
    times = benchmark.measure_startup("any.py")
    assert list(times) == ["help", "first step, cold", "first step, cached"]
    _, cold, cached = times.values()
    assert cached < 3 < cold < 60
    assert "first step, cold" in benchmark.startup_table(times)


@pytest.fixture
def machine(monkeypatch):
    """Simulates a machine whose speed varies; one of two matrix products is slowed down.

    The call of a program returns FLOPs, which take the time of the faster product.
    """
    measured, best = itertools.cycle([1e9, 3e11, 1e14, 2e9]), itertools.cycle([3e11, 1e14])
    monkeypatch.setattr(benchmark, "matmul_flops_per_second", lambda: next(measured))
    monkeypatch.setattr(benchmark, "seconds_per_call", lambda call: call() / next(best))


def test_efficiency_is_relative_to_the_matrix_product(machine):
    """4 steps of 1e9 FLOPs on 2 devices take as long as a product of 16e9 FLOPs on one."""
    program = benchmark.Program(
        name="chain",
        flops=1e9,
        steps=4,
        compile_seconds=0.5,
        cached_compile_seconds=0.1,
        call=lambda: 16e9,
    )
    with Progress(3, "measurement") as progress:
        (measurement,), matmul = benchmark.measure([program], 3, 2, progress)
    np.testing.assert_allclose(measurement.efficiency, [1e9 / 2 / (16e9 / 4)] * 3)
    np.testing.assert_allclose(measurement.seconds, 4e9 / np.array(matmul))
    assert matmul == [3e11, 1e14, 3e11]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "levels", "gradients"),
    [({}, 1, 5), ({"mcmc.K": 2}, 2, 2), (benchmark.T1K, 5, 1)],
)
def test_the_flops_of_generation_are_those_of_the_steps_that_run(
    changes, levels, gradients, monkeypatch
):
    def count_steps(keys, conditionals, x, top, bottom):
        sampler = conditionals.sampler
        gradients = sampler.K + (sampler.start is benchmark.ladder.start_from_posterior)
        return 0 * x + (top - bottom) * gradients

    monkeypatch.setattr(benchmark.ladder, "descend", count_steps)
    config = benchmark.with_changes(config_lib.load("configs/digits_t6.py"), changes)
    program = benchmark.Workload(config).generation(3)
    x = np.asarray(program.call())
    np.testing.assert_array_equal(x, np.full_like(x, levels * gradients))
    assert program.flops == pytest.approx(
        len(x) * 2 * levels * gradients * flops.forward(config)
    )


@pytest.mark.parametrize("file", ["digits", "cifar10"])
def test_a_training_step_of_the_u_net_costs_six_forward_passes(file):
    config = config_lib.load(f"configs/{file}.py")
    size, channels = config.data.image_size, config.data.channels
    config = benchmark.with_changes(config, benchmark.UNET)
    forward = flops.unet(size, channels, ch=32, mult=(1, 2), N=1)
    assert flops.training_step(config) == 6 * forward


@pytest.mark.parametrize("file", ["mnist", "cifar10_cdrl"])
def test_a_thousand_levels_of_any_configuration_cost_one_gradient_each(file):
    """Fails if a configuration's form of f or its initialiser remains."""
    config = benchmark.with_changes(config_lib.load(f"configs/{file}.py"), benchmark.T1K)
    assert method_lib.from_config(config).initialiser is None
    assert flops.sampling(config) == 2 * 1000 * flops.forward(config)


def test_a_program_is_compiled_and_then_read_from_the_cache():
    """Afterwards JAX uses the same cache as before."""
    events = []
    before = jax.config.jax_compilation_cache_dir
    x = np.ones((8, 8), np.float32)  # not of JAX, which would compile a program to make it

    def listener(event, **_):
        events.append(event)

    jax.monitoring.register_event_listener(listener)
    try:
        jitted = jax.jit(lambda x: jnp.sin(x @ x))
        program = benchmark.compiled("sine", jitted, x, flops=1.0)
    finally:
        jax.monitoring.unregister_event_listener(listener)
    hits = [event for event in events if event.startswith("/jax/compilation_cache/cache_")]
    assert hits == [f"/jax/compilation_cache/cache_{name}" for name in ("misses", "hits")]
    np.testing.assert_allclose(program.call(), np.sin(8 * np.ones((8, 8))), rtol=1e-5)
    assert min(program.compile_seconds, program.cached_compile_seconds) > 0
    assert jax.config.jax_compilation_cache_dir == before


def test_batches_of_random_images_are_read(monkeypatch):
    monkeypatch.setattr(benchmark, "INPUT_BATCHES", 3)
    config = config_lib.load("configs/cifar10.py")
    config.data.image_size, config.train.batch_size = 16, 5
    result = benchmark.measure_input(config, 2, images=7)
    assert (result["batch_size"], result["shape"]) == (5, (16, 16, 3))
    assert len(result["batches_per_second"]) == 2
    assert min(result["batches_per_second"]) > 0
    assert "batches of 5 images of 16x16x3: " in benchmark.input_table(result)
