"""Sample quality against the number of evaluations: the tool, on a small trained model.

"Fails" in a docstring names bugs that were introduced on purpose to see the test fail.
"""

import json
import math

import jax
import numpy as np
import pytest
from etils import epath
from helpers.tiny import CONFIG, trained

from drl_jax import config as config_lib
from drl_jax.metrics import labelled, pixels
from drl_jax.storage import runs
from drl_jax.tools import steps

T, K_OF_TRAINING = 6, CONFIG["mcmc.K"]
PIXELS = ["--num_samples=40", "--seed=3"]  # too few samples for the classifier


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    return trained(copy=tmp_path_factory.mktemp("steps"))


@pytest.fixture
def fresh(workdir):
    """The work directory without results."""
    for name in (steps.RESULTS, steps.FIGURE):
        (workdir / name).unlink(missing_ok=True)
    return workdir


def run(workdir, *arguments):
    return steps.main(["steps", f"--workdir={workdir}", *arguments])


def rows_in(workdir):
    return json.loads((workdir / steps.RESULTS).read_text())["rows"]


@pytest.mark.slow
def test_rows_have_the_cost_of_their_chains_and_the_training_row_has_the_model_s_samples(
    fresh, capsys
):
    """Fails if K or b² do not reach the sampler, or K b² changes."""
    assert run(fresh, "--K=2", "--samplers=mala", *PIXELS) == 0
    capsys.readouterr()
    assert run(fresh, "--K=1,2", *PIXELS) == 0
    rows = {(row["sampler"], row.get("K")): row for row in rows_in(fresh)}
    loaded = runs.load_workdir(fresh)
    for K in (1, 2):
        row = rows["langevin", K]
        expected = loaded.config.mcmc.b_squared * K_OF_TRAINING
        assert K * row["b_squared"] == pytest.approx(expected)
        assert row["evaluations"] == row["gradients"] == T * K
        assert row["seconds"] > 0
        assert "features" not in row
    assert rows["mala", 2]["evaluations"] == T * (2 + 1)
    assert rows["mala", 2]["b_squared"] is None
    samples = loaded.model.sample(jax.random.split(jax.random.key(3))[0], 40)
    (last,) = (row for name, row in rows.items() if name[1] is None)
    judge = steps.open_judge(loaded, 40, fresh)
    expected = pixels.pixel_metrics(samples, judge.data)
    found = rows["langevin", K_OF_TRAINING]["pixels"]
    assert found == pytest.approx(expected["pixel_frechet"], rel=1e-2)
    assert last["pixels"] == pytest.approx(expected["pixel_frechet_of_data_halves"])
    distances = [row["pixels"] for row in rows.values()]
    assert len(set(distances)) == len(distances)
    heading, _, *lines = capsys.readouterr().out.splitlines()
    columns = ["sampler", "levels", "K", "b²", "evaluations", "ms", "pixels"]
    assert [cell.strip() for cell in heading.strip("|").split("|")] == columns
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert [row[:3] for row in cells[:-1]] == [
        ["langevin", "6", "1"],
        ["langevin", "6", "2"],
        ["mala", "6", "2"],
    ]
    assert cells[-1][0] == "two halves of the data"
    assert (fresh / steps.FIGURE).exists()


@pytest.mark.slow
def test_labelled_data_are_compared_by_their_classifier_and_measured_rows_are_kept(
    fresh, monkeypatch, capsys
):
    """Fails if an interrupted table is measured again, or rows of other settings are kept."""
    monkeypatch.setattr(labelled, "MIN_LABELLED", 100)
    arguments = ["--num_samples=60", "--samplers=langevin"]
    assert run(fresh, "--K=1", *arguments) == 0
    first, last = rows_in(fresh)
    assert last["sampler"] == "test images"
    assert 0 < last["features"] < first["features"]
    assert 0 <= first["confident"] < last["confident"] <= 1
    assert "pixels" not in first

    def measure(run, config, *args):
        if config.mcmc.K == 3:
            raise KeyboardInterrupt
        return steps.settings_of(config) | {"evaluations": T * config.mcmc.K}, {}

    monkeypatch.setattr(steps, "measure", measure)
    assert run(fresh, "--K=1,2,3", *arguments) == 130
    assert [row.get("K") for row in rows_in(fresh)] == [1, 2, None]
    assert rows_in(fresh)[0] == first
    assert rows_in(fresh)[-1] == last
    capsys.readouterr()
    assert run(fresh, "--K=2", *arguments) == 0
    assert len(capsys.readouterr().out.splitlines()) == 5
    assert run(fresh, "--K=2", "--seed=1", *arguments) == 1
    assert "has results with the settings" in capsys.readouterr().err


