"""What users do with a Hub, in a process of its own: `huggingface_hub` reads its settings when it is imported.

Run by test_hub.py, which starts the Hub: `python hub_client.py FOLDER` works in that folder and leaves what it saw
in FOLDER/facts.json.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub import HfApi, ModelCard
from PIL import Image

from blip2_hf import (
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2ForImageTextRetrieval,
    Blip2ImageProcessor,
    Blip2Processor,
)
from blip2_hf.hub import push_folder
from tiny_models import IMAGE_SIZE, QFORMER, QUERIES, VISION, text_config
from tiny_tokenizers import tiny_bert_tokenizer, tiny_opt_tokenizer

USERS_CARD = "---\nlicense: mit\ntags:\n- birds\n---\nMy own words.\n"


def captioner() -> tuple[Blip2ForConditionalGeneration, Blip2Processor]:
    images = Blip2ImageProcessor(size={"height": IMAGE_SIZE, "width": IMAGE_SIZE})
    processor = Blip2Processor(images, tiny_opt_tokenizer(), num_query_tokens=QUERIES)
    config = Blip2Config(
        vision_config=VISION,
        qformer_config=QFORMER,
        text_config=text_config("opt"),
        num_query_tokens=QUERIES,
        image_text_hidden_size=16,
        image_token_index=processor.image_token_id,
    )
    return Blip2ForConditionalGeneration(config).eval(), processor


def scorer() -> tuple[Blip2ForImageTextRetrieval, Blip2Processor]:
    images = Blip2ImageProcessor(size={"height": IMAGE_SIZE, "width": IMAGE_SIZE})
    config = Blip2Config(
        vision_config=VISION,
        qformer_config={**QFORMER, "use_qformer_text_input": True},
        num_query_tokens=QUERIES,
        image_text_hidden_size=16,
    )
    return Blip2ForImageTextRetrieval(config).eval(), Blip2Processor(images, tiny_bert_tokenizer())


def photo() -> Image.Image:
    """Smooth and not square, as photos are."""
    rows, columns = np.mgrid[0:60, 0:80]
    return Image.fromarray(np.stack([3 * columns, 4 * rows, columns + rows], axis=-1).astype(np.uint8))


def same_tensors(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    one, other = one.state_dict(), other.state_dict()
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def same_inputs(one: Blip2Processor, other: Blip2Processor) -> bool:
    one, other = (processor(photo(), "a photo of", return_tensors="pt") for processor in (one, other))
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def run_snippet(card: str) -> list[str]:
    """Runs the card's python block as it stands; the lines it prints."""
    code = card.split("```python\n")[1].split("```")[0]
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(code, "snippet", "exec"), {"__name__": "__main__"})
    return printed.getvalue().splitlines()


def error_of(action, *args: Any, **options: Any) -> str:
    try:
        action(*args, **options)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "none"


def generation() -> dict[str, Any]:
    """The processor first, then the model, into a private repository; then other weights, in several files."""
    model, processor = captioner()
    facts: dict[str, Any] = {}
    processor.push_to_hub("tester/captioner", private=True)
    facts["template"] = ModelCard.load("tester/captioner").text
    commit = model.push_to_hub("captioner", license="MIT", tags=["tiny"], commit_message="weights")
    facts["commit"] = {"url": str(commit), "message": commit.commit_message}
    loaded = Blip2ForConditionalGeneration.from_pretrained("tester/captioner")
    facts["tensors"] = same_tensors(model, loaded)
    facts["inputs"] = same_inputs(processor, Blip2Processor.from_pretrained("tester/captioner"))
    facts["printed"] = run_snippet(ModelCard.load("tester/captioner").content)
    with torch.no_grad():
        model.query_tokens += 1
    facts["changed"] = not same_tensors(model, loaded)
    HfApi().upload_file(path_or_fileobj=USERS_CARD.encode(), path_in_repo="README.md", repo_id="tester/captioner")
    model.push_to_hub("tester/captioner", max_shard_size="100KB")
    facts["second_tensors"] = same_tensors(model, Blip2ForConditionalGeneration.from_pretrained("tester/captioner"))
    model.push_to_hub("tester/captioner", create_pr=True, tags="tiny")
    model.push_to_hub("tester/captioner", revision="trial", commit_description="in full")
    return facts


def retrieval() -> dict[str, Any]:
    """Model and processor in one commit; then the processor on its own, which must keep the card."""
    model, processor = scorer()
    facts: dict[str, Any] = {}
    model.push_to_hub("tester/scorer", processor=processor)
    processor.tokenizer.model_max_length = 64
    processor.push_to_hub("tester/scorer", commit_message="processor")
    facts["tensors"] = same_tensors(model, Blip2ForImageTextRetrieval.from_pretrained("tester/scorer"))
    facts["inputs"] = same_inputs(processor, Blip2Processor.from_pretrained("tester/scorer"))
    facts["printed"] = run_snippet(ModelCard.load("tester/scorer").content)
    return facts


def saving_and_pushing() -> dict[str, Any]:
    """`save_pretrained(push_to_hub=True)`, into a new folder and into one with a README.md and other files."""
    model, _ = scorer()
    model.save_pretrained("plain", push_to_hub=True, license="mit")
    folder = Path("described")
    folder.mkdir()
    (folder / "README.md").write_text(USERS_CARD)
    (folder / "notes.txt").write_text("not for the Hub")
    model.save_pretrained(folder, push_to_hub=True, repo_id="tester/described")
    return {"plain": sorted(os.listdir("plain")), "readme": (folder / "README.md").read_text()}


def folders() -> dict[str, Any]:
    """A finished folder as it lies there; then another one over it, into whose repository somebody put a card."""
    (Path("plain") / "qformer_tokenizer").mkdir()
    (Path("plain") / "qformer_tokenizer" / "vocab.txt").write_text("[PAD]")
    facts: dict[str, Any] = {"url": str(push_folder("plain", "folder"))}
    HfApi().upload_file(path_or_fileobj=USERS_CARD.encode(), path_in_repo="README.md", repo_id="tester/folder")
    model, _ = scorer()
    model.save_pretrained("sharded", max_shard_size="30KB")
    push_folder("sharded", "tester/folder")
    facts["tensors"] = same_tensors(model, Blip2ForImageTextRetrieval.from_pretrained("tester/folder"))
    return facts


def connector() -> dict[str, Any]:
    model = Blip2ForConditionalGeneration.from_pretrained("tester/captioner")
    with torch.no_grad():
        model.query_tokens += 1
    model.push_to_hub("tester/connector", connector_only=True)
    loaded = Blip2ForConditionalGeneration.from_pretrained("tester/connector")
    model.save_pretrained("full")
    local = Blip2ForConditionalGeneration.from_pretrained("full")
    return {
        "tensors": same_tensors(model, loaded),
        "onto_itself": error_of(model.push_to_hub, "captioner", connector_only=True),
        "local": error_of(local.push_to_hub, "tester/never", connector_only=True),
    }


def refusals() -> dict[str, Any]:
    model, _ = scorer()
    push = model.push_to_hub
    return {
        "license": error_of(push, "tester/never", license="my own"),
        "revision": error_of(push, "tester/never", create_pr=True, revision="trial"),
        "token": error_of(push, "tester/never", token="hf_wrong"),
    }


def main(folder: str) -> None:
    torch.manual_seed(0)
    os.chdir(folder)
    photo().save("photo.jpg")
    steps = (generation, retrieval, saving_and_pushing, folders, connector, refusals)
    facts = {step.__name__: step() for step in steps}
    Path("facts.json").write_text(json.dumps(facts))


if __name__ == "__main__":
    main(sys.argv[1])
