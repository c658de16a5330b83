"""Train a draft model for the example model: a dense Qwen3 of two layers, for speculative decoding.

    python -m examples.tiny_moe.texts
    python -m examples.tiny_moe.train_draft --minutes 20

It learns the example model's training text. Writes the bfloat16 checkpoint, `training.json` and a model card into
`--output`; the tokenizer is the example model's.
"""

import json
import platform
import time
from pathlib import Path
from typing import Annotated

import pyarrow.parquet as pq
import torch
import transformers
import typer
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM, Qwen3MoeForCausalLM

from examples.tiny_moe.data import DRAFT, FOLDER, MODEL
from examples.tiny_moe.train import END_OF_TEXT, VOCABULARY, Losses, fit


def model_config(context: int) -> Qwen3Config:
    return Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        intermediate_size=384,
        max_position_embeddings=context,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
    )


@torch.no_grad()
def agreement(model: Qwen3ForCausalLM, teacher: Qwen3MoeForCausalLM, batches: torch.Tensor) -> float:
    """Returns the share of positions at which both models' likeliest next token is the same."""
    same = [(model(ids).logits.argmax(-1) == teacher(ids).logits.argmax(-1)).float().mean() for ids in batches]
    return float(torch.stack(same).mean())


def card(report: dict) -> str:
    return f"""---
library_name: transformers
pipeline_tag: text-generation
---

# Draft model of tiny-moe

A dense Qwen3 of {report["parameters"] / 1e6:.1f} million parameters and two layers, which drafts for `../model` in
speculative decoding. On held-out text its likeliest next token is the example model's at {report["agreement"]:.0%} of
the positions.

Trained on {report["tokens"] / 1e6:.1f} million tokens in {report["seconds"] / 60:.0f} minutes on {report["device"]} by

    python -m examples.tiny_moe.texts
    python -m examples.tiny_moe.train_draft --minutes {report["arguments"]["minutes"]:g}

The texts and their licences: `../LICENSES.md`.
"""


def main(
    work: Annotated[Path, typer.Option(help="Folder that holds train.parquet.")] = Path("build/tiny_moe"),
    output: Annotated[Path, typer.Option(help="Folder to write the checkpoint to.")] = DRAFT,
    minutes: Annotated[float, typer.Option(help="Training time in minutes.")] = 20,
    context: int = 256,
    batch: Annotated[int, typer.Option(help="Sequences per step.")] = 16,
    peak: Annotated[float, typer.Option(help="Peak learning rate.")] = 4e-3,
    seed: int = 0,
) -> None:
    torch.manual_seed(seed)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(MODEL)

    def stream(path: Path) -> torch.Tensor:
        rows = pq.read_table(path).to_pylist()
        return torch.tensor([token for row in rows for token in tokenizer.encode(row["text"] + END_OF_TEXT)])

    tokens, held_out = stream(work / "train.parquet"), stream(FOLDER / "heldout.parquet")
    model = Qwen3ForCausalLM._from_config(model_config(512))
    compiled = torch.compile(model)

    def losses(ids: torch.Tensor) -> Losses:
        loss = compiled(ids, labels=ids).loss
        return loss, {"loss": loss}

    started = time.time()
    parameters = [{"params": list(model.parameters()), "weight_decay": 0.1}]
    step, log = fit(model, parameters, tokens, losses, minutes, batch, context, peak)

    model.to(torch.bfloat16).eval()
    model.save_pretrained(output)
    teacher = Qwen3MoeForCausalLM.from_pretrained(MODEL, dtype=torch.bfloat16).eval()
    batches = held_out[: len(held_out) // context * context].view(-1, context).split(16)[:8]
    report = {
        "tokens": step * batch * context,
        "parameters": model.num_parameters(),
        "arguments": {"minutes": minutes, "context": context, "batch": batch, "peak": peak, "seed": seed},
        "agreement": round(agreement(model, teacher, batches), 4),
        "seconds": round(time.time() - started),
        "device": platform.processor() or "cpu",
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "log": log,
    }
    (output / "training.json").write_text(json.dumps(report, indent=1) + "\n")
    (output / "README.md").write_text(card(report))
    print(json.dumps({"agreement": report["agreement"]}))


if __name__ == "__main__":
    typer.run(main)
