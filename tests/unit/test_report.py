import base64
import io
import os
import re
from html.parser import HTMLParser

import pytest
import torch
from PIL import Image

from sere_dist.artifact.recommendation import LayerSetting
from sere_dist.artifact.sources import SourceStatistics
from sere_dist.cli import report
from sere_dist.cli.report import clustered_order, hardest_to_replace, similar_pairs, write_report
from sere_dist.method.certainty import Certainty
from tests.support.artifacts import change_layers, recommend, small_artifact

# Tags that HTML never closes.
VOID = {"meta", "img"}


class Page(HTMLParser):
    """A page's text by section, its pictures and its links; tags must nest."""

    def __init__(self, html: str):
        super().__init__()
        self.open, self.section, self.texts, self.images, self.links, self.ids = [], "top", {}, [], [], []
        self.feed(html)
        assert self.open == [], "unclosed tags"

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        if tag not in VOID:
            self.open.append(tag)
        if "id" in attributes:
            self.ids.append(attributes["id"])
        if tag == "section":
            self.section = attributes.get("id", "summary")
        if tag == "img":
            self.images.append((self.section, attributes))
        if tag == "a":
            self.links.append(attributes["href"])

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.texts[self.section] = f"{self.texts.get(self.section, '')} {data}"

    def text(self, section: str) -> str:
        return " ".join(self.texts[section].split())


def an_artifact(num_experts=4, layers=(0, 1), tokens=None, method="frobenius", **changes):
    artifact = small_artifact(num_experts, layers, method=method, **changes)
    for index, layer in artifact.layers.items():
        layer.tokens_E = torch.tensor(tokens[index]) if tokens else None
        layer.similarity_EE = (layer.similarity_EE + layer.similarity_EE.T) / 2
    return artifact


def read(artifact, path, **arguments) -> Page:
    write_report(artifact, path, **arguments)
    return Page(path.read_text(encoding="utf-8"))


def picture(image) -> Image.Image:
    kind, content = image["src"].split(",")
    assert kind == "data:image/png;base64"
    return Image.open(io.BytesIO(base64.b64decode(content, validate=True)))


@pytest.mark.parametrize("directed", [False, True])
def test_planted_blocks_end_side_by_side(directed):
    torch.manual_seed(0)
    block_E = torch.arange(24) % 4  # no two neighbours are of one block
    inside_EE = block_E[:, None] == block_E
    noise_EE = 0.2 * torch.rand(24, 24)
    similarity_EE = (0.3 + 0.4 * inside_EE + (noise_EE if directed else (noise_EE + noise_EE.T) / 2)).fill_diagonal_(1)
    order = clustered_order(similarity_EE)
    assert sorted(order) == list(range(24))
    changes = (block_E[order].diff() != 0).sum()
    assert changes == 3, block_E[order]


def test_neighbours_in_the_order_are_alike_across_blocks_too():
    """Points on a line: the optimal ordering of leaves is the line itself, an arbitrary one of the tree is not."""
    place_E = torch.tensor([3.0, 0.0, 7.5, 1.0, 6.0, 4.5])
    similarity_EE = 1 - (place_E[:, None] - place_E).abs() / 10
    order = clustered_order(similarity_EE)
    assert order in ([1, 3, 0, 5, 4, 2], [2, 4, 5, 0, 3, 1])


@pytest.mark.parametrize("num_experts", [1, 2])
def test_order_of_few_experts(num_experts):
    assert sorted(clustered_order(torch.eye(num_experts))) == list(range(num_experts))


def test_order_of_equal_experts_and_of_opposite_ones():
    assert sorted(clustered_order(torch.ones(5, 5) + 1e-7)) == list(range(5))
    assert sorted(clustered_order(2 * torch.eye(5) - 1)) == list(range(5))


def test_most_similar_pairs():
    similarity_EE = torch.full((5, 5), 0.1).fill_diagonal_(1)
    for one, other, value in ((3, 1, 0.75), (0, 4, 0.5), (2, 3, 0.5)):
        similarity_EE[one, other] = similarity_EE[other, one] = value
    assert similar_pairs(similarity_EE, 3, directed=False) == [(1, 3, 0.75), (0, 4, 0.5), (2, 3, 0.5)]
    similarity_EE[3, 1] = 0.625
    assert similar_pairs(similarity_EE, 3, directed=True) == [(1, 3, 0.75), (3, 1, 0.625), (0, 4, 0.5)]
    assert len(similar_pairs(similarity_EE[:2, :2], 5, directed=False)) == 1


