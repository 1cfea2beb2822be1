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
