import pytest

from drl_jax.tools.plan import batches

LIMIT = 1000.0


@pytest.fixture
def search():
    """Returns a function that searches, with what a batch needs, and says what it tried."""

    def run(needed, first, limit=LIMIT):
        tried = []

        def needed_of(batch):
            tried.append(batch)
            return needed(batch)

        return batches.largest(needed_of, first, needed(first), limit), tried

    return run


def test_a_straight_line_takes_two_more_programs(search):
    largest, tried = search(lambda batch: 100 + 10 * batch, 16)
    assert tried == [32, 75]  # 100 + 10 * 75 is 85% of the limit
    assert largest == 75


def test_a_first_batch_near_the_aim_is_the_answer(search):
    assert search(lambda batch: 100 + 10 * batch, 74) == (74, [])


def test_a_first_batch_far_too_large_leads_to_one_that_fits(search):
    largest, _ = search(lambda batch: 100 + 10 * batch, 4096)
    assert 100 + 10 * largest == pytest.approx(LIMIT * batches.AIM, rel=0.06)


def test_a_compiler_that_gives_no_number_is_approached_from_below(search):
    def needed(batch):
        return None if batch > 90 else 100 + 10 * batch

    largest, tried = search(needed, 512)
    assert 70 <= largest <= 80
    assert len(tried) <= batches.TRIES


def test_a_line_that_bends_up_is_corrected_by_what_did_not_fit(search):
    def needed(batch):
        return 100 + 5 * batch if batch < 100 else 100 + 12 * batch

    largest, _ = search(needed, 32)
    assert needed(largest) <= LIMIT
    assert largest >= 64


def test_where_not_even_one_fits_it_is_none(search):
    assert search(lambda batch: 5000 + 10 * batch, 16)[0] == 0
    assert search(lambda batch: None, 16)[0] == 0


def test_a_first_batch_far_too_small_is_left_behind(search):
    """By a line that two small batches draw, but no further at once than it can see."""
    largest, tried = search(lambda batch: 10 + 0.1 * batch, 4)
    assert tried == [8, 8 * batches.REACH, 8 * batches.REACH**2, 8400]
    assert largest == 8400  # 10 + 0.1 * 8400 is 85% of the limit


def test_it_ends_where_a_batch_takes_nothing(search):
    largest, tried = search(lambda batch: 10.0, 4)
    assert tried == [8, 16, 32, 64]
    assert largest == 64
