import ast
import functools
import io
import itertools
import json
import re
import shlex
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import tiny
from PIL import Image

from drl_jax import config as config_lib
from drl_jax import data
from drl_jax.errors import UserError


def make_config(name="digits", batch_size=4, channels=1, image_size=8, **fields):
    config = config_lib.default()
    config.data.name = name
    config.data.channels = channels
    config.data.image_size = image_size
    config.train.batch_size = batch_size
    for field, value in fields.items():
        config.data[field] = value
    return config


class Numbered(data.Source):
    """Image i is 2x2 and grey: a left column of value i, a white right column."""

    def __init__(self, count):
        self.white = float(count)
        self._count = count

    def __len__(self):
        return self._count

    def __getitem__(self, index):
        return np.array([[index, self.white]] * 2)[..., np.newaxis]


@pytest.fixture
def numbered(monkeypatch):
    """Returns a function that makes a config whose source is `count` numbered images."""

    def make(count, **fields):
        monkeypatch.setattr(data, "open_source", lambda config: Numbered(count))
        return make_config(image_size=2, **fields)

    return make


def read(images, count):
    """The number of each image of a `Numbered` batch, and whether it is flipped."""
    left, right = ((images[:, 0, column, 0] + 1) * count / 2 for column in (0, 1))
    return np.rint(np.minimum(left, right)).astype(int), left > right


def take(config, steps, *args, **kwargs):
    batches = data.training_batches(config, *args, **kwargs)
    return [batch["image"] for batch in itertools.islice(batches, steps)]


def scaled(pixels):
    return pixels / np.float32(127.5) - 1


def one_line(error):
    text = str(error.value)
    assert "\n" not in text
    return text


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
    actual = data.prepare(image, size, "none", white=255)
    np.testing.assert_allclose(actual, expected, atol=1e-5)


def test_centre_crop_of_celeba_drops_20_rows_at_top_and_bottom():
    image = np.random.default_rng(0).integers(0, 256, (218, 178, 3), dtype=np.uint8)
    np.testing.assert_array_equal(
        data.prepare(image, 64, "centre", white=255),
        data.prepare(image[20:-20], 64, "none", white=255),
    )


def test_centre_crop_of_a_wide_image_is_its_middle_square():
    image = np.arange(3 * 8, dtype=np.uint8).reshape(3, 8, 1)
    np.testing.assert_array_equal(
        data.prepare(image, 3, "centre", white=255), scaled(image[:, 2:5])
    )


def test_black_is_minus_one_and_white_is_one_exactly_also_when_resized():
    for size in (5, 7):
        for value, expected in ((0, -1), (255, 1)):
            image = data.prepare(np.full((7, 7, 3), value, np.uint8), size, "none", white=255)
            assert image.dtype == np.float32
            assert image.shape == (size, size, 3)
            assert np.all(image == expected)


def test_digits_are_scikit_learns_eighths_minus_one():
    from sklearn.datasets import load_digits

    images = np.stack(list(data.all_images(make_config())))
    assert images.dtype == np.float32
    np.testing.assert_array_equal(images, load_digits().images[..., np.newaxis] / 8 - 1)


# Order: what a step sees


def test_a_batch_is_a_float32_array_under_image():
    batch = next(data.training_batches(make_config(image_size=12)))
    assert batch.keys() == {"image"}
    assert batch["image"].shape == (4, 12, 12, 1)
    assert batch["image"].dtype == np.float32
    assert np.all(np.abs(batch["image"]) <= 1)


def test_a_step_sees_the_same_batch_wherever_the_run_started(numbered):
    config = numbered(10)
    whole = take(config, 9)
    for start in (1, 2, 5, 8):
        np.testing.assert_array_equal(take(config, 9 - start, start), whole[start:])


def test_a_distant_step_is_reached_at_once():
    start = time.monotonic()
    take(make_config(), 1, start_step=240_000)
    assert time.monotonic() - start < 10


def test_another_seed_gives_another_order_and_other_flips(numbered):
    config = numbered(50, batch_size=50)
    config.seed = 1
    numbers, flips = read(*take(config, 1), 50)
    config.seed = 2
    others, other_flips = read(*take(config, 1), 50)
    assert np.any(numbers != others)
    assert np.any(flips != other_flips)


