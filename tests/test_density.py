"""Annealed models against normalisers that are known, and the mode that anneals.

Of a sampled quantity a test asks that it be within `statistical.limit` of its standard errors,
which correct code fails with probability 1e-6: weights are nearly normal where they vary as
little as here.
"""

import json
import math
import os
import re
import signal

import exact
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from statistical import limit
from test_toy2d import trained  # noqa: F401

import drl_jax
from drl_jax import noise, testbeds
from drl_jax.errors import UserError
from drl_jax.evaluation import density
from drl_jax.likelihood import Bound, Partition
from drl_jax.modes import likelihood

CORRELATED = testbeds.gaussian(
    np.linspace(-0.3, 0.4, 8), 0.02 * np.eye(8) + 0.1 * np.outer(*[np.linspace(0, 1, 8)] * 2)
)
LOG_Z = 7.3  # of all exact models here


def points(data, n, seed=0):
    return np.asarray(data.sample(noise.example_keys(jax.random.key(seed), jnp.arange(n))))


CASES = [
    (testbeds.PLANE["blobs"](), 6),
    (testbeds.PLANE["blobs"](), 1000),
    (CORRELATED, 6),
    (CORRELATED, 1000),
]


@pytest.mark.slow
@pytest.mark.parametrize(("data", "T"), CASES, ids=["blobs6", "blobs1k", "8d6", "8d1k"])
def test_the_default_budget_bounds_log_Z_within_0_05_nats(data, T):
    """Of energies that are right up to a constant. The truth lies between the bounds, as far
    as their stated errors tell.

    Fails (each tried) with gains taken after the transitions instead of before, with gains
    the wrong way round, with log Z of white noise left out, and if the transitions target the
    rung that is left instead of the one that is entered.
    """
    model = exact.model(data, T, LOG_Z)
    found = density.log_partition(model, jax.random.key(1), points(data, 256))
    for bound, way in ((found.lower, -1), (found.upper, 1)):
        assert abs(bound.log_Z - LOG_Z) < 0.05
        assert way * (bound.log_Z - LOG_Z) > -limit(2) * bound.std_error
        assert bound.effective_sample_size > 200
        assert bound.meaningful


FEW = density.DEFAULT._replace(rungs=80, transitions=1, leapfrog=1, chains=20_000, burn_in=0)


@pytest.fixture(scope="module")
def few_rungs():
    """Log-weights of both ways along a ladder so short that they vary."""
    data = testbeds.PLANE["ellipse"]()
    model = exact.model(data, 6, LOG_Z)
    key, x = jax.random.key(2), points(data, FEW.chains)
    annealing = density.begin(model, key, x, FEW)
    for later in density.annealed(model, key, annealing, FEW):
        annealing = later
    return [np.float64(d.gains).sum(axis=1) for d in (annealing.down, annealing.up)]


def test_weights_are_unbiased_and_their_logarithms_are_bounds(few_rungs):
    """E[w] = Z down and 1 / Z up, although E[log w] misses by ten standard errors and more.

    Fails (each tried) if transitions come before the gain, and if a step 10% too long is
    accepted whatever it does.
    """
    for log_w, sign in zip(few_rungs, (1, -1), strict=True):
        excess = log_w - sign * LOG_Z
        w, n = np.exp(excess), len(log_w)
        assert 0.2 < np.std(excess) < 1.5
        assert abs(np.mean(w) - 1) < limit(2) * np.std(w) / np.sqrt(n)
        assert np.mean(excess) < -10 * np.std(excess) / np.sqrt(n)


def test_the_warm_up_finds_the_steps_of_the_target_acceptance_on_every_marginal():
    model = exact.model(CORRELATED, 6)
    budget = density.DEFAULT._replace(
        chains=512, rungs=60, burn_in=0, transitions=2, warmup_steps=300
    )
    key = jax.random.key(3)
    annealing = density.begin(model, key, points(CORRELATED, 512), budget)
    for later in density.annealed(model, key, annealing, budget):
        annealing = later
    acceptance = annealing.down.acceptance
    np.testing.assert_allclose(np.mean(acceptance), budget.target_acceptance, atol=0.05)
    np.testing.assert_allclose(acceptance, budget.target_acceptance, atol=0.15)


