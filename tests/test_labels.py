"""Runs with labels: training, and all tasks that take --label."""

import json

import jax
import numpy as np
import pytest
from etils import epath
from helpers import runs as runs_helper
from helpers import tiny

import drl_jax
from drl_jax.data import sources
from drl_jax.errors import UserError
from drl_jax.storage import runs
from drl_jax.tasks import likelihood

LABELLED = {
    "energy.network": "image_mlp",
    "energy.N": 1,
    "diffusion.schedule": "cosine",
    "data.classes": 10,
    "data.test_fraction": 0.2,
    "train.num_steps": 30,
    "train.pairs": "shared",
    "mcmc.start": "initialiser",
    "initialiser.network": "mlp",
    "initialiser.ch": 8,
    "initialiser.N": 1,
    "initialiser.warmup_steps": 0,
    "initialiser.first_step": 0,
    "initialiser.learning_rate": 1e-3,
    "checkpoint.every_steps": 10,
    "log.sample_every_steps": 1000,
    "evaluation.num_samples": 50,
    "evaluation.num_data": 500,
    "likelihood.chains": 8,
    "likelihood.distributions": 6,
    "likelihood.transitions": 1,
    "likelihood.burn_in": 1,
    "likelihood.max_gap": 1e9,
}


def training(workdir, **changes):
    fields = {name.replace(".", "__"): value for name, value in LABELLED.items()}
    return tiny.training(workdir, **(fields | changes))


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("labelled") / "run"
    assert tiny.main(*training(folder)) == 0
    return folder


def assert_equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.slow
def test_a_labelled_run_resumes_bit_identically(workdir, tmp_path):
    """With an initialiser. Fails if labels are drawn from another key or another step."""
    assert tiny.main(*training(tmp_path / "a", train__num_steps=20)) == 0
    assert tiny.main(*training(tmp_path / "a")) == 0
    expected = runs_helper.state_of(epath.Path(workdir))
    assert_equal(runs_helper.state_of(epath.Path(tmp_path / "a")), expected)
    other = training(tmp_path / "b", train__label_dropout=0.5)
    assert tiny.main(*other) == 0
    kernels = [
        state.params["y_map"]["kernel"]
        for state in (runs_helper.state_of(epath.Path(tmp_path / "b")), expected)
    ]
    assert not np.array_equal(*kernels)


@pytest.mark.slow
def test_the_results_say_what_the_energies_know_about_labels(workdir):
    metrics = json.loads((workdir / "metrics.json").read_text())["labels"]
    assert metrics["held_out"]
    assert metrics["num_test"] == 359
    assert len(metrics["log_prior"]) == 10
    assert 0 <= metrics["accuracy_of_test"] <= 1
    classified = json.loads((workdir / "metrics.json").read_text())["classifier"]
    assert 0 <= classified["label_agreement"] <= 1  # after training, samples have all labels


