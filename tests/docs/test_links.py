"""Links of the documents lead somewhere: files exist, headings too.  Those to other sites are only looked at."""

import re
from pathlib import PurePosixPath
from urllib.parse import urlparse

import pytest
from commands import ROOT, tool
from documents import DOCUMENTS, read

links = tool("report/links")
RESULTS = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "benchmarks/results").glob("*.md"))
_CODE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
_INCLUDE = re.compile(r"\A(?:.*\n)*?\[[^\]]*\]\((\S+)\) <!-- include -->$", re.MULTILINE)


def text_of(document: str) -> str:
    """With what the site puts in; its links are those of the file that it comes from."""
    folder = str(PurePosixPath(document).parent)
    return _INCLUDE.sub(lambda match: read(links.resolve(match[1], folder)), read(document))


def anchors(document: str) -> set[str]:
    """What headings are called, on GitHub and in the site alike."""
    headings = re.findall(r"^#+ (.+)$", _CODE.sub("", text_of(document)), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken(document: str, text: str) -> list[str]:
    """Links of a text at the place of a document."""
    folder, found = str(PurePosixPath(document).parent), []
    for path, anchor in links.targets(text):
        if links.is_external(path):
            url = urlparse(path)
            if url.scheme not in ("https", "mailto") or (url.scheme == "https" and "." not in url.netloc):
                found.append(path)
            continue
        target = links.resolve(path, folder) if path else document
        exists = not target.startswith("..") and (ROOT / target).exists()
        if not exists or (anchor and (not target.endswith(".md") or anchor[1:] not in anchors(target))):
            found.append(path + anchor)
    return found


@pytest.mark.parametrize("document", [*DOCUMENTS, *RESULTS])
def test_links_lead_somewhere(document):
    assert broken(document, read(document)) == []


def test_there_are_links():
    assert sum(1 for document in DOCUMENTS for _ in links.targets(read(document))) > 100


@pytest.mark.parametrize(
    "link", ["nowhere.md", "install.md#no-such-heading", "../../outside", "http://plain", "#nothing"]
)
def test_a_broken_link_is_noticed(link):
    assert broken("docs/faq.md", f"[here]({link})") == [link]


def test_links_in_code_are_none():
    assert list(links.targets("`[a](b)` [c](d#e)\n\n```\n[f](g)\n```\n")) == [("d", "#e")]


def test_links_move_with_their_text():
    text = "[a](x.md#y) [b](../z) [c](https://example.org/x) [d](#e)"
    assert links.relocate(text, "one/two", "") == "[a](one/two/x.md#y) [b](one/z) [c](https://example.org/x) [d](#e)"
    assert links.relocate(text, "one/two", "one") == "[a](two/x.md#y) [b](z) [c](https://example.org/x) [d](#e)"


@pytest.mark.parametrize("page", [each for each in DOCUMENTS if each.startswith("docs/ops/")])
def test_an_ops_page_lists_its_functions_without_the_site_too(page):
    listed = re.findall(r"^- \[`(\w+)`\]\(\S+/(\w+)\.py\)", read(page), re.MULTILINE)
    in_site = re.findall(r"^::: fused_attn\.ops\.\w+\.(\w+)\.(\w+)$", read(page), re.MULTILINE)
    assert [(module, name) for name, module in listed] == in_site != []
