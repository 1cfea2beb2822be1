import logging
import re

import numpy as np
import pytest
from helpers.examples import make_config, one_line, scaled

from drl_jax.data import arrays, pipeline, sources
from drl_jax.errors import UserError

RNG = np.random.default_rng(0)
TABLE = RNG.normal(size=(20, 3)).astype(np.float32)
PIXELS = RNG.integers(0, 256, (20, 8, 8, 1), np.uint8)
SIGNALS = RNG.normal(size=(20, 12, 2)).astype(np.float32)


def table_config(name, D=3, **fields):
    """Returns the configuration of vectors of D values."""
    config = make_config(name, channels=D, flip=False, **fields)
    config.energy.network, config.energy.parameterisation = "mlp", "unit"
    return config


def npz(path, **fields):
    """Writes fields to a file, and returns its name as a data set."""
    np.savez(path / "a.npz", **fields)
    return f"npz:{path / 'a.npz'}"


def npy(path, x):
    np.save(path / "a.npy", x)
    return f"npy:{path / 'a.npy'}"


def text(path, content):
    (path / "a.csv").write_text(content)
    return f"csv:{path / 'a.csv'}"


def read_all(config):
    source = sources.open_source(config)
    return np.stack(source.read(range(len(source))))


# What is read


@pytest.mark.parametrize("header", ["", "a,b,c\n", '\ufeff"a", "b" ,c\n\n'])
def test_a_table_is_the_same_from_every_kind_of_file(tmp_path, header):
    """Fails if the header is read as numbers, or the first row as a header."""
    rows = "\n".join(",".join(map(repr, row)) for row in TABLE.tolist())
    for name in (npz(tmp_path, x=TABLE), npy(tmp_path, TABLE), text(tmp_path, header + rows)):
        x = read_all(table_config(name))
        np.testing.assert_array_equal(x, TABLE)
        assert x.dtype == np.float32
    assert arrays.read(name).columns == (["a", "b", "c"] if header else [])


@pytest.mark.parametrize("dtype", [np.float16, np.float64, np.int32, np.uint8])
def test_vectors_of_any_real_numbers_become_float32_and_are_not_scaled(tmp_path, dtype):
    x = RNG.integers(0, 100, (50, 3)).astype(dtype)
    config = table_config(npz(tmp_path, x=x))
    examples = pipeline.load_examples(config, sources.open_source(config))
    np.testing.assert_array_equal(examples, x.astype(np.float32))
    assert examples.dtype == np.float32


@pytest.mark.parametrize("shape", [(20, 8, 8, 1), (20, 8, 8, 3)])
def test_8_bit_images_are_scaled_and_images_of_floats_are_used_as_they_are(tmp_path, shape):
    pixels = RNG.integers(0, 256, shape, np.uint8)
    for x in (pixels, scaled(pixels).astype(np.float64)):
        name = npz(tmp_path, x=x)
        config = make_config(name, channels=pixels.shape[-1])
        source = sources.open_source(config)
        assert source.white == (255 if x is pixels else None)
        examples = pipeline.load_examples(config, source)
        np.testing.assert_array_equal(examples, scaled(pixels))
        assert examples.dtype == np.float32


def test_8_bit_images_are_resized_and_images_of_floats_must_have_the_size(tmp_path):
    config = make_config(npz(tmp_path, x=PIXELS), image_size=4)
    source = sources.open_source(config)
    assert pipeline.load_examples(config, source).shape == (20, 4, 4, 1)
    config.data.name = npz(tmp_path, x=scaled(PIXELS))
    with pytest.raises(UserError, match=r"8x8 numbers.*--config.data.image_size=8"):
        sources.open_source(config)


def test_the_outline_has_shape_and_type_and_follows_changes_of_the_file(tmp_path):
    for x in (TABLE, PIXELS):
        outline = arrays.outline(npz(tmp_path, x=x))
        assert (outline.shape, outline.dtype) == (x.shape, x.dtype)
        assert not any(outline.strides)  # it takes no memory
    for name in ("digits", "npz:", "npz:no", npz(tmp_path, x=TABLE[0]), npz(tmp_path, y=TABLE)):
        assert arrays.outline(name) is None


