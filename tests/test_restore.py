"""The task restore, as run from the command line."""

import json
import re

import jax
import numpy as np
import pytest
from etils import epath
from helpers import exact, tiny
from PIL import Image
from scipy import stats

from drl_jax import config as config_lib
from drl_jax import operators
from drl_jax.data import mixtures, pipeline, sources
from drl_jax.storage import npz, runs
from drl_jax.storage.runs import Run
from drl_jax.tasks import restore as restore_task

pytestmark = pytest.mark.slow

OPERATOR = "--operator=downsample:2,noise:0.2"


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    return tiny.trained(copy=tmp_path_factory.mktemp("restore") / "run")


def restore(workdir, *flags, operator=OPERATOR):
    return tiny.main("--mode=restore", f"--workdir={workdir}", "--samples=8", operator, *flags)


def test_held_out_images_are_observed_and_restored(workdir):
    assert restore(workdir) == 0
    folder = workdir / "restorations" / f"step_{tiny.STEPS}_seed_0_downsample_2_noise_0.2"
    names = ["grid.png", "metrics.json", "restored.npz", "settings.json"]
    assert sorted(path.name for path in folder.iterdir()) == names
    arrays = npz.decode((folder / "restored.npz").read_bytes())
    assert arrays["samples"].shape == (8, 8, 8, 8, 1)
    config = runs.load(workdir).config
    truth = np.stack(
        list(pipeline.all_examples(config, sources.open_held_out(config), limit=8))
    )
    clean = np.asarray(operators.downsample(2)(truth))
    noise = arrays["observed"] - clean
    assert 0.1 < noise.std() < 0.3  # 128 numbers: 0.2 with a standard error of 0.013
    metrics = json.loads((folder / "metrics.json").read_text())
    mean = arrays["samples"].mean(axis=1)
    psnr = np.mean(10 * np.log10(4 / np.mean((mean - truth) ** 2, axis=(1, 2, 3))))
    assert metrics["psnr_of_mean"] == pytest.approx(psnr, abs=1e-3)
    assert 0 < metrics["acceptance"] < 1
    grid = np.asarray(Image.open(folder / "grid.png"))
    tiles = grid[8:, 8:].reshape(8, 72, 8, 72).swapaxes(1, 2)[..., :64:8, :64:8]
    np.testing.assert_allclose(tiles[:, -1] / 127.5 - 1, truth[..., 0], atol=0.5 / 127)
    shown = np.clip(arrays["observed"][..., 0].repeat(2, axis=1).repeat(2, axis=2), -1, 1)
    np.testing.assert_allclose(tiles[:, 0] / 127.5 - 1, shown, atol=0.5 / 127)


def test_observations_of_the_user_are_restored_with_particles(workdir, tmp_path):
    observed = np.random.default_rng(0).uniform(-1, 1, (8, 8, 1)).astype(np.float32)
    np.save(tmp_path / "a.npy", observed)
    Image.fromarray(np.full((8, 8), 255, np.uint8)).save(tmp_path / "b.png")
    files = f"--observations={tmp_path / 'a.npy'},{tmp_path / 'b.png'}"
    flags = files, "--particles=16", "--evidence_runs=2"
    assert restore(workdir, *flags, operator="--operator=blur:1") == 0
    folder = workdir / "restorations" / f"step_{tiny.STEPS}_seed_0_blur_1"
    arrays = npz.decode((folder / "restored.npz").read_bytes())
    np.testing.assert_allclose(arrays["observed"], [observed, np.ones_like(observed)])
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics.keys() == {
        "step",
        "acceptance",
        "smallest_effective_sample_size",
        "log_evidence",
        "log_evidence_std_error",
    }
    assert all(0 < error < np.inf for error in metrics["log_evidence_std_error"])
    assert 1 <= metrics["smallest_effective_sample_size"] <= 16


