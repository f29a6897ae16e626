"""What an install promises: locked, from any registry, and light where only the SDK and the CLI are wanted."""

import ast
import json
import re
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LOCKS = sorted((ROOT / "requirements").glob("*.txt"))
PINNED = re.compile(r"^([a-z0-9-]+)==\S+", re.MULTILINE)
NPM_LOCKS = [path for path in ROOT.glob("ui/*/package-lock.json") if "node_modules" not in path.parts]

# Run in a fresh interpreter: whatever the base install does not bring is made unimportable, then the module is imported.
IMPORT_WITHOUT = """
import importlib, sys
for name in sys.argv[2].split(","):
    sys.modules[name] = None
importlib.import_module(sys.argv[1])
"""


def pinned(lock: Path) -> set[str]:
    """The distributions that a requirement file pins."""
    return set(PINNED.findall(lock.read_text()))


def modules(package: str) -> list[str]:
    """The modules of a package of ours by their full names."""
    folder = ROOT / "src" / "mcp_control" / package
    files = (path.relative_to(ROOT / "src").with_suffix("") for path in sorted(folder.rglob("*.py")))
    return [".".join(file.parts).removesuffix(".__init__") for file in files]


def test_every_extra_has_a_lock() -> None:
    """Each of the documented installs (base, server, techdeck, dev) can be made from locked versions."""
    assert {lock.name for lock in LOCKS} == {"base.txt", "server.txt", "techdeck.txt", "dev.txt"}


@pytest.mark.parametrize("lock", LOCKS, ids=lambda lock: lock.name)
def test_locks_carry_hashes_and_name_no_registry(lock: Path) -> None:
    """Every pinned distribution has a hash, and the file works with whatever registry the machine is set up for."""
    text = lock.read_text()
    blocks = re.split(r"\n(?=\S)", text.strip())
    assert blocks
    assert [block.splitlines()[0] for block in blocks if "--hash=sha256:" not in block] == []
    assert not re.search(r"://|--(extra-)?index-url|--find-links|--trusted-host|@ ", text)


@pytest.mark.parametrize("lock", LOCKS, ids=lambda lock: lock.name)
def test_locks_agree(lock: Path) -> None:
    """A distribution has the same version in every requirement file."""
    everything = {line.split(" ")[0] for line in (ROOT / "requirements" / "dev.txt").read_text().splitlines()}
    lines = [line.split(" ")[0] for line in lock.read_text().splitlines() if PINNED.match(line)]
    assert lines
    assert [line for line in lines if line not in everything] == []


def test_locks_cover_the_declared_dependencies() -> None:
    """Nothing is declared in pyproject.toml that the requirement files lack: `make lock` was run after a change."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = {"base": project["dependencies"], **project["optional-dependencies"]}
    for extra, requirements in declared.items():
        names = {re.split(r"[^A-Za-z0-9-]", requirement)[0].lower() for requirement in requirements}
        assert names - {"mcp-control-panel"} <= pinned(ROOT / "requirements" / f"{extra}.txt"), extra


@pytest.mark.parametrize("lock", NPM_LOCKS, ids=lambda lock: lock.parent.name)
def test_npm_locks_carry_digests_and_name_no_registry(lock: Path) -> None:
    """The front end's lock files name packages and digests, not the registry that served them."""
    packages = {name: entry for name, entry in json.loads(lock.read_text())["packages"].items() if name}
    assert packages
    for name, entry in packages.items():
        assert "resolved" not in entry, name
        assert entry["integrity"].startswith("sha512-"), name


@pytest.mark.parametrize("module", [*modules("kernel"), *modules("sdk"), "mcp_control.cli.main"])
def test_sdk_and_cli_need_only_the_base_install(module: str) -> None:
    """The SDK and the command line start on a machine that has the base requirements and nothing else."""
    base = {name.replace("-", "_") for name in pinned(ROOT / "requirements" / "base.txt")}
    absent = [
        name
        for name, distributions in packages_distributions().items()
        if name.isidentifier()
        and name not in {"mcp_control", "pip", "setuptools", "pkg_resources", "_distutils_hack"}
        and not any(distribution.lower().replace("-", "_") in base for distribution in distributions)
    ]
    assert "uvicorn" in absent
    command = [sys.executable, "-c", IMPORT_WITHOUT, module, ",".join(absent)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


# Imported by no module of ours: uvicorn's parser, whose protocol ours extends; the time zones that zoneinfo looks for.
NEEDED_BY_OTHERS = {"httptools", "tzdata"}


def declared(*extras: str) -> set[str]:
    """The distributions that pyproject.toml declares for these installs."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    everything = {"base": project["dependencies"], **project["optional-dependencies"]}
    return {re.split(r"[^A-Za-z0-9-]", line)[0].lower() for extra in extras for line in everything[extra]}


def imported(*folders: str, but: tuple[str, ...] = ()) -> set[str]:
    """The distributions that the modules below some folders import, whatever the place in the module."""
    skipped = [ROOT / folder for folder in but]
    paths = [
        path
        for folder in folders
        for path in (ROOT / folder).rglob("*.py")
        if not any(path.is_relative_to(folder) for folder in skipped)
    ]
    own = {"mcp_control", *sys.stdlib_module_names, *folders, *(path.stem for path in paths)}
    names: set[str] = set()
    for path in paths:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                names.add(node.module.partition(".")[0])
    distributions = packages_distributions()
    # The root of a package that several distributions share would name them all; ours share none.
    return {distributions.get(name, [name])[0].lower().replace("_", "-") for name in names - own}


def test_the_product_declares_what_it_imports_and_nothing_else() -> None:
    """No install lacks a library by luck of another one's dependencies, and none carries what nobody uses."""
    techdeck = imported("src/mcp_control/techdeck")
    rest = imported("src/mcp_control", but=("src/mcp_control/techdeck", "src/mcp_control/testing"))
    assert rest == declared("base", "server") - NEEDED_BY_OTHERS
    assert techdeck - declared("base", "techdeck") == set()
    assert declared("techdeck") - techdeck == set()


def test_tests_benchmarks_and_docs_import_what_is_declared() -> None:
    """A development install brings all that the rest of the repository imports."""
    found = imported("tests", "bench", "examples", "docs", "src/mcp_control/testing")
    assert found - declared("base", "server", "techdeck", "dev") == set()
