"""Train the example model: a Qwen3-MoE of 12 million parameters with 64 experts, of which a token uses 8.

    python -m examples.tiny_moe.texts
    python -m examples.tiny_moe.train --minutes 90
    python -m examples.tiny_moe.train --start-from examples/tiny_moe/model --peak 1e-3 --output build/tiny_moe/longer

Runs on whatever device is there, for the time it is given: the learning rate follows the clock. Writes the tokenizer,
the bfloat16 checkpoint, `training.json` (loss by step, held-out perplexity by kind, device, versions) and a model card
into `--output`.
"""

import json
import math
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
import transformers
import typer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerFast, Qwen3MoeConfig, Qwen3MoeForCausalLM
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

HERE = Path(__file__).parent
END_OF_TEXT = "<|endoftext|>"
VOCABULARY = 4096
BALANCE = 0.01  # weight of the load-balancing loss
# The model has seen no conversation: a chat is the messages one after the other, and the answer continues them.
CHAT_TEMPLATE = "{% for message in messages %}{{ message['content'] }}\n{% endfor %}"


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=VOCABULARY,
            special_tokens=[END_OF_TEXT],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        ),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token=END_OF_TEXT, pad_token=END_OF_TEXT, chat_template=CHAT_TEMPLATE
    )


def model_config(context: int) -> Qwen3MoeConfig:
    return Qwen3MoeConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=32,  # ty: ignore[unknown-argument]  # the class does not declare it, but takes it
        num_experts=64,
        num_experts_per_tok=8,
        moe_intermediate_size=32,
        intermediate_size=256,
        norm_topk_prob=True,
        router_aux_loss_coef=0.0,  # see imbalance()
        max_position_embeddings=context,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
    )


def dense_experts(experts, hidden_states, top_k_index, top_k_weights):
    """Runs every expert on every token and weighs the unchosen ones with 0.

    Eight times the arithmetic of gathering each expert's tokens, in three large products instead of hundreds of small
    ones: with experts this small, compiled, twice as fast on a CPU.
    """
    num_tokens, hidden = hidden_states.shape
    num_experts, twice_inner, _ = experts.gate_up_proj.shape
    weights = torch.zeros(num_tokens, num_experts, dtype=hidden_states.dtype, device=hidden_states.device)
    weights = weights.scatter(1, top_k_index, top_k_weights.to(hidden_states.dtype))
    gate_up = F.linear(hidden_states, experts.gate_up_proj.reshape(num_experts * twice_inner, hidden))
    gate, up = gate_up.view(num_tokens, num_experts, twice_inner).chunk(2, dim=-1)
    inner = experts.act_fn(gate) * up * weights.unsqueeze(-1)
    return inner.flatten(1) @ experts.down_proj.transpose(1, 2).reshape(-1, hidden)


ALL_EXPERTS_FUNCTIONS.register("dense", dense_experts)


def imbalance(router_logits: tuple[torch.Tensor, ...], top_k: int) -> torch.Tensor:
    """Returns the load-balancing loss of Switch Transformer (1 when balanced), the mean over layers.

    transformers' own balances only the sum over all layers: a sixth of the experts of a layer then die.
    """
    losses = []
    for logits_TE in router_logits:
        num_experts = logits_TE.shape[1]
        chosen = torch.zeros_like(logits_TE).scatter(1, logits_TE.topk(top_k).indices, 1.0)
        load_E = chosen.float().mean(dim=0) / top_k
        losses.append(num_experts * (load_E * logits_TE.float().softmax(dim=1).mean(dim=0)).sum())
    return torch.stack(losses).mean()


def drawn(stream: torch.Tensor, batch: int, context: int) -> torch.Tensor:
    """Returns [batch, context]: pieces of a text, from anywhere in it."""
    starts = torch.randint(0, stream.numel() - context, (batch,))
    return torch.stack([stream[start : start + context] for start in starts])


def learning_rate(step: int, progress: float, peak: float) -> float:
    """Warm up over 100 steps, hold, and fall linearly to 2% of the peak over the last half of the time."""
    return peak * min((step + 1) / 100, max(0.02, min(1.0, 2 * (1 - progress))))


