"""Train a model whose router is DeepSeek-V3's kind: sigmoid scores, groups of experts, a bias for balance.

    python -m examples.tiny_moe.texts
    python -m examples.tiny_moe.train_grouped --minutes 50

It learns the example model's training text. Writes the bfloat16 checkpoint, the tokenizer (the example model's),
`training.json` and a model card into `--output`.
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
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM, PreTrainedTokenizerFast
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE

from examples.tiny_moe.data import GROUPED, HELDOUT, MODEL
from examples.tiny_moe.train import (
    END_OF_TEXT,
    VOCABULARY,
    Losses,
    continuations,
    decayed,
    dense_experts,
    fit,
    perplexity,
)

BIAS_STEP = 0.001  # by which an expert's bias moves in a step (DeepSeek-V3, section 4.2)


def model_config(context: int) -> DeepseekV3Config:
    return DeepseekV3Config(
        vocab_size=VOCABULARY,
        hidden_size=192,
        num_hidden_layers=5,
        first_k_dense_replace=1,
        num_attention_heads=6,
        num_key_value_heads=6,
        q_lora_rank=96,
        kv_lora_rank=64,
        qk_nope_head_dim=32,
        qk_rope_head_dim=32,
        v_head_dim=32,
        intermediate_size=512,
        n_routed_experts=64,
        num_experts_per_tok=8,
        n_group=8,
        topk_group=4,
        moe_intermediate_size=32,
        n_shared_experts=1,
        routed_scaling_factor=2.5,
        norm_topk_prob=True,
        # As in DeepSeek-V3's own configuration: vLLM reads them, and transformers needs none of them.
        scoring_func="sigmoid",  # ty: ignore[unknown-argument]
        topk_method="noaux_tc",  # ty: ignore[unknown-argument]
        max_position_embeddings=context,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
    )


def counted_experts(experts, hidden_states, top_k_index, top_k_weights):
    """Like `dense_experts`; adds to `experts.load` how many tokens each expert was given."""
    ones = torch.ones(top_k_index.numel(), dtype=experts.load.dtype, device=experts.load.device)
    experts.load.index_add_(0, top_k_index.flatten(), ones)
    return dense_experts(experts, hidden_states, top_k_index, top_k_weights)


ALL_EXPERTS_FUNCTIONS.register("counted", counted_experts)


@torch.no_grad()
def balance(moes: list[DeepseekV3MoE]) -> float:
    """Moves the bias of each expert towards an even load, and starts counting anew.

    Returns the load of the busiest expert, as a multiple of the mean, of the worst layer.
    """
    worst = 0.0
    for moe in moes:
        load_E = moe.experts.get_buffer("load")
        moe.gate.get_buffer("e_score_correction_bias").add_((load_E.mean() - load_E).sign(), alpha=BIAS_STEP)
        worst = max(worst, float(load_E.max() / load_E.mean()))
        load_E.zero_()
    return worst


def card(report: dict) -> str:
    """Returns the model card: front matter, what the model is, and what was measured."""
    perplexities = "\n".join(f"| {kind} | {value:.2f} |" for kind, value in report["heldout_perplexity"].items())
    samples = "\n\n".join(f"**{kind}**\n\n```\n{text}\n```" for kind, text in report["continuations"].items())
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    return f"""---
library_name: transformers
pipeline_tag: text-generation
tags: [mixture-of-experts, deepseek_v3]
---

# tiny-grouped

A model of DeepSeek-V3's kind with {report["parameters"] / 1e6:.1f} million parameters, to judge expert re-routing on: a
router with sigmoid scores, which takes 8 of 64 experts out of 4 of 8 groups; a shared expert; a bias for each expert
that keeps the load even; latent attention. Five layers, of which the first is dense. It learned the texts of `../model`
and has its tokenizer. Context: 512 tokens. vLLM can't serve it, as its latent attention takes larger heads alone.

Perplexity a token on held-out texts (`heldout.parquet`, each on its own, vocabulary of {VOCABULARY}):

| kind | perplexity |
|---|---|
{perplexities}

Trained on {report["tokens"] / 1e6:.1f} million tokens in {report["seconds"] / 60:.0f} minutes on {report["device"]}
({report["threads"]} threads; {versions}) by

    python -m examples.tiny_moe.texts
    python -m examples.tiny_moe.train_grouped --minutes {report["arguments"]["minutes"]:g}

What it writes (sampled at temperature 0.7, seed 0; the beginning is given):

{samples}

The texts and their licences: `../LICENSES.md`.
"""


def main(
    work: Annotated[Path, typer.Option(help="Folder that holds train.parquet.")] = Path("build/tiny_moe"),
    output: Annotated[Path, typer.Option(help="Folder to write the checkpoint to.")] = GROUPED,
    minutes: Annotated[float, typer.Option(help="Training time in minutes.")] = 50,
    context: int = 512,
    batch: Annotated[int, typer.Option(help="Sequences per step.")] = 8,
    peak: Annotated[float, typer.Option(help="Peak learning rate.")] = 2e-3,
    seed: int = 0,
) -> None:
    torch.manual_seed(seed)
    rows = pq.read_table(work / "train.parquet").to_pylist()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(MODEL)
    tokenizer.save_pretrained(output)
    encoded = tokenizer([row["text"] + END_OF_TEXT for row in rows])["input_ids"]
    stream = torch.tensor([token for ids in encoded for token in ids])

    model = DeepseekV3ForCausalLM._from_config(model_config(context), experts_implementation="counted")
    moes = [module for module in model.modules() if isinstance(module, DeepseekV3MoE)]
    for moe in moes:
        moe.experts.register_buffer("load", torch.zeros(model.config.n_routed_experts), persistent=False)
    compiled = torch.compile(model)
    print(f"{model.num_parameters() / 1e6:.2f} million parameters, {stream.numel() / 1e6:.1f} million tokens")

    def losses(ids: torch.Tensor) -> Losses:
        loss = compiled(ids, labels=ids).loss
        return loss, {"loss": loss}

    started = time.time()
    step, log = fit(
        *(model, decayed(model), stream, losses, minutes, batch, context, peak),
        after_step=lambda: {"busiest": balance(moes)},
        latest=work / "latest",
    )

    biases = [moe.gate.e_score_correction_bias.clone() for moe in moes]
    model.to(torch.bfloat16).eval()
    for moe, bias in zip(moes, biases, strict=True):  # transformers loads it in float32, whatever the dtype
        moe.gate.e_score_correction_bias = bias
    model.save_pretrained(output)
    heldout = pq.read_table(HELDOUT).to_pylist()
    report = {
        "tokens": step * batch * context,
        "parameters": model.num_parameters(),
        "arguments": {"minutes": minutes, "context": context, "batch": batch, "peak": peak, "seed": seed},
        "heldout_perplexity": {
            kind: round(perplexity(model, tokenizer, [row["text"] for row in heldout if row["kind"] == kind]), 3)
            for kind in sorted({row["kind"] for row in heldout})
        },
        "continuations": continuations(model, tokenizer),
        "seconds": round(time.time() - started),
        "device": platform.processor() or "cpu",
        "threads": torch.get_num_threads(),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "log": log,
    }
    (output / "training.json").write_text(json.dumps(report, indent=1) + "\n")
    (output / "README.md").write_text(card(report))
    print(json.dumps(report["heldout_perplexity"]))


if __name__ == "__main__":
    typer.run(main)
