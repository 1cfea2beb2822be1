import re

import jax
import numpy as np
import pytest

from drl_jax.errors import UserError
from drl_jax.sampling import masks

KEY = jax.random.key(0)


@pytest.mark.parametrize(
    ("name", "hidden"),
    [
        ("centre", ["....", ".##.", ".##.", "...."]),
        ("left", ["##..", "##..", "##..", "##.."]),
        ("right", ["..##", "..##", "..##", "..##"]),
        ("top", ["####", "####", "....", "...."]),
        ("bottom", ["....", "....", "####", "####"]),
        ("checkerboard", ["#.#.", ".#.#", "#.#.", ".#.#"]),
    ],
)
def test_a_mask_hides_the_region_that_it_is_named_after(name, hidden):
    known = masks.named(name, 4, KEY)
    assert known.shape == (4, 4, 1)
    assert known.dtype == np.bool_
    assert ["".join(".#"[int(not k)] for k in row) for row in known[..., 0]] == hidden


@pytest.mark.parametrize(
    ("name", "hidden"),
    [
        ("centre", "..####.."),
        ("left", "####...."),
        ("right", "....####"),
        ("checkerboard", "#.#.#.#."),
    ],
)
def test_a_mask_hides_part_of_the_features_or_of_the_steps(name, hidden):
    for shape, mask_shape in (((8,), (8,)), ((8, 3), (8, 1))):
        known = masks.named(name, shape, KEY)
        assert (known.shape, known.dtype) == (mask_shape, np.bool_)
        assert "".join(".#"[int(not k)] for k in known.ravel()) == hidden


@pytest.mark.parametrize(
    ("name", "hidden"),
    [
        ("centre", lambda i, j, k: all(1 <= n <= 2 for n in (i, j, k))),
        ("left", lambda i, j, k: k < 2),
        ("right", lambda i, j, k: k >= 2),
        ("top", lambda i, j, k: j < 2),
        ("bottom", lambda i, j, k: j >= 2),
        ("checkerboard", lambda i, j, k: (i + j + k) % 2 == 0),
    ],
)
def test_a_mask_hides_part_of_a_volume_along_the_axes_of_its_slices(name, hidden):
    """Fails if 'left' is along another axis than the last."""
    known = masks.named(name, (4, 4, 4, 2), KEY)
    assert known.shape == (4, 4, 4, 1)
    for index in np.ndindex(4, 4, 4):
        assert known[index] == (not hidden(*index))


@pytest.mark.parametrize("shape", [(10,), (10, 3), (10, 10, 10, 1)])
def test_a_random_mask_hides_its_fraction_of_any_kind_of_example(shape):
    known = masks.named("random:0.3", shape, KEY)
    assert known.shape == (shape if len(shape) == 1 else (*shape[:-1], 1))
    assert np.mean(~known) == pytest.approx(0.3)
    masks.require_mask(known, shape)


@pytest.mark.parametrize("name", ["top", "bottom", "up"])
@pytest.mark.parametrize("shape", [(8,), (8, 3)])
def test_vectors_and_signals_have_no_top_and_no_png_files(name, shape):
    with pytest.raises(UserError, match=f"^mask '{name}' is unknown[^\n]*$") as error:
        masks.named(name, shape, KEY)
    assert re.search("use centre, left, right, checkerboard or random:0.5$", str(error.value))


def test_a_raw_key_hides_the_same_pixels_as_a_typed_one():
    raw = masks.named("random:0.5", 8, jax.random.PRNGKey(0))
    np.testing.assert_array_equal(raw, masks.named("random:0.5", 8, KEY))


@pytest.mark.parametrize("size", [2, 3, 5, 8, 33])
def test_opposite_halves_hide_every_pixel_once(size):
    for half, opposite in (("left", "right"), ("top", "bottom")):
        hidden, others = (~masks.named(name, size, KEY) for name in (half, opposite))
        assert np.all(hidden ^ others)


@pytest.mark.parametrize("size", [4, 5, 6, 7, 33, 64])
def test_the_centre_is_a_symmetric_square_of_about_half_the_rows(size):
    (rows,), (columns,) = (np.any(~masks.named("centre", size, KEY), axis=a).T for a in (1, 0))
    for hidden in (rows, columns):
        np.testing.assert_array_equal(hidden, hidden[::-1])
        assert 0 <= np.sum(hidden) - size / 2 <= 1.5


@pytest.mark.parametrize("fraction", [0.1, 0.5, 0.93])
def test_a_random_mask_hides_its_fraction_with_equal_probability_everywhere(fraction):
    known = np.stack(
        [masks.named(f"random:{fraction}", 8, jax.random.key(i)) for i in range(200)]
    )
    np.testing.assert_array_equal(np.sum(~known, axis=(1, 2, 3)), round(fraction * 64))
    # Each pixel's count is binomial; the rate of false alarms is 64 * 4e-8.
    spread = np.sqrt(fraction * (1 - fraction) / 200)
    assert np.abs(np.mean(~known, axis=0) - fraction).max() < 5.5 * spread + 0.01
    again = masks.named(f"random:{fraction}", 8, jax.random.key(7))
    np.testing.assert_array_equal(again, known[7])


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("center", "'center'.* 'centre'.*checkerboard.*random:0.5"),
        ("botom", "'botom'.* 'bottom'"),
        ("randm:0.5", "'randm:0.5'.* 'random'"),
        ("", "''.*centre.*random:0.5"),
        *((f"random{rest}", rf"'random{rest}'.*\(0, 1\)") for rest in ("", ":", ":x")),
        *(
            (f"random:{value}", rf"'random:{value}'.*\(0, 1\)")
            for value in ("0", "1", "-0.5", "1.5", "nan", "inf")
        ),
    ],
)
def test_unknown_names_and_fractions_are_errors_of_one_line(name, words):
    with pytest.raises(UserError, match=f"^[^\n]*{words}[^\n]*$"):
        masks.named(name, 8, KEY)


@pytest.mark.parametrize(
    ("known", "words"),
    [
        (np.zeros((8, 9, 1), bool), "mask is 8x9x1,.* 8x8"),
        (np.zeros((8, 8), bool), "mask is 8x8,.* 8x8x1"),
        (np.zeros((8, 8, 2), bool), "mask is 8x8x2,"),
        (np.zeros((8, 8, 1)), "float64"),
        (np.ones((8, 8, 1), bool), "hides nothing"),
        (np.zeros((8, 8, 1), bool), "hides everything"),
        (masks.named("random:0.001", 8, KEY), "hides nothing"),
        (masks.named("random:0.999", 8, KEY), "hides everything"),
    ],
)
def test_masks_that_do_not_fit_the_images_are_errors_of_one_line(known, words):
    with pytest.raises(UserError, match=f"^[^\n]*{words}[^\n]*$"):
        masks.require_mask(known, (8, 8, 3))


@pytest.mark.parametrize(
    ("known", "shape", "words"),
    [
        (np.zeros((8, 1), bool), (8,), "mask is 8x1, the examples are 8: give a mask of 8"),
        (np.zeros(8, bool), (8, 2), "mask is 8, the examples are 8x2: give a mask of 8x1"),
        (np.ones(8, bool), (8,), "hides nothing"),
    ],
)
def test_masks_that_do_not_fit_other_examples_are_errors_of_one_line(known, shape, words):
    with pytest.raises(UserError, match=f"^[^\n]*{words}[^\n]*$"):
        masks.require_mask(known, shape)