@pytest.mark.parametrize("processes", [2, 3, 6, 12])
def test_the_shares_of_all_processes_make_the_batch_of_one_process(numbered, processes):
    config = numbered(20, batch_size=12)
    shares = [take(config, 5, 2, process, processes) for process in range(processes)]
    together = [np.concatenate(step) for step in zip(*shares, strict=True)]
    np.testing.assert_array_equal(together, take(config, 5, 2))


def test_every_epoch_has_each_image_once_in_a_new_order(numbered):
    numbers, _ = read(np.concatenate(take(numbered(12), 6)), 12)
    first, second = numbers[:12], numbers[12:]
    assert sorted(first) == sorted(second) == list(range(12))
    assert list(first) not in (list(second), list(range(12)))  # by chance: 2 in 12!


def test_a_batch_goes_on_into_the_next_epoch_and_loses_no_image(numbered):
    numbers, _ = read(np.concatenate(take(numbered(10), 5)), 10)
    assert sorted(numbers[:10]) == sorted(numbers[10:]) == list(range(10))


@pytest.mark.parametrize("count", [1, 3])
def test_a_data_set_may_be_smaller_than_a_batch(numbered, count):
    numbers, _ = read(np.concatenate(take(numbered(count, batch_size=8), count)), count)
    assert list(np.bincount(numbers)) == [8] * count


def test_about_half_the_examples_are_flipped(numbered):
    config = numbered(64, batch_size=64)
    numbers, flips = read(np.concatenate(take(config, 64)), 64)
    n = flips.size
    # Six standard deviations: were the coin fair, a false alarm in 5e8 seeds.
    assert abs(np.sum(flips) - n / 2) < 6 * np.sqrt(n / 4)
    # Each image is seen 64 times, and both ways; a false alarm in 1e17 seeds.
    a_image = np.bincount(numbers, weights=flips)
    assert np.all((a_image > 0) & (a_image < 64))


def test_nothing_is_flipped_when_flips_are_off(numbered):
    _, flips = read(np.concatenate(take(numbered(16, flip=False), 8)), 16)
    assert not np.any(flips)


def test_all_images_come_once_in_order_and_unflipped(numbered):
    numbers, flips = read(np.stack(list(data.all_images(numbered(21)))), 21)
    assert list(numbers) == list(range(21))
    assert not np.any(flips)


@pytest.mark.parametrize(("limit", "expected"), [(0, 0), (3, 3), (99, 21)])
def test_all_images_stop_at_the_limit(numbered, limit, expected):
    assert len(list(data.all_images(numbered(21), limit))) == expected


def test_a_batch_that_processes_cannot_share_is_refused():
    with pytest.raises(UserError) as error:
        data.training_batches(make_config(batch_size=8), process_count=3)
    assert "multiple of the 3 processes" in one_line(error)


# Threads


def test_threads_end_with_their_iterator():
    def prefetching():
        return {t for t in threading.enumerate() if t.name.startswith("grain-prefetch")}

    before = prefetching()
    batches = data.training_batches(make_config())
    next(batches)
    started = prefetching() - before
    assert 0 < len(started) <= 4
    del batches
    for thread in started:
        thread.join(timeout=10)
        assert not thread.is_alive()