@pytest.mark.parametrize("write", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("order", ["C", "F"])
def test_arrays_that_are_not_compressed_stay_in_the_file(tmp_path, write, order):
    """Fails if the place of an array in the archive is off by a byte, or its order is lost."""
    fields = {"y": np.arange(20) % 2, "x": np.asarray(SIGNALS, order=order), "x_test": PIXELS}
    write(tmp_path / "a.npz", **fields)
    found = arrays.read(f"npz:{tmp_path / 'a.npz'}")
    for name, value in fields.items():
        np.testing.assert_array_equal(getattr(found, name), value)
    assert isinstance(found.x, np.memmap) == (write is np.savez)


def test_the_examples_of_an_npy_file_stay_in_the_file(tmp_path):
    assert isinstance(arrays.read(npy(tmp_path, PIXELS)).x, np.memmap)


def test_statistics_are_those_of_all_examples_also_in_several_chunks(tmp_path, monkeypatch):
    """Fails in float32, because the mean is large."""
    monkeypatch.setattr(arrays, "CHUNK", 10)
    x = TABLE.astype(np.float64) * [1, 1e-2, 10] + [0, 1e4, -5]
    found = arrays.checked("x", arrays.read(npz(tmp_path, x=x)))[1]
    x = x.astype(np.float32).astype(np.float64)
    for got, want in zip(found, (x.min(0), x.max(0), x.mean(0), x.std(0)), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-6)


# Labels and test data


def test_labels_are_those_of_the_examples_also_of_test_data(tmp_path):
    y = np.arange(20) % 4
    name = npz(tmp_path, x=PIXELS, y=y, x_test=PIXELS[15:], y_test=y[15:].astype(np.uint8))
    config = make_config(name, classes=4, test_fraction=0.5)  # which x_test replaces
    train, test = sources.open_source(config), sources.open_held_out(config)
    for source, first in ((train, 0), (test, 15)):
        sources.require_classes(config, source)
        images, labels = zip(*source.read_labelled(range(len(source))), strict=True)
        np.testing.assert_array_equal(np.stack(images), PIXELS[first:])
        assert list(labels) == y[first:].tolist()
    assert (train.split, train.held_out) == ("train", False)
    assert (test.split, test.held_out) == ("test", True)
    assert train.identity != test.identity
    assert train.fingerprint == test.fingerprint


def test_without_test_data_a_share_is_held_out(tmp_path):
    name = npz(tmp_path, x=TABLE)
    config = table_config(name, test_fraction=0.25)
    train, test = sources.open_source(config), sources.open_held_out(config)
    assert (len(train), len(test), test.held_out) == (15, 5, True)
    both = np.concatenate([train.read(range(15)), test.read(range(5))])
    assert {row.tobytes() for row in both} == {row.tobytes() for row in TABLE}
    config.data.test_fraction = 0.0
    assert not sources.open_held_out(config).held_out


def test_the_fingerprint_changes_with_the_values_and_not_with_the_place(tmp_path):
    first = sources.open_source(table_config(npy(tmp_path, TABLE)))
    (tmp_path / "b").mkdir()
    moved = sources.open_source(table_config(npy(tmp_path / "b", TABLE)))
    changed = TABLE.copy()
    changed[-1, -1] += 1
    other = sources.open_source(table_config(npy(tmp_path, changed)))
    assert first.fingerprint == moved.fingerprint != other.fingerprint
    assert first.identity == moved.identity != other.identity


def test_one_line_says_what_was_found(tmp_path, caplog):
    caplog.set_level(logging.INFO, logger="drl_jax")
    read_all(make_config(npz(tmp_path, x=PIXELS, y=np.arange(20) % 2)))
    assert re.fullmatch("found 20 images of 8x8x1 values in .*, 2 classes", caplog.messages[-1])
    read_all(table_config(npy(tmp_path, TABLE)))
    assert re.fullmatch("found 20 vectors of 3 values in '[^']*'", caplog.messages[-1])


def test_columns_that_look_like_labels_or_have_another_scale_are_named(tmp_path, caplog):
    caplog.set_level(logging.INFO, logger="drl_jax")
    x = TABLE * [1, 1, 300]
    x[:, 1] = np.arange(20) % 3
    rows = "\n".join(",".join(map(str, row)) for row in x.tolist())
    read_all(table_config(text(tmp_path, f"a,kind,size\n{rows}")))
    assert "column 'kind' has only a few values, all whole numbers" in caplog.text
    assert "column 'size' has mean" in caplog.text
    assert "use --config.data.standardise=True" in caplog.text
    assert caplog.text.count("has only a few") == 1


# What is wrong with a file


def bad(x, index, value):
    x = np.array(x, np.float64)
    x[index] = value
    return x


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"a": TABLE}, "no field 'x' .*'a'.*np.savez"),
        ({}, "no field 'x' .*none"),
        ({"x": np.array([[1, "b"], [2, None]], object)}, "Object arrays cannot be loaded"),
        ({"x": np.array([["a", "b"]])}, "type <U1, which are not real numbers"),
        ({"x": TABLE > 0}, "type bool, which are not real numbers"),
        ({"x": TABLE * 1j}, "type complex64, which are not real numbers"),
        ({"x": TABLE[0, 0]}, r"shape \(\) .*without an axis|shape \(\).*"),
        ({"x": TABLE[0]}, r"shape \(3,\) .*without an axis for the values.*\[n, D\]"),
        ({"x": TABLE[:0]}, "which is empty"),
        ({"x": PIXELS[..., 0]}, r"if these are grey images.*x\[..., None\]"),
        ({"x": np.zeros((5, 8, 9, 1), np.uint8)}, "sides of different lengths; crop"),
        ({"x": np.zeros((5, 8, 8, 9, 1))}, "sides of different lengths; crop"),
        ({"x": np.zeros((5, 8, 8, 8))}, "1 .grey. or 3 .RGB. channels"),
        ({"x": np.zeros((5, 4, 4, 4, 4, 1))}, "too many axes; give vectors"),
        ({"x": bad(SIGNALS, (Ellipsis, 1), 4)}, r"channel x\[..., 1\] is constant \(4\)"),
        ({"x": bad(SIGNALS, (7, 3, 0), np.nan)}, r"x\[7, 3, 0\] = nan"),
        ({"x": PIXELS.astype(np.int64)}, "type int64; give images as uint8"),
        ({"x": PIXELS.astype(np.float32)}, r"x\[0, 0, 0, 0\] = \d+; scale images to \[-1, 1\]"),
        ({"x": bad(scaled(PIXELS), (3, 1, 2), np.nan)}, r"x\[3, 1, 2, 0\] = nan; .*missing"),
        ({"x": bad(TABLE, (3, 1), np.nan)}, r"x\[3, 1\] = nan; leave out .* missing values"),
        ({"x": bad(TABLE, (19, 2), -np.inf)}, r"x\[19, 2\] = -inf"),
        ({"x": bad(TABLE, (19, 2), 1e300)}, r"x\[19, 2\] = inf"),
        ({"x": bad(TABLE, (slice(None), 1), 7)}, r"column x\[:, 1\] is constant \(7\)"),
        ({"x": np.ones((20, 3))}, r"column x\[:, 0\] is constant \(1\), as are 2 others"),
        ({"x": PIXELS, "y": np.zeros(19, int)}, r"20 examples, but y of shape \(19,\)"),
        ({"x": PIXELS, "y": np.zeros((20, 1), int)}, r"but y of shape \(20, 1\)"),
        ({"x": PIXELS, "y": np.zeros(20)}, "y of float64; give labels as integers"),
        ({"x": PIXELS, "y": np.arange(20) - 1}, "label -1 in y; count labels from 0"),
        ({"x": PIXELS, "y": np.arange(20) * 2}, "up to 38, but no example with the label 1"),
        ({"x": PIXELS, "x_test": PIXELS[:, :4, :4]}, r"\(8, 8, 1\), but x_test .*\(4, 4, 1\)"),
        ({"x": PIXELS, "x_test": scaled(PIXELS)}, "x of uint8 .* x_test of float32"),
        ({"x": TABLE, "x_test": bad(TABLE, (0, 0), np.nan)}, r"x_test\[0, 0\] = nan"),
        ({"x": PIXELS, "y_test": np.zeros(20, int)}, "y_test but no x_test"),
        (
            {"x": PIXELS, "y": np.zeros(20, int), "x_test": PIXELS, "y_test": np.arange(20)},
            "label 19 in y_test, but not in y",
        ),
        (
            {"x": PIXELS, "y": np.zeros(20, int), "x_test": PIXELS, "y_test": np.arange(3)},
            r"20 examples, but y_test of shape \(3,\)",
        ),
    ],
)  # fmt: skip
def test_an_array_that_cannot_be_learned_is_one_line(tmp_path, monkeypatch, fields, words):
    """Also if the wrong value is in a later chunk."""
    monkeypatch.setattr(arrays, "CHUNK", 1)
    name = npz(tmp_path, **fields)
    with pytest.raises(UserError) as error:
        sources.open_held_out(make_config(name))
    assert re.search(words, one_line(error))
    assert "a.npz" in one_line(error)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "no numbers"),
        ("a,b\n", "no numbers"),
        ("1,2\n3\n", "line 2 has 1 fields instead of 2"),
        ("a,b\n1,2,3\n", "line 2 has 3 fields instead of 2"),
        ("a,b\n1,2\n\n3,\n", "line 4, column 'b' is ''; give finite numbers"),
        ("1,2\n3,x\n", "line 2, field 2 is 'x'"),
        ("a,b\n1,2\n3,nan\n", "line 3, column 'b' is 'nan'"),
        ("1,2\n-inf,4\n", "line 2, field 1 is '-inf'"),
        ("a,1\n2,3\n", "line 1, field 1 is 'a'"),
        ("a;b\n1;2\n", "is '1;2'; .*separated by commas"),
        ("a,b\n1,2\n1,3\n", "column 'a' is constant"),
        ("1,1e300\n2,3\n", r"x\[0, 1\] = inf"),
        (b"\xff\xfe\x00", "cannot read .*a.csv as a .csv file: .*decode"),
    ],
)
def test_a_table_that_cannot_be_read_is_one_line(tmp_path, content, words):
    file = tmp_path / "a.csv"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError) as error:
        sources.open_source(table_config(f"csv:{file}", 2))
    assert re.search(words, one_line(error))
    assert "a.csv" in one_line(error)


