"""The model card of an artifact, for people."""

from huggingface_hub import ModelCard, ModelCardData

from sere_dist.artifact.layer import LayerStatistics
from sere_dist.artifact.recommendation import Recommendation
from sere_dist.artifact.schema import ArtifactConfig


def card(config: ArtifactConfig, layers: list[LayerStatistics], recommended: Recommendation | None) -> str:
    """Returns the artifact's `README.md`: what was calibrated, how to use it, and a row for each layer."""
    data = ModelCardData(base_model=config.base_model, library_name="sere_dist", tags=["sere", "mixture-of-experts"])
    rows = "\n".join(f"| {' | '.join(row.cells())} |" for row in layers)
    method = config.method + (f" ({config.kernel})" if config.kernel else "")
    setting, tuned = '"select_top_k": 2', ""
    if recommended is not None:
        setting, tuned = '"policy": "recommended"', f"Tuned: {recommended}\n\n"
    return str(
        ModelCard(
            f"---\n{data.to_yaml()}\n---\n\n# Expert similarities of {config.base_model}\n\n"
            f"{config.architecture}, {config.num_experts} experts per layer, top-{config.num_experts_per_token}; "
            f"method {method}, {config.data}.\n\nIn vLLM with sere_dist:\n\n"
            f'```python\nLLM(model, additional_config={{"sere": {{"artifact": "this folder", {setting}}}}})\n```\n\n'
            f"{tuned}"
            f"| {' | '.join(LayerStatistics.HEADINGS)} |\n{'|---' * len(LayerStatistics.HEADINGS)}|\n{rows}\n"
        )
    )
