"""The Hugging Face Hub through huggingface_hub, and what it refuses in words.

Token, cache, address and offline mode are by that package's own rules: HF_TOKEN or `hf auth login`, HF_HOME,
HF_ENDPOINT, HF_HUB_OFFLINE. Messages hold no token: what a server or the package says is not passed on unread.
"""

import errno
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from rwkv_lab.checks import Check
from rwkv_lab.errors import CorruptFileError, HubError, HubUnreachableError, OutputError, ParameterError, RwkvLabError
from rwkv_lab.text import counted

if TYPE_CHECKING:
    from huggingface_hub import HfApi

TRANSPORTS = ("httpx", "httpx2", "httpcore", "httpcore2", "requests", "urllib3")  # by version of huggingface_hub
_LOG_IN = "hf auth login, or the variable HF_TOKEN"
_SECRET = re.compile(r"hf_\w+|(?<=://)[^/\s@]+@|(?<=\?)\S+")  # tokens, passwords in addresses, signed queries


@dataclass(frozen=True)
class HubFile:
    """A file of a repository."""

    name: str  # with the folders it is in
    bytes: int
    sha256: str  # "" of small files, which the Hub keeps in git


@dataclass(frozen=True)
class Pushed:
    """What was uploaded."""

    repo_id: str
    url: str  # of the commit
    commit: str
    private: bool
    files: tuple[str, ...]  # that were uploaded, the model card among them
    replaced: tuple[str, ...]  # those of them that were there before with other contents
    checks: tuple[Check, ...]

    @property
    def notes(self) -> tuple[str, ...]:
        """What happened, in words."""
        seen = "private" if self.private else "public"
        files = counted(len(self.files), "file was", "files were")
        note = f"{files} uploaded to {self.repo_id}, which is {seen}: {self.url}"
        was = f"Replaced there: {', '.join(self.replaced)}; the versions before are in its history."
        return (note, was) if self.replaced else (note,)


def require_hub(what: str) -> None:
    """Refuse a job that the package huggingface_hub is missing for.

    Raises:
        ParameterError: it is not installed.
    """
    try:
        import huggingface_hub  # noqa: F401
    except ImportError as e:
        text = f"{what} needs the package huggingface_hub.\nInstall it: pip install 'rwkv_lab[convert]'"
        raise ParameterError(text) from e


def hub_api() -> "HfApi":
    """The Hub as the environment has it now."""
    from huggingface_hub import HfApi

    return HfApi(library_name="rwkv_lab")


def hub_address() -> str:
    """Host and port of the Hub, without a user or password."""
    from huggingface_hub import constants

    parts = urlsplit(constants.ENDPOINT)
    return f"{parts.hostname}:{parts.port}" if parts.port else str(parts.hostname)


def has_token() -> bool:
    """Whether a request to the Hub carries a token."""
    from huggingface_hub import get_token

    return bool(get_token())


@contextmanager
def refusals_in_words(repo_id: str, doing: str, writing: bool = False) -> Iterator[None]:
    """Whatever huggingface_hub raises in the block as an error of ours, one plain sentence and what to do.

    Args:
        doing: what is being done, for messages: "the download of B.pth".
        writing: whether the repository is written to.
    Raises:
        HubError, ParameterError, CorruptFileError, OutputError: by what happened.
    """
    try:
        yield
    except RwkvLabError:
        raise
    except Exception as e:  # its versions raise errors of three transports, of its own, and plain ones
        raise _in_words(e, repo_id, doing, writing) from None  # its text may hold addresses that are signed


def _in_words(error: Exception, repo_id: str, doing: str, writing: bool) -> RwkvLabError:
    from huggingface_hub import errors

    while isinstance(error, errors.LocalEntryNotFoundError | RuntimeError) and isinstance(error.__cause__, Exception):
        error = error.__cause__  # what it comes from tells more
    if isinstance(error, errors.OfflineModeIsEnabled):
        return HubUnreachableError(
            f"HF_HUB_OFFLINE is set, so the Hub is not asked for {doing}.\nUnset it, or use files on this disk."
        )
    if isinstance(error, errors.LocalEntryNotFoundError):
        return HubUnreachableError(f"{doing}: it is not in the cache of the Hub's files on this machine.")
    if isinstance(error, errors.HFValidationError):
        return ParameterError(f"{repo_id!r} is no name of a repository: it should be owner/name.")
    if isinstance(error, errors.HfHubHTTPError):
        return _answered(error, repo_id, doing, writing)
    if "Invalid metadata in README.md" in str(error):
        found = [line for line in str(error).splitlines()[1:] if line.strip(" -")]
        return HubError(f"The Hub refuses the model card: {_first_line(' '.join(found)) or 'its metadata'}")
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return OutputError(f"{doing}: the disk of the Hub's cache (HF_HOME) is full.")
    if isinstance(error, PermissionError):
        return OutputError(f"{doing}: {error.filename} may not be written; HF_HOME names another folder for the cache.")
    if isinstance(error, OSError) and "Consistency check" in str(error):
        return CorruptFileError(f"{doing} broke off: fewer or more bytes came than the Hub states. Run it again.")
    if isinstance(error, ConnectionError | TimeoutError) or type(error).__module__.split(".")[0] in TRANSPORTS:
        return _not_reached(error, doing)
    return HubError(f"{doing} failed in huggingface_hub: {type(error).__name__}: {_first_line(str(error))}")


