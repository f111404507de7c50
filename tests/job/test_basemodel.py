"""The base model's folder: what is missing, cut off or dangerous is named before anything heavy starts."""

import io
import json
import os
import pickle
import shutil
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._weights_only_unpickler import _get_allowed_globals

from job.errors import InputMissing, IntegrityFailure, JobError, SpecInvalid
from job.storage.basemodel import SAFE_GLOBALS, check_pickled_weights, files_of, inspect, wanted


@pytest.fixture
def model(tiny_llama: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(tiny_llama, tmp_path / "model"))


def configure(model: Path, file: str = "config.json", **changes: Any) -> None:
    path = model / file
    before = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps(before | changes))


def shard(model: Path) -> tuple[str, str]:
    """Splits the model's weights in two files and an index, as save_pretrained does with large models."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    names = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    keys = sorted(tensors)
    weight_map = {key: names[number % 2] for number, key in enumerate(keys)}
    for name in names:
        save_file({key: tensors[key] for key in keys if weight_map[key] == name}, model / name)
    (model / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return names


def pickled(model: Path, save: Callable[[dict[str, Any], Path], None]) -> Path:
    """Replaces the weights by a pickle."""
    from safetensors.torch import load_file

    save(load_file(model / "model.safetensors"), model / "pytorch_model.bin")
    (model / "model.safetensors").unlink()
    return model / "pytorch_model.bin"


@pytest.mark.parametrize("fixture", ["tiny_llama", "tiny_qwen", "tiny_gpt2"])
def test_a_sound_model_is_described(fixture: str, request: pytest.FixtureRequest) -> None:
    folder: Path = request.getfixturevalue(fixture)
    config = json.loads((folder / "config.json").read_text())
    model = inspect(folder, "org/name")
    assert model.model_type == config["model_type"]
    assert model.weights == (folder / "model.safetensors",)
    assert model.total_bytes == (folder / "model.safetensors").stat().st_size
    assert model.positions == config.get("max_position_embeddings", config.get("n_positions"))
    assert model.positions


def test_a_sharded_model_is_described(model: Path) -> None:
    names = shard(model)
    found = inspect(model, "m")
    assert [path.name for path in found.weights] == list(names)
    assert found.total_bytes == sum((model / name).stat().st_size for name in names)


def break_header(model: Path, change: Callable[[dict[str, Any]], None]) -> None:
    path = model / "model.safetensors"
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


def first(header: dict[str, Any]) -> dict[str, Any]:
    return next(value for key, value in header.items() if key != "__metadata__")


def cut(model: Path, keep: int) -> None:
    os.truncate(model / "model.safetensors", keep)


BAD: list[tuple[str, Callable[[Path], object], type[JobError], str]] = [
    ("no folder", shutil.rmtree, InputMissing, "no folder"),
    ("no config", lambda m: (m / "config.json").unlink(), InputMissing, r"no config\.json in"),
    ("config not JSON", lambda m: (m / "config.json").write_text("{"), SpecInvalid, r"config\.json is not JSON"),
    ("config in UTF-16", lambda m: (m / "config.json").write_bytes(b"\xff\xfe{\x00"), SpecInvalid, "is not JSON"),
    ("config a list", lambda m: (m / "config.json").write_text("[]"), SpecInvalid, "holds a list"),
    ("config nested", lambda m: (m / "config.json").write_text("[" * 100_000), SpecInvalid, "is not JSON"),
    ("no model_type", lambda m: configure(m, model_type=None), SpecInvalid, "no model_type"),
    ("auto_map", lambda m: configure(m, auto_map={"AutoModel": "x.Y"}), SpecInvalid, r"config\.json has auto_map"),
    ("nested auto_map", lambda m: configure(m, text_config={"auto_map": {"A": "b"}}), SpecInvalid, "remote code"),
    (
        "tokenizer code",
        lambda m: configure(m, "tokenizer_config.json", auto_map={"AutoTokenizer": ["x.Y", None]}),
        SpecInvalid,
        r"tokenizer_config\.json has auto_map, remote code",
    ),
    (
        "generation code",
        lambda m: configure(m, "generation_config.json", auto_map={"a": "b"}),
        SpecInvalid,
        r"generation_config\.json has auto_map",
    ),
    (
        "hub kernel",
        lambda m: configure(m, _attn_implementation_internal="someone/kernel"),
        SpecInvalid,
        "_attn_implementation_internal.*remote code",
    ),
    ("kernels", lambda m: configure(m, attn_implementation={"": "a/b"}), SpecInvalid, "attn_implementation.*remote"),
    ("experts", lambda m: configure(m, _experts_implementation="a/b@main:f"), SpecInvalid, "_experts_implementation"),
    ("encoder-decoder", lambda m: configure(m, is_encoder_decoder=True), SpecInvalid, "encoder-decoder"),
    ("vision", lambda m: configure(m, vision_config={"depth": 2}), SpecInvalid, "vision_config"),
    ("other task", lambda m: configure(m, architectures=["BertForMaskedLM"]), SpecInvalid, "BertForMaskedLM"),
    (
        "quantised",
        lambda m: configure(m, quantization_config={"quant_method": "gptq"}),
        SpecInvalid,
        "already quantised.*gptq",
    ),
    ("adapter", lambda m: (m / "config.json").rename(m / "adapter_config.json"), SpecInvalid, "an adapter, not a base"),
    ("adapter beside", lambda m: configure(m, "adapter_config.json"), SpecInvalid, "adapter_config.json beside"),
    ("no weights", lambda m: (m / "model.safetensors").unlink(), InputMissing, "no weights in.*looked for"),
    ("no tokenizer", lambda m: (m / "tokenizer.json").unlink(), InputMissing, r"no tokenizer.*tokenizer\.model"),
    ("empty weights", lambda m: cut(m, 0), IntegrityFailure, "has 0 bytes"),
    ("cut in header", lambda m: cut(m, 100), IntegrityFailure, "no whole header"),
    ("cut by one", lambda m: cut(m, (m / "model.safetensors").stat().st_size - 1), IntegrityFailure, "header asks for"),
    ("grown", lambda m: (m / "model.safetensors").open("ab").write(b"x"), IntegrityFailure, "header asks for"),
    (
        "header garbage",
        lambda m: (m / "model.safetensors").write_bytes(struct.pack("<Q", 16) + b"x" * 64),
        IntegrityFailure,
        "header that is not one",
    ),
    (
        "header a list",
        lambda m: (m / "model.safetensors").write_bytes(struct.pack("<Q", 2) + b"[]"),
        IntegrityFailure,
        "header",
    ),
    (
        "wrong shape",
        lambda m: break_header(m, lambda h: first(h).update(shape=[1])),
        IntegrityFailure,
        "header that is not one",
    ),
    (
        "offsets overlap",
        lambda m: break_header(m, lambda h: h.update(copy=dict(first(h)))),
        IntegrityFailure,
        "gap or an overlap",
    ),
    (
        "lfs pointer",
        lambda m: (m / "model.safetensors").write_text("version https://git-lfs.example/spec/v1\noid sha256:0\n"),
        InputMissing,
        "git lfs pull",
    ),
]


@pytest.mark.parametrize(("spoil", "kind", "words"), [case[1:] for case in BAD], ids=[case[0] for case in BAD])
def test_a_bad_model_is_refused_by_name(
    spoil: Callable[[Path], object], kind: type[JobError], words: str, model: Path
) -> None:
    spoil(model)
    with pytest.raises(kind, match=words) as refusal:
        inspect(model, "org/name")
    assert type(refusal.value) is kind
    assert str(refusal.value).startswith("model org/name: ")
    assert "\n" not in str(refusal.value)


def test_a_missing_shard_is_named(model: Path) -> None:
    names = shard(model)
    (model / names[1]).unlink()
    with pytest.raises(InputMissing, match=names[1]):
        inspect(model, "m")


def test_a_shard_without_its_tensors_is_found(model: Path) -> None:
    one, two = shard(model)
    shutil.copy(model / one, model / two)
    with pytest.raises(IntegrityFailure, match=f"{two} lacks"):
        inspect(model, "m")


@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/passwd", "sub/x.safetensors", ".hidden", 3])
def test_an_index_may_not_name_files_elsewhere(name: object, model: Path) -> None:
    shard(model)
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(SpecInvalid, match="no file of its folder"):
        inspect(model, "m")


def test_plain_attention_names_are_no_code(model: Path) -> None:
    configure(model, _attn_implementation="sdpa", attn_implementation="flash_attention_2", auto_map=None)
    assert inspect(model, "m").model_type == "llama"


def test_the_table_of_safe_names_is_torchs_own() -> None:
    # A newer torch may know more names; one that knows fewer would refuse what we let pass.
    assert set(_get_allowed_globals()) >= SAFE_GLOBALS
    assert {"torch.FloatStorage", "torch._utils._rebuild_tensor_v2", "collections.OrderedDict"} <= SAFE_GLOBALS


SAVERS: dict[str, Callable[[dict[str, Any], Path], None]] = {
    "zip": lambda tensors, path: torch.save(tensors, path),
    "legacy": lambda tensors, path: torch.save(tensors, path, _use_new_zipfile_serialization=False),
    "parameters": lambda tensors, path: torch.save({k: torch.nn.Parameter(v) for k, v in tensors.items()}, path),
    "bfloat16": lambda tensors, path: torch.save({k: v.bfloat16() for k, v in tensors.items()}, path),
}


@pytest.mark.parametrize("form", SAVERS)
def test_pickled_weights_without_code_are_taken(form: str, model: Path) -> None:
    path = pickled(model, SAVERS[form])
    found = inspect(model, "m")
    assert found.weights == (path,)
    assert found.weight_format == "bin"
    torch.load(path, weights_only=True)


class Hostile:
    """Runs a command when it is unpickled."""

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, ("touch /nowhere/canary",)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol 4")
@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("protocol", [2, 4])
def test_a_pickle_that_names_code_is_refused_as_torch_refuses_it(legacy: bool, protocol: int, model: Path) -> None:
    path = pickled(
        model,
        lambda tensors, path: torch.save(
            tensors | {"x": Hostile()}, path, pickle_protocol=protocol, _use_new_zipfile_serialization=not legacy
        ),
    )
    with pytest.raises(SpecInvalid, match=r"posix\.system" if protocol == 2 else "STACK_GLOBAL|SHORT_BINUNICODE|FRAME"):
        inspect(model, "m")
    with pytest.raises(pickle.UnpicklingError):
        torch.load(path, weights_only=True)


def test_every_pickle_of_a_legacy_file_is_looked_at(tmp_path: Path) -> None:
    path = tmp_path / "pytorch_model.bin"
    harmless = pickle.dumps(1, protocol=2)
    path.write_bytes(harmless * 3 + pickle.dumps(Hostile(), protocol=2) + harmless)
    with pytest.raises(SpecInvalid, match=r"posix\.system"):
        check_pickled_weights(path, "m")


def test_a_plain_pickle_of_another_program_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "pytorch_model.bin"
    path.write_bytes(pickle.dumps(Hostile(), protocol=0))
    with pytest.raises(SpecInvalid):
        check_pickled_weights(path, "m")


def zip_of(**members: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, data in members.items():
            archive.writestr(f"archive/{name}", data)
    return buffer.getvalue()


BOMB = b"\x80\x02X" + struct.pack("<I", 2**32 - 1) + b"a"
"""Announces a string of 4 GiB that is not there."""


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"PK\x03\x04",
        b"not a pickle",
        zip_of(version=b"3"),
        zip_of(**{"data.pkl": b"\x80\x02}"}),
        zip_of(**{"data.pkl": BOMB}),
        BOMB,
        pickle.dumps(1, protocol=2),
    ],
    ids=["empty", "zip without end", "text", "no data.pkl", "no stop", "zip bomb", "legacy bomb", "one pickle only"],
)
def test_what_is_no_torch_file_is_damaged(data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "pytorch_model.bin"
    path.write_bytes(data)
    with pytest.raises(IntegrityFailure, match="download it again"):
        check_pickled_weights(path, "m")


def test_a_cut_pickle_is_damaged_not_a_traceback(model: Path) -> None:
    path = pickled(model, SAVERS["zip"])
    os.truncate(path, path.stat().st_size // 2)
    with pytest.raises(IntegrityFailure, match=r"pytorch_model\.bin"):
        inspect(model, "m")


@pytest.mark.parametrize(
    ("names", "taken"),
    [
        ({"config.json", "model.safetensors", "pytorch_model.bin"}, {"config.json", "model.safetensors"}),
        ({"config.json", "pytorch_model.bin", "training_args.bin"}, {"config.json", "pytorch_model.bin"}),
        ({"model-00001-of-00002.safetensors", "consolidated.safetensors"}, {"model-00001-of-00002.safetensors"}),
        ({"modeling_x.py", "model.gguf", "onnx/model.onnx", "tf_model.h5", "flax_model.msgpack"}, set()),
        (
            {"tokenizer.model", "chat_template.jinja", "merges.txt"},
            {"tokenizer.model", "chat_template.jinja", "merges.txt"},
        ),
        ({"original/model.safetensors", ".gitattributes", ".x.json", "README.md"}, set()),
    ],
)
def test_only_what_a_run_reads_is_taken(names: set[str], taken: set[str]) -> None:
    assert wanted(names) == taken


def test_the_files_of_a_model_leave_out_code(model: Path) -> None:
    (model / "modeling_llama.py").write_text("raise SystemExit")
    names = [path.name for path in files_of(model)]
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(names)
    assert "modeling_llama.py" not in names
