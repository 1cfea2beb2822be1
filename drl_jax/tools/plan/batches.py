"""Finds the largest batch size that fits into memory, using few compilations."""

import math
from collections.abc import Callable

# Share of the memory that the batch should need. With more, the compiler can spend many minutes
# searching for a memory layout.
TARGET = 0.85
# The search stops at a batch that needs at least the share TARGET - TOLERANCE.
TOLERANCE = 0.05
# Largest ratio of a batch to the largest one tried before: beyond it, linear extrapolation is
# unreliable.
MAX_GROWTH = 16
MAX_TRIES = 4  # compilations, besides that of the first batch


def largest(
    needed: Callable[[int], float | None], first: int, at_first: float | None, limit: float
) -> int:
    """Finds the largest batch that fits by linear extrapolation, compiling each candidate.

    Args:
      needed: compiles the program for a batch size and returns the memory that it needs, or
        None if the compiler ran out of memory and reported no number.
      first: batch size that has already been tried.
      at_first: what `needed` returned for it.
      limit: available memory, in the same unit as that of `needed`.

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

    It lies on the line through the two largest batches whose memory is known; if that line does
    not rise, it is twice the larger of them. With only one, the proposal is twice that batch if
    twice its memory is available, and otherwise half of the batch that would just fit if memory
    were proportional to the batch. With none, it is a quarter of the smallest batch tried.

    Args:
      tried: memory needed by the batch sizes tried so far; None where it is unknown.
      limit: available memory.
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
