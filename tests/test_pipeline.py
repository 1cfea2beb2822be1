import functools
import io
import itertools
import re
import threading
import time

import numpy as np
import pytest
from helpers import examples, tiny
from helpers.examples import make_config, one_line, run_python, save, scaled
from PIL import Image

from drl_jax import config as config_lib
from drl_jax.data import pipeline, sources
from drl_jax.errors import UserError


class Numbered(sources.Source):
    """Image i is 2x2 and grey: its left column has value i, its right column is white."""

    identity = "numbered"
    folder = None

    def __init__(self, count):
        self.white = float(count)
        self._count = count

    def __len__(self):
        return self._count

    def __getitem__(self, index):
        return np.array([[index, self.white]] * 2)[..., np.newaxis]


def numbered(count, **fields):
    """Returns a config for a source of `count` numbered images, and the source."""
    return make_config(image_size=2, **fields), Numbered(count)


def read(images, count):
    """Returns the number of each image in a `Numbered` batch, and whether it is flipped."""
    left, right = ((images[:, 0, column, 0] + 1) * count / 2 for column in (0, 1))
    return np.rint(np.minimum(left, right)).astype(int), left > right


def take(config, source, steps, **kwargs):
    """Returns the images of the first steps."""
    batches = pipeline.training_batches(config, source, **kwargs)
    return [batch["image"] for batch in itertools.islice(batches, steps)]


# Preparation


@pytest.mark.parametrize(
    ("shape", "size"),
    [
        ((64, 64, 3), 32),
        ((50, 50, 3), 32),
        ((37, 37, 1), 16),
        ((33, 33, 3), 32),
        ((218, 178, 3), 64),
        ((8, 8, 1), 12),
    ],
)
def test_resize_is_tensorflows_antialiased_bilinear(shape, size):
    import tensorflow as tf

    image = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    expected = tf.image.resize(image / 127.5 - 1, (size, size), "bilinear", antialias=True)
    actual = pipeline.prepare(image, size, "none", white=255.0)
    np.testing.assert_allclose(actual, expected, atol=1e-5)


def test_centre_crop_of_celeba_drops_20_rows_at_top_and_bottom():
    image = np.random.default_rng(0).integers(0, 256, (218, 178, 3), dtype=np.uint8)
    np.testing.assert_array_equal(
        pipeline.prepare(image, 64, "centre", white=255.0),
        pipeline.prepare(image[20:-20], 64, "none", white=255.0),
    )


def test_centre_crop_of_a_wide_image_is_its_middle_square():
    image = np.arange(3 * 8, dtype=np.uint8).reshape(3, 8, 1)
    np.testing.assert_array_equal(
        pipeline.prepare(image, 3, "centre", white=255.0), scaled(image[:, 2:5])
    )


def test_black_becomes_minus_one_and_white_one_exactly_with_and_without_resize():
    for size in (5, 7):
        for value, expected in ((0, -1), (255, 1)):
            image = pipeline.prepare(
                np.full((7, 7, 3), value, np.uint8), size, "none", white=255.0
            )
            assert image.dtype == np.float32
            assert image.shape == (size, size, 3)
            assert np.all(image == expected)


def test_digits_are_scaled_from_0_to_16_to_minus_one_to_one():
    from sklearn.datasets import load_digits

    config = make_config()
    images = np.stack(list(pipeline.all_examples(config, sources.open_source(config))))
    assert images.dtype == np.float32
    np.testing.assert_array_equal(images, load_digits().images[..., np.newaxis] / 8 - 1)


def test_to_uint8_inverts_the_scaling_of_every_pixel_value():
    image = np.arange(256, dtype=np.uint8).reshape(16, 16, 1)
    x = pipeline.prepare(image, 16, "none", white=255.0)
    np.testing.assert_array_equal(pipeline.to_uint8(x), image)


def test_to_uint8_can_truncate_as_the_authors_program_does():
    x = np.float32([-1.5, -1, -0.999, 1 - 0.1 / 127.5, 1, 2])
    np.testing.assert_array_equal(pipeline.to_uint8(x, truncate=True), [0, 0, 0, 254, 255, 255])
    x = np.float32([-0.5, -0.1, 0, 0.3])
    np.testing.assert_array_equal(
        pipeline.to_uint8(x, truncate=True), np.floor((x + 1) * 127.5)
    )


