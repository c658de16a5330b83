import csv
import hashlib
import json
import multiprocessing
import os
import re
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from sere_dist.artifact import folder
from sere_dist.artifact.folder import (
    CONFIG_FILE,
    EXPERTS_FILE,
    LAYERS_FILE,
    RECOMMENDATION_FILE,
    SETTINGS_FILE,
    TENSORS_FILE,
    Artifact,
    check_output,
)
from sere_dist.artifact.recommendation import LayerSetting
from sere_dist.artifact.schema import SOURCES_FILE, ArtifactConfig, ArtifactError
from sere_dist.artifact.sources import SourceStatistics
from sere_dist.cli.commands import app
from sere_dist.config import ReroutingConfig
from sere_dist.method.certainty import Certainty
from sere_dist.moe import MoeShape
from tests.support.artifacts import change_layers, recommend, small_artifact


@pytest.fixture
def saved(tmp_path):
    artifact = small_artifact()
    artifact.save(tmp_path / "artifact")
    return tmp_path / "artifact", artifact


def edit_config(path, **changes):
    content = json.loads((path / CONFIG_FILE).read_text())
    (path / CONFIG_FILE).write_text(json.dumps(content | changes))


def replace_tensors(path, tensors):
    """Writes other tensors with a checksum that fits, so that the checks behind it are reached."""
    save_file(tensors, path / TENSORS_FILE)
    edit_config(path, tensors_sha256=hashlib.sha256((path / TENSORS_FILE).read_bytes()).hexdigest())


def test_round_trip(saved):
    path, artifact = saved
    loaded = Artifact.load(path)
    assert loaded.config.model_copy(update={"tensors_sha256": ""}) == artifact.config
    assert loaded.layers.keys() == artifact.layers.keys()
    for layer, saved_layer in artifact.layers.items():
        assert torch.equal(loaded.layers[layer].similarity_EE, saved_layer.similarity_EE)
        assert loaded.layers[layer].statistics == saved_layer.statistics
    assert loaded.settings == artifact.settings
    assert sorted(os.listdir(path)) == sorted(
        ["README.md", "calibration.yaml", "layers.csv", "sere_config.json", "similarity.safetensors"]
    )
    assert os.listdir(path.parent) == ["artifact"], "something was left beside it"


@pytest.fixture
def projection(tmp_path):
    """An artifact of method projection, with the tokens of each expert."""
    artifact = small_artifact(method="projection")
    change_layers(
        artifact,
        coefficient_EE={layer: torch.rand(4, 4) for layer in (0, 1)},
        size_E={layer: torch.rand(4) for layer in (0, 1)},
        coactivation_EE={layer: torch.rand(4, 4) for layer in (0, 1)},
        tokens_E={0: torch.tensor([5, 0, 7, 9]), 1: torch.tensor([3, 4, 4, 99])},
        saliency_E={0: torch.tensor([1.0, 0.0, 2.0, 0.5]), 1: torch.tensor([0.1, 2.0, 3.0, 4.0])},
    )
    artifact.save(tmp_path / "projection")
    return tmp_path / "projection", artifact


def test_round_trip_of_a_projection(projection):
    path, artifact = projection
    loaded = Artifact.load(path)
    for name in ("similarity_EE", "coefficient_EE", "size_E", "coactivation_EE", "tokens_E", "saliency_E"):
        for layer, saved_layer in artifact.layers.items():
            assert torch.equal(getattr(loaded.layers[layer], name), getattr(saved_layer, name))


def test_experts_of_an_older_version_have_no_saliency(projection):
    path, artifact = projection
    rows = (path / EXPERTS_FILE).read_text().splitlines()
    (path / EXPERTS_FILE).write_text("".join(f"{row.rpartition(',')[0]}\n" for row in rows))
    loaded = Artifact.load(path).layers[1]
    assert loaded.saliency_E is None and loaded.tokens_E.equal(artifact.layers[1].tokens_E)


def test_a_projection_without_its_coefficients(projection):
    path, _ = projection
    tensors = load_file(path / TENSORS_FILE)
    del tensors["layers.1.coefficient"]
    replace_tensors(path, tensors)
    with pytest.raises(ArtifactError, match=r"missing \['layers.1.coefficient'\]"):
        Artifact.load(path)