def run_python(program, *args):
    """Runs a program and returns its exit status, its output, and when it ended."""
    done = subprocess.run(
        [sys.executable, "-c", program, *map(str, args)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    return done.returncode, done.stdout + done.stderr, time.time()


def test_prefetching_does_not_keep_a_process_from_ending():
    # A batch takes half a second, and at most 8 are under way in 4 threads.
    status, output, end = run_python(
        """
import sys, time
from drl_jax import config, data
c = config.default()
c.data.name, c.data.channels, c.train.batch_size = "digits", 1, 10
data.prepare = lambda image, *args: time.sleep(0.05) or image
batches = data.training_batches(c)
next(batches)
print("leaving at", time.time(), flush=True)
sys.exit(3)
"""
    )
    assert status == 3, output
    assert end - float(re.search(r"leaving at (\S+)", output)[1]) < 6


# Folders


def save(path, pixels, **kwargs):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **kwargs)


def test_a_folder_is_its_png_and_jpeg_files_at_any_depth_by_path(tmp_path):
    for name, value in (("b/1.PNG", 40), ("b/c/0.jpeg", 80), ("a.png", 0), ("z.JPG", 160)):
        save(tmp_path / name, np.full((8, 8, 3), value, np.uint8))
    (tmp_path / "b/notes.txt").write_text("no image")
    (tmp_path / "png").mkdir()
    images = list(data.all_images(make_config(f"folder:{tmp_path}", channels=3)))
    values = [(image.mean() + 1) * 127.5 for image in images]
    np.testing.assert_allclose(values, [0, 40, 80, 160], atol=1)


def test_a_folders_identity_changes_with_the_names_of_its_images(tmp_path):
    save(tmp_path / "a.png", np.zeros((8, 8, 3), np.uint8))
    config = make_config(f"folder:{tmp_path}", channels=3)
    source = data.open_source(config)
    assert source.folder == tmp_path
    assert data.open_source(config).identity == source.identity
    save(tmp_path / "b.png", np.zeros((8, 8, 3), np.uint8))
    assert data.open_source(config).identity != source.identity


def test_a_folders_images_become_grey_or_rgb_whatever_they_are(tmp_path):
    grey = np.arange(64, dtype=np.uint8).reshape(8, 8)
    rgb = np.stack([grey, 2 * grey, 3 * grey], -1)
    save(tmp_path / "0.png", grey)
    save(tmp_path / "1.png", rgb)
    save(tmp_path / "2.png", np.concatenate([rgb, grey[..., np.newaxis]], -1))
    Image.fromarray(grey).convert("P").save(tmp_path / "3.png")
    luma = np.rint(rgb @ [0.299, 0.587, 0.114])

    in_rgb = np.stack(list(data.all_images(make_config(f"folder:{tmp_path}", channels=3))))
    greys = np.stack([grey] * 3, -1)
    np.testing.assert_array_equal(in_rgb, scaled(np.stack([greys, rgb, rgb, greys])))
    in_grey = np.stack(list(data.all_images(make_config(f"folder:{tmp_path}", channels=1))))
    expected = scaled(np.stack([grey, luma, luma, grey]))[..., np.newaxis]
    np.testing.assert_allclose(in_grey, expected, atol=1.01 / 127.5)  # one grey level


def test_a_folder_without_images_or_path_or_existence_is_refused(tmp_path):
    for path, words in (
        (f"{tmp_path}", f"{tmp_path}': there is no .png"),
        (f"{tmp_path}/absent", "absent': there is no such folder"),
        ("", "give a path"),
    ):
        with pytest.raises(UserError) as error:
            data.training_batches(make_config(f"folder:{path}", channels=3))
        assert words in one_line(error)


def test_a_folders_images_have_one_or_three_channels(tmp_path):
    with pytest.raises(UserError) as error:
        data.training_batches(make_config(f"folder:{tmp_path}", channels=2))
    assert "config.data.channels is 2" in one_line(error)
    assert "--config.data.channels to 1 or 3" in one_line(error)


def damaged(path):
    save(path, np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    path.write_bytes(path.read_bytes()[:2000])


def no_image(path):
    path.write_text("not an image")


def sixteen_bits(path):
    save(path, np.full((8, 8), 1000, np.uint16))


def dangling(path):
    path.symlink_to(path.parent / "nowhere")


@pytest.mark.parametrize("spoil", [damaged, no_image, sixteen_bits, dangling])
def test_an_unreadable_first_image_is_named_before_training(tmp_path, spoil):
    spoil(tmp_path / "0.png")
    for start in (data.training_batches, data.all_images, data.open_source):
        with pytest.raises(UserError) as error:
            start(make_config(f"folder:{tmp_path}", channels=3))
        assert str(tmp_path / "0.png") in one_line(error)


@pytest.mark.parametrize("spoil", [damaged, no_image])
def test_an_unreadable_later_image_is_a_user_error_where_it_is_met(tmp_path, spoil):
    save(tmp_path / "0.png", np.zeros((8, 8, 3), np.uint8))
    spoil(tmp_path / "1.png")
    for start in (data.training_batches, data.all_images):
        iterator = start(make_config(f"folder:{tmp_path}", channels=3))
        with pytest.raises(UserError) as error:
            list(itertools.islice(iterator, 3))
        assert type(error.value) is UserError
        assert str(tmp_path / "1.png") in one_line(error)


def test_digits_have_one_channel():
    with pytest.raises(UserError) as error:
        data.training_batches(make_config(channels=3))
    assert "set --config.data.channels=1" in one_line(error)


# TFDS


def write_tfds(
    dataset, data_dir, features, examples, file_format="array_record", version="1.0.0"
):
    """Prepares a data set with TFDS's own writer; TFDS does not learn of its code."""
    import tensorflow_datasets as tfds

    class Written(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        name = dataset
        VERSION = tfds.core.Version(version)

        def _info(self):
            return tfds.core.DatasetInfo(
                builder=self,
                features=tfds.features.FeaturesDict(features),
                disable_shuffling=True,
            )

        def _split_generators(self, dl_manager):
            del dl_manager
            return {"train": enumerate(examples), "test": enumerate(examples[:2])}

        def _generate_examples(self):
            raise NotImplementedError

    tfds.disable_progress_bar()
    Written(data_dir=data_dir).download_and_prepare(file_format=file_format)


def encoded(pixels):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="module")
def stripes():
    """Seven RGB images of 10x12; one of them is stored as a grey file."""
    pixels = np.random.default_rng(0).integers(0, 256, (7, 10, 12, 3), dtype=np.uint8)
    pixels[3] = pixels[3, :, :, :1]
    files = [encoded(image if i != 3 else image[..., 0]) for i, image in enumerate(pixels)]
    return pixels, files


@pytest.fixture(scope="module")
def tfds_dir(tmp_path_factory, stripes):
    import tensorflow_datasets as tfds

    _, files = stripes
    where = tmp_path_factory.mktemp("tfds")
    image = tfds.features.Image(shape=(None, None, 3))
    label = tfds.features.ClassLabel(num_classes=7)
    labelled = [{"image": file, "label": i} for i, file in enumerate(files)]
    write_tfds("stripes", where, {"image": image, "label": label}, labelled)
    write_tfds("labels", where, {"label": label}, [{"label": i} for i in range(3)])
    write_tfds("records", where, {"image": image}, [{"image": files[0]}] * 3, "tfrecord")
    # 'mnist' is a name whose code TFDS has.
    digit = {"image": encoded(np.full((28, 28), 51, np.uint8)), "label": 5}
    features = {
        "image": tfds.features.Image(shape=(28, 28, 1)),
        "label": tfds.features.ClassLabel(num_classes=10),
    }
    version = tfds.builder_cls("mnist").VERSION
    write_tfds("mnist", where, features, [digit] * 3, version=version)
    return where


def tfds_config(tfds_dir, name="stripes", channels=3, **fields):
    return make_config(name, channels=channels, data_dir=str(tfds_dir), **fields)


def test_a_tfds_data_set_prepared_elsewhere_is_read_as_it_was_written(tfds_dir, stripes):
    pixels, _ = stripes
    config = tfds_config(tfds_dir, image_size=10, batch_size=7, flip=False)
    expected = scaled(pixels[:, :, 1:-1])
    np.testing.assert_array_equal(np.stack(list(data.all_images(config))), expected)
    # An epoch of training has the same images in another order.
    (batch,) = take(config, 1)
    order = [np.flatnonzero(np.all(expected == image, axis=(1, 2, 3)))[0] for image in batch]
    assert sorted(order) == list(range(7))


@pytest.mark.parametrize(("split", "count"), [("test", 2), ("train[:3]", 3), ("train+test", 9)])
def test_a_tfds_split_may_be_any_that_tfds_can_name(tfds_dir, split, count):
    assert len(list(data.all_images(tfds_config(tfds_dir, split=split)))) == count


def test_a_tfds_data_set_is_known_by_its_version_and_split(tfds_dir):
    source = data.open_source(tfds_config(tfds_dir, split="test"))
    assert source.identity == "stripes/1.0.0[test]"
    assert source.folder == tfds_dir / "stripes" / "1.0.0"
    # What the evaluation leaves next to a version is no version.
    (tfds_dir / "stripes" / "1.0.0.inception-0123.npz").write_bytes(b"")
    assert data.open_source(tfds_config(tfds_dir)).identity == "stripes/1.0.0[train]"


def test_a_tfds_data_set_may_be_one_whose_code_tfds_has(tfds_dir):
    (batch,) = take(tfds_config(tfds_dir, "mnist", channels=1, image_size=14), 1)
    np.testing.assert_allclose(batch, np.full((4, 14, 14, 1), 51 / 127.5 - 1), atol=1e-6)


@pytest.mark.parametrize("name", ["stripes", "mnist"])
def test_tfds_data_are_read_without_tensorflow(tfds_dir, name):
    status, output, _ = run_python(
        """
import sys
from drl_jax import config, data
c = config.default()
c.data.name, c.data.data_dir, c.data.channels = sys.argv[1], sys.argv[2], int(sys.argv[3])
c.train.batch_size = 4
print(next(data.training_batches(c))["image"].shape, next(data.all_images(c)).shape)
print("tensorflow", "tensorflow" in sys.modules)
""",
        name,
        tfds_dir,
        {"stripes": 3, "mnist": 1}[name],
    )
    assert status == 0, output
    assert "(4, 32, 32, " in output
    assert "tensorflow False" in output


def test_importing_data_imports_no_source():
    _, output, _ = run_python(
        "import sys, drl_jax.data as _; "
        "print(*{'tensorflow', 'tensorflow_datasets', 'sklearn'} & sys.modules.keys())"
    )
    assert output.strip() == ""


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"name": "cifar11"}, ["'cifar11'", "did you mean", "'cifar10'"]),
        ({"name": "CIFAR10"}, ["'CIFAR10'", "did you mean", "'cifar10'"]),
        ({"name": "/home/me/images"}, ["'/home/me/images'", "'folder:/path'"]),
        ({"name": ""}, ["''", "'digits'"]),
        ({"name": "stripes:9.9.9"}, ["'stripes:9.9.9'"]),
        ({"name": "mnist/no_such_config"}, ["'mnist/no_such_config'"]),
        ({"name": "fashion_mnist"}, ["'fashion_mnist' is not prepared in", "python -c"]),
        ({"name": "records"}, ["as tfrecord", "python -c", "data_dir"]),
        ({"name": "labels"}, ["no 8-bit image called 'image'", "label: ClassLabel"]),
        ({"split": "valid"}, ["'valid'", "its splits are train, test"]),
        ({"split": "train[:0]"}, ["'train[:0]'", "its splits are train, test"]),
        ({"split": "train[:"}, ["'train[:'", "its splits are train, test"]),
        ({"channels": 1}, ["3 channels", "is 1: set --config.data.channels=3"]),
        ({"name": "mnist"}, ["1 channel,", "is 3: set --config.data.channels=1"]),
    ],
)
def test_what_a_user_can_mend_about_tfds_data_is_said_in_a_line(tfds_dir, fields, words):
    with pytest.raises(UserError) as error:
        data.open_source(tfds_config(tfds_dir, **fields))
    text = one_line(error)
    for word in words:
        assert word in text
    if command := re.search(r"python -c .*\"", text):  # can be pasted into a shell
        _, _, program = shlex.split(command[0])
        assert "download_and_prepare(file_format='array_record')" in program
        ast.parse(program)


