"""What reaches a person: results on stdout, talk on stderr, both fit for any terminal.

A log is written by others. What steers a terminal (colours, its title, the cursor) is shown, not obeyed; and what a
terminal's encoding lacks is shown in another spelling, never a failure. A pipe gets every character as it is.
"""

import re
import shlex
import sys
from contextvars import ContextVar
from typing import TextIO

_PROFILE: ContextVar[str] = ContextVar("profile", default="")
_STEERING = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
_COMMAND = re.compile(r"\btunejob (?:cancel|delete|doctor|list|logs|results|retry|status|submit|wait|why)\b")


def calling_with(profile: str | None) -> None:
    """The profile that the user named: the commands that are named to him name it too."""
    _PROFILE.set(profile or "")


def named(text: str) -> str:
    """A text whose commands ask the same cluster as the one that the user gave."""
    profile = _PROFILE.get()
    return _COMMAND.sub(lambda found: f"{found[0]} -p {shlex.quote(profile)}", text) if profile else text


def say(line: str) -> None:
    """Talk goes to stderr: what a command gives can be piped."""
    print(fit(named(line), sys.stderr), file=sys.stderr, flush=True)


def show(text: str) -> None:
    """A result, or a line of one."""
    print(fit(text, sys.stdout), flush=True)


def fit(text: str, stream: TextIO) -> str:
    """A text as a stream can have it."""
    if stream.isatty():
        text = _STEERING.sub(lambda found: found[0].encode("unicode_escape").decode(), text)
    encoding = stream.encoding or "utf-8"
    return text.encode(encoding, errors="backslashreplace").decode(encoding)
