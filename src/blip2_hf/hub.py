"""Saving and uploading a model together with its model card.

`transformers`' own `push_to_hub` puts an empty template into a repository that has no card, and its
`save_pretrained(push_to_hub=True)` puts it over a README.md that lies in the folder. Here the card of
`model_card` takes that place, a card that somebody wrote is never replaced, and weight files of an earlier
upload do not stay behind.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from fnmatch import fnmatch
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from .model_card import CARD_CLASSES, CARD_NAME, hub_id, model_card_text, write_model_card

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo, HfApi

_WEIGHT_FILES = ("model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json")


class HubModelMixin:
    """`save_pretrained` and `push_to_hub` with a model card, for a `PreTrainedModel` with a `Blip2Config`.

    Stands first among the bases, before those whose `save_pretrained` it calls. The card is that of
    `Blip2ForConditionalGeneration` or `Blip2ForImageTextRetrieval`, whichever the model is or derives from.
    """

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        is_main_process: bool = True,
        *,
        push_to_hub: bool = False,
        repo_id: str | None = None,
        license: str | None = None,
        commit_message: str | None = None,
        private: bool | None = None,
        token: str | bool | None = None,
        create_pr: bool = False,
        **kwargs: Any,
    ) -> None:
        """Saves as `PreTrainedModel.save_pretrained` does, and a model card unless there is a README.md.

        Args:
            save_directory: the folder; made if missing.
            is_main_process: whether this process writes the card (and uploads).
            push_to_hub: whether to upload the files written (and the card, if the repository has none).
            repo_id: the repository, named in the card; default for an upload: the folder's name.
            license: licence id for the card, see `push_to_hub`.
            commit_message, private, token, create_pr: of the upload, see `push_to_hub`.
            kwargs: further arguments of the model's own `save_pretrained`, among them `connector_only`.

        Raises:
            ValueError: for something that cannot be a licence id or a repository's name; with `push_to_hub`
                and `connector_only` for backbones that are only on this machine.
        """
        folder = Path(save_directory)
        connector_only = bool(kwargs.get("connector_only", False))
        self._model_card(repo_id, license, connector_only=connector_only)  # raises before anything is written
        before = {}
        if push_to_hub and is_main_process:
            if connector_only:
                self._check_shareable(repo_id)
            api = _api()
            repo_id = _create_repository(api, repo_id or folder.resolve().name, private, token)
            if connector_only:
                self._check_shareable(repo_id)  # now with its owner
            before = _modification_times(folder)
        super().save_pretrained(save_directory, is_main_process=is_main_process, **kwargs)
        if not is_main_process or folder.is_file():  # for a file, `transformers` only logs an error
            return
        write_model_card(folder, self._model_card(repo_id, license, connector_only=connector_only))
        if push_to_hub:
            files = {name for name, time in _modification_times(folder).items() if before.get(name) != time}
            files.discard(CARD_NAME)
            if _existing_card(api, repo_id, token) is None:
                files.add(CARD_NAME)
            message = commit_message or f"Upload {type(self).__name__}"
            _commit(api, repo_id, folder, files, message, token=token, create_pr=create_pr)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        commit_message: str | None = None,
        commit_description: str | None = None,
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        max_shard_size: int | str = "50GB",
        tags: str | Sequence[str] | None = None,
        license: str | None = None,
        language: str | Sequence[str] = "en",
        processor: Any = None,
        connector_only: bool = False,
    ) -> CommitInfo:
        """Uploads the model in one commit, with a generated card if the repository has none.

        Args:
            repo_id: "owner/model", or "model" in the user's own namespace; made if missing.
            commit_message: default "Upload Blip2ForConditionalGeneration" or as the class is called.
            commit_description: longer text of the commit.
            private: whether a new repository is private; None: as the owner's settings say.
            token: access token; None or True: the stored one; False: none.
            revision: branch to upload to; made if missing.
            create_pr: whether to open a pull request instead of writing to the main branch.
            max_shard_size: largest weight file, in bytes or such as "5GB".
            tags: further tag(s) of the card; an existing card gets them too.
            license: licence id for the generated card ("mit", "apache-2.0", …); None: the card asks for one.
            language: ISO 639-1 code(s) for the generated card.
            processor: the `Blip2Processor` to upload along with the model; None: leave it to its own
                `push_to_hub`, which keeps the card.
            connector_only: upload only what was trained; others must be able to fetch the backbones by the
                names in the config.

        Returns:
            The commit, a `str` with its address.

        Raises:
            ValueError: for something that cannot be a licence id or a repository's name; for `connector_only`
                with backbones that are only on this machine; for `create_pr` together with `revision`.
        """
        if create_pr and revision is not None:
            raise ValueError(f"`revision` must be None with `create_pr=True`, got {revision!r}")
        if connector_only:
            self._check_shareable(repo_id)
        tags = [tags] if isinstance(tags, str) else tags or ()
        tags = [*(getattr(self, "model_tags", None) or ()), *tags]
        self._model_card(None, license, tags, language, connector_only)  # raises before a repository is made
        api = _api()
        repo_id = _create_repository(api, repo_id, private, token, revision)
        if connector_only:
            self._check_shareable(repo_id)  # now with its owner
        with TemporaryDirectory() as temporary:
            folder = Path(temporary)
            card = _existing_card(api, repo_id, token, revision)
            if card is None:
                card = self._model_card(repo_id, license, tags, language, connector_only)
            else:
                card = _with_tags(card, tags)
            # Before the model, whose `save_pretrained` leaves a card alone; as bytes, to keep its line ends.
            (folder / CARD_NAME).write_bytes(card.encode())
            options = {"connector_only": True} if connector_only else {}
            self.save_pretrained(folder, max_shard_size=max_shard_size, **options)
            if processor is not None:
                processor.save_pretrained(folder)
            files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
            message = commit_message or f"Upload {type(self).__name__}"
            return _commit(
                api,
                repo_id,
                folder,
                files,
                message,
                commit_description=commit_description,
                token=token,
                revision=revision,
                create_pr=create_pr,
            )

    def _model_card(
        self,
        repo_id: str | None,
        license: str | None,
        tags: Sequence[str] = (),
        language: str | Sequence[str] = "en",
        connector_only: bool = False,
    ) -> str:
        return model_card_text(
            self.config,
            model_class=next(base.__name__ for base in type(self).__mro__ if base.__name__ in CARD_CLASSES),
            repo_id=repo_id,
            license=license,
            language=language,
            tags=tags,
            connector_only=connector_only,
            trained_parts=self._changed_parts(),
            parameter_counts=parameter_counts(self),
        )

    def _check_shareable(self, repo_id: str | None) -> None:
        """Raises where an upload without the backbones would be of no use to others."""
        origin = getattr(self.config, "connector_of", None) or self.config._name_or_path
        if hub_id(origin) is None:
            raise ValueError(
                "`connector_only=True` uploads no backbones, so they must come from a checkpoint on the Hub, "
                f"but they come from {origin or None!r}; upload the model in full once"
            )
        if hub_id(origin) == repo_id:
            raise ValueError(
                f"`repo_id` must not be {repo_id!r} with `connector_only=True`: the backbones come from it"
            )


def parameter_counts(model: Any) -> Mapping[str, int]:
    """Numbers of parameters: "vision_model", "language_model" (if any) and, as "qformer", all the rest."""
    counts: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        part = name.split(".", 1)[0]
        part = part if part in ("vision_model", "language_model") else "qformer"
        counts[part] = counts.get(part, 0) + parameter.numel()
    return counts


def _api() -> HfApi:
    from huggingface_hub import HfApi

    return HfApi(library_name="blip2_hf")


def _create_repository(
    api: HfApi, repo_id: str, private: bool | None, token: str | bool | None, revision: str | None = None
) -> str:
    """Makes the repository and the branch where they are missing; returns the repository's full name."""
    repo_id = api.create_repo(repo_id, private=private, token=token, exist_ok=True).repo_id
    if revision is not None and not revision.startswith("refs/pr/"):
        api.create_branch(repo_id, branch=revision, token=token, exist_ok=True)
    return repo_id