def _not_reached(error: Exception, doing: str) -> HubUnreachableError:
    why = _first_line(str(error)) or type(error).__name__
    if type(error).__name__ in ("RemoteProtocolError", "ReadError", "WriteError", "ChunkedEncodingError"):
        return HubUnreachableError(
            f"The connection to {hub_address()} broke off during {doing} ({why}).\nRun it again."
        )
    return HubUnreachableError(
        f"The Hugging Face Hub ({hub_address()}) cannot be reached for {doing}: {why}.\n"
        "Check the network, the proxy and HF_ENDPOINT, or use files on this disk."
    )


def _answered(error: "Exception", repo_id: str, doing: str, writing: bool) -> RwkvLabError:
    """What a status and the header X-Error-Code mean."""
    from huggingface_hub import errors

    response = getattr(error, "response", None)
    status, headers = getattr(response, "status_code", 0), getattr(response, "headers", {})
    said = _first_line(str(getattr(error, "server_message", "") or ""))
    if isinstance(error, errors.GatedRepoError):
        who = "the account of this token" if has_token() else "anybody without a token"
        return HubError(
            f"{repo_id} is gated, and {who} is not let in.\n"
            f"Ask for access on its page at {hub_address()}, then log in: {_LOG_IN}."
        )
    if isinstance(error, errors.DisabledRepoError):
        return HubError(f"{repo_id} was disabled by the Hub or its owner; it cannot be downloaded.")
    if isinstance(error, errors.RevisionNotFoundError):
        return ParameterError(f"{repo_id} has no such revision for {doing}: a branch, a tag or a full commit is one.")
    if isinstance(error, errors.EntryNotFoundError):
        return ParameterError(f"{repo_id} does not have the file of {doing}.")
    if status == 401 and has_token() and re.search("credentials|user token", f"{said} {error}", re.IGNORECASE):
        return HubError(f"The Hub does not accept the token: it is wrong, or has expired.\nLog in again: {_LOG_IN}.")
    if isinstance(error, errors.RepositoryNotFoundError) or status == 401:
        why = "or it is private and the account of this token may not read it"
        if not has_token():
            why = f"or it is private, which needs a token: {_LOG_IN}"
        return HubError(f"The Hub has no model repository {repo_id}, {why}.\nCheck the name; case counts.")
    if status == 403:
        right = f"write to {repo_id.partition('/')[0]}" if writing else f"read {repo_id}"
        return HubError(f"The token has no right to {right}.\nMake one that has at the Hub, then: {_LOG_IN}.")
    if status == 429:
        return HubUnreachableError(
            f"The Hub limits how often it may be asked, and {doing} is over the limit{_wait(headers)}."
            + ("" if has_token() else f"\nThe limit is higher with a token: {_LOG_IN}.")
        )
    if status in (400, 409, 412, 413, 422):
        return HubError(f"The Hub refuses {doing} ({status}): {said or 'it gives no reason'}")
    text = f"The Hub could not answer {doing}: its error {status}. Try again later."
    return (
        HubUnreachableError(text) if status >= 500 else HubError(f"The Hub refuses {doing}: its error {status}. {said}")
    )


def _wait(headers: object) -> str:
    """How long to wait, where the headers say so."""
    get = getattr(headers, "get", lambda name: None)
    stated = re.search(r"\bt=(\d+)", get("ratelimit") or "") or re.fullmatch(r"(\d+)", get("retry-after") or "")
    return f"; wait {stated[1]} seconds" if stated else "; wait some minutes"


def _first_line(text: str) -> str:
    """The first line of what others wrote, without what may be secret, printable and short."""
    lines = [line.strip() for line in _SECRET.sub("…", text).splitlines() if line.strip()]
    line = "".join(c for c in lines[0] if c.isprintable()) if lines else ""
    return line if len(line) <= 160 else line[:160] + "…"
