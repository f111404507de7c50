"""Finished runs as folders, for tests of what reads them."""

import copy
import json
from pathlib import Path
from typing import Any

from job import layout

RECORD: dict[str, Any] = {
    "run": "support-1a2b3c4d",
    "method": "lora",
    "model": "org/base",
    "evaluation": {
        "rows": 128,
        "tokens": 1280,
        "base": {"loss": 3.25, "perplexity": 25.79, "token_accuracy": 0.4, "exact_match": 0.0},
        "tuned": {"loss": 0.125, "perplexity": 1.133, "token_accuracy": 0.975, "exact_match": 0.9375},
    },
    "data": {"eval": {"kept": 128, "also_in_train": 0}},
    "verification": {"level": "logits", "max_abs_difference": 2e-6, "mean_kl": 0.0},
    "performance": {
        "phases": {"prepare": 1.25, "train": 64.0},
        "seconds": 95.0,
        "tokens": 20_000,
        "train_seconds": 64.0,
        "tokens_per_second": 312.5,
        "peak_memory_bytes": {"load": 900 << 20, "train": 1500 << 20},
        "device": "cpu",
    },
}


def record(**changes: Any) -> dict[str, Any]:
    """The record above with dotted paths (``__`` between the parts) changed; None removes one."""
    result = copy.deepcopy(RECORD)
    for path, value in changes.items():
        *sections, key = path.split("__")
        place = result
        for section in sections:
            place = place[section]
        if value is None:
            del place[key]
        else:
            place[key] = value
    return result


def run_folder(folder: Path, results: dict[str, Any], finished: bool = True) -> Path:
    """A folder that holds a run."""
    for name, content in {layout.OWNER: {}, layout.EVAL_RESULTS: results, layout.MANIFEST: {}}.items():
        if finished or name != layout.MANIFEST:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(json.dumps(content), encoding="utf-8")
    return folder
