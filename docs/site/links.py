"""Whether every link and every file of a finished site is there, and nothing is loaded from elsewhere."""

from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit


LOADING = {"img": "src", "script": "src", "iframe": "src", "source": "src", "video": "src", "link": "href"}
NEIGHBOURS = ("canonical", "prev", "next")  # what a <link> may name without loading it


class Page(HTMLParser):
    """What a page links to and loads, and the places in it that can be linked to."""

    def __init__(self, text: str):
        super().__init__()
        self.ids: set[str] = set()
        self.links: set[str] = set()
        self.loaded: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        values = {name: value or "" for name, value in attributes}
        self.ids |= {values[name] for name in ("id", "name") if name in values}
        if tag == "a":
            self.links.add(values.get("href") or "#")
        elif values.get(LOADING.get(tag, "")):
            neighbour = tag == "link" and values.get("rel") in NEIGHBOURS
            (self.links if neighbour else self.loaded).add(values[LOADING[tag]])


def find_faults(site: Path) -> list[str]:
    """Broken links and missing files of all pages, and what they load from other sites; sorted."""
    pages = {path: Page(path.read_text(encoding="utf-8")) for path in site.rglob("*.html")}
    pages = {path: page for path, page in pages.items() if path.name != "404.html"}  # its links begin at the root
    return sorted(fault for path in pages for fault in faults_of(path, pages, site))


def faults_of(path: Path, pages: dict[Path, Page], site: Path) -> list[str]:
    place, faults = path.relative_to(site), []
    for address in pages[path].links | pages[path].loaded:
        parts = urlsplit(address)
        if parts.scheme or parts.netloc:
            if address in pages[path].loaded and parts.scheme != "data":
                faults.append(f"{place} loads {address}")
            continue
        target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
        target = target / "index.html" if target.is_dir() else target
        anchor = unquote(parts.fragment)
        if not target.exists():
            faults.append(f"{place} -> {address}: no such file")
        elif anchor and not anchor.startswith("__") and target in pages and anchor not in pages[target].ids:
            faults.append(f"{place} -> {address}: no such place in it")
    return faults
