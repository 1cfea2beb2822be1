"""All tasks on trained models of vectors, signals and volumes, from the command line."""

import json
import math
import shutil

import jax
import numpy as np
import pytest
from etils import epath
from helpers import tiny
from PIL import Image

import drl_jax

pytestmark = pytest.mark.slow

SHAPES = {"vectors": (6,), "signals": (12, 2), "volumes": (4, 4, 4, 1)}
NUM_DATA = 640  # enough for a classifier of labelled signals, and for a detector
STEPS = 20
CHANGES = {
    "data.test_fraction": 0.2,
    "energy.ch": 8,
    "energy.N": 1,
    "energy.mult": "(1,)",
    "diffusion.T": 5,
    "train.batch_size": 16,
    "train.num_steps": STEPS,
    "log.sample_every_steps": 1000,
    "evaluation.num_samples": 64,
    "evaluation.batch_size": 64,
    "evaluation.num_data": 600,
    "likelihood.chains": 8,
    "likelihood.distributions": 6,
    "likelihood.transitions": 1,
    "likelihood.burn_in": 1,
    "likelihood.max_gap": 1e9,
}
MEAN, STD = 50.0, np.linspace(1, 20, 6)  # of the features or channels


def data(kind):
    """Returns examples with a large mean, and their labels, which are easy to see."""
    shape = SHAPES[kind]
    rng = np.random.default_rng(len(shape))
    y = np.arange(NUM_DATA) % 2
    z = rng.normal(size=(NUM_DATA, *shape)) + 2 * y.reshape(-1, *(1 for _ in shape))
    return (MEAN + STD[: shape[-1]] * z).astype(np.float32), y


def arguments(kind, workdir):
    x, y = data(kind)
    file = workdir.parent / f"{kind}.npz"
    np.savez(file, **({"x": x} if kind == "volumes" else {"x": x, "y": y}))
    changes = CHANGES | {"data.name": f"npz:{file}"}
    if kind != "vectors":
        changes |= {"energy.network": "image_mlp"}  # compiles faster than a U-Net
    if kind != "volumes":
        changes |= {"data.classes": 2}
    fields = [f"--config.{name}={value}" for name, value in changes.items()]
    return [f"--config={tiny.ROOT / 'configs' / 'arrays.py'}", f"--workdir={workdir}", *fields]


