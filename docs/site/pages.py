"""Hooks of mkdocs: pages that lie elsewhere in the project, and links as GitHub reads them.

A page links to files of the project by relative paths, so that its links work where it is read as
a file. In the site such a link leads to the page that the file has become, to the repository
where `repo_url` is known, and is plain text otherwise.
"""

import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from xml.etree.ElementTree import Element

from markdown import Extension, Markdown
from markdown.treeprocessors import Treeprocessor
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[2]
ELSEWHERE = {
    "index.md": "README.md",
    "contributing.md": "CONTRIBUTING.md",
    "changes.md": "CHANGELOG.md",
    "first_steps.md": "example/first_steps.ipynb",
}
"""Pages whose text is not in docs/, and the file that has it."""

log = logging.getLogger("mkdocs.hooks.pages")


def on_config(config: Any) -> None:
    config.markdown_extensions.append(_links)
    _links.repository = config.repo_url


def on_files(files: Files, config: Any) -> Files:
    for name, source in ELSEWHERE.items():
        files.append(File.generated(config, name, content=_text_of(ROOT / source)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> None:
    _links.name = page.file.src_uri
    _links.source = ELSEWHERE.get(page.file.src_uri, f"docs/{page.file.src_uri}")


class _Links(Extension, Treeprocessor):
    """Turns what a file of the project links to into links of the site."""

    repository: str | None = None
    name = ""
    """The page, by its path in the site's sources."""
    source = ""
    """The file that it is made of, from the project's root."""

    def extendMarkdown(self, md: Markdown) -> None:  # the name is markdown's
        # Below 20, where links are made, and above 0, where mkdocs resolves them.
        md.treeprocessors.register(self, "links_of_the_project", 10)

    def run(self, root: Element) -> None:
        for element in root.iter():
            for key in {"href", "src"}.intersection(element.keys()):
                self._mend(element, key)

    def _mend(self, element: Element, key: str) -> None:
        target = urlsplit(element.get(key, ""))
        if target.scheme or target.netloc or not target.path:
            return
        path = os.path.normpath(os.path.join(os.path.dirname(self.source), target.path))
        pages = {source: page for page, source in ELSEWHERE.items()}
        anchor = f"#{target.fragment}" if target.fragment else ""
        if path in pages or path.startswith("docs/"):
            to = pages.get(path) or path.removeprefix("docs/")
            element.set(key, os.path.relpath(to, os.path.dirname(self.name) or ".") + anchor)
        elif not (ROOT / path).exists():
            log.warning("%s links to %s, which does not exist", self.source, path)
        elif self.repository:
            kind = "tree" if (ROOT / path).is_dir() else "blob"
            element.set(key, f"{self.repository.rstrip('/')}/{kind}/main/{path}{anchor}")
        else:
            element.tag = "span"
            del element.attrib[key]


_links = _Links()


def _text_of(path: Path) -> str:
    text = path.read_text(encoding="utf-8")
    return "\n".join(_cells(json.loads(text))) if path.suffix == ".ipynb" else text


def _cells(notebook: Any) -> Iterator[str]:
    """Yield a notebook's cells as Markdown, with what they have printed and drawn."""
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            yield f"{source}\n"
            continue
        yield f"```python\n{source}\n```\n"
        for output in cell["outputs"]:
            data = output.get("data", {})
            if "image/png" in data:
                picture = "".join(data["image/png"]).replace("\n", "")
                yield f"![Drawn by the lines above](data:image/png;base64,{picture})\n"
            elif text := "".join(output.get("text", data.get("text/plain", ""))):
                yield f"```text\n{text.rstrip()}\n```\n"
