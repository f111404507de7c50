"""The base model's folder, looked over in milliseconds before anything heavy: headers and JSON only, no torch.

Whatever could run code or fetch it (``auto_map``, kernels from a hub, pickles that name more than tensors) is refused
here, and so is what this program does not train.
"""

import json
import math
import pickletools
import re
import struct
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

from job.errors import InputMissing, IntegrityFailure, SpecInvalid
from job.storage.store import size_text, translated

CONFIG = "config.json"
_JSON_WITH_CODE = (
    CONFIG,
    "tokenizer_config.json",
    "generation_config.json",
    "processor_config.json",
    "preprocessor_config.json",
)
_LARGEST_JSON = 64 << 20
_LARGEST_HEADER = 100_000_000  # the safetensors library's own limit
_POSITIONS = ("max_position_embeddings", "n_positions", "max_sequence_length", "max_seq_len", "seq_length", "n_ctx")
_TOKENIZERS = (("tokenizer.json",), ("tokenizer.model",), ("vocab.json", "merges.txt"))
_OTHER_TASKS = re.compile(
    r"(ForConditionalGeneration|ForMaskedLM|Classification|QuestionAnswering|ForCTC|RewardModel|ForSpeech\w+)$"
)
_OTHER_SENSES = (
    "vision_config",
    "audio_config",
    "speech_config",
    "image_token_id",
    "image_token_index",
    "vision_tower",
)
_DTYPE_BITS = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 16),
    **dict.fromkeys(("I32", "U32", "F32"), 32),
    **dict.fromkeys(("I64", "U64", "F64", "C64"), 64),
}


@dataclass(frozen=True)
class BaseModel:
    """A folder that looks like a causal language model this program can adapt."""

    name: str
    """The user's name for it."""
    folder: Path
    config: Mapping[str, Any]
    """config.json as it stands."""
    model_type: str
    """transformers' name for the architecture."""
    weights: tuple[Path, ...]
    """The files transformers will read, in order of their names."""
    weight_format: Literal["safetensors", "bin"]
    total_bytes: int
    """Of the weight files."""
    positions: int | None
    """Tokens its positions reach; None if the config does not say."""


def inspect(folder: Path, name: str) -> BaseModel:
    """The base model in a folder, after every check that needs no weights.

    Args:
        name: the user's name for the model; messages use it.

    Raises:
        InputMissing: config, weights, a shard or the tokenizer is not there.
        IntegrityFailure: a weight file is cut off, or is no weight file.
        SpecInvalid: it brings code of its own, or is a model this program does not train.
    """
    with translated(f"model {name}: cannot be read", folder):
        config = _config(folder, name)
        _refuse_code(folder, name)
        model_type = _refuse_other_kinds(config, folder, name)
        weights, weight_format = _weights(folder, name)
        _require_tokenizer(folder, name)
        return BaseModel(
            name=name,
            folder=folder,
            config=config,
            model_type=model_type,
            weights=weights,
            weight_format=weight_format,
            total_bytes=sum(path.stat().st_size for path in weights),
            positions=next((config[key] for key in _POSITIONS if isinstance(config.get(key), int)), None),
        )


def files_of(folder: Path) -> list[Path]:
    """The files of a model's folder that a run may read: weights, configs, tokenizer; sorted by name.

    Never code, and pickled weights only where there are no safetensors.
    """
    files = [path for path in sorted(folder.iterdir()) if path.is_file() and not path.name.startswith(".")]
    return [path for path in files if path.name in wanted({path.name for path in files})]


def wanted(names: set[str]) -> set[str]:
    """Of the names in a model's folder (or a hub's listing) those that a run may read; nothing below a subfolder."""
    suffixes = {".json", ".jinja", ".txt", ".model", ".safetensors"}
    flat = {name for name in names if "/" not in name}
    taken = {name for name in flat if Path(name).suffix in suffixes and not name.startswith(".")}
    if any(name.endswith(".safetensors") for name in taken):
        # consolidated.safetensors holds the same weights once more, in the form of their maker's own program.
        whole = {name for name in taken if re.fullmatch(r"model.*\.safetensors", name)}
        extra = {name for name in taken if name.endswith(".safetensors") and name not in whole}
        return taken - extra if whole else taken
    return taken | {name for name in flat if re.fullmatch(r"pytorch_model.*\.bin", name)}


