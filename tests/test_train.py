"""Training and evaluation end with the same results."""

import json
import os
import re

import numpy as np
import pytest
from etils import epath
from helpers import tiny
from sklearn.datasets import load_digits

from drl_jax import method
from drl_jax.data import mixtures
from drl_jax.storage import runs

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
    assert {name for name in after if after[name] != before.get(name)} == {*RESULTS}
    assert before.keys() == after.keys()
    for name in RESULTS:
        assert before[name][1] == after[name][1]


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
    ],
    ids=["hmc", "recovery", "denoising"],
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
    expected = 1.0 if "diffusion__T" in changes else 0.65
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
