"""Notes go to stderr, plainly, and stdout stays clean."""

from __future__ import annotations

import pytest

from tubelet.core import log


@pytest.fixture(autouse=True)
def _fresh_console():
    log.console.cache_clear()
    yield
    log.console.cache_clear()


def test_notes_and_warnings_go_to_stderr_word_for_word(capsys: pytest.CaptureFixture[str]) -> None:
    long = "a [red] ball " * 30
    log.note(long)
    log.warn("the prompt is [long]")
    with log.progress("denoise [x]") as advance:
        advance(1, 2)
        advance(2, 2)
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == [long, "warning: the prompt is [long]"]


def test_the_bar_shows_on_a_terminal_and_survives_an_error(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    assert log.console().is_terminal

    def interrupted() -> None:
        with log.progress("denoise [x]", unit="steps") as advance:
            advance(1, 16)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    out, err = capsys.readouterr()
    assert out == ""
    assert "denoise [x]" in err
    assert "1/16" in err