def _config(folder: Path, name: str) -> dict[str, Any]:
    if not folder.is_dir():
        raise InputMissing(f"model {name}: no folder {folder}")
    if not (folder / CONFIG).is_file():
        if (folder / "adapter_config.json").is_file():
            raise SpecInvalid(f"model {name}: an adapter, not a base model; name its base, or merge the two first")
        raise InputMissing(f"model {name}: no {CONFIG} in {folder}; is it a folder saved by save_pretrained?")
    if (folder / "adapter_config.json").is_file():
        raise SpecInvalid(
            f"model {name}: holds an adapter_config.json beside {CONFIG}, so that the adapter would be loaded with the "
            "base; move the adapter's files elsewhere"
        )
    return _json(folder / CONFIG, name)


def _json(path: Path, name: str) -> dict[str, Any]:
    if path.stat().st_size > _LARGEST_JSON:
        raise SpecInvalid(f"model {name}: {path.name} has {size_text(path.stat().st_size)}, which is no configuration")
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise SpecInvalid(f"model {name}: {path.name} is not JSON ({error}); download it again") from error
    if not isinstance(value, dict):
        raise SpecInvalid(f"model {name}: {path.name} holds a {type(value).__name__}, not a JSON object")
    return value


def _refuse_code(folder: Path, name: str) -> None:
    for file in _JSON_WITH_CODE:
        if not (folder / file).is_file():
            continue
        for key, value in _walk(_json(folder / file, name)):
            if key in ("auto_map", "custom_pipelines") and value:
                raise SpecInvalid(
                    f"model {name}: {file} has {key}, remote code that would run here, and this program runs none; "
                    f"if transformers knows the architecture itself, remove {key} from a copy of the model"
                )
            if key.endswith(("_implementation", "_implementation_internal")) and "/" in json.dumps(value):
                raise SpecInvalid(
                    f"model {name}: {file} has {key}: {json.dumps(value)[:80]}, remote code (a kernel from a hub), and "
                    "this program runs none; remove the key from a copy of the model"
                )


def _walk(value: Any) -> Iterator[tuple[str, Any]]:
    """Every key of nested JSON with its value."""
    waiting = [value]
    while waiting:
        item = waiting.pop()
        if isinstance(item, dict):
            yield from item.items()
            waiting.extend(item.values())
        elif isinstance(item, list):
            waiting.extend(item)


def _refuse_other_kinds(config: dict[str, Any], folder: Path, name: str) -> str:
    """The model's type. Raises SpecInvalid, by name, for what is no plain causal language model."""
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or not model_type:
        raise SpecInvalid(f"model {name}: {CONFIG} in {folder} names no model_type; is it a transformers model?")
    if config.get("is_encoder_decoder"):
        raise SpecInvalid(f"model {name}: {model_type} is an encoder-decoder; only causal language models are trained")
    sense = next((key for key in _OTHER_SENSES if config.get(key) is not None), None)
    if sense:
        raise SpecInvalid(f"model {name}: {model_type} also sees or hears ({sense}); only text models are trained")
    architectures = config.get("architectures") or []
    other = next((item for item in architectures if isinstance(item, str) and _OTHER_TASKS.search(item)), None)
    if other:
        raise SpecInvalid(f"model {name}: {other} is no causal language model; take one ending in ForCausalLM")
    quantization = config.get("quantization_config")
    if quantization:
        method = quantization.get("quant_method", "unknown") if isinstance(quantization, dict) else "unknown"
        raise SpecInvalid(
            f"model {name}: already quantised (quant_method {method}); take the original weights, "
            "which method: qlora quantises itself"
        )
    return model_type


def _weights(folder: Path, name: str) -> tuple[tuple[Path, ...], Literal["safetensors", "bin"]]:
    """The weight files, checked, in the order in which transformers looks for them."""
    forms: tuple[tuple[str, Literal["safetensors", "bin"]], ...] = (
        ("model.safetensors", "safetensors"),
        ("pytorch_model.bin", "bin"),
    )
    for whole, form in forms:
        if (folder / whole).is_file():
            paths, tensors = [folder / whole], {}
        elif (folder / f"{whole}.index.json").is_file():
            tensors = _weight_map(folder, f"{whole}.index.json", name)
            paths = [folder / shard for shard in sorted(set(tensors.values()))]
        else:
            continue
        for path in paths:
            _refuse_pointer(path, name)
            if form == "bin":
                check_pickled_weights(path, name)
                continue
            present = _safetensors_names(path, name)
            absent = [key for key, shard in tensors.items() if shard == path.name and key not in present]
            if absent:
                raise IntegrityFailure(
                    f"model {name}: {path.name} lacks {absent[0]}, which its index says it holds; download both again"
                )
        return tuple(paths), form
    others = ", ".join(sorted(path.name for path in folder.iterdir())[:8])
    raise InputMissing(
        f"model {name}: no weights in {folder} (looked for model.safetensors, pytorch_model.bin and their .index.json; "
        f"found {others or 'nothing'})"
    )


