"""Which key of the store holds what. Keys are relative to the run's prefix and never joined by hand elsewhere."""

import hashlib
import re
from collections.abc import Iterable

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_SAFETENSORS = "adapter_model.safetensors"
ADAPTER_BIN = "adapter_model.bin"
MODEL_CARD = "README.md"
QUANTIZATION_CONFIG = "quantization_config.json"
TRAINING_CONFIG = "training_config.yaml"
TRAINING_LOG = "training_log.txt"
METRICS = "metrics.jsonl"
EVAL_RESULTS = "eval_results.json"

CHECKPOINTS = "checkpoints/"
COMMIT = "COMMIT.json"
"""Last object of a checkpoint: lists every other one with size and SHA-256. Without it there is no checkpoint."""

OWNER = "run/owner.json"
STATUS = "run/status.json"
ATTEMPTS = "run/attempts/"
INPUTS = "run/inputs.json"
CHECKPOINT_STATE = "training_state.json"
"""What a checkpoint knows besides tensors; see ``job.training.checkpoint.State``."""

SO_FAR = "run/generation-"
"""Log and metrics of a run that is not published yet, by owner generation: an owner that lost the run without knowing
must not write over what its successor published."""

PREPARED = "run/prepared/"
"""Tokenised rows for a pod that replaces another; gone once the run is published."""

MANIFEST = "run/manifest.json"
"""Written last: no manifest, no result."""

_CHECKPOINT = re.compile(r"checkpoint-(?P<step>\d+)(?:\.g(?P<generation>\d+))?")


def checkpoint_name(step: int, generation: int = 1) -> str:
    """Folder of a checkpoint. From the second owner generation on it carries the generation.

    So a pod that was cut off and wakes up again cannot overwrite what its successor committed.
    """
    return f"checkpoint-{step}" if generation == 1 else f"checkpoint-{step}.g{generation}"


def checkpoint_prefix(step: int, generation: int = 1) -> str:
    """Prefix, ending in '/', of everything that belongs to one checkpoint."""
    return f"{CHECKPOINTS}{checkpoint_name(step, generation)}/"


def prepared_prefix(key: str) -> str:
    """Prefix, ending in '/', of one key's prepared rows (``prepared_cache``); their ``COMMIT`` comes last."""
    return f"{PREPARED}{key}/"


def parse_checkpoint(name: str) -> tuple[int, int] | None:
    """Step and owner generation of a checkpoint folder's name; None for any other name."""
    match = _CHECKPOINT.fullmatch(name)
    if match is None:
        return None
    return int(match["step"]), int(match["generation"] or 1)


def so_far(name: str, generation: int) -> str:
    """Where an owner keeps ``TRAINING_LOG`` or ``METRICS`` until the run is published."""
    return f"{SO_FAR}{generation:06d}/{name}"


def newest_so_far(keys: Iterable[str], name: str) -> str | None:
    """Of a listing below ``SO_FAR`` the newest owner's log or metrics; None if nobody left any."""
    return max((key for key in keys if key.endswith(f"/{name}")), default=None)


def attempt_number(key: str) -> int:
    """The number of the attempt whose record a key of the ledger holds; 0 for any other key."""
    name = key.removeprefix(ATTEMPTS).removesuffix(".json")
    return int(name) if name.isdecimal() else 0


def attempt_key(number: int) -> str:
    """Where the ledger keeps the record of one attempt (numbered from 1)."""
    return f"{ATTEMPTS}{number:06d}.json"


def fire_id(run: str, kube_job: str) -> str:
    """Id of the run that one Job of a CronJob is: that of the spec, and 8 hex digits of the Job's name.

    The Job's name is what the pod and the launcher both see; the scheduled time stands on the Job only.
    """
    return f"{run}-{hashlib.sha256(kube_job.encode()).hexdigest()[:8]}"
