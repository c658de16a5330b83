"""Artifacts on the Hugging Face Hub, which is a server on this machine here."""

import json
import multiprocessing
import os
import re
import shutil
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from huggingface_hub.utils import validate_repo_id
from typer.testing import CliRunner

from calibration_jobs import calibrate, tune
from calibration_jobs.calibrate import CalibrationConfig, digest, fingerprint, settings_of
from examples.tiny_moe.data import MODEL
from sere_dist.artifact.card import card
from sere_dist.artifact.folder import Artifact
from sere_dist.artifact.hub import local_folder, pinned
from sere_dist.artifact.recommendation import LayerSetting
from sere_dist.artifact.schema import CARD_FILE, RECOMMENDATION_FILE, ArtifactError
from sere_dist.calibration.checkpoint import Checkpoint
from sere_dist.cli.commands import app
from sere_dist.config import ReroutingConfig
from sere_dist.files import HubName
from sere_dist.moe import MoeShape
from tests.support.artifacts import change_layers, recommend, small_artifact
from tests.support.commands import invoke
from tests.support.hub_server import OWNER, READER, WRITER, HubServer, Repository
from tests.support.tuning import options

NAME = f"hf://{OWNER}/sere"
WRONG = "hf_wrongwrongwrong"  # a token that nobody has


def run(token: str, command: str, *arguments: str) -> tuple[int, str]:
    """Runs `sere-dist`, or a job by its name, in the client's process: its exit status, and all that it printed."""
    os.environ["HF_TOKEN"] = token
    jobs = {"calibrate": calibrate.main, "tune": tune.main}
    done = invoke(jobs[command], *arguments) if command in jobs else invoke(app, command, *arguments)
    return done.exit_code, " ".join(done.output.split())


def load(token: str, name: str) -> Artifact | str:
    """Loads an artifact in the client's process; returns the error if there is one."""
    os.environ["HF_TOKEN"] = token
    try:
        return Artifact.load(name)
    except ArtifactError as error:
        return str(error)


def pin(token: str, settings: ReroutingConfig) -> ReroutingConfig:
    os.environ["HF_TOKEN"] = token
    return pinned(settings)


def deploy(token: str, rerouting: dict) -> tuple[bytes, str]:
    """Returns what Ray Serve is given to run an application, and the artifact that the workers of an engine load."""
    from ray import cloudpickle
    from vllm.engine.arg_utils import EngineArgs

    from sere_dist.vllm_plugin.engine_settings import settings_of
    from serve_apps.sere import build_app

    os.environ["HF_TOKEN"] = token
    given = cloudpickle.dumps(build_app({"model": str(MODEL), "rerouting": rerouting}))
    engine = EngineArgs(str(MODEL), additional_config={"sere": rerouting}).create_engine_config()
    return given, settings_of(engine.additional_config["sere"]).artifact


@dataclass
class Client:
    """A process of its own: huggingface_hub reads where the Hub is, and where its cache is, when it is imported."""

    pool: ProcessPoolExecutor
    home: Path

    def __call__(self, function, *arguments, token: str = WRITER):
        return self.pool.submit(function, token, *arguments).result()

    def forget(self) -> None:
        """Empties the cache."""
        shutil.rmtree(self.home / "hub", ignore_errors=True)


@pytest.fixture(scope="module")
def hub():
    with HubServer() as server:
        yield server


@pytest.fixture(scope="module")
def process(hub, tmp_path_factory):
    home = tmp_path_factory.mktemp("home")
    environment = {"HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0"}
    # Xet's client is a binary with servers and a protocol of its own. Without it files go by LFS.
    environment |= {"HF_HUB_DISABLE_XET": "1", "NO_PROXY": "*", "COLUMNS": "200"}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            yield Client(pool, home)


@pytest.fixture
def client(hub, process):
    """The client with an empty cache, and a Hub that holds nothing."""
    process.forget()
    hub.repositories.clear()
    hub.requests.clear()
    hub.refuses_commits = False
    return process


def saved(path: Path, **changes) -> Path:
    small_artifact(**changes).save(path)
    return path


def newest(hub: HubServer) -> str:
    return list(hub.repositories[f"{OWNER}/sere"].commits)[-1]


