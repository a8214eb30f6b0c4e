"""From a model's name to a folder on this disk: a local path, or a Hugging Face hub id that is downloaded once."""

import os
from collections.abc import Sequence
from pathlib import Path

from fastft_jax.errors import CheckpointError, ConfigError

# Never *.bin, *.pt or *.py: nothing that could run code is fetched.
PATTERNS = ("*.safetensors", "*.json", "*.jinja", "*.model", "vocab.txt", "merges.txt")
# Folders (original/, onnx/, ...) and consolidated files repeat the same weights in other formats.
_IGNORED = ("*/*", "consolidated*.safetensors")


def resolve_model(
    name_or_path: str | os.PathLike[str],
    *,
    revision: str | None = None,
    token: str | None = None,
    allow_patterns: Sequence[str] = PATTERNS,
) -> Path:
    """The folder that holds the model (or adapter): `name_or_path` itself, or the hub's snapshot of it.

    A folder that exists wins over a hub id of the same name. With HF_HUB_OFFLINE set only the cache is looked at.
    Raises CheckpointError when there is neither folder nor repository, or it cannot be fetched (offline, no access, no
    network, full disk); ConfigError for a `revision` of a local folder.
    """
    name = os.fspath(name_or_path)
    if not name:
        raise ConfigError("the model's name is empty: give a folder or a hub id like 'org/model'")
    path = Path(name).expanduser()
    if path.is_dir():
        if revision is not None:
            raise ConfigError(f"revision={revision!r} is for hub ids, but {path} is a local folder")
        return path
    if path.exists():
        raise CheckpointError(f"{path} is a file: pass the folder that holds the model")
    if not isinstance(name_or_path, str):
        raise CheckpointError(f"{path.absolute()} does not exist (for a hub id pass a string)")
    return _download(name, path, revision, token, allow_patterns)


def _download(name: str, path: Path, revision: str | None, token: str | None, patterns: Sequence[str]) -> Path:
    import huggingface_hub
    from huggingface_hub import constants, errors

    wanted = name if revision is None else f"{name} (revision {revision})"
    try:
        folder = huggingface_hub.snapshot_download(
            name, revision=revision, token=token, allow_patterns=list(patterns), ignore_patterns=list(_IGNORED)
        )
    except errors.HFValidationError:
        raise CheckpointError(
            f"{name!r} is no folder (looked at {path.absolute()}) and no hub id like 'org/model'"
        ) from None
    except errors.GatedRepoError as error:
        raise CheckpointError(
            f"{wanted} is gated: accept its terms on the hub, then pass token=... or run `hf auth login`"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise CheckpointError(
            f"{wanted} is no folder here ({path.absolute()}) and no repository on the hub that you can see; "
            f"for a private one pass token=... or run `hf auth login`"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise CheckpointError(f"{name} has no revision {revision!r} on the hub") from error
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled, errors.IncompleteSnapshotError) as error:
        if constants.HF_HUB_OFFLINE:
            why = "HF_HUB_OFFLINE is set and the hub's cache does not have it in full"
        else:
            why = "the hub cannot be reached and its cache does not have it in full"
        raise CheckpointError(
            f"{wanted}: {why}; no folder of that name either ({path.absolute()}). Download it first, or give its folder"
        ) from error
    except errors.HfHubHTTPError as error:
        status = getattr(error.response, "status_code", None)
        hint = ": the token is not valid, run `hf auth login` again" if status == 401 else ""
        raise CheckpointError(f"{wanted}: the hub answered with status {status}{hint}") from error
    except Exception as error:  # a full disk, a proxy, a malformed answer: the client's own types vary by version
        raise CheckpointError(f"{wanted} could not be downloaded: {type(error).__name__}: {error}") from error
    return Path(folder)
