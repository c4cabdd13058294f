"""Uploading to and downloading from a Hub on loopback, and the model card that is saved with a model."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard, ModelCardData

import hub_client
from blip2_hf.hub import _is_untouched_template, parameter_counts
from hub_server import HubServer

TESTS = Path(__file__).resolve().parent
SOURCE = TESTS.parent / "src"


@pytest.fixture(scope="module")
def hub() -> Iterator[HubServer]:
    with HubServer() as server:
        yield server


@pytest.fixture(scope="module")
def facts(hub: HubServer, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the user's process saw; everything it did is done when a test looks at the Hub."""
    folder = tmp_path_factory.mktemp("client")
    inherited = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    path = os.pathsep.join([str(SOURCE), str(TESTS), *map(os.path.abspath, inherited)])
    done = subprocess.run(
        [sys.executable, str(TESTS / "hub_client.py"), str(folder)],
        env={**os.environ, **hub.environment(folder / "cache"), "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    return json.loads((folder / "facts.json").read_text())


def card(hub: HubServer, repo_id: str, revision: str = "main") -> ModelCard:
    return ModelCard(hub.files(repo_id, revision)["README.md"].decode())


def test_hub_understood_every_request(hub: HubServer, facts: dict) -> None:
    assert hub.unknown_requests == []
    assert any(request.startswith("PUT /lfs-storage/") for request in hub.requests)


def test_model_and_processor_come_back(hub: HubServer, facts: dict) -> None:
    for step in ("generation", "retrieval"):
        assert facts[step]["tensors"] and facts[step]["inputs"]
    assert hub.repositories["tester/captioner"].private
    assert not hub.repositories["tester/scorer"].private
    commit = facts["generation"]["commit"]
    assert commit["url"].startswith(f"{hub.endpoint}/tester/captioner/commit/") and commit["message"] == "weights"


def test_card_replaces_the_template_of_the_processors_upload(hub: HubServer, facts: dict) -> None:
    assert "[More Information Needed]" in facts["generation"]["template"]
    commits = hub.repositories["tester/captioner"].commits.values()
    (written,) = (commit.files["README.md"].content for commit in commits if commit.summary == "weights")
    generated = ModelCard(written.decode())
    assert generated.data.license == "mit" and generated.data.tags[-1] == "tiny"
    assert generated.data.pipeline_tag == "image-to-text"
    assert "[More Information Needed]" not in generated.text
    assert 'model="tester/captioner"' in generated.text


def test_processors_upload_keeps_the_card(hub: HubServer, facts: dict) -> None:
    _, together, processor = hub.repositories["tester/scorer"].commits.values()
    assert processor.summary == "processor"
    assert processor.files["README.md"] == together.files["README.md"]
    assert processor.files["tokenizer_config.json"] != together.files["tokenizer_config.json"]
    data = card(hub, "tester/scorer").data
    assert (data.license, data.pipeline_tag) == ("other", "zero-shot-image-classification")
    # everything came with the model, in one commit
    assert {"model.safetensors", "config.json", "tokenizer.json", "processor_config.json"} <= set(together.files)


def test_snippets_run(facts: dict) -> None:
    assert len(facts["generation"]["printed"]) >= 2
    lines = facts["retrieval"]["printed"]
    assert [line.split(":")[0] for line in lines] == ["a photo of a cat", "a photo of a dog"]
    assert all("cosine" in line and line.endswith("%") for line in lines)


def test_second_upload_leaves_no_old_weights_and_keeps_the_users_card(hub: HubServer, facts: dict) -> None:
    assert facts["generation"]["changed"] and facts["generation"]["second_tensors"]
    files = hub.files("tester/captioner")
    assert "model.safetensors" not in files and "model.safetensors.index.json" in files
    assert sum(name.startswith("model-0") for name in files) > 1
    assert files["README.md"].decode() == hub_client.USERS_CARD
    assert "tokenizer.json" in files  # the processor's files are nobody's old weights


def test_pull_request_and_branch(hub: HubServer, facts: dict) -> None:
    for revision, tags in (("refs/pr/1", ["birds", "tiny"]), ("trial", ["birds"])):
        files = hub.files("tester/captioner", revision)
        assert "model.safetensors" in files and not any(name.startswith("model-0") for name in files)
        proposed = card(hub, "tester/captioner", revision)
        assert proposed.data.tags == tags and "My own words." in proposed.text


def test_save_pretrained_that_pushes(hub: HubServer, facts: dict) -> None:
    assert facts["saving_and_pushing"]["plain"] == [
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
    ]
    assert set(hub.files("tester/plain")) == {".gitattributes", *facts["saving_and_pushing"]["plain"]}
    assert card(hub, "tester/plain").data.license == "mit"
    assert '"tester/plain"' in card(hub, "tester/plain").text
    assert facts["saving_and_pushing"]["readme"] == hub_client.USERS_CARD
    assert hub.files("tester/described")["README.md"].decode() == hub_client.USERS_CARD
    assert "notes.txt" not in hub.files("tester/described")


def test_upload_of_a_folder(hub: HubServer, facts: dict) -> None:
    assert "tester/folder" in facts["folders"]["url"] and facts["folders"]["tensors"]
    files = hub.files("tester/folder")
    assert files["qformer_tokenizer/vocab.txt"] == b"[PAD]"
    assert files["README.md"].decode() == hub_client.USERS_CARD
    assert "model.safetensors" not in files and "model.safetensors.index.json" in files


def test_connector_only_upload(hub: HubServer, facts: dict) -> None:
    assert facts["connector"]["tensors"]
    files = hub.files("tester/connector")
    assert "connector.safetensors" in files and "model.safetensors" not in files
    data = card(hub, "tester/connector").data
    assert (data.base_model, data.base_model_relation) == (["tester/captioner"], "adapter")
    assert "`repo_id` must not be 'tester/captioner'" in facts["connector"]["onto_itself"]
    assert facts["connector"]["local"].startswith("ValueError: `connector_only=True` uploads no backbones")


def test_refused_uploads_leave_nothing(hub: HubServer, facts: dict) -> None:
    assert facts["refusals"]["license"].startswith("ValueError: `license` must be None or a licence id")
    assert facts["refusals"]["revision"].startswith("ValueError: `revision` must be None with `create_pr=True`")
    assert "401" in facts["refusals"]["token"]
    assert "tester/never" not in hub.repositories


@pytest.mark.parametrize("make", [hub_client.captioner, hub_client.scorer])
def test_saved_folder_has_a_card_whose_snippet_runs_there(
    make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, processor = make()
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    monkeypatch.chdir(tmp_path)
    hub_client.photo().save("photo.jpg")
    text = (tmp_path / "README.md").read_text()
    assert len(hub_client.run_snippet(text)) >= 2
    assert ModelCard(text).data.base_model is None
    for part, count in parameter_counts(model).items():
        assert f"| {count:,} |" in text, part


def test_saving_keeps_a_readme(tmp_path: Path) -> None:
    model, _ = hub_client.scorer()
    (tmp_path / "README.md").write_text(hub_client.USERS_CARD)
    model.save_pretrained(tmp_path, max_shard_size="50KB")
    assert (tmp_path / "README.md").read_text() == hub_client.USERS_CARD
    assert (tmp_path / "model.safetensors.index.json").exists()


def test_only_the_main_process_writes_a_card(tmp_path: Path) -> None:
    model, _ = hub_client.scorer()
    model.save_pretrained(tmp_path, is_main_process=False)
    assert not (tmp_path / "README.md").exists()


def test_a_wrong_license_is_refused_before_anything_is_saved(tmp_path: Path) -> None:
    model, _ = hub_client.scorer()
    with pytest.raises(ValueError, match="`license` must be None or a licence id"):
        model.save_pretrained(tmp_path / "new", license="my own")
    assert not (tmp_path / "new").exists()


def test_parameter_counts_are_complete() -> None:
    for make, parts in (
        (hub_client.captioner, {"vision_model", "qformer", "language_model"}),
        (hub_client.scorer, {"vision_model", "qformer"}),
    ):
        model, _ = make()
        counts = parameter_counts(model)
        assert set(counts) == parts and sum(counts.values()) == model.num_parameters()


def test_only_an_untouched_template_counts_as_no_card() -> None:
    said = "This is the model card of a model. This model card has been automatically generated."
    template = ModelCard.from_template(ModelCardData(tags=["x"]), model_description=said).content
    assert _is_untouched_template(template)
    assert not _is_untouched_template(template.replace("[More Information Needed]", "Mine", 1))
    assert not _is_untouched_template(template.replace(said, "A model of birds."))
    assert not _is_untouched_template(template + "\nMy own words.\n")
    assert not _is_untouched_template(hub_client.USERS_CARD)