@pytest.mark.slow
def test_samples_depend_on_the_label_and_the_guidance(workdir):
    """Each command has its own folder, which says what it contains."""
    common = "--mode=sample", f"--workdir={workdir}", "--num_samples=20"
    for flags in (["--label=0"], ["--label=3"], ["--label=3", "--guidance=2"], []):
        assert tiny.main(*common, *flags) == 0
    folders = sorted((workdir / "samples").iterdir(), key=lambda path: (len(path.name), path))
    settings = [json.loads((folder / "settings.json").read_text()) for folder in folders]
    found = [(each.get("label"), each.get("guidance")) for each in settings]
    assert found == [(0, 0.0), (3, 0.0), (3, 2.0), ("all", 0.0)]
    none, three, guided, each = (np.load(folder / "samples.npy") for folder in folders)
    assert not np.allclose(none, three)
    assert not np.allclose(three, guided)
    np.testing.assert_allclose(each[2::10], three[2::10], atol=1e-3)
    model = drl_jax.load(str(workdir))
    key = jax.random.key(0)
    np.testing.assert_array_equal(model.sample(key, 4, label=3), model.given(3).sample(key, 4))


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags",
    [
        ["--mode=evaluate", "--label=all", "--guidance=0.5"],
        ["--mode=evaluate", "--label=4"],
        ["--mode=interpolate", "--pairs=2", "--frames=3", "--label=4"],
        ["--mode=inpaint", "--completions=2", "--rounds=1", "--label=4", "--guidance=1"],
        ["--mode=long_run", "--num_steps=2", "--num_chains=4", "--levels=0", "--label=4"],
        ["--mode=ood", "--label=4", "--against=uniform"],
    ],
    ids=lambda flags: flags[0],
)
def test_every_task_that_draws_or_scores_takes_a_label(workdir, flags, caplog):
    """Density and chains are compared with images of the class alone."""
    with caplog.at_level("INFO"):
        status = tiny.main(f"--workdir={workdir}", *flags)
    assert status == 0
    settings = [json.loads(path.read_text()) for path in workdir.rglob("settings.json")]
    label = next(flag for flag in flags if flag.startswith("--label="))[8:]
    label = label if label == "all" else int(label)
    assert any(each.get("label") == label for each in settings)
    if flags[0] == "--mode=evaluate":
        metrics = json.loads((workdir / "metrics.json").read_text())
        assert 0 <= metrics["classifier"]["label_agreement"] <= 1
    if flags[0] == "--mode=ood":
        (file,) = workdir.rglob("ood.json")
        assert json.loads(file.read_text())["in"]["identity"].endswith("class 4")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--mode=sample", "--label=11"], "label 11 does not exist: give 1 to 10"),
        (["--mode=sample", "--label=x"], "--label=x: give a whole number, or all"),
        (
            ["--mode=sample", "--label=0", "--guidance=1"],
            "guidance is 1, but there is no label",
        ),
        (["--mode=ood", "--guidance=0.5"], "--guidance needs a --label"),
        (["--mode=sample", "--guidance=x", "--label=1"], "'x' is not a finite number"),
        (["--mode=inpaint", "--label=all"], "--label=all is for --mode=sample and"),
        (["--mode=likelihood", "--label=0", "--guidance=1"], "but there is no label"),
    ],
)
@pytest.mark.slow
def test_a_label_that_cannot_be_used_is_one_line_and_leaves_nothing(
    workdir, capsys, flags, message
):
    before = {*workdir.rglob("*")}
    assert tiny.main(f"--workdir={workdir}", *flags) == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.count("error: ") == 1
    assert {*workdir.rglob("*")} == before


@pytest.mark.slow
def test_the_likelihood_of_a_class_is_that_of_its_images(workdir, monkeypatch):
    """The annealing itself is replaced, since so small a model is rejected."""
    seen = []

    def anneal(model, key, x, budget, autosave):
        seen.append((x, model.params["condition"]))
        raise UserError("stopped")

    monkeypatch.setattr(likelihood, "anneal", anneal)
    assert tiny.main(f"--workdir={workdir}", "--mode=likelihood", "--label=4") == 1
    (x, condition) = seen[0]
    source = sources.of_class(sources.open_held_out(runs.load(workdir).config), 4)
    np.testing.assert_array_equal(x, (np.stack(list(source)) / 8 - 1).astype(np.float32))
    assert (int(condition.label), condition.guidance) == (4, None)


@pytest.mark.slow
def test_an_initialiser_that_diverges_ends_the_run(tmp_path, capsys):
    assert tiny.main(*training(tmp_path / "run", initialiser__learning_rate=1e30)) == 1
    assert "error: training diverged at step " in capsys.readouterr().err


@pytest.mark.slow
def test_a_model_without_labels_takes_none(capsys):
    for mode in ("sample", "ood", "evaluate"):
        assert tiny.main(f"--mode={mode}", f"--workdir={tiny.trained()}", "--label=1") == 1
        assert "trained without labels: give no label" in capsys.readouterr().err