def test_an_annealing_that_is_stopped_goes_on_to_the_same_bits():
    """Through `to_arrays` and back, in the middle of either way."""
    model = exact.model(testbeds.PLANE["ellipse"](), 6)
    budget = density.DEFAULT._replace(chains=5, rungs=130, burn_in=7, transitions=1)
    key, x = jax.random.key(4), points(testbeds.PLANE["ellipse"](), 3)
    begun = density.begin(model, key, x, budget)
    whole = list(density.annealed(model, key, begun, budget))
    made = [annealing.made for annealing in whole]
    assert made[-1] == density.moves(model.method.schedule, budget)
    assert np.all(np.diff(made) > 0)
    for stop in (0, len(whole) // 4, 3 * len(whole) // 4):
        kept = density.from_arrays(density.to_arrays(whole[stop]))
        *_, end = density.annealed(model, key, kept, budget)
        jax.tree.map(np.testing.assert_array_equal, end, whole[-1])


def test_the_density_of_points_is_that_of_their_level_0():
    data = testbeds.PLANE["ellipse"]()
    model, x = exact.model(data, 6, LOG_Z), points(data, 4000)
    log_q, log_P = density.log_likelihood(model, jax.random.key(5), x)
    assert log_P is None
    schedule = model.method.schedule
    _, covariance = testbeds.marginal(data, 0, schedule).mean_and_covariance()
    entropy = np.linalg.slogdet(2 * np.pi * np.e * np.float64(covariance))[1] / 2
    # The log-density of a Gaussian in D dimensions varies by D / 2 nats².
    assert abs(np.mean(log_q) - LOG_Z + entropy) < limit(1) / np.sqrt(len(x))


def test_the_probability_of_a_discrete_image_is_known_where_its_pixels_are_uniform():
    """Two pixels of three values each, and images a little off these values.

    Fails without the rounding, and with the volume's sign turned.
    """
    values = np.stack(np.meshgrid([-1, 0, 1], [-1, 0, 1]), axis=-1).reshape(-1, 2)
    data = testbeds.isotropic(values.astype(float), std=1e-5)
    model = exact.model(data, 6, LOG_Z, shape=(1, 2, 1))
    x = np.clip(values + 0.1, -1, 1).reshape(-1, 1, 2, 1)
    log_q, log_P = density.log_likelihood(model, jax.random.key(6), x, values=3)
    np.testing.assert_allclose(log_P, LOG_Z - 2 * np.log(3), atol=2e-3)
    # log q_0 varies by one nat here; off the values it would be dozens lower.
    expected = LOG_Z - 2 * np.log(3) - np.log(2 * np.pi * np.e * 0.01**2)
    assert abs(np.mean(log_q) - expected) < limit(1) / np.sqrt(len(x))


BUDGET = [
    "--config.likelihood.chains=64",
    "--config.likelihood.rungs=100",
    "--config.likelihood.transitions=2",
    "--config.likelihood.burn_in=20",
    "--config.likelihood.warmup_steps=4",
    "--config.likelihood.max_gap=5",
]


def start(model, workdir, *args):
    return tiny.main(
        "--mode=likelihood", f"--model={model}", f"--workdir={workdir}", *BUDGET, *args
    )


@pytest.mark.slow
def test_the_mode_says_the_density_of_its_data_and_goes_on_where_it_was_stopped(
    trained,  # noqa: F811
    tmp_path,
    monkeypatch,
    caplog,
):
    """Stopped on either way, it ends in the same bits."""
    assert start(trained, tmp_path / "whole") == 0
    folder = "likelihood/step_30_seed_0"
    files = {path.name: path.read_bytes() for path in (tmp_path / "whole" / folder).iterdir()}
    assert files.keys() == {"likelihood.json", "likelihood.png"}
    numbers = json.loads(files["likelihood.json"])
    Z = {name: numbers["log_Z"][name]["log_Z"] for name in ("lower", "upper")}
    assert numbers["gap"] == pytest.approx(Z["upper"] - Z["lower"])
    log_density = numbers["log_density"]
    assert log_density["to"] - log_density["from"] == pytest.approx(abs(numbers["gap"]))
    assert "bits_per_dim" not in numbers  # of points
    assert numbers["num_data"] == 10_000
    assert f"{log_density['from']:.3f} to {log_density['to']:.3f}" in caplog.text

    add, calls = likelihood.Progress.add, []

    def stop_now_and_then(self, moves):
        add(self, moves)
        calls.append(moves)
        if len(calls) % 80 == 0:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(likelihood.Progress, "add", stop_now_and_then)
    stops = 0
    while (status := start(trained, tmp_path / "cut")) == 128 + signal.SIGTERM:
        stops += 1
        assert start(trained, tmp_path / "cut", "--config.likelihood.chains=65") == 1
    assert status == 0
    assert stops >= 2
    for name, content in files.items():
        assert (tmp_path / "cut" / folder / name).read_bytes() == content


@pytest.mark.slow
def test_few_levels_too_far_apart_are_said_to_be(tmp_path, capsys):
    """The shipped digits, T6: no number is given, and nothing is left."""
    few = [
        "--config.likelihood.chains=8",
        "--config.likelihood.rungs=12",
        "--config.likelihood.transitions=1",
        "--config.likelihood.burn_in=0",
    ]
    assert start("digits", tmp_path, *few) == 1
    told = capsys.readouterr().err.splitlines()[-1]
    assert re.fullmatch(
        r"error: the bounds of log Z .* so no density can be told: T = 6 noise levels are too "
        r"far apart for annealing; train with --config.diffusion.T=1000, .*",
        told,
    )
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def bound(log_Z, ess=200.0):
    return Bound(log_Z, 0.01, ess, 256, 0.2)


@pytest.mark.parametrize("gap", [60.0, -60.0, math.nan, math.inf])
def test_bounds_that_are_far_apart_or_have_crossed_are_refused(gap):
    Z = Partition(bound(10.0), bound(10.0 + gap))
    words = r"^the bounds .* bits a dimension apart .* the budget is too small; raise .*rungs"
    with pytest.raises(UserError, match=words):
        likelihood.require_usable(Z, density.DEFAULT, D=64, T=1000)


def test_weights_of_a_few_chains_are_warned_of(caplog):
    Z = Partition(bound(10.0, ess=1.5), bound(10.1))
    likelihood.require_usable(Z, density.DEFAULT, D=64, T=1000)
    (message,) = caplog.messages
    assert "effective sample size of the lower bound is 1.5 of 256" in message


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--model=nonesuch"], "'nonesuch' is no work directory"),
        (["--config.likelihood.chains=0"], "likelihood.chains is 0: it must be positive"),
        (["--config.likelihood.burn_in=-1"], "burn_in is -1: it must not be negative"),
        (["--config.likelihood.target_acceptance=1.0"], r"must lie in \(0, 1\)"),
        (["--config.data.name=folder:nonesuch"], "no such folder"),
    ],
)
def test_a_wrong_command_is_one_clear_line(tmp_path, capsys, args, words):
    assert start("digits", tmp_path / "run", *args) == 1
    told = capsys.readouterr().err
    assert re.fullmatch(r"error: .*\n", told)
    assert re.search(words, told)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("x", "words"),
    [
        (np.zeros((2, 8, 8, 1), np.uint8), "dtype uint8: give floating-point"),
        (np.full((2, 8, 8, 1), 255.0), r"pixels lie in \[255, 255\]"),
        (np.full((2, 8, 8, 1), np.nan), "pixels lie in"),
        (np.zeros((2, 9, 8, 1)), "2x9x8x1: give one or more of 8x8x1"),
    ],
)
def test_data_that_are_no_images_of_the_model_are_one_clear_line(x, words):
    with pytest.raises(UserError, match=f"^[^\n]*{words}[^\n]*$"):
        density.log_likelihood(drl_jax.load("digits"), jax.random.key(0), x, values=17)
