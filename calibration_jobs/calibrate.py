"""Calibrate a Mixture-of-Experts model on a Ray cluster: one Ray task a MoE layer, one artifact at the end.

    ray job submit --runtime-env calibration_jobs/runtime_env.yaml -- \\
        python -m calibration_jobs.calibrate --model /models/my-moe --dataset /data/texts.parquet --output /data/my-sere

Every option can also stand in a YAML file (`--config`), with `_` for `-`; options on the command line win. Outside a
cluster the same command starts Ray on this machine.
"""

import importlib.metadata
import sys
from pathlib import Path
from typing import Annotated, Any

import ray
import torch
import typer
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from tqdm import tqdm
from transformers import AutoConfig, AutoTokenizer

from sere_dist.artifact import SCHEMA_VERSION, Artifact, ArtifactConfig, LayerStatistics, check_output
from sere_dist.calibration import (
    ExpertInputs,
    capture_expert_inputs,
    empty_model,
    load_model,
    read_texts,
    score_layer,
    tokenise,
)
from sere_dist.moe import MoeShape, routed_experts
from sere_dist.similarity import Kernel, Method, cka_bytes

# Ray unpacks the --working-dir of a job below such a folder, and deletes it afterwards.
RAY_WORKING_DIR = "working_dir_files"
CKA_LIMIT = 8 * 2**30  # bytes


class CalibrationConfig(BaseModel):
    """Settings of a calibration job. Unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())

    model: str = Field(description="Checkpoint folder or Hugging Face model id.")
    output: Path = Field(description="Folder of the artifact.")
    dataset: Path = Field(description="Parquet file, or folder of them, with a column `text`.")
    method: Method = "frobenius"
    kernel: Kernel = Field(default="linear", description="Of method cka.")
    num_samples: int = Field(default=400, ge=1, description="Texts to use.")
    max_length: int = Field(default=128, ge=2, description="Tokens of each text; shorter texts are left out.")
    overwrite: bool = Field(default=False, description="Replace an artifact at --output.")


def calibrate(config: CalibrationConfig) -> Artifact:
    """Runs the calibration on the connected Ray cluster, or a local one, and saves the artifact.

    Raises:
        ValueError: the model, the dataset or a setting can't be used; nothing was written.
        OSError: the output is already there, or can't be written; nothing was changed.
    """
    refuse_lost_output(config.output)
    check_output(config.output, config.overwrite)
    model_config = AutoConfig.from_pretrained(config.model)
    shape = MoeShape.from_config(model_config)
    layer_names = {layer: name for layer, (name, _) in routed_experts(empty_model(model_config)).items()}
    tokenizer = AutoTokenizer.from_pretrained(config.model)
    ids_BL = tokenise(read_texts(config.dataset), tokenizer, config.num_samples, config.max_length)
    if len(ids_BL) < config.num_samples:
        print(
            f"only {len(ids_BL)} of the wanted {config.num_samples} texts have {config.max_length} tokens", flush=True
        )

    if config.method == "cka" and (needed := cka_bytes(shape.num_experts, ids_BL.numel())) > CKA_LIMIT:
        raise ValueError(
            f"--method cka compares all pairs of {ids_BL.numel()} tokens: {needed / 2**30:.0f} GiB a layer, over the "
            f"limit of {CKA_LIMIT / 2**30:.0f}; lower --num-samples or --max-length"
        )

    ray.init(ignore_reinit_error=True, log_to_driver=False)
    on_gpu = ray.cluster_resources().get("GPU", 0) >= 1
    resources, device = ({"num_gpus": 1}, "cuda") if on_gpu else ({"num_cpus": 1}, "cpu")
    print(
        f"calibrating {config.model}: {len(layer_names)} MoE layers of {shape.num_experts} experts, "
        f"{ids_BL.numel()} tokens, a {device.upper()} task a layer",
        flush=True,
    )
    layers = sorted(layer_names)
    inputs = capture_task.options(num_returns=len(layers), **resources).remote(config.model, ids_BL, layers, device)
    tasks = {
        score_task.options(**resources).remote(
            model_config, layer, layer_inputs, config.method, config.kernel, device
        ): layer
        for layer, layer_inputs in zip(layers, [inputs] if len(layers) == 1 else inputs, strict=True)
    }
    similarity: dict[int, torch.Tensor] = {}
    statistics: dict[int, LayerStatistics] = {}
    with tqdm(total=len(tasks), unit="layer", disable=not sys.stderr.isatty()) as bar:
        pending = list(tasks)
        while pending:
            (done,), pending = ray.wait(pending)
            layer = tasks[done]
            similarity[layer], statistics[layer] = ray.get(done)
            bar.update()
            if bar.disable:
                print(progress_line(len(similarity), len(tasks), statistics[layer]), flush=True)

    artifact = Artifact(
        ArtifactConfig(
            schema_version=SCHEMA_VERSION,
            base_model=config.model,
            revision=getattr(model_config, "_commit_hash", None),
            **vars(shape),
            layer_names=layer_names,
            method=config.method,
            kernel=config.kernel if config.method == "cka" else None,
            dataset=str(config.dataset),
            num_tokens=ids_BL.numel(),
            versions={name: importlib.metadata.version(name) for name in ("sere-dist", "torch", "transformers", "ray")},
        ),
        similarity=dict(sorted(similarity.items())),
        layers=[statistics[layer] for layer in layers],
        settings=config.model_dump(mode="json"),
    )
    artifact.save(config.output, overwrite=config.overwrite)
    return artifact


@ray.remote
def capture_task(model: str, ids_BL: torch.Tensor, layers: list[int], device: str) -> Any:
    """Returns the ExpertInputs of each layer as an object of its own, so that a layer's task fetches only its own."""
    captured = capture_expert_inputs(load_model(model, device), ids_BL)
    results = [captured[layer] for layer in layers]
    return results if len(results) > 1 else results[0]


