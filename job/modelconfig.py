"""A model's config.json, as transformers reads it. No torch."""

from pathlib import Path
from typing import Any

from job.errors import SpecInvalid


def known_config(folder: Path, name: str) -> Any:
    """The model's config, as transformers has it. Raises SpecInvalid where it knows no such model."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True)
    except (ValueError, KeyError) as error:
        words = " ".join(str(error).split())[:200]
        raise SpecInvalid(f"model {name}: transformers does not know what config.json describes ({words})") from error
