"""A fresh process loads the sealed adapter with stock PEFT: what was trained is what others will load.

``python -m job.evaluation.verify WORKDIR``. Names, shapes and finiteness always; the logits on the worker's probe
when the base fits into memory, else the result says "structural".
"""

import logging
import sys
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as functional
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from peft.utils import load_peft_weights
from peft.utils.other import get_pattern_key
from safetensors.torch import load_file
from torch import Tensor, nn

from job.child import setup_child
from job.data.prepared import INFO
from job.errors import IntegrityFailure
from job.exits import ExitCode
from job.files import read_json, write_json
from job.inputs import read_inputs
from job.layout import ADAPTER_BIN, ADAPTER_CONFIG, ADAPTER_SAFETENSORS
from job.outcome import record
from job.spec import JobSpec, read
from job.training.adapter import train_in_float32
from job.training.device import Placement, place
from job.training.failures import as_torch_failure
from job.training.memory import available_bytes
from job.training.model import load_base
from job.training.new_tokens import Tokens, make_room
from job.training.sharded import verifying_place
from job.workdir import WorkDir

log = logging.getLogger(__name__)

MAX_ABS_DIFFERENCE = 1e-4
"""Largest difference of a logit, float32."""
MAX_MEAN_KL = 1e-3
"""Largest mean Kullback-Leibler divergence (nats) of the predictions, 16 bit and 4 bit."""


def run(workdir: WorkDir) -> ExitCode:
    """Verifies the sealed adapter and leaves what it found.

    Raises:
        IntegrityFailure: the adapter is not what the worker trained.
    """
    spec = read(workdir.spec)
    found = check_structure(workdir.adapter, spec)
    model_folder = read_inputs(workdir.inputs).model.path
    needed, available = _weights_bytes(model_folder), available_bytes()
    if available is not None and needed * 1.5 > available:
        reason = f"the base needs about {needed * 1.5 / 2**30:.1f} GiB, {available / 2**30:.1f} GiB are free"
        log.warning("verification is structural only: %s", reason)
        write_json(workdir.verification, {"level": "structural", "reason": reason, "tensors": len(found)})
        return ExitCode.OK
    placement = verifying_place(spec, place(spec))
    base = load_base(model_folder, spec, placement)
    if (tokens := Tokens.of(spec, read_json(workdir.prepared / INFO))) is not None:
        make_room(base, tokens.vocabulary)
    model = loaded(base, workdir.adapter, found)
    figures = compare_logits(model, load_file(workdir.probe), placement, is_exact=_is_exact(spec, placement))
    write_json(workdir.verification, {"level": "logits", "tensors": len(found)} | figures)
    return ExitCode.OK


def _is_exact(spec: JobSpec, placement: Placement) -> bool:
    return spec.method == "lora" and placement.precision == torch.float32


def _weights_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir() if path.suffix in (".safetensors", ".bin"))


def check_structure(folder: Path, spec: JobSpec) -> dict[str, Tensor]:
    """The adapter's tensors, seen to be complete, of the spec's rank, and finite; the same in every file format.

    Raises:
        IntegrityFailure: a tensor is empty, not finite, of another rank or without its partner.
    """
    config = read_json(folder / ADAPTER_CONFIG)
    times = spec.lora.times_published
    ranks = {name: times * rank for name, rank in spec.lora.rank_pattern.items()}
    found = config["r"], config.get("rank_pattern") or {}, config["base_model_name_or_path"]
    if found != (times * spec.lora.r, ranks, spec.model.name):
        raise IntegrityFailure(f"{ADAPTER_CONFIG}: rank or base model are not the spec's")
    weights: dict[str, Tensor] = load_peft_weights(str(folder), device="cpu")
    if not any("lora_" in name for name in weights):
        raise IntegrityFailure("the sealed adapter holds no LoRA tensors")
    for name, tensor in weights.items():
        layer = name.split(".lora_", 1)[0].removeprefix("base_model.model.")  # a pattern may begin with ^
        _check_tensor(name, tensor, weights, ranks.get(get_pattern_key(list(ranks), layer), times * spec.lora.r))
    if (folder / ADAPTER_SAFETENSORS).exists() and (folder / ADAPTER_BIN).exists():
        _check_same(weights, torch.load(folder / ADAPTER_BIN, weights_only=True))
    return weights


