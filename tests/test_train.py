"""Training and evaluation end with the same results."""

import json
import os
import re
from unittest import mock

import numpy as np
import pytest
from etils import epath
from helpers import tiny
from helpers.runs import assert_same
from sklearn.datasets import load_digits
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.util.tensor_util import make_ndarray

from drl_jax import config as config_lib
from drl_jax import method
from drl_jax.data import mixtures
from drl_jax.storage import runs
from drl_jax.tasks import train

RESULTS = ("metrics.json", "samples.png")
MANY_LEVELS = {
    "diffusion__T": 100,
    "diffusion__schedule": "cosine",
    "energy__parameterisation": "noise",
    "mcmc__start": "posterior",
}


@pytest.fixture
def workdir(tmp_path):
    """A path at which nothing exists yet."""
    return epath.Path(tmp_path) / "run"


def files(folder):
    """Returns the time and the content of every file below a folder, by its path."""
    paths = [parent / name for parent, _, names in folder.walk() for name in names]
    return {
        path.relative_to(folder).as_posix(): (os.stat(path).st_mtime_ns, path.read_bytes())
        for path in paths
    }


@pytest.mark.parametrize("num_steps", [tiny.STEPS, tiny.STEPS - 1])
def test_training_that_is_finished_is_only_evaluated_again(workdir, num_steps):
    tiny.trained(copy=workdir)
    before = files(workdir)
    assert tiny.main(*tiny.training(workdir, train__num_steps=num_steps)) == 0
    after = files(workdir)
    changed = {name for name in after if after[name] != before.get(name)}
    unchanged = {*RESULTS, "data.json", "settings.json"}
    (events,) = changed - unchanged - {"log.txt"}
    assert events.startswith("events")
    assert before.keys() == after.keys() - {events}
    assert after["log.txt"][1].startswith(before["log.txt"][1])
    for name in unchanged:
        assert before[name][1] == after[name][1]


def test_a_run_that_is_being_evaluated_is_in_use(workdir, capsys):
    tiny.trained(copy=workdir)
    statuses = []

    def measure(**_):
        statuses.append(tiny.main(*tiny.training(workdir)))
        return {}

    with mock.patch("drl_jax.tasks.evaluate.measure", measure):
        assert tiny.main(*tiny.training(workdir)) == 0
    assert statuses == [1]
    assert f"another run is using {workdir} (process {os.getpid()}" in capsys.readouterr().err


def test_the_configuration_and_the_log_are_at_the_top_of_the_work_directory():
    workdir = tiny.trained()
    saved = runs.load(workdir).config
    assert json.loads((workdir / "config.json").read_text()) == config_lib.to_json(saved)
    lines = (workdir / "log.txt").read_text().splitlines()
    for words in ("devices  ", "step 50/300  ", "step 300/300  ", "wrote samples.png and"):
        assert any(words in line for line in lines), words


def test_the_final_metrics_are_the_numbers_in_the_file_of_metrics():
    metrics = {"step": 7, "a": 1, "b": {"c": 2.5, "list": [1, 2]}, "protocol": "paper"}
    assert train.final_scalars(metrics) == {"final/a": 1.0, "final/b/c": 2.5}


def test_tensorboard_shows_the_final_metrics_and_the_configuration():
    events = EventAccumulator(str(tiny.trained()), size_guidance={"tensors": 0}).Reload()
    metrics = json.loads((tiny.trained() / "metrics.json").read_text())
    (final,) = events.Tensors("final/pixel_frechet")
    assert final.step == tiny.STEPS
    assert make_ndarray(final.tensor_proto) == pytest.approx(metrics["pixel_frechet"])
    (config,) = events.Tensors("config")
    assert config.step == 0
    text = make_ndarray(config.tensor_proto).reshape(-1)[0].decode()
    assert json.loads(text.removeprefix("```json\n").removesuffix("\n```")) == json.loads(
        (tiny.trained() / "config.json").read_text()
    )