Losses = tuple[torch.Tensor, dict[str, torch.Tensor | float]]  # what is minimised, and what is logged, by name


def decayed(model: torch.nn.Module) -> list[dict[str, Any]]:
    """Returns the parameters in groups for the optimizer: matrices decay, vectors don't."""
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    return [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]


def fit(
    model: PreTrainedModel,
    parameters: list[dict[str, Any]],
    stream: torch.Tensor,
    losses: Callable[[torch.Tensor], Losses],
    minutes: float,
    batch: int,
    context: int,
    peak: float,
    *,
    after_step: Callable[[], dict[str, torch.Tensor | float]] = dict,
    latest: Path | None = None,
) -> tuple[int, list[dict[str, float]]]:
    """Trains a model for so many minutes on pieces of `stream`; returns the steps, and a log of every 50th.

    `after_step` may change the model, too; what it returns is logged. The model is saved in `latest` now and then.
    """
    optimizer = torch.optim.AdamW(parameters, betas=(0.9, 0.95), fused=True)
    log, step, started = [], 0, time.time()
    with tqdm(total=100, unit="%", mininterval=10, bar_format="{l_bar}{bar}| {elapsed} {postfix}") as bar:
        while (progress := (time.time() - started) / (60 * minutes)) < 1:
            ids = drawn(stream, batch, context).to(model.device)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, progress, peak)
            with torch.autocast(model.device.type, torch.bfloat16):
                minimised, logged = losses(ids)
            minimised.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            logged |= after_step()
            if step % 50 == 0:
                numbers = {name: round(float(value), 4) for name, value in logged.items()}
                log.append({"step": step, "seconds": round(time.time() - started)} | numbers)
                bar.n = 100 * progress
                bar.set_postfix(step=step, **numbers)
            if latest is not None and step % 500 == 499:
                model.save_pretrained(latest)
            step += 1
    return step, log


