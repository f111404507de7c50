"""Device and precision, foreseen failures of torch, sealed folders, outcomes, memory (T24, T30, T34, T43, T49)."""

import errno
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from job import outcome
from job.errors import DeviceFailure, DeviceOutOfMemory, DiskFailure, JobError, SpecInvalid, TemporaryFailure
from job.exits import ExitCode
from job.files import sealing
from job.training.adapter import add_adapter, trained
from job.training.device import place
from job.training.failures import as_torch_failure
from job.training.memory import available_bytes, peak_bytes, reset_peak
from job.training.model import load_base, own_dropout, quantization_config
from tests.job.made import CPU, made_spec


@pytest.mark.parametrize(
    ("capability", "wanted", "expected"),
    [
        ((9, 0), "auto", torch.bfloat16),
        ((8, 0), "auto", torch.bfloat16),
        ((7, 5), "auto", torch.float16),
        ((8, 0), "float32", torch.float32),
        ((7, 5), "bfloat16", None),
    ],
)
def test_t34_precision_is_what_the_gpu_has_and_not_what_it_emulates(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], wanted: str, expected: torch.dtype | None
) -> None:
    """torch's own answers about the device are replaced; there is none here."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_75", "sm_80", "sm_90"])
    monkeypatch.setattr(
        torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation or capability >= (8, 0)
    )
    spec = made_spec(training={"precision": wanted})
    if expected is None:
        with pytest.raises(SpecInvalid, match="no bfloat16"):
            place(spec)
        return
    placement = place(spec)
    assert placement.precision == expected
    assert placement.scales_loss == (expected == torch.float16)


def test_a_gpu_too_old_for_this_torch_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "V100")
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_75", "sm_80"])
    with pytest.raises(DeviceFailure, match=r"V100 has compute capability 7\.0.*starts at 7\.5"):
        place(made_spec())


def test_the_cpu_trains_in_float32_and_refuses_float16() -> None:
    assert place(made_spec()).precision == torch.float32
    with pytest.raises(SpecInvalid, match="float16"):
        place(made_spec(training={"precision": "float16"}))


def test_t49_adapters_are_float32_over_a_16_bit_base_whose_embeddings_stay_16_bit(tiny_llama: Path) -> None:
    spec = made_spec(method="qlora")
    half = replace(CPU, precision=torch.bfloat16)
    model = add_adapter(load_base(tiny_llama, spec, half), spec, half)
    assert {parameter.dtype for parameter in trained(model).values()} == {torch.float32}
    assert model.get_input_embeddings().weight.dtype == torch.bfloat16
    layer = model.get_base_model().model.layers[0].self_attn.q_proj.base_layer
    assert type(layer).__name__ == "Linear4bit"
    assert quantization_config(spec, torch.bfloat16).bnb_4bit_compute_dtype == torch.bfloat16  # type: ignore[union-attr]


def test_a_real_bfloat16_step_on_the_cpu_mixes_no_types(tiny_llama: Path, tiny_gpt2: Path, tmp_path: Path) -> None:
    from peft import PeftModel

    from job.evaluation import verify
    from job.training.adapter import save_adapter
    from job.training.kernels import PaddingFree
    from job.training.loop import Loop, make_optimizer
    from job.training.order import Order
    from tests.job.made import made_rows

    half = replace(CPU, precision=torch.bfloat16)
    cases = (
        (tiny_llama, {}, {"modules_to_save": ["lm_head"]}),
        (tiny_llama, {"method": "qlora"}, {}),
        (tiny_gpt2, {}, {"bias": "all"}),
    )
    for folder, more, lora in cases:
        spec = made_spec(training={"max_steps": 2, "gradient_checkpointing": True}, lora=lora, **more)
        model = add_adapter(load_base(folder, spec, half), spec, half)
        rows = made_rows([17, 5, 33, 9], 300)
        order = Order(rows.sources, [1.0], spec.training, "digest")
        kernel = PaddingFree(half.device)
        loop = Loop(model, make_optimizer(model, spec.training), rows, order, spec.training, kernel, half)
        losses = [progress.loss for progress in loop.run(lambda: False)]
        assert losses[1] < losses[0]
        save_adapter(model, tmp_path / "adapter", "safetensors")
        again = PeftModel.from_pretrained(load_base(folder, spec, half), str(tmp_path / "adapter"))
        verify.check_loaded(again, verify.check_structure(tmp_path / "adapter", spec))


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), DeviceOutOfMemory),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"), DeviceOutOfMemory),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling"), DeviceOutOfMemory),
        (RuntimeError("[gloo/pair.cc:537] Read error: Connection reset by peer"), TemporaryFailure),
        (RuntimeError("shape mismatch"), None),
        (ValueError("out of memory"), None),
    ],
)
def test_t30_memory_and_lost_peers_are_told_from_bugs(error: BaseException, expected: type[JobError] | None) -> None:
    found = as_torch_failure(error)
    assert found is None if expected is None else isinstance(found, expected)


@pytest.mark.parametrize(("code", "expected"), [(2, DeviceOutOfMemory), (719, DeviceFailure), (710, None)])
def test_cuda_errors_are_told_apart_by_their_number(code: int, expected: type[JobError] | None) -> None:
    error = torch.AcceleratorError("CUDA error: something")
    error.error_code = code
    found = as_torch_failure(error)
    assert found is None if expected is None else isinstance(found, expected)


def test_t30_a_real_allocation_that_fails_is_out_of_memory_and_says_the_peak_and_what_to_try() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 55, dtype=torch.uint8)
    found = as_torch_failure(caught.value)
    assert isinstance(found, DeviceOutOfMemory)
    said = re.search(r"at its peak this process held (\d+\.\d\d) GiB; lower training.micro_batch_size", str(found))
    assert said is not None, found
    assert float(said[1]) == pytest.approx(peak_bytes(torch.device("cpu")) / 2**30, abs=0.02)


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_t49_the_base_goes_whole_to_the_ranks_own_device(
    method: str, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Never ``auto``, which would spread it over all devices there are, those of other ranks too."""
    asked: list[Any] = []

    def loader(folder: Path, **wanted: Any) -> None:
        asked.append(wanted["device_map"])
        raise ValueError("seen enough")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", loader)
    for local in (0, 3):
        there = replace(CPU, device=torch.device("cuda", local), rank=local, world=4)
        with pytest.raises(SpecInvalid):
            load_base(tiny_llama, made_spec(method=method), there)
    assert asked == [{"": torch.device("cuda", 0)}, {"": torch.device("cuda", 3)}]


