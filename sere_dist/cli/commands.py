"""The command `sere-dist`. Each command imports what it needs by itself, so that `--help` answers at once."""

import json
import shlex
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
import yaml
from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:  # imported where seconds count
    from transformers import PreTrainedModel

    from sere_dist.artifact.folder import Artifact

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
ArtifactArgument = Annotated[
    str, typer.Argument(help="Folder of the artifact, or its name on the Hub: hf://ORG/NAME or hf://ORG/NAME@REVISION.")
]
Objective = Literal["throughput", "latency"]  # of a plan
STYLES = {"ok": "green", "warning": "yellow", "fail": "bold red"}  # of a check of `doctor`


@app.callback()
def main() -> None:
    """Similarity-based expert re-routing for Mixture-of-Experts models."""


@app.command()
def inspect(path: ArtifactArgument) -> None:
    """Check an artifact and describe it."""
    from sere_dist.artifact.folder import Artifact
    from sere_dist.artifact.layer import LayerStatistics
    from sere_dist.artifact.schema import ArtifactError
    from sere_dist.artifact.sources import Service, services

    try:
        artifact = Artifact.load(path)
    except ArtifactError as error:
        raise SystemExit(f"error: {error}") from error
    config = artifact.config
    facts = Table(title=path, show_header=False, title_justify="left")
    facts.add_row("base model", config.base_model + (f" at {config.revision}" if config.revision else ""))
    facts.add_row("architecture", f"{config.architecture}, {config.num_layers} layers, hidden {config.hidden_size}")
    facts.add_row("experts", f"{config.num_experts} per layer, {config.num_experts_per_token} per token")
    facts.add_row("method", config.method + (f", {config.kernel} kernel" if config.kernel else ""))
    facts.add_row("calibrated on", config.data)
    facts.add_row("with", ", ".join(f"{name} {version}" for name, version in config.versions.items()))
    facts.add_row("SHA-256", config.tensors_sha256)
    tuned = artifact.recommended
    facts.add_row("recommended", str(tuned or "nothing yet: run python -m calibration_jobs.tune"))
    headings = (*LayerStatistics.HEADINGS, *(("recommended",) if tuned else ()))
    layers = Table(*headings, box=box.SIMPLE, padding=0)  # narrow: there are many
    for row in (layer.statistics for layer in artifact.layers.values()):
        layers.add_row(*row.cells(), *([str(tuned.layers[row.layer])] if tuned else []))
    console = Console()
    console.print(facts)
    console.print(layers)
    if served := services(row for layer in artifact.layers.values() for row in layer.sources):
        sources = Table(*Service.HEADINGS, box=box.SIMPLE, padding=0)
        sources.columns[0].overflow = "fold"
        for service in served:
            sources.add_row(*service.cells())
        console.print(sources)


@app.command()
def report(
    path: ArtifactArgument,
    output: Annotated[Path, typer.Option(help="HTML file to write.")] = Path("report.html"),
) -> None:
    """Draw an artifact as one HTML page, with a heat map of the similarities per layer."""
    from sere_dist.artifact.folder import Artifact
    from sere_dist.artifact.schema import ArtifactError
    from sere_dist.cli.report import write_report

    try:
        write_report(Artifact.load(path), output)
    except (ArtifactError, OSError) as error:
        raise SystemExit(f"error: {error}") from error
    print(f"wrote {output}")


