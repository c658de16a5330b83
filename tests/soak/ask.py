"""Ask a served model, one request after the other, until stopped; print one line of JSON for each.

python -m tests.soak.ask http://10.93.17.2:8000/v1
"""

import asyncio
import itertools
import json
import time
from typing import Annotated

import openai
import typer

from examples.tiny_moe.data import MODEL_ID
from tests.soak.load import PROMPTS

TOKENS = 24  # of each answer
PATIENCE_SECONDS = 600  # as long as OpenAI's client has by itself


async def ask(client: openai.AsyncOpenAI) -> None:
    for prompt in itertools.cycle(PROMPTS):
        began, error, status = time.time(), "", 200
        try:
            answer = await client.completions.create(
                model=MODEL_ID, prompt=prompt, max_tokens=TOKENS, extra_body={"ignore_eos": True}
            )
            if not answer.usage or answer.usage.completion_tokens != TOKENS:
                error = f"the answer ended early: {answer.usage}"
        except openai.APIError as caught:
            error, status = f"{type(caught).__name__}: {caught}", getattr(caught, "status_code", None)
        print(json.dumps({"began": began, "ended": time.time(), "status": status, "error": error}), flush=True)
        if error:
            await asyncio.sleep(0.5)


async def ask_together(url: str, clients: int) -> None:
    client = openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0, timeout=PATIENCE_SECONDS)
    await asyncio.gather(*(ask(client) for _ in range(clients)))


def main(
    url: Annotated[str, typer.Argument(help="Base URL of the endpoint, with /v1.")],
    clients: Annotated[int, typer.Option(help="Clients that ask at the same time.")] = 4,
) -> None:
    asyncio.run(ask_together(url, clients))


if __name__ == "__main__":
    typer.run(main)
