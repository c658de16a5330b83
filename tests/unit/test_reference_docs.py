"""The documentation against the code: the generated tables and the links of all pages."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from docs.generate_reference import BLOCK, TABLES, generated
from docs.generate_reference import PAGES as GENERATED

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted(
    [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), ROOT / "deploy/README.md", ROOT / "examples/tiny_moe/model/README.md"]
)
CODE = ("sere_dist", "calibration_jobs", "serve_apps")
LINK = re.compile(r"\]\(([^)#\s]*)(#[^)\s]*)?\)")


@pytest.mark.long
def test_the_reference_is_what_the_code_says():
    pages = [path.read_text() for path in GENERATED]
    names = [name for page in pages for _, name, _ in BLOCK.findall(page)]
    assert names == [*TABLES], "a table is missing, twice or out of order"
    assert pages == [generated(page) for page in pages], "run python -m docs.generate_reference"


def literals(path: Path) -> Iterator[str]:
    """Yields the string constants of a module, those inside f-strings too."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def test_the_errors_that_are_explained_are_raised():
    """Each message of the first table, between its dots, stands in the code."""
    section = (
        (ROOT / "docs/reference.md")
        .read_text()
        .split("## Errors and what to do")[1]
        .split("Some problems have no message")[0]
    )
    messages = re.findall(r"^\| `([^`]+)` \|", section, re.MULTILINE)
    assert len(messages) >= 10
    said = "\0".join(text for folder in CODE for path in (ROOT / folder).rglob("*.py") for text in literals(path))
    for message in messages:
        parts = [part.strip(" :") for part in message.split("...")]
        assert all(part in said for part in parts), f"nothing says {message!r}"


def anchors(page: Path) -> set[str]:
    """Returns the anchors of a page's headings, as GitHub names them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    words = (re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings)
    return {"#" + word.replace(" ", "-") for word in words}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    """To a file of the repository, and to a heading that is there."""
    for target, anchor in LINK.findall(page.read_text()):
        if "://" in target:
            continue
        path = (page.parent / target).resolve() if target else page
        assert path.exists(), f"{page.name} links to {target}"
        if anchor and path.suffix == ".md":
            assert anchor in anchors(path), f"{page.name} links to {target}{anchor}"