@app.command()
def place(
    path: ArtifactArgument,
    ranks: Annotated[int, typer.Option(help="Number of expert-parallel ranks.")],
    nodes: Annotated[
        int, typer.Option(help="Number of nodes, each with as many ranks. Experts used together share one.", min=1)
    ] = 1,
    redundant: Annotated[
        int, typer.Option(help="Number of replicas per layer, for the most loaded experts.", min=0)
    ] = 0,
    output: Annotated[Path, typer.Option(help="JSON file to write.")] = Path("placement.json"),
    max_load: Annotated[
        float,
        typer.Option(
            min=1, help="Largest load of a rank: the tokens routed to its experts, divided by the mean over ranks."
        ),
    ] = 1.1,
) -> None:
    """Propose which rank should hold which expert, so that tokens cross ranks less often and loads are even.

    With replicas the file has the map of vLLM's EPLB, which vLLM itself loads from no file.
    """
    from sere_dist.artifact.folder import Artifact
    from sere_dist.artifact.placement import PlacementError, propose, propose_replicas
    from sere_dist.artifact.schema import ArtifactError
    from sere_dist.console import progress, tables

    console = tables()
    shown = partial(track, description="layers", console=progress())
    try:
        artifact = Artifact.load(path)
        if redundant:
            placement = propose_replicas(artifact, ranks, redundant, max_load, progress=shown, num_nodes=nodes)
        else:
            placement = propose(artifact, ranks, max_load, progress=shown, num_nodes=nodes)
        placement.save(output)
    except (ArtifactError, PlacementError, OSError) as error:
        raise SystemExit(f"error: {error}") from error
    guess = " (a guess)" * (placement.affinity == "similarity")
    table = Table(
        "layer",
        "remote ranks of a token with two experts" + guess,
        *(["remote nodes" + guess] if nodes > 1 else []),
        "largest rank's tokens, over the mean",
        title=f"vLLM's placement on {ranks} ranks -> this one" + f", with {redundant} replicas" * bool(redundant),
        title_justify="left",
    )
    for layer, placed in placement.layers.items():
        row = [str(layer), f"{placed.remote_domains_linear:.2f} -> {placed.remote_domains:.2f}"]
        if placed.remote_nodes is not None:
            row.append(f"{placed.remote_nodes_linear:.2f} -> {placed.remote_nodes:.2f}")
        table.add_row(*row, f"{placed.load_linear:.2f} -> {placed.load:.2f}")
    console.print(table)
    if placement.affinity == "similarity":
        console.print("The artifact has no coactivation: which experts tokens use together is guessed from similarity.")
    if redundant:
        console.print('vLLM takes this map from no file: docs/guides.md, "Place experts", says what it is for.')
    print(f"wrote {output}")


@app.command()
def push(
    folder: Annotated[Path, typer.Argument(help="Folder of the artifact.")],
    repository: Annotated[str, typer.Argument(help="Repository of the Hugging Face Hub, ORG/NAME.")],
) -> None:
    """Push an artifact to the Hugging Face Hub, in one commit. A repository that is missing is made, a private one."""
    from sere_dist.artifact.folder import Artifact
    from sere_dist.artifact.hub import push as push_folder
    from sere_dist.artifact.schema import ArtifactError
    from sere_dist.files import is_repository

    if not is_repository(repository):
        raise SystemExit(f"error: {repository} is no repository of the Hub: write ORG/NAME")
    try:
        Artifact.load(folder)  # nothing is pushed that would not load
        push_folder(folder, repository)
    except (ArtifactError, OSError) as error:
        raise SystemExit(f"error: {error}") from error


