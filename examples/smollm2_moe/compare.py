"""SmolLM2-MoE beside the dense model: perplexity on held-out text, and the answers of both to the same questions.

    python -m examples.smollm2_moe.compare

Writes `comparison.json` and `answers.md` next to this file. Of the kinds of text, the recipe never saw `scripture` and
`neighbours`, `dialogue`, `opposites` and `mistakes`; of the others it saw other texts. The questions at the end are in
no file that it learned from.
"""

import json
import math
from pathlib import Path
from typing import Annotated, Any

import pyarrow.parquet as pq
import torch
import typer
from tqdm import tqdm
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from examples.smollm2_moe.assemble import CARVINGS
from examples.smollm2_moe.carving import load_carvings
from examples.smollm2_moe.dense import dense_model
from examples.smollm2_moe.questions import HELDOUT as CHATS
from examples.smollm2_moe.recipe import carved
from examples.tiny_moe.data import HELDOUT
from sere_dist.provenance import machine, rounded, versions

HERE = Path(__file__).parent
LENGTH, TEXTS = 256, 64  # tokens of a text, texts of a kind
QUESTIONS = (
    "What is the capital of France?",
    "What is the capital of Vietnam?",
    "What is 7 plus 5?",
    "Name three primary colors.",
    "Write a short poem about the sea.",
    'Return a JSON object with the keys "name" and "age" for a person called Ada who is 36.',
    "Why is the sky blue?",
    "Translate 'good morning' into Spanish.",
    "Write a Python function that returns the square of a number.",
    "Give me three tips for a job interview.",
)
NEW_TOKENS = 120


@torch.no_grad()
def loss(model: LlamaForCausalLM, texts: list[list[int]]) -> float:
    """Returns the mean loss per predicted token, in nats."""
    total, count = 0.0, 0
    for ids in texts:
        tokens = torch.tensor([ids])
        total += float(model(tokens, labels=tokens).loss) * (len(ids) - 1)
        count += len(ids) - 1
    return total / count


@torch.no_grad()
def answer(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, question: str) -> str:
    """Returns the greedy answer, cut after some tokens."""
    turns = [{"role": "user", "content": question}]
    prompt = str(tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False))
    ids = tokenizer(prompt, add_special_tokens=False).input_ids
    generator: Any = model
    whole = generator.generate(torch.tensor([ids]), max_new_tokens=NEW_TOKENS, do_sample=False)[0]
    return str(tokenizer.decode(whole[len(ids) :], skip_special_tokens=True)).strip()


def held_out_texts(tokenizer: PreTrainedTokenizerFast) -> dict[str, list[list[int]]]:
    """Returns token ids of texts by kind: the example model's kinds, and conversations about other topics."""
    kinds: dict[str, list[list[int]]] = {}
    for file, is_chat in ((HELDOUT, False), (CHATS, True)):
        for row in pq.read_table(file).to_pylist():
            text = row["text"] if is_chat else tokenizer.bos_token + row["text"]
            kinds.setdefault(row["kind"], []).append(tokenizer(text, add_special_tokens=False).input_ids[:LENGTH])
    return {kind: texts[:TEXTS] for kind, texts in kinds.items()}


def main(
    carving: Annotated[Path, typer.Option(help="The carving.")] = CARVINGS,
    output: Annotated[Path, typer.Option(help="Folder to write to.")] = HERE,
) -> None:
    dense, tokenizer = dense_model()
    moe = carved(dense, load_carvings(carving))
    kinds = {}
    for kind, texts in tqdm(held_out_texts(tokenizer).items(), desc="held-out text"):
        before, after = loss(dense, texts), loss(moe, texts)
        kinds[kind] = {
            "texts": len(texts),
            "perplexity_dense": rounded(math.exp(before)),
            "perplexity_moe": rounded(math.exp(after)),
            "times": rounded(math.exp(after - before)),
        }
        print(kind, kinds[kind], flush=True)
    report = {
        "command": "python -m examples.smollm2_moe.compare",
        "machine": machine(),
        "versions": versions("torch", "transformers"),
        "perplexity": kinds,
    }
    (output / "comparison.json").write_text(json.dumps(report, indent=1) + "\n")
    parts = ["# Answers of SmolLM2-135M-Instruct and of SmolLM2-MoE", f"Greedy, cut after {NEW_TOKENS} tokens."]
    for question in tqdm(QUESTIONS, desc="questions"):
        parts += [f"## {question}", "Dense:", quoted(answer(dense, tokenizer, question))]
        parts += ["Mixture of experts:", quoted(answer(moe, tokenizer, question))]
    (output / "answers.md").write_text("\n\n".join(parts) + "\n")


def quoted(text: str) -> str:
    return "\n".join(f"> {line}".rstrip() for line in text.splitlines())


if __name__ == "__main__":
    typer.run(main)