@torch.no_grad()
def perplexity(model: Qwen3MoeForCausalLM, tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> float:
    """Returns exp(mean negative log-likelihood a token) over `texts`, each scored on its own."""
    total, count = 0.0, 0
    for text in texts:
        ids = torch.tensor([tokenizer.encode(text)[: model.config.max_position_embeddings]], device=model.device)
        total += model(ids, labels=ids, output_router_logits=False).loss.item() * (ids.numel() - 1)
        count += ids.numel() - 1
    return math.exp(total / count)


@torch.no_grad()
def continuations(model: Qwen3MoeForCausalLM, tokenizer: PreTrainedTokenizerFast) -> dict[str, str]:
    """Returns what the model makes of the beginning of a text of each kind."""
    beginnings = {
        "scripture": "And the king answered and said unto",
        "dictionary": "sea lion (noun):",
        "manual": "The :mod:`socket` module",
    }
    written = {}
    for kind, beginning in beginnings.items():
        torch.manual_seed(0)
        ids = tokenizer(beginning, return_tensors="pt", return_token_type_ids=False).to(model.device)
        # The annotation of `generate` asks for attributes that no model of transformers declares.
        answer = model.generate(  # ty: ignore[invalid-argument-type]
            **ids, max_new_tokens=60, do_sample=True, temperature=0.7, top_k=0
        )
        assert isinstance(answer, torch.Tensor)
        (written[kind],) = tokenizer.batch_decode(answer, skip_special_tokens=True)
    return written


def card(report: dict) -> str:
    """Returns the model card: front matter, what the model is, and what was measured."""
    perplexities = "\n".join(f"| {kind} | {value:.2f} |" for kind, value in report["heldout_perplexity"].items())
    samples = "\n\n".join(f"**{kind}**\n\n```\n{text}\n```" for kind, text in report["continuations"].items())
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    return f"""---
library_name: transformers
pipeline_tag: text-generation
tags: [mixture-of-experts, qwen3_moe]
---

# tiny-moe

A Qwen3-MoE of {report["parameters"] / 1e6:.1f} million parameters, to try and test expert re-routing on: 6 layers, each
of 64 experts of which a token uses 8. It learned three kinds of text, and continues them; it knows no facts and holds
no conversation (a chat is its messages, one after the other, and the answer continues them). Context: 512 tokens.

Perplexity a token on held-out texts (`heldout.parquet`, each on its own, vocabulary of {VOCABULARY}):

| kind | perplexity |
|---|---|
{perplexities}

Trained on {report["tokens"] / 1e6:.1f} million tokens in {report["seconds"] / 60:.0f} minutes on {report["device"]}
({report["threads"]} threads; {versions}) by

    python -m examples.tiny_moe.texts
    python -m examples.tiny_moe.train --minutes {report["arguments"]["minutes"]:g}

What it writes (sampled at temperature 0.7, seed 0; the beginning is given):

{samples}

The texts and their licences: `../LICENSES.md`.
"""


def main(
    work: Annotated[Path, typer.Option(help="Folder that holds train.parquet.")] = Path("build/tiny_moe"),
    output: Annotated[Path, typer.Option(help="Folder to write checkpoint and tokenizer to.")] = HERE / "model",
    start_from: Annotated[
        Path | None, typer.Option(help="Checkpoint to train further, instead of a new model.")
    ] = None,
    minutes: Annotated[float, typer.Option(help="Training time in minutes.")] = 90,
    context: int = 512,
    batch: Annotated[int, typer.Option(help="Sequences per step.")] = 8,
    peak: Annotated[float, typer.Option(help="Peak learning rate.")] = 2e-3,
    seed: int = 0,
) -> None:
    torch.manual_seed(seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows = pq.read_table(work / "train.parquet").to_pylist()
    if start_from is None:
        tokenizer = train_tokenizer([row["text"] for row in rows])
    else:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(start_from)
    tokenizer.save_pretrained(output)
    encoded = tokenizer([row["text"] + END_OF_TEXT for row in rows])["input_ids"]
    stream = torch.tensor([token for ids in encoded for token in ids])
    print(f"{stream.numel() / 1e6:.1f} million tokens of training text")

    if start_from is None:
        model = Qwen3MoeForCausalLM._from_config(model_config(context), experts_implementation="dense").to(device)
    else:
        model = Qwen3MoeForCausalLM.from_pretrained(start_from, dtype=torch.float32, experts_implementation="dense")
        model = model.to(device).train()
    config = model.config
    compiled = torch.compile(model)
    print(f"{model.num_parameters() / 1e6:.2f} million parameters on {device}")

    def losses(ids: torch.Tensor) -> Losses:
        out = compiled(ids, labels=ids, output_router_logits=True)
        balance = imbalance(out.router_logits, config.num_experts_per_tok)
        return out.loss + BALANCE * balance, {"loss": out.loss, "imbalance": balance}

    started = time.time()
    step, log = fit(model, decayed(model), stream, losses, minutes, batch, context, peak, latest=work / "latest")

    model.to(torch.bfloat16).eval()
    model.save_pretrained(output)
    heldout = pq.read_table(HERE / "heldout.parquet").to_pylist()
    report = {
        "tokens": step * batch * context,
        "parameters": model.num_parameters(),
        "arguments": {
            "start_from": str(start_from) if start_from else None,
            "minutes": minutes,
            "context": context,
            "batch": batch,
            "peak": peak,
            "seed": seed,
        },
        "heldout_perplexity": {
            kind: round(perplexity(model, tokenizer, [row["text"] for row in heldout if row["kind"] == kind]), 3)
            for kind in sorted({row["kind"] for row in heldout})
        },
        "continuations": continuations(model, tokenizer),
        "seconds": round(time.time() - started),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else platform.processor() or "cpu",
        "threads": torch.get_num_threads(),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "log": log,
    }
    (output / "training.json").write_text(json.dumps(report, indent=1) + "\n")
    (output / "README.md").write_text(card(report))
    print(json.dumps(report["heldout_perplexity"]))


if __name__ == "__main__":
    typer.run(main)