@app.command()
def accuracy(
    url: Annotated[str, typer.Argument(help="Base URL of the endpoint, with /v1.")],
    suite: Annotated[str, typer.Option(help="Tasks to run: paper, paper_chat, or a YAML file of lm-eval.")],
    concurrency: Annotated[int, typer.Option(help="Requests at a time, which decode in one batch.", min=1)] = 16,
    model: Annotated[
        str | None, typer.Option(help="Name of the model at the endpoint. Not needed if it serves only one.")
    ] = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="Send requests to /chat/completions instead of /completions.")
    ] = False,
    max_tokens: Annotated[
        int, typer.Option(help="Longest answer in tokens, for tasks that do not set their own limit.", min=1)
    ] = 1024,
    gen_kwargs: Annotated[
        str, typer.Option(help="JSON object of request parameters, which replace those of the tasks.")
    ] = "{}",
    limit: Annotated[
        int | None, typer.Option(help="Number of documents per task, for a trial run. The first ones are used.", min=2)
    ] = None,
    run_model_code: Annotated[
        bool,
        typer.Option("--run-model-code", help="Allow tasks to run code that the model writes, on this machine."),
    ] = False,
    results: Annotated[Path | None, typer.Option(help="JSON file to add the results to.")] = None,
) -> None:
    """Score a served model on tasks of lm-eval, with re-routing off and on.

    The command needs the admin token (SERE_ADMIN_TOKEN): it switches re-routing, and restores the setting afterwards.
    """
    try:
        from sere_dist.evaluation.accuracy import Evaluation, run
    except ModuleNotFoundError as error:
        raise SystemExit(
            f"error: {error}. The harness is the extra `eval`: install it with pip install '.[eval]' in the "
            "repository of sere_dist, or pip install 'WHEEL[eval]' with the path of a wheel"
        ) from error

    try:
        parameters = json.loads(gen_kwargs)
    except ValueError as error:
        raise SystemExit(f"error: --gen-kwargs is not JSON: {error}") from error
    if not isinstance(parameters, dict):
        raise SystemExit("error: --gen-kwargs must be a JSON object")
    run(Evaluation(url, suite, concurrency, model, chat, max_tokens, parameters, limit, run_model_code), results)


settings_app = typer.Typer(no_args_is_help=True, help="Read or change the settings of a serving application.")
app.add_typer(settings_app, name="settings")
Url = Annotated[str, typer.Option(help="URL of the application.")]


@settings_app.command()
def get(url: Url = "http://127.0.0.1:8000") -> None:
    """Show the settings in force, and how many replicas run them."""
    show_settings(url)


Assignments = Annotated[
    list[str], typer.Argument(help="New values, such as select_top_k=4 enabled=false.", metavar="NAME=VALUE")
]


@settings_app.command(name="set")
def set_settings(settings: Assignments, url: Url = "http://127.0.0.1:8000") -> None:
    """Change settings on every replica, without a restart. This ends a trial."""
    show_settings(url, pairs(settings))


@settings_app.command(name="try")
def try_settings(
    settings: Assignments,
    replicas: Annotated[
        int | None, typer.Option(help="Number of replicas that try the settings. All do by default.", min=1)
    ] = None,
    take_back_if: Annotated[
        list[str] | None,
        typer.Option(
            help="Limit of what a replica that takes part may measure, such as inter_token_ms=40. The trial ends by "
            "itself beyond it. Give the option once for each limit.",
            metavar="MEASURE=LIMIT",
        ),
    ] = None,
    url: Url = "http://127.0.0.1:8000",
) -> None:
    """Try settings on some replicas, or on all until a limit is exceeded. `set` makes them the settings of all."""
    trial: dict[str, Any] = {"changes": pairs(settings), "take_back_if": pairs(take_back_if or [])}
    show_settings(url, trial=trial | ({} if replicas is None else {"replicas": replicas}))


@settings_app.command()
def end_trial(url: Url = "http://127.0.0.1:8000") -> None:
    """End the trial: every replica runs the settings in force."""
    show_settings(url, ends_trial=True)


@settings_app.command()
def pin(url: Url = "http://127.0.0.1:8000") -> None:
    """Stop the application's controller at the price in force. `set` of a price does the same."""
    show_settings(url, pinned=True)


@settings_app.command()
def unpin(url: Url = "http://127.0.0.1:8000") -> None:
    """Let the application's controller choose the price again."""
    show_settings(url, pinned=False)


def pairs(assignments: list[str]) -> dict[str, Any]:
    """Returns what NAME=VALUE say."""
    parts = [assignment.partition("=") for assignment in assignments]
    if wrong := [name for name, equals, _value in parts if not equals]:
        raise SystemExit(f"error: {', '.join(wrong)}: write each as NAME=VALUE")
    try:
        return {name: yaml.safe_load(value) for name, _equals, value in parts}
    except yaml.YAMLError as error:
        raise SystemExit(f"error: a value can't be read: {error}") from error