@pytest.mark.long
def test_a_round_trip(hub, client, tmp_path):
    folder = saved(tmp_path / "artifact")
    (folder / "notes.txt").write_text("not of the artifact")
    status, said = client(run, "push", str(folder), f"{OWNER}/sere")
    assert status == 0, said
    first = newest(hub)
    assert f"pushed {folder} to {NAME}@{first}" in said and "The repository is private" in said
    repository = hub.repositories[f"{OWNER}/sere"]
    assert repository.private and len(repository.commits) == 2, "the empty one, and one with the artifact"
    own = {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "notes.txt"}
    assert repository.commits[first] == own

    own_layers = Artifact.load(folder).layers
    repository.commits[first]["weights.bin"] = b"large"  # which nobody needs
    for name in (NAME, f"{NAME}@{first}", f"{NAME}@main"):
        client.forget()
        loaded = client(load, name)
        assert torch.equal(loaded.layers[1].similarity_EE, own_layers[1].similarity_EE)
    assert not any("weights.bin" in request for request in hub.requests)
    status, said = client(run, "inspect", NAME)
    assert (status, "nobody/small-moe" in said, WRITER in said) == (0, True, False)

    settings = ReroutingConfig(artifact=NAME, select_top_k=1, draft={"artifact": NAME, "select_top_k": 1})
    fixed = client(pin, settings)
    assert fixed.artifact == f"{NAME}@{first}" == fixed.draft.artifact

    other = saved(tmp_path / "other", num_experts=6)
    assert client(run, "push", str(other), f"{OWNER}/sere")[0] == 0
    assert newest(hub) != first
    assert client(load, NAME).config.num_experts == 6
    assert client(load, fixed.artifact).config.num_experts == 4

    hub.requests.clear()
    assert client(load, fixed.artifact).config.num_experts == 4
    assert not [request for request in hub.requests if OWNER in request], "a commit in the cache needs no network"


@pytest.mark.long
def test_what_an_older_artifact_had_goes(hub, client, tmp_path):
    """Else the new matrices would stand beside a recommendation for the old ones."""
    folder = saved(tmp_path / "artifact")
    artifact = Artifact.load(folder)
    layers = {layer: LayerSetting(select_top_k=1) for layer in artifact.layers}
    replace(artifact, recommended=recommend(artifact, "sere", layers)).save(folder, overwrite=True)
    assert client(run, "push", str(folder), f"{OWNER}/sere")[0] == 0
    assert client(load, NAME).recommended.batch == 16
    hub.repositories[f"{OWNER}/sere"].commits[newest(hub)]["LICENSE"] = b"own"
    assert client(run, "push", str(saved(tmp_path / "other", num_experts=6)), f"{OWNER}/sere")[0] == 0
    files = hub.repositories[f"{OWNER}/sere"].commits[newest(hub)]
    assert "LICENSE" in files and RECOMMENDATION_FILE not in files
    assert client(load, NAME).recommended is None


@pytest.mark.long
def test_a_deployment_is_pinned(hub, client, artifact_path):
    """Replicas, the keeper of the settings and the workers of an engine load one commit, whenever they start."""
    assert client(run, "push", str(artifact_path), f"{OWNER}/sere")[0] == 0
    given, of_engine = client(deploy, {"artifact": NAME, "select_top_k": 2})
    commit = f"{NAME}@{newest(hub)}"
    assert of_engine == commit
    assert given.count(commit.encode()) == given.count(NAME.encode()) > 0


@pytest.mark.long
def test_what_can_not_be_fetched(hub, client):
    missing = "there is none, or this machine's token may not read it. Correct the name, or log in .*HF_TOKEN"
    hub.repositories[f"{OWNER}/sere"] = Repository(private=True)
    cases = [
        (f"hf://{OWNER}/other", READER, missing),
        (NAME, WRONG, missing),
        (NAME, "", missing),
        (f"{NAME}@dev", READER, "no such branch, tag or commit. Correct what follows the @"),
        (NAME, READER, "holds no artifact of sere_dist: it has no sere_config.json"),
        (f"hf://{OWNER}/a--b", READER, "can't be fetched: .*a--b"),
    ]
    for name, token, message in cases:
        error = client(load, name, token=token)
        assert error.startswith(name) and re.search(message, error), error
        assert not token or token not in error


@pytest.mark.long
def test_out_of_reach(hub, client, tmp_path):
    folder = saved(tmp_path / "artifact")
    assert client(run, "push", str(folder), f"{OWNER}/sere")[0] == 0
    with hub.out_of_reach():
        error = client(load, NAME)
        assert "the Hub is out of reach, and this machine's cache does not have it. Connect to it, or copy" in error
        status, said = client(run, "push", str(folder), f"{OWNER}/sere")
        assert status == 1 and f"error: {NAME} can't be written" in said and WRITER not in said
    assert client(load, NAME).config.base_model == "nobody/small-moe"
    with hub.out_of_reach():
        for name in (NAME, f"{NAME}@{newest(hub)}"):
            assert client(load, name).config.base_model == "nobody/small-moe"


