"""The command `sere-dist`."""

from functools import partial
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from sere_dist.artifact import Artifact, ArtifactError
from sere_dist.placement import MAX_LOAD, PlacementError, propose
from sere_dist.report import write_report

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


@app.callback()
def main() -> None:
    """Similarity-based expert re-routing for Mixture-of-Experts models."""


@app.command()
def inspect(path: Annotated[Path, typer.Argument(help="Folder of an artifact.")]) -> None:
    """Check an artifact and describe it."""
    try:
        artifact = Artifact.load(path)
    except ArtifactError as error:
        raise SystemExit(f"error: {error}") from error
    config = artifact.config
    facts = Table(title=str(path), show_header=False, title_justify="left")
    facts.add_row("base model", config.base_model + (f" at {config.revision}" if config.revision else ""))
    facts.add_row("architecture", f"{config.architecture}, {config.num_layers} layers, hidden {config.hidden_size}")
    facts.add_row("experts", f"{config.num_experts} a layer, {config.num_experts_per_token} a token")
    facts.add_row("method", config.method + (f", {config.kernel} kernel" if config.kernel else ""))
    facts.add_row("calibrated on", config.data)
    facts.add_row("with", ", ".join(f"{name} {version}" for name, version in config.versions.items()))
    facts.add_row("SHA-256", config.tensors_sha256)
    layers = Table("layer", "fewest tokens of an expert", "median", "similarity mean", "min", "max")
    for row in artifact.layers:
        layers.add_row(*row.cells())
    console = Console()
    console.print(facts)
    console.print(layers)


@app.command()
def report(
    path: Annotated[Path, typer.Argument(help="Folder of an artifact.")],
    output: Annotated[Path, typer.Option(help="HTML file to write.")] = Path("report.html"),
) -> None:
    """Draw an artifact: one HTML page with every layer's similarities."""
    try:
        write_report(Artifact.load(path), output)
    except (ArtifactError, OSError) as error:
        raise SystemExit(f"error: {error}") from error
    print(f"wrote {output}")


@app.command()
def place(
    path: Annotated[Path, typer.Argument(help="Folder of an artifact.")],
    ranks: Annotated[int, typer.Option(help="Expert-parallel ranks.")],
    output: Annotated[Path, typer.Option(help="JSON file to write.")] = Path("placement.json"),
    max_load: Annotated[
        float, typer.Option(min=1, help="Tokens routed to a rank's experts, at most, over the mean of the ranks.")
    ] = MAX_LOAD,
) -> None:
    """Propose which rank holds which expert, so that tokens cross ranks less when they are re-routed."""
    console = Console()
    try:
        artifact = Artifact.load(path)
        placement = propose(artifact, ranks, max_load, progress=partial(track, description="layers", console=console))
        placement.save(output)
    except (ArtifactError, PlacementError, OSError) as error:
        raise SystemExit(f"error: {error}") from error
    table = Table(
        "layer",
        "remote domains of a token with two experts" + " (a guess)" * (placement.affinity == "similarity"),
        "largest rank's tokens, over the mean",
        title=f"linear placement on {ranks} ranks -> this one",
        title_justify="left",
    )
    for layer, placed in placement.layers.items():
        domains = f"{placed.remote_domains_linear:.2f} -> {placed.remote_domains:.2f}"
        table.add_row(str(layer), domains, f"{placed.load_linear:.2f} -> {placed.load:.2f}")
    console.print(table)
    if placement.affinity == "similarity":
        console.print("The artifact has no coactivation: which experts tokens use together is guessed from similarity.")
    print(f"wrote {output}")