def test_to_uint8_clips_and_rounds_ties_to_the_even_integer():
    x = np.array([-3, -1, -1 + 1 / 255, 0, 1, 1.2])
    np.testing.assert_array_equal(pipeline.to_uint8(x), [0, 0, 0, 128, 255, 255])


@pytest.mark.parametrize("crop", ["centre", "none"])
def test_files_are_prepared_like_the_images_of_a_folder(tmp_path, crop):
    pixels = np.random.default_rng(0).integers(0, 256, (2, 10, 14, 4), dtype=np.uint8)
    files = [tmp_path / "0.png", tmp_path / "1.png"]
    for file, image in zip(files, pixels, strict=True):
        save(file, image)
    config = make_config(f"folder:{tmp_path}", channels=3, crop=crop, background="#ff8000")
    expected = np.stack(list(pipeline.all_examples(config, sources.open_source(config))))
    np.testing.assert_array_equal(pipeline.prepared_files(config, files), expected)
    assert expected.shape == (2, 8, 8, 3)


# Order: the examples of each step


def test_a_batch_is_a_float32_array_under_the_name_image():
    config = make_config(image_size=12)
    batch = next(pipeline.training_batches(config, sources.open_source(config)))
    assert batch.keys() == {"image"}
    assert batch["image"].shape == (4, 12, 12, 1)
    assert batch["image"].dtype == np.float32
    assert np.all(np.abs(batch["image"]) <= 1)


@pytest.mark.slow
def test_points_are_batched_unchanged():
    config = config_lib.load(str(tiny.ROOT / "configs" / "toy2d.py"))
    config.train.batch_size = 6
    source = sources.open_source(config)
    points = {tuple(point) for point in source}
    for x in take(config, source, 3):
        assert (x.shape, x.dtype) == ((6, 2), np.float32)
        assert points.issuperset(map(tuple, x))
    first = next(pipeline.all_examples(config, source, limit=1))
    np.testing.assert_array_equal(first, source[0])


def test_the_batch_of_a_step_does_not_depend_on_where_the_run_started():
    config, source = numbered(10)
    whole = take(config, source, 9)
    for start in (1, 2, 5, 8):
        rest = take(config, source, 9 - start, start_step=start)
        np.testing.assert_array_equal(rest, whole[start:])


def test_a_distant_step_is_reached_without_reading_the_steps_before_it():
    config = make_config()
    start = time.monotonic()
    take(config, sources.open_source(config), 1, start_step=240_000)
    assert time.monotonic() - start < 10


def test_another_seed_gives_another_order_and_other_flips():
    config, source = numbered(50, batch_size=50)
    config.seed = 1
    numbers, flips = read(*take(config, source, 1), 50)
    config.seed = 2
    others, other_flips = read(*take(config, source, 1), 50)
    assert np.any(numbers != others)
    assert np.any(flips != other_flips)


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 3, 6, 12])
def test_the_shares_of_all_processes_make_up_the_batch_of_one_process(count):
    config, source = numbered(20, batch_size=12)
    shares = [
        take(config, source, 5, start_step=2, process_index=index, process_count=count)
        for index in range(count)
    ]
    together = [np.concatenate(step) for step in zip(*shares, strict=True)]
    np.testing.assert_array_equal(together, take(config, source, 5, start_step=2))


def test_every_epoch_has_each_image_once_in_a_new_order():
    numbers, _ = read(np.concatenate(take(*numbered(12), 6)), 12)
    first, second = numbers[:12], numbers[12:]
    assert sorted(first) == sorted(second) == list(range(12))
    assert list(first) not in (list(second), list(range(12)))  # by chance: 2 in 12!


def test_a_batch_that_spans_the_end_of_an_epoch_loses_no_image():
    numbers, _ = read(np.concatenate(take(*numbered(10), 5)), 10)
    assert sorted(numbers[:10]) == sorted(numbers[10:]) == list(range(10))


@pytest.mark.parametrize("count", [1, 3])
def test_a_data_set_can_be_smaller_than_a_batch(count):
    numbers, _ = read(np.concatenate(take(*numbered(count, batch_size=8), count)), count)
    assert list(np.bincount(numbers)) == [8] * count


