import io
import sys

import pytest

from drl_jax.runtime import progress
from drl_jax.runtime.progress import Progress


@pytest.mark.parametrize(
    ("interval", "expected"),
    [(0, ["40 of 100 images", "80 of 100 images", "100 of 100 images"]), (1000, [])],
)
def test_a_log_gets_a_line_per_interval(interval, expected, monkeypatch, caplog):
    monkeypatch.setattr(progress, "LOG_INTERVAL", interval)
    with caplog.at_level("INFO", logger="drl_jax"), Progress(100, "image") as images:
        for n in (40, 40, 20):
            images.add(n)
    assert caplog.messages == expected


def test_a_terminal_gets_a_bar_and_no_lines(monkeypatch, caplog):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr(progress, "LOG_INTERVAL", 0)
    monkeypatch.setattr(sys, "stderr", Terminal())
    with caplog.at_level("INFO", logger="drl_jax"), Progress(100, "image") as images:
        images.add(40)
    assert "40/100" in sys.stderr.getvalue()
    assert caplog.messages == []


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0.4, "00:00:00"),
        (59.6, "00:01:00"),
        (86_399, "23:59:59"),
        (86_400 + 3723, "1 d 01:02:03"),
        (100 * 86_400, "100 d 00:00:00"),
    ],
)
def test_durations_of_more_than_a_day_have_days(seconds, words):
    """Fails if hours are counted modulo 24."""
    assert progress.duration(seconds) == words
