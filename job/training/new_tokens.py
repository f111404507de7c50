"""New tokens: rows for them in embeddings and head, of which those alone train."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from job.errors import InternalError, SpecInvalid
from job.spec import JobSpec


@dataclass(frozen=True)
class Tokens:
    """New tokens, as the prepared tokenizer has them."""

    ids: tuple[int, ...]
    vocabulary: int
    """Tokens of the tokenizer, new ones included."""

    @classmethod
    def of(cls, spec: JobSpec, info: Mapping[str, Any]) -> "Tokens | None":
        """What ``prepared.json`` says of them; None where the spec names none."""
        return cls(tuple(info["new_tokens"]), int(info["vocabulary"])) if spec.lora.new_tokens else None


def make_room(base: Any, vocabulary: int) -> None:
    """Gives embeddings and head a row for each of ``vocabulary`` tokens; new rows begin as the mean of the old ones."""
    before = base.get_input_embeddings().weight.shape[0]
    if vocabulary <= before:
        return
    base.resize_token_embeddings(vocabulary, mean_resizing=False)
    base.requires_grad_(False)
    for part in (base.get_input_embeddings(), base.get_output_embeddings()):
        if part is not None and part.weight.device.type != "meta":
            part.weight.data[before:] = part.weight.data[:before].float().mean(0).to(part.weight.dtype)


def rows_of(base: Any, spec: JobSpec, tokens: Tokens | None) -> dict[str, list[int]] | None:
    """Rows that train, by the name of their layer: the embeddings, and the head unless it is the same tensor."""
    if not spec.lora.new_tokens:
        return None
    if tokens is None or not tokens.ids:
        raise InternalError("lora.new_tokens: nobody said which ids they have")
    head, embedding = base.get_output_embeddings(), base.get_input_embeddings()
    both = [embedding] if head is None else [embedding, head]
    names = [next(name for name, module in base.named_modules() if module is part) for part in both]
    endings = [name.rsplit(".", 1)[-1] for name in names]
    # Tied, the head trains along with the rows of the embeddings, and neither can be anything else beside that.
    for key, wanted in (("modules_to_save", spec.lora.modules_to_save), ("target_modules", spec.lora.target_modules)):
        given = () if isinstance(wanted, str) else wanted
        twice = [ending for ending in endings if ending in {name.rsplit(".", 1)[-1] for name in given}]
        if twice:
            raise SpecInvalid(
                f"lora.new_tokens: {twice[0]} is among lora.{key} and cannot have rows that train apart; "
                "leave it out there"
            )
    if head is None or head.weight is embedding.weight or base.config.tie_word_embeddings:
        endings = endings[:1]
    elif head.bias is not None:  # peft's layer for trained rows forgets it
        raise SpecInvalid("lora.new_tokens: this model's output head has a bias; use lora.modules_to_save instead")
    return {ending: list(tokens.ids) for ending in endings}