def _check_tensor(name: str, tensor: Tensor, weights: dict[str, Tensor], rank: int) -> None:
    if tensor.numel() == 0 or not bool(torch.isfinite(tensor).all()):
        raise IntegrityFailure(f"the sealed adapter's {name} is empty or not finite")
    if "lora_A" in name:
        partner = weights.get(name.replace("lora_A", "lora_B"))
        if partner is None or tensor.shape[0] != rank or partner.shape[1] != rank:
            raise IntegrityFailure(f"the sealed adapter's {name} has no partner of rank {rank}")


def _check_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    if one.keys() != other.keys() or any(not torch.equal(one[name], other[name]) for name in one):
        raise IntegrityFailure(f"{ADAPTER_SAFETENSORS} and {ADAPTER_BIN} hold different tensors")


def loaded(base: nn.Module, folder: Path, weights: dict[str, Tensor]) -> PeftModel:
    """The sealed adapter on its base, loaded by stock PEFT and read back.

    Stock PEFT rounds saved modules and biases to the base's type. Seen to be right up to that, they get the values
    that were trained, so that logits can be compared to the last bit.

    Raises:
        IntegrityFailure: stock PEFT loads something else than the adapter holds.
    """
    model = PeftModel.from_pretrained(base, str(folder), is_trainable=True)
    check_loaded(model, weights)
    train_in_float32(model)
    set_peft_model_state_dict(model, weights)
    return model


def check_loaded(model: PeftModel, weights: dict[str, Tensor]) -> None:
    """PEFT only warns of tensors that found no place, so the loaded model is read back."""
    loaded = get_peft_model_state_dict(model, save_embedding_layers=False)
    if loaded.keys() != weights.keys():
        odd = sorted(loaded.keys() ^ weights.keys())
        raise IntegrityFailure(f"stock PEFT loads other tensors than the adapter holds, first {odd[0]}")
    wrong = [
        name for name, tensor in weights.items() if not torch.equal(loaded[name].cpu(), tensor.to(loaded[name].dtype))
    ]
    if wrong:
        raise IntegrityFailure(f"stock PEFT loads other values than the adapter holds, first {wrong[0]}")


@torch.no_grad()
def compare_logits(model: PeftModel, probe: dict[str, Tensor], placement: Placement, is_exact: bool) -> dict[str, Any]:
    """Largest difference and mean divergence between the worker's logits and those of the loaded adapter.

    Raises:
        IntegrityFailure: they differ by more than the precision explains.
    """
    model.eval()
    difference, divergences = 0.0, []
    for row in sorted(name.removeprefix("tokens.") for name in probe if name.startswith("tokens.")):
        with placement.autocast():
            logits = model(input_ids=probe[f"tokens.{row}"][None].to(placement.device), use_cache=False).logits
        found, expected = logits[0].float().cpu(), probe[f"logits.{row}"]
        difference = max(difference, float((found - expected).abs().max()))
        log_p, log_q = (functional.log_softmax(x, -1) for x in (expected, found))
        divergences.append(functional.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1))
    mean_kl = float(torch.cat(divergences).mean())
    passed = difference <= MAX_ABS_DIFFERENCE if is_exact else mean_kl <= MAX_MEAN_KL
    if not passed:
        raise IntegrityFailure(
            f"the sealed adapter, loaded afresh, gives other logits than the trained model: largest difference "
            f"{difference:.2e}, mean KL {mean_kl:.2e}"
        )
    return {"max_abs_difference": difference, "mean_kl": mean_kl}


def main() -> int:
    """As the supervisor starts it."""
    workdir = WorkDir(Path(sys.argv[1]))
    setup_child()
    return record(workdir.outcome("verify"), lambda: run(workdir), as_torch_failure)


if __name__ == "__main__":
    sys.exit(main())