@pytest.mark.long
def test_pushing_without_permission(hub, client, tmp_path):
    """create_repo is content if the repository is there and may be read, so writing is asked for too."""
    folder = saved(tmp_path / "artifact")
    hub.repositories[f"{OWNER}/sere"] = Repository(private=False)
    cases = [(f"{OWNER}/sere", READER), (f"{OWNER}/new", READER), ("other/sere", WRITER), (f"{OWNER}/sere", WRONG)]
    for repository, token in cases:
        status, said = client(run, "push", str(folder), repository, token=token)
        assert status == 1 and f"error: hf://{repository} can't be written: there is none, or this machine's" in said
        assert "with a token that may write it" in said and token not in said
    assert hub.repositories.keys() == {f"{OWNER}/sere"} and len(hub.repositories[f"{OWNER}/sere"].commits) == 1

    status, said = client(run, "push", str(folder), f"{OWNER}/sere")
    assert (status, "The repository is public: everybody may read it" in said) == (0, True), said


@pytest.mark.long
def test_a_job_pushes(hub, client, tmp_path):
    """A job that has finished before, which is what its command finds after a failed push."""
    given = {"model": str(MODEL), "output": str(tmp_path / "artifact"), "method": "random"}
    words = [word for name, value in given.items() for word in (f"--{name}", value)]
    words += ["--push-to-hub", f"{OWNER}/sere"]
    status, said = client(run, "calibrate", *words, token=READER)
    assert status == 1 and f"error: {NAME} can't be written" in said and os.listdir(tmp_path) == []

    config, checkpoint = CalibrationConfig.model_validate(given), Checkpoint(str(MODEL))
    shape = MoeShape.from_config(checkpoint.config)
    artifact = small_artifact(layers=(0, 1), method="random", **vars(shape))
    artifact.config.calibration_sha256 = digest(fingerprint(config, checkpoint, [], []))
    artifact.settings = settings_of(config)
    artifact.save(tmp_path / "artifact")

    hub.refuses_commits = True
    status, said = client(run, "calibrate", *words)
    again = f"`sere-dist push {tmp_path}/artifact {OWNER}/sere`"
    assert status == 1 and f"the artifact is at {tmp_path}/artifact. Push it with {again}" in said
    assert WRITER not in said
    hub.refuses_commits = False
    status, said = client(run, "calibrate", *words)
    assert status == 0 and f"pushed {tmp_path}/artifact to {NAME}@{newest(hub)}" in said
    assert client(load, NAME).config.method == "random"
    written = b"".join(path.read_bytes() for path in (tmp_path / "artifact").iterdir())
    assert WRITER.encode() not in written and b"push_to_hub" not in written


def test_settings_of_a_push():
    given = {"model": "m", "output": "o", "push_to_hub": f"{OWNER}/sere"}
    assert settings_of(CalibrationConfig.model_validate(given)) == settings_of(CalibrationConfig(model="m", output="o"))
    with pytest.raises(ValueError, match="sere is no repository of the Hub: write ORG/NAME"):
        CalibrationConfig.model_validate(given | {"push_to_hub": "sere"})
    done = CliRunner().invoke(app, ["push", "folder", "hf://a/b"])
    assert isinstance(done.exception, SystemExit) and "hf://a/b is no repository of the Hub" in str(done.exception)


def test_a_tuning_needs_a_folder():
    done = invoke(tune.main, *options(Path("folder"), max_kl="1"), "--artifact", f"{NAME}@v1")
    assert done.exit_code == 1
    said = " ".join(str(done.exception).split())
    assert f"--artifact: Value error, {NAME}@v1 is on the Hub, and a tuning writes into the artifact" in said
    assert f"hf download {OWNER}/sere --revision v1 --local-dir sere" in said


@pytest.mark.parametrize("name", ["", "sere", "a/b/c", "a/b@", "a/../b", "/a/b", "a/b c"])
def test_no_name(name):
    name = f"hf://{name}"
    message = re.escape(f"{name} is no artifact on the Hub: write hf://ORG/NAME, or hf://ORG/NAME@REVISION")
    with pytest.raises(ValueError, match=message):
        ReroutingConfig(artifact=name, select_top_k=2)
    with pytest.raises(ArtifactError, match=message):
        local_folder(name)


