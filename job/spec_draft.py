"""A spec before it is checked: what was read, what the command line lays over it, and where each part came from."""

import copy
import pathlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from job.errors import SpecInvalid
from job.spec_problems import Problem, Words, explain, text_problems
from job.strict_yaml import MAX_BYTES, MAX_PROBLEMS, Path, parse_document, parse_scalar, path_text, refusal

M = TypeVar("M", bound=BaseModel)

OVERRIDE = "--set"

Expand = Callable[[Path, Any], Any]
"""Turns the value at a path from its short form into its long one."""


@dataclass
class Draft:
    """Values that may still change, each with the place a message names for it."""

    value: dict[str, Any]
    places: dict[Path, str]
    """``run.yaml:12`` or ``--set``; in the order of the file. A path that is not there counts as its parent."""
    problems: list[str] = field(default_factory=list)
    """What was wrong with the text itself, and overrides that could not be laid over it."""
    is_reported: Callable[[Path], bool] = lambda path: False
    """Whether the value at a path is known to be wrong already."""

    @classmethod
    def of(cls, value: Mapping[str, Any], source: str, lines: Mapping[Path, int]) -> "Draft":
        """A draft of its own: nothing done to it reaches ``value``."""
        places = {path: f"{source}:{line}" for path, line in lines.items()}
        return cls(copy.deepcopy(dict(value)), {(): source, **places})

    @classmethod
    def parsed(cls, text: str | bytes, source: str, overrides: Sequence[str], expand: Expand) -> "Draft":
        """A YAML text with overrides laid over it; raises SpecInvalid where the text cannot be read at all."""
        document = parse_document(text, source, tolerant=True)
        draft = cls.of(document.value, source, document.lines)
        draft.problems, draft.is_reported = list(document.problems), document.is_reported
        for override in overrides:
            draft.override(override, expand)
        return draft

    def override(self, text: str, expand: Expand) -> None:
        """Lays ``KEY=VALUE`` over it, for instance ``data.train.0.weight=2``; what cannot be is noted down."""
        key, equals, value_text = text.partition("=")
        key = key.strip()
        if not equals or not all(key.split(".")):
            self._note(f"{text}: expected KEY=VALUE, for instance training.learning_rate=1e-4")
            return
        try:
            value = parse_scalar(value_text, f"{OVERRIDE} {key}")
        except SpecInvalid as error:
            self.problems.append(str(error))
            return
        self._put(key.split("."), value, expand)

    def refusal(self, problems: Sequence[Problem], untold: int = 0) -> SpecInvalid:
        """One error for these problems, in the order of the file, and those of the overrides."""
        order = {path: index for index, path in enumerate(self.places)}
        ordered = sorted(problems, key=lambda problem: order[self._known(problem[0])])
        lines = [f"{self.places[self._known(path)]}: {path_text(path)}: {what}" for path, what in ordered]
        return refusal([*lines, *self.problems], untold)

    def _known(self, path: Path) -> Path:
        while path not in self.places:
            path = path[:-1]
        return path

    def _note(self, what: str) -> None:
        self.problems.append(f"{OVERRIDE}: {what}")

    def _put(self, keys: Sequence[str], value: Any, expand: Expand) -> None:
        holder: Any = self.value
        path: Path = ()
        for position, key in enumerate(keys):
            step: Any = int(key) if isinstance(holder, list) and key.isdecimal() else key
            if isinstance(holder, list) and not (isinstance(step, int) and step < len(holder)):
                self._note(f"{'.'.join(keys)}: {path_text(path)} is a list of {len(holder)}; write its number from 0")
                return
            if not isinstance(holder, list | dict):
                self._note(
                    f"{'.'.join(keys)}: {path_text(path)} holds a value and no keys; set {path_text(path)} itself"
                )
                return
            path = (*path, step)
            if position == len(keys) - 1:
                holder[step] = value
                self._mark(path)
            elif isinstance(holder, dict) and holder.get(key) is None:
                holder[step] = {}
                self._mark(path)
            else:
                holder[step] = expand(path, holder[step])
            holder = holder[step]

    def _mark(self, path: Path) -> None:
        """Everything from here down now comes from the command line."""
        self.places = {known: place for known, place in self.places.items() if known[: len(path)] != path}
        self.places[path] = OVERRIDE


def content(path: pathlib.Path, what: str, hint: str) -> bytes:
    """What is in a file, as far as it can be a spec or a profile.

    Args:
        what: which of them it should be.
        hint: what to try where there is no such file.

    Raises:
        SpecInvalid: there is none, or it cannot be read.
    """
    try:
        with path.open("rb") as stream:
            return stream.read(MAX_BYTES + 1)
    except FileNotFoundError:
        raise SpecInvalid(f"{path}: no such file; {hint}") from None
    except IsADirectoryError:
        raise SpecInvalid(f"{path}: a directory; name the {what} file inside it") from None
    except PermissionError:
        raise SpecInvalid(f"{path}: may not be read by this user; check its permissions") from None
    except (OSError, ValueError) as error:
        raise SpecInvalid(f"{path}: cannot be read ({error}); name another file") from None


def checked(root: type[M], draft: Draft, words: Words) -> M:
    """What a draft describes. Raises SpecInvalid with every problem at once, in the order of the file."""
    problems: dict[Path, str] = dict(text_problems(draft.value, words=words))
    try:
        made = root.model_validate(draft.value, by_alias=True, by_name=False)
    except ValidationError as error:
        errors = error.errors(include_url=False)
        told = explain(errors[:MAX_PROBLEMS], root, draft.value, words)
        problems = {**dict(told), **problems}
        problems = {path: what for path, what in problems.items() if not draft.is_reported(path)}
        raise draft.refusal(list(problems.items()), max(0, len(errors) - MAX_PROBLEMS)) from None
    if problems or draft.problems:
        raise draft.refusal(list(problems.items()))
    return made
