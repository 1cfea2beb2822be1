import re

import jax
import numpy as np
import pytest
from etils import epath
from helpers.random_inception import vectors
from PIL import Image

from drl_jax import config as config_lib
from drl_jax.data import sources
from drl_jax.errors import UserError
from drl_jax.metrics import cache, reference


class CountingExtractor:
    """Replaces the network, and counts the images that it is given."""

    def __init__(self):
        self.count = 0

    def __call__(self, images):
        for batch in vectors(images):
            self.count += len(batch["2048"])
            yield batch


@pytest.fixture
def config(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(6):
        pixels = rng.integers(0, 256, (8, 8, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
    config = config_lib.default()
    config.data.update(name=f"folder:{folder}", image_size=8)
    return config


@pytest.fixture
def workdir(tmp_path):
    (tmp_path / "run").mkdir()
    return epath.Path(tmp_path / "run")


def summary_of_data(config, workdir, network="1234"):
    """Returns the summary, and the number of images from which it was computed."""
    extractor = CountingExtractor()
    source = sources.open_source(config)
    summary = reference.of_data(
        config=config, source=source, extractor=extractor, network=network, workdir=workdir
    )
    return summary, extractor.count


def assert_equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_a_second_call_reads_what_the_first_wrote(config, workdir, tmp_path):
    first, count = summary_of_data(config, workdir)
    assert count == first.moments.n == 6
    (file,) = tmp_path.glob("images.inception-*.npz")  # next to the folder, not inside
    assert len(list((tmp_path / "images").iterdir())) == 6
    assert not list(workdir.iterdir())
    second, count = summary_of_data(config, workdir)
    assert count == 0
    assert_equal(first, second)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["images", file.name, "run"]


@pytest.mark.parametrize(
    "change",
    [
        {"network": "5678"},
        {"data.image_size": 4},
        {"data.channels": 1},
        {"data.crop": "none"},
        {"data.background": "black"},
        {"evaluation.num_data": 5},
        {"new": "image"},
    ],
    ids=lambda change: next(iter(change)),
)
def test_other_weights_or_data_have_another_file(config, workdir, tmp_path, change):
    summary_of_data(config, workdir)
    network = change.pop("network", "1234")
    if change.pop("new", None):
        Image.new("RGB", (8, 8)).save(tmp_path / "images" / "new.png")
    config.update_from_flattened_dict(change)
    summary, count = summary_of_data(config, workdir, network)
    assert count == summary.moments.n > 0
    assert len(list(tmp_path.glob("*.npz"))) == 2


def test_images_that_were_replaced_under_the_same_names_have_another_file(
    config, workdir, tmp_path, caplog
):
    """Fails if only the names are compared."""
    first, _ = summary_of_data(config, workdir)
    for i in range(6):
        Image.new("RGB", (8, 8), (40 * i, 0, 0)).save(tmp_path / "images" / f"{i}.png")
    replaced, count = summary_of_data(config, workdir)
    assert count == 6
    assert np.abs(replaced.moments.mean - first.moments.mean).max() > 0
    with caplog.at_level("INFO"):
        summary_of_data(config, workdir)
    assert re.search("using the Inception statistics .* cached in .*images.incep", caplog.text)


def test_unreadable_images_are_left_out_of_the_statistics(config, workdir, tmp_path):
    (tmp_path / "images" / "3.png").write_bytes(b"no image")
    summary, count = summary_of_data(config, workdir)
    assert count == summary.moments.n == 5


def test_settings_that_do_not_change_the_images_share_the_file(config, workdir):
    summary_of_data(config, workdir)
    config.data.flip = False
    config.evaluation.num_data = 6
    config.evaluation.batch_size = 3
    assert summary_of_data(config, workdir)[1] == 0


def test_a_damaged_file_is_replaced(config, workdir, tmp_path):
    first, _ = summary_of_data(config, workdir)
    (file,) = tmp_path.glob("*.npz")
    file.write_bytes(file.read_bytes()[:5000])
    again, count = summary_of_data(config, workdir)
    assert count == 6
    assert_equal(first, again)
    assert summary_of_data(config, workdir)[1] == 0


def test_the_work_directory_is_used_if_the_datas_place_cannot_be_written_to(
    config, workdir, tmp_path, monkeypatch
):
    def write(file, arrays, write=cache.write):
        if file.parent == epath.Path(tmp_path):
            raise UserError("cannot write here")
        write(file, arrays)

    monkeypatch.setattr(cache, "write", write)
    summary_of_data(config, workdir)
    assert not list(tmp_path.glob("*.npz"))
    assert len(list(workdir.glob("inception-*.npz"))) == 1
    assert summary_of_data(config, workdir)[1] == 0


def test_the_work_directory_is_used_for_data_without_a_folder(workdir):
    config = config_lib.default()
    config.data.update(name="digits", image_size=8, channels=1)
    config.evaluation.num_data = 10
    summary, _ = summary_of_data(config, workdir)
    assert summary.moments.n == 10
    assert len(list(workdir.glob("inception-*.npz"))) == 1


def test_images_that_were_replaced_by_ones_of_equal_size_have_another_file(config, workdir):
    """Fails if the times of the files are not compared."""
    folder = epath.Path(config.data.name.removeprefix("folder:"))
    for value in (0, 100):
        for i in range(6):
            Image.new("RGB", (8, 8), value + i).save(folder / f"{i}.png", "BMP")
        assert summary_of_data(config, workdir)[1] == 6
    assert summary_of_data(config, workdir)[1] == 0


def test_parts_of_the_same_data_have_their_own_files(workdir):
    """Also without files whose sizes and times could be compared."""
    config = config_lib.default()
    config.data.update(name="digits", image_size=8, channels=1)
    for fraction, n in ((0.0, 9), (0.0, 10), (0.2, 10), (0.3, 10)):
        config.data.test_fraction, config.evaluation.num_data = fraction, n
        assert summary_of_data(config, workdir)[1] == n
    assert len(list(workdir.glob("inception-*.npz"))) == 4
