"""The troubleshooting page has every error message of the package, and no other."""

from __future__ import annotations

from .messages import documented_messages, error_messages
from .pages import PAGES

PAGE = PAGES["docs/troubleshooting.md"]


def test_every_error_message_has_its_mend() -> None:
    raised, documented = error_messages(), documented_messages(PAGE)
    assert len(raised) > 50
    missing = {message: place for message, place in raised.items() if message not in documented}
    lines = "\n".join(f"- `{message}`: (the mend)   <- {place}" for message, place in missing.items())
    assert not missing, f"add to docs/troubleshooting.md:\n{lines}"


def test_no_message_is_there_that_is_not_raised_any_more() -> None:
    gone = documented_messages(PAGE) - set(error_messages())
    assert not gone, f"take out of docs/troubleshooting.md, or correct: {sorted(gone)}"
