import json
import logging
import math
import re

import jax
import numpy as np
import pytest
from etils import epath
from helpers import random_inception, tiny
from helpers.random_inception import vectors
from PIL import Image

from drl_jax import config as config_lib
from drl_jax import model
from drl_jax.metrics import inception, weights
from drl_jax.tasks import evaluate


@pytest.fixture
def folder(tmp_path):
    """Six coloured images."""
    folder = tmp_path / "images"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(6):
        pixels = rng.integers(0, 256, (8, 8, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
    return folder


@pytest.mark.slow
def test_a_run_with_inception_weights_ends_in_fid_kid_and_inception_score(folder, tmp_path):
    file, workdir = tmp_path / "weights.npz", epath.Path(tmp_path / "run")
    np.savez(file, **random_inception.tensors())
    args = tiny.training(
        workdir,
        data__name=f"folder:{folder}",
        data__channels=3,
        train__num_steps=2,
        evaluation__num_samples=5,
        evaluation__num_data=6,
        evaluation__batch_size=6,
        evaluation__inception_weights=file,
    )
    assert tiny.main(*args) == 0
    found = json.loads((workdir / "metrics.json").read_text())["inception"]
    assert (found["num_samples"], found["num_data"]) == (5, 6)
    assert found["fid"] > 0
    assert 1 <= found["inception_score"] < inception.CLASSES
    assert all(math.isfinite(value) for value in found.values())
    assert len(list(tmp_path.glob("images.inception-*.npz"))) == 1


def test_unusable_weights_are_refused_before_training(tmp_path, capsys):
    workdir = tmp_path / "run"
    args = tiny.training(workdir, evaluation__inception_weights="nonesuch.pth")
    assert tiny.main(*args) == 1
    told = capsys.readouterr().err
    assert re.fullmatch(r"error: config.evaluation.inception_weights is .* no such .*\n", told)
    assert not workdir.exists()


def test_unusable_weights_are_refused_before_sampling(capsys, monkeypatch):
    workdir = tiny.trained()
    monkeypatch.setattr(evaluate.parts, "draw", None)
    change = "--config.evaluation.inception_weights=nonesuch.pth"
    assert tiny.main("--mode=evaluate", f"--workdir={workdir}", change) == 1
    assert re.search(r"^error: .* no such file; get https", capsys.readouterr().err, re.M)


@pytest.mark.parametrize(
    ("size", "channels", "told"), [(32, 3, True), (64, 3, True), (8, 3, False), (32, 1, False)]
)
def test_where_fid_would_make_sense_the_log_says_what_it_needs(caplog, size, channels, told):
    config = config_lib.default()
    config.data.update(image_size=size, channels=channels)
    with caplog.at_level(logging.INFO):
        assert evaluate.named_weights(config) is None
    assert [record.getMessage() for record in caplog.records] == [
        f"FID, KID and the inception score are left out; for them, {weights.GET}"
    ] * told


@pytest.mark.parametrize("perception", [None, weights.Weights({}, "1234")])
def test_many_samples_are_perceived_but_not_held(tmp_path, monkeypatch, perception):
    """The pixels of `HELD` images are compared; Inception sees all samples, in order."""
    config, trained, step = model.load_run(tiny.trained())
    config.evaluation.update(num_samples=300, num_data=200)
    seen = []

    def extractor(stream):
        shown = list(stream)
        seen.append(np.stack(shown))
        return vectors(shown)

    monkeypatch.setattr(evaluate, "HELD", 100)
    monkeypatch.setattr(evaluate.inception, "Extractor", lambda *_: extractor)
    monkeypatch.setattr(evaluate.summary, "compare", fake_comparison)
    evaluate.measure(config, trained, step, epath.Path(tmp_path), perception)
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert (metrics["num_samples"], metrics["num_data"]) == (100, 100)
    if perception is None:
        assert "inception" not in metrics
        return
    of_data, of_samples = seen
    assert (len(of_data), len(of_samples)) == (200, 300)
    key, _ = jax.random.split(jax.random.key(config.seed))
    np.testing.assert_array_equal(of_samples, pipeline.to_uint8(trained.sample(key, 300)))


def fake_comparison(samples, data):
    assert (samples.moments.n, data.moments.n) == (300, 200)
    return dict.fromkeys(("fid", "kid", "inception_score", "inception_score_of_data"), 0.0)