def test_coefficients_of_another_method(projection):
    path, _ = projection
    edit_config(path, method="frobenius")
    with pytest.raises(ArtifactError, match=r"unexpected \['layers.0.coefficient', "):
        Artifact.load(path)


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("layers.0.size", torch.ones(4, 4), r"layers.0.size is torch.float32 \(4, 4\), .* float32 \(4,\)"),
        ("layers.0.coefficient", torch.full((4, 4), -1.0), "layers.0.coefficient holds negative numbers"),
    ],
)
def test_wrong_projections(projection, name, tensor, message):
    path, _ = projection
    replace_tensors(path, load_file(path / TENSORS_FILE) | {name: tensor})
    with pytest.raises(ArtifactError, match=message):
        Artifact.load(path)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("1,3,99,4.0\r\n", "", "does not have a row for each of num_experts"),
        ("1,2,4", "1,3,4", "does not have a row for each of num_experts"),
        ("layer,expert,tokens", "layer,expert,rows", "(?s)tokens.*Field required"),
        ("0,0,5", "0,0,many", "valid integer"),
        ("0,0,5", "0,0,-5", "greater than or equal to 0"),
        ("0,0,5,1.0", "0,0,5", "the saliency of some experts and not of others"),
        ("0,0,5,1.0", "0,0,5,nan", "finite number"),
    ],
)
def test_wrong_tokens_of_experts(projection, old, new, message):
    path, _ = projection
    content = (path / EXPERTS_FILE).read_bytes()
    assert old.encode() in content
    (path / EXPERTS_FILE).write_bytes(content.replace(old.encode(), new.encode()))
    with pytest.raises(ArtifactError, match=message):
        Artifact.load(path)


@pytest.fixture
def mixed(tmp_path):
    """An artifact of two sources; of one of them there were too few texts."""
    artifact = small_artifact()
    for index, layer in artifact.layers.items():
        fit = {"substitute_kept": 0.64, "own_kept": 0.875, "same_substitute": 0.25 + index / 2}
        layer.sources = [
            SourceStatistics(layer=index, source='chats, "old"', tokens=1234, **fit),
            SourceStatistics(layer=index, source="code", tokens=5),
        ]
    artifact.save(tmp_path / "mixed")
    return tmp_path / "mixed", artifact


def test_how_well_sources_are_served(mixed):
    path, artifact = mixed
    loaded = Artifact.load(path)
    assert [layer.sources for layer in loaded.layers.values()] == [layer.sources for layer in artifact.layers.values()]
    row = '| chats, "old" | 1,234 | 64% | 88% | 50% | 0: 64% (88%) |'
    assert row in (path / "README.md").read_text()
    shown = CliRunner().invoke(app, ["inspect", str(path)], terminal_width=200).output
    assert re.search(r'chats, "old" +1,234 +64% +88% +50% +0: 64% \(88%\)', shown)
    (path / SOURCES_FILE).unlink()  # as in an artifact of one source, or of an older version
    assert all(layer.sources == [] for layer in Artifact.load(path).layers.values())


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("1,code,5,,,\r\n", "", "does not have one row for each source"),
        ("1,code,5", "7,code,5", "does not have one row for each source"),
        ("1,code,5,,,", "1,code,5,,,\r\n1,code,5,,,", "does not have one row for each source"),
        ("1,code,5", "1,code,-5", "tokens"),
        ("0.64", "nan", "substitute_kept"),
        ("layer,source", "layer,name", "source"),
    ],
)
def test_wrong_sources(mixed, old, new, message):
    path, _ = mixed
    content = (path / SOURCES_FILE).read_bytes()
    assert old.encode() in content
    (path / SOURCES_FILE).write_bytes(content.replace(old.encode(), new.encode()))
    with pytest.raises(ArtifactError, match=message):
        Artifact.load(path)


def test_an_artifact_of_no_data(tmp_path):
    artifact = small_artifact(method="random", dataset=None, num_tokens=0)
    for layer in artifact.layers.values():
        layer.statistics.tokens_per_expert_min = layer.statistics.tokens_per_expert_median = None
    artifact.save(tmp_path / "artifact")
    loaded = Artifact.load(tmp_path / "artifact")
    assert loaded.layers[0].statistics == artifact.layers[0].statistics and loaded.layers[0].tokens_E is None
    assert "| 0 | - | - | 0.500 |" in (tmp_path / "artifact" / "README.md").read_text()