@pytest.mark.parametrize("kind", ["npz", "npy"])
@pytest.mark.parametrize("content", [b"", b"not an array", b"\x93NUMPY\x01", b"PK\x03\x04 zip"])
def test_a_file_that_is_not_of_its_kind_is_one_line(tmp_path, kind, content):
    (tmp_path / "a").write_bytes(content)
    with pytest.raises(UserError, match=rf"cannot read .*/a as a \.{kind} file") as error:
        sources.open_source(make_config(f"{kind}:{tmp_path / 'a'}"))
    one_line(error)


def test_nothing_is_unpickled(tmp_path):
    """Fails if the array can be loaded: then a file could run code."""
    x = np.array([[{}, {}], [{}, {}]], object)
    for name in (npz(tmp_path, x=x), npy(tmp_path, x)):
        with pytest.raises(UserError, match=r"cannot read .*[Oo]bject"):
            sources.open_source(make_config(name))


def test_an_npy_file_given_as_npz_is_answered_with_its_kind(tmp_path):
    file = npy(tmp_path, TABLE).removeprefix("npy:")
    with pytest.raises(UserError, match="single array; give it as npy:"):
        sources.open_source(table_config(f"npz:{file}"))


@pytest.mark.parametrize("kind", arrays.READERS)
def test_a_missing_file_or_path_is_one_line(tmp_path, kind):
    for path, words in (("", "without a path"), (tmp_path / "no", "no such file")):
        with pytest.raises(UserError, match=words) as error:
            sources.open_source(make_config(f"{kind}:{path}"))
        one_line(error)


