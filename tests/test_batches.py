import pytest

from drl_jax.tools.plan import batches

LIMIT = 1000.0


@pytest.fixture
def search():
    """Returns a function that runs the search and lists the batches that it tried."""

    def run(needed, first, limit=LIMIT):
        tried = []

        def needed_of(batch):
            tried.append(batch)
            return needed(batch)

        return batches.largest(needed_of, first, needed(first), limit), tried

    return run


def test_linear_memory_takes_two_more_compilations(search):
    largest, tried = search(lambda batch: 100 + 10 * batch, 16)
    assert tried == [32, 75]  # 100 + 10 * 75 is 85% of the limit
    assert largest == 75


def test_a_first_batch_close_to_the_target_is_the_result(search):
    assert search(lambda batch: 100 + 10 * batch, 74) == (74, [])


def test_from_a_first_batch_far_too_large_it_finds_one_that_fits(search):
    largest, _ = search(lambda batch: 100 + 10 * batch, 4096)
    assert 100 + 10 * largest == pytest.approx(LIMIT * batches.TARGET, rel=0.06)


def test_without_numbers_for_batches_that_do_not_fit_it_approaches_from_below(search):
    def needed(batch):
        return None if batch > 90 else 100 + 10 * batch

    largest, tried = search(needed, 512)
    assert 70 <= largest <= 80
    assert len(tried) <= batches.MAX_TRIES


def test_with_convex_memory_the_result_still_fits(search):
    def needed(batch):
        return 100 + 5 * batch if batch < 100 else 100 + 12 * batch

    largest, _ = search(needed, 32)
    assert needed(largest) <= LIMIT
    assert largest >= 64


def test_if_no_batch_fits_the_result_is_zero(search):
    assert search(lambda batch: 5000 + 10 * batch, 16)[0] == 0
    assert search(lambda batch: None, 16)[0] == 0


def test_from_a_first_batch_far_too_small_it_extrapolates_in_limited_steps(search):
    largest, tried = search(lambda batch: 10 + 0.1 * batch, 4)
    assert tried == [8, 8 * batches.MAX_GROWTH, 8 * batches.MAX_GROWTH**2, 8400]
    assert largest == 8400  # 10 + 0.1 * 8400 is 85% of the limit


def test_it_ends_if_memory_does_not_depend_on_the_batch(search):
    largest, tried = search(lambda batch: 10.0, 4)
    assert tried == [8, 16, 32, 64]
    assert largest == 64
