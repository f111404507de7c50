"""The Python lines that load a published adapter: printed at a run's end, and held by its model card. Pure."""


def loading_code(model: str, folder: str, quantized: bool, new_tokens: bool) -> str:
    """Python that makes ``model`` out of base and adapter, and ``tokenizer`` beside it.

    Args:
        model: the base, as the user names it.
        folder: where the adapter is.
        quantized: whether the base was held in few bits (QLoRA).
        new_tokens: whether the adapter holds rows of new tokens.
    """
    names, before, more = "AutoModelForCausalLM, AutoTokenizer", [], ""
    if quantized:
        names += ", BitsAndBytesConfig"
        before = [
            f'with open({folder!r} + "/quantization_config.json") as file:',
            "    quantization = BitsAndBytesConfig.from_dict(json.load(file))",
        ]
        more = ', quantization_config=quantization, device_map="auto"'
    # The room only grows: embeddings may have more rows than the tokenizer has tokens.
    room = [
        "rows = max(len(tokenizer), base.get_input_embeddings().weight.shape[0])",
        "base.resize_token_embeddings(rows, mean_resizing=False)",
    ]
    code = [
        *(["import json", ""] if quantized else []),
        "from peft import PeftModel",
        f"from transformers import {names}",
        "",
        *before,
        f"base = AutoModelForCausalLM.from_pretrained({model!r}{more})",
        f"tokenizer = AutoTokenizer.from_pretrained({folder!r})",
        *(room if new_tokens else []),
        f"model = PeftModel.from_pretrained(base, {folder!r})",
    ]
    return "\n".join(code)