def _existing_card(api: HfApi, repo_id: str, token: str | bool | None, revision: str | None = None) -> str | None:
    """The repository's card; None if there is none, or only the template that a processor's upload leaves."""
    from huggingface_hub.errors import EntryNotFoundError

    try:
        path = api.hf_hub_download(repo_id, CARD_NAME, revision=revision, token=token)
    except EntryNotFoundError:
        return None
    card = Path(path).read_bytes().decode()
    return None if _is_untouched_template(card) else card


def _is_untouched_template(card: str) -> bool:
    """Whether the card is the Hub's template with nothing in it but the one sentence of `transformers`."""
    from huggingface_hub import ModelCard, ModelCardData

    mark = "<description>"
    template = ModelCard.from_template(ModelCardData(), model_description=mark).text.strip()
    before, _, after = template.partition(mark)
    text = ModelCard(card, ignore_metadata_errors=True).text.strip()
    if not (text.startswith(before) and text.endswith(after)):
        return False
    description = text[len(before) : len(text) - len(after)]
    return "automatically generated" in description and "\n" not in description


def _with_tags(card: str, tags: Sequence[str]) -> str:
    from huggingface_hub import ModelCard

    parsed = ModelCard(card)
    present = parsed.data.tags or []
    new = [tag for tag in tags if tag not in present]
    if not new:
        return card  # as it is, not as it would be written again
    parsed.data.tags = [*present, *new]
    return str(parsed)


