"""The results of the task long_run, for a state made by hand."""

import json
import logging

import numpy as np
import pytest
from etils import epath

from drl_jax.metrics.frechet import fit
from drl_jax.sampling.chains import Chains
from drl_jax.tasks.long_run import report
from drl_jax.tasks.long_run.runner import Experiment, State

T, C = 6, 4  # levels, chains per level


@pytest.fixture
def experiment():
    rng = np.random.default_rng(0)
    levels = np.array([0, 5])
    return Experiment(
        levels=levels,
        t=np.repeat(levels, C),
        x_tilde=rng.uniform(-1, 1, (2 * C, 8, 8, 1)),
        distribution=np.arange(2 * C),
        condition_images=rng.uniform(-1, 1, (2, C, 8, 8, 1)),
        reference=[fit(rng.normal(size=(9, 64)))] * 2,
        data={"log_density": [-3.0, 2.0], "displacement": [0.5, 7.0], "frechet": [1.0, 2.0]},
        image_reference=fit(rng.normal(size=(9, 64))),
        image_frechet=1.5,
        resolution=[0.36, 1e-4],
        exact=rng.uniform(-1, 1, (2, C, 8, 8, 1)),
    )


def record(step, **changes):
    values = {
        "log_density": [-4.0, 2.5],
        "displacement": [0.25, 6.0],
        "acceptance": [1.0, 0.5],
        "frechet": [3.0, 4.0],
        "r_hat": [None, None],
        "r_hat_worst": [None, None],
        "effective_sample_size": [None, None],
        "draws": [None, None],
    }
    return {"step": step} | values | changes


@pytest.fixture
def state():
    chains = Chains(np.full(2 * C, 2), None, np.zeros(2 * C), np.zeros((2 * C, 8, 5)))
    records = [
        record(0, acceptance=[None, None]),
        record(2, frechet=[np.nan, 4.0], r_hat=[np.inf, 1.1]),
    ]
    return State(chains=chains, records=records, pictures=[np.zeros((2, C, 8, 8, 1))] * 2)


def test_undefined_and_infinite_numbers_are_null_in_the_json_file(tmp_path, experiment, state):
    report.write(epath.Path(tmp_path), state, experiment, T)
    results = json.loads((tmp_path / "long_run.json").read_text())
    assert (results["levels"], results["chains_per_level"]) == ([0, 5], C)
    assert results["resolution"] == [0.36, 1e-4]
    first, last = results["records"]
    assert first["acceptance"] == [None, None]
    assert (last["frechet"], last["r_hat"]) == ([None, 4.0], [None, 1.1])
    assert results["ladder"] == {"samples": 2 * C, "data": {"frechet": 1.5}, "ladders": []}


def test_the_log_compares_the_last_record_of_each_level_with_exact_samples(
    tmp_path, experiment, state, caplog
):
    with caplog.at_level(logging.INFO):
        report.write(epath.Path(tmp_path), state, experiment, T)
    assert "level 5: F 2.5 (2.0), displacement 6.00 (7.00), acceptance 0.50" in caplog.text
    assert "--num_steps=6" in caplog.text  # fewer steps make no ladder
    assert not (tmp_path / "ladder.png").exists()


def test_the_steps_until_chains_forget_their_start_are_reported_for_each_level(
    tmp_path, experiment, state, caplog
):
    """The trace holds every fourth step. Chains of the first level do not move.

    Those of the second turn by 2 pi / 40 per point, and cos(2 pi 10 / 40) = 0. The log-density,
    which is the first scalar, does not count.
    """
    trace = np.ones((2 * C, 500, 5))
    angle = np.arange(500) / 40 + np.arange(C)[:, None] / C
    trace[C:, :, 1:] = np.sin(2 * np.pi * angle)[:, :, None]
    trace[..., 0] = np.random.default_rng(0).normal(size=(2 * C, 500))
    state.chains = state.chains._replace(step=np.full(2 * C, 2000), trace=trace)
    experiment = experiment._replace(distribution=np.repeat([0, 4], C))
    with caplog.at_level(logging.INFO):
        report.write(epath.Path(tmp_path), state, experiment, T)
    results = json.loads((tmp_path / "long_run.json").read_text())
    assert results["steps_to_forget"] == [None, 4 * 10]
    assert "level 0: " in caplog.text
    assert "below 0.1: unknown" in caplog.text
    assert "below 0.1: 40" in caplog.text


def test_dotted_lines_are_the_values_of_exact_samples(experiment, state):
    state.ladders.append({"steps": 6, "steps_per_level": 1, "frechet": 2.5})
    relative, displacement, *_, ladder = report.panels(state, experiment)
    assert relative.curves["level 0"] == [-1.0, -1.0]
    assert relative.marks["level 0"] == 0
    assert displacement.marks == {"level 0": 0.5, "level 5": 7.0}
    assert displacement.x == [0, 2]
    assert (ladder.x, ladder.curves, ladder.marks) == ([6], {"ladder": [2.5]}, {"ladder": 1.5})
