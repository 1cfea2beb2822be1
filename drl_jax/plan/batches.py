"""The largest batch that fits, from few compilations."""

import math
from collections.abc import Callable

# Of the memory; nearer to its end the compiler looks for room, which can take it many minutes.
AIM = 0.85
# A batch within so much of the aim is as large as need be.
NEAR = 0.05
# No guess is larger than so many times what was tried: too far from what was seen.
REACH = 16
TRIES = 4


def largest(
    needed: Callable[[int], float | None], first: int, at_first: float | None, limit: float
) -> int:
    """Finds the largest batch that fits, by a line through what two take, and by trying it.

    Args:
      needed: compiles the program for a batch and returns what it takes; None if it cannot be
        compiled for lack of memory, and that is all that is known.
      first: a batch that was tried.
      at_first: what it takes.
      limit: what there is, in the same unit.

    Returns:
      the largest batch tried that takes no more than there is, or 0.
    """
    tried = {first: at_first}

    def fits(batch: int) -> bool:
        amount = tried[batch]
        return amount is not None and amount <= limit

    for _ in range(TRIES):
        best = max(filter(fits, tried), default=0)
        guess = propose(tried, limit)
        guess = min(guess, REACH * max(tried), *(b - 1 for b in tried if not fits(b)))
        near = best and (tried[best] or 0) >= (AIM - NEAR) * limit
        if near or guess <= best:
            break
        tried[guess] = needed(guess)
    return max(filter(fits, tried), default=0)


def propose(tried: dict[int, float | None], limit: float) -> int:
    """Returns the batch that would take AIM of what there is.

    With one batch tried it is a second one, to draw a line through: twice it, if half of what
    there is holds it, else as much less as it is too large.
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
    return math.floor(large + (AIM * limit - more) / slope)