def show_settings(
    url: str,
    changes: dict[str, Any] | None = None,
    *,
    trial: dict[str, Any] | None = None,
    ends_trial: bool = False,
    pinned: bool | None = None,
) -> None:
    from sere_dist.admin import AdminError, pin_price, request_settings, request_trial

    try:
        if pinned is not None:
            state = pin_price(url, pinned)
        else:
            state = request_trial(url, trial) if trial or ends_trial else request_settings(url, changes)
    except AdminError as error:
        raise SystemExit(f"error: {error}") from error
    table = Table("setting", "value")
    tried = (state["trial"] or {}).get("changes", {})
    for name, value in state["settings"].items():
        table.add_row(name, f"{value} (on trial: {tried[name]})" if name in tried else str(value))
    console = Console()
    console.print(table)
    if state["measured"]:
        console.print(measured_table(state))
    if state["taken_back"]:
        console.print(f"the last trial was taken back: {state['taken_back']}")
    if control := state["control"]:
        price = "pinned; the controller stands" if control["pinned"] else "chosen by the controller"
        console.print(f"the price is {price}: {control['why']}")
    running = len(state["replicas"]) - len(state["pending"])
    console.print(f"{running} of {len(state['replicas'])} replicas run these settings")
    if state["pending"]:
        raise SystemExit(
            f"pending: {', '.join(state['pending'])}; they will follow; ask again with `sere-dist settings get`"
        )


def measured_table(state: dict[str, Any]) -> Table:
    """Returns what the replicas measured since their settings last changed, those of a trial beside the others."""
    names = list(dict.fromkeys(name for measured in state["measured"].values() for name in measured))
    triers = (state["trial"] or {}).get("triers", ())
    table = Table("replica", "on trial", *names)
    for replica, measured in state["measured"].items():
        values = (f"{measured[name]:.4g}" if name in measured else "" for name in names)
        table.add_row(replica, "yes" if replica in triers else "", *values)
    return table


