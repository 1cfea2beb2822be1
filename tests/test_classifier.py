import functools
import logging

import jax
import numpy as np
import pytest
from etils import epath

from drl_jax import config as config_lib
from drl_jax.data import pipeline, sources
from drl_jax.metrics import classifier

pytestmark = pytest.mark.slow


@functools.cache
def digits():
    """Returns (images, labels) of the training digits and of the test digits."""
    config = config_lib.default()
    config.data.update(name="digits", image_size=8, channels=1, test_fraction=0.2)
    return tuple(
        (np.stack(list(pipeline.all_examples(config, source))), source.labels)
        for source in (sources.open_source(config), sources.open_held_out(config))
    )


@functools.cache
def trained():
    return classifier.train(*digits()[0])


@functools.cache
def metrics_of(kind):
    """Returns the metrics of copies, of noise, or of test images that take samples' place."""
    (x, _), (test, _) = digits()
    samples = {
        "copies": x[:300],
        "noise": np.random.default_rng(0).uniform(-3, 3, (300, 8, 8, 1)),
        "test": test,
    }
    return trained().metrics(samples[kind].astype(np.float32), x, test)


def test_held_out_digits_are_classified():
    """With 800 steps, 98% are right. Fails if labels and images are shuffled differently."""
    assert trained().accuracy(*digits()[1]) >= 0.97


def test_features_of_the_training_data_have_variance_1_on_average():
    features, probabilities = trained()(digits()[0][0])
    np.testing.assert_allclose(features.var(axis=0, ddof=1).mean(), 1)
    np.testing.assert_allclose(probabilities.sum(axis=1), 1, rtol=1e-5)


def test_labels_are_the_most_probable_classes_of_clipped_images():
    x = np.float32(3) * digits()[1][0]
    _, probabilities = trained()(np.clip(x, -1, 1))
    found = jax.jit(trained().label)(x)
    np.testing.assert_array_equal(found, probabilities.argmax(axis=1))
    assert found.dtype == x.dtype


