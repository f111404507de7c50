"""Which libraries a process of a run has no use for, so that it does not import them; the others come in quicker.

transformers and PEFT import whatever is installed. torch takes a process that only tokenises several seconds and most
of its memory; bitsandbytes brings torch's compiler along.
"""

import gc
import os
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from job.spec import JobSpec

UNUSED = "TUNEJOB_UNUSED_LIBRARIES"
"""Environment variable: names of modules, with blanks between them, that a process is not to import."""


def import_sparingly() -> None:
    """Has Python, and whoever asks it, believe that what ``UNUSED`` names is not installed; without it nothing is done.

    Nor is garbage collected until ``job.child.setup_child``: of the million objects that the libraries make none goes,
    and looking through them again and again takes a seventh of the time.
    """
    if UNUSED not in os.environ:
        return
    gc.disable()
    for name in os.environ[UNUSED].split():
        # So Python's import system has it: "if its value is None, then a ModuleNotFoundError is raised".
        sys.modules[name] = None  # type: ignore[assignment]


def unused_to_prepare(spec: "JobSpec") -> tuple[str, ...]:
    """What ``job.data.prepare`` has no use for."""
    return () if asks_much_of_the_model(spec) else ("torch",)


def unused_to_train(spec: "JobSpec") -> tuple[str, ...]:
    """What the worker and ``job.evaluation.verify`` have no use for."""
    needs_8_bits = spec.quantized is not None or spec.training.optimizer == "paged_adamw_8bit"
    return () if needs_8_bits else ("bitsandbytes",)


def asks_much_of_the_model(spec: "JobSpec") -> bool:
    """Whether some models cannot do what is asked, so that one has to be built, without weights, to see it.

    Any can be adapted in all its linear layers.
    """
    lora = spec.lora
    names = lora.target_modules != "all-linear" or lora.modules_to_save or lora.new_tokens
    return bool(
        names
        or lora.rank_pattern
        or lora.alpha_pattern
        or lora.begins_with_parts
        or spec.quantized is not None
        or spec.output.serve_with != "peft"
    )