def _modification_times(folder: Path) -> dict[str, int]:
    if not folder.is_dir():
        return {}
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.stat().st_mtime_ns for path in files}


def _commit(
    api: HfApi,
    repo_id: str,
    folder: Path,
    files: set[str],
    commit_message: str,
    *,
    commit_description: str | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
) -> CommitInfo:
    """Uploads `files` of `folder`, and deletes the weight files of an earlier upload that they replace."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    operations = [CommitOperationAdd(path_in_repo=name, path_or_fileobj=folder / name) for name in sorted(files)]
    if any(_is_weight_file(name) for name in files):
        # An unsharded file that stayed behind would be loaded instead of the new shards.
        present = api.list_repo_files(repo_id, revision=revision, token=token)
        stale = [name for name in present if _is_weight_file(name) and name not in files]
        operations += [CommitOperationDelete(path_in_repo=name) for name in stale]
    return api.create_commit(
        repo_id,
        operations,
        commit_message=commit_message,
        commit_description=commit_description,
        token=token,
        revision=revision,
        create_pr=create_pr,
    )


def _is_weight_file(name: str) -> bool:
    return any(fnmatch(name, pattern) for pattern in _WEIGHT_FILES)


def push_folder(folder: str | os.PathLike[str], repo_id: str, *, token: str | bool | None = None) -> CommitInfo:
    """Uploads a folder that holds a whole model in one commit; a card of the repository stays.

    Args:
        folder: as `save_pretrained` or `conversion/convert.py` writes it.
        repo_id: "owner/model", or "model" in the user's own namespace; made if missing.
        token: access token; None or True: the stored one; False: none.

    Raises:
        ValueError: if `repo_id` cannot be a repository's name.
    """
    folder, api = Path(folder), _api()
    repo_id = _create_repository(api, repo_id, None, token)
    files = set(_modification_times(folder))
    if _existing_card(api, repo_id, token) is not None:
        files.discard(CARD_NAME)
    return _commit(api, repo_id, folder, files, f"Upload {folder.name}", token=token)
