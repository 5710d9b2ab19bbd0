"""The pages hang together: links, marks, the tree, the reference of the configuration, the README."""

from __future__ import annotations

import importlib.util
import re
import subprocess
from pathlib import Path

import pytest
import yaml

from jobs.reference import config_keys, config_page
from tests.pages import MARKED, PAGES, ROOT, blocks, blocks_of

NAMED = {"http", "library", "pipeline", "own-data", "same output", ""}
"""What may stand behind ``run``; a test looks after each."""
README = (ROOT / "README.md").read_text()


def without_blocks(text: str) -> str:
    return re.sub(r"^\s*```.*?^\s*```\s*$", "", text, flags=re.DOTALL | re.MULTILINE)


def anchors(path: Path) -> set[str]:
    """Return the anchors that GitHub and the site give the headings of a page."""
    found = set()
    for heading in re.findall(r"^#+ (.+)$", without_blocks(path.read_text()), re.MULTILINE):
        plain = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).lower()
        found.add(re.sub(r"[^\w\- ]", "", plain).strip().replace(" ", "-"))
    return found


def links(path: Path) -> list[str]:
    text = re.sub(r"`[^`\n]*`", "", without_blocks(path.read_text()))
    return re.findall(r"\]\(([^)\s]+)\)", text)


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_every_link_and_anchor_leads_somewhere(path: Path) -> None:
    broken = []
    for link in links(path):
        if link.startswith(("http://", "https://")):
            continue
        name, _, anchor = link.partition("#")
        target = (path.parent / name).resolve() if name else path
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    assert broken == []


def test_every_page_can_be_reached_from_the_readme() -> None:
    reached, open_pages = set(), [ROOT / "README.md"]
    while open_pages:
        page = open_pages.pop()
        if page in reached:
            continue
        reached.add(page)
        found = [(page.parent / link.partition("#")[0]).resolve() for link in links(page)]
        open_pages += [p for p in found if p.suffix == ".md" and p.exists()]
    assert set(PAGES) <= reached


def test_the_site_has_every_page() -> None:
    site = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
    of_root = {"index.md", "contributing.md", "changelog.md"}
    parts = [part if isinstance(part, dict) else {"": [part]} for part in site["nav"]]
    named = {name for part in parts for names in part.values() for name in names}
    assert named == of_root | {path.name for path in ROOT.glob("docs/*.md")}


def test_what_somebody_may_copy_has_a_mark_and_a_reason() -> None:
    wrong = [str(b) for b in blocks() if b.language in MARKED and not b.action]
    assert wrong == [], "blocks without a mark"
    assert [str(b) for b in blocks("run") if b.detail not in NAMED] == []
    assert [str(b) for a in ("check", "skip") for b in blocks(a) if len(b.detail) < 10] == []
    # A mark that stands anywhere else than before a block does nothing.
    for path in PAGES:
        text = path.read_text()
        marks = len(re.findall(r"^\s*<!-- (?:run|check|skip)\b", text, re.MULTILINE))
        assert marks == len([b for b in blocks_of(text, path.name) if b.action]), path.name


def test_the_readme_is_short() -> None:
    assert len(README.splitlines()) <= 150


def test_the_reference_of_the_configuration_is_up_to_date() -> None:
    page = (ROOT / "docs" / "configuration.md").read_text()
    assert page == config_page(), "run: python -m jobs.reference > docs/configuration.md"
    assert [key for key in config_keys() if f"| `{key}` |" not in page] == []


def test_commands_in_sentences_exist() -> None:
    text = "\n".join(path.read_text() for path in PAGES)
    # What a benchmark or a job of another name would be is no module.
    modules = set(re.findall(r"python -m ((?:jobs|benchmarks|twotower)\.[\w.]*[a-z])", text))
    assert len(modules) > 25
    assert [name for name in modules if importlib.util.find_spec(name) is None] == []
    listed = set(
        re.findall(r"^\| `(\w+)` \| .* \|", (ROOT / "docs" / "commands.md").read_text(), re.MULTILINE)
    )
    assert len(listed) >= 12
    assert [name for name in listed if importlib.util.find_spec(f"jobs.{name}") is None] == []
    targets = set(re.findall(r"`(?:\w+=\S+ )?make ([a-z-]+)", text))
    assert {"serve", "test", "docs", "setup"} <= targets
    done = subprocess.run(
        ["make", "--dry-run", *sorted(targets)], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr


def test_paths_in_backquotes_exist() -> None:
    roots = "|".join(("configs", "deploy", "twotower", "serve", "tests", "benchmarks", "examples"))
    missing = []
    for path in PAGES:
        named = re.findall(rf"\b((?:{roots})/[\w./-]+\.(?:py|yaml|env|ipynb|json|md))\b", path.read_text())
        # NAME stands for any.
        missing += [name for name in set(named) if "NAME" not in name and not (ROOT / name).exists()]
    assert missing == []


def test_the_tree_names_every_module_of_the_library() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text()
    tree = page[page.index("\ntwotower/  ") :].partition("```")[0]
    shown = {word.strip("/") for word in re.findall(r"[\w/.]+", tree)}
    for folder in (ROOT / "twotower").iterdir():
        if folder.is_dir() and (folder / "__init__.py").is_file():
            assert folder.name in shown, f"twotower/{folder.name} is not in the tree of docs/architecture.md"
    rooms = "|".join(p.name for p in (ROOT / "twotower").iterdir() if p.is_dir())
    named = set(re.findall(rf"\b((?:{rooms})/\w+\.py)", page))
    assert len(named) > 15
    for path in named:
        assert (ROOT / "twotower" / path).is_file(), f"{path} is mentioned and does not exist"