def test_chains_that_diverge_have_no_distances(fresh, capsys):
    assert run(fresh, "--K=15", "--b_squared=1e6", *PIXELS) == 0
    row, last = rows_in(fresh)
    assert row["b_squared"] == 1e6
    assert "pixels" not in row
    assert last == {"sampler": "two halves of the data"}
    assert "| langevin | 6 | 15 | 1e+06 | 90 |" in capsys.readouterr().out


def test_without_steps_there_is_one_row_for_all_samplers():
    config = config_lib.default()
    config.mcmc.start, config.mcmc.noise_scale = "posterior", 0.9
    configs = steps.configurations(config, ["langevin", "mala"], [0, 60], None)
    assert [steps.settings_of(each) for each in configs] == [
        {"sampler": "none", "levels": 6, "K": 0, "b_squared": None},
        {"sampler": "langevin", "levels": 6, "K": 60, "b_squared": config.mcmc.b_squared / 2},
        {"sampler": "mala", "levels": 6, "K": 60, "b_squared": None},
    ]
    assert [each.mcmc.noise_scale for each in configs] == [0.9, 0.9, 1.0]
    config.mcmc.K = 0  # in training
    (each,) = steps.configurations(config, ["langevin"], [5], None)
    assert each.mcmc.b_squared == config.mcmc.b_squared


def test_a_row_without_steps_belongs_to_all_curves(monkeypatch):
    found = []
    monkeypatch.setattr(
        steps.figures, "write_curves", lambda path, panels: found.extend(panels)
    )
    rows = [
        {"sampler": "mala", "evaluations": 30, "pixels": 0.5},
        {"sampler": "none", "evaluations": 6, "pixels": 2.0},
        {"sampler": "langevin", "evaluations": 24, "pixels": 1.0},
        {"sampler": "langevin", "evaluations": 48, "pixels": None},
        {"sampler": "data", "pixels": 0.1},
    ]
    steps.write_figure(epath.Path("steps.png"), rows)
    (panel,) = found
    assert panel.x == [6, 24, 30, 48]
    nan = math.nan
    np.testing.assert_equal(
        panel.curves,
        {"langevin": [2, 1, nan, nan], "mala": [2, nan, 0.5, nan], "data": [0.1] * 4},
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--K=0,1"], "--K contains 0, but the chains of this model start at x_tilde"),
        (["--K=1.5"], "--K contains '1.5': give whole numbers"),
        (["--K="], "--K is empty"),
        (["--levels=7"], "config.mcmc.levels is 7: the model has 6 levels"),
        (["--levels=x"], "--levels contains 'x': give whole numbers"),
        (["--samplers="], "--samplers is empty"),
        (["--samplers=nuts"], "config.mcmc.sampler is 'nuts'"),
        (["--b_squared=-1"], "config.mcmc.b_squared is -1"),
        (["--num_samples=1"], "flag --num_samples=1"),
        (["--workdir="], "there is no --workdir"),
        (["--workdir=nowhere"], "there is no checkpoint in nowhere"),
        (["digits"], "unexpected argument 'digits'"),
    ],
)
def test_a_mistake_in_the_command_is_one_line(fresh, arguments, message, capsys):
    assert run(fresh, *arguments) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert error.count("\n") == 1
    assert not (fresh / steps.RESULTS).exists()


def test_help_explains_the_columns_and_lists_the_options(capsys):
    assert steps.main(["steps", "--help"]) == 0
    text = capsys.readouterr().out
    for name in [name for name, _ in steps.COLUMNS.values() if name not in ("sampler", "K")]:
        assert f"- {name}: " in text
    for name in ("workdir", "K", "samplers", "num_samples", "b_squared", "seed"):
        assert f"--{name} " in text
