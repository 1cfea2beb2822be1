import pytest

from drl_jax.errors import UserError
from drl_jax.tools.plan import chips


@pytest.mark.parametrize(
    ("name", "devices"),
    [
        ("v3:2x2", 8),  # two devices per chip
        ("v4:2x2x1", 4),  # one device per chip
        ("v5e:16x16", 256),
        ("v5p:4x4x8", 128),
        ("v6e:1x1", 1),
        ("h100:8", 8),
        ("a100:16", 16),
    ],
)
def test_number_of_devices(name, devices):
    assert chips.parse(name).devices == devices


@pytest.mark.parametrize("name", ["v9:2x2", "", "2x4", ":8", "cpu:8"])
def test_the_error_for_an_unknown_chip_lists_the_known_ones(name):
    with pytest.raises(UserError) as error:
        chips.parse(name)
    assert all(known in str(error.value) for known in chips.CHIPS)


@pytest.mark.parametrize(
    ("name", "example"),
    [
        ("v5e", "v5e:4x4"),
        ("v5e:16", "v5e:4x4"),
        ("v5e:2x2x2", "v5e:4x4"),
        ("v5e:0x4", "v5e:4x4"),
        ("v4:2x2", "v4:4x4x8"),
        ("h100:2x2", "h100:8"),
        ("h100:-1", "h100:8"),
    ],
)
def test_the_error_for_an_impossible_shape_gives_an_example(name, example):
    with pytest.raises(UserError, match=f"--topology={name}: .*{example}$"):
        chips.parse(name)


@pytest.mark.parametrize(("kind", "GHz"), [("v3", 0.94), ("v4", 1.05), ("v5p", 1.75)])
def test_clock_rates_from_peak_and_matrix_units_are_those_published(kind, GHz):
    assert chips.CHIPS[kind].clock == pytest.approx(GHz * 1e9, rel=0.002)


def test_gpus_have_no_clock_rate():
    assert chips.CHIPS["h100"].clock is None