def _weight_map(folder: Path, index: str, name: str) -> dict[str, str]:
    tensors = _json(folder / index, name).get("weight_map")
    if not isinstance(tensors, dict) or not tensors:
        raise SpecInvalid(f"model {name}: {index} has no weight_map; download it again")
    for shard in dict.fromkeys(tensors.values()):
        if not isinstance(shard, str) or Path(shard).name != shard or shard.startswith("."):
            raise SpecInvalid(f"model {name}: {index} names {shard!r}, which is no file of its folder")
        if not (folder / shard).is_file():
            raise InputMissing(f"model {name}: shard {shard}, named by {index}, is not in {folder}; download it again")
    return tensors


def _refuse_pointer(path: Path, name: str) -> None:
    with path.open("rb") as stream:
        if stream.read(40).startswith(b"version https://git-lfs"):
            raise InputMissing(
                f"model {name}: {path.name} is only a git-lfs pointer; fetch the file with: git lfs pull"
            )


def _safetensors_names(path: Path, name: str) -> set[str]:
    """The tensors of a safetensors file. Raises IntegrityFailure if header and size of the file disagree."""
    size = path.stat().st_size
    with path.open("rb") as stream:
        start = stream.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if not 2 <= length <= min(_LARGEST_HEADER, size - 8):
            raise _damaged(path, name, f"has {size} bytes and no whole header")
        try:
            header = json.loads(stream.read(length))
            tensors = {key: value for key, value in header.items() if key != "__metadata__"}
            spans = sorted(_span(value) for value in tensors.values())
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise _damaged(path, name, "has a header that is not one") from error
    end = 0
    for begin, stop in spans:
        if begin != end:
            raise _damaged(path, name, f"has a header with a gap or an overlap at byte {end}")
        end = stop
    if 8 + length + end != size:
        raise _damaged(path, name, f"has {size} bytes where its header asks for {8 + length + end}")
    return set(tensors)


def _span(tensor: dict[str, Any]) -> tuple[int, int]:
    """First byte and end of a tensor's data. Raises ValueError if they do not fit its shape."""
    begin, end = tensor["data_offsets"]
    bits = _DTYPE_BITS.get(tensor["dtype"])
    if not 0 <= begin <= end or (bits is not None and math.prod(tensor["shape"]) * bits != (end - begin) * 8):
        raise ValueError(tensor)
    return begin, end


def _damaged(path: Path, name: str, what: str) -> IntegrityFailure:
    return IntegrityFailure(f"model {name}: {path.name} {what}: cut off or damaged; download it again")


def _require_tokenizer(folder: Path, name: str) -> None:
    if not any(all((folder / file).is_file() for file in files) for files in _TOKENIZERS):
        looked_for = " or ".join(" + ".join(files) for files in _TOKENIZERS)
        raise InputMissing(f"model {name}: no tokenizer in {folder} (looked for {looked_for}); copy it there")