def test_the_path_of_a_file_is_answered_with_the_name_of_the_source(tmp_path):
    file = npz(tmp_path, x=TABLE).removeprefix("npz:")
    with pytest.raises(UserError, match=rf"give --config.data.name=npz:{file}"):
        sources.open_source(make_config(file))


@pytest.mark.parametrize(
    ("x", "fields", "words"),
    [
        (TABLE, {"data.channels": 2}, "vectors of 3 values, .*--config.data.channels=3"),
        (TABLE, {"energy.network": "unet"}, "vectors, but .*'unet' is for other examples"),
        (PIXELS, {}, "images, but .*'mlp' is for vectors; start from configs/arrays.py"),
        (PIXELS, {"energy.network": "unet"}, "1 channel, .*--config.data.channels=1"),
        (SIGNALS, {"energy.network": "unet"}, "signals, .*set --config.data.axes=1"),
        (
            SIGNALS,
            {"energy.network": "unet", "data.axes": 1},
            "signals of 2 channels, .*--config.data.channels=2",
        ),
        (
            SIGNALS,
            {"energy.network": "unet", "data.axes": 1, "data.channels": 2},
            "signals of 12 numbers, .*--config.data.image_size=12",
        ),
        (
            scaled(PIXELS),
            {"energy.network": "unet", "data.channels": 1, "data.standardise": True},
            "not standardised; set it to False",
        ),
        (
            scaled(PIXELS),
            {"energy.network": "unet", "data.channels": 1, "data.dequantise": 2 / 255},
            "not 8-bit pixels; set it to 0",
        ),
        (
            PIXELS,
            {"energy.network": "unet", "data.channels": 1, "data.dequantise": 0.1},
            "differ by 0.00784",
        ),
    ],
)
def test_settings_that_do_not_suit_the_file_are_one_line(tmp_path, x, fields, words):
    config = table_config(npz(tmp_path, x=x))
    config.update_from_flattened_dict(fields)
    with pytest.raises(UserError, match=words) as error:
        sources.open_source(config)
    one_line(error)