@pytest.mark.parametrize(
    ("family", "sizes", "expected"),
    [
        ("llama", {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2}, 0.0),
        ("gpt2", {"n_embd": 32, "n_head": 4, "n_layer": 1}, 0.1),
        ("opt", {"hidden_size": 32, "ffn_dim": 48, "num_attention_heads": 4, "word_embed_proj_dim": 32}, 0.1),
        ("biogpt", {"hidden_size": 32, "num_attention_heads": 4, "layerdrop": 0.3}, 0.3),
        ("gpt2", {"n_embd": 32, "n_head": 4, "resid_pdrop": 0, "embd_pdrop": 0, "attn_pdrop": 0}, 0.0),
    ],
)
def test_t43_the_bases_own_dropout_is_recorded(family: str, sizes: dict[str, Any], expected: float) -> None:
    sizes = {"vocab_size": 64, "num_hidden_layers": 1, "intermediate_size": 48} | sizes
    base = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **sizes))
    model = add_adapter(base, made_spec(lora={"dropout": 0.7}), CPU)
    assert own_dropout(model.get_base_model()) == expected


def test_an_outcome_is_written_whatever_happens(tmp_path: Path) -> None:
    def full() -> ExitCode:
        raise OSError(errno.ENOSPC, "No space left on device", "/scratch/x")

    def unforeseen() -> ExitCode:
        raise KeyError("surprise")

    assert outcome.record(tmp_path / "a.json", lambda: ExitCode.OK, as_torch_failure) == 0
    assert outcome.record(tmp_path / "b.json", full, as_torch_failure) == 74
    assert outcome.record(tmp_path / "c.json", unforeseen, as_torch_failure) == 1
    assert outcome.recorded(tmp_path / "a.json") is ExitCode.OK
    assert isinstance(outcome.recorded(tmp_path / "b.json"), DiskFailure)
    crash = outcome.recorded(tmp_path / "c.json")
    assert isinstance(crash, JobError)
    assert crash.exit_code == ExitCode.CRASH
    assert outcome.recorded(tmp_path / "nothing.json") is None


def test_t44_a_real_cause_comes_before_a_rank_that_only_lost_its_peers() -> None:
    lost, real = TemporaryFailure("lost"), DiskFailure("full")
    assert outcome.cause([lost, ExitCode.OK, real, None]) is real
    assert outcome.cause([None, lost]) is lost
    assert outcome.cause([None, ExitCode.OK]) is None


SEALER = """
import os, sys
from pathlib import Path
from job.files import sealing
stage, folder = int(sys.argv[1]), Path(sys.argv[2])
count = 0
def audit(event, arguments):
    global count
    if event in ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree") and armed:
        count += 1
        if count == stage:
            os.kill(os.getpid(), 9)
armed = False
sys.addaudithook(audit)
armed = True
with sealing(folder) as scratch:
    (scratch / "a").write_text("new")
    (scratch / "b").write_text("new")
armed = False
print(count)
"""


def test_t24_a_folder_is_whole_or_absent_whenever_its_writer_is_killed(tmp_path: Path) -> None:
    def contents(folder: Path) -> set[str] | None:
        return {path.read_text() for path in folder.iterdir()} if folder.exists() else None

    whole = subprocess.run(
        [sys.executable, "-c", SEALER, "0", str(tmp_path / "whole")], capture_output=True, text=True, check=True
    )
    stages = int(whole.stdout)
    assert stages > 6
    for stage in range(1, stages + 1):
        folder = tmp_path / f"stage-{stage}"
        killed = subprocess.run([sys.executable, "-c", SEALER, str(stage), str(folder)], capture_output=True)
        assert killed.returncode == -9
        assert contents(folder) in (None, {"new"})
        if folder.exists():
            assert len(list(folder.iterdir())) == 2
        with sealing(folder) as scratch:  # what is left behind does not disturb the next
            (scratch / "a").write_text("next")
        assert contents(folder) == {"next"}


def test_peak_memory_counts_from_the_reset_on() -> None:
    device = torch.device("cpu")
    code = (
        "import json, torch; from job.training.memory import peak_bytes, reset_peak; d = torch.device('cpu')\n"
        "a = torch.ones(64 << 20, dtype=torch.uint8); first = peak_bytes(d); del a\n"
        "reset_peak(d); print(json.dumps([first, peak_bytes(d)]))"
    )
    said = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ | {"PYTHONPATH": "."}
    )
    first, second = json.loads(said.stdout)
    assert first - second > 48 << 20
    reset_peak(device)
    assert peak_bytes(device) > 10 << 20
    available = available_bytes()
    assert available is None or available > 0
