"""Who we are at which server: tokens by URL, in the user's configuration folder, readable by the user alone.

`profiles.json` holds what people use; `agents/` holds one credential per server and agent name. Environment variables win over files.
"""

import hashlib
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import msgspec
import platformdirs

DEFAULT_URL: Final = "http://127.0.0.1:8640"
URL_VARIABLE: Final = "MCP_CONTROL_URL"
TOKEN_VARIABLE: Final = "MCP_CONTROL_TOKEN"  # noqa: S105 - the name of a variable
ENROLMENT_VARIABLE: Final = "MCP_CONTROL_ENROLMENT_TOKEN"
ENROLMENT_FILE_VARIABLE: Final = "MCP_CONTROL_ENROLMENT_TOKEN_FILE"
FOLDER_VARIABLE: Final = "MCP_CONTROL_CONFIG_DIR"


class Profile(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A server and how to speak to it. `name` is what people call it."""

    url: str
    token: str = ""
    name: str = ""


class _File(msgspec.Struct, kw_only=True, omit_defaults=True):
    default: str = ""
    profiles: dict[str, Profile] = {}


class _Credential(msgspec.Struct, frozen=True, kw_only=True):
    url: str
    name: str
    credential: str


def normal_url(url: str) -> str:
    """Return the URL as it serves as a key: with scheme, without a trailing slash."""
    text = url.strip()
    return (text if "://" in text else f"http://{text}").rstrip("/")


class Profiles:
    """The files of one configuration folder. Reading a missing file finds nothing; writing is atomic and mode 0600."""

    def __init__(self, folder: Path | None = None, environ: Mapping[str, str] | None = None) -> None:
        """Name the folder; by default `MCP_CONTROL_CONFIG_DIR`, or the platform's folder for user configuration."""
        self._environ = os.environ if environ is None else environ
        chosen = self._environ.get(FOLDER_VARIABLE)
        self.folder = folder or (
            Path(chosen) if chosen else platformdirs.user_config_path("mcp-control", appauthor=False)
        )

    def resolve(self, url: str | None = None, token: str | None = None) -> Profile:
        """Return where to go and with which token.

        The first that is there wins: argument, environment variable, stored profile (of that URL, or the default one), local default.
        The token of the environment goes with the URL of the environment or of the argument alike. `url` may be a profile's name.
        """
        stored = self._load()
        wanted = url or self._environ.get(URL_VARIABLE) or stored.default or DEFAULT_URL
        by_name = next((p for p in stored.profiles.values() if p.name and p.name == wanted), None)
        key = by_name.url if by_name else normal_url(wanted)
        found = stored.profiles.get(key)
        return Profile(
            url=key,
            token=token or self._environ.get(TOKEN_VARIABLE) or (found.token if found else ""),
            name=found.name if found else "",
        )

    def all(self) -> list[Profile]:
        """Return the stored profiles by URL."""
        return [profile for _, profile in sorted(self._load().profiles.items())]

    @property
    def default(self) -> str:
        """The URL used when none is named; empty where none was chosen."""
        return self._load().default

    def save(self, profile: Profile, default: bool = False) -> None:
        """Keep a profile under its URL; the first one kept is the default, too."""
        stored = self._load()
        key = normal_url(profile.url)
        stored.profiles[key] = msgspec.structs.replace(profile, url=key)
        if default or not stored.default:
            stored.default = key
        self._write(self.folder / "profiles.json", msgspec.json.format(msgspec.json.encode(stored), indent=2))

    def remove(self, url: str) -> None:
        """Forget a profile; one that is not there is fine."""
        stored = self._load()
        key = normal_url(url)
        stored.profiles.pop(key, None)
        if stored.default == key:
            stored.default = ""
        self._write(self.folder / "profiles.json", msgspec.json.format(msgspec.json.encode(stored), indent=2))

    def agent_credential(self, url: str, name: str) -> str:
        """Return the stored credential of an agent at a server, or the empty string."""
        try:
            return msgspec.json.decode(self._agent_file(url, name).read_bytes(), type=_Credential).credential
        except (FileNotFoundError, msgspec.MsgspecError):
            return ""

    def save_agent_credential(self, url: str, name: str, credential: str) -> None:
        """Keep the credential of an agent at a server."""
        stored = _Credential(url=normal_url(url), name=name, credential=credential)
        self._write(self._agent_file(url, name), msgspec.json.encode(stored))

    def enrolment_token(self) -> str:
        """Return the one-time token an agent enrols with, from the environment or the file that it names; else the empty string."""
        if token := self._environ.get(ENROLMENT_VARIABLE):
            return token.strip()
        if path := self._environ.get(ENROLMENT_FILE_VARIABLE):
            try:
                return Path(path).read_text(encoding="utf-8").strip()
            except FileNotFoundError:
                return ""
        return ""

    def _agent_file(self, url: str, name: str) -> Path:
        digest = hashlib.sha256(f"{normal_url(url)}\n{name}".encode()).hexdigest()
        return self.folder / "agents" / f"{digest[:32]}.json"

    def _load(self) -> _File:
        try:
            return msgspec.json.decode((self.folder / "profiles.json").read_bytes(), type=_File)
        except FileNotFoundError:
            return _File()

    def _write(self, path: Path, content: bytes) -> None:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=".new-")  # mode 0600 from the start
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(name, path)
        except BaseException:
            os.unlink(name)
            raise