def test_an_image_has_the_same_features_in_any_batch(monkeypatch):
    x = digits()[0][0][:50]
    whole = trained()(x)
    monkeypatch.setattr(classifier, "ROWS", 20)
    for a, b in zip(trained()(x), whole, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_training_gives_the_same_classifier_every_time():
    x, labels = digits()[0]
    a, b = (classifier.train(x[:100], labels[:100], steps=3) for _ in range(2))
    assert a.scale == b.scale
    np.testing.assert_array_equal(a(x[:10])[1], b(x[:10])[1])


def test_a_shift_moves_images_by_a_pixel_and_repeats_their_edge(monkeypatch):
    """Fails if images are rolled, or all shifted alike."""
    monkeypatch.setattr(classifier, "NOISE", 0.0)
    x = np.zeros((200, 4, 4, 1), np.float32)
    x[:, 0], x[:, 2, 1] = 1, 1
    y = classifier._augmented(np.random.default_rng(0), x)[..., 0]
    seen = {image.tobytes() for image in y}
    expected = set()
    for down in (-1, 0, 1):
        for right in (-1, 0, 1):
            image = np.zeros((4, 4), np.float32)
            image[: max(0, 1 + down)] = 1
            image[2 + down, 1 + right] = 1
            expected.add(image.tobytes())
    assert seen == expected


def test_test_images_in_the_place_of_samples_have_the_values_of_test_images():
    metrics = metrics_of("test")
    for name, value in metrics.items():
        if f"{name}_of_test" in metrics:
            assert value == metrics[f"{name}_of_test"], name
    assert metrics["nearest"]["median_ratio"] == metrics["nearest"]["percentile_5_ratio"] == 1
    assert metrics["num_samples"] == len(digits()[1][0])
    assert metrics["confident"] > 0.9
    assert 0.8 < metrics["precision"] <= 1
    labels = np.bincount(digits()[1][1]) / len(digits()[1][1])
    np.testing.assert_allclose(metrics["classes"], labels, atol=0.03)


def test_copies_of_training_images_are_at_distance_0_and_otherwise_look_perfect():
    """Fails if the distances are not those to the training images."""
    metrics = metrics_of("copies")
    assert metrics["num_samples"] == 300
    assert metrics["nearest"]["median"] == metrics["nearest"]["percentile_5_ratio"] == 0
    assert metrics["precision"] == 1
    assert metrics["feature_frechet"] < metrics["feature_frechet_of_test"]


def test_noise_is_recognised_and_clipped():
    metrics, of_test = metrics_of("noise"), metrics_of("test")
    assert metrics["feature_frechet"] > 5 * metrics["feature_frechet_of_test"]
    assert metrics["precision"] < 0.1
    assert metrics["confident"] < 0.6 < of_test["confident"]
    assert metrics["nearest"]["percentile_5_ratio"] > 2
    assert metrics["nearest"]["median"] < np.sqrt(64 * 4)  # the largest distance in [-1, 1]


@pytest.fixture
def load(tmp_path, monkeypatch, caplog):
    """Returns a function that returns the classifier of a folder, and whether it trained it."""
    steps = functools.partial(classifier.train, steps=2)
    monkeypatch.setattr(classifier, "train", steps)
    caplog.set_level(logging.INFO)
    config = config_lib.default()
    config.data.update(name="digits", image_size=8, channels=1)

    def of_data(n=60, **fields):
        config.data.update(fields)
        caplog.clear()
        source = sources.open_source(config)
        x, labels = (array[:n] for array in digits()[0])
        result = classifier.of_data(config, source, x, labels, epath.Path(tmp_path))
        return result, "training a classifier" in caplog.text

    return of_data


def test_a_classifier_is_read_from_the_file_that_the_first_call_wrote(load, tmp_path):
    """Fails if the scale of the features is lost."""
    first, was_trained = load()
    assert was_trained
    again, was_trained = load()
    assert not was_trained
    assert again.scale == first.scale != 1
    for a, b in zip(first(digits()[0][0][:9]), again(digits()[0][0][:9]), strict=True):
        np.testing.assert_array_equal(a, b)
    assert len(list(tmp_path.glob("classifier-*.npz"))) == 1


@pytest.mark.parametrize("change", ["version", "n", "data"])
def test_another_version_number_of_images_or_data_has_another_file(load, monkeypatch, change):
    load()
    if change == "version":
        monkeypatch.setattr(classifier, "VERSION", classifier.VERSION + 1)
    other = {"version": {}, "n": {"n": 59}, "data": {"test_fraction": 0.5}}[change]
    assert load(**other)[1]
    assert not load(**other)[1]


@pytest.mark.parametrize("shape", [(24, 2), (4, 4, 4, 1), (2, 1)])
def test_signals_and_volumes_are_standardised_and_classified(shape):
    """Fails if other units give another classifier."""
    rng = np.random.default_rng(0)
    labels = np.arange(200) % 2
    x = rng.normal(size=(200, *shape)).astype(np.float32)
    x[:, 0] += 4 * (2 * labels - 1).reshape(-1, *[1] * (x.ndim - 2))
    small = classifier.train(x, labels, steps=60)
    assert small.accuracy(x, labels) == 1
    large = classifier.train(1000 * x + 500, labels, steps=60)
    np.testing.assert_allclose(large(1000 * x + 500)[1], small(x)[1], atol=1e-2)
    found = jax.jit(large.label)(1000 * x + 500)
    np.testing.assert_array_equal(found, labels)
    metrics = large.metrics(1000 * x[:60] + 500, 1000 * x + 500, 1000 * x[60:] + 500)
    assert metrics["nearest"]["median"] == 0
    assert metrics["nearest"]["median_of_test"] == 0


def test_the_standardisation_of_signals_is_read_from_the_file_too(tmp_path, monkeypatch):
    monkeypatch.setattr(classifier, "train", functools.partial(classifier.train, steps=2))
    x, labels = 7 + np.random.default_rng(0).normal(size=(60, 8, 2)), np.arange(60) % 2
    np.savez(tmp_path / "a.npz", x=x, y=labels)
    config = config_lib.default()
    config.data.update(
        name=f"npz:{tmp_path / 'a.npz'}", image_size=8, channels=2, axes=1, flip=False
    )
    source = sources.open_source(config)
    x = x.astype(np.float32)
    first, again = (
        classifier.of_data(config, source, x, labels, epath.Path(tmp_path)) for _ in range(2)
    )
    np.testing.assert_allclose(again.standardisation.mean, x.mean(axis=(0, 1)), rtol=1e-5)
    np.testing.assert_array_equal(first(x)[1], again(x)[1])
