"""Kinds of text in a spec or profile that Kubernetes would refuse much later: quantities, cron lines, names.

Each check returns the text as it is, or raises ValueError with the sentence for the user.
"""

import re

_QUANTITY = re.compile(r"(\d+(?:\.\d*)?|\.\d+)(n|u|m|k|Ki|[MGTPE]i?|e[+-]?\d{1,2}|E[+-]?\d{1,2}|)")
_SMALL = ("n", "u", "m")

_NAME = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*")
MAX_NAME = 253
MAX_LABEL = 63

_CRON_FIELDS = (
    ("minute", 0, 59, ()),
    ("hour", 0, 23, ()),
    ("day of the month", 1, 31, ()),
    ("month", 1, 12, ("jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec")),
    ("day of the week", 0, 6, ("sun", "mon", "tue", "wed", "thu", "fri", "sat")),
)
_CRON_WORDS = ("@yearly", "@annually", "@monthly", "@weekly", "@daily", "@midnight", "@hourly")
_CRON_EVERY = re.compile(r"@every (\d+(\.\d+)?[hms])+")
_ZONE = re.compile(r"[A-Za-z][A-Za-z0-9_+-]*(/[A-Za-z0-9_+-]+)*")


def require_quantity(text: str) -> str:
    """A Kubernetes quantity above zero, for instance ``500m`` or ``8``."""
    match = _QUANTITY.fullmatch(text)
    if match is None:
        hint = f"; did you mean {_with_unit(text)}?" if re.fullmatch(r"[\d.]+ ?[kKMGT]i?[bB]", text) else ""
        raise ValueError(f'expected a Kubernetes quantity such as 500m, 8 or 64Gi, not "{text}"{hint}')
    if not float(match[1]):
        raise ValueError(f'"{text}" is nothing; give an amount above zero, or remove the key')
    return text


def require_bytes(text: str) -> str:
    """A Kubernetes quantity that counts bytes, for instance ``64Gi``."""
    match = _QUANTITY.fullmatch(require_quantity(text))
    if match and match[2] in _SMALL:
        raise ValueError(f'"{text}" is a fraction of a byte; write Mi or Gi behind the number')
    if match and not match[2] and float(match[1]) < 1 << 20:
        raise ValueError(f'"{text}" is a number of bytes, less than 1 MiB; write Mi or Gi behind the number')
    return text


def _with_unit(text: str) -> str:
    """``64GB`` as a quantity: ``64Gi``."""
    number, unit = re.fullmatch(r"([\d.]+) ?([kKMGT])i?[bB]", text).groups()  # type: ignore[union-attr]
    return f"{number}{unit.upper()}i"


def require_name(text: str) -> str:
    """A name that a Kubernetes object can have."""
    if len(text) > MAX_NAME or not _NAME.fullmatch(text):
        raise ValueError(
            f'"{text}" is no name of a Kubernetes object: lower-case letters, digits, dashes and dots, a letter or '
            f"digit at both ends, at most {MAX_NAME} characters"
        )
    return text


def require_label_name(text: str) -> str:
    """A name that is also the value of a label, or a namespace: shorter, and without dots."""
    if len(text) > MAX_LABEL or "." in text or not _NAME.fullmatch(text):
        raise ValueError(
            f'"{text}" is no such name: lower-case letters, digits and dashes, a letter or digit at both ends, at most '
            f"{MAX_LABEL} characters"
        )
    return text


def require_cron(text: str) -> str:
    """A cron line as a Kubernetes CronJob reads it: five fields, or a word such as ``@daily``."""
    if text in _CRON_WORDS or _CRON_EVERY.fullmatch(text):
        return text
    if text.startswith(("TZ=", "CRON_TZ=")):
        raise ValueError("the time zone has a key of its own: time_zone; remove it from the line")
    fields = text.split()
    if len(fields) != len(_CRON_FIELDS):
        names = ", ".join(name for name, *_ in _CRON_FIELDS)
        raise ValueError(f'"{text}" has {len(fields)} fields, not five ({names}); "0 3 * * 1" is Mondays at 3:00')
    for field, (name, low, high, words) in zip(fields, _CRON_FIELDS, strict=True):
        for item in field.split(","):
            if not _is_cron_item(item.lower(), low, high, words):
                raise ValueError(f'"{item}" is no {name}: {low} to {high}, *, a range 1-5 or a step */15')
    return text


def _is_cron_item(item: str, low: int, high: int, words: tuple[str, ...]) -> bool:
    span, slash, step = item.partition("/")
    if slash and not (step.isdecimal() and 0 < int(step) <= high):
        return False
    if span in ("*", "?"):
        return True
    ends = [str(words.index(end) + low) if end in words else end for end in span.split("-")]
    if len(ends) > 2 or not all(end.isdecimal() and low <= int(end) <= high for end in ends):
        return False
    return int(ends[0]) <= int(ends[-1])


def require_zone(text: str) -> str:
    """The name of a time zone; whether there is one of the name, only the cluster knows."""
    if text == "Local" or not _ZONE.fullmatch(text):
        raise ValueError(f'"{text}" is no name of a time zone; write it like Asia/Tokyo or Etc/UTC')
    return text
