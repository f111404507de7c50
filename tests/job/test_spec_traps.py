"""Keys that are written wrong (T31): refused by path at any depth, before anything is looked at or brought."""

import copy
from collections.abc import Iterator
from typing import Any, get_args

import pytest
from pydantic import BaseModel

from job.errors import SpecInvalid
from job.spec import JobSpec, from_mapping, parse

SMALLEST: dict[str, Any] = {
    "name": "a",
    "model": {"from": "nowhere/at-all"},
    "data": {"train": [{"from": "absent.jsonl"}]},
}


def section_of(annotation: Any) -> type[BaseModel] | None:
    """The section that a field's type holds, however it is wrapped; None for plain values."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for part in get_args(annotation) if (found := section_of(part)) is not None), None)


def keys(section: type[BaseModel], path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], str]]:
    """Every key of the spec, with the sections above it."""
    for name, field in section.model_fields.items():
        yield path, field.alias or name
        inner = section_of(field.annotation)
        if inner is not None:
            yield from keys(inner, (*path, field.alias or name))


def with_key(path: tuple[str, ...], key: str) -> dict[str, Any]:
    """The smallest spec with one key more."""
    spec = copy.deepcopy(SMALLEST) | ({"method": "qlora"} if "quantization" in path else {})
    place = spec
    for name in path:
        place = place.setdefault(name, {})
        place = place[0] if isinstance(place, list) else place
    place[key] = 1
    return spec


def test_a_mistyped_key_at_any_depth_is_refused_by_its_path_with_the_right_one() -> None:  # T31
    every = list(keys(JobSpec))
    assert len(every) > 90
    assert max(len(path) for path, _ in every) == 2
    for path, key in every:
        typo = key[:-1] if len(key) > 3 else f"{key}{key[-1]}"
        with pytest.raises(SpecInvalid) as caught:
            from_mapping(with_key(path, typo), "run.yaml")
        message = str(caught.value)
        place = [*path, typo] if path != ("data", "train") else ["data", "train", "0", typo]
        assert f"{'.'.join(place)}: unknown key" in message, message
        assert "did you mean" in message or key == "r", message


@pytest.mark.parametrize("written", ["1e-4", "1.0e-4", "0.0001", "1E-4", ".1e-3"])
def test_a_number_with_an_exponent_is_a_number_in_every_spelling(written: str) -> None:  # T31
    text = f"name: a\nmodel: org/m\ndata: {{train: t.jsonl}}\ntraining: {{learning_rate: {written}}}\n"
    assert parse(text, "run.yaml").training.learning_rate == 1e-4
