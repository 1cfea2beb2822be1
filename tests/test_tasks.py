"""What the tasks share, and the tasks train, sample, evaluate and export."""

import dataclasses
import json
import logging
import math
import re
import weakref

import jax
import numpy as np
import pytest
from etils import epath
from helpers import exact, random_inception, tiny
from helpers.examples import save
from helpers.random_inception import vectors
from helpers.torch_files import tensor, write_zip
from ml_collections import ConfigDict
from PIL import Image

from drl_jax import config as config_lib
from drl_jax.data import mixtures, pipeline, sources
from drl_jax.errors import UserError
from drl_jax.metrics import classifier, inception, labelled, weights
from drl_jax.model import Model
from drl_jax.storage import results, runs
from drl_jax.storage.runs import Run
from drl_jax.tasks import (
    common,
    evaluate,
    export,
    inpaint,
    interpolate,
    ood,
    restore,
    sample,
    table,
)

NO_LABEL = {"label": None, "guidance": 0.0}


@pytest.fixture
def folder(tmp_path):
    """A folder of six colour images."""
    folder = tmp_path / "images"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(6):
        pixels = rng.integers(0, 256, (8, 8, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
    return folder


@pytest.fixture
def weights_file(tmp_path, torch, monkeypatch):
    """A file of random Inception weights."""
    file = tmp_path / "weights.pth"
    tensors = {name: tensor(x) for name, x in random_inception.tensors().items()}
    file.write_bytes(write_zip(tensors, torch))
    monkeypatch.undo()  # the stand-in for PyTorch has to go before other libraries see it
    return file


@pytest.mark.slow
def test_training_with_inception_weights_computes_fid_kid_and_inception_score(
    folder, weights_file, tmp_path
):
    workdir = epath.Path(tmp_path / "run")
    args = tiny.training(
        workdir,
        data__name=f"folder:{folder}",
        data__channels=3,
        train__num_steps=2,
        evaluation__num_samples=5,
        evaluation__num_data=6,
        evaluation__batch_size=6,
        evaluation__inception_weights=weights_file,
    )
    assert tiny.main(*args) == 0
    metrics = json.loads((workdir / "metrics.json").read_text())["inception"]
    assert (metrics["num_samples"], metrics["num_data"]) == (5, 6)
    assert metrics["fid"] > 0
    assert 1 <= metrics["inception_score"] < inception.CLASSES
    protocol = metrics.pop("protocol")
    assert all(math.isfinite(value) for value in metrics.values())
    assert (protocol["name"], protocol["comparable"]) == ("default", False)
    assert len(list(tmp_path.glob("images.inception-*.npz"))) == 1


def test_unusable_inception_weights_are_rejected_before_training(tmp_path, capsys):
    workdir = tmp_path / "run"
    args = tiny.training(workdir, evaluation__inception_weights="nonesuch.pth")
    assert tiny.main(*args) == 1
    error = capsys.readouterr().err
    assert re.fullmatch(r"error: .*evaluation.inception_weights .*nonesuch.pth.*\n", error)
    assert not workdir.exists()


def test_unusable_inception_weights_are_rejected_before_sampling(capsys, monkeypatch):
    workdir = tiny.trained()
    monkeypatch.setattr(common, "draw", None)
    change = "--config.evaluation.inception_weights=nonesuch.pth"
    assert tiny.main("--mode=evaluate", f"--workdir={workdir}", change) == 1
    assert re.search(r"^error: .*nonesuch.pth.*https", capsys.readouterr().err, re.M)


@pytest.mark.parametrize(
    ("size", "channels", "hint"), [(32, 3, True), (64, 3, True), (8, 3, False), (32, 1, False)]
)
def test_for_images_that_suit_fid_the_log_says_where_its_weights_are(
    caplog, size, channels, hint
):
    config = config_lib.default()
    config.data.update(image_size=size, channels=channels)
    with caplog.at_level(logging.INFO):
        assert evaluate.load_inception_weights(config) is None
    assert len(caplog.messages) == hint
    assert (weights.DOWNLOAD_HINT in caplog.text) == hint


@pytest.fixture
def seen(monkeypatch):
    """Replaces the network; returns the lists of all centres and images that it is given."""
    centres, sets = [], []

    class PixelExtractor(inception.Extractor):
        def __init__(self, variables, engine, centre):
            centres.append(centre)

        def __call__(self, images):
            images = list(images)
            sets.append(np.stack(images))
            return vectors(images)

    monkeypatch.setattr(evaluate.inception, "Extractor", PixelExtractor)
    monkeypatch.setattr(evaluate.summary, "compare", compare_numbers_only)
    return centres, sets


WEIGHTS = weights.Weights({}, "1234")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("inception_weights", "protocol", "centre"),
    [(None, "default", None), (WEIGHTS, "default", 128), (WEIGHTS, "paper", 127.5)],
)
def test_inception_sees_all_samples_although_few_are_in_memory(
    tmp_path, monkeypatch, seen, inception_weights, protocol, centre
):
    """Pixel metrics use `MAX_IN_MEMORY` images, Inception all of them, in order.

    Fails if samples are rounded by the paper's protocol, or its data truncated.
    """
    run = runs.load(tiny.trained())
    run.config.evaluation.update(num_samples=300, num_data=200)
    monkeypatch.setattr(evaluate, "MAX_IN_MEMORY", 100)
    evaluate.measure(
        run=run,
        source=sources.open_source(run.config),
        workdir=epath.Path(tmp_path),
        inception_weights=inception_weights,
        protocol=protocol,
    )
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert (metrics["num_samples"], metrics["num_data"]) == (100, 100)
    assert metrics["levels"]["level"] == [*range(6)]
    assert all(type(level) is int for level in metrics["levels"]["level"])
    settings = json.loads((tmp_path / "settings.json").read_text())
    assert (settings["mode"], settings["seed"], settings["step"]) == ("evaluate", 0, run.step)
    assert (settings["config.evaluation.num_samples"], settings["config.mcmc.K"]) == (300, 2)
    if inception_weights is None:
        assert "inception" not in metrics
        return
    centres, (data, samples) = seen
    assert (centres, len(data), len(samples)) == ([centre], 200, 300)
    key, _ = jax.random.split(common.task_key("evaluate", run.config.seed))
    x = run.model.sample(key, 300)
    np.testing.assert_array_equal(samples, pipeline.to_uint8(x, protocol == "paper"))
    source = sources.open_source(run.config)
    x = np.stack(list(pipeline.all_examples(run.config, source, 200)))
    np.testing.assert_array_equal(data, pipeline.to_uint8(x))


@pytest.mark.slow
@pytest.mark.parametrize("fraction", [0.0, 0.3])
def test_labelled_data_are_compared_by_a_classifier(tmp_path, monkeypatch, caplog, fraction):
    """Fails if the classifier is trained on the test images, or other images are compared."""
    run = runs.load("digits_t6")
    run.config.evaluation.update(num_samples=60, num_data=10**6)
    run.config.data.test_fraction = fraction
    samples = np.random.default_rng(0).uniform(-1, 1, (100, 8, 8, 1)).astype(np.float32)
    monkeypatch.setattr(common, "draw", lambda *_: iter([samples]))
    monkeypatch.setattr(evaluate.levels, "level_statistics", lambda *_: {})
    seen = []

    def train(x, labels, train=classifier.train):
        seen.append(x)
        return train(x, labels, steps=1)

    monkeypatch.setattr(classifier, "train", train)
    with caplog.at_level("INFO"):
        for _ in range(2):  # the second time, the classifier is in a file
            evaluate.measure(
                run=run,
                source=sources.open_source(run.config),
                workdir=epath.Path(tmp_path),
                inception_weights=None,
            )
    (x,) = seen
    config = run.config.copy_and_resolve_references()
    config.data.test_fraction = fraction or labelled.TEST_FRACTION
    test = np.stack(list(pipeline.all_examples(config, sources.open_held_out(config))))
    assert not {image.tobytes() for image in x} & {image.tobytes() for image in test}
    assert len(x) + len(test) == 1797

    metrics = json.loads((tmp_path / "metrics.json").read_text())["classifier"]
    assert (metrics["num_train"], metrics["num_samples"]) == (len(x), 60)
    assert metrics["held_out"] == (fraction > 0)
    assert 0 <= metrics["accuracy_of_test"] <= 1
    distances = np.linalg.norm((samples[:60, None] - x).reshape(60, len(x), -1), axis=2)
    median = np.median(distances.min(axis=1))
    np.testing.assert_allclose(metrics["nearest"]["median"], median, rtol=1e-5)
    (line, _) = [
        line for line in caplog.messages if line.startswith("according to a classifier")
    ]
    for name in ("feature_frechet", "feature_frechet_of_test", "confident"):
        assert f"{metrics[name]:.3f}" in line
    assert len(list(tmp_path.glob("classifier-*.npz"))) == 1


def test_few_samples_or_images_are_not_compared_by_a_classifier(tmp_path, caplog):
    config, workdir = runs.load("digits_t6").config, epath.Path(tmp_path)
    source, samples = sources.open_source(config), np.zeros((60, 8, 8, 1), np.float32)
    for num_samples, num_data in ((60, 400), (40, 1000)):
        config.evaluation.num_data = num_data
        caplog.clear()
        with caplog.at_level("INFO"):
            few = samples[:num_samples]
            assert evaluate.classifier_metrics(config, source, few, workdir) is None
        assert caplog.text.count("not comparing samples with a classifier") == 1


def compare_numbers_only(samples, data):
    """Stands in for `summary.compare`, of features that have no full covariance."""
    names = ("fid", "kid", "inception_score", "inception_score_of_splits")
    metrics = dict.fromkeys((*names, "inception_score_of_data"), 0.0)
    return metrics | {"num_samples": samples.moments.n, "num_data": data.moments.n}


@pytest.mark.parametrize(
    ("num_samples", "num_data", "split", "comparable"),
    [
        (20, 10**9, "train", True),
        (21, 6, "train", True),
        (19, 10**9, "train", False),
        (20, 5, "train", False),
        (20, 10**9, "test", False),
    ],
)
def test_fid_says_by_which_protocol_it_was_computed_and_if_it_compares_with_published_values(
    folder, tmp_path, monkeypatch, caplog, seen, num_samples, num_data, split, comparable
):
    monkeypatch.setattr(evaluate, "PUBLISHED_SAMPLES", 20)
    config = config_lib.default()
    config.data.update(name=f"folder:{folder}", image_size=8)
    config.evaluation.update(num_samples=num_samples, num_data=num_data)
    config.mcmc.noise_scale = 0.99
    source = sources.open_source(config)
    source.split = split
    data = mixtures.gaussian(np.zeros(4), np.eye(4))
    with caplog.at_level("INFO"):
        metrics = evaluate.inception_metrics(
            config=config,
            source=source,
            model=exact.model(data, 6, shape=(2, 2, 1)),
            batches=[np.zeros((15, 8, 8, 3), np.float32)] * 2,
            workdir=epath.Path(tmp_path),
            inception_weights=WEIGHTS,
            protocol="paper",
        )
    assert metrics["protocol"] == {
        "name": "paper",
        "sampler": "langevin",
        "K": 30,
        "start": "x_tilde",
        "noise_scale": 0.99,
        "denoise": "no",
        "data": source.identity,
        "pixels": "truncated",
        "network_input": "(x - 127.5) / 127.5",
        "comparable": comparable,
    }
    (line,) = [line for line in caplog.messages if line.startswith("FID")]
    words = ["'paper'", f"{num_samples} samples by langevin", "0.99", "truncated", "127.5"]
    assert all(word in line for word in words)
    assert ("not comparable with published values" in line) != comparable


def test_statistics_of_the_data_by_one_protocol_are_not_read_for_the_other(
    tmp_path, monkeypatch
):
    networks = []

    def of_data(config, source, extractor, network, workdir):
        networks.append(network)
        raise UserError

    monkeypatch.setattr(evaluate.reference, "of_data", of_data)
    model = exact.model(mixtures.gaussian(np.zeros(4), np.eye(4)), 6, shape=(2, 2, 1))
    for protocol in evaluate.PROTOCOLS:
        with pytest.raises(UserError):
            evaluate.inception_metrics(
                config=config_lib.default(),
                source=sources.Digits(channels=1),
                model=model,
                batches=[],
                workdir=epath.Path(tmp_path),
                inception_weights=WEIGHTS,
                protocol=protocol,
            )
    assert len(set(networks)) == len(evaluate.PROTOCOLS)


def test_the_protocols_are_the_choices_of_the_flag():
    flag, *_ = table.TASKS["evaluate"].flags
    assert tuple(evaluate.PROTOCOLS) == flag.choices


def test_the_papers_protocol_needs_the_inception_weights(capsys, monkeypatch):
    monkeypatch.setattr(common, "draw", None)
    args = "--mode=evaluate", f"--workdir={tiny.trained()}", "--protocol=paper"
    assert tiny.main(*args) == 1
    assert re.search(r"^error: --protocol=paper .*https.*$", capsys.readouterr().err, re.M)


@pytest.fixture
def exact_run():
    """An exact model of 2x2 images, with the default configuration."""
    data = mixtures.gaussian(np.zeros(4), np.eye(4))
    return Run(config_lib.default(), exact.model(data, 6, shape=(2, 2, 1)), 5)


def test_samples_are_written_batch_by_batch(exact_run, monkeypatch, tmp_path):
    """Only the current batch and the images of the grid are in memory.

    Fails if empty slices of the batches are collected for the grid (tried).
    """
    rng = np.random.default_rng(0)
    x = rng.uniform(-1, 1, (700, 2, 2, 1)).astype(np.float32)
    batches = []

    def draw(*_):
        for start in range(0, len(x), 150):
            assert sum(batch() is not None for batch in batches) <= 2
            batch = x[start : start + 150].copy()
            batches.append(weakref.ref(batch))
            yield batch

    monkeypatch.setattr(common, "draw", draw)
    workdir = epath.Path(tmp_path)
    sample.run(run=exact_run, workdir=workdir, num_samples=700, seed=0, **NO_LABEL)
    folder = tmp_path / "samples" / "step_5_seed_0"
    np.testing.assert_array_equal(np.load(folder / "samples.npy"), x)
    assert len(list(folder.iterdir())) == 703


@pytest.mark.slow
@pytest.mark.parametrize(
    "args",
    [
        ["--mode=sample", "--num_samples=3"],
        ["--mode=inpaint", "--completions=2", "--rounds=1"],
        ["--mode=interpolate", "--pairs=1", "--frames=3"],
        ["--mode=evaluate"],
        ["--mode=long_run", "--num_steps=1", "--num_chains=8", "--levels=0"],
    ],
)
def test_samples_that_are_not_finite_are_an_error_and_nothing_is_written(
    tmp_path, capsys, args
):
    workdir = tiny.trained(copy=epath.Path(tmp_path) / "run")
    before = {path: path.read_bytes() for path in workdir.iterdir() if path.is_file()}
    assert tiny.main(*args, f"--workdir={workdir}", "--config.mcmc.b_squared=1e38") == 1
    errors = re.findall(r"^error: .*", capsys.readouterr().err, re.MULTILINE)
    assert len(errors) == 1
    assert "not finite: lower --config.mcmc.b_squared" in errors[0]
    assert {path: path.read_bytes() for path in workdir.iterdir() if path.is_file()} == before
    folders = (workdir / name for name in ("samples", "inpaintings", "interpolations"))
    assert not [path for folder in folders if folder.exists() for path in folder.iterdir()]
    assert not [path for path in workdir.glob("long_run/*/*") if path.is_file()]


def test_one_pixel_that_is_not_finite_spoils_its_sample():
    samples = np.zeros((5, 2, 2, 1))
    common.require_finite(samples, "samples")
    samples[1, 0, 0], samples[3, 1, 1], samples[4] = np.nan, -np.inf, np.inf
    with pytest.raises(UserError, match=r"^3 of 5 samples are not finite: lower"):
        common.require_finite(samples, "samples")
    with pytest.raises(UserError, match=r"^1 of 2 samples is not finite: lower"):
        common.require_finite(samples[:2], "samples")


@pytest.mark.parametrize(
    ("task", "given", "spoilt"),
    [
        (inpaint, {"mask": "left", "completions": 2, "rounds": 1}, "inpaint"),
        (inpaint, {"mask": "left", "completions": 2, "rounds": 1}, "sample"),
        (interpolate, {"pairs": 1, "frames": 3, "level": 1}, "interpolate_images"),
        (interpolate, {"pairs": 1, "frames": 3, "level": 1, "images": []}, "interpolate"),
    ],
)
def test_each_kind_of_result_that_is_not_finite_is_refused_and_leaves_nothing(
    exact_run, tmp_path, monkeypatch, task, given, spoilt
):
    """Fails if only one of several kinds that a task computes is checked."""
    shapes = {
        "inpaint": (2, 2, 2, 2, 1),
        "sample": (4, 2, 2, 1),
        "interpolate": (1, 3, 2, 2, 1),
        "interpolate_images": (1, 3, 2, 2, 1),
    }
    for name, shape in shapes.items():
        result = np.full(shape, np.nan if name == spoilt else 0.0)
        monkeypatch.setattr(Model, name, lambda *_, result=result: result)
    files = [str(tmp_path / f"{i}.png") for i in range(2)]
    for file in files:
        Image.new("L", (2, 2)).save(file)
    exact_run.config.data.update(image_size=2, channels=1)
    args = {"images": files, "seed": 0} | given
    with pytest.raises(UserError, match=r"of \d (completions|samples|strips) .* not finite: "):
        task.run(run=exact_run, workdir=epath.Path(tmp_path / "run"), **args, **NO_LABEL)
    assert not list(tmp_path.glob("run/*/*"))


def test_points_that_are_not_finite_are_an_error_and_nothing_is_written(tmp_path):
    config = config_lib.default()
    config.data.name, config.evaluation.num_samples = "ellipse", 5
    model = exact.model(mixtures.PLANAR_SHAPES["ellipse"](), 6)
    run = Run(config, model.with_step_size(np.full(6, 1e30)), 5)
    with pytest.raises(UserError, match=r"^5 of 5 samples are not finite"):
        evaluate.measure_points(run, epath.Path(tmp_path), jax.random.key(0))
    assert not list(tmp_path.iterdir())


def test_measurements_that_are_killed_while_they_are_written_leave_no_old_metrics(
    tmp_path, monkeypatch
):
    """The new metrics are written last, next to files that all belong to them."""
    run = runs.load(tiny.trained())
    run.config.evaluation.update(num_samples=4, num_data=4)
    (tmp_path / "metrics.json").write_text("old")
    written = []
    monkeypatch.setattr(evaluate.levels, "level_statistics", lambda *_: {"f_data": [math.nan]})
    monkeypatch.setattr(evaluate, "write_json", lambda path, values: written.append(values))
    evaluate.measure(
        run=run,
        source=sources.open_source(run.config),
        workdir=epath.Path(tmp_path),
        inception_weights=None,
    )
    assert {path.name for path in tmp_path.iterdir()} == {"settings.json", "samples.png"}
    assert written[0]["levels"] == {"f_data": [None]}


def test_results_depend_on_sampler_seed_number_precision_and_parameters(exact_run):
    """Also on the images, masks and so on that a task gives."""

    def settings(run=exact_run, seed=0, num_samples=3, **changes):
        config = run.config.copy_and_resolve_references()
        config.update_from_flattened_dict(changes)
        run = run._replace(config=config)
        return common.result_settings(run, "sample", seed, num_samples=num_samples)

    model = exact_run.model
    params = {"another": np.ones(1)}
    other_seed = exact_run.config.copy_and_resolve_references()
    other_seed.seed = 1
    others = [
        settings(seed=1),
        settings(num_samples=4),
        settings(run=exact_run._replace(step=6)),
        common.result_settings(exact_run, "evaluate", 0, num_samples=3),
        settings(run=exact_run._replace(config=other_seed)),  # adapts other step sizes
        settings(run=exact_run._replace(model=dataclasses.replace(model, params=params))),
        *(
            settings(**{name: value})
            for name, value in {
                "mcmc.sampler": "hmc",
                "mcmc.K": 31,
                "mcmc.noise_scale": 0.99,
                "evaluation.dtype": "bfloat16",
                "data.crop": "none",
                "diffusion.T": 7,
                "energy.parameterisation": "gaussian",
            }.items()
        ),
    ]
    assert all(other != settings() for other in others)
    same = {"evaluation.num_samples": 7, "log.every_steps": 7, "train.num_steps": 7}
    assert settings(**same, **{"data.data_dir": "moved"}) == settings()
    here, there = (settings(**{"data.name": f"folder:{place}"}) for place in ("a", "b/a"))
    assert here == there != settings()


@pytest.mark.parametrize(
    ("task", "given", "changes"),
    [
        (sample, {"num_samples": 3}, [{"num_samples": 4}]),
        (
            inpaint,
            {"mask": "left/mask.png", "images": ["a/0.png"], "completions": 2, "rounds": 1},
            [
                {"mask": "top/mask.png"},
                {"images": ["a/1.png"]},
                {"images": []},
                {"completions": 3},
                {"rounds": 2},
            ],
        ),
        (
            interpolate,
            {"images": ["a/0.png", "a/1.png"], "pairs": 1, "frames": 3, "level": 1},
            [{"images": ["a/1.png", "a/0.png"]}, {"images": []}, {"frames": 4}, {"level": 2}],
        ),
        (
            interpolate,
            {"images": [], "pairs": 1, "frames": 3, "level": 1},
            [{"pairs": 2}],
        ),
        (
            restore,
            {
                "model": None,
                "operator": "mask:a/0.png",
                "images": [],
                "observations": ["a/1.png"],
                "samples": 2,
                "particles": 0,
                "evidence_runs": 0,
            },
            [
                {"value": 200},
                {"operator": "noise:0.1"},
                {"operator": "noise:0.2"},
                {"observations": ["left/mask.png"]},
                {"images": ["a/1.png"], "observations": []},
                {"samples": 3},
                {"particles": 8},
                {"evidence_runs": 2},
            ],
        ),
        (
            ood,
            {
                "model": None,
                "against": ["folder:a"],
                "ood_masks": None,
                "false_alarm_rate": 0.05,
            },
            [
                {"false_alarm_rate": 0.1},
                {"against": ["inverted"]},
                {"against": ["folder:a", "inverted"]},
                {"value": 1},
                {"num_data": 2},
            ],
        ),
    ],
    ids=["sample", "inpaint", "interpolate images", "interpolate samples", "restore", "ood"],
)
def test_results_depend_on_everything_that_a_task_is_given(
    exact_run, tmp_path, monkeypatch, task, given, changes
):
    """Fails if other results replace those of other images, masks or numbers."""

    class StoppedError(Exception):
        """Stops the task before its results are computed."""

    def stop(path, settings):
        found.append(settings)
        raise StoppedError

    def settings(seed=0, value=0, num_data=1, **args):
        save(tmp_path / "a" / "0.png", np.full((2, 2), value, np.uint8))
        exact_run.config.evaluation.num_data = num_data
        flags = given | args | NO_LABEL
        with pytest.raises(StoppedError):
            task.run(run=exact_run, workdir=epath.Path(tmp_path), seed=seed, **flags)
        return found[-1]

    found = []
    monkeypatch.setattr(results, "folder", stop)
    monkeypatch.chdir(tmp_path)
    mask = np.array([[255, 0], [255, 0]], np.uint8)
    save(tmp_path / "left" / "mask.png", mask)
    save(tmp_path / "top" / "mask.png", mask.T)
    save(tmp_path / "a" / "1.png", np.full((2, 2), 200, np.uint8))
    exact_run.config.data.update(name="digits", image_size=2, channels=1)
    first = settings()
    for change in [*changes, {"seed": 1}]:
        assert settings(**change) != first, change
    assert settings() == first


def test_scores_that_are_not_finite_are_an_error(tmp_path):
    run = runs.load(tiny.trained())
    params = jax.tree.map(lambda leaf: np.full_like(leaf, np.nan), run.model.params)
    run.config.evaluation.num_data = 9
    run = run._replace(model=dataclasses.replace(run.model, params=params))
    flags = {
        "model": None,
        "against": ["inverted"],
        "ood_masks": None,
        "false_alarm_rate": 0.05,
        "seed": 0,
    } | NO_LABEL
    with pytest.raises(UserError, match=r"^9 of 9 scores .* the training has diverged"):
        ood.run(run=run, workdir=epath.Path(tmp_path), **flags)
    assert not list((tmp_path / "ood").iterdir())


@pytest.mark.parametrize("damaged", [0, 5])
def test_data_that_are_too_few_to_compare_with_are_refused_before_training(
    tmp_path, capsys, damaged
):
    """Images that cannot be decoded, although their headers are intact, do not count."""
    folder, workdir = tmp_path / "images", epath.Path(tmp_path / "run")
    folder.mkdir()
    for i in range(3):
        Image.new("L", (8, 8), i).save(folder / f"{i}.png")
    noise = np.random.default_rng(0).integers(0, 256, (32, 32), np.uint8)
    Image.fromarray(noise).save(tmp_path / "noise.png")
    for i in range(damaged):
        (folder / f"damaged{i}.png").write_bytes((tmp_path / "noise.png").read_bytes()[:300])
    assert tiny.main(*tiny.training(workdir, data__name=f"folder:{folder}")) == 1
    error = capsys.readouterr().err
    assert re.search(
        r"^error: 'folder:\S+' has 3 readable examples, but 4 or more are needed$",
        error,
        re.MULTILINE,
    )
    assert not workdir.exists()


def test_a_langevin_chain_has_no_warm_up(exact_run):
    assert common.adapted(exact_run) is exact_run


@pytest.mark.slow
def test_the_warm_up_leaves_the_original_run_unchanged(caplog):
    run = runs.load("digits_t6")
    config = run.config.copy_and_resolve_references()
    config.mcmc.update(sampler="mala", warmup_steps=5)
    run = runs.reconfigure(run, config)
    before = run.model.step_size.copy()
    with caplog.at_level(logging.INFO):
        adapted = common.adapted(run)
    assert (adapted.config, adapted.step) == (run.config, run.step)
    assert np.all(adapted.model.step_size != before)
    np.testing.assert_array_equal(run.model.step_size, before)
    for t in range(6):
        numbers = (
            rf"{adapted.model.step_size[t]:.3g}, acceptance 0\.\d\d, correlation .* 0\.\d\d"
        )
        assert re.search(rf"level {t}: {numbers}", caplog.text)


def test_a_task_for_images_rejects_a_model_of_points():
    points = exact.model(mixtures.PLANAR_SHAPES["ellipse"](), 6)
    with pytest.raises(UserError, match=r"^--images is for models of images, .* \(2,\): omit"):
        common.require_images(points, "--images")


def test_resume_settings_are_the_fields_under_the_prefixes():
    config = ConfigDict({"a": {"b": 1, "c": (2,)}, "ab": 3})
    assert common.resume_settings(config, ("a.c", "ab")) == {"config.a.c": (2,), "config.ab": 3}


def test_an_exported_model_is_the_model(tmp_path):
    run = runs.load(tiny.trained())
    export.run(run=run, workdir=epath.Path(tmp_path), dtype="float32")
    assert [path.name for path in tmp_path.iterdir()] == ["model.npz"]
    exported = runs.load(tmp_path / "model.npz")
    assert (exported.step, exported.config) == (run.step, run.config)
    jax.tree.map(np.testing.assert_array_equal, exported.model.params, run.model.params)
