"""What a served model stands: requests that schemathesis makes up, and changes of settings under load.

    make soak                                                       # 5 minutes of each
    python -m tests.soak.fuzz --seconds 60 --schemathesis PATH/st   # its command, of an environment of its own

Serves the example model behind an API key and an admin token. Fuzzing sends every route what its OpenAPI document
allows and what it doesn't, then completions and chats what they can answer. Under load, clients ask for completions,
streamed or not, while the settings change every second. Before, between and after, greedy tokens without re-routing
must be the same.

Exits with 1 if a check failed. A server error (5xx) is a failure if our code raised it, or it is unknown whose did.
"""

import asyncio
import json
import random
import re
import secrets
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import urlparse

import httpx
import openai
import typer
from rich.table import Table

from examples.application import ROOT, calibrate, served
from examples.tiny_moe.data import MODEL_ID
from sere_dist.environment import ADMIN_TOKEN, API_KEY
from sere_dist.testing.local_cluster import LocalCluster, free_ports
from tests.soak.load import PROMPTS, Memory, finish, greedy_without_rerouting, is_flat, seeded

CLIENTS = 8
SETTLE_SECONDS = 5  # what a client gave up may still decode

TEXT = {"type": "string", "minLength": 1, "maxLength": 200}
SAMPLING = {
    "model": {"enum": [MODEL_ID]},
    "max_tokens": {"type": "integer", "minimum": 1, "maximum": 32},
    "min_tokens": {"type": "integer", "minimum": 0, "maximum": 1},
    "temperature": {"type": "number", "minimum": 0, "maximum": 2},
    "top_p": {"type": "number", "minimum": 0.01, "maximum": 1},
    "top_k": {"type": "integer", "minimum": -1, "maximum": 100},
    "n": {"type": "integer", "minimum": 1, "maximum": 4},
    "presence_penalty": {"type": "number", "minimum": -2, "maximum": 2},
    "frequency_penalty": {"type": "number", "minimum": -2, "maximum": 2},
    "seed": {"type": "integer", "minimum": 0, "maximum": 2**31},
    "stop": {"type": "array", "items": TEXT, "maxItems": 4},
    "ignore_eos": {"type": "boolean"},
    "stream": {"type": "boolean"},
    "vllm_xargs": {"enum": [{"sere": off} for off in ("off", "on", 0, 1)]},
}
ANSWERABLE = {  # vLLM's own document says too little: hardly a request made up from it is answered
    "/v1/completions": {"prompt": TEXT, "echo": {"type": "boolean"}, "logprobs": {"enum": [0, 5]}},
    "/v1/chat/completions": {
        "messages": {
            "type": "array",
            "minItems": 1,
            "maxItems": 4,
            "items": {
                "type": "object",
                "properties": {"role": {"enum": ["user", "assistant"]}, "content": TEXT},
                "required": ["role", "content"],
                "additionalProperties": False,
            },
        }
    },
}


def answerable_document(path: str) -> dict[str, Any]:
    """Returns an OpenAPI document of this route with requests that the model can answer, soon."""
    schema = {
        "type": "object",
        "properties": SAMPLING | ANSWERABLE[path],
        "required": ["model", "max_tokens", next(iter(ANSWERABLE[path]))],
        "additionalProperties": False,
    }
    body = {"required": True, "content": {"application/json": {"schema": schema}}}
    answers = {"200": {"description": "An answer."}}
    operation = {"requestBody": body, "responses": answers}
    return {"openapi": "3.1.0", "info": {"title": path, "version": "1"}, "paths": {path: {"post": operation}}}


def fuzz(cluster: LocalCluster, command: list, document: str, url: str, key: str) -> list[dict[str, Any]]:
    """Returns what schemathesis asked, by this command with options, and the answers, as a HAR file has them."""
    settings, har, log = (cluster.folder / name for name in ("schemathesis.toml", "fuzz.har", "fuzz.log"))
    settings.write_text(
        f'headers = {{ Authorization = "Bearer {key}" }}\n[[operations]]\ninclude-path = "/sere/settings"\n'
        f'headers = {{ Authorization = "Bearer {cluster.environment[ADMIN_TOKEN]}" }}\n'
    )
    st, *options = command
    line = [
        *(st, "--config-file", settings, "run", document, "--url", url, *options, "--checks", "not_a_server_error"),
        *("--continue-on-failure", "--workers", "4", "--request-timeout", "60", "--no-color"),
        *("--report", "har", "--report-har-path", har),
    ]
    with log.open("w") as file:
        done = subprocess.run(line, cwd=cluster.folder, stdout=file, stderr=file)
    if done.returncode not in (0, 1):  # 1: there were server errors
        raise SystemExit(f"error: schemathesis could not run:\n{log.read_text()}")
    return json.loads(har.read_text())["log"]["entries"]


def route(entry: dict[str, Any]) -> str:
    return f"{entry['request']['method']} {urlparse(entry['request']['url']).path}"