# What torch.load(weights_only=True) knows (torch 2.13); a test compares it with torch itself.
_ELEMENTS = "BFloat16 Byte Char Double Float Half Int Long Short"
_BITS = "1 2 3 4 5 6 7 8 16 32 64"
_NAMES = {
    "{}": "_codecs.encode builtins.bytearray builtins.complex builtins.set collections.Counter collections.OrderedDict",
    "torch.{}": "Size Tensor device nn.parameter.Parameter _tensor._rebuild_from_type_v2 serialization._get_layout",
    "torch._utils._rebuild_{}": "device_tensor_from_cpu_tensor device_tensor_from_numpy meta_tensor_no_storage "
    "nested_tensor parameter parameter_with_state qtensor sparse_tensor tensor tensor_v2 tensor_v3 wrapper_subclass",
    "torch.storage.{}Storage": "Typed Untyped",
    "torch.{}Storage": _ELEMENTS + " Bool ComplexDouble ComplexFloat QInt8 QInt32 QUInt8 QUInt2x4 QUInt4x2",
    "torch.cuda.{}Storage": _ELEMENTS + " Bool ComplexDouble ComplexFloat",
    "torch.{}Tensor": _ELEMENTS + " Bool",
    "torch.cuda.{}Tensor": _ELEMENTS + " Bool",
    "torch.sparse.{}Tensor": _ELEMENTS,
    "torch.cuda.sparse.{}Tensor": _ELEMENTS,
    "torch.int{}": _BITS,
    "torch.uint{}": _BITS,
    "torch.bits{}": "16 1x8 2x4 4x2 8",
    "torch.float{}": "16 32 64 4_e2m1fn_x2 8_e4m3fn 8_e4m3fnuz 8_e5m2 8_e5m2fnuz 8_e8m0fnu",
    "torch.complex{}": "32 64 128",
    "torch.q{}": "int8 int32 uint8 uint2x4 uint4x2",
    "torch.b{}": "ool float16",
    "torch.per_{}": "channel_affine channel_affine_float_qparams channel_symmetric tensor_affine tensor_symmetric",
}
SAFE_GLOBALS = frozenset(pattern.format(name) for pattern, names in _NAMES.items() for name in names.split())
_OPCODES = """APPEND APPENDS BINFLOAT BINGET BININT BININT1 BININT2 BINPERSID BINPUT BINUNICODE BUILD EMPTY_DICT
    EMPTY_LIST EMPTY_SET EMPTY_TUPLE GLOBAL LONG1 LONG_BINGET LONG_BINPUT MARK NEWFALSE NEWOBJ NEWTRUE NONE PROTO REDUCE
    SETITEM SETITEMS SHORT_BINSTRING STOP TUPLE TUPLE1 TUPLE2 TUPLE3"""
SAFE_OPCODES = frozenset(_OPCODES.split())
_LARGEST_PICKLE = 64 << 20
_LEGACY_PICKLES = 5
"""Magic number, protocol, machine, the object, the keys of its storages: then raw numbers."""


def check_pickled_weights(path: Path, name: str) -> None:
    """Reads a torch file's pickle without running it.

    Raises:
        SpecInvalid: it names something that ``torch.load(weights_only=True)`` would refuse.
        IntegrityFailure: it is no torch file, or cut off.
    """
    try:
        with path.open("rb") as stream:
            if stream.read(4) != b"PK\x03\x04":
                stream.seek(0)
                for _ in range(_LEGACY_PICKLES):
                    _check_pickle(_Bounded(stream), path, name)
                return
        with zipfile.ZipFile(path) as archive:
            pickles = [item for item in archive.infolist() if item.filename.split("/")[-1] == "data.pkl"]
            for item in pickles:
                with archive.open(item) as member:
                    _check_pickle(_Bounded(member), path, name)
    except (ValueError, EOFError, zipfile.BadZipFile, NotImplementedError, RuntimeError) as error:
        raise _damaged(path, name, f"is no whole torch file ({error})") from error
    if not pickles:
        raise _damaged(path, name, "is a zip archive without data.pkl")


class _Bounded:
    """A stream that ends where no pickle of names and shapes goes on: lengths inside it are not trusted."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self._left = _LARGEST_PICKLE

    def read(self, count: int) -> bytes:
        return self._counted(self._stream.read(max(0, min(count, self._left))))

    def readline(self) -> bytes:
        return self._counted(self._stream.readline(self._left))

    def _counted(self, data: bytes) -> bytes:
        self._left -= len(data)
        return data


def _check_pickle(stream: _Bounded, path: Path, name: str) -> None:
    for opcode, argument, _ in pickletools.genops(stream):  # type: ignore[arg-type]
        if opcode.name == "GLOBAL":
            module, _, attribute = str(argument).partition(" ")
            found = f"{'builtins' if module == '__builtin__' else module}.{attribute}"
            if found not in SAFE_GLOBALS:
                raise SpecInvalid(
                    f"model {name}: {path.name} is a pickle that names {found}, which is not a tensor's part and could "
                    "run code; take the model as safetensors"
                )
        elif opcode.name not in SAFE_OPCODES:
            raise SpecInvalid(
                f"model {name}: {path.name} is a pickle with {opcode.name}, which torch.load(weights_only=True) does "
                "not read; take the model as safetensors"
            )
