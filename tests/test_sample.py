import io
import re

import jax
import numpy as np
import pytest
from etils import epath
from helpers import tiny
from PIL import Image

from drl_jax.model import Model
from drl_jax.runtime import progress
from drl_jax.sampling.ladder import Adapted
from drl_jax.storage import runs
from drl_jax.tasks import common


@pytest.fixture
def workdir(tmp_path):
    return tiny.trained(copy=epath.Path(tmp_path) / "run")


def samples_of(workdir, n, seed=0):
    """Runs the task, checks the files it writes, removes them, and returns the samples."""
    args = "--mode=sample", f"--workdir={workdir}", f"--num_samples={n}", f"--seed={seed}"
    assert tiny.main(*args) == 0
    folder = workdir / "samples" / f"step_{tiny.STEPS}_seed_{seed}"
    x = np.load(io.BytesIO((folder / "samples.npy").read_bytes()))
    assert x.shape == (n, 8, 8, 1)
    assert x.dtype == np.float32
    assert sorted(path.name for path in folder.iterdir()) == [
        *(f"{i:06d}.png" for i in range(n)),
        "grid.png",
        "samples.npy",
        "settings.json",
    ]
    for i in (0, n - 1):
        png = np.asarray(Image.open(io.BytesIO((folder / f"{i:06d}.png").read_bytes())))
        np.testing.assert_allclose(
            png / 127.5 - 1, np.clip(x[i, ..., 0], -1, 1), atol=0.5 / 127
        )
    folder.rmtree()
    return x


@pytest.mark.slow
def test_a_sample_is_a_function_of_the_seed_and_its_number(workdir):
    x = samples_of(workdir, 70)  # a full batch of 64, and a padded one
    np.testing.assert_array_equal(samples_of(workdir, 70), x)
    assert len(np.unique(x, axis=0)) == 70
    # Another batch size compiles to another program, which may add in another order. If
    # rounding moves an input of a rectifier across zero, that chain ends elsewhere.
    run = runs.load(workdir)
    run.config.evaluation.batch_size = 24
    other = runs.reconfigure(run, run.config).model
    for again in (samples_of(workdir, 40), other.sample(common.task_key("sample", 0), 70)):
        error = np.abs(again - x[: len(again)]).max(axis=(1, 2, 3))
        assert np.mean(error < 1e-5) > 0.9
    assert np.abs(samples_of(workdir, 3, seed=1) - x[:3]).max() > 0.1


@pytest.mark.slow
@pytest.mark.parametrize("sampler", ["mala", "hmc"])
def test_a_trained_model_is_sampled_by_another_sampler_after_a_warm_up(
    workdir, sampler, caplog
):
    changes = [f"--config.mcmc.sampler={sampler}", "--config.mcmc.warmup_steps=100"]
    assert tiny.main("--mode=sample", f"--workdir={workdir}", "--num_samples=8", *changes) == 0
    found = re.findall(r"level \d: .*, acceptance (.*), correlation .* (.*)", caplog.text)
    acceptance, correlation = np.float64(found).T
    np.testing.assert_allclose(acceptance, 6 * [0.65], atol=0.25)
    assert np.all(np.abs(correlation) < 1)


def test_the_warm_up_has_the_configured_length_and_target(monkeypatch):
    """Fails if a setting is ignored, or if the old step sizes are kept."""
    run = runs.load("digits_t6")
    run.config.mcmc.update(sampler="hmc", warmup_steps=7, target_acceptance=0.9)
    calls, step_size = [], np.arange(1.0, 7.0)

    def adapt(self, **settings):
        calls.append(settings)
        return self.with_step_size(step_size), Adapted(*np.zeros((3, 6)))

    monkeypatch.setattr(Model, "adapt", adapt)
    np.testing.assert_array_equal(common.adapted(run).model.step_size, step_size)
    (settings,) = calls
    assert (settings["num_steps"], settings["target"]) == (7, 0.9)
    run.config.mcmc.sampler = "langevin"
    assert common.adapted(run) is run


def test_samples_that_cannot_be_written_are_one_clear_line(workdir, capsys):
    capsys.readouterr()
    (workdir / "samples").write_text("a file instead of a folder")
    assert tiny.main("--mode=sample", f"--workdir={workdir}") == 1
    assert re.fullmatch(r"error: cannot write to .*\n", capsys.readouterr().err)


def test_the_log_reports_the_progress_of_sampling(monkeypatch, caplog):
    def sample_batches(self, key, n, guidance):
        yield from (np.zeros((40, 1)), np.ones((40, 1)), np.ones((20, 1)))

    monkeypatch.setattr(Model, "sample_batches", sample_batches)
    monkeypatch.setattr(progress, "LOG_INTERVAL", 0)
    model = runs.load("digits_t6").model
    with caplog.at_level("INFO", logger="drl_jax"):
        batches = common.draw(model, jax.random.key(0), 100)
        assert [len(batch) for batch in batches] == [40, 40, 20]
    assert caplog.messages == ["40 of 100 samples", "80 of 100 samples", "100 of 100 samples"]