def test_the_evidence_of_a_gaussian_is_that_of_the_closed_form(tmp_path):
    """For an average of four pixels, with a standard error of 0.03 at most.

    Student's distribution with three degrees of freedom: the false-alarm rate of each of four
    images is 3e-4 at 15 standard errors. Fails if log Z of the model, 5, is not subtracted.
    """
    data = mixtures.gaussian(np.full(4, 0.2), 0.25 * np.eye(4))
    model = exact.model(data, 6, log_Z=5.0, shape=(2, 2, 1))
    config = config_lib.load("digits_t6")
    config.data.image_size = 2
    values = np.array([0.1, -0.3, 0.5, 0.0])
    files = [str(tmp_path / f"{i}.npy") for i in range(4)]
    for file, value in zip(files, values, strict=True):
        np.save(file, np.full((1, 1, 1), value, np.float32))
    restore_task.run(
        run=Run(config, model, 5),
        workdir=epath.Path(tmp_path),
        model=None,
        operator="downsample:2,noise:0.3",
        images=[],
        observations=files,
        samples=8,
        particles=256,
        evidence_runs=4,
        label=None,
        guidance=0.0,
        seed=0,
    )
    (folder,) = (tmp_path / "restorations").iterdir()
    metrics = json.loads((folder / "metrics.json").read_text())
    a, sigma = (
        float(v[0]) for v in (model.method.schedule.a_bar, model.method.schedule.sigma_bar)
    )
    std = np.sqrt((a**2 * 0.25 + sigma**2) / 4 + 0.3**2)
    expected = stats.norm.logpdf(values, a * 0.2, std)
    error = np.array(metrics["log_evidence_std_error"])
    assert np.all((error > 0.001) & (error < 0.03))
    assert np.all(np.abs(metrics["log_evidence"] - expected) < 15 * error)
    assert np.mean(np.abs(metrics["log_evidence"] - expected)) < 0.03


@pytest.mark.parametrize(
    ("flags", "operator", "message"),
    [
        ([], "xyz:2", "'xyz:2' is unknown: use some of mask:NAME, downsample:N"),
        ([], "noise:-1", "'noise:-1': give a number from 1e-06"),
        ([], "downsample:3", "8x8 does not divide into blocks of 3x3"),
        ([], "mask:center", "mask 'center' is unknown: did you mean 'centre'"),
        (["--observations={}/a.npy"], "downsample:2", "a.npy is 8x8x1: this .* gives 4x4x1"),
        (["--observations={}/big.npy"], "blur:1", r"values in \[255, 255\]: scale pixels"),
        (["--observations={}/text.npy"], "blur:1", "cannot read the observation"),
        (["--observations={}/complex.npy"], "blur:1", "observation .* from dtype..complex128"),
        (["--observations=b.npy", "--images=a.png"], "blur:1", "exclude each other"),
        (["--particles=4"], "blur:1", "--particles is 4, but --samples is 8"),
        (["--evidence_runs=4"], "blur:1", "--evidence_runs=4: give 2 or more, with"),
        (["--particles=8", "--evidence_runs=1"], "blur:1", "--evidence_runs=1: give 2 or more"),
    ],
)
def test_bad_input_gives_one_line_and_leaves_nothing(
    workdir, tmp_path, caplog, capsys, flags, operator, message
):
    np.save(tmp_path / "a.npy", np.zeros((8, 8, 1), np.float32))
    np.save(tmp_path / "big.npy", np.full((8, 8, 1), 255, np.float32))
    np.save(tmp_path / "complex.npy", np.full((8, 8, 1), 1j))
    (tmp_path / "text.npy").write_text("text")
    before = set((workdir / "restorations").glob("*"))
    given = [flag.format(tmp_path) for flag in flags]
    assert restore(workdir, *given, operator=f"--operator={operator}") != 0
    errors = caplog.text + capsys.readouterr().err
    assert re.search(message, errors)
    assert set((workdir / "restorations").glob("*")) == before


def test_a_seed_has_one_result(workdir):
    model = runs.load(workdir).model
    observed = np.zeros((8, 8, 1), np.float32)
    likelihood = operators.likelihood(operators.blur(1.0), observed, 0.3)
    key = jax.random.key(0)
    first = model.posterior(key, likelihood, 8)
    np.testing.assert_array_equal(model.posterior(key, likelihood, 8), first)
    np.testing.assert_array_equal(model.posterior(key, likelihood, 4), first[:4])
    assert np.any(model.posterior(jax.random.key(1), likelihood, 8) != first)