def server_errors(entries: list[dict[str, Any]], logs: Path) -> Iterator[dict[str, Any]]:
    """Yields one entry for each route and cause, with the shortest request that led to it."""
    text = "\n".join(log.read_text(errors="replace") for log in logs.glob("*.log"))
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for entry in entries:
        if entry["response"]["status"] < 500:
            continue
        request = entry["request"]
        headers = {header["name"]: header["value"] for header in entry["response"]["headers"]}
        whose, error, place = cause(text, headers.get("x-request-id", "none"))
        error = {
            "route": route(entry),
            "status": entry["response"]["status"],
            "whose": whose,
            "error": error,
            "raised_in": place,
            "request": request.get("postData", {}).get("text", ""),
        }
        found.setdefault((error["route"], place), []).append(error)
    for errors in found.values():
        yield {"times": len(errors)} | min(errors, key=lambda error: len(error["request"]))


def cause(log: str, request_id: str) -> tuple[str, str, str]:
    """Returns whose code raised the error that was logged under this id, the error, and the line of code."""
    logged = re.search(rf" while handling request {request_id}\n(.+?)(?:\n\n|\n[A-Z]+ \d{{4}}-|\Z)", log, re.DOTALL)
    if logged is None:
        return "unknown", "nothing in the log", "unknown"
    for path, line in reversed(re.findall(r'File "(.+?)", line (\d+)', logged[1])):
        place = path.rpartition("site-packages/")[2].removeprefix(f"{ROOT}/")
        package = place.split("/")[0]
        if package in ("serve_apps", "sere_dist", "ray", "vllm"):
            whose = package if package in ("ray", "vllm") else "ours"
            return whose, logged[1].splitlines()[-1][:200], f"{place}:{line}"
    return "unknown", logged[1].splitlines()[-1][:200], "unknown"


def tracebacks(entries: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yields an answer for each route and status that shows the server's insides. What a model writes is no leak."""
    seen = set()
    for entry in entries:
        status, text = entry["response"]["status"], entry["response"]["content"].get("text") or ""
        at = text.find("Traceback")
        if at >= 0 and (status >= 400 or '"error"' in text) and (route(entry), status) not in seen:
            seen.add((route(entry), status))
            asked = entry["request"].get("postData", {}).get("text", "")
            answer = text[max(0, at - 300) : at + 300].replace(str(ROOT), "")
            yield {"route": route(entry), "status": status, "request": asked, "answer": answer}


def rerouter_at_random() -> dict[str, Any]:
    fewest = random.randrange(5)
    return {
        "enabled": random.random() < 0.8,
        "rows": random.choice(("decode", "all")),
        "min_rows": fewest,
        "max_rows": random.choice((None, fewest + random.randrange(CLIENTS))),
        "select_top_k": random.randint(1, 8),
        "threshold": random.choice((0.0, random.random())),
    }


async def load(cluster: LocalCluster, url: str, key: str, seconds: int) -> dict[str, Any]:
    """Returns how many completions and changes there were, what went wrong, and how memory grew."""
    end = time.monotonic() + seconds
    answered, wrong, memory = Counter(), [], Memory(cluster)
    client = openai.AsyncOpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0)
    admin = httpx.AsyncClient(headers={"Authorization": f"Bearer {cluster.environment[ADMIN_TOKEN]}"}, timeout=60)

    async def ask() -> None:
        while time.monotonic() < end:
            asked, stream = random.randint(1, 64), random.random() < 0.5
            options = {"stream_options": {"include_usage": True}} if stream else {}
            xargs = {"vllm_xargs": {"sere": "off"}} if random.random() < 0.1 else {}
            prompt = random.choice(PROMPTS) * random.randint(1, 8)
            try:
                answer = await client.completions.create(
                    model=MODEL_ID,
                    prompt=prompt,
                    max_tokens=asked,
                    temperature=random.choice((0, 0.7)),
                    stream=stream,
                    extra_body={"ignore_eos": True, **xargs},
                    **options,
                )
                usages = [chunk.usage async for chunk in answer] if stream else [answer.usage]
                if [usage.completion_tokens for usage in usages[-1:] if usage] != [asked]:
                    wrong.append(f"{asked} tokens asked, stream {stream}: {usages[-1:]}")
            except (openai.APIError, httpx.HTTPError) as error:
                wrong.append(f"{type(error).__name__}: {error} {getattr(error, 'body', '')}")
            answered["streamed" if stream else "whole"] += 1

    async def change() -> None:
        while time.monotonic() < end:
            changes = rerouter_at_random()
            try:
                answer = await admin.patch(f"{url}/sere/settings", json=changes)
                if answer.status_code != 200:
                    wrong.append(f"{changes}: {answer.status_code} {answer.text}")
            except httpx.HTTPError as error:
                wrong.append(f"{changes}: {type(error).__name__}: {error}")
            answered["changes"] += 1
            await asyncio.sleep(1)

    async def watch() -> None:
        while time.monotonic() < end:
            await asyncio.to_thread(memory.sample)
            await asyncio.sleep(2)

    await asyncio.gather(change(), watch(), *(ask() for _ in range(CLIENTS)))
    return {"answered": dict(answered), "wrong": wrong, "memory": memory.growth()}


