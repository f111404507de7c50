"""A config.json that describes no model is refused by name, whatever transformers raises at it."""

import json
from pathlib import Path
from typing import Any

import pytest

from job.errors import SpecInvalid
from job.modelconfig import known_config
from job.training.model import empty

WRONG: dict[str, tuple[str, Any]] = {
    "a model nobody knows": ("model_type", "frobnicate"),
    "several models": ("model_type", ["llama"]),
    "a size in letters": ("hidden_size", "sixty-four"),
    "no vocabulary": ("vocab_size", None),
    "no heads": ("num_attention_heads", 0),
    "a list for a rope": ("rope_parameters", [5]),
    "layers of no kind": ("layer_types", ["x"]),
}
LATER: dict[str, tuple[str, Any]] = {
    "a size below nothing": ("hidden_size", -4),
    "an activation nobody knows": ("hidden_act", "frobnicate"),
}
"""What transformers finds only when it builds the model."""


def folder_of(tiny_llama: Path, folder: Path, change: tuple[str, Any]) -> Path:
    config = json.loads((tiny_llama / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps(config | dict([change])), encoding="utf-8")
    return folder


@pytest.mark.parametrize("case", WRONG)
def test_a_config_that_makes_no_sense_is_refused_by_name(case: str, tiny_llama: Path, tmp_path: Path) -> None:
    with pytest.raises(SpecInvalid, match=r"model mine: transformers cannot build what config\.json describes \(.+\)"):
        known_config(folder_of(tiny_llama, tmp_path, WRONG[case]), "mine")


@pytest.mark.parametrize("case", WRONG | LATER)
def test_a_model_that_cannot_be_built_is_refused_by_name(case: str, tiny_llama: Path, tmp_path: Path) -> None:
    with pytest.raises(SpecInvalid, match=r"model mine: transformers cannot build what config\.json describes \(.+\)"):
        empty(folder_of(tiny_llama, tmp_path, (WRONG | LATER)[case]), "mine")