def test_hardest_to_replace():
    """Row: the expert that is replaced. Expert 2 is a good substitute for all, and has only poor ones itself."""
    similarity_EE = torch.tensor([[1, 0.5, 0.75], [0.25, 1, 0.625], [0.0, 0.125, 1]])
    assert hardest_to_replace(similarity_EE, 2) == [(2, 1, 0.125), (1, 2, 0.625)]


def test_page(tmp_path):
    """An anchor, a link and a picture for every layer; nothing is loaded from anywhere."""
    layers = (1, 2, 7)
    path = tmp_path / "report.html"
    tokens = {layer: [40, 50, 60, 70] for layer in layers}
    page = read(an_artifact(layers=layers, tokens=tokens, num_layers=8, revision="abc123"), path)
    anchors = [f"layer-{layer}" for layer in layers]
    assert page.ids == ["top", *anchors]
    assert set(page.links) == {f"#{name}" for name in page.ids}
    assert [section for section, _ in page.images] == ["summary", *anchors]
    for section, image in page.images:
        drawn = picture(image)
        drawn.load()
        assert drawn.format == "PNG" and drawn.size == (int(image["width"]), int(image["height"]))
        assert len(drawn.convert("RGB").getcolors(2**24)) > 20, "blank"
        wide = drawn.width / drawn.height
        assert (1.5 < wide < 2.5) if section == "summary" else (0.9 < wide < 1.2), (section, wide)
        assert image["alt"].strip()
    assert re.search(r'<html lang="en">', path.read_text(encoding="utf-8"))
    assert not re.search(r"https?:|url\(|<script|<link|@import", path.read_text(encoding="utf-8"))
    for fact in ("nobody/small-moe", "abc123", "frobenius", "texts.parquet", "16", f"torch {torch.__version__}"):
        assert fact in page.text("top")
    assert "mean 0.5000 min 0.1000 max 0.9000" in page.text("layer-7")
    assert os.listdir(tmp_path) == ["report.html"], "something was left beside it"


def test_how_surely_it_is_known(tmp_path):
    artifact = an_artifact()
    assert "How surely" not in read(artifact, tmp_path / "unknown.html").text("layer-1")
    for name, value in zip(Certainty._fields, (0.0123, 0.756, 0.98), strict=True):
        for layer in artifact.layers.values():
            setattr(layer.statistics, name, value)
    page = read(artifact, tmp_path / "report.html")
    assert "It halves with four times as many texts" in page.text("summary")
    shown = page.text("layer-1")
    for known in ("similarity 0.0123", "either half of the texts 76 %", "kept by half of the texts 98 %"):
        assert known in shown


def test_how_well_sources_are_served(tmp_path):
    artifact = an_artifact()
    assert "Sources of the texts" not in read(artifact, tmp_path / "one.html").text("summary")
    for index, layer in artifact.layers.items():
        fit = {"substitute_kept": 0.64, "own_kept": 0.87, "same_substitute": 0.25 + index / 2}
        layer.sources = [
            SourceStatistics(layer=index, source="chats", tokens=1234, **fit),
            SourceStatistics(layer=index, source="code", tokens=5),
        ]
    page = read(artifact, tmp_path / "report.html")
    assert "chats 1,234 64% 87% 50% 0: 64% (87%) code 5 - - - -" in page.text("summary")
    assert "chats 64 % 87 % 75 % code - - -" in page.text("layer-1")


def test_what_an_error_costs(tmp_path):
    artifact = an_artifact()
    without = read(artifact, tmp_path / "unknown.html").images[0][1]
    for layer, cost in zip(artifact.layers.values(), (1.5, 0.5), strict=True):
        layer.statistics.sensitivity, layer.statistics.sensitivity_error = cost, 0.1
    shown = read(artifact, tmp_path / "report.html").images[0][1]
    assert "what an error costs" in shown["alt"] and "what an error costs" not in without["alt"]
    assert int(shown["height"]) > 1.3 * int(without["height"]), "no panel was added"