def test_evaluation_repeats_the_results_of_training(workdir):
    tiny.trained(copy=workdir)
    before = files(workdir)
    for name in RESULTS:
        (workdir / name).unlink()
    assert tiny.main("--mode=evaluate", f"--workdir={workdir}") == 0
    after = files(workdir)
    assert before.keys() == after.keys()
    for name in RESULTS:
        assert before[name][1] == after[name][1]
    assert json.loads(after["metrics.json"][1])["step"] == tiny.STEPS


INITIALISER = {
    "mcmc__start": "initialiser",
    "mcmc__denoise": "tweedie",
    "initialiser__network": "unet",
    "initialiser__ch": 8,
    "initialiser__mult": "(1,)",
    "initialiser__N": 1,
    "initialiser__dropout": 0.1,
    "initialiser__first_step": 2,
    "optim__clip_norm": 1.0,
    "train__pairs": "shared",
}


@pytest.mark.slow
def test_a_run_with_an_initialiser_resumes_bit_identically(tmp_path):
    """Fails if a key depends on the number of steps since the start of the process."""
    few = {"evaluation__num_samples": 16, "checkpoint__every_steps": 4}
    states = []
    for name, ends in (("resumed", (4, 8)), ("whole", (8,))):
        for end in ends:
            arguments = tiny.training(
                tmp_path / name, train__num_steps=end, **few, **INITIALISER
            )
            assert tiny.main(*arguments) == 0
        states.append(runs.load(tmp_path / name).model.params)
    assert_same(*states)


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"mcmc__sampler": "hmc", "mcmc__leapfrog": "(1,1,1,1,2,2)", "mcmc__warmup_steps": 30},
        MANY_LEVELS | {"mcmc__K": 1},
        MANY_LEVELS
        | {
            "mcmc__K": 0,
            "train__objective": "denoising",
            "energy__parameterisation": "gaussians",
            "data__dequantise": 0.125,
        },
        INITIALISER,
    ],
    ids=["hmc", "recovery", "denoising", "initialiser"],
)
def test_evaluation_repeats_the_results_of_every_kind_of_training(workdir, changes):
    """With HMC both adapt the step sizes before they sample, to the target acceptance.

    With 'gaussians', the mixture is fitted to the data, with the noise of dequantisation.
    """
    few = {"train__num_steps": 5, "evaluation__num_samples": 16, "evaluation__num_data": 64}
    assert tiny.main(*tiny.training(workdir, **few, **changes)) == 0
    before = (workdir / "metrics.json").read_bytes()
    assert tiny.main("--mode=evaluate", f"--workdir={workdir}") == 0
    assert (workdir / "metrics.json").read_bytes() == before
    found = json.loads(before)["levels"]
    assert len(found["level"]) == (10 if "diffusion__T" in changes else 6)
    expected = 0.65 if changes.get("mcmc__sampler") == "hmc" else 1.0
    np.testing.assert_allclose(found["acceptance"], expected, atol=0.3)
    if changes.get("energy__parameterisation") == "gaussians":
        mixture = runs.load(workdir).model.params[method.MIXTURE]
        fitted = mixtures.fit(load_digits().images / 8 - 1, 20)
        for name, array in fitted.diffused(1.0, 0.125 / np.sqrt(12))._asdict().items():
            np.testing.assert_allclose(mixture[name], array, rtol=1e-4, atol=1e-4)


def test_a_mixture_of_more_components_than_images_is_an_error_of_one_line(workdir, capsys):
    changes = {"energy__parameterisation": "gaussians", "energy__components": 1798}
    assert tiny.main(*tiny.training(workdir, **changes)) == 1
    *_, line = capsys.readouterr().err.splitlines()
    assert re.fullmatch(
        "error: config.energy.components is 1798, .* only 1797 .*use 1797 .*", line
    )
