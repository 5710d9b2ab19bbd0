"""What MkDocs does beside its own: pages of the repository's root become pages of the site.

The README is the first page. Links from there lead into ``docs/`` and links from ``docs/`` back. A link to
any other file of the repository, which the site does not have, becomes the file's name.
"""

from __future__ import annotations

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
PAGES = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
_LINK = re.compile(r"\[([^][]*)\]\((?!https?://|#)([^)#\s]+)(#[^)\s]*)?\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages of the root."""
    for source, name in PAGES.items():
        files.append(File.generated(config, name, content=(ROOT / source).read_text()))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Let links lead to where pages are on the site."""
    from_root = page.file.src_uri in PAGES.values()

    def moved(link: re.Match[str]) -> str:
        text, path, anchor = link[1], link[2], link[3] or ""
        name = path.removeprefix("docs/") if from_root else path.removeprefix("../")
        at_root = (from_root and not path.startswith("docs/")) or path.startswith("../")
        if at_root and name not in PAGES:
            return f"`{text}`" if text.strip("`") == text else text
        return f"[{text}]({PAGES[name] if at_root else name}{anchor})"

    return _LINK.sub(moved, markdown)
