"""A model's config.json, as transformers reads it. No torch."""

from pathlib import Path
from typing import Any

from job.errors import SpecInvalid


def known_config(folder: Path, name: str) -> Any:
    """The model's config, as transformers has it. Raises SpecInvalid where it can make no model of it."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # what a config's own checks raise is theirs to choose
        raise not_to_be_built(name, error) from error


def not_to_be_built(name: str, error: Exception) -> SpecInvalid:
    """What to say of a config.json that describes no model that transformers can build."""
    words = " ".join(str(error).split())[:200] or type(error).__name__
    return SpecInvalid(f"model {name}: transformers cannot build what config.json describes ({words})")
