"""The task likelihood, as run from the command line."""

import dataclasses
import json
import math
import os
import re
import signal

import jax
import numpy as np
import pytest
from etils import epath
from helpers import tiny

from drl_jax import config as config_lib
from drl_jax.data import sources
from drl_jax.errors import UserError
from drl_jax.metrics import density
from drl_jax.metrics.density import Annealing
from drl_jax.plots import figures
from drl_jax.sampling.annealing import Agreement, Bound, Partition
from drl_jax.storage import runs, snapshots
from drl_jax.storage.snapshots import Snapshot
from drl_jax.tasks import common, likelihood

BUDGET = [
    "--config.likelihood.chains=64",
    "--config.likelihood.distributions=100",
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
def test_an_interrupted_annealing_is_resumed_to_the_same_results(
    trained_toy, tmp_path, monkeypatch, caplog
):
    """It is interrupted in three passes; all files are the same to the bit."""
    assert start(trained_toy, tmp_path / "whole") == 0
    folder = "likelihood/step_30_seed_0"
    files = {path.name: path.read_bytes() for path in (tmp_path / "whole" / folder).iterdir()}
    assert files.keys() == {"likelihood.json", "likelihood.png", "settings.json"}
    results = json.loads(files["likelihood.json"])
    lower = max(
        results["log_Z"]["lower"].values(),
        key=lambda bound: bound["log_Z"] - 2 * bound["std_error"],
    )["log_Z"]
    upper = max(bound["log_Z"] for bound in results["log_Z"]["upper"].values())
    assert results["gap"] == pytest.approx(upper - lower)
    assert results["agreement"].keys() == set(Agreement._fields)
    assert (results["split"], results["held_out"]) == ("test", True)
    assert "on held-out data (test split)" in caplog.text
    log_density = results["log_density"]
    assert log_density["to"] - log_density["from"] == pytest.approx(results["gap"])
    assert "bits_per_dim" not in results  # points are not discrete
    assert results["num_data"] == 10_000
    assert f"at most {log_density['to']:.3f} nats" in caplog.text
    assert f"at least {log_density['from']:.3f} nats if the upper bounds" in caplog.text

    add, calls = likelihood.Progress.add, []

    def add_and_interrupt(self, moves):
        add(self, moves)
        calls.append(moves)
        if len(calls) % 130 == 0:
            os.kill(os.getpid(), signal.SIGTERM)

    def stopped(**kwargs):
        """Stands in for the measurement after the annealing, only once."""
        monkeypatch.setattr(density, "log_likelihood", log_likelihood)
        signal.raise_signal(signal.SIGTERM)

    log_likelihood = density.log_likelihood
    monkeypatch.setattr(density, "log_likelihood", stopped)
    monkeypatch.setattr(likelihood.Progress, "add", add_and_interrupt)
    interruptions = 0
    while (status := start(trained_toy, tmp_path / "cut")) == 128 + signal.SIGTERM:
        interruptions += 1
        if interruptions == 1:
            assert start(trained_toy, tmp_path / "cut", "--config.likelihood.chains=65") == 1
    assert status == 0
    assert interruptions >= 3
    assert "the annealing is complete and saved" in caplog.text
    for name, content in files.items():
        assert (tmp_path / "cut" / folder / name).read_bytes() == content


@pytest.mark.slow
def test_with_few_levels_the_bounds_are_rejected(tmp_path, capsys):
    """The model has T = 6: no result is written, and nothing is left behind."""
    cheap = [
        "--config.likelihood.chains=8",
        "--config.likelihood.distributions=12",
        "--config.likelihood.transitions=1",
        "--config.likelihood.burn_in=0",
    ]
    assert start("digits_t6", tmp_path, *cheap) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert re.fullmatch(
        r"error: .*bits per dimension.*max_gap = 5: .*distributions.* more noise levels than 6",
        error,
    )
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_bfloat16_is_refused(tmp_path, capsys):
    assert start("digits_t6", tmp_path, "--config.evaluation.dtype=bfloat16") == 1
    assert "evaluation.dtype is 'bfloat16'" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_unfinished_work_of_an_earlier_version_is_refused_in_one_line(tmp_path, capsys):
    """Earlier versions had two passes, other arrays, and no likelihood.tempered_std."""
    path = epath.Path(tmp_path) / "likelihood/step_5000_seed_0/annealing.snapshot"
    path.parent.mkdir(parents=True)
    settings = {"config.likelihood.chains": 64, "model": "digits_t6"}
    arrays = {"down_x": np.zeros((64, 8, 8, 1), np.float32)}
    snapshots.write(path, Snapshot({}, arrays), settings)
    assert start("digits_t6", tmp_path) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert re.fullmatch(
        r"error: .*annealing.snapshot was written by an earlier version .*: remove it .*", error
    )


def bound(log_Z, ess=200.0):
    return Bound(log_Z=log_Z, std_error=0.01, effective_sample_size=ess, chains=256, spread=0.2)


def partition(levels, from_data, tempered=None, from_model=None, **p_values):
    """Returns bounds; those that are not given are equal to the other one on their side."""
    return Partition(
        levels=levels,
        tempered=tempered or levels,
        from_data=from_data,
        from_model=from_model or from_data,
        agreement=Agreement(**{"order": 1.0, "log_density": 0.5, "log_weight": 0.5} | p_values),
    )


@pytest.mark.parametrize("gap", [60.0, -60.0, math.nan, math.inf])
def test_bounds_that_are_far_apart_or_in_the_wrong_order_are_rejected(gap):
    bounds = partition(bound(10.0), bound(10.0 + gap))
    pattern = r"10.0 and .*bits per dimension.*max_gap = 0.1.*likelihood.distributions.*1000"
    with pytest.raises(UserError, match=pattern):
        likelihood.require_usable(bounds, density.DEFAULT, D=64, T=1000)


@pytest.mark.parametrize(("bits", "usable"), [(0.099, True), (0.101, False)])
def test_the_gap_is_compared_in_bits_per_dimension(bits, usable):
    """The largest usable gap is 0.1. Fails if nats are taken for bits."""
    bounds = partition(bound(10.0), bound(10.0 + bits * 64 * math.log(2)))
    if usable:
        likelihood.require_usable(bounds, density.DEFAULT, D=64, T=1000)
    else:
        with pytest.raises(UserError, match=r"0\.101 bits per dimension"):
            likelihood.require_usable(bounds, density.DEFAULT, D=64, T=1000)


def test_a_low_effective_sample_size_gives_a_warning(caplog):
    bounds = partition(bound(10.0, ess=1.5), bound(10.1), tempered=bound(9.9))
    likelihood.require_usable(bounds, density.DEFAULT, D=64, T=1000)
    (message,) = caplog.messages
    assert re.search(r"effective sample size of the chains through .* is 1.5 of 256", message)


def test_a_tempered_bound_too_low_to_detect_anything_gives_a_warning(caplog):
    bounds = partition(bound(10.0), bound(10.1), tempered=bound(-50.0))
    likelihood.require_usable(bounds, density.DEFAULT, D=64, T=1000)
    (message,) = caplog.messages
    assert re.search(r"more than about 60 nats \(1.4 bits per dimension\)", message)


def test_upper_bounds_below_a_lower_bound_are_rejected_in_one_line():
    """As with a mode that neither data nor the other levels have."""
    bounds = partition(
        bound(0.0), bound(0.0), tempered=bound(4.6), from_model=bound(4.7), order=1e-9
    )
    pattern = (
        r"at least 4.600 ± .* 0.000 ± 0.010 from data, 4.700 ± 0.010 from the model's own "
        r"samples \(p-value 1e-09\).*likelihood.burn_in \(now 200\)"
    )
    with pytest.raises(UserError, match=f"^[^\n]*{pattern}[^\n]*$"):
        likelihood.require_usable(bounds, density.DEFAULT, D=2, T=1000)


@pytest.mark.slow
def test_a_contradiction_of_the_pilot_ends_the_task_before_the_annealing(
    trained_toy, tmp_path, monkeypatch, capsys
):
    """In one line. Fails if the pilot runs after the annealing, or not at all."""
    monkeypatch.setattr(density, "begin", lambda *args: None)
    monkeypatch.setattr(density, "pilot", lambda *args: (bound(20.0), bound(0.0)))
    monkeypatch.setattr(density, "annealed", None)
    assert start(trained_toy, tmp_path) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert re.fullmatch(r"error: log Z is at least 20.0 nats, but .* give 0.0 .*", error)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_bounds_of_the_pilot_in_the_wrong_order_by_chance_are_accepted():
    likelihood.require_consistent(bound(12.0), bound(0.0), density.DEFAULT)


@pytest.mark.parametrize("name", ["log_density", "log_weight"])
def test_chains_from_data_and_from_samples_that_differ_are_rejected_in_one_line(name):
    bounds = partition(bound(10.0), bound(10.05), from_model=bound(10.01), **{name: 2e-7})
    pattern = r"p-value 2e-07.* 10.050 nor 10.010 nats .*likelihood.burn_in \(now 200\)"
    with pytest.raises(UserError, match=f"^[^\n]*{pattern}[^\n]*$"):
        likelihood.require_usable(bounds, density.DEFAULT, D=2, T=1000)


def test_the_log_says_which_number_bounds_what():
    bounds = partition(bound(1.0), bound(2.5), tempered=bound(0.5), from_model=bound(2.25))
    lines = likelihood.described(bounds)
    below = lines.index("log Z is at most (if the chains start from exact samples of level 0):")
    assert lines[0].startswith("log Z is at least")
    for number, first, last in (
        ("1.0", 0, below),
        ("0.5", 0, below),
        ("2.5", below, below + 3),
    ):
        assert any(number in line for line in lines[first:last])
    assert (
        "2.250 ± 0.010 nats: chains up through the levels from the model's" in lines[below + 2]
    )


@pytest.mark.parametrize(("lower", "is_reported"), [(10.25, True), (10.0, False), (9.0, False)])
def test_the_log_says_by_how_much_the_bounds_cross(lower, is_reported):
    text = "\n".join(likelihood.described(partition(bound(lower), bound(10.0))))
    assert ("the lower bound exceeds the upper one by 0.250 nats" in text) == is_reported
    assert ("exceeds" in text) == is_reported


def test_figures_say_what_they_bound_and_if_they_are_on_training_data(
    tmp_path, monkeypatch, caplog
):
    """On one line each. All digits are trained on. The annealing is replaced by its results.

    Fails if the data are opened as those to train on.
    """

    def bounds_after(self, burn_in):
        assert burn_in == 20
        return partition(bound(1.0), bound(1.5))

    annealed = Annealing(np.zeros(6), np.zeros(50), {})
    values = np.linspace(0, 1, 1797)
    monkeypatch.setattr(sources, "open_source", None)
    monkeypatch.setattr(Annealing, "partition", bounds_after)
    monkeypatch.setattr(likelihood, "anneal", lambda *args: annealed)
    monkeypatch.setattr(density, "log_likelihood", lambda *args, **kwargs: (values, values))
    monkeypatch.setattr(density, "history", lambda *args: {})
    monkeypatch.setattr(figures, "write_annealing", lambda *args: None)
    assert start("digits_t6", tmp_path) == 0
    results = json.loads((tmp_path / "likelihood/step_5000_seed_0/likelihood.json").read_text())
    assert (results["split"], results["held_out"]) == ("train", False)
    for figure, bounds in {
        # 1.0 and 1.5 less than the mean of the values, 0.5, and in bits divided by -64 log 2.
        "mean log-density": "at most -0.500 nats, and at least -1.000 nats if the upper bounds",
        "bits per dimension": r"at most 0.023 if the upper .* \(with .* lower .*: 0.011\)",
    }.items():
        (line,) = [line for line in caplog.messages if line.startswith(figure)]
        assert re.search(rf"on training data \(train split\): {bounds}", line)


def test_unfinished_work_is_not_continued_on_another_split():
    saved = common.resume_settings(config_lib.default(), likelihood.SETTINGS)
    config = config_lib.default()
    config.evaluation.split = "validation"
    assert common.resume_settings(config, likelihood.SETTINGS) != saved


def test_the_mean_lies_between_the_bounds_in_either_unit():
    values = np.array([1.0, 3.0])
    bounds = partition(bound(10.0), bound(11.0), bound(9.0), bound(10.5))
    nats = likelihood.mean_between(values, bounds, unit=1.0)
    assert nats == pytest.approx({"from": -9.0, "to": -8.0, "std_error": 1 / math.sqrt(2)})
    bits = likelihood.mean_between(values, bounds, unit=-2.0)
    assert bits == pytest.approx({"from": 16.0, "to": 18.0, "std_error": math.sqrt(2)})


@pytest.mark.parametrize("unit", [1.0, -2.0])
def test_each_end_keeps_its_bound_if_the_bounds_cross(unit):
    """What the log calls "at most" then is less than what it calls "at least"."""
    bounds = partition(bound(11.0), bound(10.0))
    found = likelihood.mean_between(np.array([2.0]), bounds, unit)
    at_most = 2.0 - 11.0  # log q with the lower bound of log Z, which holds unconditionally
    assert found["to" if unit > 0 else "from"] == pytest.approx(unit * at_most)
    assert found["from"] - found["to"] == pytest.approx(abs(unit))


def test_a_model_whose_parameters_have_diverged_is_refused_before_the_annealing(
    tmp_path, monkeypatch
):
    run = runs.load("digits_t6")
    params = jax.tree.map(lambda leaf: np.full_like(leaf, np.nan), run.model.params)
    run = run._replace(model=dataclasses.replace(run.model, params=params))
    monkeypatch.setattr(density, "begin", None)
    with pytest.raises(UserError, match=r"^16 of 16 values of f .* the training has diverged"):
        likelihood.run(
            run=run,
            workdir=epath.Path(tmp_path),
            model=None,
            label=None,
            guidance=0.0,
            seed=0,
        )


def test_bounds_of_the_pilot_that_are_not_numbers_are_refused():
    with pytest.raises(UserError, match=r"^bounds .* are not numbers.*learning_rate"):
        likelihood.require_consistent(bound(1.0), bound(math.nan), density.DEFAULT)


@pytest.mark.parametrize(
    ("args", "pattern"),
    [
        (["--model=nonesuch"], "'nonesuch'"),
        (["--config.likelihood.chains=0"], "likelihood.chains is 0.*positive"),
        (["--config.likelihood.burn_in=-1"], "likelihood.burn_in is -1"),
        (["--config.likelihood.target_acceptance=1.0"], "likelihood.target_acceptance is 1.0"),
        (["--config.data.name=folder:nonesuch"], "folder:nonesuch"),
    ],
)
def test_wrong_arguments_are_reported_in_one_line(tmp_path, capsys, args, pattern):
    assert start("digits_t6", tmp_path / "run", *args) == 1
    error = capsys.readouterr().err
    assert re.fullmatch(r"error: .*\n", error)
    assert re.search(pattern, error)
    assert not (tmp_path / "run").exists()
