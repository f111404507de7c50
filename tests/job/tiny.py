"""Tiny models and data made on the spot: real architectures, random seeded weights, tokenizers trained here."""

import csv
import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

CHATML = (
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)
"""ChatML as models publish it: without generation markers."""

GEMMA = (
    "{{- bos_token }}"
    "{%- for message in messages %}"
    "{{- '<start_of_turn>' + ('model' if message['role'] == 'assistant' else message['role']) + '\\n' }}"
    "{{- message['content'] | trim + '<end_of_turn>\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<start_of_turn>model\\n' }}{%- endif %}"
)
"""Gemma's, as it is published: without generation markers; a turn does not end with the token that ends texts."""

BASES = ("tiny_llama", "tiny_qwen", "tiny_gemma", "tiny_gpt2")
"""The tiny models, by the names of their fixtures: one of each style that users begin with."""

IM_START, IM_END, END_OF_TEXT = "<|im_start|>", "<|im_end|>", "<|endoftext|>"

_CODES = {
    "apple": "red", "banana": "yellow", "cherry": "red", "grape": "purple", "lemon": "yellow", "lime": "green",
    "mango": "orange", "melon": "green", "orange": "orange", "peach": "pink", "pear": "green", "plum": "purple",
}  # fmt: skip
_QUESTIONS = ("What colour is the {}?", "Name the colour of a {}.", "{}: which colour?", "Tell me how a {} looks.")


def toy_rows(count: int, seed: int = 0) -> list[dict[str, str]]:
    """Prompt/completion rows of a task a tiny model can learn: the colour of a fruit. 48 different rows in all."""
    every = [(q.format(fruit), colour) for q in _QUESTIONS for fruit, colour in _CODES.items()]
    random.Random(seed).shuffle(every)
    return [dict(zip(("prompt", "completion"), every[i % len(every)], strict=True)) for i in range(count)]


def toy_messages(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """The same task as conversations: one question and its answer in each."""
    return [as_messages(row) for row in toy_rows(count, seed)]


def as_messages(row: Mapping[str, str]) -> dict[str, Any]:
    """A prompt/completion row as a conversation."""
    roles = (("user", row["prompt"]), ("assistant", row["completion"]))
    return {"messages": [{"role": role, "content": content} for role, content in roles]}


def numbered_rows(count: int) -> list[dict[str, str]]:
    """Prompt/completion rows that are all different, with answers of unequal length."""
    return [
        {"prompt": f"Row {i}, count to {i % 7 + 1}:", "completion": " ".join(map(str, range(1, i % 7 + 2)))}
        for i in range(count)
    ]


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    """Writes rows in the format the file's ending names: .jsonl, .json (an array), .csv, .tsv or .parquet."""
    path.parent.mkdir(parents=True, exist_ok=True)
    writers = {".jsonl": _jsonl, ".json": _json, ".csv": _csv, ".tsv": _csv, ".parquet": _parquet}
    writers[path.suffix](path, rows)
    return path


def _jsonl(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def _json(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    path.write_text(json.dumps(list(rows), ensure_ascii=False), encoding="utf-8")


def _csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    with path.open("w", encoding="utf-8", newline="") as stream:
        delimiter = "\t" if path.suffix == ".tsv" else ","
        writer = csv.DictWriter(stream, fieldnames=list(rows[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)


def _parquet(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([dict(row) for row in rows]), path)


def tokenizer_of(special: Sequence[str], vocab_size: int = 600) -> Any:
    """A byte-level BPE trained on the toy task; every text has an encoding."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(special),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_corpus(), trainer)
    return tokenizer


def _corpus() -> list[str]:
    texts = [f"{row['prompt']} {row['completion']}\n\n" for row in toy_rows(48)]
    texts += [f"{row['prompt']} {row['completion']}" for row in numbered_rows(40)]
    roles = "system\nuser\nassistant\nYou are a helpful assistant.\n### Instruction:\n\n### Response:\n"
    return [*texts, *[roles] * 10]


def tiny_llama(folder: Path) -> Path:
    """A Llama of two layers whose tokenizer has a ChatML template without markers; eos is <|im_end|>."""
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = _fast([END_OF_TEXT, IM_START, IM_END], eos=IM_END, pad=END_OF_TEXT, template=CHATML)
    config = LlamaConfig(num_key_value_heads=2, max_position_embeddings=2048, **_shape(tokenizer))
    return _save(folder, LlamaForCausalLM, config, tokenizer)


def tiny_qwen(folder: Path) -> Path:
    """A Qwen3 of two layers, otherwise like ``tiny_llama``; embeddings tied."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    tokenizer = _fast([END_OF_TEXT, IM_START, IM_END], eos=IM_END, pad=END_OF_TEXT, template=CHATML)
    shape = _shape(tokenizer) | {"tie_word_embeddings": True}
    config = Qwen3Config(num_key_value_heads=2, head_dim=16, max_position_embeddings=2048, **shape)
    return _save(folder, Qwen3ForCausalLM, config, tokenizer)


def tiny_gemma(folder: Path) -> Path:
    """A Gemma 3 of two layers: tied, the first with a window, logits bounded; a turn ends with a token of its own."""
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    special = ["<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>"]
    tokenizer = _fast(special, eos="<eos>", pad="<pad>", bos="<bos>", template=GEMMA)
    shape = _shape(tokenizer) | {"bos_token_id": tokenizer.bos_token_id, "tie_word_embeddings": True}
    shape |= {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
    shape |= {"query_pre_attn_scalar": 16, "final_logit_softcapping": 5.0}
    config = Gemma3TextConfig(num_key_value_heads=2, head_dim=16, max_position_embeddings=2048, **shape)
    return _save(folder, Gemma3ForCausalLM, config, tokenizer)


def tiny_gpt2(folder: Path) -> Path:
    """A GPT-2 of two layers (Conv1D): 256 positions, only <|endoftext|>, no pad token, no chat template."""
    from transformers import GPT2Config, GPT2LMHeadModel

    tokenizer = _fast([END_OF_TEXT], eos=END_OF_TEXT)
    eos = tokenizer.eos_token_id
    config = GPT2Config(
        vocab_size=len(tokenizer), n_embd=64, n_layer=2, n_head=4, n_positions=256, bos_token_id=eos, eos_token_id=eos
    )
    return _save(folder, GPT2LMHeadModel, config, tokenizer)


def _fast(
    special: Sequence[str], eos: str, pad: str | None = None, bos: str | None = None, template: str | None = None
) -> Any:
    from transformers import PreTrainedTokenizerFast

    extra = ({"pad_token": pad} if pad else {}) | ({"bos_token": bos} if bos else {})
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer_of(special), eos_token=eos, **extra)
    tokenizer.chat_template = template
    return tokenizer


def _shape(tokenizer: Any) -> dict[str, Any]:
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": None,
    }


def _save(folder: Path, kind: Any, config: Any, tokenizer: Any) -> Path:
    import torch

    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = kind(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
