"""Links of the documentation lead somewhere; snippets are what they claim to be."""

import re
import tomllib
from pathlib import Path

import pytest
import yaml

from mcp_control.pipelines.definition import from_yaml
from mcp_control.pipelines.validate import validate
from tests.docs.pages import DOCS, OUTSIDE, PAGES, ROOT, blocks, generator

EVERYWHERE = [*OUTSIDE, *PAGES]
EVERY_COMMAND = {"--help", "-h", "--version", "--profile", "--no-input", "--yes", "-y", "--no-color"}
COMMANDS = dict(generator().walk())
LINK = re.compile(r"\]\(([^)\s]+)\)")


def _id(path: Path) -> str:
    return str(path.relative_to(ROOT))


def _anchor(heading: str) -> str:
    """The anchor of a heading, as GitHub and MyST make it."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


@pytest.mark.parametrize("page", EVERYWHERE, ids=_id)
def test_relative_links_lead_to_a_file_and_a_heading(page: Path) -> None:
    """A link that is no address names a file that is there; its anchor a heading of that file."""
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for link in LINK.findall(text):
        if re.match(r"https?:", link):
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.exists(), link
        if anchor:
            headings = re.findall(r"^#+ (.+)$", target.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in {_anchor(heading) for heading in headings}, link


def test_every_page_is_reached_from_the_first() -> None:
    """A page that no list names is found by nobody."""
    listed = {"index"}
    for index in (DOCS / "index.md", DOCS / "decisions/index.md"):
        for entries in re.findall(r"```\{toctree\}\n(.*?)```", index.read_text(encoding="utf-8"), re.DOTALL):
            prefix = "" if index.parent == DOCS else "decisions/"
            listed |= {prefix + line for line in entries.splitlines() if line and not line.startswith(":")}
    assert listed == {str(page.relative_to(DOCS).with_suffix("")) for page in PAGES}


@pytest.mark.parametrize("page", EVERYWHERE, ids=_id)
def test_snippets_are_valid(page: Path) -> None:
    """Python compiles, YAML and TOML load, pipelines are accepted."""
    for block in blocks(page):
        if block.language == "python":
            compile(block.text, str(page), "exec")
        elif block.language == "toml":
            tomllib.loads(block.text)
        elif block.language == "yaml":
            definition = yaml.safe_load(block.text)
            if definition.get("kind") == "Pipeline" and "broken" not in str(definition["metadata"]):
                validate(from_yaml(block.text.encode()))


@pytest.mark.parametrize("page", EVERYWHERE, ids=_id)
def test_commands_of_snippets_exist_with_their_options(page: Path) -> None:
    """Each `mcpctl …` in a shell snippet or in running text is a command, and takes the options it is given."""
    text = page.read_text(encoding="utf-8")
    lines = [line for block in blocks(page) if block.language == "sh" for line in block.text.splitlines()]
    lines += re.findall(r"`(mcpctl [^`]+)`", text)
    for line in lines:
        for call in re.findall(r"\bmcpctl ((?:[a-z-]+ ?)+[^|;)]*)", line.partition(" # ")[0]):
            words = call.split()
            if words[0] in EVERY_COMMAND:
                continue
            name = next((n for n in (f"mcpctl {' '.join(words[:2])}", f"mcpctl {words[0]}") if n in COMMANDS), None)
            group = any(known.startswith(f"mcpctl {words[0]} ") for known in COMMANDS)
            if name is None:
                assert group, line
                assert len(words) == 1, line
                continue
            options = {flag for each in COMMANDS[name].params for flag in [*each.opts, *each.secondary_opts]}
            used = {word.partition("=")[0] for word in words if re.match(r"--?[a-z]", word)}
            assert used <= options | EVERY_COMMAND, line
