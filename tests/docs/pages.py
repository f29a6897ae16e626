"""The pages of the documentation, taken apart."""

import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = sorted(path for path in DOCS.rglob("*.md") if "_build" not in path.parts)
OUTSIDE = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "examples/README.md"]
_FENCE = re.compile(r"((?:^<!-- [^\n]* -->\n)*)^```([{}\w-]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_MARK = re.compile(r"<!-- (\w+)(?:: (.*?))? -->")


class Block(NamedTuple):
    """A fenced block with its language and the marks above it, e.g. `<!-- file: hello.py -->`."""

    language: str
    text: str
    marks: dict[str, str]


def blocks(path: Path) -> Iterator[Block]:
    """Yield the fenced blocks of a page."""
    for marks, language, text in _FENCE.findall(path.read_text(encoding="utf-8")):
        yield Block(language, text, dict(_MARK.findall(marks)))


def text_of(name: str) -> str:
    """Return the text of a page in `docs`."""
    return (DOCS / name).read_text(encoding="utf-8")


def generator() -> ModuleType:
    """Return the module that writes the generated parts."""
    spec = importlib.util.spec_from_file_location("docs_generate", DOCS / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