@pytest.fixture
def tuned(saved):
    """An artifact with a recommendation: its path, what is recommended, and the file with it."""
    path, _ = saved
    artifact = Artifact.load(path)
    layers = {0: LayerSetting(select_top_k=1, threshold=0.25), 1: LayerSetting(select_top_k=2)}
    recommended = recommend(artifact, "sere", layers)
    replace(artifact, recommended=recommended).save(path, overwrite=True)
    return path, recommended, path / RECOMMENDATION_FILE


def test_round_trip_of_a_recommendation(tuned):
    path, recommended, _ = tuned
    artifact = Artifact.load(path)
    assert artifact.recommended == recommended
    assert '"policy": "recommended"' in (path / "README.md").read_text()
    shown = CliRunner().invoke(app, ["inspect", str(path)], env={"COLUMNS": "200"}).stdout
    assert "S = 1, rho 0.25" in shown and "2.0 of 4.0 active experts" in shown

    settings = ReroutingConfig(artifact=path, policy="recommended", min_rows=3)
    of_layers = artifact.settings_by_layer(settings)
    assert {each.min_rows for each in of_layers.values()} == {3}
    assert [(each.policy, each.select_top_k, each.threshold) for each in of_layers.values()] == [
        ("sere", 1, 0.25),
        ("sere", 2, 0),
    ]
    plain = ReroutingConfig(artifact=path, select_top_k=2)
    assert artifact.settings_by_layer(plain) == {0: plain, 1: plain}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tensors_sha256": "0"}, "was found with other matrices .*run python -m calibration_jobs.tune again"),
        ({"layers": {"0": {"select_top_k": 1}}}, r"has layers \[0\], layer_names has \[0, 1\]"),
        (
            {"layers": {"0": {"select_top_k": 1}, "1": {"select_top_k": 3}}},
            r"select_top_k of layers \[1\] is more than 2",
        ),
        ({"layers": {"0": {"select_top_k": 0}}}, "(?s)damaged .*layers.0.select_top_k"),
        ({"batch": 5}, "nothing was measured at the batch of 5"),
        ({"off": []}, "off and recommended must have the same batches"),
    ],
)
def test_a_recommendation_that_does_not_fit(tuned, changes, message):
    path, _, file = tuned
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    with pytest.raises(ArtifactError, match=message):
        Artifact.load(path)


def test_a_recommended_projection_needs_its_matrices(tuned):
    path, _, file = tuned
    file.write_text(json.dumps(json.loads(file.read_text()) | {"policy": "projection"}))
    with pytest.raises(ArtifactError, match="projection needs an artifact of method projection"):
        Artifact.load(path).settings_by_layer(ReroutingConfig(artifact=path, policy="recommended"))


@pytest.mark.parametrize("position", [0, 40, -1])
def test_a_flipped_byte(saved, position):
    path, _ = saved
    content = bytearray((path / TENSORS_FILE).read_bytes())
    content[position] ^= 1
    (path / TENSORS_FILE).write_bytes(content)
    with pytest.raises(ArtifactError, match="SHA-256"):
        Artifact.load(path)