def test_names_and_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for text, name in (("hf://a/b", HubName("a/b")), ("hf://a/b.c@refs/pr/1", HubName("a/b.c", "refs/pr/1"))):
        assert HubName.parse(text) == name and str(name) == text
    assert HubName.parse("a/b") is None and HubName.parse(Path("hf://a/b")) is None

    settings = ReroutingConfig(artifact=NAME, select_top_k=2, draft={"artifact": "draft", "select_top_k": 1})
    again = ReroutingConfig.model_validate_json(settings.model_dump_json())
    assert again == settings == ReroutingConfig.model_validate(settings.model_dump())
    resolved = again.resolved()
    assert (resolved.artifact, resolved.draft.artifact) == (NAME, str(tmp_path / "draft"))
    assert resolved == ReroutingConfig.model_validate(json.loads(json.dumps(resolved.model_dump(mode="json"))))
    folder = ReroutingConfig(artifact=Path("x/../folder/"), select_top_k=2)
    assert pinned(folder).artifact == str(tmp_path / "folder")
    with pytest.raises(ValueError, match="s3://bucket/artifact is an address"):
        ReroutingConfig(artifact="s3://bucket/artifact", select_top_k=2)
    with pytest.raises(ValueError, match="hf:/a/b is an address"):
        ReroutingConfig(artifact=Path("hf://a/b"), select_top_k=2)


def parsed(text: str) -> ModelCard:
    """Returns a card as huggingface_hub reads it, once its names are ones that the Hub takes."""
    read = ModelCard(text)
    for name in [read.data.base_model, *(read.data.datasets or [])]:
        if name is not None:
            validate_repo_id(name)
    assert read.data.library_name == "sere_dist" and "sere" in read.data.tags
    return read


def test_the_card_of_a_model_of_the_hub(tmp_path):
    artifact = small_artifact(
        revision="f" * 40, dataset="HuggingFaceFW/fineweb-edu (75%), /data/chat.jsonl (25%)", method="projection"
    )
    change_layers(
        artifact,
        coefficient_EE={layer: torch.rand(4, 4) for layer in (0, 1)},
        size_E={layer: torch.rand(4) for layer in (0, 1)},
        tokens_E={0: torch.tensor([31, 40, 70, 90]), 1: torch.tensor([3, 32, 40, 99])},
    )
    artifact.save(tmp_path / "artifact")
    read = parsed((tmp_path / "artifact" / CARD_FILE).read_text())
    assert read.data.base_model == "nobody/small-moe" and read.data.datasets == ["HuggingFaceFW/fineweb-edu"]
    assert f"| base model | nobody/small-moe at {'f' * 40} |" in read.text
    assert "2 of 8 experts got fewer than 32 tokens; the expert with the fewest got 3" in read.text
    assert '{"sere": {"artifact": "hf://ORG/NAME", "policy": "projection", "select_top_k": 2}}' in read.text
    assert "The similarities are those of this data: 16 tokens of HuggingFaceFW" in read.text
    application = yaml.safe_load(re.search(r"```yaml\n(.*?)```", read.text, re.DOTALL)[1])
    args = application["applications"][0]["args"]
    assert args.keys() == {"model", "rerouting"} and args["model"] == "nobody/small-moe"
    assert ReroutingConfig(**args["rerouting"]).policy == "projection"


def test_the_card_of_a_model_in_a_folder():
    """Its name is none of the Hub's, and neither is a file's."""
    artifact = small_artifact(base_model="/home/me/models/small-moe", dataset="data/texts.parquet")
    text = card(artifact.config, artifact.layers.values(), None)
    read = parsed(text)
    assert read.data.base_model is None and read.data.datasets is None
    assert "/home/me" not in text and "small-moe, from a folder" in text and "the fewest got 3" in text
    layer = artifact.layers[0]
    layer.statistics.tokens_per_expert_min = None
    of_no_data = card(artifact.config.model_copy(update={"dataset": None}), [layer], None)
    assert "no token was looked at" in of_no_data and "- No text was looked at" in of_no_data


def test_the_card_of_a_tuned_artifact():
    artifact = small_artifact()
    recommended = recommend(artifact, "sere", {layer: LayerSetting(select_top_k=1) for layer in artifact.layers})
    read = parsed(card(artifact.config, artifact.layers.values(), recommended))
    found = {(result.dataset_name, result.metric_type): result.metric_value for result in read.data.eval_results}
    assert found[f"{recommended.texts}, batch 16", "kl"] == 0.01
    assert found[f"{recommended.texts}, batch 16", "active_experts"] == 2.0
    text = read.text
    assert "Tuned for batch 16 and a KL of at most 0.02 nats a token" in text
    assert "| recommended, batch 16 | 2.0 of 4.0 | 0.0100 ±0.0010 | +0.0200 ±0.0020 | 20.00 | 90.0% ±1.0% |" in text
    assert "| S = 1, batch 16 | 2.0 of 4.0 |" in text
    assert "policy: recommended" in text and "select_top_k" not in text