@app.command()
def doctor(
    artifact: Annotated[
        str | None, typer.Option(help="Folder of an artifact to check, or its name on the Hub.")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Checkpoint folder or Hugging Face id of the model that the artifact must fit.")
    ] = None,
    ray_address: Annotated[
        str | None,
        typer.Option(envvar="RAY_ADDRESS", help="Ray cluster to check. Without an address, none is checked."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the findings as a JSON list.")] = False,
) -> None:
    """Check whether this machine is ready to calibrate and to serve. The exit status is 1 if a check failed."""
    from sere_dist.cli.doctor import examine

    if model is not None and artifact is None:
        raise typer.BadParameter("give --artifact too: the model is compared with it", param_hint="--model")
    console = Console()
    findings = []
    for finding in examine(artifact, model, ray_address):
        findings.append(finding)
        if not as_json:
            line = Text.assemble((f"{finding.status:9}", STYLES[finding.status]), f"{finding.check:10}{finding.found}")
            console.print(line + Text(f" -> {finding.advice}" if finding.advice else ""), soft_wrap=True)
    if as_json:
        print(json.dumps([asdict(finding) for finding in findings], indent=2))
    raise typer.Exit(int(any(finding.status == "fail" for finding in findings)))


def without_weights(
    model: str, bits: float | None, artifact: str | None
) -> "tuple[PreTrainedModel, float, Artifact | None]":
    """Returns a model on the meta device, the stored bytes of one of its parameters, and its artifact if one is named.

    Raises:
        ValueError: the model's configuration or the artifact can't be read, or the artifact is another model's.
    """
    from sere_dist.artifact.folder import Artifact
    from sere_dist.calibration.checkpoint import Checkpoint
    from sere_dist.moe import MoeShape

    checkpoint = Checkpoint(model)
    empty = checkpoint.empty_model()
    stored = bits / 8 if bits else checkpoint.stored_bytes(empty.num_parameters())
    known = None if artifact is None else Artifact.load(artifact)
    if known is not None:
        known.check_serves(MoeShape.from_config(checkpoint.config), model, checkpoint.revision)
    return empty, stored, known


@app.command()
def forecast(
    model: Annotated[str, typer.Option(help="Checkpoint folder or Hugging Face id; only its configuration is read.")],
    hardware: Annotated[str, typer.Option(help="What it runs on: a GPU's name in small letters, such as h100.")],
    artifact: Annotated[
        str | None,
        typer.Option(help="The model's artifact, in a folder or on the Hub: how popular experts are, what was tuned."),
    ] = None,
    batches: Annotated[str, typer.Option(help="Requests that decode together, with commas.")] = "1,4,16,64,128,256",
    prompt: Annotated[int, typer.Option(help="Tokens of a prompt, as a mean.")] = 512,
    answer: Annotated[int, typer.Option(help="Tokens of an answer, as a mean.")] = 256,
    ranks: Annotated[int, typer.Option(help="Tensor-parallel ranks of a replica.")] = 1,
    host_ms: Annotated[
        float | None, typer.Option(help="Milliseconds that the host takes for a step, if you have measured them.")
    ] = None,
    bits: Annotated[
        float | None, typer.Option(help="Bits of a weight. By default, as the checkpoint stores it.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the forecasts as a JSON list.")] = False,
) -> None:
    """Predict whether re-routing will help, before anything is calibrated: decode times by batch, and a verdict."""
    from sere_dist.cli import forecast as told
    from sere_dist.console import tables
    from sere_dist.forecast import DEVICES, ModelCost

    if hardware not in DEVICES:
        raise typer.BadParameter(f"no numbers of {hardware!r}: choose {', '.join(DEVICES)}", param_hint="--hardware")
    device = DEVICES[hardware]
    if host_ms is not None:
        device = replace(device, host_seconds=host_ms / 1e3)
    try:
        rows = [int(batch) for batch in batches.split(",")]
        empty, stored, known = without_weights(model, bits, artifact)
        cost = ModelCost.of(empty, stored).on_ranks(ranks)
    except ValueError as error:
        raise SystemExit(f"error: {error}") from error
    load = told.Load(prompt, answer)
    found = told.forecast(cost, device, load, rows, known)
    if as_json:
        print(json.dumps([each.numbers() for each in found], indent=2))
        return
    console = tables()
    on = f"{model} on {device.name}" + (f", {ranks} tensor-parallel ranks" if ranks > 1 else "")
    console.print(f"{on}: {device.source}", highlight=False)
    table = Table("batch", "setting", "active experts", "ms per step", "experts", "times faster", "with prefill")
    for each in found:
        table.add_row(*told.as_cells(each))
    console.print(table)
    console.print(told.verdict(found, cost, device, load, known), highlight=False)


@app.command()
def plan_serving(
    model: Annotated[str, typer.Option(help="Checkpoint folder or Hugging Face id; only its configuration is read.")],
    gpus: Annotated[int, typer.Option(help="Number of GPUs, of all nodes together.", min=1)],
    hardware: Annotated[str, typer.Option(help="The GPU, in small letters, such as h100.")],
    nodes: Annotated[int, typer.Option(help="Number of nodes, each with as many of the GPUs.", min=1)] = 1,
    artifact: Annotated[
        str | None,
        typer.Option(help="The model's artifact, in a folder or on the Hub: how popular experts are, what was tuned."),
    ] = None,
    objective: Annotated[
        Objective, typer.Option(help="What is best: most tokens per second of all GPUs, or (with --requests) latency.")
    ] = "throughput",
    token_ms: Annotated[
        float | None, typer.Option(help="Most milliseconds that an output token may take.", min=0)
    ] = None,
    requests: Annotated[
        int | None,
        typer.Option(help="Requests that decode at once on all GPUs. By default, as many as are best.", min=1),
    ] = None,
    prompt: Annotated[int, typer.Option(help="Tokens of a prompt, as a mean.", min=1)] = 512,
    answer: Annotated[int, typer.Option(help="Tokens of an answer, as a mean.", min=1)] = 256,
    prompts_elsewhere: Annotated[
        bool,
        typer.Option("--prompts-elsewhere", help="Prompts are computed in a pool of their own, not on these GPUs."),
    ] = False,
    network: Annotated[
        str | None, typer.Option(help="Links between the GPUs. By default, those that the GPU comes with.")
    ] = None,
    host_ms: Annotated[
        float | None, typer.Option(help="Milliseconds that the host takes for a step, if you have measured them.")
    ] = None,
    bits: Annotated[
        float | None, typer.Option(help="Bits of a weight. By default, as the checkpoint stores it.")
    ] = None,
    top: Annotated[int, typer.Option(help="Plans to show.", min=1)] = 5,
    as_json: Annotated[bool, typer.Option("--json", help="Print the plans as a JSON list.")] = False,
) -> None:
    """Propose how to serve a model on so many GPUs: parallel sizes, dispatch, batch and re-routing."""
    from sere_dist.cli import plan as told
    from sere_dist.console import progress, tables
    from sere_dist.forecast import DEVICES
    from sere_dist.serving import Demand, ServedModel, Site, drawn_routing
    from sere_dist.simulation import NETWORKS

    if hardware not in told.LINKS:
        raise typer.BadParameter(f"no links of {hardware!r}: choose {', '.join(told.LINKS)}", param_hint="--hardware")
    if (links := network or told.LINKS[hardware]) not in NETWORKS:
        raise typer.BadParameter(f"no numbers of {links!r}: choose {', '.join(NETWORKS)}", param_hint="--network")
    device = DEVICES[hardware]
    if host_ms is not None:
        device = replace(device, host_seconds=host_ms / 1e3)
    try:
        goal = told.Goal(objective, token_ms, requests)
        empty, stored, known = without_weights(model, bits, artifact)
        served = ServedModel.of(empty, stored)
        site, routing = Site(device, NETWORKS[links]), drawn_routing(served.architecture, known)
        demand = Demand(prompt, answer, not prompts_elsewhere)
        shown = partial(track, description="splits", console=progress())
        found, left_out = told.plans(served, site, gpus, nodes, routing, demand, goal, shown)
    except ValueError as error:
        raise SystemExit(f"error: {error}") from error
    if as_json:
        print(json.dumps([each.numbers() for each in found], indent=2))
        return
    console = tables()
    console.print(f"{model} on {gpus} {hardware}, {nodes} node{'s' * (nodes > 1)}: {goal}", highlight=False)
    if found:
        table = Table(*told.HEADINGS, box=box.SIMPLE, padding=(0, 1, 0, 0))
        for each in found[:top]:
            for row in told.as_rows(each):
                table.add_row(*row)
        console.print(table)
        best = found[0].best(goal)
        arguments = told.application(found[0], goal, model, hardware, artifact)
        print(told.LEGEND)
        print(told.quality(known, best.batch))
        print(
            f"\nThe first plan, {found[0].split}, as lines of a Serve file (serve_apps/), and as arguments of vLLM:\n"
        )
        print(told.serve_yaml(arguments, artifact))
        print(f"vllm serve {model} {shlex.join(told.engine_arguments(arguments))}\n")
    for title, lines in (("Left out", left_out), ("What this rests on", told.evidence(served, site, known))):
        print(f"{title}:")
        for line in lines:
            print(f"- {line}")
    if not found:
        raise SystemExit("error: no split fits and meets the objective: see what was left out")
