import numpy as np
import pytest

from drl_jax.metrics import neighbours


@pytest.fixture
def points():
    """250 points in five dimensions, more than two blocks of 100."""
    return np.random.default_rng(0).normal(size=(250, 5))


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(neighbours, "ROWS", 100)


def test_equal_sets_have_precision_and_recall_1_and_distant_ones_0(points):
    assert neighbours.precision_and_recall(points, points) == (1, 1)
    assert neighbours.precision_and_recall(points, points + 100) == (0, 0)


def test_precision_is_the_share_of_good_samples_and_recall_the_share_of_covered_data(points):
    """Fails if the two are swapped, or if the balls are those of the other set."""
    far = points + 100
    samples = np.concatenate([points[:120], far[:30]])
    assert neighbours.precision_and_recall(samples, points)[0] == 120 / 150
    precision, recall = neighbours.precision_and_recall(
        points, np.concatenate([points, far[:50]])
    )
    assert (precision, recall) == (1, 250 / 300)


@pytest.mark.parametrize(("k", "covered"), [(1, 0), (2, 1), (3, 1)])
def test_a_ball_reaches_to_the_kth_nearest_other_point_of_its_set(k, covered):
    """On a line: the balls around 0, 1 and 5 reach 1, 1 and 4 for k = 1, then 5, 4 and 5.

    Fails if the point itself counts as a neighbour, or if k is off by one.
    """
    data = np.array([[0.0], [1.0], [5.0], [50.0]])
    sample = np.array([[-1.5]] * 5)
    precision, _ = neighbours.precision_and_recall(sample, data[:3] if k < 3 else data, k)
    assert precision == covered


def test_the_edge_of_a_ball_belongs_to_it():
    data = np.array([[0.0], [2.0], [4.0]])
    assert neighbours.precision_and_recall(np.array([[-2.0], [-2.1]]), data, k=1)[0] == 0.5


def test_copies_have_distance_exactly_0_and_others_that_of_the_nearest_point(points):
    """Fails if |x|² + |y|² - 2xy is taken for the distance: its rounding error is not 0."""
    np.testing.assert_array_equal(neighbours.nearest(points[50:], points), 0)
    x = points[:7] + 0.1
    expected = np.linalg.norm(x[:, None] - points, axis=-1).min(axis=1)
    np.testing.assert_allclose(neighbours.nearest(x, points), expected, rtol=1e-12)