def test_an_artifact_of_an_older_version(saved):
    path, artifact = saved
    edit_config(path, schema_version=1)
    table = path / LAYERS_FILE
    newer = {"mean_square", "sensitivity", "sensitivity_error", *Certainty._fields}
    rows = list(csv.DictReader(table.open(newline="")))
    with table.open("w", newline="") as file:
        writer = csv.DictWriter(file, [name for name in rows[0] if name not in newer], extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
    again = Artifact.load(path)
    assert again.config.nats_per_error is None
    assert again.layers[0].statistics == artifact.layers[0].statistics


def test_how_surely_similarities_are_known(saved, tmp_path):
    _, artifact = saved
    for name, value in zip(Certainty._fields, (0.0123, 0.75, 0.0), strict=True):
        setattr(artifact.layers[0].statistics, name, value)
    artifact.save(tmp_path / "again")
    again = [layer.statistics for layer in Artifact.load(tmp_path / "again").layers.values()]
    assert again == [layer.statistics for layer in artifact.layers.values()]
    assert again[0].cells()[-4:-1] == ["0.0123", "75%", "0%"] and again[1].cells()[-4:-1] == ["-", "-", "-"]


def test_a_missing_layer(saved):
    path, artifact = saved
    replace_tensors(path, {"layers.0.similarity": artifact.layers[0].similarity_EE})
    with pytest.raises(ArtifactError, match=r"missing \['layers.1.similarity'\]"):
        Artifact.load(path)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_not_a_number(saved, value):
    path, _ = saved
    tensors = load_file(path / TENSORS_FILE)
    tensors["layers.1.similarity"][0, 1] = value
    replace_tensors(path, tensors)
    with pytest.raises(ArtifactError, match=r"layers\.1\.similarity holds NaN or infinity"):
        Artifact.load(path)


def test_a_wrong_shape(saved):
    path, _ = saved
    replace_tensors(path, {f"layers.{layer}.similarity": torch.ones(3, 3) for layer in (0, 1)})
    with pytest.raises(ArtifactError, match=r"\(3, 3\), but num_experts calls for float32 \(4, 4\)"):
        Artifact.load(path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schema_version": 99}, "schema_version.*\n.*reads schemas 1 to 2"),
        ({"num_experts": "many"}, "num_experts"),
        ({"surprise": 1}, "surprise"),
        ({"num_layers": 1}, r"layer_names has \[1\], but num_layers is 1"),
    ],
)
def test_a_wrong_field_is_named(saved, changes, message):
    path, _ = saved
    edit_config(path, **changes)
    with pytest.raises(ArtifactError, match=message):
        Artifact.load(path)


@pytest.mark.parametrize("name", [CONFIG_FILE, TENSORS_FILE, LAYERS_FILE])
def test_a_missing_file(saved, name):
    path, _ = saved
    (path / name).unlink()
    with pytest.raises(ArtifactError, match=f"{name} is missing"):
        Artifact.load(path)


def test_a_file_where_a_folder_should_be(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ArtifactError, match="no artifact can be read at"):
        Artifact.load(tmp_path / "file")


