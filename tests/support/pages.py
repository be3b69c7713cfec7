"""What a page holds, read as a browser would."""

from __future__ import annotations

from html.parser import HTMLParser
from pathlib import Path


class Read(HTMLParser):
    """Collect a page's addresses, the texts in the place of its pictures, and its words."""

    def __init__(self, path: Path):
        super().__init__()
        self.addresses: list[str] = []
        self.alternatives: list[str | None] = []
        self.words = ""
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.addresses += [str(given[key]) for key in ("src", "href", "data") if key in given]
        if tag in ("img", "svg", "object"):
            self.alternatives.append(given.get("alt"))

    def handle_data(self, data: str) -> None:
        self.words += data


def read_page(path: Path) -> Read:
    """Read a page that asks for nothing but files beside it, and says what its pictures show."""
    page = Read(path)
    for address in page.addresses:
        assert address.startswith("data:") or (path.parent / address).exists(), address[:80]
    assert all(page.alternatives), page.alternatives
    assert "url(" not in page.words and "@import" not in page.words
    return page
