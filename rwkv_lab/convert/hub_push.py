"""Uploads a checkpoint to the Hugging Face Hub in one commit, with its model card, and compares what is there after.

Nothing in a repository is deleted: files of the same names are replaced, and the versions before stay in its history.
"""

import hashlib
import io
import logging
import re
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from rwkv_lab.arguments import checked
from rwkv_lab.checkpoint import open_checkpoint
from rwkv_lab.checkpoint.provenance import provenance_path
from rwkv_lab.checks import Check
from rwkv_lab.convert.hub import Pushed, has_token, hub_api, refusals_in_words, require_hub
from rwkv_lab.convert.model_card import model_card
from rwkv_lab.convert.spec import ConvertOptions
from rwkv_lab.errors import HubError, LayoutError, ParameterError, RwkvLabError
from rwkv_lab.paths import to_path
from rwkv_lab.progress import human_bytes
from rwkv_lab.suggestions import did_you_mean
from rwkv_lab.version import __version__

log = logging.getLogger(__name__)

CARD = "README.md"


def plan_push(options: ConvertOptions) -> tuple[str, ...]:
    """What a push would meet, in words; nothing is uploaded. Empty where none is asked for.

    Raises:
        HubError: no token, a repository that is public where private is asked for, or the Hub refuses.
        ParameterError: a name or a licence that the Hub does not take.
    """
    if not options.push_to_hub:
        return ()
    repo_id, there = _find(options.model_name, options.private)
    what = f"a new {'private' if options.private else 'public'} repository"
    if there is not None:
        count, seen = len(there.siblings or ()), "private" if there.private else "public"
        what = f"the {seen} repository, where files of the same names are replaced and the others of {count} stay"
    note = f"The output will be uploaded to {repo_id} on the Hugging Face Hub, {what}."
    if options.licence:
        _check_card(f"---\n{yaml.safe_dump({'license': options.licence})}---\n", repo_id, options.licence)
        return (note,)
    return (note, "The model card will say that no licence is stated; licence= states one.")


@checked
def push_to_hub(path: str | Path, model_name: str, *, private: bool = True, licence: str = "") -> Pushed:
    """Upload a checkpoint to the Hugging Face Hub in one commit, with a model card written from its provenance.

    Args:
        path: what was written: a file or a folder. README.md in the folder is uploaded in place of a card of ours.
        model_name: "owner/name"; without an owner, of the account that the token belongs to.
        private: whether a repository that is made is private. An existing one stays what it is; a public one is
            refused unless this is False.
        licence: for the model card, as the Hub calls it: "apache-2.0".
    Returns:
        What was uploaded, and how it compares with the files here.
    Raises:
        HubError: the Hub refuses, or cannot be reached; the files here stay as they are.
        ParameterError: what is no name, or a licence that the Hub does not know.
        ParameterError, LayoutError, CorruptFileError, UnsafeFileError: what is no checkpoint.
    """
    given = {"push_to_hub": True, "model_name": model_name, "private": private, "licence": licence}
    options = ConvertOptions.read(given)
    with open_checkpoint(to_path(path, "path")) as ck:
        if ck.kind in ("unknown", "unsupported"):
            raise LayoutError(f"{ck.path} is no checkpoint of RWKV, and is not uploaded: {ck.reason}.")
        try:
            repo_id, there = _find(options.model_name, options.private)
            files: dict[str, Path | bytes] = dict(_files_of(ck.path))
            if CARD not in files:
                files[CARD] = model_card(ck, repo_id, options.licence).encode()
            card = files[CARD]  # before a repository is made for what the Hub refuses
            text = card if isinstance(card, bytes) else card.read_bytes()
            _check_card(text.decode("utf-8", "replace"), repo_id, options.licence)
            return _upload(repo_id, options.private, files, there)
        except RwkvLabError as e:
            stated = "" if private else ", private=False"
            stated += f", licence={licence!r}" if licence else ""
            again = f"rwkv_lab.convert.push_to_hub({str(path)!r}, {model_name!r}{stated})"
            reason = str(e).replace("\n", " ")
            raise type(e)(f"{reason}\n{path} is complete. To upload it again:\n{again}") from None


def _find(model_name: str, private: bool) -> tuple[str, Any]:
    """(the full name, what the Hub tells of the repository; None where there is none yet).

    Raises:
        HubError, ParameterError: as `plan_push`.
    """
    from huggingface_hub import errors

    require_hub("push_to_hub")
    doing = f"the upload to {model_name}"
    if not has_token():
        raise HubError(f"{doing} needs a token that may write: hf auth login, or the variable HF_TOKEN.")
    with refusals_in_words(model_name, doing, writing=True):
        repo_id = model_name if "/" in model_name else f"{hub_api().whoami()['name']}/{model_name}"
        try:
            there = hub_api().model_info(repo_id, files_metadata=True)
        except errors.GatedRepoError:
            raise
        except errors.RepositoryNotFoundError:
            return repo_id, None
    if private and there.private is False:
        raise HubError(f"{repo_id} is a public repository; private=False uploads there, or choose another model_name.")
    return there.id, there