@pytest.mark.parametrize("name", [CONFIG_FILE, LAYERS_FILE])
def test_a_file_cut_short(saved, name):
    path, _ = saved
    content = (path / name).read_bytes()
    (path / name).write_bytes(content[: len(content) // 2])
    with pytest.raises(ArtifactError):
        Artifact.load(path)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda children: st.lists(children, max_size=3) | st.dictionaries(st.text(max_size=8), children, max_size=3),
    max_leaves=6,
)
fields = st.sampled_from((*ArtifactConfig.model_fields, "unknown"))
a_file = st.one_of(
    st.tuples(
        st.sampled_from((CONFIG_FILE, SETTINGS_FILE, LAYERS_FILE, EXPERTS_FILE, SOURCES_FILE, TENSORS_FILE)),
        st.binary(),
    ),
    st.tuples(st.just(SOURCES_FILE), st.text(alphabet="0123456789.,-layersouctkn\n", max_size=60).map(str.encode)),
    st.tuples(st.just(LAYERS_FILE), st.text(alphabet='0123456789.,-layer\n"', max_size=60).map(str.encode)),
    st.tuples(st.just(EXPERTS_FILE), st.text(alphabet="0123456789,-layerexpto\n", max_size=60).map(str.encode)),
    st.tuples(st.just(SETTINGS_FILE), st.text(alphabet="a: [{&*!-#\n'\"", max_size=20).map(str.encode)),
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    changes=st.dictionaries(fields, json_values, max_size=3),
    file=st.none() | a_file,
    cut=st.none() | st.integers(0, 400),
)
def test_whatever_is_in_the_folder_is_refused_or_loads(saved, changes, file, cut):
    """Nothing but an ArtifactError leaves the loader; what it lets through can be saved, and loads again."""
    path, artifact = saved
    shutil.rmtree(path)
    artifact.save(path)
    edit_config(path, **changes)
    if cut is not None:  # a header that lies, under a checksum that fits
        payload = bytearray((path / TENSORS_FILE).read_bytes())
        payload[cut % len(payload)] = ord("9")
        (path / TENSORS_FILE).write_bytes(payload)
        edit_config(path, tensors_sha256=hashlib.sha256(payload).hexdigest())
    if file is not None:
        (path / file[0]).write_bytes(file[1])
    try:
        loaded = Artifact.load(path)
    except ArtifactError as error:
        assert str(path) in str(error)
        return
    loaded.save(path, overwrite=True)
    assert torch.equal(Artifact.load(path).layers[0].similarity_EE, loaded.layers[0].similarity_EE)


def test_another_model():
    artifact = small_artifact()
    artifact.check_serves(artifact.config.shape, artifact.config.base_model)
    other = MoeShape("MixtralForCausalLM", num_layers=2, hidden_size=8, num_experts=8, num_experts_per_token=2)
    with pytest.raises(ArtifactError) as error:
        artifact.check_serves(other, artifact.config.base_model)
    assert "num_experts: artifact 4, model 8" in str(error.value)
    assert "architecture: artifact Qwen3MoeForCausalLM, model MixtralForCausalLM" in str(error.value)
    assert "hidden_size" not in str(error.value)


def test_another_name_of_the_model_is_warned_of(caplog):
    artifact = small_artifact()
    artifact.check_serves(artifact.config.shape, "nobody/small-moe")
    assert caplog.text == ""
    artifact.check_serves(artifact.config.shape, "/models/small-moe-fp8")
    assert "calibrated on nobody/small-moe" in caplog.text and "/models/small-moe-fp8" in caplog.text


def test_an_output_that_is_there_is_kept(saved):
    path, _ = saved
    before = (path / TENSORS_FILE).read_bytes()
    with pytest.raises(FileExistsError, match="--overwrite"):
        small_artifact(num_tokens=99).save(path)
    assert (path / TENSORS_FILE).read_bytes() == before
    small_artifact(num_tokens=99).save(path, overwrite=True)
    assert Artifact.load(path).config.num_tokens == 99
    assert os.listdir(path.parent) == ["artifact"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_save_that_is_killed_leaves_nothing_half(saved, overwrite):
    """The process dies with most files written."""
    path, _ = saved
    target = path if overwrite else path.with_name("new")

    def save() -> None:
        folder.card = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
        small_artifact().save(target, overwrite=overwrite)

    process = multiprocessing.get_context("fork").Process(target=save)
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert target.exists() == overwrite
    Artifact.load(path)


def test_an_interrupted_replacement_puts_the_old_artifact_back(saved, monkeypatch):
    path, artifact = saved
    rename = Path.rename

    def interrupted(self, target):
        if self.name == "new":
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        small_artifact(num_tokens=99).save(path, overwrite=True)
    assert Artifact.load(path).config.num_tokens == artifact.config.num_tokens
    assert os.listdir(path.parent) == ["artifact"]


def test_an_artifact_that_another_job_finished_meanwhile_is_kept(saved, monkeypatch):
    path, artifact = saved
    monkeypatch.setattr("sere_dist.artifact.folder.check_output", lambda *_: None)
    with pytest.raises(OSError):
        small_artifact(num_tokens=99).save(path)
    assert Artifact.load(path).config.num_tokens == artifact.config.num_tokens


def test_an_output_that_can_not_be_written_is_noticed_at_once(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError):
        check_output(tmp_path / "file" / "out", overwrite=False)


def test_somebody_elses_folder_is_never_replaced(tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.tex").write_text("years of work")
    with pytest.raises(FileExistsError, match="holds no artifact"):
        small_artifact().save(tmp_path / "thesis", overwrite=True)
    assert (tmp_path / "thesis" / "chapter1.tex").read_text() == "years of work"


def test_what_would_not_load_is_not_saved(tmp_path):
    artifact = small_artifact()
    artifact.layers[0].similarity_EE[1, 2] = float("nan")
    with pytest.raises(ArtifactError, match="NaN"):
        artifact.save(tmp_path / "artifact")
    assert os.listdir(tmp_path) == []


def test_report(saved, tmp_path):
    path, _ = saved
    page = tmp_path / "page.html"
    assert CliRunner().invoke(app, ["report", str(path), "--output", str(page)]).exit_code == 0
    assert page.read_text().count("data:image/png") == 3, "two layers and a summary"
    page.unlink()
    (path / TENSORS_FILE).unlink()
    failed = CliRunner().invoke(app, ["report", str(path), "--output", str(page)])
    assert failed.exit_code == 1 and not page.exists()


def test_inspect(saved):
    path, _ = saved
    shown = CliRunner().invoke(app, ["inspect", str(path)], terminal_width=200)
    assert shown.exit_code == 0
    assert "nobody/small-moe" in shown.output and "Qwen3MoeForCausalLM" in shown.output
    (path / LAYERS_FILE).unlink()
    assert CliRunner().invoke(app, ["inspect", str(path)]).exit_code == 1
