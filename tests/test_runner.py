"""The task long_run, as run from the command line."""

import io
import json
import os
import re
import signal

import jax
import numpy as np
import pytest
from etils import epath
from helpers import tiny
from PIL import Image

from drl_jax import noise
from drl_jax.errors import UserError
from drl_jax.metrics import classifier
from drl_jax.metrics.frechet import fit, frechet_distance
from drl_jax.sampling import ladder
from drl_jax.standardisation import IDENTITY, Standardisation
from drl_jax.storage import runs
from drl_jax.tasks.long_run import runner

T = 6
DEFAULTS = {"num_steps": 20, "num_chains": 8}
LABELLED = ["--config.evaluation.num_data=1797", "--num_chains=52", "--levels=0,4"]
HMC = [
    "--config.mcmc.sampler=hmc",
    "--config.mcmc.leapfrog=(2,)",
    "--config.mcmc.warmup_steps=5",
    "--levels=0",
]


@pytest.fixture
def workdir(tmp_path):
    return tiny.trained(copy=epath.Path(tmp_path) / "run")


def start(workdir, *args, **flags):
    values = [f"--{name}={value}" for name, value in (DEFAULTS | flags).items()]
    return tiny.main("--mode=long_run", f"--workdir={workdir}", *values, *args)


def folder(workdir, sampler="langevin"):
    return workdir / "long_run" / f"step_{tiny.STEPS}_{sampler}_seed_0"


def files(workdir, sampler="langevin"):
    """Returns the content of every file except the saved chains."""
    content = {path.name: path.read_bytes() for path in folder(workdir, sampler).iterdir()}
    del content["chains.snapshot"]
    return content


def results(workdir):
    def reject(text):
        raise ValueError(text)  # NaN and Infinity are not JSON

    text = (folder(workdir) / "long_run.json").read_text()
    return json.loads(text, parse_constant=reject)


@pytest.mark.slow
def test_the_results_describe_the_chains_and_more_steps_continue_them(workdir, caplog):
    assert start(workdir) == 0
    found = results(workdir)
    assert [r["step"] for r in found["records"]] == [0, 1, 2, 5, 10, 20]
    assert len(found["resolution"]) == T
    assert min(found["resolution"]) > 0
    first, *_, last = found["records"]
    assert first["displacement"] == [0.0] * T
    assert first["acceptance"] == first["r_hat"] == [None] * T
    assert last["acceptance"] == [1.0] * T
    assert last["draws"] == [8 * 10] * T
    # Chains start from data of the level above, which have too much noise: the Fréchet
    # distance shows it.
    for level in range(1, T - 1):
        assert first["frechet"][level] > found["data"]["frechet"][level]
    assert [r["steps_per_level"] for r in found["ladder"]["ladders"]] == [1, 3]
    for name in ("ladder.png", *(f"level_{level}.png" for level in range(T))):
        png = np.asarray(Image.open(io.BytesIO((folder(workdir) / name).read_bytes())))
        rows, columns = (2, 10) if name == "ladder.png" else (7, 8)
        assert png.shape == (8 * (9 * rows + 1), 8 * (9 * columns + 1))
    assert (folder(workdir) / "curves.png").exists()
    assert len([line for line in caplog.messages if "R-hat" in line]) == T
    # More steps continue from here and leave the first records unchanged.
    assert start(workdir, num_steps=50) == 0
    assert "resuming after step 20 of 50" in caplog.text
    longer = results(workdir)
    assert longer["records"][:6] == found["records"]
    assert longer["records"][6]["step"] == 50
    assert [r["steps"] for r in longer["ladder"]["ladders"]] == [10, 20, 50]


