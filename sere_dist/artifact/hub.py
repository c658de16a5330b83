"""Artifacts on the Hugging Face Hub: fetched by name into the Hub's cache, and pushed from a folder.

The token comes from where huggingface_hub takes it: `HF_TOKEN`, `HF_TOKEN_PATH`, or `hf auth login`. No message has it.
"""

from dataclasses import replace
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from sere_dist.artifact.schema import CONFIG_FILE, FILES, ArtifactError
from sere_dist.config import ReroutingConfig
from sere_dist.files import HubName


def local_folder(name: str | Path) -> Path:
    """Returns the folder of an artifact, which is fetched first if `name` is one of the Hub.

    Only the files of an artifact are fetched. A commit that is in this machine's cache is used without network, and any
    other revision as it was fetched last where the Hub can't be reached.

    Raises:
        ArtifactError: it can't be fetched, or is no artifact; the message says what to change.
    """
    try:
        on_hub = HubName.parse(name)
    except ValueError as error:
        raise ArtifactError(str(error)) from error
    if on_hub is None:
        return Path(name)
    try:
        folder = snapshot_download(on_hub.repository, revision=on_hub.revision, allow_patterns=list(FILES))
    except (HTTPError, OSError, HFValidationError) as error:
        raise ArtifactError(f"{name} can't be fetched: {_what_to_do(error, 'read')}") from error
    if not (Path(folder) / CONFIG_FILE).is_file():
        raise ArtifactError(
            f"{name} holds no artifact of sere_dist: it has no {CONFIG_FILE}. Name a repository that was pushed by "
            "`sere-dist push`"
        )
    return Path(folder)


def pinned(settings: ReroutingConfig) -> ReroutingConfig:
    """Returns the settings for processes that run elsewhere, or later: absolute paths, and commits of the Hub.

    Raises:
        ArtifactError: an artifact on the Hub can't be fetched.
    """
    settings = settings.resolved()
    changes: dict[str, object] = {"artifact": _at_commit(settings.artifact)}
    if settings.draft is not None:
        changes["draft"] = settings.draft.model_copy(update={"artifact": _at_commit(settings.draft.artifact)})
    return settings.model_copy(update=changes)


def _at_commit(artifact: str) -> str:
    on_hub = HubName.parse(artifact)
    if on_hub is None:
        return artifact
    return str(replace(on_hub, revision=local_folder(artifact).name))  # the cache has a folder for each commit


def check_may_push(repository: str) -> None:
    """Checks that this machine's token may write to ORG/NAME. A repository that is missing is made, a private one.

    Raises:
        OSError: it may not, or the Hub can't be reached; the message says what to change.
    """
    try:
        api = HfApi()
        api.create_repo(repository, private=True, exist_ok=True)
        api.auth_check(repository, write=True)  # create_repo is content with one that is there and may only be read
    except (HTTPError, OSError, HFValidationError) as error:
        raise OSError(f"hf://{repository} can't be written: {_what_to_do(error, 'write')}") from error


def push(folder: Path, repository: str) -> str:
    """Makes an artifact the content of ORG/NAME in one commit, and prints which, and who may read it.

    A repository that is missing is made, a private one. Files there that are no artifact's are left alone.

    Returns:
        the name of that commit, `hf://ORG/NAME@COMMIT`.

    Raises:
        OSError: it can't be pushed; the message says what to change. The Hub has all of it, or nothing.
    """
    check_may_push(repository)
    own = [name for name in FILES if (folder / name).is_file()]
    try:
        api = HfApi()
        stale = set(FILES).difference(own).intersection(api.list_repo_files(repository))
        # Not upload_folder: it may make several commits, and a name without one could then fetch half an artifact.
        commit = api.create_commit(
            repository,
            [
                *(CommitOperationAdd(name, folder / name) for name in own),
                *(CommitOperationDelete(name) for name in sorted(stale)),
            ],
            commit_message=f"Push the artifact {folder.resolve().name}",
        )
        is_private = api.repo_info(repository).private
    except Exception as error:  # what uploads names no common type
        raise OSError(f"{folder} can't be pushed to hf://{repository}: {_what_to_do(error, 'write')}") from error
    name = str(HubName(repository, commit.oid))
    print(f"pushed {folder} to {name}")
    if is_private:
        print("The repository is private: whoever else should read it needs your leave, or make it public on its page.")
    else:
        print("The repository is public: everybody may read it.")
    return name


def _what_to_do(error: Exception, permission: str) -> str:
    """Returns what is wrong in a user's words; `permission` is "read" or "write"."""
    if isinstance(error, LocalEntryNotFoundError) and isinstance(error.__cause__, HfHubHTTPError):
        error = error.__cause__  # what the Hub said, before the cache was asked
    log_in = f"log in (`hf auth login`, or HF_TOKEN) with a token that may {permission} it"
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
    if isinstance(error, GatedRepoError):
        return f"its owners decide who may read it. Ask for access on its page of the Hub, and {log_in}"
    if isinstance(error, RevisionNotFoundError):
        return "the repository has no such branch, tag or commit. Correct what follows the @"
    if isinstance(error, RepositoryNotFoundError) or status in (401, 403):
        return f"there is none, or this machine's token may not {permission} it. Correct the name, or {log_in}"
    said = " ".join(str(error).split())
    if isinstance(error, LocalEntryNotFoundError):
        return (
            "the Hub is out of reach, and this machine's cache does not have it. Connect to it, or copy the artifact "
            f"here and give its folder ({said})"
        )
    return said or repr(error)