def test_an_unreadable_tfds_image_is_named(tmp_path, stripes):
    import tensorflow_datasets as tfds

    _, files = stripes
    examples = [{"image": files[0]}, {"image": files[1][:200]}]
    write_tfds("spoilt", tmp_path, {"image": tfds.features.Image()}, examples)
    config = tfds_config(tmp_path, "spoilt", image_size=10, batch_size=2)
    for read in (lambda: list(data.all_images(config)), lambda: take(config, 1)):
        with pytest.raises(UserError) as error:
            read()
        assert "image 1 of TFDS data set 'spoilt', split 'train'" in one_line(error)


def test_a_tfds_record_that_cannot_be_read_among_many_is_named(tfds_dir, monkeypatch):
    """The reader of many tells nothing; the one of one does."""
    source = data.open_source(tfds_config(tfds_dir))
    np.testing.assert_array_equal(source.read([5, 2]), [source[5], source[2]])

    def get(self, index):
        if index == 2:
            raise ValueError("Failed to read block")
        return {"image": encoded(np.zeros((10, 12, 3), np.uint8))}

    def get_many(self, indices):
        raise ValueError("Failed to read")

    monkeypatch.setattr(type(source._examples), "__getitem__", get)
    monkeypatch.setattr(type(source._examples), "__getitems__", get_many)
    with pytest.raises(UserError) as error:
        source.read([5, 2])
    assert "image 2 of TFDS data set 'stripes', split 'train'" in one_line(error)
    assert len(source.read([5, 4])) == 2