def settled_tokens(cluster: LocalCluster, url: str, key: str) -> list[list[int]]:
    time.sleep(SETTLE_SECONDS)
    return greedy_without_rerouting(cluster, url, key)


def soak(schemathesis: Path, seconds: int, seed: int) -> dict[str, Any]:
    key = secrets.token_hex(16)
    with LocalCluster() as cluster:
        calibrate(cluster, artifact=cluster.folder / "artifact")
        key_file, document = cluster.folder / "key", cluster.folder / "answerable.json"
        key_file.write_text(key)
        environment = {"env_vars": {f"{API_KEY}_FILE": str(key_file)}}
        ingress = {"num_replicas": 1, "ray_actor_options": {"runtime_env": environment}}
        with served(
            cluster, free_ports(1)[0], artifact=cluster.folder / "artifact", key=key, ingress=ingress
        ) as base_url:
            url = base_url.removesuffix("/v1")
            tokens = [settled_tokens(cluster, url, key)]
            command = [schemathesis.absolute(), "--seed", str(seed), "--max-time"]
            wild = [*command, str(seconds // 2), "--phases", "examples,coverage,fuzzing"]
            tame = [*command, str(seconds // 4), "--phases", "fuzzing", "--mode", "positive"]
            entries = fuzz(cluster, wild, f"{url}/openapi.json", url, key)
            for path in ANSWERABLE:
                document.write_text(json.dumps(answerable_document(path)))
                entries += fuzz(cluster, tame, str(document), url, key)
            tokens.append(settled_tokens(cluster, url, key))
            loaded = asyncio.run(load(cluster, url, key, seconds))
            tokens.append(settled_tokens(cluster, url, key))
            errors = list(server_errors(entries, cluster.folder / "session_latest" / "logs" / "serve"))
    answers = Counter((route(entry), entry["response"]["status"]) for entry in entries)
    unconfirmed = [entry["request"]["postData"]["text"] for entry in entries if entry["response"]["status"] == 202]
    leaks = list(tracebacks(entries))
    return {
        "requests": len(entries),
        "answers": {
            f"{what} {status}": times
            for (what, status), times in sorted(answers.items())
            if times > 9 or not 200 <= status < 500
        },
        "unconfirmed_changes": unconfirmed[:3],
        "server_errors": errors,
        "tracebacks": leaks,
        "load": loaded,
        "checks": {
            "no server error of ours": all(error["whose"] in ("ray", "vllm") for error in errors),
            "no traceback in an answer": not leaks and "Traceback" not in str(loaded["wrong"]),
            "every change of settings confirmed": not unconfirmed,
            "every completion whole": not loaded["wrong"],
            "memory bounded": is_flat(loaded["memory"]),
            "greedy tokens as before": tokens[0] == tokens[1] == tokens[2],
        },
    }


def details(result: dict[str, Any]) -> Iterator[Table]:
    table = Table("answers", "times", title=f"{result['requests']} requests made up")
    for answer, times in result["answers"].items():
        table.add_row(answer, str(times))
    yield table
    table = Table("route", "times", "whose", "error", "raised in", title="server errors")
    for error in result["server_errors"]:
        table.add_row(error["route"], str(error["times"]), error["whose"], error["error"], error["raised_in"])
    yield table
    table = Table("route", "status", "answer", title="tracebacks in answers")
    for leak in result["tracebacks"]:
        table.add_row(leak["route"], str(leak["status"]), leak["answer"])
    yield table
    answered = ", ".join(f"{times} {what}" for what, times in result["load"]["answered"].items())
    table = Table("process", "MiB early", "late", title=f"under load: {answered}, {len(result['load']['wrong'])} wrong")
    for process in result["load"]["memory"]:
        table.add_row(process["process"], str(process["early"]), str(process["late"]))
    yield table


def main(
    schemathesis: Annotated[
        Path, typer.Option(help="Path of schemathesis' command `st`.", exists=True, dir_okay=False)
    ],
    seconds: Annotated[int, typer.Option(help="Seconds of fuzzing, and of load.", min=4)] = 300,
    seed: Annotated[int | None, typer.Option(help="Seed of the requests. By default, it is drawn.")] = None,
    results: Annotated[Path, typer.Option(help="JSON file.")] = ROOT / "tests" / "soak" / "results" / "soak.json",
) -> None:
    seed = seeded(seed)
    version = subprocess.run([schemathesis.absolute(), "--version"], capture_output=True, text=True, check=True).stdout
    command = f"python -m tests.soak.fuzz --schemathesis .venv-soak/bin/st --seconds {seconds} --seed {seed}"
    result = soak(schemathesis, seconds, seed)
    finish("soak", command, result, details(result), results, schemathesis=version.split()[-1])


if __name__ == "__main__":
    typer.run(main)
