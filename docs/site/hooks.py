"""What mkdocs does beyond docs/*.md: pages made of recipes, docstrings and root files, formulas as MathML, lists and
results where a page asks for them. And what it checks: that every link and file of the finished site is there."""

import sys
from pathlib import Path

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File


HERE = Path(__file__).parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(ROOT), str(HERE)]

import links  # noqa: E402 (these are beside this file)
import pages  # noqa: E402


def on_config(config):
    """Replaces every name without an ending in `nav` by the pages that it stands for."""
    named = set(pages.named_in(config.nav))
    groups = pages.groups(Path(config.docs_dir), named)
    config.nav = pages.expand(config.nav, groups)
    config.watch = [*config.watch, str(ROOT / "training/recipes"), str(ROOT / "modeling")]
    return config


def on_files(files, config):
    for uri, text in pages.made().items():
        files.append(File.generated(config, uri, content=text))
    return files


def on_page_markdown(markdown, page, config, files):
    markdown = pages.with_lists(markdown, page.file.src_uri)
    markdown = pages.with_formulas(markdown)
    folder = Path(config.docs_dir, page.file.src_uri).parent
    return pages.with_site_links(markdown, page.file.src_uri, folder)


def on_post_build(config):
    """Raises:
    PluginError: a link or a file of the site leads nowhere, or a page loads something from another site.
    """
    if faults := links.find_faults(Path(config.site_dir)):
        raise PluginError("the site has broken links:\n  " + "\n  ".join(faults))