def _check_card(card: str, repo_id: str, licence: str) -> None:
    """Have the Hub check the metadata of a model card; nothing is made there.

    Args:
        licence: that was asked for; "" where none was.
    Raises:
        ParameterError: the Hub does not know the licence.
        HubError: it refuses the card otherwise, or cannot be reached.
    """
    from huggingface_hub import constants
    from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

    with refusals_in_words(repo_id, f"the upload to {repo_id}", writing=True):
        address, headers = f"{constants.ENDPOINT}/api/validate-yaml", build_hf_headers(library_name="rwkv_lab")
        answer = get_session().post(address, json={"content": card, "repoType": "model"}, headers=headers)
        if answer.status_code != 400:
            hf_raise_for_status(answer)
            return
        said = [str(error.get("message")) for error in answer.json().get("errors", ())]
        known = re.search(r'"license" must be one of \[(.*?)\]', " ".join(said))
        if not known or not licence:
            raise ValueError("\n- ".join(["Invalid metadata in README.md", *said]))  # as huggingface_hub says it
        names = re.split(r", *", known[1])
        hint = did_you_mean(licence.lower().replace(" ", "-"), names) or f"; it has {', '.join(names[:5])} and others."
        raise ParameterError(
            f"licence={licence!r}: the Hub has no licence of that name{hint}\n"
            "All names: huggingface.co/docs/hub/repositories-licenses. licence='other' is any that it does not list."
        )


def _files_of(path: Path) -> list[tuple[str, Path]]:
    """The files of a checkpoint by their names in a repository."""
    if path.is_dir():
        return [(p.name, p) for p in sorted(path.iterdir()) if p.is_file() and not p.name.startswith(".")]
    beside = provenance_path(path)
    return [(p.name, p) for p in (path, beside) if p.is_file()]


def _upload(repo_id: str, private: bool, files: dict[str, Path | bytes], there: Any) -> Pushed:
    from huggingface_hub import CommitOperationAdd

    size = sum(len(data) if isinstance(data, bytes) else data.stat().st_size for data in files.values())
    log.info("uploading %s in %d files to %s", human_bytes(size), len(files), repo_id)
    api, before = hub_api(), {sibling.rfilename: sibling for sibling in (there.siblings or () if there else ())}
    with refusals_in_words(repo_id, f"the upload to {repo_id}", writing=True), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the Hub's advice on model cards
        if there is None:
            api.create_repo(repo_id, private=private, exist_ok=True)
        done = api.create_commit(
            repo_id,
            [CommitOperationAdd(name, data) for name, data in files.items()],
            commit_message=f"Upload {' and '.join(sorted(set(files) - {CARD})[:2])} by rwkv_lab {__version__}",
        )
        after = api.model_info(repo_id, revision=done.oid, files_metadata=True)
    now = {sibling.rfilename: sibling for sibling in after.siblings or ()}
    wrong = [name for name, data in files.items() if name not in now or not _same(now[name], data)]
    where = f", first {wrong[0]}" if wrong else ""
    checks = [Check(f"files on the Hub that differ from those here, of {len(files)}{where}", len(wrong), 0, not wrong)]
    if private:
        checks.append(Check("the repository is private", str(after.private), "True", after.private is True))
    return Pushed(
        repo_id=repo_id,
        url=done.commit_url,
        commit=done.oid,
        private=bool(after.private),
        files=tuple(files),
        replaced=tuple(n for n in files if n in before and n in now and before[n].blob_id != now[n].blob_id),
        checks=tuple(checks),
    )


def _same(sibling: Any, data: Path | bytes) -> bool:
    """Whether the Hub states the size and hash of a file: SHA-256 of large ones, git's of small ones."""
    size = len(data) if isinstance(data, bytes) else data.stat().st_size
    if sibling.size != size:
        return False
    stated = sibling.lfs.sha256 if sibling.lfs else sibling.blob_id
    start = hashlib.sha256 if sibling.lfs else partial(hashlib.sha1, f"blob {size}\0".encode())
    with io.BytesIO(data) if isinstance(data, bytes) else data.open("rb") as stream:
        return hashlib.file_digest(stream, start).hexdigest() == stated