def test_about_half_the_examples_are_flipped():
    numbers, flips = read(np.concatenate(take(*numbered(64, batch_size=64), 64)), 64)
    n = flips.size
    # Six standard deviations: for a fair coin, a false alarm in one of 5e8 seeds.
    assert abs(np.sum(flips) - n / 2) < 6 * np.sqrt(n / 4)
    # Each image is seen 64 times, and both ways; a false alarm in one of 1e17 seeds.
    flips_per_image = np.bincount(numbers, weights=flips)
    assert np.all((flips_per_image > 0) & (flips_per_image < 64))


def test_the_probability_of_a_flip_is_one_half():
    """Fails if it is 0.45."""
    n, image = 20_000, np.array([[-1.0, 1.0]])[..., None]
    augment = pipeline._augmentation(make_config())
    keys = np.random.default_rng(0).integers(2**63, size=n).tolist()
    flips = [augment(image, key)[0, 0, 0] > 0 for key in keys]
    assert abs(np.sum(flips) - n / 2) < 6 * np.sqrt(n / 4)


def test_nothing_is_flipped_when_flips_are_off():
    _, flips = read(np.concatenate(take(*numbered(16, flip=False), 8)), 16)
    assert not np.any(flips)


def test_dequantisation_adds_uniform_noise_of_the_given_width():
    """Fails if the noise is not centred at zero."""
    width = 0.125
    config = make_config(flip=False, batch_size=1797, dequantise=width)
    source = sources.open_source(config)
    (images,) = take(config, source, 1)
    config.data.dequantise = 0.0
    (without_noise,) = take(config, source, 1)
    offsets = (np.float64(images) - without_noise) / width
    assert np.abs(offsets).max() <= 0.5 + 1e-6
    # Six standard errors of the mean and of the variance of a uniform distribution.
    assert abs(offsets.mean()) < 6 * np.sqrt(1 / 12 / offsets.size)
    assert abs(offsets.var() - 1 / 12) < 6 * np.sqrt(1 / 180 / offsets.size)


def test_all_examples_come_once_in_order_and_unflipped():
    numbers, flips = read(np.stack(list(pipeline.all_examples(*numbered(21)))), 21)
    assert list(numbers) == list(range(21))
    assert not np.any(flips)


@pytest.mark.parametrize(("limit", "expected"), [(0, 0), (3, 3), (99, 21)])
def test_all_examples_stop_at_the_limit(limit, expected):
    assert len(list(pipeline.all_examples(*numbered(21), limit))) == expected


def test_a_batch_that_cannot_be_divided_among_the_processes_is_rejected():
    config, source = numbered(20, batch_size=8)
    with pytest.raises(UserError) as error:
        pipeline.training_batches(config, source, process_count=3)
    assert "config.train.batch_size is 8" in one_line(error)
    assert "multiple of 3" in one_line(error)


# Threads


def test_threads_end_with_their_iterator():
    def prefetching():
        return {t for t in threading.enumerate() if t.name.startswith("grain-prefetch")}

    before = prefetching()
    batches = pipeline.training_batches(*numbered(20))
    next(batches)
    started = prefetching() - before
    assert 0 < len(started) <= 4
    del batches
    for thread in started:
        thread.join(timeout=10)
        assert not thread.is_alive()


@pytest.mark.slow
def test_prefetching_does_not_keep_a_process_from_exiting():
    # A batch takes half a second, and at most 8 are in progress, in 4 threads.
    status, output, end = run_python(
        """
import sys, time
from drl_jax import config
from drl_jax.data import pipeline, sources
c = config.default()
c.data.name, c.data.channels, c.train.batch_size = "digits", 1, 10
pipeline.prepare = lambda image, *args: time.sleep(0.05) or image
batches = pipeline.training_batches(c, sources.open_source(c))
next(batches)
print("leaving at", time.time(), flush=True)
sys.exit(3)
"""
    )
    assert status == 3, output
    assert end - float(re.search(r"leaving at (\S+)", output)[1]) < 6


# Unreadable images


def folder_with_damage(folder, count, damaged, **fields):
    """Writes images, image i with the value i, and returns a config and the source."""
    for i in range(count):
        save(folder / f"{i:02d}.png", np.full((8, 8), i, np.uint8))
    for i in damaged:
        examples.save_damaged(folder / f"{i:02d}.png")  # its header is whole
    config = make_config(f"folder:{folder}", flip=False, **fields)
    return config, sources.open_source(config)


