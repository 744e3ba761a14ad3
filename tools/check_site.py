"""Check of the built site: links, headings, images and navigation. Run by `make docs`; needs only the standard library.

python tools/check_site.py zensical.toml README.md

The site generator checks links between pages itself. It does not see a missing image, a page that the navigation lacks,
an entry of the navigation without a page, or the links of the README.
"""

from __future__ import annotations

import re
import sys
import tomllib
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

# In HTML, these load something when a page is opened; a link is only followed by a reader.
LOADING = {"script": "src", "img": "src", "link": "href", "iframe": "src", "source": "src"}
NOT_LOADED = {"canonical", "next", "prev", "alternate"}


class Page(HTMLParser):
    """Ids, links and loaded files of one HTML page."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.ids: set[str] = set()
        self.links: list[str] = []
        self.loaded: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note the ids and the addresses of one tag."""
        values = {name: value or "" for name, value in attrs}
        self.ids.update(values[name] for name in ("id", "name") if name in values)
        if tag == "a" and "href" in values:
            self.links.append(values["href"])
        if tag in LOADING and LOADING[tag] in values and values.get("rel") not in NOT_LOADED:
            self.loaded.append(values[LOADING[tag]])


def navigation(entries: list[Any]) -> Iterator[str]:
    """Files that the navigation names, in its order."""
    for entry in entries:
        for value in [entry] if isinstance(entry, str) else entry.values():
            if isinstance(value, str):
                yield value
            else:
                yield from navigation(value)


def navigation_faults(documents: Path, entries: list[Any]) -> Iterator[str]:
    """Pages that the navigation lacks, and entries without a page."""
    named = list(navigation(entries))
    existing = {str(path.relative_to(documents)) for path in documents.rglob("*.md")}
    yield from (f"navigation: {name} is no file of {documents}" for name in named if name not in existing)
    yield from (f"navigation: {name} is missing" for name in sorted(existing - set(named)))


def link_faults(site: Path, base: str) -> Iterator[str]:
    """Links without a target, and files loaded from elsewhere; ``base`` is the path of the site's address."""
    pages = {path: Page(path) for path in sorted(site.rglob("*.html"))}
    for path, page in pages.items():
        here = path.relative_to(site)
        for address in [*page.links, *page.loaded]:
            parts = urlsplit(address)
            if parts.scheme or parts.netloc:
                if address in page.loaded and parts.scheme != "data":
                    yield f"{here}: loads {address}, which is not part of the site"
                continue
            name = unquote(parts.path)
            target = path
            if name.startswith("/"):
                target = site / name.removeprefix(base).lstrip("/")
            elif name:
                target = (path.parent / name).resolve()
            if not target.exists():
                yield f"{here}: {address} does not exist"
            elif parts.fragment and target in pages and unquote(parts.fragment) not in pages[target].ids:
                yield f"{here}: {address} has no such heading"


def readme_faults(readme: Path, site: Path, documents: Path) -> Iterator[str]:
    """Links of the README without a target."""
    for address in re.findall(r"\]\(([^)\s]+)\)", readme.read_text(encoding="utf-8")):
        name, _, fragment = address.partition("#")
        path = readme.parent / name
        page = fragment and path.suffix == ".md" and documents in path.parents
        if urlsplit(address).scheme:
            continue
        if not path.exists():
            yield f"{readme.name}: {address} does not exist"
        elif page and fragment not in Page(site / path.relative_to(documents).with_suffix(".html")).ids:
            yield f"{readme.name}: {address} has no such heading"


def main(configuration: Path, readme: Path) -> None:
    """Print each fault; the status is 1 if there is one."""
    project = tomllib.loads(configuration.read_text(encoding="utf-8"))["project"]
    root = configuration.resolve().parent
    site, documents = root / project["site_dir"], root / project["docs_dir"]
    base = urlsplit(project.get("site_url", "")).path
    faults = [
        *navigation_faults(documents, project["nav"]),
        *link_faults(site, base),
        *readme_faults(readme.resolve(), site, documents),
    ]
    if faults:
        sys.exit("\n".join(faults))
    print(f"Checked: links, images and navigation of {len(list(documents.rglob('*.md')))} pages")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