def test_colours_of_a_heat_map(tmp_path):
    """Two blocks, interleaved: after clustering, dark quarters on the diagonal and light ones off it, in all layers."""
    block_E = torch.arange(8) % 2
    artifact = an_artifact(num_experts=8)
    artifact.layers[0].similarity_EE = torch.where(block_E[:, None] == block_E, 0.9, 0.1).fill_diagonal_(1)
    artifact.layers[1].similarity_EE = torch.full((8, 8), 0.9).fill_diagonal_(1)
    page = read(artifact, tmp_path / "report.html")
    first, second = (picture(image).convert("RGB") for section, image in page.images if section != "summary")
    cell, left, top = report.HEAT_MAP // 8, report.LEFT, report.TOP

    def colour(drawn, row, column):
        return drawn.getpixel((left + int((column + 0.5) * cell), top + int((row + 0.5) * cell)))

    dark, light, diagonal = colour(first, 0, 1), colour(first, 0, 6), colour(first, 3, 3)
    assert sum(dark) < sum(light) and len({*diagonal}) == 1
    for row in range(8):
        for column in range(8):
            expected = diagonal if row == column else dark if row // 4 == column // 4 else light
            assert colour(first, row, column) == expected, (row, column)
    assert colour(second, 0, 7) == dark, "the scale is the model's, not the layer's"


def test_bars_stand_over_their_experts(tmp_path):
    """At a quarter of the highest bar: an empty one and a low one, both marked, and two that got enough."""
    tokens = [0, 31, 32, 60]
    artifact = an_artifact(layers=(0,), tokens={0: tokens})
    similarity_EE = torch.eye(4)
    for one, other, value in ((3, 0, 0.75), (0, 2, 0.5), (2, 1, 0.75)):
        similarity_EE[one, other] = similarity_EE[other, one] = value
    artifact.layers[0].similarity_EE = similarity_EE
    drawn = picture(read(artifact, tmp_path / "report.html").images[1][1]).convert("RGB")
    order = clustered_order(similarity_EE)
    assert order in ([3, 0, 2, 1], [1, 2, 0, 3])
    cell, y = report.HEAT_MAP // 4, report.TOP + int(0.75 * report.STRIP)
    colours = [drawn.getpixel((report.LEFT + int((place + 0.5) * cell), y)) for place in range(4)]
    expected = [report.PALE_RED, report.RED, report.BLUE, report.BLUE]
    assert [f"#{bytes(colour).hex()}" for colour in colours] == [expected[expert] for expert in order]


def test_experts_with_few_tokens(tmp_path):
    tokens = {0: [32, 31, 500, 0], 1: [32, 33, 34, 35], 2: [1, 99, 99, 99]}
    artifact = an_artifact(layers=(0, 1, 2), tokens=tokens, num_layers=3)
    summary = read(artifact, tmp_path / "report.html").text("summary")
    assert "layer 0 : experts 1, 3 (31, 0 tokens) layer 2 : expert 0 (1 token)" in summary
    assert "3 experts in 2 layers" in summary and "layer 1" not in summary
    summary = read(artifact, tmp_path / "report.html", min_tokens=1).text("summary")
    assert "layer 0 : expert 3 (0 tokens)" in summary and "layer 2" not in summary
    summary = read(artifact, tmp_path / "report.html", min_tokens=0).text("summary")
    assert "None." in summary and "layer 0" not in summary


def test_tables_of_a_layer(tmp_path):
    artifact = an_artifact(tokens={0: [40, 50, 60, 7000], 1: [1] * 4})
    similarity_EE = torch.eye(4)
    for one, other, value in ((0, 1, 0.5), (0, 2, 0.25), (1, 2, 0.75), (2, 3, 0.125)):
        similarity_EE[one, other] = similarity_EE[other, one] = value
    artifact.layers[0].similarity_EE = similarity_EE
    text = read(artifact, tmp_path / "report.html").text("layer-0")
    assert "experts similarity 1 and 2 0.7500 0 and 1 0.5000 0 and 2 0.2500 2 and 3 0.1250 0 and 3 0.0000" in text
    assert "similarity 3 7,000 2 0.1250 0 40 1 0.5000 1 50 2 0.7500 2 60 1 0.7500" in text
    order = clustered_order(similarity_EE)
    assert text.endswith(f"{' '.join(map(str, order))} To the top")


