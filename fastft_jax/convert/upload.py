"""An export to the Hugging Face hub: made in a temporary folder, read back, then uploaded in one commit."""

import tempfile
from pathlib import Path
from typing import Any

from fastft_jax.convert.atomic import write_bytes
from fastft_jax.convert.model_card import model_card
from fastft_jax.errors import CheckpointError, ConfigError


def push_to_hub(
    model: Any,
    repo_id: str,
    tokenizer: Any | None = None,
    save_method: str = "lora",
    *,
    private: bool = False,
    token: str | None = None,
    run: str | Path | None = None,
    commit_message: str | None = None,
    **options: Any,
) -> str:
    """Upload the adapter ("lora") or a merged model to `repo_id`, made if it is not there; the commit's address.

    run: the training output folder, whose run.json and metrics.jsonl the card quotes (the loaded adapter's, if None).
    options as in `save_pretrained_merged`. The repository is asked for before anything is written. Raises ConfigError
    for a name that is none, CheckpointError where the hub refuses or cannot be reached, and as the export does.
    """
    import huggingface_hub
    from huggingface_hub.errors import HFValidationError

    api = huggingface_hub.HfApi(token=token)
    try:
        _ask(repo_id, lambda: api.create_repo(repo_id, private=private, exist_ok=True))
    except HFValidationError as error:
        raise ConfigError(f"repo_id={repo_id!r} is not a hub id like 'name/model': {error}") from None
    with tempfile.TemporaryDirectory(prefix="fastft-push-") as scratch:
        folder = Path(scratch) / "export"
        written = model.save_pretrained_merged(folder, tokenizer, save_method, **options)
        difference = getattr(written, "difference", None)
        card = model_card(model, save_method, difference, run=None if run is None else Path(run))
        write_bytes(folder / "README.md", card.encode())
        message = commit_message or f"{save_method} by fastft-jax"
        done = _ask(repo_id, lambda: api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message=message))
    return done.commit_url


def _ask(repo_id: str, call: Any) -> Any:
    """What the hub answers; its refusals as CheckpointError."""
    from huggingface_hub import errors

    try:
        return call()
    except errors.HFValidationError:
        raise
    except errors.HfHubHTTPError as error:
        status = getattr(error.response, "status_code", None)
        hint = ": pass a token with write access, or run `hf auth login`" if status in (401, 403) else ""
        raise CheckpointError(f"{repo_id}: the hub answered with status {status}{hint}") from error
    except CheckpointError:
        raise
    except Exception as error:  # no network, a proxy, a full disk: the client's own types vary by version
        raise CheckpointError(f"{repo_id} could not be uploaded: {type(error).__name__}: {error}") from error
