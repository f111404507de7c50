"""The manual page of the spec, made from the models: what is written there once is not written again."""

from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from job.spec_problems import describe, fields_of, held_by, section_of, shown

_HEAD = """# The spec

Made from `job/spec.py` by `python -m job.spec > docs/spec.md`; change it there. A key that is not on this page is
refused. Any key can be given on the command line too: `--set training.learning_rate=1e-4`; items of a list by their
number from 0: `--set data.train.0.weight=2`. Values are read by the core schema of YAML 1.2: `2e-4` is a number, `on`
is text.
"""


def markdown(root: type[BaseModel], head: str = _HEAD) -> str:
    """Path, type, default and meaning of every key, a table to each block; ``head`` stands above them."""
    return "\n".join([head, *_blocks(root, "")])


def _blocks(section: type[BaseModel], path: str) -> Iterator[str]:
    """This block and those below it, in the order in which they are declared."""
    yield f"## {f'`{path}`' if path else 'Top level'}\n\n{_one_line(section.__doc__)}\n"
    yield "| key | value | default | meaning |\n|---|---|---|---|"
    fields = fields_of(section)
    yield from (_row(f"{path}.{key}" if path else key, info) for key, info in fields.items())
    yield ""
    for key, info in fields.items():
        here = f"{path}.{key}" if path else key
        if below := section_of(info.annotation):
            yield from _blocks(below, here)
        elif held := held_by(info.annotation):
            yield from _blocks(held[1], f"{here}.{held[0]}")


def _row(path: str, info: FieldInfo) -> str:
    cells = (f"`{path}`", describe(info.annotation, info.metadata), _default(info), _one_line(info.description))
    return f"| {' | '.join(cell.replace('|', '&#124;') for cell in cells)} |"


def _default(info: FieldInfo) -> str:
    if info.is_required():
        return "required"
    default: Any = info.get_default(call_default_factory=True)
    return "below" if isinstance(default, BaseModel) else "`" + shown(default).strip('"') + "`"


def _one_line(text: str | None) -> str:
    return " ".join((text or "").split()).replace("``", "`")
