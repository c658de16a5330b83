"""Families of models: a small random checkpoint of each is calibrated, and served where vLLM's CPU engine runs it.

    python -m tests.families [NAME ...]

Each gets a process of its own. `tests/families.json` keeps what was found, and docs/design.md shows it.
"""

import importlib.metadata
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer

RESULTS = Path(__file__).with_suffix(".json")
ANSWER = "ANSWER "
SECONDS = 600  # for two engines, one after the other, and their first compilation
PROMPTS = [list(range(start, start + 10)) for start in range(100, 180, 10)]


def look_at(name: str) -> dict[str, Any]:
    """Returns what becomes of a family: `calibrated`, `served` and `rerouted`, each "yes" or the reason why not."""
    import torch
    from transformers import AutoModelForCausalLM

    from tests.support.served_families import FAMILIES

    family = FAMILIES[name]
    found = {"models": family.models, "calibrated": "yes", "served": "yes", "rerouted": "yes"}
    with tempfile.TemporaryDirectory() as folder:
        model, artifact = Path(folder) / "model", Path(folder) / "artifact"
        torch.manual_seed(0)
        config = family.config()
        AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(model)
        found["architecture"] = json.loads((model / "config.json").read_text())["architectures"][0]
        try:
            calibrate(model, artifact, family.moe_layers)
        except ValueError as error:
            return found | {"calibrated": str(error), "served": "not tried", "rerouted": "no artifact"}
        try:
            stock = tokens(engine := start(model))
            engine.llm_engine.engine_core.shutdown()
        except Exception as error:
            return found | {"served": reason(error), "rerouted": "not served"}
        try:
            check_rerouting(model, artifact, family.moe_layers, stock)
        except Exception as error:
            return found | {"rerouted": reason(error)}
    return found


def calibrate(model: Path, artifact: Path, moe_layers: tuple[int, ...]) -> None:
    """Scores the experts of every MoE layer, as a calibration's tasks do."""
    import torch

    from sere_dist.calibration.checkpoint import Checkpoint
    from sere_dist.calibration.layers import expert_inputs, score_layer, text_blocks
    from sere_dist.moe import MoeShape
    from tests.support.artifacts import small_artifact

    checkpoint = Checkpoint(str(model))
    shape = MoeShape.from_config(checkpoint.config)
    inputs = dict(expert_inputs(checkpoint, text_blocks(torch.randint(3, 512, (4, 32)).tolist())))
    assert tuple(inputs) == moe_layers, f"experts were called in layers {tuple(inputs)}"
    made = small_artifact(layers=moe_layers, **vars(shape))
    for layer in moe_layers:
        made.layers[layer].similarity_EE = score_layer(checkpoint, layer, inputs[layer], "frobenius").similarity_EE
    made.save(artifact)


def start(model: Path, **options: Any):
    from vllm import LLM

    return LLM(
        str(model),
        enforce_eager=True,
        max_model_len=128,
        max_num_seqs=16,
        skip_tokenizer_init=True,
        enable_prefix_caching=False,
        distributed_executor_backend="mp",
        **options,
    )


def tokens(engine) -> list[list[int]]:
    from vllm import SamplingParams

    parameters = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, detokenize=False)
    answers = engine.generate([{"prompt_token_ids": ids} for ids in PROMPTS], parameters, use_tqdm=False)
    return [list(answer.outputs[0].token_ids) for answer in answers]


def check_rerouting(model: Path, artifact: Path, moe_layers: tuple[int, ...], stock: list[list[int]]) -> None:
    """S = K gives the stock engine's tokens; S < K re-routes slots and saves experts in every MoE layer."""
    from tests.support.served_families import TOP_K

    engine = start(model, additional_config={"sere": {"artifact": str(artifact), "select_top_k": 1}})
    try:
        engine.collective_rpc("sere_settings", kwargs={"select_top_k": TOP_K})
        assert tokens(engine) == stock, "with S = K, the tokens are not the stock engine's"
        engine.collective_rpc("sere_settings", kwargs={"select_top_k": 1})
        engine.collective_rpc("sere_counters", kwargs={"reset": True})
        tokens(engine)
        (worker,) = engine.collective_rpc("sere_counters")
        assert tuple(worker["layers"]) == moe_layers, f"layers {tuple(worker['layers'])} are re-routed"
        for layer, counted in worker["layers"].items():
            assert counted["rerouted_slots"] > 0, f"no slot of layer {layer} was re-routed"
            assert counted["active_experts_after"] < counted["active_experts_before"], f"layer {layer} saves nothing"
    finally:
        engine.llm_engine.engine_core.shutdown()


def reason(error: Exception) -> str:
    """Returns what an error says, in one line: pydantic's have theirs in the middle."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    said = next((line for line in lines if line.startswith("Value error")), lines[-1] if lines else "")
    return f"{type(error).__name__}: {said.removeprefix('Value error, ').partition(' [type=')[0]}"


def root_cause(log: str) -> str | None:
    """Returns the last error that a worker process wrote before the engine said that one failed."""
    errors = re.findall(r"^\(Worker.*?\] ((?:\w+\.)*\w*(?:Error|Exception): .+)$", log, re.MULTILINE)
    return errors[-1] if errors else None


def main(names: Annotated[list[str] | None, typer.Argument(help="Families; all if none is named.")] = None) -> None:
    from rich.progress import track

    from tests.support.served_families import FAMILIES

    found = json.loads(RESULTS.read_text())["families"] if RESULTS.exists() else {}
    for name in track(names or list(FAMILIES), "families"):
        command = [sys.executable, "-c", f"from tests import families; families.answer({name!r})"]
        environment = os.environ | {
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
        }
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=SECONDS)
        answers = [line for line in done.stdout.splitlines() if line.startswith(ANSWER)]
        if not answers:
            raise SystemExit(f"{name} ended without an answer:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
        found[name] = json.loads(answers[-1].removeprefix(ANSWER))
        for what in ("served", "rerouted"):
            if "See stack trace" in found[name][what]:
                found[name][what] = root_cause(done.stdout + done.stderr) or found[name][what]
        print(f"{name}: " + ", ".join(f"{what} {found[name][what]}" for what in ("calibrated", "served", "rerouted")))
        versions = {package: importlib.metadata.version(package) for package in ("transformers", "torch")}
        versions["vllm"] = importlib.metadata.version("vllm-cpu")
        ordered = {name: found[name] for name in FAMILIES if name in found}
        RESULTS.write_text(json.dumps({"versions": versions, "families": ordered}, indent=2) + "\n")


def answer(name: str) -> None:
    print(ANSWER + json.dumps(look_at(name)))


if __name__ == "__main__":
    typer.run(main)