@pytest.fixture(scope="module", autouse=True)
def compile_fast():
    """Without most optimisations, the tests take half the time."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(params=SHAPES)
def kind(request):
    return request.param


@pytest.fixture
def workdir(kind, tmp_path):
    trained = tiny.trained_once(kind, lambda workdir: arguments(kind, workdir))
    return epath.Path(shutil.copytree(trained, tmp_path / "run"))


def results(workdir, mode, folder, *flags):
    """Runs a task and returns the folder of its results, whose pictures are checked."""
    assert tiny.main(f"--mode={mode}", f"--workdir={workdir}", *flags) == 0
    (found,) = (workdir / folder).iterdir()
    assert (found / "settings.json").exists()
    for picture in found.glob("*.png"):
        assert np.ptp(np.asarray(Image.open(picture))) > 100  # not blank
    return found


def numbers(value):
    """Yields all numbers in JSON values."""
    if isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from numbers(inner)
    elif not isinstance(value, str) and value is not None:
        yield value


def read_json(path):
    found = json.loads(path.read_text())
    assert all(map(math.isfinite, numbers(found)))
    return found


def near_data(x, kind):
    """Whether examples are in the units of the data."""
    rows = x.reshape(-1, x.shape[-1])
    return np.all(np.abs(rows.mean(axis=0) - MEAN) < 3 * STD[: x.shape[-1]])


def labels(kind):
    return [] if kind == "volumes" else ["--label=1"]


def test_training_measures_the_samples(workdir, kind):
    metrics = read_json(workdir / "metrics.json")
    assert np.shape(metrics["error_of_mean"]) == SHAPES[kind]
    assert metrics["held_out"]
    assert ("labels" in metrics) == (kind != "volumes")
    assert ("classifier" in metrics) == (kind == "signals")
    if kind == "signals":
        assert metrics["classifier"]["accuracy_of_test"] == 1
    assert Image.open(workdir / "samples.png").size > (64, 64)
    if kind != "signals":
        return
    assert tiny.main("--mode=evaluate", f"--workdir={workdir}", *labels(kind)) == 0
    again = read_json(workdir / "metrics.json")
    assert again != metrics


def test_samples_and_those_of_an_exported_model_are_in_the_units_of_the_data(workdir, kind):
    folder = results(workdir, "sample", "samples", "--num_samples=40", *labels(kind))
    x = np.load(folder / "samples.npy")
    assert x.shape == (40, *SHAPES[kind])
    assert near_data(x, kind)
    assert tiny.main("--mode=export", f"--workdir={workdir}") == 0
    loaded = drl_jax.load(workdir / "model.npz")
    assert loaded.shape == SHAPES[kind]
    assert near_data(loaded.sample(jax.random.key(0), 40), kind)


def test_strips_lead_from_sample_to_sample(workdir, kind):
    flags = ["--pairs=2", "--frames=3", *labels(kind)]
    folder = results(workdir, "interpolate", "interpolations", *flags)
    frames = np.load(folder / "strips.npz")["frames"]
    assert frames.shape == (2, 3, *SHAPES[kind])
    assert near_data(frames, kind)
    metrics = read_json(folder / "metrics.json")
    z = (frames - MEAN) / STD[: SHAPES[kind][-1]]
    distance = np.linalg.norm((z[:, -1] - z[:, 0]).reshape(2, -1), axis=1)
    # The labels add variance 1 to that of the noise.
    np.testing.assert_allclose(np.array(metrics["distance"]) * np.sqrt(2), distance, rtol=0.15)


@pytest.mark.parametrize("mask", ["random:0.3", "left"])
def test_completions_keep_what_is_known(workdir, kind, mask):
    flags = [f"--mask={mask}", "--completions=2", "--rounds=2", *labels(kind)]
    folder = results(workdir, "inpaint", "inpaintings", *flags)
    with np.load(folder / "completed.npz") as file:
        known, original, completions = (
            file[name] for name in ("known", "original", "completions")
        )
    assert completions.shape == (len(original), 2, *SHAPES[kind])
    known = np.broadcast_to(known, SHAPES[kind])
    np.testing.assert_array_equal(completions[:, 0][:, known], original[:, known])
    assert np.all(completions[..., ~known] != original[:, None][..., ~known])
    assert known.mean() == pytest.approx(0.5 if mask == "left" else 0.7, abs=0.1)
    if mask == "left":
        axis = len(SHAPES[kind]) - (2 if len(SHAPES[kind]) > 1 else 1)
        first = np.take(known, range(SHAPES[kind][axis] // 2), axis)
        assert not first.any()
    assert near_data(completions, kind)
    metrics = read_json(folder / "metrics.json")
    errors = (completions - original[:, None])[..., ~known]
    assert metrics["completion_to_truth"] == pytest.approx(np.mean(errors**2), rel=1e-4)


@pytest.mark.parametrize("operator", ["mask:random:0.3", "downsample:2"])
def test_restorations_are_close_to_what_is_observed(workdir, kind, operator):
    flags = [f"--operator={operator},noise:0.1", "--samples=4", *labels(kind)]
    if kind == "vectors" and operator == "downsample:2":
        assert tiny.main("--mode=restore", f"--workdir={workdir}", *flags) == 1
        return
    folder = results(workdir, "restore", "restorations", *flags)
    with np.load(folder / "restored.npz") as file:
        observed, samples = file["observed"], file["samples"]
    assert samples.shape == (len(observed), 4, *SHAPES[kind])
    assert near_data(samples, kind)
    metrics = read_json(folder / "metrics.json")
    assert metrics["rmse_of_mean"] < metrics["rmse_of_samples"] < 3  # standard deviations
    if operator == "downsample:2":
        side = SHAPES[kind][0] // 2
        assert observed.shape[1:-1] == (side,) * (len(SHAPES[kind]) - 1)
        assert near_data(observed, kind)
    else:
        seen = observed != 0
        error = np.abs(samples.mean(axis=1) - observed)[seen]
        assert np.median(error) < 1


def test_long_chains_are_measured_and_shown(workdir, kind):
    flags = ["--num_steps=5", "--num_chains=4", "--levels=0,3", *labels(kind)]
    folder = results(workdir, "long_run", "long_run", *flags)
    names = {"level_0.png", "level_3.png", "ladder.png", "curves.png", "chains.snapshot"}
    assert names <= {path.name for path in folder.iterdir()}
    found = read_json(folder / "long_run.json")
    assert found["chains_per_level"] == 4
    assert len(found["records"][-1]["log_density"]) == 2
    assert [r["steps"] for r in found["ladder"]["ladders"]] == [5]


@pytest.mark.parametrize("kind", ["signals"], indirect=True)
def test_the_likelihood_is_that_of_the_units_of_the_data(workdir, kind):
    folder = results(workdir, "likelihood", "likelihood", *labels(kind))
    found = read_json(folder / "likelihood.json")
    assert "bits_per_dim" not in found
    assert found["baselines"].keys() >= {"num_train", "gaussian", "mixture", "kernel"}


def test_shuffled_and_damaged_examples_are_detected(workdir, kind):
    flags = ["--against=shuffled,uniform,patch", *labels(kind)]
    folder = results(workdir, "ood", "ood", *flags)
    found = read_json(folder / "ood.json")
    assert found["in"]["held_out"]
    assert list(found["against"]) == ["shuffled", "uniform", "patch"]
    assert {"maps.png", "histograms.png"} <= {path.name for path in folder.iterdir()}
    assert found["detector"]["num_images"] >= 20
    for other in found["against"].values():
        assert other["num_images"] == found["in"]["num_images"]
        assert 0 <= other["detector"]["auroc"] <= 1
    assert "pixel_auroc" in found["against"]["patch"]["detector"]
    # Scores are those of standardised examples: others would be far away.
    assert max(map(abs, found["in"]["median"]["log_density"])) < 1e3
