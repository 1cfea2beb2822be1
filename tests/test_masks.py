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
def test_a_mask_hides_what_its_name_says(name, hidden):
    known = masks.named(name, 4, KEY)
    assert known.shape == (4, 4, 1)
    assert known.dtype == np.bool_
    assert ["".join(".#"[int(not k)] for k in row) for row in known[..., 0]] == hidden


@pytest.mark.parametrize("size", [2, 3, 5, 8, 33])
def test_two_halves_hide_every_pixel_once(size):
    for one, other in (("left", "right"), ("top", "bottom")):
        hidden = [~masks.named(name, size, KEY) for name in (one, other)]
        assert np.all(hidden[0] ^ hidden[1])


@pytest.mark.parametrize("fraction", [0.1, 0.5, 0.93])
def test_a_random_mask_hides_its_fraction_anywhere(fraction):
    known = np.stack(
        [masks.named(f"random:{fraction}", 8, jax.random.key(i)) for i in range(200)]
    )
    np.testing.assert_array_equal(np.sum(~known, axis=(1, 2, 3)), round(fraction * 64))
    # Each pixel is as likely as another: 64 binomials, false alarm 64 * 4e-8.
    spread = np.sqrt(fraction * (1 - fraction) / 200)
    assert np.abs(np.mean(~known, axis=0) - fraction).max() < 5.5 * spread + 0.01
    again = masks.named(f"random:{fraction}", 8, jax.random.key(7))
    np.testing.assert_array_equal(again, known[7])


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("center", "'center' is unknown: did you mean 'centre'.*checkerboard, random:0.5"),
        ("botom", "did you mean 'bottom'"),
        ("randm:0.5", "did you mean 'random'"),
        ("", "'' is unknown: Masks are"),
        *((f"random{rest}", r"'random.*in \(0, 1\)") for rest in ("", ":", ":x", ":0", ":1")),
        *((f"random:{value}", r"in \(0, 1\)") for value in ("-0.5", "1.5", "nan", "inf")),
    ],
)
def test_a_name_that_is_no_mask_is_refused_in_a_line(name, words):
    with pytest.raises(UserError, match=words) as error:
        masks.named(name, 8, KEY)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("known", "words"),
    [
        (np.zeros((8, 9, 1), bool), "mask is 8x9x1, the images are 8x8"),
        (np.zeros((8, 8), bool), "mask is 8x8, the images"),
        (np.zeros((8, 8, 3), bool), "8x8x3"),
        (np.zeros((8, 8, 1)), "float64"),
        (np.ones((8, 8, 1), bool), "hides no pixel"),
        (np.zeros((8, 8, 1), bool), "hides every pixel"),
        (masks.named("random:0.001", 8, KEY), "hides no pixel"),
        (masks.named("random:0.999", 8, KEY), "hides every pixel"),
    ],
)
def test_what_cannot_be_a_mask_is_refused_in_a_line(known, words):
    with pytest.raises(UserError, match=words) as error:
        masks.require_mask(known, (8, 8, 3))
    assert "\n" not in str(error.value)