def values(images):
    return np.rint((np.stack(list(images))[..., 0, 0, 0] + 1) * 127.5).astype(int).tolist()


def test_in_training_an_unreadable_image_is_replaced_by_random_ones_of_its_split(
    tmp_path, caplog
):
    """Fails if the others come in another order, or if few take the place every time."""
    fields = {"batch_size": 6, "test_fraction": 0.25}
    whole = take(*folder_with_damage(tmp_path / "a", 12, [], **fields), 40)
    config, source = folder_with_damage(tmp_path / "b", 12, [4, 7, 9], **fields)
    training = {*values(np.concatenate(whole))}
    damaged = sorted(training & {4, 7, 9})
    assert damaged
    batches = take(config, source, 40)
    pairs = list(
        zip(values(np.concatenate(whole)), values(np.concatenate(batches)), strict=True)
    )
    assert all(new == old for old, new in pairs if old not in damaged)
    substitutes = {new for old, new in pairs if old in damaged}
    assert substitutes == training - {4, 7, 9}
    assert caplog.text.count("skipping an image") == len(damaged)  # each is reported once
    for start in (1, 5):  # and they depend only on the step
        np.testing.assert_array_equal(
            take(config, source, 2, start_step=start)[0], batches[start]
        )


def test_labels_stay_with_their_images(tmp_path):
    """Also those of the images that replace unreadable ones, and in the shares of processes.

    Images i of the folder have the value i and the label i % 3 + 1.
    """
    for i in range(12):
        save(tmp_path / "abc"[i % 3] / f"{i:02d}.png", np.full((8, 8), i, np.uint8))
    examples.save_damaged(tmp_path / "b" / "04.png")
    config = make_config(f"folder:{tmp_path}", flip=False, batch_size=6, classes=3)
    source = sources.open_source(config)
    seen = set()
    for process in range(2):
        batches = pipeline.training_batches(
            config, source, process_index=process, process_count=2
        )
        for batch in itertools.islice(batches, 20):
            assert batch["label"].dtype == np.int32
            found = values(batch["image"])
            assert [i % 3 + 1 for i in found] == batch["label"].tolist()
            seen |= {*found}
    assert seen == {*range(12)} - {4}
    x, labels = pipeline.load_labelled(config, source, 10)
    assert (values(x), labels.tolist()) == (
        [0, 3, 6, 9, 1, 7, 10, 2, 5],
        [1, 1, 1, 1, 2, 2, 2, 3, 3],
    )


def test_examples_without_a_label_are_not_loaded_as_labelled():
    """TFDS gives them the label -1."""
    config, source = numbered(4, classes=2)
    source.labels = np.array([1, -1, 0, -1])
    x, labels = pipeline.load_labelled(config, source, 4)
    assert (read(x, 4)[0].tolist(), labels.tolist()) == ([0, 2], [2, 1])
    source.labels = np.full(4, -1)
    with pytest.raises(UserError, match="has no readable examples with labels"):
        pipeline.load_labelled(config, source, 4)


def test_unreadable_images_are_left_out_where_all_examples_are_read(tmp_path):
    config, source = folder_with_damage(tmp_path, 6, [0, 3])
    assert values(pipeline.all_examples(config, source)) == [1, 2, 4, 5]
    assert values(pipeline.all_examples(config, source, limit=3)) == [1, 2, 4]


@pytest.mark.parametrize("start", [pipeline.training_batches, pipeline.all_examples])
def test_an_unreadable_image_is_a_user_error_if_strict(tmp_path, start):
    config, source = folder_with_damage(tmp_path, 2, [1], strict=True)
    with pytest.raises(UserError) as error:
        list(itertools.islice(start(config, source), 3))
    assert str(tmp_path / "01.png") in one_line(error)


def test_training_ends_if_the_folder_vanishes(tmp_path):
    """Fails if substitutes are looked for without end."""
    config, source = folder_with_damage(tmp_path / "a", 9, [])
    (tmp_path / "a").rename(tmp_path / "b")
    with pytest.raises(UserError, match=r"none of 100 images in \S*/a, chosen at random,"):
        take(config, source, 1)


# The paper's data sets


