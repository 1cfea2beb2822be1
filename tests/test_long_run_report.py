"""The results of the task long_run, for a state made by hand."""

import json
import logging

import numpy as np
import pytest
from etils import epath

from drl_jax.metrics.classifier import Classifier
from drl_jax.metrics.diagnostics import Convergence
from drl_jax.metrics.frechet import fit
from drl_jax.sampling.chains import Chains, Observation
from drl_jax.standardisation import IDENTITY
from drl_jax.tasks.long_run import report, runner
from drl_jax.tasks.long_run.runner import Experiment, Features, State

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


def test_labels_have_an_r_hat_of_their_own_and_do_not_count_as_positions(
    tmp_path, experiment, state, monkeypatch, caplog
):
    """Each chain of the first level has a label of its own; those of the second alternate.

    The halves 0, 1 of its four draws 0, 1, 0, 1 have equal means, so that R-hat² is
    (n - 1) / n, with n = 2.
    """
    monkeypatch.setattr(Features, "distance", lambda *_: 1.0)
    rng = np.random.default_rng(0)
    trace = rng.normal(size=(2 * C, 8, 6))
    trace[:C, :, 5] = np.arange(C)[:, None]
    trace[C:, :, 5] = np.arange(8) % 2
    chains = Chains(np.full(2 * C, 8), None, np.zeros(2 * C), trace)
    without = chains._replace(trace=trace[..., :5])
    observation = Observation(rng.normal(size=(2 * C, 8, 8, 1)), *np.zeros((2, 2 * C)))
    unlabelled = experiment._replace(distribution=np.repeat([0, 4], C))
    reference = fit(rng.normal(size=(9, 4)))
    features = Features(Classifier({}, 1.0), reference, lambda x, top: x, IDENTITY)
    data = experiment.data | {"feature_frechet": [1.0, 1.0]}
    labelled = unlabelled._replace(features=features, data=data)
    found = runner.chain_statistics(chains, observation, labelled, 8)
    expected = runner.chain_statistics(without, observation, unlabelled, 8)
    assert found["label_r_hat"] == [np.inf, pytest.approx(np.sqrt(0.5))]
    assert found["label_changes"] == [0, 3]
    for name in Convergence._fields:
        assert found[name] == expected[name]
    assert not {"label_r_hat", "label_changes"} & set(expected)
    forgotten = runner.steps_to_forget(without, unlabelled)
    assert runner.steps_to_forget(chains, labelled) == forgotten
    state.chains, state.records, state.pictures = chains, [found], state.pictures[:1]
    with caplog.at_level(logging.INFO):
        report.write(epath.Path(tmp_path), state, labelled, T)
    results = json.loads((tmp_path / "long_run.json").read_text())
    assert results["records"][0]["label_r_hat"][0] is None
    assert "R-hat of the label inf, changes of the label per chain 0.00" in caplog.text
    titles = [panel.title for panel in report.panels(state, labelled)]
    assert "split R-hat of the label, median over conditions" in titles


def test_dotted_lines_are_the_values_of_exact_samples(experiment, state):
    state.ladders.append({"steps": 6, "steps_per_level": 1, "frechet": 2.5})
    relative, displacement, *_, ladder = report.panels(state, experiment)
    assert relative.curves["level 0"] == [-1.0, -1.0]
    assert relative.marks["level 0"] == 0
    assert displacement.marks == {"level 0": 0.5, "level 5": 7.0}
    assert displacement.x == [0, 2]
    assert (ladder.x, ladder.curves, ladder.marks) == ([6], {"ladder": [2.5]}, {"ladder": 1.5})