def test_projection(tmp_path):
    """Directions are told apart, coefficients stand beside the pairs, and sizes have bars of their own."""
    tokens = {0: [40] * 4, 1: [40] * 4}
    artifact = an_artifact(tokens=tokens, method="projection")
    plain = picture(read(artifact, tmp_path / "report.html").images[1][1])
    artifact.layers[0].similarity_EE = torch.full((4, 4), 0.1).fill_diagonal_(1)
    artifact.layers[0].similarity_EE[2, 1] = 0.75
    coefficient_EE, size_E = torch.arange(16.0).view(4, 4), torch.tensor([0.5, 1, 1.5, 1])
    change_layers(artifact, coefficient_EE=dict.fromkeys((0, 1), coefficient_EE), size_E=dict.fromkeys((0, 1), size_E))
    page = read(artifact, tmp_path / "report.html")
    assert "expert → substitute coefficient similarity 2 → 1 9.000 0.7500 0 → 1 1.000 0.1000" in page.text("layer-0")
    assert "A row is the expert that is replaced" in page.text("summary")
    assert "mean squared output" in page.text("summary")
    drawn = picture(page.images[1][1])
    assert drawn.width == plain.width and drawn.height == plain.height + report.STRIP + report.GAP


def test_what_is_recommended(tmp_path):
    artifact = an_artifact()
    layers = {0: LayerSetting(select_top_k=1, threshold=0.25), 1: LayerSetting(select_top_k=2)}
    artifact.recommended = recommend(artifact, "sere", layers)
    page = read(artifact, tmp_path / "report.html")
    assert "For batch 16 and a KL of at most 0.02 nats a token: policy sere." in page.text("recommended")
    assert "16 2.0 4.0 0.0100 ± 0.0010 +0.0200 ± 0.0020 90.0 ± 1.0 %" in page.text("recommended")
    assert "recommended: S = 1, rho 0.25" in page.text("layer-0")
    assert [section for section, _ in page.images].count("recommended") == 1
    assert "recommended" not in read(an_artifact(), tmp_path / "report.html").texts


def test_no_data_no_tokens(tmp_path):
    artifact = an_artifact(method="weights", dataset=None, num_tokens=0)
    for layer in artifact.layers.values():
        layer.statistics.tokens_per_expert_min = layer.statistics.tokens_per_expert_median = None
    page = read(artifact, tmp_path / "report.html")
    texts = [*page.texts, *(image["alt"] for _, image in page.images), *page.texts.values()]
    assert not [text for text in texts if re.search(r"\btokens\b|\bdata\b", text)]
    with_data = read(an_artifact(tokens={0: [40] * 4, 1: [40] * 4}), tmp_path / "report.html")
    for (section, without), (_, there) in zip(page.images, with_data.images, strict=True):
        assert int(without["height"]) < int(there["height"]), section


def test_names_are_escaped(tmp_path):
    page = read(an_artifact(base_model="<b>x</b>", dataset='"><script>alert(1)</script>'), tmp_path / "report.html")
    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "<b>" not in html and "<script>" not in html
    assert page.text("top").count("<b>x</b>") == 3  # title, headline, model


def test_experts_that_are_all_alike(tmp_path):
    """No similarity differs, so no colour scale follows from them."""
    artifact = an_artifact()
    change_layers(artifact, similarity_EE=dict.fromkeys((0, 1), torch.ones(4, 4)))
    assert "from 0.0000 to 1.0000" in read(artifact, tmp_path / "report.html").text("summary")


def test_interrupted_drawing_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "report.html"
    write_report(an_artifact(base_model="nobody/old"), path)
    old, drawn = path.read_bytes(), []

    def interrupted(figure):
        drawn.append(figure)
        if len(drawn) == 2:
            raise KeyboardInterrupt
        return report.Picture("", 1, 1)

    with monkeypatch.context() as patch:
        patch.setattr(report, "_picture", interrupted)
        with pytest.raises(KeyboardInterrupt):
            write_report(an_artifact(base_model="nobody/new"), path)
    assert path.read_bytes() == old and os.listdir(tmp_path) == ["report.html"]
    write_report(an_artifact(base_model="nobody/new"), path)
    assert b"nobody/new" in path.read_bytes() and b"nobody/old" not in path.read_bytes()


def test_same_artifact_same_page_readable_by_all(tmp_path):
    """No date and no chance in it; permissions are those of any file that this user writes."""
    for name in ("one.html", "two.html"):
        write_report(an_artifact(), tmp_path / name)
    (tmp_path / "plain").touch()
    assert (tmp_path / "one.html").read_bytes() == (tmp_path / "two.html").read_bytes()
    assert (tmp_path / "one.html").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_a_folder_is_not_replaced(tmp_path):
    with pytest.raises(IsADirectoryError, match="name a file"):
        write_report(an_artifact(), tmp_path)
