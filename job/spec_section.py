"""What a spec and other files of YAML sections are made of: blocks that are closed and frozen, and how one is read."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict

from job.spec_draft import Draft, checked, content
from job.spec_problems import Words as Words
from job.spec_reference import markdown
from job.spec_values import require_bytes, require_label_name, require_name, require_quantity


class Section(BaseModel):
    """One block of the spec: unknown keys refused, values never change after reading."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        use_attribute_docstrings=True,
        populate_by_name=True,
        allow_inf_nan=False,
    )


S = TypeVar("S", bound=Section)


# Types only and no patterns: what they refuse is said in the user's words, not in pydantic's.
Quantity = Annotated[str, AfterValidator(require_quantity)]
"""A Kubernetes quantity."""
Bytes = Annotated[str, AfterValidator(require_bytes)]
"""A Kubernetes quantity that counts bytes."""
ObjectName = Annotated[str, AfterValidator(require_name)]
"""Name of a Kubernetes object."""
LabelName = Annotated[str, AfterValidator(require_label_name)]
"""Name of a Kubernetes object that is also the value of a label."""


def read_section(root: type[S], path: Path, words: Words, hint: str, overrides: Sequence[str] = ()) -> S:
    """Another kind of file, held to the same rules as a spec: closed, every problem at once, no secrets.

    Args:
        words: what is said of keys that people try.
        hint: what to try where there is no such file.

    Raises:
        SpecInvalid: the file cannot be read, or every problem in it.
    """
    written = content(path, root.__name__.lower(), hint)
    return checked(root, Draft.parsed(written, str(path), overrides, lambda _, value: value), words)


def reference_of(root: type[Section], head: str) -> str:
    """The manual page of another kind of file; ``head`` stands above its tables."""
    return markdown(root, head)
