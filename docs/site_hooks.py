"""What MkDocs does not do by itself: pages that hold a file of the repository, and links that leave ``docs/``.

In place of a line ``[...](FILE.md) <!-- include -->`` and of all that precedes it, which is what a reader of the page
sees without the site, the page holds the file.  A link to that file leads to the page.
Any other file that a page links becomes a part of the site, below ``repository/``: pictures as they are, Markdown as a
page, other text as a page of code, a folder as a list.
"""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path, PurePosixPath

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File

sys.path.append(str(Path(__file__).parents[1] / "benchmarks" / "report"))

import links

ROOT = Path(__file__).parents[1]
INCLUDE = re.compile(r"\A(?:.*\n)*?\[[^\]]*\]\((\S+)\) <!-- include -->$", re.MULTILINE)
PICTURES = {".png", ".svg"}

#: Uri in the site of files that lie outside docs/, and where such a page's links start.
_uris: dict[str, str] = {}
_folders: dict[str, str] = {}
#: What a page would fetch from a server.
_REMOTE = re.compile(r"""<(?:script|link|img|iframe)\b[^>]*\b(?:src|href)=["']?(?:https?:)?//[^>]*>""")


def _text(page: Path) -> str:
    """The Markdown of a page, with what it includes; links as from the page's folder."""
    folder = page.parent.relative_to(ROOT).as_posix()

    def included(match: re.Match) -> str:
        source = links.resolve(match[1], folder)
        return links.relocate((ROOT / source).read_text(), str(PurePosixPath(source).parent), folder)

    return INCLUDE.sub(included, page.read_text())


def _outside(text: str, folder: str) -> set[str]:
    """Files and folders outside docs/ that a page links."""
    paths = {path for path, _ in links.targets(text) if path and not links.is_external(path)}
    return {path for path in (links.resolve(path, folder) for path in paths) if not path.startswith("docs/")}


def _generated(path: str, config) -> File:
    target, uri = ROOT / path, f"repository/{path}"
    if target.suffix in PICTURES:
        _uris[path] = uri
        return File.generated(config, uri, abs_src_path=str(target))
    if target.suffix == ".md":
        content = target.read_text()
    elif target.is_dir():
        uri += "/index.md"
        content = f"# {path}\n\n" + "".join(f"- `{each.name}`\n" for each in sorted(target.iterdir()))
    else:
        uri += ".md"
        language = {".py": "python", ".h": "cpp", ".cpp": "cpp", ".json": "json", ".csv": "text"}.get(target.suffix, "")
        content = f"# {path}\n\n``````{language}\n{target.read_text()}\n``````\n"
    _uris[path], _folders[uri] = uri, os.path.dirname(path)
    return File.generated(config, uri, content=content)


def on_files(files, config):
    waiting: set[str] = set()
    for file in files.documentation_pages():
        page = Path(file.abs_src_path)
        folder = page.parent.relative_to(ROOT).as_posix()
        for path in INCLUDE.findall(page.read_text()):
            _uris[links.resolve(path, folder)] = file.src_uri
        waiting |= _outside(_text(page), folder)
    done: set[str] = set()
    while waiting:
        path = waiting.pop()
        done.add(path)
        if path in _uris or not (ROOT / path).exists():  # a link that leads nowhere stays, and MkDocs warns
            continue
        file = _generated(path, config)
        files.append(file)
        if path.endswith(".md"):
            waiting |= _outside(file.content_string, os.path.dirname(path)) - done
    return files


def on_page_markdown(markdown, page, config, files):
    uri = page.file.src_uri
    here = os.path.dirname(uri)
    if uri in _folders:
        folder = _folders[uri]
    else:
        source = Path(page.file.abs_src_path)
        markdown, folder = _text(source), source.parent.relative_to(ROOT).as_posix()

    def new(path: str) -> str:
        target = links.resolve(path, folder)
        inside = target.removeprefix("docs/") if target.startswith("docs/") else _uris.get(target)
        return path if inside is None else os.path.relpath(inside, here or ".")

    return links.replace(markdown, new)


def on_post_page(output, page, config):
    if remote := _REMOTE.search(output):
        raise PluginError(f"{page.file.src_uri}: the site must need no network, found {remote[0]}")
    return output
