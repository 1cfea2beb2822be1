import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from drl_jax import benchmark, flops
from drl_jax import config as config_lib

ROOT = Path(__file__).parents[1]


def test_the_command_prints_a_table_and_writes_json(tmp_path):
    path = tmp_path / "benchmark.json"
    command = [sys.executable, "-m", "drl_jax.benchmark", "--quick", "--repeats=1"]
    command += ["--config=configs/digits.py", "--K=1", "--samples=4"]
    done = subprocess.run(
        [*command, f"--json={path}"],
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=True,
    )
    rows = json.loads(path.read_text())["programs"]
    names = ["forward pass", "chain step", "training step", "generation"]
    assert [row["name"] for row in rows] == names
    assert all(row["name"] in done.stdout and row["efficiency"][0] > 0 for row in rows)


def test_growth_varies_a_size_and_fits_the_exponent(monkeypatch):
    """Of programs whose time is their FLOPs to the power of 1.3, on machines of any speed."""
    seen = []

    class Subject(SimpleNamespace):
        def __init__(self, config):
            super().__init__(config=config, mesh=SimpleNamespace(size=2))

        def training_step(self):
            seen.append(self.config.mcmc.K)
            return benchmark.Program("", flops.training_step(self.config), 1, 0.0, None)

    def timed(programs, repeats, devices):
        work = programs[0].flops
        speeds = [1e9 * len(seen), 3e11, 1e14][:repeats]
        seconds = [work**1.3 / (speed * devices) for speed in speeds]
        return [benchmark.Row("", work, 0.0, seconds, [work**-0.3] * repeats)], speeds

    monkeypatch.setattr(benchmark, "Subject", Subject)
    monkeypatch.setattr(benchmark, "timed", timed)
    monkeypatch.setattr(benchmark, "GROWTH", (("K", "mcmc.K", (1, 3, 10), "training step"),))
    (found,) = benchmark.growth(config_lib.load("configs/digits.py"), 3)
    assert seen == [1, 3, 10]
    assert found["exponent"] == pytest.approx(1.3, rel=1e-6)
    assert "K = 10" in benchmark.growth_table([found])


def test_a_size_can_be_varied(monkeypatch):
    config = config_lib.load("configs/digits.py")
    small = {"train.batch_size": 8, "energy.ch": 8, "energy.N": 1, "mcmc.K": 1}
    config.update_from_flattened_dict(small)
    monkeypatch.setattr(benchmark, "SIDE", 64)
    monkeypatch.setattr(benchmark, "GROWTH", (("T", "diffusion.T", (2, 3), "generation"),))
    (found,) = benchmark.growth(config, 1)
    assert all(row["seconds"][0] > 0 for row in found["programs"])
    work = [row["flops"] for row in found["programs"]]
    assert work[1] == pytest.approx(1.5 * work[0])