@ray.remote
def score_task(
    model_config, layer: int, inputs: ExpertInputs, method: Method, kernel: Kernel, device: str
) -> tuple[torch.Tensor, LayerStatistics]:
    return score_layer(model_config, layer, inputs, method, kernel, device)


def progress_line(done: int, total: int, row: LayerStatistics) -> str:
    return (
        f"layer {row.layer} scored ({done}/{total}) in {row.seconds:.1f} s: similarity {row.similarity_mean:.3f} mean, "
        f"{row.similarity_min:.3f} to {row.similarity_max:.3f}; tokens an expert {row.tokens_per_expert_min} fewest, "
        f"{row.tokens_per_expert_median:g} median"
    )


def refuse_lost_output(output: Path) -> None:
    """Raises ValueError where a relative output would be written into a job's temporary working directory."""
    if not output.is_absolute() and RAY_WORKING_DIR in Path.cwd().parts:
        raise ValueError(
            f"--output {output} is relative to the job's working directory, which Ray deletes after the job: "
            "give an absolute path on storage that outlives it"
        )


def main(
    config: Annotated[Path | None, typer.Option(help="YAML file with any of the other options.")] = None,
    model: Annotated[str | None, typer.Option(help="Checkpoint folder or Hugging Face model id.")] = None,
    output: Annotated[Path | None, typer.Option(help="Folder of the artifact.")] = None,
    dataset: Annotated[Path | None, typer.Option(help="Parquet file or folder with a column `text`.")] = None,
    method: Annotated[str | None, typer.Option(help="frobenius (default), cosine or cka.")] = None,
    kernel: Annotated[str | None, typer.Option(help="Of cka: linear (default), polynomial or rbf.")] = None,
    num_samples: Annotated[int | None, typer.Option(help="Texts to use (default 400).")] = None,
    max_length: Annotated[int | None, typer.Option(help="Tokens of each text (default 128).")] = None,
    overwrite: Annotated[bool | None, typer.Option("--overwrite", help="Replace an artifact at --output.")] = None,
) -> None:
    flags = {name: value for name, value in locals().items() if name != "config" and value is not None}
    try:
        from_file = yaml.safe_load(config.read_text()) if config else {}
        if not isinstance(from_file, dict):
            raise ValueError(f"{config} must hold a mapping of options to values")
        artifact = calibrate(CalibrationConfig.model_validate({str(k): v for k, v in from_file.items()} | flags))
    except ValidationError as error:
        problems = "; ".join(
            f"--{str(e['loc'][0]).replace('_', '-')}: {e['msg']}" for e in error.errors(include_url=False)
        )
        raise SystemExit(f"error: {problems}") from error
    except (ValueError, OSError, yaml.YAMLError, ray.exceptions.RayError) as error:
        raise SystemExit(f"error: {error}") from error
    print(f"wrote {artifact.settings['output']}: similarity of {len(artifact.similarity)} layers", flush=True)


if __name__ == "__main__":
    typer.run(main)
