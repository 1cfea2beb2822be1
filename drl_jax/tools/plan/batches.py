"""Finds the largest batch size that fits into memory, using few compilations."""

import math
from collections.abc import Callable

# Share of the memory to use. Closer to the limit, the compiler can spend many minutes searching
# for a memory layout.
TARGET = 0.85
# The search stops at a batch that needs at least TARGET - TOLERANCE of the memory.
TOLERANCE = 0.05
# A batch is at most this many times larger than the largest one tried so far: the linear
# extrapolation is unreliable beyond that.
MAX_GROWTH = 16
MAX_TRIES = 4


def largest(
    needed: Callable[[int], float | None], first: int, at_first: float | None, limit: float
) -> int:
    """Finds the largest batch that fits by linear extrapolation, compiling each candidate.

    Args:
      needed: compiles the program for a batch size and returns the memory that it needs, or
        None if the compiler ran out of memory and reported no number.
      first: batch size that has already been tried.
      at_first: the memory that it needs, or None.
      limit: available memory, in the same unit.

    Returns:
      the largest batch size tried that fits, or 0 if none does.
    """
    tried = {first: at_first}

    def fits(batch: int) -> bool:
        amount = tried[batch]
        return amount is not None and amount <= limit

    for _ in range(MAX_TRIES):
        best = max(filter(fits, tried), default=0)
        guess = propose(tried, limit)
        guess = min(guess, MAX_GROWTH * max(tried), *(b - 1 for b in tried if not fits(b)))
        is_close = best and (tried[best] or 0) >= (TARGET - TOLERANCE) * limit
        if is_close or guess <= best:
            break
        tried[guess] = needed(guess)
    return max(filter(fits, tried), default=0)


def propose(tried: dict[int, float | None], limit: float) -> int:
    """Returns the batch size that is expected to need TARGET times the limit.

    With a single known point no line can be fitted. The proposal is then twice that batch if
    that should fit, and otherwise half of the batch that would just fit if memory were
    proportional to the batch.
    """
    known = sorted((batch, amount) for batch, amount in tried.items() if amount is not None)
    if not known:
        return min(tried) // 4
    if len(known) == 1:
        [(batch, amount)] = known
        return 2 * batch if 2 * amount < limit else int(batch * min(1, limit / amount) / 2)
    (small, less), (large, more) = known[-2:]
    slope = (more - less) / (large - small)
    if slope <= 0:
        return 2 * large
    return math.floor(large + (TARGET * limit - more) / slope)