def write_known(name, data_dir, images):
    """Prepares these images with the TFDS builder of that name."""
    import tensorflow_datasets as tfds

    dataset, _, variant = name.partition("/")

    def example(feature, image):
        if isinstance(feature, tfds.features.FeaturesDict):
            return {part: example(feature[part], image) for part in feature}
        if isinstance(feature, tfds.features.Image):
            return image
        return "" if isinstance(feature, tfds.features.Text) else 1

    class Written(tfds.builder_cls(dataset), skip_registration=True):
        name = dataset

        def _split_generators(self, dl_manager):
            del dl_manager
            features = self.info.features
            return {"train": enumerate(example(features, image) for image in images)}

    tfds.disable_progress_bar()
    builder = Written(data_dir=data_dir, config=variant or None)
    builder.download_and_prepare(file_format="array_record")


def jpegs(*shapes):
    """Returns JPEG files of smooth noise, and their pixels as TensorFlow decodes them."""
    import tensorflow as tf

    rng = np.random.default_rng(0)
    files = []
    for height, width in shapes:
        noise = Image.fromarray(rng.integers(0, 256, (height // 3, width // 3, 3), np.uint8))
        file = io.BytesIO()
        noise.resize((width, height)).save(file, "JPEG")
        files.append(file.getvalue())
    # TensorFlow's default decoder is faster but differs by up to four grey levels.
    decode = functools.partial(tf.io.decode_jpeg, dct_method="INTEGER_ACCURATE")
    return files, [decode(file).numpy() for file in files]


def triangles(n, size):
    """Returns the matrix [size, n] of an antialiased bilinear resize of n pixels."""
    scale = n / size
    distance = np.arange(n) + 0.5 - (np.arange(size)[:, np.newaxis] + 0.5) * scale
    weights = np.maximum(1 - np.abs(distance) / max(scale, 1), 0)
    return weights / np.sum(weights, axis=1, keepdims=True)


def papers_preparation(pixels, name, size):
    """Prepares an image of a data set as the paper does, in float64."""
    x = pixels.astype(np.float64)
    height, width, _ = x.shape
    if name == "celeb_a":
        x = x[20:-20]
    elif name.startswith("lsun"):
        side = min(height, width)
        x = x[(height - side) // 2 :, (width - side) // 2 :][:side, :side]
    height, width, _ = x.shape
    rows, columns = triangles(height, size), triangles(width, size)
    x = np.einsum("ih,hwc,jw->ijc", rows, x, columns, optimize=True)
    return x / 127.5 - 1


@pytest.mark.parametrize(
    "config_name",
    [
        "cifar10",
        "svhn",
        "celeba64",
        "lsun_church64",
        "lsun_bedroom64",
        "lsun_church128",
        "lsun_bedroom128",
    ],
)
def test_the_papers_data_are_prepared_as_in_the_paper(tmp_path, config_name):
    config = config_lib.load(str(tiny.ROOT / "configs" / f"{config_name}.py"))
    name, size = config.data.name, config.data.image_size
    if size == 32:
        images = pixels = list(
            np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)
        )
    elif name == "celeb_a":
        images, pixels = jpegs((218, 178), (218, 178), (218, 178))
    else:
        images, pixels = jpegs((256, 341), (303, 256), (256, 256), (257, 400))
    write_known(name, tmp_path, images)
    config.data.data_dir = str(tmp_path)
    config.train.batch_size = 4 * len(images)
    source = sources.open_source(config)
    expected = np.stack([papers_preparation(image, name, size) for image in pixels])

    def found(image):
        """Returns which of the expected images it is, and whether it is mirrored."""
        both = np.stack([expected, expected[:, :, ::-1]])
        error = np.max(np.abs(both - image), axis=(2, 3, 4))
        assert np.min(error) < 1 / 255
        mirrored, number = np.unravel_index(np.argmin(error), error.shape)
        return number, bool(mirrored)

    # TFDS shuffles what it writes.
    once = sorted(found(image) for image in pipeline.all_examples(config, source))
    assert once == [(i, False) for i in range(len(images))]
    (batch,) = take(config, source, 1)
    numbers, mirrored = zip(*(found(image) for image in batch), strict=True)
    assert list(np.bincount(numbers)) == [4] * len(images)
    assert any(mirrored) == (config_name != "svhn")