def write_known(name, data_dir, images):
    """Prepares a data set with TFDS's own builder of that name, but these images."""
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
            examples = (example(self.info.features, image) for image in images)
            return {"train": enumerate(examples)}

    tfds.disable_progress_bar()
    builder = Written(data_dir=data_dir, config=variant or None)
    builder.download_and_prepare(file_format="array_record")


def jpegs(*shapes):
    """Files of smooth images with noise, and their pixels as TensorFlow decodes them."""
    import tensorflow as tf

    rng = np.random.default_rng(0)
    files = []
    for height, width in shapes:
        noise = Image.fromarray(rng.integers(0, 256, (height // 3, width // 3, 3), np.uint8))
        file = io.BytesIO()
        noise.resize((width, height)).save(file, "JPEG")
        files.append(file.getvalue())
    # Its default is a faster decoder, up to four grey levels away.
    decode = functools.partial(tf.io.decode_jpeg, dct_method="INTEGER_ACCURATE")
    return files, [decode(file).numpy() for file in files]


def triangles(n, size):
    """The matrix [size, n] of a bilinear, antialiased resize from n pixels, in float64."""
    scale = n / size
    distance = np.arange(n) + 0.5 - (np.arange(size)[:, np.newaxis] + 0.5) * scale
    weights = np.maximum(1 - np.abs(distance) / max(scale, 1), 0)
    return weights / np.sum(weights, axis=1, keepdims=True)


def papers_preparation(pixels, name, size):
    """What the paper does with an image of a data set, in float64."""
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
        *("cifar10", "svhn", "celeba64"),
        *("lsun_church64", "lsun_bedroom64", "lsun_church128", "lsun_bedroom128"),
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
    expected = np.stack([papers_preparation(image, name, size) for image in pixels])

    def found(image):
        """The number of an image, of those expected, and whether it is mirrored."""
        both = np.stack([expected, expected[:, :, ::-1]])
        error = np.max(np.abs(both - image), axis=(2, 3, 4))
        assert np.min(error) < 1 / 255
        mirrored, number = np.unravel_index(np.argmin(error), error.shape)
        return number, bool(mirrored)

    # TFDS writes in an order of its own.
    once = sorted(found(image) for image in data.all_images(config))
    assert once == [(i, False) for i in range(len(images))]
    (batch,) = take(config, 1)
    numbers, mirrored = zip(*(found(image) for image in batch), strict=True)
    assert list(np.bincount(numbers)) == [4] * len(images)
    assert any(mirrored) == (config_name != "svhn")


@pytest.mark.parametrize("source", ["tfds", "folder"])
def test_images_of_any_source_train_through_the_whole_program(
    tfds_dir, stripes, tmp_path, source
):
    pixels, files = stripes
    folder = tmp_path / "images"
    folder.mkdir()
    for i, file in enumerate(files):
        (folder / f"{i}.png").write_bytes(file)
    changes = {"data__name": "stripes", "data__data_dir": tfds_dir}
    if source == "folder":
        changes = {"data__name": f"folder:{folder}"}
    workdir = tmp_path / "run"
    arguments = tiny.training(
        workdir, **changes, data__channels=3, data__flip=True, train__num_steps=3
    )
    assert tiny.main(*arguments) == 0
    metrics = json.loads((workdir / "metrics.json").read_text())
    assert (metrics["step"], metrics["num_data"]) == (3, len(pixels))
    assert metrics["pixel_frechet_of_data_halves"] > 0
    sheet = np.asarray(Image.open(workdir / "samples.png"))
    assert sheet.shape == (10 * 72 + 8, 10 * 72 + 8, 3)
