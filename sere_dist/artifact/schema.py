"""The files of an artifact, and what `sere_config.json` holds: what was calibrated, on what, with what."""

from pydantic import BaseModel, ConfigDict, field_validator

from sere_dist.method.similarity import method_named
from sere_dist.moe import MoeShape

SCHEMA_VERSION = 2  # 1 knew no sensitivities

CONFIG_FILE, TENSORS_FILE, LAYERS_FILE = "sere_config.json", "similarity.safetensors", "layers.csv"
EXPERTS_FILE = "experts.csv"  # what is known of each expert; absent where no token was looked at
SOURCES_FILE = "sources.csv"  # how well each source of the texts is served; absent where there was one
CARD_FILE, SETTINGS_FILE = "README.md", "calibration.yaml"
RECOMMENDATION_FILE = "recommended.json"  # absent until `calibration_jobs.tune` has found one
FILES = (
    CONFIG_FILE,
    TENSORS_FILE,
    LAYERS_FILE,
    EXPERTS_FILE,
    SOURCES_FILE,
    CARD_FILE,
    SETTINGS_FILE,
    RECOMMENDATION_FILE,
)


class ArtifactError(ValueError):
    """An artifact that can't be used; the message names the file and the field."""


class ArtifactConfig(BaseModel):
    """The content of `sere_config.json`."""

    model_config = ConfigDict(extra="forbid")

    schema_version: int
    base_model: str
    revision: str | None = None
    architecture: str
    num_layers: int
    hidden_size: int
    num_experts: int
    num_experts_per_token: int
    layer_names: dict[int, str]  # the experts' module by decoder layer index; dense layers are absent
    method: str
    kernel: str | None = None
    dataset: str | None  # None for a method without data
    num_tokens: int
    # What a squared error of 1 of a token, in the unit of w² n, costs: nats per token, the mean over layers, to first
    # order. None where the layers' sensitivities were not measured, as in artifacts of older versions.
    nats_per_error: float | None = None
    coactivation: bool = False  # whether the tensors have it: those of older versions do not
    versions: dict[str, str]
    tensors_sha256: str = ""
    calibration_sha256: str = ""  # of everything that decides the matrices: the same again means the same calibration

    @field_validator("schema_version")
    @classmethod
    def _known_schema(cls, value: int) -> int:
        if not 1 <= value <= SCHEMA_VERSION:
            raise ValueError(f"this version of sere_dist reads schemas 1 to {SCHEMA_VERSION}; upgrade sere_dist")
        return value

    @property
    def data(self) -> str:
        return f"{self.num_tokens} tokens of {self.dataset}" if self.dataset else "no data"

    @property
    def tensor_kinds(self) -> tuple[str, ...]:
        """What `similarity.safetensors` holds for each layer."""
        return (*method_named(self.method).tensors, *(("coactivation",) if self.coactivation else ()))

    @property
    def shape(self) -> MoeShape:
        return MoeShape(**{name: getattr(self, name) for name in MoeShape.__dataclass_fields__})