@pytest.mark.slow
def test_a_ladder_with_the_steps_of_training_draws_the_samples(workdir):
    K, n = tiny.CONFIG["mcmc.K"], 8
    model, key = runs.load(workdir).model, jax.random.key(3)
    keys = noise.example_keys(key, np.arange(n))
    x = ladder.white_noise(keys, (8, 8, 1), model.method.schedule)
    for level in reversed(range(T)):
        _, observation = model.long_run(key, x, np.full(n, level), K, points=0)
        x = observation.x
    error = np.abs(x - model.sample(key, n)).max(axis=(1, 2, 3))
    # Two programs round differently, which a chain can amplify.
    assert np.mean(error < 1e-4) > 0.8
    assert model.programs.advance_chains._cache_size() == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sampler", "args", "steps", "every"),
    [("langevin", [], 20, 16), ("hmc", HMC, 6, 8), ("langevin", LABELLED, 10, 9)],
)
def test_an_interrupted_run_is_resumed_to_the_same_bits(
    workdir, sampler, args, steps, every, monkeypatch, caplog
):
    arguments = [*args, f"--num_steps={steps}"]
    assert start(workdir, *arguments) == 0
    uninterrupted = files(workdir, sampler)
    folder(workdir, sampler).rmtree()
    monkeypatch.setattr(runner, "CALL_SECONDS", 0)  # one step per call
    add, calls = runner.Progress.add, []

    def add_and_interrupt(self, steps):
        add(self, steps)
        calls.append(steps)
        if len(calls) % every == 0:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(runner.Progress, "add", add_and_interrupt)
    while (status := start(workdir, *arguments)) == 128 + signal.SIGTERM:
        assert "is saved" in caplog.messages[-1]
    assert status == 0
    ladder_steps = sum(N // T * T for N in runner.ladder_steps(steps, T))
    assert sum(calls) == steps + ladder_steps  # no step is made twice
    assert max(calls) == 1
    assert len(calls) > every
    assert files(workdir, sampler) == uninterrupted
    if sampler == "langevin":
        assert start(workdir, *arguments) == 0  # there is nothing left to do
        assert files(workdir, sampler) == uninterrupted


@pytest.mark.slow
def test_chains_on_marginals_have_a_folder_of_their_own_and_no_ladder(workdir, monkeypatch):
    """Fails if the chains sample the conditionals."""
    run, models = runner.run, []

    def run_and_record(model, *args):
        models.append(model)
        return run(model, *args)

    monkeypatch.setattr(runner, "run", run_and_record)
    assert start(workdir, *HMC, "--marginal", num_steps=6) == 0
    assert np.all(np.isinf(models[0].method.schedule.sigma))
    found = json.loads((folder(workdir, "hmc_marginal") / "long_run.json").read_text())
    assert found["ladder"]["ladders"] == []
    first, *_, last = found["records"]
    assert first["displacement"] == [0.0]
    assert last["displacement"][0] > 0
    assert 0 < last["acceptance"][0] <= 1
    assert start(workdir, *HMC, num_steps=6) == 0  # on the conditionals
    assert not np.any(np.isinf(models[1].method.schedule.sigma))
    assert (folder(workdir, "hmc") / "long_run.json").exists()


@pytest.mark.slow
def test_chains_and_ladders_are_compared_in_the_features_of_a_classifier(workdir, caplog):
    assert start(workdir, *LABELLED, num_steps=10) == 0
    found = results(workdir)
    # The model is hardly trained. Level 4 is almost white noise.
    exact, steps = found["data"]["feature_frechet"], found["records"]
    assert 0 < exact[0] < steps[-1]["feature_frechet"][0]
    assert exact[1] > 2 * exact[0]
    (ladder_,) = found["ladder"]["ladders"]
    assert ladder_["feature_frechet"] > 2 * exact[0]
    assert "feature Fréchet distance" in caplog.text
    assert "R-hat of the label" in caplog.text
    assert steps[0]["label_r_hat"] == steps[0]["label_changes"] == [None, None]
    assert steps[-1]["draws"] == [52 * 5] * 2
    assert all(0 <= changes <= 4 for changes in steps[-1]["label_changes"])


def test_feature_distances_are_those_of_completed_and_clipped_images(monkeypatch):
    """Fails if x_t is compared itself, and if pixels outside [-1, 1] are not clipped."""
    monkeypatch.setattr(
        classifier.Classifier,
        "__call__",
        lambda self, x: (self._prepared(x).reshape(len(x), -1), None),
    )
    rng = np.random.default_rng(0)
    x, data = rng.normal(size=(20, 2, 2, 1)), rng.normal(size=(30, 4))
    features = runner.Features(
        classifier.Classifier({}, 1.0), fit(data), lambda x_t, top: x_t / top, IDENTITY
    )
    images = np.clip(x / 3, -1, 1).reshape(20, 4)
    wanted = frechet_distance(fit(images), fit(data))
    assert features.distance(x, 3) == pytest.approx(wanted)
    there = Standardisation(np.float32([0.5]), np.float32([0.1]))
    wanted = frechet_distance(fit(0.5 + 0.1 * x.reshape(20, 4) / 3), fit(data))
    in_units_of_levels = features._replace(standardisation=there)
    assert in_units_of_levels.distance(x, 3) == pytest.approx(wanted)
    x[0, 0] = np.inf
    with pytest.raises(UserError, match="1 of 20 images completed from level 3 is not finite"):
        features.distance(x, 3)


def test_wrong_arguments_are_reported_in_one_line(workdir, capsys):
    for args, pattern in (
        (["--num_chains=1"], "num_chains is 1, "),
        (["--levels=6"], "level 6 .*levels 0 to 5"),
        (["--levels=0,a"], "levels.*a"),
        (["--levels=-1"], "levels.*-1"),
        (["--num_steps=0"], "num_steps.*0"),
        (["--num_chains=20"], "200 images.*120 chains"),
        (["--config.data.name=folder:nonesuch"], "folder:nonesuch"),
    ):
        defaults = {name: v for name, v in DEFAULTS.items() if f"--{name}" not in args[0]}
        flags = [f"--{name}={value}" for name, value in defaults.items()]
        assert tiny.main("--mode=long_run", f"--workdir={workdir}", *flags, *args) == 1
        err = capsys.readouterr().err.splitlines()[-1]
        assert re.search(f"^error: .*{pattern}", err)
        assert not (workdir / "long_run").exists()


@pytest.mark.slow
def test_chains_with_other_settings_or_damaged_ones_are_rejected(workdir, capsys):
    short = {"num_steps": 2, "levels": "0,3"}
    assert start(workdir, **short) == 0
    before = files(workdir)
    capsys.readouterr()
    assert start(workdir, **short, num_chains=4) == 1
    assert start(workdir, **(short | {"levels": "0"})) == 1
    assert start(workdir, "--config.mcmc.noise_scale=0.5", **short) == 1
    for err, pattern in zip(
        [e for e in capsys.readouterr().err.splitlines() if e.startswith("error")],
        (
            "num_chains was 8, now 4",
            r"levels was \[0, 3\], now \[0\]",
            "config.mcmc.noise_scale was 1.0, now 0.5",
        ),
        strict=True,
    ):
        assert re.search(f"{pattern}.*--seed", err)
    path = folder(workdir) / "chains.snapshot"
    path.write_bytes(path.read_bytes()[:-1])
    assert start(workdir, **short) == 1
    assert re.search(r"error: .*chains.snapshot is damaged: .*\n$", capsys.readouterr().err)
    assert files(workdir) == before


@pytest.mark.slow
def test_by_default_all_levels_share_one_batch(workdir):
    assert tiny.main("--mode=long_run", f"--workdir={workdir}", "--num_steps=1") == 0
    found = results(workdir)
    assert found["levels"] == list(range(T))
    assert found["chains_per_level"] == 64 // T // 4 * 4
    assert found["ladder"]["ladders"] == []


@pytest.mark.parametrize(
    ("before", "advice"), [(0, "b_squared"), (20, "--num_steps=20 reports the steps before")]
)
def test_chains_that_diverge_are_an_error_that_says_when(before, advice):
    x = np.ones((8, 2, 2, 1))
    runner.require_finite(x, made_before=before, step=50)
    x[3, 0] = np.inf
    with pytest.raises(UserError, match=f"^1 of 8 chains after step 50 .*{advice}"):
        runner.require_finite(x, made_before=before, step=50)
